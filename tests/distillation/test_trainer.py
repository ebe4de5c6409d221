"""DistillationTrainer in one process against plain PyTorch with full logits."""

import pytest

pytest.importorskip("transformers", reason="DistillationTrainer is a transformers.Trainer")


from distillation.trainer_cases import (
    FAMILIES,
    arguments,
    assert_same_gradients,
    big_batch,
    models,
    ragged,
    trainer,
)


def step(family="llama", *, batch=2, steps=2, data=None, teacher_dtype=None, changes=None, **args):
    """(gradients of the trainer, of one big batch, trainer) of one optimizer step."""
    data = data or ragged()[: batch * steps]
    student, teacher = models(family, **(changes or {}))
    expected, loss = big_batch(student, teacher, data, 0.5)
    student, teacher = models(family, **(changes or {}))
    options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, **args}
    made, keep = trainer(student, teacher, data, args=arguments(**options))
    made.train()
    log = made.state.log_history[0]
    assert log["loss"] == pytest.approx(float(loss), rel=1e-5)
    return keep.gradients, expected, made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("batch", "steps"), [(4, 1), (2, 2), (1, 4)])
def test_gradient_is_that_of_one_big_batch(family, batch, steps):
    gradients, expected, _ = step(family, batch=batch, steps=steps)
    assert_same_gradients(gradients, expected)


@pytest.mark.parametrize("masked", [(0, 1), (1,), (0, 1, 2, 3)])
def test_micro_batches_without_tokens(masked):
    gradients, expected, _ = step(data=ragged((9, 5, 12, 4), masked=masked))
    assert_same_gradients(gradients, expected)
    assert all(g.isfinite().all() for g in gradients.values())


def test_gradient_checkpointing():
    gradients, expected, _ = step(activation_checkpointing=True)
    assert_same_gradients(gradients, expected)


def test_tied_head():
    gradients, expected, made = step("llama", changes={"tie_word_embeddings": True})
    assert made.model.lm_head.weight is made.model.model.embed_tokens.weight
    assert_same_gradients(gradients, expected)
