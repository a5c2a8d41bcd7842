"""TorchRec's planner with compressed tables: what it plans trains, constraints are by logical table, memory is counted."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import KernelConfig, ParameterConstraints, TopologyFactory, TrainerConfig
from torchrec.distributed.types import ShardingPlan
from torchrec.models.dlrm import DLRM
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter

from cce_torchrec import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingBagConfig,
    CompressedStorageReservation,
    get_sharders,
    parameter_constraints,
)
from cce_torchrec.methods import CCE, CE, QR, HashingTrick
from tests.distributed.harness import RankError, RankPool
from tests.toys import Thin, Waves

BATCH_SIZE = 6
DIM = 16
LEARNING_RATE = 0.5
COMPRESSED, PLAIN = "dlrm.sparse_arch.embedding_bag_collection", "beside"
Constraints = dict[str, ParameterConstraints]


# --- a model ---------------------------------------------------------------------------------------------------------


def tables(*, sharded_by_id: bool = True) -> list[EmbeddingBagConfig]:
    """Several methods and two plain tables, in one compressed collection."""

    def table(name: str, size: int, features: list[str], method: Any, **more: Any) -> CompressedEmbeddingBagConfig:
        return CompressedEmbeddingBagConfig(
            name=name, num_embeddings=size, embedding_dim=DIM, feature_names=features, method=method, **more
        )

    placement = {"assignment_placement": "sharded"} if sharded_by_id else {}
    return [
        table("cce", 300, ["a", "b"], CCE(num_rows=9, num_columns=2)),
        table("by_id", 301, ["c"], CCE(num_rows=8, num_columns=2), **placement),
        table("qr", 100, ["d"], QR(num_remainders=10)),
        table("ce", 1000, ["e"], CE(num_rows=12, num_columns=2)),
        table("hashed", 5000, ["f"], HashingTrick(num_rows=64)),
        EmbeddingBagConfig(name="full", num_embeddings=400, embedding_dim=DIM, feature_names=["g"]),
    ]


FEATURES = {"a": 300, "b": 300, "c": 301, "d": 100, "e": 1000, "f": 5000, "g": 400, "z": 50}
ROWS_PER_ID = {"cce": 2, "by_id": 2, "qr": 2, "ce": 1, "hashed": 1, "full": 1}
PHYSICAL = {"cce:0", "cce:1", "by_id:0", "by_id:1", "qr", "ce:0", "ce:1", "hashed", "full"}


class Model(nn.Module):
    """A DLRM over compressed tables, and a plain collection beside it."""

    def __init__(self, *, device: str = "cpu", sharded_by_id: bool = True) -> None:
        super().__init__()
        compressed = CompressedEmbeddingBagCollection(tables(sharded_by_id=sharded_by_id), device=device)
        self.dlrm = DLRM(compressed, 4, [8, DIM], [8, 1])
        plain = EmbeddingBagConfig(name="plain", num_embeddings=50, embedding_dim=DIM, feature_names=["z"])
        self.beside = EmbeddingBagCollection(tables=[plain], device=torch.device(device))

    def forward(self, dense: Tensor, features: KeyedJaggedTensor) -> Tensor:
        return self.dlrm(dense, features) + self.beside(features).values().sum(1, keepdim=True)


def batches(count: int) -> list[tuple[Tensor, KeyedJaggedTensor]]:
    """One for each rank, the same wherever they are made."""
    generator = torch.Generator().manual_seed(1)

    def one() -> tuple[Tensor, KeyedJaggedTensor]:
        lengths = torch.randint(0, 4, (len(FEATURES), BATCH_SIZE), generator=generator)
        ids = [
            torch.randint(0, size, (int(n),), generator=generator)
            for size, n in zip(FEATURES.values(), lengths.sum(1), strict=True)
        ]
        kjt = KeyedJaggedTensor(list(FEATURES), torch.cat(ids), lengths=lengths.view(-1))
        return torch.rand(BATCH_SIZE, 4, generator=generator), kjt

    return [one() for _ in range(count)]


def topology(device: str = "cpu", **caps: int) -> Topology:
    return TopologyFactory.create_topology(
        TrainerConfig(world_size=2, local_world_size=2, **caps), kernel_config=KernelConfig(compute_device=device)
    )


def make_plan(model: nn.Module, constraints: Constraints | None) -> ShardingPlan:
    planner = EmbeddingShardingPlanner(
        topology=topology(),
        batch_size=BATCH_SIZE,
        constraints=constraints,
        storage_reservation=CompressedStorageReservation(),
    )
    return planner.collective_plan(model, get_sharders(), dist.group.WORLD)


# --- plans that train ------------------------------------------------------------------------------------------------


def take_over_plain_weights(dmp: DistributedModelParallel, reference: nn.Module) -> None:
    """TorchRec does not keep the weights of its own collection; ours are kept, so only the others are loaded."""
    plain = {name: value for name, value in reference.state_dict().items() if name.startswith(PLAIN)}
    dmp.load_state_dict(plain, strict=False)  # type: ignore[arg-type]


def trains_as_unsharded(rank: int, world_size: int, model: nn.Module, plan: ShardingPlan) -> None:
    """Forward, a step of SGD, forward: all equal to the unsharded model's on the batches of all ranks."""
    reference, of_ranks = copy.deepcopy(model), batches(world_size)
    collections = [model.get_submodule(path) for path in (COMPRESSED, PLAIN)]
    apply_optimizer_in_backward(
        torch.optim.SGD, [p for collection in collections for p in collection.parameters()], {"lr": LEARNING_RATE}
    )
    dmp = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=get_sharders())
    take_over_plain_weights(dmp, reference)
    parameters = list(dict(in_backward_optimizer_filter(dmp.named_parameters())).values())
    optimizers = [torch.optim.SGD(each, LEARNING_RATE) for each in (parameters, reference.parameters())]
    for _ in range(2):
        logits = [reference(*batch) for batch in of_ranks]
        own = dmp(*of_ranks[rank])
        torch.testing.assert_close(own, logits[rank])
        own.square().mean().backward()
        (sum(each.square().mean() for each in logits) / world_size).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def check_plan(rank: int, world_size: int, wishes: Constraints | None, batch_size: int | None) -> Mapping[str, Any]:
    model = Model()
    plan = make_plan(model, parameter_constraints(model, wishes, batch_size=batch_size))
    assert set(plan.plan[COMPRESSED]) == PHYSICAL
    assert set(plan.plan[PLAIN]) == {"plain"}
    trains_as_unsharded(rank, world_size, model, plan)
    everything = {**plan.plan[COMPRESSED], **plan.plan[PLAIN]}
    return {
        name: (
            sharding.sharding_type,
            sharding.compute_kernel,
            [] if sharding.sharding_spec is None else [shard.shard_sizes for shard in sharding.sharding_spec.shards],
        )
        for name, sharding in everything.items()
    }


