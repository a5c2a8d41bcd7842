"""The kernels compile for GPUs that are not there; the interpreter would let much pass that the compiler does not."""

from typing import Any

import pytest
import torch

from tests.gpu.conftest import Run

POINTERS = {"jobs": "*i64", "sample_weights": "*fp32", "all_inside": "*i32"}
FORWARD = {**POINTERS, "ids": "*i64", "offsets": "*i64", "out": "*fp32", "num_jobs": "i32", "size": "i32"}
BACKWARD = {**POINTERS, "ids": "*i32", "offsets": "*i32", "gradient": "*fp32", "sums": "*fp32"}
BACKWARD |= {"num_jobs": "i32", "size": "i32"}
NEAREST = {"points": "*fp32", "centroids": "*fp32", "norms": "*fp32", "nearest": "*i64", "least": "*fp32"}
NEAREST |= {"second": "*fp32", "num_points": "i32", "num_centroids": "i32", "num_dims": "i32"}


def assembly(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int) -> str:
    """PTX of a kernel, of which machine code could be made too."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = {
        (n,): [["tt.divisibility", 16]] for n, name in enumerate(signature) if name in ("out", "gradient", "sums")
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert len(compiled.asm["cubin"]) > 0
    text: str = compiled.asm["ptx"]
    return text


def lookups(fields: tuple[Any, ...], is_weighted: bool, capability: int) -> list[str]:
    from cce_torchrec.gpu.lookup import JOB_WORDS, _Kind
    from cce_torchrec.gpu.lookup_kernels import lookup_backward_kernel, lookup_kernel

    constants = {**_Kind(*fields).constants(), "WORDS": JOB_WORDS, "OUT_WIDTH": 832, "WEIGHTED": is_weighted}
    kernels = (lookup_kernel, FORWARD), (lookup_backward_kernel, BACKWARD)
    return [assembly(kernel, types, constants, capability) for kernel, types in kernels]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
def test_lookups_move_four_numbers_at_once(compiler: Run, dtype: torch.dtype, capability: int) -> None:
    forward, backward = compiler(lookups, (16, 1, 1, dtype == torch.int16, dtype, 4), dtype == torch.uint8, capability)
    assert "ld.global.v4.b32" in forward
    assert "st.global.v4.b32" in forward
    assert "ld.global.v4.b32" in backward
    assert ("add.v4.f32" in backward) == (capability == 90)


@pytest.mark.parametrize(
    "fields", [(5, 2, 1, False, torch.int16, 1), (4, 0, 3, False, None, 4), (12, 0, 0, False, None, 4)], ids=str
)
def test_lookups_of_other_kinds(compiler: Run, fields: tuple[Any, ...]) -> None:
    assert all("global" in text for text in compiler(lookups, fields, True, 90))


def nearest(capability: int) -> str:
    from cce_torchrec.gpu.nearest import BLOCK_D, BLOCK_K, BLOCK_N, nearest_kernel

    blocks = {"BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K, "BLOCK_D": BLOCK_D}
    return assembly(nearest_kernel, NEAREST, blocks, capability)


@pytest.mark.parametrize("capability", [80, 90])
def test_products_of_the_nearest_centroids_are_in_float32(compiler: Run, capability: int) -> None:
    text = compiler(nearest, capability)
    assert "fma.rn.f32" in text
    assert "tf32" not in text
