"""Pairs of NIfTI volumes: cut where they should be, whole or not at all, told by name."""

from __future__ import annotations

import gzip
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from client.intake.annotations import read_owners
from client.intake.keys import SiteKey
from client.intake.nifti import NiftiPairs
from client.intake.run import intake
from common.cohort import Cohort
from common.errors import ConfigError, IntakeError
from common.spec import RunSpec

SIDES = (12, 16, 10)
Take = Callable[..., tuple[Cohort, dict[str, str]]]
Arrays = NDArray[Any]


def volume(seed: int = 1) -> Arrays:
    return np.random.default_rng(seed).normal(400, 90, SIDES).astype(np.float32)


def labels() -> Arrays:
    """Class 1 to the right, class 2 in front, of the middle."""
    mask = np.zeros(SIDES, dtype=np.uint8)
    mask[7:10, 5:11, 3:7] = 1
    mask[2:5, 9:14, 3:7] = 2
    return mask


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    return images, masks


@pytest.fixture
def put(folders: tuple[Path, Path]) -> Callable[..., None]:
    """`put("a", image, mask)` writes a pair; `affine` is the image's, `mask_affine` the mask's."""

    def _put(
        name: str,
        image: Arrays | None = None,
        mask: Arrays | None = None,
        *,
        affine: Arrays | None = None,
        mask_affine: Arrays | None = None,
    ) -> None:
        place = np.eye(4) if affine is None else affine
        there = place if mask_affine is None else mask_affine
        shown = volume(sum(name.encode())) if image is None else image
        nibabel.save(nibabel.Nifti1Image(shown, place), folders[0] / f"{name}.nii.gz")
        drawn = labels() if mask is None else mask
        nibabel.save(nibabel.Nifti1Image(drawn, there), folders[1] / f"{name}.nii.gz")

    return _put


@pytest.fixture
def run(make_spec: Any) -> Callable[..., RunSpec]:
    def _run(height: int = 10, width: int = 16, **table: Any) -> RunSpec:
        spec: RunSpec = make_spec(
            task={"name": "segmentation", "classes": ["none", "right", "front"]},
            model={"name": "unet"},
            loss={"name": "dice"},
            evaluation={"metric": "dice"},
            input={"height": height, "width": width, "window": "range"} | table,
        )
        return spec

    return _run


@pytest.fixture
def take(tmp_path: Path, folders: tuple[Path, Path], run: Callable[..., RunSpec]) -> Take:
    def _take(
        direction: Any = "sagittal", owners: str = "", spec: RunSpec | None = None
    ) -> tuple[Cohort, dict[str, str]]:
        table = None
        if owners:
            (tmp_path / "owners.csv").write_text(owners)
            table = read_owners(tmp_path / "owners.csv")
        asked = spec or run()
        source = NiftiPairs(*folders, asked, SiteKey(bytes(32)), direction, table)
        summary = intake(source, tmp_path / "cohort", asked)
        reasons = {Path(item.what).name: item.reason for item in summary.not_used}
        return Cohort.open(tmp_path / "cohort"), reasons

    return _take


# What stands at a row and a column of a slice, by direction: (x, y, z) of the array.
PLACES: dict[str, Callable[[int, int, int], tuple[int, int, int]]] = {
    "sagittal": lambda number, row, column: (number, 15 - column, 9 - row),
    "coronal": lambda number, row, column: (11 - column, number, 9 - row),
    "axial": lambda number, row, column: (11 - column, 15 - row, number),
}


@pytest.mark.parametrize(
    ("direction", "size"),
    [("sagittal", (10, 16)), ("coronal", (10, 12)), ("axial", (16, 12))],
)
def test_slices_are_those_of_the_volume_head_and_front_up(
    take: Take, put: Any, run: Any, direction: str, size: tuple[int, int]
) -> None:
    image, count = volume(), volume().size // (size[0] * size[1])
    put("a", image)
    cohort, reasons = take(direction, spec=run(*size))
    assert reasons == {}
    assert (len(cohort), cohort.unit, len(cohort.patients)) == (count, "patient", 1)
    bright = (image - image.min()) / np.ptp(image)
    for number in range(count):
        shown, mask = cohort.images([number])[0, 0], cohort.targets([number])[0]
        places = [PLACES[direction](number, r, c) for r, c in np.ndindex(size)]
        expected = np.array([bright[place] for place in places]).reshape(size)
        np.testing.assert_allclose(shown, expected, atol=1e-4)
        wanted = np.array([labels()[place] for place in places]).reshape(size)
        np.testing.assert_array_equal(mask, wanted)


