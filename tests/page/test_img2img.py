"""The img2img tab: what starts from a transparent picture stays transparent."""

from PIL import Image
from playwright.sync_api import expect

from tests.forge.client import alpha_varies, same
from tests.page.tab import eventually

CHANGE = "differential-img2img"
# Parts of the cutout, which is 64 pixels wide and high.
LEFT, RIGHT = (0, 0, 40, 64), (40, 0, 64, 64)
CORNER, RIM = (0, 0, 6, 6), (16, 28, 24, 36)


def test_a_user_s_own_defaults_count(img2img):
    settings = img2img.settings
    assert (settings["weight"], settings["passes"], settings["resize_mode"]) == (0.9, "2", "Just Resize")


def test_a_change_map_from_alpha_keeps_what_it_protects(img2img, cutout):
    page = img2img.page
    page.locator("#img2img_img2img_tab input[type=file]").first.set_input_files(cutout)
    eventually(lambda: len(img2img.on_canvas("img2img_img2img_tab")), 2)
    img2img.open(CHANGE)
    expect(page.locator(f"#{CHANGE}-map_image")).to_be_visible()
    page.locator(f"#{CHANGE}-source input").click()
    page.get_by_role("option", name="Alpha: edges", exact=True).click()
    expect(page.locator(f"#{CHANGE}-map_image")).not_to_be_visible()
    img2img.set_number("softness", 4, prefix=f"{CHANGE}-")
    img2img.set_number("steps", 2)
    picture = img2img.made()[0]
    original = img2img.on_canvas("img2img_img2img_tab")[1]
    assert 'Differential Diffusion: "Alpha: edges"' in picture.info["parameters"]
    assert alpha_varies(picture)
    assert same(picture.crop(CORNER), original.crop(CORNER))
    assert not same(picture.crop(RIM), original.crop(RIM))


def test_painting_a_mask_keeps_what_is_outside_it(img2img, cutout):
    page = img2img.page
    page.locator("#mode_img2img .tab-nav button", has_text="Inpaint").first.click()
    page.locator("#img2img_inpaint_tab input[type=file]").first.set_input_files(cutout)
    eventually(lambda: len(img2img.on_canvas("img2img_inpaint_tab")), 2)
    canvas = page.locator("#img2img_inpaint_tab canvas").last.bounding_box()
    middle = (canvas["x"] + canvas["width"] / 2, canvas["y"] + canvas["height"] / 2)
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 40, middle[1], steps=5)
    page.mouse.up()
    img2img.set_number("mask_blur", 0)
    img2img.set_number("steps", 2)
    picture = img2img.made()[0]
    drawing, original = img2img.on_canvas("img2img_inpaint_tab")
    kept = drawing.getchannel("A").point(lambda painted: 0 if painted else 255)
    assert 0 < sum(map(bool, kept.tobytes())) < 64 * 64
    assert same(Image.composite(picture, original, kept), original)
    assert not same(picture, original)
    assert alpha_varies(picture)


def test_inpaint_upload_takes_its_picture_as_opaque(img2img, cutout, tmp_path):
    """The web UI's box for it has no alpha."""
    page = img2img.page
    mask = Image.new("L", (64, 64))
    mask.paste(255, RIGHT)
    mask.save(tmp_path / "mask.png")
    page.locator("#mode_img2img .tab-nav button", has_text="Inpaint upload").click()
    page.locator("#img_inpaint_base input[type=file]").set_input_files(cutout)
    page.locator("#img_inpaint_mask input[type=file]").set_input_files(tmp_path / "mask.png")
    for box in ("base", "mask"):
        expect(page.locator(f"#img_inpaint_{box} .image-frame img")).to_be_visible()
    img2img.set_number("mask_blur", 0)
    img2img.set_number("steps", 2)
    picture, original = img2img.made()[0], Image.open(cutout).convert("RGB").convert("RGBA")
    assert same(picture.crop(LEFT), original.crop(LEFT))
    assert not same(picture.crop(RIGHT), original.crop(RIGHT))
