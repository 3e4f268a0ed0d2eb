"""Segmentation: losses and metrics against MONAI and slow formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from monai.losses.dice import DiceLoss
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from torch import Tensor, nn
from torch.nn import functional

from client.intake.builder import CohortBuilder, ImageRecord
from common.cohort import Cohort, CohortMeta
from common.errors import CohortError, ModelError, SpecError
from common.spec import Augmentation, RunSpec
from common.tasks import task_for
from common.tasks.augment import augment
from common.tasks.exhibits import Chart, Gallery, Table
from common.tasks.segmentation import Segmentation, hausdorff95

CLASSES = ["background", "head", "tail"]
LOSSES = ("cross-entropy", "dice", "dice-cross-entropy", "focal")
Make = Callable[..., Segmentation]


@pytest.fixture
def segmentation(make_spec: Callable[..., RunSpec]) -> Make:
    """The task of a run of three classes; `loss` and `evaluation` change those tables."""

    def make(**changes: Any) -> Segmentation:
        evaluation = {"metric": "dice", "bootstrap": 200} | changes.pop("evaluation", {})
        task = {"name": "segmentation", "classes": changes.pop("classes", CLASSES)}
        spec = make_spec(task=task, evaluation=evaluation, **changes)
        made = task_for(spec)
        assert isinstance(made, Segmentation)
        return made

    return make


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(images: int = 4, classes: int = 3, side: int = 12) -> tuple[Tensor, Tensor]:
    """Logits and masks; the last image has no class but the background."""
    logits = 3 * torch.randn(images, classes, side, side, generator=generator())
    masks = torch.randint(0, classes, (images, side, side), generator=generator())
    masks[-1] = 0
    return logits, masks


# --- Losses ------------------------------------------------------------------------------------


def test_dice_loss_is_that_of_monai_image_by_image(segmentation: Make):
    logits, masks = drawn()
    judge = DiceLoss(
        include_background=False,
        to_onehot_y=True,
        softmax=True,
        reduction="none",
        smooth_nr=1,
        smooth_dr=1,
    )
    expected = judge(logits, masks[:, None]).mean(dim=(1, 2, 3))
    assert torch.allclose(segmentation(loss={"name": "dice"}).losses(logits, masks), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_that_of_torch_averaged_over_the_pixels(segmentation: Make, smoothing):
    logits, masks = drawn()
    task = segmentation(loss={"name": "cross-entropy", "label_smoothing": smoothing})
    expected = functional.cross_entropy(logits, masks, reduction="none", label_smoothing=smoothing)
    assert torch.allclose(task.losses(logits, masks), expected.mean(dim=(1, 2)))


def pixel_by_pixel(
    logits: Tensor, masks: Tensor, gamma: float, weights: list[float]
) -> list[float]:
    """The focal loss, slowly, from the paper's formula."""
    found = []
    for image, mask in zip(logits.double(), masks, strict=True):
        total = 0.0
        for y in range(mask.shape[0]):
            for x in range(mask.shape[1]):
                true = int(mask[y, x])
                p = float(image[:, y, x].softmax(dim=0)[true])
                total -= weights[true] * (1 - p) ** gamma * math.log(p)
        found.append(total / mask.numel())
    return found


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_is_the_formula_of_its_paper(segmentation: Make, gamma):
    logits, masks = drawn(side=6)
    weights = [0.2, 1.0, 3.0]
    task = segmentation(loss={"name": "focal", "focal_gamma": gamma, "class_weights": weights})
    expected = pixel_by_pixel(logits, masks, gamma, weights)
    assert task.losses(logits, masks).tolist() == pytest.approx(expected, rel=1e-4)


def test_the_sum_of_two_losses_is_their_sum(segmentation: Make):
    logits, masks = drawn()
    table = {"class_weights": [0.5, 2.0, 1.0]}
    parts = [
        segmentation(loss={"name": name} | table).losses(logits, masks)
        for name in ("dice", "cross-entropy", "dice-cross-entropy")
    ]
    assert torch.allclose(parts[0] + parts[1], parts[2])


