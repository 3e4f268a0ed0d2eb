"""RunSpec: the one description of a run, written by a person, frozen, the same for every site.

A run's file is TOML. It is read once, strictly: an unknown key is an error, a number is not a
string, and nothing is guessed. What is read becomes canonical JSON, whose SHA-256 is the run's
digest; both are the same whatever the order of the keys, the spelling of a number (``1`` or
``1.0``) and the version of Python. Nothing in a spec is fitted on data: class weights, means and
windows are literals that a person wrote (docs/privacy.md 3).

The file may hold a table ``[simulation]`` as well: where the data of a simulation lies. It is
not part of the spec, has no place in its digest and never travels to a hospital.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from common.errors import SpecError
from common.tasks import TASKS, section_for

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]

# Within these, sums, noise and steps stay far from where float32 loses digits: at a clip norm of
# 1e-45 the noise would round to zero, and a rate of 1e38 would bring what is left back to size.
SMALLEST_CLIP_NORM, LARGEST_CLIP_NORM = 1e-6, 1e6
ClipNorm = Annotated[float, Field(ge=SMALLEST_CLIP_NORM, le=LARGEST_CLIP_NORM)]
Rate = Annotated[float, Field(gt=0, le=1e6)]
CodeString = Annotated[str, Field(pattern=r"^[A-Z0-9_][A-Z0-9_ ]{0,15}$")]  # DICOM's CS
MOST_MODALITIES = 8

_LONGEST_SHOWN, _MOST_ERRORS = 120, 20

Direction = Literal["sagittal", "coronal", "axial"]
AFTER_INTAKE = ("normalize", "mean", "std", "patch", "images", "together", "modalities")
"""Keys of `Input` that say nothing of how a cohort is made: one serves whatever they are."""
MOST_VOXELS = 2**28
"""Of one volume: 1 GiB of float32."""


def _is_none(value: object) -> bool:
    return value is None


def _is_false(value: bool) -> bool:
    return not value


def _is_one(number: int) -> bool:
    return number == 1


def _is_empty(values: tuple[str, ...]) -> bool:
    return not values


def _by(sides: tuple[int, ...]) -> str:
    return " x ".join(map(str, sides))


class Section(BaseModel):
    """A table of the file: frozen, strict, without unknown keys or infinities."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class Metric(NamedTuple):
    """How a metric is written for people.

    Attributes:
        title: such as ``Dice``.
        lower_is_better: as for an error.
        unit: such as ``dB``; empty for a plain number.
        chooses: whether the best model may be chosen by it; not where nonsense reaches the best
            value, as "always ill" does for sensitivity.
        note: how it is to be read, in a sentence; empty where its title says it.
    """

    title: str
    lower_is_better: bool = False
    unit: str = ""
    chooses: bool = True
    note: str = ""


