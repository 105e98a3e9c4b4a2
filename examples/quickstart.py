"""Train a demonstration retriever with an LVLM's feedback, save it, load it, and answer with a pipeline.

Run: python examples/quickstart.py [--rounds 2] [--out out/quickstart]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from drum_hf import DemoRetriever, DrumTrainer, DrumTrainingArguments, TransformersLVLM, pipeline
from drum_hf.playground import make_world


def main(argv: list[str] | None = None) -> float:
    """Returns the share of forty queries that the pipeline answers rightly."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--world", default="standard")
    parser.add_argument("--out", type=Path, default=Path("out/quickstart"))
    options = parser.parse_args(argv)

    world = make_world(seed=0, task="vqa", difficulty=options.world)
    lvlm = TransformersLVLM.from_pretrained("playground/lvlm")
    retriever = DemoRetriever.from_encoder("playground/clip", support=world.support, strategy="sit+draft")
    arguments = DrumTrainingArguments(
        str(options.out / "training"),
        rounds=options.rounds,
        per_device_train_batch_size=64,
        learning_rate=3e-4,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
    )
    DrumTrainer(retriever, lvlm=lvlm, args=arguments).train()
    retriever.save_pretrained(options.out / "retriever")

    retriever = DemoRetriever.from_pretrained(options.out / "retriever")
    vqa = pipeline("icl-vqa", model="playground/lvlm", retriever=retriever, num_shots=1)
    rows = list(world.queries)[:40]
    answers = vqa([{"image": row.image, "question": row.prompt} for row in rows])
    right = sum(answer[0]["answer"] == row.response for answer, row in zip(answers, rows, strict=True))
    print(f"{right} of {len(rows)} queries answered rightly with one retrieved demonstration")
    print(answers[0])
    return right / len(rows)


if __name__ == "__main__":
    main()
