"""CIDEr-D for captions, with the Penn Treebank tokenizer that it is usually reported with, without Java.

CIDEr-D (Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation", CVPR 2015) compares a caption with
its references by TF-IDF weighted n-grams; the "D" variant clips counts and penalises a difference in length.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
import regex

from ..errors import RowError

__all__ = ["cider_d", "ptb_tokenize"]

# What the official wrapper drops after tokenizing. Brackets come out as "-lrb-" and the like and stay: its list has
# them in upper case and is compared with lower-cased tokens, and published numbers have been computed so.
_DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_ASCII = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "--", "—": "--", "…": "..."}
    | dict.fromkeys("\x1c\x1d\x1e\x1f", " ")  # white space to Python, not to `regex`
)

# Words that keep their full stop.
_ABBREVIATIONS = """
    adm al apr ariz assn asst atty aug ave bhd bldg blvd bros calif capt cf cmdr co col colo comdr conn corp cos cpl ct
    dec dept det dr drs esq est etc ext feb fla fri ft ga gen gov hon inc ind insp jan jr jul jun kan ky lt ltd maj mar
    md messrs mfg mich minn mme mo mon mont mr mrs ms mt neb nev nov oct okla ph\\.d plc pres prof pvt rd rep rev sen
    sep sept sgt sq sr st supt tel tenn thu thurs tue tues univ va vs vt wed wis
