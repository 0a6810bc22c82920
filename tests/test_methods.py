"""The table of methods, and finding a row by what people call it."""

import copy
import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.methods import (
    DEFAULT_METHOD,
    METHODS,
    Family,
    Layer,
    Method,
    Step,
    counterpart,
    find_method,
    methods_of,
    needed_files,
    taking,
)
from lib_layerdiffuse.weights.released import ASSETS

TITLES = {
    "sd15_transparent_attn": "Transparent picture",
    "sd15_fg2bg": "Background for a foreground",
    "sd15_bg2fg": "Foreground for a background",
    "sd15_joint": "Layers from a prompt",
    "xl_transparent_attn": "Transparent picture",
    "xl_transparent_conv": "Transparent picture by conv",
    "xl_fg2ble": "Blend for a foreground",
    "xl_fgble2bg": "Background for a foreground and its blend",
    "xl_bg2ble": "Blend for a background",
    "xl_bgble2fg": "Foreground for a background and its blend",
    "xl_everything": "Layers from a prompt",
    "xl_bg2blefg": "Foreground for a background",
}

# number, family, key, inputs > outputs
ROWS = [
    (0, "sd15", "sd15_transparent_attn", " > fg"),
    (1, "sd15", "sd15_fg2bg", "fg > bg blend"),
    (2, "sd15", "sd15_bg2fg", "bg > fg blend"),
    (3, "sd15", "sd15_joint", " > fg bg blend"),
    (4, "sdxl", "xl_transparent_attn", " > fg"),
    (5, "sdxl", "xl_transparent_conv", " > fg"),
    (6, "sdxl", "xl_fg2ble", "fg > blend"),
    (7, "sdxl", "xl_fgble2bg", "fg blend > bg"),
    (8, "sdxl", "xl_bg2ble", "bg > blend"),
    (9, "sdxl", "xl_bgble2fg", "bg blend > fg"),
    (10, "sdxl", "xl_everything", " > fg blend bg"),
    (11, "sdxl", "xl_bg2blefg", "bg > blend fg"),
]

# key: of each step its key, where it stops, and the samplers it avoids
CHAINS = {
    "xl_everything": [("xl_transparent_attn", 1, ""), ("xl_fg2ble", 1, ""), ("xl_fgble2bg", 0.5, "DPM")],
    "xl_bg2blefg": [("xl_bg2ble", 1, ""), ("xl_bgble2fg", 1, "DPM")],
}
CHAINED = [method for method in METHODS if method.chain]
SINGLE = [method for method in METHODS if not method.chain]


def test_every_method_is_in_the_table() -> None:
    assert [row[0] for row in ROWS] == list(range(len(METHODS)))


@pytest.mark.parametrize(("number", "family", "key", "flow"), ROWS)
def test_row(number: int, family: str, key: str, flow: str) -> None:
    method = METHODS[number]
    inputs, outputs = (tuple(Layer(value) for value in side.split()) for side in flow.split(">"))
    assert (method.family, method.key) == (Family(family), key)
    assert (method.inputs, method.outputs) == (inputs, outputs)
    assert method.frames == len(outputs)
    assert method.makes_foreground is ("fg" in flow.split(">")[1])


def test_chains() -> None:
    assert {
        method.key: [(step.key, step.stop_at, step.avoids) for step in method.chain] for method in CHAINED
    } == CHAINS


@pytest.mark.parametrize("method", CHAINED, ids=lambda method: method.key)
def test_every_step_of_a_chain_finds_what_it_takes(method: Method) -> None:
    there = set(method.inputs)
    made: list[Layer] = []
    for step in map(find_method, (step.key for step in method.chain)):
        assert step in SINGLE
        assert step.family is method.family
        assert there >= set(step.inputs)
        there |= set(step.outputs)
        made += step.outputs
    assert tuple(made) == method.outputs
    assert method.steps == method.chain


@pytest.mark.parametrize("method", SINGLE, ids=lambda method: method.key)
def test_a_method_without_a_chain_is_its_only_step_and_has_weights(method: Method) -> None:
    assert method.steps == (Step(method.key, stop_at=1, avoids=""),)
    assert method.weights in ASSETS


def test_titles_are_unique_in_their_family_and_with_it_among_all() -> None:
    assert {method.key: method.title for method in METHODS} == TITLES
    for family in Family:
        assert len({method.title for method in methods_of(family)}) == len(methods_of(family))
    assert [method.full_title for method in METHODS] == [f"{each.title} ({each.family.word})" for each in METHODS]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.key)
def test_label_starts_with_the_family(method: Method) -> None:
    assert method.label.startswith(f"({method.family.word}) ")


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.key)
def test_label_asks_for_the_batch_that_frames_sampled_together_need(method: Method) -> None:
    together = method.frames > 1 and not method.chain
    assert ("need batch size" in method.label) is together
    assert (f"(need batch size {method.frames})" in method.label) is together


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.key)
def test_found_by_title_label_key_and_number(method: Method) -> None:
    words = (method.full_title, method.label, method.key)
    names = (*words, METHODS.index(method), *(f" {each.upper()} " for each in words))
    assert [find_method(name) for name in names] == [method] * len(names)


