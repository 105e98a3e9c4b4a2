"""`ICLTuningArguments`: the platform's training arguments and what ICL tuning adds."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Literal

from transformers import TrainingArguments

from .collator import LossOn

__all__ = ["ICLTuningArguments"]


@dataclasses.dataclass
class ICLTuningArguments(TrainingArguments):
    """transformers' training arguments and what ICL tuning adds.

    Every default is our choice: the paper's are not known to us.

    Args:
        full: train all weights of decoder and projector rather than LoRA adapters on them.
        lora_rank, lora_alpha, lora_dropout: of the adapters.
        target_modules: names of the modules that get adapters, as peft's; by default the linear layers of decoder and
            projector. The vision tower is frozen.
        loss_on: "all" answers of a conversation, so that it trains every number of shots, or the "last" one only.
        max_length: tokens that a conversation may have; by default what the model's context holds. A longer one is an
            error before training starts.
        conversations: how many to draw from a `Mix`; by default what `max_steps` steps take. A mix is passed once.
        image_position: a turn's image before ("first") or after ("last") its text; as when the LVLM is used.
        system: text of a system turn, or None; as when the LVLM is used.
        chat_template_kwargs, image_budget: of `TransformersLVLM`; as when the LVLM is used.
        on_leak: what happens where pictures to evaluate on are trained on: "raise", "warn" or "ignore".
        learning_rate: 2e-4 for adapters and 2e-5 for all weights.
        train_sampling_strategy: "group_by_length", which keeps a curriculum's order but for a few batches, or
            "random" (a curriculum's order for a mix), or "sequential".
    """

    full: bool = dataclasses.field(default=False, metadata={"help": "train all weights of decoder and projector"})
    lora_rank: int = dataclasses.field(default=16, metadata={"help": "rank of the adapters"})
    lora_alpha: int = dataclasses.field(default=32, metadata={"help": "scale of the adapters, times their rank"})
    lora_dropout: float = dataclasses.field(default=0.0, metadata={"help": "dropout before the adapters"})
    target_modules: list[str] | None = dataclasses.field(default=None, metadata={"help": "modules with adapters"})
    loss_on: LossOn = dataclasses.field(default="all", metadata={"help": "all answers, or the last"})
    max_length: int | None = dataclasses.field(default=None, metadata={"help": "tokens a conversation may have"})
    conversations: int | None = dataclasses.field(default=None, metadata={"help": "how many to draw from a mix"})
    image_position: str = dataclasses.field(default="first", metadata={"help": "image first or last in a turn"})
    system: str | None = dataclasses.field(default=None, metadata={"help": "text of a system turn"})
    chat_template_kwargs: dict[str, Any] | None = dataclasses.field(
        default=None, metadata={"help": "variables of the chat template"}
    )
    image_budget: Any = dataclasses.field(default="auto", metadata={"help": "how closely images are looked at"})
    on_leak: Literal["raise", "warn", "ignore"] = dataclasses.field(
        default="raise", metadata={"help": "raise, warn or ignore: pictures both trained and evaluated on"}
    )
    learning_rate: float | None = dataclasses.field(default=None, metadata={"help": "2e-4, or 2e-5 with full"})  # type: ignore[assignment]
    train_sampling_strategy: str = dataclasses.field(
        default="group_by_length", metadata={"help": "group_by_length, random or sequential"}
    )

    def __post_init__(self) -> None:
        for name in ("lora_rank", "lora_alpha", "max_length", "conversations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"expected {name} of at least 1, got {value}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"expected lora_dropout from 0 to below 1, got {self.lora_dropout}")
        for name, known in (("loss_on", ("all", "last")), ("image_position", ("first", "last"))):
            if getattr(self, name) not in known:
                raise ValueError(f"expected {name} one of {known}, got {getattr(self, name)!r}")
        if self.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                "train_sampling_strategy='batch_rebalance' lets batches differ in size, which a curriculum's progress "
                "does not know of; use 'group_by_length'"
            )
        if self.conversations is not None and self.max_steps > 0:
            raise ValueError(
                f"expected conversations or max_steps, which says how many are drawn, got {self.conversations} and "
                f"{self.max_steps}; leave one out"
            )
        if self.learning_rate is None:
            self.learning_rate = 2e-5 if self.full else 2e-4
        import torch

        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # without it the platform would start that many trainings beside one another
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False  # there is nothing to pin for, and torch would warn
        # Items are conversations, not columns; what the loss needs is made by the collator.
        self.remove_unused_columns = False
        self.label_names = ["labels"]
        self.prediction_loss_only = True
        super().__post_init__()
