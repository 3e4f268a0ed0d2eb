"""Pairs of NIfTI volumes, an image and its mask, as a source of slices.

Two folders hold files of the same names (``.nii``, ``.nii.gz``). A volume is brought into the
order right, front, head; its values are stretched as a whole, by the rule of the run's
``input.window``; then it is cut into slices of one direction, each of which becomes an image with
its mask. Pixels that are not square are made so, at the finer of their two distances.

A pair is used whole or not at all: where its two volumes differ in size or place, the mask has a
value that is no class or nothing but the background, or a slice is missing, the pair is told with
the reason.

Slices of one volume are of one patient. Whose volume it is, a CSV says (``file``, ``patient`` and
if wished ``split``), or a person who knows that each file is a patient of its own.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import Nifti1Header, Nifti1Image
from nibabel.nifti2 import Nifti2Header
from nibabel.openers import ImageOpener
from nibabel.orientations import OrientationError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray
from PIL import Image

from client.intake.builder import ImageRecord
from client.intake.items import walk
from client.intake.keys import SiteKey
from client.intake.labels import LabelEntry
from client.intake.part10 import CLOSED_FOLDER, Limits
from client.intake.pixels import mask_to_shape, stretch, to_shape
from client.intake.source import Kept, NotUsed, Step
from client.intake.volumes import MOST_VOXELS
from common.cohort import Unit
from common.errors import ConfigError, IntakeError
from common.spec import RunSpec

Direction = Literal["sagittal", "coronal", "axial"]
_AXES: dict[str, int] = {"sagittal": 0, "coronal": 1, "axial": 2}
_SUFFIXES = (".nii", ".nii.gz")
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
    OrientationError,
)

Owners = Mapping[str, LabelEntry]


@dataclass
class NiftiPairs:
    """Two folders of volumes.

    Args:
        images: the folder of the images.
        masks: that of the masks, each under the name of its image.
        spec: the run; its task has masks.
        key: of the pseudonyms.
        direction: which slices are cut.
        owners: whose volume each is, by `annotations.read_owners`; None: each file is a patient
            of its own.

    Raises:
        IntakeError: if there is no such folder.
        ConfigError: if the run's task has no masks, or its ``input.window`` is ``dicom``.
    """

    images: Path
    masks: Path
    spec: RunSpec
    key: SiteKey
    direction: Direction
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
        """See `Source`; a step holds the slices of one volume."""
        for name in self._pairs:
            try:
                yield Step(name, images=tuple(self._slices(name)))
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

    def _slices(self, name: str) -> list[Kept]:
        patient, split = self._owner(name)
        image, mask = _opened(self.images / name), _opened(self.masks / name)
        _check_same_grid(image, mask)
        values = _values(image)
        _check_whole(values)
        classes = self._classes(mask)
        rule = self.spec.input.window
        bright = stretch(values, "range" if rule == "range" else "percentile", np.isfinite(values))
        axis = _AXES[self.direction]
        aspect = np.delete(np.linalg.norm(image.affine[:3, :3], axis=0), axis)
        kept = []
        for number in range(values.shape[axis]):
            picture, labels = (_plane(volume, axis, number) for volume in (bright, classes))
            picture = _squared(picture.astype(np.float32), aspect, Image.Resampling.BILINEAR)
            labels = _squared(labels.astype(np.int32), aspect, Image.Resampling.NEAREST)
            record = ImageRecord(
                patient=self.key.pseudonym("patient", "", patient),
                study="",
                series=self.key.pseudonym("series", name),
                instance=self.key.pseudonym("instance", name, self.direction, str(number)),
                label=0,
                height=picture.shape[0],
                width=picture.shape[1],
                split=split,
            )
            fitted = to_shape(np.nan_to_num(picture), self.spec.input)
            kept.append(Kept(record, fitted, mask_to_shape(labels, self.spec.input)))
        return kept

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

    def _classes(self, mask: Nifti1Image) -> NDArray[np.int64]:
        """The class numbers of a mask."""
        values, names = _values(mask), self.spec.task.classes
        known = np.isin(values, np.arange(len(names)))
        if not known.all():
            raise IntakeError(
                f"its mask has the value {values[~known][0]:g}; expected 0 to {len(names) - 1}, "
                f"the numbers of {', '.join(map(repr, names))}"
            )
        if not values.any():
            raise IntakeError(f"its mask is empty: nothing but {names[0]!r}")
        return values.astype(np.int64)


def _opened(path: Path) -> Nifti1Image:
    """A volume in the order right, front, head; its values are not read yet."""
    try:
        _check_header(path)
        image = nibabel.load(path)
        if not isinstance(image, Nifti1Image):
            raise IntakeError(f"it is a {type(image).__name__}; expected NIfTI")
        shape = tuple(image.shape)
        if len(shape) < 3 or any(side != 1 for side in shape[3:]) or min(shape) < 1:
            raise IntakeError(f"it has the shape {shape}; expected three dimensions")
        if np.prod(np.array(shape, dtype=np.float64)) > MOST_VOXELS:
            raise IntakeError(f"it has {shape} voxels; at most {MOST_VOXELS} are held")
        kind: np.dtype[Any] = image.get_data_dtype()  # type: ignore[no-untyped-call]
        if kind.kind not in "uif":
            raise IntakeError(f"its values are {kind}; expected plain numbers")
        canonical: Nifti1Image = nibabel.as_closest_canonical(image)  # type: ignore[no-untyped-call]
    except _BROKEN as error:
        raise IntakeError(f"it cannot be read ({type(error).__name__}: {error})") from error
    return canonical


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
    sizes = [" x ".join(map(str, volume.shape[:3])) for volume in (image, mask)]
    if sizes[0] != sizes[1]:
        raise IntakeError(f"its mask has {sizes[1]} voxels, the image {sizes[0]}")
    if not np.allclose(image.affine, mask.affine, rtol=0, atol=_SAME_PLACE):
        raise IntakeError("its mask lies elsewhere than the image: their affines differ")


def _values(volume: Nifti1Image) -> NDArray[np.float32]:
    """(x, y, z) float32."""
    try:
        values = np.asarray(volume.dataobj, dtype=np.float32)
    except _BROKEN as error:
        raise IntakeError(f"it cannot be read ({type(error).__name__}: {error})") from error
    return values.reshape(values.shape[:3])


def _check_whole(values: NDArray[np.float32]) -> None:
    """A slice of one value between others was never there: somebody filled its place."""
    for direction, axis in _AXES.items():
        across = tuple(other for other in range(3) if other != axis)
        full = np.flatnonzero(np.fmax.reduce(values, across) > np.fmin.reduce(values, across))
        gaps = np.flatnonzero(np.diff(full) > 1)
        if len(gaps):
            raise IntakeError(
                f"its {direction} slice {full[gaps[0]] + 2} of {values.shape[axis]} is blank "
                "between others; is a slice missing?"
            )


def _plane(volume: NDArray[Any], axis: int, number: int) -> NDArray[Any]:
    """One slice as it is looked at: head or front on top, front or the right side on the left."""
    return np.asarray(volume.take(number, axis=axis).T[::-1, ::-1])


def _squared(
    plane: NDArray[Any], distances: NDArray[np.float64], rule: Image.Resampling
) -> NDArray[Any]:
    """A slice whose pixels are square; `distances` are those of columns and of rows."""
    across, down = map(float, distances)
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
