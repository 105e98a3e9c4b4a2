"""Files and folders are replaced whole: killed at every step, by several savers, and while they are read."""

from __future__ import annotations

import json
import os
import signal
import threading
import warnings
from pathlib import Path

import pytest

from drum_hf.errors import SavedFileError
from drum_hf.utils.files import read_folder, read_json, replacing_file, replacing_folder

STEPS = ("replace", "link", "unlink", "mkdir", "rmdir", "fsync", "open")
OWNS = ("about.json", "part", "old*")


def save(folder: Path, value: int, *, more: bool = False) -> None:
    with replacing_folder(folder, owns=OWNS) as partial:
        (partial / "part").mkdir()
        for name in ("a", "b"):
            (partial / "part" / name).write_text(str(value))
        if more:
            (partial / "old.txt").write_text(str(value))
            (partial / "part" / "inner").mkdir()
            (partial / "part" / "inner" / "c").write_text(str(value))
        (partial / "about.json").write_text(json.dumps(value))


def load(folder: Path) -> int:
    def read(place: Path) -> int:
        values = {(place / "part" / name).read_text() for name in ("a", "b")}
        values |= {path.read_text() for path in place.glob("old*")} | {(place / "about.json").read_text()}
        if len(values) > 1:
            raise SavedFileError(f"a mixture: {values}")
        return int(values.pop())

    return read_folder(folder, "about.json", read)


