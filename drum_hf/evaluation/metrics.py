"""How good answers and rankings are: pure functions, a registry of them, and `evaluate.Metric` subclasses.

`VQAAccuracy`, `ExactMatch`, `Top1Accuracy` and `CIDErD` are `evaluate.Metric` subclasses that need no Hub: make one
and call `compute`. They are built on first access, so that importing this module stays light.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..errors import DuplicateIdError, RowError
from .cider import check_items, cider_d

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = [  # noqa: F822 (the evaluate.Metric subclasses come from __getattr__)
    "CIDErD",
    "ExactMatch",
    "METRICS",
    "Metric",
    "Top1Accuracy",
    "VQAAccuracy",
    "cider_d",
    "exact_match",
    "get_metric",
    "ndcg_at_k",
    "normalize_vqa_answer",
    "recall_at_k",
    "top1",
    "vqa_accuracy",
]

# --- answers -------------------------------------------------------------------------------------------------------

_VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
# The official pattern. Its lookbehind is misspelt, a lookahead that always holds: periods before a digit stay, all
# others go, also those after one ("3." is "3").
_VQA_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
_VQA_PERIOD_LIMIT = 32  # the official call passes the flag re.UNICODE, 32, where a count belongs
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_VQA_NUMBERS = {"none": "0", **{word: str(value) for value, word in enumerate(_NUMBER_WORDS.split())}}
_ARTICLES = frozenset(["a", "an", "the"])
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
# The official table restores one missing apostrophe, wherever it is missing, and has one entry the wrong way round.
_VQA_CONTRACTIONS = {
    full[:i] + full[i + 1 :]: full
    for full in _CONTRACTED.split()
    for i, character in enumerate(full)
    if character == "'"
} | {"somebody'd": "somebodyd"}


def normalize_vqa_answer(text: str) -> str:
    """Normalise an answer as the official VQA evaluation does, its two slips included.

    Newlines and tabs to spaces; each of 21 punctuation marks is deleted if it stands next to a space anywhere in the
    answer, or if the answer holds a digit-comma-digit anywhere, and else becomes a space; periods not before a digit
    go; lower case; "none" and "zero" to "ten" become digits; articles go; contractions get their apostrophe back.

    >>> normalize_vqa_answer("The two dogs, I dont know.")
    "2 dogs i don't know"
    >>> normalize_vqa_answer("black/white"), normalize_vqa_answer("1,000")
    ('black white', '1000')
    """
    text = _clean_vqa_answer(text)
    delete_all = _DIGIT_COMMA_DIGIT.search(text) is not None
    marked = text
    for mark in _VQA_PUNCTUATION:
        delete = delete_all or mark + " " in text or " " + mark in text
        marked = marked.replace(mark, "" if delete else " ")
    marked = _VQA_PERIOD.sub("", marked, count=_VQA_PERIOD_LIMIT)
    words = (_VQA_NUMBERS.get(word, word) for word in marked.lower().split())
    return " ".join(_VQA_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _clean_vqa_answer(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_accuracy(prediction: str, references: Sequence[str], *, always_normalize: bool = False) -> float:
    """VQA accuracy (Antol et al., ICCV 2015): for each annotator, min(1, matches among the others / 3), averaged.

    With ten annotators, 0, 1, 2, 3, and 4 or more matches give 0, 0.3, 0.6, 0.9 and 1. The best that n < 4
    annotators allow is (n - 1) / 3.

    Args:
        prediction: the answer given.
        references: one answer an annotator, repeats kept (ten in VQAv2, OK-VQA, VizWiz and TextVQA), at least two.
        always_normalize: the official script, and the default, leaves answers as they are where all annotators agree;
            True normalises then, too, as several later suites do.

    Returns:
        float in [0, 1], higher is better.

    Raises:
        RowError: fewer than two references, or a string in place of the list.

    >>> vqa_accuracy("Two.", ["2", "two", "two dogs"] + ["3"] * 7)
    0.6
    >>> vqa_accuracy("Yes", ["yes"] * 10), vqa_accuracy("Yes", ["yes"] * 10, always_normalize=True)
    (0.0, 1.0)
    """
    _check_references(references, "vqa_accuracy", least=2)
    prediction = _clean_vqa_answer(prediction)
    answers = [_clean_vqa_answer(answer) for answer in references]
    if always_normalize or len(set(answers)) > 1:
        prediction = normalize_vqa_answer(prediction)
        answers = [normalize_vqa_answer(answer) for answer in answers]
    annotators = len(answers)
    matches = sum(answer == prediction for answer in answers)
    # An annotator who gave the prediction has one match fewer among the others. Summing thirds as whole numbers and
    # dividing once keeps 0.3, 0.6 and 0.9 exact.
    thirds = matches * min(3, matches - 1) + (annotators - matches) * min(3, matches)
    return thirds / (3 * annotators)


def exact_match(prediction: str, references: Sequence[str], *, normalize: bool = True) -> float:
    """1.0 if the prediction equals any of the references, else 0.0.

    Our choice of `normalize`: case is ignored, white space is squeezed, and trailing sentence punctuation (.,;:!?)
    goes, unless nothing else would be left.

    Raises:
        RowError: no reference, or a string in place of the list.

    >>> exact_match(" Polar  bear.", ["polar bear", "bear"]), exact_match("Bear", ["bear"], normalize=False)
    (1.0, 0.0)
    """
    _check_references(references, "exact_match")
    if normalize:
        return float(_squeeze(prediction) in {_squeeze(reference) for reference in references})
    return float(prediction in references)


def _squeeze(text: str) -> str:
    text = " ".join(text.casefold().split())
    return text.rstrip(".,;:!? ") or text


def top1(prediction: str, label: str, *, normalize: bool = True) -> float:
    """1.0 if the predicted class name is the label, else 0.0; `normalize` as in `exact_match`.

    >>> top1("Water lily.", "water lily")
    1.0
    """
    return exact_match(prediction, [label], normalize=normalize)


def _check_references(
    references: Sequence[str], metric: str, *, least: int = 1, most: int | None = None, where: str = ""
) -> None:
    if isinstance(references, str):
        raise RowError(
            f"{where}{metric} expects a list of references, got the string {references!r}; pass [{references!r}]"
        )
    if len(references) < least:
        remedy = (
            "give every annotator's answer, repeats kept, or use exact_match" if least > 1 else "give a gold answer"
        )
        raise RowError(f"{where}{metric} expects at least {least} reference(s), got {len(references)}; {remedy}")
    if most is not None and len(references) > most:
        raise RowError(
            f"{where}{metric} expects at most {most} reference(s), got {len(references)}; give the label alone, or "
            "use exact_match where any of several answers is right"
        )


# --- the registry --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Metric:
    """An answer metric as the evaluator, the tables and the figures use it.

    Call it for the values of the items; `check` finds what a call would refuse, before answers are paid for.

    Attributes:
        name: its key in `METRICS` and in results.
        per_item: (predictions, references, **options) -> float64 array of shape (len(predictions),).
        label: for table heads and axes, in the unit of `reported`.
        higher_is_better: True for all that ship.
        scale: `reported` is the mean times this.
        min_references, max_references: how many references an item may have; None for no limit.
    """

    name: str
    per_item: Callable[..., np.ndarray] = dataclasses.field(repr=False)
    label: str
    higher_is_better: bool = True
    scale: float = 100.0
    min_references: int = 1
    max_references: int | None = None

    def __call__(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], **options: bool | float
    ) -> np.ndarray:
        """Values of the items, float64 array of shape (len(predictions),).

        Raises:
            RowError: an item has too few or too many references, or a string in place of the list.
            ValueError: as many predictions as lists of references were expected.
        """
        self.check(references)
        return self.per_item(predictions, references, **options)

    def check(self, references: Sequence[Sequence[str]]) -> None:
        """Raise RowError, naming the item, where this metric can't use an item's references."""
        for i, item in enumerate(references):
            _check_references(
                item, self.name, least=self.min_references, most=self.max_references, where=f"item {i}: "
            )

    def reported(self, values: npt.ArrayLike) -> float:
        """The number that papers print: the mean of the items' values times `scale`."""
        return float(np.asarray(values, dtype=np.float64).mean()) * self.scale


