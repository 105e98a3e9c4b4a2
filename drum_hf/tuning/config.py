"""A tuning run as data: which LVLM, which conversations in which shares, which arguments; read from YAML."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SavedFileError
from ..utils.files import check_extent, read_parquet, read_yaml, refuse_special
from . import episodes as data

if TYPE_CHECKING:
    from .arguments import ICLTuningArguments

__all__ = ["EvaluationConfig", "SourceConfig", "TuningConfig"]


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of a mix.

    Attributes:
        name: unique in the mix.
        reader: "labels", "seed_bench", "vl_checklist" or "concepts", from whose tables episodes are drawn; or "llava"
            or "messages", whose conversations are taken as they are.
        path: of the file or folder, relative to the YAML file; for "labels" a Hub id as well.
        weight: how much of it, beside the other sources.
        kind: "episode" or "replay", for conversations that are taken as they are.
        options: of the reader: arguments of `read_labels`, `read_seed_bench`, `read_vl_checklist`,
            `ConceptTable.from_dataset`, `read_llava`, `read_messages`.
        episodes: how episodes are drawn: fields of `EpisodeSettings`; a curriculum says it in their place.
        questions, difficulty: of `Episodes`, by concept.
    """

    name: str
    reader: str
    path: str
    weight: float = 1.0
    kind: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    episodes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    questions: Mapping[str, str] | None = None
    difficulty: Mapping[str, float] | None = None


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is held out of the sources that episodes are drawn from, to measure the loss on.

    Attributes:
        share: of pictures, concept values or concepts.
        by: "image", "value" or "concept": see `split_concepts`.
        conversations: how many are drawn.
    """

    share: float = 0.1
    by: str = "image"
    conversations: int = 200


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """A tuning run.

    Attributes:
        model: folder or Hub id of the LVLM.
        sources: what is mixed.
        revision, dtype: of the model.
        curriculum: stages, the word "default" for `DEFAULT_CURRICULUM`, or None.
        evaluation: what is held out, or None.
        tuning: fields of `ICLTuningArguments`.
        seed: of the mix, and of training unless `tuning` says another.
        folder: what paths are relative to.

    Example:
        >>> source = {"name": "birds", "reader": "labels", "path": "birds"}
        >>> config = TuningConfig.from_dict({"model": "me/lvlm", "sources": [source], "tuning": {"max_steps": 10}})
        >>> config.sources[0].weight
        1.0
        >>> TuningConfig.from_dict({"model": "me/lvlm", "sources": [source | {"wieght": 2}]})
        Traceback (most recent call last):
        ValueError: sources[0]: expected keys among name, reader, path, weight, kind, options, episodes, questions, \
