"""Shape and brightness: what a run's spec asks of any image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from client.intake.pixels import box_to_shape, mask_to_shape, shown, stretch, to_shape
from common.errors import IntakeError
from common.spec import Input

EVERYWHERE = np.ones((4, 5), dtype=np.bool_)


def image(height: int, width: int, *channels: int) -> np.ndarray:
    return np.random.default_rng(height).random((height, width, *channels), dtype=np.float32)


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
def test_an_image_of_the_right_size_is_kept_exactly(fit: Any) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (16, 20)).astype(np.float32)

    out = to_shape(values / 65535, Input(height=16, width=20, fit=fit))

    np.testing.assert_array_equal(out[0], values)


def test_pad_keeps_everything_and_the_aspect() -> None:
    out = to_shape(np.ones((40, 20), dtype=np.float32), Input(height=16, width=16))[0]

    assert (out[:, 4:12] == 65535).all()
    assert (out[:, :4] == 0).all()
    assert (out[:, 12:] == 0).all()


def test_crop_keeps_the_centre_and_the_aspect() -> None:
    tall = np.zeros((40, 20), dtype=np.float32)
    tall[:10] = tall[30:] = 1

    out = to_shape(tall, Input(height=20, width=20, fit="crop"))[0]

    assert (out == 0).all()


def test_stretch_fills_the_shape() -> None:
    tall = np.zeros((40, 20), dtype=np.float32)
    tall[:20] = 1

    out = to_shape(tall, Input(height=16, width=16, fit="stretch"))[0]

    assert (out[:7] == 65535).all()
    assert (out[9:] == 0).all()


def test_shrinking_is_antialiased_as_torch_does_it() -> None:
    values = image(61, 47)

    ours = to_shape(values, Input(height=16, width=12, fit="stretch"))[0] / 65535

    tensor = torch.from_numpy(values)[None, None]
    theirs = interpolate(tensor, (16, 12), mode="bilinear", antialias=True, align_corners=False)
    np.testing.assert_allclose(ours, theirs[0, 0].numpy(), atol=2e-5)
    aliased = interpolate(tensor, (16, 12), mode="bilinear", align_corners=False)
    assert np.abs(ours - aliased[0, 0].numpy()).max() > 0.1


def test_grey_is_repeated_and_colour_becomes_luma() -> None:
    grey = to_shape(image(16, 16), Input(height=16, width=16, channels=3))
    colour = to_shape(image(16, 16, 3), Input(height=16, width=16, channels=3))
    luma = to_shape(image(16, 16, 3), Input(height=16, width=16, channels=1))

    assert (grey[0] == grey[1]).all()
    assert (grey[0] == grey[2]).all()
    assert not (colour[0] == colour[1]).all()
    expected = colour[0] * 0.299 + colour[1] * 0.587 + colour[2] * 0.114
    np.testing.assert_allclose(luma[0], expected, atol=1.5)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    fit=st.sampled_from(["pad", "crop", "stretch"]),
    channels=st.sampled_from([(), (3,)]),
    wanted=st.sampled_from([1, 3]),
)
def test_any_image_gets_the_shape(
    height: int, width: int, fit: Any, channels: tuple[int, ...], wanted: Any
) -> None:
    spec = Input(height=9, width=17, channels=wanted, fit=fit)

    out = to_shape(np.full((height, width, *channels), 0.5, dtype=np.float32), spec)

    assert out.shape == (wanted, 9, 17)
    assert out.dtype == np.uint16
    assert set(np.unique(out)) <= {0, 32767, 32768}
    assert (out[:, 4, 8] > 0).all()


def test_a_thin_image_costs_little_memory_under_every_fit() -> None:
    thin = np.ones((1, 60_000), dtype=np.float32)

    for fit in ("pad", "crop", "stretch"):
        assert to_shape(thin, Input(height=64, width=64, fit=fit)).max() == 65535


def test_stretch_to_the_range_and_to_percentiles() -> None:
    values = np.arange(20, dtype=np.float32).reshape(4, 5)
    ranged = stretch(values, "range", EVERYWHERE)
    percentile = stretch(values, "percentile", EVERYWHERE)

    np.testing.assert_allclose(ranged, values / 19, rtol=1e-6)
    low, high = np.percentile(values, (1, 99))
    np.testing.assert_allclose(percentile, np.clip((values - low) / (high - low), 0, 1), rtol=1e-5)


def test_only_valid_values_count() -> None:
    values = np.arange(20, dtype=np.float32).reshape(4, 5)
    values[0, 0], values[3, 4] = np.nan, 1e9
    valid = EVERYWHERE.copy()
    valid[0, 0] = valid[3, 4] = False

    assert stretch(values, "range", valid)[3, 3] == 1
    with pytest.raises(IntakeError, match="no pixel with a finite value"):
        stretch(values, "range", ~EVERYWHERE)


def test_a_constant_image_is_black() -> None:
    assert (stretch(np.full((4, 5), 7.0), "range", EVERYWHERE) == 0).all()


def test_a_picture_is_shown_as_it_is() -> None:
    picture = np.array([[0, 51, 102]], dtype=np.uint8)

    np.testing.assert_allclose(shown(picture, 255, "dicom"), [[0, 0.2, 0.4]], rtol=1e-6)
    np.testing.assert_allclose(shown(picture, 255, "range"), [[0, 0.5, 1]], rtol=1e-6)


FITS = ("pad", "crop", "stretch")
SIZES = [(40, 60), (61, 47), (7, 90), (16, 16)]


def settings_of(fit: str) -> Input:
    return Input.model_validate({"height": 24, "width": 32, "fit": fit})


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fit", FITS)
def test_a_mask_comes_to_lie_where_its_image_does(fit: str, size: tuple[int, int]) -> None:
    """An image that shows its own mask: after the fit both say the same, but for the edges."""
    rows, columns = np.indices(size)
    disc = ((rows / size[0] - 0.45) ** 2 + (columns / size[1] - 0.55) ** 2) < 0.12
    settings = settings_of(fit)
    image = to_shape(disc.astype(np.float32), settings)[0]
    mask = mask_to_shape(disc.astype(np.uint8) * 3, settings)
    assert mask.dtype == np.uint16
    assert mask.shape == (24, 32)
    assert set(np.unique(mask)) == {0, 3}
    clear = (image < 0.2 * 65535) | (image > 0.8 * 65535)
    assert clear.mean() > 0.5
    assert ((image > 32768) == (mask == 3))[clear].mean() > 0.98


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fit", FITS)
def test_a_box_comes_to_lie_where_its_image_does(fit: str, size: tuple[int, int]) -> None:
    settings = settings_of(fit)
    height, width = size
    box = (0.3 * width, 0.25 * height, 0.7 * width, 0.8 * height)
    rows, columns = np.indices((height * 8, width * 8)) / 8
    inside = (columns >= box[0]) & (columns < box[2]) & (rows >= box[1]) & (rows < box[3])
    shown = to_shape(inside.astype(np.float32), settings)[0] > 32768
    found = box_to_shape(box, size, settings)
    assert found is not None
    down, across = np.flatnonzero(shown.any(axis=1)), np.flatnonzero(shown.any(axis=0))
    seen = (across[0] / 32, down[0] / 24, (across[-1] + 1) / 32, (down[-1] + 1) / 24)
    assert found == pytest.approx(seen, abs=0.6 / 24)


def test_a_box_that_is_cut_off_is_gone_and_one_that_is_cut_is_shorter() -> None:
    crop = settings_of("crop")
    assert box_to_shape((0, 0, 10, 24), (24, 64), crop) is None
    assert box_to_shape((0, 0, 19, 24), (24, 64), crop) is None
    assert box_to_shape((8, 6, 24, 12), (24, 64), crop) == pytest.approx((0, 0.25, 0.25, 0.5))
    assert box_to_shape((0, 0, 64, 24), (24, 64), crop) == (0, 0, 1, 1)
