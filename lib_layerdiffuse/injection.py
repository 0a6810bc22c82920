"""What goes into the UNet, and when: free of any host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.methods import Family, Method
from lib_layerdiffuse.nets.attention_sharing import AttentionSharing
from lib_layerdiffuse.tensors import StateDict, Tokens
from lib_layerdiffuse.weights import fingerprint, read_tensors


@dataclass(frozen=True)
class WeightPatch:
    """Additions to weights of the UNet, by the UNet's key (`diffusion_model.…`)."""

    lora: Mapping[str, tuple[Tensor, Tensor]]  # up [out, rank], down [rank, in]; scale 1
    diff: Mapping[str, Tensor]  # same shape as the weight

    @classmethod
    def from_state_dict(cls, sd: StateDict) -> WeightPatch:
        """Keys are `<unet key>::<lora or diff>::<index>`. Raises LayerDiffuseError where they are not."""
        lora = {
            key: (sd[f"{key}::lora::0"], sd[f"{key}::lora::1"]) for key in keys_of("lora", sd) & keys_of("lora", sd, 1)
        }
        diff = {key: sd[f"{key}::diff::0"] for key in keys_of("diff", sd)}
        if not sd or 2 * len(lora) + len(diff) != len(sd):
            raise LayerDiffuseError(
                "expected additions to SDXL weights, `…::lora::0` with `…::lora::1` or `…::diff::0`, found "
                f"{len(sd)} tensors such as `{min(sd, default='none')}`"
            )
        return cls(lora, diff)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape that each weight must have for its addition to fit; a LoRA fits the weight as a matrix."""
        matrices = {key: (up.shape[0], down.shape[1]) for key, (up, down) in self.lora.items()}
        return matrices | {key: tuple(diff.shape) for key, diff in self.diff.items()}


def keys_of(kind: str, sd: StateDict, index: int = 0) -> set[str]:
    """The UNet's keys that have an addition of this kind."""
    end = f"::{kind}::{index}"
    return {key.removesuffix(end) for key in sd if key.endswith(end)}


@dataclass(frozen=True)
class Injection:
    """The content of a method's weight file; `identity` names that content, for caches."""

    method: Method
    identity: str
    content: WeightPatch | AttentionSharing


CONTENTS: Mapping[Family, Callable[[StateDict], WeightPatch | AttentionSharing]] = {
    Family.SD15: AttentionSharing.from_state_dict,
    Family.SDXL: WeightPatch.from_state_dict,
}


def load_injection(method: Method, path: Path) -> Injection:
    """Read the method's weight file. Raises LayerDiffuseError where it is not whole or not of this kind."""
    sd = read_tensors(path)
    try:
        content = CONTENTS[method.family](sd)
        if isinstance(content, AttentionSharing) and content.frames != method.frames:
            raise LayerDiffuseError(f"expected {method.frames} frames for each picture, found {content.frames}")
    except LayerDiffuseError as error:
        raise misfit(method, str(error)) from error
    return Injection(method, fingerprint(path), content)


def misfit(method: Method, reason: str) -> LayerDiffuseError:
    """The sentence for a file that is whole but cannot serve."""
    return LayerDiffuseError(
        f"{method.weights} is not the weight file of {method.label}: {reason}. Delete it, or put the right file in its "
        "place; a missing file is downloaded again."
    )


@dataclass
class Switch:
    """Turns the injection off below `sigma_end`, and on again for samplers that go back up."""

    sigma_end: float
    turn: Callable[[bool], None]
    on: bool = True

    def at(self, sigma: float) -> None:
        wanted = sigma >= self.sigma_end
        if wanted != self.on:
            self.on = wanted
            self.turn(wanted)


AttentionPatch = Callable[[Tokens, Tokens, Tokens, Mapping[str, Any]], tuple[Tokens, Tokens, Tokens]]
OutputPatch = Callable[[Tokens, Mapping[str, Any]], Tokens]


def attention_patches(
    sharing: AttentionSharing, attention: str, hosts: Mapping[tuple[str, int], Any], weight: float, switch: Switch
) -> tuple[AttentionPatch, OutputPatch]:
    """The host's `<attention>_patch` and `<attention>_output_patch` that put `sharing` in the place of its attention.

    Must be the last of the former and the first of the latter, so as to nest innermost, as a module would. Between the
    two the host computes its own attention on what the first returns: one token, as its answer is not used.
    They are closures because hosts deep-copy their model options, which leaves nothing but functions as it is.
    hosts: the UNet's own attention modules by block.
    """
    units = sharing.units(attention)
    pending: dict[tuple[str, int], tuple[Tokens, Tokens, Tokens]] = {}

    def before(h: Tokens, context: Tokens, value: Tokens, extra: Mapping[str, Any]) -> tuple[Tokens, Tokens, Tokens]:
        if extra["block"] not in units or not switch.on:
            return h, context, value
        pending[extra["block"]] = h, context, value
        return h[:, :1], context[:, :1], value[:, :1]

    def after(answer: Tokens, extra: Mapping[str, Any]) -> Tokens:
        block = extra["block"]
        if block not in pending:
            return answer
        return units[block](*pending.pop(block), hosts[block], weight)

    return before, after
