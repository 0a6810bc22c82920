"""Every word of the panels and settings has its translation, and no translation is left over."""

import ast
import json
from pathlib import Path

import pytest

from lib_layerdiffuse.images.extras import EXTRAS
from lib_layerdiffuse.images.rgba import ResizeMode
from lib_layerdiffuse.methods import METHODS, Family
from lib_layerdiffuse.request import differential, layers
from lib_layerdiffuse.webui.status_line import forecast
from lib_layerdiffuse.weights.downloads import State, Status
from lib_layerdiffuse.weights.released import ASSETS
from lib_layerdiffuse.weights.transfer import ANOTHER

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "localizations").glob("*.json"))
HIDDEN = ("enabled", "output_origin")  # controls without words on the page


def controls():
    for form in (layers.FORM, differential.FORM):
        for name in form.names:
            if name not in HIDDEN:
                yield form.label(name)
                yield form.hint(name)


def choices():
    yield layers.AS_IN_SETTINGS
    yield from (title for method in METHODS for title in (method.title, method.full_title))
    yield from (mode.value for mode in ResizeMode)
    yield from differential.SOURCES
    for extra in EXTRAS.values():
        yield from (extra.label, extra.caption)


def sentences():
    asset = next(iter(ASSETS.values()))
    for state in (State.PRESENT, State.MISSING, State.DOWNLOADING):
        for method in METHODS:
            for family in Family:
                for sentence in forecast(method, 1, [Status(asset, state, 1, 2, "", ANOTHER)], family):
                    yield from sentence


def literals(path):
    """Strings of several words in the source, but for docstrings, code for the browser, and HTML."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    docstrings = [node.value for node in nodes if isinstance(node, ast.Expr)]
    strings = [node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    for text in (node.value for node in strings if node not in docstrings):
        if " " in text.strip() and not any(mark in text for mark in ("=>", "&nbsp;", "<")):
            yield text


def words_of_the_page():
    found = {*controls(), *choices(), *sentences(), *literals(ROOT / "lib_layerdiffuse" / "webui" / "panel.py")}
    return {word for word in found if any(letter.isalpha() for letter in word) and not word.endswith(" MB")} - {
        family.word for family in Family
    }


def test_there_are_translations():
    assert [path.stem for path in FILES] == ["zh_CN"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_word_is_translated_and_none_is_left_over(path):
    translation = json.loads(path.read_text(encoding="utf-8"))
    words = words_of_the_page()
    assert {"missing": words - translation.keys(), "left over": translation.keys() - words} == {
        "missing": set(),
        "left over": set(),
    }
    assert all(text and text != word for word, text in translation.items())
