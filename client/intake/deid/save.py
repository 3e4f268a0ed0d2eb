"""Writing a de-identified object: whole under its own name, or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import BinaryIO

from pydicom.filebase import DicomIO
from pydicom.filewriter import write_dataset, write_file_meta_info

from client.intake.deid.engine import Cleaned
from client.intake.quiet import quiet
from common.errors import IntakeError

_PREFIX = b"DICM"
_BUFFER = 2**20


def save(cleaned: Cleaned, folder: Path) -> Path:
    """Write an object into a folder under a name made of its new UID, mode 0600.

    An object that is there already under that name is replaced: it is the same one.

    Raises:
        IntakeError: if it cannot be encoded or the disk refuses; nothing is left.
    """
    target = folder / cleaned.name
    partial = folder / f".{cleaned.name}.{secrets.token_hex(8)}"
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with quiet(), os.fdopen(descriptor, "wb", buffering=_BUFFER) as file:
            _write(cleaned, file)
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, target)
    except Exception as error:  # noqa: BLE001
        # Of what an encoder says only the kind: it quotes the value that it cannot encode.
        system = isinstance(error, OSError) and error.strerror
        reason = system or f"not encodable, {type(error).__name__}"
        raise IntakeError(f"{target}: cannot be written ({reason})") from None
    finally:
        partial.unlink(missing_ok=True)
    return target


def _write(cleaned: Cleaned, file: BinaryIO) -> None:
    """A file of PS3.10 7.1: as `Dataset.save_as` writes one, but without first copying a header."""
    dataset, out = cleaned.dataset, DicomIO(file)
    out.is_implicit_VR, out.is_little_endian = False, True
    out.write(dataset.preamble or bytes(128))
    out.write(_PREFIX)
    write_file_meta_info(out, dataset.file_meta, enforce_standard=True)
    write_dataset(out, dataset)
