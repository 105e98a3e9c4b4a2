"""What is mutated: how each artefact is made, read in full, and signed anew after it was changed.

`read` gives what a user would get of it, as something that can be compared. Where `sealed`, the artefact's own
checksums cover everything, so that a change that was not signed anew must be refused or leave that the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .basics import Artefact, picture, rows
from .tasks import TASKS

# ---- tables ----


def _table() -> Any:
    from drum_hf.data import TripletTable

    return TripletTable.from_dataset(rows())


def _content(table: Any) -> Any:
    return [
        (
            d.id,
            d.prompt,
            d.response,
            d.references,
            d.group,
            d.label,
            d.image and hashlib.md5(d.image.tobytes()).hexdigest(),
        )
        for d in table
    ]


def _saved_table(folder: Path) -> Any:
    from drum_hf.data import TripletTable

    return _content(TripletTable.load(folder / "triplets.parquet"))


def _mapped_table(folder: Path) -> Any:
    from drum_hf.data import TripletTable

    with tempfile.TemporaryDirectory() as cache:
        return _content(TripletTable.load(folder / "triplets.parquet", mmap=True, cache_dir=cache))


def _own_rows(folder: Path) -> list[dict[str, Any]]:
    made = []
    for row in rows(6):
        row.pop("image").save(folder / f"{row['id']}.png")
        made.append(
            {"id": row["id"], "image": f"{row['id']}.png", "prompt": row["prompt"], "response": row["response"]}
        )
    return made


def _make_csv(folder: Path) -> None:
    made = _own_rows(folder)
    lines = [",".join(made[0]), *(",".join(row.values()) for row in made)]
    (folder / "metadata.csv").write_text("\n".join(lines))


def _make_jsonl(folder: Path) -> None:
    made = [row | {"references": ["a", "b"], "group": "g"} for row in _own_rows(folder)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, made)))


def _make_rows_parquet(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(_own_rows(folder)), folder / "metadata.parquet")


def _make_dataset(folder: Path) -> None:
    from datasets import Dataset

    Dataset.from_list(_own_rows(folder)).save_to_disk(folder / "saved")


def _load_table(folder: Path) -> Any:
    from drum_hf.data import load_table

    return _content(load_table(folder))


def _load_dataset(folder: Path) -> Any:
    from drum_hf.data import load_table

    return _content(load_table(folder / "saved", image_root=folder))


_FORMATS = {
    "png": {},
    "jpg": {},
    "gif": {},
    "webp": {},
    "tif": {},
    "bmp": {},
    "ico": {},
    "jp2": {},
    "tga": {},
    "ppm": {},
    "avif": {},
}


def _make_images(folder: Path) -> None:
    (folder / "a").mkdir()
    for number, (suffix, options) in enumerate(_FORMATS.items()):
        picture(number, 24).save(folder / "a" / f"{number}.{suffix}", **options)


# ---- indexes ----


def _make_index(**options: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        import drum_hf.index.faiss_kinds
        from drum_hf.index.demo_index import DemoIndex

        least, drum_hf.index.faiss_kinds._LEAST = drum_hf.index.faiss_kinds._LEAST, 100
        try:
            index = DemoIndex(8, **options)
            vectors = np.random.default_rng(0).standard_normal((300, 8))
            index.add([f"r{i}" for i in range(300)], vectors, [f"g{i // 4}" if i % 3 else None for i in range(300)])
            index.save(folder)
        finally:
            drum_hf.index.faiss_kinds._LEAST = least

    return make


def _read_index(folder: Path) -> Any:
    from drum_hf.index.demo_index import DemoIndex

    index = DemoIndex.load(folder)
    queries = np.random.default_rng(1).standard_normal((4, index.dimension))
    found = index.search(queries, min(5, len(index)), exclude_groups=["g1", None, "g2", None])
    more = np.random.default_rng(2).standard_normal((3, index.dimension))
    index.add(["n0", "n1", "n2"], more)
    index.remove(["n1", *index.ids[:2]])
    again = index.search(queries, min(5, len(index)))
    return repr((found[0], again[0], [s.round(5).tolist() for s in found[1]]))


def _sign_index(folder: Path) -> None:
    from safetensors.numpy import load

    from drum_hf.index.files import entries_sum

    tensors = load((folder / "vectors.safetensors").read_bytes())
    meta = json.loads((folder / "index.json").read_text())
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(np.ascontiguousarray(tensors[name]).data)
    meta |= {"vectors_sha256": digest.hexdigest(), "entries_sha256": entries_sum(meta)}
    (folder / "index.json").write_text(json.dumps(meta))


def _make_sharded(folder: Path) -> None:
    from drum_hf.index.sharded import ShardedIndex

    index = ShardedIndex(8, shard_rows=20)
    index.add([f"r{i}" for i in range(50)], np.random.default_rng(0).standard_normal((50, 8)), [None, "g1"] * 25)
    index.save(folder)


def _read_sharded(folder: Path) -> Any:
    from drum_hf.index.sharded import ShardedIndex

    index = ShardedIndex.load(folder)
    queries = np.random.default_rng(1).standard_normal((4, index.dimension))
    found = index.search(queries, min(5, len(index)), exclude_groups=["g1", None, "g2", None])
    index.add(["n0", "n1"], np.random.default_rng(2).standard_normal((2, index.dimension)))
    index.remove(["n1", *index.ids[:2]])
    return repr((found[0], [s.round(5).tolist() for s in found[1]], index.search(queries, min(5, len(index)))[0]))


def _sign_sharded(folder: Path) -> None:
    for shard in sorted(folder.glob("shard-*")):
        _sign_index(shard)


# ---- the retriever ----


def _make_retriever(lora: bool) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from drum_hf.retriever.retriever import DemoRetriever

        DemoRetriever.from_encoder(_base(folder), support=_table(), lora=lora, device="cpu").save_pretrained(folder)

    return make


def _base(folder: Path) -> Path:
    from drum_hf.playground.building.pretraining import build_clip

    base = folder.parent / "base-clip"
    if not base.exists():
        for part in build_clip(seed=0):
            part.save_pretrained(base)
    return base


def _make_frozen(folder: Path) -> None:
    from drum_hf.retriever.retriever import DemoRetriever

    retriever = DemoRetriever.from_encoder(_base(folder), support=_table(), device="cpu")
    retriever.freeze_support()
    retriever.save_pretrained(folder)


def _make_referring(folder: Path) -> None:
    """A retriever beside the images that it refers to."""
    from drum_hf.data import TripletTable
    from drum_hf.retriever.retriever import DemoRetriever

    places = folder / "images"
    places.mkdir()
    made = []
    for row in rows():
        row["image"].save(places / f"{row['id']}.png")
        made.append(row | {"image": str(places / f"{row['id']}.png")})
    retriever = DemoRetriever.from_encoder(_base(folder), support=TripletTable.from_dataset(made), device="cpu")
    retriever.save_pretrained(folder / "retriever", images="reference", image_root=places)


def _read_referring(folder: Path) -> Any:
    return _read_retriever(folder / "retriever", image_root=folder / "images")


def _read_retriever(folder: Path, **options: Any) -> Any:
    from drum_hf.retriever.retriever import DemoRetriever

    retriever = DemoRetriever.from_pretrained(folder, device="cpu", **options)
    found = retriever({"image": picture(99), "prompt": "what is 3?", "draft": "word1"}, k=3)
    return repr((found.ids, [round(float(s), 3) for s in found.scores], _content(retriever.support)))


def _make_adapter(folder: Path) -> None:
    from drum_hf.retriever.retriever import DemoRetriever

    retriever = DemoRetriever.from_encoder(_base(folder), support=_table(), lora=True, device="cpu")
    retriever.save_pretrained(folder.parent / "host")
    retriever.save_pretrained(folder, include_support=False, include_index=False)


_hosts: list[Any] = []


def _read_adapter(folder: Path) -> Any:
    """The adapter beside another retriever's; where it can't be had, that one must be as it was."""
    from drum_hf.retriever.retriever import DemoRetriever

    if not _hosts:
        _hosts.append(DemoRetriever.from_pretrained(folder.parent / "pristine" / "host", device="cpu"))
    host, query = _hosts[0], {"image": picture(99), "prompt": "what is 3?", "draft": "word1"}

    def shown() -> Any:
        return host.adapters, host.active_adapter, host.weights, [round(float(s), 3) for s in host(query, k=3).scores]

    before = shown()
    name = f"n{len(host.adapters)}"
    try:
        host.load_adapter(folder, name)
    except BaseException:
        assert shown() == before, "an adapter that could not be loaded has changed the retriever"
        raise
    host.set_adapter(name)
    try:
        found = [round(float(s), 3) for s in host(query, k=3).scores], host.weights
    finally:
        host.set_adapter("default")
    assert shown()[1:] == before[1:], "an adapter beside it has changed the retriever"
    if len(host.adapters) > 20:
        _hosts.clear()
    return repr(found)


# ---- models: an encoder by name, an adapter beside its base model ----


def _make_encoder(folder: Path) -> None:
    from drum_hf.playground.building.pretraining import build_clip

    for part in build_clip(seed=0):
        part.save_pretrained(folder)


def _read_encoder(folder: Path) -> Any:
    from drum_hf.encoders.loading import build_encoder

    encoder = build_encoder(folder, device="cpu")
    shown = [{"image": picture(1), "text": ["what is it?", "red"]}]
    return repr(encoder.encode(shown, show_progress_bar=False).round(3).tolist())


def _make_based(folder: Path) -> None:
    """A retriever that is an adapter, and the folder of the base model it names, which is changed as well."""
    from drum_hf.retriever.retriever import DemoRetriever

    _make_encoder(folder / "base")
    retriever = DemoRetriever.from_encoder(folder / "base", support=_table(), lora=True, device="cpu")
    retriever.save_pretrained(folder / "retriever", include_index=False)


def _read_based(folder: Path) -> Any:
    return _read_retriever(folder / "retriever", base_model=folder / "base")


# ---- LVLMs, whole and adapters ----


def _make_lvlm(folder: Path) -> None:
    from drum_hf.utils.optional import resolve_name

    shutil.copytree(resolve_name("playground/lvlm"), folder, dirs_exist_ok=True)


def _read_lvlm(folder: Path) -> Any:
    from drum_hf.lvlm.local.model import TransformersLVLM

    return _scored(TransformersLVLM.from_pretrained(str(folder), device="cpu"))


def _make_tuned(merged: bool) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from drum_hf.tuning import ICLTuner, TuningConfig

        with tempfile.TemporaryDirectory() as place:
            _make_mix(Path(place))
            config = TuningConfig.load(Path(place, "mix.yaml"))
            mix, _ = config.mixes()
            options = {"report_to": [], "use_cpu": True, "save_strategy": "no", "lora_rank": 2}
            tuner = ICLTuner(config.model, config.arguments(Path(place, "out"), **options), train_dataset=mix)
            tuner.train()
            tuner.save_pretrained(folder, merged=merged)

    return make


def _make_lvlm_adapter(folder: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    from drum_hf.lvlm.local.model import TransformersLVLM

    torch.manual_seed(0)
    model = TransformersLVLM.from_pretrained("playground/lvlm", device="cpu").model
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder)


def _read_lvlm_adapter(folder: Path) -> Any:
    from drum_hf.lvlm.local.model import TransformersLVLM

    return _scored(TransformersLVLM.from_pretrained("playground/lvlm", adapter=str(folder), device="cpu"))


def _scored(lvlm: Any) -> Any:
    from drum_hf.types import Demonstration, ICLRequest, Query

    shown = Demonstration(id="a", image=picture(1), prompt="what?", response="red")
    request = ICLRequest(Query(image=picture(2), prompt="what?"), (shown,), ("red",))
    return repr([round(float(score), 3) for score in lvlm.score([request])])


def _sign_retriever(folder: Path) -> None:
    with contextlib.suppress(Exception):  # no longer an index: its own reader will say so
        _sign_index(folder / "index")
    path = folder / "drum_config.json"
    config = json.loads(path.read_text())
    config["files"] = {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in ("README.md", "drum_config.json")
    }
    path.write_text(json.dumps(config))


# ---- scores ----


def _store(path: Path) -> Any:
    from drum_hf.scores.store import RequestParts, ScoreStore

    store = ScoreStore(path)
    pairs = [
        RequestParts(f"{i:032x}", (f"{i + 1:032x}", "k"), ("yes", "no"), (1.0, 2.0), ("yes", "no")) for i in range(60)
    ]
    texts = [RequestParts(f"{i:032x}", (), (), (), (), 8) for i in range(20)]
    identity = {"name": "me/lvlm", "revision": "abc"}
    store.put_scores(
        [p.key("f") for p in pairs], [-i / 7 for i in range(60)], fingerprint="f", parts=pairs, identity=identity
    )
    store.put_texts([p.key("f") for p in texts], [f"text {i}" for i in range(20)], fingerprint="f", parts=texts)
    return store


def _make_store(folder: Path) -> None:
    _store(folder / "scores.sqlite").close()


def _read_store(folder: Path) -> Any:
    from drum_hf.scores.store import ScoreStore
    from drum_hf.scores.transfer import export_scores

    with ScoreStore(folder / "scores.sqlite", timeout=2.0) as store:
        held = repr(list(store.entries(page_size=13)))
        store.stats(), store.identities(), len(store)
        entries = [e for page in store.entries() for e in page]
        store.get_scores([e.key for e in entries]), store.get_texts([e.key for e in entries])
        export_scores(store, folder / "out.parquet")
        store.collect(contents=["k"], dry_run=True)
        store.put_scores([b"new"], [-1.0], fingerprint="g")
        return held


def _make_export(folder: Path) -> None:
    from drum_hf.scores.transfer import export_scores

    with _store(folder / "s.sqlite") as store:
        export_scores(store, folder / "scores.parquet", rows_per_group=25)
    for path in folder.glob("s.sqlite*"):
        path.unlink()


def _read_export(folder: Path) -> Any:
    from drum_hf.scores.store import ScoreStore
    from drum_hf.scores.transfer import import_scores

    with ScoreStore(":memory:") as store:
        import_scores(folder / "scores.parquet", store)
        return repr(list(store.entries()))


def _make_candidates(folder: Path) -> None:
    from drum_hf.training.mining import CandidateTable

    table = CandidateTable([f"q{i}" for i in range(10)])
    for number in range(2):
        mined = {f"q{i}": [(f"c{number}-{j}", j) for j in range(4)] for i in range(10)}
        table.extend(mined, [-(i % 7) / 3 for i in range(40)])
    table.save(folder / "candidates.parquet")


def _read_candidates(folder: Path) -> Any:
    from drum_hf.training.mining import CandidateTable

    table = CandidateTable.load(folder / "candidates.parquet")
    for query_id in table.query_ids:
        table.sample(query_id, 4, np.random.default_rng(0))
    return repr((table.query_ids, table.rounds, list(table.rows())))


def _make_cells(folder: Path) -> None:
    from drum_hf.experiments.suites.cells import CellFiles, Values

    values = np.linspace(0, 1, 6)
    shown = [[f"d{i}", f"d{i + 1}"] for i in range(6)]
    CellFiles(folder).write("cell", Values([f"q{i}" for i in range(6)], values, ["red"] * 6, shown, 40))


def _read_cells(folder: Path) -> Any:
    from drum_hf.experiments.suites.cells import CellFiles

    return repr(CellFiles(folder).read("cell"))


# ---- tuning ----


def _make_mix(folder: Path) -> None:
    import yaml

    for word in ("red", "blue", "wug"):
        (folder / "words" / word).mkdir(parents=True)
        for number in range(4):
            picture(number + len(word) * 10).save(folder / "words" / word / f"{number}.png")
    turns = [{"from": "human", "value": "<image>\nwhich?"}, {"from": "gpt", "value": "seven"}]
    chat = [{"conversations": turns, "image": "words/red/0.png"}]
    (folder / "chat.json").write_text(json.dumps(chat))
    messages = [{"role": "user", "content": "2?"}, {"role": "assistant", "content": [{"type": "text", "text": "3"}]}]
    (folder / "talk.jsonl").write_text(json.dumps({"messages": messages, "images": [], "form": "open"}))
    concepts = [{"image": f"words/red/{i}.png", "colour": f"c{i % 2}"} for i in range(4)]
    lines = ["image,colour", *(f"{row['image']},{row['colour']}" for row in concepts)]
    (folder / "concepts.csv").write_text("\n".join(lines))
    bench = [
        {
            "question": "which?",
            "choice_a": "a",
            "choice_b": "b",
            "choice_c": "c",
            "choice_d": "d",
            "answer": "AB"[i // 2],
            "question_type_id": 1 + i % 2,
            "data_id": f"words/blue/{i}.png",
        }
        for i in range(4)
    ]
    (folder / "seed.json").write_text(json.dumps({"questions": bench}))
    config = {
        "model": "playground/lvlm",
        "sources": [
            {"name": "words", "reader": "labels", "path": "words", "episodes": {"forms": ["open"], "shots": [0, 2]}},
            {"name": "chat", "reader": "llava", "path": "chat.json", "weight": 0.5},
            {"name": "talk", "reader": "messages", "path": "talk.jsonl"},
            {"name": "seed", "reader": "seed_bench", "path": "seed.json", "episodes": {"shots": [0, 1]}},
            {
                "name": "own",
                "reader": "concepts",
                "path": "concepts.csv",
                "episodes": {"shots": [0, 1]},
                "options": {"concepts": {"colour": "colour"}},
            },
        ],
        "curriculum": [{"shots": [0, 1], "replay": 0.2}, {"shots": [0, 1], "forms": ["open"]}],
        "tuning": {"conversations": 8, "learning_rate": "1e-2"},
        "seed": 3,
    }
    (folder / "mix.yaml").write_text(yaml.safe_dump(config))


def _read_mix(folder: Path) -> Any:
    from drum_hf.tuning import TuningConfig

    config = TuningConfig.load(folder / "mix.yaml")
    config.arguments(folder / "out", report_to=[], use_cpu=True)
    mix, _ = config.mixes()
    return repr([mix.draw(number, number / 8).key for number in range(8)])


ARTEFACTS: dict[str, Artefact] = {
    "retriever": Artefact(_make_retriever(False), _read_retriever, _sign_retriever, True, share=0.35),
    "retriever-lora": Artefact(_make_retriever(True), _read_retriever, _sign_retriever, True, share=0.35),
    "retriever-frozen": Artefact(_make_frozen, _read_retriever, _sign_retriever, share=0.35),
    "retriever-referring": Artefact(
        _make_referring,
        _read_referring,
        lambda folder: _sign_retriever(folder / "retriever"),
        share=0.35,
        given=("retriever", "images"),
    ),
    "adapter": Artefact(_make_adapter, _read_adapter, _sign_retriever, share=0.35),
    "encoder": Artefact(_make_encoder, _read_encoder, share=0.35),
    "adapter-and-base": Artefact(
        _make_based, _read_based, lambda f: _sign_retriever(f / "retriever"), share=0.35, given=("retriever", "base")
    ),
    "lvlm": Artefact(_make_lvlm, _read_lvlm, share=0.35),
    "lvlm-adapter": Artefact(_make_lvlm_adapter, _read_lvlm_adapter, share=0.35),
    "tuned-adapter": Artefact(_make_tuned(False), _read_lvlm_adapter, share=0.35),
    "tuned-merged": Artefact(_make_tuned(True), _read_lvlm, share=0.35),
    "index-sharded": Artefact(_make_sharded, _read_sharded, _sign_sharded),
    "index-flat": Artefact(_make_index(), _read_index, _sign_index, sealed=True),
    "index-hnsw": Artefact(_make_index(kind="hnsw", hnsw_m=4), _read_index, _sign_index, sealed=True),
    "index-hnsw-int8": Artefact(
        _make_index(kind="hnsw", storage="int8", hnsw_m=4), _read_index, _sign_index, sealed=True
    ),
    "index-ivfpq": Artefact(
        _make_index(kind="ivfpq", storage="float16", pq_bytes=4), _read_index, _sign_index, sealed=True
    ),
    "store": Artefact(_make_store, _read_store, share=2.0, given=("scores.sqlite",)),
    "export": Artefact(_make_export, _read_export, given=("scores.parquet",)),
    "candidates": Artefact(_make_candidates, _read_candidates, given=("candidates.parquet",)),
    "table": Artefact(
        lambda folder: _table().save(folder / "triplets.parquet"), _saved_table, given=("triplets.parquet",)
    ),
    "table-mapped": Artefact(
        lambda folder: _table().save(folder / "triplets.parquet"), _mapped_table, given=("triplets.parquet",)
    ),
    "rows-csv": Artefact(_make_csv, _load_table, share=0.6),
    "rows-jsonl": Artefact(_make_jsonl, _load_table, share=0.6),
    "rows-parquet": Artefact(_make_rows_parquet, _load_table, share=0.6),
    "rows-dataset": Artefact(_make_dataset, _load_dataset, share=0.6, given=("saved",)),
    "images": Artefact(_make_images, _load_table, share=2.0),
    "cells": Artefact(_make_cells, _read_cells),
    "mix": Artefact(_make_mix, _read_mix, anywhere=True),
    **TASKS,
}
