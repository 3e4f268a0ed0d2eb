"""A new node's folder: a commented ``node.toml`` on the safe side, its key, its empty ledger."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from client.folder import KEY_FILE, LEDGER, POLICY_FILE, NodeFolder
from client.keyfile import read_key
from client.policy import LedgerFiles
from common import accounting
from common.cohort import Cohort, CohortMeta
from common.errors import ConfigError
from deploy.run_words import sides_of

_OWN = (KEY_FILE, LedgerFiles().witness, LEDGER, POLICY_FILE)  # the policy comes last


@dataclass(frozen=True)
class NewNode:
    """What a person says of a new node.

    Attributes:
        site: its public name.
        declared_size: typed by a person; nothing derives it from the data.
        epsilon, delta: the lifetime budget.
        cohort: a cohort whose public description fills ``[data]``.
        cohort_key: the file of its key, if it is sealed.
    """

    site: str
    declared_size: int
    epsilon: float
    delta: float
    cohort: Path | None = None
    cohort_key: Path | None = None


def set_up(home: Path, new: NewNode, *, by: str) -> NodeFolder:
    """Make the folder of a node: all of it, or nothing.

    Raises:
        ConfigError: if something of a node is there already, or what was said makes no policy.
        CohortError: if the cohort cannot be read.
    """
    there = [name for name in _OWN if (home / name).exists()]
    if there:
        raise ConfigError(f"{home}: has {', '.join(there)} already; nothing is written over")
    _check(new)
    home = Path(os.path.abspath(home))
    made = home.with_name(f".{home.name}.{secrets.token_hex(4)}.partial")
    try:
        made.mkdir(mode=0o700, parents=True)
        (made / POLICY_FILE).write_text(_policy_text(home, new), encoding="utf-8")
        NodeFolder.open(made).create(by=by).disconnect()
        _put(made, home)
    except OSError as error:
        raise ConfigError(f"{home}: cannot be set up ({error})") from error
    except ConfigError as error:
        raise ConfigError(str(error).replace(str(made), str(home))) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return NodeFolder.open(home)


def _check(new: NewNode) -> None:
    """What no policy could be written with."""
    for option, text in (
        ("--site", new.site),
        ("--cohort", str(new.cohort or "")),
        ("--cohort-key", str(new.cohort_key or "")),
    ):
        try:
            text.encode()
        except UnicodeEncodeError:  # bytes of the command line that are no text
            raise ConfigError(f"{option} {text!a}: expected text in UTF-8") from None
    if not 0 < new.delta < 1 / new.declared_size:
        raise ConfigError(
            f"--delta {new.delta:g}: expected above 0 and below 1 / declared size = "
            f"{1 / new.declared_size:.3g}"
        )
    if not (new.epsilon > 0 and math.isfinite(new.epsilon)):
        raise ConfigError(f"--epsilon {new.epsilon:g}: expected a number above 0")


def _put(made: Path, home: Path) -> None:
    """Move what was made to where it belongs; what is there stays, and a failure takes it back."""
    if not home.exists():
        made.rename(home)
        return
    done: list[str] = []
    try:
        for name in _OWN:
            (made / name).rename(home / name)
            done.append(name)
    except BaseException:
        for name in done:
            (home / name).rename(made / name)
        raise


def _policy_text(home: Path, new: NewNode) -> str:
    key = None if new.cohort_key is None else read_key(new.cohort_key, "cohort key")
    meta = None if new.cohort is None else Cohort.open(new.cohort, key).meta
    return _TEMPLATE.format(
        site=_quoted(new.site),
        declared_size=new.declared_size,
        cohort=_quoted(_path(home, new.cohort)),
        epsilon=new.epsilon,
        delta=new.delta,
        order=accounting.filter_order(new.epsilon, new.delta),
        data=data_table(meta) if meta else _NO_DATA,
        key=_quoted(_path(home, new.cohort_key or home / "cohort.key")),
        unsealed="" if new.cohort_key else "# ",
    )


def _quoted(value: object) -> str:
    """As TOML writes a text or a list of them."""
    return json.dumps(value, ensure_ascii=False)


def _path(home: Path, cohort: Path | None) -> str:
    """Within the folder as it moves with it, elsewhere from the root."""
    if cohort is None:
        return "cohort"
    whole = Path(os.path.abspath(cohort))
    inside = Path(os.path.abspath(home))
    return str(whole.relative_to(inside) if whole.is_relative_to(inside) else whole)


def data_table(meta: CohortMeta) -> str:
    """``[data]`` for a cohort, from its public description; there is no count in it."""
    modalities = f"modalities = {_quoted(list(meta.modalities))}\n" if meta.modalities else ""
    return (
        "[data]\n"
        f"unit = {_quoted(meta.unit)}\n"
        f"kind = {_quoted(meta.kind)}\n"
        f"classes = {_quoted(list(meta.classes))}\n"
        f"shape = {_quoted(list(meta.shape))}  # {sides_of(meta.shape)}\n"
        f"preprocessing = {_quoted(meta.preprocessing_digest)}\n"
        f"{modalities}"
    )


_NO_DATA = """\
[data]  # not filled in yet: no run fits it. `cloister node admit` says what your cohort has here.
unit = "patient"
kind = "binary"
classes = ["negative", "positive"]
shape = [1, 64, 64]  # channels, height, width
preprocessing = "0000000000000000000000000000000000000000000000000000000000000000"
"""

_TEMPLATE = """\
# What this node does and does not do. No message of a coordinator can change it.
# `cloister node check` says in plain language what it means; every key: docs/node-file.md.

site = {site}
declared_size = {declared_size}  # public and rounded; typed by a person, never counted
cohort = {cohort}
least_unit = "patient"
approval = "ask"  # each new run waits for a person; "automatic": taken within the limits
allow_no_privacy = false

[budget]  # for the site's whole life; `cloister node set-budget` books a change of epsilon
epsilon = {epsilon}
delta = {delta}
order = {order}  # of the Renyi filter; fixed once something is spent
# period = {{ days = 365, epsilon = 1.0 }}  # paces the budget, gives nothing back

[limits]
operators = []  # who may launch runs here; empty: nobody
models = []  # networks that may be trained (`cloister models` lists them); empty: none
tasks = ["classification"]
greatest_parameters = 30_000_000
least_noise_multiplier = 0.5
greatest_sampling_rate = 0.25
greatest_steps_a_round = 200
greatest_rounds = 1000
greatest_rounds_a_day = 200
greatest_open_runs = 3
greatest_new_runs_a_day = 10  # set aside without a person
least_patients = 50
lapse_days = 30
federated_evaluation = false
withdrawn = []  # SHA-256 of models found to be bad since they were signed
hours = []  # such as ["20:00-06:00"], in this machine's time; empty: always

{data}
[release]
pace = 0.5  # a reply leaves when this part of a round's deadline has passed
least_slot = 30.0  # seconds; many short ones would tell the time after all
greatest_slot = 86400.0  # seconds; meanwhile the node does nothing else

[machine]
device = "auto"
gradient_memory = 512  # MiB, for what training makes of the images of one batch

[ledger]
witness = "ledger.witness"  # best on another machine

[intake]  # profile of de-identification, keys: docs/node-file.md
site_key = "site.key"  # of all pseudonyms; made on first use

{unsealed}[intake.encryption]  # seals cohorts on the disk; `cloister intake new-key` makes one
{unsealed}key_file = {key}
"""
