"""A node's policy in plain language: every limit in a sentence, also those left at their default.

Pure: policy in, words out. What no key can change stands here as well, so that a security officer
reads on one page what this node does and does not do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from client.policy import Names, Policy
from common import accounting
from deploy.intake_report_words import choices
from deploy.run_words import sides_of


class Paragraph(NamedTuple):
    """A heading and what belongs under it."""

    heading: str
    sentences: tuple[str, ...]


def explained(policy: Policy) -> tuple[Paragraph, ...]:
    """What a node with this policy would and would not do."""
    return (
        Paragraph("Who decides", tuple(_who(policy))),
        Paragraph("What a run may be", tuple(_what(policy))),
        Paragraph("How much it may work", tuple(_how_much(policy))),
        Paragraph("What it may spend", tuple(_budget(policy))),
        Paragraph("What it trains on", tuple(_data(policy))),
        Paragraph("How its images are taken in", tuple(_takes_in(policy))),
        Paragraph("What leaves it", tuple(_leaves(policy))),
        Paragraph("What is sent to it", tuple(_receives(policy))),
    )


def warnings(policy: Policy) -> Iterator[str]:
    """What a person should know before taking this policy for a strict one."""
    if policy.allow_no_privacy:
        yield (
            "allow_no_privacy is true: a run without differential privacy is taken. Its updates "
            "can tell of single patients, no budget stands against it, and nothing is spent."
        )
    if policy.release.pace == 0:
        yield (
            "release.pace is 0: how long this node takes to answer tells how much data it has. "
            "That is for simulations."
        )
    if policy.least_unit == "image":
        yield (
            'least_unit is "image": a run may protect single images. A patient with several is '
            "protected less than its figures say."
        )
    for name in ("operators", "models"):
        if getattr(policy.limits, name) == "any":
            yield f'limits.{name} is "any": nobody has chosen which.'


def idle(policy: Policy) -> Iterator[str]:
    """Why a node with this policy takes part in nothing at all, and what to write."""
    for what, name, allowed in (
        ("operator", "operators", policy.limits.operators),
        ("network", "models", policy.limits.models),
        ("task", "tasks", policy.limits.tasks),
    ):
        if not allowed:
            yield f"No {what} is allowed: name some in node.toml, [limits] {name}."
    if policy.data and policy.data.unit == "image" and policy.least_unit == "patient":
        yield (
            "The data know no patients, and least_unit asks for the patient: runs that protect "
            'images alone are taken only with least_unit = "image".'
        )
    if policy.data and policy.data.preprocessing == "0" * 64:
        yield (
            "[data] is not filled in yet: `cloister node admit` says what the cohort would have "
            "there."
        )


def _who(policy: Policy) -> Iterator[str]:
    operators = policy.limits.operators
    if operators == "any":
        yield "Any operator of the federation may launch a run here."
    elif operators:
        yield f"Only {_listed(operators)} may launch a run here, by the name in the run's file."
    else:
        yield "No operator may launch a run here."
    if policy.approval == "ask":
        yield (
            "Each new run waits until a person here says yes. What is approved is this version of "
            "Cloister, the run, the cohort and the cost together: if one changes, it asks again."
        )
    else:
        yield (
            "A run within all these limits is taken without asking anybody. A person can still "
            "say no to one."
        )
    yield "No message of a coordinator can change any of these limits."


def _what(policy: Policy) -> Iterator[str]:
    limits = policy.limits
    yield f"Tasks: {_names(limits.tasks)}. Networks: {_names(limits.models)}."
    yield f"A network has at most {limits.greatest_parameters:,} parameters."
    if policy.allow_no_privacy:
        yield "A run may have NO differential privacy: its updates leave as they are."
    else:
        yield "A run without differential privacy is refused."
    if data := policy.data:
        mixed = f"those in {data.synthetic} alone" if data.synthetic else "none"
        open_ones = "refused"
        if data.synthetic_without_privacy:
            open_ones = "taken as well, in a run under privacy if its own file says so too"
        yield (
            f"Synthetic images that a run may mix in: {mixed}; images of a generator without "
            f"privacy are {open_ones}."
        )
    unit = "the patient's whole record" if policy.least_unit == "patient" else "single images"
    yield f"A run protects at least {unit}."
    yield (
        f"The noise multiplier of each part is at least {limits.least_noise_multiplier:g}, and a "
        f"step samples at most {limits.greatest_sampling_rate:.4g} of the declared patients."
    )
    if limits.federated_evaluation:
        yield (
            "A run may count how its final model does on held-out patients here. The counts are "
            "noised, and booked like a round of training."
        )
    else:
        yield "No figure on held-out patients leaves: federated evaluation is off."


def _how_much(policy: Policy) -> Iterator[str]:
    limits, machine = policy.limits, policy.machine
    yield (
        f"A run has at most {limits.greatest_rounds} rounds, and a round at most "
        f"{limits.greatest_steps_a_round} steps."
    )
    yield (
        f"All runs together get at most {limits.greatest_rounds_a_day} rounds in any 24 hours, "
        f"and at most {limits.greatest_open_runs} runs are open at the same time; at most "
        f"{limits.greatest_new_runs_a_day} new ones a day are taken without a person."
    )
    if limits.withdrawn:
        names = _listed(tuple(f"{sha256[:12]}…" for sha256 in limits.withdrawn))
        yield f"No run begins at a withdrawn model, and no command takes one: {names}."
    if limits.hours:
        yield f"Rounds are trained in these hours of the machine: {_listed(limits.hours)}."
    else:
        yield "Rounds are trained at any hour."
    yield (
        f"What is set aside for a run is free again when nobody has asked for it in "
        f"{limits.lapse_days} days."
    )
    where = "the best device there is" if machine.device == "auto" else machine.device
    yield f"Training takes {where}, and {machine.gradient_memory} MiB for the images of a batch."


def _budget(policy: Policy) -> Iterator[str]:
    budget = policy.budget
    if budget is None:
        yield "There is NO budget: no real patient may stand behind this cohort."
        return
    unit = policy.data.unit if policy.data else policy.least_unit
    yield (
        f"Over the whole life of this site, everything that it releases is ({budget.epsilon:g}, "
        f"{budget.delta:g})-differentially private for each {unit} of its cohorts. Nothing ever "
        "gives budget back."
    )
    fixed = -accounting.divergence_within(0.0, budget.delta, budget.at_order)
    yield (
        f"It is counted by a Renyi filter at order {budget.at_order:g}, which holds when runs are "
        f"chosen by earlier results. With the first release its ε begins at {fixed:.2f}; parts of "
        "the budget, in percent, add up."
    )
    yield "A run is set aside whole before its first round; one that does not fit is refused."
    if budget.period:
        yield (
            f"At most ε {budget.period.epsilon:g} is spent in any {budget.period.days} days; more "
            "is asked for again later."
        )
    else:
        yield "Nothing paces the budget: one run may spend it whole."


def _data(policy: Policy) -> Iterator[str]:
    yield (
        f"The cohort lies in {policy.cohort!r}. A person admits it with `cloister node admit`, and "
        f"takes responsibility that it has at least {policy.limits.least_patients} patients; a "
        "cohort that was changed is refused until somebody has admitted it again."
    )
    data = policy.data
    if data is None:
        yield "Any data a run asks for is trained on."
        return
    shape = " x ".join(map(str, data.shape))
    yield (
        f"Only runs for these data are taken: {data.kind}, classes {_listed(data.classes)}, "
        f"{shape} pixels ({sides_of(data.shape)}), one {data.unit} to a pseudonym, preprocessing "
        f"{data.preprocessing[:12]}…"
    )
    if data.modalities:
        yield (
            f"A run of modalities is taken if one of them is of {_listed(data.modalities)}; a "
            "patient without the others takes part without them."
        )


def _leaves(policy: Policy) -> Iterator[str]:
    yield (
        f"Its name {policy.site!r}, the version of Cloister, the declared size "
        f"{policy.declared_size}, noised updates, refusal codes, and how far its ledger went, "
        "under a seal that nobody else can read."
    )
    yield (
        "Never: images, names, pseudonyms, the real number of patients, losses, durations, file "
        "names, error texts."
    )
    release = policy.release
    if release.pace:
        yield (
            f"A reply leaves when {release.pace:.0%} of a round's deadline has passed, or a whole "
            "multiple of that, so that how long training took says nothing. A run with a slot "
            f"below {release.least_slot:g} s or above {release.greatest_slot:g} s is refused."
        )
    else:
        yield (
            "A reply leaves as soon as it is ready: how long training took can be seen. "
            f"(least_slot, {release.least_slot:g} s, and greatest_slot, "
            f"{release.greatest_slot:g} s, have no effect.)"
        )
    yield (
        f"After each entry of its ledger a witness is added to {policy.ledger.witness!r}. Keep "
        "that file on another machine if you can."
    )


def _names(names: Names) -> str:
    if names == "any":
        return "any"
    return _listed(names) if names else "none"


def _takes_in(policy: Policy) -> Iterator[str]:
    settings = policy.intake
    chosen = {"Basic Profile": "", **dict(choices(settings.profile))}
    yield (
        "`cloister intake run --node` de-identifies by PS3.15 annex E: "
        f"{', '.join(chosen)}; docs/intake.md says what each means."
    )
    yield f"All pseudonyms come from the key {settings.site_key}."
    sealed = settings.encryption
    if sealed is None:
        yield "Cohorts lie unsealed on the disk."
    else:
        yield f"Cohorts are sealed on the disk; their key comes from {sealed.origin}."
    table = settings.reidentification
    if table is not None:
        yield (
            f"Who each pseudonym stands for is added to {table.table}, which the holder of the "
            f"private key to {table.public_key} alone can read."
        )


def _receives(policy: Policy) -> Iterator[str]:
    listen = policy.listen
    if listen is None:
        yield "Nothing listens: no DICOM comes here over the network."
        return
    callers = ", ".join(caller.ae_title for caller in listen.callers)
    yield (
        f"`cloister node listen` takes images from {callers}, at {listen.address}:{listen.port} "
        f"under the name {listen.ae_title}, into {listen.inbox}: originals, with identities."
    )
    if listen.transport == "plain":
        yield "It is plain TCP: whoever is on the way can read and change what is sent."
    elif listen.ask_callers_for == "nothing":
        yield "It is TLS, but callers show no certificate: an AE title is all that they need."
    else:
        yield "It is TLS, and a caller has to show a certificate."


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names)
