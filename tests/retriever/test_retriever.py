"""DemoRetriever against its own parts, fresh builds, and saved and broken folders."""

from __future__ import annotations

import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from tiny_encoders import picture, tiny_clip

from drum_hf.data import TripletTable
from drum_hf.encoders.joint import build_encoder, encode_items
from drum_hf.errors import (
    ColumnError,
    DimensionMismatchError,
    DuplicateIdError,
    EmptySupportError,
    ImageError,
    MissingIdError,
    NonFiniteEmbeddingError,
    RowError,
    SavedFileError,
    TooFewDemonstrationsError,
)
from drum_hf.retriever.retriever import PART_WEIGHTS, DemoRetriever
from drum_hf.types import Query
from drum_hf.utils.model_card import render_card

PROMPTS = ("what colour is the circle", "how many stars", "what shape is large")
WORDS = ("red", "seven", "square", "blue")


def make_rows(start: int, stop: int) -> list[dict]:
    return [
        {
            "id": f"d{i}",
            "image": picture(i // 2),  # two questions a picture: one group
            "prompt": PROMPTS[i % 3],
            "response": WORDS[i % 4],
            "group": f"g{i // 2}",
        }
        for i in range(start, stop)
    ]


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="session")
def encoder(clip):
    return build_encoder(clip, device="cpu")


@pytest.fixture(scope="session")
def table():
    return TripletTable.from_dataset(make_rows(0, 12))


@pytest.fixture
def retriever(encoder, table):
    encoder[0].weights = PART_WEIGHTS["sit+draft"]
    return DemoRetriever.from_encoder(encoder, table)


@pytest.fixture
def queries():
    return [Query(picture(100 + i), PROMPTS[i % 3], draft=WORDS[i]) for i in range(4)]


@pytest.fixture(scope="session")
def saved(clip, table, tmp_path_factory):
    """A saved LoRA retriever, changed from its base, and what it finds."""
    retriever = DemoRetriever.from_encoder(
        clip, table, lora=True, device="cpu", teacher={"name": "me/tiny-lvlm", "revision": "abc", "task": "icl-vqa"}
    )
    nudge(retriever)
    folder = tmp_path_factory.mktemp("saved") / "retriever"
    retriever.save_pretrained(folder)
    rows = [table.query(id, draft="red") for id in table.ids[:5]]
    return folder, rows, retriever.retrieve_ids(rows, 6)


def nudge(retriever: DemoRetriever) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in retriever.encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    retriever.mark_stale()


def same(found, expected, atol: float = 1e-6) -> bool:
    close = all(np.allclose(a, b, rtol=0, atol=atol) for a, b in zip(found[1], expected[1], strict=True))
    return found[0] == expected[0] and close


# Retrieving


def test_results_are_those_of_the_brute_force(retriever, table, queries):
    demonstrations = encode_items(
        retriever.encoder, [{"image": d.image, "text": [d.prompt, d.response]} for d in table]
    )
    asked = encode_items(retriever.encoder, [{"image": q.image, "text": [q.prompt, q.draft]} for q in queries])
    products = asked @ demonstrations.T
    for row, result in zip(products, retriever(queries, k=5), strict=True):
        order = np.argsort(-row, kind="stable")[:5]
        assert result.ids == [table.ids[i] for i in order]
        assert result.scores == pytest.approx(row[order], abs=1e-6)
        assert [d.response for d in result.demonstrations] == [table.responses[i] for i in order]


def test_a_query_never_gets_itself_nor_its_group(retriever, table):
    for result, id, group in zip(retriever(table, k=10), table.ids, table.groups, strict=True):
        assert len(result.ids) == 10 and result.query_id == id
        assert id not in result.ids and group not in {d.group for d in result.demonstrations}
    assert retriever(table["d3"], k=1, exclude_self=True).ids != ["d3"]
    own = retriever({"image": table["d3"].image, "prompt": "", "draft": WORDS[3], "id": "d3"}, k=1, exclude_self=False)
    assert own.ids[0] in {"d2", "d3"}  # its own picture
    assert len(retriever(table["d0"], k=12).ids) == 10  # the two of its group are left out


