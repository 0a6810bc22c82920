"""The extension's own routes, in the server of a real Forge."""

import base64
import io
import json
import subprocess
import time
import urllib.error
import urllib.request
from array import array
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image, ImageChops

from tests.forge import data
from tests.forge.client import SD15_ATTENTION, Answer, layerdiffuse, same, to_base64
from tests.forge.test_downloads import FILE, hub
from tests.forge.test_img2img import soft_disc
from tools.forge import CHECKOUT

PREFIX = "layerdiffuse/v1"
PATIENCE_S = 60
# What the networks say: argv has the weight files, the picture, and where to put a latent and the answers.
REFERENCE = """
import sys
import numpy as np, torch
from PIL import Image
from safetensors.torch import save_file
from tests.forge.reference_roundtrip import *

encoder, decoder, picture, folder = sys.argv[1:]
folder = Path(folder)
torch.manual_seed(0)
latent = torch.randn(1, 4, 8, 8)
save_file({"latent": latent}, folder / "latent.safetensors")
rgba = np.asarray(Image.open(picture), np.float32) / 255
rgb = tensor(np.asarray(Image.open(picture).convert("RGB"), np.float32) / 255)
with torch.no_grad():
    argb = with_weights(ReferenceDecoder(RELEASED_WIDTHS), decoder)(rgb, latent).clamp(0, 1)[0].permute(1, 2, 0)
    given = tensor(np.concatenate([rgba[..., 3:], cv2_pad_colors(rgba).clip(0, 1)], axis=2))
    offset = with_weights(reference_encoder(ENCODER_WIDTHS), encoder, "blocks.")(given) * OFFSET_SCALE
Image.fromarray((255 * argb[..., [1, 2, 3, 0]].numpy()).round().astype(np.uint8)).save(folder / "decoded.png")
offset.numpy().astype("<f4").tofile(folder / "offset")
"""


def call(forge, method: str, path: str, body: object = None) -> Answer:
    content = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{forge.server.url}/{PREFIX}/{path}", content, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return Answer(answer.status, json.load(answer))
    except urllib.error.HTTPError as error:
        return Answer(error.code, json.load(error))


def get(forge, path: str):
    answer = call(forge, "GET", path)
    assert answer.status == 200, answer.body
    return answer.body


def until(condition) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.05)


def picture_of(answer: Answer) -> Image.Image:
    assert answer.status == 200, answer.body
    return Image.open(io.BytesIO(base64.b64decode(answer.body["image"])))


def test_the_server_documents_them(forge):
    paths = forge.request("openapi.json").body["paths"]
    ours = {path: operations for path, operations in paths.items() if path.startswith(f"/{PREFIX}/")}
    assert [path.removeprefix(f"/{PREFIX}/") for path in ours] == [
        "health",
        "methods",
        "weights",
        "weights/{file}",
        "weights/{file}/download",
        "decode",
        "encode",
        "compose",
    ]
    for operation in (operation for operations in ours.values() for operation in operations.values()):
        assert operation["tags"] == ["LayerDiffuse"] and operation["description"]
    for path in ("decode", "encode", "compose"):
        content = ours[f"/{PREFIX}/{path}"]["post"]["requestBody"]["content"]["application/json"]
        answer = call(forge, "POST", path, content["example"])
        assert answer.status == 200, answer.body


def test_methods_and_weights(forge):
    methods = get(forge, "methods")
    assert [row["number"] for row in methods] == list(range(12))
    assert methods[0]["label"] == SD15_ATTENTION
    assert [row["fits_checkpoint"] for row in methods] == [row["family"] == "sd15" for row in methods]
    assert {file["state"] for row in methods for file in row["files"]} == {"present"}
    assert {row["state"] for row in get(forge, "weights")} == {"present"}


def test_health_tells_a_job_from_none(forge):
    with ThreadPoolExecutor() as pool:
        job = pool.submit(forge.picture, layerdiffuse(SD15_ATTENTION), steps=4)
        until(lambda: get(forge, "health")["busy"])
        assert not job.done()
        job.result()
    health = get(forge, "health")
    assert health["busy"] is False
    assert health["checkpoint"] == {"name": "synthetic_sd15", "family": "sd15"}
    assert health["host"].startswith("Stable Diffusion WebUI Forge 2")
    assert health["weights"] == {"present": 14}


