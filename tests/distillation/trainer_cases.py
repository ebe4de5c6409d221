"""Models, batches and plain PyTorch for the tests of DistillationTrainer."""

import contextlib
import copy
import functools
import math
import tempfile
from unittest import mock

import torch
import torch.nn.functional as F

from pruning.tiny_models import tiny_model

VOCAB = 96
FAMILIES = ("llama", "mistral", "qwen3", "gemma2", "nemotron")


@functools.cache
def _made(family, seed, changes):
    return tiny_model(family, seed=seed, **dict(changes))


def models(family="llama", **changes):
    """(student, teacher) of a family, fresh copies; the student's MLP is smaller."""
    student = _made(family, 2, (("intermediate_size", 48), *sorted(changes.items())))
    return copy.deepcopy(student), copy.deepcopy(_made(family, 1, ()))


def ragged(lengths=(9, 5, 12, 1, 7, 3, 8, 10), masked=(), seed=0):
    """Sequences of these lengths; of those in `masked` no token counts, of the others the first two do not.

    The very first token has a label, which is no position's target.
    """
    generator = torch.Generator().manual_seed(seed)
    data = []
    for index, length in enumerate(lengths):
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        labels = ids.clone()
        labels[1 : 1 + index % 3] = -100
        if index in masked:
            labels[:] = -100
        data.append({"input_ids": ids, "labels": labels})
    return data


def collate(rows):
    """Pads on the right."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(tensors, value):
        return torch.stack([F.pad(x, (0, longest - len(x)), value=value) for x in tensors])

    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": padded(ids, 0),
        "labels": padded([row["labels"] for row in rows], -100),
        "attention_mask": padded([torch.ones_like(x) for x in ids], 0),
    }


def terms(student, teacher, row):
    """(summed KL, summed cross-entropy, count) of one sequence: full logits in fp32, plain PyTorch.

    Of a student in float64 it is all in float64, but for the layers of a teacher in another dtype.
    """
    ids, targets = row["input_ids"][None], row["labels"][1:]
    counts = targets != -100
    with in_float64(student):
        s = student(ids).logits[0, :-1].float().log_softmax(-1)
    with torch.no_grad(), in_float64(teacher):
        t = teacher(ids).logits[0, :-1].to(s.dtype).log_softmax(-1)
    kl = F.kl_div(s, t, log_target=True, reduction="none").sum(-1)
    ce = F.nll_loss(s, targets, reduction="none")
    return (kl * counts).sum(), (ce * counts).sum(), int(counts.sum())


def doubled(model):
    """A copy in float64; a model that rounds to bf16 stays what it is."""
    exact = all(p.dtype == torch.float32 for p in model.parameters())
    return copy.deepcopy(model).double() if exact else model


@contextlib.contextmanager
def in_float64(model):
    """Models of transformers ask for fp32 in norms and rotary embeddings; one in float64 gets float64."""
    if next(iter(model.parameters())).dtype != torch.float64:
        yield
        return
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


class Gradients(dict):
    """Those of plain PyTorch by name; `truth` has the same in float64."""

    def __init__(self, plain, truth):
        super().__init__(plain)
        self.truth = truth


def grads(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def big_batch(student, teacher, data, ce_weight, groups=None):
    """Gradients by name of the loss over all sequences; `groups` of them each divide by their own count.

    The mean over groups is taken, as of processes that do not count together.
    """
    truth = doubled(student)
    with torch.autocast("cpu", enabled=False):
        _mean_loss(truth, doubled(teacher), data, ce_weight, groups).backward()
    loss = _mean_loss(student, teacher, data, ce_weight, groups)
    loss.backward()
    return Gradients(grads(student), grads(truth)), loss.detach()


def _mean_loss(student, teacher, data, ce_weight, groups):
    groups = groups or [range(len(data))]
    loss = 0
    for group in groups:
        found = [terms(student, teacher, data[index]) for index in group]
        total = sum(kl + ce_weight * ce for kl, ce, _ in found)
        loss = loss + total / max(1, sum(count for *_, count in found)) / len(groups)
    return loss


def plain_means(student, teacher, data, ce_weight):
    """The metrics of evaluate() from full logits, over all tokens."""
    student.eval()
    with torch.no_grad():
        found = [terms(student, teacher, row) for row in data]
    count = sum(n for *_, n in found)
    kl, ce = (float(sum(row[i] for row in found)) / count for i in range(2))
    return {"loss": kl + ce_weight * ce, "kl": kl, "ce": ce, "perplexity": math.exp(ce), "tokens": count}


def mapped(weight=0.5, **options):
    """A loss with a learned map between the students and teachers of narrow()."""
    from minitron_kernels.distillation import DistillationLoss
    from minitron_kernels.distillation.hidden_states import HiddenStatesLoss

    torch.manual_seed(0)
    states = HiddenStatesLoss({1: 1}, student_width=32, teacher_width=48)
    return DistillationLoss(ce_weight=0.5, hidden_states=states, hidden_weight=weight, **options)


def narrow():
    return models(hidden_size=32)


def arguments(**changes):
    """TrainingArguments of one optimizer step on the CPU, with nothing written and gradients as they are."""
    from transformers import TrainingArguments

    options = {
        "output_dir": changes.pop("output_dir", None) or tempfile.mkdtemp(),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }
    return TrainingArguments(**(options | changes))


def gradients_callback():
    """A callback that keeps the gradients of the last optimizer step, whole ones of DTensors."""
    from transformers import TrainerCallback

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.gradients = {
                name.replace("module.", "").replace("_orig_mod.", ""): whole(p.grad).clone()
                for name, p in model.named_parameters()
                if p.grad is not None
            }

    return Keep()


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def trainer(student, teacher, data, *, args=None, loss=None, **options):
    """A DistillationTrainer and the callback that has its gradients."""
    from minitron_kernels.distillation import DistillationLoss
    from minitron_kernels.distillation.trainers.hf import DistillationTrainer

    keep = gradients_callback()
    options.setdefault("data_collator", collate)
    made = DistillationTrainer(
        student,
        args or arguments(),
        teacher=teacher,
        loss=loss or DistillationLoss(ce_weight=0.5),
        train_dataset=data,
        callbacks=[keep],
        **options,
    )
    made.pop_callback(_printer())
    return made, keep


def _printer():
    from transformers import PrinterCallback

    return PrinterCallback


def assert_same_gradients(actual, expected, factor=2.0, ulps=8):
    """The largest error of each gradient is at most `factor` times plain PyTorch's own, both against float64.

    And `ulps` of fp32 of its largest entry beside that: plain PyTorch may be right by chance.
    """
    truth = expected.truth
    missing = [name for name, x in truth.items() if name not in actual and x.abs().max() > 0]
    assert not missing, f"no gradient: {missing}"
    wrong = []
    for name in truth.keys() & actual.keys():
        error, own = (float((x[name] - truth[name]).abs().max()) for x in (actual, expected))
        scale = float(truth[name].abs().max())
        if not error <= factor * own + ulps * 2**-24 * scale:  # NaN too
            wrong.append(f"{name}: {error:.3g}, plain PyTorch {own:.3g}, of {scale:.3g}")
    assert not wrong, wrong


def assert_no_worse(actual, plain, truth, factor=2.0):
    """Errors of all gradients together are at most `factor` times those of plain PyTorch, against `truth`."""

    def error(found):
        return sum(float((found[name].float() - x).square().sum()) for name, x in truth.items()) ** 0.5

    assert error(actual) <= factor * error(plain), (error(actual), error(plain))
