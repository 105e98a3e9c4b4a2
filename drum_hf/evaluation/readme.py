"""The demo's results on a page: ``python -m drum_hf.evaluation.readme out/demo README.md``.

Writes the table between the page's marks ``<!-- results:begin -->`` and ``<!-- results:end -->``, and replaces those
of the demo's figures that lie in ``docs/images`` beside the page.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import SavedFileError
from .report import format_table
from .summary import read_json

__all__ = ["main", "results_block", "write_results"]

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def results_block(results: Mapping[str, Any]) -> str:
    """A sentence that says what was run, and the table, as Markdown; `results` of one task.

    Raises:
        ColumnError: the results break their contract.
    """
    table = "\n".join(line for line in format_table(results, style="markdown").splitlines() if line.startswith("|"))
    task = {"vqa": "VQA"}.get(results["task"], results["task"])
    if results.get("world_seed") is None:
        where = str(results.get("data", "own data"))
    else:
        level = results.get("world", "standard")
        where = f"world {results['world_seed']}" + ("" if level == "standard" else f", {level}")
    command = results.get("command", "drum-hf demo")
    if re.fullmatch(r"drum-hf demo --out \S+", command):
        command = "make demo"
    return (
        f"What `{command}` prints ({task}, {where}, {results['metric_name']} × 100, {results['scored_pairs']:,} pairs "
        f"scored by the LVLM for each trained row):\n\n{table}"
    )


def write_results(out: str | Path, page: str | Path) -> list[Path]:
    """Put the demo's results into a page; returns the files that were written.

    Args:
        out: the folder of a demo of one task, with its `results.json` and figures.
        page: a Markdown file with the two marks.

    Raises:
        SavedFileError: the folder lacks its results, or holds several tasks', or the page lacks a mark.
    """
    out, page = Path(out), Path(page)
    results = read_json(out, "results.json")
    if "task" not in results:
        raise SavedFileError(f"expected the results of one task in {out}; name the folder of one, such as {out}/vqa")
    try:
        text = page.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        _, after = rest.split(END)
    except (OSError, ValueError) as error:
        raise SavedFileError(
            f"expected {page} to hold {BEGIN} and {END} once each, in that order ({error})"
        ) from error
    page.write_text(f"{before}{BEGIN}\n{results_block(results)}\n{END}{after}", encoding="utf-8")
    written = [page]
    for figure in sorted((page.parent / "docs" / "images").glob("*.png")):
        if (out / figure.name).is_file():
            written.append(Path(shutil.copyfile(out / figure.name, figure)))
    return written


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: the demo's folder, then the page."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 2:
        raise SystemExit("usage: python -m drum_hf.evaluation.readme OUT PAGE")
    for path in write_results(*arguments):
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
