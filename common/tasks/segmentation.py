"""Segmentation: a class for every pixel, the first of the classes being the background.

=============  ==================================================================================
dice           2 TP / (2 TP + FP + FN) of a class's pixels over all images of a patient
hausdorff95    the 95th percentile of the distances from the outline of one mask to that of the
               other, the larger of both directions, in pixels of the network's input, of volumes
               in millimetres; by image, then the mean over a patient's images
volume-error   100 |found - true| / true, of a class's pixels over all images of a patient
volume-        of volumes alone: |found - true| of a class over all volumes of a patient, in
difference     millilitres
=============  ==================================================================================

Each is computed by class and patient, averaged over the patients, then over the classes but the
background. Where neither mask has the class a value has no meaning and is left out; where only
one of them has it, Dice is 0 and an image's Hausdorff distance is its diagonal, the largest that
there can be (MONAI says infinity, which no mean survives; leaving it out would reward a network
for what it does not find). Without a true pixel a volume error has no meaning.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional

from common.cohort import Cohort
from common.errors import ModelError
from common.spec import Loss
from common.tasks import pictures, words
from common.tasks.answers import Answer
from common.tasks.augment import Motion, moved_masks
from common.tasks.estimates import Estimate, Floats, estimates, means, ratio
from common.tasks.exhibits import Chart, Exhibit, Gallery, Line, Table
from common.tasks.task import Evidence, Task

_SMOOTH = 1.0  # a pixel: a class that is in neither mask costs nothing, and no quotient is 0 / 0
_TINY = 1e-12
_ML = 1000.0  # cubic millimetres of a millilitre
_WINDOWS = 2  # at once: torch convolves one volume alone seven times as slowly as each of two


class Segmentation(Task):
    """Losses, metrics and pictures of a segmentation.

    A pixel's cross-entropy or focal loss is multiplied by the weight of its class, a literal of
    the spec, and an image's is the mean over its pixels. Dice is one minus the soft Dice of an
    image, averaged over the classes but the background by their weights (Milletari et al. 2016,
    with sums in the denominator). No sum runs over more than one image (docs/privacy.md 2).
    """

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One loss an image: (B, classes, H, W) logits and (B, H, W) int64 to (B,) float32.

        Of volumes both have a depth before the height, here as in all that follows.

        Raises:
            ModelError: if a shape is another.
        """
        self._check_shapes(outputs, targets)
        log_p = functional.log_softmax(outputs.float(), dim=1)
        return _FORMULAS[self.spec.loss.name](log_p, targets, self.spec.loss)

    def taken(
        self, cohort: Cohort, rows: NDArray[np.int64], copies: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """As `Task.taken`; of volumes with a patch, a part at a uniformly random place a copy.

        No more of a plain cohort is read than the parts are.
        """
        seen = self.spec.input
        if seen.patch is None:
            return super().taken(cohort, rows, copies, generator)
        of_each = np.repeat(rows, copies)
        room = torch.tensor(seen.sides) - torch.tensor(seen.patch) + 1
        drawn = torch.rand(len(of_each), len(room), generator=generator, dtype=torch.float64)
        corners = (drawn * room).long().minimum(room - 1)
        images, masks = cohort.patches(of_each, corners.numpy(), seen.patch)
        return torch.from_numpy(images), torch.from_numpy(masks)

    def moved(self, targets: Tensor, motion: Motion) -> Tensor:
        """The masks after their images were changed by `motion`."""
        return moved_masks(targets, motion)

    # --- Evaluation ---------------------------------------------------------------------------

    def through(self, network: nn.Module, images: Tensor) -> Tensor:
        """As `Task.through`; of volumes with a patch, window by window and blended (MONAI)."""
        patch = self.spec.input.patch
        if patch is None:
            return super().through(network, images)
        one = partial(super().through, network)
        # Named, not imported: MONAI takes seconds.
        slide = pkgutil.resolve_name("monai.inferers.utils:sliding_window_inference")
        outputs: Tensor = slide(images, patch, _WINDOWS, one, overlap=0.5, mode="gaussian")
        return outputs

    def pictures(self, network: nn.Module, cohort: Cohort, device: torch.device) -> Evidence:
        """Images evenly spread over the cohort, their masks and those that were found.

        Of a volume the slice in which most pixels are of a class, of its mask or else of what was
        found, and in the middle where there are none.
        """
        rows = pictures.spread(len(cohort), self.spec.evaluation.gallery)
        if self.spec.input.depth is not None:
            shown = [self._slice(network, cohort, int(row), device) for row in rows]
            return {"gallery_rows": rows} | {
                key: np.stack([s[key] for s in shown]) for key in shown[0]
            }
        seen, true = cohort.examples(rows)
        images = torch.from_numpy(seen).to(device)
        found = self.through(network, images).argmax(dim=1)
        return {
            "gallery_rows": rows,
            "gallery_images": pictures.grey_levels(images.cpu().numpy()),
            "gallery_true": true.astype(np.uint16),
            "gallery_found": found.cpu().numpy().astype(np.uint16),
        }

    def _slice(
        self, network: nn.Module, cohort: Cohort, row: int, device: torch.device
    ) -> dict[str, NDArray[Any]]:
        """The slice of one volume that is shown, its number from 0."""
        seen, (true,) = cohort.examples([row])
        images = torch.from_numpy(seen)
        found = self.through(network, images.to(device)).argmax(dim=1)[0].cpu().numpy()
        marked = true > 0 if true.any() else found > 0
        which = int(marked.sum(axis=(1, 2)).argmax()) if marked.any() else len(true) // 2
        return {
            "gallery_slices": np.array(which),
            "gallery_images": pictures.grey_levels(images[:, :, which].numpy())[0],
            "gallery_true": true[which].astype(np.uint16),
            "gallery_found": found[which].astype(np.uint16),
        }

    def measured(self, outputs: Tensor, images: Tensor, targets: Tensor) -> Evidence:
        """Of each image and class but the background, what the metrics are made of.

        Returns:
            ``pixels`` (B, classes - 1, 3) int64: common, found, true; ``hausdorff95``
            (B, classes - 1) float32, NaN where neither mask has the class; ``finite`` (B,):
            whether the network's outputs were numbers.
        """
        sides = tuple(range(2, outputs.dim()))
        classes = torch.arange(1, outputs.shape[1], device=outputs.device)
        classes = classes.view(-1, *(1 for _ in sides))
        found, true = (labels[:, None] == classes for labels in (outputs.argmax(dim=1), targets))
        pixels = torch.stack([m.sum(dim=sides) for m in (found & true, found, true)], dim=2)
        pairs = zip(
            found.flatten(0, 1).cpu().numpy(), true.flatten(0, 1).cpu().numpy(), strict=True
        )
        spacing = self.spec.input.spacing
        distances = np.array([hausdorff95(*pair, spacing) for pair in pairs], dtype=np.float32)
        return {
            "pixels": pixels.cpu().numpy(),
            "hausdorff95": distances.reshape(pixels.shape[:2]),
            "finite": outputs.flatten(1).isfinite().all(dim=1).cpu().numpy(),
        }

    def served(self, outputs: Tensor) -> Mapping[str, Tensor]:
        """Probabilities of every pixel's classes, of the shape of the logits."""
        return {"probabilities": functional.softmax(outputs, dim=1)}

    def without_answers(self) -> str:
        """Nothing: every image and volume has its mask."""
        return ""

    def answers(self, outputs: Tensor, images: Tensor) -> Sequence[Answer]:
        """The mask of each image, or volume."""
        finite = outputs.flatten(1).isfinite().all(dim=1).tolist()
        masks = outputs.argmax(dim=1).cpu().numpy().astype(np.uint16)
        return [Answer(ok, mask=mask) for ok, mask in zip(finite, masks, strict=True)]

    def score(
        self,
        evidence: Evidence,
        patients: NDArray[np.int64],
        *,
        resamples: int,
        generator: np.random.Generator,
    ) -> Mapping[str, Estimate]:
        """See the table above, the mean over the classes; None where a network gave no numbers."""
        if not evidence["finite"].all():
            return dict.fromkeys(self.spec.metrics, Estimate(None))
        values = self._by_patient(evidence, patients)
        people = np.arange(len(values["dice"]))

        def over_classes(weights: Floats) -> dict[str, Floats]:
            return {name: _mean(_means(rows, weights)) for name, rows in values.items()}

        return estimates(over_classes, people, resamples=resamples, generator=generator)

    def without_value(self, evidence: Evidence) -> str:
        """Why the headline has no value on this evidence, in a sentence."""
        if not evidence["finite"].all():
            return "The network's outputs are not numbers: its training has diverged."
        return "No image of the test part has a class but the background, and none was found."

    # --- What is shown ------------------------------------------------------------------------

    def exhibits(self, evidence: Evidence, patients: NDArray[np.int64]) -> Sequence[Exhibit]:
        """Metrics by class, how Dice lies among the patients, and outlines on images."""
        values = self._by_patient(evidence, patients)
        shown: list[Exhibit] = []
        if evidence["finite"].all():
            shown = [self._by_class(evidence, values), self._dice_of_patients(values["dice"])]
        if len(evidence.get("gallery_rows", ())):
            shown.append(self._gallery(evidence))
        return shown

    @property
    def _names(self) -> tuple[str, ...]:
        return self.spec.task.classes[1:]

    def _by_patient(self, evidence: Evidence, patients: NDArray[np.int64]) -> dict[str, Floats]:
        spacing = self.spec.input.spacing
        return by_patient(evidence, patients, spacing and float(np.prod(spacing)) / _ML)

    def _by_class(self, evidence: Evidence, values: Mapping[str, Floats]) -> Table:
        found, true = (evidence["pixels"][:, :, which] > 0 for which in (1, 2))
        metrics = self.spec.metrics
        rows = []
        for number, name in enumerate(self._names):
            columns = {metric: values[metric][:, number] for metric in metrics}
            figures = self._means_of(columns)
            cells = (
                words.estimate(figures[key], words.digits(metric))
                for key, metric in metrics.items()
            )
            both = (found & true)[:, number]
            near = evidence["hausdorff95"][both, number]
            missed, invented = (
                int(seen[:, number].sum()) for seen in (true & ~found, found & ~true)
            )
            digits = words.digits(metrics["hausdorff95"])
            distance = words.number(float(near.mean()) if len(near) else None, digits)
            rows.append((name, *cells, distance, str(missed), str(invented)))
        titles = [f"{m.title} ({m.unit})" if m.unit else m.title for m in metrics.values()]
        unit, thing = metrics["hausdorff95"].unit, self._thing
        last = (f"Hausdorff where both are ({unit})", f"{thing}s missed", f"{thing}s invented")
        thing = thing.lower()
        return Table(
            "By class",
            ("Class", *titles, *last),
            rows,
            "Means over the patients, with their 95 % intervals. Where only one of the two "
            f"outlines is there, the Hausdorff distance is the {thing}'s diagonal; the column "
            f"“where both are” is of the {thing}s with both alone. Missed are the {thing}s in "
            "which the class is and was not found, invented those in which it was found and is "
            "not.",
        )

    @property
    def _thing(self) -> str:
        return "Image" if self.spec.input.depth is None else "Volume"

    def _means_of(self, columns: Mapping[str, Floats]) -> Mapping[str, Estimate]:
        """The mean of each column of figures, one a patient."""
        return means(
            columns,
            np.arange(len(columns["dice"])),
            resamples=self.spec.evaluation.bootstrap,
            generator=np.random.default_rng(self.spec.seed),
        )

    def _dice_of_patients(self, dice: Floats) -> Chart:
        lines = []
        for name, values in zip(self._names, dice.T, strict=True):
            defined = np.sort(values[np.isfinite(values)])
            parts = np.arange(len(defined) + 1) / max(1, len(defined))
            lines.append(Line(name, np.append(defined, 1.0), parts, steps=True))
        return Chart(
            "Dice of the patients",
            "Dice",
            "part of the patients at or below",
            lines,
            "For each class, the part of the patients whose Dice is at or below a value: the "
            "further to the right a line rises, the better.",
            unit_square=True,
        )

    def _gallery(self, evidence: Evidence) -> Gallery:
        kept = (evidence[f"gallery_{name}"] for name in ("rows", "images", "true", "found"))
        drawn, captions = [], []
        slices = evidence.get("gallery_slices", np.zeros(len(evidence["gallery_rows"]), np.int64))
        for row, levels, true, found, slice_ in zip(*kept, slices, strict=True):
            times = pictures.enlargement(*true.shape)
            there, seen = (pictures.outlined(pictures.enlarged(m, times)) for m in (true, found))
            canvas = pictures.canvas(levels)
            drawn.append(pictures.compared(canvas, there, seen, len(self._names)))
            captions.append(self._caption(int(row), evidence["pixels"][row], int(slice_)))
        return Gallery(
            "Outlines",
            np.stack(drawn),
            captions,
            f"{self._thing}s of the test part with the true outlines and those that were found.",
            pictures.legend(self._names),
        )

    def _caption(self, row: int, pixels: NDArray[np.int64], shown: int) -> str:
        dice = _dice(pixels.astype(np.float64))
        parts = [
            f"{name} {value:.2f}"
            for name, value in zip(self._names, dice, strict=True)
            if np.isfinite(value)
        ]
        depth = self.spec.input.depth
        which = "" if depth is None else f", slice {shown + 1} of {depth}"
        return f"{self._thing} {row + 1}{which}: " + (
            f"Dice {', '.join(parts)}" if parts else "nothing to find"
        )

    def _check_shapes(self, outputs: Tensor, targets: Tensor) -> None:
        classes = len(self.spec.task.classes)
        expected = (len(outputs), classes, *outputs.shape[2:])
        wanted = (len(outputs), *outputs.shape[2:])
        sides = len(self.spec.input.sides)
        if outputs.dim() != 2 + sides or outputs.shape != expected or targets.shape != wanted:
            named = ", ".join(("depth", "height", "width")[-sides:])
            raise ModelError(
                f"a segmentation of {classes} classes met outputs of shape {tuple(outputs.shape)} "
                f"and masks of shape {tuple(targets.shape)}; expected (images, {classes}, {named}) "
                f"and (images, {named})"
            )


# --- Losses: (B, classes, H, W) log-probabilities and (B, H, W) classes to (B,) -----------------


def _weights(log_p: Tensor, loss: Loss) -> Tensor:
    weights = loss.class_weights or (1.0,) * log_p.shape[1]
    return torch.tensor(weights, dtype=log_p.dtype, device=log_p.device)


def _one_hot(log_p: Tensor, targets: Tensor) -> Tensor:
    return functional.one_hot(targets, log_p.shape[1]).movedim(-1, 1).to(log_p)


def _over_pixels(values: Tensor, log_p: Tensor, targets: Tensor, loss: Loss) -> Tensor:
    """(B, classes, H, W) summed over the classes, weighted by the true one, mean over pixels."""
    return (values.sum(dim=1) * _weights(log_p, loss)[targets]).mean(
        dim=tuple(range(1, targets.dim()))
    )


def _smoothed(log_p: Tensor, targets: Tensor, loss: Loss) -> Tensor:
    exact = _one_hot(log_p, targets)
    return exact * (1 - loss.label_smoothing) + loss.label_smoothing / log_p.shape[1]


def _cross_entropy(log_p: Tensor, targets: Tensor, loss: Loss) -> Tensor:
    return _over_pixels(-_smoothed(log_p, targets, loss) * log_p, log_p, targets, loss)


def _focal(log_p: Tensor, targets: Tensor, loss: Loss) -> Tensor:
    """Lin et al. 2017: (1 - p)^gamma times the cross-entropy; finite slopes for any gamma."""
    doubt = (-torch.expm1(log_p)).clamp_min(_TINY).pow(loss.focal_gamma)
    return _over_pixels(-_smoothed(log_p, targets, loss) * doubt * log_p, log_p, targets, loss)


def _dice_loss(log_p: Tensor, targets: Tensor, loss: Loss) -> Tensor:
    p, true = log_p.exp()[:, 1:], _one_hot(log_p, targets)[:, 1:]
    sides = tuple(range(2, p.dim()))
    common, sizes = (p * true).sum(dim=sides), (p + true).sum(dim=sides)
    missing = 1 - (2 * common + _SMOOTH) / (sizes + _SMOOTH)
    weights = _weights(log_p, loss)[1:]
    return missing @ (weights / weights.sum())


def _both(log_p: Tensor, targets: Tensor, loss: Loss) -> Tensor:
    return _dice_loss(log_p, targets, loss) + _cross_entropy(log_p, targets, loss)


_FORMULAS: dict[str, Callable[[Tensor, Tensor, Loss], Tensor]] = {
    "cross-entropy": _cross_entropy,
    "dice": _dice_loss,
    "dice-cross-entropy": _both,
    "focal": _focal,
}


# --- Metrics ------------------------------------------------------------------------------------


def hausdorff95(
    found: NDArray[np.bool_], true: NDArray[np.bool_], spacing: Sequence[float] | None = None
) -> float:
    """The 95th percentile Hausdorff distance of two masks, in pixels.

    NaN where both are empty, the image's diagonal where one is.

    Args:
        found: (H, W), or (D, H, W).
        true: likewise.
        spacing: of the pixels along each side, which gives the distance its unit.
    """
    either = found | true
    if not either.any():
        return float("nan")
    if not (found.any() and true.any()):
        lengths = np.array(found.shape) * (1 if spacing is None else spacing)
        return float(reduce(np.hypot, lengths))
    (inside,) = ndimage.find_objects(either.astype(np.uint8))
    edges = [mask[inside] & ~ndimage.binary_erosion(mask[inside]) for mask in (found, true)]
    there, back = (
        np.percentile(ndimage.distance_transform_edt(~other, sampling=spacing)[edge], 95)
        for edge, other in (edges, reversed(edges))
    )
    return float(max(there, back))


def by_patient(
    evidence: Evidence, patients: NDArray[np.int64], millilitres: float | None = None
) -> dict[str, Floats]:
    """Each metric as (patients, classes - 1), NaN where it has no meaning.

    Args:
        evidence: of N images.
        patients: (N,) integers; equal numbers are one patient.
        millilitres: of a voxel, where images are volumes.
    """
    _, index = np.unique(patients, return_inverse=True)
    pixels = _summed(evidence["pixels"].astype(np.float64), index)
    distances = evidence["hausdorff95"].astype(np.float64)
    known = np.isfinite(distances)
    totals = _summed(np.where(known, distances, 0), index)
    found, true = pixels[..., 1], pixels[..., 2]
    values = {
        "dice": _dice(pixels),
        "hausdorff95": ratio(totals, _summed(known.astype(np.float64), index)),
        "volume-error": ratio(100 * np.abs(found - true), true),
    }
    if millilitres is not None:
        apart = np.abs(found - true) * millilitres
        values["volume-difference"] = np.where(found + true > 0, apart, np.nan)
    return values


def _dice(pixels: Floats) -> Floats:
    """(…, 3) counts of pixels, common, found and true, to (…)."""
    return ratio(2 * pixels[..., 0], pixels[..., 1] + pixels[..., 2])


def _means(values: Floats, weights: Floats) -> Floats:
    """(R, classes) means of (patients, classes) values that have a meaning, by (R, patients)."""
    known = np.isfinite(values)
    return ratio(weights @ np.where(known, values, 0), weights @ known)


def _mean(classes: Floats) -> Floats:
    """(R,) the mean over the classes that have a meaning."""
    known = np.isfinite(classes)
    return ratio(np.where(known, classes, 0).sum(axis=1), known.sum(axis=1))


def _summed(values: Floats, index: NDArray[Any]) -> Floats:
    """Rows of equal `index` added up."""
    total = np.zeros((int(index.max(initial=-1)) + 1, *values.shape[1:]))
    np.add.at(total, index, values)
    return total
