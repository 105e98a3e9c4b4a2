"""Every kind of image against an independent computation of its pixels, and what is refused."""

from __future__ import annotations

import base64
import http.server
import io
import os
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from drum_hf.errors import ImageError
from drum_hf.types import image_key
from drum_hf.utils import download as downloads
from drum_hf.utils import images
from drum_hf.utils.images import FORMATS, load_image

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
ALPHA[0, 0], ALPHA[0, 1] = 0, 255


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """In whole numbers: round half up of c * a + 255 * (1 - a)."""
    colours = colours if colours.ndim == 3 else np.repeat(colours[..., None], 3, axis=2)
    weight = alpha[..., None].astype(np.int64)
    return ((colours * weight + 255 * (255 - weight)) * 2 + 255) // 510


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.floor(values + 0.5).astype(np.uint8)[..., None], 3, axis=2)


def pixels(source: object, **options: object) -> np.ndarray:
    image = load_image(source, **options)
    assert type(image) is Image.Image and image.mode == "RGB" and image.info == {} and not image.getexif()
    return np.asarray(image)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, format, **options)
    return data.getvalue()


def modes() -> Iterator[tuple[str, Image.Image, np.ndarray, int]]:
    """(mode, image, its pixels computed without Pillow where it's more than a table, tolerance)."""
    rgb, rgba = Image.fromarray(COLOURS), Image.fromarray(np.dstack([COLOURS, ALPHA]))
    yield "RGB", rgb, COLOURS, 0
    yield "L", Image.fromarray(GREY), grey(GREY), 0
    yield "1", Image.fromarray(GREY > 99), grey(255.0 * (GREY > 99)), 0
    yield "RGBA", rgba, on_white(COLOURS, ALPHA), 0
    yield "LA", Image.fromarray(np.dstack([GREY, ALPHA]), "LA"), on_white(GREY, ALPHA), 0
    premultiplied = np.dstack([(COLOURS * (ALPHA[..., None] / 255)).round().astype(np.uint8), ALPHA])
    # what was rounded is rounded again: of each step at most one
    yield "RGBa", Image.frombytes("RGBa", (7, 5), premultiplied.tobytes()), on_white(COLOURS, ALPHA), 2
    dark = np.dstack([(GREY * (ALPHA / 255)).round().astype(np.uint8), ALPHA])
    yield "La", Image.frombytes("La", (7, 5), dark.tobytes()), on_white(GREY, ALPHA), 2
    palette = RNG.integers(0, 256, (256, 3), dtype=np.uint8)
    indexed = Image.frombytes("P", (7, 5), GREY.tobytes())
    indexed.putpalette(palette.tobytes())
    yield "P", indexed, palette[GREY], 0
    one_clear = indexed.copy()
    one_clear.info["transparency"] = int(GREY[0, 0])
    yield "P, one transparent", one_clear, on_white(palette[GREY], 255 * (GREY[0, 0] != GREY)), 0
    by_number = indexed.copy()
    by_number.info["transparency"] = bytes(range(256))
    yield "P, alpha by number", by_number, on_white(palette[GREY], GREY), 0
    keyed = rgb.copy()
    keyed.info["transparency"] = tuple(map(int, COLOURS[2, 2]))
    yield "RGB, one transparent", keyed, on_white(COLOURS, 255 * (COLOURS[2, 2] != COLOURS).any(2)), 0
    yield "PA", indexed.convert("PA"), palette[GREY], 0
    cmyk = np.dstack([255 - COLOURS, np.zeros_like(GREY)])
    yield "CMYK", Image.fromarray(cmyk, "CMYK"), COLOURS, 0
    y, blue, red = (RNG.integers(60, 190, (5, 7)) for _ in range(3))
    jfif = np.dstack(
        [y + 1.402 * (red - 128), y - 0.344136 * (blue - 128) - 0.714136 * (red - 128), y + 1.772 * (blue - 128)]
    )
    planes = np.dstack([y, blue, red]).astype(np.uint8)
    yield "YCbCr", Image.fromarray(planes, "YCbCr"), jfif.clip(0, 255).round(), 2
    hue = np.dstack([np.zeros_like(GREY), np.full_like(GREY, 255), GREY])
    yield "HSV", Image.fromarray(hue, "HSV"), np.dstack([GREY, GREY * 0, GREY * 0]), 0
    lightness = np.dstack([np.full_like(GREY, 255), np.zeros_like(GREY), np.zeros_like(GREY)])
    yield "LAB", Image.fromarray(lightness, "LAB"), np.full_like(COLOURS, 255), 2
    deep = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)
    yield "I;16", Image.fromarray(deep), grey(deep / 257), 0
    yield "I;16B", Image.frombytes("I;16B", (7, 5), deep.astype(">u2").tobytes()), grey(deep / 257), 0
    yield "I", Image.fromarray(deep.astype(np.int32)), grey(deep / 257), 0
    wide = RNG.integers(-(10**6), 10**6, (5, 7), dtype=np.int32)
    yield "I beyond 16 bits", Image.fromarray(wide), grey((wide - wide.min()) / np.ptp(wide) * 255), 0
    unit = RNG.random((5, 7)).astype(np.float32)
    yield "F", Image.fromarray(unit), grey(unit * 255.0), 0
    depth = unit * 40 - 7
    stretched = (depth.astype(np.float64) - depth.min()) / (float(depth.max()) - float(depth.min()))
    yield "F beyond 1", Image.fromarray(depth), grey(stretched * 255), 0


