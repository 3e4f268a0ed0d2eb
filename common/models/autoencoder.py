"""Networks that give an image back through a narrow code.

Both halve either side twice on the way in and double it twice on the way out, whatever the size:
an odd side is rounded up, and cut on the way out. What they give is an image in the scale of what
they are given (normalised), one for one; `code_numbers` says through how many numbers it went.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.spec import RunSpec
from common.task_sections import Reconstruction

DEFAULT_WIDTH = 16
_LOG_VARIANCE = (-20.0, 10.0)  # the exponential of what lies outside is zero or infinite


class AutoEncoder(nn.Module):
    """A convolutional auto-encoder; with `variational`, its code is drawn (arXiv:1312.6114).

    The code is a map of ``task.code`` channels at a quarter of either side. The way in: 5x5
    convolution of w filters and 3x3 of 2w, both with stride 2 and ReLU, and a 1x1 convolution to
    the code. The way out: 1x1 to 2w, then twice as large by repetition, 3x3 to w,
    and again, and 3x3 to the channels of the image. w is ``spec.model.width``, 16 if not given.
    No layer normalises: that would take away the brightness which is to be given back, and cost
    half a decibel where it was tried.

    Given (B, C, H, W) it returns (B, C, H, W). A variational one returns (B, C H W + 2 K): the
    image, then the K means and K logarithms of variances of its code, each row flattened; its code
    is the mean in evaluation, and drawn from torch's global generator in training.
    """

    def __init__(self, spec: RunSpec, *, variational: bool) -> None:
        super().__init__()
        channels, height, width = spec.input.shape
        filters = spec.model.width or DEFAULT_WIDTH
        code = spec.task_as(Reconstruction).code
        self.variational = variational
        self.code_numbers = code * -(-height // 4) * -(-width // 4)
        self.encoder = nn.Sequential(
            *_narrower(channels, filters, kernel=5),
            *_narrower(filters, 2 * filters, kernel=3),
            nn.Dropout(spec.model.dropout),
            nn.Conv2d(2 * filters, 2 * code if variational else code, kernel_size=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(code, 2 * filters, kernel_size=1),
            nn.ReLU(),
            *_wider(2 * filters, filters),
            *_wider(filters, filters),
            nn.Conv2d(filters, channels, kernel_size=3, padding=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Through the code and back; see the class for the shapes."""
        height, width = images.shape[-2:]
        if not self.variational:
            given: Tensor = self.decoder(self.encoder(images))[..., :height, :width]
            return given
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        log_variance = log_variance.clamp(*_LOG_VARIANCE)
        code = mean
        if self.training:
            code = mean + torch.randn_like(mean) * torch.exp(log_variance / 2)
        given = self.decoder(code)[..., :height, :width]
        return torch.cat([part.flatten(1) for part in (given, mean, log_variance)], dim=1)


def autoencoder(spec: RunSpec) -> nn.Module:
    """A convolutional auto-encoder; see `AutoEncoder`."""
    return AutoEncoder(spec, variational=False)


def vae(spec: RunSpec) -> nn.Module:
    """A convolutional variational auto-encoder; see `AutoEncoder`."""
    return AutoEncoder(spec, variational=True)


def _narrower(channels: int, filters: int, *, kernel: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(channels, filters, kernel, stride=2, padding=kernel // 2),
        nn.ReLU(),
    )


def _wider(channels: int, filters: int) -> tuple[nn.Module, ...]:
    # Repetition and a convolution: Opacus knows no transposed one, and it leaves no chequered
    # pattern (Odena et al. 2016).
    return (
        nn.Upsample(scale_factor=2),
        nn.Conv2d(channels, filters, kernel_size=3, padding=1),
        nn.ReLU(),
    )