class Task(Section):
    """What is learned: what the tables of all tasks have in common (`common.task_sections`).

    Attributes:
        LOSSES: the values of ``loss.name`` that it has.
        LOSS_SETTINGS: the other keys of ``[loss]`` that mean something to it.
        METRICS: its metrics by name, in the order of a report; a run has `RunSpec.metrics`.
        HEADLINE: the metric on top of a report; empty: that of ``evaluation.metric``.
        DRAWN: metrics that a report draws by round; empty: the first four.
        CAVEATS: what a user of such a model must bear in mind, a sentence each.
        NETWORK: what a network has to give (`common.models.Network.gives`).
        VIEWS: how many rows of a batch one image becomes in training.
        COUNTED: whether a site can release it as noised counts (``evaluation.federated``).
        VOLUMES: whether it takes volumes (``input.depth``).
        STUDIES: whether it takes several images of a study at once (``input.images``,
            ``input.modalities``).
        name: by which the registry (`common.tasks.TASKS`) finds the class of the table.
        kind: what target a cohort must have for each image: a label of a ``binary``,
            ``multiclass`` or ``multilabel`` task, a ``mask``, ``boxes``, or ``none``.
        classes: names of the classes, in the order of their numbers.
    """

    LOSSES: ClassVar[tuple[str, ...]]
    LOSS_SETTINGS: ClassVar[tuple[str, ...]] = ("class_weights", "focal_gamma", "label_smoothing")
    METRICS: ClassVar[Mapping[str, Metric]]
    HEADLINE: ClassVar[str] = ""
    DRAWN: ClassVar[tuple[str, ...]] = ()
    CAVEATS: ClassVar[tuple[str, ...]] = ()
    NETWORK: ClassVar[str]
    VIEWS: ClassVar[int] = 1
    COUNTED: ClassVar[bool] = False
    VOLUMES: ClassVar[bool] = False
    STUDIES: ClassVar[bool] = False

    name: str
    kind: str
    classes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _classes_differ(self) -> Self:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes must be different from each other")
        if unfit := [name for name in self.classes if not (name.strip() and name.isprintable())]:
            raise ValueError(f"classes {unfit!r}: expected names that can be printed")
        return self

    @property
    def outputs(self) -> int:
        """Units or maps of the network's last layer: one a class."""
        return len(self.classes)

    def metrics(self, seen: Input) -> Mapping[str, Metric]:
        """`METRICS`, of such images as a run has."""
        return self.METRICS

    def problem_with(self, kind: str, classes: tuple[str, ...]) -> str:
        """Why a cohort of this kind and these classes does not serve; empty if it does."""
        return "; ".join(
            f"task.{what} is {theirs}, the run asks for {ours}"
            for what, theirs, ours in (
                ("kind", kind, self.kind),
                ("classes", classes, self.classes),
            )
            if theirs != ours
        )

    def check(self, spec: RunSpec) -> None:
        """Check that the other tables of a run fit its task.

        Raises:
            ValueError: beginning with the key at fault.
        """
        chosen, loss, weights = spec.evaluation.metric, spec.loss.name, spec.loss.class_weights
        if loss not in self.LOSSES:
            raise ValueError(
                f"loss.name = {_shown(loss)}: expected one of {', '.join(self.LOSSES)} for a task "
                f"of {self.name}"
            )
        for key, field in Loss.model_fields.items():
            given = getattr(spec.loss, key)
            if key not in ("name", *self.LOSS_SETTINGS) and given != field.default:
                raise ValueError(
                    f"loss.{key} = {_shown(given)}: no loss of {self.name} has it; leave it out"
                )
        _check_loss_settings(spec.loss)
        if weights is not None and len(weights) != len(self.classes):
            raise ValueError(
                f"loss.class_weights has {len(weights)} numbers for {len(self.classes)} "
                "classes; write one literal for each class"
            )
        known = [name for name, metric in spec.metrics.items() if metric.chooses]
        if chosen not in known:
            raise ValueError(
                f"evaluation.metric = {_shown(chosen)}: expected one of {', '.join(known)} for a "
                f"task of {self.name}"
            )
        self._check_studies(spec)
        if spec.augmentation.flip_depth and spec.input.depth is None:
            raise ValueError(
                "augmentation.flip_depth = True: an image has no depth; it is of volumes "
                "([input] depth), leave it out"
            )
        if spec.input.depth is not None and not self.VOLUMES:
            raise ValueError(
                f"input.depth = {spec.input.depth}: {self.name} takes images, no volumes; leave "
                "it out"
            )
        if spec.evaluation.federated is not None and not self.COUNTED:
            raise ValueError(
                f"evaluation.federated: {self.name} has no noised counts that a site could "
                "release; leave the table out"
            )

    def _check_studies(self, spec: RunSpec) -> None:
        """Several images in one decision, of one modality or of many."""
        seen = spec.input
        if not seen.of_studies:
            return
        key = f"input.modalities = {list(seen.modalities)}"
        if not seen.modalities:
            key = f"input.images = {seen.images}"
        if not self.STUDIES:
            raise ValueError(f"{key}: {self.name} takes one image at a time; leave it out")
        if spec.privacy.unit == "image":
            raise ValueError(
                f"{key}: the images of a study are one patient's, and privacy.unit = 'image' "
                "protects one image; write 'patient'"
            )
        if seen.modalities and spec.augmentation.synthetic:
            raise ValueError(
                f"augmentation.synthetic = {spec.augmentation.synthetic}: no synthetic image says "
                "its modality, and input.modalities asks for it; leave one of the two out"
            )


def _check_loss_settings(loss: Loss) -> None:
    """Refuse a setting that the loss, of those that its task has, does not take."""
    if loss.focal_gamma != Loss.model_fields["focal_gamma"].default and loss.name != "focal":
        raise ValueError(
            f"loss.focal_gamma = {loss.focal_gamma:g}: it is of 'focal', and loss.name is "
            f"{_shown(loss.name)}; leave it out"
        )
    if loss.label_smoothing and loss.name == "dice":
        raise ValueError(
            "loss.label_smoothing: 'dice' compares whole masks and takes none; leave it out, or "
            "write 'dice-cross-entropy'"
        )


class Model(Section):
    """Which network of the registry (``cloister models``), and its own options.

    ``sparse``: weights that are exactly zero, as those of a pruned model, stay so in every round.
    ``trained``: all of the network, or its last layer alone.
    """

    name: str
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    width: Annotated[int, Field(ge=4, le=1024)] | None = None
    # Left out of the digest where they say nothing: specs from before them keep theirs.
    sparse: bool = Field(False, exclude_if=_is_false)
    trained: Literal["all", "head"] = Field("all", exclude_if=lambda part: part == "all")


