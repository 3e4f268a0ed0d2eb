"""One DICOM file of unknown origin (PS3.10): its header, then single frames, trusted with nothing.

A file may be damaged or hostile. Its claims (lengths, sizes, frames, what an embedded codestream
says of itself) are checked against the file and against `Limits` before memory is asked for. What
parsers and codecs still raise on broken bytes is for the caller to turn into a reason.
"""

from __future__ import annotations

import io
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.filereader import read_dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import as_pixel_options, get_expected_length
from pydicom.tag import BaseTag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from client.intake.codestream import claimed_size
from client.intake.deidentify import counted, quoted, registered_name, text_of
from common.errors import IntakeError

_PREFIX_AT, _PREFIX = 128, b"DICM"
_META_GROUP, _FIRST_GROUPS = 0x0002, {0x0002, 0x0008}
_ORDERS: tuple[Literal["little", "big"], ...] = ("little", "big")
_FLOAT, _DOUBLE, _INTEGER = 0x7FE00008, 0x7FE00009, 0x7FE00010
_PIXELS = {_FLOAT: "FloatPixelData", _DOUBLE: "DoubleFloatPixelData", _INTEGER: "PixelData"}
_FLOAT_BYTES = {"FloatPixelData": 4, "DoubleFloatPixelData": 8}
_UNDEFINED = 0xFFFFFFFF
_SMALL = 2**12
"""Bytes that may be asked for whether they are there or not."""
CLOSED_FOLDER = "a link to a folder, or a folder that cannot be listed: nobody looked into it"
_DIRECTORY = "1.2.840.10008.1.3.10"
# Names that the standard (PS3.6 annex A) has given since pydicom's dictionary was made.
_NEWER_SYNTAXES = {
    "1.2.840.10008.1.2.4.110": "JPEG XL Lossless",
    "1.2.840.10008.1.2.4.111": "JPEG XL JPEG Recompression",
    "1.2.840.10008.1.2.4.112": "JPEG XL",
    "1.2.840.10008.1.2.8.1": "Deflated Image Frame Compression",
}


@dataclass(frozen=True)
class Limits:
    """How much a single file may ask for.

    ``frame_samples`` and ``samples`` are rows x columns x samples a pixel, of one frame and of
    all; ``stored_bytes`` is what all frames of one file may take in the cohort; ``read_bytes``
    bounds a single value, and a deflated data set as a whole.
    """

    frame_samples: int = 2**26
    samples: int = 2**34
    stored_bytes: int = 2**30
    read_bytes: int = 2**29


class Directory(Exception):  # noqa: N818
    """A DICOMDIR: it lists files and is none."""


class Geometry(NamedTuple):
    """Rows, columns, samples a pixel, and frames; each at least 1."""

    rows: int
    columns: int
    samples: int
    frames: int


class PixelElement(NamedTuple):
    """Where a file's pixel data stands: keyword, VR (None if implicit), first byte, length."""

    keyword: str
    representation: str | None
    start: int
    length: int


class BoundedFile(io.BufferedReader):
    """A file in which a lying length reads no more than is there, and never more than a limit.

    Raises:
        IntakeError: if it is not a regular file.
    """

    def __init__(self, path: Path, limit: int) -> None:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise IntakeError(CLOSED_FOLDER if stat.S_ISDIR(mode) else "not a regular file")
        super().__init__(io.FileIO(path))
        self._limit = limit
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        """Read at most `size` bytes.

        Raises:
            IntakeError: if that many are there and they are above the limit.
        """
        if size is not None and 0 <= size <= _SMALL:
            return super().read(size)
        left = max(0, self._size - self.tell())
        wanted = left if size is None or size < 0 else min(size, left)
        if wanted > self._limit:
            raise IntakeError(f"one value has {wanted} bytes; at most {self._limit} are read")
        return super().read(wanted)


