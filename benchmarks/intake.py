"""What the intake costs, beside three other tools; and what becomes of real files.

    python benchmarks/intake.py [--files 150] [--output docs/intake-results.md]

De-identification alone: CTs of 512 x 512, 16 bits, made on the spot, with noise and the header of
a scanner, once with a maker's private attributes (the CTs of three makers that are at hand have 61,
100 and 188) and once without any. Each tool reads, de-identifies and writes them, in a process of
its own that lives as long as the benchmark, all by turns in one run. Seconds are those that the
processor worked for the process: other work on the machine and the waiting for a disk count for
nobody. Of ours, pixels are looked through and cut as always, but not searched for text, which none
of the others does. The others are installed for the benchmark alone, into an environment that is
then thrown away; what they leave in the files is not asked here.

Then ours in one and in two processes, by the clock; and what one more file costs the whole intake
of the processor: what `cloister intake run` does, with the search for text, images at half the
size, the journal and the cohort; here its one worker is the process itself, so that all is counted.

With real files at hand (`../shared/data/dicom`, and those that pydicom brings), what becomes of
each: under the default profile, in which secondary captures and heads wait for a person, and under
one that trusts the detector and keeps heads. In each file identities are planted first.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from intake_files import of_real_files
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

OTHERS = {
    "dicognito": "dicognito==0.19.0",
    "deid": "deid==0.4.13",
    "dicom-anonymizer": "dicom-anonymizer==2.1.0",
}
OURS = "cloister"
TURNS, SIDE, PRIVATE, FEW = 15, 512, 90, 15
SPEC = f"""
name = "benchmark"
rounds = 1
[task]
classes = ["no", "yes"]
[model]
name = "small-cnn"
[input]
height = {SIDE // 2}
width = {SIDE // 2}
[optimizer]
name = "sgd"
learning_rate = 0.1
[local]
batch_size = 4
[privacy]
mechanism = "dp-sgd"
noise_multiplier = 1.0
delta = 1e-4
"""
START = """
import resource, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
def work(folder, target):
    target.mkdir(exist_ok=True)
    for path in sorted(folder.iterdir()):
        clean(path, target)
{start}
print("ready", flush=True)
for line in sys.stdin:
    folder, target = map(Path, line.split())
    before = resource.getrusage(resource.RUSAGE_SELF)
    work(folder, target)
    after = resource.getrusage(resource.RUSAGE_SELF)
    print(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, flush=True)
"""
WHOLE = "the whole intake"
SCRIPTS = {
    WHOLE: """
from client.intake.keys import SiteKey
from client.intake.labels import read_labels
from client.intake.take import Order, take_in
from common.spec import read_run_file
class Here:
    def __init__(self, reader, workers, bounds):
        self.reader = reader
    def __enter__(self):
        return self
    def __exit__(self, *failure):
        return None
    def map(self, tasks):
        return map(self.reader, tasks)
def work(source, cohort):
    spec = read_run_file(cohort.parent / "run.toml").spec
    labels = read_labels(cohort.parent / "labels.csv", spec.task)
    order = Order(source, cohort, spec, labels, SiteKey(bytes(range(32))))
    summary = take_in(order, pool=Here)
    if summary.not_used:
        raise SystemExit(str(summary.not_used[0]))
""",
    OURS: """
from client.intake.deid.engine import Engine
from client.intake.deid.pixeldata import PixelCleaner
from client.intake.deid.profile import Profile
from client.intake.deid.save import save
from client.intake.keys import SiteKey
from client.intake.part10 import BoundedFile
pixels = PixelCleaner(Profile(), find=lambda plane: [])
engine = Engine(Profile(), SiteKey(bytes(range(32))), pixels=pixels)
def clean(path, target):
    with BoundedFile(path, 2**29) as stream:
        cleaned = engine.clean_stream(stream)
    save(cleaned, target)
""",
    "dicognito": """
import pydicom
from dicognito.anonymizer import Anonymizer
anonymizer = Anonymizer(seed="benchmark")
def clean(path, target):
    dataset = pydicom.dcmread(path)
    anonymizer.anonymize(dataset)
    dataset.save_as(target / path.name)
""",
    "deid": """
import logging
from deid.dicom import replace_identifiers
from deid.logger import bot
bot.level = 0
def clean(path, target):
    replace_identifiers(
        [str(path)], save=True, overwrite=True, output_folder=str(target), remove_private=True
    )
""",
    "dicom-anonymizer": """
from dicomanonymizer import anonymize_dicom_file
def clean(path, target):
    anonymize_dicom_file(str(path), str(target / path.name))
""",
}


def scan(random: np.random.Generator) -> NDArray[np.int16]:
    """A slice of a chest in Hounsfield units, with the noise of a scanner."""
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    image = np.full((SIDE, SIDE), -1000.0)
    shift = random.uniform(-0.05, 0.05)
    for row, column, tall, wide, value in (
        (0, 0, 0.67, 0.84, -80), (0, 0, 0.62, 0.78, 50), (-0.1, -0.35, 0.3, 0.2, -850),
        (-0.1, 0.35, 0.3, 0.2, -850), (0.4, 0, 0.1, 0.1, 700), (0, 0, 0.2, 0.15, 120),
    ):  # fmt: skip
        inside = ((y - row) / tall) ** 2 + ((x - column - shift) / wide) ** 2 < 1
        image[inside] = value
    return (image + random.normal(0, 20, image.shape)).astype(np.int16)


def ct(number: int, random: np.random.Generator, private: int) -> FileDataset:
    """A file as a scanner writes it: about 100 attributes, sequences, and private ones."""
    study = f"1.3.12.2.1107.5.1.4.{number // 50}"
    made = FileDataset("", {}, preamble=bytes(128), file_meta=FileMetaDataset())
    made.file_meta.MediaStorageSOPClassUID = CTImageStorage
    made.file_meta.MediaStorageSOPInstanceUID = UID(f"{study}.1.{number}")
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    for keyword, value in _HEADER.items():
        setattr(made, keyword, value)
    made.SOPInstanceUID, made.InstanceNumber = f"{study}.1.{number}", number
    made.StudyInstanceUID, made.SeriesInstanceUID = study, f"{study}.1"
    made.FrameOfReferenceUID = f"{study}.2"
    made.PatientID, made.PatientName = patient_of(number), f"Mustermann^Erika^{number // 50}"
    made.ImagePositionPatient = [-175.5, -175.5, -1.25 * number]
    made.SliceLocation = -1.25 * number
    made.ReferencedImageSequence = Sequence([_reference(f"{study}.9.{n}") for n in range(3)])
    made.ProcedureCodeSequence = Sequence([_code("CTTHX", "99LOCAL", "CT Thorax nativ")])
    made.AnatomicRegionSequence = Sequence([_code("51185008", "SCT", "Chest")])
    for place in range(private):
        block = made.private_block(0x0009 + 2 * (place // 15), "GEMS_IDEN_01", create=True)
        block.add_new(place % 15 + 1, *_PRIVATE[place % len(_PRIVATE)])
    made.PixelData = scan(random).tobytes()
    made["PixelData"].VR = "OW"
    return made


def patient_of(number: int) -> str:
    """Whose file number `number` is."""
    return f"P{number // 50:07}"


def _reference(uid: str) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = CTImageStorage, uid
    return item


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


_PRIVATE = (
    ("LO", "CT01_OC0"), ("SH", "Mustermann"), ("SL", 4711), ("DS", "-12.625"), ("SS", 3),
    ("UI", "1.2.840.113619.2.55.3"), ("IS", "17"), ("LO", "HELICAL MODE"), ("OB", bytes(16)),
)  # fmt: skip
_HEADER = {
    "SpecificCharacterSet": "ISO_IR 100", "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5"],
    "InstanceCreationDate": "20260312", "InstanceCreationTime": "101531.250000",
    "SOPClassUID": CTImageStorage, "StudyDate": "20260312", "SeriesDate": "20260312",
    "AcquisitionDate": "20260312", "ContentDate": "20260312", "StudyTime": "100501.156000",
    "SeriesTime": "101200.3", "AcquisitionTime": "101530.25", "ContentTime": "101530.25",
    "AccessionNumber": "4711081512", "Modality": "CT", "Manufacturer": "SIEMENS",
    "InstitutionName": "Klinikum Musterstadt", "InstitutionAddress": "Musterweg 1",
    "ReferringPhysicianName": "Overs^Otto", "StationName": "CT54321",
    "StudyDescription": "CT Thorax nativ", "SeriesDescription": "Thorax 1.25 B30f",
    "InstitutionalDepartmentName": "Radiologie", "PerformingPhysicianName": "Klug^Karla",
    "OperatorsName": "MTRA Meier", "ManufacturerModelName": "SOMATOM Definition",
    "PatientBirthDate": "19640812", "PatientSex": "F", "PatientAge": "061Y", "PatientSize": "1.68",
    "PatientWeight": "71.5", "PatientComments": "Frau Mustermann, Station 4", "EthnicGroup": "-",
    "OtherPatientIDs": "47110815", "PatientAddress": "Musterweg 2", "PregnancyStatus": 4,
    "BodyPartExamined": "CHEST", "SliceThickness": "1.25", "KVP": "120", "ScanOptions": "HELIX",
    "DataCollectionDiameter": "500", "DeviceSerialNumber": "54321", "SoftwareVersions": "syngo CT",
    "ProtocolName": "Thorax Mustermann", "ReconstructionDiameter": "351",
    "DistanceSourceToDetector": "1085.6", "DistanceSourceToPatient": "595",
    "GantryDetectorTilt": "0", "TableHeight": "148", "RotationDirection": "CW",
    "ExposureTime": "500", "XRayTubeCurrent": "180", "Exposure": "90", "FilterType": "FLAT",
    "GeneratorPower": "21", "FocalSpots": "1.2", "DateOfLastCalibration": "20260312",
    "TimeOfLastCalibration": "063012.000000", "ConvolutionKernel": "B30f",
    "PatientPosition": "HFS", "StudyID": "1", "SeriesNumber": 2, "AcquisitionNumber": 1,
    "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "PositionReferenceIndicator": "",
    "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "Rows": SIDE,
    "Columns": SIDE, "PixelSpacing": [0.685547, 0.685547], "BitsAllocated": 16, "BitsStored": 16,
    "HighBit": 15, "PixelRepresentation": 1, "SmallestImagePixelValue": -1100,
    "LargestImagePixelValue": 1000, "WindowCenter": ["40", "-600"], "WindowWidth": ["400", "1200"],
    "RescaleIntercept": "0", "RescaleSlope": "1", "RescaleType": "HU",
    "WindowCenterWidthExplanation": ["WINDOW1", "WINDOW2"],
    "RequestingPhysician": "Overs^Otto", "RequestingService": "Innere",
    "RequestedProcedureDescription": "CT Thorax", "PerformedProcedureStepStartDate": "20260312",
    "PerformedProcedureStepStartTime": "100501", "PerformedProcedureStepID": "4711",
    "PerformedProcedureStepDescription": "CT Thorax", "LossyImageCompression": "00",
}  # fmt: skip


@dataclass
class Tool:
    """A tool at work: told a folder and a target, it answers with seconds of the processor."""

    name: str
    process: subprocess.Popen[str]

    @classmethod
    def start(cls, name: str, python: Path) -> Tool:
        """Start it, and wait until it has imported what it needs."""
        script = START.format(start=SCRIPTS[name])
        process = subprocess.Popen(
            [python, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=None, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        tool = cls(name, process)
        tool.answer()
        return tool

    def ask(self, folder: Path, target: Path) -> None:
        """Tell it to work through a folder."""
        target.parent.mkdir(exist_ok=True)
        print(folder, target, file=self.process.stdin, flush=True)

    def answer(self) -> str:
        """What it says when it is done."""
        if self.process.stdout is None or not (line := self.process.stdout.readline()):
            raise SystemExit(f"{self.name} has ended before its answer")
        return line.strip()

    def stop(self) -> None:
        """Let it end."""
        self.process.communicate()


def write_cts(folder: Path, count: int, private: int) -> list[Path]:
    """CTs in as many folders as there are turns."""
    random, folders = np.random.default_rng(1), [folder / f"turn{n}" for n in range(TURNS)]
    for place in folders:
        place.mkdir(parents=True)
    for number in range(count):
        made = ct(number, random, private)
        made.save_as(folders[number % TURNS] / f"{number:05}.dcm", enforce_file_format=True)
    return folders


def install(place: Path) -> Path:
    """An environment with the other tools; its interpreter."""
    venv.create(place, with_pip=True)
    done = subprocess.run(
        [place / "bin" / "pip", "install", "--quiet", *OTHERS.values()],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"the other tools cannot be installed:\n{done.stderr}")
    return place / "bin" / "python"


def side_by_side(folders: list[Path], target: Path, python: Path) -> dict[str, list[float]]:
    """Files a second of the processor, turn by turn, for each tool."""
    ours = Path(sys.executable)
    tools = [Tool.start(name, ours if name == OURS else python) for name in (OURS, *OTHERS)]
    speeds: dict[str, list[float]] = {tool.name: [] for tool in tools}
    for folder in folders:
        for tool in tools:
            tool.ask(folder, target / tool.name)
            speeds[tool.name].append(len(list(folder.iterdir())) / float(tool.answer()))
    for tool in tools:
        tool.stop()
        written, asked = len(list((target / tool.name).iterdir())), len(list(_files(folders)))
        if written != asked:
            raise SystemExit(f"{tool.name} has written {written} files of {asked}")
    return speeds


def _files(folders: list[Path]) -> Iterator[Path]:
    for folder in folders:
        yield from folder.iterdir()


def at_once(folders: list[Path], target: Path, processes: int) -> float:
    """Files a second by the clock, with so many of our processes at work."""
    tools = [Tool.start(OURS, Path(sys.executable)) for _ in range(processes)]
    started = time.perf_counter()
    for turn, folder in enumerate(folders[: len(folders) // processes * processes]):
        tools[turn % processes].ask(folder, target / f"{processes}-{turn % processes}")
    for turn in range(len(folders) // processes * processes):
        tools[turn % processes].answer()
    elapsed = time.perf_counter() - started
    for tool in tools:
        tool.stop()
    return len(list(_files(folders[: len(folders) // processes * processes]))) / elapsed


def whole(folders: list[Path], place: Path) -> float:
    """Seconds of the processor that one more file costs the whole intake."""
    place.mkdir()
    (place / "run.toml").write_text(SPEC, encoding="utf-8")
    files, seconds = sorted(_files(folders)), []
    tool = Tool.start(WHOLE, Path(sys.executable))
    for count in (FEW, FEW, len(files)):  # the first for the process to warm up
        source = place / f"source{len(seconds)}"
        source.mkdir()
        for path in files[:count]:
            (source / path.name).symlink_to(path)
        patients = {patient_of(int(path.stem)) for path in files[:count]}
        table = "\n".join(["PatientID,label", *(f"{patient},no" for patient in patients)])
        (place / "labels.csv").write_text(table, encoding="utf-8")
        tool.ask(source, place / f"cohort{len(seconds)}")
        seconds.append(float(tool.answer()))
    tool.stop()
    return (seconds[2] - seconds[1]) / (len(files) - FEW)


def speed(place: Path, count: int) -> Iterator[str]:
    """The tables of speed, line by line."""
    python = install(place / "tools")
    rich, plain = (write_cts(place / f"ct{n}", count, n) for n in (PRIVATE, 0))
    speeds = side_by_side(rich, place / "rich", python)
    without = side_by_side(plain, place / "plain", python)
    yield "## De-identification alone\n"
    yield f"Files a second of the processor, median of {TURNS} turns of {count // TURNS} files:\n"
    yield f"| | with {PRIVATE} private attributes | slowest and fastest turn | without any |"
    yield "|---|---|---|---|"
    for name, turns in speeds.items():
        span = f"{min(turns):.0f} to {max(turns):.0f}"
        yield f"| {name} | {median(turns):.0f} | {span} | {median(without[name]):.0f} |"
    one, two = (at_once(rich, place / f"of{n}", n) for n in (1, 2))
    yield f"\nBy the clock, waiting for the disk included: {one:.0f} files a second in one "
    yield f"process, {two:.0f} in two at once, {two / one:.2f} times as many.\n"
    alone, cost = 1 / median(speeds[OURS]), whole(rich, place / "whole")
    yield "## The whole intake\n"
    yield f"One more file costs a whole intake {1000 * cost:.1f} ms of the processor, "
    yield f"de-identification alone {1000 * alone:.1f} ms: {cost / alone:.2f} times that.\n"


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=int, default=150, help="CTs to make")
    parser.add_argument("--output", type=Path, help="write the tables to this file too")
    asked = parser.parse_args()
    lines = [
        "# The intake, measured",
        "",
        f"`python benchmarks/intake.py` prints this page. Here on {os.cpu_count()} cores, on which "
        f"{os.getloadavg()[1]:.1f} processes were at work before it began: what goes by the clock "
        "suffers from that, what goes by the processor less.",
        "",
    ]
    with tempfile.TemporaryDirectory(prefix="cloister-benchmark-") as place:
        for line in speed(Path(place), asked.files):
            lines.append(line)
            print(line, flush=True)
    for line in of_real_files():
        lines.append(line)
        print(line, flush=True)
    if asked.output is not None:
        asked.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