def plan_on(ranks: RankPool, wishes: Constraints | None = None, batch_size: int | None = None) -> Mapping[str, Any]:
    """The plan, which is the same on all ranks."""
    plans = ranks.run(check_plan, wishes, batch_size)
    assert plans[0] == plans[1]
    return plans[0]


@pytest.mark.distributed
def test_an_unconstrained_plan_has_every_table_and_trains(ranks2: RankPool) -> None:
    plan = plan_on(ranks2)
    assert {plan[f"by_id:{column}"][:2] for column in range(2)} == {("data_parallel", "dense")}


@pytest.mark.distributed
def test_constraints_by_logical_table_are_obeyed(ranks2: RankPool) -> None:
    plan = plan_on(
        ranks2,
        {
            "cce": ParameterConstraints(sharding_types=["row_wise"], compute_kernels=["fused"]),
            "qr": ParameterConstraints(sharding_types=["column_wise"], min_partition=4),
            "full": ParameterConstraints(sharding_types=["column_wise"], min_partition=8),
            "ce": ParameterConstraints(sharding_types=["data_parallel"]),
            "hashed": ParameterConstraints(compute_kernels=["dense"]),
            "plain": ParameterConstraints(sharding_types=["table_wise"]),
        },
    )
    assert [plan[f"cce:{i}"] for i in range(2)] == [("row_wise", "fused", [[9, 8], [9, 8]])] * 2
    assert plan["qr"][0] == plan["full"][0] == "column_wise"
    assert all(width % 4 == 0 for _, width in plan["qr"][2])
    assert plan["full"][2] == [[400, 8], [400, 8]]
    assert [plan[f"ce:{i}"][:2] for i in range(2)] == [("data_parallel", "dense")] * 2
    assert plan["hashed"][:2] == ("data_parallel", "dense")  # the one type that TorchRec has this kernel for
    assert plan["plain"][0] == "table_wise"
    assert plan["by_id:0"][0] == "data_parallel"


