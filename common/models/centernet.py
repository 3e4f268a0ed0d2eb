"""A network for detection: maps of centres, sizes and offsets, a quarter of the image's size."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.spec import RunSpec

DEFAULT_WIDTH = 24
MOST_GROUPS = 4
STRIDE = 4
GEOMETRY = 4
"""The last maps: width and height of what is centred there, and how far its centre is off."""

_RARE = 0.01  # what a centre's probability begins with: nearly all places are none


class CenterNet(nn.Module):
    """A pyramid of convolutions with GroupNorm down to stride 16, and back up to stride 4.

    (B, C, H, W) to (B, classes + 4, ceil(H / 4), ceil(W / 4)): the logit of a centre for each
    class, then width and height in cells, then the offset of the centre from its cell's corner,
    right and down, in cells. Levels of w, 2w, 4w and 4w filters at strides 2, 4, 8 and 16, a
    residual block on each of the last three; what comes up is added, as in a feature pyramid (Lin
    et al. 2017, arXiv:1612.03144).
    """

    def __init__(self, spec: RunSpec) -> None:
        super().__init__()
        width = spec.model.width or DEFAULT_WIDTH
        levels = (2 * width, 4 * width, 4 * width)
        self.stem = _layer(spec.input.channels, width, kernel=5, stride=2)
        self.down = nn.ModuleList()
        for before, filters in zip((width, *levels), levels, strict=False):
            self.down.append(nn.Sequential(_layer(before, filters, stride=2), Residual(filters)))
        self.lateral = nn.ModuleList([nn.Conv2d(filters, 2 * width, 1) for filters in levels])
        self.merged = nn.ModuleList([_layer(2 * width, 2 * width) for _ in levels[:-1]])
        self.dropout = nn.Dropout(spec.model.dropout)
        self.head = _layer(2 * width, 4 * width)
        self.output = nn.Conv2d(4 * width, spec.task.outputs, 1)
        with torch.no_grad():
            self.output.bias.fill_(0.0)  # type: ignore[union-attr]
            self.output.bias[:-GEOMETRY] = math.log(_RARE / (1 - _RARE))  # type: ignore[index]

    def forward(self, images: Tensor) -> Tensor:
        """The maps of (B, C, H, W) images."""
        seen, levels = self.stem(images), []
        for block in self.down:
            seen = block(seen)
            levels.append(seen)
        up = self.lateral[-1](levels[-1])
        for number in reversed(range(len(levels) - 1)):
            finer = self.lateral[number](levels[number])
            up = finer + functional.interpolate(up, size=finer.shape[-2:], mode="nearest")
            up = self.merged[number](up)
        maps: Tensor = self.output(self.dropout(self.head(up)))
        return maps


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut; nothing in place."""

    def __init__(self, filters: int) -> None:
        super().__init__()
        self.first = _layer(filters, filters)
        self.second = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        self.norm = _norm(filters)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, filters, H, W) to the same."""
        out: Tensor = self.act(self.norm(self.second(self.first(x))) + x)
        return out


def centernet(spec: RunSpec) -> nn.Module:
    """A small CenterNet (Zhou et al. 2019, arXiv:1904.07850) with GroupNorm; see `CenterNet`.

    w is ``spec.model.width``, 24 if not given; dropout before the output.
    """
    return CenterNet(spec)


def _layer(channels: int, filters: int, *, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels, filters, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, _norm(filters), nn.ReLU())


def _norm(filters: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(filters, MOST_GROUPS), filters)
