"""The methods that make several layers, or one from others: any batch, with their names, prompts and images."""

import re

import pytest
from PIL import Image

from tests.forge.client import (
    BASE_REQUEST,
    SD15_BG_TO_FG,
    SD15_FG_TO_BG,
    SD15_JOINT,
    SDXL_BG_BLEND_TO_FG,
    SDXL_BG_TO_BLEND,
    SDXL_FG_BLEND_TO_BG,
    SDXL_FG_TO_BLEND,
    all_different,
    controlnet,
    layerdiffuse,
    layerdiffuse_arguments,
    same,
    to_base64,
)
from tests.forge.hosts import LATENT_UPSCALER, needs
from tests.forge.test_pictures import HIRES
from tests.forge.test_scripts import plot, prompts_from_file
from tests.forge.upstream_cases import METHODS, layer_image

TINY = {"width": 64, "height": 64}
SHOWS = {
    SD15_JOINT: ("foreground", "background", "blend"),
    SD15_FG_TO_BG: ("background", "blend"),
    SD15_BG_TO_FG: ("foreground", "blend"),
    SDXL_FG_TO_BLEND: ("blend",),
    SDXL_FG_BLEND_TO_BG: ("background",),
    SDXL_BG_TO_BLEND: ("blend",),
    SDXL_BG_BLEND_TO_FG: ("foreground",),
}
SD15 = (SD15_JOINT, SD15_FG_TO_BG, SD15_BG_TO_FG)
SDXL = tuple(pytest.param(method, marks=pytest.mark.sdxl) for method in SHOWS if method not in SD15)
OF_TWO_IMAGES = (SDXL_FG_BLEND_TO_BG, SDXL_BG_BLEND_TO_FG)  # which do all that those of one image do, and more
OF_ONE_IMAGE = (SDXL_FG_TO_BLEND, SDXL_BG_TO_BLEND)


def layers(method, size=(64, 64), **more):
    """The request field, with the images that the method takes."""
    return layerdiffuse(method, **{name: layer_image(name, *size) for name in METHODS[method][1]}, **more)


def pictures_of(answer, method, count):
    """The pictures, which must be what the method says, followed by the opaque ones of those that are decoded."""
    assert answer.status == 200, answer.body
    shows = SHOWS[method] * count
    modes = ["RGBA" if layer == "foreground" else "RGB" for layer in shows]
    opaque = ["RGB"] * modes.count("RGBA")
    assert [image.mode for image in answer.images] == modes + opaque
    assert len(answer.transparent) == len(opaque)
    assert all_different(answer.images[: len(shows)])
    return answer.images[: len(shows)]


# --- batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SD15)
def test_a_batch_becomes_whole_pictures_with_running_seeds(forge, plain_pictures, method):
    frames = len(SHOWS[method])
    whole = forge.txt2img(layers(method), TINY, batch_size=frames)
    pictures = pictures_of(whole, method, 1)
    lone = pictures_of(forge.txt2img(layers(method), TINY), method, 1)
    assert all(same(*pair) for pair in zip(pictures, lone))
    above = forge.txt2img(layers(method), TINY, batch_size=frames + 1)
    pictures_of(above, method, 2)
    assert above.info["all_seeds"] == list(range(1, 2 * frames + 1))
    assert same(forge.picture(), plain_pictures["sd15"])


@pytest.mark.parametrize("method", SD15)
def test_batch_count(forge, method):
    frames = len(SHOWS[method])
    answer = forge.txt2img(layers(method), TINY, n_iter=2)
    first, second = pictures_of(answer, method, 2)[:frames], answer.images[frames : 2 * frames]
    assert same(first[0], forge.picture(layers(method), TINY))
    assert same(second[0], forge.picture(layers(method), TINY, seed=1 + frames))


@pytest.mark.sdxl
@pytest.mark.parametrize(
    "method", [*OF_TWO_IMAGES, *(pytest.param(each, marks=pytest.mark.full) for each in OF_ONE_IMAGE)]
)
@pytest.mark.parametrize("count", [{"batch_size": 2}, pytest.param({"n_iter": 2}, marks=pytest.mark.full)])
def test_a_condition_counts_for_every_picture(forge, plain_pictures, method, count):
    answer = forge.txt2img(layers(method), TINY, count)
    first, second = pictures_of(answer, method, 2)
    assert not same(first, second)
    other = {name: layer_image("blend_image", 64, 64).rotate(90) for name in METHODS[method][1]}
    changed = forge.txt2img(layerdiffuse(method, **other), TINY, count)
    assert all_different([first, second, *pictures_of(changed, method, 2)])
    assert same(forge.picture(), plain_pictures["sdxl"])


