"""Negatives of all processes: loss and gradient of several processes are those of one with the joint batch."""

from __future__ import annotations

import gathering_processes
import numpy as np
import pytest
import torch
from gathering_processes import BATCH, KINDS, plain_columns, prepared, step
from processes import run_processes
from tiny_encoders import tiny_clip
from two_processes import fingerprints, make_trainer

from drum_hf.training import ListwiseLVLMLoss


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def several(request, tmp_path_factory):
    """Folder, number of processes, and what each computed."""
    folder = tmp_path_factory.mktemp("several")
    tiny_clip(folder)
    statuses, results = run_processes(folder, script=gathering_processes.__file__, count=request.param)
    logs = [(folder / f"log{rank}").read_text()[-3000:] for rank in range(request.param)]
    assert statuses == [0] * request.param, logs
    return folder, request.param, results


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_one_process_with_the_joint_batch(several, kind):
    folder, count, results = several
    trainer = prepared(folder, kind)
    joint = step(trainer, list(range(BATCH)))
    size = BATCH // count
    shares = [set().union(*joint["shown"][start : start + size]) for start in range(0, BATCH, size)]
    assert shares[0] & shares[1] and shares[0] - shares[1]  # some stand in both batches, and not all
    for result in results:
        assert result[kind]["loss"] == pytest.approx(joint["loss"].item(), rel=1e-5)
        assert result[kind]["grads"].keys() == joint["grads"].keys()
        largest = max(float(grad.abs().max()) for grad in joint["grads"].values())
        for name, grad in joint["grads"].items():
            scale = max(float(grad.abs().max()), largest / 100)  # a key's bias has none but by rounding
            np.testing.assert_allclose(result[kind]["grads"][name], grad.flatten(), atol=1e-4 * scale, err_msg=name)
        assert "log_temperature" in result[kind]["grads"]


def test_without_gathering_it_is_another_loss(several):
    _, _, results = several
    assert results[0]["apart"]["loss"] != pytest.approx(results[0]["soft"]["loss"], rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_processes_without_any_candidate_change_nothing(several, kind):
    for result in several[2]:
        assert result[f"{kind} empty"]["loss"] == 0.0
        assert all(np.abs(grad).max() == 0.0 for grad in result[f"{kind} empty"]["grads"].values())


def test_columns_of_a_plain_data_set_are_gathered_too(several):
    results = several[2]
    queries, demonstrations, scores = plain_columns()
    reps = [rep.requires_grad_() for rep in (queries, *demonstrations)]
    loss = ListwiseLVLMLoss(torch.nn.Identity(), rank_weight=0.3)
    value = loss.calculate_loss([[rep] for rep in reps], scores)
    value.backward()
    for result in results:
        assert result["plain"]["loss"] == pytest.approx(value.item(), rel=1e-5) != result["plain apart"]["loss"]
        for column, rep in enumerate(reps):
            grads = np.concatenate([part[column] for part in result["plain"]["grads"]])
            np.testing.assert_allclose(grads, rep.grad, atol=1e-6)


def test_labels_that_do_not_say_where_demonstrations_come_from_are_refused(several):
    kind, message = several[2][0]["bare"]
    assert kind == "ValueError" and "gather_negatives=True" in message


@pytest.mark.parametrize("kind", ["soft", "cached"])
def test_training_is_that_of_one_process_with_the_joint_batch(several, kind, tmp_path):
    folder, count, results = several
    trainer = make_trainer(
        folder / "clip", tmp_path, rounds=1, epochs_per_round=2, per_device_train_batch_size=4 * count, **KINDS[kind]
    )
    trainer.train()
    for result in results:
        trained = result[f"trained {kind}"]
        assert trained["temperature"] == pytest.approx(trainer.loss.temperature.item(), rel=1e-5)
        for name, expected in fingerprints(trainer.retriever.encoder).items():
            np.testing.assert_allclose(trained["weights"][name], expected, atol=1e-5, err_msg=name)
