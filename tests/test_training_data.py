"""Sources of transparent pictures with captions."""

import io
import json
import tarfile

import pytest
import torch
from PIL import Image

pytest.importorskip("torchmetrics", reason="training has an environment of its own, as new as this one's newest")

from torch.utils.data import DataLoader

from training.data import open_source
from training.scenes import scene

RED = (200, 10, 20, 128)


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b"):
        Image.new("RGBA", (96, 64), RED).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"picture {name}\n")
    return tmp_path


def test_captions_beside_the_pictures(folder):
    found = open_source(str(folder), 32)
    assert [each["caption"] for each in found] == ["picture a", "picture b"]
    rgba = found[0]["rgba"]
    assert rgba.shape == (4, 32, 32)
    assert torch.allclose(rgba[:, 5, 5] * 255, torch.tensor(RED).float(), atol=1.01)


def test_captions_in_a_table(folder):
    rows = [{"file_name": "b.png", "text": "first"}, {"file_name": "a.png", "text": "second"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [each["caption"] for each in open_source(str(folder), 32)] == ["first", "second"]


def test_what_is_missing_is_said(folder, tmp_path):
    (folder / "b.txt").unlink()
    with pytest.raises(ValueError, match=r"b\.png has no caption: put it into .*b\.txt"):
        open_source(str(folder), 32)
    (folder / "metadata.jsonl").write_text('{"file_name": "c.png", "text": "x"}\n')
    with pytest.raises(ValueError, match=r"names .*c\.png, which is not there"):
        open_source(str(folder), 32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="There are no pictures"):
        open_source(str(tmp_path / "empty"), 32)


def test_scenes_without_end():
    found = open_source("scenes:5", 32)
    assert found[12]["caption"] == scene(12, seed=5).caption
    assert torch.equal(found[12]["rgba"].permute(1, 2, 0), torch.from_numpy(scene(12, seed=5, size=32).rgba))
    batch = next(iter(DataLoader(found, 3)))
    assert batch["rgba"].shape == (3, 4, 32, 32)
    assert len(batch["caption"]) == 3


def test_shards(tmp_path):
    with tarfile.open(tmp_path / "00.tar", "w") as tar:
        for index in range(6):
            picture = io.BytesIO()
            Image.new("RGBA", (40, 40), (*RED[:3], 40 * index)).save(picture, "PNG")
            for suffix, content in (("png", picture.getvalue()), ("txt", f"number {index}".encode())):
                member = tarfile.TarInfo(f"{index:03}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    alphas = {}
    for each, _ in zip(open_source(str(tmp_path / "{00..00}.tar"), 16), range(60)):
        assert each["rgba"].shape == (4, 16, 16)
        alphas[each["caption"]] = round(each["rgba"][3].mean().item() * 255)
    assert alphas == {f"number {index}": 40 * index for index in range(6)}
