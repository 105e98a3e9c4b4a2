"""Conversations about the playground's training pictures: ordinary chat, and episodes with something to be inferred.

`Chat` is what the base LVLM is made of, and what is replayed while it is tuned: several pictures, each asked about in
plain words and answered in plain words. Its turns have nothing in common.

Episodes teach a private rule in context, drawn anew for every conversation:

- `sites`: "value word", the word standing for a value at a site; sites contradict one another (as worlds do);
- `captions`: a house style, an opening word and then such pairs in the site's own order;
- `names`: "value word" again, a word for each of a few values, without sites;
- `letters`: the same with the words listed, and "value letter" for an answer;
- `operators`: a number stands for what one of +, - and x makes of two digits;
- `counts`: a number stands for how many things have a value, or for all things.

No episode shows a value of `HELD_OUT` (but for those of `operators`, which show every digit), and no world of
`worlds.py` is used.
"""

from __future__ import annotations

import functools
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from PIL import Image

from ...errors import TooFewDemonstrationsError
from ...evaluation.benchmarks.benchmarks import Benchmark, BenchmarkItem, name_match
from ...tuning.episodes import Contents, Conversation, EpisodeSettings, Form, Turn, choice_prompt
from ...types import ICLRequest, Query, image_key
from ..language import (
    CAPTION_PROMPTS,
    CLASSIFY_PROMPTS,
    COUNT_PROMPTS,
    PAIR_PROMPTS,
    QUESTIONS,
    RESULT_PROMPT,
    private_words,
)
from ..scenes import ATTRIBUTES
from .pretraining import PicturePool

__all__ = ["HELD_OUT", "OPERATORS", "Album", "Chat", "PlaygroundEpisodes"]

#: Values that no episode shows, so that binding them is told apart from having learnt them. Ordinary chat names them.
HELD_OUT: dict[str, tuple[str, ...]] = {
    "shape": ("cross", "star"),
    "colour": ("cyan", "purple", "white"),
    "background": ("snow", "dusk"),
    "position": ("upper", "lower"),
    "digit": ("4", "7"),
}

OPERATORS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "x": operator.mul}
ASKED = QUESTIONS | {"digit": CLASSIFY_PROMPTS}
#: What a number may count: the things that have a value, or all of them.
COUNTED = ("with", "all")
CHOICE_LETTERS = "ABCD"
#: A draw that runs out of pictures on its way is begun again so many times.
_TRIES = 50
#: What ordinary chat is about at first; once naming is learnt; and at last. The tiny LVLM hardly learns to choose.
EVERYDAY = {"name": 0.5, "describe": 0.1, "choice": 0.1, "reckon": 0.17, "count": 0.13}
DEMANDING = {"name": 0.3, "describe": 0.08, "choice": 0.22, "reckon": 0.2, "count": 0.2}
ORDINARY = {"name": 0.36, "describe": 0.08, "reckon": 0.3, "count": 0.26}
#: A group's cells show these.
_THINGS = ("shape", "colour")


class Album:
    """The training pictures by their hash, and where each kind of fact is to be found.

    Attributes:
        pixels: (N, 3, 32, 32) uint8, of all pools in order.
        values: what each shows.
        frames: the site of each; "" where it has none.
        keys: hash of each.
    """

    def __init__(self, pools: Sequence[PicturePool]) -> None:
        self.pixels = np.concatenate([pool.pixels.numpy() for pool in pools])
        self.values = [values for pool in pools for values in pool.values]
        self.frames = [frame for pool in pools for frame in pool.frames]
        self.keys = [image_key(self.picture(row)) for row in range(len(self.values))]
        self.row = {key: row for row, key in enumerate(self.keys)}
        self.scenes = np.array([i for i, v in enumerate(self.values) if "position" in v])
        self.pairs = np.array([i for i, v in enumerate(self.values) if "left" in v])
        self.groups = np.array([i for i, v in enumerate(self.values) if any(" " in name for name in v)])
        #: (attribute, value, frame) -> rows; frame "" for any
        self.cells: dict[tuple[str, str, str], list[int]] = defaultdict(list)
        self.values_of: dict[str, list[str]] = {name: list(values) for name, values in ATTRIBUTES.items()}
        self.values_of["digit"] = sorted({v["digit"] for v in self.values if "digit" in v})
        for row, (values, frame) in enumerate(zip(self.values, self.frames, strict=True)):
            if frame:
                for name, value in values.items():
                    if "digit" not in values or name == "digit":
                        self.cells[name, value, frame].append(row)
                        self.cells[name, value, ""].append(row)
        self.sites = sorted(set(self.frames) - {""})

    def __len__(self) -> int:
        return len(self.values)

    def picture(self, row: int) -> Image.Image:
        return Image.fromarray(self.pixels[row].transpose(1, 2, 0))

    def __getitem__(self, key: str) -> Image.Image:
        return self.picture(self.row[key])

    @functools.cached_property
    def without_held_out(self) -> np.ndarray:
        """(N,) bool: shows no held-out value."""
        held = {(name, value) for name, values in HELD_OUT.items() for value in values}

        def facts(values: Mapping[str, str]) -> set[tuple[str, str]]:
            return {(name.rpartition(" ")[2], value) for name, value in values.items()}

        return np.array([not facts(values) & held for values in self.values])


