"""MedMNIST's ``.npz`` (Yang et al. 2023, doi:10.1038/s41597-022-01721-8) as a source.

It names no patients, so the unit is the image. Its parts train, val and test become the splits
``train``, ``validation`` and ``test``. Arrays are read item by item: memory does not grow with
them, and nothing in the file is executed.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from client.intake.builder import ImageRecord, Label
from client.intake.keys import SiteKey
from client.intake.pixels import shown, to_shape
from client.intake.source import Kept, Step
from common.cohort import Unit
from common.errors import IntakeError
from common.spec import RunSpec

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")
_SPLIT = {"train": "train", "val": "validation", "test": "test"}
_ITEM_BYTES = 2**28


class _Array(NamedTuple):
    """What the header of an array says."""

    items: int
    item: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def item_bytes(self) -> int:
        return math.prod(self.item) * self.dtype.itemsize


@dataclass
class MedMnist:
    """A MedMNIST file.

    Args:
        file: the ``.npz``.
        spec: names the classes in the order of the file's label numbers.
        key: of the pseudonyms, one for each image.
        parts: which parts to take.

    Raises:
        IntakeError: if it is no such file, or its arrays do not fit each other.
    """

    file: Path
    spec: RunSpec
    key: SiteKey
    parts: Sequence[Part] = PARTS
    kind: str = field(default="medmnist", init=False)
    unit: Unit = field(default="image", init=False)

    def __post_init__(self) -> None:
        if self.spec.input.modalities:
            raise IntakeError(
                f"{self.file}: a MedMNIST file names no modality, and input.modalities asks for "
                "them; take pictures in instead (`cloister intake pictures`)"
            )
        self._count = sum(self._checked(part) for part in self.parts)

    def __len__(self) -> int:
        return self._count

    def steps(self) -> Iterator[Step]:
        """See `Source`."""
        for part in self.parts:
            images, labels = (self._items(f"{part}_{what}") for what in ("images", "labels"))
            for number, (image, label) in enumerate(zip(images, labels, strict=True)):
                what = f"{part}[{number}]"
                yield Step(what, images=(self._keep(part, number, image, label),))

    def _keep(self, part: Part, number: int, image: NDArray[Any], label: NDArray[Any]) -> Kept:
        instance = self.key.pseudonym("instance", part, str(number))
        record = ImageRecord(
            patient=instance,
            study="",
            series="",
            instance=instance,
            label=self._label(f"{part}_labels[{number}]", label),
            height=image.shape[0],
            width=image.shape[1],
            split=_SPLIT[part],
        )
        settings = self.spec.input
        return Kept(record, to_shape(shown(image, 255, settings.window), settings))

    def _label(self, where: str, values: NDArray[Any]) -> Label:
        numbers = tuple(int(value) for value in values.reshape(-1))
        task = self.spec.task
        if task.kind == "none":
            return 0
        if task.kind == "multilabel":
            if len(numbers) == len(task.classes) and set(numbers) <= {0, 1}:
                return numbers
        elif len(numbers) == 1 and 0 <= numbers[0] < len(task.classes):
            return numbers[0]
        raise IntakeError(
            f"{self.file}: {where} is {list(numbers)}, which a {task.kind} task with the classes "
            f"{', '.join(task.classes)} cannot hold; name all of the file's classes in order"
        )

    def _checked(self, part: Part) -> int:
        """How many images a part has, after its two arrays have been found to fit."""
        images, labels = (self._array(f"{part}_{what}") for what in ("images", "labels"))
        grey_or_colour = len(images.item) == 2 or (len(images.item) == 3 and images.item[2] == 3)
        if not grey_or_colour or images.dtype != np.uint8 or 0 in images.item:
            raise IntakeError(
                f"{self.file}: {part}_images holds {images.dtype} items of shape {images.item}; "
                "expected uint8 of (height, width) or (height, width, 3)"
            )
        if images.items != labels.items or labels.dtype.kind not in "ui":
            raise IntakeError(
                f"{self.file}: {images.items} {part}_images and {labels.items} {part}_labels of "
                f"{labels.dtype}; expected a whole number for each image"
            )
        return images.items

    def _array(self, name: str) -> _Array:
        with self._opened(name) as member:
            return _header(member)

    def _items(self, name: str) -> Iterator[NDArray[Any]]:
        """The items of an array along its first axis, one after the other."""
        with self._opened(name) as member:
            array = _header(member)
            for _ in range(array.items):
                data = member.read(array.item_bytes)
                yield np.frombuffer(data, dtype=array.dtype).reshape(array.item)

    @contextmanager
    def _opened(self, name: str) -> Iterator[IO[bytes]]:
        try:
            with zipfile.ZipFile(self.file) as archive, archive.open(f"{name}.npy") as member:
                yield member
        except (OSError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise IntakeError(
                f"{self.file}: cannot be read as a MedMNIST .npz with an array {name} ({error})"
            ) from error


def _header(member: IO[bytes]) -> _Array:
    """Read an array's header; its data comes next."""
    version = npy.read_magic(member)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran_order, dtype = read(member)
    array = _Array(shape[0] if shape else 0, tuple(shape[1:]), dtype)
    if not shape or fortran_order or dtype.hasobject or array.item_bytes > _ITEM_BYTES:
        raise ValueError(f"its shape {shape} or type {dtype} is none of MedMNIST")
    return array
