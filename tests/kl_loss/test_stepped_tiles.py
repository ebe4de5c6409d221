"""The machine code of the AMX and AVX512_BF16 kernels, stepped on a CPU that need not have their instructions
(tools/stepped.py), against float64 and, to the bit, their portable twins (test_tiles_cpu.py).

What an instruction does, which registers and memory it names, is read from its bytes, so this holds for tile
configurations, strides, register numbers, masks, and the order of operands and lanes too.
"""

import ctypes
from pathlib import Path

import numpy as np
import pytest

from tools.faults import Fault, some
from tools.stepped import Stepped, skip_where_there_is_nothing_to_step

ENGINES = ["avx512_bf16", "amx"]
GEMM = {engine: f"common/cpu/gemm_{engine}.cpp" for engine in ENGINES}
PACK = "kl_loss/cpu/tile_pack_avx512_bf16.cpp"
ROWS, DEPTH, PANEL = 16, 32, 64  # of a tile of A, k of a tile, columns of a panel
UNWRITTEN = 0x7FA5  # a NaN of bf16

SIZES = [
    # M, N, K
    (1, 1, 1),
    (3, 2, 2),
    (15, 16, 31),
    (16, 17, 32),
    (17, 31, 33),
    (31, 32, 64),
    (32, 33, 63),
    (33, 47, 65),
    (32, 64, 96),
    (64, 32, 128),
    (48, 49, 129),
    (65, 64, 257),
    (100, 63, 130),
    (98, 64, 256),
]
NONE = (0, 5, 3)  # callers see to K = 0


@pytest.fixture(scope="module", name="kernels")
def kernels_fixture(tmp_path_factory):
    skip_where_there_is_nothing_to_step(*ENGINES)
    harness = Path(__file__).parent / "stepped_tiles.cpp"
    return Stepped(tmp_path_factory.mktemp("stepped"), [*GEMM.values(), PACK], harness)


@pytest.fixture(scope="module", name="load")
def load_fixture(kernels, request):
    """Loads the kernels, with a fault planted in them. In the CI (strict) no instruction may be unknown."""
    return lambda *fault: typed(kernels.load(*fault), strict=request.config.getoption("--require-native"))


@pytest.fixture(scope="module", name="library")
def library_fixture(load):
    return load()


def typed(library, strict):
    library.strict = strict
    library.stepped_gemm.restype = library.stepped_pack.restype = ctypes.c_char_p
    library.executed.restype = ctypes.c_int64
    return library


def assert_ran(library, why):
    if (b"is not known" in why or b"does not step" in why) and not library.strict:
        pytest.skip(
            f"{why.decode()} (another compiler chooses other instructions, some emulators do not step)"
        )
    assert not why, why.decode()


def number(x):
    return ctypes.c_int64(x)


def pointer(x):
    return None if x is None else ctypes.c_void_p(x.ctypes.data)


