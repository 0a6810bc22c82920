"""A web server on this machine in place of the one that has the weight files."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

import pytest

from lib_layerdiffuse.weights import transfer

TRICKLE = 0.02  # seconds between two bytes of a slow line


@dataclass
class Mirror:
    """What the server does, and what it was asked."""

    body: bytes
    status: int = 200
    refusals: list[tuple[int, str]] = field(default_factory=list)  # the n-th answer instead, with its Retry-After
    elsewhere: str = ""  # the address of another server, which has the file
    revisions: str = ""  # the only one that it has, if not all
    ranges: bool = True
    etag: str | None = None  # instead of one that changes with the body; empty: none
    conditions: bool = True  # whether it knows If-Range
    length: int = 0  # announced instead of the true one; negative: none announced
    chunked: bool = False  # the length comes in the body, piece by piece
    pause: float = 0  # seconds before a connection ends, unless it is released before
    trickle: bool = False  # whether the rest comes meanwhile, a byte now and then
    holds: list[int] = field(default_factory=list)  # the n-th connection stops after so many bytes until it is released
    held: list[bool] = field(default_factory=list)  # whether it was
    released: Event = field(default_factory=Event)
    cuts: list[int] = field(default_factory=list)  # the n-th connection breaks after so many bytes
    ended: list[int] = field(default_factory=list)  # where the connections began that are over
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def starts(self) -> list[int]:
        """Where each request wanted to begin."""
        return [int(headers.get("range", "bytes=0-")[6:-1]) for _, headers in self.asked]

    def tag(self) -> str:
        return f'"{hashlib.sha256(self.body).hexdigest()}"' if self.etag is None else self.etag

    def start(self) -> int:
        """Where the latest answer begins."""
        condition = self.asked[-1][1].get("if-range", self.tag())
        return self.starts()[-1] if self.ranges and (condition == self.tag() or not self.conditions) else 0


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
        status, wait = mirror.refusals.pop(0) if mirror.refusals else (mirror.status, "")
        if status == 200 and mirror.revisions not in self.path:
            status = 404
        if mirror.elsewhere:
            self.send_response(302)
            self.send_header("Location", mirror.elsewhere.rstrip("/") + self.path)
            self.end_headers()
            return
        start = mirror.start()
        if status != 200 or start >= len(mirror.body):
            self.refuse(status if status != 200 else 416, wait)
            return
        with suppress(ConnectionError):  # whoever asked has gone
            self.answer(mirror, start)
        mirror.ended.append(start)

    def refuse(self, status: int, wait: str) -> None:
        self.send_response(status)
        if wait:
            self.send_header("Retry-After", wait)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, mirror: Mirror, start: int) -> None:
        body, total = mirror.body, len(mirror.body)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if mirror.tag():
            self.send_header("ETag", mirror.tag())
        if mirror.length >= 0:
            self.send_header("Content-Length", str(mirror.length or total - start))
        if mirror.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if mirror.holds:
            hold = start + mirror.holds.pop(0)
            self.wfile.write(body[start:hold])
            mirror.held.append(mirror.released.wait(mirror.pause))
            start = hold
        end = start + mirror.cuts.pop(0) if mirror.cuts else total
        rest, pause = body[end:] if mirror.trickle else b"", mirror.pause
        self.wfile.write(body[start:end])
        while rest and not mirror.released.wait(TRICKLE):
            self.wfile.write(rest[:1])
            rest = rest[1:]
        mirror.released.wait(pause)

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@contextmanager
def mirrored(body: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    """While open, downloads get this body, which comes in pieces of 1000 bytes at most."""
    server = Server(Mirror(body))
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(transfer, "CHUNK", 1000)
    yield server.mirror
    server.mirror.released.set()
    for thread in threading.enumerate():  # or a download that is left would go on at the next test's server
        if thread.name.startswith("download"):
            thread.join()
    server.shutdown()
    server.server_close()
