"""A run in words, for whoever has to decide about it: an operator, or a hospital."""

from __future__ import annotations

from collections.abc import Iterator

from common.spec import ALL_AT_ONCE, DpSgd, RunSpec
from common.studies import in_words
from common.tasks import words
from deploy.screen import printable

# Of augmentation, what changes no image.
_NO_CHANGE = {"multiplicity", "synthetic", "synthetic_without_privacy"}


def sentences(spec: RunSpec) -> Iterator[str]:
    """What the run does, a sentence a line, of printable characters."""
    return map(printable, _sentences(spec))


def sides_of(shape: tuple[int, ...]) -> str:
    """What the numbers of an image's shape, or of a volume's, are."""
    return ", ".join(("channels", *["depth"][len(shape) < 4 :], "height", "width"))


def _sentences(spec: RunSpec) -> Iterator[str]:
    shape = " x ".join(map(str, spec.input.shape))
    task, local, looks = spec.task, spec.local, spec.augmentation
    classes = f" ({', '.join(task.classes)})" if task.classes else ""
    yield (
        f"learns a {words.task(task)}{classes} with {spec.model.name} "
        f"from {shape} {'images' if spec.input.depth is None else 'volumes'}"
    )
    yield (
        f"{spec.rounds} rounds; in each, every site makes {local.steps} "
        f"step{'s' if local.steps > 1 else ''} of {spec.optimizer.name} at a learning rate of "
        f"{spec.optimizer.learning_rate:g} ({spec.schedule.name}), each on {local.batch_size} "
        f"{spec.privacy.unit}s expected"
    )
    changes = [name for name, asked in looks.model_dump(exclude=_NO_CHANGE).items() if asked]
    if changes:
        copies = words.counted(looks.multiplicity, "copy")
        yield f"augments by {', '.join(changes)}, {copies} averaged"
    yield from _special(spec)
    federation, strategy = spec.federation, spec.aggregation.strategy
    yield (
        f"a round closes when all sites have answered, or after "
        f"{federation.deadline_seconds:g} s with at least "
        f"{words.counted(federation.quorum, 'update')}; aggregation by {strategy}, "
        f"{_weighting(spec)}"
    )
    evaluation = spec.evaluation
    early = (
        f", stops after {evaluation.patience} evaluations without gain in {evaluation.metric}"
        if evaluation.patience
        else ""
    )
    every = "round" if evaluation.every == 1 else f"{evaluation.every} rounds"
    yield f"is evaluated centrally every {every}{early}"
    if evaluation.gallery:
        images = words.counted(evaluation.gallery, "image")
        yield f"its report shows up to {images} of the evaluation cohort"
    if evaluation.federated:
        yield (
            "after the last round every site's held-out patients are counted, once, with a noise "
            f"multiplier of {evaluation.federated.noise_multiplier:g}"
        )
    yield _privacy_sentence(spec)


def _special(spec: RunSpec) -> Iterator[str]:
    """What few runs do, and a person who approves one has to see."""
    if spec.input.of_studies:
        yield in_words(spec.input)
    if spec.start is not None:
        yield f"begins at the trained model {spec.start.model_sha256}"
    if spec.model.sparse:
        yield "weights that are zero in that model stay zero"
    if spec.model.trained == "head":
        yield "trains the network's last layer alone"
    if spec.augmentation.synthetic:
        yield (
            f"mixes {spec.augmentation.synthetic} synthetic images into each batch, as expected, "
            "from a cohort that each site names"
        )
    if spec.augmentation.synthetic_without_privacy:
        yield (
            "TAKES SYNTHETIC IMAGES OF A GENERATOR WITHOUT PRIVACY: its figures do not cover the "
            "patients behind them"
        )


def _weighting(spec: RunSpec) -> str:
    """A robust rule takes no site's word for its weight."""
    alike = spec.aggregation.weighting == "uniform" or spec.aggregation.strategy in ALL_AT_ONCE
    return "all sites alike" if alike else "weighted by declared size"


def _privacy_sentence(spec: RunSpec) -> str:
    privacy = spec.privacy
    if not isinstance(privacy, DpSgd):
        return "NO differential privacy: updates leave the sites as they are"
    asked = (
        f"noise for epsilon {privacy.target_epsilon:g} at each site"
        if privacy.target_epsilon
        else f"noise multiplier {privacy.noise_multiplier:g} at each site"
    )
    return (
        f"differential privacy per {privacy.unit} by DP-SGD: clip norm {privacy.clip_norm:g}, "
        f"{asked}, delta {privacy.delta:g}"
    )
