"""`JointEncoder`: a demonstration or query goes in as image, prompt and response; one unit vector comes out.

Each part is encoded on its own by a CLIP or SigLIP model, so that the dot product of two vectors is the weighted mean
of the parts' cosines. The paper describes the embedding as joint without giving its equation: this one is our choice.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from PIL.Image import new as new_image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from torch import nn

from ..errors import NonFiniteEmbeddingError
from ..utils.hub import commit_of
from ..utils.images import load_image
from ..utils.optional import bar_options, loading, local_name, resolve_name
from .adapters import ADAPTER_CONFIG, active_adapter, attach

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["PARTS", "JointEncoder", "build_encoder", "encode_items", "load_encoder"]

logger = logging.getLogger(__name__)

#: The parts of an item, in the order in which their vectors stand in the embedding.
PARTS = ("image", "prompt", "response")

_FAMILIES = ("clip", "siglip")
_KEYS = frozenset({"image", "text"})
_ARGUMENTS_OF_PARTS = ("model_kwargs", "processor_kwargs", "config_kwargs")  # sentence-transformers' names
# The towers' own attention only: the projection in SigLIP's pooling head is read as a bare weight, past any adapter.
_LORA_TARGETS = r".*encoder\.layers\..*\.(q_proj|k_proj|v_proj|out_proj)"
_CHUNK = 16  # batches held as decoded images at once while a table is encoded
_BAR_FROM = 8  # batches; fewer are over before a progress bar could be read


class _Item(NamedTuple):
    image: Image | None
    prompt: str | None
    response: str | None


class JointEncoder(Transformer):
    """A sentence-transformers module that embeds (image, prompt, response) with a CLIP or SigLIP model.

    An item is a text (a prompt), a PIL image, or `{"image": image, "text": [prompt, response]}`, in which a part that
    is None, blank or missing is absent. Each part's embedding is scaled to unit length and by the square root of its
    weight; the three are concatenated. An absent part leaves zeros, and its weight goes to the parts that are there,
    in proportion. So the vectors have unit length and, for two items that have all parts, the dot product is
    `sum(weight[part] * cosine[part])`. A part of weight 0 is left out: it costs nothing and is not looked at.

    Texts are cut to the length of the text tower (77 tokens for CLIP, 64 for SigLIP), with one warning in the log.

    Args:
        model_name_or_path: a CLIP or SigLIP checkpoint on the Hub, or a folder.
        weights: of image, prompt and response, in this order or by name; not negative, scaled to sum to 1. Equal
            weights are our choice.
        learn_weights: train those weights that are not 0 along with the towers.
        **kwargs: as for `sentence_transformers.base.modules.Transformer`.

    Attributes:
        base_model: what the weights of the towers were loaded from: the name or folder as it was given; a name where
            it is the folder of a model that ships with the package.
        base_revision: the commit of `base_model`, where it came from the Hub.

    Raises:
        ValueError: another model family, or weights that are negative, not finite, or all zero.
    """

    model: Any
    config_keys: list[str] = [*Transformer.config_keys, "learn_weights"]  # noqa: RUF012  # as the base class has it

    def __init__(
        self,
        model_name_or_path: str,
        *,
        weights: Sequence[float] | Mapping[str, float] = (1 / 3, 1 / 3, 1 / 3),
        learn_weights: bool = False,
        **kwargs: Any,
    ) -> None:
        log_weights = _log_weights(weights)
        super().__init__(resolve_name(model_name_or_path), **{"unpad_inputs": False} | kwargs)
        family = self.config.model_type
        if family not in _FAMILIES or not (
            hasattr(self.processor, "image_processor") and hasattr(self.processor, "tokenizer")
        ):
            raise ValueError(
                f"expected a CLIP or SigLIP model with its image processor and tokenizer, got {model_name_or_path!r} "
                f"of type {family!r}; pass one such as 'openai/clip-vit-base-patch32' or "
                "'google/siglip-base-patch16-224'"
            )
        given = kwargs.get("model_kwargs") or {}
        revision = given.get("revision")
        self.base_model, self.base_revision = local_name(model_name_or_path), revision
        if adapters := getattr(self.model, "peft_config", None):
            adapter = next(iter(adapters.values()))
            self.base_model, self.base_revision = str(adapter.base_model_name_or_path), adapter.revision
        elif not os.path.isdir(resolve_name(model_name_or_path)):
            # Not from the configuration, in which transformers 5.2x no longer notes it.
            commit = commit_of(model_name_or_path, revision=revision, cache_dir=given.get("cache_dir"))
            self.base_revision = commit or revision
        # SigLIP was trained on texts padded to full length, with the padding attended to and the last token read.
        self._whole_length = family == "siglip"
        text = self.config.text_config
        tokenizer = self.processor.tokenizer
        tokenizer.model_max_length = min(tokenizer.model_max_length, text.max_position_embeddings)
        self._width = int(self.config.projection_dim if family == "clip" else text.projection_size)
        self._warned_of_cut = False
        # Of no use here: only the contrastive loss of pretraining reads them.
        for name in ("logit_scale", "logit_bias"):
            if (parameter := getattr(self.model, name, None)) is not None:
                parameter.requires_grad_(False)
        self._used = tuple(math.isfinite(value) for value in log_weights)
        # Finite where a part is left out, too: an optimizer's step on -inf may give NaN.
        values = [value if used else 0.0 for value, used in zip(log_weights, self._used, strict=True)]
        self.log_weights = nn.Parameter(torch.tensor(values, dtype=torch.float32), requires_grad=learn_weights)

    # The weights

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each part, by name; they sum to 1."""
        with torch.no_grad():
            values = self._log_shares(self._has_weight(self.log_weights.device)[None])[0]
            return dict(zip(PARTS, values.double().exp().tolist(), strict=True))

    @weights.setter
    def weights(self, weights: Sequence[float] | Mapping[str, float]) -> None:
        self._set_log_weights(_log_weights(weights))

    @property
    def learn_weights(self) -> bool:
        """Whether the weights are trained; may be set."""
        return self.log_weights.requires_grad

    @learn_weights.setter
    def learn_weights(self, learn: bool) -> None:
        self.log_weights.requires_grad_(bool(learn))

    @property
    def log_weight_list(self) -> list[float]:
        """Logs of the weights as they are, -inf for a part that is left out; may be set, and then exactly so."""
        values = self.log_weights.detach().float().tolist()
        return [value if used else -math.inf for value, used in zip(values, self._used, strict=True)]

    @log_weight_list.setter
    def log_weight_list(self, values: Sequence[float]) -> None:
        self._set_log_weights(values)

    def _set_log_weights(self, values: Sequence[float]) -> None:
        self._used = tuple(math.isfinite(value) for value in values)
        with torch.no_grad():
            self.log_weights.copy_(torch.tensor([value if math.isfinite(value) else 0.0 for value in values]))

    def _has_weight(self, device: torch.device | None = None) -> torch.Tensor:
        return torch.tensor(self._used, device=device)

    def _log_shares(self, present: torch.Tensor) -> torch.Tensor:
        """Log of the share in its row of each part that is present and has weight: (B, 3) float32, -inf elsewhere."""
        return self.log_weights.float().where(present, -math.inf).log_softmax(dim=1)

    # What sentence-transformers asks of a module

    @property
    def modalities(self) -> list[Any]:
        """What an item may be. "message" is what sentence-transformers calls a batch of unlike items."""
        return ["text", "image", ("image", "text"), "message"]

    def get_embedding_dimension(self) -> int:
        """Width of the embedding: three times the projection of the towers."""
        return len(PARTS) * self._width

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, processing_kwargs: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Turn items into tensors whose first axis is the batch and whose other axes never vary.

        Args:
            inputs: B items.
            prompt: a text put before each item's prompt.
            processing_kwargs: left aside.
            **kwargs: `max_length` cuts texts to so many tokens, where the tower takes more; others are left aside.

        Returns:
            `present` (B, 3) bool; `pixel_values` (B, 3, H, W) float32, zeros where there is no image; `input_ids` and
            `text_mask` (B, 2, L) int64, prompt before response. Tensors of parts without weight are left out.

        Raises:
            ValueError: an item of another form, or one without any part that has weight.
        """
        items = [_parse(item, row) for row, item in enumerate(inputs)]
        if prompt:
            items = [item._replace(prompt=prompt + item.prompt if item.prompt else None) for item in items]
        present = torch.tensor([[part is not None for part in item] for item in items], dtype=torch.bool)
        usable = present & self._has_weight()
        if not bool(usable.any(dim=1).all()):
            row = int((~usable.any(dim=1)).nonzero()[0])
            used = [part for part, weight in self.weights.items() if weight]
            has = [part for part, there in zip(PARTS, present[row].tolist(), strict=True) if there]
            raise ValueError(
                f"expected items with at least one of {', '.join(used)}, the parts that have weight; item {row} of "
                f"the batch has {', '.join(has) or 'none'}. Fill the part in, leave the item out, or set `.weights`"
            )
        features = {"present": usable}
        if self._used[0]:
            features["pixel_values"] = self._pixels([item.image for item in items])
        if self._used[1] or self._used[2]:
            texts = []
            for item in items:
                texts += [item.prompt if self._used[1] else None, item.response if self._used[2] else None]
            features |= self._tokens(texts, kwargs.get("max_length"))
        return features

    def _pixels(self, images: list[Image | None]) -> torch.Tensor:
        rows = [row for row, image in enumerate(images) if image is not None]
        if rows:
            shown = [load_image(image) for image in images if image is not None]
            # Said outright: a picture of 1 or 3 pixels' height would be taken for channels.
            values = self.processor.image_processor(shown, return_tensors="pt", input_data_format="channels_last")
            return _spread(values["pixel_values"], torch.tensor(rows), len(images))
        size = self.config.vision_config.image_size
        return torch.zeros(len(images), self.config.vision_config.num_channels, size, size)

    def _tokens(self, texts: list[str | None], max_length: int | None) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        longest = tokenizer.model_max_length
        limit = min(max_length or longest, longest)
        ids = torch.full((len(texts), longest), tokenizer.pad_token_id or 0, dtype=torch.long)
        mask = torch.zeros_like(ids)
        given = [text for text in texts if text is not None]
        if given:
            tokens = tokenizer(
                given,
                padding="longest",
                truncation=True,
                max_length=limit,
                padding_side="right",
                return_attention_mask=True,
                return_tensors="pt",
            )
            width = tokens["input_ids"].shape[1]
            there = [text is not None for text in texts]
            rows = slice(None) if all(there) else there
            ids[rows, :width], mask[rows, :width] = tokens["input_ids"], tokens["attention_mask"]
            if width == limit and not self._warned_of_cut:
                self._warn_of_cut(given, tokens["attention_mask"].sum(dim=1) == limit, limit)
        return {
            "input_ids": ids.view(-1, 2, longest),
            # not "attention_mask": sentence-transformers' model card counts tokens by that, and takes it for (B, L)
            "text_mask": mask.view(-1, 2, longest),
        }

    def _warn_of_cut(self, texts: list[str], full: torch.Tensor, limit: int) -> None:
        for row in full.nonzero()[:, 0].tolist():
            length = len(self.processor.tokenizer(texts[row], verbose=False)["input_ids"])
            if length > limit:
                self._warned_of_cut = True
                logger.warning(
                    "A text of %d tokens was cut to the %d that the text tower takes, and others may be (this is "
                    "said once): %.60r…",
                    length,
                    limit,
                    texts[row],
                )
                return

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Embed what `preprocess` made: adds `sentence_embedding`, (B, 3 * projection) float32 of unit length.

        Where `features` holds `image_key`, (B,) int64, rows of equal key are taken to show the same image, which is
        then encoded once.
        """
        present = features["present"] & self._has_weight(features["present"].device)
        images = self._rows(self._encode_images, features, present[:, :1])
        texts = self._rows(self._encode_texts, features, present[:, 1:])
        units = F.normalize(torch.cat([images, texts], dim=1), dim=2)
        shares = self._log_shares(present).mul(0.5).exp()  # in logs: the slope of a square root at 0 is infinite
        features["sentence_embedding"] = (units * shares[:, :, None]).flatten(1)  # of unit length, as squares sum to 1
        return features

    def _rows(
        self, encode: Callable[..., torch.Tensor], features: dict[str, Any], there: torch.Tensor
    ) -> torch.Tensor:
        """What a tower makes of the parts that are there (B, K): (B, K, projection) float32, zeros for the others."""
        places = there.flatten().nonzero()[:, 0]
        if len(places):
            pooled = _spread(encode(features, places).float(), places, there.numel())
        else:
            pooled = torch.zeros(there.numel(), self._width, device=there.device)
        return pooled.view(*there.shape, self._width)

    def _encode_images(self, features: dict[str, Any], places: torch.Tensor) -> torch.Tensor:
        keys = features.get("image_key")
        if keys is not None:
            first, which = _distinct(keys[places])
            places = places[first]
        pixels = _taken(features["pixel_values"], places).to(self.model.dtype)
        pooled = self.model.get_image_features(pixel_values=pixels).pooler_output
        return pooled if keys is None else pooled[which]

    def _encode_texts(self, features: dict[str, Any], places: torch.Tensor) -> torch.Tensor:
        ids, mask = (_taken(features[name].flatten(0, 1), places) for name in ("input_ids", "text_mask"))
        if self._whole_length:
            return self.model.get_text_features(input_ids=ids).pooler_output
        width = int(mask.sum(dim=1).max())
        return self.model.get_text_features(input_ids=ids[:, :width], attention_mask=mask[:, :width]).pooler_output

    # Files

    def get_config_dict(self) -> dict[str, Any]:
        """The module's configuration; `log_weights` is null for a part that is left out."""
        kept = [value if math.isfinite(value) else None for value in self.log_weight_list]  # a float32, exactly
        return super().get_config_dict() | {"log_weights": kept}

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write the model (with LoRA: the adapter alone), processor, configuration and weights of the parts.

        An adapter's configuration names the base model as it was given to us, and its commit.
        """
        adapters = getattr(self.model, "peft_config", None) or {}
        names = {name: config.base_model_name_or_path for name, config in adapters.items()}
        try:
            # Given a name that is no folder, peft asks the Hub for its configuration, only to compare vocabularies.
            for config in adapters.values():
                config.base_model_name_or_path = ""
            super().save(output_path, *args, safe_serialization=safe_serialization, **kwargs)
        finally:
            for name, config in adapters.items():
                config.base_model_name_or_path = names[name]
        adapter = Path(output_path) / ADAPTER_CONFIG
        if self.has_adapter and adapter.is_file():
            config = json.loads(adapter.read_text(encoding="utf-8"))
            config |= {"base_model_name_or_path": self.base_model, "revision": self.base_revision}
            adapter.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        *args: Any,
        subfolder: str = "",
        weights: Sequence[float] | Mapping[str, float] | None = None,
        learn_weights: bool | None = None,
        base_model: str | os.PathLike[str] | None = None,
        base_revision: str | None = None,
        **kwargs: Any,
    ) -> JointEncoder:
        """Load what `save` wrote, or any CLIP or SigLIP checkpoint; see `from_pretrained`.

        Args:
            subfolder: where in the folder or repository it lies, as sentence-transformers says it of a module.
        """
        model_name_or_path = resolve_name(model_name_or_path)
        if subfolder:
            names = ("token", "cache_folder", "revision", "local_files_only")
            hub = {name: kwargs[name] for name in names if name in kwargs}
            folder = cls.load_dir_path(model_name_or_path, subfolder=subfolder, **hub)
            if folder is None:
                raise OSError(f"{model_name_or_path!r} has no folder {subfolder!r}; it is not a saved encoder")
            kwargs["revision"] = None  # of the repository, not of the base model that an adapter names
            model_name_or_path = folder
        adapter_file = Path(model_name_or_path) / ADAPTER_CONFIG
        if adapter_file.is_file():  # not left to transformers, which knows no base model but the one noted
            noted = json.loads(adapter_file.read_text(encoding="utf-8"))
            if base_model in (None, noted["base_model_name_or_path"]):
                base_model, base_revision = noted["base_model_name_or_path"], base_revision or noted.get("revision")
            config = cls.load_config(model_name_or_path)
            learn = config.get("learn_weights") if learn_weights is None else learn_weights
            kwargs["revision"] = base_revision
            module = cls.load(os.fspath(base_model), *args, weights=weights, learn_weights=learn, **kwargs)
            attach(module.model, model_name_or_path, "default")
            for adapter in module.model.peft_config.values():  # peft looks there when it saves; `save` notes the name
                adapter.base_model_name_or_path = resolve_name(base_model)
            if weights is None and "log_weights" in config:
                module._set_log_weights([-math.inf if value is None else value for value in config["log_weights"]])
            module.eval()  # the adapter's layers are new
            return module
        init_defaults = kwargs.pop("init_defaults", None) or {}
        init = init_defaults | cls._load_init_kwargs(model_name_or_path, *args, **kwargs)
        saved = init.pop("log_weights", None)
        if learn_weights is not None:
            init["learn_weights"] = learn_weights
        if weights is not None:
            init["weights"] = weights
        elif saved is not None:
            # The ranges are checked with the rest; the exact values are put in afterwards.
            init["weights"] = [0.0 if value is None else math.exp(value) for value in saved]
        module = cls(model_name_or_path, **init)
        if weights is None and saved is not None:
            module._set_log_weights([-math.inf if value is None else value for value in saved])
        return module

    @classmethod
    def load_config(cls, model_name_or_path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The saved configuration; {} for a checkpoint that this class did not save."""
        config = super().load_config(model_name_or_path, *args, **kwargs)
        # For other checkpoints the modalities of a text model would be filled in; they are inferred instead.
        return config if "log_weights" in config else {}

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        weights: Sequence[float] | Mapping[str, float] | None = None,
        learn_weights: bool | None = None,
        base_model: str | os.PathLike[str] | None = None,
        base_revision: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        trust_remote_code: bool = False,
    ) -> JointEncoder:
        """Load a CLIP or SigLIP checkpoint, or what `save` wrote.

        A saved adapter is put on the very commit of the base model that it was trained on, and can be trained further.

        Args:
            name_or_path: on the Hub, or a folder; "playground/clip" is the one that ships with the package.
            weights: of image, prompt and response. None: those that were saved, else equal ones.
            learn_weights: train them. None: as saved, else not.
            base_model, base_revision: where the base model of the adapter in the folder lies on this machine, or its
                name and commit on the Hub. None: as noted beside the adapter.
            revision: branch, tag or commit on the Hub.
            token, cache_dir, local_files_only, force_download, trust_remote_code: as everywhere in transformers.

        Raises:
            ValueError: another model family, or weights that can't be used.
        """
        anew: dict[str, Any] = (
            {name: {"force_download": True} for name in _ARGUMENTS_OF_PARTS} if force_download else {}
        )
        return cls.load(
            os.fspath(name_or_path),
            weights=weights,
            learn_weights=learn_weights,
            base_model=base_model,
            base_revision=base_revision,
            revision=revision,
            token=token,
            cache_folder=None if cache_dir is None else os.fspath(cache_dir),
            local_files_only=local_files_only,
            trust_remote_code=trust_remote_code,
            **anew,
        )

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter such as LoRA is in use, so that `save` writes the adapter alone."""
        return active_adapter(self) is not None

    def __repr__(self) -> str:
        weights = ", ".join(f"{part}={weight:.3g}" for part, weight in self.weights.items())
        model = type(self.model).__name__ + (" with adapter" if self.has_adapter else "")
        return f"JointEncoder({model}, dimension={self.get_embedding_dimension()}, {weights})"


def build_encoder(
    name_or_path: str | os.PathLike[str],
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    learn_weights: bool | None = None,
    lora: bool | LoraConfig = False,
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
            and output projections of both towers' attention (our choice); or a `peft.LoraConfig`.
        device: "cuda", "cpu", … None: the fastest there is.
        revision, token, cache_dir, local_files_only, force_download, trust_remote_code: as everywhere in transformers.

    Raises:
        ModelError: there is no such model.
        ValueError: another model family, or weights that can't be used.
    """
    with loading("a CLIP or SigLIP", name_or_path):
        module = JointEncoder.from_pretrained(
            name_or_path,
            weights=weights,
            learn_weights=learn_weights,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            trust_remote_code=trust_remote_code,
        )
    encoder = SentenceTransformer(modules=[module], device=device, similarity_fn_name="dot")
    if lora:
        encoder.add_adapter(_lora_config() if lora is True else lora)
    return encoder


