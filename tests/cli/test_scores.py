"""`drum-hf scores`, as a user types it."""

from __future__ import annotations

import json
import os

import pytest

from drum_hf.cli import main
from drum_hf.data import load_table
from drum_hf.scores.store import RequestParts, ScoreStore

LVLMS = {
    "f" * 32: {"name": "me/vlm", "revision": "0123456789", "dtype": "float32", "chat_template": "a" * 32},
    "e" * 32: {"name": "me/other", "revision": None, "dtype": "bfloat16", "chat_template": "b" * 32},
}


def run(*words):
    return main(["-q", "scores", *map(str, words)])


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("id,prompt,response\n" + "".join(f"r{i},What is {i}?,{i}\n" for i in range(10)))
    return path


@pytest.fixture
def store(tmp_path, table):
    """Each row scored after the next one, by two LVLMs; the first also drafted an answer to something else."""
    path = tmp_path / "s.sqlite"
    rows = load_table(table)
    with ScoreStore(path) as store:
        for fingerprint, identity in LVLMS.items():
            parts = [
                RequestParts(query, (rows.keys[(i + 1) % 10],), (rows.responses[i],))
                for i, query in enumerate(rows.query_keys)
            ]
            keys = [part.key(fingerprint) for part in parts]
            store.put_scores(keys, [-1.0] * 10, fingerprint=fingerprint, parts=parts, identity=identity)
        draft = RequestParts("0" * 32, max_new_tokens=5)
        store.put_texts([draft.key("f" * 32)], ["red"], fingerprint="f" * 32, parts=[draft])
    return path


