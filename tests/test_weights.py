"""Weight files: the catalogue, what is found in folders, whether a file is whole, what is in it."""

import errno
import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.methods import METHODS, Family
from lib_layerdiffuse.weights import files
from lib_layerdiffuse.weights.files import check_whole, fingerprint, read_tensors
from lib_layerdiffuse.weights.library import WeightLibrary
from lib_layerdiffuse.weights.released import ASSETS, MB, REVISION, Asset, address_of

FILE = "vae_transparent_encoder.safetensors"
TENSORS = {"a": torch.arange(2000.0), "b": torch.ones(3, 4)}
BODY = save(TENSORS, {"note": "8 kB of weights"})
OTHER = save({"a": torch.arange(3000.0)})
HEADER = 8 + int.from_bytes(BODY[:8], "little")
PAGE = b"<!DOCTYPE html><title>Sign in</title>"


def quiet(done: int, size: int) -> None:
    """A report that nobody reads."""


# The catalogue


def test_every_file_a_method_needs_is_in_the_catalogue() -> None:
    needed = {method.weights for method in METHODS if not method.chain}
    needed |= {file for family in Family for file in (family.decoder, family.encoder)}
    assert needed == ASSETS.keys()


@pytest.mark.parametrize("asset", ASSETS.values(), ids=lambda asset: asset.file)
def test_asset_row(asset: Asset) -> None:
    assert asset.file.endswith(".safetensors")
    assert abs(asset.size - asset.megabytes * MB) <= MB / 2
    assert len(bytes.fromhex(asset.sha256)) == (0 if asset.file in [family.encoder for family in Family] else 32)


