"""The house in figures: `python -m tests.house`. Rooms, import cycles, lines, and files that tasks enter."""

from __future__ import annotations

import ast
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import drum_hf

PACKAGE = Path(drum_hf.__file__).parent

#: Data flows down this list: a room imports only from rooms above it. A content key, in `types`, is made of pixels,
#: which `utils` opens.
ROOMS = (
    *("errors", "utils", "types", "data", "encoders", "index", "lvlm", "scores", "selection", "retriever", "training"),
    *("tuning", "evaluation", "pipelines", "serving", "integrations", "experiments", "playground", "cli"),
)
#: What serves the makers of the library rather than its users.
WORKSHOP = ("experiments", "playground.building")


def sources(package: Path = PACKAGE) -> dict[str, ast.Module]:
    """Dotted name within the package -> its syntax tree; "" is the package itself."""
    trees = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return trees


def imports(name: str, tree: ast.Module, trees: dict[str, ast.Module]) -> Iterator[tuple[int, str]]:
    """(line, module of the package) of every import, wherever it stands: lazy ones and those for types as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
            found = [".".join(parts[1:]) for parts in modules if parts[0] == PACKAGE.name]
        elif isinstance(node, ast.ImportFrom):
            within = node.level > 0
            is_package = any(other.startswith(f"{name}.") for other in trees) or not name
            above = name.split(".") if name else []
            above = above[: len(above) - node.level + is_package] if within else []
            named = (node.module or "").split(".") if node.module else []
            if not within and named[:1] != [PACKAGE.name]:
                continue
            base = ".".join(above + (named if within else named[1:]))
            inner = [f"{base}.{alias.name}".strip(".") for alias in node.names]
            found = [module if module in trees else base for module in inner]
        else:
            continue
        yield from ((node.lineno, module) for module in dict.fromkeys(found) if module != name)


def cycles(trees: dict[str, ast.Module]) -> list[set[str]]:
    """Sets of files that import one another, by any way round (Tarjan)."""
    graph = {name: {module for _, module in imports(name, tree, trees)} for name, tree in trees.items() if name}
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in graph[name] & graph.keys():
            if other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            ring = set(stack[stack.index(name) :])
            del stack[stack.index(name) :]
            if len(ring) > 1:
                found.append(ring)

    for name in graph:
        if name not in order:
            visit(name)
    return found


def entered(task: Callable[[], None]) -> set[str]:
    """Files of the package in which a function runs while `task` does."""
    files: set[str] = set()

    def watch(frame, event, _):
        if event == "call" and frame.f_code.co_name != "<module>":
            files.add(frame.f_code.co_filename)

    import threading

    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        task()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    root = str(PACKAGE)
    return {file[len(root) + 1 :] for file in files if file.startswith(root) and "/playground/" not in file}


def make_folder(folder: Path) -> Path:
    """Twelve small pictures and their table."""
    from PIL import Image

    lines = ["image,prompt,response"]
    for number, colour in enumerate(("red", "green", "blue", "gray", "cyan", "pink") * 2):
        Image.new("RGB", (32, 32 + number), colour).save(folder / f"{number}.png")
        lines.append(f"{number}.png,what colour is it?,{colour}")
    (folder / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder


def tasks(folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """What a user does every day, by name; what comes before the task itself is done while it is drawn."""
    import torch

    from drum_hf import DemoRetriever, DrumTrainer, DrumTrainingArguments, TransformersLVLM, load_table, pipeline
    from drum_hf.scores.feedback import Feedback
    from drum_hf.training.losses import ListwiseLVLMLoss

    make_folder(folder)
    args = DrumTrainingArguments(
        str(folder / "out"), rounds=1, num_train_epochs=1, candidates_per_round=4, list_size=4, report_to="none"
    )

    def train() -> None:
        lvlm = TransformersLVLM.from_pretrained("playground/lvlm")
        retriever = DemoRetriever.from_encoder("playground/clip", support=load_table(folder))
        DrumTrainer(retriever, lvlm=lvlm, args=args).train()
        retriever.save_pretrained(folder / "retriever")

    yield "(a) table -> train -> save", train
    retriever = DemoRetriever.from_pretrained(folder / "retriever")
    vqa = pipeline("icl-vqa", model="playground/lvlm", retriever=retriever, num_shots=2)
    asked = load_table(folder)
    picture = asked[asked.ids[0]].image
    yield "(b) pipeline -> answer", lambda: vqa(image=picture, question="what colour is it?")
    lvlm = TransformersLVLM.from_pretrained("playground/lvlm")
    feedback, encoder, ids = Feedback(lvlm, asked, asked), retriever.encoder, asked.ids[:5]

    def score_and_loss() -> None:
        scores = feedback.score([(ids[0], (other,)) for other in ids[1:]])
        items = [{"image": asked[i].image, "text": [asked[i].prompt, asked[i].response]} for i in ids]
        features = [encoder[0].preprocess([item]) for item in items]
        loss = ListwiseLVLMLoss(encoder)(features, torch.tensor(scores[None], dtype=torch.float32))
        assert torch.isfinite(loss)

    yield "(c) pair -> score -> loss", score_and_loss


def main() -> None:
    trees = sources()
    lines = {name: text.count("\n") for name, text in texts().items()}
    rooms = {name.partition(".")[0] for name in trees if name} - {"errors", "types"}
    workshop = sum(n for name, n in lines.items() if any(f"{name}.".startswith(f"{part}.") for part in WORKSHOP))
    print(f"rooms: {len(rooms)}")
    print(f"import cycles between files: {len(cycles(trees))}")
    print(f"files: {len(trees)}, lines: {sum(lines.values())}, of which the workshop: {workshop}")
    with tempfile.TemporaryDirectory() as made:
        for name, task in tasks(Path(made)):
            files = entered(task)
            print(f"files entered, {name}: {len(files)}")
            if "-v" in sys.argv:
                print("    " + " ".join(sorted(files)))


def texts() -> dict[str, str]:
    """Dotted name -> source."""
    files = {path.relative_to(PACKAGE): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    return {".".join(path.with_suffix("").parts): text for path, text in files.items()}


if __name__ == "__main__":
    main()
