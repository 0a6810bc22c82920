"""Attention of very narrow heads on a processor."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lib_layerdiffuse.nets.scratch import Scratch

HEADS, KEYS = 4, 4096  # at once, at most
SCORES = 2**21  # at once: 8 MiB, which a processor's last cache holds
LINE = 16  # numbers of a cache line; rows of scores that do not end with one take a quarter more time
SAFE = 100.0  # 2^±100, and sums of many of them, are float32 numbers


def as_powers_of_two(q: Tensor, k: Tensor, dim: int) -> tuple[Tensor, Tensor, bool]:
    """q and k, tokens in axis 2 and their numbers in `dim`, so that a weight is 2^(q · k); whether all are SAFE."""
    k = k - k.mean(2, keepdim=True)  # moves all scores of a query alike, which changes nothing
    q = q * (math.log2(math.e) / math.sqrt(q.shape[dim]))
    highest = (q.square().sum(dim).amax() * k.square().sum(dim).amax()).sqrt()  # Cauchy, Schwarz
    return q, k, bool(highest <= SAFE)


def narrow_attention(q: Tensor, k: Tensor, v: Tensor, scratch: Scratch) -> Tensor:
    """`scaled_dot_product_attention` of [B, heads, tokens, dim], float32.

    With 8 numbers to a head, products are too thin to be fast unless keys come first: keys × queries takes 0.24 s for
    32 heads of 4096 tokens where torch's own takes 0.49 s. The weights are 2^score without the usual search for each
    query's highest; where scores might be beyond float32's exponents, torch's own answers.
    """
    q, k, safe = as_powers_of_two(q, k, dim=3)
    if not safe:
        return F.scaled_dot_product_attention(q, k, v, scale=math.log(2))
    q, v = (x.flatten(0, 1).transpose(1, 2).contiguous() for x in (q, v))  # -> [B·heads, dim, tokens]
    v = F.pad(v, (0, 0, 0, 1), value=1)  # its last row sums the weights
    mixed = torch.empty_like(q)
    queries = SCORES // (HEADS * min(KEYS, q.shape[2])) // LINE * LINE
    for queries_of, keys_of, values_of, answers in zip(*(x.split(HEADS) for x in (q, k.flatten(0, 1), v, mixed))):
        for some, answer in zip(queries_of.split(queries, 2), answers.split(queries, 2)):
            sums = scratch("sums", *values_of.shape[:2], some.shape[2]).zero_()
            for keys, values in zip(keys_of.split(KEYS, 1), values_of.split(KEYS, 2)):
                weights = torch.bmm(keys, some, out=scratch("scores", *keys.shape[:2], some.shape[2])).exp2_()
                sums.baddbmm_(values, weights)
            torch.div(sums[:, :-1], sums[:, -1:], out=answer)
    return mixed.transpose(1, 2).view_as(k)


def compiled_attention(q: Tensor, k: Tensor, v: Tensor, mixed: Tensor, attend: Callable[..., None]) -> None:
    """The same of [heads, 8, tokens], into `mixed`, by the compiled kernel."""
    q, k, safe = as_powers_of_two(q, k, dim=1)
    if safe:
        attend(*(x.numpy() for x in (q, k, v, mixed)))
    else:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mixed.copy_(F.scaled_dot_product_attention(q, k, v, scale=math.log(2)).transpose(1, 2))
