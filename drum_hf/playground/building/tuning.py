"""ICL tuning of the playground's base LVLM by `ICLTuner`, and the variants that show what each part of it is worth."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from ...tuning import ICLTuner, ICLTuningArguments
from ...tuning.episodes import Curriculum, Mix, MixSource, Stage
from .conversations import Album, Chat, PlaygroundEpisodes

__all__ = ["CURRICULUM", "RULES", "VARIANTS", "Variant", "make_mix", "tune", "tuning_folder"]

#: Rule -> how much of it.
RULES = {
    "sites": 2.0,
    "digits": 1.0,
    "captions": 1.0,
    "names": 1.5,
    "letters": 1.0,
    "operators": 1.5,
    "counts": 1.0,
}

#: Short conversations whose answers can be copied, then longer ones with contradictions, then everything.
CURRICULUM = Curriculum(
    (
        Stage(share=1, replay=0.4, shots=(1, 4), copied=1.0, difficulty=0.0),
        Stage(share=1, replay=0.4, shots=(1, 6), copied=0.8, difficulty=0.5, distractors=0.1),
        Stage(share=2, replay=0.4, shots=(0, 12), difficulty=1.0, distractors=0.2),
    )
)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to spend the same number of steps.

    Attributes:
        about: what it is, for tables.
        episodes: whether there are any; without them it is the base with more of the same.
        coherent: whether a conversation's turns share a rule.
        replay: whether ordinary chat is in the mix.
        loss_on: "all" answers (any-shot), or the "last".
        curriculum: whether stages follow one another; otherwise all is as in the last one.
        full: all weights of decoder and projector, or LoRA adapters on them.
    """

    about: str
    episodes: bool = True
    coherent: bool = True
    replay: bool = True
    loss_on: Any = "all"
    curriculum: bool = True
    full: bool = True


VARIANTS: dict[str, Variant] = {
    "tuned": Variant("ICL tuning, all weights"),
    "base": Variant("replay alone", episodes=False),
    "lora": Variant("ICL tuning, LoRA", full=False),
    "incoherent": Variant("without coherence", coherent=False),
    "no-replay": Variant("without replay", replay=False),
    "last-answer": Variant("without any-shot loss", loss_on="last"),
    "no-curriculum": Variant("without curriculum", curriculum=False),
}


def make_mix(album: Album, variant: Variant, *, seed: int = 7) -> Mix:
    """The conversations that a variant is tuned on."""
    sources = []
    if variant.replay or not variant.episodes:
        sources.append(MixSource("chat", Chat(album, turns=(1, 6), seed=seed), kind="replay"))
    if not variant.episodes:
        return Mix(sources, seed=seed)
    for number, (rule, weight) in enumerate(RULES.items()):
        drawn = PlaygroundEpisodes(album, rule, coherent=variant.coherent, seed=seed + number)
        sources.append(MixSource(rule, drawn, weight))
    stages = CURRICULUM.stages if variant.curriculum else CURRICULUM.stages[-1:]
    if not variant.replay:
        stages = tuple(dataclasses.replace(stage, replay=None) for stage in stages)
    return Mix(sources, Curriculum(stages), seed=seed)


def tuning_folder(variant: str, start: Path, *, steps: int, seed: int) -> str:
    """Name of the folder of one tuning, so that no other is taken for it."""
    weights = hashlib.sha256((start / "model.safetensors").read_bytes()).hexdigest()
    return f"{variant}-{steps}-steps-seed-{seed}-of-{weights[:8]}"


def tune(base: str | Path, album: Album, variant: Variant, out: Path, *, steps: int, seed: int = 7) -> ICLTuner:
    """Tune the base; a stopped run goes on where it was.

    Returns:
        The tuner, done.
    """
    args = ICLTuningArguments(
        str(out),
        full=variant.full,
        loss_on=variant.loss_on,
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=7e-4 if variant.full else 3e-3,
        lora_rank=32,
        lora_alpha=64,
        lr_scheduler_type="cosine",
        warmup_steps=min(60, steps // 10),
        weight_decay=0.01,
        max_grad_norm=1.0,
        save_strategy="steps",
        save_steps=200,
        save_total_limit=1,
        logging_steps=25,
        report_to=[],
        use_cpu=True,  # as the rest of the build
        seed=seed,
    )
    tuner = ICLTuner(base, args, train_dataset=make_mix(album, variant, seed=seed))
    tuner.train(resume_from_checkpoint=tuner.last_checkpoint is not None)
    return tuner
