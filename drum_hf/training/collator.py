"""From sampled lists to a batch: queries, the *different* demonstrations of their lists, and what is known of both."""

from __future__ import annotations

import functools
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

if TYPE_CHECKING:
    from .trainer import DrumTrainer

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

    `datasets` hashes a transform by pickling it, which here would be the trainer with encoder, LVLM and store. So a
    name stands for it, no other's, since what is drawn changes from round to round.
    """

    def __init__(self, trainer: DrumTrainer) -> None:
        self.trainer = trainer
        self.name = uuid.uuid4().hex

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        trainer, args = self.trainer, self.trainer.args
        lists: dict[str, list[Any]] = {"query": [], "candidates": [], "scores": []}
        seed = args.seed if args.data_seed is None else args.data_seed
        for query_id in batch["query"]:
            # a list is a function of (seed, epoch, query): resuming draws what the uninterrupted run would have
            rng = np.random.default_rng([seed, trainer.epoch, trainer.queries.row(query_id)])
            ids, scores = trainer.table.sample(
                query_id,
                args.list_size,
                rng,
                sampling=args.objective,
                ends=args.pool_ends,
                hard=args.hard_candidates,
            )
            lists["query"].append(query_id)
            lists["candidates"].append(ids)
            lists["scores"].append(scores)
        return lists

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name}

    def __deepcopy__(self, memo: dict[int, Any]) -> SampledLists:
        return self  # a copied data set still shows this trainer's lists


class ListCollator:
    """Collator: sampled lists -> a batch of queries, one of *different* demonstrations, and what is known of them."""

    valid_label_columns: tuple[str, ...] = ()

    def __init__(self, trainer: DrumTrainer) -> None:
        self.trainer = trainer
        self.preprocessed = Preprocessed(trainer.retriever.encoder)
        self._image_numbers = {
            "query": [_number(key) for key in trainer.queries.image_keys],
            "demonstrations": [_number(key) for key in trainer.retriever.support.image_keys],
        }

    def _query_item(self, query_id: str) -> dict[str, Any]:
        query = self.trainer.query(query_id)
        return {"image": query.image, "text": [query.prompt, query.draft]}

    def _demonstration_item(self, demonstration_id: str) -> dict[str, Any]:
        row = self.trainer.retriever.support[demonstration_id]
        return {"image": row.image, "text": [row.prompt, row.response]}

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        trainer = self.trainer
        column: dict[str, int] = {}
        for row in rows:
            for candidate in row["candidates"]:
                column.setdefault(candidate, len(column))
        listed = bool(column)
        if not listed:
            # Nothing to rank, so nothing to learn; but a step needs embeddings, and under DDP a gradient, if only 0.
            column[trainer.retriever.support.ids[0]] = 0
        size = max(1, *(len(row["candidates"]) for row in rows))
        shape = (len(rows), size)
        index, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
        scores = torch.zeros(shape)
        known = torch.full((len(rows), len(column)), torch.nan)
        blocked = torch.zeros(len(rows), len(column), dtype=torch.bool)
        support, queries = trainer.retriever.support, trainer.queries
        groups = [support.groups[support.row(c)] for c in column]
        for i, row in enumerate(rows):
            length = len(row["candidates"])
            index[i, :length] = torch.tensor([column[c] for c in row["candidates"]], dtype=torch.long)
            scores[i, :length] = torch.tensor(row["scores"], dtype=torch.float)
            mask[i, :length] = True
            for candidate, score in trainer.table.candidates(row["query"]).items():
                if candidate in column:
                    known[i, column[candidate]] = score
            own = queries.groups[queries.row(row["query"])]
            blocked[i] = torch.tensor(
                [c == row["query"] or (g is not None and g == own) for c, g in zip(column, groups, strict=True)]
            )
        features = {"query": self.preprocessed("query", [row["query"] for row in rows], self._query_item)}
        shown = {"query": [queries.row(row["query"]) for row in rows]}
        vectors: dict[str, dict[str, torch.Tensor]] = {}
        if trainer.retriever.support_encoder is None:
            features["demonstrations"] = self.preprocessed("demonstration", list(column), self._demonstration_item)
            shown["demonstrations"] = [support.row(candidate) for candidate in column]
        else:  # they do not change while it is trained, and lie in the index
            stored = trainer.retriever.index.vectors(list(column))
            vectors["demonstrations"] = {"sentence_embedding": torch.from_numpy(stored)}
        for side, places in shown.items():
            numbers = self._image_numbers[side]
            features[side]["image_key"] = torch.tensor([numbers[row] for row in places])
        batch: dict[str, Any] = {
            f"{name}_{key}": value for name, part in (features | vectors).items() for key, value in part.items()
        }
        batch["label"] = {"index": index, "scores": scores, "mask": mask, "known": known, "blocked": blocked}
        if trainer.args.gather_negatives and trainer.processes.count > 1:
            batch["label"]["origins"] = self._origins([row["query"] for row in rows], list(column), filler=not listed)
        return batch

    @functools.cached_property
    def _group_numbers(self) -> dict[str | None, int]:
        groups = self.trainer.retriever.support.groups
        return {None: -1} | {group: row for row, group in enumerate(groups) if group is not None}

    def _origins(self, query_ids: list[str], column: list[str], *, filler: bool) -> dict[str, torch.Tensor]:
        """`Origins` of a batch: a demonstration's number is its row in the support set, a group's its last row."""
        support, queries, numbers = self.trainer.retriever.support, self.trainer.queries, self._group_numbers
        pools = [self.trainer.table.candidates(query_id) for query_id in query_ids]
        shape = (len(pools), max(map(len, pools)))
        scored, known = torch.full(shape, -1), torch.full(shape, torch.nan)
        for i, pool in enumerate(pools):
            scored[i, : len(pool)] = torch.tensor([support.row(c) for c in pool], dtype=torch.long)
            known[i, : len(pool)] = torch.tensor(list(pool.values()), dtype=torch.float)
        rows = [-1 if filler else support.row(c) for c in column]
        own = [support.row(query_id) if query_id in support else -1 for query_id in query_ids]
        own_groups = [numbers.get(queries.groups[queries.row(query_id)], -1) for query_id in query_ids]
        groups = [numbers[support.groups[support.row(c)]] for c in column]
        long = {"rows": rows, "groups": groups, "own": own, "own_groups": own_groups}
        tensors = {name: torch.tensor(values, dtype=torch.long) for name, values in long.items()}
        return {**tensors, "scored": scored, "known": known}


def _number(image_key: str) -> int:
    """An image's key as an int64, by which a step knows pictures that it need not encode twice."""
    return int(image_key[:15], 16) if image_key else 0