def test_a_volume_stored_in_another_order_gives_the_same_slices(
    take: Take, put: Any, tmp_path: Path
) -> None:
    """Left for right, and head for front: what counts is where the affine says it lies."""
    image, mask = volume(), labels()
    put("a", image, mask)
    plain, _ = take()
    seen = plain.images(range(12)), plain.targets(range(12))
    for path in (tmp_path / "cohort").iterdir():
        path.unlink()
    (tmp_path / "cohort").rmdir()
    turned = np.array([[-1, 0, 0, 11], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]], dtype=float)
    put("a", image[::-1].swapaxes(1, 2), mask[::-1].swapaxes(1, 2), affine=turned)
    again, reasons = take()
    assert reasons == {}
    np.testing.assert_array_equal(again.images(range(12)), seen[0])
    np.testing.assert_array_equal(again.targets(range(12)), seen[1])


def test_the_brightness_is_of_the_whole_volume_whatever_its_scale(take: Take, put: Any) -> None:
    image = volume()
    image[0] /= 4
    put("a", image)
    put("b", image * 1000 - 7)
    cohort, _ = take()
    assert cohort.images([0]).max() < 0.5
    assert cohort.images(range(12)).max() == 1
    np.testing.assert_allclose(cohort.images(range(12)), cohort.images(range(12, 24)), atol=1e-4)


def test_pixels_become_square(take: Take, put: Any, run: Any) -> None:
    put("a", affine=np.diag([1.0, 1.0, 3.0, 1.0]))
    cohort, _ = take(spec=run(30, 16))
    mask = cohort.targets([8])[0]
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    assert (len(rows), len(columns)) == (12, 6)
    assert cohort.images([8])[0, 0].std(axis=1).min() > 0  # nothing is padded


def test_whose_a_volume_is_says_a_table(take: Take, put: Any) -> None:
    for name in ("a", "b", "c", "d"):
        put(name)
    cohort, reasons = take(
        owners="file,patient,split\na.nii.gz,P1,train\nb.nii.gz,P1,train\nc.nii.gz,,\n"
        "gone.nii.gz,P9,\n"
    )
    assert (len(cohort), len(cohort.patients)) == (24, 1)
    assert set(cohort.splits) == {"train"}
    assert reasons == {
        "c.nii.gz": "no patient identifier",
        "d.nii.gz": "the table does not say whose volume it is",
        "gone.nii.gz": reasons["gone.nii.gz"],
    }
    assert reasons["gone.nii.gz"].startswith("the table names it, and it is not in")


def test_every_pair_that_cannot_be_used_is_named_with_its_reason(
    take: Take, put: Any, folders: tuple[Path, Path]
) -> None:
    blank = volume()
    blank[:, :, 4] = 0
    ends = volume()
    ends[0] = ends[-2:] = 0
    endless = volume()
    endless[:, 6] = np.nan
    put("good", ends)
    put("size", mask=labels()[:-1])
    put("place", mask_affine=np.diag([1.0, 1, 1.01, 1]))
    put("class", mask=labels() * 2)
    put("half", mask=labels() * np.float32(0.5))
    put("empty", mask=labels() * 0)
    put("missing", blank)
    put("nan", endless)
    put("film", image=np.stack([volume()] * 2, axis=-1))
    put("complex", image=volume().astype(np.complex64))
    put("cut")
    cut = folders[0] / "cut.nii.gz"
    cut.write_bytes(cut.read_bytes()[:900])
    (folders[0] / "text.nii").write_text("no volume")
    (folders[1] / "text.nii").write_text("no volume")
    (folders[0] / "alone.nii").write_text("")
    (folders[1] / "lonely.nii").write_text("")
    (folders[1] / "notes.txt").write_text("")

    cohort, reasons = take()

    assert len(cohort.patients) == 1
    assert reasons.pop("size.nii.gz") == "its mask has 11 x 16 x 10 voxels, the image 12 x 16 x 10"
    assert reasons.pop("place.nii.gz").startswith("its mask lies elsewhere")
    assert reasons.pop("class.nii.gz").startswith("its mask has the value 4; expected 0 to 2")
    assert reasons.pop("half.nii.gz").startswith("its mask has the value 0.5; expected 0 to 2")
    assert reasons.pop("empty.nii.gz") == "its mask is empty: nothing but 'none'"
    assert reasons.pop("missing.nii.gz").startswith("its axial slice 5 of 10 is blank between")
    assert reasons.pop("nan.nii.gz").startswith("its coronal slice 7 of 16 is blank between")
    assert reasons.pop("film.nii.gz").startswith("it has the shape (12, 16, 10, 2)")
    assert reasons.pop("complex.nii.gz").startswith("its values are complex64")
    assert reasons.pop("cut.nii.gz").startswith("it cannot be read (EOFError")
    assert reasons.pop("text.nii").startswith("it cannot be read (ImageFileError")
    assert reasons.pop("alone.nii").startswith("no mask of that name")
    assert reasons.pop("lonely.nii").startswith("no image of that name")
    assert reasons.pop("notes.txt").startswith("its name ends neither in .nii")
    assert reasons == {}


