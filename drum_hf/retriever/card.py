"""The card of a saved retriever: what may be said on it, and the text of its README.md."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import CardError
from ..utils.cards import (
    CITATION,
    as_code,
    as_table,
    as_text,
    front_matter,
    in_python,
    is_hub_id,
    join_sections,
    linked,
    list_of,
    title_of,
    usage,
)

__all__ = ["check_card", "render_card"]

_PIPELINE_TAGS = {
    "icl-vqa": "visual-question-answering",
    "icl-image-classification": "image-classification",
    "icl-image-captioning": "image-to-text",
}
_USES = {
    "icl-vqa": 'image="bus.jpg", question="What color is the bus?"',
    "icl-image-classification": '"bus.jpg"',
    "icl-image-captioning": '"bus.jpg"',
}
#: Entries of `DemoRetriever.card_data` -> their form; see `_fits`.
_ENTRIES: dict[str, Any] = {
    "training": dict,
    "rounds": [dict],
    "results": [dict],
    "results_note": str,
    "metrics": ["name"],
    "model_index": [{"dataset": "name", "metric": "name", "value": float}],
    "license": "name",
    "data_license": str,
    "language": ["name"],
    "datasets": ["name"],
    "limits": [str],
}
#: Rows of a list, and characters of a text and of a name, which stands on one line; our choice.
_MOST_ROWS, _LONGEST, _LONGEST_NAME = 1_000, 10_000, 200


def check_card(card: Any) -> None:
    """Whether entries of a card can be shown.

    Args:
        card: see `render_card`.

    Raises:
        CardError: an unknown entry, or one of another form; names it.
    """
    if not isinstance(card, Mapping):
        raise CardError(f"expected the card's entries by name, got {type(card).__name__}")
    for name, value in card.items():
        if name not in _ENTRIES:
            raise CardError(
                f"expected entries of a model card among {', '.join(_ENTRIES)}, got {str(name)[:80]!r}; remove it"
            )
        if not _fits(value, _ENTRIES[name]):
            raise CardError(
                f"the card's entry {name!r} is not {_said(_ENTRIES[name])}, got {str(value)[:80]!r}; correct it, or "
                "remove it from card_data"
            )


def _fits(value: Any, form: Any) -> bool:
    """Whether a value is a text, a name, a number, a list of what is in `form`, or a dict of plain values or of it."""
    if isinstance(form, list):
        return isinstance(value, (list, tuple)) and len(value) <= _MOST_ROWS and all(_fits(v, form[0]) for v in value)
    if isinstance(form, dict):
        return (
            isinstance(value, Mapping) and value.keys() == form.keys() and all(_fits(value[k], form[k]) for k in form)
        )
    if form is dict:
        return (
            isinstance(value, Mapping)
            and len(value) <= _MOST_ROWS
            and all(_is_text(key) and _is_plain(entry) for key, entry in value.items())
        )
    if form is float:
        return _is_number(value)
    return _is_text(value) and (form is str or (value.isprintable() and len(value) <= _LONGEST_NAME))


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) <= _MOST_ROWS and all(_is_plain(each) and not isinstance(each, list) for each in value)
    return value is None or isinstance(value, bool) or _is_number(value) or _is_text(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (
        isinstance(value, int) and abs(value) < 1 << 63 and not isinstance(value, bool)
    )


def _is_text(value: Any) -> bool:
    if not isinstance(value, str) or len(value) > _LONGEST:
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _said(form: Any) -> str:
    if isinstance(form, list):
        return f"a list, each entry {_said(form[0])}"
    if isinstance(form, dict):
        return f"a dict with {', '.join(form)}"
    if form == "name":
        return f"a line of at most {_LONGEST_NAME} characters"
    return {dict: "a dict of texts and numbers", float: "a number"}.get(
        form, f"a text of at most {_LONGEST:,} characters"
    )


def render_card(card: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """The text of README.md: YAML front matter, then what the retriever is, how to use it and where it came from.

    Every entry may be missing; what is missing is not mentioned. Texts are shown as they are: markup, HTML and
    addresses in them are inert.

    Args:
        card: `DemoRetriever.card_data`, plain values:
            `training` (name -> value, such as rounds and scored pairs); `rounds`: a row for each mining round;
            `results`: a row for each strategy, baselines among them (rows are dicts with the same keys, texts first
            and numbers after); `results_note`: a sentence on what was measured; `metrics` (names); `model_index`:
            evaluations, each with `dataset`, `metric`, `value`; `license` of the repository, data included;
            `data_license`: of the demonstrations, where it is another; `language` and `datasets` (lists of Hub
            names); `limits` (texts).
        about: the retriever's own facts, which `card` can't change:
            `repo_id` (where it will be found); `base_model`, `base_revision` (the encoder's; a link where it is a Hub
            id); `base_is_local` (bool: an adapter's base model is in a folder, which whoever loads it must name);
            `strategy`, `weights` (part -> share), `adapter` (bool), `dimension`, `index` (kind);
            `support` (`rows`, `included`, `fingerprint`, `images`: "embedded" or "reference");
            `teacher` (`name`, `revision`, `fingerprint`, `task`); `plot`: a file beside the card; `version` of
            drum-hf.

    Raises:
        CardError: an entry of `card` is unknown, or of another form.

    Example:
        >>> card = render_card({}, {"repo_id": "me/drum-okvqa", "base_model": "openai/clip-vit-base-patch32"})
        >>> print(card[: card.index("tags")])
        ---
        base_model: openai/clip-vit-base-patch32
        library_name: drum-hf
        pipeline_tag: feature-extraction
        <BLANKLINE>
    """
    check_card(card)
    version = f" {as_text(about['version'])}" if about.get("version") else ""
    base = str(about.get("base_model") or "demonstrations")
    return join_sections(
        _front_matter(card, about),
        title_of(about.get("repo_id"), f"Retriever on {base}"),
        _what(card, about),
        _usage(about),
        _teacher(about),
        f"## Training\n\n{list_of(card['training'])}" if card.get("training") else "",
        f"### Rounds\n\n{as_table(card['rounds'])}" if card.get("rounds") else "",
        _results(card, about),
        _limits(card),
        CITATION,
        f"Saved by drum-hf{version}.",
    )


def _front_matter(card: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    from huggingface_hub import EvalResult

    base, task = about.get("base_model"), (about.get("teacher") or {}).get("task") or ""
    tag = _PIPELINE_TAGS.get(task, "feature-extraction")
    found = [
        EvalResult(
            task_type=tag,
            dataset_type=entry["dataset"],
            dataset_name=entry["dataset"],
            metric_type=entry["metric"],
            metric_value=round(float(entry["value"]), 4),
        )
        for entry in card.get("model_index") or ()
        if math.isfinite(entry["value"])
    ]
    return front_matter(
        base_model=base if is_hub_id(base) else None,
        license=card.get("license"),
        language=list(card.get("language") or ()),
        library_name="drum-hf",
        pipeline_tag=tag,
        base_model_relation="adapter" if about.get("adapter") and is_hub_id(base) else None,
        tags=["drum-hf", "in-context-learning", "demonstration-retrieval", "vision-language"],
        datasets=list(card.get("datasets") or ()),
        metrics=list(card.get("metrics") or ()),
        eval_results=found,
        model_name=str(about.get("repo_id") or "drum-hf retriever").rpartition("/")[2] if found else None,
    )


def _what(card: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    lines = [
        "A retriever of in-context demonstrations for large vision-language models, trained with the model's own "
        "feedback where a teacher is named below. Given an image and a prompt, it finds the (image, prompt, response) "
        "demonstrations that help the model most.",
        "",
    ]
    if about.get("base_model"):
        commit = f" at {as_code(about['base_revision'])}" if about.get("base_revision") else ""
        kind = "a LoRA adapter on " if about.get("adapter") else ""
        lines.append(f"- **Encoder**: {kind}{linked(about['base_model'])}{commit}")
    if about.get("strategy"):
        shares = ", ".join(f"{part} {share:.3f}" for part, share in (about.get("weights") or {}).items() if share)
        lines.append(f"- **Compares**: {as_text(about['strategy'])}" + (f" (weights: {shares})" if shares else ""))
    if about.get("dimension"):
        index = f", {as_text(about['index'])} index" if about.get("index") else ""
        lines.append(f"- **Vectors**: {about['dimension']} dimensions{index}")
    support = about.get("support") or {}
    if support.get("rows"):
        where = "in this repository" if support.get("included", True) else "not in this repository: pass `support=`"
        if support.get("images") == "reference" and support.get("included", True):
            where += ", without their images: pass `image_root=`"
        lines.append(f"- **Support set**: {support['rows']:,} demonstrations, {where}")
    if support.get("fingerprint"):
        lines.append(f"- **Data fingerprint**: {as_code(support['fingerprint'])}")
    if card.get("data_license") or card.get("license"):
        lines.append(f"- **License of the data**: {as_text(card.get('data_license') or card['license'])}")
    return "\n".join(lines).rstrip()


def _usage(about: Mapping[str, Any]) -> str:
    teacher, support = about.get("teacher") or {}, about.get("support") or {}
    missing = "" if support.get("included", True) else ', support="your_table.parquet"'
    if support.get("images") == "reference" and not missing:
        missing = ', image_root="folder/of/images"'
    if about.get("adapter") and about.get("base_is_local"):
        missing += ', base_model="folder/of/its/base/model"'
    place = in_python(about.get("repo_id"), "path/to/this/folder")
    code = [
        "from drum_hf import DemoRetriever",
        "from PIL import Image",
        "",
        f"retriever = DemoRetriever.from_pretrained({place}{missing})",
        'found = retriever({"image": Image.open("bus.jpg"), "prompt": "What color is the bus?"}, k=4)',
        "[(d.prompt, d.response) for d in found.demonstrations]",
    ]
    task = teacher.get("task")
    if task in _USES:
        known = is_hub_id(teacher.get("name")) or str(teacher.get("name")).startswith("playground/")
        model = "" if known else 'model="owner/name", '
        code += [
            "",
            "import drum_hf",
            "",
            f'ask = drum_hf.pipeline("{task}", {model}retriever=retriever, num_shots=4)',
            f"ask({_USES[task]})",
        ]
    return usage("\n".join(code))


def _teacher(about: Mapping[str, Any]) -> str:
    teacher = about.get("teacher")
    if not teacher:
        return "## Teacher\n\nNone: the encoder has not been trained with a model's feedback."
    lines = ["## Teacher", "", "The model whose log-likelihoods of the gold responses trained the encoder.", ""]
    if teacher.get("name"):
        lines.append(f"- **Model**: {linked(teacher['name'])}")
    for key in ("revision", "fingerprint", "task"):
        if teacher.get(key):
            lines.append(f"- **{key.capitalize()}**: {as_code(teacher[key])}")
    return "\n".join(lines)


def _results(card: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    parts = [as_text(card["results_note"])] if card.get("results_note") else []
    parts += [as_table(card["results"])] if card.get("results") else []
    parts += [f"![Results by number of demonstrations]({about['plot']})"] if about.get("plot") else []
    return "\n\n".join(["## Results", *parts]) if parts else ""


def _limits(card: Mapping[str, Any]) -> str:
    limits = [
        "What helps one model may not help another: results hold for the teacher, the tasks and the support set "
        "named here.",
        "Demonstrations are shown as they stand in the support set, mistakes and biases included.",
        *(card.get("limits") or ()),
    ]
    return "## Limits\n\n" + "\n".join(f"- {as_text(limit)}" for limit in limits)
