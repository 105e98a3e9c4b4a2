"""The whole comparison on a tiny table: every strategy in the results, and splits without leaks."""

from __future__ import annotations

import html
import json
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_encoders import tiny_clip
from tiny_training import StubLVLM, coloured_rows, coloured_table, worded_table

from drum_hf.data import TripletTable, check_leaks
from drum_hf.errors import EmptySupportError
from drum_hf.experiments.demo import TRAINED, Settings, evaluate_strategies, run_experiment, split_table
from drum_hf.retriever.retriever import DemoRetriever

SETTINGS = Settings(
    shots=2, by_shots=(1, 2), rounds=2, candidates=3, epochs=1, batch_size=8, list_size=3, random_seeds=2
)


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return str(tiny_clip(tmp_path_factory.mktemp("encoders")))


@pytest.fixture(scope="session")
def tables():
    return coloured_table(16), coloured_table(6, seed=7, prefix="u")


def test_an_experiment_writes_its_results_and_runs_again_for_nothing(tmp_path, clip, tables, caplog):
    support, queries = tables
    out = tmp_path / "run"
    lvlm = StubLVLM()
    results = run_experiment(
        support,
        queries,
        lvlm=lvlm,
        encoder=clip,
        task="vqa",
        out_dir=out,
        settings=SETTINGS,
        facts={"world_seed": 5},
    )
    assert json.loads(json.dumps(results)) == json.loads((out / "results.json").read_text())
    assert "<html" in (out / "report.html").read_text().lower()
    assert (results["task"], results["world_seed"], results["shots"]) == ("vqa", 5, 2)
    assert results["seconds"] > 0
    assert results["scored_pairs"] == 16 * (3 + 2)  # three alone, two of them again at set level
    names = {"zero-shot", "random", "fixed", "si", "st", "sit", "sit+draft", "bm25", "oracle", *TRAINED}
    assert set(results["strategies"]) == names
    for name, row in results["strategies"].items():
        assert 0 <= row["ci"][0] <= row["metric"] <= row["ci"][1] <= 1, name
        assert list(row["by_shots"]) == ([] if name == "zero-shot" else ["1", "2"]), name
        if row["by_shots"]:
            at_shots = row["by_shots"]["2"]
            assert (at_shots["metric"], at_shots["ci"]) == (row["metric"], row["ci"]), name
    for name in TRAINED:
        pairs = results["strategies"][name]["by_pairs"]
        assert [p for p, _ in pairs] == [0, 48, 80 if name == "drum" else 96]
        assert pairs[0][1] == results["strategies"]["sit+draft"]["metric"]
        assert pairs[-1][1] == results["strategies"][name]["metric"]
    # the stub answers as the last demonstration does
    assert results["strategies"]["oracle"]["metric"] == 1.0
    assert results["strategies"]["zero-shot"]["metric"] == 0.0
    assert len(lvlm.scored) == len(set(lvlm.scored))
    shown = [(r.query.id, tuple(d.id for d in r.demonstrations)) for r in lvlm.asked]
    assert len(shown) == len(set(shown))

    loaded = DemoRetriever.from_pretrained(out / "retriever", device="cpu")
    assert loaded.teacher["name"] == "stub"
    reported = {row["strategy"]: row for row in loaded.card_data["results"]}
    label = results["metric_name"]
    assert len(reported) == len(names) and [row["scored pairs"] for row in loaded.card_data["rounds"]] == [48, 80]
    ours = 100 * results["strategies"]["drum"]["metric"]
    assert loaded.card_data["rounds"][-1][label] == ours == loaded.card_data["model_index"][0]["value"]
    assert loaded.plot == (out / "retriever" / "plot.png").read_bytes() and loaded.plot.startswith(b"\x89PNG")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["data"] == {"support": support.fingerprint, "queries": queries.fingerprint}
    assert manifest["seed"] == SETTINGS.seed and manifest["lvlm"]["fingerprint"] == lvlm.fingerprint

    again = StubLVLM()
    given = {"lvlm": again, "encoder": clip, "task": "vqa", "out_dir": out, "settings": SETTINGS}
    with caplog.at_level(logging.INFO, "drum_hf"):
        repeated = run_experiment(support, queries, **given)
    assert "vqa: 16 demonstrations, 6 queries" in caplog.messages
    assert (again.scored, again.asked) == ([], [])
    assert repeated["strategies"] == results["strategies"]


def test_strategies_by_name(clip, tables):
    support, queries = tables
    lvlm = StubLVLM()
    results = evaluate_strategies(
        support,
        queries,
        names=["zero-shot", "random", "fixed", "sit", "oracle"],
        shots=[2, 1],
        lvlm=lvlm,
        encoder=clip,
        task="vqa",
    )
    assert list(results["strategies"]) == ["zero-shot", "random", "fixed", "sit", "oracle"]
    assert results["strategies"]["oracle"]["metric"] == 1.0
    assert list(results["strategies"]["sit"]["by_shots"]) == ["1", "2"]
    assert all(r.query.draft is None for r in lvlm.asked)
    for name, message in (("drum", "retriever"), ("luck", "unknown")):
        with pytest.raises(ValueError, match=message):
            evaluate_strategies(support, queries, names=[name], shots=[1], lvlm=lvlm, encoder=clip, task="vqa")


