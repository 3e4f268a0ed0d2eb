"""A model of volumes at work: series in, masks back in the slices as they were taken."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian
from torch import Tensor, nn

from client.intake.annotated import Marking
from client.intake.deid.profile import Profile
from client.intake.segments import read_segments
from client.intake.take import Order as Intake
from client.intake.take import take_in
from client.prediction.dicom_objects import Reports, Segmentations
from client.prediction.explained import Explainer
from client.prediction.predict import NOT_WHOLE
from client.prediction.reading import CUT_OFF, TWO_PARTS
from client.prediction.rows import UNPLACED
from common.cohort import Cohort
from common.errors import ConfigError

SLICES, ROWS, COLUMNS = 9, 20, 28
SPACING = (3.0, 0.8, 1.25)
VOLUMES: dict[str, Any] = {
    "task": {"name": "segmentation", "kind": "mask", "classes": ["ground", "organ", "tumour"]},
    "model": {"name": "unet", "width": 4},
    "input": {
        "height": 32,
        "width": 40,
        "depth": 32,
        "spacing": [1.5, 0.8, 0.9],
        "direction": "axial",
        "window": "range",
    },
    "loss": {"name": "dice"},
    "evaluation": {"metric": "dice"},
}
CUBE = {"height": 48, "width": 48, "depth": 48, "spacing": [0.8, 0.8, 0.8]}
AXIAL, SAGITTAL = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0, 0.0, -1.0]


class Bright(nn.Module):
    """Class 1 where a voxel is bright, class 2 where it is half bright, the rest class 0."""

    def forward(self, volumes: Tensor) -> Tensor:
        x = volumes[:, 0] * 0.25 + 0.5
        return torch.stack([-(x - 0.0).abs(), -(x - 1.0).abs(), -(x - 0.5).abs()], dim=1)


def drawn() -> NDArray[np.int64]:
    """(slices, rows, columns) an organ that no axis or direction takes for another."""
    classes = np.zeros((SLICES, ROWS, COLUMNS), dtype=np.int64)
    classes[1:7, 3:12, 4:19] = 1
    classes[5:7, 3:5, 4:8] = 0
    classes[2:4, 14:18, 20:26] = 2
    return classes


def write_series(
    clinic: Any, orientation: list[float], folder: str = "a", **attributes: Any
) -> NDArray[np.int64]:
    """A series of `drawn`, from the last slice to the first; returns what was drawn."""
    across, down = np.array(orientation[:3]), np.array(orientation[3:])
    classes = drawn()
    for number in reversed(range(SLICES)):
        values = np.array([0, 4000, 2000], dtype=np.uint16)[classes[number]]
        position = np.array([-20.0, 7.0, 100.0]) + SPACING[0] * number * np.cross(across, down)
        made: dict[str, Any] = {
            "SOPClassUID": CTImageStorage,
            "SOPInstanceUID": f"1.2.9.{len(folder)}.{ord(folder[0])}.{number + 1}",
            "SeriesInstanceUID": f"1.2.9.{ord(folder[0])}",
            "FrameOfReferenceUID": f"1.2.8.{ord(folder[0])}",
            "Modality": "CT",
            "InstanceNumber": SLICES - number,
            "ImagePositionPatient": [f"{value:.6f}" for value in position],
            "ImageOrientationPatient": orientation,
            "PixelSpacing": [SPACING[1], SPACING[2]],
            "SliceThickness": SPACING[0],
            "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
            "RescaleIntercept": 0,
            "RescaleSlope": 1,
            "PatientName": "Doe^Jane",
            "PatientSex": "F",
            "PatientBirthDate": "19500101",
            "StudyDate": "20260101",
            "StudyTime": "101112",
            "StudyID": "1",
            "ReferringPhysicianName": "",
            "Manufacturer": "M",
        }
        clinic.hospital.film(f"{folder}/{number}.dcm", values, **made | attributes)
    return classes


@pytest.fixture
def model(clinic: Any) -> Callable[..., Any]:
    def _model(use: Any = None, **seen: Any) -> Any:
        changes = {**VOLUMES, "input": VOLUMES["input"] | seen, "use": use or {}}
        return clinic.model(Bright(), **changes)

    return _model


def found_by_slice(path: Path, uids: list[str]) -> NDArray[np.int64]:
    segmentation = highdicom.seg.segread(path)
    pixels = segmentation.get_pixels_by_source_instance(
        uids,
        combine_segments=True,
        ignore_spatial_locations=True,
        assert_missing_frames_are_empty=True,
    )
    return np.asarray(pixels).astype(np.int64)


def agreement(found: NDArray[np.int64], true: NDArray[np.int64], kind: int) -> float:
    """Dice."""
    return 2 * float(((found == kind) & (true == kind)).sum()) / float(
        (found == kind).sum() + (true == kind).sum()
    )  # fmt: skip


@pytest.mark.parametrize("orientation", [AXIAL, SAGITTAL], ids=["axial", "sagittal"])
@pytest.mark.parametrize("direction", ["axial", "coronal", "sagittal"])
def test_a_volume_s_mask_comes_back_upon_the_slices_that_it_was_taken_of(
    clinic: Any, model: Any, orientation: list[float], direction: str
) -> None:
    """Whichever way slices were taken and the network sees them; mirrored it would not fit."""
    true = write_series(clinic, orientation)
    asked = model(**CUBE | {"direction": direction})
    found = clinic.answer(asked, additions=(Segmentations(asked.package),))
    assert found.refused == {}
    (path,) = found.files("seg")
    uids = [f"1.2.9.1.97.{number + 1}" for number in range(SLICES)]
    back = found_by_slice(path, uids)
    assert min(agreement(back, true, kind) for kind in (1, 2)) > 0.85
    for axis in range(3):
        mirrored = np.flip(back, axis)
        assert min(agreement(mirrored, true, kind) for kind in (1, 2)) < 0.5


def test_on_its_own_grid_a_mask_comes_back_voxel_by_voxel(clinic: Any, model: Any) -> None:
    true = write_series(clinic, AXIAL)
    asked = model(spacing=list(SPACING))
    additions = (Segmentations(asked.package), Reports(asked.package))
    found = clinic.answer(asked, additions=additions)
    (row,) = found.json["images"]
    counts = {"organ": int((true == 1).sum()), "tumour": int((true == 2).sum())}
    assert row["voxels"] == counts
    each = float(np.prod(SPACING))
    assert row["volume_mm3"] == pytest.approx({name: n * each for name, n in counts.items()})
    assert (row["slices"], row["rows"], row["columns"]) == (SLICES, ROWS, COLUMNS)
    (study,) = found.json["studies"]
    assert study["volume_mm3"] == {"1.2.9.97": row["volume_mm3"]}
    (line,) = found.table("predictions.csv")
    assert line["voxels {organ}"] == str(counts["organ"])
    assert line["series_instance_uid"] == "1.2.9.97"
    (path,) = found.files("seg")
    uids = [f"1.2.9.1.97.{number + 1}" for number in range(SLICES)]
    assert (found_by_slice(path, uids) == true).all()
    segmentation = dcmread(path)
    assert segmentation.FrameOfReferenceUID == "1.2.8.97"
    for frame in segmentation.PerFrameFunctionalGroupsSequence:
        (source,) = frame.DerivationImageSequence[0].SourceImageSequence
        number = uids.index(source.ReferencedSOPInstanceUID)
        position = [float(v) for v in frame.PlanePositionSequence[0].ImagePositionPatient]
        assert position == pytest.approx([-20, 7, 100 + SPACING[0] * number])
    report = highdicom.sr.srread(found.files("sr")[0])
    assert isinstance(report.content, highdicom.sr.MeasurementReport)
    (group,) = report.content.get_image_measurement_groups()
    assert {image.referenced_sop_instance_uid for image in group.source_images} == set(uids)
    values = {m.name.meaning: float(m.value) for m in group.get_measurements()}
    assert values["Volume: organ"] == pytest.approx(row["volume_mm3"]["organ"])


def test_what_was_cut_off_is_background_and_said(clinic: Any, model: Any) -> None:
    true = write_series(clinic, AXIAL)
    half = [step / 2 for step in SPACING]
    asked = model(spacing=half, fit="crop", height=32, width=32, depth=32)
    found = clinic.answer(asked, additions=(Segmentations(asked.package),))
    (row,) = found.json["images"]
    kept = np.zeros_like(true)
    kept[:, 2:18, 6:22] = true[:, 2:18, 6:22]  # of 39 x 55 voxels on the grid the middle 32 x 32
    assert row["voxels"] == {"organ": int((kept == 1).sum()), "tumour": int((kept == 2).sum())}
    assert CUT_OFF in row["caveats"]


def test_it_sees_bit_for_bit_what_the_intake_stores_of_a_series(
    clinic: Any, model: Any, tmp_path: Path, in_this_process: Any
) -> None:
    write_series(clinic, SAGITTAL)
    asked = model(**CUBE)
    spec = asked.package.spec
    (tmp_path / "segments.csv").write_text("segment,class\nOrgan,organ\n")
    order = Intake(
        clinic.hospital.folder, tmp_path / "cohort", spec,
        read_segments(tmp_path / "segments.csv", spec.task), clinic.hospital.key, Profile(),
        marking=Marking(unmarked="empty", undescribed="empty"),
    )  # fmt: skip
    assert take_in(order, pool=in_this_process).not_used == ()
    seen: list[NDArray[Any]] = []

    def watch(of: Any, pictures: Any = None) -> Any:
        for one, pixels in of:
            seen.append(pixels)
            yield from type(asked).answers(asked, [(one, pixels)], pictures)

    asked.answers = watch
    clinic.answer(asked)
    (stored,) = Cohort.open(order.cohort).images([0])
    (ours,) = seen
    assert (ours == np.rint(stored * 65535)).all()
    assert ours.any()


def _without(number: int) -> Callable[[Path], None]:
    return lambda folder: (folder / f"a/{number}.dcm").unlink()


def _changed(number: int, **attributes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / f"a/{number}.dcm"
        header = dcmread(path)
        for keyword, value in attributes.items():
            setattr(header, keyword, value)
        header.save_as(path)

    return change


FAULTS = {
    "a missing slice": (_without(4), "1 slices are missing between its 8"),
    "orientations": (_changed(4, ImageOrientationPatient=SAGITTAL), "several orientations"),
    "spacings": (_changed(4, PixelSpacing=[0.5, 0.5]), "several pixel spacings"),
    "a place twice": (
        _changed(4, ImagePositionPatient=[-20.0, 7.0, 109.0]),
        "lie where another one does",
    ),
    "frames of reference": (_changed(4, FrameOfReferenceUID="1.2.77"), "several frames of"),
    "no place": (_changed(4, ImagePositionPatient=None), "ImagePositionPatient is missing"),
    "a localiser": (_changed(4, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "localisers"),
    "a header at fault": (
        _changed(8, PhotometricInterpretation="CIELAB"),
        "photometric interpretation",
    ),
    "pixels cut short": (_changed(8, PixelData=b"\0\0"), "cut short"),
}


@pytest.mark.parametrize(("fault", "reason"), FAULTS.values(), ids=FAULTS.keys())
def test_a_series_that_is_no_volume_is_refused_whole_and_costs_no_other(
    clinic: Any, model: Any, fault: Callable[[Path], None], reason: str
) -> None:
    """Also where it is the last slice that is bad, without which the volume would look whole."""
    write_series(clinic, AXIAL)
    write_series(clinic, AXIAL, "b")
    fault(clinic.hospital.folder)
    found = clinic.answer(model())
    (row,) = found.json["images"]
    assert row["series_instance_uid"] == "1.2.9.98"
    left = {str(path.relative_to(clinic.hospital.folder))
            for path in (clinic.hospital.folder / "a").iterdir()}  # fmt: skip
    assert set(found.refused) == left
    assert any(reason in said for said in found.refused.values())
    assert all(reason in said or said == NOT_WHOLE for said in found.refused.values())
    (study,) = found.json["studies"]
    assert study["refused"] == len(left)


@pytest.mark.parametrize(
    ("name", "content", "costs"),
    [
        (".DS_Store", b"\0\0\0\1Bud1", False),
        ("Thumbs.db", b"\xd0\xcf\x11\xe0", False),
        ("a/README.TXT", b"how to open this disc", False),
        ("viewer/index.html", b"<html>", False),
        ("EMPTY.TXT", b"", False),
        ("slice.txt", bytes(128) + b"DICM" + b"\x02\0", True),  # whatever it is called
        ("IM0009", b"how to open this disc", True),
        ("IM0009", b"", True),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_what_only_lies_beside_the_slices_costs_no_volume(  # noqa: PLR0913, PLR0917
    clinic: Any, model: Any, name: str, content: bytes, costs: bool, zipped: bool
) -> None:
    write_series(clinic, AXIAL)
    path = clinic.hospital.folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    source = clinic.hospital.folder
    if zipped:
        made = shutil.make_archive(str(clinic.hospital.place / "disc"), "zip", source)
        source = Path(made)
    found = clinic.answer(model(), source=source)
    (row,) = found.json["images"]
    assert any(place.endswith(name) for place in found.refused)  # it is named all the same
    assert (UNPLACED.format(1) in row["caveats"]) == costs
    assert (set(row["volume_mm3"].values()) == {None}) == costs


def test_what_could_not_be_read_at_all_may_have_been_a_slice(clinic: Any, model: Any) -> None:
    write_series(clinic, AXIAL)
    (clinic.hospital.folder / "broken.dcm").write_bytes(b"no DICOM")
    found = clinic.answer(model())
    (row,), (study,) = found.json["images"], found.json["studies"]
    assert UNPLACED.format(1) in row["caveats"]
    assert study["caveats"].count(UNPLACED.format(1)) == 1
    assert set(row["volume_mm3"].values()) == {None}
    assert all(row["voxels"].values())
    (clinic.hospital.folder / "broken.dcm").unlink()
    (row,) = clinic.answer(model(), "whole").json["images"]
    assert all(row["volume_mm3"].values())


def test_a_multi_frame_object_is_a_volume_too(clinic: Any, model: Any) -> None:
    """The frames of one enhanced object, and a segmentation of its frames."""
    enhanced = _enhanced()
    (clinic.hospital.folder / "e.dcm").parent.mkdir(exist_ok=True)
    enhanced.save_as(clinic.hospital.folder / "e.dcm", enforce_file_format=True)
    asked = model(spacing=list(SPACING))
    found = clinic.answer(asked, additions=(Segmentations(asked.package),))
    assert found.refused == {}
    (row,) = found.json["images"]
    true = drawn()
    assert row["voxels"] == {"organ": int((true == 1).sum()), "tumour": int((true == 2).sum())}
    segmentation = highdicom.seg.segread(found.files("seg")[0])
    back = segmentation.get_pixels_by_source_frame(
        enhanced.SOPInstanceUID, list(range(1, SLICES + 1)), combine_segments=True,
        ignore_spatial_locations=True, assert_missing_frames_are_empty=True,
    )  # fmt: skip
    assert (np.asarray(back) == true[::-1]).all()  # its frames run from the last slice to the first


def test_a_volume_of_which_a_frame_shows_another_part_is_refused_whole(
    clinic: Any, model: Any
) -> None:
    made = _enhanced()
    made.BodyPartExamined = "CHEST"
    code, anatomy = Dataset(), Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "69536005", "SCT", "Head"
    anatomy.AnatomicRegionSequence = [code]
    clinic.hospital.folder.mkdir(exist_ok=True)
    made.save_as(clinic.hospital.folder / "e.dcm", enforce_file_format=True)
    asked = model(use={"body_parts": ["CHEST"]}, spacing=list(SPACING))
    assert clinic.answer(asked).refused == {}
    made.PerFrameFunctionalGroupsSequence[3].FrameAnatomySequence = [anatomy]
    made.save_as(clinic.hospital.folder / "e.dcm", enforce_file_format=True)
    found = clinic.answer(asked, "again")
    assert "its frame 4 is 'HEAD'; the model is meant for CHEST" in found.refused["e.dcm"]
    assert found.json["images"] == []
    (row,) = clinic.answer(model(spacing=list(SPACING)), "plain").json["images"]
    assert TWO_PARTS in row["caveats"]


def test_masks_of_an_object_too_large_to_hold_are_not_made_and_cost_no_answer(
    clinic: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.prediction.dicom_objects._MOST_PIXELS", 1000)
    clinic.hospital.folder.mkdir(exist_ok=True)
    _enhanced().save_as(clinic.hospital.folder / "e.dcm", enforce_file_format=True)
    asked = model(spacing=list(SPACING))
    found = clinic.answer(asked, additions=(Segmentations(asked.package),))
    assert len(found.json["images"]) == 1
    (lost,) = found.json["not_made"]
    assert "at most 1000 pixels" in lost["reason"]
    assert found.files("seg") == []


def _enhanced() -> Any:
    """`drawn` as one enhanced CT, its last slice first."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    meta.MediaStorageSOPInstanceUID = UID("1.2.9.5.1")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made = FileDataset("", {}, preamble=b"\0" * 128, file_meta=meta)
    values = np.array([0, 4000, 2000], dtype=np.uint16)[drawn()[::-1]]
    plain = {
        "SOPClassUID": EnhancedCTImageStorage, "SOPInstanceUID": "1.2.9.5.1",
        "SeriesInstanceUID": "1.2.9.5", "StudyInstanceUID": "1.2.9.6", "PatientID": "P1",
        "FrameOfReferenceUID": "1.2.8.5", "Modality": "CT", "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2", "NumberOfFrames": SLICES, "Rows": ROWS,
        "Columns": COLUMNS, "BitsAllocated": 16, "BitsStored": 12, "HighBit": 11,
        "PixelRepresentation": 0, "PixelData": values.tobytes(), "InstanceNumber": 1,
        "ImageType": ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"], "PatientName": "Doe^Jane",
        "PatientBirthDate": "", "PatientSex": "", "StudyDate": "", "StudyTime": "", "StudyID": "",
        "Manufacturer": "M",
    }  # fmt: skip
    for keyword, value in plain.items():
        setattr(made, keyword, value)

    def item(**attributes: Any) -> list[Dataset]:
        one = Dataset()
        for keyword, value in attributes.items():
            setattr(one, keyword, value)
        return [one]

    made.SharedFunctionalGroupsSequence = item(
        PixelMeasuresSequence=item(PixelSpacing=list(SPACING[1:]), SliceThickness=SPACING[0]),
        PlaneOrientationSequence=item(ImageOrientationPatient=AXIAL),
        PixelValueTransformationSequence=item(RescaleIntercept=0, RescaleSlope=1, RescaleType="US"),
    )
    made.PerFrameFunctionalGroupsSequence = [
        item(
            PlanePositionSequence=item(
                ImagePositionPatient=[-20.0, 7.0, 100.0 + SPACING[0] * (SLICES - 1 - number)]
            ),
            FrameContentSequence=item(DimensionIndexValues=[number + 1]),
        )[0]
        for number in range(SLICES)
    ]
    return made


def test_volumes_are_not_explained(model: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be explained"):
        Explainer(model())


def test_other_tools_read_the_segmentation_of_a_volume(clinic: Any, model: Any) -> None:
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy is not installed")
    write_series(clinic, SAGITTAL)
    asked = model(**CUBE)
    additions = (Segmentations(asked.package), Reports(asked.package))
    found = clinic.answer(asked, additions=additions)
    files = found.files("seg") + found.files("sr")
    assert len(files) == 2
    for path in files:
        done = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, check=False)
        assert "Error" not in done.stdout + done.stderr, done.stderr
