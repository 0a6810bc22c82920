"""From what the panel or an API call sends to a request the rest of the program can trust."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from PIL import Image

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.images import ResizeMode, read_image
from lib_layerdiffuse.methods import DEFAULT_METHOD, Layer, Method, Step, find_method, listed, nearest, shortened

# One small parser per kind of control: the value, or any everyday exception for what is not one.

_FLAGS = {True: True, False: False, "true": True, "false": False}  # 1 and 0 are True and False as keys


def _flag(raw: Any) -> bool:
    return _FLAGS[raw.lower() if isinstance(raw, str) else raw]


def _number(low: float, high: float) -> Callable[[Any], float]:
    def parse(raw: Any) -> float:
        value = float(raw)
        if isinstance(raw, bool) or not low <= value <= high:  # NaN compares false
            raise ValueError(raw)
        return value

    return parse


def _text(raw: Any) -> str:
    if not isinstance(raw, str):
        raise TypeError(raw)
    return raw


def _image(raw: Any) -> Image.Image | None:
    """Blank text is no image."""
    return None if raw is None or (isinstance(raw, str) and not raw.strip()) else read_image(raw)


def _anything(raw: Any) -> object:
    return raw


def _control(label: str, default: object, parse: Callable[[Any], object], needs: str = "") -> Any:
    """A row of Controls: its name in the panel, and how a value is read; `needs` ends the sentence for a wrong one."""
    return field(default=default, metadata={"label": label, "parse": parse, "needs": needs})


IMAGE_NEEDS = "a whole PNG, JPG or WebP file in base64, or a data URL"


@dataclass(frozen=True)
class Controls:
    """Raw values, as the panel and the API send them; the order of the fields is the order of both."""

    enabled: object = _control("Enable", False, _flag, "true or false")
    method: object = _control("Method", DEFAULT_METHOD.label, find_method)
    weight: object = _control("Weight", 1.0, _number(0, 2), "a number from 0 to 2")
    ending_step: object = _control("Stop At", 1.0, _number(0, 1), "a number from 0 to 1")
    fg_image: object = _control("Foreground", None, _image, IMAGE_NEEDS)
    bg_image: object = _control("Background", None, _image, IMAGE_NEEDS)
    blend_image: object = _control("Blending", None, _image, IMAGE_NEEDS)
    resize_mode: object = _control(
        "Resize Mode", "Crop and Resize", ResizeMode, listed(mode.value for mode in ResizeMode)
    )
    output_origin: object = _control("Output Original", False, _anything)  # without effect; older calls send it
    fg_prompt: object = _control("Foreground Prompt", "", _text, "text")
    bg_prompt: object = _control("Background Prompt", "", _text, "text")
    blend_prompt: object = _control("Blending Prompt", "", _text, "text")
    starting_step: object = _control("Start At", 0.0, _number(0, 1), "a number from 0 to 1")


_FIELDS = {row.name: row for row in fields(Controls)}
_ALIASES = {"start_at": "starting_step", "stop_at": "ending_step"}


@dataclass(frozen=True)
class Request:
    """What one job is asked to do, checked."""

    method: Method
    weight: float
    starting_step: float
    ending_step: float
    resize_mode: ResizeMode
    images: Mapping[Layer, Sequence[Image.Image]]  # those supplied: one for all pictures, or one for each
    prompts: Mapping[Layer, str]  # those with words in them
    chain: "Request | None" = None  # the one that this is a step of

    @property
    def several(self) -> bool:
        """Whether there are other pictures that its pictures belong to."""
        return (self.chain or self).method.frames > 1

    @property
    def injects(self) -> bool:
        """Whether the UNet changes at all: at weight 0, or stopped before the first step, it is the base model."""
        return self.weight > 0 and self.ending_step > 0

    @classmethod
    def parse(cls, args: Sequence[object]) -> "Request | None":
        """The request in these values, one per control or one dict of names; None, and no further look, when off."""
        given = _given(args)
        if not _parsed("enabled", given):
            return None
        _refuse_unknown(args, given)
        values = {name: _parsed(name, given) for name in _FIELDS}
        request = cls(
            method=values["method"],
            weight=values["weight"],
            starting_step=values["starting_step"],
            ending_step=values["ending_step"],
            resize_mode=values["resize_mode"],
            images={layer: (image,) for layer in Layer if (image := values[f"{layer.value}_image"]) is not None},
            prompts={layer: text for layer in Layer if (text := values[f"{layer.value}_prompt"].strip())},
        )
        request._refuse_missing()
        request._refuse_nothing()
        return request

    def for_step(self, step: Step, images: Mapping[Layer, Sequence[Image.Image]]) -> "Request":
        """What one step of the method is asked to do. images: all there are when it begins."""
        method = find_method(step.key)
        given = {layer: images[layer] for layer in method.inputs}
        return replace(self, method=method, ending_step=self._stop_of(step), images=given, chain=self)

    def _stop_of(self, step: Step) -> float:
        return step.stop_at if self.ending_step == 1 else self.ending_step

    def _refuse_missing(self) -> None:
        for layer in self.method.inputs:
            if layer not in self.images:
                box = _FIELDS[f"{layer.value}_image"]
                raise LayerDiffuseError(
                    f"{self.method.label} needs a {layer.word} image. Put one into the {box.metadata['label']} box, or "
                    f"send it as {box.name}."
                )

    def _refuse_nothing(self) -> None:
        """A start after the stop is a slip; to switch the injection off, people set Weight or Stop At to 0."""
        stop = min(self._stop_of(step) for step in self.method.steps)
        if 0 < self.starting_step >= stop:
            raise LayerDiffuseError(
                f"Start At is {self.starting_step:g} and Stop At is {stop:g}: nothing is left between them. "
                "Set Start At below Stop At."
            )


def _given(args: Sequence[object]) -> dict[str, object]:
    """Values by name, null counting as not given.

    The web UI lays the posted list over its own defaults: behind a dict in the first place stand only those defaults.
    """
    if args and isinstance(args[0], Mapping):
        return {"enabled": True} | _without_nulls(args[0].items())
    return _without_nulls(zip(_FIELDS, args, strict=False))


def _without_nulls(pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
    return {_ALIASES.get(name, name): raw for name, raw in pairs if raw is not None}


def _parsed(name: str, given: Mapping[str, object]) -> Any:
    """The field's value, or its default where none is given."""
    row = _FIELDS[name]
    raw = given.get(name, row.default)
    try:
        return row.metadata["parse"](raw)
    except (ArithmeticError, LookupError, TypeError, ValueError):
        raise LayerDiffuseError(
            f"{row.metadata['label']} ({name} in API calls) is {shortened(raw)}. Set it to {row.metadata['needs']}."
        ) from None


def _refuse_unknown(args: Sequence[object], given: Mapping[str, object]) -> None:
    """More values than controls, or a name that no control has."""
    if len(args) > len(_FIELDS):
        raise LayerDiffuseError(f"LayerDiffuse takes {len(_FIELDS)} values, but {len(args)} came. Send {_names()}.")
    if unknown := [name for name in given if name not in _FIELDS]:
        near = listed(nearest(unknown[0], _FIELDS))
        raise LayerDiffuseError(
            f"LayerDiffuse has no setting {shortened(unknown[0])}. Did you mean {near}? The names are {_names()}."
        )


def _names() -> str:
    return ", ".join(_FIELDS)
