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
from gather.problems import BACKENDS, DTYPES, KINDS, WIDTHS, assert_gathered, bytes_of, keep_some, make_weight
from minitron_kernels import _native

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


@pytest.mark.native
@pytest.mark.parametrize("apart", [0, 32, 33])
def test_large_whole_rows_of_whole_lines(simd_level, apart):
    """Rows of 81 lines, four at a time and the rest; in one piece, from line to line, and not."""
    weight = make_weight(1101, 2592)
    for rows in (keep_some(1101, 1050), torch.arange(1101).flip(0), None):
        count = 1101 if rows is None else len(rows)
        room = torch.zeros(count, 2592 + apart, dtype=torch.bfloat16)
        mk.gather_channels(weight, rows, out=room[:, :2592], backend="native")
        assert_gathered(room[:, :2592], weight, rows)
        assert (bytes_of(room[:, 2592:]) == 0).all()


@pytest.mark.native
@pytest.mark.parametrize("dtype", WIDTHS)
def test_a_row_made_in_every_way(simd_level, dtype):
    """A run, dense, sparse, shuffled and repeated columns in one row, each in more than is packed at a time;
    numbers of rows around those that are made together.
    """
    parts = [
        torch.arange(2100),
        2100 + keep_some(2500, 2000),
        4600 + keep_some(3000, 200),
        4600 + keep_some(3000, 1500, "shuffled"),
        7600 + keep_some(300, 1500, "repeated").sort()[0],
        keep_some(7900, 1100),
    ]
    cols = torch.cat(parts)
    for rows in (4, 5, 7, 8, 9):
        weight = make_weight(rows, 7900, dtype=dtype)
        assert_gathered(mk.gather_channels(weight, cols=cols, backend="native"), weight, None, cols)


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


def test_blocks_under_another_default_device():
    """An index is on the CPU, wherever new tensors are made."""
    with torch.device("meta"):
        assert mk.ChannelIndex(torch.arange(16, device="cpu"), 32).block == 16


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
