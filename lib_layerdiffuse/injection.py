"""What goes into the UNet, and when: free of any host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.methods import Family, Method
from lib_layerdiffuse.nets.attention_sharing import ATTENTIONS, AttentionSharing
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


Block = tuple[str, int]


def attention_patches(
    sharing: AttentionSharing, hosts: Mapping[tuple[str, Block], Any], weight: float, switch: Switch
) -> dict[str, Callable[..., Any]]:
    """What puts `sharing` into a UNet, by the name of the host's patch.

    The `…_output_patch` must be the first of its kind and the others the last, so as to nest innermost, as a module
    would. The host computes its own attention in between: on one token, as its answer is not used. Other extensions'
    replacements of the attention itself (`patches_replace`: SAG, PAG, IP-Adapter, StyleAlign) are called with our q, k
    and v; some come and go within a step, so what is in force is noted at each pass through the UNet.
    They are closures because hosts deep-copy their model options, which leaves nothing but functions as it is.
    hosts: the UNet's own attention modules.
    """
    units = {(name, block): unit for name in ATTENTIONS for block, unit in sharing.units(name).items()}
    pending: dict[tuple[str, Block], tuple[Tokens, Tokens, Tokens]] = {}
    replaced: dict[str, Mapping[Any, Any]] = {}

    def note(h: Tensor, options: Mapping[str, Any]) -> Tensor:
        replaced.update({name: options.get("patches_replace", {}).get(name, {}) for name in ATTENTIONS})
        return h

    def replacement(name: str, block: Block) -> Callable[..., Tokens] | None:
        return replaced[name].get((*block, 0), replaced[name].get(block))

    def before(name: str) -> Callable[..., tuple[Tokens, Tokens, Tokens]]:
        def patch(h: Tokens, context: Tokens, value: Tokens, extra: Mapping[str, Any]) -> tuple[Tokens, Tokens, Tokens]:
            block = extra["block"]
            if (name, block) not in units or not switch.on:
                return h, context, value
            pending[name, block] = h, context, value
            if replacement(name, block):  # it may count on the shapes that it knows
                return h, context, value
            return h[:, :1], context[:, :1], value[:, :1]

        return patch

    def after(name: str) -> Callable[..., Tokens]:
        def patch(answer: Tokens, extra: Mapping[str, Any]) -> Tokens:
            key = name, extra["block"]
            if key not in pending:
                return answer
            other = replacement(*key)
            mix = (lambda q, k, v: other(q, k, v, extra)) if other else None
            return units[key](*pending.pop(key), hosts[key], weight, mix)

        return patch

    attentions = {f"{name}_patch": before(name) for name in ATTENTIONS}
    return {"input_block_patch": note, **attentions, **{f"{name}_output_patch": after(name) for name in ATTENTIONS}}
