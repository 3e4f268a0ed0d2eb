"""Explanations: against MONAI and slow formulas, on what is planted, and against random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from monai.visualize.class_activation_maps import GradCAM
from numpy.typing import NDArray
from scipy import ndimage
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional

from common import explanation, models
from common.errors import ModelError
from common.explanation import GRAD_CAM, INDEPENDENT, INTEGRATED_GRADIENTS, METHODS, Explanation
from common.spec import RunSpec
from common.tasks.answers import Answer
from common.tasks.estimates import Estimate
from common.tasks.preprocess import normalise

Make = Callable[..., RunSpec]

MANY = {"kind": "multiclass", "classes": ["a", "b", "c"]}
MASKS = {"name": "segmentation", "classes": ["background", "upright"]}
LAST_MAPS = {"pooled-cnn": "10", "reference-cnn": "pool4", "resnet18": "layer4"}
SIDE, SQUARE = 32, 8


@pytest.fixture
def of_network(make_spec: Make) -> Make:
    """A run of three classes with the network `name`, narrow where it may be."""

    def make(name: str, side: int = 64, **changes: Any) -> RunSpec:
        narrow = {"width": 8} if models.NETWORKS[name].takes_width else {}
        return make_spec(
            task=MANY,
            model={"name": name} | narrow,
            input={"height": side, "width": side} | changes.pop("input", {}),
            **changes,
        )

    return make


@pytest.fixture
def of_masks(make_spec: Make) -> RunSpec:
    return make_spec(
        task=MASKS,
        loss={"name": "dice-cross-entropy"},
        evaluation={"metric": "dice"},
        model={"name": "unet", "width": 4},
        input={"height": SIDE, "width": SIDE},
    )


def drawn(spec: RunSpec, count: int = 3) -> NDArray[np.float32]:
    """Smooth pictures of brightness in 0..1."""
    noise = np.random.default_rng(5).random((count, *spec.input.shape), dtype=np.float32)
    smooth = ndimage.gaussian_filter(noise, (0, 0, 3, 3))
    low, high = smooth.min(), smooth.max()
    return np.asarray((smooth - low) / (high - low), dtype=np.float32)


def seen(spec: RunSpec, images: NDArray[np.float32]) -> Tensor:
    return normalise(torch.from_numpy(images), spec.input)


# --- Against others ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAST_MAPS)
def test_grad_cam_is_that_of_monai_at_the_last_map(of_network, name):
    spec = of_network(name)
    network, images = models.build(spec).eval(), drawn(spec)
    maps = explanation.explain(network, spec, images, [2, 0, 1])[GRAD_CAM].maps
    judge: Any = GradCAM(
        nn_module=network, target_layers=LAST_MAPS[name], postprocessing=lambda each: each
    )
    for row, number in enumerate((2, 0, 1)):
        # MONAI leaves what is below zero to its postprocessing, after it has enlarged the map.
        theirs = judge.compute_map(seen(spec, images[row : row + 1]), class_idx=number)
        enlarged = functional.interpolate(theirs.detach().relu(), (64, 64), mode="bilinear")
        np.testing.assert_allclose(maps[row], enlarged[0, 0], atol=1e-6 + 1e-4 * maps[row].max())
        assert maps[row].max() > 0 or theirs.max() <= 0
    assert maps.max() > 0


@pytest.mark.parametrize("normalize", ["literal", "image"])
def test_integrated_gradients_of_a_linear_network_are_its_weights_times_what_is_seen(
    make_spec, normalize
):
    """The one case in which the integral is known in closed form."""
    spec = make_spec(
        input={"normalize": normalize, "mean": [0.4], "std": [0.2]}, model={"name": "small-cnn"}
    )
    linear = nn.Linear(256, 1)
    network = nn.Sequential(nn.Flatten(), linear)
    images = drawn(spec)
    found = explanation.explain(network, spec, images, [1, 0, 1], [INTEGRATED_GRADIENTS])
    (one,) = found.values()
    black = seen(spec, np.zeros_like(images))
    weights = linear.weight.detach().reshape(16, 16).numpy()
    exact = weights * (seen(spec, images) - black)[:, 0].numpy()
    exact[1] *= -1  # class 0 of one logit is its negative
    np.testing.assert_allclose(one.maps, exact, atol=1e-6)
    assert one.gains is not None
    np.testing.assert_allclose(one.gains, exact.sum(axis=(1, 2)), atol=1e-4)


@pytest.mark.parametrize("normalize", ["literal", "image"])
def test_integrated_gradients_are_those_of_a_slow_sum_over_many_small_steps(make_spec, normalize):
    spec = make_spec(model={"name": "small-cnn", "width": 4}, input={"normalize": normalize})
    network, images = models.build(spec).eval(), drawn(spec, 1)
    found = explanation.explain(network, spec, images, [1])[INTEGRATED_GRADIENTS]
    end, start = seen(spec, images), seen(spec, np.zeros_like(images))
    # Even steps of the logarithm of the way, from a place at which next to nothing has happened.
    places = np.concatenate([[0.0], np.geomspace(1e-7, 1.0, 1500)])
    middles, steps = (places[1:] + places[:-1]) / 2, np.diff(places)
    total = torch.zeros_like(end)
    for chunk in np.array_split(np.arange(len(steps)), 8):
        part = torch.from_numpy(middles[chunk]).float().view(-1, 1, 1, 1)
        on_the_way = (start + part * (end - start)).requires_grad_()
        (slopes,) = torch.autograd.grad(network(on_the_way).sum(), on_the_way)
        weights = torch.from_numpy(steps[chunk]).float().view(-1, 1, 1, 1)
        total += (slopes * weights).sum(dim=0) * (end - start)[0]
    slow = total[0, 0].numpy()
    assert np.abs(found.maps[0] - slow).max() < 0.15 * np.abs(slow).max()
    assert np.corrcoef(found.maps[0].ravel(), slow.ravel())[0, 1] > 0.95


@pytest.mark.parametrize("name", models.names("vector"))
def test_what_integrated_gradients_miss_is_told(of_network, name):
    spec = of_network(name, input={"normalize": "image"})
    network, images = models.build(spec), drawn(spec, 1)
    found = explanation.explain(network, spec, images, [1], [INTEGRATED_GRADIENTS])
    one = found[INTEGRATED_GRADIENTS]
    assert one.maps.shape == (1, 64, 64)
    assert one.maps.dtype == np.float32
    assert one.gains is not None
    assert one.errors is not None
    black = seen(spec, np.zeros_like(images))
    network.eval()
    with torch.no_grad():
        gained = network(seen(spec, images)) - network(black)
    np.testing.assert_allclose(one.gains, gained[[0], [1]], atol=1e-5)
    np.testing.assert_allclose(one.errors, one.maps.sum(axis=(1, 2)) - one.gains, atol=1e-4)
    # Untaught, GroupNorm's networks have shifts of zero: next to black, slopes without bound.
    if name in ("compact-cnn", "reference-cnn", "vit"):
        assert (np.abs(one.errors) < 0.1 * np.abs(one.gains) + 1e-3).all()


# --- What it may cost and change ---------------------------------------------------------------


def test_a_transformer_is_explained_by_its_slopes_alone(of_network):
    for name in models.names("vector"):
        spec = of_network(name)
        expected = METHODS if name != "vit" else (INTEGRATED_GRADIENTS,)
        assert explanation.methods_of(models.build(spec), spec) == expected, name
    with pytest.raises(ModelError, match="'grad-cam': vit is explained by integrated-gradients"):
        explanation.explain(models.build(spec), spec, drawn(spec), [0, 0, 0], [GRAD_CAM])


def test_a_network_is_left_as_it_was(of_network):
    spec = of_network("pooled-cnn", side=16)
    network = models.build(spec)
    network.train()
    list(network.children())[3].eval()
    next(network.parameters()).requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    needs = [parameter.requires_grad for parameter in network.parameters()]
    random = torch.get_rng_state()
    images = drawn(spec)
    kept = images.copy()
    with torch.no_grad():
        found = explanation.explain(network, spec, images, [0, 1, 2])
        explanation.dependence(found, spec, images, [0, 1, 2])
        assert not torch.is_grad_enabled()
    assert [module.training for module in network.modules()] == modes
    assert [parameter.requires_grad for parameter in network.parameters()] == needs
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert not any(m._backward_hooks or m._backward_pre_hooks for m in network.modules())
    assert all(torch.equal(before[name], now) for name, now in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert np.array_equal(images, kept)


class Breaks(nn.Sequential):
    """A network that fails once it is asked for slopes."""

    def forward(self, images: Tensor) -> Tensor:
        if images.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("out of memory")
        return super().forward(images)  # type: ignore[no-any-return]


def test_a_network_that_fails_is_left_as_it_was_too(make_spec):
    spec = make_spec()
    network = Breaks(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(392, 1)).train()
    with pytest.raises(RuntimeError, match="out of memory"):
        explanation.explain(network, spec, drawn(spec), [1, 1, 1])
    assert all(module.training for module in network.modules())
    assert not any(m._forward_hooks for m in network.modules())


def test_an_image_s_map_is_its_own_and_the_same_each_time(of_network):
    spec = of_network("pooled-cnn", side=16)
    network, images = models.build(spec), drawn(spec)
    together = explanation.explain(network, spec, images, [0, 1, 2])
    again = explanation.explain(network, spec, images[::-1], [2, 1, 0])
    for method in METHODS:
        assert np.array_equal(together[method].maps, again[method].maps[::-1])
        assert np.abs(np.diff(together[method].maps, axis=0)).max() > 0
    other = explanation.explain(network, spec, images, [1, 1, 1])
    assert not np.array_equal(other[GRAD_CAM].maps[0], together[GRAD_CAM].maps[0])


class Counts(nn.Module):
    """A network that remembers how many pixels were in it at once."""

    def __init__(self) -> None:
        super().__init__()
        self.squares = nn.Conv2d(1, 1, 8, stride=8)
        self.most = 0

    def forward(self, images: Tensor) -> Tensor:
        self.most = max(self.most, images.numel())
        return self.squares(images).mean(dim=(2, 3))  # type: ignore[no-any-return]


@pytest.mark.parametrize("side", [16, 512])
def test_not_more_is_in_the_network_at_once_than_memory_is_reckoned_for(make_spec, side):
    spec = make_spec(input={"height": side, "width": side})
    network = Counts()
    explanation.explain(network, spec, np.ones((1, 1, side, side), np.float32), [1])
    assert side**2 <= network.most <= max(side**2, 2**18)


# --- What is planted ---------------------------------------------------------------------------


def planted(count: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Noise with a square of lying stripes; every second image also has one of upright stripes.

    Both are as bright, so what finds the upright one has to know what it looks for.

    Returns:
        Images, and where the upright stripes are.
    """
    rng = np.random.default_rng(seed)
    images = 0.2 * rng.random((count, 1, SIDE, SIDE), dtype=np.float32)
    where = np.zeros((count, SIDE, SIDE), dtype=np.bool_)
    stripes = 0.8 * (np.arange(SQUARE) % 2) * np.ones((SQUARE, 1))
    for row in range(count):
        left, right = np.array([0, SIDE // 2]) + rng.integers(0, SIDE // 2 - SQUARE + 1, 2)
        upright, lying = rng.permutation([left, right])
        tops = rng.integers(0, SIDE - SQUARE + 1, 2)
        images[row, 0, tops[0] : tops[0] + SQUARE, lying : lying + SQUARE] += stripes.T
        if row % 2:
            where[row, tops[1] : tops[1] + SQUARE, upright : upright + SQUARE] = True
            images[row, 0][where[row]] += stripes.ravel()
    return images, where


def with_upright(count: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Of so many new images those with upright stripes, and where they are."""
    images, where = planted(count, seed=2)
    return images[1::2], where[1::2]


def looks() -> nn.Module:
    """A network that answers by the one place that is most like what it looks for."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, padding=2),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 1),
    )


def taught(network: nn.Module, spec: RunSpec, steps: int, rate: float) -> nn.Module:
    """The network, taught to find upright stripes: whether there are any, or where."""
    images, where = planted(32, seed=1)
    inputs, masks = seen(spec, images), torch.from_numpy(where)
    optimizer = torch.optim.Adam(network.train().parameters(), lr=rate)
    for _ in range(steps):
        outputs = network(inputs)
        if outputs.dim() > 2:
            loss = functional.cross_entropy(outputs, masks.long(), torch.tensor([1.0, 10.0]))
        else:
            there = masks.any(dim=(1, 2)).float()[:, None]
            loss = functional.binary_cross_entropy_with_logits(outputs, there)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5
    optimizer.zero_grad()
    return network.eval()


def points_at(maps: NDArray[np.float32], where: NDArray[np.bool_]) -> float:
    """The part of the maps whose largest value lies in the square, or two pixels beside it."""
    near = ndimage.binary_dilation(where, iterations=2, structure=np.ones((1, 3, 3)))
    flat = maps.reshape(len(maps), -1).argmax(axis=1)
    return float(np.mean(near.reshape(len(near), -1)[np.arange(len(flat)), flat]))


@pytest.fixture(scope="module")
def of_stripes(make_spec: Make) -> RunSpec:
    return make_spec(
        model={"name": "small-cnn", "width": 4},
        input={"height": SIDE, "width": SIDE},
        evaluation={"bootstrap": 200},
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_map_of_a_network_that_looks_for_something_is_on_it(of_stripes, method):
    torch.manual_seed(3)
    ignorant = looks()
    network = taught(copy.deepcopy(ignorant), of_stripes, 150, 0.02)
    images, where = with_upright(24)
    found, other = (
        explanation.explain(one, of_stripes, images, [1] * 12, [method])[method].maps
        for one in (network, ignorant)
    )
    assert points_at(found, where) >= 0.9
    assert points_at(other, where) <= 0.6


def test_the_map_of_a_network_of_masks_is_on_what_it_outlines(of_masks):
    network = taught(models.build(of_masks), of_masks, 40, 0.01)
    images, where = with_upright(8)
    found = explanation.explain(network, of_masks, images, [1] * 4)
    assert points_at(found[INTEGRATED_GRADIENTS].maps, where) >= 0.75
    coarse = found[GRAD_CAM].maps
    assert coarse.shape == (4, SIDE, SIDE)
    assert coarse.max() > 0


# --- Whether it was learned --------------------------------------------------------------------


def said(like: explanation.Similarity, spec: RunSpec) -> str:
    patients = np.arange(len(like.rank))
    return explanation.verdict(explanation.estimated(like, spec, patients)["rank"], len(patients))


def test_what_was_learned_is_lost_with_the_weights(of_stripes):
    network = taught(models.build(of_stripes), of_stripes, 20, 0.02)
    images, _ = planted(6, seed=3)
    found = explanation.explain(network, of_stripes, images, [1] * 6)
    like = explanation.dependence(found, of_stripes, images, [1] * 6)
    for method in METHODS:
        assert said(like[method], of_stripes) == "depends on what was learned"
        assert like[method].rank.shape == like[method].ssim.shape == (6,)


def test_an_edge_detector_is_caught(of_stripes, monkeypatch):
    """A map of the image's own edges looks like an explanation, and is none."""

    def edges(network: Any, spec: Any, images: Any, classes: Any) -> Explanation:
        return Explanation(np.stack([np.abs(ndimage.sobel(image[0])) for image in images]))

    images, _ = planted(6, seed=3)
    monkeypatch.setattr(explanation, "_grad_cam", edges)
    found = explanation.explain(models.build(of_stripes), of_stripes, images, [1] * 6)
    like = explanation.dependence(found, of_stripes, images, [1] * 6)
    assert said(like[GRAD_CAM], of_stripes) == INDEPENDENT
    assert said(like[INTEGRATED_GRADIENTS], of_stripes) != INDEPENDENT


def test_the_rank_correlation_is_scipy_s_and_even_maps_are_alike():
    rng = np.random.default_rng(1)
    maps, others = rng.normal(size=(2, 4, 16, 16)).astype(np.float32)
    others[0] += 2 * maps[0]
    maps[1][maps[1] < 0] = 0  # ties, as Grad-CAM has them
    maps[2] = others[2] = 0
    maps[3] = 0
    rank, ssim = explanation.similarity(maps, others)
    for row in (0, 1):
        exact = spearmanr(maps[row].ravel(), others[row].ravel())[0]
        assert rank[row] == pytest.approx(exact, abs=1e-6)
    assert rank[2:].tolist() == [1, 0]
    assert ssim[2] == pytest.approx(1)
    assert explanation.similarity(3 * maps, 5 * maps).ssim == pytest.approx([1] * 4)


@pytest.mark.parametrize(
    ("rank", "patients", "words"),
    [
        (Estimate(0.9, 0.8, 1.0), 8, INDEPENDENT),
        (Estimate(0.9, 0.7, 1.0), 8, INDEPENDENT),
        (Estimate(0.2, 0.0, 0.69), 8, "depends on what was learned"),
        (Estimate(0.6, 0.3, 0.8), 8, "not clear whether it depends on what was learned"),
        (Estimate(0.1, 0.0, 0.2), 3, "not known: it takes 4 patients or more"),
        (Estimate(0.1), 8, "not known: it takes 4 patients or more"),
        (Estimate(None), 8, "not known: it takes 4 patients or more"),
    ],
)
def test_a_method_is_believed_only_where_its_whole_interval_says_so(rank, patients, words):
    assert explanation.verdict(rank, patients) == words


# --- Which class, and for people's eyes --------------------------------------------------------


def test_the_class_that_is_explained_is_the_one_decided_for(make_spec, of_network, of_masks):
    binary = make_spec(evaluation={"threshold": 0.7})

    def of(spec: RunSpec, *p: float) -> int:
        return explanation.decided(Answer(True, np.array(p, dtype=np.float32)), spec)

    assert [of(binary, 0.4, 0.6), of(binary, 0.2, 0.8)] == [0, 1]
    assert of(of_network("pooled-cnn"), 0.1, 0.2, 0.7) == 2
    mask = np.zeros((4, 4), dtype=np.uint16)
    assert explanation.decided(Answer(True, mask=mask), of_masks) == 1
    with pytest.raises(ModelError, match="no class to explain"):
        explanation.decided(Answer(True), of_masks)


def test_maps_are_brought_to_one_scale_without_their_outliers():
    maps = np.zeros((3, 20, 20), dtype=np.float32)
    maps[0] = np.linspace(-2, 2, 400).reshape(20, 20)
    maps[0, 0, 0] = -1000
    maps[1, 3, 3] = -5
    shown = explanation.scaled(maps)
    assert shown.dtype == np.float32
    assert (shown.min(), shown.max()) == (-1, 1)
    assert shown[0, 10, 0] == pytest.approx(maps[0, 10, 0] / 2, rel=0.02)
    assert shown[1, 3, 3] == -1
    assert not shown[2].any()


# --- What is refused ---------------------------------------------------------------------------


def test_what_cannot_be_explained_is_refused_by_name(make_spec):
    detection = make_spec(
        task={"name": "detection", "classes": ["cell"]},
        loss={"name": "heatmap"},
        evaluation={"metric": "map50"},
        model={"name": "centernet"},
        input={"height": 32, "width": 32},
    )
    assert not explanation.explains(detection)
    for call in (
        lambda: explanation.methods_of(nn.Identity(), detection),
        lambda: explanation.explain(nn.Identity(), detection, drawn(detection), [0, 0, 0]),
    ):
        with pytest.raises(ModelError, match=r"'centernet': it gives 'boxes', .* vector or map"):
            call()


def test_images_of_a_study_are_explained_together(make_spec):
    """A map an image; the sum of all is what the decision gains over a study of black images."""
    spec = make_spec(input={"images": 4})
    torch.manual_seed(2)
    network, images = models.build(spec).eval(), drawn(spec)
    found = explanation.explain(network, spec, images[None], [1])
    assert set(found) == set(METHODS)
    whole = found[INTEGRATED_GRADIENTS]
    assert whole.gains is not None
    assert whole.errors is not None
    with torch.no_grad():
        of, black = (network(seen(spec, each[None])) for each in (images, np.zeros_like(images)))
    gain = float((of - black)[0, 0])
    assert whole.gains.tolist() == pytest.approx([gain], abs=1e-5)
    assert whole.errors.tolist() == pytest.approx([float(whole.maps.sum()) - gain], abs=1e-4)
    assert abs(float(whole.errors[0])) < 0.25 * abs(gain)
    turned = explanation.explain(network, spec, images[None, ::-1].copy(), [1])
    for method in METHODS:
        maps = found[method].maps
        assert maps.shape == (3, *spec.input.sides)
        assert np.abs(maps).max(axis=(1, 2)).min() > 0
        np.testing.assert_allclose(turned[method].maps[::-1], maps, atol=1e-4)
    alone = explanation.explain(network, spec, images[None, :1], [1])
    assert np.abs(alone[INTEGRATED_GRADIENTS].maps[0] - whole.maps[0]).max() > 1e-3
    like = explanation.dependence(found, spec, images[None], [1])
    assert all(each.rank.shape == (3,) for each in like.values())
    with pytest.raises(ModelError, match="N studies of K images"):
        explanation.explain(network, spec, images, [1, 1, 1])


def test_images_of_several_modalities_are_not_explained(make_spec):
    spec = make_spec(input={"images": 3, "modalities": ["CT", "MR"]})
    with pytest.raises(ModelError, match=r"small-cnn.*takes images of several modalities"):
        explanation.methods_of(models.build(spec), spec)


def test_images_and_classes_that_do_not_fit_are_refused(make_spec):
    spec = make_spec()
    network, images = models.build(spec), drawn(spec)
    broken = images.copy()
    broken[1, 0, 2, 2] = np.nan
    for wrong, classes, message in (
        (images[:, :, 1:], [0, 0, 0], r"\(3, 1, 15, 16\) with 3 classes"),
        (images, [0, 0], "3, 1, 16, 16.* with 2 classes"),
        (broken, [0, 0, 0], "finite"),
        (images, [0, 2, 0], "class 2: expected 0 to 1, .* normal, finding"),
        (images, [0, -1, 0], "class -1"),
    ):
        with pytest.raises(ModelError, match=message):
            explanation.explain(network, spec, wrong, classes)
    with pytest.raises(ModelError, match="'saliency': small-cnn is explained by grad-cam, integ"):
        explanation.explain(network, spec, images, [0, 0, 0], ["saliency"])


def test_nothing_to_explain_gives_empty_maps(make_spec):
    spec = make_spec()
    found = explanation.explain(models.build(spec), spec, np.zeros((0, 1, 16, 16)), [])
    assert {one.maps.shape for one in found.values()} == {(0, 16, 16)}
