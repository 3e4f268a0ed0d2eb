"""A federation on one machine, or on a Ray cluster through Flower.

The same `ServerApp` and `ClientApp` as in the field; what differs is what carries the messages
(`local_engine`, `ray_engine`) and where the sites' randomness comes from: here it is drawn from
the run's seed, so that a run can be had twice, and the report says "accounted, not protected".

A run's file says where the data lies in a table of its own::

    [simulation]
    evaluation = "cohorts/evaluation"     # the operator's held-out cohort

    [[simulation.site]]                   # one table a site: partition by cohort directory
    name = "north"
    cohort = "cohorts/north"
    declared_size = 400                   # public and rounded; a person types it

or splits one cohort among invented sites, always by patient::

    [simulation]
    evaluation = "cohorts/test"
    cohort = "cohorts/train"
    partition = "dirichlet"               # or "iid", "quantity"
    alpha = 0.5
    sites = 4
    declared_size = 1000                  # for all, or a list with one number a site
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from pydantic import Field, ValidationError, model_validator

from client import app as client_wiring
from client.gate import Gate, Site
from client.home import counter_of
from client.keyfile import NodeKey, create_key
from client.ledger import Ledger, Place, Signed
from client.policy import Limits, Machine, Policy, Releases
from client.synthetic import Synthetic, fitting, synthetic_cohort
from client.training import Compute, LocalTrainer, best_device
from common import models
from common.accounting import SubsampledGaussian, planned
from common.cohort import LABELLED, Cohort
from common.errors import CohortError, RunError, SpecError
from common.files import write_durably
from common.noise import Keystream
from common.spec import Count, Positive, RunSpec, Section, explain_detail, read_run_file
from common.studies import seen_by
from deploy import partition
from deploy.local_engine import ClientAppAt, LocalGrid, Timing
from deploy.ray_engine import run_on_ray
from server import app as server_wiring
from server.evaluation import CentralEvaluator
from server.rounds import Conduct, Observer
from server.start import START_FILE, starting_model

log = logging.getLogger("cloister.simulation")

Engine = Literal["local", "ray"]
_REPEATS = 0.05
"""The part of the evaluation's images that may be among those trained on, with a warning."""


