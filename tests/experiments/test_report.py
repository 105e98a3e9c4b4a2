"""The report: tables print the input's numbers, sentences claim no more than they show, pages stand alone."""

from __future__ import annotations

import copy
import html.parser
import itertools
import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from drum_hf.errors import ColumnError
from drum_hf.experiments import plots
from drum_hf.experiments.report import (
    format_limits,
    format_table,
    headline,
    limits,
    plot_pairs,
    plot_rounds,
    plot_shots,
    write_report,
)

METRICS = {
    "drum": 0.913,
    "oracle": 0.985,
    "zero-shot": 0.012,
    "random": 0.071,
    "fixed": 0.052,
    "bm25": 0.083,
    "st": 0.064,
    "si": 0.425,
    "sit": 0.446,
    "sit+draft": 0.517,
    "drum-rank": 0.678,
    "epr": 0.859,
}
NAMES = ["zero-shot", "random", "fixed", "BM25", "ST", "SI (RICES)", "SIT", "SIT + draft", "EPR"]
NAMES += ["DRUM (rank weights)", "DRUM", "oracle (same answer)"]


def estimate(metric: float, half: float = 0.02) -> dict[str, Any]:
    return {"metric": metric, "ci": [max(0.0, metric - half), metric + half]}


@pytest.fixture
def results() -> dict[str, Any]:
    strategies: dict[str, Any] = {}
    for key, metric in METRICS.items():
        strategies[key] = estimate(metric)
        if key != "zero-shot":
            strategies[key]["by_shots"] = {"1": estimate(metric / 2), "4": estimate(metric)}
        if key in ("drum", "drum-rank", "epr"):
            strategies[key]["by_pairs"] = [[6000, metric - 0.05], [24000, metric]]
            strategies[key]["by_round"] = [metric - 0.05, metric]
    return {
        "task": "vqa",
        "world_seed": 3,
        "world": "standard",
        "shots": 4,
        "seconds": 312.0,
        "scored_pairs": 24000,
        "strategies": strategies,
        "command": "drum-hf demo --data '<here>'",
        "versions": {"torch": "2.13"},
    }


def duel(drum: dict[str, Any], epr: dict[str, Any], **extra: Any) -> str:
    return headline({"task": "vqa", "shots": 4, "strategies": {"drum": drum, "epr": epr}, **extra})["vqa"]


def example(prompt: str = "what colour?", size: int = 32) -> dict[str, Any]:
    image = Image.fromarray(np.arange(size * size * 3, dtype=np.uint8).reshape(size, size, 3))
    demo = {"image": image, "prompt": prompt, "response": "red: wug", "score": 0.8125, "utility": 1.25, "note": None}
    bad = {**demo, "response": "red: dax", "utility": -0.5, "note": "other site", "image": None}
    return {
        "query": {"image": image, "prompt": prompt, "gold": "red: wug", "draft": "red: dax"},
        "columns": {
            "SIT + draft": {"demonstrations": [bad], "answer": "red: dax", "correct": False},
            "DRUM": {"demonstrations": [demo, bad], "answer": "red: wug", "correct": True},
        },
    }


