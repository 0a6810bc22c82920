"""The tiny world's pictures: whether they really are transparent, and what they should be.

`python tasks.py test` looks at one picture of each material, `python tasks.py test-full` at more.
"""

from collections import defaultdict
from functools import cache
from statistics import fmean

import pytest
import torch
from PIL import Image

from lib_layerdiffuse.__main__ import main
from lib_layerdiffuse.cli.metrics import psnr
from lib_layerdiffuse.cli.models import WORLD_CFG
from lib_layerdiffuse.engine.runner import Task
from lib_layerdiffuse.images.rgba import from_pil, over
from lib_layerdiffuse.methods import Layer, find_method
from lib_layerdiffuse.request.layers import Request
from tests.training.world import HELD_OUT, SEED, SIZE, rgba_of, runner_of
from training.scenes import COLOURS, layers, to_image

STEPS = 15  # with a single pass of the decoder: little is lost, and much time saved
FEW, MANY, ALL = range(6), range(16), range(64)  # each six of them have all materials
SEEN = 0.15  # the share of colour from which a pixel belongs to a shape: glass may have as little as 0.2
ALONE = ("sd15_transparent_attn", "xl_transparent_attn", "xl_transparent_conv")


@cache
def generated(key, prompt, seed, **more):
    """What belongs together of one picture. more: of the request, where it can be compared."""
    request = Request.parse([{"method": key, "passes": 1, **more}])
    task = Task(prompt, seed=seed, width=SIZE, height=SIZE, steps=STEPS, cfg=WORLD_CFG)
    [together] = runner_of(find_method(key).family).run(request, task)
    return together


def foreground(key, index, **more):
    [made] = generated(key, HELD_OUT[index].caption, index, **more)
    return made


def alpha_of(made):
    return from_pil(made.image)[3]


def coverage(image, colour):
    """How much of a colour lies over grey in each pixel, as seen: 0 is grey, 1 the colour."""
    way = torch.tensor(COLOURS[colour]).view(3, 1, 1) - 0.5
    return (((from_pil(image.convert("RGB")) - 0.5) * way).sum(0) / way.square().sum()).clamp(0, 1)


def agreement(alpha, covered):
    """Intersection over union of where there is something."""
    a, b = alpha > SEEN, covered > SEEN
    return ((a & b).sum() / (a | b).sum().clamp(min=1)).item()


def background_alphas(pairs):
    """The means of what is not part of the shape or within a few pixels of it, where a glow leaves anything."""
    for alpha, covered in pairs:
        near = torch.nn.functional.max_pool2d((covered > SEEN / 3).float()[None], 9, 1, 4)[0] > 0
        if not near.all():
            yield alpha[~near].mean().item()


def centre(alpha):
    """Of what is seen, in pixels."""
    return torch.stack(torch.where(alpha > SEEN)).float().mean(1)


def test_the_command_line_needs_no_model(tmp_path):
    words = ["--method", ALONE[-1], "--prompt", HELD_OUT[0].caption, "--steps", "3"]
    main(["generate", *words, "--output", str(tmp_path)])
    with Image.open(tmp_path / "000000-fg.png") as image:
        assert (image.mode, image.size) == ("RGBA", (SIZE, SIZE))


# --- text -> RGBA ---


def test_the_measures_say_yes_to_the_scenes_themselves():
    grey = [to_image(0.5 + (made.rgba[..., :3] - 0.5) * made.rgba[..., 3:]) for made in HELD_OUT]
    pairs = [(rgba_of(made)[0, 3], coverage(image, made.colour)) for made, image in zip(HELD_OUT, grey)]
    assert fmean(agreement(*pair) for pair in pairs) >= 0.97
    assert fmean(background_alphas(pairs)) <= 0.002


def few_or(more):
    return pytest.mark.parametrize("indices", [FEW, pytest.param(more, marks=pytest.mark.full)], ids=["few", "more"])


