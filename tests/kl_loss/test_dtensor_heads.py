"""Sharded heads: ranks with a part of the batch each find what one process finds with all of it."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import minitron_kernels as mk
from minitron_kernels.ops.kl_loss.sharded import local_head

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed"),
]
WORLD, B, S, H, HT, V = 4, 8, 5, 12, 10, 131
CLOSE = dict(rtol=1e-9, atol=1e-13)


def tensors():
    g = torch.Generator().manual_seed(0)
    shapes = ((B, S, H), (V, H), (V,), (B, S, HT), (V, HT), (V,))
    return [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes]


def part(x, rank):
    """A rank's share of the batch."""
    return x[rank * B // WORLD : (rank + 1) * B // WORLD]


def linear(hidden, head, bias, teacher_hidden, teacher_head, teacher_bias, **options):
    return mk.linear_kl_loss(
        hidden, head, teacher_hidden, teacher_head, student_bias=bias, teacher_bias=teacher_bias, **options
    )


def mesh_of(*shape):
    names = ("dp", "tp")[: len(shape)]
    return dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names)


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def placements():
    from torch.distributed.tensor import Replicate, Shard

    yield mesh_of(WORLD), [[Shard(0)], [Shard(1)], [Replicate()]]
    two = [Replicate(), Shard(0), Shard(1)]
    yield mesh_of(2, 2), [[a, b] for a in two for b in two]


def distribute(x, mesh, places):
    from torch.distributed.tensor import Replicate, distribute_tensor

    places = [p if p.is_replicate() or p.dim < x.dim() else Replicate() for p in places]
    return distribute_tensor(x, mesh, places).requires_grad_()


def every_placement(rank):
    leaves = [x.requires_grad_() for x in tensors()[:3]]
    expected_loss = linear(*leaves, *tensors()[3:])
    expected = torch.autograd.grad(expected_loss, leaves)
    for mesh, choices in placements():
        for places in choices:
            hidden, head, bias, teacher_hidden, teacher_head, teacher_bias = tensors()
            hidden = part(hidden, rank).requires_grad_()
            params = [distribute(x, mesh, places) for x in (head, bias, teacher_head, teacher_bias)]
            loss = linear(hidden, *params[:2], part(teacher_hidden, rank), *params[2:])
            loss.backward()
            dist.all_reduce(total := loss.detach() / WORLD)
            torch.testing.assert_close(total, expected_loss.detach(), **CLOSE)
            torch.testing.assert_close(hidden.grad / WORLD, part(expected[0], rank), **CLOSE)
            for param, gradient in zip(params, expected[1:], strict=False):
                assert param.grad.placements == param.placements
                torch.testing.assert_close(param.grad.full_tensor(), gradient, **CLOSE)
            assert params[2].grad is None and params[3].grad is None


def partial_sums(rank):
    from torch.distributed.tensor import DTensor, Partial

    hidden, head, *others = tensors()
    summand = DTensor.from_local(head / WORLD, mesh_of(WORLD), [Partial()])
    torch.testing.assert_close(linear(hidden, summand, *others), linear(hidden, head, *others), **CLOSE)


def rows_of_a_tp_group(rank):
    """Over the dimension that is tp_group ranks keep their rows; over the other gradients are averaged."""
    from torch.distributed.tensor import DTensor, Shard

    (_, _), (mesh, choices) = placements()
    dp, tp = rank // 2, rank % 2
    group = mesh.get_group("tp")
    for x in tensors()[1:3]:
        rows = x.chunk(2)[tp]
        for places in choices:
            leaf = distribute(x, mesh, places)
            local = local_head("head", leaf, group)
            assert torch.equal(local, rows)
            (local * (1 + dp + 10 * tp)).sum().backward()
            expected = torch.cat([torch.full_like(y, 1.5 + 10 * i) for i, y in enumerate(x.chunk(2))])
            torch.testing.assert_close(leaf.grad.full_tensor(), expected, **CLOSE)
        # FSDP2 of what was cut by hand: the mesh does not know of tp_group
        own = distribute(rows, mesh["dp"], [Shard(0)])
        assert isinstance(own, DTensor) and torch.equal(local_head("head", own, group), rows)


