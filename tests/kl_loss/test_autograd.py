"""What autograd asks of the losses: whose gradients they are, factors, reruns, transforms, constants."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.utils.checkpoint import checkpoint

import minitron_kernels as mk
from kl_loss.problems import TORCH, make_linear

pytestmark = pytest.mark.native
N, H, HT, V = 24, 16, 20, 70
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def linear(hidden, head, teacher_hidden, teacher_head, **options):
    return mk.linear_kl_loss(hidden, head, teacher_hidden, teacher_head, **options)


def rows(hidden, head, teacher_hidden, teacher_head, **options):
    """kl_loss, whose gradient to logits is then this library's alone."""
    return mk.kl_loss(hidden @ head.T, teacher_hidden @ teacher_head.T, **options)


def problem(dtype=torch.float32, learn=(0, 1)):
    tensors = make_linear(N, H, HT, V, dtype)
    return [x.requires_grad_(i in learn) for i, x in enumerate(tensors)]


def grads_of(loss, tensors, **options):
    return torch.autograd.grad(loss, [x for x in tensors if x.requires_grad], **options)


# ---- gradients handed out are the caller's


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [linear, rows])
def test_gradients_handed_out_may_be_edited(function, dtype, reduction):
    """In every way, between any number of backwards through a graph that is kept."""
    tensors = problem(dtype)
    bias = torch.zeros(V, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    options = {"student_bias": bias.requires_grad_()} if function is linear else {}
    wanted = [*tensors[:2], *options.values()]

    def loss_of():
        return function(*tensors, reduction=reduction, **options).sum()

    expected = [g.clone() for g in torch.autograd.grad(loss_of(), wanted)]
    loss = loss_of()
    for factor in (1.0, 1.0, 2.0, 1.0):
        grads = torch.autograd.grad(factor * loss, wanted, retain_graph=True)
        for g, e in zip(grads, expected, strict=True):
            small = {"rtol": 2e-3, "atol": 2e-5} if dtype == torch.float16 else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(g, factor * e, **small)  # fp16: 2 x a subnormal
            g.data.zero_(), g.div_(0.0)
    for g, e in zip(torch.autograd.grad(loss, wanted), expected, strict=True):
        assert torch.equal(g, e)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, wanted)


def test_an_ordinary_backward_copies_no_gradient():
    """The gradient made in the forward is scaled where it lies; a graph that is kept costs a copy."""
    hidden, head, *teacher = (x.detach() for x in problem())
    head.requires_grad_()
    for factor, keep, copies in ((1.0, False, 0), (0.5, False, 0), (1.0, True, 1), (0.5, True, 1)):
        loss = factor * linear(hidden, head, *teacher)
        kept = loss.grad_fn.next_functions[0][0].saved_tensors
        (saved,) = (x for x in kept if x is not None and x.shape == head.shape)
        (grad,) = torch.autograd.grad(loss, head, retain_graph=keep)
        assert (grad.data_ptr() == saved.data_ptr()) == (copies == 0)


# ---- the incoming factor


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [0.3, 1 / 3, 1 + 2.0**-10, 2.0**-13])
def test_the_factor_is_not_rounded(factor, dtype, keep):
    """Gradients are those of factor 1 times the factor in fp32 (fp64), rounded once."""
    tensors = problem(dtype)
    whole = grads_of(linear(*tensors), tensors)
    scaled = grads_of(factor * linear(*tensors), tensors, retain_graph=keep)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for a, b in zip(scaled, whole, strict=True):
        if dtype == torch.float16:  # kept in fp32 until they are scaled: more exact than the rounded ones
            torch.testing.assert_close(a, (b.float() * factor).half(), rtol=2e-3, atol=2e-7)
        else:
            assert torch.equal(a, (b.to(wide) * torch.tensor(factor, dtype=wide)).to(dtype))


# ---- a gradient is added to a caller's buffer once, with its factor


