"""What kind of base model a checkpoint file holds, without loading it."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from lib_layerdiffuse.methods import Family

# Two weights that both families have: their second sizes are the channels that the UNet takes (an inpainting model has
# more) and the width of its text context.
FIRST_KEY = "model.diffusion_model.input_blocks.0.0.weight"
CONTEXT_KEY = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
FAMILIES = {(4, 768): Family.SD15, (4, 2048): Family.SDXL}


def family_of(path: Path) -> Family | None:
    """By the file's header. None where it is of another kind, or does not tell: only safetensors files do."""
    try:
        with safe_open(path, "pt") as file:
            channels, context = (file.get_slice(key).get_shape()[1] for key in (FIRST_KEY, CONTEXT_KEY))
    except (OSError, SafetensorError):
        return None
    return FAMILIES.get((channels, context))
