"""Gradients by id against loops over occurrences in float64, and what a re-clustering makes of them."""

from collections import defaultdict
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

from cce_torchrec import (
    CCE,
    CCERobe,
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingBagConfig,
    ReclusterConfig,
    ReclusterSchedule,
    ResidualCCE,
    recluster,
    record_gradients,
)
from cce_torchrec.recluster.collectives import LocalCollectives
from cce_torchrec.recluster.gradients import most_sensitive_ids, targets_from
from cce_torchrec.sums_by_id import SumsById
from tests.unit.cce_tables import build, cce_table
from tests.unit.oracles import make_kjt

pytestmark = pytest.mark.usefixtures("one_thread")

DIM = 8
BAGS = {
    "f": [[3, 3, 7], [], [1]],
    "g": [[2], [5, 9], []],
    "h": [[0], [1, 1], [4]],
    "p": [[1], [2], [3]],
}
WEIGHTS = {name: [[0.5 + 0.25 * i - len(bag) for i in range(len(bag))] for bag in bags] for name, bags in BAGS.items()}


def tables() -> list[EmbeddingBagConfig]:
    """Two features of one table, MEAN, a decode table, and a plain table, which is not re-clustered."""

    def table(name: str, features: list[str], method: object, pooling: PoolingType) -> CompressedEmbeddingBagConfig:
        return CompressedEmbeddingBagConfig(
            name=name,
            num_embeddings=12,
            embedding_dim=DIM,
            feature_names=features,
            method=method,
            pooling=pooling,
        )

    return [
        table("a", ["f", "g"], CCE(num_rows=4, num_columns=2), PoolingType.SUM),
        EmbeddingBagConfig(name="plain", num_embeddings=12, embedding_dim=DIM, feature_names=["p"]),
        table("b", ["h"], ResidualCCE(num_rows=3, num_columns=2), PoolingType.MEAN),
        table("c", ["f"], CCERobe(num_cells=24, num_columns=2), PoolingType.SUM),
    ]


OUTPUTS = {"a": {"f@a": "f", "g": "g"}, "b": {"h": "h"}, "c": {"f@c": "f"}}


def readouts() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    names = ["f@a", "g", "h", "f@c", "p"]
    return {name: torch.randn(DIM, generator=generator, dtype=torch.float64) for name in names}


def losses(pooled: dict[str, Tensor]) -> Tensor:
    """Of each sample: log(1 + e^z) of a sum over features, in whatever precision."""
    z_B = sum(
        vectors_BD @ readout.to(vectors_BD.dtype)
        for name, readout in readouts().items()
        for vectors_BD in [pooled[name]]
    )
    return torch.nn.functional.softplus(z_B)


def expected_sums(collection: CompressedEmbeddingBagCollection, weighted: bool) -> dict[str, dict[int, Tensor]]:
    """By table and id, in float64: every occurrence gets a vector of its own, whose gradient autograd tells."""
    dense = {name: collection.dense_weight(name).double() for name in ("a", "plain", "b", "c")}
    found: dict[str, dict[int, Tensor]] = {name: defaultdict(lambda: torch.zeros(DIM + 1).double()) for name in OUTPUTS}
    for sample in range(3):
        occurrences, pooled = [], {"p": dense["plain"][BAGS["p"][sample]].sum(0) * WEIGHTS["p"][sample][0] ** weighted}
        for name, outputs in OUTPUTS.items():
            for output, feature in outputs.items():
                bag = BAGS[feature][sample]
                vectors = [dense[name][v].clone().requires_grad_() for v in bag]
                factors = [w if weighted else 1.0 for w in WEIGHTS[feature][sample]]
                total = sum((x * w for x, w in zip(vectors, factors, strict=True)), torch.zeros(DIM).double())
                pooled[output] = total / max(len(bag), 1) if name == "b" else total
                occurrences += [(name, v, x) for v, x in zip(bag, vectors, strict=True)]
        losses({name: vector[None] for name, vector in pooled.items()}).sum().backward()
        reach = sum(x.grad.norm() for _, _, x in occurrences)
        for name, v, x in occurrences:
            found[name][v] += torch.cat([x.grad, (x.grad.norm() * reach)[None]])
    return found


