from __future__ import annotations

import pytest
import torch

from common.spec import Input
from common.tasks.preprocess import normalise


def _images(channels: int) -> torch.Tensor:
    return torch.rand(4, channels, 9, 8, generator=torch.Generator().manual_seed(1))


def test_literal_uses_the_numbers_of_each_channel():
    spec = Input(channels=3, height=9, width=8, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    images = _images(3)
    result = normalise(images, spec)
    for channel, (mean, std) in enumerate(zip(spec.mean, spec.std, strict=True)):
        torch.testing.assert_close(result[:, channel], (images[:, channel] - mean) / std)


def test_one_literal_serves_all_channels():
    spec = Input(channels=3, height=9, width=8, mean=(0.5,), std=(0.25,))
    images = _images(3)
    torch.testing.assert_close(normalise(images, spec), (images - 0.5) / 0.25)


def test_image_has_mean_zero_and_deviation_one_by_itself():
    result = normalise(_images(3), Input(channels=3, height=9, width=8, normalize="image"))
    for image in result:
        assert image.mean().item() == pytest.approx(0, abs=1e-6)
        assert image.std(correction=0).item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("how", ["literal", "image"])
def test_an_image_does_not_depend_on_its_batch(how):
    spec = Input(height=9, width=8, normalize=how)
    images = _images(1)
    changed = images.clone()
    changed[1:] = 1.0
    torch.testing.assert_close(normalise(images, spec)[0], normalise(changed, spec)[0])


def test_a_flat_image_becomes_zeros():
    flat = torch.full((2, 1, 9, 8), 0.7)
    result = normalise(flat, Input(height=9, width=8, normalize="image"))
    assert torch.isfinite(result).all()
    assert result.abs().max().item() < 0.1


def test_returns_float32_and_leaves_its_input_alone():
    images = _images(1).to(torch.float64)
    before = images.clone()
    assert normalise(images, Input(height=9, width=8)).dtype == torch.float32
    assert torch.equal(images, before)
