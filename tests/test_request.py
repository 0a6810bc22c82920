"""What the panel and API clients send, and the request it becomes."""

import base64
import io
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.images.rgba import ResizeMode
from lib_layerdiffuse.methods import DEFAULT_METHOD, METHODS, Layer, Method, Step
from lib_layerdiffuse.request.layers import AS_IN_SETTINGS, FORM, GREY_BACKGROUND, LayerFields, Request
from lib_layerdiffuse.vae import PASSES

NAMES = [row.name for row in fields(LayerFields)]
DEFAULTS = [getattr(LayerFields(), name) for name in NAMES]
SD15, SDXL, CONV = METHODS[0], METHODS[4], METHODS[5]
CHAINED = [method for method in METHODS if method.chain]

PIXELS = np.arange(5 * 7 * 4, dtype=np.uint8).reshape(5, 7, 4)
PICTURE = Image.fromarray(PIXELS)


def file_of(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


PNG, JPG, WEBP = (
    file_of(PICTURE.convert("RGBA" if kind == "PNG" else "RGB"), kind) for kind in ("PNG", "JPEG", "WEBP")
)
SENT = in_base64(PNG)
IMAGES = {"fg_image": SENT, "bg_image": SENT, "blend_image": SENT}


def posted(**changes: object) -> list[object]:
    """The thirteen positional values of an enabled call, with some of them changed."""
    values = dict(zip(NAMES, DEFAULTS, strict=True)) | {"enabled": True} | changes
    return list(values.values())


def over_defaults(*args: object) -> list[object]:
    """What the script sees of a posted list: the web UI copies it over the defaults by position."""
    return [*args, *DEFAULTS[len(args) :]]


def parsed(args: Sequence[object]) -> Request:
    request = Request.parse(args)
    assert request is not None
    return request


def refusal(args: Sequence[object]) -> str:
    with pytest.raises(LayerDiffuseError) as caught:
        Request.parse(args)
    return str(caught.value)


def test_order_and_defaults_are_those_clients_rely_on() -> None:
    order = "enabled, method, weight, ending_step, fg_image, bg_image, blend_image, resize_mode, output_origin"
    assert ", ".join(NAMES) == f"{order}, fg_prompt, bg_prompt, blend_prompt, starting_step, passes, grey_background"
    twelve = [False, DEFAULT_METHOD.label, 1.0, 1.0, None, None, None, "Crop and Resize", False, "", "", ""]
    assert [*twelve, 0.0, "as in Settings", False] == DEFAULTS


def test_an_empty_call_is_off() -> None:
    assert Request.parse([]) is None


def test_defaults() -> None:
    assert parsed([True]) == Request(
        method=DEFAULT_METHOD,
        weight=1.0,
        starting_step=0.0,
        ending_step=1.0,
        resize_mode=ResizeMode.CROP_AND_RESIZE,
        images={},
        prompts={},
        passes=0,
        grey_background=False,
        chain=None,
    )


@pytest.mark.parametrize("count", range(1, len(NAMES) + 1))
def test_fewer_values_mean_defaults(count: int) -> None:
    assert parsed(posted()[:count]) == parsed(posted())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "enabled"])
def test_null_means_default(name: str) -> None:
    assert parsed(posted(**{name: None})) == parsed(posted())


@pytest.mark.parametrize(
    ("raw", "on"),
    [
        *((raw, True) for raw in (True, 1, "true", "True", "TRUE")),
        *((raw, False) for raw in (False, 0, "false", "False", "FALSE", None)),
    ],
)
def test_enabled(raw: object, on: bool) -> None:
    assert (Request.parse(posted(enabled=raw)) is not None) is on
    assert (Request.parse([raw]) is not None) is on


@pytest.mark.parametrize("raw", [2, -1, 0.5, "yes", "", "0", [], [True], math.nan])
def test_enabled_is_not_guessed(raw: object) -> None:
    assert "Enable (enabled in API calls)" in refusal([raw])


