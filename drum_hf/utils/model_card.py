"""The cards of a saved retriever and of a tuned LVLM: plain data in, the text of their README.md out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["render_card", "render_scores_card", "render_tuned_card"]

_PIPELINE_TAGS = {
    "icl-vqa": "visual-question-answering",
    "icl-image-classification": "image-classification",
    "icl-image-captioning": "image-to-text",
}
_USES = {
    "icl-vqa": 'image="bus.jpg", question="What colour is the bus?"',
    "icl-image-classification": '"bus.jpg"',
    "icl-image-captioning": '"bus.jpg"',
}
_CITATIONS = """```bibtex
@inproceedings{yige2025drum,
  title     = {DRUM: Learning Demonstration Retriever for Large MUlti-modal Models},
  author    = {Yi-Ge, Ellen and Gao, Jiechao and Han, Wei and Zhu, Wei},
  booktitle = {Proceedings of the 63rd Annual Meeting of the Association for Computational Linguistics
               (Volume 4: Student Research Workshop)},
  pages     = {1051--1063},
  year      = {2025},
  note      = {arXiv:2412.07619}
}
@article{doveh2024towards,
  title     = {Towards Multimodal In-Context Learning for Vision \\& Language Models},
  author    = {Doveh, Sivan and Perek, Shaked and Mirza, M. Jehanzeb and Lin, Wei and Alfassy, Amit and
               Arbelle, Assaf and Ullman, Shimon and Karlinsky, Leonid},
  journal   = {arXiv preprint arXiv:2403.12736},
  year      = {2024}
}
```"""


def render_card(data: Mapping[str, Any]) -> str:
    """The text of README.md: YAML front matter, then what the retriever is, how to use it and where it came from.

    Every entry may be missing; what is missing is not mentioned.

    Args:
        data: plain values:
            `repo_id` (where it will be found); `base_model`, `base_revision` (the encoder's; a link where it is a Hub
            id); `base_is_local` (bool: an adapter's base model is in a folder, which whoever loads it must name);
            `strategy`, `weights` (part -> share), `adapter` (bool), `dimension`, `index` (kind);
            `support` (`rows`, `included`, `fingerprint`, `images`: "embedded" or "reference");
            `teacher` (`name`, `revision`, `fingerprint`, `task`);
            `training` (name -> value, such as rounds and scored pairs); `datasets` (Hub ids); `license` of this
            repository, data included; `data_license`: of the demonstrations, where it is another; `language`;
            `metrics` (names); `rounds`: a row for each mining round; `results`: a row for each strategy, baselines
            among them; rows are dicts with the same keys, texts first and numbers after; `results_note`: a sentence on
            what was measured; `plot`: a file beside the card;
            `model_index`: evaluations, each with `dataset`, `metric`, `value`; `limits` (texts); `version` of drum-hf.

    Example:
        >>> card = render_card({"repo_id": "me/drum-okvqa", "base_model": "openai/clip-vit-base-patch32"})
        >>> print(card[: card.index("tags")])
        ---
        library_name: drum-hf
        pipeline_tag: feature-extraction
        base_model: openai/clip-vit-base-patch32
        <BLANKLINE>
    """
    sections = [
        _front_matter(data),
        f"# {_title(data)}",
        _what(data),
        _usage(data),
        _teacher(data),
        _training(data),
        _rounds(data),
        _results(data),
        _limits(data),
        f"## Citation\n\n{_CITATIONS}",
    ]
    version = f" {data['version']}" if data.get("version") else ""
    return "\n\n".join(section for section in sections if section) + f"\n\nSaved by drum-hf{version}.\n"


def render_tuned_card(data: Mapping[str, Any]) -> str:
    """The text of README.md of an LVLM that was tuned on in-context conversations.

    Every entry may be missing; what is missing is not mentioned.

    Args:
        data: plain values: `repo_id`; `base_model`, `base_revision`, `base_is_local` (no link then, and no metadata,
            for folders are nobody else's business); `adapter` (bool: LoRA, or whole weights); `training` (name ->
            value); `mix`: rows as dicts, such as sources and their counts; `limits` (texts).

    Example:
        >>> card = render_tuned_card({"repo_id": "me/smol-icl", "base_model": "me/smol", "adapter": True})
        >>> print(card[: card.index("tags")])
        ---
        library_name: peft
        pipeline_tag: image-text-to-text
        base_model: me/smol
        base_model_relation: adapter
        <BLANKLINE>
    """
    import yaml

    adapter, base = bool(data.get("adapter")), data.get("base_model")
    if base and data.get("base_is_local"):
        shown = base if base.startswith("playground/") else re.split(r"[\\/]", base.rstrip("\\/"))[-1]
    else:
        shown = base
    meta: dict[str, Any] = {"library_name": "peft" if adapter else "transformers"}
    meta["pipeline_tag"] = "image-text-to-text"
    if base and not data.get("base_is_local"):
        meta |= {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"}
    meta["tags"] = ["drum-hf", "in-context-learning", "icl-tuning", "vision-language"]
    name = data.get("repo_id") or "path/to/this/folder"
    commit = f", revision={data['base_revision']!r}" if data.get("base_revision") else ""
    loading = f'"{shown or "the base model"}"{commit}, adapter="{name}"' if adapter else f'"{name}"'
    code = f"from drum_hf import TransformersLVLM\n\nlvlm = TransformersLVLM.from_pretrained({loading})"
    what = "A vision-language model tuned on in-context conversations, so that it uses the demonstrations it is shown."
    lines = [what, ""]
    if shown:
        at = f" at `{data['base_revision']}`" if data.get("base_revision") else ""
        linked = _text(shown) if data.get("base_is_local") else _linked(shown)
        lines.append(f"- **Base**: {linked}{at}")
    lines.append(f"- **Trained**: {'LoRA adapters on' if adapter else 'weights of'} decoder and projector")
    limits = [
        "What it learnt is to use demonstrations of the kinds it was tuned on; measure it on yours.",
        *(data.get("limits") or ()),
    ]
    sections = [
        f"---\n{yaml.safe_dump(meta, sort_keys=False, allow_unicode=True)}---",
        f"# {_text(str(data.get('repo_id') or 'A tuned vision-language model').rpartition('/')[2])}",
        "\n".join(lines),
        f"## How to use\n\n```bash\npip install drum-hf\n```\n\n```python\n{code}\n```",
        _training(data),
        _results({"results": data.get("mix")}).replace("## Results", "## Conversations"),
        "## Limits\n\n" + "\n".join(f"- {_text(limit)}" for limit in limits),
        f"## Citation\n\n{_CITATIONS}",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def render_scores_card(data: Mapping[str, Any]) -> str:
    """The text of README.md of a data set of LVLM scores.

    Args:
        data: plain values: `repo_id`; `scores`, `texts` (counts); `lvlms`: a dict for each, with `fingerprint` and,
            where known, `name`, `revision`, `dtype`, `chat_template` (hash).

    Example:
        >>> card = render_scores_card({"repo_id": "me/okvqa-scores", "scores": 1200, "texts": 0, "lvlms": []})
        >>> print(card[: card.index("configs")])
        ---
        library_name: drum-hf
        tags:
        - drum-hf
        - in-context-learning
        - lvlm-scores
        <BLANKLINE>
    """
    import yaml

    meta = {
        "library_name": "drum-hf",
        "tags": ["drum-hf", "in-context-learning", "lvlm-scores"],
        "configs": [{"config_name": "default", "data_files": "scores.parquet"}],
    }
    name = data.get("repo_id") or "owner/name"
    columns = ("name", "revision", "dtype", "chat_template", "fingerprint")
    rows = [{key: lvlm.get(key) for key in columns} for lvlm in data.get("lvlms") or ()]
    sections = [
        f"---\n{yaml.safe_dump(meta, sort_keys=False, allow_unicode=True)}---",
        f"# {_title(data)}",
        f"{_cell(data.get('scores') or 0)} log-likelihoods of gold responses, and {_cell(data.get('texts') or 0)} "
        "generations, of vision-language models that were shown demonstrations. Pictures and prompts are not in it, "
        "but as hashes; responses and generations are, as text.",
        f"## LVLMs\n\n{_table(rows)}" if rows else "",
        f"## How to use\n\n```bash\npip install drum-hf\ndrum-hf scores pull {name} scores.sqlite\n```\n\n"
        "Training and evaluation with `--store scores.sqlite` then pay for none of these pairs again. Scores of "
        "another model, dtype or chat template than the store's are refused.",
        f"## Citation\n\n{_CITATIONS}",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(data: Mapping[str, Any]) -> str:
    import yaml

    teacher = data.get("teacher") or {}
    meta: dict[str, Any] = {
        "library_name": "drum-hf",
        "pipeline_tag": _PIPELINE_TAGS.get(teacher.get("task") or "", "feature-extraction"),
    }
    if _is_hub_id(data.get("base_model")):
        meta["base_model"] = data["base_model"]
    meta |= {key: data[key] for key in ("license", "language") if data.get(key)}
    if data.get("adapter") and "base_model" in meta:
        meta["base_model_relation"] = "adapter"
    meta["tags"] = ["drum-hf", "in-context-learning", "demonstration-retrieval", "vision-language"]
    meta |= {key: list(data[key]) for key in ("datasets", "metrics") if data.get(key)}
    if data.get("model_index"):
        meta["model-index"] = [{"name": _title(data), "results": _evaluations(data, meta["pipeline_tag"])}]
    return f"---\n{yaml.safe_dump(meta, sort_keys=False, allow_unicode=True)}---"


def _evaluations(data: Mapping[str, Any], task: str) -> list[dict[str, Any]]:
    return [
        {
            "task": {"type": task},
            "dataset": {"name": str(entry["dataset"]), "type": str(entry["dataset"])},
            "metrics": [{"type": str(entry["metric"]), "value": float(entry["value"])}],
        }
        for entry in data["model_index"]
    ]


def _title(data: Mapping[str, Any]) -> str:
    return _text(str(data.get("repo_id") or "A demonstration retriever").rpartition("/")[2])


def _what(data: Mapping[str, Any]) -> str:
    lines = [
        "A retriever of in-context demonstrations for large vision-language models, trained with the model's own "
        "feedback where a teacher is named below. Given an image and a prompt, it finds the (image, prompt, response) "
        "demonstrations that help the model most.",
        "",
    ]
    if data.get("base_model"):
        commit = f" at `{data['base_revision']}`" if data.get("base_revision") else ""
        kind = "a LoRA adapter on " if data.get("adapter") else ""
        lines.append(f"- **Encoder**: {kind}{_linked(data['base_model'])}{commit}")
    if data.get("strategy"):
        shares = ", ".join(f"{part} {share:.3f}" for part, share in (data.get("weights") or {}).items() if share)
        lines.append(f"- **Compares**: {_text(data['strategy'])}" + (f" (weights: {shares})" if shares else ""))
    if data.get("dimension"):
        index = f", {_text(data['index'])} index" if data.get("index") else ""
        lines.append(f"- **Vectors**: {data['dimension']} dimensions{index}")
    support = data.get("support") or {}
    if support.get("rows"):
        where = "in this repository" if support.get("included", True) else "not in this repository: pass `support=`"
        if support.get("images") == "reference" and support.get("included", True):
            where += ", without their images: pass `image_root=`"
        lines.append(f"- **Support set**: {support['rows']:,} demonstrations, {where}")
    if support.get("fingerprint"):
        lines.append(f"- **Data fingerprint**: `{_text(support['fingerprint'])}`")
    if data.get("data_license") or data.get("license"):
        lines.append(f"- **Licence of the data**: {_text(data.get('data_license') or data['license'])}")
    return "\n".join(lines).rstrip()


def _usage(data: Mapping[str, Any]) -> str:
    name = data.get("repo_id") or "path/to/this/folder"
    teacher = data.get("teacher") or {}
    support = data.get("support") or {}
    missing = "" if support.get("included", True) else ', support="your_table.parquet"'
    if support.get("images") == "reference" and not missing:
        missing = ', image_root="folder/of/images"'
    if data.get("adapter") and data.get("base_is_local"):
        missing += ', base_model="folder/of/its/base/model"'
    code = [
        "from drum_hf import DemoRetriever",
        "from PIL import Image",
        "",
        f'retriever = DemoRetriever.from_pretrained("{name}"{missing})',
        'found = retriever({"image": Image.open("bus.jpg"), "prompt": "What colour is the bus?"}, k=4)',
        "[(d.prompt, d.response) for d in found.demonstrations]",
    ]
    task = teacher.get("task")
    if task in _USES:
        taught = str(teacher.get("name"))
        model = "" if _is_hub_id(taught) or taught.startswith("playground/") else 'model="owner/name", '
        code += [
            "",
            "import drum_hf",
            "",
            f'ask = drum_hf.pipeline("{task}", {model}retriever=retriever, num_shots=4)',
            f"ask({_USES[task]})",
        ]
    return "## How to use\n\n```bash\npip install drum-hf\n```\n\n```python\n" + "\n".join(code) + "\n```"


def _teacher(data: Mapping[str, Any]) -> str:
    teacher = data.get("teacher")
    if not teacher:
        return "## Teacher\n\nNone: the encoder has not been trained with a model's feedback."
    lines = ["## Teacher", "", "The model whose log-likelihoods of the gold responses trained the encoder.", ""]
    if teacher.get("name"):
        lines.append(f"- **Model**: {_linked(teacher['name'])}")
    for key in ("revision", "fingerprint", "task"):
        if teacher.get(key):
            lines.append(f"- **{key.capitalize()}**: `{_text(teacher[key])}`")
    return "\n".join(lines)


def _training(data: Mapping[str, Any]) -> str:
    training = data.get("training")
    if not training:
        return ""
    lines = [f"- **{_text(str(name).replace('_', ' '))}**: {_cell(value)}" for name, value in training.items()]
    return "## Training\n\n" + "\n".join(lines)


def _rounds(data: Mapping[str, Any]) -> str:
    rows = data.get("rounds")
    return f"### Rounds\n\n{_table(rows)}" if rows else ""


def _results(data: Mapping[str, Any]) -> str:
    parts = ["## Results", data.get("results_note"), _table(data["results"]) if data.get("results") else ""]
    if data.get("plot"):
        parts.append(f"![Results by number of demonstrations]({data['plot']})")
    found = [part for part in parts if part]
    return "\n\n".join(found) if found[1:] else ""


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = [all(isinstance(row.get(key), int | float | None) for row in rows) for key in columns]
    table = ["| " + " | ".join(_text(key) for key in columns) + " |"]
    table.append("|" + "|".join("---:" if right else "---" for right in numeric) + "|")
    table += ["| " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in rows]
    return "\n".join(table)


def _limits(data: Mapping[str, Any]) -> str:
    limits = [
        "What helps one model may not help another: results hold for the teacher, the tasks and the support set "
        "named here.",
        "Demonstrations are shown as they stand in the support set, mistakes and biases included.",
        *(data.get("limits") or ()),
    ]
    return "## Limits\n\n" + "\n".join(f"- {_text(limit)}" for limit in limits)


def _linked(name: str) -> str:
    text = _text(name)
    return f"[{text}](https://huggingface.co/{name})" if _is_hub_id(name) else text


def _is_hub_id(name: Any) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) is not None


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return _text(value)


def _text(value: Any) -> str:
    """One line that no table or list can be broken with."""
    return " ".join(str(value).replace("|", "\\|").split())
