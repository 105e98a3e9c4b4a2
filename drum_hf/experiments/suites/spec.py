"""A suite file: which data sets, LVLMs, encoders and strategies are compared, in YAML, read strictly.

Every key is a field of one of the dataclasses below; an unknown key, a value of another type, or a name that nothing
answers to is refused with its place in the file.
"""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...data import find_source
from ...errors import SuiteError
from ...evaluation.metrics import METRICS
from ...evaluation.registry import STRATEGIES, takes_selector
from ...selection import SELECTORS
from ...training.methods import METHODS
from ...types import TASKS
from ...utils.files import read_yaml

__all__ = ["SUITES", "DataSpec", "LVLMSpec", "SuiteSpec", "TrainingSpec", "load_suite", "split_name"]

#: Suites that ship with the package, by name.
SUITES: dict[str, Path] = {path.stem: path for path in sorted((Path(__file__).parent / "specs").glob("*.yaml"))}

#: "adaptive" needs a calibration, which a name alone can't give.
_SELECTORS = tuple(name for name in SELECTORS if name != "adaptive")
_WORLDS = ("easy", "standard", "hard")


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """One data set: a playground `world`, a public `source`, or a `table` of your own.

    Attributes:
        name: its key in the results.
        task: vqa, classification or captioning; a public source knows its own.
        world: difficulty of the playground's worlds.
        source: name of a public data set (see `drum_hf.data.SOURCES`).
        table: file or folder of demonstrations, as `load_table` reads them.
        queries: table of queries beside `table`; without it a fifth of the rows is split off.
        seeds: of worlds, or of the split of a `table`; each is a group of the paired bootstrap.
        support_rows, query_rows: at most so many rows: the first ones, or of a public source that is not streamed a
            random draw, always the same (their files may be sorted by class).
        data_dir: folder with local copies of public sources.
        streaming: read a public source row by row, no further than needed.
        prompt: what is asked in place of the source's own prompt.
        metric: by default the source's or the task's own.
        max_new_tokens: length of an answer, at most.
    """

    name: str
    task: str = ""
    world: str | None = None
    source: str | None = None
    table: str | None = None
    queries: str | None = None
    seeds: tuple[int, ...] = (0,)
    support_rows: int | None = None
    query_rows: int | None = None
    data_dir: str | None = None
    streaming: bool = False
    prompt: str | None = None
    metric: str = ""
    max_new_tokens: int = 32


@dataclasses.dataclass(frozen=True)
class LVLMSpec:
    """One LVLM, here or behind an endpoint.

    Attributes:
        model: folder, Hub id, or the model's name at the endpoint.
        name: its key in the results; the model where left out.
        endpoint: URL of an OpenAI-compatible endpoint.
        api_key_env: environment variable that holds the endpoint's key.
        revision, dtype, device, batch_size, max_batch_tokens, image_cache_dir: of a local LVLM, as
            `TransformersLVLM.from_pretrained` takes them.
        concurrency, max_requests: of an endpoint.
    """

    model: str
    name: str = ""
    endpoint: str | None = None
    api_key_env: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    batch_size: int = 64
    max_batch_tokens: int | None = None
    image_cache_dir: str | None = None
    concurrency: int = 8
    max_requests: int | None = None


@dataclasses.dataclass(frozen=True)
class TrainingSpec:
    """What every trained strategy shares.

    Attributes:
        rounds, candidates: mining rounds, and new pairs that each training query buys in one.
        pairs: instead of both: the scored pairs in all after each round, in equal steps, such as [6000, 12000, 18000];
            what a query buys follows from the size of the support set, whose rows are the training queries.
        epochs: in each round.
        set_level_rounds: of DRUM, how many of the last rounds set-level score; its ancestors score alone.
        learning_rate, batch_size, list_size, lora: as `drum_hf.experiments.demo.Settings` has them.
    """

    rounds: int = 3
    candidates: int = 10
    pairs: tuple[int, ...] = ()
    epochs: int = 3
    set_level_rounds: int = 1
    learning_rate: float = 3e-4
    batch_size: int = 64
    list_size: int = 8
    lora: bool = False

    def schedule(self, queries: int) -> tuple[int, int]:
        """(rounds, candidates a query buys in each) for a number of training queries.

        Raises:
            SuiteError: `pairs` is less than one pair a query in a round.
        """
        if not self.pairs:
            return self.rounds, self.candidates
        candidates = round(self.pairs[0] / queries)
        if candidates < 1:
            raise SuiteError(
                f"expected training.pairs of at least one pair for each of {queries} training queries in a round, "
                f"got {self.pairs[0]}; raise pairs, or lower support_rows"
            )
        return len(self.pairs), candidates


