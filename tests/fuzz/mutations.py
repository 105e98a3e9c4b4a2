"""What is done to a file, or to its folder. Every mutation is a function of a seeded `random.Random`."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import sqlite3
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

Chance = random.Random

NUMBERS = [0, -1, 1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 10**30, 1e308, 1e-320]
ODD: list[Any] = [
    *NUMBERS,
    None,
    True,
    False,
    "",
    "x",
    "\x00",
    "\ud800",
    "../secret/secret.png",
    "../../secret/secret.png",
    "../../../../etc/passwd",
    "/etc/passwd",
    "a" * 100_000,
    [],
    {},
    [None],
    [[]],
    {"": None},
    float("nan"),
    float("inf"),
    float("-inf"),
    -5,
    0.5,
    "NaN",
    "0",
]


class Evil:
    """Unpickled, it leaves a file: code was run."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (self.mark, 0o777, True)


def strange_files(mark: Path) -> list[bytes]:
    """Contents that are something else: pickles under another name, archives, bombs."""
    import numpy as np

    evil = pickle.dumps(Evil(mark))
    objects = io.BytesIO()
    np.save(objects, np.array([Evil(mark)], dtype=object), allow_pickle=True)
    torch_like, bomb = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(torch_like, "w") as archive:
        archive.writestr("archive/data.pkl", evil)
        archive.writestr("archive/version", "3\n")
        archive.writestr("../../escape.txt", "out")
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(50_000_000))
    deep = b"[" * 100_000
    return [
        b"",
        evil,
        objects.getvalue(),
        torch_like.getvalue(),
        bomb.getvalue(),
        big_png(60_000, 60_000),
        deep,
        b"\x00" * 4096,
        b"PAR1" + b"\xff" * 64 + b"PAR1",
        b"SQLite format 3\x00" + b"\xff" * 4096,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**9) + b"{}",
        b"<html></html>",
        b"\xff\xfe\x00",
    ]


