"""Metrics of transparent pictures against numbers worked out by hand."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from lib_layerdiffuse.__main__ import main
from lib_layerdiffuse.cli.metrics import BACKGROUNDS, MOST_DB, compare, compare_folders, slope
from lib_layerdiffuse.errors import LayerDiffuseError
from tests.odd_files import bomb


def rgba(alpha, colour=(0.2, 0.4, 0.6), side=32):
    values = torch.tensor([*colour, alpha]).view(1, 4, 1, 1)
    return values.expand(1, 4, side, side).clone()


@pytest.mark.parametrize("picture", [torch.rand(1, 4, 32, 32), rgba(0.7)], ids=["noise", "even"])
def test_a_picture_is_like_itself(picture):
    found = compare(picture, picture)
    assert found.pop("psnr") == MOST_DB
    assert found.pop("ssim") == pytest.approx(1)
    assert set(found.values()) == {0.0}


def test_hidden_colour_does_not_count():
    found = compare(rgba(0.0, (1, 0, 0)), rgba(0.0, (0, 1, 0)))
    assert (found["psnr"], found["alpha mae"]) == (MOST_DB, 0)


def test_colour_is_compared_over_nine_backgrounds():
    found = compare(rgba(0.5), rgba(0.7))
    by_hand = []
    for background in BACKGROUNDS.values():
        seen = [[a * c + (1 - a) * b for c, b in zip((0.2, 0.4, 0.6), background)] for a in (0.5, 0.7)]
        by_hand.append(-10 * math.log10(sum((x - y) ** 2 for x, y in zip(*seen)) / 3))
    assert len(by_hand) == 9
    assert found["psnr"] == pytest.approx(sum(by_hand) / 9, abs=1e-3)


def test_alpha_differences():
    found = compare(rgba(0.5, side=20), rgba(0.7, side=20))
    assert found["alpha mae"] == pytest.approx(0.2)
    assert found["alpha mse"] == pytest.approx(0.04)
    assert found["alpha sad"] == pytest.approx(0.2 * 400 / 1000)
    assert found["alpha edge"] == pytest.approx(0, abs=1e-9)


def test_slope_is_that_of_a_ramp_in_any_direction():
    ramp = (torch.arange(40.0) / 40).expand(40, 40)[None, None]
    for turned in (ramp, ramp.mT, ramp.flip(3)):
        assert slope(turned)[..., 10:30, 10:30].sub(1 / 40).abs().max() < 1e-3


def test_an_edge_elsewhere_counts_and_a_softer_one_less():
    edge = [rgba(1.0) for _ in range(3)]
    edge[0][..., :16] *= torch.tensor([1, 1, 1, 0]).view(4, 1, 1)
    edge[1][..., :17] *= torch.tensor([1, 1, 1, 0]).view(4, 1, 1)
    edge[2][..., :24] *= torch.tensor([1, 1, 1, 0]).view(4, 1, 1)
    near, far = (compare(edge[0], other)["alpha edge"] for other in edge[1:])
    assert 0 < near < far


@pytest.fixture
def folders(tmp_path):
    truth, result = tmp_path / "truth", tmp_path / "result"
    for folder, alpha in ((truth, 255), (result, 128)):
        folder.mkdir()
        Image.new("RGBA", (16, 16), (10, 20, 30, alpha)).save(folder / "a.png")
        Image.new("RGB", (16, 24), (10, 20, 30)).save(folder / "b.png")
    return truth, result


def test_folders_on_the_command_line(folders, capsys):
    main(["metrics", "--json", *map(str, folders)])
    found = json.loads(capsys.readouterr().out)
    assert found["pictures"] == 2
    assert found["alpha mae"] == pytest.approx(127 / 255 / 2)


def test_pictures_are_read_as_they_are_seen(folders):
    """One lies on its side, the other has 16 bits."""
    truth, result = folders
    photo = Image.effect_noise((16, 24), 90).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(truth / "b.png")
    photo.transpose(Image.Transpose.ROTATE_90).save(result / "b.png", exif=exif)
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(grey.astype(np.uint8)).save(truth / "a.png")
    Image.fromarray(grey * 257).save(result / "a.png")
    assert compare_folders(truth, result)["psnr"] == MOST_DB


def test_pictures_that_cannot_be_compared_are_named(folders):
    truth, result = folders
    Image.new("RGB", (16, 16)).save(result / "a.webp")
    with pytest.raises(ValueError, match=r"result has two pictures of one name, a\.png and a\.webp"):
        compare_folders(truth, result)
    with pytest.raises(ValueError, match=r"result has two pictures of one name"):
        compare_folders(result, truth)
    (result / "a.webp").unlink()
    (result / "a.png").write_bytes(b"junk")
    with pytest.raises(LayerDiffuseError, match=r"a\.png is not a whole picture"):
        compare_folders(truth, result)
    for folder in folders:
        Image.new("RGB", (6, 6)).save(folder / "a.png")
    assert compare_folders(truth, result)["ssim"] > 0
    for folder in folders:
        Image.new("RGB", (5, 60)).save(folder / "a.png")
    with pytest.raises(ValueError, match=r"a\.png has 5x60 pixels, but SSIM needs 6 a side"):
        compare_folders(truth, result)


def test_folders_that_do_not_belong_together(folders):
    truth, result = folders
    Image.new("RGB", (8, 8)).save(result / "a.png")
    with pytest.raises(ValueError, match=r"a has 16x16 pixels in .* and 8x8 in"):
        compare_folders(truth, result)
    (result / "b.png").unlink()
    with pytest.raises(ValueError, match="only one has b"):
        compare_folders(truth, result)
    for path in truth.iterdir():
        path.unlink()
    (result / "a.png").unlink()
    with pytest.raises(ValueError, match="There are no pictures"):
        compare_folders(truth, result)


def test_two_pictures_by_their_names(folders):
    truth, result = folders
    found = compare_folders(truth / "a.png", result / "a.png")
    assert (found["pictures"], found["alpha mae"]) == (1, pytest.approx(127 / 255))


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (4, 4), (5, 64), (64, 5)])
def test_pictures_too_small_for_a_figure_are_said(tmp_path, size):
    Image.new("RGBA", size).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match=rf"small\.png has {size[0]}x{size[1]} pixels, but SSIM needs 6 a side"):
        compare_folders(tmp_path, tmp_path)
    with pytest.raises(ValueError, match="but LPIPS needs 31"):
        compare_folders(tmp_path, tmp_path, lpips=True)


def test_the_smallest_pictures_with_all_figures(tmp_path):
    Image.new("RGBA", (6, 6)).save(tmp_path / "small.png")
    assert compare_folders(tmp_path, tmp_path)["ssim"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("content", "sentence"), [(b"no", "is not a whole picture"), (bomb(20_000, 20_000), "has more than")]
)
def test_pictures_that_cannot_be_read_are_said(folders, content, sentence):
    truth, result = folders
    (truth / "a.png").write_bytes(content)
    with pytest.raises(LayerDiffuseError, match=rf"a\.png {sentence}"):
        compare_folders(truth, result)
