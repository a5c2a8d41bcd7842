"""What becomes of optimizer state: a loop over ids says which old rows each new row inherits from."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Optimizer
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from cce_torchrec import CCE, CompressedEmbeddingBagCollection, ReclusterConfig, recluster
from tests.unit.cce_tables import Snapshot, build, cce_table
from tests.unit.oracles import make_kjt

pytestmark = pytest.mark.usefixtures("one_thread")

V, K, HELPERS = 60, 5, 80  # more helper rows than ids, so some new rows inherit from none
METHOD = CCE(num_rows=K, num_columns=2, num_helper_rows=HELPERS)
OPTIMIZERS: dict[type[Optimizer], list[str]] = {
    Adagrad: ["sum"],
    Adam: ["exp_avg", "exp_avg_sq"],
    RowWiseAdagrad: ["sum"],
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS, ids=lambda make: make.__name__)


def train(collection: CompressedEmbeddingBagCollection, optimizer: Optimizer | None, steps: int = 2) -> None:
    bags = [[(7 * i + j) % V for j in range(i % 4)] for i in range(V)]
    for _ in range(steps):
        collection.zero_grad()
        (collection(make_kjt({"f_t": bags})).values() ** 2).sum().backward()
        if optimizer is not None:
            optimizer.step()


def trained(make: Callable[..., Optimizer]) -> tuple[CompressedEmbeddingBagCollection, Optimizer]:
    collection = build(cce_table(V, method=METHOD))
    optimizer = make(collection.parameters(), lr=0.05)
    train(collection, optimizer)
    return collection, optimizer


def states(collection: CompressedEmbeddingBagCollection, optimizer: Optimizer, name: str) -> list[Tensor]:
    return [optimizer.state[book][name].clone().view(K + HELPERS, -1) for book in Snapshot.of(collection).codebooks]


def inherited(old_RS: Tensor, before: Snapshot, after: Snapshot, column: int, weights: Tensor) -> Tensor:
    """The mean over the ids that use a new row of the state of the old row that they used in its place."""
    new_RS = torch.zeros_like(old_RS, dtype=torch.float64)
    for row in range(K + HELPERS):
        total, mass = torch.zeros(old_RS.shape[1], dtype=torch.float64), 0.0
        for v in range(V):
            if row < K and int(after.assignments_VC[v, column]) == row:
                source = int(before.assignments_VC[v, column])
            elif row >= K and int(after.helpers_VC[v, column]) == row - K:
                source = K + int(before.helpers_VC[v, column])
            else:
                continue
            total += float(weights[v]) * old_RS[source].double()
            mass += float(weights[v])
        if mass > 0:
            new_RS[row] = total / mass
    return new_RS


@pytest.mark.parametrize("weighted", [False, True], ids=["ids alike", "weighted ids"])
@every_optimizer
def test_carry_gives_each_row_the_mean_over_its_ids(make: type[Optimizer], weighted: bool) -> None:
    collection, optimizer = trained(make)
    before = Snapshot.of(collection)
    old = {name: states(collection, optimizer, name) for name in OPTIMIZERS[make]}
    weights = torch.rand(V, generator=torch.Generator().manual_seed(0)) if weighted else torch.ones(V)
    options: dict[str, Any] = {"id_weights": {"t": weights}} if weighted else {}
    recluster(collection, seed=0, optimizer=optimizer, **options)  # the default
    after = Snapshot.of(collection)
    for name in OPTIMIZERS[make]:
        for column, (old_RS, new_RS) in enumerate(zip(old[name], states(collection, optimizer, name), strict=True)):
            assert old_RS.any()
            expected = inherited(old_RS, before, after, column, weights)
            torch.testing.assert_close(new_RS.double(), expected, rtol=1e-5, atol=1e-7)


@every_optimizer
def test_reset_starts_at_zero(make: type[Optimizer]) -> None:
    collection, optimizer = trained(make)
    tensors = {name: [optimizer.state[b][name] for b in Snapshot.of(collection).codebooks] for name in OPTIMIZERS[make]}
    assert all(tensor.any() for kind in tensors.values() for tensor in kind)
    recluster(collection, seed=0, optimizer=optimizer, config=ReclusterConfig(optimizer_state="reset"))
    assert not any(tensor.any() for kind in tensors.values() for tensor in kind)  # in place


@pytest.mark.parametrize("mode", ["reset", "carry"])
@every_optimizer
def test_training_goes_on(make: type[Optimizer], mode: Any) -> None:
    collection, optimizer = trained(make)
    recluster(collection, seed=0, optimizer=optimizer, config=ReclusterConfig(optimizer_state=mode))
    before = collection.dense_weight("t")
    train(collection, optimizer)
    assert not torch.equal(collection.dense_weight("t"), before)
    assert all(parameter.isfinite().all() for parameter in collection.parameters())


@pytest.mark.parametrize("mode", ["reset", "carry"])
def test_an_optimizer_without_state(mode: Any) -> None:
    collection = build(cce_table(V, method=METHOD))
    optimizer = SGD(collection.parameters(), lr=0.1)
    train(collection, optimizer)
    recluster(collection, seed=0, optimizer=optimizer, config=ReclusterConfig(optimizer_state=mode))
    train(collection, optimizer)


@pytest.mark.parametrize("mode", ["reset", "carry"])
def test_an_optimizer_that_has_not_stepped(mode: Any) -> None:
    collection = build(cce_table(V, method=METHOD))
    optimizer = Adam(collection.parameters())
    recluster(collection, seed=0, optimizer=optimizer, config=ReclusterConfig(optimizer_state=mode))
    train(collection, optimizer)


@pytest.mark.parametrize("make", [Adagrad, RowWiseAdagrad], ids=lambda make: make.__name__)
def test_an_optimizer_applied_in_backward_needs_no_naming(make: type[Optimizer]) -> None:
    collection = build(cce_table(V, method=METHOD))
    apply_optimizer_in_backward(make, collection.parameters(), {"lr": 0.05})
    train(collection, None)
    tensors = [o.state[p]["sum"] for p in collection.parameters() for o in p._in_backward_optimizers]
    assert len(tensors) == 2
    assert all(tensor.any() for tensor in tensors)
    before, old = Snapshot.of(collection), [tensor.clone().view(K + HELPERS, -1) for tensor in tensors]
    recluster(collection, seed=0)
    after = Snapshot.of(collection)
    for column, (old_RS, new) in enumerate(zip(old, tensors, strict=True)):
        expected = inherited(old_RS, before, after, column, torch.ones(V))
        torch.testing.assert_close(new.view(K + HELPERS, -1).double(), expected, rtol=1e-5, atol=1e-7)
    recluster(collection, seed=1, config=ReclusterConfig(optimizer_state="reset"))
    assert not any(tensor.any() for tensor in tensors)


def test_state_of_other_parameters_is_left_alone() -> None:
    collection = build(cce_table(V, method=METHOD))
    head = torch.nn.Linear(8, 1)
    optimizer = Adam([*collection.parameters(), *head.parameters()])
    head(collection(make_kjt({"f_t": [[1], [2]]})).values()).sum().backward()
    optimizer.step()
    before = optimizer.state[head.weight]["exp_avg"].clone()
    recluster(torch.nn.ModuleList([collection, head]), seed=0, optimizer=optimizer)
    assert before.any()
    assert torch.equal(optimizer.state[head.weight]["exp_avg"], before)
