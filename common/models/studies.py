"""One decision from several images of a study, of one modality or of many.

**One modality** (`StudyNetwork`): an encoder sees each image, attention pools their features, a
linear layer makes logits of the pooled ones.

**Modalities** (`ModalityNetwork`): each has an encoder of its own, for a CT and an MR have no edge
in common that looks alike, and where there are several images of it, attention of its own. What is
pooled of each stands side by side before the linear layer, the modalities in the order of the
run's file, so that each has weights of its own there; beside them a number for each modality says
whether it is *absent* (1) or there (0). That layer's column for it is what is learned of "there is
no MR": where there is none, its features are zeros, and nothing else tells an absent image from one
that shows nothing.

**What is absent.** A place without an image has the weight 0 in what is pooled, and a modality
without any image pools to zeros. So the gradient of its encoder by that patient is exactly zero,
and not that of a black image. Each row of a batch is worked out by itself: there are no statistics
over a batch, and no place's image reaches another patient's answer (docs/privacy.md 2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn

from common.errors import ModelError
from common.spec import RunSpec

HIDDEN = 64


class Pool(nn.Module):
    """An encoder of single images, then gated attention over those of a study.

    The weight of an image with features h is the softmax over the study's images of
    w (tanh(V h) * sigmoid(U h)) (Ilse et al. 2018, arXiv:1802.04712, equation 9); the mean of the
    features by these weights is what is pooled. A place without an image has the weight 0 and moves
    nothing; a study without any image gives zeros.

    Args:
        encoder: gives (B, features) for (B, C, H, W).
        features: how many.
    """

    def __init__(self, encoder: nn.Module, features: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.content = nn.Linear(features, HIDDEN)
        self.gate = nn.Linear(features, HIDDEN)
        self.weight = nn.Linear(HIDDEN, 1)

    def pooled(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Of (B, K, C, H, W), NaN throughout where there is no image, (B, features) and (B, K).

        The latter are the weights of the images.
        """
        known, features = encoded(self.encoder, images)
        scores = self.weight(self.content(features).tanh() * self.gate(features).sigmoid())[..., 0]
        lowest = torch.finfo(scores.dtype).min
        weights = scores.masked_fill(~known, lowest).softmax(dim=1) * known
        return (weights[:, :, None] * features).sum(dim=1), weights


class One(nn.Module):
    """`Pool` where there is one image at most: it needs no attention.

    Args:
        encoder: gives (B, features) for (B, C, H, W).
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def pooled(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As `Pool.pooled`, of (B, 1, C, H, W)."""
        known, features = encoded(self.encoder, images)
        weights = known.to(features.dtype)
        return weights * features[:, 0], weights


class StudyNetwork(Pool):
    """`Pool`, and the logits of what is pooled.

    Args:
        encoder: gives (B, features) for (B, C, H, W).
        features: how many.
        outputs: logits.
    """

    def __init__(self, encoder: nn.Module, features: int, outputs: int) -> None:
        super().__init__(encoder, features)
        self.output = nn.Linear(features, outputs)

    def forward(self, images: Tensor) -> Tensor:
        """(B, K, C, H, W), NaN throughout where there is no image, to (B, outputs)."""
        return self.attended(images)[0]

    def attended(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, and (B, K) the weight of each image in its study's decision."""
        pooled, weights = self.pooled(images)
        return self.output(pooled), weights


class ModalityNetwork(nn.Module):
    """An encoder for each modality, and one decision; see the text of this module.

    Args:
        encoders: one a modality; each gives (B, features) for (B, C, H, W).
        features: how many.
        images: places of each modality.
        outputs: logits.
    """

    def __init__(self, encoders: list[nn.Module], features: int, images: int, outputs: int) -> None:
        super().__init__()
        self.images = images
        self.each = nn.ModuleList(
            One(encoder) if images == 1 else Pool(encoder, features) for encoder in encoders
        )
        self.output = nn.Linear(len(encoders) * (features + 1), outputs)

    def forward(self, images: Tensor) -> Tensor:
        """(B, modalities x images, C, H, W), NaN where there is none, to (B, outputs)."""
        return self.attended(images)[0]

    def attended(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, and for each place the weight of its image among those of its modality."""
        starts = range(0, len(self.each) * self.images, self.images)
        parts = [images[:, start : start + self.images] for start in starts]
        pools = cast("Iterable[Pool | One]", self.each)
        found = [pool.pooled(part) for pool, part in zip(pools, parts, strict=True)]
        pooled, weights = (torch.cat(each, dim=1) for each in zip(*found, strict=True))
        absent = torch.stack([~there(part).any(dim=1) for part in parts], dim=1)
        return self.output(torch.cat([pooled, absent.to(pooled.dtype)], dim=1)), weights


def there(images: Tensor) -> Tensor:
    """(B, K) whether a place of (B, K, C, H, W) has an image."""
    return ~images.isnan().flatten(2).all(dim=2)


def encoded(encoder: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K) which images are there, and (B, K, features) of all places, black ones where none is.

    A patient's rows lie side by side in what the encoder sees, as `client.training` adds them up.
    """
    studies, places = images.shape[:2]
    known = there(images)
    seen = torch.where(known[:, :, None, None, None], images, 0.0)
    return known, encoder(seen.flatten(0, 1)).view(studies, places, -1)


def of_study(factory: Callable[[RunSpec], nn.Module], spec: RunSpec) -> nn.Module:
    """The network of a run that takes several images of a study, around one of single images."""
    trunks = [trunk(factory(spec), spec) for _ in spec.input.modalities or ("",)]
    (encoder, features), outputs = trunks[0], spec.task.outputs
    if not spec.input.modalities:
        return StudyNetwork(encoder, features, outputs)
    encoders = [encoder for encoder, _ in trunks]
    return ModalityNetwork(encoders, features, spec.input.images, outputs)


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
            "network, or leave input.images and input.modalities out"
        )
    name, output = layers[-1]
    network.set_submodule(name, nn.Identity())
    return network, output.in_features
