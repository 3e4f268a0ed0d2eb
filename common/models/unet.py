"""The U-Net, for tasks that answer with a map: one number a class and pixel (or voxel).

Importing this module imports MONAI, which takes seconds: the registry does so on demand.
"""

from __future__ import annotations

import math

from monai.networks.nets.basic_unet import BasicUNet
from torch import nn

from common.spec import RunSpec

DEFAULT_WIDTH = 16
MOST_GROUPS = 4
RELU = ("relu", {"inplace": False})


def unet(spec: RunSpec) -> nn.Module:
    """MONAI's U-Net (Falk et al. 2019), with GroupNorm, nothing in place: images to maps.

    Four levels below the image's own, of w, 2w, 4w and 8w filters, two 3x3 convolutions on each,
    3x3x3 where the images are volumes;
    dropout after each convolution. w is ``spec.model.width``, 16 if not given: 461,875 parameters
    for one channel and three classes. It goes up by interpolation and not by transposed
    convolutions, for which Opacus has no rule of its own and a slow general one.
    """
    width = spec.model.width or DEFAULT_WIDTH
    return BasicUNet(
        spatial_dims=len(spec.input.sides),
        in_channels=spec.input.channels,
        out_channels=spec.task.outputs,
        features=(width, width, 2 * width, 4 * width, 8 * width, width),
        act=RELU,
        norm=("group", {"num_groups": math.gcd(width, MOST_GROUPS)}),
        bias=False,
        dropout=spec.model.dropout,
        upsample="nontrainable",
    )
