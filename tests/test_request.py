"""What the panel and API clients send, and the request it becomes."""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.methods import DEFAULT_METHOD, METHODS, Layer, Method
from lib_layerdiffuse.request import Controls, Request, ResizeMode

NAMES = [row.name for row in fields(Controls)]
DEFAULTS = [getattr(Controls(), name) for name in NAMES]
SD15, SDXL, CONV = METHODS[0], METHODS[4], METHODS[5]
BUILT = [method for method in METHODS if method.built]


def posted(**changes: object) -> list[object]:
    """The twelve positional values of an enabled call, with some of them changed."""
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
    assert ", ".join(NAMES) == f"{order}, fg_prompt, bg_prompt, blend_prompt"
    expected = [False, DEFAULT_METHOD.label, 1.0, 1.0, None, None, None, "Crop and Resize", False, "", "", ""]
    assert expected == DEFAULTS


def test_an_empty_call_is_off() -> None:
    assert Request.parse([]) is None


def test_defaults() -> None:
    assert parsed([True]) == Request(DEFAULT_METHOD, 1.0, 1.0, ResizeMode.CROP_AND_RESIZE, {}, {})


@pytest.mark.parametrize("count", range(1, 13))
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
        [False, "no such method", "heavy", 7, 1, 2, 3, "Sideways", "", 4, 5, 6],
        [False] * 20,
        [{"enabled": False, "nonsense": 1, "weight": "heavy"}],
        [{"enabled": "false"}, "no such method"],
    ],
)
def test_off_looks_no_further(args: list[object]) -> None:
    assert Request.parse(args) is None


@pytest.mark.parametrize("method", BUILT, ids=lambda method: method.key)
def test_method_by_any_name(method: Method) -> None:
    for name in (method.label, method.key, METHODS.index(method)):
        assert parsed(posted(method=name)).method is method


@pytest.mark.parametrize("method", [method for method in METHODS if not method.built], ids=lambda method: method.key)
def test_unbuilt_method_is_refused_with_those_that_work(method: Method) -> None:
    message = refusal(posted(method=method.label))
    assert f"{method.label} is not available yet" in message
    named = {row for row in METHODS if row.label in message}
    assert named == {method, *(row for row in BUILT if row.family is method.family)}


@pytest.mark.parametrize(
    ("field", "raw", "value"),
    [
        ("weight", 0, 0.0),
        ("weight", 2, 2.0),
        ("weight", "1.5", 1.5),
        ("ending_step", 0, 0.0),
        ("ending_step", "0.25", 0.25),
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


def test_images_and_prompts_are_those_that_were_given() -> None:
    picture = np.zeros((8, 8, 4), np.uint8)
    request = parsed(
        posted(fg_image=picture, bg_image="", blend_image="data:image/png;base64,AA==", bg_prompt="a desk")
    )
    assert request.images.keys() == {Layer.FG, Layer.BLEND}
    assert request.images[Layer.FG] is picture
    assert request.prompts == {Layer.BG: "a desk"}


@pytest.mark.parametrize("blank", ["", " ", "\n", None])
def test_blank_text_is_no_image_and_no_prompt(blank: object) -> None:
    request = parsed(posted(fg_image=blank, fg_prompt=blank))
    assert (request.images, request.prompts) == ({}, {})


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
    ],
)
def test_names_in_a_dict(named: dict[str, object], expected: list[object]) -> None:
    assert parsed([named]) == parsed(over_defaults(named)) == parsed(expected)


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
    assert "takes 12 values, but 13 came" in refusal([*posted(), "one more"])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
METHOD = st.sampled_from([name for row in METHODS for name in (row.label, row.key)]) | st.integers(-1, 11) | JSON
NUMBER = st.floats(0, 2) | st.sampled_from(["1", "0.5", 1]) | JSON
MODE = st.sampled_from([mode.value for mode in ResizeMode]) | JSON
LIKELY = [st.booleans() | JSON, METHOD, NUMBER, NUMBER, *[JSON] * 3, MODE, JSON, *[st.text(max_size=5) | JSON] * 3]

FUZZ = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no bug


def check_outcome(args: Sequence[object]) -> None:
    """A request has only good values; the one exception there may be is LayerDiffuseError."""
    with suppress(LayerDiffuseError):
        request = Request.parse(args)
        if request is None:
            return
        assert request.method.built
        assert 0 <= request.weight <= 2
        assert 0 <= request.ending_step <= 1
        assert isinstance(request.resize_mode, ResizeMode)
        assert all(image is not None and image != "" for image in request.images.values())
        assert all(text.strip() for text in request.prompts.values())


@FUZZ
@given(st.lists(JSON, max_size=14))
def test_any_json_ends_in_a_request_or_a_sentence(args: list[object]) -> None:
    check_outcome(args)
    check_outcome([True, *args])


@FUZZ
@given(st.tuples(*LIKELY), st.integers(0, 12))
def test_nearly_right_lists_end_in_a_request_or_a_sentence(args: tuple[object, ...], count: int) -> None:
    check_outcome(args[:count])


@FUZZ
@given(st.dictionaries(st.sampled_from([*NAMES, "stop_at", "other"]), JSON | METHOD | NUMBER))
def test_any_dict_ends_in_a_request_or_a_sentence(named: dict[str, object]) -> None:
    check_outcome([json.loads(json.dumps(named))])
