"""What users of such software reported about their files, pictures, labels and answers, each tried here.

The address above a test is where it was reported; the data are made here, and the expected value is what the reporter
needed. Reports whose kind has a test of its own elsewhere are tried all the same.
"""

from __future__ import annotations

import base64
import io
import json
import struct
import zipfile
import zlib

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps

from drum_hf.data import TripletTable, check_table, load_image, load_table
from drum_hf.encoders import build_encoder, encode_items
from drum_hf.errors import ColumnError, ImageError, RowError, SavedFileError
from drum_hf.evaluation.metrics import cider_d, exact_match, get_metric, letter_match, top1, vqa_accuracy
from drum_hf.types import image_key


def picture(seed: int = 0, size: tuple[int, int] = (7, 5)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> list[tuple[int, ...]]:
    return [tuple(p) for p in np.asarray(image).reshape(-1, 3).tolist()]


def only(table: TripletTable):
    (demonstration,) = list(table)
    return demonstration


def row(image, **more):
    return [{"image": image, "prompt": "q", "response": "r"} | more]


@pytest.fixture(scope="module")
def clip():
    return build_encoder("playground/clip", device="cpu")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    made = tmp_path / "data"
    made.mkdir()
    return made


# Pictures


# https://github.com/python-pillow/Pillow/issues/1108, https://github.com/python-pillow/Pillow/issues/3011
# https://github.com/unslothai/unsloth/pull/10094: TIFFs open as "I;16B", which point() refuses
@pytest.mark.parametrize("order", ["<u2", ">u2"])
@pytest.mark.parametrize("format", ["TIFF", "PNG", "PPM"])
def test_grey_of_16_bits_keeps_its_steps(format, order):
    ramp = np.linspace(0, 65535, 256).astype(order).reshape(16, 16)
    if format == "TIFF" and order == ">u2":
        mode = Image.frombytes("I;16B", (16, 16), ramp.tobytes())
        image = load_image(mode)
    else:
        image = load_image(encoded(Image.fromarray(ramp.astype("<u2")), format))
    levels = np.asarray(image)[..., 0].ravel()
    assert levels.tolist() == list(range(256))


# https://github.com/huggingface/datasets/issues/6252
# https://github.com/python-pillow/Pillow/issues/4537: PNG files note an orientation too
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_of_a_dataset_stand_upright(format):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture(size=(8, 4)), format, exif=exif)
    with Image.open(io.BytesIO(data)) as opened:
        upright = ImageOps.exif_transpose(opened).convert("RGB")
    made = datasets.Dataset.from_list(row({"bytes": data, "path": None})).cast_column("image", datasets.Image())
    table = TripletTable.from_dataset(made)
    assert only(table).image.size == (4, 8) and table.image_keys == [image_key(upright)]


# https://github.com/imageio/imageio/issues/475
def test_a_palette_with_transparency_in_bytes_is_laid_on_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    data = encoded(image, transparency=bytes([0, 128]))
    assert pixels(only(TripletTable.from_dataset(row(data))).image) == [(255, 255, 255), (147, 152, 157)]


