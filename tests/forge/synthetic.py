"""Full-size model files filled with random numbers, for driving a real Forge without any download.

Key names and shapes are those of the public single-file checkpoints ("ldm" layout) and of the files of
`LayerDiffusion/layerdiffusion-v1`, so a web UI and the extension recognise them; the weights mean nothing.
A file depends on its name and on GENERATOR_VERSION alone. It is written under a temporary name and renamed
when whole. Runs with the web UI's own Python: torch and safetensors, nothing else.

    python tests/forge/synthetic.py MODELS_DIR                    # every file
    python tests/forge/synthetic.py MODELS_DIR synthetic_sd15 layer_sd15_transparent_attn
    python tests/forge/synthetic.py --list
"""

import argparse
import math
import os
import re
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

GENERATOR_VERSION = 1  # raise it whenever a file would come out differently

Shape = tuple[int, ...]
Shapes = Iterator[tuple[str, Shape]]
Tensors = dict[str, Tensor]


# --- parts shared by all networks -------------------------------------------------------------------------------


def affine(name: str, *shape: int) -> Shapes:
    """A weight and the bias that belongs to it."""
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def conv(name: str, n_in: int, n_out: int, kernel: int = 3) -> Shapes:
    yield from affine(name, n_out, n_in, kernel, kernel)


def conv_chain(name: str, widths: Iterable[int]) -> Shapes:
    """Convolutions with an activation between, as `nn.Sequential` numbers them: 0, 2, 4, …"""
    for i, (n_in, n_out) in enumerate(pairwise(widths)):
        yield from conv(f"{name}.{2 * i}", n_in, n_out)


def prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return ((prefix + key, shape) for key, shape in shapes)


# --- UNet -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UNetLayout:
    """What differs between the UNets of the two families, one entry per resolution level."""

    multipliers: tuple[int, ...]
    depths: tuple[int, ...]
    middle_depth: int
    context: int
    linear_projections: bool
    label_width: int = 0
    input_channels: int = 4


BASE_WIDTH = 320
EMBEDDING_WIDTH = 4 * BASE_WIDTH
UNETS = {
    "sd15": UNetLayout((1, 2, 4, 4), (1, 1, 1, 0), 1, 768, linear_projections=False),
    "sdxl": UNetLayout((1, 2, 4), (0, 2, 10), 10, 2048, linear_projections=True, label_width=2816),
}


def attention(name: str, width: int, context: int) -> Shapes:
    yield f"{name}.to_q.weight", (width, width)
    yield f"{name}.to_k.weight", (width, context)
    yield f"{name}.to_v.weight", (width, context)
    yield from affine(f"{name}.to_out.0", width, width)


def transformer_block(name: str, width: int, context: int) -> Shapes:
    yield from attention(f"{name}.attn1", width, width)
    yield from attention(f"{name}.attn2", width, context)
    yield from affine(f"{name}.ff.net.0.proj", 8 * width, width)
    yield from affine(f"{name}.ff.net.2", width, 4 * width)
    for i in (1, 2, 3):
        yield from affine(f"{name}.norm{i}", width)


def transformer(name: str, width: int, depth: int, layout: UNetLayout) -> Shapes:
    projection = (width, width) if layout.linear_projections else (width, width, 1, 1)
    yield from affine(f"{name}.norm", width)
    yield from affine(f"{name}.proj_in", *projection)
    yield from affine(f"{name}.proj_out", *projection)
    for d in range(depth):
        yield from transformer_block(f"{name}.transformer_blocks.{d}", width, layout.context)


def unet_resnet(name: str, n_in: int, n_out: int) -> Shapes:
    yield from affine(f"{name}.in_layers.0", n_in)
    yield from conv(f"{name}.in_layers.2", n_in, n_out)
    yield from affine(f"{name}.emb_layers.1", n_out, EMBEDDING_WIDTH)
    yield from affine(f"{name}.out_layers.0", n_out)
    yield from conv(f"{name}.out_layers.3", n_out, n_out)
    if n_in != n_out:
        yield from conv(f"{name}.skip_connection", n_in, n_out, 1)


