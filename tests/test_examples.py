"""The examples run, with small settings, and do what they say."""

from __future__ import annotations

import base64
import io
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from fault_server import serve
from PIL import Image

from drum_hf import Demonstration, Query, TransformersLVLM, load_table
from drum_hf.types import ICLRequest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, **settings: Any) -> dict[str, Any]:
    """Run a script with other values for the settings at its head; returns what it leaves behind."""
    code = (EXAMPLES / name).read_text(encoding="utf-8")
    for setting, value in settings.items():
        code, found = re.subn(rf"^{setting} = .*$", f"{setting} = {value!r}", code, count=1, flags=re.MULTILINE)
        assert found, f"{name} has no setting {setting}"
    left: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, str(EXAMPLES / name), "exec"), left)
    return left


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_example_is_run_here_and_named_in_the_readme():
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == set(re.findall(r'run\(\s*"(\w+\.py)"', Path(__file__).read_text(encoding="utf-8")))
    assert scripts == set(re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8")))


def test_quickstart(capsys):
    left = run("quickstart.py", WORLD="easy", ROUNDS=1)
    assert left["right"] >= 0.6 * len(left["rows"]) == 24
    assert "of 40 queries answered rightly" in capsys.readouterr().out


def test_own_data(capsys):
    left = run("own_data.py", ROUNDS=1)
    assert len(list(left["FOLDER"].glob("*.png"))) == 20 and len(load_table(left["FOLDER"])) == 40
    assert left["report"].ok and left["bare"].mean == 0.0
    assert left["drum"].mean > left["random"].mean
    assert "faults: []" in capsys.readouterr().out


def test_iterative_mining(capsys):
    left = run("iterative_mining.py", ROWS=240, ROUNDS=2, CANDIDATES=3, EPOCHS=1)
    assert [len(left["table"]), left["table"].rounds] == [240 * 2 * 3, 2]
    assert left["reached"][-1] > left["reached"][0] + 0.05  # what is ranked first has become more useful
    assert re.search(r"^    2   1440  ", capsys.readouterr().out, flags=re.MULTILINE)


class PlaygroundChat:
    """The playground's LVLM as `FaultServer` wants a chat: OpenAI's messages in, OpenAI's completion out."""

    def __init__(self) -> None:
        self.lvlm = TransformersLVLM.from_pretrained("playground/lvlm", device="cpu")
        self.lock = threading.Lock()

    @staticmethod
    def turn(content: list[dict[str, Any]]) -> tuple[Image.Image, str]:
        picture, text = content
        data = base64.b64decode(picture["image_url"]["url"].partition(",")[2])
        return Image.open(io.BytesIO(data)), text["text"]

    def reply(self, body: dict[str, Any], logprobs: str) -> dict[str, Any]:
        *shown, asked = body["messages"]
        demonstrations = tuple(
            Demonstration(str(number), *self.turn(user["content"]), assistant["content"])
            for number, (user, assistant) in enumerate(zip(shown[::2], shown[1::2], strict=True))
        )
        request = ICLRequest(Query(*self.turn(asked["content"])), demonstrations)
        with self.lock:
            (text,) = self.lvlm.generate([request], max_new_tokens=body["max_tokens"])
        message = {"role": "assistant", "content": text}
        return {
            "object": "chat.completion",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
        }


def test_commercial_lvlm(monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-test")
    with serve(PlaygroundChat()) as server:
        left = run("commercial_lvlm.py", BASE_URL=server.url, MODEL="tiny", ROUNDS=1, QUERIES=20)
    assert left["drum"].mean >= left["random"].mean + 0.4 and left["bare"].mean == 0.0
    assert len(server.bodies) == left["endpoint"].spent.requests <= 60
    assert server.headers[0]["Authorization"] == "Bearer sk-of-the-test"
    said = capsys.readouterr()
    assert "60 requests" in said.out and "sk-of-the-test" not in said.out + said.err
