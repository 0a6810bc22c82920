"""Weights of a UNet merged with patches and put back: by a loader, or by loading a clone of the patcher."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol
from uuid import UUID, uuid5
from weakref import ref


class Merging(Protocol):
    """Of one patcher, a clone that this job owns."""

    def add(self, name: str, patches: Mapping[str, Any], strength: float) -> Collection[str]:
        """Patches to merge; name: changes with what they hold. Answers with the keys that were taken."""

    def is_merged(self) -> bool:
        """Whether they are in the UNet already, from the job before."""

    def begin(self, on: bool) -> None:
        """What the program will load first: with the patches, or without."""

    def turn(self, on: bool) -> None:
        """The same in the middle of sampling."""

    def undo(self) -> None:
        """After a merge that broke off: put back all weights."""

    def version(self) -> object:
        """Changes with the weights that are in the UNet."""


def merging_of(unet: Any, load: Callable[[list[Any]], None]) -> Merging:
    """load: the program's `load_models_gpu`."""
    if hasattr(unet, "lora_loader") and hasattr(unet, "lora_patches"):
        return LoaderMerging(unet)
    return CloneMerging(unet, load)


class LoaderMerging:
    """Forge and ersatz: the patcher's loader merges what is in its `lora_patches`."""

    def __init__(self, unet: Any) -> None:
        # Weakly, because its options hold this: together they would keep gigabytes until the next garbage collection.
        self._unet = ref(unet)
        self._plain = self._merged = dict(unet.lora_patches)

    @property
    def unet(self) -> Any:
        return self._unet()

    def add(self, name: str, patches: Mapping[str, Any], strength: float) -> Collection[str]:
        taken = self.unet.add_patches(filename=name, patches=patches, strength_patch=strength)
        self._merged = self.unet.lora_patches
        return taken

    def is_merged(self) -> bool:
        return self.version() == str(list(self._merged))  # as the loader compares before it merges

    def begin(self, on: bool) -> None:
        self.unet.lora_patches = self._merged if on else self._plain

    def turn(self, on: bool) -> None:
        self.begin(on)
        self._refresh()

    def undo(self) -> None:
        # A merge that broke off is neither undone nor noticed by the host (backend/patcher/lora.py:354).
        self.begin(False)
        self._refresh(force_refresh=True)

    def version(self) -> object:
        return self.unet.lora_loader.loaded_hash

    def _refresh(self, **more: Any) -> None:
        unet = self.unet
        unet.lora_loader.refresh(unet.lora_patches, offload_device=unet.offload_device, **more)


class CloneMerging:
    """Neo, reForge, Classic, ComfyUI: loading a patcher merges its patches, and takes out those of its clones."""

    def __init__(self, unet: Any, load: Callable[[list[Any]], None]) -> None:
        self._unet = ref(unet)
        self._load = load
        self._plain = self._merged = unet.clone()  # held here: memory managements hold patchers weakly
        self._on = False

    @property
    def unet(self) -> Any:
        return self._unet()

    def add(self, name: str, patches: Mapping[str, Any], strength: float) -> Collection[str]:
        self._merged = self._plain.clone()
        taken = self._merged.add_patches(patches, strength)
        if uuid := getattr(self._plain, "patches_uuid", None):
            # The same as in the job before, where all is the same: else the program would merge anew each time.
            self._merged.patches_uuid = uuid5(UUID(str(uuid)), f"{name} {strength}")
        return taken

    def is_merged(self) -> bool:
        uuid = getattr(self._merged, "patches_uuid", None)
        return uuid is not None and uuid == self._merged.model.current_weight_patches_uuid

    def begin(self, on: bool) -> None:
        chosen, unet = self._chosen(on), self.unet
        unet.patches = {key: list(patches) for key, patches in chosen.patches.items()}
        if hasattr(chosen, "patches_uuid"):
            unet.patches_uuid = chosen.patches_uuid
        self._on = on

    def turn(self, on: bool) -> None:
        self._load([self._chosen(on)])
        self._on = on

    def undo(self) -> None:
        self.turn(False)

    def version(self) -> object:
        return getattr(self._plain.model, "current_weight_patches_uuid", None), self._on

    def _chosen(self, on: bool) -> Any:
        return self._merged if on else self._plain
