"""The tasks: what they run, with which Python, on which system; and that texts name no others."""

import re
import sys
from pathlib import Path

import pytest

import tasks

NAMED = re.compile(r"`(?:make|python tasks\.py) ([a-z-]+)|^(?:make|python tasks\.py) ([a-z-]+)", re.MULTILINE)


@pytest.fixture
def calls(monkeypatch):
    """What would be run."""
    found = []
    monkeypatch.setattr(tasks, "call", lambda command, variables={}: found.append((command, variables)))
    return found


@pytest.fixture
def root(monkeypatch, tmp_path):
    """A checkout with the requirements of one environment."""
    monkeypatch.setattr(tasks, "ROOT", tmp_path)
    monkeypatch.setattr(tasks, "REQUIREMENTS", {"newest": "new.txt"})
    (tmp_path / "new.txt").touch()
    (tmp_path / ".venv" / "newest").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(("windows", "inside"), [(True, "Scripts/python.exe"), (False, "bin/python")])
def test_an_environment_s_python(monkeypatch, windows, inside):
    monkeypatch.setattr(tasks, "WINDOWS", windows)
    assert tasks.python_of("page") == str(tasks.ROOT / ".venv" / "page" / inside)
    assert tasks.python_of("") == sys.executable


def test_the_oldest_environment_is_made_by_the_first_python_3_10_that_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    own = tmp_path / ".pyenv" / "versions" / "3.10.2" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.touch()
    monkeypatch.delenv("OLDEST_PYTHON", raising=False)
    assert tasks.makers("oldest") == [["python3.10"], ["py", "-3.10"], [str(own)], [sys.executable]]
    monkeypatch.setenv("OLDEST_PYTHON", "mine")
    assert tasks.makers("oldest")[0] == ["mine"]
    assert tasks.makers("newest") == [[sys.executable]]
    assert [tasks.runs([name]) for name in (sys.executable, str(tmp_path / "shim"))] == [True, False]


def test_an_environment_is_made_where_there_is_none_or_the_requirements_are_newer(root, calls):
    tasks.prepare("newest")
    (venv, _), (pip, _) = calls
    assert venv == [sys.executable, "-m", "venv", "--clear", str(root / ".venv" / "newest")]
    assert pip[0] == tasks.python_of("newest") and pip[-2:] == ["-r", str(root / "new.txt")]
    tasks.prepare("newest")
    assert len(calls) == 2
    (root / ".venv" / "newest" / "ready").unlink()
    tasks.prepare("newest")
    assert len(calls) == 4


def test_arguments_go_to_the_last_program(monkeypatch, calls):
    monkeypatch.setattr(tasks, "prepare", lambda environment: None)
    tasks.main(["ui-test-full", "lint", "--", "-k", "a b"])
    programs = [command[1:] for command, _ in calls]
    assert programs == [
        ["tools/browser.py"],
        ["-m", "pytest", "tests/page", "-m", "", "-k", "a b"],
        ["-m", "ruff", "check"],
        ["-m", "ruff", "format", "--check"],
        ["-m", "mypy", "-k", "a b"],
    ]
    calls.clear()
    tasks.main(["test"])
    assert [each[-1]["OMP_NUM_THREADS"] for each in calls[3:]] == ["1"] * 4


def test_side_by_side_environments_come_first(monkeypatch):
    found = []
    monkeypatch.setattr(tasks, "side_by_side", lambda commands, jobs: found.append((list(commands), jobs)))
    tasks.main(["--jobs", "2", "test", ".venv/page/ready", "--", "-x"])
    environments = [[f".venv/{name}/ready"] for name in ("newest", "oldest", "page")]
    names = ("lint", "test-newest", "test-oldest", ".venv/page/ready")
    assert found == [(environments, 2), ([[name, "--", "-x"] for name in names], 2)]


def test_what_fails_ends_with_its_code(capfd):
    with pytest.raises(SystemExit) as caught:
        tasks.call([sys.executable, "-c", "print('said'); exit(3)"])
    assert caught.value.code == 3
    assert "\nsaid" in capfd.readouterr().out.replace("\r", "")


def test_a_child_s_words_and_failure_arrive(capfdbinary):
    with pytest.raises(SystemExit):
        tasks.side_by_side([["no such task"], ["--help"]], 2)
    assert b"invalid choice: 'no such task'" in (out := capfdbinary.readouterr().out)
    assert b"test-newest" in out


def test_every_environment_has_its_requirements():
    assert [name for name, file in tasks.REQUIREMENTS.items() if not (tasks.ROOT / file).is_file()] == []
    assert {task.environment for task in tasks.TASKS.values()} - {""} == set(tasks.REQUIREMENTS)


def test_texts_name_only_tasks_that_there_are():
    texts = [path for path in tasks.ROOT.rglob("*.md") if ".venv" not in path.parts]
    named = {a or b for path in texts for a, b in NAMED.findall(path.read_text(encoding="utf-8"))}
    assert {"demo", "test", "forge"} <= named <= tasks.TASKS.keys()
