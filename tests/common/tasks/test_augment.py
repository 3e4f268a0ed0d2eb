"""Augmentation, against SciPy one image at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import SpecError
from common.spec import Augmentation
from common.tasks import augment as room
from common.tasks.augment import Motion, moved_boxes, moved_masks, resample

ndimage = pytest.importorskip("scipy.ndimage")

EVERYTHING = Augmentation(
    rotate=20, shift=0.1, shear=10, zoom=0.2, flip_horizontal=True, flip_vertical=True
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def augment(images: Tensor, augmentation: Augmentation, source: torch.Generator) -> Tensor:
    """The images alone."""
    return room.augment(images, augmentation, source)[0]


def pictures(count: int, height: int = 24, width: int = 36) -> Tensor:
    """Smooth pictures of two channels, without symmetry."""
    noise = torch.rand(count, 2, height, width, generator=generator(5)).numpy()
    return torch.from_numpy(ndimage.gaussian_filter(noise, (0, 0, 2, 2))).float()


def slow_resample(image: Tensor, matrix: NDArray[np.float64], shift: tuple[float, float]) -> Tensor:
    """SciPy reads output (row, column) at matrix @ (row, column) + offset."""
    height, width = image.shape[-2:]
    centre = np.array([(height - 1) / 2, (width - 1) / 2])
    rows_first = matrix[::-1, ::-1]
    offset = centre - rows_first @ centre + np.array([shift[1] * height, shift[0] * width])
    planes = [
        ndimage.affine_transform(plane, rows_first, offset, order=1, mode="nearest")
        for plane in image.double().numpy()
    ]
    return torch.from_numpy(np.stack(planes)).float()


def turn(degrees: float) -> NDArray[np.float64]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[cos, -sin], [sin, cos]])


MAPS = [
    (turn(0), (0.0, 0.0)),
    (turn(10), (0.0, 0.0)),
    (turn(-33), (0.0, 0.0)),
    (turn(180), (0.0, 0.0)),
    (turn(0), (0.25, 0.0)),
    (turn(0), (0.0, -0.125)),
    (np.array([[1.0, 0.3], [0.0, 1.0]]), (0.0, 0.0)),
    (turn(0) / 1.2, (0.0, 0.0)),
    (turn(17) @ np.array([[1.0, 0.2], [0.0, 1.0]]) / 0.8, (0.1, 0.05)),
]


def test_resampling_agrees_with_scipy_for_a_batch_of_different_maps():
    images = pictures(len(MAPS))
    matrices = torch.stack(
        [torch.tensor(np.column_stack([linear, shift])).float() for linear, shift in MAPS]
    )
    expected = [slow_resample(i, linear, s) for i, (linear, s) in zip(images, MAPS, strict=True)]
    result = resample(images, matrices)
    torch.testing.assert_close(result, torch.stack(expected), rtol=0, atol=2e-5)
    assert not torch.allclose(result[1], torch.stack(expected)[2], atol=1e-2)


def test_nothing_asked_gives_the_images_themselves_and_draws_nothing():
    images, source = pictures(3), generator()
    before = source.get_state()
    assert augment(images, Augmentation(multiplicity=4), source) is images
    assert torch.equal(source.get_state(), before)


@pytest.mark.parametrize(("key", "dim"), [("flip_horizontal", -1), ("flip_vertical", -2)])
def test_flips_are_exact_and_fall_on_about_half(key, dim):
    images = pictures(400, 6, 5)
    result = augment(images, Augmentation(**{key: True}), generator())
    flipped = (result == images.flip(dim)).flatten(1).all(dim=1)
    kept = (result == images).flatten(1).all(dim=1)
    assert (flipped ^ kept).all()
    assert 150 < flipped.sum() < 250


@pytest.mark.parametrize(
    "asked",
    [{"rotate": 30.0}, {"shift": 0.2}, {"shear": 20.0}, {"zoom": 0.3}],
    ids=lambda asked: next(iter(asked)),
)
def test_each_kind_of_change_stays_within_what_was_asked(asked):
    """A bright dot right of the centre goes only where the asked range lets it."""
    side, radius, count = 65, 16, 300
    images = torch.zeros(count, 1, side, side)
    images[:, :, 32 - 1 : 32 + 2, 32 + radius - 1 : 32 + radius + 2] = 1
    result = augment(images, Augmentation(**asked), generator())[:, 0]
    steps = torch.arange(side, dtype=torch.float32) - 32
    mass = result.sum(dim=(1, 2))
    x = (result.sum(dim=1) * steps).sum(dim=1) / mass
    y = (result.sum(dim=2) * steps).sum(dim=1) / mass
    if "rotate" in asked:
        angle = torch.rad2deg(torch.atan2(y, x))
        assert 25 < angle.max() < 30.5
        assert -30.5 < angle.min() < -25
        torch.testing.assert_close(x.hypot(y), torch.full((count,), 16.0), rtol=0, atol=0.1)
    elif "shift" in asked:
        for moved in (x - radius, y):
            assert 11 < moved.max() < 13.1
            assert -13.1 < moved.min() < -11
    elif "shear" in asked:
        torch.testing.assert_close(x, torch.full((count,), 16.0), rtol=0, atol=0.1)
        torch.testing.assert_close(y, torch.zeros(count), rtol=0, atol=0.1)
    else:
        assert 20 < x.max() < 16 * 1.3 + 0.1
        assert 16 * 0.7 - 0.1 < x.min() < 12


def test_shear_slants_a_vertical_line():
    images = torch.zeros(200, 1, 65, 65)
    images[:, :, :, 31:34] = 1
    result = augment(images, Augmentation(shear=20.0), generator())[:, 0]
    steps = torch.arange(65, dtype=torch.float32) - 32
    moved = (result[:, 16] * steps).sum(dim=1) / result[:, 16].sum(dim=1)
    most = 16 * math.tan(math.radians(20))
    assert most - 1 < moved.max() < most + 0.1
    assert -most - 0.1 < moved.min() < 1 - most


def test_beyond_the_border_the_border_goes_on():
    constant = torch.full((20, 1, 16, 16), 0.7)
    result = augment(constant, EVERYTHING, generator())
    torch.testing.assert_close(result, constant)


def test_each_image_has_its_own_draw_and_the_generator_decides():
    images = pictures(1).expand(6, -1, -1, -1)
    first = augment(images, EVERYTHING, generator(1))
    assert torch.equal(first, augment(images, EVERYTHING, generator(1)))
    assert not torch.allclose(first, augment(images, EVERYTHING, generator(2)), atol=1e-3)
    for i in range(1, 6):
        assert not torch.allclose(first[0], first[i], atol=1e-3)
    assert first.shape == images.shape
    assert first.dtype == torch.float32


def test_what_becomes_of_an_image_does_not_depend_on_the_others():
    images = pictures(4)
    others = pictures(4) * 1000
    others[1] = images[1]
    mine = augment(images, EVERYTHING, generator())[1]
    assert torch.equal(mine, augment(others, EVERYTHING, generator())[1])


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    augment(pictures(2), EVERYTHING, generator())
    assert torch.equal(torch.get_rng_state(), state)


# --- What moves along ---------------------------------------------------------------------------


def test_what_was_drawn_is_told_and_nothing_else():
    nothing = room.augment(pictures(3), Augmentation(), generator())[1]
    assert nothing == Motion((24, 36), None, None, None, None)
    images, motion = room.augment(pictures(3), Augmentation(rotate=9), generator())
    assert motion.matrices is not None
    torch.testing.assert_close(images, resample(pictures(3), motion.matrices))


def slow_mask(mask: Tensor, matrix: Tensor) -> Tensor:
    """SciPy's nearest pixel; beyond the border is class 0."""
    height, width = mask.shape
    linear, shift = matrix[:, :2].double().numpy(), matrix[:, 2].double().numpy()
    centre = np.array([(height - 1) / 2, (width - 1) / 2])
    rows_first = linear[::-1, ::-1]
    offset = centre - rows_first @ centre + shift[::-1] * np.array([height, width])
    moved = ndimage.affine_transform(
        mask.numpy(), rows_first, offset, order=0, mode="grid-constant", cval=0
    )
    return torch.from_numpy(moved)


