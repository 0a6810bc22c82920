"""Downloads that many follow: who starts them, who ends them, and what everybody is told."""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from mirror import Mirror, mirrored
from safetensors.torch import save

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.weights import transfer
from lib_layerdiffuse.weights.downloads import Downloads, State
from lib_layerdiffuse.weights.released import ASSETS, Asset

FILE = "vae_transparent_encoder.safetensors"
BODY = save({"a": torch.arange(2000.0)})
DAMAGED = BODY[:-1] + b"!"
PATIENCE = 10  # seconds until a test gives up


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    with mirrored(BODY, monkeypatch) as mirror:
        yield mirror


@pytest.fixture
def slow(mirror: Mirror) -> Mirror:
    """Stops after 5000 bytes, until it is released."""
    mirror.cuts, mirror.pause = [5000], PATIENCE
    return mirror


@pytest.fixture
def downloads(tmp_path: Path) -> Downloads:
    return Downloads(lambda: [tmp_path])


def quiet(text: str, fraction: float) -> None:
    """A report that nobody reads."""


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)


def under_way(downloads: Downloads) -> None:
    until(lambda: downloads.status(FILE).received == 5000)


def state(downloads: Downloads) -> State:
    return downloads.status(FILE).state


def test_missing(downloads: Downloads) -> None:
    status = downloads.status(FILE)
    assert status.asset == ASSETS[FILE]
    assert (status.state, status.received, status.total, status.error) == (State.MISSING, 0, ASSETS[FILE].size, "")
    assert status.fraction == 0


def test_present_in_any_folder_and_left_alone(mirror: Mirror, tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_bytes(b"mine")
    downloads = Downloads(lambda: [tmp_path / "first", tmp_path])
    for status in (downloads.status(FILE), downloads.start(FILE), downloads.cancel(FILE)):
        assert (status.state, status.received, status.total) == (State.PRESENT, 4, 4)
    assert downloads.obtain(FILE, quiet) == path
    assert path.read_bytes() == b"mine"
    assert mirror.asked == []


def test_started_and_followed(slow: Mirror, downloads: Downloads, tmp_path: Path) -> None:
    assert downloads.start(FILE).state is State.DOWNLOADING
    under_way(downloads)
    status = downloads.status(FILE)
    assert (status.state, status.received, status.total) == (State.DOWNLOADING, 5000, len(BODY))
    assert status.fraction == 5000 / len(BODY)
    slow.released.set()
    until(lambda: state(downloads) is State.PRESENT)
    assert (tmp_path / FILE).read_bytes() == BODY
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_all_follow_the_same(slow: Mirror, downloads: Downloads, tmp_path: Path) -> None:
    reports: list[tuple[str, float]] = []
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(downloads.obtain, FILE, lambda *report: reports.append(report)) for _ in range(4)]
        for _ in range(4):
            downloads.start(FILE)
        under_way(downloads)
        until(lambda: any(fraction > 0 for _, fraction in reports))
        slow.released.set()
        assert {future.result(PATIENCE) for future in waiting} == {tmp_path / FILE}
    assert slow.starts() == [0, 5000]  # one connection, and again where it broke
    assert all(FILE in text and 0 <= fraction <= 1 for text, fraction in reports)


@pytest.mark.parametrize("trickle", [False, True], ids=["silent", "trickle"])
def test_cancelled_and_continued_at_once(
    slow: Mirror, downloads: Downloads, tmp_path: Path, caplog: pytest.LogCaptureFixture, trickle: bool
) -> None:
    """Though the connection of the first is open, and silent, or brings a byte now and then: none of these is kept."""
    slow.trickle = trickle
    downloads.start(FILE)
    under_way(downloads)
    status = downloads.cancel(FILE)
    assert (status.state, status.error) == (State.MISSING, "")
    assert status.received >= 5000
    slow.trickle, slow.pause = False, 0
    assert downloads.obtain(FILE, quiet).read_bytes() == BODY
    if not trickle:
        assert 0 not in slow.ended
        slow.released.set()
    until(lambda: all(thread.name != f"download {FILE}" for thread in threading.enumerate()))
    assert slow.starts() == [0, status.received]
    assert caplog.records == []
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_cancelled_before_it_began(slow: Mirror, downloads: Downloads, tmp_path: Path) -> None:
    slow.cuts = [0] * 5  # or one that began in time might get the whole file before it is cancelled
    for _ in range(5):
        downloads.start(FILE)
        downloads.cancel(FILE)
    assert state(downloads) is State.MISSING
    slow.cuts.clear()
    slow.released.set()
    assert downloads.obtain(FILE, quiet).read_bytes() == BODY


def test_a_cancelled_download_is_said_to_those_who_wait(slow: Mirror, downloads: Downloads) -> None:
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(downloads.obtain, FILE, quiet)
        under_way(downloads)
        downloads.cancel(FILE)
        with pytest.raises(LayerDiffuseError, match=f"download of {FILE} was cancelled"):
            waiting.result(PATIENCE)
        slow.released.set()


class Interrupted(Exception):
    """What a job's report raises."""


def interrupt(text: str, fraction: float) -> None:
    if fraction >= 5000 / len(BODY):
        raise Interrupted


def test_an_interrupted_job_ends_its_download(slow: Mirror, downloads: Downloads) -> None:
    with pytest.raises(Interrupted):
        downloads.obtain(FILE, interrupt)
    status = downloads.status(FILE)
    assert (status.state, status.received) == (State.MISSING, 5000)


