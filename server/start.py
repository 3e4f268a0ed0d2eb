"""Where a run begins: at the weights of its seed, or at a trained model that its file names.

The model is a package, or a finished run's folder, whose weights lie in the run's own folder from
then on. The digest in the run's file vouches for them, here and whenever the run goes on.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors.numpy import load
from torch import nn

from common import models
from common.errors import PackageError, RunError, SpecError
from common.messages import LARGEST_WEIGHT, Arrays
from common.package import Package
from common.spec import RunSpec

START_FILE = "start.safetensors"


def starting_model(spec: RunSpec, model: Path | None) -> bytes | None:
    """The content of `START_FILE` for a run that is about to be made; None if it needs none.

    Args:
        spec: the run.
        model: a package or a finished run's folder, as a person names it.

    Raises:
        SpecError: if the run's file names a model and none is given, another one, or the reverse.
        PackageError: as `Package.open`; or it is of another network, or of one site alone.
    """
    if model is None:
        if spec.start is not None:
            raise SpecError(
                f"start.model_sha256 = {spec.start.model_sha256!r}: give the model with --model "
                "PACKAGE, or take the table [start] out"
            )
        return None
    package = Package.open(model, unsigned=True)  # the digest in the run's file vouches for it
    refuse_personal(package)
    if spec.start is None or spec.start.model_sha256 != package.model_sha256:
        named = spec.start.model_sha256 if spec.start else "none"
        raise SpecError(
            f"start.model_sha256 is {named}, and {model} holds {package.model_sha256}; write "
            f'[start] model_sha256 = "{package.model_sha256}" into the run\'s file if that is the '
            "one"
        )
    weights = dict(package.network().named_parameters())
    seen = {name: tuple(parameter.shape) for name, parameter in weights.items()}
    if seen != models.shapes(spec):
        raise PackageError(
            f"{model}: a model of {package.spec.model.name!r} whose weights do not fit the run's "
            f"{spec.model.name!r}; expected the same network, input and classes"
        )
    return package.weights()


def starting_weights(spec: RunSpec, folder: Path, network: nn.Module) -> Arrays:
    """The weights of a run's first round: those of `network`, unless its file names a model.

    Raises:
        RunError: if those in `folder` are not the ones that the run's file names.
    """
    if spec.start is None:
        named = network.named_parameters()
        return {name: parameter.detach().numpy().copy() for name, parameter in named}
    path = folder / START_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error}); put it back") from error
    seen = hashlib.sha256(content).hexdigest()
    if seen != spec.start.model_sha256:
        raise RunError(
            f"{path}: its SHA-256 is {seen}, the run begins at {spec.start.model_sha256}; put it "
            "back"
        )
    weights = load(content)
    if any(not abs(array).max(initial=0) <= LARGEST_WEIGHT for array in weights.values()):
        raise RunError(f"{path}: a weight is beyond {LARGEST_WEIGHT:g}, which no site would take")
    return weights


def refuse_personal(package: Package) -> None:
    """Refuse a model of one site alone.

    Raises:
        PackageError: if it is one, or its file cannot be read.
    """
    if package.is_personal():
        raise PackageError(
            f"{package.path}: a personal model, trained on the patients of one site for that site; "
            "expected a federation's model, or one that was fine-tuned with --private"
        )
