"""The attention-sharing unit against the formulas of the file format, written plainly."""

from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.nets.attention_sharing import (
    ATTENTIONS,
    BLOCKS,
    LEVELS,
    AttentionSharing,
    FoldedSharing,
    SharedLayer,
    affine_of,
    attend_frames,
)

WIDTH, CONTEXT, RANK, HEADS, SIGNAL = 8, 12, 4, 2, 6
# Of the control encoder's first stage; the other three have two convolutions of the signal's width.
STAGE_WIDTHS = (3, 4, 4, 5, 5, 4, 4, SIGNAL, SIGNAL)


class HostAttention(nn.Module):
    """A UNet's attention layer as hosts have it, with its own forward."""

    def __init__(self, context: int) -> None:
        super().__init__()
        self.heads = HEADS
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_k = nn.Linear(context, WIDTH, bias=False)
        self.to_v = nn.Linear(context, WIDTH, bias=False)
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0))
        self.requires_grad_(False)

    def forward(self, h, context, value):
        return self.to_out(softmax_attention(self.to_q(h), self.to_k(context), self.to_v(value)))


def softmax_attention(q, k, v):
    q, k, v = (t.reshape(*t.shape[:2], HEADS, -1).movedim(2, 1) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
    return (weights @ v).movedim(1, 2).reshape(q.shape[0], q.shape[2], -1)


def convolution(name: str, n_in: int, n_out: int, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (n_out, n_in, size, size), f"{name}.bias": (n_out,)}


@cache
def random_file(frames: int, control: bool = False, rank: int = RANK) -> dict[str, torch.Tensor]:
    """A state dict with the released keys."""
    rng = torch.Generator().manual_seed(frames)
    shapes = {}
    for i in range(len(BLOCKS) * len(ATTENTIONS)):
        unit = f"hookers.layers.{i}"
        n_in = {"to_q": WIDTH, "to_k": (WIDTH, CONTEXT)[i % 2], "to_v": (WIDTH, CONTEXT)[i % 2], "to_out": WIDTH}
        for name, width in n_in.items():
            for f in range(frames):
                shapes[f"{unit}.{name}_lora.{f}.down.weight"] = (rank, width)
                shapes[f"{unit}.{name}_lora.{f}.up.weight"] = (WIDTH, rank)
        for letter in "iqkvo":
            shapes |= {f"{unit}.temporal_{letter}.weight": (WIDTH, WIDTH), f"{unit}.temporal_{letter}.bias": (WIDTH,)}
        shapes |= {f"{unit}.temporal_n.weight": (WIDTH,), f"{unit}.temporal_n.bias": (WIDTH,)}
        for f in range(frames if control else 0):
            shapes |= convolution(f"{unit}.control_convs.{f}.0", SIGNAL, SIGNAL, 3)
            shapes |= convolution(f"{unit}.control_convs.{f}.2", SIGNAL, WIDTH, 1)
    for stage in range(4 if control else 0):
        widths = (SIGNAL,) * 3 if stage else STAGE_WIDTHS
        for i, (n_in, n_out) in enumerate(pairwise(widths)):
            shapes |= convolution(f"kwargs_encoder.blocks_{stage}.{2 * i}", n_in, n_out, 3)
    return {key: torch.randn(shape, generator=rng) * 0.5 for key, shape in shapes.items()}


@cache
def random_sharing(frames: int, control: bool = False, rank: int = RANK) -> FoldedSharing:
    """What it becomes; not to be changed."""
    return AttentionSharing.from_state_dict(random_file(frames, control, rank)).folded()


def reference(sd, index, frames, host, h, context, weight, signal=None):
    """Steps 1 to 5 of the unit, one frame and one token at a time. context is None for self-attention.

    signal: the control signal [SIGNAL, height, width] of the layer's level.
    """
    unit = f"hookers.layers.{index}."

    def temporal(letter, x):
        return x @ sd[f"{unit}temporal_{letter}.weight"].T + sd[f"{unit}temporal_{letter}.bias"]

    def projection(name, f):
        base = (host.to_out[0] if name == "to_out" else getattr(host, name)).weight
        return base + weight * sd[f"{unit}{name}_lora.{f}.up.weight"] @ sd[f"{unit}{name}_lora.{f}.down.weight"]

    x = h.clone()
    for row in range(len(h) if signal is not None else 0):
        convs = f"{unit}control_convs.{row % frames}."
        control = F.conv2d(signal[None], sd[convs + "0.weight"], sd[convs + "0.bias"], padding=1)
        control = F.conv2d(F.silu(control), sd[convs + "2.weight"], sd[convs + "2.bias"])
        x[row] += weight * control[0].reshape(WIDTH, -1).T
    for row in range(len(h)):
        f = row % frames
        source = x[row] if context is None else context[row]
        q, k, v = x[row] @ projection("to_q", f).T, source @ projection("to_k", f).T, source @ projection("to_v", f).T
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
@pytest.mark.parametrize("rank", [RANK, 1], ids=["merged", "beside"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_unit_equals_formulas(attention, rank, frames, weight):
    sd = random_file(frames, rank=rank)
    is_text = attention == "attn2"
    index = 7 * len(ATTENTIONS) + is_text
    host = HostAttention(CONTEXT if is_text else WIDTH)
    h = torch.randn(2 * frames, 5, WIDTH)
    context = torch.randn(2 * frames, 7, CONTEXT) if is_text else None
    source = h if context is None else context
    layer = SharedLayer(random_sharing(frames, rank=rank).units(attention)[BLOCKS[7]], host, weight, h)
    expected = reference(sd, index, frames, host, h, context, weight)
    torch.testing.assert_close(layer(h, source, source), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)], ids=str)
@pytest.mark.parametrize("rank", [RANK, 1], ids=["merged", "beside"])
@pytest.mark.parametrize("frames", [1, 3])
def test_half_precision_stays_near_the_formulas(frames, rank, dtype, tolerance):
    """Relative to the largest value: a few roundings of the result in that precision (2^-11, 2^-8)."""
    sd = {key: tensor.to(dtype).float() for key, tensor in random_file(frames, rank=rank).items()}
    host, h = HostAttention(WIDTH).to(dtype), torch.randn(2 * frames, 5, WIDTH, dtype=dtype)
    unit = AttentionSharing.from_state_dict(sd).folded().to(dtype).units("attn1")[BLOCKS[7]]
    expected = reference(sd, 7 * len(ATTENTIONS), frames, host.float(), h.float(), None, 1.0)
    answer = SharedLayer(unit, host.to(dtype), 1.0, h)(h, h, h)
    assert answer.dtype is dtype
    assert (answer.float() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_projection_is_known_by_its_answers(dtype):
    """Its matrix bit by bit, whatever keeps it; with a bias far larger than the weights, to the precision they have."""
    matrix, bias = (torch.randn(n, dtype=dtype) * 0.01 for n in ((6, 9), (6,)))
    found, none = affine_of(lambda x: F.linear(x, matrix), 9, torch.empty(0, dtype=dtype))
    assert torch.equal(found.mT, matrix) and not none.any()
    found, found_bias = affine_of(lambda x: F.linear(x, matrix, 100 * bias), 9, torch.empty(0, dtype=dtype))
    assert torch.equal(found_bias, 100 * bias)
    torch.testing.assert_close(found.mT, matrix, rtol=0, atol=0.02 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_the_file_s_tensors_are_held_and_folded_into_fewer(frames):
    sd = random_file(frames, control=frames == 2)
    sharing = AttentionSharing.from_state_dict(sd)
    held = sharing.state_dict()
    assert held.keys() == sd.keys() and all(held[key].data_ptr() == sd[key].data_ptr() for key in sd)
    folded = sharing.folded().state_dict()
    assert sum(map(torch.numel, folded.values())) < sum(map(torch.numel, sd.values()))


def test_hosts_short_of_memory_find_every_parameter():
    """What they move to the device are the modules that have a `weight`, with all that these have."""
    sharing = random_sharing(2, control=True)
    assert all(hasattr(module, "weight") for module in sharing.modules() if list(module.parameters(recurse=False)))


def test_weight_0_is_the_host_s_own_attention():
    host = HostAttention(WIDTH)
    h = torch.randn(2, 5, WIDTH)
    unit = random_sharing(1).units("attn1")[BLOCKS[0]]
    torch.testing.assert_close(SharedLayer(unit, host, 0.0, h)(h, h, h), host(h, h, h))


@pytest.mark.parametrize("size", [(64, 64), (72, 40), (8, 8)], ids=str)
def test_control_signals_come_in_the_sizes_of_the_unet_s_levels(size):
    """Each level halves the latent with a stride, which rounds up: 9 x 5 cells, then 5 x 3, 3 x 2, 2 x 1."""
    sharing = random_sharing(2, control=True)
    height, width = size
    signals = sharing.signals(torch.rand(1, 3, height, width))
    sizes = [(-(-height // 8 // 2**level), -(-width // 8 // 2**level)) for level in range(4)]
    assert [tuple(signal.shape) for signal in signals] == [(1, SIGNAL, *cells) for cells in sizes]


def test_control_encoder_equals_its_convolutions():
    sd = random_file(2, control=True)
    picture = torch.rand(1, 3, 32, 24)
    x = 2 * picture - 1
    expected = []
    for stage, strides in enumerate([(1, 1, 2, 1, 2, 1, 2, 1), (2, 1), (2, 1), (2, 1)]):
        for i, stride in enumerate(strides):
            conv = f"kwargs_encoder.blocks_{stage}.{2 * i}"
            x = F.silu(F.conv2d(x, sd[conv + ".weight"], sd[conv + ".bias"], stride=stride, padding=1))
        expected.append(x)
    for ours, theirs in zip(random_sharing(2, control=True).signals(picture), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_levels_are_those_of_the_unet():
    """SD1.5 halves after input blocks 2, 5 and 8, and doubles again after output blocks 2, 5 and 8."""
    expected = {("input", i): (i - 1) // 3 for i in (1, 2, 4, 5, 7, 8)}
    expected |= {("output", i): 3 - i // 3 for i in range(3, 12)} | {("middle", 0): 3}
    assert expected == LEVELS


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_what_the_file_has(frames):
    for control in (False, True):
        sharing = random_sharing(frames, control)
        assert (sharing.frames, sharing.conditions) == (frames, int(control))


def test_frames_attend_to_each_other_at_sizes_beyond_a_grid_of_65535():
    """CUDA refuses one block for each token; here, that many tokens at least go through."""
    tokens = 2**16 + 3
    q, k, v = torch.randn(3, 2, 1, tokens, 2)
    out = attend_frames(q, k, v, heads=1)
    token = tokens - 1
    expected = softmax_attention_of(q[:, 0, token], k[:, 0, token], v[:, 0, token])
    torch.testing.assert_close(out[:, 0, token], expected)


def softmax_attention_of(q, k, v):
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1) @ v


@pytest.mark.parametrize(
    "break_file",
    [
        lambda sd: {"conv_in.weight": sd["kwargs_encoder.blocks_0.0.weight"]},
        lambda sd: {},
        lambda sd: {key: value for key, value in sd.items() if key != "hookers.layers.3.temporal_q.bias"},
        lambda sd: {key: value for key, value in sd.items() if key != "hookers.layers.3.control_convs.1.2.bias"},
        lambda sd: {key: value for key, value in sd.items() if not key.startswith("hookers.layers.31")},
        lambda sd: sd | {"hookers.layers.3.temporal_q.bias": torch.zeros(1)},
        lambda sd: sd | {"hookers.layers.32.temporal_q.bias": torch.zeros(1)},
    ],
    ids=["another file", "empty", "no bias", "no control bias", "no last unit", "wrong shape", "one more"],
)
def test_other_files_are_refused(break_file):
    with pytest.raises(LayerDiffuseError, match=r"hookers\.layers"):
        AttentionSharing.from_state_dict(break_file(random_file(2, control=True)))