def things_of(values: Mapping[str, str]) -> list[dict[str, str]]:
    """The objects of a group."""
    places = sorted({name.split()[0] for name in values if " " in name})
    return [{name: values[f"{place} {name}"] for name in _THINGS} for place in places]


class _Draw:
    """One conversation under way: pictures are used once."""

    def __init__(self, album: Album, rng: np.random.Generator) -> None:
        self.album, self.rng = album, rng
        self.used: set[int] = set()
        self.turns: list[Turn] = []

    def choose(self, options: Sequence[str]) -> str:
        return options[int(self.rng.integers(len(options)))]

    def row(self, rows: Sequence[int] | np.ndarray) -> int:
        for _ in range(20 if len(rows) else 0):
            row = int(rows[int(self.rng.integers(len(rows)))])
            if row not in self.used:
                self.used.add(row)
                return row
        raise TooFewDemonstrationsError(
            f"expected another of {len(rows)} pictures for a conversation that shows {len(self.used)} already; render "
            "more, or ask for fewer shots"
        )

    def say(self, row: int, prompt: str, answer: str, concept: str = "", value: str = "") -> None:
        self.turns.append(Turn(None, prompt, answer, (), self.album.keys[row], concept, value))

    def ask(self, name: str) -> str:
        return self.choose(ASKED[name])


def _contents(album: Album, rows: Iterable[int], values: Iterable[tuple[str, str]]) -> Contents:
    return Contents({album.keys[row] for row in rows}, set(values))