@pytest.mark.parametrize("weighted", [False, True])
def test_sums_are_those_of_every_occurrence(weighted: bool) -> None:
    torch.manual_seed(0)
    collection = CompressedEmbeddingBagCollection(tables=tables(), is_weighted=weighted)
    record_gradients(collection)
    expected = expected_sums(collection, weighted)
    for _ in range(2):  # twice the same batch, so twice the sums
        losses(collection(make_kjt(BAGS, WEIGHTS if weighted else None)).to_dict()).mean().backward()
    assert list(collection.id_gradients.by_table) == ["a", "b", "c"]
    for name, sums in collection.id_gradients.by_table.items():
        ids_U, sums_UW = sums.sums()
        assert ids_U.tolist() == sorted(expected[name])
        for v, row in zip(ids_U.tolist(), sums_UW, strict=True):
            torch.testing.assert_close(row.double(), 2 * expected[name][v], rtol=1e-4, atol=1e-6)


def test_nothing_is_recorded_without_a_backward_pass_or_when_it_is_off() -> None:
    collection = build()
    record_gradients(collection)
    with torch.no_grad():
        collection(make_kjt({"f_t": [[1]]}))
    assert len(collection.id_gradients.by_table["t"].sums()[0]) == 0
    record_gradients(collection, on=False)
    collection(make_kjt({"f_t": [[1]]}))["f_t"].sum().backward()
    assert collection.id_gradients is None


def test_sums_by_id_are_those_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    sums, expected = SumsById(3), np.zeros((5000, 3))
    for _ in range(40):  # 200,000 rows: merged several times
        ids_N = torch.randint(5000, (5000,), generator=generator)
        rows_NW = torch.randn(5000, 3, generator=generator)
        sums.add(ids_N, rows_NW)
        np.add.at(expected, ids_N.numpy(), rows_NW.double().numpy())
    ids_U, sums_UW = sums.sums()
    torch.testing.assert_close(sums_UW.double(), torch.from_numpy(expected)[ids_U], rtol=1e-4, atol=1e-4)


def test_ids_with_the_least_curvature_are_forgotten() -> None:
    sums = SumsById(2, max_ids=3)
    for v in range(10):
        sums.add(torch.tensor([v]), torch.tensor([[1.0, float(v * 7 % 10)]]))
    ids_U, sums_UW = sums.sums()
    assert ids_U.tolist() == [1, 4, 7]
    assert sums_UW.tolist() == [[1.0, 7.0], [1.0, 8.0], [1.0, 9.0]]


def test_the_bytes_of_a_collection_are_shared_out_to_its_tables() -> None:
    collection = build(cce_table(name="s"), cce_table(name="t"))
    record_gradients(collection, max_bytes=2 * 5 * (8 + 4 * 9))  # 5 ids a table of 8 dims
    ids = [[v] for v in range(40)]
    collection(make_kjt({"f_s": ids, "f_t": ids})).values().square().sum().backward()
    assert [len(sums.sums()[0]) for sums in collection.id_gradients.by_table.values()] == [5, 5]


def targets_of(
    sums: SumsById, decode: Callable[[Tensor], Tensor] | None, config: ReclusterConfig
) -> Callable[[Tensor, slice], Tensor]:
    """Of vectors that are all (10, 20)."""
    targets = targets_from(sums, decode, config, torch.device("cpu"), LocalCollectives())
    vectors_D = torch.tensor([10.0, 20.0])
    return lambda ids_N, dims: targets(ids_N, vectors_D[dims].expand(len(ids_N), -1), dims)


def test_targets_by_hand() -> None:
    sums = SumsById(3)
    sums.add(torch.tensor([9, 4]), torch.tensor([[1.0, -2.0, 3.0], [4.0, 0.0, 1.0]]))
    config = ReclusterConfig(gradient_step=0.5, gradient_damping=2.0)
    # The mean of T is 2, so the curvatures are 3 + 4 and 1 + 4.
    steps = torch.tensor([[-0.5 / 7, 1.0 / 7], [0.0, 0.0], [-2.0 / 5, 0.0]])
    targets, ids = targets_of(sums, None, config), torch.tensor([9, 5, 4])
    torch.testing.assert_close(targets(ids, slice(None)), torch.tensor([10.0, 20.0]) + steps)
    torch.testing.assert_close(targets(ids, slice(1, 2)), 20.0 + steps[:, 1:])