class Start(Section):
    """Where a run begins: at a trained model, the SHA-256 of whose ``model.safetensors`` this is.

    What that model's training has spent is in its own run's record, and in each site's ledger.
    """

    model_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Input(Section):
    """What the network sees, and how an image of any size becomes that.

    ``fit``: ``pad`` keeps everything and the aspect, ``crop`` keeps the aspect and the centre,
    ``stretch`` keeps neither. ``window``: ``dicom`` is the file's own VOI LUT or window and else
    the range of its values; ``range`` is the range of the image's values; ``percentile`` is its
    1st to 99th percentile. ``normalize``: ``literal`` is (x - mean) / std with the numbers given
    here (x in 0..1), ``image`` uses each image's own mean and deviation. ``frames``: which frame
    of a multi-frame file. ``images``: how many images of a study go into one decision; 1: each
    image for itself.

    With ``modalities`` a decision is about images of several modalities, each with an encoder of
    its own, and ``images`` are those *of each*: ``["CT", "MR"]`` with ``images = 4`` takes up to
    four CT and four MR images. Their order is that of the places a network sees. They are what
    Modality (0008,0060) says, or what the label table says instead (``FRONTAL``, ``LATERAL``).
    What is of no modality in the list is not seen; a study in which one is absent is no error: its
    places stay empty. ``together``: what one decision is about, the images of a ``study`` or all of
    a ``patient``, whose CT and MR mostly are two studies.

    With ``depth`` an image is a volume on the grid depth x height x width, whose voxels are
    ``spacing`` millimetres apart (of slices, rows, columns); it is resampled to that, never
    scaled. ``pad`` then refuses a volume that is larger than the grid, ``crop`` cuts it around its
    middle, and both fill up what is smaller. ``direction`` says which slices lie along the depth:
    ``axial`` ones from the feet to the head, ``coronal`` from the back to the front, ``sagittal``
    from the left to the right, whichever way they were taken. A window is that of the volume as a
    whole. ``patch`` (depth, height, width) is what the network sees of a volume at once: in
    training one at a random place, in evaluation all, overlapping by half; without it, everything.
    """

    channels: Literal[1, 3] = 1
    height: Annotated[int, Field(ge=8, le=4096)]
    width: Annotated[int, Field(ge=8, le=4096)]
    fit: Literal["pad", "crop", "stretch"] = "pad"
    window: Literal["dicom", "range", "percentile"] = "dicom"
    frames: Literal["refuse", "first", "middle", "all"] = "refuse"
    normalize: Literal["literal", "image"] = "literal"
    mean: tuple[float, ...] = (0.5,)
    std: tuple[Positive, ...] = (0.25,)
    # Left out of the digest where they are not there: specs of flat images keep theirs.
    depth: int | None = Field(None, ge=8, le=4096, exclude_if=_is_none)
    spacing: tuple[Positive, Positive, Positive] | None = Field(None, exclude_if=_is_none)
    direction: Direction | None = Field(None, exclude_if=_is_none)
    patch: tuple[Count, Count, Count] | None = Field(None, exclude_if=_is_none)
    images: int = Field(1, ge=1, le=64, exclude_if=_is_one)
    together: Literal["study", "patient"] = Field("study", exclude_if=lambda of: of == "study")
    modalities: tuple[CodeString, ...] = Field((), exclude_if=_is_empty, max_length=MOST_MODALITIES)

    @model_validator(mode="after")
    def _modalities_differ(self) -> Self:
        twice = sorted({name for name in self.modalities if self.modalities.count(name) > 1})
        if twice:
            raise ValueError(f"modalities has {twice[0]!r} twice; each has one encoder of its own")
        if self.together == "patient" and not self.of_studies:
            raise ValueError(
                "together = 'patient' is of several images in one decision; write images or "
                "modalities as well, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _one_number_a_channel(self) -> Self:
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if len(numbers) not in (1, self.channels):
                raise ValueError(f"{name} needs one number, or one for each of {self.channels}")
        return self

    @model_validator(mode="after")
    def _a_volume_is_described(self) -> Self:
        described = {"spacing": self.spacing, "direction": self.direction}
        if self.depth is None:
            for name, given in (*described.items(), ("patch", self.patch)):
                if given is not None:
                    raise ValueError(f"{name} is of volumes; write depth as well, or leave it out")
            return self
        for name, given in described.items():
            if given is None:
                raise ValueError(f"depth = {self.depth}: {name} is missing, which a volume needs")
        return self._checked_volume()

    def _checked_volume(self) -> Self:
        grid = self.sides
        if self.fit == "stretch" or self.frames != "refuse":
            raise ValueError(
                f"fit = {self.fit!r}, frames = {self.frames!r}: a volume is never stretched and "
                "has all its frames; write fit = 'pad' or 'crop', and leave frames out"
            )
        if math.prod(grid) > MOST_VOXELS:
            raise ValueError(f"a grid of {_by(grid)} voxels; at most {MOST_VOXELS} are held")
        if self.patch is not None and any(
            p > side for p, side in zip(self.patch, grid, strict=True)
        ):
            raise ValueError(f"patch of {_by(self.patch)} in a grid of {_by(grid)}: it is larger")
        return self

    @property
    def sides(self) -> tuple[int, ...]:
        """(height, width), or (depth, height, width) of a volume."""
        return (
            (self.height, self.width)
            if self.depth is None
            else (self.depth, self.height, self.width)
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width), or (channels, depth, height, width) of a volume."""
        return self.channels, *self.sides

    @property
    def seen(self) -> tuple[int, ...]:
        """The sides of what a network sees at once: the patch, or all."""
        return self.patch or self.sides

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of what a network sees at once, of a study with its images before all."""
        one = self.channels, *self.seen
        return (self.places, *one) if self.of_studies else one

    @property
    def of_studies(self) -> bool:
        """Whether one decision is about several images."""
        return self.images > 1 or bool(self.modalities)

    @property
    def places(self) -> int:
        """Images that one decision has room for, those of the first modality first."""
        return self.images * max(1, len(self.modalities))

    @property
    def row_name(self) -> str:
        """What one answer is about: ``image``, ``volume``, ``study`` or ``patient``."""
        if self.of_studies:
            return self.together
        return "image" if self.depth is None else "volume"

    @property
    def preprocessing_digest(self) -> str:
        """SHA-256 of what intake does to an image; a cohort made otherwise does not fit the run."""
        kept = self.model_dump(mode="json", exclude=set(AFTER_INTAKE))
        return hashlib.sha256(_canonical(kept)).hexdigest()


Behind = Literal["protected", "unprotected"]
"""Whether the patients behind a site's synthetic images are known to be protected, as it says."""


class Augmentation(Section):
    """Random changes of each image, drawn anew each time it is used.

    ``rotate`` and ``shear`` in degrees, ``shift`` in parts of the image's side, ``zoom`` as a
    relative change; each is drawn uniformly from minus to plus the number. ``multiplicity``
    copies of a patient's image are averaged before clipping, which costs no privacy (De et al.
    2022, arXiv:2204.13650). ``synthetic`` images are expected in a batch beside the patients,
    from a synthetic cohort that each site names; no patient stands behind them. ``flip_depth``:
    the order of a volume's slices.
    ``synthetic_without_privacy`` takes sites whose images are not known to be of a generator that
    protected its own patients: the run's figures then do not cover those (docs/privacy.md).
    """

    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    shift: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    shear: Annotated[float, Field(ge=0, le=45)] = 0.0
    zoom: Annotated[float, Field(ge=0, lt=1)] = 0.0
    flip_horizontal: bool = False
    flip_vertical: bool = False
    flip_depth: bool = Field(False, exclude_if=lambda said: not said)
    multiplicity: Annotated[int, Field(ge=1, le=64)] = 1
    # Left out of the digest where it is 0, or false: specs from before them keep theirs.
    synthetic: int = Field(0, ge=0, le=65536, exclude_if=lambda number: number == 0)
    synthetic_without_privacy: bool = Field(False, exclude_if=lambda said: not said)


class Loss(Section):
    """The loss of one patient. ``class_weights`` are literals, one a class, never counted.

    ``name``: one that the task has (`common.task_sections`).
    """

    name: str = "cross-entropy"
    class_weights: tuple[Positive, ...] | None = None
    focal_gamma: NonNegative = 2.0
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0


class Sgd(Section):
    """Stochastic gradient descent with momentum, started afresh each round."""

    name: Literal["sgd"]
    learning_rate: Rate
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: NonNegative = 0.0


class Adam(Section):
    """Adam, or AdamW (decoupled weight decay), started afresh each round."""

    name: Literal["adam", "adamw"]
    learning_rate: Rate
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    weight_decay: NonNegative = 0.0


class Schedule(Section):
    """The learning rate over the run's local steps, as a factor of the optimiser's rate.

    ``constant``; ``exponential`` falls to ``final`` by the last step; ``cosine`` likewise along
    half a cosine; ``cyclical`` goes from ``final`` to 1 and back in ``cycles`` triangles.
    ``warmup_rounds`` rise linearly to 1 first.
    """

    name: Literal["constant", "exponential", "cosine", "cyclical"] = "constant"
    final: Annotated[float, Field(gt=0, le=1)] = 0.01
    cycles: Count = 1
    warmup_rounds: Annotated[int, Field(ge=0)] = 0


class Local(Section):
    """A round at a site: ``steps`` of DP-SGD with ``batch_size`` patients *expected* in each.

    A patient is sampled with probability batch_size / declared size of the site, so a batch is
    larger or smaller by chance. ``precision``: ``bfloat16`` is used where the device has it;
    gradient norms are float32 always.
    """

    steps: Count = 1
    batch_size: Count
    precision: Literal["float32", "bfloat16"] = "float32"


class DpSgd(Section):
    """Differential privacy by DP-SGD (Abadi et al. 2016) with Poisson sampling of the unit.

    Either ``noise_multiplier`` (the same for every site, whose epsilon follows from its declared
    size) or ``target_epsilon`` (each site's noise follows from its declared size). ``delta`` must
    be below 1 / the site's declared size. Adjacency: one unit's whole record added or removed.
    """

    mechanism: Literal["dp-sgd"]
    unit: Literal["patient", "image"] = "patient"
    clip_norm: ClipNorm = 1.0
    noise_multiplier: Positive | None = None
    target_epsilon: Positive | None = None
    delta: OpenFraction

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ValueError("write either noise_multiplier or target_epsilon, one of the two")
        return self


class NoPrivacy(Section):
    """No differential privacy, in so many words. A node refuses it unless its policy says yes."""

    mechanism: Literal["none"]
    unit: Literal["patient", "image"] = "patient"


class Federation(Section):
    """How long to wait and for how many.

    A round closes when every invited site has answered, or when ``deadline_seconds`` have passed
    and at least ``quorum`` updates came. Without the quorum the run stops at its last round.
    """

    quorum: Count = 1
    deadline_seconds: Positive = 3600.0


class _Strategy(Section):
    """What all strategies share.

    ``weighting``: by the sites' declared sizes, or all equal. ``average_decay``: the evaluated
    model is an exponential moving average of the global one (0: it is the global one).
    ``max_update_norm``: an update with a larger L2 norm is rejected by name.
    """

    weighting: Literal["declared", "uniform"] = "declared"
    average_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    max_update_norm: Positive | None = None


class FedAvg(_Strategy):
    """McMahan et al. 2017: the weighted mean of the updates."""

    strategy: Literal["fedavg"]


class FedProx(_Strategy):
    """Li et al. 2020: FedAvg with a proximal term mu/2 |w - w_global|^2 at the sites."""

    strategy: Literal["fedprox"]
    mu: NonNegative


class FedAvgM(_Strategy):
    """Hsu et al. 2019: momentum on the mean update."""

    strategy: Literal["fedavgm"]
    server_learning_rate: Rate = 1.0
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9


class FedOpt(_Strategy):
    """Reddi et al. 2021: an adaptive optimiser on the mean update."""

    strategy: Literal["fedadam", "fedyogi", "fedadagrad"]
    server_learning_rate: Rate = 0.01
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Positive = 1e-3


class TrimmedMean(_Strategy):
    """Yin et al. 2018: drop the ``trim`` part at either end of each coordinate, then the mean."""

    strategy: Literal["trimmed-mean"]
    trim: Annotated[float, Field(gt=0, lt=0.5)] = 0.2


class Median(_Strategy):
    """Yin et al. 2018: the median of each coordinate."""

    strategy: Literal["median"]


class Krum(_Strategy):
    """Blanchard et al. 2017: the mean of the ``keep`` updates closest to their neighbours."""

    strategy: Literal["krum"]
    byzantine: Annotated[int, Field(ge=0)] = 1
    keep: Count = 1


STREAMING = ("fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad")
ALL_AT_ONCE = ("trimmed-mean", "median", "krum")

Aggregation = Annotated[
    FedAvg | FedProx | FedAvgM | FedOpt | TrimmedMean | Median | Krum,
    Field(discriminator="strategy"),
]


class FederatedEvaluation(Section):
    """An evaluation on each site's own held-out patients, once, of the final model.

    A site releases noised counts at ``bins`` public thresholds (`common.tasks.counts`), which it
    books like a round of training: `noise_multiplier` is the noise over the table's sensitivity.
    Only sites whose policy allows it take part in such a run. ``target_epsilon`` covers training
    and this together.
    """

    noise_multiplier: Positive
    bins: Annotated[int, Field(ge=2, le=1000)] = 20


class Evaluation(Section):
    """The central evaluation after each ``every``-th round and the last.

    The cohort's patients are split once into a validation part, which chooses the best model and
    stops the run early after ``patience`` evaluations without ``min_delta`` of gain (0: never),
    and a test part, which makes the headline. ``metric``: one that the task has
    (`common.task_sections`). ``bootstrap`` resamples of patients give the 95 % intervals (0: none).
    ``gallery``: how many images of the test part the report may show, where its hospital permits.
    """

    every: Count = 1
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.3
    metric: str = "auroc"
    threshold: OpenFraction = 0.5
    patience: Annotated[int, Field(ge=0)] = 0
    min_delta: NonNegative = 0.0
    bootstrap: Annotated[int, Field(ge=0, le=10_000)] = 500
    # Left out of the digest where it is 0: specs from before it keep theirs.
    gallery: Annotated[int, Field(ge=0, le=64, exclude_if=lambda number: number == 0)] = 0
    federated: FederatedEvaluation | None = None


class Use(Section):
    """For which images the model is meant, as its operator declares; nothing is said by default.

    ``modalities`` and ``body_parts`` as DICOM writes them in Modality (0008,0060) and
    BodyPartExamined (0018,0015), such as ``CR`` and ``CHEST``. ``smallest_side`` and
    ``largest_side``: the least and the greatest height and width of a source image, in pixels.
    ``cloister predict`` refuses any other image, and one that does not say what it is.
    """

    modalities: tuple[CodeString, ...] = ()
    body_parts: tuple[CodeString, ...] = ()
    smallest_side: Count | None = None
    largest_side: Count | None = None

    @model_validator(mode="after")
    def _a_range(self) -> Self:
        if (self.smallest_side or 1) > (self.largest_side or math.inf):
            raise ValueError(
                f"smallest_side = {self.smallest_side} is above largest_side = {self.largest_side}"
            )
        return self


_Section = TypeVar("_Section", bound=Task)


class RunSpec(Section):
    """A whole run. Read it with `read_run_file` or `RunSpec.from_json`.

    What is read is of a class of its own, in which ``task`` is the section of its task.
    """

    schema_version: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9-]{0,62}$")]
    run_id: Annotated[str, Field(pattern=r"^[a-z0-9-]{0,100}$")] = ""
    operator: Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9@_.-]{0,62})?$")] = ""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    rounds: Annotated[int, Field(ge=1, le=100_000)]
    task: Task
    model: Model
    input: Input
    augmentation: Augmentation = Augmentation()
    loss: Loss = Loss()
    optimizer: Annotated[Sgd | Adam, Field(discriminator="name")]
    schedule: Schedule = Schedule()
    local: Local
    privacy: Annotated[DpSgd | NoPrivacy, Field(discriminator="mechanism")]
    federation: Federation = Federation()
    aggregation: Aggregation = FedAvg(strategy="fedavg")
    evaluation: Evaluation = Evaluation()
    # Left out of the digest where it says nothing: specs from before it keep theirs.
    use: Annotated[Use, Field(exclude_if=lambda use: use == Use())] = Use()
    start: Start | None = Field(None, exclude_if=_is_none)

    @model_validator(mode="after")
    def _parts_fit_each_other(self) -> Self:
        self.task.check(self)
        if isinstance(self.aggregation, Krum):
            _check_krum(self.aggregation, self.federation.quorum)
        elif isinstance(self.aggregation, TrimmedMean) and self.federation.quorum >= 3:
            _check_trim(self.aggregation.trim, self.federation.quorum)
        elif isinstance(self.aggregation, TrimmedMean | Median) and self.federation.quorum < 3:
            raise ValueError(
                f"aggregation.strategy = {self.aggregation.strategy!r} holds all updates at once "
                f"and means something from 3 on; federation.quorum is {self.federation.quorum}"
            )
        if self.model.sparse and self.start is None:
            raise ValueError(
                "model.sparse = True: means something to a run that begins at a pruned model; name "
                "it in [start] model_sha256, or leave the key out"
            )
        open_to_all = self.augmentation.synthetic_without_privacy
        if open_to_all and not (self.augmentation.synthetic and isinstance(self.privacy, DpSgd)):
            raise ValueError(
                "augmentation.synthetic_without_privacy = True: means something to a run under "
                "dp-sgd that mixes in synthetic images; leave it out"
            )
        if self.schedule.warmup_rounds >= self.rounds:
            raise ValueError(
                f"schedule.warmup_rounds = {self.schedule.warmup_rounds} must be below "
                f"rounds = {self.rounds}"
            )
        return self

    @classmethod
    def from_json(cls, text: str, *, source: str = "spec") -> RunSpec:
        """Parse canonical (or any) JSON of a spec.

        Raises:
            SpecError: naming `source`, the key, the value and what was expected.
        """
        return _validate(text, source, toml=None)

    def __reduce__(self) -> tuple[Any, ...]:
        # Its class is made where it is read, and has no name by which it could be found.
        return RunSpec.from_json, (self.canonical_json,)

    @property
    def canonical_json(self) -> str:
        """The one spelling of this spec: sorted keys, no spaces, ASCII."""
        return _canonical(self.model_dump(mode="json")).decode()

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, in hex. It covers the run's identity as well."""
        return hashlib.sha256(self.canonical_json.encode()).hexdigest()

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The metrics of the task by name, in the order of a report."""
        return self.task.metrics(self.input)

    @property
    def total_steps(self) -> int:
        """Local steps of a site that takes part in every round."""
        return self.rounds * self.local.steps

    def task_as(self, kind: type[_Section]) -> _Section:
        """The section of the task, known to be of `kind`.

        Raises:
            SpecError: if the run has another task.
        """
        if not isinstance(self.task, kind):
            raise SpecError(f"task.name = {self.task.name!r}: expected a run of {kind.__name__}")
        return self.task

    def identified(self, run_id: str) -> RunSpec:
        """The same run under an identity of its own; each launch has one."""
        changed = self.model_dump(mode="json") | {"run_id": run_id}
        return RunSpec.from_json(json.dumps(changed))

    def learning_rate(self, round_number: int, step: int) -> float:
        """The local learning rate at `step` (from 0) of `round_number` (from 1)."""
        done = (round_number - 1) * self.local.steps + step
        warmup = self.schedule.warmup_rounds * self.local.steps
        if done < warmup:
            return self.optimizer.learning_rate * (done + 1) / (warmup + 1)
        span = max(1, self.total_steps - 1 - warmup)
        return self.optimizer.learning_rate * _factor(self.schedule, (done - warmup) / span)


class RunFile(NamedTuple):
    """A run's file: the spec, and the `[simulation]` table as it stands (empty if absent)."""

    spec: RunSpec
    simulation: Mapping[str, Any]


