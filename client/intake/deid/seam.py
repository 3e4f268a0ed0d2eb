"""The engine at the intake's seam: a cohort keeps pixels and pseudonyms, so those are what counts.

Nothing of a header comes into a cohort but its pseudonyms. What is left of de-identification are
the classes that are taken, text burned into the pixels, and faces.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from pydicom.dataset import Dataset

from client.intake.deid.burned_in import outside_regions
from client.intake.deid.classes import check_class
from client.intake.deid.engine import check_faces, check_text
from client.intake.deid.pixeldata import text_in
from client.intake.deid.profile import Profile
from client.intake.deidentify import Deidentified, PixelsOnly
from client.intake.keys import SiteKey
from client.intake.pixels import Floats


@dataclass(frozen=True)
class SafePixels:
    """Keeps pixels without text, of allowed classes and without faces, under keyed pseudonyms.

    Args:
        key: of the pseudonyms.
        profile: what is done about text and faces; the rest of it is about headers.
    """

    key: SiteKey
    profile: Profile = field(default_factory=Profile)

    def __call__(self, unverified: Dataset, frame: int, pixels: Floats) -> Deidentified:
        """See `Deidentifier`."""
        check_class(unverified)
        check_text(unverified, self.profile)
        check_faces(unverified, self.profile)
        return PixelsOnly(self.key)(unverified, frame, self._without_text(unverified, pixels))

    def _without_text(self, unverified: Dataset, pixels: Floats) -> Floats:
        planes = [pixels] if pixels.ndim == 2 else [pixels.max(axis=2), pixels.min(axis=2)]
        boxes = text_in(planes, self.profile)
        outside = outside_regions(unverified, *pixels.shape[:2])
        if not boxes and outside is None:
            return pixels
        clean: Floats = np.array(pixels)
        for box in boxes:
            clean[box.top : box.bottom, box.left : box.right] = 0
        if outside is not None:
            clean[outside] = 0
        return clean
