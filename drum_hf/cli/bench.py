"""`drum-hf bench`: what the library costs on this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..index.registry import index_kinds
from ..types import TASKS
from .options import ints, write_json

__all__ = ["add", "run"]


def add(commands: argparse._SubParsersAction) -> None:
    """Add the verb, and each benchmark as a verb of its own."""
    parser = commands.add_parser("bench", help="measure scoring, retrieval and training on this machine")
    parser.set_defaults(run=run)
    benches = parser.add_subparsers(dest="bench", required=True, metavar="BENCHMARK")
    options = {
        "score": _score_options,
        "cascade": _cascade_options,
        "retrieve": _retrieve_options,
        "train": _train_options,
        "mine": _mine_options,
        "threads": _threads_options,
        "table": _table_options,
        "plan": _plan_options,
    }
    for name, add_options in options.items():
        add_options(benches.add_parser(name, help=_HELP[name], description=_HELP[name]))


_HELP = {
    "score": "the scoring engine against one pair a forward pass, and against plain batches, with random weights",
    "cascade": "what scoring by a cheaper LVLM first saves, and what it costs, on the playground",
    "retrieve": "encode overhead against the bare CLIP; recall@10 against latency against memory of every index",
    "train": "a list-wise training step against encoding each of its images once",
    "mine": "a round of mining, split into encoder, index and Python",
    "threads": "an index asked from several threads at once, against one query after the other",
    "table": "a table of so many rows, loaded into memory and mapped",
    "plan": "memory, disk and time of an index of so many rows, before it is built",
}


def _score_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(bench_run=_score)
    parser.add_argument(
        "--shape",
        default="smolvlm-256m",
        help="smolvlm-256m, smolvlm-500m, qwen2-vl-2b, qwen2-vl-7b (one layer's worth) or tiny (default: %(default)s)",
    )
    parser.add_argument(
        "--rows", type=int, default=32, help="rows, each scored after each of the others (default: %(default)s)"
    )
    parser.add_argument("--sample", type=int, help="pairs that the slow ways are timed on (12 and 24; more on a GPU)")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, float16 (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of torch on the CPU; its own choice by default")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results to this file")


def _cascade_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(bench_run=_cascade)
    parser.add_argument("--task", choices=TASKS, default="vqa", help="default: %(default)s")
    parser.add_argument("--world-seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--keep", default="0.3,0.5,0.7", help="shares that the LVLM scores (default: %(default)s)")
    parser.add_argument("--factor", type=int, default=4, help="image tokens joined into one (default: %(default)s)")
    parser.add_argument("--candidates", type=int, default=20, help="proposed for a query (default: %(default)s)")
    parser.add_argument("--train", action="store_true", help="also train with each, and evaluate at 4 shots")
    parser.add_argument("--json", type=Path, help="write the results to this file")


def _retrieve_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(bench_run=_retrieve)
    parser.add_argument(
        "--sizes",
        type=ints,
        default=(10_000, 100_000, 1_000_000),
        help="numbers of vectors (default: 10000,100000,1000000; a million takes hours)",
    )
    parser.add_argument(
        "--vectors",
        default="playground,synthetic",
        help="playground: joint embeddings of distinct rows; synthetic: three CLIP-B/32 parts (default: %(default)s)",
    )
    parser.add_argument("--kinds", default=",".join(index_kinds()), help="default: %(default)s")
    parser.add_argument("--storages", default="float32,float16,int8", help="default: %(default)s")
    parser.add_argument("--queries", type=int, default=1000, help="queries asked (default: %(default)s)")
    parser.add_argument(
        "--intrinsic", type=int, default=32, help="dimensions of the synthetic vectors' latent (default: %(default)s)"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("bench-cache"),
        help="folder that keeps vectors and what was measured; a stopped run goes on (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that embed rows (default: %(default)s)")
    parser.add_argument(
        "--max-gb", type=float, default=4.0, help="leave out indexes whose vectors take more (default: %(default)s)"
    )
    parser.add_argument(
        "--growth", action="store_true", help="also tell how cost grew with the number of vectors, as exponents"
    )
    parser.add_argument(
        "--items", type=int, default=256, help="items of the encode measurement, 0 for none (default: %(default)s)"
    )
    _shape_options(parser, batch=64)


def _train_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(bench_run=_train)
    parser.add_argument("--list-size", type=int, default=8, help="candidates of a query (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="steps measured (default: %(default)s)")
    _shape_options(parser, batch=16)


def _mine_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(bench_run=_mine)
    parser.add_argument("--queries", type=int, default=500, help="rows mined for (default: %(default)s)")
    parser.add_argument("--support", type=int, default=2000, help="rows of the support set (default: %(default)s)")
    parser.add_argument("--candidates", type=int, default=10, help="new pairs for each (default: %(default)s)")
    parser.add_argument("--known", type=int, default=10, help="pairs from a round before (default: %(default)s)")
    parser.add_argument("--kind", choices=index_kinds(), default="flat", help="default: %(default)s")
    parser.add_argument("--shape", default="playground", help="encoder, as in bench train (default: %(default)s)")
    parser.add_argument("--device", help="cuda, cpu, …; the best one there is by default")
    parser.add_argument("--json", type=Path, help="write the results to this file")


def _threads_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(bench_run=_threads)
    parser.add_argument("--rows", type=int, default=20_000, help="default: %(default)s")
    parser.add_argument("--kinds", default=",".join(index_kinds()), help="default: %(default)s")
    parser.add_argument("--storage", default="float32", help="default: %(default)s")
    parser.add_argument("--queries", type=int, default=320, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="write the results to this file")


def _table_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(bench_run=_table)
    parser.add_argument("--rows", type=int, default=50_000, help="default: %(default)s")
    parser.add_argument("--side", type=int, default=32, help="of the pictures, in pixels (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results to this file")


def _plan_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(bench_run=_plan)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--dim", type=int, required=True, help="width of the vectors")
    parser.add_argument("--kind", choices=index_kinds(), default="ivfpq", help="default: %(default)s")
    parser.add_argument("--storage", default="int8", help="float32, float16 or int8 (default: %(default)s)")
    parser.add_argument("--shard-rows", type=int, help="rows of a shard; by default a single index")
    parser.add_argument(
        "--calibrate",
        type=int,
        default=20_000,
        help="rows built here to tell the time, 0 for none (%(default)s)",
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")


def _shape_options(parser: argparse.ArgumentParser, *, batch: int) -> None:
    parser.add_argument(
        "--shape",
        default="playground",
        help="encoder: playground, or clip-vit-b-32 with random weights (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=int, default=batch, help="default: %(default)s")
    parser.add_argument("--device", help="cuda, cpu, …; the best one there is by default")
    parser.add_argument("--json", type=Path, help="write the results to this file")


def run(args: argparse.Namespace) -> None:
    """Carry it out."""
    args.bench_run(args)


def _score(args: argparse.Namespace) -> None:
    from ..experiments.bench.score import bench_score, describe

    result = bench_score(
        args.shape,
        rows=args.rows,
        dtype=args.dtype,
        device=args.device,
        threads=args.threads,
        sample=args.sample,
    )
    write_json(args.json, result)
    sys.stdout.write(describe(result) + "\n")


def _cascade(args: argparse.Namespace) -> None:
    from ..experiments.bench.cascade import bench_cascade, describe
    from ..playground import make_world

    world = make_world(args.world_seed, task=args.task)
    result = bench_cascade(
        support=world.support,
        queries=world.queries,
        task=args.task,
        keeps=[float(keep) for keep in args.keep.split(",")],
        factor=args.factor,
        candidates=args.candidates,
        train=args.train,
    )
    write_json(args.json, result)
    sys.stdout.write(describe(result) + "\n")


def _retrieve(args: argparse.Namespace) -> None:
    from ..experiments.bench.encode import measure_encode
    from ..experiments.bench.machine import describe_machine
    from ..experiments.bench.plan import growth
    from ..experiments.bench.retrieve import Setup, best_point, measure_retrieval
    from ..experiments.bench.vectors import SyntheticVectors
    from ..playground.building.rows import PlaygroundVectors, playground_rows

    setups = [Setup(kind, storage) for kind in args.kinds.split(",") for storage in args.storages.split(",")]
    content: dict[str, Any] = {"machine": describe_machine(), "encode": None, "retrieve": [], "best": []}
    if args.items:
        pictures, rows = playground_rows(0)
        items = [{"image": pictures[place], "text": list(texts)} for place, *texts in rows]
        items = [items[i % len(items)] for i in range(args.items)]
        content["encode"] = measure_encode(args.shape, items, batch_size=args.batch_size, device=args.device)
        _tell([content["encode"]])
    largest, cache = max(args.sizes), str(args.cache)
    sources: dict[str, Any] = {
        "playground": lambda: PlaygroundVectors(largest, args.queries, cache),
        "synthetic": lambda: SyntheticVectors(largest, args.queries, intrinsic=args.intrinsic),
    }
    for name in args.vectors.split(","):
        if name not in sources:
            raise ValueError(f"expected --vectors of {', '.join(sources)}; got {name!r}")
        how = {"cache": cache, "workers": args.workers, "limit_mb": args.max_gb * 1024}
        for row in measure_retrieval(sources[name](), sorted(args.sizes), setups, **how):
            content["retrieve"].append(row)
            about = {key: row[key] for key in ("source", "dimension", "size", "kind", "storage")}
            best = best_point(row)
            if best is not None:
                content["best"].append(about | best | {"memory_mb": row["memory_mb"]})
            more = {key: row[key] for key in ("memory_mb", "build_seconds", "skipped") if key in row}
            _tell(about | point | more for point in row.get("points", [{}]))
            write_json(args.json, content)
    if args.growth:
        content["growth"] = growth(content["retrieve"])
        _tell(content["growth"])
    write_json(args.json, content)


def _mine(args: argparse.Namespace) -> None:
    from ..experiments.bench.machine import describe_machine
    from ..experiments.bench.mine import measure_mining
    from ..playground.building.rows import playground_table

    how = {name: getattr(args, name) for name in ("queries", "candidates", "known", "kind", "device")}
    measured = measure_mining(args.shape, playground_table(args.support), **how)
    write_json(args.json, {"machine": describe_machine(), **measured})
    _tell([measured])


def _threads(args: argparse.Namespace) -> None:
    from ..experiments.bench.machine import describe_machine
    from ..experiments.bench.mine import measure_threads
    from ..experiments.bench.vectors import SyntheticVectors
    from ..index.demo_index import DemoIndex

    vectors = SyntheticVectors(args.rows, args.queries, parts=1)
    content: dict[str, Any] = {"machine": describe_machine(), "threads": []}
    for kind in args.kinds.split(","):
        index = DemoIndex(vectors.dimension, kind=kind, storage=args.storage)
        for block in vectors.blocks(args.rows):
            index.add([str(len(index) + i) for i in range(len(block))], block)
        content["threads"].append(measure_threads(index, vectors.asked(), threads=args.threads))
        _tell(content["threads"][-1:])
    write_json(args.json, content)


def _table(args: argparse.Namespace) -> None:
    from ..experiments.bench.machine import describe_machine
    from ..experiments.bench.table import measure_table

    measured = measure_table(args.rows, side=args.side)
    write_json(args.json, {"machine": describe_machine(), "rows": args.rows, **measured})
    _tell({"table": name} | values for name, values in measured.items())


def _plan(args: argparse.Namespace) -> None:
    import dataclasses

    from ..experiments.bench.plan import plan_index

    plan = plan_index(
        args.rows,
        args.dim,
        kind=args.kind,
        storage=args.storage,
        shard_rows=args.shard_rows,
        calibrate=args.calibrate,
    )
    write_json(args.json, dataclasses.asdict(plan))
    sys.stdout.write(plan.describe() + "\n")


def _train(args: argparse.Namespace) -> None:
    from ..experiments.bench.machine import describe_machine
    from ..experiments.bench.train import measure_training
    from ..playground import make_world

    measured = measure_training(
        args.shape,
        make_world(0, difficulty="easy").support,
        batch_size=args.batch_size,
        list_size=args.list_size,
        steps=args.steps,
        device=args.device,
    )
    write_json(args.json, {"machine": describe_machine(), **measured})
    _tell([measured])


def _tell(rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        sys.stdout.write("  ".join(f"{name} {value}" for name, value in row.items()) + "\n")
    sys.stdout.flush()
