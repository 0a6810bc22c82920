"""What comes instead of a good picture: rare formats that are read as they are meant, and files that are none."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.images.reading import MAX_PIXELS, TooLarge, read_image
from lib_layerdiffuse.images.rgba import ResizeMode, fit, from_pil
from lib_layerdiffuse.methods import shortened
from lib_layerdiffuse.request.differential import Change
from lib_layerdiffuse.request.form import IMAGE_NEEDS
from lib_layerdiffuse.request.layers import Request
from lib_layerdiffuse.webui.host import init_picture
from tests.odd_files import NO_PICTURES, RARE, RED, bomb, file_of, in_base64, png_of, sent

GREY_RAMP = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # every eight-bit value, in sixteen bits


@pytest.mark.parametrize(("raw", "left", "right"), RARE.values(), ids=RARE)
def test_a_rare_format_is_read_as_it_is_meant(raw: str, left: tuple[int, ...], right: tuple[int, ...]) -> None:
    image = read_image(raw)
    pixels = from_pil(image)
    values = (pixels[:, 0, [0, -1]] * 255).round().int().T.tolist()
    opaque = [255] * (4 - len(pixels))
    assert [tuple(value + opaque) for value in values] == [left, right]
    read_again = image.convert("RGBA")  # what resizing and img2img take
    assert [read_again.getpixel((x, 0)) for x in (0, image.width - 1)] == [left, right]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_are_scaled_not_cut(kind: str) -> None:
    image = read_image(sent(Image.fromarray(GREY_RAMP), kind))
    assert np.array_equal(np.array(image).ravel(), np.arange(256))


def test_a_cmyk_photo_is_its_colour() -> None:
    image = read_image(sent(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100))
    red, green, blue = (band.getextrema() for band in image.convert("RGB").split())
    assert red[0] > 245 and green[1] < 10 and blue[1] < 10


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 20_000)])
@pytest.mark.parametrize("mode", ResizeMode)
def test_an_extreme_shape_is_brought_to_any_size(size: tuple[int, int], mode: ResizeMode) -> None:
    fitted = fit(read_image(sent(Image.new("RGB", size, RED[:3]))), mode, 64, 64)
    assert fitted.size == (64, 64)
    assert fitted.getpixel((32, 32)) == RED


@pytest.mark.parametrize("raw", NO_PICTURES.values(), ids=NO_PICTURES)
def test_what_is_no_picture_is_refused_in_a_sentence(raw: object) -> None:
    with pytest.raises(LayerDiffuseError) as caught:
        Request.parse([{"method": "sd15_fg2bg", "fg_image": raw}])
    sentence = str(caught.value)
    assert sentence.startswith("Foreground (fg_image in API calls) is ")
    assert sentence.endswith(f"Set it to {IMAGE_NEEDS}.")
    assert len(sentence) < 300
    assert sentence.isprintable()


def test_a_start_of_img2img_that_is_cut_is_refused_when_it_is_read() -> None:
    """The web UI has opened it, but not read it to its end."""
    picture = Image.effect_noise((64, 64), 90)
    opened = Image.open(io.BytesIO(file_of(picture)[:-900]))
    with pytest.raises(LayerDiffuseError, match="starts from is damaged"):
        init_picture(opened)
    assert init_picture(picture).tobytes() == picture.convert("RGBA").tobytes()


SIDE = 20_000
LIMIT_SIDE = 10_000  # squared, the limit


@pytest.mark.parametrize(("width", "height"), [(SIDE, SIDE), (MAX_PIXELS + 1, 1), (LIMIT_SIDE, LIMIT_SIDE + 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_small_file_with_too_many_pixels_is_refused_by_its_header(width: int, height: int) -> None:
    raw = in_base64(bomb(width, height))
    with pytest.raises(TooLarge):
        read_image(raw)
    with pytest.raises(LayerDiffuseError, match=f"fg_image .* has more than {MAX_PIXELS:,} pixels"):
        Request.parse([{"method": "sd15_fg2bg", "fg_image": raw}])
    with pytest.raises(LayerDiffuseError, match=f"map_image .* has more than {MAX_PIXELS:,} pixels"):
        Change.parse([{"map_image": raw}])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_itself_is_read() -> None:
    whole = png_of(bytes(1 + LIMIT_SIDE // 8) * LIMIT_SIDE, LIMIT_SIDE, LIMIT_SIDE, depth=1, colour=0)
    assert read_image(in_base64(whole)).size == (LIMIT_SIDE, LIMIT_SIDE)


# --- values that are no pictures -----------------------------------------------------------------------------------


def nested(depth: int, wrap: Callable[[object], object]) -> object:
    value: object = 1
    for _ in range(depth):
        value = wrap(value)
    return value


VALUES: dict[str, object] = {
    "lists in lists": nested(100_000, lambda value: [value]),
    "dicts in dicts": nested(100_000, lambda value: {"a": value}),
    "many lists in many lists": nested(7, lambda value: [value] * 6),
    "a megabyte": "x" * 2**20,
    "a huge number": 10**4000,
    "infinity": float("inf"),
    "not a number": float("nan"),
    "half a character": "\ud800",
    "a dict": {"__proto__": {}},
}
# Not prompts, which may be any text, and not output_origin, which may be anything that JSON can say.
CHECKED = ("enabled", "method", "weight", "stop_at", "start_at", "resize_mode", "passes", "grey_background", "fg_image")


@pytest.mark.parametrize("raw", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("name", CHECKED)
def test_a_value_that_means_nothing_is_refused_in_a_sentence(name: str, raw: object) -> None:
    with pytest.raises(LayerDiffuseError) as caught:
        Request.parse([{"method": "sd15_transparent_attn", name: raw}])
    assert len(str(caught.value)) < 1500
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("raw", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("name", ["source", "map_image", "softness", "columns"])
def test_a_value_that_means_nothing_to_a_change_map_is_refused_in_a_sentence(name: str, raw: object) -> None:
    with pytest.raises(LayerDiffuseError) as caught:
        Change.parse([{name: raw}])
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    ("name", "raw"),
    [("fg_prompt", "glass \udc00"), ("output_origin", float("nan")), ("output_origin", "\ud800"),
     ("output_origin", VALUES["lists in lists"])],
    ids=["half a character", "not a number", "half a character again", "lists in lists"],
)  # fmt: skip
def test_what_the_answer_could_not_repeat_is_refused(name: str, raw: object) -> None:
    with pytest.raises(LayerDiffuseError, match=name):
        Request.parse([{"method": "sd15_transparent_attn", name: raw}])


@pytest.mark.parametrize(
    ("older", "name", "value"),
    [("stop_at", "ending_step", 0.5), ("start_at", "starting_step", 0.0), ("gray_background", "grey_background", True)],
)
def test_two_names_of_one_setting_are_refused_together(older: str, name: str, value: object) -> None:
    with pytest.raises(LayerDiffuseError, match=f"{older} and {name}"):
        Request.parse([{"method": "sd15_transparent_attn", older: value, name: value}])
    assert Request.parse([{"method": "sd15_transparent_attn", older: value, name: None}])


def test_shortened_values_stay_short_whatever_they_are() -> None:
    assert max(len(shortened(value)) for value in VALUES.values()) < 500
    assert shortened([1, "two", None]) == "[1, 'two', None]"
