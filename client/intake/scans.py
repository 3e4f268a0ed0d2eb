"""The frames of a series as one volume of brightness: for a cohort, and for a model at work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from client.intake.deid.seam import CleanFrame
from client.intake.deidentify import text_of
from client.intake.display import Rule
from client.intake.frames import macro
from client.intake.pixels import Floats, stretch
from client.intake.volumes import Slice, Volume
from common.errors import IntakeError


class ScanFrame(NamedTuple):
    """A frame of a volume: its values, and under ``dicom`` its brightness by its own window."""

    slice: Slice
    shown: Floats | None


def frame_of_scan(
    header: Dataset, number: int, stored: NDArray[Any], frame: CleanFrame, rule: Rule
) -> ScanFrame:
    """A decoded frame as part of a volume, without what was blanked in what is shown of it.

    Args:
        header: of its object, cleaned.
        number: of the frame, from 0.
        stored: (rows, columns).
        frame: what de-identification has left of its brightness.
        rule: see `Input.window`.

    Raises:
        IntakeError: if it has regions.
    """
    if frame.outside:
        raise IntakeError("it has regions, as ultrasound has; expected slices of one grid")
    if frame.boxes:
        stored, lowest = np.array(stored), stored.min()
        for box in frame.boxes:
            stored[box.top : box.bottom, box.left : box.right] = lowest
    shown = frame.pixels if rule == "dicom" else None
    return ScanFrame(Slice(header, number, stored), shown)


def brightness_of(volume: Volume, frames: Sequence[ScanFrame], rule: Rule) -> Volume:
    """The brightness of a volume as a whole, in 0..1, where its values are.

    Args:
        volume: as `volume_of` made it of the slices of `frames`.
        frames: in the order in which they were given to it.
        rule: see `Input.window`.

    Raises:
        IntakeError: under ``dicom``, if the frames have several windows or none.
    """
    if rule != "dicom":
        bright = stretch(volume.values, rule, np.isfinite(volume.values))
        header = frames[0].slice.header
        inverted = text_of(header, "PhotometricInterpretation") == "MONOCHROME1"
        return replace(volume, values=1 - bright if inverted else bright)
    windows = {_window(frame.slice) for frame in frames}
    if len(windows) > 1 or not all(windows.pop()):
        raise IntakeError(
            "its slices have several windows or none, which would show one tissue in several "
            "ways; input.window = 'percentile' or 'range' takes the volume's own values"
        )
    shown = [frames[number].shown for number in volume.order]
    return replace(volume, values=np.stack([np.asarray(one, dtype=np.float32) for one in shown]))


def _window(one: Slice) -> tuple[str, str]:
    level = macro(one.header, one.frame, "FrameVOILUTSequence")
    return text_of(level, "WindowCenter"), text_of(level, "WindowWidth")
