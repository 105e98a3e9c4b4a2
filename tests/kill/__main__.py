"""Kill `drum-hf` at random moments, repeat the command until it is done, and compare with an uninterrupted run.

`python -m tests.kill --count 50 --seed 0 [--verbs train,adapter,score,eval,tune,suite]`. The outcome must be the same
bytes; no answer that was stored is lost or paid for again. Exit status 1 otherwise.

Runs are forks of two processes that have only imported what a command imports, so that a kill does not wait for
imports, in which there is nothing to lose; a command and its repetition come from different ones, whose hashes of
texts differ. The first verb's uninterrupted run is a process like any other, and a fork must end as it does.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import json
import os
import random
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from drum_hf.utils.manifest import MANIFEST

HERE = Path(__file__).resolve().parents[2]
VERBS = ("train", "adapter", "score", "eval", "tune", "suite")
#: Seconds that a run may take.
PATIENCE = 900.0


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
    suite = {
        "data": {"tiny": {"task": "vqa", "table": "support", "queries": "queries"}},
        "lvlms": ["playground/lvlm"],
        "encoders": ["playground/clip"],
        "strategies": ["zero-shot", "random", "sit+draft", "epr", "drum"],
        "shots": [1],
        "headline": 1,
        "random_seeds": 1,
        "training": {"rounds": 2, "candidates": 3, "epochs": 1, "batch_size": 8, "list_size": 4},
        "curves": [],
    }
    (folder / "suite.yaml").write_text(json.dumps(suite))


def command(verb: str, data: Path, out: Path) -> list[str]:
    support, queries = str(data / "support"), str(data / "queries")
    store, cpu = str(out / "scores.sqlite"), ["--device", "cpu"]
    match verb:
        case "train" | "adapter":
            few = ["--rounds", "2", "--candidates", "3", "--epochs", "2", "--train-batch-size", "8"]
            few += ["--lora"] if verb == "adapter" else []
            return ["train", "--data", support, "--out", str(out), *few, *cpu]
        case "score":
            return ["score", "--data", support, "--store", store, "--candidates", "4", *cpu]
        case "eval":
            asked = ["--queries", queries, "--shots", "1,2", "--strategies", "zero-shot,random,sit+draft"]
            return ["eval", "--data", support, *asked, "--store", store, "--json", str(out / "results.json"), *cpu]
        case "suite":
            return ["eval", "--suite", str(data / "suite.yaml"), "--out", str(out)]
        case _:
            mix = ["--config", str(data / "mix.yaml")]
            return ["tune", *mix, "--out", str(out), "--json", str(out / "tune.json"), *cpu]


def settings(out: Path) -> dict[str, str]:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    more = {"PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | threads | more | {"PAID": str(out / "paid.jsonl")}


class Server:
    """A process whose forks carry out commands; see `server.py`."""

    def __init__(self, modules: Path, number: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.kill.server", str(modules)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=settings(modules.parent) | {"PYTHONHASHSEED": str(number + 1)},
            cwd=HERE,
        )
        self.left = b""
        self.ended: dict[int, int] = {}

    def started(self) -> None:
        told = self.told(PATIENCE)
        assert told == {"threads": []}, f"expected no thread that a fork would lose, got {told}"

    def told(self, patience: float) -> dict[str, Any] | None:
        assert self.process.stdout is not None
        descriptor, end = self.process.stdout.fileno(), time.monotonic() + patience
        while b"\n" not in self.left:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return None
            data = os.read(descriptor, 1 << 16)
            assert data, "the process that forks is gone"
            self.left += data
        line, _, self.left = self.left.partition(b"\n")
        return json.loads(line)

    def start(self, arguments: Sequence[str], out: Path) -> int:
        assert self.process.stdin is not None
        asked = {"arguments": ["-q", *arguments], "paid": str(out / "paid.jsonl"), "said": str(out / "said.txt")}
        self.process.stdin.write(json.dumps(asked).encode() + b"\n")
        self.process.stdin.flush()
        while True:
            told = self.told(PATIENCE)
            assert told is not None, "nothing was started"
            if "pid" in told:
                return told["pid"]
            self.ended[told["ended"]] = told["status"]

    def wait(self, pid: int, patience: float) -> int | None:
        """The status of a command, or None where it goes on."""
        end = time.monotonic() + patience
        while pid not in self.ended:
            told = self.told(max(0.0, end - time.monotonic()))
            if told is None:
                return None
            self.ended[told["ended"]] = told["status"]
        return self.ended.pop(pid)

    def kill(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has not made its group yet
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        assert self.wait(pid, PATIENCE) is not None, "it could not be killed"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def servers(names: Iterable[str]) -> Iterator[list[Server]]:
    """Two processes that have imported these modules."""
    with tempfile.TemporaryDirectory() as folder:
        modules = Path(folder, "modules.json")
        modules.write_text(json.dumps(sorted(set(names))))
        made = [Server(modules, number) for number in range(2)]
        try:
            for server in made:
                server.started()
            yield made
        finally:
            for server in made:
                server.close()


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
    if verb in ("train", "adapter"):
        retriever = out / "retriever"
        names = [
            p
            for p in sorted(retriever.rglob("*"))
            if p.suffix in (".safetensors", ".parquet", ".json") and p.is_file() and p.name != MANIFEST
        ]
        found |= {str(p.relative_to(out)): p.read_bytes() for p in names}
        steps = sorted((out / "training").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
        names = [steps[-1] / "candidates.parquet", *steps[-1].rglob("*.safetensors")]  # an adapter's or all weights
        found |= {p.name: p.read_bytes() for p in names}
    if verb == "eval":
        results = json.loads((out / "results.json").read_text())
        results.pop("seconds")
        found["metrics"] = results
    if verb == "suite":
        names = [out / "summary.json", out / "results.parquet", out / "tables.md", *out.glob("cells/*.parquet")]
        names += [p for p in out.glob("retrievers/**/round-*/**/*") if p.suffix in (".safetensors", ".json")]
        names = [p for p in names if p.name != MANIFEST]
        found |= {str(p.relative_to(out)): p.read_bytes() for p in sorted(names)}
    if verb == "tune":
        found |= {"metrics": json.loads((out / "tune.json").read_text())}
        found |= {p.name: p.read_bytes() for p in sorted(out.glob("*.safetensors"))}
    return found


def failed(verb: str, out: Path, status: int | None) -> AssertionError:
    said = (out / "said.txt").read_text(errors="replace")[-1500:]
    return AssertionError(f"{verb} ended with status {status}:\n{said}")


def finish(server: Server, verb: str, data: Path, out: Path) -> float:
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    status = server.wait(server.start(command(verb, data, out), out), PATIENCE)
    if status != 0:
        raise failed(verb, out, status)
    return time.monotonic() - began


def uninterrupted(verb: str, data: Path, work: Path) -> tuple[list[str], dict[str, Any]]:
    """A process of its own: (names of the modules that it loaded, its outcome). Used again where it is there."""
    out = work / f"{verb}-whole"
    modules = out / "modules.json"
    if modules.exists():  # written last
        return json.loads(modules.read_text()), outcome(verb, out)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with (out / "said.txt").open("ab") as said:
        status = subprocess.run(
            [sys.executable, "-m", "tests.kill.noted", "-q", *command(verb, data, out)],
            env=settings(out) | {"MODULES": str(modules)}, cwd=HERE, stdout=said, stderr=said, timeout=PATIENCE,
        ).returncode  # fmt: skip
    if status:
        raise failed(verb, out, status)
    return json.loads(modules.read_text()), outcome(verb, out)


def killed_run(
    pair: Sequence[Server], verb: str, data: Path, out: Path, kills: int, seconds: float, chance: random.Random
) -> int:
    """Kill the command up to `kills` times, let it finish, and check what was paid for; how often it was killed."""
    in_flight: collections.Counter[str] = collections.Counter()
    done = 0
    out.mkdir(parents=True)
    while True:
        before, sent, server = held(out), len(paid(out)), pair[done % len(pair)]
        pid = server.start(command(verb, data, out), out)
        last = done == kills
        # What is stored is not paid for again, so that the second time is shorter.
        status = server.wait(pid, PATIENCE if last else seconds * 0.8**done * chance.uniform(0.01, 0.99))
        if status is None:
            server.kill(pid)
        elif status:
            raise failed(verb, out, status)
        after, batches = held(out), paid(out)[sent:]
        assert before.items() <= after.items(), f"{verb}: a stored answer is lost or changed"
        again = {key for batch in batches for key in batch} & before.keys()
        assert not again, f"{verb}: {len(again)} stored answers were paid again"
        safe = batches if status == 0 else batches[:-1]
        missing = [batch for batch in safe if not set(batch) <= after.keys()]
        assert not missing, f"{verb}: {len(missing)} batches beyond the one in flight are lost"
        if status == 0:
            break
        in_flight.update(batches[-1] if batches else ())
        done += 1
    sent_keys = collections.Counter(key for batch in paid(out) for key in batch)
    twice = [key for key, times in sent_keys.items() if times > 1 + in_flight[key]]
    assert not twice, f"{verb}: {len(twice)} requests that no kill had in flight were paid twice"
    return done


def check(
    pair: Sequence[Server], verb: str, data: Path, work: Path, kills: int, chance: random.Random, whole: tuple
) -> int:
    """One run that is killed up to `kills` times, compared with an uninterrupted one; how often it was killed."""
    out = work / f"{verb}-killed"
    shutil.rmtree(out, ignore_errors=True)
    done = killed_run(pair, verb, data, out, kills, whole[0], chance)
    compare(outcome(verb, out), whole[1], f"{verb} after {done} kills")
    return done


def compare(found: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    differ = [name for name in {*found, *expected} if found.get(name) != expected.get(name)]
    assert not differ, f"{what}: {', '.join(sorted(differ))} differ"


def timed(server: Server, verb: str, data: Path, work: Path) -> tuple[float, dict[str, Any]]:
    """A fork that nobody kills: (seconds, outcome)."""
    out = work / f"{verb}-fork"
    shutil.rmtree(out, ignore_errors=True)
    seconds = finish(server, verb, data, out)
    return seconds, outcome(verb, out)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kill", description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=50, help="kills in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbs", default=",".join(VERBS))
    parser.add_argument("--work", type=Path, help="a folder to keep; a temporary one by default")
    args = parser.parse_args()
    chance, verbs = random.Random(args.seed), args.verbs.split(",")
    counts = dict.fromkeys(verbs, 0)

    def tell(line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    with tempfile.TemporaryDirectory() as made:
        work = args.work or Path(made)
        data = work / "data"
        if not data.exists():
            make_data(data)
        try:
            modules, expected = uninterrupted(verbs[0], data, work)
            with servers(modules) as pair:
                whole = {verb: timed(pair[0], verb, data, work) for verb in verbs}
                compare(whole[verbs[0]][1], expected, f"{verbs[0]} in a fork")
                tell(" ".join(f"{verb} {seconds:.1f} s" for verb, (seconds, _) in whole.items()) + " uninterrupted")
                for verb in itertools.islice(itertools.cycle(verbs), 4 * args.count):
                    kills = min(args.count - sum(counts.values()), chance.choice([1, 3, 5]))
                    if not kills:
                        break
                    counts[verb] += check(pair, verb, data, work, kills, chance, whole[verb])
                    tell(f"{verb}: identical; {counts}")
        except AssertionError as error:
            tell(f"FAULT {error}")
            return 1
    tell(f"{sum(counts.values())} kills {counts}: identical results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