def test_hashed_vectors_start_from_the_mean_as_far_as_nothing_is_known() -> None:
    sums = SumsById(3)
    sums.add(torch.tensor([9, 4]), torch.tensor([[1.0, -2.0, 3.0], [4.0, 0.0, 1.0]]))
    config = ReclusterConfig(gradient_step=0.5, gradient_damping=2.0, decode_batch_size=1)
    seen = {9: torch.tensor([4.0, 0.0]), 4: torch.tensor([0.0, 8.0])}  # their mean is (2, 4)
    targets = targets_of(sums, lambda ids_N: torch.stack([seen[v] for v in ids_N.tolist()]), config)
    expected = [
        [2 + 8 * 3 / 7 - 0.5 / 7, 4 + 16 * 3 / 7 + 1 / 7],
        [2.0, 4.0],
        [2 + 8 * 1 / 5 - 2 / 5, 4 + 16 * 1 / 5],
    ]
    ids = torch.tensor([9, 5, 4])
    torch.testing.assert_close(targets(ids, slice(None)), torch.tensor(expected))
    torch.testing.assert_close(targets(ids, slice(0, 1)), torch.tensor(expected)[:, :1])


@pytest.mark.parametrize(
    ("config", "part"), [(ReclusterConfig(gradient_step=1.0, gradient_damping=1.0), 1.0), (ReclusterConfig(), 0.5)]
)
def test_the_target_of_a_hashed_vector_is_the_best_guess(config: ReclusterConfig, part: float) -> None:
    """The least of C |x - where the gradients ask it to be|^2 + mean T |x - mean|^2, by autograd; C is T or a part of it."""
    random = torch.Generator().manual_seed(0)
    gradient_UD, vectors_UD = (torch.randn(6, 2, generator=random) for _ in range(2))
    bound_U = torch.rand(6, generator=random)
    sums = SumsById(3)
    sums.add(torch.arange(6), torch.cat([gradient_UD, bound_U[:, None]], dim=1))
    targets = targets_from(sums, lambda ids_N: vectors_UD[ids_N], config, torch.device("cpu"), LocalCollectives())
    wanted_UD = targets(torch.arange(6), vectors_UD, slice(None)).double().requires_grad_()
    asked_UD = (vectors_UD - gradient_UD / (part * bound_U[:, None])).double()
    mean_D = vectors_UD.double().mean(dim=0)
    loss_U = part * bound_U.double() * (wanted_UD - asked_UD).square().sum(dim=1)
    loss_U += bound_U.double().mean() * (wanted_UD - mean_D).square().sum(dim=1)
    (slope_UD,) = torch.autograd.grad(loss_U.sum(), wanted_UD)
    assert float(slope_UD.abs().max()) < 1e-5


@pytest.mark.parametrize("decode", [None, lambda ids_N: torch.zeros(len(ids_N), 1)], ids=["learned", "hashed"])
def test_gradients_that_are_all_zero_move_nothing(decode: Callable[[Tensor], Tensor] | None) -> None:
    sums = SumsById(2)
    sums.add(torch.tensor([1]), torch.zeros(1, 2))
    targets = targets_from(sums, decode, ReclusterConfig(), torch.device("cpu"), LocalCollectives())
    assert torch.equal(targets(torch.arange(3), torch.ones(3, 1), slice(None)), torch.ones(3, 1))


def test_the_most_sensitive_ids() -> None:
    sums = SumsById(2)
    bounds = {7: 1.0, 3: 5.0, 12: 5.0, 4: 5.0, 9: 6.0}
    sums.add(torch.tensor(list(bounds)), torch.tensor([[100.0 - bound, bound] for bound in bounds.values()]))
    found = {number: most_sensitive_ids(sums, number, LocalCollectives()).tolist() for number in (1, 3, 5, 9)}
    assert found == {1: [9], 3: [3, 4, 9], 5: [3, 4, 7, 9, 12], 9: [3, 4, 7, 9, 12]}


METHODS = {
    "cce": CCE(num_rows=60, num_columns=2),
    "residual_cce": ResidualCCE(num_rows=60, num_columns=2),
    "cce_robe": CCERobe(num_cells=400, num_columns=2),
}