@pytest.mark.parametrize(
    ("endpoint", "base"),
    [
        (None, "https://huggingface.co"),
        ("", "https://huggingface.co"),
        ("https://huggingface.co", "https://huggingface.co"),
        ("https://mirror.example/", "https://mirror.example"),
        (" http://localhost:1/hf\n", "http://localhost:1/hf"),
        ("https://me:secret@mirror.example/hf", "https://mirror.example/hf"),
        ("https://me:sec/r?e#t@mirror.example:1", "https://mirror.example:1"),
        ("https://me:secret@more:secret@mirror.example", "https://mirror.example"),
        ("me:secret@mirror.example", "mirror.example"),
        ("http://[", "http://["),
    ],
)
def test_address(endpoint: str | None, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if endpoint is None:
        monkeypatch.delenv("HF_ENDPOINT", raising=False)
    else:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert address_of(FILE) == f"{base}/LayerDiffusion/layerdiffusion-v1/resolve/{REVISION}/{FILE}"


# Finding


def test_folders_are_searched_in_order(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("missing", "second", "third"))
    for folder in (second, third):
        folder.mkdir()
        (folder / FILE).write_bytes(BODY)
    (third / "vae_transparent_decoder.safetensors").write_bytes(BODY)
    library = WeightLibrary((first, second, third))
    assert library.find(FILE) == second / FILE
    assert library.find("vae_transparent_decoder.safetensors") == third / "vae_transparent_decoder.safetensors"
    assert library.find("layer_sd15_joint.safetensors") is None


def test_a_file_that_is_there_is_not_downloaded_nor_touched(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_bytes(BODY[:100])
    assert WeightLibrary((tmp_path / "elsewhere", tmp_path)).obtain(FILE, quiet) == path
    assert path.read_bytes() == BODY[:100]
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("name", ["x" * 300, "nul\0l"], ids=["long", "NUL"])
def test_a_folder_that_cannot_be_looked_into_has_nothing(tmp_path: Path, name: str) -> None:
    library = WeightLibrary((tmp_path / name, tmp_path))
    assert library.find(FILE) is None
    assert library.received(FILE) == 0
    (tmp_path / FILE).write_bytes(BODY)
    assert library.find(FILE) == tmp_path / FILE


def test_a_folder_of_that_name_is_no_file(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    assert WeightLibrary([tmp_path]).find(FILE) is None


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if BODY were a released file."""
    monkeypatch.setitem(ASSETS, FILE, Asset(FILE, len(BODY), hashlib.sha256(BODY).hexdigest()))


@pytest.mark.parametrize(
    ("name", "content", "warned"),
    [
        (FILE, BODY, False),
        (FILE, BODY[:-1] + b"!", True),
        (FILE, OTHER, False),  # somebody's own
        ("mine.safetensors", BODY[:-1] + b"!", False),
        ("layer_sd15_vae_transparent_encoder.safetensors", bytes(2365008), False),  # whose hash nobody knows
    ],
)
@pytest.mark.usefixtures("released")
def test_a_file_with_other_bytes_than_the_released_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, content: bytes, warned: bool
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    reports: list[tuple[int, int]] = []
    files.compare(path, lambda *report: reports.append(report))
    assert [str(path) in record.getMessage() for record in caplog.records] == [True] * warned
    assert not warned or "delete it: the next run downloads it again" in caplog.text
    assert set(reports) <= {(len(content), len(content))}


@pytest.mark.usefixtures("released")
def test_the_library_compares_what_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FILE).write_bytes(BODY[:-1] + b"!")
    WeightLibrary([tmp_path]).obtain(FILE, quiet)
    assert "other bytes than the released file" in caplog.text


# Wholeness and reading


def safetensors_with(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize("content", [BODY, OTHER, safetensors_with({}), safetensors_with({"__metadata__": {"a": "b"}})])
def test_whole(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / FILE
    path.write_bytes(content)
    check_whole(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (BODY[:-1], f"it has {len(BODY) - 1:,} bytes and should have {len(BODY):,}"),
        (BODY[:HEADER], f"it has {HEADER:,} bytes and should have {len(BODY):,}"),
        (BODY + b"!", f"it has {len(BODY) + 1:,} bytes and should have {len(BODY):,}"),
        (BODY[: HEADER // 2], "cut off within its header"),
        (BODY[:5], "it has 5 bytes where about 2 MB are expected"),
        (b"", "it has 0 bytes where about 2 MB are expected"),
        (bytes(1000), "no safetensors file"),
        (PAGE, "no safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "no safetensors file"),
        (safetensors_with([1]), "no safetensors file"),
        (safetensors_with({"a": 1}), "no safetensors file"),
        (safetensors_with({"a": {"data_offsets": []}}), "no safetensors file"),
        (safetensors_with({"a": {"data_offsets": [0, "1"]}}), "no safetensors file"),
        (safetensors_with({"a": {"data_offsets": [0, float("inf")]}}), "no safetensors file"),
        ((10**6).to_bytes(8, "little") + b"[" * 10**6, "no safetensors file"),
    ],
)
def test_not_whole(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / FILE
    path.write_bytes(content)
    for refuse in (check_whole, read_tensors):
        with pytest.raises(LayerDiffuseError) as caught:
            refuse(path)
        message = str(caught.value)
        assert str(path) in message
        assert said in message
        assert "Delete it" in message
        assert address_of(FILE) in message
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["missing.safetensors", "folder"])
def test_unreadable(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(LayerDiffuseError, match=f"{name} cannot be read"):
        check_whole(tmp_path / name)


def test_a_file_that_goes_away_meanwhile(tmp_path: Path) -> None:
    with pytest.raises(LayerDiffuseError, match=f"{FILE} cannot be read"):
        fingerprint(tmp_path / FILE)
    with pytest.raises(LayerDiffuseError, match=f"{FILE} cannot be read"):
        files.sha256_of(tmp_path / FILE, quiet)


def test_a_file_that_cannot_be_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> Any:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    (tmp_path / FILE).write_bytes(BODY)
    monkeypatch.setattr(files, "load_file", refuse)
    with pytest.raises(LayerDiffuseError, match=f"{FILE} cannot be read"):
        read_tensors(tmp_path / FILE)


def test_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / FILE
    path.write_bytes(BODY)
    with caplog.at_level(logging.INFO, logger="layerdiffuse"):
        tensors = read_tensors(path)
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    [record] = caplog.records
    assert record.getMessage().startswith(f"read {FILE} (")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda x: x.to(torch.int8), "its tensor b holds int8, where floating-point numbers belong"),
        (lambda x: x * float("nan"), "its tensor b holds NaN or infinity"),
    ],
)
def test_numbers_that_cannot_be_computed_with(
    tmp_path: Path, spoil: Callable[[torch.Tensor], torch.Tensor], said: str
) -> None:
    path = tmp_path / FILE
    save_file(TENSORS | {"b": spoil(TENSORS["b"])}, path)
    with pytest.raises(LayerDiffuseError) as caught:
        read_tensors(path)
    message = str(caught.value)
    assert message.startswith(f"{path} cannot be used: {said}. Delete it: the next run downloads it again.")
    assert address_of(FILE) in message


def test_a_file_whose_length_fits_but_whose_header_does_not(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    path.write_bytes(safetensors_with({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)))
    with pytest.raises(LayerDiffuseError, match=r"mine\.safetensors cannot be read"):
        read_tensors(path)


def test_fingerprint_changes_with_name_size_and_time(tmp_path: Path) -> None:
    def written(name: str, content: bytes, nanoseconds: int) -> str:
        path = tmp_path / name
        path.write_bytes(content)
        os.utime(path, ns=(0, nanoseconds))
        return fingerprint(path)

    cases = [("a", b"1", 1000), ("b", b"1", 1000), ("a", b"12", 1000), ("a", b"1", 2000)]
    assert len({written(*case) for case in cases}) == len(cases)
    assert written(*cases[0]) == written(*cases[0])
