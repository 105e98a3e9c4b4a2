"""`ICLTuner`: a platform trainer that teaches an LVLM to use demonstrations."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from datasets import Dataset
from torch.nn import functional
from transformers import Trainer, TrainerCallback, set_seed

from ..errors import SavedFileError
from ..lvlm.local.model import TransformersLVLM
from ..lvlm.local.processors import load_processor
from ..training.checkpoints import WholeCheckpoints, last_checkpoint
from ..utils.files import replacing_folder, write_text
from ..utils.hub import commit_folder, commit_of, make_repository
from ..utils.manifest import MANIFEST, write_manifest
from ..utils.optional import loading, local_name, public_name, resolve_name
from ..utils.safe_models import ADAPTER_CONFIG, MODEL_FILES, find_model
from .arguments import ICLTuningArguments
from .card import render_tuned_card
from .collator import MASKED, ConversationCollator, ConversationFormat
from .episodes import Conversation, Mix, MixReport, check_disjoint
from .modules import add_lora, freeze_vision
from .sampling import Conversations, LengthSampler, as_conversations, describe

__all__ = ["ICLTuner", "TuningData"]

logger = logging.getLogger(__name__)

#: From how many conversations on a check shows its progress.
_BAR_FROM = 1000

#: The sum of all losses so far, in a checkpoint.
_LOSSES = "losses.json"

Data: TypeAlias = Mix | Sequence[Conversation] | Sequence[Mapping[str, Any]] | Dataset

#: Arguments that the manifest of a tuned LVLM tells.
_TOLD = (
    "full", "lora_rank", "lora_alpha", "lora_dropout", "loss_on", "max_length", "conversations", "image_position",
    "system", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TuningData:
    """What was found when every conversation was looked at before training.

    Attributes:
        report: the make-up of the conversations.
        lengths: tokens of each, in order.
        answer_tokens: tokens that the loss falls on, in all.
        max_length: tokens that a conversation may have, or None.
    """

    report: MixReport
    lengths: list[int]
    answer_tokens: int
    max_length: int | None

    @property
    def tokens(self) -> int:
        """Tokens of all conversations."""
        return sum(self.lengths)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the single lengths."""
        return {
            **self.report.to_dict(),
            "tokens": self.tokens,
            "answer_tokens": self.answer_tokens,
            "longest": max(self.lengths),
            "max_length": self.max_length,
        }

    def __str__(self) -> str:
        limit = "no limit" if self.max_length is None else f"{self.max_length:,} fit"
        return (
            f"{self.report}\n{self.tokens:,} tokens, {self.answer_tokens:,} of them answers; the longest conversation "
            f"has {max(self.lengths):,} ({limit}): nothing is cut"
        )


