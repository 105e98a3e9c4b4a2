"""Encoders as `SentenceTransformer`s: built from a checkpoint, loaded from what was saved, made ready for training."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL.Image import new as new_image
from sentence_transformers import SentenceTransformer

from ..errors import SavedFileError
from ..utils.optional import loading, resolve_name
from ..utils.safe_models import ADAPTER_CONFIG, check_adapter
from .adapters import active_adapter, adapter_names, attach, forget_adapter, inject, lora_config, merge_adapter, use
from .joint import SAVED_CONFIG, JointEncoder, read_saved

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["add_adapter", "build_encoder", "load_encoder", "plain_copy", "prepare_training"]


def build_encoder(
    name_or_path: str | os.PathLike[str],
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    learn_weights: bool | None = None,
    lora: bool | LoraConfig = False,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    trust_remote_code: bool = False,
) -> SentenceTransformer:
    """A `SentenceTransformer` whose one module is a `JointEncoder`.

    Args:
        name_or_path: a CLIP or SigLIP checkpoint on the Hub, or a folder; "playground/clip" is the one that ships with
            the package.
        weights, learn_weights: as in `JointEncoder.from_pretrained`.
        lora: train a LoRA adapter and leave the towers as they are. True: rank 16, alpha 32 on the query, key, value
            and output projections of both towers' attention (our choice); or a `peft.LoraConfig`. The adapter is in
            float32 whatever the towers are in.
        dtype: "float32", "bfloat16" or "float16". None: as the weights were saved. `DrumTrainer` trains in float32
            in any case.
        device: "cuda", "cpu", … None: the fastest there is.
        revision, token, cache_dir, local_files_only, force_download: as everywhere in transformers.
        trust_remote_code: load pickles, and run code that the model's files name. False: the files are checked, and
            only plain values, texts and safetensors are read.

    Raises:
        ModelError: there is no such model, or its files don't make one.
        SavedFileError: a file is not such as may be loaded; the message names it and the fault.
        ValueError: another model family or dtype, or weights that can't be used.
    """
    with loading("a CLIP or SigLIP", name_or_path):
        module = JointEncoder.from_pretrained(
            name_or_path,
            weights=weights,
            learn_weights=learn_weights,
            dtype=dtype,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            trust_remote_code=trust_remote_code,
        )
        encoder = SentenceTransformer(modules=[module], device=device, similarity_fn_name="dot")
        _try_out(encoder)
    if lora:
        inject(module, lora_config() if lora is True else lora)
    return encoder


def load_encoder(
    directory: str | os.PathLike[str],
    *,
    base_model: str | os.PathLike[str] | None = None,
    base_revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    trust_remote_code: bool = False,
) -> SentenceTransformer:
    """Load a folder that an encoder of `build_encoder` was saved to; embeddings are as before.

    Args:
        directory: what `SentenceTransformer.save` wrote.
        base_model, base_revision: as in `JointEncoder.from_pretrained`.
        dtype, device: as in `build_encoder`.
        token, cache_dir, local_files_only, force_download, trust_remote_code: for the base model, as in
            `build_encoder`.

    Raises:
        ModelError, SavedFileError: the files are not such as may be loaded, make no model, or don't fit one another: a
            blank picture and two texts are embedded to find that out.
        ValueError: another model family or dtype, or values that transformers refuses.
    """
    with loading("a saved encoder", directory):
        module = JointEncoder.from_pretrained(
            directory,
            base_model=base_model,
            base_revision=base_revision,
            dtype=dtype,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            trust_remote_code=trust_remote_code,
        )
        encoder = SentenceTransformer(modules=[module], device=device, similarity_fn_name="dot")
        encoder.eval()
        _try_out(encoder)
    return encoder


def _try_out(encoder: SentenceTransformer) -> None:
    """Embed a blank picture and two texts: raises where the files make no encoder."""
    encoder.encode([{"image": new_image("RGB", (8, 8)), "text": ["a", "b"]}], show_progress_bar=False)


def prepare_training(encoder: SentenceTransformer) -> None:
    """Put an encoder's weights into float32.

    Steps on float16 or bfloat16 weights are mostly rounded away, and gradients that pass through float16 weights, an
    adapter's for one, vanish. For half precision in the forward pass, use the trainer's `bf16=True` or `fp16=True`.
    `DrumTrainer` does this by itself; call it before training by sentence-transformers' own trainer.
    """
    encoder.float()


def add_adapter(module: JointEncoder, folder: Path, name: str) -> list[float] | None:
    """Load what `JointEncoder.save` wrote of an encoder with an adapter, beside those that are there.

    Returns:
        Logs of the parts' weights that were saved with it, or None where the folder has none.

    Raises:
        SavedFileError: the folder holds no adapter, or one of another base model.
        ValueError: the name is taken.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        raise SavedFileError(
            f"{folder}: expected a LoRA adapter, there is no {ADAPTER_CONFIG}: an encoder that was saved whole can't "
            "be swapped in; load it with DemoRetriever.from_pretrained"
        )
    noted = check_adapter(folder)
    theirs = str(noted.get("base_model_name_or_path")), noted.get("revision")
    ours = module.base_model, module.base_revision
    if not _same_base(theirs, ours):
        raise SavedFileError(
            f"{folder}: the adapter is for {_told(*theirs)}, the encoder is {_told(*ours)}: load the adapter's own "
            "retriever with DemoRetriever.from_pretrained"
        )
    if name in adapter_names(module):
        raise ValueError(f"expected a new name for the adapter, {name!r} is taken; pass another name=")
    weights = read_saved(folder).get("log_weights") if (folder / SAVED_CONFIG).is_file() else None
    used = active_adapter(module)
    try:
        attach(module, folder, name)
    except BaseException:
        forget_adapter(module, name)
        use(module, used)
        raise
    module.eval()
    return weights


def plain_copy(encoder: SentenceTransformer) -> SentenceTransformer:
    """A copy without adapters: the one in use is in its weights."""
    copied = copy.deepcopy(encoder)
    merge_adapter(copied[0])  # type: ignore[arg-type]
    return copied


def _same_base(one: Sequence[str | None], other: Sequence[str | None]) -> bool:
    places = [resolve_name(name or "") for name, _ in (one, other)]
    if all(map(os.path.isdir, places)):
        return os.path.realpath(places[0]) == os.path.realpath(places[1])
    return one[0] == other[0] and (one[1] == other[1] or None in (one[1], other[1]))


def _told(name: str | None, revision: str | None) -> str:
    return f"{name!r} at {revision}" if revision else repr(name)
