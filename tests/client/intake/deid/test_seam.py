"""What a cohort keeps of a film with text on it: the film."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset, FileDataset
from pydicom.sequence import Sequence

from client.intake.decision import Decision
from client.intake.deid.burned_in import Box, outermost
from client.intake.deid.engine import Engine
from client.intake.deid.profile import Profile
from client.intake.deid.seam import CleanFrame, CohortDeidentifier, found_text
from client.intake.keys import SiteKey
from common.errors import ReviewError

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


def clean(film: Dataset, pixels: NDArray[np.float32], **profile: Any) -> CleanFrame:
    return CohortDeidentifier(Engine(Profile(**profile), KEY))(film).frame(0, pixels)


def test_pseudonyms_are_keyed_and_clean_pixels_untouched(film: Film) -> None:
    seen = clean(film(), grey())

    assert seen.patient == KEY.pseudonym("patient", "", "P1")
    assert seen.study == KEY.pseudonym("study", film().StudyInstanceUID)
    assert seen.series == KEY.pseudonym("series", film().SeriesInstanceUID)
    assert seen.instance == KEY.pseudonym("instance", film().SOPInstanceUID, "0")
    np.testing.assert_array_equal(seen.pixels, grey())
    assert (seen.boxes, seen.outside) == ((), False)


def test_what_makes_an_image_is_told_by_the_new_header_alone(film: Film) -> None:
    given = film(PatientName="Doe^John", WindowCenter=7, PatientComments="of Doe")

    header = CohortDeidentifier(Engine(Profile(), KEY))(given).header

    assert header.WindowCenter == 7
    assert "Doe" not in str(header)
    assert "PixelData" not in header


def test_a_release_lets_the_file_through_and_blanks_what_the_person_said(film: Film) -> None:
    shown = film(BurnedInAnnotation="YES")
    deidentify = CohortDeidentifier(Engine(Profile(), KEY))
    image = grey("DOE JOHN", "12.08.1964")
    blank = (Box(100, 100, 110, 120),)

    with pytest.raises(ReviewError):
        deidentify(shown).check()
    released = deidentify(shown, Decision("release", blank))
    released.check()
    seen = released.frame(0, image).pixels
    as_it_is = deidentify(shown, Decision("release", found=False)).frame(0, image)

    assert seen[100:110, 100:120].max() == 0
    assert seen.max() < 0.8
    np.testing.assert_array_equal(as_it_is.pixels, image)


@pytest.mark.parametrize("colour", [False, True])
def test_text_is_black_and_the_given_pixels_are_left(film: Film, colour: bool) -> None:
    given = grey("DOE JOHN", "12.08.1964")
    image = np.stack([given, 0.5 * given, 0 * given], axis=-1) if colour else given

    cleaned = clean(film(), image).pixels

    assert image.max() == 1
    assert cleaned.max() < 0.8
    np.testing.assert_array_equal(cleaned[64:], image[64:])


def test_text_is_refused_if_pixels_are_not_to_be_cleaned(film: Film) -> None:
    assert clean(film(), grey(), clean_pixel_data=False).pixels.max() < 1
    with pytest.raises(ReviewError, match="text in its pixels"):
        clean(film(), grey("DOE JOHN", "12.08.1964"), clean_pixel_data=False)


def test_outside_of_ultrasound_regions_is_black(film: Film) -> None:
    region = Dataset()
    region.RegionLocationMinX0 = region.RegionLocationMinY0 = 32
    region.RegionLocationMaxX1 = region.RegionLocationMaxY1 = 95
    screen = film(
        SOPClassUID="1.2.840.10008.5.1.4.1.1.6.1",
        Modality="US",
        SequenceOfUltrasoundRegions=Sequence([region]),
    )

    seen = clean(screen, grey())

    np.testing.assert_array_equal(seen.pixels[32:96, 32:96], grey()[32:96, 32:96])
    assert seen.pixels[:32].max() == seen.pixels[:, 96:].max() == 0
    assert seen.outside


def test_text_is_found_in_any_two_colours(film: Film) -> None:
    """Red on blue: the brightest channel is the same everywhere, and so is the darkest."""
    text = grey("DOE JOHN", "12.08.1964") == 1
    image = np.zeros((128, 128, 3), dtype=np.float32)
    image[..., 2] = 1
    image[text] = (1, 0, 0)
    colour = film(SamplesPerPixel=3, PhotometricInterpretation="RGB")

    seen = clean(colour, image)

    assert image.max(axis=2).min() == image.max()
    assert seen.boxes
    assert not seen.pixels[text].any()


def test_a_line_that_is_found_in_three_channels_is_one_box(film: Film) -> None:
    """Pink on black: each channel shows the same letters, and the report counts them once."""
    line = grey("DOE JOHN", "12.08.1964")
    pink = line[..., None] * np.array([1, 0.7, 0.8], dtype=np.float32)
    alone = [found_text(pink[..., channel]) for channel in range(3)]

    seen = clean(film(SamplesPerPixel=3, PhotometricInterpretation="RGB"), pink)

    assert all(alone)
    assert found_text(pink) == seen.boxes
    assert len(seen.boxes) <= max(map(len, alone))
    for box in {box for boxes in alone for box in boxes}:
        assert any(kept.holds(box) for kept in seen.boxes)


def test_of_boxes_the_outermost_cover_all_that_all_of_them_cover() -> None:
    draw = np.random.default_rng(5)
    corners = np.sort(draw.integers(0, 20, (60, 2, 2)), axis=1)
    boxes = [Box(*map(int, both.ravel())) for both in corners]
    kept = outermost(boxes)

    def covered(boxes: Iterable[Box]) -> set[tuple[int, int]]:
        return {
            (row, column)
            for box in boxes
            for row in range(box.top, box.bottom)
            for column in range(box.left, box.right)
        }

    assert covered(kept) == covered(boxes)
    assert 0 < len(kept) < len(boxes)
    assert not any(one != other and one.holds(other) for one in kept for other in kept)
