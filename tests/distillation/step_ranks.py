"""Two processes of this machine, joined by gloo, whose step() must come to one big batch in plain PyTorch."""

import copy
import sys
import tempfile
import warnings

import torch
import torch.distributed as dist

from distillation.plain import batch_of, counted, grads_of, plain_loss, tiny
from minitron_kernels.distillation import (
    CausalLM,
    DistillationLoss,
    HiddenStatesLoss,
    ModelTeacher,
    attach,
    count_targets,
    step,
)
from tools.ranks import fork_ranks, print_reports, read_reports, run_cases, run_forked

RANKS = 2
BATCH = batch_of(4, seed=3)
BATCH["labels"][:2] = BATCH["labels"][:2].masked_fill(BATCH["input_ids"][:2] % 3 > 0, -100)  # ranks differ


def models(**options):
    return tiny(seed=0, **options), tiny("gemma2", seed=1)


def expected_of(student, teacher, ce_weight=0.5):
    """Loss and gradients of all four rows at once."""
    plain = copy.deepcopy(student)
    loss = plain_loss(plain, copy.deepcopy(teacher).eval(), BATCH, counted(BATCH), ce_weight=ce_weight)
    loss.backward()
    return loss.detach(), grads_of(plain)


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def check(student, teacher, expected, *, loss=None):
    """This rank's two rows through the wrapper; the loss is the mean over ranks, as the gradients are."""
    value, gradients = expected
    rank = dist.get_rank()
    rows = {name: x[2 * rank : 2 * rank + 2] for name, x in BATCH.items()}
    total = count_targets(BATCH)
    record = step(student, teacher, rows, loss or DistillationLoss(ce_weight=0.5), num_items=total / RANKS)
    record.loss.backward()
    mean = record.loss.detach().clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / RANKS, value, rtol=1e-5, atol=1e-6)
    found = {
        name.replace("module.", ""): whole(x.grad)
        for name, x in student.named_parameters()
        if x.grad is not None
    }
    size = max(float(x.abs().max()) for x in gradients.values())
    assert found.keys() == gradients.keys(), found.keys() ^ gradients.keys()
    for name, x in gradients.items():
        error = float((found[name] - x).abs().max())
        assert error <= 1e-5 * size, f"{name}: off by {error:.2g}, largest {size:.2g}"


def shard(model, *units):
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    for unit in units:
        fully_shard(unit)
    return fully_shard(model)


def ddp():
    student, teacher = models()
    expected = expected_of(student, teacher)
    wrapped = torch.nn.parallel.DistributedDataParallel(attach(student))
    teacher = torch.nn.parallel.DistributedDataParallel(attach(teacher))  # called as it is, too
    check(wrapped, ModelTeacher(teacher), expected)


