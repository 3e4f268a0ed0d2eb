"""AlexNet."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from common.spec import RunSpec

DEFAULT_WIDTH = 64
SMALL_IMAGE = 64
_LARGEST_MAP = 6
# Filters in w, side of the window, stride, padding.
_SMALL_STEM, _LARGE_STEM = (1, 3, 1, 1), (1, 11, 4, 2)
_FURTHER = ((3, 5, 1, 2), (6, 3, 1, 1), (4, 3, 1, 1), (4, 3, 1, 1))
_POOLED = (1, 2, 5)


def alexnet(spec: RunSpec) -> nn.Module:
    """AlexNet (Krizhevsky 2014, arXiv:1404.5997), with GroupNorm after each convolution.

    Convolutions of w, 3w, 6w, 4w and 4w filters, max pooling after the first, second and last,
    two dense layers of 64w units with dropout before each, output. w is ``spec.model.width``, 64
    if not given. Images with a side below 64 pixels meet 3x3 without stride first, in the place of
    11x11 with stride 4. Most parameters are in the dense layers; with w = 64 and 1 x 224 x 224 it
    is 57 million, of which a site keeps as many for each patient of a physical batch: a smaller
    width is wiser under differential privacy.
    """
    first = spec.model.width or DEFAULT_WIDTH
    height, width = spec.input.height, spec.input.width
    stem = _SMALL_STEM if min(height, width) < SMALL_IMAGE else _LARGE_STEM
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels: int = spec.input.channels
    for number, (times, kernel, stride, padding) in enumerate((stem, *_FURTHER), start=1):
        filters = times * first
        layers[f"conv{number}"] = nn.Conv2d(channels, filters, kernel, stride, padding)
        layers[f"norm{number}"] = nn.GroupNorm(4 if first % 4 == 0 else 1, filters)
        layers[f"relu{number}"] = nn.ReLU()
        height, width = ((s + 2 * padding - kernel) // stride + 1 for s in (height, width))
        if number in _POOLED:
            layers[f"pool{number}"] = nn.MaxPool2d(3, stride=2)
            height, width = (height - 3) // 2 + 1, (width - 3) // 2 + 1
        channels = filters
    height, width = min(height, _LARGEST_MAP), min(width, _LARGEST_MAP)
    layers["pool"] = nn.AdaptiveAvgPool2d((height, width))
    layers["flatten"] = nn.Flatten()
    for number, given in enumerate((channels * height * width, 64 * first), start=1):
        layers[f"dropout{number}"] = nn.Dropout(spec.model.dropout)
        layers[f"dense{number}"] = nn.Linear(given, 64 * first)
        layers[f"relu_dense{number}"] = nn.ReLU()
    layers["output"] = nn.Linear(64 * first, spec.task.outputs)
    return nn.Sequential(layers)