def test_an_interrupted_job_leaves_a_download_that_was_started(slow: Mirror, downloads: Downloads) -> None:
    downloads.start(FILE)
    with pytest.raises(Interrupted):
        downloads.obtain(FILE, interrupt)
    assert state(downloads) is State.DOWNLOADING


def test_an_interrupted_job_leaves_a_download_that_another_waits_for(slow: Mirror, downloads: Downloads) -> None:
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(downloads.obtain, FILE, quiet)
        under_way(downloads)
        with pytest.raises(Interrupted):
            downloads.obtain(FILE, interrupt)
        assert state(downloads) is State.DOWNLOADING
        slow.released.set()
        assert waiting.result(PATIENCE).read_bytes() == BODY


def test_a_failure_is_told_to_all_and_the_next_start_tries_again(mirror: Mirror, downloads: Downloads) -> None:
    mirror.status = 503
    with pytest.raises(LayerDiffuseError, match="503") as caught:
        downloads.obtain(FILE, quiet)
    status = downloads.status(FILE)
    assert (status.state, status.error) == (State.FAILED, str(caught.value))
    mirror.status = 200
    assert downloads.start(FILE).error == ""
    assert downloads.obtain(FILE, quiet).read_bytes() == BODY
    assert downloads.status(FILE).error == ""


def test_a_failure_that_nobody_thought_of_is_told_too(
    mirror: Mirror, downloads: Downloads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "CHUNK", "many")
    with pytest.raises(LayerDiffuseError, match="str"):
        downloads.obtain(FILE, quiet)
    assert state(downloads) is State.FAILED


@pytest.mark.parametrize("name", ["vae_transparent_encoder", "../" + FILE, "", "VAE_Transparent_Encoder.safetensors"])
def test_a_name_that_is_none_of_ours(downloads: Downloads, name: str) -> None:
    for call in (downloads.status, downloads.start, downloads.cancel, lambda name: downloads.obtain(name, quiet)):
        with pytest.raises(LayerDiffuseError, match=r"There is no weight file .* Did you mean .*safetensors"):
            call(name)


def test_files_do_not_wait_for_each_other(slow: Mirror, downloads: Downloads, tmp_path: Path) -> None:
    other = "vae_transparent_decoder.safetensors"
    downloads.start(FILE)
    under_way(downloads)
    assert downloads.obtain(other, quiet).read_bytes() == BODY
    assert state(downloads) is State.DOWNLOADING


@pytest.mark.parametrize("name", ["x" * 300, "nul\0l", "file/models"], ids=["long", "NUL", "below a file"])
def test_a_folder_that_cannot_be_used_is_said_and_raises_nothing_else(
    mirror: Mirror, tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").write_text("a file", encoding="utf-8")
    downloads = Downloads(lambda: [tmp_path / name])
    assert (state(downloads), downloads.status(FILE).received) == (State.MISSING, 0)
    with pytest.raises(LayerDiffuseError, match="cannot be written to"):
        downloads.obtain(FILE, quiet)
    assert "cannot be written to" in downloads.status(FILE).error
    assert downloads.cancel(FILE).state is State.MISSING


def test_a_server_that_asks_to_wait_is_said_and_need_not_be_waited_for(mirror: Mirror, downloads: Downloads) -> None:
    mirror.refusals = [(503, "30")]
    downloads.start(FILE)
    until(lambda: str(downloads.status(FILE)).endswith("MB (the server asks to wait 30 s)"))
    downloads.cancel(FILE)
    assert downloads.obtain(FILE, quiet).read_bytes() == BODY


def test_two_of_one_program_fetch_a_file_once(slow: Mirror, downloads: Downloads, tmp_path: Path) -> None:
    other = Downloads(lambda: [tmp_path])
    downloads.start(FILE)
    under_way(downloads)
    other.start(FILE)
    until(lambda: "another program is downloading it" in str(other.status(FILE)))
    assert other.status(FILE).received == 5000
    slow.released.set()
    assert other.obtain(FILE, quiet).read_bytes() == BODY
    until(lambda: state(downloads) is State.PRESENT)
    assert slow.starts() == [0, 5000]


# Files with other bytes than the released ones


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if BODY were the released file."""
    monkeypatch.setitem(ASSETS, FILE, Asset(FILE, len(BODY), hashlib.sha256(BODY).hexdigest()))


@pytest.mark.usefixtures("released")
def test_a_damaged_file_is_said_once(downloads: Downloads, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FILE).write_bytes(DAMAGED)
    reports: list[tuple[str, float]] = []
    for _ in range(3):
        downloads.obtain(FILE, lambda *report: reports.append(report))
    assert len(caplog.records) == 1
    assert reports == [(f"Checking {FILE}", 1.0)]
    (tmp_path / FILE).write_bytes(DAMAGED[:-1] + b"?")  # another one
    os.utime(tmp_path / FILE, ns=(0, 1))
    downloads.obtain(FILE, quiet)
    assert len(caplog.records) == 2


@pytest.mark.usefixtures("released")
def test_an_interrupted_look_at_a_file_is_taken_again(
    downloads: Downloads, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE).write_bytes(DAMAGED)
    with pytest.raises(Interrupted):
        downloads.obtain(FILE, interrupt)
    assert caplog.records == []
    downloads.obtain(FILE, quiet)
    assert len(caplog.records) == 1


@pytest.mark.usefixtures("released")
def test_a_download_is_not_looked_at_twice(
    mirror: Mirror, downloads: Downloads, caplog: pytest.LogCaptureFixture
) -> None:
    mirror.body = DAMAGED
    downloads.start(FILE)
    for _ in range(2):
        assert downloads.obtain(FILE, quiet).read_bytes() == DAMAGED
    assert len(caplog.records) == 1
