"""What all trainers share: options, precision, several GPUs, averages, states to go on from, and TensorBoard."""

from __future__ import annotations

import argparse
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

LEARNT = "learnt.safetensors"  # in a state's folder: the weights that change

Batch = Any  # what the dataset's samples collate to


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of every trainer; each is an option of its command line too."""

    data: str
    output: str
    size: int = 512
    batch: int = 4
    steps: int = 100_000
    rate: float = 1e-4
    schedule: str = "constant"
    warmup: int = 0
    precision: str = "no"
    accumulate: int = 1
    checkpointing: bool = False
    ema: float = 0.999
    save_every: int = 1_000
    workers: int = 2
    keep: int = 0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class PictureSettings(Settings):
    """The options of trainers that work on pixels."""

    crop: int = 0


HELP = {
    "data": "a folder, shards or scenes:SEED; see training/data.py",
    "output": "a folder; the weights, states and logs go there",
    "size": "of the pictures, in pixels; a multiple of 64",
    "crop": "learn from random parts of so many pixels a side, for more steps in the same time; 0: whole pictures",
    "schedule": "of the learning rate: constant, linear or cosine",
    "warmup": "steps over which the learning rate rises",
    "precision": "no, fp16 or bf16",
    "accumulate": "batches to a step",
    "checkpointing": "less memory for more time",
    "ema": "how much of the averaged weights stays in each step",
    "save_every": "steps between two states to go on from",
    "keep": "prepare so many samples once, in memory, and learn from these; 0: prepare every sample when it comes",
}

S = TypeVar("S", bound=Settings)


def parse(kind: type[S], about: str | None, more: Mapping[str, str], arguments: Sequence[str] | None = None) -> S:
    """Settings of that kind from a command line. about: what the program does; more: what its own options mean."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds, explained = get_type_hints(kind), {**HELP, **more}
    for field in fields(kind):
        option = {"help": explained.get(field.name)}
        if field.default is MISSING:
            option |= {"required": True}
        elif kinds[field.name] is bool:
            option |= {"action": "store_true"}
        elif isinstance(field.default, tuple):
            option |= {"type": int, "nargs": "+", "default": field.default}
        else:
            option |= {"type": kinds[field.name], "default": field.default}
        parser.add_argument(f"--{field.name.replace('_', '-')}", **option)
    return kind(**vars(parser.parse_args(arguments)))


def cropped(pictures: Tensor, side: int) -> Tensor:
    """A random part of the pictures, [B, C, H, W] -> [B, C, side, side]; all of them for 0."""
    if not side:
        return pictures
    top, left = (int(torch.randint(length - side + 1, ())) for length in pictures.shape[2:])
    return pictures[:, :, top : top + side, left : left + side]


