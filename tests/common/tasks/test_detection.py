"""Detection: the loss against plain loops, metrics against pycocotools and slow formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.errors import ModelError
from common.spec import RunSpec
from common.tasks import task_for
from common.tasks.augment import Motion
from common.tasks.detection import FALSE_POSITIVES, OVERLAPS, Detection, overlaps, radius
from common.tasks.exhibits import Gallery, Table

CLASSES = ["nodule", "mass", "cyst"]
HEIGHT, WIDTH = 32, 48
GRID = (8, 12)
Make = Callable[..., Detection]


@pytest.fixture
def detection(make_spec: Callable[..., RunSpec]) -> Make:
    """The task of a run of three classes on images of 32 x 48."""

    def make(**changes: Any) -> Detection:
        evaluation = {"metric": "map50", "bootstrap": 50} | changes.pop("evaluation", {})
        task = {"name": "detection", "classes": CLASSES, "most_boxes": changes.pop("most", 16)}
        loss = {"name": "heatmap"} | changes.pop("loss", {})
        shape = {"height": HEIGHT, "width": WIDTH}
        made = task_for(make_spec(task=task, evaluation=evaluation, loss=loss, input=shape))
        assert isinstance(made, Detection)
        return made

    return make


def boxes(*rows: tuple[float, ...], most: int = 5) -> Tensor:
    """(1, most, 5): the rows in pixels, padded."""
    found = torch.full((1, most, 5), -1.0)
    for number, (x0, y0, x1, y1, kind) in enumerate(rows):
        found[0, number] = torch.tensor([x0 / WIDTH, y0 / HEIGHT, x1 / WIDTH, y1 / HEIGHT, kind])
    return found


IMAGES = torch.cat(
    [
        boxes((2, 3, 20, 21, 0), (30, 8, 47, 30, 2), (4, 14, 18, 30, 0)),
        boxes(),
        boxes((0, 0, 48, 32, 1)),
        boxes((39, 23, 48, 32, 1), (41, 1, 46, 5, 0)),
    ]
)


def outputs(images: int = len(IMAGES), seed: int = 4) -> Tensor:
    drawn = torch.randn(images, 7, *GRID, generator=torch.Generator().manual_seed(seed))
    drawn[:, :3] -= 1
    return drawn


# --- The loss ------------------------------------------------------------------------------------


def moved_overlap(size: tuple[float, float], r: float, way: str) -> float:
    """The overlap of a box with itself after both corners were moved by r."""
    width, height = size
    if way == "along":
        common = (width - r) * (height - r)
        return common / (2 * width * height - common)
    if way == "inwards":
        return (width - 2 * r) * (height - 2 * r) / (width * height)
    return width * height / ((width + 2 * r) * (height + 2 * r))


@pytest.mark.parametrize("size", [(3.0, 3.0), (10.0, 4.0), (1.0, 20.0), (50.0, 60.0)])
def test_a_centre_moved_by_its_radius_still_overlaps_by_seven_tenths(size):
    r = float(radius(torch.tensor(size)))
    ways = [moved_overlap(size, r, way) for way in ("along", "inwards", "outwards")]
    assert min(ways) == pytest.approx(0.7, abs=1e-4)
    assert r > 0


def slow_loss(maps: Tensor, rows: Tensor, weights: tuple[float, ...]) -> float:
    """CenterNet's loss of one image, from the formulas of its paper, cell by cell."""
    maps, total, count = maps.double(), 0.0, 0
    height, width = GRID
    truth = np.zeros((3, height, width))
    for x0, y0, x1, y1, kind in rows.double().tolist():
        if kind < 0:
            continue
        count += 1
        w, h = (x1 - x0) * WIDTH / 4, (y1 - y0) * HEIGHT / 4
        cx, cy = (x0 + x1) / 2 * WIDTH / 4, (y0 + y1) / 2 * HEIGHT / 4
        column, row = min(int(cx), width - 1), min(int(cy), height - 1)
        sigma = (2 * math.floor(float(radius(torch.tensor([w, h])))) + 1) / 6
        for i in range(height):
            for j in range(width):
                bell = math.exp(-((i - row) ** 2 + (j - column) ** 2) / (2 * sigma**2))
                truth[int(kind), i, j] = max(truth[int(kind), i, j], bell)
        wanted = [w, h, cx - column, cy - row]
        errors = [abs(float(maps[3 + n, row, column]) - v) for n, v in enumerate(wanted)]
        total += 0.1 * (errors[0] + errors[1]) + errors[2] + errors[3]
    for kind in range(3):
        for i in range(height):
            for j in range(width):
                p = 1 / (1 + math.exp(-float(maps[kind, i, j])))
                if truth[kind, i, j] == 1:
                    total -= weights[kind] * (1 - p) ** 2 * math.log(p)
                else:
                    far = (1 - truth[kind, i, j]) ** 4
                    total -= weights[kind] * far * p**2 * math.log(1 - p)
    return total / max(1, count)