@pytest.mark.parametrize(
    "args",
    [
        [False, "no such method", "heavy", 7, 1, 2, 3, "Sideways", "", 4, 5, 6, 7],
        [False, "xl_bg2ble", 1, 0.2, None, None, None, None, None, None, None, None, 0.5],
        [False] * 20,
        [{"enabled": False, "nonsense": 1, "weight": "heavy"}],
        [{"enabled": "false"}, "no such method"],
    ],
)
def test_off_looks_no_further(args: list[object]) -> None:
    assert Request.parse(args) is None


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.key)
def test_method_by_any_name(method: Method) -> None:
    for name in (method.full_title, method.label, method.key, METHODS.index(method)):
        assert parsed(posted(method=name, **IMAGES)).method is method


@pytest.mark.parametrize(
    ("field", "raw", "value"),
    [
        ("weight", 0, 0.0),
        ("weight", 2, 2.0),
        ("weight", "1.5", 1.5),
        ("ending_step", 0, 0.0),
        ("ending_step", "0.25", 0.25),
        ("starting_step", 0, 0.0),
        ("starting_step", "0.25", 0.25),
        ("passes", 4, 4),
        ("passes", "8", 8),
        ("passes", 2.0, 2),
        ("passes", "0", 0),
        ("passes", AS_IN_SETTINGS, 0),
        ("grey_background", "true", True),
        ("grey_background", 1, True),
        ("resize_mode", "Just Resize", ResizeMode.JUST_RESIZE),
        ("resize_mode", "Resize and Fill", ResizeMode.RESIZE_AND_FILL),
    ],
)
def test_value(field: str, raw: object, value: object) -> None:
    result = getattr(parsed(posted(**{field: raw})), field)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("field", "raw", "shown", "remedy"),
    [
        ("weight", 2.01, "Weight (weight in API calls) is 2.01", "a number from 0 to 2"),
        ("weight", -0.1, "-0.1", "a number from 0 to 2"),
        ("weight", True, "True", "a number from 0 to 2"),
        ("weight", "heavy", "'heavy'", "a number from 0 to 2"),
        ("weight", math.nan, "nan", "a number from 0 to 2"),
        ("weight", math.inf, "inf", "a number from 0 to 2"),
        ("weight", "nan", "'nan'", "a number from 0 to 2"),
        ("weight", 10**400, "10000", "a number from 0 to 2"),
        ("weight", [1.0], "[1.0]", "a number from 0 to 2"),
        ("ending_step", 1.5, "Stop At (ending_step in API calls) is 1.5", "a number from 0 to 1"),
        ("ending_step", False, "False", "a number from 0 to 1"),
        ("starting_step", -0.5, "Start At (starting_step in API calls) is -0.5", "a number from 0 to 1"),
        ("starting_step", "soon", "'soon'", "a number from 0 to 1"),
        ("starting_step", math.nan, "nan", "a number from 0 to 1"),
        ("passes", 3, "Decoder Passes (passes in API calls) is 3", "1, 2, 4 or 8, or to 0 or"),
        ("passes", 16, "16", "1, 2, 4 or 8"),
        ("passes", 1.5, "1.5", "1, 2, 4 or 8"),
        ("passes", True, "True", "1, 2, 4 or 8"),
        ("grey_background", "grey", "Grey Background (grey_background in API calls) is 'grey'", "true or false"),
        (
            "resize_mode",
            "crop",
            "Resize Mode (resize_mode in API calls) is 'crop'",
            '"Just Resize" or "Crop and Resize"',
        ),
        ("resize_mode", [], "[]", '"Resize and Fill"'),
        ("fg_prompt", 7, "Foreground Prompt (fg_prompt in API calls) is 7", "text"),
        ("bg_prompt", ["a"], "['a']", "text"),
        ("blend_prompt", {"text": "a"}, "{'text': 'a'}", "text"),
        ("method", "(SDXL) Transparent", "'(SDXL) Transparent'", "nearest"),
    ],
)
def test_wrong_value_is_named_with_the_remedy(field: str, raw: object, shown: str, remedy: str) -> None:
    for args in (posted(**{field: raw}), [{field: raw}]):
        message = refusal(args)
        assert shown in message
        assert remedy in message


