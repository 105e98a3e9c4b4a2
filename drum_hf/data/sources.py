"""Public data sets by name, from the Hub or a local copy of it, as a `TripletTable`.

Each entry of `SOURCES` names support and query sides apart, for many public mirrors hold an evaluation split alone.
Columns are checked before a row is read, and no other code than the platform's own parquet reader is run.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ..errors import ColumnError, EmptySupportError, RowError, SavedFileError
from ..types import content_key
from ..utils.files import refuse_outside
from ..utils.images import MAX_PIXELS
from .loading import (
    ask_hub,
    hub_folders,
    is_saved_dataset,
    read_class_folders,
    read_saved_dataset,
    split_folder,
    which_split,
)
from .rows import COLUMNS, LETTERS, Columns, ImageRoot, NamedClasses, check_rows, grouped_by_image, majority
from .source_registry import SOURCES, Source, SourcePart
from .table import TripletTable

if TYPE_CHECKING:
    import datasets

    Table: TypeAlias = datasets.Dataset | datasets.IterableDataset

__all__ = ["SOURCES", "Source", "SourcePart", "find_source", "load_triplets"]

logger = logging.getLogger(__name__)


def find_source(name: str) -> Source:
    """The entry of a name, however it is spelt: "OK-VQA" is "okvqa".

    Raises:
        ValueError: there is none.

    Example:
        >>> find_source("OK-VQA").query.download["repo"]
        'lmms-lab/OK-VQA'
    """
    source = SOURCES.get(re.sub(r"[\W_]", "", name).lower())
    if source is None:
        raise ValueError(
            f"expected one of {', '.join(SOURCES)}, got {name!r}; read a table of your own with "
            "drum_hf.data.load_table"
        )
    return source


def load_triplets(
    source: str | Source,
    *,
    split: str = "support",
    data_dir: str | os.PathLike[str] | None = None,
    streaming: bool = False,
    limit: int | None = None,
    prompt: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    on_bad_rows: Literal["raise", "skip"] = "raise",
    max_pixels: int = MAX_PIXELS,
) -> TripletTable:
    """Read one side of a public data set.

    What is read stays on disk, memory-mapped, unless it is a stream, or SEED-Bench, whose images come in lists.

    Ids are the data set's own where it has any. `group` is the picture: rows of one image never demonstrate one
    another. `references` are all gold answers, without empty ones; the response is the most frequent (VQA), the first
    (captions), the class name in plain words, or the letter of the right choice. Every row must have an image.

    Args:
        source: a name of `SOURCES`, or an entry of your own.
        split: "support", "query", or a split by its own name, such as "val2014".
        data_dir: a local copy instead of the Hub: a folder of parquet files that are called by their split, as in the
            repository (anywhere below `data_dir`, in a folder called like the repository if there is one); a data set
            saved by `save_to_disk`; or, for classification, a folder of images for each class, itself or in a folder
            called by the split.
        streaming: read row by row and keep only what is used, in memory, instead of fetching whole files first.
            With `limit`, a few rows of a large data set cost little.
        limit: the first so many rows, after those that the entry leaves out.
        prompt: what is asked instead of the entry's own; "{question}" stands for the row's question.
        revision, token, cache_dir: of the Hub, as `datasets.load_dataset` takes them.
        on_bad_rows, max_pixels: as in `TripletTable.from_dataset`.

    Raises:
        ValueError: there is no data set of that name.
        SavedFileError: neither the Hub nor `data_dir` has the files.
        ColumnError: columns are missing or of another type; they are named.
        RowError, ImageError, DuplicateIdError: a row can't be used, such as one of a test split without answers.
        EmptySupportError: no row is left.
    """
    if isinstance(source, str):
        source = find_source(source)
    if limit is not None and limit < 1:
        raise ValueError(f"expected limit of at least 1, or None for all rows, got {limit}")
    if on_bad_rows not in ("raise", "skip"):
        raise ValueError(f"expected on_bad_rows 'raise' or 'skip', got {on_bad_rows!r}")
    part = source.part(split)
    # Images come as bytes; a path in an untrusted file must not lead to other files of this machine.
    root: ImageRoot = hub_folders(part.repo)
    where = f"{source.name} ({part.repo if data_dir is None else data_dir}, {part.split})"
    if data_dir is None:
        data = _from_hub(part, streaming=streaming, revision=revision, token=token, cache_dir=cache_dir)
    else:
        if revision is not None or token is not None:
            raise ValueError(f"{where}: revision and token are the Hub's, but data_dir is on this machine; drop them")
        folder = os.path.abspath(data_dir)
        root = os.path.dirname(folder) if os.path.isfile(folder) else folder
        data = _from_folder(part, Path(folder), source.task, streaming=streaming, cache_dir=cache_dir)
    features = _features(data)
    check_features(features, part.columns, needed=part.needed, where=where, open_ended=part.open_ended)
    data = _undecoded(data.select_columns([name for name in features if name in part.needed]), part)

    read = functools.partial(_READERS[source.task], part, source.prompt if prompt is None else prompt)
    texts, images, numbers = _read(part, data, read, limit, where)
    names = {name: name for name in COLUMNS if any(name in row for row in texts)}
    records, held, skipped = check_rows(
        Columns(names),
        texts,
        images,
        skip=on_bad_rows == "skip",
        root=root,
        max_pixels=max_pixels,
        group=None,  # once rows without an image are gone
    )
    skipped = [(numbers[row], reason) for row, reason in skipped]
    number_of = {row["id"]: number for row, number in zip(texts, numbers, strict=True)}
    bare = [record for record in records if not record.image_key]
    if bare and on_bad_rows == "raise":
        raise RowError(
            f"{where}, row {number_of[bare[0].id]} (id {bare[0].id!r}), column {part.image!r}: expected one image, "
            "got none or several; correct the row, or pass on_bad_rows='skip' to leave such rows out"
        )
    if bare:
        reason = f"column {part.image!r}: expected one image, got none or several"
        skipped = sorted([*skipped, *((number_of[record.id], reason) for record in bare)])
        kept = [row for row, record in enumerate(records) if record.image_key]
        records, held = [records[row] for row in kept], held.select(kept)
    return TripletTable._of_checked(grouped_by_image(records), held, skipped, max_pixels=max_pixels)


# Where the rows are


def _from_hub(part: SourcePart, *, revision: str | None, cache_dir: Any, **options: Any) -> Table:
    files = part.files.format(split=part.stored_split)
    # Named files, for a plain load_dataset(repo, split=…) would fetch every split.
    return ask_hub(
        part.repo,
        split=part.stored_split,
        data_files={part.stored_split: files},
        revision=revision or part.revision,
        cache_dir=None if cache_dir is None else os.fspath(cache_dir),
        **options,
    )


def _from_folder(part: SourcePart, folder: Path, task: str, *, streaming: bool, cache_dir: Any) -> Table:
    """A split of a local copy."""
    for name in (part.repo, part.repo.split("/")[-1]):  # a folder may hold the copies of several repositories
        if (folder / name).is_dir():
            folder = folder / name
            break
    split = part.stored_split
    if folder.is_dir() and (folder / "dataset_dict.json").is_file():
        folder = split_folder(folder, split)
    if folder.is_dir() and is_saved_dataset(folder):
        return _as_asked(read_saved_dataset(folder), streaming)
    files = [folder] if folder.is_file() and folder.suffix == ".parquet" else []
    found = sorted(p for p in folder.rglob("*.parquet") if not p.name.startswith(".")) if folder.is_dir() else []
    files = files or [p for p in found if _split_of(p) == split]
    for file in files:
        refuse_outside(file, folder)
    if files:
        import pyarrow as pa

        cache = None if cache_dir is None else os.fspath(cache_dir)
        paths = [str(path) for path in files]
        try:
            return ask_hub("parquet", split="train", data_files=paths, streaming=streaming, cache_dir=cache)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise SavedFileError(f"{files[0]}: expected parquet files ({error}); download them again") from error
        except Exception as error:  # datasets wraps what went wrong while it read a file
            if type(error).__name__ != "DatasetGenerationError":
                raise
            raise SavedFileError(
                f"{files[0]}: expected parquet files of one layout ({error.__cause__}); download them again"
            ) from error
    if found:
        raise which_split(folder, split, sorted({_split_of(path) for path in found}))
    if task == "classification" and not part.choices and folder.is_dir():
        return _as_asked(_class_folders(part, folder / split if (folder / split).is_dir() else folder), streaming)
    raise SavedFileError(
        f"{folder}: expected a copy of {part.repo} with files like {part.files.format(split=split)}, found none; "
        "check data_dir, or leave it out to read from the Hub"
    )


def _split_of(path: Path) -> str:
    """ "val" of data/val-00000-of-00013.parquet and of val/0000.parquet."""
    name = re.sub(r"-\d+-of-\d+(-\w+)?$", "", path.stem)
    return path.parent.name if re.fullmatch(r"[\d_-]*", name) else name


def _as_asked(data: datasets.Dataset, streaming: bool) -> Table:
    return data.to_iterable_dataset() if streaming else data


def _class_folders(part: SourcePart, folder: Path) -> datasets.Dataset:
    import datasets

    rows = [{part.image: str(folder / row["image"]), part.answers: row["label"]} for row in read_class_folders(folder)]
    features = datasets.Features({part.image: datasets.Image(), part.answers: datasets.Value("string")})
    return datasets.Dataset.from_list(rows, features=features)


# Columns


#: Kind of a column -> how an error names it.
COLUMN_KINDS = {
    "text": "text",
    "number": "whole numbers",
    "key": "text or whole numbers",
    "texts": "lists of texts",
    "answers": "lists of {answer: text, …}",
    "class": "a ClassLabel, or class names",
    "image": "images",
    "images": "lists of images",
}


def check_features(
    features: Mapping[str, Any],
    columns: Mapping[str, str],
    *,
    needed: Collection[str],
    where: str,
    open_ended: bool = False,
) -> None:
    """Refuse a table whose columns are not those expected; log what is new or changed but not read.

    Args:
        features: name -> feature, as a Dataset has them.
        columns: name -> kind, one of `COLUMN_KINDS`, of every column that is known.
        needed: the columns that are read.
        where: the data set, for messages.
        open_ended: the table is known to hold further columns, which are not worth a word.

    Raises:
        ColumnError: needed columns are missing or of another type; all of them are named.
    """
    faults = {}
    for name, kind in columns.items():
        got = f"got {_brief_feature(features[name])}" if name in features else "there is none"
        if name not in features or not _fits(kind, features[name]):
            faults[name] = f"{name!r}: expected {COLUMN_KINDS[kind]}, {got}"
    unknown = [] if open_ended else [name for name in features if name not in columns]
    new = f"; new here: {', '.join(map(repr, unknown))}" if unknown else ""
    wrong = [fault for name, fault in faults.items() if name in needed]
    if wrong:
        raise ColumnError(
            f"{where}: {len(wrong)} of its columns are not as known: {'; '.join(wrong)}{new}. The data set may have "
            "changed: pass revision= with an older commit, or data_dir= with a copy in the layout known"
        )
    if faults or unknown:
        logger.warning("%s: columns that are not read differ: %s%s", where, "; ".join(faults.values()) or "none", new)


def _fits(kind: str, feature: Any) -> bool:
    import datasets

    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    if kind == "images":
        return inner is not None and _fits("image", inner)
    if kind == "image":
        is_struct = isinstance(feature, dict) and "bytes" in feature and feature.keys() <= {"bytes", "path"}
        return isinstance(feature, datasets.Image) or is_struct or _dtype(feature) in ("binary", "large_binary")
    if kind == "texts":
        return inner is not None and _is_text(inner)
    if kind == "answers":
        return isinstance(inner, dict) and _is_text(inner.get("answer"))
    if kind == "class":
        return isinstance(feature, datasets.ClassLabel) or _is_text(feature)
    whole = not isinstance(feature, datasets.ClassLabel) and "int" in _dtype(feature)
    return (kind != "number" and _is_text(feature)) or (kind != "text" and whole)


def _is_text(feature: Any) -> bool:
    return _dtype(feature) in ("string", "large_string")


def _dtype(feature: Any) -> str:
    dtype = getattr(feature, "dtype", None)
    return dtype if isinstance(dtype, str) else ""


def _brief_feature(feature: Any) -> str:
    shown = getattr(feature, "dtype", None) if type(feature).__name__ == "Value" else None
    shown = shown or str(feature)
    return f"{shown[:77]}..." if len(shown) > 80 else shown


def _features(data: Table) -> Mapping[str, Any]:
    if data.features is None:  # a stream that nobody has looked into yet
        data = data._resolve_features()
    return data.features


def _undecoded(data: Table, part: SourcePart) -> Table:
    """Images as the bytes of their files."""
    import datasets

    kind = datasets.Image(decode=False)
    if part.columns[part.image] != "images":
        return data.cast_column(part.image, kind)
    if isinstance(data, datasets.Dataset):
        data = data.to_iterable_dataset()  # whose casts are lazy: a Dataset would write its lists anew, all of them
    return data.cast_column(part.image, datasets.List(kind))


# Rows


def _read(
    part: SourcePart, data: Table, read: Callable[[Mapping[str, Any]], dict[str, Any]], limit: int | None, where: str
) -> tuple[list[dict[str, Any]], datasets.Dataset | None, list[int]]:
    """Texts of the rows used; their undecoded images, or None where the rows hold them; their numbers."""
    import datasets

    single = part.columns[part.image] != "images"
    stays = isinstance(data, datasets.Dataset) and single and part.share == (0.0, 1.0)
    numbers: list[int] = []
    texts: list[dict[str, Any]] = []
    places: dict[Any, int] = {}
    for number, values in enumerate(NamedClasses(data.remove_columns(part.image) if stays else data)):
        if not _is_used(part, values):
            continue
        place = places.get(values[part.group]) if part.merge and part.group else None
        if place is not None:
            texts[place]["references"] += read(values)["references"]
            continue
        if limit is not None and len(texts) == limit:
            if part.merge and stays:
                continue  # further captions of the images taken may stand anywhere
            break
        row = {"id": _id(part, values, number), **read(values)}
        if part.group:
            row["group"] = None if values[part.group] is None else str(values[part.group])
            places[values[part.group]] = len(texts)
        if not stays:
            row["image"] = _picture(values[part.image], single)
        numbers.append(number)
        texts.append(row)
    if not texts:
        raise EmptySupportError(f"{where}: expected at least one row that is used, found none; {_filters(part)}")
    if not stays:
        return texts, None, numbers
    images = data.select_columns([part.image]).select(numbers)
    if part.image != "image":
        images = images.rename_column(part.image, "image")
    return texts, images, numbers


def _is_used(part: SourcePart, values: Mapping[str, Any]) -> bool:
    if part.split_column and values[part.split_column] != part.split:
        return False
    if part.prefix and not str(values[part.prefix[0]]).startswith(part.prefix[1]):
        return False
    if part.among and values[part.among[0]] not in part.among[1]:
        return False
    return part.share == (0.0, 1.0) or part.share[0] <= _place(values[part.image]) < part.share[1]


def _filters(part: SourcePart) -> str:
    """What `_is_used` asks for, for the error of a table in which no row is used."""
    asked = [f"{part.split_column!r} is {part.split!r}"] if part.split_column else []
    asked += [f"{part.prefix[0]!r} begins with {part.prefix[1]!r}"] if part.prefix else []
    asked += [f"{part.among[0]!r} is one of {part.among[1]}"] if part.among else []
    asked += ["the picture falls to this side"] if part.share != (0.0, 1.0) else []
    return f"rows are used where {' and '.join(asked)}" if asked else "the files hold no row"


def _place(image: Any) -> float:
    """Where a picture stands between 0 and 1, by its file's bytes: the same for all its rows, in any order."""
    source = _picture(image, not isinstance(image, list)) or {}
    content = source.get("bytes") or str(source.get("path")).encode()
    return int(content_key(hashlib.sha256(content).hexdigest())[:8], 16) / 16**8