def test_a_volume_that_does_not_say_left_from_right_is_refused(
    take: Take, put: Any, folders: tuple[Path, Path]
) -> None:
    put("good")
    put("guessed")
    for folder in folders:
        path = folder / "guessed.nii.gz"
        image: Any = nibabel.load(path)
        image.header["sform_code"] = image.header["qform_code"] = 0
        nibabel.save(nibabel.Nifti1Image(image.get_fdata(), None, image.header), path)
    cohort, reasons = take()
    assert len(cohort.patients) == 1
    assert list(reasons) == ["guessed.nii.gz"]
    assert reasons["guessed.nii.gz"].startswith("its sform and qform codes are 0")


def _with_qform(path: Path, theirs: Arrays) -> None:
    """The volume of a file with another affine as its qform, both with their codes."""
    image: Any = nibabel.load(path)
    made: Any = nibabel.Nifti1Image(np.asanyarray(image.dataobj), image.affine)
    made.set_sform(image.affine, code=1)
    made.set_qform(theirs, code=1)
    nibabel.save(made, path)


def test_a_volume_whose_two_affines_send_an_axis_different_ways_is_refused(
    take: Take, put: Any, folders: tuple[Path, Path]
) -> None:
    """Whichever of its files it is; a head that is tilted against its atlas is no contradiction."""
    tilt, swapped = np.eye(4), np.eye(4)
    tilt[1:3, 1:3] = [[np.cos(0.5), -np.sin(0.5)], [np.sin(0.5), np.cos(0.5)]]
    swapped[:3, :3] = swapped[[0, 2, 1], :3] * [[1], [-1], [1]]
    qforms = {
        "same": np.eye(4), "tilted": tilt, "mirrored": np.diag([-1.0, 1, 1, 1]),
        "upside": np.diag([1.0, 1, -1, 1]), "swapped": swapped,
    }  # fmt: skip
    for name, theirs in qforms.items():
        put(name)
        _with_qform(folders[0] / f"{name}.nii.gz", theirs)
    put("mask")
    _with_qform(folders[1] / "mask.nii.gz", qforms["mirrored"])

    cohort, reasons = take()

    assert len(cohort.patients) == 2
    axes = {name.removesuffix(".nii.gz"): reason for name, reason in reasons.items()}
    assert {name: reason[:41] for name, reason in axes.items()} == {
        "mirrored": "its sform and its qform send its axis 1 d",
        "upside": "its sform and its qform send its axis 3 d",
        "swapped": "its sform and its qform send its axis 2 d",
        "mask": "its sform and its qform send its axis 1 d",
    }
    assert "write the right one as both, or 0 as the code of the wrong one" in axes["mirrored"]


@pytest.mark.parametrize("code", ["sform_code", "qform_code"])
def test_of_two_affines_one_may_be_said_to_be_wrong(
    take: Take, put: Any, folders: tuple[Path, Path], code: str
) -> None:
    """The way out that the refusal names: the other affine is then the volume's."""
    for folder in folders:
        put("a") if folder is folders[0] else None
        path = folder / "a.nii.gz"
        _with_qform(path, np.diag([-1.0, 1, 1, 1]))
        image: Any = nibabel.load(path)
        image.header[code] = 0
        nibabel.save(nibabel.Nifti1Image(np.asanyarray(image.dataobj), None, image.header), path)
    cohort, reasons = take()
    assert reasons == {}
    right = 7 if code == "qform_code" else 2  # of 12 slices, those of class 1 are 7 to 9
    found = [number for number in range(12) if (cohort.targets([number]) == 1).any()]
    assert found == list(range(right, right + 3))


def test_a_header_that_asks_for_more_than_there_is_room_is_refused(
    take: Take, put: Any, folders: tuple[Path, Path]
) -> None:
    """A bomb: a few kilobytes that say they are eight billion voxels."""
    put("bomb")
    path = folders[0] / "bomb.nii.gz"
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[42:48] = np.array([2000, 2000, 2000], dtype="<i2").tobytes()
    path.write_bytes(gzip.compress(bytes(raw)))
    cohort, reasons = take()
    assert len(cohort) == 0
    assert reasons["bomb.nii.gz"].startswith("it has (2000, 2000, 2000) voxels; at most")


