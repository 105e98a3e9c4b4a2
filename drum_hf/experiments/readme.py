"""The demo's results on a page: ``python -m drum_hf.experiments.readme out/demo README.md``.

Writes the table between the page's marks ``<!-- results:begin -->`` and ``<!-- results:end -->``. Runs the example
between ``<!-- example:begin -->`` and ``<!-- example:end -->``, where there is one and the demo has left its
retriever, and writes below it what it prints. Replaces those of the demo's figures that lie in ``docs/images`` beside
the page.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import SavedFileError
from ..utils.files import write_text
from .report import format_table
from .summary import read_json

__all__ = ["example_block", "main", "results_block", "write_results"]

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
EXAMPLE_BEGIN, EXAMPLE_END = "<!-- example:begin -->", "<!-- example:end -->"


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


def example_block(text: str, folder: Path) -> str:
    """A page's example, as it stands there, and what it prints when it is run in a folder.

    Raises:
        SavedFileError: there is no Python between the marks, or it fails; with what it said.
    """
    found = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)
    if found is None:
        raise SavedFileError(f"expected a block of Python between {EXAMPLE_BEGIN} and {EXAMPLE_END}, found none")
    done = subprocess.run([sys.executable, "-c", found[1]], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SavedFileError(f"expected the page's example to run in {folder}; it failed: {done.stderr[-2000:]}")
    return f"{found[0]}\n\n```text\n{done.stdout}```"


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
        text = _between(text, BEGIN, END, lambda block: results_block(results))
        if EXAMPLE_BEGIN in text and (out / "retriever").is_dir():
            text = _between(text, EXAMPLE_BEGIN, EXAMPLE_END, lambda block: example_block(block, page.parent))
    except (OSError, ValueError) as error:
        if isinstance(error, SavedFileError):
            raise
        raise SavedFileError(f"{page}: {error}") from error
    write_text(page, text)
    written = [page]
    for figure in sorted((page.parent / "docs" / "images").glob("*.png")):
        if (out / figure.name).is_file():
            written.append(Path(shutil.copyfile(out / figure.name, figure)))
    return written


def _between(text: str, begin: str, end: str, make: Callable[[str], str]) -> str:
    """The text with what is between two marks replaced by what is made of it."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise ValueError(f"expected {begin} and {end} once each, in that order")
    before, rest = text.split(begin)
    block, after = rest.split(end)
    return f"{before}{begin}\n{make(block)}\n{end}{after}"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: the demo's folder, then the page."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 2:
        raise SystemExit("usage: python -m drum_hf.experiments.readme OUT PAGE")
    for path in write_results(*arguments):
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
