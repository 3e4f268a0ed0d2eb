"""The registry of networks.

A new network is one function, ``RunSpec -> nn.Module``, and one line in the table below. What it
returns of an image is computed from that image alone, so it holds no BatchNorm and no statistics
of a batch (docs/privacy.md 2). The table names functions instead of importing them: MONAI takes
seconds to import, and a run uses one network.

What networks give, for B images, is what a task asks for (``NETWORK`` of its section):

==========  ======================================================================================
``vector``  (B, outputs) logits
``map``     (B, outputs, H, W) logits of every pixel, of volumes (B, outputs, D, H, W)
``boxes``   (B, outputs, H / 4, W / 4) maps of centres, sizes and offsets
``image``   (B, channels, H, W), or a row an image where a code's numbers stand behind the pixels
``pair``    a generator and a discriminator, of which the task knows the use
==========  ======================================================================================
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from common.errors import ModelError
from common.spec import RunSpec

Gives = Literal["vector", "map", "boxes", "image", "pair"]


class Network(NamedTuple):
    """One line of the registry.

    Attributes:
        factory: where the function stands, as ``module:function``.
        smallest_side: the least height and width of an image, in pixels.
        takes_width: whether ``spec.model.width`` means something to it.
        gives: what it returns; see the table of this module.
        smallest_depth: the fewest slices of a volume; 0: it takes no volumes.
    """

    factory: str
    smallest_side: int
    takes_width: bool = False
    gives: Gives = "vector"
    smallest_depth: int = 0


NETWORKS = {
    "alexnet": Network("common.models.alexnet:alexnet", smallest_side=16, takes_width=True),
    "autoencoder": Network("common.models.autoencoder:autoencoder", 16, True, "image"),
    "centernet": Network("common.models.centernet:centernet", 32, True, "boxes"),
    "compact-cnn": Network("common.models.cnn:compact_cnn", smallest_side=16, takes_width=True),
    "dcgan": Network("common.models.gan:dcgan", 16, True, "pair"),
    "densenet121": Network("common.models.monai:densenet121", smallest_side=32),
    "efficientnet-b0": Network("common.models.monai:efficientnet_b0", smallest_side=16),
    "pooled-cnn": Network("common.models.cnn:pooled_cnn", smallest_side=16, takes_width=True),
    "reference-cnn": Network("common.models.cnn:reference_cnn", smallest_side=46),
    "residual-unet": Network("common.models.denoiser:residual_unet", 16, True, "image"),
    "resnet18": Network("common.models.monai:resnet18", smallest_side=16),
    "small-cnn": Network("common.models.cnn:small_cnn", smallest_side=16, takes_width=True),
    "unet": Network("common.models.unet:unet", 32, True, "map", smallest_depth=16),
    "vae": Network("common.models.autoencoder:vae", 16, True, "image"),
    "vit": Network("common.models.vit:vit", smallest_side=16, takes_width=True),
}

_OF_STUDY = "common.models.studies:of_study"


def names(gives: str | None = None) -> tuple[str, ...]:
    """The names that ``spec.model.name`` may have, sorted; of those alone that give `gives`."""
    return tuple(sorted(name for name, n in NETWORKS.items() if gives in (None, n.gives)))


def build(spec: RunSpec) -> nn.Module:
    """Build the network of a run, in training mode, on the CPU, in float32.

    The same spec gives the same weights in every process: they are drawn from ``spec.seed``, and
    the state of the global random generators is left as it was.

    Raises:
        ModelError: if the name is not in the registry, the network does not give what the task
            takes, the images are too small for it, the spec sets an option that it does not
            have, or several images of a study have to be seen by a network without features.
    """
    _network_for(spec)
    # Seeding the CPU's generator alone: torch.manual_seed would seed every device's.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(spec.seed)
        return _made(spec).float()


@lru_cache(maxsize=32)
def shapes(spec: RunSpec) -> Mapping[str, tuple[int, ...]]:
    """The shape of each parameter of a run's network, by name; nothing of its size is allocated.

    Raises:
        ModelError: as `build`.
    """
    named = outline(spec).named_parameters()
    return {name: tuple(parameter.shape) for name, parameter in named}


def outline(spec: RunSpec) -> nn.Module:
    """A run's network on torch's ``meta`` device: its shapes, without any of its numbers.

    Raises:
        ModelError: as `build`.
    """
    _network_for(spec)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return _made(spec)


@lru_cache(maxsize=32)
def learned(spec: RunSpec) -> frozenset[str]:
    """The names of the parameters that a run trains: all, or those of the last layer.

    Raises:
        ModelError: as `build`; or the last layer alone is asked for, and is not that of the
            task's outputs.
    """
    network = outline(spec)
    if spec.model.trained == "all":
        return frozenset(name for name, _ in network.named_parameters())
    name, layer = [
        (name, layer)
        for name, layer in network.named_modules()
        if any(True for _ in layer.parameters(recurse=False))
    ][-1]
    outputs = layer.get_parameter("weight").shape[0]
    if outputs != spec.task.outputs or spec.task.NETWORK == "pair":
        raise ModelError(
            f"model.trained = 'head': {spec.model.name!r} does not end with a layer of the "
            f"{spec.task.outputs} outputs of {spec.task.name}; leave the key out, or choose "
            "another network"
        )
    return frozenset(f"{name}.{own}" for own, _ in layer.named_parameters())


def check_private(model: nn.Module) -> None:
    """Refuse a network that cannot be trained soundly under DP-SGD.

    What is seen here is what the modules declare. That an image's output depends on that image
    alone is a property of the forward pass, which the tests hold for every network by itself.

    Raises:
        ModelError: naming the layer: BatchNorm in any form, frozen and without parameters too;
            state that is no parameter, which would leave the site without noise; an activation
            in place, on which per-patient gradients fail (opacus#828).
    """
    for name, module in model.named_modules():
        _check_layer(name or "the network itself", module)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in model.state_dict(keep_vars=True):
        if name not in parameters:
            raise ModelError(
                f"{name}: this is state without being a parameter; it would leave the site "
                "without noise. Drop it, or register it with persistent=False if it is a constant"
            )


def _check_layer(name: str, module: nn.Module) -> None:
    kind = type(module).__name__
    if isinstance(module, _BatchNorm) or "batchnorm" in kind.lower():
        raise ModelError(
            f"{name}: {kind} mixes the patients of a batch, so no patient's gradient can be "
            "clipped; use GroupNorm"
        )
    if getattr(module, "inplace", False) is True:
        raise ModelError(
            f"{name}: {kind} works in place, on which per-patient gradients fail; use inplace=False"
        )


def _made(spec: RunSpec) -> nn.Module:
    """The network, around which there is another where it is to see several images at once."""
    factory = pkgutil.resolve_name(NETWORKS[spec.model.name].factory)
    around = pkgutil.resolve_name(_OF_STUDY) if spec.input.of_studies else None
    model: nn.Module = around(factory, spec) if around else factory(spec)
    if spec.model.dropout and not any(isinstance(layer, _DropoutNd) for layer in model.modules()):
        raise ModelError(
            f"model.dropout = {spec.model.dropout:g}: {spec.model.name!r} has no dropout here; "
            "leave the key out"
        )
    return model


def _network_for(spec: RunSpec) -> Network:
    """The line of the registry that the spec asks for, if it fits the spec."""
    name, (*slices, height, width) = spec.model.name, spec.input.seen
    asked = spec.task.NETWORK
    fitting = ", ".join(names(asked)) or "none, for there is no such network"
    if name not in NETWORKS:
        raise ModelError(f"model.name = {name!r}: expected one of {fitting}")
    network = NETWORKS[name]
    if network.gives != asked:
        raise ModelError(
            f"model.name = {name!r}: it gives {network.gives!r}, and {spec.task.name} takes "
            f"{asked!r}; expected one of {fitting}"
        )
    if min(height, width) < network.smallest_side:
        where = "input.patch" if spec.input.patch else "input"
        raise ModelError(
            f"{where}.height x {where}.width = {height} x {width}: {name} needs at least "
            f"{network.smallest_side} pixels on either side"
        )
    if slices and not network.smallest_depth:
        raise ModelError(
            f"model.name = {name!r}: it takes images, and input.depth asks for volumes"
        )
    if slices and slices[0] < network.smallest_depth:
        raise ModelError(
            f"{slices[0]} slices of a volume (input.depth, input.patch): {name} needs at least "
            f"{network.smallest_depth}"
        )
    if spec.model.width is not None and not network.takes_width:
        raise ModelError(
            f"model.width = {spec.model.width}: {name} has a fixed width; leave the key out"
        )
    return network
