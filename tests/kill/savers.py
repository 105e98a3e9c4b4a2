"""Kill savers at random moments and run pairs of them: `python -m tests.kill.savers --count 100 --pairs 50 --seed 0`.

A retriever is saved over and over into one folder by forks of a process that has loaded it. After each kill, and while
pairs of savers are at work, the folder must load as what one save wrote. Exit status 1 otherwise.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from drum_hf import DemoRetriever

#: Weights of image, prompt and response, by which saves are told apart.
VARIANTS = {1: (1.0, 2.0, 5.0), 2: (2.0, 1.0, 5.0), 3: (5.0, 2.0, 1.0)}


def variants() -> dict[int, DemoRetriever]:
    """Retrievers of different weights and support sets, embedded."""
    made = {}
    for number, weights in VARIANTS.items():
        rows = [
            {"id": f"{number}-{i}", "image": Image.new("RGB", (32, 32), (i, 9, 9)), "prompt": "what?", "response": "r"}
            for i in range(8 * number)
        ]
        options = {"shard_rows": 5} if number == 2 else None
        made[number] = DemoRetriever.from_encoder(
            "playground/clip", rows, weights=weights, index_options=options, device="cpu"
        )
        made[number].index  # noqa: B018  # embedded before anything is forked
    return made


def which(folder: Path) -> int:
    """The variant that a folder holds, all of it."""
    loaded = DemoRetriever.from_pretrained(folder, device="cpu")
    number = int(loaded.support.ids[0].partition("-")[0])
    expected = [weight / sum(VARIANTS[number]) for weight in VARIANTS[number]]
    assert all(abs(a - b) < 1e-6 for a, b in zip(loaded.weights.values(), expected, strict=True)), "a mixture"
    assert len(loaded) == len(loaded.index) == 8 * number, "a mixture"
    return number


def forked(task: Callable[[], None]) -> int:
    pid = os.fork()
    if not pid:
        status = 1
        try:
            task()
            status = 0
        except BaseException as error:
            sys.stderr.write(f"{error!r}\n")
        finally:
            os._exit(status)
    return pid


def kill_savers(made: dict[int, DemoRetriever], folder: Path, count: int, chance: random.Random) -> dict[int, int]:
    """Variant -> how often it was what a kill left."""
    made[1].save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    began = time.monotonic()
    made[1].save_pretrained(folder)
    seconds = time.monotonic() - began
    found = dict.fromkeys(made, 0)
    for _ in range(count):
        number = chance.choice([*made])
        pid = forked(lambda: [made[number].save_pretrained(folder) for _ in range(50)] and None)  # noqa: B023
        time.sleep(chance.uniform(0.0, 2.0 * seconds))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found[which(folder)] += 1
    made[3].save_pretrained(folder)
    assert which(folder) == 3 and not list(folder.rglob(".sav*")), "something is left of killed savers"
    assert (folder / "notes.txt").read_text() == "mine"
    return found


def pair_savers(made: dict[int, DemoRetriever], folder: Path, pairs: int) -> dict[int, int]:
    """Variant -> how often it was what two savers at once left."""
    made[3].save_pretrained(folder)
    found = dict.fromkeys(made, 0)
    for _ in range(pairs):
        children = [forked(lambda number=number: made[number].save_pretrained(folder)) for number in (1, 2)]
        which(folder)  # while they are at work
        assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0], "a saver failed"
        found[which(folder)] += 1
        assert not list(folder.rglob(".sav*")), "something is left of the savers"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kill.savers", description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=100, help="kills (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=50, help="pairs of savers (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    made = variants()
    with tempfile.TemporaryDirectory() as folder:
        try:
            killed = kill_savers(made, Path(folder, "killed"), args.count, random.Random(args.seed))
            paired = pair_savers(made, Path(folder, "paired"), args.pairs)
        except Exception as error:
            sys.stdout.write(f"FAULT {error!r}\n")
            return 1
    sys.stdout.write(f"{args.count} kills left {killed}, {args.pairs} pairs of savers {paired}: each loads\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
