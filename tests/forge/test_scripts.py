"""Host scripts that run several jobs in one: each job gets its own picture.

The img2img Batch tab is the fourth of the kind; it exists on the page only, not in the API.
"""

from PIL import Image

from tests.forge.client import SD15_ATTENTION, all_different, layerdiffuse, same

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
    info = forge.request("sdapi/v1/script-info").body
    [plot] = [script for script in info if script["name"] == "x/y/z plot" and not script["is_img2img"]]
    weight_axis = plot["args"][0]["choices"].index("[LayerDiffuse] Weight")
    arguments = [weight_axis, *xyz_arguments("0.3, 1")[1:]]
    answer = forge.txt2img(layerdiffuse(SD15_ATTENTION), SMALL, script_name="x/y/z plot", script_args=arguments)
    assert answer.status == 200, answer.body
    cells = [image for image in answer.transparent if image.size == (64, 64)]
    alone = [forge.picture(layerdiffuse(SD15_ATTENTION, weight), SMALL) for weight in (0.3, 1)]
    assert [cell.tobytes() for cell in cells] == [picture.tobytes() for picture in alone]


def test_prompts_from_file(forge):
    iterate_seed, same_seed, position, make_combined = False, False, "start", False
    answer = forge.txt2img(
        layerdiffuse(SD15_ATTENTION),
        SMALL,
        script_name="prompts from file or textbox",
        script_args=[iterate_seed, same_seed, position, "red apple\ngreen pear", make_combined],
    )
    assert answer.status == 200, answer.body
    assert len(answer.transparent) == 2
    assert all_different(answer.transparent)


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
