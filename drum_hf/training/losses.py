"""List-wise ranking losses from an LVLM's feedback: tensor functions first, then the modules that train.

All of them work on one similarity matrix between the B queries and the U *different* demonstrations of a batch. A
query's list is an index into those columns, so a demonstration in several lists is encoded, and counted, once.

To train with a loss of your own, subclass `LVLMLoss` and register it:

    >>> import torch
    >>> from drum_hf.training import LVLMLoss, register_loss
    >>> class HingeLoss(LVLMLoss):
    ...     def ranking(self, similarities, scores, mask):
    ...         better = (scores[:, :, None] > scores[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    ...         margin = similarities[:, :, None] - similarities[:, None, :]
    ...         return ((0.1 - margin).clamp_min(0.0) * better).sum((1, 2))
    >>> register_loss("hinge", HingeLoss)  # DrumTrainingArguments("out", loss="hinge")
    >>> loss = HingeLoss(torch.nn.Identity(), rank_weight=1.0)
    >>> similarities, scores = torch.tensor([[0.5, 0.45, 0.1]]), torch.tensor([[-1.0, -2.0, -0.5]])
    >>> round(loss.ranking(similarities, scores, scores < 0).item(), 2)
    1.0
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.distributed as dist
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from .mining import Sampling

__all__ = [
    "ADRMSELoss",
    "ContrastiveLVLMLoss",
    "InBatch",
    "LVLMLoss",
    "LambdaLoss",
    "LambdaScheme",
    "ListBatch",
    "ListMLELoss",
    "ListNetLoss",
    "ListwiseLVLMLoss",
    "MarginMSELoss",
    "Origins",
    "Weighting",
    "adr_mse_loss",
    "check_loss",
    "competition_ranks",
    "in_batch_loss",
    "join_batches",
    "known_losses",
    "lambda_loss",
    "list_distribution_loss",
    "list_mle_loss",
    "make_loss",
    "margin_mse_loss",
    "pair_weights",
    "pairwise_list_loss",
    "register_loss",
    "several_processes",
    "soft_in_batch_loss",
]

Weighting = Literal["utility", "rank", "position"]
InBatch = Literal["best", "soft"]
LambdaScheme = Literal["ndcg-loss2++", "ndcg-loss2", "ndcg-loss1", "lambdarank", "none"]


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


def lambda_loss(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor,
    *,
    scheme: LambdaScheme = "ndcg-loss2++",
    k: int | None = None,
    mu: float = 10.0,
) -> Tensor:
    """LambdaLoss, (B,): mean over pairs of w_ij * log2(1 + exp(s_j - s_i)) wherever i should stand above j.

    With q the place by current logits, D(n) = log2(1 + n), and G = (2^label - 1) / maxDCG:

    - `"lambdarank"`: w = |1/D(q_i) - 1/D(q_j)| * |G_i - G_j|;
    - `"ndcg-loss2"`: w = |1/D(d) - 1/D(d + 1)| * |G_i - G_j| with d = |q_i - q_j|;
    - `"ndcg-loss2++"`: mu times the second plus the first;
    - `"ndcg-loss1"`: w = G_i / D(q_i), over all pairs;
    - `"none"`: w = 1, which is RankNet.

    Args:
        logits: (B, K) float, higher is better.
        labels: (B, K) float, at least 0, higher is better.
        mask: (B, K) bool, False where the list is padded.
        k: count only pairs of which one is among the k first, and the DCG of the k best; None counts all.
        mu: weight of NDCG-Loss2 in NDCG-Loss2++; sentence-transformers' value 10.

    Source: Wang et al., The LambdaLoss Framework (CIKM 2018); conventions as in sentence-transformers' `LambdaLoss`.
    """
    size = logits.shape[1]
    k = k or size
    ranks = torch.arange(1, size + 1, device=logits.device, dtype=logits.dtype)
    ideal = labels.masked_fill(~mask, 0.0).sort(-1, descending=True).values
    best = ((2**ideal - 1) / torch.log2(1 + ranks))[:, :k].sum(-1, keepdim=True).clamp_min(1e-10)
    gain = (2**labels - 1).masked_fill(~mask, 0.0) / best
    place = _places(logits, mask)
    inverse = 1 / torch.log2(1 + place)
    both = mask[:, :, None] & mask[:, None, :]
    pairs = both & (labels[:, :, None] > labels[:, None, :])
    gaps = (gain[:, :, None] - gain[:, None, :]).abs()
    apart = (place[:, :, None] - place[:, None, :]).abs()
    near = (1 / torch.log2(1 + apart.clamp_min(1)) - 1 / torch.log2(2 + apart)).masked_fill(apart == 0, 0.0)
    across = (inverse[:, :, None] - inverse[:, None, :]).abs()
    if scheme == "ndcg-loss1":
        pairs, weights = both, (gain * inverse)[:, :, None]
    elif scheme == "none":
        weights = torch.ones_like(gaps)
    else:
        factors = {"lambdarank": across, "ndcg-loss2": near, "ndcg-loss2++": mu * near + across}
        weights = factors[scheme] * gaps
    pairs = pairs & ((place[:, :, None] <= k) | (place[:, None, :] <= k))
    losses = weights * softplus(logits[:, None, :] - logits[:, :, None]) / math.log(2)
    return losses.masked_fill(~pairs, 0.0).sum((1, 2)) / pairs.sum((1, 2)).clamp_min(1)


def list_mle_loss(logits: Tensor, labels: Tensor, mask: Tensor, *, position_aware: bool = False) -> Tensor:
    """ListMLE, (B,): negative log-likelihood of the labels' order under Plackett-Luce; ties in the list's order.

    Args:
        logits, labels, mask: as in `lambda_loss`; of labels only the order counts.
        position_aware: PListMLE: place r of n counts 2^(n - r) - 1, normalized to a sum of 1.

    Source: Xia et al. (ICML 2008); Lan et al., Position-Aware ListMLE (UAI 2014).
    """
    order = labels.masked_fill(~mask, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    kept = mask.gather(1, order)
    chosen = logits.gather(1, order).masked_fill(~kept, torch.finfo(logits.dtype).min / 2)
    terms = chosen.flip(-1).logcumsumexp(-1).flip(-1) - chosen
    if position_aware:
        ranks = torch.arange(1, logits.shape[1] + 1, device=logits.device, dtype=logits.dtype)
        # divided by 2^n, so that long lists do not overflow
        weights = (2.0**-ranks - 2.0 ** -mask.sum(-1, keepdim=True).to(logits.dtype)) * kept
        terms = terms * weights / weights.sum(-1, keepdim=True).clamp_min(1e-10)
    return terms.masked_fill(~kept, 0.0).sum(-1)


def adr_mse_loss(logits: Tensor, labels: Tensor, mask: Tensor, *, alpha: float = 1.0) -> Tensor:
    """ADR-MSE, (B,): mean of (r - r')^2 / log2(1 + r), r the labels' rank and r' a smooth rank of the logits.

    Equal labels share the mean of their ranks.

    Args:
        logits, labels, mask: as in `lambda_loss`; of labels only the order counts.
        alpha: steepness of the smooth rank, r'_i = 1 + sum over j != i of sigmoid(alpha * (s_j - s_i)).

    Source: Schlatt et al., Rank-DistiLLM (ECIR 2025).
    """
    others = mask[:, None, :]
    above = ((labels[:, None, :] > labels[:, :, None]) & others).sum(-1)
    equal = ((labels[:, None, :] == labels[:, :, None]) & others).sum(-1)
    ranks = (above + (equal + 1) / 2).to(logits.dtype)
    beaten = torch.sigmoid(alpha * (logits[:, None, :] - logits[:, :, None])) * others
    smooth = 0.5 + beaten.sum(-1)  # a candidate against itself adds 0.5
    errors = (ranks - smooth) ** 2 / torch.log2(1 + ranks)
    return errors.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1).clamp_min(1)


def margin_mse_loss(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Margin-MSE, (B,): mean squared difference between the best candidate's lead in logits and in labels.

    The best is the one with the highest label, the first of equal ones; the mean is over all others of the list.

    Args:
        logits, labels, mask: as in `lambda_loss`; labels are on the logits' scale, such as log-probabilities.

    Source: Hofstätter et al., arXiv 2010.02666.
    """
    best = labels.masked_fill(~mask, -torch.inf).argmax(-1, keepdim=True)
    lead = (logits.gather(1, best) - logits) - (labels.gather(1, best) - labels)
    others = mask.scatter(1, best, False)
    return (lead**2).masked_fill(~others, 0.0).sum(-1) / others.sum(-1).clamp_min(1)


def _places(values: Tensor, mask: Tensor) -> Tensor:
    """(B, K) float: 1 for the highest value, and so on; equal ones in the list's order, padding last."""
    order = values.detach().masked_fill(~mask, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return order.argsort(-1).to(values.dtype) + 1.0


def several_processes() -> bool:
    """Whether this process trains with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@dataclasses.dataclass
class Origins:
    """What a process shares about its batch, so that others can tell its demonstrations apart.

    All numbers mean the same in every process; -1 is none.

    Attributes:
        rows: (U,) long, the number of each demonstration.
        groups: (U,) long, the number of its group.
        own: (B,) long, the number that each query has as a demonstration.
        own_groups: (B,) long, the number of its group.
        scored: (B, P) long, numbers of all demonstrations whose score with a query is known.
        known: (B, P) float, these scores.
    """

    rows: Tensor
    groups: Tensor
    own: Tensor
    own_groups: Tensor
    scored: Tensor
    known: Tensor

    @classmethod
    def apart(cls, index: Tensor, scores: Tensor, demonstrations: int) -> Origins:
        """Of lists (B, K) in which each of the `demonstrations` columns stands once, in whatever process."""
        count, rank = (dist.get_world_size(), dist.get_rank()) if several_processes() else (1, 0)
        rows = torch.arange(demonstrations, device=index.device) * count + rank
        nobody = index.new_full((len(index),), -1)
        return cls(rows, torch.full_like(rows, -1), nobody, nobody, rows[index], scores)


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


def join_batches(demonstrations: Tensor, batch: ListBatch) -> tuple[Tensor, ListBatch]:
    """This process's queries against the demonstrations of all processes.

    The mean of the processes' losses is then the loss of one process with the joint batch, and so is its gradient once
    DDP has averaged it. Queries need no gathering: what a query loses depends on demonstrations alone.

    To be called by every process; a demonstration that several of them hold counts as the first one's.

    Args:
        demonstrations: (U, dimension), with a gradient or without, the same in all processes; U may differ.
        batch: with `origins`.

    Returns:
        (V, dimension), the different demonstrations of all processes, and `batch` with columns that are these.

    Raises:
        ValueError: the batch does not say where its demonstrations come from.
    """
    origins = batch.origins
    if origins is None:
        raise ValueError(
            "expected labels with 'origins', by which processes tell their demonstrations apart; DrumTrainer's "
            "collator adds them under gather_negatives=True. Set it in DrumTrainingArguments, or make the loss with "
            "gather_negatives=False"
        )
    size = torch.tensor(len(origins.rows), device=origins.rows.device)
    dist.all_reduce(size, dist.ReduceOp.MAX)
    missing = int(size) - len(origins.rows)
    embeddings = _Gathered.apply(pad(demonstrations, (0, 0, 0, missing))).flatten(0, 1)
    rows, groups = _Gathered.apply(pad(torch.stack([origins.rows, origins.groups]), (0, missing), value=-1)).unbind(1)
    columns, places = torch.unique(rows, return_inverse=True)
    # where padding is, column 0 is none: it is blocked for all
    flat = places.flatten()
    first = torch.full_like(columns, flat.numel())
    first.scatter_reduce_(0, flat, torch.arange(flat.numel(), device=flat.device), "amin")
    blocked = (columns == -1) | (columns == origins.own[:, None])
    blocked |= (groups.flatten()[first] == origins.own_groups[:, None]) & (origins.own_groups[:, None] != -1)
    found = torch.searchsorted(columns, origins.scored).clamp(max=len(columns) - 1)
    here = (columns[found] == origins.scored) & (origins.scored != -1)
    query = torch.arange(len(found), device=found.device)[:, None].expand_as(found)
    known = origins.known.new_full(blocked.shape, torch.nan)
    known[query[here], found[here]] = origins.known[here]
    own = places[dist.get_rank()]
    joined = dataclasses.replace(batch, index=own[batch.index], known=known, blocked=blocked, origins=None)
    return embeddings[first], joined


class _Gathered(torch.autograd.Function):
    """(processes, *shape) from each one's tensor; backwards, each gets the sum of what all make of its own."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # all_reduce, since gloo has no reduce_scatter
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[dist.get_rank()]


#: What the platform calls an embedding among a model's inputs and outputs.
_EMBEDDED = "sentence_embedding"


class LVLMLoss(CachedLossMixin, nn.Module):
    """Base of the losses: rank_weight * `ranking` + (1 - rank_weight) * in-batch term, averaged over queries.

    A loss of your own overrides `ranking`, which sees one padded list a query, or `list_loss`, which sees the whole
    batch. Encoding, the learnable temperature, gradient caching, and the negatives of other processes come with this
    class. `register_loss` gives it a name for `DrumTrainingArguments(loss=…)`.

    Args:
        model: the SentenceTransformer that is trained; its embeddings are unit vectors.
        rank_weight: lambda; 1 leaves the in-batch term out, 0 the ranking. UDR's value 0.8.
        in_batch: "soft" wants each demonstration of the batch as much as the LVLM is known to like it (ours; see
            `soft_in_batch_loss`); "best" wants the list's best above all others (UDR; see `in_batch_loss`).
        temperature: start of the temperature, which divides similarities; our choice, 0.05.
        learn_temperature: train it along (default).
        mini_batch_size: if given, gradient caching (GradCache): memory of that many items, the loss of the whole
            batch. A small pool of in-batch negatives costs quality, so cache rather than shrink the batch.
        gather_negatives: of several processes, each compares its queries with the demonstrations of all, as one
            process with the joint batch would. Every process must then call the loss alike. Off, as in the platform's
            losses; `DrumTrainer` turns it on.

    Inputs:
        Either `DrumTrainer`'s batches, or a data set for the plain SentenceTransformerTrainer with the columns
        query, demo_0 … demo_(K-1) and `label`, a list of K LVLM scores (mean log-probability a token).

    Attributes:
        sampling: how `DrumTrainer` draws the lists of a class; see `CandidateTable.sample`.
    """

    sampling: ClassVar[Sampling] = "listwise"
    _temperature_slope: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        rank_weight: float = 0.8,
        in_batch: InBatch = "soft",
        temperature: float = 0.05,
        learn_temperature: bool = True,
        mini_batch_size: int | None = None,
        gather_negatives: bool = False,
    ) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(f"expected a positive temperature; got {temperature}")
        if not 0.0 <= rank_weight <= 1.0:
            raise ValueError(f"expected rank_weight between 0 and 1; got {rank_weight}")
        _check_choice("in_batch", in_batch, get_args(InBatch))
        self.model = model
        self.rank_weight = rank_weight
        self.in_batch_targets: InBatch = in_batch
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)), requires_grad=learn_temperature)
        self.mini_batch_size = mini_batch_size or 0
        self.uses_gradient_cache = mini_batch_size is not None
        self.gather_negatives = gather_negatives
        self._tally: Tensor | None = None

    @classmethod
    def from_arguments(cls, model: nn.Module, arguments: Any, **settings: Any) -> LVLMLoss:
        """The loss that `DrumTrainingArguments` describe; `settings` and `loss_kwargs` override its fields."""
        return cls(model, **cls._settings(arguments) | settings | (arguments.loss_kwargs or {}))

    @classmethod
    def _settings(cls, arguments: Any) -> dict[str, Any]:
        names = ("rank_weight", "in_batch", "temperature", "mini_batch_size", "gather_negatives")
        return {name: getattr(arguments, name) for name in names}

    @property
    def temperature(self) -> Tensor:
        """Current temperature; kept above 0.01, as CLIP keeps its logit scale below 100."""
        return self.log_temperature.exp().clamp_min(0.01)

    def ranking(self, similarities: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        """Loss of each query's list, (B,); 0 for a list with nothing to rank.

        Args:
            similarities: (B, K) float, cosines with the list's demonstrations, with gradient.
            scores: (B, K) float, the LVLM's mean log-probability a token of the gold response; higher is better.
            mask: (B, K) bool, False where the list is padded. Padded places hold arbitrary finite numbers.
        """
        raise NotImplementedError(f"{type(self).__name__} must define ranking or list_loss")

    def list_loss(self, similarities: Tensor, batch: ListBatch) -> Tensor:
        """Loss of each query, (B,), from its similarities to all demonstrations of the batch, (B, U)."""
        if self.rank_weight == 0.0:
            return self.in_batch(similarities, batch)
        ranked = self.ranking(similarities.gather(1, batch.index), batch.scores, batch.mask)
        if self.rank_weight == 1.0:
            return ranked
        return self.rank_weight * ranked + (1.0 - self.rank_weight) * self.in_batch(similarities, batch)

    def in_batch(self, similarities: Tensor, batch: ListBatch) -> Tensor:
        """The in-batch term of each query at the current temperature, (B,)."""
        temperature = self.temperature
        if self.in_batch_targets == "soft":
            return soft_in_batch_loss(similarities, batch.known, batch.blocked, temperature=temperature)
        own = batch.index, batch.scores, batch.mask
        return in_batch_loss(similarities, *own, batch.known, batch.blocked, temperature=temperature)

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
        with torch.autocast(queries.device.type, enabled=False):  # half precision is too coarse for a temperature
            if queries.dtype in (torch.float16, torch.bfloat16):
                queries, demonstrations = queries.float(), demonstrations.float()
            similarities = queries @ demonstrations.T
            self._count(similarities.detach(), batch)
            loss = self.list_loss(similarities, batch).mean()
        if with_backward:
            if self.log_temperature.requires_grad:
                (self._temperature_slope,) = torch.autograd.grad(loss, self.log_temperature, retain_graph=True)
            loss.backward(inputs=[chunk for column in reps for chunk in column])
            loss = loss.detach()
        return loss

    def _count(self, similarities: Tensor, batch: ListBatch) -> None:
        own = similarities.gather(1, batch.index).masked_fill(~batch.mask, -torch.inf)
        best = batch.scores.masked_fill(~batch.mask, -torch.inf).amax(-1)
        worst = batch.scores.masked_fill(~batch.mask, torch.inf).amin(-1)
        first = batch.scores.gather(1, own.argmax(-1, keepdim=True))[:, 0]
        ranked = best > worst
        counts = torch.stack([((first == best) & ranked).sum(), ranked.sum()])
        self._tally = counts if self._tally is None else self._tally + counts

    def take_accuracy(self) -> Tensor:
        """(lists whose best demonstration ranked first, lists with something to rank) since the last call, (2,)."""
        tally, self._tally = self._tally, None
        return torch.zeros(2, dtype=torch.long) if tally is None else tally.cpu()

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        return {
            "rank_weight": self.rank_weight,
            "in_batch": self.in_batch_targets,
            "temperature": round(self.temperature.item(), 4),
            "mini_batch_size": self.mini_batch_size or None,
            "gather_negatives": self.gather_negatives,
        }


def _given(column: dict[str, Tensor], model: nn.Module) -> Tensor:
    """A column's embeddings: those that it brings along, or else what the model makes of it."""
    return column[_EMBEDDED] if _EMBEDDED in column else model(column)[_EMBEDDED]


def _joined(features: Sequence[dict[str, Tensor]]) -> dict[str, Tensor] | None:
    """A `JointEncoder`'s columns as one, since only the number of rows sets them apart; None for another model's."""
    if any("present" not in column or column.keys() != features[0].keys() for column in features):
        return None
    return {name: torch.cat([column[name] for column in features]) for name in features[0]}


def _check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"expected {name} of {', '.join(known)}; got {value!r}")


