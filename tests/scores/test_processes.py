"""How work is dealt out to processes; what several of them really do is in test_processes.py."""

from __future__ import annotations

import logging
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drum_hf import errors
from drum_hf.scores.processes import ALONE, Processes, _error_of, shard

names = st.lists(st.sampled_from("abcdefgh"), max_size=60)


@settings(max_examples=200, deadline=None)
@given(groups=names, count=st.integers(1, 5))
def test_shares_are_whole_groups_and_even(groups, count):
    shares = shard(groups, count)
    assert len(shares) == count
    assert sorted(i for share in shares for i in share) == list(range(len(groups)))
    assert all(share == sorted(share) for share in shares)
    even = -(-len(groups) // count)
    sizes = Counter(groups)
    owners = {g: {r for r, share in enumerate(shares) for i in share if groups[i] == g} for g in sizes}
    for group, size in sizes.items():
        assert len(owners[group]) <= -(-size // even), "cut into no more pieces than it must"
    largest = max((min(size, even) for size in sizes.values()), default=0)
    assert max(map(len, shares)) - min(map(len, shares)) <= largest  # as a list schedule promises


@given(number=st.integers(0, 40), count=st.integers(1, 7))
def test_what_shares_nothing_is_dealt_out_evenly(number, count):
    sizes = [len(share) for share in shard([()] * number, count)]
    assert sum(sizes) == number and max(sizes) - min(sizes) <= 1


def test_a_group_larger_than_an_even_share_is_cut():
    shares = shard(["big"] * 90 + ["a", "b"] * 5, 4)
    assert sorted(map(len, shares)) == [25, 25, 25, 25]
    with pytest.raises(ValueError, match="at least one process"):
        shard([1], 0)


def test_one_process_waits_for_nobody():
    assert ALONE.gather(lambda: 3) == [3] and ALONE.from_main(lambda: 4) == 4
    ALONE.check()
    with pytest.raises(KeyError):
        ALONE.gather(lambda: {}["x"])
    assert ALONE.is_main and ALONE.is_local_main


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ContextOverflowError", errors.ContextOverflowError),
        ("MissingIdError", errors.MissingIdError),
        ("KeyboardInterrupt", KeyboardInterrupt),
        ("KeyError", RuntimeError),
        ("annotations", RuntimeError),  # a name of that module, but no error
    ],
)
def test_another_processs_error_keeps_its_name(name, kind):
    error = _error_of(name, "process 2 of 4: ", "what came")
    assert type(error) is kind
    assert kind is KeyboardInterrupt or (str(error).startswith("process 2 of 4: ") and "what came" in str(error))


def test_without_a_launch_there_is_one_process(monkeypatch, caplog):
    for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Processes.current() == ALONE and not caplog.records
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Processes.current() == ALONE and not caplog.records
    # what `accelerate launch --cpu --num_processes 2` leaves behind, which is one process
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with caplog.at_level(logging.WARNING):
        assert Processes.current() == ALONE
    assert "torchrun" in caplog.text