class SimulatedSite(Section):
    """A site with a cohort directory of its own."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]
    cohort: str
    declared_size: Count


class Simulation(Section):
    """The ``[simulation]`` table; paths are relative to the run's file.

    Attributes:
        evaluation: cohort directory of the central evaluation.
        site: the sites, each with its own cohort; or else
        cohort: one cohort, split by `partition` among `sites`, with `alpha` for ``dirichlet``
            (by label) and ``quantity`` (by size).
        declared_size: of the split sites: one number for all, or one each.
        synthetic: a cohort of ``cloister generate`` that every site mixes in, where the run asks
            for it: all of it, as if one generator's images had been handed round. In a federation
            each site names its own. `synthetic_without_privacy` also takes one of a run without
            privacy.
        allow_odd_sites: go on although a site is empty or has images of one class only.
    """

    evaluation: str
    site: tuple[SimulatedSite, ...] = ()
    cohort: str | None = None
    partition: Literal["iid", "dirichlet", "quantity"] = "iid"
    alpha: Positive = 0.5
    sites: Count = 1
    declared_size: Count | tuple[Count, ...] | None = None
    synthetic: str | None = None
    synthetic_without_privacy: bool = False
    allow_odd_sites: bool = False

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if bool(self.site) == (self.cohort is not None):
            raise ValueError("write either [[simulation.site]] tables, or cohort and partition")
        if len({site.name for site in self.site}) != len(self.site):
            raise ValueError("two [[simulation.site]] tables have one name")
        dealing = self.model_fields_set & {"partition", "alpha", "sites", "declared_size"}
        if self.site and dealing:
            raise ValueError(
                f"{', '.join(sorted(dealing))} mean nothing beside [[simulation.site]] tables; "
                "leave them out"
            )
        if self.cohort is not None and self.declared_size is None:
            raise ValueError("declared_size is missing: the public size that each site declares")
        if isinstance(self.declared_size, tuple) and len(self.declared_size) != self.sites:
            raise ValueError(f"declared_size has not one number for each of {self.sites} sites")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The sites' names in the order of their partition numbers."""
        if self.site:
            return tuple(site.name for site in self.site)
        return tuple(f"site-{number}" for number in range(1, self.sites + 1))

    def declared(self, number: int) -> int:
        """The size that site `number` (from 0) declares."""
        if self.site:
            return self.site[number].declared_size
        sizes = self.declared_size
        return sizes[number] if isinstance(sizes, tuple) else int(sizes or 0)

    def cohort_of(self, number: int, seed: int) -> Cohort:
        """The training images of site `number`: those marked ``train`` or not marked."""
        if self.site:
            return Cohort.open(Path(self.site[number].cohort)).with_split("", "train")
        whole = Cohort.open(Path(str(self.cohort))).with_split("", "train")
        if self.partition == "iid":
            parts = partition.iid(whole, self.sites, seed)
        elif self.partition == "dirichlet":
            parts = partition.dirichlet(whole, self.sites, seed, alpha=self.alpha)
        else:
            parts = partition.quantity(whole, self.sites, seed, alpha=self.alpha)
        return whole.subset(parts[number])

    def mixed_in(self, spec: RunSpec) -> Cohort | None:
        """The synthetic images of a run that mixes some in; None of any other.

        Raises:
            CohortError: if they cannot be, or are not, named or do not fit.
        """
        if not spec.augmentation.synthetic:
            return None
        if self.synthetic is None:
            raise CohortError(
                f"augmentation.synthetic = {spec.augmentation.synthetic}: [simulation] names no "
                "synthetic cohort; write synthetic = the cohort that `cloister generate` made"
            )
        return fitting(spec, self.synthetic_images())

    def synthetic_images(self) -> Synthetic:
        """The synthetic cohort that every site mixes in.

        Raises:
            CohortError: as `synthetic_cohort`.
        """
        path, unprotected = Path(str(self.synthetic)), self.synthetic_without_privacy
        return synthetic_cohort(path, without_privacy=unprotected)

    def held_out(self, number: int) -> Cohort:
        """The images of site `number` that are marked ``test``; none of a cohort that is dealt."""
        if self.site:
            return Cohort.open(Path(self.site[number].cohort)).with_split("test")
        return Cohort.open(Path(str(self.cohort))).subset([])

    def absolute(self, base: Path) -> Simulation:
        """The same with absolute paths, so that any process finds the data."""

        def resolved(path: str) -> str:
            return str((base / path).resolve())

        sites = tuple(s.model_copy(update={"cohort": resolved(s.cohort)}) for s in self.site)
        cohort = None if self.cohort is None else resolved(self.cohort)
        changed = {"site": sites, "cohort": cohort, "evaluation": resolved(self.evaluation)}
        if self.synthetic is not None:
            changed["synthetic"] = resolved(self.synthetic)
        return self.model_copy(update=changed)


def read_simulation(table: Mapping[str, Any], source: str) -> Simulation:
    """Parse a ``[simulation]`` table.

    Raises:
        SpecError: naming file, key, value and what was expected.
    """
    if not table:
        raise SpecError(
            f"{source}: the table [simulation] is missing; it says where the data lies "
            "(evaluation, and [[simulation.site]] or cohort with partition)"
        )
    try:
        return Simulation.model_validate_json(json.dumps(table, default=str))
    except ValidationError as error:
        lines = (f"{source}: {explain_detail(d, 'simulation')}" for d in error.errors())
        raise SpecError("\n".join(lines)) from None


def prepare(run_file: Path, runs: Path, model: Path | None = None) -> Path:
    """Check a run and its data, and make its folder below `runs`.

    Returns:
        The run's folder, with ``spec.json`` and ``simulation.json``.

    Raises:
        SpecError: if the run's file is wrong, or makes no sense at a site's declared size.
        ModelError: if the network cannot be made, or not be trained under privacy.
        CohortError: if a cohort does not fit, a site trains on patients of the evaluation in one
            directory, or a site is empty or of one class and the table does not say
            ``allow_odd_sites``. A person settles this before the run: a node that
            has said yes answers whatever its cohort holds (docs/privacy.md 5).
        RunError: if the folder cannot be written.
    """
    read = read_run_file(run_file)
    simulation = read_simulation(read.simulation, str(run_file)).absolute(run_file.parent)
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    spec = read.spec.identified(f"{read.spec.name.lower()}-{stamp}-{secrets.token_hex(2)}")
    check(spec, simulation)
    start = starting_model(spec, model)
    folder = runs / spec.run_id
    table = simulation.model_dump_json(indent=2, exclude_unset=True)
    try:
        folder.mkdir(parents=True)
        write_durably(folder / "spec.json", spec.canonical_json.encode())
        write_durably(folder / "simulation.json", table.encode())
        if start is not None:
            write_durably(folder / START_FILE, start)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error}); name another --runs") from error
    return folder