@dataclass(frozen=True)
class DicomFile:
    """An opened file: the header is read, the pixels are not."""

    stream: BinaryIO
    header: Dataset
    syntax: UID

    @classmethod
    def parse(cls, stream: BinaryIO, limits: Limits) -> DicomFile:
        """Read the header of a file, with or without preamble and file meta information.

        Raises:
            IntakeError: if it is not DICOM.
            Directory: if it is a DICOMDIR.
        """
        meta = _file_meta(stream)
        syntax = UID(meta.get("TransferSyntaxUID") or "")
        if str(meta.get("MediaStorageSOPClassUID")) == _DIRECTORY:
            raise Directory
        if syntax == DeflatedExplicitVRLittleEndian:
            inflated = io.BytesIO(_inflate(stream.read(), limits.read_bytes))
            header = read_dataset(inflated, False, True, stop_when=_at_pixels)
            return cls(inflated, header, ExplicitVRLittleEndian)
        stream.seek(0)
        header = dcmread(stream, stop_before_pixels=True, force=True)
        if "SOPClassUID" not in header and "Rows" not in header:
            raise IntakeError("not a DICOM file")
        return cls(stream, header, syntax or _native_syntax(*header.original_encoding))

    def geometry(self, limits: Limits) -> Geometry:
        """What the header claims.

        Raises:
            IntakeError: if a number is missing or not one, or they are above the limits.
        """
        rows, columns = _count(self.header, "Rows"), _count(self.header, "Columns")
        samples = _count(self.header, "SamplesPerPixel", 1)
        frames = _count(self.header, "NumberOfFrames", 1)
        one = rows * columns * samples
        if one > limits.frame_samples or one * frames > limits.samples:
            raise IntakeError(
                f"it claims {counted(frames)} frames of {counted(rows)} x {counted(columns)} x "
                f"{counted(samples)} samples; "
                f"at most {limits.frame_samples} a frame and {limits.samples} in all"
            )
        return Geometry(rows, columns, samples, frames)

    def pixel_element(self) -> PixelElement:
        """Where the pixels are. Ask once, straight after `parse` (PS3.5 7.1.2).

        The header's own encoding counts, for some files are in another than they say.

        Raises:
            IntakeError: if there are none, or they are in a coding that is not read.
        """
        _check_decodable(self.syntax)
        implicit, little = self.header.original_encoding
        head = self.stream.read(12)
        order: Literal["little", "big"] = "big" if little is False else "little"
        group, element = (int.from_bytes(head[at : at + 2], order) for at in (0, 2))
        keyword = _PIXELS.get((group << 16) + element)
        if keyword is None or len(head) < 12:
            raise IntakeError(f"it has no pixel data ({_class_name(self.header)})")
        if implicit:
            start = self.stream.seek(-4, os.SEEK_CUR)
            return PixelElement(keyword, None, start, int.from_bytes(head[4:8], order))
        name = head[4:6].decode("ascii", errors="replace")
        return PixelElement(keyword, name, self.stream.tell(), int.from_bytes(head[8:], order))


@dataclass(frozen=True)
class FrameDecoder:
    """Decodes single frames of a file; memory is that of one frame.

    Args:
        file: just parsed.
        element: its pixel data.
        geometry: what its header claims.
        unused_bits: leave the bits that the header does not describe as they are, for whoever
            masks them; else they are what the standard wants.

    Raises:
        IntakeError: if pixels of this kind cannot be decoded here, or are not all there.
    """

    file: DicomFile
    element: PixelElement
    geometry: Geometry
    unused_bits: bool = False

    def __post_init__(self) -> None:
        _check_decodable(self.file.syntax)
        if not self.file.syntax.is_encapsulated:
            self._check_complete()

    def __call__(self, frame: int) -> NDArray[Any]:
        """Decode frame number `frame`.

        Returns:
            (rows, columns), or (rows, columns, samples) with YBR turned into RGB.

        Raises:
            IntakeError: if the codestream claims another size than the header.
        """
        file, element = self.file, self.element
        options: dict[str, Any] = {"pixel_keyword": element.keyword}
        if element.representation:
            options["pixel_vr"] = element.representation
        if self.unused_bits:
            options["correct_unused_bits"] = False
        options = as_pixel_options(file.header, transfer_syntax_uid=file.syntax, **options)
        if file.syntax.is_encapsulated:
            self._check_claim(frame, options.get("extended_offsets"))
        file.stream.seek(element.start)
        with _told_by_codec(file.syntax):
            array, _ = get_decoder(file.syntax).as_array(file.stream, index=frame, **options)
        return array

    def _check_claim(self, frame: int, offsets: Any) -> None:
        """A decoder allocates what the codestream says: it must say what the header says."""
        stream = self.file.stream
        stream.seek(self.element.start)
        data = get_frame(
            stream, frame, number_of_frames=self.geometry.frames, extended_offsets=offsets
        )
        claim = claimed_size(data)
        if claim is None and self.file.syntax != RLELossless:
            raise IntakeError("its compressed image does not begin like one of its transfer syntax")
        if claim is not None and claim != self.geometry[:3]:
            seen, expected = (", ".join(map(counted, one)) for one in (claim, self.geometry[:3]))
            raise IntakeError(
                f"its compressed image has rows, columns, samples ({seen}), its header ({expected})"
            )

    def _check_complete(self) -> None:
        """Uncompressed pixel data has the length that the header describes (PS3.5 8.1.1)."""
        left = self.file.stream.seek(0, os.SEEK_END) - self.element.start
        length = self.element.length
        present = left if length == _UNDEFINED else min(left, length)
        if width := _FLOAT_BYTES.get(self.element.keyword):
            expected = get_expected_length(self.file.header, unit="pixels") * width
        else:
            expected = get_expected_length(self.file.header)
        if present < expected:
            raise IntakeError(
                f"its pixel data is cut short: {present} bytes are there, its header describes more"
            )


