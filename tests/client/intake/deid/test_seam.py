"""What a cohort keeps of a film with text on it: the film."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset, FileDataset
from pydicom.sequence import Sequence

from client.intake.deid.profile import Profile
from client.intake.deid.seam import SafePixels
from client.intake.deidentify import PixelsOnly
from client.intake.keys import SiteKey
from common.errors import IntakeError

Film = Callable[..., FileDataset]
KEY = SiteKey(bytes(32))


def grey(*lines: str) -> NDArray[np.float32]:
    y, x = np.mgrid[-1:1:128j, -1:1:128j]
    image: NDArray[np.float32] = (0.7 * np.exp(-2 * (x**2 + y**2))).astype(np.float32)
    layer = Image.new("L", (128, 128))
    for row, line in enumerate(lines):
        font = ImageFont.load_default(14)
        ImageDraw.Draw(layer).text((4, 4 + 22 * row), line, font=font, fill=255)
    image[np.asarray(layer) > 128] = 1
    return image


def test_pseudonyms_are_those_of_pixels_only_and_clean_pixels_untouched(film: Film) -> None:
    safe, plain = SafePixels(KEY)(film(), 0, grey()), PixelsOnly(KEY)(film(), 0, grey())

    assert (safe.patient, safe.study, safe.series) == (plain.patient, plain.study, plain.series)
    assert safe.instance == plain.instance
    np.testing.assert_array_equal(safe.pixels, plain.pixels)


@pytest.mark.parametrize("colour", [False, True])
def test_text_is_black_and_the_given_pixels_are_left(film: Film, colour: bool) -> None:
    given = grey("DOE JOHN", "12.08.1964")
    image = np.stack([given, 0.5 * given, 0 * given], axis=-1) if colour else given

    clean = SafePixels(KEY)(film(), 0, image).pixels

    assert image.max() == 1
    assert clean.max() < 0.8
    np.testing.assert_array_equal(clean[64:], image[64:])


def test_text_is_refused_if_pixels_are_not_to_be_cleaned(film: Film) -> None:
    seam = SafePixels(KEY, Profile(clean_pixel_data=False))

    assert seam(film(), 0, grey()).pixels.max() < 1
    with pytest.raises(IntakeError, match="text in its pixels"):
        seam(film(), 0, grey("DOE JOHN", "12.08.1964"))


def test_outside_of_ultrasound_regions_is_black(film: Film) -> None:
    region = Dataset()
    region.RegionLocationMinX0 = region.RegionLocationMinY0 = 32
    region.RegionLocationMaxX1 = region.RegionLocationMaxY1 = 95
    screen = film(
        SOPClassUID="1.2.840.10008.5.1.4.1.1.6.1",
        Modality="US",
        SequenceOfUltrasoundRegions=Sequence([region]),
    )

    clean = SafePixels(KEY)(screen, 0, grey()).pixels

    np.testing.assert_array_equal(clean[32:96, 32:96], grey()[32:96, 32:96])
    assert clean[:32].max() == clean[:, 96:].max() == 0