def _picture(image: Any, single: bool) -> Any:
    """The image, out of its list where it comes in one; None where there is not exactly one."""
    if single:
        return image
    return image[0] if image is not None and len(image) == 1 else None


def _id(part: SourcePart, values: Mapping[str, Any], number: int) -> str | None:
    if part.id is None:
        return f"{part.id_prefix}{part.split}-{number}"
    return None if values[part.id] is None else f"{part.id_prefix}{values[part.id]}"


def _gold(part: SourcePart, values: Mapping[str, Any]) -> list[str]:
    """All gold answers; empty ones, which can match nothing, are left out."""
    found = values[part.answers]
    texts = (
        [one["answer"] if isinstance(one, Mapping) else one for one in found] if isinstance(found, list) else [found]
    )
    return [text for text in texts if isinstance(text, str) and text.strip()]


def _ask(part: SourcePart, prompt: str, values: Mapping[str, Any]) -> str:
    if "{question}" not in prompt:
        return prompt
    question = values[part.question] if part.question else None
    if not isinstance(question, str):
        return ""  # the row check refuses a row that neither asks nor shows anything
    return prompt.replace("{question}", question)


def _read_question(part: SourcePart, prompt: str, values: Mapping[str, Any]) -> dict[str, Any]:
    answers = _gold(part, values)
    response = values[part.response] if part.response else None
    return {"prompt": _ask(part, prompt, values), "response": response or majority(answers), "references": answers}


