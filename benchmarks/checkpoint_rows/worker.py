"""Prunes or copies a checkpoint, once for each line of its input; also makes one and checks results."""

from __future__ import annotations

import json
import mmap
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.harness import status_bytes
from minitron_kernels.pruning import Cuts, PruningPlan, make_plan, prune_checkpoint
from minitron_kernels.pruning.cut.skeleton import expected_shapes
from minitron_kernels.pruning.families.registry import family_of

FLOORS = ("cp", "loop_fsync", "loop")
ROWS = ("prune", "load")
LABELS = {
    "cp": "cp of the kept bytes, fsync",
    "loop_fsync": "loop of read and write of the kept bytes, fsync",
    "loop": "the same without fsync",
    "prune": "prune_checkpoint",
    "load": "safe_open, W[rows][:, cols], save_file, fsync",
}
SHARD_BYTES = 1_000_000_000


def make_checkpoint(folder: Path, shape: dict[str, int], gb: float) -> tuple[dict[str, Any], int]:
    """Makes a Mistral-shaped checkpoint of about `gb`; returns its config and the bytes of its tensors."""
    config = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "dtype": "bfloat16",
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["mlp"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "head_dim": shape["head_dim"],
        "vocab_size": shape["vocab"],
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
    }
    family = family_of(config)
    one = family.count_parameters(config)
    layer = family.count_parameters({**config, "num_hidden_layers": 2}) - one
    config["num_hidden_layers"] = max(1, 1 + round((gb * 1e9 / 2 - one) / layer))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    numbers = torch.randn((1 << 25) + 1, generator=torch.Generator().manual_seed(0)).bfloat16()
    sizes, shards, filled = family.sizes(config), [{}], 0
    for index, parameter in enumerate(family.parameters(config)):
        tensor = torch.empty(parameter.shape(sizes), dtype=torch.bfloat16)
        # numbers are reused, since drawing 4e9 takes minutes; from another start each time, since a head
        # with the bytes of the embedding would be tied
        own = numbers[index:]
        for part in tensor.view(-1).split(len(own)):
            part.copy_(own[: len(part)])
        if filled and filled + tensor.nbytes > SHARD_BYTES:
            _save(shards[-1], folder / f"{len(shards)}.safetensors")
            shards[-1] = dict.fromkeys(shards[-1])  # keeps the names, frees the tensors
            shards.append({})
            filled = 0
        shards[-1][parameter.name] = tensor
        filled += tensor.nbytes
    _save(shards[-1], folder / f"{len(shards)}.safetensors")
    files = {name: f"{number}.safetensors" for number, shard in enumerate(shards, 1) for name in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return config, 2 * family.count_parameters(config)


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path, {"format": "pt"})
    _fsync(path)


def make_random_plan(config: dict[str, Any], hidden: int, mlp: int) -> PruningPlan:
    generator = torch.Generator().manual_seed(1)
    family = family_of(config)
    layers = range(config["num_hidden_layers"])
    norms = [f"{family.layers}.{layer}.{norm}" for layer in layers for norm in family.taps.norms]

    def draw(size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64)

    tables = {
        "hidden": draw(config["hidden_size"]),
        "mlp": {layer: draw(config["intermediate_size"]) for layer in layers},
        "energy": {norm: draw(config["hidden_size"]) for norm in [*norms, family.final_norm]},
    }
    return make_plan(tables, config, hidden_size=hidden, intermediate_size=mlp, divisor=32)