@pytest.mark.parametrize(
    "asked",
    [
        {"flip_horizontal": True},
        {"flip_vertical": True},
        {"rotate": 40.0},
        {"shift": 0.3},
        {"shear": 20.0},
        {"zoom": 0.4},
        EVERYTHING.model_dump(),
    ],
    ids=lambda asked: next(iter(asked)) if len(asked) == 1 else "everything",
)
def test_a_mask_moves_as_its_image_does(asked):
    masks = (pictures(20)[:, 0] * 8).long()
    _, motion = room.augment(pictures(20), Augmentation(**asked), generator(3))
    moved = moved_masks(masks, motion)
    assert moved.dtype == masks.dtype
    for row, (mask, result) in enumerate(zip(masks, moved, strict=True)):
        slow = mask
        if motion.mirrored is not None and motion.mirrored[row]:
            slow = slow.flip(1)
        if motion.upended is not None and motion.upended[row]:
            slow = slow.flip(0)
        if motion.matrices is not None:
            slow = slow_mask(slow, motion.matrices[row])
        assert (slow == result).float().mean() > 0.995  # a tie between two pixels is rare
    assert not torch.equal(moved, masks)


def test_a_mask_has_no_class_that_it_had_not_and_background_beyond_its_border():
    masks = torch.full((50, 24, 36), 7)
    masks[:, :, 18:] = 3
    _, motion = room.augment(pictures(50), EVERYTHING, generator())
    assert moved_masks(masks, motion).unique().tolist() == [0, 3, 7]
    assert room.augment(torch.full((2, 1, 24, 36), 0.7), EVERYTHING, generator())[0].min() > 0.69


def ellipse(box: Tensor, height: int, width: int) -> Tensor:
    """(H, W) 1 within the ellipse that a box holds."""
    left, top, right, bottom = box[:4].tolist()
    x = (torch.arange(width) + 0.5) / width
    y = (torch.arange(height) + 0.5) / height
    across = (x - (left + right) / 2) / ((right - left) / 2)
    down = (y - (top + bottom) / 2) / ((bottom - top) / 2)
    within: Tensor = down.square()[:, None] + across.square() <= 1
    return within.float()