def test_a_long_value_is_cut() -> None:
    assert len(refusal(posted(weight="iVBOR" * 100_000))) < 300


@pytest.mark.parametrize(
    "raw",
    [
        PIXELS,
        PICTURE,
        SENT,
        "\r\n".join(SENT[start : start + 76] for start in range(0, len(SENT), 76)),
        f"\n {SENT} \n",
        f"data:image/png;base64,{SENT}",
    ],
    ids=["array", "PIL", "base64", "base64 in lines", "base64 with blanks around", "data URL"],
)
@pytest.mark.parametrize("layer", Layer)
def test_images_are_decoded(layer: Layer, raw: object) -> None:
    images = parsed(posted(**{f"{layer.value}_image": raw})).images
    assert list(images) == [layer]
    assert isinstance(images[layer], tuple)
    [image] = images[layer]
    assert image.mode == "RGBA"
    assert np.array_equal(np.array(image), PIXELS)


@pytest.mark.parametrize("data", [JPG, WEBP], ids=["JPG", "WebP"])
def test_lossy_files_are_decoded(data: bytes) -> None:
    [image] = parsed(posted(bg_image=in_base64(data))).images[Layer.BG]
    assert (image.mode, image.size) == ("RGB", PICTURE.size)


def test_a_decoded_image_is_not_the_one_that_was_sent() -> None:
    """What the panel holds may change while the job waits."""
    sent = PIXELS.copy()
    [image] = parsed(posted(fg_image=sent)).images[Layer.FG]
    sent[:] = 0
    assert np.array_equal(np.array(image), PIXELS)


