"""The transparent networks for the routes, one after the other with the web UI's jobs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lib_layerdiffuse.engine.engine import ENCODE_CHANNELS
from lib_layerdiffuse.engine.loaded import Net
from lib_layerdiffuse.methods import Family
from lib_layerdiffuse.nets.decoder import TransparentDecoder
from lib_layerdiffuse.nets.encoder import TransparentEncoder
from lib_layerdiffuse.tensors import Latent, Rgb, Rgba
from lib_layerdiffuse.vae import DECODE_CHANNELS, TransparentVAE
from lib_layerdiffuse.webui.extension import Extension


class Networks:
    """Both raise LayerDiffuseError."""

    def __init__(self, extension: Extension) -> None:
        self._extension = extension

    def decode(self, family: Family, rgb: Rgb, latent: Latent, passes: int, go_on: Callable[[], None]) -> Rgba:
        """`TransparentVAE.decode`, in the queue.

        go_on: is called before it and after each pass; raises where nobody waits for the answer any more.
        """

        def on_pass(done: int, passes: int) -> bool:
            go_on()
            return True

        return self._in_turn(
            TransparentDecoder,
            family.decoder,
            DECODE_CHANNELS,
            rgb,
            lambda decoder: TransparentVAE(decoder).decode(rgb, latent, passes, on_pass),
            go_on,
        )

    def encode(self, family: Family, rgba: Rgba, go_on: Callable[[], None]) -> Latent:
        """`TransparentVAE.encode`, as `decode`."""
        return self._in_turn(
            TransparentEncoder,
            family.encoder,
            ENCODE_CHANNELS,
            rgba,
            lambda encoder: TransparentVAE(nn.Identity(), encoder).encode(rgba),  # which decodes nothing
            go_on,
        )

    def _in_turn(
        self,
        kind: type[Net],
        file: str,
        channels: int,
        picture: Tensor,
        work: Callable[[nn.Module], Tensor],
        go_on: Callable[[], None],
    ) -> Tensor:
        self._extension.downloads.obtain(
            file, lambda text, fraction: go_on()
        )  # before the queue: jobs need not wait for it
        engine = self._extension.engine
        with self._extension.host.queue():
            go_on()
            net = engine.weights.net(kind, file)
            with torch.inference_mode():  # as jobs run
                return engine.with_room(net, channels, picture, lambda: work(net))
