"""How a retriever travels: saved to a folder, pushed to the Hub, and loaded from either."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data import TripletTable, load_table
from ..errors import DimensionMismatchError, SavedFileError
from ..index.sharded import AnyIndex, load_index, make_index
from ..types import LVLM
from ..utils import hub as _hub
from ..utils.files import writing
from . import saving as _saved
from .saving import Images, SavedForm

if TYPE_CHECKING:
    from typing import Self

    import datasets

__all__ = ["Shared"]

logger = logging.getLogger("drum_hf.retriever.retriever")


class Shared:
    """What a `DemoRetriever` does with folders and the Hub."""

    _lock: threading.RLock
    _index: AnyIndex | None
    card_data: dict[str, Any]
    plot: bytes | None

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        form: SavedForm | None = None,
        include_support: bool = True,
        include_index: bool = True,
        images: Images = "embedded",
        image_root: str | os.PathLike[str] | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **hub: Any,
    ) -> None:
        """Write a folder from which `from_pretrained` makes the same retriever: safetensors, JSON and parquet.

        `drum_config.json` lists every other file with its SHA-256, but for the card, which may be edited, and the run
        manifest. Files are written aside and moved into place one by one; those of an earlier save that are no longer
        needed are removed.

        Args:
            directory: made where it is missing.
            form: "adapter" writes the LoRA adapter alone, and its base model's name and commit; "full" the whole
                encoder, with the adapter in its weights. None: the adapter where one is in use.
            include_support: False leaves the rows out: `from_pretrained` then needs `support=`. Their ids and vectors
                are written all the same.
            include_index: False leaves the vectors out: the support set is then embedded when it is first needed.
            images: "embedded" in the support set's file; or by "reference", as paths, for pictures that may not be
                passed on, or lie where the retriever is used: `from_pretrained` then needs `image_root=`.
            image_root: with images by reference: the folder that paths are relative to. None: the innermost that
                holds them all.
            push_to_hub: upload as well, to `repo_id` (by default the directory's name).
            **hub: as in the method `push_to_hub`.

        Raises:
            ValueError: form="adapter" where no adapter is in use.
            ImageError: a picture to be referred to is not a file, or lies outside `image_root`.
            SavedFileError: the disk is full, or the folder can't be written.
        """
        what: dict[str, Any] = {"form": form, "include_support": include_support, "include_index": include_index}
        what |= {"images": images, "image_root": image_root}
        folder = Path(directory)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # Beside its destination: a move within one file system is atomic.
            with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as made, self._lock:
                partial = Path(made)
                _saved.write(self, partial, **what, repo_id=repo_id)  # type: ignore[arg-type]  # a DemoRetriever
                _saved.move_into_place(partial, folder)
        if push_to_hub:
            self.push_to_hub(repo_id or folder.resolve().name, **what, **hub)
        elif hub:
            raise ValueError(f"{', '.join(hub)} only count with push_to_hub=True")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        form: SavedForm | None = None,
        include_support: bool = True,
        include_index: bool = True,
        images: Images = "embedded",
        image_root: str | os.PathLike[str] | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload to the Hub, in one commit that replaces an earlier retriever there.

        The support set is uploaded with it: mind its licence, or pass `include_support=False`, or
        `images="reference"`. Of an LVLM or base model that lies in a folder of this machine, only the folder's last
        name is.

        Args:
            repo_id: "name" or "owner/name"; made where it is missing.
            form: as in `save_pretrained`; but None: the adapter where one is in use whose base model is not a folder
                of this machine, so that others have it, too.
            include_support, include_index, images, image_root: as in `save_pretrained`.
            private: for a new repository; None: as the owner's settings have it.
            token: None: that of `hf auth login`.
            commit_message: a default where left out.
            revision: branch to commit to; made where it is missing.
            create_pr: open a pull request instead of committing.

        Returns:
            The address of the commit or pull request.

        Raises:
            HubError: the Hub refused; the message says what to do.
        """
        repo_id = _hub.make_repository(repo_id, private=private, token=token)
        with tempfile.TemporaryDirectory() as made, self._lock:
            _saved.write(
                self,  # type: ignore[arg-type]  # a DemoRetriever
                Path(made),
                form=form,
                include_support=include_support,
                include_index=include_index,
                images=images,
                image_root=image_root,
                repo_id=repo_id,
                published=True,
            )
            return _hub.commit_folder(
                repo_id,
                Path(made),
                message=commit_message or "Upload a drum-hf retriever",
                replaces=_saved.patterns(_saved.PARTS),
                token=token,
                revision=revision,
                create_pr=create_pr,
            )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        support: TripletTable | datasets.Dataset | Sequence[Mapping[str, Any]] | str | os.PathLike[str] | None = None,
        image_root: str | os.PathLike[str] | None = None,
        base_model: str | os.PathLike[str] | None = None,
        draft_lvlm: LVLM | None = None,
        batch_size: int = 64,
        mmap: bool = False,
        device: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        trust_remote_code: bool = False,
    ) -> Self:
        """Load a retriever from a folder or the Hub: results are as before it was saved.

        Args:
            name_or_path: a folder, or a repository on the Hub.
            support: another support set; it is embedded anew, unless it is the very one that was saved. Needed where
                the retriever was saved without one.
            image_root: where the pictures lie of a support set that was saved with images by reference.
            base_model: where the base model of a LoRA encoder lies on this machine, or its name on the Hub, instead of
                the one recorded; it is recorded from then on. Left aside where the encoder was saved whole.
            draft_lvlm, batch_size, device: as in the class.
            mmap: leave the index's vectors, and the support set's rows and images, in files; see
                [`DemoIndex.load`][drum_hf.index.demo_index.DemoIndex.load] and
                [`TripletTable.load`][drum_hf.data.TripletTable.load]. Demonstrations can then be removed, and added
                where the index is in shards (`shard_rows` among its options).
            revision: branch, tag or commit on the Hub.
            token, cache_dir, local_files_only, force_download: as everywhere on the Hub; for the base model of a LoRA
                encoder, too.
            trust_remote_code: run code from the base model's repository. Nothing needs it.

        Raises:
            HubError: there is no such repository, it may not be seen, or it is not in the cache and no request may be
                made; the message says what to do.
            SavedFileError: a file is missing, altered, or of a later format version; or the files don't fit one
                another.
            DimensionMismatchError: the index holds vectors of another width than the encoder's.
            ValueError: `mmap` of an `hnsw` index, which can't be mapped.
        """
        from ..encoders.loading import load_encoder

        hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        hub["force_download"] = force_download
        folder = _saved.locate(name_or_path, revision=revision, **hub)
        config = _saved.read_config(folder)
        table = _saved_support(folder, config, image_root, mmap=mmap) if support is None else load_table(support)
        index = load_index(folder / _saved.INDEX, mmap=mmap) if config["index"]["included"] else None
        options: dict[str, Any] = {"base_model": base_model, "device": device, "trust_remote_code": trust_remote_code}
        support_encoder = None
        try:
            encoder = load_encoder(folder / _saved.ENCODER, **options, **hub)
            if config.get("support_encoder"):
                support_encoder = load_encoder(folder / _saved.SUPPORT_ENCODER, **options, **hub)
        except BaseException as error:
            # A file that is no model makes transformers raise nearly anything, and its tokenizers panic.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            needs, remedy = "", ""
            if config["adapter"]:
                needs = f", which needs its base model {os.fspath(base_model or config['base_model'])!r}"
                remedy = "pass base_model= with where the base model lies on this machine, or "
            raise SavedFileError(
                f"{folder / _saved.ENCODER}: the encoder can't be loaded{needs} ({error}); {remedy}save the retriever "
                "again"
            ) from error
        moved = bool(base_model and config["adapter"])  # the encoder then knows what it was loaded from
        about = config["index"]
        try:
            make_index(1, kind=about["kind"], **about["options"])
        except (TypeError, ValueError) as error:
            raise SavedFileError(
                f"{folder / _saved.CONFIG}: its 'index' is none that can be made ({error}); save the retriever again"
            ) from error
        retriever = cls(
            encoder,  # type: ignore[call-arg]  # a DemoRetriever's
            table,
            support_encoder=support_encoder,
            index_kind=about["kind"],
            index_options=about["options"],
            draft_lvlm=draft_lvlm,
            teacher=config["teacher"],
            base_model=None if moved else config["base_model"],
            base_revision=None if moved else config["base_revision"],
            top_k=config["top_k"],
            batch_size=batch_size,
        )
        retriever.card_data, retriever.plot = config["card"], _saved.plot(folder)
        if index is not None:
            _check_width(folder, index, encoder.get_embedding_dimension())
        if table.fingerprint == config["support"]["fingerprint"]:
            if index is not None and index.ids != table.ids:
                raise SavedFileError(
                    f"{folder / _saved.INDEX}: its {len(index)} ids are not those of the {len(table)} demonstrations; "
                    "save the retriever again"
                )
            retriever._index = index
        elif support is None:
            raise SavedFileError(
                f"{folder / _saved.SUPPORT}: it is not the table that {_saved.CONFIG} names; save it again"
            )
        else:
            logger.info("the support set given is not the one saved: it is embedded when first needed")
        return retriever


def _saved_support(
    folder: Path, config: Mapping[str, Any], image_root: str | os.PathLike[str] | None, *, mmap: bool
) -> TripletTable:
    about = config["support"]
    if not about["included"]:
        raise SavedFileError(
            f"{folder}: the retriever was saved without its {about['rows']} demonstrations; pass them with support="
        )
    return TripletTable.load(folder / _saved.SUPPORT, image_root=image_root, mmap=mmap)


def _check_width(folder: Path, index: AnyIndex, width: int | None) -> None:
    if index.dimension != width:
        raise DimensionMismatchError(
            f"{folder}: the index holds vectors of {index.dimension} dimensions, the encoder gives {width}: they "
            "are not of one retriever; save it again"
        )