@dataclasses.dataclass(frozen=True)
class SuiteSpec:
    """Everything that one table compares.

    Attributes:
        name: of the suite.
        about: one line for readers.
        data, lvlms, encoders: what the strategies are compared on; results of each combination stand apart.
        strategies: names of `drum_hf.evaluation.registry.STRATEGIES`, or a retrieving one with a selector
            ("drum+mmr").
        shots: numbers of demonstrations; 0 is the LVLM on its own, the same for all.
        headline: the number of shots that paired differences and learning curves are about.
        seeds: of training.
        random_seeds: how many seeds the drawn strategies are averaged over.
        training: shared by all trained strategies.
        curves: trained strategies that are also evaluated after every round.
        paired: comparisons "a>b"; by default DRUM with everything that it should beat.
        transfer: LVLMs that the retrievers of the first LVLM are evaluated on.
        transfer_strategies: what is evaluated there.
    """

    name: str
    data: tuple[DataSpec, ...]
    about: str = ""
    lvlms: tuple[LVLMSpec, ...] = (LVLMSpec("playground/lvlm", "playground/lvlm"),)
    encoders: tuple[str, ...] = ("playground/clip",)
    strategies: tuple[str, ...] = ("zero-shot", "random", "si", "sit", "sit+draft", "epr", "drum", "oracle")
    shots: tuple[int, ...] = (0, 1, 2, 4, 8, 16)
    headline: int = 4
    seeds: tuple[int, ...] = (0,)
    random_seeds: int = 3
    training: TrainingSpec = TrainingSpec()
    curves: tuple[str, ...] = ("drum", "epr")
    paired: tuple[str, ...] = ()
    transfer: tuple[LVLMSpec, ...] = ()
    transfer_strategies: tuple[str, ...] = ("zero-shot", "random", "si", "sit", "sit+draft", "epr", "drum")

    def comparisons(self, strategies: Sequence[str] | None = None) -> list[tuple[str, str]]:
        """(a, b) of every paired comparison whose two strategies are evaluated."""
        there = list(self.strategies if strategies is None else strategies)
        asked = [tuple(text.split(">")) for text in self.paired] or _default_pairs(there)
        return [(a, b) for a, b in asked if a in there and b in there]

    def transferred(self) -> list[str]:
        """The strategies evaluated on the LVLMs of `transfer`: trained ones only where the suite trains them."""
        return [
            n for n in self.transfer_strategies if n in self.strategies or not STRATEGIES[split_name(n)[0]].trained
        ]

    def narrowed(
        self,
        *,
        tasks: Sequence[str] | None = None,
        strategies: Sequence[str] | None = None,
        shots: Sequence[int] | None = None,
        world_seeds: Sequence[int] | None = None,
    ) -> SuiteSpec:
        """A part of the suite: what is left out (None) stays as it is.

        Args:
            tasks: names of data sets, or of tasks.
            strategies: any names that a suite could hold.
            shots: where the headline's number is not among them, the largest becomes the headline.
            world_seeds: of the playground's worlds.

        Raises:
            SuiteError: nothing is left, or a name is unknown.
        """
        data = self.data
        if tasks is not None:
            known = {d.name for d in data} | {d.task for d in data}
            if unknown := [t for t in tasks if t not in known]:
                raise SuiteError(f"expected tasks of suite {self.name!r} ({', '.join(sorted(known))}), got {unknown}")
            data = tuple(d for d in data if d.name in tasks or d.task in tasks)
        if world_seeds is not None:
            if not any(d.world for d in data):
                raise SuiteError(
                    f"suite {self.name!r} has no playground worlds to give seeds to; drop the world seeds"
                )
            data = tuple(dataclasses.replace(d, seeds=tuple(world_seeds)) if d.world else d for d in data)
        counts = self.shots if shots is None else tuple(dict.fromkeys(shots))
        changed = dataclasses.replace(
            self,
            data=data,
            strategies=self.strategies if strategies is None else tuple(dict.fromkeys(strategies)),
            transfer_strategies=tuple(n for n in self.transfer_strategies if strategies is None or n in strategies),
            shots=counts,
            headline=self.headline if self.headline in counts else max(counts, default=0),
        )
        _check(changed)
        return changed