def test_prompts_of_a_matrix_stay_with_their_pictures(forge):
    answer = forge.txt2img(layers(SD15_JOINT), TINY, forge.script("prompt matrix", {}), prompt="apple|green")
    assert answer.status == 200, answer.body
    grid, *cells = answer.images
    assert grid.width >= 2 * 64 and grid.height > 64  # with the prompts above
    for i, prompt in enumerate(("apple", "apple, green")):
        alone = forge.txt2img(layers(SD15_JOINT), TINY, prompt=prompt)
        others = cells[2 + 2 * i : 4 + 2 * i]  # behind the ones that the grid shows
        assert all(same(*pair) for pair in zip([cells[i], *others], alone.images))


def test_xyz_plot_and_prompts_from_file(forge):
    """A cell of the plot shows the first layer; a line of the file gets all layers."""
    plotted = forge.txt2img(layers(SD15_JOINT), TINY, plot(forge, "1, 4"))
    assert plotted.status == 200, plotted.body
    both = forge.txt2img(layers(SD15_JOINT), TINY, n_iter=2).images
    assert [image.tobytes() for image in plotted.transparent if image.size == (64, 64)] == [
        both[0].tobytes(),
        both[3].tobytes(),
    ]
    read = forge.txt2img(layers(SD15_JOINT), TINY, prompts_from_file(forge, "apple\npear"))
    assert [image.mode for image in read.images[:6]] == ["RGBA", "RGB", "RGB"] * 2
    assert all_different(read.images[:6])


# --- what goes with the pictures --------------------------------------------------------------------------------


def test_names_and_infotexts_say_what_a_picture_shows(forge):
    before = forge.saved_files()
    prompts = {"fg_prompt": "green", "blend_prompt": "on a table"}
    answer = forge.txt2img(layers(SD15_JOINT, **prompts), TINY, batch_size=4, save_images=True)
    stems = [path.stem for path in forge.saved_files() - before if "grid" not in path.stem]
    ends = [stem.partition("apple-")[2] for stem in stems]
    assert sorted(ends) == sorted(["fg", "bg", "blend", "fg-opaque"] * 2), stems
    shows = [re.search(r"LayerDiffuse shows: (\w+)", text)[1] for text in answer.infotexts]
    assert shows == ["foreground", "background", "blend"] * 2 + ["foreground"] * 2
    assert ["LayerDiffuse extra: opaque" in text for text in answer.infotexts] == [False] * 6 + [True] * 2
    seeds = [re.search(r"Seed: (\d+)", text)[1] for text in answer.infotexts]
    assert seeds == ["1"] * 3 + ["4"] * 3 + ["1", "4"]
    assert all(text.startswith("apple\n") and "foreground prompt: green" in text for text in answer.infotexts)


def test_a_picture_is_repeated_from_the_infotext_of_any_of_its_layers(forge):
    answer = forge.txt2img(layers(SD15_JOINT), TINY, n_iter=2)
    seed = int(re.search(r"Seed: (\d+)", answer.infotexts[5])[1])
    again = forge.txt2img(layers(SD15_JOINT), TINY, seed=seed)
    assert all(same(*pair) for pair in zip(answer.images[3:6], again.images))


def test_a_prompt_for_a_layer_changes_that_layer_first(forge):
    """The others follow through the attention between them, but less."""
    without = forge.txt2img(layers(SD15_JOINT), TINY).images[:3]
    long = forge.txt2img(layers(SD15_JOINT, bg_prompt="wooden table " * 60), TINY)
    assert all_different([*without, *pictures_of(long, SD15_JOINT, 1)])


def test_foreground_composed_over_the_background(forge):
    with forge.options(layerdiffuse_extras=["composed"]):
        answer = forge.txt2img(layers(SD15_JOINT), TINY)
    fg, bg, _, composed = answer.images
    expected = Image.alpha_composite(bg.convert("RGBA"), fg).convert("RGB")
    differences = [abs(a - b) for a, b in zip(composed.tobytes(), expected.tobytes())]
    assert max(differences) <= 1  # Pillow rounds twice


