"""MONAI's networks, with GroupNorm for BatchNorm and nothing in place.

Importing this module imports MONAI, which takes seconds: the registry does so on demand.
"""

from __future__ import annotations

from typing import Any

import torch
from monai.networks.nets.densenet import DenseNet
from monai.networks.nets.efficientnet import EfficientNet
from monai.networks.nets.resnet import ResNet, ResNetBlock
from torch import nn

from common.spec import RunSpec

GROUP_NORM = ("group", {"num_groups": 16})
RELU = ("relu", {"inplace": False})
SMALL_IMAGE = 64
EIGHT_GROUPS = ("group", {"num_groups": 8})  # what divides every width of EfficientNet-B0
B0_BLOCKS = (
    "r1_k3_s11_e1_i32_o16_se0.25",
    "r2_k3_s22_e6_i16_o24_se0.25",
    "r2_k5_s22_e6_i24_o40_se0.25",
    "r3_k3_s22_e6_i40_o80_se0.25",
    "r3_k5_s11_e6_i80_o112_se0.25",
    "r4_k5_s22_e6_i112_o192_se0.25",
    "r1_k3_s11_e6_i192_o320_se0.25",
)


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


def efficientnet_b0(spec: RunSpec) -> nn.Module:
    """EfficientNet-B0 (Tan and Le 2019, arXiv:1905.11946) of MONAI, with GroupNorm.

    ``spec.model.dropout`` is that before the output, and the part of the blocks that an image
    skips by chance (each image by a draw of its own), as both are 0.2 in the original. MONAI's
    memory-saving activation is one that no per-patient gradient is known of: the plain one is
    used. Images with a side below 64 pixels meet a stem without stride. The output layer begins as
    torch's own do: MONAI's range for a single output gives logits of about ten.
    """
    longer = max(spec.input.height, spec.input.width)
    small = min(spec.input.height, spec.input.width) < SMALL_IMAGE
    model = EfficientNet(
        blocks_args_str=list(B0_BLOCKS),
        spatial_dims=2,
        in_channels=spec.input.channels,
        num_classes=spec.task.outputs,
        dropout_rate=spec.model.dropout,
        drop_connect_rate=spec.model.dropout,
        image_size=2 * longer if small else longer,
        norm=EIGHT_GROUPS,
    )
    if small:
        model.add_module("_conv_stem_padding", nn.Identity())
        stem = nn.Conv2d(spec.input.channels, 32, kernel_size=3, padding=1, bias=False)
        model.add_module("_conv_stem", stem)
    model.set_swish(memory_efficient=False)
    model._fc.reset_parameters()
    return model
