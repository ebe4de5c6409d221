"""A teacher's cache, tier by tier, beside stored logits: bytes a token, MB/s, its share of a training step.

    python benchmarks/teacher_cache.py                     # V 131072, k 128, 12 samples, H 4096; minutes
    python benchmarks/teacher_cache.py --quick             # a small shape, seconds, as a smoke test
    python benchmarks/teacher_cache.py --folder /mnt/x --mb 512 --quantiser log8 log12 --json out.json
    python benchmarks/teacher_cache.py --from out.json --markdown out.md        # measures nothing

Each row stores about --mb of random rows of a teacher, and finds them again by the tokens of batches in
another order. The floor of writing is a plain write of as many bytes and fsync, that of reading a plain read
of the same files into memory that is there, each in turns with its call; files that are read are in the page
cache. "of a step" is the time of a batch's lookup divided by that and a step's: forward and backward of that
tier's loss alone, without any model, at the same V and H, which is less than any training step; or --step-ms
of your own, for --tokens tokens.

Beside the tiers: bf16 logits [T, V] in a safetensors file; DistillKit's formats, of which the bytes follow
from their configuration and are not measured. A gate comes first: what is found must be what was stored.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import tables
from common.harness import summarize, write_json
from common.machine import describe, facts
from minitron_kernels.distillation.cache import CacheSpec, TeacherCache, TeacherCacheWriter
from minitron_kernels.distillation.cache.import_.distillkit import DistillKitConfig
from minitron_kernels.distillation.cache.sampling import sample_ids, sampled_logprobs
from minitron_kernels.ops.kl_loss.op import linear_kl_loss
from minitron_kernels.ops.kl_loss.sparse import linear_sparse_kl_loss

MB = 1e6
DISTINCT = 32  # positions of each kind of payload; repeated, since nothing is compressed
SHIFTS = 4  # payloads of sequences begin at so many different ones
# of DistillKit's README, for any number of tokens
DISTILLKIT = {
    "DistillKit, recommended": {"k": 128, "exact_k": 16, "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"]},
    "DistillKit, budget": {"k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"]},
}
Payload = dict[str, Tensor]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where the files go; default: the system's temporary one")
    parser.add_argument("--mb", type=float, default=128.0, help="about what each row stores (default 128)")
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--k", type=int, default=128)
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4, help="sequences that are looked up at a time")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of the step (default 64)")
    parser.add_argument("--step-ms", type=float, help="milliseconds of your own step; measures none")
    parser.add_argument("--quantiser", nargs="+", default=["log8", "fp32"], help="of top-k rows")
    parser.add_argument("--device", default="cpu", help="of the step")
    parser.add_argument("--reps", type=int, default=5, help="repetitions of each (default 5)")
    parser.add_argument("--quick", action="store_true", help="2 MB, V 4096, 2 repetitions: a smoke test")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--from", dest="source", type=Path, help="read a result instead of measuring")
    args = parser.parse_args(argv)
    if args.quick:
        args.mb, args.reps, args.vocab, args.hidden, args.seq_len, args.tokens = 2.0, 2, 4096, 256, 128, 32
    for name in ("vocab", "k", "samples", "hidden", "seq_len", "batch", "tokens", "reps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.k >= args.vocab:
        parser.error("--k must be below --vocab")
    return args


@dataclass
class Row:
    """A tier with its payload of DISTINCT positions, [DISTINCT, ...]."""

    label: str
    spec: CacheSpec
    payload: Payload
    made: dict[tuple[int, int], Payload] = field(default_factory=dict)

    def sequence(self, number: int, length: int) -> Payload:
        """The payload of a sequence: the positions, begun elsewhere for each."""
        key = number % SHIFTS, length
        if key not in self.made:
            at = (torch.arange(length) + key[0]) % DISTINCT
            self.made[key] = {name: values[at] for name, values in self.payload.items()}
        return self.made[key]


def rows_of(args: argparse.Namespace) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(DISTINCT, args.vocab, generator=generator) * 3
    full = logits.log_softmax(-1)
    ids = full.topk(args.k).indices.sort(dim=-1).values  # as a cache gives them back
    logprobs = full.gather(-1, ids)
    log_tail = full.scatter(-1, ids, -torch.inf).logsumexp(-1)
    common = {"vocab_size": args.vocab, "teacher": "random numbers"}
    sampled = sample_ids(full, args.samples, generator)
    spec = CacheSpec("sampled", k=args.samples, samples=args.samples, **common)
    rows = [Row(f"sampled, {args.samples} draws", spec, sampled._asdict())]
    for name in args.quantiser:
        spec = CacheSpec("topk", k=args.k, quantiser=name, **common)
        payload = {"ids": ids, "logprobs": logprobs, "log_tail": log_tail}
        rows.append(Row(f"top {args.k} and tail, {name}", spec, payload))
    hidden = torch.randn(DISTINCT, args.hidden, generator=generator).bfloat16()
    spec = CacheSpec("hidden", hidden_size=args.hidden, **common)
    return [*rows, Row(f"hidden states, H {args.hidden}", spec, {"hidden": hidden})]


def timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def plain_write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def write(folder: Path, row: Row, tokens: Tensor) -> None:
    with TeacherCacheWriter(folder, row.spec) as writer:
        for number, of_sequence in enumerate(tokens):
            writer.add(of_sequence, row.sequence(number, len(of_sequence)))


def batches(tokens: Tensor, size: int) -> Iterator[Tensor]:
    """Batches of all sequences, in another order than they were stored in."""
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(1))
    for some in order.split(size):
        yield tokens[some]


def right_rows(folder: Path, row: Row, tokens: Tensor) -> None:
    """The gate: what is found for two sequences is what was stored, up to the quantiser."""
    some = tokens[[len(tokens) - 1, 0]]
    found = TeacherCache(folder).lookup(some)
    for i, number in enumerate((len(tokens) - 1, 0)):
        for name, expected in row.sequence(number, tokens.shape[1]).items():
            got = found[name][i].reshape(len(expected), -1)[:, : max(1, expected[0].numel())]
            expected = expected.reshape(len(expected), -1).to(got.dtype)
            if name in ("logprobs", "log_tail"):
                right = bool(((got.exp() - expected.exp()).abs() <= 0.02).all())
            else:
                right = torch.equal(got, expected[:, : got.shape[1]])
            if not right:
                raise SystemExit(
                    f"correctness gate: {row.label}: {name} differ. Wrong results are not timed."
                )


def measure_row(work: Path, row: Row, args: argparse.Namespace) -> dict[str, Any]:
    trial = work / "trial"
    tokens = tokens_of(args, 2)
    write(trial, row, tokens)
    right_rows(trial, row, tokens)
    per_token = stored_bytes(trial) / tokens.numel()
    shutil.rmtree(trial)
    count = max(args.batch, round(args.mb * MB / per_token / args.seq_len))
    tokens = tokens_of(args, count)
    got: dict[str, list[float]] = {"write_s": [], "write_floor_s": [], "read_s": [], "read_floor_s": []}
    cache, plain = work / "cache", work / "plain"
    for _ in range(args.reps):
        shutil.rmtree(cache, ignore_errors=True)
        got["write_s"].append(timed(lambda: write(cache, row, tokens)))
        data = bytes(stored_bytes(cache))
        got["write_floor_s"].append(timed(lambda data=data: plain_write(plain, data)))
        plain.unlink()
    nbytes = stored_bytes(cache)
    plain_read = reader_of(files_of(cache))
    plain_read()  # into the page cache
    reader = TeacherCache(cache)
    reader.lookup(tokens[:1])  # the index
    for _ in range(args.reps):
        got["read_s"].append(timed(lambda: [reader.lookup(batch) for batch in batches(tokens, args.batch)]))
        got["read_floor_s"].append(timed(plain_read))
    shutil.rmtree(cache)
    return {"label": row.label, "tier": row.spec.tier, "bytes": nbytes, "tokens": tokens.numel(), **got}


def reader_of(paths: list[Path]) -> Callable[[], None]:
    """Reads the files into memory that is there: fresh pages would cost more than the bytes."""
    into = [memoryview(bytearray(path.stat().st_size)) for path in paths]

    def read() -> None:
        for path, buffer in zip(paths, into, strict=True):
            with path.open("rb", buffering=0) as file:
                at = 0
                while at < len(buffer):
                    at += file.readinto(buffer[at:])

    return read


def measure_logits(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Logits [T, V] in bf16 as one safetensors file; what is left of --mb in tokens."""
    from safetensors.torch import load_file, save

    length = max(1, round(args.mb * MB / args.vocab / 2))
    logits, path, plain = torch.randn(length, args.vocab).bfloat16(), work / "logits", work / "plain"
    got: dict[str, list[float]] = {"write_s": [], "write_floor_s": [], "read_s": [], "read_floor_s": []}
    data = bytes(length * args.vocab * 2)
    for _ in range(args.reps):
        got["write_s"].append(timed(lambda: plain_write(path, save({"logits": logits}))))
        got["write_floor_s"].append(timed(lambda: plain_write(plain, data)))
        # .clone(): load_file maps the file, and reads when it is used
        got["read_s"].append(timed(lambda: load_file(path)["logits"].clone()))
        plain_read = reader_of([path])
        plain_read()
        got["read_floor_s"].append(timed(plain_read))
    nbytes = path.stat().st_size
    path.unlink()
    plain.unlink()
    return {"label": "bf16 logits, safetensors", "tier": None, "bytes": nbytes, "tokens": length, **got}


