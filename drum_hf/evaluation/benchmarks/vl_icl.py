"""VL-ICL Bench's image-to-text tasks (Zong et al., ICLR 2025), read from their folders and scored by their rules."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data import MAX_PIXELS, TripletTable
from ...errors import ImageError, LeakError, RowError, SavedFileError, TooFewDemonstrationsError
from ...types import Demonstration, ICLRequest, Query
from ...utils.files import leads_outside, read_json
from .base import Benchmark, BenchmarkItem, Scorer, numbers_of_shots

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["VL_ICL_TASKS", "read_vl_icl", "side_by_side", "vl_icl_match", "yes_no_match"]

#: Tasks that can be read.
VL_ICL_TASKS = (
    "open_mi",
    "clevr",
    "operator_induction",
    "operator_induction_interleaved",
    "textocr",
    "matching_mi",
)
_SHOTS = (0, 1, 2, 4, 8)
_OPEN_MI_SHOTS = (0, 1, 2, 4, 5)  # its rows hold five images of a class
_OPERATORS = {"+": 0, "-": 1, "x": 2}  # place of each operator's result in a support row's answers
_STREAM = 60_025


# --- scoring -------------------------------------------------------------------------------------------------------


def _cut(prediction: str) -> str:
    """An answer up to its first newline, or else up to its first full stop, as the published evaluation cuts it."""
    text = prediction.strip()
    for mark in "\n.":
        if text.find(mark) > 0:
            return text[: text.find(mark)]
    return text


@functools.cache
def vl_icl_match(task: str) -> Scorer:
    """VL-ICL's rule for all tasks but matching_mi: equality, ignoring case, after the answer is cut.

    An answer is cut at its first newline, or at its first full stop where there is none. In the operator inductions
    its first run of digits counts, and a minus before it doesn't, so that a negative result can't be got right.

    >>> vl_icl_match("textocr")("STOP. It is a sign", "stop"), vl_icl_match("clevr")("There are 3", "3")
    (1.0, 0.0)
    >>> vl_icl_match("operator_induction")("The result is 12", "12")
    1.0
    """
    return functools.partial(_match, "operator_induction" in task)


def _match(only_number: bool, prediction: str, gold: str) -> float:
    text = _cut(prediction)
    if only_number:
        found = re.search(r"\d+", text)
        text = found.group() if found else ""
    return float(text.lower() == gold.lower())


def yes_no_match(prediction: str, gold: str) -> float:
    """VL-ICL's rule for matching_mi: whether the cut answer holds "yes"; anything else counts as no.

    >>> yes_no_match("Yes, they are", "yes"), yes_no_match("Not at all", "no"), yes_no_match("yes", "no")
    (1.0, 1.0, 0.0)
    """
    says_yes = "yes" in _cut(prediction).lower()
    return float((gold.lower() == "yes" and says_yes) or (gold.lower() == "no" and not says_yes))


# --- pictures ------------------------------------------------------------------------------------------------------


def side_by_side(images: Sequence[Image]) -> Image:
    """Images from left to right on white, centred, a tenth of their height apart; a single image as it is."""
    from PIL import Image as Images

    if len(images) == 1:
        return images[0]
    height = max(image.height for image in images)
    gap = max(1, height // 10)
    joined = Images.new("RGB", (sum(image.width for image in images) + gap * (len(images) - 1), height), "white")
    left = 0
    for image in images:
        joined.paste(image, (left, (height - image.height) // 2))
        left += image.width + gap
    return joined


class _Pictures:
    """Images by path: named while rows are read, then checked all at once, and decoded when they are shown."""

    def __init__(self, root: Path, task: Path, max_pixels: int) -> None:
        self._roots = [os.path.abspath(folder) for folder in (root, task)]
        self._max_pixels = max_pixels
        self._named: dict[str, str] = {}  # path -> where it was first named
        self._table: TripletTable | None = None

    def name(self, name: Any, where: str) -> str:
        if not isinstance(name, str) or not name:
            raise RowError(f"{where}: column 'image': expected the path of an image, got {name!r}")
        # The published files name images from the folder that holds the tasks.
        for root in self._roots:
            path = os.path.normpath(os.path.join(root, name))
            if Path(path).is_relative_to(root) and os.path.isfile(path):
                if all(leads_outside(path, folder) for folder in self._roots):
                    raise ImageError(f"{where}: column 'image': {name!r} is a link that leaves {root}; copy the image")
                self._named.setdefault(path, where)
                return path
        raise ImageError(
            f"{where}: column 'image': expected an image below {self._roots[0]}, there is none at {name!r}; unpack "
            "the task's images beside its query.json"
        )

    def check(self) -> None:
        """Decode every image once, and keep its hash."""
        try:
            self._table = self._checked(list(self._named))
        except ImageError:
            for path, where in self._named.items():
                try:
                    self._checked([path])
                except ImageError as error:
                    raise ImageError(f"{where}, {path!r}: {error.__cause__}") from error
            raise

    def _checked(self, paths: Sequence[str]) -> TripletTable:
        rows = [{"id": path, "image": path, "prompt": "", "response": "picture"} for path in paths]
        return TripletTable.from_dataset(rows, max_pixels=self._max_pixels)

    def load(self, path: str) -> Image | None:
        assert self._table is not None
        return self._table[path].image

    def keys(self, paths: Sequence[str]) -> tuple[str, ...]:
        """Hashes of the pixels."""
        assert self._table is not None
        return tuple(self._table.image_keys[self._table.row(path)] for path in paths)


_Turn = tuple[tuple[str, ...], str, str]  # paths, question, answer


def _request(
    load: Callable[[str], Image | None], number: str, query: _Turn, shown: Sequence[_Turn], first: str
) -> ICLRequest:
    texts = [question for _, question, _ in (*shown, query)]
    texts[0] = f"{first}\n{texts[0]}".strip()
    loaded = [[load(path) for path in paths] for paths, _, _ in (*shown, query)]
    pictures = [side_by_side([image for image in images if image is not None]) for images in loaded]
    demonstrations = tuple(
        Demonstration(f"{number}/{k}", image, text, answer)
        for k, (image, text, (_, _, answer)) in enumerate(zip(pictures, texts, shown, strict=False))
    )
    return ICLRequest(Query(pictures[-1], texts[-1], id=number), demonstrations)


# --- files ---------------------------------------------------------------------------------------------------------


#: Of a file of rows; our choice, far more than VL-ICL's largest.
_MOST_BYTES = 256 << 20


def _read(file: Path) -> list[Any]:
    try:
        rows = read_json(file, limit=_MOST_BYTES)
    except FileNotFoundError as error:
        raise SavedFileError(
            f"expected a VL-ICL task folder with {file.name}, there is none in {file.parent}; unpack the task there"
        ) from error
    except (OSError, ValueError) as error:
        raise SavedFileError(f"expected a list of rows in {file}, reading it as JSON failed ({error})") from error
    if not isinstance(rows, list) or not rows:
        raise SavedFileError(f"expected a list of rows in {file}, got {type(rows).__name__} with nothing to read")
    return rows


class _Reader:
    """Rows of one task as turns, each fault named with its file and row."""

    def __init__(self, folder: Path, task: str, max_pixels: int) -> None:
        self.folder, self.task = folder, task
        self.pictures = _Pictures(folder.parent, folder, max_pixels)

    def place(self, file: str, number: int) -> str:
        return f"{self.folder / file}.json, row {number}"

    def turn(self, row: Any, where: str, *, operator: int | None = None) -> _Turn:
        paths = self.paths(row, where)
        question = self.get(row, "question", str, where)
        answer: Any = self.get(row, "answer", (str, int, float, list), where)
        if operator is not None:
            if not isinstance(answer, list) or len(answer) != len(_OPERATORS):
                raise RowError(f"{where}: column 'answer': expected a result for each of +, -, x, got {answer!r}")
            answer = answer[operator]
        if isinstance(answer, list) or not str(answer).strip():
            raise RowError(f"{where}: column 'answer': expected a text or a number, got {answer!r}")
        if self.task == "matching_mi" and str(answer).lower() not in ("yes", "no"):
            raise RowError(f"{where}: column 'answer': expected 'yes' or 'no', got {answer!r}")
        return paths, question, str(answer)

    def paths(self, row: Any, where: str, column: str = "image") -> tuple[str, ...]:
        found: Any = self.get(row, column, (str, list), where)
        names = [found] if isinstance(found, str) else found
        if not names:
            raise RowError(f"{where}: column {column!r}: expected at least one image, got an empty list")
        return tuple(self.pictures.name(name, where) for name in names)

    def get(self, row: Any, column: str, kind: type | tuple[type, ...], where: str) -> Any:
        if not isinstance(row, dict):
            raise RowError(f"{where}: expected an object of columns, got {type(row).__name__}")
        if column not in row:
            raise RowError(f"{where}: expected a column {column!r}, got {', '.join(map(repr, row)) or 'none'}")
        if not isinstance(row[column], kind) or isinstance(row[column], bool):
            raise RowError(f"{where}: column {column!r} can't be used, got {row[column]!r:.80}")
        return row[column]


def read_vl_icl(
    folder: str | os.PathLike[str],
    *,
    task: str | None = None,
    shots: int | Sequence[int] | None = None,
    queries: int | None = None,
    seed: int = 0,
    instruction: str = "",
    max_pixels: int = MAX_PIXELS,
) -> Benchmark:
    """Read a VL-ICL task from its folder: query.json, support.json and the images they name.

    Shots are counted as published: in open_mi (one of the query's class, one of another) and matching_mi (a pair that
    is the same, a pair that differs, in this order) a shot is two demonstrations. Of open_mi and matching_mi the
    options are known, so that likelihoods can be compared, too; answers are judged by the published rules
    (`vl_icl_match`, `yes_no_match`).

    Ours: demonstrations are drawn from our own seed, and with fewer shots they are the first of those with more; a
    turn of two images (matching_mi, operator_induction_interleaved) shows them side by side as one.

    Args:
        folder: holds query.json and support.json. Image paths start from the folder above it (or from it), and may
            not leave it.
        task: one of `VL_ICL_TASKS`; None for the folder's name.
        shots: None for 0, 1, 2, 4 and 8 (open_mi: 0, 1, 2, 4 and 5, all that its rows hold).
        queries: only so many, from the first; None for all.
        seed: of the demonstrations drawn.
        instruction: what stands before the first turn's question (the published default is nothing).
        max_pixels: larger images are refused, not decoded.

    Raises:
        ValueError: an unknown task, or negative shots.
        SavedFileError: a file is missing or no JSON list.
        RowError, ImageError: a row can't be used, or an image is not there; the message names file and row.
        TooFewDemonstrationsError: more shots than the support set, or a row of open_mi, holds.
        LeakError: in open_mi, a query's image is among those that demonstrate it. (Elsewhere support rows that show
            a query's picture are passed over.)
    """
    folder = Path(folder)
    task = folder.resolve().name if task is None else task
    if task not in VL_ICL_TASKS:
        raise ValueError(f"unknown VL-ICL task {task!r}; expected one of {', '.join(VL_ICL_TASKS)}: pass it as task=")
    if shots is None:
        shots = _OPEN_MI_SHOTS if task == "open_mi" else _SHOTS
    wanted = numbers_of_shots(shots, 1 if queries is None else queries)
    reader = _Reader(folder, task, max_pixels)
    asked = _read(folder / "query.json")[:queries]
    draw = _open_mi if task == "open_mi" else _from_support
    episodes = draw(reader, asked, max(wanted), seed)
    each = 2 if task in ("open_mi", "matching_mi") else 1
    items = [
        BenchmarkItem(
            id=str(number),
            shots=count,
            gold=query[2],
            options=options,
            shown=tuple(answer for _, _, answer in shown[: each * count]),
            build=functools.partial(
                _request, reader.pictures.load, str(number), query, shown[: each * count], instruction
            ),
        )
        for count in wanted
        for number, (query, shown, options) in enumerate(episodes)
    ]
    settings = {"shots": list(wanted), "queries": len(asked), "seed": seed, "instruction": instruction}
    scorer: Scorer = yes_no_match if task == "matching_mi" else vl_icl_match(task)
    return Benchmark(f"vl-icl/{task}", items, scorer=scorer, max_new_tokens=15, settings=settings)


_Episode = tuple[_Turn, list[_Turn], tuple[str, ...]]  # query, demonstrations, options


def _open_mi(reader: _Reader, rows: Sequence[Any], most: int, seed: int) -> list[_Episode]:
    """Each row holds the images that may demonstrate it: of its class, and of another one that is drawn."""
    episodes: list[_Episode] = []
    for number, row in enumerate(rows):
        where = reader.place("query", number)
        query = reader.turn(row, where)
        classes = reader.get(row, "classes", list, where)
        support = reader.get(row, "support", dict, where)
        gold = query[2]
        others = [name for name in classes if name != gold]
        if gold not in classes or not others or not all(isinstance(name, str) for name in classes):
            raise RowError(
                f"{where}: column 'classes': expected the answer {gold!r} and another class, got {classes!r}"
            )
        rng = np.random.default_rng([_STREAM, seed, number])
        pair = [gold, others[rng.integers(len(others))]]
        pair = [pair[i] for i in rng.permutation(2)]
        images = {}
        for name in pair:
            inside = f"{where}, support of class {name!r}"
            images[name] = reader.paths(reader.get(support, name, dict, inside), inside, "images")
            if len(images[name]) < most:
                raise TooFewDemonstrationsError(
                    f"{inside}: expected {most} images, one for each shot, got {len(images[name])}; ask for fewer "
                    "shots"
                )
        shown: list[_Turn] = [((images[name][k],), query[1], name) for k in range(most) for name in pair]
        episodes.append((query, shown, tuple(pair[i] for i in rng.permutation(2))))
    reader.pictures.check()
    for number, (query, shown, _) in enumerate(episodes):
        if _same_picture(reader, query, shown):
            raise LeakError(
                f"{reader.place('query', number)}: its image {query[0][0]!r} is among those that demonstrate it; "
                "leave it out of one of them"
            )
    return episodes


def _from_support(reader: _Reader, rows: Sequence[Any], most: int, seed: int) -> list[_Episode]:
    """Every support row may demonstrate every query but those that show the same picture."""
    support = [_support(reader, row, number) for number, row in enumerate(_read(reader.folder / "support.json"))]
    queries = []
    for number, row in enumerate(rows):
        where = reader.place("query", number)
        operator = None
        if "operator_induction" in reader.task:
            symbol = reader.get(row, "operator", str, where)
            if symbol not in _OPERATORS:
                raise RowError(f"{where}: column 'operator': expected one of +, -, x, got {symbol!r}")
            operator = _OPERATORS[symbol]
        queries.append((reader.turn(row, where), operator))
    reader.pictures.check()

    options = ("yes", "no") if reader.task == "matching_mi" else ()
    episodes: list[_Episode] = []
    for number, (query, operator) in enumerate(queries):
        order = np.random.default_rng([_STREAM, seed, number]).permutation(len(support))
        drawn = [support[i][operator] for i in order]
        drawn = [turns for turns in drawn if not _same_picture(reader, query, turns)][:most]
        if len(drawn) < most:
            raise TooFewDemonstrationsError(
                f"{most} shots need as many rows in {reader.folder / 'support.json'} that don't show the picture of "
                f"{reader.place('query', number)}, got {len(drawn)}; ask for fewer shots"
            )
        episodes.append((query, [turn for turns in drawn for turn in turns], options))
    return episodes


def _support(reader: _Reader, row: Any, number: int) -> Mapping[int | None, Sequence[_Turn]]:
    """A support row's turns: by the operator asked, or under None where that plays no part."""
    where = reader.place("support", number)
    if "operator_induction" in reader.task:
        return {k: [reader.turn(row, where, operator=k)] for k in _OPERATORS.values()}
    if reader.task == "matching_mi":
        kinds = ("same", "diff")
        return {None: [reader.turn(reader.get(row, k, dict, where), f"{where}, {k!r}") for k in kinds]}
    return {None: [reader.turn(row, where)]}


def _same_picture(reader: _Reader, query: _Turn, turns: Iterable[_Turn]) -> bool:
    """Whether a turn shows what the query shows (both its pictures, where it has two)."""
    asked = reader.pictures.keys(query[0])
    return any(reader.pictures.keys(paths) == asked for paths, _, _ in turns)
