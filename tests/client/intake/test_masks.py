"""Masks: real segmentations against highdicom, pixel by pixel; each fault by its name."""

from __future__ import annotations

import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset, FileDataset
from pydicom.sequence import Sequence
from pydicom.uid import UID

from client.intake.deid.engine import Engine
from client.intake.deid.profile import Profile
from client.intake.keys import SiteKey
from client.intake.masks import Code, Masks, Place, read_masks
from client.intake.part10 import DicomFile, Limits
from client.intake.quiet import quiet
from common.errors import IntakeError

CT = "seg_image_ct_binary.dcm"
BONE = Code("272673000", "SCT", "Bone structure (body structure)")
Change = Callable[[FileDataset, list[Dataset]], object]


@pytest.fixture(scope="module")
def folder(shared_data: Path) -> Path:
    return shared_data / "dicom" / "highdicom"


@pytest.fixture(scope="module")
def images(folder: Path) -> dict[str, Dataset]:
    """Headers of every image that one of the segmentations may refer to, by UID."""
    roots = [folder, Path(pydicom.__file__).parent / "data" / "test_files"]
    found: dict[str, Dataset] = {}
    with quiet():
        for path in (path for root in roots for path in sorted(root.rglob("*"))):
            if path.is_file() and "seg" not in path.name:
                header = dcmread(path, stop_before_pixels=True, force=True)
                if "Rows" in header and "SOPInstanceUID" in header:
                    found[str(header.SOPInstanceUID)] = header
    return found


@contextmanager
def opened(source: Path | Dataset, images: Any, **options: Any) -> Iterator[Masks]:
    """The masks of a segmentation on disk, or in memory."""
    if isinstance(source, Path):
        data = source.read_bytes()
    else:
        buffer = BytesIO()
        with quiet():
            source.save_as(buffer, enforce_file_format=True)
        data = buffer.getvalue()
    with quiet():
        yield read_masks(DicomFile.parse(BytesIO(data), Limits()), images, **options)


@contextmanager
def theirs(path: Path) -> Iterator[Any]:
    """The same segmentation, opened by highdicom."""
    highdicom = pytest.importorskip("highdicom", reason="highdicom is the judge of these masks")
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        yield highdicom.seg.segread(path)


@pytest.mark.parametrize(
    "name",
    [
        CT,
        "seg_image_ct_binary_fractional.dcm",
        "seg_image_ct_true_fractional.dcm",
        "seg_image_ct_binary_single_frame.dcm",
        "seg_image_cr_binary.dcm",
    ],
)
def test_masks_of_single_images_agree_with_highdicom(
    folder: Path, images: dict[str, Dataset], name: str
) -> None:
    with theirs(folder / name) as seg:
        uids = [uid for _, _, uid in seg.get_source_image_uids()]
        expected = seg.get_pixels_by_source_instance(uids, ignore_spatial_locations=True)
    with opened(folder / name, images.values()) as masks:
        seen = dict(masks)

    assert set(seen) == {Place(uid, 1) for uid in uids}
    ours = np.stack([seen[Place(uid, 1)] for uid in uids])
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, expected[..., 0] >= 0.5)
    assert ours.any()


@pytest.mark.parametrize(
    "name",
    [
        "seg_image_sm_control.dcm",
        "seg_image_sm_control_labelmap.dcm",
        "seg_image_sm_control_labelmap_palette_color.dcm",
        "seg_image_sm_dots.dcm",
        "seg_image_sm_numbers.dcm",
    ],
)
def test_masks_of_frames_agree_with_highdicom(
    folder: Path, images: dict[str, Dataset], name: str
) -> None:
    """Slides of 20 and 50 segments, each frame of the image by its number."""
    with opened(folder / name, images.values()) as masks:
        seen = dict(masks)
    (uid,) = {place.instance for place in seen}
    frames = sorted(place.frame for place in seen)
    with theirs(folder / name) as seg:
        expected = seg.get_pixels_by_source_frame(
            uid,
            frames,
            combine_segments=True,
            ignore_spatial_locations=True,
            assert_missing_frames_are_empty=True,
        )

    ours = np.stack([seen[Place(uid, frame)] for frame in frames])
    np.testing.assert_array_equal(ours, expected)
    assert len(np.unique(ours)) > 10


def test_segments_have_codes_of_the_standard_and_no_words_of_the_file(
    folder: Path, images: dict[str, Dataset]
) -> None:
    seg = dcmread(folder / CT)
    seg.SegmentSequence[0].SegmentLabel = "DOE JOHN"
    seg.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0].CodeMeaning = "DOE JOHN"

    with opened(seg, images.values()) as masks:
        (segment,) = masks.segments.values()

    assert segment.number == 1
    assert segment.kind == BONE
    assert "DOE" not in repr(segment)
    seg.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator = "99DOE"
    with opened(seg, images.values()) as masks:
        assert masks.segments[1].kind.meaning == "Unknown"