def check(spec: RunSpec, simulation: Simulation) -> None:
    """See `prepare`."""
    if len(simulation.names) < spec.federation.quorum:
        raise SpecError(
            f"federation.quorum = {spec.federation.quorum}: the simulation has "
            f"{len(simulation.names)} sites"
        )
    models.check_private(models.build(spec))
    models.learned(spec)
    simulation.mixed_in(spec)
    evaluator = CentralEvaluator(spec, Cohort.open(Path(simulation.evaluation)))
    for number, name in enumerate(simulation.names):
        planned(spec, simulation.declared(number))
        cohort = simulation.cohort_of(number, spec.seed)
        cohort.check_fits(spec)
        cohort = seen_by(spec, cohort)
        _check_apart(name, cohort, evaluator)
        if not simulation.allow_odd_sites:
            _check_ordinary(name, cohort)


def _check_apart(name: str, cohort: Cohort, evaluator: CentralEvaluator) -> None:
    """No patient is trained on and evaluated on, in one directory or in two.

    Pseudonyms of two directories can be compared where both are of DICOM: those of one site key
    are equal for one patient, and those of two keys for none. Equal images are a sign everywhere.
    A few are told, as public data sets have some; many are no accident.
    """
    for part, held_out in evaluator.parts.items():
        same_place = held_out.path.resolve() == cohort.path.resolve()
        named = {cohort.meta.source, held_out.meta.source} == {"dicom"}
        both = set(cohort.patients) & set(held_out.patients) if same_place or named else set()
        if both:
            raise CohortError(
                f"{cohort.path}: {len(both)} patients that site {name!r} trains on are in the "
                f"{part} part of the evaluation as well ({held_out.path}); mark all images of a "
                "patient alike (split), or name another evaluation cohort"
            )
        equal = 0 if same_place else len(cohort.digests & held_out.digests)
        if equal > _REPEATS * len(held_out):
            raise CohortError(
                f"{cohort.path}: {equal} of the {len(held_out)} images of the {part} part of the "
                f"evaluation ({held_out.path}) are images that site {name!r} trains on; name "
                "another evaluation cohort"
            )
        if equal:
            log.warning("%d images of site %r are in the %s part as well", equal, name, part)


def _check_ordinary(name: str, cohort: Cohort) -> None:
    way_out = "mend its data or labels, or write allow_odd_sites = true in [simulation]"
    if not len(cohort):
        raise CohortError(f"site {name!r} has no training image ({cohort.path}); {way_out}")
    one = len(np.unique(cohort.labels, axis=0)) == 1
    if one and cohort.kind in LABELLED:
        raise CohortError(f"site {name!r} has images of one class only ({cohort.path}); {way_out}")


def load(folder: Path) -> tuple[RunSpec, Simulation]:
    """What `prepare` wrote.

    Raises:
        RunError: if `folder` is no simulated run.
    """
    try:
        text = (folder / "spec.json").read_text()
        table = json.loads((folder / "simulation.json").read_text())
    except (OSError, ValueError) as error:
        raise RunError(
            f"{folder}: not the folder of a simulated run, which holds spec.json and "
            f"simulation.json ({getattr(error, 'strerror', None) or error})"
        ) from error
    return RunSpec.from_json(text, source=str(folder)), read_simulation(table, str(folder))


def simulate(
    folder: Path, *, engine: Engine = "local", workers: int | None = None, observer: Observer
) -> None:
    """Conduct the run in `folder` from its last finished round to its end.

    Args:
        folder: made by `prepare`; a killed run goes on where it was.
        engine: ``local`` (warm worker processes) or ``ray`` (Flower's simulation runtime).
        workers: processes of the local engine; 0: all in this process; None: one a site, as long
            as there are not more than four a core.
        observer: who watches.

    Raises:
        RunError: if the run cannot start or go on.
        CohortError: as `prepare`: the data may have changed since.
    """
    spec, simulation = load(folder)
    check(spec, simulation)
    if engine == "ray":
        run_on_ray(folder, spec, sites=len(simulation.names), observer=observer)
        return
    run_locally(folder, spec, simulation, workers=workers, observer=observer)


