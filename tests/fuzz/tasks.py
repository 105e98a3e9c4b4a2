"""Files of public forms: in-context benchmarks, episode sources, and suites."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .basics import Artefact, picture


def _pictures(folder: Path, count: int = 6) -> list[str]:
    for number in range(count):
        picture(number).save(folder / f"{number}.png")
    return [f"{number}.png" for number in range(count)]


# ---- episode sources ----


def _make_episodes(folder: Path) -> None:
    names = _pictures(folder)
    questions: list[dict[str, Any]] = [
        {
            "question": "which?",
            "choice_a": "cat",
            "choice_b": "dog",
            "choice_c": "cow",
            "choice_d": "hen",
            "answer": "AB"[i % 2],
            "question_type_id": 1 + i % 3,
            "data_id": name,
        }
        for i, name in enumerate(names)
    ]
    (folder / "seed.json").write_text(json.dumps({"questions": questions}))
    (folder / "checklist").mkdir()
    for colour in ("red", "blue"):
        shown = names[3:] if colour == "red" else names[:3]
        texts = [[name, {"POS": [f"a {colour} car"], "NEG": ["a green car"]}] for name in shown]
        (folder / "checklist" / f"{colour}.json").write_text(json.dumps(texts))
    turns = [{"from": "human", "value": "<image>\nwhich?"}, {"from": "gpt", "value": "seven"}]
    chat = [{"conversations": turns, "image": name} for name in names]
    (folder / "llava.json").write_text(json.dumps(chat))
    (folder / "llava.jsonl").write_text("\n".join(map(json.dumps, chat)))


def _read_episodes(folder: Path) -> Any:
    import drum_hf.tuning.episodes as data

    seed = data.read_seed_bench(folder / "seed.json")
    checklist = data.read_vl_checklist(folder / "checklist", concept="colour", image_root=folder)
    talks = [data.read_llava(folder / name) for name in ("llava.json", "llava.jsonl")]
    drawn = []
    for table in (seed, checklist):
        episodes = data.Episodes(table, data.EpisodeSettings(shots=(0, 1), forms=("open",)), seed=1)
        drawn.append([episodes.draw(number).key for number in range(4)])
    return repr((drawn, [conversation.key for talk in talks for conversation in talk]))


# ---- benchmarks ----


def _asked(benchmark: Any) -> Any:
    """Ids, answers and whole requests: every picture is decoded."""
    found = []
    for item in benchmark.items:
        request = item.build()
        texts = [(d.prompt, d.response, d.image and d.image.size) for d in request.demonstrations]
        found.append((item.id, item.gold, item.options, request.query.prompt, texts))
    return repr(found)


def _make_vl_icl(task: str) -> Any:
    def make(folder: Path) -> None:
        place = folder / task
        place.mkdir()
        names = [f"{task}/{name}" for name in _pictures(place, 12)]
        if task == "open_mi":
            rows = [
                {
                    "image": names[number],
                    "question": "what is it?",
                    "answer": "dax",
                    "classes": ["dax", "wug"],
                    "support": {
                        word: {"images": [names[2 + 2 * k + number]]} for k, word in enumerate(("dax", "wug"))
                    },
                }
                for number in range(2)
            ]
        else:
            rows = [{"image": [name], "question": "how many?", "answer": 3} for name in names[:3]]
            support = [{"image": [name], "question": "how many?", "answer": i} for i, name in enumerate(names[3:])]
            (place / "support.json").write_text(json.dumps(support))
        (place / "query.json").write_text(json.dumps(rows))

    return make


def _read_vl_icl(task: str) -> Any:
    def read(folder: Path) -> Any:
        from drum_hf.evaluation.benchmarks.benchmarks import read_vl_icl

        return _asked(read_vl_icl(folder / task, shots=[0, 1]))

    return read


def _make_smmile(folder: Path) -> None:
    import datasets

    rows = {
        "problem_id": [f"p{i // 3}" for i in range(9)],
        "order": [i % 3 for i in range(9)],
        "image": [picture(i) for i in range(9)],
        "question": ["what is shown?"] * 9,
        "answer": [f"finding {i % 2}" for i in range(9)],
    }
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("problem_id", "question", "answer")}
        | {"order": datasets.Value("int64"), "image": datasets.Image()}
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "smmile.parquet")


def _read_smmile(folder: Path) -> Any:
    from drum_hf.evaluation.benchmarks.benchmarks import read_smmile

    return [_asked(read_smmile(folder, format=form)) for form in ("open", "choice")]


# ---- suites ----


def _make_suite(folder: Path) -> None:
    import yaml

    (folder / "birds").mkdir()
    names = _pictures(folder / "birds")
    rows = [{"id": n, "image": n, "prompt": "what?", "response": f"w{i}"} for i, n in enumerate(names)]
    (folder / "birds" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    suite = {
        "name": "birds",
        "data": {
            "birds": {"task": "vqa", "table": "birds", "seeds": [0, 1], "support_rows": 3},
            "worlds": {"task": "vqa", "world": "easy", "query_rows": 2},
        },
        "lvlms": ["playground/lvlm", {"model": "m", "endpoint": "http://localhost:1/v1", "concurrency": 2}],
        "encoders": ["playground/clip"],
        "strategies": ["zero-shot", "sit+draft", "drum", "drum+mmr"],
        "shots": [1, 4],
        "headline": 4,
        "paired": ["drum>sit+draft"],
        "training": {"rounds": 1, "learning_rate": "1e-3"},
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))


def _read_suite(folder: Path) -> Any:
    from drum_hf.experiments.suites import load_suite
    from drum_hf.experiments.suites.opening import open_data

    spec = load_suite(folder / "suite.yaml")
    spec.comparisons(), spec.transferred()
    own = [data for data in spec.data if data.table]
    sides = [open_data(data, seed) for data in own for seed in data.seeds[:2]]
    lengths = [[len(side) for side in both] for both in sides]
    return repr((spec, lengths)).replace(str(folder), "")


TASKS: dict[str, Artefact] = {
    "episodes": Artefact(_make_episodes, _read_episodes),
    "vl-icl": Artefact(_make_vl_icl("clevr"), _read_vl_icl("clevr")),
    "vl-icl-classes": Artefact(_make_vl_icl("open_mi"), _read_vl_icl("open_mi"), share=0.6),
    "smmile": Artefact(_make_smmile, _read_smmile),
    "suite": Artefact(_make_suite, _read_suite, anywhere=True),
}
