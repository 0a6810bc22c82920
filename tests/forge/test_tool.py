"""tools/forge.py, with a stand-in for Forge that starts at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.forge import CHECKOUT, EXTENSION, ForgeError, Installation, Server, find_installation, link

READY = "import sys, time\nprint(sys.argv)\nprint('Startup time: 0.1s', flush=True)\ntime.sleep(60)\n"
BROKEN = "print('no module named torch')\nraise SystemExit(3)\n"
SILENT = "import time\ntime.sleep(60)\n"


@pytest.fixture
def stand_in(tmp_path):
    def make(program):
        (tmp_path / "launch.py").write_text(program, encoding="utf-8")
        return Installation(tmp_path, Path(sys.executable))

    return make


def test_a_missing_forge_is_one_sentence(tmp_path):
    with pytest.raises(ForgeError, match="FORGE_DIR"):
        find_installation({"FORGE_DIR": str(tmp_path)})


def test_a_missing_interpreter_is_one_sentence(stand_in, tmp_path):
    stand_in(READY)
    with pytest.raises(ForgeError, match="FORGE_PYTHON"):
        find_installation({"FORGE_DIR": str(tmp_path)})


def test_a_server_starts_and_is_stopped(stand_in, tmp_path):
    with Server(stand_in(READY), tmp_path / "log", ["--port-of-call", "8"]) as server:
        assert server.process.poll() is None
        assert "--port-of-call" in server.text()
    assert server.process.poll() is not None


@pytest.mark.parametrize(("program", "told"), [(BROKEN, "no module named torch"), (SILENT, "not ready within")])
def test_a_server_that_does_not_start_is_stopped_and_says_why(stand_in, tmp_path, program, told):
    server = Server(stand_in(program), tmp_path / "log", start_limit_s=2)
    with pytest.raises(ForgeError, match=told), server:
        pass
    assert server.process.poll() is not None


def test_a_link_is_renewed_and_anything_else_is_left_alone(tmp_path):
    for source in ("one", "two"):
        (tmp_path / source).mkdir()
        link(tmp_path / source, tmp_path / "extensions" / "ours")
    assert (tmp_path / "extensions" / "ours").resolve() == (tmp_path / "two").resolve()
    with pytest.raises(ForgeError, match="not a link"):
        link(tmp_path / "two", tmp_path / "one")


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_run_ends_with_forge_on_ctrl_c(stand_in, tmp_path):
    stand_in(READY)
    environment = {**os.environ, "FORGE_DIR": str(tmp_path), "FORGE_PYTHON": sys.executable, "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(CHECKOUT / "tools" / "forge.py"), "run", "--theme", "dark"]
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells have background jobs ignore it
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "ready at http" in line:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0, lines
    assert any("'--theme', 'dark'" in line for line in lines)
    assert (tmp_path / "extensions" / EXTENSION).resolve() == CHECKOUT
