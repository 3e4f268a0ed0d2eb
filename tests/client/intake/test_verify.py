"""The independent checker: it sees what is left of a person, and cries at nothing else."""

from __future__ import annotations

import ast
import base64
import csv
import gzip
import random
import sqlite3
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset, FileDataset
from pydicom.sequence import Sequence
from pydicom.uid import UID

from client.intake.deid.engine import Engine
from client.intake.deid.profile import Profile
from client.intake.deid.save import save
from client.intake.deid.vocabulary import terms
from client.intake.keys import SiteKey
from client.intake.part10 import BoundedFile, Limits
from client.intake.quiet import quiet
from client.intake.verify import check
from client.intake.verify.check import Checker, Settings, verify
from client.intake.verify.finding import Finding, masked
from client.intake.verify.identities import Identities, identities_of
from client.intake.verify.layout import is_dicom, take_apart
from client.intake.verify.needles import Needles
from client.intake.verify.words import common_words, maker_words, strange_words
from common.cohort_seal import CohortSeal
from common.errors import CohortError, DataError, IntakeError

Film = Callable[..., FileDataset]
NAME = "Kowalski-Zörgiebel^Wilhelmine"
RECORD, BIRTH, CITY = "KH-0047110815", "19640812", "Buxtehude"


def as_bytes(dataset: Dataset) -> bytes:
    buffer = BytesIO()
    with quiet():
        dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def cleaned(dataset: Dataset, **profile: Any) -> FileDataset:
    """De-identified, and in memory."""
    engine = Engine(Profile(**profile), SiteKey(bytes(32)))
    with quiet():
        return engine.clean_stream(BytesIO(as_bytes(dataset))).dataset


def rules(findings: Iterator[Finding] | tuple[Finding, ...]) -> set[str]:
    return {finding.rule for finding in findings}


def found(dataset: Dataset, name: str = "1.dcm", known: Identities | None = None) -> set[str]:
    with quiet():
        return rules(Checker(known).findings(as_bytes(dataset), name))


@pytest.fixture(scope="module")
def known() -> Identities:
    """What a source says of one patient."""
    made = Dataset()
    made.SpecificCharacterSet = "ISO_IR 192"
    made.PatientName, made.PatientID, made.PatientBirthDate = NAME, RECORD, BIRTH
    made.PatientAddress, made.Rows = CITY, 1
    made.StudyInstanceUID = "1.2.840.113619.2.5.1762583153.215519.978957063.78"
    buffer = BytesIO()
    made.save_as(buffer, implicit_vr=False, little_endian=True, enforce_file_format=False)
    identities = Identities()
    identities.add_file(buffer.getvalue(), "north/IM1")
    return identities


# The checker's own code.


