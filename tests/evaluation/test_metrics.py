"""Answer metrics against their definitions and a public implementation; ranking metrics against closed forms."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import vqa_rule
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from drum_hf.errors import RowError
from drum_hf.evaluation import answers, hf_metrics, metrics
from drum_hf.evaluation.cider import cider_d, ptb_tokenize
from drum_hf.evaluation.metrics import (
    METRICS,
    Metric,
    exact_match,
    get_metric,
    letter_match,
    lvlm_ndcg_at_k,
    lvlm_recall_at_k,
    normalize_vqa_answer,
    top1,
    vqa_accuracy,
)

# --- VQA accuracy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("matches", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (5, 1.0), (9, 1.0), (10, 1.0)]
)
def test_vqa_accuracy_by_number_of_matching_annotators(matches, expected):
    others = [f"other {i}" for i in range(10 - matches)]
    assert vqa_accuracy("yes", ["yes"] * matches + others) == expected
    assert vqa_accuracy("yes", others + ["yes"] * matches) == expected


def vqa_accuracy_by_definition(prediction, references):
    per_annotator = []
    for i in range(len(references)):
        others = [answer for j, answer in enumerate(references) if j != i]
        per_annotator.append(min(1.0, sum(answer == prediction for answer in others) / 3))
    return sum(per_annotator) / len(per_annotator)


@pytest.mark.parametrize("annotators", range(2, 8))
def test_vqa_accuracy_is_its_definition_for_every_few_answers(annotators):
    for references in itertools.product("pqr", repeat=annotators):
        expected = vqa_accuracy_by_definition("p", references)
        assert abs(vqa_accuracy("p", references) - expected) < 1e-12


@settings(max_examples=300, deadline=None)
@given(st.sampled_from("pqrs"), st.lists(st.sampled_from("pqrs"), min_size=8, max_size=15))
def test_vqa_accuracy_is_its_definition(prediction, references):
    expected = vqa_accuracy_by_definition(prediction, references)
    assert vqa_accuracy(prediction, references) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("B", "B"), ("(b)", "B"), ("**B**", "B"), ("`B`", "B"), ("B) a bus", "B"), ("[B]", "B"), ("**B.** a bus", "B"),
     ("The picture shows a bus. So the answer is B.", "B"), ("Answer: (b)", "B"), ("Option C, not B", "C"),
     ("First A, then I see wheels.\nAnswer: B", "B"), ("It is red, hence (D)", "D")],
)  # fmt: skip
def test_an_answers_letter(answer, letter):
    assert {other for other in "ABCD" if letter_match(answer, other)} == {letter}


@pytest.mark.parametrize("answer", ["", "a bus", "Bus", "The answer is a bus", "I can't tell", "both", "B or not"])
def test_answers_without_a_letter(answer):
    assert not any(letter_match(answer, letter) for letter in "ABCD")


answer_texts = st.lists(
    st.sampled_from(["a", "The", "two", "none", "dog", "dont", "1,000", ".", ",", "/", "-", "3", " ", "\n", "?"]),
    max_size=6,
).map("".join)


@settings(max_examples=200, deadline=None)
@given(answer_texts, st.lists(answer_texts, min_size=10, max_size=10))
def test_vqa_answers_are_normalized_unless_all_annotators_agree(prediction, references):
    def clean(text):
        return text.replace("\n", " ").strip()

    normalized = [normalize_vqa_answer(answer) for answer in references]
    with_normalizing = vqa_accuracy_by_definition(normalize_vqa_answer(prediction), normalized)
    assert vqa_accuracy(prediction, references) == pytest.approx(with_normalizing)
    official = functools.partial(vqa_accuracy, official=True)
    if len({clean(answer) for answer in references}) > 1:
        assert official(prediction, references) == pytest.approx(with_normalizing)
    agreed = references[:1] * 10
    assert official(prediction, agreed) == float(clean(prediction) == clean(agreed[0]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Dog", "dog"),
        ("\tan apple\n", "apple"),
        ("none", "0"),
        ("Zero ten", "0 10"),
        ("yes, it is", "yes it is"),  # a mark next to a space goes ...
        ("red,white, blue", "redwhite blue"),  # ... everywhere in the answer
        ("red,white", "red white"),
        ("red/white", "red white"),
        ("10,000/day", "10000day"),  # a digit-comma-digit makes every mark go
        ("3.", "3"),
        ("3.5", "3.5"),
        (".5", ".5"),
        ("p.m.", "pm"),
        ("." * 33, "."),  # the official count of 32
        ("it's 5 o'clock", "it's 5 o'clock"),  # apostrophe and colon are no marks
        ("5:30", "5:30"),
        ("dont", "don't"),
        ("shouldntve", "shouldntve"),  # one missing apostrophe is restored, two are not
        ("shouldnt've", "shouldn't've"),
        ("weve", "we've"),
        ("somebody'd", "somebodyd"),
        ("well", "well"),
        ("", ""),
        ("a", ""),
    ],
)
def test_vqa_normalization(text, expected):
    assert normalize_vqa_answer(text) == expected


def test_vqa_accuracy_is_the_official_rule_on_thousands_of_answers():
    rng = random.Random(5)
    apart = between = 0
    for _ in range(5000):
        first = vqa_rule.random_answer(rng)
        agreeing = 10 if rng.random() < 0.3 else rng.randrange(10)
        others = [vqa_rule.random_answer(rng) for _ in range(10 - agreeing)]
        same = [first] * agreeing if rng.random() < 0.3 else [vqa_rule.variants(first, rng) for _ in range(agreeing)]
        references = rng.sample(same + others, 10)
        prediction = vqa_rule.variants(first, rng)
        assert normalize_vqa_answer(prediction) == vqa_rule.normalized(vqa_rule.cleaned(prediction))
        official = vqa_accuracy(prediction, references, official=True)
        always = vqa_accuracy(prediction, references)
        assert abs(official - vqa_rule.accuracy(prediction, references, official=True)) < 1e-12
        assert abs(always - vqa_rule.accuracy(prediction, references)) < 1e-12
        apart += official != always
        between += 0 < official < 1
    assert apart > 50 and between > 500  # the cases are not all of one kind


def test_contractions_table_has_the_official_size():
    assert len(answers._VQA_CONTRACTIONS) == 114


# --- exact match, top-1 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("Cat.", "cat", 1.0),
        ("  black \n cat ", "Black Cat", 1.0),
        ("yes !", "yes", 1.0),
        ("cat", "cats", 0.0),
        ("C++", "C", 0.0),
        ("50%", "50", 0.0),
        ("?", "!", 0.0),  # nothing would be left
        ("STRASSE", "straße", 1.0),
        ("", "cat", 0.0),
    ],
)
def test_exact_match(prediction, reference, expected):
    assert exact_match(prediction, [reference]) == expected
    assert exact_match(prediction, ["something else", reference]) == expected
    assert top1(prediction, reference) == expected
    assert exact_match(prediction, [reference], normalize=False) == 0.0


@given(st.text(max_size=20), st.lists(st.text(max_size=20), min_size=1, max_size=4))
def test_exact_match_finds_any_reference_whatever_the_case_and_space(prediction, references):
    assert exact_match(prediction, [*references, prediction]) == 1.0
    assert exact_match(f"  {prediction} ", [*references, prediction]) == 1.0
    assert exact_match(prediction, references) >= exact_match(prediction, references, normalize=False)


# --- CIDEr-D -------------------------------------------------------------------------------------------------------

captions = st.lists(st.sampled_from(["cat", "dog", "mat", "sits", "on", "the", "red"]), max_size=9)
corpora = st.lists(st.tuples(captions, st.lists(captions, min_size=1, max_size=4)), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None)
@given(corpora, st.sampled_from([6.0, 1.5]))
def test_cider_d_equals_pycocoevalcap(corpus, sigma):
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    assume(any(text for _, gold in corpus for text in gold))  # it can't take references without a single word
    predictions = [prediction for prediction, _ in corpus]
    references = [gold for _, gold in corpus]
    _, expected = cider.Cider(sigma=sigma).compute_score(
        {i: [" ".join(text) for text in gold] for i, gold in enumerate(references)},
        {i: [" ".join(text)] for i, text in enumerate(predictions)},
    )
    ours = cider_d(predictions, references, sigma=sigma, tokens=True)
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize(("items", "references", "seed"), [(2000, 3, 0), (1000, 1, 1), (300, 10, 2), (1, 3, 3)])
def test_cider_d_equals_pycocoevalcap_on_thousands_of_captions(items, references, seed):
    """Words as frequent as in a language, captions of up to 30 of them that share words with their references."""
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    rng = np.random.default_rng(seed)
    words = np.array([f"w{i}" for i in range(2000)])

    def caption(like):
        fresh = words[np.minimum(rng.zipf(1.3, rng.integers(1, 30)), len(words)) - 1].tolist()
        start, stop = sorted(rng.integers(0, len(like) + 1, 2))
        return (fresh[: len(fresh) // 2] + like[start:stop])[:30] or fresh

    gold, predictions = [], []
    for _ in range(items):
        first = caption([])
        gold.append([first, *(caption(first) for _ in range(references - 1))])
        predictions.append(caption(first))
    mean, expected = cider.Cider().compute_score(
        {i: [" ".join(text) for text in texts] for i, texts in enumerate(gold)},
        {i: [" ".join(text)] for i, text in enumerate(predictions)},
    )
    ours = cider_d(predictions, gold, tokens=True)
    np.testing.assert_allclose(ours, expected, atol=1e-6, rtol=0)
    assert ours.mean() == pytest.approx(mean, abs=1e-6)
    assert items == 1 or (ours > 0.1).mean() > 0.2


@settings(max_examples=100, deadline=None)
@given(corpora, st.integers(1, 5))
def test_cider_d_is_in_range_and_ignores_the_order_of_references(corpus, n):
    predictions = [prediction for prediction, _ in corpus]
    references = [gold for _, gold in corpus]
    scores = cider_d(predictions, references, n=n, tokens=True)
    assert ((scores >= 0) & (scores <= 10 + 1e-9)).all()
    backwards = cider_d(predictions, [gold[::-1] for gold in references], n=n, tokens=True)
    np.testing.assert_allclose(scores, backwards, atol=1e-12)


def test_cider_d_closed_forms():
    references = [["a b c d e"], ["v w x y z"]]
    assert cider_d(["a b c d e", "v w x y z"], references).tolist() == pytest.approx([10.0, 10.0])
    # Every n-gram weighs w = log 2. "a a" against "a" clips to w·w / (2w·w), and is one bigram longer.
    unigrams = cider_d(["a a", "z"], [["a"], ["z"]], n=1)
    penalty = math.exp(-(1**2) / (2 * 6.0**2))
    assert unigrams.tolist() == pytest.approx([10 * 0.5 * penalty, 10.0])
    # Two words have no 3- and 4-grams, which count 0: half of the score is out of reach.
    assert cider_d(["a b", "y z"], [["a b"], ["y z"]]).tolist() == pytest.approx([5.0, 5.0])
    # A second reference with nothing in common halves it.
    assert cider_d(["a b c d", "z"], [["a b c d", "q"], ["z"]])[0] == pytest.approx(5.0)


def test_cider_d_where_idf_is_zero():
    assert cider_d(["a cat"], [["a cat"]]).tolist() == [0.0]  # log N = 0
    assert cider_d(["a cat", "a cat"], [["a cat"], ["a cat"]]).tolist() == [0.0, 0.0]
    assert cider_d([], []).shape == (0,)
    assert cider_d(["", "a cat"], [["a dog"], ["..."]]).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "expected"),  # as the Stanford tokenizer and the official filter give them
    [
        ("A man's dog doesn't like the cat, can't it?", "a man 's dog does n't like the cat ca n't it"),
        (
            'Two (2) people at 3:30 p.m. ride a half-eaten "sandwich" -- wow!',
            "two -lrb- 2 -rrb- people at 3:30 p.m. ride a half-eaten sandwich wow",
        ),
        (
            "\"Hello,\" she said; it's $5.50 & 50% off... I'm gonna go.",
            "hello she said it 's $ 5.50 & 50 % off i 'm gon na go",
        ),
        (
            "A black-and-white photo of U.S. soldiers, e.g. in the 1980's.",
            "a black-and-white photo of u.s. soldiers e.g. in the 1980 's",
        ),
        ("Dr. Smith walks. Then he runs. The man 's hat.", "dr. smith walks then he runs the man 's hat"),
        (
            "the women's' [red] {blue} 1,000 foo/bar 1/2 cannot don't they've we'd",
            "the women 's -lsb- red -rsb- -lcb- blue -rcb- 1,000 foo/bar 1/2 can not do n't they 've we 'd",
        ),
        (
            "A dog.A cat ,running   fast.'quoted' ‘curly’ “dbl” it’s – — …",
            "a dog.a cat running fast quoted curly dbl it 's",
        ),
        ("he said 'go' to rock 'n' roll.  end..", "he said go to rock 'n' roll end"),
        ("#1 a@b.com http://x.com/y 20-20 no. 5 St. John A.", "# 1 a@b.com http://x.com/y 20-20 no. 5 st. john a."),
        ("10:30am 10am 1st '80s couldn't've AT&T r&b !! ?", "10:30 am 10am 1st '80s could n't 've at&t r & b !!"),
        ("no. the t-shirt -dash a--b 'tis café +1", "no the t-shirt dash a b 't is café +1"),
        (" \n. , ", ""),
    ],
)
def test_ptb_tokenize(text, expected):
    assert ptb_tokenize(text) == expected.split()


@given(st.text(max_size=60))
def test_ptb_tokens_are_lower_case_and_whole(text):
    for token in ptb_tokenize(text):
        assert token
        assert token == token.lower()
        assert token.split() == [token]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("एक कुत्ता घास पर है", ["एक", "कुत्ता", "घास", "पर", "है"]),  # vowel signs are marks, not letters
        ("হাতি, নদী!", ["হাতি", "নদী"]),
        ("cafe\u0301 du monde", ["caf\u00e9", "du", "monde"]),  # as macOS writes it
        ("سَيَّارَة حمراء", ["سَيَّارَة", "حمراء"]),
        ("สุนัขวิ่ง", ["สุนัขวิ่ง"]),  # no spaces: one run
        ("می\u200cخواهم", ["می\u200cخواهم"]),  # a joiner inside a word
        ("AT&T's and H&M's", ["at&t", "'s", "and", "h&m", "'s"]),
        ("#tag by @user", ["#tag", "by", "@user"]),
        ("**bold** gov't", ["**", "bold", "**", "gov't"]),
    ],
)
def test_ptb_tokens_of_other_scripts_and_of_the_web(text, tokens):
    assert ptb_tokenize(text) == tokens


# --- the registry --------------------------------------------------------------------------------------------------

PREDICTIONS = ["Two dogs.", "a cat"]
REFERENCES = {
    "vqa_accuracy": [["2 dogs"] * 3 + ["dogs"] * 7, ["dog"] * 10],
    "exact_match": [["two dogs", "dogs"], ["dog"]],
    "top1": [["two dogs"], ["dog"]],
    "cider_d": [["two dogs run"], ["the dog"]],
    "vqa_accuracy_official": [["2 dogs"] * 3 + ["dogs"] * 7, ["dog"] * 10],
}


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_registry(name):
    metric = get_metric(name)
    assert metric.name == name and metric.higher_is_better and metric.scale == 100.0
    values = metric(PREDICTIONS, REFERENCES[name])
    assert values.shape == (2,) and values.dtype == np.float64
    assert values[0] > 0 and values[1] == 0
    assert values.tolist() == metric.per_item(PREDICTIONS, REFERENCES[name]).tolist()
    assert metric.reported(values) == pytest.approx(100 * values.mean())
    with pytest.raises(RowError, match=r"item 1\b"):
        metric(PREDICTIONS, [REFERENCES[name][0], []])
    with pytest.raises(RowError, match=r"item 1\b"):
        metric.per_item(PREDICTIONS, [REFERENCES[name][0], []])
    with pytest.raises(RowError, match="the string 'dog'"):
        metric(PREDICTIONS, [REFERENCES[name][0], "dog"])
    with pytest.raises(ValueError, match="got 2 and 1"):
        metric(PREDICTIONS, REFERENCES[name][:1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        metric.name = "other"


def test_options_reach_the_function():
    agreed = [["yes"] * 10]
    assert get_metric("vqa_accuracy")(["Yes"], agreed).tolist() == [1.0]
    assert get_metric("vqa_accuracy")(["Yes"], agreed, official=True).tolist() == [0.0]
    assert get_metric("vqa_accuracy_official")(["Yes"], agreed).tolist() == [0.0]
    assert get_metric("top1")(["Yes"], [["yes"]], normalize=False).tolist() == [0.0]


def test_reference_counts_are_checked():
    with pytest.raises(RowError, match="item 0: vqa_accuracy expects at least 2"):
        get_metric("vqa_accuracy").check([["yes"]])
    with pytest.raises(RowError, match="item 1: top1 expects at most 1"):
        get_metric("top1")(["a", "b"], [["a"], ["a", "b"]])
    with pytest.raises(RowError, match="at least 2"):
        vqa_accuracy("yes", ["yes"])
    with pytest.raises(RowError, match="pass"):
        vqa_accuracy("yes", "yes")
    with pytest.raises(RowError, match="the string"):
        exact_match("yes", "yes")
    with pytest.raises(RowError, match="at least 1"):
        exact_match("yes", [])


def test_every_metric_is_tested_here_or_takes_labels():
    assert {name for name, metric in METRICS.items() if metric.labels is None} == {*REFERENCES, "letter"}


def test_a_metric_of_ones_own():
    metric = Metric("length", lambda predictions, references: np.array([float(len(p)) for p in predictions]), "length")
    assert metric(["ab"], [["x"]]).tolist() == [2.0]


def test_unknown_metric_lists_the_known():
    with pytest.raises(ValueError, match=r"'bleu'.*cider_d, exact_match, letter, roc_auc, top1, vqa_accuracy"):
        get_metric("bleu")


@pytest.mark.parametrize("kwargs", [{"n": 0}, {"sigma": 0.0}, {"sigma": float("nan")}])
def test_cider_d_settings(kwargs):
    with pytest.raises(ValueError, match="n >= 1 and sigma > 0"):
        cider_d(["a"], [["a"]], **kwargs)


def test_cider_d_strings_and_tokens_are_not_mixed_up():
    with pytest.raises(RowError, match="expected a list of tokens"):
        cider_d(["a cat"], [[["a", "cat"]]], tokens=True)
    with pytest.raises(RowError, match="set tokens=True"):
        cider_d([["a", "cat"]], [["a cat"]])


# --- evaluate.Metric subclasses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("VQAAccuracy", "vqa_accuracy"),
        ("ExactMatch", "exact_match"),
        ("Top1Accuracy", "top1"),
        ("CIDErD", "cider_d"),
    ],
)
def test_evaluate_metrics_equal_the_functions(name, key, tmp_path):
    import evaluate

    cls = getattr(hf_metrics, name)
    metric = cls(cache_dir=str(tmp_path))
    assert isinstance(metric, evaluate.Metric) and cls.__module__ == "drum_hf.evaluation.hf_metrics"
    result = metric.compute(predictions=PREDICTIONS, references=REFERENCES[key])
    values = METRICS[key](PREDICTIONS, REFERENCES[key])
    assert result == {key: pytest.approx(values.mean()), "per_item": values.tolist()}
    assert isinstance(result[key], float)
    for prediction, references in zip(PREDICTIONS, REFERENCES[key], strict=True):
        metric.add(prediction=prediction, reference=references)
    assert metric.compute() == result
    assert pickle.loads(pickle.dumps(cls)) is cls
    assert name in hf_metrics.__all__


def test_evaluate_metrics_pass_options_and_name_the_item(tmp_path):
    metric = hf_metrics.VQAAccuracy(cache_dir=str(tmp_path))
    result = metric.compute(predictions=["Yes"], references=[["yes"] * 10], official=True)
    assert result["vqa_accuracy"] == 0.0
    with pytest.raises(RowError, match="item 1"):
        hf_metrics.ExactMatch(cache_dir=str(tmp_path)).compute(predictions=["a", "b"], references=[["a"], []])


def test_vqa_accuracy_by_answer_and_question_type():
    rng = random.Random(1)
    answers_ = [vqa_rule.random_answer(rng) for _ in range(200)]
    references = [[vqa_rule.variants(text, rng) for _ in range(10)] for text in answers_]
    kinds = [rng.choice(["yes/no", "number", "other"]) for _ in answers_]
    questions = [rng.choice(["how many", "what is the", "is this"]) for _ in answers_]
    metric = hf_metrics.VQAAccuracy()
    result = metric.compute(predictions=answers_, references=references, answer_types=kinds, question_types=questions)
    by_hand = [vqa_rule.accuracy(*pair) for pair in zip(answers_, references, strict=True)]
    assert result["vqa_accuracy"] == pytest.approx(np.mean(by_hand))
    for key, types in (("per_answer_type", kinds), ("per_question_type", questions)):
        assert set(result[key]) == set(types)
        for kind in set(types):
            own = [value for value, other in zip(by_hand, types, strict=True) if other == kind]
            assert result[key][kind] == pytest.approx(np.mean(own))
    for text, gold in zip(answers_, references, strict=True):  # one by one
        metric.add(prediction=text, reference=gold)
    assert metric.compute(answer_types=kinds, question_types=questions) == result
    assert "per_answer_type" not in metric.compute(predictions=answers_[:1], references=references[:1])
    with pytest.raises(ValueError, match="2 kinds for values of shape"):
        metric.compute(predictions=answers_[:1], references=references[:1], answer_types=["number", "other"])


def test_evaluate_roc_auc_and_utility():
    result = hf_metrics.ROCAUC().compute(prediction_scores=[-0.1, -2.3, -0.7, -0.7], references=[1, 0, 1, 0])
    assert result == {"roc_auc": 0.875}
    close = np.array([1.0, 1.0 + 1e-12])  # float32 would make a tie of them
    assert hf_metrics.ROCAUC().compute(prediction_scores=close, references=[0, 1]) == {"roc_auc": 1.0}
    gain = hf_metrics.Utility().compute(predictions=[-0.5, -2.0], references=[-1.5, -1.5])
    assert gain == {"utility": 0.25, "per_item": [1.0, -0.5]}


def test_evaluate_rankings_equal_the_functions():
    ranked = [["b", "a", "c"], ["a"]]
    scores = [{"a": -0.1, "b": -2.0, "c": -3.0}, {"a": -1.0, "d": -0.5}]
    rows = [[{"id": i, "score": value} for i, value in own.items()] for own in scores]
    for cls, key, function in (
        (hf_metrics.NDCG, "ndcg", lvlm_ndcg_at_k),
        (hf_metrics.RecallAtK, "recall", lvlm_recall_at_k),
    ):
        expected = [function(ids, own, 2) for ids, own in zip(ranked, scores, strict=True)]
        result = cls().compute(predictions=ranked, references=rows, k=2)
        assert result == {key: pytest.approx(np.mean(expected)), "per_item": expected}


def test_evaluate_metrics_write_nothing_and_need_no_hub(tmp_path):
    (tmp_path / "here").mkdir()
    code = """