@pytest.mark.parametrize("start_from_mean", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_vectors_are_where_ids_want_to_be_where_clustering_loses_nothing(method: str, start_from_mean: bool) -> None:
    # More rows than ids: every id has a centroid of its own.
    collection = build(cce_table(30, method=METHODS[method]))
    config = ReclusterConfig(gradient_step=0.7, gradient_damping=0.3, start_from_mean=start_from_mean)
    for version in range(2):
        old_VD = collection.dense_weight("t").double()
        record_gradients(collection)
        batch = make_kjt({"f_t": [[v] for v in range(20)]})
        (collection(batch)["f_t"] ** 3).sum(dim=1).mean().backward()
        gradient_UD = 3 * old_VD[:20] ** 2
        bound_U = gradient_UD.square().sum(dim=1)
        curvature_U1 = (bound_U + 0.3 * bound_U.mean())[:, None]
        expected_VD = old_VD.clone()
        if version == 0 and start_from_mean:  # later, assignments were learned
            mean_D = old_VD[:20].mean(dim=0)
            expected_VD[20:] = mean_D
            expected_VD[:20] = mean_D + (old_VD[:20] - mean_D) * bound_U[:, None] / curvature_U1
        expected_VD[:20] -= 0.7 * gradient_UD / curvature_U1
        recluster(collection, seed=version, config=config)
        new_VD = collection.dense_weight("t").double()
        torch.testing.assert_close(new_VD, expected_VD, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(new_VD, old_VD)
        assert len(collection.id_gradients.by_table["t"].sums()[0]) == 0  # used up


def test_gradients_find_clusters_that_hashes_hide() -> None:
    """Two kinds of ids with the same vectors at the start: only what the loss says tells them apart."""
    kinds_V = torch.arange(40) % 2
    table = cce_table(40, 4, method=CCE(num_rows=2, num_columns=1, num_helper_rows=1))

    def found(recording: bool) -> Tensor:
        collection = build(table)
        with torch.no_grad():
            collection.codebook("t").zero_()
        record_gradients(collection, on=recording)
        wanted_VD = torch.where(kinds_V[:, None] == 1, 1.0, -1.0).expand(-1, 4)
        out_VD = collection(make_kjt({"f_t": [[v] for v in range(40)]}))["f_t"]
        (out_VD - wanted_VD).square().sum(dim=1).mean().backward()
        recluster(collection, seed=0)
        return collection.lowered_tables[0].row_map.assignments[:, 0]

    assignments_V = found(recording=True)
    assert torch.equal(assignments_V == assignments_V[1], kinds_V == 1)
    assert len(found(recording=False).unique()) == 1  # all vectors are equal


@pytest.mark.parametrize(
    ("fields", "recorded"),
    [
        ({"total_steps": 10, "count": 2}, {0, 1, 2, 3, 4, 5, 6, 7}),
        ({"total_steps": 10, "count": 2, "gradient_steps": 2}, {2, 3, 6, 7}),
        ({"total_steps": 10, "count": 2, "gradient_steps": 0}, set()),
        ({"total_steps": None, "every_steps": 5, "gradient_steps": 1}, {4, 9, 14}),
    ],
)
def test_which_steps_are_recorded(fields: dict, recorded: set[int]) -> None:
    schedule = ReclusterSchedule(**fields)  # (0.8 of 10 steps: after steps 4 and 8)
    assert {completed for completed in range(15) if schedule.records(completed)} == recorded


def test_a_schedule_records_and_stops() -> None:
    collection = build()
    schedule = ReclusterSchedule(total_steps=10, count=2, gradient_steps=2)
    recording = []
    for step in range(1, 11):
        schedule.step(step, collection)
        recording.append(collection.id_gradients is not None)
    assert recording == [step in (2, 3, 6, 7) for step in range(1, 11)]


@pytest.mark.parametrize("fields", [{"gradient_step": -1.0}, {"gradient_damping": float("nan")}])
def test_rates_that_cannot_be(fields: dict) -> None:
    with pytest.raises(ValueError, match=r"gradient_step=.* must be 0 or more"):
        ReclusterConfig(**fields)


@pytest.mark.parametrize("name", ["gradient_steps", "background_steps"])
def test_a_negative_number_of_steps(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=-1 is not an integer of 0 or more"):
        ReclusterSchedule(total_steps=5, **{name: -1})
