"""`DrumTrainer`: mining, LVLM scoring and list-wise training interleaved in one `train()`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.base.evaluation import BaseEvaluator
from transformers import TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME

from ..data import TripletTable, find_twins, load_table
from ..encoders.loading import prepare_training
from ..errors import ContextOverflowError, SavedFileError, TooFewDemonstrationsError
from ..retriever.retriever import DemoRetriever
from ..scores.cascade import Cascade
from ..scores.feedback import Feedback
from ..scores.processes import Processes
from ..scores.store import ScoreStore
from ..types import LVLM, Query
from .arguments import DrumTrainingArguments
from .checkpoints import WholeCheckpoints, in_steps_of_now, last_checkpoint
from .lists import ListCollator, SampledLists
from .losses import make_loss
from .mining import CandidateTable, doubts, mine_candidates, mine_set_level
from .pricing import CALIBRATION, Pair, TrainingPlan, measure_drafts, plan_training, price
from .validation import HeldOut

__all__ = ["DrumTrainer", "Evaluator"]

logger = logging.getLogger(__name__)

#: Measures a retriever whose index is fresh: a number, or numbers by name.
Evaluator = Callable[[DemoRetriever], "float | Mapping[str, float]"]

_TABLE_FILE, _HELD_OUT_FILE = "candidates.parquet", "eval_candidates.parquet"
_LOSS_FILE = "loss.safetensors"


class _Rounds(TrainerCallback):
    """Mines when a round begins, and logs what it came to when it ends."""

    def __init__(self, trainer: DrumTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.trainer.processes.synchronize(list(self.trainer._loss_parameters().values()))
        self.trainer.write_drafts()
        if args.eval_strategy != "no":
            self.trainer.prepare_evaluation()

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        trainer = self.trainer
        trainer.lists.epoch = int(state.epoch or 0.0)  # resumed within an epoch, it is that epoch's
        if trainer.lists.epoch // args.epochs_per_round >= trainer.table.rounds:
            if trainer.table.rounds and trainer.on_round_end is not None:
                trainer.finish_round()
            trainer.mine()

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        if (self.trainer.lists.epoch + 1) % args.epochs_per_round == 0:
            self.trainer.log_round()


class DrumTrainer(WholeCheckpoints, SentenceTransformerTrainer):
    """Trains a retriever's encoder on an LVLM's ranking of the demonstrations that the retriever itself proposes.

    Args:
        retriever: encoder, support set and index. Trained in place.
        lvlm: whatever implements the `LVLM` protocol; its scores are bought once and kept in the score store.
        train_dataset: the training queries with their gold responses, a `TripletTable` or what `load_table` takes.
            By default the support set's own rows, each of which never demonstrates itself nor its group.
        args: `DrumTrainingArguments`.
        choices: the closed label set that scores are normalised over (classification); empty for open answers.
        cheap_lvlm: chooses the pairs worth the LVLM's time, where `args.cascade_keep` is below 1.
        eval_dataset: queries with gold answers, held out of training, as `train_dataset`. With `args.eval_strategy`
            the LVLM scores `args.eval_candidates` demonstrations of each once, and evaluations say how the retriever
            ranks these: `eval_ndcg` and `eval_gold_probability` (see `HeldOut.measure`).
        evaluator: measures the retriever, its index fresh, in the main process: a function of the retriever that
            returns a number (`eval_metric`) or numbers by name, such as in-context accuracy by an `ICLEvaluator`; or
            one of sentence-transformers' evaluators, which gets the encoder.
        loss: overrides the loss that `args.loss` names; see `LVLMLoss`.
        on_round_end: called with (trainer, finished rounds) once a round's training is over and the retriever's index
            is fresh; for evaluation between rounds. Of several processes each one calls it.
        callbacks, optimizers: the platform's.

    Each epoch draws new lists from the candidate table. When a round begins, the retriever as it is proposes
    candidates, the LVLM scores the pairs that were never scored, and the table grows. Optimizer and schedule run
    through. Table and loss parameters lie in every checkpoint, so `train(resume_from_checkpoint=True)` goes on in the
    round it was in.

    A line of the log has the mean `loss` and `accuracy` (share of lists whose best demonstration ranks first) since
    the line before; at a round's end there are `round`, `round_loss`, `round_accuracy`, `scored_pairs`, and, of rounds
    of new pairs, `gold_probability` (see `CandidateTable.summary`). `load_best_model_at_end`, early stopping,
    `report_to` and `save_only_model` are the platform's. When little can be learned, a warning after the first
    round's scores says why, and the retriever's card does (see `doubts`).

    An encoder that was saved in half precision is trained in float32; `bf16=True` computes by autocast.

    Launched as several processes (`torchrun`, `accelerate launch`), these share the LVLM's work: the main process
    proposes candidates, pairs are dealt out by demonstrations, none is scored twice, and every process ends up with
    the same table, weights and temperature. Checkpoints are written by the main process, scores by each. Make the
    arguments before models are loaded, since they give each process its GPU. A batch is each process's own; its
    in-batch negatives are those of all (`gather_negatives`).

    Source: DRUM (arXiv 2412.07619); list sampling and loss after UDR.

    Example:
        >>> def accuracy(retriever):  # doctest: +SKIP
        ...     return evaluator.evaluate(Retrieved("drum", retriever), shots=4).mean
        >>> args = DrumTrainingArguments(  # doctest: +SKIP
        ...     "out", eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        ...     metric_for_best_model="metric",
        ... )
        >>> DrumTrainer(retriever, lvlm=lvlm, args=args, evaluator=accuracy).train()  # doctest: +SKIP
    """

    training_args_class = DrumTrainingArguments
    args: DrumTrainingArguments
    loss: Any  # the platform would take several, by data set; here it is one module

    def __init__(
        self,
        retriever: DemoRetriever,
        *,
        lvlm: LVLM,
        train_dataset: Any = None,
        args: DrumTrainingArguments | None = None,
        choices: Sequence[str] = (),
        cheap_lvlm: LVLM | None = None,
        eval_dataset: Any = None,
        evaluator: Evaluator | BaseEvaluator | None = None,
        loss: torch.nn.Module | None = None,
        on_round_end: Callable[[DrumTrainer, int], None] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = args or DrumTrainingArguments(output_dir="drum-output")
        assert args.output_dir is not None  # the platform has filled it in
        self.retriever = retriever
        if args.frozen_candidates and retriever.support_encoder is None:
            retriever.freeze_support()
        self.queries = retriever.support if train_dataset is None else load_table(train_dataset)
        prepare_training(retriever.encoder)
        store = ScoreStore(args.score_store or Path(args.output_dir) / "scores.sqlite")
        common: dict[str, Any] = {"store": store, "choices": choices, "max_new_tokens": args.draft_tokens}
        self.feedback = Feedback(lvlm, retriever.support, self.queries, **common)
        self.cascade: Cascade | None = None
        if args.cascade_keep < 1.0:
            if cheap_lvlm is None:
                raise ValueError(
                    f"expected a cheap_lvlm to choose by, with cascade_keep={args.cascade_keep}; give a smaller LVLM, "
                    "or this one's with_fewer_image_tokens(4)"
                )
            cheap = Feedback(cheap_lvlm, retriever.support, self.queries, **common)
            self.cascade = Cascade(self.feedback, cheap, keep=args.cascade_keep, seed=args.seed)
        self.held_out: HeldOut | None = None
        if eval_dataset is not None:
            asked = load_table(eval_dataset)
            self.held_out = HeldOut(
                Feedback(self.feedback.lvlm, retriever.support, asked, **common),
                candidates=args.eval_candidates,
                seed=args.seed,
            )
        self.processes = Processes.current()
        several, batch = self.processes.count, args.train_batch_size
        if several > 1 and len(self.queries) < several * batch:
            # sentence-transformers drops what does not fill a batch in every process, and would train on nothing
            raise ValueError(
                f"expected training queries for a batch of {batch} in each of {several} processes; there are "
                f"{len(self.queries)}. Set per_device_train_batch_size (--train-batch-size) to at most "
                f"{len(self.queries) // several}, or start fewer processes"
            )
        if self.processes.is_main:
            self._warn_of_twins(self.queries, "training")
            if self.held_out is not None:
                self._warn_of_twins(self.held_out.feedback.queries, "evaluation")
        self.on_round_end, self.measure = on_round_end, evaluator
        self.drafts: dict[str, str] = {}
        self.doubts: list[str] = []
        self._losses: list[torch.Tensor] = []
        self._tally = {"line": torch.zeros(2), "round": torch.zeros(2)}
        loss = make_loss(retriever.encoder, args) if loss is None else loss
        self.lists = SampledLists(
            CandidateTable(self.queries.ids, set_level_weight=args.set_level_weight),
            seed=args.seed if args.data_seed is None else args.data_seed,
            size=args.list_size,
            sampling=getattr(loss, "sampling", "listwise"),
            ends=args.pool_ends,
            hard=args.hard_candidates,
            ends_once=args.ends_once,
            negatives=args.hard_negatives,
        )
        frozen = retriever.support_encoder is not None
        collate: Any = ListCollator(  # any callable will do, but the platform names its own class
            retriever.encoder,
            self.queries,
            retriever.support,
            drafts=self.drafts,
            stored=(lambda ids: retriever.index.vectors(ids)) if frozen else None,
            shared=args.gather_negatives and self.processes.count > 1,
        )
        rows = Dataset.from_dict({"query": self.queries.ids})
        held = None if self.held_out is None else Dataset.from_dict({"query": self.held_out.feedback.queries.ids})
        super().__init__(
            model=retriever.encoder,
            args=args,
            train_dataset=rows.with_transform(self.lists),
            # what the platform would compute a loss of; `evaluate` measures the retriever instead
            eval_dataset=rows if held is None and evaluator is not None else held,
            loss=loss,
            data_collator=collate,
            callbacks=[_Rounds(self), *(callbacks or [])],
            optimizers=optimizers,
        )

    @property
    def table(self) -> CandidateTable:
        """The training queries' candidates so far."""
        return self.lists.table

    def _warn_of_twins(self, queries: TripletTable, kind: str) -> None:
        if twins := find_twins(self.retriever.support, queries):
            logger.warning(
                "%d of %d %s queries share an image (or, without one, a prompt) with a demonstration that "
                "neither id nor group keeps from them, so that it may hand them the answer; the first is %r. Give "
                "such rows a common 'group'", len(twins), len(queries), kind, twins[0],
            )  # fmt: skip

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Left out: it counts tokens of text columns, and ours hold ids; the retriever has a card of its own."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As the platform does, but for its card, which embeds examples that need not be a query of this retriever."""
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(str(folder), create_model_card=False)  # type: ignore[union-attr,operator]
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)  # type: ignore[union-attr]
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def query(self, query_id: str) -> Query:
        """A training query as the retriever sees it: with its draft, where drafts are used."""
        return self.queries.query(query_id, draft=self.drafts.get(query_id))

    def write_drafts(self) -> None:
        """Have the LVLM draft an answer to every training query, where the retriever compares responses."""
        if self.retriever.uses_drafts and not self.drafts:
            self._say("drafting an answer to each of %d training queries", len(self.queries))
            ids = self.queries.ids
            self.drafts.update(zip(ids, self.feedback.drafts(ids, processes=self.processes), strict=True))

    def _say(self, message: str, *values: Any) -> None:
        if self.processes.is_main:
            logger.info(message, *values)

    @contextlib.contextmanager
    def _fresh_index(self) -> Iterator[None]:
        """The retriever's index by the encoder as it is, and the encoder in evaluation mode meanwhile."""
        encoder = self.retriever.encoder
        training = encoder.training
        encoder.eval()
        try:
            self._refresh()
            yield
        finally:
            encoder.train(training)

    def propose(self) -> dict[str, list[tuple[str, int]]]:
        """The next round's candidates of every query, as `mine_candidates` gives them, by the encoder as it is."""
        first = self.table.rounds == 0
        with self._fresh_index():
            return mine_candidates(
                self.retriever,
                self.table,
                self.query,
                count=self.args.candidates_per_round,
                random_share=self.args.random_share if first else 0.0,
                rng=np.random.default_rng([self.args.seed, 77, self.table.rounds]),
            )

    def propose_set_level(self) -> dict[str, list[str]]:
        """The next round's candidates to be scored at set level, as `mine_set_level` gives them."""
        with self._fresh_index():
            return mine_set_level(self.retriever, self.table, self.query, count=self.args.candidates_per_round)

    def _refresh(self) -> None:
        if self.retriever.support_encoder is None:  # else the support set's embeddings are what they were
            self.retriever.refresh()

    def mine(self) -> None:
        """One mining round: propose, score what is new, extend the table.

        Raises:
            TooFewDemonstrationsError: no query has a demonstration that is not of its own group.
        """
        if self.table.rounds and self.table.rounds >= self.args.rounds - self.args.set_level_rounds:
            self._mine_set_level()
            return
        # The main process alone: embeddings that differ in the last bit would make tables that differ, and encoding is
        # little beside scoring. The others' indexes are built when something asks for them.
        mined = self.processes.from_main(self.propose)
        if not self.processes.is_main:
            self.retriever.mark_stale()
        if self.table.rounds == 0:
            self._refuse_lonely(mined)
        pairs = _pairs(mined)
        if self.cascade is not None:
            self._say("round %d of %d: %d pairs proposed", self.table.rounds + 1, self.args.rounds, len(pairs))
            self.table.extend(mined, self.cascade.score(pairs, processes=self.processes))
            self._doubt()
            return
        # Counted, not calibrated: a few pairs scored apart would be batched otherwise in a run that was taken up
        # again, and batches of another make-up round otherwise.
        plan = price(self.feedback, pairs, processes=self.processes, calibrate=0)
        self._say(
            "round %d of %d: %d pairs proposed: %s",
            self.table.rounds + 1, self.args.rounds, len(pairs), plan.describe(),
        )  # fmt: skip
        self.table.extend(mined, plan.run())
        self._doubt()

    def _doubt(self) -> None:
        first = self.table.rounds == 1
        self.doubts = doubts(self.table, self.queries.responses if self.feedback.choices else ())
        if first and self.processes.is_main:
            for sentence in self.doubts:
                logger.warning("%s", sentence)

    def _mine_set_level(self) -> None:
        asked = self.processes.from_main(self.propose_set_level)
        if not self.processes.is_main:
            self.retriever.mark_stale()
        # the companion last, next to the query, where the most useful one is shown
        pairs: list[Pair] = []
        for query_id, candidates in asked.items():
            companion = self.table.companion(query_id)
            pairs += [(query_id, (candidate, companion)) for candidate in candidates if companion is not None]
        self._say(
            "round %d of %d: %d candidates next to the best", self.table.rounds + 1, self.args.rounds,
            len(pairs),
        )  # fmt: skip
        try:
            scores = self.feedback.score(pairs, processes=self.processes)
        except ContextOverflowError as error:
            raise ContextOverflowError(
                f"{error}; or, where two demonstrations never fit, train with set_level_rounds=0 "
                "(--set-level-rounds 0): what was scored is kept"
            ) from error
        self.table.extend_set_level(asked, scores)

    def _refuse_lonely(self, mined: dict[str, list[tuple[str, int]]]) -> None:
        lonely = [query_id for query_id, found in mined.items() if not found]
        if len(lonely) == len(mined):
            raise TooFewDemonstrationsError(
                f"expected demonstrations that may be shown to the {len(mined)} training queries; every row of the "
                f"support set ({len(self.retriever.support)} rows) is a query's own or of its group. Add rows, or "
                "make the column 'group' finer"
            )
        if lonely and self.processes.is_main:
            logger.warning(
                "%d of %d training queries have no demonstration that may be shown to them, so nothing is learnt from "
                "them; the first is %r", len(lonely), len(mined), lonely[0],
            )  # fmt: skip

    def plan(self, *, calibrate: int = CALIBRATION) -> TrainingPlan:
        """What `train` would cost from here, without training: the next round in full, later ones at most.

        A few pairs, zero-shot scores and drafts are bought to tell the time, and kept. Drafts that are in the store
        are used; pairs of queries without one are proposed by the rest of what the retriever compares.

        Args:
            calibrate: pairs that each process scores for it; 0 counts, and measures nothing.
        """
        drafts, drafted, missing, seconds = self.drafts, dict(self.drafts), 0, 0.0
        ids = self.queries.ids
        if self.retriever.uses_drafts and not drafts:
            missing, seconds = measure_drafts(self.feedback, ids, processes=self.processes, sample=calibrate // 4)
            unwritten = set(self.feedback.undrafted(ids, processes=self.processes)) if missing else set()
            written = [query_id for i, query_id in enumerate(ids) if i not in unwritten]
            drafted = dict(zip(written, self.feedback.drafts(written, processes=self.processes), strict=True))
        try:
            self.drafts = drafted
            mined = self.processes.from_main(self.propose)
        finally:
            self.drafts = drafts
        first = price(self.feedback, _pairs(mined), processes=self.processes, calibrate=calibrate, seed=self.args.seed)
        first.drafts, first.draft_seconds = missing, seconds
        return plan_training(
            first,
            rounds=self.args.rounds - self.table.rounds,
            candidates=self.args.candidates_per_round,
            set_level_rounds=self.args.set_level_rounds,
        )

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the platform's; the loss's own parameters, which DDP does not wrap, get the mean gradient too."""
        loss = super().training_step(*args, **kwargs)
        if self.processes.count > 1 and self.accelerator.sync_gradients:
            trained = [p for p in self._loss_parameters().values() if p.requires_grad]
            for parameter in trained:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self.processes.average([p.grad for p in trained])
        return loss

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """As the platform's; a round's losses are kept for its line of the log."""
        loss = super().compute_loss(*args, **kwargs)
        self._losses.append((loss[0] if isinstance(loss, tuple) else loss).detach())
        return loss

    def finish_round(self) -> None:
        """Refresh the index with the encoder as it is now and call `on_round_end`."""
        with self._fresh_index():
            if self.on_round_end is not None:
                self.on_round_end(self, self.table.rounds)

    def log_round(self) -> None:
        """Log what the round that ends came to: its losses and accuracy, means over all processes, and its pairs."""
        self._count()
        right, lists = self._tally["round"].tolist()
        loss = torch.stack(self._losses).mean().item() if self._losses else float("nan")
        values = torch.tensor([loss, right / max(lists, 1)], device=self.args.device)
        self.processes.average([values])
        told = dict(zip(("round_loss", "round_accuracy"), (round(v, 4) for v in values.tolist()), strict=True))
        row = self.table.summary()[-1]
        if row["gold probability"] is not None:
            told["gold_probability"] = round(row["gold probability"], 4)
        self._losses, self._tally["round"] = [], torch.zeros(2)
        self.log({"round": self.table.rounds, **told, "scored_pairs": len(self.table)})

    def _count(self) -> None:
        take = getattr(self.loss, "take_accuracy", None)  # a user's own loss need not have it
        if take is not None:
            counted = take()
            self._tally = {name: tally + counted for name, tally in self._tally.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the platform's, with `accuracy` beside `loss`; `logging_strategy="no"` means no line at all."""
        if "loss" in logs:
            self._count()
            right, lists = self._tally["line"].tolist()
            self._tally["line"] = torch.zeros(2)
            if lists:
                logs = logs | {"accuracy": round(right / lists, 4)}
        if self.args.logging_strategy != "no":
            super().log(logs, start_time)

    def prepare_evaluation(self) -> None:
        """Choose what `eval_dataset` is ranked by, and have the LVLM score it; done once."""
        if self.held_out is not None:
            with self._fresh_index() if self.processes.is_main else contextlib.nullcontext():
                self.held_out.prepare(self.retriever, self.processes)

    def evaluate(  # type: ignore[override]  # what is measured is the retriever, not a data set's loss
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """What `eval_dataset` and `evaluator` of the trainer say of the retriever as it is now.

        Returns:
            name -> value, each name with the prefix: see the class.

        Raises:
            ValueError: the trainer has neither, or another data set is given.
        """
        if eval_dataset is not None or (self.held_out is None and self.measure is None):
            raise ValueError(
                "expected DrumTrainer(eval_dataset=…) or DrumTrainer(evaluator=…) to evaluate by; "
                f"got {'another data set' if eval_dataset is not None else 'neither'}"
            )
        self.prepare_evaluation()
        found = self.processes.from_main(self._measure)
        metrics = {f"{metric_key_prefix}_{name}": float(value) for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measure(self) -> dict[str, float]:
        found: dict[str, float] = {}
        with self._fresh_index(), torch.no_grad():
            if self.held_out is not None:
                found |= self.held_out.measure(self.retriever)
            if isinstance(self.measure, BaseEvaluator):
                measured: Any = self.measure(self.retriever.encoder, epoch=self.state.epoch or -1)
            else:
                measured = {} if self.measure is None else self.measure(self.retriever)
        return found | (dict(measured) if isinstance(measured, Mapping) else {"metric": measured})

    def train(  # type: ignore[override]  # the platform's other arguments are among kwargs
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> Any:
        """As `transformers.Trainer.train`; afterwards the retriever's index is fresh and it knows its teacher.

        `resume_from_checkpoint=True` goes on from the last checkpoint that was written to its end. Another number of
        processes may go on: it does so at the same place of the same epoch (see `in_steps_of_now`).
        """
        if resume_from_checkpoint is True:
            found = last_checkpoint(self.args.output_dir or ".")
            if found is None:
                raise SavedFileError(
                    f"expected a checkpoint in {self.args.output_dir} that was written to its end, found none; train "
                    "without resuming: what was scored is in the score store"
                )
            resume_from_checkpoint = str(found)
        if resume_from_checkpoint and self.args.max_steps <= 0:
            # steps of all processes together, the last one of an epoch with what is left
            steps = -(-len(self.get_train_dataloader()) // self.args.gradient_accumulation_steps)
            with in_steps_of_now(Path(resume_from_checkpoint), steps) as checkpoint:
                output = super().train(str(checkpoint), **kwargs)
        else:
            output = super().train(resume_from_checkpoint, **kwargs)
        self.finish_round()
        self.retriever.record_training(
            teacher=_describe(self.feedback.lvlm.lvlm),
            training={
                "rounds": self.table.rounds,
                "scored_pairs": len(self.table),
                "queries": len(self.queries),
                "loss": self.args.loss,
                "weighting": self.args.weighting if self.args.loss == "listwise" else None,
                "set_level_rounds": min(self.args.set_level_rounds, self.args.rounds - 1),
                "seed": self.args.seed,
            },
            rounds=self.table.summary(),
        )
        self.retriever.card_data = self.retriever.card_data | {"limits": self.doubts}
        return output

    def save_state_beside(self, checkpoint: Path) -> None:
        """Write candidate table and loss parameters into a checkpoint."""
        from safetensors.torch import save_file

        checkpoint.mkdir(parents=True, exist_ok=True)
        self.table.save(checkpoint / _TABLE_FILE)
        if self.held_out is not None:
            self.held_out.table.save(checkpoint / _HELD_OUT_FILE)
        part = checkpoint / f"{_LOSS_FILE}.part"
        save_file({n: p.detach().cpu().contiguous() for n, p in self._loss_parameters().items()}, part)
        part.replace(checkpoint / _LOSS_FILE)

    def _loss_parameters(self) -> dict[str, torch.Tensor]:
        return {n: p for n, p in self.loss.named_parameters() if not n.startswith("model.")}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        self._load_weights(Path(resume_from_checkpoint))
        self.lists.table = self._load_table(
            Path(resume_from_checkpoint, _TABLE_FILE), self.queries.ids, "train_dataset"
        )
        held_out = Path(resume_from_checkpoint, _HELD_OUT_FILE)
        if self.held_out is not None and held_out.exists():
            self.held_out.table = self._load_table(held_out, self.held_out.feedback.queries.ids, "eval_dataset")
        self._doubt()

    def _load_best_model(self) -> None:
        """As the platform's, with the loss's parameters; the table keeps what was scored since."""
        assert self.state.best_model_checkpoint is not None
        self._load_weights(Path(self.state.best_model_checkpoint))
        self._say("the best model is that of %s", self.state.best_model_checkpoint)

    def _load_table(self, path: Path, query_ids: list[str], name: str) -> CandidateTable:
        table = CandidateTable.load(path, set_level_weight=self.args.set_level_weight)
        if table.query_ids != query_ids:
            raise SavedFileError(
                f"expected {path} to hold the {len(query_ids)} queries of {name} in order; got {len(table.query_ids)} "
                f"others. Resume with the {name} that the checkpoint was made with"
            )
        return table

    def _load_weights(self, folder: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        super()._load_from_checkpoint(str(folder))
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


def _pairs(mined: dict[str, list[tuple[str, int]]]) -> list[tuple[str, tuple[str, ...]]]:
    return [(query_id, (candidate,)) for query_id, found in mined.items() for candidate, _ in found]


def _describe(lvlm: LVLM) -> dict[str, Any]:
    """What a retriever records of its teacher."""
    return {
        "name": getattr(lvlm, "name", None),
        "revision": getattr(lvlm, "revision", None),
        "fingerprint": lvlm.fingerprint,
    }