def big_png(width: int, height: int) -> bytes:
    """A PNG that says it is of this size, and is small."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


# ---- bytes ----


def bytewise(data: bytes, chance: Chance) -> bytes:
    """Some of: flipped bits, other bytes, cuts, copies, zeros, and integers as headers hold them."""
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 4, 16])):
        size = len(changed)
        # Headers and footers are where sizes stand.
        at = chance.choice(
            [chance.randrange(size + 1), chance.randrange(min(size, 64) + 1), max(0, size - 1 - chance.randrange(64))]
        )
        match chance.randrange(9):
            case 0 | 1 if size:
                changed[at % size] ^= 1 << chance.randrange(8)
            case 2 if size:
                changed[at % size] = chance.randrange(256)
            case 3:
                del changed[at:]
            case 4:
                del changed[at : at + chance.choice([1, 4, 64, 1024])]
            case 5:
                changed[at:at] = chance.randbytes(chance.choice([1, 4, 64]))
            case 6:
                length = chance.choice([4, 8, 64, 512])
                changed[at : at + length] = bytes(length)
            case 7:
                value = chance.choice([n for n in NUMBERS if isinstance(n, int) and 0 <= n < 2**64])
                packed = struct.pack(chance.choice(["<Q", ">Q"]), value)
                packed = packed if chance.random() < 0.5 else packed[:4] if packed[:4] != bytes(4) else packed[4:]
                changed[at : at + len(packed)] = packed
            case _:
                length = chance.choice([4, 32, 256])
                other = chance.randrange(size + 1)
                changed[at : at + length] = changed[other : other + length]
    return bytes(changed)


# ---- structures ----


def structurally(content: Any, chance: Chance) -> Any:
    """JSON-like content with some values replaced, doubled, removed or moved."""
    for _ in range(chance.choice([1, 1, 2, 3])):
        places: list[tuple[Any, Any]] = []
        waiting = [content]
        while waiting:
            one = waiting.pop()
            keys = list(one) if isinstance(one, dict) else list(range(len(one))) if isinstance(one, list) else []
            places += [(one, key) for key in keys]
            waiting += [one[key] for key in keys]
        if not places:
            return chance.choice(ODD)
        holder, key = chance.choice(places)
        match chance.randrange(6):
            case 0 | 1 | 2:
                holder[key] = chance.choice(ODD)
            case 3:
                del holder[key]
            case 4:
                other, name = chance.choice(places)
                with_ = other[name] if not isinstance(other, list) or name < len(other) else None
                holder[key] = json.loads(json.dumps(with_)) if holder is not with_ else None
            case _ if isinstance(holder, list):
                holder.insert(key, json.loads(json.dumps(holder[key])))
            case _:
                holder[chance.choice(["x", "auto_map", "../x", "", "format_version"])] = chance.choice(ODD)
    return content


def json_file(path: Path, chance: Chance) -> None:
    text = path.read_text("utf-8")
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in text.splitlines()]
        path.write_text("\n".join(json.dumps(line) for line in structurally(lines, chance) or []), "utf-8")
    else:
        path.write_text(json.dumps(structurally(json.loads(text), chance)), "utf-8")


def safetensors_file(path: Path, chance: Chance) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if chance.random() < 0.4:  # other numbers in the tensors
        body = bytewise(body, chance)
        body = body + bytes(max(0, len(data) - 8 - length - len(body)))
        body = body[: len(data) - 8 - length]
        if chance.random() < 0.5 and len(body) >= 4:
            at = chance.randrange(len(body) // 4) * 4
            odd = chance.choice(
                [
                    struct.pack("<f", float("nan")),
                    struct.pack("<f", float("inf")),
                    struct.pack("<i", 2**31 - 1),
                    struct.pack("<i", -7),
                ]
            )
            body = body[:at] + odd + body[at + 4 :]
    else:
        header = structurally(header, chance)
    packed = json.dumps(header).encode()
    stated = len(packed) if chance.random() < 0.9 else chance.choice([0, 2**40, len(packed) + 1])
    path.write_bytes(struct.pack("<Q", stated) + packed + body)


def yaml_file(path: Path, chance: Chance) -> None:
    import yaml

    text = path.read_text("utf-8")
    if chance.random() < 0.6:
        content = structurally(yaml.safe_load(text), chance)
        path.write_bytes(yaml.safe_dump(content).encode("utf-8", "surrogatepass"))
        return
    laughs = "\n".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 12))
    lines = [
        "!!python/object/apply:os.system ['true']",
        "!!python/name:os.system",
        "!!python/object/new:os.system [true]",
        "!!timestamp x",
        "!!int ''",
        "!!float x",
        "!!bool x",
        "!!binary x",
        "!!set {a}",
        "2001-99-99",
        "&a [*a]",
        "*b",
        "{[1]: 2}",
        "? [a]\n: b",
        "[" * 3000,
        "{" * 2000,
        "!!omap [x]",
        "!!merge x",
        "0x",
        "1e999",
        ".nan",
        "1_",
        "0o9",
    ]
    odd = chance.choice(lines)
    match chance.randrange(4):
        case 0:
            path.write_text(odd, "utf-8")
        case 1:
            path.write_text(f"l0: &l0 [a]\n{laughs}\nsources: *l11\nmodel: *l11\n", "utf-8")
        case 2:
            rows = text.splitlines()
            at = chance.randrange(len(rows))
            rows[at] = f"{rows[at].split(':')[0]}: {odd}"
            path.write_text("\n".join(rows), "utf-8")
        case _:
            path.write_text(f"{text}\nmodel: {odd}\n", "utf-8")


def parquet_file(path: Path, chance: Chance) -> None:
    """Other rows, columns, types and metadata in a file that is parquet all the same; and bombs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    names = table.column_names
    name = chance.choice(names)
    at = names.index(name)
    match chance.randrange(9):
        case 0:
            table = table.drop_columns([name])
        case 1:
            table = table.set_column(at, name, pa.nulls(len(table), table[name].type))
        case 2:
            table = pa.concat_tables([table, table.slice(0, chance.randrange(1, len(table) + 1))])
        case 3:
            table = table.set_column(at, name, pa.array([chance.choice(NUMBERS[:8])] * len(table)))
        case 4:
            table = table.rename_columns([chance.choice(names) if n == name else n for n in names])
        case 5:
            table = table.slice(0, chance.randrange(len(table)))
        case 6:
            rows = table.to_pylist()
            for row in rows:  # images that are named, not held
                for value in row.values():
                    if isinstance(value, dict) and chance.random() < 0.2:
                        value["path"] = chance.choice([text for text in ODD if isinstance(text, str)])
                        value["bytes"] = chance.choice([None, value.get("bytes")])
            rows = (
                structurally([{k: v for k, v in row.items() if not isinstance(v, dict)} for row in rows], chance)
                if not any(isinstance(v, dict) for row in rows for v in row.values())
                else rows[::-1]
            )
            try:
                table = pa.Table.from_pylist(rows, schema=table.schema)
            except Exception:  # the value does not fit; another type then
                try:
                    table = pa.Table.from_pylist(rows)
                except Exception:
                    table = table.slice(1)
        case 7:
            meta = dict((table.schema.metadata or {}).items())
            for key, value in list(meta.items()):
                try:
                    meta[key] = json.dumps(structurally(json.loads(value), chance)).encode()
                except ValueError:
                    meta[key] = bytewise(value, chance)
            table = table.replace_schema_metadata(meta)
        case _:  # a text of 20 MB in every row: small on the disk
            bomb = pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), pa.array(["x" * 20_000_000]))
            table = pa.table({n: bomb if n == name else pa.nulls(5000, table[n].type) for n in names})
            table = table.replace_schema_metadata(pq.read_schema(path).metadata)
    pq.write_table(table, path, compression="zstd")


