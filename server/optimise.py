"""A trained model made smaller, and what that changes: size, speed, and every metric.

**Pruned**: a part of the weights of convolutions and linear layers is set to exactly zero. By
magnitude, the smallest of the whole network (Han et al. 2015, arXiv:1506.02626); structured, in
each layer but the last the filters of the least norm (Li et al. 2017, arXiv:1608.08710). The
network keeps its shape, so a run can start from it; the zeros make it smaller where it is
compressed, and no faster. **Quantised**: onnxruntime's dynamic quantisation, convolutions
included, which torch's own leaves out: weights in 8 bits, activations by the range that they have.
That range is of all images that are given together, so the quantised model takes one at a time:
an answer depends on its image alone.

Both are computed from a model that is out already, and cost no privacy.
"""

from __future__ import annotations

import copy
import hashlib
import json
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from safetensors.numpy import save
from torch import Tensor, nn

from common import package
from common.calibration import Calibrated, Calibration, calibrate
from common.cohort import Cohort
from common.errors import CohortError, ModelError
from common.models import NETWORKS
from common.spec import RunSpec
from common.tasks import task_for
from common.tasks.estimates import Estimate
from common.tasks.paired import paired_differences
from server.card import evaluated
from server.evaluation import PARTS, CentralEvaluator, EvaluationResult
from server.export import Described
from server.graph import FILE as ONNX_FILE
from server.graph import about, answers, compare, graph, meaning, quietly, session_of
from server.served import Served

Files = dict[str, bytes]
Variant = Literal["as it is", "pruned", "ONNX", "quantised"]

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
_REPEATS = 41
_LEVEL = 6
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Measured:
    """One form of a model.

    Attributes:
        size: of its file, in bytes.
        compressed: of its file by zlib, as it travels at best.
        zeros: part of its weights that are exactly zero.
        milliseconds: for one image, the median, on one thread.
        result: on the evaluation cohort; None of plain ONNX, which answers as the model does.
        differences: of each metric on the test part from that of the model as it is, with its
            interval over the same resamples of patients.
    """

    size: int
    compressed: int
    zeros: float
    milliseconds: float
    result: EvaluationResult | None
    differences: Mapping[str, Estimate]

    def to_json(self) -> dict[str, Any]:
        """For ``optimise.json``."""
        return {
            "bytes": self.size,
            "compressed_bytes": self.compressed,
            "zero_weights": self.zeros,
            "milliseconds": self.milliseconds,
            "evaluation": self.result and self.result.to_json(),
            "differences": {name: found.to_json() for name, found in self.differences.items()},
        }


@dataclass(frozen=True)
class Optimised:
    """What came of it.

    Attributes:
        measured: each form of the model, the first as it was.
        pruned: the files of its package; None if nothing was pruned.
        quantised: the files of its export; None if it was not quantised.
    """

    measured: Mapping[Variant, Measured]
    pruned: Files | None
    quantised: Files | None

    def table(self) -> bytes:
        """``optimise.json``."""
        found = {name: one.to_json() for name, one in self.measured.items()}
        return f"{json.dumps(found, indent=2, allow_nan=False)}\n".encode()


def optimise(
    described: Described, cohort: Cohort, *, prune: float, structured: bool, quantise: bool
) -> Optimised:
    """Make a model smaller, and measure every form of it on `cohort`.

    Args:
        described: the model.
        cohort: of the central evaluation; its test part is what counts.
        prune: part of the weights, or of the filters, that become zero; 0: nothing is pruned.
        structured: whether whole filters are.
        quantise: whether the model, pruned if it was, is quantised as well.

    Raises:
        CohortError: if the cohort does not fit, or has no test part.
        ModelError: if such a network cannot be quantised.
        PackageError: if its weights are not those of its network, or have changed.
    """
    if quantise and NETWORKS[described.package.spec.model.name].gives == "pair":
        raise ModelError(
            f"model.name = {described.package.spec.model.name!r}: a generator is pruned, but not "
            "quantised: what 8 bits do to synthetic images is not measured here"
        )
    bench = _Bench.of(described, cohort)
    network = described.package.network()
    pruned = None
    if prune:
        network = pruned_network(network, prune, structured=structured)
        said = f"{'filters' if structured else 'weights'} pruned: {prune:.0%}"
        described, pruned = bench.package_of(network, said)
    quantised = bench.quantised(network, described) if quantise else None
    return Optimised(bench.finished(), pruned, quantised)


# --- Pruning --------------------------------------------------------------------------------------


def pruned_network(network: nn.Module, part: float, *, structured: bool) -> nn.Module:
    """A copy of a network of which a part is exactly zero; see the module for which.

    Args:
        network: is left as it is.
        part: above 0 and below 1, of the weights, or of each layer's filters.
        structured: whether whole filters are taken, with their bias.
    """
    made = copy.deepcopy(network)
    layers = [layer for layer in made.modules() if isinstance(layer, _LAYERS)]
    with torch.no_grad():
        if structured:
            for layer in layers[:-1]:  # the last layer's rows are the answers
                _without_filters(layer, part)
        else:
            _without_smallest([layer.weight for layer in layers], part)
    return made