# Splits


rows = st.lists(
    st.tuples(st.integers(0, 9), st.sampled_from(["", "", "g0", "g1", "g2", "g3"])), min_size=2, max_size=25
)


@settings(max_examples=25, deadline=None)
@given(rows=rows, share=st.sampled_from([0.1, 0.2, 0.5]), seed=st.integers(0, 99))
def test_a_split_keeps_groups_and_contents_on_one_side(rows, share, seed):
    table = TripletTable.from_dataset(
        [
            {"id": f"r{i}", "prompt": f"question {content}", "response": f"answer {i}", "group": group}
            for i, (content, group) in enumerate(rows)
        ]
    )
    blocks = linked(table)
    if len(blocks) == 1:
        return  # all of one piece: nothing to split
    support, queries = split_table(table, queries=share, seed=seed)
    assert sorted([*support.ids, *queries.ids]) == sorted(table.ids)
    assert not {g for g in support.groups if g} & {g for g in queries.groups if g}
    assert check_leaks(support, queries, on_leak="ignore") == []
    assert len(queries) >= min(max(1, round(len(table) * share)), len(table) - max(map(len, blocks)))
    again = split_table(table, queries=share, seed=seed)
    assert (again[0].ids, again[1].ids) == (support.ids, queries.ids)


def linked(table):
    """Rows that hang together by prompt or group, by repeated merging."""
    blocks = [{i} for i in table.ids]
    marks = {i: {("content", table[i].prompt), ("group", table[i].group or i)} for i in table.ids}
    merged = True
    while merged:
        merged = False
        for a in range(len(blocks)):
            for b in range(a + 1, len(blocks)):
                if set.union(*(marks[i] for i in blocks[a])) & set.union(*(marks[i] for i in blocks[b])):
                    blocks[a] |= blocks.pop(b)
                    merged = True
                    break
            if merged:
                break
    return blocks


def test_equal_pictures_stay_together():
    pictures = coloured_table(12)
    twins = [
        {"id": f"{d.id}{side}", "image": d.image, "prompt": f"question {side}?", "response": d.response}
        for d in pictures
        for side in "ab"
    ]
    support, queries = split_table(TripletTable.from_dataset(twins), queries=0.25, seed=1)
    assert len(queries) == 6
    assert not set(support.image_keys) & set(queries.image_keys)


def test_a_rare_class_and_tables_without_prompts(tmp_path, clip, caplog):
    """A query of a class that no demonstration has counts as wrong; strategies that compare prompts are left out."""
    support = [row | {"prompt": ""} for row in coloured_rows(16)]
    asked = [row | {"prompt": ""} for row in coloured_rows(6, seed=7, prefix="u")]
    asked[2] |= {"response": "robin", "label": "robin"}
    results = run_experiment(
        TripletTable.from_dataset(support),
        TripletTable.from_dataset(asked),
        lvlm=StubLVLM(),
        encoder=clip,
        task="classification",
        out_dir=tmp_path / "run",
        settings=Settings(shots=2, by_shots=(2,), rounds=1, candidates=3, epochs=1, batch_size=8, list_size=3),
    )
    assert {"st", "sit"}.isdisjoint(results["strategies"]) and {"si", "sit+draft", "drum"} <= set(
        results["strategies"]
    )
    assert results["strategies"]["oracle"]["metric"] == pytest.approx(5 / 6)
    told = [
        "1 of 6 queries have labels that no demonstration has ('robin'), and count as wrong: add demonstrations of "
        "them, or drop these queries.",
        "ST is left out: it compares prompts, and the tables have none.",
        "Only 6 queries were asked, so every number here is rough: ask 30 or more.",
    ]
    assert set(told[:2]) <= set(caplog.messages) and set(told[:2]) <= set(results["limits"])
    page = html.unescape((tmp_path / "run" / "report.html").read_text())
    card = DemoRetriever.from_pretrained(tmp_path / "run" / "retriever", device="cpu").card_data
    assert all(sentence in page and sentence in card["limits"] for sentence in told)


def test_tables_without_images(clip):
    support, queries = worded_table(12), worded_table(4, prefix="u")
    names = ["zero-shot", "si", "st", "mmices", "bm25"]
    results = evaluate_strategies(support, queries, names=names, shots=[1], lvlm=StubLVLM(), encoder=clip, task="vqa")
    assert list(results["strategies"]) == ["zero-shot", "st", "bm25"]
    assert "MMICES is left out: it compares images, and the tables have none." in results["limits"]
    with pytest.raises(EmptySupportError, match="SI \\(RICES\\) is left out"):
        evaluate_strategies(support, queries, names=["si"], shots=[1], lvlm=StubLVLM(), encoder=clip, task="vqa")
