"""What a report shows of explanations: which parts of an image an answer rests on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from common import explanation
from common.cohort import Cohort
from common.errors import ModelError
from common.explanation import METHODS, Similarity
from common.spec import RunSpec
from common.tasks import pictures, words
from common.tasks.answers import Answer
from common.tasks.estimates import Estimate
from common.tasks.exhibits import Exhibit, Gallery, Table
from common.tasks.preprocess import normalise

if TYPE_CHECKING:
    from common.tasks.task import Task

MOST = 8
"""Images that are explained at the end of a run: each costs some hundred passes."""

_PREFIX = "gallery_explained"
# What torch and captum raise on a network that they cannot take slopes of, or for lack of memory.
_FAILURES = (ModelError, RuntimeError, ValueError, AssertionError, MemoryError)
_log = logging.getLogger("cloister.explained")


def evidence(
    task: Task, network: nn.Module, cohort: Cohort, device: torch.device
) -> dict[str, NDArray[Any]]:
    """Explanations of some of a gallery's images; nothing where there can be none.

    A failure of it is told and costs no run its end.

    Returns:
        By names that begin with ``gallery_explained``: ``_rows``, ``_images`` (grey levels),
        ``_classes`` (which was explained), ``_probabilities`` (NaN where an answer has none); and
        by method ``_maps``, ``_rank`` and ``_ssim``, for integrated gradients ``_gains`` and
        ``_errors`` as well (`common.explanation`).
    """
    seen = task.spec.input
    if task.without_answers() or seen.of_studies or not explanation.explains(task.spec):
        return {}
    try:
        return _evidence(task, network, cohort, device)
    except _FAILURES as error:
        _log.warning("the report explains nothing: %s", error)
        return {}


def _evidence(
    task: Task, network: nn.Module, cohort: Cohort, device: torch.device
) -> dict[str, NDArray[Any]]:
    spec = task.spec
    rows, answers = _worth_it(task, network, cohort, device)
    if not answers:
        return {}
    images = cohort.images(rows)
    classes = [explanation.decided(answer, spec) for answer in answers]
    likely = [
        np.nan if answer.probabilities is None else answer.probabilities[number]
        for answer, number in zip(answers, classes, strict=True)
    ]
    found = explanation.explain(network, spec, images, classes)
    like = explanation.dependence(found, spec, images, classes)
    kept: dict[str, NDArray[Any]] = {
        "rows": rows,
        "images": pictures.grey_levels(images),
        "classes": np.array(classes, dtype=np.int64),
        "probabilities": np.array(likely, dtype=np.float32),
    }
    for method, one in found.items():
        kept |= {f"{method}_maps": one.maps, **_named(method, like[method]._asdict())}
        if one.gains is not None and one.errors is not None:
            kept |= {f"{method}_gains": one.gains, f"{method}_errors": one.errors}
    return _named(_PREFIX, kept)


def _worth_it(
    task: Task, network: nn.Module, cohort: Cohort, device: torch.device
) -> tuple[NDArray[np.int64], list[Answer]]:
    """Some of a gallery's images, in which something was found, and what was."""
    chosen, found = [], []
    for row in pictures.spread(len(cohort), task.spec.evaluation.gallery):
        image = torch.from_numpy(cohort.images(np.array([row]))).to(device)
        outputs = network(normalise(image, task.spec.input)).float()
        (answer,) = task.answers(outputs, image)
        if answer.finite and (answer.mask is None or answer.mask.any()):
            chosen.append(row)
            found.append(answer)
    places = pictures.spread(len(chosen), MOST)
    return np.array(chosen, dtype=np.int64)[places], [found[place] for place in places]


def exhibits(
    kept: Mapping[str, NDArray[Any]], patients: NDArray[np.int64], spec: RunSpec
) -> list[Exhibit]:
    """The maps on their images, and whether they depend on what was learned."""
    found = {
        name.removeprefix(f"{_PREFIX}_"): array
        for name, array in kept.items()
        if name.startswith(_PREFIX)
    }
    if not len(found.get("rows", ())):
        return []
    methods = [method for method in METHODS if f"{method}_maps" in found]
    people = patients[found["rows"]]
    likeness = {method: _likeness(found, method, people, spec) for method in methods}
    said = {
        method: explanation.verdict(each["rank"], len(np.unique(people)))
        for method, each in likeness.items()
    }
    return [_gallery(found, said, spec), _table(found, likeness, said)]


def _likeness(
    found: Mapping[str, NDArray[Any]], method: str, patients: NDArray[np.int64], spec: RunSpec
) -> dict[str, Estimate]:
    like = Similarity(found[f"{method}_rank"], found[f"{method}_ssim"])
    return explanation.estimated(like, spec, patients)


def _gallery(found: Mapping[str, NDArray[Any]], said: Mapping[str, str], spec: RunSpec) -> Gallery:
    maps = [explanation.scaled(found[f"{method}_maps"]) for method in said]
    drawn = [
        pictures.beside([pictures.canvas(levels), *(pictures.overlaid(levels, m) for m in row)])
        for levels, *row in zip(found["images"], *maps, strict=True)
    ]
    titles = [explanation.TITLES[method] for method in said]
    warnings = [
        f"{explanation.TITLES[method]}: this map {verdict}."
        for method, verdict in said.items()
        if verdict == explanation.INDEPENDENT
    ]
    return Gallery(
        "What the answers rest on",
        np.stack(drawn),
        [_caption(found, place, spec) for place in range(len(drawn))],
        f"Of each image, from left to right: as it is, {' and '.join(titles)} for the class named.",
        " ".join(
            [
                *warnings,
                "Orange speaks for the class, blue against it; each map has its own scale. A map "
                "shows where an answer comes from, not that it is right.",
            ]
        ),
    )


def _caption(found: Mapping[str, NDArray[Any]], place: int, spec: RunSpec) -> str:
    name = spec.task.classes[int(found["classes"][place])]
    likely = float(found["probabilities"][place])
    sure = "" if np.isnan(likely) else f", probability {likely:.2f}"
    return f"Image {int(found['rows'][place]) + 1}: {name}{sure}"


def _table(
    found: Mapping[str, NDArray[Any]],
    likeness: Mapping[str, Mapping[str, Estimate]],
    said: Mapping[str, str],
) -> Table:
    rows = []
    for method, verdict in said.items():
        like = likeness[method]
        cells = (words.estimate(like["rank"], 2), words.estimate(like["ssim"], 2))
        rows.append((explanation.TITLES[method], *cells, _missing(found, method), verdict))
    return Table(
        "Are the maps about what was learned?",
        ("Method", "Rank correlation", "SSIM", "Missing from the sum", "The map"),
        rows,
        "Each map is compared with the one that the same network gives with random weights, over "
        f"{words.counted(len(found['rows']), 'image')}: means with their 95 % intervals. A method "
        f"whose rank correlation is {explanation.SAME:g} or more shows the image, not what was "
        "learned. Integrated gradients should add up to what the class's score gains over a black "
        "image; the median of what is missing is in parts of that gain.",
    )


def _missing(found: Mapping[str, NDArray[Any]], method: str) -> str:
    """How incomplete integrated gradients are, of the middle image."""
    gains = found.get(f"{method}_gains")
    if gains is None or not (gains != 0).any():
        return words.NONE
    parts = np.abs(found[f"{method}_errors"][gains != 0] / gains[gains != 0])
    return f"{100 * float(np.median(parts)):.2g} %"


def _named(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {f"{prefix}_{name}": array for name, array in arrays.items()}
