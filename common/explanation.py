"""Explained: which parts of an image an answer rests on, and whether that was learned.

======================  ==========================================================================
``grad-cam``            Selvaraju et al. 2017 (arXiv:1610.02391): a layer's maps, each weighted by
                        the mean slope of the class's score in it, added up, and cut off below 0
``integrated-gradients``  Sundararajan et al. 2017 (arXiv:1703.01365): the slopes of the class's
                        score along the straight way from a black image to this one, times what the
                        image has more than the black one; their sum is what the score gains
======================  ==========================================================================

Both are captum's. A class's score is its logit; of a binary task's one logit, class 0 has the
negative; of a network that answers with a map it is the sum of the class's logits over the pixels
at which the image's own answer is that class, or over all where it is found nowhere.

**Where Grad-CAM looks** is found by a forward pass and not by a name: of the modules that run
once and give a map of more than one place, the last one. Of a network that answers with a map,
whose last one is the answer itself, it is the last one of the coarsest maps (Vinogradova et al.
2020, arXiv:2002.11434). A network that goes on from its last map in tokens (a vision transformer)
has none: attention may have moved anything anywhere, so it is explained by slopes alone.

**The way from black is walked in decades.** GroupNorm divides by an image's contrast, so a faint
copy of an image has nearly its score: most of what happens on the way happens in its first
thousandth, where evenly spaced steps miss it. Each stretch is captum's own integral, and what the
sum of all misses is returned with the map.

**Whether it was learned** (Adebayo et al. 2018, arXiv:1810.03292): the same maps are made of
networks with random weights. A method whose map is the same there shows the image and not what
the network has learned from its patients.
"""

from __future__ import annotations

import pkgutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.functional.image import structural_similarity_index_measure

from common import models
from common.errors import ModelError
from common.spec import RunSpec
from common.tasks.answers import Answer
from common.tasks.estimates import Estimate, means
from common.tasks.preprocess import normalise

Maps = NDArray[np.float32]

GRAD_CAM, INTEGRATED_GRADIENTS = "grad-cam", "integrated-gradients"
METHODS = (GRAD_CAM, INTEGRATED_GRADIENTS)
TITLES = {GRAD_CAM: "Grad-CAM", INTEGRATED_GRADIENTS: "Integrated gradients"}

SAME = 0.7
"""The rank correlation from which on two maps are the same: they share half of their variance."""

INDEPENDENT = "does not depend on what was learned"
"""What is said of a method whose maps stay as they are when the weights are others."""

_EXPLAINED = ("vector", "map")
_STRETCHES = (0.0, 1e-3, 1e-2, 1e-1, 1.0)
_STEPS = 16  # of Gauss and Legendre in each stretch
_AT_ONCE = 1 << 18  # pixels of images that are in the network together
_CUT = 0.995
_FEWEST = 4  # patients from which anything is said of the method


@dataclass(frozen=True)
class Explanation:
    """What one method says of N images.

    Attributes:
        maps: (N, H, W), of studies one for each of their images, in units of the class's score; of
            Grad-CAM not below 0, of integrated gradients with a sign: above 0 what speaks for the
            class, below it what speaks against.
        gains: (N,) how much higher the class's score is than that of a black image; None for
            Grad-CAM, which explains no difference.
        errors: (N,) the sum of a map less that gain, which would be 0 if it were complete.
    """

    maps: Maps
    gains: Maps | None = None
    errors: Maps | None = None


class Similarity(NamedTuple):
    """How like the maps of N images are to those of networks with random weights.

    Attributes:
        rank: (N,) Spearman's correlation of the pixels; of two even maps 1, of one even map 0.
        ssim: (N,) structural similarity of the maps, each divided by its largest absolute value.
    """

    rank: Maps
    ssim: Maps


def explains(spec: RunSpec) -> bool:
    """Whether anything here explains what the run's network gives."""
    return not _why_not(spec)


def methods_of(network: nn.Module, spec: RunSpec) -> tuple[str, ...]:
    """The methods that explain this network.

    Raises:
        ModelError: naming the network, if nothing here explains what it gives.
    """
    _check_explained(spec)
    return METHODS if _layer_of(network, spec) is not None else (INTEGRATED_GRADIENTS,)


