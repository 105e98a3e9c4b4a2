"""One command for a table: every strategy at every number of shots, trained, evaluated, compared and written up.

>>> from drum_hf.experiments.suites import load_suite
>>> [data.name for data in load_suite("drum-paper").data]
['vqav2', 'okvqa', 'vizwiz', 'flowers102', 'food101', 'coco', 'flickr30k']
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...utils.manifest import write_manifest
from ...utils.optional import public_name, require
from .plan import format_plan, plan_suite
from .spec import SUITES, SuiteSpec, load_suite

if TYPE_CHECKING:
    from ...types import LVLM
    from .cells import Cell
    from .opening import MakeWorld

__all__ = ["SUITES", "SuiteSpec", "format_plan", "load_suite", "plan_suite", "run_suite"]


def run_suite(
    spec: SuiteSpec,
    out_dir: str | os.PathLike[str],
    *,
    lvlms: Mapping[str, LVLM] | None = None,
    make_world: MakeWorld | None = None,
    store: str | os.PathLike[str] | None = None,
    command: str = "",
    on_cell: Callable[[Cell], None] | None = None,
) -> dict[str, Any]:
    """Carry a suite out, or what is missing of it, and write its results.

    Every answer and score of an LVLM, every trained retriever and every finished cell is kept in `out_dir`, so a run
    that was stopped anywhere goes on where it was, and a suite that was changed pays for what has changed.

    Args:
        spec: as `load_suite` reads it.
        out_dir: gets `summary.json`, `results.parquet`, `tables.md`, `tables.tex`, `figure.png`, `report.html`,
            `manifest.json`.
        lvlms: LVLMs by their name in the suite, where they are made already.
        make_world: `drum_hf.playground.make_world`, for a suite that has playground worlds.
        store: another SQLite file for answers and scores; `scores.sqlite` in `out_dir` by default.
        command: what the report says it was made by.
        on_cell: called after each cell that was carried out.

    Returns:
        What `summary.json` holds; see `drum_hf.experiments.suites.results.summarize_suite`.

    Raises:
        DependencyError: matplotlib (or bm25s, for a suite that has it) is not installed.
        LeakError: support set and queries overlap.
    """
    from .results import read_cells, summarize_suite, write_results
    from .runner import SuiteRun
    from .tables import write_pages

    require("matplotlib", "a suite's figures")  # refused now, not after hours
    if "bm25" in spec.strategies:
        require("bm25s", "the BM25 strategy")
    run = SuiteRun(spec, out_dir, lvlms=lvlms, make_world=make_world, store=store, on_cell=on_cell)
    cells = read_cells(run.run(), run.files)
    summary = summarize_suite(spec, cells, limits=run.limits)
    out = Path(out_dir)
    write_results(spec, cells, summary, out)
    write_pages(spec, summary, out, examples=run.examples, command=command)
    first = spec.lvlms[0].name
    write_manifest(
        out,
        seed=spec.seeds[0],
        data=run.tables,
        lvlm={"name": first, "fingerprint": run.fingerprints[first]},
        settings={
            "suite": spec.name,
            "strategies": spec.strategies,
            "shots": spec.shots,
            "seeds": spec.seeds,
            "training": dataclasses.asdict(spec.training),
            "lvlms": {public_name(name): fingerprint for name, fingerprint in run.fingerprints.items()},
        },
    )
    return summary
