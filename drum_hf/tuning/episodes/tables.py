"""Concept-labelled tables: pictures, and what each of them shows of which concept."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ...data import MAX_PIXELS, TripletTable
from ...errors import ColumnError, EmptySupportError, RowError
from ...types import content_key
from .columns import match_concept_columns, open_texts, row_check, triplet_texts

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image

logger = logging.getLogger(__name__)


class Contents(NamedTuple):
    """What data shows: hashes of its pictures, and its (concept, value) pairs."""

    images: set[str]
    values: set[tuple[str, str]]


class ConceptRow(NamedTuple):
    """One checked row: its picture's id and hash, concept -> value, and the texts it came with ("" for none)."""

    id: str
    image_key: str
    concepts: dict[str, str]
    question: str = ""
    answer: str = ""
    options: tuple[str, ...] = ()
    caption: str = ""


class ConceptTable:
    """Pictures labelled with what they show of one or more concepts; what episodes are made from.

    A concept is anything to be inferred: an attribute, an object category, a relation, a scene, an instance. Every row
    is checked once, when the table is made, and rows of the same content are kept once. Pictures stay encoded until a
    row is drawn.

    Attributes:
        rows: the checked rows.
        skipped: (row number, reason) of each row that `on_bad_rows="skip"` left out.
        duplicates: how many rows were left out because another has the same content.

    Example:
        >>> from PIL import Image
        >>> rows = [
        ...     {"image": Image.new("RGB", (4, 4), name), "concepts": {"colour": name}, "caption": f"It is {name}."}
        ...     for name in ("red", "blue", "red")
        ... ]
        >>> table = ConceptTable.from_dataset(rows)
        >>> table.concepts, table.duplicates
        ({'colour': {'red': 1, 'blue': 1}}, 1)
    """

    def __init__(
        self,
        rows: Sequence[ConceptRow],
        pictures: TripletTable,
        *,
        skipped: Sequence[tuple[int, str]] = (),
        duplicates: int = 0,
    ) -> None:
        # Takes rows that were checked already: users come in through `from_dataset`.
        if not rows:
            why = f": all {len(skipped)} were left out, the first for: {skipped[0][1]}" if skipped else ""
            raise EmptySupportError(f"expected at least one row about a concept, got none{why}; give more rows")
        self.rows = list(rows)
        self.skipped = list(skipped)
        self.duplicates = duplicates
        self._pictures = pictures

    @classmethod
    def from_dataset(
        cls,
        data: datasets.Dataset | Sequence[Mapping[str, Any]] | TripletTable | ConceptTable,
        *,
        concepts: Mapping[str, str] | None = None,
        columns: Mapping[str, str] | None = None,
        on_bad_rows: Literal["raise", "skip"] = "raise",
        image_root: str | os.PathLike[str] | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> ConceptTable:
        """Check every row once.

        Columns: `image`; `concepts` ({name: value}, values text or whole numbers, None for not known); optional
        `question`, `answer`, `options` (list of texts, the answer among them) and `caption`. A row's question and
        answer are asked about its only concept, or about the one whose value is the answer. Other columns are left
        behind. A TripletTable's label is its concept "label", its prompt the question and its response the answer.

        Args:
            data: a Dataset, a list of dicts whose images are as `TripletTable` takes them, or a TripletTable with
                labels; a ConceptTable comes back as it is.
            concepts: concept -> the column (text, whole numbers or a ClassLabel) that holds its value, in place of
                the `concepts` column: for plain classification tables.
            columns: our column name -> the name in `data`, where they differ.
            on_bad_rows: "raise" at the first row that can't be used, or "skip" such rows, with one warning in the log.
            image_root, max_pixels: as in `TripletTable.from_dataset`.

        Raises:
            ColumnError: a column is missing, or one is named that doesn't exist.
            RowError, ImageError: a row, or its image, can't be used.
            EmptySupportError: no row, or none that can be used.
        """
        if isinstance(data, ConceptTable):
            return data
        if on_bad_rows not in ("raise", "skip"):
            raise ValueError(f"expected on_bad_rows 'raise' or 'skip', got {on_bad_rows!r}")
        texts: Sequence[Mapping[str, Any]]
        if isinstance(data, TripletTable):
            columns = {"question": "prompt", "answer": "response", **(columns or {})}
            concepts = concepts or {"label": "label"}
            if unknown := set(concepts.values()) - {"prompt", "response", "label"}:
                raise ColumnError(f"expected concepts= to name the columns prompt, response or label, got {unknown}")
            pictures, texts = data, triplet_texts(data)
        else:
            names = match_concept_columns(data, columns or {}, concepts)
            pictures, texts = open_texts(
                data, names["image"], on_bad_rows=on_bad_rows, image_root=image_root, max_pixels=max_pixels
            )
        skipped = [] if pictures is data else list(pictures.skipped)
        check = row_check(columns or {}, concepts)
        rows: dict[str, ConceptRow] = {}  # content -> row
        used = 0
        for place, id in enumerate(pictures.ids):
            number = place if pictures is data else int(id)
            try:
                row = ConceptRow(id, pictures.image_keys[place], **check(texts[number]))
                if row.concepts and not row.image_key:
                    raise RowError("column 'image': expected an image, got none")
            except RowError as error:
                if on_bad_rows == "raise":
                    remedy = "correct the row, or pass on_bad_rows='skip' to leave such rows out"
                    raise type(error)(f"row {number}, {error}; {remedy}") from error
                skipped.append((number, str(error)))
                continue
            if row.concepts:  # a row about nothing isn't wrong: of a sparse table most may be
                used += 1
                rows.setdefault(content_key(row.image_key, json.dumps(row[2:], sort_keys=True)), row)
        skipped.sort()
        if skipped:
            message = "%d rows can't be used and were left out; the first is row %d: %s"
            logger.warning(message, len(skipped), *skipped[0])
        return cls(list(rows.values()), pictures, skipped=skipped, duplicates=used - len(rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        values = sum(map(len, self.concepts.values()))
        return f"ConceptTable({len(self)} rows, {len(self.concepts)} concepts, {values} values)"

    @property
    def concepts(self) -> dict[str, dict[str, int]]:
        """Concept -> value -> how many different pictures show it, in order of first appearance."""
        images: dict[str, dict[str, set[str]]] = {}
        for row in self.rows:
            for concept, value in row.concepts.items():
                images.setdefault(concept, {}).setdefault(value, set()).add(row.image_key)
        return {concept: {v: len(keys) for v, keys in values.items()} for concept, values in images.items()}

    def image(self, row: ConceptRow) -> Image:
        """The picture of a row, from a cache: copy it before drawing on it."""
        image = self._pictures[row.id].image
        assert image is not None
        return image

    def contents(self) -> Contents:
        """Hashes of the pictures, and the (concept, value) pairs."""
        values = {pair for row in self.rows for pair in row.concepts.items()}
        return Contents({row.image_key for row in self.rows}, values)

    def keep(self, wanted: Callable[[ConceptRow, str, str], bool]) -> ConceptTable:
        """The rows with those of their concepts for which `wanted(row, concept, value)`; rows with none are left out.

        Raises:
            EmptySupportError: no row is left.
        """
        rows = []
        for row in self.rows:
            kept = {concept: value for concept, value in row.concepts.items() if wanted(row, concept, value)}
            # A question was about the only concept a row had: with another one gone it isn't known to be.
            about_all = len(kept) == len(row.concepts)
            if kept:
                rows.append(row if about_all else _forget(row, kept))
        return ConceptTable(rows, self._pictures, skipped=self.skipped, duplicates=self.duplicates)


def _forget(row: ConceptRow, kept: dict[str, str]) -> ConceptRow:
    if row.answer in kept.values():
        return row._replace(concepts=kept)
    return row._replace(concepts=kept, question="", answer="", options=())


def contents_of(data: Any) -> Contents:
    if hasattr(data, "contents"):
        return data.contents()
    if isinstance(data, TripletTable):
        labels = {("label", label) for label in data.label_set}
        return Contents(set(data.image_keys) - {""}, labels)
    turns = [(talk, turn) for talk in data for turn in talk.turns]
    values = {(turn.concept, turn.value) for _, turn in turns if turn.value}
    values |= {(talk.concept, talk.value) for talk, _ in turns if talk.value}
    return Contents({turn.image_key for _, turn in turns} - {""}, values)
