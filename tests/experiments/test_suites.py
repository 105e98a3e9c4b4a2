"""Suites: files are read strictly, cells are made once, and a run that was stopped ends as if it had not been."""

from __future__ import annotations

import dataclasses
import html
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_encoders import tiny_clip
from tiny_training import StubLVLM, coloured_rows, coloured_table

from drum_hf.cli import main
from drum_hf.data import TripletTable, load_table
from drum_hf.errors import SavedFileError, SuiteError
from drum_hf.evaluation.registry import Comparison
from drum_hf.evaluation.statistics import paired_bootstrap
from drum_hf.experiments.suites import SUITES, load_suite, plan_suite, run_suite
from drum_hf.experiments.suites.cells import Cell, CellFiles, Values
from drum_hf.experiments.suites.results import summarize_suite
from drum_hf.experiments.suites.spec import split_name
from drum_hf.retriever.retriever import DemoRetriever
from drum_hf.scores.feedback import Feedback
from drum_hf.training.arguments import own_arguments
from drum_hf.training.methods import METHODS

SUITE = """
data:
  colours: {{table: support, queries: queries, task: vqa}}
lvlms: [first]
encoders: ["{clip}"]
strategies: [zero-shot, random, sit, sit+draft, epr, drum, drum+mmr, oracle]
shots: [0, 1, 2]
headline: 2
random_seeds: 2
training: {{rounds: 2, candidates: 3, epochs: 1, learning_rate: 1e-3, batch_size: 8, list_size: 3}}
transfer: [{{lvlm: second}}]
"""


class Second(StubLVLM):
    """Another LVLM: drafts differently, answers as the first demonstration does."""

    @property
    def fingerprint(self) -> str:
        return "stub-2"

    def generate(self, requests, *, max_new_tokens=32):
        self.asked += requests
        return [r.demonstrations[0].response if r.demonstrations else "hm" for r in requests]


@pytest.fixture(scope="session")
def suite_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    coloured_table(16).save(folder / "support")
    coloured_table(6, seed=7, prefix="u").save(folder / "queries")
    path = folder / "tiny.yaml"
    path.write_text(SUITE.format(clip=tiny_clip(folder)), encoding="utf-8")
    return path


def run(suite_file, out, *, spec=None, on_cell=None, lvlms=None):
    lvlms = lvlms or {"first": StubLVLM(), "second": Second()}
    spec = spec or load_suite(suite_file)
    return run_suite(spec, out, lvlms=lvlms, on_cell=on_cell), lvlms["first"], lvlms["second"]


def shown(lvlm) -> list[tuple]:
    return [(r.query.id, tuple(d.id for d in r.demonstrations)) for r in lvlm.asked]


@pytest.fixture(scope="session")
def whole(suite_file, tmp_path_factory):
    """The suite carried out without a stop."""
    out = tmp_path_factory.mktemp("whole")
    summary, first, second = run(suite_file, out)
    return out, summary, first, second


# Running


