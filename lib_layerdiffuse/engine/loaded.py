"""Weight files read for use, kept from job to job."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from torch import nn

from lib_layerdiffuse.engine.memory import return_freed_memory
from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.injection.content import Injection, load_injection
from lib_layerdiffuse.methods import Family, Method
from lib_layerdiffuse.nets.decoder import TransparentDecoder
from lib_layerdiffuse.nets.encoder import TransparentEncoder
from lib_layerdiffuse.vae import TransparentVAE
from lib_layerdiffuse.weights.files import REPLACE, fingerprint, read_tensors

Net = TypeVar("Net", TransparentDecoder, TransparentEncoder)

WORDS: Mapping[type, str] = {TransparentDecoder: "transparent decoder", TransparentEncoder: "transparent encoder"}


class LoadedWeights:
    """The injection of the last job, and a decoder and an encoder for each family; each by its file's fingerprint."""

    def __init__(self, obtain: Callable[[str], Path], forget: Callable[[Injection], None]) -> None:
        """obtain: the path of a weight file, by its name. forget: is told of an injection that is used no more."""
        self.obtain = obtain
        self._forget = forget
        self._injections: dict[str, Injection] = {}
        self._nets: dict[str, nn.Module] = {}

    def injection(self, method: Method) -> Injection:
        """Only the last one is kept: each is up to 3.6 GB. Raises LayerDiffuseError, as all of these do."""
        path = self.obtain(method.weights)
        identity = fingerprint(path)
        if identity not in self._injections:
            self._drop_injections()
            self._injections[identity] = load_injection(method, path)
        return self._injections[identity]

    def _drop_injections(self) -> None:
        while self._injections:
            self._forget(self._injections.popitem()[1])
        return_freed_memory()

    def vae(self, family: Family, encodes: bool) -> TransparentVAE:
        """The decoder of that family, with its encoder where something is encoded."""
        decoder = self.net(TransparentDecoder, family.decoder)
        return TransparentVAE(decoder, self.net(TransparentEncoder, family.encoder) if encodes else None)

    def net(self, kind: type[Net], file: str) -> nn.Module:
        path = self.obtain(file)
        identity = fingerprint(path)
        if identity not in self._nets:
            self._nets[identity] = load_net(kind, path)
        return self._nets[identity]


def load_net(net: type[Net], path: Path) -> Net:
    """Raises LayerDiffuseError, naming the file, where it is not whole or not such a network."""
    tensors = read_tensors(path)
    try:
        return net.from_state_dict(tensors)
    except LayerDiffuseError as error:
        raise LayerDiffuseError(f"{path} is not a {WORDS[net]}: {error}. {REPLACE}") from error
