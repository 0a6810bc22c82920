"""The HTTP routes, in a small server, with small networks under the names of the released files."""

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

from lib_layerdiffuse import api
from lib_layerdiffuse.api_guards import MAX_BODY
from lib_layerdiffuse.checkpoints import CONTEXT_KEY, FIRST_KEY
from lib_layerdiffuse.images import from_pil, to_pil
from lib_layerdiffuse.methods import DECODERS, ENCODERS, METHODS, Family
from lib_layerdiffuse.nets.decoder import TransparentDecoder
from lib_layerdiffuse.nets.encoder import TransparentEncoder
from lib_layerdiffuse.vae import TransparentVAE
from lib_layerdiffuse.weights import ASSETS, REVISION
from lib_layerdiffuse.workshop import Workshop

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
        self.checkpoint = None

    def name(self):
        return "Small UI 1"

    def api_users(self):
        return self.users

    def weight_folders(self):
        return [self.folder]

    def checkpoint_file(self, title):
        return self.checkpoint

    def queue(self):
        return self.lock

    def busy(self):
        return self.lock.locked()

    @contextmanager
    def progress(self):
        yield lambda text, fraction: None

    def interrupted(self):
        return False

    def places(self, module, memory):
        assert self.busy(), "the GPU is used out of turn"
        yield torch.device("cpu")


@pytest.fixture
def host(tmp_path):
    for family in Family:
        save_file(DECODER, tmp_path / DECODERS[family])
        save_file(ENCODER, tmp_path / ENCODERS[family])
    return SmallHost(tmp_path)


def client_of(host):
    app = FastAPI()
    api.register(app, Workshop(host))
    return TestClient(app, base_url=f"{SERVER}{api.PREFIX}/")


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
        "label": "(SD1.5) From Foreground to Background (need batch size 2)",
        "key": "sd15_fg2bg",
        "number": 1,
        "family": "sd15",
        "inputs": ["fg"],
        "outputs": ["bg", "blend"],
        "files": [{"file": "layer_sd15_fg2bg.safetensors", "state": "missing"}],
        "fits_checkpoint": True,
    }
    assert {"file": DECODERS[Family.SDXL], "state": "present"} in rows[4]["files"]
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
        "version": "0.1.0",
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


def test_health_and_downloads_answer_while_all_threads_wait(host):
    """More requests than the server has threads, each of them waiting for the GPU."""
    with client_of(host) as client, ThreadPoolExecutor(60) as pool:
        with host.lock:
            waiting = [pool.submit(client.post, "decode", json=decode_body()) for _ in range(60)]
            for method, path in (("GET", "health"), ("GET", "weights"), ("DELETE", f"weights/{MISSING}/download")):
                assert pool.submit(client.request, method, path).done() is False
                assert client.request(method, path).status_code == 200
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
    assert {row["file"] for row in rows if row["state"] == "present"} == {*DECODERS.values(), *ENCODERS.values()}
    [row] = [row for row in rows if row["file"] == MISSING]
    assert row == client.get(f"weights/{MISSING}").json()
    assert row["address"].endswith(f"/LayerDiffusion/layerdiffusion-v1/resolve/{REVISION}/{MISSING}")
    assert {"received": 0, "total": ASSETS[MISSING].size, "megabytes": 702, "error": ""}.items() <= row.items()


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
    path = host.folder / DECODERS[Family.SD15]
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
    "surrogate name": ("POST", "encode", ENCODE | {"\ud800": 1}, 422, " "),  # pydantic 1 and 2 differ
    "family": ("POST", "decode", decode_body(family="sd3"), 422, "family: "),
    "passes": ("POST", "decode", decode_body(passes=3), 422, "passes: "),
    "huge passes": ("POST", "decode", decode_body(passes=10**30), 422, "passes: "),
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


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ('{"layers": [{"image": "A", "opacity": NaN}]}', 422),
        ('{"layers": [{"image": "A", "opacity": 1e999}]}', 422),
        ('{"layers": [{"image": "A", "x": Infinity}]}', 422),
        ('{"layers"', 422),
        ("", 422),
        ("[" * 100_000, 400),
    ],
)
def test_text_that_is_hardly_json(client, text, status):
    answer = client.post("compose", content=text, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert isinstance(answer.json()["detail"], str)


def test_another_content_type(client):
    answer = client.post("encode", content=json.dumps(ENCODE), headers={"Content-Type": "text/plain"})
    assert "application/json" in sentence(answer, 422)


@pytest.mark.parametrize("path", ["decode", "encode", "compose"])
def test_a_body_that_is_too_large_is_refused_unread(client, path):
    def body():
        raise AssertionError("read")
        yield b""

    headers = {"Content-Type": "application/json"}
    too_much = client.post(path, content=b"{}", headers=headers | {"Content-Length": str(MAX_BODY + 1)})
    assert f"Send up to {MAX_BODY:,}" in sentence(too_much, 413)
    unknown = client.post(path, content=iter([b"{}"]), headers=headers)
    assert "Content-Length" in sentence(unknown, 411)


def test_a_file_that_is_no_network(client, host):
    (host.folder / DECODERS[Family.SD15]).write_bytes(save({"a": torch.zeros(1)}))
    answer = client.post("decode", json=decode_body())
    assert answer.status_code == 422
    assert "is not a transparent decoder" in answer.json()["detail"]
    assert received(client.post("decode", json=decode_body(family="sdxl")))


# Who may


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
    assert document["paths"][f"{api.PREFIX}/health"]["get"]["security"] == [{"HTTPBasic": []}]


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
    assert [(method, path.removeprefix(f"{api.PREFIX}/")) for method, path, _ in operations] == [
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
    workshop = Workshop(host)
    for _ in range(2):  # the web UI is reloaded
        app = FastAPI()
        with TestClient(app) as client:
            assert client.get(DOCUMENT).json()["paths"] == {}
            api.register(app, workshop)
            assert client.get(f"{api.PREFIX}/health").status_code == 200
            assert f"{api.PREFIX}/health" in client.get(DOCUMENT).json()["paths"]
