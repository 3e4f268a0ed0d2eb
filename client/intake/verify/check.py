"""The independent checker: everything in a folder that looks like an identity.

Without a source it goes by shape and structure; given the source, it looks for the source's own
values as well.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from client.intake.quiet import quiet
from client.intake.verify.finding import Finding, masked
from client.intake.verify.identities import Identities
from client.intake.verify.layout import is_dicom
from client.intake.verify.objects import object_findings
from client.intake.verify.places import Text, content_of, members, runs
from client.intake.verify.search import Hit, Searcher
from client.intake.verify.words import common_words, maker_words, own_words, shapes_in, words_of
from common.cohort import IMAGES_FILE, INDEX_FILE
from common.cohort_seal import SEALED_INDEX, CohortSeal
from common.errors import DataError

FORMAT = 1
_PSEUDONYM = re.compile(r"[0-9a-f]{32}")
# Names of files that say nothing: the product's own, and those made of UIDs and pseudonyms.
_HARMLESS = re.compile(
    r"(?:[0-9a-f]{32,}|2\.25\.\d+|index|images|journal|report|card|preamble)(?:\.[a-z0-9-]{1,12})*"
)
_HEAD, _OVERLAP = 132, 2**12
_FEW_DIGITS = 7
"""Numbers with fewer stand between other bytes by chance."""


@dataclass(frozen=True)
class Settings:
    """What the checker needs to know of what it looks at.

    Attributes:
        said: texts that reports and pages are made of, whose words are no identities there.
        cohort_key: opens the index of a sealed cohort; of its images only the sealed bytes are
            looked at.
        part: bytes that are held at once, of a file that is no DICOM object.
    """

    said: str = ""
    cohort_key: bytes | None = None
    part: int = 2**28


PLAIN = Settings()


@dataclass(frozen=True)
class Verdict:
    """What the checker found.

    Attributes:
        files: how many files it looked into.
        size: their bytes.
        against_source: whether it knew the source's values.
        findings: all of them.
    """

    files: int
    size: int
    against_source: bool
    findings: tuple[Finding, ...]

    def to_json(self) -> str:
        """The record of it: no value, not even masked, and no name of a file that may be one."""
        numbers = {name: number for number, name in enumerate(self._names(), 1)}
        document = {
            "format": FORMAT,
            "files": self.files,
            "bytes": self.size,
            "against_source": self.against_source,
            "findings_by_rule": dict(sorted(self.by_rule().items())),
            "findings": [
                {
                    "file": _recorded(finding.file, numbers[finding.file]),
                    "where": finding.where,
                    "offset": finding.offset,
                    "length": finding.length,
                    "rule": finding.rule,
                    "why": finding.why,
                }
                for finding in self.findings
            ],
        }
        return json.dumps(document, indent=2) + "\n"

    def by_rule(self) -> Counter[str]:
        """Findings by rule."""
        return Counter(finding.rule for finding in self.findings)

    def _names(self) -> list[str]:
        return sorted({finding.file for finding in self.findings})


def _recorded(file: str, number: int) -> str:
    harmless = all(_HARMLESS.fullmatch(part) for part in Path(file).parts)
    return file if harmless else f"file {number} with findings (its name is not shown)"


class Checker:
    """Looks into files one by one.

    Args:
        identities: what the source says of people, if there is a source.
        said: texts that reports and pages are made of, whose words are no identities there.
    """

    def __init__(self, identities: Identities | None = None, said: str = "") -> None:
        self._headers = self._others = None
        if identities is not None:
            self._headers = Searcher(identities, common_words() | maker_words())
            # In prose a surname that is a common word is a word.
            nameless = replace(identities, names=set())
            self._others = Searcher(nameless, own_words() | words_of(said))

    def findings(self, data: bytes, file: str) -> Iterator[Finding]:
        """Everything in one file that looks like an identity.

        Args:
            data: its bytes.
            file: what to call it.
        """
        yield from self._in_name(file)
        yield from self._in_file(data, file, 0)

    def findings_in_part(self, data: bytes, file: str, offset: int) -> Iterator[Finding]:
        """The same for a part of a file that is too large to be held."""
        if Path(file).name != IMAGES_FILE:
            for text in runs(data):
                yield from self._in_text(text._replace(offset=offset + text.offset), file)
        yield from self._in_bytes(data, file, offset)

    def _in_file(self, data: bytes, file: str, depth: int) -> Iterator[Finding]:
        if is_dicom(data):
            yield from object_findings(data, file, self._headers)
            return
        for name, inner in members(data, depth):
            if name:
                yield from self._in_name(f"{file}/{name}")
            yield from self._in_file(inner, f"{file}/{name}" if name else file, depth + 1)
        content = content_of(data, is_index=Path(file).name in (INDEX_FILE, SEALED_INDEX))
        if Path(file).name != IMAGES_FILE:
            for text in content.texts:
                yield from self._in_text(text, file)
        if not content.is_text:
            yield from self._in_bytes(content.data, file, 0)

    def _in_bytes(self, data: bytes, file: str, start: int) -> Iterator[Finding]:
        if self._others is not None:
            for hit in self._others.in_bulk(data):
                value = data[hit.offset : hit.offset + hit.length]
                yield Finding(file, "bytes", start + hit.offset, hit.length, "value of the source",
                              f"{hit.kind} that stands in the source", masked(value))  # fmt: skip

    def _in_text(self, text: Text, file: str) -> Iterator[Finding]:
        if text.pseudonym and text.text and not _PSEUDONYM.fullmatch(text.text):
            why = "expected a keyed pseudonym"
            yield Finding(file, text.where, text.offset, len(text.text), "no pseudonym", why,
                          masked(text.text))  # fmt: skip
        for pattern, match in shapes_in(text.text):
            at = text.offset + match.start()
            yield Finding(file, text.where, at, len(match[0]), pattern.rule, pattern.why,
                          masked(match[0]))  # fmt: skip
        if self._others is None:
            return
        encoded = text.text.encode("utf-8", "replace")
        for hit in (*self._others.in_text(encoded), *_in_bytes(text.text, self._others)):
            if text.is_between and hit.kind == "a number" and hit.length < _FEW_DIGITS:
                continue
            value = encoded[hit.offset : hit.offset + hit.length]
            at = text.offset + hit.offset
            yield Finding(file, text.where, at, hit.length, "value of the source",
                          f"{hit.kind} that stands in the source", masked(value))  # fmt: skip

    def _in_name(self, file: str) -> Iterator[Finding]:
        """The path of a file, all of it."""
        for finding in self._in_text(Text("name of the file", 0, file), file):
            yield replace(finding, offset=-1)


def _in_bytes(text: str, searcher: Searcher) -> Iterator[Hit]:
    """Values with gaps, by the bytes of a text and not by its characters."""
    for hit in searcher.in_letters(text):
        before, found = text[: hit.offset], text[hit.offset : hit.offset + hit.length]
        yield Hit(len(before.encode("utf-8", "replace")), len(found.encode()), hit.kind)


def verify(
    place: Path,
    identities: Identities | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    settings: Settings = PLAIN,
) -> Verdict:
    """Look for identities in everything below a folder, or in one file.

    Args:
        place: a cohort, exported files, the desk of an intake, a report: anything.
        identities: what the source says of people, if there is a source.
        progress: told how many files are done, of how many.
        settings: what it needs to know beside.

    Raises:
        DataError: if there is nothing to look at, a file cannot be read, or a sealed index cannot
            be opened: what nobody has seen is not clean.
    """
    files = [place] if place.is_file() else sorted(_files(place)) if place.is_dir() else []
    if not files:
        raise DataError(f"{place}: there is no file in it; expected a cohort, or files of one")
    checker, size = Checker(identities, settings.said), 0
    found: list[Finding] = []
    for number, path in enumerate(files, 1):
        name = path.name if path == place else str(path.relative_to(place))
        size += _size(path)
        with quiet():
            found += _looked_at(checker, path, name, settings)
        progress(number, len(files))
    return Verdict(len(files), size, identities is not None, tuple(found))


def _looked_at(checker: Checker, path: Path, name: str, settings: Settings) -> Iterator[Finding]:
    """What is in one file; a large one that is no object is looked at part by part."""
    part = settings.part
    try:
        with path.open("rb") as file:
            sealed = path.name == SEALED_INDEX
            whole = sealed or _size(path) <= part or is_dicom(file.read(_HEAD))
            file.seek(0)
            data = file.read(-1 if whole else part)
            if sealed:
                data = CohortSeal.of(path.parent, settings.cohort_key).open_index(data)
            yield from checker.findings(data, name)
            offset = 0
            while len(data) == part and not whole:
                offset += part - _OVERLAP
                file.seek(offset)
                data = file.read(part)
                yield from checker.findings_in_part(data, name, offset)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); run as its owner") from error


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder, hidden ones too; a folder that is not listed is no clean one."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed ({error.strerror}); run as its owner")

    for place, _, names in os.walk(folder, onerror=refuse):
        yield from (Path(place, name) for name in names)


def _size(path: Path) -> int:
    if path.is_symlink() or not path.is_file():
        raise DataError(f"{path}: no regular file; expected none but such in what is checked")
    return path.stat().st_size
