"""Requests as they should not be: each is refused in a sentence or answered with what it asks for, and harms nothing.

The tables have a row for each request, and a test for each class of them, after which a normal job must give the very
picture that it gave before. Nothing may crash, hang, or return an ordinary picture.
"""

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from PIL import Image

from tests.forge.client import BASE_REQUEST, SD15_ATTENTION, Answer, alpha_varies, layerdiffuse, same
from tests.odd_files import NO_PICTURES, RARE, RED, bomb, in_base64, sent

LIMIT_S = 60  # for one answer; a refusal takes milliseconds
JOB = {**BASE_REQUEST, "width": 64, "height": 64, "cfg_scale": 1}  # at 1 the UNet has half of the work
METHOD = "sd15_transparent_attn"
NAN, INFINITY = float("nan"), float("inf")
DEEP = "[" * 500 + "]" * 500  # as text: Python's own writer refuses less
MEGABYTE = "x" * 2**20


def post(forge, body: "dict | bytes", endpoint: str = "txt2img") -> Answer:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    url = f"{forge.server.url}/sdapi/v1/{endpoint}"
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
            return Answer(answer.status, json.load(answer))
    except urllib.error.HTTPError as error:
        text = error.read().decode()
        return Answer(error.code, json.loads(text) if text.startswith("{") else {"detail": text})


def job(args: object, script: str = "LayerDiffuse", **more: object) -> dict:
    return {**JOB, "alwayson_scripts": {script: {"args": args}}, **more}


def entry(value: object, script: str = "layerdiffuse") -> dict:
    """What stands under the script's name, which is that in any case."""
    return {**JOB, "alwayson_scripts": {script: value}}


def named(**values: object) -> dict:
    """A good request but for these values."""
    return job([{"method": METHOD, **values}])


def from_foreground(image: object) -> dict:
    return job([{"method": "sd15_fg2bg", "fg_image": image}])


def changed(start: object = sent(Image.new("RGB", (64, 64), RED[:3])), **values: object) -> dict:
    """Of an img2img job with a change map."""
    return job([values], "Differential Diffusion", init_images=[start], denoising_strength=0.5)


def start_from(image: object) -> dict:
    return {**named(), "init_images": [image], "denoising_strength": 0.5}


# --- what an answer must be: each fails with what is wrong


def refused(answer: Answer) -> None:
    assert len(answer.refusal) < 2000, "a sentence as long as a page"


def not_read(answer: Answer) -> None:
    """By the web UI itself, before there is a job."""
    assert 400 <= answer.status < 500 and not answer.body.get("images"), (answer.status, str(answer.body)[:300])


def transparent(answer: Answer) -> None:
    assert answer.status == 200, (answer.status, str(answer.body)[:300])
    assert alpha_varies(answer.images[0]), answer.images[0]


def layers(answer: Answer) -> None:
    """The background and the blend, which are opaque."""
    assert answer.status == 200, (answer.status, str(answer.body)[:300])
    assert [image.mode for image in answer.images] == ["RGB", "RGB"]
    assert all("LayerDiffuse method" in text for text in answer.infotexts)


Check = Callable[[Answer], None]


def complaint(check: Check, answer: Answer) -> str:
    try:
        check(answer)
    except AssertionError as error:
        return str(error) or check.__name__
    return ""


# --- the tables: name of the row -> the request

SWITCH_AND_METHOD = {
    "enabled is a word": named(enabled="perhaps"),
    "enabled is a list": named(enabled=[True]),
    "enabled is not a number": named(enabled=NAN),
    "the method does not exist": named(method="transparent_everything"),
    "the method is empty": named(method=""),
    "the method is a number too high": named(method=12),
    "the method is negative": named(method=-1),
    "the method is huge": named(method=10**4000),
    "the method is half a number": named(method=0.5),
    "the method is true": named(method=True),
    "the method is a list": named(method=[METHOD]),
    "the method is a dict": named(method={"__proto__": METHOD}),
    "the method is a path": named(method="../../layer_sd15_transparent_attn.safetensors"),
    "the method is a megabyte": named(method=MEGABYTE),
    "the method has a zero": named(method=f"{METHOD}\0"),
}

