"""Prompts longer than what text encoders read at once."""

from collections.abc import Callable, Iterator


def in_chunks(text: str, fits: Callable[[str], bool]) -> list[str]:
    """The text in parts that all fit, as few as that takes, words kept whole; a text that fits stays as it is."""
    if fits(text):
        return [text]
    chunks = [""]
    for word in short_words(text, fits):
        longer = f"{chunks[-1]} {word}".lstrip()
        if fits(longer):
            chunks[-1] = longer
        else:
            chunks.append(word)
    return chunks


def short_words(text: str, fits: Callable[[str], bool]) -> Iterator[str]:
    """Its words; those that do not fit by themselves, such as sentences in Chinese, in halves of halves."""
    for word in text.split():
        if fits(word) or len(word) == 1:
            yield word
        else:
            middle = len(word) // 2
            yield from short_words(f"{word[:middle]} {word[middle:]}", fits)