def test_a_suite_writes_every_number_and_pays_once(whole):
    out, summary, first, second = whole
    assert json.loads((out / "summary.json").read_text()) == summary
    task = summary["tasks"]["colours"]
    assert list(task["strategies"]) == ["zero-shot", "random", "sit", "sit+draft", "epr", "drum", "drum+mmr", "oracle"]
    for name, rows in task["strategies"].items():
        assert list(rows) == (["0"] if name == "zero-shot" else ["0", "1", "2"])
        assert rows["0"] == task["strategies"]["zero-shot"]["0"]
        assert all(0 <= r["ci"][0] <= r["metric"] <= r["ci"][1] <= 1 for r in rows.values())
    # the stub answers as the last demonstration does
    assert task["strategies"]["oracle"]["2"]["metric"] == 1.0
    assert task["strategies"]["zero-shot"]["0"]["metric"] == 0.0
    assert len(task["strategies"]["random"]["1"]["seeds"]) == 2
    assert list(task["paired"]) == ["drum>sit", "drum>sit+draft", "drum>epr", "drum>drum+mmr"]
    assert all(set(row) == {"diff", "ci", "p"} for row in task["paired"].values())
    assert [row["pairs"] for row in task["by_pairs"]] == [48, 80]  # at set level two of three, without the companion
    last = task["by_pairs"][-1]
    assert (last["drum"], last["epr"]) == tuple(task["strategies"][n]["2"]["metric"] for n in ("drum", "epr"))
    assert {k: last[k] for k in ("diff", "ci", "p")} == task["paired"]["drum>epr"] == last["to_final"]
    means = [task["strategies"][n]["2"]["metric"] for n in ("drum", "sit+draft", "oracle")]
    assert task["gap_closed"] == pytest.approx((means[0] - means[1]) / (means[2] - means[1]))
    moved = summary["transfer"]["second"]["colours"]
    assert list(moved["strategies"]) == ["zero-shot", "random", "si", "sit", "sit+draft", "epr", "drum"]
    assert moved["trained_on"] == "first" and "drum>sit" in moved["paired"]
    # nothing twice, and the second LVLM trained nothing
    for lvlm in (first, second):
        assert len(shown(lvlm)) == len(set(shown(lvlm)))
        assert len(lvlm.scored) == len(set(lvlm.scored))
    assert second.scored == []
    rows = pq.read_table(out / "results.parquet")
    drum = [
        r for r in rows.to_pylist() if (r["strategy"], r["shots"], r["lvlm"], r["round"]) == ("drum", 2, "first", None)
    ]
    assert [r["query_id"] for r in drum] == [f"u{i}" for i in range(6)]
    assert np.mean([r["value"] for r in drum]) == pytest.approx(task["strategies"]["drum"]["2"]["metric"])
    assert {r["pairs"] for r in drum} == {80} and all(len(r["demonstrations"]) == 2 for r in drum)


def test_a_suite_says_what_made_it(whole, suite_file):
    out, _, first, second = whole
    told = json.loads((out / "manifest.json").read_text())
    assert told["lvlm"] == {"name": "first", "fingerprint": first.fingerprint}
    assert told["settings"]["lvlms"] == {"first": first.fingerprint, "second": second.fingerprint}
    (tables,) = told["data"].values()
    assert tables == {s: load_table(suite_file.parent / s).fingerprint for s in ("support", "queries")}
    assert str(out.parent) not in (out / "manifest.json").read_text()


def test_pages_say_what_was_measured(whole):
    out, summary, *_ = whole
    text = (out / "tables.md").read_text()
    drum = summary["tasks"]["colours"]["strategies"]["drum"]["2"]
    assert f"{100 * drum['metric']:.1f} [{100 * drum['ci'][0]:.1f}, {100 * drum['ci'][1]:.1f}]" in text
    assert "Retrievers were trained on the feedback of first and are evaluated on second" in text
    latex = (out / "tables.tex").read_text()
    assert latex.count(r"\toprule") == latex.count(r"\bottomrule") == text.count("### ") == 5
    assert r"\textgreater{}" in latex and "\\% " not in latex.splitlines()[0]
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"
    report = (out / "report.html").read_text()
    # six queries, each with what similarity and what DRUM chose, and what came of it
    assert report.count('class="example"') == 6
    assert report.count("The LVLM answers") == 12
    assert "DRUM + mmr" in report and "colours, transfer to second" in report