def around(picture: Tensor) -> list[float]:
    """The box around what is bright, in parts of the sides."""
    rows, columns = (picture > 0.5).nonzero().T
    height, width = picture.shape
    return [
        columns.min().item() / width,
        rows.min().item() / height,
        (columns.max().item() + 1) / width,
        (rows.max().item() + 1) / height,
    ]


@pytest.mark.parametrize(
    "asked",
    [
        {"flip_horizontal": True},
        {"flip_vertical": True},
        {"rotate": 60.0},
        {"shift": 0.2},
        {"shear": 30.0},
        {"zoom": 0.3},
        {"rotate": 50.0, "shift": 0.1, "shear": 20.0, "zoom": 0.2, "flip_vertical": True},
    ],
    ids="+".join,
)
def test_a_box_moves_with_the_ellipse_that_it_holds(asked):
    height, width = 200, 320
    box = torch.tensor([0.35, 0.40, 0.55, 0.65, 2.0])
    pictured = ellipse(box, height, width).expand(8, 1, -1, -1)
    moved, motion = room.augment(pictured, Augmentation(**asked), generator(1))
    found = moved_boxes(box.expand(8, 1, 5), motion)
    for picture, after in zip(moved[:, 0], found[:, 0], strict=True):
        assert after[4] == 2
        np.testing.assert_allclose(after[:4], around(picture), atol=1.5 / height)
    assert not torch.allclose(found[:, 0, :4], box[:4].expand(8, 4), atol=0.01)


def test_a_quarter_turn_of_a_box_is_exact_though_an_image_is_not_square():
    matrices = torch.tensor(np.column_stack([turn(90), (0.0, 0.0)])).float()[None]
    boxes = torch.tensor([[[0.45, 0.5, 0.55, 0.6, 0.0]]])  # 20 x 10 pixels, right below the centre
    found = moved_boxes(boxes, Motion((100, 200), matrices=matrices))
    expected = [0.5, 0.4, 0.55, 0.6]  # 10 x 20 pixels, to the right of the centre
    np.testing.assert_allclose(found[0, 0, :4], expected, atol=1e-6)


def test_what_leaves_the_image_is_cut_and_taken_away_where_little_is_left():
    to_the_left = torch.tensor([[[1.0, 0, 0.5], [0, 1, 0]]])
    boxes = torch.tensor(
        [
            [
                [0.4, 0.0, 0.8, 0.2, 1],  # three quarters stay
                [0.19, 0.0, 0.6, 0.2, 1],  # a little less than a quarter stays
                [0.22, 0.0, 0.6, 0.2, 1],  # a little more
                [0.1, 0.0, 0.4, 0.2, 1],  # nothing stays
                [0.9, 0.9, 1.0, 1.0, 0],  # all of it stays
                [0.0, 0.0, 0.0, 0.0, -1],  # there was none
            ]
        ]
    )
    expected = torch.tensor(
        [
            [0.0, 0.0, 0.3, 0.2, 1],
            [0.0, 0.0, 0.0, 0.0, -1],
            [0.0, 0.0, 0.1, 0.2, 1],
            [0.0, 0.0, 0.0, 0.0, -1],
            [0.4, 0.9, 0.5, 1.0, 0],
            [0.0, 0.0, 0.0, 0.0, -1],
        ]
    )
    found = moved_boxes(boxes, Motion((50, 40), matrices=to_the_left))[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_boxes_of_a_still_image_are_as_they_were():
    boxes = torch.tensor([[[0.1, 0.2, 0.3, 0.5, 1.0], [0.0, 0.0, 0.0, 0.0, -1.0]]])
    torch.testing.assert_close(moved_boxes(boxes, Motion((20, 30))), boxes)
    none = torch.zeros(3, 0, 5)
    _, motion = room.augment(pictures(3), EVERYTHING, generator())
    assert moved_boxes(none, motion).shape == (3, 0, 5)


def test_the_slices_of_about_half_of_the_volumes_are_reversed_with_their_masks():
    volumes = torch.rand(400, 2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    masks = (volumes[:, 0] * 3).long()
    change = Augmentation(flip_depth=True)
    found, motion = room.augment(volumes, change, torch.Generator().manual_seed(2))
    reversed_ones = (found == volumes.flip(2)).flatten(1).all(dim=1)
    kept = (found == volumes).flatten(1).all(dim=1)
    assert (reversed_ones ^ kept).all()
    assert 150 < reversed_ones.sum() < 250
    expected = torch.where(reversed_ones[:, None, None, None], masks.flip(1), masks)
    torch.testing.assert_close(moved_masks(masks, motion), expected)


def test_flip_depth_is_of_volumes_and_leaves_older_digests(make_spec: Any):
    assert "flip_depth" not in make_spec().canonical_json
    with pytest.raises(SpecError, match=r"augmentation\.flip_depth = True: an image has no depth"):
        make_spec(augmentation={"flip_depth": True})