def offences(source: str) -> list[str]:
    """Modules of the engine that a source imports."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
            names.append("relative") if node.level else None
    parts = ("client.intake.deid", "relative")
    return [name for name in names if name.startswith(parts)]


def test_it_shares_no_code_with_the_engine() -> None:
    folder = Path(check.__file__).parent
    files = [*folder.rglob("*.py"), folder.parent / "ocr.py"]

    assert len(files) > 8
    assert {file.name: names for file in files if (names := offences(file.read_text()))} == {}
    for source in (
        "from client.intake.deid.engine import Engine",
        "def late():\n    import client.intake.deidentify",
        "from client.intake import deid",
        "from ..deid import rules",
    ):
        assert offences(source)


@pytest.mark.parametrize("letters", [b"ab", b"abcdefgh"])
def test_many_strings_are_found_as_one_by_one(letters: bytes) -> None:
    """Against the obvious search, over texts in which they lie close and overlap."""
    drawn = random.Random(7)  # noqa: S311

    def text(length: int) -> bytes:
        return bytes(drawn.choices(letters, k=length))

    for window in (4, 8):
        strings = {text(drawn.randint(window, 14)) for _ in range(40)}
        data = text(1200).upper() + text(1200)
        expected = {
            (at, string)
            for string in strings
            for at in range(len(data))
            if data.lower().startswith(string, at)
        }
        assert set(Needles(strings, window).find(data)) == expected


def test_its_own_reader_sees_the_elements_that_pydicom_sees(shared_data: Path) -> None:
    """Two readers that share nothing agree on every element of the real files, at any depth."""

    def tags(level: Dataset) -> Iterator[int]:
        for element in level:
            yield int(element.tag)
            for item in element.value if element.VR == "SQ" else ():
                yield from tags(item)

    compared = 0
    for path in sorted((shared_data / "dicom").rglob("*")):
        data = path.read_bytes() if path.is_file() else b""
        if is_dicom(data) and "bad_sequence" not in path.name:
            layout = take_apart(data)
            if not layout.gaps:
                with quiet():
                    theirs = sorted(tags(dcmread(BytesIO(data), force=True)))
                assert sorted(one.tag for one in layout.elements) == theirs, path.name
                compared += 1
    assert compared > 150


def test_it_reads_broken_files_to_their_end(film: Film) -> None:
    """Every byte of a file is in an element or in a gap, whatever the bytes are."""
    drawn = random.Random(3)  # noqa: S311
    item = Dataset()
    item.PatientName = "A^B"
    whole = as_bytes(film(ReferencedImageSequence=Sequence([item]), SeriesDescription="x"))
    for _ in range(300):
        data = bytearray(whole[: drawn.randint(132, len(whole))])
        for _ in range(drawn.randint(1, 6)):
            data[drawn.randrange(132, len(data) + 1) - 1] = drawn.randrange(256)
        layout = take_apart(bytes(data))
        top = [*layout.meta, *(one for one in layout.elements if one.level.depth == 0)]
        covered = sum(one.end - one.start for one in top) + sum(size for _, size in layout.gaps)
        if not layout.syntax.endswith((".99", ".95")):
            assert covered == len(layout.data) - 132
        with quiet():
            list(Checker().findings(bytes(data), "1.dcm"))


# Real files.


@pytest.fixture(scope="module")
def exported(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every real file that the engine gives away, but for those of many megapixels."""
    folder = tmp_path_factory.mktemp("exported")
    engine = Engine(Profile(risky_pixels="blank", faces="keep"), SiteKey(bytes(32)))
    with (shared_data / "dicom" / "index.csv").open(encoding="utf-8") as index:
        for row in csv.DictReader(index):
            if int(row["rows"] or 0) * int(row["cols"] or 0) * int(row["frames"] or 1) < 2**20:
                try:
                    with BoundedFile(shared_data / "dicom" / row["file"], 2**29) as stream:
                        save(engine.clean_stream(stream, Limits()), folder)
                except IntakeError:
                    continue
    return folder


def test_nothing_is_found_in_what_the_engine_makes_of_real_files(
    shared_data: Path, exported: Path
) -> None:
    known = identities_of(shared_data / "dicom")
    assert len(known) > 3000

    alone, against = verify(exported), verify(exported, known)

    assert alone.findings == against.findings == ()
    assert alone.files == against.files > 80
    assert against.against_source
    assert not alone.against_source


def test_everything_is_found_in_the_real_files_themselves(shared_data: Path) -> None:
    """Copies of a source: each file has much by shape, and values of the source."""
    folder = shared_data / "dicom"
    told = Checker(identities_of(folder))
    for path in sorted(folder.rglob("*")):
        if path.is_file() and is_dicom(data := path.read_bytes()) and len(data) < 2**21:
            with quiet():
                shapes = rules(Checker().findings(data, path.name))
                values = rules(told.findings(data, path.name)) - shapes
            assert len(shapes) >= 3, path.name
            assert values == {"value of the source"}, path.name