def test_every_way_to_ask_gives_the_same(retriever, queries, tmp_path):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    expected = [r.ids for r in retriever(queries, k=3)]
    dicts = [{"image": q.image, "question": q.prompt, "draft": q.draft} for q in queries]
    assert [retriever(q, k=3).ids for q in queries] == expected
    assert [r.ids for r in retriever(tuple(dicts), k=3)] == expected
    assert [r.ids for r in retriever((d for d in dicts), k=3)] == expected
    features = Features(image=ImageFeature(), question=Value("string"), draft=Value("string"))
    assert [r.ids for r in retriever(Dataset.from_list(dicts, features=features), k=3)] == expected
    assert retriever.retrieve_ids(queries, 3)[0] == expected
    for i, query in enumerate(queries):
        query.image.save(tmp_path / f"{i}.png")
    paths = [{**d, "image": tmp_path / f"{i}.png"} for i, d in enumerate(dicts)]
    assert [r.ids for r in retriever(paths, k=3)] == expected
    assert retriever([], k=3) == [] and list(retriever(iter([]), k=3)) == []
    assert retriever.retrieve_ids([], 3) == ([], [])
    assert len(retriever(queries[0]).ids) == retriever.top_k == 4


def test_a_generator_is_read_a_batch_at_a_time(encoder, table, queries):
    retriever = DemoRetriever(encoder, table, batch_size=2)
    drawn = []

    def ask():
        for i, query in enumerate(queries):
            drawn.append(i)
            yield query

    results = retriever(ask(), k=2)
    assert drawn == []
    next(results)
    assert drawn == [0, 1]
    assert len(list(results)) == 3 and drawn == [0, 1, 2, 3]


def test_a_rows_gold_response_is_not_looked_at(retriever, table):
    row = {"image": picture(7), "prompt": PROMPTS[0]}
    plain = retriever(row, k=6)
    with_gold = retriever({**row, "response": "blue", "references": ["blue"], "label": "blue"}, k=6)
    assert plain == with_gold
    assert retriever(table["d1"], k=6).ids == retriever(table.query("d1"), k=6).ids


def test_drafts_are_written_where_they_are_missing_and_used(encoder, table):
    class Drafts:
        fingerprint = "drafts"

        def __init__(self):
            self.asked = []

        def score(self, requests):
            raise AssertionError("nothing to score")

        def generate(self, requests, *, max_new_tokens=32):
            self.asked += [request.query.prompt for request in requests]
            return ["blue"] * len(requests)

    encoder[0].weights = PART_WEIGHTS["sit+draft"]
    lvlm = Drafts()
    drafting = DemoRetriever(encoder, table, draft_lvlm=lvlm)
    bare, given = Query(picture(50), PROMPTS[0]), Query(picture(51), PROMPTS[1], draft="red")
    found = drafting.retrieve_ids([bare, given], 4)
    assert lvlm.asked == [PROMPTS[0]]
    plain = DemoRetriever(encoder, table)
    assert same(found, plain.retrieve_ids([Query(picture(50), PROMPTS[0], draft="blue"), given], 4))
    try:
        encoder[0].weights = PART_WEIGHTS["sit"]
        drafting.mark_stale()
        drafting(bare, k=1)
        assert lvlm.asked == [PROMPTS[0]]  # no use for it
    finally:
        encoder[0].weights = PART_WEIGHTS["sit+draft"]


def test_threads_get_what_one_thread_gets(retriever, queries):
    expected = [retriever(q, k=3) for q in queries]
    retriever.mark_stale()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: retriever(queries[i % 4], k=3), range(24)))
    assert [r.ids for r in found] == [expected[i % 4].ids for i in range(24)]


# Strategies


