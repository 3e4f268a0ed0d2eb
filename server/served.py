"""A network as other programs meet it: brightness in, answers out, nothing of Cloister in between.

What the run's file says of the input (mean, deviation) and what calibration found (temperatures)
becomes part of the network, so that nobody has to repeat it, and nobody can forget it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.calibration import Calibration
from common.errors import ModelError
from common.models import NETWORKS
from common.models.gan import Pair
from common.package import Package
from common.tasks import task_for
from common.tasks.preprocess import normalise


class Served(nn.Module):
    """From images, brightness in 0..1, to what `Task.served` names; in evaluation mode.

    Args:
        package: the model.
        calibration: divides the logits by its temperatures; None leaves them.

    Attributes:
        heat: the temperatures, one or one an output; None without a calibration.
        names: of what it gives, in order; the last is what counts.
        given: the shape of one input: (channels, height, width), or with a depth before it; of a
            generator (numbers,).
        input_name: what it is given.
    """

    heat: Tensor | None

    def __init__(self, package: Package, calibration: Calibration | None) -> None:
        super().__init__()
        self.spec, self._task = package.spec, task_for(package.spec)
        network = package.network()
        # Of a pair only the generator is a result: the discriminator has seen patients' images.
        self.generates = isinstance(network, Pair)
        self.network: nn.Module = network.generator if isinstance(network, Pair) else network
        self.given: tuple[int, ...] = (self.spec.input.channels, *self.spec.input.seen)
        if isinstance(network, Pair):
            self.given = (network.generator.given,)
        self.input_name = "noise_and_classes" if self.generates else "images"
        heat = None if calibration is None else torch.tensor(calibration.temperatures)
        self.register_buffer("heat", heat, persistent=False)
        with torch.no_grad():
            self.names = tuple(self._named(torch.zeros(1, *self.given)))
        self.eval()

    def forward(self, given: Tensor) -> tuple[Tensor, ...]:
        """(B, …) of `given` to tensors of B rows, as `names` has them."""
        return tuple(self._named(given).values())

    def _named(self, given: Tensor) -> dict[str, Tensor]:
        if self.generates:
            return {"image": self.network(given)}
        outputs = self.network(normalise(given, self.spec.input)).float()
        if self.heat is not None:
            outputs = outputs / self.heat
        return dict(self._task.served(outputs))


class ServedOne(nn.Module):
    """`Served` for those who take one tensor: the last of what it gives."""

    def __init__(self, served: Served) -> None:
        super().__init__()
        self.served = served

    def forward(self, images: Tensor) -> Tensor:
        """(B, …) to (B, …)."""
        answers: tuple[Tensor, ...] = self.served(images)
        return answers[-1]


def probes(served: Served, rows: int, seed: int) -> dict[str, Tensor]:
    """Inputs on which an export is compared with the network: (rows, …) each, by name."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, *served.given)
    even = torch.rand(shape, generator=generator)
    if served.generates:
        return {"normal": torch.randn(shape, generator=generator), "none": torch.zeros(shape)}
    single = torch.zeros(shape)
    single.flatten(2)[..., single[0, 0].numel() // 2] = 1.0
    return {
        "random": even,
        "black": torch.zeros(shape),
        "white": torch.ones(shape),
        "black and white": (even > 0.5).float(),
        "one bright pixel": single,
    }


def refuse_what_has_no_export(package: Package, what: str, *, pairs: bool) -> None:
    """Check that such a network can be exported.

    Raises:
        ModelError: naming the network, and what else can be done.
    """
    gives = NETWORKS[package.spec.model.name].gives
    if gives == "pair" and not pairs:
        raise ModelError(
            f"model.name = {package.spec.model.name!r}: {what} is of networks that are given "
            "images, and a generator is given noise; export it as ONNX, or as a package"
        )
