"""`DrumTrainer`: mining, LVLM scoring and list-wise training interleaved in one `train()`."""

from __future__ import annotations

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import TrainerCallback

from ..data import TripletTable
from ..errors import SavedFileError
from ..lvlm.feedback import Feedback
from ..lvlm.store import ScoreStore
from ..retriever import DemoRetriever
from ..types import LVLM, Query
from .losses import ContrastiveLVLMLoss, ListwiseLVLMLoss, Weighting
from .mining import CandidateTable, Sampling, mine_candidates

__all__ = ["DrumTrainer", "DrumTrainingArguments"]

logger = logging.getLogger(__name__)

_TABLE_FILE = "candidates.parquet"
_LOSS_FILE = "loss.safetensors"


@dataclasses.dataclass
class DrumTrainingArguments(SentenceTransformerTrainingArguments):
    """Sentence-transformers' training arguments and what DRUM adds.

    `num_train_epochs` is always `rounds * epochs_per_round`; set those instead.

    Args:
        rounds: passes of mine -> score -> train; UDR's value 3.
        epochs_per_round: our choice.
        candidates_per_round: new pairs that each query buys in a round; our choice (UDR scores 50 in each).
        random_share: share of the first round's candidates drawn at random; our choice.
        list_size: candidates sampled for a query in a step, l; UDR's value 8.
        objective: "listwise" (DRUM) or "contrastive" (EPR).
        weighting: of the list-wise loss: "utility" (ours), "rank" (UDR's paper), "position" (UDR's code).
        rank_weight: lambda; UDR's value 0.8.
        temperature: where the learnable temperature starts; our choice.
        pool_ends: how many of a pool count as its best and its worst when lists are sampled; UDR's and EPR's value 5.
        mini_batch_size: gradient caching in chunks of so many items; off by default.
        score_store: SQLite file of every LVLM score; `scores.sqlite` in `output_dir` by default.
        label_smoothing_factor etc. are the platform's.
    """

    rounds: int = dataclasses.field(default=3, metadata={"help": "passes of mine -> score -> train"})
    epochs_per_round: int = dataclasses.field(default=3, metadata={"help": "epochs over the queries in each round"})
    candidates_per_round: int = dataclasses.field(default=10, metadata={"help": "new pairs a query buys in a round"})
    random_share: float = dataclasses.field(default=0.5, metadata={"help": "random share of the first round"})
    list_size: int = dataclasses.field(default=8, metadata={"help": "candidates sampled for a query in a step"})
    objective: Sampling = dataclasses.field(default="listwise", metadata={"help": "listwise (DRUM) or contrastive"})
    weighting: Weighting = dataclasses.field(default="utility", metadata={"help": "utility, rank or position"})
    rank_weight: float = dataclasses.field(default=0.8, metadata={"help": "lambda of the list-wise loss"})
    temperature: float = dataclasses.field(default=0.05, metadata={"help": "start of the learnable temperature"})
    pool_ends: int = dataclasses.field(default=5, metadata={"help": "pool's best and worst for sampling"})
    mini_batch_size: int | None = dataclasses.field(default=None, metadata={"help": "gradient caching chunk"})
    score_store: str | None = dataclasses.field(default=None, metadata={"help": "SQLite file of LVLM scores"})

    def __post_init__(self) -> None:
        for name in ("rounds", "epochs_per_round", "candidates_per_round", "list_size", "pool_ends"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1; got {getattr(self, name)}")
        if not 0.0 <= self.random_share <= 1.0:
            raise ValueError(f"expected random_share between 0 and 1; got {self.random_share}")
        if self.list_size < 2:
            raise ValueError(f"expected list_size of at least 2, something to rank; got {self.list_size}")
        if self.dataloader_persistent_workers:
            raise ValueError(
                "dataloader_persistent_workers=True would train on the first round's candidates for ever, since its "
                "workers never see a later round; leave it False"
            )
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False  # there is nothing to pin for, and torch would warn
        self.num_train_epochs = float(self.rounds * self.epochs_per_round)
        super().__post_init__()


class _Preprocessed:
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


class _Lists:
    """Collator: sampled lists -> a batch of queries, one of *different* demonstrations, and what is known of them."""

    valid_label_columns: tuple[str, ...] = ()

    def __init__(self, trainer: DrumTrainer) -> None:
        self.trainer = trainer
        self.preprocessed = _Preprocessed(trainer.retriever.encoder)

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
        size = max(len(row["candidates"]) for row in rows)
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
            scores[i, :length] = torch.tensor(row["scores"])
            mask[i, :length] = True
            for candidate, score in trainer.table.candidates(row["query"]).items():
                if candidate in column:
                    known[i, column[candidate]] = score
            own = queries.groups[queries.row(row["query"])]
            blocked[i] = torch.tensor(
                [c == row["query"] or (g is not None and g == own) for c, g in zip(column, groups, strict=True)]
            )
        features = {
            "query": self.preprocessed("query", [row["query"] for row in rows], self._query_item),
            "demonstrations": self.preprocessed("demonstration", list(column), self._demonstration_item),
        }
        batch: dict[str, Any] = {
            f"{name}_{key}": value for name, part in features.items() for key, value in part.items()
        }
        batch["label"] = {"index": index, "scores": scores, "mask": mask, "known": known, "blocked": blocked}
        return batch


class _Rounds(TrainerCallback):
    """Refreshes the candidate table when a round begins, and keeps it beside every checkpoint."""

    def __init__(self, trainer: DrumTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.trainer.write_drafts()

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        trainer = self.trainer
        trainer.epoch = int(state.epoch or 0.0)  # resumed within an epoch, it is that epoch's
        if trainer.epoch // args.epochs_per_round >= trainer.table.rounds:
            if trainer.table.rounds and trainer.on_round_end is not None:
                trainer.finish_round()
            trainer.mine()

    def on_save(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            self.trainer.save_state_beside(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class DrumTrainer(SentenceTransformerTrainer):
    """Trains a retriever's encoder on an LVLM's ranking of the demonstrations that the retriever itself proposes.

    Args:
        retriever: encoder, support set and index. Trained in place.
        lvlm: whatever implements the `LVLM` protocol; its scores are bought once and kept in the score store.
        train_dataset: the training queries with their gold responses, a `TripletTable` or what one is made from.
            By default the support set's own rows, each of which never demonstrates itself nor its group.
        args: `DrumTrainingArguments`.
        choices: the closed label set that scores are normalised over (classification); empty for open answers.
        loss: overrides what `args.objective` makes: a loss that reads `ListBatch` labels.
        on_round_end: called with (trainer, finished rounds) once a round's training is over and the retriever's index
            is fresh; for evaluation between rounds.
        callbacks, optimizers: the platform's.

    Each epoch draws new lists from the candidate table. When a round begins, the retriever as it is proposes
    candidates, the LVLM scores the pairs that were never scored, and the table grows. Optimizer and schedule run
    through. Table and loss parameters lie in every checkpoint, so `train(resume_from_checkpoint=True)` goes on in the
    round it was in.

    Source: DRUM (arXiv 2412.07619); list sampling and loss after UDR.
    """

    training_args_class = DrumTrainingArguments
    args: DrumTrainingArguments
    loss: Any  # the platform would take several, by data set; here it is one module

    def __init__(
        self,
        retriever: DemoRetriever,
        *,
        lvlm: LVLM,
        train_dataset: TripletTable | Dataset | Sequence[dict[str, Any]] | None = None,
        args: DrumTrainingArguments | None = None,
        choices: Sequence[str] = (),
        loss: torch.nn.Module | None = None,
        on_round_end: Callable[[DrumTrainer, int], None] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = args or DrumTrainingArguments(output_dir="drum-output")
        assert args.output_dir is not None  # the platform has filled it in
        self.retriever = retriever
        self.queries = retriever.support if train_dataset is None else TripletTable.from_dataset(train_dataset)
        store = ScoreStore(args.score_store or Path(args.output_dir) / "scores.sqlite")
        self.feedback = Feedback(lvlm, retriever.support, self.queries, store=store, choices=choices)
        self.table = CandidateTable(self.queries.ids)
        self.on_round_end = on_round_end
        self.epoch = 0
        self.drafts: dict[str, str] = {}
        if loss is None:
            common: dict[str, Any] = {"temperature": args.temperature, "mini_batch_size": args.mini_batch_size}
            if args.objective == "contrastive":
                loss = ContrastiveLVLMLoss(retriever.encoder, **common)
            else:
                loss = ListwiseLVLMLoss(
                    retriever.encoder, weighting=args.weighting, rank_weight=args.rank_weight, **common
                )
        rows = Dataset.from_dict({"query": self.queries.ids})
        collate: Any = _Lists(self)  # any callable will do, but the platform names its own class
        super().__init__(
            model=retriever.encoder,
            args=args,
            train_dataset=rows.with_transform(self._view),
            loss=loss,
            data_collator=collate,
            callbacks=[_Rounds(self), *(callbacks or [])],
            optimizers=optimizers,
        )

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Left out: it counts tokens of text columns, and ours hold ids; the retriever has a card of its own."""

    def query(self, query_id: str) -> Query:
        """A training query as the retriever sees it: with its draft, where drafts are used."""
        return self.queries.query(query_id, draft=self.drafts.get(query_id))

    def write_drafts(self) -> None:
        """Have the LVLM draft an answer to every training query, where the retriever compares responses."""
        if self.retriever.uses_drafts and not self.drafts:
            logger.info("drafting an answer to each of %d training queries", len(self.queries))
            self.drafts = dict(zip(self.queries.ids, self.feedback.drafts(self.queries.ids), strict=True))

    def _view(self, batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        lists: dict[str, list[Any]] = {"query": [], "candidates": [], "scores": []}
        for query_id in batch["query"]:
            # a list is a function of (seed, epoch, query): resuming draws what the uninterrupted run would have
            rng = np.random.default_rng(
                [self.args.data_seed or self.args.seed, self.epoch, self.queries.row(query_id)]
            )
            ids, scores = self.table.sample(
                query_id, self.args.list_size, rng, sampling=self.args.objective, ends=self.args.pool_ends
            )
            lists["query"].append(query_id)
            lists["candidates"].append(ids)
            lists["scores"].append(scores)
        return lists

    def mine(self) -> None:
        """One mining round: propose, score what is new, extend the table."""
        encoder = self.retriever.encoder
        training = encoder.training
        encoder.eval()
        self.retriever.refresh()
        first = self.table.rounds == 0
        mined = mine_candidates(
            self.retriever,
            self.table,
            self.query,
            count=self.args.candidates_per_round,
            random_share=self.args.random_share if first else 0.0,
            rng=np.random.default_rng([self.args.seed, 77, self.table.rounds]),
        )
        pairs = [(query_id, (candidate,)) for query_id, found in mined.items() for candidate, _ in found]
        new, known = self.feedback.plan(pairs)
        logger.info(
            "round %d of %d: %d pairs proposed, %d new to the LVLM, %d in the score store",
            self.table.rounds + 1, self.args.rounds, len(pairs), new, known,
        )  # fmt: skip
        self.table.extend(mined, self.feedback.score(pairs))
        encoder.train(training)

    def finish_round(self) -> None:
        """Refresh the index with the encoder as it is now and call `on_round_end`."""
        encoder = self.retriever.encoder
        training = encoder.training
        encoder.eval()
        self.retriever.refresh()
        if self.on_round_end is not None:
            self.on_round_end(self, self.table.rounds)
        encoder.train(training)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the platform's, but `logging_strategy="no"` means no line at all, the closing one included."""
        if self.args.logging_strategy != "no":
            super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any):
        """As `transformers.Trainer.train`; afterwards the retriever's index is fresh and it knows its teacher."""
        output = super().train(*args, **kwargs)
        self.finish_round()
        self.retriever.record_training(
            teacher=_describe(self.feedback.lvlm.lvlm),
            training={
                "rounds": self.table.rounds,
                "scored_pairs": len(self.table),
                "queries": len(self.queries),
                "objective": self.args.objective,
                "weighting": self.args.weighting if self.args.objective == "listwise" else None,
            },
        )
        return output

    def save_state_beside(self, checkpoint: Path) -> None:
        """Write candidate table and loss parameters into a checkpoint."""
        from safetensors.torch import save_file

        checkpoint.mkdir(parents=True, exist_ok=True)
        self.table.save(checkpoint / _TABLE_FILE)
        save_file(
            {n: p.detach().cpu().contiguous() for n, p in self._loss_parameters().items()}, checkpoint / _LOSS_FILE
        )

    def _loss_parameters(self) -> dict[str, torch.Tensor]:
        return {n: p for n, p in self.loss.named_parameters() if not n.startswith("model.")}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        super()._load_from_checkpoint(resume_from_checkpoint)
        folder = Path(resume_from_checkpoint)
        table = CandidateTable.load(folder / _TABLE_FILE)
        if table.query_ids != self.queries.ids:
            raise SavedFileError(
                f"expected {folder / _TABLE_FILE} to hold the {len(self.queries)} training queries in order; it holds "
                f"{len(table.query_ids)} others. Resume with the train_dataset that the checkpoint was made with"
            )
        try:
            saved = load_file(folder / _LOSS_FILE)
            with torch.no_grad():
                for name, parameter in self._loss_parameters().items():
                    parameter.copy_(saved[name])
        except (OSError, SafetensorError, KeyError) as error:
            raise SavedFileError(
                f"expected the loss's parameters in {folder / _LOSS_FILE}; reading failed ({error}). Resume from "
                "another checkpoint"
            ) from error
        self.table = table


def _describe(lvlm: LVLM) -> dict[str, Any]:
    """What a retriever records of its teacher."""
    return {
        "name": getattr(lvlm, "name", None),
        "revision": getattr(lvlm, "revision", None),
        "fingerprint": lvlm.fingerprint,
    }
