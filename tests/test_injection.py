"""Weight files become injections, or a sentence that names the file."""

import pytest
import torch
from safetensors.torch import save_file

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.injection.content import WeightPatch, load_injection
from lib_layerdiffuse.methods import find_method
from lib_layerdiffuse.nets.attention_sharing import FoldedSharing
from tests.test_attention_sharing import random_file

KEY = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
CONV = "diffusion_model.input_blocks.0.0.weight"
LORA = {f"{KEY}::lora::0": torch.randn(6, 2), f"{KEY}::lora::1": torch.randn(2, 4)}
DIFF = {f"{CONV}::diff::0": torch.randn(6, 4, 3, 3)}

SDXL = find_method("xl_transparent_attn")
SD15 = find_method("sd15_transparent_attn")


FG2BLE = find_method("xl_fg2ble")
FG2BG = find_method("sd15_fg2bg")
WIDENED = {f"{CONV}::diff::0": torch.randn(6, 12, 3, 3)}


def test_widened_first_convolution_is_split():
    """The first four channels read the latent, the others the condition latents."""
    patch = WeightPatch.from_state_dict(LORA | WIDENED, 4)
    whole = WIDENED[f"{CONV}::diff::0"]
    assert patch.shapes()[CONV] == (6, 4, 3, 3)
    torch.testing.assert_close(torch.cat([patch.diff[CONV], patch.condition], dim=1), whole)
    assert patch.conditions == 2


def test_additions_by_key():
    patch = WeightPatch.from_state_dict(LORA | DIFF, 4)
    assert patch.lora[KEY] == (LORA[f"{KEY}::lora::0"], LORA[f"{KEY}::lora::1"])
    assert patch.diff[CONV] is DIFF[f"{CONV}::diff::0"]
    assert patch.shapes() == {KEY: (6, 4), CONV: (6, 4, 3, 3)}


@pytest.mark.parametrize(
    "sd",
    [
        {},
        {"conv_in.weight": torch.zeros(1)},
        DIFF | {"conv_in.weight": torch.zeros(1)},
        {f"{KEY}::lora::0": torch.zeros(6, 2)},
        {f"{KEY}::lora::1": torch.zeros(2, 4)},
        {f"{KEY}::glora::0": torch.zeros(6, 2)},
    ],
    ids=["empty", "other file", "mixed", "up alone", "down alone", "other kind"],
)
def test_what_is_not_all_additions_is_refused(sd):
    with pytest.raises(LayerDiffuseError, match=f"found {len(sd)} tensors"):
        WeightPatch.from_state_dict(sd, 4)


def test_identity_changes_with_the_file(tmp_path):
    path = tmp_path / SDXL.weights
    save_file(LORA, path)
    first = load_injection(SDXL, path)
    assert first.content.lora.keys() == {KEY}
    identity = first.identity
    assert load_injection(SDXL, path).identity == identity
    del first  # Windows lets nobody write to a file that is mapped
    save_file(LORA | DIFF, path)
    assert load_injection(SDXL, path).identity != identity


def test_attention_sharing_comes_as_it_is_computed(tmp_path):
    path = tmp_path / SD15.weights
    save_file({key: tensor.half() for key, tensor in random_file(1).items()}, path)
    content = load_injection(SD15, path).content
    assert isinstance(content, FoldedSharing)
    assert content.units("attn1")["middle", 0].temporal_o.weight.dtype is torch.float32  # until its precision is known


@pytest.mark.parametrize(
    ("method", "content", "reason"),
    [
        (SD15, {"hookers.layers.0.to_q": torch.zeros(1)}, "no tensor hookers.layers.0"),
        (SDXL, {"conv_in.weight": torch.zeros(1)}, "expected additions to weights of the UNet"),
        (SD15, random_file(3), "expected 1 frames for each picture, found 3"),
        (FG2BG, random_file(2), "expected 1 condition images, found 0"),
        (SD15, random_file(1, control=True), "expected 0 condition images, found 1"),
        (SDXL, WIDENED, "expected 0 condition images, found 2"),
        (FG2BLE, DIFF, "expected 1 condition images, found 0"),
    ],
    ids=[
        "half of attention sharing",
        "of neither kind",
        "joint file for one layer",
        "control missing",
        "control too much",
        "condition too much",
        "condition missing",
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path, method, content, reason):
    path = tmp_path / method.weights
    save_file(content, path)
    with pytest.raises(LayerDiffuseError, match=f"{method.weights} is not the weight file.*{reason}"):
        load_injection(method, path)


@pytest.mark.parametrize(("method", "content"), [(SDXL, LORA | DIFF), (SD15, random_file(1))], ids=["SDXL", "SD1.5"])
def test_numbers_that_cannot_be_computed_with_are_named(tmp_path, method, content):
    path = tmp_path / method.weights
    name = max(content)
    for spoil in (lambda x: x.to(torch.int8), lambda x: x.fill_(float("nan"))):
        save_file(content | {name: spoil(content[name].clone())}, path)
        with pytest.raises(LayerDiffuseError, match=f"{method.weights} cannot be used: its tensor {name} holds"):
            load_injection(method, path)


def test_additions_come_in_one_precision(tmp_path):
    path = tmp_path / SDXL.weights
    save_file({key: x.bfloat16() for key, x in LORA.items()} | {key: x.half() for key, x in DIFF.items()}, path)
    content = load_injection(SDXL, path).content
    assert {x.dtype for x in (*content.lora[KEY], content.diff[CONV])} == {torch.float32}
