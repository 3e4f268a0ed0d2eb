"""A de-identified cohort on disk: its index and its images, read only.

A cohort is a directory of two files, pseudonymised patient data both (mode 0600 in 0700), or of
their sealed forms (`common.cohort_seal`), which only the holder of a key can read:

``images.u16``
    raw little-endian uint16 in C order, shape (images, planes, height, width), of volumes
    (images, planes, depth, height, width). The first planes are the channels; value / 65535 is the
    brightness in 0..1. Where the target is a mask it is the last plane: the number of each pixel's
    class.
``index.sqlite``
    ``meta`` (what was done, for which classes) and ``image`` (one row an image: pseudonyms,
    label, SHA-256 of its stored pixels, size of the original, split, modality). The label is JSON:
    a class number, a 0 or 1 for each class, a list of boxes, or 0 where the target is a mask or
    nothing. The modality is empty where nothing named one; cohorts before format 4 have no column
    of it, and are read as if all were empty.

Intake writes it (`client.intake.builder`), everyone else reads it through `Cohort`. Images are
memory-mapped: a cohort may be many times larger than memory. The index is held in memory, some
hundred bytes an image. Of a sealed cohort as well only the images that are asked for are read and
opened, and nothing that was opened touches the disk again.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from common.cohort_seal import SEAL_FILE, SEALED_IMAGES, SEALED_INDEX, CohortSeal
from common.errors import CohortError, SealError
from common.sealed import OVERHEAD
from common.spec import AFTER_INTAKE, Input, RunSpec

FORMAT = 4
_READ = (1, 2, 3, FORMAT)
INDEX_FILE = "index.sqlite"
_SAYS_MODALITIES = 4
IMAGES_FILE = "images.u16"
PIXEL = np.dtype("<u2")
PIXEL_MAX = 65535
BOX_NUMBERS = 5
SPLITS = ("", "train", "validation", "test")
SYNTHETIC = "synthetic"
"""The source of a cohort of ``cloister generate``; see `Cohort.check_fits`."""
SCHEMA_SQL = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE image (
    row INTEGER PRIMARY KEY, patient TEXT NOT NULL, study TEXT NOT NULL, series TEXT NOT NULL,
    instance TEXT NOT NULL, label TEXT NOT NULL, sha256 TEXT NOT NULL,
    height INT NOT NULL, width INT NOT NULL, split TEXT NOT NULL, modality TEXT NOT NULL
);
"""

Unit = Literal["patient", "image"]
_PLAIN, _SEALED = (INDEX_FILE, IMAGES_FILE), (SEALED_INDEX, SEALED_IMAGES, SEAL_FILE)
_DIGEST = re.compile(r"([0-9a-f]{64})?")
Rows = Sequence[int] | NDArray[np.int64]
Draw = Callable[[NDArray[np.int64]], NDArray[np.int64]]
LABELLED = ("binary", "multiclass", "multilabel")
FEWEST_CLASSES = dict.fromkeys((*LABELLED, "mask"), 2) | {"boxes": 1, "none": 0}
_AT_ONCE = 2**22  # pixels of masks that are looked through together


