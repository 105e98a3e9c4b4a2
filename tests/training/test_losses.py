"""The list-wise losses against hand-computed lists, loops over pairs, and gradcheck; cached against uncached."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from drum_hf.training.losses import (
    ContrastiveLVLMLoss,
    ListBatch,
    ListNetLoss,
    ListwiseLVLMLoss,
    competition_ranks,
    in_batch_loss,
    list_distribution_loss,
    pair_weights,
    pairwise_list_loss,
    soft_in_batch_loss,
)

WEIGHTINGS = ("utility", "rank", "position")


def doubles(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def everywhere(like):
    return torch.ones(like.shape, dtype=torch.bool)


# Ranks and weights


def test_ranks_are_shared_by_ties_and_blind_to_padding():
    scores = doubles([-1.0, -0.5, -1.0, -3.0], [0.0, 9.0, -2.0, 0.0])
    mask = torch.tensor([[True] * 4, [True, False, True, True]])
    ranks = competition_ranks(scores, mask)
    assert ranks[0].tolist() == [2, 1, 2, 4]
    assert ranks[1][mask[1]].tolist() == [1, 3, 1]


def test_rank_weights_of_a_list_of_three():
    scores = doubles([-2.0, -1.0, -3.0])  # ranks 2, 1, 3
    expected = [[0, 0, 1 / 2 - 1 / 3], [1 / 2, 0, 1 - 1 / 3], [0, 0, 0]]
    weights = pair_weights(scores, torch.zeros_like(scores), everywhere(scores), "rank")[0]
    np.testing.assert_allclose(weights, expected, atol=1e-12)


def test_utility_weights_of_a_list_of_two():
    scores = doubles([math.log(0.5), math.log(0.2)])
    weights = pair_weights(scores, torch.zeros_like(scores), everywhere(scores), "utility")[0]
    np.testing.assert_allclose(weights, [[0, 0.3 / 2], [0, 0]], atol=1e-12)


def test_position_weights_are_averaged_over_the_preferred_pairs():
    scores, similarities = doubles([-1.0, -2.0, -2.0]), doubles([0.1, 0.3, 0.2])  # places 3, 1, 2
    expected = [[0, (1 - 1 / 3) / 2, (1 / 2 - 1 / 3) / 2], [0, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(
        pair_weights(scores, similarities, everywhere(scores), "position")[0], expected, atol=1e-12
    )


def test_an_unknown_weighting_is_named():
    with pytest.raises(ValueError, match="utility, rank, position; got 'gap'"):
        pair_weights(doubles([0.0]), doubles([0.0]), everywhere(doubles([0.0])), "gap")
    with pytest.raises(ValueError, match="weighting of utility, rank, position; got 'gap'"):
        ListwiseLVLMLoss(nn.Identity(), weighting="gap")
    with pytest.raises(ValueError, match="in_batch of best, soft; got 'hard'"):
        ListwiseLVLMLoss(nn.Identity(), in_batch="hard")


# Soft targets over the batch


def test_soft_in_batch_targets_by_hand():
    similarities = doubles([0.4, 0.1, 0.3, 0.9], [0.2, 0.5, 0.1, 0.3])
    known = doubles([math.log(0.6), math.log(0.2), math.nan, math.log(0.9)], [math.nan] * 4)
    blocked = torch.tensor([[False, False, False, True], [False] * 4])
    total = sum(math.exp(s / 0.5) for s in (0.4, 0.1, 0.3))
    expected = -0.6 * (0.75 * math.log(math.exp(0.8) / total) + 0.25 * math.log(math.exp(0.2) / total))
    loss = soft_in_batch_loss(similarities, known, blocked, temperature=0.5)
    np.testing.assert_allclose(loss, [expected, 0.0], atol=1e-12)


def test_soft_in_batch_gradients_are_finite_where_all_is_blocked():
    similarities = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    known = torch.full((2, 3), -0.5, dtype=torch.float64)
    blocked = torch.tensor([[True] * 3, [True, False, False]])
    soft_in_batch_loss(similarities, known, blocked, temperature=0.1).sum().backward()
    assert similarities.grad[0].abs().sum() == 0 and torch.isfinite(similarities.grad).all()
    assert similarities.grad[1, 0] == 0 and similarities.grad[1, 1:].abs().sum() > 0


def test_kl_and_soft_targets_are_what_the_module_adds_up():
    torch.manual_seed(0)
    similarities, scores = torch.randn(2, 4), -torch.rand(2, 4)
    index = torch.arange(4).expand(2, 4)
    batch = ListBatch(index, scores, everywhere(scores), scores, torch.zeros(2, 4, dtype=torch.bool))
    loss = ListNetLoss(nn.Identity(), in_batch="soft", rank_weight=0.3, temperature=0.2)
    kl = list_distribution_loss(similarities, scores, batch.mask, temperature=0.2)
    soft = soft_in_batch_loss(similarities, scores, batch.blocked, temperature=0.2)
    torch.testing.assert_close(loss.list_loss(similarities, batch), 0.3 * kl + 0.7 * soft)


# Oracles: loops over one list at a time


def ranks_of(values):
    return [1 + sum(other > value for other in values) for value in values]


def pairwise_by_hand(similarities, scores, weighting, temperature):
    liked, placed, size = ranks_of(scores), ranks_of(similarities), len(scores)
    total, preferred = 0.0, 0
    for i in range(size):
        for j in range(size):
            if scores[i] <= scores[j]:
                continue
            preferred += 1
            weight = {
                "utility": (math.exp(scores[i]) - math.exp(scores[j])) / size,
                "rank": 1 / liked[i] - 1 / liked[j],
                "position": abs(1 / placed[i] - 1 / placed[j]),
            }[weighting]
            total += weight * math.log1p(math.exp((similarities[j] - similarities[i]) / temperature))
    return total / preferred if weighting == "position" and preferred else total


def in_batch_by_hand(similarities, own, scores, known, blocked, temperature):
    best = max(scores)
    negatives = [
        math.exp(s / temperature)
        for u, s in enumerate(similarities)
        if not blocked[u] and not (known[u] is not None and known[u] >= best)
    ]
    losses = []
    for column, score in zip(own, scores, strict=True):
        if score == best:
            positive = math.exp(similarities[column] / temperature)
            losses.append(-math.log(positive / (positive + sum(negatives))))
    return sum(losses) / len(losses)


# few different values, so that ties are frequent
lists = st.integers(1, 6).flatmap(
    lambda size: st.tuples(
        st.lists(st.integers(-10, 10).map(lambda x: x / 10), min_size=size, max_size=size),
        st.lists(st.sampled_from([-3.0, -2.0, -1.5, -0.7, -0.1]), min_size=size, max_size=size),
    )
)


@settings(max_examples=60, deadline=None)
@given(batch=st.lists(lists, min_size=1, max_size=3), weighting=st.sampled_from(WEIGHTINGS), garbage=st.floats(-5, 5))
def test_pairwise_loss_of_padded_lists_is_the_sum_over_pairs(batch, weighting, garbage):
    width = max(len(scores) for _, scores in batch) + 1
    similarities = torch.full((len(batch), width), garbage, dtype=torch.float64)
    scores, mask = similarities.clone(), torch.zeros(len(batch), width, dtype=torch.bool)
    for row, (own, liked) in enumerate(batch):
        similarities[row, : len(own)], scores[row, : len(own)] = torch.tensor(own).double(), torch.tensor(liked)
        scores[row, : len(own)] = torch.tensor(liked, dtype=torch.float64)
        mask[row, : len(own)] = True
    similarities.requires_grad_()
    loss = pairwise_list_loss(similarities, scores, mask, weighting=weighting, temperature=0.2)
    loss.sum().backward()
    plain = [(similarities[r, mask[r]].tolist(), scores[r, mask[r]].tolist()) for r in range(len(batch))]
    np.testing.assert_allclose(loss.detach(), [pairwise_by_hand(*p, weighting, 0.2) for p in plain], atol=1e-10)
    assert torch.isfinite(similarities.grad).all()
    assert (similarities.grad[~mask] == 0).all()
    for row, (_, liked) in enumerate(batch):
        if len(set(liked)) == 1:
            assert loss[row] == 0
            assert (similarities.grad[row] == 0).all()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_an_all_tied_or_empty_list_gives_exactly_nothing(weighting):
    similarities = doubles([0.3, -0.2, 0.3], [0.5, 0.5, 0.5], [0.1, 0.2, 0.3]).requires_grad_()
    mask = torch.tensor([[True] * 3, [True] * 3, [False] * 3])
    temperature = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    loss = pairwise_list_loss(
        similarities,
        torch.full((3, 3), -1.25, dtype=torch.float64),
        mask,
        weighting=weighting,
        temperature=temperature,
    )
    loss.sum().backward()
    assert loss.tolist() == [0, 0, 0]
    assert (similarities.grad == 0).all()
    assert temperature.grad == 0


# In-batch term


def random_batch(seed, queries=3, size=3, columns=7):
    rng = np.random.default_rng(seed)
    index = np.stack([rng.permutation(columns)[:size] for _ in range(queries)])
    scores = rng.choice([-2.0, -1.0, -0.5], (queries, size))
    known = np.where(rng.random((queries, columns)) < 0.3, rng.choice([-2.0, -0.5, -0.1], (queries, columns)), np.nan)
    np.put_along_axis(known, index, scores, axis=1)
    blocked = rng.random((queries, columns)) < 0.2
    np.put_along_axis(blocked, index, False, axis=1)
    similarities = rng.uniform(-1, 1, (queries, columns))
    tensors = [torch.from_numpy(a) for a in (similarities, index, scores, np.ones_like(scores, bool), known, blocked)]
    return tensors


@pytest.mark.parametrize("seed", range(5))
def test_in_batch_loss_is_the_softmax_written_out(seed):
    similarities, index, scores, mask, known, blocked = random_batch(seed)
    loss = in_batch_loss(similarities, index, scores, mask, known, blocked, temperature=0.3)
    expected = [
        in_batch_by_hand(
            similarities[b].tolist(),
            index[b].tolist(),
            scores[b].tolist(),
            [None if math.isnan(x) else x for x in known[b].tolist()],
            blocked[b].tolist(),
            0.3,
        )
        for b in range(len(index))
    ]
    np.testing.assert_allclose(loss, expected, rtol=1e-10)


def equal_batch(columns=6):
    """One query whose list is the first three columns, the first of them the best; all similarities equal."""
    known = torch.full((1, columns), math.nan, dtype=torch.float64)
    scores = doubles([-0.5, -1.0, -2.0])
    known[0, :3] = scores[0]
    return {
        "similarities": torch.full((1, columns), 0.4, dtype=torch.float64),
        "index": torch.tensor([[0, 1, 2]]),
        "scores": scores,
        "mask": everywhere(scores),
        "known": known,
        "blocked": torch.zeros(1, columns, dtype=torch.bool),
    }


def test_equal_similarities_cost_the_log_of_the_number_of_demonstrations():
    assert in_batch_loss(**equal_batch(), temperature=0.05).item() == pytest.approx(math.log(6))


def test_blocked_and_well_liked_demonstrations_are_no_negatives():
    batch = equal_batch()
    batch["blocked"][0, 5] = True
    assert in_batch_loss(**batch, temperature=0.05).item() == pytest.approx(math.log(5))
    batch["known"][0, 4] = -0.3  # liked more than the list's best
    assert in_batch_loss(**batch, temperature=0.05).item() == pytest.approx(math.log(4))
    batch["known"][0, 3] = -0.9  # known, but liked less: still a negative
    assert in_batch_loss(**batch, temperature=0.05).item() == pytest.approx(math.log(4))


def test_tied_best_ones_are_positives_of_their_own():
    batch = equal_batch()
    batch["scores"][0, 1] = batch["known"][0, 1] = -0.5
    assert in_batch_loss(**batch, temperature=0.05).item() == pytest.approx(math.log(5))


def test_no_negative_left_or_no_list_gives_nothing_and_no_nan():
    batch = equal_batch(columns=3)
    batch["blocked"][0, 1:] = True
    batch["similarities"].requires_grad_()
    loss = in_batch_loss(**batch, temperature=0.05)
    loss.sum().backward()
    assert loss.item() == 0
    assert (batch["similarities"].grad == 0).all()
    empty = equal_batch()
    empty["similarities"].requires_grad_()
    empty |= {"mask": torch.zeros(1, 3, dtype=torch.bool), "known": torch.full((1, 6), math.nan)}
    loss = in_batch_loss(**empty, temperature=0.05)
    loss.sum().backward()
    assert loss.item() == 0
    assert (empty["similarities"].grad == 0).all()


# Distribution loss


def test_distribution_loss_has_the_gradient_of_the_kl_divergence():
    similarities, scores = doubles([0.2, -0.1, 0.4, 9.0]).requires_grad_(), doubles([-1.0, -0.2, -3.0, 0.0])
    mask = torch.tensor([[True, True, True, False]])
    loss = list_distribution_loss(similarities, scores, mask, temperature=0.5)
    loss.sum().backward()
    p = np.exp(scores[0, :3].numpy()) / np.exp(scores[0, :3].numpy()).sum()
    q = np.exp(np.array([0.2, -0.1, 0.4]) / 0.5)
    q /= q.sum()
    assert loss.item() == pytest.approx(-(p * np.log(q)).sum())
    np.testing.assert_allclose(similarities.grad[0], [*((q - p) / 0.5), 0.0], atol=1e-12)


def test_distribution_loss_of_an_empty_list_is_nothing():
    similarities = doubles([0.2, 0.1]).requires_grad_()
    loss = list_distribution_loss(
        similarities, doubles([-1.0, -2.0]), torch.zeros(1, 2, dtype=torch.bool), temperature=0.1
    )
    loss.sum().backward()
    assert loss.item() == 0
    assert (similarities.grad == 0).all()


# Gradients


@pytest.mark.parametrize("name", [*WEIGHTINGS, "in-batch", "distribution"])
def test_gradcheck(name):
    similarities, index, scores, mask, known, blocked = random_batch(11)
    scores += torch.rand(scores.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.1
    mask[0, 2] = False

    def value(similarities, temperature):
        own = similarities.gather(1, index)
        if name == "in-batch":
            return in_batch_loss(similarities, index, scores, mask, known, blocked, temperature=temperature)
        if name == "distribution":
            return list_distribution_loss(own, scores, mask, temperature=temperature)
        return pairwise_list_loss(own, scores, mask, weighting=name, temperature=temperature)

    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(value, (similarities.requires_grad_(), temperature))


# The modules


class Towers(nn.Module):
    """Unit vectors from rows of numbers, with dropout so that a replayed forward must replay its randomness."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(5, 8), nn.Dropout(dropout)

    def forward(self, features):
        return {"sentence_embedding": nn.functional.normalize(self.dropout(self.layer(features["rows"])), dim=1)}


