"""HiddenStatesLoss against plain PyTorch on full tensors."""

import re
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distillation.hidden_oracle import hidden_loss
from minitron_kernels.distillation import HiddenStatesLoss
from minitron_kernels.distillation.hidden_rows import Options, chunk_tokens, grads_of_chunks, loss_of_chunks

LAYERS = {0: 1, 2: 4}
SMALL = 2000  # bytes: a chunk of one or two tokens


def states(H, Ht, dtype, shape=(2, 7), close=False, seed=0):
    """{layer: states} of both; `close`: the teacher's are almost the student's, of another size."""
    torch.manual_seed(seed)
    student = {i: torch.randn(*shape, H, dtype=torch.float64) for i in LAYERS}
    teacher = {j: torch.randn(*shape, Ht, dtype=torch.float64) + 0.3 for j in LAYERS.values()}
    if close:
        teacher = {j: 3 * student[i] + 1e-3 * torch.randn(*shape, Ht).double() for i, j in LAYERS.items()}
    return (
        {i: x.to(dtype).requires_grad_() for i, x in student.items()},
        {j: z.to(dtype) for j, z in teacher.items()},
    )


def grads_of(loss, leaves):
    return torch.autograd.grad(loss * 3, leaves)


def compare(module, student, teacher, *, rtol, atol, autocast=None, labels=None, mask=None, **options):
    """Loss and gradients of a module and of the oracle in float64."""
    learned = [] if module.map is None else [module.map.weight]
    actual = module(student, teacher, labels, mask=mask, **options)
    assert actual.dtype == (torch.float64 if rtol < 1e-9 else torch.float32) and actual.shape == ()
    grads = grads_of(actual, [*student.values(), *learned])
    xs = {i: x.detach().double().requires_grad_() for i, x in student.items()}
    weight = module.map.weight.detach().double().requires_grad_() if learned else None
    valid = torch.ones(next(iter(student.values())).shape[:-1], dtype=torch.bool)
    if labels is not None:
        valid &= labels != -100
    if mask is not None:
        valid &= mask
    channels = module.channel_weights
    truth = hidden_loss(
        [(xs[i], teacher[j].double()) for i, j in module.layers.items()],
        valid=valid,
        kind=module.kind,
        norm=module.norm,
        weight=weight,
        channel_weights=None if channels is None else channels.double(),
        **options,
    )
    torch.testing.assert_close(actual.double(), truth, rtol=rtol, atol=1e-14)
    wanted = grads_of(truth, [*xs.values(), *([weight] if learned else [])])
    for grad, right in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad.double(), right, rtol=rtol, atol=atol * float(right.abs().max()))


