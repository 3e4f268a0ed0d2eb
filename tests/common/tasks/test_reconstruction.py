"""Reconstruction: losses, references and figures against scipy, torchmetrics and slow formulas."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import fft, ndimage
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.functional.image import peak_signal_noise_ratio

from common import models
from common.errors import ModelError, SpecError
from common.spec import RunSpec
from common.tasks import task_for, words
from common.tasks.exhibits import Chart, Gallery, Table
from common.tasks.preprocess import normalise
from common.tasks.reconstruction import (
    Reconstruction,
    abnormal,
    kept_frequencies,
    median_filter,
)
from server.evaluation import score_part

SIDE = 16
Make = Callable[..., Reconstruction]


@pytest.fixture
def reconstruction(make_spec: Callable[..., RunSpec]) -> Make:
    """The task of a run; `task`, `evaluation` and others change those tables."""

    def make(**changes: Any) -> Reconstruction:
        task = {"name": "reconstruction"} | changes.pop("task", {})
        evaluation = {"metric": "psnr", "bootstrap": 100} | changes.pop("evaluation", {})
        loss = changes.pop("loss", {"name": "mse"})
        model = {"name": "autoencoder", "width": 4} | changes.pop("model", {})
        spec = make_spec(task=task, evaluation=evaluation, loss=loss, model=model, **changes)
        made = task_for(spec)
        assert isinstance(made, Reconstruction)
        return made

    return make


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(images: int = 6, channels: int = 1, side: int = SIDE) -> Tensor:
    """Smooth images: noise that is blurred, in 0..1."""
    rough = torch.rand(images, channels, side, side, generator=generator()).numpy()
    smooth = ndimage.gaussian_filter(rough, (0, 0, 2, 2))
    low, high = smooth.min(), smooth.max()
    return torch.from_numpy((smooth - low) / (high - low)).float()


class Given(nn.Module):
    """A network that gives what it was given, changed."""

    def __init__(self, change: Callable[[Tensor], Tensor], code_numbers: int = 64) -> None:
        super().__init__()
        self.change = change
        self.code_numbers = code_numbers

    def forward(self, images: Tensor) -> Tensor:
        return self.change(images)


class Images:
    """As much of a cohort as an evaluation reads."""

    def __init__(self, images: Tensor, targets: Any = None) -> None:
        self._images = images.numpy()
        self._targets = np.zeros((len(images), 0)) if targets is None else np.asarray(targets)
        self.shape = self.row_shape = images.shape[1:]

    def __len__(self) -> int:
        return len(self._images)

    def images(self, rows: Any) -> Any:
        return self._images[rows]

    def targets(self, rows: Any) -> Any:
        return self._targets[rows]

    def examples(self, rows: Any) -> Any:
        return self.images(rows), self.targets(rows)


def seen(task: Reconstruction, network: nn.Module, images: Tensor, targets: Any = None) -> Any:
    """Evidence and figures of a network on `images`, each of its own patient."""
    cohort: Any = Images(images, targets)
    evidence = task.evidence(network, cohort, torch.device("cpu"))
    patients = np.arange(len(images))
    figures = task.score(evidence, patients, resamples=50, generator=np.random.default_rng(1))
    return evidence, figures


# --- Losses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "each"), [("mse", nn.MSELoss()), ("l1", nn.L1Loss())])
def test_a_loss_is_torchs_of_that_image_in_brightness(reconstruction: Make, name, each):
    task = reconstruction(loss={"name": name}, input={"mean": [0.3], "std": [0.2]})
    images, outputs = drawn(), torch.randn(6, 1, SIDE, SIDE, generator=generator())
    _, targets = task.examples(images, torch.zeros(6), nn.Identity(), generator())
    expected = [each(o * 0.2 + 0.3, i) for o, i in zip(outputs, images, strict=True)]
    assert torch.allclose(task.losses(outputs, targets), torch.stack(expected))


def test_the_network_that_gives_its_input_back_has_no_loss(reconstruction: Make):
    task = reconstruction(input={"channels": 3, "mean": [0.1, 0.2, 0.9], "std": [0.5, 1.0, 2.0]})
    images = drawn(channels=3)
    rows, targets = task.examples(images, torch.zeros(6), nn.Identity(), generator())
    assert task.losses(normalise(rows, task.spec.input), targets).abs().max() < 1e-12
    assert task.losses(rows, targets).min() > 1e-3


def test_the_divergence_is_that_of_torch_by_pixel(reconstruction: Make):
    images, numbers = drawn(), 10
    mean, log_variance = torch.randn(2, 6, numbers, generator=generator())
    outputs = torch.cat([images.flatten(1), mean, log_variance], dim=1)
    plain, weighted = (reconstruction(task={"kl_weight": w}) for w in (0.0, 0.25))
    _, targets = plain.examples(images, torch.zeros(6), nn.Identity(), generator())
    code = torch.distributions.Normal(mean, torch.exp(log_variance / 2))
    normal = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(code, normal).sum(dim=1) / SIDE**2
    added = weighted.losses(outputs, targets) - plain.losses(outputs, targets)
    assert torch.allclose(added, 0.25 * expected, atol=1e-6)


def test_a_loss_is_a_function_of_its_row_alone(reconstruction: Make):
    task = reconstruction(task={"goal": "anomaly", "kl_weight": 1.0})
    images, labels = drawn(), torch.tensor([0, 1, 0, 0, 1, 0])
    outputs = torch.randn(6, SIDE**2 + 8, generator=generator())
    _, targets = task.examples(images, labels, nn.Identity(), generator())
    together = task.losses(outputs, targets)
    alone = torch.cat([task.losses(outputs[i : i + 1], targets[i : i + 1]) for i in range(6)])
    assert torch.allclose(together, alone)
    assert together.shape == (6,)


def test_an_abnormal_image_is_not_learned_from_when_anomalies_are_sought(reconstruction: Make):
    outputs, labels = torch.randn(6, SIDE**2, generator=generator()), torch.arange(6) % 3
    for goal, learned in (("anomaly", labels == 0), ("compress", labels >= 0)):
        task = reconstruction(task={"goal": goal})
        _, targets = task.examples(drawn(), labels, nn.Identity(), generator())
        assert torch.equal(task.losses(outputs, targets) > 0, learned)


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [((6, 1, SIDE, SIDE - 1), (6, 257)), ((6, SIDE**2 + 3), (6, 257)), ((6, 256), (6, 256))],
)
def test_a_shape_that_does_not_fit_is_named(reconstruction: Make, outputs, targets):
    with pytest.raises(ModelError, match=r"expected"):
        reconstruction().losses(torch.zeros(outputs), torch.zeros(targets))


# --- Noise -------------------------------------------------------------------------------------


def test_the_network_sees_noise_of_the_deviation_asked_for_and_is_to_give_the_clean_image(
    reconstruction: Make,
):
    task = reconstruction(task={"goal": "denoise", "noise": 0.3})
    images = drawn(images=400)
    rows, targets = task.examples(images, torch.zeros(400), nn.Identity(), generator())
    noise = rows - images
    assert float(noise.std()) == pytest.approx(0.3, rel=0.01)
    assert abs(float(noise.mean())) < 0.005
    assert torch.equal(targets[:, :-1], images.flatten(1))
    again, _ = task.examples(images, torch.zeros(400), nn.Identity(), generator(6))
    assert not torch.equal(rows, again)


def test_evaluation_has_the_same_noise_each_time_and_another_for_each_image(reconstruction: Make):
    task = reconstruction(task={"goal": "denoise", "noise": 0.3})
    inputs: list[Tensor] = []
    network = Given(lambda images: inputs.append(images) or images)  # type: ignore[func-returns-value]
    alike = drawn(images=1).repeat(4, 1, 1, 1)
    first, _ = seen(task, network, alike)
    second, _ = seen(task, network, alike)
    assert torch.equal(inputs[0], inputs[1])
    assert not torch.equal(inputs[0][0], inputs[0][1])
    assert np.array_equal(first["psnr"], second["psnr"])


# --- References --------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [3, 5])
def test_the_median_filter_is_scipys(side):
    images = torch.rand(3, 2, 11, 14, generator=generator())
    expected = ndimage.median_filter(images.numpy(), (1, 1, side, side), mode="mirror")
    assert np.allclose(median_filter(images, side).numpy(), expected)


def test_the_lowest_frequencies_are_those_of_scipys_transform():
    images = torch.rand(2, 1, 12, 20, generator=generator())
    coefficients = fft.dctn(images.numpy(), axes=(2, 3), norm="ortho")
    down, right = np.indices((12, 20))
    low = (down / 12) ** 2 + (right / 20) ** 2 < 0.3
    expected = fft.idctn(coefficients * low, axes=(2, 3), norm="ortho")
    assert 20 < low.sum() < 100
    assert np.allclose(kept_frequencies(images, int(low.sum())).numpy(), expected, atol=1e-5)
    assert torch.allclose(kept_frequencies(images, 240), images, atol=1e-5)


def test_noise_is_measured_and_a_filter_that_helps_more_is_what_a_network_must_beat(
    reconstruction: Make,
):
    task = reconstruction(task={"goal": "denoise", "noise": 0.2})
    images = 0.3 + 0.4 * drawn(images=40)
    evidence, figures = seen(task, Given(lambda image: image), images)
    noisy, three, five = evidence["references"][:, :, 0].mean(axis=0)
    assert noisy == pytest.approx(-20 * math.log10(0.2), abs=0.6)  # a little is cut off
    assert max(three, five) > noisy + 3
    assert figures["psnr"].value == pytest.approx(noisy, abs=1e-4)
    assert figures["gain"].value == pytest.approx(noisy - max(three, five), abs=1e-4)


# --- Figures -----------------------------------------------------------------------------------


def test_psnr_is_that_of_torchmetrics_and_its_mean_stands_in_its_interval(reconstruction: Make):
    images = drawn(images=12)
    blurred = Given(blur)
    evidence, figures = seen(reconstruction(), blurred, images)
    given = (blur(normalise(images, reconstruction().spec.input)) * 0.25 + 0.5).clamp(0, 1)
    expected = peak_signal_noise_ratio(
        given, images, data_range=1.0, reduction="none", dim=(1, 2, 3)
    )
    assert np.allclose(evidence["psnr"], expected, atol=1e-3)
    psnr = figures["psnr"]
    assert psnr.value == pytest.approx(float(expected.mean()), abs=1e-3)
    assert psnr.low < psnr.value < psnr.high
    assert figures["ratio"].value == SIDE**2 / 64


def blur(image: Tensor) -> Tensor:
    return torch.from_numpy(ndimage.uniform_filter(image.numpy(), (0, 0, 3, 3)))


def test_a_perfect_image_has_100_db_and_all_of_ssim(reconstruction: Make):
    _, figures = seen(reconstruction(), Given(lambda image: image), drawn())
    assert figures["psnr"].value == pytest.approx(100, abs=1e-3)
    assert figures["ssim"].value == pytest.approx(1)


def test_without_a_code_there_is_no_ratio_and_nothing_to_compare_with(reconstruction: Make):
    _, figures = seen(reconstruction(), Given(lambda image: image, code_numbers=0), drawn())
    assert figures["ratio"].value is None
    assert figures["gain"].value is None


def test_answers_that_are_no_numbers_leave_no_figure(reconstruction: Make):
    def broken(image: Tensor) -> Tensor:
        image = image.clone()
        image[0, 0, 3, 3] = math.nan
        return image

    _, figures = seen(reconstruction(), Given(broken), drawn())
    assert all(figure.value is None for figure in figures.values())


def lowest_sixteenth(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """By SciPy: the lowest sixteenth of the frequencies of one (H, W) image."""
    down, right = np.indices(image.shape)
    distance = (down / image.shape[0]) ** 2 + (right / image.shape[1]) ** 2
    dropped = np.argsort(distance, axis=None, kind="stable")[image.size // 16 :]
    coefficients = fft.dctn(image, norm="ortho")
    coefficients.flat[dropped] = 0
    return np.asarray(fft.idctn(coefficients, norm="ortho").clip(0, 1))


def test_the_error_for_one_of_the_lowest_frequencies_scores_anomalies(reconstruction: Make):
    task = reconstruction(task={"goal": "anomaly"}, evaluation={"metric": "anomaly-auroc"})
    images, labels = drawn(images=30), np.arange(30) % 3

    def worse_for_some(image: Tensor) -> Tensor:
        deviation = image.std((1, 2, 3))[:, None, None, None]
        return image + torch.randn(image.shape, generator=generator()) * deviation

    evidence, figures = seen(task, Given(worse_for_some), images, labels)
    usual = np.stack([lowest_sixteenth(image[0]) for image in images.numpy()])
    scores = evidence["mse"] / ((usual - images[:, 0].numpy()) ** 2).mean((1, 2))
    expected = binary_auroc(torch.from_numpy(scores / scores.max()), torch.from_numpy(labels > 0))
    assert figures["anomaly-auroc"].value == pytest.approx(float(expected))
    answers = task.answers(worse_for_some(normalise(images, task.spec.input)), images)
    assert np.allclose([answer.anomaly or 0.0 for answer in answers], scores, rtol=1e-3)
    _, without = seen(task, Given(worse_for_some), images)
    assert without["anomaly-auroc"].value is None


def test_an_image_is_no_anomaly_for_being_sharp_nor_usual_for_being_hazy(reconstruction: Make):
    """Given back alike for their detail; by the squared error alone each hazy one looks usual."""
    task = reconstruction(task={"goal": "anomaly"}, evaluation={"metric": "anomaly-auroc"})
    sharp = drawn(images=20)
    hazy = 0.5 + (sharp - 0.5) / 4
    images, labels = torch.cat([sharp, hazy]), np.repeat([0, 1], 20)

    def halfway(image: Tensor) -> Tensor:
        return (image + kept_frequencies(image, image[0].numel() // 16)) / 2

    evidence, figures = seen(task, Given(halfway), images, labels)
    assert evidence["mse"][labels == 1].max() < evidence["mse"][labels == 0].min()
    assert figures["anomaly-auroc"].value == pytest.approx(0.5, abs=0.15)


def test_what_is_abnormal_is_read_off_any_target():
    boxes = torch.tensor([[[0, 0, 1, 1, -1.0]] * 2, [[0, 0, 1, 1, 0.0], [0, 0, 1, 1, -1.0]]])
    masks = torch.zeros(2, 3, 3, dtype=torch.long)
    masks[1, 2, 2] = 4
    for targets in (torch.tensor([0, 2]), torch.tensor([[0.0, 0], [0, 1]]), masks, boxes):
        assert abnormal(targets).tolist() == [0, 1]
    assert abnormal(torch.zeros(2, 0)).tolist() == [-1, -1]
    many = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert abnormal(many).tolist() == [0, 1, 1, 0]  # the first label is that of a normal image


# --- What is shown -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "kinds"),
    [
        ({"goal": "denoise", "noise": 0.2}, [Table, Gallery]),
        ({"goal": "compress"}, [Chart, Chart, Gallery]),
        ({"goal": "anomaly"}, [Chart, Chart, Chart, Gallery]),
    ],
)
def test_a_report_shows_the_network_beside_what_needs_no_training(
    reconstruction: Make, task, kinds
):
    made = reconstruction(task=task, evaluation={"gallery": 3})
    evidence, figures = seen(made, Given(blur), drawn(images=12), np.arange(12) % 2)
    cohort: Any = Images(drawn(images=12), np.arange(12) % 2)
    pictures = made.gallery(Given(blur), cohort, torch.device("cpu"))
    shown = made.exhibits({**evidence, **pictures}, np.arange(12))
    assert [type(each) for each in shown] == kinds
    gallery = shown[-1]
    assert isinstance(gallery, Gallery)
    assert gallery.pictures.shape[0] == len(gallery.captions) == 3
    if isinstance(shown[0], Table):
        assert f"{figures['psnr'].value:.2f}" in shown[0].rows[-1][1]


def test_a_figure_that_a_report_prints_twice_has_one_interval(reconstruction: Make):
    made = reconstruction(task={"goal": "denoise", "noise": 0.2})
    evidence, _ = seen(made, Given(blur), drawn(images=12))
    part = score_part(made.spec, "test", evidence, np.arange(12), "image")
    table = made.exhibits(evidence, np.arange(12))[0]
    assert isinstance(table, Table)
    expected = [words.estimate(part.metrics[name], n) for name, n in (("psnr", 2), ("ssim", 3))]
    assert [*table.rows[-1][1:]] == expected
    assert " to " in expected[0]


def test_a_picture_says_which_image_it_is_and_what_is_true_of_it(reconstruction: Make):
    made = reconstruction(task={"goal": "anomaly"}, evaluation={"gallery": 12})
    labels = np.arange(12) % 2
    evidence, _ = seen(made, Given(blur), drawn(images=12), labels)
    cohort: Any = Images(drawn(images=12), labels)
    kept = {**evidence, **made.gallery(Given(blur), cohort, torch.device("cpu"))}
    gallery = made.exhibits(kept, np.arange(12))[-1]
    assert isinstance(gallery, Gallery)
    said = [
        re.match(r"Image (\d+): (normal|abnormal), score [\d.]+; PSNR", c) for c in gallery.captions
    ]
    assert [match and match.groups() for match in said] == [
        (str(n + 1), "abnormal" if label else "normal") for n, label in enumerate(labels)
    ]
    true, given = (kept[f"gallery_{name}"].astype(int) for name in ("images", "given"))
    darkest = 255 - np.minimum(4 * np.abs(given - true), 255).max(axis=(1, 2, 3))
    side = gallery.pictures.shape[1]
    assert (gallery.pictures[:, :, -side:].min(axis=(1, 2, 3)) == darkest).all()


def test_among_what_is_measured_is_no_picture(reconstruction: Make):
    made = reconstruction(evaluation={"gallery": 3})
    evidence, _ = seen(made, Given(blur), drawn(images=12))
    assert not [name for name in evidence if name.startswith("gallery")]
    assert not [each for each in made.exhibits(evidence, np.arange(12)) if type(each) is Gallery]


# --- The section -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"goal": "denoise"}}, "expected a noise above 0"),
        ({"task": {"noise": 0.1}}, "expected a noise above 0"),
        ({"input": {"normalize": "image"}}, "write 'literal'"),
        ({"loss": {"name": "dice"}}, "expected one of mse, l1"),
        ({"loss": {"name": "mse", "label_smoothing": 0.1}}, "no loss of reconstruction has it"),
        ({"model": {"name": "small-cnn"}}, "autoencoder, residual-unet, vae"),
        (
            {
                "task": {"goal": "denoise", "noise": 0.1},
                "evaluation": {"metric": "anomaly-auroc"},
            },
            "scores no anomalies",
        ),
    ],
)
def test_what_does_not_fit_a_reconstruction_is_refused(reconstruction: Make, changes, message):
    with pytest.raises((SpecError, ModelError), match=message):
        models.build(reconstruction(**changes).spec)


def test_a_network_learns_to_give_images_back(reconstruction: Make):
    """The whole way, with weights that are trained: PSNR rises, and above the noisy image's."""
    task = reconstruction(
        task={"goal": "denoise", "noise": 0.3, "code": 8}, input={"mean": [0.5], "std": [0.25]}
    )
    network, images, source = models.build(task.spec), drawn(images=64), generator()
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    _, before = seen(task, network.eval(), images)
    for _ in range(150):
        rows, targets = task.examples(images, torch.zeros(64), network, source)
        loss = task.losses(network.train()(normalise(rows, task.spec.input)), targets).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    _, after = seen(task, network.eval(), images)
    assert after["psnr"].value > before["psnr"].value + 3
    assert after["gain"].value > 0