def split_name(name: str) -> tuple[str, str | None]:
    """A strategy's name and its selector: "drum+mmr" is ("drum", "mmr"), "sit+draft" is itself.

    Raises:
        SuiteError: neither a strategy nor a strategy with a selector.
    """
    if name in STRATEGIES:
        return name, None
    base, _, selector = name.rpartition("+")
    if base in STRATEGIES and takes_selector(base) and selector in _SELECTORS:
        return base, selector
    raise SuiteError(
        f"expected a strategy of {', '.join(STRATEGIES)}, or a retrieving one + a selector of "
        f"{', '.join(_SELECTORS)}; got {name!r}"
    )


def load_suite(name_or_path: str | os.PathLike[str]) -> SuiteSpec:
    """Read a suite: one of `SUITES` by name, or a YAML file.

    Paths in a file (`table`, `queries`, `data_dir`) are relative to it.

    Raises:
        SuiteError: there is no such suite, the file is no YAML, or it says something that can't be run.

    >>> load_suite("playground").headline
    4
    """
    path = SUITES.get(os.fspath(name_or_path), Path(name_or_path))
    try:
        content = read_yaml(path)
    except OSError as error:
        raise SuiteError(
            f"expected a suite's name ({', '.join(SUITES)}) or a YAML file, got {os.fspath(name_or_path)!r} ({error})"
        ) from error
    except ValueError as error:
        raise SuiteError(f"{path}: expected YAML ({error}); mend the file") from error
    content = {"name": path.stem} | _mapping(content, str(path))
    fields: dict[str, Any] = dict(content)
    data = _mapping(content.get("data"), f"{path}, data")
    fields["data"] = tuple(
        _data(str(name), entry, f"{path}, data.{name}", path.parent) for name, entry in data.items()
    )
    for key in ("lvlms", "transfer"):
        if key in content:
            entries = _list(content[key], f"{path}, {key}")
            fields[key] = tuple(_lvlm(entry, f"{path}, {key}[{i}]") for i, entry in enumerate(entries))
    if "training" in content:
        fields["training"] = _build(
            TrainingSpec, _mapping(content["training"], f"{path}, training"), f"{path}, training"
        )
    spec = _build(SuiteSpec, fields, str(path))
    try:
        _check(spec)
    except SuiteError as error:
        raise SuiteError(f"{path}: {error}") from error
    return spec


def _default_pairs(strategies: Sequence[str]) -> list[tuple[str, ...]]:
    untrained = ["sit", "sit+draft"]
    others = [n for n in strategies if n != "drum" and STRATEGIES[split_name(n)[0]].trained]
    return [("drum", name) for name in [*untrained, *sorted(others, key=lambda n: n != "epr")]]


def _check(spec: SuiteSpec) -> None:
    """What types alone don't say."""

    def refuse(place: str, expected: str, got: Any) -> typing.NoReturn:
        raise SuiteError(f"{place}: expected {expected}, got {got!r}")

    for place in ("data", "lvlms", "encoders", "strategies", "shots", "seeds"):
        values = getattr(spec, place)
        names = [getattr(v, "name", v) for v in values]
        if not values or len(set(names)) < len(names):
            refuse(place, "one entry or more, each of its own name", names)
    if clash := {m.name for m in spec.lvlms} & {m.name for m in spec.transfer}:
        refuse("transfer", "LVLMs other than those of lvlms", sorted(clash))
    for name in (*spec.strategies, *spec.transfer_strategies):
        split_name(name)
    for name in spec.curves:
        if name not in STRATEGIES or not STRATEGIES[name].trained:
            refuse("curves", "trained strategies", name)
        if METHODS[name].training.get("mine_once"):
            refuse("curves", "strategies that mine in rounds", name)
    for text in spec.paired:
        if len(text.split(">")) != 2:
            refuse("paired", "comparisons like 'drum>epr'", text)
        for name in text.split(">"):
            split_name(name)
    if min(spec.shots) < 0 or spec.headline not in spec.shots:
        refuse("headline", f"one of the shots {list(spec.shots)}, none below 0", spec.headline)
    if spec.random_seeds < 1:
        refuse("random_seeds", "at least 1", spec.random_seeds)
    budget = spec.training
    for name in ("rounds", "candidates", "epochs", "batch_size"):
        if getattr(budget, name) < 1:
            refuse(f"training.{name}", "at least 1", getattr(budget, name))
    if budget.set_level_rounds < 0:
        refuse("training.set_level_rounds", "at least 0", budget.set_level_rounds)
    if budget.list_size < 2:
        refuse("training.list_size", "at least 2, something to rank", budget.list_size)
    if budget.pairs and any(total != budget.pairs[0] * (i + 1) for i, total in enumerate(budget.pairs)):
        refuse("training.pairs", "equal steps from 0, such as [6000, 12000, 18000]", list(budget.pairs))
    for data in spec.data:
        if data.metric and data.metric not in METRICS:
            refuse(f"data.{data.name}.metric", f"one of {', '.join(METRICS)}", data.metric)
        if len(set(data.seeds)) < len(data.seeds) or not data.seeds or min(data.seeds) < 0:
            refuse(f"data.{data.name}.seeds", "different whole numbers from 0", list(data.seeds))
        for name in ("support_rows", "query_rows", "max_new_tokens"):
            value = getattr(data, name)
            if value is not None and value < 1:
                refuse(f"data.{data.name}.{name}", "at least 1", value)