@pytest.mark.parametrize("strategy", PART_WEIGHTS)
def test_strategies(encoder, table, strategy):
    retriever = DemoRetriever.from_encoder(encoder, table, strategy=strategy)
    used = [part for part, weight in retriever.weights.items() if weight]
    names = {"si": ["image"], "st": ["prompt"], "sit": ["image", "prompt"]}
    drafted = strategy.endswith("+draft")
    assert used == names[strategy.removesuffix("+draft")] + ["response"] * drafted
    assert retriever.strategy == strategy and retriever.uses_drafts == drafted
    query = retriever.encode_queries([Query(picture(1), PROMPTS[0], draft="red")])
    width = query.shape[1] // 3
    assert [bool(query[0, i * width : (i + 1) * width].any()) for i in range(3)] == [
        p in used for p in ("image", "prompt", "response")
    ]


def test_weights_of_ones_own(encoder, table):
    retriever = DemoRetriever.from_encoder(encoder, table, weights=(1, 0, 3))
    assert retriever.strategy == "si+draft"
    assert DemoRetriever.from_encoder(encoder, table, weights=(0, 0, 1)).strategy == "response"
    retriever = DemoRetriever.from_encoder(encoder, table, weights=(1, 0, 3))
    assert retriever.weights == pytest.approx({"image": 0.25, "prompt": 0, "response": 0.75})


# Changing it


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_add_and_remove_equal_a_fresh_build(encoder, table, queries, kind):
    def fresh(rows):
        return DemoRetriever.from_encoder(encoder, rows, strategy="sit+draft", index_kind=kind)

    retriever = fresh(table.select(table.ids[:8]))
    retriever(queries, k=2)  # the index is there: it is changed, not built anew
    retriever.remove(["d1", "d4"])
    retriever.add(make_rows(8, 12))
    expected = fresh(table.without(["d1", "d4"]))
    assert len(retriever) == 10 and retriever.support.ids == expected.support.ids
    assert same(retriever.retrieve_ids(queries, 10), expected.retrieve_ids(queries, 10))
    untouched = fresh(table.select(table.ids[:8]))  # and the same where there was no index yet
    untouched.remove(["d1", "d4"])
    untouched.add(make_rows(8, 12))
    assert same(untouched.retrieve_ids(queries, 10), expected.retrieve_ids(queries, 10))


def test_a_refused_change_leaves_everything_as_it_was(retriever, queries):
    before = retriever.retrieve_ids(queries, 12)
    with pytest.raises(DuplicateIdError):
        retriever.add(make_rows(11, 13))
    with pytest.raises(MissingIdError):
        retriever.remove(["d0", "nobody"])
    with pytest.raises(EmptySupportError):
        retriever.remove(retriever.support.ids)
    assert len(retriever) == 12 and same(retriever.retrieve_ids(queries, 12), before)


def test_a_trained_encoder_counts_after_mark_stale(clip, table, queries):
    retriever = DemoRetriever.from_encoder(clip, table, device="cpu")
    retriever.refresh()
    before = retriever.index.vectors()
    nudge(retriever)
    after = retriever.index.vectors()
    assert np.abs(before - after).max() > 1e-3
    assert np.abs(after - retriever.encode_support()).max() < 1e-6
    assert np.abs(retriever.encode_support(["d5", "d2"]) - after[[5, 2]]).max() < 1e-6


# Files