NUMBERS = {
    "the weight is a word": named(weight="strong"),
    "the weight is not a number": named(weight=NAN),
    "the weight is infinite": named(weight=INFINITY),
    "the weight is the text nan": named(weight="nan"),
    "the weight is huge": named(weight=10**400),
    "the weight is negative": named(weight=-0.5),
    "the weight is true": named(weight=True),
    "the weight is a list": named(weight=[1.0]),
    "the weight is a megabyte of digits": named(weight="9" * 2**20),
    "stop at is above 1": named(stop_at=1.5),
    "stop at is minus infinity": named(stop_at=-INFINITY),
    "stop at is a dict": named(stop_at={"of": 1}),
    "start at is empty": named(start_at=""),
    "start at is behind stop at": named(start_at=0.9, stop_at=0.1),
    "passes is none of the numbers": named(passes=3),
    "passes is half a number": named(passes=1.5),
    "passes is true": named(passes=True),
    "grey_background is a word": named(grey_background="dark"),
}

NAMES_AND_TEXTS = {
    "a name that does not exist": named(wieght=1.0),
    "a name of Python": named(__class__="x"),
    "a name of JavaScript": job([{"method": METHOD, "__proto__": {"enabled": False}}]),
    "a name that is empty": job([{"": 1, "method": METHOD}]),
    "a name of a megabyte": job([{MEGABYTE: 1, "method": METHOD}]),
    "an older and a newer name": named(stop_at=0.5, ending_step=0.6),
    "a dict in the place of the switch, and nothing in it": job([{}]),
    "a list in the place of the switch": job([[True, METHOD]]),
    "the args are a text": job("true"),
    "the args are a number": job(5),
    "the args are null": job(None),
    "a text in the place of the args": entry("true"),
    "a number in the place of the args": entry(5),
    "a name that does not exist, without args": entry({"wieght": 1.0}),
    "a number in the place of a prompt": named(fg_prompt=7),
    "a list in the place of a prompt": named(bg_prompt=["glass"]),
    "a prompt with half a character": named(blend_prompt="glass \udc00"),
    "a resize mode that does not exist": named(resize_mode="Stretch"),
    "a resize mode as number": named(resize_mode=1),
    "a resize mode as dict": named(resize_mode={}),
    "not a number where anything may be": named(output_origin=NAN),
}

MISSING_AND_BROKEN_PICTURES = {
    "no picture": job([{"method": "sd15_fg2bg"}]),
    "an empty text for a picture": from_foreground(""),
    "a broken picture that the method does not take": named(bg_image="AAAA"),
    **{f"a picture: {name}": from_foreground(raw) for name, raw in NO_PICTURES.items()},
    "20000 x 20000 in a small file": from_foreground(in_base64(bomb(20_000, 20_000))),
    "more pixels than the limit, fewer than Pillow's": from_foreground(in_base64(bomb(10_000, 10_001))),
}

CHANGE_MAPS = {
    "no map": changed(),
    "a source that does not exist": changed(source="Alpha: corners"),
    "a source as number": changed(source=1),
    "a broken map": changed(map_image="AAAA"),
    "a map of 20000 x 20000": changed(map_image=in_base64(bomb(20_000, 20_000))),
    "a map at an address": changed(map_image="http://127.0.0.1:9/map.png"),
    "a softness that is not a number": changed(source="Alpha: edges", softness=NAN),
    "half a column": changed(source="Strength fan", columns=2.5),
    "a million columns": changed(source="Strength fan", columns=10**6),
    "a name that does not exist": changed(strength=1),
    "an alpha of a picture that has none": changed(source="Alpha: edges"),
}

BROKEN_STARTS = {
    "a start that is cut in the middle": start_from(NO_PICTURES["cut in the middle"]),
    "the same with a change map": changed(NO_PICTURES["cut in the middle"], source="Strength fan"),
}

BODIES = {
    "not JSON": b"method=sd15_transparent_attn",
    "JSON cut off": json.dumps(named()).encode()[:-9],
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "a list": b"[]",
    "lists deeper than Python's stack": b"[" * 100_000,
    "scripts that are a list": json.dumps({**JOB, "alwayson_scripts": [METHOD]}).encode(),
    "a script that does not exist": json.dumps({**JOB, "alwayson_scripts": {"LayerDifuse": {"args": []}}}).encode(),
    "a number of more digits than Python reads": b'{"seed": ' + b"9" * 5000 + b"}",
}

