from __future__ import annotations

import base64
import itertools
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import RunError
from common.tasks.estimates import Estimate
from server import figures
from server.record import RunRecord
from server.report import render, write_report

HOSTILE = '"><script>alert(1)</script><img src=https://evil.example/x> {{ 7 * 7 }} $\\frac{1}{'
EMPTY_TAGS = {"meta", "img", "br", "path", "source"}


class Page(HTMLParser):
    """What a browser would find: tags in balance, their attributes, the text."""

    def __init__(self, text):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in EMPTY_TAGS:
            self._open.append(tag)

    def handle_endtag(self, tag):
        if tag not in EMPTY_TAGS:
            assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.text += " " + data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def read(directory):
    return Page(write_report(directory).read_text())


def pictures(page):
    head = "data:image/svg+xml;base64,"
    sources = [attributes["src"] for attributes in page.all("img")]
    assert all(source.startswith(head) for source in sources)
    return [base64.b64decode(source[len(head) :]).decode() for source in sources]


# --- What it says -----------------------------------------------------------------------------


def test_the_headline_is_the_final_model_on_the_test_part(build_run):
    directory = build_run()
    page = read(directory)
    auroc = RunRecord.read(directory).final["test"].metrics["auroc"]
    assert f"AUROC · test part {auroc.value:.3f}" in page.text
    assert f"95 % interval {auroc.low:.3f} to {auroc.high:.3f}" in page.text
    assert "model of round 13" in page.text
    assert "Sites 4" in page.text
    assert "Rounds 14" in page.text


def test_auroc_stays_on_top_whatever_chose_the_model(build_run):
    directory = build_run(rounds=2)
    spec = json.loads((directory / "spec.json").read_text())
    spec["evaluation"]["metric"] = "brier"
    (directory / "spec.json").write_text(json.dumps(spec))
    page = read(directory)
    assert "AUROC · test part 0." in page.text
    by_round = [a["alt"].split(" by round")[0] for a in page.all("img") if "by round" in a["alt"]]
    assert by_round == ["Brier score", "AUROC", "AUPRC", "Accuracy"]


def test_it_holds_every_figure_and_every_site(build_run):
    page = read(build_run())
    titles = ("Receiver operating", "Precision-recall", "Reliability", "Who took part")
    alternatives = [attributes["alt"] for attributes in page.all("img")]
    assert all(any(alt.startswith(title) for alt in alternatives) for title in titles)
    by_round = [alt for alt in alternatives if "by round" in alt]
    assert len(by_round) == 4
    assert all("Test: " in alt and "Validation: " in alt for alt in by_round)
    for site in ("Northgate University Hospital", "Southbank", "St Brigid", "Westmoor"):
        assert site in page.text
    assert "4 Westmoor late no answer within 60 s" in page.text
    assert page.text.count("95 % pointwise") == 1  # of all three curves
    assert "fedavgm" in page.text
    assert "torch 2.13.0" in page.text


def test_privacy_names_everything_that_was_spent(build_run):
    text = read(build_run()).text
    assert "Southbank 2.98 10⁻⁴ patient Poisson-subsampled Gaussian 0.1067 1.233 1 26 13" in text
    assert "All sites together 8.82 4 × 10⁻⁴" in text
    assert "adding or removing one patient's whole record" in text
    assert "Replacing one patient by another costs more" in text
    assert "not their timing" in text
    assert "Patients of the central evaluation cohort are not covered" in text


FREE = "were not paced: how long training took says something about the cohort."
HELD = "were paced, each held to a slot: as long as training fits into it, how long it took says"
ALL = ("Northgate University Hospital", "Southbank", "St Brigid", "Westmoor")


@pytest.mark.parametrize("protection", ["protected", "seeded", "none"])
def test_it_says_of_each_site_whether_its_replies_were_paced(build_run, protection):
    text = read(build_run(protection=protection, rounds=2, paced=("Southbank", "Westmoor"))).text
    assert f"Replies of Southbank and Westmoor {HELD} nothing about the cohort." in text
    assert f"Replies of Northgate University Hospital and St Brigid {FREE}" in text
    rows = re.findall(r"(?:(?<= )\d+ ){2}((?:un)?paced)", text)
    assert rows == ([] if protection == "none" else ["unpaced", "paced", "unpaced", "paced"])


@pytest.mark.parametrize(("paced", "said", "unsaid"), [((), FREE, HELD), (ALL, HELD, FREE)])
def test_what_holds_of_every_site_is_said_once(build_run, paced, said, unsaid):
    text = read(build_run(rounds=2, paced=paced)).text
    assert f"Replies of every site {said}" in text
    assert unsaid not in text


