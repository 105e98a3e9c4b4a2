"""Losses that sentence-transformers' rerankers have too: value and gradient beside theirs, list by list."""

from __future__ import annotations

import math
import types

import numpy as np
import pytest
import torch
from sentence_transformers.cross_encoder import losses as peers
from sentence_transformers.cross_encoder.losses.lambda_loss import (
    LambdaRankScheme,
    NDCGLoss1Scheme,
    NDCGLoss2PPScheme,
    NDCGLoss2Scheme,
    NoWeightingScheme,
)
from torch import nn

from drum_hf.training import DrumTrainingArguments, LVLMLoss, register_loss
from drum_hf.training.losses import (
    ADRMSELoss,
    ContrastiveLVLMLoss,
    LambdaLoss,
    ListBatch,
    ListMLELoss,
    ListNetLoss,
    ListwiseLVLMLoss,
    MarginMSELoss,
    adr_mse_loss,
    known_losses,
    lambda_loss,
    list_distribution_loss,
    list_mle_loss,
    make_loss,
    margin_mse_loss,
)

SCHEMES = {
    "ndcg-loss2++": NDCGLoss2PPScheme,
    "ndcg-loss2": NDCGLoss2Scheme,
    "ndcg-loss1": NDCGLoss1Scheme,
    "lambdarank": LambdaRankScheme,
    "none": NoWeightingScheme,
}
LISTS = 1200


class Scorer:
    """Stands where a CrossEncoder would: the logit of a (query, document) pair is the document."""

    num_labels, device = 1, torch.device("cpu")

    def preprocess(self, pairs, **_):
        return {"scores": torch.stack([document for _, document in pairs])}

    def __call__(self, features):
        return features


def peer_value(loss, logits, labels):
    """Value and gradient of a peer's loss of one list."""
    own = logits.clone().requires_grad_()
    value = loss([["q"], [list(own)]], [labels])
    if value.requires_grad:
        value.backward()
    return value.item(), torch.zeros_like(logits) if own.grad is None else own.grad