def rewritten(path: Path, place: int, number: Arrays, more: bytes = b"") -> None:
    """Put a number into a volume's header, and bytes behind the header."""
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[place : place + number.nbytes] = number.tobytes()
    path.write_bytes(gzip.compress(bytes(raw[:348]) + (more or bytes(raw[348:])), 1))


def test_a_header_that_makes_no_sense_costs_its_own_pair_alone(
    take: Take, put: Any, folders: tuple[Path, Path]
) -> None:
    names = ("flat", "negative", "infinite", "nowhere", "late", "early", "thin")
    for name in ("good", *names):
        put(name, affine=np.diag([1.0, 1, 1e9, 1]) if name == "thin" else None)
    files = {name: folders[0] / f"{name}.nii.gz" for name in names}
    rewritten(files["flat"], 280, np.zeros(12, dtype="<f4"))
    rewritten(files["negative"], 42, np.array([-12, -16], dtype="<i2"))
    rewritten(files["infinite"], 280, np.array([np.inf], dtype="<f4"))
    rewritten(files["nowhere"], 108, np.array([np.inf], dtype="<f4"))
    rewritten(files["early"], 108, np.array([0], dtype="<f4"))
    # An extension of 32 MiB of nothing, which a reader would hold before anything is checked.
    nothing = b"\1\0\0\0" + np.array([2**25, 0], dtype="<i4").tobytes() + bytes(2**25)
    rewritten(files["late"], 108, np.array([2**26], dtype="<f4"), nothing)

    cohort, reasons = take()

    assert len(cohort.patients) == 1
    assert reasons.pop("flat.nii.gz").startswith("its affine does not say where")
    assert reasons.pop("negative.nii.gz").startswith("it has the shape (-12, -16, 10)")
    assert reasons.pop("infinite.nii.gz").startswith("its affine does not say where")
    assert reasons.pop("nowhere.nii.gz").startswith("its values begin at byte inf")
    assert reasons.pop("late.nii.gz").startswith("its values begin at byte 6.71089e+07")
    assert reasons.pop("early.nii.gz").startswith("its values begin at byte 0")
    assert reasons.pop("thin.nii.gz").startswith("its pixels are 1 x 1e+09 mm: made square")
    assert reasons == {}


def test_a_run_that_cannot_be_served_is_refused(
    folders: tuple[Path, Path], run: Any, make_spec: Any, tmp_path: Path
) -> None:
    key = SiteKey(bytes(32))
    with pytest.raises(ConfigError, match=r"input\.window = 'dicom'"):
        NiftiPairs(*folders, run(window="dicom"), key, "axial")
    with pytest.raises(ConfigError, match="a run of masks"):
        NiftiPairs(*folders, make_spec(), key, "axial")
    with pytest.raises(IntakeError, match="no such folder"):
        NiftiPairs(tmp_path / "nowhere", folders[1], run(), key, "axial")
    with pytest.raises(ConfigError, match="direction None"):
        NiftiPairs(*folders, run(), key, None)
    with pytest.raises(ConfigError, match=r"direction 'axial', input\.direction 'axial'"):
        NiftiPairs(*folders, run(**VOLUMES), key, "axial")


# --- Volumes ------------------------------------------------------------------------------------

VOLUMES = {"depth": 10, "spacing": [1, 1, 1], "direction": "axial"}


def test_a_volume_lies_in_the_middle_of_its_grid_turned_to_the_run_s_direction(
    take: Take, put: Any, run: Any
) -> None:
    """By plain loops, of a file that is stored back to front, in another unit of its values."""
    values, mask = volume(3), labels()
    back = np.diag([-1.0, 1, 1, 1])
    back[0, 3] = SIDES[0] - 1
    put("a", 7 * values[::-1] - 3, mask[::-1], affine=back)
    shape = {"height": 18, "width": 12}

    cohort, reasons = take(None, spec=run(**shape, **VOLUMES))

    assert reasons == {}
    assert cohort.shape == (1, 10, 18, 12)
    (seen,), (found,) = cohort.images([0]), cohort.targets([0])
    low, high = values.min(), values.max()
    for i, j, k in np.ndindex(SIDES):
        there = k, 1 + SIDES[1] - 1 - j, SIDES[0] - 1 - i
        expected = (values[i, j, k] - low) / (high - low)
        assert seen[0][there] == pytest.approx(expected, abs=2e-5)
        assert found[there] == mask[i, j, k]
    assert not seen[:, :, [0, -1]].any()
    assert not found[:, [0, -1]].any()


