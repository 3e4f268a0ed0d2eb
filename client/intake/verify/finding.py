"""What the checker says: where something stands that may be an identity, and never what it is."""

from __future__ import annotations

from dataclasses import dataclass

_SHOWN = 2


@dataclass(frozen=True)
class Finding:
    """Something that looks like an identity.

    Attributes:
        file: its path within what was searched; it may name a patient itself, so it is for the
            person at the terminal and in no report.
        where: the attribute, the column, or the part of the file.
        offset: of its first byte in the file, or in what the file holds where that is compressed;
            -1 for a name.
        length: bytes.
        rule: what kind of finding it is, in two words or three.
        why: what is wrong with it, without any value.
        masked: two letters of the value at most, and its length.
    """

    file: str
    where: str
    offset: int
    length: int
    rule: str
    why: str
    masked: str = ""


def masked(value: str | bytes) -> str:
    """A value as a person may see it who knows the value already: ``Mü…(9)``.

    Of one with four characters or fewer only the length; of bytes that are no text, too.
    """
    text = value if isinstance(value, str) else value.decode("utf-8", "replace")
    text = text.strip(" \0")
    shown = text[:_SHOWN] if len(text) > 2 * _SHOWN and text[:_SHOWN].isalnum() else ""
    return f"{shown}…({len(text)})"
