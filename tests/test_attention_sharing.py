"""The attention-sharing unit and its patches against the formulas of the file format, written plainly."""

import pytest
import torch
from torch import nn

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.injection import Switch, attention_patches
from lib_layerdiffuse.nets.attention_sharing import ATTENTIONS, BLOCKS, AttentionSharing

WIDTH, CONTEXT, RANK, HEADS = 8, 12, 4, 2


class HostAttention(nn.Module):
    """A UNet's attention layer as hosts have it, with its own forward."""

    def __init__(self, context: int) -> None:
        super().__init__()
        self.heads = HEADS
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_k = nn.Linear(context, WIDTH, bias=False)
        self.to_v = nn.Linear(context, WIDTH, bias=False)
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0))

    def forward(self, h, context, value):
        return self.to_out(softmax_attention(self.to_q(h), self.to_k(context), self.to_v(value)))


def softmax_attention(q, k, v):
    q, k, v = (t.reshape(*t.shape[:2], HEADS, -1).movedim(2, 1) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
    return (weights @ v).movedim(1, 2).reshape(q.shape[0], q.shape[2], -1)


def random_file(frames: int) -> dict[str, torch.Tensor]:
    """A state dict with the released keys."""
    rng = torch.Generator().manual_seed(frames)
    shapes = {}
    for i in range(len(BLOCKS) * len(ATTENTIONS)):
        unit = f"hookers.layers.{i}"
        n_in = {"to_q": WIDTH, "to_k": (WIDTH, CONTEXT)[i % 2], "to_v": (WIDTH, CONTEXT)[i % 2], "to_out": WIDTH}
        for name, width in n_in.items():
            for f in range(frames):
                shapes[f"{unit}.{name}_lora.{f}.down.weight"] = (RANK, width)
                shapes[f"{unit}.{name}_lora.{f}.up.weight"] = (WIDTH, RANK)
        for letter in "iqkvo":
            shapes |= {f"{unit}.temporal_{letter}.weight": (WIDTH, WIDTH), f"{unit}.temporal_{letter}.bias": (WIDTH,)}
        shapes |= {f"{unit}.temporal_n.weight": (WIDTH,), f"{unit}.temporal_n.bias": (WIDTH,)}
    return {key: torch.randn(shape, generator=rng) * 0.5 for key, shape in shapes.items()}


def reference(sd, index, frames, host, h, context, weight):
    """Steps 1 to 5 of the unit, one frame and one token at a time. context is None for self-attention."""
    unit = f"hookers.layers.{index}."

    def temporal(letter, x):
        return x @ sd[f"{unit}temporal_{letter}.weight"].T + sd[f"{unit}temporal_{letter}.bias"]

    def projection(name, f):
        base = (host.to_out[0] if name == "to_out" else getattr(host, name)).weight
        return base + weight * sd[f"{unit}{name}_lora.{f}.up.weight"] @ sd[f"{unit}{name}_lora.{f}.down.weight"]

    x = h.clone()
    for row in range(len(h)):
        f = row % frames
        source = h[row] if context is None else context[row]
        q, k, v = h[row] @ projection("to_q", f).T, source @ projection("to_k", f).T, source @ projection("to_v", f).T
        out = softmax_attention(q[None], k[None], v[None])[0]
        x[row] += out @ projection("to_out", f).T + host.to_out[0].bias
    y = x.clone()
    for first in range(0, len(h), frames):
        for token in range(h.shape[1]):
            group = x[first : first + frames, token]
            n = nn.functional.layer_norm(
                group, (WIDTH,), sd[f"{unit}temporal_n.weight"], sd[f"{unit}temporal_n.bias"], 1e-6
            )
            n = temporal("i", n)
            shared = softmax_attention(*(temporal(letter, n)[None] for letter in "qkv"))[0]
            y[first : first + frames, token] += weight * temporal("o", shared)
    return y - h


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("weight", [0.0, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("frames", [1, 2, 3])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_unit_equals_formulas(attention, frames, weight):
    sd = random_file(frames)
    is_text = attention == "attn2"
    index = 7 * len(ATTENTIONS) + is_text
    host = HostAttention(CONTEXT if is_text else WIDTH)
    h = torch.randn(2 * frames, 5, WIDTH)
    context = torch.randn(2 * frames, 7, CONTEXT) if is_text else None
    source = h if context is None else context
    unit = AttentionSharing.from_state_dict(sd).units(attention)[BLOCKS[7]]
    expected = reference(sd, index, frames, host, h, context, weight)
    torch.testing.assert_close(unit(h, source, source, host, weight), expected, rtol=1e-4, atol=1e-5)


def test_weight_0_is_the_host_s_own_attention():
    host = HostAttention(WIDTH)
    h = torch.randn(2, 5, WIDTH)
    unit = AttentionSharing.from_state_dict(random_file(1)).units("attn1")[BLOCKS[0]]
    torch.testing.assert_close(unit(h, h, h, host, 0.0), host(h, h, h))


NAMES = [(name, block) for name in ATTENTIONS for block in BLOCKS]


def run_layer(host, patches, name, h, context, block, replace=None):
    """What a host does around an attention layer that has patches. replace: of `patches_replace`."""
    extra = {"block": block}
    patches["input_block_patch"](h, extra | {"patches_replace": {name: {(*block, 0): replace}} if replace else {}})
    n, context, value = patches[f"{name}_patch"](h, context, context, extra)
    if replace:
        n = host.to_out(replace(host.to_q(n), host.to_k(context), host.to_v(value), extra))
    else:
        n = host(n, context, value)
    return patches[f"{name}_output_patch"](n, extra)


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize(
    ("block", "on", "patched"),
    [(("input", 1), True, True), (("input", 1), False, False), (("input", 3), True, False)],
    ids=["there", "past Stop At", "elsewhere"],
)
def test_patches_replace_the_layer_where_they_belong(name, block, on, patched):
    host = HostAttention(CONTEXT if name == "attn2" else WIDTH)
    sharing = AttentionSharing.from_state_dict(random_file(1))
    switch = Switch(sigma_end=1.0, turn=lambda on: None)
    switch.at(2.0 if on else 0.5)
    patches = attention_patches(sharing, dict.fromkeys(NAMES, host), 1.0, switch)
    h = torch.randn(2, 5, WIDTH)
    context = torch.randn(2, 7, CONTEXT) if name == "attn2" else h
    unit = sharing.units(name)[BLOCKS[0]]
    expected = unit(h, context, context, host, 1.0) if patched else host(h, context, context)
    for _ in range(2):  # nothing is left over from the first call
        torch.testing.assert_close(run_layer(host, patches, name, h, context, block), expected)


def test_another_extension_s_attention_gets_our_q_k_and_v():
    """Perturbed attention guidance answers with v, within a step only."""
    host = HostAttention(WIDTH)
    sharing = AttentionSharing.from_state_dict(random_file(1))
    patches = attention_patches(sharing, dict.fromkeys(NAMES, host), 1.0, Switch(0.0, lambda on: None))
    h = torch.randn(2, 5, WIDTH)
    unit = sharing.units("attn1")[("middle", 0)]
    perturbed = run_layer(host, patches, "attn1", h, h, ("middle", 0), lambda q, k, v, extra: v)
    torch.testing.assert_close(perturbed, unit(h, h, h, host, 1.0, lambda q, k, v: v))
    torch.testing.assert_close(run_layer(host, patches, "attn1", h, h, ("middle", 0)), unit(h, h, h, host, 1.0))


def test_host_computes_one_token_only_where_its_answer_is_not_used():
    sharing = AttentionSharing.from_state_dict(random_file(1))
    patches = attention_patches(sharing, {}, 1.0, Switch(0.0, lambda on: None))
    h = torch.randn(2, 5, WIDTH)
    patches["input_block_patch"](h, {})
    assert [t.shape[1] for t in patches["attn1_patch"](h, h, h, {"block": ("middle", 0)})] == [1, 1, 1]


def test_switch_turns_once_for_each_crossing():
    turns = []
    switch = Switch(sigma_end=1.0, turn=turns.append)
    for sigma in (5.0, 3.0, 1.0, 0.9, 0.5, 0.0, 4.0, 0.1):
        switch.at(sigma)
    assert turns == [False, True, False]


@pytest.mark.parametrize(
    "break_file",
    [lambda sd: {"conv_in.weight": sd.popitem()[1]}, lambda sd: dict(list(sd.items())[:-1]), lambda sd: {}],
)
def test_other_files_are_refused(break_file):
    with pytest.raises(LayerDiffuseError, match=r"hookers\.layers"):
        AttentionSharing.from_state_dict(break_file(random_file(1)))