def vocab_parallel(rank):
    """Tokens over one dimension, the vocabulary over the other; hidden states also in parts of a sequence."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    leaves = [x.requires_grad_() for x in tensors()[:3]]
    expected_loss = linear(*leaves, *tensors()[3:])
    expected = torch.autograd.grad(expected_loss, leaves)
    mesh, (dp, tp) = mesh_of(2, 2), (rank // 2, rank % 2)
    group = mesh.get_group("tp")
    for places in ([Shard(0), Shard(0)], [Shard(1), Shard(0)], [Replicate(), Replicate()]):
        for in_parts in (False, True):
            hidden, head, bias, teacher_hidden, teacher_head, teacher_bias = tensors()
            # what the ranks of tp_group look at together, and what is this rank's of it
            tokens = [x.chunk(2)[dp] for x in (hidden, teacher_hidden)]
            own = [x.chunk(2)[tp] if in_parts else x for x in tokens]
            place = [Replicate(), Shard(0) if in_parts else Replicate()]
            hidden, teacher_hidden = (DTensor.from_local(x.clone(), mesh, place) for x in own)
            hidden.requires_grad_()
            params = [distribute(x, mesh, places) for x in (head, bias, teacher_head, teacher_bias)]
            options = {"tp_group": group, "sequence_parallel": in_parts}
            loss = linear(hidden, *params[:2], teacher_hidden, *params[2:], **options)
            loss.backward()
            dist.all_reduce(total := loss.detach() / WORLD)
            torch.testing.assert_close(total, expected_loss.detach(), **CLOSE)
            gradient = expected[0].chunk(2)[dp]
            gradient = gradient.chunk(2)[tp] if in_parts else gradient
            torch.testing.assert_close(hidden.grad.to_local() / 2, gradient, **CLOSE)
            for param, gradient in zip(params, expected[1:], strict=False):
                torch.testing.assert_close(param.grad.full_tensor(), gradient, **CLOSE)
    with pytest.raises(TypeError, match=r"student_hidden .* wanted are Shard\(0\) over dimension 1"):
        hidden = DTensor.from_local(tokens[0], mesh, [Replicate(), Replicate()])
        linear(hidden, *params[:2], own[1], *params[2:], **options)


def sparse_teachers(rank):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    hidden, head, bias, *_ = tensors()
    g = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(V, generator=g)[:6] for _ in range(B * S)]).reshape(B, S, 6)
    logprobs = torch.randn(B, S, V, generator=g, dtype=torch.float64).log_softmax(-1).gather(-1, ids)
    teacher = ids, logprobs, torch.log1p(-logprobs.exp().sum(-1))

    def loss(hidden, head, bias, *teacher):
        return mk.linear_sparse_kl_loss(hidden, head, *teacher, student_bias=bias, backend="reference")

    leaves = [x.requires_grad_() for x in (head, bias)]
    expected_loss = loss(hidden, *leaves, *teacher)
    expected = torch.autograd.grad(expected_loss, leaves)
    mesh = mesh_of(2, 2)
    params = [distribute(x.detach(), mesh, [Shard(0), Shard(0)]) for x in (head, bias)]
    own = [part(x, rank) for x in (hidden, *teacher)]
    loss(own[0], *params, *own[1:]).backward()
    for param, gradient in zip(params, expected, strict=True):
        torch.testing.assert_close(param.grad.full_tensor(), gradient, **CLOSE)
    logits = (hidden @ head.T).detach()
    with pytest.raises(TypeError, match=r"student_logits is a DTensor .* wanted are Replicate\(\)"):
        mk.sparse_kl_loss(distribute_tensor(logits, mesh, [Replicate(), Shard(2)]), *teacher)


def one_collective_each_way(rank):
    from torch.distributed.tensor.debug import CommDebugMode

    hidden, head, _, *teacher, _ = tensors()
    head = distribute(head, mesh_of(WORLD), next(placements())[1][0])
    for reduction in ("mean", "none"):
        with CommDebugMode() as forward:
            loss = mk.linear_kl_loss(hidden, head, *teacher, reduction=reduction)
        with CommDebugMode() as backward:
            loss.sum().backward()
        counts = [
            {op.__name__: n for op, n in mode.get_comm_counts().items() if n} for mode in (forward, backward)
        ]
        assert counts == [{"all_gather_into_tensor": 1}, {"reduce_scatter_tensor": 1}]


def hidden_states_and_logits(rank):
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = mesh_of(WORLD)
    hidden, head, *others = tensors()
    local = hidden.clone().requires_grad_()
    expected = linear(local, head, *others)
    expected.backward()
    whole_hidden = distribute_tensor(hidden, mesh, [Replicate()]).requires_grad_()
    loss = linear(whole_hidden, head, *others)
    loss.backward()
    assert not isinstance(loss, DTensor) and torch.equal(loss, expected)
    assert torch.equal(whole_hidden.grad.full_tensor(), local.grad)

    sharded = distribute_tensor(hidden, mesh, [Shard(0)])
    message = r"student_(hidden|logits) is a DTensor .*full_tensor\(\).*to_local\(\) with this rank's labels"
    with pytest.raises(TypeError, match=message):
        linear(sharded, head, *others)
    logits = hidden @ head.T
    with pytest.raises(TypeError, match=message):
        mk.kl_loss(distribute_tensor(logits, mesh, [Shard(2)]), logits)
    assert mk.kl_loss(distribute_tensor(logits, mesh, [Replicate()]), logits) == 0
    with pytest.raises(TypeError, match=r"mask is a DTensor"):
        linear(hidden, head, *others, mask=distribute_tensor(hidden[..., 0] > 0, mesh, [Replicate()]))
    with pytest.raises(ValueError, match="grad_head_accumulator cannot take the gradient of a student_head"):
        head = distribute_tensor(head, mesh, [Shard(0)])
        linear(hidden, head, *others, grad_head_accumulator=torch.zeros(V, H, dtype=torch.float64))


class Student(nn.Module):
    """Its forward gives the loss, or hidden states for a loss outside of it."""

    def __init__(self, tied=False):
        super().__init__()
        self.tp_group = None
        self.embed = nn.Embedding(V, H)
        self.body = nn.Linear(H, H)
        self.lm_head = nn.Linear(H, V, bias=True)
        if tied:
            self.lm_head.weight = self.embed.weight

    def get_input_embeddings(self):
        return self.embed

    def forward(self, tokens, teacher=None):
        hidden = F.silu(self.body(self.embed(tokens)))
        return hidden if teacher is None else self.loss(hidden, *teacher)

    def loss(self, hidden, teacher_hidden, teacher_head):
        hidden, weight, bias = mk.head_of(self.lm_head)(hidden)
        return mk.linear_kl_loss(
            hidden, weight, teacher_hidden, teacher_head, student_bias=bias, tp_group=self.tp_group
        )


def student(kind):
    """The same on all ranks."""
    torch.manual_seed(0)
    model = Student(tied=kind == "tied")
    if kind == "lora":
        import peft

        config = peft.LoraConfig(r=3, lora_alpha=12, target_modules=["body", "lm_head"], lora_bias=True)
        peft.inject_adapter_in_model(config, model)
        for name, x in model.named_parameters():
            if "lora" in name:
                nn.init.normal_(x, std=0.3)
    return model.double()


def train(model, inside, tokens, *teacher):
    """Gradients of two micro-batches, as a plain loop has them."""
    for scale in (1.0, 0.5):
        loss = model(tokens, teacher) if inside else model.loss(model(tokens), *teacher)
        (loss * scale).backward()
    return {name: x.grad for name, x in model.named_parameters() if x.requires_grad}


def batch(rank=None):
    tokens = torch.arange(B * S).reshape(B, S) * 7 % V
    inputs = [tokens, tensors()[3]]
    return [*(x if rank is None else part(x, rank) for x in inputs), tensors()[4]]


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(whole(actual[name]), gradient, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def fully_sharded(rank):
    """FSDP2, with the head in the root's group and in one of its own, resharded after the forward or not."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    meshes = {"FSDP": mesh_of(WORLD), "HSDP": mesh_of(2, 2)}
    cases = [
        (kind, inside, reshard, own, "FSDP")
        for kind in ("plain", "tied", "lora")
        for inside in (True, False)
        for reshard in (True, False)
        for own in ((False, True) if kind == "plain" else (False,))
        if not (own and inside)  # a module's parameters are there in its own forward
    ] + [("plain", inside, True, False, "HSDP") for inside in (True, False)]
    for kind, inside, reshard, own, how in cases:
        expected = train(student(kind), inside, *batch())
        model = student(kind)
        options = {"mesh": meshes[how], "reshard_after_forward": reshard}
        if own:
            fully_shard(model.lm_head, **options)
        fully_shard(model, **options)
        assert_same(train(model, inside, *batch(rank)), expected)
    # a head that is cut over tp_group first, and by FSDP2 over the rest
    mesh = mesh_of(2, 2)
    tp_group = mesh.get_group("tp")
    for inside in (True, False):
        expected = train(student("plain"), inside, *batch())
        model = student("plain")
        for name, x in list(model.lm_head.named_parameters()):
            cut = distribute_tensor(x.detach(), mesh["tp"], [Shard(0)])
            setattr(model.lm_head, name, nn.Parameter(cut))
        fully_shard(model, mesh=mesh["dp"], reshard_after_forward=True)
        model.tp_group = tp_group
        tokens, hidden, head = batch()
        teacher = hidden.chunk(2)[rank // 2], distribute_tensor(head, mesh["tp"], [Shard(0)])
        assert_same(train(model, inside, tokens.chunk(2)[rank // 2], *teacher), expected)
    # what was taken along from a forward, after which its memory was freed
    model = student("plain")
    fully_shard(model, reshard_after_forward=True)
    taken = []
    model.body.register_forward_hook(lambda *_: taken.append(model.lm_head.weight))
    hidden, *teacher = model(batch(rank)[0]), *batch(rank)[1:]
    with pytest.raises(ValueError, match="student_head has no memory"):
        mk.linear_kl_loss(hidden, *taken, *teacher)


def sharded_by_fsdp1(rank):
    """Inside of the wrapped forward the head is there; outside it is refused where it is not."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    def wrap(module):
        return FullyShardedDataParallel(
            module, use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )

    expected = train(student("plain"), True, *batch())
    pieces = torch.cat([x.flatten() for x in expected.values()])
    tokens, *teacher = batch(rank)
    gone = pytest.raises(ValueError, match=r"has no memory: .*inside of that forward|as FSDP1 leaves one")
    for use_orig_params in (True, False):
        for inside in (True, False):
            model = wrap(student("plain"))
            if use_orig_params and not inside:
                with gone:
                    model.module.loss(model(tokens), *teacher)
                continue
            if not inside:  # a root's flat parameter stays whole after its forward
                model.loss = model.module.loss
            flat = train(model, inside, *batch(rank))
            if use_orig_params:  # each a piece, at the rank that has it
                with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
                    prefix = "_fsdp_wrapped_module."
                    whole_ = {name.removeprefix(prefix): x.grad for name, x in model.named_parameters()}
                    assert_same(whole_, expected)
            else:
                (ours,) = flat.values()
                theirs = pieces[rank * ours.numel() :][: ours.numel()]
                torch.testing.assert_close(ours[: theirs.numel()], theirs, **CLOSE)
        model = student("plain")
        model.lm_head = wrap(model.lm_head)
        model = wrap(model)
        head, hidden = model.module.lm_head.module, model(tokens)
        with gone:
            mk.head_of(head)(hidden)
        with gone:
            mk.linear_kl_loss(hidden, head.weight, *teacher)
        with pytest.raises(TypeError, match=r"got torch.distributed.fsdp.*FullyShardedDataParallel"):
            mk.head_of(model.module.lm_head)


CASES = (
    every_placement,
    partial_sums,
    rows_of_a_tp_group,
    vocab_parallel,
    sparse_teachers,
    one_collective_each_way,
    hidden_states_and_logits,
    fully_sharded,
    sharded_by_fsdp1,
)


def run(rank, tmp_path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=rank, world_size=WORLD)
    try:
        for case in CASES:
            case(rank)
            dist.barrier()
    finally:
        dist.destroy_process_group()


def test_ranks_find_what_one_process_finds(tmp_path):
    # from a server that has imported what takes seconds once, and not in each of the processes
    multiprocessing.set_forkserver_preload(["minitron_kernels", "torch.distributed.fsdp", "peft"])
    torch.multiprocessing.start_processes(run, args=(tmp_path,), nprocs=WORLD, start_method="forkserver")
