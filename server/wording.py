"""How report and model card say a number, and the sentences that both print.

A sentence here claims no more than docs/privacy.md does; change neither without the other.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.spec import Metric, RunSpec
from common.tasks import words
from common.tasks.estimates import Estimate
from server.record import RunRecord, Spend

SAME = "no spread"
INTENDED_USE = (
    "Research on federated learning for medical imaging, and evaluation by the hospitals that "
    "took part, on images like those they trained with."
)
NOT_FOR_CLINICAL_USE = (
    "Not for clinical use as it is: it is no medical device, no regulator has cleared it, and no "
    "prospective study stands behind it. It must not be used to diagnose or treat anyone."
)

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def figure(found: Estimate, metric: Metric, beside: Estimate | None = None) -> str:
    """A metric's value with its unit, ``0.912`` or ``27.31 dB``.

    `beside` is the estimate whose digits it takes, where it stands in one line with that.
    """
    unit = f" {metric.unit}" if metric.unit and found.value is not None else ""
    return words.number(found.value, words.enough(beside or found, words.digits(metric))) + unit


def titled(metric: Metric) -> str:
    """A metric's title with its unit, ``PSNR (dB)``."""
    return f"{metric.title} ({metric.unit})" if metric.unit else metric.title


def interval(found: Estimate, metric: Metric) -> str:
    """A metric's interval alone; nothing without one, words where it has no width."""
    same = SAME if found.low is not None else ""
    return words.interval(found, words.digits(metric)) or same


def estimate(found: Estimate, metric: Metric) -> str:
    """A metric's value and its interval, ``0.912 (0.871 to 0.946)``."""
    limits = words.interval(found, words.digits(metric))
    return figure(found, metric) + (f" ({limits})" if limits else "")


def metric_notes(metrics: Collection[Metric]) -> str:
    """How the metrics are to be read: where lower is better, and what each has to say."""
    lower = [metric.title for metric in metrics if metric.lower_is_better]
    said = [f"Lower is better: {listed(lower)}."] if lower else []
    return " ".join([*said, *(metric.note for metric in metrics if metric.note)])


def epsilon(value: float | None) -> str:
    """An epsilon, rounded *up* to two digits: what is printed is never less than what was spent."""
    if value is None:
        return words.NONE
    return f"{math.ceil(value * 100 - 1e-9) / 100:.2f}"


def epsilon_of(spend: Spend) -> str:
    """A site's epsilon; without a mechanism the words, never a number dressed up as one."""
    if spend.epsilon is None:
        return "no privacy" if spend.mechanism == "none" else "not known"
    return epsilon(spend.epsilon)


def largest(sites: Mapping[str, Spend]) -> tuple[Spend, str] | None:
    """The largest spending and whose it is; None if there is any site without an epsilon."""
    if not sites or any(spend.epsilon is None for spend in sites.values()):
        return None
    name = max(sites, key=lambda site: sites[site].epsilon or 0.0)
    printed = epsilon(sites[name].epsilon)
    equal = sum(epsilon(spend.epsilon) == printed for spend in sites.values())
    whose = name if equal == 1 else "every site" if equal == len(sites) else f"{equal} sites"
    return sites[name], whose


def scientific(value: float | None) -> str:
    """A small number such as a delta, ``1 × 10⁻⁵``."""
    if value is None:
        return words.NONE
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    factor = f"{float(mantissa):g} × " if float(mantissa) != 1 else ""
    return f"{factor}10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def plain(value: float | None, digits: int = 4) -> str:
    """A figure with so many significant digits, without zeros behind; a dash for None."""
    return words.NONE if value is None else f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """A time that a person reads: ``42.1 s``, ``3 min 5 s``, ``2 h 4 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def setting(value: Any) -> str:
    """A value of a spec in words: no brackets, no quotes, a dash where there is none."""
    match value:
        case None | "":
            return words.NONE
        case bool():
            return "yes" if value else "no"
        case list() | tuple():
            return ", ".join(map(setting, value))
        case dict():
            return ", ".join(f"{key} {setting(entry)}" for key, entry in value.items())
        case float():
            return f"{value:g}"
    return str(value)


def listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    *before, last = names
    return f"{', '.join(before)} and {last}" if before else last


@dataclass(frozen=True)
class Banner:
    """A banner: the words that everyone must see, and why."""

    title: str
    text: str


def banner(record: RunRecord) -> Banner | None:
    """What a reader must know before any figure; None where the run protected its patients."""
    if record.spec.privacy.mechanism == "none":
        return Banner(
            "No differential privacy",
            'The run\'s description says mechanism = "none". What left the sites was not noised '
            "and may reveal their images; no ε is claimed for any of them.",
        )
    if record.environment.seeded:
        return Banner(
            "Accounted, not protected",
            "Sampling and noise of this run came from a seed, as in every simulation. Whoever "
            "knows the seed can take the noise away. The figures are what the same run would "
            "spend at nodes with their own randomness; here they protect nobody.",
        )
    if exposed := _exposed(record):
        return Banner(
            "Not protected",
            f"Synthetic images that {listed(exposed)} mixed in are not known to come from a model "
            "that protected its own patients. No figure here covers those: what is released may "
            "repeat them.",
        )
    if not record.privacy.protected:
        return Banner(
            "Not protected",
            "The run's own account says that its sites were not protected. Read the figures "
            "below as a calculation.",
        )
    return None


def claim(record: RunRecord) -> tuple[str, ...]:
    """What the privacy figures mean, in sentences; empty where there is no privacy to explain."""
    if record.spec.privacy.mechanism == "none":
        return ()
    unit = record.spec.privacy.unit
    own = "These sentences hold for nodes that draw their own randomness; here none did."
    return (
        *((own,) if banner(record) else ()),
        f"For each site: everything that its node released in this run about its training cohort "
        f"is (ε, δ)-differentially private under adding or removing one {unit}'s whole record; "
        f"the number of {unit}s is private. Replacing one {unit} by another costs more.",
        *_unit_sentence(unit),
        "ε covers the contents of the releases, not their timing or absence, and holds for real "
        "arithmetic. It is this run's; what a site has spent over its life is in its own ledger.",
        *_composition(record),
        *_beginning(record.spec),
        *_mixed(record),
        "Patients of the central evaluation cohort are not covered: their hospital permits that "
        "use.",
        *_pictures(record.spec.evaluation.gallery),
    )


def pacing(spend: Spend) -> str:
    """Whether a site's replies were held to a slot, in a word."""
    return "paced" if spend.paced else "unpaced"