def test_decode_and_encode_are_what_the_networks_say(forge, installation, tmp_path):
    layers = [data.layer_file(f"layer_sd15_vae_transparent_{kind}") for kind in ("encoder", "decoder")]
    picture = soft_disc()
    picture.save(tmp_path / "picture.png")
    opaque = picture.convert("RGB")
    command = [installation.python, "-c", REFERENCE, *layers, tmp_path / "picture.png", tmp_path]
    subprocess.run(command, check=True, cwd=CHECKOUT)

    latent = base64.b64encode((tmp_path / "latent.safetensors").read_bytes()).decode()
    body = {"image": to_base64(opaque), "latent": latent, "family": "sd15", "passes": 1}
    decoded = picture_of(call(forge, "POST", "decode", body))
    difference = ImageChops.difference(decoded, Image.open(tmp_path / "decoded.png"))
    assert max(high for _, high in difference.getextrema()) <= 1, difference.getextrema()

    answer = call(forge, "POST", "encode", {"image": to_base64(picture), "family": "sd15"})
    assert answer.status == 200, answer.body
    file = base64.b64decode(answer.body["latent"])
    length = 8 + int.from_bytes(file[:8], "little")
    assert json.loads(file[8:length])["latent"] == {"dtype": "F32", "shape": [1, 4, 8, 8], "data_offsets": [0, 1024]}
    offset, expected = array("f", file[length:]), array("f", (tmp_path / "offset").read_bytes())
    scale = max(map(abs, expected))
    assert scale > 0
    assert max(abs(a - b) for a, b in zip(offset, expected)) < 1e-3 * scale


def test_what_is_decoded_can_be_composed(forge):
    lower, upper = Image.new("RGBA", (64, 64), (0, 90, 200, 255)), soft_disc()
    layers = [{"image": to_base64(lower)}, {"image": to_base64(upper), "x": 8, "y": 16}]
    expected = lower.copy()
    expected.alpha_composite(upper.crop((0, 0, 56, 48)), (8, 16))
    assert same(picture_of(call(forge, "POST", "compose", {"layers": layers})), expected)


def test_a_download_is_started_cancelled_and_continued(forge, replaced_layer_file):
    file = f"{FILE}.safetensors"
    before = forge.picture(layerdiffuse(SD15_ATTENTION))
    replaced_layer_file(FILE, None)
    path = data.layer_file(FILE)
    assert call(forge, "POST", f"weights/{file}/download").status == 202
    until(lambda: get(forge, f"weights/{file}")["state"] == "failed")  # nobody serves it
    assert "could not be downloaded" in get(forge, f"weights/{file}")["error"]
    with hub(forge.hub_port, path.with_suffix(".aside")):
        assert call(forge, "POST", f"weights/{file}/download").body["state"] == "downloading"
        until(lambda: get(forge, f"weights/{file}")["received"] > 0)
        assert call(forge, "DELETE", f"weights/{file}/download").body["state"] == "missing"
        assert get(forge, "health")["weights"] == {"present": 13, "missing": 1}
        assert call(forge, "POST", f"weights/{file}/download").body["state"] == "downloading"
        until(lambda: get(forge, f"weights/{file}")["state"] == "present")
    assert path.stat().st_size == path.with_suffix(".aside").stat().st_size
    assert same(forge.picture(layerdiffuse(SD15_ATTENTION)), before)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "nowhere", None, 404),
        ("GET", "weights/..%2Fpasswd", None, 404),
        ("GET", "weights/layer.safetensors", None, 404),
        ("GET", "decode", None, 405),
        ("POST", "decode", None, 422),
        ("POST", "decode", {"image": 5}, 422),
        ("POST", "encode", {"image": "AAAA", "family": "sd15"}, 422),
        ("POST", "encode", {"picture": "AAAA", "family": "sd15"}, 422),
        ("POST", "compose", {"layers": [{}] * 33}, 422),
        ("POST", "compose", {"layers": []}, 413),
    ],
)
def test_refused(forge, method, path, body, status):
    answer = call(forge, method, path, body)
    assert answer.status == status, answer.body
    assert answer.body.keys() == {"detail"}
    assert answer.body["detail"][-1] in ".?"