class Page(html.parser.HTMLParser):
    """Checks nesting, and collects tags, references, alternative texts and text."""

    VOID = frozenset({"meta", "link", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")
        ]
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def assert_drawn(path: Any, least: int = 2500) -> None:
    """A PNG of some size, in which DRUM's colour covers a line and not only a label."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) > 300
    assert (pixels == (0xD5, 0x5E, 0x00)).all(axis=2).sum() > least


def test_table_holds_every_number_in_a_sensible_order(results: dict[str, Any]) -> None:
    lines = format_table(results).splitlines()
    assert "accuracy × 100" in lines[0]
    assert lines[1].split() == ["strategy", "4", "shots", "[95%", "interval]", "1", "shot"]
    rows = lines[3:-1]
    assert [row[: len("oracle (same answer)")].rstrip(" *") for row in rows] == NAMES
    for key, metric in METRICS.items():
        row = rows[NAMES.index(plots._NAMES[key])]
        low, high = results["strategies"][key]["ci"]
        assert f"{100 * metric:.1f} [{100 * low:.1f}, {100 * high:.1f}]" in row
        assert row.endswith("–" if key == "zero-shot" else f"{100 * metric / 2:.1f}")
    assert [row for row in rows if "*" in row] == [rows[NAMES.index("DRUM")]]
    assert len({len(row) for row in rows}) == 1


@given(st.floats(0, 3), st.floats(0, 3), st.floats(0, 3))
def test_markdown_rows_read_back(metric: float, low: float, high: float) -> None:
    low, high = sorted((low, high))
    table = format_table(
        {"task": "captioning", "shots": 2, "strategies": {"a|b": {"metric": metric, "ci": [low, high]}}},
        style="markdown",
    )
    assert "CIDEr-D × 100" in table
    cells = table.splitlines()[-1].replace(r"\|", "¦").strip("| ").split(" | ")
    numbers = [float(n) for n in cells[1].translate(str.maketrans("[],", "   ")).split()]
    assert cells[0] == "a¦b"
    assert numbers == pytest.approx([100 * metric, 100 * low, 100 * high], abs=0.0501)


def test_latex_is_escaped_and_marks_the_best(results: dict[str, Any]) -> None:
    results["strategies"]["my_r&d"] = {"metric": 0.1}
    table = format_table(results, style="latex")
    assert r"my\_r\&d & 10.0 & -- \\" in table
    assert r"\textbf{DRUM} & \textbf{91.3 [89.3, 93.3]} & \textbf{45.6}" in table
    body = table.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    assert len(body) == len(METRICS) + 1
    assert all(line.replace(r"\&", "").count("&") == 2 and line.endswith(r" \\") for line in body)


def test_unknown_style_and_strategies(results: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'latex', found 'html'"):
        format_table(results, style="html")  # type: ignore[arg-type]
    results["strategies"]["mmices"] = {"metric": 0.3}
    results["strategies"]["mine"] = {"metric": 0.99, "by_round": [0.99]}
    keys = [s.key for s in plots.read_results(results)[0].strategies]
    assert keys[keys.index("sit+draft") + 1] == "mmices"
    assert keys[keys.index("epr") + 1] == "mine"
    assert "mine *" in format_table(results)


def test_headline_claims_only_what_the_intervals_show() -> None:
    assert "ahead of EPR (85.0)" in duel(estimate(0.91), estimate(0.85))
    assert "behind EPR (97.0)" in duel(estimate(0.91), estimate(0.97))
    for unclear in (duel(estimate(0.91), estimate(0.88)), duel({"metric": 0.99}, {"metric": 0.1})):
        assert "ahead" not in unclear
        assert "behind" not in unclear
        assert "do not tell it from EPR" in unclear


def test_headline_prefers_the_paired_interval_either_way_round() -> None:
    narrow = {"mean": 0.03, "lo": 0.01, "hi": 0.05, "p": 0.003}
    wide = {"mean": 0.06, "lo": -0.01, "hi": 0.13, "p": 0.1}
    near, far = estimate(0.88), estimate(0.85)
    assert "ahead of EPR" in duel(estimate(0.91), near, paired={"drum - epr": narrow})
    assert "behind EPR" in duel(estimate(0.91), near, paired={"epr - drum": narrow})
    assert "do not tell it from EPR" in duel(estimate(0.91), far, paired={"drum - epr": wide})


@given(st.lists(st.floats(0, 1), min_size=6, max_size=6))
def test_headline_never_claims_a_win_over_an_overlapping_interval(values: list[float]) -> None:
    (low, drum, high), (other_low, epr, other_high) = sorted(values[:3]), sorted(values[3:])
    text = duel({"metric": drum, "ci": [low, high]}, {"metric": epr, "ci": [other_low, other_high]})
    assert ("ahead of" in text) == (low > other_high)
    assert ("behind" in text) == (high < other_low)


def test_headline_without_anything_learnt_or_comparable() -> None:
    only: dict[str, Any] = {"task": "vqa", "shots": 4, "strategies": {"si": estimate(0.4), "oracle": estimate(0.9)}}
    assert "No learnt strategy was evaluated" in headline(only)["vqa"]
    del only["strategies"]["si"]
    assert "nothing to compare" in headline(only)["vqa"]


@given(st.lists(st.floats(-2, 3), min_size=1, max_size=12))
def test_labels_stand_apart_within_bounds_in_order(values: list[float]) -> None:
    values, gap = sorted(values), 0.05
    moved = plots._spread(values, gap, 0.0, 1.0)
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(moved))
    assert moved[0] >= -1e-9
    assert moved[-1] <= 1 + 1e-9
    assert plots._spread(moved, gap, 0.0, 1.0) == pytest.approx(moved)  # what already stands apart stays


def test_labels_move_as_little_as_possible() -> None:
    assert plots._spread([0.5, 0.5, 0.5], 0.1, 0.0, 1.0) == pytest.approx([0.4, 0.5, 0.6])
    assert plots._spread([0.2, 0.5, 0.52], 0.1, 0.0, 1.0) == pytest.approx([0.2, 0.46, 0.56])


@pytest.mark.parametrize("draw", [plot_shots, plot_pairs, plot_rounds])
def test_figures_are_drawn_without_touching_pyplot(draw: Any, results: dict[str, Any], tmp_path: Any) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    path = draw(results, tmp_path / "made" / "figure.png")
    assert path == tmp_path / "made" / "figure.png"
    assert_drawn(path)
    assert dict(matplotlib.rcParams) == before


def test_figure_with_one_shot_count_and_a_panel_for_each_task(results: dict[str, Any], tmp_path: Any) -> None:
    several = {"tasks": {"vqa $x": results, "captioning": copy.deepcopy(results)}}
    for strategy in results["strategies"].values():
        strategy.pop("by_shots", None)
    assert_drawn(plot_shots(results, tmp_path / "one.png"), least=150)
    assert_drawn(plot_shots(several, tmp_path / "two.png"))
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert two.height > 1.7 * one.height


def test_missing_curves(results: dict[str, Any], tmp_path: Any) -> None:
    del results["strategies"]["epr"]["by_pairs"]
    results["strategies"]["drum-rank"]["by_pairs"] = []
    assert_drawn(plot_pairs(results, tmp_path / "pairs.png"))
    write_report(results, [], tmp_path)
    del results["strategies"]["drum"]["by_pairs"]
    with pytest.raises(ColumnError, match="by_pairs"):
        plot_pairs(results, tmp_path / "none.png")
    page = Page(write_report(results, [], tmp_path).read_text(encoding="utf-8"))
    assert len(page.images) == 2
    assert not (tmp_path / "pairs.png").exists()  # the earlier report's


def test_report_stands_alone(results: dict[str, Any], tmp_path: Any) -> None:
    results["paired"] = {"drum - epr": {"mean": 0.054, "lo": 0.031, "hi": 0.077, "p": 0.0001}}
    path = write_report(results, [example(), example(size=400)], tmp_path / "out")
    page = Page(path.read_text(encoding="utf-8"))
    assert page.references
    assert all(ref.startswith(("data:", "#")) for ref in page.references)
    assert not {"script", "iframe", "object"} & set(page.tags)
    assert "url(" not in path.read_text(encoding="utf-8")
    assert "@import" not in path.read_text(encoding="utf-8")
    assert all(image["alt"] for image in page.images)
    assert len(page.images) == 3 + 2 * 2  # plots; a query and a demonstration with a picture in each example
    for text in [*NAMES, "91.3 [89.3, 93.3]", "DRUM − EPR: +5.4 [+3.1, +7.7], p < 0.001"]:
        assert text in page.text
    for text in ("0.812", "+1.25", "-0.50", "other site", "no image", "✓ right", "✗ wrong", "torch 2.13"):
        assert text in page.text
    assert headline(results)["vqa"] in page.text
    assert "drum-hf demo --data '<here>'" in page.text
    assert "generated world (standard, seed 3) · 24,000 pairs scored by the LVLM · 5 min 12 s" in page.text
    assert sorted(p.name for p in path.parent.iterdir()) == sorted(
        ["report.html", "results.json", "table.md", "shots.png", "pairs.png", "rounds.png"]
    )
    assert json.loads((path.parent / "results.json").read_text(encoding="utf-8")) == results
    assert (path.parent / "table.md").read_text(encoding="utf-8").strip() == format_table(results, style="markdown")


def test_users_text_is_escaped_everywhere(results: dict[str, Any], tmp_path: Any) -> None:
    evil = '<script>alert("1")</script>'
    shown = example(prompt=evil)
    shown["query"].update(gold=evil, draft=evil)
    shown["columns"][evil] = {**shown["columns"].pop("DRUM"), "answer": evil}
    shown["columns"][evil]["demonstrations"][0].update(response=evil, note=evil)
    results["strategies"][evil] = {"metric": 0.5}
    for key in ("task", "metric_name", "data", "command"):
        results[key] = evil
    results["versions"] = {evil: evil}
    results["paired"] = {f"{evil} - drum": {"mean": 0.0, "lo": -1.0, "hi": 1.0, "p": 0.9}}
    text = write_report(results, [shown], tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert "<script" not in text
    assert "script" not in page.tags
    assert page.text.count(evil) >= 12
    assert any(evil in (image["alt"] or "") for image in page.images)
    assert r"\<script\>" in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert not re.search(r"(?<!\\)<", (tmp_path / "table.md").read_text(encoding="utf-8"))


def test_several_tasks_get_a_section_and_files_each(results: dict[str, Any], tmp_path: Any) -> None:
    other = copy.deepcopy(results)
    other["strategies"] = {"drum": estimate(1.234)}
    both = {"tasks": {"vqa": results, "image captioning": other}, "command": "drum-hf demo"}
    shown = [{**example("of vqa"), "task": "vqa"}, {**example("of none")}]
    path = write_report(both, shown, tmp_path)
    page = Page(path.read_text(encoding="utf-8"))
    assert page.text.index("of vqa") < page.text.index("123.4")
    assert page.text.index("of none") > page.text.index("123.4 [121.4, 125.4]")
    assert page.tags.count("h2") == 4  # the tasks, the examples of no task, how to read
    names = {p.name for p in tmp_path.glob("*.png")}
    assert names == {"vqa-shots.png", "vqa-pairs.png", "vqa-rounds.png", "image-captioning-shots.png"}
    for table in (format_table(both), format_table(both, style="latex")):
        assert "CIDEr-D" in table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("shots"), "needs the key 'shots'"),
        (lambda r: r.pop("task"), "needs the key 'task'"),
        (lambda r: r.update(strategies={}), "a strategy or more"),
        (lambda r: r["strategies"]["epr"].pop("metric"), r"\['epr'\] needs the key 'metric'"),
        (lambda r: r["strategies"]["epr"].update(metric=float("nan")), "finite number, found nan"),
        (lambda r: r["strategies"]["epr"].update(ci=[0.9]), "two numbers"),
        (lambda r: r["strategies"]["epr"].update(ci=[0.9, 0.1]), "swap"),
        (lambda r: r["strategies"]["epr"].update(by_shots={"four": {}}), "whole numbers"),
        (lambda r: r["strategies"]["epr"].update(by_pairs=7), "a list"),
        (lambda r: r.update(paired=[1]), "an object"),
        (lambda r: r.update(seconds=np.float32(3)), "JSON"),
        (lambda r: r.update(tasks={}), "add a task"),
    ],
)
def test_broken_results_are_named_and_nothing_is_written(
    change: Any, message: str, results: dict[str, Any], tmp_path: Any
) -> None:
    change(results)
    with pytest.raises(ColumnError, match=message):
        write_report(results, [], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_broken_examples_are_named(results: dict[str, Any], tmp_path: Any) -> None:
    with pytest.raises(ColumnError, match=r"examples\[1\] lacks the key 'columns'"):
        write_report(results, [example(), {"query": {}}], tmp_path)
    shown = example()
    shown["query"]["image"] = "bus.jpg"
    with pytest.raises(ColumnError, match=r"PIL image or None, found 'bus.jpg'"):
        write_report(results, [shown], tmp_path)


# What a run can't show


def told_of(strategies, **more):
    (found,) = limits({"task": "vqa", "shots": 1, "strategies": strategies} | more).values()
    return found


def between(low, high):
    return {"metric": (low + high) / 2, "ci": [low, high]}


def test_what_a_run_can_not_show_is_told():
    clear = {"drum": between(0.6, 0.7), "si": between(0.2, 0.3), "zero-shot": between(0, 0.1)}
    assert told_of(clear, queries=200) == []
    assert told_of(clear, limits=["as noted"], queries=200) == ["as noted"]
    (few,) = told_of(clear, queries=1)
    assert few.startswith("Only 1 query was asked") and "ask 30" in few
    (behind,) = told_of({"drum": between(0.1, 0.2), "si": between(0.3, 0.4)})
    assert behind.startswith("DRUM is behind SI (RICES)") and "use SI (RICES)" in behind
    (unclear,) = told_of({"drum": between(0.1, 0.4), "si": between(0.0, 0.3)})
    assert "do not tell DRUM from SI (RICES)" in unclear and "intervals overlap: ask more queries, or" in unclear
    useless = {**clear, "drum": between(0.7, 0.8), "oracle": between(0.0, 0.1)}
    assert [sentence[:47] for sentence in told_of(useless)] == ["Even demonstrations with the gold answer do no "]
    nothing = {"drum": between(0, 0), "si": between(0, 0)}
    assert [sentence[:29] for sentence in told_of(nothing)] == ["No strategy gets a single ans"]


def test_how_many_queries_would_tell():
    # half the interval is 4 times the difference: 16 times as many queries
    paired = {"drum - si": {"mean": 0.02, "lo": -0.06, "hi": 0.10, "p": 0.6}}
    (told,) = told_of({"drum": between(0.1, 0.4), "si": between(0.1, 0.3)}, paired=paired, queries=100)
    assert "-6.0 to +10.0, holds 0: ask more queries (a difference of this size takes about 2,000, and there" in told


def test_limits_are_in_the_report_and_the_terminal(tmp_path):
    results = {"task": "vqa", "shots": 1, "strategies": {"drum": between(0.6, 0.7)}, "limits": ["<b> of the run"]}
    page = write_report(results, out_dir=tmp_path).read_text(encoding="utf-8")
    assert "<li>&lt;b&gt; of the run</li>" in page
    assert format_limits(results) == "note: <b> of the run\n"
    assert format_limits({"task": "vqa", "shots": 1, "strategies": {"drum": between(0.6, 0.7)}}) == ""