# --- sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.full
@needs("any size")
def test_any_size(forge):
    answer = forge.txt2img(layers(SD15_FG_TO_BG), width=520, height=328)
    assert [image.size for image in pictures_of(answer, SD15_FG_TO_BG, 1)] == [(520, 328)] * 2
    assert "64x64 was brought to 520x328" in answer.notes


@needs("latent upscalers")
@pytest.mark.parametrize("method", [SD15_BG_TO_FG, pytest.param(SDXL_FG_TO_BLEND, marks=pytest.mark.sdxl)])
def test_hires_fix(forge, method):
    answer = forge.txt2img(layers(method), TINY, HIRES, hr_upscaler=LATENT_UPSCALER)
    assert [image.size for image in pictures_of(answer, method, 1)] == [(96, 96)] * len(SHOWS[method])


@pytest.mark.parametrize(
    "mode",
    ["Just Resize", *(pytest.param(mode, marks=pytest.mark.full) for mode in ("Crop and Resize", "Resize and Fill"))],
)
def test_resize_modes(forge, mode):
    image = to_base64(layer_image("bg_image", 96, 32))
    answer = forge.txt2img(
        layerdiffuse_arguments({"method": "sd15_bg2fg", "bg_image": image, "resize_mode": mode}), TINY
    )
    pictures_of(answer, SD15_BG_TO_FG, 1)
    assert mode in answer.notes and mode in answer.infotexts[0]


def test_img2img_starts_all_layers_from_the_one_picture(forge):
    init = layer_image("blend_image", 64, 64).convert("RGB")
    answer = forge.img2img(init, layers(SD15_BG_TO_FG), TINY)
    pictures_of(answer, SD15_BG_TO_FG, 1)
    several = forge.request(
        "sdapi/v1/img2img", {**BASE_REQUEST, **TINY, **layers(SD15_BG_TO_FG), "init_images": [to_base64(init)] * 2}
    )
    assert "one init image" in several.refusal


# --- weight, start and stop -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [SD15_FG_TO_BG, pytest.param(SDXL_FG_TO_BLEND, marks=pytest.mark.sdxl)])
def test_weight(forge, method):
    """0 is the base model's picture; control and condition are scaled with the rest."""
    frames = len(SHOWS[method])
    plain = forge.txt2img(TINY, batch_size=frames).images
    opaque = [forge.txt2img(layers(method, weight=weight), TINY).images[:frames] for weight in (0.0, 0.5, 1.0)]
    assert all(same(*pair) for pair in zip(plain, opaque[0]))
    assert all_different([pictures[0] for pictures in opaque])


@pytest.mark.full
@pytest.mark.parametrize("method", [SD15_BG_TO_FG, pytest.param(SDXL_FG_TO_BLEND, marks=pytest.mark.sdxl)])
def test_start_and_stop(forge, method):
    images = {name: to_base64(layer_image(name, 64, 64)) for name in METHODS[method][1]}

    def picture(**more):
        arguments = layerdiffuse_arguments({"method": method, **images, **more})
        return forge.txt2img(arguments, TINY, steps=4).images[-1]

    whole = picture()
    parts = [picture(start_at=0.4), picture(stop_at=0.4), picture(start_at=0.3, stop_at=0.7)]
    assert all_different([whole, *parts])
    assert same(picture(), whole)


# --- together with others ---------------------------------------------------------------------------------------

LORA = {"prompt": "apple <lora:synthetic_lora_sd15:1>"}
STYLE_ALIGN = {"alwayson_scripts": {"StyleAlign Integrated": {"args": [True, 1.0]}}}
SAG = {"alwayson_scripts": {"SelfAttentionGuidance Integrated (SD 1.x, SD 2.x, SDXL)": {"args": [True, 0.5, 2.0, 1.0]}}}
PAG = {"alwayson_scripts": {"PerturbedAttentionGuidance Integrated": {"args": [True, 3.0, 0.0, 0.0, 1.0]}}}
FREE_U = {
    "alwayson_scripts": {"FreeU Integrated (SD 1.x, SD 2.x, SDXL)": {"args": [True, 1.01, 1.02, 0.99, 0.95, 0.0, 1.0]}}
}
MARKS = dict.fromkeys(("SAG", "PAG", "FreeU"), pytest.mark.full)
OTHERS = {"LoRA": LORA, "StyleAlign": STYLE_ALIGN, "SAG": SAG, "PAG": PAG, "FreeU": FREE_U}