@pytest.mark.parametrize(("image", "expected", "tolerance"), [pytest.param(*m[1:], id=m[0]) for m in modes()])
def test_every_mode_becomes_rgb(image, expected, tolerance):
    got = pixels(image).astype(int)
    assert got.shape == (5, 7, 3) and abs(got - expected).max() <= tolerance


#: Modes that each format's writer takes without loss.
LOSSLESS = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "TIFF": ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"],
    "BMP": ["1", "L", "P", "RGB"],  # Pillow writes 32 bits that no reader takes for transparency
    "WEBP": ["RGB", "RGBA"],
    "GIF": ["L", "P"],
    "PPM": ["1", "L", "RGB", "I;16"],
    "TGA": ["L", "LA", "P", "RGB", "RGBA"],
    "JPEG2000": ["L", "LA", "RGB", "RGBA", "I;16"],
    "ICO": ["RGBA"],
}


@pytest.mark.parametrize(("format", "mode"), [(f, mode) for f, some in LOSSLESS.items() for mode in some])
def test_every_format_gives_the_pixels_of_its_mode(format, mode, tmp_path):
    _, image, expected, tolerance = next(each for each in modes() if each[0] == mode)
    options = {"WEBP": {"lossless": True, "exact": True}, "ICO": {"sizes": [(7, 5)]}}.get(format, {})
    data = encoded(image, format, **options)
    got = pixels(data).astype(int)
    assert abs(got - expected).max() <= tolerance
    (tmp_path / "p").write_bytes(data)
    assert np.array_equal(pixels(tmp_path / "p"), got) and np.array_equal(pixels(Image.open(tmp_path / "p")), got)


@pytest.mark.parametrize("format", ["JPEG", "MPO", "AVIF", "WEBP"])
def test_formats_with_loss_are_near(format):
    if format == "AVIF" and format not in images._readable_formats():
        pytest.skip(f"this Pillow reads no {format}")
    smooth = np.dstack([np.add.outer(np.arange(32), np.arange(48)) * s for s in (1, 2, 3)]).astype(np.uint8)
    assert abs(pixels(encoded(Image.fromarray(smooth), format, quality=95)).astype(int) - smooth).max() < 40


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_the_camera_s_orientation(format, orientation, tmp_path):
    # what EXIF says of where row 0 and column 0 of the stored picture are in the scene
    turned = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "maker"
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    data = encoded(Image.fromarray(COLOURS), format, exif=exif, **options)
    expected = turned(COLOURS).astype(int)
    got = pixels(data).astype(int)
    assert got.shape == expected.shape and abs(got - expected).max() <= (40 if format == "JPEG" else 0)
    path = tmp_path / "photo"
    path.write_bytes(data)
    assert len({image_key(each) for each in (data, path, Image.open(path), load_image(path))}) == 1
    held = Image.open(path)
    held.load()
    assert image_key(held) == image_key(path)


def test_of_several_frames_the_first():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for format, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("PNG", {})):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert (pixels(data) == (255, 0, 0)).all(), format