def around_ddp():
    """A call of what DDP wraps is warned of, once: its gradients are this rank's alone."""
    student, teacher = models()
    attach(student)
    teacher = ModelTeacher(teacher)
    rows = {name: x[2 * dist.get_rank() :][:2] for name, x in BATCH.items()}

    def said(model, calls=1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(calls):
                student.zero_grad()
                step(model, teacher, rows, DistillationLoss()).loss.backward()
        grad = student.lm_head.weight.grad
        both = [torch.empty_like(grad) for _ in range(RANKS)]
        dist.all_gather(both, grad.contiguous())
        return [str(x.message) for x in caught if "around it" in str(x.message)], torch.equal(*both)

    assert said(student, 5) == ([], False)  # nothing wraps it yet: its caller may average
    wrapped = torch.nn.parallel.DistributedDataParallel(student)
    assert said(wrapped, 2) == ([], True)
    texts, same = said(wrapped.module, 9)
    assert len(texts) == 1 and "step(ddp, ...), not step(ddp.module, ...)" in texts[0] and not same
    assert said(wrapped) == ([], True)


def ddp_tied_checkpointed():
    student, teacher = models(tie_word_embeddings=True)
    expected = expected_of(student, teacher)
    student.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped = torch.nn.parallel.DistributedDataParallel(attach(student))
    check(wrapped, ModelTeacher(teacher), expected)


def fsdp2():
    student, teacher = models()
    expected = expected_of(student, teacher)
    check(shard(attach(student)), ModelTeacher(shard(attach(teacher))), expected)


def fsdp2_before():
    """Sharded before attach(), the head apart: its logits are looked at in the first step."""
    student, teacher = models()
    expected = expected_of(student, teacher)
    attach(shard(student, student.lm_head))
    assert not CausalLM(student).is_verified
    state = torch.get_rng_state()
    check(student, ModelTeacher(shard(teacher)), expected)
    assert CausalLM(student).is_verified and torch.equal(state, torch.get_rng_state())


def fsdp2_tied():
    student, teacher = models(tie_word_embeddings=True)
    expected = expected_of(student, teacher)
    student.gradient_checkpointing_enable({"use_reentrant": False})
    check(shard(attach(student)), ModelTeacher(teacher), expected)


def fsdp2_wrong():
    """Logits that are something else are found in the first step."""
    student, teacher = models()

    class Twice(type(student)):
        def forward(self, *args, **options):
            out = super().forward(*args, **options)
            out.logits = out.logits * 2
            return out

    student.__class__ = Twice
    attach(shard(student))
    try:
        check(student, ModelTeacher(teacher), (None, None))
    except TypeError as error:
        assert "not what its config says" in str(error), error
    else:
        raise AssertionError("not refused")


def fsdp2_layers():
    """Hidden states of layers, with the gradient of one process."""
    student, teacher = tiny(seed=0), tiny(seed=1)

    def terms():
        return DistillationLoss(hidden_states=HiddenStatesLoss({0: 1, 2: 2}), hidden_weight=0.5)

    plain, whole_teacher = attach(copy.deepcopy(student)), ModelTeacher(copy.deepcopy(teacher))
    record = step(plain, whole_teacher, BATCH, terms())
    record.loss.backward()
    expected = record.loss.detach(), grads_of(plain)
    check(shard(attach(student)), ModelTeacher(shard(teacher)), expected, loss=terms())


def fsdp1():
    """As torch's older wrapper has it: weights are whole within the forward only."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    student, teacher = models()
    value, gradients = expected_of(student, teacher)
    options = {"device_id": torch.device("cpu"), "use_orig_params": True}
    student = FullyShardedDataParallel(attach(student), **options)
    teacher = ModelTeacher(FullyShardedDataParallel(attach(teacher), **options))
    rank = dist.get_rank()
    rows = {name: x[2 * rank : 2 * rank + 2] for name, x in BATCH.items()}
    for _ in range(2):
        student.zero_grad()
        loss = DistillationLoss(ce_weight=0.5)
        record = step(student, teacher, rows, loss, num_items=count_targets(BATCH) / RANKS)
        record.loss.backward()
        mean = record.loss.detach().clone()
        dist.all_reduce(mean)
        torch.testing.assert_close(mean / RANKS, value, rtol=1e-5, atol=1e-6)
    with FullyShardedDataParallel.summon_full_params(student, with_grads=True):
        for name, x in student.named_parameters():
            torch.testing.assert_close(x.grad, gradients[name.replace("_fsdp_wrapped_module.", "")],
                                       rtol=1e-4, atol=1e-5)  # fmt: skip


def adapters_of_its_own():
    """A model with adapters in DDP, and its base as its teacher through the same wrapper."""
    import peft

    base = tiny(seed=0)
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    student = peft.get_peft_model(copy.deepcopy(base), config).train()
    expected = expected_of(student, base)
    wrapped = torch.nn.parallel.DistributedDataParallel(attach(student))
    check(wrapped, ModelTeacher(wrapped, disable_adapters=True), expected)


CASES = {
    f.__name__: f
    for f in (ddp, around_ddp, ddp_tied_checkpointed, fsdp2, fsdp2_before, fsdp2_tied, fsdp2_wrong,
              fsdp2_layers, fsdp1, adapters_of_its_own)
}  # fmt: skip


def fork_all(folder, names):
    tiny(), tiny("gemma2")  # what each rank needs is imported once
    cases = {name: CASES[name] for name in names or CASES}
    fork_ranks(lambda rank: run_cases(cases, rank, folder, RANKS), RANKS)


def start(folder, names=()):
    """Reports of both ranks: by case, the errors by rank."""
    run_forked("distillation.step_ranks", folder, list(names))
    return read_reports(folder, RANKS)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print_reports(start(place, sys.argv[1:]))
