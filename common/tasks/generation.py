"""Generation: synthetic images, for those who may not have those of patients.

=============  ==================================================================================
tstr-auroc     AUROC on real images of a small classifier that was taught on synthetic ones alone
               (train on synthetic, test on real; Esteban et al. 2017); mean over the classes
tstr-accuracy  part of its decisions that are right
nearest        distance of a real image to the nearest synthetic one, for one to the nearest real
               one of another patient; sums over images
copies         part of the real images with any synthetic one nearer than half of that, in percent
=============  ==================================================================================

A discriminator learns from patients to tell their images from a generator's; the generator learns
from the discriminator. Each patient gives two rows, the image and a synthetic one of its class,
whose losses are summed, so one clipped gradient holds both.

**The generator costs no privacy.** All that it is ever trained on is its own noise and the
discriminator's weights after a step, which DP-SGD has clipped and noised. What is computed from a
private release and from nothing else of the patients is post-processing (Dwork and Roth 2014,
proposition 2.1): it is as private as the discriminator, however long it is trained. That holds
because nothing else of a patient reaches it: no image, no label (it draws its own, from the public
list of classes), no gradient (it takes its own, of its own parameters alone), no random number
that a patient's step has drawn from before. The same is true of what follows for ``wasserstein``.

**Slopes.** A Wasserstein loss means something for a discriminator whose slopes are bounded.
WGAN-GP bounds them by a penalty on the gradient of an output by its image (Gulrajani et al. 2017,
arXiv:1704.00028): its own gradient is a second derivative, through the first backward pass, and
Opacus' hooks keep a patient's gradient of one backward pass; the second would go past the
clipping. Instead each layer's matrix is divided by its largest singular value after each step
where that is above one (Gouk et al. 2021, arXiv:1804.04368). That is a projection of noised
weights: post-processing, which takes nothing of a patient's clipped gradient either. The loss has
a small drift penalty of a row of its own, 0.001 times the squared output (Karras et al. 2018), so
that outputs do not run away together.

Distances are of brightness, root mean square, of images made at most 32 pixels a side. Among the
evaluation's images, which the sites never trained on, they say what chance gives; a generator
that has memorised its training images shows it against those, at the site that has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from common.cohort import Cohort
from common.errors import ModelError
from common.models.gan import Generator, Pair
from common.spec import RunSpec
from common.task_sections import Generation as Section
from common.tasks import metrics, pictures
from common.tasks.curves import Column, roc
from common.tasks.estimates import Estimate, means, ratios
from common.tasks.exhibits import Chart, Exhibit, Gallery, Line
from common.tasks.metrics import Predictions
from common.tasks.preprocess import normalise
from common.tasks.task import Evidence, Task, batches

_DRIFT = 1e-3
_BETAS = (0.5, 0.99)
SYNTHETIC = 2048  # images that a judge is taught on, and that distances are taken to
_AT_ONCE = 256
_LARGEST_SIDE = 32
_COPY = 0.5
_PERCENT = 100.0


class Drawn(NamedTuple):
    """Images with their labels, most often synthetic ones.

    Attributes:
        images: (N, C, H, W) float32 brightness in 0..1.
        labels: (N,) int64 class numbers, or (N, classes) float32 of 0 and 1 if multilabel.
    """

    images: Tensor
    labels: Tensor


class Generation(Task):
    """Losses of a conditional adversarial pair, what it is worth, and what it makes.

    A discriminator's number for an image of a class is its own output and that of the class (of
    each class that a multilabel image has). ``adversarial`` is the logistic loss of it, in which
    the generator has the one that does not saturate (Goodfellow et al. 2014); ``wasserstein`` is
    it itself, with its sign.
    """

    def __init__(self, spec: RunSpec) -> None:
        super().__init__(spec)
        self._section = spec.task_as(Section)
        self._optimizer: torch.optim.Optimizer | None = None

    # --- Training -----------------------------------------------------------------------------

    def private(self, network: nn.Module) -> nn.Module:
        """The discriminator."""
        return _pair(network).discriminator

    @torch.no_grad()
    def examples(
        self, images: Tensor, targets: Tensor, network: nn.Module, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Each image, and behind it a synthetic one of its class; see `Task.examples`.

        Returns:
            (2 B, C, H, W), and (2 B, classes + 1): which classes it has, and 1 for a real one.
        """
        has = self._has(targets).to(images)
        synthetic = _made(_pair(network).generator, has, generator)
        rows = torch.stack([images, synthetic], dim=1).flatten(0, 1)
        real = torch.tensor([1.0, 0.0], device=images.device).repeat(len(images))
        return rows, torch.cat([has.repeat_interleave(2, dim=0), real[:, None]], dim=1)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One loss a row: (R, 1 + classes) and `examples`' targets to (R,) float32.

        Raises:
            ModelError: if a shape is another.
        """
        expected = (len(outputs), 1 + len(self._section.classes))
        if outputs.shape != expected or targets.shape != expected:
            raise ModelError(
                f"generation met outputs of shape {tuple(outputs.shape)} and targets of shape "
                f"{tuple(targets.shape)}; expected {expected} of both"
            )
        judged = _judged(outputs.float(), targets[:, :-1])
        sign = 1 - 2 * targets[:, -1]
        if self.spec.loss.name == "adversarial":
            return functional.softplus(sign * judged)
        return sign * judged + _DRIFT * judged.square()

    def follow(self, network: nn.Module, generator: torch.Generator) -> None:
        """Bound the discriminator's slopes where the loss needs it, and train the generator.

        Everything here is computed from the weights in `network` and from `generator`; see the
        text of this module for what that means.
        """
        pair = _pair(network)
        if self.spec.loss.name == "wasserstein":
            bound_slopes(pair.discriminator)
        if self._optimizer is None:
            rate = self._section.generator_learning_rate
            self._optimizer = torch.optim.Adam(pair.generator.parameters(), lr=rate, betas=_BETAS)
        for _ in range(self._section.generator_steps):
            self._teach(pair, self._optimizer, generator)

    def _teach(
        self, pair: Pair, optimizer: torch.optim.Optimizer, generator: torch.Generator
    ) -> None:
        """One step of the generator; the discriminator's gradients stay as they are."""
        parameters = list(pair.generator.parameters())
        has = self._has(self._some_labels(self.spec.local.batch_size, generator))
        has = has.to(parameters[0])
        synthetic = _made(pair.generator, has, generator)
        judged = _judged(pair.discriminator(normalise(synthetic, self.spec.input)), has)
        adversarial = self.spec.loss.name == "adversarial"
        loss = functional.softplus(-judged) if adversarial else -judged
        gradients = torch.autograd.grad(loss.mean(), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()

    def _has(self, labels: Tensor) -> Tensor:
        """(N, classes) float32: which classes each image has."""
        if self._section.kind == "multilabel":
            return labels.float()
        return functional.one_hot(labels.long(), len(self._section.classes)).float()

    def _some_labels(self, count: int, generator: torch.Generator) -> Tensor:
        """Labels drawn evenly from the public list of classes; of many labels, each half the time.

        On the CPU, as `Cohort.targets` gives them.
        """
        classes, device = len(self._section.classes), generator.device
        many = self._section.kind == "multilabel"
        shape, choices = ((count, classes), 2) if many else ((count,), classes)
        drawn = torch.randint(choices, shape, generator=generator, device=device).cpu()
        return drawn.float() if many else drawn

    def draw(self, network: nn.Module, count: int, generator: torch.Generator) -> Drawn:
        """Make `count` images, labels drawn evenly; the network is in evaluation mode.

        What the first of them are does not depend on how many follow them.
        """
        first, images, labels = next(network.parameters()), [], []
        with torch.no_grad():
            for start in range(0, count, _AT_ONCE):
                chosen = self._some_labels(_AT_ONCE, generator)
                has = self._has(chosen).to(first)
                made = _made(_pair(network).generator, has, generator)
                images.append(made[: count - start].cpu())
                labels.append(chosen[: count - start])
        return Drawn(torch.cat(images), torch.cat(labels))

    # --- Evaluation ---------------------------------------------------------------------------

    @torch.no_grad()
    def evidence(self, network: nn.Module, cohort: Cohort, device: torch.device) -> Evidence:
        """What a classifier taught on synthetic images says of the real ones, and distances.

        All of it follows from the weights, the cohort and the spec's seed.
        """
        drawn = self.draw(network, SYNTHETIC, torch.Generator().manual_seed(self.spec.seed))
        return dict(self.judged(drawn, cohort, device)) | distances(cohort, drawn.images)

    @torch.no_grad()
    def judged(self, shown: Drawn, cohort: Cohort, device: torch.device) -> Evidence:
        """What classifiers that have seen `shown` alone, synthetic or real, say of `cohort`.

        Returns:
            ``probabilities`` and ``labels``; see `measured`.
        """
        seen = normalise(shown.images, self.spec.input)
        judge = _taught(seen, self._has(shown.labels), self._loss_of_judge, self.spec.seed)
        return super().evidence(judge.to(device), cohort, device)

    def pictures(self, network: nn.Module, cohort: Cohort, device: torch.device) -> Evidence:
        """The first of the synthetic images, with their classes."""
        shown = min(self.spec.evaluation.gallery, len(cohort))
        drawn = self.draw(network, shown, torch.Generator().manual_seed(self.spec.seed))
        return {
            "gallery_samples": pictures.grey_levels(drawn.images.numpy()),
            "gallery_classes": self._has(drawn.labels).numpy().astype(np.uint8),
        }

    def measured(self, outputs: Tensor, images: Tensor, targets: Tensor) -> Evidence:
        """Probabilities of the judge (N, classes), labels, and whether they are numbers."""
        many = self._section.kind == "multilabel"
        probabilities = outputs.sigmoid() if many else outputs.softmax(dim=1)
        return {
            "probabilities": probabilities.cpu().numpy(),
            "labels": targets.cpu().numpy(),
        }

    def _loss_of_judge(self, outputs: Tensor, has: Tensor) -> Tensor:
        if self._section.kind == "multilabel":
            return functional.binary_cross_entropy_with_logits(outputs, has)
        return functional.cross_entropy(outputs, has, label_smoothing=0.1)

    def score(
        self,
        evidence: Evidence,
        patients: NDArray[np.int64],
        *,
        resamples: int,
        generator: np.random.Generator,
    ) -> Mapping[str, Estimate]:
        """See the table above; None where the generator gave no numbers."""
        predictions = self._predictions(evidence, patients)
        if not predictions.finite:
            return dict.fromkeys(self._section.METRICS, Estimate(None))
        taught = metrics.score(predictions, resamples=resamples, generator=generator).metrics
        return {
            "tstr-auroc": taught["auroc"],
            "tstr-accuracy": taught["accuracy"],
            **memory(evidence, patients, resamples=resamples, generator=generator),
        }

    def _predictions(self, evidence: Evidence, patients: NDArray[np.int64]) -> Predictions:
        probabilities, labels = evidence["probabilities"], evidence["labels"]
        threshold = self.spec.evaluation.threshold
        return Predictions(self._section.kind, probabilities, labels, patients, threshold)

    # --- What is shown ------------------------------------------------------------------------

    def exhibits(self, evidence: Evidence, patients: NDArray[np.int64]) -> Sequence[Exhibit]:
        """The judge's curve, how distances lie, and a sheet of samples."""
        predictions = self._predictions(evidence, patients)
        shown: list[Exhibit] = []
        if predictions.finite:
            shown = [*self._curves(predictions), *_distances_chart(evidence)]
        if len(evidence.get("gallery_samples", ())):
            shown.append(self._sheet(evidence))
        return shown

    def _curves(self, predictions: Predictions) -> list[Chart]:
        binary = self._section.kind == "binary"
        names = ("",) if binary else self._section.classes
        lines = []
        for name, scores, truths in zip(
            names, predictions.scores.T, predictions.truths.T, strict=True
        ):
            column = Column(scores, truths, predictions.patients, self.spec.seed)
            if column.drawable:
                curve = roc(column)
                lines.append(Line(name, curve.x, curve.y))
        chart = Chart(
            "Trained on synthetic images, tested on real ones",
            "1 − specificity",
            "sensitivity",
            lines,
            "How well a small classifier that has seen synthetic images alone tells real ones "
            "apart. Dotted: chance.",
            unit_square=True,
            diagonal=True,
        )
        return [chart] if lines else []

    def _sheet(self, evidence: Evidence) -> Gallery:
        has = evidence["gallery_classes"] > 0
        names = np.array(self._section.classes)
        return Gallery(
            "Synthetic images",
            np.stack([pictures.canvas(levels) for levels in evidence["gallery_samples"]]),
            [", ".join(names[row]) or "none of the classes" for row in has],
            "Images that the generator made, each of the class that it was asked for.",
            note="Drawn at random, none chosen or left out.",
        )


def bound_slopes(discriminator: nn.Module) -> None:
    """Divide each layer's matrix by its largest singular value where that is above one.

    A convolution's matrix is (filters, the rest), as of Miyato et al. 2018 (arXiv:1802.05957).
    Weights that are not finite stay as they are.
    """
    with torch.no_grad():
        for layer in discriminator.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.isfinite().all():
                largest = torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2)
                layer.weight /= largest.clamp_min(1)