def read_run_file(path: Path) -> RunFile:
    """Read a run's TOML file.

    Raises:
        SpecError: if it cannot be read, is no TOML, or is not a valid run; the message names
            file, line where it can be found, key, value, and what was expected.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or error  # without the path, which stands before
        raise SpecError(f"{path}: cannot be read ({said}); expected a run's TOML file") from error
    return parse_run_text(text, source=str(path))


def parse_run_text(text: str, *, source: str) -> RunFile:
    """Parse the text of a run's file; see `read_run_file`."""
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # what Python cannot hold is no TOML either
        raise SpecError(f"{source}: this is not TOML: {error}") from error
    simulation = document.pop("simulation", {})
    if not isinstance(simulation, dict):
        shown = _shown(simulation)
        raise SpecError(f"{source}: simulation = {shown}: expected a table [simulation]")
    if "privacy" not in document:
        raise SpecError(
            f"{source}: the table [privacy] is missing; write mechanism, clip_norm, delta and "
            'noise_multiplier or target_epsilon, or say mechanism = "none" in so many words'
        )
    return RunFile(_validate(json.dumps(document, default=str), source, toml=text), simulation)


def explain_detail(detail: Any, *within: str) -> str:
    """One error of pydantic for a person, without the file: key, value, what was expected.

    Args:
        detail: one of `ValidationError.errors`.
        within: the tables that the checked part of the file stands in.
    """
    key = _shown_key(".".join([*within, *map(str, detail["loc"])]))
    if detail["type"] == "missing":
        return f"{key} is missing; it has no default"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{key}: {message}" if key else message
    expected = "unknown key" if detail["type"] == "extra_forbidden" else message
    return f"{key} = {_shown(detail['input'])}: {expected[0].lower() + expected[1:]}"