@pytest.mark.parametrize(
    "raw",
    [
        "a cat",
        in_base64(b"a cat"),
        "data:image/png;base64,",
        "data:image/png",
        "https://example.org/cat.png",
        f"{SENT[:40]}!{SENT[40:]}",
        SENT[: len(SENT) // 2],
        SENT[: len(SENT) // 2 // 4 * 4 + 1],
        in_base64(JPG[: len(JPG) - 40]),
        in_base64(WEBP[: len(WEBP) - 40]),
        in_base64(PNG[:60] + bytes(20) + PNG[80:]),
        [[[0, 0, 0, 0]]],
        {"image": SENT, "mask": None},
        7,
        True,
        b"a cat",
    ],
    ids=[
        "text",
        "base64 of text",
        "empty data URL",
        "data URL without data",
        "address",
        "base64 with something else in it",
        "half",
        "half, not whole in base64 either",
        "cut-off JPG",
        "cut-off WebP",
        "damaged PNG",
        "nested list",
        "dict",
        "number",
        "flag",
        "bytes",
    ],
)
@pytest.mark.parametrize(("name", "label"), [("fg_image", "Foreground"), ("blend_image", "Blending")])
def test_what_is_no_whole_image_is_refused_with_what_to_send(name: str, label: str, raw: object) -> None:
    message = refusal(posted(**{name: raw}))
    assert f"{label} ({name} in API calls) is " in message
    assert "Set it to a whole PNG, JPG or WebP file in base64, or a data URL." in message
    assert len(message) < 400


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.key)
def test_a_missing_image_is_named_with_its_box_and_its_api_name(method: Method) -> None:
    for layer, box in {Layer.FG: "Foreground", Layer.BG: "Background", Layer.BLEND: "Blending"}.items():
        call = posted(method=method.key, **IMAGES | {f"{layer.value}_image": " "})
        if layer in method.inputs:
            message = refusal(call)
            assert f"{method.full_title} needs a {layer.word} image" in message
            assert f"the {box} box" in message
            assert f"send it as {layer.value}_image" in message
        else:
            assert layer not in parsed(call).images


def test_prompts_are_those_with_words_stripped() -> None:
    request = parsed(posted(fg_prompt=" a cat,\nsitting \n", bg_prompt="\t", blend_prompt="a cat on a desk"))
    assert request.prompts == {Layer.FG: "a cat,\nsitting", Layer.BLEND: "a cat on a desk"}


@pytest.mark.parametrize(
    ("call", "before"),
    [
        ({}, {}),
        ({"fg_prompt": "a cat"}, {Layer.FG: "a cat"}),
        ({"grey_background": True}, {Layer.FG: GREY_BACKGROUND}),
        (
            {"grey_background": True, "fg_prompt": "a cat", "bg_prompt": "a desk"},
            {Layer.FG: f"a cat, {GREY_BACKGROUND}", Layer.BG: "a desk"},
        ),
    ],
)
def test_words_before_the_prompt_of_a_layer(call: dict[str, object], before: dict[Layer, str]) -> None:
    request = parsed(posted(**call))
    assert {layer: words for layer in Layer if (words := request.words_before(layer))} == before


@pytest.mark.parametrize("blank", ["", " ", "\n", None])
def test_blank_text_is_no_image_and_no_prompt(blank: object) -> None:
    request = parsed(posted(fg_image=blank, fg_prompt=blank))
    assert (request.images, request.prompts) == ({}, {})


@pytest.mark.parametrize(
    ("method", "start", "stop", "shown_stop"),
    [
        ("xl_transparent_attn", 0.5, 0.5, "0.5"),
        ("xl_transparent_attn", 0.75, 0.25, "0.25"),
        ("xl_transparent_attn", 0.1, 0, "0"),
        ("xl_transparent_attn", 1, 1, "1"),
        ("xl_fgble2bg", 1, 1, "1"),
        ("xl_everything", 0.5, 1, "0.5"),  # its last step stops there by itself
        ("xl_everything", 0.8, 1, "0.5"),
        ("xl_everything", 0.8, 0.75, "0.75"),
        ("xl_bg2blefg", 1, 1, "1"),
    ],
)
def test_a_start_with_no_stop_after_it_is_refused_with_both(
    method: str, start: float, stop: float, shown_stop: str
) -> None:
    message = refusal(posted(method=method, starting_step=start, ending_step=stop, **IMAGES))
    assert f"Start At is {start:g} and Stop At is {shown_stop}:" in message
    assert "Set Start At below Stop At." in message


@pytest.mark.parametrize(
    ("method", "start", "stop"),
    [
        ("xl_transparent_attn", 0, 0),
        ("xl_transparent_attn", 0.49, 0.5),
        ("xl_transparent_attn", 0.99, 1),
        ("xl_fgble2bg", 0.8, 1),
        ("xl_everything", 0, 0),
        ("xl_everything", 0.49, 1),
        ("xl_everything", 0.7, 0.75),
        ("xl_bg2blefg", 0.9, 1),
    ],
)
def test_a_start_before_every_stop_is_taken(method: str, start: float, stop: float) -> None:
    request = parsed(posted(method=method, starting_step=start, ending_step=stop, **IMAGES))
    assert (request.starting_step, request.ending_step) == (start, stop)


@pytest.mark.parametrize(
    ("weight", "stop", "injects"),
    [(1, 1, True), (0.1, 0.1, True), (2, 1, True), (0, 1, False), (1, 0, False), (0, 0, False)],
)
def test_without_weight_or_steps_nothing_is_injected(weight: float, stop: float, injects: bool) -> None:
    assert parsed(posted(weight=weight, ending_step=stop)).injects is injects


@pytest.mark.parametrize("method", CHAINED, ids=lambda method: method.key)
def test_each_step_of_a_chain_gets_its_images_and_all_else_that_was_asked(method: Method) -> None:
    asked = parsed(
        posted(
            method=method.key,
            weight=0.75,
            starting_step=0.25,
            resize_mode="Just Resize",
            fg_prompt="a cat",
            blend_prompt="a cat on a desk",
            **IMAGES,
        )
    )
    there = {layer: (PICTURE.copy(), PICTURE.copy()) for layer in Layer}
    for step in method.chain:
        request = asked.for_step(step, there)
        assert request.method.key == step.key
        assert set(request.images) == set(request.method.inputs)
        assert all(images is there[layer] for layer, images in request.images.items())
        assert request.chain is asked
        for name in ("weight", "starting_step", "resize_mode", "prompts"):
            assert getattr(request, name) == getattr(asked, name)


@pytest.mark.parametrize(
    ("asked", "of_step", "expected"),
    [(1, 1, 1), (1, 0.5, 0.5), (0.75, 0.5, 0.75), (0.25, 0.5, 0.25), (0, 0.5, 0), (0.75, 1, 0.75)],
)
def test_a_step_stops_where_it_does_by_itself_unless_the_request_says_otherwise(
    asked: float, of_step: float, expected: float
) -> None:
    request = parsed(posted(method="xl_everything", ending_step=asked))
    assert request.for_step(Step("xl_transparent_attn", stop_at=of_step), {}).ending_step == expected


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.key)
def test_a_picture_is_one_of_several_where_its_method_or_chain_makes_more(method: Method) -> None:
    request = parsed(posted(method=method.key, **IMAGES))
    assert request.chain is None
    assert request.several is (method.frames > 1)
    for step in method.chain:
        assert request.for_step(step, dict.fromkeys(Layer, (PICTURE,))).several
        assert not parsed(posted(method=step.key, **IMAGES)).several


