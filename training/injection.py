"""Train what goes into a UNet: for every method of the extension the file of weights that it injects.

    accelerate launch -m training.injection --model MODEL --method METHOD --data SOURCE --output FOLDER \\
        [--encoder FILE] [options]

MODEL: an SD1.5 or SDXL model as a diffusers folder, a single file or a hub name; it stays as it is. METHOD: a key of
lib_layerdiffuse/methods.py such as xl_transparent_attn; what it takes and makes says which layers SOURCE must have
(training/data.py). FILE: the transparent encoder, for methods that make a foreground.

Latents of foregrounds are offset as the transparent pair has them; everything is learnt by predicting noise. Condition
images reach SD1.5 as control signals, SDXL as further channels of its first convolution (arXiv 2402.17113, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from lib_layerdiffuse.engine.diffusers import DiffusersBackend, attentions_of, checkpoint_keys
from lib_layerdiffuse.injection.patches import Key
from lib_layerdiffuse.methods import Layer, Method, find_method
from lib_layerdiffuse.nets.attention_sharing import (
    LEVELS,
    AttentionSharing,
    AttentionSharingUnit,
    ControlEncoder,
    attend,
    control_tokens,
)
from lib_layerdiffuse.tensors import Rgb, StateDict, Tokens
from lib_layerdiffuse.weights.files import read_tensors
from training import diffusion
from training.data import OneLayer, open_layers, open_source
from training.diffusion import DiffusionSettings, DiffusionTrainer, Encoder
from training.harm import load_pair
from training.trainer import parse, save_halves, train

CONTROL_WIDTHS = (3, 32, 32, 64, 64, 128, 128, 256)  # of the control encoder; its last ones are those of the signal
LORA_PAIRS = (("::lora::0", "::lora::1"), (".up.weight", ".down.weight"))  # how keys of up and down end
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # of what stays as it is
NEVER_IN_DIFFS = ("to_q", "to_k", "to_v", "time_embedding", "add_embedding")


@dataclass(frozen=True, kw_only=True)
class InjectionSettings(DiffusionSettings):
    """The options of this trainer."""

    model: str
    method: str
    encoder: str = ""
    start: str = ""
    rank: int = 256
    signal: int = 256


HELP = {
    **diffusion.HELP,
    "model": "a diffusers folder, a single file or a hub name",
    "method": "a key of lib_layerdiffuse/methods.py",
    "encoder": "the transparent encoder, for methods that make a foreground",
    "start": "a file of weights for this method, to go on from; default: nothing is injected at first",
    "rank": "of low-rank additions",
    "signal": "channels of control signals",
}


class LowRankUNet(nn.Module):
    """LoRA on every projection of every attention layer, by peft."""

    def __init__(self, unet: Any, settings: InjectionSettings, method: Method) -> None:
        super().__init__()
        self._keys = checkpoint_keys(unet)  # before peft renames
        self.unet = unet
        rank = settings.rank
        unet.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LORA_TARGETS), init_lora_weights="gaussian")
        )

    def forward(self, noisy: Tensor, timesteps: Tensor, context: Tensor, added: Any, condition: Tensor) -> Tensor:
        return self.unet(noisy, timesteps, context, added_cond_kwargs=added).sample

    def tensors(self) -> StateDict:
        """As the file has them."""
        found = {}
        for name, layer in self.unet.named_modules():
            if hasattr(layer, "lora_A"):
                key = self._keys[f"{name}.weight"]
                found[f"{key}::lora::0"] = layer.lora_B["default"].weight
                found[f"{key}::lora::1"] = layer.lora_A["default"].weight
        return found

    @torch.no_grad()
    def load(self, tensors: StateDict) -> None:
        for key, weight in self.tensors().items():
            weight.copy_(tensors[key])


class WeightsUNet(nn.Module):
    """The UNet's own weights learn, and what they become is told as a difference.

    transformers: whether those within the transformers learn too, all but the projections that LoRAs are for. Condition
    latents are read by channels that the first convolution does not have yet.
    """

    def __init__(self, unet: Any, settings: InjectionSettings, method: Method, transformers: bool) -> None:
        super().__init__()
        self.unet = unet
        keys = checkpoint_keys(unet)
        for name, weight in unet.named_parameters():
            within = ".attentions." in name
            weight.requires_grad_((transformers or not within) and not any(each in name for each in NEVER_IN_DIFFS))
        self._before = {
            name: (keys[name], weight.detach().clone())
            for name, weight in unet.named_parameters()
            if weight.requires_grad
        }
        first = unet.conv_in
        channels = len(method.inputs) * unet.config.in_channels
        self.condition = nn.Parameter(torch.zeros(first.out_channels, channels, *first.kernel_size))
        self._signal: Tensor | float = 0.0
        first.register_forward_hook(lambda module, inputs, answer: answer + self._signal)

    def forward(self, noisy: Tensor, timesteps: Tensor, context: Tensor, added: Any, condition: Tensor) -> Tensor:
        if condition.shape[1]:
            self._signal = F.conv2d(condition, self.condition, padding="same")
        return self.unet(noisy, timesteps, context, added_cond_kwargs=added).sample

    def tensors(self) -> StateDict:
        """As the file has them."""
        now = dict(self.unet.named_parameters())
        diffs = {name: now[name] - before.to(now[name]) for name, (_, before) in self._before.items()}
        diffs["conv_in.weight"] = torch.cat([diffs["conv_in.weight"], self.condition], dim=1)
        return {f"{key}::diff::0": diffs[name] for name, (key, _) in self._before.items()}

    @torch.no_grad()
    def load(self, tensors: StateDict) -> None:
        now = dict(self.unet.named_parameters())
        for name, (key, before) in self._before.items():
            diff = tensors[f"{key}::diff::0"]
            if name == "conv_in.weight":
                diff, condition = diff.split([before.shape[1], self.condition.shape[1]], dim=1)
                self.condition.copy_(condition)
            now[name].copy_(before + diff)


class SharingUNet(nn.Module):
    """Low-rank additions and attention between frames, in the attention layers of a UNet that stays as it is."""

    def __init__(self, unet: Any, settings: InjectionSettings, method: Method) -> None:
        super().__init__()
        self.unet = unet.requires_grad_(False)
        signal = settings.signal if method.inputs else 0
        attentions = attentions_of(unet)
        units = [
            AttentionSharingUnit(each.inner_dim, each.cross_attention_dim, settings.rank, method.frames, signal)
            for each in attentions.values()
        ]
        widths = (tuple(min(width, signal) for width in CONTROL_WIDTHS), *((signal,) * 3,) * 3)
        encoder = ControlEncoder([(*widths[0], signal), *widths[1:]]) if signal else None
        self.sharing = AttentionSharing(units, encoder)
        for unit in units:
            start_at_zero(unit)
        self.signals: list[Tensor] = []
        for key, attention, unit in zip(attentions, attentions.values(), units):
            attention.processor = LearningAttention(self, key, unit, method.frames)

    def forward(self, noisy: Tensor, timesteps: Tensor, context: Tensor, added: Any, condition: Rgb) -> Tensor:
        if self.sharing.kwargs_encoder is not None:
            self.signals = self.sharing.kwargs_encoder(condition)
        return self.unet(noisy, timesteps, context).sample

    def tensors(self) -> StateDict:
        """As the file has them."""
        return self.sharing.state_dict()

    def load(self, tensors: StateDict) -> None:
        self.sharing.load_state_dict(tensors)


def start_at_zero(unit: AttentionSharingUnit) -> None:
    """Until something has been learnt, a unit adds nothing."""
    pairs = [pair for part in (unit.to_q_lora, unit.to_k_lora, unit.to_v_lora, unit.to_out_lora) for pair in part]
    last = [pair.up for pair in pairs] + [unit.temporal_o]
    last += [convolutions[-1] for convolutions in getattr(unit, "control_convs", ())]
    for layer in last:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


class LearningAttention:
    """A unit in the place of an attention layer's processor, computed part by part as the file format says."""

    def __init__(self, net: SharingUNet, key: Key, unit: AttentionSharingUnit, frames: int) -> None:
        self._net = lambda: net
        self._level = LEVELS[key[1]]
        self._unit, self._frames = unit, frames

    def __call__(self, attention: Any, h: Tokens, encoder_hidden_states: Tokens | None = None, **_: Any) -> Tokens:
        unit = self._unit
        x = h + self._control(h)
        text = x if encoder_hidden_states is None else encoder_hidden_states
        q = attention.to_q(x) + self._low_rank(unit.to_q_lora, x)
        k = attention.to_k(text) + self._low_rank(unit.to_k_lora, text)
        v = attention.to_v(text) + self._low_rank(unit.to_v_lora, text)
        mixed = attend(q, k, v, attention.heads)
        x = x + attention.to_out[0](mixed) + self._low_rank(unit.to_out_lora, mixed)
        x = x + self._share(x, attention.heads)
        return x - h

    def _low_rank(self, pairs: nn.ModuleList, x: Tokens) -> Tokens:
        frames = x.unflatten(0, (-1, self._frames)).unbind(1)
        return torch.stack([pair.up(pair.down(own)) for pair, own in zip(pairs, frames)], dim=1).flatten(0, 1)

    def _share(self, x: Tokens, heads: int) -> Tokens:
        """Attention between the frames at each token."""
        unit = self._unit
        y = unit.temporal_i(unit.temporal_n(x)).unflatten(0, (-1, self._frames)).transpose(1, 2)  # -> [b, N, f, C]
        q, k, v = (layer(y).flatten(0, 1) for layer in (unit.temporal_q, unit.temporal_k, unit.temporal_v))
        mixed = attend(q, k, v, heads).unflatten(0, y.shape[:2]).transpose(1, 2).flatten(0, 1)  # -> [(b f), N, C]
        return unit.temporal_o(mixed)

    def _control(self, h: Tokens) -> Tokens | float:
        if not self._net().signals:
            return 0.0
        return control_tokens(self._unit.control_convs, self._net().signals[self._level])


