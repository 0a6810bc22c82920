"""When and where it works in the UNet: functions for the hosts' lists of patches, free of any host.

They are closures, because hosts deep-copy their model options, which leaves nothing but functions as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.nets.attention_sharing import ATTENTIONS, LEVELS, FoldedSharing, FoldedUnit, SharedLayer
from lib_layerdiffuse.tensors import Latent, Rgb, Tokens

Block = tuple[str, int]
Key = tuple[str, Block]  # attn1 or attn2, and where

FIRST_BLOCK: Block = ("input", 0)


@dataclass
class Switch:
    """Turns the injection on from `sigma_start` down to `sigma_end`, and back for samplers that go back up."""

    sigma_start: float
    sigma_end: float
    turn: Callable[[bool], None]
    on: bool = True

    def at(self, sigma: float) -> None:
        wanted = self.sigma_end <= sigma <= self.sigma_start
        if wanted != self.on:
            self.on = wanted
            self.turn(wanted)


@dataclass(frozen=True)
class Patch:
    """A function for the host's list of patches of one kind; among its fellows there, the first or the last."""

    kind: str
    call: Callable[..., Any]
    first: bool = False


def add_to_rows(x: Tensor, added: Tensor) -> Tensor:
    """[k·b, …] + [b, …], as a UNet's batch holds each picture several times: with the prompt, without it."""
    if len(x) % len(added) or x.shape[1:] != added.shape[1:]:
        raise LayerDiffuseError(
            f"Layers need the whole picture at once, but the UNet got {tuple(x.shape)} where {tuple(added.shape)} "
            "belongs. Switch off what samples it in tiles or makes it smaller on the way: MultiDiffusion, Kohya "
            "HRFix."
        )
    return (x.unflatten(0, (-1, len(added))) + added).flatten(0, 1)


def condition_patch(weights: Tensor, latents: Latent, weight: float, switch: Switch) -> Patch:
    """The part of the widened first convolution that reads the condition: constant over the steps, so computed once.

    weights: [out, K, 3, 3]; latents: [b, K, H/8, W/8] as the UNet sees them, of one for all pictures or of each.
    """
    signal: list[Tensor] = []

    def patch(h: Tensor, options: Mapping[str, Any]) -> Tensor:
        if options["block"] != FIRST_BLOCK or not switch.on:
            return h
        if not signal:
            signal.append(weight * F.conv2d(latents.to(h), weights.to(h), padding="same"))
        return add_to_rows(h, signal[0])

    return Patch("input_block_patch", patch)


class ControlSignals:
    """The control signals of a condition image, each made when it is first asked for.

    picture: [b, 3, H, W], one for all pictures or one for each; None where there is nothing to go by.
    """

    def __init__(self, sharing: FoldedSharing, picture: Rgb | None, weight: float) -> None:
        self._sharing, self._picture, self._weight = sharing, picture, weight
        self._units = units_of(sharing)
        self._signals: list[Tensor] = []
        self._made: dict[Key, Tokens] = {}

    def at(self, key: Key, h: Tokens) -> Tokens | None:
        """What is added to the hidden states h of that attention layer."""
        if self._picture is None or key not in self._units:
            return None
        if not self._signals:
            self._signals = self._sharing.signals(self._picture.to(h))
        if key not in self._made:
            self._made[key] = self._weight * self._units[key].control(self._signals[LEVELS[key[1]]])
        return self._made[key]


def control_patches(controls: ControlSignals, switch: Switch) -> list[Patch]:
    """What adds the control signals to the hidden states before any other patch, and to the answer after all others.

    Outermost, unlike the rest: where other extensions merge tokens in between, they still are as many as the signal's.
    """

    def before(name: str) -> Callable[..., tuple[Tokens, Tokens, Tokens]]:
        def patch(h: Tokens, context: Tokens, value: Tokens, extra: Mapping[str, Any]) -> tuple[Tokens, Tokens, Tokens]:
            control = controls.at((name, extra["block"]), h) if switch.on else None
            if control is None:
                return h, context, value
            controlled = add_to_rows(h, control)
            return controlled, controlled if context is h else context, controlled if value is h else value

        return patch

    def after(name: str) -> Callable[..., Tokens]:
        def patch(answer: Tokens, extra: Mapping[str, Any]) -> Tokens:
            control = controls.at((name, extra["block"]), answer) if switch.on else None
            return answer if control is None else add_to_rows(answer, control)

        return patch

    return [
        *(Patch(f"{name}_patch", before(name), first=True) for name in ATTENTIONS),
        *(Patch(f"{name}_output_patch", after(name)) for name in ATTENTIONS),
    ]


