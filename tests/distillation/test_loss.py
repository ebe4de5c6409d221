"""DistillationLoss against full logits and full states in plain PyTorch."""

import dataclasses
import pickle
import re
import warnings

import pytest
import torch
import torch.nn.functional as F

from distillation.hidden_oracle import Toy, hidden_loss, kl_loss
from minitron_kernels.distillation import DenseSignal, DistillationLoss, HiddenStatesLoss, SparseSignal

LAYERS = {0: 1, 1: 3}
V, H, HT = 17, 6, 9


def signals(dtype=torch.float64, shape=(2, 5), seed=0):
    """A student that needs gradients, and a teacher; the tensors that need them."""
    torch.manual_seed(seed)
    head = torch.randn(V, H, dtype=dtype).requires_grad_()
    xs = [torch.randn(*shape, H, dtype=dtype).requires_grad_() for _ in range(3)]
    student = DenseSignal(xs[0], head, layers={i: x for i, x in zip(LAYERS, xs[1:], strict=True)})
    layers = {j: torch.randn(*shape, HT, dtype=dtype) for j in LAYERS.values()}
    teacher = DenseSignal(
        torch.randn(*shape, HT, dtype=dtype), torch.randn(V, HT, dtype=dtype), softcap=5.0, layers=layers
    )
    return student, teacher, [head, *xs]


def logits_of(signal):
    z = signal.hidden @ signal.head.T
    return z if signal.softcap is None else signal.softcap * (z / signal.softcap).tanh()


def sparse_of(teacher, k=5):
    log_p = logits_of(teacher).float().log_softmax(-1)
    logprobs, ids = log_p.topk(k)
    tail = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return SparseSignal(ids, logprobs, tail, teacher.layers)


def hidden_module(dtype=torch.float64, **options):
    torch.manual_seed(7)
    return HiddenStatesLoss(LAYERS, student_width=H, teacher_width=HT, **options).to(dtype)


def labels_of(shape=(2, 5)):
    labels = torch.arange(shape[0] * shape[1]).view(shape) % V
    labels[0, :2] = -100
    return labels


def oracle(student, teacher, weight, labels, count, alpha, kl_weight=1.0, ce_weight=0.0, layers=LAYERS):
    """(loss, kl, hidden, alpha) of full tensors; alpha None: dynamic."""
    valid = labels != -100
    logits = logits_of(student)
    kl = kl_loss(logits, logits_of(teacher), valid, count)
    pairs = [(student.layers[i], teacher.layers[j]) for i, j in layers.items()]
    hidden = hidden_loss(pairs, valid=valid, num_items=count, weight=weight)
    if alpha is None:
        alpha = (kl_weight * kl / hidden).detach()
    loss = kl_weight * kl + alpha * hidden
    if ce_weight:
        loss = loss + ce_weight * F.cross_entropy(logits[valid], labels[valid], reduction="sum") / count
    return loss, kl, hidden, alpha


@pytest.mark.parametrize("hidden_weight", [0.5, "dynamic"])
def test_loss_and_gradients(hidden_weight):
    student, teacher, leaves = signals()
    labels = labels_of()
    for options in ({}, {"kl_weight": 0.7, "ce_weight": 0.3}):
        for count in (None, 3.5):
            loss = DistillationLoss(
                hidden_states=hidden_module(), hidden_weight=hidden_weight, backend="reference", **options
            )
            weight = loss.hidden_states.map.weight
            record = loss(student, teacher, labels, num_items=count)
            alpha = None if hidden_weight == "dynamic" else hidden_weight
            truth = oracle(student, teacher, weight, labels, count or 8, alpha, **options)
            torch.testing.assert_close(record.loss, truth[0])
            torch.testing.assert_close(record.kl, truth[1].detach())
            torch.testing.assert_close(record.hidden, truth[2].detach())
            torch.testing.assert_close(record.hidden_weight, torch.as_tensor(truth[3]).double())
            assert record.num_tokens == 8
            assert not any(x is not None and x.requires_grad for x in record[1:])
            actual = torch.autograd.grad(record.loss, [*leaves, weight])
            wanted = torch.autograd.grad(truth[0], [*leaves, weight])
            for grad, right in zip(actual, wanted, strict=True):
                torch.testing.assert_close(grad, right)