def nearest(
    images: Tensor, others: Tensor, apart: NDArray[np.bool_] | None = None
) -> NDArray[np.float32]:
    """(N,) root mean square distance of each image to the nearest of `others`.

    Args:
        images: (N, D) brightness.
        others: (M, D).
        apart: (N, M) which of them count; all if not given. Infinity where none does.
    """
    distance = torch.cdist(images, others, compute_mode="donot_use_mm_for_euclid_dist")
    if apart is not None:
        distance[torch.from_numpy(~apart)] = torch.inf
    found: NDArray[np.float32] = (distance.amin(dim=1) / images.shape[1] ** 0.5).numpy()
    return found


def distances(cohort: Cohort, synthetic: Tensor) -> dict[str, NDArray[np.float32]]:
    """How near the images of a cohort are to synthetic ones and to each other.

    To as many of either, at most 2,048, of the cohort evenly spread, so that they compare; and to
    all of the synthetic ones, among which a copy may be any.

    Args:
        cohort: N images.
        synthetic: (M, C, H, W) brightness.

    Returns:
        ``nearest`` (N,) to as many synthetic images as real ones; ``nearest_of_all`` (N,) to any
        synthetic image; ``nearest_real`` (N,) to a real one of another patient, infinite where
        there is none.
    """
    among = pictures.spread(len(cohort), min(SYNTHETIC, len(synthetic)))
    real = _small(torch.from_numpy(cohort.images(among)))
    made = _small(synthetic)
    found: dict[str, list[NDArray[np.float32]]] = {
        "nearest": [],
        "nearest_of_all": [],
        "nearest_real": [],
    }
    for rows in batches(cohort):
        images = _small(torch.from_numpy(cohort.images(rows)))
        apart = cohort.patient_index[rows][:, None] != cohort.patient_index[among]
        found["nearest"].append(nearest(images, made[: len(among)]))
        found["nearest_of_all"].append(nearest(images, made))
        found["nearest_real"].append(nearest(images, real, apart))
    return {name: np.concatenate(pieces) for name, pieces in found.items()}


