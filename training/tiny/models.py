"""The parts of the tiny world's two models, untrained: a VAE that both have, and for each a UNet that reads captions.

Blocks and their order are those of SD1.5 and SDXL; channels, heads, layers of text and transformers are fewer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lib_layerdiffuse.methods import Family
from training.scenes import COLOURS, COLUMNS, MATERIALS, ROWS, SHAPES, TEXTURES

SIZE = 128  # pixels; the UNets see latents of 16×16
WORDS = [
    *COLOURS,
    *COLUMNS,
    *ROWS,
    *MATERIALS,
    *SHAPES,
    *TEXTURES,
    *["a", "at", "the", "in", "over", "and", "background", "plain", "grey"],
]
TOKENS = 40  # of a prompt, at most
START, END = "<|startoftext|>", "<|endoftext|>"
TEXT_WIDTH = 80
WORD_DEVIATION = 0.5  # of the numbers that a word is at first
LOG_VARIANCE = -8.0  # of latents, at first
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def make_vae() -> AutoencoderKL:
    """Its weights are drawn such that a picture comes through all convolutions as large as it was, and its latent with
    little noise: with torch's own, what it shows stays grey for thousands of steps."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 64),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=SIZE,
    )
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d) and not name.endswith(("conv1", "conv2")):  # residuals may be small
            module.weight.data *= math.sqrt(3)  # which makes their variance 1 / inputs
    vae.quant_conv.bias.data[vae.config.latent_channels :] = LOG_VARIANCE
    return vae


def make_tokenizer() -> CLIPTokenizer:
    """One that knows every word of the captions, and spells all others."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    trainer = trainers.BpeTrainer(
        initial_alphabet=letters, special_tokens=[START, END], end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(spelled(WORDS, letters), trainer)
    with TemporaryDirectory() as folder:
        files = {Path(file).suffix: file for file in tokenizer.model.save(folder)}
        return CLIPTokenizer(
            files[".json"],
            files[".txt"],
            unk_token=END,
            bos_token=START,
            eos_token=END,
            pad_token=END,
            model_max_length=TOKENS,
        )


def spelled(words: Iterable[str], letters: Iterable[str]) -> list[str]:
    """A text to learn the words from, and that every letter may end one."""
    return [*(f"{word} " * 10 for word in words), *letters]


def text_config(tokenizer: CLIPTokenizer, width: int = TEXT_WIDTH) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_text_encoder(kind: type[CLIPTextModel], config: CLIPTextConfig) -> CLIPTextModel:
    """Words differ from the start by as much as the layers add to them: else those that take long to learn, such as
    places, are drowned by the others before."""
    encoder = kind(config)
    encoder.get_input_embeddings().weight.data *= WORD_DEVIATION / config.initializer_range
    return encoder


def make_sd15(vae: AutoencoderKL) -> StableDiffusionPipeline:
    tokenizer = make_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=SIZE // 8,
        block_out_channels=(32, 48, 48, 48),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,  # which diffusers takes for the number of heads
        norm_num_groups=8,
    )
    return StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        tokenizer=tokenizer,
        text_encoder=make_text_encoder(CLIPTextModel, text_config(tokenizer)),
        scheduler=EulerDiscreteScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_sdxl(vae: AutoencoderKL) -> StableDiffusionXLPipeline:
    tokenizer = make_tokenizer()
    config = text_config(tokenizer, TEXT_WIDTH // 2)
    time_width = 8
    unet = UNet2DConditionModel(
        sample_size=SIZE // 8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 48, 64),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 3, 4),
        cross_attention_dim=TEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_width,
        projection_class_embeddings_input_dim=6 * time_width + TEXT_WIDTH // 2,
        norm_num_groups=8,
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        unet=unet,
        tokenizer=tokenizer,
        tokenizer_2=make_tokenizer(),
        text_encoder=make_text_encoder(CLIPTextModel, config),
        text_encoder_2=make_text_encoder(CLIPTextModelWithProjection, config),
        scheduler=EulerDiscreteScheduler(**SCHEDULE),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


MAKERS: dict[Family, Any] = {Family.SD15: make_sd15, Family.SDXL: make_sdxl}
