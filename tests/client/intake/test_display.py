"""The grey and colour pipelines, against pydicom's own and against the standard's formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileDataset
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence

from client.intake.display import brightness
from common.errors import IntakeError

STORED = np.arange(0, 4096, 7, dtype=np.uint16)[:585].reshape(13, 45)
Film = Callable[..., FileDataset]


def lut(first: int, entries: np.ndarray, bits: int) -> Sequence:
    item = Dataset()
    item.LUTDescriptor = [len(entries), first, bits]
    item.add_new("LUTData", "OW", entries.astype("<u2").tobytes())
    return Sequence([item])


@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("centre", "width"), [(600, 1000), (-100.5, 300), (2000, 1), (800, 2)])
def test_windows_agree_with_pydicom(
    film: Film, function: str | None, centre: float, width: float
) -> None:
    header = film(
        STORED,
        RescaleSlope=1.5,
        RescaleIntercept=-1024,
        WindowCenter=[centre, 1],
        WindowWidth=[width, 1],
        VOILUTFunction=function,
    )

    ours = brightness(STORED, header, 0, "dicom")

    with np.errstate(over="ignore"):
        theirs = apply_voi_lut(apply_modality_lut(STORED, header), header)
    low, high = -1024, 4095 * 1.5 - 1024
    np.testing.assert_allclose(ours, (theirs - low) / (high - low), atol=2e-4)


def test_lookup_tables_agree_with_pydicom(film: Film) -> None:
    random = np.random.default_rng(1)
    modality = lut(100, random.integers(0, 4096, 3000), 16)
    voi = lut(50, np.sort(random.integers(0, 2**10, 4000)), 10)
    header = film(STORED, ModalityLUTSequence=modality, VOILUTSequence=voi)

    ours = brightness(STORED, header, 0, "dicom")

    theirs = apply_voi_lut(apply_modality_lut(STORED, header), header)
    np.testing.assert_allclose(ours, theirs / (2**10 - 1), atol=1e-6)


def test_a_lookup_table_goes_before_a_window(film: Film) -> None:
    voi = lut(0, np.zeros(4096) + 5, 10)
    header = film(STORED, VOILUTSequence=voi, WindowCenter=2000, WindowWidth=4000)

    assert np.allclose(brightness(STORED, header, 0, "dicom"), 5 / 1023)


@pytest.mark.parametrize("width", [0, -5, "", None])
def test_without_a_usable_window_the_range_is_shown(film: Film, width: Any) -> None:
    header = film(STORED, WindowCenter=50, WindowWidth=width)

    shown = brightness(STORED, header, 0, "dicom")

    np.testing.assert_allclose(shown, STORED / STORED.max(), atol=1e-6)


@pytest.mark.parametrize("rule", ["range", "percentile"])
def test_the_other_rules_pay_no_heed_to_the_window(film: Film, rule: Any) -> None:
    plain = brightness(STORED, film(STORED), 0, rule)
    windowed = brightness(STORED, film(STORED, WindowCenter=50, WindowWidth=9), 0, rule)

    np.testing.assert_array_equal(plain, windowed)


def test_monochrome1_is_inverted(film: Film) -> None:
    window = {"WindowCenter": 600, "WindowWidth": 1000}
    bright = brightness(STORED, film(STORED, **window), 0, "dicom")
    inverted = film(STORED, PhotometricInterpretation="MONOCHROME1", **window)

    np.testing.assert_allclose(brightness(STORED, inverted, 0, "dicom"), 1 - bright, atol=1e-6)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_does_not_count(film: Film, photometric: str) -> None:
    padded = STORED.astype(np.int16)
    padded[:2] = -2000
    padded[2:4] = -1990
    header = film(
        padded,
        PixelPaddingValue=-2000,
        PixelPaddingRangeLimit=-1990,
        PhotometricInterpretation=photometric,
    )

    shown = brightness(padded, header, 0, "range")

    assert (shown[:4] == 0).all()
    assert shown[4:].min() == 0
    assert shown[4:].max() == 1
    assert np.median(shown[4:]) == pytest.approx(0.5, abs=0.01)


def test_not_a_number_is_black_and_does_not_count(film: Film) -> None:
    stored = STORED.astype(np.float32)
    stored[0, 0], stored[0, 1] = np.nan, np.inf

    shown = brightness(stored, film(STORED), 0, "range")

    assert (shown[0, :2] == 0).all()
    assert np.isfinite(shown).all()
    assert shown.max() == 1


def test_values_without_a_finite_one_are_refused(film: Film) -> None:
    with pytest.raises(IntakeError, match="finite"):
        brightness(np.full((3, 3), np.nan, dtype=np.float32), film(STORED), 0, "range")


def test_32_bit_values_keep_their_differences(film: Film) -> None:
    stored = (2**30 + np.arange(600, dtype=np.uint32)).reshape(20, 30)

    shown = brightness(stored, film(stored), 0, "range")

    np.testing.assert_allclose(shown, (stored - 2**30) / 599, atol=1e-9)


def test_a_frame_has_its_own_window(film: Film) -> None:
    def group(centre: float) -> Dataset:
        values, window = Dataset(), Dataset()
        window.WindowCenter, window.WindowWidth = centre, 200
        values.FrameVOILUTSequence = Sequence([window])
        return values

    shared = Dataset()
    rescale = Dataset()
    rescale.RescaleSlope, rescale.RescaleIntercept = 2, 0
    shared.PixelValueTransformationSequence = Sequence([rescale])
    header = film(
        STORED,
        SharedFunctionalGroupsSequence=Sequence([shared]),
        PerFrameFunctionalGroupsSequence=Sequence([group(100), group(4000)]),
    )

    first, second = (brightness(STORED, header, frame, "dicom") for frame in (0, 1))

    for shown, centre in ((first, 100), (second, 4000)):
        expected = np.clip((STORED * 2.0 - (centre - 0.5)) / 199 + 0.5, 0, 1)
        np.testing.assert_allclose(shown, expected, atol=1e-4)


def test_colour_is_scaled_by_its_bits(film: Film) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    header = film(stored[..., 0], SamplesPerPixel=3, PhotometricInterpretation="RGB")

    np.testing.assert_allclose(brightness(stored, header, 0, "dicom"), stored / 255, atol=1e-6)


def test_a_palette_becomes_colour(film: Film) -> None:
    stored = np.array([[0, 1], [2, 3]], dtype=np.uint8)
    palette: dict[str, Any] = {}
    for name, entries in (("Red", [0, 255, 0, 0]), ("Green", [0, 0, 255, 0]), ("Blue", [0] * 4)):
        palette[f"{name}PaletteColorLookupTableDescriptor"] = [4, 0, 8]
        palette[f"{name}PaletteColorLookupTableData"] = bytes(entries)
    header = film(stored, PhotometricInterpretation="PALETTE COLOR", **palette)

    shown = brightness(stored, header, 0, "dicom")

    assert shown.tolist() == [[[0, 0, 0], [1, 0, 0]], [[0, 1, 0], [0, 0, 0]]]


@pytest.mark.parametrize(
    "segments",
    [[1, 65535, 9] * 50, [2, 1, 0, 0] * 10],
    ids=["endless", "indirect"],
)
def test_a_palette_that_asks_for_all_memory_is_refused(film: Film, segments: list[int]) -> None:
    data = np.array(segments, dtype="<u2").tobytes()
    palette: dict[str, Any] = {}
    for name in ("Red", "Green", "Blue"):
        palette[f"{name}PaletteColorLookupTableDescriptor"] = [0, 0, 16]
        palette[f"Segmented{name}PaletteColorLookupTableData"] = data
    stored = np.zeros((2, 2), dtype=np.uint8)
    header = film(stored, PhotometricInterpretation="PALETTE COLOR", **palette)

    with pytest.raises(IntakeError, match="indirect segment or more than"):
        brightness(stored, header, 0, "dicom")


@pytest.mark.parametrize("photometric", ["", "CMYK", "YBR_PARTIAL_420", "RGB"])
def test_other_interpretations_are_refused_by_name(film: Film, photometric: str) -> None:
    header = film(STORED, PhotometricInterpretation=photometric)

    with pytest.raises(IntakeError, match=f"interpretation is '{photometric}'"):
        brightness(STORED, header, 0, "dicom")


def test_a_table_shorter_than_it_says_is_refused(film: Film) -> None:
    tables = lut(0, np.zeros(10), 10)
    tables[0].LUTDescriptor = [20, 0, 10]

    with pytest.raises(IntakeError, match="describes 20 entries of 10 bits and holds 10"):
        brightness(STORED, film(STORED, VOILUTSequence=tables), 0, "dicom")


def test_an_unknown_function_is_refused(film: Film) -> None:
    header = film(STORED, WindowCenter=5, WindowWidth=9, VOILUTFunction="CUBIC")

    with pytest.raises(IntakeError, match="function is a text that is not shown here"):
        brightness(STORED, header, 0, "dicom")