@pytest.mark.parametrize("kind", ["cosine", "mse"])
@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
@pytest.mark.parametrize(("H", "Ht"), [(6, 9), (9, 6), (8, 8)])
def test_loss_and_gradients(kind, norm, H, Ht):
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        student, teacher = states(H, Ht, dtype)
        for how in ("plain", "weighted", "channels"):
            module = HiddenStatesLoss(
                LAYERS,
                kind=kind,
                norm=norm,
                student_width=H,
                teacher_width=Ht,
                channel_weights=torch.rand(Ht, dtype=torch.float64) + 0.1 if how == "channels" else None,
                workspace_bytes=SMALL if how != "plain" else None,
            ).to(dtype)
            assert (module.map is None) == (Ht == H)
            options = {}
            if how == "weighted":
                labels = torch.arange(14).view(2, 7)
                labels[0, :3] = -100
                options = {"labels": labels, "mask": labels != 9, "num_items": 5.5}
                options["token_weights"] = torch.rand(2, 7, dtype=dtype)
            compare(module, student, teacher, rtol=rtol, atol=rtol, **options)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_digits_are_kept_close_to_the_teacher(kind):
    student, teacher = states(16, 16, torch.float32, close=True)
    compare(HiddenStatesLoss(LAYERS, kind=kind), student, teacher, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_what_does_not_count_may_be_nan(kind):
    student, teacher = states(6, 9, torch.float32)
    module = HiddenStatesLoss(LAYERS, kind=kind, student_width=6, teacher_width=9, workspace_bytes=SMALL)
    leaves = [*student.values(), module.map.weight]
    mask = torch.tensor([[False, True] * 3 + [False], [True] * 7])
    weights = torch.rand(2, 7)
    weights[1, 0] = 0
    wanted = module(student, teacher, mask=mask, token_weights=weights)
    right = grads_of(wanted, leaves)
    with torch.no_grad():
        for x in (*student.values(), *teacher.values()):
            x[~mask] = float("nan")
            x[1, 0] = float("inf")
    actual = module(student, teacher, mask=mask, token_weights=weights)
    assert torch.equal(actual, wanted)
    assert all(map(torch.equal, grads_of(actual, leaves), right))
    assert not module(student, teacher, mask=mask).isfinite()  # where it counts it is seen
    assert module(student, teacher, mask=mask & False, num_items=3) == 0


class LiveBytes(TorchDispatchMode):
    """The most bytes of new tensors that were alive at a time, and the largest of them."""

    def __init__(self, given):
        super().__init__()
        self.given = {x.untyped_storage()._cdata for x in given if x is not None}
        self.alive, self.now, self.peak, self.largest = {}, 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.count(x)
        return out

    def count(self, x):
        key, nbytes = x.untyped_storage()._cdata, x.untyped_storage().nbytes()
        if key in self.given:
            return
        if key not in self.alive:
            self.now += nbytes
            self.largest = max(self.largest, nbytes)
            self.peak = max(self.peak, self.now)
        self.alive[key] = self.alive.get(key, 0) + 1
        weakref.finalize(x, self.free, key, nbytes)

    def free(self, key, nbytes):
        self.alive[key] -= 1
        if not self.alive[key]:
            del self.alive[key]
            self.now -= nbytes


@pytest.mark.parametrize("kind", ["cosine", "mse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mapped", [False, True])
def test_workspace(kind, dtype, mapped):
    N, H = 1024, 24
    Ht = 32 if mapped else H
    torch.manual_seed(0)
    xs, zs = [[torch.randn(N, width).to(dtype) for _ in range(3)] for width in (H, Ht)]
    weight = torch.randn(Ht, H).to(dtype) if mapped else None
    budget = 25_000
    options = Options(kind, "layer", dtype if mapped else torch.float32, chunk_tokens(budget, H, Ht, 4))
    assert 1 < options.chunk_tokens < N // 20
    rest = weight, torch.ones(Ht), torch.full((N,), 1 / N), torch.ones(N, dtype=torch.bool)
    of_map = 3 * Ht * H * 4  # copies of its operand, its gradient
    with LiveBytes([*xs, *zs, *rest]) as seen:
        loss_of_chunks(xs, zs, *rest, options)
    assert seen.peak <= budget + of_map
    with LiveBytes([*xs, *zs, *rest]) as seen:
        grads = grads_of_chunks(torch.ones(()), xs, zs, *rest, options, [True, True, False], mapped)
    made = sum(grad.numel() * grad.element_size() for grad in grads)
    assert seen.peak <= made + budget + of_map
    # neither is the bound met for nothing
    assert seen.peak > made + budget / 3 and seen.largest == N * H * xs[0].element_size()


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_16_bit(kind):
    for dtype in (torch.bfloat16, torch.float16):
        student, teacher = states(6, 9, dtype)
        module = HiddenStatesLoss(LAYERS, kind=kind, student_width=6, teacher_width=9, workspace_bytes=SMALL)
        eps = torch.finfo(dtype).eps
        xs = {i: x.detach().double().requires_grad_() for i, x in student.items()}
        for map_dtype in (torch.float32, dtype):  # the products' operands are fp32, or of 16 bits
            module.to(map_dtype)
            weight = module.map.weight.detach().double().requires_grad_()
            pairs = [(xs[i], teacher[j].double()) for i, j in LAYERS.items()]
            truth = hidden_loss(pairs, kind=kind, weight=weight)
            actual = module(student, teacher)
            fp32 = map_dtype == torch.float32 or kind == "cosine"
            torch.testing.assert_close(actual.double(), truth, rtol=1e-5 if fp32 else eps, atol=0)
            grads = grads_of(actual, [*student.values(), module.map.weight])
            wanted = grads_of(truth, [*xs.values(), weight])
            for grad, right in zip(grads, wanted, strict=True):
                largest = float(right.abs().max())
                torch.testing.assert_close(grad.double(), right, rtol=eps, atol=2 * eps * largest)


def test_autocast_rounds_the_operands_of_the_map():
    student, teacher = states(6, 9, torch.float32)
    module = HiddenStatesLoss(LAYERS, student_width=6, teacher_width=9)
    rounded = HiddenStatesLoss(LAYERS, student_width=6, teacher_width=9)
    rounded.map.weight.data.copy_(module.map.weight.data.bfloat16())
    halves = {i: x.detach().bfloat16().float().requires_grad_() for i, x in student.items()}
    with torch.autocast("cpu", torch.bfloat16):
        actual = module(student, teacher)
    assert actual.dtype == torch.float32
    wanted = rounded(halves, teacher)
    torch.testing.assert_close(actual, wanted)
    grads = grads_of(actual, [*student.values(), module.map.weight])
    right = grads_of(wanted, [*halves.values(), rounded.map.weight])
    for a, b in zip(grads, right, strict=True):
        torch.testing.assert_close(a, b, rtol=0.01, atol=0.01 * float(b.abs().max()))
    assert module(student, teacher) != actual  # without autocast nothing is rounded


def test_small_gradients_survive_a_scaled_loss_in_fp16():
    student, teacher = states(8, 8, torch.float16)
    weights = torch.full((2, 7), 1e-7)
    module = HiddenStatesLoss(LAYERS)
    scale = 2.0**16
    grads = torch.autograd.grad(module(student, teacher, token_weights=weights) * scale, student.values())
    wanted = torch.autograd.grad(module(student, teacher) * scale * 1e-7, student.values())
    for a, b in zip(grads, wanted, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-6)


def test_states_of_zeros_have_no_direction():
    student, teacher = states(8, 8, torch.float32)
    student[0].data[0, 0] = 0
    teacher[1][1, 1] = 0
    for kind in ("cosine", "mse"):
        loss = HiddenStatesLoss({0: 1}, kind=kind)(student, teacher)
        (grad,) = grads_of(loss, [student[0]])
        assert loss.isfinite() and not grad[0, 0].any() and grad.isfinite().all()
    one = torch.zeros(2, 7, dtype=torch.bool)
    one[0, 0] = True
    assert HiddenStatesLoss({0: 1})(student, teacher, mask=one) == 1


def test_only_what_needs_a_gradient_gets_one():
    student, teacher = states(6, 9, torch.float32)
    module = HiddenStatesLoss(LAYERS, student_width=6, teacher_width=9)
    student[0].requires_grad_(False)
    module(student, teacher).backward()
    assert student[0].grad is None and student[2].grad is not None and module.map.weight.grad is not None
    module.map.requires_grad_(False)
    student[2].grad = None
    module(student, teacher).backward()
    assert student[2].grad is not None
    student[2].requires_grad_(False)
    assert not module(student, teacher).requires_grad
    with torch.inference_mode():
        frozen = {j: z * 1 for j, z in teacher.items()}
    student[2].requires_grad_()
    module(student, frozen).backward()  # tensors of inference_mode are constants like others


def test_second_derivatives_and_transforms_are_refused():
    student, teacher = states(8, 8, torch.float32)
    module = HiddenStatesLoss(LAYERS)
    (grad,) = torch.autograd.grad(module(student, teacher), student[0], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match=r"functorch|torch.func"):
        torch.func.grad(lambda x: module({0: x, 2: student[2]}, teacher))(student[0])


def test_where_the_map_starts():
    x = torch.randn(1000, 6)
    for Ht in (9, 4):
        module = HiddenStatesLoss({0: 0}, student_width=6, teacher_width=Ht)
        y = x @ module.map.weight.T
        assert 0.8 < (y.pow(2).mean() / x.pow(2).mean()) < 1.2
        smaller = module.map.weight if Ht < 6 else module.map.weight.T
        gram = smaller @ smaller.T
        torch.testing.assert_close(gram, gram[0, 0] * torch.eye(len(gram)), atol=1e-5, rtol=0)
    kept = (7, 0, 3)
    module = HiddenStatesLoss({0: 0}, student_width=3, teacher_width=9, kept_channels=kept)
    z = torch.zeros(9)
    z[list(kept)] = x[0, :3]
    assert torch.equal(module.map.weight @ x[0, :3], z)
    module = HiddenStatesLoss({0: 0}, student_width=5, teacher_width=5, learn_map=True)
    assert torch.equal(module.map.weight, torch.eye(5))
    assert HiddenStatesLoss({0: 0}, student_width=5, teacher_width=5).map is None


def test_state_dict_is_exact():
    torch.manual_seed(1)
    options = {"student_width": 6, "teacher_width": 9, "channel_weights": torch.rand(9)}
    first, second = HiddenStatesLoss(LAYERS, **options), HiddenStatesLoss(LAYERS, **options)
    first.map.weight.data.normal_()
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.map.weight, second.map.weight)
    assert set(first.state_dict()) == {"map.weight", "channel_weights"}
    with pytest.raises(RuntimeError, match=r"size mismatch for map.weight"):
        HiddenStatesLoss(LAYERS, student_width=5, teacher_width=9).load_state_dict(
            first.state_dict(), strict=False
        )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": [1, 2]}, TypeError, "layers must be a mapping {student layer: teacher layer}, got list"),
        ({"layers": {}}, ValueError, "layers is empty"),
        ({"layers": {0: -1}}, ValueError, "layers must be counted from 0"),
        ({"layers": {0: "1"}}, TypeError, "layers must be an int"),
        ({"kind": "l2"}, ValueError, "kind must be one of cosine, mse, got 'l2'"),
        ({"norm": None}, ValueError, "norm must be one of rms, layer, none"),
        ({"student_width": 6}, ValueError, "student_width and teacher_width go together"),
        ({"learn_map": True}, ValueError, "needs both student_width and teacher_width"),
        ({"student_width": 6, "teacher_width": 9, "learn_map": False}, ValueError, "a map is needed"),
        ({"student_width": 0, "teacher_width": 9}, ValueError, "student_width must be 1 or more"),
        (
            {"student_width": 3, "teacher_width": 9, "kept_channels": (0, 1, 9)},
            ValueError,
            "3 different channels below teacher_width=9",
        ),
        (
            {"student_width": 3, "teacher_width": 3, "kept_channels": (0, 1, 2)},
            ValueError,
            "kept_channels are where a map starts",
        ),
        ({"channel_weights": torch.ones(2, 3)}, ValueError, "channel_weights must be .teacher_width."),
        ({"workspace_bytes": 0}, ValueError, "workspace_bytes must be 1 or more"),
        ({"widths": 3}, TypeError, "widths"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=re.escape(message) if "{" in message else message):
        HiddenStatesLoss(**{"layers": LAYERS, **options})


def other(states, layer, value):
    return {**states, layer: value}


def test_wrong_states():
    student, teacher = states(6, 9, torch.float32)
    module = HiddenStatesLoss(LAYERS, student_width=6, teacher_width=9)
    x, z = student[2], teacher[4]
    cases = [
        ({0: x}, teacher, ValueError, "the student's signal has layers 0, but .* needs layers 0, 2"),
        (student, {}, ValueError, "the teacher's signal has no layers, but .* needs layers 1, 4: .*cached"),
        (
            student,
            other(teacher, 4, z[:1]),
            ValueError,
            r"teacher layer 4 must be \(2, 7, 9\).*got \(1, 7, 9\)",
        ),
        (student, other(teacher, 4, z[..., :3]), ValueError, r"teacher layer 4 must be \(2, 7, 9\)"),
        (other(student, 2, x[..., :3]), teacher, ValueError, r"student layer 2 must be \(2, 7, 6\)"),
        (
            student,
            other(teacher, 4, z.to("meta")),
            ValueError,
            "teacher layer 4 is on meta, but student layer 0",
        ),
        (student, other(teacher, 4, z.long()), TypeError, "teacher layer 4 is torch.int64"),
        (student, other(teacher, 4, z.double()), TypeError, "teacher layer 4 is torch.float64"),
        (student, other(teacher, 4, None), TypeError, "teacher layer 4 must be a torch.Tensor, got NoneType"),
        (student, other(teacher, 4, z * x.sum()), ValueError, "teacher layer 4 requires grad"),
        ({i: x[..., :5] for i, x in student.items()}, teacher, ValueError, "widths 5 .student. and 9"),
    ]
    for xs, zs, error, message in cases:
        with pytest.raises(error, match=message):
            module(xs, zs)
    with pytest.raises(ValueError, match=r"a map is needed, .*student_width=6, teacher_width=9"):
        HiddenStatesLoss(LAYERS)(student, teacher)
    with pytest.raises(ValueError, match="the map is on meta, but the student's layers are on cpu"):
        HiddenStatesLoss(LAYERS, student_width=6, teacher_width=9).to("meta")(student, teacher)
    with pytest.raises(ValueError, match="labels must have one entry per token"):
        module(student, teacher, torch.zeros(7, dtype=torch.int64))
    # labels only say which tokens count here
    assert module(student, teacher, torch.full((2, 7), 10**9)).isfinite()


def test_compiled():
    student, teacher = states(6, 9, torch.float32)
    module = HiddenStatesLoss(LAYERS, student_width=6, teacher_width=9, norm="layer", workspace_bytes=SMALL)
    mask = torch.arange(14).view(2, 7) % 3 > 0
    leaves = [*student.values(), module.map.weight]

    def call(student, teacher, mask):
        return module(student, teacher, mask=mask, num_items=4)

    wanted = call(student, teacher, mask)
    actual = torch.compile(call, fullgraph=True, backend="aot_eager")(student, teacher, mask)
    assert torch.equal(actual, wanted)
    assert all(map(torch.equal, grads_of(actual, leaves), grads_of(wanted, leaves)))
