"""`TripletTable`: a checked table of (image, prompt, response) demonstrations; `load_table`; the guard against leaks.

Everything travels by id. Every row is checked once, when the table is made; afterwards only texts and hashes are
held in memory, and an image is decoded when its row is read.
"""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import DuplicateIdError, LeakError, MissingIdError
from ..types import Demonstration, Query, content_key, trusted
from ..utils.files import writing
from ..utils.images import MAX_PIXELS
from .images import ImageCache, decode_as
from .loading import Found, find_object, find_table
from .rows import (
    MappedRecords,
    Record,
    Records,
    check_rows,
    fingerprint_of,
    ids_of,
    joined,
    no_rows,
    open_columns,
    refuse_duplicate_ids,
    shorten,
    take,
)
from .saved import image_references, map_table, read_saved_table, table_file, write_table

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image

__all__ = ["TripletTable", "check_leaks", "find_twins", "load_table"]

logger = logging.getLogger(__name__)


class TripletTable:
    """Demonstrations by id: (image, prompt, response), optionally references, group and label.

    Made by [`from_dataset`][drum_hf.data.TripletTable.from_dataset], [`load`][drum_hf.data.TripletTable.load] or
    [`load_table`][drum_hf.data.load_table]; every one of them checks what it reads. A table never changes: `select`,
    `without` and `concat` give new ones, without reading the images again. Pictures are handed out from a cache: copy
    one before drawing on it.

    Attributes:
        skipped: (row number, reason) of each row that `on_bad_rows="skip"` left out.
        max_pixels: larger images are refused, not decoded.

    Example:
        >>> from PIL import Image
        >>> rows = [
        ...     {"id": "bus", "image": Image.new("RGB", (8, 8), "red"), "prompt": "Colour?", "response": "red"},
        ...     {"id": "sky", "image": Image.new("RGB", (8, 8), "blue"), "prompt": "Colour?", "response": "blue"},
        ... ]
        >>> table = TripletTable.from_dataset(rows)
        >>> table
        TripletTable(2 rows, 2 images, 0 labels)
        >>> table["sky"].response
        'blue'
        >>> table.without(["bus"]).ids
        ['sky']
    """

    def __init__(
        self,
        records: Records,
        images: datasets.Dataset,
        *,
        max_pixels: int = MAX_PIXELS,
        cache_images: int = 256,
        skipped: Sequence[tuple[int, str]] = (),
    ) -> None:
        # Takes rows that were checked already: users come in through the class methods.
        if not len(records):
            reason = f": all {len(skipped)} rows were left out, first for: {skipped[0][1]}" if skipped else ""
            raise no_rows(reason, skipped)
        self.max_pixels = max_pixels
        self.skipped = list(skipped)
        self._records = records
        self._images = images
        self._cache = ImageCache(cache_images)
        self._files: tuple[Path, ...] = ()  # saved tables whose pictures this one may hold
        self._rows = {id: row for row, id in enumerate(ids_of(records))}

    @classmethod
    def from_dataset(
        cls,
        data: Any,
        *,
        split: str | None = None,
        on_bad_rows: Literal["raise", "skip"] = "raise",
        columns: Mapping[str, str] | None = None,
        group: str | None = "image",
        image_root: str | os.PathLike[str] | None = None,
        max_pixels: int = MAX_PIXELS,
        check_image: Callable[[Image], None] | None = None,
        cache_images: int = 256,
    ) -> TripletTable:
        """Check every row once, hash its content, and keep what the table needs.

        Columns: `prompt` (text, may be ""; may be absent where there are images), `response` (text, not empty);
        optional `id` (text, unique; the first 16 hex digits of the row's content hash where the column is absent),
        `image` (a row without one needs a prompt), `references` (list of texts), `group` and `label` (text; "" counts
        as none). [`load_table`][drum_hf.data.load_table] says which other names and layouts are understood. Whole
        numbers count as their text, a `ClassLabel` column as its class names. Responses, references and labels lose
        the blanks around them.

        Args:
            data: a Dataset, a DatasetDict (with `split`), an IterableDataset (read to its end), a pandas or polars
                frame, a pyarrow Table; or a list of dicts whose images are PIL images, paths, encoded bytes, base64
                texts or `{"bytes": …, "path": …}`; or a TripletTable, which comes back as it is.
            split: which split of a DatasetDict.
            on_bad_rows: "raise" at the first row that can't be used, or "skip" such rows, counted in `skipped`, with
                one warning in the log.
            columns: our column name -> the name in `data`, where they differ.
            group: "image": rows of one picture that name no group of their own form one, so that none demonstrates
                another; None: only the column `group` counts; another name: the column that holds the groups.
            image_root: image paths are relative to this folder and may not leave it. None: relative to the working
                folder, and free; but in a data set of the Hub, paths are refused.
            max_pixels: refuse larger images before they are decoded.
            check_image: called with each image; it raises ImageError for one that can't be used, such as one that the
                LVLM's processor refuses.
            cache_images: keep up to so many decoded images in memory (and no more than 384 MB of them).

        Raises:
            ColumnError: a column is missing or holds another type.
            RowError, ImageError: a row, or its image, can't be used.
            DuplicateIdError: two rows share an id; without ids, two rows have the same content.
            EmptySupportError: no row, or none that can be used.
        """
        if isinstance(data, TripletTable):
            return data
        found = find_object(data, split=split, image_root=image_root)
        return cls._of_found(
            found,
            columns,
            on_bad_rows=on_bad_rows,
            group=group,
            max_pixels=max_pixels,
            check_image=check_image,
            cache_images=cache_images,
        )

    @classmethod
    def _of_found(
        cls,
        found: Found,
        columns: Mapping[str, str] | None,
        *,
        on_bad_rows: Literal["raise", "skip"],
        group: str | None,
        max_pixels: int,
        check_image: Callable[[Image], None] | None,
        **options: Any,
    ) -> TripletTable:
        if on_bad_rows not in ("raise", "skip"):
            raise ValueError(f"expected on_bad_rows 'raise' or 'skip', got {on_bad_rows!r}")
        if found.saved is not None:
            return cls.load(found.saved, image_root=found.image_root, max_pixels=max_pixels)
        match, texts, images = open_columns(found.rows, columns or {}, group)
        if said := str(match):
            logger.info("%s: %s", found.kind, said)
        checked = check_rows(
            match,
            texts,
            images,
            skip=on_bad_rows == "skip",
            root=found.root,
            max_pixels=max_pixels,
            group=group,
            check_image=check_image,
        )
        return cls._of_checked(*checked, max_pixels=max_pixels, **options)

    @classmethod
    def _of_checked(
        cls, records: list[Record], images: datasets.Dataset, skipped: Sequence[tuple[int, str]], **options: Any
    ) -> TripletTable:
        """What `check_rows` found, with a word about the rows left out."""
        if skipped:
            message = "%d of %d rows can't be used and were left out; the first is row %d: %s"
            logger.warning(message, len(skipped), len(skipped) + len(records), *skipped[0])
        return cls(records, images, skipped=skipped, **options)

    # Reading

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, id: object) -> bool:
        return id in self._rows

    def __iter__(self) -> Iterator[Demonstration]:
        return (self._demonstration(row) for row in range(len(self)))

    def __getitem__(self, id: str) -> Demonstration:
        return self._demonstration(self.row(id))

    def __repr__(self) -> str:
        images = len({record.image_key for record in self._records} - {""})
        return f"TripletTable({len(self)} rows, {images} images, {len(self.label_set)} labels)"

    def row(self, id: str) -> int:
        """Position of an id, counted from 0.

        Raises:
            MissingIdError: the id is not in the table.
        """
        try:
            return self._rows[id]
        except (KeyError, TypeError):
            hint = "" if isinstance(id, str) else f" (ids are text, this is {type(id).__name__})"
            raise MissingIdError(
                f"no row has {id!r} in column 'id'{hint}; the table holds {len(self)} ids, such as {self.ids[0]!r}"
            ) from None

    def demonstrations(self, ids: Iterable[str]) -> list[Demonstration]:
        """Rows of several ids, in the order given."""
        return [self[id] for id in ids]

    def query(self, id: str, *, draft: str | None = None) -> Query:
        """A row as a query: image and prompt, with the id and group that keep it from demonstrating itself."""
        row = self.row(id)
        record = self._records[row]
        return trusted(
            Query,
            image=self._image(row),
            prompt=record.prompt,
            draft=draft,
            id=record.id,
            group=record.group,
            key=record.query_key,
        )

    @functools.cached_property
    def ids(self) -> list[str]:
        """Ids in row order. Like every list below it is shared: copy it before changing it."""
        return list(self._rows)

    @functools.cached_property
    def prompts(self) -> list[str]:
        """Prompts in row order; "" where there is none."""
        return [record.prompt for record in self._records]

    @functools.cached_property
    def responses(self) -> list[str]:
        """Gold responses in row order."""
        return [record.response for record in self._records]

    @functools.cached_property
    def references(self) -> list[tuple[str, ...]]:
        """Every gold answer of each row; () where the table names none."""
        return [record.references for record in self._records]

    @functools.cached_property
    def groups(self) -> list[str | None]:
        """Group of each row: rows of one group may not demonstrate one another."""
        return [record.group for record in self._records]

    @functools.cached_property
    def labels(self) -> list[str | None]:
        """Class name of each row."""
        return [record.label for record in self._records]

    @functools.cached_property
    def keys(self) -> list[str]:
        """Hash of each row's image, prompt and response; 32 hex digits."""
        return [record.key for record in self._records]

    @functools.cached_property
    def query_keys(self) -> list[str]:
        """Hash of each row's image and prompt; 32 hex digits."""
        return [record.query_key for record in self._records]

    @functools.cached_property
    def image_keys(self) -> list[str]:
        """Hash of each row's pixels; 32 hex digits, "" where there is no image."""
        return [record.image_key for record in self._records]

    @functools.cached_property
    def label_set(self) -> tuple[str, ...]:
        """Distinct labels, in the order they first appear; () in a table without labels."""
        return tuple(dict.fromkeys(label for label in self.labels if label is not None))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of ids, content and groups in row order; 32 hex digits."""
        return fingerprint_of(self._records)

    @functools.cached_property
    def gold_fingerprint(self) -> str:
        """Hash of ids, references and labels in row order, which `fingerprint` leaves out; 32 hex digits."""
        rows = zip(self.ids, self.references, self.labels, strict=True)
        return content_key(
            *(part for i, gold, label in rows for part in (i, str(len(gold or ())), *(gold or ()), label or ""))
        )

    # New tables from this one

    def select(self, ids: Iterable[str]) -> TripletTable:
        """The rows of `ids`, in the order given.

        Raises:
            MissingIdError: an id is not in the table.
            DuplicateIdError: an id was given twice.
            EmptySupportError: no id was given.
        """
        ids = list(ids)
        refuse_duplicate_ids(ids)
        return self._take([self.row(id) for id in ids])

    def without(self, ids: Iterable[str]) -> TripletTable:
        """Every row but those of `ids`, in the same order.

        Raises:
            MissingIdError: an id is not in the table.
            EmptySupportError: no row is left.
        """
        dropped = {self.row(id) for id in ids}
        return self._take([row for row in range(len(self)) if row not in dropped])

    def concat(self, other: TripletTable) -> TripletTable:
        """This table's rows, then the other's.

        Raises:
            DuplicateIdError: the tables share an id.
        """
        import datasets

        shared = [id for id in other.ids if id in self]
        if shared:
            raise DuplicateIdError(
                f"the two tables share {len(shared)} ids: {shorten([repr(id) for id in shared])}; "
                "drop them from one table with .without(ids), or give its rows other ids"
            )
        table = TripletTable(
            joined(self._records, other._records),
            datasets.concatenate_datasets([self._images, other._images]),
            max_pixels=max(self.max_pixels, other.max_pixels),
            cache_images=self._cache.limit,
        )
        table._files = tuple(dict.fromkeys(self._files + other._files))
        return table

    # Files

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        images: Literal["embedded", "reference"] = "embedded",
        image_root: str | os.PathLike[str] | None = None,
    ) -> Path:
        """Write one parquet file that holds everything, images included, and opens anywhere (the Hub's viewer too).

        Images keep the bytes of the file they came from; those that came as PIL images are PNG.

        Args:
            path: a name ending in .parquet, or a folder, in which the file is called triplets.parquet.
            images: "embedded", or by "reference": names of their files, and hashes of their pixels, in place of bytes.
            image_root: the folder that references are relative to; None: the innermost that holds all images.

        Returns:
            The file written; it replaces an older one only when complete.

        Raises:
            ImageError: an image file that the table refers to is gone or shows another picture since it was checked;
                or an image to be referred to is not a file, or is outside `image_root`.
            SavedFileError: the disk is full, or the folder can't be written.
        """
        file = table_file(path)
        names = image_references(self._records, self._images, image_root) if images == "reference" else None
        with writing(file):
            write_table(
                file,
                self._records,
                self._images,
                fingerprint=self.fingerprint,
                references=names,
                max_pixels=self.max_pixels,
                files=self._files,
            )
        return file

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        mmap: bool = False,
        image_root: str | os.PathLike[str] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        max_pixels: int = MAX_PIXELS,
        cache_images: int = 256,
    ) -> TripletTable:
        """Read what `save` wrote: same ids, same hashes, pixel-equal images, held in memory as encoded bytes.

        Texts are compared with the hashes saved beside them at once, pixels when an image is first decoded or saved.

        Args:
            path: the file, or the folder it was saved in.
            mmap: hold the ids in memory and nothing else: rows and images are read when they are asked for, from an
                Arrow file that is made at the first time and mapped. Lists of a whole column, such as `prompts`, are
                in memory once they were asked for.
            image_root: the folder of the images of a table that was saved with references to them.
            cache_dir: of the Arrow files; None: as `datasets` has it (`HF_DATASETS_CACHE`). Nothing but disk is lost
                by deleting them.
            max_pixels, cache_images: as in `from_dataset`.

        Raises:
            SavedFileError: the file is missing, truncated, altered, or of another format version; or an image that it
                refers to is not in `image_root`; or the Arrow file can't be written.
        """
        file = table_file(path)
        saved = map_table(file, image_root, cache_dir) if mmap else read_saved_table(file, image_root)
        table = cls(saved.records, saved.images, max_pixels=max_pixels, cache_images=cache_images)
        table._files = (file,)
        table.fingerprint = saved.fingerprint  # found to be that of the rows
        return table

    @property
    def mapped(self) -> bool:
        """Whether rows are read from their file when they are asked for."""
        return isinstance(self._records, MappedRecords)

    # Inside

    def _take(self, rows: list[int]) -> TripletTable:
        table = TripletTable(
            take(self._records, rows),
            self._images.select(rows),
            max_pixels=self.max_pixels,
            cache_images=self._cache.limit,
        )
        table._files = self._files
        return table

    def _demonstration(self, row: int) -> Demonstration:
        id, prompt, response, references, group, label, key, *_ = self._records[row]
        return trusted(
            Demonstration,
            id=id,
            image=self._image(row),
            prompt=prompt,
            response=response,
            references=references,
            group=group,
            label=label,
            key=key,
        )

    def _image(self, row: int) -> Image | None:
        record = self._records[row]
        if not record.image_key:
            return None
        image = self._cache.get(record.image_key)
        if image is None:
            source = self._images[row]["image"]
            where = source["path"] if source["bytes"] is None else ", ".join(map(str, self._files))
            image = decode_as(source, record.image_key, id=record.id, max_pixels=self.max_pixels, where=where)
            self._cache.put(record.image_key, image)
        return image


def load_table(
    data: Any,
    *,
    split: str | None = None,
    on_bad_rows: Literal["raise", "skip"] = "raise",
    columns: Mapping[str, str] | None = None,
    group: str | None = "image",
    image_root: str | os.PathLike[str] | None = None,
    max_pixels: int = MAX_PIXELS,
    check_image: Callable[[Image], None] | None = None,
    **load_options: Any,
) -> TripletTable:
    """Read and check a table of demonstrations, in whatever form you have it.

    `data` is one of
      - a .csv, .tsv, .jsonl, .json (a list of objects), .parquet or .arrow file, or one of the text formats packed as
        .gz. Image paths are relative to its folder and may not leave it, unless `image_root` says otherwise. The
        separator of a CSV file is found out;
      - a folder with one such file (metadata.* if there are several) and the images beside it;
      - a folder of class folders: label and response are the name of the class folder, nothing is asked, and the id is
        the image's path. Images may be in folders below it. What is left out is counted in the log;
      - a .zip of such a folder;
      - what `TripletTable.save`, `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote;
      - the id of a data set on the Hub. Its cells never lead to files of this machine;
      - what [`from_dataset`][drum_hf.data.TripletTable.from_dataset] takes: a Dataset, a frame, a list of dicts, ….

    Columns are recognised by their names, and one line of the log says what is read as what:
      - `question`, `query` or `instruction` is the prompt; `answer` or `caption` the response; `answers` or `captions`
        the references, of which the most frequent is the response; `file_name`, `image_path` and the like the image;
      - `text` is the prompt beside an answer or a label, and the response beside an image alone;
      - `label` (or `class`) is the response where nothing else is;
      - `conversations` and `messages` are chats, whose first exchange is used;
      - columns `A`, `B`, … are the options of a multiple choice, asked for by their letters.

    Images may be base64 texts. Answers may be lists, lists of `{"answer": …}`, or the text of a list.

    Args:
        data: see above. What exists on disk goes before the Hub.
        split: which split, where there are several: of the Hub's, of a DatasetDict, or a sub-folder or file so named.
        on_bad_rows, columns, group, max_pixels, check_image: as in `TripletTable.from_dataset`.
        image_root: the folder that image paths are relative to and may not leave.
        load_options: for `datasets.load_dataset` (name, revision, token…); only with a Hub id.

    Raises:
        SavedFileError: there is no such table, or it can't be read as one.
        ColumnError, RowError, ImageError, DuplicateIdError, EmptySupportError: as in `TripletTable.from_dataset`.
        ValueError: `split` names none of the splits, or is needed and missing.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (8, 8), "red").save(folder / "bus.png")
        >>> _ = (folder / "metadata.csv").write_text("file_name,question,answer\\nbus.png,What colour?,red\\n")
        >>> table = load_table(folder)
        >>> table.prompts, table.responses
        (['What colour?'], ['red'])
    """
    if isinstance(data, TripletTable):
        return data
    if isinstance(data, (str, os.PathLike)):
        found = find_table(data, split=split, image_root=image_root, load_options=load_options)
    elif load_options:
        raise ValueError(f"{', '.join(load_options)}: expected only with a Hub id, got {type(data).__name__}")
    else:
        found = find_object(data, split=split, image_root=image_root)
    return TripletTable._of_found(
        found, columns, on_bad_rows=on_bad_rows, group=group, max_pixels=max_pixels, check_image=check_image
    )


def check_leaks(
    support: TripletTable, queries: TripletTable, *, on_leak: Literal["raise", "warn", "ignore"] = "raise"
) -> list[tuple[str, str]]:
    """Find queries that a support set gives away: same id, same image or, where there is no image, same prompt.

    Args:
        support: the rows that may be shown.
        queries: the rows that will be asked.
        on_leak: "raise" an error, "warn" in the log, or "ignore" and only return.

    Returns:
        (query id, support id) pairs, in the order of `queries`, then of `support`.

    Raises:
        LeakError: there is a pair, and `on_leak` is "raise".
    """
    if on_leak not in ("raise", "warn", "ignore"):
        raise ValueError(f"expected on_leak 'raise', 'warn' or 'ignore', got {on_leak!r}")
    rows_of: defaultdict[str, list[int]] = defaultdict(list)
    for row, record in enumerate(support._records):
        rows_of[record.image_key or record.query_key].append(row)
    pairs = []
    for record in queries._records:
        rows = rows_of.get(record.image_key or record.query_key, [])
        if record.id in support:
            rows = sorted({*rows, support.row(record.id)})
        pairs += [(record.id, support.ids[row]) for row in rows]
    if pairs and on_leak != "ignore":
        query_id, support_id = pairs[0]
        what = "id" if query_id == support_id else "content"
        message = (
            f"{len({query for query, _ in pairs})} of {len(queries)} queries share an id or an image with the support "
            f"set ({len(pairs)} pairs; query {query_id!r} has the {what} of support row {support_id!r}): scores would "
            "be too good to be true. In Python, drop the pairs' support ids with support.without(ids), or pass "
            "on_leak='warn'; else take other queries"
        )
        if on_leak == "raise":
            raise LeakError(message)
        logger.warning(message)
    return pairs


def find_twins(support: TripletTable, queries: TripletTable) -> list[str]:
    """Queries that other rows of the support set give away, though neither id nor group keeps these from them.

    Such a row shows the query's pixels, or, where there is no image, asks its prompt: retrieved for the query, it
    may hand it the answer. Other file formats and names don't matter, a changed pixel does.

    Returns:
        Ids, in the order of `queries`; empty where groups name all that belongs together.
    """
    rows: Counter[str] = Counter()
    guarded: Counter[tuple[str, str | None]] = Counter()
    for record in support._records:
        content = record.image_key or record.query_key
        rows[content] += 1
        guarded[content, record.group] += record.group is not None
    twins = []
    for record in queries._records:
        content = record.image_key or record.query_key
        left = rows[content] - (guarded[content, record.group] if record.group is not None else 0)
        if record.id in support:
            own = support._records[support.row(record.id)]
            ours = (own.image_key or own.query_key) == content
            left -= ours and (record.group is None or own.group != record.group)
        if left > 0:
            twins.append(record.id)
    return twins
