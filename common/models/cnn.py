"""Plain convolutional networks."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from common.spec import RunSpec

DEFAULT_WIDTH = 16
COMPACT_WIDTH = 8


def reference_cnn(spec: RunSpec) -> nn.Module:
    """The reference CNN: four unpadded convolutions with pooling, then 512 units.

    Filters 32, 64, 128, 128 of 3x3 with ReLU, each followed by 2x2 max pooling; dense 512 with
    ReLU, dropout, output. For 3 x 150 x 150 and one output it has 3,453,121 parameters; the dense
    layer follows the size of the input. The sigmoid belongs to the task.
    """
    channels, height, width = spec.input.shape
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, filters in enumerate((32, 64, 128, 128), start=1):
        layers[f"conv{number}"] = nn.Conv2d(channels, filters, kernel_size=3)
        layers[f"relu{number}"] = nn.ReLU()
        layers[f"pool{number}"] = nn.MaxPool2d(2)
        channels, height, width = filters, (height - 2) // 2, (width - 2) // 2
    layers["flatten"] = nn.Flatten()
    layers["dense"] = nn.Linear(channels * height * width, 512)
    layers["relu"] = nn.ReLU()
    layers["dropout"] = nn.Dropout(spec.model.dropout)
    layers["output"] = nn.Linear(512, spec.task.outputs)
    return nn.Sequential(layers)


def small_cnn(spec: RunSpec) -> nn.Module:
    """A light CNN for images of about 28 to 64 pixels a side, made for DP-SGD.

    Three convolutions with GroupNorm and ReLU: 5x5 of w filters and 3x3 of 2w, both with stride
    2, then 3x3 of 4w; the mean over the image, dropout, output. w is ``spec.model.width``, 16 if
    not given: 23,729 parameters for one channel and one output. Strides shrink the image before
    the work is done, which doubles the speed that pooling has, and of the designs tried it learned
    most in a number of noisy steps.
    """
    width = spec.model.width or DEFAULT_WIDTH
    return nn.Sequential(
        *_block(spec.input.channels, width, kernel=5, stride=2),
        *_block(width, 2 * width, kernel=3, stride=2),
        *_block(2 * width, 4 * width, kernel=3, stride=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(spec.model.dropout),
        nn.Linear(4 * width, spec.task.outputs),
    )


def pooled_cnn(spec: RunSpec) -> nn.Module:
    """The light CNN with max pooling in the place of strides.

    Three 3x3 convolutions of w, 2w and 4w filters with GroupNorm and ReLU, the first two followed
    by 2x2 max pooling; the mean over the image, dropout, output. w is ``spec.model.width``, 16 if
    not given: 23,473 parameters for one channel and one output. A step takes 1.5 to 2 times
    that of `small_cnn`; without noise it learned much more in as many steps, with noise it did not.
    """
    width = spec.model.width or DEFAULT_WIDTH
    return nn.Sequential(
        *_block(spec.input.channels, width, kernel=3, stride=1, pool=True),
        *_block(width, 2 * width, kernel=3, stride=1, pool=True),
        *_block(2 * width, 4 * width, kernel=3, stride=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(spec.model.dropout),
        nn.Linear(4 * width, spec.task.outputs),
    )


def compact_cnn(spec: RunSpec) -> nn.Module:
    """Two strided convolutions and a linear layer on the whole map, for few noisy steps.

    5x5 of w filters and 3x3 of 2w, both with stride 2, GroupNorm and ReLU; dropout; output. w is
    ``spec.model.width``, 8 if not given.
    """
    channels, height, width = spec.input.shape
    filters = spec.model.width or COMPACT_WIDTH
    places = -(-height // 4) * -(-width // 4)
    return nn.Sequential(
        *_block(channels, filters, kernel=5, stride=2),
        *_block(filters, 2 * filters, kernel=3, stride=2),
        nn.Flatten(),
        nn.Dropout(spec.model.dropout),
        nn.Linear(2 * filters * places, spec.task.outputs),
    )


def _block(
    channels: int, filters: int, *, kernel: int, stride: int, pool: bool = False
) -> tuple[nn.Module, ...]:
    # Pooled before it is normalised: a quarter of the work.
    return (
        nn.Conv2d(channels, filters, kernel, stride, padding=kernel // 2, bias=False),
        *((nn.MaxPool2d(2),) if pool else ()),
        nn.GroupNorm(4 if filters % 4 == 0 else 1, filters),
        nn.ReLU(),
    )
