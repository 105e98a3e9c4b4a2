"""Strategies by name: what the command line, a suite and a table call them, and what makes them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping

from ..data import TripletTable
from ..retriever.retriever import DemoRetriever
from ..scores.feedback import Feedback
from ..selection import Selector, get_selector
from ..training.methods import METHODS
from .strategies import BM25, MMICES, Fixed, Random, Retrieved, SameAnswerOracle, ScoreOracle, Strategy, ZeroShot
from .untrained import UntrainedRetrievers

__all__ = [
    "STRATEGIES",
    "Comparison",
    "StrategyInfo",
    "check_names",
    "make_strategy",
    "missing_part",
    "register_strategy",
    "takes_selector",
]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What all strategies of a comparison share.

    Attributes:
        support, queries: where demonstrations come from, and what is asked.
        feedback: the LVLM's, over both.
        encoder: a CLIP or SigLIP checkpoint that every retriever starts from.
        task: "vqa", "classification" or "captioning".
        drafts: query id -> the LVLM's zero-shot answer; may be empty where no strategy needs them.
        lora: retrievers train adapters rather than all weights.
        untrained: the encoder's retrievers without training, by the names of `drum_hf.retriever.PART_WEIGHTS`; made
            where it is left out. Comparisons of one encoder and support set may share it.
    """

    support: TripletTable
    queries: TripletTable
    feedback: Feedback
    encoder: str
    task: str
    drafts: Mapping[str, str]
    lora: bool = False
    untrained: UntrainedRetrievers = None  # type: ignore[assignment]  # see below

    def __post_init__(self) -> None:
        if self.untrained is None:
            object.__setattr__(self, "untrained", UntrainedRetrievers(self.encoder, self.support))


@dataclasses.dataclass(frozen=True)
class StrategyInfo:
    """What there is to know of a strategy before it is made.

    Attributes:
        label: as tables show it.
        about: one line, with its source.
        needs_draft: the LVLM's draft of each query is read.
        trained: a trained retriever is needed.
        looks_at_gold: it reads the gold answer: a ceiling, not a method.
        seeded: another seed chooses otherwise.
        needs: the parts of a row, "image" and "prompt", without which it is another strategy or none at all.
        make: (comparison, seed) -> the strategy; None where a retriever ranks the candidates.
    """

    label: str
    about: str
    needs_draft: bool = False
    trained: bool = False
    looks_at_gold: bool = False
    seeded: bool = False
    needs: tuple[str, ...] = ()
    make: Callable[[Comparison, int], Strategy] | None = None


def _oracle(comparison: Comparison, seed: int) -> Strategy:
    if comparison.task == "captioning":  # no two rows have the same answer
        return ScoreOracle(comparison.feedback, name="oracle")
    return SameAnswerOracle(comparison.support, comparison.queries, seed)


def _mmices(comparison: Comparison, seed: int) -> Strategy:
    return MMICES(comparison.untrained("si"), comparison.untrained("st"))


#: Every strategy, in the order of tables.
STRATEGIES: dict[str, StrategyInfo] = {
    "zero-shot": StrategyInfo("zero-shot", "no demonstration", make=lambda comparison, seed: ZeroShot()),
    "random": StrategyInfo(
        "random",
        "drawn for each query",
        seeded=True,
        make=lambda comparison, seed: Random(comparison.support, seed),
    ),
    "fixed": StrategyInfo(
        "fixed",
        "the same for every query, drawn once",
        seeded=True,
        make=lambda comparison, seed: Fixed(comparison.support, seed),
    ),
    "si": StrategyInfo("SI (RICES)", "similar image (RICES, arXiv 2109.05014; OpenFlamingo)", needs=("image",)),
    "st": StrategyInfo("ST", "similar prompt", needs=("prompt",)),
    "sit": StrategyInfo("SIT", "similar image and prompt", needs=("image", "prompt")),
    "sit+draft": StrategyInfo(
        "SIT + draft", "similar image, prompt, and response to the LVLM's draft (DRUM, untrained)", needs_draft=True
    ),
    "si+draft": StrategyInfo(
        "SI + draft", "similar image, and response to the draft", needs_draft=True, needs=("image",)
    ),
    "st+draft": StrategyInfo(
        "ST + draft", "similar prompt, and response to the draft", needs_draft=True, needs=("prompt",)
    ),
    "bm25": StrategyInfo(
        "BM25",
        "shared words of prompt and draft with prompt and response",
        needs_draft=True,
        make=lambda comparison, seed: BM25(comparison.support),
    ),
    "mmices": StrategyInfo(
        "MMICES",
        "the 200 most similar images, re-ranked by prompt (arXiv 2311.18021)",
        needs=("image", "prompt"),
        make=_mmices,
    ),
    **{
        name: StrategyInfo(method.label, method.about, needs_draft="draft" in method.query, trained=True)
        for name, method in METHODS.items()
    },
    "oracle": StrategyInfo(
        "oracle (same answer)",
        "rows with the gold answer, drawn; in captioning, where no two rows have one, as oracle-score",
        looks_at_gold=True,
        seeded=True,
        make=_oracle,
    ),
    "oracle-score": StrategyInfo(
        "oracle (LVLM's own)",
        "the LVLM's own ranking: the whole support set scored for each query",
        looks_at_gold=True,
        make=lambda comparison, seed: ScoreOracle(comparison.feedback, name="oracle-score"),
    ),
}


