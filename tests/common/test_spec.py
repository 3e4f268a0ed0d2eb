"""The run's description: what a person may write, how a mistake is named, what stays the same."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from common.errors import SpecError
from common.spec import DpSgd, FedOpt, RunSpec, Sgd, parse_run_text, read_run_file
from common.task_sections import Detection, Segmentation

RUN = """\
name = "chest"
rounds = 4

[task]
classes = ["normal", "finding"]

[model]
name = "small-cnn"

[input]
height = 28
width = 28

[optimizer]
name = "sgd"
learning_rate = 0.1

[local]
batch_size = 4

[privacy]
mechanism = "dp-sgd"
noise_multiplier = 1.0
delta = 1e-4
"""

EVERYTHING = """\
schema_version = 1
name = "everything"
run_id = "everything-1"
operator = "trial-office"
seed = 7
rounds = 20

[task]
name = "classification"
kind = "multiclass"
classes = ["clear", "nodule", "effusion"]

[model]
name = "small-cnn"
dropout = 0.1
width = 16

[input]
channels = 3
height = 64
width = 48
fit = "crop"
window = "percentile"
frames = "middle"
normalize = "literal"
mean = [0.4, 0.5, 0.6]
std = [0.2]

[augmentation]
rotate = 10
shift = 0.1
shear = 5
zoom = 0.1
flip_horizontal = true
flip_vertical = true
multiplicity = 4

[loss]
name = "focal"
class_weights = [1, 2.5, 3]
focal_gamma = 1.5
label_smoothing = 0.05

[optimizer]
name = "adamw"
learning_rate = 1e-3
beta1 = 0.8
beta2 = 0.9
weight_decay = 0.01

[schedule]
name = "cyclical"
final = 0.1
cycles = 3
warmup_rounds = 2

[local]
steps = 5
batch_size = 32
precision = "bfloat16"

[privacy]
mechanism = "dp-sgd"
unit = "image"
clip_norm = 0.5
target_epsilon = 3
delta = 1e-5

[federation]
quorum = 5
deadline_seconds = 90

[aggregation]
strategy = "krum"
byzantine = 1
keep = 2
weighting = "uniform"
average_decay = 0.9
max_update_norm = 10

[evaluation]
every = 2
validation_fraction = 0.4
metric = "brier"
threshold = 0.4
patience = 3
min_delta = 0.001
bootstrap = 100
federated = { noise_multiplier = 2.0, bins = 10 }

