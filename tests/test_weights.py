"""Weight files: found, downloaded from a real server on this machine, checked, read."""

import errno
import hashlib
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
import torch
from mirror import Mirror, mirrored
from safetensors.torch import save

from lib_layerdiffuse import weights
from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.methods import DECODERS, ENCODERS, METHODS
from lib_layerdiffuse.weights import ASSETS, WeightLibrary, address_of, check_whole, fingerprint, read_tensors

FILE = "vae_transparent_encoder.safetensors"
TENSORS = {"a": torch.arange(2000.0), "b": torch.ones(3, 4, dtype=torch.float16)}
BODY = save(TENSORS, {"note": "8 kB of weights"})
OTHER = save({"a": torch.arange(3000.0)})
HEADER = 8 + int.from_bytes(BODY[:8], "little")
PAGE = b"<!DOCTYPE html><title>Sign in</title>"


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    with mirrored(BODY, monkeypatch) as mirror:
        yield mirror


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models" / "layer_model"


def part_of(folder: Path, content: bytes | None = None) -> Path:
    """The unfinished file, with this content."""
    part = folder / f"{FILE}.part"
    if content is not None:
        folder.mkdir(parents=True)
        part.write_bytes(content)
    return part


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def obtain(*folders: Path) -> Path:
    return WeightLibrary(folders).obtain(FILE, lambda received, total: None)


def refusal(*folders: Path) -> str:
    with pytest.raises(LayerDiffuseError) as caught:
        obtain(*folders)
    return str(caught.value)


# The catalogue


def test_every_file_a_method_needs_is_in_the_catalogue() -> None:
    needed = {method.weights for method in METHODS if not method.chain} | {*DECODERS.values(), *ENCODERS.values()}
    assert needed == ASSETS.keys()


@pytest.mark.parametrize("asset", ASSETS.values(), ids=lambda asset: asset.file)
def test_asset_row(asset: weights.Asset) -> None:
    assert asset.file.endswith(".safetensors")
    assert asset.megabytes > 0
    assert asset.sha256 == "" or len(bytes.fromhex(asset.sha256)) == 32


