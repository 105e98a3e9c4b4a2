"""What each part of ICL tuning is worth: ``python -m drum_hf.playground.building.ablation [--variants NAMES]``.

Tunes what the build has before ICL tuning, once for each of `VARIANTS` and all for the same number of steps, and asks
the benchmarks. Tunings resume, and what was evaluated is kept in the work directory: a stopped run goes on as it was.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from ...scores.store import ScoreStore
from .benchmarks import compare_lvlms
from .build import QUICK, STEPS, render_all
from .conversations import Album
from .tuning import VARIANTS, tune, tuning_folder

logger = logging.getLogger(__name__)


def evaluate_variant(
    name: str, start: Path, album: Album, work: Path, *, steps: int, seed: int, world: int, queries: int
) -> dict[str, Any]:
    """Tune one variant and ask the benchmarks; from the work directory where that was done before."""
    folder = work / tuning_folder(name, start, steps=steps, seed=seed)
    kept = folder.with_name(f"{folder.name}-world-{world}-{queries}.json")
    if kept.exists():
        return json.loads(kept.read_text())
    tuner = tune(start, album, VARIANTS[name], folder, steps=steps, seed=seed)
    store = ScoreStore(folder / "scores.sqlite")
    found = compare_lvlms({name: tuner.lvlm()}, seed=world, queries=queries, store=store)
    kept.write_text(json.dumps(found, indent=1) + "\n")
    return found


def format_ablation(results: dict[str, dict[str, Any]]) -> str:
    """A Markdown table, in percent: a row for each variant, few-shot accuracy by benchmark and in the mean."""
    benchmarks = list(next(iter(results.values()))["by_benchmark"])
    heads = ["variant", *benchmarks, "few-shot", "few-shot, generated", "ordinary questions"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for name, found in results.items():
        cells = []
        for benchmark in benchmarks:
            values = [row[name] for row in found["by_benchmark"][benchmark].values()]
            cells.append(sum(values) / len(values))
        cells += [found[f"{name}_{what}"] for what in ("few_shot", "few_shot_generated", "zero_shot")]
        lines.append("| " + " | ".join([VARIANTS[name].about, *(f"{100 * cell:.1f}" for cell in cells)]) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Command line of the ablation."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m drum_hf.playground.building.ablation")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="names, by commas (default: %(default)s)")
    parser.add_argument(
        "--work-dir", type=Path, default=Path("playground-build"), help="of the build, which has been run before"
    )
    parser.add_argument("--start", type=Path, help="folder of the LVLM to tune (default: the build's)")
    parser.add_argument("--steps", type=int, default=1_600, help="of every variant (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="of tuning (default: %(default)s)")
    parser.add_argument("--world-seed", type=int, default=201, help="of the benchmarks (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=120, help="episodes a benchmark (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few pictures: to test the script, not to use")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args(argv)
    names = args.variants.split(",")
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        parser.error(f"expected variants among {', '.join(VARIANTS)}, got {', '.join(unknown)}")
    start = args.start or args.work_dir / "start"
    if not start.is_dir():
        parser.error(
            f"expected an LVLM in {start}; run python -m drum_hf.playground.building first, or pass --start FOLDER"
        )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    album = Album(render_all(args.work_dir, seed=7, steps=QUICK if args.quick else STEPS))
    work = args.work_dir / "ablation"
    work.mkdir(parents=True, exist_ok=True)
    how = {"steps": args.steps, "seed": args.seed, "world": args.world_seed, "queries": args.queries}
    results = {name: evaluate_variant(name, start, album, work, **how) for name in names}
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    logger.info("%s", format_ablation(results))


if __name__ == "__main__":
    main()
