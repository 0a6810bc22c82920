"""Names for the kinds of tensor that travel through the program: shape and range, said once."""

from typing import TypeAlias

from torch import Tensor

Rgb: TypeAlias = Tensor  # [B, 3, H, W], 0..1
Rgba: TypeAlias = Tensor  # [B, 4, H, W], 0..1, order R G B A, straight (not premultiplied)
Argb: TypeAlias = Tensor  # [B, 4, H, W], order A R G B, the channel order of the released networks
Latent: TypeAlias = (
    Tensor  # [B, C, H/8, W/8], VAE space (unscaled); a sampler's latent is this times the scaling factor
)
Tokens: TypeAlias = Tensor  # [B, H*W, C], hidden states inside an attention block
StateDict: TypeAlias = dict[str, Tensor]
