"""Law 1 over a whole federation: nothing leaves a node but a release.

Every byte that a site gives to what carries the messages is kept and searched. A search sees
only what it looks for: that two cohorts that differ by a patient cannot be told apart is tested
in ``tests/client``.
"""

from __future__ import annotations

import base64
import itertools
import logging
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto

from common.cohort import Cohort
from common.errors import MessageError, RunError
from common.messages import NodeCard, RefusalReply, Release, read_reply
from common.spec import RunSpec
from deploy.local_engine import ClientAppAt, LocalGrid
from deploy.simulation import load, prepare
from server.evaluation import CentralEvaluator
from server.rounds import Conduct, FederatedRun

REAL_PATIENTS, REAL_IMAGES, DECLARED = 137, 151, 200
FIELDS = {
    "card": {"protocol", "digest", "site", "version", "declared_size"},
    "refusal": {"protocol", "code", "incident"},
    "release": {
        "protocol",
        "digest",
        "round",
        "private",
        "sampling_rate",
        "noise_multiplier",
        "steps",
        "unit",
    },
}

RUN = f"""
[evaluation]
bootstrap = 0
[simulation]
evaluation = "evaluation"
[[simulation.site]]
name = "north"
cohort = "north"
declared_size = {DECLARED}
[[simulation.site]]
name = "south"
cohort = "south"
declared_size = {DECLARED}
"""


