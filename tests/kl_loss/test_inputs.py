"""Bad input: each error names the argument, what was wanted and what came."""

import numpy as np
import pytest
import torch

import minitron_kernels as mk
from kl_loss.problems import make_linear, make_rows

pytestmark = pytest.mark.native
N, H, HT, V = 6, 8, 12, 40
META = torch.device("meta")


def linear(**changes):
    names = ("student_hidden", "student_head", "teacher_hidden", "teacher_head")
    arguments = dict(zip(names, make_linear(N, H, HT, V, torch.float32), strict=True))
    return mk.linear_kl_loss(**{**arguments, **changes})


def rows(**changes):
    names = ("student_logits", "teacher_logits")
    arguments = dict(zip(names, make_rows(N, V, torch.float32), strict=True))
    return mk.kl_loss(**{**arguments, **changes})


SHARED = [
    ({"temperature": 0.0}, ValueError, r"temperature must be finite and greater than 0, got 0"),
    ({"temperature": float("nan")}, ValueError, r"temperature .* got nan"),
    ({"temperature": "2"}, TypeError, r"temperature must be a number, got str"),
    ({"divergence": "kl"}, ValueError, r"divergence must be one of forward_kl.*got 'kl'"),
    ({"divergence": 1.5}, ValueError, r"divergence .* in \[0, 1\], got 1.5"),
    ({"divergence": None}, TypeError, r"divergence must be a name or a number, got NoneType"),
    ({"reduction": "batchmean"}, ValueError, r"mean, sum, none; got 'batchmean'.*num_items=batch_size"),
    ({"temperature": torch.tensor(2.0)}, TypeError, r"temperature must be a number, got Tensor: pass .item"),
    ({"temperature": np.array([2.0])}, TypeError, r"temperature must be a number, got ndarray"),
    ({"temperature": True}, TypeError, r"temperature must be a number, got bool"),
    ({"vocab_size": True}, TypeError, r"vocab_size must be an int, got bool"),
    ({"ignore_index": -100.0, "labels": torch.zeros(N).long()}, TypeError, r"ignore_index must be an int"),
    ({"mask": torch.ones(N, dtype=torch.bool).to_sparse()}, TypeError, r"mask must be a dense tensor"),
    ({"reduction": "avg"}, ValueError, r"reduction must be one of mean, sum, none; got 'avg'"),
    ({"student_softcap": -1.0}, ValueError, r"student_softcap .* got -1"),
    ({"teacher_logit_scale": 0.0}, ValueError, r"teacher_logit_scale .* got 0"),
    ({"num_items": 4, "reduction": "sum"}, ValueError, r"num_items .* got reduction='sum'"),
    ({"num_items": 0}, ValueError, r"num_items must be .* greater than 0, got 0"),
    ({"num_items": torch.ones(2)}, ValueError, r"num_items must have one element, got shape \(2,\)"),
    ({"vocab_size": 41}, ValueError, r"vocab_size must be from 1 to 40.*got 41"),
    ({"vocab_size": 4.0}, TypeError, r"vocab_size must be an int, got float"),
    ({"mask": torch.ones(N)}, TypeError, r"mask must be bool .* got torch.float32"),
    ({"mask": torch.ones(N + 1, dtype=torch.bool)}, ValueError, r"mask .* shape \(6,\); got \(7,\)"),
    ({"mask": torch.ones(N, dtype=torch.bool, device=META)}, ValueError, r"mask is on meta"),
    ({"labels": torch.zeros(N)}, TypeError, r"labels must be int64 or int32, got torch.float32"),
    ({"labels": torch.tensor([0, 1, 40, 3, 4, 5])}, ValueError, r"labels .* \[0, 40\), got 40 at position 2"),
    ({"labels": torch.tensor([0, -1, 4, 3, 4, 5])}, ValueError, r"labels .*ignore_index=-100.* got -1 at"),
    ({"labels": [1, 2]}, TypeError, r"labels must be a torch.Tensor, got list"),
    ({"backend": "cuda"}, ValueError, r'backend must be "auto", .*got \'cuda\''),
    ({"backend": "triton"}, RuntimeError, r'backend="triton" cannot serve .*GPU'),
]


@pytest.mark.parametrize("changes,error,message", SHARED)
def test_options_of_both(changes, error, message):
    for loss in (linear, rows):
        with pytest.raises(error, match=message):
            loss(**changes)


