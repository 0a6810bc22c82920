"""An installed web UI of Forge's family: find it, start it, stop it. Standard library only.

    python tools/forge.py run [arguments for it]     this checkout inside it, until Ctrl-C

HOST          which of HOSTS; default forge
FORGE_DIR     where it is installed; default as in HOSTS. NEO_DIR, REFORGE_DIR … of the others
FORGE_PYTHON  the interpreter it runs with; default the one in its own venv. NEO_PYTHON … of the others
"""

import argparse
import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

EXTENSION = "sd-forge-layerdiffuse"
CHECKOUT = Path(__file__).resolve().parents[1]
WINDOWS = os.name == "nt"
VENV_PYTHON = "Scripts/python.exe" if WINDOWS else "bin/python"


@dataclass(frozen=True)
class Host:
    """How one web UI is started: where it is, and arguments that not all of them know."""

    folder: str
    always: tuple[str, ...] = ()
    without_gpu: tuple[str, ...] = ("--always-cpu", "--attention-pytorch")
    models: str = "--models-dir"  # before the folder of models
    half: tuple[str, ...] = ("--unet-in-fp16",)  # the UNet, in memory
    options: Mapping[str, object] = field(default_factory=dict)  # of its settings


# The installation is taken as it is: nothing is installed, updated or downloaded.
ALWAYS = ("--skip-install", "--skip-version-check", "--no-hashing", "--api")
LOGGING = ("--no-download-sd-model", "--loglevel", "INFO")
HOSTS: Mapping[str, Host] = {
    "forge": Host("~/stable-diffusion-webui-forge", LOGGING),
    "neo": Host(
        "~/sd-webui-forge-neo",
        ("--skip-python-version-check", "--loglevel", "INFO"),
        ("--cpu", "--use-pytorch-cross-attention"),
        "--model-ref",
        ("--fp16-unet",),
        {"VERSION_UID": "PY313"},  # without it, it asks a question at the start
    ),
    "reforge": Host("~/stable-diffusion-webui-reForge", ("--skip-prepare-environment", *LOGGING)),
    "classic": Host(
        "~/sd-webui-forge-classic",
        ("--skip-prepare-environment", *LOGGING),
        models="--model-ref",
        options={"skip_early_cond": -1.0},  # at its own, 0, the first step goes without CFG
    ),
    "ersatz": Host("~/ersatzForge"),
}

# The API answers before the scripts' default arguments exist, and then runs jobs with every script off; Forge
# writes this line when all is there.
READY = "Startup time:"
START_LIMIT_S = 300
STOP_LIMIT_S = 15


class ForgeError(Exception):
    """Why Forge cannot be used, in one sentence."""


@dataclass(frozen=True)
class Installation:
    directory: Path
    python: Path
    host: Host = HOSTS["forge"]

    @functools.cached_property
    def commit(self) -> str:
        return answer("git", "-C", str(self.directory), "rev-parse", "HEAD") or "unknown"

    @functools.cached_property
    def has_gpu(self) -> bool:
        return answer(str(self.python), "-c", "import torch; print(torch.cuda.is_available())") == "True"

    @property
    def device_arguments(self) -> tuple[str, ...]:
        return () if self.has_gpu else ("--skip-torch-cuda-test", *self.host.without_gpu)


def answer(*command: str) -> str:
    """What a program prints."""
    return subprocess.run(command, check=False, capture_output=True, encoding="utf-8").stdout.strip()


def find_installation(environment: Mapping[str, str] = os.environ) -> Installation:
    name = environment.get("HOST", "forge")
    if name not in HOSTS:
        raise ForgeError(f"There is no host {name}. Set HOST to one of {', '.join(HOSTS)}.")
    host, prefix = HOSTS[name], name.upper()
    directory = Path(environment.get(f"{prefix}_DIR", host.folder)).expanduser().absolute()
    if not (directory / "launch.py").is_file():
        raise ForgeError(f"No web UI ({name}) in {directory}: install it there, or name its folder in {prefix}_DIR.")
    python = Path(environment.get(f"{prefix}_PYTHON", directory / "venv" / VENV_PYTHON)).expanduser()
    if not python.is_file():
        raise ForgeError(
            f"The interpreter {python} is missing: start {name} once by its own script, or name it in {prefix}_PYTHON."
        )
    return Installation(directory, python, host)


