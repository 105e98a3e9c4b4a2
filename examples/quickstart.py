# %% [markdown]
# # Train, save, load, answer
#
# A demonstration retriever trained with an LVLM's feedback, in one script and without a Hub. It takes about two
# minutes on two CPU cores. `playground/clip` and `playground/lvlm` are tiny models that ship with the package; put a
# Hub id or a folder in their place, and a table of your own in place of the world.

# %%
from pathlib import Path

from drum_hf import DemoRetriever, DrumTrainer, DrumTrainingArguments, TransformersLVLM, pipeline
from drum_hf.playground import make_world

WORLD = "standard"
ROUNDS = 2
OUT = Path("out/quickstart")

# %% [markdown]
# A world is a table of pictures, questions and answers whose words only demonstrations can teach. Its support set is
# what demonstrations are taken from, and also what the retriever is trained on: a row never demonstrates itself.

# %%
world = make_world(seed=0, task="vqa", difficulty=WORLD)
lvlm = TransformersLVLM.from_pretrained("playground/lvlm")
retriever = DemoRetriever.from_encoder("playground/clip", support=world.support, strategy="sit+draft")
arguments = DrumTrainingArguments(
    str(OUT / "training"),
    rounds=ROUNDS,
    per_device_train_batch_size=64,
    learning_rate=3e-4,
    save_strategy="no",
    logging_strategy="no",
    report_to=[],
)
DrumTrainer(retriever, lvlm=lvlm, args=arguments).train()
retriever.save_pretrained(OUT / "retriever")

# %% [markdown]
# Anywhere else, the folder (or the Hub id, after `push_to_hub`) is all that is needed.

# %%
retriever = DemoRetriever.from_pretrained(OUT / "retriever")
vqa = pipeline("icl-vqa", model="playground/lvlm", retriever=retriever, num_shots=1)
rows = list(world.queries)[:40]
answers = vqa([{"image": row.image, "question": row.prompt} for row in rows])
right = sum(answer[0]["answer"] == row.response for answer, row in zip(answers, rows, strict=True))
print(f"{right} of {len(rows)} queries answered rightly with one retrieved demonstration")
print(answers[0])