def _without_smallest(weights: list[Tensor], part: float) -> None:
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights])
    lost = torch.zeros_like(magnitudes, dtype=torch.bool)
    lost[magnitudes.argsort(stable=True)[: round(part * len(magnitudes))]] = True
    start = 0
    for weight in weights:
        weight[lost[start : start + weight.numel()].view_as(weight)] = 0.0
        start += weight.numel()


def _without_filters(layer: nn.Module, part: float) -> None:
    weight, bias = layer.get_parameter("weight"), getattr(layer, "bias", None)
    filters = weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else weight
    norms = filters.flatten(1).norm(dim=1)
    lost = norms.argsort(stable=True)[: min(round(part * len(norms)), len(norms) - 1)]
    filters[lost] = 0.0
    if bias is not None:
        bias[lost] = 0.0


def zeros_of(network: nn.Module) -> float:
    """The part of a network's numbers that are exactly zero."""
    counts = [(int((p == 0).sum()), p.numel()) for p in network.parameters()]
    return sum(zero for zero, _ in counts) / sum(every for _, every in counts)


# --- Quantisation ---------------------------------------------------------------------------------


def quantised_graph(content: bytes) -> bytes:
    """An ONNX model in 8 bits, for one image at a time.

    Weights are unsigned: onnxruntime runs convolutions of signed ones on a path that is several
    times slower.
    """
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder, "float.onnx"), Path(folder, "eight.onnx")
        before.write_bytes(content)
        with quietly():
            quantize_dynamic(before, after, weight_type=QuantType.QUInt8)
        model = onnx.load(after)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]  # shapes for any number of images
    del model.metadata_props[:]  # of the tool
    onnx.checker.check_model(model)
    made: bytes = model.SerializeToString()
    return made


class OnnxNetwork(nn.Module):
    """An exported network in the place of the one it was made of; see `raw` for its spec.

    Args:
        content: the ONNX model, of whose outputs the first is what tasks work on.
        like: the network it was made of.
        heat: the temperatures that are part of it; it then answers as without them, for metrics
            are of the network's own probabilities.
    """

    def __init__(self, content: bytes, like: nn.Module, heat: Sequence[float] = (1.0,)) -> None:
        super().__init__()
        self._session, self._heat = session_of(content), torch.tensor(heat)
        self.code_numbers = getattr(like, "code_numbers", 0)

    def forward(self, images: Tensor) -> Tensor:
        """(B, …) to (B, …), one image after the other."""
        rows = [answers(self._session, images[row : row + 1])[0] for row in range(len(images))]
        return torch.from_numpy(np.concatenate(rows)) * self._heat


def raw(spec: RunSpec) -> RunSpec:
    """The same run, whose networks see brightness itself: an exported one normalises by itself."""
    content = json.loads(spec.canonical_json)
    content["input"] |= {"normalize": "literal", "mean": [0.0], "std": [1.0]}
    return RunSpec.from_json(json.dumps(content))


# --- Measuring ------------------------------------------------------------------------------------


class _Eight(NamedTuple):
    """A graph, the same in 8 bits, and what that one does."""

    served: Served
    whole: bytes
    content: bytes
    result: EvaluationResult


