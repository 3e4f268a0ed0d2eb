"""Pairs of NIfTI volumes, an image and its mask, as a source of slices or of volumes.

Two folders hold files of the same names (``.nii``, ``.nii.gz``). A volume is brought into the
order right, front, head; its values are stretched as a whole, by the rule of the run's
``input.window``. For a run of images it is cut into slices of one direction, each of which becomes
an image with its mask; pixels that are not square are made so, at the finer of their two
distances. For a run of volumes (``input.depth``) it is brought to the run's grid
(`client.intake.grids`).

A pair is used whole or not at all: where its two volumes differ in size or place, the mask has a
value that is no class or nothing but the background, or a slice is missing, the pair is told with
the reason. Values are held as float32 and labels as bytes, whatever a file has them in: of one
volume of `MOST_VOXELS`, 1 GiB, up to four times that are taken.

Slices of one volume are of one patient. Whose volume it is, a CSV says (``file``, ``patient`` and
if wished ``split``), or a person who knows that each file is a patient of its own.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import Nifti1Header, Nifti1Image
from nibabel.nifti2 import Nifti2Header
from nibabel.openers import ImageOpener
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray
from PIL import Image

from client.intake.builder import ImageRecord
from client.intake.grids import AXES, Laid, brightness_to_grid, canonical, laid, to_grid
from client.intake.items import walk
from client.intake.keys import SiteKey
from client.intake.labels import LabelEntry
from client.intake.part10 import CLOSED_FOLDER, Limits
from client.intake.pixels import mask_to_shape, stretch, to_shape
from client.intake.source import Kept, NotUsed, Step
from common.cohort import Unit
from common.errors import ConfigError, IntakeError
from common.spec import MOST_VOXELS, Direction, RunSpec

_SUFFIXES = (".nii", ".nii.gz")
_SAME_WAY = 0.5  # cosine: a head is not tilted by 60 degrees against an atlas, an axis is by 90
_SAME_PLACE = 1e-3  # millimetres: two programs write one affine with other roundings
_SQUARE = 1e-3  # of a pixel's side
_MOST_HEADER = 2**24  # bytes before the values, which are read at once; extensions have thousands
_BROKEN = (
    OSError,
    EOFError,
    ValueError,
    ArithmeticError,
    zlib.error,
    ImageFileError,
    HeaderDataError,
)
_AT_ONCE = 2**20  # voxels of a file that are read together

Owners = Mapping[str, LabelEntry]


@dataclass
class NiftiPairs:
    """Two folders of volumes.

    Args:
        images: the folder of the images.
        masks: that of the masks, each under the name of its image.
        spec: the run; its task has masks.
        key: of the pseudonyms.
        direction: which slices are cut; None for a run of volumes, whose file says it.
        owners: whose volume each is, by `annotations.read_owners`; None: each file is a patient
            of its own.

    Raises:
        IntakeError: if there is no such folder.
        ConfigError: if the run's task has no masks, its ``input.window`` is ``dicom``, or the
            direction is said twice or not at all.
    """

    images: Path
    masks: Path
    spec: RunSpec
    key: SiteKey
    direction: Direction | None
    owners: Owners | None = None
    split: str = ""
    kind: str = field(default="nifti", init=False)
    unit: Unit = field(default="patient", init=False)

    def __post_init__(self) -> None:
        for folder in (self.images, self.masks):
            if not folder.is_dir():
                raise IntakeError(f"{folder}: no such folder; expected a folder of NIfTI volumes")
        if self.spec.task.kind != "mask":
            raise ConfigError(
                f"task.kind = {self.spec.task.kind!r}: volumes with masks serve a run of masks"
            )
        if self.spec.input.window == "dicom":
            raise ConfigError(
                "input.window = 'dicom': a NIfTI volume has no window of its own; write "
                "'percentile' or 'range'"
            )
        if (self.direction is None) == (self.spec.input.direction is None):
            raise ConfigError(
                f"direction {self.direction!r}, input.direction {self.spec.input.direction!r}: a "
                "run of volumes has it in its file, one of images is told with --direction"
            )
        self._others: dict[str, str] = {}
        there, drawn = self._names(self.images), self._names(self.masks)
        self._pairs = sorted(there & drawn, key=lambda name: self.key.pseudonym("order", name))
        for name in sorted(there - drawn):
            self._others[str(self.images / name)] = f"no mask of that name in {self.masks}"
        for name in sorted(drawn - there):
            self._others[str(self.masks / name)] = f"no image of that name in {self.images}"
        for name in sorted(set(self.owners or ()) - there):
            self._others[name] = f"the table names it, and it is not in {self.images}"

    def __len__(self) -> int:
        return len(self._pairs) + len(self._others)

    def steps(self) -> Iterator[Step]:
        """See `Source`; a step holds one volume, or the slices of one."""
        for name in self._pairs:
            try:
                yield Step(name, images=tuple(self._kept(name)))
            except IntakeError as error:
                yield Step(name, not_used=(NotUsed(name, str(error)),))
        for name, reason in self._others.items():
            yield Step(name, not_used=(NotUsed(name, reason),))

    def _names(self, folder: Path) -> set[str]:
        """The volumes of a folder; what is not looked into, or is none, is told."""
        found = set()
        for path in walk(folder):
            name = path.relative_to(folder).as_posix()
            if path.is_dir():
                self._others[str(path)] = CLOSED_FOLDER
            elif not name.lower().endswith(_SUFFIXES):
                self._others[str(path)] = "its name ends neither in .nii nor in .nii.gz"
            else:
                found.add(name)
        return found

    def _kept(self, name: str) -> Iterator[Kept]:
        """What a pair becomes."""
        patient, split = self._owner(name)
        image, mask = _opened(self.images / name), _opened(self.masks / name)
        _check_same_grid(image, mask)
        labels, _ = canonical(self._classes(mask), mask.affine)
        values, place = canonical(_values(image), image.affine)
        _check_whole(values)
        rule = self.spec.input.window
        bright = stretch(values, "range" if rule == "range" else "percentile", np.isfinite(values))
        del values
        np.nan_to_num(bright, copy=False)
        owner = self.key.pseudonym("patient", "", patient)
        record = ImageRecord(
            owner,
            "",
            self.key.pseudonym("series", name),
            "",
            label=0,
            height=0,
            width=0,
            split=split,
        )
        direction = self.direction or self.spec.input.direction or "axial"
        pair = laid(bright, place, direction), laid(labels, place, direction)
        cut = self._slices if self.direction else self._volume
        yield from cut(name, *pair, record)

    def _volume(self, name: str, bright: Laid, labels: Laid, record: ImageRecord) -> Iterator[Kept]:
        settings = self.spec.input
        instance = self.key.pseudonym("instance", name, "volume")
        _, height, width = bright.values.shape
        record = replace(record, instance=instance, height=height, width=width)
        grid = to_grid(labels, settings, "nearest").astype(np.uint16)
        if not grid.any():
            raise IntakeError("its mask is empty on the run's grid: all of it was cut off")
        yield Kept(record, brightness_to_grid(bright, settings), grid)

    def _slices(self, name: str, bright: Laid, labels: Laid, record: ImageRecord) -> Iterator[Kept]:
        direction, settings = str(self.direction), self.spec.input
        for number in range(len(bright.values)):
            plane, classes = bright.values[number], labels.values[number].astype(np.int32)
            picture = _squared(plane, bright.spacing, Image.Resampling.BILINEAR)
            mask = _squared(classes, bright.spacing, Image.Resampling.NEAREST)
            instance = self.key.pseudonym("instance", name, direction, str(number))
            height, width = picture.shape
            kept = replace(record, instance=instance, height=height, width=width)
            yield Kept(kept, to_shape(picture, settings), mask_to_shape(mask, settings))

    def _owner(self, name: str) -> tuple[str, str]:
        """Whose volume it is, and its split."""
        if self.owners is None:
            return name, self.split
        if name not in self.owners:
            raise IntakeError("the table does not say whose volume it is")
        owner = self.owners[name]
        if not owner.patient:
            raise IntakeError("no patient identifier")
        return owner.patient, self.split or owner.split

    def _classes(self, mask: Nifti1Image) -> NDArray[np.uint16]:
        """The class numbers of a mask."""
        names = self.spec.task.classes
        numbers = np.zeros(mask.shape[:3], dtype=np.uint16)
        for where, values in _slabs(mask):
            known = np.isin(values, np.arange(len(names)))
            if not known.all():
                raise IntakeError(
                    f"its mask has the value {values[~known][0]:g}; expected 0 to "
                    f"{len(names) - 1}, the numbers of {', '.join(map(repr, names))}"
                )
            numbers[..., where] = values
        if not numbers.any():
            raise IntakeError(f"its mask is empty: nothing but {names[0]!r}")
        return numbers


def _opened(path: Path) -> Nifti1Image:
    """A volume; its values are not read yet."""
    try:
        _check_header(path)
        image = nibabel.load(path, keep_file_open=True)  # a compressed one is read forwards once
        if not isinstance(image, Nifti1Image):
            raise IntakeError(f"it is a {type(image).__name__}; expected NIfTI")
        shape = tuple(image.shape)
        if len(shape) < 3 or any(side != 1 for side in shape[3:]) or min(shape) < 1:
            raise IntakeError(f"it has the shape {shape}; expected three dimensions")
        if np.prod(np.array(shape, dtype=np.float64)) > MOST_VOXELS:
            raise IntakeError(f"it has {shape} voxels; at most {MOST_VOXELS} are held")
        _check_directions(image.header)
        kind: np.dtype[Any] = image.get_data_dtype()  # type: ignore[no-untyped-call]
        if kind.kind not in "uif":
            raise IntakeError(f"its values are {kind}; expected plain numbers")
    except _BROKEN as error:
        raise IntakeError(f"it cannot be read ({type(error).__name__}: {error})") from error
    return image


def _check_directions(header: Nifti1Header) -> None:
    """It says where its axes run, and says it once: other readers prefer the other affine."""
    codes = int(header["sform_code"]), int(header["qform_code"])
    if not any(codes):
        raise IntakeError(
            "its sform and qform codes are 0: it does not say where left and right are, and "
            "a guess would mirror it; write an affine with its code into the file"
        )
    if not all(codes):
        return
    ours = np.asarray(header.get_sform(), dtype=np.float64)[:3, :3]  # type: ignore[no-untyped-call]
    theirs = np.asarray(header.get_qform(), dtype=np.float64)[:3, :3]  # type: ignore[no-untyped-call]
    with np.errstate(invalid="ignore", over="ignore"):  # what is no affine, `canonical` refuses
        lengths = np.linalg.norm(ours, axis=0) * np.linalg.norm(theirs, axis=0)
        apart = (ours * theirs).sum(axis=0) < _SAME_WAY * lengths
    if apart.any():
        raise IntakeError(
            f"its sform and its qform send its axis {int(apart.argmax()) + 1} different ways, so "
            "by one of them it is mirrored or turned; write the right one as both, or 0 as the "
            "code of the wrong one"
        )


def _check_header(path: Path) -> None:
    """A small file may unpack to gigabytes of extensions, all of which a reader would hold."""
    with ImageOpener(str(path)) as file:
        start = file.read(Nifti2Header.sizeof_hdr)
    for kind in (Nifti1Header, Nifti2Header):
        if not kind.may_contain_header(start):  # type: ignore[no-untyped-call]
            continue
        header = kind(start[: kind.sizeof_hdr], check=False)  # type: ignore[no-untyped-call]
        offset = float(header["vox_offset"])
        if not kind.sizeof_hdr < offset <= _MOST_HEADER:
            raise IntakeError(
                f"its values begin at byte {offset:g}; expected them behind the header's "
                f"{kind.sizeof_hdr} bytes, and by {_MOST_HEADER}"
            )


def _check_same_grid(image: Nifti1Image, mask: Nifti1Image) -> None:
    (ours, here), (theirs, there) = (
        canonical(np.broadcast_to(np.uint8(0), volume.shape[:3]), volume.affine)
        for volume in (image, mask)
    )
    if ours.shape != theirs.shape:
        sizes = [" x ".join(map(str, one.shape)) for one in (theirs, ours)]
        raise IntakeError(f"its mask has {sizes[0]} voxels, the image {sizes[1]}")
    if not np.allclose(here, there, rtol=0, atol=_SAME_PLACE):
        raise IntakeError("its mask lies elsewhere than the image: their affines differ")


def _values(volume: Nifti1Image) -> NDArray[np.float32]:
    """(i, j, k) float32."""
    values = np.empty(volume.shape[:3], dtype=np.float32)
    for where, slab in _slabs(volume):
        values[..., where] = slab
    return values


def _slabs(volume: Nifti1Image) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Parts of a volume along its last axis: scaled, a file's values are float64."""
    *plane, length = volume.shape[:3]
    each = max(1, _AT_ONCE // int(np.prod(plane)))
    rest = (0,) * (len(volume.shape) - 3)
    for start in range(0, length, each):
        where = slice(start, start + each)
        try:
            yield where, np.asarray(volume.dataobj[(..., where, *rest)])
        except _BROKEN as error:
            raise IntakeError(f"it cannot be read ({type(error).__name__}: {error})") from error


def _check_whole(values: NDArray[np.float32]) -> None:
    """A slice of one value between others was never there: somebody filled its place."""
    for direction, axis in AXES.items():
        across = tuple(other for other in range(3) if other != axis)
        full = np.flatnonzero(np.fmax.reduce(values, across) > np.fmin.reduce(values, across))
        gaps = np.flatnonzero(np.diff(full) > 1)
        if len(gaps):
            raise IntakeError(
                f"its {direction} slice {full[gaps[0]] + 2} of {values.shape[axis]} is blank "
                "between others; is a slice missing?"
            )


def _squared(
    plane: NDArray[Any], spacing: tuple[float, float, float], rule: Image.Resampling
) -> NDArray[Any]:
    """A slice whose pixels are square; `spacing` is that of slices, rows and columns."""
    _, down, across = spacing
    finer = min(across, down)
    if not finer > 0 or abs(across - down) <= _SQUARE * finer:
        return plane
    wide, high = plane.shape[1] * across / finer, plane.shape[0] * down / finer
    if not wide * high <= Limits().frame_samples:
        raise IntakeError(
            f"its pixels are {across:g} x {down:g} mm: made square, a slice has {wide:g} x {high:g}"
            f" of them; at most {Limits().frame_samples} are held"
        )
    size = (round(wide), round(high))
    return np.asarray(Image.fromarray(np.ascontiguousarray(plane)).resize(size, rule))
