"""Captures of other tools, written here byte by byte from their published layouts, and what is refused."""

from __future__ import annotations

import io
import json
import math
import struct
import tarfile

import pytest
import torch

from distillation.foreign import V, check_payload, teacher
from minitron_kernels.distillation.cache.import_ import read_distillkit, read_megatron
from minitron_kernels.distillation.cache.import_.distillkit import DistillKitConfig

# DistillKit


def high_bit_first(values, bits):
    text = "".join(format(value, f"0{bits}b") for value in values)
    return [int(text[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(text), 8)]


CODES = {"float32": "<f", "float16": "<e", "float64": "<d"}


def distillkit_row(tokens, ids, config, exact, coefficients, bins):
    """exact, coefficients: rows of numbers; bins: rows of (scale, integers)."""
    packed = []
    for e, c, b in zip(exact, coefficients, bins, strict=True):
        data = b"".join(struct.pack(CODES[config["exact_dtype"]], x) for x in e)
        data += b"".join(struct.pack(CODES[config["term_dtype"]], x) for x in c)
        for (scale, integers), about in zip(b, config["residual_bins"], strict=True):
            data += struct.pack(CODES[about["scale_dtype"]], scale)
            data += bytes(high_bit_first(integers, about["element_bits"]))
        packed.append(list(data))
    bits = math.ceil(math.log2(config["d"]))
    return {
        "input_ids": tokens.tolist(),
        "compressed_logprobs": packed,
        "bytepacked_indices": [high_bit_first(row, bits) for row in ids.tolist()],
    }


PLAIN = {"d": V, "k": 7, "exact_k": 7, "exact_dtype": "float32", "term_dtype": "float32"}
PLAIN |= {"polynomial_terms": None, "residual_bins": [], "delta_encoding": False}


def plain_row(seed=0, T=6, rows=None, **changes):
    tokens, _, ids, logprobs = teacher(T, 7, seed)
    rows = T - 1 if rows is None else rows
    ids, logprobs = ids[:rows], logprobs[:rows]
    row = distillkit_row(tokens, ids, PLAIN | changes, logprobs.tolist(), [[]] * rows, [[]] * rows)
    return row, tokens, ids, logprobs


@pytest.mark.parametrize("missing", [0, 1])
def test_distillkit_exact_values(missing):
    row, tokens, ids, logprobs = plain_row(rows=6 - missing)
    ((got, payload),) = read_distillkit([row], PLAIN)
    assert torch.equal(got, tokens)
    check_payload(payload, ids, logprobs, rows=6 - missing)
    # tensors and arrays as well as lists
    as_tensors = {name: torch.tensor(value) for name, value in row.items()}
    ((_, again),) = read_distillkit([as_tensors], DistillKitConfig.of(PLAIN))
    assert all(torch.equal(again[name], payload[name]) for name in payload)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("normalize_t", [False, True])
def test_distillkit_polynomials_and_residuals(delta, normalize_t):
    T, k, exact_k = 3, 12, 3
    tokens, _, ids, _ = teacher(T, k)
    config = {"d": V, "k": k, "exact_k": exact_k, "exact_dtype": "float16", "term_dtype": "float32"}
    config |= {"polynomial_terms": [0, 1, "sqrt"], "delta_encoding": delta, "normalize_t": normalize_t}
    config["residual_bins"] = [
        {"scale_dtype": "float16", "element_bits": 5, "num_elements": 3},
        {"scale_dtype": "float32", "element_bits": 1, "num_elements": 2},
    ]
    exact = [[-1.5, -2.5, -3.25], [-0.5, -2.0, -3.0], [-3.0, -3.5, -4.0]]
    if delta:
        exact = [[a, b - a, c - b] for a, b, c in exact]
    c = [[-0.3, -0.05, -0.1] if delta else [-5.0, -0.25, -0.5]] * T
    bins = [[(0.0625, [3, 31, 16]), (0.5, [1, 0])]] * T
    t = [i / (k - exact_k - 1) if normalize_t else i for i in range(k - exact_k)]
    expected = []
    for row in range(T):
        fit = [c[row][0] + c[row][1] * x + c[row][2] * math.sqrt(x) for x in t]
        for i, residual in enumerate([(3 - 16) / 16, (31 - 16) / 16, 0, 0.5, -0.5]):
            fit[i] += residual
        values = exact[row] + fit
        expected.append([sum(values[: i + 1]) for i in range(k)] if delta else values)
    row = distillkit_row(tokens, ids, config, exact, c, bins)
    ((_, payload),) = read_distillkit([row], config)
    check_payload(payload, ids, torch.tensor(expected, dtype=torch.float64), atol=2e-6)


def test_distillkit_files(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="DistillKit writes parquet")
    parquet = pytest.importorskip("pyarrow.parquet", reason="DistillKit writes parquet")
    yaml = pytest.importorskip("yaml", reason="DistillKit's configuration is YAML")
    schema = pyarrow.schema(
        [("input_ids", pyarrow.list_(pyarrow.uint64()))]
        + [
            (n, pyarrow.list_(pyarrow.list_(pyarrow.uint8())))
            for n in ("compressed_logprobs", "bytepacked_indices")
        ]
    )
    made = [plain_row(seed, T=4 + seed) for seed in range(5)]
    # in the order of their numbers, which is not that of their names
    for number, part in ((0, made[:3]), (2, made[3:4]), (10, made[4:])):
        table = pyarrow.Table.from_pylist([row for row, *_ in part], schema=schema)
        parquet.write_table(table, tmp_path / f"data_{number}.parquet")
    with pytest.raises(ValueError, match=r"has no compression_config\.yaml"):
        read_distillkit(tmp_path)
    (tmp_path / "compression_config.yaml").write_text(yaml.safe_dump(PLAIN))
    got = list(read_distillkit(tmp_path))
    assert len(got) == 5
    for (tokens, payload), (_, expected, ids, logprobs) in zip(got, made, strict=True):
        assert torch.equal(tokens, expected)
        check_payload(payload, ids, logprobs, rows=len(tokens) - 1)
    whole = (tmp_path / "data_2.parquet").read_bytes()
    (tmp_path / "data_2.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"data_2\.parquet: is damaged"):
        list(read_distillkit(tmp_path))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="has no data_0"):
        read_distillkit(empty, PLAIN)
    (tmp_path / "compression_config.yaml").write_text("{")
    with pytest.raises(ValueError, match="is not YAML"):
        read_distillkit(tmp_path)


def test_distillkit_refuses():
    row, *_ = plain_row()
    short = [values[:-1] for values in row["compressed_logprobs"]]
    cases = [
        (row | {"compressed_logprobs": short}, "compressed_logprobs: rows must have 28 bytes"),
        (row | {"bytepacked_indices": short}, "bytepacked_indices: rows must have 16 bytes"),
        (row | {"compressed_logprobs": row["compressed_logprobs"][:-1]}, "4 rows of log-prob.* and 5 of ids"),
        (row | {"input_ids": row["input_ids"] + [1]}, "5 rows for 7 token ids"),
        (row | {"input_ids": [V, 1, 1, 1, 1, 1]}, "input_ids must be in"),
        ({"input_ids": [1]}, "has no 'compressed_logprobs'"),
        (row | {"packed_indices": [], "exact_values": [], "coeffs": []}, "older format"),
        (row | {"compressed_logprobs": [[0xFF] * 28] * 5}, "at most 0 and not NaN"),
        (row | {"compressed_logprobs": [[0] * 28] * 5}, "sum to more than 1"),
        (row | {"bytepacked_indices": [[0] * 16] * 5}, "an id stands twice"),
        (row | {"bytepacked_indices": [[255] * 16] * 5}, "ids must be in"),
        (row | {"compressed_logprobs": [[300] * 28] * 5}, "must be bytes"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=f"row 1.*{message}"):
            list(read_distillkit([row, wrong], PLAIN))
    for wrong, message in [
        ({"q": 1}, "has 'q'"),
        ({"k": 0}, "k must be a positive int"),
        ({"exact_k": 8}, "exact_k <= k <= d"),
        ({"polynomial_terms": ["log"]}, "polynomial_terms must be"),
        ({"exact_dtype": "int8"}, "exact_dtype must be one of"),
        ({"residual_bins": [{"scale_dtype": "float16"}]}, "residual_bins must have"),
        (
            {
                "exact_k": 6,
                "residual_bins": [{"scale_dtype": "float16", "element_bits": 2, "num_elements": 2}],
            },
            "more",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            read_distillkit([row], PLAIN | wrong)
    with pytest.raises(ValueError, match="config must be given"):
        read_distillkit([row])
    with pytest.raises(ValueError, match="tail must be 'rest' or 'renormalise', got 'zero'"):
        read_distillkit([row], PLAIN, tail="zero")


def test_a_tail_may_be_left_out():
    row, _, ids, logprobs = plain_row(rows=6)
    ((_, payload),) = read_distillkit([row], PLAIN, tail="renormalise")
    check_payload(payload, ids, logprobs.log_softmax(-1))
    assert (payload["log_tail"] == -math.inf).all()


# Megatron-LM

OLD_V = 131072


def megatron_member(zstandard, micro_batches):
    """micro_batches: (values [S, B, k], ids [S, B, k], with -1 where top-p left out)."""
    buffer = io.BytesIO()
    content = {
        "values": [values for values, _ in micro_batches],
        "indices_low": [(ids & 0xFFFF).to(torch.uint16) for _, ids in micro_batches],
        "bit_17": [(ids >> 16).bool() for _, ids in micro_batches],
    }
    torch.save(content, buffer)
    return zstandard.ZstdCompressor(level=3).compress(buffer.getvalue())


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


META = ("_meta.json", json.dumps({"hash": "abc", "identifiers": {"seed": 1}, "saver": {"k": 5}}).encode())


def megatron_cache(folder, *, cp=1, dp=2, S=8, B=2, dtype=torch.float32, left_out=False):
    """Two files a rank with two iterations, two micro-batches each; returns what was in them."""
    zstandard = pytest.importorskip("zstandard", reason="Megatron-LM's cache is compressed with it")
    data = {}
    for rank in range(dp):
        for last, iterations in ((2, (1, 2)), (10, (9, 10))):
            members = [[META] for _ in range(cp)]
            for iteration in iterations:
                made = []
                for number in range(2):
                    seed = 100 * iteration + 10 * rank + number
                    tokens, _, ids, logprobs = teacher(S * B, 5, seed, OLD_V)
                    tokens, ids, values = tokens.view(B, S), ids.view(B, S, 5), logprobs.view(B, S, 5)
                    values = values.to(dtype)
                    if left_out:
                        values[:, ::2, 3:], ids[:, ::2, 3:] = -1000.0, -1
                    data[iteration, rank, number] = tokens, ids, values
                    made.append((values.transpose(0, 1), ids.transpose(0, 1)))
                for r in range(cp):  # rank r has chunks r and 2 cp - 1 - r
                    order = torch.arange(S).view(2 * cp, -1)[[r, 2 * cp - 1 - r]].reshape(-1)
                    part = [(v[order].contiguous(), i[order].contiguous()) for v, i in made]
                    members[r].append((f"{iteration}.pt.zst", megatron_member(zstandard, part)))
            for r in range(cp):
                write_tar(folder / f"cp{r}_dp{rank}__{last}.tar", members[r])
    return data


@pytest.mark.parametrize(("cp", "dtype", "left_out"), [(1, torch.float32, False), (2, torch.float16, True)])
def test_megatron(tmp_path, cp, dtype, left_out):
    data = megatron_cache(tmp_path, cp=cp, dtype=dtype, left_out=left_out)
    asked = []

    def token_ids(iteration, dp_rank, micro_batch):
        asked.append((iteration, dp_rank, micro_batch))
        return data[iteration, dp_rank, micro_batch][0]

    got = list(read_megatron(tmp_path, token_ids, OLD_V, data_hash="abc"))
    order = [(i, r, n) for pair in ((1, 2), (9, 10)) for r in range(2) for i in pair for n in range(2)]
    assert asked == order
    expected = [row for key in order for row in zip(*data[key], strict=True)]
    assert len(got) == len(expected) == 32
    for (tokens, payload), (its_tokens, ids, values) in zip(got, expected, strict=True):
        assert torch.equal(tokens, its_tokens)
        values = torch.where(ids < 0, -math.inf, values.double())
        check_payload(payload, ids, values)
    assert max(int(ids.max()) for _, ids, _ in data.values()) == OLD_V - 1


def test_megatron_refuses(tmp_path):
    zstandard = pytest.importorskip("zstandard", reason="Megatron-LM's cache is compressed with it")
    data = megatron_cache(tmp_path)

    def token_ids(*key):
        return data[key][0]

    def refused(message, vocab_size=OLD_V, token_ids=token_ids, **options):
        with pytest.raises(ValueError, match=message):
            list(read_megatron(tmp_path, token_ids, vocab_size, **options))

    refused("is of the data with hash abc, and data_hash is d", data_hash="d")
    refused(
        r"1\.pt\.zst: micro-batch 0: is \[B, S\] \[2, 8\], and token_ids gave \[2, 7\]",
        token_ids=lambda *key: data[key][0][:, 1:],
    )
    refused("ids of 17 bits, which cannot be those of 131073 tokens", 131073)
    refused(r"ids must be in \[0, 131000\)", 131000)
    with pytest.raises(TypeError, match="token_ids must be callable"):
        read_megatron(tmp_path, data, OLD_V)
    first, whole = tmp_path / "cp0_dp0__2.tar", (tmp_path / "cp0_dp0__2.tar").read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    refused(r"cp0_dp0__2\.tar: is damaged")
    first.write_bytes(b"no tar" * 200)
    refused(r"cp0_dp0__2\.tar: is damaged")
    first.unlink()
    refused(r"has no cp0_dp0__2\.tar, which other ranks have")
    good = [(v.transpose(0, 1), i.transpose(0, 1)) for _, i, v in (data[1, 0, 0],)]
    compress = zstandard.ZstdCompressor().compress
    buffer = io.BytesIO()
    torch.save({"values": [good[0][0]]}, buffer)
    member = megatron_member(zstandard, good)
    for members, message in [
        ([("1.pt.zst", member)], "has no _meta.json before"),
        ([META, ("1.pt.zst", member[:-20])], r"1\.pt\.zst: is damaged"),
        ([META, ("1.pt.zst", compress(b"abc"))], r"1\.pt\.zst: is damaged"),
        ([META, ("1.pt.zst", compress(buffer.getvalue()))], "must hold values, indices_low, bit_17"),
        ([META, ("other", b"")], "has 'other', which is not"),
        ([("_meta.json", b"{}")], "_meta.json is damaged"),
        (
            [META, ("1.pt.zst", megatron_member(zstandard, [(good[0][0][0], good[0][1][0])]))],
            "must have tensors",
        ),
        ([], "has no _meta.json"),
    ]:
        write_tar(first, members)
        refused(message)
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    refused("is not a cache of Megatron-LM")


def test_the_token_that_a_capture_appended_is_dropped():
    row, tokens, ids, logprobs = plain_row()
    last = int(tokens[-1])
    ((got, payload),) = read_distillkit([row], PLAIN, pad_id=last)
    assert torch.equal(got, tokens[:-1])
    check_payload(payload, ids, logprobs)
    for pad_id, given in ((last + 1, row), (last, plain_row(rows=6)[0])):  # another token; one with a row
        ((got, _),) = read_distillkit([given], PLAIN, pad_id=pad_id)
        assert torch.equal(got, tokens)