def unet_encoder(layout: UNetLayout) -> Generator[tuple[str, Shape], None, list[int]]:
    """The half down to the middle, which a ControlNet copies; returns the width of each block's output."""
    for name, width in (("time_embed", BASE_WIDTH), ("label_emb.0", layout.label_width)):
        if width:
            yield from affine(f"{name}.0", EMBEDDING_WIDTH, width)
            yield from affine(f"{name}.2", EMBEDDING_WIDTH, EMBEDDING_WIDTH)

    yield from conv("input_blocks.0.0", layout.input_channels, BASE_WIDTH)
    skips, width, n = [BASE_WIDTH], BASE_WIDTH, 1
    last_level = len(layout.multipliers) - 1
    for level, (multiplier, depth) in enumerate(zip(layout.multipliers, layout.depths)):
        for _ in range(2):
            yield from unet_resnet(f"input_blocks.{n}.0", width, BASE_WIDTH * multiplier)
            width = BASE_WIDTH * multiplier
            if depth:
                yield from transformer(f"input_blocks.{n}.1", width, depth, layout)
            skips.append(width)
            n += 1
        if level < last_level:
            yield from conv(f"input_blocks.{n}.0.op", width, width)
            skips.append(width)
            n += 1

    yield from unet_resnet("middle_block.0", width, width)
    yield from transformer("middle_block.1", width, layout.middle_depth, layout)
    yield from unet_resnet("middle_block.2", width, width)
    return skips


def unet(layout: UNetLayout) -> Shapes:
    """All tensors of the UNet, without the prefix that checkpoints put before them."""
    skips = yield from unet_encoder(layout)
    width = skips[-1]
    n = 0
    for level, (multiplier, depth) in reversed(list(enumerate(zip(layout.multipliers, layout.depths)))):
        for i in range(3):
            yield from unet_resnet(f"output_blocks.{n}.0", width + skips.pop(), BASE_WIDTH * multiplier)
            width = BASE_WIDTH * multiplier
            if depth:
                yield from transformer(f"output_blocks.{n}.1", width, depth, layout)
            if level and i == 2:
                yield from conv(f"output_blocks.{n}.{2 if depth else 1}.conv", width, width)
            n += 1
    yield from affine("out.0", BASE_WIDTH)
    yield from conv("out.2", BASE_WIDTH, 4)


HINT_WIDTHS = (3, 16, 16, 32, 32, 96, 96, 256, BASE_WIDTH)


def control_model(layout: UNetLayout) -> Shapes:
    """The UNet's first half, a reader of the hint image, and a convolution behind each block's output."""
    skips = yield from unet_encoder(layout)
    yield from conv_chain("input_hint_block", HINT_WIDTHS)
    for i, width in enumerate(skips):
        yield from conv(f"zero_convs.{i}.0", width, width, 1)
    yield from conv("middle_block_out.0", skips[-1], skips[-1], 1)


def controlnet() -> Shapes:
    yield from prefixed("control_model.", control_model(UNETS["sd15"]))


# --- VAE and text encoders --------------------------------------------------------------------------------------


def resnet(name: str, n_in: int, n_out: int, shortcut: str) -> Shapes:
    yield from affine(f"{name}.norm1", n_in)
    yield from conv(f"{name}.conv1", n_in, n_out)
    yield from affine(f"{name}.norm2", n_out)
    yield from conv(f"{name}.conv2", n_out, n_out)
    if n_in != n_out:
        yield from conv(f"{name}.{shortcut}", n_in, n_out, 1)


