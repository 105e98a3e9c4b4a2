"""How good an answer is beside its gold answers: VQA accuracy, exact match and top-1."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import RowError
from ..utils.text import normalize_text

__all__ = ["check_references", "exact_match", "letter_match", "normalize_vqa_answer", "top1", "vqa_accuracy"]

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


def vqa_accuracy(prediction: str, references: Sequence[str], *, official: bool = False) -> float:
    """VQA accuracy (Antol et al., ICCV 2015): for each annotator, min(1, matches among the others / 3), averaged.

    With ten annotators, 0, 1, 2, 3, and 4 or more matches give 0, 0.3, 0.6, 0.9 and 1. The best that n < 4
    annotators allow is (n - 1) / 3.

    Args:
        prediction: the answer given.
        references: one answer an annotator, repeats kept (ten in VQAv2, OK-VQA, VizWiz and TextVQA), at least two.
        official: follow the official script to the letter, which compares answers as they stand where all annotators
            agree ("Yes" against ten "yes" is then wrong). False normalizes always, as later suites do (OpenFlamingo,
            lmms-eval), and unifies what looks the same in texts that are not ASCII
            ([`normalize_text`][drum_hf.utils.text.normalize_text]).

    Returns:
        float in [0, 1], higher is better.

    Raises:
        RowError: fewer than two references, or a string in place of the list.

    >>> vqa_accuracy("Two.", ["2", "two", "two dogs"] + ["3"] * 7)
    0.6
    >>> vqa_accuracy("Yes.", ["yes"] * 10), vqa_accuracy("Yes.", ["yes"] * 10, official=True)
    (1.0, 0.0)
    """
    check_references(references, "vqa_accuracy", least=2)
    prediction, *answers = (
        _clean_vqa_answer(text if official or text.isascii() else normalize_text(text))
        for text in (prediction, *references)
    )
    if not official or len(set(answers)) > 1:
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

    Our choice of `normalize`: texts that look the same are the same (case, white space, accents composed or not,
    full-width digits, curly quotes, dashes, zero-width characters; see
    [`normalize_text`][drum_hf.utils.text.normalize_text]), and trailing sentence punctuation (.,;:!? and that of
    Chinese, Hindi and Arabic) goes, unless nothing else would be left.

    Raises:
        RowError: no reference, or a string in place of the list.

    >>> exact_match(" Polar  bear.", ["polar bear", "bear"]), exact_match("Bear", ["bear"], normalize=False)
    (1.0, 0.0)
    """
    check_references(references, "exact_match")
    if normalize:
        return float(_plain(prediction) in {_plain(reference) for reference in references})
    return float(prediction in references)


def _plain(text: str) -> str:
    text = normalize_text(text)
    return text.rstrip(".,;:!? \u3002\u3001\u0964\u0965\u060c\u061b\u061f\u06d4") or text


def top1(prediction: str, label: str, *, normalize: bool = True) -> float:
    """1.0 if the predicted class name is the label, else 0.0; `normalize` as in `exact_match`.

    >>> top1("Water lily.", "water lily")
    1.0
    """
    return exact_match(prediction, [label], normalize=normalize)


#: The answer is a letter, in brackets or mark-up or not, alone or before its option: "B", "(b)", "**B**", "B. a bus".
_LETTER = re.compile(r"[\s(\[\"'*_`]*([A-Za-z])(?:[\s)\].,:;!?\"'*_`]*$|[*_`]*[.):\]])")
#: Where an answer reasons aloud, the last of these says which letter it means.
_CONCLUSION = re.compile(
    r"(?i:\b(?:answer|option|choice))(?i:\s+is)?\s*:?[\s\"'*_`]*(?:[(\[]([A-Za-z])[)\]]|([A-Z])(?![\w'’]))"
    r"|(?i:\b(?:is|be|so|hence|thus|therefore)\b|:)[\s,\"'*_`]*[(\[]?([A-Z])[\s)\].\"'*_`]*$"
)


def letter_match(prediction: str, gold: str) -> float:
    """1.0 if the letter that an answer to a multiple choice gives is the gold letter, else 0.0.

    An answer that is a letter, or begins with one as "B." or "B)" does, gives that letter. Any other gives the last
    letter, a capital or in brackets, that follows "answer", "option" or "choice", or ends the text after "is", "so",
    "hence" or a colon. Our choice; as in most suites, brackets, quotes and mark-up do not count.

    >>> [letter_match(text, "B") for text in ("B", " (b).", "B. a bus", "**B**", "It is red, so the answer is (B).")]
    [1.0, 1.0, 1.0, 1.0, 1.0]
    >>> [letter_match(text, "B") for text in ("Bus", "B or A", "answer: A")]
    [0.0, 0.0, 0.0]
    """
    found = _LETTER.match(prediction)
    letter = found[1] if found else ""
    for conclusion in _CONCLUSION.finditer(prediction) if found is None else ():
        letter = conclusion[1] or conclusion[2] or conclusion[3]
    return float(letter.upper() == gold.strip().upper() != "")


def check_references(
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
