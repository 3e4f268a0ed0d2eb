"""What a value may be outside of the profile's table: listed numbers, words, codes and UIDs.

An attribute's name alone does not make its value harmless: an IS may hold a record number and a
CS a surname. So the lists are of values, and for numbers of attributes with a largest value.
"""

from __future__ import annotations

import csv
from functools import cache
from importlib.resources import files
from typing import Any

from pydicom.sr import _concepts_dict, _snomed_dict
from pydicom.uid import UID

NUMBERS_FILE, TERMS_FILE = "numbers.csv", "terms.txt"
# Headings of `terms.txt` with the words that descriptions are made of. Makers have people's names.
_DESCRIPTIVE = (
    "image type",
    "modalities",
    "positions and directions",
    "magnetic resonance",
    "ultrasound",
    "body parts",
)
_NAMES = frozenset({"MAX", "MAT"})
_LONGEST = 64
"""Characters of a code meaning, which is an LO (PS3.5 6.2)."""
# Names of SNOMED RT in DICOM (PS3.16 8.1).
_SNOMED_RT = ("SRT", "SNM3", "99SDM")


@cache
def largest_numbers() -> dict[str, float]:
    """Keyword of each attribute whose numbers are kept, with the largest magnitude."""
    text = (files(__package__) / NUMBERS_FILE).read_text(encoding="utf-8")
    return {line["keyword"]: float(line["largest"]) for line in csv.DictReader(text.splitlines())}


@cache
def _sections() -> dict[str, frozenset[str]]:
    """The words of `terms.txt` by the heading that they stand under."""
    found: dict[str, list[str]] = {}
    words: list[str] = []
    text = (files(__package__) / TERMS_FILE).read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("["):
            found[line.strip("[]").partition(":")[0]] = words = []
        elif not line.startswith("#"):
            words += (word.replace("|", " ") for word in line.split())
    return {heading: frozenset(words) for heading, words in found.items()}


@cache
def terms() -> frozenset[str]:
    """Every word of `terms.txt`."""
    return frozenset().union(*_sections().values())


@cache
def _single_words() -> frozenset[str]:
    """What a word of a description may be: a part of a term, in upper case, that names nobody."""
    described = (_sections()[heading] for heading in _DESCRIPTIVE)
    terms = (term.upper().replace("_", " ") for words in described for term in words)
    return frozenset(part for term in terms for part in term.split() if len(part) > 1) - _NAMES


def words_of(description: str) -> str:
    """Of a free text, the words that are technical terms, in upper case and in their order.

    Digits are no words: a number in a text may be a date, an age or a record number.
    """
    spaced = "".join(letter if letter.isalnum() else " " for letter in description.upper())
    return " ".join(word for word in spaced.split() if word in _single_words() and _wordlike(word))


def _wordlike(word: str) -> bool:
    return any(letter.isalpha() for letter in word)


@cache
def _meanings() -> dict[tuple[str, str], str]:
    """The meaning of every code of the standard's context groups, by scheme and value."""
    concepts: Any = _concepts_dict.concepts
    found = {
        (scheme, value): meaning
        for scheme, named in concepts.items()
        for values in named.values()
        for value, (meaning, _) in values.items()
    }
    for retired, current in _snomed_dict.mapping["SRT"].items():
        if meaning := found.get(("SCT", current), ""):
            found |= {(scheme, retired): meaning for scheme in _SNOMED_RT}
    return found


def meaning_of(scheme: str, value: str) -> str:
    """The meaning of a code that the standard uses, from the standard; empty for any other."""
    return _meanings().get((scheme, value), "")[:_LONGEST]


def is_known_uid(uid: str) -> bool:
    """Whether the standard itself has registered a UID (PS3.6 annex A)."""
    return UID(uid).name != uid