def test_a_record_that_does_not_say_that_a_site_was_paced_had_no_slot(build_run, edit):
    directory = build_run(rounds=2, paced=ALL)
    sites = json.loads((directory / "privacy.json").read_text())["sites"]
    del sites["Westmoor"]["paced"]
    edit(directory / "privacy.json", sites=sites)
    assert f"Replies of Westmoor {FREE}" in read(directory).text


def test_epsilon_is_never_printed_smaller_than_it_is(build_run, edit):
    directory = build_run()
    sites = json.loads((directory / "privacy.json").read_text())["sites"]
    sites["Westmoor"]["epsilon"] = 4.0001
    edit(directory / "privacy.json", sites=sites)
    assert "Largest ε of a site 4.01 at δ = 10⁻⁴, unit: patient at Westmoor" in read(directory).text


@pytest.mark.parametrize(
    ("protection", "words"),
    [
        ("seeded", "Accounted, not protected"),
        ("none", "No differential privacy"),
        ("protected", None),
    ],
)
def test_the_banner(build_run, protection, words):
    page = read(build_run(protection=protection))
    shown = [attributes for attributes in page.all("div") if attributes.get("role") == "note"]
    assert len(shown) == (words is not None)
    for other in ("Accounted, not protected", "No differential privacy"):
        assert (other in page.text) == (other == words)
    assert ("here none did" in page.text) == (protection == "seeded")


def test_without_privacy_no_epsilon_is_dressed_up(build_run):
    text = read(build_run(protection="none")).text
    assert "Largest ε of a site no privacy" in text
    privacy = text[text.index("Privacy None: ") : text.index("The run's description SHA")]
    assert "Westmoor" not in privacy  # no line of dashes a site
    assert "What this means" not in text
    assert not re.search(r"\binf|∞|nan\b", text)


def test_a_run_that_says_it_is_not_protected_is_believed(build_run, edit):
    directory = build_run(protection="protected")
    edit(directory / "privacy.json", protected=False)
    assert "Not protected" in read(directory).text


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_several_classes(build_run, kind):
    page = read(build_run(kind=kind, rounds=3))
    assert "By class" in page.text
    roc = next(a["alt"] for a in page.all("img") if a["alt"].startswith("Receiver"))
    assert all(f"{name}: at a false positive rate" in roc for name in ("nodule", "effusion"))


def test_a_test_part_of_one_class_says_so(build_run):
    directory = build_run(rounds=2)
    with np.load(directory / "evaluation.npz", allow_pickle=False) as stored:
        arrays = dict(stored)
    arrays["labels"] = np.zeros_like(arrays["labels"])
    np.savez(directory / "evaluation.npz", allow_pickle=False, **arrays)
    text = read(directory).text
    assert "AUROC · test part – The test part has images of one class only." in text


def test_probabilities_that_are_not_finite_say_so(build_run):
    directory = build_run(rounds=2)
    with np.load(directory / "evaluation.npz", allow_pickle=False) as stored:
        arrays = dict(stored)
    arrays["probabilities"] = np.full_like(arrays["probabilities"], np.nan)
    np.savez(directory / "evaluation.npz", allow_pickle=False, **arrays)
    assert "The model's probabilities are not finite." in read(directory).text


