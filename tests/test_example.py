"""The example client, run as people run it, against a small server that answers as Forge does."""

import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from lib_layerdiffuse.request.layers import Request
from tests.odd_files import RED, file_of, half

CLIENT = Path(__file__).resolve().parents[1] / "examples" / "client.py"
PNG, JPG = file_of(half("RGBA", RED, (0, 0, 0, 0))), file_of(half("RGB", RED[:3], 0), "JPEG")
OPAQUE = file_of(half("RGB", RED[:3], 0))
METHODS = [
    {"key": "sd15_transparent_attn", "family": "sd15", "inputs": [], "outputs": ["fg"]},
    {"key": "xl_fg2ble", "family": "sdxl", "inputs": ["fg"], "outputs": ["blend"]},
]


def pictures(*infotexts: str, files: tuple[bytes, ...], notes: tuple[str, ...] = ()) -> dict[str, Any]:
    info = {"infotexts": infotexts, "extra_generation_params": {"LayerDiffuse notes": notes} if notes else {}}
    return {"images": [base64.b64encode(file).decode() for file in files], "info": json.dumps(info)}


class Server(ThreadingHTTPServer):
    """Answers everything with one status and one body, and keeps what was asked."""

    status: int
    body: bytes

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, Any, str | None]] = []  # path, body, authorisation
        self.when_asked: Callable[[], object] = lambda: None
        self.answer(pictures("Steps: 1", files=(PNG, OPAQUE)))

    def answer(self, body: object, status: int = 200) -> None:
        self.status, self.body = status, body if isinstance(body, bytes) else json.dumps(body).encode()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def answer(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = self.path, json.loads(text) if text else None, self.headers.get("Authorization")
        self.server.asked.append(asked)
        self.server.when_asked()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    do_GET = do_POST = answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def started(url: str, folder: Path, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Isolated: without what else is installed."""
    command = [sys.executable, "-I", "-S", str(CLIENT), "--url", url, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, encoding="utf-8", **pipes, **options)


def client(url: str, folder: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    with started(url, folder, *arguments, **options) as process:
        said = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, *said)


def lines_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def script_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    return body["alwayson_scripts"]["LayerDiffuse"]["args"]


def test_a_prompt_becomes_a_transparent_picture(server: Server, tmp_path: Path) -> None:
    assert lines_of(client(server.url, tmp_path, "a glass bottle", "-o", "bottle.png", "--seed", "7")) == ["bottle.png"]
    assert files_in(tmp_path) == {"bottle.png": PNG}
    [(path, body, authorisation)] = server.asked
    assert (path, authorisation) == ("/sdapi/v1/txt2img", None)
    assert (body["prompt"], body["seed"], body["width"], body["height"]) == ("a glass bottle", 7, 1024, 1024)
    request = Request.parse(script_of(body))
    assert request and (request.method.key, request.grey_background) == ("xl_transparent_attn", False)


def test_what_is_asked_for_arrives(server: Server, tmp_path: Path) -> None:
    (tmp_path / "fg.png").write_bytes(PNG)
    (tmp_path / "start.png").write_bytes(OPAQUE)
    options = (
        "--method sd15_fg2bg --foreground fg.png --blend start.png --init start.png --strength 0.25 --size 640x512"
    )
    more = "--steps 3 --batch 2 --grey-background --auth me:secret"
    lines_of(client(server.url, tmp_path, "a beach", *options.split(), *more.split()))
    [(path, body, authorisation)] = server.asked
    assert path == "/sdapi/v1/img2img"
    assert authorisation == f"Basic {base64.b64encode(b'me:secret').decode()}"
    expected = {"width": 640, "height": 512, "steps": 3, "batch_size": 2, "denoising_strength": 0.25}
    assert {name: body[name] for name in expected} == expected
    assert [base64.b64decode(image) for image in body["init_images"]] == [OPAQUE]
    [script] = script_of(body)
    assert base64.b64decode(script["fg_image"]) == PNG and base64.b64decode(script["blend_image"]) == OPAQUE
    request = Request.parse([script])
    assert request and (request.method.key, request.grey_background) == ("sd15_fg2bg", True)


def test_layers_are_named_by_what_they_show_and_notes_are_printed(server: Server, tmp_path: Path) -> None:
    shows = [f"Steps: 1, LayerDiffuse shows: {layer}" for layer in ("foreground", "background", "blend")]
    server.answer(pictures(*shows, files=(PNG, OPAQUE, JPG, OPAQUE), notes=("It was resized.",)))
    expected = {"set-1-foreground.png": PNG, "set-2-background.png": OPAQUE, "set-3-blend.jpg": JPG}
    assert lines_of(client(server.url, tmp_path, "a set", "-o", "set.png")) == ["Note: It was resized.", *expected]
    assert files_in(tmp_path) == expected


def test_what_is_there_already_stays(server: Server, tmp_path: Path) -> None:
    (tmp_path / "bottle.png").write_bytes(b"old")
    names = [line for _ in range(2) for line in lines_of(client(server.url, tmp_path, "a bottle", "-o", "bottle.png"))]
    assert names == ["bottle (2).png", "bottle (3).png"]
    assert files_in(tmp_path) == {"bottle.png": b"old", **dict.fromkeys(names, PNG)}


@pytest.mark.skipif(os.name == "nt", reason="it has no such limit")
def test_a_full_disk_leaves_nothing_half_written(server: Server, tmp_path: Path) -> None:
    import resource  # to fail in the middle of a file, as a full disk does

    server.answer(pictures("Steps: 1", files=(PNG * 1000,)))
    limits = (len(PNG) * 500, resource.RLIM_INFINITY)
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
    done = client(server.url, tmp_path, "a bottle", preexec_fn=limit)
    assert (done.returncode, done.stdout) == (1, "") and "File too large" in done.stderr
    assert files_in(tmp_path) == {}


@pytest.mark.skipif(os.name == "nt", reason="it has no such signal")
def test_ctrl_c_ends_it_without_a_traceback(server: Server, tmp_path: Path) -> None:
    server.when_asked = lambda: process.send_signal(signal.SIGINT)
    with started(server.url, tmp_path, "a bottle") as process:
        said = process.communicate(timeout=60)
    assert (process.returncode, *said) == (130, "", "")
    assert files_in(tmp_path) == {}


def test_a_batch_is_numbered(server: Server, tmp_path: Path) -> None:
    server.answer(pictures("Steps: 1", "Steps: 1", files=(PNG, PNG, OPAQUE, OPAQUE)))
    assert lines_of(client(server.url, tmp_path, "two", "-o", "two.webp")) == ["two-1.png", "two-2.png"]


def test_the_methods_are_listed(server: Server, tmp_path: Path) -> None:
    server.answer(METHODS)
    first, second = lines_of(client(server.url, tmp_path, "--list-methods"))
    assert server.asked[0][0] == "/layerdiffuse/v1/methods"
    assert first.split() == ["sd15_transparent_attn", "sd15", "takes", "nothing;", "makes", "fg"]
    assert second.split() == ["xl_fg2ble", "sdxl", "takes", "fg;", "makes", "blend"]


@pytest.mark.parametrize(
    ("status", "body", "sentence"),
    [
        (422, {"detail": "Weight (weight in API calls) is 'x'."}, "Weight (weight in API calls) is 'x'."),
        (422, {"detail": [{"loc": ["steps"], "msg": "no integer"}]}, '[{"loc": ["steps"], "msg": "no integer"}]'),
        (500, {"error": "RuntimeError", "detail": ""}, "status 500"),
        (502, b"<html>", "status 502"),
        (401, {"detail": "Incorrect username or password"}, "--auth"),
        (404, {"detail": "Not Found"}, "--api"),
        (405, {"detail": "Method Not Allowed"}, "--api"),
        (200, b"<html>", "does not answer as Forge does"),
    ],
)
def test_a_refusal_is_printed(server: Server, tmp_path: Path, status: int, body: object, sentence: str) -> None:
    server.answer(body, status)
    done = client(server.url, tmp_path, "a glass bottle")
    assert (done.returncode, done.stdout) == (1, "")
    assert sentence in done.stderr and len(done.stderr.splitlines()) == 1
    assert files_in(tmp_path) == {}


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "127.0.0.1:7860", "localhost", "http://"])
def test_no_server_is_said(tmp_path: Path, url: str) -> None:
    done = client(url, tmp_path, "a glass bottle")
    assert done.returncode == 1
    assert done.stderr.startswith(url) and len(done.stderr.splitlines()) == 1


def test_a_file_that_is_not_there_is_said(server: Server, tmp_path: Path) -> None:
    done = client(server.url, tmp_path, "a beach", "--foreground", "nowhere.png")
    assert done.returncode == 1
    assert "nowhere.png" in done.stderr and len(done.stderr.splitlines()) == 1
    assert server.asked == []
