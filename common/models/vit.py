"""A small vision transformer, of parts whose gradients Opacus takes patient by patient.

MONAI's own keeps its positions and its class token as bare parameters, which Opacus' hooks do not
see, and a layer that nothing passes through. Here both stand in one embedding: place 0 is the
class token with its position.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.spec import RunSpec

DEFAULT_WIDTH = 64
_BLOCKS, _MOST_HEADS, _SPREAD = 4, 4, 0.02


class SelfAttention(nn.Module):
    """Every place looks at every place of its own image (Vaswani et al. 2017)."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.heads = math.gcd(width, _MOST_HEADS)
        self.asked = nn.Linear(width, 3 * width)
        self.given = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, places: Tensor) -> Tensor:
        """(B, places, width) to the same shape."""
        count, width = places.shape[1:]
        split = self.asked(places).reshape(-1, count, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value)
        together: Tensor = self.given(seen.transpose(1, 2).reshape(-1, count, width))
        kept: Tensor = self.dropout(together)
        return kept


class Block(nn.Module):
    """Attention, then two layers on each place, each after a norm and beside a shortcut."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), SelfAttention(width, dropout))
        self.dense = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, places: Tensor) -> Tensor:
        """(B, places, width) to the same shape."""
        places = places + self.attention(places)
        changed: Tensor = places + self.dense(places)
        return changed


class VisionTransformer(nn.Module):
    """Squares of an image as places; the class token's place gives the logits.

    Args:
        spec: the run; an image that is no whole number of squares is filled up with zeros on its
            right and lower side.
    """

    def __init__(self, spec: RunSpec) -> None:
        super().__init__()
        channels, height, width = spec.input.shape
        features, dropout = spec.model.width or DEFAULT_WIDTH, spec.model.dropout
        side = square(height, width)
        rows, columns = -(-height // side), -(-width // side)
        self.fill = nn.ZeroPad2d((0, columns * side - width, 0, rows * side - height))
        self.squares = nn.Conv2d(channels, features, side, stride=side)
        self.positions = nn.Embedding(1 + rows * columns, features)
        nn.init.normal_(self.positions.weight, std=_SPREAD)
        self.blocks = nn.Sequential(*(Block(features, dropout) for _ in range(_BLOCKS)))
        self.norm = nn.LayerNorm(features)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(features, spec.task.outputs)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, outputs)."""
        squares = self.squares(self.fill(images)).flatten(2).transpose(1, 2)
        numbers = torch.arange(squares.shape[1] + 1, device=images.device)
        positions = self.positions(numbers.expand(images.shape[0], -1))
        places = positions + functional.pad(squares, (0, 0, 1, 0))
        first = self.norm(self.blocks(places)[:, 0])
        logits: Tensor = self.output(self.dropout(first))
        return logits


def square(height: int, width: int) -> int:
    """The side of a square in pixels: 4 for images below 64 a side, 8 below 128, else 16."""
    shorter = min(height, width)
    return 4 if shorter < 64 else 8 if shorter < 128 else 16


def vit(spec: RunSpec) -> nn.Module:
    """A small vision transformer (Dosovitskiy et al. 2020, arXiv:2010.11929).

    Four blocks on squares of 4, 8 or 16 pixels; w numbers a place, up to four heads, 2 w in each
    block's dense layer. w is ``spec.model.width``, 64 if not given: 138,369 parameters for one
    channel of 28 x 28 and one output.
    """
    return VisionTransformer(spec)