def _factor(schedule: Schedule, progress: float) -> float:
    """The schedule's factor at `progress` in 0..1 after the warm-up."""
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "exponential":
        return float(schedule.final**progress)
    if schedule.name == "cosine":
        rise = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        rise = 1 - abs(2 * ((progress * schedule.cycles) % 1.0) - 1)
    return schedule.final + (1 - schedule.final) * rise


def _check_krum(krum: Krum, quorum: int) -> None:
    """Krum's bound n >= 2f + 3 must hold for the smallest round that may close."""
    need = 2 * krum.byzantine + 3
    if quorum < need or krum.keep > quorum - krum.byzantine - 2:
        raise ValueError(
            f"aggregation.strategy = 'krum' holds all updates at once and needs at least "
            f"2 x byzantine + 3 = {need} of them and keep <= quorum - byzantine - 2; "
            f"federation.quorum is {quorum}, keep is {krum.keep}"
        )


def _check_trim(trim: float, quorum: int) -> None:
    """A rule that drops nobody would survive nobody, and would say nothing of it."""
    if int(trim * quorum) < 1:
        raise ValueError(
            f"aggregation.trim = {trim:g} drops nobody from a round of {quorum}; write at least "
            f"1 / federation.quorum = {1 / quorum:.3g}, or a larger quorum"
        )


