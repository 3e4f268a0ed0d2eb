"""The grey and colour pipelines, against pydicom's own and against the standard's formulas."""

from __future__ import annotations

import shutil
import subprocess
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset, FileDataset
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import ExplicitVRBigEndian, JPEGBaseline8Bit, JPEGExtended12Bit

from client.intake.deid.classes import ALLOWED
from client.intake.deid.engine import Engine
from client.intake.deid.profile import Profile
from client.intake.deid.walk import Account
from client.intake.display import brightness, rescaled
from client.intake.keys import SiteKey
from client.intake.part10 import BoundedFile, DicomFile, Directory, FrameDecoder, Limits
from client.intake.quiet import quiet
from common.errors import IntakeError

STORED = np.arange(0, 4096, 7, dtype=np.uint16)[:585].reshape(13, 45)
Film = Callable[..., FileDataset]
LOSSY = (JPEGBaseline8Bit, JPEGExtended12Bit)


def lut(first: int, entries: np.ndarray, bits: int) -> DicomSequence:
    item = Dataset()
    item.LUTDescriptor = [len(entries), first, bits]
    item.add_new("LUTData", "OW", entries.astype("<u2").tobytes())
    return DicomSequence([item])


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
        values.FrameVOILUTSequence = DicomSequence([window])
        return values

    shared = Dataset()
    rescale = Dataset()
    rescale.RescaleSlope, rescale.RescaleIntercept = 2, 0
    shared.PixelValueTransformationSequence = DicomSequence([rescale])
    header = film(
        STORED,
        SharedFunctionalGroupsSequence=DicomSequence([shared]),
        PerFrameFunctionalGroupsSequence=DicomSequence([group(100), group(4000)]),
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


# --- Palettes in segments (PS3.3 C.7.9.2) -------------------------------------------------

DISCRETE, LINEAR, INDIRECT = range(3)


def segmented(units: Sequence[int], count: int, bits: int, first: int = 0) -> dict[str, Any]:
    """The same segments for red, green and blue."""
    data = np.array(units, dtype="u1" if bits == 8 else "<u2").tobytes()
    data += bytes(len(data) % 2)
    made: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name in ("Red", "Green", "Blue"):
        made[f"{name}PaletteColorLookupTableDescriptor"] = [count % 2**16, first, bits]
        made[f"Segmented{name}PaletteColorLookupTableData"] = data
    return made


@pytest.mark.parametrize("bits", [8, 16])
def test_segments_expand_as_in_pydicom(film: Film, bits: int) -> None:
    units = [DISCRETE, 3, 7, 200, 40, LINEAR, 50, 223, LINEAR, 3, 3, DISCRETE, 1, 9]
    stored = np.arange(60, dtype=np.uint8).reshape(6, 10)
    header = film(stored, **segmented(units, 57, bits))

    shown = brightness(stored, header, 0, "dicom")

    np.testing.assert_allclose(shown, apply_color_lut(stored, header) / (2**bits - 1), atol=1e-6)
    assert shown.max() == pytest.approx(223 / (2**bits - 1))


@pytest.mark.parametrize("bits", [8, 16])
def test_an_indirect_segment_repeats_others_from_where_the_table_has_come_to(
    film: Film, bits: int
) -> None:
    """By hand from C.7.9.2.3: the offset is in bytes, and a line begins at the last entry.

    pydicom takes the offset of 16-bit data for one in words.
    """
    head = [DISCRETE, 2, 10, 20, LINEAR, 2, 40]
    offset = 4 * (bits // 8)
    pointer = [offset, 0, 0, 0] if bits == 8 else [offset, 0]
    units = [*head, DISCRETE, 1, 0, INDIRECT, 1, *pointer]
    stored = np.arange(7, dtype=np.uint8).reshape(1, 7)
    header = film(stored, **segmented(units, 7, bits))

    shown = brightness(stored, header, 0, "dicom")[0, :, 0] * (2**bits - 1)

    np.testing.assert_allclose(shown, [10, 20, 30, 40, 0, 20, 40], atol=1e-3)


@pytest.mark.parametrize(
    ("units", "reason"),
    [
        ([DISCRETE, 2, 5, 5] + [LINEAR, 65535, 9] * 50, "more than the 65536 entries"),
        ([DISCRETE, 1, 5] + [INDIRECT, 65535, 0, 0] * 50, "leads to another"),
        ([DISCRETE, 1, 5, INDIRECT, 1, 6, 0], "leads to another"),
        ([DISCRETE, 0] * 1000, "of no length"),
        ([DISCRETE, 1, 5, INDIRECT, 1, 65535, 65535], "ends early"),
        ([LINEAR, 5, 9], "a line from nowhere"),
        ([3, 5, 9], "of no known kind"),
        ([DISCRETE, 9, 1, 2], "ends early"),
        ([DISCRETE, 2, 1, 2], "ends early"),
    ],
    ids=["endless", "nested", "itself", "empty", "beyond", "first", "unknown", "cut", "short"],
)
def test_a_palette_that_asks_for_all_memory_or_makes_no_sense_is_refused(
    film: Film, units: list[int], reason: str
) -> None:
    stored = np.zeros((2, 2), dtype=np.uint8)
    header = film(stored, **segmented(units, 2**16, 16))

    tracemalloc.start()
    with pytest.raises(IntakeError, match=reason):
        brightness(stored, header, 0, "dicom")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_palette_of_an_odd_number_of_bytes_is_read(film: Film) -> None:
    """255 entries of a byte each are padded to an even length."""
    stored = np.arange(256, dtype=np.uint8).reshape(16, 16)
    palette: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name in ("Red", "Green", "Blue"):
        palette[f"{name}PaletteColorLookupTableDescriptor"] = [255, 0, 8]
        palette[f"{name}PaletteColorLookupTableData"] = bytes(range(255)) + bytes(1)

    shown = brightness(stored, film(stored, **palette), 0, "dicom")

    np.testing.assert_allclose(shown[..., 1], np.minimum(stored, 254) / 255, atol=1e-6)


@pytest.mark.parametrize("first", [-2, 0, 3])
def test_a_palette_begins_at_its_first_value(film: Film, first: int) -> None:
    stored = np.arange(-5, 7, dtype=np.int16).reshape(3, 4)
    header = film(stored, **segmented([DISCRETE, 4, 10, 20, 30, 40], 4, 16, first % 2**16))

    shown = brightness(stored, header, 0, "dicom")[..., 0] * 65535

    expected = 10 * (1 + np.clip(stored.astype(int) - first, 0, 3))
    np.testing.assert_allclose(shown, expected, atol=1e-2)


@pytest.mark.parametrize("where", ["object", "frame"])
def test_a_supplemental_palette_colours_what_lies_above_its_first_value(
    film: Film, where: str
) -> None:
    """PS3.3 C.7.6.19 and C.8.16.2.1.1.1: below is grey, through the window."""
    stored = np.array([[0, 50, 100], [3000, 3001, 4000]], dtype=np.uint16)
    extra = segmented([DISCRETE, 2, 65535, 32768], 2, 16, 3000)
    del extra["PhotometricInterpretation"]
    if where == "object":
        extra["PixelPresentation"] = "COLOR"
    else:
        item, group = Dataset(), Dataset()
        item.PixelPresentation = "MIXED"
        group.CTImageFrameTypeSequence = DicomSequence([item])
        extra["SharedFunctionalGroupsSequence"] = DicomSequence([group])
    header = film(stored, WindowCenter=50.5, WindowWidth=101, **extra)

    shown = brightness(stored, header, 0, "dicom")

    np.testing.assert_allclose(shown[0, :, 0], [0, 0.5, 1], atol=1e-6)
    np.testing.assert_allclose(shown[1, :, 2], [1, 0.5, 0.5], atol=1e-4)
    assert brightness(stored, header, 0, "range").ndim == 2


# --- Grey, continued ----------------------------------------------------------------------


def test_padding_of_the_other_sign_is_padding_all_the_same(film: Film) -> None:
    """Files in explicit VR exist whose padding value is unsigned though their pixels are not."""
    padded = STORED.astype(np.int16)
    padded[:2] = -2000
    header = film(padded)
    header.add_new("PixelPaddingValue", "US", 2**16 - 2000)

    shown = brightness(padded, header, 0, "range")

    assert shown[2:].min() == 0
    assert np.median(shown[2:]) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("keyword", ["FloatPixelPaddingValue", "DoubleFloatPixelPaddingValue"])
def test_padding_of_float_pixels_does_not_count(film: Film, keyword: str) -> None:
    stored = STORED.astype(np.float32 if keyword.startswith("Float") else np.float64)
    stored[:2] = -1e30
    header = film(STORED, **{keyword: -1e30})

    shown = brightness(stored, header, 0, "range")

    assert (shown[:2] == 0).all()
    assert np.median(shown[2:]) == pytest.approx(0.5, abs=0.1)


def test_a_voi_table_behind_a_negative_intercept_begins_below_zero(film: Film) -> None:
    """In implicit VR its first value is read by the sign of the stored ones (PS3.5 A.1)."""
    voi = lut(2**16 - 1024, np.arange(4096), 12)
    header = film(STORED, RescaleIntercept=-1024, RescaleSlope=1, VOILUTSequence=voi)

    np.testing.assert_allclose(brightness(STORED, header, 0, "dicom"), STORED / 4095, atol=1e-6)


def test_rescaled_values_are_those_of_pydicom_and_padding_is_their_lowest(film: Film) -> None:
    stored = STORED.astype(np.int16)
    stored[0] = -2000
    header = film(stored, RescaleSlope=0.5, RescaleIntercept=-1024, PixelPaddingValue=-2000)

    ours = rescaled(stored, header, 0)

    np.testing.assert_array_equal(ours[1:], apply_modality_lut(stored, header)[1:])
    assert (ours[0] == ours[1:].min()).all()
    with pytest.raises(IntakeError, match="finite"):
        rescaled(np.full((2, 2), -2000, dtype=np.int16), header, 0)


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


@pytest.mark.parametrize(
    ("descriptor", "data", "reason"),
    [
        (None, bytes(40), "LUTDescriptor is missing or wrong"),
        ([20, 0], bytes(40), "LUTDescriptor is missing or wrong"),
        ([20, 0, 17], bytes(40), "LUTDescriptor says 20 entries of 17 bits"),
        ([20, 0, 10], None, "describes 20 entries of 10 bits and holds 0"),
        ([0, 0, 16], bytes(40), "describes 65536 entries of 16 bits and holds 20"),
    ],
)
@pytest.mark.parametrize("keyword", ["VOILUTSequence", "ModalityLUTSequence"])
def test_a_table_that_is_not_whole_is_refused_by_name(
    film: Film, keyword: str, descriptor: Any, data: Any, reason: str
) -> None:
    item = Dataset()
    item.LUTDescriptor = descriptor
    item.add_new("LUTData", "OW", data)

    with pytest.raises(IntakeError, match=reason):
        brightness(STORED, film(STORED, **{keyword: DicomSequence([item])}), 0, "dicom")


def test_a_table_of_numbers_is_one_of_words(film: Film) -> None:
    """LUTData is US or OW (PS3.3 C.11.1.1)."""
    item = Dataset()
    item.LUTDescriptor = [4096, 0, 12]
    item.add_new("LUTData", "US", list(range(4095, -1, -1)))
    header = film(STORED, VOILUTSequence=DicomSequence([item]))

    np.testing.assert_allclose(brightness(STORED, header, 0, "dicom"), 1 - STORED / 4095, atol=1e-6)


def test_an_unknown_function_is_refused(film: Film) -> None:
    header = film(STORED, WindowCenter=5, WindowWidth=9, VOILUTFunction="CUBIC")

    with pytest.raises(IntakeError, match="function is a text that is not shown here"):
        brightness(STORED, header, 0, "dicom")


# --- From a clean header ------------------------------------------------------------------


def clean_header(header: Dataset, **profile: Any) -> Dataset:
    chosen: dict[str, Any] = {"faces": "keep", "risky_pixels": "blank", **profile}
    with quiet():
        return Engine(Profile(**chosen), SiteKey(bytes(32))).clean_header(header, Account())


def of_every_kind() -> Iterator[tuple[str, NDArray[Any], dict[str, Any]]]:
    """Headers that use each attribute of the pipeline."""
    voi = lut(50, np.arange(0, 4000, 2), 12)
    yield "window", STORED, {"WindowCenter": [40, 300], "WindowWidth": [400, 2000]}
    for function in ("SIGMOID", "LINEAR_EXACT"):
        curve = {"WindowCenter": 900.5, "WindowWidth": 700, "VOILUTFunction": function}
        yield function, STORED, curve
    yield "tables", STORED, {"ModalityLUTSequence": lut(0, np.arange(4096) // 2, 16)}
    yield "voi", STORED, {"VOILUTSequence": voi, "RescaleSlope": 0.7, "RescaleIntercept": 3}
    signed = STORED.astype(np.int16) - 2000
    padding = {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1500}
    yield "padding", signed, padding
    wide = (2**31 + 1000 * np.arange(600, dtype=np.int64)).astype(np.uint32).reshape(20, 30)
    yield "32 bits", wide, {"WindowCenter": 2**31 + 3e5, "WindowWidth": 6e5}
    rescale = {"RescaleSlope": 1, "RescaleIntercept": -(2**31)}
    yield "32 bits signed", wide, rescale | {"WindowCenter": 3e5, "WindowWidth": 4e5}
    small = np.arange(60, dtype=np.uint8).reshape(6, 10)
    units = [DISCRETE, 3, 7, 200, 40, LINEAR, 50, 60000, INDIRECT, 1, 10, 0]
    yield "segments", small, segmented(units, 103, 16)
    yield "segments of bytes", small, segmented([DISCRETE, 1, 9, LINEAR, 7, 99], 8, 8)
    supplement = segmented([DISCRETE, 2, 65535, 32768], 2, 16, 3000)
    supplement |= {"PhotometricInterpretation": "MONOCHROME2", "PixelPresentation": "COLOR"}
    yield "supplement", STORED, supplement | {"WindowCenter": 500, "WindowWidth": 999}
    values, window, group = Dataset(), Dataset(), Dataset()
    window.WindowCenter, window.WindowWidth = 900, 200
    values.RescaleSlope, values.RescaleIntercept, values.RescaleType = 2, -5, "US"
    group.PixelValueTransformationSequence = DicomSequence([values])
    group.FrameVOILUTSequence = DicomSequence([window])
    yield "groups", STORED, {"PerFrameFunctionalGroupsSequence": DicomSequence([group])}


KINDS = list(of_every_kind())


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize(
    ("stored", "extra"), [kind[1:] for kind in KINDS], ids=[k[0] for k in KINDS]
)
def test_a_clean_header_shows_the_same_image(
    film: Film, stored: NDArray[Any], extra: dict[str, Any], order: str
) -> None:
    """Whatever the byte order of the file; what is written is little endian."""
    made = film(stored, **deepcopy(extra))
    expected = brightness(stored, made, 0, "dicom")
    if order == "big":
        turn(made)
        made.set_original_encoding(False, False)
        made.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    buffer = BytesIO()
    made.save_as(buffer, enforce_file_format=True)
    header = dcmread(BytesIO(buffer.getvalue()), stop_before_pixels=True)

    clean = clean_header(header)

    np.testing.assert_array_equal(brightness(stored, header, 0, "dicom"), expected)
    np.testing.assert_array_equal(brightness(stored, clean, 0, "dicom"), expected)
    assert np.ptp(expected) > 0.3


def turn(level: Dataset) -> None:
    """Words the other way round, as a big endian file has them."""
    for element in level:
        if element.VR == "SQ":
            for item in element.value:
                turn(item)
        elif element.VR == "OW" and element.keyword != "PixelData":
            element.value = np.frombuffer(element.value, dtype="<u2").byteswap().tobytes()


def test_nothing_behind_the_segments_of_a_palette_is_kept(film: Film) -> None:
    stored = np.zeros((2, 2), dtype=np.uint8)
    extra = segmented([DISCRETE, 2, 1, 2, *b"DOE JOHN"], 2, 16)
    broken = segmented([7, *b"DOE JOHN"], 2, 16)
    name = "SegmentedRedPaletteColorLookupTableData"

    assert (
        clean_header(film(stored, **extra))[name].value
        == np.array([0, 2, 1, 2]).astype("<u2").tobytes()
    )
    assert not clean_header(film(stored, **broken))[name].value


# --- Real files ---------------------------------------------------------------------------


class Shown(NamedTuple):
    """A real file with a frame of it, as it is stored and as it looks."""

    path: Path
    header: Dataset
    frame: int
    stored: NDArray[Any]
    image: NDArray[Any]
    lossy: bool


@pytest.fixture(scope="module")
def shown(shared_data: Path) -> list[Shown]:
    """The first and last frame of every real file that can be shown."""
    roots = [shared_data / "dicom", Path(pydicom.__file__).parent / "data" / "test_files"]
    paths = [path for root in roots for path in sorted(root.rglob("*")) if path.is_file()]
    return [one for path in paths for one in frames_of(path)]


def frames_of(path: Path) -> Iterator[Shown]:
    with quiet(), BoundedFile(path, 2**29) as stream:
        try:
            file = DicomFile.parse(stream, Limits())
            element, geometry = file.pixel_element(), file.geometry(Limits())
            decode = FrameDecoder(file, element, geometry)
            for frame in sorted({0, geometry.frames - 1}):
                stored = decode(frame)
                image = brightness(stored, file.header, frame, "dicom")
                yield Shown(path, file.header, frame, stored, image, file.syntax in LOSSY)
        except (Directory, IntakeError, ValueError):
            return


def test_real_files_look_the_same_by_their_clean_header(shown: list[Shown]) -> None:
    compared = 0
    for one in shown:
        if one.header.get("SOPClassUID") in ALLOWED:
            clean = clean_header(one.header)
            again = brightness(one.stored, clean, one.frame, "dicom")
            np.testing.assert_array_equal(again, one.image, one.path.name)
            compared += 1
    assert compared >= 240


# Where dcmtk shows something else, and why.
DCMTK_DIFFERS = {
    "CT0012.fragmented_no_bot_jpeg_baseline.51.dcm": "it pays no heed to functional groups",
    "002_non_isotropic/001.dcm": "it rounds rescaled values, and these span 0.3",
    "seg_image_sm_control_labelmap.dcm": "it pays no heed to padding in a window of the range",
    "rtdose_expb.dcm": "it turns words of 32 bits by halves",
    "rtdose_expb_1frame.dcm": "it turns words of 32 bits by halves",
    "CTImage.dcm_JPEGProcess1TransferSyntax_1.2.840.10008.1.2.4.50.dcm": "codecs differ by 1",
}


@pytest.mark.skipif(shutil.which("dcmj2pnm") is None, reason="dcmtk is not installed")
def test_real_files_look_as_dcmtk_shows_them(shown: list[Shown], tmp_path: Path) -> None:
    """Within two of its 256 shades, or three of colours, and of what two JPEG codecs decode."""
    kinds: Counter[str] = Counter()
    inverted_fits = 0
    for one in shown:
        if one.frame or "/".join(one.path.parts[-2:]) in DCMTK_DIFFERS or one.stored.size > 2**21:
            continue
        theirs = None if one.path.name in DCMTK_DIFFERS else by_dcmtk(one, tmp_path / "image.pnm")
        if theirs is not None and theirs.shape == one.image.shape:
            most = 3.2 if one.lossy or theirs.ndim == 3 else 2.1
            assert np.abs(theirs - 255 * one.image).max() <= most, one.path.name
            inverted_fits += np.abs(theirs - 255 * (1 - one.image)).max() <= most
            kinds[str(one.header.PhotometricInterpretation)] += 1
    assert kinds.total() >= 180
    assert min(kinds[name] for name in ("MONOCHROME1", "PALETTE COLOR", "RGB", "YBR_FULL")) >= 4
    assert inverted_fits <= 5


def by_dcmtk(one: Shown, target: Path) -> NDArray[np.float64] | None:
    """Its picture in 0..255; None for what it cannot decode."""
    target.unlink(missing_ok=True)
    how = ["+Wm"]
    if "WindowCenter" in one.header:
        how = ["+Wi", "1"]
    if "VOILUTSequence" in one.header:
        how = ["+Wl", "1"]
    grey = one.image.ndim == 2
    command: list[str | Path] = ["dcmj2pnm", "+op", "-O", *(how if grey else []), one.path, target]
    subprocess.run(command, capture_output=True, check=False)
    return np.asarray(Image.open(target), dtype=np.float64) if target.exists() else None
