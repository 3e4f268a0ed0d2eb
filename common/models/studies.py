"""One decision from several images of a study."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.errors import ModelError
from common.spec import RunSpec

HIDDEN = 64


class StudyNetwork(nn.Module):
    """An encoder of single images, then gated attention over those of a study.

    The weight of an image with features h is the softmax over the study's images of
    w (tanh(V h) * sigmoid(U h)) (Ilse et al. 2018, arXiv:1802.04712, equation 9); the mean of the
    features by these weights gives the logits. A place without an image has the weight 0 and moves
    nothing; a study without any image gives what zeros as features give.

    Args:
        encoder: gives (B, features) for (B, C, H, W).
        features: how many.
        outputs: logits.
    """

    def __init__(self, encoder: nn.Module, features: int, outputs: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.content = nn.Linear(features, HIDDEN)
        self.gate = nn.Linear(features, HIDDEN)
        self.weight = nn.Linear(HIDDEN, 1)
        self.output = nn.Linear(features, outputs)

    def forward(self, images: Tensor) -> Tensor:
        """(B, K, C, H, W), NaN throughout where there is no image, to (B, outputs)."""
        return self.attended(images)[0]

    def attended(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, and (B, K) the weight of each image in its study's decision."""
        studies, places = images.shape[:2]
        there = ~images.isnan().flatten(2).all(dim=2)
        seen = torch.where(there[:, :, None, None, None], images, 0.0)
        features = self.encoder(seen.flatten(0, 1)).view(studies, places, -1)
        scores = self.weight(self.content(features).tanh() * self.gate(features).sigmoid())[..., 0]
        lowest = torch.finfo(scores.dtype).min
        weights = scores.masked_fill(~there, lowest).softmax(dim=1) * there
        pooled = (weights[:, :, None] * features).sum(dim=1)
        return self.output(pooled), weights


def of_study(factory: Callable[[RunSpec], nn.Module], spec: RunSpec) -> nn.Module:
    """The network of a run that takes several images of a study, around one of single images."""
    encoder, features = trunk(factory(spec), spec)
    return StudyNetwork(encoder, features, spec.task.outputs)


def trunk(network: nn.Module, spec: RunSpec) -> tuple[nn.Module, int]:
    """A network without its output layer, and how many features it then gives.

    Raises:
        ModelError: if its last linear layer is not that of the outputs.
    """
    layers = [
        (name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.Linear)
    ]
    if not layers or layers[-1][1].out_features != spec.task.outputs:
        raise ModelError(
            f"model.name = {spec.model.name!r}: it does not end with a linear layer of "
            f"{spec.task.outputs} outputs, so it has no features to be pooled; choose another "
            "network, or leave input.images out"
        )
    name, output = layers[-1]
    network.set_submodule(name, nn.Identity())
    return network, output.in_features