def random_lists(seed, *, probability=False):
    """Lists of 1 to 9 with ties among labels (and rarely among logits), padded to 10 by garbage."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, 3, (LISTS, 10))).float()
    tied = torch.from_numpy(rng.random(LISTS) < 0.1)
    logits[tied] = logits[tied].round()
    labels = torch.from_numpy(rng.choice([-4.0, -2.5, -1.2, -0.7, -0.3, -0.05], (LISTS, 10))).float()
    continuous = torch.from_numpy(rng.random(LISTS) < 0.5)
    labels[continuous] = torch.from_numpy(-rng.exponential(1.0, (int(continuous.sum()), 10))).float()
    lengths = torch.from_numpy(rng.integers(1, 10, LISTS))
    mask = torch.arange(10) < lengths[:, None]
    return logits, labels.exp() if probability else labels, mask


def compare(ours, theirs, logits, labels, mask):
    """All lists at once beside theirs one by one; theirs computes in single precision."""
    wide = logits.double().requires_grad_()
    value = ours(wide, labels.double(), mask)
    value.sum().backward()
    assert (wide.grad[~mask] == 0).all()
    for row in range(LISTS):
        kept = mask[row]
        expected, gradient = theirs(logits[row, kept], labels[row, kept])
        assert value[row].item() == pytest.approx(expected, rel=2e-5, abs=1e-6), row
        np.testing.assert_allclose(wide.grad[row, kept], gradient, rtol=2e-4, atol=1e-5, err_msg=str(row))


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_lambda_loss_is_sentence_transformers(scheme, k):
    logits, labels, mask = random_lists(1, probability=True)

    def theirs(own, liked):
        loss = peers.LambdaLoss(Scorer(), weighting_scheme=SCHEMES[scheme](), k=k)
        return peer_value(loss, own, liked)

    compare(lambda *a: lambda_loss(*a, scheme=scheme, k=k), theirs, logits, labels, mask)


def test_ranknet_is_sentence_transformers():
    loss = peers.RankNetLoss(Scorer())
    compare(
        lambda *a: lambda_loss(*a, scheme="none"), lambda *a: peer_value(loss, *a), *random_lists(2, probability=True)
    )


@pytest.mark.parametrize("position_aware", [False, True])
def test_list_mle_is_sentence_transformers(position_aware):
    kind = peers.PListMLELoss if position_aware else peers.ListMLELoss
    loss = kind(Scorer(), respect_input_order=False)

    def theirs(logits, labels):
        order = labels.argsort(descending=True, stable=True)  # theirs is not stable, so ties are ordered here
        value, gradient = peer_value(kind(Scorer(), respect_input_order=True), logits[order], labels[order])
        return value, torch.empty_like(gradient).scatter(0, order, gradient)

    assert peer_value(loss, torch.tensor([0.3, 1.0]), torch.tensor([0.0, 1.0]))[0] == pytest.approx(
        theirs(torch.tensor([0.3, 1.0]), torch.tensor([0.0, 1.0]))[0]
    )
    compare(lambda *a: list_mle_loss(*a, position_aware=position_aware), theirs, *random_lists(3))


def test_position_aware_weights_of_a_long_list_do_not_overflow():
    logits = torch.randn(1, 1500, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = list_mle_loss(
        logits, -torch.arange(1500.0)[None], torch.ones(1, 1500, dtype=torch.bool), position_aware=True
    )
    loss.backward()
    expected, _ = peer_value(peers.PListMLELoss(Scorer()), logits[0].detach(), -torch.arange(1500.0))
    assert loss.item() == pytest.approx(expected, rel=1e-5) and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("alpha", [1.0, 4.0])
def test_adr_mse_is_sentence_transformers(alpha):
    loss = peers.ADRMSELoss(Scorer(), alpha=alpha)
    compare(lambda *a: adr_mse_loss(*a, alpha=alpha), lambda *a: peer_value(loss, *a), *random_lists(4))


def test_list_net_is_sentence_transformers():
    loss = peers.ListNetLoss(Scorer())
    compare(lambda *a: list_distribution_loss(*a, temperature=1.0), lambda *a: peer_value(loss, *a), *random_lists(5))


def test_margin_mse_is_the_mean_squared_error_of_margins_to_the_best():
    def theirs(logits, labels):
        own, best = logits.clone().requires_grad_(), int(labels.argmax())
        rest = [i for i in range(len(labels)) if i != best]
        if not rest:
            return 0.0, torch.zeros_like(logits)
        value = nn.MSELoss()(own[best] - own[rest], labels[best] - labels[rest])
        value.backward()
        return value.item(), own.grad

    compare(margin_mse_loss, theirs, *random_lists(6))


@pytest.mark.parametrize("name", ["lambda", "mle", "plist", "adr", "margin"])
def test_empty_lists_and_lists_of_one_give_nothing(name):
    functions = {
        "lambda": lambda_loss,
        "mle": list_mle_loss,
        "plist": lambda *a: list_mle_loss(*a, position_aware=True),
        "adr": adr_mse_loss,
        "margin": margin_mse_loss,
    }
    logits = torch.randn(2, 3, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[False] * 3, [True, False, False]])
    value = functions[name](logits, torch.rand(2, 3, dtype=torch.float64), mask)
    value.sum().backward()
    assert value.tolist() == [0, 0] and (logits.grad == 0).all()


def test_lambda_loss_by_hand():
    """Two candidates in the wrong order: DCG gaps of the first two places."""
    logits, labels = torch.tensor([[0.0, 1.0]]).double(), torch.tensor([[1.0, 0.5]]).double()
    gains = [1.0, math.sqrt(2) - 1]  # 2^label - 1
    best = gains[0] + gains[1] / math.log2(3)
    gap = (gains[0] - gains[1]) / best * (1 - 1 / math.log2(3))
    value = lambda_loss(logits, labels, torch.ones(1, 2, dtype=torch.bool), scheme="lambdarank")
    assert value.item() == pytest.approx(gap * math.log2(1 + math.e))


# Modules and names


def arguments(**more):
    given = {
        "loss_kwargs": None,
        "rank_weight": 0.3,
        "in_batch": "best",
        "temperature": 0.2,
        "mini_batch_size": 5,
        "gather_negatives": True,
        "weighting": "rank",
    }
    return types.SimpleNamespace(**given | more)


MADE = {
    "listwise": (ListwiseLVLMLoss, {"weighting": "rank"}),
    "listnet": (ListNetLoss, {}),
    "lambda": (LambdaLoss, {"scheme": "ndcg-loss2++", "k": None, "mu": 10.0}),
    "ranknet": (LambdaLoss, {"scheme": "none"}),
    "listmle": (ListMLELoss, {"position_aware": False}),
    "plistmle": (ListMLELoss, {"position_aware": True}),
    "adr-mse": (ADRMSELoss, {}),
    "margin-mse": (MarginMSELoss, {}),
}


@pytest.mark.parametrize("name", MADE)
def test_names_make_losses_by_the_arguments(name):
    kind, own = MADE[name]
    loss = make_loss(nn.Identity(), arguments(loss=name))
    assert type(loss) is kind and loss.sampling == "listwise"
    common = {
        "rank_weight": 0.3,
        "in_batch": "best",
        "temperature": 0.2,
        "mini_batch_size": 5,
        "gather_negatives": True,
    }
    assert loss.get_config_dict() | own | common == loss.get_config_dict()


def test_the_contrastive_loss_has_lists_and_targets_of_its_own():
    loss = make_loss(nn.Identity(), arguments(loss="contrastive", in_batch="soft"))
    assert type(loss) is ContrastiveLVLMLoss and loss.sampling == "contrastive"
    assert (loss.rank_weight, loss.in_batch_targets, loss.mini_batch_size) == (0.0, "best", 5)


def test_loss_kwargs_reach_the_loss(tmp_path):
    args = DrumTrainingArguments(str(tmp_path), loss="lambda", loss_kwargs='{"scheme": "lambdarank", "k": 3}')
    loss = make_loss(nn.Identity(), args)
    assert (loss.scheme, loss.k, loss.rank_weight) == ("lambdarank", 3, 0.8)
    with pytest.raises(ValueError, match=r"expected scheme of ndcg-loss2.*'lambda'"):
        make_loss(nn.Identity(), arguments(loss="lambda", loss_kwargs={"scheme": "lambda"}))
    with pytest.raises(ValueError, match="expected k of at least 1"):
        LambdaLoss(nn.Identity(), k=0)


@pytest.mark.parametrize("name", MADE)
def test_modules_mix_their_function_of_similarities_over_temperature_with_the_in_batch_term(name):
    rng = np.random.default_rng(0)
    similarities = torch.from_numpy(rng.uniform(-1, 1, (4, 6)))
    scores = torch.from_numpy(-rng.exponential(1, (4, 6)))
    mask = torch.ones(4, 6, dtype=torch.bool)
    batch = ListBatch(torch.arange(6).expand(4, 6), scores, mask, scores, torch.zeros_like(mask))
    loss = make_loss(nn.Identity(), arguments(loss=name))
    logits = similarities / loss.temperature
    expected = {
        "listnet": lambda: list_distribution_loss(logits, scores, mask, temperature=1.0),
        "lambda": lambda: lambda_loss(logits, scores.exp(), mask),
        "ranknet": lambda: lambda_loss(logits, scores.exp(), mask, scheme="none"),
        "listmle": lambda: list_mle_loss(logits, scores, mask),
        "plistmle": lambda: list_mle_loss(logits, scores, mask, position_aware=True),
        "adr-mse": lambda: adr_mse_loss(logits, scores, mask),
        "margin-mse": lambda: margin_mse_loss(logits, scores, mask),
        "listwise": lambda: loss.ranking(similarities, scores, mask),
    }[name]()
    rest = loss.in_batch(similarities, batch)
    torch.testing.assert_close(loss.list_loss(similarities, batch), 0.3 * expected + 0.7 * rest)
    ends = [make_loss(nn.Identity(), arguments(loss=name, rank_weight=w)) for w in (0.0, 1.0)]
    torch.testing.assert_close(ends[0].list_loss(similarities, batch), rest)
    torch.testing.assert_close(ends[1].list_loss(similarities, batch), expected)


class Hinge(LVLMLoss):
    def ranking(self, similarities, scores, mask):
        better = (scores[:, :, None] > scores[:, None, :]) & mask[:, :, None] & mask[:, None, :]
        return ((0.1 - similarities[:, :, None] + similarities[:, None, :]).clamp_min(0.0) * better).sum((1, 2))


def test_a_loss_of_ones_own_is_a_class_and_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "drum_hf.training.losses._LOSSES", dict.fromkeys(name for name in known_losses() if name != "hinge")
    )
    with pytest.raises(ValueError, match="register_loss; got 'hinge'"):
        DrumTrainingArguments(str(tmp_path), loss="hinge")
    register_loss("hinge", Hinge)
    args = DrumTrainingArguments(str(tmp_path), loss="hinge", rank_weight=1.0, mini_batch_size=2)
    loss = make_loss(nn.Identity(), args)
    assert type(loss) is Hinge and loss.uses_gradient_cache
    queries, columns = torch.eye(3)[:2], [torch.eye(3)[:2], torch.eye(3)[1:]]
    # both queries are at cosine 1 with their first demonstration, which the first one's LVLM likes less
    scores = torch.tensor([[-2.0, -1.0], [-1.0, -2.0]])
    assert loss.calculate_loss([[queries], *([c] for c in columns)], scores).item() == pytest.approx(1.1 / 2)
    assert loss.take_accuracy().tolist() == [1, 2] and loss.take_accuracy().tolist() == [0, 0]
    register_loss("hinge", lambda encoder, arguments: Hinge(encoder, temperature=1.0))
    assert make_loss(nn.Identity(), args).temperature.item() == pytest.approx(1.0)


def test_a_loss_without_ranking_says_what_is_missing():
    with pytest.raises(NotImplementedError, match="LVLMLoss must define ranking or list_loss"):
        LVLMLoss(nn.Identity()).calculate_loss([[torch.eye(2)], [torch.eye(2)]], torch.zeros(2, 1))


def test_ties_and_lists_of_one_are_no_matter_of_accuracy():
    loss = ListNetLoss(nn.Identity())
    scores = torch.tensor([[-1.0, -1.0], [-2.0, -1.0], [-1.0, -2.0]])
    loss.calculate_loss([[torch.eye(3)], [torch.eye(3)], [-torch.eye(3)]], scores)
    assert loss.take_accuracy().tolist() == [1, 2]


def test_under_autocast_similarities_are_computed_in_full():
    loss, draw = ListNetLoss(nn.Identity()), torch.Generator().manual_seed(0)
    reps = [[nn.functional.normalize(torch.randn(4, 32, generator=draw), dim=1)] for _ in range(4)]
    scores = -torch.rand(4, 3, generator=draw)
    expected = loss.calculate_loss(reps, scores)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss.calculate_loss(reps, scores).item() == expected.item()
    half = [[rep.bfloat16() for rep in column] for column in reps]
    assert loss.calculate_loss(half, scores).dtype == torch.float32