@pytest.mark.parametrize(
    "changes,error,message",
    [
        ({"student_logits": None}, TypeError, r"student_logits must be a torch.Tensor, got NoneType"),
        (
            {"student_logits": torch.zeros(N, V, dtype=torch.int64)},
            TypeError,
            r"student_logits .* got torch.int64",
        ),
        ({"teacher_logits": torch.zeros(N, V, device=META)}, ValueError, r"teacher_logits is on meta"),
        ({"teacher_logits": torch.zeros(N, V).double()}, TypeError, r"float64 needs float64"),
        (
            {"teacher_logits": torch.zeros(N + 1, V)},
            ValueError,
            r"leading dimensions .* \(6, 40\) and \(7, 40\)",
        ),
        (
            {"teacher_logits": torch.zeros(N, V + 8)},
            ValueError,
            r"vocabularies of 40 and 48 .* pass vocab_size=",
        ),
    ],
)
def test_kl_loss(changes, error, message):
    with pytest.raises(error, match=message):
        rows(**changes)


@pytest.mark.parametrize(
    "changes,error,message",
    [
        (
            {"student_head": torch.zeros(V, H + 1)},
            ValueError,
            r"student_head \[V, H\] .* \(6, 8\) and \(40, 9\)",
        ),
        ({"teacher_head": torch.zeros(V)}, ValueError, r"teacher_hidden .* teacher_head .* \(40,\)"),
        (
            {"teacher_hidden": torch.zeros(N - 1, HT)},
            ValueError,
            r"leading dimensions, got \(6, 8\) and \(5, 12\)",
        ),
        ({"teacher_head": torch.zeros(V + 8, HT)}, ValueError, r"40 and 48 .* pass vocab_size="),
        ({"student_head": torch.zeros(V, H, device=META)}, ValueError, r"student_head is on meta"),
        ({"student_head": torch.zeros(V, H).double()}, TypeError, r"student_head is torch.float64"),
        (
            {"student_bias": torch.zeros(V - 1)},
            ValueError,
            r"student_bias must be \[V\] = \[40\].* got \(39,\)",
        ),
        ({"teacher_bias": torch.zeros(V).int()}, TypeError, r"teacher_bias must be float32"),
        ({"schedule": "fast"}, ValueError, r"schedule must be one of auto, store, recompute; got 'fast'"),
        ({"workspace_bytes": 1.5e6 + 0.5}, TypeError, r"workspace_bytes must be an int, got float"),
        ({"workspace_bytes": "1G"}, TypeError, r"workspace_bytes must be an int, got str"),
        ({"workspace_bytes": 1000}, ValueError, r"workspace_bytes=1000 is too small: the least .* is \d+ \("),
        (
            {"grad_head_accumulator": torch.zeros(V, H).half()},
            TypeError,
            r"torch.float32 tensor, got torch.float16",
        ),
        ({"grad_head_accumulator": 3}, TypeError, r"grad_head_accumulator .* got int"),
        ({"grad_head_accumulator": torch.zeros(H, V).T}, ValueError, r"stride 1 along H"),
        ({"grad_head_accumulator": torch.zeros(H).expand(V, H)}, ValueError, r"rows that do not overlap"),
        (
            {"grad_head_accumulator": torch.zeros(V * H).as_strided((V, H), (H - 1, 1))},
            ValueError,
            r"rows that do not overlap",
        ),
        ({"teacher_head": torch.zeros(V - 9, HT), "vocab_size": 35}, ValueError, r"from 1 to 31.*got 35"),
        (
            {"grad_head_accumulator": torch.zeros(V, H), "backend": "reference"},
            ValueError,
            r"grad_head_accumulator needs native or triton",
        ),
    ],
)
def test_linear_kl_loss(changes, error, message):
    with pytest.raises(error, match=message):
        linear(**changes)


def test_the_least_that_would_do_does():
    for schedule in ("auto", "store", "recompute"):
        tensors = make_linear(300, 32, 32, 3000, torch.float32)
        tensors[1].requires_grad_()
        with pytest.raises(ValueError, match="too small") as caught:
            mk.linear_kl_loss(*tensors, schedule=schedule, workspace_bytes=1)
        least = int(str(caught.value).split("would do is ")[1].split()[0])
        with pytest.raises(ValueError, match="too small"):
            mk.linear_kl_loss(*tensors, schedule=schedule, workspace_bytes=least - 1)
        mk.linear_kl_loss(*tensors, schedule=schedule, workspace_bytes=least).backward()


def test_an_error_leaves_the_accumulator_alone():
    buffer = torch.ones(V, H)
    with pytest.raises(ValueError, match="labels"):
        linear(grad_head_accumulator=buffer, labels=torch.full((N,), V))
    assert (buffer == 1).all()