def units_of(sharing: FoldedSharing) -> dict[Key, FoldedUnit]:
    return {(name, block): unit for name in ATTENTIONS for block, unit in sharing.units(name).items()}


class SharedLayers:
    """The units on the UNet's own attention layers, each made when it is first called.

    hosts: the UNet's attention modules. version: changes with their weights, LoRAs included; layers are then made anew.
    """

    def __init__(
        self, sharing: FoldedSharing, hosts: Mapping[Key, Any], weight: float, version: Callable[[], object]
    ) -> None:
        self.units = units_of(sharing)
        self._hosts = hosts
        self._weight = weight
        self._version = version
        self.made: dict[Key, SharedLayer] = {}
        self._made_of: object = None
        self._text: Tokens | None = None
        self._latest: Tokens | None = None

    def at(self, key: Key, like: Tokens) -> SharedLayer:
        if key not in self.made:
            self.made[key] = SharedLayer(self.units[key], self._hosts[key], self._weight, like)
        return self.made[key]

    def text(self, latest: Tokens) -> Tokens:
        """The text that came first, if this is the same: the host has one object in a step, another in the next."""
        if latest is not self._latest:
            self._latest = latest
            if self._text is None or not torch.equal(self._text, latest):
                self._text = latest
        assert self._text is not None
        return self._text

    def refresh(self) -> None:
        """Forget those that were made of other weights than the UNet's are now."""
        if self._made_of != (version := self._version()):
            self.clear()
            self._made_of = version

    def clear(self) -> None:
        self.made.clear()
        self._text = self._latest = None


def tiles_of(h: Tokens, context: Tokens, frames: int) -> tuple[Callable[[Tokens], Tokens], Callable[[Tokens], Tokens]]:
    """To rows for each tile, whose frames are adjacent, and back: HyperTile makes h [(b f tiles), N, C].

    It leaves k and v as they are, [(b f), M, K], and counts on the attention to split their tokens over the rows of q.
    """
    tiles = len(h) // len(context)

    def apart(x: Tokens) -> Tokens:
        rows = x.reshape(len(h), -1, x.shape[2])
        return rows.unflatten(0, (-1, frames, tiles)).transpose(1, 2).flatten(0, 2)

    def together(x: Tokens) -> Tokens:
        return x.unflatten(0, (-1, tiles, frames)).transpose(1, 2).flatten(0, 2)

    return apart, together


def attention_patches(layers: SharedLayers, switch: Switch) -> list[Patch]:
    """What puts the units into a UNet.

    They nest innermost, as a module would: last before the attention, first after it. The host computes its own
    attention in between: on one token, as its answer is not used. Other extensions' replacements of the attention
    itself (`patches_replace`: SAG, PAG, IP-Adapter, StyleAlign) are called with our q, k and v; some come and go within
    a step, so what is in force is noted at each pass through the UNet.
    """
    pending: dict[Key, tuple[Tokens, Tokens, Tokens]] = {}
    replaced: dict[str, Mapping[Any, Any]] = {}

    def note(h: Tensor, options: Mapping[str, Any]) -> Tensor:
        layers.refresh()
        replaced.update({name: options.get("patches_replace", {}).get(name, {}) for name in ATTENTIONS})
        return h

    def replacement(name: str, block: Block) -> Callable[..., Tokens] | None:
        return replaced[name].get((*block, 0), replaced[name].get(block))

    def before(name: str) -> Callable[..., tuple[Tokens, Tokens, Tokens]]:
        def patch(h: Tokens, context: Tokens, value: Tokens, extra: Mapping[str, Any]) -> tuple[Tokens, Tokens, Tokens]:
            block = extra["block"]
            if (name, block) not in layers.units or not switch.on:
                return h, context, value
            pending[name, block] = h, context, value
            if replacement(name, block) or len(h) != len(context):  # they may count on the shapes that they know
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
            h, context, value = pending.pop(key)
            if name == "attn2":
                context, value = layers.text(context), layers.text(context) if value is context else value
            layer = layers.at(key, h)
            if len(h) == len(context):
                return layer(h, context, value, mix)
            apart, together = tiles_of(h, context, layers.units[key].frames)
            return together(layer(apart(h), apart(context), apart(value), mix))

        return patch

    return [
        Patch("input_block_patch", note),
        *(Patch(f"{name}_patch", before(name)) for name in ATTENTIONS),
        *(Patch(f"{name}_output_patch", after(name), first=True) for name in ATTENTIONS),
    ]
