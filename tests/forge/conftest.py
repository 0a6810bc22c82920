"""One running Forge for all tests of this folder, and what it cost at the end.

Without an installed Forge everything here is skipped; with FORGE_REQUIRED=1 that is an error.
"""

import json
import os
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import pytest
from PIL import Image

from tests import brief
from tests.forge import data
from tests.forge.client import BASE_REQUEST, Forge
from tools.forge import ForgeError, Installation, find_installation, free_port

HERE = Path(__file__).resolve().parent
PLAIN_SERVER, SERVER = "plain", "ours"
# Txt2img jobs without LayerDiffuse, made once by a Forge that does not have the extension.
PLAIN_JOBS = {
    "sd15": {},
    "sd15 4 steps": {"steps": 4},
    "sd15 batch": {"batch_size": 2, "seed": 5},
    "sdxl": {},
}
started = pytest.StashKey[Forge]()


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    brief.mark([item for item in items if HERE in item.path.parents])
    items.sort(key=lambda item: HERE in item.path.parents and item.get_closest_marker("sdxl") is not None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    forge = config.stash.get(started, None)
    if forge is None:
        for reason in {report.longrepr[2] for report in terminalreporter.stats.get("skipped", [])}:
            terminalreporter.line(reason)
        return
    seconds = defaultdict(list)
    for call in forge.calls:
        seconds[call.kind].append(call.seconds)
    terminalreporter.section("Forge")
    terminalreporter.line(
        f"ready after {forge.server.start_seconds:.1f} s; {len(forge.calls)} jobs; log: {forge.server.log}"
    )
    if forge.peak_memory_gb:
        terminalreporter.line(f"peak resident memory {forge.peak_memory_gb:.1f} GB")
    for note in forge.notes:
        terminalreporter.line(note)
    for kind, times in seconds.items():
        terminalreporter.line(f"{median(times):7.1f} s  {len(times):3d} x  {kind}")


@pytest.fixture(scope="session")
def installation() -> Installation:
    try:
        found = find_installation()
    except ForgeError as error:
        if os.environ.get("FORGE_REQUIRED") == "1":
            pytest.exit(str(error), returncode=1)
        pytest.skip(str(error))
    for aside in data.models().rglob("*.aside"):  # left by a run that was ended in the middle
        aside.replace(aside.with_suffix(".safetensors"))
    data.make_models(found)
    return found


@pytest.fixture(scope="session")
def plain_pictures(request: pytest.FixtureRequest, installation: Installation) -> dict[str, Image.Image]:
    """What a Forge without the extension makes of PLAIN_JOBS; kept for this Forge, its models, settings and jobs."""
    settings = {**data.OPTIONS, **installation.host.options}
    jobs = zlib.crc32(json.dumps([BASE_REQUEST, PLAIN_JOBS, settings]).encode())
    folder = data.folder_of("plain-pictures") / f"{installation.commit[:12]}-{jobs:08x}"
    folder.mkdir(parents=True, exist_ok=True)
    sdxl = any(item.get_closest_marker("sdxl") for item in request.session.items)
    files = {name: folder / f"{name}.png" for name in PLAIN_JOBS if sdxl or not name.startswith("sdxl")}
    missing = {name: path for name, path in files.items() if not path.exists()}
    if missing:
        make_plain_pictures(installation, missing)
    return {name: Image.open(path) for name, path in files.items()}


def make_plain_pictures(installation: Installation, files: dict[str, Path]) -> None:
    with data.server(installation, PLAIN_SERVER, {}) as server:
        forge = Forge(server, data.probe_file(PLAIN_SERVER), data.folder_of(PLAIN_SERVER))
        for name, path in files.items():
            forge.use(name.split()[0])
            forge.picture(PLAIN_JOBS[name]).save(path)


@pytest.fixture(scope="session")
def running(request: pytest.FixtureRequest, installation: Installation, plain_pictures: dict) -> Iterator[Forge]:
    hub_port = free_port()  # a download fails at once, unless a test serves it there
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{hub_port}"}
    with data.server(installation, SERVER, data.OURS, environment) as server:
        forge = Forge(server, data.probe_file(SERVER), data.folder_of(SERVER), hub_port)
        request.config.stash[started] = forge
        yield forge
        forge.note_peak_memory()


@pytest.fixture
def forge(running: Forge, request: pytest.FixtureRequest) -> Iterator[Forge]:
    """The server, with the checkpoint that the test's marker asks for. Forge logs scripts' exceptions and goes on."""
    running.use("sdxl" if request.node.get_closest_marker("sdxl") else "sd15")
    mark = running.mark()
    yield running
    assert "*** Error" not in running.logged_since(mark)


@pytest.fixture
def replaced_layer_file() -> Iterator[Callable[[str, "bytes | Path | None"], None]]:
    """Puts something else, or nothing, in a layer file's place; the file is back after the test."""
    moved: list[tuple[Path, Path]] = []

    def replace(name: str, content: "bytes | Path | None") -> None:
        path = data.layer_file(name)
        aside = path.with_suffix(".aside")
        path.rename(aside)
        moved.append((path, aside))
        if isinstance(content, Path):
            path.symlink_to(content)
        elif content is not None:
            path.write_bytes(content)

    yield replace
    for path, aside in moved:
        for left in path.parent.glob(f"{path.name}*"):
            left.unlink()
        aside.rename(path)