def test_the_weights_of_dice_are_those_of_the_classes_but_the_background(segmentation: Make):
    logits, masks = drawn()
    only_tail = segmentation(loss={"name": "dice", "class_weights": [9.0, 1e-9, 5.0]})
    merged = masks.clone()
    merged[masks == 1] = 0
    before, after = (only_tail.losses(logits, m) for m in (masks, merged))
    assert torch.allclose(before, after)
    assert not torch.allclose(segmentation(loss={"name": "dice"}).losses(logits, masks), before)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_a_function_of_its_own_image_alone(segmentation: Make, name):
    task = segmentation(loss={"name": name, "class_weights": [0.1, 1.0, 20.0]})
    logits, masks = drawn()
    together = task.losses(logits, masks)
    assert together.shape == (len(logits),)
    assert together.dtype == torch.float32
    alone = [task.losses(logits[i : i + 1], masks[i : i + 1]) for i in range(len(logits))]
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)
    spoilt = logits.clone()
    spoilt[0] = float("inf")
    assert torch.equal(task.losses(spoilt, masks)[1:], together[1:])


@pytest.mark.parametrize("name", LOSSES)
def test_a_better_answer_costs_less_and_slopes_are_finite(segmentation: Make, name):
    task = segmentation(loss={"name": name} | ({"focal_gamma": 0.5} if name == "focal" else {}))
    _, masks = drawn()
    right = 20.0 * functional.one_hot(masks, 3).movedim(-1, 1).float()
    for logits, cost in ((right, (0, 0.01)), (-right, (0.5, 100)), (1e4 * right, (0, 0.01))):
        logits.requires_grad_()
        losses = task.losses(logits, masks)
        losses.sum().backward()
        assert ((losses >= cost[0] - 1e-6) & (losses <= cost[1])).all()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("outputs", "masks"),
    [
        ((2, 2, 8, 8), (2, 8, 8)),
        ((2, 3, 8, 8), (2, 8, 9)),
        ((2, 3), (2,)),
        ((2, 3, 8, 8), (3, 8, 8)),
    ],
)
def test_another_shape_is_refused(segmentation: Make, outputs, masks):
    with pytest.raises(ModelError, match="a segmentation of 3 classes met outputs of shape"):
        segmentation(loss={"name": "dice"}).losses(
            torch.zeros(outputs), torch.zeros(masks, dtype=torch.int64)
        )


def test_a_loss_of_another_task_is_refused_with_the_known_ones(segmentation: Make):
    with pytest.raises(SpecError, match="'mse'") as caught:
        segmentation(loss={"name": "mse"})
    assert all(name in str(caught.value) for name in LOSSES)


def test_a_mask_follows_its_image(segmentation: Make):
    masks = torch.from_numpy(labels(8, 5))
    changes = Augmentation(flip_horizontal=True, rotate=90, zoom=0.2)
    images, motion = augment(masks[:, None].float(), changes, generator())
    moved = segmentation(loss={"name": "dice"}).moved(masks, motion)
    inside = (images[:, 0] > 1.9) | ((images[:, 0] > 0.9) & (images[:, 0] < 1.1))
    agree = (moved == images[:, 0].round()) | (moved == 0)  # beyond the border is background
    assert agree[inside].float().mean() > 0.98
    assert not torch.equal(moved, masks)


# --- Metrics -----------------------------------------------------------------------------------


