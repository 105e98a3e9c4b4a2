"""Words of the playground: question wordings, the pool of private words, captions, and the tokenizers' vocabulary."""

from __future__ import annotations

import functools
import itertools
import re
import string
from collections.abc import Iterable, Mapping

import numpy as np

from .scenes import ATTRIBUTES, DIGITS, FRAMES

__all__ = [
    "CAPTION_PROMPTS",
    "CLASSIFY_PROMPTS",
    "COUNT_PROMPTS",
    "PAIR_PROMPTS",
    "QUESTIONS",
    "RESULT_PROMPT",
    "caption_for_pretraining",
    "chat_words",
    "private_words",
    "vocabulary",
]

#: Several wordings of what can be asked of a scene.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "shape": ("what shape is the object?", "name the form of the thing.", "which figure is drawn?"),
    "colour": ("what colour is the object?", "name the hue of the thing.", "which paint was used for the object?"),
    "background": ("what is the background?", "name the ground behind the thing.", "where was the picture taken?"),
    "size": ("what size is the object?", "name the extent of the thing.", "how big is it?"),
    "position": ("where is the object?", "name the place of the thing.", "which part of the picture holds it?"),
    "count": ("how many dots are there?", "name the number of dots.", "count the dots at the top."),
}
CLASSIFY_PROMPTS = ("which digit is this?", "classify the handwritten digit.")
CAPTION_PROMPTS = ("describe the picture.", "write a caption.")
#: What can be asked of two digits, in plain words ...
PAIR_PROMPTS: dict[str, tuple[str, ...]] = {
    "digits": ("which digits are these?", "read both digits."),
    "+": ("add the digits.", "what is the sum of the digits?"),
    "-": ("subtract the digits.", "what is the difference of the digits?"),
    "x": ("multiply the digits.", "what is the product of the digits?"),
}
#: ... and where only demonstrations tell what is done with them.
RESULT_PROMPT = "what is the result?"
COUNT_PROMPTS = ("how many {value} things are there?", "count the {value} things.")

_UNFORTUNATE = frozenset({"nazi", "homo", "puta", "kike", "dago", "lolo", "zero", "nine", "sofa", "tomi"})


@functools.cache
def private_words(count: int = 480) -> tuple[str, ...]:
    """The pool that worlds draw their private words from: `count` made-up four-letter words, always the same ones."""
    consonants, vowels = "bdfgklmnprstvwz", "aeiou"
    words = ["".join(w) for w in itertools.product(consonants, vowels, consonants, vowels)]
    words = [w for w in words if w not in _UNFORTUNATE]
    order = np.random.default_rng(20_241_207).permutation(len(words))
    return tuple(sorted(words[i] for i in order[:count]))


def caption_for_pretraining(values: Mapping[str, str], frame: str, rng: np.random.Generator, keep: float = 0.6) -> str:
    """A public-language caption with random parts left out, as a contrastive model is trained on.

    `values` holds a scene's attributes, or `digit`, `colour` and `background`. Now and then an unknown word is thrown
    in, as web captions have them.
    """
    kept = {name: value for name, value in values.items() if rng.random() < keep}
    if not kept:
        name = str(rng.choice(sorted(values)))
        kept = {name: values[name]}
    parts = []
    for name, value in kept.items():
        parts.append(f"{name} {value}" if rng.random() < 0.25 else value)
    rng.shuffle(parts)
    if rng.random() < keep:
        parts.insert(int(rng.integers(len(parts) + 1)), f"in a {frame} frame" if rng.random() < 0.5 else frame)
    if rng.random() < 0.3:
        parts.insert(int(rng.integers(len(parts) + 1)), str(rng.choice(private_words())))
    return " ".join(parts)


def _words_of(texts: Iterable[str]) -> set[str]:
    return {
        word for text in texts for word in re.split(rf"[\s{re.escape(string.punctuation)}]+", text.lower()) if word
    }


@functools.cache
def chat_words() -> tuple[str, ...]:
    """Whole words that only the LVLM's tokenizer knows: of arithmetic, of counting and of multiple choice."""
    texts = [w for ws in PAIR_PROMPTS.values() for w in ws] + [
        RESULT_PROMPT,
        *COUNT_PROMPTS,
        "Answer with the letter.",
    ]
    texts += [str(number) for number in range(82)] + ["Answer with the option's letter. How many things are there?"]
    return tuple(sorted(_words_of(t.format(value="") if "{" in t else t for t in texts) - set(vocabulary())))


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """Whole words that both playground tokenizers know, sorted; anything else is spelt letter by letter."""
    texts = [w for ws in QUESTIONS.values() for w in ws] + list(CLASSIFY_PROMPTS) + list(CAPTION_PROMPTS)
    texts += [v for vs in ATTRIBUTES.values() for v in vs] + list(ATTRIBUTES) + list(DIGITS) + ["digit"]
    texts += [*FRAMES, "in a frame of the and or not yes no with on at handwritten picture answer question"]
    words = set(private_words()) | set(string.punctuation)
    for text in texts:
        for mark in string.punctuation:
            text = text.replace(mark, " ")
        words.update(text.split())
    return tuple(sorted(words))
