"""What outlives a job, and opens one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from lib_layerdiffuse.checkpoints import family_of
from lib_layerdiffuse.downloads import Downloads
from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.hosts.base import Host, check_mask, whole, whole_cells
from lib_layerdiffuse.images import fit, flattened
from lib_layerdiffuse.injection import Injection, load_injection
from lib_layerdiffuse.methods import DECODERS, ENCODERS, Family, Method, needed_files
from lib_layerdiffuse.nets.decoder import TransparentDecoder
from lib_layerdiffuse.nets.encoder import TransparentEncoder
from lib_layerdiffuse.notes import notes
from lib_layerdiffuse.request import Request
from lib_layerdiffuse.session import ENCODE_CHANNELS, Session, check_family, with_room
from lib_layerdiffuse.tensors import Latent, Rgb, Rgba
from lib_layerdiffuse.vae import DECODE_CHANNELS, TransparentVAE
from lib_layerdiffuse.weights import REPLACE, fingerprint, read_tensors

Net = TypeVar("Net", TransparentDecoder, TransparentEncoder)

SWITCH_OFF = "switch LayerDiffuse off"


class Workshop:
    """What outlives a job: the weights that the last job used, and a decoder and an encoder for each family."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.downloads = Downloads(host.weight_folders)
        self._injections: dict[str, Injection] = {}
        self._nets: dict[str, nn.Module] = {}

    def open(self, p: Any, request: Request) -> Session:
        """Check and prepare everything that can fail before sampling. Raises LayerDiffuseError."""
        method = request.method
        self._check(p, method)
        inits = self._inits(p)
        self.host.flatten_mask(p)
        self.host.flatten_upscaled(p, flattened)
        if request.chain is None:
            self._announce(p, request)
        if method.chain:
            request = request.for_step(method.chain[0], request.images)
        if request.method.frames > 1:
            self.host.fit_batch(p, request.method.frames)
        injection = self._injection(request.method) if request.injects else None
        decodes = request.method.makes_foreground and not self.host.script_run(p).is_opaque
        vae = self._vae(method.family, bool(inits)) if decodes else None
        return Session(self.host, request, injection, vae, inits)

    def chosen_family(self, checkpoint: str | None = None) -> Family | None:
        """The kind of the checkpoint with that title, or of the chosen one, where its file tells."""
        file = self.host.checkpoint_file(checkpoint)
        return family_of(file) if file else None

    def _inits(self, p: Any) -> list[Image.Image]:
        """The pictures that img2img starts from, as RGBA; the host gets what is opaque of them."""
        inits = [whole(image) for image in distinct(self.host.init_images(p))]
        if not inits:
            return []
        mode = self.host.init_mode(p)
        if mode is None:  # enlarged as latents
            inits = [whole_cells(image) for image in inits]
        elif not self.host.only_masked(p):
            inits = [fit(image, mode, *self.host.size(p)) for image in inits]
        self.host.set_init_images(p, [flattened(image) for image in inits])
        return inits

    def _check(self, p: Any, method: Method) -> None:
        check_family(method, self.host.base_model(p))
        if method.frames > 1 and self.host.upscales(p):
            raise LayerDiffuseError(
                f"{method.full_title} makes {method.frames} pictures that belong together, but the upscale button has "
                f"only one. Tick Hires. fix and generate all of them, or {SWITCH_OFF}."
            )
        check_mask(self.host, p)
        count = len(distinct(self.host.init_images(p)))
        if method.frames > 1 and count > 1:
            raise LayerDiffuseError(
                f"{method.full_title} makes {method.frames} pictures from one init image, but {count} came. "
                "Send one at a time."
            )
        if method.chain and count:
            raise LayerDiffuseError(
                f"{method.full_title} starts from nothing. Use it in txt2img, or choose a method of one step here."
            )

    def _announce(self, p: Any, request: Request) -> None:
        """Before a job, and before the first of a chain: have all the files, and say what is to be known."""
        for file in needed_files(request.method, request.injects, bool(self.host.init_images(p))):
            self._path(file)
        for note in notes(request, *self.host.size(p), self.host.sampler(p)):
            self.host.note(p, note)
        if refiner := self.host.refiner(p):
            self.host.note(p, f"LayerDiffuse ends where the refiner takes over: {refiner}.")
        self.host.expect(p, len(request.method.steps))

    def decode(self, family: Family, rgb: Rgb, latent: Latent, passes: int, go_on: Callable[[], None]) -> Rgba:
        """`TransparentVAE.decode`, one after the other with the host's jobs. Raises LayerDiffuseError.

        go_on: is called before it and after each pass; raises where nobody waits for the answer any more.
        """

        def on_pass(done: int, passes: int) -> bool:
            go_on()
            return True

        return self._in_turn(
            TransparentDecoder,
            DECODERS[family],
            DECODE_CHANNELS,
            rgb,
            lambda decoder: TransparentVAE(decoder).decode(rgb, latent, passes, on_pass),
            go_on,
        )

    def encode(self, family: Family, rgba: Rgba, go_on: Callable[[], None]) -> Latent:
        """`TransparentVAE.encode`, as `decode`."""
        return self._in_turn(
            TransparentEncoder,
            ENCODERS[family],
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
        self.downloads.obtain(file, lambda text, fraction: go_on())  # before the queue: jobs need not wait for it
        with self.host.queue():
            go_on()
            net = self._net(kind, file)
            with torch.inference_mode():  # as jobs run
                return with_room(self.host, net, channels, picture, lambda: work(net))

    def _injection(self, method: Method) -> Injection:
        """Only the last one is kept: each is up to 3.6 GB."""
        path = self._path(method.weights)
        identity = fingerprint(path)
        if identity not in self._injections:
            self._forget_injections()
            self._injections[identity] = load_injection(method, path)
        return self._injections[identity]

    def _forget_injections(self) -> None:
        while self._injections:
            self.host.forget(self._injections.popitem()[1])
        self.host.return_memory()

    def _vae(self, family: Family, encodes: bool) -> TransparentVAE:
        decoder = self._net(TransparentDecoder, DECODERS[family])
        return TransparentVAE(decoder, self._net(TransparentEncoder, ENCODERS[family]) if encodes else None)

    def _net(self, kind: type[Net], file: str) -> nn.Module:
        path = self._path(file)
        identity = fingerprint(path)
        if identity not in self._nets:
            self._nets[identity] = load(kind, path)
        return self._nets[identity]

    def _path(self, file: str) -> Path:
        with self.host.progress() as show:

            def report(text: str, fraction: float) -> None:
                if self.host.interrupted():
                    raise LayerDiffuseError(f"{text}, interrupted. The next job goes on from there.")
                show(text, fraction)

            return self.downloads.obtain(file, report)


def distinct(images: Sequence[Image.Image]) -> Sequence[Image.Image]:
    """The images, or the one of them where all are the same: a folder's images come repeated to the batch."""
    return images[:1] if len({id(image) for image in images}) == 1 else images


WORDS: Mapping[type, str] = {TransparentDecoder: "transparent decoder", TransparentEncoder: "transparent encoder"}


def load(net: type[Net], path: Path) -> Net:
    """Raises LayerDiffuseError, naming the file, where it is not whole or not such a network."""
    tensors = read_tensors(path)
    try:
        return net.from_state_dict(tensors)
    except LayerDiffuseError as error:
        raise LayerDiffuseError(f"{path} is not a {WORDS[net]}: {error}. {REPLACE}") from error