def numbers(count, seed):
    return {"rows": torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))}


def dict_labels(queries=4, size=3, columns=9, seed=0):
    batch = random_batch(seed, queries, size, columns)
    names = ("index", "scores", "mask", "known", "blocked")
    return {n: t.float() if t.is_floating_point() else t for n, t in zip(names, batch[1:], strict=True)}


KINDS = [*WEIGHTINGS, "contrastive"]


def made(kind, model, **kwargs):
    if kind == "contrastive":
        return ContrastiveLVLMLoss(model, **kwargs)
    return ListwiseLVLMLoss(model, weighting=kind, **kwargs)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_columns_and_the_trainers_batches_give_one_loss(kind):
    torch.manual_seed(0)
    loss = made(kind, Towers())
    queries, columns = numbers(4, 1), [numbers(4, 2 + k) for k in range(3)]
    scores = torch.tensor([[-1.0, -0.2, -2.0], [-0.5, -0.5, -3.0], [-1.0, -1.0, -1.0], [-2.0, -1.0, -0.1]])
    plain = loss([queries, *columns], scores)
    # the same twelve demonstrations, shuffled, as one column
    place = torch.randperm(12, generator=torch.Generator().manual_seed(7))
    rows = torch.empty(12, 5)
    rows[place] = torch.cat([c["rows"] for c in columns])
    index = torch.stack([place[torch.arange(3) * 4 + b] for b in range(4)])
    labels = {
        "index": index,
        "scores": scores,
        "mask": torch.ones(4, 3, dtype=torch.bool),
        "known": torch.full((4, 12), math.nan).scatter(1, index, scores),
        "blocked": torch.zeros(4, 12, dtype=torch.bool),
    }
    assert loss([queries, {"rows": rows}], labels).item() == pytest.approx(plain.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("labels", "columns", "message"),
    [
        (None, 2, "got none"),
        (torch.zeros(4), 2, r"got \(4,\)"),
        (torch.zeros(3, 2), 2, r"batch=4.*got \(3, 2\)"),
        (torch.zeros(4, 3), 2, "expected 3 demonstration columns.*got 2"),
    ],
)
def test_labels_that_do_not_fit_are_named(labels, columns, message):
    with pytest.raises(ValueError, match=message):
        ListwiseLVLMLoss(Towers())([numbers(4, 0) for _ in range(columns + 1)], labels)


