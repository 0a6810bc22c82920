"""What goes into the UNet: the content of a method's weight file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from torch import Tensor

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.methods import Method
from lib_layerdiffuse.nets.attention_sharing import AttentionSharing, FoldedSharing
from lib_layerdiffuse.tensors import StateDict
from lib_layerdiffuse.weights.files import REPLACE, fingerprint, read_tensors

SHARING = "hookers."  # what keys of attention sharing begin with
FIRST_CONV = "diffusion_model.input_blocks.0.0.weight"


@dataclass(frozen=True)
class WeightPatch:
    """Additions to weights of the UNet, by the UNet's key (`diffusion_model.…`)."""

    lora: Mapping[str, tuple[Tensor, Tensor]]  # up [out, rank], down [rank, in]; scale 1
    diff: Mapping[str, Tensor]  # same shape as the weight
    condition: Tensor | None = None  # what widens the first convolution, [out, C for each condition image, 3, 3]
    conditions: int = 0  # how many condition images that reads the latents of

    @classmethod
    def from_state_dict(cls, sd: StateDict, channels: int) -> WeightPatch:
        """Keys are `<unet key>::<lora or diff>::<index>`. Raises LayerDiffuseError where they are not.

        channels: of a latent; more in a diff of the first convolution read the latents of condition images.
        """
        lora = {
            key: (sd[f"{key}::lora::0"], sd[f"{key}::lora::1"]) for key in keys_of("lora", sd) & keys_of("lora", sd, 1)
        }
        diff = {key: sd[f"{key}::diff::0"] for key in keys_of("diff", sd)}
        if not sd or 2 * len(lora) + len(diff) != len(sd):
            raise LayerDiffuseError(
                "expected additions to weights of the UNet, `…::lora::0` with `…::lora::1` or `…::diff::0`, found "
                f"{len(sd)} tensors such as `{min(sd, default='none')}`"
            )
        if FIRST_CONV not in diff or diff[FIRST_CONV].shape[1] <= channels:
            return cls(lora, diff)
        own, condition = diff[FIRST_CONV].tensor_split([channels], dim=1)
        return cls(lora, diff | {FIRST_CONV: own}, condition, condition.shape[1] // channels)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape that each weight must have for its addition to fit; a LoRA fits the weight as a matrix."""
        matrices = {key: (up.shape[0], down.shape[1]) for key, (up, down) in self.lora.items()}
        return matrices | {key: tuple(diff.shape) for key, diff in self.diff.items()}

    def misfit(self, weights: Mapping[str, Tensor]) -> str | None:
        """Why it does not fit a UNet's weights, if it does not."""
        shapes = {key: tuple(weight.shape) for key, weight in weights.items()}
        matrices = {key: (shape[0], prod(shape[1:])) if key in self.lora else shape for key, shape in shapes.items()}
        wanted = self.shapes()
        unfit = [key for key, shape in wanted.items() if matrices.get(key) != shape]
        if not unfit:
            return None
        return (
            f"{len(unfit)} of its {len(wanted)} additions do not fit this UNet, such as {unfit[0]} "
            f"(file {wanted[unfit[0]]}, UNet {shapes.get(unfit[0], 'has none')})"
        )


def keys_of(kind: str, sd: StateDict, index: int = 0) -> set[str]:
    """The UNet's keys that have an addition of this kind."""
    end = f"::{kind}::{index}"
    return {key.removesuffix(end) for key in sd if key.endswith(end)}


@dataclass(frozen=True)
class Injection:
    """The content of a method's weight file; `identity` names that content, for caches."""

    method: Method
    identity: str
    content: WeightPatch | FoldedSharing


def content_of(sd: StateDict, channels: int) -> WeightPatch | FoldedSharing:
    """The file says what it is. Raises LayerDiffuseError where it is neither."""
    if any(key.startswith(SHARING) for key in sd):
        return AttentionSharing.from_state_dict(sd).folded()
    return WeightPatch.from_state_dict(sd, channels)


def load_injection(method: Method, path: Path) -> Injection:
    """Read the method's weight file. Raises LayerDiffuseError where it is not whole or not of this kind."""
    sd = read_tensors(path)
    try:
        content = content_of(sd, method.family.channels)
        if isinstance(content, FoldedSharing) and content.frames != method.frames:
            raise LayerDiffuseError(f"expected {method.frames} frames for each picture, found {content.frames}")
        if content.conditions != len(method.inputs):
            raise LayerDiffuseError(f"expected {len(method.inputs)} condition images, found {content.conditions}")
    except LayerDiffuseError as error:
        raise misfit(method, str(error)) from error
    return Injection(method, fingerprint(path), content)


UNSHARED = "it shares attention between layers of SD1.5, which this UNet does not have"


def misfit(method: Method, reason: str) -> LayerDiffuseError:
    """The sentence for a file that is whole but cannot serve."""
    return LayerDiffuseError(f"{method.weights} is not the weight file of {method.full_title}: {reason}. {REPLACE}")