def memory(
    found: Evidence,
    patients: NDArray[np.int64],
    *,
    resamples: int,
    generator: np.random.Generator,
) -> dict[str, Estimate]:
    """``nearest`` and ``copies`` of what `distances` found; see the table of this module."""
    near, nearest_of_all, other = (
        found[name] for name in ("nearest", "nearest_of_all", "nearest_real")
    )
    known = np.isfinite(other) & (other > 0)
    parts = {"nearest": (np.where(known, near, 0), np.where(known, other, 0))}
    copies = {"copies": np.where(known, _PERCENT * (nearest_of_all < _COPY * other), np.nan)}
    return ratios(parts, patients, resamples=resamples, generator=generator) | means(
        copies, patients, resamples=resamples, generator=generator
    )


def _distances_chart(evidence: Evidence) -> list[Chart]:
    """The distribution of both distances."""
    known = np.isfinite(evidence["nearest_real"])
    if not known.any():
        return []
    part = np.linspace(0, 1, 101)
    lines = [
        Line(name, np.quantile(evidence[key][known], part), part)
        for name, key in (
            ("to a synthetic image", "nearest"),
            ("to one of another patient", "nearest_real"),
        )
    ]
    return [
        Chart(
            "Distance of real images to the nearest other one",
            "root mean square difference, brightness",
            "part of the images",
            lines,
            "If the synthetic images were copies of real ones, their curve would begin at zero.",
        )
    ]


