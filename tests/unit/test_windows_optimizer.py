"""Re-clustering CCE on circular memory: optimizer state of the cells, and failures that change nothing."""

import pytest
import torch
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.modules.embedding_configs import DataType

from cce_torchrec import CompressedEmbeddingBagCollection, CompressedEmbeddingBagConfig, ReclusterConfig, recluster
from cce_torchrec.methods import CCERobe
from tests.unit.cce_tables import assert_same_state, cce_table, state_copy
from tests.unit.oracles import make_kjt
from tests.unit.window_tables import METHODS, D, Snapshot, V, build, decoder_of

pytestmark = pytest.mark.usefixtures("one_thread")

RESET = ReclusterConfig(optimizer_state="reset")


def trained(method: CCERobe, kind: type[torch.optim.Optimizer], **options):
    collection = build(method)
    optimizer = kind(collection.parameters(), lr=0.1, **options)
    collection(make_kjt({"f_t": [[1, 2, 3], [40, 50, 60]]})).values().square().sum().backward()
    optimizer.step()
    return collection, optimizer


def test_reset_adam_starts_anew() -> None:
    collection, optimizer = trained(METHODS[0], torch.optim.Adam)
    recluster(collection, seed=1, optimizer=optimizer, config=RESET)
    for parameter in collection.parameters():
        state = optimizer.state[parameter]
        assert [float(state[name].abs().sum()) for name in ("step", "exp_avg", "exp_avg_sq")] == [0, 0, 0]


def test_reset_adagrad_goes_back_to_its_initial_value() -> None:
    collection, optimizer = trained(METHODS[0], torch.optim.Adagrad, initial_accumulator_value=0.5)
    recluster(collection, seed=1, optimizer=optimizer, config=RESET)
    assert all(bool((optimizer.state[parameter]["sum"] == 0.5).all()) for parameter in collection.parameters())


def test_carried_state_is_the_mean_over_the_elements_that_read_a_cell() -> None:
    collection, optimizer = trained(METHODS[1], torch.optim.Adam)
    decoder = decoder_of(collection)
    before, parameters = Snapshot.of(decoder), (decoder.memory, decoder.helper)
    old = [{name: optimizer.state[p][name].clone() for name in ("exp_avg", "exp_avg_sq")} for p in parameters]
    recluster(collection, seed=1, optimizer=optimizer)  # the default
    after = Snapshot.of(decoder)
    pairs = ((before.offsets, after.offsets), (before.helper_offsets, after.helper_offsets))
    for parameter, states, (old_at, new_at) in zip(parameters, old, pairs, strict=True):
        for name, old_state in states.items():
            inherited: list[list[float]] = [[] for _ in parameter]
            for v in range(V):
                for was, now in zip(old_at[v], new_at[v], strict=True):
                    for cell in range(after.width):
                        source = float(old_state[(was + cell) % len(parameter)])
                        inherited[(now + cell) % len(parameter)].append(source)
            expected = torch.tensor([sum(values) / len(values) if values else 0.0 for values in inherited])
            torch.testing.assert_close(optimizer.state[parameter][name], expected, rtol=1e-4, atol=1e-8)
        assert float(optimizer.state[parameter]["step"]) == 1


def test_an_optimizer_in_backward_is_found(caplog: pytest.LogCaptureFixture) -> None:
    collection = build(METHODS[0])
    apply_optimizer_in_backward(torch.optim.Adagrad, collection.parameters(), {"lr": 0.1})
    collection(make_kjt({"f_t": [[1, 2, 3]]})).values().square().sum().backward()
    decoder = decoder_of(collection)
    sums = [p._in_backward_optimizers[0].state[p]["sum"] for p in (decoder.memory, decoder.helper)]
    assert all(float(sum_M.sum()) > 0 for sum_M in sums)
    recluster(collection, seed=1)
    assert all(float(sum_M.sum()) > 0 for sum_M in sums)
    recluster(collection, seed=2, config=RESET)
    assert all(float(sum_M.sum()) == 0 for sum_M in sums)
    assert "stale" not in caplog.text


def test_an_unknown_optimizer_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    collection, _ = trained(METHODS[0], torch.optim.Adam)
    recluster(collection, seed=1)
    assert "its state is stale" in caplog.text


def test_nothing_changes_where_another_table_fails() -> None:
    torch.manual_seed(0)
    sick = cce_table(name="z")
    well = CompressedEmbeddingBagConfig(
        name="t", num_embeddings=V, embedding_dim=D, feature_names=["f"], method=METHODS[0]
    )
    for name in ("z", "t"):
        collection = CompressedEmbeddingBagCollection(tables=[sick, well])
        with torch.no_grad():
            bad = collection.codebook("z:0") if name == "z" else decoder_of(collection).helper
            bad[0] = torch.nan
        state = state_copy(collection)
        with pytest.raises(ValueError, match=f"Table '{name}': "):
            recluster(collection, seed=1)
        bad.detach().nan_to_num_(5.0)
        for key in state:
            state[key] = state[key].nan_to_num(5.0) if state[key].is_floating_point() else state[key]
        assert_same_state(collection, state)


@pytest.mark.parametrize("data_type", ["FP16", "BF16"])
def test_half_precision_memories_are_clustered(data_type: str) -> None:
    collection = build(METHODS[0], data_type=DataType[data_type])
    (report,) = recluster(collection, seed=1).tables
    assert decoder_of(collection).memory.dtype.itemsize == 2
    assert 0 < report.relative_squared_error < 0.7
