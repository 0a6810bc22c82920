"""What is done with this checkout, on any system; only Python is needed.

    python tasks.py [--jobs N] TASK ... [-- ARGUMENTS]

One after the other, or N side by side. Each makes the environment that it needs, in .venv. ARGUMENTS go to the last
program of each:

    python tasks.py forge -- --listen
    python tasks.py test-newest -- tests/test_methods.py

OLDEST_PYTHON: what makes the environment of the oldest libraries; default: a Python 3.10, where there is one.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent
WINDOWS = os.name == "nt"
CACHES = (".venv", ".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache")
REQUIREMENTS = {"demo": "examples/requirements.txt"} | {
    name: f"tests/requirements-{name}.txt" for name in ("newest", "oldest", "forge", "page", "bench")
}


@dataclass(frozen=True)
class Task:
    about: str
    environment: str = ""  # whose Python runs the programs; none: the one that runs this
    programs: Sequence[str] = ()  # as they are typed after `python`
    parts: Sequence[str] = ()  # tasks that it consists of
    variables: Mapping[str, str] = field(default_factory=dict)  # of the system's environment


ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # each: the networks in tests are tiny, threads would wait for one another
# What numba compiles is compiled before, once.
UNITS = (
    "-c 'from lib_layerdiffuse.cpu.kernels import compiled; compiled()'",
    "-m pytest --quiet --numprocesses=auto --dist=loadfile",
)
BROWSER = "tools/browser.py"  # where there is none, it is installed
DECODE, INJECTION, REPORT = (f"-m benchmarks.{name}" for name in ("decode", "injection", "report"))
TASKS = {
    "demo": Task("pictures and layers from the tiny world that is included", "demo", ["examples/demo.py"]),
    "test": Task("lint, test-newest and test-oldest", parts=("lint", "test-newest", "test-oldest")),
    "lint": Task("style and types", "newest", ("-m ruff check", "-m ruff format --check", "-m mypy")),
    "test-newest": Task("unit tests on the newest libraries", "newest", UNITS, variables=ONE_THREAD),
    "test-oldest": Task("the same on the oldest", "oldest", UNITS, variables=ONE_THREAD),
    "test-full": Task("unit tests with those that take minutes", "newest", [f'{UNITS[1]} -m ""'], variables=ONE_THREAD),
    "forge": Task("this checkout inside an installed Forge", programs=["tools/forge.py run"]),
    "forge-test": Task("tests that drive a real Forge, one of each kind", "forge", ["-m pytest tests/forge -m brief"]),
    "forge-test-full": Task("all of them, for hours", "forge", ['-m pytest tests/forge -m ""']),
    "ui-test": Task("tests of its page in a browser, one of each", "page", [BROWSER, "-m pytest tests/page -m brief"]),
    "ui-test-full": Task("all of them", "page", [BROWSER, '-m pytest tests/page -m ""']),
    "host-contract": Task(
        "what hosts' patchers must do, in each that is installed", "forge", ["-m pytest tests/hosts"]
    ),
    "host-test": Task("forge-test in the host that HOST names", "forge", ["-m pytest tests/forge -m brief"]),
    "bench": Task("costs beside others, for 20 minutes", "bench", [DECODE, f"{INJECTION} --quick", REPORT]),
    "bench-full": Task("the same for hours", "bench", [f"{DECODE} --full", f"{INJECTION} --full", REPORT]),
    "clean": Task("away with environments and caches", programs=["-c 'import tasks; tasks.clean()'"]),
} | {f".venv/{name}/ready": Task(f"the environment of {file}", name) for name, file in REQUIREMENTS.items()}


def main(words: Sequence[str]) -> None:
    end = words.index("--") if "--" in words else len(words)
    listed = "".join(f"\n{name:20} {task.about}" for name, task in TASKS.items())
    parser = argparse.ArgumentParser(description=__doc__ + listed, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("tasks", nargs="+", metavar="TASK", choices=TASKS)
    asked = parser.parse_args(words[:end])
    names = [part for name in asked.tasks for part in TASKS[name].parts or [name]]
    if asked.jobs == 1:
        for name in names:
            run(TASKS[name], words[end + 1 :])
        return
    environments = dict.fromkeys(TASKS[name].environment for name in names if TASKS[name].environment)
    side_by_side([[f".venv/{each}/ready"] for each in environments], asked.jobs)  # first: no two tasks may make one
    side_by_side([[name, *words[end:]] for name in names], asked.jobs)


def side_by_side(commands: Iterable[Sequence[str]], jobs: int) -> None:
    """Each with what it says in one piece, when it is done. Raises SystemExit after the last, if any failed."""

    def done(command: Sequence[str]) -> bool:
        said = subprocess.run([sys.executable, __file__, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        sys.stdout.buffer.write(said.stdout)
        sys.stdout.flush()
        return said.returncode == 0

    with ThreadPoolExecutor(jobs) as pool:
        if not all(list(pool.map(done, commands))):
            sys.exit(1)


def run(task: Task, arguments: Sequence[str]) -> None:
    if task.environment:
        prepare(task.environment)
    for program in task.programs:
        last = program is task.programs[-1]
        call([python_of(task.environment), *shlex.split(program), *(arguments if last else ())], task.variables)


def call(command: Sequence[str], variables: Mapping[str, str] = {}) -> None:
    print(shlex.join(command), flush=True)
    signal.signal(signal.SIGINT, lambda *_: None)  # the program hears it too, and ends when it has tidied up
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if ended.returncode:
        sys.exit(ended.returncode)


def prepare(environment: str) -> None:
    """Make it anew where it is older than its requirements, or not there at all."""
    requirements, ready = ROOT / REQUIREMENTS[environment], ROOT / ".venv" / environment / "ready"
    if not ready.is_file() or ready.stat().st_mtime < requirements.stat().st_mtime:
        call([*next(filter(runs, makers(environment))), "-m", "venv", "--clear", str(ready.parent)])
        pip = [python_of(environment), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        call([*pip, "-r", str(requirements)])
        ready.touch()


def python_of(environment: str) -> str:
    own = ROOT / ".venv" / environment / ("Scripts/python.exe" if WINDOWS else "bin/python")
    return str(own) if environment else sys.executable


def makers(environment: str) -> list[list[str]]:
    """Commands that may make the environment, the best first."""
    if environment != "oldest":
        return [[sys.executable]]
    installed = sorted(Path.home().glob(".pyenv/versions/3.10.*/bin/python"))
    named = os.environ.get("OLDEST_PYTHON", "python3.10")
    return [[named], ["py", "-3.10"], *([str(path)] for path in installed), [sys.executable]]  # py: on Windows


def runs(command: Sequence[str]) -> bool:
    """A shim may be there with nothing behind it."""
    try:
        return subprocess.run([*command, "-c", ""], capture_output=True).returncode == 0
    except OSError:
        return False


def clean() -> None:
    for folder in filter(Path.is_dir, [*(ROOT / name for name in CACHES), *ROOT.rglob("__pycache__")]):
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