# https://github.com/nothings/stb/issues/284
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_png_files_of_few_grey_levels(depth):
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    count = 2**depth
    bits = "".join(f"{value:0{depth}b}" for value in range(count)).ljust(8, "0")
    line = b"\0" + int(bits, 2).to_bytes(-(-len(bits) // 8), "big")
    header = struct.pack(">IIBBBBB", count, 1, depth, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(line)) + chunk(b"IEND", b"")
    grey = [round(value * 255 / (count - 1)) for value in range(count)]
    assert pixels(load_image(data)) == [(value,) * 3 for value in grey]


# https://github.com/modelscope/ms-swift/issues/10095: one CMYK picture, and the whole table is gone
def test_cmyk_pictures_in_base64(folder):
    data = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    pd.DataFrame(row(base64.b64encode(data).decode())).to_csv(folder / "t.tsv", sep="\t", index=False)
    red, green, blue = only(load_table(folder)).image.getpixel((4, 4))
    assert red > 200 and green < 60 and blue < 60


# https://github.com/hardikvasa/google-images-download/issues/275, https://github.com/kitsunebishi/Wallpapers/issues/8
@pytest.mark.parametrize(("name", "format"), [("a.jpg", "WEBP"), ("a.png", "JPEG"), ("a.jpeg", "PNG")])
def test_pictures_with_another_formats_name(name, format, folder):
    (folder / "cat").mkdir()
    data = encoded(picture(), format)
    (folder / "cat" / name).write_bytes(data)
    with Image.open(io.BytesIO(data)) as plain:
        assert load_table(folder).image_keys == [image_key(plain.convert("RGB"))]


# https://github.com/python-pillow/Pillow/issues/4163, https://github.com/gradio-app/gradio/issues/7482
# https://github.com/edenai/edenai-apis/pull/183: the file is called .jpg
@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"hevc"])
def test_photos_of_an_iphone_are_named_as_what_they_are(brand):
    data = struct.pack(">I", 24) + b"ftyp" + brand + bytes(4) + b"mif1heic" + bytes(64)
    with pytest.raises(ImageError, match="HEIC"):
        TripletTable.from_dataset(row(data))


# https://github.com/njurgens/digital-frame/issues/55: left out without a word
def test_class_folders_tell_of_photos_that_can_not_be_read(folder):
    (folder / "cat").mkdir()
    picture().save(folder / "cat" / "a.png")
    (folder / "cat" / "IMG_1.HEIC").write_bytes(b"x")
    report = check_table(folder)
    assert report.rows == 1 and any("IMG_1.HEIC" in note for note in report.notes)


# https://github.com/pytorch/vision/issues/138, https://github.com/huggingface/sentence-transformers/issues/1924
@pytest.mark.parametrize("cut", [0.5, 0.1, 0.01])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP"])
def test_cut_off_pictures_are_named_and_can_be_left_out(format, cut, folder):
    data = encoded(picture(size=(64, 64)), format)
    (folder / "good").write_bytes(data)
    (folder / "bad").write_bytes(data[: int(len(data) * cut)])
    (folder / "t.csv").write_text("image,caption\ngood,a\nbad,b\n")
    with pytest.raises(ImageError, match=r"row 1.*bad"):
        load_table(folder)
    table = load_table(folder, on_bad_rows="skip")
    assert table.responses == ["a"] and [number for number, _ in table.skipped] == [1]


# https://github.com/gradio-app/gradio/issues/7636, https://github.com/Oslandia/deeposlandia/pull/122
def test_an_uploaded_icon_is_not_a_black_square():
    icon = np.zeros((2, 2, 4), dtype=np.uint8)
    icon[0, 0] = (255, 0, 0, 255)
    white = (255, 255, 255)
    for given in (icon, Image.fromarray(icon), encoded(Image.fromarray(icon))):
        assert pixels(load_image(given)) == [(255, 0, 0), white, white, white]


# https://github.com/huggingface/sentence-transformers/pull/1188: pictures made from arrays
def test_a_picture_from_an_array_is_the_picture_from_its_file(folder):
    picture().save(folder / "a.png")
    array = np.array(Image.open(folder / "a.png"))
    made = [
        {"id": str(i), "image": given, "response": "r"}
        for i, given in enumerate((folder / "a.png", Image.open(folder / "a.png"), array, Image.fromarray(array)))
    ]
    assert len(set(TripletTable.from_dataset(made).image_keys)) == 1


# https://github.com/huggingface/transformers/pull/31950, https://github.com/huggingface/transformers/pull/31364
@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 1), (3, 1), (1, 3), (3, 3), (4, 1)])
def test_pictures_as_thin_as_a_line_are_encoded(size, clip):
    wide = picture(size=(8, 8)).resize(size)
    vectors = encode_items(clip, [{"image": wide, "text": ["q", None]}])
    assert np.isfinite(vectors).all()