def explain(
    network: nn.Module,
    spec: RunSpec,
    images: NDArray[np.floating],
    classes: Sequence[int] | NDArray[np.integer],
    methods: Sequence[str] | None = None,
) -> dict[str, Explanation]:
    """Explain one class of each image; the network is as it was afterwards.

    An image's map is a function of that image, its class and the network; of a run of studies a
    study's maps are of all its images, for they move each other's. One image or study is in the
    network at a time, in as many copies as memory for `_AT_ONCE` pixels takes.

    Args:
        network: of the run, on any device.
        spec: the run.
        images: (N, C, H, W) brightness in 0..1; of a run of studies (N, K, C, H, W) for N studies
            of K images each.
        classes: N class numbers, of ``spec.task.classes``.
        methods: of `methods_of`; all of them if not given.

    Returns:
        By method, in the order of `METHODS`.

    Raises:
        ModelError: if the network, an image, a class or a method is not what can be explained.
    """
    _check_explained(spec)
    pixels, numbers = _checked(spec, images, classes)
    known = methods_of(network, spec)
    chosen = known if methods is None else methods
    for name in chosen:
        if name not in known:
            raise ModelError(
                f"method {name!r}: {spec.model.name} is explained by {', '.join(known)}"
            )
    found = {}
    with _at_rest(network):
        if GRAD_CAM in chosen:
            found[GRAD_CAM] = _grad_cam(network, spec, pixels, numbers)
        if INTEGRATED_GRADIENTS in chosen:
            found[INTEGRATED_GRADIENTS] = _integrated(network, spec, pixels, numbers)
    return found


def decided(answer: Answer, spec: RunSpec) -> int:
    """The number of the class that an answer says most for, which is the one to explain.

    Of a binary task class 1 where its probability is above the run's threshold, else class 0; else
    the class of the highest probability. Of a mask the class with most pixels but the background,
    and class 1 where nothing was found.
    """
    if answer.mask is not None:
        pixels = np.bincount(answer.mask.ravel(), minlength=len(spec.task.classes))
        return 1 + int(pixels[1:].argmax())
    if answer.probabilities is None:
        raise ModelError(f"an answer of {spec.task.name} has no class to explain")
    if spec.task.outputs == 1:
        return int(answer.probabilities[1] > spec.evaluation.threshold)
    return int(answer.probabilities.argmax())


def scaled(maps: Maps) -> Maps:
    """(N, H, W) maps to -1..1, to be seen: by image, its largest values but 1 in 200 cut off."""
    largest = np.quantile(np.abs(maps), _CUT, axis=(1, 2), keepdims=True)
    largest = np.where(largest > 0, largest, np.abs(maps).max(axis=(1, 2), keepdims=True))
    return np.clip(maps / np.where(largest > 0, largest, 1), -1, 1).astype(np.float32)


def dependence(
    explained: Mapping[str, Explanation],
    spec: RunSpec,
    images: NDArray[np.floating],
    classes: Sequence[int] | NDArray[np.integer],
    first: int = 0,
) -> dict[str, Similarity]:
    """Compare explanations with those of networks that have learned nothing, by method.

    Each image has a network of its own, with the weights that the run would have begun with under
    another seed, so that figures of two images share no draw.

    Args:
        explained: of `explain`, of the same images and classes.
        spec: the run.
        images: as `explain`.
        classes: as `explain`.
        first: number of the first draw of weights, for who explains images in several calls.

    Raises:
        ModelError: as `explain`.
    """
    pixels, numbers = _checked(spec, images, classes)
    others: dict[str, list[Maps]] = {name: [] for name in explained}
    for row, (image, number) in enumerate(zip(pixels, numbers, strict=True), start=first):
        network = _unlearned(spec, row)
        made = explain(network, spec, image[None], [number], tuple(explained))
        for name, maps in others.items():
            maps.append(made[name].maps)
    return {
        name: similarity(explained[name].maps, np.concatenate(maps))
        for name, maps in others.items()
    }


def similarity(maps: Maps, others: Maps) -> Similarity:
    """Compare maps with maps, (N, H, W) each, image by image."""
    ranks = [_rank_correlation(a.ravel(), b.ravel()) for a, b in zip(maps, others, strict=True)]
    a, b = (torch.from_numpy(_unit(each))[:, None] for each in (maps, others))
    ssim = structural_similarity_index_measure(a, b, data_range=2.0, reduction="none")
    both = ssim if isinstance(ssim, Tensor) else ssim[0]
    return Similarity(np.array(ranks, dtype=np.float32), both.reshape(-1).numpy())