@pytest.mark.parametrize("fault", [{"temperature": 0.0}, {"temperature": math.nan}, {"rank_weight": 1.5}])
def test_settings_out_of_range_are_refused(fault):
    with pytest.raises(ValueError, match="expected"):
        ListwiseLVLMLoss(Towers(), **fault)


def test_rank_weight_mixes_the_two_terms():
    model, features, labels = Towers(), [numbers(4, 1), numbers(9, 2)], dict_labels()
    ends = [ListwiseLVLMLoss(model, rank_weight=w, in_batch="best")(features, labels).item() for w in (0.0, 1.0)]
    mixed = ListwiseLVLMLoss(model, rank_weight=0.8, in_batch="best")(features, labels).item()
    assert mixed == pytest.approx(0.2 * ends[0] + 0.8 * ends[1], rel=1e-5)
    assert ContrastiveLVLMLoss(model)(features, labels).item() == pytest.approx(ends[0], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_cached_loss_and_gradients_are_the_uncached_ones_under_accumulation(kind, dropout):
    """Two micro-batches, each loss halved, as gradient accumulation does it."""
    torch.manual_seed(0)
    model = Towers(dropout)
    found = []
    for mini_batch_size in (None, 9 if dropout else 2):  # dropout: one chunk a column, or other masks are drawn
        model.zero_grad()
        loss = made(kind, model, mini_batch_size=mini_batch_size)
        values = []
        for step in range(2):
            torch.manual_seed(step)
            value = loss([numbers(4, 10 + step), numbers(9, 20 + step)], dict_labels(seed=step))
            (value / 2).backward()
            values.append(value.item())
        found.append((values, [p.grad.clone() for p in loss.parameters()]))
    (plain, plain_grads), (cached, cached_grads) = found
    assert cached == pytest.approx(plain, abs=1e-5)
    assert len(plain_grads) == 3  # temperature, weight, bias
    assert all(grad.abs().max() > 0 for grad in plain_grads)
    for a, b in zip(plain_grads, cached_grads, strict=True):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-4)


