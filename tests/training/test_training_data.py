"""Sources of transparent pictures with captions."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from training.data import address, open_layers, open_source
from training.scenes import layers, scene, write

RED = (200, 10, 20, 128)


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b"):
        Image.new("RGBA", (96, 64), RED).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"picture {name}\n", encoding="utf-8")
    return tmp_path


def test_captions_beside_the_pictures(folder):
    found = open_source(str(folder), 32)
    assert [each["caption"] for each in found] == ["picture a", "picture b"]
    rgba = found[0]["rgba"]
    assert rgba.shape == (4, 32, 32)
    assert torch.allclose(rgba[:, 5, 5] * 255, torch.tensor(RED).float(), atol=1.01)


def test_captions_in_a_table(folder):
    rows = [{"file_name": "b.png", "text": "first"}, {"file_name": "a.png", "text": "second"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert [each["caption"] for each in open_source(str(folder), 32)] == ["first", "second"]


def test_what_is_missing_is_said(folder, tmp_path):
    (folder / "b.txt").unlink()
    with pytest.raises(ValueError, match=r"b\.png has no caption: put it into .*b\.txt"):
        open_source(str(folder), 32)
    (folder / "metadata.jsonl").write_text('{"file_name": "c.png", "text": "x"}\n', encoding="utf-8")
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


def test_pictures_are_opaque_and_sometimes_backgrounds_alone():
    found = open_source("pictures:5", 32)
    made = {index: layers(index, seed=5, size=32) for index in (3, 9, 15)}
    assert found[3]["caption"] == made[3].background_caption
    assert found[9]["caption"] == made[9].foreground.caption
    assert found[15]["caption"] == made[15].blend_caption
    for index, picture in ((3, made[3].background), (9, made[9].blend), (15, made[15].blend)):
        assert torch.equal(found[index]["rgba"][:3].permute(1, 2, 0), torch.from_numpy(picture))
        assert (found[index]["rgba"][3] == 1).all()


def test_several_sources_in_one(folder):
    found = open_source(f"scenes:5+{folder}", 32)
    assert found[0]["caption"] == scene(0, seed=5).caption
    assert found[len(found) - 1]["caption"] == "picture b"


def test_layers_in_a_folder_in_shards_and_without_either(tmp_path):
    write(tmp_path / "data", 2, seed=3, size=32, held_out=False, with_layers=True)
    with tarfile.open(tmp_path / "00.tar", "w") as tar:
        for path in sorted((tmp_path / "data").iterdir()):
            tar.add(path, path.name)
    made = open_layers("scenes:3", 32)
    from_folder = open_layers(str(tmp_path / "data"), 32)
    assert len(from_folder) == 2
    from_shards = {
        each["fg"]["caption"]: each for each, _ in zip(open_layers(str(tmp_path / "{00..00}.tar"), 32), range(30))
    }
    for index in range(2):
        expected = made[index]
        for found in (from_folder[index], from_shards[expected["fg"]["caption"]]):
            assert found.keys() == {"fg", "bg", "blend"}
            for layer, sample in found.items():
                assert sample["caption"] == expected[layer]["caption"]
                torch.testing.assert_close(sample["rgba"], expected[layer]["rgba"], rtol=0, atol=1.01 / 255)


def test_layers_that_are_missing_are_said(tmp_path):
    with pytest.raises(ValueError, match="There are no layers in"):
        open_layers(str(tmp_path), 32)
    write(tmp_path / "data", 1, seed=3, size=32, held_out=False, with_layers=True)
    (tmp_path / "data" / "000000.bg.txt").unlink()
    with pytest.raises(ValueError, match=r"000000\.bg\.png has no caption"):
        open_layers(str(tmp_path / "data"), 32)[0]


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


@pytest.mark.parametrize(
    ("opened", "source"),
    [(open_source, "00.tar"), (open_source, "scenes:1+pictures:1"), (open_layers, "00.tar"), (open_layers, "scenes:1")],
)
def test_what_is_opened_can_be_sent_to_workers(opened, source):
    """As where a process cannot be forked: on Windows and macOS."""
    pickle.dumps(opened(source, 16))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("C:/shards/{00..99}.tar", "file:C:/shards/{00..99}.tar"),
        ("https://example.org/{00..99}.tar", "https://example.org/{00..99}.tar"),
        (str(Path("shards") / "{00..99}.tar"), "shards/{00..99}.tar"),
    ],
)
def test_shards_are_found_on_any_drive(pattern, expected):
    assert address(pattern) == expected