def test_a_run_without_a_test_part_says_so(build_run):
    directory = build_run(rounds=2)
    np.savez(directory / "evaluation.npz", allow_pickle=False)
    lines = [json.loads(x) for x in (directory / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["evaluation"] = None
    (directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "The evaluation cohort has no test part." in read(directory).text


def set_f1(record: Any, part: str, found: Estimate) -> None:
    """In the record as it was read, whose file stays as it is."""
    record.final[part].metrics["f1"] = found


def test_a_metric_that_has_no_value_has_no_line(build_run):
    directory = build_run(rounds=2)
    with_all = read(directory).text
    record = RunRecord.read(directory)
    for part in ("validation", "test"):
        set_f1(record, part, Estimate(None))
    text = Page(render(record)).text
    assert " F1 0." in with_all
    assert " F1 " not in text
    assert " AUPRC 0." in text


def test_an_interval_that_no_resample_widens_is_told(build_run):
    record = RunRecord.read(build_run(rounds=2))
    assert "no spread" not in Page(render(record)).text
    set_f1(record, "test", Estimate(1.0, 1.0, 1.0))
    text = Page(render(record)).text
    assert "resamples of patients; no spread: all of them gave the same" in text
    assert "F1 1.000 no spread" in text


def test_a_run_that_was_evaluated_once_has_no_curves_by_round(build_run):
    directory = build_run(rounds=3)
    assert "Training, round by round" in read(directory).text
    lines = [json.loads(x) for x in (directory / "metrics.jsonl").read_text().splitlines()]
    for line in lines[:-1]:
        line["evaluation"] = None
    (directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    page = read(directory)
    assert "Training, round by round" not in page.text
    assert not [a for a in page.all("img") if "by round" in a["alt"]]
    assert "AUROC · test part 0." in page.text


def test_on_a_narrow_screen_each_figure_of_a_table_says_what_it_is_of(build_run):
    page = write_report(build_run(kind="multilabel")).read_text()
    tables = re.findall(r'<table class="[^"]*stacked[^"]*".*?</table>', page, re.S)
    assert len(tables) >= 4  # by class, sites, what did not go well, privacy
    for table in tables:
        heads = re.findall(r"<th scope=\"col\"[^>]*>(.*?)</th>", table, re.S)
        named = {head.replace("<br>", " ") for head in heads}
        cells = re.findall(r"<td([^>]*)>", table.replace("<td colspan", "<td data-of colspan"))
        assert cells
        for cell in cells:
            of = re.search(r'data-of="([^"]*)"', cell)
            assert (of and of[1] in named) or "colspan" in cell


def test_who_took_part_is_drawn_anew_for_a_narrow_screen(build_run):
    page = read(build_run())
    (narrow,) = page.all("source")
    assert narrow["media"] == "(max-width: 600px)"
    (broad,) = (a for a in page.all("img") if a["alt"].startswith("Who took part"))
    drawn = [base64.b64decode(uri.split(",")[1]) for uri in (narrow["srcset"], broad["src"])]
    widths = [float(re.findall(rb'width="([\d.]+)pt"', svg)[0]) for svg in drawn]
    assert widths[0] < 330 < widths[1]


# --- What it must not do ----------------------------------------------------------------------


def test_nothing_is_loaded_from_anywhere(build_run):
    directory = build_run()
    page = read(directory)
    policy = page.all("meta")[1]
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert policy["content"].startswith("default-src 'none'; img-src data:")
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "a", "object"}
    assert not any("href" in attributes for _, attributes in page.tags)
    drawn = [attributes["srcset"] or "" for _, attributes in page.tags if "srcset" in attributes]
    assert all(re.fullmatch(r"data:image/svg\+xml;base64,[\w+/=]+", uri) for uri in drawn)
    text = (directory / "report.html").read_text()
    assert not re.search(r"https?://|url\(|@import", text)
    for svg in pictures(page):
        assert "<script" not in svg
        links = re.findall(r'href="([^"]*)"', svg)
        assert all(link.startswith(("#", "data:image/png")) for link in links)


def test_text_from_the_run_directory_stays_text(build_run, edit):
    directory = build_run(rounds=3)
    lines = [json.loads(x) for x in (directory / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["sites"][HOSTILE] = {"status": "failed", "reason": HOSTILE}
    (directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    changed = {key: HOSTILE for key in ("engine", "device", "started", "finished")}
    edit(directory / "environment.json", versions={HOSTILE: HOSTILE}, **changed)
    spent = json.loads((directory / "privacy.json").read_text())["sites"]
    spent[HOSTILE] = spent["Westmoor"] | {"mechanism": HOSTILE, "epsilon": 99.0}
    edit(directory / "privacy.json", sites=spent)
    spec = json.loads((directory / "spec.json").read_text())
    spec["task"]["classes"] = [HOSTILE, "other"]
    (directory / "spec.json").write_text(json.dumps(spec))

    page = read(directory)
    assert "script" not in {tag for tag, _ in page.tags}
    assert all(a["src"].startswith("data:") for a in page.all("img"))
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert all("<script" not in svg for svg in pictures(page))


def test_a_site_name_in_a_figure_is_no_formula_and_no_flood(build_run, recwarn):
    directory = build_run(rounds=2)
    lines = [json.loads(x) for x in (directory / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for name in ("$x^2$", "東京病院", "long" * 100, "two\nlines"):
            line["sites"][name] = {"status": "ok"}
    (directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    strip = next(svg for svg in pictures(read(directory)) if "東京病院" in svg)
    assert "$x^2$" in strip
    assert "longlonglonglonglonglongl…" in strip
    assert [str(w.message) for w in recwarn if "Glyph" in str(w.message)] == []


def test_every_picture_has_its_words(build_run):
    assert all(len(a["alt"] or "") > 20 for a in read(build_run(rounds=2)).all("img"))


def test_it_is_small_and_soon_there(build_run):
    directory = build_run()
    write_report(directory)
    start = time.process_time()
    path = write_report(directory)
    assert time.process_time() - start < 3
    assert path.stat().st_size < 1_500_000


def test_a_long_run_of_many_sites_is_still_a_page(build_run):
    directory = build_run(rounds=2)
    first = json.loads((directory / "metrics.jsonl").read_text().splitlines()[0])
    first["sites"] = {f"site {i}": {"status": "late", "reason": "slow"} for i in range(40)}
    lines = [json.dumps(first | {"round": number}) for number in range(1, 401)]
    (directory / "metrics.jsonl").write_text("\n".join(lines))
    path = write_report(directory)
    assert path.stat().st_size < 1_500_000
    assert "And 15960 more, in metrics.jsonl." in Page(path.read_text()).text


def test_the_same_run_gives_the_same_page(build_run):
    directory = build_run(rounds=2)
    first = write_report(directory).read_bytes()
    assert write_report(directory).read_bytes() == first


def test_each_missing_file_is_named(build_run):
    whole = build_run(rounds=2)
    for name in ("spec.json", "environment.json", "metrics.jsonl", "privacy.json"):
        content = (whole / name).read_bytes()
        (whole / name).unlink()
        with pytest.raises(RunError, match=re.escape(name)):
            write_report(whole)
        (whole / name).write_bytes(content)
    assert not (whole / "report.html").exists()
    write_report(whole)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("spec.json", "{}", "name is missing"),
        ("environment.json", '{"versions": {}}', "engine"),
        ("metrics.jsonl", "", "no round is finished"),
        ("metrics.jsonl", '{"round": 1, "sec', r"metrics.jsonl:1: .*Invalid JSON"),
        ("metrics.jsonl", '{"round": 0, "seconds": 1, "sites": {}}', "round = '0'"),
        ("privacy.json", '{"protected": true, "sites": {"a": 3}}', r"sites\.a"),
        ("privacy.json", '{"protected": true, "sites": {}, "all_sites_epsilon": NaN}', "finite"),
        ("evaluation.npz", "no archive", "evaluation.npz: cannot be used"),
    ],
)
def test_a_damaged_file_is_refused_by_name(build_run, name, content, words):
    directory = build_run(rounds=2)
    (directory / name).write_text(content)
    with pytest.raises(RunError, match=words):
        write_report(directory)


def test_rounds_out_of_order_are_refused(build_run):
    directory = build_run(rounds=3)
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    (directory / "metrics.jsonl").write_text("\n".join(reversed(lines)))
    with pytest.raises(RunError, match="round 2 follows 3"):
        write_report(directory)


def test_arrays_that_would_run_code_are_not_read(build_run):
    directory = build_run(rounds=2)
    trap = np.array([Path("x")], dtype=object)
    np.savez(directory / "evaluation.npz", probabilities=trap, labels=trap, patients=trap)
    with pytest.raises(RunError, match=r"evaluation\.npz: cannot be used"):
        write_report(directory)


# --- Whom it must reach -----------------------------------------------------------------------

# Machado, Oliveira and Fernandes 2009: what complete protanopia and deuteranopia see (linear RGB).
SEEN_BY = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}


def linear(colour):
    values = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def difference(one, other, eyes):
    """CIE 1976 difference of two colours as these eyes see them."""
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    labs = []
    for colour in (one, other):
        seen = np.clip(np.array(SEEN_BY[eyes]) @ linear(colour), 0, 1)
        x, y, z = np.cbrt(np.maximum(to_xyz @ seen / [0.9505, 1, 1.089], 1e-6))
        labs.append(np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)]))
    return float(np.linalg.norm(labs[0] - labs[1]))


@pytest.mark.parametrize("eyes", SEEN_BY)
def test_colours_differ_for_all_eyes(eyes):
    together = [
        *itertools.combinations(figures.STATUS_COLOURS.values(), 2),
        (figures.BLUE, figures.VERMILION),
    ]
    assert min(difference(a, b, eyes) for a, b in together) > 17
    assert difference("#cc4c02", "#7a7a20", eyes) < 17  # the control: a red and a green


def test_text_stands_out_from_its_ground():
    style = (Path(figures.__file__).parent / "report.html.j2").read_text()
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", style))

    def contrast(one, other):
        light, dark = sorted(
            (float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other)), reverse=True
        )
        return (light + 0.05) / (dark + 0.05)

    for text in ("ink", "muted"):
        assert contrast(colours[text], colours["paper"]) > 4.5
        assert contrast(colours[text], colours["stone"]) > 4.5
    assert contrast("#d5e6ef", colours["deep"]) > 4.5
    assert contrast(colours["ink"], colours["amber"]) > 7
