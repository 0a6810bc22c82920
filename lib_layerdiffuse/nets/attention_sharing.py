"""SD1.5 attention sharing: low-rank additions to every attention layer, and attention between the layers of a picture.

The UNet's own projections stay where they are and are called through the host's modules, so user LoRAs, quantised
weights and low-VRAM casting keep working; this file only adds to what they answer.
Format: the released `layer_sd15_*.safetensors`; method: arXiv 2402.17113, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
NORM_EPS = 1e-6  # not recoverable from the file
# Of the control encoder's convolutions, by level; not recoverable from the file.
STRIDES = ((1, 1, 2, 1, 2, 1, 2, 1), (2, 1), (2, 1), (2, 1))

Attention: TypeAlias = Callable[[Tokens, Tokens, Tokens], Tokens]


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """`layer(x)`, wherever and in whatever precision the layer is kept."""
    return F.linear(x, layer.weight.to(x), None if layer.bias is None else layer.bias.to(x))


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
    """Attention between the frames at each token, [B, F, N, C] each.

    One frame has nothing to choose from, so its answer is `v`. For more, frames are few (2 or 3) and tokens many: sums
    over products keep clear of the CUDA grid limit that one tiny attention for each token would hit (65,535).
    """
    if q.shape[1] == 1:
        return v
    q, k, v = (t.unflatten(-1, (heads, -1)) for t in (q, k, v))  # -> [B, F, N, heads, C/heads]
    answers = []
    for own in q.unbind(dim=1):  # one after the other, as the products take F times the memory of the answer
        scores = (own.unsqueeze(1) * k).sum(-1, keepdim=True) * q.shape[-1] ** -0.5  # -> [B, F, N, heads, 1]
        answers.append((scores.softmax(dim=1) * v).sum(dim=1))
    return torch.stack(answers, dim=1).flatten(-2)


class LowRank(nn.Module):
    """up · down, without a scale of its own."""

    def __init__(self, n_in: int, n_out: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(n_in, rank, bias=False)
        self.up = nn.Linear(rank, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(linear(x, self.down), self.up)


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

    def control(self, signal: Tensor) -> Tokens:
        """What a control signal [b, S, h, w] adds to the layer's hidden states: [(b f), h·w, C]."""
        frames = [convolve(signal, layers) for layers in self.control_convs]  # type: ignore[arg-type]
        return torch.stack(frames, dim=1).flatten(3).transpose(2, 3).flatten(0, 1)  # [b, f, C, h, w] -> [(b f), N, C]

    def forward(
        self, h: Tokens, context: Tokens, value: Tokens, host: Any, weight: float, mix: Attention | None = None
    ) -> Tokens:
        """The layer's answer for `h`, in place of the UNet's own.

        h: [(b f), N, C], frames adjacent, control already added; context, value: what k and v are computed from,
        [(b f), M, K].
        host: the UNet's attention module (`to_q`, `to_k`, `to_v`, `to_out`, `heads`).
        weight: scales every added map; 0 gives the UNet's own answer.
        mix: what another extension put in the place of the attention of q, k and v, [(b f), N or M, C].
        """

        def project(base: Callable[[Tokens], Tokens], low_ranks: nn.ModuleList, x: Tokens) -> Tokens:
            by_frame = x.unflatten(0, (-1, len(low_ranks)))  # -> [b, f, N, C]
            added = [low_rank(by_frame[:, f]) for f, low_rank in enumerate(low_ranks)]
            return base(x) + weight * torch.stack(added, dim=1).flatten(0, 1)

        q = project(host.to_q, self.to_q_lora, h)
        k = project(host.to_k, self.to_k_lora, context)
        v = project(host.to_v, self.to_v_lora, value)
        out = (mix or partial(attend, heads=host.heads))(q, k, v)
        answer = project(host.to_out, self.to_out_lora, out)
        by_frame = (h + answer).unflatten(0, (-1, len(self.to_q_lora)))
        return answer + weight * self._share(by_frame, host.heads).flatten(0, 1)

    def _share(self, x: Tensor, heads: int) -> Tensor:
        """Attention between the frames, [b, f, N, C] -> the same."""
        norm = self.temporal_n
        y = F.layer_norm(x, norm.normalized_shape, norm.weight.to(x), norm.bias.to(x), norm.eps)
        y = linear(y, self.temporal_i)
        q, k, v = (linear(y, layer) for layer in (self.temporal_q, self.temporal_k, self.temporal_v))
        return linear(attend_frames(q, k, v, heads), self.temporal_o)


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

    @property
    def frames(self) -> int:
        return len(self._units[0].to_q_lora)

    @property
    def conditions(self) -> int:
        """How many condition images it reads."""
        return int(self.kwargs_encoder is not None)

    def signals(self, picture: Rgb) -> list[Tensor]:
        """The control signals of the condition image [b, 3, H, W], by level."""
        assert self.kwargs_encoder is not None, "a condition image for a file without control"
        return self.kwargs_encoder(picture)

    def units(self, attention: str) -> dict[tuple[str, int], AttentionSharingUnit]:
        """The units of `attn1` or `attn2`, by block."""
        first = ATTENTIONS.index(attention)
        return dict(zip(BLOCKS, self._units[first :: len(ATTENTIONS)], strict=True))


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
