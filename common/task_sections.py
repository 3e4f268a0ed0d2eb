"""What may stand in ``[task]`` of a run's file: one class a task, found by ``task.name``.

Nothing here imports torch: a policy, a ledger and a worker of the intake read specs too. What a
task does is in the file of its name in `common.tasks`, and `common.tasks.TASKS` joins the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from common.spec import Input, Metric, NonNegative, Rate, Task

if TYPE_CHECKING:
    from common.spec import RunSpec

Labelled = Literal["binary", "multiclass", "multilabel"]


class _Labels(Task):
    """Labels of whole images: for ``binary`` the negative class, then the positive."""

    kind: Labelled = "binary"
    classes: Annotated[tuple[str, ...], Field(min_length=2)]

    @model_validator(mode="after")
    def _one_negative_one_positive(self) -> Self:
        if self.kind == "binary" and len(self.classes) != 2:
            raise ValueError("a binary task has exactly two classes: the negative, the positive")
        return self


class Classification(_Labels):
    """What is learned. ``classes`` names them: for ``binary`` the negative, then the positive."""

    LOSSES: ClassVar[tuple[str, ...]] = ("cross-entropy", "mse", "focal")
    METRICS: ClassVar[Mapping[str, Metric]] = {
        "auroc": Metric("AUROC"),
        "auprc": Metric("AUPRC"),
        "accuracy": Metric("Accuracy"),
        "sensitivity": Metric("Sensitivity", chooses=False),
        "specificity": Metric("Specificity", chooses=False),
        "f1": Metric("F1"),
        "brier": Metric("Brier score", lower_is_better=True),
        "ece": Metric(
            "Calibration error",
            lower_is_better=True,
            chooses=False,
            note="A calibration error is never negative and grows by chance in small samples, so "
            "its interval lies high.",
        ),
    }
    HEADLINE: ClassVar[str] = "auroc"
    DRAWN: ClassVar[tuple[str, ...]] = ("auroc", "auprc", "accuracy", "brier")
    CAVEATS: ClassVar[tuple[str, ...]] = (
        "Its probabilities are calibrated to the prevalence of its training data at best.",
    )
    NETWORK: ClassVar[str] = "vector"
    COUNTED: ClassVar[bool] = True
    STUDIES: ClassVar[bool] = True

    name: Literal["classification"] = "classification"

    @property
    def outputs(self) -> int:
        """Units of the network's last layer: one for a binary task, else one a class."""
        return 1 if self.kind == "binary" else len(self.classes)


class Segmentation(Task):
    """Which class each pixel (or voxel) has. The first of ``classes`` is the background."""

    LOSSES: ClassVar[tuple[str, ...]] = ("cross-entropy", "focal", "dice", "dice-cross-entropy")
    METRICS: ClassVar[Mapping[str, Metric]] = {
        "dice": Metric("Dice", note="Each is by class and patient, averaged over both."),
        "hausdorff95": Metric("Hausdorff distance (95 %)", lower_is_better=True, unit="px"),
        "volume-error": Metric("Volume error", lower_is_better=True, unit="%"),
    }
    NETWORK: ClassVar[str] = "map"
    VOLUMES: ClassVar[bool] = True

    name: Literal["segmentation"]
    kind: Literal["mask"] = "mask"
    classes: Annotated[tuple[str, ...], Field(min_length=2)]

    def metrics(self, seen: Input) -> Mapping[str, Metric]:
        """Of volumes lengths are in millimetres, and there is a difference in millilitres."""
        if seen.depth is None:
            return self.METRICS
        distance = self.METRICS["hausdorff95"]._replace(unit="mm")
        difference = Metric("Volume difference", lower_is_better=True, unit="ml")
        return {**self.METRICS, "hausdorff95": distance, "volume-difference": difference}


class Detection(Task):
    """Where things are, each in a box. ``most_boxes``: of one image; an image with more is refused.

    ``classes`` has no background.
    """

    LOSSES: ClassVar[tuple[str, ...]] = ("heatmap",)
    LOSS_SETTINGS: ClassVar[tuple[str, ...]] = ("class_weights",)
    METRICS: ClassVar[Mapping[str, Metric]] = {
        "map50": Metric(
            "mAP at 0.5",
            note="mAP: the average precision, mean over the classes, of boxes that overlap a true "
            "one (IoU) by at least 0.5, or mean over 0.5 to 0.95.",
        ),
        "map": Metric("mAP at 0.5:0.95"),
        "froc": Metric(
            "FROC sensitivity",
            note="FROC sensitivity: where 1/8, 1/4, 1/2, 1, 2, 4 and 8 false positives an image "
            "are allowed, the mean of these seven.",
        ),
    }
    NETWORK: ClassVar[str] = "boxes"

    name: Literal["detection"]
    kind: Literal["boxes"] = "boxes"
    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    most_boxes: Annotated[int, Field(ge=1, le=1024)] = 64

    @property
    def outputs(self) -> int:
        """Maps: the centres of each class, width and height, and the centre's offset."""
        return len(self.classes) + 4


