"""The parameters of a picture fill the panel again."""

from playwright.sync_api import expect

from tests.forge.client import SD15_FG_TO_BG, SD15_JOINT
from tests.page.tab import LAYERS, TRANSPARENT, Tab, eventually, load, show
from tests.page.test_panel import SHOWN

SDXL_EVERYTHING = "(SDXL) From Prompt to Foreground, Blending and Background"  # has a comma
JOB = "apple\nSteps: 1, Sampler: Euler, Schedule type: Automatic, CFG scale: 7, Seed: 7, Size: 64x64"
DEFAULTS = {
    "enabled": False,
    "method": TRANSPARENT,
    "weight": 1.0,
    "starting_step": 0.0,
    "ending_step": 1.0,
    "fg_prompt": "",
    "bg_prompt": "",
    "blend_prompt": "",
    "resize_mode": "Crop and Resize",
    "passes": "as in Settings",
    "grey_background": False,
}
CHANGED = {
    "enabled": True,
    "method": f"{LAYERS} (SD1.5)",
    "weight": 0.65,
    "starting_step": 0.1,
    "ending_step": 0.9,
    "fg_prompt": "red, shiny apple",
    "bg_prompt": "a table: oak",
    "blend_prompt": "both",
    "resize_mode": "Resize and Fill",
    "passes": "2",
    "grey_background": True,
}
PASTED = (
    f"{JOB}, LayerDiffuse method: {SD15_JOINT}, LayerDiffuse weight: 0.65, LayerDiffuse start at: 0.1, "
    "LayerDiffuse stop at: 0.9, LayerDiffuse resize mode: Resize and Fill, "
    'LayerDiffuse foreground prompt: "red, shiny apple", LayerDiffuse background prompt: "a table: oak", '
    "LayerDiffuse blend prompt: both, LayerDiffuse passes: 2, LayerDiffuse grey background: True, Version: x"
)
# As the older extension wrote them.
OLDER = (
    f"{JOB}, layerdiffusion_enabled: True, layerdiffusion_method: {SD15_FG_TO_BG}, layerdiffusion_weight: 0.8, "
    "layerdiffusion_ending_step: 0.5, layerdiffusion_fg_image: True, layerdiffusion_resize_mode: Resize and Fill, "
    "layerdiffusion_bg_additional_prompt: a table, Version: x"
)


def test_an_infotext_fills_every_control_and_an_ordinary_one_switches_off(page):
    tab = Tab(page, "txt2img")
    assert tab.settings == DEFAULTS
    tab.paste(PASTED)
    eventually(lambda: tab.settings, CHANGED)
    tab.paste(OLDER)
    eventually(
        lambda: tab.settings,
        DEFAULTS
        | {
            "enabled": True,
            "method": "Background for a foreground (SD1.5)",
            "weight": 0.8,
            "ending_step": 0.5,
            "resize_mode": "Resize and Fill",
            "bg_prompt": "a table",
        },
    )
    tab.paste(f"{JOB}, Version: x")
    eventually(lambda: tab.ticked, False)


def test_a_pasted_method_may_be_for_another_checkpoint(page):
    tab = Tab(page, "txt2img")
    tab.paste(f'{JOB}, LayerDiffuse method: "{SDXL_EVERYTHING}", Version: x')
    eventually(lambda: (tab.ticked, tab.method), (True, f"{LAYERS} (SDXL)"))
    assert tab.methods == list(SHOWN)


def test_a_saved_file_fills_every_control_by_way_of_png_info(page, forge):
    tab = Tab(page, "txt2img")
    tab.paste(PASTED)
    eventually(lambda: tab.settings, CHANGED)
    before = forge.saved_files()
    tab.made()
    file = next(path for path in forge.saved_files() - before if path.stem.endswith("-fg"))
    load(page)
    assert tab.settings == DEFAULTS
    show(page, "PNG Info")
    page.locator("#pnginfo_image input[type=file]").set_input_files(file)
    expect(page.locator("#tab_pnginfo")).to_contain_text("LayerDiffuse method")
    page.locator("#tab_pnginfo #txt2img_tab").click()
    expect(tab.panel).to_be_visible()
    eventually(lambda: tab.settings, CHANGED | {"resize_mode": DEFAULTS["resize_mode"]})  # no image, so not written


def test_the_last_parameters_come_back(page):
    """By the button that fills an empty prompt from the last job."""
    tab = Tab(page, "txt2img")
    tab.paste(PASTED)
    eventually(lambda: tab.settings, CHANGED)
    tab.made()
    load(page)
    tab.prompt.fill("")
    page.locator("#txt2img_tools #paste").click()
    eventually(lambda: tab.settings, CHANGED | {"resize_mode": DEFAULTS["resize_mode"]})