# --- The judge ----------------------------------------------------------------------------------

_JUDGES, _JUDGE_STEPS, _JUDGE_BATCH, _JUDGE_RATE = 3, 150, 64, 3e-3
_JUDGE_WIDTH, _JUDGE_SIDE, _JUDGE_NOISE = 16, 16, 0.5


class _Judge(nn.Module):
    """A small network on images at most 16 pixels a side, each centred and scaled by itself.

    Two strided convolutions with GroupNorm and ReLU, the mean over the image, one number a class.
    It learns from noisy images. Made small and noisy, images lose the finest texture, by which
    synthetic ones differ from real ones and which says nothing of their class.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        filters = _JUDGE_WIDTH
        self.layers = nn.Sequential(
            nn.Conv2d(channels, filters, kernel_size=5, stride=2, padding=2),
            nn.GroupNorm(4, filters),
            nn.ReLU(),
            nn.Conv2d(filters, 2 * filters, kernel_size=3, stride=2, padding=1),
            nn.GroupNorm(4, 2 * filters),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * filters, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in any scale to (B, classes)."""
        small = _shrunk(images, _JUDGE_SIDE)
        deviation, mean = torch.std_mean(small, dim=(1, 2, 3), keepdim=True)
        seen = (small - mean) / deviation.clamp_min(1e-4)
        if self.training:
            seen = seen + _JUDGE_NOISE * torch.randn_like(seen)
        given: Tensor = self.layers(seen)
        return given