def killed_at(step: int, task) -> bool:
    """Run a task in a process that dies before its `step`-th call of any of `STEPS`; whether it came that far."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking while threads run; it only writes files
        pid = os.fork()
    if not pid:
        try:
            calls = [0]

            def dying(real):
                def call(*args, **kwargs):
                    calls[0] += 1
                    if calls[0] == step:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **kwargs)

                return call

            for name in STEPS:
                setattr(os, name, dying(getattr(os, name)))
            task()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), "the save failed rather than be killed"
    return status != 0


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob(".*"))


def test_a_folder_killed_at_every_step_is_the_old_or_the_new(tmp_path):
    found, step = [], 0
    while True:
        step += 1
        folder = tmp_path / str(step)
        save(folder, 1, more=True)
        (folder / "notes.txt").write_text("mine")
        killed = killed_at(step, lambda: save(folder, 2))  # noqa: B023
        found.append(load(folder))
        save(folder, 3)
        assert load(folder) == 3 and hidden(folder) == []
        assert sorted(path.name for path in folder.rglob("*")) == ["a", "about.json", "b", "notes.txt", "part"]
        if not killed:
            break
    assert step > 20 and set(found) == {1, 2} and found == sorted(found)


def test_a_first_save_killed_at_every_step_is_there_or_not(tmp_path):
    found, step = [], 0
    while True:
        step += 1
        killed = killed_at(step, lambda: save(tmp_path / str(step), 2))  # noqa: B023
        try:
            found.append(load(tmp_path / str(step)))
        except FileNotFoundError:
            found.append(0)
        if not killed:
            break
    assert set(found) == {0, 2} and found == sorted(found)


def test_a_file_killed_at_every_step_is_the_old_or_the_new(tmp_path):
    path, step, found = tmp_path / "a.json", 0, []

    def write(value):
        with replacing_file(path) as partial:
            assert partial.suffix == ".json"
            partial.write_text(value)

    while True:
        step += 1
        write("old")
        killed = killed_at(step, lambda: write("new"))
        found.append(path.read_text())
        write("again")
        assert [each.name for each in tmp_path.iterdir()] == ["a.json"]
        if not killed:
            break
    assert set(found) == {"old", "new"}


def test_an_error_leaves_the_old_content_and_nothing_else(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(KeyError), replacing_folder(tmp_path, owns=OWNS) as partial:
        (partial / "about.json").write_text("2")
        raise KeyError
    with pytest.raises(SavedFileError, match="No space left"), replacing_folder(tmp_path, owns=OWNS):
        raise OSError(28, "No space left on device")
    with pytest.raises(SavedFileError, match="No space left"), replacing_file(tmp_path / "about.json"):
        raise OSError(28, "No space left on device")
    assert load(tmp_path) == 1 and hidden(tmp_path) == []


def test_savers_take_turns_and_readers_see_one_of_them(tmp_path):
    save(tmp_path, 0)
    faults, seen, stop = [], set(), threading.Event()

    def saving(value):
        try:
            for _ in range(12):
                save(tmp_path, value, more=value == 1)
        except BaseException as fault:
            faults.append(fault)

    def reading():
        try:
            while not stop.is_set():
                seen.add(load(tmp_path))
        except BaseException as fault:
            faults.append(fault)

    savers = [threading.Thread(target=saving, args=(value,)) for value in (1, 2)]
    reader = threading.Thread(target=reading)
    for thread in (reader, *savers):
        thread.start()
    for thread in savers:
        thread.join()
    stop.set()
    reader.join()
    assert faults == [] and seen and seen <= {0, 1, 2}
    assert load(tmp_path) in (1, 2) and hidden(tmp_path) == []


def test_a_saver_that_hangs_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("drum_hf.utils.files._PATIENCE", 0.05)
    save(tmp_path, 1)
    held, go = threading.Event(), threading.Event()
    real = os.link

    def waiting(*places):
        held.set()
        assert go.wait(30)
        return real(*places)

    monkeypatch.setattr(os, "link", waiting)  # while it moves its files into place
    slow = threading.Thread(target=save, args=(tmp_path, 2))
    slow.start()
    assert held.wait(30)
    monkeypatch.setattr(os, "link", real)
    with pytest.raises(SavedFileError, match="another process has been saving there"):
        save(tmp_path, 3)
    assert load(tmp_path) == 2  # complete, and readers need not wait
    go.set()
    slow.join()
    assert load(tmp_path) == 2 and hidden(tmp_path) == []


def test_a_saver_that_is_still_writing_keeps_nobody_waiting(tmp_path):
    save(tmp_path, 1)
    with replacing_folder(tmp_path, owns=OWNS) as partial:
        (partial / "about.json").write_text("2")
        (partial / "part").mkdir()
        save(tmp_path, 3, more=True)
        assert load(tmp_path) == 3 and partial.is_dir()
        for name in ("a", "b"):
            (partial / name).write_text("2")
        (partial / "part" / "c").write_text("2")
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("name", ["part", "about.json"])
def test_what_is_in_the_way_is_named_before_anything_is_replaced(tmp_path, name):
    save(tmp_path / "a", 1)
    (tmp_path / "b").mkdir()
    if name == "part":
        (tmp_path / "a").rename(tmp_path / "c")
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "part").symlink_to(tmp_path / "b")
    else:
        (tmp_path / "a" / name).unlink()
        (tmp_path / "a" / name).mkdir()
    with pytest.raises(SavedFileError, match=name):
        save(tmp_path / "a", 2)
    assert list((tmp_path / "b").iterdir()) == [] and hidden(tmp_path / "a") == []


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", ".saving-0123", "", "x" * 5000, "\x00"])
def test_a_marker_leads_nowhere_else(tmp_path, name):
    save(tmp_path / "a", 1)
    save(tmp_path / "elsewhere", 2)
    (tmp_path / "a" / ".saved").write_text(name)
    assert load(tmp_path / "a") == 1
    (tmp_path / "a" / ".saving-0123456789abcdef").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a" / ".saved").write_text(".saving-0123456789abcdef")
    assert load(tmp_path / "a") == 1


def test_json_within_bounds(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[1, 2]")
    assert read_json(path) == [1, 2]
    with pytest.raises(ValueError, match="at most 5 bytes"):
        read_json(path, limit=5)
    for text in ("[" * 100_000, "[", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "1" * 10_000):
        path.write_text(text)
        with pytest.raises(ValueError):
            read_json(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="is no file"):
        read_json(path)
