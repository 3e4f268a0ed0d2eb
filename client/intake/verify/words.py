"""Which words and shapes of text say nothing of a person, and which look as if they did."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, NamedTuple

from pydicom._dicom_dict import DicomDictionary, RepeatersDictionary
from pydicom._uid_dict import UID_dictionary
from pydicom.sr import _concepts_dict

SHORTEST = 4
"""Letters of the shortest word, and digits of the shortest number, that may name somebody."""
LETTERS = re.compile(r"[^\W\d_]+")
_DIGITS = re.compile(r"\d+")
_MOST_DIGITS = 4
_STANDARDS = re.compile(r"ISO[ _]\d{4,5}|ISO[ _]2022|PS3\.\d+|\b20\d\d[a-e]\b")
_OURS = ("py", "j2", "css")
_UUID_ROOT = "2.25."
_UUID_MOST = 2**128


class Pattern(NamedTuple):
    """A shape of text that looks like an identity."""

    rule: str
    why: str
    form: re.Pattern[str]


_SHAPES = (
    Pattern(
        "e-mail address",
        "it has the shape of an e-mail address",
        re.compile(r"(?<![\w.@])\w[\w.+-]{0,63}@[\w-]{1,63}(?:\.[\w-]{1,63})*\.[A-Za-z]{2,}"),
    ),
    Pattern(
        "address of a page",
        "it has the shape of a URL",
        re.compile(
            r"\b(?:https?|ftp|file)://(?!(?:www\.w3\.org|localhost|127\.0\.0\.1)\b)[^\s\"'<>]{3,}"
            r"|\bwww\.(?!w3\.org)[\w-]+\.[\w.-]+"
        ),
    ),
    Pattern(
        "social security number",
        "it has the shape of a social security number",
        re.compile(r"(?<![\w.-])\d{3}-\d{2}-\d{4}(?![\w-])"),
    ),
    Pattern(
        "telephone number",
        "it has the shape of a telephone number",
        re.compile(
            r"(?<![\w.])\+\d{1,3}[ ()/-]{0,2}\d(?:[ ()/-]?\d){6,12}(?![\w.])"
            r"|(?<![\w.-])\(?\d{3}\)?[ -]\d{3}-\d{4}(?![\w-])"
            r"|(?<![\w.-])0\d{2,4}[ /-]{1,3}\d{5,8}(?![\w.-])"
        ),
    ),
    Pattern(
        "name",
        "it has the shape of a person's name",
        re.compile(r"(?<![\w^])[^\W\d_]{2,}\^[^\W\d_]{2,}"),
    ),
)
_DATES = Pattern(
    "date in a text",
    "it has the shape of a date",
    re.compile(
        r"(?<!\d)(?:18|19|20)\d\d(?:[-./ ]?)(?:0[1-9]|1[0-2])(?:[-./ ]?)(?:0[1-9]|[12]\d|3[01])"
        r"(?!\d)|(?<!\d)(?:0?[1-9]|[12]\d|3[01])[-./](?:0?[1-9]|1[0-2])[-./](?:18|19|20)?\d\d(?!\d)"
    ),
)
_UIDS = re.compile(r"(?<![\w.])[0-2](?:\.(?:0|[1-9]\d*)){5,}(?![\w.])")


def shapes_in(text: str) -> Iterator[tuple[Pattern, re.Match[str]]]:
    """What in a text has the shape of an identity, whatever the text is about."""
    for pattern in _SHAPES:
        yield from ((pattern, match) for match in pattern.form.finditer(text))
    for match in _UIDS.finditer(text):
        if not is_neutral_uid(match[0]):
            yield Pattern("UID", "it is neither the standard's nor made of a UUID", _UIDS), match


def dates_in(text: str) -> Iterator[tuple[Pattern, re.Match[str]]]:
    """What in a text has the shape of a date."""
    yield from ((_DATES, match) for match in _DATES.form.finditer(text))


def is_neutral_uid(uid: str) -> bool:
    """Whether a UID is the standard's own (PS3.6 annex A), or a UUID (PS3.5 B.2)."""
    if uid in UID_dictionary:
        return True
    number = uid.removeprefix(_UUID_ROOT)
    return uid.startswith(_UUID_ROOT) and number.isdecimal() and int(number) < _UUID_MOST


@cache
def common_words() -> frozenset[str]:
    """Words of the standard's names for attributes, and of `words.txt`; in lower case."""
    rows = (*DicomDictionary.values(), *RepeatersDictionary.values())
    names = " ".join(f"{name} {keyword}" for _, _, name, _, keyword in rows)
    return frozenset(word.lower() for word in LETTERS.findall(names)) | listed_words()


def listed_words() -> frozenset[str]:
    """Words of `words.txt` that are nobody's name."""
    return _sections()["words"]


@cache
def maker_words() -> frozenset[str]:
    """Words of the names of makers, some of which are people's names as well."""
    return _sections()["makers"]


@cache
def class_words() -> frozenset[str]:
    """Words of the standard's names for UIDs, in lower case."""
    names = " ".join(f"{entry[0]} {entry[4]}" for entry in UID_dictionary.values())
    return frozenset(word.lower() for word in LETTERS.findall(names))


def words_of(text: str) -> frozenset[str]:
    """The words of a text, in lower case."""
    return frozenset(word.lower() for word in LETTERS.findall(text))


@cache
def own_words() -> frozenset[str]:
    """Words that the intake itself is written in: its journal and its reasons are made of them.

    They excuse nothing in a header.
    """
    texts = (file.read_text(encoding="utf-8") for file in _sources(files("client.intake")))
    ours = words_of("\n".join(texts)) | _sections()["figures"]
    return common_words() | maker_words() | class_words() | ours


def _sources(folder: Traversable) -> Iterator[Traversable]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _sources(entry)
        elif entry.name.rpartition(".")[2] in _OURS:
            yield entry


@cache
def code_meaning(scheme: str, value: str) -> tuple[str, ...]:
    """What the standard's context groups call a code; nothing if they do not have it."""
    return _codes().get((_SCHEMES.get(scheme, scheme), value), ())


_SCHEMES = {"SNM3": "SRT", "99SDM": "SRT"}


@cache
def _codes() -> dict[tuple[str, str], tuple[str, ...]]:
    from pydicom.sr import _snomed_dict  # noqa: PLC0415

    found: dict[tuple[str, str], tuple[str, ...]] = {}
    concepts: Any = _concepts_dict.concepts
    for scheme, named in concepts.items():
        for values in named.values():
            for value, (meaning, _) in values.items():
                found[scheme, value] = (*found.get((scheme, value), ()), meaning)
    for retired, current in _snomed_dict.mapping["SRT"].items():
        found.setdefault(("SRT", retired), found.get(("SCT", current), ()))
    return found


def strange_words(text: str, known: frozenset[str]) -> Iterator[re.Match[str]]:
    """Words of a text that are on no list, and numbers that count or measure nothing."""
    bare = _STANDARDS.sub(lambda match: " " * len(match[0]), text)
    for match in LETTERS.finditer(bare):
        long = len(match[0]) >= SHORTEST or not match[0].isascii()
        if long and match[0].lower() not in known:
            yield match
    for match in _DIGITS.finditer(bare):
        if len(match[0].lstrip("0")) > _MOST_DIGITS:
            yield match


@cache
def _sections() -> dict[str, frozenset[str]]:
    found: dict[str, list[str]] = {}
    words: list[str] = []
    text = (files(__package__) / "words.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("["):
            found[line.strip("[]")] = words = []
        elif not line.startswith("#"):
            words += line.split()
    return {heading: frozenset(words) for heading, words in found.items()}