def test_a_volume_is_brought_to_the_run_s_spacing_and_its_mask_with_it(
    take: Take, put: Any, run: Any
) -> None:
    ramp = np.broadcast_to(np.arange(SIDES[1], dtype=np.float32)[:, None], SIDES)
    put("a", ramp, affine=np.diag([1.0, 1, 2, 1]))
    halved = VOLUMES | {"depth": 20, "spacing": [1, 0.5, 1]}

    cohort, reasons = take(None, spec=run(32, 12, **halved))

    assert reasons == {}
    (seen,), (found,) = cohort.images([0]), cohort.targets([0])
    # 31 rows of half a millimetre begin with the first of the file's; the last of 32 is empty.
    np.testing.assert_allclose(seen[0, 5, :31, 4], np.arange(30, -1, -1) / 30, atol=2e-5)
    assert not seen[0, :, 31].any()
    # 19 slices of one millimetre begin with the first of the file's two: the last is empty.
    np.testing.assert_array_equal(found[:19:2, 30::-2], labels().transpose(2, 1, 0)[:, :16, ::-1])


def test_a_volume_larger_than_the_grid_is_refused_or_cut_around_its_middle(
    take: Take, put: Any, run: Any, tmp_path: Path
) -> None:
    put("a", volume(3))

    _, reasons = take(None, spec=run(16, 10, **VOLUMES))
    assert reasons["a.nii.gz"].startswith("it has 10 x 16 x 12 voxels of 1 x 1 x 1 mm, and the run")
    assert "input.fit = 'crop' would cut it" in reasons["a.nii.gz"]

    (tmp_path / "cohort").rename(tmp_path / "before")
    cut, reasons = take(None, spec=run(16, 10, fit="crop", **VOLUMES))
    assert reasons == {}
    np.testing.assert_array_equal(
        cut.targets([0])[0], labels().transpose(2, 1, 0)[:, ::-1, ::-1][:, :, 1:11]
    )


def test_a_volume_whose_organ_is_cut_off_is_refused(take: Take, put: Any, run: Any) -> None:
    far = np.zeros(SIDES, dtype=np.uint8)
    far[0, 0, 0] = 1
    put("a", mask=far)
    _, reasons = take(None, spec=run(8, 8, fit="crop", **VOLUMES))
    assert reasons["a.nii.gz"] == "its mask is empty on the run's grid: all of it was cut off"


def test_a_volume_of_float64_is_never_held_as_one(
    folders: tuple[Path, Path], run: Any, tmp_path: Path
) -> None:
    """Peak memory, a voxel: the values as float32 a few times, and bytes of labels."""
    sides = (128, 128, 128)
    mask = np.zeros(sides, dtype=np.float64)
    mask[40:60, 40:60, 40:60] = 1
    values = np.random.default_rng(1).normal(0, 1, sides)
    for folder, array in zip(folders, (values, mask), strict=True):
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / "a.nii")
    del values, mask
    spec = run(128, 128, **VOLUMES | {"depth": 128})
    source = NiftiPairs(*folders, spec, SiteKey(bytes(32)), None)
    tracemalloc.start()
    try:
        (step,) = source.steps()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(step.images) == 1
    assert peak < 20 * np.prod(sides)


def test_real_pairs_are_taken_in(
    shared_data: Path, folders: tuple[Path, Path], take: Take, run: Any
) -> None:
    """Three hippocampi of the Medical Segmentation Decathlon, and one without its mask."""
    with zipfile.ZipFile(shared_data / "hippocampus" / "msd_task04_subset.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".nii.gz"))
        drawn = [name for name in names if "label" in name][:3]
        for name in drawn:
            (folders[1] / Path(name).name).write_bytes(archive.read(name))
            image = next(n for n in names if "image" in n and Path(n).name == Path(name).name)
            (folders[0] / Path(name).name).write_bytes(archive.read(image))
    (folders[1] / Path(drawn[0]).name).unlink()
    cohort, reasons = take(spec=run(48, 64, window="percentile"))
    assert list(reasons) == [Path(drawn[0]).name]
    assert len(cohort.patients) == 2
    masks = cohort.targets(np.arange(len(cohort)))
    assert set(np.unique(masks)) == {0, 1, 2}
    images = cohort.images(np.arange(len(cohort)))[:, 0]
    assert images[masks > 0].mean() > 0.2
