"""Files that a stranger made: what was found by `python -m tests.fuzz`, and a few hundred mutations of each run."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import sqlite3
import struct

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fuzz.__main__ import run
from fuzz.mutations import Evil, big_png, mutate
from tiny_encoders import picture, tiny_clip

from drum_hf.data import TripletTable, load_table
from drum_hf.errors import DrumError, ImageError, RowError, SavedFileError, SuiteError
from drum_hf.evaluation.benchmarks.benchmarks import read_smmile, read_vl_icl
from drum_hf.experiments.suites import load_suite
from drum_hf.experiments.suites.cells import CellFiles, Values
from drum_hf.index.demo_index import DemoIndex
from drum_hf.index.sharded import ShardedIndex
from drum_hf.lvlm.local.model import TransformersLVLM
from drum_hf.retriever.retriever import DemoRetriever
from drum_hf.scores.store import RequestParts, ScoreStore
from drum_hf.training.mining import CandidateTable
from drum_hf.tuning import TuningConfig
from drum_hf.tuning.episodes import read_llava, read_seed_bench, read_vl_checklist
from drum_hf.utils.files import leads_outside, read_parquet


@pytest.fixture
def index(tmp_path):
    made = DemoIndex(4)
    made.add(["a", "b", "c"], np.eye(3, 4))
    made.save(tmp_path / "index")
    return tmp_path / "index"


@pytest.fixture
def store(tmp_path):
    part = RequestParts("0" * 32, ("1" * 32,), ("yes",))
    with ScoreStore(tmp_path / "s.sqlite") as made:
        made.put_scores([part.key("f")], [-1.0], fingerprint="f", parts=[part], identity={"name": "m"})
    return tmp_path / "s.sqlite", part.key("f")


def write_rows(folder, image):
    (folder / "t.jsonl").write_text(json.dumps({"id": "a", "image": image, "prompt": "p", "response": "r"}))
    return folder / "t.jsonl"


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    picture(0).save(tmp_path / "secret.png")
    (tmp_path / "data" / "a.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(RowError, match="is a link that leaves it"):
        load_table(write_rows(tmp_path / "data", "a.png"))


def test_the_hubs_cache_is_its_own_folder(tmp_path):
    snapshot, blobs = tmp_path / "repo" / "snapshots" / "abc", tmp_path / "repo" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    picture(0).save(blobs / "hash.png")
    (snapshot / "a.png").symlink_to("../../blobs/hash.png")
    assert len(load_table(write_rows(snapshot, "a.png"))) == 1
    assert not leads_outside(snapshot / "a.png", snapshot) and leads_outside(tmp_path, snapshot)


def test_a_pipe_for_an_image_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ImageError, match="expected a file"):
        load_table(write_rows(tmp_path, "a.png"))


@pytest.mark.parametrize("content", [big_png(60_000, 60_000), big_png(2**31 - 1, 1)])
def test_a_picture_far_too_large_is_not_decoded(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ImageError):
        load_table(write_rows(tmp_path, "a.png"))


def test_a_pickle_under_another_name_is_not_run(tmp_path, index):
    mark = tmp_path / "run"
    for name in ("vectors.safetensors", "index.json"):
        (index / name).write_bytes(pickle.dumps(Evil(mark)))
        with pytest.raises(SavedFileError):
            DemoIndex.load(index)
    (tmp_path / "c.parquet").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(SavedFileError):
        CandidateTable.load(tmp_path / "c.parquet")
    assert not mark.exists()


def test_parquet_that_swells_is_refused(tmp_path):
    bomb = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array(["x" * 5_000_000]))
    pq.write_table(pa.table({"a": bomb}), tmp_path / "bomb.parquet", compression="zstd")
    with pytest.raises(ValueError, match="MB of memory"):
        read_parquet(tmp_path / "bomb.parquet")
    with pytest.raises(DrumError):
        load_table(tmp_path / "bomb.parquet")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38, 7.0])
def test_vectors_that_are_none_are_refused(index, value):
    import hashlib

    path, meta = index / "vectors.safetensors", json.loads((index / "index.json").read_text())
    data = bytearray(path.read_bytes())
    data[-4:] = struct.pack("<f", value)
    path.write_bytes(data)
    meta["vectors_sha256"] = hashlib.sha256(data[-48:]).hexdigest()
    (index / "index.json").write_text(json.dumps(meta))
    with pytest.raises(SavedFileError, match="finite and of length 1"):
        DemoIndex.load(index)


@pytest.mark.parametrize("name", ["vectors.safetensors", "index.json"])
def test_a_pipe_for_a_file_of_an_index(index, name):
    (index / name).unlink()
    os.mkfifo(index / name)
    with pytest.raises(SavedFileError):
        DemoIndex.load(index)


@pytest.mark.parametrize(("name", "value"), [("dimension", 2**40), ("hnsw_m", 2**31), ("ef_search", 10**30)])
def test_numbers_beyond_what_faiss_can_count(name, value):
    with pytest.raises(ValueError, match=f"{name} is a whole number from"):
        DemoIndex(**({"dimension": 4} | {name: value}))


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE TRIGGER t BEFORE INSERT ON scores BEGIN SELECT 1; END",
        "CREATE VIEW v AS SELECT 1",
        "CREATE INDEX i ON scores (value)",
        "ALTER TABLE scores ADD COLUMN more",
        "DROP TABLE contents",
    ],
)
def test_a_store_with_sql_of_its_own_is_refused(store, sql):
    with sqlite3.connect(store[0]) as connection:
        connection.execute(sql)
    connection.close()
    with pytest.raises(SavedFileError, match="is none that drum-hf made"):
        ScoreStore(store[0])


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE scores SET value = 9e999",
        "UPDATE scores SET value = 'text'",
        "UPDATE scores SET shown = x'00'",
        "UPDATE scores SET fingerprint = 99",
        "UPDATE lists SET value = '[' WHERE number = 1",
        "DELETE FROM contents",
    ],
)
def test_an_entry_that_was_altered_is_named(store, sql):
    path, key = store
    with sqlite3.connect(path) as connection:
        connection.execute(sql)
    connection.close()
    with ScoreStore(path) as opened, pytest.raises(SavedFileError, match="not what drum-hf wrote"):
        opened.get_scores([key])
        list(opened.entries())


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['true']",
        "!!timestamp x",
        "!!int ''",
        "2001-99-99",
        "[" * 5000,
        "l0: &l0 [a]\n" + "\n".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 12)),
        "sources: &a [*a]\nmodel: x",
        "model: x\nsources: [{name: a, reader: [labels], path: p}]",
    ],
)
def test_yaml_that_is_no_configuration(tmp_path, text):
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises((SavedFileError, ValueError), match=r"mix\.yaml"):
        TuningConfig.load(tmp_path / "mix.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['true']",
        "!!timestamp x",
        "!!int ''",
        "[" * 5000,
        "a\x00",
        "l0: &l0 [a]\n" + "\n".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 12)),
        "&a [*a]",
        "data: &a [*a]",
    ],
)
def test_yaml_that_is_no_suite(tmp_path, text):
    (tmp_path / "suite.yaml").write_text(text)
    with pytest.raises(SuiteError, match=r"suite\.yaml"):
        load_suite(tmp_path / "suite.yaml")


def test_what_stands_for_a_suite_and_is_none(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(SuiteError, match="is no file"):
        load_suite(tmp_path / "pipe.yaml")


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", '{"format_version": 1, "shards": 7}', None])
def test_shards_that_are_none(tmp_path, text):
    made = ShardedIndex(4, shard_rows=2)
    made.add(["a", "b", "c"], np.eye(3, 4))
    made.save(tmp_path)
    (tmp_path / "shards.json").unlink()
    if text is None:
        os.mkfifo(tmp_path / "shards.json")
    else:
        (tmp_path / "shards.json").write_text(text)
    with pytest.raises(SavedFileError, match=r"shards\.json"):
        ShardedIndex.load(tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc", "shard-00000/../../secret"])
def test_shards_lie_in_their_folder(tmp_path, name):
    made = ShardedIndex(4)
    made.add(["a"], np.eye(1, 4))
    made.save(tmp_path / "index")
    meta = json.loads((tmp_path / "index" / "shards.json").read_text())
    (tmp_path / "index" / "shards.json").write_text(json.dumps(meta | {"shards": [name]}))
    with pytest.raises(SavedFileError, match="shards of other names"):
        ShardedIndex.load(tmp_path / "index")


@pytest.fixture
def task(tmp_path):
    folder = tmp_path / "bench" / "clevr"
    folder.mkdir(parents=True)
    for number in range(3):
        picture(number).save(folder / f"{number}.png")
    rows = [{"image": f"clevr/{number}.png", "question": "how many?", "answer": number} for number in range(3)]
    (folder / "query.json").write_text(json.dumps(rows[:1]))
    (folder / "support.json").write_text(json.dumps(rows[1:]))
    read_vl_icl(folder, shots=1)
    return folder


def test_a_benchmark_whose_image_is_a_link_out_of_it(task, tmp_path):
    picture(9).save(tmp_path / "secret.png")
    (task / "0.png").unlink()
    (task / "0.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ImageError, match="is a link that leaves"):
        read_vl_icl(task, shots=1)


def test_a_benchmark_may_be_a_link_itself(task, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "clevr").symlink_to(task)
    assert len(read_vl_icl(tmp_path / "here" / "clevr", shots=1).items) == 1


def test_a_benchmarks_rows_that_are_none(task):
    (task / "query.json").write_text("[" * 100_000)
    with pytest.raises(SavedFileError, match=r"query\.json"):
        read_vl_icl(task)
    (task / "query.json").unlink()
    os.mkfifo(task / "query.json")
    with pytest.raises(SavedFileError, match="is no file"):
        read_vl_icl(task)


def test_a_benchmarks_classes_that_are_none(tmp_path):
    (tmp_path / "open_mi").mkdir()
    picture(0).save(tmp_path / "open_mi" / "0.png")
    row = {"image": "open_mi/0.png", "question": "what?", "answer": "dax", "classes": ["dax", {}], "support": {}}
    (tmp_path / "open_mi" / "query.json").write_text(json.dumps([row]))
    with pytest.raises(RowError, match="another class"):
        read_vl_icl(tmp_path / "open_mi", shots=[0])


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.json", "t.parquet"])
def test_a_table_that_is_a_link_to_itself_or_a_pipe(tmp_path, name):
    (tmp_path / name).symlink_to(tmp_path / name)
    with pytest.raises(SavedFileError, match=name):
        load_table(tmp_path / name)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(SavedFileError, match=name):
        load_table(tmp_path / name)


def test_a_benchmark_in_parquet_opens_nothing_else(tmp_path):
    picture(0).save(tmp_path / "secret.png")
    (tmp_path / "smmile").mkdir()
    image = pa.array([{"bytes": None, "path": "../secret.png"}] * 2)
    columns = {"problem_id": ["p", "p"], "order": [0, 1], "question": ["q"] * 2, "answer": ["a"] * 2}
    pq.write_table(pa.table(columns | {"image": image}), tmp_path / "smmile" / "rows.parquet")
    with pytest.raises(RowError, match="leaves it"):
        read_smmile(tmp_path / "smmile")
    bomb = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array(["x" * 5_000_000]))
    pq.write_table(pa.table({"question": bomb}), tmp_path / "smmile" / "rows.parquet", compression="zstd")
    with pytest.raises(SavedFileError, match="MB of memory"):
        read_smmile(tmp_path / "smmile")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state.json", {"_data_files": [{"filename": 7}]}),
        ("state.json", {"_split": 7}),
        ("state.json", {"_format_columns": 7, "_format_type": []}),
        ("dataset_info.json", {"features": 7}),
    ],
)
def test_a_saved_data_set_that_is_none(tmp_path, name, content):
    rows = [{"id": "a", "prompt": "p", "response": "rather long"}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    path = tmp_path / "saved" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | content))
    with pytest.raises(DrumError):
        load_table(tmp_path / "saved")


def test_a_saved_data_set_whose_text_is_none(tmp_path):
    datasets.Dataset.from_list([{"id": "a", "prompt": "p", "response": "rather long"}]).save_to_disk(
        tmp_path / "saved"
    )
    path = tmp_path / "saved" / "data-00000-of-00001.arrow"
    path.write_bytes(path.read_bytes().replace(b"rather long", b"rather\xe4long"))
    with pytest.raises(SavedFileError, match=r"Dataset\.save_to_disk"):
        load_table(tmp_path / "saved")


@pytest.mark.parametrize(
    "odd",
    [
        7,
        True,
        None,
        [],
        "text",
        {"conversations": 7},
        {"conversations": "text"},
        {"conversations": [{"from": [], "value": "v"}]},
    ],
)
def test_episode_rows_that_are_none(tmp_path, odd):
    question = {"question": "which?", "choice_a": "a", "choice_b": "b", "answer": "A", "question_type_id": 1}
    for name, read in (("seed", read_seed_bench), ("list", read_vl_checklist), ("chat", read_llava)):
        (tmp_path / f"{name}.json").write_text(json.dumps([odd, question]))
        with pytest.raises(DrumError):
            read(tmp_path / f"{name}.json")


@pytest.mark.parametrize("content", ["image,colour\\na.png," + "x" * 200_000, "[" * 100_000])
def test_a_sources_rows_that_are_none(tmp_path, content):
    path = tmp_path / ("rows.csv" if "," in content else "rows.json")
    path.write_text(content)
    source = {"name": "own", "reader": "concepts", "path": path.name}
    (tmp_path / "mix.yaml").write_text(json.dumps({"model": "m", "sources": [source]}))
    with pytest.raises(SavedFileError, match="expected a table as"):
        TuningConfig.load(tmp_path / "mix.yaml").mixes()


def test_a_column_twice_is_refused(tmp_path):
    rows = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["id", "id", "prompt"])
    pq.write_table(rows, tmp_path / "t.parquet")
    with pytest.raises(SavedFileError, match="'id' is in it twice"):
        load_table(tmp_path / "t.parquet")


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "link.png", "a\x00.png"])
def test_a_reference_that_leaves_the_images_folder(tmp_path, name):
    root = tmp_path / "images"
    root.mkdir()
    for place in (tmp_path / "secret.png", root / "0.png"):
        picture(0).save(place)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    table = TripletTable.from_dataset([{"id": "a", "image": str(root / "0.png"), "prompt": "p", "response": "r"}])
    file = table.save(tmp_path / "t.parquet", images="reference", image_root=root)
    rows = pq.read_table(file)
    image = pa.array([{"bytes": None, "path": name}], rows.schema.field("image").type)
    at = rows.column_names.index("image")
    pq.write_table(rows.set_column(at, rows.schema.field("image"), image), file)
    with pytest.raises(SavedFileError, match="image reference that"):
        TripletTable.load(file, image_root=root)


def test_a_few_hundred_mutations(tmp_path):
    kinds = ["index-flat", "index-hnsw", "store", "export", "candidates", "table", "rows-csv", "images"]
    counts, faults = run(300, 1, kinds, tmp_path / "work")
    assert faults == [] and counts.total() >= 290
    assert sum(n for (_, result), n in counts.items() if result.startswith("named")) > 100


def test_a_mutation_changes_something(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for seed in range(60):
        for name in ("rows.csv", "rows.json"):
            (tmp_path / "a" / name).write_text("id,image\n0,0.png" if name.endswith("csv") else '{"id": [1, 2]}')
        before = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
        mutate(tmp_path / "a", random.Random(seed), tmp_path / "b", tmp_path / "mark")
        after = {path: path.is_file() and path.read_bytes() for path in (tmp_path / "a").iterdir() if path.exists()}
        assert after != before
        shutil.rmtree(tmp_path / "a")
        (tmp_path / "a").mkdir()


# ---- adapters ----


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """Folders of a retriever with an adapter, and of one without."""
    work = tmp_path_factory.mktemp("adapted")
    clip = tiny_clip(work)
    table = TripletTable.from_dataset([{"id": f"d{i}", "prompt": f"what is {i}", "response": "x"} for i in range(6)])
    for name, lora in (("lora", True), ("plain", False)):
        DemoRetriever.from_encoder(clip, table, lora=lora, device="cpu").save_pretrained(work / name)
    return work


def altered(folder, name, change):
    """Change a JSON file of a saved encoder, and its checksum."""
    path = folder / "encoder" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    config = json.loads((folder / "drum_config.json").read_text())
    config["files"][f"encoder/{name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "drum_config.json").write_text(json.dumps(config))
    return folder


ADAPTERS = [
    ("adapter_config.json", {"megatron_config": {"a": 1}, "megatron_core": "this"}, "'megatron_config' is not supp"),
    ("adapter_config.json", {"layer_replication": [[0, 2**24]]}, "'layer_replication' is not supported"),
    ("adapter_config.json", {"r": 2**22}, "the rank 4.19e.06 is none of"),
    ("adapter_config.json", {"rank_pattern": {"q_proj": 2**20}}, "the rank 1.05e.06 is none of"),
    ("adapter_config.json", {"target_modules": "(.*)*x"}, "may match without end"),
    ("adapter_config.json", {"alpha_pattern": {".*" * 9 + "x": 1}}, "may match without end"),
    ("adapter_config.json", {"target_modules": ["no_such_layer"]}, "can't be put on this model"),
    ("adapter_config.json", {"r": 3}, "can't be put on this model"),
    ("sentence_bert_config.json", {"log_weights": ["a", 0, 0]}, "what was saved with the adapter"),
    ("sentence_bert_config.json", {"log_weights": [0]}, "no weights of its parts"),
]


@pytest.mark.parametrize("host", ["lora", "plain"])
def test_an_adapter_that_is_none_changes_nothing(adapted, tmp_path, host):
    retriever, query = DemoRetriever.from_pretrained(adapted / "lora", device="cpu"), [{"prompt": "what is 3"}]
    if host == "plain":
        retriever = DemoRetriever.from_encoder(adapted / "clip", retriever.support, device="cpu")
    names, used, (ids, scores) = retriever.adapters, retriever.active_adapter, retriever.retrieve_ids(query, 6)
    shapes = {name: value.shape for name, value in retriever.encoder.state_dict().items()}
    for number, (file, change, message) in enumerate(ADAPTERS):
        folder = altered(shutil.copytree(adapted / "lora", tmp_path / str(number)), file, change)
        with pytest.raises(SavedFileError, match=message):
            retriever.load_adapter(folder, "theirs")
        assert (retriever.adapters, retriever.active_adapter) == (names, used)
        assert {name: value.shape for name, value in retriever.encoder.state_dict().items()} == shapes
    retriever.mark_stale()
    again, theirs = retriever.retrieve_ids(query, 6)
    assert again == ids and np.array_equal(scores, theirs)
    retriever.load_adapter(adapted / "lora", "theirs")
    assert retriever.adapters == [*names, "theirs"]


@pytest.mark.parametrize(("file", "change", "message"), ADAPTERS[:8])
def test_a_retriever_whose_adapter_is_none(adapted, tmp_path, file, change, message):
    folder = altered(shutil.copytree(adapted / "lora", tmp_path / "r"), file, change)
    with pytest.raises(SavedFileError):
        DemoRetriever.from_pretrained(folder, device="cpu")


def test_an_encoder_whose_parts_do_not_fit(adapted, tmp_path):
    folder = shutil.copytree(adapted / "plain", tmp_path / "r")
    processor = json.loads((folder / "encoder" / "processor_config.json").read_text())["image_processor"]
    altered(folder, "processor_config.json", {"image_processor": processor | {"image_mean": [0.5, 0.5]}})
    with pytest.raises(SavedFileError, match="mean must have 3"):
        DemoRetriever.from_pretrained(folder, device="cpu")


def test_an_lvlms_adapter_that_is_a_pickle(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"]}')
    torch.save({"base_model.model.x": torch.zeros(2)}, tmp_path / "adapter_model.bin")
    with pytest.raises(SavedFileError, match=r"adapter_model\.safetensors: expected the adapter's weights"):
        TransformersLVLM.from_pretrained("playground/lvlm", adapter=str(tmp_path), device="cpu")


# ---- cells of a suite ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns(["answer"]), "answer"),
        (lambda t: t.replace_schema_metadata({"pairs": '"x"'}), "missing"),
        (lambda t: t.replace_schema_metadata({"pairs": "[" * 100_000}), "recursion"),
        (lambda t: t.set_column(1, "value", pa.array(["a", "b"])), "a cell of a suite"),
        (lambda t: t.set_column(1, "value", pa.array([0.0, float("nan")])), "no number"),
        (lambda t: t.set_column(0, "query_id", pa.array(["a", None])), "missing"),
    ],
)
def test_a_cell_that_is_none(tmp_path, change, message):
    files = CellFiles(tmp_path)
    files.write("key", Values(["a", "b"], np.array([0.0, 1.0]), ["x", "y"], [["c"], ["d"]], 3))
    assert files.read("key").pairs == 3
    pq.write_table(change(pq.read_table(files.path("key"))), files.path("key"))
    with pytest.raises(SavedFileError, match=f"(?i){message}"):
        files.read("key")


# What is found in a folder


@pytest.fixture
def outside(tmp_path):
    """A folder that nothing leads to but links."""
    place = tmp_path / "outside"
    (place / "cats").mkdir(parents=True)
    picture(0).save(place / "cats" / "a.png")
    pq.write_table(pa.table({"a": [1]}), place / "a.parquet")
    return place


def test_a_class_folder_that_is_a_link_out_is_not_listed(tmp_path, outside):
    (tmp_path / "data" / "dogs").mkdir(parents=True)
    picture(1).save(tmp_path / "data" / "dogs" / "b.png")
    assert load_table(tmp_path / "data").responses == ["dogs"]
    (tmp_path / "data" / "cats").symlink_to(outside / "cats")
    with pytest.raises(SavedFileError, match="cats: it is a link that leaves the folder"):
        load_table(tmp_path / "data")
    (tmp_path / "data" / "cats").unlink()
    (tmp_path / "data" / "dogs" / "more").symlink_to(outside / "cats")
    with pytest.raises(SavedFileError, match="more: it is a link that leaves the folder"):
        load_table(tmp_path / "data")


@pytest.mark.parametrize("name", ["../outside", "/etc", 7])
def test_a_split_leads_to_no_other_folder(tmp_path, outside, name):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_dict.json").write_text(json.dumps({"splits": [name]}))
    with pytest.raises(SavedFileError, match=r"leaves the folder|expected a list of splits"):
        load_table(tmp_path / "data")


def test_files_of_a_saved_data_set_a_benchmark_and_cells_that_are_links_out(tmp_path, outside):
    datasets.Dataset.from_list([{"prompt": "p", "response": "r"}]).save_to_disk(tmp_path / "data")
    (arrow,) = (tmp_path / "data").glob("*.arrow")
    arrow.rename(outside / "a.arrow")
    arrow.symlink_to(outside / "a.arrow")
    for folder, name in ((tmp_path / "smmile", "a.parquet"), (tmp_path / "cells", "key.parquet")):
        folder.mkdir()
        (folder / name).symlink_to(outside / "a.parquet")
    for read in (
        lambda: load_table(tmp_path / "data"),
        lambda: read_smmile(tmp_path / "smmile"),
        lambda: CellFiles(tmp_path / "cells").read("key"),
    ):
        with pytest.raises(SavedFileError, match="it is a link that leaves the folder"):
            read()