def load_encoder(
    directory: str | os.PathLike[str],
    *,
    base_model: str | os.PathLike[str] | None = None,
    base_revision: str | None = None,
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
        device: "cuda", "cpu", … None: the fastest there is.
        token, cache_dir, local_files_only, force_download, trust_remote_code: for the base model, as everywhere in
            transformers.

    Raises:
        Exception: nearly anything that transformers raises of files that are no model, or that don't fit one another:
            a blank picture and two texts are embedded to find that out.
    """
    module = JointEncoder.from_pretrained(
        directory,
        base_model=base_model,
        base_revision=base_revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        force_download=force_download,
        trust_remote_code=trust_remote_code,
    )
    encoder = SentenceTransformer(modules=[module], device=device, similarity_fn_name="dot")
    encoder.eval()
    encoder.encode([{"image": new_image("RGB", (8, 8)), "text": ["a", "b"]}], show_progress_bar=False)
    return encoder


def encode_items(
    encoder: SentenceTransformer,
    items: Iterable[Any],
    *,
    batch_size: int = 64,
    show_progress: bool | None = None,
) -> np.ndarray:
    """Embed items; they are drawn a few batches at a time, so that a large table's images are never all in memory.

    Args:
        encoder: what `build_encoder` made.
        items: as `JointEncoder` takes them; any iterable.
        batch_size: items that pass through the towers at once.
        show_progress: a progress bar. None: from 8 batches on, where the number of items is known.

    Returns:
        float32 array of shape (number of items, dimension), rows of unit length in the order of `items`.

    Raises:
        NonFiniteEmbeddingError: NaN or infinity; names the first items by position.
        ValueError: an item of another form, or one without any part that has weight.
    """
    from tqdm.auto import tqdm

    if batch_size < 1:
        raise ValueError(f"batch_size is at least 1, got {batch_size}")
    total = len(items) if isinstance(items, Sized) else None
    shown = show_progress if show_progress is not None else bool(total and total > _BAR_FROM * batch_size)
    training = encoder.training
    done: list[np.ndarray] = []
    count = 0
    try:
        with tqdm(total=total, desc="encoding", unit="item", **bar_options(shown)) as bar:
            for chunk in _chunks(items, _CHUNK * batch_size):
                vectors = encoder.encode(chunk, batch_size=batch_size, show_progress_bar=False)
                vectors = np.asarray(vectors, dtype=np.float32)
                bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
                if len(bad):
                    raise NonFiniteEmbeddingError(
                        f"expected finite embeddings, but {len(bad)} hold NaN or infinity, the first those of items "
                        f"{', '.join(str(count + i) for i in bad[:4].tolist())}; check their images, and try float32 "
                        "or a lower learning rate"
                    )
                done.append(vectors)
                count += len(chunk)
                bar.update(len(chunk))
    finally:
        if training:
            encoder.train()  # `encode` leaves the model in evaluation mode
    return np.concatenate(done) if done else np.zeros((0, encoder.get_embedding_dimension() or 0), np.float32)


def _parse(item: Any, row: int) -> _Item:
    """An item's parts, None where absent."""
    image: Any = None
    text: Any = None
    if isinstance(item, str):
        text = item
    elif isinstance(item, Image):
        image = item
    elif isinstance(item, Mapping) and item.keys() <= _KEYS:
        image, text = item.get("image"), item.get("text")
    else:
        got = f"a dict with {', '.join(map(repr, item))}" if isinstance(item, Mapping) else type(item).__name__
        raise ValueError(f"item {row}: expected {_EXPECTED}, got {got}")
    texts = [text] if text is None or isinstance(text, str) else text
    if not isinstance(texts, (list, tuple)) or len(texts) > 2 or any(not isinstance(t, str | None) for t in texts):
        raise ValueError(f"item {row}: expected {_EXPECTED}, got 'text' = {text!r:.80}")
    if image is not None and not isinstance(image, Image):
        raise ValueError(f"item {row}: expected {_EXPECTED}, got 'image' of type {type(image).__name__}")
    prompt, response = (t if t is not None and t.strip() else None for t in (*texts, None, None)[:2])
    return _Item(image, prompt, response)


_EXPECTED = "a text, a PIL image, or {'image': PIL image or None, 'text': [prompt, response]}"


def _taken(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The rows at these places, in order; no copy where that is all of them."""
    return rows if len(places) == len(rows) else rows[places]


def _spread(values: torch.Tensor, places: torch.Tensor, size: int) -> torch.Tensor:
    """`size` rows: the values at these places, in order, and zeros elsewhere; no copy where that is all of them."""
    if len(places) == size:
        return values
    return values.new_zeros(size, *values.shape[1:]).index_put((places,), values)


def _distinct(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each distinct key stands first, in order, and which of these every key is."""
    _, which = keys.unique(return_inverse=True)
    places = torch.arange(len(keys), device=keys.device)
    first = places.new_full((int(which.max()) + 1,), len(keys)).scatter_reduce(0, which, places, "amin")
    order = first.argsort()
    return first[order], order.argsort()[which]


def _log_weights(weights: Sequence[float] | Mapping[str, float]) -> list[float]:
    """Log of the weights, scaled to sum to 1; -inf for 0."""
    if isinstance(weights, Mapping):
        if unknown := [part for part in weights if part not in PARTS]:
            raise ValueError(f"weights are of {', '.join(PARTS)}, got one of {unknown[0]!r}")
        weights = [weights.get(part, 0.0) for part in PARTS]
    values = [float(weight) for weight in weights]
    if len(values) != len(PARTS) or not all(0 <= value < math.inf for value in values) or not any(values):
        raise ValueError(
            f"weights are three numbers for {', '.join(PARTS)}, finite, not negative and not all 0, got {weights!r}"
        )
    total = sum(values)
    return [math.log(value / total) if value else -math.inf for value in values]


def _lora_config() -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules=_LORA_TARGETS)


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