def test_a_loaded_retriever_finds_the_same(saved):
    folder, rows, expected = saved
    loaded = DemoRetriever.from_pretrained(folder, device="cpu")
    assert same(loaded.retrieve_ids(rows, 6), expected)
    assert loaded.teacher == {"name": "me/tiny-lvlm", "revision": "abc", "task": "icl-vqa"}
    assert loaded.strategy == "sit+draft" and loaded.top_k == 4
    loaded.mark_stale()  # embedded anew, the adapter must be there
    assert same(loaded.retrieve_ids(rows, 6), expected)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"drum_config.json", "README.md", "support.parquet", "encoder/adapter_model.safetensors"} <= names
    assert "encoder/model.safetensors" not in names
    listed = json.loads((folder / "drum_config.json").read_text())["files"]
    assert set(listed) == names - {"drum_config.json", "README.md", "manifest.json"}


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_a_full_encoder_and_options_survive(clip, table, queries, tmp_path, kind):
    options = {"hnsw_m": 8} if kind == "hnsw" else None
    retriever = DemoRetriever.from_encoder(
        clip, table, strategy="sit", index_kind=kind, index_options=options, top_k=2, device="cpu"
    )
    nudge(retriever)
    expected = retriever.retrieve_ids(queries, 8)
    retriever.save_pretrained(tmp_path / "r")
    loaded = DemoRetriever.from_pretrained(tmp_path / "r", device="cpu")
    assert same(loaded.retrieve_ids(queries, 8), expected)
    assert (loaded.index_kind, loaded.index_options, loaded.top_k) == (kind, options or {}, 2)
    assert loaded.base_model == str(clip) and loaded.teacher is None and loaded.strategy == "sit"


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.mark.usefixtures("datasets_cache")
def test_vectors_and_rows_can_stay_in_their_files(encoder, table, queries, tmp_path):
    retriever = DemoRetriever.from_encoder(encoder, table, strategy="sit")
    expected = retriever.retrieve_ids(queries, 6)
    retriever.save_pretrained(tmp_path / "saved")
    loaded = DemoRetriever.from_pretrained(tmp_path / "saved", mmap=True, device="cpu")
    assert loaded.index.mapped and loaded.support.mapped and same(loaded.retrieve_ids(queries, 6), expected)
    with pytest.raises(ValueError, match="mmap=True takes no rows"):
        loaded.add([{"id": "new", "prompt": "what?", "response": "that"}])
    assert "new" not in loaded.support
    loaded.remove([table.ids[0]])
    assert table.ids[0] not in loaded.index and loaded.index.mapped


@pytest.mark.usefixtures("datasets_cache")
def test_an_index_in_shards_finds_the_same_and_takes_rows_though_mapped(retriever, table, queries, tmp_path):
    parts = DemoRetriever.from_encoder(retriever.encoder, table, index_options={"shard_rows": 5})
    assert [len(shard) for shard in parts.index.shards] == [5, 5, 2]
    asked = [*queries, *(table.query(id) for id in table.ids[:3])]
    assert same(parts.retrieve_ids(asked, 6), retriever.retrieve_ids(asked, 6))
    assert same(parts.retrieve_ids(asked, 3, selector="mmr"), retriever.retrieve_ids(asked, 3, selector="mmr"))
    parts.save_pretrained(tmp_path / "parts")
    loaded = DemoRetriever.from_pretrained(tmp_path / "parts", mmap=True, device="cpu")
    assert loaded.index_options == {"shard_rows": 5} and loaded.index.shards[0].mapped
    for each in (loaded, retriever):
        each.remove(["d1", "d7"])
        each.add(make_rows(12, 15))
    assert same(loaded.retrieve_ids(asked, 6), retriever.retrieve_ids(asked, 6))
    loaded.save_pretrained(tmp_path / "parts")  # where its shards are mapped from
    again = DemoRetriever.from_pretrained(tmp_path / "parts", device="cpu")
    assert same(again.retrieve_ids(asked, 6), retriever.retrieve_ids(asked, 6)) and again.support.ids[-1] == "d14"
    with pytest.raises(ValueError, match="shard_rows is a whole number"):
        DemoRetriever.from_encoder(retriever.encoder, table, index_options={"shard_rows": 0})


def test_saving_over_an_older_one_leaves_nothing_of_it(clip, encoder, table, queries, tmp_path):
    DemoRetriever.from_encoder(encoder, table, strategy="sit").save_pretrained(tmp_path)
    assert (tmp_path / "encoder" / "model.safetensors").exists()
    (tmp_path / "notes.txt").write_text("mine")
    lora = DemoRetriever.from_encoder(clip, table.select(table.ids[:5]), lora=True, device="cpu")
    lora.save_pretrained(tmp_path, include_support=False)
    assert not (tmp_path / "encoder" / "model.safetensors").exists()
    assert not (tmp_path / "support.parquet").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    loaded = DemoRetriever.from_pretrained(tmp_path, support=table.select(table.ids[:5]), device="cpu")
    assert same(loaded.retrieve_ids(queries, 3), lora.retrieve_ids(queries, 3))


