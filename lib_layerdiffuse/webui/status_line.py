"""What a press of Generate will do with the panel as it is: said there before it happens.

Sentences are tuples of pieces, because web UIs translate a page piece by piece: words that stand alone, and what is
between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

from lib_layerdiffuse.methods import Family, Method
from lib_layerdiffuse.webui.batches import rounded
from lib_layerdiffuse.weights.downloads import State, Status
from lib_layerdiffuse.weights.released import MB

Sentence: TypeAlias = tuple[str, ...]


def forecast(method: Method, batch_size: int, weights: Sequence[Status], family: Family | None) -> Iterator[Sentence]:
    """The sentences. weights: of the files that the method needs; family: of the chosen checkpoint, where known."""
    if family not in (None, method.family):
        assert family is not None
        yield ("needs a checkpoint of this kind:", method.family.word, "– the chosen one is", family.word)
    words = ("images per picture:" if method.frames > 1 else "image per picture:",)
    yield (str(method.frames), *words, *separated([layer.word for layer in method.outputs]))
    if method.chain:
        yield (str(len(method.chain)), "runs, one after the other")
    elif batch_size % method.frames:
        yield ("batch size", str(batch_size), "becomes", str(rounded(batch_size, method.frames)))
    yield weights_sentence(weights)


def separated(words: Sequence[str]) -> Iterator[str]:
    for i, word in enumerate(words):
        yield from (("·",) if i else ())
        yield word


def weights_sentence(weights: Sequence[Status]) -> Sentence:
    """Whether all are there, and how much of the others is."""
    absent = [status for status in weights if status.state is not State.PRESENT]
    if not absent:
        return ("weights are present",)
    for status in absent:
        if status.state is State.FAILED:
            return (status.error,)
    received, total = (sum(sizes) / MB for sizes in zip(*((status.received, status.total) for status in absent)))
    if any(status.state is State.DOWNLOADING for status in absent):
        notes = [status.note for status in absent if status.note]
        return ("weights are being downloaded:", f"{received:.0f} / {total:.0f} MB", *notes[:1])
    return ("weights are not here yet:", f"{total:.0f} MB")
