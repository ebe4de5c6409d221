"""The losses inside what trainers do: compile, autocast, checkpointing, DDP, accumulation, tied heads."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import minitron_kernels as mk
from kl_loss.problems import make_linear, make_rows
from minitron_kernels.ops.kl_loss.labels import _labels_to_mask
from minitron_kernels.ops.kl_loss.linear_op import linear_kl_loss_op
from minitron_kernels.ops.kl_loss.rows import _backward_op, _forward_op

pytestmark = pytest.mark.native


def grads_of(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_compile_fullgraph(reduction, divergence):
    options = {"reduction": reduction, "divergence": divergence, "temperature": 1.5}

    def step(hidden, head, bias, teacher_hidden, teacher_head, labels, weight):
        loss = mk.linear_kl_loss(
            hidden * 1.0, head, teacher_hidden, teacher_head, student_bias=bias, labels=labels, **options
        )
        rows = mk.kl_loss(hidden @ head.T, teacher_hidden @ teacher_head.T, labels=labels, **options)
        return (loss * weight).sum() + (rows * weight).sum()

    hidden, head, teacher_hidden, teacher_head = make_linear(40, 32, 48, 300, torch.float32)
    bias = torch.zeros(300, requires_grad=True)
    hidden.requires_grad_(), head.requires_grad_()
    labels = torch.arange(40) % 7 * 10
    labels[::5] = -100
    weight = torch.linspace(0.5, 2, 40) if reduction == "none" else torch.tensor(3.0)
    arguments = (hidden, head, bias, teacher_hidden, teacher_head, labels, weight)
    eager = step(*arguments)
    compiled = torch.compile(step, fullgraph=True)(*arguments)
    assert compiled.item() == pytest.approx(eager.item(), rel=1e-6)
    for a, b in zip(grads_of(eager, hidden, head, bias), grads_of(compiled, hidden, head, bias), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_compile_with_a_lent_accumulator():
    hidden, head, teacher_hidden, teacher_head = make_linear(40, 32, 48, 300, torch.float32)
    hidden.requires_grad_(), head.requires_grad_()
    expected = grads_of(mk.linear_kl_loss(hidden, head, teacher_hidden, teacher_head), head)[0]
    buffer = torch.ones_like(head)

    @torch.compile(fullgraph=True)
    def step(hidden, head, buffer):
        return mk.linear_kl_loss(hidden, head, teacher_hidden, teacher_head, grad_head_accumulator=buffer)

    step(hidden, head, buffer).backward()
    assert torch.allclose(buffer - 1.0, expected, atol=1e-6) and head.grad is None and hidden.grad is not None


def test_opcheck():
    hidden, head, teacher_hidden, teacher_head = make_linear(20, 16, 24, 100, torch.float32)
    numbers = [0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    rest = (100, numbers, None, "native", "auto", 1 << 29, None, None, False, ())
    inputs = (hidden, head, torch.zeros(100), teacher_hidden, teacher_head, None, None, None)
    mask, weight = torch.arange(20) % 3 > 0, torch.tensor(0.5)
    for accumulator in (None, torch.zeros(100, 16)):
        torch.library.opcheck(
            linear_kl_loss_op.op,
            (*inputs, mask, weight, None, accumulator, None, None, None, True, True, True, False, *rest),
        )
    torch.library.opcheck(_labels_to_mask.op, (torch.tensor([1, -100, 3]), -100, 5))
    student, teacher = make_rows(6, 50, torch.float32)
    ops = torch.ops.minitron_kernels
    options = (50, [0.5, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    torch.library.opcheck(ops.kl_loss_forward.default, (student, teacher, mask[:6].contiguous(), *options))
    loss, stats = ops.kl_loss_forward(student, teacher, None, *options)
    torch.library.opcheck(ops.kl_loss_backward.default, (loss, stats, student, teacher, None, *options))
    for given in ((numbers, None), ([], torch.tensor(numbers, dtype=torch.float64))):
        torch.library.opcheck(_forward_op.op, (student, teacher, None, 50, *given, "native"))
        torch.library.opcheck(_backward_op.op, (loss, stats, student, teacher, None, 50, *given, "native"))


@pytest.mark.parametrize("which", ["linear", "per token", "rows"])
def test_double_backward_says_no(which):
    hidden, head, *teacher = make_linear(8, 16, 16, 50, torch.float32)
    hidden.requires_grad_()
    if which == "rows":
        loss = mk.kl_loss(hidden @ head.T, teacher[0] @ teacher[1].T)
    else:
        loss = mk.linear_kl_loss(
            hidden, head, *teacher, reduction="mean" if which == "linear" else "none"
        ).sum()
    with pytest.raises(RuntimeError, match=r"second derivative.*backend='reference'"):
        (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
        grad.sum().backward()


def test_gradcheck():
    hidden, head, *teacher = make_linear(5, 6, 7, 30, torch.float64)
    bias = torch.zeros(30, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (hidden, head, bias)]
    for options in ({}, {"reduction": "none", "divergence": "jsd"}, {"student_softcap": 3.0}):
        torch.autograd.gradcheck(
            lambda x, w, b, options=options: mk.linear_kl_loss(x, w, *teacher, student_bias=b, **options),
            inputs,
        )
    torch.autograd.gradcheck(
        lambda x: mk.kl_loss(x, teacher[0] @ teacher[1].T, divergence=0.2, reduction="none"),
        [(hidden @ head.T).detach().requires_grad_()],
    )


def test_autocast():
    hidden, head, *teacher = make_linear(64, 32, 40, 500, torch.float32)
    hidden.requires_grad_(), head.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mk.linear_kl_loss(hidden, head, *teacher)
    grads = grads_of(loss, hidden, head)
    half = [x.detach().bfloat16() for x in (hidden, head, *teacher)]
    half[0].requires_grad_(), half[1].requires_grad_()
    expected = mk.linear_kl_loss(*half)
    assert torch.equal(loss, expected) and grads[1].dtype == torch.float32
    for a, b in zip(grads, grads_of(expected, *half[:2]), strict=True):
        assert torch.equal(a, b.float())


@pytest.mark.parametrize("teacher_of", ["a head", "few tokens"])
def test_autocast_leaves_the_reference_its_logits(teacher_of):
    """Operands are rounded to bf16, logits are not: close to the teacher that would cost a sixth."""
    hidden, head, *_ = (x.bfloat16().float() for x in make_linear(64, 32, 40, 500, torch.float32))
    teacher_head = (head + 0.01 * torch.randn(head.shape)).bfloat16().float()
    logprobs = (hidden.double() @ teacher_head.double().T).log_softmax(-1)
    top, ids = logprobs.topk(20)
    tail = torch.log1p(-top.exp().sum(-1))

    def run(dtype):
        x, w = (t.to(dtype, copy=True).requires_grad_() for t in (hidden, head))
        if teacher_of == "a head":
            loss = mk.linear_kl_loss(x, w, hidden.to(dtype), teacher_head.to(dtype), backend="reference")
        else:
            loss = mk.linear_sparse_kl_loss(x, w, ids, top.to(dtype), tail.to(dtype), backend="reference")
        return grads_of(loss, x, w)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(torch.float32)
    for a, b in zip(actual, run(torch.float64), strict=True):
        assert (a.double() - b).norm() < 2.0**-7 * b.norm()


def test_accumulation_over_micro_batches_and_tied_heads():
    """Two micro-batches by num_items and a lent fp32 buffer = one batch; the embedding is tied."""
    torch.manual_seed(0)
    embedding = nn.Embedding(300, 32)
    tokens = torch.randint(0, 300, (2, 24))
    *_, teacher_hidden, teacher_head = make_linear(48, 32, 40, 300, torch.float32)
    labels = tokens.clone()
    labels[0, ::2] = -100
    count = (labels != -100).sum()

    def loss_of(rows, **options):
        return mk.linear_kl_loss(
            torch.tanh(embedding(tokens[rows])),
            embedding.weight,
            teacher_hidden.reshape(2, 24, 40)[rows],
            teacher_head,
            labels=labels[rows],
            **options,
        )

    (whole,) = grads_of(loss_of(slice(None)), embedding.weight)
    for i in range(2):
        loss_of(slice(i, i + 1), num_items=count).backward()
    assert torch.allclose(embedding.weight.grad, whole, rtol=1e-4, atol=1e-8)

    embedding.weight.grad = None
    buffer = torch.zeros_like(embedding.weight)
    for i in range(2):
        loss_of(slice(i, i + 1), num_items=int(count), grad_head_accumulator=buffer).backward()
    assert torch.allclose(embedding.weight.grad + buffer, whole, rtol=1e-4, atol=1e-8)
    with torch.no_grad():
        before = buffer.clone()
        loss_of(slice(None), grad_head_accumulator=buffer)
        assert torch.equal(before, buffer)


def test_per_token_loss_fills_a_lent_accumulator():
    hidden, head, *teacher = make_linear(32, 16, 16, 200, torch.float32)
    head.requires_grad_()
    (expected,) = grads_of(mk.linear_kl_loss(hidden, head, *teacher, reduction="none").mean(), head)
    buffer = torch.zeros_like(head)
    mk.linear_kl_loss(
        hidden, head, *teacher, reduction="none", grad_head_accumulator=buffer
    ).mean().backward()
    assert torch.equal(buffer, expected) and head.grad is None


def test_fp16_gradients_survive_until_the_loss_scale():
    """p / N of a rare token is below fp16's smallest number; scaled by a usual 2**20 it is not."""
    items = {"num_items": 2**15}  # 64 micro-batches to a step
    hidden, head, *teacher = make_linear(512, 32, 32, 2000, torch.float16, distance=0.1)
    hidden.requires_grad_(), head.requires_grad_()
    exact = [x.detach().double() for x in (hidden, head, *teacher)]
    exact[0].requires_grad_(), exact[1].requires_grad_()
    scaled = grads_of(mk.linear_kl_loss(hidden, head, *teacher, **items) * 2.0**20, hidden, head)
    truth = grads_of(mk.linear_kl_loss(*exact, **items), *exact[:2])
    for a, b in zip(scaled, truth, strict=True):
        assert ((a.double() / 2**20 - b).norm() / b.norm()).item() < 3e-3