KINDS: Mapping[str, Any] = {
    "sd15_transparent_attn": SharingUNet,
    "sd15_fg2bg": SharingUNet,
    "sd15_bg2fg": SharingUNet,
    "sd15_joint": SharingUNet,
    "xl_transparent_attn": LowRankUNet,
    "xl_transparent_conv": partial(WeightsUNet, transformers=True),
    "xl_fg2ble": partial(WeightsUNet, transformers=False),
    "xl_bg2ble": partial(WeightsUNet, transformers=False),
    "xl_fgble2bg": partial(WeightsUNet, transformers=False),
    "xl_bgble2fg": partial(WeightsUNet, transformers=True),
}


def at_most(rank: int, tensors: StateDict) -> StateDict:
    """Low-rank additions of a higher rank as those of this rank that come nearest; everything else as it is."""
    found = dict(tensors)
    for up, down in LORA_PAIRS:
        for key in tensors:
            if key.endswith(up) and tensors[key].shape[1] > rank:
                other = key.removesuffix(up) + down
                found[key], found[other] = nearest(rank, tensors[key].float(), tensors[other].float())
    return found


def nearest(rank: int, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Whose product differs least from up @ down (Eckart, Young 1936)."""
    (q_up, r_up), (q_down, r_down) = torch.linalg.qr(up), torch.linalg.qr(down.T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T)
    root = values[:rank].sqrt()
    return q_up @ left[:, :rank] * root, root[:, None] * (right[:rank] @ q_down.T)


def start_from(net: Any, path: Path, method: Method, rank: int) -> None:
    """Load a file of the method's weights; SystemExit where they are not of the shapes that the network has."""
    tensors = at_most(rank, read_tensors(path))
    wanted, found = ({key: tuple(x.shape) for key, x in each.items()} for each in (net.tensors(), tensors))
    if differing := sorted(key for key in {*wanted, *found} if wanted.get(key) != found.get(key)):
        key = differing[0]
        raise SystemExit(
            f"{path} cannot be gone on from: of {method.key} with this model, --rank and --signal, {key} is "
            f"{wanted.get(key, 'not there')}, in the file it is {found.get(key, 'not there')}. Choose what made it."
        )
    net.load(tensors)


class InjectionTrainer(DiffusionTrainer):
    """net: one of KINDS."""

    settings: InjectionSettings

    def export(self, folder: Path) -> None:
        save_halves(self.plain.tensors(), folder / find_method(self.settings.method).weights)


def make(settings: InjectionSettings, accelerator: Accelerator) -> tuple[InjectionTrainer, Dataset[Any]]:
    method = find_method(settings.method)
    if method.chain:
        steps = ", ".join(step.key for step in method.chain)
        raise SystemExit(f"{method.key} has no weights of its own: it runs {steps}. Train these.")
    if method.makes_foreground and not settings.encoder:
        raise SystemExit(f"{method.key} makes a foreground: name the transparent encoder with --encoder.")
    pipeline = DiffusersBackend.load(settings.model, method.family).pipeline
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).to(accelerator.device)
    pair = load_pair(Path(settings.encoder), None, str(accelerator.device)) if settings.encoder else None
    encoder = Encoder(pipeline, pair, method.inputs, method.outputs)
    alone = (*method.inputs, *method.outputs) == (Layer.FG,)
    dataset: Any = (
        OneLayer(open_source(settings.data, settings.size), Layer.FG)
        if alone
        else open_layers(settings.data, settings.size)
    )
    net = KINDS[method.key](pipeline.unet, settings, method).train()
    if settings.start:
        start_from(net, Path(settings.start), method, settings.rank)
    for weight in net.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.to(PRECISIONS[settings.precision])
    if settings.checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    trainer = InjectionTrainer(settings, accelerator, net.to(accelerator.device), pipeline, encoder)
    return trainer, dataset


if __name__ == "__main__":
    train(parse(InjectionSettings, __doc__, HELP), make)
