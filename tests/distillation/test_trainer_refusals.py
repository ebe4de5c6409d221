"""What DistillationTrainer refuses, and how it says so."""

from types import SimpleNamespace

import pytest

pytest.importorskip("transformers", reason="DistillationTrainer is a transformers.Trainer")


import torch

from distillation.trainer_cases import arguments, mapped, models, narrow, ragged, trainer
from minitron_kernels.distillation import DistillationLoss
from pruning.tiny_models import tiny_model


def refused(match, error=ValueError, *, student=None, teacher=None, loss=None, args=None, **options):
    own, other = models()
    with pytest.raises(error, match=match):
        trainer(student or own, teacher or other, ragged(), loss=loss, args=args, **options)


def test_what_would_be_ignored_is_refused():
    refused("compute_loss_func would be ignored", compute_loss_func=lambda *x: 0)
    refused("compute_metrics needs logits", compute_metrics=lambda x: {})
    refused("preprocess_logits_for_metrics needs logits", preprocess_logits_for_metrics=lambda x, y: x)
    refused("label_smoothing_factor=0.1 would be", args=arguments(label_smoothing_factor=0.1))
    refused("label_names must be", args=arguments(label_names=["target"]))
    refused("use_liger_kernel replaces", args=arguments(use_liger_kernel=True))
    refused("unknown arguments: tokeniser", TypeError, tokeniser=None)
    refused("loss must be a DistillationLoss", TypeError, loss=torch.nn.MSELoss())
    refused("teacher must be a causal language model or a Teacher", TypeError, teacher="a/name")
    refused("model_init makes students anew", loss=mapped(), model_init=lambda: narrow()[0])
    with pytest.raises(RuntimeError, match=r"predict.*returns logits"):
        trainer(*models(), ragged())[0].predict(ragged())


def test_models_that_do_not_fit_are_refused():
    refused("TypeError|CausalLM|output layer", TypeError, student=torch.nn.Linear(2, 2))
    refused("no output layer", TypeError, teacher=models()[1].model)
    refused("model has 96 tokens and teacher 128", teacher=tiny_model("llama", vocab_size=128))
    trainer(models()[0], tiny_model("llama", vocab_size=128), ragged(), loss=DistillationLoss(vocab_size=96))
    student, _ = models()
    refused("memory is also the teacher's", student=student, teacher=student)
    refused("no parameter that requires grad", student=models()[0].requires_grad_(False))
    moe = tiny_model("mixtral")
    moe.config.output_router_logits = True
    refused("router's auxiliary loss", student=moe, teacher=tiny_model("mixtral", seed=1))


def test_a_cache_is_asked_whether_the_student_fits():
    class Cache:
        def __call__(self, batch, layers=()):
            raise AssertionError("never called")

        def check_student(self, vocab_size, tokenizer):
            raise ValueError(f"{vocab_size}, {tokenizer}")

    refused("96, None", teacher=Cache())
    refused("None, words", teacher=Cache(), loss=DistillationLoss(vocab_size=64), processing_class="words")


def test_several_gpus_in_one_process_are_refused():
    args = arguments()
    args._n_gpu = 2
    refused("this process sees 2 GPUs", args=args)


def test_replaced_forward_is_found():
    """As Liger and Unsloth do it, after attach()."""
    made, _ = trainer(*models(), ragged(), args=arguments(remove_unused_columns=False))
    original = type(made.model).__mro__[1].forward
    made.model.forward = lambda *args, distillation=None, **batch: original(made.model, *args, **batch)
    with pytest.raises(TypeError, match="distillation=call"):
        made.train()


def test_evaluation_without_labels_is_refused():
    rows = [{"input_ids": row["input_ids"]} for row in ragged((5, 5))]
    made, _ = trainer(*models(), ragged(), eval_dataset=rows, data_collator=None)
    with pytest.raises(ValueError, match="must have labels, got input_ids"):
        made.evaluate()


@pytest.mark.parametrize(
    ("version", "is_old"), [("1.12.0", True), ("0.34.2", True), ("1.13.0", False), ("2.0.0.dev0", False)]
)
def test_an_accelerate_that_would_resume_fsdp_wrongly_is_refused(version, is_old, monkeypatch):
    from minitron_kernels.distillation.trainers import hf_fsdp

    monkeypatch.setattr(hf_fsdp.importlib.metadata, "version", lambda name: version)
    made = SimpleNamespace(
        args=SimpleNamespace(fsdp=True, device=torch.device("cpu"), world_size=1),
        accelerator=SimpleNamespace(state=SimpleNamespace()),
    )
    if is_old:
        with pytest.raises(ValueError, match=rf"fsdp needs accelerate 1\.13 or later, here is {version}"):
            hf_fsdp.prepare_fsdp(made)
    else:
        hf_fsdp.prepare_fsdp(made)
    made.args.fsdp = False
    hf_fsdp.prepare_fsdp(made)
