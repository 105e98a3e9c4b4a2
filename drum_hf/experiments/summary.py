"""Several worlds in one table: ``python -m drum_hf.experiments.summary out/w101 out/w102 …``.

Reads the `results.json` and `values.json` that the main job wrote into each folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SavedFileError
from ..evaluation.statistics import paired_bootstrap

__all__ = ["main", "read_json", "summarize"]


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of a demo's folder.

    Raises:
        SavedFileError: it is not there, or can't be read.
    """
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SavedFileError(
            f"expected {folder / name}, written by drum-hf demo; reading it failed ({error})"
        ) from error


def summarize(folders: Sequence[str | Path]) -> str:
    """A Markdown summary over folders of one task: means over worlds, gap closed, DRUM - EPR at each budget.

    The gap closed is (DRUM - SIT+draft) / (oracle - SIT+draft) of the means. Paired intervals resample queries within
    each world.

    Raises:
        SavedFileError: a folder lacks its results.
        ValueError: the folders hold different tasks.
    """
    results = [read_json(Path(f), "results.json") for f in folders]
    values = [read_json(Path(f), "values.json") for f in folders]
    if len({r["task"] for r in results}) != 1:
        raise ValueError(f"expected folders of one task; got {sorted({r['task'] for r in results})}")
    names = list(results[0]["strategies"])
    means = {n: np.array([r["strategies"][n]["metric"] for r in results]) for n in names}
    worlds = " | ".join(f"world {r['world_seed']}" for r in results)
    lines = [f"| strategy | mean × 100 | {worlds} |", "|---|---|" + "---|" * len(results)]
    lines += [
        f"| {n} | {100 * v.mean():.1f} | " + " | ".join(f"{100 * x:.1f}" for x in v) + " |" for n, v in means.items()
    ]
    start, top = means["sit+draft"].mean(), means["oracle"].mean()
    closed = {n: (means[n].mean() - start) / (top - start) for n in ("drum", "drum-rank", "epr")}
    lines += [
        "",
        "Gap closed between sit+draft and oracle: " + ", ".join(f"{n} {c:.0%}" for n, c in closed.items()) + ".",
    ]
    lines += ["", "| scored pairs | drum | epr | drum - epr [95% interval] | p |", "|---|---|---|---|---|"]
    budgets = zip(*(zip(v["drum"], v["epr"], strict=True) for v in values), strict=True)
    for step, keys in enumerate(budgets):
        ours = [np.array(v["drum"][k]) for v, (k, _) in zip(values, keys, strict=True)]
        theirs = [np.array(v["epr"][k]) for v, (_, k) in zip(values, keys, strict=True)]
        groups = [world for world, part in enumerate(ours) for _ in part]
        a, b = np.concatenate(ours), np.concatenate(theirs)
        if step:
            d = paired_bootstrap(a, b, groups=groups)
            pairs = round(float(np.mean([int(k) for k, _ in keys])))
            lines.append(
                f"| {pairs:,} | {100 * a.mean():.1f} | {100 * b.mean():.1f} | "
                f"{100 * d.mean:+.1f} [{100 * d.lo:+.1f}, {100 * d.hi:+.1f}] | {d.p:.3g} |"
            )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of the summary."""
    sys.stdout.write(summarize(list(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    main()
