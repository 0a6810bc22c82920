"""How the raw values of panels and API calls are read, by a dataclass that says which there are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from PIL import Image

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.images.reading import REFUSALS, read_image
from lib_layerdiffuse.methods import listed, nearest, shortened

# One small parser per kind of control: the value, or any everyday exception for what is not one.

_FLAGS = {True: True, False: False, "true": True, "false": False}  # 1 and 0 are True and False as keys


def flag(raw: Any) -> bool:
    return _FLAGS[raw.lower() if isinstance(raw, str) else raw]


def number(low: float, high: float) -> Callable[[Any], float]:
    def parse(raw: Any) -> float:
        value = float(raw)
        if isinstance(raw, bool) or not low <= value <= high:  # NaN compares false
            raise ValueError(raw)
        return value

    return parse


def integer(low: int, high: int) -> Callable[[Any], int]:
    def parse(raw: Any) -> int:
        value = number(low, high)(raw)
        if value % 1:
            raise ValueError(raw)
        return int(value)

    return parse


def one_of(*choices: int) -> Callable[[Any], int]:
    def parse(raw: Any) -> int:
        value = integer(min(choices), max(choices))(raw)
        if value not in choices:
            raise ValueError(raw)
        return value

    return parse


def text(raw: Any) -> str:
    if not isinstance(raw, str):
        raise TypeError(raw)
    raw.encode()  # refuses half a character (a lone surrogate), which no answer and no file could repeat
    return raw


def image(raw: Any) -> Image.Image | None:
    """Blank text is no image."""
    return None if raw is None or (isinstance(raw, str) and not raw.strip()) else read_image(raw)


def anything(raw: Any) -> object:
    """What JSON can say: the web UI's answer repeats it."""
    json.dumps(raw, allow_nan=False, ensure_ascii=False).encode()
    return raw


IMAGE_NEEDS = "a whole PNG, JPG or WebP file in base64, or a data URL"


def control(
    label: str,
    default: object,
    parse: Callable[[Any], object],
    needs: str = "",
    *,
    infotext: str = "",
    hint: str = "",
) -> Any:
    """A field of a dataclass of controls: its name in the panel, and how a value is read.

    needs: ends the sentence for a wrong one; infotext: what the value is called among a picture's parameters;
    hint: explains the control in the panel.
    """
    return field(
        default=default,
        metadata={"label": label, "parse": parse, "needs": needs, "infotext": infotext, "hint": hint},
    )


@dataclass(frozen=True)
class Form:
    """A dataclass of controls, the name of what they control, and other names that older calls use for some."""

    title: str
    controls: type
    aliases: Mapping[str, str]
    infotext_aliases: Mapping[str, str]  # the same for infotexts

    def posted(self, entry: object) -> list[object]:
        """The args in an API request's entry for this script: `{"args": [...]}`, or what stands there without `args`.

        One dict of names is a list of it. Raises LayerDiffuseError where it is neither list nor dict.
        """
        args = entry["args"] if isinstance(entry, Mapping) and "args" in entry else entry
        if isinstance(args, Mapping):
            return [args]
        if isinstance(args, list):
            return args
        raise LayerDiffuseError(
            f"The args of {self.title} are {shortened(args)}. Send a dict of names, or a list of values."
        )

    def read(self, args: Sequence[object], changed: Mapping[str, object]) -> dict[str, Any] | None:
        """Every control's value, from one value per control or one dict of names; None, and no further look, when off.

        Null counts as not given. The web UI lays the posted list over its own defaults: behind a dict in the first
        place stand only those defaults. changed: values by name that go before them. Raises LayerDiffuseError.
        """
        if not self.is_on(args):
            return None
        given = self._given(args)
        self._refuse_unknown(args, given)
        self._refuse_twice(args)
        given |= changed
        return {name: self._parsed(name, given) for name in self._rows}

    def is_on(self, args: Sequence[object]) -> bool:
        """Whether these args, as `read` takes them, switch it on."""
        return bool(self._parsed("enabled", self._given(args)))

    def _given(self, args: Sequence[object]) -> dict[str, object]:
        if args and isinstance(args[0], Mapping):
            return {"enabled": True} | self._named(args[0].items())
        return self._named(zip(self._rows, args, strict=False))

    @property
    def names(self) -> list[str]:
        """The controls, in the order of both panel and API."""
        return list(self._rows)

    def default(self, name: str) -> Any:
        return self._rows[name].default

    def label(self, name: str) -> str:
        """The control's name in the panel."""
        return self._rows[name].metadata["label"]

    def hint(self, name: str) -> str:
        """What explains the control in the panel."""
        return self._rows[name].metadata["hint"]

    def infotext(self, name: str) -> str:
        """What the control's value is called among a picture's parameters."""
        return self._rows[name].metadata["infotext"]

    def pasted(self, name: str, parameters: Mapping[str, Any]) -> Any:
        """The control's value in a picture's parameters; None, which leaves it as it is, where they do not say.

        Parameters of a picture that was made without this switch it off; a setting that is not written had its default.
        """
        found = {self.infotext_aliases.get(key, key): value for key, value in parameters.items()}
        switch = next(key for row in self._rows.values() if (key := row.metadata["infotext"]))
        if name == "enabled":
            return switch in found
        key = self.infotext(name)
        if switch not in found or not key:
            return None
        default = self._rows[name].default
        raw = found.get(key, default)
        try:
            value = self._parsed(name, {name: raw})
        except LayerDiffuseError:
            return None
        return getattr(value, "label", raw) if isinstance(default, str) else value

    @property
    def _rows(self) -> dict[str, Any]:
        return {row.name: row for row in fields(self.controls)}

    def _named(self, pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
        return {self.aliases.get(name, name): raw for name, raw in pairs if raw is not None}

    def _parsed(self, name: str, given: Mapping[str, object]) -> Any:
        """The control's value, or its default where none is given."""
        row = self._rows[name]
        raw = given.get(name, row.default)
        try:
            return row.metadata["parse"](raw)
        except REFUSALS as error:
            wrong = str(error)
        except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError):  # recursion: lists in lists in …
            wrong = f"is {shortened(raw)}. Set it to {row.metadata['needs']}."
        raise LayerDiffuseError(f"{row.metadata['label']} ({name} in API calls) {wrong}")

    def _refuse_unknown(self, args: Sequence[object], given: Mapping[str, object]) -> None:
        """More values than controls, or a name that no control has."""
        names = ", ".join(self._rows)
        if len(args) > len(self._rows):
            raise LayerDiffuseError(f"{self.title} takes {len(self._rows)} values, but {len(args)} came. Send {names}.")
        if unknown := [name for name in given if name not in self._rows]:
            near = listed(nearest(unknown[0], self._rows))
            raise LayerDiffuseError(
                f"{self.title} has no setting {shortened(unknown[0])}. Did you mean {near}? The names are {names}."
            )

    def _refuse_twice(self, args: Sequence[object]) -> None:
        """An older name for a control beside its own: which of the two is meant?"""
        given = args[0] if args and isinstance(args[0], Mapping) else {}
        for alias, name in self.aliases.items():
            if given.get(alias) is not None and given.get(name) is not None:
                raise LayerDiffuseError(f"{self.title} has {alias} and {name}, which are one setting. Send only one.")