@pytest.mark.distributed
def test_with_a_batch_size_small_codebooks_are_planned_data_parallel(ranks2: RankPool) -> None:
    elsewhere = {"qr": ParameterConstraints(sharding_types=["table_wise"])}
    plan = plan_on(ranks2, elsewhere, batch_size=20)
    assert {name for name, entry in plan.items() if entry[0] == "data_parallel"} >= PHYSICAL - {"qr", "hashed", "full"}
    assert plan["qr"][0] == "table_wise"  # its own sharding_types


def check_default_planner(rank: int, world_size: int) -> None:
    """Neither topology nor constraints nor reservation of ours."""
    model = Model(sharded_by_id=False)
    reference, of_ranks = copy.deepcopy(model), batches(world_size)
    dmp = DistributedModelParallel(model, device=torch.device("cpu"), sharders=get_sharders())
    assert set(dmp.plan.plan[COMPRESSED]) == PHYSICAL
    take_over_plain_weights(dmp, reference)
    torch.testing.assert_close(dmp(*of_ranks[rank]), reference(*of_ranks[rank]))


@pytest.mark.distributed
def test_the_default_planner_works_without_our_constraints(ranks2: RankPool) -> None:
    ranks2.run(check_default_planner)


def check_plan_from_meta(rank: int, world_size: int) -> None:
    plans = [make_plan(model, parameter_constraints(model)) for model in (Model(), Model(device="meta"))]
    names = [{table: s.sharding_type for table, s in plan.plan[COMPRESSED].items()} for plan in plans]
    assert names[0] == names[1]


@pytest.mark.distributed
def test_a_model_on_meta_is_planned_the_same(ranks2: RankPool) -> None:
    ranks2.run(check_plan_from_meta)


# --- plans that must not be ------------------------------------------------------------------------------------------


def shard_without(rank: int, world_size: int, table: str) -> None:
    model = Model()
    plan = make_plan(model, parameter_constraints(model))
    del plan.plan[COMPRESSED][table]
    DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=get_sharders())


@pytest.mark.distributed
@pytest.mark.parametrize("table", ["cce:1", "by_id:0", "full"])
def test_a_plan_that_lacks_a_table_raises(ranks2: RankPool, table: str) -> None:
    with pytest.raises(RankError, match=rf"(?s)ValueError: The sharding plan has no entry for \['{table}'\]"):
        ranks2.run(shard_without, table)


def shard_by_id_unconstrained(rank: int, world_size: int) -> None:
    model = Model()
    constraints = {name: ParameterConstraints(sharding_types=["table_wise"]) for name in PHYSICAL}
    plan = make_plan(model, constraints)
    DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=get_sharders())


