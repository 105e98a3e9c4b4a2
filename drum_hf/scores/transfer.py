"""Scores from one store to another, by a parquet file or the Hub.

A row carries all that its key is computed from, so a reader can recompute the key and need not trust the writer; the
file's metadata describes the LVLMs, so that scores of another model or template are told apart by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import NonFiniteScoreError, SavedFileError
from ..lvlm.fingerprint import differences
from ..types import LVLM
from ..utils import hub as _hub
from ..utils.files import check_size, plain_schema, read_batches, refuse_special, replacing_file
from ..utils.manifest import write_manifest
from ..utils.optional import bar_options, public_name
from ..utils.text import shown, well_formed
from .card import render_scores_card
from .store import Entry, Merged, RequestParts, ScoreStore

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from tqdm import tqdm

__all__ = ["SCORES", "Exported", "export_scores", "import_scores", "public_identity", "pull_scores", "push_scores"]

_FORMAT_VERSION = 1
#: The file in the repository.
SCORES = "scores.parquet"
#: Longest metadata that is read (bytes); ours take hundreds for each LVLM.
_LONGEST_ABOUT = 1 << 20
#: Most demonstrations, responses or choices of a row, and longest text (characters); our choice, far above what fits
#: an LVLM's context.
_MOST, _LONGEST = 10_000, 1_000_000
#: Where the file's metadata says what it is.
_ABOUT = b"drum_hf"


@dataclasses.dataclass(frozen=True)
class Exported:
    """What `export_scores` wrote.

    Attributes:
        scores, texts: rows written.
        left_out: entries that were not, since the store does not know what they are made of (they were written before
            it kept that, or without) or their texts can't be written as UTF-8.
        bytes: of the file.
    """

    scores: int
    texts: int
    left_out: int
    bytes: int


def export_scores(
    store: ScoreStore,
    path: str | os.PathLike[str],
    *,
    fingerprints: Collection[str] | None = None,
    rows_per_group: int = 20_000,
    progress: bool = False,
) -> Exported:
    """Write a store's scores and generations to a parquet file, a row group at a time.

    Columns: `kind` ("score" or "generate"), `key` (32 hex digits), `score` (log-likelihood), `text`, `fingerprint`,
    `query_key`, `demonstration_keys` (in the order shown), `responses`, `weights`, `choices`, `max_new_tokens`.

    Args:
        path: the file; it is replaced once the new one is whole.
        fingerprints: only these LVLMs' entries.
        rows_per_group: rows held in memory at a time, and written by an import in one transaction. Our choice.

    Raises:
        ValueError: rows_per_group is below 1, or the store has nothing of one of the fingerprints.
        SavedFileError: the store can't be read, or the file can't be written.
    """
    import pyarrow.parquet as pq

    if rows_per_group < 1:
        raise ValueError(f"expected rows_per_group of at least 1, got {rows_per_group}")
    path = Path(path)
    pages = store.entries(fingerprints=fingerprints, page_size=rows_per_group)
    identities = store.identities()
    # Exports are published: of an LVLM in a folder of this machine, they have the last name.
    chosen = {
        name: public_identity(identities[name]) for name in (identities if fingerprints is None else fingerprints)
    }
    about = {"kind": "scores", "format_version": _FORMAT_VERSION, "drum_hf": _version(), "fingerprints": chosen}
    counts = {"score": 0, "generate": 0}
    left_out = 0
    schema = _schema().with_metadata({_ABOUT: json.dumps(about).encode()})
    with (
        replacing_file(path) as part,
        pq.ParquetWriter(part, schema, compression="zstd") as writer,
        _bar("exporting", None, progress) as bar,
    ):
        for page in pages:
            rows = [row for entry in page if (row := _row(entry)) is not None]
            left_out += len(page) - len(rows)
            counts[page[0].kind] += len(rows)
            if rows:
                writer.write_table(_table(rows, schema), row_group_size=rows_per_group)
            bar.update(len(page))
    return Exported(counts["score"], counts["generate"], left_out, path.stat().st_size)


def public_identity(identity: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What of an LVLM's named parts may be published: of a folder of this machine the last name alone."""
    if identity is None:
        return None
    name = identity.get("name")
    return {**identity, "name": public_name(name)} if isinstance(name, str) else dict(identity)