def lent(function=linear, **options):
    hidden, head, *teacher = problem()
    buffer = torch.full((V, H), 2.0)
    return (
        hidden,
        head,
        buffer,
        lambda x, w: function(x, w, *teacher, grad_head_accumulator=buffer, **options),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("schedule", ["auto", "store", "recompute"])
@pytest.mark.parametrize("rerun", [None, "non-reentrant", "reentrant"])
def test_a_buffer_is_added_to_once(rerun, schedule, reduction):
    """Whatever runs the forward again, and whatever the loss is multiplied by."""
    options = {"schedule": schedule, "reduction": reduction}
    hidden, head, buffer, loss_of = lent(**options)
    plain = problem()
    expected = grads_of(linear(*plain, **options), plain)
    loss_of(hidden, head)  # never followed by a backward
    assert (buffer == 2).all()
    loss = (
        loss_of(hidden, head)
        if rerun is None
        else checkpoint(loss_of, hidden, head, use_reentrant=rerun == "reentrant")
    )
    (0.5 * loss).backward(retain_graph=rerun is None)
    torch.testing.assert_close(buffer - 2, 0.5 * expected[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hidden.grad, 0.5 * expected[0], rtol=1e-5, atol=1e-7)
    assert head.grad is None
    if rerun is None:  # backward again: added again
        loss.backward()
        torch.testing.assert_close(buffer - 2, 1.5 * expected[1], rtol=1e-5, atol=1e-6)


def test_micro_batches_in_flight_share_a_buffer():
    """Forward, forward, backward, backward, as in a pipeline; zeroed in between, as by an optimizer."""
    hidden, head, buffer, loss_of = lent(num_items=3 * N)
    plain = problem()
    expected = grads_of(linear(*plain, num_items=3 * N), plain)[1]
    first, second = loss_of(hidden, head), loss_of(hidden, head)
    buffer.zero_()
    first.backward()
    second.backward()
    torch.testing.assert_close(buffer, 2 * expected, rtol=1e-5, atol=1e-7)


def test_a_buffer_for_a_head_that_is_frozen_or_alone():
    hidden, head, buffer, loss_of = lent()
    plain = problem()
    expected = grads_of(linear(*plain), plain)[1]
    loss_of(hidden, head.detach()).backward()
    loss_of(hidden.detach(), head).backward()
    torch.testing.assert_close(buffer - 2, 2 * expected, rtol=1e-5, atol=1e-6)


# ---- checkpoints without a buffer; saved-tensor hooks


@pytest.mark.parametrize("function", [linear, rows])
def test_checkpoint_and_saved_tensor_hooks(function):
    tensors = problem()
    expected = grads_of(function(*tensors), tensors)
    for reentrant in (False, True):
        loss = checkpoint(lambda x, w: function(x, w, *tensors[2:]), *tensors[:2], use_reentrant=reentrant)
        for x in tensors[:2]:
            x.grad = None
        loss.backward()
        assert all(torch.equal(x.grad, e) for x, e in zip(tensors[:2], expected, strict=True))
    with torch.autograd.graph.save_on_cpu():
        loss = function(*tensors)
    for _ in range(2):
        grads = grads_of(2 * loss, tensors, retain_graph=True)
        assert all(torch.equal(g, 2 * e) for g, e in zip(grads, expected, strict=True))


# ---- constants


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("which", ["linear", "linear, learning hidden states", "logits"])
def test_a_teacher_of_inference_mode(which, reduction, backend):
    options = {"reduction": reduction, "backend": backend}
    hidden, head, teacher_hidden, teacher_head = problem(learn=(0,) if "hidden" in which else (0, 1))
    bias = torch.linspace(-1, 1, V)
    with torch.inference_mode():
        # views that begin inside of their memory and have strides
        constants = [torch.stack([-x, x, 3 * x], 1)[:, 1] for x in (teacher_hidden, teacher_head, bias)]
        mask = torch.arange(N) % 3 > 0
        frozen = head.detach().clone() if "hidden" in which else head
        made = teacher_hidden @ teacher_head.T
        made = torch.cat([-made, made], 1)[:, V:]

    def run(hidden, head, teacher_hidden, teacher_head, bias, logits, mask):
        if which == "logits":
            loss = mk.kl_loss(hidden @ head.T, logits, mask=mask, **options)
        else:
            loss = mk.linear_kl_loss(
                hidden, head, teacher_hidden, teacher_head, teacher_bias=bias, mask=mask, **options
            )
        return (loss.detach(), *grads_of(loss.sum(), [hidden, head]))

    actual = run(hidden, frozen, *constants, made, mask)
    expected = run(hidden, head, teacher_hidden, teacher_head, bias, made.clone(), mask.clone())
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("function", [linear, rows])
def test_a_teacher_that_is_meant_to_learn_is_refused(function):
    tensors = problem(learn=(0, 1, 2))
    name = "teacher_hidden" if function is linear else "teacher_logits"
    with pytest.raises(ValueError, match=rf"{name} requires grad.*no_grad.*{name}\.detach\(\)"):
        function(*tensors)
    with torch.no_grad():
        function(*tensors)
    head = problem(learn=(0, 1, 3))  # parameters of a teacher that nobody froze
    if function is linear:
        function(*head).backward()
        assert head[3].grad is None


# ---- transforms that kernels do not know


@pytest.mark.parametrize("function", [linear, rows])
def test_transforms_are_right_or_refused(function):
    hidden, *rest = (x.detach().double() for x in problem())

    def loss_of(x, backend):
        return function(x, *rest, backend=backend)

    transforms = {
        "jvp": lambda f: torch.func.jvp(f, (hidden,), (hidden,))[1],
        "grad": lambda f: torch.func.grad(f)(hidden),
        "vmap": lambda f: torch.func.vmap(f)(torch.stack([hidden, 2 * hidden])),
        "hessian": lambda f: torch.func.hessian(f)(hidden).sum(),
        "compiled jvp": lambda f: torch.compile(transforms["jvp"], backend="eager")(f),
    }
    learning = hidden.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(learning, "native"), learning)
    truth = {
        "jvp": (gradient * hidden).sum(),
        "grad": gradient,
        "vmap": torch.stack([loss_of(x, "native") for x in (hidden, 2 * hidden)]),
    }
    for name, transform in transforms.items():
        with pytest.raises(RuntimeError, match=r"torch\.func.*backend='reference'"):
            transform(lambda x: loss_of(x, "auto"))
        if name in truth:
            actual = transform(lambda x: loss_of(x, "reference"))
            torch.testing.assert_close(actual, truth[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["grad_head_accumulator", "grad_head_buffer"])
def test_within_transforms_memory_for_the_reference_is_refused_as_outside(name):
    """Tensors there have no address that could be looked at."""
    hidden, *rest = (x.detach() for x in problem())
    memory = {name: torch.zeros_like(rest[0])}
    with pytest.raises(ValueError, match=f"{name} needs native or triton"):
        torch.func.grad(lambda x: linear(x, *rest, backend="reference", **memory))(hidden)


@pytest.mark.parametrize("function", [linear, rows])
def test_dual_numbers_are_right_or_refused(function):
    hidden, *rest = (x.detach() for x in problem())
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(hidden, torch.ones_like(hidden))
        with pytest.raises(RuntimeError, match=r"forward-mode AD.*backend='reference'"):
            function(dual, *rest)
        # torch 2.11 refuses forward-mode AD in its checkpoint(), in which linear_kl_loss's reference runs
        if function is rows or TORCH >= (2, 13):
            assert forward_ad.unpack_dual(function(dual, *rest, backend="reference")).tangent != 0
        head = forward_ad.make_dual(rest[0], torch.ones_like(rest[0]))
        with pytest.raises(RuntimeError, match=r"forward-mode AD.*backend='reference'"):
            function(hidden, head, *rest[1:])
        function(hidden, *rest)  # no tangent: nothing to lose
        teacher = forward_ad.make_dual(rest[1], torch.ones_like(rest[1]))
        if function is linear:  # a constant
            function(hidden, rest[0], teacher, rest[2])


@pytest.mark.parametrize("function", [linear, rows])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_raise_when_they_are_asked_for(function, reduction):
    """create_graph=True alone is fine, as where another loss of the same graph needs it."""
    tensors = problem()
    loss = function(*tensors, reduction=reduction).sum()
    grads = grads_of(loss, tensors, create_graph=True)
    expected = grads_of(function(*tensors, reduction=reduction).sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    with pytest.raises(RuntimeError, match=r"second derivative.*backend='reference'"):
        (grads[0].square().sum() + tensors[0].sum()).backward()


# ---- nothing to learn from


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("items", [None, 5, 0, torch.tensor(0), torch.tensor(0.0), torch.tensor([0])])
@pytest.mark.parametrize("why", ["no tokens", "all masked", "all labels ignored"])
@pytest.mark.parametrize("function", [linear, rows])
def test_nothing_counts(function, why, items, backend):
    """0, with gradients of 0, whatever num_items is."""
    tokens = 0 if why == "no tokens" else N
    tensors = [x.requires_grad_(i < 2) for i, x in enumerate(make_linear(tokens, H, HT, V, torch.float32))]
    options = {
        "no tokens": {},
        "all masked": {"mask": torch.zeros(tokens, dtype=torch.bool)},
        "all labels ignored": {"labels": torch.full((tokens,), -100)},
    }[why]
    for reduction in ("mean", "sum", "none") if items is None else ("mean",):
        loss = function(*tensors, num_items=items, reduction=reduction, backend=backend, **options)
        assert (loss == 0).all() and loss.grad_fn is not None
        assert all((g == 0).all() for g in grads_of(loss.sum(), tensors))
        if why == "no tokens" and reduction != "none":  # of a masked batch too
            empty = torch.zeros(0, dtype=torch.bool)
            assert function(*tensors, num_items=items, reduction=reduction, mask=empty, backend=backend) == 0


@pytest.mark.parametrize("items", [0, torch.tensor(0), torch.tensor(0.0), -1, torch.tensor(float("nan"))])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("function", [linear, rows])
def test_no_items_while_tokens_count(function, masked, items):
    options = {"mask": torch.arange(N) == 3} if masked else {}
    with pytest.raises(ValueError, match=r"num_items must be finite and greater than 0, got"):
        function(*problem(), num_items=items, **options)
