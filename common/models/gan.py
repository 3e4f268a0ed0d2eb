"""Pairs of networks: a generator, and the discriminator that alone learns from patients.

Both are conditional. A generator is given noise with the classes of the image it is to make behind
it; a discriminator gives one number of its own and one for each class, which the task adds up for
the classes of the image (Miyato and Koyama 2018, arXiv:1802.05637), so that it stays a function
from images to rows, as every network here.
"""

from __future__ import annotations

from torch import Tensor, nn

from common.spec import RunSpec
from common.task_sections import Generation

DEFAULT_WIDTH = 16


class Generator(nn.Module):
    """From (B, latent + classes) to (B, C, H, W) of brightness in 0..1.

    A linear layer to 4w channels at a quarter of either side, then two transposed convolutions of
    4x4 with stride 2, to 2w channels and to the image's, GroupNorm and ReLU before each and the
    logistic function at the end. It never learns from patients, so it may hold what Opacus has no
    gradients of.
    """

    def __init__(self, spec: RunSpec) -> None:
        super().__init__()
        channels, height, width = spec.input.shape
        filters = spec.model.width or DEFAULT_WIDTH
        self.shape = (channels, height, width)
        self.given = spec.task_as(Generation).latent + len(spec.task.classes)
        places = (-(-height // 4), -(-width // 4))
        self.layers = nn.Sequential(
            nn.Linear(self.given, 4 * filters * places[0] * places[1]),
            nn.Unflatten(1, (4 * filters, *places)),
            _norm(4 * filters),
            nn.ReLU(),
            nn.ConvTranspose2d(4 * filters, 2 * filters, 4, stride=2, padding=1, bias=False),
            _norm(2 * filters),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * filters, channels, 4, stride=2, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, given: Tensor) -> Tensor:
        """The images for rows of noise and classes."""
        _, height, width = self.shape
        images: Tensor = self.layers(given)[..., :height, :width]
        return images


class Pair(nn.Module):
    """A generator and a discriminator; called as a network it is the discriminator."""

    def __init__(self, generator: Generator, discriminator: nn.Module) -> None:
        super().__init__()
        self.generator = generator
        self.discriminator = discriminator

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) normalised images to (B, 1 + classes)."""
        judged: Tensor = self.discriminator(images)
        return judged


def dcgan(spec: RunSpec) -> nn.Module:
    """A small conditional DCGAN (Radford et al. 2016, arXiv:1511.06434), made for DP-SGD.

    The discriminator: 5x5 convolutions of w and 2w filters with stride 2 and leaky ReLU, a linear
    layer on the whole map. It holds no normalisation: none of a batch is sound here, and that
    of one image would undo the bound on the slopes which the Wasserstein loss needs. w is
    ``spec.model.width``, 16 if not given. The generator: see `Generator`.
    """
    channels, height, width = spec.input.shape
    filters = spec.model.width or DEFAULT_WIDTH
    places = -(-height // 4) * -(-width // 4)
    discriminator = nn.Sequential(
        nn.Conv2d(channels, filters, kernel_size=5, stride=2, padding=2),
        nn.LeakyReLU(0.2),
        nn.Conv2d(filters, 2 * filters, kernel_size=5, stride=2, padding=2),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Dropout(spec.model.dropout),
        nn.Linear(2 * filters * places, spec.task.outputs),
    )
    return Pair(Generator(spec), discriminator)


def _norm(filters: int) -> nn.Module:
    return nn.GroupNorm(4 if filters % 4 == 0 else 1, filters)
