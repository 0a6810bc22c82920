"""Files in texts, as JSON carries them: base64."""

import base64
import string

ALPHABET = bytes.maketrans(b"-_", b"+/")  # that of URLs (RFC 4648, 5) has these two instead


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def decoded(text: str) -> bytes:
    """The file in a base64 text or a data URL, of either alphabet, with or without `=` at its end.

    Raises ValueError where it is none.
    """
    text = text.lstrip("\ufeff" + string.whitespace)
    if text[:5].lower() == "data:":
        text = text.partition(",")[2]
    data = text.encode().translate(ALPHABET, string.whitespace.encode())
    return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
