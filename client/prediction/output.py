"""The files of a prediction: whole or not at all, and for their owner's eyes alone.

They name patients: that is what a hospital needs of them. So the folder has mode 0700 and its
files 0600, and no file is named by anything that stood in a DICOM file.

``predictions.json``  format, model, warnings, and every image, study and refused object
``predictions.csv``   one line an image
``studies.csv``       one line a study
``refused.csv``       one line an object that was not answered, with the reason
``not_made.csv``      one line a report or segmentation that could not be made, with the reason

Memory does not grow with the number of images: rows go to the disk as they come.
"""

from __future__ import annotations

import csv
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self, TextIO

from common.errors import ConfigError, RunError
from common.files import disk_refuses, flush_folder, locked

FORMAT = "cloister predictions 1"
JSON_FILE = "predictions.json"
CSV_FILES = {
    "images": "predictions.csv",
    "studies": "studies.csv",
    "refused": "refused.csv",
    "not_made": "not_made.csv",
}
PARTS = tuple(CSV_FILES)

_FORMULAS = (*"=+-@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_WORKING = ".predicting"


class Results:
    """A folder of results that grows, under its name only when `finish` has put it there.

    Args:
        folder: where its parts are written.
        columns: of each part's CSV.
        every: cells that each line has, where there is a column for them.
    """

    def __init__(
        self, folder: Path, columns: Mapping[str, Sequence[str]], every: Mapping[str, str]
    ) -> None:
        self.folder = folder
        self._every = dict(every)
        self._columns = columns
        self._open = ExitStack()
        self._files: list[TextIO] = []
        self._spools = {part: self._file(f"{part}.jsonl") for part in PARTS}
        self._tables = {part: csv.writer(self._file(name)) for part, name in CSV_FILES.items()}
        for part, table in self._tables.items():
            table.writerow(map(safe, columns[part]))

    @classmethod
    @contextmanager
    def at(
        cls, target: Path, columns: Mapping[str, Sequence[str]], every: Mapping[str, str]
    ) -> Iterator[Self]:
        """Results that have the name `target` when the body has ended well, and else are gone.

        Raises:
            ConfigError: if there is something already, or nothing can be written there.
            RunError: if the disk is full.
        """
        check_target(target)
        try:
            _clear(target)
            folder = Path(tempfile.mkdtemp(_WORKING, f".{target.name}.", target.parent))
        except OSError as error:
            raise ConfigError(f"{target}: cannot be written ({error.strerror})") from error
        try:
            with locked(folder):
                results = cls(folder, columns, every)
                with results._open:
                    yield results
                flush_folder(folder)
                if os.path.lexists(target):
                    raise ConfigError(f"{target}: has come to be meanwhile; nothing was put there")
                folder.rename(target)
            flush_folder(target.parent)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if full := disk_refuses(error):
                raise RunError(f"{target}: {full}; nothing was put there") from error
            raise

    def add(self, part: str, row: Mapping[str, Any]) -> bool:
        """Write one row of a part.

        Returns:
            False, and nothing is written, if it holds a number that is none.
        """
        try:
            line = json.dumps(row, allow_nan=False)
        except ValueError:
            return False
        self._spools[part].write(line + "\n")
        flat = self._every | dict(flattened(row))
        self._tables[part].writerow(safe(flat.get(name)) for name in self._columns[part])
        return True

    def write(self, name: str, content: bytes) -> None:
        """Write a file of its own, such as ``sr/1.dcm``."""
        path = self.folder / name
        path.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def finish(self, head: Mapping[str, Any]) -> None:
        """Put ``predictions.json`` together: `head`, then the rows."""
        with os.fdopen(self._new(JSON_FILE), "w", encoding="utf-8") as file:
            file.write("{\n")
            for key, value in head.items():
                file.write(f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)},\n")
            for part in PARTS:
                self._spools[part].flush()
                file.write(f' "{part}": [\n')
                file.writelines(_joined(self.folder / f"{part}.jsonl"))
                file.write(" ]\n" if part == PARTS[-1] else " ],\n")
            file.write("}\n")
            file.flush()
            os.fsync(file.fileno())
        for part in PARTS:
            (self.folder / f"{part}.jsonl").unlink()
        for written in self._files:
            written.flush()
            os.fsync(written.fileno())

    def _file(self, name: str) -> TextIO:
        # The name of a file may be no text in UTF-8, and no file may stop the others.
        opened = os.fdopen(
            self._new(name), "w", encoding="utf-8", errors="backslashreplace", newline=""
        )
        self._files.append(opened)
        return self._open.enter_context(opened)

    def _new(self, name: str) -> int:
        return os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)


def check_target(target: Path) -> None:
    """See, before the work is done, that results can be put there.

    Raises:
        ConfigError: if there is something already, or no folder for it.
    """
    if os.path.lexists(target) or not target.parent.is_dir():
        raise ConfigError(
            f"{target}: results cannot be put there; expected a new name in a folder that is there"
        )


def flattened(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A row's cells by column: ``probability {opacity}`` for what is told by class."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from ((f"{key} {{{name}}}", inner) for name, inner in value.items())
        elif isinstance(value, list):
            yield key, len(value) if key == "boxes" else "; ".join(value)
        else:
            yield key, value


def safe(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula (CWE-1236): a text gets a quote before it."""
    if isinstance(value, str) and (value[:1].isspace() or value.startswith(_FORMULAS)):
        return f"'{value}"
    return value


def _joined(spool: Path) -> Iterable[str]:
    """The lines of a spool as the entries of a JSON list."""
    with spool.open(encoding="utf-8") as lines:
        before = ""
        for line in lines:
            yield f"{before}  {line.rstrip()}"
            before = ",\n"
        if before:
            yield "\n"


def _clear(target: Path) -> None:
    """Remove what a killed prediction has left: no process holds it any more."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*{_WORKING}"):
        with suppress(OSError), locked(left):
            shutil.rmtree(left, ignore_errors=True)
