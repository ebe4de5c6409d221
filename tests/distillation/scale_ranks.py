"""Ranks of this machine, joined by gloo, that train a tiny student of a tiny teacher as docs/scale.md says.

Each writes what it holds and sends in a step, and beside it what plan_distillation() says.
"""

import faulthandler
import json
import traceback
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tools.ranks import fork_ranks, joined, run_forked

RANKS = 4
LAYOUTS = {  # name: (copies of the run on other ranks, fsdp, tp)
    "fsdp 2": (2, 2, 1),
    "tp 2": (2, 1, 2),
    "fsdp 4": (1, 4, 1),
    "fsdp 2, tp 2": (1, 2, 2),
    "tp 4": (1, 1, 4),
}
COMMON = dict(model_type="llama", num_attention_heads=8, num_key_value_heads=4, head_dim=8, vocab_size=251,
              max_position_embeddings=64, tie_word_embeddings=False, pad_token_id=0)  # fmt: skip
STUDENT = COMMON | dict(hidden_size=48, intermediate_size=84, num_hidden_layers=2)
TEACHER = COMMON | dict(hidden_size=72, intermediate_size=100, num_hidden_layers=1)
CASES = {  # name: (layout, checkpointing)
    "fsdp 2": ("fsdp 2", False),
    "tp 2": ("tp 2", False),
    "fsdp 4, checkpointing": ("fsdp 4", True),
    "fsdp 2, tp 2": ("fsdp 2, tp 2", False),
    "fsdp 2, tp 2, checkpointing": ("fsdp 2, tp 2", True),
    "tp 4, checkpointing": ("tp 4", True),
    "activations, tp 2": ("tp 2", False),
    "activations, tp 4": ("tp 4", False),
}
LENGTH, MICRO_BATCH, MICRO_STEPS = 24, 2, 2
KINDS = {
    "all_gather_into_tensor": "all-gather",
    "all_gather_single": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter",
    "reduce_scatter_single": "reduce-scatter",
    "all_reduce": "all-reduce",
    "all_reduce_": "all-reduce",
}


class Sent(TorchDispatchMode):
    """Counts collectives, and the bytes that this rank brings to each: torch.distributed's and DTensor's."""

    def __init__(self, groups):
        super().__init__()
        self.groups = {tuple(dist.get_process_group_ranks(group)): name for name, group in groups.items()}
        self.phase, self.calls, self.nbytes, self.real = "", Counter(), Counter(), {}

    def __enter__(self):
        for name in KINDS:
            if hasattr(dist, name):
                self.real[name] = getattr(dist, name)
                setattr(dist, name, self.counted(name, self.real[name]))
        return super().__enter__()

    def __exit__(self, *error):
        for name, function in self.real.items():
            setattr(dist, name, function)
        return super().__exit__(*error)

    def counted(self, name, function):
        names = ("tensor",) if name == "all_reduce" else ("input_tensor", "input")
        place = 0 if name == "all_reduce" else 1

        def call(*args, **kwargs):
            given = [kwargs[key] for key in names if key in kwargs]
            self.add(name, given[0] if given else args[place], kwargs["group"])
            return function(*args, **kwargs)

        return call

    def add(self, name, tensor, group):
        members = tuple(dist.get_process_group_ranks(group))
        if len(members) == 1:
            return  # nothing is sent
        key = f"{self.phase}/{self.groups[members]}/{KINDS[name]}"
        self.calls[key] += 1
        self.nbytes[key] += tensor.nbytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "_c10d_functional" and name in KINDS:
            self.add(name, args[0], dist.distributed_c10d._resolve_process_group(args[-1]))
        elif func.namespace in ("c10d", "_c10d_functional") and name not in SEEN_ABOVE:
            raise AssertionError(f"a collective that is not counted: {func}")
        return func(*args, **(kwargs or {}))


# below the functions of torch.distributed that are counted
SEEN_ABOVE = {
    "wait_tensor",
    "_wrap_tensor_autograd",
    "_allgather_base_",
    "_reduce_scatter_base_",
    "allreduce_",
    "barrier",
}