def _each(
    function: Callable[..., float], predictions: Sequence[str], references: Sequence[Sequence[str]], **options: Any
) -> np.ndarray:
    check_items(predictions, references)
    pairs = zip(predictions, references, strict=True)
    return np.array([function(text, gold, **options) for text, gold in pairs], dtype=np.float64)


def _top1_of_list(prediction: str, references: Sequence[str], **options: bool) -> float:
    (label,) = references
    return top1(prediction, label, **options)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("vqa_accuracy", functools.partial(_each, vqa_accuracy), "VQA accuracy", min_references=2),
        Metric("exact_match", functools.partial(_each, exact_match), "exact match"),
        Metric("top1", functools.partial(_each, _top1_of_list), "top-1 accuracy", max_references=1),
        Metric("cider_d", cider_d, "CIDEr-D"),
    )
}


def get_metric(name: str) -> Metric:
    """Metric of that name.

    Raises:
        ValueError: there is none; the message lists those there are.

    >>> get_metric("top1").reported([1.0, 0.0])
    50.0
    """
    try:
        return METRICS[name]
    except KeyError:
        raise ValueError(f"unknown metric {name!r}; expected one of {', '.join(sorted(METRICS))}") from None


# --- rankings ------------------------------------------------------------------------------------------------------


def ndcg_at_k(relevance: npt.ArrayLike, ideal: npt.ArrayLike, k: int) -> float:
    """Normalised discounted cumulative gain of the first k, with linear gains (as scikit-learn's `ndcg_score`).

    Args:
        relevance: shape (n,), at least 0: of what was retrieved, in the order retrieved.
        ideal: shape (m,), at least 0: of everything that could have been retrieved, in any order.
        k: how many ranks count.

    Returns:
        float in [0, 1], higher is better; 0 where nothing is relevant.

    Raises:
        ValueError: k < 1; an array that isn't one-dimensional, finite and at least 0 (shift log-likelihoods, or pass
            exp of them); more relevance retrieved than `ideal` holds.

    >>> ndcg_at_k([1.0, 0.0, 0.0], [0.0, 0.0, 1.0], 3), round(ndcg_at_k([0.0, 1.0], [1.0, 0.0], 2), 4)
    (1.0, 0.6309)
    """
    _check_k(k)
    ranked, best = _relevance(relevance, "relevance"), _relevance(ideal, "ideal")
    best = np.sort(best)[::-1]
    most = _dcg(best[:k])
    value = _dcg(ranked[:k])
    if value > most * (1 + 1e-9):
        raise ValueError(
            f"the ranking's DCG@{k} ({value:g}) exceeds the ideal one ({most:g}); `ideal` must hold the relevance of "
            "everything that could be retrieved, and nothing may be retrieved twice"
        )
    return min(1.0, value / most) if most > 0 else 0.0


