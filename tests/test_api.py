"""The HTTP routes, in a small server, with small networks under the names of the released files."""

import asyncio
import base64
import io
import json
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from mirror import mirrored
from PIL import Image
from reference import ReferenceDecoder, random_state_dict, reference_encoder
from safetensors.torch import load, save, save_file
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware

from lib_layerdiffuse import vae
from lib_layerdiffuse.images.rgba import from_pil, to_pil
from lib_layerdiffuse.methods import METHODS, Family
from lib_layerdiffuse.nets.decoder import TransparentDecoder
from lib_layerdiffuse.nets.encoder import TransparentEncoder
from lib_layerdiffuse.vae import TransparentVAE
from lib_layerdiffuse.version import own_version
from lib_layerdiffuse.webui.api import guards, routes
from lib_layerdiffuse.webui.api.guards import AT_ONCE, MAX_BODY, PIECE
from lib_layerdiffuse.webui.extension import Extension
from lib_layerdiffuse.weights.checkpoints import CONTEXT_KEY, FIRST_KEY
from lib_layerdiffuse.weights.released import ASSETS, REVISION

DECODER = {key: value.contiguous() for key, value in random_state_dict(ReferenceDecoder(layers=1)).items()}
ENCODER = {
    f"blocks.{key}": value.contiguous()
    for key, value in random_state_dict(reference_encoder((4, 8, 8, 8, 8, 8, 8, 8, 8, 4))).items()
}
MISSING = "layer_xl_fg2ble.safetensors"
SERVER = "http://testserver"
DOCUMENT = f"{SERVER}/openapi.json"
PATIENCE = 10  # seconds until a test gives up


class SmallHost:
    """What the routes ask of a web UI."""

    def __init__(self, folder, users=()):
        self.folder, self.users = folder, users
        self.lock = threading.Lock()
        self.waiting = threading.Semaphore(0)  # one for each that has asked for the queue
        self.turns = 0  # of the GPU
        self.checkpoint = None

    @property
    def backend(self):
        return self

    def forget(self, injection):
        pass

    def name(self):
        return "Small UI 1"

    def api_users(self):
        return self.users

    def weight_folders(self):
        return [self.folder]

    def checkpoint_file(self, title):
        return self.checkpoint

    @contextmanager
    def queue(self):
        self.waiting.release()
        with self.lock:
            yield

    def busy(self):
        return self.lock.locked()

    @contextmanager
    def progress(self):
        yield lambda text, fraction: None

    def interrupted(self):
        return False

    def places(self, module, memory):
        assert self.busy(), "the GPU is used out of turn"
        self.turns += 1
        yield torch.device("cpu")


@pytest.fixture
def host(tmp_path):
    for family in Family:
        save_file(DECODER, tmp_path / family.decoder)
        save_file(ENCODER, tmp_path / family.encoder)
    return SmallHost(tmp_path)


def app_of(host):
    app = FastAPI()
    routes.register(app, Extension(host))
    return app


def client_of(host):
    return client_for(app_of(host))


def client_for(app, **options):
    return TestClient(app, base_url=f"{SERVER}{routes.PREFIX}/", **options)


@pytest.fixture
def client(host):
    return client_of(host)


