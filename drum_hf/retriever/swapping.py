"""Adapters of a retriever: several on one base model, swapped while it is loaded, or merged."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..encoders.adapters import active_adapter, adapter_names, merge_adapter, use
from ..encoders.loading import add_adapter
from ..errors import SavedFileError
from . import saving as _saved

if TYPE_CHECKING:
    from ..encoders.joint import JointEncoder

__all__ = ["Swappable"]


class Swappable:
    """What a `DemoRetriever` does with adapters."""

    teacher: dict[str, Any] | None
    card_data: dict[str, Any]
    plot: bytes | None
    _lock: threading.RLock

    if TYPE_CHECKING:

        @property
        def _module(self) -> JointEncoder: ...

        def mark_stale(self) -> None: ...

    #: Name of an adapter -> what belongs to it while another is in use: weights of the parts, teacher, card, plot.
    _set_aside: dict[str | None, tuple[Sequence[float], Any, dict[str, Any], bytes | None]]

    @property
    def adapters(self) -> list[str]:
        """Names of the LoRA adapters that are loaded; the one that the retriever came with is called "default"."""
        return adapter_names(self._module)

    @property
    def active_adapter(self) -> str | None:
        """Name of the adapter in use; None: the base model alone, or an encoder that was trained whole."""
        return active_adapter(self._module)

    def load_adapter(
        self,
        name_or_path: str | os.PathLike[str],
        name: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> None:
        """Load the adapter of another retriever on the same base model; `set_adapter` puts it to use.

        Of that retriever, only encoder, teacher and card are read: the support set stays the one that is here.

        Args:
            name_or_path: folder or Hub id of a retriever whose encoder was saved as an adapter.
            name: what to call it here.
            revision, token, cache_dir, local_files_only, force_download: as in `from_pretrained`.

        Raises:
            SavedFileError: it has no adapter, or one of another base model, or its files are not as they were saved.
            HubError: it can't be fetched.
            ValueError: the name is taken.
        """
        folder = _saved.locate(
            name_or_path,
            parts=(_saved.ENCODER, _saved.PLOT),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        config = _saved.read_config(folder, parts=(_saved.ENCODER, _saved.PLOT))
        if config.get("support_encoder"):
            raise SavedFileError(
                f"{folder}: expected an adapter for queries and demonstrations, got one that was trained on the "
                "queries' side alone; load that retriever with DemoRetriever.from_pretrained"
            )
        with self._lock:
            used = self.active_adapter
            weights = add_adapter(self._module, folder / _saved.ENCODER, name)
            use(self._module, used)  # loading may have put it to use
            aside = (weights or self._module.log_weight_list, config["teacher"], config["card"], _saved.plot(folder))
            self._set_aside[name] = aside

    def set_adapter(self, name: str | None) -> None:
        """Put a loaded adapter to use, with the weights of the parts and the teacher that belong to it.

        The support set is embedded anew when it is next needed: vectors of one adapter mean nothing to another.

        Args:
            name: of the adapter; None: the base model alone.

        Raises:
            ValueError: no adapter of that name is loaded.
        """
        with self._lock:
            used = self.active_adapter
            if name == used:
                return
            use(self._module, name)
            self._set_aside[used] = (self._module.log_weight_list, self.teacher, self.card_data, self.plot)
            aside = self._set_aside.get(name, (self._module.log_weight_list, None, {}, None))
            weights, self.teacher, self.card_data, self.plot = aside
            self._module.log_weight_list = weights
            self.mark_stale()

    def merge_adapters(self) -> None:
        """Put the adapter in use into the weights, which are then saved whole; the others are forgotten.

        Embeddings stay as they are to within rounding, so the index stays, too. Without an adapter in use, the base
        model is what remains.
        """
        with self._lock:
            merge_adapter(self._module)
            self._set_aside.clear()