def test_a_killed_save_does_not_pass_for_a_whole_one(clip, table, tmp_path, monkeypatch):
    import os

    retriever = DemoRetriever.from_encoder(clip, table, device="cpu")
    retriever.save_pretrained(tmp_path)
    nudge(retriever)
    replace, moved = os.replace, []

    def killed(source, target):
        if str(target).startswith(str(tmp_path / "encoder")):
            moved.append(target)
            if len(moved) > 3:
                raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("drum_hf.retriever.saving.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            retriever.save_pretrained(tmp_path)
    with pytest.raises(SavedFileError, match=r"model\.safetensors: the file was altered"):
        DemoRetriever.from_pretrained(tmp_path)
    retriever.save_pretrained(tmp_path)
    assert len(DemoRetriever.from_pretrained(tmp_path, device="cpu")) == 12


def test_another_support_set_is_embedded_anew(saved, table, clip):
    folder, _, _ = saved
    other = TripletTable.from_dataset(make_rows(20, 26))
    moved = DemoRetriever.from_pretrained(folder, support=other, device="cpu")
    assert set(moved(Query(picture(3), PROMPTS[0]), k=6).ids) == set(other.ids)
    # The very one that was saved is not embedded again.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DemoRetriever, "encode_support", lambda *a: pytest.fail("embedded again"))
        assert len(DemoRetriever.from_pretrained(folder, support=table, device="cpu").index) == 12


def test_without_its_support_set_it_asks_for_one(encoder, table, tmp_path):
    DemoRetriever.from_encoder(encoder, table, strategy="sit").save_pretrained(tmp_path, include_support=False)
    with pytest.raises(SavedFileError, match="pass them with support="):
        DemoRetriever.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "support.parquet",
        "index/vectors.safetensors",
        "index/index.json",
        "encoder/adapter_model.safetensors",
        "encoder/sentence_bert_config.json",
        "encoder/adapter_config.json",
    ],
)
@pytest.mark.parametrize("how", ["missing", "altered"])
def test_a_missing_or_altered_file_is_named(saved, tmp_path, name, how):
    folder = Path(shutil.copytree(saved[0], tmp_path / "copy"))
    if how == "missing":
        (folder / name).unlink()
    else:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
    with pytest.raises(SavedFileError, match=f"{name}.*{how}"):
        DemoRetriever.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format_version": 9}, "format version of at most 2, got 9; update drum-hf"),
        ({"files": None}, "'files' is missing or of another type"),
        ({"teacher": "me/model"}, "'teacher'"),
        ({"support": {"rows": 12, "included": True}}, "'support.fingerprint'"),
        ({"files": {"../outside": "0" * 64}}, "not inside the folder"),
        ({"files": {}}, "altered"),
    ],
)
def test_a_configuration_that_is_not_ours(saved, tmp_path, change, match):
    folder = Path(shutil.copytree(saved[0], tmp_path / "copy"))
    config = json.loads((folder / "drum_config.json").read_text()) | change
    (folder / "drum_config.json").write_text(json.dumps(config))
    with pytest.raises(SavedFileError, match=match):
        DemoRetriever.from_pretrained(folder)


def test_the_card_may_be_edited(saved, tmp_path):
    folder = Path(shutil.copytree(saved[0], tmp_path / "copy"))
    (folder / "README.md").write_text("# mine")
    assert len(DemoRetriever.from_pretrained(folder, device="cpu")) == 12


def rewrite(folder: Path) -> None:
    """List the files as they are now, as if they had been saved so."""
    from drum_hf.utils.files import checksum

    path = folder / "drum_config.json"
    config = json.loads(path.read_text())
    config["files"] = {name: checksum(folder / name) for name in config["files"]}
    path.write_text(json.dumps(config))