def test_modules():
    hidden, head, *teacher = make_linear(32, 16, 16, 200, torch.float32)
    labels = torch.arange(32) % 5
    labels[3] = -1
    options = {"temperature": 2.0, "ignore_index": -1}
    module = mk.LinearKLLoss(**options)
    assert torch.equal(
        module(hidden, head, *teacher, labels=labels),
        mk.linear_kl_loss(hidden, head, *teacher, labels=labels, **options),
    )
    assert "temperature=2.0" in repr(module)
    student, teacher_logits = make_rows(32, 50, torch.float32)
    assert torch.equal(
        mk.KLLoss(divergence="jsd")(student, teacher_logits, reduction="sum"),
        mk.kl_loss(student, teacher_logits, divergence="jsd", reduction="sum"),
    )
    # a keyword of the call wins over the module's
    for loss, tensors in (
        (mk.KLLoss, (student, teacher_logits)),
        (mk.LinearKLLoss, (hidden, head, *teacher)),
    ):
        assert torch.equal(loss(temperature=3.0)(*tensors, temperature=2.0), loss(temperature=2.0)(*tensors))


def snippet(word):
    """The block of Python in the documentation that has a word."""
    text = (Path(__file__).parents[2] / "docs" / "distillation.md").read_text()
    (block,) = (code for code in re.findall(r"```python\n(.*?)```", text, re.S) if word in code)
    return block