[simulation]
evaluation = "somewhere"
"""


def read(text: str) -> RunSpec:
    return parse_run_text(text, source="run.toml").spec


def changed(old: str, new: str) -> str:
    assert RUN.count(old) == 1
    return RUN.replace(old, new)


def without(table: str) -> str:
    tables = RUN.split("\n\n")
    return "\n\n".join(part for part in tables if not part.startswith(f"[{table}]"))


# --- What may be written ----------------------------------------------------------------------


def test_every_key_of_a_full_file_arrives():
    spec = read(EVERYTHING)
    assert spec.task.outputs == 3
    assert spec.input.shape == (3, 64, 48)
    assert spec.loss.class_weights == (1.0, 2.5, 3.0)
    assert isinstance(spec.privacy, DpSgd)
    assert spec.privacy.target_epsilon == 3
    assert spec.total_steps == 100
    left_at_default = {
        key
        for table, values in json.loads(spec.canonical_json).items()
        if isinstance(values, dict)
        for key in values
        if f"\n{key} =" not in EVERYTHING
    }
    assert left_at_default == {"noise_multiplier"}


def test_the_simulation_table_stands_beside_the_spec_and_not_in_it():
    with_table, without_table = (
        parse_run_text(EVERYTHING, source="a"),
        read(EVERYTHING.partition("[simulation]")[0]),
    )
    assert with_table.simulation == {"evaluation": "somewhere"}
    assert with_table.spec == without_table
    assert "somewhere" not in with_table.spec.canonical_json


def test_a_file_is_read_from_disk(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text(RUN, encoding="utf-8")
    assert read_run_file(path).spec == read(RUN)
    assert read_run_file(path).simulation == {}


@pytest.mark.parametrize("table", ["sgd", "adam", "adamw"])
def test_each_optimiser_is_a_choice(table: str):
    assert read(changed('name = "sgd"', f'name = "{table}"')).optimizer.name == table


def test_no_privacy_must_be_said():
    spec = read(without("privacy") + '\n[privacy]\nmechanism = "none"\n')
    assert spec.privacy.mechanism == "none"


@pytest.mark.parametrize("clip_norm", ["1e-6", "1e6"])
def test_a_clip_norm_may_be_as_far_out_as_its_bounds(clip_norm: str):
    text = changed("noise_multiplier = 1.0", f"noise_multiplier = 1.0\nclip_norm = {clip_norm}")
    assert read(text).privacy.clip_norm == float(clip_norm)  # type: ignore[union-attr]


def test_a_spec_cannot_be_changed():
    spec = read(RUN)
    with pytest.raises(ValidationError):
        spec.rounds = 5  # type: ignore[misc]
    with pytest.raises(ValidationError):
        spec.privacy.unit = "image"  # type: ignore[misc]


# --- Tasks ------------------------------------------------------------------------------------

TASKS_OF_THE_HOUSE = {
    "segmentation": ('name = "segmentation"', "dice", "dice", "mask"),
    "detection": ('name = "detection"', "heatmap", "map50", "boxes"),
    "reconstruction": ('name = "reconstruction"', "l1", "psnr", "none"),
    "generation": ('name = "generation"', "adversarial", "tstr-auroc", "binary"),
}


def run_of(name: str, **other: str) -> str:
    """The small run with another task; `loss`, `metric` or a text for ``[task]`` may differ."""
    head, loss, metric, _ = TASKS_OF_THE_HOUSE[name]
    text = changed('classes = ["normal", "finding"]', 'classes = ["normal", "finding"]\n' + head)
    text = text.replace('kind = "binary"\n', "")
    text += f'\n[loss]\nname = "{other.get("loss", loss)}"\n'
    return text + f'[evaluation]\nmetric = "{other.get("metric", metric)}"\n'


@pytest.mark.parametrize("name", TASKS_OF_THE_HOUSE)
def test_each_task_reads_its_own_section_and_travels(name: str):
    spec = read(run_of(name))
    assert (spec.task.name, spec.task.kind) == (name, TASKS_OF_THE_HOUSE[name][3])
    again = RunSpec.from_json(spec.canonical_json)
    assert (again, again.digest, type(again.task)) == (spec, spec.digest, type(spec.task))
    assert again.identified("r1").task == spec.task
    assert hash(again) == hash(spec)


@pytest.mark.parametrize("name", TASKS_OF_THE_HOUSE)
def test_a_task_has_its_own_losses_and_metrics_and_names_them(name: str):
    loss = "heatmap" if name != "detection" else "dice"
    with pytest.raises(SpecError, match=f"run.toml:[0-9]+: loss.name = '{loss}': expected one of"):
        read(run_of(name, loss=loss))
    with pytest.raises(SpecError, match=r"run.toml:\d+: evaluation.metric = 'f1': expected one"):
        read(run_of(name, metric="f1"))


def test_only_classification_has_noised_counts_and_only_its_useful_metrics_choose():
    counted = "federated = { noise_multiplier = 1.0 }\n"
    assert read(RUN + "\n[evaluation]\n" + counted).evaluation.federated
    with pytest.raises(
        SpecError, match=r"evaluation\.federated: segmentation has no noised counts"
    ):
        read(run_of("segmentation") + counted)
    with pytest.raises(SpecError, match="'sensitivity': expected one of auroc, auprc, accuracy"):
        read(RUN + '\n[evaluation]\nmetric = "sensitivity"\n')


def test_a_key_of_one_task_is_none_of_another():
    assert read(run_of("detection").replace("[model]", "most_boxes = 9\n[model]"))
    with pytest.raises(SpecError, match=r"run.toml:\d+: task.most_boxes = 9: unknown key"):
        read(run_of("segmentation").replace("[model]", "most_boxes = 9\n[model]"))
    with pytest.raises(SpecError, match=r"task\.most_bxes = 9: unknown key; did you mean 'most_b"):
        read(run_of("detection").replace("[model]", "most_bxes = 9\n[model]"))


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"name": "segmentatio", "classes": ["a", "b"]}, "'segmentatio': expected one of class"),
        ({"name": ["classification"], "classes": ["a", "b"]}, "task.name = "),
        ({"name": "classification", "classes": ["a", "b"], "kind": "mask"}, "task.kind = 'mask'"),
        ({"name": "common.spec:RunSpec"}, "'common.spec:RunSpec': expected one of classification"),
        ({"name": "segmentation", "classes": ["a"]}, "task.classes = "),
        (["name"], "task = "),
        ("segmentation", "task = "),
        (None, "task = None"),
    ],
)
def test_a_task_that_is_none_is_told(task: Any, said: str):
    document = json.loads(read(RUN).canonical_json) | {"task": task}
    with pytest.raises(SpecError) as caught:
        RunSpec.from_json(json.dumps(document))
    assert said in str(caught.value)


@pytest.mark.parametrize("name", [None, *TASKS_OF_THE_HOUSE])
def test_a_spec_goes_through_a_pipe(name: str | None):
    spec = read(run_of(name) if name else RUN)
    again = pickle.loads(pickle.dumps(spec))  # noqa: S301 - our own bytes
    assert (again, type(again), again.digest) == (spec, type(spec), spec.digest)
    assert copy.deepcopy(spec) == spec


def test_the_section_of_a_task_is_given_as_what_it_is():
    spec = read(run_of("detection"))
    assert spec.task_as(Detection).most_boxes == 64
    with pytest.raises(SpecError, match="'detection': expected a run of Segmentation"):
        spec.task_as(Segmentation)


def test_an_option_that_came_later_leaves_the_digest_of_those_who_do_not_use_it():
    plain, shown = read(RUN), read(RUN + "\n[evaluation]\ngallery = 8\n")
    assert read(RUN + "\n[evaluation]\ngallery = 0\n").digest == plain.digest
    assert "gallery" not in plain.canonical_json
    assert shown.digest != plain.digest
    assert RunSpec.from_json(shown.canonical_json).evaluation.gallery == 8


def test_what_a_model_is_meant_for_is_declared_and_else_leaves_the_digest():
    plain = read(RUN)
    assert read(RUN + "\n[use]\nmodalities = []\n").digest == plain.digest
    assert "use" not in json.loads(plain.canonical_json)
    declared = read(RUN + '\n[use]\nmodalities = ["CR"]\nbody_parts = ["CHEST"]\n')
    assert declared.digest != plain.digest
    assert RunSpec.from_json(declared.canonical_json).use.body_parts == ("CHEST",)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('modalities = ["cr"]', "use.modalities.0 = 'cr'"),
        ('body_parts = ["' + "A" * 17 + '"]', "use.body_parts.0"),
        ("smallest_side = 0", "use.smallest_side = 0"),
        ("smallest_side = 9\nlargest_side = 8", "smallest_side = 9 is above largest_side = 8"),
        ("modality = 1", "unknown key"),
    ],
)
def test_a_declaration_of_use_that_cannot_be_is_refused(line: str, said: str):
    with pytest.raises(SpecError, match=re.escape(said)):
        read(f"{RUN}\n[use]\n{line}\n")


def test_specs_and_policies_are_read_without_torch(tmp_path: Path):
    """A ledger, a policy, a worker of the intake: torch would cost each seconds and 200 MB."""
    texts = {"classification": RUN} | {name: run_of(name) for name in TASKS_OF_THE_HOUSE}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    program = """
