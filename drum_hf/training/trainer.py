"""`DrumTrainer`: mining, LVLM scoring and list-wise training interleaved in one `train()`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME

from ..data import TripletTable, find_twins
from ..encoders.loading import prepare_training
from ..errors import ContextOverflowError, SavedFileError, TooFewDemonstrationsError
from ..retriever.retriever import DemoRetriever
from ..scores.cascade import Cascade
from ..scores.feedback import Feedback
from ..scores.sharding import Processes
from ..scores.store import ScoreStore
from ..types import LVLM, Query
from .checkpoints import WholeCheckpoints, in_steps_of_now, last_checkpoint
from .collator import ListCollator, SampledLists
from .losses import ContrastiveLVLMLoss, InBatch, ListwiseLVLMLoss, Weighting
from .methods import Method
from .mining import FIRST_RANDOM_SHARE, SET_LEVEL_WEIGHT, CandidateTable, Sampling, mine_candidates, mine_set_level
from .pricing import CALIBRATION, Pair, TrainingPlan, measure_drafts, plan_training, price

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
        set_level_rounds: last rounds in which a query buys, instead of new pairs, scores of candidates it has in the
            one next to the one that served it best, as a prompt of several will show them; at least one round scores
            them alone. Our choice, beyond the paper; 0 for a retriever that is to serve one demonstration at a time.
        set_level_weight: what a demonstration is worth at set level, beside what it is worth alone; our choice.
        random_share: share of the first round's candidates drawn at random; our choice.
        list_size: candidates sampled for a query in a step, l; UDR's value 8.
        objective: "listwise" (DRUM) or "contrastive" (EPR's loss). What else sets an ancestor apart from DRUM stands
            in `drum_hf.training.methods.METHODS`.
        weighting: of the list-wise loss: "utility" (ours), "rank" (UDR's paper), "position" (UDR's code) or "kl".
        rank_weight: lambda; UDR's value 0.8.
        in_batch: targets of the in-batch term: "soft" (ours) or "best" (UDR); see `ListwiseLVLMLoss`.
        temperature: where the learnable temperature starts; our choice.
        pool_ends: how many of a pool count as its best and its worst when lists are sampled; UDR's and EPR's value 5.
        hard_candidates: a list holds one that retriever and LVLM disagree on, where the pool has one; our choice (UDR
            draws without).
        mine_once: the pairs of all rounds are bought in the first one, by the retriever as it is before training, and
            with as many random ones; `rounds`, `epochs_per_round`, `candidates_per_round` and `random_share` are set
            to that. For an ablation: it leaves out mining.
        frozen_candidates: the demonstrations' embeddings stay those of the encoder as it is before training; only the
            queries' side is trained (MSIER). The retriever then holds both encoders.
        mini_batch_size: gradient caching in chunks of so many items; off by default.
        draft_tokens: length of the training queries' drafts; as long as those of the queries that will be asked.
        gather_negatives: of several processes, each compares its queries with the demonstrations of all of them, so
            that N processes with batches of B train as one process with a batch of N B. On by default (our choice):
            with few in-batch negatives quality falls.
        score_store: SQLite file of every LVLM score; `scores.sqlite` in `output_dir` by default.
        cascade_keep: share of each query's new pairs that the LVLM itself scores, the best by `cheap_lvlm`; the rest
            are estimates (see `Cascade`). 1, our choice, scores all and needs no cheaper LVLM.
        label_smoothing_factor etc. are the platform's.
    """

    rounds: int = dataclasses.field(default=3, metadata={"help": "passes of mine -> score -> train"})
    epochs_per_round: int = dataclasses.field(default=3, metadata={"help": "epochs over the queries in each round"})
    candidates_per_round: int = dataclasses.field(default=10, metadata={"help": "new pairs a query buys in a round"})
    set_level_rounds: int = dataclasses.field(default=1, metadata={"help": "last rounds, scored at set level"})
    set_level_weight: float = dataclasses.field(default=SET_LEVEL_WEIGHT, metadata={"help": "of set-level scores"})
    random_share: float = dataclasses.field(default=FIRST_RANDOM_SHARE, metadata={"help": "random share of round one"})
    list_size: int = dataclasses.field(default=8, metadata={"help": "candidates sampled for a query in a step"})
    objective: Sampling = dataclasses.field(default="listwise", metadata={"help": "listwise (DRUM) or contrastive"})
    weighting: Weighting = dataclasses.field(default="utility", metadata={"help": "utility, rank, position, kl"})
    rank_weight: float = dataclasses.field(default=0.8, metadata={"help": "lambda of the list-wise loss"})
    in_batch: InBatch = dataclasses.field(default="soft", metadata={"help": "soft targets (ours) or best (UDR)"})
    temperature: float = dataclasses.field(default=0.05, metadata={"help": "start of the learnable temperature"})
    pool_ends: int = dataclasses.field(default=5, metadata={"help": "pool's best and worst for sampling"})
    hard_candidates: bool = dataclasses.field(default=True, metadata={"help": "a hard candidate in every list"})
    mine_once: bool = dataclasses.field(default=False, metadata={"help": "buy all rounds' pairs in the first one"})
    frozen_candidates: bool = dataclasses.field(default=False, metadata={"help": "train the queries' side alone"})
    mini_batch_size: int | None = dataclasses.field(default=None, metadata={"help": "gradient caching chunk"})
    draft_tokens: int = dataclasses.field(default=32, metadata={"help": "length of a training query's draft"})
    gather_negatives: bool = dataclasses.field(default=True, metadata={"help": "in-batch negatives of all processes"})
    score_store: str | None = dataclasses.field(default=None, metadata={"help": "SQLite file of LVLM scores"})
    cascade_keep: float = dataclasses.field(default=1.0, metadata={"help": "share of pairs that the LVLM scores"})

    def __post_init__(self) -> None:
        for name in ("rounds", "epochs_per_round", "candidates_per_round", "list_size", "pool_ends"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1; got {getattr(self, name)}")
        if self.set_level_rounds < 0:
            raise ValueError(f"expected set_level_rounds of at least 0; got {self.set_level_rounds}")
        if not 0.0 <= self.set_level_weight <= 1.0:
            raise ValueError(f"expected set_level_weight between 0 and 1; got {self.set_level_weight}")
        if not 0.0 <= self.random_share <= 1.0:
            raise ValueError(f"expected random_share between 0 and 1; got {self.random_share}")
        if not 0.0 < self.cascade_keep <= 1.0:
            raise ValueError(f"expected cascade_keep above 0 and up to 1; got {self.cascade_keep}")
        if self.list_size < 2:
            raise ValueError(f"expected list_size of at least 2, something to rank; got {self.list_size}")
        if self.mine_once:  # once it is done, there is one round, and doing it again changes nothing
            self.random_share /= self.rounds
            self.candidates_per_round *= self.rounds
            self.epochs_per_round *= self.rounds
            self.rounds = 1
        if self.dataloader_persistent_workers:
            raise ValueError(
                "dataloader_persistent_workers=True would train on the first round's candidates for ever, since its "
                "workers never see a later round; leave it False"
            )
        if self.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end=True needs evaluations that DrumTrainer does not make. Measure the retriever "
                "in on_round_end, and save the one you like best with save_pretrained"
            )
        if Processes.current().count > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # without it the platform would start that many trainings beside one another
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False  # there is nothing to pin for, and torch would warn
        self.num_train_epochs = float(self.rounds * self.epochs_per_round)
        super().__post_init__()


