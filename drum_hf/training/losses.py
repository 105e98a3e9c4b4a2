"""List-wise ranking losses from an LVLM's feedback: pure tensor maths first, then the two modules that train.

All of it works on one similarity matrix between B queries and the U *different* demonstrations of a batch. A query's
own list is an index into those columns, so a demonstration that stands in several lists is encoded, and counted, once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from torch import Tensor, nn
from torch.nn.functional import softplus

from .gathering import Origins, join_batches, several_processes

__all__ = [
    "ContrastiveLVLMLoss",
    "InBatch",
    "ListBatch",
    "ListwiseLVLMLoss",
    "Weighting",
    "competition_ranks",
    "in_batch_loss",
    "list_distribution_loss",
    "pair_weights",
    "pairwise_list_loss",
    "soft_in_batch_loss",
]

Weighting = Literal["utility", "rank", "position", "kl"]
InBatch = Literal["best", "soft"]


def competition_ranks(scores: Tensor, mask: Tensor) -> Tensor:
    """Ranks by descending score, 1 the best; equal scores share the better rank.

    Args:
        scores: (B, K) float, higher is better.
        mask: (B, K) bool, False where the list is padded.

    Returns:
        (B, K) float, at least 1. Padded places get a rank too; mask them out.
    """
    better = (scores[:, None, :] > scores[:, :, None]) & mask[:, None, :]
    return better.sum(-1).to(scores.dtype) + 1.0


def pair_weights(scores: Tensor, similarities: Tensor, mask: Tensor, weighting: Weighting) -> Tensor:
    """Weight of "i should stand above j", (B, K, K), at least 0 and 0 wherever the LVLM does not prefer i.

    - ``"utility"``: max(0, p_i - p_j) / l with p = exp(score), the response's probability a token, and l the list's
      length (our choice: near-ties, which are most of a list after the first round, hardly count);
    - ``"rank"``: max(0, 1/r_i - 1/r_j), r the LVLM's rank (UDR's paper);
    - ``"position"``: |1/q_i - 1/q_j| wherever the LVLM prefers i, q the places by current similarity, divided by the
      number of such pairs (after UDR's released code; a list of ties gives 0 rather than its NaN).

    Args:
        scores: (B, K) LVLM scores (mean log-probability a token).
        similarities: (B, K) current similarities; only `position` reads them.
        mask: (B, K) bool.
        weighting: which of the three.
    """
    both = mask[:, :, None] & mask[:, None, :]
    if weighting == "utility":
        value = scores.exp()
        weights = (value[:, :, None] - value[:, None, :]).clamp_min(0.0)
        return weights * both / mask.sum(-1).clamp_min(1)[:, None, None]
    inverse = 1.0 / competition_ranks(scores, mask)
    if weighting == "rank":
        return (inverse[:, :, None] - inverse[:, None, :]).clamp_min(0.0) * both
    if weighting == "position":
        preferred = (inverse[:, :, None] > inverse[:, None, :]) & both
        place = 1.0 / competition_ranks(similarities.detach(), mask)
        weights = (place[:, :, None] - place[:, None, :]).abs() * preferred
        return weights / preferred.sum((1, 2)).clamp_min(1)[:, None, None]
    raise ValueError(f"expected pair weights of utility, rank, position; got {weighting!r}")


def pairwise_list_loss(
    similarities: Tensor, scores: Tensor, mask: Tensor, *, weighting: Weighting, temperature: Tensor | float
) -> Tensor:
    """L_rank, (B,): sum over i, j of w_ij * log(1 + exp((s_j - s_i) / temperature)).

    A list whose scores are all equal contributes exactly 0, and so does its gradient.

    Source: UDR, from which DRUM's "unified list-wise ranking loss" descends; the temperature is our
    choice, since cosines need one.
    """
    weights = pair_weights(scores, similarities, mask, weighting)
    margin = (similarities[:, None, :] - similarities[:, :, None]) / temperature
    return (weights * softplus(margin)).sum((1, 2))


def list_distribution_loss(
    similarities: Tensor, scores: Tensor, mask: Tensor, *, temperature: Tensor | float
) -> Tensor:
    """Cross-entropy between p / sum(p), p = exp(score), and the softmax of similarities over the list, (B,).

    Its gradient is that of the KL divergence to the LVLM's score distribution (LLM-R).
    """
    target = scores.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask, 0.0)  # an empty list is no NaN
    logits = (similarities / temperature).masked_fill(~mask, -torch.inf).log_softmax(-1)
    return -(target * logits.masked_fill(~mask, 0.0)).sum(-1)


def in_batch_loss(
    similarities: Tensor,
    index: Tensor,
    scores: Tensor,
    mask: Tensor,
    known: Tensor,
    blocked: Tensor,
    *,
    temperature: Tensor | float,
) -> Tensor:
    """L_in-batch, (B,): -log softmax of the best candidate over all the batch's demonstrations.

    Not a negative: the query's own row or group (`blocked`), and whatever the LVLM is known to like as much as the
    best of the list (ties are positives of their own, averaged over).

    Args:
        similarities: (B, U) to every different demonstration of the batch.
        index: (B, K) columns of each query's own list.
        scores, mask: (B, K) of that list.
        known: (B, U) LVLM score of that pair where it was ever paid for, NaN elsewhere.
        blocked: (B, U) bool.

    Source: UDR; the treatment of known scores and of ties is our choice.
    """
    best = scores.masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
    logits = similarities / temperature
    negative = ~blocked & ~(known >= best)  # NaN compares False: an unknown pair is a negative
    rest = logits.masked_fill(~negative, -torch.inf).logsumexp(-1, keepdim=True)
    own = logits.gather(1, index)
    positive = (scores >= best) & mask
    loss = torch.logaddexp(own, rest.expand_as(own)) - own
    return (loss * positive).sum(-1) / positive.sum(-1).clamp_min(1)


def soft_in_batch_loss(similarities: Tensor, known: Tensor, blocked: Tensor, *, temperature: Tensor | float) -> Tensor:
    """L_in-batch with soft targets, (B,): every demonstration of the batch that the LVLM likes is wanted as much.

    Cross-entropy between p / sum(p), p = exp(known score) and 0 where none is known, and the softmax of similarities
    over all of the batch's demonstrations but `blocked` ones, times the largest p: a query that nothing helps teaches
    little. A query without a known score contributes 0.

    Args:
        similarities, known, blocked: (B, U), as in `in_batch_loss`.

    Source: our choice; soft targets as in LLM-R's distillation, over the batch rather than the list.
    """
    value = known.exp().nan_to_num(0.0).masked_fill(blocked, 0.0)
    target = value / value.sum(-1, keepdim=True).clamp_min(1e-9)
    # finite, so that a row with nothing but blocked ones has a gradient of 0 and not of NaN
    logits = (similarities / temperature).masked_fill(blocked, torch.finfo(similarities.dtype).min / 2)
    return -(target * logits.log_softmax(-1)).sum(-1) * value.amax(-1)


@dataclasses.dataclass
class ListBatch:
    """What a batch knows of its lists.

    Attributes:
        index: (B, K) long, columns of the batch's demonstrations.
        scores: (B, K) float, LVLM scores.
        mask: (B, K) bool, False where a list is padded.
        known: (B, U) float, LVLM scores known for any pair of the batch, NaN elsewhere.
        blocked: (B, U) bool, the query's own row and group.
        origins: what other processes must know to join the batch with theirs; None where they need not.
    """

    index: Tensor
    scores: Tensor
    mask: Tensor
    known: Tensor
    blocked: Tensor
    origins: Origins | None = None

    @classmethod
    def from_labels(cls, labels: Any, queries: int, demonstrations: int) -> ListBatch:
        """From the trainer's dict of tensors, or from plain (B, K) scores with one column a demonstration."""
        if isinstance(labels, dict):
            origins = Origins(**labels["origins"]) if "origins" in labels else None
            own = {name: labels[name] for name in ("index", "scores", "mask", "known", "blocked")}
            return cls(**own, origins=origins)
        if labels is None or labels.ndim != 2 or labels.shape[0] != queries:
            got = "none" if labels is None else tuple(labels.shape)
            raise ValueError(
                f"expected labels of shape (batch={queries}, K): the LVLM's score of each demonstration column; "
                f"got {got}. Give the data set columns query, demo_0 … demo_(K-1) and a list column 'label'"
            )
        size = labels.shape[1]
        if demonstrations != queries * size:
            raise ValueError(
                f"expected {size} demonstration columns, one for each of a row's {size} labels; "
                f"got {demonstrations / queries:g}"
            )
        # columns were stacked one after another: demonstration k of query b stands in row k * B + b
        index = (
            torch.arange(size, device=labels.device) * queries + torch.arange(queries, device=labels.device)[:, None]
        )
        known = labels.new_full((queries, demonstrations), math.nan, dtype=torch.float).scatter(
            1, index, labels.float()
        )
        mask, blocked = torch.ones_like(index, dtype=torch.bool), torch.zeros_like(known, dtype=torch.bool)
        return cls(index, labels.float(), mask, known, blocked, Origins.apart(index, labels.float(), demonstrations))


#: What the platform calls an embedding among a model's inputs and outputs.
_EMBEDDED = "sentence_embedding"


class _LVLMLoss(CachedLossMixin, nn.Module):
    """Encoding, temperature and gradient caching that the losses here share."""

    _temperature_slope: Tensor

    def __init__(
        self,
        model: nn.Module,
        temperature: float,
        learn_temperature: bool,
        mini_batch_size: int | None,
        gather_negatives: bool,
    ) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(f"expected a positive temperature; got {temperature}")
        self.model = model
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)), requires_grad=learn_temperature)
        self.mini_batch_size = mini_batch_size or 0
        self.uses_gradient_cache = mini_batch_size is not None
        self.gather_negatives = gather_negatives

    @property
    def temperature(self) -> Tensor:
        """Current temperature; kept above 0.01, as CLIP keeps its logit scale below 100."""
        return self.log_temperature.exp().clamp_min(0.01)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Any) -> Tensor:
        features = list(sentence_features)
        if self.uses_gradient_cache:
            loss = self.forward_cached(features, labels)
            if loss.requires_grad and self.log_temperature.requires_grad:
                # adds 0, and the temperature's gradient at backward time, scaled as every other one is
                loss = loss + (self.log_temperature - self.log_temperature.detach()) * self._temperature_slope
            return loss
        if (joined := _joined(features)) is not None:
            # One forward: an image that both sides show is encoded once, and under DDP, which takes the last forward
            # before a backward to tell it which parameters a step uses, there must be but one.
            sizes = [len(column["present"]) for column in features]
            columns = self.model(joined)[_EMBEDDED].split(sizes)
        else:
            columns = [_given(column, self.model) for column in features]
        return self.calculate_loss([[column] for column in columns], labels)

    def embed_minibatch(
        self, sentence_feature: dict[str, Tensor], begin: int, end: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """As the platform's; what is embedded already is taken as it is, and gets no gradient."""
        if _EMBEDDED in sentence_feature:
            return sentence_feature[_EMBEDDED][begin:end], None
        return super().embed_minibatch(sentence_feature, begin, end, *args, **kwargs)

    def calculate_loss(self, reps: Sequence[Sequence[Tensor]], labels: Any = None, *, with_backward: bool = False):
        """Loss of embeddings that are already there: `reps[0]` the queries' chunks, the rest the demonstrations'."""
        queries = torch.cat(list(reps[0]))
        demonstrations = torch.cat([chunk for column in reps[1:] for chunk in column])
        batch = ListBatch.from_labels(labels, len(queries), len(demonstrations))
        if self.gather_negatives and several_processes():
            demonstrations, batch = join_batches(demonstrations, batch)
        loss = self.list_loss(queries @ demonstrations.T, batch).mean()
        if with_backward:
            if self.log_temperature.requires_grad:
                (self._temperature_slope,) = torch.autograd.grad(loss, self.log_temperature, retain_graph=True)
            loss.backward(inputs=[chunk for column in reps for chunk in column])
            loss = loss.detach()
        return loss

    def in_batch(self, similarities: Tensor, batch: ListBatch) -> Tensor:
        """`in_batch_loss` of this batch at the current temperature, (B,)."""
        return in_batch_loss(
            similarities,
            batch.index,
            batch.scores,
            batch.mask,
            batch.known,
            batch.blocked,
            temperature=self.temperature,
        )

    def list_loss(self, similarities: Tensor, batch: ListBatch) -> Tensor:
        """Loss of each query, (B,), from similarities (B, U)."""
        raise NotImplementedError(f"{type(self).__name__} must define list_loss")


def _given(column: dict[str, Tensor], model: nn.Module) -> Tensor:
    """A column's embeddings: those that it brings along, or else what the model makes of it."""
    return column[_EMBEDDED] if _EMBEDDED in column else model(column)[_EMBEDDED]


def _joined(features: Sequence[dict[str, Tensor]]) -> dict[str, Tensor] | None:
    """A `JointEncoder`'s columns as one, since only the number of rows sets them apart; None for another model's."""
    if any("present" not in column or column.keys() != features[0].keys() for column in features):
        return None
    return {name: torch.cat([column[name] for column in features]) for name in features[0]}


class ListwiseLVLMLoss(_LVLMLoss):
    """DRUM's list-wise ranking loss: rank_weight * L_rank + (1 - rank_weight) * L_in-batch.

    Args:
        model: the SentenceTransformer that is trained; its embeddings are unit vectors.
        weighting: how much a pair of a list counts, see `pair_weights`. "utility" (ours) needs the fewest LVLM calls
            for the same retriever; "rank" and "position" are the ancestor's.
            "kl" takes no pairs: the cross-entropy to the LVLM's distribution over the list (LLM-R).
        rank_weight: lambda, UDR's value 0.8.
        in_batch: "soft" wants each demonstration of the batch as much as the LVLM is known to like it (ours; see
            `soft_in_batch_loss`); "best" wants the list's best above all others (UDR; see `in_batch_loss`).
        temperature: divides similarities; our choice, 0.05 to start with.
        learn_temperature: train it along (default).
        mini_batch_size: if given, gradient caching (GradCache): memory of that many items, the loss of the whole
            batch. A small pool of in-batch negatives costs quality, so cache rather than shrink the batch.
        gather_negatives: of several processes, each compares its queries with the demonstrations of all, as one
            process with the joint batch would. Every process must then call the loss alike. Off, as in the platform's
            losses; `DrumTrainer` turns it on.

    Inputs:
        Either `DrumTrainer`'s batches, or a data set for the plain SentenceTransformerTrainer with the columns
        query, demo_0 … demo_(K-1) and `label`, a list of K LVLM scores (mean log-probability a token).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weighting: Weighting = "utility",
        rank_weight: float = 0.8,
        in_batch: InBatch = "soft",
        temperature: float = 0.05,
        learn_temperature: bool = True,
        mini_batch_size: int | None = None,
        gather_negatives: bool = False,
    ) -> None:
        super().__init__(model, temperature, learn_temperature, mini_batch_size, gather_negatives)
        for name, value, known in (
            ("weighting", weighting, get_args(Weighting)),
            ("in_batch", in_batch, get_args(InBatch)),
        ):
            if value not in known:
                raise ValueError(f"expected {name} of {', '.join(known)}; got {value!r}")
        if not 0.0 <= rank_weight <= 1.0:
            raise ValueError(f"expected rank_weight between 0 and 1; got {rank_weight}")
        self.weighting: Weighting = weighting
        self.rank_weight = rank_weight
        self.in_batch_targets: InBatch = in_batch

    def list_loss(self, similarities: Tensor, batch: ListBatch) -> Tensor:
        own, temperature = similarities.gather(1, batch.index), self.temperature
        if self.weighting == "kl":
            ranked = list_distribution_loss(own, batch.scores, batch.mask, temperature=temperature)
        else:
            ranked = pairwise_list_loss(
                own, batch.scores, batch.mask, weighting=self.weighting, temperature=temperature
            )
        if self.in_batch_targets == "soft":
            rest = soft_in_batch_loss(similarities, batch.known, batch.blocked, temperature=temperature)
        else:
            rest = self.in_batch(similarities, batch)
        return self.rank_weight * ranked + (1.0 - self.rank_weight) * rest

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        return {
            "weighting": self.weighting,
            "rank_weight": self.rank_weight,
            "in_batch": self.in_batch_targets,
            "temperature": round(self.temperature.item(), 4),
            "mini_batch_size": self.mini_batch_size or None,
            "gather_negatives": self.gather_negatives,
        }


class ContrastiveLVLMLoss(_LVLMLoss):
    """EPR's contrastive loss: -log softmax of one positive over all positives and hard negatives of the batch.

    Made for lists of one demonstration sampled from a query's five best by the LVLM and others from its five worst
    (`sampling="contrastive"` of the trainer). The list's best counts as the positive. Known scores and the query's own
    group are left out of the negatives just as in `ListwiseLVLMLoss` with `in_batch="best"`.

    Source: EPR; temperature our choice, as in `ListwiseLVLMLoss`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float = 0.05,
        learn_temperature: bool = True,
        mini_batch_size: int | None = None,
        gather_negatives: bool = False,
    ) -> None:
        super().__init__(model, temperature, learn_temperature, mini_batch_size, gather_negatives)

    def list_loss(self, similarities: Tensor, batch: ListBatch) -> Tensor:
        return self.in_batch(similarities, batch)

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        return {
            "temperature": round(self.temperature.item(), 4),
            "mini_batch_size": self.mini_batch_size or None,
            "gather_negatives": self.gather_negatives,
        }
