"""README's table is written by the project: the same results give the same lines."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from drum_hf.errors import SavedFileError
from drum_hf.experiments.readme import BEGIN, END, EXAMPLE_BEGIN, EXAMPLE_END, main, results_block, write_results
from drum_hf.experiments.summary import read_json

TOP = Path(__file__).parents[2]
KEYS = {
    "zero-shot": "zero-shot", "random": "random", "fixed": "fixed", "BM25": "bm25", "ST": "st", "SI (RICES)": "si",
    "SIT": "sit", "SIT + draft": "sit+draft", "EPR": "epr", "DRUM (rank weights)": "drum-rank", "DRUM": "drum",
    "oracle (same answer)": "oracle",
}  # fmt: skip


def shown_results() -> dict:
    """The results that README's table shows, read back from it."""
    block = (TOP / "README.md").read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    lines = [line.replace("*", "") for line in block.splitlines() if line.startswith("| ")]
    strategies = {}
    for line in lines[1:]:
        name, main_cell, *others = (cell.strip() for cell in line.strip("|").split("|"))
        value, low, high = (float(number) / 100 for number in re.findall(r"[\d.]+", main_cell))
        row = strategies[KEYS[name]] = {"metric": value, "ci": [low, high], "by_shots": {}}
        for count, cell in zip((1, 2, 8), others, strict=True):
            if cell != "–":
                row["by_shots"][str(count)] = {"metric": float(cell) / 100}
    return {
        "task": "vqa", "shots": 4, "metric_name": "exact match", "scored_pairs": 18_000, "strategies": strategies,
        "world_seed": 0, "world": "standard", "command": "drum-hf demo --out out/demo",
    }  # fmt: skip


@pytest.fixture
def demo(tmp_path):
    out = tmp_path / "demo"
    out.mkdir()
    (out / "results.json").write_text(json.dumps(shown_results()))
    return out


def test_the_readme_is_as_it_would_be_written(tmp_path, demo, capsys):
    page = Path(shutil.copy(TOP / "README.md", tmp_path))
    main([str(demo), str(page)])
    assert page.read_text(encoding="utf-8") == (TOP / "README.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == f"{page}\n"


def test_other_results_replace_the_table_and_known_figures(tmp_path, demo):
    images = tmp_path / "docs" / "images"
    images.mkdir(parents=True)
    for name in ("shots.png", "why.png"):
        (images / name).write_bytes(b"old")
    for name in ("shots.png", "rounds.png"):
        (demo / name).write_bytes(b"new")
    results = read_json(demo, "results.json")
    results["strategies"]["drum"]["metric"] = 0.123
    (demo / "results.json").write_text(json.dumps(results))
    page = tmp_path / "README.md"
    page.write_text(f"before\n{BEGIN}\nstale\n{END}\nafter\n")
    assert write_results(demo, page) == [page, images / "shots.png"]
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
    assert "12.3" in text and "What `make demo` prints (VQA, world 0, exact match × 100, 18,000 pairs" in text
    assert {path.name: path.read_bytes() for path in images.iterdir()} == {"shots.png": b"new", "why.png": b"old"}
    write_results(demo, page)
    assert page.read_text(encoding="utf-8") == text


def test_the_example_is_run_beside_the_page(tmp_path, demo):
    page = tmp_path / "README.md"
    code = 'print("in", __import__("pathlib").Path("demo").is_dir())\n'
    before = f"{BEGIN}{END}\n{EXAMPLE_BEGIN}\n```python\n{code}```\n\n```text\nstale\n```\n{EXAMPLE_END}\n"
    page.write_text(before)
    write_results(demo, page)
    assert "stale" in page.read_text()  # without the demo's retriever the example can't be run
    (demo / "retriever").mkdir()
    write_results(demo, page)
    assert page.read_text().endswith(
        f"{EXAMPLE_BEGIN}\n```python\n{code}```\n\n```text\nin True\n```\n{EXAMPLE_END}\n"
    )
    for broken, said in (("1 / 0", "ZeroDivisionError"), (None, "found none")):
        page.write_text(before.replace(code, f"{broken}\n") if broken else before.replace("```python", "```"))
        text = page.read_text()
        with pytest.raises(SavedFileError, match=said):
            write_results(demo, page)
        assert page.read_text() == text


def test_other_runs_are_not_passed_off_as_the_demo(demo):
    results = read_json(demo, "results.json")
    assert "(VQA, world 0, hard, " in results_block(results | {"world": "hard"})
    command = "drum-hf demo --out out/demo --rounds 1"
    assert results_block(results | {"command": command}).startswith(f"What `{command}` prints")
    assert "(VQA, my_folder, " in results_block(results | {"world_seed": None, "data": "my_folder"})


@pytest.mark.parametrize("text", ["no marks", f"{END} {BEGIN}", f"{BEGIN} {END} {BEGIN} {END}"])
def test_a_page_without_its_marks_is_left_alone(tmp_path, demo, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(SavedFileError, match="results:begin"):
        write_results(demo, page)
    assert page.read_text() == text


def test_folders_without_one_tasks_results_are_refused(tmp_path, demo):
    with pytest.raises(SavedFileError, match=r"results\.json, written by drum-hf demo"):
        write_results(tmp_path, TOP / "README.md")
    (demo / "results.json").write_text(json.dumps({"tasks": {"vqa": shown_results()}}))
    with pytest.raises(SavedFileError, match="results of one task"):
        write_results(demo, TOP / "README.md")