def every_way(data: bytes, folder: Path) -> dict[str, object]:
    """One picture, in each way that `load_image` takes."""
    path = folder / "a b Ü.png"
    path.write_bytes(data)
    array = np.asarray(Image.open(path))
    text = base64.b64encode(data).decode()
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    at_end = io.BytesIO(data)
    at_end.seek(0, os.SEEK_END)
    return {
        "str": str(path), "Path": path, "bytes": data, "bytearray": bytearray(data), "memoryview": memoryview(data),
        "file": path.open("rb"), "BytesIO": io.BytesIO(data), "read to its end": at_end, "opened": Image.open(path),
        "PIL": Image.fromarray(array), "dict of bytes": {"bytes": data, "path": None},
        "dict of a path": {"bytes": None, "path": str(path)}, "dict of both": {"bytes": data, "path": "gone.png"},
        "base64": text, "base64 in lines": base64.encodebytes(data).decode(), "unpadded": text.rstrip("="),
        "URL-safe": base64.urlsafe_b64encode(data).decode(), "data URI": f"data:image/png;base64,{text}",
        "uint8": array, "uint16": array.astype(np.uint16) * 257, "int64": array.astype(np.int64),
        "float32": array.astype(np.float32) / 255, "float64": array / 255, "not contiguous": array[::-1][::-1],
        "tensor": tensor, "float tensor": tensor.float() / 255,
        "RGBA": np.dstack([array, np.full_like(array[..., 0], 255)]),
    }  # fmt: skip


def test_one_picture_has_one_key_by_every_way_in(tmp_path):
    keys = {way: image_key(given) for way, given in every_way(encoded(Image.fromarray(COLOURS)), tmp_path).items()}
    assert set(keys.values()) == {image_key(Image.fromarray(COLOURS))}, keys


def test_arrays_and_tensors():
    assert np.array_equal(pixels(GREY), grey(GREY)) and np.array_equal(pixels(GREY[..., None]), grey(GREY))
    assert np.array_equal(pixels(GREY > 99), grey(255.0 * (GREY > 99)))
    assert np.array_equal(pixels(np.dstack([COLOURS, ALPHA])), on_white(COLOURS, ALPHA))
    assert np.array_equal(pixels(torch.from_numpy(COLOURS).permute(2, 0, 1)), COLOURS)
    assert np.array_equal(pixels(torch.from_numpy(GREY)[None]), grey(GREY))
    assert (pixels(np.full((2, 2), 7.0)) == 0).all()
    for array, match in (
        (np.zeros((2, 4, 4, 3), np.uint8), r"of shape \(H, W\).*of shape \(2, 4, 4, 3\)"),
        (np.zeros((3, 4, 5), np.uint8), r"move its axes"),
        (np.array([[0, 256]]), "from 0 to 255, got int64 from 0 to 256"),
        (np.array([[0.0, np.nan]]), "NaN"),
        (np.zeros((0, 3), np.uint8), "no pixels"),
        (np.array([["a"]]), "integers or floats"),
    ):
        with pytest.raises(ImageError, match=match):
            load_image(array)


def test_what_it_gives_it_takes_as_it_is():
    image = load_image(Image.fromarray(np.dstack([COLOURS, ALPHA])))
    assert load_image(image) is image
    noted = Image.fromarray(COLOURS)
    noted.info["dpi"] = (72, 72)
    assert load_image(noted) is not noted and noted.info


# ---- what is refused ----


def header_of(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + bytes([8, 2, 0, 0, 0]))
    return start + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(9_000, 9_000), (13_000, 13_000), (100_000, 100_000)])
def test_too_many_pixels_are_refused_before_they_are_decoded(size, recwarn):
    started = time.monotonic()
    with pytest.raises(ImageError, match=r"at most 64,000,000 pixels"):
        load_image(header_of(*size))
    assert time.monotonic() - started < 1 and not [w for w in recwarn if "Bomb" in str(w.category)]
    with pytest.raises(ImageError, match="at most 34 pixels, got 7 x 5"):
        load_image(encoded(Image.fromarray(COLOURS)), max_pixels=34)


def test_too_many_bytes_are_refused(monkeypatch, tmp_path):
    data = encoded(Image.fromarray(COLOURS), "BMP")
    (tmp_path / "p.bmp").write_bytes(data)
    monkeypatch.setattr(images, "MAX_BYTES", len(data) - 1)
    for given in (data, tmp_path / "p.bmp", io.BytesIO(data), base64.b64encode(data).decode() + "=" * 40):
        with pytest.raises(ImageError, match=r"at most .* bytes"):
            load_image(given)


