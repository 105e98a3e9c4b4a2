"""The card of a data set of LVLM scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..utils.cards import CITATION, as_table, front_matter, is_hub_id, join_sections, title_of, usage

__all__ = ["render_scores_card"]


def render_scores_card(about: Mapping[str, Any]) -> str:
    """The text of README.md of a data set of LVLM scores.

    Args:
        about: plain values: `repo_id`; `scores`, `texts` (counts); `lvlms`: a dict for each, with `fingerprint` and,
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
    repo_id = about.get("repo_id")
    columns = ("name", "revision", "dtype", "chat_template", "fingerprint")
    rows = [{key: lvlm.get(key) for key in columns} for lvlm in about.get("lvlms") or ()]
    pull = f"pip install drum-hf\ndrum-hf scores pull {repo_id if is_hub_id(repo_id) else 'owner/name'} scores.sqlite"
    return join_sections(
        front_matter(
            library_name="drum-hf",
            tags=["drum-hf", "in-context-learning", "lvlm-scores"],
            configs=[{"config_name": "default", "data_files": "scores.parquet"}],
        ),
        title_of(repo_id, "LVLM scores"),
        f"{about.get('scores') or 0:,} log-likelihoods of gold responses, and {about.get('texts') or 0:,} "
        "generations, of vision-language models that were shown demonstrations. Pictures and prompts are stored as "
        "hashes only; responses and generations are stored as text.",
        f"## LVLMs\n\n{as_table(rows)}" if rows else "",
        usage("", install=pull),
        "Training and evaluation with `--store scores.sqlite` then pay for none of these pairs again. Scores of "
        "another model, dtype or chat template than the store's are refused.",
        CITATION,
    )