@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 7.0)])
def test_the_loss_is_the_formula_of_its_paper_image_by_image(detection: Make, weights):
    task = detection(loss={"class_weights": weights and list(weights)})
    maps = outputs()
    expected = [
        slow_loss(image, rows, weights or (1.0, 1.0, 1.0))
        for image, rows in zip(maps, IMAGES, strict=True)
    ]
    losses = task.losses(maps, IMAGES)
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx(expected, rel=1e-4)


def test_a_loss_is_a_function_of_its_own_image_alone(detection: Make):
    task, maps = detection(), outputs()
    together = task.losses(maps, IMAGES)
    alone = [task.losses(maps[i : i + 1], IMAGES[i : i + 1]) for i in range(len(IMAGES))]
    assert torch.allclose(together, torch.cat(alone), rtol=1e-6)
    spoilt, others = maps.clone(), IMAGES.clone()
    spoilt[0], others[0] = float("nan"), boxes((1, 1, 9, 9, 2))[0]
    assert torch.equal(task.losses(spoilt, others)[1:], together[1:])


def test_the_order_of_the_boxes_does_not_matter(detection: Make):
    task, maps = detection(), outputs()
    assert torch.allclose(task.losses(maps, IMAGES.flip(1)), task.losses(maps, IMAGES))


def test_slopes_are_finite_whatever_the_network_gives(detection: Make):
    for factor in (1.0, 1e4):
        maps = (outputs() * factor).requires_grad_()
        detection().losses(maps, IMAGES).sum().backward()
        assert maps.grad is not None
        assert maps.grad.isfinite().all()
        assert maps.grad[1, :3].abs().sum() > 0  # nothing is there, and that is learned too
        assert not maps.grad[1, 3:].any()


@pytest.mark.parametrize(
    ("maps", "rows"),
    [((2, 6, 8, 12), (2, 5, 5)), ((2, 7, 8, 11), (2, 5, 5)), ((2, 7, 8, 12), (2, 5, 4))],
)
def test_another_shape_is_refused(detection: Make, maps, rows):
    with pytest.raises(ModelError, match="a detection met outputs of shape"):
        detection().losses(torch.zeros(maps), torch.zeros(rows))


def test_a_box_follows_its_image(detection: Make):
    mirrored = Motion((HEIGHT, WIDTH), mirrored=torch.tensor([True, True, False, True]))
    moved = detection().moved(IMAGES, mirrored)
    assert moved[0, 0].tolist() == pytest.approx([28 / 48, 3 / 32, 46 / 48, 21 / 32, 0])
    assert torch.equal(moved[2, 0], IMAGES[2, 0])
    assert (moved[1, :, 4] == -1).all()


# --- From maps to boxes --------------------------------------------------------------------------


def perfect(rows: Tensor) -> Tensor:
    """The maps of a network that knows the answer; its certainty is 0.95."""
    maps = torch.full((len(rows), 7, *GRID), -9.0)
    maps[:, 3:] = 0
    for image, row in ((i, r) for i, each in enumerate(rows) for r in each if r[4] >= 0):
        x0, y0, x1, y1, kind = row.tolist()
        cx, cy = (x0 + x1) / 2 * GRID[1], (y0 + y1) / 2 * GRID[0]
        column, line = int(cx), int(cy)
        maps[image, int(kind), line, column] = math.log(0.95 / 0.05)
        maps[image, 3:, line, column] = torch.tensor(
            [(x1 - x0) * GRID[1], (y1 - y0) * GRID[0], cx - column, cy - line]
        )
    return maps


