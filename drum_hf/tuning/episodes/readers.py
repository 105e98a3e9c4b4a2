"""Public formats to concept tables: classification, SEED-Bench, VL-Checklist."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data import MAX_PIXELS, load_table
from ...data.rows import LETTERS
from ...data.source_registry import SEED_TYPES
from ...errors import ColumnError, EmptySupportError, RowError
from .files import OnBadRows, read_each, read_json, undecoded
from .tables import ConceptTable

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

#: The ICL-tuning paper's split of them: trained on; held out but evaluated; never seen.
SEED_TRAINED, SEED_HELD_OUT, SEED_UNSEEN = (1, 2, 3, 4), (5,), (6, 7, 8)

_NOTHING: dict[str, Any] = {"image": None, "concepts": {}}


def read_labels(
    data: Any, label: str = "label", *, concept: str | None = None, on_bad_rows: OnBadRows = "raise", **options: Any
) -> ConceptTable:
    """A plain classification table: an image and its class.

    Args:
        data: what `ConceptTable.from_dataset` takes; or a path or Hub id for `load_table`, such as a folder with a
            folder of images for each class.
        label: the column of the class.
        concept: what the classes are classes of, as the question will name it; the column's name where left out.
        on_bad_rows: as in `ConceptTable.from_dataset`.
        options: for `ConceptTable.from_dataset`, or for `load_table` with a path.

    Raises:
        As these two.
    """
    concepts = {concept or label: label}
    if isinstance(data, (str, os.PathLike)):
        table = load_table(data, on_bad_rows=on_bad_rows, **options)
        return ConceptTable.from_dataset(table, concepts=concepts, on_bad_rows=on_bad_rows)
    return ConceptTable.from_dataset(data, concepts=concepts, on_bad_rows=on_bad_rows, **options)


def read_seed_bench(
    data: str | os.PathLike[str] | datasets.Dataset | Sequence[Mapping[str, Any]],
    *,
    types: Collection[int] = SEED_TRAINED,
    image_root: str | os.PathLike[str] | None = None,
    on_bad_rows: OnBadRows = "raise",
    max_pixels: int = MAX_PIXELS,
) -> ConceptTable:
    """Rows of SEED-Bench: the question's type is the concept, the right choice its value.

    Args:
        data: SEED-Bench.json (its images are files called by `data_id` under `image_root`), its rows, or the Hub's
            mirrors (`image`: one, or a list of one). Columns question, choice_a … choice_d, answer (a letter),
            question_type_id.
        types: the question types taken, of `SEED_TYPES`; rows of others are left out. The default is what the
            ICL-tuning paper trains on.
        image_root: folder of the image files; the JSON's own folder where left out.
        on_bad_rows, max_pixels: as in `ConceptTable.from_dataset`.

    Raises:
        SavedFileError: there is no such file, or it is no JSON.
        ColumnError: a column is missing.
        RowError, ImageError: a row can't be used: a letter out of range, two images, an image that can't be read.
    """
    if unknown := sorted(set(types) - set(SEED_TYPES)):
        raise ValueError(f"expected types among {list(SEED_TYPES)}, got {unknown}")
    if isinstance(data, (str, os.PathLike)):
        image_root = image_root or Path(data).parent
        data = read_json(data, "questions")
    rows = undecoded(data)
    _need_columns(rows, ("question", "choice_a", "choice_b", "answer", "question_type_id"))

    def read(row: Any) -> list[dict[str, Any]]:
        if not isinstance(row, Mapping):
            raise RowError(f"expected a dict of columns, got {type(row).__name__}")
        if row.get("question_type_id") not in types:
            return [_NOTHING]
        image = row.get("image", row.get("data_id"))
        if isinstance(image, Sequence) and not isinstance(image, (str, bytes)):
            if len(image) != 1:
                raise RowError(f"column 'image': expected one image a question, got {len(image)}")
            image = image[0]
        options = [row[f"choice_{letter}"] for letter in "abcd" if row.get(f"choice_{letter}")]
        answer = options[_letter_place(row.get("answer"), len(options))]
        concepts = {SEED_TYPES[row["question_type_id"]]: answer}
        question = row.get("question")
        return [{"image": image, "concepts": concepts, "question": question, "answer": answer, "options": options}]

    return _table(rows, read, image_root, on_bad_rows, max_pixels)


def read_vl_checklist(
    data: str | os.PathLike[str] | Sequence[Any],
    *,
    concept: str | None = None,
    image_root: str | os.PathLike[str] | None = None,
    on_bad_rows: OnBadRows = "raise",
    max_pixels: int = MAX_PIXELS,
) -> ConceptTable:
    """Rows of VL-Checklist, [image, {"POS": [texts], "NEG": [texts]}]: texts that fit a picture and texts that don't.

    A right text is the caption and, with its wrong ones, the options of a multiple choice. The concept's value is the
    words in which it differs from its wrong text: "a red car" against "a blue car" shows "red".

    Args:
        data: rows; a JSON file of rows; or a folder of such files, each a concept of its own.
        concept: what the rows are about. Where left out, a file's path inside the folder ("attribute/color"), or its
            name.
        image_root: folder of the images; the JSON's own folder where left out.
        on_bad_rows, max_pixels: as in `ConceptTable.from_dataset`.

    Raises:
        SavedFileError: there is no such file, or it is no JSON list.
        RowError, ImageError: a row can't be used.
        ValueError: rows came without `concept`.
    """
    pairs: list[tuple[str, Any]] = []
    if isinstance(data, (str, os.PathLike)):
        path = Path(data)
        files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
        if not files:
            raise EmptySupportError(f"{path}: expected JSON files of VL-Checklist rows, found none; check the path")
        image_root = image_root or (path if path.is_dir() else path.parent)
        for file in files:
            name = file.relative_to(path).with_suffix("").as_posix() if path.is_dir() else file.stem
            pairs += [(concept or name, row) for row in read_json(file)]
    elif concept is None:
        raise ValueError("expected concept= with rows, for nothing in them says what they are about, got none")
    else:
        pairs = [(concept, row) for row in data]

    def read(pair: tuple[str, Any]) -> list[dict[str, Any]]:
        about, row = pair
        if not isinstance(row, Sequence) or len(row) != 2 or not isinstance(row[1], Mapping):
            raise RowError(f"expected [image, {{'POS': [texts], 'NEG': [texts]}}], got {row!r:.80}")
        texts: list[Any] = [row[1].get(side) for side in ("POS", "NEG")]
        for side, own in zip(("POS", "NEG"), texts, strict=True):
            if not isinstance(own, Sequence) or isinstance(own, str) or not own:
                raise RowError(f"{side!r}: expected a list of texts, got {own!r:.80}")
            if not all(isinstance(text, str) and text.strip() for text in own):
                raise RowError(f"{side!r}: expected texts, none of them empty, got {own!r:.80}")
        right, wrong = texts
        found = []
        for place, text in enumerate(right):
            against = [wrong[place]] if len(wrong) == len(right) else list(wrong)
            concepts = {about: _difference(text, against[0])}
            found.append(
                {
                    "image": row[0],
                    "concepts": concepts,
                    "answer": text,
                    "options": list(dict.fromkeys([text, *against])),
                    "caption": text,
                }
            )
        return found

    return _table(pairs, read, image_root, on_bad_rows, max_pixels)


def _difference(text: str, other: str) -> str:
    """The words of a text between those that it begins and ends with as the other does; all of it if none are."""
    own, theirs = text.split(), other.split()
    first = 0
    while first < min(len(own), len(theirs)) and own[first].casefold() == theirs[first].casefold():
        first += 1
    last = 0
    while last < min(len(own), len(theirs)) - first and own[-1 - last].casefold() == theirs[-1 - last].casefold():
        last += 1
    return " ".join(own[first : len(own) - last]) or text


def _need_columns(rows: Sequence[Any], names: Iterable[str]) -> None:
    found = getattr(rows, "column_names", None) or {key for row in rows if isinstance(row, Mapping) for key in row}
    missing = [name for name in names if name not in found]
    if missing and len(rows):
        raise ColumnError(
            f"expected the columns {', '.join(names)}, {', '.join(missing)} missing among {', '.join(sorted(found))}; "
            "rename them, or give another table"
        )


def _letter_place(letter: Any, count: int) -> int:
    place = LETTERS.find(letter.strip().upper()) if isinstance(letter, str) and len(letter.strip()) == 1 else -1
    if not 0 <= place < count:
        known = f"a letter from A to {LETTERS[count - 1]}" if count else "choices"
        raise RowError(f"column 'answer': expected {known}, got {letter!r} with {count} choices")
    return place


def _table(
    rows: Sequence[Any], read: Callable[[Any], list[dict[str, Any]]], root: Any, on_bad_rows: Any, max_pixels: int
) -> ConceptTable:
    # A row left out keeps an empty place, so that errors about pictures name the row's number.
    made: list[dict[str, Any]] = []
    skipped = []
    for number, found, reason in read_each(rows, len(rows), read, on_bad_rows):
        made += found or [_NOTHING]
        if reason:
            skipped.append((number, reason))
    table = ConceptTable.from_dataset(made, on_bad_rows=on_bad_rows, image_root=root, max_pixels=max_pixels)
    if skipped:
        logger.warning("%d rows can't be read and were left out; the first is row %d: %s", len(skipped), *skipped[0])
        table.skipped = sorted([*table.skipped, *skipped])
    return table
