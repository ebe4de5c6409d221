"""step(): which positions count, micro-batches, packed rows, padding."""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers")

from distillation.plain import (
    assert_same_grads,
    batch_of,
    counted,
    grads_of,
    plain_loss,
    tiny,
)
from minitron_kernels.distillation import (
    DistillationLoss,
    ModelTeacher,
    attach,
    count_targets,
    step,
    targets_of,
)

IDS = torch.arange(10, 18)[None]


def positions_of(batch):
    """The positions that count, by row."""
    targets, mask = targets_of(batch)
    valid = mask if targets is None else targets != -100
    assert int(count_targets(batch)) == int(valid.sum())
    return [row.nonzero().flatten().tolist() for row in valid]


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6]),
        ({"attention_mask": [[1, 1, 1, 1, 1, 0, 0, 0]]}, [0, 1, 2, 3]),  # position 4 predicts padding
        ({"attention_mask": [[0, 0, 1, 1, 1, 1, 1, 1]]}, [2, 3, 4, 5, 6]),
        ({"attention_mask": [[1, 1, 1, 2, 2, 2, 0, 0]]}, [0, 1, 3, 4]),  # numbers sequences
        ({"position_ids": [[0, 1, 2, 0, 1, 0, 0, 1]]}, [0, 1, 3, 6]),
        ({"position_ids": [[5, 6, 7, 8, 9, 10, 11, 12]]}, [0, 1, 2, 3, 4, 5, 6]),
        ({"cu_seq_lens_q": [0, 3, 8]}, [0, 1, 3, 4, 5, 6]),
        ({"cu_seq_lens_q": [0, 3, 6]}, [0, 1, 3, 4]),  # padded behind
        ({"seq_idx": [[0, 0, 0, 1, 1, 1, 1, 1]]}, [0, 1, 3, 4, 5, 6]),
        ({"position_ids": [[0, 1, 2, 0, 1, 2, 3, 4]], "attention_mask": [[1] * 6 + [0] * 2]}, [0, 1, 3, 4]),
    ],
)
def test_positions_that_count(extra, expected, labels):
    batch = {"input_ids": IDS, **{name: torch.tensor(x) for name, x in extra.items()}}
    if labels:
        batch["labels"] = IDS  # no label is -100: nobody may rely on a collator
    assert positions_of(batch) == [expected]
    if labels:
        targets, mask = targets_of(batch)
        assert mask is None and targets[0, expected].tolist() == (IDS[0, expected] + 1).tolist()


def test_labels_that_do_not_count_and_what_is_not_known():
    labels = IDS.clone()
    labels[0, :4] = -100
    assert positions_of({"input_ids": IDS, "labels": labels}) == [[3, 4, 5, 6]]
    shifted = torch.full_like(IDS, -100)
    shifted[0, 2] = 13
    assert positions_of({"input_ids": IDS, "shift_labels": shifted}) == [[2]]
    square = torch.ones(1, 1, 8, 8)
    assert positions_of({"input_ids": IDS, "attention_mask": square, "labels": labels}) == [[3, 4, 5, 6]]
    with pytest.raises(ValueError, match="no labels, and its attention_mask is not"):
        targets_of({"input_ids": IDS, "attention_mask": square})
    with pytest.raises(ValueError, match=r"position_ids must be .* got \(1, 7\)"):
        targets_of({"input_ids": IDS, "position_ids": torch.arange(7)[None]})
    with pytest.raises(ValueError, match="a batch of 2 rows"):
        targets_of({"input_ids": IDS.expand(2, -1), "cu_seq_lens_q": torch.tensor([0, 8])})
    with pytest.raises(ValueError, match="needs input_ids"):
        targets_of({"attention_mask": torch.ones(1, 8)})


@pytest.fixture(scope="module")
def models():
    return tiny(seed=0), tiny(seed=1)


@pytest.mark.parametrize("labels", [False, True])
def test_packed_rows_and_padding_are_the_sequences_apart(models, labels):
    student, teacher = copy.deepcopy(models[0]), models[1]
    lengths, loss = (5, 1, 8), DistillationLoss(ce_weight=0.5 if labels else 0.0)
    apart = [batch_of(1, n, seed=n, labels=False) for n in lengths]
    ids = [batch["input_ids"][0] for batch in apart]
    expected = 0.0
    for row in ids:
        batch = {"input_ids": row[None], "labels": row[None]}
        total = plain_loss(student, teacher.eval(), batch, counted(batch), ce_weight=0.5 * labels, divisor=11)
        total.backward() if len(row) > 1 else None
        expected += float(total.detach())
    gradients = grads_of(student)

    packed = {
        "input_ids": torch.cat(ids)[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
    }
    padded = {
        "input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
        "attention_mask": torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(x) for x in ids], batch_first=True
        ),
    }
    left = {name: x.flip(1) for name, x in padded.items()}
    left["input_ids"] = torch.stack([torch.cat((x.new_zeros(8 - len(x)), x)) for x in ids])
    attach(student)
    for batch in (packed, padded, left):
        if labels:
            batch["labels"] = batch["input_ids"]
        student.zero_grad()
        record = step(student, ModelTeacher(teacher), batch, loss)
        record.loss.backward()
        assert int(record.num_tokens) == 11
        assert float(record.loss.detach()) == pytest.approx(expected, rel=1e-5)
        assert_same_grads(grads_of(student), gradients)


def test_micro_batches_are_one_batch(models):
    student, teacher, batch = copy.deepcopy(models[0]), ModelTeacher(models[1]), batch_of(4, seed=3)
    batch["labels"][1] = -100  # a micro-batch without a label
    loss = DistillationLoss(ce_weight=0.3)
    attach(student)
    whole = step(student, teacher, batch, loss)
    whole.loss.backward()
    gradients = grads_of(student)
    student.zero_grad()
    rows = [{name: x[i : i + 1] for name, x in batch.items()} for i in range(4)]
    total = sum(count_targets(row) for row in rows)
    records = [step(student, teacher, row, loss, num_items=total) for row in rows]
    for record in records:
        record.loss.backward()
    torch.testing.assert_close(sum(x.loss for x in records), whole.loss)
    assert_same_grads(grads_of(student), gradients)
    assert float(records[1].loss.detach()) == 0


def test_a_student_that_was_not_attached(models):
    teacher, batch = ModelTeacher(models[1]), batch_of()
    with pytest.raises(TypeError, match="was not attached: call attach"):
        step(copy.deepcopy(models[0]), teacher, batch, DistillationLoss())

    class Ignores(torch.nn.Module):
        def forward(self, distillation=None, **batch):
            return "logits"

    with pytest.raises(TypeError, match="returned a str"):
        step(Ignores(), teacher, batch, DistillationLoss())
