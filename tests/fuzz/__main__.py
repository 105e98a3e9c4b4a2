"""Mutate small valid artefacts and load each: `python -m tests.fuzz --count 10000 --seed 0`.

Every load must give an error of `drum_hf.errors`, a ValueError of ours, or the content; in bounded memory and time,
without a crash, without running code and without opening a file outside of the artefact. Exit status 1 otherwise.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .artefacts import ARTEFACTS
from .poison import hide

#: Seconds that one load may take.
PATIENCE = 60.0
HERE = Path(__file__).resolve().parents[2]


class Worker:
    def __init__(self, work: Path, kinds: list[str]) -> None:
        self.work, self.kinds = work, kinds
        self.start()

    def start(self) -> None:
        settings = {
            "PYTHONPATH": str(HERE),
            "HF_HUB_OFFLINE": "0",  # so that a name that leads to the Hub is seen
            "HF_HOME": str(self.work / "cache"),
            "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        }
        self.errors = open(self.work / "stderr.txt", "ab")  # noqa: SIM115 (it lives as long as the worker)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker", str(self.work), ",".join(self.kinds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=os.environ | settings,
            cwd=HERE,
        )
        self.left = b""
        if self.line(600.0) != "ready":
            tail = (self.work / "stderr.txt").read_text(errors="replace")[-2000:]
            raise RuntimeError(f"the worker did not start:\n{tail}")

    def line(self, patience: float) -> str | None:
        """The next line; None where the process is gone or took too long."""
        assert self.process.stdout is not None
        descriptor, end = self.process.stdout.fileno(), time.monotonic() + patience
        while b"\n" not in self.left:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, end - time.monotonic()))
            data = os.read(descriptor, 1 << 16) if ready else b""
            if not data:
                return None
            self.left += data
        line, _, self.left = self.left.partition(b"\n")
        return line.decode()

    def load(self, kind: str, seed: int) -> tuple[str, str]:
        """(what was done to the artefact, what came of it)."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([kind, seed]).encode() + b"\n")
        self.process.stdin.flush()
        line = self.line(PATIENCE)
        if line is not None:
            return tuple(json.loads(line)[2:])  # type: ignore[return-value]
        status = self.process.poll()
        sys.stdout.write(f"{kind} {seed}: the worker is gone ({status})\n")
        self.close()
        self.start()
        return "?", f"FAULT no answer in {PATIENCE:.0f} s" if status is None else f"FAULT died with status {status}"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.close()


def run(
    count: int, seed: int, kinds: list[str], work: Path, *, least: int = 1, report: bool = False
) -> tuple[collections.Counter, list]:
    """Outcomes by (kind, outcome), and the faults as (kind, seed, what was done, what came of it)."""
    hide(work / "secret")
    total = sum(ARTEFACTS[kind].share for kind in kinds)
    worker = Worker(work, kinds)
    counts: collections.Counter = collections.Counter()
    faults = []
    try:
        for kind in kinds:
            began = time.perf_counter()
            for number in range(max(least, round(count * ARTEFACTS[kind].share / total))):
                what, result = worker.load(kind, seed * 1_000_000 + number)
                counts[kind, result.split(" ")[0] if result.startswith("FAULT") else result] += 1
                if result.startswith("FAULT"):
                    faults.append((kind, seed * 1_000_000 + number, what, result))
                    if report:
                        sys.stdout.write(f"{faults[-1]}\n")
                        sys.stdout.flush()
            if report:
                done = sum(n for (of, _), n in counts.items() if of == kind)
                sys.stdout.write(f"{kind}: {done} mutated in {time.perf_counter() - began:.0f} s\n")
                sys.stdout.flush()
    finally:
        worker.close()
    return counts, faults


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--least", type=int, default=1, help="of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(ARTEFACTS), help="comma-separated (default: all)")
    parser.add_argument("--one", type=int, help="only the mutation of this number, of --kinds")
    args = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if args.one is not None:
            hide(Path(folder) / "secret")
            worker = Worker(Path(folder), args.kinds.split(","))
            sys.stdout.write(f"{worker.load(args.kinds, args.one)}\n")
            worker.close()
            return 0
        kinds, work = args.kinds.split(","), Path(folder) / "work"
        counts, faults = run(args.count, args.seed, kinds, work, least=args.least, report=True)
    for (kind, result), number in sorted(counts.items()):
        sys.stdout.write(f"{kind:16} {result:32} {number}\n")
    sys.stdout.write(f"{counts.total()} mutated in {time.perf_counter() - began:.0f} s, {len(faults)} faults\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