def blobs(count: int, seed: int, side: int = 40) -> np.ndarray:
    """(count, side, side) masks of a few rectangles and a disc each; some are empty."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices((side, side))
    masks = np.zeros((count, side, side), dtype=bool)
    for number in range(count):
        for _ in range(int(rng.integers(0, 3))):
            y, x, r = rng.integers(0, side, 3)
            masks[number] |= (rows - y) ** 2 + (columns - x) ** 2 <= (r / 4) ** 2
            masks[number, y : y + r // 4, x : x + r // 2] = True
    return masks


def test_hausdorff_is_that_of_monai_where_both_masks_are_there():
    found, true = blobs(60, 1), blobs(60, 2)
    both = found.any(axis=(1, 2)) & true.any(axis=(1, 2))
    assert both.sum() > 20
    judge = compute_hausdorff_distance(
        torch.from_numpy(found[both])[:, None],
        torch.from_numpy(true[both])[:, None],
        include_background=True,
        percentile=95,
    )
    ours = [hausdorff95(*pair) for pair in zip(found[both], true[both], strict=True)]
    assert ours == pytest.approx(judge[:, 0].tolist())
    assert np.ptp(ours) > 5


def test_hausdorff_of_an_empty_mask_is_the_diagonal_and_of_two_has_no_meaning():
    nothing, something = np.zeros((30, 40), dtype=bool), np.zeros((30, 40), dtype=bool)
    something[3, 4] = True
    assert math.isnan(hausdorff95(nothing, nothing))
    assert hausdorff95(nothing, something) == hausdorff95(something, nothing) == 50
    assert hausdorff95(something, something) == 0


def logits_of(masks: np.ndarray) -> Tensor:
    return 5 * functional.one_hot(torch.from_numpy(masks).long(), 3).movedim(-1, 1).float()


def labels(count: int, seed: int) -> np.ndarray:
    """(count, 40, 40) of the classes 0, 1, 2."""
    return np.where(blobs(count, seed), 1, np.where(blobs(count, seed + 100), 2, 0))


def one_patient_at_a_time(
    found: np.ndarray, true: np.ndarray, patients: np.ndarray
) -> dict[str, Any]:
    """Every metric in plain loops."""
    by_class: dict[str, list[list[float]]] = {"dice": [], "hausdorff95": [], "volume-error": []}
    for number in (1, 2):
        per: dict[str, list[float]] = {name: [] for name in by_class}
        for patient in sorted(set(patients)):
            mine = patients == patient
            f, t = found[mine] == number, true[mine] == number
            if f.sum() + t.sum():
                per["dice"].append(2 * (f & t).sum() / (f.sum() + t.sum()))
            if t.sum():
                per["volume-error"].append(100 * abs(int(f.sum()) - int(t.sum())) / t.sum())
            distances = [hausdorff95(a, b) for a, b in zip(f, t, strict=True) if a.any() or b.any()]
            if distances:
                per["hausdorff95"].append(float(np.mean(distances)))
        for name, values in per.items():
            by_class[name].append(values)
    return {name: np.mean([np.mean(v) for v in classes]) for name, classes in by_class.items()}


PATIENTS = np.array([7, 7, 7, 2, 2, 9, 9, 9, 9, 4, 4, 4])


def test_metrics_are_those_of_plain_loops_over_patients(segmentation: Make):
    task = segmentation(loss={"name": "dice"})
    found, true = labels(12, 5), labels(12, 6)
    true[0] = found[0]
    # One patient has nothing at all: he counts in no mean.
    found[PATIENTS == 2] = true[PATIENTS == 2] = 0
    evidence = task.measured(logits_of(found), torch.zeros(12, 1, 40, 40), torch.from_numpy(true))
    scores = task.score(evidence, PATIENTS, resamples=300, generator=np.random.default_rng(1))
    expected = one_patient_at_a_time(found, true, PATIENTS)
    assert set(scores) == set(expected) == set(task.spec.task.METRICS)
    for name, estimate in scores.items():
        assert estimate.value == pytest.approx(expected[name], rel=1e-5)
        assert None not in (estimate.low, estimate.high)
        assert estimate.low < estimate.value < estimate.high  # type: ignore[operator]


def test_a_volume_is_judged_whole_and_not_slice_by_slice(segmentation: Make):
    """Two slices of one patient: a large one that is right, and a pixel that is missed."""
    task = segmentation(loss={"name": "dice"}, classes=["none", "lesion"])
    true = np.zeros((2, 40, 40), dtype=np.int64)
    true[0, :30, :30] = true[1, 5, 5] = 1
    found = true.copy()
    found[1] = 0
    outputs = logits_of(found)[:, :2]
    evidence = task.measured(outputs, torch.zeros(2, 1, 40, 40), torch.from_numpy(true))

    def dice(patients: list[int]) -> float | None:
        drawn = np.random.default_rng(1)
        return task.score(evidence, np.array(patients), resamples=0, generator=drawn)["dice"].value

    assert dice([0, 0]) == pytest.approx(1800 / 1801)
    assert dice([0, 1]) == pytest.approx(0.5)


def test_a_network_that_gives_no_numbers_has_no_metrics(segmentation: Make):
    task = segmentation(loss={"name": "dice"})
    outputs = logits_of(labels(2, 5))
    outputs[1, 0, 3, 3] = float("nan")
    true = torch.from_numpy(labels(2, 6))
    evidence = task.measured(outputs, torch.zeros(2, 1, 40, 40), true)
    scores = task.score(evidence, np.array([0, 1]), resamples=5, generator=np.random.default_rng(1))
    assert {estimate.value for estimate in scores.values()} == {None}


# --- What is shown -----------------------------------------------------------------------------


class Answers(nn.Module):
    """A network that answers with what it is shown: brightness 0, 1/2, 1 for the three classes."""

    def forward(self, images: Tensor) -> Tensor:
        return -(images - images.new_tensor([-2.0, 0.0, 2.0]).view(1, 3, 1, 1)).abs()


class Masked:
    """A cohort of masks in memory, as far as an evaluation reads one."""

    def __init__(self, images: np.ndarray, masks: np.ndarray) -> None:
        self._images, self._masks = images.astype(np.float32), masks
        self.shape = self.row_shape = images.shape[1:]

    def __len__(self) -> int:
        return len(self._images)

    def images(self, rows: Any) -> np.ndarray:
        return np.asarray(self._images[rows])

    def targets(self, rows: Any) -> np.ndarray:
        return np.asarray(self._masks[rows])

    def examples(self, rows: Any) -> Any:
        return self.images(rows), self.targets(rows)


def test_what_is_shown_is_what_was_found_and_is_spread_over_the_cohort(segmentation: Make):
    task = segmentation(loss={"name": "dice"}, evaluation={"gallery": 4})
    true = labels(12, 6)
    true[1] = np.where(np.indices((40, 40)).sum(axis=0) < 20, 1, 0)
    cohort: Any = Masked(true[:, None] / 2, true)
    evidence = task.evidence(Answers(), cohort, torch.device("cpu"))
    scores = task.score(evidence, PATIENTS, resamples=0, generator=np.random.default_rng(1))
    assert scores["dice"].value == 1
    assert scores["hausdorff95"].value == 0
    evidence = {**evidence, **task.gallery(Answers(), cohort, torch.device("cpu"))}
    table, chart, gallery = task.exhibits(evidence, PATIENTS)
    assert isinstance(table, Table)
    assert [row[0] for row in table.rows] == CLASSES[1:]
    assert {len(row) for row in table.rows} == {len(table.head)}
    assert isinstance(chart, Chart)
    assert [line.name for line in chart.lines] == CLASSES[1:]
    assert isinstance(gallery, Gallery)
    assert gallery.pictures.shape == (4, 280, 280, 3)
    assert gallery.pictures.dtype == np.uint8
    assert gallery.captions[0].startswith("Image 2: Dice head 1.00")
    assert evidence["gallery_rows"].tolist() == [1, 4, 7, 10]


def test_both_outlines_are_seen_where_they_differ_and_where_they_do_not(segmentation: Make):
    task = segmentation(loss={"name": "dice"}, evaluation={"gallery": 1})
    true = np.zeros((1, 40, 40), dtype=np.int64)
    true[0, 10:20, 10:20] = 1
    shown = np.zeros((1, 1, 40, 40))
    shown[0, 0, 10:20, 12:20] = 0.5
    cohort: Any = Masked(shown, true)
    evidence = task.evidence(Answers(), cohort, torch.device("cpu"))
    evidence = {**evidence, **task.gallery(Answers(), cohort, torch.device("cpu"))}
    *_, gallery = task.exhibits(evidence, np.array([0]))
    assert isinstance(gallery, Gallery)
    (picture,) = gallery.pictures
    blue, orange = ((picture == colour).all(axis=2) for colour in ((86, 180, 233), (230, 159, 0)))
    alone, common = np.s_[70:140, 70], np.s_[70:140, 139]
    assert blue[alone].all()
    assert blue[common].any()
    assert orange[common].any()
    assert orange[75:135, 84].any()
    assert not blue[75:135, 84].any()
    above = (blue | orange)[:68]
    assert above[58:, 70:78].any()  # the number of the class
    assert above.sum() == above[56:, 70:78].sum()


def test_among_what_is_measured_is_no_image(segmentation: Make):
    task = segmentation(loss={"name": "dice"}, evaluation={"gallery": 4})
    true = labels(12, 6)
    cohort: Any = Masked(true[:, None] / 2, true)
    evidence = task.evidence(Answers(), cohort, torch.device("cpu"))
    assert not [name for name in evidence if name.startswith("gallery")]
    assert len(task.exhibits(evidence, PATIENTS)) == 2
    assert max(np.prod(array.shape[1:]) for array in evidence.values()) <= 6


# --- Volumes -------------------------------------------------------------------------------------

VOLUMES = {"depth": 16, "height": 32, "width": 32, "spacing": [2, 1, 0.5], "direction": "axial"}


def test_a_loss_of_a_volume_is_that_of_its_slices_in_one_image(segmentation: Make):
    """Slices side by side are the same voxels."""
    logits, masks = (torch.stack([part, part.flip(0)], dim=-3) for part in drawn())
    flat = logits.transpose(2, 3).flatten(3), masks.transpose(1, 2).flatten(2)
    for name in LOSSES:
        of_volumes = segmentation(loss={"name": name}, input=VOLUMES).losses(logits, masks)
        of_images = segmentation(loss={"name": name}).losses(*flat)
        assert torch.allclose(of_volumes, of_images, atol=1e-6), name


def test_a_distance_in_a_volume_is_that_of_monai_in_millimetres():
    random = np.random.default_rng(2)
    found, true = random.random((2, 6, 9, 8)) < 0.1
    tensors = [torch.from_numpy(mask)[None, None].float() for mask in (found, true)]
    expected = compute_hausdorff_distance(
        tensors[0],
        tensors[1],
        include_background=True,
        percentile=95,
        spacing=[3.0, 1.0, 0.5],
    )
    assert hausdorff95(found, true, (3.0, 1.0, 0.5)) == pytest.approx(float(expected), rel=1e-5)
    empty = np.zeros_like(found)
    assert hausdorff95(found, empty, (3.0, 1.0, 0.5)) == pytest.approx(math.hypot(18, 9, 4))


class Blocks(nn.Module):
    """Says for every voxel that it is of the class that its brightness is, whatever the window."""

    def forward(self, seen: Tensor) -> Tensor:
        kinds = (seen[:, 0] * 2).round().long().clamp(0, 2)
        return functional.one_hot(kinds, 3).movedim(-1, 1).float() * 9


def test_a_volume_is_seen_window_by_window_scored_in_its_units_and_shown_where_most_is(
    segmentation: Make,
):
    seen = VOLUMES | {"patch": [16, 32, 32], "height": 40, "mean": [0.0], "std": [1.0]}
    task = segmentation(loss={"name": "dice"}, input=seen, evaluation={"gallery": 2})
    true = np.zeros((3, 16, 40, 32), dtype=np.int64)
    true[0, 4:6, 5:10, 5:10] = 1
    true[0, 5, 20:30, 5:10] = 2
    true[1, 9, 3:9, 3:9] = 2
    shown = true.copy()
    shown[0, 3, 5:10, 5:10] = 1  # found, and not there: 25 voxels of one microlitre
    cohort: Any = Masked(shown[:, None] / 2, true)

    evidence = dict(task.evidence(Blocks(), cohort, torch.device("cpu")))
    evidence |= task.pictures(Blocks(), cohort, torch.device("cpu"))

    assert evidence["pixels"][:, :, 1].tolist() == [[75, 50], [0, 36], [0, 0]]
    assert evidence["gallery_slices"].tolist() == [5, 8]  # and a middle
    patients = np.arange(3)
    found = task.score(evidence, patients, resamples=0, generator=np.random.default_rng(1))
    # One patient has the first class in a mask, two the second; of others there is no value.
    assert found["volume-difference"].value == pytest.approx((0.025 / 1 + 0 / 2) / 2)
    assert found["hausdorff95"].value == pytest.approx(2.0 / 2)
    table, _, gallery = task.exhibits(evidence, patients)
    assert isinstance(table, Table)
    assert "Hausdorff distance (95 %) (mm)" in table.head
    assert "Volumes missed" in table.head
    assert isinstance(gallery, Gallery)
    assert gallery.captions[0].startswith("Volume 1, slice 6 of 16: Dice head 0.80, tail 1.00")


def test_a_patch_is_a_part_of_its_own_volume_at_any_place(
    segmentation: Make, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
):
    """From a cohort on disk; over many draws every place is met, and the mask is the patch's."""
    seen = VOLUMES | {"patch": [16, 31, 30]}
    task = segmentation(loss={"name": "dice"}, input=seen)
    random = np.random.default_rng(5)
    volumes = random.integers(0, 65536, (3, 1, 16, 32, 32), dtype=np.uint16)
    masks = (volumes[:, 0] % 3).astype(np.uint16)
    meta = CohortMeta.of(task.spec, unit="patient", source="test", created="2026-01-01")
    with CohortBuilder(tmp_path / "c", meta.shape, task=task.spec.task) as builder:
        for number in range(3):
            one, two, three, four = (f"{number}{word}" for word in "abcd")
            record = ImageRecord(one, two, three, four, label=0, height=32, width=32)
            builder.add(record, volumes[number], masks[number])
        builder.finish(meta)
    cohort = Cohort.open(tmp_path / "c")
    cohort.verify()

    rows, opened, planes = np.array([2, 0]), list[int](), cohort._planes

    def count(row: int) -> Any:
        opened.append(row)
        return planes(row)

    monkeypatch.setattr(cohort, "_planes", count)
    images, targets = task.taken(cohort, rows, 40, generator())
    assert opened == [2, 0]  # not once for each part: a sealed volume is opened whole

    assert images.shape == (80, 1, 16, 31, 30)
    places = set()
    for number, (image, target) in enumerate(zip(images, targets, strict=True)):
        whole = volumes[rows[number // 40], 0]
        stored = np.rint(image[0].numpy() * 65535).astype(np.uint16)
        (place,) = [
            (y, x)
            for y in range(2)
            for x in range(3)
            if np.array_equal(whole[:, y : y + 31, x : x + 30], stored)
        ]
        np.testing.assert_array_equal(target.numpy(), stored % 3)
        places.add(place)
    assert len(places) == 6
    assert cohort.present().all()
    with pytest.raises(CohortError, match="expected parts within volumes"):
        cohort.patches(rows, np.array([[0, 2, 0], [0, 0, 0]]), (16, 31, 30))


def test_masks_of_a_volume_move_with_its_slices_each_in_its_plane(segmentation: Make):
    images, masks = torch.rand(3, 1, 5, 20, 20, generator=generator()), torch.zeros(3, 5, 20, 20)
    masks[:, 1, 5:12, 4:9] = 1
    change = Augmentation(rotate=30, zoom=0.2, shift=0.1, flip_horizontal=True, flip_vertical=True)
    moved, motion = augment(images, change, generator())
    with_it = segmentation(loss={"name": "dice"}, input=VOLUMES).moved(masks.long(), motion)
    for number in range(5):
        alone, own = augment(images[:, :, number], change, generator())
        assert torch.allclose(moved[:, :, number], alone, atol=1e-6)
        flat = segmentation(loss={"name": "dice"}).moved(masks[:, number].long(), own)
        assert torch.equal(with_it[:, number], flat)
    assert int(with_it[:, [0, 2, 3, 4]].sum()) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": None}, "spacing is of volumes; write depth as well"),
        ({"spacing": None}, "depth = 16: spacing is missing"),
        ({"direction": None}, "depth = 16: direction is missing"),
        ({"fit": "stretch"}, "a volume is never stretched"),
        ({"frames": "all"}, "a volume is never stretched and has all its frames"),
        ({"patch": [17, 32, 32]}, "patch of 17 x 32 x 32 in a grid of 16 x 32 x 32: it is larger"),
        ({"depth": 4096, "height": 4096}, "voxels; at most"),
    ],
)
def test_a_volume_that_cannot_be_is_refused(segmentation: Make, changes, message):
    with pytest.raises(SpecError, match=message):
        segmentation(loss={"name": "dice"}, input=VOLUMES | changes)


def test_other_tasks_take_no_volumes(make_spec: Callable[..., RunSpec]):
    with pytest.raises(SpecError, match=r"input\.depth = 16: classification takes images"):
        make_spec(input=VOLUMES)


def test_a_run_of_images_keeps_its_digests(make_spec: Callable[..., RunSpec]):
    """Of a spec from before there were volumes, byte for byte."""
    text = make_spec().canonical_json
    assert all(word not in text for word in ("depth", "spacing", "direction", "patch"))
