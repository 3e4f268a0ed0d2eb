"""Masks from DICOM SEG: series and volumes with what highdicom wrote for them; each fault named."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from client.intake import annotated
from client.intake.annotated import Marking
from client.intake.decision import Decision
from client.intake.deid.profile import Profile
from client.intake.desk import Desk, State
from client.intake.dicom import Task as FileTask
from client.intake.items import listed
from client.intake.keys import SiteKey
from client.intake.part10 import Limits
from client.intake.segments import read_segments
from client.intake.series import in_series
from client.intake.sheet import write_sheet
from client.intake.take import Order, take_in
from common.cohort import Cohort
from common.errors import ConfigError
from common.spec import RunSpec

SERIES = "flywheel-tcia-pseudophi"
SLICES, ROWS, COLUMNS = 6, 48, 40
KINDS = (("Liver", codes.SCT.Liver), ("Mass", codes.SCT.Mass))
TABLE = "segment,class\nSCT:10200004,liver\nMass,tumour\n"
STRICT = Marking()


@pytest.fixture(scope="module")
def slices(shared_data: Path) -> list[Dataset]:
    """Six slices of a real series, cut small, at even distances."""
    found = []
    for path in sorted((shared_data / "dicom" / SERIES).rglob("*.dcm")):
        image = dcmread(path)
        if "PixelData" in image and image.get("ImagePositionPatient"):
            found.append(image)
    first = found[0]
    alike = [one for one in found if one.SeriesInstanceUID == first.SeriesInstanceUID]
    for number, image in enumerate(alike[:SLICES]):
        pixels = image.pixel_array[60 : 60 + ROWS, 80 : 80 + COLUMNS]
        image.PixelData = np.ascontiguousarray(pixels).tobytes()
        image.Rows, image.Columns = ROWS, COLUMNS
        across, down = (np.array(first.ImageOrientationPatient[at : at + 3]) for at in (0, 3))
        place = np.array(first.ImagePositionPatient) + 4.0 * number * np.cross(across, down)
        image.ImagePositionPatient = [f"{value:.6f}" for value in place]
        image.ImageOrientationPatient = list(first.ImageOrientationPatient)
        image.PixelSpacing = [1.0, 1.0]
        image.SliceThickness = 4.0
    return list(alike[:SLICES])


def marks() -> NDArray[np.bool_]:
    """(slices, rows, columns, segments): a liver in all slices but the first, a mass in it."""
    drawn = np.zeros((SLICES, ROWS, COLUMNS, 2), dtype=np.bool_)
    drawn[1:, 10:30, 8:28, 0] = True
    drawn[2:4, 15:20, 12:18] = [False, True]
    return drawn


def segmentation(slices: list[Dataset], drawn: NDArray[np.bool_], **options: Any) -> Dataset:
    """By highdicom, a segment for each of the last axis."""
    highdicom = pytest.importorskip("highdicom", reason="highdicom writes these segmentations")
    seg = highdicom.seg
    software = highdicom.AlgorithmIdentificationSequence(
        "drawn", codes.DCM.ArtificialIntelligence, "1"
    )
    segments = [
        seg.SegmentDescription(
            number + 1,
            label,
            codes.SCT.Organ,
            kind,
            seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            software,
        )
        for number, (label, kind) in enumerate(KINDS[: drawn.shape[-1]])
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: Dataset = seg.Segmentation(
            deepcopy(slices), drawn.astype(np.uint8), options.pop("kind", "BINARY"), segments,
            series_instance_uid=generate_uid(), series_number=99,
            sop_instance_uid=generate_uid(), instance_number=1, manufacturer="tests",
            manufacturer_model_name="tests", software_versions="1", device_serial_number="1",
            **options,
        )  # fmt: skip
    return made


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., None]:
    """`put(images)` writes objects into the source."""

    def _put(*objects: Dataset, folder: str = "a") -> None:
        place = tmp_path / "source" / folder
        place.mkdir(parents=True, exist_ok=True)
        for number, one in enumerate(objects):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                one.save_as(place / f"{one.Modality}{number}", enforce_file_format=True)

    return _put


@pytest.fixture
def order(
    tmp_path: Path, make_spec: Callable[..., RunSpec], hospital_key: Any
) -> Callable[..., Order]:
    def _order(marking: Marking = STRICT, table: str = TABLE, **seen: Any) -> Order:
        run = make_spec(
            task={"name": "segmentation", "classes": ["none", "liver", "tumour"]},
            model={"name": "unet"},
            loss={"name": "dice"},
            evaluation={"metric": "dice"},
            input={"height": ROWS, "width": COLUMNS, "window": "range"} | seen,
        )
        (tmp_path / "segments.csv").write_text(table)
        read = read_segments(tmp_path / "segments.csv", run.task)
        return Order(
            tmp_path / "source", tmp_path / "cohort", run, read, hospital_key,
            Profile(faces="keep"), marking=marking,
        )  # fmt: skip

    return _order


@pytest.fixture
def hospital_key() -> Any:
    return SiteKey(bytes(range(32)))


@pytest.fixture
def take(
    order: Callable[..., Order], in_this_process: Any
) -> Callable[..., tuple[Cohort, dict[str, str]]]:
    def _take(**changes: Any) -> tuple[Cohort, dict[str, str]]:
        asked = order(**changes)
        summary = take_in(asked, pool=in_this_process)
        return Cohort.open(asked.cohort), {one.what: one.reason for one in summary.not_used}

    return _take


VOLUME = {
    "depth": 24, "spacing": [4, 1, 1], "direction": "axial", "fit": "crop",
    "height": ROWS, "width": COLUMNS,
}  # fmt: skip


def classes(drawn: NDArray[np.bool_]) -> NDArray[np.int64]:
    return np.where(drawn[..., 1], 2, np.where(drawn[..., 0], 1, 0))


def sorted_masks(cohort: Cohort) -> list[bytes]:
    return sorted(mask.astype(np.uint8).tobytes() for mask in cohort.targets(range(len(cohort))))


def test_slices_have_the_masks_that_highdicom_wrote(
    slices: list[Dataset], put: Any, take: Any
) -> None:
    """A slice with nothing on it too; by code and by label; of the file itself nothing is kept."""
    put(*slices[::-1], segmentation(slices, marks()))

    cohort, reasons = take()

    assert reasons == {}
    assert len(cohort) == SLICES
    assert len(cohort.patients) == 1
    expected = classes(marks())
    assert sorted_masks(cohort) == sorted(mask.astype(np.uint8).tobytes() for mask in expected)
    for row, mask in enumerate(cohort.targets(range(SLICES))):
        (number,) = [
            n for n in range(SLICES) if _same_picture(slices[n], cohort.images([row])[0, 0])
        ]
        np.testing.assert_array_equal(mask, expected[number])


def _same_picture(image: Dataset, seen: NDArray[np.float32]) -> bool:
    stored = image.pixel_array.astype(np.float64)
    return bool(np.abs((stored - stored.min()) / np.ptp(stored) - seen).max() < 1e-4)


def test_a_volume_and_its_mask_lie_where_the_slices_lie(
    slices: list[Dataset], put: Any, take: Any, tmp_path: Path
) -> None:
    put(*slices[::-1], segmentation(slices, marks()))
    put(slices[0], folder="again")
    side = _direction(slices[0])

    cohort, reasons = take(**VOLUME | {"direction": side})

    (copy,) = reasons.items()
    assert copy[0].startswith("again/")
    assert copy[1].startswith("its SOP Instance UID is that of another image of the same series")
    assert write_sheet(cohort, tmp_path / "sheet.png") == 1
    (mask,), (image,) = cohort.targets([0]), cohort.images([0])
    assert mask.shape == image.shape[1:] == (24, ROWS, COLUMNS)
    counts = [int((classes(marks()) == number).sum()) for number in (1, 2)]
    assert [int((mask == number).sum()) for number in (1, 2)] == counts
    stored = np.stack([one.pixel_array for one in slices]).astype(np.float64)
    scaled = (stored - stored.min()) / np.ptp(stored)
    for number in (1, 2):
        expected = float(scaled[classes(marks()) == number].mean())
        assert float(image[0][mask == number].mean()) == pytest.approx(expected, abs=1e-3)


def _direction(image: Dataset) -> str:
    across, down = (np.array(image.ImageOrientationPatient[at : at + 3], float) for at in (0, 3))
    return ("sagittal", "coronal", "axial")[int(np.abs(np.cross(across, down)).argmax())]


def test_what_was_taken_in_stays_with_its_masks_when_more_comes(
    slices: list[Dataset], put: Any, order: Any, in_this_process: Any
) -> None:
    put(*slices, segmentation(slices, marks()))
    asked = order()
    take_in(asked, pool=in_this_process)
    first = Cohort.open(asked.cohort)
    before = first.targets(range(SLICES))
    others = _of_another(slices)
    put(*others, segmentation(others, marks()), folder="b")

    take_in(asked, pool=in_this_process)

    after = Cohort.open(asked.cohort)
    assert (len(after), len(after.patients)) == (2 * SLICES, 2)
    np.testing.assert_array_equal(after.targets(range(SLICES)), before)
    after.verify()


def _of_another(slices: list[Dataset]) -> list[Dataset]:
    """The same slices of another patient, under UIDs of their own."""
    series, study, reference = generate_uid(), generate_uid(), generate_uid()
    others = []
    for image in slices:
        other = deepcopy(image)
        other.PatientID = "ANOTHER"
        other.SeriesInstanceUID, other.StudyInstanceUID = series, study
        other.FrameOfReferenceUID, other.SOPInstanceUID = reference, generate_uid()
        others.append(other)
    return others


def overlapping() -> NDArray[np.bool_]:
    drawn = marks()
    drawn[2:4, 15:20, 12:18, 0] = True
    return drawn


def test_classes_that_overlap_are_refused_or_the_higher_is_taken(
    slices: list[Dataset], put: Any, take: Any, tmp_path: Path
) -> None:
    put(*slices, segmentation(slices, overlapping()))
    cohort, reasons = take()
    assert len(cohort) == 0
    (reason,) = reasons.values()
    assert reason.startswith("its classes 1 and 2 overlap; one pixel has one label")

    for name in ("cohort", "cohort.intake"):
        (tmp_path / name).rename(tmp_path / f"before-{name}")
    cohort, reasons = take(marking=Marking(overlap="highest"))
    assert reasons == {}
    expected = sorted(mask.astype(np.uint8).tobytes() for mask in classes(overlapping()))
    assert sorted_masks(cohort) == expected


def test_segments_of_one_class_may_overlap(slices: list[Dataset], put: Any, take: Any) -> None:
    put(*slices, segmentation(slices, overlapping()))
    table = "segment,class\nLiver,liver\nSCT:4147007,liver\n"
    cohort, reasons = take(table=table, marking=Marking(undescribed="empty"))
    assert reasons == {}
    assert set(np.unique(cohort.targets(range(SLICES)))) == {0, 1}


def _elsewhere(slices: list[Dataset]) -> list[Dataset]:
    """Images as if of this series, in another frame of reference: what was segmented instead."""
    moved = []
    for image in slices:
        other = deepcopy(image)
        other.FrameOfReferenceUID = "1.2.3.4"
        other.ImagePositionPatient = [value + 50 for value in image.ImagePositionPatient]
        moved.append(other)
    return moved


def _smaller(slices: list[Dataset]) -> list[Dataset]:
    cut = []
    for image in slices:
        other = deepcopy(image)
        other.PixelData = np.ascontiguousarray(image.pixel_array[:-2]).tobytes()
        other.Rows = ROWS - 2
        cut.append(other)
    return cut


FAULTS: Mapping[str, tuple[Callable[[list[Dataset]], list[Dataset]], str]] = {
    "another frame of reference": (
        lambda slices: [*slices, segmentation(_elsewhere(slices), marks())],
        "its frame 1 does not lie upon the image",
    ),
    "another size": (
        lambda slices: [*slices, segmentation(_smaller(slices), marks()[:, :-2])],
        "its masks are 46 x 40, the image is '48' x '40'; expected the same size",
    ),
    "no segmentation": (lambda slices: slices, "no segmentation speaks of it; --without-mask"),
    "some images without one": (
        lambda slices: [*slices, segmentation(slices[:4], marks()[:4])],
        "no segmentation speaks of 2 of its 6 images; --without-mask",
    ),
    "of two patients": (
        lambda slices: [*slices, _patient(segmentation(slices, marks()), "SOMEBODY")],
        "its images and segmentations are of 2 patients",
    ),
    "one class twice": (
        lambda slices: [*slices, *(segmentation(slices, marks()) for _ in range(2))],
        "two segmentations of it have the class 'liver'",
    ),
}


def _patient(one: Dataset, name: str) -> Dataset:
    one.PatientID = name
    return one


@pytest.mark.parametrize("fault", FAULTS)
def test_a_series_whose_masks_do_not_fit_is_named_and_nothing_of_it_is_kept(
    slices: list[Dataset], put: Any, order: Any, in_this_process: Any, fault: str
) -> None:
    made, expected = FAULTS[fault]
    put(*made(slices))
    asked = order()

    summary = take_in(asked, pool=in_this_process)

    assert len(Cohort.open(asked.cohort)) == 0
    (reason,) = [one.reason for one in summary.not_used]
    assert reason.startswith(expected)
    with Desk(asked.desk, asked.key) as desk:
        assert desk.totals() == {State.REFUSED: 1}


def test_what_is_without_a_mask_is_empty_only_if_a_person_says_so(
    slices: list[Dataset], put: Any, take: Any
) -> None:
    put(*slices, segmentation(slices[:4], marks()[:4]))
    cohort, reasons = take(marking=Marking(unmarked="empty"))
    assert reasons == {}
    drawn = classes(marks())
    drawn[4:] = 0
    assert sorted_masks(cohort) == sorted(mask.astype(np.uint8).tobytes() for mask in drawn)


def test_a_segment_of_no_class_is_refused_until_the_table_says_what_it_is(
    slices: list[Dataset], put: Any, order: Any, in_this_process: Any
) -> None:
    put(*slices, segmentation(slices, marks()))
    marking = Marking(undescribed="empty")
    short = order(marking, table="segment,class\nSCT:10200004,liver\n")
    summary = take_in(short, pool=in_this_process)
    (reason,) = [one.reason for one in summary.not_used]
    assert reason.startswith("no label: its segment 2 (")
    assert "is in no line of the table of segments" in reason

    passed_over = order(marking, table="segment,class\nSCT:10200004,liver\nMass,none\n")
    take_in(passed_over, pool=in_this_process)

    cohort = Cohort.open(short.cohort)
    assert len(cohort) == SLICES
    expected = classes(marks())
    expected[expected == 2] = 0
    assert sorted_masks(cohort) == sorted(mask.astype(np.uint8).tobytes() for mask in expected)


def test_a_segmentation_without_its_images_is_told(
    slices: list[Dataset], put: Any, take: Any
) -> None:
    put(*slices, segmentation(slices, marks()))
    put(segmentation(_of_another(slices), marks()), folder="orphan")
    cohort, reasons = take()
    assert len(cohort) == SLICES
    assert reasons == {
        "orphan/SEG0": "it is a segmentation of images that are not in the source; expected the "
        "images beside it, under the UIDs that it names"
    }


def _turned(slices: list[Dataset]) -> list[Dataset]:
    made = deepcopy(slices)
    values = list(made[0].ImageOrientationPatient)
    made[0].ImageOrientationPatient = [*values[3:], *values[:3]]
    return made


def _tilted(slices: list[Dataset]) -> list[Dataset]:
    made = deepcopy(slices)
    down = np.array(made[0].ImageOrientationPatient[3:], float)
    for number, image in enumerate(made):
        place = np.array(image.ImagePositionPatient, float) + 1.5 * number * down
        image.ImagePositionPatient = [f"{value:.6f}" for value in place]
    return made


VOLUME_FAULTS: Mapping[str, tuple[Callable[[list[Dataset]], list[Dataset]], str]] = {
    "a missing slice": (lambda slices: [*slices[:2], *slices[3:]], "1 slices are missing between"),
    "two orientations": (_turned, "its slices have several orientations"),
    "a tilted gantry": (_tilted, "its slices are not stacked at right"),
}


@pytest.mark.parametrize("fault", VOLUME_FAULTS)
def test_slices_that_are_no_volume_are_named_and_nothing_is_lost(
    slices: list[Dataset], put: Any, take: Any, fault: str
) -> None:
    """Another series of the source is taken in all the same."""
    made, expected = VOLUME_FAULTS[fault]
    wrong, sound = made(slices), _of_another(slices)
    put(*wrong, folder="wrong")
    put(*sound, segmentation(sound, marks()), folder="sound")
    marking = Marking(unmarked="empty")

    cohort, reasons = take(marking=marking, **VOLUME | {"direction": _direction(slices[0])})

    assert len(cohort) == 1
    (reason,) = reasons.values()
    assert reason.startswith(expected)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("segment\nLiver\n", "column 'class' is missing"),
        ("segment,class\nLiver,spleen\n", "class 'spleen' is unknown; the run's classes are"),
        ("segment,class\nLiver,liver\nLiver,tumour\n", "'Liver' is empty or stands there twice"),
        ("segment,class\n", "has a header and no line"),
    ],
)
def test_a_table_of_segments_that_is_wrong_is_refused(
    order: Callable[..., Order], table: str, expected: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        order(table=table)
    assert expected in str(refusal.value)


def test_two_starts_in_processes_of_their_own_make_the_same_cohort(
    slices: list[Dataset], put: Any, order: Any, in_this_process: Any, tmp_path: Path
) -> None:
    put(*slices, segmentation(slices, marks()))
    asked = order()
    take_in(asked, pool=in_this_process)
    other = dataclasses.replace(asked, cohort=tmp_path / "other", workers=1)
    take_in(other)
    names = ("images.u16", "index.sqlite")
    ours, theirs = (
        [(c / name).read_bytes() for name in names] for c in (asked.cohort, other.cohort)
    )
    assert ours == theirs


def _named_too(segmentation: Dataset, others: list[Dataset]) -> Dataset:
    """As if a segmentation spoke of another series as well."""
    more = Dataset()
    more.SeriesInstanceUID = others[0].SeriesInstanceUID
    image = Dataset()
    image.ReferencedSOPClassUID = others[0].SOPClassUID
    image.ReferencedSOPInstanceUID = others[0].SOPInstanceUID
    more.ReferencedInstanceSequence = [image]
    segmentation.ReferencedSeriesSequence.append(more)
    return segmentation


EMPTY = Marking(unmarked="empty")


def test_a_segmentation_that_is_dropped_makes_no_negatives_of_what_it_names(
    slices: list[Dataset], put: Any, order: Any, in_this_process: Any
) -> None:
    others = _of_another(slices)
    put(*slices, _named_too(segmentation(slices, marks()), others))
    put(*others, segmentation(others, marks()), folder="b")
    asked = order(marking=EMPTY)

    summary = take_in(asked, pool=in_this_process)

    assert len(Cohort.open(asked.cohort)) == 0
    reasons = {one.what: one.reason for one in summary.not_used}
    assert reasons["a/SEG6"] == "it is a segmentation of images of 2 series; expected one"
    assert reasons["a/MR0"].startswith("a segmentation that names it cannot be used")
    assert reasons["b/MR0"] == reasons["a/MR0"]
    with Desk(asked.desk, asked.key) as desk:
        assert desk.totals() == {State.REFUSED: 3}


def test_nothing_is_empty_while_something_may_be_its_segmentation(
    slices: list[Dataset], put: Any, take: Any, tmp_path: Path
) -> None:
    """What has its masks is taken all the same, and the rest once the object is gone."""
    sound = _of_another(slices)
    put(*slices)
    put(*sound, segmentation(sound, marks()), folder="sound")
    broken = tmp_path / "source" / "a" / "broken"
    broken.write_bytes(bytes(128) + b"DICM" + b"\xff" * 99)

    cohort, reasons = take(marking=EMPTY)
    assert len(cohort) == SLICES
    assert reasons["a/MR0"].startswith("--without-mask empty is refused: no segmentation speaks")
    assert set(reasons) == {"a/MR0", "a/broken"}

    broken.unlink()
    cohort, reasons = take(marking=EMPTY)
    assert len(cohort) == 2 * SLICES
    assert "a/MR0" not in reasons


def _renamed(slices: list[Dataset], **more: str) -> list[Dataset]:
    """The images as they were before somebody gave them new UIDs."""
    series = generate_uid()
    others = deepcopy(slices)
    for one in others:
        one.SeriesInstanceUID, one.SOPInstanceUID = series, generate_uid()
        for keyword, value in more.items():
            setattr(one, keyword, value)
    return others


@pytest.mark.parametrize("reference", [{}, {"FrameOfReferenceUID": generate_uid()}])
def test_a_segmentation_of_images_that_were_given_new_uids_makes_no_negatives_of_them(
    slices: list[Dataset], put: Any, take: Any, tmp_path: Path, reference: dict[str, str]
) -> None:
    """By a PACS or a de-identification, which may leave the frame of reference or not."""
    put(*slices)
    put(segmentation(_renamed(slices, **reference), marks()), folder="seg")
    cohort, reasons = take(marking=EMPTY)
    assert len(cohort) == 0
    assert reasons["a/MR0"].startswith("--without-mask empty is refused: no segmentation speaks")
    assert "under the UIDs that it names" in reasons["seg/SEG0"]

    (tmp_path / "source" / "seg" / "SEG0").unlink()
    cohort, reasons = take(marking=EMPTY)
    assert len(cohort) == SLICES
    assert "a/MR0" not in reasons


def test_a_segmentation_of_absent_images_puts_only_those_of_its_place_in_doubt(
    slices: list[Dataset], put: Any, take: Any
) -> None:
    """And of these only what has no mask of its own."""
    elsewhere, marked = _of_another(slices), _of_another(slices)
    for one in marked:
        one.FrameOfReferenceUID = slices[0].FrameOfReferenceUID
    put(*slices)
    put(*elsewhere, folder="elsewhere")
    put(*marked, segmentation(marked, marks()), folder="marked")
    put(segmentation(_renamed(slices), marks()), folder="seg")
    cohort, reasons = take(marking=EMPTY)
    assert len(cohort) == 2 * SLICES
    assert set(reasons) == {"a/MR0", "seg/SEG0"}


def test_a_segmentation_that_also_names_what_is_absent_puts_its_place_in_doubt(
    slices: list[Dataset], put: Any, take: Any
) -> None:
    """It is used upon what it lies on; of what it names beside, the UIDs may be new."""
    beside = _renamed(slices)
    put(*slices, _named_too(segmentation(slices, marks()), _renamed(beside)))
    put(*beside, folder="beside")
    cohort, reasons = take(marking=EMPTY)
    assert len(cohort) == SLICES
    assert cohort.targets(range(SLICES)).any()
    assert set(reasons) == {"beside/MR0"}


def test_what_a_segmentation_names_beside_its_own_images_costs_nothing_that_lies_elsewhere(
    slices: list[Dataset], put: Any, take: Any
) -> None:
    """Nor the images of its own series that it says nothing of."""
    elsewhere = _of_another(slices)
    put(*slices, _named_too(segmentation(slices[:4], marks()[:4]), _renamed(slices)))
    put(*elsewhere, folder="elsewhere")
    cohort, reasons = take(marking=EMPTY)
    assert (len(cohort), reasons) == (2 * SLICES, {})


def test_a_segmentation_that_names_nothing_puts_all_series_that_it_may_be_of_in_doubt(
    slices: list[Dataset], put: Any, take: Any
) -> None:
    """And is used where it lies upon one alone."""
    alone = _of_another(slices)
    for number, images in enumerate((slices, alone)):
        made = segmentation(images, marks())
        del made.ReferencedSeriesSequence
        for groups in made.PerFrameFunctionalGroupsSequence:
            del groups.DerivationImageSequence
        put(*images, made, folder="ab"[number])
    put(*_renamed(slices), folder="beside")
    cohort, reasons = take(marking=EMPTY)
    assert len(cohort) == SLICES
    assert cohort.targets(range(SLICES)).any()
    assert set(reasons) == {"a/MR0", "a/SEG6", "beside/MR0"}


def test_a_segmentation_may_name_its_images_frame_by_frame_alone(
    slices: list[Dataset], put: Any, take: Any
) -> None:
    made = segmentation(slices, marks())
    del made.ReferencedSeriesSequence
    put(*slices, made)
    put(*_renamed(slices), folder="beside")
    cohort, reasons = take(marking=EMPTY)
    assert (len(cohort), reasons) == (2 * SLICES, {})
    assert cohort.targets(range(2 * SLICES)).any()


def test_a_series_that_lost_images_is_not_one_that_was_given_new_uids(
    slices: list[Dataset], put: Any, take: Any
) -> None:
    beside = _renamed(slices)
    drawn = marks()
    drawn[-1] = False
    put(*slices[:-1], segmentation(slices, drawn))
    put(*beside, folder="beside")
    cohort, reasons = take(marking=EMPTY)
    assert (len(cohort), reasons) == (2 * SLICES - 1, {})


def test_no_class_is_absent_while_something_may_be_its_segmentation(
    slices: list[Dataset], put: Any, take: Any, tmp_path: Path
) -> None:
    put(*slices, segmentation(slices, marks()[..., :1]))
    put(segmentation(_renamed(slices), marks()), folder="seg")
    marking = Marking(undescribed="empty")
    cohort, reasons = take(marking=marking)
    assert len(cohort) == 0
    assert reasons["a/MR0"].startswith(
        "--without-class empty is refused: no segmentation of it has a segment of the class 'tum"
    )
    (tmp_path / "source" / "seg" / "SEG0").unlink()
    cohort, reasons = take(marking=marking)
    assert len(cohort) == SLICES
    assert "a/MR0" not in reasons


@pytest.mark.parametrize("comes", ["what is broken", "what names absent images"])
def test_what_was_taken_for_empty_is_told_when_something_comes_that_may_mark_it(
    slices: list[Dataset], put: Any, take: Any, tmp_path: Path, comes: str
) -> None:
    """A series whose images all have masks is not put in doubt by it; nor is one told for ever."""
    marked = _of_another(slices)
    put(*slices)
    put(*marked, segmentation(marked, marks()), folder="marked")
    assert take(marking=EMPTY)[1] == {}
    late = tmp_path / "source" / "late" / "SEG0"
    if comes == "what is broken":
        late.parent.mkdir()
        late.write_bytes(bytes(128) + b"DICM" + b"\xff" * 99)
    else:
        put(segmentation(_renamed(slices), marks()), folder="late")

    cohort, reasons = take(marking=EMPTY)

    assert len(cohort) == 2 * SLICES
    assert set(reasons) == {"a/MR0", "late/SEG0"}
    assert reasons["a/MR0"].startswith("it was taken in as if nothing were where nobody marked")
    late.unlink()
    assert "a/MR0" not in take(marking=EMPTY)[1]


def test_a_class_that_was_taken_for_absent_is_told_when_something_comes_that_may_mark_it(
    slices: list[Dataset], put: Any, take: Any
) -> None:
    put(*slices, segmentation(slices, marks()[..., :1]))
    marking = Marking(undescribed="empty")
    assert take(marking=marking)[1] == {}
    put(segmentation(_renamed(slices), marks()), folder="late")
    reasons = take(marking=marking)[1]
    assert reasons["a/MR0"].startswith("it was taken in as if nothing were where nobody marked")


def test_a_series_that_was_released_as_it_is_now_is_not_told_as_changed(
    slices: list[Dataset], put: Any, order: Any, in_this_process: Any, tmp_path: Path
) -> None:
    """It waited, then a slice came; what changes after the release is told as ever."""
    images = deepcopy(slices)
    images[0].BurnedInAnnotation = "YES"
    put(*images[:-1], segmentation(images[:-1], marks()[:-1]))
    asked = order()
    take_in(asked, pool=in_this_process)
    (tmp_path / "source" / "a" / "SEG5").unlink()
    put(*images, segmentation(images, marks()))
    for _ in range(2):  # the first release is of what was shown then, and lets nothing else through
        with Desk(asked.desk, asked.key) as desk:
            (entry,) = desk.entries(State.WAITS)
            desk.decide(entry, Decision("release"))
        take_in(asked, pool=in_this_process)
    assert len(Cohort.open(asked.cohort)) == SLICES
    for _ in range(2):
        assert take_in(asked, pool=in_this_process).not_used == ()

    put(images[0])
    (told,) = take_in(asked, pool=in_this_process).not_used
    assert told.reason.startswith("it has changed since it was taken in")


def test_a_series_that_changes_after_it_was_kept_is_told(
    slices: list[Dataset], put: Any, take: Any, tmp_path: Path
) -> None:
    put(*slices[1:], segmentation(slices[1:], marks()[1:]))
    assert take()[1] == {}
    put(slices[0], folder="A")  # before all others, so the series' place is another
    cohort, reasons = take()
    assert len(cohort) == SLICES - 1
    (reason,) = reasons.values()
    assert reason.startswith("it has changed since it was taken in")
    (tmp_path / "source" / "A" / "MR0").unlink()
    assert take()[1] == {}
    put(*slices[1:], segmentation(slices[1:], marks()[1:]))
    (reason,) = take()[1].values()
    assert reason.startswith("it has changed since it was taken in")


def test_a_segmentation_of_an_absent_series_is_not_put_on_another_one(
    slices: list[Dataset], put: Any, take: Any
) -> None:
    """They share a frame of reference, as two series of one study do."""
    absent = _of_another(slices)
    for image, other in zip(slices, absent, strict=True):
        other.PatientID, other.FrameOfReferenceUID = image.PatientID, image.FrameOfReferenceUID
    put(*slices, segmentation(slices, marks()))
    put(segmentation(absent, marks()), folder="stray")
    cohort, reasons = take()
    assert len(cohort) == SLICES
    assert list(reasons) == ["stray/SEG0"]
    assert reasons["stray/SEG0"].startswith("it is a segmentation of images that are not in")


def test_a_refused_series_of_a_patient_is_not_forgotten(
    slices: list[Dataset], put: Any, order: Any, in_this_process: Any
) -> None:
    nameless = _of_another(slices)
    for image in nameless:
        image.PatientID = ""
    put(*slices, _patient(segmentation(slices, marks()), "SOMEBODY"))
    put(*nameless, segmentation(nameless, marks()), folder="nameless")
    asked = order()
    summary = take_in(asked, pool=in_this_process)
    assert len(Cohort.open(asked.cohort)) == 0
    reasons = {one.what: one.reason for one in summary.not_used}
    assert reasons["nameless/MR0"] == "no patient identifier"


def test_a_mask_without_its_issuer_is_of_the_same_patient(
    slices: list[Dataset], put: Any, take: Any
) -> None:
    images = deepcopy(slices)
    made = segmentation(images, marks())
    for image in images:
        image.IssuerOfPatientID = "HOSPITAL"
    put(*images, made)
    cohort, reasons = take()
    assert (len(cohort), reasons) == (SLICES, {})


def test_two_segmentations_of_one_uid_are_a_copy_or_a_fault(
    slices: list[Dataset], put: Any, take: Any, tmp_path: Path
) -> None:
    made = segmentation(slices, marks())
    put(*slices, made)
    put(made, folder="again")
    cohort, reasons = take()
    assert len(cohort) == SLICES
    assert reasons == {
        "again/SEG0": "it is a copy of another segmentation, byte for byte, which is used"
    }

    other = deepcopy(made)
    other.SeriesDescription = "corrected"
    put(other, folder="again")
    for name in ("cohort", "cohort.intake"):
        (tmp_path / name).rename(tmp_path / f"before-{name}")
    cohort, reasons = take()
    assert len(cohort) == 0
    assert reasons["a/MR0"].startswith("two segmentations of it have one SOP Instance UID")


def test_a_class_that_nobody_looked_for_is_not_taken_as_absent(
    slices: list[Dataset], put: Any, take: Any, tmp_path: Path
) -> None:
    put(*slices, segmentation(slices, marks()[..., :1]))
    cohort, reasons = take()
    assert len(cohort) == 0
    (reason,) = reasons.values()
    assert reason.startswith("no segmentation of it has a segment of the class 'tumour'")
    for name in ("cohort", "cohort.intake"):
        (tmp_path / name).rename(tmp_path / f"before-{name}")
    cohort, reasons = take(marking=Marking(undescribed="empty"))
    assert (len(cohort), reasons) == (SLICES, {})


def test_a_mask_that_does_not_say_where_it_lies_is_not_put_upon_an_image_that_does(
    slices: list[Dataset], put: Any, take: Any
) -> None:
    made = segmentation(slices, marks())
    for groups in made.PerFrameFunctionalGroupsSequence:
        del groups.PlanePositionSequence
    put(*slices, made)
    cohort, reasons = take()
    assert len(cohort) == 0
    (reason,) = reasons.values()
    assert reason.startswith("its frame 1 does not say where it lies")


def test_a_volume_that_lost_its_end_is_refused(slices: list[Dataset], put: Any, take: Any) -> None:
    drawn = marks()
    drawn[-1] = False
    put(*slices[:-1], segmentation(slices, drawn))
    cohort, reasons = take(**VOLUME | {"direction": _direction(slices[0])})
    assert len(cohort) == 0
    (reason,) = reasons.values()
    assert reason.startswith("1 images of the series that its segmentation names are not in")


def test_a_series_that_is_too_much_together_is_refused(
    slices: list[Dataset], put: Any, order: Any, in_this_process: Any
) -> None:
    put(*slices, segmentation(slices, marks()))
    asked = order()
    reader = asked.reader
    limits = Limits(stored_bytes=ROWS * COLUMNS * 2 * 3)
    small = dataclasses.replace(reader, files=dataclasses.replace(reader.files, limits=limits))
    found = in_series(listed(asked.source), Limits(), 1, asked.bounds, in_this_process)
    result = small(FileTask(found.items[0]))
    assert "bytes in the cohort together; at most" in result.reason


def _nothing_said(slices: list[Dataset]) -> list[Dataset]:
    """Images whose header names no part of the body."""
    images = deepcopy(slices)
    for image in images:
        for keyword in (
            "BodyPartExamined", "StudyDescription", "SeriesDescription", "ProtocolName",
            "RequestedProcedureDescription", "PerformedProcedureStepDescription",
            "ReceiveCoilName", "TransmitCoilName", "FilterType", "AnatomicRegionSequence",
            "ProcedureCodeSequence", "RequestedProcedureCodeSequence",
        ):  # fmt: skip
            if keyword in image:
                delattr(image, keyword)
    return images


@pytest.mark.parametrize("with_text", [range(3, 4), range(SLICES)])
def test_a_head_that_only_the_segmentation_names_waits(
    slices: list[Dataset], put: Any, order: Any, in_this_process: Any, with_text: range
) -> None:
    """And every reason is told, for one release lets all of it through."""
    images = _nothing_said(slices)
    made = segmentation(images, marks())
    put(*images, made)
    asked = dataclasses.replace(order(), profile=Profile())
    take_in(asked, pool=in_this_process)
    assert len(Cohort.open(asked.cohort)) == SLICES

    made.SegmentSequence[1].SegmentLabel = "Skull"
    for number in with_text:
        images[number].BurnedInAnnotation = "YES"
    put(*images, made)
    other = dataclasses.replace(
        order(table=TABLE.replace("Mass", "SCT:4147007")),
        cohort=asked.cohort.with_name("other"), profile=Profile(),
    )  # fmt: skip
    take_in(other, pool=in_this_process)

    with Desk(other.desk, other.key) as desk:
        (entry,) = desk.entries(State.WAITS)
        assert "it is a slice of a head" in entry.reason
        assert "so text in its pixels is likely" in entry.reason


def _with_text(slices: list[Dataset], numbers: range) -> list[Dataset]:
    images = deepcopy(slices)
    for number in numbers:
        pixels = np.array(images[number].pixel_array)
        drawn = Image.new("L", (COLUMNS, ROWS))
        ImageDraw.Draw(drawn).text((2, 34), "MILLER", fill=255)
        pixels[np.array(drawn) > 128] = 4000
        images[number].PixelData = pixels.tobytes()
    return images


@pytest.mark.parametrize("shown", [16, 2])
def test_what_looks_like_text_is_left_only_where_all_of_it_was_shown(
    slices: list[Dataset], put: Any, order: Any, in_this_process: Any, shown: int
) -> None:
    images = _with_text(slices, range(SLICES))
    put(*images, segmentation(images, marks()))
    asked = order()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(annotated, "MOST_SHOTS", shown)
        state = _left_as_it_is(asked, in_this_process)
    with Desk(asked.desk, asked.key) as desk:
        (entry,) = desk.entries(state)
        assert state is (State.KEPT if shown >= SLICES else State.WAITS)
        if state is State.WAITS:
            assert "cannot be left: release it with what was found blanked" in entry.reason
            assert all(one.boxes for one in desk.shots(entry))
            assert len(desk.shots(entry)) == shown


def _left_as_it_is(asked: Order, pool: Any) -> State:
    """What becomes of a series when a person says that nothing of it is to be blanked."""
    take_in(asked, pool=pool)
    with Desk(asked.desk, asked.key) as desk:
        (entry,) = desk.entries(State.KEPT)
        assert all(one.boxes for one in desk.shots(entry))
        desk.decide(entry, Decision("release", found=False))
    take_in(asked, pool=pool)
    with Desk(asked.desk, asked.key) as desk:
        (entry,) = desk.entries()
        return entry.state