def tokens_of(args: argparse.Namespace, count: int) -> Tensor:
    """[count, T] random tokens."""
    return torch.randint(0, args.vocab, (count, args.seq_len), generator=torch.Generator().manual_seed(2))


def step_seconds(rows: list[Row], args: argparse.Namespace) -> dict[str, list[float]]:
    """Forward and backward of each tier's loss, for --tokens tokens, in bf16 on a GPU and fp32 on a CPU."""
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    common = {"device": args.device, "dtype": dtype}
    hidden = torch.randn(args.tokens, args.hidden, **common).requires_grad_()
    head = (torch.randn(args.vocab, args.hidden, **common) / args.hidden**0.5).requires_grad_()
    result: dict[str, list[float]] = {}
    for row in rows:
        if row.spec.tier in result:
            continue
        found = {name: x.to(args.device) for name, x in row.sequence(0, args.tokens).items()}

        def loss(tier: str = row.spec.tier, found: Payload = found) -> Tensor:
            if tier == "hidden":
                return linear_kl_loss(hidden, head, found["hidden"].to(dtype), head.detach())
            if tier == "sampled":
                weights = sampled_logprobs(found["counts"])
                return linear_sparse_kl_loss(hidden, head, found["ids"], weights, None)
            return linear_sparse_kl_loss(hidden, head, found["ids"], found["logprobs"], found["log_tail"])

        def step(loss: Callable[[], Tensor] = loss) -> None:
            torch.autograd.grad(loss(), (hidden, head))
            if args.device != "cpu":
                torch.cuda.synchronize()

        step()
        result[row.spec.tier] = [timed(step) for _ in range(args.reps)]
    return result


