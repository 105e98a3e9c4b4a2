"""Scores as data sets on the Hub: pushed as the parquet file of an export, pulled as an import takes it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..types import LVLM
from ..utils import hub as _hub
from ..utils.manifest import write_manifest
from .card import render_scores_card
from .store import Merged, ScoreStore
from .transfer import Exported, export_scores, import_scores, public_identity

__all__ = ["SCORES", "pull_scores", "push_scores"]

#: The file in the repository.
SCORES = "scores.parquet"


def push_scores(
    store: ScoreStore,
    repo_id: str,
    *,
    fingerprints: Collection[str] | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    progress: bool = False,
) -> tuple[str, Exported]:
    """Upload a store's scores and generations to a data set repository, in place of earlier ones there.

    The file holds responses and generations as text, but no prompt and no picture: of these, hashes. It carries what
    each key is made of, and what the LVLMs are.

    Args:
        repo_id: "name" or "owner/name"; made where it is missing.
        fingerprints: only these LVLMs' entries.
        private, token, commit_message, revision, create_pr: as in `DemoRetriever.push_to_hub`.

    Returns:
        The address of the commit or pull request, and what was written.

    Raises:
        ValueError: the store has nothing of one of the fingerprints.
        HubError: the Hub refused; the message says what to do.
    """
    repo_id = _hub.make_repository(repo_id, private=private, token=token, repo_type="dataset")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        done = export_scores(store, folder / SCORES, fingerprints=fingerprints, progress=progress)
        identities = store.identities()
        lvlms: list[dict[str, Any]] = [
            {"fingerprint": name, **(public_identity(identities[name]) or {})}
            for name in (identities if fingerprints is None else fingerprints)
        ]
        card = render_scores_card({"repo_id": repo_id, "scores": done.scores, "texts": done.texts, "lvlms": lvlms})
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_manifest(folder, settings={"fingerprints": [each["fingerprint"] for each in lvlms]})
        url = _hub.commit_folder(
            repo_id,
            folder,
            message=commit_message or "Upload LVLM scores",
            token=token,
            revision=revision,
            create_pr=create_pr,
            repo_type="dataset",
        )
    return url, done


def pull_scores(
    repo_id: str,
    store: ScoreStore,
    *,
    lvlm: LVLM | None = None,
    any_lvlm: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    progress: bool = False,
) -> Merged:
    """Take the scores and generations of a data set repository into a store, checked as `import_scores` checks them.

    Args:
        repo_id: what `push_scores` wrote to.
        lvlm, any_lvlm: as in `import_scores`.
        revision, token, cache_dir, local_files_only, force_download: as in `DemoRetriever.from_pretrained`.

    Raises:
        HubError: it can't be fetched; the message says what to do.
        SavedFileError: it has no scores, or they are damaged, altered or of another LVLM (the message says in what
            they differ).
    """
    folder = _hub.fetch_snapshot(
        repo_id,
        patterns=[SCORES],
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        force_download=force_download,
        repo_type="dataset",
    )
    return import_scores(folder / SCORES, store, lvlm=lvlm, any_lvlm=any_lvlm, progress=progress)
