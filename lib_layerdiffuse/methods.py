"""The table of methods: what each takes, gives and needs. Everything else about them is derived from it."""

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum

from lib_layerdiffuse.errors import LayerDiffuseError


class _Worded(str, Enum):
    """A string enum whose members also carry the word people use for them."""

    word: str

    def __new__(cls, value: str, word: str = "") -> "_Worded":  # the default lets Family("sd15") pass type checks
        member = str.__new__(cls, value)
        member._value_ = value
        member.word = word
        return member


class Family(_Worded):
    """The kind of base model a method belongs to, with the facts about it that weights depend on."""

    channels: int  # of its latents
    context: int  # width of what its UNet reads of a text
    decoder: str  # weight files of the transparent VAE; empty where the model's own VAE has alpha
    encoder: str

    SD15 = (
        "sd15", "SD1.5", 4, 768,
        "layer_sd15_vae_transparent_decoder.safetensors", "layer_sd15_vae_transparent_encoder.safetensors",
    )  # fmt: skip
    SDXL = (
        "sdxl", "SDXL", 4, 2048,
        "vae_transparent_decoder.safetensors", "vae_transparent_encoder.safetensors",
    )  # fmt: skip

    def __new__(
        cls, value: str, word: str = "", channels: int = 0, context: int = 0, decoder: str = "", encoder: str = ""
    ) -> "Family":
        member = str.__new__(cls, value)
        member._value_, member.word = value, word
        member.channels, member.context, member.decoder, member.encoder = channels, context, decoder, encoder
        return member


class Layer(_Worded):
    """What one picture shows; the value starts its API names (`fg_image`, `fg_prompt`)."""

    FG = "fg", "foreground"
    BG = "bg", "background"
    BLEND = "blend", "blend"


@dataclass(frozen=True)
class Step:
    """One method's part in a chain of several."""

    key: str  # of the method
    stop_at: float = 1.0  # where the step stops unless the request says otherwise
    avoids: str = ""  # samplers with this in their name give artifacts here, as the authors of the weights saw


@dataclass(frozen=True)
class Method:
    """One way of working: images the user supplies, in condition order, and what each consecutive picture shows."""

    title: str  # as the panel's list of one family has it
    label: str  # as the older extension has it: infotexts and API calls
    family: Family
    key: str  # short name, for API calls; of a method with weights, what the file's name has in its middle
    inputs: tuple[Layer, ...]
    outputs: tuple[Layer, ...]
    chain: tuple[Step, ...] = ()  # run one after the other, each with what those before it made; empty: one run

    @property
    def full_title(self) -> str:
        """The title among those of all families, and in sentences."""
        return f"{self.title} ({self.family.word})"

    @property
    def frames(self) -> int:
        """Pictures that belong together; sampled together too, but for a chain."""
        return len(self.outputs)

    @property
    def weights(self) -> str:
        """File name."""
        return f"layer_{self.key}.safetensors"

    @property
    def steps(self) -> tuple[Step, ...]:
        """What is run: the chain, or the method itself."""
        return self.chain or (Step(self.key),)

    @property
    def makes_foreground(self) -> bool:
        """Whether one of its pictures is RGBA."""
        return Layer.FG in self.outputs

    @property
    def decodes(self) -> bool:
        """Whether that takes a transparent VAE."""
        return self.makes_foreground and bool(self.family.decoder)


_SD15, _SDXL = Family.SD15, Family.SDXL
_FG, _BG, _BLEND = Layer

