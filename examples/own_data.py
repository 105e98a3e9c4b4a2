# %% [markdown]
# # Twenty pictures and a CSV
#
# Your data lies in a folder: pictures, and a table that says what is asked about each and what the answer is. This
# script draws such a folder itself, so that it runs anywhere; point `FOLDER` at yours and leave the second cell out.

# %%
import csv
import tempfile
from pathlib import Path

from drum_hf import (
    DemoRetriever,
    DrumTrainer,
    DrumTrainingArguments,
    ICLEvaluator,
    TransformersLVLM,
    load_table,
    pipeline,
)
from drum_hf.data import check_table
from drum_hf.evaluation.strategies import Random, Retrieved, ZeroShot
from drum_hf.experiments.demo import split_table
from drum_hf.playground import make_world

FOLDER = Path(tempfile.mkdtemp()) / "my_folder"
ROUNDS = 3

# %% [markdown]
# The table has a line for each question. Two questions about one picture stand in one `group`: neither may be shown as
# a demonstration for the other.

# %%
FOLDER.mkdir()
pictures = {}
for row in make_world(seed=5, difficulty="easy").support:
    if row.group in pictures or len(pictures) < 20:
        pictures.setdefault(row.group, []).append(row)
with open(FOLDER / "questions.csv", "w", newline="", encoding="utf-8") as file:
    table = csv.writer(file)
    table.writerow(["image", "question", "answer", "group"])
    for number, rows in enumerate(pictures.values()):
        name = f"scene-{number:02}.png"
        rows[0].image.save(FOLDER / name)
        table.writerows([name, row.prompt, row.response, f"scene-{number:02}"] for row in rows)
print((FOLDER / "questions.csv").read_text(encoding="utf-8")[:200])

# %% [markdown]
# Before anything is computed: is every row usable, and which column is read as what?

# %%
report = check_table(FOLDER)
print(report.rows, "rows,", report.images, "pictures; read as", report.columns)
print("faults:", [*report.problems, *report.bad_rows], "notes:", report.notes)

# %% [markdown]
# A quarter of the rows is set aside to be asked. A picture's rows stay together.

# %%
support, queries = split_table(load_table(FOLDER), queries=0.25)
print(len(support), "demonstrations,", len(queries), "queries")

# %% [markdown]
# Training on so little is a matter of seconds here. With a real LVLM, `DrumTrainer(…).plan().describe()` tells
# beforehand how long it will take. LoRA adapters are the better choice for a large encoder: `from_encoder(…,
# lora=True)`.

# %%
lvlm = TransformersLVLM.from_pretrained("playground/lvlm")
retriever = DemoRetriever.from_encoder("playground/clip", support=support)
arguments = DrumTrainingArguments(
    str(FOLDER.parent / "training"),
    rounds=ROUNDS,
    candidates_per_round=8,
    per_device_train_batch_size=16,
    learning_rate=3e-4,
    save_strategy="no",
    logging_strategy="no",
    report_to=[],
)
trainer = DrumTrainer(retriever, lvlm=lvlm, args=arguments)
trainer.train()
print(len(trainer.table), "pairs scored")

# %% [markdown]
# What is it worth? The drafts, which the retriever compares with the demonstrations' answers, are the LVLM's own.

# %%
evaluator = ICLEvaluator(lvlm, support, queries)
bare = evaluator.evaluate(ZeroShot(), shots=0)
evaluator = ICLEvaluator(evaluator.lvlm, support, queries, drafts=dict(zip(queries.ids, bare.answers, strict=True)))
random = evaluator.evaluate([Random(support, seed) for seed in range(3)], shots=4)
drum = evaluator.evaluate(Retrieved("drum", retriever), shots=4)
for result in (bare, random, drum):
    print(f"{result.strategy:10} {result.mean:.2f}")

# %% [markdown]
# Save it, and ask about a new picture.

# %%
retriever.save_pretrained(FOLDER.parent / "retriever")
vqa = pipeline("icl-vqa", model="playground/lvlm", retriever=FOLDER.parent / "retriever", num_shots=4)
asked = next(iter(queries))
(found,) = vqa(image=asked.image, question=asked.prompt)
print(asked.prompt, "→", found["answer"])
print([(shown["id"], shown["response"]) for shown in found["demonstrations"]])
