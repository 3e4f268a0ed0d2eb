"""What the tables and the JSON of a prediction say before and beside their rows."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from client.prediction.answering import Model
from client.prediction.output import FORMAT
from client.prediction.rows import HOW, WARNING, asked_of, decided_by
from common.errors import PackageError
from common.package import Package

NO_CARD = "The model came without a card: for what it was made, and how well it does, is not said."
IDENTITIES = (
    "True identifiers of patients. This folder is readable by its owner alone and must stay "
    "within the hospital."
)
_WHO = ("patient_id", "issuer", "accession_number", "study_instance_uid")
_PLACE = {
    "image": ("sop_instance_uid", "frame"),
    "study": ("sop_instance_uid", "frame"),
    "volume": ("slices",),
}
_LAST = ("model_sha256", "warning")
_REFUSED = (
    "file",
    "patient_id",
    "issuer",
    "study_instance_uid",
    "series_instance_uid",
    "sop_instance_uid",
    "reason",
)


def every_line(model: Model) -> dict[str, str]:
    """What each line of an answer says, for lines are copied out of their table."""
    return {"model_sha256": model.package.model_sha256, "warning": WARNING}


def columns_of(model: Model) -> dict[str, tuple[str, ...]]:
    """The columns of each CSV, which follow from the model alone."""
    spec = model.package.spec
    task, asked = spec.task, asked_of(spec)
    image, study = _columns_by_kind(model)
    place = ("series_instance_uid", *_PLACE[asked], "modality", "rows", "columns")
    named = [
        tuple(
            f"{key} {{{name}}}" if by_class else key
            for key, by_class in columns
            for name in (_classes_of(task.kind, task.classes, key) if by_class else ("",))
        )
        for columns in (image, study)
    ]
    return {
        "images": ("number", *_WHO, *place, *named[0], "caveats", "file", "file_sha256", *_LAST),
        "studies": (*_WHO, "images", "refused", *named[1], "caveats", *_LAST),
        "refused": _REFUSED,
        "not_made": ("what", "patient_id", "issuer", "study_instance_uid", "reason"),
    }


def _classes_of(kind: str, classes: tuple[str, ...], key: str) -> tuple[str, ...]:
    return classes[1:] if kind == "mask" else classes


def _columns_by_kind(
    model: Model,
) -> tuple[tuple[tuple[str, bool], ...], tuple[tuple[str, bool], ...]]:
    """Of an image and of a study: the columns, and whether there is one for each class."""
    kind = model.package.spec.task.kind
    asked = asked_of(model.package.spec)
    if asked == "volume":
        return (("voxels", True), ("volume_mm3", True)), ()
    if kind == "mask":
        return (("pixels", True), ("area_mm2", True)), (("pixels", True),)
    if kind == "boxes":
        return (("boxes", False),), (("boxes", True), ("largest_score", True))
    if kind == "none":
        scores = (("mean_anomaly_score", False), ("largest_anomaly_score", False))
        return (("anomaly_score", False),), scores
    keys = ["raw_probability"] + ["probability"] * (model.calibration is not None)
    decision = (("model_decision", False), *((key, True) for key in reversed(keys)))
    if asked == "study":
        return (("seen", False), ("attention", False)), decision
    study = tuple((f"{how}_{key}", True) for key in reversed(keys) for how in ("mean", "largest"))
    return decision, study


def warnings_of(package: Package) -> list[str]:
    """What must be borne in mind of a model: our own words first, then its card's.

    Raises:
        PackageError: if the card does not say it in text.
    """
    card = package.card
    if not card:
        return [WARNING, NO_CARD]
    said = [card.get(key, "") for key in ("not_for_clinical_use", "intended_use")]
    limitations = card.get("limitations", [])
    texts = [*said, *limitations] if isinstance(limitations, list) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise PackageError(
            f"{package.path}: what its card says of its use and limitations is no text; expected "
            "one as `cloister export` writes it"
        )
    return [WARNING, *filter(None, texts)]


def head_of(model: Model) -> dict[str, Any]:
    """What ``predictions.json`` says before the rows."""
    package = model.package
    spec, signer = package.spec, package.signer
    return {
        "format": FORMAT,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "identities": IDENTITIES,
        "model": {
            "name": spec.name,
            "run_id": spec.run_id,
            "network": spec.model.name,
            "task": spec.task.name,
            "kind": spec.task.kind,
            "classes": list(spec.task.classes),
            "model_sha256": package.model_sha256,
            "spec_sha256": spec.digest,
            "preprocessing_sha256": spec.input.preprocessing_digest,
            "decision": decided_by(spec),
            "signed_by": signer and f"{signer.coordinator} of {signer.federation}",
            "calibration": package.calibration and package.calibration.model_dump(mode="json"),
            "intended_inputs": spec.use.model_dump(mode="json"),
        },
        "warnings": warnings_of(package),
        "aggregation": HOW[asked_of(spec)],
    }