class Trainer(ABC):
    """A network whose weights that require a gradient learn, with their averages."""

    def __init__(self, settings: Settings, accelerator: Accelerator, net: nn.Module) -> None:
        self.settings = settings
        self.accelerator = accelerator
        self.step = 0
        self.net, self.optimizer, self.rate = self.prepared(net)
        self.ema = EMAModel(self.learning(), decay=settings.ema)
        self.ema.to(accelerator.device)
        accelerator.register_for_checkpointing(self.ema, self)

    @abstractmethod
    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """What to descend, and what to show of it."""

    def prepare(self, batch: Batch) -> Batch:
        """What can be done once where samples are kept; what `losses` takes."""
        return batch

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the files that all this is for, from the weights as they are now."""

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """What TensorBoard shows, [3, H, W] in 0..1."""
        return {}

    def prepared(self, net: nn.Module) -> tuple[Any, Any, Any]:
        """A network for this machine or these machines, with its optimizer and its learning rate's schedule."""
        settings, several = self.settings, self.accelerator.num_processes
        optimizer = torch.optim.AdamW([each for each in net.parameters() if each.requires_grad], settings.rate)
        rate = get_scheduler(  # which each of several processes moves
            settings.schedule,
            optimizer,
            num_warmup_steps=settings.warmup * several,
            num_training_steps=settings.steps * several,
        )
        return self.accelerator.prepare(net, optimizer, rate)

    @property
    def plain(self) -> Any:
        """The network itself, without what several GPUs put around it."""
        return self.accelerator.unwrap_model(self.net)

    def learning(self) -> list[nn.Parameter]:
        return [each for each in self.plain.parameters() if each.requires_grad]

    def learn(self, batch: Batch) -> dict[str, float]:
        """One step, or a part of it where gradients accumulate. The losses."""
        total, named = self.losses(batch)
        self.descend(total, self.net, self.optimizer, self.rate)
        if self.accelerator.sync_gradients:
            self.ema.step(self.learning())
            self.step += 1
        return {name: loss.item() for name, loss in named.items()}

    def descend(self, loss: Tensor, net: nn.Module, optimizer: Any, rate: Any) -> None:
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While open, the network has its averaged weights."""
        self.ema.store(self.learning())
        self.ema.copy_to(self.learning())
        try:
            with torch.no_grad():
                yield
        finally:
            self.ema.restore(self.learning())

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def save_halves(tensors: Mapping[str, Tensor], path: Path) -> None:
    """In half precision, as the released files are."""
    save_file({key: value.detach().half().contiguous().cpu() for key, value in tensors.items()}, path)


def save_learnt_only(accelerator: Accelerator) -> None:
    """Keep frozen weights out of the states: those of a base model are gigabytes."""

    def learnt(models: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
        nets = enumerate(map(accelerator.unwrap_model, models))
        named = ((f"{i}.{name}", each) for i, net in nets for name, each in net.named_parameters())
        return {name: each for name, each in named if each.requires_grad}

    def save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        weights.clear()  # what accelerate would have saved
        if accelerator.is_main_process:
            save_file(
                {name: each.detach().contiguous() for name, each in learnt(models).items()}, Path(folder) / LEARNT
            )

    @torch.no_grad()
    def load(models: list[nn.Module], folder: str) -> None:
        found = load_file(Path(folder) / LEARNT)
        for name, each in learnt(models).items():
            each.copy_(found[name])
        models.clear()  # what accelerate would load

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def loader_of(settings: Settings, dataset: Dataset[Any]) -> DataLoader[Any]:
    """In random order; shards have one of their own."""
    has_length = hasattr(dataset, "__len__")
    workers = getattr(dataset, "workers", settings.workers)
    return DataLoader(dataset, settings.batch, shuffle=has_length, num_workers=workers)


class Kept(Dataset[Any]):
    """So many random samples of a dataset, prepared."""

    workers = 0  # of a loader: there is nothing left to do

    def __init__(self, dataset: Dataset[Any], settings: Settings, prepare: Callable[[Batch], Batch]) -> None:
        count = math.ceil(settings.keep / settings.batch)
        found = tqdm(islice(loader_of(settings, dataset), count), "preparing", count)
        self.samples = [sample for batch in found for sample in samples(prepare(batch))]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


def samples(batch: Batch) -> list[Any]:
    """What torch's default_collate made a batch of; tensors on the processor, in memory of their own."""
    if isinstance(batch, Tensor):
        return [row.cpu().clone() for row in batch]
    if isinstance(batch, dict):
        return [dict(zip(batch, row)) for row in zip(*map(samples, batch.values()))]
    return list(batch) if isinstance(batch[0], str) else [list(row) for row in zip(*map(samples, batch))]


def batches(settings: Settings, accelerator: Accelerator, dataset: Dataset[Any]) -> Iterator[Batch]:
    """Without end, in an order of their own in every round."""
    loader = accelerator.prepare(loader_of(settings, dataset))
    while True:
        yield from loader


def train(settings: S, make: Callable[[S, Accelerator], tuple[Trainer, Dataset[Any]]]) -> None:
    """From the latest state in the output folder, where there is one, to the last step; then export the averages."""
    accelerator = Accelerator(
        mixed_precision=settings.precision,
        gradient_accumulation_steps=settings.accumulate,
        log_with="tensorboard",
        project_dir=settings.output,
    )
    set_seed(settings.seed, device_specific=True)
    trainer, dataset = make(settings, accelerator)
    if settings.keep:
        dataset = Kept(dataset, settings, trainer.prepare)
    save_learnt_only(accelerator)
    state = Path(settings.output) / "state"
    if state.exists():
        accelerator.load_state(str(state))
    accelerator.init_trackers("log", {key: str(value) for key, value in asdict(settings).items()})
    for batch in batches(settings, accelerator, dataset):
        if trainer.step >= settings.steps:
            break
        with accelerator.accumulate(trainer.net):
            losses = trainer.learn(batch)
        accelerator.log(losses, trainer.step)
        if trainer.step % settings.save_every == 0 and accelerator.sync_gradients:
            accelerator.save_state(str(state))
            with trainer.averaged():
                shown = trainer.pictures(batch)
            for tracker in accelerator.trackers:
                tracker.log_images({name: picture[None] for name, picture in shown.items()}, trainer.step)
    if accelerator.is_main_process:
        with trainer.averaged():
            trainer.export(Path(settings.output))
    accelerator.end_training()