def _canonical(value: object) -> bytes:
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode()


def _validate(text: str, source: str, toml: str | None) -> RunSpec:
    """Strict validation by way of JSON, where a list may become a tuple and nothing else may."""
    kind = _class_of(text, source, toml)
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        lines = [_explain(detail, source, toml, kind) for detail in error.errors()[:_MOST_ERRORS]]
        raise SpecError("\n".join(lines)) from None


def _class_of(text: str, source: str, toml: str | None) -> type[RunSpec]:
    """The class of a spec by its ``task.name``; where there is none, what is amiss is told by it.

    Raises:
        SpecError: if no task has that name.
    """
    try:
        task = json.loads(text)["task"]
        name = task.get("name", _USUAL_TASK)
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        name = _USUAL_TASK
    if not isinstance(name, str):
        name = _USUAL_TASK
    if name not in TASKS:
        where = _where(source, toml, ["task", "name"])
        known = ", ".join(TASKS)
        raise SpecError(f"{where}: task.name = {_shown(name)}: expected one of {known}")
    return _run_with(section_for(name))


@cache
def _run_with(section: type[Task]) -> type[RunSpec]:
    """`RunSpec` with this class of ``[task]``."""
    return create_model(
        RunSpec.__name__,
        __base__=RunSpec,
        __module__=__name__,
        __doc__=RunSpec.__doc__,
        task=(section, ...),
    )