# https://github.com/huggingface/sentence-transformers/issues/3210
# https://github.com/huggingface/sentence-transformers/issues/1269: CLIP reads 77 tokens
def test_prompts_longer_than_the_encoder_reads(clip):
    vectors = encode_items(clip, [{"image": None, "text": ["what is this " * 400, None]}])
    assert np.isfinite(vectors).all()


# https://github.com/huggingface/sentence-transformers/issues/3722: pictures and texts in one list
def test_rows_with_and_without_pictures_in_one_table(clip):
    from drum_hf import DemoRetriever

    rows = [
        {"id": "both", "image": picture(1), "prompt": "what is it?", "response": "a bus"},
        {"id": "text", "prompt": "what is it?", "response": "a bus"},
        {"id": "image", "image": picture(2), "prompt": "", "response": "a bus"},
    ]
    retriever = DemoRetriever.from_encoder(clip, TripletTable.from_dataset(rows), strategy="sit")
    assert set(retriever({"prompt": "what is it?"}, k=3).ids) == {"both", "text", "image"}
    assert set(retriever(picture(2), k=3).ids) == {"both", "text", "image"}


# https://github.com/microsoft/OmniParser/issues/128: a screenshot in base64 with transparency, or in grey
@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "1", "P", "I;16"])
def test_screenshots_in_base64(mode):
    image = picture().convert("L") if mode == "I;16" else picture()
    text = base64.b64encode(encoded(image.convert(mode))).decode()
    for given in (text, f"data:image/png;base64,{text}"):
        assert load_image(given).mode == "RGB" and load_image(given).size == (7, 5)


# Folders


# https://github.com/pytorch/vision/issues/109, https://github.com/pytorch/vision/issues/2831
# https://github.com/pytorch/vision/issues/4925, https://github.com/open-mmlab/mmpretrain/issues/507
def test_hidden_and_empty_folders_are_no_classes(folder):
    for place in ("cat", "dog", ".ipynb_checkpoints", "__MACOSX", "empty"):
        (folder / place).mkdir()
    for place in ("cat", "dog", ".ipynb_checkpoints", "__MACOSX"):
        picture(len(place)).save(folder / place / "a.png")
    picture(9).save(folder / "cat" / "._a.png")
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "README.md").write_text("about")
    report = check_table(folder)
    assert load_table(folder).label_set == ("cat", "dog")
    assert report.ok and any("'empty'" in note for note in report.notes)


# https://github.com/pytorch/vision/issues/714: folders called by numbers
def test_folders_called_by_numbers_keep_their_names(folder):
    for name in ("1", "2", "10", "100"):
        (folder / name).mkdir()
        picture(int(name)).save(folder / name / "a.png")
    table = load_table(folder)
    assert all(d.label == d.response == d.id.partition("/")[0] for d in table) and len(table.label_set) == 4
    assert any("number" in note for note in check_table(folder).notes)


# https://github.com/fastai/fastai/issues/1552: a folder of test pictures beside the classes
def test_a_split_beside_classes_is_told(folder):
    for place in ("ok", "nok", "test"):
        (folder / place).mkdir()
        picture(len(place)).save(folder / place / "a.png")
    assert any("'test'" in note and "split" in note for note in check_table(folder).notes)


