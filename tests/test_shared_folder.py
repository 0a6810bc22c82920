"""Programs that share a folder of weights: one downloads a file, others wait, or go on where it was killed."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen
from threading import Thread

import filelock
import pytest
import torch
from mirror import Mirror, mirrored
from safetensors.torch import save

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.weights.downloads import Downloads, State
from lib_layerdiffuse.weights.library import WeightLibrary

FILE = "vae_transparent_encoder.safetensors"
BODY = save({"a": torch.arange(1_500_000.0)})  # 6 MB
HOLD = 1_000_000  # bytes after which the first connection stops
PATIENCE = 120  # seconds until a test gives up; programs take some to start

PROGRAM = """
import json, sys
from pathlib import Path
from lib_layerdiffuse.weights.library import WeightLibrary
sys.stdout.write("ready\\n"); sys.stdout.flush(); sys.stdin.readline()
def report(received, total):
    sys.stdout.write(json.dumps(received) + "\\n"); sys.stdout.flush()
WeightLibrary([Path(sys.argv[1])]).obtain(sys.argv[2], report)
"""


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    with mirrored(BODY, monkeypatch) as mirror:
        mirror.pause, mirror.holds = PATIENCE, [HOLD]
        yield mirror


class Program:
    """Another process that obtains the file; begins when it is told to."""

    def __init__(self, folder: Path) -> None:
        root = Path(__file__).parents[1]
        words = [sys.executable, "-c", PROGRAM, str(folder), FILE]
        self.process = Popen(words, cwd=root, stdin=PIPE, stdout=PIPE, stderr=PIPE, encoding="utf-8")
        self.received: list[int] = []
        Thread(target=self._listen, daemon=True).start()
        self.ready = False

    def _listen(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("ready"):
                self.ready = True
            else:
                self.received.append(json.loads(line))

    def begin(self) -> None:
        until(lambda: self.ready)
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> None:
        assert self.process.wait(PATIENCE) == 0


@contextmanager
def programs(folder: Path, count: int) -> Iterator[list[Program]]:
    started = [Program(folder) for _ in range(count)]
    try:
        yield started
    finally:
        for program in started:
            program.process.kill()
            program.process.communicate()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)


def test_two_programs_download_a_file_once(mirror: Mirror, tmp_path: Path) -> None:
    with programs(tmp_path, 2) as both:
        for program in both:
            program.begin()
        until(lambda: all(program.received[-1:] == [HOLD] for program in both))  # one receives, one looks on
        mirror.released.set()
        for program in both:
            program.end()
    assert (tmp_path / FILE).read_bytes() == BODY
    assert mirror.starts() == [0]
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_who_waits_goes_on_where_the_other_was_killed(mirror: Mirror, tmp_path: Path) -> None:
    downloads = Downloads(lambda: [tmp_path])
    with programs(tmp_path, 1) as [other]:
        other.begin()
        until(lambda: other.received[-1:] == [HOLD])
        downloads.start(FILE)
        until(lambda: "another program is downloading it" in str(downloads.status(FILE)))
        assert mirror.starts() == [0]
        other.process.kill()
        until(lambda: downloads.status(FILE).state is State.PRESENT)
    assert (tmp_path / FILE).read_bytes() == BODY
    assert mirror.starts() == [0, HOLD]


def test_who_waits_for_another_program_can_be_stopped(mirror: Mirror, tmp_path: Path) -> None:
    downloads = Downloads(lambda: [tmp_path])
    with programs(tmp_path, 1) as [other]:
        other.begin()
        until(lambda: other.received[-1:] == [HOLD])
        downloads.start(FILE)
        until(lambda: downloads.status(FILE).note != "")
        assert downloads.cancel(FILE).state is State.MISSING
        mirror.released.set()
        other.end()
    assert (tmp_path / FILE).read_bytes() == BODY


def test_a_lock_that_was_left_holds_nobody_up(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / f"{FILE}.lock").touch()
    mirror.holds = []
    mirror.pause = 0
    assert WeightLibrary([tmp_path]).obtain(FILE, lambda received, total: None).read_bytes() == BODY
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


# As different versions of filelock and different systems say that a folder has no locks
NO_LOCKS = [NotImplementedError("no flock"), OSError(37, "No locks available"), filelock.Timeout("the file")]


@pytest.fixture(params=NO_LOCKS, ids=lambda error: type(error).__name__)
def lockless(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise request.param

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)


@pytest.mark.usefixtures("lockless")
def test_without_locks_everybody_downloads_alone(mirror: Mirror, tmp_path: Path) -> None:
    both = [Downloads(lambda: [tmp_path]) for _ in range(2)]
    both[0].start(FILE)
    until(lambda: both[0].status(FILE).received == HOLD)
    assert both[1].obtain(FILE, lambda text, fraction: None).read_bytes() == BODY
    mirror.released.set()
    until(lambda: len(list(tmp_path.iterdir())) == 1)
    assert (tmp_path / FILE).read_bytes() == BODY
    assert mirror.starts() == [0, 0]


@pytest.mark.usefixtures("lockless")
def test_without_locks_nothing_is_left_of_what_broke_off(mirror: Mirror, tmp_path: Path) -> None:
    mirror.holds, mirror.pause, mirror.cuts = [], 0, [HOLD, 0]
    with pytest.raises(LayerDiffuseError, match="the connection broke off"):
        WeightLibrary([tmp_path]).obtain(FILE, lambda received, total: None)
    assert list(tmp_path.iterdir()) == []
