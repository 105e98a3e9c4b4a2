"""Export and import: what comes out goes in again, and nothing that was altered or belongs to another LVLM does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import drum_hf
from drum_hf.errors import NonFiniteScoreError, SavedFileError
from drum_hf.scores.cached import CachedLVLM
from drum_hf.scores.store import Merged, RequestParts, ScoreStore
from drum_hf.scores.transfer import Exported, export_scores, import_scores
from drum_hf.types import Demonstration, ICLRequest, Query

IDENTITY = {"name": "m", "dtype": "float32", "chat_template": "a1b2" * 8, "system": None, "score_end_of_turn": False}
OTHER = IDENTITY | {"dtype": "bfloat16", "chat_template": "c3d4" * 8}


def filled(path=":memory:", *, fingerprint="f", identity=IDENTITY, scores=50, offset=0.0):
    """Scores of one LVLM, and a generation for every fifth query."""
    store = ScoreStore(path)
    parts = [
        RequestParts(f"{i:032x}", (f"{i % 7:032x}", "other"), (f"größe {i % 3}", "x"), (1.5, 2.0), ("x", "größe 0"))
        for i in range(scores)
    ]
    keys = [part.key(fingerprint) for part in parts]
    store.put_scores(keys, -np.arange(scores) / 7 + offset, fingerprint=fingerprint, parts=parts, identity=identity)
    parts = [RequestParts(f"{i:032x}", max_new_tokens=5) for i in range(0, scores, 5)]
    keys, texts = [part.key(fingerprint) for part in parts], [f"draft {i}\n" for i in range(len(parts))]
    store.put_texts(keys, texts, fingerprint=fingerprint, parts=parts)
    return store


def content(store):
    return {entry.key: entry for page in store.entries() for entry in page}


def altered(path, change):
    """The file with its rows, as a list of dicts, changed; its metadata stay."""
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    return path


@pytest.fixture
def file(tmp_path):
    with filled() as store:
        assert export_scores(store, tmp_path / "f.parquet").left_out == 0
    return tmp_path / "f.parquet"


@pytest.mark.parametrize(("rows_per_group", "groups"), [(3, 34 + 7), (20_000, 2)])
def test_a_store_travels_whole(tmp_path, rows_per_group, groups):
    path = tmp_path / "sub" / "all.parquet"
    with filled() as store, ScoreStore(tmp_path / "new.sqlite") as new:
        store.merge([entry for page in filled(fingerprint="g", identity=None).entries() for entry in page])
        done = export_scores(store, path, rows_per_group=rows_per_group)
        assert done == Exported(100, 20, 0, os.path.getsize(path))
        assert import_scores(path, new) == Merged(new=120)
        assert content(new) == content(store) and new.identities() == store.identities() == {"f": IDENTITY, "g": None}
        assert import_scores(path, new) == Merged(known=120)
    assert sorted(path.parent.iterdir()) == [path]
    described = pq.read_metadata(path)
    assert described.num_row_groups == groups
    about = json.loads(described.metadata[b"drum_hf"])
    assert about["format_version"] == 1 and about["drum_hf"] and about["fingerprints"] == {"f": IDENTITY, "g": None}


def test_a_row_says_all_that_its_key_is_made_of(file):
    row = next(row for row in pq.read_table(file).to_pylist() if row["query_key"] == f"{10:032x}" and row["score"])
    assert row.pop("key") == _parts(row).key("f").hex()
    assert row == {
        "kind": "score",
        "score": -10 / 7,
        "text": None,
        "fingerprint": "f",
        "query_key": f"{10:032x}",
        "demonstration_keys": [f"{3:032x}", "other"],
        "responses": ["größe 1", "x"],
        "weights": [1.5, 2.0],
        "choices": ["x", "größe 0"],
        "max_new_tokens": None,
    }


def _parts(row):
    lists = (tuple(row[name]) for name in ("demonstration_keys", "responses", "weights", "choices"))
    return RequestParts(row["query_key"], *lists, row["max_new_tokens"])


def test_a_second_user_pays_nothing(tmp_path):
    class Stub:
        fingerprint, identity = "stub@1", {"name": "stub"}

        def score(self, requests):
            return np.full(len(requests), -1.25)

        def generate(self, requests, *, max_new_tokens=32):
            return ["red"] * len(requests)

    shown = (Demonstration("d", None, "p", "r"),)
    requests = [ICLRequest(Query(None, f"q{i}"), shown, ("yes", "no"), (1, 2)) for i in range(5)]
    with ScoreStore() as mine, ScoreStore() as theirs:
        lvlm = CachedLVLM(Stub(), mine)
        lvlm.score(requests)
        lvlm.generate(requests, max_new_tokens=3)
        export_scores(mine, tmp_path / "s.parquet")
        import_scores(tmp_path / "s.parquet", theirs, lvlm=Stub())
        other = CachedLVLM(Stub(), theirs)
        assert other.score(requests).tolist() == [-1.25] * 5
        assert other.generate(requests, max_new_tokens=3) == ["red"] * 5 and other.calls == 0


def test_some_lvlms_are_exported(tmp_path):
    with filled() as store:
        store.merge([entry for page in filled(fingerprint="g", scores=10).entries() for entry in page], {"g": OTHER})
        assert export_scores(store, tmp_path / "g.parquet", fingerprints=["g"]).scores == 10
        with pytest.raises(ValueError, match="nothing of the LVLM with fingerprint 'h'"):
            export_scores(store, tmp_path / "h.parquet", fingerprints=["h"])
        with pytest.raises(ValueError, match="rows_per_group"):
            export_scores(store, tmp_path / "h.parquet", rows_per_group=0)
    assert os.listdir(tmp_path) == ["g.parquet"]
    with ScoreStore() as new:
        assert import_scores(tmp_path / "g.parquet", new).new == 12 and new.identities() == {"g": OTHER}


def test_what_cannot_be_told_is_left_out_and_counted(tmp_path):
    broken = RequestParts("q", responses=("\ud800",))
    with filled(scores=3) as store:
        store.put_scores([b"old"], [-1.0], fingerprint="f")
        store.put_scores([broken.key("f")], [-1.0], fingerprint="f", parts=[broken])
        assert content(store)[broken.key("f")].parts == broken
        done = export_scores(store, tmp_path / "f.parquet")
        assert (done.scores, done.texts, done.left_out) == (3, 1, 2)


def test_an_export_that_fails_leaves_what_was_there(tmp_path, file, monkeypatch):
    before = file.read_bytes()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", fail)
    with filled() as store, pytest.raises(SavedFileError, match=r"f\.parquet: writing it failed.*No space"):
        export_scores(store, file)
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["f.parquet"]


# -- what is refused --------------------------------------------------


@pytest.mark.parametrize(
    ("identity", "said"),
    [
        (
            OTHER,
            r"dtype differs: float32 here, bfloat16 there; chat template differs: a1b2a1b2… here, c3d4c3d4… there",
        ),
        (IDENTITY | {"system": "Be brief."}, r"lvlm: system differs: none here, Be brief\. there\."),
        (None, "fingerprint f here, g there; what they are made of was not recorded"),
        (IDENTITY, "their named parts are the same, but its fingerprint is g"),
    ],
)
def test_another_lvlms_scores_are_refused_and_the_difference_is_named(tmp_path, identity, said):
    path = tmp_path / "g.parquet"
    export_scores(filled(fingerprint="g", identity=identity), path)
    said = said.replace("lvlm", "expected scores of .*, got scores of another LVLM")
    with filled() as store:
        before = content(store)
        with pytest.raises(SavedFileError, match=rf"{path}: .*{said}.*any_lvlm=True"):
            import_scores(path, store)
        assert content(store) == before and store.identities() == {"f": IDENTITY}
        assert import_scores(path, store, any_lvlm=True).new == 60
        assert content(store).items() > before.items() and store.identities() == {"f": IDENTITY, "g": identity}
        assert import_scores(path, store).known == 60


def test_the_nearest_lvlm_is_compared(tmp_path):
    export_scores(filled(fingerprint="g", identity=OTHER), tmp_path / "g.parquet")
    with filled(scores=1) as store:
        store.put_scores([b"k"], [-1.0], fingerprint="h", identity=OTHER | {"name": "n"})
        with pytest.raises(SavedFileError, match="another LVLM: name differs: n here, m there"):
            import_scores(tmp_path / "g.parquet", store)


def test_the_lvlm_given_decides(file):
    class Given:
        fingerprint, identity = "g", OTHER

    with ScoreStore() as store:
        with pytest.raises(
            SavedFileError, match=r"of the LVLM given, got .*dtype differs: bfloat16 here, float32 there"
        ):
            import_scores(file, store, lvlm=Given())
        assert store.identities() == {} and content(store) == {}
    with filled(fingerprint="g") as store:  # the store has none of it, but the user wants it
        Given.fingerprint = "f"
        assert import_scores(file, store, lvlm=Given()).new == 60


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("key", "0" * 32),
        ("fingerprint", "g"),
        ("query_key", "q"),
        ("demonstration_keys", ["other", f"{3:032x}"]),
        ("demonstration_keys", None),
        ("responses", ["größe 1", None]),
        ("weights", [1.5, 2.5]),
        ("choices", []),
        ("kind", "draft"),
        ("kind", "generate"),
        ("max_new_tokens", 5),
        ("score", None),
        ("text", "and"),
    ],
)
def test_an_altered_row_is_refused(file, column, value):
    altered(file, lambda rows: rows[20].update({column: value}))
    with ScoreStore() as store:
        with pytest.raises(SavedFileError, match=r"f\.parquet: row 20 of row group 0 .*nothing of this file"):
            import_scores(file, store)
        assert content(store) == {} and store.identities() == {}


def test_an_altered_key_is_named(file):
    altered(file, lambda rows: rows[3].update(responses=["else"]))
    key = pq.read_table(file)["key"][3].as_py()
    with ScoreStore() as store, pytest.raises(SavedFileError, match=f"has the key {key}, but its parts give"):
        import_scores(file, store)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_is_refused(file, bad):
    altered(file, lambda rows: rows[20].update(score=bad))
    with ScoreStore() as store:
        with pytest.raises(NonFiniteScoreError, match=f"row 20 of row group 0 has {bad}"):
            import_scores(file, store)
        assert content(store) == {}


def test_a_later_groups_fault_writes_nothing(tmp_path):
    path = tmp_path / "f.parquet"
    with filled() as source, ScoreStore() as store:
        export_scores(source, path, rows_per_group=10)
        table = pq.read_table(path)
        rows = table.to_pylist()
        rows[45]["score"] = -99.0
        rows[45]["query_key"] = "q"
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path, row_group_size=10)
        with pytest.raises(SavedFileError, match="row 5 of row group 4"):
            import_scores(path, store)
        assert content(store) == {}


def test_what_is_known_keeps_its_value_and_conflicts_are_counted(file):
    with filled(scores=10, offset=5e-4) as near, filled(scores=10, offset=-0.5) as far:
        for store, conflicts in ((near, 0), (far, 10)):
            before = content(store)
            assert import_scores(file, store) == Merged(new=48, known=12, conflicts=conflicts)
            assert content(store).items() > before.items()


def test_other_files_are_refused(tmp_path, file):
    other = tmp_path / "other.parquet"
    with ScoreStore() as store:
        for write, said in (
            (lambda: None, "No such file|does not exist|reading it failed"),
            (lambda: other.write_bytes(b"PAR1 no"), "expected what `drum-hf scores export` wrote"),
            (lambda: other.write_bytes(file.read_bytes()[:-100]), "expected what `drum-hf scores export` wrote"),
            (lambda: pq.write_table(pa.table({"a": [1]}), other), "expected what `drum-hf scores export` wrote"),
            (lambda: _described(other, file, format_version=2), "expected scores of format version 1, got scores of"),
            (lambda: _described(other, file, kind="candidates"), "got candidates of version 1"),
            (lambda: _described(other, file, fingerprints=["f"]), "does not describe its LVLMs"),
            (lambda: _described(other, file, fingerprints={"f": "m"}), "does not describe its LVLMs"),
            (lambda: pq.write_table(pq.read_table(file).drop(["weights"]), other), "expected the columns"),
        ):
            write()
            with pytest.raises(SavedFileError, match=rf"other\.parquet.*({said})"):
                import_scores(other, store)
        data = bytearray(file.read_bytes())
        data[100:400] = b"\xff" * 300
        other.write_bytes(data)
        with pytest.raises((SavedFileError, NonFiniteScoreError), match=r"other\.parquet"):
            import_scores(other, store)
        assert content(store) == {} and store.identities() == {}


def _described(path, file, **change):
    table = pq.read_table(file)
    about = json.loads(table.schema.metadata[b"drum_hf"]) | change
    pq.write_table(table.replace_schema_metadata({"drum_hf": json.dumps(about)}), path)


# -- killed --------------------------------------------------

IMPORTER = """
    import os, signal, sys
    from drum_hf.scores.store import ScoreStore
    from drum_hf.scores.transfer import import_scores

    path, file, groups = sys.argv[1], sys.argv[2], int(sys.argv[3])

    class Killed(ScoreStore):
        def merge(self, entries, identities=None):
            global groups
            if groups == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            groups -= 1
            return super().merge(entries, identities)

    with Killed(path) as store:
        import_scores(file, store)