_USUAL_TASK = "classification"
_KINDS = {
    "optimizer": ("sgd", "adam", "adamw"),
    "privacy": ("dp-sgd", "none"),
    "aggregation": (*STREAMING, *ALL_AT_ONCE),
}


def _explain(detail: Any, source: str, toml: str | None, run: type[RunSpec]) -> str:
    """One line for a person: file, line, key, value, what was expected, the way out."""
    location = [str(part) for part in detail["loc"]]
    if len(location) > 1 and location[1] in _KINDS.get(location[0], ()):
        del location[1]
    key = _shown_key(".".join(location)) or "run"
    kind, value, message = detail["type"], detail["input"], detail["msg"]
    if kind == "value_error":
        return _explain_whole(location, message.removeprefix("Value error, "), source, toml)
    where = _where(source, toml, location)
    if kind == "extra_forbidden":
        return f"{where}: {key} = {_shown(value)}: unknown key; {_nearest(location, run)}"
    if kind == "missing":
        return f"{where}: {key} is missing; {_expected(location)}"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        tag = detail["ctx"]["discriminator"].strip("'")
        seen = value.get(tag) if isinstance(value, dict) else value
        where = _where(source, toml, [*location, tag])
        return f"{where}: {key}.{tag} = {_shown(seen)}: expected one of {_tags(location)}"
    return f"{where}: {key} = {_shown(value)}: {message[0].lower() + message[1:]}"


