"""Random changes of images in training: one exact flip and one resampling for a whole batch.

What was drawn is a `Motion`, by which masks and boxes are moved along.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from common.spec import Augmentation

_LEAST_SEEN = 0.25  # of a box's area: a smaller rest shows too little of the thing


class Motion(NamedTuple):
    """What became of each of B images, in this order; None where nothing was drawn.

    Attributes:
        size: (height, width) of the images.
        mirrored: (B,) whether left and right were exchanged.
        upended: (B,) whether top and bottom were exchanged.
        matrices: (B, 2, 3), as `resample` takes them.
        turned: (B,) whether the slices of a volume were put in reverse order.
    """

    size: tuple[int, int]
    mirrored: Tensor | None = None
    upended: Tensor | None = None
    matrices: Tensor | None = None
    turned: Tensor | None = None


def augment(
    images: Tensor, augmentation: Augmentation, generator: torch.Generator
) -> tuple[Tensor, Motion]:
    """Change each image by its own draw; see `Augmentation` for what is drawn and its units.

    An image is flipped, then sheared, zoomed, rotated about its centre and shifted in a single
    bilinear resampling; beyond its border an image goes on with the pixels of the border. All
    slices of a volume are changed alike, each in its plane, and ``flip_depth`` reverses their
    order. What becomes of an image depends on that image and its own draw alone. ``multiplicity``
    is the caller's: hand in the copies.

    Args:
        images: (B, C, H, W) float32, or volumes (B, C, D, H, W), on any device.
        augmentation: what to change. Where it asks for nothing, `images` itself is returned and
            nothing is drawn.
        generator: the source of randomness, on any device.

    Returns:
        A tensor of the shape, type and device of `images`, and what was drawn.
    """
    height, width = images.shape[-2:]
    motion = Motion((height, width))
    if augmentation.flip_horizontal:
        motion = motion._replace(mirrored=_half(images, generator))
    if augmentation.flip_vertical:
        motion = motion._replace(upended=_half(images, generator))
    if augmentation.rotate or augmentation.shift or augmentation.shear or augmentation.zoom:
        motion = motion._replace(matrices=_draw_matrices(images, augmentation, generator))
    if augmentation.flip_depth:
        motion = motion._replace(turned=_half(images, generator))
    if motion.mirrored is motion.upended is motion.matrices is motion.turned is None:
        return images, motion
    planes = _flipped(_planes(_turned(images, motion)), motion)
    if motion.matrices is not None:
        planes = resample(planes, motion.matrices)
    return planes.view(images.shape), motion


def moved_masks(masks: Tensor, motion: Motion) -> Tensor:
    """Move masks along with their images, by the nearest pixel.

    Beyond its border a mask goes on with class 0, the background: what an image repeats there is
    no second organ.

    Args:
        masks: (B, H, W) class numbers, of whole numbers below 2 ** 24; of volumes (B, D, H, W).
        motion: what became of the images.

    Returns:
        A tensor of the shape and type of `masks`.
    """
    planes = _flipped(_planes(_turned(masks, motion)), motion)
    if motion.matrices is not None:
        planes = resample(planes.float(), motion.matrices, mode="nearest", beyond="zeros")
    return planes.view(masks.shape).to(masks.dtype)


def moved_boxes(boxes: Tensor, motion: Motion) -> Tensor:
    """Move boxes along with their images.

    A box that was turned or sheared becomes the one around the ellipse that it held: things fill
    an ellipse better than the corners of their box, and a box around the corners grows with each
    turn (Kalra et al. 2021, ICCV, "Towards rotation invariance in object detection"). It is cut
    at the image's border; where less than a quarter of it is left, it is taken away.

    Args:
        boxes: (B, most, 5) left, top, right, bottom in parts of the sides, and the class, -1
            where there is none.
        motion: what became of the images.

    Returns:
        A tensor of the shape and type of `boxes`; what was taken away is zeros and class -1.
    """
    corners, numbers = boxes[..., :4], boxes[..., 4:]
    centres, halves = _centred(corners, motion)
    if motion.matrices is not None:
        centres, halves = _through(centres, halves, motion)
    moved = torch.cat([centres - halves, centres + halves], dim=-1)
    cut = moved.clamp(0, 1)
    seen = (cut[..., 2:] - cut[..., :2]).prod(-1, keepdim=True)
    there = (
        (numbers >= 0) & (seen >= _LEAST_SEEN * (4 * halves.prod(-1, keepdim=True))) & (seen > 0)
    )
    nothing = torch.cat([torch.zeros_like(corners), -torch.ones_like(numbers)], dim=-1)
    return torch.where(there, torch.cat([cut, numbers], dim=-1), nothing)


def _centred(corners: Tensor, motion: Motion) -> tuple[Tensor, Tensor]:
    """Centres and half sides of boxes after the flips, (B, most, 2) each, x before y."""
    centres = (corners[..., :2] + corners[..., 2:]) / 2
    halves = (corners[..., 2:] - corners[..., :2]) / 2
    across, down = centres.unbind(-1)
    if motion.mirrored is not None:
        across = torch.where(motion.mirrored[:, None], 1 - across, across)
    if motion.upended is not None:
        down = torch.where(motion.upended[:, None], 1 - down, down)
    return torch.stack([across, down], dim=-1), halves


def _through(centres: Tensor, halves: Tensor, motion: Motion) -> tuple[Tensor, Tensor]:
    """Where an image's matrix, which reads output from input, brings what is in the input."""
    if motion.matrices is None:
        return centres, halves
    height, width = motion.size
    sides = centres.new_tensor([width, height])
    linear, shift = motion.matrices[:, :, :2], motion.matrices[:, :, 2]
    inverse = torch.linalg.inv(linear).transpose(1, 2).to(centres)
    there = (centres - 0.5 - shift[:, None].to(centres)) * sides
    spread = ((halves * sides).square() @ inverse.square()).sqrt()
    return there @ inverse / sides + 0.5, spread / sides


