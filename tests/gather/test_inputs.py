"""What gather_channels takes, what it refuses and says, and what it leaves alone."""

import pytest
import torch

import minitron_kernels as mk
from gather.problems import BACKENDS, assert_gathered, bytes_of, keep_some, make_weight

WEIGHT = torch.zeros(4, 6)
ONE = torch.tensor([0])


BAD = {
    "no tensor": (([1], ONE), {}, TypeError, "weight must be a torch.Tensor, got list"),
    "a scalar": ((torch.tensor(1.0),), {}, ValueError, "weight must have at least 1 dimension"),
    "sparse": ((WEIGHT.to_sparse(),), {}, TypeError, "weight must be a dense tensor"),
    "rows of a vector": ((WEIGHT[0], ONE), {}, ValueError, "rows must be None for a vector"),
    "a list of rows": ((WEIGHT, [0]), {}, TypeError, "rows must be an int64 or int32 tensor, got list"),
    "a mask": ((WEIGHT, None, torch.ones(6).bool()), {}, TypeError, "cols must be .* got torch.bool"),
    "two dimensions": ((WEIGHT, ONE[None]), {}, ValueError, r"rows must have one dimension, got \(1, 1\)"),
    "too large": (
        (WEIGHT, torch.tensor([3, 0, 4, -1])),
        {},
        ValueError,
        r"rows\[2\] is 4: indices must be in \[0, 4\); 2 of 4 are not",
    ),
    "negative": ((WEIGHT, None, torch.tensor([5, -1])), {}, ValueError, r"cols\[1\] is -1: .*\[0, 6\)"),
    "another axis": (
        (WEIGHT, mk.ChannelIndex(ONE, 6)),
        {},
        ValueError,
        "rows must be for weight's 4 channels, got one for 6",
    ),
    "out no tensor": ((WEIGHT,), {"out": 1}, TypeError, "out must be a torch.Tensor, got int"),
    "out's shape": ((WEIGHT, ONE), {"out": torch.empty(1, 5)}, ValueError, r"out must be \(1, 6\)"),
    "out's dtype": ((WEIGHT,), {"out": WEIGHT.double()}, TypeError, "out must have weight's dtype"),
    "out is weight": ((WEIGHT,), {"out": WEIGHT}, ValueError, "memory that weight spans"),
    "out is in weight": ((WEIGHT[:2],), {"out": WEIGHT[1:3]}, ValueError, "memory that weight spans"),
    "out's kind": ((WEIGHT,), {"out": torch.zeros(4, 6).int()}, TypeError, "out must have weight's dtype"),
    "out begins at weight's last element": (
        (torch.zeros(30)[:24].view(4, 6), ONE),
        {"out": None},
        ValueError,
        "memory that weight spans",
    ),
    "out overlaps itself": (
        (WEIGHT,),
        {"out": torch.empty(4, 1).expand(4, 6)},
        ValueError,
        "out must not overlap itself",
    ),
    "out's rows overlap": (
        (WEIGHT,),
        {"out": torch.empty(30).as_strided((4, 6), (5, 1))},
        ValueError,
        "out must not overlap itself",
    ),
    "backend": ((WEIGHT,), {"backend": "cuda"}, ValueError, "backend must be"),
    "grad": ((torch.zeros(2, 2, requires_grad=True),), {}, ValueError, "weight requires grad"),
    "grad of out": (
        (WEIGHT,),
        {"out": torch.zeros(4, 6, requires_grad=True)},
        ValueError,
        "out requires grad",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # quantized tensors are deprecated
def test_packed_and_quantized_weights_are_refused():
    """Their elements are no channels, or mean nothing without their scales."""
    packed = torch.zeros(4, 6, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with pytest.raises(TypeError, match="float4_e2m1fn_x2 packs several: unpack it first"):
        mk.gather_channels(packed, ONE)
    quantized = torch._empty_affine_quantized((4, 6), scale=0.1, dtype=torch.qint8)
    with pytest.raises(TypeError, match=r"weight must not be quantized, got torch.qint8"):
        mk.gather_channels(quantized, ONE)


@pytest.mark.parametrize("name", ["weight", "out", "rows"])
def test_freed_storages_are_refused(name):
    tensors = {"weight": torch.zeros(4, 6), "out": torch.zeros(1, 6), "rows": torch.tensor([0])}
    tensors[name].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"{name} has no memory: its storage was freed"):
        mk.gather_channels(**tensors)


def test_no_derivative_is_lost_in_silence():
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(WEIGHT.clone(), torch.ones(4, 6))
        for arguments in ({"weight": dual}, {"weight": WEIGHT, "out": dual}):
            with pytest.raises(ValueError, match="carries a forward-mode tangent"):
                mk.gather_channels(**arguments)


@pytest.mark.parametrize("outer", ["jvp", "grad"])
@pytest.mark.parametrize("inner", ["grad", "grad of another", "vmap"])
def test_no_derivative_is_lost_in_nested_transforms(outer, inner):
    """The innermost transform sees a weight that neither requires grad nor has a tangent."""

    def within(y, weight):
        return (y * mk.gather_channels(weight, ONE, backend="reference")).sum()

    def function(weight):
        if inner == "vmap":  # over both
            return torch.func.vmap(within)(torch.ones(3, 1, 6), weight * torch.ones(3, 1, 1)).sum()
        if inner == "grad":  # which takes all arguments into its level
            return torch.func.grad(within)(torch.ones(1, 6), weight).sum()
        return torch.func.grad(lambda y: within(y, weight))(torch.ones(1, 6)).sum()

    with pytest.raises(ValueError, match=r"weight (may carry a forward-mode tangent|requires grad)"):
        if outer == "jvp":
            torch.func.jvp(function, (WEIGHT,), (torch.ones(4, 6),))
        else:
            torch.func.grad(function)(WEIGHT)
    ones = (torch.ones(1, 6),)
    constant = torch.func.jvp(lambda y: torch.func.grad(within)(y, WEIGHT).sum(), ones, ones)
    assert constant[1] == 0  # nothing to lose


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_mode(backend):
    """Tensors made in it, inside and outside of it."""
    with torch.inference_mode():
        weight, out = torch.randn(4, 6), torch.zeros(1, 6)
        mk.gather_channels(weight, ONE, out=out, backend=backend)
        index = mk.ChannelIndex(torch.tensor([2]), 4)
        assert torch.equal(out, weight[:1])
    out = torch.zeros(1, 6)
    mk.gather_channels(weight, index, out=out, backend=backend)
    assert torch.equal(out, weight[2:3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_share_no_memory_and_inputs_are_left_alone(backend):
    weight, rows, cols = make_weight(6, 90), keep_some(6, 4), keep_some(90, 50)
    copies = [bytes_of(weight).copy(), rows.clone(), cols.clone()]
    index = mk.ChannelIndex(cols, 90)
    for keep in ((None, None), (rows, None), (None, cols), (rows, index)):
        result = mk.gather_channels(weight, *keep, backend=backend)
        result.view(torch.uint8).fill_(7)
        assert (bytes_of(weight) == copies[0]).all()
    assert torch.equal(rows, copies[1]) and torch.equal(cols, copies[2])
    assert torch.equal(index.values, cols) and index.values.data_ptr() != cols.data_ptr()


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    arguments, options, error, message = BAD[name]
    if name == "out begins at weight's last element":
        whole = arguments[0].as_strided((30,), (1,))
        mk.gather_channels(*arguments, out=whole[24:].view(1, 6))  # beside it there is room
        options = {"out": whole[23:29].view(1, 6)}
    with pytest.raises(error, match=message):
        mk.gather_channels(*arguments, **options)


def test_bad_channel_index():
    with pytest.raises(TypeError, match="size must be an int, got float"):
        mk.ChannelIndex(ONE, 1.0)
    with pytest.raises(ValueError, match="size must not be negative"):
        mk.ChannelIndex(ONE, -1)
    with pytest.raises(ValueError, match=r"keep\[0\] is 0: indices must be in \[0, 0\)"):
        mk.ChannelIndex(ONE, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_is_unchanged_by_an_error(backend):
    out = make_weight(2, 6)
    before = bytes_of(out).copy()
    with pytest.raises(ValueError, match=r"cols\[5\]"):
        mk.gather_channels(make_weight(4, 6), ONE.repeat(2), torch.arange(1, 7), out=out, backend=backend)
    assert (bytes_of(out) == before).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_without_grad_mode(backend):
    """Results carry no graph; writing to a parameter counts as a change of it."""
    weight, out = torch.nn.Parameter(torch.randn(4, 6)), torch.nn.Parameter(torch.randn(2, 6))
    rows = torch.tensor([3, 1])
    version = out._version
    with torch.no_grad():
        result = mk.gather_channels(weight, rows, backend=backend)
        assert mk.gather_channels(weight, rows, out=out, backend=backend) is out
    assert not result.requires_grad and out.requires_grad and out._version > version
    assert torch.equal(result, out) and torch.equal(out, weight[rows])
    assert torch.equal(mk.gather_channels(weight.detach(), rows, backend=backend), result)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lazy_conjugates(backend):
    x = make_weight(5, 6, dtype=torch.complex64)
    for weight in (x.conj(), x.conj().imag):
        assert_gathered(
            mk.gather_channels(weight, ONE, backend=backend), weight.resolve_neg().resolve_conj(), ONE
        )
    with pytest.raises(ValueError, match="out must be plain memory"):
        mk.gather_channels(x, out=torch.empty_like(x).conj(), backend=backend)