def test_a_fixed_temperature_and_no_gradients_work_with_caching():
    model, features, labels = Towers(), [numbers(4, 1), numbers(9, 2)], dict_labels()
    loss = ListwiseLVLMLoss(model, learn_temperature=False, mini_batch_size=2)
    loss(features, labels).backward()
    assert loss.log_temperature.grad is None
    assert model.layer.weight.grad.abs().max() > 0
    with torch.no_grad():
        value = ListwiseLVLMLoss(model, mini_batch_size=2)(features, labels)
    assert value.item() == pytest.approx(ListwiseLVLMLoss(model)(features, labels).item(), abs=1e-6)


def test_temperature_starts_where_told_and_stays_above_its_floor():
    loss = ListwiseLVLMLoss(Towers(), temperature=0.07)
    assert loss.temperature.item() == pytest.approx(0.07)
    assert loss.get_config_dict()["temperature"] == 0.07
    with torch.no_grad():
        loss.log_temperature.fill_(-20.0)
    assert loss.temperature.item() == pytest.approx(0.01)


def test_from_labels_keeps_each_querys_own_columns():
    scores = torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]])
    batch = ListBatch.from_labels(scores, 3, 6)
    assert batch.index.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert torch.equal(batch.known.gather(1, batch.index), scores)
    assert int(batch.known.isnan().sum()) == 12


