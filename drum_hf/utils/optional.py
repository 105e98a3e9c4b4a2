"""Optional and version-dependent imports, and where the models that ship with the package lie, in one place."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from types import ModuleType

from ..errors import DependencyError, DrumError, HubError, ModelError

#: Import name -> the extra of drum-hf that brings it.
_EXTRAS = {"matplotlib": "plot", "bm25s": "bm25", "gradio": "app"}

_MODELS = os.path.join(os.path.dirname(os.path.dirname(__file__)), "playground", "models")
#: Name of each model that ships with the package -> its folder.
_SHIPPED = {f"playground/{model}": os.path.join(_MODELS, model) for model in ("clip", "lvlm", "lvlm-base", "internvl")}


def resolve_name(name: str | os.PathLike[str]) -> str:
    """Folder of a model that ships ("playground/clip", "playground/lvlm"); any other name or path as it is.

    A folder of one's own that is called so is reached by "./playground/clip".
    """
    return _SHIPPED.get(os.fspath(name), os.fspath(name))


def local_name(path: str | os.PathLike[str]) -> str:
    """The name by which `resolve_name` finds this folder on any machine; any other name or path as it is."""
    given = os.path.realpath(path)
    return next((name for name, folder in _SHIPPED.items() if os.path.realpath(folder) == given), os.fspath(path))


def is_folder(name: str | os.PathLike[str]) -> bool:
    """Whether a model's name is a folder of this machine, or of another: no Hub id, and none that ships."""
    given = os.fspath(name)
    if given in _SHIPPED:
        return False
    return os.path.isabs(given) or PureWindowsPath(given).is_absolute() or os.path.isdir(given)


def public_name(name: str | os.PathLike[str]) -> str:
    """A model's name as it may be published: of a folder the last name alone.

    Example:
        >>> public_name("/home/me/models/birds"), public_name("me/birds"), public_name("playground/lvlm")
        ('birds', 'me/birds', 'playground/lvlm')
    """
    given = os.fspath(name)
    if not is_folder(given):
        return given
    # " / " is no separator: "/home/me/birds with image tokens / 4" is the name of an LVLM
    whole = Path(given).resolve().as_posix() if os.path.isdir(given) else given
    return re.split(r"(?<! )[\\/](?! )", whole.rstrip("\\/"))[-1]


def bar_options(shown: bool) -> dict[str, bool]:
    """What tells tqdm whether a bar is shown: a plain `disable=False` would overrule the user's TQDM_DISABLE."""
    return {} if shown else {"disable": True}


@contextlib.contextmanager
def adapting() -> Iterator[None]:
    """While an adapter is put on a model: without warnings that peft gives of what is meant, or its own doing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute", UserWarning)
        warnings.filterwarnings("ignore", "Adapter .* was active which is now deleted", UserWarning)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


@contextlib.contextmanager
def loading(what: str, name: str | os.PathLike[str]) -> Iterator[None]:
    """Say which model it was that can't be found or made from its files, and what it was to be.

    Raises:
        ModelError: in place of whatever transformers and its tokenizers raise, ImportError aside.
    """
    try:
        yield
    except BaseException as error:
        # Rust's panics are no Exception; files that are no model make transformers raise nearly anything.
        panicked = type(error).__name__ == "PanicException"
        is_ours = isinstance(error, DrumError) and not isinstance(error, HubError)
        is_ours = is_ours or (isinstance(error, ValueError) and _raised_here(error))
        if is_ours or isinstance(error, (ImportError, MemoryError)) or not (panicked or isinstance(error, Exception)):
            raise
        given = os.fspath(name)
        shipped = f"; the models that ship are {', '.join(_SHIPPED)}" if given.startswith("playground/") else ""
        raise ModelError(
            f"expected a folder or a Hub id of {what}, got {given!r}, which could not be loaded: "
            f"{' '.join(str(error).split()) or type(error).__name__}{shipped}"
        ) from error


def _raised_here(error: BaseException) -> bool:
    """Whether this package raised it, and no library below."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    root = os.path.dirname(os.path.dirname(__file__))
    return last is not None and last.tb_frame.f_code.co_filename.startswith(root + os.sep)


def require(module: str, purpose: str) -> ModuleType:
    """Import an optional package, or say which pip line brings it.

    Raises:
        DependencyError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        top = module.partition(".")[0]
        extra = _EXTRAS.get(top)
        line = f'pip install "drum-hf[{extra}]"' if extra else f"pip install {top}"
        raise DependencyError(f"{purpose} needs the package {top!r}, which is not installed; run: {line}") from error


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@functools.cache
def require_faiss() -> ModuleType:
    """Import FAISS; faiss-cpu and faiss-gpu write the same folder and break one another.

    Raises:
        DependencyError: neither or both are installed.
    """
    gpu = [name for name in ("faiss-gpu", "faiss-gpu-cu12", "faiss-gpu-cuvs") if _installed(name)]
    if gpu and _installed("faiss-cpu"):
        raise DependencyError(
            f"expected one FAISS package, found faiss-cpu and {', '.join(gpu)}: both install the folder 'faiss' and "
            f"overwrite one another. Keep the GPU one with: pip uninstall -y faiss-cpu {' '.join(gpu)} && "
            f"pip install {gpu[0]}"
        )
    return require("faiss", "the demonstration index")
