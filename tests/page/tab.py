"""A tab of Forge's page, as a person sees and uses it. Every wait has an end."""

import base64
import hashlib
import io
import re
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Download, Locator, Page, expect

from tests.forge.hosts import GRADIO_3, HOST

# What the list says of the methods for one kind of checkpoint; the list of all says the kind too.
TRANSPARENT = "Transparent picture"
BACKGROUND = "Background for a foreground"
FOREGROUND = "Foreground for a background"
LAYERS = "Layers from a prompt"

PATIENCE_S = 20
JOB_LIMIT_S = 120
LOAD_LIMIT_S = 60
# What a panel restores, and how it is read from the page; hidden parts have values too.
SLIDERS = ("weight", "starting_step", "ending_step")
DROPDOWNS = ("method", "passes")
PROMPTS = ("fg_prompt", "bg_prompt", "blend_prompt")
IMAGES = ("fg_image", "bg_image", "blend_image")
CONDITIONAL = (*IMAGES, *PROMPTS, "resize_mode", "passes", "grey_background")


# Of the checkpoint: Gradio 3's list says it always.
KIND = r"( \(SD(1\.5|XL)\))?" if HOST in GRADIO_3 else ""


def shortened(method: str) -> str:
    return re.sub(f"{KIND}$", "", method)


def eventually(look: Callable[[], Any], wanted: Any, limit_s: float = PATIENCE_S) -> None:
    """Wait until what is seen is what is wanted; at the end of the patience, fail with both."""
    end = time.monotonic() + limit_s
    while (seen := look()) != wanted and time.monotonic() < end:
        time.sleep(0.1)
    assert seen == wanted, f"{seen} instead of {wanted}"


def content_hash(image: Image.Image) -> str:
    """What infotexts call an image by."""
    rgba = image.convert("RGBA")
    return hashlib.sha256(f"{rgba.width}x{rgba.height}".encode() + rgba.tobytes()).hexdigest()[:10]


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def downloaded(download: Download) -> Image.Image:
    return opened(Path(download.path()).read_bytes())