def estimated(found: Similarity, spec: RunSpec, patients: NDArray[np.int64]) -> dict[str, Estimate]:
    """The means of ``rank`` and ``ssim`` over images, with intervals over their patients."""
    return means(
        found._asdict(),
        patients,
        resamples=spec.evaluation.bootstrap,
        generator=np.random.default_rng(spec.seed),
    )


def verdict(rank: Estimate, patients: int) -> str:
    """What the rank correlation says of a method, in words.

    Args:
        rank: of `estimated`.
        patients: of how many.
    """
    if patients < _FEWEST or rank.value is None or rank.low is None or rank.high is None:
        return f"not known: it takes {_FEWEST} patients or more"
    if rank.low >= SAME:
        return INDEPENDENT
    if rank.high < SAME:
        return "depends on what was learned"
    return "not clear whether it depends on what was learned"


# --- The methods --------------------------------------------------------------------------------


def _grad_cam(network: nn.Module, spec: RunSpec, images: Maps, classes: list[int]) -> Explanation:
    method, layer, maps = _captum("LayerGradCam"), _layer_of(network, spec), []
    for image, number in zip(images, classes, strict=True):
        seen, _ = _seen(network, spec, image)
        score = _score(network, number, seen)
        coarse = method(score, layer).attribute(seen, relu_attributions=True)
        fine = functional.interpolate(coarse.detach(), image.shape[-2:], mode="bilinear")
        maps.append(fine[:, 0].cpu().numpy())
    return Explanation(np.array(maps, dtype=np.float32).reshape(-1, *spec.input.sides))


def _integrated(network: nn.Module, spec: RunSpec, images: Maps, classes: list[int]) -> Explanation:
    maps, gains = [], []
    for image, number in zip(images, classes, strict=True):
        seen, black = _seen(network, spec, image)
        score = _score(network, number, seen)
        maps.append(_along(score, seen.detach(), black).sum(dim=-3)[0].cpu().numpy())
        with torch.no_grad():
            gains.append(float(score(seen) - score(black)))
    found = np.array(maps, dtype=np.float32).reshape(-1, *spec.input.sides)
    gained = np.array(gains, dtype=np.float32)
    sums = np.array([each.sum(dtype=np.float64) for each in maps], dtype=np.float32)
    errors = sums - gained
    return Explanation(found, gained, errors)


