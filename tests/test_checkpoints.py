"""The kind of a checkpoint, from the header of its file."""

import pytest
import torch
from safetensors.torch import save_file

from lib_layerdiffuse.methods import Family
from lib_layerdiffuse.weights.checkpoints import CONTEXT_KEY, FIRST_KEY, family_of


@pytest.mark.parametrize(
    ("channels", "context", "family"),
    [(4, 768, Family.SD15), (9, 768, None), (4, 1024, None), (4, 1280, None), (4, 2048, Family.SDXL)],
    ids=["SD1.5", "SD1.5 inpainting", "SD2", "SDXL refiner", "SDXL"],
)
def test_two_shapes_tell(tmp_path, channels, context, family):
    path = tmp_path / "model.safetensors"
    save_file({FIRST_KEY: torch.zeros(1, channels, 1, 1), CONTEXT_KEY: torch.zeros(1, context)}, path)
    assert family_of(path) is family


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 a pickle in a zip", b"GGUF" + bytes(40)])
def test_a_file_that_does_not_tell_is_of_no_kind(tmp_path, content):
    path = tmp_path / "model.ckpt"
    if content is not None:
        path.write_bytes(content)
    assert family_of(path) is None


def test_another_model_is_of_no_kind(tmp_path):
    path = tmp_path / "flux.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(3, 1)}, path)
    assert family_of(path) is None
