# %% [markdown]
# # Mine, score, train: a round at a time
#
# What `DrumTrainer.train()` does in each round, by the public pieces it is made of. Use the trainer for real work: it
# adds checkpoints, several processes, in-batch negatives, and a price before the bill.

# %%
import numpy as np
import torch

from drum_hf import DemoRetriever, ListwiseLVLMLoss, ScoreStore, TransformersLVLM
from drum_hf.playground import make_world
from drum_hf.scores.feedback import Feedback
from drum_hf.training import CandidateTable, mine_candidates

ROWS = 600
ROUNDS = 3
CANDIDATES = 5
EPOCHS = 2

world = make_world(seed=0, task="vqa", difficulty="standard")
rows = world.support.select(world.support.ids[:ROWS])
retriever = DemoRetriever.from_encoder("playground/clip", support=rows)
rng = np.random.default_rng(0)
torch.manual_seed(0)

# %% [markdown]
# `Feedback` is the LVLM asked by id, through a score store: no pair is ever paid for twice. Every row is also a
# training query; its draft is the LVLM's zero-shot answer, never the gold one.

# %%
feedback = Feedback(TransformersLVLM.from_pretrained("playground/lvlm"), rows, rows, store=ScoreStore())
drafts = dict(zip(rows.ids, feedback.drafts(rows.ids), strict=True))
table = CandidateTable(rows.ids)


def make_query(query_id):
    return rows.query(query_id, draft=drafts[query_id])


# %% [markdown]
# **Mine.** The retriever as it is now proposes demonstrations that were never scored for the query. In the first round
# half of them are drawn at random, so that there is something to tell apart.
#
# **Score.** The LVLM says how likely it finds the gold response after each.


# %%
def mine_and_score():
    share = 0.5 if table.rounds == 0 else 0.0
    mined = mine_candidates(retriever, table, make_query, count=CANDIDATES, random_share=share, rng=rng)
    pairs = [(query, (candidate,)) for query, proposals in mined.items() for candidate, _ in proposals]
    table.extend(mined, feedback.score(pairs))


# %% [markdown]
# **Train.** Lists of candidates are drawn from the table, and the encoder learns to rank them as the LVLM does.

# %%
encoder = retriever.encoder
loss_of = ListwiseLVLMLoss(encoder, rank_weight=1.0)  # the list-wise part alone
optimizer = torch.optim.AdamW(loss_of.parameters(), lr=3e-4)
size = min(4, CANDIDATES)


def embed(items):
    return {name: part.to(encoder.device) for name, part in encoder.preprocess(items).items()}


def train():
    encoder.train()
    losses = []
    for _ in range(EPOCHS):
        for batch in np.array_split(rng.permutation(rows.ids), max(1, len(rows) // 32)):
            lists = [table.sample(query, size, rng) for query in batch]
            asked = [make_query(query) for query in batch]
            columns = [embed([{"image": q.image, "text": [q.prompt, q.draft]} for q in asked])]
            for place in range(size):
                shown = [rows[ids[place]] for ids, _ in lists]
                columns.append(embed([{"image": d.image, "text": [d.prompt, d.response]} for d in shown]))
            labels = torch.tensor([scores for _, scores in lists], device=encoder.device)
            loss = loss_of(columns, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    encoder.eval()
    retriever.mark_stale()  # its index is of the encoder as it was
    return losses


# %% [markdown]
# Round after round the table grows by `CANDIDATES` pairs a query. The last column says what it is good for: the
# likelihood a token of the gold response after the one demonstration that the retriever ranks first, in the mean over
# all rows.


# %%
def first_ranked():
    found, _ = retriever.retrieve_ids([make_query(query) for query in rows.ids], 1)
    pairs = [(query, (ids[0],)) for query, ids in zip(rows.ids, found, strict=True)]
    return float(np.exp(feedback.score(pairs)).mean())


reached = [first_ranked()]
print("round  pairs  loss           first-ranked")
print(f"{0:5}  {0:5}  {'':13}  {reached[-1]:12.3f}")
for number in range(1, ROUNDS + 1):
    mine_and_score()
    losses = train()
    reached.append(first_ranked())
    print(f"{number:5}  {len(table):5}  {losses[0]:.3f} → {losses[-1]:.3f}  {reached[-1]:12.3f}")

# %% [markdown]
# The table is a parquet file, one pair a row: `table.save("candidates.parquet")`.

# %%
print("query, candidate, score, place in the ranking, round, set-level score")
for pair in list(table.rows())[:: max(1, CANDIDATES // 2)][:6]:
    print(pair)
