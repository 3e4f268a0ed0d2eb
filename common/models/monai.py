"""MONAI's networks, with GroupNorm for BatchNorm and nothing in place.

Importing this module imports MONAI, which takes seconds: the registry does so on demand.
"""

from __future__ import annotations

from typing import Any

import torch
from monai.networks.nets.densenet import DenseNet
from monai.networks.nets.resnet import ResNet, ResNetBlock
from torch import nn

from common.spec import RunSpec

GROUP_NORM = ("group", {"num_groups": 16})
RELU = ("relu", {"inplace": False})
SMALL_IMAGE = 64


class GroupNormBlock(ResNetBlock):
    """MONAI's basic block with an addition that is not in place.

    The stock block writes ``out += residual`` into a tensor that Opacus' backward hooks watch,
    and always has an in-place ReLU.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"act": RELU})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, planes in, H, W) to (B, planes, H / stride, W / stride)."""
        residual = x if self.downsample is None else self.downsample(x)
        out = self.act(self.bn1(self.conv1(x)))
        return self.act(self.bn2(self.conv2(out)) + residual)  # type: ignore[no-any-return]


class GroupNormResNet(ResNet):
    """MONAI's ResNet whose blocks have GroupNorm as well as its stem.

    MONAI 1.6.1 hands ``norm`` to the stem and keeps BatchNorm in every block.
    """

    def _make_layer(self, *args: Any, **kwargs: Any) -> nn.Sequential:
        return super()._make_layer(*args, **kwargs | {"norm": GROUP_NORM})


def resnet18(spec: RunSpec) -> nn.Module:
    """ResNet-18 (He et al. 2015) of MONAI, with GroupNorm; dropout before the output.

    Shortcuts are convolutions ("B"): MONAI's "A" cuts the gradient. Images with a side below 64
    pixels meet a stem of 3x3 without stride or pooling, as is usual for them.
    """
    small = min(spec.input.height, spec.input.width) < SMALL_IMAGE
    model = GroupNormResNet(
        GroupNormBlock,
        layers=[2, 2, 2, 2],
        block_inplanes=[64, 128, 256, 512],
        spatial_dims=2,
        n_input_channels=spec.input.channels,
        conv1_t_size=3 if small else 7,
        conv1_t_stride=1 if small else 2,
        no_max_pool=small,
        bias_downsample=False,
        num_classes=spec.task.outputs,
        act=RELU,
        norm=GROUP_NORM,
    )
    model.add_module("avgpool", nn.Sequential(model.avgpool, nn.Dropout(spec.model.dropout)))
    return model


def densenet121(spec: RunSpec) -> nn.Module:
    """DenseNet-121 (Huang et al. 2017) of MONAI, with GroupNorm; dropout after each layer."""
    return DenseNet(
        spatial_dims=2,
        in_channels=spec.input.channels,
        out_channels=spec.task.outputs,
        act=RELU,
        norm=GROUP_NORM,
        dropout_prob=spec.model.dropout,
    )