@dataclass(frozen=True)
class Tab:
    page: Page
    name: str  # txt2img or img2img

    # --- parts of the page

    def part(self, name: str) -> Locator:
        """Of our panel."""
        return self.page.locator(f"#layerdiffuse-{self.name}-{name}")

    @property
    def panel(self) -> Locator:
        return self.page.locator(f"#layerdiffuse-{self.name}")

    @property
    def switch(self) -> Locator:
        return self.page.locator(f"#layerdiffuse-{self.name}-visible-checkbox")

    @property
    def results(self) -> Locator:
        return self.page.locator(f"#{self.name}_gallery")

    @property
    def log(self) -> Locator:
        """The line under the gallery."""
        return self.page.locator(f"#html_log_{self.name}")

    @property
    def prompt(self) -> Locator:
        return self.page.locator(f"#{self.name}_prompt textarea")

    # --- what is seen

    @property
    def ticked(self) -> bool:
        return self.switch.is_checked()

    @property
    def method(self) -> str:
        return shortened(self.part("method").locator("input").input_value())

    @property
    def methods(self) -> list[str]:
        """The list that opens."""
        box = self.part("method").locator("input")
        box.focus()
        options = self.page.get_by_role("option")
        expect(options.first).to_be_visible()
        labels = options.evaluate_all("options => options.map(option => option.ariaLabel)")
        box.blur()
        expect(options).to_have_count(0)
        return [shortened(label) for label in labels]

    @property
    def visible(self) -> set[str]:
        """Of the parts that not every method has."""
        return {name for name in CONDITIONAL if self.part(name).is_visible()}

    @property
    def status(self) -> list[str]:
        """The sentences of the status line."""
        return [" ".join(sentence.split()) for sentence in self.part("status").inner_text().split("|")]

    @property
    def settings(self) -> dict[str, Any]:
        """Every control that an infotext restores."""
        return {
            "enabled": self.ticked,
            **{name: float(self.part(name).locator("input[type=number]").input_value()) for name in SLIDERS},
            **{name: self.part(name).locator("input").input_value() for name in DROPDOWNS},
            **{name: self.part(name).locator("textarea").input_value() for name in PROMPTS},
            "resize_mode": self.part("resize_mode").locator("input:checked").input_value(),
            "grey_background": self.part("grey_background").locator("input").is_checked(),
        }

    @property
    def addresses(self) -> list[str]:
        """Of the pictures in the gallery, in order."""
        return self.results.locator(".grid-container img").evaluate_all("images => images.map(image => image.src)")

    @property
    def pictures(self) -> list[Image.Image]:
        """In the gallery, as the page gets them."""
        return [self.fetched(address) for address in self.addresses]

    def box_picture(self, name: str) -> Image.Image:
        """What an image box of ours shows."""
        return self.fetched(self.part(name).locator(".image-frame img").get_attribute("src"))

    def on_canvas(self, tab: str) -> list[Image.Image]:
        """What the canvas of a tab sends to the server: a drawing, and the picture that it is drawn on."""
        values = self.page.locator(f"#{tab} textarea").evaluate_all("areas => areas.map(area => area.value)")
        return [opened(base64.b64decode(value.split(",")[1])) for value in values if value.startswith("data:image")]

    def fetched(self, address: str) -> Image.Image:
        answer = self.page.request.get(address)
        assert answer.ok, f"{answer.status} for {address}"
        return opened(answer.body())

    # --- what is done

    def open(self, panel: str = "") -> None:
        """Open a panel, ours or that with another id, which ticks it."""
        panel = panel or f"layerdiffuse-{self.name}"
        self.page.locator(f"#{panel} .label-wrap").first.click()
        expect(self.page.locator(f"#{panel}-visible-checkbox")).to_be_checked()

    def choose(self, option: str, name: str = "method") -> None:
        self.part(name).locator("input").click()
        self.page.get_by_role("option", name=re.compile(f"^{re.escape(option)}{KIND}$")).click()

    def set_number(self, name: str, value: float, prefix: str = "") -> None:
        field = self.page.locator(f"#{prefix or self.name + '_'}{name} input[type=number]")
        field.fill(str(value))
        field.press("Tab")

    def prepare(self, size: int = 64, steps: int = 1) -> None:
        """A small job."""
        self.prompt.fill("apple")
        for name, value in {"width": size, "height": size, "steps": steps, "seed": 7}.items():
            self.set_number(name, value)

    def upload(self, name: str, file: Path) -> None:
        self.part(name).locator("input[type=file]").set_input_files(file)
        self.expect_filled(name)

    def expect_filled(self, name: str) -> None:
        expect(self.part(name).locator(".image-frame img")).to_be_visible(timeout=PATIENCE_S * 1000)

    def generate(self) -> None:
        """Press the button and wait for what comes of it: other pictures, or another sentence."""
        before = (self.addresses, self.log.inner_text())
        self.page.locator(f"#{self.name}_generate").click()
        end = time.monotonic() + JOB_LIMIT_S
        while self._busy or (self.addresses, self.log.inner_text()) == before:
            assert time.monotonic() < end, f"the job has not ended after {JOB_LIMIT_S} s"
            self.page.wait_for_timeout(200)

    @property
    def _busy(self) -> bool:
        return self.page.locator(f"#{self.name}_interrupt").is_visible() or not self.log.inner_text().strip()

    def made(self) -> list[Image.Image]:
        """Generate; the pictures, of which there must be some."""
        self.generate()
        pictures = self.pictures
        assert pictures, self.log.inner_text()
        return pictures

    def select(self, index: int) -> None:
        """A picture of the gallery, by its thumbnail: the large one would open over the page."""
        self.results.locator(".thumbnails button").nth(index).click()

    def send(self, target: str) -> None:
        """One of the buttons under the gallery."""
        self.page.locator(f"#{self.name}_send_to_{target}").click()

    def paste(self, infotext: str) -> None:
        """Into the prompt, and from there into all controls."""
        self.prompt.fill(infotext)
        self.page.locator(f"#{self.name}_tools #paste").click()

    def show(self) -> None:
        """Bring the tab to the front."""
        show(self.page, self.name.capitalize())
        expect(self.prompt).to_be_visible()


def load(page: Page) -> None:
    """The page of the server."""
    page.goto("/", wait_until="domcontentloaded")
    loaded(page)


def loaded(page: Page, method: str = TRANSPARENT) -> None:
    """Wait until the load events are through: they fill the status line and the list, where this is chosen."""
    expect(page.locator("#layerdiffuse-txt2img-status span").first).to_be_attached(timeout=LOAD_LIMIT_S * 1000)
    eventually(lambda: Tab(page, "txt2img").method, method)


def show(page: Page, title: str) -> None:
    page.locator("#tabs > .tab-nav button", has_text=title).first.click()


@contextmanager
def checkpoint(page: Page, name: str):
    """The page's Checkpoint, until the block ends; read with the next job, not now."""
    box = page.locator(".model_selection input").first
    before = box.input_value()
    pick(page, box, name)
    yield
    pick(page, box, before)


def pick(page: Page, box: Locator, name: str) -> None:
    box.click()
    page.get_by_role("option", name=name).first.click()
