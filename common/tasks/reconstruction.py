"""Reconstruction: an image out of a narrow code, or out of a noisy image of itself.

=============  ==================================================================================
psnr           10 log10(1 / mean squared error) of brightness in 0..1; at most 100 dB
ssim           structural similarity (Wang et al. 2004): Gaussian window of 11 pixels, sigma 1.5
mse            mean squared error of brightness
gain           PSNR above that of the best reference below
ratio          numbers of an image for one of its code; none for a network without a code
anomaly-auroc  AUROC of the anomaly score for the images that are not of the first class; none
               where the cohort has no labels, or under noise
=============  ==================================================================================

Each is a figure by image, averaged over images, but the AUROC. References are what needs no
training: for ``denoise`` the noisy image itself and a median filter of 3x3 and of 5x5 pixels; else
as many coefficients of the discrete cosine transform as the code has numbers, the lowest
frequencies of the whole image. What is compared is cut to 0..1 first, for all alike.

The anomaly score of an image is its squared error for one of the reference that keeps a sixteenth
of its numbers. The squared error itself says above all how much detail an image has: whatever was
learned, a hazy image is given back well (Serrà et al. 2020, arXiv:1909.11480).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.functional.image import structural_similarity_index_measure

from common.cohort import Cohort
from common.errors import ModelError
from common.spec import RunSpec
from common.task_sections import Reconstruction as Section
from common.tasks import pictures, words
from common.tasks.answers import Answer
from common.tasks.curves import Column, roc
from common.tasks.estimates import Estimate, Floats, estimates, means, resampler
from common.tasks.exhibits import Chart, Exhibit, Gallery, Line, Table
from common.tasks.metrics import auroc, ranking
from common.tasks.preprocess import normalise
from common.tasks.task import Evidence, Task, batches

_SMALLEST_ERROR = 1e-10  # 100 dB, far below one grey level of 16 bits
_MEDIANS = (3, 5)
_RATIOS = (2, 4, 8, 16, 32, 64)
_USUAL = 16  # of these: what an anomaly score is relative to
_UNKNOWN = -1
_STRONGER = 4  # times that a difference is shown


class Reconstruction(Task):
    """Losses, metrics and pictures of a reconstruction.

    A network gives an image in the scale of its input, which the spec's ``mean`` and ``std`` turn
    back to brightness; behind the pixels of a variational one stand the means and the logarithms
    of the variances of its code. An image's loss is the mean over its pixels of the squared
    (``mse``) or absolute (``l1``) difference of brightness, and for a variational network
    ``kl_weight`` times the divergence of its code from the normal one, by pixel of the image as
    well (Kingma and Welling 2014). For ``anomaly`` an image whose label is not the first class
    has the loss zero: it must not be learned.
    """

    def __init__(self, spec: RunSpec) -> None:
        super().__init__(spec)
        self._section = spec.task_as(Section)
        self._pixels = math.prod(spec.input.shape)

    # --- Training -----------------------------------------------------------------------------

    def examples(
        self, images: Tensor, targets: Tensor, network: nn.Module, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The images, noisy where they are to be cleaned; see `Task.examples`.

        Returns:
            (B, C, H, W) what the network sees, and (B, C H W + 1): the clean image, flattened, and
            what its loss is multiplied by.
        """
        weights = torch.ones(len(images), device=images.device)
        if self._section.goal == "anomaly":
            weights = (abnormal(targets) <= 0).to(images)
        wanted = torch.cat([images.flatten(1), weights[:, None]], dim=1)
        if self._section.goal != "denoise":
            return images, wanted
        drawn = torch.randn(images.shape, generator=generator, device=generator.device)
        return images + self._section.noise * drawn.to(images), wanted

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One loss a row: (B, …) as the network gave and `examples`' targets to (B,) float32.

        Raises:
            ModelError: if a shape is another.
        """
        if targets.shape != (len(outputs), self._pixels + 1):
            raise ModelError(
                f"reconstruction met targets of shape {tuple(targets.shape)}; expected "
                f"{(len(outputs), self._pixels + 1)}: the image's pixels and a weight"
            )
        given, code = self._split(outputs)
        difference = given.flatten(1) - targets[:, :-1]
        each = difference.square() if self.spec.loss.name == "mse" else difference.abs()
        losses = each.mean(dim=1) + self._section.kl_weight * self._divergence(code)
        return losses * targets[:, -1]

    def _split(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """The images in brightness (B, C, H, W), and what stands behind them (B, 2 K)."""
        flat = outputs.float().flatten(1)
        given, code = flat[:, : self._pixels], flat[:, self._pixels :]
        if given.shape[1] != self._pixels or code.shape[1] % 2:
            raise ModelError(
                f"reconstruction met outputs of shape {tuple(outputs.shape)}; expected "
                f"{self._pixels} pixels a row, and means and variances of a code or nothing behind"
            )
        mean, std = (
            flat.new_tensor(numbers).view(1, -1, 1, 1)
            for numbers in (self.spec.input.mean, self.spec.input.std)
        )
        return given.reshape(-1, *self.spec.input.shape) * std + mean, code

    def _divergence(self, code: Tensor) -> Tensor:
        """(B,) of the code's normal distribution from the standard one, by pixel of the image."""
        mean, log_variance = code.chunk(2, dim=1)
        terms = mean.square() + log_variance.exp() - 1 - log_variance
        return terms.sum(dim=1) / (2 * self._pixels)

    # --- Evaluation ---------------------------------------------------------------------------

    @torch.no_grad()
    def evidence(self, network: nn.Module, cohort: Cohort, device: torch.device) -> Evidence:
        """As `Task.evidence`, of noisy images where they are to be cleaned.

        The noise of an image follows from the spec's seed and the image's number.
        """
        code = getattr(network, "code_numbers", 0)
        pieces = []
        for rows in batches(cohort):
            images = torch.from_numpy(cohort.images(rows)).to(device)
            outputs = network(normalise(self._seen(images, int(rows[0])), self.spec.input))
            targets = torch.from_numpy(cohort.targets(rows))
            pieces.append(
                dict(self.measured(outputs, images, targets))
                | {"references": self._references(images, int(rows[0]), code)}
            )
        kept = {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}
        kept["code"] = np.full(len(cohort), code, dtype=np.int64)
        return kept

    def measured(self, outputs: Tensor, images: Tensor, targets: Tensor) -> Evidence:
        """Of each image, how far from it the network's is.

        Returns:
            ``mse``, ``psnr`` and ``ssim`` (B,) float32; ``abnormal`` (B,) int64: 1 for an image
            of another class than the first, 0 for the first, -1 without labels; ``finite`` (B,).
        """
        given, _ = self._split(outputs)
        errors, similar = compare(given, images)
        return {
            "mse": errors.cpu().numpy(),
            "psnr": psnr(errors).cpu().numpy(),
            "ssim": similar.cpu().numpy(),
            "abnormal": abnormal(targets).cpu().numpy(),
            "finite": outputs.flatten(1).isfinite().all(dim=1).cpu().numpy(),
        }

    def _seen(self, images: Tensor, first: int) -> Tensor:
        """The images as a network sees them in evaluation."""
        if self._section.goal != "denoise":
            return images
        drawn = [
            np.random.default_rng([self.spec.seed, first + row]).standard_normal(
                images.shape[1:], dtype=np.float32
            )
            for row in range(len(images))
        ]
        return images + self._section.noise * torch.from_numpy(np.stack(drawn)).to(images)

    def _references(self, images: Tensor, first: int, code: int) -> NDArray[np.float32]:
        """(B, references, 2): PSNR and SSIM of each of what needs no training."""
        if self._section.goal == "denoise":
            seen = self._seen(images, first)
            given = [seen, *(median_filter(seen, side) for side in _MEDIANS)]
        else:
            given = [kept_frequencies(images, numbers) for numbers in self._kept(code)]
        compared = [compare(each, images) for each in given]
        figures = [torch.stack([psnr(error), similar], dim=1) for error, similar in compared]
        return torch.stack(figures, dim=1).cpu().numpy()

    def _kept(self, code: int) -> list[int]:
        """How many coefficients the references keep: first as many as the code has numbers."""
        own = [code] if code else []
        return own + [max(1, self._pixels // ratio) for ratio in _RATIOS]

    def pictures(self, network: nn.Module, cohort: Cohort, device: torch.device) -> Evidence:
        """Some images as they are, as they were seen, and as they came out."""
        rows = pictures.spread(len(cohort), self.spec.evaluation.gallery)
        images = torch.from_numpy(cohort.images(rows)).to(device)
        seen = torch.cat([self._seen(images[i : i + 1], int(row)) for i, row in enumerate(rows)])
        given, _ = self._split(network(normalise(seen, self.spec.input)))
        levels = {"images": images, "seen": seen, "given": given}
        return {"gallery_rows": rows} | {
            f"gallery_{name}": pictures.grey_levels(value.cpu().numpy())
            for name, value in levels.items()
        }

    def served(self, outputs: Tensor) -> Mapping[str, Tensor]:
        """The images in brightness, not cut to 0..1."""
        return {"image": self._split(outputs)[0]}

    def without_answers(self) -> str:
        """Why such a model says nothing of an image: it gives one back, unless it scores it."""
        goal = self._section.goal
        return "" if goal == "anomaly" else f"its goal is {goal!r}: it gives images, no answers"

    def answers(self, outputs: Tensor, images: Tensor) -> Sequence[Answer]:
        """The anomaly score of each image."""
        errors, _ = compare(self._split(outputs)[0], images)
        usual, _ = compare(kept_frequencies(images, max(1, self._pixels // _USUAL)), images)
        scores = 10 ** ((psnr(usual) - psnr(errors)) / 10)
        finite = outputs.flatten(1).isfinite().all(dim=1).tolist()
        return [Answer(ok, anomaly=one) for ok, one in zip(finite, scores.tolist(), strict=True)]

    def _scores(self, evidence: Evidence) -> Floats:
        """(N,) anomaly scores, as `answers` gives them."""
        place = self._kept(int(evidence["code"][0])).index(max(1, self._pixels // _USUAL))
        behind = evidence["references"][:, place, 0].astype(np.float64) - evidence["psnr"]
        return np.asarray(10 ** (behind / 10))

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
            return dict.fromkeys(self._section.METRICS, Estimate(None))
        rows = {name: evidence[name] for name in ("psnr", "ssim", "mse")}
        rows["gain"] = evidence["psnr"] - self._best_reference(evidence)
        found = means(rows, patients, resamples=resamples, generator=generator)
        code = int(evidence["code"][0])
        found["ratio"] = Estimate(self._pixels / code if code else None)
        found["anomaly-auroc"] = self._anomaly(evidence, patients, resamples, generator)
        return found

    def _best_reference(self, evidence: Evidence) -> NDArray[np.float32]:
        """(N,) PSNR of the reference that is best on the whole; NaN if there is none."""
        references: NDArray[np.float32] = evidence["references"][:, :, 0]
        if self._section.goal == "denoise":
            return references[:, references.mean(axis=0).argmax()]
        if evidence["code"][0]:
            return references[:, 0]
        return np.full(len(references), np.nan, dtype=np.float32)

    def _anomaly(
        self,
        evidence: Evidence,
        patients: NDArray[np.int64],
        resamples: int,
        generator: np.random.Generator,
    ) -> Estimate:
        truths = evidence["abnormal"] > 0
        if self._section.goal == "denoise" or (evidence["abnormal"] == _UNKNOWN).any():
            return Estimate(None)

        scores = self._scores(evidence)

        def area(weights: Floats) -> dict[str, Floats]:
            return {"area": auroc(ranking(scores, truths, weights))}

        return estimates(area, patients, resamples=resamples, generator=generator)["area"]

    # --- What is shown ------------------------------------------------------------------------

    def exhibits(self, evidence: Evidence, patients: NDArray[np.int64]) -> Sequence[Exhibit]:
        """The network beside its references, the anomaly score's curve, and images."""
        shown: list[Exhibit] = []
        if evidence["finite"].all():
            if self._section.goal == "denoise":
                shown.append(self._denoising(evidence, patients))
            else:
                shown += self._compression(evidence)
            shown += self._anomaly_curve(evidence, patients)
        if len(evidence.get("gallery_rows", ())):
            shown.append(self._gallery(evidence))
        return shown

    def _denoising(self, evidence: Evidence, patients: NDArray[np.int64]) -> Table:
        names = ("The noisy image", *(f"Median filter, {side}x{side} pixels" for side in _MEDIANS))
        columns = [evidence["references"][:, number] for number in range(len(names))]
        columns.append(np.stack([evidence["psnr"], evidence["ssim"]], axis=1))
        rows = []
        for name, column in zip((*names, "The network"), columns, strict=True):
            figures = means(
                {"psnr": column[:, 0], "ssim": column[:, 1]},
                patients,
                resamples=self.spec.evaluation.bootstrap,
                generator=resampler(self.spec.seed, "test"),
            )
            shown = ((figures[key], self._section.METRICS[key]) for key in ("psnr", "ssim"))
            cells = (words.estimate(found, words.digits(metric)) for found, metric in shown)
            rows.append((name, *cells))
        return Table(
            f"Noise of standard deviation {self._section.noise:g} in brightness",
            ("", "PSNR (dB)", "SSIM"),
            rows,
            "Means over images, and 95 % intervals by patient.",
        )

    def _compression(self, evidence: Evidence) -> list[Chart]:
        code, means_of = int(evidence["code"][0]), evidence["references"].mean(axis=0)
        kept = self._kept(code)
        order = np.argsort(kept)[::-1]
        ratios = (self._pixels / np.array(kept))[order]
        charts = []
        for column, (key, name) in enumerate((("psnr", "PSNR (dB)"), ("ssim", "SSIM"))):
            lines = [Line("Lowest frequencies", ratios, means_of[order, column], marks=True)]
            own = float(evidence[key].mean())
            if code:
                at = np.array([self._pixels / code])
                lines.append(Line("The network", at, np.array([own]), marks=True))
            charts.append(
                Chart(
                    f"Compression: {name}",
                    "compression ratio",
                    name,
                    lines,
                    f"The network reaches {own:.3g}"
                    + (f" at a ratio of {self._pixels / code:.3g}." if code else "."),
                    note="By compression ratio: numbers of an image for one that is kept. Beside "
                    "the network: as many coefficients of the cosine transform, the lowest "
                    "frequencies of the whole image.",
                )
            )
        return charts

    def _anomaly_curve(self, evidence: Evidence, patients: NDArray[np.int64]) -> list[Chart]:
        known = self._section.goal == "anomaly" and (evidence["abnormal"] != _UNKNOWN).all()
        if not known:
            return []
        scores = self._scores(evidence).astype(np.float32)
        column = Column(scores, evidence["abnormal"] > 0, patients, self.spec.seed)
        if not column.drawable:
            return []
        curve = roc(column)
        line = Line("", curve.x, curve.y)
        return [
            Chart(
                "Receiver operating curve of the anomaly score",
                "1 − specificity",
                "sensitivity",
                [line],
                "How many of the abnormal images have a larger score than a threshold, against "
                "how many of the normal ones. Dotted: chance.",
                unit_square=True,
                diagonal=True,
            )
        ]

    def _gallery(self, evidence: Evidence) -> Gallery:
        images, seen, given = (evidence[f"gallery_{name}"] for name in ("images", "seen", "given"))
        apart = _STRONGER * np.abs(given.astype(np.int16) - images)
        difference = 255 - np.minimum(apart, 255).astype(np.uint8)
        columns = [images, given, difference]
        if self._section.goal == "denoise":
            columns.insert(1, seen)
        shown = [
            pictures.beside([pictures.canvas(levels) for levels in row])
            for row in zip(*columns, strict=True)
        ]
        what = "noisy, " if self._section.goal == "denoise" else ""
        captions = [self._caption(evidence, int(row)) for row in evidence["gallery_rows"]]
        return Gallery(
            "Images and what came back",
            np.stack(shown),
            captions,
            f"Of each image, from left to right: as it is, {what}as the network gives it, and the "
            "difference.",
            note="The darker the difference, the larger: white is none, black a quarter of the "
            "range of brightness or more.",
        )

    def _caption(self, evidence: Evidence, row: int) -> str:
        psnr, ssim = (float(evidence[name][row]) for name in ("psnr", "ssim"))
        said = f"PSNR {psnr:.1f} dB, SSIM {ssim:.2f}"
        what = evidence["abnormal"][row]
        if self._section.goal == "anomaly" and what != _UNKNOWN:
            score = float(self._scores(evidence)[row])
            said = f"{'abnormal' if what > 0 else 'normal'}, score {score:.2f}; {said}"
        return f"Image {row + 1}: {said}"


def abnormal(targets: Tensor) -> Tensor:
    """(B,) int64: 1 where a target holds more than the first class, else 0; -1 without targets.

    Args:
        targets: class numbers, labels, masks, boxes, or nothing, as `Cohort.targets` gives them.
    """
    if targets.dim() > 1 and targets.shape[1] == 0:
        return torch.full((len(targets),), _UNKNOWN, device=targets.device)
    if targets.dim() == 3 and targets.is_floating_point():
        targets = targets[:, :, 4] >= 0  # boxes; a row that is none has the class -1
    elif targets.dim() == 2 and targets.is_floating_point():
        targets = targets[:, 1:]  # of many labels; the first is that of a normal image
    return (targets.reshape(len(targets), -1) > 0).any(dim=1).long()


def compare(given: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) mean squared error and (B,) SSIM of (B, C, H, W) brightness, cut to 0..1."""
    given = given.clamp(0, 1)
    errors = (given - images).square().flatten(1).mean(dim=1)
    similar = structural_similarity_index_measure(given, images, data_range=1.0, reduction="none")
    return errors, similar if isinstance(similar, Tensor) else similar[0]


def psnr(errors: Tensor) -> Tensor:
    """Mean squared errors of brightness in decibels."""
    return -10 * errors.clamp_min(_SMALLEST_ERROR).log10()


def median_filter(images: Tensor, side: int) -> Tensor:
    """The median of the `side` x `side` pixels about each one, mirrored at the border."""
    padded = functional.pad(images, [side // 2] * 4, mode="reflect")
    windows = padded.unfold(2, side, 1).unfold(3, side, 1)
    return windows.flatten(-2).median(dim=-1).values


def kept_frequencies(images: Tensor, numbers: int) -> Tensor:
    """(B, C, H, W) from the lowest of its frequencies, `numbers` of them over all channels.

    By the orthonormal discrete cosine transform (DCT-II) of the whole image; a frequency is low by
    its distance from zero in parts of the sides.
    """
    channels, height, width = images.shape[1:]
    down, right = (_cosines(side).to(images) for side in (height, width))
    distance = (
        (torch.arange(height)[:, None] / height).square() + (torch.arange(width) / width).square()
    ).expand(channels, -1, -1)
    keep = torch.zeros(distance.numel())
    keep[distance.reshape(-1).argsort(stable=True)[:numbers]] = 1
    coefficients = down @ images @ right.T * keep.view(channels, height, width).to(images)
    return down.T @ coefficients @ right


def _cosines(side: int) -> Tensor:
    """(side, side) the orthonormal DCT-II, a row a frequency."""
    frequency, place = torch.arange(side)[:, None], torch.arange(side) + 0.5
    matrix = torch.cos(torch.pi / side * frequency * place) * math.sqrt(2 / side)
    matrix[0] /= math.sqrt(2)
    return matrix
