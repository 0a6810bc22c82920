"""Layered data from foregrounds, by an inpainting model with random weights."""

import numpy as np
import pytest
import torch
from PIL import Image

from lib_layerdiffuse.images.rgba import over
from lib_layerdiffuse.methods import Family
from training.data import open_layers
from training.layer_data import Builder, Settings, build, rows_of
from training.scenes import write
from training.tiny.models import MAKERS, make_vae

SIZE = 64


@pytest.fixture
def chosen(tmp_path):
    torch.manual_seed(0)
    write(tmp_path / "data", 2, seed=1, size=SIZE, held_out=False, with_layers=False)
    (tmp_path / "data" / "000001.bg.txt").write_text("a striped background\n", encoding="utf-8")
    MAKERS[Family.SD15](make_vae()).save_pretrained(tmp_path / "model")
    return Settings(str(tmp_path / "data"), str(tmp_path / "model"), str(tmp_path / "out"), size=SIZE, steps=2)


def test_three_layers_that_belong_together(chosen, tmp_path):
    assert [row["background"] for row in rows_of(tmp_path / "data")] == ["", "a striped background"]
    build(chosen, cluster=None)
    assert len(open_layers(chosen.output, SIZE)) == 2
    out = tmp_path / "out"
    for name in ("000000", "000001"):
        foreground, background, blend = (Image.open(out / f"{name}.{layer}.png") for layer in ("fg", "bg", "blend"))
        assert foreground.tobytes() == Image.open(tmp_path / "data" / f"{name}.png").tobytes()
        assert blend.tobytes() == over(foreground, background).tobytes()
        around = np.asarray(foreground.getchannel("A")) == 0
        assert np.asarray(background)[around].std() > 1, "nothing was painted around it"
        hidden = np.asarray(foreground.getchannel("A")) == 255
        if hidden.any():
            assert (np.asarray(background)[hidden] != np.asarray(foreground.convert("RGB"))[hidden]).any()
    assert (out / "000001.bg.txt").read_text(encoding="utf-8") == "a striped background\n"
    assert (out / "000001.blend.txt").read_text(encoding="utf-8").endswith(", a striped background\n")


def test_nothing_of_the_foreground_is_left_at_its_edge(chosen, tmp_path, monkeypatch):
    masks = []
    monkeypatch.setattr(Builder, "_paint", lambda self, prompt, picture, mask: masks.append(mask) or picture)
    build(chosen, cluster=None)
    seen = np.asarray(Image.open(tmp_path / "data" / "000000.png").getchannel("A")) > 0
    hidden = np.asarray(masks[1]) == 255
    assert hidden[seen].all()
    for shift in (-4, 4):
        assert hidden[np.roll(seen, shift, axis=0)].all()
        assert hidden[np.roll(seen, shift, axis=1)].all()
    assert not hidden.all()


def test_what_is_there_is_not_made_again(chosen, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "000000.blend.png").write_bytes(b"mine")
    build(chosen, cluster=None)
    assert (tmp_path / "out" / "000000.blend.png").read_bytes() == b"mine"
    assert not (tmp_path / "out" / "000000.fg.png").exists()
    assert (tmp_path / "out" / "000001.blend.png").exists()