from drum_hf.evaluation import hf_metrics
print(hf_metrics.VQAAccuracy().compute(predictions=["2"], references=[["2"] * 10])["vqa_accuracy"])
for name in ("ExactMatch", "Top1Accuracy", "CIDErD"):
    getattr(hf_metrics, name)().compute(predictions=["a"], references=[["a"]])
hf_metrics.ROCAUC().compute(prediction_scores=[0.0, 1.0], references=[0, 1])
hf_metrics.Utility().compute(predictions=[0.0], references=[-1.0])
for name in ("NDCG", "RecallAtK"):
    getattr(hf_metrics, name)().compute(predictions=[["a"]], references=[[{"id": "a", "score": -1.0}]])
"""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "HOME": str(tmp_path / "home")}
    package = str(Path(metrics.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path / "here",
        env=os.environ | offline | {"PYTHONPATH": package},
    )
    assert (done.returncode, done.stdout.strip()) == (0, "1.0"), done.stderr
    assert list((tmp_path / "here").iterdir()) == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_evaluate_metrics_of_several_processes_meet_in_a_folder(tmp_path):
    together = hf_metrics.ExactMatch(cache_dir=str(tmp_path), num_process=2, process_id=0)
    assert not together.keep_in_memory and Path(together.data_dir).is_dir()
    kept = hf_metrics.ExactMatch(cache_dir=str(tmp_path / "none"), keep_in_memory=False)
    assert kept.compute(predictions=["a"], references=[["a"]])["exact_match"] == 1.0


def test_means_by_kind():
    assert metrics.means_by([1, 0, 0.5], ["x", "y", "x"]) == {"x": 0.75, "y": 0.0}
    with pytest.raises(ValueError, match="1 kinds"):
        metrics.means_by([1.0, 2.0], ["x"])


def test_importing_the_metrics_is_light():
    heavy = "{'torch', 'evaluate', 'datasets', 'transformers'}"
    code = f"import sys, drum_hf.evaluation.metrics, drum_hf.evaluation.statistics; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
