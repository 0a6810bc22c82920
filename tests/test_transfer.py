"""Downloads from a real server on this machine: with breaks, and with what servers do and disks refuse."""

import errno
import gc
import hashlib
import io
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from email.utils import format_datetime, parsedate_to_datetime
from itertools import pairwise
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mirror import Mirror, mirrored
from safetensors.torch import save

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.weights import files, part, released, transfer
from lib_layerdiffuse.weights.library import WeightLibrary
from lib_layerdiffuse.weights.part import LeftError
from lib_layerdiffuse.weights.released import ASSETS, address_of
from lib_layerdiffuse.weights.transfer import Transfer

FILE = "vae_transparent_encoder.safetensors"
BODY = save({"a": torch.arange(2000.0), "b": torch.ones(3, 4, dtype=torch.float16)}, {"note": "8 kB of weights"})
HEADER = 8 + int.from_bytes(BODY[:8], "little")
RETRAINED = BODY[:HEADER] + bytes(len(BODY) - HEADER)  # of the same layout and size
LONGER = save({"a": torch.arange(3000.0)})
PAGE = b"<!DOCTYPE html><title>Sign in</title>"
ALL = len(BODY)
PATIENCE = 10  # seconds until a test gives up


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    with mirrored(BODY, monkeypatch) as mirror:
        yield mirror


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models" / "layer_model"


