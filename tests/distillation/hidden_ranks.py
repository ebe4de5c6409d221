"""Processes of this machine, joined by gloo, that train a student with hidden-state terms."""

import warnings

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from distillation.hidden_oracle import Toy
from minitron_kernels.distillation import DenseSignal, DistillationLoss, HiddenStatesLoss
from tools.ranks import run_cases, run_ranks

V, H, HT, TOKENS = 16, 6, 9, 5
LAYERS = {0: 1, 1: 3}
# fp32, a few dozen of products in another order
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


class Problem:
    """A student, a teacher, a loss, and a batch of one row a rank, of which ranks take theirs."""

    def __init__(self, **options):
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.student, self.teacher = Toy(V, H), Toy(V, HT, layers=4, seed=1)
        hidden = HiddenStatesLoss(LAYERS, student_width=H, teacher_width=HT, workspace_bytes=2000)
        self.loss = DistillationLoss(hidden_states=hidden, **options)
        generator = torch.Generator().manual_seed(2)
        self.ids = torch.randint(0, V, (self.world, TOKENS), generator=generator)
        self.labels = self.ids.masked_fill(self.ids % 3 == 0, -100)
        self.labels[:, 0] = 1
        self.valid = int((self.labels != -100).sum())

    def signal(self, rows):
        with torch.no_grad():
            return self.teacher(self.ids[rows])

    def run(self, student, rows, num_items):
        def distillation(signal):
            return self.loss(signal, self.signal(rows), self.labels[rows], num_items=num_items)

        record = student(self.ids[rows], distillation)
        record.loss.backward()
        return record

    def whole(self):
        """(record, gradients) of the whole batch in one process, by name."""
        self.student.zero_grad()
        group, self.loss.hidden_weight_group = self.loss.hidden_weight_group, None
        record = self.run(self.student, slice(None), self.valid)
        self.loss.hidden_weight_group = group
        grads = {name: p.grad.clone() for name, p in self.student.named_parameters()}
        self.student.zero_grad()
        return record, grads

    def own(self, student):
        """The record of this rank's row; gradients are averaged by what wraps the student."""
        return self.run(student, slice(self.rank, self.rank + 1), self.valid / self.world)


def check_grads(named_parameters, wanted):
    for name, p in named_parameters:
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        torch.testing.assert_close(grad, wanted[name.removeprefix("module.")], **CLOSE)


def ddp():
    problem = Problem(hidden_weight=0.5)
    problem.loss.attach_map(problem.student)
    _, wanted = problem.whole()
    assert "distillation_map.weight" in wanted
    student = DistributedDataParallel(problem.student)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem.own(student)
    check_grads(student.named_parameters(), wanted)


def fsdp2():
    problem = Problem(hidden_weight=0.5)
    problem.loss.attach_map(problem.student)
    _, wanted = problem.whole()
    mesh = init_device_mesh("cpu", (problem.world,))
    for layer in problem.student.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(problem.student, mesh=mesh)
    problem.own(problem.student)
    check_grads(problem.student.named_parameters(), wanted)
    weight = problem.loss.hidden_states.map.weight  # the same module: the loss has the shard too
    assert type(weight).__name__ == "DTensor" and weight.grad is not None


def one_weight_on_all_ranks():
    problem = Problem(hidden_weight_group=dist.group.WORLD)
    problem.loss.attach_map(problem.student)
    record, wanted = problem.whole()
    own = problem.own(DistributedDataParallel(problem.student))
    torch.testing.assert_close(own.hidden_weight, record.hidden_weight, **CLOSE)
    check_grads(problem.student.named_parameters(), wanted)
    alone = Problem()  # each its own
    alone.loss.attach_map(alone.student)
    found = alone.own(alone.student).hidden_weight
    torch.testing.assert_close(found, alone.loss._weight(*(alone.own(alone.student)[i] for i in (1, 6))))
    assert abs(float(found - record.hidden_weight)) > 1e-3


def a_sharded_map():
    problem = Problem(hidden_weight=0.5)
    hidden = problem.loss.hidden_states
    mesh = init_device_mesh("cpu", (problem.world,))
    problem.loss.attach_map(problem.student)
    wanted = problem.whole()[1]["distillation_map.weight"]
    problem.loss.detach_map(problem.student)
    whole = hidden.map.weight.detach().clone()
    hidden.map.weight = torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    problem.own(problem.student)
    check_grads([("map", hidden.map.weight)], {"map": wanted})
    hidden.map.weight = torch.nn.Parameter(whole)  # and as a module of FSDP2's own
    fully_shard(problem.loss, mesh=mesh)
    problem.own(problem.student)
    check_grads([("map", hidden.map.weight)], {"map": wanted})


def a_map_that_nobody_averages():
    problem = Problem(hidden_weight=0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        problem.own(problem.student)
        problem.own(problem.student)
    texts = [str(w.message) for w in caught if "map of the hidden states" in str(w.message)]
    assert len(texts) == 1 and "attach_map" in texts[0]


def vocabulary_over_ranks():
    problem = Problem()
    problem.loss.attach_map(problem.student)
    record, wanted = problem.whole()
    rows = slice(problem.rank * V // problem.world, (problem.rank + 1) * V // problem.world)
    loss = DistillationLoss(hidden_states=problem.loss.hidden_states, tp_group=dist.group.WORLD, vocab_size=V)
    teacher = problem.signal(slice(None))
    signal = problem.student(problem.ids)
    head = signal.head.detach()[rows].clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = loss(
            DenseSignal(signal.hidden, head, layers=signal.layers),
            DenseSignal(teacher.hidden, teacher.head[rows], layers=teacher.layers),
            problem.labels,
            num_items=problem.valid,
        )
    found.loss.backward()
    torch.testing.assert_close(found.loss, record.loss, **CLOSE)
    torch.testing.assert_close(found.hidden_weight, record.hidden_weight, **CLOSE)
    torch.testing.assert_close(head.grad, wanted.pop("head.weight")[rows], **CLOSE)
    problem.student.head.weight.grad = None
    check_grads([(n, p) for n, p in problem.student.named_parameters() if n in wanted], wanted)


CASES = (
    ddp,
    fsdp2,
    one_weight_on_all_ranks,
    a_sharded_map,
    a_map_that_nobody_averages,
    vocabulary_over_ranks,
)


def run_all(rank, folder, ranks):
    run_cases({case.__name__: case for case in CASES}, rank, folder, ranks)


def start(ranks, folder):
    """{case: {rank: error or None}}."""
    return run_ranks("distillation.hidden_ranks", ranks, folder, ranks)