def test_what_is_left_in_one_real_file_is_found_among_clean_ones(
    shared_data: Path, exported: Path, tmp_path: Path
) -> None:
    """The patient's name of one file, in a place where no rule of shape looks for names."""
    folder = shared_data / "dicom" / "flywheel-tcia-pseudophi" / "dicom"
    original = next(iter(sorted(folder.glob("*.dcm"))))
    family = str(dcmread(original).PatientName).split("^")[0]
    target = next(iter(sorted(exported.iterdir())))
    data = target.read_bytes()
    (tmp_path / target.name).write_bytes(
        data.replace(b"edition 2025c", b"ed. " + family[:9].encode().ljust(9)[:9])
    )

    assert {finding.where for finding in verify(tmp_path, identities_of(original)).findings} == {
        "DeidentificationMethod"
    }


# Its words.

SURNAMES = """Smith Johnson Williams Brown Jones Garcia Miller Davis Rodriguez Martinez Wilson
Anderson Thomas Taylor Moore Jackson Martin Thompson Harris Clark Lewis Walker Young Allen King
Wright Scott Nguyen Hill Adams Baker Hall Campbell Müller Schmidt Schneider Fischer Weber Meyer
Becker Hoffmann Koch Klein Wolf Philips Siemens Roche Zeiss Rossi Novak Kowalski Ivanova"""


def test_it_knows_every_term_that_the_engine_keeps_and_hardly_a_surname() -> None:
    """Two lists that were made apart: what one keeps the other lets be."""
    words = common_words()
    strange = [term for term in terms() if any(strange_words(term, words | maker_words()))]
    assert len(terms()) > 1000
    assert strange == []
    assert [name for name in SURNAMES.split() if not any(strange_words(name, words))] == []


def test_a_surname_that_is_a_term_is_found_if_the_source_has_it(film: Film) -> None:
    source = film(PatientName="White^Green")
    known = Identities()
    known.add_file(as_bytes(source), "1")
    made = cleaned(film())
    made.SeriesDescription = "White"

    assert found(made) == set()
    assert found(made, known=known) == {"value of the source"}


# One thing at a time: left in a header.


def test_a_clean_film_is_clean(film: Film, known: Identities) -> None:
    assert found(cleaned(film()), known=known) == set()


LEFT: list[tuple[str, Any, str]] = [
    ("PatientName", "Doe^John", "name of a person"),
    ("PatientID", "4711", "patient identifier"),
    ("AccessionNumber", "A1", "identifying attribute"),
    ("InstitutionName", "Chest Hospital", "strange word"),
    ("StudyDate", "20240101", "date or time"),
    ("StudyTime", "101500", "date or time"),
    ("SOPInstanceUID", "1.2.3.4.5.6", "UID"),
    ("PatientAge", "094Y", "age"),
    ("PatientAge", "034Y", "age"),
    ("BodyPartExamined", "SCHMIDT", "strange word"),
    ("SeriesDescription", "chest 0815123", "strange word"),
    ("SeriesDescription", "山田", "strange word"),
    ("SeriesDescription", "of 12.08.1964", "date in a text"),
    ("SeriesDescription", "call 555-867-5309", "telephone number"),
    ("SeriesDescription", "call +49 40 1234567", "telephone number"),
    ("SeriesDescription", "078-05-1120", "social security number"),
    ("SeriesDescription", "me@ward.example", "e-mail address"),
    ("SeriesDescription", "https://pacs.example/1", "address of a page"),
    ("SeriesDescription", "Li^Wu", "name"),
    ("RescaleType", "1.2.826.0.1.3680043.10.7.1", "UID"),
    ("InstanceNumber", "1234567890", "large number"),
    ("FrameIncrementPointer", 0x41424344, "pointer"),
    ("EncapsulatedDocument", b"%PDF-1.4", "other values"),
    ("PixelData", bytes(1200) + b"Kowalski", "loose bytes"),
    ("PixelData", bytes(1198) + b"\0\xf0", "unused bits"),
    ("PatientIdentityRemoved", "NO", "not declared"),
    ("BurnedInAnnotation", "YES", "burned-in text"),
    ("LongitudinalTemporalInformationModified", "MODIFIED", "dates"),
    ("ICCProfile", bytes(200), "colour profile"),
]


