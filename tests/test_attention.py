"""Narrow attention against torch's own."""

import pytest
import torch
from torch.nn import functional as F

from lib_layerdiffuse.nets import attention
from lib_layerdiffuse.nets.attention import narrow_attention
from lib_layerdiffuse.nets.scratch import Blocks, Scratch


def random_qkv(batch=2, heads=6, tokens=40, dim=8):
    return torch.randn(3, batch, heads, tokens, dim).unbind()


@pytest.mark.parametrize("queries", [1, 24, 40])
@pytest.mark.parametrize("keys", [1, 16, 40])
def test_the_numbers_of_torchs_own(queries, keys, monkeypatch):
    """However many of each are taken at once."""
    monkeypatch.setattr(attention, "KEYS", keys)
    monkeypatch.setattr(attention, "SCORES", attention.HEADS * keys * queries)
    monkeypatch.setattr(attention, "LINE", 1)
    q, k, v = random_qkv()
    expected = F.scaled_dot_product_attention(q, k, v)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)  # not by falling back
    torch.testing.assert_close(narrow_attention(q, k, v, Scratch(Blocks())), expected, rtol=0, atol=2e-6)


def test_what_all_keys_share_is_no_reason_to_fall_back(monkeypatch):
    q, k, v = random_qkv()
    expected = F.scaled_dot_product_attention(q.double(), k.double() + 1000, v.double()).float()
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    torch.testing.assert_close(narrow_attention(q, k + 1000, v, Scratch(Blocks())), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("strength", [300.0, 1e6])
def test_scores_beyond_float32_are_torchs_own(strength):
    q, k, v = random_qkv()
    answer = narrow_attention(strength * q, k, v, Scratch(Blocks()))
    exact = F.scaled_dot_product_attention(strength * q.double(), k.double(), v.double()).float()
    assert answer.isfinite().all()
    torch.testing.assert_close(answer, exact, rtol=0, atol=0.1 if strength > 1000 else 1e-3)


def test_what_is_no_number_stays_so():
    q, k, v = random_qkv()
    q[0, 0, 0, 0] = torch.nan
    assert narrow_attention(q, k, v, Scratch(Blocks()))[0, 0, 0].isnan().all()