# https://github.com/huggingface/datasets/issues/6442, https://github.com/huggingface/datasets/issues/5021
# https://github.com/huggingface/datasets/issues/5650, https://github.com/huggingface/datasets/pull/8238
def test_pictures_called_train_or_test_are_not_splits(folder):
    names = ["photo of a cat.jpg", "photo of a train.jpg", "test tubes.jpg", "train.png", "val-1.png"]
    lines = []
    for i, name in enumerate(names):
        picture(i).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": f"text {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    assert load_table(folder).responses == [f"text {i}" for i in range(5)]


# https://github.com/huggingface/datasets/issues/7005: the metadata's own path
@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_the_metadata_or_its_folder(name, folder):
    picture().save(folder / "a.png")
    made = pd.DataFrame([{"file_name": "a.png", "text": "t"}])
    writers = {
        ".csv": lambda p: made.to_csv(p, index=False),
        ".parquet": made.to_parquet,
        ".jsonl": lambda p: made.to_json(p, orient="records", lines=True),
    }
    path = folder / name
    writers[path.suffix](path)
    assert load_table(folder).keys == load_table(path).keys


# https://github.com/huggingface/datasets/issues/6777: two tables, neither called metadata.csv
def test_two_tables_in_a_folder(folder):
    (folder / "images").mkdir()
    picture().save(folder / "images" / "1.png")
    (folder / "metadata1000.csv").write_text("image,caption\nimages/1.png,csv\n")
    (folder / "metadata1000.jsonl").write_text('{"image": "images/1.png", "caption": "jsonl"}')
    with pytest.raises(SavedFileError, match=r"metadata1000\.csv, metadata1000\.jsonl"):
        load_table(folder)
    assert load_table(folder / "metadata1000.jsonl").responses == ["jsonl"]


# https://github.com/huggingface/datasets/pull/4311, https://github.com/wisdomikezogwo/quilt1m/issues/23
def test_pictures_without_a_row_and_rows_without_a_picture(folder):
    for i in range(3):
        picture(i).save(folder / f"{i}.png")
    (folder / "metadata.csv").write_text("file_name,text\n0.png,a\n9.png,b\n")
    report = check_table(folder)
    assert report.rows == 1 and report.bad_rows[0][0] == 1 and "9.png" in report.bad_rows[0][1]
    assert any("2 images" in note and "'1.png'" in note for note in report.notes)


# https://github.com/huggingface/datasets/pull/4069: pictures of one name in several folders
def test_pictures_of_one_name(folder):
    for i, place in enumerate(("Cat", "Dog")):
        (folder / place).mkdir()
        picture(i).save(folder / place / "0.png")
    (folder / "metadata.csv").write_text("file_name,text\nCat/0.png,a\nDog/0.png,b\n")
    table = load_table(folder)
    assert table.responses == ["a", "b"] and table.image_keys == [image_key(picture(0)), image_key(picture(1))]


# https://github.com/abbyy/barcode_detection_benchmark/issues/2, https://github.com/microsoft/CNTK/issues/1321
# https://github.com/CellProfiler/CellProfiler/issues/1385
@pytest.mark.parametrize("name", ["img\\sub\\0.png", ".\\img\\sub\\0.png", "img/sub\\0.png"])
def test_paths_that_windows_wrote(name, folder):
    (folder / "img" / "sub").mkdir(parents=True)
    picture().save(folder / "img" / "sub" / "0.png")
    pd.DataFrame([{"image": name, "label": "cat"}]).to_csv(folder / "t.csv", index=False)
    assert load_table(folder).image_keys == [image_key(picture())]
    (folder / "t.csv").write_text("image,label\n..\\data\\..\\..\\etc\\passwd,cat\n")
    with pytest.raises(ImageError, match="leaves it"):
        load_table(folder)


# https://github.com/webknossos/webknossos-libs/issues/1066
def test_an_archive_that_an_old_windows_tool_packed(folder):
    archive = folder / "x.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("metadata.csv", "file_name,text\nimg\\a.png,t\n")
        packed.writestr("img\\", b"")
        packed.writestr("img\\a.png", encoded(picture()))
    assert load_table(archive).image_keys == [image_key(picture())]
    for name in ("..\\a.png", "C:\\a.png", "\\\\server\\a.png", "img\\..\\..\\a.png"):
        with zipfile.ZipFile(archive, "w") as packed:
            packed.writestr("metadata.csv", "file_name,text\na.png,t\n")
            packed.writestr(name, encoded(picture()))
        with pytest.raises(SavedFileError, match="leads out of it"):
            load_table(archive)


# https://github.com/ieee8023/covid-chestxray-dataset/issues/39: the column is called filename
@pytest.mark.parametrize(
    "name", ["filename", "filepath", "image_filename", "File Name", "Image", "IMAGE", "image_name"]
)
def test_what_people_call_the_column_of_pictures(name, folder):
    picture().save(folder / "a.png")
    pd.DataFrame([{name: "a.png", "label": "cat"}]).to_csv(folder / "t.csv", index=False)
    assert load_table(folder).image_keys == [image_key(picture())]


# https://github.com/tensorflow/datasets/pull/2068: a class that only the test pictures have
def test_a_class_of_the_queries_alone_is_a_wrong_answer(folder):
    from drum_hf.evaluation.evaluator import ICLEvaluator
    from drum_hf.evaluation.strategies import ZeroShot

    support = TripletTable.from_dataset([{"id": "a", "image": picture(1), "label": "cat"}])
    queries = TripletTable.from_dataset(
        [{"id": "b", "image": picture(2), "label": "cat"}, {"id": "c", "image": picture(3), "label": "new"}]
    )

    class Cat:
        fingerprint = "cat"

        def generate(self, requests, **_):
            return ["cat"] * len(requests)

    assert ICLEvaluator(Cat(), support, queries, metric="top1").evaluate(ZeroShot(), 0).values.tolist() == [1.0, 0.0]


# Tables


# https://github.com/pandas-dev/pandas/issues/4793, https://github.com/pandas-dev/pandas/issues/13497
# https://github.com/biolab/orange3/issues/7000, https://github.com/docling-project/docling/issues/4097
@pytest.mark.parametrize("header", ['"question",answer', "question,answer", '"question","answer"'])
def test_a_byte_order_mark_before_the_first_column(header, folder):
    (folder / "t.csv").write_bytes(b"\xef\xbb\xbf" + header.encode() + b"\r\nq,a\r\n")
    assert load_table(folder).prompts == ["q"]


# https://github.com/SFDO-Tooling/Snowfakery/pull/516: blanks, also those that don't break lines, around column names
@pytest.mark.parametrize(
    "text",
    [
        "question, answer\nq, a\n",
        "question ,\u00a0answer\nq,a\n",
        "Question;Answer \nq;a\n",
        'question, answer\n"q", "a"\n',
    ],
)
def test_blanks_around_column_names(text, folder):
    (folder / "t.csv").write_text(text, encoding="utf-8")
    table = load_table(folder)
    assert table.prompts == ["q"] and table.responses == ["a"]


def test_blanks_after_every_comma(folder):
    picture().save(folder / "a.png")
    (folder / "t.csv").write_text('question, image, answer\n"q, or not", a.png, "yes, it is"\n')
    assert (only(load_table(folder)).prompt, only(load_table(folder)).response) == ("q, or not", "yes, it is")


# https://github.com/pandas-dev/pandas/issues/10647, https://github.com/pandas-dev/pandas/issues/24681
# https://github.com/OasisLMF/OasisLMF/issues/307, https://github.com/pandas-dev/pandas/issues/32084
@pytest.mark.parametrize("text", ["NA", "N/A", "null", "None", "nan", "n/a", "NULL", "-", "0", "False"])
def test_texts_that_others_take_for_missing(text, folder):
    (folder / "t.csv").write_text(f"question,answer\nWhich code?,{text}\n")
    assert load_table(folder).responses == [text]
    made = [{"question": "Which code?", "answer": text}]
    for data in (made, pd.DataFrame(made), datasets.Dataset.from_list(made)):
        assert load_table(data).responses == [text]


# https://github.com/pandas-dev/pandas/issues/28335, https://github.com/Sage-Bionetworks/schematic/issues/838
def test_whole_numbers_beside_an_empty_cell(folder):
    made = pd.DataFrame({"question": ["a", "b", "c"], "answer": [1, None, 10], "group": [7, None, 7]})
    assert made["answer"].dtype == float
    table = load_table(made, on_bad_rows="skip")
    assert table.responses == ["1", "10"] and table.groups == ["7", "7"]
    made.to_parquet(folder / "t.parquet")
    assert load_table(folder, on_bad_rows="skip").responses == ["1", "10"]
    made.to_csv(folder / "t.csv", index=False)
    assert any("'1.0'" in note for note in check_table(folder / "t.csv").notes)


def test_a_number_that_is_not_whole_is_named():
    with pytest.raises((RowError, ColumnError), match="number"):
        load_table(pd.DataFrame({"question": ["a", "b"], "answer": [1.5, 2.0]}))


# https://github.com/inducer/relate/issues/136, https://github.com/instructlab/instructlab/pull/813
def test_yes_and_no_that_became_booleans_are_named(folder):
    (folder / "t.json").write_text(json.dumps([{"question": "Is it?", "answer": True}]))
    with pytest.raises((RowError, ColumnError), match=r"answer.*True.*text"):
        load_table(folder)


# https://github.com/huggingface/datasets/pull/5490, https://github.com/cpadavis/billy/issues/18
def test_the_index_that_pandas_writes(folder):
    pd.DataFrame([{"question": "q", "answer": "a"}]).to_csv(folder / "t.csv")
    table = load_table(folder)
    assert table.prompts == ["q"] and table.responses == ["a"]
    assert load_table(pd.read_csv(folder / "t.csv")).keys == table.keys


# https://github.com/pandas-dev/pandas/issues/15203: a separator at the end of every row shifts the columns
def test_a_separator_at_the_end_of_rows(folder):
    (folder / "t.csv").write_text("question,answer\nq,a,\nr,b,\n")
    with pytest.raises(SavedFileError, match=r"line 2.*expected 2 cells, got 3"):
        load_table(folder)
    (folder / "t.csv").write_text("question,answer,\nq,a,\nr,b,\n")
    assert load_table(folder).responses == ["a", "b"]


# https://github.com/ludwig-ai/ludwig/issues/113, https://github.com/microsoft/vscode-data-wrangler/issues/42
@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
def test_a_table_in_an_old_encoding_is_refused_by_name(encoding, folder):
    (folder / "t.csv").write_bytes("question,answer\nQui ?,à côté\n".encode(encoding))
    with pytest.raises(SavedFileError, match="UTF-8"):
        load_table(folder)


# https://github.com/huggingface/datasets/issues/7765, https://github.com/huggingface/datasets/issues/6834
def test_polars_and_its_large_types(folder):
    polars = pytest.importorskip("polars")
    picture().save(folder / "a.png")
    rows = [{"image": str(folder / "a.png"), "question": "q", "answers": ["a", "b", "a"]}]
    for made in (polars.DataFrame(rows), datasets.Dataset.from_polars(polars.DataFrame(rows))):
        table = load_table(made)
        assert table.references == [("a", "b", "a")] and table.image_keys == [image_key(picture())]


# https://github.com/huggingface/datasets/issues/7322, https://github.com/haotian-liu/LLaVA/issues/1535
def test_llava_rows_of_several_shapes(folder):
    picture().save(folder / "a.jpg", quality=95)
    human, gpt = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A bus."}
    rows = [
        {"id": "000", "image": "a.jpg", "conversations": [human, gpt]},
        {"id": 1, "image": "a.jpg", "conversations": [{**human, "value": "Why?\n<image>"}, gpt], "model": ""},
        # https://github.com/haotian-liu/LLaVA/issues/546: rows of text alone
        {"id": "identity", "conversations": [{**human, "value": "Who are you?"}, gpt]},
        # https://github.com/LLaVA-VL/LLaVA-NeXT/issues/459: a picture that the text doesn't name
        {"id": "none", "image": "a.jpg", "conversations": [{**human, "value": "Where?"}, gpt]},
    ]
    (folder / "llava.json").write_text(json.dumps(rows))
    table = load_table(folder)
    assert table.ids == ["000", "1", "identity", "none"]
    assert table.prompts == ["What?", "Why?", "Who are you?", "Where?"] and table.responses == ["A bus."] * 4
    assert [bool(key) for key in table.image_keys] == [True, True, False, True]


# https://github.com/hiyouga/LlamaFactory/issues/5883, https://github.com/hiyouga/LlamaFactory/issues/6135
@pytest.mark.parametrize("name", ["image", "images"])
@pytest.mark.parametrize("listed", [True, False])
def test_a_picture_by_name_or_in_a_list_of_one(name, listed, folder):
    picture().save(folder / "a.png")
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "{}"}]
    shown = str(folder / "a.png")
    (folder / "t.json").write_text(json.dumps([{"messages": turns, name: [shown] if listed else shown}]))
    table = load_table(folder)
    assert table.image_keys == [image_key(picture())] and table.prompts == ["What?"]


