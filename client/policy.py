"""The hospital's own limits, which no message can widen.

A policy is read once from ``node.toml`` and frozen. Deciding is a pure function of policy, spec
and what the ledger says was spent; the cohort has no part in it (PRIVACY.md 5).
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from common import accounting
from common.accounting import SubsampledGaussian
from common.errors import ConfigError, Refusal, RefusalCode, SpecError
from common.spec import (
    Count,
    DpSgd,
    OpenFraction,
    Positive,
    RunSpec,
    Section,
    explain_detail,
)


class Budget(Section):
    """What the site may spend over its life: (epsilon, delta), counted by a Renyi filter.

    The filter adds up Renyi divergences at one fixed `order`, which stays valid when a
    coordinator chooses each run by the results of the last (PRIVACY.md 9).
    """

    epsilon: Positive
    delta: OpenFraction
    order: Annotated[float, Field(ge=1.5, le=256)] = 8.0


class Policy(Section):
    """What this node does and does not do.

    Attributes:
        site: the public name of the site.
        declared_size: the public, rounded number of units that the hospital declares; a person
            types it and nothing derives it from the data.
        budget: for life; None only where no real patient stands behind the cohort.
        allow_no_privacy: whether runs without differential privacy are taken at all.
        cohort: directory of the training cohort.
    """

    site: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]
    declared_size: Count
    budget: Budget | None
    allow_no_privacy: bool = False
    cohort: str

    def plan(self, spec: RunSpec) -> SubsampledGaussian | None:
        """The mechanism of the whole run at this site, or None for an allowed run without privacy.

        Raises:
            Refusal: ``policy`` if the run asks for no privacy and the policy does not allow it;
                ``spec`` if the run makes no sense at the declared size.
        """
        if not isinstance(spec.privacy, DpSgd) and not self.allow_no_privacy:
            raise Refusal(
                RefusalCode.POLICY,
                f"run {spec.name!r} asks for no privacy; allow_no_privacy is false",
            )
        try:
            return accounting.planned(spec, self.declared_size)
        except SpecError as error:
            raise Refusal(RefusalCode.SPEC, str(error)) from error

    def check_budget(self, spent: list[SubsampledGaussian], wanted: SubsampledGaussian) -> None:
        """Allow `wanted` on top of what is `spent`, or refuse.

        Raises:
            Refusal: ``budget``.
        """
        if self.budget is None:
            return
        total = accounting.epsilon_at_order([*spent, wanted], self.budget.delta, self.budget.order)
        if total > self.budget.epsilon:
            raise Refusal(
                RefusalCode.BUDGET,
                f"epsilon would reach {total:.3f} of {self.budget.epsilon} for life "
                f"(delta {self.budget.delta})",
            )


def read_policy(path: Path) -> Policy:
    """Read ``node.toml``.

    Raises:
        ConfigError: naming file, key, value and what was expected.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        return Policy.model_validate(document)
    except ValidationError as error:
        lines = (f"{path}: {explain_detail(detail)}" for detail in error.errors())
        raise ConfigError("\n".join(lines)) from None
    except (OSError, ValueError) as error:  # not there, not text, not TOML
        raise ConfigError(f"{path}: {error}; expected the node's TOML file") from error
