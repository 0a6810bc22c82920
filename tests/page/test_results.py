"""What is done with a result: looked at, downloaded, saved, sent on."""

import re
import shutil
from zipfile import ZipFile

from PIL import Image, ImageChops
from playwright.sync_api import expect

from tests.forge.client import (
    alpha_varies,
    same,
)
from tests.forge.hosts import HOST
from tests.page.tab import BACKGROUND, FOREGROUND, JOB_LIMIT_S, PATIENCE_S, Tab, content_hash, downloaded, eventually


def test_a_transparent_result_is_shown_and_downloaded(txt2img):
    picture, opaque = txt2img.made()
    assert alpha_varies(picture) and not alpha_varies(opaque)
    page = txt2img.page
    shown = txt2img.results.locator("img[data-testid=detailed-image]")
    assert same(txt2img.fetched(shown.get_attribute("src")), picture)
    with page.expect_download() as by_gallery:
        txt2img.results.get_by_label("Download").click()
    page.locator("#save_txt2img").click()
    link = page.locator("#download_files_txt2img a")
    expect(link).to_be_visible()
    with page.expect_download() as by_save:
        link.click()
    for download in (by_gallery, by_save):
        assert download.value.suggested_filename.endswith(".png")
        assert same(downloaded(download.value), picture)


def test_a_result_becomes_the_foreground_of_the_next_job(txt2img):
    result = txt2img.made()[0]
    txt2img.switch.uncheck()
    txt2img.send("layerdiffuse_fg")
    eventually(lambda: (txt2img.ticked, txt2img.method), (True, BACKGROUND))
    txt2img.expect_filled("fg_image")
    assert same(txt2img.box_picture("fg_image"), result)
    sent = f"LayerDiffuse foreground image: {content_hash(result)},"
    assert all(sent in picture.info["parameters"] for picture in txt2img.made())


def test_any_picture_of_the_gallery_can_be_the_background(txt2img):
    result, opaque = txt2img.made()
    txt2img.select(1)
    txt2img.send("layerdiffuse_bg")
    eventually(lambda: txt2img.method, FOREGROUND)
    txt2img.expect_filled("bg_image")
    assert same(txt2img.box_picture("bg_image"), opaque)
    txt2img.select(0)
    txt2img.send("layerdiffuse_bg")  # which the chosen method takes already
    eventually(lambda: same(txt2img.box_picture("bg_image"), result), True)
    assert txt2img.method == FOREGROUND


def test_a_result_becomes_the_blend_of_the_methods_that_take_one(txt2img):
    result = txt2img.made()[0]
    txt2img.send("layerdiffuse_blend")
    eventually(lambda: txt2img.method, "Background for a foreground and its blend")
    txt2img.expect_filled("blend_image")
    assert same(txt2img.box_picture("blend_image"), result)


def looks_the_same(first, second):
    """The same alpha, and over black the same colours: a canvas keeps them premultiplied, and so rounds them."""
    over_black = [Image.alpha_composite(Image.new("RGBA", each.size, "black"), each) for each in (first, second)]
    furthest = max(high for _, high in ImageChops.difference(*over_black).getextrema())
    return same(first.getchannel("A"), second.getchannel("A")) and furthest <= 2


def test_the_web_uis_own_buttons_keep_alpha(txt2img):
    result = txt2img.made()[0]
    for target, tab in {"img2img": "img2img_img2img_tab", "inpaint": "img2img_inpaint_tab"}.items():
        txt2img.show()
        txt2img.send(target)
        eventually(lambda tab=tab: len(txt2img.on_canvas(tab)), 2)
        assert looks_the_same(txt2img.on_canvas(tab)[1], result)


def gallery_of_a_batch(tab: Tab) -> list[Image.Image]:
    """The grid, two transparent pictures, their opaque ones."""
    tab.set_number("batch_size", 2)
    pictures = tab.made()
    assert [alpha_varies(each) for each in pictures] == [True, True, True, False, False]
    return pictures


def test_save_and_zip_write_everything_that_is_shown(forge, txt2img):
    """After a job, the grid is selected: then all are saved. Where names have no number, Forge lets the first picture
    replace the grid, which has the same seed."""
    folder = forge.folder / ("output" if HOST == "neo" else "log") / "images"
    shutil.rmtree(folder, ignore_errors=True)
    with forge.options(return_grid=True, save_images_add_number=False):
        pictures = gallery_of_a_batch(txt2img)
        for button in ("save", "save_zip"):
            txt2img.page.locator(f"#{button}_txt2img").click()
            expect(txt2img.log).to_contain_text("Saved: ", timeout=PATIENCE_S * 1000)
            link = txt2img.page.locator("#download_files_txt2img a").first
            expect(link).to_have_attribute("download", re.compile("[.]zip$" if button == "save_zip" else "[.]png$"))
    saved, [archive] = list(folder.glob("*.png")), list(folder.glob("*.zip"))
    assert {path.stem: alpha_varies(Image.open(path)) for path in saved} == {
        "7-apple": True,
        "8-apple": True,
        "7-apple-opaque": False,
        "8-apple-opaque": False,
    }
    assert len(ZipFile(archive).namelist()) == len(pictures)


def test_every_picture_that_is_shown_has_a_seed_and_an_infotext(forge, txt2img):
    with forge.options(return_grid=True):
        gallery_of_a_batch(txt2img)
    for index, seed in enumerate((7, 7, 8, 7, 8)):
        txt2img.set_number("seed", -1)
        txt2img.select(index)
        expect(txt2img.page.locator("#html_info_txt2img")).to_contain_text(f"Seed: {seed}")
        txt2img.page.locator("#txt2img_reuse_seed").click()
        eventually(lambda: txt2img.page.locator("#txt2img_seed input").first.input_value(), f"{seed}")


def test_the_upscale_button_replaces_a_picture_with_all_that_belongs_to_it(txt2img):
    txt2img.made()
    txt2img.page.locator("#txt2img_upscale").click()
    eventually(lambda: [each.size for each in txt2img.pictures], [(128, 128)] * 2, JOB_LIMIT_S)
    picture, opaque = txt2img.pictures
    assert alpha_varies(picture) and not alpha_varies(opaque)
    txt2img.select(1)
    expect(txt2img.page.locator("#html_info_txt2img")).to_contain_text("LayerDiffuse extra: opaque")
