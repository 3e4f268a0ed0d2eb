"""Volumes: real series against world coordinates of their own headers; each fault by its name."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence

from client.intake.deid.engine import Engine
from client.intake.deid.profile import Profile
from client.intake.deid.walk import Account
from client.intake.keys import SiteKey
from client.intake.part10 import BoundedFile, DicomFile, FrameDecoder, Limits
from client.intake.quiet import quiet
from client.intake.volumes import Slice, Volume, resampled, volume_of
from common.errors import IntakeError

SPACING = (3.0, 0.7, 0.5)
SHAPE = (7, 11, 13)


def ramp(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """A value that is linear in space."""
    values: NDArray[np.float64] = points @ np.array([3.0, -2.0, 5.0]) + 100
    return values


def turned() -> NDArray[np.float64]:
    """Slice, row and column directions that are oblique in every plane."""
    a, b = 0.4, -0.7
    across = np.array([np.cos(a), np.sin(a), 0])
    down = np.array([-np.sin(a) * np.cos(b), np.cos(a) * np.cos(b), np.sin(b)])
    return np.stack([np.cross(across, down), down, across])


def header_at(position: NDArray[np.float64], directions: NDArray[np.float64]) -> Dataset:
    header = Dataset()
    header.Rows, header.Columns = SHAPE[1:]
    header.FrameOfReferenceUID = "1.2.3"
    header.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    header.PhotometricInterpretation = "MONOCHROME2"
    header.RescaleSlope, header.RescaleIntercept = 2, -1024
    header.PixelSpacing = list(SPACING[1:])
    header.ImageOrientationPatient = [round(float(x), 12) for x in (*directions[2], *directions[1])]
    header.ImagePositionPatient = [round(float(x), 12) for x in position]
    return header


def series(directions: NDArray[np.float64] | None = None) -> list[Slice]:
    """Oblique slices whose voxels hold the value of the ramp at their places."""
    directions = turned() if directions is None else directions
    origin = np.array([-20.0, 31.0, 7.5])
    made = []
    for number in range(SHAPE[0]):
        position = origin + number * SPACING[0] * directions[0]
        rows, columns = np.mgrid[: SHAPE[1], : SHAPE[2]][..., None]
        places = position + rows * 0.7 * directions[1] + columns * 0.5 * directions[2]
        stored = (ramp(places) + 1024) / 2
        made.append(Slice(header_at(position, directions), 0, stored))
    return made


def shuffled(slices: list[Slice], seed: int = 3) -> list[Slice]:
    order = np.random.default_rng(seed).permutation(len(slices))
    return [slices[number] for number in order]


def assert_is_ramp(volume: Volume) -> None:
    voxels = np.moveaxis(np.indices(volume.values.shape), 0, -1)
    np.testing.assert_allclose(volume.values, ramp(volume.world(voxels)), atol=2e-3)


def test_values_lie_where_the_volume_says() -> None:
    volume = volume_of(shuffled(series()))

    assert volume.values.shape == SHAPE
    assert volume.values.dtype == np.float32
    np.testing.assert_allclose(volume.spacing, SPACING)
    np.testing.assert_allclose(volume.orientation @ volume.orientation.T, np.eye(3), atol=1e-9)
    assert np.linalg.det(volume.orientation[::-1]) == pytest.approx(1)
    assert_is_ramp(volume)


def test_the_order_of_the_files_makes_no_difference() -> None:
    first, second = volume_of(series()), volume_of(shuffled(series()))

    np.testing.assert_array_equal(first.values, second.values)
    np.testing.assert_array_equal(first.origin, second.origin)
    given = shuffled(series())
    for place, number in enumerate(second.order):
        np.testing.assert_allclose(second.values[place], given[number].stored * 2 - 1024, rtol=1e-5)


def test_instance_numbers_make_no_difference() -> None:
    slices = series()
    for number, one in enumerate(slices):
        one.header.InstanceNumber = [4, 1, 6, 2, 3, 0, 5][number]

    np.testing.assert_array_equal(volume_of(slices).values, volume_of(series()).values)


@pytest.mark.parametrize(
    "spacing", [(3.0, 0.7, 0.5), (1.0, 1.0, 1.0), (6.0, 1.4, 1.0), (7.3, 2.9, 0.31), (50, 50, 50)]
)
def test_a_ramp_is_resampled_exactly_up_to_the_edges(spacing: tuple[float, float, float]) -> None:
    volume = volume_of(series())

    finer = resampled(volume, spacing)

    assert finer.spacing == spacing
    lengths = [
        int((length - 1) * old / new + 1e-6) + 1
        for length, old, new in zip(SHAPE, SPACING, spacing, strict=True)
    ]
    assert finer.values.shape == tuple(lengths)
    assert_is_ramp(finer)


def test_shrinking_is_antialiased() -> None:
    """A chequerboard becomes grey; without the blur every second voxel would make it white."""
    values = (np.indices((8, 32, 32)).sum(axis=0) % 2).astype(np.float32)
    board = Volume(values, (1, 1, 1), np.eye(3), np.zeros(3))

    shrunk = resampled(board, (1, 2, 2)).values

    assert np.abs(shrunk[:, 2:-2, 2:-2] - 0.5).max() < 0.15
    assert set(np.unique(resampled(board, (1, 2, 2), "nearest").values)) == {0, 1}


def test_masks_keep_their_labels_and_their_places() -> None:
    given = shuffled(series())
    volume = volume_of(given)
    masks = [np.full(SHAPE[1:], 30 * number, dtype=np.uint8) for number in range(len(given))]

    labels = volume.labelled(masks)
    finer = resampled(labels, (1.0, 0.35, 0.5), "nearest")

    expected = [30 * number for number in volume.order]
    assert labels.values[:, 0, 0].tolist() == expected
    assert finer.values.dtype == np.uint8
    assert finer.values[::3, 0, 0].tolist() == expected
    assert np.unique(finer.values).tolist() == sorted(expected)
    with pytest.raises(IntakeError, match="6 masks for 7 slices of 11 x 13"):
        volume.labelled(masks[1:])


# --- What is refused ----------------------------------------------------------------------


def changed(slices: list[Slice], number: int, **attributes: Any) -> list[Slice]:
    header = deepcopy(slices[number].header)
    for keyword, value in attributes.items():
        setattr(header, keyword, value)
    return [*slices[:number], slices[number]._replace(header=header), *slices[number + 1 :]]


def moved(slices: list[Slice], number: int, by: NDArray[np.float64]) -> list[Slice]:
    position = np.array(slices[number].header.ImagePositionPatient, dtype=float) + by
    return changed(slices, number, ImagePositionPatient=[round(float(x), 10) for x in position])


def sheared() -> list[Slice]:
    slices = series()
    for number in range(len(slices)):
        slices = moved(slices, number, number * 0.8 * turned()[1])
    return slices


FAULTS: dict[str, tuple[Callable[[], list[Slice]], str]] = {
    "missing": (lambda: [*series()[:3], *series()[5:]], "2 slices are missing between its 5"),
    "twice": (lambda: [*series(), series()[2]], "1 of its 8 slices lie where another one does"),
    "uneven": (lambda: moved(series(), 3, 0.9 * turned()[0]), "not evenly spaced: from 2.1 to 3.9"),
    "tilted": (sheared, r"14\.9 degrees off, as by a tilted gantry"),
    "turned": (
        lambda: changed(series(), 2, ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
        "several orientations",
    ),
    "spacing": (lambda: changed(series(), 2, PixelSpacing=[0.7, 0.6]), "several pixel spacings"),
    "reference": (
        lambda: changed(series(), 2, FrameOfReferenceUID="1.2.4"),
        "several frames of reference",
    ),
    "size": (
        lambda: [*series()[:6], series()[6]._replace(stored=np.zeros((11, 12)))],
        "of sizes 11 x 12, 11 x 13",
    ),
    "colour": (
        lambda: [one._replace(stored=np.zeros((11, 13, 3))) for one in series()],
        "one size, in grey",
    ),
    "localiser": (
        lambda: changed(series(), 0, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
        "1 of its 7 slices are localisers",
    ),
    "one": (lambda: series()[:1], "1 slices are no volume"),
    "nowhere": (lambda: changed(series(), 1, ImagePositionPatient=None), "ImagePositionPatient is"),
    "no number": (
        lambda: changed(series(), 1, PixelSpacing=[0.7, float("nan")]),
        "PixelSpacing is missing or wrong",
    ),
    "flat": (
        lambda: changed(series(), 1, ImageOrientationPatient=[1, 0, 0, 1, 0, 0]),
        "are not square",
    ),
    "long": (
        lambda: changed(series(), 1, ImageOrientationPatient=[2, 0, 0, 0, 1, 0]),
        "not of length 1",
    ),
    "zero": (lambda: changed(series(), 1, PixelSpacing=[0, 0.5]), "PixelSpacing is not above 0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_regular_grid_is_refused_by_its_fault(fault: str) -> None:
    make, reason = FAULTS[fault]

    with quiet(), pytest.raises(IntakeError, match=reason):
        volume_of(shuffled(make()))


def test_positions_rounded_as_in_files_are_no_fault() -> None:
    slices = series()
    for number in range(len(slices)):
        slices = moved(slices, number, np.array([0.004, -0.004, 0.004]) * (-1) ** number)

    assert volume_of(slices).values.shape == SHAPE


def test_a_volume_beyond_its_bound_is_refused_before_memory_is_asked_for() -> None:
    volume = volume_of(series())
    with pytest.raises(IntakeError, match="at most 268435456 are held"):
        resampled(volume, (0.001, 0.001, 0.001))
    with pytest.raises(IntakeError, match="three lengths above 0"):
        resampled(volume, (1, 0, 1))
    huge = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (2**14, 2**14), (0, 0))
    with pytest.raises(IntakeError, match="7 x 16384 x 16384 voxels"):
        volume_of([one._replace(stored=huge) for one in series()])


# --- Real series --------------------------------------------------------------------------


def read(path: Path) -> list[Slice]:
    with quiet(), BoundedFile(path, 2**29) as stream:
        file = DicomFile.parse(stream, Limits())
        element, geometry = file.pixel_element(), file.geometry(Limits())
        decode = FrameDecoder(file, element, geometry)
        frames = range(geometry.frames)
        return [Slice(file.header, frame, decode(frame)) for frame in frames]


@pytest.fixture(scope="module")
def brain(shared_data: Path) -> list[Slice]:
    """26 slices of an MR, as they lie in the folder."""
    folder = shared_data / "dicom" / "flywheel-tcia-pseudophi" / "dicom"
    return [one for path in sorted(folder.glob("*.dcm")) for one in read(path)]


def test_a_real_series_lies_where_its_headers_say(brain: list[Slice]) -> None:
    volume = volume_of(shuffled(brain))

    assert volume.values.shape == (26, 256, 256)
    for one in brain:
        raw = dcmread_plain(one)
        for row, column in ((0, 0), (10, 200), (255, 3)):
            place = raw["position"] + row * raw["rows"] + column * raw["columns"]
            steps = (place - volume.origin) @ volume.orientation.T / volume.spacing
            voxel = np.rint(steps).astype(int)
            np.testing.assert_allclose(steps, voxel, atol=1e-3)
            assert volume.values[tuple(voxel)] == one.stored[row, column]


def dcmread_plain(one: Slice) -> dict[str, NDArray[np.float64]]:
    """PS3.3 equation C.7.6.2.1-1, straight from the attributes."""
    header = one.header
    cosines = np.array(header.ImageOrientationPatient, dtype=float)
    between_rows, between_columns = map(float, header.PixelSpacing)
    return {
        "position": np.array(header.ImagePositionPatient, dtype=float),
        "columns": cosines[:3] * between_columns,
        "rows": cosines[3:] * between_rows,
    }


def test_a_clean_header_gives_the_same_volume(brain: list[Slice]) -> None:
    engine = Engine(Profile(faces="keep"), SiteKey(bytes(32)))
    with quiet():
        clean = [one._replace(header=engine.clean_header(one.header, Account())) for one in brain]

    first, second = volume_of(brain), volume_of(clean)

    np.testing.assert_array_equal(first.values, second.values)
    np.testing.assert_array_equal(first.origin, second.origin)
    assert first.spacing == second.spacing


def test_a_real_series_with_a_slice_taken_out_or_put_in_twice_is_refused(
    brain: list[Slice],
) -> None:
    with pytest.raises(IntakeError, match="1 slices are missing between its 25"):
        volume_of([*brain[:9], *brain[10:]])
    with pytest.raises(IntakeError, match="where another one does"):
        volume_of([*brain, brain[4]])


def test_an_enhanced_object_is_the_same_volume(brain: list[Slice]) -> None:
    """The same slices as frames of one object, their geometry in functional groups."""
    enhanced = Dataset()
    first = brain[0].header
    enhanced.Rows, enhanced.Columns = first.Rows, first.Columns
    enhanced.FrameOfReferenceUID = first.FrameOfReferenceUID
    enhanced.PhotometricInterpretation = "MONOCHROME2"
    orientation, measures, shared = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = first.ImageOrientationPatient
    measures.PixelSpacing = first.PixelSpacing
    shared.PlaneOrientationSequence = DicomSequence([orientation])
    shared.PixelMeasuresSequence = DicomSequence([measures])
    enhanced.SharedFunctionalGroupsSequence = DicomSequence([shared])
    frames = []
    for one in brain:
        group, position = Dataset(), Dataset()
        position.ImagePositionPatient = one.header.ImagePositionPatient
        group.PlanePositionSequence = DicomSequence([position])
        frames.append(group)
    enhanced.PerFrameFunctionalGroupsSequence = DicomSequence(frames)

    volume = volume_of(
        shuffled([Slice(enhanced, number, one.stored) for number, one in enumerate(brain)])
    )

    np.testing.assert_array_equal(volume.values, volume_of(brain).values)
    others = Dataset()
    others.PixelSpacing = [9, 9]
    shared.PixelMeasuresSequence = DicomSequence([others])
    for group in frames:
        group.PixelMeasuresSequence = DicomSequence([measures])
    slices = [Slice(enhanced, number, one.stored) for number, one in enumerate(brain)]
    assert volume_of(slices).spacing == volume.spacing
    kind = Dataset()
    kind.FrameType = ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]
    frames[3].MRImageFrameTypeSequence = DicomSequence([kind])
    with pytest.raises(IntakeError, match="1 of its 26 slices are localisers"):
        volume_of([Slice(enhanced, number, one.stored) for number, one in enumerate(brain)])


def test_a_ct_is_in_hounsfield_units_and_its_padding_does_not_count(shared_data: Path) -> None:
    (one,) = read(shared_data / "dicom" / "cornerstone-ct-ts" / "CT1_J2KR")
    above = deepcopy(one.header)
    above.ImagePositionPatient = [*above.ImagePositionPatient[:2], 5000.0]

    volume = volume_of([one, one._replace(header=above)])

    inside = one.stored[one.stored != -2000]
    assert volume.values.max() == inside.max() - 1024
    assert volume.values.min() == inside.min() - 1024


def test_every_real_slice_that_has_a_place_makes_a_volume_with_a_copy_beyond_it(
    shared_data: Path,
) -> None:
    """Single slices of many makers: each, and itself 2 mm along its normal, is a volume."""
    made = 0
    for path in sorted((shared_data / "dicom" / "dicom2nifti").rglob("*")):
        if not path.is_file():
            continue
        one, *_ = read(path)
        if one.stored.ndim == 3 or not one.header.get("ImagePositionPatient"):
            continue
        cosines = np.array(one.header.ImageOrientationPatient, dtype=float)
        beyond = np.array(one.header.ImagePositionPatient) + 2 * np.cross(cosines[:3], cosines[3:])
        above = deepcopy(one.header)
        above.ImagePositionPatient = [round(float(x), 9) for x in beyond]
        volume = volume_of([one._replace(header=above), one])
        assert volume.spacing[0] == pytest.approx(2, abs=1e-3)
        assert volume.order == (1, 0)
        isotropic = resampled(volume, (1, 1, 1))
        assert isotropic.values.shape[0] == 3
        made += 1
    assert made >= 12
