"""TorchX components of the project, for ``torchx run launch/components.py:NAME``."""

import torchx.components.dist as torchx_dist
import torchx.specs as specs


def dlrm(
    *script_args: str, j: str = "1x1", image: str = "", cpu: int = 2, gpu: int = 0, memMB: int = 4096
) -> specs.AppDef:
    """Train the DLRM example under TorchElastic.

    Args:
        script_args: flags of ``python -m dlrm_example.train``, after ``--``
        j: nodes x processes a node, such as 2x8
        image: container image, where the scheduler runs one
        cpu: cores a node
        gpu: GPUs a node
        memMB: memory a node, in MB
    """
    return torchx_dist.ddp(
        *script_args, m="dlrm_example.train", name="dlrm", image=image, cpu=cpu, gpu=gpu, memMB=memMB, j=j
    )
