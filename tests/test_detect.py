"""Whether a web UI is one that we know, by what it has."""

import sys
from types import SimpleNamespace

import pytest

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.webui import detect


@pytest.fixture
def modules(monkeypatch):
    """All that is needed of a web UI, and nothing else."""
    made = {}
    for module, names in detect.NEEDED.items():
        made[module] = SimpleNamespace()
        for name in names.split():
            owner = made[module]
            for part in name.split("."):
                setattr(owner, part, getattr(owner, part, SimpleNamespace()))
                owner = getattr(owner, part)
        monkeypatch.setitem(sys.modules, module, made[module])
    return made


def test_a_web_ui_that_has_everything_lacks_nothing(modules):
    assert list(detect.missing()) == []


def test_what_a_newer_web_ui_has_no_longer_is_named(modules):
    del modules["modules.processing"].Processed.js
    del modules["modules.images"].save_image
    with pytest.raises(
        LayerDiffuseError, match=r"no modules\.images\.save_image or modules\.processing\.Processed\.js"
    ):
        detect.web_ui()


def test_where_there_is_no_web_ui_the_module_is_named():
    with pytest.raises(LayerDiffuseError, match="No module named 'modules'"):
        detect.web_ui()
