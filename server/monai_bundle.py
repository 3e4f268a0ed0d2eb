"""A MONAI bundle: a network as MONAI's own tools and MONAI Deploy take it.

After the MONAI Bundle Specification: ``configs/metadata.json`` says what goes in and comes out,
``configs/inference.json`` how it is run, ``models/model.ts`` is the network in TorchScript, which
needs neither Cloister nor the code of the network.

The specification also wants ``models/model.pt``, weights as a Python pickle. It is left out: to
read a pickle is to run what is in it (docs/models.md). TorchScript's archive has that format too,
but torch's own reader, in C++, makes of it tensors and TorchScript's types and calls no Python.
Cloister itself reads neither.
"""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from common.errors import ModelError
from server.export import Described
from server.graph import TOLERANCE
from server.served import Served, ServedOne, probes

METADATA, INFERENCE, NETWORK = "configs/metadata.json", "configs/inference.json", "models/model.ts"
README = "docs/README.md"
_SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
    "meta_schema_20240725.json"
)
_SEED = 2
_MEANING = {
    "probabilities": ("probabilities", "classes"),
    "image": ("image", "magnitude"),
    "outputs": ("image", "raw"),
}


def monai_files(described: Described) -> dict[str, bytes]:
    """The files of a bundle.

    Raises:
        ModelError: if the network cannot be exported so, or does not give the same in TorchScript.
    """
    package = described.package
    served = Served(package.network(), package.spec, described.calibration)
    if served.generates or package.spec.input.of_studies:
        taken = "noise" if served.generates else "several images of a study at once"
        raise ModelError(
            f"model.name = {package.spec.model.name!r}: it is given {taken}, and a MONAI bundle "
            "describes networks that are given an image; export it as ONNX, or as a package"
        )
    papers = described.papers()
    with torch.no_grad():
        answer = served(torch.zeros(1, *served.given))[-1]
    return papers | {
        README: papers["model_card.md"],
        METADATA: _json(_metadata(described, served, answer)),
        INFERENCE: _json(inference()),
        NETWORK: _script(served),
    }


def inference() -> dict[str, Any]:
    """How the bundle is run: each ``.npy`` of a folder through the network, into another folder.

    What lies in the folder is what the network takes (``network_data_format`` of the metadata).
    Of DICOM it is made by Cloister (`cloister predict`, `cloister intake`): MONAI's transforms
    know neither its windows nor the way in which it fits an image to the grid.
    """
    return {
        "imports": ["$import numpy", "$import pathlib"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/images'",
        "output_dir": "$@bundle_root + '/answers'",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "network_def": {
            "_target_": "torch.jit.load",
            "f": f"$@bundle_root + '/{NETWORK}'",
            "map_location": "@device",
        },
        "datalist": "$sorted(pathlib.Path(@dataset_dir).glob('*.npy'))",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image", "reader": "NumpyReader"},
                {"_target_": "EnsureTyped", "keys": "image", "dtype": "$torch.float32"},
            ],
        },
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': str(path)} for path in @datalist]",
            "transform": "@preprocessing",
        },
        "inferer": {"_target_": "SimpleInferer"},
        "network": "$@network_def.eval()",
        "run": [
            "$pathlib.Path(@output_dir).mkdir(parents=True, exist_ok=True)",
            "$[numpy.save(pathlib.Path(@output_dir) / path.name, @inferer("
            "item['image'][None].to(@device), @network).detach().cpu().numpy()[0]) "
            "for path, item in zip(@datalist, @dataset)]",
        ],
    }


def _metadata(described: Described, served: Served, answer: Tensor) -> dict[str, Any]:
    """``metadata.json``: see the specification, "metadata.json File"."""
    spec, card = described.package.spec, described.card
    modality = ", ".join(spec.use.modalities) or "n/a"
    channels = ("grey",) if spec.input.channels == 1 else ("red", "green", "blue")
    kind, form = _MEANING.get(served.names[-1], _MEANING["outputs"])
    rows = spec.task.classes if served.names[-1] == "probabilities" else ()
    return {
        "schema": _SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": f"as the run {spec.run_id or spec.name} has left it"},
        "monai_version": version("monai"),
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {},
        "optional_packages_version": {},
        "name": spec.name,
        "task": f"{spec.task.name} of images",
        "description": f"{spec.model.name}, trained by {len(card['data']['sites'])} sites together "
        "with Cloister; docs/README.md is its model card",
        "authors": "the sites of the run and its coordinator",
        "copyright": "that of whoever gives this bundle out",
        "intended_use": f"{card['intended_inputs']} {card['not_for_clinical_use']}",
        "data_type": "brightness in 0..1, as model_card.json says under model.input",
        "run_sha256": spec.digest,
        "model_sha256": described.package.model_sha256,
        "network_data_format": {
            "inputs": {
                "image": _format("image", "magnitude", served.given, (0, 1), channels)
                | {"modality": modality, "is_patch_data": spec.input.patch is not None}
            },
            "outputs": {
                "pred": _format(kind, form, tuple(answer.shape[1:]), (), rows)
                | {"is_patch_data": spec.input.patch is not None}
            },
        },
    }


def _format(
    kind: str,
    form: str,
    shape: tuple[int, ...],
    values: tuple[int, ...],
    channels: tuple[str, ...],
) -> dict[str, Any]:
    return {
        "type": kind,
        "format": form,
        "num_channels": shape[0],
        "spatial_shape": list(shape[1:]),
        "dtype": "float32",
        "value_range": list(values),
        "channel_def": {str(number): name for number, name in enumerate(channels)},
    }


def _script(served: Served) -> bytes:
    """The network in TorchScript, compared with the original."""
    network, content = ServedOne(served), io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        # MONAI and MONAI Deploy read TorchScript, which torch calls deprecated.
        warnings.simplefilter("ignore")
        example = torch.rand(2, *served.given)
        traced = torch.jit.trace(network, example, check_trace=False)  # type: ignore[no-untyped-call]
        for rows in (1, 3):
            for what, given in probes(served, rows, _SEED).items():
                off = float((traced(given) - network(given)).abs().max())
                if not off <= TOLERANCE:
                    raise ModelError(
                        f"model.name = {served.spec.model.name!r}: in TorchScript its answers to "
                        f"{rows} images ({what}) differ by {off:.3g}; nothing was exported"
                    )
        torch.jit.save(traced, content)
    return _without_places(content)


def _without_places(script: io.BytesIO) -> bytes:
    """The archive without the parts that name the files on this machine, and so its user."""
    kept = io.BytesIO()
    with zipfile.ZipFile(script) as whole, zipfile.ZipFile(kept, "w") as archive:
        for part in whole.namelist():
            if not part.endswith(".debug_pkl"):
                archive.writestr(zipfile.ZipInfo(part), whole.read(part))
    return kept.getvalue()


def _json(content: dict[str, Any]) -> bytes:
    return f"{json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)}\n".encode()
