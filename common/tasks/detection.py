"""Detection: where things are, each in a box with a class.

The detector has no anchors (CenterNet, Zhou et al. 2019, arXiv:1904.07850): a network gives, for
every cell of a grid of a quarter of the image, the logit that a thing of each class has its
centre there, its width and height, and the offset of its centre from the cell's corner.

=======  ========================================================================================
map50    mean over the classes of the average precision at an overlap (IoU) of at least 0.5
map      the same, and mean over the overlaps 0.5, 0.55, … 0.95
froc     mean over the classes of the sensitivity, at an overlap of at least 0.5, where 1/8, 1/4,
         1/2, 1, 2, 4 and 8 false positives an image are allowed, averaged over these seven
=======  ========================================================================================

Average precision is COCO's: precision made to fall with recall, read at the 101 recalls 0, 0.01,
… 1. In an image, the most certain box of a class takes the thing that it overlaps most, the next
one what is left; what takes nothing is a false positive. A class without a true box has no value
and is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from common.cohort import Cohort
from common.errors import ModelError
from common.models.centernet import GEOMETRY, STRIDE
from common.task_sections import Detection as Section
from common.tasks import pictures, words
from common.tasks.answers import Answer
from common.tasks.augment import Motion, moved_boxes
from common.tasks.estimates import Estimate, Floats, estimates, ratio
from common.tasks.exhibits import Chart, Exhibit, Gallery, Line, Table
from common.tasks.metrics import Ranking, ranking
from common.tasks.task import Evidence, Task

OVERLAPS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
FALSE_POSITIVES = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)

_LEAST_OVERLAP = 0.7  # of a box whose corners are moved by a centre's radius, as in CenterNet
_SIZE_WEIGHT = 0.1
_EVERYWHERE = 1e-6  # below it a centre's bell is nothing

Boxes = NDArray[np.float32]


class Detection(Task):
    """Losses, metrics and pictures of a detection.

    An image's loss is CenterNet's: the focal loss of the maps of centres over the number of the
    image's boxes, a bell around each centre being punished less, and the absolute errors of
    offset and, with a weight of 0.1, of size, each averaged over the boxes. An image without a
    box is divided by one. ``loss.class_weights`` weigh the maps of centres. No sum runs over more
    than one image (docs/privacy.md 2).
    """

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One loss an image.

        Args:
            outputs: (B, classes + 4, ceil(H / 4), ceil(W / 4)).
            targets: (B, boxes, 5): x0, y0, x1, y1 in parts of the sides, and the class; -1 where
                there is no box.

        Returns:
            (B,) float32.

        Raises:
            ModelError: if a shape is another.
        """
        self._check_shapes(outputs, targets)
        outputs, classes = outputs.float(), len(self.spec.task.classes)
        # Columns in which no image has a box add nothing to any.
        targets = targets[:, (targets[..., 4] >= 0).any(dim=0)]
        boxes = _in_cells(targets, self.spec.input.sides, outputs.shape[-2:])
        count = boxes.there.sum(dim=1).clamp_min(1)
        centres = self._centres(outputs[:, :classes], boxes) / count
        found = (
            outputs[:, classes:].flatten(2).gather(2, boxes.cell[:, None].expand(-1, GEOMETRY, -1))
        )
        errors = (found - boxes.geometry).abs() * boxes.there[:, None]
        size, offset = errors[:, :2].sum(dim=(1, 2)), errors[:, 2:].sum(dim=(1, 2))
        losses: Tensor = centres + (_SIZE_WEIGHT * size + offset) / count
        return losses

    def _centres(self, logits: Tensor, boxes: _InCells) -> Tensor:
        """(B,) the focal loss of the maps of centres, summed."""
        true = bells(boxes, logits.shape)
        log_p, log_not = functional.logsigmoid(logits), functional.logsigmoid(-logits)
        here = (1 - log_p.exp()).square() * log_p
        elsewhere = (1 - true).pow(4) * log_p.exp().square() * log_not
        costs = -torch.where(true == 1, here, elsewhere).sum(dim=(2, 3))
        weights = self.spec.loss.class_weights or (1.0,) * logits.shape[1]
        return costs @ torch.tensor(weights, dtype=costs.dtype, device=costs.device)

    def moved(self, targets: Tensor, motion: Motion) -> Tensor:
        """The boxes after their images were changed by `motion`."""
        return moved_boxes(targets, motion)

    def found(self, outputs: Tensor) -> Tensor:
        """Boxes that a network found, the most certain first.

        A centre is a place of a map that none of its eight neighbours exceeds.

        Args:
            outputs: as in `losses`.

        Returns:
            (B, most_boxes, 6): x0, y0, x1, y1 in parts of the sides and within the image, the
            class, and the certainty; rows without a box have the class -1.
        """
        classes, (height, width) = len(self.spec.task.classes), outputs.shape[-2:]
        certainty = outputs[:, :classes].sigmoid()
        peak = certainty == functional.max_pool2d(certainty, 3, stride=1, padding=1)
        scores = (certainty * peak).flatten(1)
        best, place = scores.topk(min(self._section.most_boxes, scores.shape[1]), dim=1)
        cell = place % (height * width)
        around = outputs[:, classes:].flatten(2).gather(2, cell[:, None].expand(-1, GEOMETRY, -1))
        size, offset = around[:, :2], around[:, 2:]
        corner = torch.stack([cell % width, cell // width], dim=1)
        _, rows, columns = self.spec.input.shape
        sides = outputs.new_tensor([columns, rows]).view(1, 2, 1) / STRIDE
        centre = corner + offset
        low, high = (
            ((centre + sign * size.clamp_min(0) / 2) / sides).clamp(0, 1) for sign in (-1, 1)
        )
        kind = torch.where(best > 0, place // (height * width), -1).to(best)
        return torch.cat([low, high, kind[:, None], best[:, None]], dim=1).transpose(1, 2)

    # --- Evaluation ---------------------------------------------------------------------------

    def pictures(self, network: nn.Module, cohort: Cohort, device: torch.device) -> Evidence:
        """Images evenly spread over the cohort; the boxes on them are evidence already."""
        rows = pictures.spread(len(cohort), self.spec.evaluation.gallery)
        return {"gallery_rows": rows, "gallery_images": pictures.grey_levels(cohort.images(rows))}

    def measured(self, outputs: Tensor, images: Tensor, targets: Tensor) -> Evidence:
        """The boxes of each image.

        Returns:
            ``found`` (B, most_boxes, 6) as `found`, ``true`` (B, boxes, 5) as the cohort's
            targets, ``finite`` (B,): whether the network's outputs were numbers.
        """
        return {
            "found": self.found(outputs).cpu().numpy(),
            "true": targets.cpu().numpy(),
            "finite": outputs.flatten(1).isfinite().all(dim=1).cpu().numpy(),
        }

    def without_answers(self) -> str:
        """Nothing: every image has its boxes, or none."""
        return ""

    def answers(self, outputs: Tensor, images: Tensor) -> Sequence[Answer]:
        """The boxes of each image with a certainty above the threshold."""
        finite = outputs.flatten(1).isfinite().all(dim=1).tolist()
        certain = self.spec.evaluation.threshold
        found = self.found(outputs).cpu().numpy()
        kept = [rows[(rows[:, 4] >= 0) & (rows[:, 5] > certain)] for rows in found]
        return [Answer(ok, boxes=boxes) for ok, boxes in zip(finite, kept, strict=True)]

    def score(
        self,
        evidence: Evidence,
        patients: NDArray[np.int64],
        *,
        resamples: int,
        generator: np.random.Generator,
    ) -> Mapping[str, Estimate]:
        """See the table above; None where a network gave no numbers."""
        if not evidence["finite"].all():
            return dict.fromkeys(self.spec.task.METRICS, Estimate(None))
        hits = self._hits(evidence)

        def over_classes(weights: Floats) -> dict[str, Floats]:
            by_class = [_scores_of(hit, weights) for hit in hits]
            return {name: _mean([scores[name] for scores in by_class]) for name in by_class[0]}

        return estimates(over_classes, patients, resamples=resamples, generator=generator)

    def without_value(self, evidence: Evidence) -> str:
        """Why the headline has no value on this evidence, in a sentence."""
        if not evidence["finite"].all():
            return "The network's outputs are not numbers: its training has diverged."
        return "No image of the test part has a box."

    # --- What is shown ------------------------------------------------------------------------

    def exhibits(self, evidence: Evidence, patients: NDArray[np.int64]) -> Sequence[Exhibit]:
        """Metrics and sensitivities by class, curves, and boxes on images."""
        shown: list[Exhibit] = []
        if evidence["finite"].all():
            hits = self._hits(evidence)
            shown = [
                self._by_class(hits, patients),
                self._sensitivities(hits, patients),
                self._froc(hits, len(patients)),
                self._precision(hits, len(patients)),
            ]
        if len(evidence.get("gallery_rows", ())):
            shown.append(self._gallery(evidence))
        return shown

    def _hits(self, evidence: Evidence) -> list[Hits]:
        classes = range(len(self.spec.task.classes))
        return [matched(evidence["found"], evidence["true"], number) for number in classes]

    def _estimated(self, statistics: Any, patients: NDArray[np.int64]) -> dict[str, Estimate]:
        return estimates(
            statistics,
            patients,
            resamples=self.spec.evaluation.bootstrap,
            generator=np.random.default_rng(self.spec.seed),
        )

    def _by_class(self, hits: Sequence[Hits], patients: NDArray[np.int64]) -> Table:
        metrics = self.spec.task.METRICS
        rows = []
        for name, hit in zip(self.spec.task.classes, hits, strict=True):
            scores = self._estimated(lambda weights, hit=hit: _scores_of(hit, weights), patients)
            cells = (words.estimate(scores[metric]) for metric in metrics)
            rows.append((name, *cells, str(int(hit.true.sum()))))
        titles = (metric.title.removeprefix("m") for metric in metrics.values())
        head = ("Class", *titles, "True boxes")
        note = (
            "Average precision (AP) with 95 % intervals; mAP is its mean over the classes. FROC "
            "sensitivity is the mean of the next table's."
        )
        return Table("By class", head, rows, note)

    def _sensitivities(self, hits: Sequence[Hits], patients: NDArray[np.int64]) -> Table:
        columns = []
        for hit in hits:

            def at(weights: Floats, hit: Hits = hit) -> dict[str, Floats]:
                curve = hit.ranking(weights, 0)
                found = sensitivities(curve, weights @ hit.true, weights.sum(axis=1))
                return {str(n): column for n, column in enumerate(found.T)}

            columns.append([words.estimate(e) for e in self._estimated(at, patients).values()])
        allowed = [f"{number:g}" for number in FALSE_POSITIVES]
        return Table(
            "Sensitivity",
            ("False positives an image", *self.spec.task.classes),
            list(zip(allowed, *columns, strict=True)),
            "The part of the true boxes that is found at an overlap (IoU) of at least 0.5, where "
            "so many false ones are allowed.",
        )

    def _froc(self, hits: Sequence[Hits], images: int) -> Chart:
        lines = []
        for name, curve, true in self._curves(hits, images):
            false = curve.false_positives[0] / images
            shown = false <= FALSE_POSITIVES[-1]
            found = np.append(0.0, curve.true_positives[0][shown] / true)
            lines.append(
                Line(name, np.append(false[shown], FALSE_POSITIVES[-1]), found, steps=True)
            )
        return Chart(
            "FROC",
            "false positives an image",
            "sensitivity",
            lines,
            "The part of the true boxes that is found, against how many false ones an image has, "
            "as the threshold falls.",
        )

    def _precision(self, hits: Sequence[Hits], images: int) -> Chart:
        lines = []
        for name, curve, true in self._curves(hits, images):
            positives = curve.true_positives[0]
            precision = positives / (positives + curve.false_positives[0])
            lines.append(Line(name, positives / true, precision))
        return Chart(
            "Precision and recall",
            "recall (sensitivity)",
            "precision",
            lines,
            "The part of the found boxes that is right, against the part of the true ones that is "
            "found, at an overlap of at least 0.5.",
            unit_square=True,
        )

    def _curves(self, hits: Sequence[Hits], images: int) -> list[tuple[str, Ranking, float]]:
        """Of each class with true boxes: its name, its curve at 0.5, its number of true boxes."""
        once = np.ones((1, images))
        return [
            (name, hit.ranking(once, 0), float(hit.true.sum()))
            for name, hit in zip(self.spec.task.classes, hits, strict=True)
            if hit.true.any() and len(hit.certainty)
        ]

    def _gallery(self, evidence: Evidence) -> Gallery:
        drawn, captions = [], []
        rows = evidence["gallery_rows"]
        for row, levels in zip(rows, evidence["gallery_images"], strict=True):
            found, true = evidence["found"][row], evidence["true"][row]
            found = found[(found[:, 4] >= 0) & (found[:, 5] > self.spec.evaluation.threshold)]
            true = true[true[:, 4] >= 0]
            picture = pictures.canvas(levels)
            there, seen = (pictures.framed(boxes, *picture.shape[:2]) for boxes in (true, found))
            drawn.append(pictures.compared(picture, there, seen, len(self.spec.task.classes)))
            captions.append(f"Image {row + 1}: {self._counts(true, found)}")
        return Gallery(
            "Boxes",
            np.stack(drawn),
            captions,
            "Images of the test part with the true boxes and those that were found with a "
            f"certainty above {self.spec.evaluation.threshold:g}. Below each, by class: how many "
            "of the true boxes were found, and how many of the found ones are false.",
            pictures.legend(self.spec.task.classes),
        )

    def _counts(self, true: Boxes, found: Boxes) -> str:
        parts = []
        for number, name in enumerate(self.spec.task.classes):
            hit = matched(found[None], true[None], number)
            there, seen = int(hit.true.sum()), len(hit.certainty)
            if there or seen:
                taken = int(hit.hit[0].sum())
                parts.append(f"{name} {taken} of {there}, {seen - taken} false")
        return "; ".join(parts) or "nothing to find, nothing found"

    @property
    def _section(self) -> Section:
        return self.spec.task_as(Section)

    def _check_shapes(self, outputs: Tensor, targets: Tensor) -> None:
        _, height, width = self.spec.input.shape
        maps = len(self.spec.task.classes) + GEOMETRY
        expected = (len(outputs), maps, -(-height // STRIDE), -(-width // STRIDE))
        wanted = (len(outputs), *targets.shape[1:2], 5)
        if outputs.shape != expected or targets.shape != wanted:
            raise ModelError(
                f"a detection met outputs of shape {tuple(outputs.shape)} and boxes of shape "
                f"{tuple(targets.shape)}; expected {expected} and (images, boxes, 5)"
            )


# --- Boxes on the grid --------------------------------------------------------------------------


class _InCells(NamedTuple):
    """True boxes on the grid.

    Attributes:
        there: (B, M) whether there is a box.
        kind: (B, M) its class, 0 where there is none.
        cell: (B, M) the cell of its centre, row by row.
        geometry: (B, 4, M) width, height, offset to the right and down, in cells.
    """

    there: Tensor
    kind: Tensor
    cell: Tensor
    geometry: Tensor


def _in_cells(targets: Tensor, pixels: tuple[int, ...], grid: torch.Size) -> _InCells:
    sides = targets.new_tensor([pixels[1], pixels[0]]) / STRIDE
    there = targets[..., 4] >= 0
    low, high = (targets[..., start : start + 2] * sides for start in (0, 2))
    most = targets.new_tensor([grid[1] - 1, grid[0] - 1])
    centre = (low + high) / 2
    corner = centre.floor().clamp_min(0).minimum(most)
    geometry = torch.cat([high - low, centre - corner], dim=2)
    geometry = torch.where(there[..., None], geometry, 0).transpose(1, 2)
    cell = (corner[..., 1] * grid[1] + corner[..., 0]).long()
    kind = targets[..., 4].long()
    return _InCells(there, torch.where(there, kind, 0), torch.where(there, cell, 0), geometry)


def bells(boxes: _InCells, shape: torch.Size) -> Tensor:
    """(B, classes, h, w): 1 at each centre, and a bell around it that falls with distance.

    Of boxes of one class the highest bell counts.
    """
    images, classes, height, width = shape
    down = torch.arange(height, device=boxes.cell.device)[:, None]
    right = torch.arange(width, device=boxes.cell.device)[None]
    y, x = (place[..., None, None] for place in (boxes.cell // width, boxes.cell % width))
    size = boxes.geometry[:, :2].transpose(1, 2)
    deviation = (2 * radius(size).floor().clamp_min(0) + 1) / 6
    squares = ((down - y) ** 2 + (right - x) ** 2) / (2 * deviation[..., None, None].square())
    bell = torch.exp(-squares)
    bell = torch.where((bell > _EVERYWHERE) & boxes.there[..., None, None], bell, 0)
    maps = bell.new_zeros(images, classes, height * width)
    index = boxes.kind[..., None].expand(-1, -1, height * width)
    return maps.scatter_reduce(1, index, bell.flatten(2), "amax").view(shape)


def radius(sizes: Tensor) -> Tensor:
    """How far, in cells, both corners of a box may move so that it still overlaps by 0.7.

    The least over three ways of moving: both inwards, both outwards, and along (Law and Deng
    2018, arXiv:1808.01244, with the roots put right).

    Args:
        sizes: (…, 2) width and height in cells.

    Returns:
        (…), in cells.
    """
    total, area, least = sizes.sum(dim=-1), sizes.prod(dim=-1), _LEAST_OVERLAP
    along = _smaller_root(1.0, total, area * (1 - least) / (1 + least))
    inwards = _smaller_root(4.0, 2 * total, (1 - least) * area)
    outwards = _larger_root(4 * least, 2 * least * total, (least - 1) * area)
    return torch.stack([along, inwards, outwards]).amin(dim=0)


def _smaller_root(a: float, b: Tensor, c: Tensor) -> Tensor:
    """The smaller root of a r² - b r + c = 0."""
    return (b - (b.square() - 4 * a * c).clamp_min(0).sqrt()) / (2 * a)


def _larger_root(a: float, b: Tensor, c: Tensor) -> Tensor:
    """The larger root of a r² + b r + c = 0."""
    return (-b + (b.square() - 4 * a * c).clamp_min(0).sqrt()) / (2 * a)


# --- Metrics ------------------------------------------------------------------------------------


class Hits(NamedTuple):
    """What was found of one class in N images, D boxes together.

    Attributes:
        certainty: (D,).
        image: (D,) the image of each.
        hit: (overlaps, D) whether it took a true box.
        true: (N,) how many true boxes each image has.
    """

    certainty: NDArray[np.float32]
    image: NDArray[np.int64]
    hit: NDArray[np.bool_]
    true: NDArray[np.int64]

    def ranking(self, weights: Floats, overlap: int) -> Ranking:
        """True and false positives from the most certain box down, under (R, N) `weights`."""
        return ranking(self.certainty, self.hit[overlap], weights[:, self.image])


def matched(found: Boxes, true: Boxes, kind: int) -> Hits:
    """Match boxes of one class, image by image.

    Args:
        found: (N, D, 6) of any order.
        true: (N, M, 5).
        kind: the class.
    """
    certainty, image, hit, counts = [], [], [], []
    for number, (seen, there) in enumerate(zip(found, true, strict=True)):
        mine, things = seen[seen[:, 4] == kind], there[there[:, 4] == kind]
        mine = mine[np.argsort(-mine[:, 5], kind="stable")]
        certainty.append(mine[:, 5])
        image.append(np.full(len(mine), number, dtype=np.int64))
        hit.append(_taken(overlaps(mine[:, :4], things[:, :4])))
        counts.append(len(things))
    return Hits(
        np.concatenate(certainty),
        np.concatenate(image),
        np.concatenate(hit, axis=1),
        np.array(counts, dtype=np.int64),
    )


def overlaps(some: NDArray[Any], others: NDArray[Any]) -> Floats:
    """(A, 4) and (B, 4) boxes to (A, B): intersection over union, 0 of two empty ones."""
    a, b = some.astype(np.float64)[:, None], others.astype(np.float64)[None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    common = sides.clip(min=0).prod(axis=-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(axis=-1) for boxes in (a, b)]
    return ratio(common, areas[0] + areas[1] - common)


def _taken(overlap: Floats) -> NDArray[np.bool_]:
    """(D, M) overlaps, the most certain first, to (overlaps, D): whether each took a true box."""
    free = np.ones((len(OVERLAPS), overlap.shape[1]), dtype=np.bool_)
    hit = np.zeros((len(OVERLAPS), len(overlap)), dtype=np.bool_)
    levels = np.arange(len(OVERLAPS))
    if not overlap.shape[1]:
        return hit
    for number, row in enumerate(overlap):
        left = np.where(free, row, -1.0)
        best = left.argmax(axis=1)
        hit[:, number] = left[levels, best] >= OVERLAPS
        free[levels, best] &= ~hit[:, number]
    return hit


def _scores_of(hits: Hits, weights: Floats) -> dict[str, Floats]:
    """The metrics of one class under (R, N) weights: (R,) each, NaN without a true box."""
    true, images = weights @ hits.true, weights.sum(axis=1)
    curves = [hits.ranking(weights, number) for number in range(len(OVERLAPS))]
    precisions = np.stack([average_precision(curve, true) for curve in curves])
    return {
        "map50": precisions[0],
        "map": precisions.mean(axis=0),
        "froc": sensitivities(curves[0], true, images).mean(axis=1),
    }


def average_precision(curve: Ranking, true: Floats) -> Floats:
    """(R,) COCO's average precision; NaN where there is no true box.

    Args:
        curve: of (R, G) counts.
        true: (R,) how many true boxes there are.
    """
    positives = curve.true_positives
    precision = np.nan_to_num(ratio(positives, positives + curve.false_positives))
    falling = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    found = np.full(len(true), np.nan)
    for row in np.flatnonzero(true > 0):
        place = np.searchsorted(positives[row] / true[row], RECALLS)
        found[row] = np.append(falling[row], 0.0)[place].mean()
    return found


def sensitivities(curve: Ranking, true: Floats, images: Floats) -> Floats:
    """(R, 7) the sensitivity at each of `FALSE_POSITIVES` an image; NaN where nothing is true."""
    allowed = images[:, None] * np.array(FALSE_POSITIVES)
    reached = np.zeros_like(allowed)
    for row, (false, positives) in enumerate(
        zip(curve.false_positives, curve.true_positives, strict=True)
    ):
        place = np.searchsorted(false, allowed[row], side="right")
        reached[row] = np.append(0.0, positives)[place]
    return ratio(reached, np.broadcast_to(true[:, None], allowed.shape))


def _mean(classes: Sequence[Floats]) -> Floats:
    """(R,) the mean over the classes that have a meaning."""
    values = np.stack(classes)
    known = np.isfinite(values)
    return ratio(np.where(known, values, 0).sum(axis=0), known.sum(axis=0).astype(np.float64))