def _along(score: Any, seen: Tensor, black: Tensor) -> Tensor:
    """Of the shape of `seen`, the integral of the slopes along the way from black, in stretches."""
    method, way = _captum("IntegratedGradients")(score), seen - black
    at_once = max(1, min(_STEPS, _AT_ONCE * way.shape[-3] // way[0].numel()))
    total = torch.zeros_like(way)
    for start, end in pairwise(_STRETCHES):
        to, since = (black + part * way for part in (end, start))
        total += method.attribute(
            to.requires_grad_(), since, n_steps=_STEPS, internal_batch_size=at_once
        ).detach()
    return total


def _captum(name: str) -> Any:
    """One of captum's methods, which are imported when they are used: matplotlib comes along."""
    return pkgutil.resolve_name(f"captum.attr:{name}")


def _seen(network: nn.Module, spec: RunSpec, image: Maps) -> tuple[Tensor, Tensor]:
    """(1, C, H, W) of an image as the network sees it, and of a black one; of a study alike."""
    device = next(network.parameters()).device
    pixels = torch.from_numpy(image)[None].to(device)
    seen = normalise(pixels, spec.input).requires_grad_()
    return seen, normalise(torch.zeros_like(pixels), spec.input)


def _score(network: nn.Module, number: int, explained: Tensor) -> Any:
    """From what the network sees, (B, C, H, W), to the class's score of each image, (B,).

    Of a run of studies the network sees (B, K, C, H, W).

    Args:
        network: the run's.
        number: of the class.
        explained: (1, C, H, W) the image itself, by which the pixels of a map are chosen.
    """
    with torch.no_grad():
        answer = network(explained)
    chosen = torch.ones_like(answer[:, 0])
    if answer.dim() > 2:
        found = (answer.argmax(dim=1) == number).to(chosen)
        chosen = found if found.any() else chosen

    def score(seen: Tensor) -> Tensor:
        outputs: Tensor = network(seen).float()
        if outputs.shape[1] > 1:
            logits = outputs[:, number]
        else:
            logits = outputs[:, 0] if number else -outputs[:, 0]
        return (logits * chosen).reshape(len(logits), -1).sum(dim=1)

    return score


def _layer_of(network: nn.Module, spec: RunSpec) -> nn.Module | None:
    """Where Grad-CAM looks; None where there is no such layer."""
    runs: list[tuple[nn.Module, torch.Size]] = []

    def note(module: nn.Module, _: Any, given: Any) -> None:
        runs.append((module, given.shape if isinstance(given, Tensor) else torch.Size()))

    hooks = [m.register_forward_hook(note) for m in network.modules() if m is not network]
    try:
        with _at_rest(network), torch.no_grad():
            one = (1,) * spec.input.of_studies + spec.input.shape
            network(_seen(network, spec, np.zeros(one, dtype=np.float32))[0])
    finally:
        for hook in hooks:
            hook.remove()
    times = Counter(module for module, _ in runs)
    maps = [
        (place, module, shape[2] * shape[3])
        for place, (module, shape) in enumerate(runs)
        if len(shape) == 4 and shape[2] * shape[3] > 1 and times[module] == 1
    ]
    if models.NETWORKS[spec.model.name].gives == "map":
        coarsest = min((places for *_, places in maps), default=0)
        maps = [each for each in maps if each[2] == coarsest]
    if not maps:
        return None
    place, module, _ = maps[-1]
    tokens = any(len(shape) == 3 and shape[1] > 1 for _, shape in runs[place + 1 :])
    return None if tokens else module


@contextmanager
def _at_rest(network: nn.Module) -> Iterator[None]:
    """In evaluation mode, with slopes on, for as long as this takes."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


# --- What has learned nothing -------------------------------------------------------------------


def _unlearned(spec: RunSpec, draw: int) -> nn.Module:
    """The run's network with the weights that it would have begun with under another seed."""
    return models.build(spec.model_copy(update={"seed": (spec.seed + 1 + draw) % 2**63}))


def _rank_correlation(a: NDArray[Any], b: NDArray[Any]) -> float:
    left, right = (rankdata(each) - (len(each) + 1) / 2 for each in (a, b))
    length = float(np.sqrt((left**2).sum() * (right**2).sum()))
    if length:
        return float((left * right).sum()) / length
    return float(not left.any() and not right.any())


def _unit(maps: Maps) -> Maps:
    largest = np.abs(maps).max(axis=(1, 2), keepdims=True)
    return np.asarray(maps / np.where(largest > 0, largest, 1), dtype=np.float32)


# --- What can be explained ----------------------------------------------------------------------


def _check_explained(spec: RunSpec) -> None:
    if why := _why_not(spec):
        raise ModelError(why)


def _why_not(spec: RunSpec) -> str:
    name = spec.model.name
    gives = models.NETWORKS[name].gives if name in models.NETWORKS else "unknown"
    if gives not in _EXPLAINED:
        what = f"gives {gives!r}"
    elif len(spec.input.shape) != 3:
        what = "takes volumes"
    elif spec.input.modalities:
        what = "takes images of several modalities"
    else:
        return ""
    return (
        f"model.name = {name!r}: it {what}, and is not explained; Grad-CAM and integrated "
        f"gradients explain networks that give {' or '.join(_EXPLAINED)} of images"
    )


def _checked(
    spec: RunSpec, images: NDArray[np.floating], classes: Sequence[int] | NDArray[np.integer]
) -> tuple[Maps, list[int]]:
    """The images as float32, and the classes as numbers, if they fit the run."""
    pixels, numbers = np.asarray(images, dtype=np.float32), [int(number) for number in classes]
    studies = spec.input.of_studies
    each = pixels.shape[2:] if studies else pixels.shape[1:]
    counted = len(pixels) == len(numbers) and 0 not in pixels.shape[1:]
    if not counted or each != spec.input.shape or not np.isfinite(pixels).all():
        what = "N studies of K images" if studies else "N images"
        raise ModelError(
            f"images of shape {pixels.shape} with {len(numbers)} classes: expected one class for "
            f"each of {what} of shape {spec.input.shape}, of finite numbers in 0..1"
        )
    for number in numbers:
        if not 0 <= number < len(spec.task.classes):
            raise ModelError(
                f"class {number}: expected 0 to {len(spec.task.classes) - 1}, a number of "
                f"task.classes = {', '.join(spec.task.classes)}"
            )
    return pixels, numbers
