"""Files in texts."""

import pytest

from lib_layerdiffuse.images.encoding import decoded, encoded

FILE = bytes(range(256)) * 3 + b"\xff\xef\xbe"
TEXT = encoded(FILE + b"\n")
assert "+" in TEXT and "/" in TEXT and TEXT[-2:] == "=="


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        TEXT.rstrip("="),
        TEXT.replace("+", "-").replace("/", "_"),
        "\n".join(TEXT[start : start + 76] for start in range(0, len(TEXT), 76)) + "\r\n",
        f"data:image/png;base64,{TEXT}",
        f"DATA:image/png;BASE64,{TEXT}",
        f" \n\ufeffdata:;base64, {TEXT}",
        f"\ufeff{TEXT}",
    ],
)
def test_a_file_in_a_text(text):
    assert decoded(text) == FILE + b"\n"


@pytest.mark.parametrize(
    "text", ["AAAA*", "AAAAA", "data:image/png;base64,AA*A", "A\u0410AA", "AA\ud800A", "AA=A", "%2BAAA"]
)
def test_no_file_in_a_text(text):
    with pytest.raises(ValueError):  # noqa: PT011
        decoded(text)