# YAML values -> fields


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise SuiteError(f"{where}: expected keys and values, got {value!r}")
    return dict(value)


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise SuiteError(f"{where}: expected a list, got {value!r}")
    return value


def _data(name: str, entry: Any, where: str, folder: Path) -> DataSpec:
    fields = {"name": name} | _mapping(entry, where)
    data = _build(DataSpec, fields, where)
    kinds = [kind for kind in ("world", "source", "table") if getattr(data, kind)]
    if len(kinds) != 1:
        raise SuiteError(f"{where}: expected one of world, source and table, got {kinds or 'none of them'}")
    only = {"data_dir": "source", "streaming": "source", "prompt": "source", "queries": "table"}
    for key, kind in only.items():
        if key in fields and kind != kinds[0]:
            raise SuiteError(f"{where}: {key} is for a {kind}; this is a {kinds[0]}")
    if data.source:
        try:
            source = find_source(data.source)
        except ValueError as error:
            raise SuiteError(f"{where}.source: {error}") from error
        if data.task not in ("", source.task):
            raise SuiteError(
                f"{where}.task: {data.source} is a {source.task} data set, got {data.task!r}; drop the key"
            )
        data = dataclasses.replace(data, task=source.task, metric=data.metric or source.metric)
        if data.seeds != (0,):
            raise SuiteError(f"{where}.seeds: a public data set has its own split; drop the key (seeds: of training)")
    if data.world and data.world not in _WORLDS:
        raise SuiteError(f"{where}.world: expected one of {', '.join(_WORLDS)}, got {data.world!r}")
    if data.task not in TASKS:
        raise SuiteError(f"{where}.task: expected one of {', '.join(TASKS)}, got {data.task!r}")
    paths = {key: str(folder / value) for key in ("table", "queries", "data_dir") if (value := getattr(data, key))}
    return dataclasses.replace(data, **paths)


def _lvlm(entry: Any, where: str) -> LVLMSpec:
    fields = {"model": entry} if isinstance(entry, str) else _mapping(entry, where)
    if "lvlm" in fields:  # the word that a transfer list uses
        fields["model"] = fields.pop("lvlm")
    lvlm = _build(LVLMSpec, fields, where)
    if lvlm.endpoint is None and (lvlm.api_key_env or lvlm.max_requests):
        raise SuiteError(f"{where}: api_key_env and max_requests are an endpoint's; give its URL as endpoint")
    return dataclasses.replace(lvlm, name=lvlm.name or lvlm.model)


def _build(cls: type, fields: Mapping[str, Any], where: str) -> Any:
    """A dataclass from the values of a mapping: known keys, needed ones there, each of its type."""
    hints = typing.get_type_hints(cls)
    if unknown := [key for key in fields if key not in hints]:
        raise SuiteError(f"{where}: unknown key {unknown[0]!r}; there are {', '.join(hints)}")
    needed = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in fields]
    if needed:
        raise SuiteError(f"{where}: the key {needed[0]!r} is missing")
    return cls(**{key: _typed(value, hints[key], f"{where}, {key}") for key, value in fields.items()})


def _typed(value: Any, hint: Any, where: str) -> Any:
    if isinstance(hint, types.UnionType):  # "… or None"
        return None if value is None else _typed(value, hint.__args__[0], where)
    if typing.get_origin(hint) is tuple:
        (inner, _) = typing.get_args(hint)
        if dataclasses.is_dataclass(inner):  # read already
            return value
        return tuple(_typed(item, inner, f"{where}[{i}]") for i, item in enumerate(_list(value, where)))
    if dataclasses.is_dataclass(hint):
        return value
    if hint is float and isinstance(value, str):  # YAML 1.1 takes 3e-4 for a text
        try:
            return float(value)
        except ValueError:
            pass
    good = isinstance(value, (int, float) if hint is float else hint) and not (
        hint is not bool and value in (True, False) and isinstance(value, bool)
    )
    if not good:
        name = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}[hint]
        raise SuiteError(f"{where}: expected {name}, got {value!r}")
    return float(value) if hint is float else value
