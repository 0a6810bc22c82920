"""The command line as people call it: what needs no model, and how it ends."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lib_layerdiffuse.__main__ import main
from lib_layerdiffuse.cli import commands
from lib_layerdiffuse.images.rgba import over
from lib_layerdiffuse.methods import METHODS
from lib_layerdiffuse.version import own_version
from tests.odd_files import BLUE, CLEAR, RED, bomb, file_of, half

ROOT = Path(__file__).resolve().parents[1]
PICTURES = {
    "fg.png": file_of(half("RGBA", RED, CLEAR)),
    "bg.png": file_of(half("RGB", BLUE[:3], RED[:3])),
    "clear.png": file_of(half("RGBA", CLEAR, BLUE)),
    "large.png": file_of(Image.new("RGB", (5, 7))),
    "old.png": b"old",
    "no picture.png": b"no picture",
    "bomb.png": bomb(20_000, 20_000),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command line is, with some pictures."""
    monkeypatch.chdir(tmp_path)
    for name, content in PICTURES.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(*words: str) -> str:
    """The sentence of a command that fails."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert isinstance(caught.value.code, str)  # Python prints it and exits with 1
    return caught.value.code


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    main(["methods"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(METHODS) and "xl_fg2ble: Blend for a foreground (SDXL)" in lines
    main(["methods", "--json"])
    assert json.loads(capsys.readouterr().out)["xl_fg2ble"] == "Blend for a foreground (SDXL)"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"{own_version()}\n"


@pytest.mark.parametrize(
    ("name", "kind"), [("new.png", "PNG"), ("new.webp", "WEBP"), ("below/new.TIFF", "TIFF"), ("new.jpg", "JPEG")]
)
def test_compose(folder: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str) -> None:
    main(["compose", "fg.png", "bg.png", name])
    assert capsys.readouterr().out == f"{Path(name)}\n"
    expected = over(Image.open(folder / "fg.png"), Image.open(folder / "bg.png"))
    with Image.open(folder / name) as image:
        assert image.format == kind
        assert image.tobytes() == expected.tobytes() or kind == "JPEG"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("fg.png", "bg.png", "old.png"), "old.png is there already. Name another file, or add --overwrite."),
        (("fg.png", "bg.png", "fg.png"), "fg.png is there already"),
        (("fg.png", "bg.png", "new.xyz"), "new.xyz cannot hold a picture. Choose a name that ends in .png or "),
        (("fg.png", "bg.png", "new"), "new cannot hold a picture"),
        (("fg.png", "clear.png", "new.jpg"), "new.jpg cannot hold a picture with transparency"),
        (("fg.png", "bg.png", "old.png/new.png"), "old.png is no folder"),
        (("fg.png", "large.png", "new.png"), "fg.png has 4x2 pixels and large.png 5x7. Make them of one size."),
        (("fg.png", "nothing.png", "new.png"), "No such file: nothing.png"),
        (("no picture.png", "bg.png", "new.png"), "no picture.png is not a whole picture"),
        (("fg.png", "bomb.png", "new.png"), "bomb.png has more than 100,000,000 pixels"),
        ((".", "bg.png", "new.png"), ". cannot be read: "),
    ],
)
def test_what_cannot_be_composed_is_said(folder: Path, words: tuple[str, ...], sentence: str) -> None:
    before = files_in(folder)
    assert sentence in refused("compose", *words)
    assert files_in(folder) == before


def test_a_file_is_replaced_where_that_is_asked_for(folder: Path) -> None:
    main(["compose", "fg.png", "bg.png", "old.png", "--overwrite"])
    with Image.open("old.png") as image:
        assert image.size == (4, 2)
    assert files_in(folder).keys() == PICTURES.keys()


@pytest.mark.parametrize("words", [[], ["nonsense"], ["compose", "fg.png"], ["generate"], ["metrics", "--nonsense"]])
def test_wrong_words_are_a_usage_error(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (MemoryError(), "There is not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "There is not enough memory"),
        (OSError(5, "Input/output error", "some.file"), "some.file: Input/output error."),
        (ImportError("No module named 'tqdm'"), "No module named 'tqdm'. Install what this command needs"),
    ],
)
def test_what_ends_a_command_early_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: object
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(commands, "over", fail)
    with pytest.raises(SystemExit) as caught:
        main(["compose", "fg.png", "bg.png", "new.png"])
    found = caught.value.code
    assert found == code or (isinstance(found, str) and found.startswith(str(code)))
    assert files_in(folder).keys() == PICTURES.keys()


def test_a_fault_of_ours_is_not_hidden(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "over", lambda *_: [][1])
    with pytest.raises(IndexError):
        main(["compose", "fg.png", "bg.png", "new.png"])


def test_names_that_the_terminal_cannot_show_do_not_fail() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="\n")
    commands.say(stream, "图/\udcff.png")
    stream.flush()
    assert stream.buffer.getvalue() == b"\\u56fe/\\udcff.png\n"  # type: ignore[attr-defined]


def test_json_alone_is_on_stdout(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = {"files": ["a.png"], "notes": ["Something was done."]}

    def compose(arguments: object) -> dict[str, list[str]]:
        return answer

    monkeypatch.setattr(commands, "compose", compose)
    main(["compose", "a", "b", "c", "--json"])
    printed = capsys.readouterr()
    assert json.loads(printed.out) == answer
    assert printed.err == "Note: Something was done.\n"


# --- in a process of its own ---


COMPOSE = ("compose", "fg.png", "bg.png", "new.png")


def started(folder: Path, *arguments: str, torch: str = "", **more: object) -> subprocess.Popen[str]:
    """A command in that folder. torch: what stands there in place of the library."""
    if torch:
        (folder / "torch.py").write_text(torch, encoding="utf-8")
    words = [sys.executable, "-m", "lib_layerdiffuse", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [folder, ROOT])), "PYTHONUNBUFFERED": ""}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    return subprocess.Popen(words, cwd=folder, env=environment, encoding="utf-8", **options)


WAITING = "import time; print('here', flush=True); time.sleep(60)"
IN_A_FINALIZER = f"""
class Finalized:
    def __del__(self):
        {WAITING}

Finalized()
time.sleep(60)
"""


@pytest.mark.skipif(os.name == "nt", reason="it has no such signals")
@pytest.mark.parametrize("torch", [WAITING, IN_A_FINALIZER], ids=["importing", "in a finalizer"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_it_without_a_traceback(folder: Path, torch: str, number: int, code: int) -> None:
    with started(folder, *COMPOSE, torch=torch) as process:
        assert process.stdout and process.stdout.readline() == "here\n"
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in said and "Exception" not in said
    assert "new.png" not in files_in(folder)


def test_what_is_not_installed_is_said(folder: Path) -> None:
    with started(folder, *COMPOSE, torch="raise ImportError('No module named torch')") as process:
        _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert said == (
        "No module named torch. Install what this command needs: "
        "pip install -r examples/requirements.txt, or the wheel with [cli]\n"
    )


@pytest.mark.skipif(os.name == "nt", reason="a closed pipe is another error there")
@pytest.mark.parametrize("words", [COMPOSE, ("--help",)])
def test_a_reader_that_has_gone_is_no_fault(folder: Path, words: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with started(folder, *words, stdout=writer) as process:
        os.close(writer)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (1, "")
    assert (folder / "new.png").exists() == ("new.png" in words)