def test_strided_inputs():
    hidden, head, *teacher = make_linear(N, H, HT, V, torch.bfloat16)
    wide = torch.zeros(V, 3 * H, dtype=torch.bfloat16)
    wide[:, H : 2 * H] = head
    inputs = [hidden.T.contiguous().T.requires_grad_(), wide[:, H : 2 * H].requires_grad_()]
    plain = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    for x in (inputs, plain):
        mk.linear_kl_loss(*x, *teacher).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(inputs, plain, strict=True))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_no_tokens_with_strides(backend):
    """Any strides of a tensor without elements pass for contiguous: torch copies nothing then."""

    def every_other(x):
        return torch.cat([x, x], -1)[..., ::2].requires_grad_()

    hidden, head, teacher_hidden, teacher_head = make_linear(0, H, HT, V, torch.float32)
    inputs = every_other(hidden), head.requires_grad_(), every_other(teacher_hidden).detach(), teacher_head
    logits = every_other(torch.empty(0, V)), every_other(torch.empty(0, V)).detach()
    for loss in (mk.linear_kl_loss(*inputs, backend=backend), mk.kl_loss(*logits, backend=backend)):
        assert loss == 0
        loss.backward()
    assert inputs[0].grad_fn is None and (head.grad == 0).all()


@pytest.mark.parametrize("name", ["student_head", "teacher_head", "student_hidden"])
def test_an_accumulator_that_is_an_input(name):
    """What is added to it would change the problem; beside an input, as in a flat buffer, it may lie."""
    memory = torch.zeros(3, V, V)
    tensors = dict(
        zip(
            ("student_hidden", "student_head", "teacher_hidden", "teacher_head"),
            make_linear(V, V, V, V, torch.float32),
            strict=True,
        )
    )
    memory[1] = tensors[name]
    tensors[name] = memory[1]
    tensors["student_hidden"] = tensors["student_hidden"].detach().requires_grad_()
    for buffer in (memory[1], memory.view(-1)[7 : 7 + V * V].view(V, V)):
        with pytest.raises(ValueError, match="grad_head_accumulator shares memory with an input"):
            mk.linear_kl_loss(**tensors, grad_head_accumulator=buffer)
    mk.linear_kl_loss(**tensors, grad_head_accumulator=memory[2]).backward()
    assert torch.equal(memory[1], tensors[name]) and memory[2].any() and not memory[0].any()


def test_numbers_of_numpy_and_round_floats_are_taken():
    for scalar in (np.float32, np.float64, np.int64, np.float16):
        options = {"temperature": scalar(3), "student_softcap": scalar(9), "temperature_squared": True}
        plain = {"temperature": 3, "student_softcap": 9.0, "temperature_squared": True}
        for loss in (linear, rows):
            expected = loss(num_items=5, divergence=1.0, vocab_size=39, ignore_index=7, **plain)
            actual = loss(
                num_items=scalar(5),
                divergence=scalar(1),
                vocab_size=np.int32(39),
                ignore_index=np.int64(7),
                **options,
            )
            assert torch.equal(actual, expected)
    assert torch.equal(linear(workspace_bytes=1e8), linear())
    assert torch.equal(linear(workspace_bytes=np.int64(10**8)), linear())


def test_labels_may_lie_beyond_the_shared_vocabulary():
    """They only mask: a token that the student alone knows is one of its tokens all the same."""
    labels = torch.tensor([0, 39, 20, -100, 30, 5])
    for loss in (linear, rows):
        assert torch.equal(loss(labels=labels, vocab_size=20), loss(mask=labels >= 0, vocab_size=20))
        with pytest.raises(ValueError, match=r"labels .* \[0, 40\), got 40 at position 2"):
            loss(labels=torch.tensor([0, 1, 40, 3, 4, 5]), vocab_size=20)


def test_shapes_without_data():
    """On the meta device the losses have shapes; mixed with real tensors they name the odd one."""
    for reduction, shape in (("mean", ()), ("none", (2, 3))):
        tensors = [
            x.reshape(2, 3, -1) if i % 2 == 0 else x
            for i, x in enumerate(t.to(META) for t in make_linear(N, H, HT, V, torch.float32))
        ]
        loss = mk.linear_kl_loss(*tensors, reduction=reduction)
        logits = mk.kl_loss(tensors[0] @ tensors[1].T, tensors[2] @ tensors[3].T, reduction=reduction)
        assert loss.shape == logits.shape == shape and loss.device == logits.device == META


def freed(x):
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