@contextmanager
def _told_by_codec(syntax: UID) -> Iterator[None]:
    """What a codec says of a broken image is in its own words; which codec it was is enough.

    A panic of a decoder written in Rust is no `Exception`: it would end the whole intake.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ not in ("PanicException", "RuntimeError"):
            raise
        raise IntakeError(
            f"its compressed image breaks the decoder of {registered_name(syntax)}"
        ) from None


def _check_decodable(syntax: UID) -> None:
    """Refuse a coding that no decoder is there for.

    Raises:
        IntakeError: with the standard's name of it, and the plugins that would decode it if they
            were installed.
    """
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        name = repr(_NEWER_SYNTAXES[syntax]) if syntax in _NEWER_SYNTAXES else ""
        raise IntakeError(
            f"its transfer syntax is {name or registered_name(syntax)}, "
            "which cannot be decoded here"
        ) from None
    if not decoder.is_available:
        raise IntakeError(
            f"its transfer syntax is {registered_name(syntax)}, which cannot be decoded here: "
            f"not installed is {' or '.join(decoder.missing_dependencies)}"
        )


def _file_meta(stream: BinaryIO) -> Dataset:
    """The file meta information (PS3.10 7.1); empty where a bare data set begins at once.

    The stream stands behind it afterwards.
    """
    start = stream.read(_PREFIX_AT + len(_PREFIX))
    if start[_PREFIX_AT:] != _PREFIX:
        if not {int.from_bytes(start[:2], order) for order in _ORDERS} & _FIRST_GROUPS:
            raise IntakeError("not a DICOM file")
        stream.seek(0)
    return read_dataset(stream, False, True, stop_when=_behind_meta)


def _behind_meta(tag: BaseTag, _representation: str | None, _length: int) -> bool:
    return (tag >> 16) != _META_GROUP


def _at_pixels(tag: BaseTag, _representation: str | None, _length: int) -> bool:
    return tag in _PIXELS


def _inflate(data: bytes, limit: int) -> bytes:
    """Inflate a deflated data set (PS3.5 A.5), which may be a bomb."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = inflater.decompress(data, limit)
    if inflater.unconsumed_tail:
        raise IntakeError(f"its data set inflates to more than {limit} bytes")
    return inflated


def _native_syntax(is_implicit: bool | None, is_little: bool | None) -> UID:
    """For a bare data set without file meta: uncompressed, as it has been read."""
    if is_implicit:
        return ImplicitVRLittleEndian
    return ExplicitVRBigEndian if is_little is False else ExplicitVRLittleEndian


def _count(header: Dataset, keyword: str, default: int | None = None) -> int:
    text = text_of(header, keyword)
    if not text and default is not None:
        return default
    if not text.isdecimal() or int(text) < 1:
        raise IntakeError(f"its {keyword} is {quoted(text)}; expected a number of at least 1")
    return int(text)


def _class_name(header: Dataset) -> str:
    uid = text_of(header, "SOPClassUID")
    return registered_name(uid).strip("'") if uid else "no SOP class"
