"""The run manifest: what made an output, for people who come back to it later. Nothing reads it.

It says versions, seed, hashes of data and prompts, the LVLM, the command and the time. Never what the environment
holds, nor anything that may be a secret, nor the folders of the machine: outputs are published.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import write_text
from .optional import public_name
from .redaction import redacted, shown_command

__all__ = ["MANIFEST", "manifest_beside", "package_version", "write_manifest"]

MANIFEST = "manifest.json"

#: Packages whose version may change a result.
_PACKAGES = (
    "accelerate",
    "datasets",
    "faiss-cpu",
    "faiss-gpu",
    "huggingface_hub",
    "numpy",
    "peft",
    "Pillow",
    "pyarrow",
    "sentence-transformers",
    "tokenizers",
    "torch",
    "transformers",
)


def package_version(name: str) -> str:
    """Version of an installed package; "unknown" where it is not installed, or run from a source tree."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def write_manifest(
    folder: str | os.PathLike[str],
    *,
    seed: int | None = None,
    data: Mapping[str, Any] | None = None,
    lvlm: Any = None,
    settings: Mapping[str, Any] | None = None,
    name: str = MANIFEST,
) -> Path:
    """Write the manifest of a run into its folder, in place of an earlier one's.

    Args:
        seed: of the run.
        data: what it is -> hash of it, such as a table's fingerprint.
        lvlm: an LVLM, of whose name, revision, fingerprint and prompts' hashes note is taken; or a mapping that has
            some of these.
        settings: further JSON-ready values that the result depends on.
        name: of the file.

    Returns:
        The file.

    Example:
        >>> import json, tempfile
        >>> path = write_manifest(tempfile.mkdtemp(), seed=3, data={"support": "0f3a"})
        >>> manifest = json.loads(path.read_text())
        >>> manifest["seed"], manifest["data"]
        (3, {'support': '0f3a'})
    """
    found = {package: package_version(package) for package in ("drum-hf", *_PACKAGES)}
    content = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shown_command(sys.argv),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {package: version for package, version in found.items() if version != "unknown"},
        "seed": seed,
        "data": dict(data or {}),
        "lvlm": _lvlm(lvlm),
        "settings": redacted(dict(settings or {})),
    }
    path = Path(folder) / name
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")
    return path


def manifest_beside(file: str | os.PathLike[str], **about: Any) -> Path:
    """Write the manifest of a single file beside it.

    That of "results.json" is "results.manifest.json"; that of any other keeps the whole name, so that the scores of
    "scores.sqlite" and their export "scores.parquet" have one each.
    """
    path = Path(file)
    return write_manifest(
        path.parent, **about, name=f"{path.stem if path.suffix == '.json' else path.name}.{MANIFEST}"
    )


def _lvlm(lvlm: Any) -> dict[str, Any] | None:
    if lvlm is None:
        return None
    names = ("name", "revision", "fingerprint", "prompt", "task")
    known = lvlm if isinstance(lvlm, Mapping) else {key: getattr(lvlm, key, None) for key in names}
    told = {key: known[key] for key in names if known.get(key) is not None}
    identity = getattr(lvlm, "identity", None)
    if isinstance(identity, Mapping):
        told["prompt"] = {
            key: identity.get(key) for key in ("chat_template", "image_position", "system", "score_end_of_turn")
        }
    if "name" in told:
        told["name"] = public_name(str(told["name"]))
    return told
