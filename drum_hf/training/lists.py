"""A query's list, drawn from its candidates, and the batch of tensors that lists make."""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from ..data import TripletTable
from .mining import CandidateTable

__all__ = ["ListCollator", "Preprocessed", "SampledLists"]


class Preprocessed:
    """The encoder's input tensors of rows seen lately: a list-wise step meets the same rows every few steps."""

    def __init__(self, encoder: SentenceTransformer, limit: int = 512 * 2**20) -> None:
        self.encoder, self.limit, self.bytes = encoder, limit, 0
        self.rows: OrderedDict[tuple[str, str], dict[str, torch.Tensor]] = OrderedDict()

    def __call__(
        self, side: str, ids: Sequence[str], item: Callable[[str], dict[str, Any]]
    ) -> dict[str, torch.Tensor]:
        """Stacked tensors of these rows; `item` makes the encoder's input of a row that is not at hand."""
        new = [i for i in ids if (side, i) not in self.rows]
        made: dict[str, dict[str, torch.Tensor]] = {}
        if new:
            tensors = self.encoder.preprocess([item(i) for i in new])
            for row, i in enumerate(new):
                made[i] = {name: tensor[row] for name, tensor in tensors.items()}
        rows = [made[i] if i in made else self.rows[side, i] for i in ids]
        for i in ids:
            if i in made:
                # a copy: a view would keep the whole batch it was cut from
                self.rows[side, i] = {name: tensor.clone() for name, tensor in made[i].items()}
                self.bytes += sum(tensor.nbytes for tensor in made.pop(i).values())
            self.rows.move_to_end((side, i))
        while self.bytes > self.limit:
            _, dropped = self.rows.popitem(last=False)
            self.bytes -= sum(tensor.nbytes for tensor in dropped.values())
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class SampledLists:
    """The transform of the training rows: ids of queries -> the candidates drawn for each now, and their scores.

    `datasets` hashes a transform by pickling it, which here would be the whole candidate table. So a random name
    stands for it, since what is drawn changes from round to round.

    Args:
        table: the queries' candidates; may be replaced.
        seed: a list is a function of (seed, epoch, query), so resuming draws what the uninterrupted run would have.
        size: candidates of a list.
        settings: of `CandidateTable.sample`.

    Attributes:
        epoch: of the training; set it when one begins.
    """

    def __init__(self, table: CandidateTable, *, seed: int, size: int, **settings: Any) -> None:
        self.table, self.seed, self.size, self.settings = table, seed, size, settings
        self.epoch = 0
        self._rows = {query_id: row for row, query_id in enumerate(table.query_ids)}
        self._name = uuid.uuid4().hex

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        """Columns `query`, `candidates` and `scores` of the list, and `known`, the worth of every scored candidate."""
        lists: dict[str, list[Any]] = {"query": [], "candidates": [], "scores": [], "known": []}
        for query_id in batch["query"]:
            rng = np.random.default_rng([self.seed, self.epoch, self._rows[query_id]])
            ids, scores = self.table.sample(query_id, self.size, rng, **self.settings)
            row = (query_id, ids, scores, self.table.candidates(query_id))
            for column, value in zip(lists.values(), row, strict=True):
                column.append(value)
        return lists

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self._name}

    def __deepcopy__(self, memo: dict[int, Any]) -> SampledLists:
        return self  # a copied data set still shows these lists


