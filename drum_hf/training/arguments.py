"""`DrumTrainingArguments`: sentence-transformers' training arguments and what DRUM adds."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from sentence_transformers import SentenceTransformerTrainingArguments

from ..scores.sharding import Processes
from .losses import InBatch, Weighting, check_loss
from .methods import Method
from .mining import FIRST_RANDOM_SHARE, SET_LEVEL_WEIGHT

__all__ = ["DrumTrainingArguments", "own_arguments"]


def _help(default: Any, text: str) -> Any:
    """A field with a line for `--help`."""
    return dataclasses.field(default=default, metadata={"help": text})


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
        loss: name of the loss: "listwise" (DRUM), "contrastive" (EPR), "listnet" (LLM-R's KL), "lambda", "ranknet",
            "listmle", "plistmle", "adr-mse", "margin-mse", or what `register_loss` has named. A contrastive loss also
            draws contrastive lists. What else sets an ancestor apart from DRUM is in
            `drum_hf.training.methods.METHODS`.
        loss_kwargs: more settings of that loss, such as {"scheme": "lambdarank"} of "lambda".
        weighting: of the pairs of the list-wise loss: "utility" (ours), "rank" (UDR's paper), "position" (UDR's code).
        rank_weight: lambda, the share of the list's own loss beside the in-batch term; UDR's value 0.8.
        in_batch: targets of the in-batch term: "soft" (ours) or "best" (UDR); see `LVLMLoss`.
        temperature: where the learnable temperature starts; our choice.
        pool_ends: how many of a pool count as its best and its worst when lists are sampled; UDR's and EPR's value 5.
        ends_once: a list holds exactly one of the best and one of the worst, as in UDR. Off: the rest of a list is
            drawn from all others (our choice).
        hard_candidates: a list holds one that retriever and LVLM disagree on, where the pool has one; our choice (UDR
            draws without).
        hard_negatives: of a contrastive list, at most so many of the worst; EPR and MSIER take 1. None: list_size - 1.
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
        eval_candidates: demonstrations of each query of `eval_dataset` that the LVLM scores, once, when training
            begins; the evaluations rank these. Half of them are proposed by the retriever as it is then, half random.
        eval_strategy, load_best_model_at_end etc. are the platform's. `metric_for_best_model` is "ndcg" by default.
    """

    # read by the platform, which parses such a field where it is text
    _VALID_DICT_FIELDS = [*SentenceTransformerTrainingArguments._VALID_DICT_FIELDS, "loss_kwargs"]  # noqa: RUF012

    rounds: int = _help(3, "passes of mine -> score -> train")
    epochs_per_round: int = _help(3, "epochs over the queries in each round")
    candidates_per_round: int = _help(10, "new pairs a query buys in a round")
    set_level_rounds: int = _help(1, "last rounds, scored at set level")
    set_level_weight: float = dataclasses.field(
        default=SET_LEVEL_WEIGHT, metadata={"help": "weight of set-level scores"}
    )
    random_share: float = dataclasses.field(
        default=FIRST_RANDOM_SHARE, metadata={"help": "random share of the first round's candidates"}
    )
    list_size: int = _help(8, "candidates sampled for a query in a step")
    loss: str = dataclasses.field(
        default="listwise",
        metadata={"help": "listwise (DRUM), contrastive (EPR), listnet, lambda, ranknet, listmle, …"},
    )
    loss_kwargs: dict[str, Any] | str | None = dataclasses.field(
        default=None, metadata={"help": 'more settings of the loss, as JSON: {"k": 3}'}
    )
    weighting: Weighting = dataclasses.field(
        default="utility", metadata={"help": "of the list-wise loss's pairs: utility, rank, position"}
    )
    rank_weight: float = dataclasses.field(
        default=0.8, metadata={"help": "share of the list's loss beside the in-batch term"}
    )
    in_batch: InBatch = dataclasses.field(
        default="soft", metadata={"help": "in-batch targets: soft (ours) or best (UDR)"}
    )
    temperature: float = _help(0.05, "start of the learnable temperature")
    pool_ends: int = _help(5, "how many count as a pool's best and worst")
    ends_once: bool = dataclasses.field(
        default=False, metadata={"help": "exactly one of the best and one of the worst in a list, as in UDR"}
    )
    hard_candidates: bool = _help(True, "a hard candidate in every list")
    hard_negatives: int | None = dataclasses.field(
        default=None, metadata={"help": "negatives of a contrastive list; EPR and MSIER take 1"}
    )
    mine_once: bool = _help(False, "buy all rounds' pairs in the first one")
    frozen_candidates: bool = _help(False, "train the queries' side alone")
    mini_batch_size: int | None = dataclasses.field(
        default=None, metadata={"help": "items in a chunk of gradient caching"}
    )
    draft_tokens: int = _help(32, "length of a training query's draft")
    gather_negatives: bool = _help(True, "in-batch negatives of all processes")
    score_store: str | None = _help(None, "SQLite file of LVLM scores")
    cascade_keep: float = _help(1.0, "share of pairs that the LVLM scores")
    eval_candidates: int = dataclasses.field(
        default=20, metadata={"help": "demonstrations scored for each evaluation query"}
    )

    def __post_init__(self) -> None:
        least = {"rounds": 1, "epochs_per_round": 1, "candidates_per_round": 1, "list_size": 2, "pool_ends": 1}
        least |= {"set_level_rounds": 0, "eval_candidates": 2, "hard_negatives": 1}
        for name, value in least.items():
            given = getattr(self, name)
            if given is not None and given < value:
                raise ValueError(f"expected {name} of at least {value}; got {given}")
        for name in ("set_level_weight", "random_share", "rank_weight"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"expected {name} between 0 and 1; got {getattr(self, name)}")
        if not 0.0 < self.cascade_keep <= 1.0:
            raise ValueError(f"expected cascade_keep above 0 and up to 1; got {self.cascade_keep}")
        check_loss(self.loss)
        if self.mine_once:  # once it is done, there is one round, and doing it again changes nothing
            self.random_share /= self.rounds
            self.candidates_per_round *= self.rounds
            self.epochs_per_round *= self.rounds
            self.rounds = 1
        if self.dataloader_persistent_workers:
            raise ValueError(
                "expected dataloader_persistent_workers=False, since such workers never see a later round's "
                "candidates; got True"
            )
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "ndcg"
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
