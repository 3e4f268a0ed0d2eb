"""What becomes of real files under two profiles; run by `benchmarks/intake.py`."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pydicom
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from client.intake.deid.classes import ALLOWED
from client.intake.deid.engine import Engine
from client.intake.deid.profile import Profile
from client.intake.deid.save import save
from client.intake.deidentify import text_of
from client.intake.keys import SiteKey
from client.intake.part10 import BoundedFile, DicomFile, FrameDecoder, Limits
from client.intake.quiet import quiet
from common.errors import IntakeError, ReviewError

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "dicom"
PROFILES = {
    "default": Profile(),
    "trusting": Profile(risky_pixels="blank", faces="keep"),
}
LARGEST = 2**29
TOKEN = "QXKOWALSKI"  # noqa: S105
PLANTED = (
    ("PatientName", "PN"), ("PatientComments", "LT"), ("InstitutionName", "LO"),
    ("ReceiveCoilName", "SH"), ("RequestAttributesSequence", "SQ"), ("ImageComments", "LT"),
    ("OperatorsName", "PN"), ("BodyPartExamined", "CS"), ("LUTExplanation", "LO"),
)  # fmt: skip
"""Where an identity is planted; in a private block beside them, and in the preamble."""


@dataclass
class Told:
    """What became of one file."""

    name: str
    about: str = ""
    image: bool = False
    names_patient: bool = False
    planted: int = 0
    left: int = 0
    new_errors: dict[str, int | None] = field(default_factory=dict)
    errors_before: int | None = None
    outcome: dict[str, str] = field(default_factory=dict)

    def kept(self, profile: str) -> bool:
        """Whether there is a new file."""
        return self.outcome[profile].startswith(("kept", "blanked"))


def of_real_files() -> Iterator[str]:
    """The tables, line by line; one line that says so where there are no real files."""
    if not DATA.is_dir():
        yield f"No real files at {DATA}: nothing is said of them."
        return
    told = [tell(path, name) for path, name in sources()]
    yield from summary(told)
    yield from every_file(told)


def sources() -> Iterator[tuple[Path, str]]:
    """Each file with a name for the table."""
    with (DATA / "index.csv").open(encoding="utf-8") as index:
        for row in csv.DictReader(index):
            yield DATA / row["file"], row["file"]
    own = Path(pydicom.__file__).parent / "data"
    for folder in ("test_files", "charset_files"):
        for path in sorted((own / folder).rglob("*")):
            if path.is_file():
                yield path, f"pydicom/{path.relative_to(own)}"


def tell(path: Path, name: str) -> Told:
    """Plant, de-identify under each profile, and look."""
    told = Told(name)
    _look_at(path, told)
    with tempfile.TemporaryDirectory(prefix="cloister-benchmark-") as place:
        source = _planted(path, Path(place) / "planted.dcm", told)
        told.errors_before = _errors(source)
        for profile, chosen in PROFILES.items():
            target = Path(place) / profile
            target.mkdir()
            told.outcome[profile] = _outcome(source, chosen, target)
            for clean in target.iterdir():
                told.left += clean.read_bytes().count(TOKEN.encode())
                after = _errors(clean, known=source)
                told.new_errors[profile] = after
    return told


def _outcome(source: Path, profile: Profile, target: Path) -> str:
    engine = Engine(profile, SiteKey(bytes(32)), spool=target.parent)
    try:
        with BoundedFile(source, LARGEST) as stream:
            cleaned = engine.clean_stream(stream)
        save(cleaned, target)
    except ReviewError as reason:
        return f"review: {reason}"
    except IntakeError as reason:
        return f"quarantined: {reason}"
    totals = cleaned.account.counts
    boxes = totals["pixels: box blanked", "PixelData"]
    outside = totals["pixels: outside of regions blanked", "PixelData"]
    if boxes or outside:
        return f"blanked: {boxes} boxes" + (" and outside of the regions" if outside else "")
    return "kept"


def _look_at(path: Path, told: Told) -> None:
    """Whether it is an image of an allowed class of which every frame can be decoded."""
    try:
        with quiet(), BoundedFile(path, LARGEST) as stream:
            file = DicomFile.parse(stream, Limits())
            told.about = f"{text_of(file.header, 'Modality')} {file.syntax.name}"
            told.names_patient = bool(text_of(file.header, "PatientID"))
            allowed = text_of(file.header, "SOPClassUID") in ALLOWED
            element, geometry = file.pixel_element(), file.geometry(Limits())
            decode = FrameDecoder(file, element, geometry)
            for number in range(geometry.frames):
                decode(number)
            told.image = allowed and element.keyword == "PixelData"
    except Exception:  # noqa: BLE001
        # What cannot be decoded, however it says so, is no decodable image.
        told.image = False


def _planted(path: Path, target: Path, told: Told) -> Path:
    """The file with identities in it; the file itself where pydicom cannot write it again."""
    try:
        with quiet():
            made = dcmread(path, force=True)
            if "SOPClassUID" not in made:
                return path
            for keyword, representation in PLANTED:
                value: object = TOKEN
                if representation == "SQ":
                    item = Dataset()
                    item.PatientName = TOKEN
                    value = Sequence([item])
                made.add_new(keyword, representation, value)
            made.private_block(0x0009, TOKEN, create=True).add_new(1, "LO", TOKEN)
            made.preamble = TOKEN.encode().ljust(128, b"\0")
            made.save_as(target, enforce_file_format=True)
    except Exception:  # noqa: BLE001
        # These files are broken in every way that pydicom's own tests could think of.
        return path
    told.planted = len(PLANTED) + 3
    return target


def _errors(path: Path, known: Path | None = None) -> int | None:
    """Errors that dciodvfy finds, or of these the ones that it did not find in `known`."""
    if shutil.which("dciodvfy") is None:
        return None
    found = _said(path) - (_said(known) if known else Counter())
    return sum(found.values())


def _said(path: Path) -> Counter[str]:
    done = subprocess.run(["dciodvfy", "-new", path], capture_output=True, check=False)  # noqa: S607
    lines = done.stderr.decode(errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("Error")]
    places = (re.sub(r"^(Error - )<(?:.*/)?([^>]*)>", r"\1<\2>", line) for line in errors)
    return Counter(re.sub(r"<[0-9.]+>", "<a UID>", line) for line in places)


def summary(told: list[Told]) -> Iterator[str]:
    """Figures over all files."""
    planted = sum(one.planted for one in told if any(map(one.kept, PROFILES)))
    yield "## Real files\n"
    yield f"{len(told)} files. Of {planted} identities planted in those that were kept, "
    yield f"{sum(one.left for one in told)} are left.\n"
    yield "| profile | kept | blanked | for a person | quarantined | new dciodvfy errors |"
    yield "|---|---|---|---|---|---|"
    for profile in PROFILES:
        kinds = Counter(re.split(r"[: ]", one.outcome[profile])[0] for one in told)
        new = [one.new_errors.get(profile) for one in told]
        errors = "not installed" if all(n is None for n in new) else sum(n or 0 for n in new)
        counts = " | ".join(
            str(kinds[kind]) for kind in ("kept", "blanked", "review", "quarantined")
        )
        yield f"| {profile} | {counts} | {errors} |"
    images = [one for one in told if one.image]
    named = [one for one in images if one.names_patient]
    yield f"\n{len(images)} are decodable images of allowed classes, {len(named)} of them name a "
    yield "patient (the others are refused for that alone). Kept, of those that do:\n"
    for profile in PROFILES:
        kept = sum(one.kept(profile) for one in named)
        yield f"- {profile} profile: {kept}, {100 * kept / len(named):.1f} %"
    yield '\nThe trusting profile has `risky_pixels = "blank"` and `faces = "keep"`.\n'


def every_file(told: list[Told]) -> Iterator[str]:
    """A line for each file."""
    yield "## Every file\n"
    yield "Errors are dciodvfy's in the source, and those that only the new file has.\n"
    yield "| file | | default | trusting | planted, left | errors, new |"
    yield "|---|---|---|---|---|---|"
    for one in told:
        new = max((n for n in one.new_errors.values() if n is not None), default="-")
        cells = (one.name, one.about, *one.outcome.values(), f"{one.planted}, {one.left}")
        text = " | ".join(cell.replace("|", "/") for cell in cells)
        yield f"| {text} | {'-' if one.errors_before is None else one.errors_before}, {new} |"