# With the older extension's labels saved infotexts and API calls stay valid.
METHODS = (
    Method(
        "Transparent picture",
        "(SD1.5) Only Generate Transparent Image (Attention Injection)",
        _SD15, "sd15_transparent_attn", (), (_FG,),
    ),
    Method(
        "Background for a foreground",
        "(SD1.5) From Foreground to Background (need batch size 2)",
        _SD15, "sd15_fg2bg", (_FG,), (_BG, _BLEND),
    ),
    Method(
        "Foreground for a background",
        "(SD1.5) From Background to Foreground (need batch size 2)",
        _SD15, "sd15_bg2fg", (_BG,), (_FG, _BLEND),
    ),
    Method(
        "Layers from a prompt",
        "(SD1.5) Generate Everything Together (need batch size 3)",
        _SD15, "sd15_joint", (), (_FG, _BG, _BLEND),
    ),
    Method(
        "Transparent picture",
        "(SDXL) Only Generate Transparent Image (Attention Injection)",
        _SDXL, "xl_transparent_attn", (), (_FG,),
    ),
    Method(
        "Transparent picture by conv",
        "(SDXL) Only Generate Transparent Image (Conv Injection)",
        _SDXL, "xl_transparent_conv", (), (_FG,),
    ),
    Method(
        "Blend for a foreground",
        "(SDXL) From Foreground to Blending",
        _SDXL, "xl_fg2ble", (_FG,), (_BLEND,),
    ),
    Method(
        "Background for a foreground and its blend",
        "(SDXL) From Foreground and Blending to Background",
        _SDXL, "xl_fgble2bg", (_FG, _BLEND), (_BG,),
    ),
    Method(
        "Blend for a background",
        "(SDXL) From Background to Blending",
        _SDXL, "xl_bg2ble", (_BG,), (_BLEND,),
    ),
    Method(
        "Foreground for a background and its blend",
        "(SDXL) From Background and Blending to Foreground",
        _SDXL, "xl_bgble2fg", (_BG, _BLEND), (_FG,),
    ),
    Method(
        "Layers from a prompt",
        "(SDXL) From Prompt to Foreground, Blending and Background",
        _SDXL, "xl_everything", (), (_FG, _BLEND, _BG),
        (Step("xl_transparent_attn"), Step("xl_fg2ble"), Step("xl_fgble2bg", stop_at=0.5, avoids="DPM")),
    ),
    Method(
        "Foreground for a background",
        "(SDXL) From Background to Blending and Foreground",
        _SDXL, "xl_bg2blefg", (_BG,), (_BLEND, _FG),
        (Step("xl_bg2ble"), Step("xl_bgble2fg", avoids="DPM")),
    ),
)  # fmt: skip


def find_method(value: object) -> Method:
    """The method with this full title, label, key or position in METHODS (from 0); upper and lower case are one."""
    named = {name.casefold(): each for each in METHODS for name in (each.full_title, each.label, each.key)}
    numbered = dict(enumerate(METHODS))
    if isinstance(value, str) and (method := named.get(value.strip().casefold())):
        return method
    if type(value) is int and value in numbered:  # not isinstance: True is no number here
        return numbered[value]
    near = dict.fromkeys(named[name].full_title for name in nearest(value, named, count=2))
    raise LayerDiffuseError(
        f"There is no method {shortened(value)}. The nearest are {listed(near)}. "
        f"Name a method by its title, its label, its key such as {METHODS[0].key}, or its number from 0 to "
        f"{len(METHODS) - 1}."
    )


DEFAULT_METHOD = find_method("xl_transparent_attn")


def methods_of(family: Family | None) -> list[Method]:
    """The methods for that kind of checkpoint; all of them where it is not known."""
    return [method for method in METHODS if family in (None, method.family)]


def counterpart(method: Method, methods: Sequence[Method]) -> Method:
    """Of these, the one that is most like the method in what it takes and makes; itself, if it is one of them."""

    def likeness(other: Method) -> tuple[bool, int]:
        return other is method, (other.inputs == method.inputs) + (set(other.outputs) == set(method.outputs))

    return max(methods, key=likeness)


def taking(layer: Layer, family: Family) -> Method:
    """A method for an image of that layer: of that family, if it has one."""
    takers = [method for method in METHODS if layer in method.inputs]
    return next((method for method in takers if method.family is family), takers[0])


def needed_files(method: Method, injects: bool = True, encodes: bool = False) -> list[str]:
    """The weight files that its steps read.

    injects: whether the UNet changes; encodes: whether it starts from pictures.
    """
    files: list[str] = []
    for step in method.steps:
        one = find_method(step.key)
        files += [one.weights] * injects
        files += [one.family.decoder, *[one.family.encoder] * encodes] * one.decodes
    return list(dict.fromkeys(files))


def nearest(value: object, names: Iterable[str], count: int = 1) -> list[str]:
    """The `count` names most like the value, best first."""
    return get_close_matches(shortened(value).casefold(), list(names), count, cutoff=0)


def listed(names: Iterable[str]) -> str:
    """Names for use in a sentence: `"a" or "b"`."""
    return " or ".join(f'"{name}"' for name in names)


def shortened(value: object) -> str:
    """The value as it would be typed, cut to a length that fits into a sentence."""
    cut = reprlib.Repr()
    cut.maxstring = cut.maxother = cut.maxlong = 80
    cut.maxlevel, cut.maxlist, cut.maxdict = 2, 3, 3  # lists in lists soon are pages
    return cut.repr(value)