def resample(
    images: Tensor, matrices: Tensor, *, mode: str = "bilinear", beyond: str = "border"
) -> Tensor:
    """Resample each image through an affine map of its own.

    Args:
        images: (B, C, H, W) float32.
        matrices: (B, 2, 3): where, in pixels from the centre (x to the right, y down), the value
            at an output's (x, y, 1) is read in the input. The last column is in parts of the
            image's width and height.
        mode: of `torch.nn.functional.grid_sample`.
        beyond: what lies beyond an image, ``border`` (its own pixels, on and on) or ``zeros``.
    """
    height, width = images.shape[-2:]
    # From pixels to the coordinates of affine_grid, in which either side is 2 long.
    scale = matrices.new_tensor([[1, height / width, 2], [width / height, 1, 2]])
    grid = functional.affine_grid(matrices * scale, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode=mode, padding_mode=beyond, align_corners=False)


def _planes(values: Tensor) -> Tensor:
    """(B, …, H, W) as (B, planes, H, W)."""
    return values.reshape(len(values), -1, *values.shape[-2:])


def _half(images: Tensor, generator: torch.Generator) -> Tensor:
    return _uniform(images, 1, generator)[:, 0] > 0


def _turned(volumes: Tensor, motion: Motion) -> Tensor:
    """(B, …, D, H, W) with the slices in reverse order where `motion` says so."""
    if motion.turned is None:
        return volumes
    chosen = motion.turned.view(-1, *[1] * (volumes.dim() - 1))
    return torch.where(chosen, volumes.flip(-3), volumes)


def _flipped(planes: Tensor, motion: Motion) -> Tensor:
    """(B, C, H, W) with the flips of `motion`."""
    for chosen, dim in ((motion.mirrored, -1), (motion.upended, -2)):
        if chosen is not None:
            planes = torch.where(chosen[:, None, None, None], planes.flip(dim), planes)
    return planes


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
