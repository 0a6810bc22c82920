"""One precision for all tensors of a weight file, whatever number formats somebody saved it in."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.tensors import StateDict

# The precisions that networks compute in, by the formats that they can take without loss (float64 but for its last
# digits). Integers are missing on purpose: what they stand for is known to those alone who quantized them.
PRECISIONS: Mapping[torch.dtype, torch.dtype] = {
    torch.float16: torch.float16,
    torch.bfloat16: torch.bfloat16,
    torch.float32: torch.float32,
    torch.float64: torch.float32,
    torch.float8_e4m3fn: torch.float16,
    torch.float8_e4m3fnuz: torch.float16,
    torch.float8_e5m2: torch.float16,
    torch.float8_e5m2fnuz: torch.float16,
}


def uniform(tensors: StateDict) -> StateDict:
    """The tensors in one precision; those that have it already as they are, not copied.

    Raises LayerDiffuseError, naming the tensor, where one does not hold floating-point numbers, or not finite ones.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in PRECISIONS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise LayerDiffuseError(f"its tensor {name} holds {kind}, where floating-point numbers belong")
    found = {PRECISIONS[tensor.dtype] for tensor in tensors.values()}
    [precision] = found if len(found) == 1 else {torch.float32}  # which alone holds both float16 and bfloat16
    converted = {name: tensor.to(precision) for name, tensor in tensors.items()}
    for name, tensor in converted.items():
        if not finite(tensor):
            raise LayerDiffuseError(f"its tensor {name} holds NaN or infinity")
    return converted


def finite(tensor: Tensor) -> bool:
    """Whether all its numbers are. By the extremes, which pass NaN on: a tenth of the time of `isfinite` for each."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())