@pytest.mark.parametrize("mini_batch_size", [None, 2])
def test_the_plain_sentence_transformers_trainer_takes_the_loss(tmp_path, mini_batch_size):
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from tiny_encoders import picture, tiny_clip

    from drum_hf.encoders.joint import build_encoder

    encoder = build_encoder(tiny_clip(tmp_path), device="cpu")
    colours = ("red", "green", "blue", "yellow")
    rows = [
        {
            "query": {"image": picture(i), "text": ["what colour is the object?", None]},
            **{
                f"demo_{k}": {"image": picture(10 + 4 * k + i), "text": ["how big is it?", colours[k]]} for k in (0, 1)
            },
            "label": [-0.1 - i, -2.0],
        }
        for i in range(4)
    ]
    data = Dataset.from_dict({"row": range(4)}).with_transform(
        lambda batch: {key: [rows[i][key] for i in batch["row"]] for key in rows[0]}
    )
    before = {n: p.detach().clone() for n, p in encoder.named_parameters()}
    loss = ListwiseLVLMLoss(encoder, mini_batch_size=mini_batch_size)
    args = SentenceTransformerTrainingArguments(
        str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    output = SentenceTransformerTrainer(encoder, args=args, train_dataset=data, loss=loss).train()
    assert math.isfinite(output.training_loss)
    assert output.training_loss > 0
    assert any(not torch.equal(p, before[n]) for n, p in encoder.named_parameters() if p.requires_grad)
    assert loss.temperature.item() != pytest.approx(0.05, abs=1e-9)


@pytest.mark.parametrize("mini_batch_size", [None, 2])
def test_the_plain_trainer_takes_bare_strings(tmp_path, mini_batch_size):
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from tiny_encoders import tiny_clip

    from drum_hf.encoders.joint import build_encoder

    encoder = build_encoder(tiny_clip(tmp_path), device="cpu")
    data = Dataset.from_dict(
        {
            "query": [f"what colour is object {i}?" for i in range(4)],
            "demo_0": [f"a red ball {i}" for i in range(4)],
            "demo_1": [f"a blue ball {i}" for i in range(4)],
            "label": [[-0.1 * i, -2.0] for i in range(4)],
        }
    )
    args = SentenceTransformerTrainingArguments(
        str(tmp_path / "out"),
        max_steps=1,
        per_device_train_batch_size=4,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    loss = ListwiseLVLMLoss(encoder, mini_batch_size=mini_batch_size)
    columns = [encoder.encode(data[name], convert_to_tensor=True) for name in ("query", "demo_0", "demo_1")]
    expected = loss.calculate_loss([[column] for column in columns], torch.tensor(data["label"])).item()
    trainer = SentenceTransformerTrainer(encoder, args=args, train_dataset=data, loss=loss)
    assert trainer.train().training_loss == pytest.approx(expected, rel=1e-4)
    assert loss.temperature.item() != pytest.approx(0.05, abs=1e-9)