class Reconstruction(Task):
    """An image from a smaller form of itself, or from a noisy one; any cohort serves.

    ``goal``: ``compress`` and ``anomaly`` see the image as it is, ``denoise`` with Gaussian noise
    of the standard deviation ``noise`` in brightness. ``code``: channels of the map that a network
    with a code passes an image through, at a quarter of either side. ``kl_weight`` is that of a
    variational network's divergence. ``classes`` are those of a cohort with labels, the first one
    the normal; for ``anomaly`` only images of the first class are learned from.
    """

    LOSSES: ClassVar[tuple[str, ...]] = ("mse", "l1")
    LOSS_SETTINGS: ClassVar[tuple[str, ...]] = ()
    METRICS: ClassVar[Mapping[str, Metric]] = {
        "psnr": Metric("PSNR", unit="dB"),
        "ssim": Metric("SSIM"),
        "mse": Metric("Mean squared error", lower_is_better=True),
        "gain": Metric(
            "PSNR above what needs no training",
            unit="dB",
            note="What needs no training: a median filter, or as many coefficients of the cosine "
            "transform as the code has numbers.",
        ),
        "ratio": Metric("Compression ratio", unit=": 1", chooses=False),
        "anomaly-auroc": Metric("AUROC of the anomaly score"),
    }
    CAVEATS: ClassVar[tuple[str, ...]] = (
        "What it gives is an estimate: a small finding may be smoothed away, or be made up.",
    )
    NETWORK: ClassVar[str] = "image"

    name: Literal["reconstruction"]
    kind: Literal["none"] = "none"
    goal: Literal["compress", "denoise", "anomaly"] = "compress"
    noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    code: Annotated[int, Field(ge=1, le=1024)] = 4
    kl_weight: NonNegative = 0.0

    @model_validator(mode="after")
    def _noise_is_for_denoising(self) -> Self:
        if (self.goal == "denoise") != (self.noise > 0):
            raise ValueError(
                f"goal = {self.goal!r} with noise = {self.noise:g}: expected a noise above 0 for "
                "'denoise' and none for any other goal"
            )
        return self

    def problem_with(self, kind: str, classes: tuple[str, ...]) -> str:
        """Nothing, unless the run names classes, of which the first is the normal one."""
        if not self.classes or kind == "none" or classes == self.classes:
            return ""
        return f"task.classes is {classes}, the run asks for {self.classes}"

    def check(self, spec: RunSpec) -> None:
        """As `Task.check`; an image is given back in brightness, so its scale must be known."""
        super().check(spec)
        if spec.input.normalize != "literal":
            raise ValueError(
                f"input.normalize = {spec.input.normalize!r}: an image cannot be given back in "
                "brightness from that; write 'literal', with mean and std"
            )
        if spec.evaluation.metric == "anomaly-auroc" and self.goal == "denoise":
            raise ValueError(
                "evaluation.metric = 'anomaly-auroc': task.goal is 'denoise', which scores no "
                "anomalies; write 'psnr'"
            )


class Generation(_Labels):
    """New images like those of the sites, of the classes that are named.

    ``latent``: numbers that an image is drawn from. ``generator_steps`` of the generator follow
    each step of the discriminator, at ``generator_learning_rate``.
    """

    LOSSES: ClassVar[tuple[str, ...]] = ("adversarial", "wasserstein")
    LOSS_SETTINGS: ClassVar[tuple[str, ...]] = ()
    METRICS: ClassVar[Mapping[str, Metric]] = {
        "tstr-auroc": Metric(
            "AUROC, trained on synthetic images",
            note="AUROC and accuracy are of small classifiers that have seen synthetic images "
            "alone, on real ones.",
        ),
        "tstr-accuracy": Metric("Accuracy, trained on synthetic images"),
        "nearest": Metric(
            "Distance to the nearest synthetic image",
            chooses=False,
            note="The distance is that of a real image, for one to the nearest image of another "
            "patient among as many.",
        ),
        "copies": Metric(
            "Images with a synthetic one as near as a copy",
            lower_is_better=True,
            unit="%",
            chooses=False,
            note="As near as a copy: nearer than half of the way to the nearest image of another "
            "patient.",
        ),
    }
    CAVEATS: ClassVar[tuple[str, ...]] = (
        "What it makes is no evidence of anything: it must stay marked as synthetic, and be kept "
        "out of what a diagnosis or a test of a model rests on.",
        "Made without differential privacy, it may give patients away.",
    )
    NETWORK: ClassVar[str] = "pair"
    VIEWS: ClassVar[int] = 2

    name: Literal["generation"]
    latent: Annotated[int, Field(ge=1, le=4096)] = 64
    generator_learning_rate: Rate = 2e-4
    generator_steps: Annotated[int, Field(ge=1, le=64)] = 1

    @property
    def outputs(self) -> int:
        """Units of the discriminator's last layer: one for any image, and one a class."""
        return 1 + len(self.classes)