import sys
from pathlib import Path
import client.policy, client.ledger, client.intake.labels, common.cohort
from common.spec import read_run_file
for path in sys.argv[1:]:
    task = read_run_file(Path(path)).spec.task
    task.problem_with("binary", ("a", "b"))
    print(task.name, [m for m in ("torch", "monai", "torchmetrics", "opacus") if m in sys.modules])
"""
    told = subprocess.run(
        [sys.executable, "-c", program, *(str(tmp_path / name) for name in texts)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.splitlines() == [f"{name} []" for name in texts]


@pytest.mark.parametrize(
    ("name", "kind", "classes", "serves"),
    [
        ("segmentation", "mask", ("normal", "finding"), True),
        ("segmentation", "mask", ("finding", "normal"), False),
        ("segmentation", "binary", ("normal", "finding"), False),
        ("detection", "boxes", ("normal", "finding"), True),
        ("generation", "binary", ("normal", "finding"), True),
        ("generation", "multiclass", ("normal", "finding"), False),
        ("reconstruction", "mask", ("normal", "finding"), True),
        ("reconstruction", "none", (), True),
    ],
)
def test_which_cohorts_serve_a_task(name: str, kind: str, classes: Any, serves: bool):
    assert (read(run_of(name)).task.problem_with(kind, classes) == "") == serves


# --- What a mistake is called -----------------------------------------------------------------

WRONG = {
    "an unknown key, with the nearest known one": (
        changed("batch_size = 4", "batch_size = 4\nstepz = 3"),
        ["run.toml:20: local.stepz = 3", "unknown key", "did you mean 'steps'?"],
    ),
    "an unknown key like no other": (
        changed("batch_size = 4", "batch_size = 4\nqqq = 3"),
        ["run.toml:20: local.qqq = 3", "unknown key; expected one of", "batch_size", "precision"],
    ),
    "an unknown table": (
        RUN + '\n[agregation]\nstrategy = "fedavg"\n',
        ["run.toml:26: agregation", "unknown key", "did you mean 'aggregation'?"],
    ),
    "a text for a number": (
        changed("rounds = 4", 'rounds = "4"'),
        ["run.toml:2: rounds = '4': ", "valid integer"],
    ),
    "a fraction for a count": (
        changed("rounds = 4", "rounds = 4.0"),
        ["run.toml:2: rounds = 4.0: ", "valid integer"],
    ),
    "a truth value for a count": (
        changed("rounds = 4", "rounds = true"),
        ["run.toml:2: rounds = True: ", "valid integer"],
    ),
    "not a number": (
        changed("learning_rate = 0.1", "learning_rate = nan"),
        ["run.toml:16: optimizer.learning_rate = nan: ", "finite"],
    ),
    "infinity": (
        changed("learning_rate = 0.1", "learning_rate = inf"),
        ["run.toml:16: optimizer.learning_rate = inf: ", "finite"],
    ),
    "a clip norm where float32 loses the noise": (
        changed("noise_multiplier = 1.0", "noise_multiplier = 1.0\nclip_norm = 0.72e-45"),
        ["run.toml:24: privacy.clip_norm = 7.2e-46: ", "greater than or equal to 0.000001"],
    ),
    "a clip norm just too small": (
        changed("noise_multiplier = 1.0", "noise_multiplier = 1.0\nclip_norm = 9.9e-7"),
        ["run.toml:24: privacy.clip_norm = 9.9e-07: ", "greater than or equal to 0.000001"],
    ),
    "a clip norm just too large": (
        changed("noise_multiplier = 1.0", "noise_multiplier = 1.0\nclip_norm = 1.1e6"),
        ["run.toml:24: privacy.clip_norm = 1100000.0: ", "less than or equal to 1000000"],
    ),
    "a learning rate that amplifies rounding": (
        changed("learning_rate = 0.1", "learning_rate = 3e38"),
        ["run.toml:16: optimizer.learning_rate = 3e+38: ", "less than or equal to 1000000"],
    ),
    "such a rate for adam": (
        changed('name = "sgd"', 'name = "adam"').replace("rate = 0.1", "rate = 1.1e6"),
        ["run.toml:16: optimizer.learning_rate = 1100000.0: ", "less than or equal to 1000000"],
    ),
    "such a rate at the server": (
        RUN + '\n[aggregation]\nstrategy = "fedavgm"\nserver_learning_rate = 1.1e6\n',
        ["aggregation.server_learning_rate = 1100000.0: ", "less than or equal to 1000000"],
    ),
    "such a rate of an adaptive server": (
        RUN + '\n[aggregation]\nstrategy = "fedadam"\nserver_learning_rate = 1.1e6\n',
        ["aggregation.server_learning_rate = 1100000.0: ", "less than or equal to 1000000"],
    ),
    "a date": (
        changed("learning_rate = 0.1", "learning_rate = 2026-01-01"),
        ["run.toml:16: optimizer.learning_rate = '2026-01-01': ", "valid number"],
    ),
    "a missing table": (without("model"), ["run.toml: model is missing"]),
    "a missing key, with its table's line": (
        changed("batch_size = 4", "steps = 4"),
        ["run.toml:18: local.batch_size is missing", "write it in [local]"],
    ),
    "no word on privacy": (
        without("privacy"),
        ["run.toml: the table [privacy] is missing", 'mechanism = "none" in so many words'],
    ),
    "both noise and a target": (
        RUN + "target_epsilon = 3.0\n",
        ["run.toml:21: privacy: write either noise_multiplier or target_epsilon"],
    ),
    "neither noise nor a target": (
        changed("noise_multiplier = 1.0\n", ""),
        ["run.toml:21: privacy: write either noise_multiplier or target_epsilon"],
    ),
    "an unknown mechanism": (
        changed('"dp-sgd"', '"laplace"'),
        ["run.toml:22: privacy.mechanism = 'laplace': expected one of 'dp-sgd', 'none'"],
    ),
    "a key of another mechanism": (
        changed('"dp-sgd"', '"none"'),
        ["run.toml:23: privacy.noise_multiplier = 1.0: unknown key", "no such key"],
    ),
    "an unknown optimiser": (
        changed('name = "sgd"', 'name = "rmsprop"'),
        ["run.toml:15: optimizer.name = 'rmsprop': expected one of 'sgd', 'adam', 'adamw'"],
    ),
    "an unknown strategy": (
        RUN + '\n[aggregation]\nstrategy = "fedsgd"\n',
        [
            "run.toml:27: aggregation.strategy = 'fedsgd'",
            "fedavg, fedprox, fedavgm, fedadam, fedyogi, fedadagrad",
            "holding all updates at once: trimmed-mean, median, krum",
        ],
    ),
    "krum with too small a quorum": (
        RUN + '\n[aggregation]\nstrategy = "krum"\n',
        [
            "run.toml:27: aggregation.strategy = 'krum' holds all updates at once",
            "2 x byzantine + 3 = 5",
            "federation.quorum is 1",
        ],
    ),
    "krum that keeps too many": (
        RUN + '\n[aggregation]\nstrategy = "krum"\nkeep = 3\n[federation]\nquorum = 5\n',
        ["run.toml:27: aggregation.strategy = 'krum'", "keep <= quorum", "keep is 3"],
    ),
    "a median of two": (
        RUN + '\n[aggregation]\nstrategy = "median"\n[federation]\nquorum = 2\n',
        [
            "run.toml:27: aggregation.strategy = 'median' holds all updates at once",
            "from 3 on; federation.quorum is 2",
        ],
    ),
    "a trimmed mean of two": (
        RUN + '\n[aggregation]\nstrategy = "trimmed-mean"\n[federation]\nquorum = 2\n',
        ["run.toml:27: aggregation.strategy = 'trimmed-mean' holds all updates at once"],
    ),
    "a trimmed mean that drops nobody": (
        RUN + '\n[aggregation]\nstrategy = "trimmed-mean"\n[federation]\nquorum = 4\n',
        ["run.toml:26: aggregation.trim = 0.2 drops nobody from a round of 4", "1 / federation"],
    ),
    "weights for other classes": (
        RUN + "\n[loss]\nclass_weights = [1.0]\n",
        ["run.toml:27: loss.class_weights has 1 numbers for 2 classes", "one literal for each"],
    ),
    "a warm-up as long as the run": (
        RUN + "\n[schedule]\nwarmup_rounds = 4\n",
        ["run.toml:27: schedule.warmup_rounds = 4 must be below rounds = 4"],
    ),
    "a class twice": (
        changed('"normal", "finding"', '"normal", "normal"'),
        ["run.toml:4: task", "different from each other"],
    ),
    "a class that would steer a terminal": (
        changed('"normal", "finding"', r'"normal", "\u001b[2J"'),
        ["run.toml:4: task", "names that can be printed"],
    ),
    "a class without a name": (
        changed('"normal", "finding"', '"normal", " "'),
        ["run.toml:4: task", "names that can be printed"],
    ),
    "three classes for two": (
        changed('"normal", "finding"', '"a", "b", "c"'),
        ["run.toml:4: task", "exactly two classes"],
    ),
    "means for other channels": (
        changed("height = 28", "height = 28\nmean = [0.5, 0.5]"),
        ["run.toml:10: input", "mean needs one number, or one for each of 1"],
    ),
    "a name that is none": (
        changed('"chest"', '"my chest"'),
        ["run.toml:1: name = 'my chest'", "pattern"],
    ),
    "another version": (
        "schema_version = 2\n" + RUN,
        ["run.toml:1: schema_version = 2", "should be 1"],
    ),
    "a tag's name as a key": (
        changed('name = "small-cnn"', 'name = "small-cnn"\nadam = 1'),
        ["run.toml:9: model.adam = 1: unknown key"],
    ),
    "a number for a table": (
        without("privacy").replace("rounds = 4", "rounds = 4\nprivacy = 3"),
        ["run.toml:3: privacy = 3"],
    ),
    "a simulation that is no table": (
        "simulation = 3\n" + RUN,
        ["run.toml: simulation = 3: expected a table [simulation]"],
    ),
    "no TOML": ("name = \nrounds = 4", ["run.toml: this is not TOML", "line 1"]),
    "a table twice": (RUN + "[privacy]\n", ["run.toml: this is not TOML", "twice", "line 25"]),
    "a number beyond reading": (
        changed("rounds = 4", "rounds = 1" + "0" * 5000),
        ["run.toml: this is not TOML"],
    ),
    "two mistakes, both named": (
        changed("rounds = 4", 'rounds = "x"').replace("height = 28", "height = 2"),
        ["run.toml:2: rounds = 'x'", "run.toml:11: input.height = 2"],
    ),
}


@pytest.mark.parametrize(("text", "parts"), WRONG.values(), ids=WRONG)
def test_a_mistake_is_named_with_file_line_key_value_and_what_was_expected(
    text: str, parts: list[str]
):
    with pytest.raises(SpecError) as caught:
        read(text)
    for part in parts:
        assert part in str(caught.value)


def test_the_file_without_a_mistake_is_read():
    assert read(RUN).rounds == 4  # or each of WRONG might be wrong for another reason


def test_a_key_of_a_site_of_the_simulation_is_not_taken_for_the_one_that_is_missing():
    text = without("model") + '\n[model]\n[[simulation.site]]\nname = "north"\n'
    line = text.splitlines().index("[model]") + 1
    with pytest.raises(SpecError, match=rf"run\.toml:{line}: model\.name is missing"):
        read(text)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"name": "x" * 100_000}),
        json.dumps({"x" * 100_000: 1}),
        json.dumps({f"key{number}": number for number in range(10_000)}),
        '{"rounds": 1' + "0" * 4_000 + "}",
        '{"rounds": 1' + "0" * 50_000 + "}",
    ],
    ids=["a long value", "a long key", "many keys", "a long number", "a number beyond reading"],
)
def test_what_has_no_end_is_not_repeated_without_end(text: str):
    with pytest.raises(SpecError) as caught:
        RunSpec.from_json(text)
    assert len(str(caught.value)) < 10_000


def test_a_key_cannot_pass_for_another_line_of_a_log():
    with pytest.raises(SpecError) as caught:
        RunSpec.from_json(json.dumps({"x\nWARNING all is well": 1}))
    assert "\nWARNING" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"], ids=["missing", "no text"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None):
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SpecError, match=r"run\.toml: cannot be read .* expected a run's TOML"):
        read_run_file(path)


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '"x"', "[" * 10_000, '{"rounds": 1e400}'])
def test_json_that_is_no_run_is_refused_by_its_source(text: str):
    with pytest.raises(SpecError, match=r"^the message: "):
        RunSpec.from_json(text, source="the message")


# --- What stays the same ----------------------------------------------------------------------


def test_the_digest_is_the_same_on_every_machine_and_in_every_version():
    # A change of this number makes all checkpoints, ledgers and cohorts of old runs foreign.
    assert read(EVERYTHING).digest == PINNED_DIGEST
    assert read(EVERYTHING).input.preprocessing_digest == PINNED_PREPROCESSING


PINNED_DIGEST = "8cf94e2e3bc3d7911c43141b0be057320367d7e7372b4881edb0bd4b9445f261"
PINNED_PREPROCESSING = "6876cef3e6466bd4adc1fcc03f0c3f7c85c4fe8084e1c2650c824aca0c0d30b0"


def test_the_digest_does_not_depend_on_the_order_of_keys():
    value = json.loads(read(EVERYTHING).canonical_json)

    def reversed_keys(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: reversed_keys(node[key]) for key in reversed(node)}
        return node

    text = json.dumps(reversed_keys(value), indent=3)
    assert list(json.loads(text)) != list(value)
    assert RunSpec.from_json(text).digest == read(EVERYTHING).digest


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("noise_multiplier = 1.0", "noise_multiplier = 1"),
        ("learning_rate = 0.1", "learning_rate = 1e-1"),
        ("delta = 1e-4", "delta = 0.0001"),
        ("rounds = 4", "rounds = 4  # a comment"),
        ('mechanism = "dp-sgd"', "mechanism = 'dp-sgd'"),
    ],
)
def test_the_digest_does_not_depend_on_spelling(one: str, other: str):
    assert read(changed(one, other)).digest == read(RUN).digest


def test_a_default_written_out_is_the_same_run():
    assert read(changed("batch_size = 4", "batch_size = 4\nsteps = 1")) == read(RUN)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("delta = 1e-4", "delta = 1.0000001e-4"),
        ("rounds = 4", "rounds = 4\nseed = 2"),
        ("rounds = 4", 'rounds = 4\nrun_id = "a"'),
        ('"normal", "finding"', '"finding", "normal"'),
    ],
)
def test_another_run_has_another_digest(one: str, other: str):
    assert read(changed(one, other)).digest != read(RUN).digest


def test_canonical_json_is_ascii_sorted_and_without_spaces():
    text = read(changed('"normal"', '"Infiltração"')).canonical_json
    assert text.isascii()
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))


def test_json_gives_the_same_spec_back():
    for text in (RUN, EVERYTHING):
        spec = read(text)
        assert RunSpec.from_json(spec.canonical_json) == spec


def test_a_launch_is_the_same_run_under_an_identity_of_its_own():
    spec, launched = read(RUN), read(RUN).identified("chest-1")
    assert launched.run_id == "chest-1"
    assert launched.digest != spec.digest
    assert launched.identified("") == spec


def test_preprocessing_covers_what_intake_does_and_nothing_else():
    plain = read(RUN).input.preprocessing_digest
    assert read(changed("width = 28", "width = 32")).input.preprocessing_digest != plain
    later = read(changed("width = 28", "width = 28\nmean = [0.1]")).input
    assert later.preprocessing_digest == plain


# --- The learning rate ------------------------------------------------------------------------


def scheduled(schedule: str, rounds: int = 5, steps: int = 1) -> list[float]:
    text = changed("rounds = 4", f"rounds = {rounds}").replace(
        "batch_size = 4", f"batch_size = 4\nsteps = {steps}"
    )
    spec = read(text.replace("learning_rate = 0.1", "learning_rate = 2") + schedule)
    return [spec.learning_rate(r, s) for r in range(1, rounds + 1) for s in range(steps)]


def test_constant():
    assert scheduled("") == [2.0] * 5


def test_exponential_falls_by_equal_factors_to_its_end():
    rates = scheduled('[schedule]\nname = "exponential"\nfinal = 0.0625\n')
    assert rates == pytest.approx([2, 1, 0.5, 0.25, 0.125])


def test_cosine_halves_the_way_at_its_middle():
    rates = scheduled('[schedule]\nname = "cosine"\nfinal = 0.1\n')
    quarter = 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2
    assert rates == pytest.approx([2, 2 * quarter, 1.1, 2 * (1.1 - quarter), 0.2])


def test_cyclical_goes_up_and_down_in_each_cycle():
    rates = scheduled('[schedule]\nname = "cyclical"\nfinal = 0.5\ncycles = 2\n', rounds=9)
    assert rates == pytest.approx([1, 1.5, 2, 1.5, 1, 1.5, 2, 1.5, 1])


def test_a_warm_up_rises_to_the_full_rate():
    rates = scheduled('[schedule]\nname = "constant"\nwarmup_rounds = 3\n')
    assert rates == pytest.approx([0.5, 1, 1.5, 2, 2])


def test_a_schedule_begins_after_its_warm_up():
    rates = scheduled('[schedule]\nname = "exponential"\nfinal = 0.25\nwarmup_rounds = 2\n')
    assert rates == pytest.approx([2 / 3, 4 / 3, 2, 1, 0.5])


def test_local_steps_go_on_within_a_round():
    by_rounds = scheduled('[schedule]\nname = "cosine"\n', rounds=6, steps=1)
    by_steps = scheduled('[schedule]\nname = "cosine"\n', rounds=2, steps=3)
    assert by_rounds == by_steps


def test_a_run_of_one_step_takes_the_full_rate():
    for name in ("constant", "exponential", "cosine"):
        assert scheduled(f'[schedule]\nname = "{name}"\n', rounds=1) == [2.0]


# --- Properties -------------------------------------------------------------------------------

rates = st.floats(1e-6, 1e3)
fractions = st.floats(0, 0.99)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
names = texts.filter(lambda text: text.isprintable() and bool(text.strip()))


@st.composite
def specs(draw: st.DrawFn) -> RunSpec:
    """Any run: not sensible, but valid."""
    rounds = draw(st.integers(1, 500))
    classes = draw(st.lists(names, min_size=2, max_size=5, unique=True))
    privacy = draw(
        st.sampled_from(
            [
                {"mechanism": "none"},
                {"mechanism": "dp-sgd", "noise_multiplier": draw(rates), "delta": 1e-5},
                {"mechanism": "dp-sgd", "target_epsilon": draw(rates), "delta": 0.5},
            ]
        )
    )
    strategy = draw(st.sampled_from(["fedavg", "fedavgm", "fedadam", "median"]))
    value = {
        "name": "run",
        "seed": draw(st.integers(0, 2**63 - 1)),
        "rounds": rounds,
        "task": {"kind": "multiclass", "classes": classes},
        "model": {"name": draw(texts), "dropout": draw(fractions)},
        "input": {"height": draw(st.integers(8, 4096)), "width": 8, "mean": [draw(fractions)]},
        "optimizer": {
            "name": draw(st.sampled_from(["sgd", "adam", "adamw"])),
            "learning_rate": draw(rates),
        },
        "schedule": {
            "name": draw(st.sampled_from(["constant", "exponential", "cosine", "cyclical"])),
            "final": draw(st.floats(1e-6, 1)),
            "cycles": draw(st.integers(1, 7)),
            "warmup_rounds": draw(st.integers(0, rounds - 1)),
        },
        "local": {"batch_size": draw(st.integers(1, 2**70)), "steps": draw(st.integers(1, 9))},
        "privacy": privacy,
        "federation": {"quorum": 3, "deadline_seconds": draw(rates)},
        "aggregation": {"strategy": strategy, "average_decay": draw(fractions)},
    }
    return RunSpec.from_json(json.dumps(value))


@settings(deadline=None, max_examples=80)
@given(specs())
def test_canonical_json_comes_back_as_the_same_run(spec: RunSpec):
    again = RunSpec.from_json(spec.canonical_json)
    assert again == spec
    assert again.canonical_json == spec.canonical_json
    assert again.digest == spec.digest


@settings(deadline=None, max_examples=80)
@given(specs(), st.data())
def test_a_rate_is_above_zero_and_never_above_the_written_one(spec: RunSpec, data: st.DataObject):
    number = data.draw(st.integers(1, spec.rounds))
    step = data.draw(st.integers(0, spec.local.steps - 1))
    rate = spec.learning_rate(number, step)
    assert 0 < rate <= spec.optimizer.learning_rate * (1 + 1e-12)


def test_these_properties_are_asked_of_more_than_one_kind():
    assert isinstance(read(RUN).optimizer, Sgd)
    adaptive = read(RUN + '\n[aggregation]\nstrategy = "fedyogi"\n').aggregation
    assert isinstance(adaptive, FedOpt)


@settings(deadline=None, max_examples=100)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | texts,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from(sorted(RunSpec.model_fields)),
)
def test_whatever_stands_at_a_key_is_a_run_or_a_spec_error(value: Any, key: str):
    whole = json.loads(read(EVERYTHING).canonical_json) | {key: value}
    with suppress(SpecError):
        RunSpec.from_json(json.dumps(whole))
