"""A web server on this machine in place of the one that has the weight files."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

import pytest

from lib_layerdiffuse import weights


@dataclass
class Mirror:
    """What the server does, and what it was asked."""

    body: bytes
    status: int = 200
    ranges: bool = True
    length: int = 0  # announced instead of the true one; negative: none announced
    chunked: bool = False  # the length comes in the body, piece by piece
    pause: float = 0  # seconds before a connection ends, unless it is released before
    released: Event = field(default_factory=Event)
    cuts: list[int] = field(default_factory=list)  # the n-th connection breaks after so many bytes
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def starts(self) -> list[int]:
        """Where each request wanted to begin."""
        return [int(headers.get("range", "bytes=0-")[6:-1]) for _, headers in self.asked]


class Server(ThreadingHTTPServer):
    """A web server that behaves as its mirror says."""

    def __init__(self, mirror: Mirror) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.mirror = mirror


class Handler(BaseHTTPRequestHandler):
    """One answer."""

    server: Server

    def do_GET(self) -> None:
        mirror = self.server.mirror
        mirror.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        start = mirror.starts()[-1] if mirror.ranges else 0
        total = len(mirror.body)
        if mirror.status != 200 or start >= total:
            self.send_error(mirror.status if mirror.status != 200 else 416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if mirror.length >= 0:
            self.send_header("Content-Length", str(mirror.length or total - start))
        if mirror.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        end = start + mirror.cuts.pop(0) if mirror.cuts else total
        self.wfile.write(mirror.body[start:end])
        mirror.released.wait(mirror.pause)

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@contextmanager
def mirrored(body: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    """While open, downloads get this body, which comes in pieces of 1000 bytes."""
    server = Server(Mirror(body))
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(weights, "CHUNK", 1000)
    yield server.mirror
    server.mirror.released.set()
    for thread in threading.enumerate():  # or a download that is left would go on at the next test's server
        if thread.name.startswith("download"):
            thread.join()
    server.shutdown()
    server.server_close()
