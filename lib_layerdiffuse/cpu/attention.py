"""Attention of heads that are eight numbers wide."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

SAFE = 100.0  # 2^±100, and sums of many of them, are float32 numbers

log = logging.getLogger("layerdiffuse")

Kernel: TypeAlias = Callable[..., None]


@cache
def kernel() -> Kernel | None:
    """The compiled one, where numba is installed and goes with the rest; asked for once in a process."""
    log.info("loading what numba compiles for decoding on the processor; the first time it takes about 10 s")
    try:
        from lib_layerdiffuse.cpu.kernels import compiled

        attend, kept = compiled()
    except Exception as error:  # the host's numba may fail in many ways, and nothing depends on it
        log.info("decoding without compiled attention, which takes longer: %s: %s", type(error).__name__, error)
        return None
    if not kept:
        log.info("numba found no folder to keep it in; NUMBA_CACHE_DIR may name one")
    return attend


def mix(q: Tensor, k: Tensor, v: Tensor, attend: Kernel | None) -> Tensor:
    """`scaled_dot_product_attention` of [heads, 8, tokens], float32.

    attend: what computes it with weights 2^(query · key), without the usual search for each query's highest score;
    where scores might be beyond float32's exponents, torch's own answers.
    """
    if attend:
        around = k - k.mean(2, keepdim=True)  # moves all scores of a query alike, which changes nothing
        powers = q * (math.log2(math.e) / math.sqrt(q.shape[1]))
        highest = (powers.square().sum(1).amax() * around.square().sum(1).amax()).sqrt()  # Cauchy, Schwarz
        if highest <= SAFE:
            answer = torch.empty_like(q)
            attend(*(x.numpy() for x in (powers, around, v, answer)))
            return answer
    q, k, v = (x.transpose(1, 2)[None].contiguous() for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(1, 2)