def test_labels_of_a_hugging_face_batch_are_shifted_as_documented():
    student_hidden, student_head, teacher_hidden, teacher_head = make_linear(24, 16, 20, 50, torch.float32)
    student_hidden, teacher_hidden = student_hidden.reshape(2, 12, 16), teacher_hidden.reshape(2, 12, 20)
    labels = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    labels[0, :5], labels[1, 9:] = -100, -100  # a prompt, padding
    names = {**locals(), "batch": {"labels": labels}, "torch": torch, **vars(mk)}
    exec(snippet('batch["labels"]'), names)
    predicts = torch.zeros(2, 12, dtype=torch.bool)
    predicts[0, 4:11], predicts[1, :8] = True, True  # what comes next is a token that counts
    expected = mk.linear_kl_loss(student_hidden, student_head, teacher_hidden, teacher_head, mask=predicts)
    assert torch.equal(names["loss"], expected)


def lora_layer():
    """A LoRA layer on a head [50, 16], rank 4, with a B that is not 0."""
    torch.manual_seed(0)
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(16, 50, bias=False)),
        peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"]),
    )
    layer = model.base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    return layer


def test_lora_on_the_head_as_documented():
    """The same as the merged head, gradients of the adapter included."""
    layer = lora_layer()
    hidden, _, *teacher = make_linear(24, 16, 20, 50, torch.float32)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    learning = [hidden.requires_grad_(), A, B]
    names = {**vars(mk), "student_hidden": hidden, "student": SimpleNamespace(lm_head=layer)}
    names |= {"teacher_hidden": teacher[0], "teacher_head": teacher[1]}
    exec(snippet("head_of"), names)
    loss = names["loss"]
    merged = layer.base_layer.weight + 1.5 * B @ A
    expected = mk.linear_kl_loss(hidden, merged, *teacher)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for a, b in zip(grads_of(loss, *learning), grads_of(expected, *learning), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


DDP = """
import os, sys, torch, torch.distributed as dist
import minitron_kernels as mk
from torch.nn.parallel import DistributedDataParallel
torch.manual_seed(0); torch.set_num_threads(1)
class Student(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Linear(16, 16), torch.nn.Linear(16, 100, bias=False)
    def forward(self, x, y, u):
        return mk.linear_kl_loss(self.body(x), self.head.weight, y, u)
student = Student(); x, y, u = torch.randn(8, 16), torch.randn(8, 24), torch.randn(100, 24)
whole = torch.autograd.grad(student(x, y, u), list(student.parameters()))
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
rows = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
parallel = DistributedDataParallel(student)
parallel(x[rows], y[rows], u).backward()
for p, g in zip(student.parameters(), whole):
    assert torch.allclose(p.grad, g, atol=1e-6), (p.grad - g).abs().max()
dist.destroy_process_group(); print("same")
"""


def test_ddp(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", DDP, str(tmp_path / "store"), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        out, err = rank.communicate(timeout=120)
        assert "same" in out, err