# https://github.com/haotian-liu/LLaVA/issues/1100, https://github.com/LLaVA-VL/LLaVA-NeXT/issues/118
def test_rows_with_several_pictures_are_named(folder):
    for i in range(2):
        picture(i).save(folder / f"{i}.png")
    turns = [{"from": "human", "value": "<image><image>Same?"}, {"from": "gpt", "value": "no"}]
    (folder / "t.json").write_text(json.dumps([{"image": ["0.png", "1.png"], "conversations": turns}]))
    with pytest.raises(ImageError, match=r"row 0.*one image, got a list of 2"):
        load_table(folder)


# https://github.com/microsoft/PhiCookBook/issues/172: turns with keys of their own
def test_turns_that_can_not_be_read_are_named():
    turns = [{"images": ["image1.png"], "user": "What?", "assistant": "A bus."}]
    with pytest.raises(RowError, match=r"conversations.*user.*assistant"):
        load_table([{"conversations": turns}])


# Base64 cells


# https://github.com/airsplay/lxmert/issues/70, https://github.com/open-compass/VLMEvalKit/issues/237
# https://github.com/OFA-Sys/OFA/issues/91: str() of what b64encode gives
@pytest.mark.parametrize(
    "write",
    [
        lambda data: base64.b64encode(data).decode().rstrip("="),
        lambda data: base64.urlsafe_b64encode(data).decode(),
        lambda data: base64.encodebytes(data).decode(),
        lambda data: str(base64.b64encode(data)),
        lambda data: str({"bytes": data, "path": None}),
        lambda data: str(data),
        lambda data: "data:image/png;base64," + base64.b64encode(data).decode(),
    ],
)
def test_base64_as_people_write_it(write, folder):
    images = [picture(i) for i in range(3)]
    made = pd.DataFrame(
        [
            {"index": i, "image": write(encoded(image)), "question": "q", "answer": "a"}
            for i, image in enumerate(images)
        ]
    )
    made.to_csv(folder / "t.tsv", sep="\t", index=False)
    assert load_table(folder).image_keys == [image_key(image) for image in images]


