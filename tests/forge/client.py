"""A running Forge as the tests see it: requests in, pictures, latents, log lines and figures out."""

import base64
import hashlib
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from PIL import Image

from tests.forge.data import CHECKPOINTS, OPTIONS, controlnet_file
from tools.forge import Server

SD15_ATTENTION = "(SD1.5) Only Generate Transparent Image (Attention Injection)"
SD15_FG_TO_BG = "(SD1.5) From Foreground to Background (need batch size 2)"
SD15_BG_TO_FG = "(SD1.5) From Background to Foreground (need batch size 2)"
SD15_JOINT = "(SD1.5) Generate Everything Together (need batch size 3)"
SDXL_ATTENTION = "(SDXL) Only Generate Transparent Image (Attention Injection)"
SDXL_CONV = "(SDXL) Only Generate Transparent Image (Conv Injection)"
SDXL_FG_TO_BLEND = "(SDXL) From Foreground to Blending"
SDXL_FG_BLEND_TO_BG = "(SDXL) From Foreground and Blending to Background"
SDXL_BG_TO_BLEND = "(SDXL) From Background to Blending"
SDXL_BG_BLEND_TO_FG = "(SDXL) From Background and Blending to Foreground"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JOB_LIMIT_S = 600

BASE_REQUEST = {
    "prompt": "apple",
    "seed": 1,
    "steps": 1,
    "width": 128,
    "height": 128,
    "cfg_scale": 7,
    "sampler_name": "Euler",
    "scheduler": "Automatic",
}


def layerdiffuse(
    method: str,
    weight: float = 1.0,
    stop: float = 1.0,
    *,
    fg_image: "Image.Image | None" = None,
    bg_image: "Image.Image | None" = None,
    blend_image: "Image.Image | None" = None,
    fg_prompt: str = "",
    bg_prompt: str = "",
    blend_prompt: str = "",
) -> dict:
    """The request field that turns LayerDiffuse on, with all twelve arguments of the existing extension."""
    images = [image and to_base64(image) for image in (fg_image, bg_image, blend_image)]
    prompts = (fg_prompt, bg_prompt, blend_prompt)
    return layerdiffuse_arguments(True, method, weight, stop, *images, "Crop and Resize", False, *prompts)


def layerdiffuse_arguments(*arguments) -> dict:
    return {"alwayson_scripts": {"LayerDiffuse": {"args": list(arguments)}}}


def differential(names: dict) -> dict:
    """The request field that turns Differential Diffusion on."""
    return {"alwayson_scripts": {"Differential Diffusion": {"args": [names]}}}


def controlnet_title() -> str:
    """Forge lists a model by its name and eight digits of a hash of 64 KiB in it, and knows it by this title alone."""
    with controlnet_file().open("rb") as file:
        file.seek(0x100000)
        digest = hashlib.sha256(file.read(0x10000)).hexdigest()
    return f"{controlnet_file().stem} [{digest[:8]}]"


def controlnet(image: Image.Image) -> dict:
    """The request field for Forge's own ControlNet (SD1.5).

    A hint that is black all over fails: Forge then looks for a scribble, which a request does not have.
    """
    unit = {"model": controlnet_title(), "module": "None", "image": to_base64(image), "save_detected_map": False}
    return {"alwayson_scripts": {"ControlNet": {"args": [unit]}}}


def merged(*fields: dict) -> dict:
    """One request: a later field's value counts, but scripts of several fields work side by side."""
    body, scripts = {}, {}
    for part in fields:
        body |= part
        scripts |= part.get("alwayson_scripts", {})
    return {**body, "alwayson_scripts": scripts}


