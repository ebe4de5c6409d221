"""Two processes of this machine, joined by gloo, whose step() must come to one big batch in plain PyTorch."""

import copy
import json
import os
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

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
    for f in (ddp, ddp_tied_checkpointed, fsdp2, fsdp2_before, fsdp2_tied, fsdp2_wrong, fsdp2_layers, fsdp1,
              adapters_of_its_own)
}  # fmt: skip


def run_rank(rank, folder, names):
    """All cases; what went wrong on this rank goes into a file."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=120))
    reports = {}
    for name in names or CASES:
        try:
            CASES[name]()
            reports[name] = None
        except Exception:
            reports[name] = traceback.format_exc()[-3000:]
        dist.barrier()
    (Path(folder) / f"report{rank}.json").write_text(json.dumps(reports))
    dist.destroy_process_group()


def run_all(folder, names):
    """One process imports everything, and becomes two."""
    tiny(), tiny("gemma2")
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                run_rank(rank, folder, names)
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    if any([os.waitpid(child, 0)[1] for child in children]):
        sys.exit("a rank failed")


def start(folder, names=(), timeout=600):
    """Reports of both ranks: by case, the errors by rank."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "import sys; from distillation.step_ranks import run_all; run_all(sys.argv[1], sys.argv[2:])"
    done = subprocess.run([sys.executable, "-c", code, str(folder), *names], env=environment, text=True,
                          stderr=subprocess.PIPE, timeout=timeout)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for rank in range(RANKS):
        for name, error in json.loads((Path(folder) / f"report{rank}.json").read_text()).items():
            found.setdefault(name, {})[rank] = error
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        for name, errors in start(place, sys.argv[1:]).items():
            bad = {rank: error for rank, error in errors.items() if error}
            print(name, "ok" if not bad else next(iter(bad.values()))[-1500:])
