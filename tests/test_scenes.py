"""The tiny world's pictures: what their captions say, repeatable, with alpha of every kind."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from training.scenes import COLOURS, HELD_OUT, MATERIALS, SHAPES, TEXTURES, TRAINED, layers, scene, write

SIZE = 64


def alpha_of(material, count=8):
    first = list(MATERIALS).index(material)
    return np.stack([scene(first + i * len(MATERIALS), size=SIZE).rgba[..., 3] for i in range(count)])


def share(chosen):
    return float(np.mean(chosen))


def test_materials_take_turns():
    found = Counter(scene(i, size=16).material for i in range(60))
    assert found == dict.fromkeys(MATERIALS, 10)


def test_a_scene_is_made_from_its_seed_and_index():
    assert np.array_equal(layers(7, seed=3, size=SIZE).blend, layers(7, seed=3, size=SIZE).blend)
    assert scene(7, seed=3).caption == scene(7, seed=3, size=SIZE).caption
    assert not np.array_equal(scene(7, seed=3).rgba, scene(7, seed=4).rgba)
    assert not np.array_equal(scene(7, seed=3).rgba, scene(7, seed=3, held_out=True).rgba)


def test_held_out_pairs_are_never_trained_on():
    assert not set(HELD_OUT) & set(TRAINED)
    assert {shape for shape, _ in HELD_OUT} == {shape for shape, _ in TRAINED} == set(SHAPES)
    assert {colour for _, colour in HELD_OUT} == {colour for _, colour in TRAINED} == set(COLOURS)
    for held_out, pairs in ((False, TRAINED), (True, HELD_OUT)):
        scenes = [scene(i, size=16, held_out=held_out) for i in range(300)]
        assert {(each.shape, each.colour) for each in scenes} == set(pairs)


@pytest.mark.parametrize("index", range(12))
def test_the_caption_says_what_there_is(index):
    each = layers(index, size=SIZE)
    of_scene = each.foreground
    assert of_scene.caption.startswith(f"a {of_scene.material} {of_scene.colour} {of_scene.shape} ")
    assert each.background_caption.split()[1] in TEXTURES
    rgba = of_scene.rgba
    alpha = rgba[..., 3]
    y, x = ((plane * alpha).sum() / alpha.sum() / SIZE for plane in np.mgrid[:SIZE, :SIZE])
    for words, place in ((("left", "right"), x), (("top", "bottom"), y)):
        expected = next((side for side in words if side in of_scene.caption), "middle")
        assert expected == words[0] if place < 0.4 else expected == words[1] if place > 0.6 else expected == "middle"
    dense = np.median(rgba[alpha >= 0.9 * alpha.max()][:, :3], axis=0)
    distances = {
        name: np.abs(dense / dense.max() - np.array(colour) / max(colour)).sum() for name, colour in COLOURS.items()
    }
    if of_scene.material != "glass":  # its densest part is the highlight
        assert min(distances, key=distances.get) == of_scene.colour


def test_values_are_in_range_and_the_corners_empty():
    rgba = np.stack([scene(i, size=SIZE).rgba for i in range(60)])
    assert rgba.dtype == np.float32
    assert rgba.min() >= 0 and rgba.max() <= 1
    assert np.median(rgba[:, :4, :4, 3]) == 0


@pytest.mark.parametrize(("material", "least"), [("soft", 0.4), ("glass", 0.6), ("glowing", 0.6), ("smoky", 0.8)])
def test_these_are_see_through(material, least):
    alpha = alpha_of(material)
    seen = alpha[alpha > 0.05]
    assert share((seen > 0.1) & (seen < 0.9)) > least


def test_hair_has_more_edge_than_a_solid_shape():
    def fractional(material):
        alpha = alpha_of(material, 12)
        return share((alpha > 0.1) & (alpha < 0.9)) / share(alpha > 0.1)

    assert fractional("hairy") > 2 * fractional("solid")


def test_blends_are_the_foreground_over_the_background():
    each = layers(2, size=SIZE)
    alpha = each.foreground.rgba[..., 3:]
    clear = alpha[..., 0] == 0
    assert np.array_equal(each.blend[clear], each.background[clear])
    assert not np.allclose(each.blend, each.background)


@pytest.mark.parametrize("with_layers", [False, True])
def test_a_folder_of_pictures_with_captions(tmp_path, with_layers):
    write(tmp_path / "world", 7, seed=1, size=SIZE, held_out=True, with_layers=with_layers)
    endings = [".fg", ".bg", ".blend"] if with_layers else [""]
    names = [f"{index:06}{ending}" for index in range(7) for ending in endings]
    files = sorted(path.name for path in (tmp_path / "world").iterdir())
    assert files == sorted(name + kind for name in names for kind in (".png", ".txt"))
    for name in names:
        image = Image.open(tmp_path / "world" / f"{name}.png")
        assert image.size == (SIZE, SIZE)
        assert image.mode == ("RGB" if name.endswith((".bg", ".blend")) else "RGBA")
    caption = (tmp_path / "world" / f"{names[0]}.txt").read_text(encoding="utf-8").strip()
    assert caption == scene(0, seed=1, held_out=True).caption
    assert Image.open(tmp_path / "world-sheet.png").size == (6 * SIZE, 2 * SIZE)