class TappedGrid(LocalGrid):
    """A local grid that keeps every reply, in the bytes in which it crosses."""

    def __init__(self, *arguments: Any, tamper: Callable[[Message], None], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._tamper = tamper
        self.crossed: list[bytes] = []

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for reply in super().pull_messages(message_ids):
            self._tamper(reply)
            self.crossed.append(message_to_proto(reply).SerializeToString())
            yield reply


class Watching:
    def run_opened(self, spec: RunSpec, sites: list[str], finished_rounds: int) -> None: ...

    def round_opened(self, number: int) -> None: ...

    def site_answered(self, number: int, site: str, status: str) -> None: ...

    def round_closed(self, row: Any) -> None: ...


@dataclass(frozen=True)
class Federation:
    """One run of two sites: what crossed, and what the sites knew.

    Attributes:
        crossed: every reply, as bytes.
        canaries: what a site knows and may not say, in several writings each.
        losses: the mean loss of each round at each site.
    """

    crossed: list[bytes]
    canaries: list[bytes]
    losses: list[float]

    @property
    def replies(self) -> list[RecordDict]:
        return [parsed(content).content for content in self.crossed]

    @property
    def found(self) -> list[bytes]:
        """The canaries that crossed, as they are or as some writing of them."""
        return [c for c in self.canaries if any(c in content for content in self.crossed)]


def parsed(content: bytes) -> Message:
    return message_from_proto(MessageProto.FromString(content))


def writings(canary: str) -> list[bytes]:
    """A text as it might be written into a message."""
    plain = canary.encode()
    return [plain, plain.hex().encode(), base64.b64encode(plain)[:-4], canary.encode("utf-16-le")]


def numbers(value: float) -> list[bytes]:
    """A number as it might be written: as text, or as a double either way round."""
    texts = [f"{value:.4f}".encode(), repr(value).encode()]
    return [*texts, struct.pack("<d", value), struct.pack(">d", value)]


@pytest.fixture
def federation(
    tmp_path: Path,
    spec_text: str,
    make_spec: Callable[..., RunSpec],
    write_cohort: Any,
    caplog: pytest.LogCaptureFixture,
) -> Callable[..., Federation]:
    """Run it with `tamper` between the sites and the grid, on damaged cohorts if asked."""

    numbering = itertools.count()

    def run(
        tamper: Callable[[Message], None] = lambda _: None, *, lose_images: bool = False
    ) -> Federation:
        spec = make_spec()
        owners = [*range(REAL_PATIENTS), *range(REAL_IMAGES - REAL_PATIENTS)]
        home = tmp_path / f"federation-{next(numbering)}"
        cohorts = [
            write_cohort(spec, [1000 * n + owner for owner in owners], name=f"{home.name}/{name}")
            for n, name in enumerate(("north", "south"), start=1)
        ]
        write_cohort(spec, range(9000, 9012), labels=[0, 1] * 6, name=f"{home.name}/evaluation")
        (home / "run.toml").write_text(spec_text + RUN)
        folder = prepare(home / "run.toml", home / "runs")
        if lose_images:
            for cohort in cohorts:
                (cohort.path / "images.u16").unlink()
        caplog.set_level(logging.INFO)
        crossed = conduct(folder, tamper)
        canaries = [str(tmp_path), "images.u16", "ledger.sqlite", *known_to(cohorts)]
        texts = [w for canary in canaries for w in writings(canary)]
        losses = [loss for record in caplog.records for loss in losses_in(record)]
        caplog.clear()
        return Federation(crossed, texts + [w for loss in losses for w in numbers(loss)], losses)

    return run


def conduct(folder: Path, tamper: Callable[[Message], None]) -> list[bytes]:
    """The run in `folder`, in this process; what crossed."""
    spec, simulation = load(folder)
    config = {"spec": spec.canonical_json, "simulation": str(folder)}
    at = ClientAppAt("deploy.simulation", "client_app", config)
    evaluator = CentralEvaluator(spec, Cohort.open(Path(simulation.evaluation)))
    grid = TappedGrid(simulation.names, at, workers=0, tamper=tamper)
    with grid:
        conducted = Conduct(engine="local", seeded=True, observer=Watching())
        try:
            FederatedRun(spec, folder, evaluator=evaluator, conduct=conducted).run(grid)
        except RunError:
            assert grid.crossed
        return grid.crossed


def losses_in(record: logging.LogRecord) -> list[float]:
    """What the gate wrote into the node's own log."""
    if record.name != "cloister.gate" or not isinstance(record.args, tuple):
        return []
    return [argument for argument in record.args if isinstance(argument, float)]


def known_to(cohorts: list[Cohort]) -> list[str]:
    """Every pseudonym of every patient."""
    return [patient for cohort in cohorts for patient in cohort.patients]


def scalars_of(records: RecordDict) -> Iterator[tuple[str, Any]]:
    for name, record in records.items():
        if isinstance(record, ConfigRecord | MetricRecord):
            for field, value in record.items():
                yield from (
                    ((f"{name}.{field}", v) for v in value)
                    if isinstance(value, list)
                    else ((f"{name}.{field}", value),)
                )


def off_the_list(records: RecordDict) -> list[str]:
    """What is in a reply without being on the closed list."""
    odd = []
    for name, record in records.items():
        if isinstance(record, ArrayRecord):
            odd += [] if name == "update" else [name]
        else:
            odd += [f"{name}.{f}" for f in record if f not in FIELDS.get(name, ())]
    try:
        read_reply(records)
    except MessageError as error:
        odd.append(str(error))
    return odd


def real_counts(records: RecordDict) -> list[str]:
    """Fields that hold a number which only the hospital knows."""
    secret = {float(REAL_PATIENTS), float(REAL_IMAGES)}
    return [f for f, v in scalars_of(records) if isinstance(v, int | float) and float(v) in secret]


# --- The law ------------------------------------------------------------------------------------


def test_nothing_leaves_but_cards_and_releases(federation: Callable[..., Federation]):
    made = federation()
    kinds = [type(read_reply(records)) for records in made.replies]
    assert kinds == [NodeCard] * 2 + [Release] * 6
    assert made.found == []
    assert [off_the_list(records) for records in made.replies] == [[]] * 8
    assert [real_counts(records) for records in made.replies] == [[]] * 8
    assert len(made.losses) == 6  # they were known, and searched for


def test_a_failure_leaves_as_a_number_alone(federation: Callable[..., Federation]):
    made = federation(lose_images=True)
    kinds = [type(read_reply(records)) for records in made.replies]
    assert set(kinds) == {RefusalReply}
    assert made.found == []
    assert [off_the_list(records) for records in made.replies] == [[]] * len(kinds)
    incidents = {r.incident for r in map(read_reply, made.replies) if isinstance(r, RefusalReply)}
    assert len(incidents) == len(kinds)


def test_two_releases_share_no_noise(federation: Callable[..., Federation]):
    made = federation()
    releases = [r for r in map(read_reply, made.replies) if isinstance(r, Release)]
    flat = [np.concatenate([a.ravel() for a in r.update.values()]) for r in releases]
    correlations = np.corrcoef(np.stack(flat))[~np.eye(len(flat), dtype=bool)]
    assert np.abs(correlations).max() < 6 / np.sqrt(len(flat[0]))


def test_metadata_says_who_answers_what_and_nothing_else(federation: Callable[..., Federation]):
    for content in federation().crossed:
        metadata = parsed(content).metadata
        assert metadata.src_node_id in (1, 2)
        assert metadata.group_id == ""
        assert metadata.message_type in ("query.invite", "train.step")


# --- The controls: what would leave is seen -------------------------------------------------------


def add_metrics(reply: Message) -> None:
    reply.content["metrics"] = MetricRecord({"num-examples": REAL_PATIENTS, "loss": 0.5})


def add_patient(reply: Message) -> None:
    for record in reply.content.values():
        if isinstance(record, ConfigRecord):
            record["note"] = "seen p01017 last"


def say_the_real_count(reply: Message) -> None:
    if "card" in reply.content:
        card: Any = reply.content["card"]
        card["declared_size"] = REAL_PATIENTS


@pytest.mark.parametrize("leak", [add_metrics, add_patient, say_the_real_count])
def test_a_leak_is_seen(federation: Callable[..., Federation], leak: Callable[[Message], None]):
    made = federation(leak)
    odd = [thing for records in made.replies for thing in off_the_list(records)]
    counted = [field for records in made.replies for field in real_counts(records)]
    if leak is add_metrics:
        assert "metrics.num-examples" in odd
        assert "metrics.num-examples" in counted
    elif leak is add_patient:
        assert b"p01017" in made.found
        assert {thing for thing in odd if thing.endswith(".note")}
    else:
        assert counted == ["card.declared_size"] * 2


def test_a_loss_that_leaves_is_seen(federation: Callable[..., Federation]):
    # The run is seeded: what the first run logged is what the second one leaks.
    losses = federation().losses

    def leak(reply: Message) -> None:
        if "release" in reply.content:
            release: Any = reply.content["release"]
            release["sampling_rate"] = losses[0]

    assert struct.pack("<d", losses[0]) in federation(leak).found
