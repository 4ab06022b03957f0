"""What anybody may have written to a topic, in a form that can be shown: cut, and always text that JSON can hold.

Nothing here escapes HTML: pages escape all they are given, and JSON answers are never taken for pages.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass

TEXT_CHARACTERS = 4_096
"""Longest text that is shown, 4 KiB of plain letters."""
_SHOWN_BYTES = 4_096
_HEX_BYTES = 1_024
_PARSED_BYTES = 64 * 1_024
"""Longest value that is looked at to see whether it is JSON."""
_DEEPEST = 50
"""How deep JSON may be nested to be shown over several lines: each line is indented by it."""


def shown_text(text: str) -> str:
    """Text for people: no lone surrogates, which JSON has no form for, and cut with a note of how much is left out."""
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode()
    if len(text) <= TEXT_CHARACTERS:
        return text
    left = len(text[TEXT_CHARACTERS:].encode())
    return f"{text[:TEXT_CHARACTERS]}… {left:,} more bytes"


@dataclass(frozen=True, slots=True)
class Content:
    """Bytes of a record: a key, a value, or a header's value.

    Attributes:
        size: how many there are.
        text: as text, cut; None where they are no UTF-8.
        json: the same JSON over several lines, cut; None where it is none, or too large to look at.
        hex: the first KiB, sixteen bytes in a line with their letters.
        base64: the first 4 KiB as they are.
        cut: how many bytes ``base64`` leaves out.
    """

    size: int
    text: str | None
    json: str | None
    hex: str
    base64: str
    cut: int

    @classmethod
    def of(cls, value: bytes | None) -> Content | None:
        """Of a record's bytes; None for null."""
        if value is None:
            return None
        shown = value[:_SHOWN_BYTES]
        return cls(
            size=len(value),
            text=_text(value),
            json=_pretty(value),
            hex=hex_dump(value[:_HEX_BYTES]),
            base64=base64.b64encode(shown).decode(),
            cut=len(value) - len(shown),
        )

    def to_dict(self) -> dict[str, object]:
        """As JSON."""
        return {name: getattr(self, name) for name in ("size", "text", "json", "hex", "base64", "cut")}


def content_of(value: bytes | None) -> dict[str, object] | None:
    """Bytes as JSON; None for null."""
    content = Content.of(value)
    return None if content is None else content.to_dict()


def short_text(value: bytes | None) -> str | None:
    """Bytes in a word, such as a key in a list: what is no UTF-8 is shown as escapes."""
    return None if value is None else shown_text(value[: 2 * TEXT_CHARACTERS].decode("utf-8", "backslashreplace"))[:200]


def _text(value: bytes) -> str | None:
    """The text that they are; what holds a zero is none. Cut first: a megabyte is not decoded for its first 4 KiB."""
    if b"\0" in value[:_SHOWN_BYTES]:
        return None
    if len(value) <= _SHOWN_BYTES:
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return None
    beginning = value[:_SHOWN_BYTES]
    try:
        text = beginning.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(beginning) - 3:  # not just a character that the cut went through
            return None
        beginning = beginning[: error.start]
        text = beginning.decode("utf-8")
    return f"{text}… {len(value) - len(beginning):,} more bytes"


def _pretty(value: bytes) -> str | None:
    """The JSON that it is, over several lines. Written only as far as it is shown: whoever wrote it may have nested it
    so that a few KB became hundreds of MB of indentation (ran: 240 KB took 8 s and 640 MB).
    """
    if len(value) > _PARSED_BYTES:
        return None
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return None
    if _is_deeper(parsed, _DEEPEST):
        return None
    written, length = [], 0
    for part in json.JSONEncoder(indent=2, ensure_ascii=False).iterencode(parsed):
        written.append(part)
        length += len(part)
        if length > TEXT_CHARACTERS:
            return f"{shown_text(''.join(written)[:TEXT_CHARACTERS])}… and more"
    return shown_text("".join(written))


def _is_deeper(value: object, levels: int) -> bool:
    """Whether lists and objects lie in each other deeper than that."""
    if not isinstance(value, (dict, list)) or not value:
        return False
    parts = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(part, levels - 1) for part in parts)


def hex_dump(value: bytes) -> str:
    """Sixteen bytes in a line, with their letters where they have some."""
    lines = []
    for start in range(0, len(value), 16):
        part = value[start : start + 16]
        letters = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
        lines.append(f"{start:08x}  {part.hex(' '):<47}  {letters}")
    return "\n".join(lines)