def test_a_network_that_knows_is_read_rightly_and_costs_next_to_nothing(detection: Make):
    task = detection()
    found = task.found(perfect(IMAGES))
    assert found.shape == (len(IMAGES), 16, 6)
    for rows, true in zip(found, IMAGES, strict=True):
        sure = rows[rows[:, 5] > 0.5]
        assert len(sure) == int((true[:, 4] >= 0).sum())
        for x in true[true[:, 4] >= 0]:
            assert (sure[:, :5] - x).abs().amax(dim=1).min() < 1e-5
    assert (task.losses(perfect(IMAGES), IMAGES) < 0.01).all()
    assert (task.losses(perfect(IMAGES.flip(0)), IMAGES) > 0.5).all()


def test_only_the_peak_of_nine_cells_is_a_centre_and_boxes_stay_in_the_image(detection: Make):
    maps = torch.full((1, 7, *GRID), -9.0)
    maps[0, 3:] = 0
    maps[0, 1, 3, 3], maps[0, 1, 3, 4], maps[0, 1, 4, 4], maps[0, 0, 3, 4] = 1.0, 2.0, 1.5, 0.5
    maps[0, 1, 0, 11] = 3.0
    maps[0, 3:5, 0, 11] = 9.0
    maps[0, 3, 3, 4] = -5.0
    found = detection().found(maps)[0]
    sure = found[found[:, 5] > 0.1]
    assert [(int(kind), round(p, 3)) for kind, p in sure[:, 4:].tolist()] == [
        (1, 0.953),
        (1, 0.881),
        (0, 0.622),
    ]
    assert sure[0, :4].tolist() == pytest.approx([6.5 / 12, 0, 1, 4.5 / 8])
    assert sure[1, 0] == sure[1, 2]
    assert (found[:, :4] >= 0).all()
    assert (found[:, :4] <= 1).all()


# --- Metrics -------------------------------------------------------------------------------------


def example() -> tuple[np.ndarray, np.ndarray]:
    """Found and true boxes of twelve images, drawn; some are right, some double, some wrong."""
    rng = np.random.default_rng(20)
    true = np.full((12, 9, 5), -1.0, dtype=np.float32)
    found = np.full((12, 16, 6), -1.0, dtype=np.float32)
    for i in range(12):
        n = int(rng.integers(0, 9))
        low = rng.random((n, 2)) * 0.7
        size = 0.05 + rng.random((n, 2)) * 0.25
        true[i, :n] = np.concatenate([low, low + size, rng.integers(0, 3, (n, 1))], axis=1)
        m = int(rng.integers(0, 7))
        source = true[i, :n][rng.integers(0, max(n, 1), n)]
        near = np.clip(source[:, :4] + rng.normal(0, 0.015, (n, 4)), 0, 1)
        low = rng.random((m, 2)) * 0.7
        wrong = [low, low + 0.05 + rng.random((m, 2)) * 0.25, rng.integers(0, 3, (m, 1))]
        rows = [np.concatenate([near, source[:, 4:]], axis=1), np.concatenate(wrong, axis=1)]
        found[i, : n + m, :5] = np.concatenate(rows)
        found[i, : n + m, 5] = rng.random(n + m)
    return found, true


PATIENTS = np.array([0, 0, 0, 1, 1, 2, 3, 3, 4, 5, 5, 6])


def evidence_of(found: np.ndarray, true: np.ndarray) -> dict[str, np.ndarray]:
    return {"found": found, "true": true, "finite": np.ones(len(found), dtype=bool)}


def scores(task: Detection, found: np.ndarray, true: np.ndarray, **how: Any) -> dict[str, Any]:
    patients = how.pop("patients", np.arange(len(found)))
    drawn = np.random.default_rng(1)
    resamples = how.pop("resamples", 0)
    made = task.score(evidence_of(found, true), patients, resamples=resamples, generator=drawn)
    return dict(made)