def test_kernels_and_a_sparse_teacher():
    student, teacher, leaves = signals(torch.float32)
    sparse = sparse_of(teacher, k=V)  # all tokens: the whole KL
    loss = DistillationLoss(hidden_states=hidden_module(torch.float32))
    weight = loss.hidden_states.map.weight
    for signal in (teacher, sparse):
        record = loss(student, signal, labels_of())
        truth = oracle(student, teacher, weight, labels_of(), 8, None)[0]
        torch.testing.assert_close(record.loss, truth, rtol=1e-4, atol=1e-5)
        actual = torch.autograd.grad(record.loss, [*leaves, weight])
        wanted = torch.autograd.grad(truth, [*leaves, weight])
        for grad, right in zip(actual, wanted, strict=True):
            torch.testing.assert_close(grad, right, rtol=1e-4, atol=1e-5)


def test_without_hidden_states_nothing_is_added():
    student, teacher, _ = signals(torch.float32)
    loss = DistillationLoss()
    record = loss(student, teacher, labels_of())
    assert record.hidden is None and record.hidden_weight is None
    assert torch.equal(record.loss.detach(), record.kl)
    assert loss.student_layers == loss.teacher_layers == () and not list(loss.parameters())
    assert repr(loss) == "DistillationLoss()"


def test_dynamic_weight_of_what_is_zero_or_not_finite():
    student, teacher, leaves = signals()
    loss = DistillationLoss(hidden_states=HiddenStatesLoss({0: 0}), backend="reference")
    same = DenseSignal(teacher.hidden, teacher.head, layers={0: student.layers[0].detach()})
    record = loss(DenseSignal(student.hidden, student.head, layers=student.layers), same)
    assert record.hidden == 0 and record.hidden_weight == 0 and torch.equal(record.loss.detach(), record.kl)
    grads = torch.autograd.grad(record.loss, leaves[:3])
    assert all(grad.isfinite().all() for grad in grads) and not grads[2].any()
    record = loss(student, same, torch.full((2, 5), -100), num_items=4)  # no token counts
    assert record.loss == record.hidden == record.hidden_weight == 0
    assert loss._weight(torch.tensor(torch.inf), torch.tensor(0.5)) == 0
    student.layers[0].data[1, 1, 0] = torch.nan  # not hidden by a weight of 0
    assert loss(student, same).loss.isnan()


def reference_loss(**options):
    return DistillationLoss(hidden_states=hidden_module(), backend="reference", **options)


def test_one_weight_a_micro_batch():
    """The gradient of micro-batches is the sum of theirs, each with its own weight."""
    parts = [signals(seed=seed) for seed in (1, 2)]
    loss = reference_loss()
    weight = loss.hidden_states.map.weight
    records = [loss(*part[:2], labels_of(), num_items=16) for part in parts]
    assert records[0].hidden_weight != records[1].hidden_weight
    sum(record.loss for record in records).backward()
    wanted = torch.zeros_like(weight)
    for (student, teacher, _), record in zip(parts, records, strict=True):
        truth = oracle(student, teacher, weight, labels_of(), 16, float(record.hidden_weight))
        wanted += torch.autograd.grad(truth[0], weight)[0]
    torch.testing.assert_close(weight.grad, wanted)


