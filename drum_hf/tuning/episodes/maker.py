"""From a concept-labelled table to conversations whose turns share one concept."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...data.rows import LETTERS, shorten
from ...errors import ColumnError, TooFewDemonstrationsError
from ...utils.text import normalize_text
from .draw import MadeUpWords, Pool, choice_prompt, distinct, fills, pick, pick_values, shuffled
from .settings import EpisodeSettings, is_share
from .tables import ConceptRow, ConceptTable, Contents
from .types import FORMS, Conversation, Form, Turn

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

# Texts of a turn where the table has none: our choice.
QUESTION = "What is the {concept} here?"
NEUTRAL_QUESTION = "What is it?"
OPTIONS_QUESTION = "Which description fits the image?"
CAPTION_PROMPT = "Describe the image."

_TRIES = 50  # a draw that runs out of pictures on its way is begun again so many times


class Episodes:
    """Conversations drawn from a table: turns that share a concept, no picture twice, forms and shots varied.

    `episodes[i]` is a function of the table, the seed and `i` alone, so any worker can draw any conversation. There is
    no end to them: `stream` and `to_dataset` say how many, and give none twice. Concepts that can't fill the longest
    conversation of the settings are left out, which the log says.

    Args:
        table: what pictures show.
        settings: how conversations are drawn.
        concepts: the table's concepts to draw, or None for all.
        questions: concept -> how to ask for it, where rows bring no question.
        difficulty: concept -> from 0 (easy) to 1, where known. Otherwise a concept is as hard as its number of values
            ranks among the others: two values are easier than two hundred.
        seed: other seeds give other conversations.
        source: the name of the data, noted in every conversation.

    Raises:
        ColumnError: a concept is not in the table, or has one value only.
        TooFewDemonstrationsError: no concept has enough pictures (or captions) for `settings`.

    Example:
        >>> from PIL import Image
        >>> colours = "red", "blue", "green"
        >>> rows = [{"image": Image.new("RGB", (4, 4), c), "concepts": {"colour": c}} for c in colours]
        >>> episodes = Episodes(ConceptTable.from_dataset(rows), EpisodeSettings(shots=2, forms="open"), seed=1)
        >>> talk = episodes[0]
        >>> talk.concept, talk.shots, sorted(turn.answer for turn in talk.turns)
        ('colour', 2, ['blue', 'green', 'red'])
        >>> talk.turns[0].prompt
        'What is the colour here?'
    """

    kind = "episode"

    def __init__(
        self,
        table: ConceptTable,
        settings: EpisodeSettings | None = None,
        *,
        concepts: Sequence[str] | None = None,
        questions: Mapping[str, str] | None = None,
        difficulty: Mapping[str, float] | None = None,
        seed: int = 0,
        source: str = "",
    ) -> None:
        self.table = table
        self.settings = settings or EpisodeSettings()
        self.seed = seed
        self.source = source
        found = table.concepts
        chosen = list(found) if concepts is None else list(dict.fromkeys(concepts))
        for what, names in (("concepts", chosen), ("questions", questions or ()), ("difficulty", difficulty or ())):
            unknown = [name for name in names if name not in found]
            if unknown:
                raise ColumnError(
                    f"{what}= names {shorten([repr(n) for n in unknown])}, the table's concepts are "
                    f"{shorten([repr(n) for n in found])}; correct the name"
                )
        for concept in chosen:
            if len(found[concept]) < 2:
                raise ColumnError(
                    f"expected at least two values of concept {concept!r}, got only {next(iter(found[concept]))!r}: "
                    "nothing is to be inferred; add rows with other values, or choose others with concepts="
                )
        self._questions = {c: (questions or {}).get(c, QUESTION.format(concept=c)) for c in chosen}
        given = {c: (difficulty or {}).get(c) for c in chosen}
        if bad := [f"{c}: {d!r}" for c, d in given.items() if d is not None and not is_share(d)]:
            raise ValueError(f"expected difficulty from 0 to 1 for each concept, got {shorten(bad)}")
        counts = sorted({len(found[concept]) for concept in chosen})
        rank = {count: place / max(len(counts) - 1, 1) for place, count in enumerate(counts)}
        self.difficulty = {c: float(rank[len(found[c])] if (d := given[c]) is None else d) for c in chosen}
        self._pools = {(c, form): self._pool(c, form == "caption") for c in chosen for form in FORMS}
        self._drawable: dict[EpisodeSettings, dict[str, tuple[Form, ...]]] = {}
        self.check(self.settings)

    def _pool(self, concept: str, captions: bool) -> Pool:
        by_value: dict[str, list[int]] = {}
        for number, row in enumerate(self.table.rows):
            if concept in row.concepts and (row.caption or not captions):
                by_value.setdefault(row.concepts[concept], []).append(number)
        keys = {value: {self.table.rows[n].image_key for n in own} for value, own in by_value.items()}
        rows = [number for own in by_value.values() for number in own]
        return Pool(by_value, rows, {v: len(own) for v, own in keys.items()}, len(set().union(*keys.values())))

    def __repr__(self) -> str:
        return f"Episodes({self.table!r}, {self.settings!r}, seed={self.seed})"

    def contents(self) -> Contents:
        """Hashes of the pictures and the (concept, value) pairs that conversations may show."""
        rows = [(row, {c: v for c, v in row.concepts.items() if c in self.difficulty}) for row in self.table.rows]
        images = {row.image_key for row, known in rows if known}
        return Contents(images, {pair for _, known in rows for pair in known.items()})

    def check(self, settings: EpisodeSettings) -> dict[str, tuple[Form, ...]]:
        """Concept -> the forms in which the longest conversation of `settings` can be filled.

        Raises:
            TooFewDemonstrationsError: there is no such concept.
        """
        if settings not in self._drawable:
            hardest = max(settings.difficulty, min(self.difficulty.values()))
            drawable = {
                concept: forms
                for concept, difficulty in self.difficulty.items()
                if difficulty <= hardest
                and (forms := tuple(f for f in settings.forms if fills(self._pools[concept, f], settings)))
            }
            if not drawable:
                raise self._unfilled(settings)
            short = [c for c, level in self.difficulty.items() if level <= hardest and c not in drawable]
            if short:
                message = "%d of %d concepts can't fill %d turns by %s and are left out: %s"
                turns = settings.shots[1] + 1
                logger.warning(message, len(short), len(self.difficulty), turns, settings, shorten(short))
            self._drawable[settings] = drawable
        return self._drawable[settings]

    def _unfilled(self, settings: EpisodeSettings) -> TooFewDemonstrationsError:
        best = max(self.difficulty, key=lambda concept: self._pools[concept, "open"].all_images)
        pool, captions = self._pools[best, "open"], self._pools[best, "caption"].all_images
        return TooFewDemonstrationsError(
            f"expected a concept whose pictures fill an episode of {settings.shots[1] + 1} turns by {settings}; the "
            f"largest, {best!r}, has {pool.all_images} different pictures ({captions} with a caption) of "
            f"{len(pool.by_value)} values, at most {max(pool.images.values())} of one; give more rows, or ask for "
            "fewer shots, other ways, copied or forms"
        )

    # Drawing

    def __getitem__(self, index: int) -> Conversation:
        if index < 0:
            raise IndexError(f"expected an index of at least 0, got {index}")
        return self.draw(index)

    def __iter__(self) -> Iterator[Conversation]:
        return self.stream()

    def draw(self, index: int, settings: EpisodeSettings | None = None, *, images: bool = True) -> Conversation:
        """Conversation number `index`, the same whenever it is drawn.

        Args:
            index: at least 0.
            settings: in place of the maker's own.
            images: False leaves the pictures out, which is much faster: for counting and comparing.

        Raises:
            TooFewDemonstrationsError: it can't be filled.
        """
        settings = settings or self.settings
        rng = np.random.default_rng([self.seed, index])
        drawable = self.check(settings)
        for _ in range(_TRIES):
            concept = pick(rng, list(drawable))
            form = pick(rng, drawable[concept])
            picked = self._pick_rows(rng, concept, form, settings)
            if picked is not None:
                return self._converse(rng, concept, form, picked, settings, images)
        raise self._unfilled(settings)

    def stream(self, count: int | None = None, *, images: bool = True) -> Iterator[Conversation]:
        """Conversations 0, 1, 2, … without those that came before; `count` of them, or no end.

        Raises:
            TooFewDemonstrationsError: there are no more different ones.
        """
        return distinct((self.draw(index, images=images) for index in itertools.count()), count)

    def to_dataset(self, count: int) -> datasets.Dataset:
        """The first `count` of `stream` as a table of chat messages and images, in memory."""
        from .episode_list import to_dataset

        return to_dataset(self.stream(count))

    def _pick_rows(
        self, rng: np.random.Generator, name: str, form: Form, settings: EpisodeSettings
    ) -> list[tuple[str, int]] | None:
        """(concept, row) of each turn; None where pictures ran out on the way."""
        turns = int(rng.integers(settings.shots[0], settings.shots[1] + 1)) + 1
        others = [c for c in self.difficulty if c != name and self._pools[c, form].rows]
        off = [
            bool(others) and 0 < place < turns - 1 and rng.random() < settings.distractors for place in range(turns)
        ]
        taken: set[str] = set()
        own = self._pick_own(rng, self._pools[name, form], settings, turns - sum(off), taken)
        if None in own:
            return None
        picked: list[tuple[str, int]] = []
        for is_off in off:
            concept = pick(rng, others) if is_off else name
            number = self._free(rng, self._pools[concept, form].rows, taken) if is_off else own.pop(0)
            if number is None:
                return None
            picked.append((concept, number))
        return picked

    def _pick_own(
        self, rng: np.random.Generator, pool: Pool, settings: EpisodeSettings, turns: int, taken: set[str]
    ) -> list[int | None]:
        """Rows about the concept, the last one for the last turn; None for a turn without a free picture."""
        copied = None if settings.copied is None or turns == 1 else bool(rng.random() < settings.copied)
        if settings.ways is None and copied is None:
            return [self._free(rng, pool.rows, taken) for _ in range(turns)]
        values = pick_values(rng, pool.images, turns, settings.ways or (1, turns), copied)
        return [self._free(rng, pool.by_value[value], taken) for value in values]

    def _free(self, rng: np.random.Generator, numbers: list[int], taken: set[str]) -> int | None:
        """A row whose picture isn't taken yet, and is from now on."""
        keys = self.table.rows
        for _ in range(8):  # nearly always the first is free; only then is it worth to look at all
            if numbers and keys[number := pick(rng, numbers)].image_key not in taken:
                taken.add(keys[number].image_key)
                return number
        free = [number for number in numbers if keys[number].image_key not in taken]
        if not free:
            return None
        number = pick(rng, free)
        taken.add(keys[number].image_key)
        return number

    # Texts

    def _converse(
        self,
        rng: np.random.Generator,
        concept: str,
        form: Form,
        picked: list[tuple[str, int]],
        settings: EpisodeSettings,
        images: bool,
    ) -> Conversation:
        alone = all(about == concept for about, _ in picked)
        unnamed = form != "caption" and alone and rng.random() < settings.unnamed
        renamed = form != "caption" and rng.random() < settings.renamed
        words = MadeUpWords(rng) if renamed else None
        shown: dict[str, list[str]] = {}  # concept -> the values that the conversation shows
        for about, number in picked:
            values = shown.setdefault(about, [])
            value = self.table.rows[number].concepts[about]
            if value not in values:
                values.append(value)
        size = int(rng.integers(settings.options[0], settings.options[1] + 1))
        turns = []
        options: tuple[str, ...]
        for about, number in picked:
            row = self.table.rows[number]
            value = row.concepts[about]
            if form == "caption":
                prompt, answer, options = CAPTION_PROMPT, row.caption, ()
            else:
                prompt, answer, options = self._ask(row, about, form, own=not (unnamed or renamed))
                if unnamed:
                    prompt = NEUTRAL_QUESTION
                if form == "choice" and not options:
                    options = self._make_options(rng, about, value, shown[about], size)
                if words is not None:
                    answer, options = words[about, answer], tuple(words[about, option] for option in options)
            if form == "choice":
                options = tuple(options[i] for i in rng.permutation(len(options)))
                prompt = choice_prompt(prompt, options)
                answer = LETTERS[options.index(answer)]
            else:
                options = ()
            turns.append(Turn(None, prompt, answer, options, row.image_key, about, value))
        talk = Conversation(tuple(turns), concept, turns[-1].value, form, self.source)
        if not images:
            return talk
        rows = {self.table.rows[number].image_key: self.table.rows[number] for _, number in picked}
        return talk.with_images({key: self.table.image(row) for key, row in rows.items()})

    def _ask(self, row: ConceptRow, concept: str, form: Form, *, own: bool) -> tuple[str, str, tuple[str, ...]]:
        """Question, answer and options: the row's own where they are about the concept; () for options to be made."""
        value = row.concepts[concept]
        is_value = normalize_text(row.answer) in (normalize_text(value), "")
        if own and (len(row.concepts) == 1 or is_value):
            if form == "choice" and row.options:
                return row.question or OPTIONS_QUESTION, row.answer, row.options
            if row.question and (form == "open" or is_value):
                return row.question, value if is_value else row.answer, ()
        return self._questions[concept], value, ()

    def _make_options(
        self, rng: np.random.Generator, concept: str, value: str, shown: list[str], size: int
    ) -> tuple[str, ...]:
        """The right value and others: those that the conversation shows first, then any of the concept's."""
        others = [v for v in shuffled(rng, shown) if v != value][: size - 1]
        if len(others) < size - 1:
            rest = [v for v in self._pools[concept, "open"].by_value if v != value and v not in others]
            others += [rest[i] for i in rng.permutation(len(rest))[: size - 1 - len(others)]]
        return (value, *others)
