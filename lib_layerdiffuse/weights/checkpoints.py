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