def test_average_precision_is_that_of_pycocotools(detection: Make):
    """The figures are `COCOeval`'s of pycocotools 2.0 on these boxes, as of a 1000 x 1000 image."""
    made = scores(detection(), *example())
    assert made["map"].value == pytest.approx(0.15478148532655484, abs=1e-9)
    assert made["map50"].value == pytest.approx(0.3529479006856034, abs=1e-9)


def slow_overlap(a: Any, b: Any) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    common = float(width * height)
    areas = [float((box[2] - box[0]) * (box[3] - box[1])) for box in (a, b)]
    return common / (sum(areas) - common)


def decided(
    found: np.ndarray, true: np.ndarray, kind: int, least: float
) -> list[tuple[float, bool]]:
    """(certainty, whether it is right) of every found box of a class, the most certain first."""
    rows = []
    for seen, there in zip(found.astype(float), true.astype(float), strict=True):
        free = [list(t) for t in there if t[4] == kind]
        for box in sorted((list(s) for s in seen if s[4] == kind), key=lambda s: -s[5]):
            best = max(free, key=lambda t: slow_overlap(box, t), default=None)
            if best is not None and slow_overlap(box, best) >= least:
                free.remove(best)
                rows.append((box[5], True))
            else:
                rows.append((box[5], False))
    return sorted(rows, key=lambda row: -row[0])


def slow_precision(found: np.ndarray, true: np.ndarray, kind: int, least: float) -> float:
    things = int((true[..., 4] == kind).sum())
    rows = decided(found, true, kind, least)
    points = [
        (sum(r for _, r in rows[:n]) / things, sum(r for _, r in rows[:n]) / n)
        for n in range(1, len(rows) + 1)
    ]
    reached = [max((p for r, p in points if r >= level), default=0.0) for level in RECALLS]
    return float(np.mean(reached))


RECALLS = np.linspace(0, 1, 101)


def slow_froc(found: np.ndarray, true: np.ndarray, kind: int) -> float:
    things, rows = int((true[..., 4] == kind).sum()), decided(found, true, kind, 0.5)
    best = []
    for allowed in FALSE_POSITIVES:
        reached = [
            sum(r for _, r in rows[:n]) / things
            for n in range(len(rows) + 1)
            if sum(not r for _, r in rows[:n]) <= allowed * len(true)
        ]
        best.append(max(reached))
    return float(np.mean(best))


def test_metrics_are_those_of_slow_formulas(detection: Make):
    found, true = example()
    made = scores(detection(), found, true)
    kinds = range(3)
    by_overlap = [np.mean([slow_precision(found, true, k, t) for k in kinds]) for t in OVERLAPS]
    assert made["map50"].value == pytest.approx(by_overlap[0])
    assert made["map"].value == pytest.approx(np.mean(by_overlap))
    assert made["froc"].value == pytest.approx(np.mean([slow_froc(found, true, k) for k in kinds]))
    assert 0.1 < made["map"].value < made["map50"].value < 0.9


def test_overlap_is_intersection_over_union():
    found, true = example()
    some, others = found[0][found[0, :, 4] >= 0], true[0][true[0, :, 4] >= 0]
    expected = [[slow_overlap(a, b) for b in others] for a in some]
    assert overlaps(some[:, :4], others[:, :4]) == pytest.approx(np.array(expected), abs=1e-6)


def test_an_interval_is_that_of_resampled_patients(detection: Make):
    """Against images that are really drawn again, patient by patient."""
    found, true = example()
    task, rng = detection(), np.random.default_rng(8)
    estimate = scores(task, found, true, patients=PATIENTS, resamples=400)["map50"]
    drawn = []
    for _ in range(200):
        people = rng.integers(0, 7, 7)
        rows = np.concatenate([np.flatnonzero(person == PATIENTS) for person in people])
        drawn.append(scores(task, found[rows], true[rows])["map50"].value)
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=0.05)
    assert estimate.high - estimate.low > 0.1


def test_who_finds_everything_has_one_and_who_finds_nothing_zero(detection: Make):
    _, true = example()
    right = np.concatenate([true, np.where(true[..., 4:] >= 0, 0.9, -1)], axis=2)
    assert {e.value for e in scores(detection(), right, true).values()} == {1.0}
    nothing = np.full_like(right, -1)
    assert {e.value for e in scores(detection(), nothing, true).values()} == {0.0}


