"""What happens to an image between the cohort and the network, in training and in evaluation.

A cohort holds pixels in 0..1; the spec says how they are centred and scaled. Nothing here is
fitted on data: the numbers are literals of the spec, or one image's own (docs/privacy.md 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.spec import Input

_SMALLEST_DEVIATION = 1e-5  # below one 16-bit grey level: the image is flat


def normalise(images: Tensor, spec: Input) -> Tensor:
    """Centre and scale images as the spec's input says.

    ``literal`` is (x - mean) / std with the spec's numbers, by channel; ``image`` uses each
    image's own mean and standard deviation over all its channels and pixels (of a volume those
    that the network sees at once), so that an image's
    result is a function of that image alone whatever batch it comes in. A flat image becomes
    zeros under ``image``.

    Args:
        images: (B, C, H, W), (B, C, D, H, W) of volumes or (B, K, C, H, W) of studies, any floating
            type, values in 0..1, and NaN where a study has no image.
        spec: the run's input.

    Returns:
        float32 of that shape on the device of `images`, which are not changed.
    """
    if not spec.of_studies:
        return _each(images, spec)
    return _each(images.flatten(0, 1), spec).view(images.shape)


def _each(images: Tensor, spec: Input) -> Tensor:
    pixels = images.to(torch.float32)
    if spec.normalize == "literal":
        return (pixels - _by_channel(spec.mean, pixels)) / _by_channel(spec.std, pixels)
    deviation, mean = torch.std_mean(
        pixels, dim=tuple(range(1, pixels.dim())), correction=0, keepdim=True
    )
    return (pixels - mean) / deviation.clamp_min(_SMALLEST_DEVIATION)


def _by_channel(numbers: tuple[float, ...], like: Tensor) -> Tensor:
    by_channel = torch.tensor(numbers, dtype=like.dtype, device=like.device)
    return by_channel.view(1, -1, *[1] * (like.dim() - 2))