@pytest.mark.parametrize("raw", [None, True, "a prompt from an older layout", 3, []])
def test_output_origin_has_no_effect(raw: object) -> None:
    assert parsed(posted(output_origin=raw)) == parsed(posted())


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({}, [True]),
        ({"method": 0}, [True, SD15.label]),
        ({"enabled": None, "method": "xl_transparent_conv"}, [True, CONV.label]),
        ({"enabled": True, "method": SD15.label, "weight": 1, "stop_at": 0.5}, [True, SD15.label, 1, 0.5]),
        ({"ending_step": 0.5, "weight": None}, [True, None, None, 0.5]),
        ({"start_at": 0.25}, [True, *[None] * 11, 0.25]),
        ({"starting_step": 0.25, "stop_at": 0.5}, [True, None, None, 0.5, *[None] * 8, 0.25]),
        ({"method": "xl_bg2ble", "bg_image": SENT}, [True, "xl_bg2ble", None, None, None, SENT]),
    ],
)
def test_names_in_a_dict(named: dict[str, object], expected: list[object]) -> None:
    assert parsed([named]) == parsed(over_defaults(named)) == parsed(expected)


@pytest.mark.parametrize(
    ("entry", "args"),
    [
        ({"args": [True, "sd15_joint"]}, [True, "sd15_joint"]),
        ({"args": {"method": "sd15_joint"}}, [{"method": "sd15_joint"}]),
        ({"args": []}, []),
        ([True, "sd15_joint"], [True, "sd15_joint"]),
        ({"method": "sd15_joint"}, [{"method": "sd15_joint"}]),
    ],
)
def test_an_entry_of_an_api_request(entry: object, args: list[object]) -> None:
    assert FORM.posted(entry) == args


@pytest.mark.parametrize("entry", ["true", 5, True, {"args": None}, {"args": "true"}, {"args": 5}])
def test_an_entry_that_is_neither_list_nor_dict_is_refused(entry: object) -> None:
    with pytest.raises(LayerDiffuseError, match=r"The args of LayerDiffuse are .+ Send a dict of names, or a list"):
        FORM.posted(entry)


def test_values_behind_a_dict_are_only_the_panels_defaults() -> None:
    assert parsed([{"weight": 0.5}, "no such method", 9]) == parsed([True, None, 0.5])