@pytest.mark.parametrize(("keyword", "value", "rule"), LEFT)
def test_what_is_left_in_an_attribute_is_found(
    film: Film, keyword: str, value: Any, rule: str
) -> None:
    made = cleaned(film())
    with quiet():
        made.SpecificCharacterSet = "ISO_IR 192"
        setattr(made, keyword, value)

    assert rule in found(made)


def test_other_things_left_in_a_file_are_found(film: Film) -> None:
    for change, rule in (
        (lambda one: one.add_new(0x00091010, "LO", "X"), "private attribute"),
        (lambda one: one.add_new(0x60003000, "OW", b"Kowalski"), "overlay"),
        (lambda one: one.add_new(0x50003000, "OW", b"Kowalski"), "curve"),
        (lambda one: one.add_new(0x00189FFE, "LO", "X"), "unknown attribute"),
        (lambda one: one.add_new("StudyDate", "LO", "CHEST"), "wrong representation"),
        (lambda one: setattr(one, "preamble", b"Kowalski" * 16), "preamble"),
        (lambda one: setattr(one.file_meta, "SourceApplicationEntityTitle", "KOWALSKI"),
         "file meta"),
        (lambda one: setattr(one.file_meta, "ImplementationVersionName", "KOWALSKI"),
         "strange word"),
        (lambda one: one.__delattr__("DeidentificationMethodCodeSequence"), "dates"),
    ):  # fmt: skip
        made = cleaned(film(), dates="modified")
        change(made)
        assert rule in found(made)
    clean = as_bytes(cleaned(film()))
    assert rules(Checker().findings(clean + b"Kowalski", "1.dcm")) == {"loose bytes"}
    unknown = clean + b"\x10\0\0\x40UN\0\0\x08\0\0\0Kowalski"
    assert rules(Checker().findings(unknown, "1.dcm")) == {"unknown representation"}
    assert rules(Checker().findings(clean, "Kowalski/1.dcm")) == {"file name"}
    assert rules(Checker().findings(clean, "1.2.3.dcm")) == set()


def test_what_is_declared_is_let_be(film: Film, known: Identities) -> None:
    """Under the options that retain, and only under those."""
    made = film(
        StudyDate=BIRTH,
        PatientAge="034Y",
        PatientWeight="71",
        StationName=CITY,
        InstitutionName=CITY,
        SOPInstanceUID="1.2.3.4.5.6",
    )
    made.file_meta.MediaStorageSOPInstanceUID = UID("1.2.3.4.5.6")
    options = {
        "dates": "full",
        "retain_uids": True,
        "retain_patient_characteristics": True,
        "retain_device_identity": True,
        "retain_institution_identity": True,
    }
    clean = cleaned(made, **options)
    assert (clean.StudyDate, clean.InstitutionName) == (BIRTH, CITY)

    assert found(clean, known=known) == set()
    del clean.DeidentificationMethodCodeSequence[1:]
    assert {"UID", "date or time", "age", "strange word", "value of the source"} <= found(
        clean, known=known
    )


# Against the source: one spelling at a time.


@pytest.mark.parametrize(
    "text",
    [
        "of kowalski",
        "MRKOWALSKIS",
        "K o w a l s k i",
        "kow-al-ski",
        "Zörgiebel",
        "ZÖRGIEBEL",
        "1964-08-12",
        "12.8.1964",
        "12 Aug 1964",
        "08/12/1964",
        "19640812101500",
        "no. 47110815",
        "no. 000047110815.",
        "KH-0047110815",
        "BUXTEHUDE",
        "1.2.840.113619.2.5.1762583153.215519.978957063.78",
    ],
)
def test_a_value_of_the_source_is_found_however_it_is_spelled(
    film: Film, known: Identities, text: str
) -> None:
    made = cleaned(film())
    made.SpecificCharacterSet = "ISO_IR 192"
    made.SeriesDescription = text
    assert "value of the source" in found(made, known=known)
    made.SpecificCharacterSet = "ISO_IR 100"
    made.SeriesDescription = text
    assert "value of the source" in found(made, known=known)

    for content in (text.encode(), b"\0\1" + f"  {text}  ".encode("utf-16-le") + b"\0\1\2"):
        checker = Checker(known)
        assert "value of the source" in rules(checker.findings(content, "report.txt")), content