@pytest.mark.parametrize(
    "name",
    [
        *("student_hidden", "student_head", "teacher_hidden", "teacher_head"),
        *("student_bias", "teacher_bias", "mask", "labels", "grad_head_accumulator"),
        *("student_logits", "teacher_logits"),
    ],
)
def test_a_freed_storage_is_refused(name):
    """As ZeRO-3 and FSDP leave a parameter: shape and dtype are there, the memory is not."""
    loss = rows if name.endswith("logits") else linear
    names = ("student_hidden", "student_head", "teacher_hidden", "teacher_head")
    arguments = dict(zip(names, make_linear(N, H, HT, V, torch.float32), strict=True))
    logits = dict(zip(("student_logits", "teacher_logits"), make_rows(N, V, torch.float32), strict=True))
    others = {
        "mask": torch.ones(N, dtype=torch.bool),
        "labels": torch.zeros(N, dtype=torch.int64),
        "grad_head_accumulator": torch.zeros(V, H),
    }
    tensor = {**arguments, **logits, **others}.get(name, torch.zeros(V))
    with pytest.raises(ValueError, match=rf"{name} has no memory: its storage was freed"):
        loss(**{name: freed(tensor)})


def test_a_freed_storage_is_refused_by_the_kernels_too():
    """Where nothing looked before: below torch.compile, and between a forward and its backward."""
    student, teacher = make_rows(N, V, torch.float32)
    options = (V, [0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    with pytest.raises(RuntimeError, match="teacher_logits has no memory"):
        torch.ops.minitron_kernels.kl_loss_forward(student, freed(teacher), None, *options)
    hidden, head, *constants = make_linear(N, H, HT, V, torch.float32)
    loss = mk.linear_kl_loss(hidden.requires_grad_(), head, *constants, reduction="none").sum()
    head.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="student_head has no memory"):
        loss.backward()


@pytest.mark.parametrize("what", ["weight", "rows", "out"])
def test_freed_storages_in_gather(what):
    arguments = {"weight": torch.ones(4, 6), "rows": torch.tensor([0, 2]), "out": torch.ones(2, 6)}
    arguments[what] = freed(arguments[what])
    with pytest.raises((RuntimeError, ValueError), match="no memory"):
        torch.ops.minitron_kernels.gather_channels_(*(arguments[k] for k in ("out", "weight", "rows")), None)


def test_freed_storages_in_importance():
    x = torch.ones(2, 3, 8)
    with pytest.raises(RuntimeError, match="x has no memory"):
        torch.ops.minitron_kernels.importance_moments(freed(x), None, None, 0, 1)
    with pytest.raises(RuntimeError, match="mask has no memory"):
        mask = torch.ones(2, 3, dtype=torch.bool)
        torch.ops.minitron_kernels.importance_moments(x, freed(mask), None, 0, 1)


@pytest.mark.parametrize("module", [mk.KLLoss, mk.LinearKLLoss])
def test_a_misspelt_option_of_a_module(module):
    with pytest.raises(TypeError, match=r"no option 'temprature' .*kl_loss\(\): did you mean temperature\?"):
        module(temprature=2.0)
    with pytest.raises(TypeError, match="no option 'student_hidden'"):
        module(student_hidden=torch.zeros(1))
    module(temperature=2.0, labels=None)


def test_inputs_are_left_alone():
    """What is passed has the same bits after a call and its backward, and shares no memory with a result."""
    hidden, head, teacher_hidden, teacher_head = make_linear(N, H, HT, V, torch.float32)
    given = {
        "mask": torch.arange(N) % 4 > 0,
        "labels": torch.tensor([3, -100, 5, 6, 39, 0]),
        "student_bias": torch.linspace(-1, 1, V).requires_grad_(),
        "teacher_bias": torch.linspace(1, -1, V),
    }
    items = torch.tensor(17)
    for schedule in ("store", "recompute"):
        for reduction in ("mean", "sum", "none"):
            inputs = [hidden.requires_grad_(), head.requires_grad_(), teacher_hidden, teacher_head]
            everything = [*inputs, *given.values(), items]
            before = [x.detach().clone() for x in everything]
            options = {"num_items": items} if reduction == "mean" else {}
            loss = mk.linear_kl_loss(*inputs, reduction=reduction, schedule=schedule, **options, **given)
            results = [loss, *torch.autograd.grad(loss.sum(), [*inputs[:2], given["student_bias"]])]
            logits = (hidden @ head.T).detach().requires_grad_(), teacher_hidden @ teacher_head.T
            kept = [x.detach().clone() for x in logits]
            loss = mk.kl_loss(
                *logits, reduction=reduction, mask=given["mask"], labels=given["labels"], **options
            )
            results += [loss, *torch.autograd.grad(loss.sum(), logits[0])]
            assert all(torch.equal(a, b) for a, b in zip(everything, before, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(logits, kept, strict=True))
            theirs = {x.untyped_storage().data_ptr() for x in (*everything, *logits)}
            ours = {x.untyped_storage().data_ptr() for x in results}
            assert len(ours) == len(results) and not ours & theirs
