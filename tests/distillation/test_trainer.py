"""DistillationTrainer in one process against plain PyTorch with full logits."""

import pytest

pytest.importorskip("transformers", reason="DistillationTrainer is a transformers.Trainer")


import torch

from distillation.trainer_cases import (
    FAMILIES,
    arguments,
    assert_same_gradients,
    big_batch,
    models,
    ragged,
    terms,
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


def sequences(lengths, seed=0):
    """Rows with all their tokens, for packing."""
    return ragged(lengths, seed=seed)


def test_packed_without_padding():
    from transformers import DataCollatorWithFlattening

    data = sequences((9, 5, 12, 7))
    student, teacher = models()
    expected, _ = big_batch(student, teacher, data, 0.5)
    student, teacher = models()
    lists = [{name: x.tolist() for name, x in row.items()} for row in data]
    args = arguments(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    made, keep = trainer(student, teacher, lists, args=args, data_collator=DataCollatorWithFlattening())
    made.train()
    assert_same_gradients(keep.gradients, expected)


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["q_proj", "lm_head"]])
def test_adapters(targets):
    peft = pytest.importorskip("peft", reason="adapters are peft's")
    data = ragged()[:4]

    def adapted():
        student, teacher = models()
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        return peft.get_peft_model(student, config), teacher

    expected, _ = big_batch(*adapted(), data, 0.5)
    assert expected and all("lora" in name for name in expected)
    student, teacher = adapted()
    made, keep = trainer(student, teacher, data, args=arguments(gradient_accumulation_steps=2))
    made.train()
    assert_same_gradients(keep.gradients, expected)
    assert set(keep.gradients) == set(expected)


def test_teacher_in_bf16_and_student_in_fp32():
    """The teacher's bf16 states times its bf16 head, multiplied in fp32, are its logits."""
    data = ragged()[:4]

    class InFp32(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            from types import SimpleNamespace

            hidden = self.model.model(ids).last_hidden_state
            return SimpleNamespace(logits=hidden.float() @ self.model.lm_head.weight.float().T)

    student, teacher = models()
    expected, _ = big_batch(student, InFp32(teacher.bfloat16()), data, 0.5)
    student, teacher = models()
    made, keep = trainer(
        student,
        teacher.bfloat16(),
        data,
        args=arguments(per_device_train_batch_size=1, gradient_accumulation_steps=4),
    )
    made.train()
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}
    # the teacher rounds to bf16 within its layers, row by row the same; attention may round once differently
    assert_same_gradients(keep.gradients, expected, ulps=2**12)


def no_worse(actual, plain, truth, factor=2.0):
    """Errors of all gradients together are at most `factor` times those of plain PyTorch, against fp32."""

    def error(found):
        return sum(float((found[name].float() - x).square().sum()) for name, x in truth.items()) ** 0.5

    assert error(actual) <= factor * error(plain), (error(actual), error(plain))


def test_autocast_in_bf16():
    data = ragged()[:4]
    truth, _ = big_batch(*models(), data, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        plain, _ = big_batch(*models(), data, 0.5)
    made, keep = trainer(*models(), data, args=arguments(gradient_accumulation_steps=2, bf16=True))
    made.train()
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}
    no_worse(keep.gradients, plain, truth)
    assert any((keep.gradients[name] != x).any() for name, x in truth.items())


def test_gradients_of_a_scaled_loss_in_fp16():
    """Under a GradScaler's factor no gradient is lost that plain PyTorch keeps."""
    from distillation.trainer_cases import collate

    data = ragged()[:4]
    truth, _ = big_batch(*models(), data, 0.5)
    scale, items = 2.0**14, torch.tensor(2.0**14)  # of so many tokens, unscaled gradients are lost in fp16

    def gradients(loss, student):
        (loss * scale).backward()
        return {name: p.grad / scale * (items / count) for name, p in student.named_parameters()}

    count = sum(terms(*models(), row)[2] for row in data)
    student, teacher = models()
    with torch.autocast("cpu", torch.float16):
        total = sum(kl + 0.5 * ce for kl, ce, _ in (terms(student, teacher, row) for row in data))
    plain = gradients(total / items, student)
    student, teacher = models()
    made, _ = trainer(student, teacher, data)
    student.train()
    with torch.autocast("cpu", torch.float16):
        loss = made.compute_loss(student, collate(data), num_items_in_batch=items)
    no_worse(gradients(loss, student), plain, truth)


def test_compiled():
    gradients, expected, _ = step(torch_compile=True, torch_compile_backend="aot_eager")
    assert_same_gradients(gradients, expected)
