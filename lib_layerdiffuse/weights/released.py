"""The catalogue: which weight files were released, and where they come from."""

import os
from dataclasses import dataclass

REPOSITORY = "LayerDiffusion/layerdiffusion-v1"
REVISION = "e337e9d7a0f2a6fee6c3580374327380f88d065b"  # of the repository, which the hashes below belong to
ENDPOINT = "https://huggingface.co"  # unless HF_ENDPOINT names a mirror
MB = 1_000_000


@dataclass(frozen=True)
class Asset:
    """One released file: its size in bytes, and its SHA-256 where that is known."""

    file: str
    size: int
    sha256: str = ""

    @property
    def megabytes(self) -> int:
        return round(self.size / MB)


# Name, size, SHA-256. The hashes are from one source, the sizes from lists of the repository, or counted from the
# layouts, which give the listed ones exactly.
_RELEASED = """
layer_sd15_transparent_attn         350266608 cc9ee87452bf1ccdd419035bf9618f6bdcaac1a2d3e23694d62e5a9c721da295
layer_sd15_joint                    554404208 2cc81c33c1a786bdc376c6d1bfb43dbdffda2f610f7c6b4ebd776505a29712bd
layer_sd15_fg2bg                    562982312 5bade856ec3e55d6ceb0e35bbc97cea7fa4953f7776c8032f2fe52ba740ed580
layer_sd15_bg2fg                    562982312 8367f976da1cc4275e513c7fb40f977ca312e79e720d7db7ae94978a9359fb62
layer_xl_transparent_attn           743352688 b7919c5b4837fb64f24c97a7abdf1a9c6e8d60de080a5dae089dde098266df95
layer_xl_transparent_conv          3619745776 5ee958d80dcd515fa7ac915274c536fadd3db5d919adeb5ff45107b6169aacc7
layer_xl_fg2ble                     701981624 50a29851ad56308f14d6c9ed375be17df6921efeca240b31f567f6b8c76d1e70
layer_xl_bg2ble                     701981624 2901d1353cc4ca763c8bedc48453b36e88680605f417c7f7ec730a7c36845d7c
layer_xl_fgble2bg                   702004664 179a61fdcdb149af1897b2840f24ba09466ab6265b2c792b0e99df557f0439be
layer_xl_bgble2fg                  3619791856 1688f0c17447f74662686fadd431f24d26a1ba8ffea322c6f56c8b5ed581b78d
vae_transparent_decoder             208266320 59dc8feefe40d26b6cb7186aed7af70c60d94ac4f9db8ebe7f121a01ba27a2fc
layer_sd15_vae_transparent_decoder  208266320 6df4712dfbb3783231b22f869a5da5cbfea782ebb05f782bd9e8744bfb0cdf03
vae_transparent_encoder               2365008
layer_sd15_vae_transparent_encoder    2365008
"""


def _asset(name: str, size: str, sha256: str = "") -> Asset:
    return Asset(f"{name}.safetensors", int(size), sha256)


ASSETS = {asset.file: asset for asset in (_asset(*row.split()) for row in _RELEASED.strip().splitlines())}


def endpoint() -> tuple[str, str]:
    """Where the files come from, and `user:password` for it: what stands in front of the last @, shown to nobody."""
    text = (os.environ.get("HF_ENDPOINT") or ENDPOINT).strip().rstrip("/")
    scheme, mark, rest = text.partition("://")
    credentials, _, place = (rest if mark else text).rpartition("@")
    return (scheme + mark if mark else "") + place, credentials


def address_of(file: str, revision: str = REVISION) -> str:
    """Where a released file can be downloaded."""
    return f"{endpoint()[0]}/{REPOSITORY}/resolve/{revision}/{file}"