def test_parts_that_do_not_fit_one_another(saved, table, tmp_path):
    from drum_hf.index.demo_index import DemoIndex

    folder = Path(shutil.copytree(saved[0], tmp_path / "copy"))
    index = DemoIndex(7)
    index.add(table.ids, np.random.default_rng(0).normal(size=(12, 7)))
    index.save(folder / "index")
    rewrite(folder)
    with pytest.raises(DimensionMismatchError, match=r"7 dimensions, the encoder gives 384"):
        DemoRetriever.from_pretrained(folder)
    index = DemoIndex(384)
    index.add(table.ids[::-1], np.random.default_rng(0).normal(size=(12, 384)))
    index.save(folder / "index")
    rewrite(folder)
    with pytest.raises(SavedFileError, match="ids are not those"):
        DemoRetriever.from_pretrained(folder)
    table.select(table.ids[:3]).save(folder / "support.parquet")
    rewrite(folder)
    with pytest.raises(SavedFileError, match="not the table"):
        DemoRetriever.from_pretrained(folder)


def test_a_base_model_that_is_gone_is_named(saved, tmp_path):
    folder = Path(shutil.copytree(saved[0], tmp_path / "copy"))
    path = folder / "encoder" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}))
    rewrite(folder)
    with pytest.raises(SavedFileError, match="needs its base model"):
        DemoRetriever.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("name", ["nobody/nothing-here", "no/such/folder/at/all", "./missing"])
def test_no_such_folder_or_repository(name):
    with pytest.raises(SavedFileError, match="can't be fetched"):
        DemoRetriever.from_pretrained(name, local_files_only=True)


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(SavedFileError, match=r"drum_config\.json: the file is missing"):
        DemoRetriever.from_pretrained(tmp_path)


def test_pickled_for_another_process(retriever, queries):
    copy = pickle.loads(pickle.dumps(retriever))
    assert same(copy.retrieve_ids(queries, 3), retriever.retrieve_ids(queries, 3))


# What goes wrong


@pytest.mark.parametrize(
    ("query", "error", "match"),
    [
        ({}, ColumnError, "an empty dict"),
        ({"image": None, "questions": "what"}, ColumnError, r"'questions' \(is it 'question'\?\)"),
        ({"prompt": "a", "question": "b"}, ColumnError, "'prompt' and 'question'"),
        ({"prompt": 3}, RowError, "'prompt': expected a text, got int"),
        ({"prompt": "a", "id": 3.0}, RowError, "'id': expected a text or an integer, got float"),
        ({"image": 3}, ImageError, "got int"),
        ({"image": "no-such.png"}, ImageError, "no-such.png"),
        ({"image": None, "prompt": " "}, RowError, "query 0: expected an image or a prompt, both are empty"),
        ({"prompt": "", "id": "q7"}, RowError, "query 'q7'"),
        (7, ColumnError, "got int"),
        ("what colour", ImageError, "no such file: 'what colour'; a query is an image, or a dict"),
        ([["what colour"]], ColumnError, "got list"),
    ],
)
def test_queries_that_cannot_be_used(retriever, query, error, match):
    with pytest.raises(error, match=match):
        retriever(query, k=1)


def test_numbers_that_cannot_be_met(retriever, queries):
    with pytest.raises(TooFewDemonstrationsError, match="13 demonstrations were asked for, the index holds 12"):
        retriever(queries, k=13)
    with pytest.raises(ValueError, match="at least 1"):
        retriever(queries[0], k=0)


def test_arguments_that_cannot_be_used(clip, encoder, table):
    with pytest.raises(ValueError, match=r"expected one of the strategies si, st, sit, sit\+draft"):
        DemoRetriever.from_encoder(encoder, table, strategy="best")
    with pytest.raises(ValueError, match="and weights"):
        DemoRetriever.from_encoder(encoder, table, strategy="si", weights=(1, 1, 1))
    with pytest.raises(ValueError, match="build_encoder"):
        DemoRetriever.from_encoder(encoder, table, lora=True)
    with pytest.raises(EmptySupportError):
        DemoRetriever.from_encoder(encoder, [])
    with pytest.raises(ValueError, match="kind is one of"):
        DemoRetriever.from_encoder(encoder, table, index_kind="ivf")
    from sentence_transformers import SentenceTransformer

    with pytest.raises(ValueError, match="make it with"):
        DemoRetriever(SentenceTransformer(str(clip), device="cpu"), table)
    with pytest.raises(ValueError, match="got a CLIPModel"):
        DemoRetriever.from_encoder(encoder[0].model, table)


