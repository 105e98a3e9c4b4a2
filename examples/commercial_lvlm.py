# %% [markdown]
# # Answers from an endpoint
#
# A commercial LVLM answers, but rarely tells how likely it finds a given response, so it can't teach. An open LVLM
# that runs here does: the retriever is trained with its feedback, and then chooses demonstrations for the one behind
# the endpoint.
#
# Set `BASE_URL` and `MODEL`, and the environment variable `OPENAI_API_KEY`. The key is read from there and never
# shown. Mind that the playground's pictures and private words are made for its own tiny LVLM; with a commercial one
# use your data.

# %%
from drum_hf import DemoRetriever, DrumTrainer, DrumTrainingArguments, ICLEvaluator, OpenAILVLM, TransformersLVLM
from drum_hf.evaluation.strategies import Random, Retrieved, ZeroShot
from drum_hf.playground import make_world
from drum_hf.scores.cached import CachedLVLM
from drum_hf.scores.store import ScoreStore

BASE_URL = "https://api.openai.com/v1"
MODEL = "gpt-4o-mini"
TEACHER = "playground/lvlm"
ENCODER = "playground/clip"
OUT = "out/commercial"
ROUNDS = 2
QUERIES = 40

# %% [markdown]
# ## Ask the endpoint, without demonstrations
#
# This comes first: a wrong address or key is told now, and not after the training. `max_requests` is a cap that is
# never passed. Answers are kept in a store as they come: stopped by the cap, by Ctrl-C or by a lost connection, the
# same lines go on without paying twice.

# %%
world = make_world(seed=0, task="vqa", difficulty="easy")
queries = world.queries.select(world.queries.ids[:QUERIES])
endpoint = OpenAILVLM(MODEL, base_url=BASE_URL, max_requests=4 * QUERIES, image_detail="low")
lvlm = CachedLVLM(endpoint, ScoreStore(f"{OUT}/answers.sqlite"))
evaluator = ICLEvaluator(lvlm, world.support, queries)
bare = evaluator.evaluate(ZeroShot(), shots=0)

# %% [markdown]
# ## Train with an LVLM that runs here

# %%
retriever = DemoRetriever.from_encoder(ENCODER, support=world.support)
arguments = DrumTrainingArguments(
    OUT,
    rounds=ROUNDS,
    per_device_train_batch_size=64,
    learning_rate=3e-4,
    save_strategy="no",
    logging_strategy="no",
    report_to=[],
)
DrumTrainer(retriever, lvlm=TransformersLVLM.from_pretrained(TEACHER), args=arguments).train()

# %% [markdown]
# ## Ask again, with demonstrations
#
# The zero-shot answers are the drafts that the retriever looks at.

# %%
evaluator = ICLEvaluator(lvlm, world.support, queries, drafts=dict(zip(queries.ids, bare.answers, strict=True)))
random = evaluator.evaluate(Random(world.support), shots=2)
drum = evaluator.evaluate(Retrieved("drum", retriever), shots=2)
for result in (bare, random, drum):
    print(f"{result.strategy:10} {result.mean:.2f}")
print(endpoint.spent)
