"""Transparent pictures from a running Stable Diffusion WebUI Forge with LayerDiffuse. Python's standard library only.

    python examples/client.py "a glass bottle, high quality" -o bottle.png
    python examples/client.py "a glass bottle" --init bottle.png --strength 0.6 -o other.png
    python examples/client.py "a beach" --method xl_fg2ble --foreground bottle.png -o beach.png

Forge must be started with --api. `generate` and `methods` may as well be called from other programs.
"""

import argparse
import base64
import json
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

URL = "http://127.0.0.1:7860"
METHOD = "xl_transparent_attn"
ENDINGS = {b"\x89P": ".png", b"\xff\xd8": ".jpg", b"RI": ".webp"}  # of files, by how they begin
HINTS = {
    401: "The server asks for a user and a password. Give them with --auth user:password.",
    404: "The server has no such API. Start Forge with --api, and install LayerDiffuse.",
}
HINTS[405] = HINTS[404]  # what a server without the API answers to a POST


class ServerError(Exception):
    """Why there is no answer, in the server's own sentence where it has one."""


@dataclass(frozen=True)
class Picture:
    """What it shows ("foreground", "background" or "blend"; empty where there is nothing else), and the whole file."""

    shows: str
    data: bytes


@dataclass(frozen=True)
class Result:
    pictures: list[Picture]
    notes: list[str]  # what the server did beyond the request


def generate(
    url: str, prompt: str, layerdiffuse: Mapping[str, Any] = {}, init: bytes = b"", auth: str = "", **settings: Any
) -> Result:
    """Pictures from words, and from another picture where `init` is one: a PNG, JPG or WebP file. Raises ServerError.

    layerdiffuse: its own values by name, such as method, weight, fg_image; pictures as from `encoded`.
    auth: `user:password`. settings: fields of Forge's API, such as steps, width, height, seed, batch_size.
    """
    body = {
        **settings,
        "prompt": prompt,
        "alwayson_scripts": {"LayerDiffuse": {"args": [{"method": METHOD, **layerdiffuse}]}},
        "override_settings": {"return_grid": False, **settings.get("override_settings", {})},
    }
    if init:
        body["init_images"] = [encoded(init)]
    answer = ask(url, f"/sdapi/v1/{'img2img' if init else 'txt2img'}", body, auth)
    info = json.loads(answer["info"])
    # Behind those with an infotext come opaque pictures, masks and previews, as the server's settings say.
    pairs = zip(info["infotexts"], answer["images"])
    pictures = [Picture(_shows(text), base64.b64decode(data)) for text, data in pairs]
    return Result(pictures, info["extra_generation_params"].get("LayerDiffuse notes", []))


def methods(url: str, auth: str = "") -> Any:
    """What the server can do: a list of dicts with label, key, family, inputs, outputs and more. Raises ServerError."""
    return ask(url, "/layerdiffuse/v1/methods", auth=auth)


def encoded(file: bytes) -> str:
    return base64.b64encode(file).decode()


def ask(url: str, path: str, body: "Mapping[str, Any] | None" = None, auth: str = "") -> Any:
    """The server's answer; a body makes it a POST. Raises ServerError."""
    headers = {"Content-Type": "application/json"}
    if auth:
        headers["Authorization"] = f"Basic {encoded(auth.encode())}"
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url.rstrip("/") + path, data, headers)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise ServerError(HINTS.get(error.code) or _sentence(error)) from error
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ServerError(f"{url} does not answer as Forge does ({reason}). Is it running, and there?") from error


def _sentence(error: urllib.error.HTTPError) -> str:
    """What a refusal says: LayerDiffuse has one sentence, Forge may have a list of what is wrong."""
    try:
        detail = json.load(error)["detail"]
    except (ValueError, LookupError, TypeError):
        detail = ""
    text = detail if isinstance(detail, str) else json.dumps(detail)
    return text or f"The server failed with status {error.code}. Its log says why."


def _shows(infotext: str) -> str:
    found = re.search(r"LayerDiffuse shows: (\w+)", infotext)
    return found[1] if found else ""


# --- the program ------------------------------------------------------------------------------------------------


def save(pictures: list[Picture], output: Path) -> list[Path]:
    """One under that name; several with a number, and with what they show. The ending is that of the file.

    What is there already stays: the new one is then `bottle (2).png`.
    """
    paths = []
    for number, picture in enumerate(pictures, 1):
        parts = [output.stem, *([str(number), picture.shows] if len(pictures) > 1 else [])]
        path = output.with_name("-".join(filter(None, parts)) + ENDINGS.get(picture.data[:2], ".png"))
        paths.append(write(picture.data, path))
    return paths


def write(data: bytes, path: Path) -> Path:
    """Whole or not at all, under that name or the next that is free. Answers where it is."""
    free, number = path, 1
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem} ({number}){path.suffix}")
    part = free.with_name(f"{free.name}.part")
    try:
        part.write_bytes(data)
        part.replace(free)
    finally:
        part.unlink(missing_ok=True)
    return free


def size(text: str) -> tuple[int, int]:
    width, height = text.lower().split("x")
    return int(width), int(height)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Transparent pictures from Forge with LayerDiffuse.")
    parser.add_argument("prompt", nargs="?", default="", help="what to paint")
    parser.add_argument("--url", default=URL, help="where Forge runs (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=Path("picture.png"), help="default: %(default)s")
    parser.add_argument("--method", default=METHOD, help="its key or label (default: %(default)s)")
    parser.add_argument("--size", type=size, default=(1024, 1024), metavar="1024x1024", help="width and height")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=-1, help="default: another each time")
    parser.add_argument("--batch", type=int, default=1, help="how many pictures")
    for layer in ("foreground", "background", "blend"):
        parser.add_argument(f"--{layer}", type=Path, metavar="FILE", help="a picture that the method takes")
    parser.add_argument("--init", type=Path, metavar="FILE", help="a picture to start from (img2img)")
    parser.add_argument("--strength", type=float, default=0.6, help="how much of it changes (default: %(default)s)")
    parser.add_argument("--grey-background", action="store_true", help="for checkpoints that paint backgrounds")
    parser.add_argument("--auth", default="", metavar="USER:PASSWORD", help="as given to Forge's --api-auth")
    parser.add_argument("--list-methods", action="store_true", help="what the server can do, and nothing else")
    return parser.parse_args()


def result_of(given: argparse.Namespace) -> Result:
    files = {"fg_image": given.foreground, "bg_image": given.background, "blend_image": given.blend}
    script = {name: encoded(path.read_bytes()) for name, path in files.items() if path}
    script |= {"method": given.method, "grey_background": given.grey_background}
    width, height = given.size
    settings = {"width": width, "height": height, "steps": given.steps, "seed": given.seed, "batch_size": given.batch}
    if given.init:
        settings |= {"init": given.init.read_bytes(), "denoising_strength": given.strength}
    return generate(given.url, given.prompt, script, auth=given.auth, **settings)


def main() -> None:
    given = arguments()
    sys.stdout.reconfigure(errors="replace")  # a terminal's code page may lack letters of a note or a file name
    try:
        if given.list_methods:
            for row in methods(given.url, given.auth):
                takes, makes = (", ".join(row[name]) or "nothing" for name in ("inputs", "outputs"))
                print(f"{row['key']:22} {row['family']:5} takes {takes}; makes {makes}")
            return
        result = result_of(given)
        for note in result.notes:
            print(f"Note: {note}")
        for path in save(result.pictures, given.output):
            print(path)
    except (ServerError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)  # as shells say it


if __name__ == "__main__":
    main()
