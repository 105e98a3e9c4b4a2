"""Full disks, folders that can't be written, two commands at once, and clocks that jump."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_encoders import picture

from drum_hf.cli import main
from drum_hf.data import TripletTable
from drum_hf.errors import SavedFileError
from drum_hf.experiments.suites.cells import CellFiles, Values
from drum_hf.index.demo_index import DemoIndex
from drum_hf.index.sharded import ShardedIndex
from drum_hf.scores.store import RequestParts, ScoreStore
from drum_hf.scores.transfer import export_scores
from drum_hf.training.mining import CandidateTable

HERE = Path(__file__).parents[2]


def mounted(folder, *options):
    """A file system of its own at a folder; skips where that is not allowed."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, check=False) if _ROOT else None
    if done is None or done.returncode:
        pytest.skip("mounting is not allowed here")


_ROOT = sys.platform == "linux" and os.geteuid() == 0 and shutil.which("mount") is not None


@pytest.fixture(params=["a full disk", "a limit"])
def full(tmp_path, request):
    """A folder that takes some 100 kB, and no more."""
    place = tmp_path / "full"
    if request.param == "a limit":
        place.mkdir()
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        yield place
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        return
    mounted(place, "-t", "tmpfs", "-o", "size=128k", "none")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def unwritable(tmp_path):
    """A folder that can be read only, by root too."""
    place = tmp_path / "unwritable"
    mounted(place, "-t", "tmpfs", "-o", "size=4m,ro", "none")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def index(rows):
    made = DemoIndex(64)
    made.add([f"r{i}" for i in range(rows)], np.random.default_rng(0).standard_normal((rows, 64)))
    return made


def shards(rows):
    made = ShardedIndex(64, shard_rows=1000)
    made.add([f"r{i}" for i in range(rows)], np.random.default_rng(0).standard_normal((rows, 64)))
    return made


def table(rows):
    return TripletTable.from_dataset(
        [{"id": f"r{i}", "image": picture(i), "prompt": os.urandom(400).hex(), "response": "a"} for i in range(rows)]
    )


def candidates(rows):
    made = CandidateTable([f"q{i}" for i in range(rows)])
    mined = {f"q{i}": [(os.urandom(20).hex(), j) for j in range(8)] for i in range(rows)}
    made.extend(mined, np.random.default_rng(0).standard_normal(8 * rows).tolist())
    return made


class Cells:
    def __init__(self, rows):
        self.values = Values(
            [f"q{i}" for i in range(rows)],
            np.random.default_rng(0).random(rows),
            [os.urandom(40).hex() for _ in range(rows)],
            [("a",)] * rows,
            0,
        )

    def save(self, path):
        CellFiles(path.parent).write(path.stem, self.values)


#: What is saved, small and too large for `full`; how it is read again.
SAVED = {
    "index": (index, 20, 4000, lambda path: DemoIndex.load(path).ids),
    "shards": (shards, 20, 4000, lambda path: ShardedIndex.load(path).ids),
    "table.parquet": (table, 3, 400, lambda path: [d.prompt for d in TripletTable.load(path)]),
    "candidates.parquet": (candidates, 3, 2000, lambda path: list(CandidateTable.load(path).rows())),
    "cell.parquet": (Cells, 3, 8000, lambda path: CellFiles(path.parent).read(path.stem).answers),
}


@pytest.mark.parametrize("name", SAVED)
def test_a_full_disk_leaves_what_was_saved_before(full, name):
    make, few, many, read = SAVED[name]
    large = make(many)
    make(few).save(full / name)
    before = read(full / name)
    with pytest.raises(SavedFileError, match=r"writing it failed .*; free space"):
        large.save(full / name)
    assert read(full / name) == before
    beside = [path.name for path in full.iterdir() if path.name != name]
    assert not [one for one in beside if one.endswith((".tmp", ".partial"))]


@pytest.mark.parametrize("name", SAVED)
def test_a_folder_that_cannot_be_written_is_named(unwritable, name):
    make, few, _, _ = SAVED[name]
    with pytest.raises(SavedFileError, match=r"Read-only file system.*give a place that can be written"):
        make(few).save(unwritable / name)