class _Judges(nn.Module):
    """The mean of several: one alone depends on how it began."""

    def __init__(self, judges: Sequence[nn.Module]) -> None:
        super().__init__()
        self.judges = nn.ModuleList(judges)

    def forward(self, images: Tensor) -> Tensor:
        """As each of them."""
        return torch.stack([judge(images) for judge in self.judges]).mean(dim=0)


def _taught(
    images: Tensor, has: Tensor, loss_of: Callable[[Tensor, Tensor], Tensor], seed: int
) -> nn.Module:
    """Judges taught on these images, in evaluation mode; the same ones give the same judges."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(seed)
        judges = _Judges([_Judge(images.shape[1], has.shape[1]) for _ in range(_JUDGES)])
        for judge in judges.judges:
            optimizer = torch.optim.Adam(judge.parameters(), lr=_JUDGE_RATE)
            for _ in range(_JUDGE_STEPS):
                rows = torch.randint(len(images), (_JUDGE_BATCH,))
                loss = loss_of(judge(images[rows]), has[rows])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    return judges.eval()


def _small(images: Tensor) -> Tensor:
    """(N, D): the pixels of images made at most 32 a side."""
    return _shrunk(images, _LARGEST_SIDE).flatten(1)


def _shrunk(images: Tensor, side: int) -> Tensor:
    """The means of squares of pixels, so large that no side is above `side`."""
    times = -(-max(images.shape[-2:]) // side)
    return images if times == 1 else functional.avg_pool2d(images, times, ceil_mode=True)


def _pair(network: nn.Module) -> Pair:
    return cast("Pair", network)


def _made(generator: nn.Module, has: Tensor, source: torch.Generator) -> Tensor:
    """Synthetic images of these classes, (N, classes) of 0 and 1."""
    latent = cast("Generator", generator).given - has.shape[1]
    noise = torch.randn(len(has), latent, generator=source, device=source.device)
    images: Tensor = generator(torch.cat([noise.to(has), has], dim=1))
    return images


def _judged(outputs: Tensor, has: Tensor) -> Tensor:
    """(R,) what a discriminator says of images that have these classes."""
    return outputs[:, 0] + (outputs[:, 1:] * has).sum(dim=1)
