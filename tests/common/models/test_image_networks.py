"""Auto-encoders and pairs: shapes at any size, what is a code, what a spec asks of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from common import models
from common.spec import RunSpec

SIZES = [(1, 16, 16), (3, 17, 22), (1, 28, 30)]
size = pytest.mark.parametrize("shape", SIZES, ids=str)


def images_of(shape: tuple[int, int, int], count: int = 3) -> Any:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def reconstruction(make_spec: Callable[..., RunSpec]) -> Callable[..., RunSpec]:
    def make(name: str, shape: tuple[int, int, int], **task: Any) -> RunSpec:
        channels, height, width = shape
        return make_spec(
            task={"name": "reconstruction"} | task,
            loss={"name": "mse"},
            model={"name": name, "width": 4},
            input={"channels": channels, "height": height, "width": width},
            evaluation={"metric": "psnr"},
        )

    return make


@size
def test_an_autoencoder_gives_back_an_image_of_the_same_size(reconstruction, shape):
    spec = reconstruction("autoencoder", shape, code=3)
    network: Any = models.build(spec)
    models.check_private(network)
    assert network(images_of(shape)).shape == (3, *shape)
    assert network.encoder(images_of(shape))[0].numel() == network.code_numbers


@size
def test_a_residual_one_gives_what_it_is_given_and_what_it_finds(reconstruction, shape):
    network: Any = models.build(reconstruction("residual-unet", shape))
    models.check_private(network)
    images = images_of(shape)
    assert network(images).shape == images.shape
    assert not torch.allclose(network(images), images, atol=1e-3)
    with torch.no_grad():
        network.last.weight.zero_()
        network.last.bias.zero_()
    assert torch.equal(network(images), images)


@size
def test_a_variational_one_gives_its_code_behind_the_pixels(reconstruction, shape):
    network: Any = models.build(reconstruction("vae", shape, code=3)).eval()
    models.check_private(network)
    given, images = network(images_of(shape)), images_of(shape)
    pixels, code = images[0].numel(), network.code_numbers
    assert given.shape == (3, pixels + 2 * code)
    mean, log_variance = network.encoder(images).flatten(1).split(code, dim=1)
    assert torch.equal(given[:, pixels : pixels + code], mean)
    assert torch.allclose(given[:, pixels + code :], log_variance)


def test_a_code_is_drawn_in_training_and_its_mean_is_taken_in_evaluation(reconstruction):
    network: Any = models.build(reconstruction("vae", (1, 16, 16)))
    images = images_of((1, 16, 16))
    with torch.no_grad():
        one, other = network.train()(images), network(images)
        assert not torch.equal(one[:, :256], other[:, :256])
        assert torch.equal(one[:, 256:], other[:, 256:])
        network.eval()
        assert torch.equal(network(images), network(images))


@pytest.mark.parametrize("name", ["autoencoder", "vae"])
def test_nothing_passes_but_through_the_code(reconstruction, name):
    """With the code's weights at zero, every image gives the same."""
    network: Any = models.build(reconstruction(name, (1, 16, 16))).eval()
    with torch.no_grad():
        network.encoder[-1].weight.zero_()
        given = network(images_of((1, 16, 16)))[:, :1]
    assert torch.allclose(given[0], given[1])


@size
@pytest.mark.parametrize("classes", [["a", "b"], ["a", "b", "c"]])
def test_a_pair_makes_images_in_brightness_and_judges_them_by_class(make_spec, shape, classes):
    channels, height, width = shape
    spec = make_spec(
        task={"name": "generation", "kind": "multilabel", "classes": classes, "latent": 5},
        loss={"name": "adversarial"},
        model={"name": "dcgan", "width": 4},
        input={"channels": channels, "height": height, "width": width},
        evaluation={"metric": "tstr-auroc"},
    )
    network: Any = models.build(spec)
    models.check_private(network)
    made = network.generator(torch.randn(6, 5 + len(classes)))
    assert made.shape == (6, *shape)
    assert 0 < made.min() < made.max() < 1
    assert network(made).shape == (6, 1 + len(classes))
    assert torch.allclose(network(made)[:1], network(made[:1]), atol=1e-5)