def own_arguments(method: Method) -> dict[str, Any]:
    """Every argument of a method's that is not the platform's, defaults included: what its outcome depends on."""
    own = [f for f in dataclasses.fields(DrumTrainingArguments) if f.name in DrumTrainingArguments.__annotations__]
    return {f.name: f.default for f in own} | dict(method.training)


class _Rounds(TrainerCallback):
    """Refreshes the candidate table when a round begins."""

    def __init__(self, trainer: DrumTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.trainer.processes.synchronize(list(self.trainer._loss_parameters().values()))
        self.trainer.write_drafts()

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        trainer = self.trainer
        trainer.epoch = int(state.epoch or 0.0)  # resumed within an epoch, it is that epoch's
        if trainer.epoch // args.epochs_per_round >= trainer.table.rounds:
            if trainer.table.rounds and trainer.on_round_end is not None:
                trainer.finish_round()
            trainer.mine()


class DrumTrainer(WholeCheckpoints, SentenceTransformerTrainer):
    """Trains a retriever's encoder on an LVLM's ranking of the demonstrations that the retriever itself proposes.

    Args:
        retriever: encoder, support set and index. Trained in place.
        lvlm: whatever implements the `LVLM` protocol; its scores are bought once and kept in the score store.
        train_dataset: the training queries with their gold responses, a `TripletTable` or what one is made from.
            By default the support set's own rows, each of which never demonstrates itself nor its group.
        args: `DrumTrainingArguments`.
        choices: the closed label set that scores are normalised over (classification); empty for open answers.
        cheap_lvlm: chooses the pairs worth the LVLM's time, where `args.cascade_keep` is below 1.
        loss: overrides what `args.objective` makes: a loss that reads `ListBatch` labels.
        on_round_end: called with (trainer, finished rounds) once a round's training is over and the retriever's index
            is fresh; for evaluation between rounds. Of several processes each one calls it.
        callbacks, optimizers: the platform's.

    Each epoch draws new lists from the candidate table. When a round begins, the retriever as it is proposes
    candidates, the LVLM scores the pairs that were never scored, and the table grows. Optimizer and schedule run
    through. Table and loss parameters lie in every checkpoint, so `train(resume_from_checkpoint=True)` goes on in the
    round it was in.

    Launched as several processes (`torchrun`, `accelerate launch`), these share the LVLM's work: the main process
    proposes candidates, pairs are dealt out by demonstrations, none is scored twice, and every process ends up with
    the same table, weights and temperature. Checkpoints are written by the main process, scores by each. Make the
    arguments before models are loaded, since they give each process its GPU. A batch is each process's own; its
    in-batch negatives are those of all (`gather_negatives`).

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
        cheap_lvlm: LVLM | None = None,
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
        self.queries = retriever.support if train_dataset is None else TripletTable.from_dataset(train_dataset)
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
        self.table = CandidateTable(self.queries.ids, set_level_weight=args.set_level_weight)
        self.processes = Processes.current()
        several, batch = self.processes.count, args.train_batch_size
        if several > 1 and len(self.queries) < several * batch:
            # sentence-transformers drops what does not fill a batch in every process, and would train on nothing
            raise ValueError(
                f"expected training queries for a batch of {batch} in each of {several} processes; there are "
                f"{len(self.queries)}. Set per_device_train_batch_size (--train-batch-size) to at most "
                f"{len(self.queries) // several}, or start fewer processes"
            )
        if self.processes.is_main and (twins := find_twins(retriever.support, self.queries)):
            logger.warning(
                "%d of %d training queries share an image (or, without one, a prompt) with a demonstration that "
                "neither id nor group keeps from them, so that it may hand them the answer; the first is %r. Give "
                "such rows a common 'group'", len(twins), len(self.queries), twins[0],
            )  # fmt: skip
        self.on_round_end = on_round_end
        self.epoch = 0
        self.drafts: dict[str, str] = {}
        if loss is None:
            common = {
                "temperature": args.temperature,
                "mini_batch_size": args.mini_batch_size,
                "gather_negatives": args.gather_negatives,
            }
            if args.objective == "contrastive":
                loss = ContrastiveLVLMLoss(retriever.encoder, **common)
            else:
                loss = ListwiseLVLMLoss(
                    retriever.encoder,
                    weighting=args.weighting,
                    rank_weight=args.rank_weight,
                    in_batch=args.in_batch,
                    **common,
                )
        prepare_training(retriever.encoder)
        rows = Dataset.from_dict({"query": self.queries.ids})
        collate: Any = ListCollator(self)  # any callable will do, but the platform names its own class
        super().__init__(
            model=retriever.encoder,
            args=args,
            train_dataset=rows.with_transform(SampledLists(self)),
            loss=loss,
            data_collator=collate,
            callbacks=[_Rounds(self), *(callbacks or [])],
            optimizers=optimizers,
        )

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
            self.drafts = dict(zip(ids, self.feedback.drafts(ids, processes=self.processes), strict=True))

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
            return
        # Counted, not calibrated: a few pairs scored apart would be batched otherwise in a run that was taken up
        # again, and batches of another make-up round otherwise.
        plan = price(self.feedback, pairs, processes=self.processes, calibrate=0)
        self._say(
            "round %d of %d: %d pairs proposed: %s",
            self.table.rounds + 1, self.args.rounds, len(pairs), plan.describe(),
        )  # fmt: skip
        self.table.extend(mined, plan.run())

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

    def finish_round(self) -> None:
        """Refresh the index with the encoder as it is now and call `on_round_end`."""
        with self._fresh_index():
            if self.on_round_end is not None:
                self.on_round_end(self, self.table.rounds)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the platform's, but `logging_strategy="no"` means no line at all, the closing one included."""
        if self.args.logging_strategy != "no":
            super().log(logs, start_time)

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
                "objective": self.args.objective,
                "weighting": self.args.weighting if self.args.objective == "listwise" else None,
                "set_level_rounds": min(self.args.set_level_rounds, self.args.rounds - 1),
                "seed": self.args.seed,
            },
            rounds=self.table.summary(),
        )
        return output

    def save_state_beside(self, checkpoint: Path) -> None:
        """Write candidate table and loss parameters into a checkpoint."""
        from safetensors.torch import save_file

        checkpoint.mkdir(parents=True, exist_ok=True)
        self.table.save(checkpoint / _TABLE_FILE)
        part = checkpoint / f"{_LOSS_FILE}.part"
        save_file({n: p.detach().cpu().contiguous() for n, p in self._loss_parameters().items()}, part)
        part.replace(checkpoint / _LOSS_FILE)

    def _loss_parameters(self) -> dict[str, torch.Tensor]:
        return {n: p for n, p in self.loss.named_parameters() if not n.startswith("model.")}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        super()._load_from_checkpoint(resume_from_checkpoint)
        folder = Path(resume_from_checkpoint)
        table = CandidateTable.load(folder / _TABLE_FILE, set_level_weight=self.args.set_level_weight)
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


def _pairs(mined: dict[str, list[tuple[str, int]]]) -> list[tuple[str, tuple[str, ...]]]:
    return [(query_id, (candidate,)) for query_id, found in mined.items() for candidate, _ in found]


def _describe(lvlm: LVLM) -> dict[str, Any]:
    """What a retriever records of its teacher."""
    return {
        "name": getattr(lvlm, "name", None),
        "revision": getattr(lvlm, "revision", None),
        "fingerprint": lvlm.fingerprint,
    }
