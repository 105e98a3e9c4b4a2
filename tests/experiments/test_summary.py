"""Several worlds in one table."""

from __future__ import annotations

import json

import pytest

from drum_hf.errors import SavedFileError
from drum_hf.experiments.summary import main, summarize

LEVELS = {"sit+draft": 0.2, "oracle": 1.0, "drum": 0.8, "drum-rank": 0.4, "epr": 0.6}


def write(folder, seed, task="vqa", shift=0.0):
    folder.mkdir()
    rows = {name: {"metric": level + shift} for name, level in LEVELS.items()}
    (folder / "results.json").write_text(json.dumps({"task": task, "world_seed": seed, "strategies": rows}))
    values = {
        name: {"0": [0.0] * 8, "100": [1.0] * wins + [0.0] * (8 - wins)} for name, wins in (("drum", 6), ("epr", 2))
    }
    (folder / "values.json").write_text(json.dumps(values | {"drum-rank": values["epr"]}))
    return folder


def test_means_gap_and_paired_difference(tmp_path, capsys):
    folders = [write(tmp_path / "a", 1), write(tmp_path / "b", 2, shift=-0.1)]
    text = summarize(folders)
    assert "| drum | 75.0 | 80.0 | 70.0 |" in text
    assert "drum 75%, drum-rank 25%, epr 50%" in text
    assert "| 100 | 75.0 | 25.0 | +50.0 [" in text
    main([str(f) for f in folders])
    assert capsys.readouterr().out == text


def test_missing_results_and_mixed_tasks_are_refused(tmp_path):
    write(tmp_path / "a", 1)
    write(tmp_path / "b", 2, task="captioning")
    with pytest.raises(ValueError, match="one task"):
        summarize([tmp_path / "a", tmp_path / "b"])
    (tmp_path / "b" / "values.json").unlink()
    with pytest.raises(SavedFileError, match=r"values\.json"):
        summarize([tmp_path / "b"])