def picture(size=(16, 24), mode="RGBA", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def coded(data):
    return base64.b64encode(data).decode()


def sent(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return coded(file.getvalue())


def received(answer):
    assert answer.status_code == 200, answer.text
    image = Image.open(io.BytesIO(base64.b64decode(answer.json()["image"])))
    assert image.format == "PNG"
    return image


def latent_of(size=(16, 24), seed=0):
    return torch.randn(4, size[1] // 8, size[0] // 8, generator=torch.Generator().manual_seed(seed))


def decode_body(**changes):
    latent = coded(save({"x": latent_of()}))
    return {"image": sent(picture(mode="RGB")), "latent": latent, "family": "sd15", "passes": 2} | changes


def same(first, second):
    return (first.mode, first.size, first.tobytes()) == (second.mode, second.size, second.tobytes())


# What they do


def test_decode_is_what_the_networks_say(client):
    vae = TransparentVAE(TransparentDecoder.from_state_dict(DECODER))
    rgb = from_pil(picture(mode="RGB"))[None]
    for passes in (1, 8):
        expected = to_pil(vae.decode(rgb, latent_of()[None], passes)[0])
        assert expected.mode == "RGBA"
        assert same(received(client.post("decode", json=decode_body(passes=passes))), expected)


@pytest.mark.parametrize("shape", [(4, 3, 2), (1, 4, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_latent_of_any_shape_and_precision(client, shape, dtype):
    latent = latent_of().to(torch.bfloat16)
    expected = client.post("decode", json=decode_body(latent=coded(save({"x": latent.float()})))).json()
    body = decode_body(latent=coded(save({"any name": latent.to(dtype).view(shape)})))
    assert client.post("decode", json=body).json() == expected


def test_a_transparent_picture_is_decoded_over_grey(client):
    clear = Image.new("RGBA", (16, 24))
    grey = Image.new("RGB", (16, 24), (127, 127, 127))
    answers = [received(client.post("decode", json=decode_body(image=sent(image)))) for image in (clear, grey)]
    assert np.abs(np.subtract(*(np.asarray(image, int) for image in answers))).max() <= 1


def test_encode_is_what_the_networks_say(client):
    answer = client.post("encode", json={"image": sent(picture()), "family": "sdxl"})
    assert answer.status_code == 200, answer.text
    tensors = load(base64.b64decode(answer.json()["latent"]))
    net = TransparentEncoder.from_state_dict(ENCODER)
    expected = TransparentVAE(torch.nn.Identity(), net).encode(from_pil(picture())[None])
    assert tensors.keys() == {"latent"}
    assert torch.equal(tensors["latent"], expected)
    assert expected.shape == (1, 4, 3, 2)


def test_compose_puts_layers_over_one_another(client):
    lower, upper = picture(), picture((8, 8), seed=1)
    layers = [{"image": sent(lower)}, {"image": sent(upper), "x": 12, "y": -3}]
    expected = Image.new("RGBA", lower.size)
    expected.alpha_composite(lower)
    expected.alpha_composite(upper.crop((0, 3, 4, 8)), (12, 0))
    assert same(received(client.post("compose", json={"layers": layers})), expected)


@pytest.mark.parametrize(
    ("more", "pixel"),
    [
        ({}, (255, 0, 0, 255)),
        ({"opacity": 0.2}, (255, 0, 0, 51)),
        ({"opacity": 0}, (0, 0, 0, 0)),
        ({"opacity": 0.2, "background": "#0000ff"}, (51, 0, 204, 255)),
        ({"opacity": 0, "background": "checkerboard"}, (115, 115, 115, 255)),
        ({"x": -16}, (0, 0, 0, 0)),
        ({"x": 9}, (0, 0, 0, 0)),
    ],
)
def test_compose_one_layer(client, more, pixel):
    layer = {"image": sent(Image.new("RGB", (8, 8), (255, 0, 0)))}
    body = {"layers": [layer | {key: more[key] for key in more if key != "background"}]}
    body |= {key: more[key] for key in more if key == "background"}
    image = received(client.post("compose", json=body))
    assert image.size == (8, 8)
    assert image.getpixel((0, 0)) == pixel


def test_the_canvas_may_have_another_size(client):
    body = {"layers": [{"image": sent(picture())}], "width": 40, "height": 10, "background": "checkerboard"}
    assert received(client.post("compose", json=body)).size == (40, 10)


def test_methods(client, host):
    host.checkpoint = host.folder / "model.safetensors"
    save_file({FIRST_KEY: torch.zeros(1, 4, 1, 1), CONTEXT_KEY: torch.zeros(1, 768)}, host.checkpoint)
    rows = client.get("methods").json()
    assert [row["key"] for row in rows] == [method.key for method in METHODS]
    assert rows[1] == {
        "title": "Background for a foreground (SD1.5)",
        "label": "(SD1.5) From Foreground to Background (need batch size 2)",
        "key": "sd15_fg2bg",
        "number": 1,
        "family": "sd15",
        "inputs": ["fg"],
        "outputs": ["bg", "blend"],
        "files": [{"file": "layer_sd15_fg2bg.safetensors", "state": "missing"}],
        "fits_checkpoint": True,
    }
    assert {"file": Family.SDXL.decoder, "state": "present"} in rows[4]["files"]
    assert [row["fits_checkpoint"] for row in rows] == [row["family"] == "sd15" for row in rows]


@pytest.mark.parametrize("content", [None, b"", b"PK"], ids=["none chosen", "empty", "pickle"])
def test_methods_where_nobody_knows_the_checkpoint(client, host, content):
    if content is not None:
        host.checkpoint = host.folder / "model.ckpt"
        host.checkpoint.write_bytes(content)
    assert {row["fits_checkpoint"] for row in client.get("methods").json()} == {None}


def test_health(client, host):
    expected = {
        "status": "ok",
        "version": own_version(),
        "host": "Small UI 1",
        "checkpoint": None,
        "busy": False,
        "weights": {"present": 4, "missing": len(ASSETS) - 4},
    }
    assert client.get("health").json() == expected
    host.checkpoint = host.folder / "model.safetensors"
    with host.lock:
        busy = client.get("health").json()
    assert busy == expected | {"busy": True, "checkpoint": {"name": "model", "family": None}}


def test_all_else_answers_while_many_wait_for_the_gpu(host):
    """More requests than the server has threads, which are the web UI's too."""
    app = app_of(host)
    app.get(f"{routes.PREFIX}/of-the-web-ui")(lambda: None)
    app.router.routes.insert(0, app.router.routes.pop())
    with client_for(app) as client, ThreadPoolExecutor(60) as many, ThreadPoolExecutor() as pool:
        with host.lock:
            waiting = [many.submit(client.post, "decode", json=decode_body()) for _ in range(60)]
            for _ in range(AT_ONCE):
                assert host.waiting.acquire(timeout=PATIENCE)
            for method, path in (
                ("GET", "health"),
                ("GET", "weights"),
                ("DELETE", f"weights/{MISSING}/download"),
                ("GET", "of-the-web-ui"),
            ):
                assert pool.submit(client.request, method, path).result(PATIENCE).status_code == 200
            assert not any(each.done() for each in waiting)
            body = {"layers": [{"image": sent(picture())}]}
            assert received(pool.submit(client.post, "compose", json=body).result(PATIENCE))
        assert {future.result().status_code for future in waiting} == {200}


# Weights


@pytest.fixture
def mirror(monkeypatch):
    with mirrored(save({"a": torch.arange(2000.0)}), monkeypatch) as mirror:
        yield mirror


def followed(client, state):
    """The status of the missing file, once it is in that state."""
    for _ in range(100 * PATIENCE):
        status = client.get(f"weights/{MISSING}").json()
        if status["state"] == state:
            return status
        threading.Event().wait(0.01)
    raise AssertionError(status)


def test_weights(client):
    rows = client.get("weights").json()
    assert [row["file"] for row in rows] == list(ASSETS)
    assert {row["file"] for row in rows if row["state"] == "present"} == {
        file for family in Family for file in (family.decoder, family.encoder)
    }
    [row] = [row for row in rows if row["file"] == MISSING]
    assert row == client.get(f"weights/{MISSING}").json()
    assert row["address"].endswith(f"/LayerDiffusion/layerdiffusion-v1/resolve/{REVISION}/{MISSING}")
    assert {
        "received": 0,
        "total": ASSETS[MISSING].size,
        "megabytes": 702,
        "error": "",
        "note": "",
    }.items() <= row.items()


def test_a_download_is_started_followed_cancelled_and_continued(client, mirror):
    mirror.cuts, mirror.pause = [5000], PATIENCE
    started = client.post(f"weights/{MISSING}/download")
    assert started.status_code == 202
    assert started.json()["state"] == "downloading"
    while (status := followed(client, "downloading"))["received"] < 5000:
        pass
    assert (status["received"], status["total"]) == (5000, len(mirror.body))
    cancelled = client.delete(f"weights/{MISSING}/download")
    assert cancelled.status_code == 200
    assert (cancelled.json()["state"], cancelled.json()["received"]) == ("missing", 5000)
    mirror.released.set()
    client.post(f"weights/{MISSING}/download")
    assert followed(client, "present")["received"] == len(mirror.body)
    assert client.post(f"weights/{MISSING}/download").json()["state"] == "present"


def test_a_download_that_fails(client, mirror):
    mirror.status = 404
    client.post(f"weights/{MISSING}/download")
    assert "404" in followed(client, "failed")["error"]


def test_weights_that_a_route_needs_are_downloaded_before_its_turn(client, host, mirror):
    path = host.folder / Family.SD15.decoder
    mirror.body = path.read_bytes()
    mirror.cuts, mirror.pause = [5000], PATIENCE
    path.unlink()
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(client.post, "decode", json=decode_body())
        while not mirror.asked:
            threading.Event().wait(0.01)
        assert not host.busy()
        mirror.released.set()
        assert received(answer.result(PATIENCE)).mode == "RGBA"


# Refusals: one sentence each


def header_only(width, height):
    """A PNG that says it has this size, and has no pixels at all."""
    data = bytearray(base64.b64decode(sent(Image.new("L", (1, 1)))))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return coded(bytes(data))


SHEET = {"image": sent(picture())}
ENCODE = {"image": sent(picture()), "family": "sd15"}
SHAPES = {"shape": torch.zeros(4, 2, 3), "channels": torch.zeros(8, 3, 2), "batch": torch.zeros(2, 4, 3, 2)}
REFUSED = {
    # name: (method, path, body, status, words of the sentence)
    "unknown file": ("GET", "weights/layer_xl_fg2bel.safetensors", None, 404, f'Did you mean "{MISSING}"'),
    "unknown download": ("POST", "weights/x/download", None, 404, "There is no weight file 'x'"),
    "unknown cancel": ("DELETE", "weights/x/download", None, 404, "There is no weight file 'x'"),
    "path": ("GET", "weights/..%2F..%2Fetc%2Fpasswd", None, 404, "There is nothing at"),
    "backslashes": ("GET", "weights/..%5C..%5Cboot.ini", None, 404, "There is no weight file"),
    "unknown route": ("GET", "method", None, 404, 'Did you mean "/layerdiffuse/v1/methods"'),
    "root": ("GET", "", None, 404, "There is nothing at '/layerdiffuse/v1/'"),
    "wrong method": ("GET", "decode", None, 405, "GET is not possible here. Use POST."),
    "no body": ("POST", "decode", None, 411, "Content-Length"),
    "text": ("POST", "decode", "hello", 422, "The body is not a JSON object"),
    "list": ("POST", "decode", [1], 422, "The body is not a JSON object"),
    "nothing in it": ("POST", "decode", {}, 422, "image: "),
    "unknown name": ("POST", "decode", decode_body(familiy="x"), 422, 'familiy is unknown. Did you mean "family"?'),
    "unknown name inside": (
        "POST", "compose", {"layers": [SHEET, SHEET | {"opactiy": 1}]}, 422,
        'layers[1].opactiy is unknown. Did you mean "opacity"? The names are image, x, y, opacity.',
    ),
    "long name": ("POST", "encode", ENCODE | {"a" * 10**6: 1}, 422, "is unknown. Did you mean"),
    "surrogate name": ("POST", "encode", ENCODE | {"\ud800": 1}, 422, " "),  # pydantic 1 and 2 differ
    "family": ("POST", "decode", decode_body(family="sd3"), 422, "family: "),
    "passes": ("POST", "decode", decode_body(passes=3), 422, "passes: "),
    "huge passes": ("POST", "decode", decode_body(passes=10**30), 422, "passes: "),
    "huge family": ("POST", "decode", decode_body(family="x" * 10**6), 422, "family: "),
    "image is null": ("POST", "decode", decode_body(image=None), 422, "image: "),
    "image is a list": ("POST", "decode", decode_body(image=["x"]), 422, "image: "),
    "empty image": ("POST", "decode", decode_body(image=""), 422, "image cannot be read. Set it to a whole PNG"),
    "surrogate image": ("POST", "encode", ENCODE | {"image": "\ud800"}, 422, "image cannot be read"),
    "cut image": ("POST", "decode", decode_body(image=sent(picture())[:200]), 422, "image cannot be read"),
    "svg": ("POST", "encode", ENCODE | {"image": coded(b"<svg/>")}, 422, "image cannot be read"),
    "file": ("POST", "encode", ENCODE | {"image": "file:///etc/passwd"}, 422, "image cannot be read"),
    "address": ("POST", "encode", ENCODE | {"image": "http://127.0.0.1/a.png"}, 422, "image cannot be read"),
    "not in cells": ("POST", "decode", decode_body(image=sent(picture((16, 20)))), 422, "16x20 pixels. Send a width"),
    "encode not in cells": ("POST", "encode", ENCODE | {"image": sent(picture((9, 8)))}, 422, "9x8 pixels"),
    "too many pixels": ("POST", "decode", decode_body(image=header_only(4096, 4104)), 413, "image has more than"),
    "a bomb": ("POST", "encode", ENCODE | {"image": header_only(60000, 60000)}, 413, "image has more than 16,777,216"),
    "a bomb of a layer": (
        "POST", "compose", {"layers": [SHEET, {"image": header_only(60000, 60000)}]}, 413, "layers[1].image has more",
    ),
    "latent": ("POST", "decode", decode_body(latent="AAAA"), 422, "latent cannot be read. Set it to a safetensors"),
    "latent is an image": ("POST", "decode", decode_body(latent=SHEET["image"]), 422, "latent cannot be read"),
    "two latents": (
        "POST", "decode", decode_body(latent=coded(save({"a": latent_of(), "b": latent_of()}))), 422, "one tensor",
    ),
    "no latent": ("POST", "decode", decode_body(latent=coded(save({}))), 422, "one tensor"),
    **{
        f"latent of another {name}": (
            "POST", "decode", decode_body(latent=coded(save({"x": latent}))), 422, "of an image of 16x24 is [4, 3, 2]",
        )
        for name, latent in SHAPES.items()
    },
    "latent with NaN": (
        "POST", "decode", decode_body(latent=coded(save({"x": latent_of() * torch.nan}))), 422, "no numbers",
    ),
    "no layers": ("POST", "compose", {"layers": []}, 413, "Send 1 to 32"),
    "many layers": ("POST", "compose", {"layers": [SHEET] * 33}, 413, "layers has 33 of them"),
    "very many layers": ("POST", "compose", {"layers": [{}] * 10**5}, 413, "more than 1,000 values"),
    "very many names": ("POST", "compose", {f"{n}": 0 for n in range(10**5)}, 413, "more than 1,000 values"),
    "pixels": ("POST", "encode", ENCODE | {"image": [[255] * 99] * 99}, 413, "each picture as one text in base64"),
    "opacity": ("POST", "compose", {"layers": [SHEET | {"opacity": 1.5}]}, 422, "layers[0].opacity: "),
    "far away": ("POST", "compose", {"layers": [SHEET | {"x": 10**40}]}, 422, "layers[0].x: "),
    "no width": ("POST", "compose", {"layers": [SHEET], "width": 0}, 422, "width: "),
    "large canvas": ("POST", "compose", {"layers": [SHEET], "width": 10**6}, 413, "The canvas has more than"),
    "background": ("POST", "compose", {"layers": [SHEET], "background": "red"}, 422, "background is 'red'"),
    "background with more": (
        "POST", "compose", {"layers": [SHEET], "background": "#ff0000\n"}, 422, "Set it to \"transparent\"",
    ),
}  # fmt: skip


def sentence(answer, status):
    """The one sentence or two of a refusal."""
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == {"detail"}
    detail = answer.json()["detail"]
    assert detail[-1] in ".?", detail
    assert "\n" not in detail and "Traceback" not in detail and "tmp" not in detail, detail
    return detail


@pytest.mark.parametrize(("method", "path", "body", "status", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(client, method, path, body, status, words):
    content = None if body is None else json.dumps(body)
    headers = {} if body is None else {"Content-Type": "application/json"}
    length = {"Transfer-Encoding": "chunked"} if status == 411 else {}
    assert words in sentence(client.request(method, path, content=content, headers=headers | length), status)


HARDLY_JSON = {
    # name: (body, status, words of the sentence)
    "NaN": (b'{"layers": [{"image": "A", "opacity": NaN}]}', 422, "layers[0].opacity: "),
    "too large": (b'{"layers": [{"image": "A", "opacity": 1e999}]}', 422, "layers[0].opacity: "),
    "infinite": (b'{"layers": [{"image": "A", "x": Infinity}]}', 422, "layers[0].x: "),
    "a million digits": (b'{"layers": [{"image": "A", "x": %s}]}' % (b"1" * 10**6), 422, "layers[0].x: "),
    "a million digits in a text": (b'{"layers": [{"image": "A", "x": "%s"}]}' % (b"1" * 10**6), 422, "layers[0].x: "),
    "cut": (b'{"layers"', 422, "not a JSON object"),
    "nothing": (b"", 422, "not a JSON object"),
    "no UTF-8": (b'{"layers": "\xff"}', 422, "not a JSON object"),
    "deep": (b"[" * 999, 422, "not a JSON object"),
    "deeper": (b"[" * 100_000, 413, "more than 1,000 values"),
    "UTF-16": ('{"layers": []}'.encode("utf-16"), 413, "Send 1 to 32"),
}


@pytest.mark.parametrize(("body", "status", "words"), HARDLY_JSON.values(), ids=HARDLY_JSON.keys())
def test_what_is_hardly_json(client, body, status, words):
    answer = client.post("compose", content=body, headers={"Content-Type": "application/json"})
    assert words in sentence(answer, status)


def test_another_content_type(client):
    answer = client.post("encode", content=body_of(ENCODE), headers={"Content-Type": "text/plain"})
    assert "application/json" in sentence(answer, 422)


@pytest.mark.parametrize("path", ["decode", "encode", "compose"])
def test_a_body_that_is_too_large_is_refused_unread(client, path):
    headers = {"Content-Type": "application/json"}
    for length in (str(MAX_BODY + 1), "9" * 5000):
        too_much = client.post(path, content=b"{}", headers=headers | {"Content-Length": length})
        assert f"Send up to {MAX_BODY:,}" in sentence(too_much, 413)
    unknown = client.post(path, content=iter([b"{}"]), headers=headers)
    assert "Content-Length" in sentence(unknown, 411)


def test_a_file_that_is_no_network(client, host):
    (host.folder / Family.SD15.decoder).write_bytes(save({"a": torch.zeros(1)}))
    answer = client.post("decode", json=decode_body())
    assert answer.status_code == 422
    assert "is not a transparent decoder" in answer.json()["detail"]
    assert received(client.post("decode", json=decode_body(family="sdxl")))


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "TRACE", "PUT", "PROPFIND", "ANYTHING"])
def test_any_other_method(client, method):
    known, unknown = client.request(method, "decode"), client.request(method, "nowhere")
    assert (known.status_code, unknown.status_code) == (405, 404)
    assert known.headers["Allow"] == "POST"
    if method != "HEAD":
        assert f"{method} is not possible here. Use POST." in sentence(known, 405)
        assert "There is nothing at" in sentence(unknown, 404)


def test_a_failure_nobody_thought_of_is_one_sentence_too(host, caplog):
    host.busy = lambda: 1 / 0
    answer = client_for(app_of(host), raise_server_exceptions=False).get("health")
    assert "ZeroDivisionError" in sentence(answer, 500)
    assert "GET /layerdiffuse/v1/health" in caplog.text and "Traceback" in caplog.text


# What comes slowly, and who leaves


class Wire:
    """A client that sends these pieces of a body and then waits for the answer, until it leaves."""

    def __init__(self, app, path, pieces, length=None):
        headers = {"content-type": "application/json", "content-length": str(length or sum(map(len, pieces)))}
        self.scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": f"{routes.PREFIX}/{path}",
            "query_string": b"",
            "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
        self.app, self.pieces, self.more = app, list(pieces), length is not None
        self.leaving, self.heard = threading.Event(), threading.Event()
        self.status, self.answers = None, []

    async def receive(self):
        if self.pieces:
            piece = self.pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(self.pieces) or self.more}
        while not self.leaving.is_set():
            await asyncio.sleep(0.001)
        self.heard.set()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.status = message.get("status", self.status)
        self.answers.append(message.get("body", b""))

    def leave(self):
        self.leaving.set()
        assert self.heard.wait(PATIENCE)

    def ask(self):
        asyncio.run(asyncio.wait_for(self.app(self.scope, self.receive, self.send), PATIENCE))
        return self.status


def body_of(values):
    return json.dumps(values).encode()


def test_a_body_of_too_many_values_is_received_and_not_kept(host, monkeypatch):
    """Its client hears why when it has sent all of it: many hear nothing before."""
    kept = []

    async def stream(client):
        async for chunk in of_client(client):
            kept.append(chunk)
            yield chunk

    of_client = guards.Client.stream
    monkeypatch.setattr(guards.Client, "stream", stream)
    first = b'{"layers": ['
    wire = Wire(app_of(host), "compose", [first] + [b"{}," * 2**14] * 64)
    assert wire.ask() == 413
    assert (wire.pieces, kept) == ([], [first])


def test_a_body_that_does_not_come(host, monkeypatch):
    monkeypatch.setattr(guards, "PATIENCE", 0.01)
    wire = Wire(app_of(host), "encode", [b"{"], length=100)
    assert wire.ask() == 408
    assert b"Send it again." in b"".join(wire.answers)


def test_a_client_that_leaves_before_its_body_has_come(host, caplog):
    wire = Wire(app_of(host), "encode", [b"{"], length=100)
    wire.leaving.set()
    assert wire.ask() == 499
    assert not caplog.text


@pytest.mark.parametrize(
    ("path", "body"), [("decode", decode_body()), ("encode", {"image": sent(picture()), "family": "sd15"})]
)
def test_a_client_that_left_while_it_waited_has_no_turn(host, path, body):
    wire = Wire(app_of(host), path, [body_of(body)])
    with ThreadPoolExecutor() as pool:
        with host.lock:
            status = pool.submit(wire.ask)
            assert host.waiting.acquire(timeout=PATIENCE)
            wire.leave()
        assert status.result(PATIENCE) == 499
    assert host.turns == 0


def test_no_more_passes_for_a_client_that_left(host, monkeypatch):
    wire = Wire(app_of(host), "decode", [body_of(decode_body(passes=8))])
    passes = []

    class Leaving(vae.FastDecoder):
        def __call__(self, *args):
            passes.append(len(passes))
            if len(passes) == 3:
                wire.leave()
            return super().__call__(*args)

    monkeypatch.setattr(vae, "FastDecoder", Leaving)
    assert wire.ask() == 499
    assert len(passes) == 3


def test_no_more_layers_for_a_client_that_left(host, monkeypatch):
    wire = Wire(app_of(host), "compose", [body_of({"layers": [SHEET] * 4})])
    layers = []

    def placed(*args, placed=routes.placed):
        layers.append(args)
        wire.leave()
        return placed(*args)

    monkeypatch.setattr(routes, "placed", placed)
    assert wire.ask() == 499
    assert len(layers) == 1


def test_a_download_for_a_client_that_left_ends(host, mirror):
    mirror.cuts, mirror.pause = [5000], PATIENCE
    (host.folder / Family.SD15.decoder).unlink()
    wire = Wire(app_of(host), "decode", [body_of(decode_body())])
    with ThreadPoolExecutor() as pool:
        status = pool.submit(wire.ask)
        while not mirror.asked:
            threading.Event().wait(0.01)
        wire.leave()
        assert status.result(PATIENCE) == 499
    mirror.released.set()


def test_a_large_answer_is_sent_in_pieces(host):
    """The server compresses each by itself, and answers others in between."""
    app = app_of(host)
    app.add_middleware(GZipMiddleware)
    layer = {"image": sent(picture((400, 400)))}
    wire = Wire(app, "compose", [body_of({"layers": [layer]})])
    assert wire.ask() == 200
    assert max(map(len, wire.answers)) == PIECE
    answer = client_for(app).post("compose", json={"layers": [layer]}, headers={"Accept-Encoding": "gzip"})
    assert answer.headers["Content-Encoding"] == "gzip"
    assert answer.content == b"".join(wire.answers)
    assert received(answer).size == (400, 400)


# Who may


ELSEWHERE = "https://elsewhere.example"
ORIGINS = {
    # name: (headers, whether it may change anything)
    "a program": ({}, True),
    "our page": ({"Sec-Fetch-Site": "same-origin", "Origin": SERVER}, True),
    "our page, by http": ({"Origin": SERVER}, True),
    "our page, in capitals": ({"Origin": SERVER, "Host": "TestServer"}, True),
    "our page, behind a proxy": ({"Origin": ELSEWHERE, "X-Forwarded-Host": "elsewhere.example"}, True),
    "our page, behind a proxy by https": ({"Sec-Fetch-Site": "same-origin", "Origin": ELSEWHERE}, True),
    "the address bar": ({"Sec-Fetch-Site": "none"}, True),
    "another page": ({"Sec-Fetch-Site": "cross-site", "Origin": ELSEWHERE}, False),
    "another page, by http": ({"Origin": ELSEWHERE}, False),
    "another page that hides": ({"Sec-Fetch-Site": "cross-site"}, False),
    "a page without origin": ({"Origin": "null"}, False),
    "another port": ({"Sec-Fetch-Site": "same-site", "Origin": f"{SERVER}:3000"}, False),
    "another port, by http": ({"Origin": f"{SERVER}:3000"}, False),
}


@pytest.mark.parametrize(("headers", "may"), ORIGINS.values(), ids=ORIGINS.keys())
def test_pages_of_other_servers_change_nothing(host, mirror, headers, may):
    client = client_of(host)
    for method, path in EVERYTHING:
        answer = client.request(method, path, headers=headers)
        if may or method == "GET":
            assert answer.status_code != 403
        else:
            assert "may not do this" in sentence(answer, 403)
    assert bool(mirror.asked) <= may
    mirror.released.set()


@pytest.mark.parametrize(
    ("options", "origin", "may"),
    [
        ({"allow_origins": [ELSEWHERE]}, ELSEWHERE, True),
        ({"allow_origins": [ELSEWHERE]}, "https://evil.example", False),
        ({"allow_origins": ["*"]}, ELSEWHERE, True),
        ({"allow_origin_regex": r"https://.*\.example"}, ELSEWHERE, True),
        ({"allow_origin_regex": r"https://.*\.example"}, f"{ELSEWHERE}.evil", False),
        ({}, ELSEWHERE, False),
    ],
)
def test_pages_that_the_web_ui_lets_ask_may(host, options, origin, may):
    app = app_of(host)
    app.add_middleware(GZipMiddleware)
    app.add_middleware(CORSMiddleware, allow_methods=["*"], **options)
    headers = {"Sec-Fetch-Site": "cross-site", "Origin": origin}
    answer = client_for(app).delete(f"weights/{MISSING}/download", headers=headers)
    assert answer.status_code == (200 if may else 403)


USERS = ["me:secret", "ünï:pässwörd"]
EVERYTHING = [
    ("GET", "health"),
    ("GET", "methods"),
    ("GET", "weights"),
    ("GET", f"weights/{MISSING}"),
    ("POST", f"weights/{MISSING}/download"),
    ("DELETE", f"weights/{MISSING}/download"),
    ("POST", "decode"),
    ("POST", "encode"),
    ("POST", "compose"),
    ("GET", "nowhere"),
]


def basic(user):
    return {"Authorization": f"Basic {coded(user.encode())}"}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        basic("me:wrong"),
        basic("other:secret"),
        basic("me:pässwörd"),
        basic("me"),
        basic(""),
        {"Authorization": "Basic ä".encode("latin-1")},
        {"Authorization": "Basic ***"},
        {"Authorization": "Basic"},
        {"Authorization": basic("me:secret")["Authorization"].replace("Basic", "Bearer")},
    ],
    ids=range(10),
)
def test_without_the_right_password_nothing_answers(host, headers):
    host.users = USERS
    client = client_of(host)
    for method, path in EVERYTHING:
        length = {"Content-Length": str(MAX_BODY + 1)} if path in ("decode", "encode") else {}
        answer = client.request(method, path, headers={**headers, **length})
        assert "--api-auth" in sentence(answer, 401)
        assert answer.headers["WWW-Authenticate"] == "Basic"


@pytest.mark.parametrize("user", USERS)
def test_with_the_right_password_all_is_as_without(host, user):
    host.users = USERS
    client = client_of(host)
    assert client.get("health", headers=basic(user)).status_code == 200
    assert received(client.post("decode", json=decode_body(), headers=basic(user)))
    document = client.get(DOCUMENT).json()
    assert document["paths"][f"{routes.PREFIX}/health"]["get"]["security"] == [{"HTTPBasic": []}]


def test_a_web_ui_without_api_has_no_routes(host):
    host.users = None
    assert client_of(host).get("health").status_code == 404


# Documentation


def documented(client):
    """Each route of ours in the server's documentation: method, path, and what it says."""
    for path, methods in client.get(DOCUMENT).json()["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def test_all_is_documented(client):
    operations = list(documented(client))
    assert [(method, path.removeprefix(f"{routes.PREFIX}/")) for method, path, _ in operations] == [
        (method, path.replace(MISSING, "{file}")) for method, path in EVERYTHING[:-1]
    ]
    for _, _, operation in operations:
        assert operation["tags"] == ["LayerDiffuse"]
        assert operation["summary"] and operation["description"]
        assert {"200", "202"} & operation["responses"].keys()
        assert "4XX" in operation["responses"]
        assert "security" not in operation


def example_of(content):
    return content["content"]["application/json"]["example"]


def test_the_examples_are_requests_and_answers_that_happen(client, mirror):
    for method, path, operation in documented(client):
        body = example_of(operation["requestBody"]) if "requestBody" in operation else None
        answer = client.request(method, SERVER + path.format(file=MISSING), json=body)
        example = example_of(operation["responses"][str(answer.status_code)])
        assert shape(answer.json()) == shape(example)


def shape(value):
    """The names in a JSON value, without what differs from one to the next."""
    if isinstance(value, list):
        return [shape(item) for item in value[:1]]
    return set(value) - {"downloading"} if isinstance(value, dict) else None


def test_routes_can_be_added_to_a_server_that_runs_and_to_the_next(host):
    extension = Extension(host)
    for _ in range(2):  # the web UI is reloaded
        app = FastAPI()
        with TestClient(app) as client:
            assert client.get(DOCUMENT).json()["paths"] == {}
            routes.register(app, extension)
            assert client.get(f"{routes.PREFIX}/health").status_code == 200
            assert f"{routes.PREFIX}/health" in client.get(DOCUMENT).json()["paths"]
