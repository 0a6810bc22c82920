"""What cannot work is refused with a sentence, without a picture, and leaves nothing behind."""

import pytest

from tests.forge import data
from tests.forge.client import (
    SD15_ATTENTION,
    SDXL_ATTENTION,
    SDXL_CONV,
    alpha_varies,
    layerdiffuse,
    layerdiffuse_arguments,
    same,
)

METHODS = {"sd15": SD15_ATTENTION, "sdxl": SDXL_ATTENTION}


@pytest.fixture(scope="module")
def first_pictures():
    """The first transparent picture of each family, made before anything was refused."""
    return {}


@pytest.fixture
def unharmed(forge, plain_pictures, first_pictures):
    """After the test the server makes the very pictures that it made before, with LayerDiffuse and without."""
    family = forge.checkpoint
    if family not in first_pictures:
        first_pictures[family] = forge.picture(layerdiffuse(METHODS[family]))
    yield
    forge.use(family)
    assert same(forge.picture(), plain_pictures[family])
    assert same(forge.picture(layerdiffuse(METHODS[family])), first_pictures[family])


def words(sentence, *expected):
    return all(word.lower() in sentence.lower() for word in expected)


@pytest.mark.parametrize("method", [SDXL_ATTENTION, SDXL_CONV])
def test_an_sdxl_method_on_an_sd15_model(forge, unharmed, method):
    assert words(forge.txt2img(layerdiffuse(method)).refusal, "SDXL", "SD1.5")


@pytest.mark.sdxl
def test_an_sd15_method_on_an_sdxl_model(forge, unharmed):
    assert words(forge.txt2img(layerdiffuse(SD15_ATTENTION)).refusal, "SDXL", "SD1.5")


def test_an_inpainting_checkpoint(forge, unharmed):
    forge.use("sd15_inpaint")
    assert words(forge.txt2img(layerdiffuse(SD15_ATTENTION)).refusal, "inpaint")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((True, "Only Generate Transparent Pictures", 1.0, 1.0), "method"),
        ((True, SD15_ATTENTION, "strong", 1.0), "weight"),
        ((True, SD15_ATTENTION, 1.0, 7), "stop"),
        (({"method": SD15_ATTENTION, "start_at": 0.6, "stop_at": 0.5},), "below Stop At"),
    ],
    ids=["unknown method", "weight is a word", "stop at 7", "start behind the stop"],
)
def test_arguments_that_mean_nothing(forge, unharmed, arguments, expected):
    assert words(forge.txt2img(layerdiffuse_arguments(*arguments)).refusal, expected)


@pytest.mark.parametrize(
    "arguments",
    [
        (True, SD15_ATTENTION),
        (True, SD15_ATTENTION, 1.0, None),
        (True, SD15_ATTENTION, 1.0, 1.0, "", "", "", "Crop and Resize", False, None, None, None),
        ("true", SD15_ATTENTION, 1.0, 1.0),
    ],
    ids=["two arguments", "stop at null", "empty text for images", "true as text"],
)
def test_arguments_that_leave_things_out(forge, arguments):
    assert same(forge.picture(layerdiffuse_arguments(*arguments)), forge.picture(layerdiffuse(SD15_ATTENTION)))


def test_false_as_text_is_off(forge, plain_pictures):
    assert same(forge.picture(layerdiffuse_arguments("False", SD15_ATTENTION)), plain_pictures["sd15"])


def test_a_batch_of_jobs_stops_at_the_first(forge):
    assert forge.txt2img(layerdiffuse(SDXL_ATTENTION), batch_size=2, n_iter=2).refusal


# --- weight files -----------------------------------------------------------------------------------------------

SD15_FILE, SDXL_FILE, OTHER_FILE = (
    "layer_sd15_transparent_attn",
    "layer_xl_transparent_attn",
    "layer_sd15_vae_transparent_decoder",
)


def test_missing_weights_without_a_network(forge, unharmed, replaced_layer_file):
    replaced_layer_file(SD15_FILE, None)
    assert words(forge.txt2img(layerdiffuse(SD15_ATTENTION)).refusal, SD15_FILE)
    assert not data.layer_file(SD15_FILE).exists()


def test_weights_that_are_cut_off(forge, unharmed, replaced_layer_file):
    with data.layer_file(SD15_FILE).open("rb") as file:
        start = file.read(50_000_000)
    replaced_layer_file(SD15_FILE, start)
    assert words(forge.txt2img(layerdiffuse(SD15_ATTENTION)).refusal, SD15_FILE)
    assert data.layer_file(SD15_FILE).exists(), "the user's file was renamed or removed"


def test_the_wrong_file_under_the_right_name(forge, unharmed, replaced_layer_file):
    replaced_layer_file(SD15_FILE, data.layer_file(OTHER_FILE))
    assert words(forge.txt2img(layerdiffuse(SD15_ATTENTION)).refusal, SD15_FILE)


@pytest.mark.sdxl
def test_the_wrong_file_under_the_right_name_sdxl(forge, unharmed, replaced_layer_file):
    replaced_layer_file(SDXL_FILE, data.layer_file(OTHER_FILE))
    assert words(forge.txt2img(layerdiffuse(SDXL_ATTENTION)).refusal, SDXL_FILE)


def test_files_are_back(forge):
    assert alpha_varies(forge.picture(layerdiffuse(SD15_ATTENTION)))
