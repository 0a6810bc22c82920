"""Images given to the panel arrive with their alpha, whichever way they come."""

import base64

import pytest
from PIL import Image
from playwright.sync_api import expect

from tests.page.tab import BACKGROUND, content_hash

DROP = """data => {
    const bytes = Uint8Array.from(atob(data), character => character.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], "dropped.png", {type: "image/png"}));
    return transfer;
}"""
COPY = """data => {
    const bytes = Uint8Array.from(atob(data), character => character.charCodeAt(0));
    return navigator.clipboard.write([new ClipboardItem({"image/png": new Blob([bytes], {type: "image/png"})})]);
}"""


def encoded(file):
    return base64.b64encode(file.read_bytes()).decode()


def upload(tab, file):
    tab.upload("fg_image", file)


def drop(tab, file):
    transfer = tab.page.evaluate_handle(DROP, encoded(file))
    tab.part("fg_image").locator(".upload-container button").dispatch_event("drop", {"dataTransfer": transfer})


def paste(tab, file):
    """The clipboard keeps no colours where nothing is, and no exact ones where little is."""
    tab.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.page.bring_to_front()
    tab.page.evaluate(COPY, encoded(file))
    tab.part("fg_image").get_by_label("Paste from clipboard").click()


@pytest.mark.parametrize(("give", "name"), [(upload, "cutout"), (drop, "cutout"), (paste, "stencil")])
def test_alpha_arrives(txt2img, request, give, name):
    file = request.getfixturevalue(name)
    txt2img.choose(BACKGROUND)
    expect(txt2img.part("fg_image")).to_be_visible()
    give(txt2img, file)
    txt2img.expect_filled("fg_image")
    for picture in txt2img.made():
        assert f"LayerDiffuse foreground image: {content_hash(Image.open(file))}," in picture.info["parameters"]