def test_a_smoothed_weight_is_that_of_running_means():
    loss = reference_loss(hidden_weight_smoothing=0.75)
    kl, hidden = 0.0, 0.0
    for seed in range(4):
        student, teacher, _ = signals(seed=seed)
        record = loss(student, teacher, labels_of(), num_items=7)
        kl = 0.75 * kl + 0.25 * float(record.kl)
        hidden = 0.75 * hidden + 0.25 * float(record.hidden)
        assert record.hidden_weight == pytest.approx(kl / hidden)
        torch.testing.assert_close(
            record.loss.detach(), record.kl + record.hidden_weight * record.hidden, rtol=1e-12, atol=0
        )
    means = loss.hidden_weight_means.clone()
    record = loss.eval()(student, teacher, labels_of())  # looked at, not moved
    assert record.hidden_weight == pytest.approx(kl / hidden)
    assert torch.equal(loss.hidden_weight_means, means)
    loss.train()._weight(torch.tensor(torch.nan), torch.tensor(1.0))
    assert torch.equal(loss.hidden_weight_means, means)
    again = reference_loss(hidden_weight_smoothing=0.75)
    again.load_state_dict(loss.state_dict())
    assert torch.equal(again.hidden_weight_means, means)
    fresh = reference_loss(hidden_weight_smoothing=0.75).eval()  # before training there are no means
    assert fresh(student, teacher).hidden_weight == reference_loss()(student, teacher).hidden_weight


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temprature": 2.0}, TypeError, "no option 'temprature': did you mean temperature?"),
        ({"hidden_loss": 2.0}, TypeError, "no option 'hidden_loss': did you mean hidden_states?"),
        ({"zzz": 1}, TypeError, "no option 'zzz'; there are kl_weight, ce_weight"),
        ({"reduction": "sum"}, TypeError, "no option 'reduction': the loss is the mean over valid tokens"),
        ({"num_items": 3}, TypeError, "no option 'num_items': give it to every call"),
        (
            {"student_softcap": 3.0},
            TypeError,
            "no option 'student_softcap': it comes with the model's signal",
        ),
        ({"kl_weight": -1}, ValueError, "kl_weight must be finite and greater than 0"),
        ({"temperature": 0}, ValueError, "temperature must be finite"),
        ({"divergence": "kl"}, ValueError, "divergence must be one of"),
        ({"schedule": "fast"}, ValueError, "schedule must be one of"),
        ({"hidden_weight": 1.0}, ValueError, "weigh a hidden-state term, and there is none"),
        ({"hidden_states": {0: 1}}, TypeError, "hidden_states must be a HiddenStatesLoss, got dict"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message.replace("?", "[?]")):
        DistillationLoss(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_weight": "adaptive"}, "hidden_weight must be a number or \"dynamic\", got 'adaptive'"),
        ({"hidden_weight": -0.5}, "hidden_weight must be finite and greater than 0"),
        ({"hidden_weight": float("nan")}, "hidden_weight must be finite"),
        ({"kl_weight": 0, "ce_weight": 1}, "which kl_weight=0 makes 0: pass a number"),
        ({"hidden_weight_smoothing": 1.0}, "hidden_weight_smoothing must be in [0, 1)"),
        ({"hidden_weight": 2.0, "hidden_weight_smoothing": 0.5}, 'options of hidden_weight="dynamic"'),
        ({"sequence_parallel": True}, "sequence_parallel=True are not served"),
    ],
)
def test_options_that_contradict(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DistillationLoss(hidden_states=HiddenStatesLoss({0: 0}), **options)


def test_what_signals_lack():
    student, teacher, _ = signals()
    loss = reference_loss()
    with pytest.raises(ValueError, match=r"the teacher's signal has no layers, .* needs layers 1, 3"):
        loss(student, dataclasses.replace(sparse_of(teacher), layers={}))
    with pytest.raises(ValueError, match=r"the student's signal has layers 0, .* needs layers 0, 1"):
        loss(dataclasses.replace(student, layers={0: student.layers[0]}), teacher)
    with pytest.raises(TypeError, match="student must be a DenseSignal, got SparseSignal"):
        loss(sparse_of(teacher), teacher)
    with pytest.raises(TypeError, match="teacher must be a DenseSignal or a SparseSignal, got Tensor"):
        DistillationLoss()(student, teacher.hidden)
    assert loss.student_layers == (0, 1) and loss.teacher_layers == (1, 3)


def test_repr_and_picklable():
    loss = DistillationLoss(temperature=2.0, hidden_states=hidden_module(), hidden_weight=0.5)
    text = repr(loss)
    assert text.startswith("DistillationLoss(\n  temperature=2.0, hidden_weight=0.5\n")
    assert "layers={0: 1, 1: 3}, kind='cosine', norm='rms'" in text
    assert "StateMap(student_width=6, teacher_width=9)" in text
    again = pickle.loads(pickle.dumps(loss))
    student, teacher, _ = signals()
    assert torch.equal(again(student, teacher).loss, loss(student, teacher).loss)


def test_compiled_without_a_graph_break():
    student, teacher, leaves = signals(torch.float32)
    loss = DistillationLoss(
        ce_weight=0.5, hidden_states=hidden_module(torch.float32), hidden_weight_smoothing=0.5
    )
    labels = labels_of()
    leaves = [*leaves, loss.hidden_states.map.weight]

    def call(hidden, head, layers, labels):
        return loss(DenseSignal(hidden, head, layers=layers), teacher, labels, num_items=6.0)

    operands = student.hidden, student.head, student.layers, labels
    wanted = call(*operands)
    grads = torch.autograd.grad(wanted.loss, leaves)
    loss.hidden_weight_means.zero_()
    actual = torch.compile(call, fullgraph=True, backend="aot_eager")(*operands)
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(torch.autograd.grad(actual.loss, leaves), grads, strict=True):
        torch.testing.assert_close(a, b)


def test_the_map_becomes_a_part_of_the_student():
    student = Toy(V, H)
    loss = DistillationLoss(hidden_states=hidden_module(torch.float32))
    assert loss.attach_map(student) is student and loss.attach_map(student) is student
    weight = loss.hidden_states.map.weight
    assert any(p is weight for p in student.parameters())
    assert "distillation_map.weight" in student.state_dict()
    with pytest.raises(ValueError, match="has a distillation_map of another loss"):
        DistillationLoss(hidden_states=hidden_module()).attach_map(student)
    with pytest.raises(ValueError, match="distillation_map is that of another loss"):
        DistillationLoss(hidden_states=hidden_module()).detach_map(student)
    loss.detach_map(student)
    assert "distillation_map.weight" not in student.state_dict()
    with pytest.raises(ValueError, match=r"attach_map.. comes before"):
        loss.attach_map(torch.compile(student))
    assert not hasattr(DistillationLoss().attach_map(Toy(V, H)), "distillation_map")


def test_a_depth_pruned_student_learns_the_map(tmp_path):
    pytest.importorskip("transformers", reason="needs transformers")
    from distillation.plain import batch_of, tiny
    from minitron_kernels.distillation import ModelTeacher, attach, step
    from minitron_kernels.pruning import prune_model
    from pruning.plans import plan_of

    teacher = tiny("llama", num_hidden_layers=4)
    plan = plan_of(teacher.config, hidden_size=16, num_hidden_layers=2, divisor=8)
    student = attach(prune_model(teacher, plan))
    hidden = HiddenStatesLoss.from_plan(plan)
    kept = [entry.layer for entry in plan.layers]
    assert hidden.layers == {0: kept[0], 1: kept[1]} and hidden.widths == (16, 32)
    assert hidden.map.weight[plan.hidden[5]].tolist() == [float(i == 5) for i in range(16)]
    loss = DistillationLoss(hidden_states=hidden)
    loss.attach_map(student)
    start = hidden.map.weight.detach().clone()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    source, batch, records = ModelTeacher(teacher), batch_of(), []
    for _ in range(12):
        record = step(student, source, batch, loss)
        record.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        records.append(record)
    assert records[-1].hidden < 0.8 * records[0].hidden and records[-1].kl < records[0].kl
    assert (hidden.map.weight - start).abs().max() > 0.01
    torch.save(student.state_dict(), tmp_path / "student.pt")
    fresh = attach(prune_model(teacher, plan))
    other = DistillationLoss(hidden_states=HiddenStatesLoss.from_plan(plan))
    other.attach_map(fresh).load_state_dict(torch.load(tmp_path / "student.pt"))
    assert torch.equal(other.hidden_states.map.weight, hidden.map.weight)
    with torch.no_grad():
        assert torch.equal(step(fresh, source, batch, other).loss, step(student, source, batch, loss).loss)


@pytest.mark.parametrize("trained", [False, True])
def test_a_map_that_nobody_trains_is_told(trained):
    student, teacher = Toy(V, H), Toy(V, HT, layers=4, seed=1).requires_grad_(False)
    loss = DistillationLoss(hidden_states=hidden_module(torch.float32))
    ids = torch.arange(10).view(2, 5)
    parameters = [*student.parameters(), *(loss.parameters() if trained else ())]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for micro_batch in range(8):
            student(ids, lambda signal: loss(signal, teacher(ids))).loss.backward()
            if micro_batch % 2:
                optimizer.step()
                assert len(caught) == 0 or micro_batch > 4
    told = [str(warning.message) for warning in caught]
    assert len(told) == (0 if trained else 1)
    assert trained or "optimizer does not have the map" in told[0]


def test_running_means_keep_their_digits():
    loss = reference_loss(hidden_weight_smoothing=0.999).bfloat16()
    assert loss.hidden_weight_means.dtype == torch.float64
    assert loss.hidden_states.map.weight.dtype == torch.bfloat16