"""


def test_an_import_that_was_killed_is_completed_by_repeating_it(tmp_path):
    path, file = tmp_path / "s.sqlite", tmp_path / "f.parquet"
    with filled() as source:
        source.merge([entry for page in filled(fingerprint="g", scores=30).entries() for entry in page], {"g": OTHER})
        export_scores(source, file, rows_per_group=10)
        expected = content(source)
    command = [sys.executable, "-c", textwrap.dedent(IMPORTER), str(path), str(file), "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(drum_hf.__file__).parents[1])}
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    with ScoreStore(path) as store:
        assert len(content(store)) == 20 and content(store).items() < expected.items()
        # Though the store is not empty any more, it takes the other LVLM, which came with the first group.
        assert import_scores(file, store) == Merged(new=len(expected) - 20, known=20)
        assert content(store) == expected and store.identities() == {"f": IDENTITY, "g": OTHER}


def test_lists_texts_and_metadata_of_an_export_are_bounded(file, tmp_path):
    altered(file, lambda rows: rows[20].update(choices=["x"] * 10_001))
    with ScoreStore() as store:
        with pytest.raises(SavedFileError, match="row 20 of row group 0 has more than 10,000 items"):
            import_scores(file, store)
        _described(file, file, more="x" * (1 << 20))
        with pytest.raises(SavedFileError, match="its metadata has"):
            import_scores(file, store)
        _described(file, file, more="", format_version=["\x1b[2J"])
        with pytest.raises(SavedFileError) as caught:
            import_scores(file, store)
        assert "\x1b" not in str(caught.value)
