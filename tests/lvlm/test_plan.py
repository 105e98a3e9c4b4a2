"""The plan of a scoring call: every answer read once, every shared token run once."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from drum_hf.lvlm.local.engine import Leaf, Line, Node, Plan, Target, make_plan

SAVINGS = ((True, False), (False, True), (True, True))


def line(request: int, group: str, tags: list[int], answers: list[tuple[int, tuple[int, ...]]]) -> Line:
    """A line whose token ids are its tags, an image (a negative tag) being the token 1."""
    array = np.array(tags)
    starts = [i for i, tag in enumerate(tags) if tag < 0 and (i == 0 or tags[i - 1] != tag)]
    targets = [Target(request, number, start, ids) for number, (start, ids) in enumerate(answers)]
    images = [str(tags[i]) for i in starts]
    return Line(request, group, np.where(array < 0, 1, array), array, images, starts, targets)


@st.composite
def calls(draw: st.DrawFn) -> list[Line]:
    """Requests after shared demonstrations, each with one to four answers."""
    lines = []
    request = 0
    for group in range(draw(st.integers(1, 3))):
        shown = draw(st.lists(st.sampled_from([3, 4, -1, -2]), max_size=14))
        for _ in range(draw(st.integers(1, 4))):
            asked = draw(st.lists(st.sampled_from([3, 5, -1, -3]), min_size=1, max_size=9))
            context = [2, *shown, *asked]
            answers = draw(st.lists(st.lists(st.integers(6, 8), min_size=1, max_size=3), min_size=1, max_size=4))
            for number, ids in enumerate({tuple(a) for a in answers}):
                own = line(request, str(group), [*context, *ids[:-1]], [(len(context) - 1, ids)])
                own.targets = [Target(request, number, len(context) - 1, ids)]
                lines.append(own)
            request += 1
    return lines


def walk(plan: Plan) -> list[tuple[list[Node], Leaf]]:
    """Every leaf with the beginnings it continues."""
    found: list[tuple[list[Node], Leaf]] = [([], leaf) for leaf in plan.leaves]
    for node in plan.nodes:
        found += [([node], leaf) for leaf in node.leaves]
        found += [([node, child], leaf) for child in node.nodes for leaf in child.leaves]
    return found


@given(calls(), st.booleans(), st.booleans(), st.sampled_from([1, 8]))
def test_each_line_is_run_whole_and_each_target_by_its_own_line(lines, share, pack, least):
    plan = make_plan(lines, share=share, pack=pack, least=least)
    found = walk(plan)
    assert Counter(id(own) for _, leaf in found for own in leaf.lines) == Counter(map(id, lines))
    for nodes, leaf in found:
        assert all(a.stop == b.start for a, b in pairwise(nodes)) and (not nodes or nodes[0].start == 0)
        assert leaf.start == (nodes[-1].stop if nodes else 0)
        assert leaf.stem == len(leaf.lines[0].ids) or len(leaf.lines) > 1
        for own in leaf.lines:
            # what was run for it is what it says, images included, and what is read was not run before
            for node in nodes:
                assert own.tags[node.start : node.stop].tolist() == node.line.tags[node.start : node.stop].tolist()
            assert own.tags[: leaf.stem].tolist() == leaf.lines[0].tags[: leaf.stem].tolist()
            assert leaf.start <= own.start


@given(calls())
def test_sharing_never_costs_tokens(lines):
    alone = make_plan(lines, share=False, pack=False)
    assert alone.tokens == sum(len(own.ids) for own in lines)
    counts = [make_plan(lines, share=s, pack=p, least=1).tokens for s, p in SAVINGS]
    assert all(count <= alone.tokens for count in counts) and counts[2] <= min(counts[:2])


def test_an_image_is_shared_with_itself_alone():
    """Two pictures have the same tokens; only the tags tell them apart."""
    shown = [2, 3, 3, 3, 3, 3, 3, 3]
    same = [line(r, "g", [*shown, -1, -1, *q, 9], [(10, (6,))]) for r, q in enumerate(([4], [5]))]
    other = [line(r, "g", [*shown, i, i, 4, 9], [(10, (6,))]) for r, i in enumerate((-1, -2))]
    (node,) = make_plan(same, share=True, pack=True).nodes
    assert node.stop == 10 and node.line.images_between(0, 10) == ["-1"] and len(node.leaves) == 2
    (node,) = make_plan(other, share=True, pack=True).nodes
    assert node.stop == 8 and node.line.images_between(0, 8) == []
    assert [leaf.lines[0].images_between(8, 99) for leaf in node.leaves] == [["-1"], ["-2"]]


def test_labels_share_all_but_themselves():
    """Eighty labels of two tokens: one token each beside the conversation."""
    context = list(range(10, 40))
    labels = [line(0, "g", [*context, 50 + i], [(29, (50 + i, 7))]) for i in range(80)]
    packed = make_plan(labels, share=True, pack=True)
    (leaf,) = packed.leaves
    assert leaf.stem == 30 and packed.tokens == 30 + 80
    split = make_plan(labels, share=True, pack=False)
    (node,) = split.nodes
    # Without branches the last token of the conversation is run for each label: it predicts the label's first.
    assert node.stop == 29 and split.tokens == 29 + 80 * 2
