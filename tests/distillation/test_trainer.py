"""DistillationTrainer in one process against plain PyTorch with full logits."""

import math
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers", reason="DistillationTrainer is a transformers.Trainer")


import torch

from distillation.trainer_cases import (
    FAMILIES,
    VOCAB,
    arguments,
    assert_no_worse,
    assert_same_gradients,
    big_batch,
    models,
    plain_means,
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


def test_versions_that_do_not_ask_whether_the_loss_is_scaled(monkeypatch):
    """They go by whether the model takes num_items, as this version does where nothing is said."""
    from minitron_kernels.distillation.trainers.hf import DistillationTrainer

    monkeypatch.setattr(DistillationTrainer, "loss_is_scaled_for_ga", None)
    gradients, expected, _ = step()
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
    assert_same_gradients(keep.gradients, expected)


def test_autocast_in_bf16():
    data = ragged()[:4]
    exact, _ = big_batch(*models(), data, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        plain, _ = big_batch(*models(), data, 0.5)
    made, keep = trainer(*models(), data, args=arguments(gradient_accumulation_steps=2, bf16=True))
    made.train()
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}
    assert_no_worse(keep.gradients, plain, exact.truth)
    with pytest.raises(AssertionError):  # it was in bf16
        assert_same_gradients(keep.gradients, exact)


def test_gradients_of_a_scaled_loss_in_fp16():
    """Under a GradScaler's factor no gradient is lost that plain PyTorch keeps."""
    from distillation.trainer_cases import collate

    data = ragged()[:4]
    truth = big_batch(*models(), data, 0.5)[0].truth
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
    assert_no_worse(gradients(loss, student), plain, truth)


def test_compiled():
    data = sequences((8, 8, 8, 8))
    gradients, expected, _ = step(
        data=data, changes={"num_hidden_layers": 1}, torch_compile=True, torch_compile_backend="eager"
    )
    assert_same_gradients(gradients, expected)


class Rows(torch.utils.data.Dataset):
    """A data set of rows, which the trainer can only take by index."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def test_evaluation_is_a_mean_over_tokens():
    data = ragged()
    expected = plain_means(*models(), data, 0.5)
    made, _ = trainer(*models(), data, eval_dataset=Rows(data), args=arguments(per_device_eval_batch_size=3))
    forward = made.model.lm_head.forward
    made.model.lm_head.forward = None  # no logits are made
    metrics = made.evaluate()
    made.model.lm_head.forward = forward
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-5), name
    assert made.evaluate(metric_key_prefix="test")["test_kl"] == metrics["eval_kl"]
    assert not made._training.sums  # nothing of it is logged as training


def test_evaluation_of_packed_rows():
    from transformers import DataCollatorWithFlattening

    data = sequences((9, 5, 12, 7))
    expected = plain_means(*models(), data, 0.5)
    lists = [{name: x.tolist() for name, x in row.items()} for row in data]
    made, _ = trainer(*models(), lists, eval_dataset=lists, data_collator=DataCollatorWithFlattening())
    metrics = made.evaluate()
    assert {name: metrics[f"eval_{name}"] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_logs_are_means_over_tokens_of_all_micro_batches():
    """Over two steps of two micro-batches, with a learning rate of 0."""
    data = ragged()
    expected = plain_means(*models(), data, 0.5)
    args = arguments(gradient_accumulation_steps=2, max_steps=2, logging_steps=2, learning_rate=0.0)
    made, _ = trainer(*models(), data, args=args)
    made.train()
    log = made.state.log_history[0]
    for name in ("kl", "ce"):
        assert log[name] == pytest.approx(expected[name], rel=1e-5)
    assert 0 < log["entropy"] < math.log(VOCAB)
    assert log["tokens_per_second"] > 0 and 0 < log["teacher_share"] < 1
    assert "hidden" not in log


def test_the_clock_stands_still_in_evaluation(monkeypatch):
    from minitron_kernels.distillation.trainers import hf_metrics

    now = [0.0]
    monkeypatch.setattr(hf_metrics.time, "perf_counter", lambda: now[0])
    window = hf_metrics.Window(torch.device("cpu"))
    accelerator = SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x)
    window.start()
    with window.teacher_timed():
        now[0] += 1
    with window.paused(), window.teacher_timed():
        now[0] += 100
    now[0] += 3
    assert window.close(accelerator)["teacher_share"] == 0.25
    now[0] += 2
    assert window.close(accelerator)["teacher_share"] == 0


def test_the_clock_of_the_logs_is_that_of_training_alone(monkeypatch, tmp_path):
    """The teacher takes a second; evaluation, saving and what is between two runs take a thousand."""
    from minitron_kernels.distillation import ModelTeacher
    from minitron_kernels.distillation.trainers import hf, hf_metrics

    now = [0.0]
    monkeypatch.setattr(hf_metrics.time, "perf_counter", lambda: now[0])
    student, model = models()
    live, data = ModelTeacher(model), sequences((5, 5, 5, 5))

    class Slow(Rows):
        def __getitem__(self, index):
            now[0] += 1000
            return super().__getitem__(index)

    def teacher(batch, layers=()):
        now[0] += 1
        return live(batch, layers)

    def save(*args):
        now[0] += 1000

    monkeypatch.setattr(hf, "save_loss", save)
    args = arguments(
        output_dir=tmp_path, max_steps=2, logging_steps=2, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    made, _ = trainer(student, teacher, data, args=args, eval_dataset=Slow(data))
    for _ in range(2):
        before = now[0]
        made.train()
        assert now[0] - before > 4000
        log = next(log for log in made.state.log_history if "loss" in log)
        assert log["teacher_share"] == 1 and log["tokens_per_second"] == 13 / 2
        now[0] += 1000


def test_what_a_run_did_not_log_is_not_logged_by_the_next():
    data = ragged()
    made, _ = trainer(*models(), data, args=arguments(max_steps=1, logging_steps=5, learning_rate=0.0))
    made.train()
    made.args.logging_steps, made.train_dataset = 1, data[2:4]
    made.train()
    expected = plain_means(*models(), data[2:4], 0.5)
    assert made.state.log_history[0]["kl"] == pytest.approx(expected["kl"], rel=1e-5)


def test_another_kind_of_teacher():
    """Any callable with a signal: here the k largest of a model's, and all others together."""
    from minitron_kernels.distillation import ModelTeacher, SparseSignal

    student, model = models()
    live, seen = ModelTeacher(model), []

    def teacher(batch, layers=()):
        assert not torch.is_grad_enabled()
        seen.append(sorted(batch))
        signal = live(batch, layers)
        logprobs, ids = (signal.hidden @ signal.head.T).log_softmax(-1).topk(8)
        tail = torch.log1p(-logprobs.exp().sum(-1))
        return SparseSignal(ids, logprobs, tail)

    made, _ = trainer(student, teacher, ragged(), eval_dataset=ragged())
    made.train()
    assert seen == [["attention_mask", "input_ids"]]
    assert 0 < made.evaluate()["eval_kl"] < plain_means(*models(), ragged(), 0.5)["kl"]


def test_students_made_by_model_init():
    made = trainer(None, models()[1], ragged(), model_init=lambda: models()[0])[0]
    made.train()
    assert "kl" in made.state.log_history[0]
