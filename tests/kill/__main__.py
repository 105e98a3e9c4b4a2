"""Kill `drum-hf` at random moments, repeat the command until it is done, and compare with an uninterrupted run.

`python -m tests.kill --count 50 --seed 0 [--verbs train,score,eval,tune]`. The outcome must be the same bytes; no
answer that was stored is lost or paid for again. Exit status 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2]
VERBS = ("train", "score", "eval", "tune")
BATCH = 8

#: The command, with every request that the LVLM answered noted: a line a batch, written when it is answered.
LOGGED = f"""
import json, os, sys
import drum_hf.lvlm.cached as cached
from drum_hf.lvlm.local import TransformersLVLM
from drum_hf.lvlm.store import request_key

def noted(name, kind):
    plain = getattr(TransformersLVLM, name)
    def call(self, requests, **options):
        more = {{"max_new_tokens": options["max_new_tokens"]}} if kind == "generate" else {{}}
        keys = [request_key(r, self.fingerprint, kind=kind, **more).hex() for r in requests]
        descriptor = os.open(os.environ["PAID"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, (json.dumps(keys) + "\\n").encode())
        os.close(descriptor)
        return plain(self, requests, **options)
    setattr(TransformersLVLM, name, call)

noted("score", "score")
noted("generate", "generate")
# Small batches, so that there are many moments between them.
cached.CachedLVLM.__init__.__kwdefaults__["batch_size"] = {BATCH}
from drum_hf.cli import main
sys.exit(main(sys.argv[1:]))
"""


def make_data(folder: Path) -> None:
    """Small tables of a playground world, and a tuning configuration."""
    from drum_hf.playground import make_world

    world = make_world(21, difficulty="easy")
    for name, table, count in (("support", world.support, 24), ("queries", world.queries, 10)):
        (folder / name).mkdir(parents=True)
        rows = []
        for row in list(table)[:count]:
            row.image.save(folder / name / f"{row.id}.png")
            rows.append({"id": row.id, "image": f"{row.id}.png", "prompt": row.prompt, "response": row.response})
        (folder / name / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    by_class = folder / "classes"
    for row in list(world.support)[:24]:
        (by_class / row.response).mkdir(parents=True, exist_ok=True)
        row.image.save(by_class / row.response / f"{row.id}.png")
    source = {
        "name": "words",
        "reader": "labels",
        "path": str(by_class),
        "episodes": {"shots": [0, 1], "forms": ["open"]},
    }
    tuning = {"conversations": 16, "per_device_train_batch_size": 2, "lora_rank": 2, "lora_dropout": 0.1}
    tuning |= {
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
        "learning_rate": 1e-3,
        "report_to": [],
    }
    config = {"model": "playground/lvlm", "sources": [source], "tuning": tuning, "seed": 3}
    (folder / "mix.yaml").write_text(json.dumps(config))


def command(verb: str, data: Path, out: Path) -> list[str]:
    support, queries = str(data / "support"), str(data / "queries")
    store, cpu = str(out / "scores.sqlite"), ["--device", "cpu"]
    if verb == "train":
        few = ["--rounds", "2", "--candidates", "3", "--epochs", "2", "--train-batch-size", "8"]
        return ["train", "--data", support, "--out", str(out), *few, *cpu]
    if verb == "score":
        return ["score", "--data", support, "--store", store, "--candidates", "4", *cpu]
    if verb == "eval":
        asked = ["--queries", queries, "--shots", "1,2", "--strategies", "zero-shot,random,sit+draft"]
        return ["eval", "--data", support, *asked, "--store", store, "--json", str(out / "results.json"), *cpu]
    return ["tune", "--config", str(data / "mix.yaml"), "--out", str(out), "--json", str(out / "tune.json"), *cpu]


def start(verb: str, data: Path, out: Path) -> subprocess.Popen:
    out.mkdir(parents=True, exist_ok=True)
    settings = {
        "PYTHONPATH": str(HERE),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PAID": str(out / "paid.jsonl"),
    }
    with (out / "said.txt").open("ab") as said:
        return subprocess.Popen(
            [sys.executable, "-c", LOGGED, "-q", *command(verb, data, out)], env=os.environ | settings, cwd=HERE,
            stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip


def paid(out: Path) -> list[list[str]]:
    """Keys of each batch that the LVLM was sent, in order."""
    path = out / "paid.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def held(out: Path) -> dict[str, Any]:
    """What the score store holds, by key."""
    path = out / "scores.sqlite"
    if not path.exists():
        return {}
    with sqlite3.connect(path, timeout=60) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        tables = [
            name for (name,) in connection.execute("SELECT name FROM sqlite_master") if name in ("scores", "texts")
        ]
        return {key.hex(): value for t in tables for key, value in connection.execute(f"SELECT key, value FROM {t}")}


def outcome(verb: str, out: Path) -> dict[str, Any]:
    """What must not depend on kills: bytes of weights and tables, metrics, stored answers."""
    found: dict[str, Any] = {"answers": held(out)}
    if verb == "train":
        retriever = out / "retriever"
        names = [
            p
            for p in sorted(retriever.rglob("*"))
            if p.suffix in (".safetensors", ".parquet", ".json") and p.is_file()
        ]
        found |= {str(p.relative_to(out)): p.read_bytes() for p in names}
        steps = sorted((out / "training").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
        for name in ("candidates.parquet", "loss.safetensors", "model.safetensors"):
            found[name] = (steps[-1] / name).read_bytes()
    if verb == "eval":
        results = json.loads((out / "results.json").read_text())
        results.pop("seconds")
        found["metrics"] = results
    if verb == "tune":
        found |= {"metrics": json.loads((out / "tune.json").read_text())}
        found |= {p.name: p.read_bytes() for p in sorted(out.glob("*.safetensors"))}
    return found


def finish(verb: str, data: Path, out: Path) -> float:
    began = time.monotonic()
    status = start(verb, data, out).wait(900)
    if status:
        raise AssertionError(f"{verb} ended with status {status}:\n{(out / 'said.txt').read_text()[-1500:]}")
    return time.monotonic() - began


def killed_run(verb: str, data: Path, out: Path, kills: int, seconds: float, chance: random.Random) -> int:
    """Kill the command up to `kills` times, let it finish, and check what was paid for; how often it was killed."""
    done = 0
    for _ in range(kills):
        before = held(out)
        sent = len(paid(out))
        process = start(verb, data, out)
        try:
            # Importing takes the first part of a run, in which there is nothing to lose.
            process.wait(seconds * chance.uniform(0.25, 0.95))
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            done += 1
        after = held(out)
        assert before.items() <= after.items(), f"{verb}: a stored answer is lost or changed"
        batches = paid(out)[sent:]
        assert not {key for batch in batches for key in batch} & before.keys(), (
            f"{verb}: a stored answer was paid again"
        )
        missing = [batch for batch in batches[:-1] if not set(batch) <= after.keys()]
        assert not missing, f"{verb}: {len(missing)} batches beyond the one in flight are lost"
    finish(verb, data, out)
    sent_keys = [key for batch in paid(out) for key in batch]
    twice = len(sent_keys) - len(set(sent_keys))
    assert twice <= BATCH * done, f"{verb}: {twice} requests were paid twice after {done} kills"
    return done


def check(verb: str, data: Path, work: Path, kills: int, chance: random.Random, whole: tuple[float, dict]) -> int:
    """One run that is killed up to `kills` times, compared with an uninterrupted one; how often it was killed."""
    out = work / f"{verb}-killed"
    shutil.rmtree(out, ignore_errors=True)
    done = killed_run(verb, data, out, kills, whole[0], chance)
    found = outcome(verb, out)
    differ = [name for name in {*found, *whole[1]} if found.get(name) != whole[1].get(name)]
    assert not differ, f"{verb}: {', '.join(sorted(differ))} differ after {done} kills"
    return done


def uninterrupted(verb: str, data: Path, work: Path) -> tuple[float, dict[str, Any]]:
    seconds = finish(verb, data, work / f"{verb}-whole")
    return seconds, outcome(verb, work / f"{verb}-whole")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kill", description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=50, help="kills in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbs", default=",".join(VERBS))
    parser.add_argument("--work", type=Path, help="folder to keep; a temporary one by default")
    args = parser.parse_args()
    chance, verbs = random.Random(args.seed), args.verbs.split(",")
    counts = dict.fromkeys(verbs, 0)
    with tempfile.TemporaryDirectory() as made:
        work = args.work or Path(made)
        if not (work / "data").exists():
            make_data(work / "data")
        whole = {verb: uninterrupted(verb, work / "data", work) for verb in verbs}
        for verb, (seconds, _) in whole.items():
            sys.stdout.write(f"{verb}: {seconds:.1f} s uninterrupted\n")
            sys.stdout.flush()
        rounds = 0
        while sum(counts.values()) < args.count and rounds < 4 * args.count:
            verb, rounds = verbs[rounds % len(verbs)], rounds + 1
            left = args.count - sum(counts.values())
            try:
                began = time.monotonic()
                done = check(verb, work / "data", work, min(left, chance.choice([1, 2, 3])), chance, whole[verb])
                if not done:  # the machine was busier when the run was timed
                    whole[verb] = min(whole[verb][0], time.monotonic() - began) * 0.6, whole[verb][1]
            except AssertionError as error:
                sys.stdout.write(f"FAULT {error}\n")
                return 1
            counts[verb] += done
            sys.stdout.write(f"{verb}: {done} kills, identical\n")
            sys.stdout.flush()
    sys.stdout.write(f"{sum(counts.values())} kills {counts}: identical results\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