DEEP_VALUES = {
    f"500 lists in one another as {name}": json.dumps(named(**{name: "DEEP"})).replace('"DEEP"', DEEP).encode()
    for name in ("method", "weight", "resize_mode", "fg_image", "fg_prompt", "passes")
}

LIKENED = {
    "a dict for the args": job({"method": METHOD}),
    "a dict without args": entry({"method": METHOD}),
    "a list without args": entry([True, METHOD]),
    "switch as text": job(["TRUE", METHOD]),
    "numbers as texts": named(method=METHOD.upper(), weight="1e0", stop_at="1"),
    "null for what is not given": named(weight=None, fg_image=None, fg_prompt=None, passes=None),
    "a prompt with signs of all kinds": named(fg_prompt="玻璃 \U0001f37e <script> {{}} \x07 ' \" \\ ; --"),
    "a list of all values": layerdiffuse(SD15_ATTENTION) | JOB,
}

RARE_PICTURES = {name: from_foreground(raw) for name, (raw, _, _) in RARE.items()} | {
    "1 x 1": from_foreground(sent(Image.new("RGBA", (1, 1), (*RED[:3], 99)))),
    "20000 x 1": from_foreground(sent(Image.new("RGB", (20_000, 1), RED[:3]))),
    "a data URL of lines": from_foreground(
        "data:image/png;base64," + "\r\n".join(sent(Image.new("RGB", (9, 9)))) + "\n"
    ),
}

RAREST = ("palette with alpha", "16-bit grey", "CMYK", "animated WebP", "1 x 1", "20000 x 1")  # each by its own path
RARE_STARTS = {name: start_from(RARE[name][0]) for name in ("palette with alpha", "16-bit RGBA")}

CLASSES: Mapping[str, tuple[Check, str, Mapping[str, "dict | bytes"]]] = {
    "switch and method": (refused, "txt2img", SWITCH_AND_METHOD),
    "numbers": (refused, "txt2img", NUMBERS),
    "names and texts": (refused, "txt2img", NAMES_AND_TEXTS),
    "missing and broken pictures": (refused, "txt2img", MISSING_AND_BROKEN_PICTURES),
    "deep values": (refused, "txt2img", DEEP_VALUES),
    "change maps": (refused, "img2img", CHANGE_MAPS),
    "broken starts": (refused, "img2img", BROKEN_STARTS),
    "bodies": (not_read, "txt2img", BODIES),
    "likened": (transparent, "txt2img", LIKENED),
    "rare pictures": (layers, "txt2img", {name: RARE_PICTURES[name] for name in RAREST}),
    "rare starts": (transparent, "img2img", RARE_STARTS),
}


@pytest.fixture(scope="module")
def usual(running) -> Image.Image:
    """What a normal job gave before anything else came."""
    running.use("sd15")
    return running.picture(layerdiffuse(SD15_ATTENTION), JOB)


@pytest.mark.parametrize(
    ("check", "endpoint", "rows"),
    [*CLASSES.values(), pytest.param(layers, "txt2img", RARE_PICTURES, marks=pytest.mark.full)],
    ids=[*CLASSES, "all rare pictures"],
)
def test_each_is_refused_or_done_and_harms_nothing(forge, usual, check, endpoint, rows):
    complaints = {name: complaint(check, post(forge, body, endpoint)) for name, body in rows.items()}
    assert not {name: said for name, said in complaints.items() if said}
    assert same(forge.picture(layerdiffuse(SD15_ATTENTION), JOB), usual)


@contextmanager
def visited():
    """An HTTP server's address, and the paths that were asked for there."""
    paths = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/picture.png", paths
        server.shutdown()


def test_an_address_is_not_asked_for_a_picture(forge):
    with visited() as (address, paths):
        for body, endpoint in (
            (from_foreground(address), "txt2img"),
            (from_foreground(f"data:{address}"), "txt2img"),
            (named(method=address), "txt2img"),
            (changed(map_image=address), "img2img"),
        ):
            refused(post(forge, body, endpoint))
    assert paths == []


def test_a_text_of_many_megabytes_is_refused_soon(forge, usual):
    refused(post(forge, from_foreground("A" * 220_000_000)))
    assert same(forge.picture(layerdiffuse(SD15_ATTENTION), JOB), usual)


def test_the_tables_are_as_long_as_they_should_be():
    assert sum(len(rows) for check, _, rows in CLASSES.values() if check in (refused, not_read)) >= 100
