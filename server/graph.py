"""ONNX: a network for any runtime, compared with the original before it leaves.

The graph is made on the CPU by torch's exporter and run by onnxruntime on images that a network
meets and on such that it never should, one and several at a time. Where an answer is off by more
than `TOLERANCE`, there is no export.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import ModelError
from server.export import Described
from server.served import Served, probes

FILE = "model.onnx"
OPSET = 18
TOLERANCE = 1e-4
_BATCHES = (1, 2, 5)
_SEED = 1


def onnx_files(described: Described) -> dict[str, bytes]:
    """The files of an ONNX export.

    Raises:
        ModelError: if the network cannot be exported, or does not give the same in onnxruntime.
    """
    package = described.package
    served = Served(package.network(), package.spec, described.calibration)
    content = graph(served, about(described, meaning(served)))
    compare(served, content)
    return described.papers() | {FILE: content}


def graph(served: Served, about: dict[str, str]) -> bytes:
    """The ONNX model of a network, for any number of images.

    Args:
        served: the network.
        about: what stands in the model's metadata.

    Raises:
        ModelError: if torch cannot export it.
    """
    example = torch.zeros(2, *served.given)
    try:
        with quietly():
            made = torch.onnx.export(
                served,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[served.input_name],
                output_names=list(served.names),
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
    except (RuntimeError, torch.onnx.OnnxExporterError) as error:
        raise ModelError(
            f"model.name = {served.spec.model.name!r}: torch cannot export it as ONNX "
            f"({str(error).splitlines()[0]:.200}); export it as a package"
        ) from error
    if made is None:
        raise ModelError(f"model.name = {served.spec.model.name!r}: torch gave no ONNX model")
    model = made.model_proto
    for node in model.graph.node:  # they name files on this machine, and so its user
        del node.metadata_props[:]
    onnx.helper.set_model_props(model, about)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def compare(served: Served, content: bytes) -> float:
    """The largest difference between a network and its graph over all that is tried.

    Raises:
        ModelError: if it is above `TOLERANCE`, or only one of them gives no numbers.
    """
    session, worst = session_of(content), 0.0
    for rows in _BATCHES:
        for what, given in probes(served, rows, _SEED).items():
            with torch.no_grad():
                expected = served(given)
            found = answers(session, given)
            for name, ours, theirs in zip(served.names, expected, found, strict=True):
                off = _difference(ours.numpy(), theirs)
                if not off <= TOLERANCE:
                    raise ModelError(
                        f"model.name = {served.spec.model.name!r}: as ONNX its {name} of {rows} "
                        f"images ({what}) differ by {off:.3g}, more than {TOLERANCE:g}; nothing "
                        "was exported: this version of torch or onnxruntime has a fault there"
                    )
                worst = max(worst, off)
    return worst


def session_of(content: bytes) -> onnxruntime.InferenceSession:
    """A model in onnxruntime, on the CPU, in one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def answers(session: onnxruntime.InferenceSession, given: Tensor) -> list[NDArray[np.float32]]:
    """What onnxruntime gives for a batch."""
    (place,) = session.get_inputs()
    found: list[NDArray[np.float32]] = session.run(None, {place.name: given.numpy()})
    return found


def _difference(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    if ours.shape != theirs.shape or not np.array_equal(np.isnan(ours), np.isnan(theirs)):
        return float("inf")
    return float(np.abs(np.nan_to_num(ours) - np.nan_to_num(theirs)).max(initial=0.0))


def about(described: Described, taken: str) -> dict[str, str]:
    """What stands in an ONNX model's metadata.

    Args:
        described: the model; what made it smaller is named.
        taken: what its input is.
    """
    spec, card = described.package.spec, described.card
    told = {
        "made_by": "Cloister",
        "run": spec.name,
        "run_digest": spec.digest,
        "model_sha256": described.package.model_sha256,
        "network": spec.model.name,
        "task": spec.task.name,
        "classes": list(spec.task.classes),
        "opset": OPSET,
        "input": taken,
        "preprocessing": spec.input.model_dump(mode="json"),
        "calibrated": described.calibration is not None,
        "not_for_clinical_use": card.get("not_for_clinical_use", ""),
    }
    if smaller := card.get("smaller"):
        told |= {"smaller": smaller["said"], "of_model_sha256": smaller["of_model_sha256"]}
    return {key: text if isinstance(text, str) else json.dumps(text) for key, text in told.items()}


def meaning(served: Served) -> str:
    """What a network is given, in a sentence."""
    if served.generates:
        return "normal noise, and behind it 1 for each class that the image is to have and else 0"
    return (
        "float32 brightness in 0..1, made of an image as `preprocessing` says; mean and std of it "
        "are part of this graph and must not be applied again"
    )


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Torch's exporter and onnxruntime's tools print what is of use to their authors."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