@pytest.mark.parametrize(
    "text",
    ["chest", "series 815", "1964", "0.47110815", "147110815", "08-1964", "buxte", "12.08.19"],
)
def test_what_is_none_of_its_values_is_not_taken_for_one(known: Identities, text: str) -> None:
    assert rules(Checker(known).findings(text.encode(), "report.txt")) == set()


def test_a_name_in_pixels_is_found(film: Film, known: Identities) -> None:
    made = cleaned(film())
    pixels = bytearray(bytes(1200))
    pixels[40:62] = b"Kowalski^Wilhelmine\0\0\0"
    made.PixelData = bytes(pixels)
    made.BitsStored, made.HighBit = 16, 15

    assert found(made, known=known) == {"value of the source"}
    assert found(made) == set()


# Anything else that lies in a folder.


def packed(kind: str, text: bytes) -> bytes:
    if kind == "zip":
        buffer = BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("inner.txt", text)
        return buffer.getvalue()
    return {
        "text": text,
        "gzip": gzip.compress(text),
        "base64": b'{"value": "' + base64.b64encode(text * 2) + b'"}',
        "pdf": b"%PDF-1.4\nstream\n" + zlib.compress(text) + b"\nendstream",
        "bytes": b"\0\1\2\xff" + text + b"\0\xfe",
        "dicom in zip": b"",
    }[kind]


@pytest.mark.parametrize("kind", ["text", "zip", "gzip", "base64", "pdf", "bytes"])
def test_whatever_a_file_is_packed_in_it_is_looked_into(
    tmp_path: Path, known: Identities, kind: str
) -> None:
    (tmp_path / "a").write_bytes(packed(kind, b"seen: Kowalski^Anna, me@ward.example"))
    assert {"e-mail address", "name"} <= verify(tmp_path).by_rule().keys()
    assert "value of the source" in verify(tmp_path, known).by_rule()

    (tmp_path / "a").write_bytes(packed(kind, b"seen: nothing of the kind at all"))
    assert verify(tmp_path, known).findings == ()


def test_names_of_files_and_folders_are_looked_at(tmp_path: Path, known: Identities) -> None:
    (tmp_path / "Kowalski_Anna").mkdir()
    (tmp_path / "Kowalski_Anna" / "images.txt").write_text("images")

    (finding,) = verify(tmp_path, known).findings
    assert (finding.where, finding.offset) == ("name of the file", -1)
    assert "Kowalski" not in verify(tmp_path, known).to_json()


def test_a_cohort_is_clean_and_a_careless_one_is_not(hospital: Any, known: Identities) -> None:
    hospital.film(f"{CITY}/{RECORD}.dcm", PatientID=RECORD, PatientName=NAME)
    path = hospital.take_in(hospital.labels({RECORD: "normal"})).cohort.path
    sources = identities_of(hospital.folder)

    assert verify(path, sources).findings == ()
    with closing(sqlite3.connect(path / "index.sqlite")) as database:
        database.execute("UPDATE image SET study = ?", (RECORD,))
        database.commit()
    assert verify(path).by_rule().keys() == {"no pseudonym"}
    assert verify(path, sources).by_rule().keys() == {"no pseudonym", "value of the source"}


def test_what_was_deleted_from_a_database_is_found_in_its_pages(
    tmp_path: Path, known: Identities
) -> None:
    with closing(sqlite3.connect(tmp_path / "journal.sqlite")) as database:
        database.execute("PRAGMA secure_delete = OFF")
        database.execute("CREATE TABLE item (place TEXT)")
        database.execute("INSERT INTO item VALUES (?)", ("Kowalski/Wilhelmine",))
        database.commit()
        database.execute("DELETE FROM item")
        database.commit()

    assert {finding.where for finding in verify(tmp_path, known).findings} == {"bytes"}