def test_a_demonstration_without_the_part_that_counts(encoder):
    rows = [*make_rows(0, 2), {"id": "bare", "image": None, "prompt": "what", "response": "red", "group": None}]
    retriever = DemoRetriever.from_encoder(encoder, rows, strategy="si")
    with pytest.raises(RowError, match="demonstration 'bare': expected at least one of image"):
        retriever.refresh()


def test_a_broken_encoder_is_not_indexed(clip, table):
    retriever = DemoRetriever.from_encoder(clip, table, device="cpu")
    with torch.no_grad():
        retriever.encoder[0].model.text_projection.weight[0] = torch.nan
    with pytest.raises(NonFiniteEmbeddingError):
        retriever(Query(picture(1), "what"), k=1)


def test_repr(retriever, clip):
    assert repr(retriever) == f"DemoRetriever({str(clip)!r}, strategy='sit+draft', 12 demonstrations, index='flat')"


# The card


def front(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_of_a_saved_retriever(saved, clip):
    card = (saved[0] / "README.md").read_text()
    meta = front(card)
    assert meta["library_name"] == "drum-hf" and meta["pipeline_tag"] == "visual-question-answering"
    assert "base_model" not in meta and str(clip.parent) not in card  # a local folder is nobody else's business
    assert "[me/tiny-lvlm](https://huggingface.co/me/tiny-lvlm)" in card and "`abc`" in card
    assert "2412.07619" in card and "2403.12736" in card and "12 demonstrations" in card


def test_the_card_tells_what_it_is_given():
    card = render_card(
        {
            "repo_id": "me/drum",
            "base_model": "openai/clip-vit-base-patch32",
            "base_revision": "3d74acf",
            "adapter": True,
            "strategy": "sit",
            "weights": {"image": 0.5, "prompt": 0.5, "response": 0.0},
            "support": {"rows": 9009, "included": False},
            "training": {"rounds": 3, "scored_pairs": 20000},
            "datasets": ["lmms-lab/OK-VQA"],
            "metrics": ["accuracy"],
            "model_index": [{"dataset": "lmms-lab/OK-VQA", "metric": "accuracy", "value": 0.5}],
            "results": [{"method": "SIT | plain", "accuracy": 0.51234}, {"method": "DRUM", "accuracy": None}],
        }
    )
    meta = front(card)
    assert meta["base_model"] == "openai/clip-vit-base-patch32" and meta["base_model_relation"] == "adapter"
    result = meta["model-index"][0]["results"][0]
    assert result["dataset"]["name"] == "lmms-lab/OK-VQA" and result["metrics"] == [{"type": "accuracy", "value": 0.5}]
    assert "| SIT \\| plain | 0.5123 |" in card and "| DRUM |  |" in card and "|---|---:|" in card
    assert "**scored pairs**: 20,000" in card and "`3d74acf`" in card
    assert "image 0.500, prompt 0.500" in card and "response" not in card.split("**Compares**")[1].splitlines()[0]
    assert 'support="your_table.parquet"' in card and "9,009 demonstrations" in card


def test_training_and_results_reach_the_card(retriever, tmp_path):
    retriever.record_training(teacher={"name": "me/lvlm"}, training={"rounds": 2})
    retriever.card_data["results"] = [{"method": "DRUM", "accuracy": 0.9}]
    retriever.save_pretrained(tmp_path)
    loaded = DemoRetriever.from_pretrained(tmp_path, device="cpu")
    assert loaded.card_data == retriever.card_data and loaded.teacher == {"name": "me/lvlm"}
    card = (tmp_path / "README.md").read_text()
    assert "**rounds**: 2" in card and "| DRUM | 0.9 |" in card
