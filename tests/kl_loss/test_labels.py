"""shift_labels(): targets of positions, of labels that stand at the tokens themselves."""

import pytest
import torch
import torch.nn.functional as F

import minitron_kernels as mk


def test_shift_labels():
    labels = torch.tensor([[1, 2, 3, 4], [5, -100, 7, 8]])
    before = labels.clone()
    shifted = mk.shift_labels(labels)
    assert shifted.tolist() == [[2, 3, 4, -100], [-100, 7, 8, -100]] and torch.equal(labels, before)
    assert mk.shift_labels(labels.int(), ignore_index=-1).dtype == torch.int32
    assert mk.shift_labels(labels, ignore_index=-1)[0].tolist() == [2, 3, 4, -1]
    for shape in ((0,), (2, 0), (1,), (2, 1)):
        shifted = mk.shift_labels(torch.ones(shape, dtype=torch.int64))
        assert shifted.shape == shape and (shifted == -100).all()
    for wrong, error in ((torch.ones(3), TypeError), ([1, 2], TypeError), (torch.tensor(1), ValueError)):
        with pytest.raises(error, match="labels must be"):
            mk.shift_labels(wrong)


def test_shift_labels_is_what_transformers_do():
    """The loss of shifted labels is that of logits shifted against them."""
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 9, 30, generator=g), torch.randint(0, 30, (2, 9), generator=g)
    labels[0, :3] = -100
    record = mk.kl_loss(logits, logits, labels=mk.shift_labels(labels), return_parts=True)
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 30), labels[:, 1:].reshape(-1))
    assert record.ce.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("ignore_index", [2**32 + 5, -(2**40), 2**31])
def test_an_ignore_index_that_the_labels_cannot_hold(ignore_index):
    """It is no label of theirs; wrapped around to int32 it would be that of a token."""
    logits = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 5], dtype=torch.int32)
    options = {"ignore_index": ignore_index, "reduction": "none"}
    loss = mk.kl_loss(logits[0], logits[1], labels=labels, **options)
    assert torch.equal(loss, mk.kl_loss(logits[0], logits[1], reduction="none")) and (loss > 0).all()
