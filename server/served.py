"""A network as other programs meet it: brightness in, answers out, nothing of Cloister in between.

What the run's file says of the input (mean, deviation) and what calibration found (temperatures)
becomes part of the network, so that nobody has to repeat it, and nobody can forget it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.calibration import Calibration
from common.models.gan import Pair
from common.spec import RunSpec
from common.tasks import task_for
from common.tasks.preprocess import normalise


class Served(nn.Module):
    """From images, brightness in 0..1, to what `Task.served` names; in evaluation mode.

    Args:
        network: in evaluation mode; of a pair the generator is taken, the discriminator has seen
            patients' images.
        spec: the run's.
        calibration: divides the logits by its temperatures; None leaves them.

    Attributes:
        heat: the temperatures, one or one an output; None without a calibration.
        names: of what it gives, in order; the last is what counts.
        given: the shape of one input: (channels, height, width), or with a depth before it; of a
            study (images, channels, height, width); of a generator (numbers,).
        input_name: what it is given.
    """

    heat: Tensor | None

    def __init__(
        self, network: nn.Module, spec: RunSpec, calibration: Calibration | None = None
    ) -> None:
        super().__init__()
        self.spec, self._task = spec, task_for(spec)
        self.generates = isinstance(network, Pair)
        self.network: nn.Module = network.generator if isinstance(network, Pair) else network
        self.given: tuple[int, ...] = self.spec.input.row_shape
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
    single.flatten(1)[:, single[0].numel() // 2] = 1.0
    tried = {
        "random": even,
        "black": torch.zeros(shape),
        "white": torch.ones(shape),
        "black and white": (even > 0.5).float(),
        "one bright pixel": single,
    }
    if served.spec.input.of_studies:
        few = even.clone()
        few[:, 1:] = torch.nan
        last = even.clone()
        last[:, :-1] = torch.nan
        tried |= {"the first image of a study": few, "the last image of a study": last}
    return tried