class _Bench:
    """Every form of one model, measured side by side."""

    def __init__(self, described: Described, cohort: Cohort, before: EvaluationResult) -> None:
        self._described, self._cohort, self._before = described, cohort, before
        self._spec = described.package.spec
        self._made: dict[Variant, tuple[bytes, float, EvaluationResult | None]] = {}
        self._timed: dict[Variant, Callable[[], object]] = {}

    @classmethod
    def of(cls, described: Described, cohort: Cohort) -> _Bench:
        network, spec = described.package.network(), described.package.spec
        before = CentralEvaluator(spec, cohort, device=_CPU).evaluate(network)
        if before.test is None:
            raise CohortError(f"{cohort.path}: has no test part; expected one to measure on")
        bench = cls(described, cohort, before)
        bench._made["as it is"] = (described.package.weights(), zeros_of(network), before)
        bench._timed["as it is"] = _run(Served(network, spec))
        return bench

    def package_of(self, network: nn.Module, said: str) -> tuple[Described, Files]:
        """What a network with other weights is, and the files of its package."""
        result = CentralEvaluator(self._spec, self._cohort, device=_CPU).evaluate(network)
        arrays = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
        mark = {package.PERSONAL: said} if self._described.package.is_personal() else {}
        content = save(arrays, metadata={"spec": self._spec.canonical_json} | mark)
        self._made["pruned"] = (content, zeros_of(network), result)
        self._timed["pruned"] = _run(Served(network, self._spec))
        made, sha256 = calibrate(self._spec, result.arrays()), _sha256(content)
        changed = _again(self._described, result, made, said, {"safetensors_sha256": sha256})
        files = changed.papers() | {package.MODEL: content}
        if made.calibration is not None:
            files[package.CALIBRATION] = made.calibration.model_dump_json(indent=1).encode()
        return replace(changed, package=replace(changed.package, model_sha256=sha256)), files

    def quantised(self, network: nn.Module, described: Described) -> Files:
        """The files of the export of a network in 8 bits; `described` is what it is without."""
        found = self._eight(network, None)
        made = calibrate(self._spec, found.result.arrays())
        if made.calibration is not None:
            found = self._eight(network, made.calibration)
        said = "quantised: weights in 8 bits, convolutions included; one image at a time"
        changed = _again(described, found.result, made, said, {"safetensors_sha256": None})
        content = _named(found, changed)
        self._made["ONNX"] = (found.whole, zeros_of(network), None)
        self._made["quantised"] = (content, zeros_of(network), found.result)
        self._timed["ONNX"] = _run_onnx(found.whole, found.served)
        self._timed["quantised"] = _run_onnx(content, found.served)
        own = {**changed.card["model"], "onnx_sha256": _sha256(content)}
        papers = replace(changed, card={**changed.card, "model": own}).papers()
        return papers | {ONNX_FILE: content}

    def _eight(self, network: nn.Module, calibration: Calibration | None) -> _Eight:
        served = Served(network, self._spec, calibration)
        whole = graph(served, {})
        compare(served, whole)
        content = quantised_graph(whole)
        heat = (1.0,) if calibration is None else calibration.temperatures
        evaluator = CentralEvaluator(raw(self._spec), self._cohort, device=_CPU)
        result = evaluator.evaluate(OnnxNetwork(content, network, heat))
        return _Eight(served, whole, content, result)

    def finished(self) -> dict[Variant, Measured]:
        """Times, taken in turn so that what else the machine does is shared, and differences."""
        times = interleaved(self._timed)
        found: dict[Variant, Measured] = {}
        for name, (content, zeros, result) in self._made.items():
            compressed = len(zlib.compress(content, _LEVEL))
            size = (len(content), compressed)
            differences = {} if result is self._before else self._differences(result)
            found[name] = Measured(*size, zeros, times[name], result, differences)
        return found

    def _differences(self, after: EvaluationResult | None) -> Mapping[str, Estimate]:
        before = self._before.test
        if before is None or after is None or after.test is None:
            return {}
        return paired_differences(
            task_for(self._spec),
            (before.evidence, after.test.evidence),
            before.patient_index,
            generator=np.random.default_rng(self._spec.seed),
        )


def _again(
    before: Described,
    result: EvaluationResult,
    made: Calibrated,
    said: str,
    hashes: Mapping[str, str | None],
) -> Described:
    """A model's description after a change: what was said of it before stays said."""
    card = dict(before.card)
    told = [*card.get("smaller", {}).get("said", ()), said]
    parts = {name: getattr(result, name) for name in PARTS}
    of = before.package.model_sha256
    card |= {
        package.MADE_OF: sorted({of, *package.origins_of(before.package.spec, before.card)}),
        "model": {**card["model"], **hashes},
        "calibration": made.to_json(),
        "evaluation": {name: part and evaluated(part) for name, part in parts.items()},
        "federated_evaluation": None,
        "smaller": {"said": told, "of_model_sha256": of},
    }
    return replace(before, card=card, calibration=made.calibration)


def _named(found: _Eight, changed: Described) -> bytes:
    """The graph in 8 bits with its metadata, in which its own hash is that of it without them."""
    own = replace(changed.package, model_sha256=_sha256(found.content))
    taken = f"{meaning(found.served)}; one at a time"
    model = onnx.load_from_string(found.content)
    onnx.helper.set_model_props(model, about(replace(changed, package=own), taken))
    content: bytes = model.SerializeToString()
    return content


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _run(served: Served) -> Callable[[], object]:
    example = torch.rand(1, *served.given)

    def once() -> object:
        with torch.no_grad():
            return served(example)

    return once


def _run_onnx(content: bytes, served: Served) -> Callable[[], object]:
    session, example = session_of(content), torch.rand(1, *served.given)
    return lambda: answers(session, example)


def interleaved(timed: Mapping[Variant, Callable[[], object]]) -> dict[Variant, float]:
    """The median time of each in milliseconds, on one thread, run in turn."""
    threads, times = torch.get_num_threads(), {name: list[float]() for name in timed}
    torch.set_num_threads(1)
    try:
        for _ in range(_REPEATS):
            for name, once in timed.items():
                start = time.perf_counter()
                once()
                times[name].append(1000 * (time.perf_counter() - start))
    finally:
        torch.set_num_threads(threads)
    return {name: statistics.median(each) for name, each in times.items()}