def _dcg(relevance: np.ndarray) -> float:
    return float(relevance @ (1.0 / np.log2(np.arange(2, len(relevance) + 2))))


def _relevance(values: npt.ArrayLike, name: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not np.isfinite(array).all() or (array < 0).any():
        raise ValueError(
            f"expected {name} one-dimensional, finite and at least 0, got shape {array.shape}, values {array!r}; "
            "shift log-likelihoods to start at 0, or pass exp of them"
        )
    return array


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"expected k >= 1, got {k}")


def recall_at_k(ranked_ids: Sequence[Hashable], relevant_ids: Collection[Hashable], k: int) -> float:
    """Share of the relevant ids found among the first k of the ranking, in [0, 1]; higher is better.

    Raises:
        ValueError: k < 1, or no id is relevant.
        DuplicateIdError: the ranking holds an id twice.

    >>> recall_at_k(["a", "b", "c"], {"a", "c", "d", "e"}, 3)
    0.5
    """
    _check_k(k)
    relevant = set(relevant_ids)
    if not relevant:
        raise ValueError("recall needs at least one relevant id, got none; leave such a query out of the mean")
    if len(set(ranked_ids)) < len(ranked_ids):
        twice = next(i for n, i in enumerate(ranked_ids) if i in ranked_ids[:n])
        raise DuplicateIdError(f"the ranking holds the id {twice!r} twice; expected each id once")
    return len(relevant.intersection(ranked_ids[:k])) / len(relevant)


# --- evaluate.Metric subclasses ------------------------------------------------------------------------------------

_EVALUATE_CLASSES = {  # class name -> (key in METRICS, description)
    "CIDErD": ("cider_d", "CIDEr-D, 0 to 10 an item; papers report 100 times the mean. Options: n=4, sigma=6.0."),
    "ExactMatch": ("exact_match", "Equality with any of the references. Option: normalize=True."),
    "Top1Accuracy": ("top1", "Top-1 accuracy; each item's reference is its label. Option: normalize=True."),
    "VQAAccuracy": ("vqa_accuracy", "Official VQA accuracy over annotators. Option: always_normalize=False."),
}
_CITATIONS = {
    "cider_d": "Vedantam et al., CIDEr: Consensus-based Image Description Evaluation, CVPR 2015",
    "vqa_accuracy": "Antol et al., VQA: Visual Question Answering, ICCV 2015",
}
_INPUTS = """
Args:
    predictions: list of str, one answer an item.
    references: list of lists of str, the gold answers of each item.

Returns:
    dict: the mean under the metric's name, and the items' values as a list under "per_item".
"""


@functools.cache
def _evaluate_classes() -> dict[str, type]:
    import datasets
    import evaluate

    text = datasets.Value("string")

    class PerItemMetric(evaluate.Metric):
        metric: ClassVar[Metric]

        def _info(self) -> evaluate.MetricInfo:
            return evaluate.MetricInfo(
                description=type(self).__doc__ or "",
                citation=_CITATIONS.get(self.metric.name, ""),
                inputs_description=_INPUTS,
                features=datasets.Features({"predictions": text, "references": datasets.List(text)}),
            )

        def _compute(
            self, predictions: list[str], references: list[list[str]], **options: bool | float
        ) -> dict[str, float | list[float]]:
            values = self.metric(predictions, references, **options)
            return {self.metric.name: float(values.mean()), "per_item": values.tolist()}

    return {
        name: type(name, (PerItemMetric,), {"__module__": __name__, "__doc__": description, "metric": METRICS[key]})
        for name, (key, description) in _EVALUATE_CLASSES.items()
    }


def __getattr__(name: str) -> Any:
    if name not in _EVALUATE_CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals().update(_evaluate_classes())
    return globals()[name]