def _index(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def _plain(plan: PruningPlan, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor pruned by torch's indexing (norms by the library, since they are rescaled)."""
    if tensor.dim() == 1:
        return Cuts(plan).of(name, stored=True).apply(tensor)
    hidden = torch.tensor(plan.hidden)
    parts = name.split(".")
    if parts[-2] in ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj"):
        return tensor[:, hidden]
    if parts[-2] == "o_proj":
        return tensor[hidden]
    mlp = torch.tensor(next(entry.mlp for entry in plan.layers if entry.layer == int(parts[2])))
    return tensor[hidden][:, mlp] if parts[-2] == "down_proj" else tensor[mlp][:, hidden]


def right_tensors(source: Path, pruned: Path, plan: PruningPlan) -> str | None:
    """None if the pruned checkpoint is what plain indexing gives, else what differs."""
    names, files = _index(source), {}
    for path in sorted(pruned.glob("*.safetensors")):
        with safe_open(path, "pt") as stream:
            files |= dict.fromkeys(stream.keys(), path.name)
    if names.keys() != files.keys():
        return f"tensors differ: {sorted(names.keys() ^ files.keys())[:3]}"
    for name, file in names.items():
        with safe_open(source / file, "pt") as before, safe_open(pruned / files[name], "pt") as after:
            if not torch.equal(_plain(plan, name, before.get_tensor(name)), after.get_tensor(name)):
                return f"{name} is not what indexing gives"
    return None


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def prune(folder: Path, threads: int) -> None:
    plan = PruningPlan.load(folder / "plan.json")
    prune_checkpoint(
        folder / "src",
        folder / "pruned",
        plan,
        max_shard_bytes=SHARD_BYTES,
        threads=threads,
        progress=False,
    )


def load(folder: Path, threads: int) -> None:
    """What a user would write in ten lines: one shard in memory at a time."""
    plan = PruningPlan.load(folder / "plan.json")
    target = folder / "loaded"
    target.mkdir()
    files = sorted(set(_index(folder / "src").values()))
    with torch.no_grad():
        for file in files:
            with safe_open(folder / "src" / file, "pt") as stream:
                tensors = {name: _plain(plan, name, stream.get_tensor(name)) for name in stream.keys()}  # noqa: SIM118
            _save({name: tensor.contiguous() for name, tensor in tensors.items()}, target / file)
    _fsync(target)


def cp(folder: Path, threads: int) -> None:
    target = folder / "copied"
    target.mkdir()
    for file in sorted((folder / "kept").glob("*.safetensors")):
        subprocess.run(["cp", "--reflink=never", str(file), str(target / file.name)], check=True)
        _fsync(target / file.name)
    _fsync(target)


def _loop(folder: Path, sync: bool) -> None:
    target = folder / "looped"
    target.mkdir()
    buffer = memoryview(mmap.mmap(-1, 1 << 20))  # at a page: see pruning/checkpoint/output_file.py
    for file in sorted((folder / "kept").glob("*.safetensors")):
        path = target / file.name
        with file.open("rb", buffering=0) as read, path.open("wb", buffering=0) as write:
            while count := read.readinto(buffer):
                done = 0
                while done < count:
                    done += write.write(buffer[done:count])
        if sync:
            _fsync(path)
    if sync:
        _fsync(target)


def loop_fsync(folder: Path, threads: int) -> None:
    _loop(folder, sync=True)


def loop(folder: Path, threads: int) -> None:
    _loop(folder, sync=False)


WORK: dict[str, tuple[Callable[[Path, int], None], str, str]] = {
    "prune": (prune, "src", "pruned"),
    "load": (load, "src", "loaded"),
    "cp": (cp, "kept", "copied"),
    "loop_fsync": (loop_fsync, "kept", "looped"),
    "loop": (loop, "kept", "looped"),
}


def _set_cache(files: list[Path], cache: str) -> None:
    """Reads the files, so that they are in the page cache ("warm"); or drops them from it ("cold")."""
    buffer = bytearray(4 << 20)
    for path in files:
        with path.open("rb", buffering=0) as stream:
            if cache == "cold":
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while stream.readinto(buffer):
                    pass


def _cpu_seconds() -> float:
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, kinds))


def main(spec: dict[str, Any]) -> dict[str, Any]:
    work, source, target = WORK[spec["work"]]
    folder = Path(spec["folder"])
    _set_cache(sorted((folder / source).glob("*.safetensors")), spec.get("cache", "warm"))
    if spec["work"] == "prune":  # imports transformers here: seconds, once in a process, for any size
        expected_shapes(PruningPlan.load(folder / "plan.json").target_config)
    os.sync()
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
    own = status_bytes("VmRSS")
    wall, busy = time.perf_counter(), _cpu_seconds()
    work(folder, spec["threads"])
    wall, busy = time.perf_counter() - wall, _cpu_seconds() - busy
    peak = status_bytes("VmHWM")
    written = sum(file.stat().st_size for file in (folder / target).glob("*.safetensors"))
    if "cache" in spec:
        shutil.rmtree(folder / target)
    return {
        "wall_s": wall,
        "busy_s": busy,
        "peak_bytes": peak,
        "extra_bytes": max(0, peak - own),
        "bytes": written,
    }


def serve() -> None:
    """Answers a line of JSON for each on standard input; libraries' prints go to standard error."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(main(json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    serve()