@pytest.mark.distributed
def test_a_table_sharded_by_id_that_is_not_replicated_raises(ranks2: RankPool) -> None:
    with pytest.raises(RankError, match=r"(?s)ValueError: Table 'by_id' .* needs replicated codebooks"):
        ranks2.run(shard_by_id_unconstrained)


# --- translation of constraints --------------------------------------------------------------------------------------


def test_pooling_factors_count_rows() -> None:
    """CCE and QR look up 2 rows an id in each column, the others 1."""
    translated = parameter_constraints(Model(device="meta"))
    assert set(translated) == PHYSICAL
    for name, constraint in translated.items():
        table = name.split(":")[0]
        num_features = 2 if table == "cce" else 1
        assert constraint.pooling_factors == [float(ROWS_PER_ID[table])] * num_features, name

    wishes = {
        "cce": ParameterConstraints(pooling_factors=[3.0, 5.0]),
        "qr": ParameterConstraints(pooling_factors=[7.0]),
        "ce": ParameterConstraints(pooling_factors=[4.0]),
    }
    translated = parameter_constraints(Model(device="meta"), wishes)
    assert translated["cce:0"].pooling_factors == translated["cce:1"].pooling_factors == [6.0, 10.0]
    assert translated["qr"].pooling_factors == [14.0]
    assert translated["ce:1"].pooling_factors == [4.0]
    assert wishes["cce"].pooling_factors == [3.0, 5.0], "what was given is left alone"


