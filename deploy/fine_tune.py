"""A site makes the federation's model its own: trained further on the site's own patients.

Without ``private`` nothing leaves the site. No noise is added and no budget is spent, so what comes
of it may give its patients away: it is marked as personal, and no run begins at it. With
``private`` the training is one round of a run of this site alone, which goes through the node's
own gate: policy, a person's yes, ledger. What comes of it is a release like any other, and holds
nothing of the held-out patients: figures of them are exact, and for the site's own screen alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save
from torch import nn

from client.folder import cohort_digest
from client.gate import Gate
from client.home import NodeHome
from client.node import AlreadyRunningError, alone
from client.training import LocalTrainer, best_device
from common import accounting, models, package
from common.clock import Clock
from common.cohort import Cohort
from common.errors import CohortError, ConfigError, PackageError
from common.files import locked
from common.messages import Arrays, Closing, Invitation, RefusalReply, Release, TrainTask
from common.noise import fresh_keystream
from common.package import Package
from common.spec import DpSgd, NoPrivacy, RunSpec
from common.studies import rows_for, seen_by
from common.tasks import task_for
from common.tasks.estimates import Estimate
from common.tasks.paired import paired_differences
from deploy import node_review
from server import wording
from server.card import to_markdown
from server.evaluation import PartResult, score_part
from server.record import Spend
from server.start import refuse_personal

MUST_NOT_LEAVE = (
    "Trained on this site's patients without noise: it may give them away, and must not leave the "
    "site."
)
FIGURES_STAY = (
    "These figures are exact, of this site's own patients: they are on this screen alone, not in "
    "the package, and must not leave the site."
)
NOT_PROTECTED = "The model where the further training began was not protected."
_NO_FIGURES = (
    "How well it does at the site where it was trained further is not in this card: exact figures "
    "of that site's held-out patients do not leave it."
)
_OWN_PATIENTS = (
    "It was tested on held-out patients of the site where it was trained further; elsewhere it may "
    "give other results."
)
MAYBE_SEEN = (
    "The held-out patients are not marked 'test': if this site took part in the training of the "
    "model where it began, that was trained on them. Figures of both are then too good for new "
    "patients, and the comparison favours the model where it began: it is no ground to choose by."
)
_HELD_OUT = 0.25
_BASE = "Of the model where it began: "
_ALL_SITES = "bears their composition"  # of `wording.claim`: over all sites, for it had no other
_OF_BOTH = ("format", "intended_use", "intended_inputs", "not_for_clinical_use", "metrics")
_VERSIONS = ("cloister", "torch", "opacus", "dp-accounting", "numpy")
_PLAIN = {"name": "adamw", "learning_rate": 1e-3}
_SEED = 1


@dataclass(frozen=True)
class Wish:
    """How a model is to be trained further.

    Attributes:
        epochs: how often each patient is expected to be seen.
        head_only: whether the last layer alone is trained, over the body that all sites share.
        learning_rate: None: the run's own; but 0.001 with AdamW where the run's was chosen for
            clipped gradients with noise, and these are plain.
        name: of the site's own run; another one is another run, and is booked anew.
    """

    epochs: int = 5
    head_only: bool = False
    learning_rate: float | None = None
    name: str = "fine-tuned"


@dataclass(frozen=True)
class FineTuned:
    """What came of it.

    Attributes:
        files: of a package, by name.
        before, after: on the site's held-out patients.
        differences: after minus before, of each metric, both resampled alike.
        worse: the metrics of which the whole interval of the change lies on the worse side; those
            alone by which a model may be chosen. None where the held-out patients are not `marked`.
        marked: whether they were ``test`` in the cohort, so that no run trained on them.
        epsilon: what was booked for it, at the delta of the run; None if nothing was.
        warning: of its card, if it has one.
    """

    files: Mapping[str, bytes]
    before: PartResult
    after: PartResult
    differences: Mapping[str, Estimate]
    worse: tuple[str, ...]
    marked: bool
    epsilon: float | None
    warning: str | None


def fine_tune(model: Package, cohort: Cohort, wish: Wish) -> FineTuned:
    """Train a model further on a site's cohort; nothing of it is protected.

    Args:
        model: where it begins.
        cohort: the site's. Its patients marked ``test`` are held out, or else about a quarter of
            them, always the same ones.
        wish: how.

    Raises:
        CohortError: if the cohort does not fit the model, or has too few patients.
        ModelError: if the network has no head of its own, and that is asked for.
        PackageError: if the model's weights cannot be used.
    """
    _check_card(model)
    unbound = NoPrivacy(mechanism="none", unit=cohort.unit)
    cohort.check_fits(model.spec.model_copy(update={"privacy": unbound}))
    train, held_out = _parts(seen_by(model.spec, cohort))
    size = len(train.patients)
    spec = _spec_of(model, wish, size, unbound.model_dump(mode="json"))
    trainer = LocalTrainer(spec, train, declared_size=size, mechanism=None)
    begun = _begin(model, spec, held_out, size)
    stream = fresh_keystream(run_id=spec.run_id, round_number=1)
    return _finished(begun, trainer.train(begun.weights, 1, stream).update)


@contextmanager
def fine_tuned_privately(
    model: Package, home: NodeHome, wish: Wish, epsilon: float | None
) -> Iterator[FineTuned]:
    """The same under differential privacy, booked in the node's ledger: it may be published.

    The node's own cohort is trained on, but its patients marked ``test``. The node's folder is held
    meanwhile. When the block that is given the model ends, the run is over and its kept release
    gone; if it raises, or the process dies, the same wish gets the same bytes again and costs
    nothing more.

    Args:
        model: where it begins.
        home: the node's folder.
        wish: how; the same one is the same run, which is booked once.
        epsilon: of this training; None: what the model's own run asked for.

    Raises:
        CohortError: as `fine_tune`; or no patient is marked ``test``.
        ConfigError: if the node runs, or refuses, with everything that stands against it.
        PackageError: as `fine_tune`; or the model is personal.
        SpecError: if no noise reaches that epsilon.
    """
    _check_card(model)
    refuse_personal(model)
    with _alone(home):
        cohort = home.open_cohort()
        spec = _private_spec(model, home, wish, epsilon)
        cohort.check_fits(spec)
        cohort = seen_by(spec, cohort)
        held_out = cohort.with_split("test")
        if not len(held_out):
            raise CohortError(
                f"{cohort.path}: no patient is marked 'test', so nobody could say what was gained; "
                "take the source in again with --split"
            )
        _check_apart(cohort, cohort.with_split("", "train"), held_out)
        begun = _begin(model, spec, held_out, home.policy.declared_size)
        gate = _willing_gate(home, spec)
        yield _finished(begun, _released(home, gate, begun))
        gate.close(Closing(spec.digest))


@contextmanager
def _alone(home: NodeHome) -> Iterator[None]:
    """Two gates on one ledger would book by turns, and each takes the whole machine."""
    try:
        with ExitStack() as held:
            held.enter_context(alone(home.path))
            held.enter_context(locked(home.path))
            kept = held.pop_all()
    except (AlreadyRunningError, BlockingIOError):
        raise ConfigError(
            f"{home.path}: its node runs, and --private answers in its place; stop the node first"
        ) from None
    with kept:
        yield


# --- Training -------------------------------------------------------------------------------------


def _parts(cohort: Cohort) -> tuple[Cohort, Cohort]:
    """To train on, and held out: no patient is in both."""
    train, held_out = cohort.with_split("", "train"), cohort.with_split("test")
    if not len(held_out):
        out = np.fromiter(map(_is_held_out, train.patients), bool, len(train.patients))
        train, held_out = train.subset(np.flatnonzero(~out)), train.subset(np.flatnonzero(out))
    _check_apart(cohort, train, held_out)
    if min(len(train.patients), len(held_out.patients)) < 2:
        raise CohortError(
            f"{cohort.path}: {len(train.patients)} {cohort.unit}s to train on and "
            f"{len(held_out.patients)} to test with; expected two of each at least: take in more, "
            "or mark who is to be held out as 'test' (--split)"
        )
    return train, held_out


def _is_held_out(pseudonym: str) -> bool:
    """One in four, by the pseudonym alone: whoever else is in the cohort moves nobody."""
    drawn = hashlib.sha256(f"held out of fine-tuning: {pseudonym}".encode()).digest()
    return int.from_bytes(drawn[:8], "big") < _HELD_OUT * 2**64


def _check_apart(cohort: Cohort, train: Cohort, held_out: Cohort) -> None:
    """A patient of both parts would be tested on what was trained on."""
    if both := set(train.patients) & set(held_out.patients):
        raise CohortError(
            f"{cohort.path}: {len(both)} patients have images to train on and images marked "
            "'test'; expected each patient in one part: mark all its images alike"
        )


def _spec_of(model: Package, wish: Wish, size: int, privacy: Mapping[str, Any]) -> RunSpec:
    """The model's run as one round of one site: what a trainer and a gate take."""
    plain = json.loads(model.spec.canonical_json)
    batch = min(plain["local"]["batch_size"], max(1, size // 2))
    steps = wish.epochs * math.ceil(size / batch)
    plain["evaluation"].pop("federated", None)
    if isinstance(model.spec.privacy, DpSgd) and privacy["mechanism"] == "none":
        plain["optimizer"] = dict(_PLAIN)
    if wish.learning_rate is not None:
        plain["optimizer"]["learning_rate"] = wish.learning_rate
    if wish.head_only:
        plain["model"]["trained"] = "head"
    changed = {
        "name": wish.name,
        "run_id": "",
        "rounds": 1,
        "schedule": {},
        "privacy": dict(privacy),
        "local": plain["local"] | {"batch_size": batch, "steps": steps},
        "federation": {"quorum": 1},
        "aggregation": {"strategy": "fedavg"},
        "start": {"model_sha256": model.model_sha256},
    }
    for key in ("synthetic", "synthetic_without_privacy"):
        plain["augmentation"].pop(key, None)
    return RunSpec.from_json(json.dumps(plain | changed), source=str(model.path))


def _private_spec(model: Package, home: NodeHome, wish: Wish, epsilon: float | None) -> RunSpec:
    policy, own = home.policy, model.spec.privacy
    if not isinstance(own, DpSgd):
        raise ConfigError(
            f"{model.path}: its run had no differential privacy, and so no clip norm; fine-tune it "
            "without --private, or begin at a model of a private run"
        )
    target = epsilon or own.target_epsilon
    if target is None:
        raise ConfigError("--private: say with --epsilon what this training may spend")
    privacy = own.model_copy(update={"noise_multiplier": None, "target_epsilon": target})
    spec = _spec_of(model, wish, policy.declared_size, privacy.model_dump(mode="json"))
    pace, least = policy.release.pace, policy.release.least_slot
    deadline = math.ceil(least / pace) if pace else math.ceil(least)
    changed = spec.model_dump(mode="json")
    changed["federation"]["deadline_seconds"] = float(deadline)
    return RunSpec.from_json(json.dumps(changed), source=str(model.path))


def _willing_gate(home: NodeHome, spec: RunSpec) -> Gate:
    """The node's gate, if nothing stands against the run but a person's yes."""
    ledger = home.ledger()
    judged = node_review.review(home, spec, ledger.book, cohort_digest(home.cohort_path))
    if judged.objections:
        raise ConfigError(f"{home.path}: this node says no: {'; '.join(judged.objections)}")
    return home.gate()


def _released(home: NodeHome, gate: Gate, begun: _Begun) -> Arrays:
    """The noised update, as the node's gate lets it out."""
    spec = begun.spec
    answers: list[object] = [gate.invite(Invitation(spec))]
    if not isinstance(answers[0], RefusalReply):
        answers.append(gate.train(TrainTask(spec, 1, begun.weights)))
    if isinstance(answers[-1], Release):
        return answers[-1].update
    code = getattr(answers[-1], "code", "")
    if code == "approval":
        raise ConfigError(
            f"{home.path}: this training waits for a person: `cloister node approve "
            f"{spec.digest[:12]}`, then give the same command again"
        )
    raise ConfigError(f"{home.path}: this node says no: {code}; its log has the reason")


def _weights(network: nn.Module) -> Arrays:
    return {name: p.detach().numpy().copy() for name, p in network.named_parameters()}


# --- What came of it ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Begun:
    """A training that is about to begin: what could go wrong without it has not."""

    model: Package
    spec: RunSpec
    weights: Arrays
    held_out: Cohort
    before: PartResult
    declared_size: int
    marked: bool


@dataclass(frozen=True)
class _Made:
    """A trained model that is about to be written down."""

    begun: _Begun
    content: bytes
    after: PartResult
    spent: tuple[float, float] | None  # epsilon and delta; None: no privacy


def _check_card(model: Package) -> None:
    if not model.card:
        raise PackageError(f"{model.path}: has no model card; `cloister report` writes it")


def _begin(model: Package, spec: RunSpec, held_out: Cohort, declared_size: int) -> _Begun:
    weights, seen = _weights(model.network()), rows_for(spec, held_out)
    marked = bool((held_out.splits == "test").all())
    return _Begun(model, spec, weights, seen, _result(spec, weights, seen), declared_size, marked)


def _finished(begun: _Begun, update: Arrays) -> FineTuned:
    spec, weights, before = begun.spec, begun.weights, begun.before
    trained = {name: (array + update[name]).astype(np.float32) for name, array in weights.items()}
    after = _result(spec, trained, begun.held_out)
    differences = paired_differences(
        task_for(spec),
        (before.evidence, after.evidence),
        before.patient_index,
        generator=np.random.default_rng(_SEED),
    )
    whole = accounting.planned(spec, begun.declared_size)
    spent = None
    if whole is not None and isinstance(spec.privacy, DpSgd):
        spent = accounting.epsilon([whole], spec.privacy.delta), spec.privacy.delta
    mark = {} if spent else {package.PERSONAL: MUST_NOT_LEAVE}  # a card is soon left behind
    content = save(trained, metadata={"spec": spec.canonical_json} | mark)
    card = _card(_Made(begun, content, after, spent))
    warning = card["privacy"]["warning"]
    return FineTuned(
        files=_files(spec, content, card),
        before=before,
        after=after,
        differences=differences,
        worse=tuple(_worse(spec, differences)) if begun.marked else (),
        marked=begun.marked,
        epsilon=spent and spent[0],
        warning=warning,
    )


def _worse(spec: RunSpec, differences: Mapping[str, Estimate]) -> Iterator[str]:
    """Those of `FineTuned.worse`."""
    for name, metric in spec.metrics.items():
        change = differences.get(name)
        if change is None or change.low is None or change.high is None or not metric.chooses:
            continue
        if change.low > 0 if metric.lower_is_better else change.high < 0:
            yield name


def _result(spec: RunSpec, arrays: Arrays, held_out: Cohort) -> PartResult:
    """What a model is worth on the site's held-out patients."""
    network = models.build(spec)
    network.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    device = best_device()
    found = task_for(spec).evidence(network.to(device).eval(), held_out, device)
    kept: dict[str, NDArray[Any]] = {k: a for k, a in found.items() if not k.startswith("gallery")}
    return score_part(spec, "test", kept, held_out.patient_index, held_out.unit)


def _files(spec: RunSpec, content: bytes, card: Mapping[str, Any]) -> dict[str, bytes]:
    text = json.dumps(card, indent=2, ensure_ascii=False, allow_nan=False)
    return {
        package.SPEC: spec.canonical_json.encode(),
        package.MODEL: content,
        package.CARD: f"{text}\n".encode(),
        package.CARD_TEXT: to_markdown(card).encode(),
    }


def _card(made: _Made) -> dict[str, Any]:
    """What is true of these weights; what a card says of those where they began is said to be so.

    Only keys that are known are taken from there: of others nobody knows whose they are.
    """
    begun, spec, old = made.begun, made.begun.spec, made.begun.model.card
    digest = hashlib.sha256(made.content).hexdigest()
    card = {key: old[key] for key in _OF_BOTH if key in old} | {
        "name": spec.name,
        "run_id": "",
        "created": Clock().date().isoformat(timespec="seconds"),
        "spec_sha256": spec.digest,
        "model": old["model"] | {"safetensors_sha256": digest, "round": None},
        package.MADE_OF: sorted(begun.model.origins()),
        "data": old["data"] | {"note": f"{_BASE}{old['data']['note']} {_began(begun.model)}"},
        "training": _training(spec),
        "privacy": _privacy(made),
        "evaluation": {"validation": None, "test": None},
        "federated_evaluation": None,
        "limitations": _limitations(made),
        "versions": {name: version(name) for name in _VERSIONS},
    }
    return card | (_personal(made) if made.spent is None else {})


def _training(spec: RunSpec) -> dict[str, Any]:
    parts = ("optimizer", "loss", "augmentation", "aggregation")
    plain = spec.model_dump(mode="json", include=set(parts))
    counts = {"local_steps": spec.local.steps, "batch_size": spec.local.batch_size}
    return {"rounds_finished": 1, "rounds_planned": 1} | counts | {k: plain[k] for k in parts}


def _limitations(made: _Made) -> list[str]:
    """Of the held-out patients of a published model nothing but that there were some.

    That is docs/privacy.md 13.
    """
    begun, caveats = made.begun, made.begun.spec.task.CAVEATS
    own = [_NO_FIGURES]
    if made.spent is None:
        own = [_OWN_PATIENTS, *([] if begun.marked else [MAYBE_SEEN])]
    before = begun.model.card["limitations"]
    return [*own, *caveats, *(f"{_BASE}{said}" for said in before if said not in caveats)]


def _personal(made: _Made) -> dict[str, Any]:
    """What the card of a model says that stays at the site: figures of its patients too."""
    return {
        "evaluation": {"validation": None, "test": _evaluated(made.after)},
        package.PERSONAL: {
            "warning": MUST_NOT_LEAVE,
            "began_with": made.begun.model.model_sha256,
            "head_only": made.begun.spec.model.trained == "head",
            "before": made.begun.before.to_json(),
        },
    }


def _began(model: Package) -> str:
    return (
        f"It was then trained further by one site, from the model {model.model_sha256}; what that "
        "model's training spent is in the record of its own run."
    )


def _privacy(made: _Made) -> dict[str, Any]:
    """Of both trainings, each by itself: it is protected where both were.

    The site's patients may have been in both, and no figure of one bounds what they bear. So none
    stands where a reader takes it for the model's: the composition is in the site's ledger alone.
    """
    unit, base = made.begun.spec.privacy.unit, made.begun.model.card["privacy"]
    known: dict[str, Any] = {"adjacency": f"add or remove one {unit}", "sites": {}}
    known |= {"all_sites_epsilon": None, "all_sites_delta": None, "timing": []}
    if made.spent is None:
        return known | {"protected": False, "warning": MUST_NOT_LEAVE, "claim": []}
    epsilon, delta = made.spent
    own = (
        f"Its further training is ({wording.epsilon(epsilon)}, {delta:g})-differentially private "
        f"under adding or removing one {unit}'s whole record of that site, and is booked in the "
        f"site's ledger. That is of the further training alone: a {unit} who was in the training "
        "before it as well bears the composition of both, which is more, and for which no figure "
        "is given here. The site's held-out patients are not covered by it, and no figure of them "
        "is in this card."
    )
    before = (*base["claim"], *_figures(base), *base["timing"])
    claim = [own, *(f"{_BASE}{said}" for said in before if _ALL_SITES not in said)]
    protected = base["protected"] is True
    warning = base["warning"] or (None if protected else NOT_PROTECTED)
    return known | {"protected": protected, "warning": warning, "claim": claim}


def _figures(privacy: Mapping[str, Any]) -> Iterator[str]:
    """What each site spent on the model where it began."""
    for name, site in sorted(privacy["sites"].items()):
        spend = Spend.model_validate(site)
        if spend.epsilon is not None:
            figures = f"ε = {wording.epsilon_of(spend)} at δ = {wording.scientific(spend.delta)}"
            yield f"{name} spent {figures}, of its {spend.unit}s, on that run."


def _evaluated(part: PartResult) -> dict[str, Any]:
    told = f"95 % bootstrap percentile, resampled by {part.unit}; of the site's held-out patients"
    return part.to_json() | {"interval": told}
