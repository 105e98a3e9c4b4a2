"""The command line, as a user types it."""

from __future__ import annotations

import argparse
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from drum_hf import cli
from drum_hf.cli import main, options
from drum_hf.cli.options import training_options
from drum_hf.data import load_table
from drum_hf.errors import ModelError
from drum_hf.experiments.demo import Settings
from drum_hf.playground import make_world
from drum_hf.retriever.retriever import DemoRetriever

FEW = ["--rounds", "1", "--candidates", "4", "--epochs", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Forty rows of a world as a user has them: a CSV beside its pictures."""
    import csv

    here = tmp_path_factory.mktemp("data")
    world = make_world(21, difficulty="easy")
    with open(here / "table.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "image", "question", "answer", "group"])
        for row in list(world.support)[:40]:
            row.image.save(here / f"{row.id}.png")
            writer.writerow([row.id, f"{row.id}.png", row.prompt, row.response, row.group])
    return here


def test_help_is_light_and_lists_the_verbs():
    code = (
        "import sys, drum_hf.cli as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'faiss', 'sentence_transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in ("demo", "train", "score", "eval", "index"))


def test_train_again_eval_and_index(folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["-q", "train", "--data", str(folder), "--out", str(out), *FEW]) == 0
    said = capsys.readouterr().out
    assert "160 scored pairs" in said and "loss" not in said
    retriever = DemoRetriever.from_pretrained(out / "retriever")
    assert retriever.teacher is not None and retriever.teacher["fingerprint"]
    again = ["-q", "train", "--data", str(folder), "--out", str(out), *FEW]
    assert main(again) == 0  # the retriever is as the first run left it
    (out / "training" / "saved_retriever.json").unlink()  # killed before its note
    assert main(again) == 0
    capsys.readouterr()

    queries, results = tmp_path / "queries", tmp_path / "r.json"
    queries.mkdir()
    rows = []
    for row in list(make_world(21, difficulty="easy").queries)[:6]:
        row.image.save(queries / f"{row.id}.png")
        rows.append({"id": row.id, "image": f"{row.id}.png", "prompt": row.prompt, "response": row.response})
    (queries / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["-q", "eval", "--retriever", str(out / "retriever"), "--queries", str(queries), "--shots", "1,2"]
    command += ["--strategies", "zero-shot,sit,drum", "--json", str(results)]
    assert main(command) == 0
    assert "DRUM" in capsys.readouterr().out
    assert set(json.loads(results.read_text())["strategies"]) == {"zero-shot", "sit", "drum"}

    assert main(["-q", "eval", "--retriever", str(out), "--queries", str(queries)]) == 2
    assert f"give {out / 'retriever'}" in capsys.readouterr().err
    assert main(["-q", "eval", "--retriever", str(out / "retriever"), "--queries", str(folder)]) == 2
    assert "take other queries" in capsys.readouterr().err

    first = retriever.support.ids[0]
    assert main(["-q", "index", str(out / "retriever"), "--remove", first]) == 0
    assert "39 demonstrations" in capsys.readouterr().out
    assert first not in DemoRetriever.from_pretrained(out / "retriever").support

    # changed since: training again would lose that
    for more in ([], ["--restart"]):
        assert main([*again, *more]) == 2
        assert f"{out / 'retriever'} as a training left it; it was changed since" in capsys.readouterr().err
    (out / "training" / "saved_retriever.json").unlink()
    assert main(again) == 2 and "move that folder away" in capsys.readouterr().err
    assert len(DemoRetriever.from_pretrained(out / "retriever").support) == 39
    (out / "retriever").rename(out / "mine")
    assert main(again) == 0 and len(DemoRetriever.from_pretrained(out / "retriever").support) == 40


def test_score_prices_before_it_bills(folder, tmp_path, capsys):
    store = tmp_path / "scores.sqlite"
    command = ["-q", "score", "--data", str(folder), "--store", str(store), "--candidates", "3"]
    assert main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "120 new pairs, 0 already in the store" in said and "prompt tokens" in said
    assert main(command) == 0
    assert "120 pairs scored; " in capsys.readouterr().out  # beside zero-shot scores and the dry run's guesses
    told = json.loads((tmp_path / "scores.sqlite.manifest.json").read_text())
    assert told["data"]["support"] == told["data"]["queries"] == load_table(folder).fingerprint
    assert told["lvlm"]["name"] == "playground/lvlm" and told["settings"]["encoder"] == "playground/clip"
    assert main([*command, "--dry-run"]) == 0
    assert "0 new pairs, 120 already in the store" in capsys.readouterr().out


def test_index_builds_hnsw(folder, tmp_path, capsys):
    assert (
        main(["-q", "index", str(tmp_path / "new"), "--data", str(folder), "--kind", "hnsw", "--shard-rows", "2"]) == 0
    )
    assert "index='hnsw'" in capsys.readouterr().out
    assert main(["-q", "index", str(tmp_path / "new"), "--data", str(folder)]) == 2
    assert "--add" in capsys.readouterr().err
    assert main(["-q", "index", str(tmp_path / "none"), "--data", str(folder), "--shard-rows", "0"]) == 2
    assert "shard_rows is a whole number" in capsys.readouterr().err


def test_demo_writes_what_it_promises(tmp_path, capsys):
    out, results = tmp_path / "demo", tmp_path / "demo.json"
    small = ["--world", "easy", "--world-seed", "22", "--by-shots", "1", "--shots", "2", *FEW]
    assert main(["-q", "demo", "--out", str(out), "--json", str(results), *small]) == 0
    said = capsys.readouterr().out
    assert "DRUM" in said and "report.html" in said
    content = json.loads(results.read_text())
    beside = json.loads((tmp_path / "demo.manifest.json").read_text())
    inside = json.loads((out / "manifest.json").read_text())
    assert beside["lvlm"] == inside["lvlm"] and beside["settings"] == inside["settings"]
    assert list(beside["data"].values()) == [inside["data"]["support"], inside["data"]["queries"]]
    assert {"task", "world_seed", "shots", "seconds", "scored_pairs", "strategies"} <= set(content)
    names = [
        "zero-shot",
        "random",
        "fixed",
        "si",
        "st",
        "sit",
        "sit+draft",
        "bm25",
        "epr",
        "drum",
        "drum-rank",
        "oracle",
    ]
    assert set(content["strategies"]) == set(names)
    for name, row in content["strategies"].items():
        assert row["ci"][0] <= row["metric"] <= row["ci"][1]
        if name != "zero-shot":
            assert set(row["by_shots"]) == {"1", "2"}
    assert [pairs for pairs, _ in content["strategies"]["drum"]["by_pairs"]] == [0, 960]
    assert content["strategies"]["epr"]["by_pairs"][1][0] == 960
    assert (out / "report.html").exists() and list(out.glob("*.png"))
    texts = [*out.glob("*.json"), *out.glob("*.html"), *out.glob("*.md"), *tmp_path.glob("*.json")]
    assert len(texts) > 4 and [path.name for path in texts if str(tmp_path) in path.read_text()] == []
    assert content["command"].startswith("drum-hf")
    assert len(DemoRetriever.from_pretrained(out / "retriever")) == 240


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["train", "--data", "nowhere.csv", "--out", "x"], "nowhere.csv"),
        (["eval", "--shots", "1"], "--data"),
        (["eval", "--data", "DATA", "--strategies", "psychic"], "psychic"),
        (["eval", "--data", "DATA", "--strategies", "drum"], "--retriever"),
        (["eval", "--data", "DATA", "--strategies", "random", "--shots", "1,99"], "got 99"),
        (["eval", "--data", "DATA", "--strategies", "random", "--metric", "bleu"], "bleu"),
        (["demo", "--data", "DATA", "--task", "all"], "--task"),
        (["score", "--data", "DATA", "--store", "DATA"], ""),
        (["train", "--data", "DATA", "--out", "x", "--lvlm", "no/such"], "an LVLM, got 'no/such'"),
        (["train", "--data", "DATA", "--out", "x", "--lvlm", "playground/lvml"], "that ship are playground/clip, "),
        (["demo", "--data", "DATA", "--lvlm", "no/such", "--columns", "prompt=nowhere"], "nowhere"),  # data first
        (["train", "--data", "DATA", "--out", "x", "--encoder", "no/such"], "a CLIP or SigLIP, got 'no/such'"),
        (["train", "--data", "DATA", "--out", "x", "--device", "gpu7"], "--device"),
        (["train", "--data", "/dev/null", "--out", "x"], "/dev/null: expected a table"),
        (["train", "--data", "DATA", "--out", "x", "--columns", "response=nowhere"], "nowhere"),
    ],
)
def test_faults_are_one_line_and_exit_2(command, words, folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["-q", *(str(folder) if part == "DATA" else part for part in command)]) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        (["train"], "Train a retriever for your LVLM and data."),
        (["scores", "push"], "Upload scores to a data set repository on the Hub."),
    ],
)
def test_a_verbs_help_says_what_it_does(verb, words, capsys):
    with pytest.raises(SystemExit):
        main([*verb, "--help"])
    assert words in " ".join(capsys.readouterr().out.split())


def test_the_help_tells_the_defaults_of_training():
    settings, parser = Settings(), argparse.ArgumentParser()
    training_options(parser)
    told = {action.dest: re.search(r"\((\S+)\)$", action.help or "") for action in parser._actions}
    names = {"rounds", "candidates", "epochs", "learning_rate", "batch", "list_size"}
    for name in names:
        found = told[name]
        assert found is not None
        assert float(found[1]) == getattr(settings, "batch_size" if name == "batch" else name)


def test_columns_of_other_names(folder, tmp_path, capsys):
    table = tmp_path / "german.csv"
    lines = (folder / "table.csv").read_text().replace("question,answer", "frage,antwort", 1)
    table.write_text(lines)
    names = ["--columns", "prompt=frage", "response=antwort", "--image-root", str(folder)]
    assert main(["data", "check", str(table), *names]) == 0
    assert main(["-q", "index", str(tmp_path / "built"), "--data", str(table), *names]) == 0
    assert "40 demonstrations" in capsys.readouterr().out


# ---- what is said, and who is asked ----


def test_the_teacher_answers_unless_another_is_named(monkeypatch):
    asked = []
    monkeypatch.setattr(options, "load_lvlm", lambda args: asked.append((args.lvlm, args.lvlm_revision)))
    parser = argparse.ArgumentParser()
    options.model_options(parser)
    options.default_to_teacher(parser)
    taught = SimpleNamespace(teacher={"name": "me/vlm", "revision": "0123abc"})
    for words, retriever in (([], taught), (["--lvlm", "me/other"], taught), ([], SimpleNamespace(teacher=None))):
        options.load_teacher(parser.parse_args(words), retriever)
    assert asked == [("me/vlm", "0123abc"), ("me/other", None), ("playground/lvlm", None)]

    def missing(args):
        raise ModelError(f"there is no {args.lvlm}")

    monkeypatch.setattr(options, "load_lvlm", missing)
    with pytest.raises(ModelError, match=r"no me/vlm; it is what the retriever learned from: .*--lvlm"):
        options.load_teacher(parser.parse_args([]), taught)


@pytest.mark.parametrize(
    ("name", "level", "message", "shown"),
    [
        ("drum_hf.training", logging.INFO, "round 2 of 3", True),
        ("bm25s", logging.DEBUG, "Building index from tokens", False),
        ("datasets", logging.WARNING, "a file is broken", True),
        (
            "transformers",
            logging.WARNING,
            "`f` is falling back to its reference PyTorch implementation because",
            False,
        ),
    ],
)
def test_what_the_command_line_tells(monkeypatch, name, level, message, shown):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    record = logging.LogRecord(name, level, __file__, 1, message, (), None)
    assert cli._is_worth_telling(record) is shown


def test_the_splits_of_a_table(tmp_path):
    from drum_hf.cli.options import data_options, read_tables

    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text(f"question,answer\nof {split}?,{split}\n")
    parser = argparse.ArgumentParser()
    data_options(parser, required=True)
    given = ["--data", str(tmp_path), "--split", "train", "--query-split", "test"]
    support, queries = read_tables(parser.parse_args(given))
    assert (support.responses, queries.responses) == (["train"], ["test"])
    given = ["--data", str(tmp_path / "train.csv"), "--queries", str(tmp_path), "--query-split", "test"]
    assert [table.responses for table in read_tables(parser.parse_args(given))] == [["train"], ["test"]]
