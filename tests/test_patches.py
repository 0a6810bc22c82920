"""Patches in a host's lists against swapped modules and a widened convolution."""

import copy

import pytest
import torch
from torch.nn import functional as F

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.injection.patches import (
    ControlSignals,
    SharedLayers,
    Switch,
    add_to_rows,
    attention_patches,
    condition_patch,
    control_patches,
)
from lib_layerdiffuse.nets.attention_sharing import ATTENTIONS, BLOCKS, LEVELS, SharedLayer
from tests.test_attention_sharing import CONTEXT, WIDTH, HostAttention, random_file, random_sharing, reference

NAMES = [(name, block) for name in ATTENTIONS for block in BLOCKS]
FIRST = ("input", 1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def always():
    return Switch(float("inf"), 0.0, turn=lambda on: None)


def never():
    switch = Switch(float("inf"), 1.0, turn=lambda on: None)
    switch.at(0.5)
    return switch


def in_lists(patches, others=()):
    """As a host keeps them: a list for each kind. others: (kind, call) of other extensions, which came before us."""
    lists = {}
    for kind, call in others:
        lists.setdefault(kind, []).append(call)
    for patch in patches:
        fellows = lists.setdefault(patch.kind, [])
        fellows.insert(0 if patch.first else len(fellows), patch.call)
    return copy.deepcopy(lists)  # as a clone of the host's model does


def run_layer(host, lists, name, h, context, block, replace=None):
    """What a host does around an attention layer that has patches. replace: of `patches_replace`."""
    extra = {"block": block}
    for patch in lists["input_block_patch"]:
        patch(h, extra | {"patches_replace": {name: {(*block, 0): replace}} if replace else {}})
    n, context, value = h, context, context
    for patch in lists[f"{name}_patch"]:
        n, context, value = patch(n, context, value, extra)
    if replace:
        n = host.to_out(replace(host.to_q(n), host.to_k(context), host.to_v(value), extra))
    else:
        n = host(n, context, value)
    for patch in lists[f"{name}_output_patch"]:
        n = patch(n, extra)
    return n


def layer(name):
    """A host's layer, hidden states of two pictures of two frames, with and without the prompt, and their context."""
    host = HostAttention(CONTEXT if name == "attn2" else WIDTH)
    h = torch.randn(8, 15, WIDTH)
    return host, h, torch.randn(8, 7, CONTEXT) if name == "attn2" else h


def sharing_lists(host, sharing, switch, picture=None, weight=1.0, others=()):
    patches = attention_patches(SharedLayers(sharing, dict.fromkeys(NAMES, host), weight, lambda: 0), switch)
    control = [] if picture is None else control_patches(ControlSignals(sharing, picture, weight), switch)
    return in_lists([*patches, *control], others)


@pytest.mark.parametrize("weight", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("control", [False, True], ids=["alone", "with control"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_patches_equal_a_swapped_module(name, control, weight):
    host, h, context = layer(name)
    sd, sharing = random_file(2, control), random_sharing(2, control)
    block = ("output", 4)
    picture = torch.rand(1, 3, 8 * 4 * 3, 8 * 4 * 5) if control else None  # 3 x 5 tokens at this block's level
    signal = sharing.signals(picture)[LEVELS[block]][0] if control else None
    index = BLOCKS.index(block) * 2 + ATTENTIONS.index(name)
    expected = reference(sd, index, 2, host, h, context if name == "attn2" else None, weight, signal)
    lists = sharing_lists(host, sharing, always(), picture, weight)
    for _ in range(2):  # nothing is left over from the first call
        torch.testing.assert_close(run_layer(host, lists, name, h, context, block), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frames", [1, 2])
def test_attention_in_tiles(frames):
    """HyperTile: rows of q alone become tiles, over which the host's attention splits the tokens of k and v."""
    tiles = 5

    class TilingHost(HostAttention):
        def forward(self, h, context, value):
            return super().forward(h, *(x.reshape(len(h), -1, x.shape[2]) for x in (context, value)))

    host, h = TilingHost(WIDTH), torch.randn(8, 15, WIDTH)
    sd, sharing = random_file(frames), random_sharing(frames)
    lists = sharing_lists(
        host,
        sharing,
        always(),
        others=[
            ("attn1_patch", lambda q, k, v, extra: (q.reshape(len(q) * tiles, -1, WIDTH), k, v)),
            ("attn1_output_patch", lambda n, extra: n.reshape(len(n) // tiles, -1, WIDTH)),
        ],
    )
    rows = h.reshape(8, tiles, 3, WIDTH)
    index = BLOCKS.index(FIRST) * 2
    expected = [reference(sd, index, frames, host, rows[:, tile], None, 1.0) for tile in range(tiles)]
    made = run_layer(host, lists, "attn1", h, h, FIRST).reshape(rows.shape)
    torch.testing.assert_close(made, torch.stack(expected, dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize(("block", "switch"), [(FIRST, never()), (("input", 3), always())], ids=["off", "elsewhere"])
def test_patches_leave_other_layers_alone(name, block, switch):
    host, h, context = layer(name)
    sharing = random_sharing(2, control=True)
    lists = sharing_lists(host, sharing, switch, torch.rand(1, 3, 24, 40))
    torch.testing.assert_close(run_layer(host, lists, name, h, context, block), host(h, context, context))


def test_every_picture_may_have_a_control_of_its_own():
    host, h, _ = layer("attn1")
    sharing = random_sharing(2, control=True)
    pictures = torch.rand(2, 3, 24, 40)
    both = run_layer(host, sharing_lists(host, sharing, always(), pictures), "attn1", h, h, FIRST)
    for picture in range(2):
        rows = [chunk * 4 + picture * 2 + frame for chunk in range(2) for frame in range(2)]
        lists = sharing_lists(host, sharing, always(), pictures[picture : picture + 1])
        own = h[rows]
        alone = run_layer(host, lists, "attn1", own, own, FIRST)
        torch.testing.assert_close(both[rows], alone, rtol=1e-3, atol=1e-3)  # the values go into thousands


def test_control_and_merged_tokens_go_together():
    """Token merging hands the layer fewer tokens in between: the mean of neighbours, spread out again afterwards."""
    host, h, _ = layer("attn1")
    sharing = random_sharing(2, control=True)
    merging = [
        ("attn1_patch", lambda n, context, value, extra: (n[:, :14].unflatten(1, (7, 2)).mean(2), context, value)),
        ("attn1_output_patch", lambda n, extra: F.pad(n.repeat_interleave(2, dim=1), (0, 0, 0, 1))),
    ]
    picture = torch.rand(1, 3, 24, 40)
    answer = run_layer(host, sharing_lists(host, sharing, always(), picture, others=merging), "attn1", h, h, FIRST)
    assert answer.shape == h.shape
    # The last token was merged away, so that nothing but its control is left of the answer there.
    control = sharing.units("attn1")[FIRST].control(sharing.signals(picture)[0])
    torch.testing.assert_close(answer[:2, -1], control[:, -1])


@pytest.mark.parametrize("frames", [1, 2])
def test_another_extension_s_attention_gets_our_q_k_and_v_of_the_whole_batch(frames):
    """Perturbed attention guidance answers with v, StyleAlign mixes rows of the batch: both within a step only."""
    host, h, _ = layer("attn1")
    sharing = random_sharing(frames)
    own = SharedLayer(sharing.units("attn1")[("middle", 0)], host, 1.0, h)
    lists = sharing_lists(host, sharing, always())
    perturbed = run_layer(host, lists, "attn1", h, h, ("middle", 0), lambda q, k, v, extra: v.flip(0))
    torch.testing.assert_close(perturbed, own(h, h, h, lambda q, k, v: v.flip(0)))
    torch.testing.assert_close(run_layer(host, lists, "attn1", h, h, ("middle", 0)), own(h, h, h))


def test_what_was_made_of_the_host_s_weights_is_made_again_when_they_change():
    """Another extension may have the host merge a LoRA in the middle of sampling."""
    host, h, _ = layer("attn1")
    sharing = random_sharing(2)
    lists = in_lists(
        attention_patches(SharedLayers(sharing, dict.fromkeys(NAMES, host), 1.0, lambda: host.loras), always())
    )
    for host.loras in ("none", "one"):
        host.to_q.weight += 1
        expected = SharedLayer(sharing.units("attn1")[FIRST], host, 1.0, h)(h, h, h)
        torch.testing.assert_close(run_layer(host, lists, "attn1", h, h, FIRST), expected)


def test_a_text_is_read_once_for_as_long_as_it_is_the_same():
    """Hosts hand every step an object of its own."""
    host, h, text = layer("attn2")
    sharing = random_sharing(1)
    lists = sharing_lists(host, sharing, always())
    lengths = []
    host.to_k.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    reads = []
    for latest in (text, text.clone(), text[:2], text.flip(0), text.flip(0)):
        rows = h[: len(latest)]
        expected = SharedLayer(sharing.units("attn2")[FIRST], host, 1.0, h)(rows, latest, latest)
        lengths.clear()
        torch.testing.assert_close(run_layer(host, lists, "attn2", rows, latest, FIRST), expected)
        reads.append(lengths.count(text.shape[1]))  # not that of one token, which the host computes
    assert reads == [1, 0, 1, 1, 0]


@pytest.mark.parametrize("frames", [1, 2])
def test_another_extension_s_attention_may_write_into_what_was_read_of_a_text(frames):
    host, h, text = layer("attn2")
    sharing = random_sharing(frames)
    lists = sharing_lists(host, sharing, always())
    before = run_layer(host, lists, "attn2", h, text, FIRST)
    run_layer(host, lists, "attn2", h, text, FIRST, lambda q, k, v, extra: q + k.zero_().sum() + v.zero_().sum())
    torch.testing.assert_close(run_layer(host, lists, "attn2", h, text, FIRST), before)


def test_nothing_is_made_before_it_is_used_and_nothing_is_left_afterwards():
    host, h, _ = layer("attn1")
    sharing = random_sharing(2)
    layers = SharedLayers(sharing, {("attn1", FIRST): host}, 1.0, lambda: 0)
    run_layer(host, in_lists(attention_patches(layers, never())), "attn1", h, h, FIRST)
    assert not layers.made
    run_layer(host, in_lists(attention_patches(layers, always())), "attn1", h, h, FIRST)
    assert list(layers.made) == [("attn1", FIRST)]
    layers.clear()
    assert not layers.made


def test_host_computes_one_token_only_where_its_answer_is_not_used():
    sharing = random_sharing(1)
    lists = in_lists(attention_patches(SharedLayers(sharing, {}, 1.0, lambda: 0), always()))
    h = torch.randn(2, 5, WIDTH)
    lists["input_block_patch"][0](h, {})
    assert [t.shape[1] for t in lists["attn1_patch"][0](h, h, h, {"block": ("middle", 0)})] == [1, 1, 1]


# --- condition latents ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("pictures", [1, 3])
@pytest.mark.parametrize("size", [(6, 5), (1, 1)], ids=str)
def test_split_first_convolution_equals_the_widened_one(size, pictures, weight):
    base, bias = torch.randn(7, 4, 3, 3), torch.randn(7)
    diff = torch.randn(7, 12, 3, 3)
    latents, noisy = torch.randn(pictures, 8, *size), torch.randn(6, 4, *size)
    widened = F.pad(base, (0, 0, 0, 0, 0, 8)) + weight * diff
    together = torch.cat([noisy, latents.repeat(6 // pictures, 1, 1, 1)], dim=1)
    expected = F.conv2d(together, widened, bias, padding=1)

    patch = condition_patch(diff[:, 4:], latents, weight, always())
    h = F.conv2d(noisy, base + weight * diff[:, :4], bias, padding=1)
    for _ in range(2):
        torch.testing.assert_close(patch.call(h, {"block": ("input", 0)}), expected, rtol=1e-4, atol=1e-4)


def test_condition_is_added_at_the_first_block_and_while_on_only():
    h = torch.randn(2, 7, 4, 4)
    weights, latents = torch.randn(7, 4, 3, 3), torch.randn(1, 4, 4, 4)
    assert condition_patch(weights, latents, 1.0, always()).call(h, {"block": FIRST}) is h
    assert condition_patch(weights, latents, 1.0, never()).call(h, {"block": ("input", 0)}) is h


@pytest.mark.parametrize("shape", [(3, 7, 4, 4), (2, 7, 4, 5)], ids=str)
def test_a_part_of_the_picture_is_refused(shape):
    with pytest.raises(LayerDiffuseError, match="in tiles"):
        add_to_rows(torch.zeros(shape), torch.zeros(2, 7, 4, 4))


# --- start and stop ---------------------------------------------------------------------------------------------


def test_switch_turns_once_for_each_crossing():
    turns = []
    switch = Switch(4.0, 1.0, turn=turns.append, on=False)
    for sigma in (9.0, 5.0, 4.0, 3.0, 1.0, 0.9, 0.5, 0.0, 3.5, 0.1):
        switch.at(sigma)
    assert turns == [True, False, True, False]


def test_switch_without_a_start_is_on_from_the_beginning():
    turns = []
    switch = Switch(float("inf"), 1.0, turn=turns.append)
    for sigma in (14.6, 1.0, 0.9):
        switch.at(sigma)
    assert turns == [False]