@pytest.mark.parametrize(
    "endpoint", [None, "", "https://huggingface.co", "https://mirror.example/", "http://localhost:1/hf"]
)
def test_address(endpoint: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if endpoint is None:
        monkeypatch.delenv("HF_ENDPOINT", raising=False)
    else:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
    base = (endpoint or "https://huggingface.co").rstrip("/")
    assert address_of(FILE) == f"{base}/LayerDiffusion/layerdiffusion-v1/resolve/main/{FILE}"


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


def test_a_file_that_is_there_is_not_downloaded_nor_touched(mirror: Mirror, tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_bytes(BODY[:100])
    assert obtain(tmp_path / "elsewhere", tmp_path) == path
    assert path.read_bytes() == BODY[:100]
    assert mirror.asked == []


# Downloading


def test_download(mirror: Mirror, folder: Path, tmp_path: Path) -> None:
    reports: list[tuple[int, int]] = []
    path = WeightLibrary([folder, tmp_path]).obtain(FILE, lambda *report: reports.append(report))
    assert path == folder / FILE
    assert path.read_bytes() == BODY
    assert names_in(folder) == [FILE]
    assert reports == [(min(received, len(BODY)), len(BODY)) for received in range(1000, len(BODY) + 1000, 1000)]


def test_request_names_the_program_and_no_compression(mirror: Mirror, folder: Path) -> None:
    obtain(folder)
    [(path, headers)] = mirror.asked
    assert path == f"/LayerDiffusion/layerdiffusion-v1/resolve/main/{FILE}"
    assert headers["user-agent"] == "sd-forge-layerdiffuse"
    assert headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    ("cuts", "starts"),
    [
        ([5000], [0, 5000]),
        ([HEADER, 1500, 10], [0, HEADER, HEADER + 1500, HEADER + 1510]),
        ([HEADER // 2], [0, 0]),  # nothing can be said yet about a part without its header
    ],
)
def test_a_cut_connection_is_continued(mirror: Mirror, folder: Path, cuts: list[int], starts: list[int]) -> None:
    mirror.cuts = cuts
    assert obtain(folder).read_bytes() == BODY
    assert mirror.starts() == starts


def test_a_dead_connection_keeps_the_part_for_the_next_time(mirror: Mirror, folder: Path) -> None:
    mirror.cuts = [5000, 0]
    assert "broke off" in refusal(folder)
    assert part_of(folder).read_bytes() == BODY[:5000]
    assert obtain(folder).read_bytes() == BODY
    assert mirror.starts() == [0, 5000, 5000]


def test_an_interrupt_passes_through_and_keeps_the_part(mirror: Mirror, folder: Path) -> None:
    class Interrupted(OSError):
        """Looks like trouble with the disk, and is none."""

    def report(received: int, total: int) -> None:
        if received > total / 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        WeightLibrary([folder]).obtain(FILE, report)
    kept = part_of(folder).stat().st_size
    assert len(BODY) / 2 < kept < len(BODY)
    assert obtain(folder).read_bytes() == BODY
    assert mirror.starts() == [0, kept]


def test_a_server_without_ranges_sends_all_again(mirror: Mirror, folder: Path) -> None:
    part_of(folder, BODY[:5000])
    mirror.ranges = False
    assert obtain(folder).read_bytes() == BODY
    assert len(mirror.asked) == 1


def test_a_server_without_ranges_that_always_breaks_ends_in_a_sentence(mirror: Mirror, folder: Path) -> None:
    mirror.ranges, mirror.cuts = False, [5000] * 9
    assert "broke off" in refusal(folder)
    assert len(mirror.asked) == 2


@pytest.mark.parametrize(
    ("part", "starts"),
    [
        (OTHER[:5000], [5000, 0]),  # the server has a file of another size
        (OTHER[:-1], [len(OTHER) - 1, 0]),  # and this one is shorter than the part: 416
        (PAGE, [0]),
        (b"", [0]),
        (BODY + b"more", [0]),
        (BODY, []),  # all there, only not renamed
    ],
    ids=["other size", "416", "garbage", "empty", "too long", "complete"],
)
def test_a_part_that_was_left(mirror: Mirror, folder: Path, part: bytes, starts: list[int]) -> None:
    part_of(folder, part)
    assert obtain(folder).read_bytes() == BODY
    assert mirror.starts() == starts
    assert names_in(folder) == [FILE]


def test_a_connection_that_falls_silent_is_continued(
    mirror: Mirror, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "TIMEOUT", 0.5)
    mirror.cuts, mirror.pause = [5000], 2
    assert obtain(folder).read_bytes() == BODY
    assert mirror.starts() == [0, 5000]


def test_a_server_that_announces_no_length(mirror: Mirror, folder: Path) -> None:
    mirror.length = -1
    totals: set[int] = set()
    path = WeightLibrary([folder]).obtain(FILE, lambda received, total: totals.add(total))
    assert path.read_bytes() == BODY
    assert totals == {2_000_000}  # the catalogue's


def test_a_body_in_chunks_that_breaks(mirror: Mirror, folder: Path) -> None:
    mirror.body, mirror.chunked, mirror.length = b"%x\r\n" % len(BODY) + BODY[:5000], True, -1
    mirror.ranges = False
    assert "broke off" in refusal(folder)


def test_a_file_that_somebody_puts_there_meanwhile_stays(mirror: Mirror, folder: Path) -> None:
    path = WeightLibrary([folder]).obtain(FILE, lambda received, total: (folder / FILE).write_bytes(OTHER))
    assert path.read_bytes() == OTHER
    assert names_in(folder) == [FILE]


def test_a_length_short_of_the_file(mirror: Mirror, folder: Path) -> None:
    mirror.length = 5000
    assert "the 5,000 bytes that came are not that file" in refusal(folder)
    assert names_in(folder) == []


def test_a_length_beyond_the_file(mirror: Mirror, folder: Path) -> None:
    mirror.body, mirror.length = BODY[:-100], len(BODY)
    assert "broke off" in refusal(folder)
    assert names_in(folder) == [f"{FILE}.part"]


def test_a_page_instead_of_the_file(mirror: Mirror, folder: Path) -> None:
    mirror.body = PAGE
    assert "are not that file" in refusal(folder)
    assert names_in(folder) == []


@pytest.mark.parametrize("right", [True, False])
def test_the_hash_is_checked_where_it_is_known(
    mirror: Mirror, folder: Path, monkeypatch: pytest.MonkeyPatch, right: bool
) -> None:
    digest = hashlib.sha256(BODY if right else OTHER).hexdigest()
    monkeypatch.setitem(ASSETS, FILE, weights.Asset(FILE, 2, digest))
    if right:
        assert obtain(folder).read_bytes() == BODY
    else:
        assert "are not that file" in refusal(folder)
        assert names_in(folder) == []


# Failures a person has to act on: each names the address, the folder, and what to do


def assert_by_hand(message: str, folder: Path) -> None:
    assert f"download {address_of(FILE)} by hand and put it into {folder}" in message


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
def test_refused_by_the_server(mirror: Mirror, folder: Path, status: int) -> None:
    mirror.status = status
    message = refusal(folder)
    assert str(status) in message
    assert_by_hand(message, folder)


def test_offline(mirror: Mirror, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    message = refusal(folder)
    assert "refused" in message
    assert "Check the connection" in message
    assert_by_hand(message, folder)


@pytest.mark.parametrize("endpoint", ["hf-mirror.example", "http://[", "gopher://x", "http://host:port"])
def test_an_endpoint_that_is_no_address(folder: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    message = refusal(folder)
    assert "HF_ENDPOINT" in message
    assert_by_hand(message, folder)


def test_silence(mirror: Mirror, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{mute.getsockname()[1]}")
        message = refusal(folder)
    assert "timed out" in message
    assert_by_hand(message, folder)


def test_a_folder_that_cannot_be_made(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file", encoding="utf-8")
    folder = tmp_path / "models" / "layer_model"
    message = refusal(folder)
    assert f"{folder} cannot be written to" in message
    assert "--layerdiffuse-models-dir" in message
    assert_by_hand(message, folder)


def test_a_disk_that_is_full(mirror: Mirror, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, mode: str) -> IO[bytes]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "open", full)
    message = refusal(folder)
    assert f"{folder} cannot be written to: [Errno {errno.ENOSPC}]" in message
    assert "Make room" in message
    assert_by_hand(message, folder)


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


def test_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / FILE
    path.write_bytes(BODY)
    with caplog.at_level(logging.INFO, logger="layerdiffuse"):
        tensors = read_tensors(path)
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    [record] = caplog.records
    assert record.getMessage().startswith(f"read {FILE} (")


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
