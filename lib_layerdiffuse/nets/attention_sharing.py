"""SD1.5 attention sharing: low-rank additions to every attention layer, and attention between the layers of a picture.

The UNet's own projections stay where they are and are called through the host's modules, so user LoRAs, quantised
weights and low-VRAM casting keep working; this file only adds to what they answer.
Format: the released `layer_sd15_*.safetensors`; method: arXiv 2402.17113, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.nets.loading import children
from lib_layerdiffuse.tensors import StateDict, Tokens

# The transformer blocks of the SD1.5 UNet in the order of the file; each has `attn1` (self), then `attn2` (text).
BLOCKS: tuple[tuple[str, int], ...] = (
    *(("input", i) for i in (1, 2, 4, 5, 7, 8)),
    *(("output", i) for i in range(3, 12)),
    ("middle", 0),
)
ATTENTIONS = ("attn1", "attn2")
NORM_EPS = 1e-6  # not recoverable from the file

Attention: TypeAlias = Callable[[Tokens, Tokens, Tokens], Tokens]


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """`layer(x)`, wherever and in whatever precision the layer is kept."""
    return F.linear(x, layer.weight.to(x), None if layer.bias is None else layer.bias.to(x))


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
    scale = q.shape[-1] ** -0.5
    scores = (q.unsqueeze(2) * k.unsqueeze(1)).sum(-1, keepdim=True) * scale  # -> [B, F, F, N, heads, 1]
    return (scores.softmax(dim=2) * v.unsqueeze(1)).sum(dim=2).flatten(-2)


class LowRank(nn.Module):
    """up · down, without a scale of its own."""

    def __init__(self, n_in: int, n_out: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(n_in, rank, bias=False)
        self.up = nn.Linear(rank, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(linear(x, self.down), self.up)


class AttentionSharingUnit(nn.Module):
    """What is added to one attention layer of the UNet. `width` channels inside, `context` channels for k and v."""

    def __init__(self, width: int, context: int, rank: int, frames: int) -> None:
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

    def forward(
        self, h: Tokens, context: Tokens, value: Tokens, host: Any, weight: float, mix: Attention | None = None
    ) -> Tokens:
        """The layer's answer for `h`, in place of the UNet's own.

        h: [(b f), N, C], frames adjacent; context, value: what k and v are computed from, [(b f), M, K].
        host: the UNet's attention module (`to_q`, `to_k`, `to_v`, `to_out`, `heads`).
        weight: scales every added map; 0 gives the UNet's own answer.
        mix: what another extension put in the place of the attention of q, k and v, [b, N or M, C].
        """
        frames = len(self.to_q_lora)
        h, context, value = (t.unflatten(0, (-1, frames)) for t in (h, context, value))  # -> [b, f, N, C]
        mix = mix or partial(attend, heads=host.heads)
        answers = [self._attend(f, h[:, f], context[:, f], value[:, f], host, weight, mix) for f in range(frames)]
        answer = torch.stack(answers, dim=1)
        return (answer + weight * self._share(h + answer, host.heads)).flatten(0, 1)

    def _attend(
        self, f: int, h: Tokens, context: Tokens, value: Tokens, host: Any, weight: float, mix: Attention
    ) -> Tokens:
        q = host.to_q(h) + weight * self.to_q_lora[f](h)
        k = host.to_k(context) + weight * self.to_k_lora[f](context)
        v = host.to_v(value) + weight * self.to_v_lora[f](value)
        out = mix(q, k, v)
        return host.to_out(out) + weight * self.to_out_lora[f](out)

    def _share(self, x: Tensor, heads: int) -> Tensor:
        """Attention between the frames, [b, f, N, C] -> the same."""
        norm = self.temporal_n
        y = F.layer_norm(x, norm.normalized_shape, norm.weight.to(x), norm.bias.to(x), norm.eps)
        y = linear(y, self.temporal_i)
        q, k, v = (linear(y, layer) for layer in (self.temporal_q, self.temporal_k, self.temporal_v))
        return linear(attend_frames(q, k, v, heads), self.temporal_o)


class Hookers(nn.Module):
    """A level of the file's keys."""

    def __init__(self, units: Sequence[AttentionSharingUnit]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(units)


class AttentionSharing(nn.Module):
    """All units of a file, `hookers.layers.<i>`, in the order BLOCKS × ATTENTIONS."""

    def __init__(self, units: Sequence[AttentionSharingUnit]) -> None:
        super().__init__()
        self.hookers = Hookers(units)
        self._units = tuple(units)  # the same, with their type

    @classmethod
    def from_state_dict(cls, sd: StateDict) -> AttentionSharing:
        """Read frames, rank and widths from the tensors. Raises LayerDiffuseError where they are not such a file."""
        try:
            with torch.device("meta"):
                model = cls([_unit_like(sd, i) for i in range(len(BLOCKS) * len(ATTENTIONS))])
            model.load_state_dict(sd, strict=True, assign=True)
        except (KeyError, RuntimeError) as error:
            raise LayerDiffuseError(
                f"expected SD1.5 attention layers `hookers.layers.0` to `.31`, found {len(sd)} tensors such as "
                f"`{next(iter(sd), 'none')}`"
            ) from error
        return model.requires_grad_(False)

    @property
    def frames(self) -> int:
        return len(self._units[0].to_q_lora)

    def units(self, attention: str) -> dict[tuple[str, int], AttentionSharingUnit]:
        """The units of `attn1` or `attn2`, by block."""
        first = ATTENTIONS.index(attention)
        return dict(zip(BLOCKS, self._units[first :: len(ATTENTIONS)], strict=True))


def _unit_like(sd: StateDict, index: int) -> AttentionSharingUnit:
    prefix = f"hookers.layers.{index}."
    rank, width = sd[prefix + "to_q_lora.0.down.weight"].shape
    context = sd[prefix + "to_k_lora.0.down.weight"].shape[1]
    return AttentionSharingUnit(width, context, rank, frames=children(sd, prefix + "to_q_lora."))