@pytest.fixture
def know(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Makes this body the released one, whose hash is known."""
    return lambda body: monkeypatch.setitem(
        ASSETS, FILE, released.Asset(FILE, len(body), hashlib.sha256(body).hexdigest())
    )


def part_of(folder: Path, content: bytes | None = None, etag: str = "") -> Path:
    """The unfinished file, with this content."""
    path = folder / f"{FILE}.part"
    if content is not None:
        folder.mkdir(parents=True)
        path.write_bytes(content)
    if etag:
        path.with_name(f"{path.name}.etag").write_text(etag, encoding="ascii")
    return path


def names_in(folder: Path) -> set[str]:
    """But for the lock's, which stays until the file is there."""
    return {path.name for path in folder.iterdir()} - {f"{FILE}.lock"}


def quiet(received: int, total: int) -> None:
    """A report that nobody reads."""


def obtain(folder: Path, report: files.Report = quiet) -> Path:
    return WeightLibrary([folder]).obtain(FILE, report)


def refusal(folder: Path, report: files.Report = quiet) -> str:
    with pytest.raises(LayerDiffuseError) as caught:
        obtain(folder, report)
    return str(caught.value)


# What comes


def test_download(mirror: Mirror, folder: Path) -> None:
    reports: list[tuple[int, int]] = []
    path = obtain(folder, lambda *report: reports.append(report))
    assert path == folder / FILE
    assert path.read_bytes() == BODY
    assert [each.name for each in folder.iterdir()] == [FILE]
    assert {total for _, total in reports} == {ALL}
    received = [0, *(received for received, _ in reports)]
    assert received[-1] == ALL
    assert all(0 < after - before <= 1000 for before, after in pairwise(received))


def test_request_names_the_program_and_no_compression(mirror: Mirror, folder: Path) -> None:
    obtain(folder)
    [(path, headers)] = mirror.asked
    assert path == f"/LayerDiffusion/layerdiffusion-v1/resolve/{released.REVISION}/{FILE}"
    assert headers["user-agent"] == "sd-forge-layerdiffuse"
    assert headers["accept-encoding"] == "identity"
    assert "authorization" not in headers


def test_a_mirror_without_the_revision_gives_its_latest(mirror: Mirror, folder: Path) -> None:
    mirror.revisions = "/resolve/main/"
    mirror.cuts = [5000]
    assert obtain(folder).read_bytes() == BODY
    assert [path.split("/")[-2] for path, _ in mirror.asked] == [released.REVISION, "main", "main"]


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
    assert [headers.get("if-range") for _, headers in mirror.asked] == [
        mirror.tag() if start else None for start in starts
    ]


def test_a_dead_connection_keeps_the_part_for_the_next_time(mirror: Mirror, folder: Path) -> None:
    mirror.cuts = [5000, 0]
    assert "broke off" in refusal(folder)
    assert part_of(folder).read_bytes() == BODY[:5000]
    assert obtain(folder).read_bytes() == BODY
    assert mirror.starts() == [0, 5000, 5000]
    assert [path.name for path in folder.iterdir()] == [FILE]


def test_an_interrupt_passes_through_and_keeps_the_part(mirror: Mirror, folder: Path) -> None:
    class Interrupted(OSError):
        """Looks like trouble with the disk, and is none."""

    def report(received: int, total: int) -> None:
        if received > total / 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        obtain(folder, report)
    kept = part_of(folder).stat().st_size
    assert ALL / 2 < kept < ALL
    assert obtain(folder).read_bytes() == BODY
    assert mirror.starts() == [0, kept]


def test_each_byte_of_a_slow_line_is_heard_of(mirror: Mirror, folder: Path) -> None:
    mirror.holds, mirror.pause = [HEADER + 1], PATIENCE

    def report(received: int, total: int) -> None:
        if received == HEADER + 1:
            mirror.released.set()

    assert obtain(folder, report).read_bytes() == BODY
    assert mirror.held == [True]


def test_a_server_without_ranges_sends_all_again(mirror: Mirror, folder: Path) -> None:
    part_of(folder, BODY[:5000], mirror.tag())
    mirror.ranges = False
    assert obtain(folder).read_bytes() == BODY
    assert len(mirror.asked) == 1


def test_a_server_without_ranges_that_always_breaks_ends_in_a_sentence(mirror: Mirror, folder: Path) -> None:
    mirror.ranges, mirror.cuts = False, [5000] * 9
    assert "broke off" in refusal(folder)
    assert len(mirror.asked) == 2


def test_a_connection_that_falls_silent_is_continued(
    mirror: Mirror, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "TIMEOUT", 0.5)
    mirror.cuts, mirror.pause = [5000], 2
    assert obtain(folder).read_bytes() == BODY
    assert mirror.starts() == [0, 5000]


def test_a_server_that_announces_no_length(mirror: Mirror, folder: Path) -> None:
    mirror.length = -1
    totals: set[int] = set()
    assert obtain(folder, lambda received, total: totals.add(total)).read_bytes() == BODY
    assert totals == {ASSETS[FILE].size}


def test_a_body_in_chunks_that_breaks(mirror: Mirror, folder: Path) -> None:
    mirror.body, mirror.chunked, mirror.length = b"%x\r\n" % ALL + BODY[:5000], True, -1
    mirror.ranges = False
    assert "broke off" in refusal(folder)


def test_a_file_that_somebody_puts_there_meanwhile_stays(mirror: Mirror, folder: Path) -> None:
    path = obtain(folder, lambda received, total: (folder / FILE).write_bytes(LONGER))
    assert path.read_bytes() == LONGER
    assert names_in(folder) == {FILE}


def test_a_length_short_of_the_file(mirror: Mirror, folder: Path) -> None:
    mirror.length = 5500
    assert "the 5,500 bytes that came are not that file" in refusal(folder)
    assert names_in(folder) == set()


def test_a_connection_that_stays_open_is_not_waited_for(mirror: Mirror, folder: Path) -> None:
    mirror.pause = PATIENCE
    assert obtain(folder).read_bytes() == BODY
    assert mirror.ended == []


def test_a_length_beyond_the_file(mirror: Mirror, folder: Path) -> None:
    mirror.body, mirror.length = BODY[:-100], ALL
    assert "broke off" in refusal(folder)
    assert names_in(folder) == {f"{FILE}.part", f"{FILE}.part.etag"}


def test_a_page_instead_of_the_file(mirror: Mirror, folder: Path) -> None:
    mirror.body = PAGE
    assert "are not that file" in refusal(folder)
    assert names_in(folder) == set()


# What belongs together


SAME, ANOTHER, NONE = "{same}", '"another"', ""


@pytest.mark.parametrize(
    ("content", "etag", "known", "conditions", "starts"),
    [
        (BODY[:5000], SAME, False, True, [5000]),
        (BODY[:5000], ANOTHER, False, True, [5000]),  # answered with all of it
        (BODY[:5000], ANOTHER, False, False, [5000, 0]),
        (BODY[:5000], ANOTHER, True, False, [5000, 0]),
        (BODY[:5000], NONE, True, True, [5000]),  # as older versions left it
        (BODY[:5000], NONE, False, True, [0]),
        (BODY[:5000], 'W/"weak"', False, True, [0]),
        (BODY[:5000], '"two"\r\nlines', False, True, [0]),
        (RETRAINED[:5000], NONE, True, True, [5000, 0]),  # which only the hash tells
        (RETRAINED, NONE, True, True, [0]),
        (RETRAINED, NONE, False, True, [0]),
        (BODY, SAME, False, True, []),  # all there, only not renamed
        (BODY, NONE, True, True, []),
        (LONGER[:5000], SAME, False, True, [5000, 0]),  # the server has a file of another size
        (LONGER[:-1], SAME, False, True, [len(LONGER) - 1, 0]),  # and this one is shorter than the part: 416
        (PAGE, SAME, False, True, [0]),
        (b"", SAME, False, True, [0]),
        (BODY + b"more", SAME, False, True, [0]),
    ],
)
def test_a_part_that_was_left(
    mirror: Mirror,
    folder: Path,
    know: Callable[[bytes], None],
    content: bytes,
    etag: str,
    known: bool,
    conditions: bool,
    starts: list[int],
) -> None:
    if known:
        know(BODY)
    mirror.conditions = conditions
    part_of(folder, content, mirror.tag() if etag is SAME else etag)
    assert obtain(folder).read_bytes() == BODY
    assert mirror.starts() == starts
    assert [path.name for path in folder.iterdir()] == [FILE]


@pytest.mark.parametrize(
    ("etag", "known", "conditions", "starts"),
    [
        (None, False, True, [0, 5000]),
        (None, False, False, [0, 5000, 0]),
        ("", False, True, [0, 0]),
        ('W/"1"', False, True, [0, 0]),
        ("", True, True, [0, 5000, 0]),
        ('W/"1"', True, True, [0, 5000, 0]),
        ('"wrongly the same"', True, True, [0, 5000, 0]),
    ],
)
def test_a_file_that_changes_on_the_server_is_never_mixed(
    mirror: Mirror,
    folder: Path,
    know: Callable[[bytes], None],
    etag: str | None,
    known: bool,
    conditions: bool,
    starts: list[int],
) -> None:
    if known:
        know(BODY)
    mirror.body, mirror.etag, mirror.conditions, mirror.cuts = RETRAINED, etag, conditions, [5000]

    def report(received: int, total: int) -> None:
        if received == 5000:
            mirror.body = BODY

    assert obtain(folder, report).read_bytes() == BODY
    assert mirror.starts() == starts


def test_pieces_that_never_belong_together_end_in_a_sentence(
    mirror: Mirror, folder: Path, know: Callable[[bytes], None]
) -> None:
    know(RETRAINED)
    mirror.cuts = [5000, ALL, 5000, ALL]
    assert "what came in pieces is not that file" in refusal(folder)
    assert mirror.starts() == [0, 5000, 0, 5000]
    assert names_in(folder) == set()


@pytest.mark.parametrize("right", [True, False])
def test_another_hash_is_a_warning(
    mirror: Mirror, folder: Path, know: Callable[[bytes], None], caplog: pytest.LogCaptureFixture, right: bool
) -> None:
    know(BODY if right else RETRAINED)
    assert obtain(folder).read_bytes() == BODY
    assert len(mirror.asked) == 1
    assert [record.getMessage().split(" has ")[0] for record in caplog.records] == [str(folder / FILE)] * (not right)
    assert right or ASSETS[FILE].sha256 in caplog.text
    assert right or "delete it" in caplog.text


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


@pytest.mark.parametrize(
    "endpoint",
    [
        "hf-mirror.example",
        "http://[",
        "gopher://x",
        "http://host:port",
        "http://127.0.0.1:" + 30 * "9",
        "http://a b",
        "http://127.0.0.1:1/ü",
    ],
)
def test_an_endpoint_that_is_no_address(folder: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    message = refusal(folder)
    assert "HF_ENDPOINT" in message
    assert_by_hand(message, folder)


def test_silence(mirror: Mirror, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{mute.getsockname()[1]}")
        message = refusal(folder)
    assert "timed out" in message
    assert_by_hand(message, folder)


def with_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", os.environ["HF_ENDPOINT"].replace("://", "://me:s%65cret@"))


def test_credentials_of_a_mirror_are_for_it_alone(
    mirror: Mirror, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    storage = os.environ["HF_ENDPOINT"]
    with mirrored(b"", monkeypatch) as first, caplog.at_level(logging.DEBUG):
        with_credentials(monkeypatch)
        first.elsewhere = storage
        assert obtain(folder).read_bytes() == BODY
        assert [headers["authorization"] for _, headers in first.asked] == ["Basic bWU6c2VjcmV0"]  # me:secret
        assert ["authorization" in headers for _, headers in mirror.asked] == [False]
        assert "cret" not in caplog.text


@pytest.mark.parametrize("status", [401, 503])
def test_credentials_stand_in_no_error(
    mirror: Mirror, folder: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    mirror.status = status
    with_credentials(monkeypatch)
    message = refusal(folder)
    assert "cret" not in message
    assert_by_hand(message, folder)


# Servers that ask for patience


def test_a_server_that_asks_to_wait_is_waited_for(
    mirror: Mirror, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mirror.refusals = [(429, "1")]
    notes: set[str] = set()
    download = Transfer(ASSETS[FILE], folder, lambda received, total: notes.add(download.note))
    assert download.run().read_bytes() == BODY
    assert notes == {"the server asks to wait 1 s", ""}
    assert f"{FILE}: the server asks to wait 1 s" in caplog.text


def test_while_a_server_is_waited_for_an_interrupt_is_felt(mirror: Mirror, folder: Path) -> None:
    mirror.refusals = [(503, "30")]
    with pytest.raises(InterruptedError):
        obtain(folder, raising(InterruptedError()))
    assert len(mirror.asked) == 1


def test_while_a_server_is_waited_for_it_can_be_stopped(mirror: Mirror, folder: Path) -> None:
    mirror.refusals = [(503, "30")]
    ends: list[BaseException] = []

    def run() -> None:
        with pytest.raises(LeftError) as caught:
            download.run()
        ends.append(caught.value)

    download = Transfer(ASSETS[FILE], folder, lambda received, total: download.stop())
    thread = Thread(target=run)
    thread.start()
    thread.join(PATIENCE)
    assert len(ends) == len(mirror.asked) == 1


@pytest.mark.parametrize("waits", [["3600"], ["1", "1"], ["Fri, 31 Dec 2999 23:59:59 GMT"]])
def test_a_server_that_asks_for_too_much_is_not(
    mirror: Mirror, folder: Path, monkeypatch: pytest.MonkeyPatch, waits: list[str]
) -> None:
    monkeypatch.setattr(transfer, "PATIENCE", 1.5)
    mirror.refusals = [(429, wait) for wait in waits]
    message = refusal(folder)
    assert "HTTP Error 429" in message
    assert "Try again then" in message
    assert len(mirror.asked) == len(waits)


NOW = parsedate_to_datetime("Wed, 21 Oct 2015 07:28:00 GMT")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7),
        ("0", 1),
        ("Wed, 21 Oct 2015 07:28:10 GMT", 10),
        ("Wed, 21 Oct 2015 07:27:10 GMT", 1),
        (format_datetime(NOW), 1),
        (None, float("inf")),
        ("", float("inf")),
        ("-5", float("inf")),
        ("soon", float("inf")),
        ("9" * 400, float("inf")),
    ],
)
def test_retry_after(monkeypatch: pytest.MonkeyPatch, value: str | None, seconds: float) -> None:
    monkeypatch.setattr(transfer.time, "time", NOW.timestamp)
    answer: Any = SimpleNamespace(headers={"Retry-After": value})
    assert transfer.retry_after(answer) == seconds


# What the disk refuses


def raising(error: Exception) -> Callable[..., Any]:
    def refuse(*_: object, **__: object) -> Any:
        raise error

    return refuse


@pytest.mark.parametrize("name", ["file/layer_model", "x" * 300, "nul\0l"], ids=["below a file", "long", "NUL"])
def test_a_folder_that_cannot_be_made(mirror: Mirror, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("a file", encoding="utf-8")
    folder = tmp_path / name
    message = refusal(folder)
    assert f"{folder} cannot be written to" in message
    assert "--layerdiffuse-models-dir" in message
    assert_by_hand(message, folder)
    assert mirror.asked == []


@pytest.mark.parametrize("rights", [0o000, 0o555])
def test_a_folder_without_rights(mirror: Mirror, tmp_path: Path, rights: int) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    folder.chmod(rights)
    try:
        if os.access(folder, os.W_OK):
            pytest.skip("nothing keeps this user from writing")
        assert "cannot be written to" in refusal(folder)
    finally:
        folder.chmod(0o755)


@pytest.mark.parametrize("kind", ["folder", "link to nothing"])
def test_something_else_of_that_name_is_left_alone(mirror: Mirror, folder: Path, kind: str) -> None:
    target = folder / FILE
    folder.mkdir(parents=True)
    if kind == "folder":
        target.mkdir()
    else:
        with suppress(OSError):  # Windows: no right to make links
            target.symlink_to(folder / "nothing")
        if not target.is_symlink():
            pytest.skip("no links here")
    assert f"{target} is there, but is no file" in refusal(folder)
    assert mirror.asked == []
    assert names_in(folder) == {FILE}


def through(monkeypatch: pytest.MonkeyPatch, write: Callable[[Any, bytes], int]) -> None:
    """Makes this what writes into a part's open file."""
    opened = part.Part._opened

    def wrapped(self: part.Part) -> Any:
        file = opened(self)
        return SimpleNamespace(truncate=file.truncate, write=lambda piece: write(file, piece))

    monkeypatch.setattr(part.Part, "_opened", wrapped)


def test_a_disk_that_is_full_keeps_what_came(mirror: Mirror, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(file: Any, piece: bytes) -> int:
        room = 5500 - os.fstat(file.fileno()).st_size
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return file.write(piece[:room])

    with monkeypatch.context() as full:
        through(full, write)
        message = refusal(folder)
    assert f"{folder} cannot be written to: [Errno {errno.ENOSPC}]" in message
    assert "Make room" in message
    assert_by_hand(message, folder)
    assert part_of(folder).read_bytes() == BODY[:5500]
    assert obtain(folder).read_bytes() == BODY
    assert mirror.starts() == [0, 5500]


def test_a_disk_that_takes_less_at_once(mirror: Mirror, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    through(monkeypatch, lambda file, piece: file.write(piece[:300]))
    assert obtain(folder).read_bytes() == BODY


def test_a_name_that_cannot_be_given_keeps_what_came(
    mirror: Mirror, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows, where another program may have the part open."""
    with monkeypatch.context() as busy:
        busy.setattr(Path, "replace", raising(PermissionError(errno.EACCES, "used by another process")))
        assert "used by another process" in refusal(folder)
    assert obtain(folder).read_bytes() == BODY
    assert mirror.starts() == [0]


def test_a_part_that_cannot_be_deleted(mirror: Mirror, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror.body = PAGE
    monkeypatch.setattr(Path, "unlink", raising(PermissionError(errno.EACCES, "used by another process")))
    assert "used by another process" in refusal(folder)


def test_the_part_is_closed_when_it_gets_its_name(
    mirror: Mirror, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows nothing that is open gets another name."""
    replace = Path.replace
    still_open: list[object] = []

    def look(self: Path, target: Path) -> Path:
        files = [each for each in gc.get_objects() if type(each) is io.FileIO and not each.closed]
        still_open.extend(file for file in files if str(file.name) == str(self))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", look)
    assert obtain(folder).read_bytes() == BODY
    assert still_open == []