def to_base64(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def opened(text: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    image.load()
    return image


def alpha_varies(image: Image.Image) -> bool:
    """Real transparency, not an opaque picture with an alpha channel, nor one with a message in the lowest bit."""
    return image.mode == "RGBA" and len(set(image.getchannel("A").tobytes())) > 4


def same(first: Image.Image, second: Image.Image) -> bool:
    return (first.mode, first.size, first.tobytes()) == (second.mode, second.size, second.tobytes())


def all_different(images: list[Image.Image]) -> bool:
    return len({image.tobytes() for image in images}) == len(images)


@dataclass(frozen=True)
class Answer:
    status: int
    body: dict

    @cached_property
    def files(self) -> list[bytes]:
        return [base64.b64decode(data) for data in self.body.get("images") or []]

    @cached_property
    def images(self) -> list[Image.Image]:
        images = [Image.open(io.BytesIO(data)) for data in self.files]
        for image in images:
            image.load()
        return images

    @property
    def transparent(self) -> list[Image.Image]:
        return [image for image in self.images if alpha_varies(image)]

    @cached_property
    def info(self) -> dict:
        return json.loads(self.body["info"])

    @property
    def infotexts(self) -> list[str]:
        return self.info["infotexts"]

    @property
    def notes(self) -> str:
        return "\n".join(self.info["extra_generation_params"].get("LayerDiffuse notes", []))

    @property
    def refusal(self) -> str:
        """What the person is told; fails unless the job was refused with one sentence and without a picture."""
        assert self.status == 422, f"status {self.status}, {len(self.files)} pictures: {str(self.body)[:300]}"
        detail = self.body["detail"]
        assert not self.body.get("images"), "a refused job returned pictures"
        assert isinstance(detail, str) and " " in detail and detail.rstrip().endswith("."), detail
        assert "Traceback" not in detail and "\n" not in detail.strip(), detail
        return detail


@dataclass(frozen=True)
class Call:
    """One request, for the table of figures at the end of the run."""

    kind: str
    seconds: float


@dataclass
class Forge:
    server: Server
    probe: Path
    folder: Path
    hub_port: int = 0  # where the server looks for downloads
    checkpoint: str = ""
    calls: list[Call] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # shown at the end of the run
    peak_memory_gb: float = 0.0

    # --- requests

    def request(self, endpoint: str, body: "dict | None" = None) -> Answer:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.server.url}/{endpoint}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=JOB_LIMIT_S) as answer:
                return Answer(answer.status, json.load(answer) or {})
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            return Answer(error.code, json.loads(text) if text.startswith("{") else {"detail": text})

    def job(self, endpoint: str, *fields: dict, **more) -> Answer:
        body = merged(BASE_REQUEST, *fields, more)
        started = time.monotonic()
        answer = self.request(f"sdapi/v1/{endpoint}", body)
        self.calls.append(Call(self.describe(endpoint, body, answer), time.monotonic() - started))
        return answer

    def txt2img(self, *fields: dict, **more) -> Answer:
        return self.job("txt2img", *fields, **more)

    def img2img(self, init: Image.Image, *fields: dict, **more) -> Answer:
        return self.job("img2img", {"init_images": [to_base64(init)], "denoising_strength": 0.7}, *fields, **more)

    def picture(self, *fields: dict, **more) -> Image.Image:
        """The first picture of a txt2img job, which must succeed."""
        answer = self.txt2img(*fields, **more)
        assert answer.status == 200, answer.body
        return answer.images[0]

    def script(self, name: str, values: "dict[str, object]", is_img2img: bool = False) -> dict:
        """The request fields that run one of the host's scripts, with these values by label and its own of the rest."""
        rows = self.request("sdapi/v1/script-info").body
        [arguments] = [row["args"] for row in rows if row["name"] == name and row["is_img2img"] == is_img2img]
        labels = [(argument["label"] or "").lower() for argument in arguments]
        asked = {labels.index(label.lower()): value for label, value in values.items()}
        return {
            "script_name": name,
            "script_args": [asked.get(i, argument["value"]) for i, argument in enumerate(arguments)],
        }

    def describe(self, endpoint: str, body: dict, answer: Answer) -> str:
        arguments = body.get("alwayson_scripts", {}).get("LayerDiffuse", {}).get("args", [False])
        count = body.get("batch_size", 1) * body.get("n_iter", 1)
        what = "transparent" if arguments and arguments[0] is True else "plain"
        extra = ", hires" if body.get("enable_hr") else ""
        extra += f", {body['script_name']}" if body.get("script_name") else ""
        extra += "" if answer.status == 200 else f", refused ({answer.status})"
        size = f"{body['width']}x{body['height']}, {body['steps']} steps, {count} pictures"
        return f"{self.checkpoint} {endpoint} {what} {size}{extra}"

    # --- settings

    def use(self, checkpoint: str) -> None:
        """Forge reads the file with the next job."""
        if checkpoint != self.checkpoint:
            self.set_options(sd_model_checkpoint=CHECKPOINTS[checkpoint])
            self.checkpoint = checkpoint

    def set_options(self, **values) -> None:
        answer = self.request("sdapi/v1/options", values)
        assert answer.status == 200, answer.body

    @contextmanager
    def options(self, **values) -> Iterator[None]:
        """The server's settings with these values, until the block ends; what they were, data.OPTIONS says."""
        self.set_options(**values)
        try:
            yield
        finally:
            self.set_options(**{name: OPTIONS[name] for name in values})

    # --- what it wrote

    def mark(self) -> int:
        return self.server.log.stat().st_size

    def logged_since(self, mark: int) -> str:
        with self.server.log.open("rb") as log:
            log.seek(mark)
            return log.read().decode(errors="replace")

    @contextmanager
    def probed(self) -> "Iterator[list[dict]]":
        """What the probe recorded inside the block, filled in when it ends."""
        latents: list[dict] = []
        before = self.probe.stat().st_size
        yield latents
        with self.probe.open("rb") as file:
            file.seek(before)
            latents.extend(json.loads(line) for line in file)

    @property
    def outputs(self) -> Path:
        """Where pictures are saved; of another name in Neo."""
        return self.folder / ("output" if (self.folder / "output").exists() else "outputs")

    def saved_files(self) -> set[Path]:
        return {path for path in self.outputs.rglob("*") if path.is_file()}

    def note_peak_memory(self) -> None:
        """Keep the highest resident memory of the server so far; Linux only, and only while it runs."""
        status = Path(f"/proc/{self.server.process.pid}/status")
        if status.exists():
            lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines() if ":" in line)
            self.peak_memory_gb = int(lines["VmHWM"].split()[0]) * 1024 / 1e9
