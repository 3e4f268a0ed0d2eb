"""The model card: what a model is, for people (Markdown) and for programs (JSON).

After Mitchell et al. 2019, "Model Cards for Model Reporting" (arXiv:1810.03993). It travels with
the model, so it says again what the report says: what it is for, what it was trained on as far as
the sites declare it, what privacy cost, how well it does, and what nobody has looked at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.files import write_durably
from common.spec import Metric
from common.studies import in_words
from common.task_sections import Classification
from common.tasks import words
from common.tasks.estimates import Estimate
from server import wording
from server.evaluation import PARTS, PartResult
from server.record import RunRecord, Spend

MARKDOWN_FILE = "model_card.md"
JSON_FILE = "model_card.json"
FORMAT = 1

_PROBABILITIES = {name: Classification.METRICS[name] for name in ("brier", "ece")}
_WITH_THRESHOLD = ("binary", "multilabel", "boxes")


class CardFiles(NamedTuple):
    """Where the two forms of a card lie."""

    markdown: Path
    json: Path


def write_card(run_directory: Path) -> CardFiles:
    """Write ``model_card.md`` and ``model_card.json`` into a run directory from what lies there.

    Raises:
        RunError: naming the file of the run directory that is missing or wrong.
    """
    card = describe(RunRecord.read(run_directory))
    files = CardFiles(run_directory / MARKDOWN_FILE, run_directory / JSON_FILE)
    write_durably(files.markdown, to_markdown(card).encode())
    text = json.dumps(card, indent=2, ensure_ascii=False, allow_nan=False)
    write_durably(files.json, f"{text}\n".encode())
    return files


# --- What it says -----------------------------------------------------------------------------


def describe(record: RunRecord) -> dict[str, Any]:
    """The card as JSON; every figure that is not known is null."""
    return {
        "format": FORMAT,
        "name": record.spec.name,
        "run_id": record.spec.run_id,
        "created": record.environment.finished,
        "spec_sha256": record.spec.digest,
        "model": _model(record),
        "intended_use": wording.INTENDED_USE,
        "intended_inputs": wording.intended_inputs(record.spec),
        "not_for_clinical_use": wording.NOT_FOR_CLINICAL_USE,
        "data": _data(record),
        "training": _training(record),
        "privacy": _privacy(record),
        "metrics": {name: _metric(metric) for name, metric in record.spec.metrics.items()},
        "evaluation": {
            name: evaluated(record.final[name]) if name in record.final else None for name in PARTS
        },
        "federated_evaluation": record.federated and record.federated.model_dump(mode="json"),
        "limitations": list(wording.limitations(record)),
        "versions": dict(record.environment.versions),
    }


def _model(record: RunRecord) -> dict[str, Any]:
    spec = record.spec
    return {
        "network": spec.model.name,
        "task": words.task(spec.task),
        "classes": list(spec.task.classes),
        "threshold": spec.evaluation.threshold if spec.task.kind in _WITH_THRESHOLD else None,
        "input": spec.input.model_dump(mode="json"),
        "decision": in_words(spec.input),
        "safetensors_sha256": record.model_digest,
        "round": record.environment.model_round,
    }


def _data(record: RunRecord) -> dict[str, Any]:
    sites = record.privacy.sites
    return {
        "note": "Sizes are declared by the sites and rounded; the real numbers are private.",
        "sites": {
            name: {"declared_size": spend.declared_size, "unit": spend.unit}
            for name, spend in sorted(sites.items())
        },
        "declared_total": sum(spend.declared_size for spend in sites.values()),
    }


def _training(record: RunRecord) -> dict[str, Any]:
    spec, environment = record.spec, record.environment
    return {
        "rounds_finished": len(record.rounds),
        "rounds_planned": spec.rounds,
        "local_steps": spec.local.steps,
        "batch_size": spec.local.batch_size,
        "optimizer": spec.optimizer.model_dump(mode="json"),
        "loss": spec.loss.model_dump(mode="json"),
        "augmentation": spec.augmentation.model_dump(mode="json"),
        "aggregation": spec.aggregation.model_dump(mode="json"),
        "engine": environment.engine,
        "device": environment.device,
        "seconds": environment.wall_seconds,
        "participation": {name: dict(record.outcomes(name)) for name in record.sites},
    }


def _privacy(record: RunRecord) -> dict[str, Any]:
    privacy, banner = record.privacy, wording.banner(record)
    return {
        "protected": privacy.protected and banner is None,
        "warning": None if banner is None else f"{banner.title}. {banner.text}",
        "adjacency": f"add or remove one {record.spec.privacy.unit}",
        "sites": {name: spend.model_dump() for name, spend in sorted(privacy.sites.items())},
        "all_sites_epsilon": privacy.all_sites_epsilon,
        "all_sites_delta": privacy.all_sites_delta,
        "claim": list(wording.claim(record)),
        "timing": list(wording.timing(record)),
    }


def _metric(metric: Metric) -> dict[str, Any]:
    return {key: getattr(metric, key) for key in ("title", "lower_is_better", "unit")}


def evaluated(part: PartResult) -> dict[str, Any]:
    """What a card says of one part of the evaluation cohort."""
    return part.to_json() | {"interval": "95 % bootstrap percentile, resampled by " + part.unit}


# --- In Markdown ------------------------------------------------------------------------------


def to_markdown(card: Mapping[str, Any]) -> str:
    """The card as a page of Markdown; text from the run cannot become markup or a link."""
    sections = (
        _opening(card),
        _section("Intended use", [_safe(card["intended_use"])]),
        _section("Intended inputs", [_safe(card["intended_inputs"])]),
        _section("Data", _data_lines(card["data"])),
        _section("Training", _training_lines(card)),
        _section("Privacy", _privacy_lines(card["privacy"])),
        _section("Performance", _performance_lines(card)),
        *_sections_of_use(card),
        _section("Limitations", [f"- {_safe(text)}" for text in card["limitations"]]),
        _section("Versions and digests", _version_lines(card)),
    )
    return "\n".join(line for section in sections for line in section)


def _section(title: str, lines: Iterable[str]) -> list[str]:
    return [f"## {title}", "", *lines, ""]


def _opening(card: Mapping[str, Any]) -> Iterator[str]:
    model = card["model"]
    classes = f" ({', '.join(map(_safe, model['classes']))})" if model["classes"] else ""
    yield from (f"# Model card: {_safe(card['name'])}", "")
    yield f"A {_safe(model['network'])} network for {_safe(model['task'])}{classes}, trained by"
    yield f"{words.counted(len(card['data']['sites']), 'site')} together with Cloister."
    yield from ("", f"> **{_safe(card['not_for_clinical_use'])}**", "")
    if card["privacy"]["warning"]:
        yield from (f"> **{_safe(card['privacy']['warning'])}**", "")


def _data_lines(data: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        (name, f"{site['declared_size']:,}", site["unit"] + "s")
        for name, site in data["sites"].items()
    ]
    yield from _table(("Site", "Declared size", "Unit"), rows)
    yield from ("", _safe(data["note"]))


def _training_lines(card: Mapping[str, Any]) -> Iterator[str]:
    training, model = card["training"], card["model"]
    yield f"- {training['rounds_finished']} of {training['rounds_planned']} rounds"
    yield f"- {training['local_steps']} local steps a round"
    yield f"- {training['batch_size']} units expected in a batch"
    for key in ("optimizer", "loss", "augmentation", "aggregation"):
        yield f"- {key} ({_listed(training[key])})"
    yield f"- input ({_listed(model['input'])})"
    if model.get("decision"):
        yield f"- {model['decision']}"
    if model["round"] is not None:
        yield f"- the model is that of round {model['round']}"


def _privacy_lines(privacy: Mapping[str, Any]) -> Iterator[str]:
    spends = {name: Spend.model_validate(site) for name, site in privacy["sites"].items()}
    rows = [
        (
            name,
            wording.epsilon_of(spend),
            wording.scientific(spend.delta),
            spend.unit,
            spend.mechanism,
            wording.plain(spend.sampling_rate),
            wording.plain(spend.noise_multiplier),
            wording.plain(spend.clip_norm),
            str(spend.steps),
            wording.pacing(spend),
        )
        for name, spend in spends.items()
    ]
    head = ("Site", "ε", "δ", "Unit", "Mechanism", "q", "σ", "C", "Steps", "Replies")
    if rows:  # a model that one site made further has none
        yield from _table(head, rows)
    sentences = (*privacy["claim"], *privacy["timing"])
    if sentences:
        yield from ("", *(f"- {_safe(sentence)}" for sentence in sentences))


def _performance_lines(card: Mapping[str, Any]) -> Iterator[str]:
    parts = {name: part for name, part in reversed(card["evaluation"].items()) if part}
    if not parts:
        yield "There are no figures of a central evaluation cohort."
        return
    seen = card["model"]["input"]
    several = seen.get("images", 1) > 1 or seen.get("modalities")
    row = seen.get("together", "study") if several else "image"
    for name, part in parts.items():
        yield f"- {name}: {words.counted(part['images'], row)}, interval: {part['interval']}"
    yield ""
    metrics = {name: Metric(**metric) for name, metric in card["metrics"].items()}
    rows = [
        (metric.title, *(_estimate(part["metrics"][name], metric) for part in parts.values()))
        for name, metric in metrics.items()
    ]
    yield from _table(("Metric", *parts), rows)
    yield from _federated_lines(card["federated_evaluation"], metrics)


def _federated_lines(
    federated: Mapping[str, Any] | None, metrics: Mapping[str, Metric]
) -> Iterator[str]:
    if federated is None:
        return
    answered = sum(status == "ok" for status in federated["sites"].values())
    yield ""
    yield (
        f"At the own held-out patients of {words.counted(answered, 'site')}, from noised counts "
        f"(about {federated['patients']:.0f}); the intervals are those of the noise alone:"
    )
    yield ""
    rows = [
        (metrics[name].title, _estimate(found, metrics[name]))
        for name, found in federated["metrics"].items()
    ]
    yield from _table(("Metric", "Value"), rows)


def _sections_of_use(card: Mapping[str, Any]) -> Iterator[list[str]]:
    """What an export adds to the card of a run (`server.export`), and what made it smaller."""
    if calibrated := card.get("calibration"):
        yield _section("Calibration", _calibration_lines(calibrated))
    if smaller := card.get("smaller"):
        yield _section("Made smaller", [f"- {_safe(text)}" for text in smaller["said"]])


def _calibration_lines(calibrated: Mapping[str, Any]) -> Iterator[str]:
    yield _safe(calibrated["why"])
    judged = calibrated["test"]
    if judged is None:
        return
    yield from ("", f"On {judged['images']:,} images of the test part:", "")
    rows = [
        (metric.title, *(_estimate(judged[when][name], metric) for when in ("before", "after")))
        for name, metric in _PROBABILITIES.items()
    ]
    yield from _table(("Metric", "Before", "After"), rows)


def _version_lines(card: Mapping[str, Any]) -> Iterator[str]:
    for name, version in sorted(card["versions"].items()):
        yield f"- {_safe(name)} {_safe(version)}"
    yield f"- run: {_safe(card['run_id']) or words.NONE}, made {_safe(card['created'])}"
    yield f"- SHA-256 of the spec: `{card['spec_sha256']}`"
    digest = card["model"]["safetensors_sha256"]
    yield f"- SHA-256 of model.safetensors: `{digest}`" if digest else "- no model.safetensors"


def _estimate(found: Mapping[str, float | None], metric: Metric) -> str:
    return wording.estimate(Estimate(**found), metric)


def _listed(settings: Mapping[str, Any]) -> str:
    known = ((key.replace("_", " "), value) for key, value in settings.items())
    words = (f"{key}: {wording.setting(value)}" for key, value in known if value is not None)
    return _safe("; ".join(words))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + " --- |" * len(head)
    for row in rows:
        yield f"| {' | '.join(map(_safe, row))} |"


def _safe(text: str) -> str:
    """Text in one line, with every character escaped that Markdown or HTML would act on."""
    line = " ".join(str(text).split())
    line = re.sub(r"([\\`*_\[\]|~])", r"\\\1", line).replace("&", "&amp;")
    return line.replace("<", "&lt;").replace(">", "&gt;").replace("://", ":\u200b//")
