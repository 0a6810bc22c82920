"""A transparent picture through VAE and transparent networks and back, without Forge and without the extension.

The VAE is diffusers'; networks put together from diffusers' blocks, and colours padded with OpenCV, are those of
tests/reference.py. Runs with the web UI's own Python, which has all of these:

    python tests/forge/reference_roundtrip.py CHECKPOINT ENCODER DECODER PICTURE RESULT
"""

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from PIL import Image
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.reference import RELEASED_WIDTHS, ReferenceDecoder, cv2_pad_colors, reference_encoder

ENCODER_WIDTHS = (4, 32, 32, 64, 64, 128, 128, 256, 256, 4)
OFFSET_SCALE = 300


def tensor(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(picture, np.float32)).permute(2, 0, 1)[None]


def vae_of(checkpoint: str) -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    tensors = {key: value.float() for key, value in load_file(checkpoint).items() if key.startswith("first_stage")}
    vae.load_state_dict(convert_ldm_vae_checkpoint(tensors, vae.config))
    return vae


def with_weights(net: torch.nn.Module, file: str, prefix: str = "") -> torch.nn.Module:
    net.load_state_dict({key[len(prefix) :]: value.float() for key, value in load_file(file).items()})
    return net


@torch.no_grad()
def main(checkpoint: str, encoder_file: str, decoder_file: str, picture: str, result: str) -> None:
    vae = vae_of(checkpoint)
    encoder = with_weights(reference_encoder(ENCODER_WIDTHS), encoder_file, "blocks.")
    decoder = with_weights(ReferenceDecoder(RELEASED_WIDTHS), decoder_file)
    rgba = np.asarray(Image.open(picture), np.float32) / 255
    alpha = rgba[..., 3:]
    posterior = vae.encode(2 * tensor(rgba[..., :3] * alpha + 0.5 * (1 - alpha)) - 1).latent_dist
    offset = encoder(tensor(np.concatenate([alpha, cv2_pad_colors(rgba).clip(0, 1)], axis=2))) * OFFSET_SCALE
    latent = posterior.mean + posterior.std * offset
    pixels = (vae.decode(latent).sample / 2 + 0.5).clamp(0, 1)
    answer = decoder(pixels, latent).clamp(0, 1)[0].permute(1, 2, 0).numpy()
    Image.fromarray((255 * answer[..., [1, 2, 3, 0]]).round().astype(np.uint8)).save(result)


if __name__ == "__main__":
    main(*sys.argv[1:])
