"""Where the tests keep what is made once: random model files, and a data folder for each way of starting Forge.

LAYERDIFFUSE_TEST_DATA names the place; default ~/.cache/sd-forge-layerdiffuse/forge-data.

    <place>/v<GENERATOR_VERSION>/models/            shared by all servers
    <place>/v<GENERATOR_VERSION>/<name>/            --data-dir of one kind of server: extensions, config.json, outputs
"""

import json
import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tools.forge import CHECKOUT, EXTENSION, Installation, Server, link

HERE = Path(__file__).resolve().parent
SYNTHETIC = HERE / "synthetic.py"
# Read, not imported: torch is Forge's, not ours.
GENERATOR_VERSION = int(
    re.search(r"^GENERATOR_VERSION = (\d+)", SYNTHETIC.read_text(encoding="utf-8"), re.MULTILINE)[1]
)

CHECKPOINTS = {
    "sd15": "synthetic_sd15.safetensors",
    "sd15_inpaint": "synthetic_sd15_inpaint.safetensors",
    "sdxl": "synthetic_sdxl.safetensors",
}
CONTROLNET = "synthetic_controlnet_sd15"
MODEL_FILES = (
    *(Path(name).stem for name in CHECKPOINTS.values()),
    "synthetic_lora_sd15",
    CONTROLNET,
    "layer_sd15_transparent_attn",
    "layer_sd15_joint",
    "layer_sd15_fg2bg",
    "layer_sd15_bg2fg",
    "layer_sd15_vae_transparent_decoder",
    "layer_sd15_vae_transparent_encoder",
    "layer_xl_transparent_attn",
    "layer_xl_transparent_conv",
    "layer_xl_fg2ble",
    "layer_xl_bg2ble",
    "layer_xl_fgble2bg",
    "layer_xl_bgble2fg",
    "vae_transparent_decoder",
    "vae_transparent_encoder",
)
# Every option that a test changes has its value here: Forge undoes a request's override_settings only where
# config.json has one. The default live preview of SDXL would download a decoder.
OPTIONS = {
    "sd_model_checkpoint": CHECKPOINTS["sd15"],
    "show_progress_type": "Approx cheap",
    "CLIP_stop_at_last_layers": 1,  # Neo's own is 2
    "samples_format": "png",
    "jpeg_quality": 80,
    "stealth_pnginfo_option": "Alpha",
    "return_grid": False,
    "save_images_add_number": True,
    "save_to_dirs": False,
    "token_merging_ratio": 0.0,
    "overlay_inpaint": True,
    "img2img_fix_steps": False,
    "img2img_color_correction": False,
    "directories_filename_pattern": "[date]",
    "samples_filename_pattern": "",
    "target_side_length": 4000,
    "forge_unet_storage_dtype": "Automatic",
    "layerdiffuse_passes": 1,  # all of 8 in the tests that say so
    "layerdiffuse_extras": ["opaque"],
}
PROBE_VARIABLE = "LAYERDIFFUSE_PROBE"
RECORDING_VARIABLE = "LAYERDIFFUSE_PROBE_RECORDING"
SERVER_ARGUMENTS = ("--disable-console-progressbars", "--server-name", "127.0.0.1")
START_LIMIT_S = 600  # 15 on an idle machine of two cores, ten times that on a busy one
# Threads that wait for work sleep: spinning takes the cores, on a busy machine, from threads that have some.
BUSY_MACHINE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
# Freed memory stays with the process (mallopt(3)), as with TCMalloc, which Forge's webui.sh preloads: in every step
# Forge casts each weight into new memory, and fresh pages took half of the time of a small job.
KEPT_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": f"{2**32}", "MALLOC_TRIM_THRESHOLD_": f"{2**34}"}
OURS = {EXTENSION: CHECKOUT}


def root() -> Path:
    place = os.environ.get("LAYERDIFFUSE_TEST_DATA", "~/.cache/sd-forge-layerdiffuse/forge-data")
    return Path(place).expanduser().absolute() / f"v{GENERATOR_VERSION}"


def models() -> Path:
    return root() / "models"


def layer_file(name: str) -> Path:
    return models() / "layer_model" / f"{name}.safetensors"


def controlnet_file() -> Path:
    return models() / "ControlNet" / f"{CONTROLNET}.safetensors"


def make_models(installation: Installation, names: Iterable[str] = MODEL_FILES) -> None:
    """Forge's Python makes what is missing; minutes the first time, nothing after that."""
    subprocess.run(
        [str(installation.python), str(SYNTHETIC), str(models()), *names], check=True, stdout=subprocess.DEVNULL
    )


def server(
    installation: Installation,
    name: str,
    extensions: Mapping[str, Path],
    environment: Mapping[str, str] = {},
    arguments: Sequence[str] = (),
    precision: Sequence[str] | None = None,
) -> Server:
    """A server that is not started yet, with the probe and the given extensions and no others.

    precision: of the UNet; default: half, which keeps SDXL within 16 GB. Computing stays in single precision on a CPU.
    """
    host, folder = installation.host, folder_of(name)
    precision = host.half if precision is None else precision
    clear_links(folder / "extensions")
    for link_name, source in {"layerdiffuse-probe": HERE / "probe", **extensions}.items():
        link(source, folder / "extensions" / link_name)
    (folder / "config.json").write_text(json.dumps({**OPTIONS, **host.options}, indent=4), encoding="utf-8")
    (folder / "tmp").mkdir(exist_ok=True)  # Neo does not make it
    probe_file(name).write_text("", encoding="utf-8")
    arguments = ("--data-dir", str(folder), host.models, str(models()), *SERVER_ARGUMENTS, *precision, *arguments)
    environment = {PROBE_VARIABLE: str(probe_file(name)), **BUSY_MACHINE, **KEPT_MEMORY, **environment}
    return Server(installation, folder / "forge.log", arguments, environment, START_LIMIT_S)


def folder_of(name: str) -> Path:
    """The data folder of one kind of server; each host has its own."""
    host = os.environ.get("HOST", "forge")
    return root() / (name if host == "forge" else f"{host}-{name}")


def probe_file(name: str) -> Path:
    return folder_of(name) / "probe.jsonl"


def clear_links(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():
        if entry.is_symlink():
            entry.unlink()
