"""Plain convolutional networks."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from common.spec import RunSpec

DEFAULT_WIDTH = 32


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
    """A light CNN for images of about 28 to 64 pixels a side.

    Three blocks of a 3x3 convolution without bias, GroupNorm, ReLU; filters w, 2w, 4w, with 2x2
    max pooling after the first two; then the mean over the image, dropout, output. w is
    ``spec.model.width``, 32 if not given.
    """
    width = spec.model.width or DEFAULT_WIDTH
    return nn.Sequential(
        *_block(spec.input.channels, width),
        nn.MaxPool2d(2),
        *_block(width, 2 * width),
        nn.MaxPool2d(2),
        *_block(2 * width, 4 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(spec.model.dropout),
        nn.Linear(4 * width, spec.task.outputs),
    )


def _block(channels: int, filters: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(channels, filters, kernel_size=3, padding=1, bias=False),
        nn.GroupNorm(4 if filters % 4 == 0 else 1, filters),
        nn.ReLU(),
    )
