"""SD1.5 attention sharing: low-rank additions to every attention layer, and attention between the layers of a picture.

First the file's form, `AttentionSharing`; then the one that computes, `FoldedSharing`: the same maps in fewer products.
The UNet's own projections stay where they are and are called through the host's modules, so user LoRAs, quantised
weights and low-VRAM casting keep working; this file only adds to what they answer.
Format: the released `layer_sd15_*.safetensors`; method: arXiv 2402.17113, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import linear

from lib_layerdiffuse.nets.loading import children, hold, shape
from lib_layerdiffuse.tensors import Rgb, StateDict, Tokens

# The transformer blocks of the SD1.5 UNet in the order of the file; each has `attn1` (self), then `attn2` (text).
BLOCKS: tuple[tuple[str, int], ...] = (
    *(("input", i) for i in (1, 2, 4, 5, 7, 8)),
    *(("output", i) for i in range(3, 12)),
    ("middle", 0),
)
# How often each of them has halved the latent; the control signals come in the same four sizes.
LEVELS = dict(zip(BLOCKS, (0, 0, 1, 1, 2, 2, 2, 2, 2, 1, 1, 1, 0, 0, 0, 3), strict=True))
ATTENTIONS = ("attn1", "attn2")
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")
NORM_EPS = 1e-6  # not recoverable from the file
# Of the control encoder's convolutions, by level; not recoverable from the file.
STRIDES = ((1, 1, 2, 1, 2, 1, 2, 1), (2, 1), (2, 1), (2, 1))

# What a projection of the host is asked, to learn its matrix: this times each unit vector. A power of two rounds
# nothing, and a large one leaves the weights their digits where a bias is added in half precision.
PROBE = 1024.0

Attention: TypeAlias = Callable[[Tokens, Tokens, Tokens], Tokens]
Projection: TypeAlias = Callable[[Tokens], Tokens]  # [B, N, in] -> [B, N, out], for each token alone


def applied(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer(x)`, wherever and in whatever precision the layer is kept."""
    return linear(x, layer.weight.to(x), layer.bias.to(x))


def convolve(x: Tensor, layers: nn.Sequential) -> Tensor:
    """`layers(x)` for convolutions and activations, wherever and in whatever precision they are kept."""
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            bias = None if layer.bias is None else layer.bias.to(x)
            x = F.conv2d(x, layer.weight.to(x), bias, layer.stride, layer.padding)
        else:
            x = layer(x)
    return x


def attend(q: Tokens, k: Tokens, v: Tokens, heads: int) -> Tokens:
    """Multi-head attention over tokens, [B, N, C] each (k and v may have another N)."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # -> [B, heads, N, C/heads]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def attend_frames(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention between the frames at each token, [F, B, N, C] each.

    Frames are few (2 or 3) and tokens many: sums over products keep clear of the CUDA grid limit that one tiny
    attention for each token would hit (65,535).
    """
    q, k, v = (t.unflatten(-1, (heads, -1)) for t in (q, k, v))  # -> [F, B, N, heads, C/heads]
    answers = []
    for own in q:  # one after the other, as the products take F times the memory of the answer
        scores = (own * k).sum(-1, keepdim=True) * q.shape[-1] ** -0.5  # -> [F, B, N, heads, 1]
        answers.append((scores.softmax(dim=0) * v).sum(dim=0))
    return torch.stack(answers).flatten(-2)


def frames_first(x: Tokens, frames: int) -> Tokens:
    """[(b f), N, C] -> [(f b), N, C], so that all rows of a frame are one matrix."""
    return x.unflatten(0, (-1, frames)).transpose(0, 1).reshape(x.shape)


