"""The official VQA rule once more, character by character from its definition, as an oracle."""

from __future__ import annotations

import random
from collections.abc import Sequence

MARKS = set(';/[]"{}()=+\\_-><@`,?!')
NUMBERS = ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
#: Contractions as they are written without one of their apostrophes, and what they become.
SHORT_FORMS = {
    "aint": "ain't",
    "cant": "can't",
    "couldntve": "couldntve",  # two are missing, and stay so
    "couldnt've": "couldn't've",
    "couldn'tve": "couldn't've",
    "dont": "don't",
    "hes": "he's",
    "hows": "how's",
    "im": "im",  # the table has these with a capital, which lower-cased words never meet
    "ive": "ive",
    "isnt": "isn't",
    "its": "its",
    "lets": "lets",
    "oclock": "o'clock",
    "somebody'd": "somebodyd",
    "somebodyd": "somebodyd",
    "thats": "that's",
    "theyre": "they're",
    "twas": "'twas",
    "we'dve": "we'd've",
    "whos": "who's",
    "wont": "won't",
    "y'allll": "y'all'll",
    "yall'd've": "y'all'd've",
    "youll": "you'll",
}


def cleaned(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalized(text: str) -> str:
    def neighbours(i: int) -> tuple[str, str]:
        return text[i - 1 : i], text[i + 1 : i + 2]

    def between_digits(i: int) -> bool:
        before, after = neighbours(i)
        return before.isdecimal() and after.isdecimal()

    by_a_space = {mark for i, mark in enumerate(text) if mark in MARKS and " " in neighbours(i)}
    if any(mark == "," and between_digits(i) for i, mark in enumerate(text)):
        by_a_space = MARKS
    kept = "".join(c if c not in MARKS else "" if c in by_a_space else " " for c in text)
    periods = 0
    characters = []
    for i, character in enumerate(kept):
        if character == "." and not kept[i + 1 : i + 2].isdecimal() and periods < 32:
            periods += 1
        else:
            characters.append(character)
    words = []
    for word in "".join(characters).lower().split():
        if word in NUMBERS:
            word = str(max(0, NUMBERS.index(word) - 1))
        if word not in ("a", "an", "the"):
            words.append(SHORT_FORMS.get(word, word))
    return " ".join(words)


def accuracy(prediction: str, references: Sequence[str], *, official: bool = False) -> float:
    """Mean over the annotators of min(1, the others who gave the prediction / 3)."""
    given, *gold = map(cleaned, (prediction, *references))
    if not official or any(text != gold[0] for text in gold):
        given, gold = normalized(given), [normalized(text) for text in gold]
    shares = []
    for left_out in range(len(gold)):
        agreeing = [text for i, text in enumerate(gold) if i != left_out and text == given]
        shares.append(min(1.0, len(agreeing) / 3))
    return sum(shares) / len(shares)


WORDS = ["a", "an", "the", "A", "The", "dog", "dogs", "Dark", "blue", "yes", "No", "left", *NUMBERS, *SHORT_FORMS]
NUMERALS = ["3", "10", "1,000", "2.5", ".5", "3.", "12:30", "1/2", "10,000", "$5", "50%", "3,4,5", "٣,٤"]
JOINTS = [" ", " ", " ", "  ", ", ", ",", " / ", "/", "-", " -", ".", ". ", "\n", "\t", "; ", "'", "(", ") ", "!", "?"]


def random_answer(rng: random.Random) -> str:
    """An answer of a few words, numbers and marks, as annotators and LVLMs write them, and worse."""
    parts: list[str] = []
    for _ in range(rng.choice([0, 1, 1, 1, 2, 2, 3, 5])):
        word = rng.choice(NUMERALS) if rng.random() < 0.2 else rng.choice(WORDS)
        if rng.random() < 0.15:
            word = rng.choice([word.upper(), word.capitalize(), word + rng.choice([*MARKS, "."]), "." * 40])
        parts += [word, rng.choice(JOINTS)]
    return "".join(parts[:-1] if rng.random() < 0.8 else parts)


def variants(text: str, rng: random.Random) -> str:
    """The same answer as another annotator might write it, or another answer."""
    changes = [text, text, text.upper(), f"the {text}", f"{text}.", f" {text}\n", text.replace(" ", "-")]
    return rng.choice([*changes, random_answer(rng)])