def put(store, numbers):
    parts = [RequestParts(f"{n:032x}", ("1" * 32,), ("yes",)) for n in numbers]
    store.put_scores([p.key("f") for p in parts], [-float(n) for n in numbers], fingerprint="f", parts=parts)


def test_a_store_on_a_full_disk_keeps_what_it_has(full):
    with ScoreStore(full / "s.sqlite") as store:
        put(store, range(10))
        with pytest.raises(SavedFileError, match=r"s\.sqlite: writing"):
            put(store, range(10, 20_000))
        assert len(store) == 10
    with sqlite3.connect(full / "s.sqlite") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_an_export_that_does_not_fit_leaves_no_file(full):
    parts = [RequestParts(os.urandom(16).hex(), (os.urandom(16).hex(),), ("yes",)) for _ in range(4000)]
    with ScoreStore(":memory:") as store:
        keys, values = [part.key("f") for part in parts], np.random.default_rng(0).random(4000)
        store.put_scores(keys, values, fingerprint="f", parts=parts)
        with pytest.raises(SavedFileError, match=r"out\.parquet: writing it failed"):
            export_scores(store, full / "out.parquet")
    assert list(full.iterdir()) == []


def test_a_store_in_a_folder_that_cannot_be_written_is_named(unwritable):
    with pytest.raises(SavedFileError, match=r"s\.sqlite"):
        ScoreStore(unwritable / "s.sqlite")
    with pytest.raises(SavedFileError, match="Read-only"):
        ScoreStore(unwritable / "new" / "s.sqlite")


def data(folder):
    folder.mkdir()
    rows = []
    for i in range(8):
        picture(i).save(folder / f"{i}.png")
        rows.append({"id": f"r{i}", "image": f"{i}.png", "prompt": "what?", "response": f"w{i % 3}"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def test_commands_say_so_in_a_line(unwritable, tmp_path, capsys):
    asked = ["train", "--data", data(tmp_path / "data"), "--rounds", "1", "--device", "cpu"]
    assert main(["-q", *asked, "--out", str(unwritable / "out")]) == 2
    said = capsys.readouterr().err
    assert "Read-only file system" in said and "Traceback" not in said


SCORE = """
import sys, time
from drum_hf.scores.store import RequestParts, ScoreStore

start, jump = int(sys.argv[2]), float(sys.argv[3])
if jump:
    plain = time.time
    time.time = lambda: plain() + jump * (int(plain() * 50) % 2)  # forth and back, many times a second
with ScoreStore(sys.argv[1]) as store:
    for n in range(start, start + 400, 4):
        parts = [RequestParts(f"{i:032x}", ("1" * 32,), ("yes",)) for i in range(n, n + 4)]
        store.put_scores([p.key("f") for p in parts], [-float(i) for i in range(n, n + 4)], fingerprint="f",
                         parts=parts, identity={"name": "m"})
"""


def test_processes_on_one_store_whose_clocks_jump(tmp_path):
    path = tmp_path / "s.sqlite"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", SCORE, str(path), str(start), str(jump)], env=os.environ | {"PYTHONPATH": str(HERE)}
        )
        for start, jump in ((0, 0.0), (200, 1e8), (400, -1e8))
    ]
    assert [run.wait(120) for run in runs] == [0, 0, 0]
    with ScoreStore(path) as store:
        found = {e.parts.query: e.value for page in store.entries() for e in page}
        assert found == {f"{n:032x}": -float(n) for n in range(800)}


def test_a_store_is_read_in_the_order_it_was_written_whatever_the_clock_says(tmp_path, monkeypatch):
    clock = iter([2e9, 1e9, 3e9, 0.0] * 100)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    with ScoreStore(tmp_path / "s.sqlite") as store:
        for n in range(6):
            put(store, [n])
        put(store, [3])
        assert sorted(e.value for page in store.entries(page_size=2) for e in page) == [-5, -4, -3, -2, -1, 0]