def test_a_sealed_index_is_opened_or_refused(
    tmp_path: Path, write_cohort: Any, make_spec: Any, known: Identities
) -> None:
    """A careless index, sealed: without the key nobody has looked at it, so it is not clean."""
    plain, key = write_cohort(make_spec(), [0, 1]).path, bytes(range(32))
    seal = CohortSeal.new(key)
    sealed = tmp_path / "sealed"
    sealed.mkdir()
    with closing(sqlite3.connect(plain / "index.sqlite")) as database:
        database.execute("UPDATE image SET study = ?", (RECORD,))
        database.commit()
    (sealed / "index.sealed").write_bytes(seal.close_index((plain / "index.sqlite").read_bytes()))
    (sealed / "sealed.json").write_bytes(seal.content)

    with pytest.raises(CohortError, match="expected the file of that key"):
        verify(sealed)
    assert (
        "value of the source" in verify(sealed, known, settings=Settings(cohort_key=key)).by_rule()
    )
    assert "no pseudonym" in verify(sealed, settings=Settings(cohort_key=key)).by_rule()


def test_a_large_file_is_looked_at_part_by_part(tmp_path: Path, known: Identities) -> None:
    """What stands across two parts, too, and each in its place."""
    part = 2**16
    for at in (10, part - 20, part + 5000, 3 * part - 4096 - 9):
        data = bytearray(3 * part)
        data[at : at + 22] = b"\0Kowalski^Wilhelmine\0\0"
        (tmp_path / "blob").write_bytes(data)
        findings = verify(tmp_path, known, settings=Settings(part=part)).findings
        assert {"value of the source", "name"} <= rules(findings)
        assert {finding.offset for finding in findings} <= {at + 1, at + 10}
        (tmp_path / "blob").write_bytes(bytes(3 * part))
        assert verify(tmp_path, known, settings=Settings(part=part)).findings == ()


def test_sealed_bytes_hold_nothing_by_chance(tmp_path: Path, known: Identities) -> None:
    drawn = random.Random(11)  # noqa: S311
    for number in range(20):
        (tmp_path / f"{number:032x}.sealed").write_bytes(drawn.randbytes(200_000))
    by_chance = drawn.randbytes(90_000) + b"\x8b'iE^kfSD\t5swyv2\xd8" + drawn.randbytes(90_000)
    (tmp_path / f"{20:032x}.sealed").write_bytes(by_chance)

    assert verify(tmp_path, known).findings == ()
    told = f"Patient {NAME}, admitted to the ward".encode()
    (tmp_path / f"{21:032x}.sealed").write_bytes(by_chance + told + by_chance)
    assert verify(tmp_path).findings


# What it says.


def test_no_value_is_in_the_record_nor_in_a_finding(tmp_path: Path, known: Identities) -> None:
    (tmp_path / f"{NAME}.txt").write_text(f"{NAME} {RECORD} {BIRTH}")

    verdict = verify(tmp_path, known)

    record = verdict.to_json()
    assert verdict.findings
    for value in ("Kowalski", "kowalski", "Zörgiebel", "47110815", BIRTH, "Ko…"):
        assert value not in record
    for finding in verdict.findings:
        assert "owalski" not in f"{finding.masked}{finding.where}{finding.why}"


@pytest.mark.parametrize(
    ("value", "shown"),
    [("Müller-Lüd", "Mü…(10)"), ("Doe", "…(3)"), ("19640812", "19…(8)"), (b"\xff\xfe" * 4, "…(8)")],
)
def test_a_value_is_masked(value: str | bytes, shown: str) -> None:
    assert masked(value) == shown


def test_what_nobody_has_looked_into_is_not_clean(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file in it"):
        verify(tmp_path)
    with pytest.raises(DataError, match="nothing is there"):
        identities_of(tmp_path)
    (tmp_path / "link").symlink_to("/etc/hostname")
    with pytest.raises(DataError, match="no regular file"):
        verify(tmp_path)