class ICLTuner(WholeCheckpoints, Trainer):
    """Tunes an LVLM on in-context conversations, so that it learns to use what its context shows.

    The loss falls on every answer of a conversation, so that turn k trains k - 1 shots; instructions are masked. By
    default LoRA adapters on decoder and projector are trained, with `args.full` all of their weights; the vision tower
    is frozen. Logits are computed where answers stand and nowhere else.

    Every conversation is looked at before training starts (`check`): one that does not fit the context, or whose
    images and slots differ in number, is an error that names it.

    Args:
        model: folder or Hub id ("playground/lvlm" ships with the package), or a model, which is tuned in place.
        args: `ICLTuningArguments`.
        processor: of a model that is given as such.
        train_dataset: a `Mix`, drawn as its curriculum says while training goes on; or conversations, or rows of chat
            messages as `read_messages` takes them, passed `num_train_epochs` times.
        eval_dataset: conversations or rows, whose loss is the evaluation; or several of them by name.
        revision, dtype, trust_remote_code, model_kwargs: for loading a model by name; weights are loaded in float32
            where all are trained, and as they were saved where adapters are.
        callbacks, optimizers: the platform's.

    Resuming (`train(resume_from_checkpoint=True)`) goes on in the same conversations, bit for bit.

    Source: "Towards Multimodal In-Context Learning for Vision & Language Models" (arXiv 2403.12736); numbers of
    `ICLTuningArguments` are our choice.

    Raises:
        ChatTemplateError: the processor has no chat template, or one that loses texts or images.
        ValueError: the model's decoder and vision tower can't be told apart, or no end of a mix is known.
    """

    args: ICLTuningArguments

    def __init__(
        self,
        model: str | os.PathLike[str] | Any,
        args: ICLTuningArguments | None = None,
        *,
        train_dataset: Data | None = None,
        eval_dataset: Any = None,
        processor: Any = None,
        revision: str | None = None,
        dtype: Any = None,
        trust_remote_code: bool = False,
        model_kwargs: Mapping[str, Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = args or ICLTuningArguments(output_dir="icl-tuning-output")
        commit: str | None = None
        if isinstance(model, (str, os.PathLike)):
            given, model_kwargs = model, dict(model_kwargs or {})
            model, processor, name = _load(
                model, processor, args.full, revision, dtype, trust_remote_code, model_kwargs
            )
            commit = commit_of(resolve_name(given), revision=revision, cache_dir=model_kwargs.get("cache_dir"))
        else:
            if processor is None:
                raise ValueError("expected the processor of a model that is given as such; pass processor=")
            name = local_name(getattr(model, "name_or_path", "") or type(model).__name__)
        #: What is tuned: folder or Hub id, and the commit it was at.
        self.base_model: str = name
        self.base_revision: str | None = commit
        # The template is tried, the padding token set and the context measured as when the LVLM is used.
        lvlm = TransformersLVLM(
            model,
            processor,
            name=name,
            image_position=_position(args.image_position),
            system=args.system,
            chat_template_kwargs=args.chat_template_kwargs,
            image_budget=args.image_budget,
        )
        limits = [limit for limit in (args.max_length, lvlm.context_length) if limit is not None]
        self.format = ConversationFormat(lvlm.format, loss_on=args.loss_on, max_length=min(limits, default=None))
        set_seed(args.seed)  # adapters begin by chance
        if args.full:
            freeze_vision(model)
        else:
            model = add_lora(
                model,
                rank=args.lora_rank,
                alpha=args.lora_alpha,
                dropout=args.lora_dropout,
                target_modules=args.target_modules,
                base=name,
                revision=self.base_revision,
            )
        train: Any = None
        if train_dataset is not None:
            batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
            train = as_conversations(train_dataset, args.conversations or _at_least_1(args.max_steps * batch))
            if train.in_order:
                args.num_train_epochs = 1.0
        evaluated: Any = eval_dataset
        if isinstance(eval_dataset, Mapping):
            evaluated = {key: as_conversations(value) for key, value in eval_dataset.items()}
        elif eval_dataset is not None:
            evaluated = as_conversations(eval_dataset)
        self._checked: dict[int, TuningData] = {}
        self._publishing = False
        self._losses: Any = 0.0
        # The platform turns it off for training, in the configuration that would be saved.
        self._use_cache: bool = getattr(model.config, "use_cache", True)
        collate: Any = ConversationCollator(self.format)
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=train,
            eval_dataset=evaluated,
            processing_class=processor,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = True  # `compute_loss` divides by the number of answers' tokens itself

    # ---- before training ----

    def check(self, dataset: Conversations | None = None) -> TuningData:
        """Look at every conversation, and find it fit to train on.

        Pictures are opened once each for their sizes, and don't pass the processor.

        Args:
            dataset: default: the training conversations.

        Raises:
            ContextOverflowError: a conversation does not fit; the message names it.
            RowError, ImageError, ChatTemplateError: a conversation can't be used; the message names it.
        """
        talks: Any = self.train_dataset if dataset is None else dataset
        if talks is None:
            raise ValueError("expected conversations to check, got none; pass train_dataset=")
        if id(talks) not in self._checked:
            self._checked[id(talks)] = self._check(talks)
        return self._checked[id(talks)]

    def _check(self, talks: Conversations) -> TuningData:
        from tqdm.auto import tqdm

        numbers: Any = range(len(talks))
        if len(talks) >= _BAR_FROM:
            numbers = tqdm(numbers, desc="checking conversations", unit="conversation")
        sizes: dict[str, tuple[int, int]] = {}
        lengths, seen, answers = [], [], 0
        for number in numbers:
            talk = talks.talk(number, images=False)
            keys = [turn.image_key for turn in talk.turns if turn.image_key]
            if not sizes.keys() >= set(keys):
                shown = talks.talk(number)
                sizes.update(zip(keys, (image.size for image in shown.images), strict=True))
            tokens = self.format(talk, [sizes[key] for key in keys], describe(number, talk))
            lengths.append(len(tokens.ids))
            answers += tokens.answer_tokens
            seen.append(talk)
        return TuningData(MixReport.of(seen), lengths, answers, self.format.max_length)

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint in the output folder that was written to its end; `train(True)` goes on from it."""
        return last_checkpoint(self.args.output_dir or ".")

    def train(  # type: ignore[override]  # the platform's other arguments are among kwargs
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> Any:
        """As `transformers.Trainer.train`, once every conversation has been checked.

        `resume_from_checkpoint=True` goes on from the last checkpoint that was written to its end.

        Raises:
            LeakError: a picture to evaluate on is trained on, and `args.on_leak` is "raise".
            ContextOverflowError, RowError, ImageError, ChatTemplateError: see `check`.
        """
        self.check()
        train: Any = self.train_dataset
        given: Any = self.eval_dataset
        evaluated = given if isinstance(given, dict) else {"": given}
        for dataset in evaluated.values():
            if dataset is not None:
                self.check(dataset)
                check_disjoint(train.origin, dataset.origin, on_leak=self.args.on_leak)
        if self.is_world_process_zero():
            logger.info("tuning %s on %d conversations", self.base_model, len(train))
        if resume_from_checkpoint is True:
            last = self.last_checkpoint
            if last is None:
                raise SavedFileError(
                    f"expected a checkpoint in {self.args.output_dir} that was written to its end, found none; train "
                    "without resuming"
                )
            resume_from_checkpoint = str(last)
        self._losses = 0.0
        if resume_from_checkpoint:
            self._losses = _read_losses(Path(resume_from_checkpoint) / _LOSSES)
        output = super().train(resume_from_checkpoint, **kwargs)
        # The platform's mean is of the steps since the run was taken up.
        mean = float(self._losses) / max(1, self.state.global_step)
        return output._replace(training_loss=mean, metrics={**output.metrics, "train_loss": mean})

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the platform's; losses are summed up for the mean of the whole run."""
        loss = super().training_step(*args, **kwargs)
        self._losses = self._losses + loss.detach().double()
        return loss

    def save_state_beside(self, checkpoint: Path) -> None:
        """Write the sum of all losses so far into a checkpoint."""
        (checkpoint / _LOSSES).write_text(json.dumps(float(self._losses)), encoding="utf-8")

    # ---- the platform's hooks ----

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        talks: Any = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        return LengthSampler(
            self.check(talks).lengths if strategy == "group_by_length" else None,
            len(talks),
            batch_size=self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
            shuffle=not talks.in_order and strategy != "sequential",
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return LengthSampler(None, len(eval_dataset), batch_size=1, shuffle=False, seed=0)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Mean cross-entropy of the answers' tokens, over all of an optimizer step's.

        Logits are asked for only at positions that predict a labelled token of some row.
        """
        labels = inputs["labels"]
        given = {key: value for key, value in inputs.items() if key != "labels"}
        predicting = (labels[:, 1:] != MASKED).any(dim=0).nonzero().flatten()
        outputs = model(**given, logits_to_keep=predicting, use_cache=False)
        targets = labels[:, predicting + 1]
        loss = functional.cross_entropy(
            outputs.logits.float().flatten(0, 1),
            targets.flatten(),
            ignore_index=MASKED,
            reduction="sum",
            label_smoothing=self.args.label_smoothing_factor,
        )
        if num_items_in_batch is None:
            loss = loss / (targets != MASKED).sum()
        else:
            loss = loss / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # the platform averages gradients over processes
        return (loss, outputs) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        config: Any = self.accelerator.unwrap_model(self.model).config
        trained = config.use_cache
        config.use_cache = self._use_cache
        try:
            super()._save(output_dir, state_dict)
        finally:
            config.use_cache = trained
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir or ".")
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, and nothing reads it
            noted = folder / ADAPTER_CONFIG
            if (self._publishing or self.args.push_to_hub) and noted.is_file():
                config = json.loads(noted.read_text(encoding="utf-8"))
                config["base_model_name_or_path"] = public_name(self.base_model)
                noted.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
            self._describe(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card of the tuned LVLM into the output folder; what the platform would say is left out."""
        if self.is_world_process_zero():
            write_text(Path(self.args.output_dir or ".") / "README.md", self._card())

    # ---- what comes out ----

    def save_pretrained(self, folder: str | os.PathLike[str], *, merged: bool = False) -> None:
        """Write the adapter (or, where all weights were trained, the model), the processor, a card and a manifest.

        They replace an earlier save in that folder at once, so that a kill at any moment leaves the old or the new.

        `TransformersLVLM.from_pretrained(base, adapter=folder)` reads an adapter; a merged or fully tuned model is
        read as any other, `TransformersLVLM.from_pretrained(folder)`.

        Args:
            merged: write the whole model with the adapter in its weights.
        """
        with replacing_folder(folder, owns=(*MODEL_FILES, "README.md", MANIFEST)) as partial:
            if not merged or self.args.full:
                self._save(os.fspath(partial))
                return
            self._merged().save_pretrained(partial)
            self.processing_class.save_pretrained(partial)  # type: ignore[union-attr]
            self._describe(partial, adapter=False)

    def push_to_hub(self, *args: Any, merged: bool = False, **kwargs: Any) -> Any:
        """As `transformers.Trainer.push_to_hub`; of a base model in a folder of this machine, the last name goes.

        Args:
            merged: upload the whole model with the adapter in its weights; of the platform's arguments only
                `commit_message`, `token`, `revision`, `private` and `create_pr` then count.

        Returns:
            What the platform does; with `merged` the address of the commit.
        """
        if not merged or self.args.full:
            self._publishing = True
            try:
                return super().push_to_hub(*args, **kwargs)
            finally:
                self._publishing = False
        return self._push_merged(*args, **kwargs)

    def _push_merged(
        self,
        commit_message: str = "End of training",
        *,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        create_pr: bool = False,
    ) -> str:
        token = token or self.args.hub_token
        private = self.args.hub_private_repo if private is None else private
        name = self.args.hub_model_id or Path(self.args.output_dir or ".").resolve().name
        repo_id = make_repository(name, private=private, token=token)
        with tempfile.TemporaryDirectory() as made:
            self.save_pretrained(made, merged=True)
            return commit_folder(
                repo_id,
                Path(made),
                message=commit_message,
                replaces=("adapter_*", "*.safetensors"),
                token=token,
                revision=revision or self.args.hub_revision,
                create_pr=create_pr,
            )

    def lvlm(self, **kwargs: Any) -> TransformersLVLM:
        """The LVLM as it is tuned by now, in a copy that further training leaves alone.

        Args:
            kwargs: for `TransformersLVLM`.
        """
        shown = {"image_position": _position(self.args.image_position), "system": self.args.system}
        shown |= {"chat_template_kwargs": self.args.chat_template_kwargs, "image_budget": self.args.image_budget}
        kwargs = {**shown, **kwargs}
        name = kwargs.pop("name", f"{self.base_model} tuned for {self.state.global_step} steps")
        return TransformersLVLM(self._merged(), self.processing_class, name=name, **kwargs)

    def _merged(self) -> Any:
        model: Any = copy.deepcopy(self.accelerator.unwrap_model(self.model))
        model = model if self.args.full else model.merge_and_unload()
        model.config.use_cache = self._use_cache
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        return model

    def _describe(self, folder: Path, adapter: bool | None = None) -> None:
        """The card of what lies in a folder, and the manifest of what made it."""
        write_text(folder / "README.md", self._card(adapter))
        write_manifest(
            folder,
            seed=self.args.seed,
            lvlm={"name": self.base_model, "revision": self.base_revision},
            settings={name: getattr(self.args, name) for name in _TOLD} | {"steps": self.state.global_step},
        )

    def _card(self, adapter: bool | None = None) -> str:
        losses = [entry["eval_loss"] for entry in self.state.log_history if "eval_loss" in entry]
        training: dict[str, Any] = {
            "steps": self.state.global_step,
            "loss_on": f"{self.args.loss_on} answers" if self.args.loss_on == "all" else "last answer",
            "learning_rate": self.args.learning_rate,
            "seed": self.args.seed,
        }
        if not self.args.full:
            training |= {"LoRA_rank": self.args.lora_rank, "LoRA_alpha": self.args.lora_alpha}
        if losses:
            training["evaluation_loss"] = losses[-1]
        found = self._checked.get(id(self.train_dataset))
        rows: list[dict[str, Any]] = []
        if found is not None:
            training |= {"conversations": found.report.conversations, "turns": found.report.turns}
            sources = found.report.counts["source"]
            rows = [{"source": source or "unnamed", "conversations": n} for source, n in sources.items()]
        is_local = os.path.isdir(resolve_name(self.base_model))
        return render_tuned_card(
            {
                "repo_id": self.hub_model_id if self.args.push_to_hub else self.args.hub_model_id,
                "base_model": self.base_model,
                "base_is_local": is_local,
                "base_revision": self.base_revision,
                "adapter": not self.args.full if adapter is None else adapter,
                "training": training,
                "mix": rows,
            }
        )


def _load(
    name: str | os.PathLike[str],
    processor: Any,
    full: bool,
    revision: str | None,
    dtype: Any,
    trust_remote_code: bool,
    model_kwargs: dict[str, Any],
) -> tuple[Any, Any, str]:
    from transformers import AutoModelForImageTextToText

    # Steps this small would vanish in half precision.
    dtype = dtype or (torch.float32 if full else "auto")
    with loading("an LVLM", name):
        source = find_model(name, revision=revision, trust_remote_code=trust_remote_code)
        options = {**source.options, **source.weights, **model_kwargs}
        model: Any = AutoModelForImageTextToText.from_pretrained(source.place, dtype=dtype, **options)
        processor = processor or load_processor(source.place, model.config, **source.options)
    return model, processor, local_name(name)


def _read_losses(path: Path) -> float:
    try:
        return float(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # a checkpoint from before it was kept
        logger.warning("%s can't be read: the mean loss will be that of the steps from here on", path)
        return 0.0


def _position(name: str) -> Any:
    return name


def _at_least_1(count: int) -> int | None:
    return count if count > 0 else None
