"""Long prompts in parts that text encoders can read."""

import pytest

from lib_layerdiffuse.engine.prompts import in_chunks


def fits(text: str) -> bool:
    """A reader that takes ten letters."""
    return len(text.replace(" ", "").replace("\n", "")) <= 10


@pytest.mark.parametrize(
    ("text", "chunks"),
    [
        ("", [""]),
        ("  short,\n one ", ["  short,\n one "]),
        ("abcde fghij klmno", ["abcde fghij", "klmno"]),
        ("abcdef ghijkl mnopqr", ["abcdef", "ghijkl", "mnopqr"]),
        ("a glass ball, red,\nround and large", ["a glass", "ball, red,", "round and", "large"]),
        ("玻璃瓶高质量透明背景正中间", ["玻璃瓶高质量", "透明背景正中间"]),
        ("a 玻璃瓶高质量透明背景正中间 b", ["a 玻璃瓶高质量", "透明背景正中间 b"]),
        ("abcdefghij" * 3, ["abcdefg", "hijabcde", "fghijab", "cdefghij"]),
    ],
)
def test_words_stay_whole_and_all_are_read(text: str, chunks: list[str]) -> None:
    assert in_chunks(text, fits) == chunks
    assert "".join("".join(chunks).split()) == "".join(text.split())


def test_a_letter_that_does_not_fit_is_left_as_it_is() -> None:
    assert in_chunks("ab", lambda text: not text) == ["", "a", "b"]
