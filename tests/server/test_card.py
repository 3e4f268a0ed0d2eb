from __future__ import annotations

import hashlib
import json
import re

import numpy as np
import pytest

from common.errors import RunError
from common.spec import RunSpec
from server.card import write_card


def test_the_json_card_holds_what_a_program_needs(build_run):
    directory = build_run()
    card = json.loads(write_card(directory).json.read_text())
    weights = (directory / "model.safetensors").read_bytes()
    spec = RunSpec.from_json((directory / "spec.json").read_text())
    assert card["model"]["safetensors_sha256"] == hashlib.sha256(weights).hexdigest()
    assert card["spec_sha256"] == spec.digest
    assert card["run_id"] == spec.run_id
    assert card["data"]["sites"]["Westmoor"] == {"declared_size": 250, "unit": "patient"}
    assert card["data"]["declared_total"] == 2050
    assert card["training"]["participation"]["Westmoor"] == {"ok": 12, "late": 2}
    assert card["privacy"]["sites"]["Southbank"]["sampling_rate"] == pytest.approx(64 / 600)
    assert card["privacy"]["all_sites_epsilon"] == 8.8112
    auroc = card["evaluation"]["test"]["metrics"]["auroc"]
    assert auroc["low"] < auroc["value"] < auroc["high"]
    assert card["versions"]["torch"] == "2.13.0"


def test_the_markdown_card_says_what_a_person_needs(build_run):
    text = write_card(build_run()).markdown.read_text()
    for title in ("Intended use", "Data", "Training", "Privacy", "Performance", "Limitations"):
        assert f"\n## {title}\n" in text
    assert "Not for clinical use as it is" in text
    assert "| Westmoor | 250 | patients |" in text
    assert re.search(r"\| AUROC \| 0\.\d{3} \(0\.\d{3} to [01]\.\d{3}\) \|", text)
    assert "the real numbers are private" in text


@pytest.mark.parametrize(
    ("protection", "words"),
    [("seeded", "Accounted, not protected"), ("none", "No differential privacy")],
)
def test_a_run_that_does_not_protect_says_so_in_both_forms(build_run, protection, words):
    files = write_card(build_run(protection=protection, rounds=2))
    card = json.loads(files.json.read_text())
    assert words in files.markdown.read_text()
    assert words in card["privacy"]["warning"]
    assert card["privacy"]["protected"] is False


@pytest.mark.parametrize("protection", ["protected", "seeded", "none"])
def test_both_forms_say_of_each_site_whether_its_replies_were_paced(build_run, protection):
    files = write_card(build_run(protection=protection, rounds=2, paced=("Southbank",)))
    privacy = json.loads(files.json.read_text())["privacy"]
    assert {name for name, site in privacy["sites"].items() if site["paced"]} == {"Southbank"}
    held, free = privacy["timing"]
    assert "Southbank were paced" in held
    assert "St Brigid and Westmoor were not paced: how long training took says" in free
    text = files.markdown.read_text()
    assert re.search(r"^\| Southbank \|.* paced \|$", text, re.MULTILINE)
    assert re.search(r"^\| Westmoor \|.* unpaced \|$", text, re.MULTILINE)
    assert f"- {free}" in text


def test_the_card_says_for_which_images_the_model_is_meant(build_run):
    directory = build_run(rounds=2)
    said = "The operator has not declared for which images it is meant."
    assert json.loads(write_card(directory).json.read_text())["intended_inputs"] == said
    use = {"modalities": ["CR", "DX"], "body_parts": ["CHEST"], "smallest_side": 512}
    spec = json.loads((directory / "spec.json").read_text()) | {"use": use}
    (directory / "spec.json").write_text(RunSpec.from_json(json.dumps(spec)).canonical_json)
    text = write_card(directory).markdown.read_text()
    assert "modality CR and DX; body part CHEST; no side below 512 pixels." in text


def test_a_run_that_protects_has_no_warning(build_run):
    files = write_card(build_run(protection="protected", rounds=2))
    card = json.loads(files.json.read_text())
    assert card["privacy"]["warning"] is None
    assert card["privacy"]["protected"] is True
    assert "ccounted, not protected" not in files.markdown.read_text()


def test_without_privacy_epsilon_is_null_and_the_words_say_none(build_run):
    files = write_card(build_run(protection="none", rounds=2))
    card = json.loads(files.json.read_text())
    assert card["privacy"]["sites"]["Westmoor"]["epsilon"] is None
    assert card["privacy"]["claim"] == []
    assert "| Westmoor | no privacy | – |" in files.markdown.read_text()


def test_text_from_the_run_cannot_become_markup(build_run, edit):
    directory = build_run(rounds=2)
    sites = json.loads((directory / "privacy.json").read_text())["sites"]
    name = "a|b\n# Big <script>x</script> [go](https://evil.example) `code` ![i](//x)"
    edit(directory / "privacy.json", sites={name: sites["Westmoor"]})
    text = write_card(directory).markdown.read_text()
    row = next(line for line in text.splitlines() if line.startswith("| a"))
    assert row.startswith(r"| a\|b # Big &lt;script&gt;x&lt;/script&gt; \[go\](https")
    assert "https://" not in text
    assert "\n# Big" not in text
    assert len(re.findall(r"(?<!\\)\|", row)) == 4


def test_a_run_without_evaluation_and_without_a_model_file(build_run):
    directory = build_run(rounds=2)
    (directory / "model.safetensors").unlink()
    np.savez(directory / "evaluation.npz", allow_pickle=False)
    files = write_card(directory)
    card = json.loads(files.json.read_text())
    assert card["evaluation"] == {"validation": None, "test": None}
    assert card["model"]["safetensors_sha256"] is None
    text = files.markdown.read_text()
    assert "no figures of a central evaluation cohort" in text
    assert "no model.safetensors" in text


def test_a_missing_file_is_named_and_nothing_is_written(build_run):
    directory = build_run(rounds=2)
    (directory / "privacy.json").unlink()
    with pytest.raises(RunError, match=r"privacy\.json: cannot be read"):
        write_card(directory)
    assert not list(directory.glob("model_card*"))
