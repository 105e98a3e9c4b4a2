"""The README's Python runs: what names a Hub id there is executed against the playground."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from drum_hf import DemoRetriever
from drum_hf.playground import encoder_path, lvlm_path, make_world

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A user's folder: pictures, a table, and a retriever where the demo's would be."""
    import json

    monkeypatch.chdir(tmp_path)
    world = make_world(31, difficulty="easy")
    rows = list(world.support)[:24]
    data = tmp_path / "my_folder"
    data.mkdir()
    lines = []
    for number, row in enumerate(rows):
        row.image.save(data / f"{number}.png")
        lines.append({"id": f"q{number}", "image": f"{number}.png", "prompt": row.prompt, "response": row.response})
    (data / "table.jsonl").write_text("\n".join(map(json.dumps, lines)))
    DemoRetriever.from_encoder(encoder_path(), support=str(data)).save_pretrained(tmp_path / "out/demo/retriever")
    return tmp_path


def test_python_blocks_run(folder, monkeypatch, capsys):
    assert len(BLOCKS) == 2
    pushed = []
    monkeypatch.setattr(DemoRetriever, "push_to_hub", lambda self, repo_id, **_: pushed.append(repo_id))
    for block in BLOCKS:
        code = block.replace("HuggingFaceTB/SmolVLM-256M-Instruct", lvlm_path())
        code = code.replace("openai/clip-vit-base-patch32", encoder_path())
        exec(compile(code, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert len(re.findall(r"^'.*': without demonstrations '.*', with four '.*', gold '.*'$", said, re.MULTILINE)) == 4
    assert pushed == ["me/drum-mine"]
    assert len(DemoRetriever.from_pretrained("out/mine/retriever")) == 24


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (README.parent / target).exists(), target