def test_other_fields_are_passed_on() -> None:
    wish = ParameterConstraints(
        sharding_types=["column_wise"], compute_kernels=["fused"], min_partition=4, num_poolings=[1.0, 2.0]
    )
    translated = parameter_constraints(Model(device="meta"), {"cce": wish, "plain": wish})
    for constraint in (translated["cce:0"], translated["cce:1"]):
        assert constraint.sharding_types == ["column_wise"]
        assert constraint.compute_kernels == ["fused"]
        assert constraint.min_partition == 4
        assert constraint.num_poolings == [1.0, 2.0]
        assert constraint.pooling_factors == [2.0, 2.0]  # TorchRec's default is one value, for however many features
    assert translated["plain"] is wish


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"cce:0": ParameterConstraints()}, r"no table \['cce:0'\]; the tables are \['cce', .*'plain'\]"),
        ({"cce": ParameterConstraints(pooling_factors=[1.0, 2.0, 3.0])}, "pooling_factors has 3 values for 2 features"),
        ({"qr": ParameterConstraints(batch_sizes=[8, 8])}, "batch_sizes has 2 values for 1 features"),
        ({"qr": ParameterConstraints(num_poolings=[1.0, 1.0])}, "num_poolings has 2 values for 1 features"),
        ({"hashed": ParameterConstraints(device_group="cpu")}, "'hashed': device_group='cpu' is not supported"),
        ({"by_id": ParameterConstraints(sharding_types=["row_wise"])}, "'by_id' .* needs 'data_parallel' codebooks"),
    ],
)
def test_constraints_that_cannot_be_obeyed_raise(wishes: Constraints, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parameter_constraints(Model(device="meta"), wishes)


def test_tables_sharded_by_id_may_be_allowed_more_than_they_need() -> None:
    wishes = {"by_id": ParameterConstraints(sharding_types=["table_wise", "data_parallel"])}
    assert parameter_constraints(Model(device="meta"), wishes)["by_id:1"].sharding_types == ["data_parallel"]


# --- small codebooks -------------------------------------------------------------------------------------------------


def planned_types(
    method: Any,
    batch_size: int | None,
    wish: ParameterConstraints | None = None,
    features: Sequence[str] = ("f",),
) -> list[list[str] | None]:
    """The sharding types that each column of a table of 16 dims is constrained to."""
    config = CompressedEmbeddingBagConfig(
        name="t", num_embeddings=1000, embedding_dim=16, feature_names=list(features), method=method
    )
    collection = CompressedEmbeddingBagCollection([config], device="meta")
    wishes = None if wish is None else {"t": wish}
    translated = parameter_constraints(collection, wishes, batch_size=batch_size)
    return [constraint.sharding_types for constraint in translated.values()]


DP = ["data_parallel"]


def test_a_codebook_is_replicated_from_the_batch_size_on_at_which_that_sends_less() -> None:
    # A column of 10 + 10 rows of 8 dims: 2 * 20 * 8 * 4 = 1280 bytes of gradients (times (W-1)/W, as all here).
    # One example: a vector of 8 dims there, its gradient back and one id: 2 * 8 * 4 + 8 = 72 bytes. 17 * 72 = 1224.
    method = CCE(num_rows=10, num_columns=2)
    assert planned_types(method, 17) == [None, None]
    assert planned_types(method, 18) == [DP, DP]
    assert planned_types(method, None) == [None, None]


def test_every_feature_and_id_of_an_example_counts() -> None:
    # 3 ids in one feature and 1 in the other: (64 + 24) + (64 + 8) = 160 bytes an example, and 8 * 160 = 1280.
    method, wish = CCE(num_rows=10, num_columns=2), ParameterConstraints(pooling_factors=[3.0, 1.0])
    assert planned_types(method, 8, wish, ["f", "g"]) == [None, None]
    assert planned_types(method, 9, wish, ["f", "g"]) == [DP, DP]
    # Batch sizes and poolings of the features themselves: 2 * 88 + 15 * 72 = 1256; one more is 1328.
    for last, expected in ((15, None), (16, DP)):
        wish = ParameterConstraints(pooling_factors=[3.0, 1.0], batch_sizes=[1, last], num_poolings=[2.0, 1.0])
        assert planned_types(method, 999, wish, ["f", "g"]) == [expected, expected]


def test_columns_of_different_sizes_are_judged_one_by_one() -> None:
    # Remainders: 100 rows of 8 dims, 6400 bytes of gradients; quotients: 10 rows, 640. An example is 72 bytes.
    method = QR(num_remainders=100, operation="concat")
    assert planned_types(method, 8) == [None, None]
    assert planned_types(method, 9) == [None, DP]
    assert planned_types(method, 88) == [None, DP]
    assert planned_types(method, 89) == [DP, DP]


def test_what_was_asked_for_is_not_overruled() -> None:
    method = CCE(num_rows=10, num_columns=2)
    asked = ParameterConstraints(sharding_types=["row_wise", "data_parallel"])
    assert planned_types(method, 1000, asked) == [["row_wise", "data_parallel"]] * 2
    fused = ParameterConstraints(compute_kernels=[EmbeddingComputeKernel.FUSED.value])  # cannot be replicated
    assert planned_types(method, 1000, fused) == [None, None]
    dense = ParameterConstraints(compute_kernels=[EmbeddingComputeKernel.DENSE.value])
    assert planned_types(method, 1000, dense) == [DP, DP]


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_that_is_none_raises(batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size={batch_size} is not positive"):
        planned_types(CCE(num_rows=10, num_columns=2), batch_size)


# --- memory ----------------------------------------------------------------------------------------------------------

GiB = 1 << 30


def stored(collection: CompressedEmbeddingBagCollection) -> dict[str, int]:
    """Bytes beside the parameters, over all ranks."""
    return {table.name: table.row_map.stored_bytes() for table in collection.lowered_tables}


def free(topology: Topology, memory: str) -> list[int]:
    return [getattr(device.storage, memory) for device in topology.devices]


@pytest.mark.parametrize(("device", "memory"), [("cpu", "ddr"), ("cuda", "hbm")])
@pytest.mark.parametrize("make_base", [None, lambda: FixedPercentageStorageReservation(percentage=0.5)])
def test_reservation_takes_off_exactly_the_assignments(
    device: str, memory: str, make_base: Callable[[], FixedPercentageStorageReservation] | None
) -> None:
    model = Model(device="meta")
    bytes_of = stored(model.get_submodule(COMPRESSED))
    # 300 ids of 2 columns, a byte each, and 4 int64: coefficients and version. By id, 151 ids of the 301 on a rank.
    assert bytes_of["cce"] == 300 * 2 + 4 * 8
    assert bytes_of["by_id"] == 301 * 2 + 4 * 8
    replicated = sum(size for name, size in bytes_of.items() if name != "by_id")
    expected = replicated + (bytes_of["by_id"] + 1) // 2
    base = make_base() if make_base else FixedPercentageStorageReservation(percentage=0.15)
    arguments: tuple[Any, ...] = (BATCH_SIZE, model, get_sharders(), parameter_constraints(model))
    reservation = CompressedStorageReservation(make_base() if make_base else None)
    caps = {f"{memory}_cap_bytes": GiB}
    before = base.reserve(topology(device, **caps), *arguments)
    after = reservation.reserve(topology(device, **caps), *arguments)
    assert free(after, memory) == [left - expected for left in free(before, memory)]
    assert reservation.last_reserved_topology is not None
    assert free(reservation.last_reserved_topology, memory) == free(after, memory)


def dense_tables() -> list[EmbeddingBagConfig]:
    fields: dict[str, Any] = {"num_embeddings": 1000, "embedding_dim": DIM}
    return [
        CompressedEmbeddingBagConfig(name="waves", feature_names=["f"], method=Waves(num_waves=10), **fields),
        CompressedEmbeddingBagConfig(name="thin", feature_names=["g"], method=Thin(num_rows=20), **fields),
    ]


def test_reservation_counts_dense_parameters_with_their_gradients_and_optimizer_state() -> None:
    collection = CompressedEmbeddingBagCollection(dense_tables(), device="meta")
    left = CompressedStorageReservation().reserve(topology(ddr_cap_bytes=GiB), BATCH_SIZE, collection, get_sharders())
    # 11 and 8 rows of 16 dims, six times; 1000 phases of 2 bytes, 10 frequencies of 4; 2 coefficients of 8.
    expected = 6 * (11 + 8) * DIM * 4 + 1000 * 2 + 10 * 4 + 2 * 8
    assert free(left, "ddr") == [GiB - expected] * 2
    with pytest.raises(ValueError, match=r"dense parameters, with gradients and optimizer state, 7,296: more than"):
        CompressedStorageReservation().reserve(topology(ddr_cap_bytes=5000), BATCH_SIZE, collection, get_sharders())


def test_constraints_know_decode_tables_and_leave_them_out() -> None:
    collection = CompressedEmbeddingBagCollection(dense_tables(), device="meta")
    constraints = parameter_constraints(collection, {"waves": ParameterConstraints(pooling_factors=[3.0])})
    assert set(constraints) == {"thin"}


def test_assignments_that_do_not_fit_raise() -> None:
    config = CompressedEmbeddingBagConfig(
        name="t", num_embeddings=10**9, embedding_dim=16, feature_names=["f"], method=CCE(num_rows=1024, num_columns=4)
    )
    collection = CompressedEmbeddingBagCollection([config], device="meta")
    with pytest.raises(ValueError, match=r"Rank 0: .* 8,000,000,\d+ bytes .*: more than .* of DDR .*'sharded'"):
        CompressedStorageReservation().reserve(topology(ddr_cap_bytes=7 * GiB), BATCH_SIZE, collection, get_sharders())
    config.assignment_placement = "sharded"
    collection = CompressedEmbeddingBagCollection([config], device="meta")
    left = CompressedStorageReservation().reserve(
        topology(ddr_cap_bytes=7 * GiB), BATCH_SIZE, collection, get_sharders()
    )
    assert free(left, "ddr") == [pytest.approx(7 * GiB - 4e9, abs=100)] * 2  # TorchRec's reservation is of HBM only