# https://github.com/open-compass/VLMEvalKit/issues/1380
def test_a_base64_cell_that_is_no_picture_is_named(folder):
    good, bad = (base64.b64encode(data).decode() for data in (encoded(picture()), encoded(picture())[:60]))
    pd.DataFrame([{"image": cell, "question": "q", "answer": "a"} for cell in (good, bad)]).to_csv(
        folder / "t.tsv", sep="\t", index=False
    )
    with pytest.raises(ImageError, match="row 1") as caught:
        load_table(folder)
    assert len(str(caught.value)) < 1000


# https://github.com/open-compass/VLMEvalKit/pull/357: an index that is no number
def test_rows_named_by_more_than_a_number(folder):
    cell = base64.b64encode(encoded(picture())).decode()
    made = [
        {"index": "12-3", "image": cell, "question": "q", "A": "x", "B": "y", "answer": "B"},
        {"index": "12-4", "image": "12-3", "question": "p", "A": "x", "B": "y", "answer": "A"},
    ]
    pd.DataFrame(made).to_csv(folder / "t.tsv", sep="\t", index=False)
    assert load_table(folder).image_keys == [image_key(picture())] * 2


# https://github.com/open-compass/VLMEvalKit/issues/141: fewer options in some rows, which pandas fills with nan
def test_options_that_a_row_lacks():
    made = pd.DataFrame(
        [
            {"question": "q", "A": "x", "B": "y", "C": "z", "answer": "C"},
            {"question": "p", "A": "x", "B": "y", "answer": "A"},
        ]
    )
    assert load_table(made).prompts == ["q\nA. x\nB. y\nC. z", "p\nA. x\nB. y"]