@pytest.mark.parametrize(
    ("name", "near"),
    [("weigth", '"weight"'), ("fgprompt", '"fg_prompt"'), ("Method", '"method"'), ("", "The names are")],
)
def test_unknown_name_is_refused_with_the_nearest(name: str, near: str) -> None:
    message = refusal([{name: 1}])
    assert f"{name!r}" in message
    assert near in message


def test_too_many_values() -> None:
    assert f"takes {len(NAMES)} values, but {len(NAMES) + 1} came" in refusal([*posted(), "one more"])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
METHOD = st.sampled_from([name for row in METHODS for name in (row.full_title, row.label, row.key, METHODS.index(row))])
PART = st.floats(0, 1) | st.sampled_from([0, 1, "1", "0.5"])
IMAGE = st.sampled_from([SENT, f"data:image/jpeg;base64,{in_base64(JPG)}", PIXELS, PICTURE])
GOOD = {
    "enabled": st.just(True),
    "method": METHOD,
    "weight": st.floats(0, 2) | st.sampled_from(["1", "0.5", 1]),
    "ending_step": PART | st.just(1),
    "fg_image": IMAGE,
    "bg_image": IMAGE,
    "blend_image": IMAGE,
    "resize_mode": st.sampled_from([mode.value for mode in ResizeMode]),
    "output_origin": st.booleans(),
    "fg_prompt": st.text(max_size=5),
    "bg_prompt": st.text(max_size=5),
    "blend_prompt": st.text(max_size=5),
    "starting_step": st.just(0) | PART,
    "passes": st.sampled_from([0, 1, 2, 4, 8, "8"]),
    "grey_background": st.booleans(),
}
ANY = JSON | st.one_of(*GOOD.values())

FUZZ = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no bug


def check_outcome(args: Sequence[object]) -> None:
    """A request has only good values; the one exception there may be is LayerDiffuseError."""
    with suppress(LayerDiffuseError):
        request = Request.parse(args)
        if request is None:
            return
        assert 0 <= request.weight <= 2
        assert 0 <= request.starting_step <= 1
        assert 0 <= request.ending_step <= 1
        assert request.passes in (0, *PASSES)
        assert isinstance(request.resize_mode, ResizeMode)
        assert request.images.keys() >= set(request.method.inputs)
        assert all(isinstance(image, Image.Image) for [image] in request.images.values())
        assert all(text == text.strip() != "" for text in request.prompts.values())
        for step in request.method.steps:
            of_step = request.for_step(step, dict.fromkeys(Layer, (PICTURE,)))
            assert of_step.starting_step == 0 or of_step.starting_step < of_step.ending_step


@FUZZ
@given(st.fixed_dictionaries(GOOD | {"starting_step": st.just(0)}))
def test_the_good_values_are_good(values: dict[str, object]) -> None:
    """Else the tests after this one would see refusals only."""
    assert list(GOOD) == NAMES
    assert parsed(posted(**values)) == parsed([values])


@FUZZ
@given(st.lists(JSON, max_size=15))
def test_any_json_ends_in_a_request_or_a_sentence(args: list[object]) -> None:
    check_outcome(args)
    check_outcome([True, *args])


@FUZZ
@given(st.fixed_dictionaries(GOOD), st.dictionaries(st.sampled_from(NAMES), ANY, max_size=2), st.integers(0, 13))
def test_nearly_right_lists_end_in_a_request_or_a_sentence(
    values: dict[str, object], wrong: dict[str, object], count: int
) -> None:
    args = posted(**values | wrong)
    check_outcome(args)
    check_outcome(args[:count])


@FUZZ
@given(st.dictionaries(st.sampled_from([*NAMES, "start_at", "stop_at", "other"]), ANY))
def test_any_dict_ends_in_a_request_or_a_sentence(named: dict[str, object]) -> None:
    check_outcome([named])