def _explain_whole(location: list[str], message: str, source: str, toml: str | None) -> str:
    """A table, or the whole run, whose parts do not fit; the latter's message names its key."""
    if location:
        return f"{_where(source, toml, location)}: {'.'.join(location)}: {message}"
    return f"{_where(source, toml, message.split(maxsplit=1)[0].split('.'))}: {message}"


def _shown(value: object) -> str:
    """A value as a message repeats it: as it was written, and not without end."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}… ({len(text)} long)"


def _shown_key(key: str) -> str:
    """A key as it stands, unless it could be taken for something else on a screen or in a log."""
    return key if key.isprintable() and len(key) <= _LONGEST_SHOWN else _shown(key)


def _tags(location: list[str]) -> str:
    if location[:1] == ["aggregation"]:
        return f"{', '.join(STREAMING)}, or, holding all updates at once: {', '.join(ALL_AT_ONCE)}"
    return "'sgd', 'adam', 'adamw'" if location[:1] == ["optimizer"] else "'dp-sgd', 'none'"


def _known_keys(location: list[str], run: type[RunSpec]) -> list[str]:
    """The keys that may stand where the last part of `location` stands."""
    if len(location) == 1:
        return [*run.model_fields, "simulation"]
    schema = run.model_json_schema()
    node = schema["properties"].get(location[0], {})
    options = node.get("oneOf") or node.get("allOf") or [node]
    names = (option.get("$ref", "").rpartition("/")[2] for option in options)
    return sorted({key for n in names for key in schema["$defs"].get(n, {}).get("properties", {})})


def _nearest(location: list[str], run: type[RunSpec]) -> str:
    known = _known_keys(location, run)
    if location[-1] in known:
        return f"this kind of [{location[0]}] has no such key; leave it out"
    close = difflib.get_close_matches(location[-1], known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(known)}"


def _expected(location: list[str]) -> str:
    return f"write it in [{'.'.join(location[:-1])}]" if location[1:] else "it has no default"


def _where(source: str, toml: str | None, location: list[str]) -> str:
    """The source, and the line of the key, or else of its table, where one is found."""
    line = _line_of(toml, location) or _line_of(toml, location[:1])
    return f"{source}:{line}" if line else source


def _line_of(toml: str | None, location: list[str]) -> int | None:
    """The line on which a key stands, by a light reading of the text; None if not found."""
    table = ""
    for number, line in enumerate((toml or "").splitlines(), start=1):
        if header := re.match(r"\s*\[+([\w.-]+)\]", line):
            table = header[1]
            if [table] == location:
                return number
        elif entry := re.match(r"\s*([\w-]+)\s*=", line):
            found = [table, entry[1]] if table else [entry[1]]
            if found == location[:2]:
                return number
    return None
