"""The card of an LVLM that was tuned on in-context conversations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

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
from ..utils.optional import public_name

__all__ = ["render_tuned_card"]


def render_tuned_card(about: Mapping[str, Any]) -> str:
    """The text of README.md of an LVLM that was tuned on in-context conversations.

    Every entry may be missing; what is missing is not mentioned.

    Args:
        about: plain values: `repo_id`; `base_model`, `base_revision`, `base_is_local` (no link then, and no metadata,
            for folders are nobody else's business); `adapter` (bool: LoRA, or whole weights); `training` (name ->
            value); `mix`: rows as dicts, such as sources and their counts; `limits` (texts).

    Example:
        >>> card = render_tuned_card({"repo_id": "me/smol-icl", "base_model": "me/smol", "adapter": True})
        >>> print(card[: card.index("tags")])
        ---
        base_model: me/smol
        library_name: peft
        pipeline_tag: image-text-to-text
        <BLANKLINE>
    """
    adapter, base, revision = bool(about.get("adapter")), about.get("base_model"), about.get("base_revision")
    is_local = bool(about.get("base_is_local"))
    shown = public_name(base) if base and is_local else base
    named = bool(base) and is_hub_id(base) and not is_local
    lines = [
        "A vision-language model tuned on in-context conversations, so that it uses the demonstrations it is shown.",
        "",
    ]
    if shown:
        at = f" at {as_code(revision)}" if revision else ""
        lines.append(f"- **Base**: {as_text(shown) if is_local else linked(shown)}{at}")
    lines.append(f"- **Trained**: {'LoRA adapters on' if adapter else 'weights of'} decoder and projector")
    place = in_python(about.get("repo_id"), "path/to/this/folder")
    commit = f", revision={json.dumps(str(revision))}" if revision else ""
    loaded = f"{json.dumps(str(shown or 'the base model'))}{commit}, adapter={place}" if adapter else place
    limits = [
        "What it learned is to use demonstrations of the kinds it was tuned on; measure it on yours.",
        *(about.get("limits") or ()),
    ]
    return join_sections(
        front_matter(
            base_model=base if named else None,
            library_name="peft" if adapter else "transformers",
            pipeline_tag="image-text-to-text",
            base_model_relation=("adapter" if adapter else "finetune") if named else None,
            tags=["drum-hf", "in-context-learning", "icl-tuning", "vision-language"],
        ),
        title_of(about.get("repo_id"), f"{shown or 'A vision-language model'} tuned on demonstrations"),
        "\n".join(lines),
        usage(f"from drum_hf import TransformersLVLM\n\nlvlm = TransformersLVLM.from_pretrained({loaded})"),
        f"## Training\n\n{list_of(about['training'])}" if about.get("training") else "",
        f"## Conversations\n\n{as_table(about['mix'])}" if about.get("mix") else "",
        "## Limits\n\n" + "\n".join(f"- {as_text(limit)}" for limit in limits),
        CITATION,
    )
