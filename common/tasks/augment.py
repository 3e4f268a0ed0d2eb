"""Random changes of images in training: one exact flip and one resampling for a whole batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from common.spec import Augmentation


def augment(images: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Change each image by its own draw; see `Augmentation` for what is drawn and its units.

    An image is flipped, then sheared, zoomed, rotated about its centre and shifted in a single
    bilinear resampling; beyond its border an image goes on with the pixels of the border. What
    becomes of an image depends on that image and its own draw alone. ``multiplicity`` is the
    caller's: hand in the copies.

    Args:
        images: (B, C, H, W) float32, on any device.
        augmentation: what to change. Where it asks for nothing, `images` itself is returned and
            nothing is drawn.
        generator: the source of randomness, on any device.

    Returns:
        A tensor of the shape, type and device of `images`.
    """
    if augmentation.flip_horizontal:
        images = _flip_half(images, -1, generator)
    if augmentation.flip_vertical:
        images = _flip_half(images, -2, generator)
    if augmentation.rotate or augmentation.shift or augmentation.shear or augmentation.zoom:
        images = resample(images, _draw_matrices(images, augmentation, generator))
    return images


def resample(images: Tensor, matrices: Tensor) -> Tensor:
    """Resample each image through an affine map of its own.

    Args:
        images: (B, C, H, W) float32.
        matrices: (B, 2, 3): where, in pixels from the centre (x to the right, y down), the value
            at an output's (x, y, 1) is read in the input. The last column is in parts of the
            image's width and height.
    """
    height, width = images.shape[-2:]
    # From pixels to the coordinates of affine_grid, in which either side is 2 long.
    scale = matrices.new_tensor([[1, height / width, 2], [width / height, 1, 2]])
    grid = functional.affine_grid(matrices * scale, list(images.shape), align_corners=False)
    return functional.grid_sample(
        images, grid, mode="bilinear", padding_mode="border", align_corners=False
    )


def _flip_half(images: Tensor, dim: int, generator: torch.Generator) -> Tensor:
    flipped = _uniform(images, 1, generator)[:, 0] > 0
    return torch.where(flipped[:, None, None, None], images.flip(dim), images)


def _draw_matrices(
    images: Tensor, augmentation: Augmentation, generator: torch.Generator
) -> Tensor:
    """One matrix an image, from output to input: rotation x shear / zoom, and the shift."""
    rotate, shear, zoom, right, down = _uniform(images, 5, generator).unbind(dim=1)
    angle = torch.deg2rad(rotate * augmentation.rotate)
    slope = torch.tan(torch.deg2rad(shear * augmentation.shear))
    cos, sin = torch.cos(angle), torch.sin(angle)
    linear = torch.stack([cos, cos * slope - sin, sin, sin * slope + cos], dim=1)
    linear = linear / (1 + zoom * augmentation.zoom)[:, None]
    shift = torch.stack([right, down], dim=1) * augmentation.shift
    return torch.cat([linear.reshape(-1, 2, 2), shift[:, :, None]], dim=2)


def _uniform(images: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    """(B, columns) uniform in -1..1, on the images' device whichever the generator's is."""
    draws = torch.rand(len(images), columns, generator=generator, device=generator.device)
    return (draws * 2 - 1).to(images)
