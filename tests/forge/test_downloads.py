"""Weights that no folder has are downloaded with the first job, where everybody can see it."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.forge import data
from tests.forge.client import SD15_ATTENTION, layerdiffuse, same

FILE = "layer_sd15_transparent_attn"
ADDRESS = f"/LayerDiffusion/layerdiffusion-v1/resolve/main/{FILE}.safetensors"
PIECE = 8_000_000
PAUSE_S = 0.1  # between pieces, so that there is something to see


@contextmanager
def hub(port: int, file: Path) -> Iterator[None]:
    """Serve the one file, as a hub does."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == ADDRESS else 404)
            self.send_header("Content-Length", str(file.stat().st_size))
            self.end_headers()
            with file.open("rb") as content:
                while self.path == ADDRESS and (piece := content.read(PIECE)):
                    self.wfile.write(piece)
                    time.sleep(PAUSE_S)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


def test_missing_weights_are_downloaded(forge, replaced_layer_file):
    before = forge.picture(layerdiffuse(SD15_ATTENTION))
    replaced_layer_file(FILE, None)
    path = data.layer_file(FILE)
    shown = set()
    with hub(forge.hub_port, path.with_suffix(".aside")), ThreadPoolExecutor() as pool:
        job = pool.submit(forge.picture, layerdiffuse(SD15_ATTENTION))
        while not job.done():
            progress = forge.request("sdapi/v1/progress?skip_current_image=true").body
            if FILE in (progress["textinfo"] or ""):
                shown.add(progress["progress"])
            time.sleep(0.2)
    assert same(job.result(), before)
    assert path.stat().st_size == path.with_suffix(".aside").stat().st_size
    assert not list(path.parent.glob("*.part"))
    assert len(shown) > 3, "the progress bar did not move"
