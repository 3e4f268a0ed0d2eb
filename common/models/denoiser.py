"""A network that cleans an image: it says what is to be taken off, at three scales."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.spec import RunSpec

DEFAULT_WIDTH = 16


class ResidualUNet(nn.Module):
    """(B, C, H, W) normalised images to the same, what it finds added to what it is given.

    A small U-Net (Ronneberger et al. 2015): two 3x3 convolutions with ReLU at each of three
    scales, of w, 2w and 4w filters, halved by a stride and doubled by interpolation; on the way
    up one for each scale, of what comes from below and what stands beside it. It learns the noise
    and not the image (Zhang et al. 2017, arXiv:1608.03981), so it is an image's equal before its
    first step. No layer normalises, as in `common.models.autoencoder`, and nothing is narrow:
    there is no code. w is ``spec.model.width``, 16 if not given.
    """

    def __init__(self, spec: RunSpec) -> None:
        super().__init__()
        channels, filters = spec.input.channels, spec.model.width or DEFAULT_WIDTH
        self.fine = _scale(channels, filters, stride=1)
        self.middle = _scale(filters, 2 * filters, stride=2)
        self.coarse = _scale(2 * filters, 4 * filters, stride=2)
        self.dropout = nn.Dropout(spec.model.dropout)
        self.to_middle = nn.Sequential(_convolution(6 * filters, 2 * filters), nn.ReLU())
        self.to_fine = nn.Sequential(_convolution(3 * filters, filters), nn.ReLU())
        self.last = _convolution(filters, channels)

    def forward(self, images: Tensor) -> Tensor:
        """The cleaned images; see the class."""
        fine = self.fine(images)
        middle = self.middle(fine)
        coarse = self.dropout(self.coarse(middle))
        found = self.to_middle(_beside(coarse, middle))
        cleaned: Tensor = images + self.last(self.to_fine(_beside(found, fine)))
        return cleaned


def residual_unet(spec: RunSpec) -> nn.Module:
    """A small residual U-Net; see `ResidualUNet`."""
    return ResidualUNet(spec)


def _scale(channels: int, filters: int, *, stride: int) -> nn.Module:
    first, second = _convolution(channels, filters, stride=stride), _convolution(filters, filters)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())


def _convolution(channels: int, filters: int, *, stride: int = 1) -> nn.Module:
    return nn.Conv2d(channels, filters, kernel_size=3, stride=stride, padding=1)


def _beside(below: Tensor, image: Tensor) -> Tensor:
    """Twice as large, cut where a side is odd, and what stands beside it."""
    larger = nn.functional.interpolate(below, scale_factor=2, mode="bilinear")
    height, width = image.shape[-2:]
    return torch.cat([larger[..., :height, :width], image], dim=1)