@pytest.mark.parametrize(
    ("value", "named", "near"),
    [
        ("(SDXL) Only Generate Transparent Image (Attention)", "Image (Attention)", '"Transparent picture (SDXL)"'),
        ("xl_everythin", "'xl_everythin'", '"Layers from a prompt (SDXL)"'),
        ("xl_fg2bl", "'xl_fg2bl'", '"Blend for a foreground (SDXL)"'),
        ("(SD15) Generate Everything", "Everything", '"Layers from a prompt (SD1.5)"'),
        ("Layers from a prompt", "'Layers", '"Layers from a prompt (SDXL)" or "Layers from a prompt (SD1.5)"'),
        (12, "12", "from 0 to 11"),
        (-1, "-1", "from 0 to 11"),
        (True, "True", "its title"),
        (4.0, "4.0", "its number"),
        (None, "None", "its label"),
        ("", "''", "its key"),
        ([1, {"a": 2}], "[1, {'a': 2}]", "its key"),
    ],
)
def test_unknown_method_is_named_with_the_nearest(value: object, named: str, near: str) -> None:
    with pytest.raises(LayerDiffuseError) as caught:
        find_method(value)
    assert named in str(caught.value)
    assert near in str(caught.value)


def test_a_long_value_is_cut() -> None:
    with pytest.raises(LayerDiffuseError) as caught:
        find_method("iVBOR" * 100_000)
    assert len(str(caught.value)) < 500


def test_default_is_sdxl_attention() -> None:
    assert DEFAULT_METHOD.label == "(SDXL) Only Generate Transparent Image (Attention Injection)"


def test_every_family_has_its_own_networks() -> None:
    files = {file for family in Family for file in (family.decoder, family.encoder)}
    assert len(files & ASSETS.keys()) == 2 * len(Family)


def test_a_family_whose_own_vae_has_alpha_needs_no_other() -> None:
    newer = SimpleNamespace(decoder="", encoder="")
    method = replace(find_method("xl_transparent_attn"), family=newer)
    assert method.makes_foreground
    assert not method.decodes


@pytest.mark.parametrize("member", [*Family, *Layer])
def test_words_survive_copies(member: Family | Layer) -> None:
    for twin in (copy.deepcopy(member), pickle.loads(pickle.dumps(member))):
        assert twin is member
    assert member.word


# --- for a checkpoint -------------------------------------------------------------------------------------------


def test_methods_of_a_family_are_in_the_table_s_order():
    assert methods_of(None) == list(METHODS)
    assert [method.key for method in methods_of(Family.SD15)] == [key for _, family, key, _ in ROWS if family == "sd15"]
    assert methods_of(Family.SD15) + methods_of(Family.SDXL) == list(METHODS)


@pytest.mark.parametrize(
    ("key", "sd15", "sdxl"),
    [
        ("sd15_transparent_attn", "sd15_transparent_attn", "xl_transparent_attn"),
        ("sd15_fg2bg", "sd15_fg2bg", "xl_fg2ble"),
        ("sd15_bg2fg", "sd15_bg2fg", "xl_bg2blefg"),
        ("sd15_joint", "sd15_joint", "xl_everything"),
        ("xl_transparent_conv", "sd15_transparent_attn", "xl_transparent_conv"),
        ("xl_fg2ble", "sd15_fg2bg", "xl_fg2ble"),
        ("xl_bg2ble", "sd15_bg2fg", "xl_bg2ble"),
        ("xl_everything", "sd15_joint", "xl_everything"),
        ("xl_bg2blefg", "sd15_bg2fg", "xl_bg2blefg"),
    ],
)
def test_the_counterpart_takes_and_makes_the_same_where_there_is_one(key, sd15, sdxl):
    for family, expected in zip(Family, (sd15, sdxl), strict=True):
        assert counterpart(find_method(key), methods_of(family)).key == expected


@pytest.mark.parametrize(
    ("layer", "family", "key"),
    [
        (Layer.FG, Family.SD15, "sd15_fg2bg"),
        (Layer.BG, Family.SD15, "sd15_bg2fg"),
        (Layer.BLEND, Family.SD15, "xl_fgble2bg"),  # SD1.5 has none
        (Layer.FG, Family.SDXL, "xl_fg2ble"),
        (Layer.BG, Family.SDXL, "xl_bg2ble"),
        (Layer.BLEND, Family.SDXL, "xl_fgble2bg"),
    ],
)
def test_a_method_that_takes_an_image(layer, family, key):
    assert taking(layer, family).key == key


@pytest.mark.parametrize(
    ("key", "injects", "encodes", "expected"),
    [
        ("sd15_joint", True, False, "layer_sd15_joint layer_sd15_vae_transparent_decoder"),
        ("sd15_joint", False, False, "layer_sd15_vae_transparent_decoder"),
        ("sd15_fg2bg", True, True, "layer_sd15_fg2bg"),
        ("sd15_fg2bg", False, True, ""),
        (
            "xl_transparent_conv",
            True,
            True,
            "layer_xl_transparent_conv vae_transparent_decoder vae_transparent_encoder",
        ),
        (
            "xl_everything",
            True,
            False,
            "layer_xl_transparent_attn vae_transparent_decoder layer_xl_fg2ble layer_xl_fgble2bg",
        ),
    ],
)
def test_files_that_are_needed(key, injects, encodes, expected):
    files = needed_files(find_method(key), injects, encodes)
    assert files == [f"{name}.safetensors" for name in expected.split()]
    assert set(files) <= ASSETS.keys()