@pytest.fixture(scope="module")
def alone():
    """By size: pictures without any other extension, made once."""
    return {}


@pytest.mark.parametrize("other", [pytest.param(name, marks=MARKS.get(name, ())) for name in OTHERS])
def test_other_extensions_count_in_the_layers_too(forge, alone, other):
    # At 64, the middle block has one token, to which guidance makes no difference, and FreeU makes NaN of random
    # weights, with LayerDiffuse or without. Two steps, because PAG divides by one less than their number.
    size = 64 if other in ("LoRA", "StyleAlign") else 128
    job = (layers(SD15_FG_TO_BG, (size, size)), {"width": size, "height": size, "steps": 2})
    if size not in alone:
        alone[size] = pictures_of(forge.txt2img(*job), SD15_FG_TO_BG, 1)
    both = forge.txt2img(*job, OTHERS[other])
    assert all_different([*pictures_of(both, SD15_FG_TO_BG, 1), *alone[size]])
    assert same(forge.picture(*job), alone[size][0])


def test_controlnet_s_hint_counts_in_the_layers_too(forge):
    hints = [layer_image("blend_image", 64, 64), layer_image("bg_image", 64, 64)]
    answers = [forge.txt2img(layers(SD15_JOINT), TINY, controlnet(hint)) for hint in hints]
    pictures = [image for answer in answers for image in pictures_of(answer, SD15_JOINT, 1)]
    assert all_different([*pictures, *forge.txt2img(layers(SD15_JOINT), TINY).images[:3]])


def test_token_merging(forge):
    before = forge.picture(layers(SD15_FG_TO_BG), TINY)
    with forge.options(token_merging_ratio=0.5):
        merged = forge.txt2img(layers(SD15_FG_TO_BG), TINY)
    assert not same(pictures_of(merged, SD15_FG_TO_BG, 1)[0], before)
    assert same(forge.picture(layers(SD15_FG_TO_BG), TINY), before)


@pytest.mark.full
def test_weights_kept_in_8_bits(forge):
    """The host widens them for each layer. It reads the setting when it loads a checkpoint."""

    def reloaded(dtype):
        forge.set_options(forge_unet_storage_dtype=dtype)
        for checkpoint in ("sd15_inpaint", "sd15"):
            forge.use(checkpoint)

    wide = forge.picture(layers(SD15_JOINT), TINY)
    reloaded("float8-e4m3fn")
    try:
        narrow = forge.txt2img(layers(SD15_JOINT), TINY)
    finally:
        reloaded("Automatic")
    assert not same(pictures_of(narrow, SD15_JOINT, 1)[0], wide)
    assert same(forge.picture(layers(SD15_JOINT), TINY), wide)


# --- what is refused, and what is said --------------------------------------------------------------------------


@pytest.mark.parametrize("method", [SD15_FG_TO_BG, SD15_BG_TO_FG])
def test_a_missing_image_is_asked_for(forge, plain_pictures, method):
    [name] = METHODS[method][1]
    assert name in forge.txt2img(layerdiffuse(method), TINY).refusal
    assert same(forge.picture(), plain_pictures["sd15"])


@pytest.mark.parametrize("image", ["this is no image", to_base64(layer_image("bg_image", 64, 64))[:200], [[1, 2]]])
def test_an_unreadable_image_is_named(forge, image):
    arguments = layerdiffuse_arguments({"method": SD15_BG_TO_FG, "bg_image": image})
    assert "bg_image" in forge.txt2img(arguments, TINY).refusal


def test_what_continues_with_a_note(forge):
    opaque = layer_image("bg_image", 64, 64)
    empty = Image.new("RGBA", (64, 64))
    noted = forge.txt2img(layerdiffuse(SD15_FG_TO_BG, fg_image=opaque, bg_image=opaque, fg_prompt="green"), TINY).notes
    assert "takes no background image" in noted and "makes no foreground" in noted and "no transparency" in noted
    assert "fully transparent" in forge.txt2img(layerdiffuse(SD15_FG_TO_BG, fg_image=empty), TINY).notes
    refiner = {"refiner_checkpoint": "synthetic_sd15_inpaint.safetensors", "refiner_switch_at": 0.9}  # after the end
    assert "where the refiner takes over" in forge.txt2img(layers(SD15_FG_TO_BG), TINY, refiner).notes
    assert forge.txt2img(layers(SD15_FG_TO_BG), TINY).notes == ""