def link(source: Path, target: Path) -> None:
    """Make target a symbolic link to source; a link that is there is replaced, anything else is left alone."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink():
        target.unlink()
    if target.exists():
        raise ForgeError(f"{target} is not a link: move it away, so that a link to {source} can take its place.")
    try:
        target.symlink_to(source, target_is_directory=True)
    except OSError as error:
        raise ForgeError(
            f"{target} cannot be made a link ({error}): on Windows, switch on Developer Mode, which allows links."
        ) from error


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def stop_process(process: subprocess.Popen) -> None:
    """End the process and everything it started: politely first, then not."""
    if WINDOWS:
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True, check=False)
        process.wait(STOP_LIMIT_S)  # until then its log cannot be deleted
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_LIMIT_S)
            return


@dataclass
class Server:
    """One running Forge; `with Server(…) as server:` starts it, waits until it is ready, and ends it."""

    installation: Installation
    log: Path
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    start_limit_s: float = START_LIMIT_S
    port: int = field(default_factory=free_port)
    process: "subprocess.Popen | None" = None
    start_seconds: float = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def command(self) -> list[str]:
        python, device = str(self.installation.python), self.installation.device_arguments
        own = self.installation.host.always
        return [python, "-u", "launch.py", *ALWAYS, *own, *device, "--port", str(self.port), *self.arguments]

    def __enter__(self) -> "Server":
        started = time.monotonic()
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8", **self.environment}
        environment.pop("COMMANDLINE_ARGS", None)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.installation.directory, env=environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            self.wait_until_ready(started + self.start_limit_s)
        except BaseException:
            stop_process(self.process)
            raise
        self.start_seconds = time.monotonic() - started
        return self

    def __exit__(self, *_) -> None:
        stop_process(self.process)

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_until_ready(self, deadline: float) -> None:
        while READY not in self.text():
            if self.process.poll() is not None:
                raise self.failed(f"ended with status {self.process.returncode} while starting")
            if time.monotonic() > deadline:
                raise self.failed(f"was not ready within {self.start_limit_s:.0f} s")
            time.sleep(0.2)

    def failed(self, how: str, lines: int = 20) -> ForgeError:
        last_words = "\n".join(self.text().splitlines()[-lines:])
        return ForgeError(f"Forge {how}. Its last words:\n{last_words}")


def follow(log: Path, process: subprocess.Popen) -> Iterator[str]:
    """What is written to the log, from its start, until the process ends."""
    with log.open(encoding="utf-8", errors="replace") as file:
        while True:
            text = file.read()
            if text:
                yield text
            elif process.poll() is not None:
                return
            else:
                time.sleep(0.2)


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that Forge is stopped with it."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(arguments: Sequence[str]) -> None:
    """Forge with this checkout as extension, its log on the terminal."""
    installation = find_installation()
    link(CHECKOUT, installation.directory / "extensions" / EXTENSION)
    log = Path(tempfile.gettempdir()) / f"{EXTENSION}-{os.getpid()}.log"
    print(f"Starting Forge in {installation.directory}{'' if installation.has_gpu else ' on the CPU'} …", flush=True)
    try:
        with interruptible(), suppress(KeyboardInterrupt), Server(installation, log, arguments) as server:
            print(
                f"{server.text()}\nForge is ready at {server.url} after {server.start_seconds:.0f} s. Ctrl-C ends it.",
                flush=True,
            )
            shown = len(server.text())
            for text in follow(log, server.process):
                print(text[shown:] if shown else text, end="", flush=True)
                shown = 0
    finally:
        log.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="start Forge with this checkout, until Ctrl-C; other arguments go to Forge")
    _, passed_on = parser.parse_known_args()
    sys.stdout.reconfigure(errors="replace")  # Forge's log may say what the terminal's code page has no letters for
    try:
        run(passed_on)
    except ForgeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
