"""What the transparent pair costs those who do not use it, and how well it brings pictures back.

    python -m training.harm --vae MODEL --data SOURCE --encoder FILE [--decoder FILE] [--count 64] [--size 512]

prints the means over the first pictures of a source (training/data.py) as JSON:

- harm: by how many dB the offset worsens what the frozen VAE shows, PSNR(x, D(z)) - PSNR(x, D(z + offset)), x being the
  picture over grey (arXiv 2402.17113, section 3.1: the offset should leave the latents what they are to the model);
- with a decoder, of encoding and decoding each picture: the metrics of lib_layerdiffuse/cli/metrics.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import nn

from lib_layerdiffuse.cli.metrics import compare, psnr
from lib_layerdiffuse.images.rgba import GREY, compose
from lib_layerdiffuse.nets.decoder import TransparentDecoder
from lib_layerdiffuse.nets.encoder import TransparentEncoder
from lib_layerdiffuse.tensors import Rgba
from lib_layerdiffuse.vae import TransparentVAE
from training.data import open_source
from training.transparent_vae import load_vae, there_and_back


@torch.no_grad()
def measure(vae: AutoencoderKL, pair: TransparentVAE, rgba: Rgba, decodes: bool, passes: int = 8) -> dict[str, float]:
    """Of one picture, [1, 4, H, W]."""
    grey = compose(rgba, GREY)
    plain, _ = there_and_back(vae, grey)
    seen, latent = there_and_back(vae, grey, pair.encode(rgba))
    found = {"psnr without offset": psnr(grey, plain.clip(0, 1)), "psnr with offset": psnr(grey, seen.clip(0, 1))}
    found["harm"] = found["psnr without offset"] - found["psnr with offset"]
    return found | (compare(rgba, pair.decode(seen, latent, passes)) if decodes else {})


def load_pair(encoder: Path, decoder: Path | None, device: str) -> TransparentVAE:
    def floats(path: Path) -> dict[str, torch.Tensor]:
        return {key: value.float() for key, value in load_file(path, device).items()}

    decodes = TransparentDecoder.from_state_dict(floats(decoder)) if decoder else nn.Identity()
    return TransparentVAE(decodes, TransparentEncoder.from_state_dict(floats(encoder)))


def measure_all(arguments: argparse.Namespace) -> Iterator[dict[str, float]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae, pair = load_vae(arguments.vae).to(device), load_pair(arguments.encoder, arguments.decoder, device)
    source = open_source(arguments.data, arguments.size)
    for _, sample in zip(range(arguments.count), source):
        yield measure(vae, pair, sample["rgba"][None].to(device), arguments.decoder is not None, arguments.passes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--decoder", type=Path)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--passes", type=int, default=8)
    of_each = list(measure_all(parser.parse_args()))
    print(
        json.dumps(
            {key: fmean(one[key] for one in of_each) for key in of_each[0]} | {"pictures": len(of_each)}, indent=1
        )
    )


if __name__ == "__main__":
    main()
