"""Bytes are those of the tensors that exist; ratios are checked by hand."""

import pytest
import torch
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig

from cce_torchrec import CCE, METHODS, CompressedEmbeddingBagCollection, CompressedEmbeddingBagConfig
from tests.unit.oracles import make_kjt

V, D = 1000, 16


def collection(data_type: DataType = DataType.FP32) -> CompressedEmbeddingBagCollection:
    """A table a method, and a plain one."""
    tables: list[EmbeddingBagConfig] = [
        CompressedEmbeddingBagConfig(
            name=f"t_{key}",
            num_embeddings=V,
            embedding_dim=D,
            feature_names=[key],
            data_type=data_type,
            method=method.from_budget(V, D, V * D),
        )
        for key, method in METHODS.items()
    ]
    tables.append(EmbeddingBagConfig(name="plain", num_embeddings=7, embedding_dim=4, feature_names=["plain"]))
    return CompressedEmbeddingBagCollection(tables=tables)


def of_table(name: str, tensors) -> list[torch.Tensor]:
    """Tensors whose dotted name has the table, or a column of it, as a part."""
    return [t for path, t in tensors if name in [part.split(":")[0] for part in path.split(".")]]


def num_bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize("data_type", [DataType.FP32, DataType.FP16], ids=lambda data_type: data_type.name)
def test_bytes_are_those_of_the_tensors(data_type: DataType) -> None:
    module = collection(data_type)
    report = module.memory_report()
    assert [row.table for row in report.tables] == [config.name for config in module.embedding_bag_configs()]
    for row, config in zip(report.tables, module.embedding_bag_configs(), strict=True):
        parameters = of_table(row.table, module.named_parameters())
        assert parameters
        assert row.num_params == sum(parameter.numel() for parameter in parameters)
        assert row.codebook_bytes == num_bytes(parameters)
        assert row.assignment_bytes == num_bytes(of_table(row.table, module.named_buffers()))
        assert row.optimizer_bytes == 0
        assert row.full_params == config.num_embeddings * config.embedding_dim
        itemsize = {DataType.FP32: 4, DataType.FP16: 2}[config.data_type]
        assert row.full_bytes == row.full_params * itemsize
    assert [row.method for row in report.tables] == [*METHODS, "full"]
    assert report.total.codebook_bytes == num_bytes(list(module.parameters()))
    assert report.total.assignment_bytes == num_bytes(list(module.buffers()))


def test_ratios_by_hand() -> None:
    table = CompressedEmbeddingBagConfig(
        name="t",
        num_embeddings=10_000,
        embedding_dim=32,
        feature_names=["f"],
        method=CCE(num_rows=300, num_columns=4, num_helper_rows=20),
    )
    plain = EmbeddingBagConfig(name="plain", num_embeddings=100, embedding_dim=8, feature_names=["g"])
    report = CompressedEmbeddingBagCollection(tables=[table, plain]).memory_report()
    cce, full = report.tables
    assert cce.num_params == 320 * 32
    assert cce.codebook_bytes == 40_960
    # 10,000 x 4 assignments of 2 bytes (300 rows need 9 bits); 5 coefficients and a version of 8 bytes.
    assert cce.assignment_bytes == 80_000 + 6 * 8
    assert cce.full_bytes == 1_280_000
    assert cce.parameter_ratio == 320_000 / 10_240 == 31.25
    assert cce.bytes_ratio == 1_280_000 / (40_960 + 80_048)
    assert (full.parameter_ratio, full.bytes_ratio, full.assignment_bytes) == (1, 1, 0)
    assert report.parameter_ratio == (320_000 + 800) / (10_240 + 800)
    assert report.bytes_ratio == (1_280_000 + 3200) / (40_960 + 3200 + 80_048)


@pytest.mark.parametrize(("optimizer", "numbers"), [(torch.optim.Adagrad, 1), (torch.optim.Adam, 2)])
def test_optimizer_state(optimizer: type[torch.optim.Optimizer], numbers: int) -> None:
    module = collection()
    trainer = optimizer(module.parameters(), lr=0.1)
    module(make_kjt({key: [[1]] for key in [*METHODS, "plain"]})).values().sum().backward()
    trainer.step()
    for row in module.memory_report(trainer).tables:
        physical = len(of_table(row.table, module.named_parameters()))
        assert row.optimizer_bytes == numbers * row.codebook_bytes + 4 * physical  # and a step count a tensor
    assert module.memory_report(trainer).total.optimizer_bytes == sum(
        value.untyped_storage().nbytes() for state in trainer.state.values() for value in state.values()
    )


def test_prints_a_line_a_table_and_the_total() -> None:
    lines = str(collection().memory_report()).splitlines()
    assert [line.split()[0] for line in lines] == ["table", *(f"t_{key}" for key in METHODS), "plain", "total"]
    assert len({len(line) for line in lines}) == 1  # aligned
    assert lines[1].split()[1:] == ["full", "16,000", "64,000", "0", "0", "64,000", "1.0", "1.0"]