def test_a_second_run_asks_nothing_and_says_the_same(whole, suite_file):
    out, summary, *_ = whole
    made = []
    again, first, second = run(suite_file, out, on_cell=made.append)
    assert (again, made) == (summary, [])
    assert first.asked + second.asked + first.scored + second.scored == []


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "place",
    [
        "cell 11",
        "checkpoint",
        pytest.param("cell 3", marks=pytest.mark.slow),
        pytest.param("score 60", marks=pytest.mark.slow),
        pytest.param("round 1", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(place, whole, suite_file, tmp_path, monkeypatch):
    """Stopped between cells, while scoring, after a round of training, and after a checkpoint."""
    from drum_hf.training.trainer import DrumTrainer

    kind, _, number = place.partition(" ")
    lvlms = {"first": StubLVLM(fail_after=60 if kind == "score" else None), "second": Second()}
    made: list[Cell] = []

    def stop(cell):
        made.append(cell)
        if kind == "cell" and len(made) == int(number):
            raise Killed

    def die(self, *args, original):
        original(self, *args)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises((Killed, KeyboardInterrupt)):
        for method in {"round": ["finish_round"], "checkpoint": ["save_state_beside"]}.get(kind, ()):
            original = getattr(DrumTrainer, method)
            patch.setattr(DrumTrainer, method, lambda self, *a, original=original: die(self, *a, original=original))
        run(suite_file, tmp_path, on_cell=stop, lvlms=lvlms)
    assert not (tmp_path / "summary.json").exists()
    out, summary, first, second = whole
    lvlms["first"].fail_after = None
    after, *_ = run(suite_file, tmp_path, lvlms=lvlms)
    assert after == summary
    assert pq.read_table(tmp_path / "results.parquet").equals(pq.read_table(out / "results.parquet"))
    # both runs together paid what one pays
    assert sorted(lvlms["first"].scored) == sorted(first.scored)
    assert sorted(shown(lvlms["first"])) == sorted(shown(first))
    assert sorted(shown(lvlms["second"])) == sorted(shown(second))


def test_what_has_changed_is_made_again_and_nothing_else(whole, suite_file, monkeypatch):
    out, *_ = whole
    spec = load_suite(suite_file)
    training = dataclasses.replace(spec.training, epochs=2)
    made: list[Cell] = []
    run(suite_file, out, spec=dataclasses.replace(spec, training=training), on_cell=made.append)
    assert {c.strategy for c in made} == {"drum", "drum+mmr", "epr"}
    made.clear()
    run(suite_file, out, spec=dataclasses.replace(spec, shots=(0, 1, 2, 3)), on_cell=made.append)
    assert {c.shots for c in made} == {3}
    # both trainings are still there: none was done again
    monkeypatch.setattr(
        "drum_hf.experiments.suites.runner.train_retriever", lambda *a, **k: pytest.fail("trained again")
    )
    changed = spec.narrowed(strategies=["drum", "drum+dpp"])
    made.clear()
    run(suite_file, out, spec=changed, on_cell=made.append)
    assert {c.strategy for c in made} == {"drum+dpp"}


def test_a_trained_retriever_can_be_taken_away(whole, suite_file):
    out, *_ = whole
    folder = min((out / "retrievers").glob("colours-0-drum-seed0-*"))
    retriever = DemoRetriever.from_pretrained(folder / "round-2", support=coloured_table(16), device="cpu")
    assert retriever.teacher["name"] == "stub"
    assert not (folder / "training").exists()


# Numbers


def test_worlds_are_the_groups_and_seeds_are_averaged(suite_file):
    spec = load_suite(suite_file)
    data = dataclasses.replace(spec.data[0], seeds=(5, 6))
    spec = dataclasses.replace(
        spec, data=(data,), strategies=("sit", "drum"), shots=(2,), seeds=(0, 1), transfer=(), curves=()
    )
    rng = np.random.default_rng(0)
    cells, held = {}, {}
    for world in data.seeds:
        for name, seed in (("sit", 0), ("drum", 0), ("drum", 1)):
            values = rng.integers(0, 2, 20).astype(float)
            held[world, name, seed] = values
            cell = Cell(data.name, world, "first", "", spec.encoders[0], name, seed, 2)
            cells[cell] = Values([f"q{i}" for i in range(20)], values, ["a"] * 20, [["x"]] * 20, 7 + seed)
    task = summarize_suite(spec, cells)["tasks"]["colours"]
    ours = np.concatenate([(held[w, "drum", 0] + held[w, "drum", 1]) / 2 for w in data.seeds])
    theirs = np.concatenate([held[w, "sit", 0] for w in data.seeds])
    groups = [5] * 20 + [6] * 20
    expected = paired_bootstrap(ours, theirs, groups=groups)
    assert task["paired"]["drum>sit"] == {
        "diff": expected.mean, "ci": [expected.lo, expected.hi], "p": expected.p
    }  # fmt: skip
    row = task["strategies"]["drum"]["2"]
    assert row["metric"] == pytest.approx(ours.mean())
    assert row["seeds"] == pytest.approx([np.mean([held[w, "drum", s] for w in data.seeds]) for s in (0, 1)])
    assert row["by_group"] == {"5": pytest.approx(ours[:20].mean()), "6": pytest.approx(ours[20:].mean())}


def test_a_broken_cell_is_named(tmp_path):
    files = CellFiles(tmp_path)
    files.write("one", Values(["q"], np.array([0.5]), ["a"], [["x", "y"]], None))
    back = files.read("one")
    assert (back.query_ids, back.values.tolist(), back.demonstrations, back.pairs) == (
        ["q"],
        [0.5],
        [["x", "y"]],
        None,
    )
    files.path("one").write_bytes(b"PAR1 not really")
    with pytest.raises(SavedFileError, match=r"one\.parquet.*delete"):
        files.read("one")


# Files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shotz": [1]}, "unknown key 'shotz'"),
        ({"strategies": ["drum", "luck"]}, "luck"),
        ({"strategies": ["bm25+mmr"]}, r"bm25\+mmr"),
        ({"strategies": ["drum", "drum"]}, "strategies"),
        ({"shots": [1, "2"]}, r"shots\[1\].*whole number"),
        ({"shots": [1, True]}, "whole number"),
        ({"headline": 3}, "headline"),
        ({"paired": ["drum"]}, "drum>epr"),
        ({"curves": ["sit"]}, "curves"),
        ({"curves": ["drum-no-mining"]}, "mine in rounds"),
        ({"training": {"rounds": 0}}, r"training\.rounds"),
        ({"training": {"momentum": 1}}, "momentum"),
        ({"training": {"pairs": [10, 30]}}, "equal steps"),
        ({"data": {}}, "data"),
        ({"data": {"a": {"task": "vqa"}}}, "world, source and table"),
        ({"data": {"a": {"world": "standard", "task": "chat"}}}, "task"),
        ({"data": {"a": {"world": "heavenly", "task": "vqa"}}}, "heavenly"),
        ({"data": {"a": {"source": "nobody"}}}, "nobody"),
        ({"data": {"a": {"source": "okvqa", "task": "captioning"}}}, "vqa data set"),
        ({"data": {"a": {"world": "easy", "task": "vqa", "streaming": True}}}, "streaming"),
        ({"data": {"a": {"world": "easy", "task": "vqa", "metric": "luck"}}}, "metric"),
        ({"transfer": [{"lvlm": "playground/lvlm"}]}, "transfer"),
        ({"lvlms": [{"model": "m", "api_key_env": "KEY"}]}, "endpoint"),
        ({"lvlms": [{"name": "m"}]}, "'model' is missing"),
    ],
)
def test_a_faulty_file_is_refused_by_name(change, message, tmp_path):
    import yaml

    content = {"data": {"vqa": {"world": "easy", "task": "vqa"}}} | change
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(SuiteError, match=message) as error:
        load_suite(path)
    assert "mine.yaml" in str(error.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(SuiteError, match="drum-paper"):
        load_suite("nothing")
    path = tmp_path / "x.yaml"
    for text in ("a: [", "- a list", "data: !!python/object/apply:os.getcwd []"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(SuiteError, match=r"x\.yaml"):
            load_suite(path)


def test_names_with_a_selector():
    assert split_name("sit+draft") == ("sit+draft", None)
    assert split_name("sit+draft+mmr") == ("sit+draft", "mmr")
    assert split_name("drum+dpp") == ("drum", "dpp")


def test_a_part_of_a_suite():
    spec = load_suite("playground")
    part = spec.narrowed(tasks=["vqa"], world_seeds=[7], strategies=["zero-shot", "sit+draft", "drum"], shots=[1, 4])
    assert [(d.name, d.seeds) for d in part.data] == [("vqa", (7,))]
    assert (part.shots, part.headline, part.comparisons()) == ((1, 4), 4, [("drum", "sit+draft")])
    assert spec.narrowed(shots=[1, 2]).headline == 2
    for fault in ({"tasks": ["chess"]}, {"strategies": ["luck"]}, {"world_seeds": [1, 1]}, {"shots": []}):
        with pytest.raises(SuiteError):
            spec.narrowed(**fault)
    with pytest.raises(SuiteError, match="no playground worlds"):
        load_suite("drum-paper").narrowed(world_seeds=[1])


def test_pairs_give_rounds_and_candidates(suite_file):
    training = dataclasses.replace(load_suite(suite_file).training, pairs=(6000, 12000, 18000))
    assert training.schedule(600) == (3, 10)
    with pytest.raises(SuiteError, match="at least one pair"):
        training.schedule(20_000)


@pytest.mark.parametrize("name", sorted(SUITES))
def test_every_suite_that_ships_can_be_planned(name, capsys):
    assert main(["eval", "--suite", name, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"suite {name}:") and "LVLM calls" in text


def test_the_plan_counts_what_a_run_does(whole, suite_file):
    """From the sizes of the tables, without the caches that make a run cheaper."""
    _, _, first, second = whole
    spec = load_suite(suite_file)
    spec = dataclasses.replace(spec, data=(dataclasses.replace(spec.data[0], support_rows=16, query_rows=6),))
    plan = plan_suite(spec)
    assert plan["trainings"] == 2
    assert plan["lvlm_calls"]["first"]["score"] == 2 * 16 * 2 * 3 >= len(first.scored)
    assert plan["lvlm_calls"]["first"]["generate"] >= len(first.asked)
    assert plan["lvlm_calls"]["second"] == {"generate": plan["lvlm_calls"]["second"]["generate"], "score": 0}
    assert plan["lvlm_calls"]["second"]["generate"] >= len(second.asked)
    assert plan_suite(load_suite(suite_file))["lvlm_calls"]["first"]["score"] is None


def test_the_paper_suite_names_seven_data_sets_and_what_they_download():
    plan = plan_suite(load_suite("drum-paper"))
    repos = [d["repo"] for d in plan["downloads"] if "repo" in d]
    assert len(repos) == 14 and "lmms-lab/OK-VQA" in repos
    assert {d["model"] for d in plan["downloads"] if "model" in d} >= {"Qwen/Qwen2.5-VL-7B-Instruct"}
    assert all(isinstance(count, int) for calls in plan["lvlm_calls"].values() for count in calls.values())


def test_options_of_a_suite_need_one(capsys):
    assert main(["eval", "--world-seeds", "1"]) == 2
    assert "--suite" in capsys.readouterr().err


def test_a_trainings_key_holds_every_argument_of_ours():
    """A default that changes in a later version is another training."""
    drum, epr = (own_arguments(METHODS[name]) for name in ("drum", "epr"))
    assert {"in_batch", "set_level_rounds", "set_level_weight", "random_share", "rank_weight"} <= set(drum)
    assert (drum["set_level_rounds"], epr["set_level_rounds"]) == (1, 0)
    assert "learning_rate" not in drum  # the platform's, which the suite file says


def test_strategies_of_a_comparison_share_the_towers(tmp_path):
    clip, table = tiny_clip(tmp_path), coloured_table(6)
    feedback = Feedback(StubLVLM(), table, table)
    first = Comparison(table, table, feedback, clip, "vqa", {})
    other = Comparison(table, table, feedback, clip, "vqa", {"x": "y"}, untrained=first.untrained)
    assert other.untrained("sit") is first.untrained("sit")


def test_options_that_a_suite_file_says_are_refused(capsys):
    for words in (["--lvlm", "other"], ["--order", "shuffled"], ["--endpoint", "http://x"], ["--selector", "mmr"]):
        assert main(["eval", "--suite", "playground", *words]) == 2
        assert "does not go with --suite" in capsys.readouterr().err


def test_strategies_that_the_tables_do_not_allow_and_classes_of_the_queries_alone(tmp_path):
    """As in a demo: left out with a line, and counted as wrong."""
    support = [row | {"prompt": ""} for row in coloured_rows(12)]
    asked = [row | {"prompt": ""} for row in coloured_rows(5, seed=7, prefix="u")]
    asked[2] |= {"response": "robin", "label": "robin"}
    for name, rows in (("support", support), ("queries", asked)):
        TripletTable.from_dataset(rows).save(tmp_path / name)
    text = SUITE.replace("task: vqa", "task: classification")
    text = text.replace(
        "[zero-shot, random, sit, sit+draft, epr, drum, drum+mmr, oracle]", "[si, st, st+mmr, sit, drum]"
    )
    (tmp_path / "tiny.yaml").write_text(text.format(clip=tiny_clip(tmp_path)), encoding="utf-8")
    spec = dataclasses.replace(load_suite(tmp_path / "tiny.yaml"), transfer=())
    for _ in range(2):  # made, and read again
        summary = run_suite(spec, tmp_path / "out", lvlms={"first": StubLVLM()})
        (task,) = summary["tasks"].values()
        assert list(task["strategies"]) == ["si", "drum"]
        assert max(row["2"]["metric"] for row in task["strategies"].values()) <= 4 / 5
        told = task["limits"]
        assert told[0].startswith("1 of 5 queries have labels that no demonstration has ('robin')")
        assert told[1:] == [f"{n} is left out: it compares prompts, and the tables have none." for n in ("ST", "SIT")]
    page = html.unescape((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    tables = (tmp_path / "out" / "tables.md").read_text(encoding="utf-8")
    assert all(sentence in page and sentence in tables for sentence in told)