def sqlite_file(path: Path, chance: Chance) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    tables = ["meta", "fingerprints", "scores", "texts", "contents", "lists"]
    table = chance.choice(tables)
    columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"
    try:
        match chance.randrange(8):
            case 0 | 1 | 2 | 3:
                value = chance.choice(
                    [None, -1, 2**62, 9e999, "text", b"\x00\xff", b"", "\x00", "[", "{}", "x" * 10**6]
                )
                one = chance.choice(["", f" WHERE rowid IN (SELECT rowid FROM {table} LIMIT 1)"])
                one = "" if table in ("meta", "scores", "texts") else one
                connection.execute(f"UPDATE OR REPLACE {table} SET {chance.choice(columns)} = ?{one}", (value,))
            case 4:
                connection.execute(f"DELETE FROM {table}")
            case 5:
                connection.execute(
                    f"CREATE TRIGGER t BEFORE INSERT ON {table} BEGIN SELECT max(i) FROM ({endless}); END"
                )
            case 6:
                connection.execute(f"ALTER TABLE {table} RENAME TO old")
                connection.execute(f"CREATE VIEW {table} AS SELECT *, ({endless} LIMIT 1) FROM old")
            case _:
                connection.execute(
                    chance.choice(
                        [
                            f"DROP TABLE {table}",
                            f"ALTER TABLE {table} ADD COLUMN more BLOB",
                            "CREATE TABLE more (a)",
                            f"CREATE INDEX i ON {table} (rowid + 1)",
                            "UPDATE meta SET value = '99'",
                        ]
                    )
                )
    except sqlite3.Error:
        connection.execute(f"DELETE FROM {table}")
    finally:
        connection.close()


def csv_file(path: Path, chance: Chance) -> None:
    rows = path.read_text("utf-8").split("\n")
    at = chance.randrange(len(rows))
    cells = rows[at].split(",")
    cells[chance.randrange(len(cells))] = chance.choice(
        [
            "",
            "../secret/secret.png",
            "../../secret/secret.png",
            "/etc/passwd",
            '"',
            "x" * 200_000,
            "\x00",
            "pipe",
            "link.png",
            "[" * 9000,
        ]
    )
    rows[at] = ",".join(cells)
    path.write_text("\n".join(rows), "utf-8")


BY_SUFFIX: dict[str, Callable[[Path, Chance], None]] = {
    ".json": json_file,
    ".jsonl": json_file,
    ".safetensors": safetensors_file,
    ".parquet": parquet_file,
    ".sqlite": sqlite_file,
    ".yaml": yaml_file,
    ".csv": csv_file,
}


# ---- folders ----


def mutate(folder: Path, chance: Chance, secret: Path, mark: Path) -> str:
    """Change one file below `folder`, or what stands in its place; what was done, in words."""
    for _ in range(100):
        try:
            what = _mutate(folder, chance, secret, mark)
        except (ValueError, TypeError, OverflowError, pa_errors()):  # no such mutation of this file
            continue
        if what:
            return what
    raise RuntimeError(f"{folder}: nothing could be changed")


def pa_errors() -> type[Exception]:
    import pyarrow as pa

    return pa.ArrowException


def _mutate(folder: Path, chance: Chance, secret: Path, mark: Path) -> str:
    """As `mutate`; "" where it came to nothing."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    # Pictures are many, and what names them is one: every kind of file has its turn.
    suffix = chance.choice(sorted({path.suffix for path in files} - {".md"}))
    path = chance.choice([path for path in files if path.suffix == suffix])
    name = path.relative_to(folder).as_posix()
    roll = chance.random()
    before = path.read_bytes()
    if roll < 0.5:
        path.write_bytes(bytewise(before, chance))
        return f"{name}: bytes" if path.read_bytes() != before else ""
    if roll < 0.86 and path.suffix in BY_SUFFIX:
        BY_SUFFIX[path.suffix](path, chance)
        return f"{name}: structure" if path.read_bytes() != before else ""
    if roll < 0.93:
        strange = strange_files(mark)
        number = chance.randrange(len(strange))
        path.write_bytes(strange[number])
        return f"{name}: strange content {number}"
    match chance.randrange(7):
        case 0:
            path.unlink()
            return f"{name}: gone"
        case 1:
            path.unlink()
            path.symlink_to(
                chance.choice(
                    [secret / "secret.png", secret / "secret.json", Path("/etc/passwd"), Path("/dev/zero"), path]
                )
            )
            return f"{name}: a link"
        case 2:
            path.unlink()
            path.mkdir()
            return f"{name}: a folder"
        case 3:
            path.unlink()
            os.mkfifo(path)
            return f"{name}: a pipe"
        case 4:
            other = chance.choice(files)
            shutil.copyfile(other, path) if other != path else None
            return f"{name}: is {other.name}" if path.read_bytes() != before else ""
        case 5:
            place = path.parent
            if place == folder:
                return ""
            shutil.rmtree(place)
            place.symlink_to(secret)
            return f"{place.relative_to(folder).as_posix()}: a link to a folder"
        case _:
            stray = path.with_name(
                chance.choice(
                    ["pytorch_model.bin", "adapter_config.json", "model.safetensors.index.json", "x.py", "custom.pkl"]
                )
            )
            if stray.exists():
                return ""
            stray.write_bytes(chance.choice([pickle.dumps(Evil(mark)), b"{}", b"import os"]))
            return f"{stray.name}: a file more"