def test_masks_find_their_images_by_their_keyed_names_too(
    folder: Path, images: dict[str, Dataset]
) -> None:
    """The UIDs of a segmentation become those of a cohort by the same key."""
    engine = Engine(Profile(), SiteKey(bytes(32)))
    with opened(folder / CT, images.values()) as masks:
        names = [engine.key.uid(place.instance) for place in masks.places]

    assert len(set(names)) == 4
    assert all(UID(name).is_valid for name in names)


# --- Overlap ------------------------------------------------------------------------------


def test_segments_that_overlap_are_refused_or_the_higher_number_wins(
    folder: Path, images: dict[str, Dataset]
) -> None:
    seg = dcmread(folder / CT)
    double(seg)

    with opened(seg, images.values()) as masks, pytest.raises(IntakeError) as refusal:
        list(masks)
    assert str(refusal.value).startswith("its segments 1 and 7 overlap; one pixel has one label")
    with opened(seg, images.values(), overlap="highest") as masks:
        both = dict(masks)
    with opened(folder / CT, images.values()) as masks:
        for place, labels in masks:
            np.testing.assert_array_equal(both[place], 7 * labels)


def double(seg: FileDataset) -> None:
    """A second segment with the pixels of the first, its frames before those of the first."""
    second = deepcopy(seg.SegmentSequence[0])
    second.SegmentNumber = 7
    seg.SegmentSequence.append(second)
    groups = deepcopy(list(seg.PerFrameFunctionalGroupsSequence))
    for group in groups:
        group.SegmentIdentificationSequence[0].ReferencedSegmentNumber = 7
    seg.PerFrameFunctionalGroupsSequence = Sequence(
        [*groups, *seg.PerFrameFunctionalGroupsSequence]
    )
    seg.NumberOfFrames = 6
    seg.PixelData = seg.PixelData * 2


def test_a_real_file_whose_segments_overlap_agrees_with_highdicom(
    folder: Path, images: dict[str, Dataset]
) -> None:
    path = folder / "seg_image_ct_binary_overlap.dcm"
    with theirs(path) as seg:
        uids = [uid for _, _, uid in seg.get_source_image_uids()]
        expected = seg.get_pixels_by_source_instance(
            uids, combine_segments=True, skip_overlap_checks=True, ignore_spatial_locations=True
        )
    with opened(path, images.values()) as masks, pytest.raises(IntakeError, match="1 and 2"):
        list(masks)
    with opened(path, images.values(), overlap="highest") as masks:
        seen = dict(masks)

    ours = np.stack([seen[Place(uid, 1)] for uid in uids])
    np.testing.assert_array_equal(ours, expected)
    assert {1, 2} <= set(np.unique(ours))


# --- Places -------------------------------------------------------------------------------


def without_sources(seg: FileDataset) -> Sequence:
    """Its frames, which name no image any more."""
    groups: Sequence = seg.PerFrameFunctionalGroupsSequence
    for group in groups:
        del group.DerivationImageSequence
    return groups


def test_masks_that_name_no_image_belong_where_they_lie(
    folder: Path, images: dict[str, Dataset]
) -> None:
    seg = dcmread(folder / CT)
    without_sources(seg)
    del seg.ReferencedSeriesSequence
    named = sources(dcmread(folder / CT), images)

    with opened(folder / CT, named) as masks:
        expected = {place: labels for place, labels in masks if labels.any()}
    with opened(seg, named) as masks:
        seen = dict(masks)

    assert seen.keys() == expected.keys()
    for place, labels in seen.items():
        np.testing.assert_array_equal(labels, expected[place])


def elsewhere(seg: FileDataset, images: list[Dataset]) -> None:
    without_sources(seg)
    set_all(images, "FrameOfReferenceUID", "1.2.3")


def sources(seg: Dataset, images: dict[str, Dataset]) -> list[Dataset]:
    """Copies of the headers that a segmentation names at its top."""
    (series,) = seg.ReferencedSeriesSequence
    named = [str(item.ReferencedSOPInstanceUID) for item in series.ReferencedInstanceSequence]
    return [deepcopy(images[uid]) for uid in named]


def test_an_image_without_a_frame_has_an_empty_mask(
    folder: Path, images: dict[str, Dataset]
) -> None:
    with opened(folder / CT, images.values()) as masks:
        empty = [place for place, labels in masks if not labels.any()]

    assert len(masks.places) == 4
    assert len(empty) == 1


