"""Of the tests that drive a real Forge, one for each kind of thing: those that CI has the time for.

The others run by hand: python tasks.py forge-test-full ui-test-full.
"""

from collections.abc import Sequence

import pytest

# By file: tests, all of their cases or those that begin with these words.
BRIEF: dict[str, Sequence[str]] = {
    "forge/test_change_maps.py": ["test_a_map_from_alpha", "test_a_strength_fan_shows_the_strengths"],
    "forge/test_company.py": [
        "test_a_detailer_s_edit_is_kept_and_so_is_the_alpha",
        "test_a_unet_that_shrinks_the_picture_on_the_way",
        "test_a_users_lora_counts_in_the_layers_too",
    ],
    "forge/test_downloads.py": ["test_missing_weights_are_downloaded"],
    "forge/test_img2img.py": [
        "test_a_size_that_8_does_not_divide",
        "test_colour_correction_is_for_colours_over_grey",
        "test_extras_that_crop_keep_alpha",
        "test_there_and_back_without_a_change_is_what_the_networks_say",
    ],
    "forge/test_inpainting.py": ["test_beside_a_cut_out", "test_outside_the_mask_nothing_changes[area1"],
    "forge/test_interrupt.py": ["test_interrupt_while_sampling"],
    "forge/test_layers.py": [
        "test_a_condition_counts_for_every_picture[count0-(SDXL) From Foreground and Blending",
        "test_names_and_infotexts_say_what_a_picture_shows",
    ],
    "forge/test_malformed.py": ["test_each_is_refused_or_done_and_harms_nothing[missing and broken"],
    "forge/test_pictures.py": [
        "test_a_transparent_picture_and_then_the_opaque_one[(SD1.5)",
        "test_a_transparent_picture_and_then_the_opaque_one[(SDXL) Only Generate Transparent Image (Attention",
        "test_hires_fix",
    ],
    "forge/test_refusals.py": ["test_an_sdxl_method_on_an_sd15_model[(SDXL) Only Generate Transparent Image (Conv"],
    "forge/test_routes.py": [
        "test_decode_and_encode_are_what_the_networks_say",
        "test_methods_and_weights",
        "test_refused[POST",
    ],
    "forge/test_saved_files.py": [
        "test_near_the_longest_path_every_picture_has_a_file_of_its_own[(SD1.5) Only",
        "test_the_file_holds_the_transparency[jpg-Alpha",
        "test_the_small_jpg_of_a_large_picture_shows_the_opaque_one",
    ],
    "forge/test_scripts.py": [
        "test_a_combined_image_shows_opaque_pictures_and_says_so",
        "test_a_plot_keeps_the_transparency_of_its_cells_between_the_legends",
        "test_a_refused_cell_says_why",
        "test_scripts_that_know_no_transparency_show_no_hidden_colours",
    ],
    "forge/test_strength.py": ["test_off_is_a_forge_without_the_extension[sd15"],
    "forge/test_tool.py": ["test_a_link", "test_a_missing"],
    "forge/test_upstream_latents.py": [
        "test_latents_are_those_of_the_existing_extension[sd15-attention-128x128-2steps",
        "test_latents_are_those_of_the_existing_extension[sd15-fg2bg-64x64-2steps",
    ],
    "page/test_panel.py": [
        "test_a_refused_job_says_why_and_the_next_one_works",
        "test_each_method_shows_what_it_uses_and_explains_it",
    ],
    "page/test_images.py": ["test_alpha_arrives[upload"],
    "page/test_pasting.py": ["test_the_last_parameters_come_back"],
    "page/test_results.py": [
        "test_a_result_becomes_the_foreground_of_the_next_job",
        "test_save_and_zip_write_everything_that_is_shown",
        "test_the_upscale_button_replaces_a_picture_with_all_that_belongs_to_it",
    ],
    "page/test_weights.py": ["test_a_download_is_offered_followed_cancelled_and_continued"],
}


def mark(items: Sequence[pytest.Item]) -> None:
    """Mark those of the table as brief. Fails where it names a test that a file of the run does not have."""
    missing = set()
    for file, names in BRIEF.items():
        own = [item for item in items if item.path.as_posix().endswith(f"tests/{file}")]
        for name in names:
            found = [item for item in own if item.name.startswith(name)]
            for item in found:
                item.add_marker("brief")
            if own and not found:
                missing.add(f"{file}: {name}")
    if missing:
        raise pytest.UsageError(f"tests/brief.py names tests that are not there: {', '.join(sorted(missing))}")
