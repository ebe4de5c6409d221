"""LMLoss against each sequence alone in numpy float64; what it refuses."""

import numpy as np
import pytest
import torch

from minitron_kernels.pruning import LMLoss
from minitron_kernels.pruning.search import lm_loss
from pruning.tiny_models import tiny_model

SEQUENCES = [[5, 9, 2, 7, 7, 30], [11, 4], [8, 1, 60]]


def alone(model, sequences):
    """Mean -log p of each next token, of sequences that are run one by one."""
    losses = []
    for ids in sequences:
        with torch.no_grad():
            z = model(torch.tensor([ids])).logits[0].double().numpy()
        log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
        losses += [-log_p[i, ids[i + 1]] for i in range(len(ids) - 1)]
    return np.mean(losses)


def padded(left):
    ids, mask = torch.zeros(3, 6, dtype=torch.long), torch.zeros(3, 6, dtype=torch.long)
    for row, tokens in enumerate(SEQUENCES):
        place = slice(6 - len(tokens), 6) if left else slice(0, len(tokens))
        ids[row, place], mask[row, place] = torch.tensor(tokens), 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask == 1, -100)}


def packed():
    positions = [i for tokens in SEQUENCES for i in range(len(tokens))]
    return {
        "input_ids": torch.tensor([[token for tokens in SEQUENCES for token in tokens]]),
        "position_ids": torch.tensor([positions]),
    }


BATCHES = {
    "one by one": [torch.tensor([tokens]) for tokens in SEQUENCES],
    "rows": [torch.tensor(SEQUENCES[0]), torch.tensor([SEQUENCES[1]]), torch.tensor(SEQUENCES[2])],
    "right": [padded(False)],
    "left": [padded(True)],
    "packed": [packed()],
}


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])  # gemma2 has a softcap on its logits
def test_loss_of_sequences(family, monkeypatch):
    model = tiny_model(family, final_logit_softcapping=5.0) if family == "gemma2" else tiny_model(family)
    want = alone(model, SEQUENCES)
    for rows in (1, 4, 10**6):  # of the logits that are converted at a time
        monkeypatch.setattr(lm_loss, "_CHUNK_ELEMENTS", rows * 96)
        for name, batches in BATCHES.items():
            model.train(name == "right")
            assert LMLoss(batches)(model) == pytest.approx(want, rel=1e-5), name
            assert model.training == (name == "right")
    assert LMLoss([torch.tensor([SEQUENCES[0]])])(model) != pytest.approx(want, rel=1e-3)


def test_names_tell_batches_apart():
    names = {LMLoss(batches).name for batches in BATCHES.values()}
    assert len(names) == len(BATCHES)
    assert LMLoss(iter(BATCHES["right"])).name == LMLoss([padded(False)]).name
    assert LMLoss([torch.tensor([[1, 2]])]).name.startswith("lm_loss of 2 tokens, sha256 ")
    assert LMLoss([torch.tensor([[1, 2]])], name="mine").name == "mine"


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "at least one batch, got none"),
        ({"input_ids": torch.tensor([[1, 2]])}, TypeError, "iterable of batches, got dict"),
        ([[1, 2]], TypeError, "must be tensors or mappings, got list"),
        (
            [{"input_ids": torch.ones(1, 3).long(), "labels": torch.tensor([[-100, 1, 1]])}],
            ValueError,
            r"batches\[0\]: labels must equal input_ids at valid tokens, but differ at 1",
        ),
        ([{"input_ids": torch.ones(1, 3).long(), "labels": torch.ones(3)}], ValueError, "shape of input_ids"),
    ],
)
def test_wrong_batches(batches, error, message):
    with pytest.raises(error, match=message):
        LMLoss(batches)


def test_what_a_call_refuses():
    model = tiny_model("llama")
    for batch, message in [
        (torch.tensor([[5], [6]]), "must hold a pair of neighbouring valid tokens"),
        (torch.tensor([[5, 96]]), r"batches\[0\]: input_ids must be in the model's vocabulary"),
        ({"inputs_embeds": torch.zeros(1, 3, 48)}, r"batches\[0\] must have input_ids"),
    ]:
        with pytest.raises(ValueError, match=message):
            LMLoss([batch])(model)
    with pytest.raises(TypeError, match="must have a head that gives logits, got LlamaModel"):
        LMLoss([torch.tensor([[5, 6]])])(model.model)