def test_a_class_that_is_nowhere_counts_in_no_mean(detection: Make):
    found, true = example()
    seen, there = found.copy(), true.copy()
    there[there[..., 4] == 2, 4] = -1
    kept = np.mean([slow_precision(seen, there, kind, 0.5) for kind in (0, 1)])
    assert scores(detection(), seen, there)["map50"].value == pytest.approx(kept)
    there[:] = -1
    assert {e.value for e in scores(detection(), seen, there).values()} == {None}


def test_a_network_that_gives_no_numbers_has_no_metrics(detection: Make):
    task, maps = detection(), perfect(IMAGES)
    maps[2, 0, 0, 0] = float("nan")
    kept = task.measured(maps, torch.zeros(4, 1, HEIGHT, WIDTH), IMAGES)
    drawn = np.random.default_rng(1)
    made = task.score(kept, np.arange(4), resamples=5, generator=drawn)
    assert {estimate.value for estimate in made.values()} == {None}


# --- What is shown -------------------------------------------------------------------------------


class Knows(nn.Module):
    """A network that gives the perfect maps of the images, which carry their own number."""

    def forward(self, images: Tensor) -> Tensor:
        return perfect(IMAGES)[: len(images)]


class Boxed:
    """A cohort of boxes in memory, as far as an evaluation reads one."""

    shape = row_shape = (1, HEIGHT, WIDTH)

    def __len__(self) -> int:
        return len(IMAGES)

    def images(self, rows: Any) -> np.ndarray:
        return np.zeros((len(rows), *self.shape), dtype=np.float32)

    def targets(self, rows: Any) -> np.ndarray:
        return np.asarray(IMAGES.numpy()[rows])

    def examples(self, rows: Any) -> Any:
        return self.images(rows), self.targets(rows)


def test_what_is_shown_is_where_the_boxes_are(detection: Make):
    task = detection(evaluation={"gallery": 4})
    cohort: Any = Boxed()
    kept = task.evidence(Knows(), cohort, torch.device("cpu"))
    assert task.score(kept, np.arange(4), resamples=0, generator=np.random.default_rng(1))[
        "map"
    ].value == pytest.approx(1.0)
    kept = {**kept, **task.gallery(Knows(), cohort, torch.device("cpu"))}
    by_class, sensitivities, *charts, gallery = task.exhibits(kept, np.arange(4))
    assert isinstance(by_class, Table)
    assert isinstance(sensitivities, Table)
    assert [row[0] for row in by_class.rows] == list(sensitivities.head[1:]) == CLASSES
    assert [row[0] for row in sensitivities.rows] == ["0.125", "0.25", "0.5", "1", "2", "4", "8"]
    for table in (by_class, sensitivities):
        assert {len(row) for row in table.rows} == {len(table.head)}
    assert [chart.title for chart in charts] == ["FROC", "Precision and recall"]
    assert isinstance(gallery, Gallery)
    assert gallery.captions[1] == "Image 2: nothing to find, nothing found"
    assert gallery.captions[3] == "Image 4: nodule 1 of 1, 0 false; mass 1 of 1, 0 false"
    times = 6
    assert gallery.pictures.shape == (4, HEIGHT * times, WIDTH * times, 3)
    drawn = np.asarray(gallery.pictures.max(axis=3) > 0)
    assert not drawn[1].any()
    assert drawn[0, 3 * times, 2 * times : 20 * times].all()
    assert drawn[0, 21 * times - 1, 2 * times : 20 * times].all()
    above = drawn[0, : 3 * times - 1]
    assert above[:, 2 * times : 3 * times + 2].any()  # the number of the box's class
    assert above.sum() == above[-12:, 2 * times : 3 * times + 2].sum()


def test_among_what_is_measured_is_no_image(detection: Make):
    cohort: Any = Boxed()
    kept = detection(evaluation={"gallery": 4}).evidence(Knows(), cohort, torch.device("cpu"))
    assert set(kept) == {"found", "true", "finite"}
