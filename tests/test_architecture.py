"""That the rooms are as docs/architecture.md says: imports run one way, and hosts are known in their own files only."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "lib_layerdiffuse"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")

# From the top down: each imports what stands below it, and faces not one another.
FACES = {"webui", "cli"}
FLOORS = [*FACES], ["engine"], ["request", "injection"], ["vae"], ["cpu", "weights"], ["nets", "images"]
LEVEL = {room: level for level, rooms in enumerate(reversed(FLOORS), 1) for room in rooms}  # 0: tables and words

HOSTS = {"modules", "modules_forge", "backend", "gradio", "diffusers", "fastapi", "starlette", "comfy", "torchmetrics"}
KNOWING_A_HOST = {"webui", "cli"}  # rooms whose every file may
BACKENDS = {"engine/diffusers.py": {"diffusers"}}  # engine/programs.py imports by name


def modules() -> Iterator[tuple[Path, str]]:
    """Every file of the library with each name that it imports."""
    for path in sorted(LIBRARY.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                yield path.relative_to(LIBRARY), node.module
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    yield path.relative_to(LIBRARY), alias.name


def room_of(name: str) -> str:
    return Path(name).with_suffix("").parts[0]


def test_imports_run_one_way() -> None:
    own = [(path, name.split(".")[1]) for path, name in modules() if name.startswith("lib_layerdiffuse.")]
    assert len(own) > 200
    for path, below in own:
        room = room_of(path.as_posix())
        if room not in (below, "__main__"):
            above, beneath = LEVEL.get(room, 0), LEVEL.get(below, 0)
            assert above > beneath or above == beneath == 0, (path, below)


def test_only_faces_and_backends_import_hosts() -> None:
    for path, name in modules():
        host = name.split(".")[0]
        if host in HOSTS and room_of(path.as_posix()) not in KNOWING_A_HOST:
            assert host in BACKENDS.get(path.as_posix(), ()), (path, name)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:[\w.]+/)+[\w.]*|\w+\.py)`", PAGE))))
def test_what_the_page_names_is_there(name: str) -> None:
    places = (ROOT, LIBRARY, *LIBRARY.iterdir())
    assert any((place / name).exists() for place in places), name


def test_the_page_names_every_room() -> None:
    rooms = {path.name for path in LIBRARY.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert {room for room in rooms if f"{room}/`" not in PAGE} == set()