def timing(record: RunRecord) -> tuple[str, ...]:
    """What the times of the replies say, in a sentence for each kind of site."""
    said = {
        True: "were paced, each held to a slot: as long as training fits into it, how long it "
        "took says nothing about the cohort.",
        False: "were not paced: how long training took says something about the cohort.",
    }
    sites = sorted(record.privacy.sites.items())
    named = {kind: [name for name, spend in sites if spend.paced is kind] for kind in said}
    return tuple(
        f"Replies of {'every site' if len(names) == len(sites) else listed(names)} {said[kind]}"
        for kind, names in named.items()
        if names
    )


def limitations(record: RunRecord) -> tuple[str, ...]:
    """What a user of the model must bear in mind."""
    test = record.final.get("test")
    name = record.spec.input.row_name
    tested = f"{words.counted(test.images, name)} of one cohort" if test else "no test part"
    return (
        f"It was tested on {tested}; other scanners, populations and prevalences may give "
        "other results. Test it on local images first.",
        "Nothing here says how it does in subgroups (age, sex, device, site).",
        *record.spec.task.CAVEATS,
        *_beginning(record.spec),
        *_shared(record),
        "Intervals show the chance of the sample of patients, not of training.",
    )


def _beginning(spec: RunSpec) -> tuple[str, ...]:
    """What the figures leave out of a model that did not begin at random weights."""
    if spec.start is None:
        return ()
    return (
        f"The run began with the model {spec.start.model_sha256}; what its training spent is in "
        "that run's record, and not in the figures here.",
    )


def _exposed(record: RunRecord) -> list[str]:
    """The sites whose synthetic images are not known to be of a model that protected anybody."""
    if not record.spec.augmentation.synthetic:
        return []
    sites = record.privacy.sites.items()
    return sorted(name for name, spend in sites if spend.synthetic != "protected")


def _mixed(record: RunRecord) -> tuple[str, ...]:
    """What the figures leave out of a run that mixed in synthetic images (docs/privacy.md)."""
    if not record.spec.augmentation.synthetic:
        return ()
    said = (
        "Synthetic images were mixed in, and are taken here as given: what the training of their "
        "generator spent is in that run's record. A patient of both bears the sum."
    )
    exposed = _exposed(record)
    if not exposed:
        return (said,)
    return (
        said,
        f"Those of {listed(exposed)} are not known to be of a generator that protected its "
        "patients: nothing bounds what is released of them.",
    )


def _shared(record: RunRecord) -> tuple[str, ...]:
    """How a simulation differs from a federation in what is mixed in."""
    if not (record.spec.augmentation.synthetic and record.environment.seeded):
        return ()
    return (
        "Every site of this simulation mixed in the same synthetic images; the sites of a "
        "federation each name their own.",
    )


def intended_inputs(spec: RunSpec) -> str:
    """For which images the operator has declared the model, in a sentence."""
    use = spec.use
    said = []
    if use.modalities:
        said.append(f"modality {listed(use.modalities)}")
    if use.body_parts:
        said.append(f"body part {listed(use.body_parts)}")
    if use.smallest_side is not None:
        said.append(f"no side below {use.smallest_side} pixels")
    if use.largest_side is not None:
        said.append(f"no side above {use.largest_side} pixels")
    if not said:
        return "The operator has not declared for which images it is meant."
    return f"Images as the operator has declared: {'; '.join(said)}."


def _unit_sentence(unit: str) -> tuple[str, ...]:
    if unit == "patient":
        return ()
    return (
        "The unit is the image, because the source names no patients: someone with several images "
        "is protected less, by the composition of them.",
    )


def _pictures(most: int) -> tuple[str, ...]:
    if not most:
        return ()
    return (
        f"The run's description asked for up to {words.counted(most, 'picture')} of that cohort: "
        "they lie in the run's folder and its report.",
    )


def _composition(record: RunRecord) -> tuple[str, ...]:
    total, delta = record.privacy.all_sites_epsilon, record.privacy.all_sites_delta
    if total is None:
        return ()
    return (
        f"A patient with records at all {len(record.privacy.sites)} sites bears their composition, "
        f"ε = {epsilon(total)} at δ = {scientific(delta)}; nobody can tell who that is.",
    )
