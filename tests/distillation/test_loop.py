"""count_items() and step() in plain loops, in one process and in two."""

import importlib.util

import pytest
import torch

pytest.importorskip("transformers", reason="pip install 'minitron-kernels[pruning]'")

from distillation import trainer_ranks
from distillation.plain_loop import CE, KL, check_gradients, models, plain_step, ragged
from minitron_kernels.distillation import DistillationLoss, ModelTeacher, attach, step
from minitron_kernels.distillation.trainers.loop import count_items
from tools.ranks import errors_of


def test_micro_batches_are_one_batch():
    batches = ragged(4, empty=(1,))
    student, teacher = models()
    expected, (_, _, tokens) = plain_step(student, teacher, batches)
    attach(student)
    num_items = count_items(batches)
    assert num_items.shape == () and num_items == tokens
    for batch in batches:
        step(
            student,
            ModelTeacher(teacher),
            batch,
            DistillationLoss(kl_weight=KL, ce_weight=CE),
            num_items=num_items,
        ).loss.backward()
    check_gradients({name: p.grad for name, p in student.named_parameters()}, expected)


def test_counts_what_step_counts():
    student, teacher = models()
    attach(student)
    for batch in ragged(3):
        for labels in (True, False):
            given = batch if labels else {k: v for k, v in batch.items() if k != "labels"}
            record = step(student, ModelTeacher(teacher), given, DistillationLoss())
            assert count_items([given]) == record.num_tokens
    assert count_items(ragged(1, empty=(0,))) == 1
    batch = ragged(1)[0]
    labels = batch["labels"].masked_fill(batch["labels"] == -100, -1)
    assert count_items([batch | {"labels": labels}], ignore_index=-1) == count_items([batch])


def test_refusals():
    batch = ragged(1)[0]
    with pytest.raises(TypeError, match=r"pass \[batch\]"):
        count_items(batch)
    with pytest.raises(TypeError, match="used up"):
        count_items(iter([batch]))
    with pytest.raises(TypeError, match="must hold mappings"):
        count_items([torch.zeros(2, 3)])
    with pytest.raises(ValueError, match="got none"):
        count_items([])


NAMES = ["loop", "sharded_logits", "lightning"]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return trainer_ranks.start(tmp_path_factory.mktemp("ranks"), module="loop_rank_cases")


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks(reports, name):
    if name == "lightning" and importlib.util.find_spec("lightning") is None:
        pytest.skip("pip install 'minitron-kernels[lightning]'")
    assert not (errors := errors_of(reports, name)), errors
