"""Weights that are not here yet: said before they are needed, and fetched on request."""

import filecmp
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from playwright.sync_api import expect

from tests.forge import data
from tests.page.tab import eventually

FILE = "layer_sd15_transparent_attn"
ADDRESS = re.compile(rf"/LayerDiffusion/layerdiffusion-v1/resolve/[0-9a-f]{{40}}/{FILE}\.safetensors")
PIECE = 8_000_000
PAUSE_S = 0.15  # between pieces, so that there is something to see


@contextmanager
def hub(port, file):
    """Serve the one file slowly, also from a place on; what is given is the list of those places, as they are asked."""
    starts = []
    size = file.stat().st_size

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            assert ADDRESS.fullmatch(self.path)
            start = int(self.headers.get("Range", "bytes=0-")[6:-1])
            starts.append(start)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(size - start))
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
            self.end_headers()
            with file.open("rb") as content:
                content.seek(start)
                while piece := content.read(PIECE):
                    self.wfile.write(piece)
                    time.sleep(PAUSE_S)

        def handle(self):
            try:
                super().handle()
            except ConnectionError:  # the download was cancelled
                self.close_connection = True

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield starts
        server.shutdown()


def received(tab):
    """Megabytes so far, as the status line says."""
    found = re.search(r"weights are being downloaded: (\d+) / 350 MB", tab.status[-1])
    return int(found[1]) if found else None


def test_a_download_is_offered_followed_cancelled_and_continued(txt2img, forge, replaced_layer_file):
    replaced_layer_file(FILE, None)
    path = data.layer_file(FILE)
    whole, part = path.with_suffix(".aside"), path.with_name(f"{path.name}.part")
    download, cancel = txt2img.part("download"), txt2img.part("cancel")
    assert not download.is_visible() and not cancel.is_visible()

    txt2img.set_number("batch_size", 2)  # anything that makes the panel look again
    eventually(lambda: txt2img.status[-1], "weights are not here yet: 350 MB")
    expect(download).to_be_visible()
    with hub(forge.hub_port, whole) as starts:
        download.click()
        expect(cancel).to_be_visible()
        expect(download).not_to_be_visible()
        seen = []
        while len(seen) < 4:
            eventually(lambda: (received(txt2img) or 0) > (seen[-1] if seen else 0), True)
            seen.append(received(txt2img))
        assert seen == sorted(seen) and seen[-1] < 350

        cancel.click()
        expect(download).to_be_visible()
        expect(cancel).not_to_be_visible()
        assert txt2img.status[-1].startswith("weights are not here yet:")
        eventually(lambda: "the download of" in forge.server.text() and "was cancelled" in forge.server.text(), True)
        kept = part.stat().st_size
        assert kept > seen[-2] * 1_000_000 and not path.exists()

        download.click()
        eventually(lambda: txt2img.status[-1], "weights are present", 60)
        expect(download).not_to_be_visible()
        expect(cancel).not_to_be_visible()
        # Once more from the start, because it came in pieces and has not the hash of the released file.
        assert starts == [0, kept, 0]
    assert filecmp.cmp(path, whole, shallow=False) and not part.exists()
