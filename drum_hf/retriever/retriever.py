"""`DemoRetriever`: encoder, index and support set, called like a pipeline; loaded, saved and pushed like a model."""

from __future__ import annotations

import copy
import dataclasses
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from ..data import TripletTable, load_table
from ..encoders.adapters import active_adapter, adapter_names, merge_adapter, use
from ..errors import ColumnError, DimensionMismatchError, MissingIdError
from ..index.registry import check_index, index_kinds, make_index
from ..selection import Candidates, Selector, TopN, choose, get_selector
from ..types import LVLM, Demonstration, ICLRequest, Query, Retrieval, VectorIndex
from ..utils import hub as _hub
from ..utils.files import replacing_folder
from . import saving as _saved
from .queries import Queries, SizedItems, as_item, as_queries, as_rows, in_chunks, is_single, name_query
from .saving import Images, SavedForm

if TYPE_CHECKING:
    import datasets
    import torch
    from peft import LoraConfig
    from sentence_transformers import SentenceTransformer

    from ..encoders.joint import JointEncoder

__all__ = ["PART_WEIGHTS", "DemoRetriever"]

#: What is compared, by the names that the literature gives it -> weights of image, prompt and response: similar image,
#: similar text (the prompt), both, and any of these with the LVLM's draft against the demonstrations' responses.
PART_WEIGHTS: dict[str, tuple[float, float, float]] = {
    "si": (1.0, 0.0, 0.0),
    "st": (0.0, 1.0, 0.0),
    "sit": (1.0, 1.0, 0.0),
    "sit+draft": (1.0, 1.0, 1.0),
    "si+draft": (1.0, 0.0, 1.0),
    "st+draft": (0.0, 1.0, 1.0),
}


