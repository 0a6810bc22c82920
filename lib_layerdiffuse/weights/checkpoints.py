"""What kind of base model a checkpoint file holds, without loading it."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from lib_layerdiffuse.methods import Family

# Two weights that all families have: their second sizes are the channels that the UNet takes (an inpainting model has
# more) and the width of its text context.
FIRST_KEY = "model.diffusion_model.input_blocks.0.0.weight"
CONTEXT_KEY = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
FAMILIES = {(family.channels, family.context): family for family in Family}


def family_of(path: Path) -> Family | None:
    """By the file's header. None where it is of another kind, or does not tell: only safetensors files do."""
    try:
        with safe_open(path, "pt") as file:
            channels, context = (file.get_slice(key).get_shape()[1] for key in (FIRST_KEY, CONTEXT_KEY))
    except (OSError, SafetensorError):
        return None
    return FAMILIES.get((channels, context))


# By the width of the text context.
WORDS = {768: "SD1.5", 1024: "SD2", 2048: "SDXL", 1280: "SDXL refiner"}
INPAINTING = 5  # channels more: the mask, and the latents of what is not masked


def kind_of(channels: int, context: int) -> str:
    """A checkpoint in words, by what its UNet takes: `an SD1.5 inpainting checkpoint`."""
    if context not in WORDS:
        return "a Flux or other checkpoint"
    special = {4: "", 4 + INPAINTING: "inpainting "}.get(channels, f"{channels}-channel ")
    return f"an {WORDS[context]} {special}checkpoint"