difficulty; got 'wieght'
    """

    model: str
    sources: tuple[SourceConfig, ...]
    revision: str | None = None
    dtype: str | None = None
    curriculum: data.Curriculum | None = None
    evaluation: EvaluationConfig | None = None
    tuning: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    folder: Path = Path()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TuningConfig:
        """Read a YAML file.

        Raises:
            SavedFileError: there is none, or it is no YAML.
            ValueError: see `from_dict`.
        """
        path = Path(path)
        try:
            content = read_yaml(path)
        except (OSError, ValueError) as error:
            raise SavedFileError(f"{path}: expected a YAML file ({error}); check the path, or correct it") from error
        try:
            return dataclasses.replace(cls.from_dict(content), folder=path.parent)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, content: Any) -> TuningConfig:
        """From what YAML holds.

        Raises:
            ValueError: a key is unknown or missing, or a value out of range; the message names it.
        """
        check_extent(content)
        _check_keys(content, cls, "the configuration", without=("folder",))
        sources = content["sources"]
        if not isinstance(sources, Sequence) or isinstance(sources, str) or not sources:
            raise ValueError(f"expected 'sources' as a list of at least one, got {_brief(sources)}")
        for number, source in enumerate(sources):
            _check_keys(source, SourceConfig, f"sources[{number}]")
            if source["reader"] not in list(_READERS):
                known, got = ", ".join(_READERS), _brief(source["reader"])
                raise ValueError(f"sources[{number}]: expected a reader among {known}; got {got}")
            _check_types(source, _SOURCE_TYPES, f"sources[{number}]")
            _check_named(source.get("episodes"), data.EpisodeSettings, f"sources[{number}].episodes")
            _check_options(source, f"sources[{number}]")
        _check_types(content, _TYPES, "the configuration")
        made: dict[str, Any] = {**content, "sources": tuple(SourceConfig(**source) for source in sources)}
        if (stages := content.get("curriculum")) is not None:
            made["curriculum"] = (
                data.DEFAULT_CURRICULUM if stages == "default" else data.Curriculum.from_dict(_stages(stages))
            )
        if (held := content.get("evaluation")) is not None:
            _check_keys(held, EvaluationConfig, "evaluation")
            _check_types(held, _EVALUATION_TYPES, "evaluation")
            made["evaluation"] = EvaluationConfig(**held)
        made["tuning"] = _arguments(content.get("tuning"))
        return cls(**made)

    def arguments(self, output_dir: str | os.PathLike[str], **more: Any) -> ICLTuningArguments:
        """The training arguments.

        Raises:
            ValueError: one is out of its range.
        """
        from .arguments import ICLTuningArguments

        return ICLTuningArguments(output_dir=os.fspath(output_dir), **{"seed": self.seed, **self.tuning, **more})

    def mixes(self) -> tuple[data.Mix, data.Mix | None]:
        """What is tuned on, and what is held out.

        Raises:
            LeakError: what is held out is shown in training, too, such as a picture in instruction data.
            ColumnError, RowError, ImageError, …: a source can't be read or drawn from; see its reader, and `Mix`.
        """
        train: list[data.MixSource] = []
        held: list[data.MixSource] = []
        for number, source in enumerate(self.sources):
            try:
                found = _READERS[source.reader](self._place(source), source)
            except TypeError as error:  # an option that `load_table` doesn't know, or of another type
                raise ValueError(f"source {source.name!r}: {error}") from error
            if not isinstance(found, data.ConceptTable):
                train.append(data.MixSource(source.name, found, source.weight))
                continue
            sides = [found]
            if self.evaluation is not None:
                by: Any = self.evaluation.by
                sides = list(data.split_concepts(found, self.evaluation.share, by=by, seed=self.seed))
            for side, mixed in zip(sides, (train, held), strict=False):
                settings = data.EpisodeSettings(**source.episodes)
                drawn = data.Episodes(
                    side,
                    settings,
                    questions=_of(source.questions, side),
                    difficulty=_of(source.difficulty, side),
                    seed=self.seed + number,
                    source=source.name,
                )
                mixed.append(data.MixSource(source.name, drawn, source.weight))
        mix = data.Mix(train, self.curriculum, seed=self.seed)
        if self.evaluation is None:
            return mix, None
        if not held:
            raise ValueError("evaluation: expected a source that episodes are drawn from, to hold some of it out")
        test = data.Mix(held, seed=self.seed)
        data.check_disjoint(mix, test, by=("image",) if self.evaluation.by == "image" else ("image", "value"))
        return mix, test

    def _place(self, source: SourceConfig) -> Any:
        here = self.folder / source.path
        # "labels" takes Hub ids, too, which no folder of that name hides.
        return source.path if source.reader == "labels" and not here.exists() else here


def _of(given: Mapping[str, Any] | None, table: data.ConceptTable) -> dict[str, Any] | None:
    """What is said of the concepts of one side of a split, which may lack some."""
    return None if given is None else {name: value for name, value in given.items() if name in table.concepts}


# ---- readers ----


def _rows(path: Path) -> Any:
    """Rows of a table of ours: JSON, JSONL, CSV or parquet."""
    import datasets
    import pyarrow as pa

    try:
        if path.suffix == ".parquet":
            return datasets.Dataset(read_parquet(path))
        refuse_special(path)
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            return list(csv.DictReader(text.splitlines()))
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except (OSError, ValueError, KeyError, RecursionError, csv.Error, pa.ArrowException) as error:
        raise SavedFileError(
            f"{path}: expected a table as .json, .jsonl, .csv or .parquet ({error}); check the path"
        ) from error


def _concepts(path: Path, source: SourceConfig) -> data.ConceptTable:
    return data.ConceptTable.from_dataset(_rows(path), **{"image_root": path.parent, **source.options})


def _messages(path: Path, source: SourceConfig) -> data.ConversationList:
    return data.read_messages(_rows(path), **_as_they_are(source), **{"image_root": path.parent, **source.options})


def _as_they_are(source: SourceConfig) -> dict[str, Any]:
    return {"source": source.name} | ({"kind": source.kind} if source.kind else {})


_READERS: dict[str, Callable[[Any, SourceConfig], data.ConceptTable | data.ConversationList]] = {
    "labels": lambda path, source: data.read_labels(path, **source.options),
    "seed_bench": lambda path, source: data.read_seed_bench(path, **source.options),
    "vl_checklist": lambda path, source: data.read_vl_checklist(path, **source.options),
    "concepts": _concepts,
    "llava": lambda path, source: data.read_llava(path, **_as_they_are(source), **source.options),
    "messages": _messages,
}
_TAKES: dict[str, Any] = {
    "labels": data.read_labels,
    "seed_bench": data.read_seed_bench,
    "vl_checklist": data.read_vl_checklist,
    "concepts": data.ConceptTable.from_dataset,
    "llava": data.read_llava,
    "messages": data.read_messages,
}
_DRAWN = ("labels", "seed_bench", "vl_checklist", "concepts")


# ---- checks ----

_TYPES: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "revision": (str, type(None)),
    "dtype": (str, type(None)),
    "seed": (int,),
}
_SOURCE_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "path": (str,),
    "weight": (int, float),
    "kind": (str, type(None)),
    "options": (Mapping,),
    "episodes": (Mapping,),
    "questions": (Mapping, type(None)),
    "difficulty": (Mapping, type(None)),
}
_EVALUATION_TYPES: dict[str, tuple[type, ...]] = {"share": (int, float), "by": (str,), "conversations": (int,)}


def _check_types(content: Mapping[str, Any], types: Mapping[str, tuple[type, ...]], where: str) -> None:
    for name, wanted in types.items():
        if name in content and (not isinstance(content[name], wanted) or isinstance(content[name], bool)):
            names = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in wanted)
            raise ValueError(f"{where}: expected {name!r} as {names}, got {_brief(content[name])}")


def _brief(value: Any) -> str:
    return f"{value!r:.80}"


def _mapping(content: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: expected keys and values, got {_brief(content)}")
    return content


def _refuse(content: Any, known: Sequence[str], where: str) -> None:
    unknown = [_brief(key) for key in _mapping(content, where) if key not in known]
    if unknown:
        raise ValueError(f"{where}: expected keys among {', '.join(known)}; got {', '.join(unknown)}")


def _check_keys(content: Any, kind: Any, where: str, without: Sequence[str] = ()) -> None:
    fields = [field for field in dataclasses.fields(kind) if field.name not in without]
    _refuse(content, [field.name for field in fields], where)
    missing = [
        repr(field.name)
        for field in fields
        if field.name not in content
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where}: expected the keys {', '.join(missing)}, which are missing")


def _check_named(content: Any, kind: Any, where: str) -> None:
    if content is not None:
        _check_keys(content, kind, where)


def _check_options(source: Mapping[str, Any], where: str) -> None:
    parameters = inspect.signature(_TAKES[source["reader"]]).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        own = [name for name in parameters if name not in ("data", "kind", "source")]
        _refuse(source.get("options") or {}, own, f"{where}.options")
    drawn = source["reader"] in _DRAWN
    for name in ("kind",) if drawn else ("episodes", "questions", "difficulty"):
        if source.get(name):
            raise ValueError(
                f"{where}: expected no {name!r} with the reader {source['reader']!r}, whose conversations are "
                f"{'drawn' if drawn else 'taken as they are'}; leave it out"
            )


def _stages(content: Any) -> Any:
    if isinstance(content, (Mapping, Sequence)) and not isinstance(content, str):
        stages = content.get("stages", ()) if isinstance(content, Mapping) else content
        if all(isinstance(stage, Mapping) for stage in stages):
            return content
    raise ValueError(f'curriculum: expected a list of stages, or the word "default", got {_brief(content)}')


def _arguments(content: Any) -> dict[str, Any]:
    if content is None:
        return {}
    from .arguments import ICLTuningArguments

    fields = {field.name: field for field in dataclasses.fields(ICLTuningArguments) if field.init}
    unknown = [_brief(key) for key in _mapping(content, "tuning") if key not in fields or key == "output_dir"]
    if unknown:
        raise ValueError(
            f"tuning: expected arguments of ICLTuningArguments, which has no {', '.join(unknown)}; the output folder "
            "is given apart"
        )
    made = dict(content)
    for name, value in content.items():
        if isinstance(value, str) and "float" in str(fields[name].type):  # YAML reads 2e-4 as a text
            try:
                made[name] = float(value)
            except ValueError:
                raise ValueError(f"tuning: expected {name} as a number, got {value!r}") from None
    return made