def test_no_format_starts_another_program(monkeypatch, tmp_path):
    import subprocess

    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a program was started"))
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: pytest.fail("a program was started"))
    eps = encoded(Image.fromarray(COLOURS), "EPS")
    (tmp_path / "x.png").write_bytes(eps)
    for given in (eps, tmp_path / "x.png", base64.b64encode(eps).decode(), Image.open(tmp_path / "x.png")):
        with pytest.raises(ImageError, match=r"common format|EPS"):
            load_image(given)
    assert "EPS" not in FORMATS


def test_broken_ones_and_what_is_none(tmp_path):
    whole = encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    os.mkfifo(tmp_path / "pipe.png")
    for given, match in (
        (whole[:900], "can't be read"), (b"", "empty"), (b"no image", "can't be read"), (tmp_path, "expected a file"),
        (tmp_path / "pipe.png", "expected a file"), (tmp_path / "gone.png", "no such file: .*gone.png"),
        ("gone.png", "no such file: 'gone.png'"), ("a\0b.png", "can't be read|no such file"), (3, "got int"),
        ("data:image/png;base64,", "empty"), ("data:nothing", "no such file"), ({}, "got a dict with nothing"),
        ({"bytes": None, "path": None}, "got a dict"), ({"url": "x"}, "'url'"), ([whole], "got list"),
        (None, "NoneType"),
        (io.StringIO("text"), "got str"),
    ):  # fmt: skip
        with pytest.raises(ImageError, match=match):
            load_image(given)


@pytest.mark.parametrize("head", ["", "data:image/png;base64,", "x.", "https://me:secret@host.example/"])
def test_errors_are_short_and_tell_no_secret(head):
    with pytest.raises(ImageError) as caught:
        load_image(head + "A" * 90_000 + "?key=secret")
    assert len(str(caught.value)) < 500 and "secret" not in str(caught.value)


# ---- addresses ----


class _Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", "/photo.png")
            self.end_headers()
        elif self.path == "/round":
            self.send_response(302)
            self.send_header("Location", "/round")
            self.end_headers()
        elif self.path == "/photo.png":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(encoded(Image.fromarray(COLOURS)))
        elif self.path == "/drip":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.05)
        else:
            self.send_error(404)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()


def test_addresses_are_off_and_private_hosts_are_refused(server):
    with pytest.raises(ImageError, match="allow addresses with urls=True"):
        load_image(f"{server}/photo.png")
    for host in ("127.0.0.1", "localhost", "10.0.0.1", "169.254.169.254", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"):
        with pytest.raises(ImageError, match="on this machine or its network"):
            load_image(f"http://{host}:{server.rpartition(':')[2]}/photo.png", urls=True)
    for path in ("/photo.png", "/away"):
        assert np.array_equal(pixels(server + path, urls="private"), COLOURS)


def test_a_redirect_to_a_private_host_is_refused(server, monkeypatch):
    asked = []
    known = downloads._look_up

    def look_up(host, port, private, target):
        asked.append(host)
        return known(host, port, len(asked) == 1, target)  # the first one counts as public

    monkeypatch.setattr(downloads, "_look_up", look_up)
    with pytest.raises(ImageError, match="on this machine or its network"):
        load_image(f"{server}/away", urls=True)
    assert len(asked) == 2


def test_a_server_that_is_slow_silent_or_endless(server, monkeypatch):
    started = time.monotonic()
    with pytest.raises(ImageError, match=r"took more than 0\.5 s"):
        load_image(f"{server}/drip", urls="private", timeout=0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ImageError, match="can't be fetched"):
        load_image(f"http://127.0.0.1:{silent.getsockname()[1]}/x?key=secret", urls="private", timeout=0.3)
    assert time.monotonic() - started < 5
    with pytest.raises(ImageError, match="status 404"):
        load_image(f"{server}/gone", urls="private")
    with pytest.raises(ImageError, match="more than 5 times"):
        load_image(f"{server}/round", urls="private")
    monkeypatch.setattr(images, "MAX_BYTES", 20)
    with pytest.raises(ImageError, match="at most 20 bytes"):
        load_image(f"{server}/photo.png", urls="private")