def move(groups: Sequence, by: float) -> None:
    for group in groups:
        position = group.PlanePositionSequence[0]
        x, y, z = map(float, position.ImagePositionPatient)
        position.ImagePositionPatient = [x, y, round(z + by, 4)]


def set_all(headers: list[Dataset], keyword: str, value: Any) -> None:
    for header in headers:
        setattr(header, keyword, value)


def source_items(seg: Dataset) -> list[Dataset]:
    return [
        item
        for group in seg.PerFrameFunctionalGroupsSequence
        for derivation in group.DerivationImageSequence
        for item in derivation.SourceImageSequence
    ]


def segment_item(seg: Dataset, frame: int) -> Dataset:
    group = seg.PerFrameFunctionalGroupsSequence[frame]
    item: Dataset = group.SegmentIdentificationSequence[0]
    return item


FAULTS: dict[str, tuple[Change, str]] = {
    "another size": (
        lambda _, images: set_all(images, "Rows", 512),
        "its masks are 16 x 16, the image is '512' x '16'; expected the same size",
    ),
    "a missing slice": (
        lambda seg, images: images.pop(
            next(
                number
                for number, image in enumerate(images)
                if image.SOPInstanceUID == source_items(seg)[1].ReferencedSOPInstanceUID
            )
        ),
        "the image that its frame 2 refers to is missing",
    ),
    "an unknown segment": (
        lambda seg, _: setattr(segment_item(seg, 1), "ReferencedSegmentNumber", 9),
        "its frame 2 is of segment 9, which it does not describe",
    ),
    "no segment": (
        lambda seg, _: setattr(segment_item(seg, 1), "ReferencedSegmentNumber", None),
        "its ReferencedSegmentNumber is ''",
    ),
    "an empty mask": (
        lambda seg, _: setattr(seg, "PixelData", bytes(len(seg.PixelData))),
        "its masks are empty",
    ),
    "another place": (
        lambda seg, _: move(seg.PerFrameFunctionalGroupsSequence, 1.25),
        "its frame 1 does not lie upon the image that it refers to: 1.25 mm apart",
    ),
    "another place, as it says": (
        lambda seg, _: set_all(source_items(seg), "SpatialLocationsPreserved", "NO"),
        "its masks do not lie upon the images",
    ),
    "no image, and nowhere": (
        lambda seg, _: move(without_sources(seg), 100),
        "its frame 1 names no single image and lies upon 0 of 4; expected one",
    ),
    "another frame of reference": (
        elsewhere,
        "its frame 1 names no single image and lies upon 0 of 4; expected one",
    ),
    "a frame beyond": (
        lambda seg, _: set_all(source_items(seg), "ReferencedFrameNumber", 12),
        "it refers to frame 12 of an image of 1 frames",
    ),
    "no segments": (
        lambda seg, _: setattr(seg, "SegmentSequence", Sequence()),
        "it describes 0 segments",
    ),
    "a segment twice": (
        lambda seg, _: seg.SegmentSequence.append(deepcopy(seg.SegmentSequence[0])),
        "it describes segment 1 twice",
    ),
    "a thousand segments": (
        lambda seg, _: seg.SegmentSequence.extend(numbered(seg, range(2, 1002))),
        "it describes 1001 segments",
    ),
    "frames not described": (
        lambda seg, _: seg.PerFrameFunctionalGroupsSequence.pop(),
        "it has 3 frames and describes 2",
    ),
    "a billion frames": (
        lambda seg, _: setattr(seg, "NumberOfFrames", 10**9),
        "it claims more than 99999 frames",
    ),
    "another kind": (
        lambda seg, _: setattr(seg, "SegmentationType", "DOE JOHN"),
        "its SegmentationType is a text that is not shown here",
    ),
    "fractions of nothing": (
        lambda seg, _: set_all([seg], "SegmentationType", "FRACTIONAL"),
        "its MaximumFractionalValue is missing",
    ),
    "no segmentation": (
        lambda seg, _: setattr(seg, "SOPClassUID", "1.2.840.10008.5.1.4.1.1.2"),
        "its SOP class is 'CT Image Storage'; expected a segmentation",
    ),
    "a word for a sequence": (
        lambda seg, _: seg.add_new("SegmentSequence", "LO", "DOE JOHN"),
        "its SegmentNumber is ''",
    ),
}