@dataclass(frozen=True)
class CohortMeta:
    """What holds for a whole cohort; it is stored as text in the index.

    ``unit`` is what one pseudonym stands for: ``image`` where the source names no patients.
    ``kind`` is what there is to be learned: a label (``binary``, ``multiclass``, ``multilabel``),
    a ``mask``, ``boxes`` or ``none``. ``shape`` is that of an image or a volume (`Input.shape`),
    without its mask.
    ``preprocessing`` says in words what intake did to every image; its digest is what a run is
    compared with. ``source`` is the kind of source (``dicom``), ``created`` a date.
    ``deidentification`` is the SHA-256 of profile, table and code of the de-identification; ``""``
    where the source is no DICOM, or the cohort is of format 1, which did not say. ``modalities``
    are those that the run's file named when it was taken in, of which alone there are images then;
    none where it named none. They are public, like the classes: no image was asked for them.
    """

    unit: Unit
    kind: str
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    preprocessing: str
    preprocessing_digest: str
    source: str
    created: str
    deidentification: str
    modalities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.unit not in ("patient", "image") or self.kind not in FEWEST_CLASSES:
            raise CohortError(
                f"unit {self.unit!r}, task {self.kind!r}: expected 'patient' or 'image', "
                f"and one of {', '.join(FEWEST_CLASSES)}"
            )
        few = len(self.classes) < FEWEST_CLASSES[self.kind]
        if len(self.shape) not in (3, 4) or min(self.shape) < 1 or few:
            raise CohortError(f"shape {self.shape}, classes {self.classes}: not those of a cohort")
        if not _DIGEST.fullmatch(self.deidentification):
            raise CohortError(
                f"deidentification {self.deidentification!r}: expected a SHA-256 or nothing"
            )

    @classmethod
    def of(
        cls, spec: RunSpec, *, unit: Unit, source: str, created: str, deidentification: str = ""
    ) -> CohortMeta:
        """The description of a cohort made for `spec` from a `source` (such as ``dicom``)."""
        return cls(
            unit=unit,
            kind=spec.task.kind,
            classes=spec.task.classes,
            shape=spec.input.shape,
            preprocessing=_preprocessing(spec.input),
            preprocessing_digest=spec.input.preprocessing_digest,
            source=source,
            created=created,
            deidentification=deidentification,
            modalities=spec.input.modalities,
        )

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """(planes, …): the channels, and the mask if there is one, of an image's sides."""
        channels, *sides = self.shape
        return channels + (self.kind == "mask"), *sides

    @property
    def image_bytes(self) -> int:
        """Bytes of one stored image, with its mask."""
        return int(np.prod(self.stored_shape)) * PIXEL.itemsize

    def to_rows(self) -> list[tuple[str, str]]:
        """The rows of the table ``meta``."""
        values = {"format": FORMAT, **vars(self)}
        return [(key, json.dumps(value)) for key, value in sorted(values.items())]

    @classmethod
    def from_rows(cls, rows: Mapping[str, str]) -> CohortMeta:
        """Parse the table ``meta``.

        Raises:
            CohortError: for another format, or a value that is missing or of another kind.
        """
        try:
            values = {key: json.loads(value) for key, value in rows.items()}
            number = values.pop("format", None)
            if number not in _READ:
                known = " and ".join(map(str, _READ))
                raise CohortError(f"format {rows.get('format')}: this version reads {known}")
            if number == 1:
                values["deidentification"] = ""
            if number < _SAYS_MODALITIES:
                values["modalities"] = ()
            for key in ("classes", "shape", "modalities"):
                values[key] = tuple(values[key])
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise CohortError(f"its table meta cannot be understood ({error})") from error


class _Index(NamedTuple):
    """The table ``image`` as arrays, one entry an image, in the order of the stored images.

    ``studies`` are numbers, equal for the images of one study of one patient. ``digests`` are the
    SHA-256 of the stored pixels, (images, 32). ``boxes`` is (images, most, 5), where ``most`` is 0
    unless boxes are the target.
    """

    patients: tuple[str, ...]
    patient_index: NDArray[np.int64]
    studies: NDArray[np.int64]
    labels: NDArray[Any]
    splits: NDArray[np.str_]
    digests: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    modalities: NDArray[np.str_]