def import_scores(
    path: str | os.PathLike[str],
    store: ScoreStore,
    *,
    lvlm: LVLM | None = None,
    any_lvlm: bool = False,
    progress: bool = False,
) -> Merged:
    """Take the scores and generations of an exported file into a store.

    The whole file is checked before anything is written: every key is computed anew from its parts. Then each row
    group is one transaction, so an import that was stopped is completed by repeating it. A key that is there already
    keeps its value.

    Args:
        path: what `export_scores` wrote.
        lvlm: the LVLM that the scores must come from. None: one of those that the store has scores of; an empty store
            takes any.
        any_lvlm: take the scores of any LVLM; they answer for that one only.

    Returns:
        counts of entries new to the store, known before, and conflicts: known with a score that differs by more than
        1e-3, or with another text.

    Raises:
        SavedFileError: the file is not an export, damaged, altered, of a later format version, or from another LVLM
            (the message says in what they differ).
        NonFiniteScoreError: a score is NaN or infinite.
    """
    with _opened(path) as (file, identities), _bar("checking", 2 * file.metadata.num_rows, progress) as bar:
        used: dict[str, None] = {}
        for group in _groups(path, file):
            used.update(dict.fromkeys(entry.fingerprint for entry in group))
            bar.update(len(group))
        identities = {name: identities.get(name) for name in used}
        if not any_lvlm:
            known = store.identities() if lvlm is None else {lvlm.fingerprint: getattr(lvlm, "identity", None)}
            _refuse_strangers(path, identities, known, "the LVLM given" if lvlm is not None else str(store.path))
        bar.set_description("importing", refresh=False)
        merged = Merged()
        for group in _groups(path, file):
            merged += store.merge(group, identities)
            bar.update(len(group))
    return merged


def _bar(title: str, total: int | None, shown: bool) -> tqdm:
    from tqdm.auto import tqdm

    # delay in seconds: short work needs no bar
    return tqdm(desc=title, total=total, unit="row", delay=1, **bar_options(shown))


# ---- writing ----


def _schema() -> pa.Schema:
    import pyarrow as pa

    text = pa.string()
    texts = pa.list_(text)
    columns = {
        "kind": text,
        "key": text,
        "score": pa.float64(),
        "text": text,
        "fingerprint": text,
        "query_key": text,
        "demonstration_keys": texts,
        "responses": texts,
        "weights": pa.list_(pa.float64()),
        "choices": texts,
        "max_new_tokens": pa.int32(),
    }
    return pa.schema(columns.items())


def _row(entry: Entry) -> tuple[Any, ...] | None:
    """An entry as a row, or None where it can't be one."""
    parts = entry.parts
    if parts is None:
        return None
    texts = (entry.fingerprint, parts.query, *parts.demonstrations, *parts.responses, *parts.choices)
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return None
    value = (entry.value, None) if entry.kind == "score" else (None, entry.value)
    return (entry.kind, entry.key.hex(), *value, entry.fingerprint, *parts)