def numbered(seg: Dataset, numbers: range) -> list[Dataset]:
    made = [deepcopy(seg.SegmentSequence[0]) for _ in numbers]
    for item, number in zip(made, numbers, strict=True):
        item.SegmentNumber = number
    return made


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused_by_its_fault(
    folder: Path, images: dict[str, Dataset], fault: str
) -> None:
    change, reason = FAULTS[fault]
    seg = dcmread(folder / CT)
    headers = sources(seg, images)
    with quiet():
        change(seg, headers)

    with pytest.raises(IntakeError) as refusal, opened(seg, headers) as masks:
        list(masks)

    assert reason in str(refusal.value)
    assert "DOE" not in str(refusal.value)


def test_an_image_that_claims_a_billion_frames_is_not_looked_for_in_each(
    folder: Path, images: dict[str, Dataset]
) -> None:
    """A reference without a frame number is to every frame; only those described have a place."""
    seg = dcmread(folder / CT)
    headers = sources(seg, images)
    set_all(headers, "NumberOfFrames", 10**9)

    tracemalloc.start()
    with opened(seg, headers) as masks:
        assert {place.frame for place in masks.places} == {1}
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_position_that_is_off_by_rounding_is_no_fault(
    folder: Path, images: dict[str, Dataset]
) -> None:
    seg = dcmread(folder / CT)
    move(seg.PerFrameFunctionalGroupsSequence, 0.01)

    with opened(seg, sources(seg, images)) as masks:
        assert len(dict(masks)) == 4


def test_a_label_map_with_a_label_that_it_does_not_describe_is_refused(
    folder: Path, images: dict[str, Dataset]
) -> None:
    seg = dcmread(folder / "seg_image_sm_control_labelmap.dcm")
    seg.SegmentSequence = Sequence(
        [item for item in seg.SegmentSequence if item.SegmentNumber != 5]
    )

    with opened(seg, images.values()) as masks, pytest.raises(IntakeError, match="of segment 5"):
        list(masks)


def test_two_label_maps_of_one_image_are_refused(folder: Path, images: dict[str, Dataset]) -> None:
    seg = dcmread(folder / "seg_image_sm_control_labelmap.dcm")
    first, second = seg.PerFrameFunctionalGroupsSequence[:2]
    second.DerivationImageSequence = deepcopy(first.DerivationImageSequence)

    with pytest.raises(IntakeError, match="two label maps"), opened(seg, images.values()):
        pass


def test_tiles_are_refused_by_name(folder: Path, images: dict[str, Dataset]) -> None:
    path = folder / "seg_image_sm_dots_tiled_full.dcm"

    with pytest.raises(IntakeError, match="TILED_FULL"), opened(path, images.values()):
        pass


# --- Bits, whatever they are coded in -----------------------------------------------------


def of_liver(seg: Dataset) -> list[Dataset]:
    """The images of the liver are not there: headers with what the segmentation says of them."""
    made = []
    for group, item in zip(seg.PerFrameFunctionalGroupsSequence, source_items(seg), strict=True):
        image = Dataset()
        image.SOPInstanceUID = item.ReferencedSOPInstanceUID
        image.Rows, image.Columns = seg.Rows, seg.Columns
        image.FrameOfReferenceUID = seg.FrameOfReferenceUID
        shared = seg.SharedFunctionalGroupsSequence[0]
        orientation = shared.PlaneOrientationSequence[0].ImageOrientationPatient
        image.ImageOrientationPatient = orientation
        image.PixelSpacing = shared.PixelMeasuresSequence[0].PixelSpacing
        image.ImagePositionPatient = group.PlanePositionSequence[0].ImagePositionPatient
        made.append(image)
    return made


def test_a_mask_is_the_same_in_every_coding_that_is_decoded(shared_data: Path) -> None:
    """Frames of 510 x 510 bits begin in the middle of a byte."""
    folder = shared_data / "dicom" / "pydicom-data"
    plain = {"liver.dcm", "liver_nonbyte_aligned.dcm"}
    reference = {(seg := dcmread(folder / name)).Rows: seg.pixel_array for name in plain}
    seen, refused = set(), set()
    for path in sorted(folder.glob("liver*.dcm")):
        seg = dcmread(path, stop_before_pixels=True)
        try:
            with opened(path, of_liver(seg)) as masks:
                labels = np.stack([labels for _, labels in masks])
        except IntakeError:
            refused.add(path.stem)
            continue
        np.testing.assert_array_equal(labels, reference[seg.Rows], path.name)
        seen.add(path.stem)

    assert seen == {
        "liver",
        "liver_expb",
        "liver_j2k",
        "liver_nonbyte_aligned",
        "liver_nonbyte_aligned_j2k",
    }
    assert refused
    assert all(name.endswith(("deflate", "rle")) for name in refused)
