"""A Space that shows what a retriever finds and what an LVLM answers. It needs no change: its variables configure it.

DRUM_RETRIEVER  Hub id of a retriever; without one, the small world that ships with drum-hf is shown
DRUM_LVLM       Hub id of the LVLM; by default the one that the retriever learned from
DRUM_ENDPOINT   chat endpoint where DRUM_LVLM runs instead, its key in OPENAI_API_KEY
DRUM_SECOND     untrained strategy beside it: si, st, sit or sit+draft
"""

import os

from drum_hf.cli import main

OPTIONS = ("retriever", "lvlm", "endpoint", "second")

if __name__ == "__main__":
    given = {option: os.environ.get(f"DRUM_{option.upper()}") for option in OPTIONS}
    arguments = [word for option, value in given.items() if value for word in (f"--{option}", value)]
    raise SystemExit(main(["app", *arguments]))