def model_of(config, seed):
    from transformers import AutoConfig, AutoModelForCausalLM

    from minitron_kernels.distillation import attach

    torch.manual_seed(seed)
    rest = {key: value for key, value in config.items() if key != "model_type"}
    config = AutoConfig.for_model(config["model_type"], **rest)
    return attach(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"))


def split(model, mesh):
    """Megatron's tensor parallelism, one input of each block for all of its linear layers."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        parallelize_module,
    )

    everywhere = (Replicate(),)
    plan = {"model.embed_tokens": RowwiseParallel(input_layouts=Replicate()), "lm_head": ColwiseParallel()}
    for i in range(model.config.num_hidden_layers):
        layer = f"model.layers.{i}"
        plan[f"{layer}.self_attn"] = PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Replicate()},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
        )
        plan[f"{layer}.mlp"] = PrepareModuleInput(input_layouts=everywhere, desired_input_layouts=everywhere)
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
        ):
            plan[f"{layer}.{name}"] = ColwiseParallel()
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            plan[f"{layer}.{name}"] = RowwiseParallel()
    parallelize_module(model, mesh, plan)


def shard(model, mesh, **options):
    """FSDP2 around each layer and around the model."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def checkpoint_layers(model):
    """Activation checkpointing by transformers, which has given it another name."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


class Keep:
    """An attached teacher gives its signal."""

    layers = ()

    def __call__(self, signal):
        return signal


class Loss(Keep):
    """An attached student gives its loss."""

    def __init__(self, teacher, labels, tp_group):
        self.teacher, self.labels, self.tp_group = teacher, labels, tp_group

    def __call__(self, student):
        import minitron_kernels as mk

        return mk.linear_kl_loss(
            student.hidden,
            student.head,
            self.teacher.hidden,
            self.teacher.head,
            labels=self.labels,
            ce_weight=0.5,
            return_parts=True,
            tp_group=self.tp_group,
        ).loss


def storage_bytes(tensors):
    """Of the memory that these tensors lie in, each once."""
    found = {}
    for x in tensors:
        storage = getattr(x, "_local_tensor", x).untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def local_bytes(tensors):
    return sum(getattr(x, "_local_tensor", x).nbytes for x in tensors)


def run(layout, checkpointing):
    """A step of this rank: {what: [planned, found]}."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

    import minitron_kernels as mk
    from minitron_kernels import _workspace
    from minitron_kernels.distillation.scale.plan_distillation import plan_distillation

    copies, fsdp, tp = layout
    mesh = init_device_mesh("cpu", (copies, fsdp, tp), mesh_dim_names=("copy", "fsdp", "tp"))
    groups = {name: mesh.get_group(name) for name in ("fsdp", "tp")}
    student, teacher = model_of(STUDENT, 0), model_of(TEACHER, 1)
    teacher.to(torch.bfloat16).eval().requires_grad_(False)
    student.train()
    if checkpointing:
        checkpoint_layers(student)
    if tp > 1:
        split(student, mesh["tp"])
        split(teacher, mesh["tp"])
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(student, mesh["fsdp"], mp_policy=policy)
    shard(teacher, mesh["fsdp"])
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    ids = torch.arange(MICRO_BATCH * LENGTH).reshape(MICRO_BATCH, LENGTH) % COMMON["vocab_size"]
    tp_group = groups["tp"] if tp > 1 else None
    heads, sent = {}, Sent(groups)

    def micro_step():
        sent.phase = "teacher"
        with torch.no_grad():
            signal = teacher(input_ids=ids, distillation=Keep())
        sent.phase = "student"
        loss = student(input_ids=ids, distillation=Loss(signal, ids, tp_group))
        loss.backward()
        heads["teacher"] = local_bytes([signal.head])
        heads["hidden"] = local_bytes([signal.hidden])

    micro_step()  # the first gathers the teacher's outermost group
    if not checkpointing:  # which changes nothing of its states, and DTensors make it slow
        optimizer.step()
    optimizer.zero_grad()
    mk.release_workspaces()
    with sent:
        for _ in range(MICRO_STEPS):
            micro_step()
    plan = plan_distillation(
        STUDENT, TEACHER, sequence_length=LENGTH, micro_batch=MICRO_BATCH, tp=tp, fsdp=fsdp,
        global_batch=MICRO_BATCH * fsdp * MICRO_STEPS, checkpointing=checkpointing, device="cpu",
    )  # fmt: skip
    moments = [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    held = {
        "student: shards of the weights": storage_bytes(student.parameters()),
        "student: shards of the gradients": storage_bytes(x.grad for x in student.parameters()),
        "teacher: hidden states behind the last norm": heads["hidden"],
        "the loss: scratch memory": _workspace.workspace_bytes_held(),
    }
    teacher.reshard()
    if moments:
        held["student: shards of the optimizer's states"] = local_bytes(moments)
    held["teacher: shards of the weights"] = storage_bytes(teacher.parameters())
    found = {name: [plan.ours.part(name), nbytes] for name, nbytes in held.items()}
    if tp > 1:  # in 16 bits the sum over ranks is torch's memory, not the workspace
        found["the loss: scratch memory"][0] = plan.loss.total_bytes
    found["teacher's head, gathered"] = [
        2 * plan.teacher.rows_of_vocab * plan.teacher.hidden,
        heads["teacher"],
    ]
    calls, nbytes = Counter(), Counter()
    for one in plan.ours.collectives:
        key = f"{'teacher' if one.name.startswith('teacher') else 'student'}/{one.group}/{one.kind}"
        calls[key] += one.count
        nbytes[key] += one.nbytes
    for key in sorted({*calls, *sent.calls}):
        found[f"{key}, number"] = [calls[key], sent.calls[key]]
        found[f"{key}, bytes"] = [nbytes[key], sent.nbytes[key]]
    return found


def kept_bytes_of(model, ids):
    """What autograd keeps of a model's layers and last norm, on this rank, by the memory that it lies in."""

    def local(x):
        return getattr(x, "_local_tensor", x)

    not_counted = {local(x).untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    kept, alive = {}, []

    def pack(x):
        if x.is_floating_point() and x.shape[:1] != (1,):  # not the angles, which all sequences share
            storage = local(x).untyped_storage()
            if storage.data_ptr() not in not_counted:
                kept[storage.data_ptr()] = storage.nbytes()
                alive.append(x)  # so that its place is not another's
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model.model(input_ids=ids, use_cache=False)
    return sum(kept.values())


def run_activations(layout):
    """What a rank of tensor parallelism keeps for its backward: {what: [planned, found]}."""
    from torch.distributed.device_mesh import init_device_mesh

    from minitron_kernels.distillation.scale.activations import kept_bytes
    from minitron_kernels.distillation.scale.shape import shape_of

    mesh = init_device_mesh("cpu", layout, mesh_dim_names=("copy", "fsdp", "tp"))
    model = model_of(STUDENT, 0).to(torch.bfloat16).train()
    split(model, mesh["tp"])
    ids = torch.arange(MICRO_BATCH * LENGTH).reshape(MICRO_BATCH, LENGTH) % COMMON["vocab_size"]
    planned = kept_bytes(shape_of("student", STUDENT, layout[2]), ids.numel(), 2, False, False)
    return {"activations": [planned, kept_bytes_of(model, ids)]}


def run_rank(rank, folder):
    faulthandler.dump_traceback_later(150, exit=True)
    report = {}
    with joined(rank, folder, RANKS):
        for name, (layout, checkpointing) in CASES.items():
            try:
                if name.startswith("activations"):
                    report[name] = run_activations(LAYOUTS[layout])
                else:
                    report[name] = run(LAYOUTS[layout], checkpointing)
            except Exception:
                report[name] = traceback.format_exc()[-3000:]
                break  # the others wait for this rank
        (Path(folder) / f"rank{rank}.json").write_text(json.dumps(report))


def fork_all(folder):
    # what each rank needs is imported once
    import torch.distributed.fsdp
    import torch.distributed.tensor.parallel  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    import minitron_kernels.distillation.scale.plan_distillation
    import minitron_kernels.pruning  # noqa: F401

    fork_ranks(lambda rank: run_rank(rank, folder), RANKS)


def start(folder):
    """Reports of all ranks."""
    run_forked("distillation.scale_ranks", folder)
    return [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        reports = start(folder)
    for name, found in reports[0].items():
        print("==", name)
        if isinstance(found, str):
            print(found)
            continue
        for what, (planned, actual) in found.items():
            print("ok " if planned == actual else "BAD", what, planned, actual)
