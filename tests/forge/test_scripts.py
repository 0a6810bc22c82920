"""Host scripts that run several jobs in one: each job gets its own picture.

The img2img Batch tab is the fourth of the kind; it exists on the page only, not in the API.
"""

import pytest
from PIL import Image

from tests.forge.client import SD15_ATTENTION, all_different, alpha_varies, layerdiffuse, same
from tests.forge.hosts import needs

SMALL = {"width": 64, "height": 64}
SEEDS = (1, 2, 3)


def plot(forge, x_values, axis="Seed"):
    """An X/Y/Z plot with its cells beside it."""
    rows = forge.request("sdapi/v1/script-info").body
    [choices] = [row["args"][0]["choices"] for row in rows if row["name"] == "x/y/z plot" and not row["is_img2img"]]
    x, nothing = choices.index(axis), choices.index("Nothing")
    values = {"X type": x, "X values": x_values, "Y type": nothing, "Z type": nothing, "Include Sub Images": True}
    return forge.script("x/y/z plot", values)


def test_xyz_plot_over_seeds(forge):
    answer = forge.txt2img(layerdiffuse(SD15_ATTENTION), SMALL, plot(forge, ", ".join(map(str, SEEDS))))
    assert answer.status == 200, answer.body
    cells = [image for image in answer.transparent if image.size == (64, 64)]
    assert len(cells) == len(SEEDS)
    assert all_different(cells)
    alone = [forge.picture(layerdiffuse(SD15_ATTENTION), SMALL, seed=seed) for seed in SEEDS]
    assert [cell.tobytes() for cell in cells] == [picture.tobytes() for picture in alone]


def test_xyz_plot_over_weights(forge):
    answer = forge.txt2img(layerdiffuse(SD15_ATTENTION), SMALL, plot(forge, "0.3, 1", "[LayerDiffuse] Weight"))
    assert answer.status == 200, answer.body
    cells = [image for image in answer.transparent if image.size == (64, 64)]
    alone = [forge.picture(layerdiffuse(SD15_ATTENTION, weight), SMALL) for weight in (0.3, 1)]
    assert [cell.tobytes() for cell in cells] == [picture.tobytes() for picture in alone]


@needs("transparent grids")
def test_a_plot_keeps_the_transparency_of_its_cells_between_the_legends(forge):
    answer = forge.txt2img(layerdiffuse(SD15_ATTENTION), SMALL, plot(forge, "1, 2"))
    whole, *cells = answer.transparent
    legend = whole.height - 64
    assert [same(whole.crop((64 * i, legend, 64 * (i + 1), whole.height)), cell) for i, cell in enumerate(cells)] == [
        True,
        True,
    ]
    assert whole.crop((0, 0, 128, legend)).getchannel("A").getextrema()[0] >= 254
    assert answer.notes == ""


def test_a_refused_cell_says_why(forge):
    answer = forge.txt2img(layerdiffuse(SD15_ATTENTION), SMALL, plot(forge, "1, 3", "[LayerDiffuse] Weight"))
    assert answer.status == 200, answer.body
    assert "Weight (weight in API calls) is 3" in answer.notes
    assert all(answer.infotexts)


COMBINED = "Make a combined image containing all outputs (if more than one)"


def prompts_from_file(forge, lines="red apple\ngreen pear", **more):
    return forge.script("prompts from file or textbox", {"List of prompt inputs": lines, **more})


def test_prompts_from_file(forge):
    answer = forge.txt2img(layerdiffuse(SD15_ATTENTION), SMALL, prompts_from_file(forge))
    assert answer.status == 200, answer.body
    assert len(answer.transparent) == 2
    assert all_different(answer.transparent)


@needs("combined image")
def test_a_combined_image_shows_opaque_pictures_and_says_so(forge):
    read = prompts_from_file(forge, **{COMBINED: True})
    combined, *pictures = forge.txt2img(layerdiffuse(SD15_ATTENTION), SMALL, read).images
    opaque = [forge.txt2img(layerdiffuse(SD15_ATTENTION), SMALL, prompt=f"{prompt} apple").images[1]
              for prompt in ("red apple", "green pear")]  # fmt: skip
    assert all(map(alpha_varies, pictures))
    shown = [combined.crop((64 * i, 0, 64 * (i + 1), 64)) for i in range(2)]
    assert [each.convert("RGB").tobytes() for each in shown] == [each.tobytes() for each in opaque]


OUTPAINTING = {"Pixels to expand": 32, "Outpainting direction": ["left"]}
OPAQUE_SCRIPTS = {
    "sd upscale": {"Tile overlap": 16, "Upscaler": "None", "Scale factor": 2.0},
    "poor man's outpainting": {**OUTPAINTING, "Masked content": 0},
    "outpainting mk2": OUTPAINTING,
}


def run_opaque_script(forge, name):
    """From a picture whose transparent part has a colour that would be seen."""
    init = Image.new("RGBA", (64, 64), (255, 0, 255, 0))
    init.paste((20, 160, 90, 255), (16, 16, 48, 48))
    script = forge.script(name, OPAQUE_SCRIPTS[name], is_img2img=True)
    answer = forge.img2img(init, layerdiffuse(SD15_ATTENTION), SMALL, script)
    assert answer.status == 200, answer.body
    return answer


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[needs("outpainting")] * ("out" in name)) for name in OPAQUE_SCRIPTS]
)
def test_scripts_that_know_no_transparency_say_so(forge, name):
    answer = run_opaque_script(forge, name)
    assert "puts pictures together without transparency: its pictures have none." in answer.notes
    assert [alpha_varies(image) for image in answer.images] == [False]


@needs("outpainting")
def test_scripts_that_know_no_transparency_show_no_hidden_colours(forge):
    """Where this one paints nothing."""
    [image] = run_opaque_script(forge, "poor man's outpainting").images
    colours = {colour for _, colour in image.convert("RGB").crop((96, 0, 128, 64)).getcolors()}
    assert colours == {(128, 128, 128), (20, 160, 90)}


def test_loopback(forge):
    """The second loop starts from the first one's picture, of which it takes the opaque one."""
    script = forge.script("loopback", {"Loops": 2, "Final denoising strength": 0.5}, is_img2img=True)
    answer = forge.img2img(
        Image.new("RGB", (64, 64), (200, 40, 40)),
        layerdiffuse(SD15_ATTENTION),
        SMALL,
        script,
    )
    assert answer.status == 200, answer.body
    assert len(answer.transparent) == 2
    assert all_different(answer.transparent)


def test_a_job_after_a_plot_is_a_first_job(forge):
    """Nothing of the plot's jobs is left over."""
    before = forge.picture(layerdiffuse(SD15_ATTENTION), SMALL)
    assert forge.txt2img(layerdiffuse(SD15_ATTENTION), SMALL, plot(forge, "4, 5")).status == 200
    assert same(forge.picture(layerdiffuse(SD15_ATTENTION), SMALL), before)