def run_locally(
    folder: Path,
    spec: RunSpec,
    simulation: Simulation,
    *,
    workers: int | None,
    observer: Observer,
) -> list[Timing]:
    """See `simulate`; returns how long each message took where it was answered."""
    config = {"spec": spec.canonical_json, "simulation": str(folder.resolve())}
    client = ClientAppAt("deploy.simulation", "client_app", config)
    count = _workers(len(simulation.names)) if workers is None else workers
    with LocalGrid(simulation.names, client, workers=count) as grid:
        app = ServerApp()
        conduct = Conduct(engine="local", seeded=True, observer=observer)
        server_wiring.register(app, lambda context, _: _station(context, conduct))
        app(grid, grid.context(config))
    return grid.timings


def _workers(sites: int) -> int:
    return max(1, min(sites, 4 * (os.cpu_count() or 1)))


def _station(context: Context, conduct: Conduct) -> server_wiring.Station:
    folder = Path(str(context.run_config["simulation"]))
    _, simulation = load(folder)
    return server_wiring.Station(folder, Path(simulation.evaluation), conduct)


def simulated_gate(context: Context) -> Gate:
    """The gate of the site that the context's partition number names."""
    folder = Path(str(context.run_config["simulation"]))
    return _gate(folder, int(context.node_config["partition-id"]))


@lru_cache(maxsize=64)
def _gate(folder: Path, number: int) -> Gate:
    spec, simulation = load(folder)
    name, declared = simulation.names[number], simulation.declared(number)
    cohort = simulation.cohort_of(number, spec.seed)
    compute = Compute(best_device())

    def trainer_for(spec: RunSpec, mechanism: SubsampledGaussian | None) -> LocalTrainer:
        return LocalTrainer(
            spec,
            cohort,
            declared_size=declared,
            mechanism=mechanism,
            compute=compute,
        ).mix_in(simulation.mixed_in(spec))

    def keystream(*, run_id: str, round_number: int) -> Keystream:  # the seed, not the run
        return Keystream.seeded(spec.seed, name, round_number)

    return Gate(
        Site(
            _policy(name, declared),
            _ledger(folder / "sites" / name, name),
            _COHORT,
            synthetic=simulation.synthetic_images() if spec.augmentation.synthetic else None,
        ),
        trainer_for=trainer_for,
        counter=counter_of(lambda: simulation.held_out(number), compute),
        keystream=keystream,
    )


_COHORT = "simulated"
_MOST = 2**31


def _policy(name: str, declared: int) -> Policy:
    """No limits: nobody's patients stand behind a simulated site, and its budget is no one's."""
    return Policy(
        site=name,
        declared_size=declared,
        cohort=_COHORT,
        least_unit="image",
        approval="automatic",
        allow_no_privacy=True,
        budget=None,
        limits=Limits(
            operators="any",
            tasks="any",
            models="any",
            greatest_parameters=_MOST,
            least_noise_multiplier=1e-9,
            greatest_sampling_rate=1.0,
            greatest_steps_a_round=_MOST,
            greatest_rounds=_MOST,
            greatest_rounds_a_day=_MOST,
            greatest_new_runs_a_day=_MOST,
            federated_evaluation=True,
            least_patients=1,
        ),
        data=None,
        release=Releases(pace=0.0),
        machine=Machine(gradient_memory=1_000_000),
    )


def _ledger(folder: Path, name: str) -> Ledger:
    """The site's ledger within the run's folder, made on first use."""
    key = folder / "node.key"
    create_key(key)
    place = Place(folder, NodeKey.read(key))
    ledger = Ledger(place) if place.database.exists() else Ledger.create(place, site=name)
    if ledger.book.admitted != _COHORT:
        ledger.admit(_COHORT, Signed("the simulation", "no real site stands behind it"))
    return ledger


client_app = ClientApp()
client_wiring.register(client_app, simulated_gate)

server_app = ServerApp()
server_wiring.register(
    server_app, lambda context, _: _station(context, Conduct(engine="ray", seeded=True))
)