class ListCollator:
    """Collator: sampled lists -> a batch of queries, one of *different* demonstrations, and what is known of them.

    Args:
        encoder: preprocesses both sides.
        queries, support: the training queries, and the demonstrations.
        drafts: query id -> draft; may be filled in later.
        stored: gives the demonstrations' vectors by id, where they do not change while the encoder is trained; None:
            the encoder embeds them in each step.
        shared: add what other processes must know to join this batch with theirs.
    """

    valid_label_columns: tuple[str, ...] = ()

    def __init__(
        self,
        encoder: SentenceTransformer,
        queries: TripletTable,
        support: TripletTable,
        *,
        drafts: Mapping[str, str],
        stored: Callable[[Sequence[str]], np.ndarray] | None = None,
        shared: bool = False,
    ) -> None:
        self.queries, self.support, self.drafts = queries, support, drafts
        self.stored, self.shared = stored, shared
        self.preprocessed = Preprocessed(encoder)
        self._image_numbers = {
            "query": [_number(key) for key in queries.image_keys],
            "demonstrations": [_number(key) for key in support.image_keys],
        }
        #: a group's number is its last row in the support set
        self._group_numbers: dict[str | None, int] = {
            None: -1, **{group: row for row, group in enumerate(support.groups) if group is not None}
        }  # fmt: skip

    def _query_item(self, query_id: str) -> dict[str, Any]:
        query = self.queries.query(query_id, draft=self.drafts.get(query_id))
        return {"image": query.image, "text": [query.prompt, query.draft]}

    def _demonstration_item(self, demonstration_id: str) -> dict[str, Any]:
        row = self.support[demonstration_id]
        return {"image": row.image, "text": [row.prompt, row.response]}

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        queries, support = self.queries, self.support
        column: dict[str, int] = {}
        for row in rows:
            for candidate in row["candidates"]:
                column.setdefault(candidate, len(column))
        listed = bool(column)
        if not listed:
            # Nothing to rank, so nothing to learn; but a step needs embeddings, and under DDP a gradient, if only 0.
            column[support.ids[0]] = 0
        size = max(1, *(len(row["candidates"]) for row in rows))
        shape = (len(rows), size)
        index, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
        scores = torch.zeros(shape)
        known = torch.full((len(rows), len(column)), torch.nan)
        blocked = torch.zeros(len(rows), len(column), dtype=torch.bool)
        groups = [support.groups[support.row(c)] for c in column]
        for i, row in enumerate(rows):
            length = len(row["candidates"])
            index[i, :length] = torch.tensor([column[c] for c in row["candidates"]], dtype=torch.long)
            scores[i, :length] = torch.tensor(row["scores"], dtype=torch.float)
            mask[i, :length] = True
            for candidate, score in row["known"].items():
                if candidate in column:
                    known[i, column[candidate]] = score
            own = queries.groups[queries.row(row["query"])]
            blocked[i] = torch.tensor(
                [c == row["query"] or (g is not None and g == own) for c, g in zip(column, groups, strict=True)]
            )
        features = {"query": self.preprocessed("query", [row["query"] for row in rows], self._query_item)}
        shown = {"query": [queries.row(row["query"]) for row in rows]}
        vectors: dict[str, dict[str, torch.Tensor]] = {}
        if self.stored is None:
            features["demonstrations"] = self.preprocessed("demonstration", list(column), self._demonstration_item)
            shown["demonstrations"] = [support.row(candidate) for candidate in column]
        else:
            vectors["demonstrations"] = {"sentence_embedding": torch.from_numpy(self.stored(list(column)))}
        for side, places in shown.items():
            numbers = self._image_numbers[side]
            features[side]["image_key"] = torch.tensor([numbers[row] for row in places])
        batch: dict[str, Any] = {
            f"{name}_{key}": value for name, part in (features | vectors).items() for key, value in part.items()
        }
        batch["label"] = {"index": index, "scores": scores, "mask": mask, "known": known, "blocked": blocked}
        if self.shared:
            batch["label"]["origins"] = self._origins(rows, list(column), filler=not listed)
        return batch

    def _origins(self, rows: list[dict[str, Any]], column: list[str], *, filler: bool) -> dict[str, torch.Tensor]:
        """`Origins` of a batch: a demonstration's number is its row in the support set."""
        support, queries, numbers = self.support, self.queries, self._group_numbers
        shape = (len(rows), max(len(row["known"]) for row in rows))
        scored, known = torch.full(shape, -1), torch.full(shape, torch.nan)
        for i, row in enumerate(rows):
            pool = row["known"]
            scored[i, : len(pool)] = torch.tensor([support.row(c) for c in pool], dtype=torch.long)
            known[i, : len(pool)] = torch.tensor(list(pool.values()), dtype=torch.float)
        asked = [row["query"] for row in rows]
        long = {
            "rows": [-1 if filler else support.row(c) for c in column],
            "groups": [numbers[support.groups[support.row(c)]] for c in column],
            "own": [support.row(query_id) if query_id in support else -1 for query_id in asked],
            "own_groups": [numbers.get(queries.groups[queries.row(query_id)], -1) for query_id in asked],
        }
        tensors = {name: torch.tensor(values, dtype=torch.long) for name, values in long.items()}
        return {**tensors, "scored": scored, "known": known}


def _number(image_key: str) -> int:
    """An image's key as an int64, by which a step knows pictures that it need not encode twice."""
    return int(image_key[:15], 16) if image_key else 0