class Cohort:
    """A cohort, or a view of some of its images; read only and lazy.

    Everything about images is numbered from 0 within *this* view, and everything about patients
    within its own sorted `patients`; a view never changes what it was made from. Pickling one
    carries its path and its rows: a worker process opens the files by itself. The key of a sealed
    cohort goes within the pickle, so a pickle of one is as secret as the key: for a pipe to a
    worker on the same machine, never for a disk.

    Attributes:
        path: the cohort's directory.
        meta: what holds for the whole cohort.
        patients: sorted pseudonyms of those with at least one image; for an image-level cohort
            each image has its own.
        patient_index: (images,) for each image the index of its patient.
        study_index: (images,) a number for each image, equal for those of one study.
        labels: (images,) int64 class indices, or (images, classes) float32 of 0 and 1 for a
            multilabel task; a zero each where images have no label, see `targets`.
        splits: (images,) ``""``, ``"train"``, ``"validation"`` or ``"test"``.
        modalities: (images,) such as ``CT``; empty where nothing named one.
    """

    _seal: CohortSeal | None = None

    def __init__(
        self,
        path: Path,
        meta: CohortMeta,
        index: _Index,
        rows: NDArray[np.int64] | None = None,
        seal: CohortSeal | None = None,
    ) -> None:
        self.path = path
        self.meta = meta
        self._index = index
        self._seal = seal
        self._is_view = rows is not None
        self._rows = np.arange(len(index.labels), dtype=np.int64) if rows is None else rows
        present, inverse = np.unique(index.patient_index[self._rows], return_inverse=True)
        self.patients = tuple(index.patients[number] for number in present)
        self.patient_index: NDArray[np.int64] = inverse.astype(np.int64)
        self.study_index: NDArray[np.int64] = index.studies[self._rows]
        self.labels: NDArray[Any] = index.labels[self._rows]
        self.splits: NDArray[np.str_] = index.splits[self._rows]
        self.modalities: NDArray[np.str_] = index.modalities[self._rows]

    @classmethod
    def open(cls, path: Path, key: bytes | None = None) -> Self:
        """Open a cohort's directory and check that its parts agree.

        The stored pixels are not read; `verify` does that.

        Args:
            path: the directory.
            key: 32 bytes, for a sealed cohort; a plain one needs none.

        Raises:
            CohortError: if it is missing, damaged, of another version, its sizes disagree, or it
                is sealed and this is not its key.
        """
        path = Path(path)
        file = index_file(path)
        sealed = file.name == SEALED_INDEX
        for name in _SEALED if sealed else _PLAIN:
            if not (path / name).is_file():
                raise CohortError(
                    f"{path}: not a cohort, {name} is missing; make one with `cloister intake`"
                )
        seal = CohortSeal.of(path, key) if sealed else None
        try:
            with closing(_connect(file, seal)) as database:
                meta = CohortMeta.from_rows(dict(database.execute("SELECT key, value FROM meta")))
                index = _read_index(database, meta)
        except (sqlite3.Error, UnicodeError, OSError) as error:
            raise CohortError(f"{file}: damaged ({error}); take in again") from error
        except (CohortError, SealError) as error:
            raise CohortError(f"{file}: {error}; take in again") from error
        each = meta.image_bytes + (OVERHEAD if sealed else 0)
        _check_size(_images_file(path, seal), len(index.labels) * each)
        return cls(path, meta, index, seal=seal)

    @property
    def digests(self) -> frozenset[bytes]:
        """SHA-256 of the stored pixels of each image: equal ones are equal images."""
        return frozenset(row.tobytes() for row in self._index.digests[self._rows])

    @property
    def is_sealed(self) -> bool:
        """Whether it is sealed on the disk."""
        return self._seal is not None

    @property
    def unit(self) -> Unit:
        """What one pseudonym stands for, and so what differential privacy can protect."""
        return self.meta.unit

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers."""
        return self.meta.classes

    @property
    def kind(self) -> str:
        """``binary``, ``multiclass``, ``multilabel``, ``mask``, ``boxes`` or ``none``."""
        return self.meta.kind

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width) of every image, of volumes (channels, depth, height, width)."""
        return self.meta.shape

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of what one number of `images` reads."""
        return self.shape

    @property
    def preprocessing_digest(self) -> str:
        """SHA-256 of what intake did to every image; see `Input.preprocessing_digest`."""
        return self.meta.preprocessing_digest

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"Cohort({str(self.path)!r}, {len(self)} images of {len(self.patients)} patients)"

    def __reduce__(self) -> tuple[Any, ...]:
        key = None if self._seal is None else self._seal.key
        return _reopen, (type(self), self.path, self._rows if self._is_view else None, key)

    def images(self, rows: Rows) -> NDArray[np.float32]:
        """Read images from the memory map, and open them if they are sealed.

        Args:
            rows: image numbers within this view, in any order, repeated or not.

        Returns:
            (len(rows), *shape) in 0..1, a copy.

        Raises:
            CohortError: if a sealed image is not what was sealed for its row.
        """
        return self._brightness(self._stored(self._rows[np.asarray(rows, dtype=np.int64)]))

    def drawn(self, rows: Rows, below: Draw) -> NDArray[np.int64]:
        """What `images` and `targets` take for `rows` where something is left to chance: nothing.

        Args:
            rows: as `images`.
            below: gives for each bound a uniform integer from 0 to below it.
        """
        return np.asarray(rows, dtype=np.int64)

    def targets(self, rows: Rows) -> NDArray[Any]:
        """What is to be learned of images.

        Args:
            rows: as `images`.

        Returns:
            By `kind`: (N,) int64 class numbers; (N, classes) float32 of 0 and 1 for a multilabel
            task; (N, height, width) int64 class numbers of a mask's pixels, of volumes
            (N, depth, height, width); (N, most, 5) float32
            boxes, left, top, right and bottom in parts of the sides and the class, those that an
            image has not being zeros of class -1; (N, 0) float32 for none.

        Raises:
            CohortError: as `images`, and if a mask's pixel is of no class.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        if self.kind == "mask":
            return self._masks(wanted)
        if self.kind == "boxes":
            return np.asarray(self._index.boxes[self._rows[wanted]])
        if self.kind == "none":
            return np.zeros((len(wanted), 0), dtype=np.float32)
        return np.asarray(self.labels[wanted])

    def examples(self, rows: Rows) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """`images` and `targets` of the same rows; a sealed image is opened once for both."""
        if self._seal is None or self.kind != "mask":
            return self.images(rows), self.targets(rows)
        stored = self._stored(self._rows[np.asarray(rows, dtype=np.int64)])
        return self._brightness(stored), self._checked(stored[:, -1]).astype(np.int64)

    def present(self) -> NDArray[np.bool_]:
        """(images, classes): which classes each image has; all masks are read for it."""
        known = np.arange(len(self.classes))
        if self.kind == "multilabel":
            return np.asarray(self.labels > 0)
        if self.kind == "boxes":
            return np.asarray((self._index.boxes[self._rows, :, 4:] == known).any(axis=1))
        if self.kind != "mask":
            return np.asarray(self.labels[:, None] == known)
        found = np.zeros((len(self), len(known)), dtype=np.bool_)
        at_once = max(1, _AT_ONCE // math.prod(self.shape[1:]))
        for start in range(0, len(self), at_once):
            masks = self._mask_planes(self._rows[start : start + at_once])
            for number in known:
                has = (masks == number).reshape(len(masks), -1).any(axis=1)
                found[start : start + len(masks), number] = has
        return found

    def patches(
        self, rows: Rows, corners: NDArray[np.int64], sides: Sequence[int]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Parts of volumes with their masks; of a plain cohort no more than they are is read.

        Args:
            rows: N image numbers within this view, in any order, repeated or not.
            corners: (N, 3) the first slice, row and column of each part.
            sides: depth, height and width of every part.

        Returns:
            (N, channels, *sides) in 0..1 and (N, *sides) class numbers, copies.

        Raises:
            CohortError: if there are no volumes with masks here, a part is not within its volume,
                and as `targets`.
        """
        last = np.array(self.shape[1:]) - np.array(sides) if len(self.shape) > 3 else np.zeros(0)
        if self.kind != "mask" or not len(last) or (corners < 0).any() or (corners > last).any():
            raise CohortError(
                f"{self.path}: parts of {tuple(sides)} of images of {self.shape} with "
                f"{self.kind!r}; expected parts within volumes that have masks"
            )
        wanted = self._rows[np.asarray(rows, dtype=np.int64)]
        found = np.empty((len(wanted), self.meta.stored_shape[0], *sides), dtype=PIXEL)
        last_row, planes = -1, found[:0]
        for number, (row, corner) in enumerate(zip(wanted, corners, strict=True)):
            within = tuple(slice(c, c + side) for c, side in zip(corner, sides, strict=True))
            if row != last_row:  # a sealed volume is opened once for all parts in a row
                last_row, planes = row, self._planes(int(row))
            found[number] = planes[:, *within]
        return self._brightness(found), self._checked(found[:, -1]).astype(np.int64)

    def rows_of(self, patient: int) -> NDArray[np.int64]:
        """Image numbers of patient number `patient`, ascending; never empty."""
        order, starts = self._by_patient
        if not 0 <= patient < len(self.patients):
            raise CohortError(f"patient {patient}: this cohort has {len(self.patients)}")
        return order[starts[patient] : starts[patient + 1]]

    def subset(self, patients: Rows) -> Self:
        """A view of all images of these patients, a set of patient numbers of this view.

        Raises:
            CohortError: if a number is not one of this view's patients.
        """
        wanted = np.unique(np.asarray(patients, dtype=np.int64))
        known = np.arange(len(self.patients))
        if not np.isin(wanted, known).all():
            raise CohortError(
                f"patients {wanted[0]} to {wanted[-1]}: this cohort has {len(self.patients)}"
            )
        return self._view(np.isin(self.patient_index, wanted))

    def with_split(self, *names: str) -> Self:
        """A view of the images whose split is one of `names`.

        Raises:
            CohortError: for a name that no split can have.
        """
        for name in names:
            if name not in SPLITS:
                raise CohortError(f"split {name!r}: expected one of {', '.join(map(repr, SPLITS))}")
        return self._view(np.isin(self.splits, np.asarray(names, dtype=np.str_)))

    def check_fits(self, spec: RunSpec) -> None:
        """Check that a run described by `spec` can use this cohort.

        A patient-level claim needs patients: it is refused on an image-level cohort. An
        image-level claim on a cohort that knows its patients is refused as well (a patient of
        several images would be protected less than the cohort allows), unless there is no
        privacy at all. Synthetic images are refused where there is: the claim would be of nobody,
        and whoever is behind them in no account (docs/privacy.md, Synthetic images).

        Raises:
            CohortError: naming everything that differs.
        """
        if self.meta.source == SYNTHETIC and spec.privacy.mechanism != "none":
            raise CohortError(
                f"{self.path}: its source is {SYNTHETIC!r}, and the run claims privacy for those "
                "that it trains on; expected patients. Mix synthetic images in beside them "
                "(synthetic in [data] or [simulation], augmentation.synthetic of the run), or "
                'train on them alone in a run with privacy.mechanism = "none"'
            )
        problem = spec.task.problem_with(self.kind, self.classes)
        differences = [problem] if problem else []
        if problem := problem_with_modalities(self.meta.modalities, spec.input):
            differences.append(problem)
        differences += [
            f"{name} is {ours}, the run asks for {theirs}"
            for name, ours, theirs in self._comparison(spec)
            if ours != theirs
        ]
        if differences:
            raise CohortError(
                f"{self.path}: does not fit the run: {'; '.join(differences)}. "
                "Take the source in again with this run's spec, or change the spec"
            )

    def verify(self) -> None:
        """Recompute the SHA-256 of all stored images of the cohort, also those outside a view.

        Raises:
            CohortError: naming the first image whose pixels are not those that intake stored.
        """
        for _ in self.verified():
            pass

    def verified(self) -> Iterator[int]:
        """The same, image by image: the number of each as it was found to be as it was stored."""
        for row in range(len(self._index.labels)):
            seen = hashlib.sha256(self._stored(np.array([row])).tobytes()).digest()
            expected = self._index.digests[row].tobytes()
            if seen != expected:
                raise CohortError(
                    f"{self.path / IMAGES_FILE}: image {row} has SHA-256 {seen.hex()}, stored was "
                    f"{expected.hex()}; the file is damaged or was changed: take in again"
                )
            yield row

    def _stored(self, rows: NDArray[np.int64]) -> NDArray[np.uint16]:
        """Stored images by their rows in the file."""
        if self._seal is None:
            found: NDArray[np.uint16] = self._mapped[rows].view(PIXEL)
        else:
            opened = b"".join(self._opened(self._seal, row) for row in rows.tolist())
            found = np.frombuffer(opened, dtype=PIXEL)
        return found.reshape(len(rows), *self.meta.stored_shape)

    def _brightness(self, stored: NDArray[np.uint16]) -> NDArray[np.float32]:
        channels = self.shape[0]
        return np.divide(stored[:, :channels], np.float32(PIXEL_MAX), dtype=np.float32)

    def _planes(self, row: int) -> NDArray[np.uint16]:
        """One stored image by its row in the file, of a plain cohort not read yet."""
        if self._seal is None:
            found: NDArray[np.uint16] = self._mapped[row].view(PIXEL)
        else:
            found = np.frombuffer(self._opened(self._seal, row), dtype=PIXEL)
        return found.reshape(self.meta.stored_shape)

    def _masks(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._mask_planes(self._rows[rows]).astype(np.int64)

    def _mask_planes(self, rows: NDArray[np.int64]) -> NDArray[np.uint16]:
        """Stored masks by their rows in the file."""
        return self._checked(self._stored(rows)[:, -1])

    def _checked(self, masks: NDArray[np.uint16]) -> NDArray[np.uint16]:
        """Masks that have no pixel but of the classes."""
        if masks.max(initial=0) >= len(self.classes):
            raise CohortError(
                f"{self.path}: a mask has a pixel of class number {masks.max()}; expected one of "
                f"{len(self.classes)} classes: take in again"
            )
        return masks

    def _opened(self, seal: CohortSeal, row: int) -> bytes:
        """The pixels of one sealed image."""
        try:
            piece, sha256 = self._mapped[row].tobytes(), self._index.digests[row].tobytes().hex()
            return seal.open_image(row, piece, sha256)
        except SealError as error:
            raise CohortError(
                f"{self.path / SEALED_IMAGES}: image {row} is not the one that was sealed there; "
                "the file is damaged or was changed: put it back, or take in again"
            ) from error

    @cached_property
    def _mapped(self) -> NDArray[np.uint8]:
        """The file of the images, one row of bytes an image."""
        each = self.meta.image_bytes + (0 if self._seal is None else OVERHEAD)
        shape = (len(self._index.labels), each)
        if not shape[0]:
            return np.zeros(shape, dtype=np.uint8)
        file = _images_file(self.path, self._seal)
        return np.memmap(file, dtype=np.uint8, mode="r", shape=shape)

    @cached_property
    def _by_patient(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Image numbers grouped by patient, and where each patient's begin."""
        order = np.argsort(self.patient_index, kind="stable").astype(np.int64)
        bounds = np.arange(len(self.patients) + 1)
        return order, np.searchsorted(self.patient_index[order], bounds).astype(np.int64)

    def _view(self, mask: NDArray[np.bool_]) -> Self:
        return type(self)(self.path, self.meta, self._index, self._rows[mask], self._seal)

    def _comparison(self, spec: RunSpec) -> Iterator[tuple[str, object, object]]:
        """(what, ours, the run's) for everything that must be equal."""
        yield "input's shape", self.shape, spec.input.shape
        if self.preprocessing_digest != spec.input.preprocessing_digest:
            yield "input's preprocessing", self.meta.preprocessing, _preprocessing(spec.input)
        asked = spec.privacy.unit
        if asked == "patient" or spec.privacy.mechanism != "none":
            yield "the unit (privacy.unit)", self.unit, asked


def problem_with_modalities(known: Sequence[str], settings: Input) -> str:
    """Why images of these modalities do not serve a run; empty if they do.

    One in common is enough: a site without the other takes part, with its places empty. That is
    said by what a cohort was made for and by no image of it, as all that a node is asked.
    """
    asked = settings.modalities
    if not asked or set(asked) & set(known):
        return ""
    seen = f"are {', '.join(known)}" if known else "were not asked for when it was made"
    return f"its images' modalities {seen}, the run asks for {', '.join(asked)}"


def _preprocessing(settings: Input) -> str:
    """Every setting of the input in one line, for a person who compares two of them."""
    kept = settings.model_dump(mode="json", exclude=set(AFTER_INTAKE))
    return " ".join(f"{key}={value}" for key, value in sorted(kept.items()))


def index_file(path: Path) -> Path:
    """The file that holds a cohort's index, plain or sealed.

    Raises:
        CohortError: if there is none, or parts of both: nobody could say which of them counts.
    """
    try:
        there = {entry.name for entry in path.iterdir()}
    except OSError as error:
        raise CohortError(f"{path}: not a cohort ({error}); make one with `cloister intake`") from (
            error
        )
    plain, sealed = ([name for name in names if name in there] for names in (_PLAIN, _SEALED))
    if plain and sealed:
        raise CohortError(
            f"{path}: has {plain[0]} beside {sealed[0]}, a plain and a sealed cohort at once; "
            "expected one of them: move what is not yours out of the folder"
        )
    file = path / (SEALED_INDEX if sealed else INDEX_FILE)
    if not file.is_file():
        raise CohortError(
            f"{path}: not a cohort, {file.name} is missing; make one with `cloister intake`"
        )
    return file


def _images_file(path: Path, seal: CohortSeal | None) -> Path:
    return path / (IMAGES_FILE if seal is None else SEALED_IMAGES)


def _reopen(
    kind: type[Cohort], path: Path, rows: NDArray[np.int64] | None, key: bytes | None
) -> Cohort:
    whole = kind.open(path, key)
    return whole if rows is None else kind(path, whole.meta, whole._index, rows, whole._seal)


def _connect(file: Path, seal: CohortSeal | None) -> sqlite3.Connection:
    """Open the index as it lies there: no lock, no journal beside it, no change.

    A sealed one is opened into memory alone.

    Raises:
        SealError: if it is not what was sealed.
    """
    if seal is None:
        location = file.absolute().as_uri()
        return sqlite3.connect(f"{location}?mode=ro&immutable=1", uri=True)
    content = seal.open_index(file.read_bytes())
    database = sqlite3.connect(":memory:")
    database.deserialize(content)
    return database


def _read_index(database: sqlite3.Connection, meta: CohortMeta) -> _Index:
    columns = [column[1] for column in database.execute("PRAGMA table_info(image)")]
    asked = "SELECT row, patient, label, split, sha256, study, modality FROM image ORDER BY row"
    if "modality" not in columns:
        asked = "SELECT row, patient, label, split, sha256, study, '' FROM image ORDER BY row"
    rows = database.execute(asked).fetchall()
    if any(number != row[0] for number, row in enumerate(rows)):
        raise CohortError("its images are not numbered 0, 1, 2, …")
    names, index = np.unique(np.array([row[1] for row in rows], dtype=np.str_), return_inverse=True)
    _, named = np.unique(np.array([row[5] for row in rows], dtype=np.str_), return_inverse=True)
    studies = index.astype(np.int64) * (len(rows) + 1) + named
    splits = np.array([row[3] for row in rows], dtype=np.str_)
    if not np.isin(splits, SPLITS).all():
        raise CohortError(f"a split is not one of {', '.join(map(repr, SPLITS))}")
    texts, digests = [row[2] for row in rows], _digests([row[4] for row in rows])
    labels = _labels(texts, meta)
    boxes = _boxes(texts if meta.kind == "boxes" else (), len(meta.classes))
    return _Index(
        tuple(map(str, names)),
        index.astype(np.int64),
        studies,
        labels,
        splits,
        digests,
        boxes,
        np.array([row[6] for row in rows], dtype=np.str_),
    )


def _digests(texts: Sequence[Any]) -> NDArray[np.uint8]:
    if not all(isinstance(text, str) and text and _DIGEST.fullmatch(text) for text in texts):
        raise CohortError("the SHA-256 of an image is not 64 hexadecimal digits")
    return np.frombuffer(bytes.fromhex("".join(texts)), dtype=np.uint8).reshape(-1, 32)


def _labels(texts: Sequence[str], meta: CohortMeta) -> NDArray[Any]:
    """Parse labels: a class number each, or for a multilabel task a 0 or 1 for each class."""
    if meta.kind not in LABELLED:
        return np.zeros(len(texts), dtype=np.int64)
    classes = len(meta.classes)
    many = meta.kind == "multilabel"
    try:
        numbers = np.array([json.loads(text) for text in texts])
        labels = numbers.reshape((len(texts), classes) if many else (len(texts),))
    except (TypeError, ValueError) as error:
        raise CohortError(f"a label cannot be understood ({error})") from error
    if not np.isin(labels, np.arange(2 if many else classes)).all():
        raise CohortError(f"a label is not one of its {classes} classes")
    return labels.astype(np.float32 if many else np.int64)


def _boxes(texts: Sequence[str], classes: int) -> NDArray[np.float32]:
    """Parse boxes, padded to those of the image that has most of them."""
    try:
        lists = [
            np.array(json.loads(text), dtype=np.float64).reshape(-1, BOX_NUMBERS) for text in texts
        ]
    except (TypeError, ValueError) as error:
        raise CohortError(f"the boxes of an image cannot be understood ({error})") from error
    padded = np.zeros((len(lists), max(map(len, lists), default=0), BOX_NUMBERS), dtype=np.float32)
    padded[..., 4] = -1
    for row, boxes in zip(padded, lists, strict=True):
        for box in boxes:
            if problem := problem_with_box(box, classes):
                raise CohortError(f"a box {problem}")
        row[: len(boxes)] = boxes
    return padded


def problem_with_box(box: Sequence[float] | NDArray[np.float64], classes: int) -> str:
    """What is wrong with left, top, right, bottom (in parts of the sides) and class, or nothing."""
    left, top, right, bottom, number = map(float, box)
    shown = f"{left:g}, {top:g}, {right:g}, {bottom:g}"
    if not (0 <= left <= 1 and 0 <= top <= 1 and 0 <= right <= 1 and 0 <= bottom <= 1):
        return f"{shown} lies outside of its image; expected parts of its sides, 0 to 1"
    if not (left < right and top < bottom):
        return f"{shown} has no area; expected left below right and top below bottom"
    if number not in range(classes):
        return f"is of class number {number:g}; expected one of {classes} classes, from 0"
    return ""


def _check_size(file: Path, expected: int) -> None:
    seen = file.stat().st_size
    if seen != expected:
        raise CohortError(
            f"{file}: {seen} bytes, the index describes {expected}; "
            "the cohort is damaged or half copied: take in again"
        )