"""
_BEFORE_NUMBER = "ca fig figs no nos op pp"  # these keep it only before a number

#: A letter, digit, combining mark or joiner: words of any script that writes spaces stay whole, as in CoreNLP.
_WORD = r"[\w\p{M}\u200c\u200d]"
_CONTRACTION = r"(?:n't|'(?:s|m|d|re|ve|ll))"
_TOKEN = regex.compile(
    rf"""
    (?:https?://|www\.)\S*\w
  | '\d0s\b | 'n' | 't(?=(?:is|was)\b)                  # '80s, rock 'n' roll, 'tis
  | (?<!\S){_CONTRACTION}\b                             # split already: the man 's hat
  | (?:[^\W\d_]\.)+ (?!\w)                              # initials and acronyms: J., U.S., p.m.
  | \b(?:{"|".join(_ABBREVIATIONS.split())})\. (?!\w)
  | \b(?:{"|".join(_BEFORE_NUMBER.split())})\. (?=\s*\d)
  | (?-i:[A-Z]+&[A-Z]+)(?:'s)?\b                        # AT&T, AT&T's
  | (?<!\S)[@\#][^\W\d]{_WORD}*                         # @user, #tag
  | (?:(?<!\S)[+-](?=\.?\d))? (?:(?<!\w)\.(?=\d))? {_WORD}+  # word or number, then what joins on to it
    (?: (?<=\d)[.,:]\d+ | [-/.@]{_WORD}+ | '(?=[^\W\d_]) {_WORD}+ )*
  | \.{{3,}} | -{{2,}} | [!?]+ | \*+ | \S
    """,
    regex.VERBOSE | regex.IGNORECASE,
)
_SUFFIX = regex.compile(rf"(.+)({_CONTRACTION})")
_SPLIT_WORDS = {
    "cannot": ("can", "not"),
    "gimme": ("gim", "me"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "lemme": ("lem", "me"),
    "wanna": ("wan", "na"),
    "y'all": ("y'", "all"),
}


def ptb_tokenize(text: str) -> list[str]:
    """Split a caption into lower-case Penn Treebank tokens and drop punctuation, as CIDEr is usually reported.

    Follows the Stanford tokenizer behind the official caption evaluation: contractions are split ("does n't"),
    hyphenated words, numbers, acronyms and common abbreviations stay whole. Text is put into Unicode's composed form
    (NFC) first. Where words are not set apart by spaces (Thai, Chinese, …) a run of letters is one token: segment such
    text yourself and pass `tokens=True` to `cider_d`. Emoticons, mark-up and rare abbreviations may come out
    differently.

    >>> ptb_tokenize("A half-eaten cake isn't on Dr. Who's table, is it?")
    ['a', 'half-eaten', 'cake', 'is', "n't", 'on', 'dr.', 'who', "'s", 'table', 'is', 'it']
    """
    tokens: list[str] = []
    for match in _TOKEN.finditer(unicodedata.normalize("NFC", text).translate(_ASCII)):
        token = match.group().lower()
        if not token.strip('-."'):
            continue
        suffixes: list[str] = []
        while found := _SUFFIX.fullmatch(token):
            token = found.group(1)
            suffixes.append(found.group(2))
        tokens += _SPLIT_WORDS.get(token, (_BRACKETS.get(token, token),))
        tokens += reversed(suffixes)
    return [token for token in tokens if token not in _DROPPED]


def cider_d(
    predictions: Sequence[str] | Sequence[Sequence[str]],
    references: Sequence[Sequence[str]] | Sequence[Sequence[Sequence[str]]],
    *,
    n: int = 4,
    sigma: float = 6.0,
    tokens: bool = False,
) -> np.ndarray:
    """CIDEr-D of each caption against its references.

    Document frequencies come from the references given, so an item's score depends on the whole evaluated set; with
    a single item, or for n-grams that every item's references hold, the weights and so the scores are 0.

    Scale: 0 to 10 an item, higher is better; a corpus score is the mean, and papers report 100 times that mean (a
    "CIDEr of 120" is a mean of 1.2 here).

    Args:
        predictions: one caption an item.
        references: the gold captions of each item, at least one.
        n: longest n-gram (the paper's value).
        sigma: width, in tokens, of the Gaussian penalty on the difference in length (the paper's value).
        tokens: captions and references are lists of tokens already; otherwise `ptb_tokenize` splits them.

    Returns:
        float64 array of shape (len(predictions),).

    Raises:
        RowError: an item has no reference, or a string stands where a list of references (or of tokens) should.
        ValueError: as many predictions as references were expected; n or sigma is not positive.

    >>> cats = ["a cat sleeps on a mat", "the cat is asleep"]
    >>> cider_d(["a cat sleeps on a mat", "a dog"], [cats[:1], ["two birds sing"]]).round(6).tolist()
    [10.0, 0.0]
    """
    if n < 1 or not sigma > 0:
        raise ValueError(f"expected n >= 1 and sigma > 0, got n={n} and sigma={sigma}; the paper's are 4 and 6.0")
    check_items(predictions, references)
    hypotheses = [_ngram_counts(_tokens(text, tokens, i), n) for i, text in enumerate(predictions)]
    gold = [[_ngram_counts(_tokens(text, tokens, i), n) for text in texts] for i, texts in enumerate(references)]

    frequency: Counter[tuple[str, ...]] = Counter()
    for counts in gold:
        frequency.update({ngram for _, orders in counts for order in orders for ngram in order})
    log_items = math.log(max(1, len(gold)))
    weight = {ngram: log_items - math.log(df) for ngram, df in frequency.items()}

    scores = np.zeros(len(hypotheses))
    for i, ((length, orders), counts) in enumerate(zip(hypotheses, gold, strict=True)):
        vector = _tf_idf(orders, weight, log_items)
        total = 0.0
        for gold_length, gold_orders in counts:
            cosines = _clipped_cosines(vector, _tf_idf(gold_orders, weight, log_items))
            total += cosines * math.exp(-((length - gold_length) ** 2) / (2 * sigma**2))
        scores[i] = 10.0 * total / (n * len(counts))
    return scores


def check_items(predictions: Sequence[object], references: Sequence[Sequence[object]]) -> None:
    """Raise where predictions and references don't pair up, or an item's references are missing or a bare string."""
    if len(predictions) != len(references):
        raise ValueError(
            f"expected as many predictions as lists of references, got {len(predictions)} and {len(references)}; "
            "pass one list of references for each prediction, in the same order"
        )
    for i, item in enumerate(references):
        if isinstance(item, str):
            raise RowError(f"references of item {i} are the string {item!r}; expected a list: pass [{item!r}]")
        if len(item) == 0:
            raise RowError(f"item {i} has no reference; give it at least one gold answer or leave the item out")


def _tokens(text: str | Sequence[str], tokenized: bool, item: int) -> Sequence[str]:
    if isinstance(text, str) == tokenized:
        expected, remedy = ("a list of tokens", "leave tokens=False") if tokenized else ("a string", "set tokens=True")
        raise RowError(f"item {item}: expected {expected}, got {text!r}; {remedy} or convert it")
    return ptb_tokenize(text) if isinstance(text, str) else text


def _ngram_counts(tokens: Sequence[str], n: int) -> tuple[int, list[Counter[tuple[str, ...]]]]:
    """Length of a caption and its n-gram counts by order. The official length is the number of bigrams."""
    words = tuple(tokens)
    orders = [Counter(words[i : i + k] for i in range(len(words) - k + 1)) for k in range(1, n + 1)]
    return max(0, len(words) - 1), orders


def _tf_idf(
    orders: list[Counter[tuple[str, ...]]], weight: dict[tuple[str, ...], float], unseen: float
) -> list[dict[tuple[str, ...], float]]:
    return [{ngram: count * weight.get(ngram, unseen) for ngram, count in order.items()} for order in orders]


def _clipped_cosines(
    hypothesis: list[dict[tuple[str, ...], float]], reference: list[dict[tuple[str, ...], float]]
) -> float:
    """Sum over n-gram orders of Σ min(h, r)·r / (‖h‖‖r‖); an order without weight counts 0."""
    total = 0.0
    for h, r in zip(hypothesis, reference, strict=True):
        norms = math.sqrt(sum(v * v for v in h.values())) * math.sqrt(sum(v * v for v in r.values()))
        if norms > 0:
            total += sum(min(value, r[ngram]) * r[ngram] for ngram, value in h.items() if ngram in r) / norms
    return total
