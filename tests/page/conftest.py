"""A browser on the page of one running Forge; a page of its own for each test.

Without an installed Forge everything here is skipped, as in tests/forge.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests import brief
from tests.forge import data
from tests.forge.client import Forge
from tests.forge.conftest import installation, replaced_layer_file  # noqa: F401 – fixtures
from tests.page.tab import LOAD_LIMIT_S, PATIENCE_S, TRANSPARENT, Tab, load, loaded
from tools.browser import BrowserError, find_browser
from tools.forge import Installation, free_port

SERVER = "page"
DEFAULTS = {"Weight": 0.9, "Decoder Passes": "2", "Resize Mode": "Just Resize"}  # of the img2img tab, other than ours
# Nothing on the screen, and nothing that talks to the internet.
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
)
WINDOW = {"width": 1400, "height": 1350}


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What reloads the page of everybody comes last."""
    brief.mark([item for item in items if item.path.parent.name == "page"])
    items.sort(key=lambda item: item.path.name == "test_language.py")


@pytest.fixture(scope="session")
def forge(installation: Installation) -> Iterator[Forge]:  # noqa: F811
    hub_port = free_port()  # a download fails at once, unless a test serves it there
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{hub_port}"}
    write_defaults()
    page_files = ("--gradio-allowed-path", str(installation.directory))  # with a data folder elsewhere, its own are not
    with data.server(installation, SERVER, data.OURS, environment, page_files) as server:
        yield Forge(server, data.probe_file(SERVER), data.folder_of(SERVER), hub_port)


def write_defaults() -> None:
    """As the web UI keeps them for its user, and writes all others there when it starts."""
    path = data.folder_of(SERVER) / "ui-config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {f"customscript/layerdiffuse.py/img2img/{label}/value": value for label, value in DEFAULTS.items()}
    path.write_text(json.dumps(values), encoding="utf-8")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = find_browser()
    if not path:
        raise BrowserError("There is no Chromium or Chrome: python tools/browser.py installs one.")
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=path, args=ARGUMENTS) as browser:
        yield browser


@pytest.fixture(scope="session")
def context(browser: Browser, forge: Forge) -> Iterator[BrowserContext]:
    """One for all, so that its pages have the web UI's files at hand."""
    with browser.new_context(viewport=WINDOW, base_url=forge.server.url) as context:
        context.set_default_timeout(PATIENCE_S * 1000)
        context.route(lambda address: not address.startswith(forge.server.url), lambda route: route.abort())
        yield context


@pytest.fixture
def page(context: BrowserContext, forge: Forge) -> Iterator[Page]:
    """Loaded. Forge logs the exceptions of scripts and goes on; the browser, those of the page."""
    errors, mark = [], forge.mark()
    with context.new_page() as page:
        page.on("pageerror", lambda error: errors.append(error.stack))
        load(page)
        yield page
    assert not errors
    assert "*** Error" not in forge.logged_since(mark)


@pytest.fixture
def txt2img(page: Page) -> Tab:
    """With our panel ticked, and a small job."""
    tab = Tab(page, "txt2img")
    tab.prepare()
    tab.open()
    return tab


@pytest.fixture
def img2img(page: Page) -> Tab:
    """The same."""
    tab = Tab(page, "img2img")
    tab.show()
    tab.prepare()
    tab.open()
    return tab


@pytest.fixture
def in_chinese(page: Page, forge: Forge) -> Iterator[Callable[[], None]]:
    """Translates the page; it is in English again in the end."""
    yield lambda: speak(page, forge, "zh_CN", "透明图像")
    speak(page, forge, "None", TRANSPARENT)


def speak(page: Page, forge: Forge, language: str, method: str) -> None:
    """method: the first one, in that language."""
    forge.set_options(localization=language)
    with page.expect_navigation(wait_until="domcontentloaded", timeout=LOAD_LIMIT_S * 1000):
        page.locator("#footer a[onclick*=settings_restart_gradio]").click()  # Reload UI, in whatever language
    loaded(page, method)


@pytest.fixture(scope="session")
def cutout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disc of many colours on nothing, with a soft rim; what is invisible has colours too."""
    ramp = Image.linear_gradient("L").resize((64, 64))
    disc = Image.radial_gradient("L").resize((64, 64)).point(lambda far: max(0, min(255, 4 * (128 - far))))
    return saved(Image.merge("RGBA", (ramp, ramp.rotate(90), ramp.rotate(180), disc)), tmp_path_factory, "cutout")


@pytest.fixture(scope="session")
def stencil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All or nothing, and black where nothing is: what a clipboard keeps."""
    image = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(image).ellipse((12, 12, 50, 50), fill=(220, 40, 90, 255))
    return saved(image, tmp_path_factory, "stencil")


def saved(image: Image.Image, factory: pytest.TempPathFactory, name: str) -> Path:
    path = factory.mktemp("images") / f"{name}.png"
    image.save(path)
    return path
