"""Worlds: a support set and queries whose answers only demonstrations can teach.

A world has *sites*, each told by the frame of its pictures, and each with private words of its own. A response names
what is seen and then the site's word for it: "red wugo". Another site says "red dali"; so a demonstration helps when
it shows the same value at the same site, and misleads when it comes from another site. A world is drawn from its seed:
other seeds give other words, frames, pictures and splits. Difficulties are fixed here, before methods are compared.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ..data import TripletTable
from ..types import TASKS, Task
from .language import CAPTION_PROMPTS, CLASSIFY_PROMPTS, QUESTIONS, private_words
from .scenes import ATTRIBUTES, DIGITS, FRAMES, digit_images, render_digit, render_scene

__all__ = ["DIFFICULTIES", "Difficulty", "World", "make_world", "world_rows"]


#: Digits that worlds show: the rows that the playground's models were not trained on.
_WORLD_DIGITS = slice(1, None, 2)


@dataclasses.dataclass(frozen=True)
class Difficulty:
    """How hard a world is: `sites` with words of their own, `attributes` asked, rows to demonstrate and to ask."""

    sites: int
    attributes: tuple[str, ...]
    support: int
    queries: int


DIFFICULTIES: dict[str, Difficulty] = {
    "easy": Difficulty(1, ("shape", "colour", "background"), 240, 240),
    "standard": Difficulty(8, ("shape", "colour", "background", "size", "position"), 600, 240),
    "hard": Difficulty(12, tuple(ATTRIBUTES), 720, 240),
}

#: Attributes that a house style puts into its captions; two or three of them, in the site's own order.
_CAPTIONED = ("colour", "shape", "background", "size", "position")


@dataclasses.dataclass(frozen=True)
class World:
    """A seeded task: `support` to demonstrate with, `queries` to be asked; no picture stands in both."""

    seed: int
    task: str
    difficulty: str
    support: TripletTable
    queries: TripletTable

    @property
    def metric(self) -> str:
        """Name of the metric that this task is judged by."""
        return {"vqa": "exact_match", "classification": "top1", "captioning": "cider_d"}[self.task]


class _Maker:
    def __init__(self, seed: int, task: str, difficulty: str) -> None:
        self.rng = np.random.default_rng([31_337, seed, TASKS.index(task), sorted(DIFFICULTIES).index(difficulty)])
        self.task, self.level = task, DIFFICULTIES[difficulty]
        self.frames = [str(f) for f in self.rng.choice(sorted(FRAMES), self.level.sites, replace=False)]
        self.fresh = iter(self.rng.permutation(private_words()))
        self.word: dict[tuple[str, str], str] = {}
        self.opening = {frame: str(next(self.fresh)) for frame in self.frames}
        self.style = {
            frame: [str(n) for n in self.rng.permutation(_CAPTIONED)[: self.rng.integers(2, 4)]]
            for frame in self.frames
        }
        self.digits = list(self.rng.permutation(np.arange(len(digit_images()[1]))[_WORLD_DIGITS]))

    def answer(self, frame: str, value: str) -> str:
        if (frame, value) not in self.word:
            self.word[frame, value] = str(next(self.fresh))
        return f"{value} {self.word[frame, value]}"

    def picture_rows(self, count: int) -> list[dict[str, Any]]:
        """One new picture and `count` rows about it (several only in VQA)."""
        rng = self.rng
        frame = str(rng.choice(self.frames))
        if self.task == "classification":
            row = int(self.digits.pop())
            picture = render_digit(
                row, str(rng.choice(ATTRIBUTES["colour"])), str(rng.choice(ATTRIBUTES["background"])), frame, rng
            )
            label = self.answer(frame, DIGITS[digit_images()[1][row]])
            return [{"image": picture, "prompt": CLASSIFY_PROMPTS[0], "response": label, "label": label}]
        values = {name: str(rng.choice(options)) for name, options in ATTRIBUTES.items()}
        picture = render_scene(values, frame, rng)
        if self.task == "captioning":
            pairs = [self.answer(frame, values[name]) for name in self.style[frame]]
            caption = " ".join([self.opening[frame], *pairs])
            return [{"image": picture, "prompt": CAPTION_PROMPTS[0], "response": caption}]
        names = rng.choice(self.level.attributes, count, replace=False)
        return [
            {
                "image": picture,
                "prompt": str(rng.choice(QUESTIONS[str(name)])),
                "response": self.answer(frame, values[str(name)]),
            }
            for name in names
        ]

    def teachable(self, row: dict[str, Any], known: set[str]) -> bool:
        """Whether the support set shows what this row's answer needs."""
        if self.task != "captioning":
            return row["response"] in known
        words = row["response"].split()
        return words[0] in known and all(" ".join(words[i : i + 2]) in known for i in range(1, len(words), 2))

    def known(self, rows: list[dict[str, Any]]) -> set[str]:
        if self.task != "captioning":
            return {row["response"] for row in rows}
        found: set[str] = set()
        for row in rows:
            words = row["response"].split()
            found |= {words[0], *(" ".join(words[i : i + 2]) for i in range(1, len(words), 2))}
        return found


def world_rows(difficulty: str, task: Task) -> tuple[int, int]:
    """Rows of a world's support set and of its queries."""
    level = DIFFICULTIES[difficulty]
    # half of scikit-learn's digits must do; captioning's oracle has the LVLM score every pair, so it asks half as many
    support = min(level.support, 600) if task == "classification" else level.support
    return support, level.queries // 2 if task == "captioning" else level.queries


def make_world(seed: int, *, task: Task = "vqa", difficulty: str = "standard") -> World:
    """Draw a world.

    Args:
        seed: any non-negative integer; the models' training used no world.
        task: one of `TASKS`. VQA asks two questions a support picture (its rows form a group); classification shows
            real handwritten digits (scikit-learn's, none of them a training one); captioning is in the site's style.
        difficulty: a key of `DIFFICULTIES`; `standard` and `hard` worlds have several sites.

    Every query's answer is taught by at least one row of the support set.

    Raises:
        ValueError: unknown task or difficulty.
    """
    if task not in TASKS:
        raise ValueError(f"expected a task of {', '.join(TASKS)}; got {task!r}")
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"expected a difficulty of {', '.join(DIFFICULTIES)}; got {difficulty!r}")
    maker = _Maker(seed, task, difficulty)
    prefix = f"{task}-{difficulty}-{seed}"
    support: list[dict[str, Any]] = []
    picture = 0
    rows, wanted = world_rows(difficulty, task)
    while len(support) < rows:
        for row in maker.picture_rows(2 if task == "vqa" else 1):
            support.append(row | {"id": f"{prefix}-s{len(support):04d}", "group": f"{prefix}-p{picture:04d}"})
        picture += 1
    known = maker.known(support)
    queries: list[dict[str, Any]] = []
    while len(queries) < wanted:
        (row,) = maker.picture_rows(1)
        picture += 1
        if maker.teachable(row, known):
            queries.append(row | {"id": f"{prefix}-q{len(queries):04d}", "group": f"{prefix}-p{picture:04d}"})
    return World(seed, task, difficulty, TripletTable.from_dataset(support), TripletTable.from_dataset(queries))
