"""A batch made to fit whole pictures."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_layerdiffuse.webui.batches import Row, fitted


@pytest.mark.parametrize(
    ("frames", "batch_size", "batches", "new_size", "total"),
    [
        (3, 1, 1, 3, 3),
        (3, 2, 1, 3, 3),
        (3, 3, 1, 3, 3),
        (3, 4, 1, 6, 6),
        (3, 7, 1, 9, 9),
        (2, 1, 1, 2, 2),
        (2, 2, 1, 2, 2),
        (2, 3, 1, 4, 4),
        (1, 4, 1, 4, 4),
        (3, 1, 2, 3, 6),
        (3, 4, 3, 6, 18),
        (2, 3, 2, 4, 8),
    ],
)
def test_alike_rows_fill_every_batch_with_seeds_running_on(
    frames: int, batch_size: int, batches: int, new_size: int, total: int
) -> None:
    size, rows = fitted(["a cat"] * batch_size * batches, batch_size, frames)
    assert size == new_size
    assert rows == [Row(source=0, ahead=ahead) for ahead in range(total)]


@pytest.mark.parametrize(
    ("prompts", "batch_size", "frames", "new_size", "expected"),
    [
        ("ab", 2, 2, 2, [(0, 0), (0, 1), (1, 0), (1, 1)]),
        ("ab", 1, 3, 3, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]),
        ("aab", 3, 2, 4, [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]),
        ("ab", 2, 1, 2, [(0, 0), (1, 0)]),
    ],
)
def test_rows_that_differ_get_a_picture_each_with_its_frames_adjacent(
    prompts: str, batch_size: int, frames: int, new_size: int, expected: list[tuple[int, int]]
) -> None:
    size, rows = fitted(prompts, batch_size, frames)
    assert size == new_size
    assert [(row.source, row.ahead) for row in rows] == expected


@st.composite
def jobs(draw: st.DrawFn) -> tuple[list[str], int]:
    """The prompts of a job, and its batch size."""
    batch_size, batches = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    count = batch_size * batches
    return draw(st.lists(st.sampled_from("ab"), min_size=count, max_size=count)), batch_size


@settings(deadline=None)
@given(jobs(), st.integers(1, 4))
def test_every_row_of_a_job_is_in_whole_pictures(job: tuple[list[str], int], frames: int) -> None:
    prompts, batch_size = job
    size, rows = fitted(prompts, batch_size, frames)
    assert size % frames == 0
    assert size - frames < batch_size <= size
    assert len(rows) % frames == 0
    assert len(rows) >= len(prompts)
    made = {row.source for row in rows}
    assert made == ({0} if len(set(prompts)) == 1 else set(range(len(prompts))))
    for start in range(0, len(rows), frames):  # batches are whole pictures too, so a picture is in one batch
        first, *others = rows[start : start + frames]
        assert others == [Row(first.source, first.ahead + frame) for frame in range(1, frames)]
    assert len(set(rows)) == len(rows)  # no picture twice