def frames_last(x: Tokens, frames: int) -> Tokens:
    """[(f b), N, C] -> [(b f), N, C], as the UNet has them."""
    return frames_first(x, len(x) // frames)


def control_tokens(convolutions: nn.ModuleList, signal: Tensor) -> Tokens:
    """What each frame's convolutions make of a control signal [b, S, h, w]: [(b f), h·w, C]."""
    frames = [convolve(signal, layers) for layers in convolutions]  # type: ignore[arg-type]
    return torch.stack(frames, dim=1).flatten(3).transpose(2, 3).flatten(0, 1)  # [b, f, C, h, w] -> [(b f), N, C]


class LowRank(nn.Module):
    """up · down, without a scale of its own."""

    def __init__(self, n_in: int, n_out: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(n_in, rank, bias=False)
        self.up = nn.Linear(rank, n_out, bias=False)


class AttentionSharingUnit(nn.Module):
    """What is added to one attention layer of the UNet. `width` channels inside, `context` channels for k and v.

    signal: channels of the control signal; 0 for files without control.
    """

    def __init__(self, width: int, context: int, rank: int, frames: int, signal: int = 0) -> None:
        super().__init__()

        def per_frame(n_in: int) -> nn.ModuleList:
            return nn.ModuleList(LowRank(n_in, width, rank) for _ in range(frames))

        self.to_q_lora = per_frame(width)
        self.to_k_lora = per_frame(context)
        self.to_v_lora = per_frame(context)
        self.to_out_lora = per_frame(width)
        self.temporal_n = nn.LayerNorm(width, eps=NORM_EPS)
        self.temporal_i = nn.Linear(width, width)
        self.temporal_q = nn.Linear(width, width)
        self.temporal_k = nn.Linear(width, width)
        self.temporal_v = nn.Linear(width, width)
        self.temporal_o = nn.Linear(width, width)
        if signal:
            self.control_convs = nn.ModuleList(
                nn.Sequential(nn.Conv2d(signal, signal, 3, padding=1), nn.SiLU(), nn.Conv2d(signal, width, 1))
                for _ in range(frames)
            )


class ControlEncoder(nn.Module):
    """From the picture that the others go by to signals at the sizes of the UNet's levels."""

    def __init__(self, widths: Sequence[Sequence[int]]) -> None:
        super().__init__()
        for level, (sizes, strides) in enumerate(zip(widths, STRIDES, strict=True)):
            layers: list[nn.Module] = []
            for (n_in, n_out), stride in zip(pairwise(sizes), strides, strict=True):
                layers += [nn.Conv2d(n_in, n_out, 3, stride, padding=1), nn.SiLU()]
            setattr(self, f"blocks_{level}", nn.Sequential(*layers))

    def forward(self, rgb: Rgb) -> list[Tensor]:
        """[b, 3, H, W] in 0..1 -> one [b, S, H/8, W/8], and three more, each half the size of the one before."""
        signals = [2 * rgb - 1]
        for level in range(len(STRIDES)):
            signals.append(convolve(signals[-1], getattr(self, f"blocks_{level}")))
        return signals[1:]


class Hookers(nn.Module):
    """A level of the file's keys."""

    def __init__(self, units: Sequence[AttentionSharingUnit]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(units)


class AttentionSharing(nn.Module):
    """All units of a file, `hookers.layers.<i>`, in the order BLOCKS × ATTENTIONS; with control, `kwargs_encoder`."""

    def __init__(self, units: Sequence[AttentionSharingUnit], encoder: ControlEncoder | None = None) -> None:
        super().__init__()
        self.hookers = Hookers(units)
        self.kwargs_encoder = encoder
        self._units = tuple(units)  # the same, with their type

    @classmethod
    def from_state_dict(cls, sd: StateDict) -> AttentionSharing:
        """Read frames, rank and widths from the tensors. Raises LayerDiffuseError where they are not such a file."""
        with torch.device("meta"):
            units = [_unit_like(sd, f"hookers.layers.{i}.") for i in range(len(BLOCKS) * len(ATTENTIONS))]
            model = cls(units, _encoder_like(sd))
        return hold(model, sd)

    def folded(self) -> FoldedSharing:
        return FoldedSharing([FoldedUnit(unit) for unit in self._units], self.kwargs_encoder)


def _unit_like(sd: StateDict, prefix: str) -> AttentionSharingUnit:
    rank, width = shape(sd, prefix + "to_q_lora.0.down.weight")
    context = shape(sd, prefix + "to_k_lora.0.down.weight")[1]
    has_control = children(sd, prefix + "control_convs.") > 0
    signal = shape(sd, prefix + "control_convs.0.0.weight")[1] if has_control else 0
    return AttentionSharingUnit(width, context, rank, children(sd, prefix + "to_q_lora."), signal)


def _encoder_like(sd: StateDict) -> ControlEncoder | None:
    """As wide as the file's, convolutions standing at even places; none where the file has none."""
    if not children(sd, "kwargs_encoder."):
        return None
    convolutions = [
        [shape(sd, f"kwargs_encoder.blocks_{level}.{2 * i}.weight") for i in range(len(strides))]
        for level, strides in enumerate(STRIDES)
    ]
    return ControlEncoder([[shapes[0][1], *(row[0] for row in shapes)] for shapes in convolutions])


def composed(*layers: nn.Linear) -> nn.Linear:
    """One layer in place of several, the first of them first; computed and kept in single precision."""
    first, *others = layers
    weight, bias = first.weight.float(), first.bias.float()
    for layer in others:
        weight, bias = layer.weight.float() @ weight, layer.weight.float() @ bias + layer.bias.float()
    return frozen_linear(weight, bias)


def normed(norm: nn.LayerNorm, layer: nn.Linear) -> nn.Linear:
    """`layer` with the norm's own weight and bias before it, which leaves the norm none."""
    weight = layer.weight.float()
    return frozen_linear(weight * norm.weight.float(), weight @ norm.bias.float() + layer.bias.float())


def frozen_linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    n_out, n_in = weight.shape
    return hold(nn.Linear(n_in, n_out, device="meta"), {"weight": weight, "bias": bias})


def affine_of(base: Projection, n_in: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix [in, out] and the bias [out] of a projection of the host, however it keeps them.

    Quantised, on another device, with a LoRA beside it: its answers say what it is. like: tokens that it is used for.
    """
    rows = PROBE * torch.eye(n_in + 1, n_in, device=like.device, dtype=like.dtype)  # the last row is 0
    answers = base(rows[None])[0]
    return (answers[:-1] - answers[-1]) / PROBE, answers[-1]


class Matrices(nn.Module):
    """A matrix for each frame, under the name by which hosts short of memory know what to move to the device."""

    def __init__(self, matrices: Iterable[Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack(list(matrices)), requires_grad=False)


class LowRanks(nn.Module):
    """up · down for each frame, beside a projection of the UNet, for tokens [(f b), N, C].

    pairs: of each frame, a LowRank.
    """

    def __init__(self, pairs: Iterable[Any]) -> None:
        super().__init__()
        pairs = list(pairs)
        self.down = Matrices(pair.down.weight for pair in pairs)  # [f, rank, in]
        self.up = Matrices(pair.up.weight for pair in pairs)  # [f, out, rank]

    def added_to(self, base: Projection, weight: float, like: Tokens) -> Projection:
        """`base` and `weight` times these. like: tokens of the device and precision in which it is used."""
        return (self._merged if self._worth_merging() else self._beside)(base, weight, like)

    @property
    def reads_text(self) -> bool:
        """Whether its tokens are those of the prompt, which are as wide as the text encoder."""
        return self.down.weight.shape[2] != self.up.weight.shape[1]

    def _worth_merging(self) -> bool:
        """Whether the two products take at least half as long as the projection itself, as where the UNet is narrow.

        Merged, they take no time, but memory: a matrix for each frame, which is small there and large where the UNet is
        wide. A text is read once in a sampling.
        """
        _, rank, width = self.down.weight.shape
        return not self.reads_text and 4 * rank > width

    def _merged(self, base: Projection, weight: float, like: Tokens) -> Projection:
        matrix, bias = affine_of(base, self.down.weight.shape[2], like)
        matrices = torch.baddbmm(matrix.T, self.up.weight.to(like), self.down.weight.to(like), alpha=weight)

        def project(x: Tokens) -> Tokens:
            answers = [linear(rows, own, bias) for rows, own in zip(self._rows(x), matrices, strict=True)]
            return torch.stack(answers).view(*x.shape[:2], -1)

        return project

    def _beside(self, base: Projection, weight: float, like: Tokens) -> Projection:
        def project(x: Tokens) -> Tokens:
            answer = base(x).contiguous()  # so that the rows of a frame are a view of it
            pairs = zip(self.down.weight.to(x), self.up.weight.to(x), strict=True)
            for rows, (down, up), out in zip(self._rows(x), pairs, self._rows(answer), strict=True):
                out.add_(linear(linear(rows, down), up), alpha=weight)
            return answer

        return project

    def _rows(self, x: Tokens) -> Tensor:
        """[(f b), N, C] -> of each frame, [f, b·N, C]. A product for each is faster on CPUs than one for all."""
        return x.unflatten(0, (len(self.down.weight), -1)).flatten(1, 2)


class FoldedUnit(nn.Module):
    """A unit as it is computed: what is linear in a row is one layer.

    One frame has nothing to choose from in the attention between frames, so all of that is one layer.
    """

    def __init__(self, unit: AttentionSharingUnit) -> None:
        super().__init__()
        self.frames = len(unit.to_q_lora)
        self.to_q, self.to_k = LowRanks(unit.to_q_lora), LowRanks(unit.to_k_lora)
        self.to_v, self.to_out = LowRanks(unit.to_v_lora), LowRanks(unit.to_out_lora)
        into, chosen = normed(unit.temporal_n, unit.temporal_i), (unit.temporal_q, unit.temporal_k, unit.temporal_v)
        alone = self.frames == 1
        self.temporal_qkv = nn.ModuleList([] if alone else [composed(into, layer) for layer in chosen])
        self.temporal_o = composed(into, unit.temporal_v, unit.temporal_o) if alone else unit.temporal_o
        self.control_convs = getattr(unit, "control_convs", nn.ModuleList())

    def control(self, signal: Tensor) -> Tokens:
        """What a control signal [b, S, h, w] adds to the layer's hidden states: [(b f), h·w, C]."""
        return control_tokens(self.control_convs, signal)

    def share(self, x: Tokens, heads: int) -> Tokens:
        """Attention between the frames, [(f b), N, C] -> the same."""
        y = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
        if self.temporal_qkv:
            qkv = (applied(layer, y) for layer in self.temporal_qkv)  # type: ignore[arg-type]
            q, k, v = (t.unflatten(0, (self.frames, -1)) for t in qkv)
            y = attend_frames(q, k, v, heads).flatten(0, 1)
        return applied(self.temporal_o, y)


class SharedLayer:
    """A unit in the place of an attention layer of the UNet.

    host: that layer's module (`to_q`, `to_k`, `to_v`, `to_out`, `heads`), as it is now.
    weight: scales every added map; 0 gives the UNet's own answer.
    like: hidden states of the device and precision in which it is used.
    """

    def __init__(self, unit: FoldedUnit, host: Any, weight: float, like: Tokens) -> None:
        self._unit = unit
        self._heads = host.heads
        self._weight = weight
        self._projections = {
            name: getattr(unit, name).added_to(getattr(host, name), weight, like) for name in PROJECTIONS
        }
        self._of_text: dict[str, tuple[Tokens, Tokens]] = {}

    def __call__(self, h: Tokens, context: Tokens, value: Tokens, mix: Attention | None = None) -> Tokens:
        """What is added to the hidden states h, [(b f), N, C].

        context, value: what k and v are computed from, [(b f), M, K]; for the same text, the same objects.
        mix: what another extension put in the place of the attention of q, k and v.
        """
        x = frames_first(h, self._unit.frames)
        q = self._projections["to_q"](x)
        k, v = (self._read(name, source, h, x) for name, source in (("to_k", context), ("to_v", value)))
        answer = self._projections["to_out"](self._mixed(q, k, v, mix) if mix else attend(q, k, v, self._heads))
        answer.add_(self._unit.share(x + answer, self._heads), alpha=self._weight)
        return frames_last(answer, self._unit.frames)

    def _read(self, name: str, source: Tokens, h: Tokens, x: Tokens) -> Tokens:
        """k or v. x: h, frames first. A text stays as it is over the steps, and so does what is read of it."""
        text, answer = self._of_text.get(name, (None, None))
        if answer is None or text is not source:
            answer = self._projections[name](x if source is h else frames_first(source, self._unit.frames))
            if getattr(self._unit, name).reads_text:
                self._of_text[name] = source, answer
        return answer

    def _mixed(self, q: Tokens, k: Tokens, v: Tokens, mix: Attention) -> Tokens:
        """By another extension, for which frames are last, and which may write into what it gets."""
        frames = self._unit.frames
        return frames_first(mix(*(frames_last(t, frames).clone() for t in (q, k, v))), frames)


class FoldedSharing(nn.Module):
    """What `AttentionSharing` says, as it is computed."""

    def __init__(self, units: Sequence[FoldedUnit], encoder: ControlEncoder | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(units)
        self.kwargs_encoder = encoder
        self._units = tuple(units)  # the same, with their type

    @property
    def frames(self) -> int:
        return self._units[0].frames

    @property
    def conditions(self) -> int:
        """How many condition images it reads."""
        return int(self.kwargs_encoder is not None)

    def signals(self, picture: Rgb) -> list[Tensor]:
        """The control signals of the condition image [b, 3, H, W], by level."""
        assert self.kwargs_encoder is not None, "a condition image for a file without control"
        return self.kwargs_encoder(picture)

    def units(self, attention: str) -> dict[tuple[str, int], FoldedUnit]:
        """The units of `attn1` or `attn2`, by block."""
        first = ATTENTIONS.index(attention)
        return dict(zip(BLOCKS, self._units[first :: len(ATTENTIONS)], strict=True))
