"""Models, batches and plain PyTorch for the tests of DistillationTrainer."""

import functools
import math
import tempfile

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
    import copy

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
    """(summed KL, summed cross-entropy, count) of one sequence: full logits in fp32, plain PyTorch."""
    ids, targets = row["input_ids"][None], row["labels"][1:]
    counts = targets != -100
    s = student(ids).logits[0, :-1].float().log_softmax(-1)
    with torch.no_grad():
        t = teacher(ids).logits[0, :-1].float().log_softmax(-1)
    kl = F.kl_div(s, t, log_target=True, reduction="none").sum(-1)
    ce = F.nll_loss(s, targets, reduction="none")
    return (kl * counts).sum(), (ce * counts).sum(), int(counts.sum())


def big_batch(student, teacher, data, ce_weight, groups=None):
    """Gradients by name of the loss over all sequences; `groups` of them each divide by their own count.

    The mean over groups is taken, as of processes that do not count together.
    """
    groups = groups or [range(len(data))]
    loss = 0
    for group in groups:
        found = [terms(student, teacher, data[index]) for index in group]
        total = sum(kl + ce_weight * ce for kl, ce, _ in found)
        loss = loss + total / max(1, sum(count for *_, count in found)) / len(groups)
    loss.backward()
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}, loss.detach()


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


def assert_same_gradients(actual, expected, *, ulps=64):
    """All gradients, to rounding in fp32: 64 ulps of the largest entry of each."""
    missing = [name for name, x in expected.items() if name not in actual and x.abs().max() > 0]
    assert not missing, f"no gradient: {missing}"
    for name, x in expected.items():
        if name not in actual:
            continue
        error = (actual[name].float() - x.float()).abs().max()
        scale = max(float(x.abs().max()), 1e-6)
        assert error <= ulps * 2**-24 * scale, f"{name}: {float(error):.3g} of {scale:.3g}"


def assert_no_worse(actual, plain, truth, factor=2.0):
    """Errors of all gradients together are at most `factor` times those of plain PyTorch, against fp32."""

    def error(found):
        return sum(float((found[name].float() - x).square().sum()) for name, x in truth.items()) ** 0.5

    assert error(actual) <= factor * error(plain), (error(actual), error(plain))