def vae_middle(name: str, width: int) -> Shapes:
    yield from resnet(f"{name}.block_1", width, width, "nin_shortcut")
    yield from affine(f"{name}.attn_1.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        yield from conv(f"{name}.attn_1.{part}", width, width, 1)
    yield from resnet(f"{name}.block_2", width, width, "nin_shortcut")


def vae(widths: tuple[int, ...] = (128, 256, 512, 512), latent_channels: int = 4) -> Shapes:
    last, width = len(widths) - 1, widths[0]
    yield from conv("encoder.conv_in", 3, width)
    for level, out in enumerate(widths):
        for i in range(2):
            yield from resnet(f"encoder.down.{level}.block.{i}", width, out, "nin_shortcut")
            width = out
        if level < last:
            yield from conv(f"encoder.down.{level}.downsample.conv", width, width)
    yield from vae_middle("encoder.mid", width)
    yield from affine("encoder.norm_out", width)
    yield from conv("encoder.conv_out", width, 2 * latent_channels)
    yield from conv("quant_conv", 2 * latent_channels, 2 * latent_channels, 1)

    yield from conv("post_quant_conv", latent_channels, latent_channels, 1)
    yield from conv("decoder.conv_in", latent_channels, width)
    yield from vae_middle("decoder.mid", width)
    for level, out in reversed(list(enumerate(widths))):
        for i in range(3):
            yield from resnet(f"decoder.up.{level}.block.{i}", width, out, "nin_shortcut")
            width = out
        if level:
            yield from conv(f"decoder.up.{level}.upsample.conv", width, width)
    yield from affine("decoder.norm_out", width)
    yield from conv("decoder.conv_out", width, 3)


TOKENS, POSITIONS = 49408, 77


def clip_l(width: int = 768, layers: int = 12) -> Shapes:
    yield "text_model.embeddings.token_embedding.weight", (TOKENS, width)
    yield "text_model.embeddings.position_embedding.weight", (POSITIONS, width)
    for i in range(layers):
        layer = f"text_model.encoder.layers.{i}"
        for part in ("q", "k", "v", "out"):
            yield from affine(f"{layer}.self_attn.{part}_proj", width, width)
        yield from affine(f"{layer}.mlp.fc1", 4 * width, width)
        yield from affine(f"{layer}.mlp.fc2", width, 4 * width)
        yield from affine(f"{layer}.layer_norm1", width)
        yield from affine(f"{layer}.layer_norm2", width)
    yield from affine("text_model.final_layer_norm", width)


def clip_g(width: int = 1280, layers: int = 32) -> Shapes:
    yield "token_embedding.weight", (TOKENS, width)
    yield "positional_embedding", (POSITIONS, width)
    yield "text_projection", (width, width)
    yield "logit_scale", ()
    for i in range(layers):
        layer = f"transformer.resblocks.{i}"
        yield f"{layer}.attn.in_proj_weight", (3 * width, width)
        yield f"{layer}.attn.in_proj_bias", (3 * width,)
        yield from affine(f"{layer}.attn.out_proj", width, width)
        yield from affine(f"{layer}.mlp.c_fc", 4 * width, width)
        yield from affine(f"{layer}.mlp.c_proj", width, 4 * width)
        yield from affine(f"{layer}.ln_1", width)
        yield from affine(f"{layer}.ln_2", width)
    yield from affine("ln_final", width)


def checkpoint(family: str) -> Shapes:
    yield from prefixed("model.diffusion_model.", unet(UNETS[family]))
    yield from prefixed("first_stage_model.", vae())
    if family == "sd15":
        yield from prefixed("cond_stage_model.transformer.", clip_l())
    else:
        yield from prefixed("conditioner.embedders.0.transformer.", clip_l())
        yield from prefixed("conditioner.embedders.1.model.", clip_g())


# --- LayerDiffuse -----------------------------------------------------------------------------------------------

DECODER_WIDTHS = (32, 32, 64, 128, 256, 512, 512)
DECODER_ATTENTION_LEVELS = 3  # the deepest ones
ENCODER_WIDTHS = (4, 32, 32, 64, 64, 128, 128, 256, 256, 4)
LORA_RANK = 256
# The order of `hookers.layers.<i>` in the SD1.5 files; each block gives attn1, then attn2.
SD15_ATTENTION_BLOCKS = (
    *(f"input_blocks.{i}.1" for i in (1, 2, 4, 5, 7, 8)),
    *(f"output_blocks.{i}.1" for i in range(3, 12)),
    "middle_block.1",
)


def decoder_attention(name: str, width: int) -> Shapes:
    yield from affine(f"{name}.group_norm", width)
    for part in ("to_q", "to_k", "to_v", "to_out.0"):
        yield from affine(f"{name}.{part}", width, width)


def transparent_decoder() -> Shapes:
    last = len(DECODER_WIDTHS) - 1
    width, skips = DECODER_WIDTHS[0], [DECODER_WIDTHS[0]]
    yield from conv("conv_in", 3, width)
    yield from conv("latent_conv_in", 4, DECODER_WIDTHS[2], 1)
    for i, out in enumerate(DECODER_WIDTHS):
        for j in range(2):
            yield from resnet(f"down_blocks.{i}.resnets.{j}", width, out, "conv_shortcut")
            if i > last - DECODER_ATTENTION_LEVELS:
                yield from decoder_attention(f"down_blocks.{i}.attentions.{j}", out)
            width = out
            skips.append(out)
        if i < last:
            yield from conv(f"down_blocks.{i}.downsamplers.0.conv", out, out)
            skips.append(out)

    for j in range(2):
        yield from resnet(f"mid_block.resnets.{j}", width, width, "conv_shortcut")
    yield from decoder_attention("mid_block.attentions.0", width)

    for i, out in enumerate(reversed(DECODER_WIDTHS)):
        for j in range(3):
            yield from resnet(f"up_blocks.{i}.resnets.{j}", width + skips.pop(), out, "conv_shortcut")
            if i < DECODER_ATTENTION_LEVELS:
                yield from decoder_attention(f"up_blocks.{i}.attentions.{j}", out)
            width = out
        if i < last:
            yield from conv(f"up_blocks.{i}.upsamplers.0.conv", out, out)
    yield from affine("conv_norm_out", width)
    yield from conv("conv_out", width, 4)


def sd15_attention_unit(name: str, widths: dict[str, Shape], frames: int, control: bool) -> Shapes:
    for part in ("to_q", "to_k", "to_v", "to_out"):
        width, n_in = widths[part]
        for frame in range(frames):
            yield f"{name}.{part}_lora.{frame}.down.weight", (LORA_RANK, n_in)
            yield f"{name}.{part}_lora.{frame}.up.weight", (width, LORA_RANK)
    for part in ("i", "q", "k", "v", "o"):
        yield from affine(f"{name}.temporal_{part}", width, width)
    yield from affine(f"{name}.temporal_n", width)
    for frame in range(frames if control else 0):
        yield from conv(f"{name}.control_convs.{frame}.0", 256, 256)
        yield from conv(f"{name}.control_convs.{frame}.2", 256, width, 1)


def sd15_attention_sharing(frames: int, control: bool) -> Shapes:
    shapes = dict(unet(UNETS["sd15"]))
    names = [f"{block}.transformer_blocks.0.{kind}" for block in SD15_ATTENTION_BLOCKS for kind in ("attn1", "attn2")]
    for i, name in enumerate(names):
        widths = {part: shapes[f"{name}.{part}.weight"] for part in ("to_q", "to_k", "to_v")}
        widths["to_out"] = shapes[f"{name}.to_out.0.weight"]
        yield from sd15_attention_unit(f"hookers.layers.{i}", widths, frames, control)
    if control:
        yield from conv_chain("kwargs_encoder.blocks_0", (3, 32, 32, 64, 64, 128, 128, 256, 256))
        for stage in (1, 2, 3):
            yield from conv_chain(f"kwargs_encoder.blocks_{stage}", (256, 256, 256))


def sdxl_lora() -> Shapes:
    """A low-rank addition to each of the 560 attention projections."""
    for key, shape in unet(UNETS["sdxl"]):
        if ".attn" in key and key.endswith("weight"):
            yield f"diffusion_model.{key}::lora::0", (shape[0], LORA_RANK)
            yield f"diffusion_model.{key}::lora::1", (LORA_RANK, shape[1])


INSIDE_TRANSFORMER = re.compile(r"transformer_blocks|blocks?(\.\d+)?\.1\.(norm|proj_in|proj_out)\.")
NEVER_PATCHED = re.compile(r"^(time_embed|label_emb)|\.to_[qkv]\.")


def sdxl_diff(transformers: bool, conditions: int = 0) -> Shapes:
    """Full-size additions, inside the transformers too or only outside; each condition widens the first convolution."""
    for key, shape in unet(UNETS["sdxl"]):
        if NEVER_PATCHED.search(key) or (INSIDE_TRANSFORMER.search(key) and not transformers):
            continue
        if key == "input_blocks.0.0.weight":
            shape = (shape[0], shape[1] + 4 * conditions, *shape[2:])
        yield f"diffusion_model.{key}::diff::0", shape


USER_LORA_RANK = 8


def user_lora() -> Shapes:
    """What a user would name in a prompt: a small LoRA on every attention projection of the SD1.5 UNet."""
    for key, shape in unet(UNETS["sd15"]):
        if ".attn" in key and key.endswith("weight"):
            name = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"
            yield f"{name}.lora_down.weight", (USER_LORA_RANK, shape[1])
            yield f"{name}.lora_up.weight", (shape[0], USER_LORA_RANK)


# --- numbers ----------------------------------------------------------------------------------------------------

ADDITION = re.compile(r"[._]up\.weight$|::lora::0$|::diff::0$|\.temporal_o\.|\.(zero_convs|middle_block_out)\.")
ADDITION_GAIN = 0.3  # an addition shows in the picture and does not drown it
# What reads a picture is a chain of SiLUs, which halve what is small: nothing of the picture would be left at its end.
READER = re.compile(r"kwargs_encoder\.|\.input_hint_block\.")
READER_GAIN = 2.0
BIAS_SPREAD = 0.02


def random_vector(key: str, shape: Shape, rng: torch.Generator) -> Tensor:
    """One for the weights of norms, little around zero for biases and for what is added to either.

    The last bias of a text encoder is around 0.1: Forge's emphasis divides by the mean of the encoder's output.
    """
    if key.endswith("weight"):
        return torch.ones(shape)
    return torch.randn(shape, generator=rng) * BIAS_SPREAD + (0.1 if "final" in key else 0.0)


def random_tensor(key: str, shape: Shape, rng: torch.Generator) -> Tensor:
    """Noise that keeps the size of what passes through it."""
    if len(shape) < 2:
        return random_vector(key, shape, rng)
    fan_in = 1 if "embedding" in key else math.prod(shape[1:])
    gain = ADDITION_GAIN if ADDITION.search(key) else READER_GAIN if READER.search(key) else 1.0
    return torch.randn(shape, generator=rng) * (gain / math.sqrt(fan_in))


def fill(shapes: Shapes, rng: torch.Generator) -> Tensors:
    return {key: random_tensor(key, shape, rng).half() for key, shape in shapes}


def checkpoint_tensors(family: str) -> Callable[[torch.Generator, Path], Tensors]:
    return lambda rng, models: fill(checkpoint(family), rng)


def inpaint_tensors(rng: torch.Generator, models: Path) -> Tensors:
    """The SD1.5 checkpoint with a first convolution that also reads a mask and the masked picture's latent."""
    key = "model.diffusion_model.input_blocks.0.0.weight"
    with safe_open(write("synthetic_sd15", models), "pt") as source:
        tensors = {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118
    extra = random_tensor(key, (BASE_WIDTH, 5, 3, 3), rng).half()
    return {**tensors, key: torch.cat([tensors[key], extra], dim=1)}


def decoder_tensors(rng: torch.Generator, models: Path) -> Tensors:
    """Answers around 0.5 in all four channels, with a spread that shows."""
    tensors = fill(transparent_decoder(), rng)
    tensors["conv_out.weight"] *= 0.3
    tensors["conv_out.bias"] += 0.5
    return tensors


def encoder_tensors(rng: torch.Generator, models: Path) -> Tensors:
    """Small answers, as the released one gives: the offset is 300 times what the network returns."""
    tensors = fill(conv_chain("blocks", ENCODER_WIDTHS), rng)
    tensors["blocks.16.weight"] *= 0.1
    return tensors


CONDITION_GAIN = 20.0  # condition latents are much smaller than the noise beside them, and show none the less


def condition_tensors(transformers: bool, conditions: int) -> Callable[[torch.Generator, Path], Tensors]:
    """Additions for a first convolution that also reads condition latents, with more weight on those."""

    def tensors(rng: torch.Generator, models: Path) -> Tensors:
        filled = fill(sdxl_diff(transformers, conditions), rng)
        filled["diffusion_model.input_blocks.0.0.weight::diff::0"][:, 4:] *= CONDITION_GAIN
        return filled

    return tensors


def plain_tensors(shapes: Callable[[], Shapes]) -> Callable[[torch.Generator, Path], Tensors]:
    return lambda rng, models: fill(shapes(), rng)


# --- files ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    folder: str
    tensors: Callable[[torch.Generator, Path], Tensors]


CHECKPOINTS, LAYERS, LORAS, CONTROLNETS = "Stable-diffusion", "layer_model", "Lora", "ControlNet"
FILES = {
    "synthetic_sd15": File(CHECKPOINTS, checkpoint_tensors("sd15")),
    "synthetic_sd15_inpaint": File(CHECKPOINTS, inpaint_tensors),
    "synthetic_sdxl": File(CHECKPOINTS, checkpoint_tensors("sdxl")),
    "synthetic_lora_sd15": File(LORAS, plain_tensors(user_lora)),
    "synthetic_controlnet_sd15": File(CONTROLNETS, plain_tensors(controlnet)),
    "layer_sd15_vae_transparent_decoder": File(LAYERS, decoder_tensors),
    "layer_sd15_vae_transparent_encoder": File(LAYERS, encoder_tensors),
    "layer_sd15_transparent_attn": File(LAYERS, plain_tensors(lambda: sd15_attention_sharing(1, control=False))),
    "layer_sd15_joint": File(LAYERS, plain_tensors(lambda: sd15_attention_sharing(3, control=False))),
    "layer_sd15_fg2bg": File(LAYERS, plain_tensors(lambda: sd15_attention_sharing(2, control=True))),
    "layer_sd15_bg2fg": File(LAYERS, plain_tensors(lambda: sd15_attention_sharing(2, control=True))),
    "vae_transparent_decoder": File(LAYERS, decoder_tensors),
    "vae_transparent_encoder": File(LAYERS, encoder_tensors),
    "layer_xl_transparent_attn": File(LAYERS, plain_tensors(sdxl_lora)),
    "layer_xl_transparent_conv": File(LAYERS, plain_tensors(lambda: sdxl_diff(transformers=True))),
    "layer_xl_fg2ble": File(LAYERS, condition_tensors(transformers=False, conditions=1)),
    "layer_xl_bg2ble": File(LAYERS, condition_tensors(transformers=False, conditions=1)),
    "layer_xl_fgble2bg": File(LAYERS, condition_tensors(transformers=False, conditions=2)),
    "layer_xl_bgble2fg": File(LAYERS, condition_tensors(transformers=True, conditions=2)),
}


def path_of(name: str, models: Path) -> Path:
    return models / FILES[name].folder / f"{name}.safetensors"


def write(name: str, models: Path) -> Path:
    """Make the file unless it is there already; it appears under its name only when it is whole."""
    target = path_of(name, models)
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    rng = torch.Generator().manual_seed(zlib.crc32(f"{GENERATOR_VERSION} {name}".encode()))
    partial = target.with_suffix(f".{os.getpid()}.partial")
    try:
        save_file(FILES[name].tensors(rng, models), partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="?", type=Path, help="the web UI's models folder")
    parser.add_argument("names", nargs="*", help="files to make (default: all)")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    arguments = parser.parse_args()
    if arguments.list or arguments.models is None:
        print("\n".join(FILES))
        return
    unknown = sorted(set(arguments.names) - set(FILES))
    if unknown:
        parser.error(f"unknown file {', '.join(unknown)}; --list prints the names")
    for name in arguments.names or FILES:
        path = write(name, arguments.models)
        print(f"{path} {path.stat().st_size / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