def register_strategy(
    name: str,
    make: Callable[[Comparison, int], Strategy],
    *,
    label: str | None = None,
    about: str = "",
    needs_draft: bool = False,
    looks_at_gold: bool = False,
    seeded: bool = False,
    needs: tuple[str, ...] = (),
) -> None:
    """Add a strategy of your own, which evaluators, suites and tables then know by name.

    Args:
        name: not taken yet.
        make: gets the [`Comparison`][drum_hf.evaluation.registry.Comparison] (support set, queries, feedback, task)
            and the seed, and returns an object with `name` and `select(queries, k)`; see
            [`Strategy`][drum_hf.evaluation.strategies.Strategy].
        label: as tables show it; the name where left out.
        about: one line on what it does.
        needs_draft, looks_at_gold, seeded, needs: as in `StrategyInfo`.

    Raises:
        ValueError: the name is taken, or holds a "+", which stands before a selector.

    Example:
        >>> class Newest:
        ...     name = "newest"
        ...     def __init__(self, support):
        ...         self.support = support
        ...     def select(self, queries, k):
        ...         return [[i for i in reversed(self.support.ids) if i != q.id][:k] for q in queries]
        >>> register_strategy("newest", lambda comparison, seed: Newest(comparison.support))
        >>> STRATEGIES.pop("newest").label
        'newest'
    """
    if name in STRATEGIES or "+" in name:
        raise ValueError(f"expected the name of a strategy that is not taken and holds no '+', got {name!r}")
    STRATEGIES[name] = StrategyInfo(
        label or name, about, needs_draft, looks_at_gold=looks_at_gold, seeded=seeded, needs=needs, make=make
    )


def check_names(names: Iterable[str]) -> None:
    """Refuse what is no strategy's name.

    Raises:
        ValueError: names it, and the nearest that is one.

    >>> check_names(["zero-shot", "sit-draft"])
    Traceback (most recent call last):
    ...
    ValueError: strategy 'sit-draft' is unknown; did you mean 'sit+draft'?
    """
    for name in names:
        if name not in STRATEGIES:
            near = difflib.get_close_matches(name, STRATEGIES, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(STRATEGIES)}"
            raise ValueError(f"strategy {name!r} is unknown; {hint}")


def missing_part(name: str, support: TripletTable, queries: TripletTable) -> str | None:
    """The part ("image" or "prompt") that a strategy compares and that no row of one side has; None: it can be run.

    A prompt that every row shares tells nothing apart, yet can be compared; one that no row has can't.
    """
    there = {
        "image": all(any(table.image_keys) for table in (support, queries)),
        "prompt": all(any(prompt.strip() for prompt in table.prompts) for table in (support, queries)),
    }
    return next((part for part in STRATEGIES[name].needs if not there[part]), None)


def takes_selector(name: str) -> bool:
    """Whether a retriever ranks this strategy's candidates, so that a selector can choose among them."""
    return STRATEGIES[name].make is None


def make_strategy(
    name: str,
    comparison: Comparison,
    *,
    seed: int = 0,
    retriever: DemoRetriever | None = None,
    selector: str | None = None,
) -> Strategy:
    """A strategy by name.

    Args:
        name: of `STRATEGIES`.
        comparison: what it chooses from, and for what.
        seed: of strategies that are seeded; no matter to the others.
        retriever: for trained strategies, and for these alone.
        selector: chooses among what a retriever found, by a name for
            [`get_selector`][drum_hf.selection.get_selector]; the strategy is then called "name + selector".

    Raises:
        ValueError: an unknown name of either; a trained strategy without a retriever, or another with one; a selector
            where no retriever ranks; a strategy that compares drafts, where queries lack them; a retriever whose
            support set is not the comparison's.
    """
    check_names([name])
    info = STRATEGIES[name]
    if info.trained and retriever is None:
        raise ValueError(f"strategy {name!r} needs a trained retriever: pass retriever= (--retriever {name}=FOLDER)")
    if retriever is not None and not info.trained:
        trained = ", ".join(other for other, its in STRATEGIES.items() if its.trained)
        raise ValueError(f"strategy {name!r} takes no retriever; those that do are {trained}")
    if selector is not None and not takes_selector(name):
        raise ValueError(
            f"strategy {name!r} takes no selector, since no retriever ranks its candidates; those that do are "
            f"{', '.join(filter(takes_selector, STRATEGIES))}"
        )
    if info.make is not None:
        return info.make(comparison, seed)
    return _retrieved(name, comparison, retriever, selector)


def _retrieved(name: str, comparison: Comparison, retriever: DemoRetriever | None, selector: str | None) -> Retrieved:
    if retriever is None:
        retriever = comparison.untrained(name)
    elif strange := set(retriever.support.ids) - set(comparison.support.ids):
        raise ValueError(
            f"expected the retriever of {name!r} to find demonstrations of the comparison's support set; "
            f"{len(strange)} of its {len(retriever)}, such as {min(strange)!r}, are not there. Load it with "
            "support=, or compare on its own support set"
        )
    if retriever.uses_drafts:
        bare = [id for id in comparison.queries.ids if id not in comparison.drafts]
        if bare:
            raise ValueError(
                f"strategy {name!r} compares the LVLM's drafts, and {len(bare)} of {len(comparison.queries)} queries, "
                f"such as {bare[0]!r}, have none; pass Feedback.drafts() of them"
            )
    chosen: Selector | None = None
    if selector is not None:
        options = {"lvlm": comparison.feedback.lvlm} if selector == "budget" else {}
        chosen = get_selector(selector, **options)
        name = f"{name} + {selector}"
    return Retrieved(name, retriever, selector=chosen)
