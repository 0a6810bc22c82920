"""A batch made to fit: whole pictures only, whatever the number of frames that each consists of."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True)
class Row:
    """One frame to sample: which row of the job it continues, and by how many seeds."""

    source: int
    ahead: int


def rounded(batch_size: int, frames: int) -> int:
    """The batch size that holds whole pictures."""
    return ceil(batch_size / frames) * frames


def fitted(rows: Sequence[Hashable], batch_size: int, frames: int) -> tuple[int, list[Row]]:
    """The batch size rounded up to whole pictures, and the rows of all batches.

    rows: what each row of the job is made from, apart from its seed if that runs on from the first one's. Where all are
    alike, more of the same are made until every batch is full, their seeds running on. Where they differ, as in a list
    of prompts, each gets a picture of its own.
    """
    size = rounded(batch_size, frames)
    if len(set(rows)) == 1:
        batches = ceil(len(rows) / batch_size)
        return size, [Row(0, ahead) for ahead in range(size * batches)]
    return size, [Row(source, frame) for source in range(len(rows)) for frame in range(frames)]