def up(n, to):
    return -(-n // to) * to


def to_bf16(x):
    """The bits of fp32 rounded to nearest even; denormals become zero, a NaN quiet."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    rounded = np.where(np.isnan(x), bits >> 16 | 0x40, rounded)
    return np.where(bits & 0x7F800000, rounded, bits >> 16 & 0x8000).astype(np.uint16)


def to_float(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def random_bf16(rng, rows, cols):
    return to_bf16(rng.standard_normal((rows, cols)).astype(np.float32))


def a_tiles(x, rows=ROWS):
    """[M, K] as an A operand: strips of 16 rows, in them tiles of 32 k."""
    padded = np.zeros((up(x.shape[0], rows), up(x.shape[1], DEPTH)), x.dtype)
    padded[: x.shape[0], : x.shape[1]] = x
    tiles = padded.reshape(padded.shape[0] // ROWS, ROWS, padded.shape[1] // DEPTH, DEPTH)
    return np.ascontiguousarray(tiles.transpose(0, 2, 1, 3)).ravel()


def b_tiles(x):
    """[K, N] as B operands: panels of 64 columns, in them tiles of 16 pairs of k by 16 columns."""
    padded = np.zeros((up(x.shape[0], DEPTH), up(x.shape[1], PANEL)), x.dtype)
    padded[: x.shape[0], : x.shape[1]] = x
    steps, panels = padded.shape[0] // DEPTH, padded.shape[1] // PANEL
    tiles = padded.reshape(steps, DEPTH // 2, 2, panels, PANEL // 16, 16)
    return np.ascontiguousarray(tiles.transpose(3, 0, 4, 1, 5, 2)).ravel()


def product(library, engine, a, b, c, *, ldc, add, readable=0):
    """C of the kernel and of its twin, where they overwrite or add to c. readable: elements less of A."""
    M, K = a.shape
    N, amx = b.shape[1], int(engine == "amx")
    # of the middle of a longer k, as the products of the gradient of the head take it
    rest = np.zeros((M, up(K, DEPTH) - K), a.dtype)
    beside = np.full((M, DEPTH), UNWRITTEN, a.dtype)
    wide = a_tiles(np.concatenate([beside, a, rest, beside], axis=1))
    left, right = wide[ROWS * DEPTH :], b_tiles(b)
    own, twin = c.copy(), c.copy()
    sizes = (*map(number, (M, N, K, up(K, DEPTH) + 2 * DEPTH, ldc)), int(add))
    why = library.stepped_gemm(
        amx, *sizes, pointer(left), number(left.size - readable), pointer(right), number(right.size),
        pointer(own), number(own.size),
    )  # fmt: skip
    assert_ran(library, why)
    library.twin_gemm(amx, *sizes, pointer(left), pointer(right), pointer(twin))
    return own, twin


def check_gemm(library, engine, M, N, K, add, readable=0):
    rng = np.random.default_rng(1000 * M + 10 * N + K)
    a, b = random_bf16(rng, M, K), random_bf16(rng, K, N)
    ldc = N + 7 * (M % 2)
    c = rng.standard_normal((M, ldc)).astype(np.float32)
    c[:, N:] = 777  # neither read nor written
    start = c.astype(np.float64) if add else np.zeros_like(c, np.float64)
    if not add:
        c[:, :N] = np.nan
    own, twin = product(library, engine, a, b, c, ldc=ldc, add=add, readable=readable)
    x, y = to_float(a).astype(np.float64), to_float(b).astype(np.float64)
    truth, size = x @ y + start[:, :N], abs(x) @ abs(y) + abs(start[:, :N])
    error = abs(own[:, :N] - truth)
    assert (error <= (K + 4) * 2.0**-24 * size).all(), f"wrong by {np.nanmax(error / (size + 1e-30)):.2g}"
    np.testing.assert_array_equal(own.view(np.uint32), twin.view(np.uint32))


@pytest.mark.parametrize("engine", ENGINES)
def test_gemm(library, engine):
    """Every kind of edge, each k of an instruction, a C with columns beyond; the twin's bits. No vector of
    columns that are all padding is multiplied.
    """
    name = {"amx": b"tdpbf16ps", "avx512_bf16": b"vdpbf16ps"}[engine]
    before, vectors = library.executed(name), 0
    for M, N, K in [*SIZES, NONE]:
        for add in (False, True):
            check_gemm(library, engine, M, N, K, add)
            vectors += up(M, 4) * up(N, 16) // 16 * up(K, DEPTH) // 2
    executed = library.executed(name) - before
    assert executed > 1000 if engine == "amx" else executed == vectors


@pytest.mark.parametrize("engine", ENGINES)
def test_denormals_are_zeros(library, engine):
    """Of operands, of sums, and of C where it is added to, as the documentation says."""
    small = np.array([[1.0], [2.0**-126], [2.0**-130], [-(2.0**-130)], [2.0**-70]], np.float32)
    a = (small.view(np.uint32) >> 16).astype(np.uint16)
    b = (np.array([[1.0, 2.0**-130, 0.5, 2.0**-60]], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    c = np.full((5, 4), 2.0**-135, np.float32)
    for add in (False, True):
        own, _ = product(library, engine, a, b, c, ldc=4, add=add)
        expected = np.zeros((5, 4), np.float32)
        expected[0] = 1, 0, 0.5, 2.0**-60
        expected[1, 0] = 2.0**-126  # times 0.5 it is a denormal
        expected[4] = 2.0**-70, 0, 2.0**-71, 0
        np.testing.assert_array_equal(own, expected)


def pack(library, kind, src, ld, rows, cols, padded, size, index=None):
    """What the kernel and its twin write into memory of `size` elements that is NaN before."""
    own, twin = np.full(size, UNWRITTEN, np.uint16), np.full(size, UNWRITTEN, np.uint16)
    numbers = (*map(number, (rows, cols, padded)),)
    why = library.stepped_pack(
        kind,
        pointer(src),
        number(src.nbytes),
        number(ld),
        pointer(index),
        *numbers,
        pointer(own),
        number(size),
    )
    assert_ran(library, why)
    library.twin_pack(kind, pointer(src), number(ld), pointer(index), *numbers, pointer(twin))
    return own, twin


def check_packing(library):
    """Operands of odd sizes with columns beyond, by an index; panels of special values."""
    rng = np.random.default_rng(5)
    for rows, cols in [(1, 1), (2, 31), (15, 32), (16, 33), (33, 64), (65, 66), (70, 100)]:
        ld = cols + 3
        src = random_bf16(rng, rows, ld)[::1].copy()
        used = src.ravel()[: (rows - 1) * ld + cols]  # what lies behind is not read
        index = rng.permutation(rows).astype(np.int64)
        for order in (None, index):
            x = src[:, :cols] if order is None else src[order, :cols]
            wanted = b_tiles(np.ascontiguousarray(x.T))
            for out in pack(library, 0, used, ld, rows, cols, 0, wanted.size, order):
                np.testing.assert_array_equal(out, wanted)
            wanted = b_tiles(x)
            for out in pack(library, 1, used, ld, rows, cols, up(rows, DEPTH), wanted.size, order):
                np.testing.assert_array_equal(out, wanted)
        wanted = a_tiles(src[:, :cols])
        for out in pack(library, 2, used, ld, rows, cols, up(cols, DEPTH), wanted.size):
            np.testing.assert_array_equal(out, wanted)

    special = [0, 0x80000000, 1, 0x807FFFFF, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x7F800001, 0xFFC12345]
    special += [0x3F808000, 0x3F818000, 0x3F808001, 0x3F817FFF, 0x00800000, 0x007FFFFF]
    for rows in (1, 15, 16, 17, 33, 64, 70):
        panel = rng.standard_normal((rows, PANEL)).astype(np.float32)
        panel.ravel()[: len(special)] = np.array(special, np.uint32).view(np.float32)
        bf16, plain = to_bf16(panel), up(rows, DEPTH)
        outputs = (
            (3, PANEL, 0, a_tiles(bf16)),
            (4, plain, plain, a_tiles(np.ascontiguousarray(bf16.T))),
            (5, PANEL, PANEL, bf16.ravel()),
        )
        for kind, ld, padded, wanted in outputs:
            own, twin = pack(library, kind, panel, ld, rows, PANEL, padded, wanted.size)
            np.testing.assert_array_equal(own, wanted)
            kept = to_float(wanted) != 0  # the twin keeps denormals
            np.testing.assert_array_equal(own[kept], twin[kept])


def test_packing(library):
    check_packing(library)
    assert library.executed(b"vcvtne2ps2bf16") > 1000


def test_reads_beyond_an_operand_are_found(library):
    for engine in ENGINES:
        check_gemm(library, engine, 17, 20, 33, False)
        with pytest.raises(AssertionError, match=r"reads .* beyond its operands"):
            check_gemm(library, engine, 17, 20, 33, False, readable=2 * ROWS * DEPTH)


AMX, AVX512_BF16 = GEMM["amx"], GEMM["avx512_bf16"]
LOOPS, DOTS, PACKING = "common/cpu/tile_gemm.h", "common/cpu/dot_gemm.h", "common/cpu/tile_pack.h"
FAULTS = {  # the source that is compiled with it, and what is said
    "rows of a tile": (
        AMX,
        Fault(AMX, "{16, 16, 16, 16, 16, 16, 16, 16}}", "{16, 16, 16, 16, 16, 16, 15, 16}}"),
        "sizes do not agree",
    ),
    "stride of a tile": (AMX, Fault(AMX, "int64_t{64}", "int64_t{32}"), "wrong by"),
    "columns of a tile": (
        AMX,
        Fault(AMX, "{64, 64, 64, 64, 64, 64, 64, 64}", "{64, 64, 64, 32, 64, 64, 64, 64}"),
        "sizes do not agree",
    ),
    "reserved bytes": (AMX, Fault(AMX, "reserved[14]", "reserved[12]"), "reserved bytes"),
    "palette": (AMX, Fault(AMX, "kConfig{1, 0", "kConfig{2, 0"), "a palette that there is not"),
    "A and B": (AMX, Fault(AMX, "tmm%c2, %%tmm%c1, %%tmm%c0", "tmm%c1, %%tmm%c2, %%tmm%c0"), "wrong by"),
    "another register": (AMX, Fault(LOOPS, "multiply<3, 5, 7>", "multiply<3, 4, 7>"), "wrong by"),
    "one lane more": (
        AVX512_BF16,
        Fault(AVX512_BF16, "(1u << n) - 1", "(2u << n) - 1"),
        "beyond its operands",
    ),
    "a stale sum": (
        AVX512_BF16,
        Fault(AVX512_BF16, "_mm512_maskz_loadu_ps(first(n), p)", "_mm512_maskz_loadu_ps(first(n - 1), p)"),
        "wrong by",
    ),
    "a row of pairs": (AVX512_BF16, Fault(DOTS, "p * kTileRows", "p * kTileRows / 2"), "wrong by"),
    "order of halves": (
        PACK,
        Fault(
            PACKING,
            "_mm512_cvtne2ps_pbh((__m512)high, (__m512)low)",
            "_mm512_cvtne2ps_pbh((__m512)low, (__m512)high)",
        ),
        "Arrays are not equal",
    ),
}


@pytest.mark.parametrize("name", some(FAULTS))
def test_planted_faults_are_found(load, name):
    source, fault, message = FAULTS[name]
    library = load(fault, source)

    def check():
        for M, N, K in ((34, 47, 65), (64, 64, 64)):
            for engine in ENGINES:
                check_gemm(library, engine, M, N, K, True)
        check_packing(library)

    with pytest.raises(AssertionError, match=message):
        check()