# Answers


# https://github.com/EvolvingLMMs-Lab/lmms-eval/pull/794, https://github.com/open-compass/VLMEvalKit/issues/842
# https://github.com/EvolvingLMMs-Lab/lmms-eval/pull/364
def test_a_stop_or_a_capital_is_no_error():
    assert vqa_accuracy("Black.", ["black"] * 10) == 1.0
    assert exact_match("yes.", ["yes"]) == exact_match("Yes", ["yes."]) == top1("A.", "A") == 1.0
    assert exact_match("是。", ["是"]) == exact_match("हाँ।", ["हाँ"]) == exact_match("نعم؟", ["نعم"]) == 1.0


# https://github.com/GT-Vision-Lab/VQA/issues/7, https://github.com/Cyanogenoid/pytorch-vqa/issues/5
def test_answers_that_the_official_script_rewrites():
    nine = ["something"] * 9
    assert vqa_accuracy("none", ["none", *nine]) == pytest.approx(0.3)
    assert vqa_accuracy("the cat", ["the cat"] * 4 + nine[:6]) == 1.0
    assert vqa_accuracy("a", ["a"] * 10) == exact_match("the", ["the"]) == 1.0


# https://github.com/EvolvingLMMs-Lab/lmms-eval/pull/760: the official rule is applied once
def test_the_official_rule_runs_once():
    assert get_metric("vqa_accuracy_official")(["ten .5"], [["10 .5"] * 9 + ["x"]]).tolist() == [
        vqa_accuracy("ten .5", ["10 .5"] * 9 + ["x"], official=True)
    ]


