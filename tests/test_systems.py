"""What differs between Windows, macOS and Linux: code that meets it, with the others' ways put in its place."""

import ast
import ctypes
import io
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from examples import client
from lib_layerdiffuse.engine.memory import return_freed_memory
from tools import browser, forge

CHECKOUT = Path(__file__).resolve().parents[1]
IMPOSSIBLE = re.compile(r'[<>:"|?*\\]|[ .](/|$)|(^|/)(con|prn|aux|nul|com\d|lpt\d)(\.|/|$)', re.IGNORECASE)


# --- memory


class Glibc:
    def __init__(self):
        self.trimmed = []
        self.malloc_trim = self.trimmed.append


def windows(name):
    """As ctypes begins to load a library there."""
    return "/" in name


@pytest.mark.parametrize(
    ("platform", "load"),
    [("win32", windows), ("darwin", lambda name: SimpleNamespace()), ("linux", lambda name: SimpleNamespace())],
    ids=["Windows", "macOS", "musl"],
)
def test_where_freed_memory_cannot_be_returned_nothing_happens(monkeypatch, platform, load):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", load)
    return_freed_memory()


def test_glibc_is_asked_to_return_all_freed_memory(monkeypatch):
    libc = Glibc()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    return_freed_memory()
    assert libc.trimmed == [0]


# --- tools


def test_a_link_that_is_not_allowed_is_one_sentence(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise OSError("[WinError 1314] A required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(forge.ForgeError, match=r"1314.*Developer Mode"):
        forge.link(tmp_path, tmp_path / "extensions" / "ours")


def test_on_windows_a_stopped_process_has_ended(monkeypatch):
    """Before, its log is open, and cannot be deleted there."""
    done = []
    monkeypatch.setattr(forge, "WINDOWS", True)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: done.append(command[0]))
    forge.stop_process(SimpleNamespace(pid=1, wait=lambda seconds: done.append("wait")))
    assert done == ["taskkill", "wait"]


@pytest.mark.parametrize(
    ("program", "words", "worker"), [(forge, ["run"], "run"), (client, ["a glass bottle"], "result_of")]
)
def test_texts_are_shown_on_terminals_that_lack_their_letters(monkeypatch, program, words, worker):
    terminal = io.TextIOWrapper(io.BytesIO(), "cp1252")

    def work(_):
        terminal.write("a glass bottle, 玻璃瓶\n")
        return client.Result([], [])

    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "argv", ["program", *words])
    monkeypatch.setattr(program, worker, work)
    program.main()
    terminal.flush()
    assert terminal.buffer.getvalue().decode("cp1252").splitlines() == ["a glass bottle, ???"]


def test_on_windows_no_browser_is_started_to_see_whether_it_runs(monkeypatch, tmp_path):
    (tmp_path / "chrome.exe").touch()
    monkeypatch.setattr(browser, "WINDOWS", True)
    monkeypatch.setattr(subprocess, "run", None)
    assert browser.runs(str(tmp_path / "chrome.exe"))
    assert not browser.runs(str(tmp_path / "chromium.exe"))


# --- files of this repository


def files(pattern):
    visible = [each for each in CHECKOUT.iterdir() if not each.name.startswith(".")]
    return [*CHECKOUT.glob(pattern), *(path for folder in visible for path in folder.rglob(pattern))]


def texts_without_encoding(program):
    """The lines that read or write text in the encoding of the system, which is UTF-8 on some only."""
    for call in ast.walk(ast.parse(program)):
        if isinstance(call, ast.Call) and is_text(call) and "encoding" not in {each.arg for each in call.keywords}:
            yield call.lineno


def is_text(call):
    """Whether it opens or pipes text, unless by a mode that is not written there."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name == "open" and ast.unparse(call.func) not in ("Image.open", "tab.open"):
        given = call.args[1:] if isinstance(call.func, ast.Name) else call.args
        modes = [*given, *(each.value for each in call.keywords if each.arg == "mode")]
        return not modes or (isinstance(modes[0], ast.Constant) and "b" not in modes[0].value)
    return name in ("read_text", "write_text") or any(each.arg == "text" for each in call.keywords)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("open(path)", True),
        ("open(path, 'w', encoding='utf-8')", False),
        ("open(path, 'rb')", False),
        ("path.open()", True),
        ("path.open('a')", True),
        ("path.open(mode='wb')", False),
        ("Image.open(path)", False),
        ("(folder / 'x').read_text()", True),
        ("path.write_text('x', encoding='utf-8')", False),
        ("subprocess.run(command, text=True)", True),
        ("subprocess.run(command, encoding='utf-8')", False),
    ],
)
def test_what_counts_as_text_without_encoding(line, found):
    assert bool(list(texts_without_encoding(line))) == found


def test_texts_say_their_encoding():
    found = {
        str(path.relative_to(CHECKOUT)): lines
        for path in files("*.py")
        if (lines := list(texts_without_encoding(path.read_text(encoding="utf-8"))))
    }
    assert not found


def test_file_names_are_possible_everywhere():
    """On Windows, some characters and names are not; there and on macOS, names that differ in case only are one."""
    names = [path.relative_to(CHECKOUT).as_posix() for path in files("*")]
    assert not [name for name in names if IMPOSSIBLE.search(name)]
    assert not [name for name, count in Counter(map(str.lower, names)).items() if count > 1]
