"""Files with identities planted wherever a DICOM file has room for one."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydicom._dicom_dict import DicomDictionary
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from client.intake.quiet import quiet

STORAGE = "1.2.840.10008.5.1.4.1.1."
DEFLATED = UID("1.2.840.10008.1.2.1.99")
SIDE = 96
_WITHOUT_ROOM = ("AS", "TM", "US", "SS", "UL", "SL", "UV", "SV", "FL", "FD")
Bytes = Callable[[Dataset], bytes]


class Probe(NamedTuple):
    """A file with identities in it.

    Attributes:
        data: the file.
        planted: identities by place, as their bytes.
        waits: whether a person has to see it first.
        also: other spellings of them, in which they do not stand in the file itself.
    """

    data: bytes
    planted: Mapping[str, bytes]
    waits: bool = False
    also: Mapping[str, bytes] = {}


class Planter:
    """Identities of every value representation, each different from all others."""

    def __init__(self, number: int) -> None:
        self._next = number * 10_000
        self.planted: dict[str, bytes] = {}

    def word(self, place: str, longest: int = 16) -> str:
        """A name such as no technical term is."""
        self._next += 1
        word = f"QX{self._next:06d}KOWALSKI"[:longest]
        return self._note(place, word)

    def day(self, place: str) -> str:
        self._next += 1
        number = self._next % 20_000
        return self._note(
            place, f"{1921 + number // 336}{number // 28 % 12 + 1:02d}{number % 28 + 1:02d}"
        )

    def number(self, place: str, digits: int = 10) -> str:
        """A record number: too large for any quantity of a listed attribute."""
        self._next += 1
        return self._note(place, f"{1_100_000_000 + self._next}" + "7" * (digits - 10))

    def uid(self, place: str) -> str:
        self._next += 1
        return self._note(place, f"1.2.826.0.1.3680043.10.7777.{self._next}")

    def raw(self, place: str, length: int = 32) -> bytes:
        return self.word(place).encode().ljust(length, b"\0")

    def tag(self, place: str) -> int:
        """Four letters, as a pointer to an attribute."""
        self._next += 1
        letters = b"Q" + bytes(65 + self._next // 26**at % 26 for at in range(2)) + b"q"
        self.planted[place] = letters
        return int.from_bytes(letters[:2], "little") << 16 | int.from_bytes(letters[2:], "little")

    def _note(self, place: str, text: str) -> str:
        self.planted[place] = text.encode()
        return text

    def value(self, place: str, representation: str) -> Any:
        """An identity that a value representation can hold."""
        makers: dict[str, Callable[[str], Any]] = {
            "DA": self.day,
            "DT": lambda place: self.day(place) + "101500",
            "UI": self.uid,
            "IS": self.number,
            "DS": lambda place: self.number(place, 13),
            "AT": self.tag,
            **dict.fromkeys(("OB", "OW", "OL", "OF", "OD", "OV", "UN"), self.raw),
            **dict.fromkeys(_WITHOUT_ROOM, lambda _place: None),
        }
        return makers.get(representation, self.word)(place)


# What has to stand as it is for the object to be read as an image at all.
_STRUCTURE = {
    "SOPClassUID", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "SamplesPerPixel",
    "PixelRepresentation", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames",
    "PixelData", "FloatPixelData", "DoubleFloatPixelData", "SpecificCharacterSet", "PatientID",
    "BurnedInAnnotation", "ConversionType", "SpecimenLabelInImage", "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths", "SequenceOfUltrasoundRegions",
}  # fmt: skip


def picture(*words: str, side: int = SIDE) -> NDArray[np.uint16]:
    """A soft 12-bit hill, with lines of text drawn on it if wished."""
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    hill: NDArray[np.uint16] = (3000 * np.exp(-2 * (x**2 + y**2))).astype(np.uint16)
    if words:
        layer = Image.new("L", (side, side))
        for line, word in enumerate(words):
            font = ImageFont.load_default(14)
            ImageDraw.Draw(layer).text((4, 4 + 22 * line), word, font=font, fill=255)
        hill[np.asarray(layer) > 128] = 4095
    return hill


class Makers:
    """Makes the probes; a public method makes one, and its name is the probe's."""

    def __init__(self, film: Callable[..., FileDataset], as_bytes: Bytes) -> None:
        self._film, self._bytes = film, as_bytes
        self._made = 0

    def all(self) -> Iterator[tuple[str, Probe]]:
        names = [name for name in vars(type(self)) if not name.startswith("_") and name != "all"]
        names.sort(key="every_attribute".__eq__)
        for self._made, name in enumerate(names):
            yield name, getattr(self, name)(Planter(self._made + 1))

    def _base(self, plant: Planter, pixels: NDArray[Any] | None = None, **more: Any) -> FileDataset:
        """A film with the identities that every file has."""
        film = self._film(picture() if pixels is None else pixels)
        film.PatientName = f"{plant.word('name')}^{plant.word('given name')}"
        film.PatientID = plant.word("patient")
        film.IssuerOfPatientID = plant.word("issuer")
        film.PatientBirthDate, film.StudyDate = plant.day("birth"), plant.day("study date")
        for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
            setattr(film, name, plant.uid(name))
        for name in ("AccessionNumber", "StudyID", "InstitutionName", "PatientAddress"):
            setattr(film, name, plant.word(name))
        film.file_meta.MediaStorageSOPInstanceUID = film.SOPInstanceUID
        for keyword, value in more.items():
            setattr(film, keyword, value)
        return film

    def _probe(self, plant: Planter, film: Dataset, *, waits: bool = False) -> Probe:
        return Probe(self._bytes(film), plant.planted, waits)

    def every_attribute(self, plant: Planter) -> Probe:
        """An identity in each attribute of the standard's dictionary that can hold one."""
        film = self._base(plant)
        for tag, (representations, _, _, _, keyword) in sorted(DicomDictionary.items()):
            representation = representations.split(" or ")[-1]
            group = tag >> 16
            skipped = keyword in _STRUCTURE or not keyword or group in (0, 2, 4, 0xFFFE)
            if skipped or keyword in film or tag & 0xFFFF == 0 or representation == "NONE":
                continue
            if representation == "SQ":
                item = Dataset()
                item.PatientComments = plant.word(f"{keyword}/PatientComments")
                item.ReceiveCoilName = plant.word(f"{keyword}/ReceiveCoilName")
                film.add_new(tag, "SQ", Sequence([item]))
            elif (value := plant.value(keyword, representation)) is not None:
                film.add_new(tag, representation, value)
        return self._probe(plant, film)

    def nested(self, plant: Planter) -> Probe:
        film = self._base(plant)
        level: Dataset = film
        for depth in range(6):
            item = Dataset()
            item.PatientName = plant.word(f"name at {depth}")
            item.PatientID = plant.word(f"patient at {depth}")
            item.SequenceName = plant.word(f"text at {depth}")
            item.ReferencedSOPInstanceUID = plant.uid(f"UID at {depth}")
            item.ScanOptions = plant.word(f"code string at {depth}")
            level.add_new("ReferencedSeriesSequence", "SQ", Sequence([item]))
            level = item
        return self._probe(plant, film)

    def private(self, plant: Planter) -> Probe:
        film, item = self._base(plant), Dataset()
        for level in (film, item):
            block = level.private_block(0x0009, plant.word(f"creator {id(level)}"), create=True)
            for element, representation in enumerate(("LO", "PN", "DA", "OB", "UN", "IS", "UI")):
                block.add_new(
                    element, representation, plant.value(f"{id(level)}{element}", representation)
                )
            level.add_new(0x00111077, "LO", plant.word(f"orphan {id(level)}"))
        inner = Dataset()
        inner.PatientName = plant.word("private sequence")
        film.private_block(0x0013, "MAKER", create=True).add_new(1, "SQ", Sequence([inner]))
        film.ReferencedImageSequence = Sequence([item])
        return self._probe(plant, film)

    def unknown(self, plant: Planter) -> Probe:
        """Attributes of no standard, and standard ones whose representation is unknown."""
        film = self._base(plant)
        for tag in (0x00189FFE, 0x00209FFE, 0x7FDF1010, 0x60010010):
            film.add_new(tag, "LO", plant.word(f"{tag:08X}"))
        item = Dataset()
        item.PatientName = plant.word("in a sequence of unknown representation")
        buffer = BytesIO()
        item.save_as(buffer, implicit_vr=True, little_endian=True, enforce_file_format=False)
        encoded = buffer.getvalue()
        wrapped = b"\xfe\xff\x00\xe0" + len(encoded).to_bytes(4, "little") + encoded
        for keyword, data in (
            ("ReferencedPerformedProcedureStepSequence", wrapped),
            ("OtherPatientNames", plant.raw("a name")),
            ("ReceiveCoilName", plant.raw("a text")),
            ("SeriesNumber", plant.number("a number").encode()),
        ):
            tag = Tag(keyword)
            film[tag] = RawDataElement(tag, "UN", len(data), data, 0, False, True)
        return self._probe(plant, film)

    def unreadable(self, plant: Planter) -> Probe:
        """Texts where numbers belong, and one that is too long or short to be any."""
        film = self._base(plant, SliceThickness="12345678901234", ExposureTime="123456789012")
        film.add_new("SpiralPitchFactor", "LO", plant.word("FD", 12))
        data = self._bytes(film).replace(b"\x18\0\x11\x93LO", b"\x18\0\x11\x93FD")
        data = data.replace(b"12345678901234", plant.word("DS", 14).encode())
        data = data.replace(b"123456789012", plant.word("IS", 12).encode())
        return Probe(data, plant.planted)

    def free_text(self, plant: Planter) -> Probe:
        """Dates, names and UIDs in texts that no table lists."""
        film = self._base(plant)
        film.LUTExplanation = f"seen {plant.day('a day')} by Dr {plant.word('a doctor')}"
        film.WindowCenterWidthExplanation = [plant.word("one"), plant.word("two")]
        film.BodyPartExamined = plant.word("body part")
        film.ImageType = ["ORIGINAL", "PRIMARY", plant.word("image type")]
        film.ManufacturerModelName = f"CT of {plant.word('model')}"
        film.RescaleType = plant.uid("UID in a text")
        film.InstanceNumber = plant.number("record number")
        film.FrameIncrementPointer = plant.tag("pointer")
        return self._probe(plant, film)

    def codes(self, plant: Planter) -> Probe:
        film, known, local = self._base(plant), Dataset(), Dataset()
        known.CodeValue, known.CodingSchemeDesignator = "69536005", "SCT"
        known.CodeMeaning = plant.word("another meaning")
        known.CodingSchemeVersion = plant.word("version")
        known.ContextGroupLocalVersion = plant.day("local version")
        local.CodeValue, local.CodingSchemeDesignator = plant.word("value"), plant.word("scheme")
        local.CodeMeaning = plant.word("meaning")
        film.ViewCodeSequence = Sequence([known, local])
        return self._probe(plant, film)

    def said_before(self, plant: Planter) -> Probe:
        """What another tool said of itself, and identities that were encrypted or put aside."""
        film, encrypted, original = self._base(plant), Dataset(), Dataset()
        film.DeidentificationMethod = plant.word("method")
        encrypted.EncryptedContentTransferSyntaxUID = plant.uid("syntax")
        encrypted.EncryptedContent = plant.raw("content")
        film.EncryptedAttributesSequence = Sequence([encrypted])
        original.SourceOfPreviousValues = plant.word("source")
        original.ModifiedAttributesSequence = Sequence([Dataset()])
        original.ModifiedAttributesSequence[0].PatientName = plant.word("previous name")
        film.OriginalAttributesSequence = Sequence([original])
        return self._probe(plant, film)

    def overlays_and_curves(self, plant: Planter) -> Probe:
        film = self._base(plant)
        for group in (0x6000, 0x601E):
            film.add_new((group, 0x0010), "US", 16)
            film.add_new((group, 0x0022), "LO", plant.word(f"{group:X} description"))
            film.add_new((group, 0x1500), "LO", plant.word(f"{group:X} label"))
            film.add_new((group, 0x3000), "OW", plant.raw(f"{group:X} data"))
            film.add_new((group, 0x4000), "LT", plant.word(f"{group:X} comments"))
        film.add_new((0x5000, 0x2500), "LO", plant.word("curve label"))
        film.add_new((0x5000, 0x3000), "OW", plant.raw("curve data"))
        return self._probe(plant, film)

    def icon_and_colour_profile(self, plant: Planter) -> Probe:
        film, icon = self._base(plant), Dataset()
        icon.Rows = icon.Columns = icon.BitsAllocated = 8
        icon.PixelData = plant.raw("icon", 64)
        film.IconImageSequence = Sequence([icon])
        film.ICCProfile = b"\0" * 128 + plant.raw("profile", 128)
        film.ColorSpace = plant.word("colour space")
        return self._probe(plant, film)

    def tables(self, plant: Planter) -> Probe:
        """More bytes in lookup tables than their descriptors describe."""
        item = Dataset()
        item.LUTDescriptor = [256, 0, 16]
        item.LUTExplanation = plant.word("explanation")
        item["LUTData"] = DataElement(Tag("LUTData"), "OW", bytes(512) + plant.raw("VOI LUT"))
        film = self._base(plant, VOILUTSequence=Sequence([item]))
        return self._probe(plant, film)

    def container(self, plant: Planter) -> Probe:
        """Preamble, file meta, padding, more pixels than described, and bytes behind it all."""
        film = self._base(plant)
        film.preamble = plant.raw("preamble", 128)
        film.file_meta.ImplementationVersionName = plant.word("version name")
        film.file_meta.SourceApplicationEntityTitle = plant.word("source")
        film.file_meta.PrivateInformationCreatorUID = UID(plant.uid("private"))
        film.file_meta.PrivateInformation = plant.raw("private information")
        film.PixelData += plant.raw("behind the pixels")
        film.add_new(0xFFFCFFFC, "OB", plant.raw("padding"))
        data = self._bytes(film) + plant.raw("behind the file")
        return Probe(data, plant.planted)

    def unused_bits(self, plant: Planter) -> Probe:
        """A name in the four high bits of 12-bit pixels, half a letter in each."""
        pixels = np.zeros((SIDE, SIDE), dtype=np.uint16)
        name = np.frombuffer(b"KOWALSKI", dtype=np.uint8)
        pixels[0, : 2 * len(name)] = np.unpackbits(name).reshape(-1, 4) @ [8, 4, 2, 1]
        film = self._base(plant, pixels << 12)
        plant.planted["high bits"] = (pixels << 12)[0, : 2 * len(name)].tobytes()
        return self._probe(plant, film)

    def _encoded(self, plant: Planter, kind: str, syntax: UID, data: bytes | None = None) -> Probe:
        eight = (picture() >> 4).astype(np.uint8)
        film, buffer = self._base(plant, eight), BytesIO()
        if data is None:
            comment = plant.raw("comment")
            Image.fromarray(eight).save(buffer, kind, comment=comment)
            data = buffer.getvalue()
        film.file_meta.TransferSyntaxUID = syntax
        film.PixelData = encapsulate([data + plant.raw("behind the frame")])
        film["PixelData"].VR = "OB"
        return self._probe(plant, film)

    def jpeg(self, plant: Planter) -> Probe:
        buffer = BytesIO()
        eight = Image.fromarray((picture() >> 4).astype(np.uint8))
        eight.save(buffer, "JPEG", comment=plant.raw("comment"), exif=plant.raw("exif"))
        jfif = buffer.getvalue()
        segment = b"\xff\xec" + (34).to_bytes(2, "big") + plant.raw("application data")
        return self._encoded(plant, "JPEG", JPEGBaseline8Bit, jfif[:20] + segment + jfif[20:])

    def jpeg_2000(self, plant: Planter) -> Probe:
        return self._encoded(plant, "JPEG2000", JPEG2000Lossless)

    def jpeg_ls(self, plant: Planter) -> Probe:
        from jpeg_ls import encode_array  # noqa: PLC0415

        coded = bytes(encode_array((picture() >> 4).astype(np.uint8)))
        segment = b"\xff\xfe" + (34).to_bytes(2, "big") + plant.raw("comment")
        return self._encoded(plant, "", JPEGLSLossless, coded[:2] + segment + coded[2:])

    def run_lengths(self, plant: Planter) -> Probe:
        film = self._film((picture() >> 4).astype(np.uint8))
        film.compress(RLELossless)
        return self._encoded(plant, "", RLELossless, get_frame(film.PixelData, 0))

    def character_sets(self, plant: Planter) -> Probe:
        film = self._base(plant, SpecificCharacterSet=["", "ISO 2022 IR 87"])
        film.PatientName = "Yamada^Tarou=山田^太郎=やまだ^たろう"
        film.SequenceName = "山田"
        for place, text in (("kanji", "山田"), ("kana", "やまだ")):
            plant.planted[place] = text.encode("iso2022_jp").removesuffix(b"\x1b(B")
        return self._renamed(plant, film, "山田", "やまだ")

    def umlauts(self, plant: Planter) -> Probe:
        film = self._base(plant, SpecificCharacterSet="ISO_IR 100")
        film.PatientName = film.ProtocolName = film.SequenceName = "Müßlöwe^Jürgen"
        plant.planted["umlauts"] = "Müßlöwe".encode("latin-1")
        return self._renamed(plant, film, "Müßlöwe")

    def _renamed(self, plant: Planter, film: FileDataset, *names: str) -> Probe:
        """Its name is another than the usual one; it may come out in UTF-8 as well."""
        del plant.planted["name"], plant.planted["given name"]
        also = {f"{name} in UTF-8": name.encode() for name in names}
        return Probe(self._bytes(film), plant.planted, also=also)

    def _in(self, plant: Planter, syntax: UID) -> Probe:
        film = self._base(plant)
        film.SequenceName, film.PatientComments = plant.word("text"), plant.word("comment")
        film.file_meta.TransferSyntaxUID = syntax
        film.set_original_encoding(syntax.is_implicit_VR, syntax.is_little_endian)
        if syntax == ExplicitVRBigEndian:
            film.PixelData = picture().astype(">u2").tobytes()
        return self._probe(plant, film)

    def implicit(self, plant: Planter) -> Probe:
        return self._in(plant, ImplicitVRLittleEndian)

    def big_endian(self, plant: Planter) -> Probe:
        return self._in(plant, ExplicitVRBigEndian)

    def deflated(self, plant: Planter) -> Probe:
        probe = self._in(plant, ExplicitVRLittleEndian)
        start = probe.data.index(b"1.2.840.10008.1.2.1\0") + 20
        meta = probe.data[:start].replace(b"\x14\0" + b"1.2.840.10008.1.2.1\0", b"")
        length = int.from_bytes(meta[140:144], "little")
        syntax = b"\x16\0" + str(DEFLATED).encode()
        rest = probe.data[start : 144 + length]
        meta = meta[:140] + (length + 2).to_bytes(4, "little") + meta[144:] + syntax + rest
        packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
        data = packer.compress(probe.data[144 + length :]) + packer.flush()
        return Probe(meta + data, plant.planted)

    def burned_in(self, plant: Planter) -> Probe:
        """Text in the pixels: what is planted is the first row of letters, as it is stored."""
        side = 2 * SIDE
        words = picture("DOE JOHN", "12.08.1964", "ID 4711-0815", side=side)
        film = self._base(plant, words)
        for row in (10, 32, 54):
            plant.planted[f"row {row}"] = words[row].tobytes()
        return self._probe(plant, film)

    def ultrasound(self, plant: Planter) -> Probe:
        """Marks outside of the region of the image that no detector takes for text."""
        pixels = (picture() >> 4).astype(np.uint8)
        mark = plant.raw("outside of the region", 20)
        pixels[3, 10:30] = np.frombuffer(mark, dtype=np.uint8)
        region = Dataset()
        region.RegionLocationMinX0, region.RegionLocationMinY0 = 0, 20
        region.RegionLocationMaxX1 = region.RegionLocationMaxY1 = SIDE - 1
        film = self._base(
            plant,
            pixels,
            SOPClassUID=f"{STORAGE}6.1",
            Modality="US",
            SequenceOfUltrasoundRegions=Sequence([region]),
        )
        return self._probe(plant, film)

    def _waits(self, plant: Planter, **changes: Any) -> Probe:
        """An image that is an identity itself: what is planted is a row of it."""
        pixels = (picture() >> 4).astype(np.uint8)
        mark = plant.raw("the image", 20)
        pixels[SIDE // 2, 10:30] = np.frombuffer(mark, dtype=np.uint8)
        return self._probe(plant, self._base(plant, pixels, **changes), waits=True)

    def photograph(self, plant: Planter) -> Probe:
        return self._waits(plant, SOPClassUID=f"{STORAGE}77.1.4")

    def scanned_paper(self, plant: Planter) -> Probe:
        return self._waits(plant, SOPClassUID=f"{STORAGE}7", ConversionType="SD")

    def flagged(self, plant: Planter) -> Probe:
        return self._waits(plant, BurnedInAnnotation="YES")

    def head(self, plant: Planter) -> Probe:
        return self._waits(plant, SOPClassUID=f"{STORAGE}2", Modality="CT", BodyPartExamined="HEAD")

    def nobody(self, plant: Planter) -> Probe:
        probe = self._waits(plant, PatientID=" ")
        del plant.planted["patient"]
        return probe

    def unnamed(self, plant: Planter) -> Probe:
        """Its own name is blank; the one in its file meta information is not."""
        probe = self._waits(plant)
        meta, uid, rest = probe.data.partition(plant.planted["SOPInstanceUID"])
        return probe._replace(data=meta + uid + rest.replace(uid, b" " * len(uid)))

    def retained(self, plant: Planter) -> Probe:
        """What options that retain would keep as it stands, and more with it than they say.

        Its own places are named "retained …".
        """
        film, institution, ethnic = self._base(plant), Dataset(), Dataset()
        for name, level in (("institution", institution), ("ethnic group", ethnic)):
            level.PatientComments = plant.word(f"retained {name}")
            level.PatientName = plant.word(f"retained name in {name}")
        film.InstitutionCodeSequence = Sequence([institution])
        film.EthnicGroupCodeSequence = Sequence([ethnic])
        film.PatientAge, film.ContentDate = "094Y", "19010102"
        plant.planted["retained age"] = b"094Y"
        data = self._bytes(film).replace(b"19010102", plant.word("retained date", 8).encode())
        return Probe(data, plant.planted)

    def _document(self, plant: Planter, uid: str, **more: Any) -> Probe:
        film = self._base(plant, SOPClassUID=uid, **more)
        del film.PixelData
        return self._probe(plant, film, waits=True)

    def pdf(self, plant: Planter) -> Probe:
        pdf = b"%PDF-1.4 " + plant.raw("document", 64)
        title = plant.word("title")
        return self._document(
            plant, f"{STORAGE}104.1", EncapsulatedDocument=pdf, DocumentTitle=title
        )

    def report(self, plant: Planter) -> Probe:
        tree: Dataset = Dataset()
        tree.ValueType, tree.TextValue = "TEXT", plant.word("finding")
        for depth in range(3):
            outer = Dataset()
            outer.ValueType, outer.PersonName = "PNAME", plant.word(f"observer {depth}")
            outer.ContentSequence = Sequence([tree])
            tree = outer
        return self._document(plant, f"{STORAGE}88.33", ContentSequence=Sequence([tree]))

    def presentation(self, plant: Planter) -> Probe:
        text, graphic = Dataset(), Dataset()
        text.UnformattedTextValue = plant.word("annotation")
        graphic.TextObjectSequence = Sequence([text])
        return self._document(
            plant, f"{STORAGE}11.1", GraphicAnnotationSequence=Sequence([graphic])
        )

    def waveform(self, plant: Planter) -> Probe:
        channel, group = Dataset(), Dataset()
        channel.ChannelLabel = plant.word("channel")
        group.MultiplexGroupLabel = plant.word("group")
        group.ChannelDefinitionSequence = Sequence([channel])
        group.WaveformBitsAllocated = 8
        group.WaveformData = plant.raw("data")
        return self._document(plant, f"{STORAGE}9.1.1", WaveformSequence=Sequence([group]))

    def structures(self, plant: Planter) -> Probe:
        structure = Dataset()
        structure.ROIName = plant.word("structure")
        structure.ROIDescription = plant.word("description")
        label = plant.word("label")
        return self._document(
            plant,
            f"{STORAGE}481.3",
            StructureSetLabel=label,
            StructureSetROISequence=Sequence([structure]),
        )


@pytest.fixture(scope="session")
def probes(film: Callable[..., FileDataset], as_bytes: Bytes) -> dict[str, Probe]:
    """Every probe, by name."""
    with quiet():
        return dict(Makers(film, as_bytes).all())