def test_stats(store, capsys):
    assert run("stats", store) == 0
    first, *lvlms = capsys.readouterr().out.splitlines()
    assert first.startswith("20 scores, 1 generations, ") and first.endswith(" kB")
    assert lvlms == [
        f"{'f' * 32}  10 scores, 1 generations  me/vlm @01234567 float32",
        f"{'e' * 32}  10 scores, 0 generations  me/other bfloat16",
    ]
    assert run("stats", store, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["lvlms"][1] == {"fingerprint": "e" * 32, "scores": 10, "texts": 0, "lvlm": LVLMS["e" * 32]}
    assert (said["scores"], said["texts"], said["bytes"]) == (20, 1, os.path.getsize(store))


def test_export_and_import(store, tmp_path, capsys):
    file, new = tmp_path / "s.parquet", tmp_path / "new.sqlite"
    assert run("export", store, file) == run("import", file, new) == run("import", file, new) == 0
    said = capsys.readouterr().out
    assert f"20 scores and 1 generations in {file}" in said and f"21 new, 0 known before, in {new}" in said
    assert f"0 new, 21 known before, in {new}" in said and "differ" not in said
    with ScoreStore(store) as one, ScoreStore(new) as two:
        assert list(one.entries()) == list(two.entries())
    with ScoreStore(new) as two:
        two._backend.connection.execute("UPDATE scores SET value = -2.0")
    told = json.loads((tmp_path / "s.parquet.manifest.json").read_text())
    with ScoreStore(store) as one:
        assert told["settings"]["fingerprints"] == sorted(one.identities())
    assert run("import", file, new) == 0
    assert "20 of the known ones differ from the file's" in capsys.readouterr().out


@pytest.mark.parametrize("which", [["--fingerprint", "eee"], ["--lvlm", "me/other"], ["--fingerprint", "e" * 32]])
def test_one_lvlm_is_exported(store, tmp_path, capsys, which):
    assert run("export", store, tmp_path / "e.parquet", *which) == 0
    assert "10 scores and 0 generations" in capsys.readouterr().out
    new = tmp_path / "new.sqlite"
    assert run("export", store, tmp_path / "f.parquet", "--lvlm", "me/vlm") == 0
    assert run("import", tmp_path / "f.parquet", new) == 0
    assert run("import", tmp_path / "e.parquet", new) == 2
    said = capsys.readouterr().err
    assert f"expected scores of {new}, got scores of another LVLM" in said
    assert (
        "dtype differs: float32 here, bfloat16 there; chat template differs: aaaaaaaa… here, bbbbbbbb… there" in said
    )
    assert run("import", tmp_path / "e.parquet", new, "--any-lvlm") == 0


def test_the_lvlm_that_is_named_is_loaded_and_compared(store, tmp_path, capsys):
    from drum_hf.lvlm.local.model import TransformersLVLM

    lvlm = TransformersLVLM.from_pretrained("playground/lvlm", dtype="float32")
    assert lvlm.identity["name"] == "playground/lvlm" and lvlm.identity["dtype"] == "float32"
    file, new = tmp_path / "s.parquet", tmp_path / "new.sqlite"
    assert run("export", store, file, "--lvlm", "me/vlm") == 0
    assert run("import", file, new, "--lvlm", "playground/lvlm", "--dtype", "float32") == 2
    said = capsys.readouterr().err
    assert "expected scores of the LVLM given" in said and "name differs: playground/lvlm here, me/vlm there" in said
    own = RequestParts("q", ("d",), ("r",))
    with ScoreStore(tmp_path / "own.sqlite") as mine:
        mine.put_scores([own.key(lvlm.fingerprint)], [-1.0], fingerprint=lvlm.fingerprint, parts=[own])
    assert run("export", tmp_path / "own.sqlite", file) == 0
    assert run("import", file, store, "--lvlm", "playground/lvlm", "--dtype", "float32") == 0
    assert run("import", file, store, "--lvlm", "playground/lvlm", "--any-lvlm") == 2


def test_gc(store, table, tmp_path, capsys):
    assert run("gc", store) == 2
    assert "nothing is removed without a criterion" in capsys.readouterr().err
    assert run("gc", store, "--data", table, "--dry-run") == 0
    assert "0 scores and 1 generations would be removed, about " in capsys.readouterr().out
    assert run("gc", store, "--data", table) == 0
    assert "0 scores and 1 generations removed, " in capsys.readouterr().out
    lines = table.read_text().splitlines()
    table.write_text("\n".join(lines[:6]) + "\n")  # the first five rows: four pairs
    more = tmp_path / "more.csv"
    more.write_text("\n".join([lines[0], *lines[6:8]]) + "\n")  # two more rows, and two more pairs
    assert run("gc", store, "--data", table, more, "--keep", "f") == 0
    assert "14 scores and 0 generations removed" in capsys.readouterr().out
    with ScoreStore(store) as left:
        assert len(left) == 6 and list(left.identities()) == ["f" * 32]
        left.put_scores([b"old"], [-1.0], fingerprint="f" * 32)
    assert run("gc", store, "--data", table) == 0
    said = capsys.readouterr().out
    assert "2 scores and 0 generations removed" in said and "1 of these were kept since it is not known" in said
    assert run("gc", store, "--drop", "ff") == 0
    with ScoreStore(store) as left:
        assert len(left) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stats", "none.sqlite"], "there is no none.sqlite"),
        (["import", "none.parquet", "new.sqlite"], "there is no none.parquet"),
        (["export", "s.sqlite", "x.parquet", "--fingerprint", "a"], "one fingerprint that begins with 'a', got 0"),
        (["gc", "s.sqlite", "--keep", ""], "one fingerprint that begins with '', got 2"),
        (["export", "s.sqlite", "x.parquet", "--lvlm", "no"], "under 'no'; it has me/other, me/vlm"),
    ],
)
def test_what_is_not_there_is_named_and_nothing_is_made(store, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir())
    assert run(*words) == 2
    assert said in capsys.readouterr().err and sorted(os.listdir()) == before


def test_a_strangers_names_do_not_reach_the_terminal_raw(tmp_path, capsys):
    path = tmp_path / "s.sqlite"
    with ScoreStore(path) as made:
        identity = {"name": "\x1b]0;owned\x07\x1b[8mhidden", "dtype": "float32\nfake line: all checked, safe"}
        made.put_scores([b"k" * 16], [-1.0], fingerprint="94c5\x1b[2K\rforged\n0 scores", identity=identity)
    assert run("stats", path) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("1 scores, 0 generations") and second == (
        r"94c5\x1b[2K\rforged\n0 scores  1 scores, 0 generations  \x1b]0;owned\x07\x1b[8mhidden "
        r"float32\nfake line: all checked, safe"
    )
    for words in (["gc", path, "--drop", "x"], ["export", path, tmp_path / "x.parquet", "--lvlm", "x"]):
        assert run(*words) == 2
        said = capsys.readouterr().err
        assert "\x1b" not in said and len(said.splitlines()) == 1