@FUZZ
@given(st.sampled_from([PNG, JPG, WEBP]), st.floats(0, 1), st.integers(0, 255))
def test_any_damage_to_a_file_ends_in_a_request_or_a_sentence(data: bytes, place: float, value: int) -> None:
    at = int(place * (len(data) - 1))
    check_outcome([{"fg_image": in_base64(data[:at])}])
    check_outcome([{"fg_image": in_base64(data[:at] + bytes([value]) + data[at + 1 :])}])


# --- back from a picture's parameters ---------------------------------------------------------------------------

PARAMETERS = {"Steps": "20", "LayerDiffuse method": METHODS[3].label, "LayerDiffuse weight": "0.5"}
OLDER = {
    "layerdiffusion_enabled": "True",
    "layerdiffusion_method": METHODS[1].label,
    "layerdiffusion_weight": "0.8",
    "layerdiffusion_ending_step": "0.5",
    "layerdiffusion_fg_image": "True",
    "layerdiffusion_resize_mode": "Resize and Fill",
    "layerdiffusion_bg_additional_prompt": "a table",
}


def pasted(parameters: dict[str, object]) -> dict[str, object]:
    return {field.name: FORM.pasted(field.name, parameters) for field in fields(LayerFields)}


def test_settings_come_back_and_those_that_are_not_written_had_their_defaults() -> None:
    images_and_origin = dict.fromkeys(("fg_image", "bg_image", "blend_image", "output_origin"))
    assert pasted(PARAMETERS) == images_and_origin | {
        "enabled": True,
        "method": METHODS[3].label,
        "weight": 0.5,
        "ending_step": 1.0,
        "starting_step": 0.0,
        "resize_mode": "Crop and Resize",
        "fg_prompt": "",
        "bg_prompt": "",
        "blend_prompt": "",
        "passes": AS_IN_SETTINGS,
        "grey_background": False,
    }


def test_an_ordinary_picture_switches_it_off_and_leaves_the_rest() -> None:
    assert pasted({"Steps": "20"}) == dict.fromkeys(field.name for field in fields(LayerFields)) | {"enabled": False}


def test_settings_that_the_older_extension_wrote_come_back() -> None:
    back = pasted(OLDER)
    assert back["enabled"] is True and back["method"] == METHODS[1].label and back["fg_image"] is None
    assert (back["weight"], back["ending_step"], back["starting_step"]) == (0.8, 0.5, 0.0)
    assert (back["resize_mode"], back["bg_prompt"], back["fg_prompt"]) == ("Resize and Fill", "a table", "")


@pytest.mark.parametrize(
    ("name", "key", "raw"),
    [
        ("method", "LayerDiffuse method", "(Flux) A method of tomorrow"),
        ("weight", "LayerDiffuse weight", "3"),
        ("weight", "LayerDiffuse weight", "much"),
        ("resize_mode", "LayerDiffuse resize mode", "2"),
    ],
)
def test_what_means_nothing_leaves_the_panel_as_it_is(name: str, key: str, raw: str) -> None:
    assert FORM.pasted(name, PARAMETERS | {key: raw}) is None


def test_passes_and_grey_background_come_back() -> None:
    back = pasted(PARAMETERS | {"LayerDiffuse passes": "4", "LayerDiffuse grey background": "True"})
    assert (back["passes"], back["grey_background"]) == ("4", True)


def test_a_method_comes_back_by_its_label() -> None:
    assert FORM.pasted("method", {"LayerDiffuse method": METHODS[0].key}) == METHODS[0].label


def test_a_plot_s_values_go_before_those_of_the_panel() -> None:
    args = [True, METHODS[0].label, 0.3]
    changed = Request.parse(args, {"weight": 0.7, "starting_step": 0.2})
    assert changed is not None and (changed.weight, changed.starting_step) == (0.7, 0.2)
    assert changed.method is METHODS[0]
    assert Request.parse([False], {"weight": 0.7}) is None
    with pytest.raises(LayerDiffuseError, match="Weight"):
        Request.parse(args, {"weight": 7})
