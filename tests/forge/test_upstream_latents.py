"""Our latents against those that the existing extension gave in the same Forge, recorded by record_upstream.py."""

import pytest

from tests.forge import data
from tests.forge.upstream_cases import CASES, Case, latents, read_table

# SD1.5 computes in single precision. For SDXL the additions are merged into half-precision weights, and rounding grows.
TOLERANCE = {"sd15": 1e-3, "sdxl": 2e-2}


def relative_error(ours, theirs):
    largest = max(abs(value) for value in theirs)
    return max(abs(a - b) for a, b in zip(ours, theirs)) / largest


@pytest.fixture(scope="module")
def table():
    table = read_table()
    assert table["generator_version"] == data.GENERATOR_VERSION, "record the table again: the model files have changed"
    return {Case(**entry["case"]): entry["latents"] for entry in table["entries"]}


def marks(case):
    """Quick is the first case of each method."""
    if case.checkpoint == "sdxl":
        yield pytest.mark.sdxl
    if case is not next(first for first in CASES if first.method == case.method):
        yield pytest.mark.full


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=list(marks(case))) for case in CASES],
)
def test_latents_are_those_of_the_existing_extension(forge, table, case):
    expected = table[case]
    ours = latents(forge, case)
    errors = [relative_error(a["values"], b["values"]) for a, b in zip(ours, expected)]
    forge.notes.append(f"{case.name}: relative error {max(errors):.1e}")
    assert [latent["shape"] for latent in ours] == [latent["shape"] for latent in expected]
    assert max(errors) <= TOLERANCE[case.checkpoint]
    for statistic in ("mean", "std", "min", "max"):
        values = [[latent[statistic] for latent in side] for side in (ours, expected)]
        scale = max(abs(latent["max"]) for latent in expected)
        assert max(abs(a - b) for a, b in zip(*values)) <= TOLERANCE[case.checkpoint] * scale, statistic