def measure(
    work: Path, args: argparse.Namespace, save: Callable[[dict[str, Any]], None] = lambda part: None
) -> dict[str, Any]:
    """All rows; calls save() with what there is after each."""
    rows = rows_of(args)
    names = ("vocab", "k", "samples", "hidden", "seq_len", "batch", "tokens", "device", "step_ms")
    result: dict[str, Any] = {name: getattr(args, name) for name in names} | {"rows": []}
    for row in rows:
        result["rows"].append(measure_row(work, row, args))
        say(f"{row.label}: done")
        save(result)
    result["rows"].append(measure_logits(work, args))
    if args.step_ms is None:
        result["steps"] = step_seconds(rows, args)
    return result


def share_of_step(result: dict[str, Any], row: dict[str, Any]) -> float | None:
    """Lookup / (lookup + step), for as many tokens."""
    lookup = summarize(row["read_s"])["median"] / row["tokens"] * result["tokens"]
    if row["tier"] is None:
        return None
    step = (
        result["step_ms"] / 1e3
        if result["step_ms"] is not None
        else summarize(result["steps"][row["tier"]])["median"]
    )
    return lookup / (lookup + step)


def table(result: dict[str, Any], draw: Any) -> str:
    header = ["", "bytes/token", "÷ logits", "write MB/s", "p20–p80", "÷ floor"]
    header += ["read MB/s", "p20–p80", "÷ floor", "µs/token", "of a step"]
    of_logits = 2 * result["vocab"]
    lines, faulty = [], False
    for row in result["rows"]:
        per_token = row["bytes"] / row["tokens"]
        cells = [row["label"], f"{per_token:.1f}", f"{per_token / of_logits:.2%}"]
        for kind in ("write", "read"):
            speed = summarize([row["bytes"] / MB / s for s in row[f"{kind}_s"]])
            ratio = summarize([c / f for c, f in zip(row[f"{kind}_s"], row[f"{kind}_floor_s"], strict=True)])
            cells += [f"{speed['median']:.0f}", f"{speed['p20']:.0f}–{speed['p80']:.0f}"]
            below = ratio["median"] < 1
            faulty |= below
            cells += [tables.ratio(ratio["median"]) + tables.FAULT * below]
        share = share_of_step(result, row)
        cells += [f"{summarize(row['read_s'])['median'] / row['tokens'] * 1e6:.2f}"]
        lines.append([*cells, "–" if share is None else f"{share:.2%}"])
    for label, given in DISTILLKIT.items():
        config = DistillKitConfig.of({"d": max(result["vocab"], 128), "exact_dtype": "bfloat16", **given})
        per_token = config.logprob_bytes + config.id_bytes
        lines.append([label, f"{per_token}", f"{per_token / of_logits:.2%}", *["–"] * (len(header) - 3)])
    step = (
        f"{result['step_ms']:g} ms"
        if result["step_ms"] is not None
        else "the loss alone, forward and backward"
    )
    title = (
        f"V {result['vocab']}, sequences of {result['seq_len']}, batches of {result['batch']}, "
        f"{len(result['rows'][0]['read_s'])} repetitions; a step: {step}, {result['tokens']} tokens, "
        f"H {result['hidden']}, {result['device']}"
    )
    return f"{title}\n\n{draw(header, lines)}" + (f"\n\n{tables.FAULTY}" if faulty else "")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.source:
        result = json.loads(args.source.read_text())
    else:
        machine = facts(args.device, ["minitron-kernels", "safetensors"])
        say(describe(machine))
        about = {"format": 1, "benchmark": "teacher_cache", "machine": machine}
        with tempfile.TemporaryDirectory(prefix="minitron_teacher_cache_", dir=args.folder) as work:

            def save(part: dict[str, Any]) -> None:
                write_json(args.json, about | part, complete=False)

            result = about | measure(Path(work), args, save)
    print(f"\n{table(result, tables.aligned)}\n")
    write_json(args.json, result, complete=result.get("complete", True))
    if args.markdown:
        lines = [table(result, tables.markdown), f"Measured on {describe(result['machine'])}."]
        args.markdown.write_text("\n\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
