"""Host scripts that run several jobs in one: each job gets its own picture.

The img2img Batch tab is the fourth of the kind; it exists on the page only, not in the API.
"""

import pytest
from PIL import Image

from tests.forge.client import SD15_ATTENTION, all_different, alpha_varies, layerdiffuse, same

SMALL = {"width": 64, "height": 64}
SEED_AXIS, NO_AXIS = 1, 0  # positions in the list of axes of scripts/xyz_grid.py
SEEDS = (1, 2, 3)


def xyz_arguments(x_values, lone_images=True):
    axes = [SEED_AXIS, x_values, [], NO_AXIS, "", [], NO_AXIS, "", []]
    draw_legend, sub_grids, no_fixed_seeds, vary_seeds, margin, csv_mode = (
        True,
        False,
        False,
        (False, False, False),
        0,
        False,
    )
    return [*axes, draw_legend, lone_images, sub_grids, no_fixed_seeds, *vary_seeds, margin, csv_mode]


def axis(forge, label):
    info = forge.request("sdapi/v1/script-info").body
    [plot] = [script for script in info if script["name"] == "x/y/z plot" and not script["is_img2img"]]
    return plot["args"][0]["choices"].index(label)


def test_xyz_plot_over_seeds(forge):
    answer = forge.txt2img(
        layerdiffuse(SD15_ATTENTION),
        SMALL,
        script_name="x/y/z plot",
        script_args=xyz_arguments(", ".join(map(str, SEEDS))),
    )
    assert answer.status == 200, answer.body
    cells = [image for image in answer.transparent if image.size == (64, 64)]
    assert len(cells) == len(SEEDS)
    assert all_different(cells)
    alone = [forge.picture(layerdiffuse(SD15_ATTENTION), SMALL, seed=seed) for seed in SEEDS]
    assert [cell.tobytes() for cell in cells] == [picture.tobytes() for picture in alone]


def test_xyz_plot_over_weights(forge):
    arguments = [axis(forge, "[LayerDiffuse] Weight"), *xyz_arguments("0.3, 1")[1:]]
    answer = forge.txt2img(layerdiffuse(SD15_ATTENTION), SMALL, script_name="x/y/z plot", script_args=arguments)
    assert answer.status == 200, answer.body
    cells = [image for image in answer.transparent if image.size == (64, 64)]
    alone = [forge.picture(layerdiffuse(SD15_ATTENTION, weight), SMALL) for weight in (0.3, 1)]
    assert [cell.tobytes() for cell in cells] == [picture.tobytes() for picture in alone]


def test_a_plot_keeps_the_transparency_of_its_cells_between_the_legends(forge):
    answer = forge.txt2img(
        layerdiffuse(SD15_ATTENTION), SMALL, script_name="x/y/z plot", script_args=xyz_arguments("1, 2")
    )
    plot, *cells = answer.transparent
    legend = plot.height - 64
    assert [same(plot.crop((64 * i, legend, 64 * (i + 1), plot.height)), cell) for i, cell in enumerate(cells)] == [
        True,
        True,
    ]
    assert plot.crop((0, 0, 128, legend)).getchannel("A").getextrema()[0] >= 254
    assert answer.notes == ""


def test_a_refused_cell_says_why(forge):
    arguments = [axis(forge, "[LayerDiffuse] Weight"), *xyz_arguments("1, 3")[1:]]
    answer = forge.txt2img(layerdiffuse(SD15_ATTENTION), SMALL, script_name="x/y/z plot", script_args=arguments)
    assert answer.status == 200, answer.body
    assert "Weight (weight in API calls) is 3" in answer.notes
    assert all(answer.infotexts)


def prompts_from_file(forge, make_combined):
    iterate_seed, same_seed, position = False, False, "start"
    return forge.txt2img(
        layerdiffuse(SD15_ATTENTION),
        SMALL,
        script_name="prompts from file or textbox",
        script_args=[iterate_seed, same_seed, position, "red apple\ngreen pear", make_combined],
    )


def test_prompts_from_file(forge):
    answer = prompts_from_file(forge, make_combined=False)
    assert answer.status == 200, answer.body
    assert len(answer.transparent) == 2
    assert all_different(answer.transparent)


def test_a_combined_image_shows_opaque_pictures_and_says_so(forge):
    combined, *pictures = prompts_from_file(forge, make_combined=True).images
    opaque = [forge.txt2img(layerdiffuse(SD15_ATTENTION), SMALL, prompt=f"{prompt} apple").images[1]
              for prompt in ("red apple", "green pear")]  # fmt: skip
    assert all(map(alpha_varies, pictures))
    shown = [combined.crop((64 * i, 0, 64 * (i + 1), 64)) for i in range(2)]
    assert [each.convert("RGB").tobytes() for each in shown] == [each.tobytes() for each in opaque]


OPAQUE_SCRIPTS = {
    "sd upscale": ["", 16, "None", 2.0],
    "poor man's outpainting": [32, 4, 0, ["left"]],
    "outpainting mk2": ["", 32, 4, ["left"], 1.0, 0.05],
}


def run_opaque_script(forge, name):
    """From a picture whose transparent part has a colour that would be seen."""
    init = Image.new("RGBA", (64, 64), (255, 0, 255, 0))
    init.paste((20, 160, 90, 255), (16, 16, 48, 48))
    answer = forge.img2img(
        init, layerdiffuse(SD15_ATTENTION), SMALL, script_name=name, script_args=OPAQUE_SCRIPTS[name]
    )
    assert answer.status == 200, answer.body
    return answer


@pytest.mark.parametrize("name", OPAQUE_SCRIPTS)
def test_scripts_that_know_no_transparency_say_so(forge, name):
    answer = run_opaque_script(forge, name)
    assert "puts pictures together without transparency: its pictures have none." in answer.notes
    assert [alpha_varies(image) for image in answer.images] == [False]


def test_scripts_that_know_no_transparency_show_no_hidden_colours(forge):
    """Where this one paints nothing."""
    [image] = run_opaque_script(forge, "poor man's outpainting").images
    colours = {colour for _, colour in image.convert("RGB").crop((96, 0, 128, 64)).getcolors()}
    assert colours == {(128, 128, 128), (20, 160, 90)}


def test_loopback(forge):
    """The second loop starts from the first one's picture, of which it takes the opaque one."""
    loops, final_strength, curve, interrogate = 2, 0.5, "Linear", "None"
    answer = forge.img2img(
        Image.new("RGB", (64, 64), (200, 40, 40)),
        layerdiffuse(SD15_ATTENTION),
        SMALL,
        script_name="loopback",
        script_args=[loops, final_strength, curve, interrogate],
    )
    assert answer.status == 200, answer.body
    assert len(answer.transparent) == 2
    assert all_different(answer.transparent)


def test_a_job_after_a_plot_is_a_first_job(forge):
    """Nothing of the plot's jobs is left over."""
    before = forge.picture(layerdiffuse(SD15_ATTENTION), SMALL)
    plot = {"script_name": "x/y/z plot", "script_args": xyz_arguments("4, 5")}
    assert forge.txt2img(layerdiffuse(SD15_ATTENTION), SMALL, plot).status == 200
    assert same(forge.picture(layerdiffuse(SD15_ATTENTION), SMALL), before)