def _read_caption(part: SourcePart, prompt: str, values: Mapping[str, Any]) -> dict[str, Any]:
    captions = _gold(part, values)
    return {
        "prompt": _ask(part, prompt, values),
        "response": captions[0] if captions else None,
        "references": captions,
    }


def _read_class(part: SourcePart, prompt: str, values: Mapping[str, Any]) -> dict[str, Any]:
    if part.choices:
        return _read_choice(part, prompt, values)
    name = values[part.answers]
    # "001.Black_footed_Albatross" and "apple_pie", as words that an LVLM would say
    words = None if name is None else re.sub(r"^\d+\.", "", name).replace("_", " ").strip()
    return {"prompt": _ask(part, prompt, values), "response": words, "label": words}


def _read_choice(part: SourcePart, prompt: str, values: Mapping[str, Any]) -> dict[str, Any]:
    options = [values[name] for name in part.choices if values[name]]
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    answer = values[part.answers]
    letter = answer.strip().upper() if isinstance(answer, str) else None
    letter = letter if letter in list(LETTERS[: len(options)]) else None
    return {"prompt": "\n".join([_ask(part, prompt, values), *lines]), "response": letter, "label": letter}


_READERS = {"vqa": _read_question, "captioning": _read_caption, "classification": _read_class}
