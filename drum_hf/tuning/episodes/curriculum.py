"""A curriculum as data: which conversations are drawn as training goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from .settings import EpisodeSettings, is_share


@dataclasses.dataclass(frozen=True)
class Stage(EpisodeSettings):
    """A part of training, and how its episodes are drawn: every field of `EpisodeSettings`, and two more.

    Attributes:
        share: how long it lasts, beside the others' shares.
        replay: share of ordinary instruction data among its conversations, or None for what the sources' weights say.

    Raises:
        ValueError: a field is out of its range; the message names it.
    """

    share: float = 1.0
    replay: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            isinstance(self.share, bool)
            or not isinstance(self.share, (int, float))
            or not 0 < self.share < float("inf")
        ):
            raise ValueError(f"expected share above 0, got {self.share!r}")
        if not (self.replay is None or is_share(self.replay)):
            raise ValueError(f"expected replay between 0 and 1, got {self.replay!r}")


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """Stages of training, first to last.

    Example:
        >>> plan = Curriculum.from_dict([{"share": 1, "shots": [0, 2], "copied": 1.0}, {"share": 3, "shots": [0, 8]}])
        >>> plan.at(0.2).shots, plan.at(0.3).shots, plan.at(1.0).shots
        ((0, 2), (0, 8), (0, 8))
        >>> plan == Curriculum.from_dict(plan.to_dict())
        True
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages:
            raise ValueError("expected at least one stage in a curriculum, got none; give one, or no curriculum")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Curriculum:
        """From {"stages": [...]} or the list alone, each stage a mapping of `Stage`'s fields, as YAML holds it.

        Raises:
            ValueError: a key is unknown, or a value out of range; the message names the stage.
        """
        stages: Any = data
        if isinstance(data, Mapping):
            if set(data) != {"stages"}:
                raise ValueError(f"expected a curriculum with the key 'stages' only, got {', '.join(map(repr, data))}")
            stages = data["stages"]
        known = [field.name for field in dataclasses.fields(Stage)]
        made = []
        for number, stage in enumerate(stages):
            unknown = [repr(key) for key in stage if key not in known]
            if unknown:
                raise ValueError(f"stage {number}: expected keys among {', '.join(known)}, got {', '.join(unknown)}")
            try:
                made.append(Stage(**stage))
            except ValueError as error:
                raise ValueError(f"stage {number}: {error}") from error
        return cls(tuple(made))

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads: lists, numbers and texts only, without what is as by default."""
        default = Stage()
        stages = []
        for stage in self.stages:
            changed = {f.name: getattr(stage, f.name) for f in dataclasses.fields(stage)}
            changed = {name: value for name, value in changed.items() if value != getattr(default, name)}
            stages.append({name: list(v) if isinstance(v, tuple) else v for name, v in changed.items()})
        return {"stages": stages}

    def number_at(self, progress: float) -> int:
        """Number of the stage at a progress from 0 (begin) to 1 (end of training).

        Raises:
            ValueError: the progress is outside.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"expected a progress from 0 to 1, got {progress!r}")
        left = progress * sum(stage.share for stage in self.stages)
        for number, stage in enumerate(self.stages):
            left -= stage.share
            if left < 0:
                return number
        return len(self.stages) - 1

    def at(self, progress: float) -> Stage:
        """The stage at a progress from 0 to 1."""
        return self.stages[self.number_at(progress)]


#: Copied answers in short conversations, then new ones and distractors, then everything: our choice.
DEFAULT_CURRICULUM = Curriculum(
    (
        Stage(share=1, replay=0.3, shots=(1, 2), ways=(1, 2), copied=1.0, difficulty=0.5),
        Stage(share=1, replay=0.3, shots=(1, 4), copied=0.7, distractors=0.1, difficulty=0.8),
        Stage(share=2, replay=0.3, shots=(0, 8), distractors=0.2),
    )
)
