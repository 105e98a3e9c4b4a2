"""Public data sets by name: where their rows are, and what each column is for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..types import Task

#: SEED-Bench's question types over single images.
SEED_TYPES = {
    1: "scene",
    2: "instance identity",
    3: "instance attribute",
    4: "instance location",
    5: "instance counting",
    6: "spatial relation",
    7: "instance interaction",
    8: "visual reasoning",
}


@dataclasses.dataclass(frozen=True)
class SourcePart:
    """One side of a data set, support or query: a split of a repository and the use of its columns.

    Attributes:
        repo: id on the Hub.
        split: name of the split.
        columns: name -> kind of every column known, of `drum_hf.data.sources.COLUMN_KINDS`.
        answers: column of the gold answers, captions, class or letter.
        question: column of the question; None where every row is asked the same.
        id: column of the ids; None where a row is called "<split>-<number in the split>".
        id_prefix: stands before each id, where the other side's ids could be the same.
        group: column that rows of one image share; None where it is the picture itself that tells them.
        response: column of the answer that a demonstration shows; None where it is the most frequent answer, or the
            first caption.
        image: column of the image, or of a list of one.
        choices: columns of a multiple choice's options, in the order of their letters.
        file_split: the split as its files are called, where `split_column` holds the real one.
        split_column: column with the name of each row's split.
        prefix: (column, beginning): only rows whose text begins so are used.
        among: (column, values): only rows with one of these are used.
        share: [from, to) of the pictures, by a hash between 0 and 1: one split cut in two, by picture.
        merge: rows of one group become one, with all their answers.
        files: the split's files in the repository.
        revision: branch or commit where it is not the main one.
        rows: number of rows of those files, where known.
        size: their bytes, where known.
        open_ended: the repository holds further columns that are of no use here.
    """

    repo: str
    split: str
    columns: Mapping[str, str]
    answers: str
    question: str | None = None
    id: str | None = None
    id_prefix: str = ""
    group: str | None = None
    response: str | None = None
    image: str = "image"
    choices: tuple[str, ...] = ()
    file_split: str | None = None
    split_column: str | None = None
    prefix: tuple[str, str] | None = None
    among: tuple[str, tuple[Any, ...]] | None = None
    share: tuple[float, float] = (0.0, 1.0)
    merge: bool = False
    files: str = "data/{split}-*.parquet"
    revision: str | None = None
    rows: int | None = None
    size: int | None = None
    open_ended: bool = False

    @property
    def stored_split(self) -> str:
        """The split as the files are called."""
        return self.file_split or self.split

    @property
    def needed(self) -> frozenset[str]:
        """The columns that are read."""
        single = (self.answers, self.question, self.id, self.group, self.response, self.image, self.split_column)
        filters = [pair[0] for pair in (self.prefix, self.among) if pair]
        return frozenset(name for name in (*single, *self.choices, *filters) if name)

    @property
    def download(self) -> dict[str, Any]:
        """What reading it from the Hub would fetch; JSON-ready. `rows` and `bytes` are None where not known."""
        files = self.files.format(split=self.stored_split)
        return {"repo": self.repo, "revision": self.revision, "files": files, "rows": self.rows, "bytes": self.size}


@dataclasses.dataclass(frozen=True)
class Source:
    """A public data set.

    Attributes:
        name: as `load_triplets` takes it.
        title: as papers write it.
        task: vqa, classification or captioning.
        metric: the measure that papers report, a name of `drum_hf.evaluation.metrics.METRICS`.
        prompt: what is asked; "{question}" stands for the row's own question. Ours where it is none (our choice).
        licence: of the annotations, as their authors give it, and a word about the images.
        support: where demonstrations come from.
        query: where queries come from.
    """

    name: str
    title: str
    task: Task
    metric: str
    prompt: str
    licence: str
    support: SourcePart
    query: SourcePart

    def part(self, split: str) -> SourcePart:
        """The side called "support" or "query", or a split by its own name.

        A name that is neither side's is taken for another split of the query side's repository, such as "test".
        """
        if split in ("support", "query"):
            return self.support if split == "support" else self.query
        for part in (self.query, self.support):
            if split == part.split and part.share == (0.0, 1.0):
                return part
        return dataclasses.replace(self.query, split=split, share=(0.0, 1.0), rows=None, size=None)


def _vqa(name: str, title: str, licence: str, support: SourcePart, query: SourcePart) -> Source:
    return Source(name, title, "vqa", "vqa_accuracy", "{question}", licence, support, query)


def _classes(
    name: str,
    title: str,
    prompt: str,
    licence: str,
    support: SourcePart,
    query_split: str,
    rows: int,
    size: int | None,
) -> Source:
    query = dataclasses.replace(support, split=query_split, rows=rows, size=size)
    return Source(name, title, "classification", "top1", prompt, licence, support, query)


def _captions(name: str, title: str, licence: str, support: SourcePart, query: SourcePart) -> Source:
    return Source(name, title, "captioning", "cider_d", _DESCRIBE, licence, support, query)


_DESCRIBE = "Describe the image in one sentence."
_FLICKR_IMAGES = "images under their Flickr owners' terms"

_VQAV2_QUERY = SourcePart(
    "lmms-lab/VQAv2",
    "validation",
    {
        "question_type": "text",
        "multiple_choice_answer": "text",
        "answers": "answers",
        "image_id": "number",
        "answer_type": "text",
        "question_id": "number",
        "question": "text",
        "image": "image",
    },
    answers="answers",
    question="question",
    id="question_id",
    group="image_id",
    response="multiple_choice_answer",
    rows=214_354,
)
# The lmms-lab mirrors serve evaluation: what they lack of training splits stands in other repositories, with further
# columns (tags and captions by models) that nothing here reads.
_COCO_TRAIN_COLUMNS = {
    "image": "image",
    "question": "text",
    "question_id": "key",
    "id_image": "key",
    "answers": "texts",
}
_VQAV2_SUPPORT = SourcePart(
    "Multimodal-Fatima/VQAv2_train",
    "train",
    {**_COCO_TRAIN_COLUMNS, "multiple_choice_answer": "text"},
    answers="answers",
    question="question",
    id="question_id",
    group="id_image",
    response="multiple_choice_answer",
    rows=443_757,
    open_ended=True,
)
_OKVQA_SUPPORT = SourcePart(
    "Multimodal-Fatima/OK-VQA_train",
    "train",
    _COCO_TRAIN_COLUMNS,
    answers="answers",
    question="question",
    id="question_id",
    group="id_image",
    rows=9_009,
    size=1_572_000_000,
    open_ended=True,
)
_OKVQA_QUERY = SourcePart(
    "lmms-lab/OK-VQA",
    "val2014",
    {
        "question_id": "text",
        "image": "image",
        "question": "text",
        "answers": "texts",
        "question_type": "text",
        "answer_type": "text",
    },
    answers="answers",
    question="question",
    id="question_id",
    rows=5_046,
    size=831_514_064,
)
_VIZWIZ_SUPPORT = SourcePart(
    "Multimodal-Fatima/VizWiz_train",
    "train",
    {"image": "image", "question": "text", "answers": "texts", "filename": "text"},
    answers="answers",
    question="question",
    id="filename",
    rows=20_523,
    open_ended=True,
)
_VIZWIZ_QUERY = SourcePart(
    "lmms-lab/VizWiz-VQA",
    "val",
    {"question_id": "text", "image": "image", "question": "text", "answers": "texts", "category": "text"},
    answers="answers",
    question="question",
    id="question_id",
    rows=4_319,
    size=2_100_000_000,
)
_TEXTVQA_SUPPORT = SourcePart(
    "lmms-lab/textvqa",
    "train",
    {
        "image_id": "text",
        "question_id": "number",
        "question": "text",
        "image": "image",
        "answers": "texts",
        "ocr_tokens": "texts",
    },
    answers="answers",
    question="question",
    id="question_id",
    group="image_id",
    rows=34_602,
    open_ended=True,
)
_LABELLED = {"image": "image", "label": "class"}
_FLICKR_SUPPORT = SourcePart(
    # This repository's own files are a script and an archive; the Hub's conversion of them is parquet.
    "nlphuji/flickr30k",
    "train",
    {
        "image": "image",
        "caption": "texts",
        "sentids": "texts",
        "split": "text",
        "img_id": "text",
        "filename": "text",
    },
    answers="caption",
    id="img_id",
    file_split="test",
    split_column="split",
    files="TEST/test/*.parquet",
    revision="refs/convert/parquet",
    rows=31_014,
    size=4_306_000_000,
)
_COCO_TRAIN = SourcePart(
    # One row a caption, over Karpathy's splits: its "train" holds 30 thousand images of val2014.
    "jxie/coco_captions",
    "train",
    {"image": "image", "filename": "text", "cocoid": "number", "caption": "text"},
    answers="caption",
    id="cocoid",
    group="cocoid",
    merge=True,
    rows=566_747,
)
_SEED = SourcePart(
    "lmms-lab/SEED-Bench-2",
    "test",
    {
        "question_id": "text",
        "question": "text",
        "choice_a": "text",
        "choice_b": "text",
        "choice_c": "text",
        "choice_d": "text",
        "answer": "text",
        "question_type_id": "number",
        "image": "images",
    },
    answers="answer",
    question="question",
    id="question_id",
    choices=("choice_a", "choice_b", "choice_c", "choice_d"),
    among=("question_type_id", tuple(SEED_TYPES)),
    rows=24_371,
    size=38_037_968_494,
    open_ended=True,
)

_ALL = (
    _vqa("vqav2", "VQAv2", f"CC BY 4.0; COCO's {_FLICKR_IMAGES}", _VQAV2_SUPPORT, _VQAV2_QUERY),
    _vqa("okvqa", "OK-VQA", f"CC BY 4.0; COCO's {_FLICKR_IMAGES}", _OKVQA_SUPPORT, _OKVQA_QUERY),
    _vqa("vizwiz", "VizWiz", "CC BY 4.0", _VIZWIZ_SUPPORT, _VIZWIZ_QUERY),
    _vqa(
        "textvqa",
        "TextVQA",
        "CC BY 4.0; images of Open Images, CC BY 2.0",
        _TEXTVQA_SUPPORT,
        dataclasses.replace(_TEXTVQA_SUPPORT, split="validation", rows=5_000),
    ),
    _classes(
        "flowers102",
        "Flowers-102",
        "What kind of flower is this?",
        "none stated by its authors; for research",
        SourcePart(
            "dpdl-benchmark/oxford_flowers102", "train", _LABELLED, answers="label", rows=1_020, size=418_000_000
        ),
        "test",
        6_149,
        2_521_000_000,
    ),
    _classes(
        "food101",
        "Food-101",
        "What dish is this?",
        f"none stated by its authors; {_FLICKR_IMAGES.replace('Flickr', 'Foodspotting')}",
        SourcePart("ethz/food101", "train", _LABELLED, answers="label", rows=75_750),
        "validation",
        25_250,
        None,
    ),
    _classes(
        "cub200",
        "CUB-200-2011",
        "What kind of bird is this?",
        "none stated by its authors; for non-commercial research and education",
        SourcePart(
            "bentrevett/caltech-ucsd-birds-200-2011",
            "train",
            _LABELLED,
            answers="label",
            rows=5_994,
            open_ended=True,
        ),
        "test",
        5_794,
        None,
    ),
    _captions(
        "coco",
        "COCO captions",
        f"CC BY 4.0; {_FLICKR_IMAGES}",
        dataclasses.replace(_COCO_TRAIN, prefix=("filename", "COCO_train2014_")),
        SourcePart(
            "lmms-lab/COCO-Caption",
            "val",
            {
                "question_id": "text",
                "image": "image",
                "question": "text",
                "answer": "texts",
                "id": "number",
                "file_name": "text",
            },
            answers="answer",
            id="question_id",
            rows=40_504,
            size=6_635_000_000,
            open_ended=True,
        ),
    ),
    _captions(
        "flickr30k",
        "Flickr30k",
        f"for non-commercial research and education; {_FLICKR_IMAGES}",
        _FLICKR_SUPPORT,
        dataclasses.replace(_FLICKR_SUPPORT, split="test"),
    ),
    _captions(
        "nocaps",
        "NoCaps",
        "CC BY 2.0; images of Open Images, CC BY 2.0",
        _COCO_TRAIN,  # NoCaps has no training images of its own: it asks what COCO's captions teach of new objects
        SourcePart(
            "lmms-lab/NoCaps",
            "validation",
            {"image": "image", "image_id": "number", "annotations_captions": "texts"},
            answers="annotations_captions",
            id="image_id",
            id_prefix="nocaps-",
            rows=4_500,
            size=1_419_828_832,
            open_ended=True,
        ),
    ),
    Source(
        "seedbench",
        "SEED-Bench-2 (types 1–8, one image)",
        "classification",
        "letter",
        "{question}",
        "CC BY-NC 4.0; images under their sources' terms",
        dataclasses.replace(_SEED, share=(0.0, 0.8)),
        dataclasses.replace(_SEED, share=(0.8, 1.0)),
    ),
)

#: Name -> data set.
SOURCES: Mapping[str, Source] = {source.name: source for source in _ALL}
