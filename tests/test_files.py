"""Files are read and written whole, or not at all, and never over others unasked."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib_layerdiffuse.cli import files
from lib_layerdiffuse.cli.files import (
    FOR_OPAQUE,
    LOSSLESS,
    Taken,
    check_target,
    content_of,
    write,
    write_free,
)
from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.images.reading import read_file
from tests.odd_files import RED

OLD, NEW = b"old", b"new" * 1000
LAYERS = {"-fg.png": b"1", "-blend.png": b"2", "-fg.safetensors": b"3"}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Failing:
    """A disk that has room for some files and for half of the next."""

    def __init__(self, room: int, error: BaseException) -> None:
        self.room, self.error = room, error
        self.real = Path.write_bytes

    def write(self, path: Path, content: bytes) -> int:
        self.room -= 1
        if self.room >= 0:
            return self.real(path, content)
        self.real(path, content[: len(content) // 2])
        raise self.error


FAILURES = [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt(), SystemExit(143)]


@pytest.fixture(params=FAILURES, ids=["full disk", "Ctrl-C", "terminated"])
def failing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Failing:
    disk = Failing(1, request.param)
    monkeypatch.setattr(Path, "write_bytes", lambda path, content: disk.write(path, content))
    return disk


# Writing


def test_a_new_file_is_made_with_its_folder(tmp_path: Path) -> None:
    target, like = tmp_path / "a" / "b" / "new.png", tmp_path / "like.png"
    write({target: NEW})
    assert target.read_bytes() == NEW and names_in(target.parent) == ["new.png"]
    like.touch()
    assert target.stat().st_mode == like.stat().st_mode  # who may read it is for the user's umask to say


def test_an_old_file_is_replaced_only_where_that_is_asked_for(tmp_path: Path) -> None:
    target = tmp_path / "old.png"
    target.write_bytes(OLD)
    with pytest.raises(Taken, match=r"old\.png is there already.*--overwrite"):
        write({tmp_path / "other.png": NEW, target: NEW})
    assert target.read_bytes() == OLD and names_in(tmp_path) == ["old.png"]
    write({target: NEW}, overwrite=True)
    assert target.read_bytes() == NEW and names_in(tmp_path) == ["old.png"]


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "old.png").write_bytes(OLD)
    (tmp_path / "link.png").symlink_to("old.png")
    write({tmp_path / "link.png": NEW}, overwrite=True)
    assert (tmp_path / "link.png").is_symlink() and (tmp_path / "old.png").read_bytes() == NEW


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_ends_writing_leaves_the_old_files_and_nothing_else(
    failing: Failing, tmp_path: Path, overwrite: bool
) -> None:
    targets = [tmp_path / name for name in ("first.png", "second.png")]
    if overwrite:
        for target in targets:
            failing.real(target, OLD)
    before = names_in(tmp_path)
    expected = LayerDiffuseError if isinstance(failing.error, OSError) else type(failing.error)
    with pytest.raises(expected) as caught:
        write(dict.fromkeys(targets, NEW), overwrite)
    assert names_in(tmp_path) == before
    assert all(target.read_bytes() == OLD for target in targets if overwrite)
    if isinstance(failing.error, OSError):
        assert str(caught.value).startswith(f"{targets[1]} cannot be written: No space left on device. ")


def test_a_name_that_is_too_long_is_said(tmp_path: Path) -> None:
    with pytest.raises(LayerDiffuseError, match=r"\.png cannot be written: .*choose another place"):
        write({tmp_path / f"{'long' * 80}.png": NEW})
    assert names_in(tmp_path) == []


def test_files_that_belong_together_take_the_next_free_name_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, real = [], files.write
    monkeypatch.setattr(files, "write", lambda contents: tried.append(contents) or real(contents))
    for stem in ("000007", "000007-2", "000007-3"):
        assert write_free(tmp_path, "000007", LAYERS) == [tmp_path / f"{stem}{ending}" for ending in LAYERS]
    (tmp_path / "000007-4-blend.png").write_bytes(OLD)  # one that is taken is enough
    assert write_free(tmp_path, "000007", LAYERS)[0] == tmp_path / "000007-5-fg.png"
    assert write_free(tmp_path, "000007", {".png": NEW}) == [tmp_path / "000007.png"]
    assert (tmp_path / "000007-4-blend.png").read_bytes() == OLD
    assert len(names_in(tmp_path)) == 4 * len(LAYERS) + 2
    assert len(tried) == 5  # no name that is known to be taken


def test_a_name_that_another_process_takes_meanwhile_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tmp_path / "000000-blend.png"
    theirs.write_bytes(OLD)
    monkeypatch.setattr(files.os.path, "lexists", lambda path: False)  # it was not there when we looked
    assert write_free(tmp_path, "000000", LAYERS)[0] == tmp_path / "000000-2-fg.png"
    assert theirs.read_bytes() == OLD and len(names_in(tmp_path)) == 1 + len(LAYERS)


# What can be said before anything is made


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("new.png", None),
        ("NEW.PNG", None),
        ("far/away/new.webp", None),
        ("new.jpg", r"new\.jpg cannot hold a picture.*ends in \.png or \.webp or \.tif or \.tiff\."),
        ("new", "new cannot hold a picture"),
        ("old.png", r"old\.png is there already"),
        ("folder.png", r"folder\.png is there already"),
        ("old.png/new.png", r"old\.png is no folder"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_targets(tmp_path: Path, name: str, sentence: str | None, overwrite: bool) -> None:
    (tmp_path / "old.png").write_bytes(OLD)
    (tmp_path / "folder.png").mkdir()
    if sentence is None or (overwrite and "already" in sentence):
        check_target(tmp_path / name, LOSSLESS, "a picture", overwrite)
    else:
        with pytest.raises(LayerDiffuseError, match=sentence):
            check_target(tmp_path / name, LOSSLESS, "a picture", overwrite)
    assert names_in(tmp_path) == ["folder.png", "old.png"]


def test_a_folder_that_may_not_be_written_to_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    with pytest.raises(LayerDiffuseError, match="may not be written to"):
        check_target(tmp_path / "below" / "new.png", LOSSLESS, "a picture", overwrite=False)


# Pictures


@pytest.mark.parametrize("ending", [*LOSSLESS, ".PNG"])
@pytest.mark.parametrize("mode", ["RGBA", "RGB"])
def test_formats_keep_every_pixel_and_the_colour_under_transparency(ending: str, mode: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (16, 16, len(mode)), np.uint8)
    values[:8, :, 3:] = 0
    path = tmp_path / f"picture{ending}"
    path.write_bytes(content_of(Image.fromarray(values), ending))
    found = read_file(path)
    assert found.mode == mode and np.array_equal(np.asarray(found), values)


def test_opaque_pictures_may_be_jpg(tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(content_of(Image.new("RGB", (16, 16), RED[:3]), ".jpg", FOR_OPAQUE))
    with Image.open(path) as image:
        assert (image.format, image.size) == ("JPEG", (16, 16))