def _table(rows: list[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    arrays = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("drum-hf")
    except PackageNotFoundError:
        return "unknown"


# ---- reading ----


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[pq.ParquetFile, dict[str, dict[str, Any] | None]]]:
    """The file, and what it says of the LVLMs by fingerprint."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with contextlib.ExitStack() as stack:
        try:
            refuse_special(path)
            file = stack.enter_context(pq.ParquetFile(os.fspath(path)))
            check_size(path, file)
            written = (file.schema_arrow.metadata or {})[_ABOUT]
            if len(written) > _LONGEST_ABOUT:
                raise ValueError(f"its metadata has {len(written):,} bytes")
            about = json.loads(written)
            kind, version, identities = (about[name] for name in ("kind", "format_version", "fingerprints"))
        except (OSError, pa.ArrowException, KeyError, ValueError, TypeError, RecursionError) as error:
            raise SavedFileError(
                f"{path}: expected what `drum-hf scores export` wrote; reading it failed: {shown(error)}; "
                "export it again"
            ) from error
        if kind != "scores" or version != _FORMAT_VERSION:
            raise SavedFileError(
                f"{path}: expected scores of format version {_FORMAT_VERSION}, got {shown(kind)} of version "
                f"{shown(version)}; update drum-hf, or export it again"
            )
        for identity in identities.values() if isinstance(identities, dict) else [identities]:
            if not (isinstance(identity, dict) or (identity is None and isinstance(identities, dict))):
                raise SavedFileError(f"{path}: its metadata does not describe its LVLMs by name; export it again")
        yield file, identities


def _groups(path: str | os.PathLike[str], file: pq.ParquetFile) -> Iterator[list[Entry]]:
    """Entries of each row group, every one checked."""
    import pyarrow as pa

    schema = _schema()
    for number in range(file.num_row_groups):
        try:
            batches = read_batches(path, file, group=number)
            table = pa.Table.from_batches(batches, schema=plain_schema(file.schema_arrow))
            if table.column_names != schema.names:
                raise ValueError(f"expected the columns {schema.names}, got {table.column_names}")
            table.validate(full=True)
            columns = table.cast(schema).to_pydict()
        except (OSError, pa.ArrowException, ValueError) as error:
            raise SavedFileError(
                f"{path}: row group {number} can't be read: {shown(error)}; export it again"
            ) from error
        yield [_entry(path, number, i, *row) for i, row in enumerate(zip(*columns.values(), strict=True))]


def _entry(
    path: str | os.PathLike[str],
    group: int,
    row: int,
    kind: Any,
    key: Any,
    score: Any,
    text: Any,
    fingerprint: Any,
    query: Any,
    demonstrations: Any,
    responses: Any,
    weights: Any,
    choices: Any,
    max_new_tokens: Any,
) -> Entry:
    def refuse(reason: str) -> SavedFileError:
        return SavedFileError(
            f"{path}: row {row} of row group {group} {reason}; nothing of this file was imported. Export it again "
            "from the store that it came from"
        )

    lists = (demonstrations, responses, weights, choices)
    if None in (kind, key, fingerprint, query, *lists) or any(each is None for some in lists for each in some):
        raise refuse("lacks a part of its key")
    texts = (fingerprint, query, text or "", *demonstrations, *responses, *choices)
    if any(len(some) > _MOST for some in lists) or any(len(each) > _LONGEST for each in texts):
        raise refuse(f"has more than {_MOST:,} items in a list, or a text of more than {_LONGEST:,} characters")
    value, other = (score, text) if kind == "score" else (text, score)
    if kind not in ("score", "generate") or (kind == "generate") != (max_new_tokens is not None) or value is None:
        raise refuse(f"is of kind {shown(repr(kind))} and has not what belongs to it")
    if other is not None:
        raise refuse("has both a score and a text")
    if kind == "score" and not math.isfinite(score):
        raise NonFiniteScoreError(
            f"{path}: expected finite scores, row {row} of row group {group} has {score}; nothing of this file was "
            "imported. Export it again from the store that it came from"
        )
    parts = RequestParts(
        query, tuple(demonstrations), tuple(responses), tuple(weights), tuple(choices), max_new_tokens
    )
    computed = parts.key(fingerprint)
    if computed.hex() != key:
        raise refuse(f"has the key {shown(key)}, but its parts give {computed.hex()}: one of them was altered")
    return Entry(kind, computed, well_formed(value) if kind == "generate" else value, fingerprint, parts)


def _refuse_strangers(
    path: str | os.PathLike[str],
    there: Mapping[str, Mapping[str, Any] | None],
    here: Mapping[str, Mapping[str, Any] | None],
    whose: str,
) -> None:
    """Raise where the file has scores of an LVLM that is not here, and say in what it differs from the nearest."""
    strangers = [name for name in there if name not in here]
    if not strangers or not here:
        return
    name = strangers[0]
    theirs = there[name]
    told = [differences(ours, theirs) for ours in here.values() if ours is not None and theirs is not None]
    if told:
        nearest = min(told, key=len)
        reason = "; ".join(nearest) or f"their named parts are the same, but its fingerprint is {shown(name)}"
    else:
        reason = (
            f"fingerprint {shown(next(iter(here)))} here, {shown(name)} there; what they are made of was not recorded"
        )
    raise SavedFileError(
        f"{path}: expected scores of {whose}, got scores of another LVLM: {reason}. To take them all the same, for "
        "that LVLM alone, import with any_lvlm=True (--any-lvlm); to leave them out, export with --fingerprint"
    )


# ---- the Hub ----


def push_scores(
    store: ScoreStore,
    repo_id: str,
    *,
    fingerprints: Collection[str] | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    progress: bool = False,
) -> tuple[str, Exported]:
    """Upload a store's scores and generations to a data set repository, in place of earlier ones there.

    The file holds responses and generations as text, but no prompt and no picture: of these, hashes. It carries what
    each key is made of, and what the LVLMs are.

    Args:
        repo_id: "name" or "owner/name"; made where it is missing.
        fingerprints: only these LVLMs' entries.
        private, token, commit_message, revision, create_pr: as in `DemoRetriever.push_to_hub`.

    Returns:
        The address of the commit or pull request, and what was written.

    Raises:
        ValueError: the store has nothing of one of the fingerprints.
        HubError: the Hub refused; the message says what to do.
    """
    repo_id = _hub.make_repository(repo_id, private=private, token=token, repo_type="dataset")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        done = export_scores(store, folder / SCORES, fingerprints=fingerprints, progress=progress)
        identities = store.identities()
        lvlms: list[dict[str, Any]] = [
            {"fingerprint": name, **(public_identity(identities[name]) or {})}
            for name in (identities if fingerprints is None else fingerprints)
        ]
        card = render_scores_card({"repo_id": repo_id, "scores": done.scores, "texts": done.texts, "lvlms": lvlms})
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_manifest(folder, settings={"fingerprints": [each["fingerprint"] for each in lvlms]})
        url = _hub.commit_folder(
            repo_id,
            folder,
            message=commit_message or "Upload LVLM scores",
            token=token,
            revision=revision,
            create_pr=create_pr,
            repo_type="dataset",
        )
    return url, done


def pull_scores(
    repo_id: str,
    store: ScoreStore,
    *,
    lvlm: LVLM | None = None,
    any_lvlm: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    progress: bool = False,
) -> Merged:
    """Take the scores and generations of a data set repository into a store, checked as `import_scores` checks them.

    Args:
        repo_id: what `push_scores` wrote to.
        lvlm, any_lvlm: as in `import_scores`.
        revision, token, cache_dir, local_files_only, force_download: as in `DemoRetriever.from_pretrained`.

    Raises:
        HubError: it can't be fetched; the message says what to do.
        SavedFileError: it has no scores, or they are damaged, altered or of another LVLM (the message says in what
            they differ).
    """
    folder = _hub.fetch_snapshot(
        repo_id,
        patterns=[SCORES],
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        force_download=force_download,
        repo_type="dataset",
    )
    return import_scores(folder / SCORES, store, lvlm=lvlm, any_lvlm=any_lvlm, progress=progress)
