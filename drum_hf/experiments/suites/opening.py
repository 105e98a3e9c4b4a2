"""From names in a suite file to tables and models."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from ...data import TripletTable, check_leaks, load_table, load_triplets
from ...errors import EmptySupportError, SuiteError
from ...types import LVLM
from ...utils.optional import resolve_name
from ..demo import split_table
from .spec import DataSpec, LVLMSpec

__all__ = ["MakeWorld", "encoder_key", "open_data", "open_lvlm"]

logger = logging.getLogger(__name__)


class WorldTables(Protocol):
    """A seeded task: rows to demonstrate with, and rows to be asked."""

    @property
    def support(self) -> TripletTable: ...

    @property
    def queries(self) -> TripletTable: ...


#: (seed, task=, difficulty=) -> a world, such as `drum_hf.playground.make_world`.
MakeWorld = Callable[..., WorldTables]


def open_data(data: DataSpec, seed: int, make_world: MakeWorld | None = None) -> tuple[TripletTable, TripletTable]:
    """Support set and queries of a data set.

    Public data sets have the same picture on both sides here and there: such queries are left out, and counted in the
    log. In a world or a table of one's own they are a fault, which the evaluator reports.

    Raises:
        EmptySupportError: no query is left.
        SavedFileError, ColumnError, RowError, ImageError: the files can't be used.
    """
    if data.world:
        if make_world is None:
            raise SuiteError(f"data {data.name!r} is a world: pass make_world=drum_hf.playground.make_world")
        world = make_world(seed, task=data.task, difficulty=data.world)
        return _first(world.support, data.support_rows), _first(world.queries, data.query_rows)
    if data.table:
        table = load_table(data.table)
        sides = (table, load_table(data.queries)) if data.queries else split_table(table, seed=seed)
        return _first(sides[0], data.support_rows), _first(sides[1], data.query_rows)
    assert data.source is not None
    support, queries = (
        load_triplets(
            data.source,
            split=split,
            data_dir=data.data_dir,
            streaming=data.streaming,
            limit=rows if data.streaming else None,
            prompt=data.prompt,
            on_bad_rows="skip",
        )
        for split, rows in (("support", data.support_rows), ("query", data.query_rows))
    )
    if not data.streaming:  # files may be sorted by class
        support, queries = _drawn(support, data.support_rows), _drawn(queries, data.query_rows)
    given_away = {query_id for query_id, _ in check_leaks(support, queries, on_leak="ignore")}
    if given_away:
        logger.warning(
            "%s: %d of %d queries share a picture with the support set and are left out",
            data.name, len(given_away), len(queries),
        )  # fmt: skip
        if len(given_away) == len(queries):
            raise EmptySupportError(f"{data.name}: every query shares a picture with the support set; check data_dir")
        queries = queries.without(sorted(given_away))
    return support, queries


def _first(table: TripletTable, rows: int | None) -> TripletTable:
    return table if rows is None or rows >= len(table) else table.select(table.ids[:rows])


def _drawn(table: TripletTable, rows: int | None) -> TripletTable:
    """So many rows, drawn at random but always the same, in the table's order."""
    if rows is None or rows >= len(table):
        return table
    chosen = np.sort(np.random.default_rng(0).permutation(len(table))[:rows])
    return table.select([table.ids[i] for i in chosen])


def open_lvlm(spec: LVLMSpec) -> LVLM:
    """The LVLM, loaded or connected to.

    Raises:
        SuiteError: an endpoint's key is not in its environment variable.
    """
    if spec.endpoint is None:
        from ...lvlm.local.model import TransformersLVLM

        return TransformersLVLM.from_pretrained(
            spec.model,
            revision=spec.revision,
            dtype=spec.dtype,
            device=spec.device,
            batch_size=spec.batch_size,
            max_batch_tokens=spec.max_batch_tokens,
            image_cache_dir=spec.image_cache_dir,
        )
    from ...lvlm.endpoint.model import OpenAILVLM

    key = os.environ.get(spec.api_key_env) if spec.api_key_env else None
    if spec.api_key_env and key is None:
        raise SuiteError(f"expected the key of {spec.name} in the environment variable {spec.api_key_env}; set it")
    return OpenAILVLM(
        spec.model,
        base_url=spec.endpoint,
        api_key=key,
        revision=spec.revision,
        max_concurrency=spec.concurrency,
        max_requests=spec.max_requests,
    )


def encoder_key(name: str) -> str:
    """What identifies an encoder: its name on the Hub, or a hash of its weights where it lies on this machine."""
    folder = Path(resolve_name(name))
    if not folder.is_dir():
        return name
    content = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.json")):
        content.update(path.name.encode())
        with path.open("rb") as file:
            content.update(hashlib.file_digest(file, "sha256").digest())
    return content.hexdigest()