class Chat:
    """Ordinary conversations in plain words, of one or several turns.

    Args:
        album: the pictures.
        turns: fewest and most.
        shares: of turns that name what is seen, describe it, choose among options, reckon with digits, and count.
        seed: other seeds draw others.
    """

    kind = "replay"

    def __init__(
        self, album: Album, *, turns: tuple[int, int] = (1, 6), shares: Mapping[str, float] = ORDINARY, seed: int = 0
    ) -> None:
        self.album, self.turns, self.shares, self.seed = album, turns, dict(shares), seed

    def draw(self, index: int, settings: EpisodeSettings | None = None, *, images: bool = True) -> Conversation:
        """Conversation number `index`; settings are for episodes and change nothing here."""
        rng = np.random.default_rng([self.seed, 21, index])
        draw = _Draw(self.album, rng)
        for _ in range(int(rng.integers(self.turns[0], self.turns[1] + 1))):
            place = int(np.searchsorted(np.cumsum(list(self.shares.values())), rng.random(), side="right"))
            place = min(place, len(self.shares) - 1)
            {"name": self.name, "describe": self.describe, "choice": self.choice, "reckon": self.reckon}.get(
                list(self.shares)[place], self.count
            )(draw)
        talk = Conversation(tuple(draw.turns), "", "", "open", kind="replay")
        return talk.with_images(self.album) if images else talk

    def contents(self) -> Contents:
        """Hashes of the pictures it may show; its turns are about no concept."""
        return _contents(self.album, range(len(self.album)), ())

    def benchmark(self, count: int) -> Benchmark:
        """The last questions of the first `count` conversations, without what came before them."""

        def request(talk: Conversation) -> ICLRequest:
            turn = talk.turns[-1]
            return ICLRequest(Query(self.album[turn.image_key], turn.prompt, id=turn.image_key))

        talks = [self.draw(index, images=False) for index in range(count)]
        items = [
            BenchmarkItem(f"{n}", 0, talk.turns[-1].answer, (), (), functools.partial(request, talk))
            for n, talk in enumerate(talks)
        ]
        return Benchmark("ordinary questions", items, scorer=name_match, max_new_tokens=8)

    def _shown(self, draw: _Draw) -> tuple[str, str, int]:
        name = draw.choose(list(ASKED))
        value = draw.choose(self.album.values_of[name])
        return name, value, draw.row(self.album.cells[name, value, ""])

    def name(self, draw: _Draw) -> None:
        name, value, row = self._shown(draw)
        draw.say(row, draw.ask(name), value)

    def describe(self, draw: _Draw) -> None:
        row = draw.row(self.album.scenes)
        values = self.album.values[row]
        draw.say(row, draw.choose(CAPTION_PROMPTS), " ".join(values[n] for n in ("colour", "shape", "background")))

    def choice(self, draw: _Draw) -> None:
        name, value, row = self._shown(draw)
        others = [v for v in self.album.values_of[name] if v != value]
        others = [others[i] for i in draw.rng.permutation(len(others))[: draw.rng.integers(1, 4)]]
        options = [value, *others]
        options = [options[i] for i in draw.rng.permutation(len(options))]
        draw.say(row, choice_prompt(draw.ask(name), options), CHOICE_LETTERS[options.index(value)])

    def reckon(self, draw: _Draw) -> None:
        row = draw.row(self.album.pairs)
        left, right = (self.album.values[row][side] for side in ("left", "right"))
        what = draw.choose(list(PAIR_PROMPTS))
        prompt = draw.choose(PAIR_PROMPTS[what])
        if what == "digits":
            draw.say(row, prompt, f"{left} {right}")
        else:
            large, small = max(int(left), int(right)), min(int(left), int(right))
            draw.say(row, prompt, str(OPERATORS[what](large, small)))

    def count(self, draw: _Draw) -> None:
        row = draw.row(self.album.groups)
        things = things_of(self.album.values[row])
        if draw.rng.random() < 0.2:
            draw.say(row, "How many things are there?", str(len(things)))
            return
        name = draw.choose(_THINGS)
        # as often a value that is there as any
        value = draw.choose([t[name] for t in things] if draw.rng.random() < 0.7 else list(ATTRIBUTES[name]))
        prompt = draw.choose(COUNT_PROMPTS).format(value=value)
        draw.say(row, prompt, str(sum(t[name] == value for t in things)))