class DemoRetriever:
    """Finds the demonstrations of a support set that an LVLM needs in its context for a query.

    Queries are embedded as (image, prompt, draft), demonstrations as (image, prompt, response); the nearest by dot
    product come first. A query never gets its own row, nor one of its group. The support set is embedded when it is
    first needed. Retrieval may run in several threads at once.

    Args:
        encoder: a `SentenceTransformer` made by [`build_encoder`][drum_hf.encoders.joint.build_encoder].
        support: the demonstrations.
        support_encoder: another one, which embeds the demonstrations, while `encoder` embeds the queries. None:
            `encoder` embeds both. See `freeze_support`.
        index: your own, of any class that fulfils [`VectorIndex`][drum_hf.types.VectorIndex]: empty, or holding the
            support set's vectors as this encoder gives them. It is emptied and filled again when the encoder has
            changed. None: one of `index_kind` is made.
        index_kind: "flat" (exact), "hnsw" or "ivfpq" (see [`DemoIndex`][drum_hf.index.demo_index.DemoIndex]), or a
            kind added by [`register_index`][drum_hf.index.registry.register_index].
        index_options: further arguments of the kind: for these, of `DemoIndex`; with `shard_rows`, of a
            [`ShardedIndex`][drum_hf.index.sharded.ShardedIndex], which is embedded and built a shard at a time.
        draft_lvlm: writes a draft (zero-shot) for queries that come without one, where the strategy uses drafts.
        teacher: `name`, `revision`, `fingerprint` and `task` of the LVLM whose feedback trained the encoder.
        base_model, base_revision: what the encoder was made from; taken from the encoder where left out.
        top_k: how many demonstrations a call returns unless told (4 is our choice).
        batch_size: items embedded at once.

    Attributes:
        teacher: as above, or None; may be set.
        draft_lvlm: as above, or None; may be set.
        card_data: further entries of the model card, such as `training` and `results`: see
            [`render_card`][drum_hf.retriever.card.render_card]. JSON-ready; saved with the retriever.
        plot: a PNG for the model card, or None; may be set, and is saved with the retriever.

    Raises:
        ValueError: an encoder that was not made by `build_encoder`.
        DimensionMismatchError: two encoders of unlike width, or an index of another width.
        MissingIdError: an index that holds other ids than the support set.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> from drum_hf.playground.building.pretraining import build_clip
        >>> folder = tempfile.mkdtemp()
        >>> for part in build_clip(seed=0):
        ...     _ = part.save_pretrained(folder)
        >>> rows = [
        ...     {"id": c, "image": Image.new("RGB", (32, 32), c), "prompt": "what colour", "response": c}
        ...     for c in ("red", "green", "blue")
        ... ]
        >>> retriever = DemoRetriever.from_encoder(folder, support=rows, strategy="sit")
        >>> retriever({"image": Image.new("RGB", (32, 32), "red"), "prompt": "what colour"}, k=1).ids
        ['red']
        >>> sorted(retriever({"image": rows[0]["image"], "prompt": "what colour", "id": "red"}, k=2).ids)
        ['blue', 'green']
    """

    def __init__(
        self,
        encoder: SentenceTransformer,
        support: TripletTable,
        *,
        support_encoder: SentenceTransformer | None = None,
        index: VectorIndex | None = None,
        index_kind: str | None = None,
        index_options: Mapping[str, Any] | None = None,
        draft_lvlm: LVLM | None = None,
        teacher: Mapping[str, Any] | None = None,
        base_model: str | None = None,
        base_revision: str | None = None,
        top_k: int = 4,
        batch_size: int = 64,
    ) -> None:
        _refuse_other_encoders(encoder)
        if support_encoder is not None:
            _refuse_other_encoders(support_encoder)
            widths = [each.get_embedding_dimension() for each in (encoder, support_encoder)]
            if widths[0] != widths[1]:
                raise DimensionMismatchError(
                    f"expected encoders of one width, got {widths[0]} for queries and {widths[1]} for demonstrations"
                )
        self._encoder, self._support_encoder = encoder, support_encoder
        self._support = load_table(support)
        self.index_kind: str | None = index_kind or "flat"
        self.index_options = dict(index_options or {})
        if index is None:
            check_index(self.index_kind, self.index_options)  # refused now, not after encoding
        elif index_kind is not None or index_options is not None:
            raise ValueError("expected index=, or index_kind= and index_options= to make one, got both; leave one out")
        else:
            _refuse_other_vectors(index, self._support, encoder.get_embedding_dimension())
            kind = getattr(index, "kind", None)
            self.index_kind = kind if kind in index_kinds() else None
            self.index_options = dict(getattr(index, "options", None) or {})
        self.draft_lvlm = draft_lvlm
        self.teacher: dict[str, Any] | None = dict(teacher) if teacher else None
        self.base_model = base_model or self._module.base_model
        self.base_revision = base_revision or self._module.base_revision
        self.top_k, self.batch_size = top_k, batch_size
        self.card_data: dict[str, Any] = {}
        self.plot: bytes | None = None
        #: Name of an adapter -> what belongs to it while another is in use.
        self._set_aside: dict[str | None, _saved.Adapter] = {}
        self._own_index = index
        self._index: VectorIndex | None = (
            index if index is not None and len(index) else None
        )  # None: to be built when next needed
        # Tokenizers keep the padding of a call as state: one thread encodes at a time.
        self._lock = threading.RLock()

    @classmethod
    def from_encoder(
        cls,
        name_or_path: str | os.PathLike[str] | SentenceTransformer,
        support: TripletTable | datasets.Dataset | Sequence[Mapping[str, Any]] | str | os.PathLike[str],
        *,
        strategy: str | None = None,
        weights: Sequence[float] | Mapping[str, float] | None = None,
        learn_weights: bool | None = None,
        lora: bool | LoraConfig = False,
        dtype: str | torch.dtype | None = None,
        index: VectorIndex | None = None,
        index_kind: str | None = None,
        index_options: Mapping[str, Any] | None = None,
        draft_lvlm: LVLM | None = None,
        teacher: Mapping[str, Any] | None = None,
        top_k: int = 4,
        batch_size: int = 64,
        device: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        trust_remote_code: bool = False,
    ) -> DemoRetriever:
        """A retriever that has not been trained, over a CLIP or SigLIP checkpoint.

        Args:
            name_or_path: on the Hub, a folder, or "playground/clip"; or an encoder made by `build_encoder`, kept as it
                is but for the weights.
            support: a table, or what [`load_table`][drum_hf.data.load_table] takes: a path, a Dataset, rows, ….
            strategy: a name in `PART_WEIGHTS`, such as "si" or "sit". None: "sit+draft", or what the encoder has.
            weights: of image, prompt and response, instead of a strategy.
            learn_weights, lora, dtype, device: as in `build_encoder`.
            index, index_kind, index_options, draft_lvlm, teacher, top_k, batch_size: as in the class.
            revision, token, cache_dir, local_files_only, force_download, trust_remote_code: as everywhere in
                transformers.

        Raises:
            ValueError: an unknown strategy or model family, or weights that can't be used.
            ColumnError, RowError, ImageError, DuplicateIdError, EmptySupportError: the support set can't be used.
        """
        from ..encoders.loading import build_encoder

        table = load_table(support)
        if strategy is not None:
            if strategy not in PART_WEIGHTS or weights is not None:
                got = f"{strategy!r} and weights" if weights is not None else f"{strategy!r}"
                raise ValueError(f"expected one of the strategies {', '.join(PART_WEIGHTS)}, or weights, got {got}")
            weights = PART_WEIGHTS[strategy]
        if isinstance(name_or_path, (str, os.PathLike)):
            encoder = build_encoder(
                name_or_path,
                weights=weights,
                learn_weights=learn_weights,
                lora=lora,
                dtype=dtype,
                device=device,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                force_download=force_download,
                trust_remote_code=trust_remote_code,
            )
        else:
            encoder = name_or_path
            if lora or dtype is not None:
                raise ValueError(
                    "lora= and dtype= are for an encoder that is loaded here: pass them to build_encoder instead"
                )
        retriever = cls(
            encoder,
            table,
            index=index,
            index_kind=index_kind,
            index_options=index_options,
            draft_lvlm=draft_lvlm,
            teacher=teacher,
            top_k=top_k,
            batch_size=batch_size,
        )
        if encoder is name_or_path:
            if weights is not None:
                retriever._module.weights = weights  # type: ignore[assignment]
            if learn_weights is not None:
                retriever._module.learn_weights = learn_weights
        return retriever

    # What it holds

    @property
    def encoder(self) -> SentenceTransformer:
        """The encoder; call `mark_stale` after training it."""
        return self._encoder

    @property
    def support_encoder(self) -> SentenceTransformer | None:
        """The encoder that embeds the demonstrations, where that is not `encoder`."""
        return self._support_encoder

    @property
    def _module(self) -> JointEncoder:
        return self._encoder[0]  # type: ignore[return-value]

    @property
    def support(self) -> TripletTable:
        """The demonstrations."""
        return self._support

    @property
    def index(self) -> VectorIndex:
        """The support set's vectors; embeds them first if that is due."""
        with self._lock:
            if self._index is None:
                self.refresh()
            assert self._index is not None
            return self._index

    @property
    def weights(self) -> dict[str, float]:
        """Weight of image, prompt and response; they sum to 1. Set them on `encoder[0]`, then call `mark_stale`."""
        return self._module.weights

    @property
    def strategy(self) -> str:
        """The name in `PART_WEIGHTS` of the parts that are compared; their names joined by "+" where there is none."""
        used = {part for part, weight in self.weights.items() if weight}
        for name, weights in PART_WEIGHTS.items():
            if used == {part for part, weight in zip(self.weights, weights, strict=True) if weight}:
                return name
        return "+".join(part for part in self.weights if part in used)

    @property
    def uses_drafts(self) -> bool:
        """Whether responses are compared, so that a query is better with a draft."""
        return self.weights["response"] > 0

    def __len__(self) -> int:
        return len(self._support)

    def __repr__(self) -> str:
        teacher = f", teacher={self.teacher.get('name')!r}" if self.teacher else ""
        return (
            f"DemoRetriever({self.base_model!r}, strategy={self.strategy!r}, {len(self)} demonstrations, "
            f"index={self.index_kind or type(self._own_index).__name__!r}{teacher})"
        )

    # Retrieving

    @overload
    def __call__(
        self,
        queries: Query | Demonstration | Mapping[str, Any],
        k: int | None = ...,
        *,
        exclude_self: bool = ...,
        selector: str | Selector | None = ...,
    ) -> Retrieval: ...

    @overload
    def __call__(
        self,
        queries: list[Any] | tuple[Any, ...],
        k: int | None = ...,
        *,
        exclude_self: bool = ...,
        selector: str | Selector | None = ...,
    ) -> list[Retrieval]: ...

    @overload
    def __call__(
        self,
        queries: Queries | datasets.Dataset,
        k: int | None = ...,
        *,
        exclude_self: bool = ...,
        selector: str | Selector | None = ...,
    ) -> Iterator[Retrieval]: ...

    def __call__(
        self,
        queries: Any,
        k: int | None = None,
        *,
        exclude_self: bool = True,
        selector: str | Selector | None = None,
    ) -> Retrieval | list[Retrieval] | Iterator[Retrieval]:
        """The k demonstrations that each query needs most, most useful first.

        A query is a `Query`, or a dict with `image` (PIL image, path or URL) and `prompt` (or `question`), and where
        they are known `draft`, `id` and `group`. A row of the support set can be given as it is: its response is not
        looked at.

        Args:
            queries: one query; a list of them; or a generator, a TripletTable or a `datasets.Dataset`, which are read
                a batch at a time while the results are drawn.
            k: how many; None: `top_k`. A query gets fewer where its exclusions leave fewer.
            exclude_self: leave out the query's own id and group.
            selector: chooses the k from the best-ranked candidates together: a name for
                [`get_selector`][drum_hf.selection.get_selector], such as "mmr", or a selector; most useful first is
                then its order. It may choose fewer. None: the best-ranked themselves.

        Returns:
            A Retrieval; a list of them; or a generator of them.

        Raises:
            ColumnError, RowError, ImageError: a query can't be used.
            ValueError: k is below 1, or the selector is unknown or chose what it may not.
            TooFewDemonstrationsError: k is more than the support set holds.
        """
        k = self.top_k if k is None else k
        selector = None if selector is None else get_selector(selector)
        queries = as_rows(queries)
        if is_single(queries):
            return self._retrieve([queries], k, exclude_self, selector)[0]
        if isinstance(queries, (list, tuple)):
            return self._retrieve(queries, k, exclude_self, selector) if queries else []
        if not isinstance(queries, Iterable):
            raise ColumnError(
                f"expected a query (a dict with 'image' and 'prompt', a Query, or an image), or several, got "
                f"{type(queries).__name__}"
            )
        return self._retrieve_lazily(queries, k, exclude_self, selector)

    def _retrieve(self, queries: Queries, k: int, exclude_self: bool, selector: Selector | None) -> list[Retrieval]:
        made = list(as_queries(queries))
        with self._lock:  # index and support of one moment
            ids, scores = self.retrieve_ids(made, k, exclude_self=exclude_self, selector=selector)
            support = self._support
        return [
            Retrieval(query.id, tuple(support.demonstrations(found)), tuple(map(float, values)))
            for query, found, values in zip(made, ids, scores, strict=True)
        ]

    def _retrieve_lazily(
        self, queries: Queries, k: int, exclude_self: bool, selector: Selector | None
    ) -> Iterator[Retrieval]:
        for chunk in in_chunks(queries, self.batch_size):
            yield from self._retrieve(chunk, k, exclude_self, selector)

    def retrieve_ids(
        self,
        queries: Queries,
        k: int | None = None,
        *,
        exclude_self: bool = True,
        selector: str | Selector | None = None,
    ) -> tuple[list[list[str]], list[np.ndarray]]:
        """As a call, but ids and scores alone: no image of a demonstration is read, unless a selector wants it.

        Args:
            queries: any iterable, read once, a few batches at a time.
            k, exclude_self, selector: as in a call.

        Returns:
            For each query its demonstrations' ids, most useful first, and a float32 array of their scores in [-1, 1].
        """
        k = self.top_k if k is None else k
        selector = None if selector is None else get_selector(selector)
        if selector is not None and not isinstance(selector, TopN):
            return self._select(queries, k, exclude_self, selector)
        ids: list[str | None] = []
        groups: list[str | None] = []

        def note(query: Query) -> None:
            ids.append(query.id if exclude_self else None)
            groups.append(query.group if exclude_self else None)

        with self._lock:
            vectors = self._encode_queries(queries, note)
            if not len(vectors):
                return [], []
            return self.index.search(vectors, k, exclude_ids=ids, exclude_groups=groups)

    def _select(
        self, queries: Queries, k: int, exclude_self: bool, selector: Selector
    ) -> tuple[list[list[str]], list[np.ndarray]]:
        if k < 1:
            raise ValueError(f"k is at least 1, got {k}; for no demonstrations, do not search")
        ids: list[list[str]] = []
        scores: list[np.ndarray] = []
        for chunk in in_chunks(queries, self.batch_size):
            asked: list[Query] = []
            with self._lock:  # index and support of one moment
                vectors = self._encode_queries(chunk, asked.append)
                found = self.index.search(
                    vectors,
                    max(k, min(selector.pool, len(self))),
                    exclude_ids=[query.id if exclude_self else None for query in asked],
                    exclude_groups=[query.group if exclude_self else None for query in asked],
                )
                for query, vector, ranked, values in zip(asked, vectors, *found, strict=True):
                    candidates = Candidates(
                        query, ranked, values, self.index.vectors(ranked), vector, self._support, tuple(self.weights)
                    )
                    rows = choose(selector, candidates, k)
                    ids.append([ranked[row] for row in rows])
                    scores.append(values[rows])
        return ids, scores

    def encode_queries(self, queries: Queries) -> np.ndarray:
        """Embed queries: float32 of shape (number of queries, dimension), rows of unit length."""
        return self._encode_queries(queries, lambda query: None)

    def encode_support(self, ids: Iterable[str] | None = None) -> np.ndarray:
        """Embed demonstrations with their encoder as it is now: float32 of shape (number of ids, dimension).

        Args:
            ids: of the support set; None: all of them, in order.

        Raises:
            MissingIdError: an id is not in the support set.
            NonFiniteEmbeddingError: the encoder gave NaN or infinity.
        """
        return self._encode_demonstrations(self._support, self._support.ids if ids is None else list(ids))

    def _encode_queries(self, queries: Queries, note: Callable[[Query], None]) -> np.ndarray:
        used = self._used()
        queries = as_rows(queries)

        def items(rows: Queries) -> Iterator[dict[str, Any]]:
            for position, query in enumerate(self._drafted(as_queries(rows))):
                note(query)
                yield as_item(query.image, query.prompt, query.draft, used, name_query(query.id, position))

        return self._encode(
            self._encoder, SizedItems(queries, items) if hasattr(queries, "__len__") else items(queries)
        )

    def _encode_demonstrations(self, table: TripletTable, ids: list[str]) -> np.ndarray:
        used = self._used()

        def items(rows: list[str]) -> Iterator[dict[str, Any]]:
            for id in rows:
                row = table[id]
                yield as_item(row.image, row.prompt, row.response, used, f"demonstration {id!r}")

        encoder = self._encoder if self._support_encoder is None else self._support_encoder
        return self._encode(encoder, SizedItems(ids, items))

    def _encode(self, encoder: SentenceTransformer, items: Iterable[dict[str, Any]]) -> np.ndarray:
        from ..encoders.joint import encode_items

        with self._lock:
            return encode_items(encoder, items, batch_size=self.batch_size)

    def _used(self) -> tuple[str, ...]:
        return tuple(part for part, weight in self.weights.items() if weight)

    def _drafted(self, queries: Iterable[Query]) -> Iterator[Query]:
        if self.draft_lvlm is None or not self.uses_drafts:
            yield from queries
            return
        for chunk in in_chunks(queries, self.batch_size):
            bare = [position for position, query in enumerate(chunk) if query.draft is None]
            drafts = self.draft_lvlm.generate([ICLRequest(chunk[position]) for position in bare]) if bare else []
            for position, draft in zip(bare, drafts, strict=True):
                chunk[position] = dataclasses.replace(chunk[position], draft=draft)
            yield from chunk

    # Changing it

    def record_training(
        self,
        *,
        teacher: Mapping[str, Any] | None,
        training: Mapping[str, Any],
        rounds: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Note whose feedback trained the encoder, and how, for the saved files and the model card.

        Args:
            teacher: as in the class.
            training: JSON-ready name -> value, such as rounds and scored pairs.
            rounds: a row for each mining round, such as `CandidateTable.summary` gives.
        """
        self.teacher = dict(teacher) if teacher else None
        self.card_data = {**self.card_data, "training": dict(training), "rounds": [dict(row) for row in rounds]}

    def mark_stale(self) -> None:
        """The encoder has changed: embed the support set anew when it is next needed.

        Nothing needs to be, where the support set has an encoder of its own.
        """
        with self._lock:
            if self._support_encoder is None:
                self._index = None

    def freeze_support(self) -> None:
        """Keep a copy of the encoder for the demonstrations, so that training changes the queries' side alone.

        The copy takes as much memory again, and is saved with the retriever.
        """
        frozen = copy.deepcopy(self._encoder).eval()
        frozen.requires_grad_(False)
        with self._lock:
            self._support_encoder = frozen

    def refresh(self, vectors: np.ndarray | None = None) -> DemoRetriever:
        """Embed the support set with the encoder as it is now, and build the index. Returns itself.

        Args:
            vectors: what `encode_support` would give, where that is known already: (number of demonstrations,
                dimension) float32, in the order of the support set.
        """
        with self._lock:
            index = self._own_index
            if index is None:
                assert self.index_kind is not None
                width = self._encoder.get_embedding_dimension() or 0
                index = make_index(width, kind=self.index_kind, **self.index_options)
            self._index = None  # should the next lines fail, it is neither the old one nor the new
            if len(index):
                index.remove(index.ids)
            ids, groups = self._support.ids, self._support.groups
            step = getattr(index, "shard_rows", None) or len(ids)
            for start in range(0, len(ids), step):
                part = slice(start, start + step)
                known = self.encode_support(ids[part]) if vectors is None else vectors[part]
                index.add(ids[part], known, groups[part])
            self._index = index
        return self

    def add(self, rows: TripletTable | datasets.Dataset | Sequence[Mapping[str, Any]]) -> None:
        """Add demonstrations; all of them, or none where one is refused.

        Raises:
            DuplicateIdError: an id is in the support set already.
            ColumnError, RowError, ImageError: a row can't be used.
        """
        table = load_table(rows)
        with self._lock:
            support = self._support.concat(table)
            if self._index is not None:
                self._index.add(table.ids, self._encode_demonstrations(table, table.ids), table.groups)
            self._support = support

    def remove(self, ids: Iterable[str]) -> None:
        """Remove demonstrations; all of them, or none where one is refused.

        Raises:
            MissingIdError: an id is not in the support set.
            EmptySupportError: none would be left.
        """
        ids = list(ids)
        with self._lock:
            support = self._support.without(ids)
            if self._index is not None:
                self._index.remove(ids)
            self._support = support

    # Adapters: several on one base model, swapped while it is loaded, or merged

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
        with self._lock:
            self._set_aside[name] = _saved.load_adapter(folder, self._module, name)

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
            log_weights = self._module.log_weight_list
            self._set_aside[used] = _saved.Adapter(log_weights, self.teacher, self.card_data, self.plot)
            aside = self._set_aside.get(name) or _saved.Adapter(log_weights)
            self.teacher, self.card_data, self.plot = aside.teacher, aside.card_data, aside.plot
            self._module.log_weight_list = aside.log_weights
            self.mark_stale()

    def merge_adapters(self) -> None:
        """Put the adapter in use into the weights, which are then saved whole; the others are forgotten.

        Embeddings stay as they are to within rounding, so the index stays, too. Without an adapter in use, the base
        model is what remains.
        """
        with self._lock:
            merge_adapter(self._module)
            self._set_aside.clear()

    # Files

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
        manifest. An earlier retriever in the directory is replaced at once: `from_pretrained` gives the old one or the
        new, also after a kill, or while several processes save there. Files that are no retriever's stay.

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
        with self._lock:
            state = self._state(include_index)  # embedded before others are kept waiting
            with replacing_folder(folder, owns=_saved.RETRIEVER_FILES) as partial:
                _saved.write(state, partial, **what, repo_id=repo_id)
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

        The support set is uploaded with it: mind its license, or pass `include_support=False`, or
        `images="reference"`. Of an LVLM or base model in a folder of this machine, only the folder's last name is
        published.

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
                self._state(include_index),
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
                replaces=_saved.patterns(),
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
        index: VectorIndex | None = None,
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
    ) -> DemoRetriever:
        """Load a retriever from a folder or the Hub: results are as before it was saved.

        Its files may be untrusted: only those that a retriever consists of are read, each compared with its checksum,
        and nothing outside the folder but the base model of an adapter.

        Args:
            name_or_path: a folder, or a repository on the Hub.
            support: another support set; it is embedded anew, unless it is the very one that was saved. Needed where
                the retriever was saved without one.
            image_root: where the pictures lie of a support set that was saved with images by reference.
            base_model: where the base model of a LoRA encoder lies on this machine, or its name on the Hub, instead of
                the one recorded; it is recorded from then on. Left aside where the encoder was saved whole.
            index: your own, in place of the one that was saved; as in the class.
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
            SavedFileError: a file is missing, altered, unknown, or of a later format version; or the files don't fit
                one another.
            DimensionMismatchError: the index holds vectors of another width than the encoder's.
            ValueError: `mmap` of an `hnsw` index, which can't be mapped.
        """
        hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        hub["force_download"] = force_download
        folder = _saved.locate(name_or_path, revision=revision, **hub)
        saved = _saved.load(
            folder,
            support=None if support is None else load_table(support),
            index=index,
            image_root=image_root,
            mmap=mmap,
            base_model=base_model,
            device=device,
            trust_remote_code=trust_remote_code,
            **hub,
        )
        retriever = cls(
            saved.encoder,
            saved.support,
            support_encoder=saved.support_encoder,
            index=index,
            index_kind=saved.index_kind if index is None else None,
            index_options=saved.index_options if index is None else None,
            draft_lvlm=draft_lvlm,
            teacher=saved.teacher,
            base_model=saved.base_model,
            base_revision=saved.base_revision,
            top_k=saved.top_k,
            batch_size=batch_size,
        )
        retriever.card_data, retriever.plot = saved.card_data, saved.plot
        if index is None:
            retriever._index = saved.index
        return retriever

    def _state(self, include_index: bool) -> _saved.SavedRetriever:
        """What is saved of it."""
        return _saved.SavedRetriever(
            encoder=self._encoder,
            support_encoder=self._support_encoder,
            support=self._support,
            index=self.index if include_index else None,
            index_kind=self.index_kind,
            index_options=self.index_options,
            base_model=self.base_model,
            base_revision=self.base_revision,
            strategy=self.strategy,
            weights=self.weights,
            teacher=self.teacher,
            top_k=self.top_k,
            card_data=self.card_data,
            plot=self.plot,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())


def _refuse_other_encoders(encoder: Any) -> None:
    from sentence_transformers import SentenceTransformer

    from ..encoders.joint import JointEncoder

    modules = list(encoder) if isinstance(encoder, SentenceTransformer) else []
    if len(modules) != 1 or not isinstance(modules[0], JointEncoder):
        got = f" of {', '.join(type(module).__name__ for module in modules)}" if modules else ""
        raise ValueError(
            f"expected a SentenceTransformer whose one module is a JointEncoder, got a {type(encoder).__name__}"
            f"{got}; make it with drum_hf.encoders.build_encoder, or give DemoRetriever.from_encoder a checkpoint"
        )


def _refuse_other_vectors(index: VectorIndex, support: TripletTable, width: int | None) -> None:
    if index.dimension != width:
        raise DimensionMismatchError(
            f"expected an index of dimension {width}, the encoder's, got {index.dimension}; make it anew"
        )
    if len(index) and set(index.ids) != set(support.ids):
        raise MissingIdError(
            f"expected an index that is empty or holds the {len(support)} ids of the support set, got one with "
            f"{len(index)} ids, some of them others; empty it, or give the support set that it was made of"
        )