@pytest.mark.parametrize("key", ALONE)
@few_or(ALL)
def test_alpha_is_that_of_the_shape_asked_for(key, indices):
    made = [foreground(key, index) for index in indices]
    pairs = [(alpha_of(each), coverage(each.opaque, HELD_OUT[index].colour)) for index, each in zip(indices, made)]
    assert fmean(agreement(*pair) for pair in pairs) >= 0.85
    assert fmean(background_alphas(pairs)) <= 0.03


@pytest.mark.parametrize("key", ALONE)
def test_without_weight_pictures_are_opaque(key):
    for index in FEW[:1]:
        assert alpha_of(foreground(key, index, weight=0)).mean() >= 0.97


@pytest.mark.parametrize("key", ALONE)
@few_or(MANY)
def test_glass_and_glow_are_neither_opaque_nor_gone(key, indices):
    """Of what is seen at all; most of what is solid is opaque."""
    found = defaultdict(list)
    for index in indices:
        alpha = alpha_of(foreground(key, index))
        found[HELD_OUT[index].material].append(alpha[alpha > 0.05])
    seen = {material: torch.cat(of_all) for material, of_all in found.items()}
    for material in ("glass", "glowing"):
        assert ((seen[material] > 0.1) & (seen[material] < 0.9)).float().mean() >= 0.6
        assert seen[material].quantile(0.75) <= 0.75
    assert seen["solid"].quantile(0.75) >= 0.85


@pytest.mark.parametrize("key", ALONE)
@few_or(MANY)
def test_shapes_are_where_they_are_asked_for(key, indices):
    """Within an eighth of the picture, where a third of it is what chance would give."""
    centres = ((centre(alpha_of(foreground(key, index))), centre(rgba_of(HELD_OUT[index])[0, 3])) for index in indices)
    assert fmean((a - b).norm().item() for a, b in centres) <= SIZE / 8


# --- layers ---


@cache
def layered(key, index):
    """What a method makes of all layers of a scene: texts, and the images that it takes."""
    made = layers(index, SEED, SIZE, held_out=True)
    pictures = {Layer.FG: made.foreground.rgba, Layer.BG: made.background, Layer.BLEND: made.blend}
    captions = (made.foreground.caption, made.background_caption, made.blend_caption)
    method = find_method(key)
    asked = {f"{layer.value}_prompt": caption for layer, caption in zip(Layer, captions)}
    given = {layer: to_image(pictures[layer]) for layer in method.inputs}
    asked |= {f"{layer.value}_image": image for layer, image in given.items()}
    request = Request.parse([{"method": key, "passes": 1, **asked}])
    task = Task("", seed=100 + index, width=SIZE, height=SIZE, steps=STEPS, cfg=WORLD_CFG)
    [together] = runner_of(method.family).run(request, task)
    return {each.layer: each.image for each in together} | given


@pytest.mark.parametrize(
    ("key", "count"),
    [
        ("sd15_joint", 2),
        pytest.param("sd15_joint", 6, marks=pytest.mark.full),
        pytest.param("xl_everything", 6, marks=pytest.mark.full),
    ],
)
def test_layers_belong_together(key, count):
    """The foreground over the background is the blend that the model painted."""
    found = [layered(key, index) for index in range(count)]
    composed = [over(each[Layer.FG], each[Layer.BG]) for each in found]
    assert fmean(psnr(from_pil(a), from_pil(b[Layer.BLEND])) for a, b in zip(composed, found)) >= 24


@pytest.mark.parametrize(
    ("key", "count"),
    [
        ("xl_bg2blefg", 3),
        pytest.param("xl_bg2blefg", 6, marks=pytest.mark.full),
        pytest.param("sd15_bg2fg", 6, marks=pytest.mark.full),
    ],
)
def test_what_is_made_for_a_background_follows_it(key, count):
    """Of all backgrounds given, each blend comes nearest to its own."""
    found = [layered(key, index) for index in range(count)]
    for each in found:
        distances = [psnr(from_pil(each[Layer.BLEND]), from_pil(other[Layer.BG])) for other in found]
        assert max(distances) == psnr(from_pil(each[Layer.BLEND]), from_pil(each[Layer.BG]))
