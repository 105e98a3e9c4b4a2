"""The Hub: a folder committed there, a snapshot fetched from there, and its refusals in words that say what to do."""

from __future__ import annotations

import fnmatch
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..errors import HubError

__all__ = ["commit_folder", "commit_of", "fetch_snapshot", "make_repository"]

Result = TypeVar("Result")

#: How often a request that the Hub put off (429) is repeated, and the longest wait (seconds) that is sat out. Our
#: choice: the Hub counts requests in windows of five minutes.
_REPEATS, _LONGEST_WAIT = 4, 300.0


def make_repository(
    repo_id: str, *, private: bool | None = None, token: str | bool | None = None, repo_type: str = "model"
) -> str:
    """The whole name of a repository ("owner/name"), which is made where it is missing.

    Args:
        private: of a new repository; None: as the owner's settings have it.
        token: None: that of `hf auth login`.

    Raises:
        HubError: it can't be made; see its message.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    made = _asking(
        lambda: api.create_repo(repo_id, private=private, repo_type=repo_type, exist_ok=True),
        repo_id,
        "can't be made on",
    )
    return made.repo_id


def commit_folder(
    repo_id: str,
    folder: Path,
    *,
    message: str,
    replaces: Sequence[str] = (),
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    repo_type: str = "model",
) -> str:
    """Upload a folder in one commit, so that nobody ever fetches half of it.

    Args:
        replaces: patterns of what an earlier upload may have left: files there that match, and aren't in the folder,
            go.
        revision: branch to commit to, made where it is missing; or "refs/pr/3", to add to that pull request.
        create_pr: open a pull request instead, to `revision` or the main branch.

    Returns:
        The address of the commit or pull request.

    Raises:
        HubError: the Hub refused; see its message.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token)
    where: dict[str, Any] = {"repo_id": repo_id, "repo_type": repo_type}

    def ask(call: Callable[[], Result]) -> Result:
        return _asking(call, repo_id, "can't be written to on", revision=revision)

    if revision is not None and not create_pr and not revision.startswith("refs/"):
        ask(lambda: api.create_branch(**where, branch=revision, exist_ok=True))
    mine = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    there = ask(lambda: api.list_repo_files(**where, revision=revision)) if replaces else []
    gone = [name for name in there if name not in mine and any(fnmatch.fnmatch(name, some) for some in replaces)]
    with warnings.catch_warnings():
        # a retriever's support set belongs to it
        warnings.filterwarnings("ignore", "It seems that you are about to commit a data file", UserWarning)
        # Not `upload_folder`, which may make several commits of a large folder.
        made = ask(
            lambda: api.create_commit(
                **where,
                operations=[
                    *(CommitOperationDelete(name) for name in gone),
                    *(CommitOperationAdd(name, os.fspath(path)) for name, path in mine.items()),
                ],
                commit_message=message,
                revision=revision,
                create_pr=create_pr,
            )
        )
    return made.pr_url or made.commit_url


def fetch_snapshot(
    repo_id: str,
    *,
    patterns: Sequence[str],
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    repo_type: str = "model",
) -> Path:
    """The folder of the cache that holds the files of a commit, fetched where they aren't there yet.

    With `local_files_only` or `HF_HUB_OFFLINE=1` no request is made.

    Raises:
        HubError: it can't be fetched, or, offline, isn't in the cache; see its message.
    """
    from huggingface_hub import snapshot_download

    return Path(
        _asking(
            lambda: snapshot_download(
                repo_id,
                repo_type=repo_type,
                allow_patterns=list(patterns),
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                local_files_only=local_files_only,
                force_download=force_download,
            ),
            repo_id,
            ("is no folder here, and " if repo_type == "model" else "") + "can't be fetched from",
            revision=revision,
        )
    )


def commit_of(
    name: str | os.PathLike[str], *, revision: str | None = None, cache_dir: str | os.PathLike[str] | None = None
) -> str | None:
    """The commit that a model of the Hub, once it has been loaded, was at, as the cache has it; None for a folder."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if os.path.isdir(name):
        return None
    try:
        place = None if cache_dir is None else Path(cache_dir)
        found = try_to_load_from_cache(os.fspath(name), "config.json", revision=revision, cache_dir=place)
    except HFValidationError:
        return None
    commit = re.search(r"/snapshots/([0-9a-f]{40})/", Path(found).as_posix()) if isinstance(found, str) else None
    return commit[1] if commit else None


def _asking(call: Callable[[], Result], repo_id: str, failure: str, *, revision: str | None = None) -> Result:
    """What the Hub answers; put off (429), it is asked again once it said that it may be."""
    for repeat in range(_REPEATS + 1):
        try:
            return call()
        except Exception as error:
            answer = _answer(error)
            if not _is_the_hubs(error, answer):
                raise
            wait = _wait(answer) if answer is not None and answer.status_code == 429 else None
            if wait is None or wait > _LONGEST_WAIT or repeat == _REPEATS:
                status = None if answer is None else answer.status_code
                why = _remedy(error, status, wait, revision)
                raise HubError(
                    f"{repo_id!r} {failure} the Hub ({_first_line(error)}); {why}", status=status
                ) from error
            time.sleep(wait)
    raise AssertionError("the last repeat returns or raises")


def _is_the_hubs(error: Exception, answer: Any) -> bool:
    from huggingface_hub.errors import HFValidationError

    # The client's HTTP library goes by another name in each of its major versions.
    from_http = type(error).__module__.partition(".")[0] in ("httpx", "httpx2")
    return answer is not None or from_http or isinstance(error, (OSError, HFValidationError))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _answer(error: BaseException) -> Any:
    """The HTTP response behind an error, or None."""
    return next((found for each in _causes(error) if (found := getattr(each, "response", None)) is not None), None)


def _wait(answer: Any) -> float:
    """Seconds that the Hub wants us to wait."""
    limit = re.search(r"\bt=(\d+)", answer.headers.get("RateLimit", ""))
    given = answer.headers.get("Retry-After") or (limit[1] if limit else "")
    try:
        return max(0.0, float(given))
    except ValueError:  # none, or a date
        return 10.0


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]).rstrip(".") or type(error).__name__


def _remedy(error: BaseException, status: int | None, wait: float | None, revision: str | None) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    causes = list(_causes(error))

    def is_a(*kinds: type) -> bool:
        return any(isinstance(each, kinds) for each in causes)

    if is_a(HFValidationError):
        return "expected a folder that is there, or a name such as 'owner/name'; check it"
    if is_a(GatedRepoError):
        return f"ask for access on {constants.ENDPOINT}, then pass token=, or run `hf auth login`"
    if is_a(RevisionNotFoundError):
        return f"the repository has no branch, tag or commit {revision!r}; check revision="
    if status == 429:
        return f"it asks for {wait:.0f} seconds of patience; run it again then, with a token, which may ask more often"
    if status == 403:
        return "the token lacks the right to do that: pass token= with one of the owner's that may write"
    if is_a(RepositoryNotFoundError) or status in (401, 404):
        return (
            "check its name; to see a private repository, or to write, run `hf auth login`, or pass token= with a "
            "token that may"
        )
    if is_a(OfflineModeIsEnabled) or (is_a(LocalEntryNotFoundError) and len(causes) == 1):
        return (
            "it isn't in the cache, and no request may be made: fetch it once with a connection (without "
            "HF_HUB_OFFLINE and local_files_only), or check cache_dir= and revision="
        )
    if status is not None and status < 500:
        return "mend what it names, then run it again"
    return "check the connection, then run it again"