class ListwiseLVLMLoss(LVLMLoss):
    """DRUM's list-wise ranking loss: pairs of a list, each with its weight, and the in-batch term.

    Args:
        weighting: how much a pair of a list counts, see `pair_weights`. "utility" (ours) needs the fewest LVLM calls
            for the same retriever; "rank" and "position" are the ancestor's.
        settings: those of `LVLMLoss`.
    """

    def __init__(self, model: nn.Module, *, weighting: Weighting = "utility", **settings: Any) -> None:
        super().__init__(model, **settings)
        _check_choice("weighting", weighting, get_args(Weighting))
        self.weighting: Weighting = weighting

    @classmethod
    def _settings(cls, arguments: Any) -> dict[str, Any]:
        return super()._settings(arguments) | {"weighting": arguments.weighting}

    def ranking(self, similarities: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        return pairwise_list_loss(similarities, scores, mask, weighting=self.weighting, temperature=self.temperature)

    def get_config_dict(self) -> dict[str, Any]:
        return {"weighting": self.weighting} | super().get_config_dict()


class ListNetLoss(LVLMLoss):
    """ListNet: cross-entropy to the LVLM's distribution over the list, whose gradient is that of LLM-R's KL."""

    def ranking(self, similarities: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        return list_distribution_loss(similarities, scores, mask, temperature=self.temperature)


class LambdaLoss(LVLMLoss):
    """LambdaLoss with the gold response's probability as the label, which lies in [0, 1]; see `lambda_loss`.

    Args:
        scheme: how pairs are weighted; "ndcg-loss2++", as in sentence-transformers, by default. "none" is RankNet.
        k: pairs among the k first, and NDCG@k; None counts all.
        mu: of NDCG-Loss2++.
        settings: those of `LVLMLoss`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        scheme: LambdaScheme = "ndcg-loss2++",
        k: int | None = None,
        mu: float = 10.0,
        **settings: Any,
    ) -> None:
        super().__init__(model, **settings)
        _check_choice("scheme", scheme, get_args(LambdaScheme))
        if k is not None and k < 1:
            raise ValueError(f"expected k of at least 1, or None; got {k}")
        self.scheme: LambdaScheme = scheme
        self.k, self.mu = k, mu

    def ranking(self, similarities: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        logits = similarities / self.temperature
        return lambda_loss(logits, scores.exp(), mask, scheme=self.scheme, k=self.k, mu=self.mu)

    def get_config_dict(self) -> dict[str, Any]:
        return {"scheme": self.scheme, "k": self.k, "mu": self.mu} | super().get_config_dict()


class ListMLELoss(LVLMLoss):
    """ListMLE, or with `position_aware=True` PListMLE; see `list_mle_loss`.

    Args:
        position_aware: the first places count more.
        settings: those of `LVLMLoss`.
    """

    def __init__(self, model: nn.Module, *, position_aware: bool = False, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.position_aware = position_aware

    def ranking(self, similarities: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        return list_mle_loss(similarities / self.temperature, scores, mask, position_aware=self.position_aware)

    def get_config_dict(self) -> dict[str, Any]:
        return {"position_aware": self.position_aware} | super().get_config_dict()


class ADRMSELoss(LVLMLoss):
    """ADR-MSE between the LVLM's ranks and smooth ranks of the similarities; see `adr_mse_loss`."""

    def ranking(self, similarities: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        return adr_mse_loss(similarities / self.temperature, scores, mask)


class MarginMSELoss(LVLMLoss):
    """Margin-MSE between logits and the LVLM's log-probabilities; see `margin_mse_loss`."""

    def ranking(self, similarities: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        return margin_mse_loss(similarities / self.temperature, scores, mask)


class ContrastiveLVLMLoss(LVLMLoss):
    """EPR's contrastive loss: -log softmax of one positive over all positives and hard negatives of the batch.

    Made for lists of one demonstration sampled from a query's five best by the LVLM and others from its five worst
    (`sampling="contrastive"`). The list's best counts as the positive. Known scores and the query's own group are
    left out of the negatives just as in `LVLMLoss` with `in_batch="best"`; EPR drops no tied negative.

    Args:
        settings: those of `LVLMLoss`, but for `rank_weight` and `in_batch`, which are 0 and "best".

    Source: EPR; temperature our choice, as in `LVLMLoss`.
    """

    sampling: ClassVar[Sampling] = "contrastive"

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        super().__init__(model, rank_weight=0.0, in_batch="best", **settings)

    @classmethod
    def _settings(cls, arguments: Any) -> dict[str, Any]:
        taken = super()._settings(arguments)
        return {name: value for name, value in taken.items() if name not in ("rank_weight", "in_batch")}


LossFactory = Callable[[nn.Module, Any], LVLMLoss]
_LOSSES: dict[str, LossFactory] = {}


def register_loss(name: str, factory: type[LVLMLoss] | LossFactory) -> None:
    """Give a loss a name for `DrumTrainingArguments(loss=name)`; a name that is taken gets the new loss.

    Args:
        name: such as "hinge".
        factory: a subclass of `LVLMLoss`, or a function of (encoder, training arguments) that returns one.
    """
    _LOSSES[name] = getattr(factory, "from_arguments", factory)


def known_losses() -> list[str]:
    """Names that `DrumTrainingArguments(loss=…)` takes."""
    return list(_LOSSES)


def check_loss(name: str) -> None:
    """Refuse a name that no loss has.

    Raises:
        ValueError: with the known names, the nearest first.
    """
    if name in _LOSSES:
        return
    near = difflib.get_close_matches(str(name), _LOSSES, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"expected a loss of {', '.join(_LOSSES)}, or one registered with register_loss; got {name!r}{hint}"
    )


def make_loss(model: nn.Module, arguments: Any) -> LVLMLoss:
    """The loss that `DrumTrainingArguments` name, for an encoder."""
    check_loss(arguments.loss)
    return _LOSSES[arguments.loss](model, arguments)


register_loss("listwise", ListwiseLVLMLoss)
register_loss("contrastive", ContrastiveLVLMLoss)
register_loss("listnet", ListNetLoss)
register_loss("lambda", LambdaLoss)
register_loss("ranknet", lambda model, arguments: LambdaLoss.from_arguments(model, arguments, scheme="none"))
register_loss("listmle", ListMLELoss)
register_loss("plistmle", lambda model, arguments: ListMLELoss.from_arguments(model, arguments, position_aware=True))
register_loss("adr-mse", ADRMSELoss)
register_loss("margin-mse", MarginMSELoss)
