"""Kill savers at random moments and run pairs of them: `python -m tests.kill.savers --count 100 --pairs 50 --seed 0`.

A retriever, its table and its index are saved over and over into one folder, pushed to a Hub of this machine, and
extended by `drum-hf index --add`, by forks of a process that has loaded them. After each kill, and while pairs of
savers are at work, what is there must load as what one save wrote. Exit status 1 otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from drum_hf import DemoRetriever
from drum_hf.cli import main as main_of_drum_hf
from drum_hf.data import TripletTable
from drum_hf.index.demo_index import DemoIndex
from tests.hub_server import LocalHub, serving, used_here

#: What is saved: by `save_pretrained`, `save` of a table and of an index, `drum-hf index --add`, `push_to_hub`.
KINDS = ("retriever", "table", "index", "add", "push")

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


def which(folder: Path | str) -> int:
    """The variant that a folder or repository holds, all of it."""
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


@dataclasses.dataclass
class Saving:
    """Something that is saved over and over in one place.

    Attributes:
        tasks: variant -> saves it.
        which: the variant that the place holds, all of it.
        before: done before each task, such as putting the older one back.
    """

    tasks: dict[int, Callable[[], object]]
    which: Callable[[], int]
    before: Callable[[], object] = lambda: None


def kill_savers(saving: Saving, count: int, chance: random.Random) -> dict[int, int]:
    """Variant -> how often it was what a kill left."""
    first, *_ = saving.tasks
    saving.before()
    saving.tasks[first]()
    saving.before()
    began = time.monotonic()
    saving.tasks[first]()
    seconds = time.monotonic() - began
    found: dict[int, int] = {}
    for _ in range(count):
        saving.before()
        pid = forked(saving.tasks[chance.choice([*saving.tasks])])
        time.sleep(chance.uniform(0.0, 1.2 * seconds))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        left = saving.which()
        found[left] = found.get(left, 0) + 1
    saving.before()
    saving.tasks[first]()
    saving.which()
    return found


@contextlib.contextmanager
def savings(made: dict[int, DemoRetriever], folder: Path, names: list[str]) -> Iterator[dict[str, Saving]]:
    """`save_pretrained`, the `save` of a table and of an index, `index --add`, and a push."""
    places = {name: folder / name for name in ("retriever", "table", "index", "add")}
    flat = {number: retriever for number, retriever in made.items() if number != 2}
    loaded = {
        "retriever": lambda: which(places["retriever"]),
        "table": lambda: number_of(TripletTable.load(places["table"] / "t.parquet").ids),
        "index": lambda: number_of(DemoIndex.load(places["index"]).ids),
    }
    of = {name: Saving({}, loaded[name]) for name in loaded}
    for number, retriever in made.items():
        of["retriever"].tasks[number] = lambda r=retriever: r.save_pretrained(places["retriever"])
        of["table"].tasks[number] = lambda r=retriever: r.support.save(places["table"] / "t.parquet")
    for number, retriever in flat.items():
        of["index"].tasks[number] = lambda r=retriever: r.index.save(places["index"])
    of["add"] = adding(made[1], places["add"])
    if "push" not in names:
        yield {name: of[name] for name in names}
        return
    hub = LocalHub()
    with serving(hub), used_here(hub, folder / "cache"):
        tasks = {
            number: lambda r=retriever: r.push_to_hub("me/r", token="hf_me") for number, retriever in made.items()
        }
        of["push"] = Saving(tasks, lambda: which("me/r"))
        yield {name: of[name] for name in names}


def number_of(ids: list[str]) -> int:
    number = int(ids[0].partition("-")[0])
    assert len(ids) == 8 * number and all(each.startswith(f"{number}-") for each in ids), "a mixture"
    return number


def adding(retriever: DemoRetriever, folder: Path) -> Saving:
    """`drum-hf index --add`; what is left has 8 rows, or 10."""
    folder.mkdir()
    retriever.save_pretrained(folder / "before")
    (folder / "more").mkdir()
    for number in range(2):
        Image.new("RGB", (32, 32), (9, 9, number)).save(folder / "more" / f"{number}.png")
    rows = [{"id": f"more-{i}", "image": f"{i}.png", "prompt": "what?", "response": "r"} for i in range(2)]
    (folder / "more" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    place = folder / "place"

    def before() -> None:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder / "before", place)

    def rows_left() -> int:
        loaded = DemoRetriever.from_pretrained(place, device="cpu")
        assert len(loaded) == len(loaded.index) and len(loaded) in (8, 10), "a mixture"
        return len(loaded)

    def add() -> None:
        assert main_of_drum_hf(["-q", "index", str(place), "--add", str(folder / "more"), "--device", "cpu"]) == 0

    return Saving({10: add}, rows_left, before)


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
    parser.add_argument("--of", default=",".join(KINDS), help="what is killed (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    made, names = variants(), args.of.split(",")
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(sys.stderr):
        folder = Path(place)
        try:
            with savings(made, folder, names) as of:
                for name, saving in of.items():
                    found = kill_savers(saving, args.count, random.Random(f"{args.seed} {name}"))
                    left = list((folder / name).rglob(".sav*"))
                    assert not left, f"something is left of killed savers: {left}"
                    sys.__stdout__.write(f"{name}: {args.count} kills left {found}, each loads\n")
                    sys.__stdout__.flush()
            paired = pair_savers(made, folder / "paired", args.pairs)
        except Exception as error:
            sys.__stdout__.write(f"FAULT {error!r}\n")
            return 1
    sys.stdout.write(f"{args.pairs} pairs of savers left {paired}, each loads\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