# https://github.com/OpenBMB/UltraRAG/issues/509: the gold letter A is no article
def test_the_letter_a_is_an_answer():
    assert (exact_match("A", ["A"]), exact_match("B", ["A"]), exact_match("", ["A"])) == (1.0, 0.0, 0.0)
    assert vqa_accuracy("B", ["A"] * 10) == 0.0


# https://github.com/open-compass/VLMEvalKit/issues/73, https://github.com/AoiDragon/POPE/issues/19
def test_no_is_not_found_in_other_words():
    assert exact_match("Yes, with a death notice.", ["no"]) == exact_match("maybe", ["yes"]) == 0.0


# https://github.com/EvolvingLMMs-Lab/lmms-eval/issues/1434, https://github.com/aniri15/OPD-V/issues/2
# https://github.com/jundot/omlx/pull/3668, https://github.com/openai/simple-evals/issues/33
@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("The bird is low on the leg. The correct answer is (B).", "B"),
        ("Answer: **D**", "D"),
        ("I considered (A), but it is incorrect. Final answer: D.", "D"),
        ("The answer is B. Note that A is a common distractor.", "B"),
        ("The answer is C because I computed the integral.", "C"),
        ("Answer:\n\nAnswer: C", "C"),
    ],
)
def test_the_letter_that_a_wordy_answer_means(said, meant):
    assert letter_match(said, meant) == 1.0
    assert all(letter_match(said, other) == 0.0 for other in set("ABCDEIT") - {meant})


# https://github.com/tylin/coco-caption/issues/10, https://github.com/salaniz/pycocoevalcap/issues/18
# https://github.com/tylin/coco-caption/issues/4: one reference, one picture
def test_cider_of_few_pictures():
    two = cider_d(["a red bus on a street", "two cats asleep"], [["a red bus on a street"], ["two cats asleep"]])
    assert np.allclose(two, [10.0, 10.0 * 3 / 4], atol=0.2) or (two > 5).all()
    assert np.isfinite(cider_d(["a red bus"], [["a red bus"]])).all()
