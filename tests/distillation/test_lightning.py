"""DistillationModule in a real Lightning Trainer, against training on one big batch in plain PyTorch."""

import copy

import pytest
import torch

pytest.importorskip("lightning", reason="pip install 'minitron-kernels[lightning]'")

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from distillation.plain_loop import CE, KL, models, plain_step, ragged
from minitron_kernels.distillation import DistillationLoss, HiddenStatesLoss, ModelTeacher
from minitron_kernels.distillation.trainers.lightning import DistillationModule

LR = 0.5


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=LR)


def module_of(student, teacher, optimizer=sgd, **options):
    loss = DistillationLoss(**{"kl_weight": KL, "ce_weight": CE, **options})
    return DistillationModule(student, ModelTeacher(teacher), loss, optimizer=optimizer)


class Logged(Callback):
    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, module, *rest):
        values = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("train/")}
        if values and (not self.steps or self.steps[-1] != values):
            self.steps.append(values)


def trainer_of(folder, *callbacks, **options):
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        use_distributed_sampler=False,
        **{"max_epochs": 1, "devices": 1, "enable_checkpointing": False, **options},
    )


def loader(batches):
    return torch.utils.data.DataLoader(batches, batch_size=None)


def plain_training(batches, windows, clip=None):
    """Parameters after a step of each window of batches, and the means of each."""
    student, teacher = models()
    means = []
    for window in windows:
        grads, values = plain_step(student, teacher, [batches[i] for i in window])
        means.append(values)
        if clip is not None:
            norm = torch.stack([g.norm() for g in grads.values()]).norm()
            assert norm > clip
            grads = {name: g * (clip / norm) for name, g in grads.items()}
        with torch.no_grad():
            for name, p in student.named_parameters():
                p -= LR * grads[name]
    return dict(student.named_parameters()), means


def check_training(folder, ranks=1, clip=None):
    """Three micro-batches a rank, two a window: the second window is short."""
    batches = ragged(3 * ranks, empty=(1,))
    here = torch.distributed.get_rank() if ranks > 1 else 0
    windows = [range(2 * ranks), range(2 * ranks, 3 * ranks)]
    expected, means = plain_training(batches, windows, clip)
    student, teacher = models()
    start = copy.deepcopy(dict(student.named_parameters()))
    logged = Logged()
    options = {"strategy": "ddp"} if ranks > 1 else {}
    trainer = trainer_of(
        folder, logged, devices=ranks, accumulate_grad_batches=2, gradient_clip_val=clip, **options
    )
    trainer.fit(module_of(student, teacher), loader(batches[here::ranks]), loader(batches[here::ranks]))
    assert trainer.global_step == 2
    for name, p in student.named_parameters():
        error = (p - expected[name]).norm() / (expected[name] - start[name]).norm()
        assert error <= 1e-4, f"{name}: {error}"
    assert len(logged.steps) == 2
    for values, (kl, ce, count) in zip(logged.steps, means, strict=True):
        assert values["train/num_tokens"] == count
        assert values["train/kl"] == pytest.approx(kl, rel=1e-4)
        assert values["train/ce"] == pytest.approx(ce, rel=1e-4)
        assert values["train/loss"] == pytest.approx(KL * kl + CE * ce, rel=1e-4)
        assert 0 < values["train/entropy"] < 5
    _, (kl, ce, _) = plain_step(student, teacher, batches)
    assert trainer.callback_metrics["val/kl"].item() == pytest.approx(kl, rel=1e-4)
    assert trainer.callback_metrics["val/perplexity"].log().item() == pytest.approx(ce, rel=1e-4)


def test_perplexity_is_of_the_labels_and_not_of_smoothed_ones(tmp_path):
    batches = ragged(2)
    student, teacher = models()
    trainer = trainer_of(tmp_path, Logged(), devices=1)
    trainer.validate(module_of(student, teacher, label_smoothing=0.3), loader(batches), verbose=False)
    _, (_, ce, _) = plain_step(student, teacher, batches)
    assert trainer.callback_metrics["val/perplexity"].log().item() == pytest.approx(ce, rel=1e-4)


def test_ragged_accumulation_is_one_batch(tmp_path):
    check_training(tmp_path)


def test_clips_what_has_been_divided(tmp_path):
    check_training(tmp_path, clip=0.1)


def adam(parameters):
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


def test_saves_all_but_the_teacher_and_resumes_bitwise(tmp_path):
    batches = ragged(4)

    def made():
        student, teacher = models()
        layers = HiddenStatesLoss({0: 0}, student_width=48, teacher_width=32)
        torch.manual_seed(5)
        for p in layers.parameters():
            torch.nn.init.normal_(p, std=0.1)
        return module_of(student, teacher, adam, hidden_states=layers, hidden_weight=0.5)

    whole, begun, resumed = made(), made(), made()
    begins = {name: p.detach().clone() for name, p in whole.named_parameters()}
    options = {"accumulate_grad_batches": 2, "precision": "bf16-mixed"}
    trainer_of(tmp_path, max_epochs=2, **options).fit(whole, loader(batches))
    first = trainer_of(tmp_path, **options)
    first.fit(begun, loader(batches))
    path = tmp_path / "at_one_epoch.ckpt"
    first.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    names = set(saved["state_dict"])
    assert len(names) < 2 * len(list(begun.student.parameters())) and all(
        name.split(".")[0] in ("student", "loss") for name in names
    )
    assert any("map" in name for name in names)
    optimized = sum(len(group["params"]) for group in saved["optimizer_states"][0]["param_groups"])
    assert optimized == len(list(begun.parameters()))
    trainer_of(tmp_path, max_epochs=2, **options).fit(resumed, loader(batches), ckpt_path=path)
    for name, p in whole.named_parameters():
        assert torch.equal(p, dict(resumed.named_parameters())[name]), name
        assert not torch.equal(p, begins[name]), f"{name} was not trained"
    for p in whole.teacher.model.parameters():
        assert p.grad is None


def test_refuses_other_strategies_and_optimizers(tmp_path):
    module = module_of(*models(), optimizer=lambda parameters: [sgd(parameters[:1]), sgd(parameters[1:])])
    with pytest.raises(Exception, match=r"one optimizer|multiple optimizers"):
        trainer_of(tmp_path).fit(module, loader(ragged(1)))
    trainer = trainer_of(tmp_path)
    module = module_of(*models())
    module.trainer = trainer
    trainer.strategy.connect(module)

    class Other:
        pass

    trainer._accelerator_connector.strategy = Other()
    with pytest.raises(ValueError, match="strategy must be a single device or DDP"):
        module.on_fit_start()
