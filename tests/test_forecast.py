"""What the panel says before a press of Generate."""

from dataclasses import replace

import pytest

from lib_layerdiffuse.methods import METHODS, Family, find_method, needed_files
from lib_layerdiffuse.webui.status_line import forecast
from lib_layerdiffuse.weights.downloads import State, Status
from lib_layerdiffuse.weights.released import ASSETS

MB = 1_000_000


def status(file, state=State.PRESENT, received=0, error=""):
    asset = ASSETS[file]
    return Status(asset, state, received, asset.megabytes * MB, error)


def said(key, batch_size=1, family=None, weights=()):
    return [" ".join(sentence) for sentence in forecast(find_method(key), batch_size, weights, family)]


@pytest.mark.parametrize(
    ("key", "batch_size", "expected"),
    [
        ("sd15_transparent_attn", 1, ["1 image per picture: foreground"]),
        ("sd15_transparent_attn", 3, ["1 image per picture: foreground"]),
        ("sd15_joint", 1, ["3 images per picture: foreground · background · blend", "batch size 1 becomes 3"]),
        ("sd15_joint", 3, ["3 images per picture: foreground · background · blend"]),
        ("sd15_joint", 4, ["3 images per picture: foreground · background · blend", "batch size 4 becomes 6"]),
        ("sd15_fg2bg", 2, ["2 images per picture: background · blend"]),
        ("xl_fg2ble", 5, ["1 image per picture: blend"]),
        ("xl_everything", 2, ["3 images per picture: foreground · blend · background", "3 runs, one after the other"]),
    ],
)
def test_pictures_and_batches(key, batch_size, expected):
    assert said(key, batch_size) == [*expected, "weights are present"]


@pytest.mark.parametrize("family", [None, *Family])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.key)
def test_another_kind_of_checkpoint_is_named_first(method, family):
    first = said(method.key, family=family)[0]
    if family in (None, method.family):
        assert "checkpoint" not in first
    else:
        assert first == f"needs a checkpoint of this kind: {method.family.word} – the chosen one is {family.word}"


FIRST, SECOND = needed_files(find_method("sd15_transparent_attn"))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([status(FIRST), status(SECOND)], "weights are present"),
        ([status(FIRST), status(SECOND, State.MISSING)], "weights are not here yet: 208 MB"),
        ([status(FIRST, State.MISSING, 100 * MB), status(SECOND, State.MISSING)], "weights are not here yet: 558 MB"),
        (
            [status(FIRST, State.DOWNLOADING, 100 * MB), status(SECOND, State.MISSING)],
            "weights are being downloaded: 100 / 558 MB",
        ),
        (
            [replace(status(FIRST, State.DOWNLOADING, 0), note="another program has it")],
            "weights are being downloaded: 0 / 350 MB another program has it",
        ),
        ([status(FIRST), status(SECOND, State.DOWNLOADING, 52 * MB)], "weights are being downloaded: 52 / 208 MB"),
        ([status(FIRST, State.MISSING), status(SECOND, State.FAILED, error="No room.")], "No room."),
    ],
)
def test_weights(weights, expected):
    assert said("sd15_transparent_attn", weights=weights)[-1] == expected