class PlaygroundEpisodes:
    """Episodes of one kind, drawn as settings say; see the module.

    Of the settings, `shots` holds for all. In sites, digits, names and letters, `copied` is how often the last turn is
    made to bring back an earlier one (others may by chance); in sites, `distractors` is how often a turn that brings
    nothing back draws its attribute anew; `difficulty` bounds sites, ways and what counts count.

    Args:
        album: the pictures.
        rule: "sites", "digits" (sites of handwritten digits), "captions", "names", "letters", "operators", "counts".
        settings: how conversations are drawn, unless a curriculum says it.
        coherent: False draws every turn of a conversation under a rule of its own: nothing is to be inferred.
        seed: other seeds draw others.
    """

    kind = "episode"

    def __init__(
        self,
        album: Album,
        rule: str,
        settings: EpisodeSettings | None = None,
        *,
        coherent: bool = True,
        seed: int = 0,
    ) -> None:
        self.album, self.rule, self.coherent, self.seed = album, rule, coherent, seed
        self.settings = settings or EpisodeSettings()
        makers: dict[str, Callable[[_Draw, int, EpisodeSettings], None]] = {
            "sites": functools.partial(self._sites, names=tuple(ATTRIBUTES)),
            "digits": functools.partial(self._sites, names=("digit",)),
            "captions": self._captions,
            "names": functools.partial(self._names, listed=False),
            "letters": functools.partial(self._names, listed=True),
            "operators": self._operators,
            "counts": self._counts,
        }
        self.make = makers[rule]
        allowed = album.without_held_out
        self.cells = {cell: [r for r in rows if allowed[r]] for cell, rows in album.cells.items()}
        self.cells = {cell: rows for cell, rows in self.cells.items() if rows}
        self.values_of = {
            name: [v for v in values if v not in HELD_OUT.get(name, ())] for name, values in album.values_of.items()
        }
        self.groups = album.groups[allowed[album.groups]]
        self.differ = self._telling_pairs()

    def _telling_pairs(self) -> np.ndarray:
        """Pairs on which no two operators agree."""
        found = []
        for row in self.album.pairs:
            left, right = (int(self.album.values[row][side]) for side in ("left", "right"))
            large, small = max(left, right), min(left, right)
            if left >= right and len({f(large, small) for f in OPERATORS.values()}) == len(OPERATORS):
                found.append(row)
        return np.array(found)

    def draw(self, index: int, settings: EpisodeSettings | None = None, *, images: bool = True) -> Conversation:
        """Conversation number `index`, the same whenever it is drawn."""
        settings = settings or self.settings
        rng = np.random.default_rng([self.seed, 22, index])
        turns = int(rng.integers(settings.shots[0], settings.shots[1] + 1)) + 1
        draw = self._turns(rng, turns, settings)
        last = draw.turns[-1]
        forms: dict[str, Form] = {"letters": "choice", "captions": "caption"}
        talk = Conversation(tuple(draw.turns), last.concept, last.value, forms.get(self.rule, "open"), self.rule)
        return talk.with_images(self.album) if images else talk

    def _turns(self, rng: np.random.Generator, turns: int, settings: EpisodeSettings) -> _Draw:
        for tries in range(_TRIES):
            draw = _Draw(self.album, rng)
            try:
                for _ in range(1 if self.coherent else turns):
                    self.make(draw, turns if self.coherent else 1, settings)
                return draw
            except TooFewDemonstrationsError:  # a value of few pictures came up too often
                if tries == _TRIES - 1:
                    raise
        raise AssertionError("unreachable")

    def contents(self) -> Contents:
        """Hashes of the pictures, and the (concept, value) pairs, that episodes may show."""
        if self.rule == "operators":
            return _contents(self.album, self.differ, (("operator", symbol) for symbol in OPERATORS))
        if self.rule == "counts":
            return _contents(self.album, self.groups, (("count", rule) for rule in COUNTED))
        digits, scenes = ("digit",), tuple(ATTRIBUTES)
        names = {"digits": digits, "sites": scenes, "captions": scenes}.get(self.rule, (*scenes, *digits))
        rows = {row for (name, _, _), own in self.cells.items() if name in names for row in own}
        if self.rule == "captions":
            return _contents(self.album, rows, (("site", site) for site in self.album.sites))
        return _contents(self.album, rows, ((name, value) for name in names for value in self.values_of[name]))

    def _sites(self, draw: _Draw, turns: int, settings: EpisodeSettings, names: tuple[str, ...]) -> None:
        """Answers "value word". Half of the conversations bring back mostly what was said last, as any talk does."""
        rng = draw.rng
        sites = [
            str(f) for f in rng.choice(self.album.sites, rng.integers(1, 2 + round(3 * settings.difficulty)), False)
        ]
        fresh = iter(rng.permutation(private_words()))
        word: dict[tuple[str, str], str] = {}
        cells: list[tuple[str, str, str]] = []
        local = rng.random() < 0.5
        main = draw.choose(names)
        again = rng.uniform(0.3, 0.9)
        for number in range(turns):
            last = number == turns - 1
            back = again if settings.copied is None or not last else settings.copied
            if cells and rng.random() < back:
                place = min(int(rng.geometric(0.4)), len(cells)) if local else int(rng.integers(len(cells))) + 1
                name, value, site = cells[-place]
                if not (last and settings.copied) and rng.random() < (0.3 if local else 0.15):
                    site = draw.choose(sites)
            else:
                name = draw.choose(names) if rng.random() < settings.distractors else main
                value, site = draw.choose(self.values_of[name]), draw.choose(sites)
            cells.append((name, value, site))
            if (site, value) not in word:
                word[site, value] = str(next(fresh))
            row = draw.row(self.cells.get((name, value, site), ()))
            draw.say(row, draw.ask(name), f"{value} {word[site, value]}", name, value)

    def _captions(self, draw: _Draw, turns: int, settings: EpisodeSettings) -> None:
        """An opening word, then two or three "value word" pairs in the site's own order."""
        rng = draw.rng
        count = 1 if rng.random() < 1 - 0.4 * settings.difficulty else 2
        sites = [str(f) for f in rng.choice(self.album.sites, count, replace=False)]
        fresh = iter(rng.permutation(private_words()))
        names = np.array(["colour", "shape", "background", "size", "position"])
        styles = {site: [str(n) for n in rng.permutation(names)[: rng.integers(2, 4)]] for site in sites}
        opening = {site: str(next(fresh)) for site in sites}
        word: dict[tuple[str, str], str] = {}
        previous: dict[str, int] = {}
        for _ in range(turns):
            site = draw.choose(sites)
            if site in previous and rng.random() < 0.6:
                # share one value with an earlier picture of the site, as retrieved demonstrations do
                name = draw.choose(styles[site])
                value = self.album.values[previous[site]][name]
            else:
                name = styles[site][0]
                value = draw.choose(self.values_of[name])
            row = draw.row(self.cells.get((name, value, site)) or self.cells[name, value, ""])
            answer = [opening[site]]
            for name in styles[site]:
                value = self.album.values[row][name]
                if (site, value) not in word:
                    word[site, value] = str(next(fresh))
                answer += [value, word[site, value]]
            previous[site] = row
            draw.say(row, draw.choose(CAPTION_PROMPTS), " ".join(answer), "site", site)

    def _names(self, draw: _Draw, turns: int, settings: EpisodeSettings, listed: bool) -> None:
        """A word stands for each of a few values; "value word" is the answer, or "value letter" of listed words."""
        rng = draw.rng
        name = draw.choose(list(ASKED))
        values = self.values_of[name]
        ways = min(len(values), int(rng.integers(2, 3 + round(2 * settings.difficulty))))
        chosen = [values[i] for i in rng.permutation(len(values))[:ways]]
        words = [str(w) for w in rng.choice(private_words(), ways, replace=False)]
        prompt = draw.ask(name)
        if listed:
            prompt = choice_prompt(prompt, words)
        told: list[int] = []
        for number in range(turns):
            which = int(rng.integers(ways))
            if number == turns - 1 and settings.copied is not None and told:
                again = rng.random() < settings.copied
                fitting = [w for w in range(ways) if (w in told) == again]
                which = fitting[int(rng.integers(len(fitting)))] if fitting else which
            told.append(which)
            row = draw.row(self.cells[name, chosen[which], ""])
            word = CHOICE_LETTERS[which] if listed else words[which]
            draw.say(row, prompt, f"{chosen[which]} {word}", name, chosen[which])

    def _operators(self, draw: _Draw, turns: int, settings: EpisodeSettings) -> None:
        """The result of one of three operators."""
        symbol = draw.choose(list(OPERATORS))
        for _ in range(turns):
            row = draw.row(self.differ)
            left, right = (int(self.album.values[row][side]) for side in ("left", "right"))
            draw.say(row, RESULT_PROMPT, str(OPERATORS[symbol](left, right)), "operator", symbol)

    def _counts(self, draw: _Draw, turns: int, settings: EpisodeSettings) -> None:
        """How many things have a value, or how many there are."""
        rule = draw.choose(COUNTED[: 1 + round(settings.difficulty)])
        for _ in range(turns):
            row = draw.row(self.groups)
            things = things_of(self.album.values[row])
            name = draw.choose(_THINGS)
            value = draw.choose([t[name] for t in things] if draw.rng.random() < 0.7 else self.values_of[name])
            count = sum(t[name] == value for t in things)
            answer = {"with": count, "all": len(things)}[rule]
            draw.say(row, f"{name}: {value}", str(answer), "count", rule)
