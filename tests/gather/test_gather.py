"""gather_channels against numpy's take, bit for bit, on every backend that runs here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minitron_kernels as mk
from gather.problems import DTYPES, KINDS, WIDTHS, assert_gathered, bytes_of, keep_some, make_weight
from minitron_kernels import _native

BACKENDS = [pytest.param("native", marks=pytest.mark.native), "reference"]
LINE = 64  # bytes, what the CPU kernels decide about at once


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(backend, dtype):
    weight = make_weight(3, 20, 300, dtype=dtype)
    rows, cols = keep_some(20, 13), keep_some(300, 210)
    for keep in ((rows, cols), (rows, None), (None, cols), (None, None)):
        assert_gathered(mk.gather_channels(weight, *keep, backend=backend), weight, *keep)


@pytest.mark.native
@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_share_of_the_columns(simd_level, dtype, kind):
    """From windows that hold a whole line of the result down to one column of each."""
    weight = make_weight(9, 1111, dtype=dtype)
    for count in (1, 7, 60, 130, 300, 555, 800, 1000, 1104):
        cols = keep_some(1111, count, kind, seed=count)
        assert_gathered(mk.gather_channels(weight, cols=cols, backend="native"), weight, None, cols)


@pytest.mark.native
@pytest.mark.parametrize("dtype", WIDTHS)
def test_every_length_and_misalignment(simd_level, dtype):
    """Lengths around a line's, of the row and of the result, at odd places of larger tensors."""
    per_line = LINE // torch.empty((), dtype=dtype).element_size()
    wide = make_weight(6, 4 * per_line + 9, dtype=dtype)
    room = torch.zeros(6, 4 * per_line + 9, dtype=dtype)
    for length in {1, 2, per_line - 1, per_line, per_line + 1, 2 * per_line, 3 * per_line + 1} - {0}:
        for shift in (0, 1, 3, per_line // 2):
            weight = wide[:, shift : shift + length]
            for count in {1, length // 2, length - 1, length} - {0}:
                cols = keep_some(length, count, seed=count)
                room.view(torch.uint8).fill_(1)
                out = room[1:, shift + 1 : shift + 1 + count]
                result = mk.gather_channels(weight[1:], cols=cols, out=out, backend="native")
                assert result is out
                assert_gathered(out, weight[1:], None, cols)
                out.view(torch.uint8 if dtype != torch.complex128 else dtype).zero_()
                rest = bytes_of(room)
                assert (rest[0] == 1).all(), "written before out"
                rest[1:, shift + 1 : shift + 1 + count] = 1
                assert (rest == 1).all(), "written beside out"


@pytest.mark.native
@pytest.mark.parametrize("pad", [0, 1, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_large_results_go_around_the_caches(simd_level, kind, pad):
    """More than 4 MiB, rows that begin at lines and rows that do not; ends of rows that fill no line."""
    weight = make_weight(1100, 2600)
    rows, cols = keep_some(1100, 1050), keep_some(2600, 2051, kind)
    room = torch.zeros(1050, 2051 + 29 + pad, dtype=torch.bfloat16)
    out = room[:, :2051]
    for keep in ((rows, cols), (None, cols[:2048])):
        here = out if keep[0] is not None else None
        assert_gathered(mk.gather_channels(weight, *keep, out=here, backend="native"), weight, *keep)
    assert (bytes_of(room[:, 2051:]) == 0).all()
    assert_gathered(mk.gather_channels(weight, rows, backend="native"), weight, rows)


def strided(x):
    """Ways to look at [4, 30, 200]."""
    return {
        "every third column": x[..., ::3],
        "every second row": x[:, ::2],
        "columns stored side by side": x.mT.contiguous().mT,
        "leads swapped with rows": x.transpose(0, 1),
        "leads innermost": x.permute(1, 2, 0),
        "one row of all": x[:, :1].expand(4, 12, 200),
        "one column of all": x[..., :1].expand(4, 30, 50),
        "one matrix": x[2],
        "four leads": x.view(2, 2, 1, 5, 6, 200).transpose(0, 3),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("name", strided(torch.zeros(4, 30, 200)))
def test_strides(backend, dtype, name):
    weight = strided(make_weight(4, 30, 200, dtype=dtype))[name]
    R, C = weight.shape[-2:]
    rows, cols = keep_some(R, R // 2 + 1), keep_some(C, C // 2 + 1)
    for keep in ((rows, cols), (rows, None), (None, cols), (None, None)):
        result = mk.gather_channels(weight, *keep, backend=backend)
        assert result.is_contiguous()
        assert_gathered(result, weight, *keep)
        for out in (
            torch.empty_like(result).mT.contiguous().mT,
            make_weight(*result.shape, 2, dtype=dtype)[..., 0],
        ):
            mk.gather_channels(weight, *keep, out=out, backend=backend)
            assert_gathered(out, weight, *keep)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vectors_and_empty(backend):
    vector = make_weight(70)
    for count in (1, 33, 70):
        cols = keep_some(70, count)
        assert_gathered(mk.gather_channels(vector, cols=cols, backend=backend), vector, None, cols)
    none, one = torch.empty(0, dtype=torch.int64), torch.tensor([0])
    assert mk.gather_channels(vector, cols=none, backend=backend).shape == (0,)
    weight = make_weight(3, 5, 7)
    assert mk.gather_channels(weight, none, one, backend=backend).shape == (3, 0, 1)
    assert mk.gather_channels(weight, one, none, backend=backend).shape == (3, 1, 0)
    assert mk.gather_channels(weight[:0], one, one, backend=backend).shape == (0, 1, 1)
    assert mk.gather_channels(weight[:, :0], none, one, backend=backend).shape == (3, 0, 1)
    assert_gathered(mk.gather_channels(weight[:1, :1, :1], one, one, backend=backend), weight[:1, :1, :1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_kinds_of_index(backend):
    """int32, a stride, a ChannelIndex that many weights share; later changes of its tensor do not matter."""
    weight = make_weight(40, 90)
    rows = keep_some(40, 20)
    index = mk.ChannelIndex(rows, 40)
    spread = torch.stack([rows, -rows], 1)[:, 0]
    for keep in (rows, rows.int(), spread, index):
        assert_gathered(mk.gather_channels(weight, keep, backend=backend), weight, rows)
    before = rows.clone()
    rows.zero_()
    assert_gathered(mk.gather_channels(weight, index, backend=backend), weight, before)
    assert_gathered(mk.gather_channels(weight.mT, cols=index, backend=backend), weight.mT, None, before)
    assert len(index) == 20 and index.size == 40


@pytest.mark.parametrize(
    ("keep", "size", "block"),
    [
        (range(32, 64), 128, 16),
        ([0, 1, 2, 3, 8, 9, 10, 11], 16, 4),
        ([8, 9, 0, 1], 16, 2),
        ([1, 2], 16, 1),  # side by side, but not from a multiple of 2
        ([0, 1, 2], 16, 1),
        ([0, 1], 15, 1),  # rows of 15 elements do not begin at a multiple of 2
        ([], 16, 1),
    ],
)
def test_blocks(keep, size, block):
    assert mk.ChannelIndex(torch.tensor(list(keep), dtype=torch.int64), size).block == block


@settings(max_examples=60)
@given(data=st.data())
def test_any_shape(data):
    """Shapes, indices and dtypes of hypothesis' choice, on every backend here."""
    shape = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    dtype = data.draw(st.sampled_from(DTYPES))
    weight = make_weight(*shape, dtype=dtype, seed=sum(shape))
    keep = []
    for axis in (-2, -1):
        some = len(shape) >= -axis and data.draw(st.booleans())
        index = st.lists(st.integers(0, shape[axis] - 1), max_size=80) if some else st.none()
        values = data.draw(index)
        keep.append(None if values is None else torch.tensor(values, dtype=torch.int64))
    for backend in ("native", "reference") if _native.available() else ("reference",):
        assert_gathered(mk.gather_channels(weight, *keep, backend=backend), weight, *keep)


@pytest.mark.native
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads(threads):
    weight = make_weight(8, 300, 513)
    rows, cols = keep_some(300, 280), keep_some(513, 400)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for keep in ((rows, cols), (rows, None), (None, cols)):
            for x in (weight, weight.mT.contiguous().mT, weight[..., ::2]):
                kept = (keep[0], None if keep[1] is None else keep[1][keep[1] < x.shape[-1]])
                assert_gathered(mk.gather_channels(x, *kept), x, *kept)
        large = make_weight(1100, 2600)  # rows that are made aside, one for each thread
        cols = keep_some(2600, 2051)
        assert_gathered(mk.gather_channels(large, cols=cols), large, None, cols)
    finally:
        torch.set_num_threads(before)


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


@pytest.mark.native
def test_around_every_border(simd_level):
    """Rows up to where a plan pays, tiles of 64, tasks of 256 KiB, rows too long to be made aside."""
    for rows in (1, 2, 3, 4, 5):  # a plan pays from four
        for lead in (1, 2):
            weight = make_weight(lead, rows, 200)
            cols = keep_some(200, 150)
            assert_gathered(mk.gather_channels(weight, cols=cols), weight, None, cols)
    for rows, cols in ((63, 65), (64, 64), (65, 63), (1, 4097), (3, 1366), (129, 130)):
        weight = make_weight(rows, 2 * cols)[:, ::2]
        assert_gathered(mk.gather_channels(weight), weight)
        by_columns = make_weight(cols, rows).mT
        keep = keep_some(rows, rows // 2 + 1)
        assert_gathered(mk.gather_channels(by_columns, keep), by_columns, keep)
        room = torch.zeros(rows, 2 * cols, dtype=torch.bfloat16)[:, 1::2]
        mk.gather_channels(by_columns, out=room)
        assert_gathered(room, by_columns)
    for width in (127, 128, 129):  # tasks of 1024 rows of 256 bytes, and one row beside that
        for rows in (1023, 1025, 2049):
            weight = make_weight(rows, width + 5)
            cols = keep_some(width + 5, width)
            assert_gathered(mk.gather_channels(weight, cols=cols), weight, None, cols)
            assert_gathered(mk.gather_channels(weight[:, :width]), weight[:, :width])
    for count in (131_071, 131_072, 131_080):  # rows of 256 KiB, 4 MiB in all, beside lines
        weight = make_weight(17, 131_200)
        cols, room = keep_some(131_200, count), torch.zeros(17, 131_200 + 3, dtype=torch.bfloat16)
        out = room[:, 3 : 3 + count]
        mk.gather_channels(weight, cols=cols, out=out)
        assert_gathered(out, weight, None, cols)
        assert not room[:, :3].any() and not room[:, 3 + count :].any()
    # more than 4 MiB in two matrices, the rows of the first one alone at lines
    weight, cols = make_weight(2, 600, 2200), keep_some(2200, 2048)
    out = torch.zeros(2 * 600 * 2048 + 1, dtype=torch.bfloat16).as_strided(
        (2, 600, 2048), (600 * 2048 + 1, 2048, 1)
    )
    mk.gather_channels(weight, cols=cols, out=out)
    assert_gathered(out, weight, None, cols)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_follow_each_other_in_one_matrix_only(backend):
    """Whole rows, one after the other: into rows that lie apart, out of such, and both."""
    near = make_weight(9, 40)
    apart = torch.zeros(9, 47, dtype=torch.bfloat16)[:, 3:43].copy_(near)
    rows = torch.tensor([1, 2, 3, 4, 7])
    for weight in (near, apart):
        for keep in (None, rows):
            count = 9 if keep is None else len(keep)
            room = torch.zeros(count, 51, dtype=torch.bfloat16)
            out = room[:, 5:45]
            mk.gather_channels(weight, keep, out=out, backend=backend)
            assert_gathered(out, near, keep)
            assert not room[:, :5].any() and not room[:, 45:].any()


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


def test_meta():
    result = mk.gather_channels(torch.empty(3, 4, 6, device="meta"), torch.tensor([3, 1]), ONE)
    assert result.device.type == "meta" and result.shape == (3, 2, 1)


@pytest.mark.native
def test_opcheck():
    ops = torch.ops.minitron_kernels
    out, weight = torch.zeros(2, 3), torch.randn(4, 6)
    rows, cols = torch.tensor([3, 1]), torch.tensor([0, 5, 5])
    torch.library.opcheck(ops.gather_channels_.default, (out, weight, rows, cols))
    torch.library.opcheck(ops.gather_channels_.default, (torch.zeros(4, 6), weight, None, None))


@pytest.mark.native
def test_native_op_guards_itself():
    """What torch.compile calls without the checks of Python."""
    op = torch.ops.minitron_kernels.gather_channels_
    out, weight = torch.zeros(2, 6), torch.randn(4, 6)
    for arguments, message in (
        ((out, weight, torch.tensor([0, 4]), None), r"rows\[1\] is 4"),
        ((out, weight, torch.tensor([-1, 0]), None), r"rows\[0\] is -1"),
        ((out, weight, None, None), "out must have weight's shape"),
        ((out.double(), weight, torch.tensor([0, 1]), None), "and its dtype"),
        ((out, weight, torch.tensor([0, 1]).int(), None), "int64"),
        ((out[0], weight[0], torch.tensor([0]), None), "weight must be a vector without rows"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)
    assert (out == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled(backend):
    """No graph break, from tensors and from a ChannelIndex; a bad index is found where the op runs."""
    weight = torch.randn(40, 90)
    rows, cols = keep_some(40, 20), keep_some(90, 70)
    index = mk.ChannelIndex(rows, 40)

    def from_tensors(weight, rows, cols):
        return mk.gather_channels(weight, rows, cols, backend=backend) * 1.0

    def from_index(weight, out):
        return mk.gather_channels(weight, index, out=out, backend=backend)

    compiled = torch.compile(from_tensors, fullgraph=True, backend="aot_eager")
    assert_gathered(compiled(weight, rows, cols), weight, rows, cols)
    with pytest.raises((RuntimeError, IndexError)):
        compiled(weight, rows + 30, cols)
    into = torch.compile(from_index, fullgraph=True, backend="aot_eager", dynamic=True)
    for width in (90, 33, 7):
        out = torch.zeros(20, width)
        into(weight[:, :width].contiguous(), out)
        assert_gathered(out, weight[:, :width], rows)


GUARDED = """
import ctypes, mmap, sys, torch
import minitron_kernels as mk
from gather.problems import WIDTHS, assert_gathered, keep_some, make_weight

torch.ops.minitron_kernels.set_simd_level(sys.argv[1])
PAGE, libc = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True)
memory = mmap.mmap(-1, 3 * PAGE)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
for page in (0, 2):  # an access there ends the process
    assert libc.mprotect(ctypes.c_void_p(start + page * PAGE), PAGE, 0) == 0
raw = torch.frombuffer(memory, dtype=torch.uint8)[PAGE : 2 * PAGE]
for dtype in WIDTHS:
    for length in (8, 64, 100, 160):
        weight = make_weight(6, length, dtype=dtype)
        while weight.nbytes > PAGE:
            weight = weight[:-1]
        for part in (raw[: weight.nbytes], raw[PAGE - weight.nbytes :]):
            guarded = part.view(dtype).view(weight.shape)
            guarded.copy_(weight)
            some = keep_some(length, length * 3 // 4), keep_some(length, length // 2, "shuffled")
            for cols in (*some, None):
                assert_gathered(mk.gather_channels(guarded, None, cols), weight, None, cols)
"""


@pytest.mark.native
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect")
def test_nothing_beside_the_weight_is_read(simd_level):
    """Shuffles read windows wider than what is kept: these stay within the row. Pages that end a process."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    command = [sys.executable, "-c", GUARDED, simd_level]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
