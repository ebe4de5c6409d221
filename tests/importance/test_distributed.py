"""Importance over ranks: gloo processes that share the work find what one process finds."""

import pytest
import torch
import torch.distributed as dist

import minitron_kernels as mk
from importance import oracle as importance_oracle
from minitron_kernels.ops.importance.moments import combine, moments_of
from minitron_kernels.pruning import collect_importance
from pruning import oracle
from pruning.tiny_models import tiny_model

SEQ = ("mean", "L2", "var")
CLOSE = dict(rtol=1e-12, atol=1e-12)  # the same fp32 sums, added up in another order in float64
# a channel at another place among its neighbours: vectors of other lengths, other roundings of fp32
MOVED = dict(rtol=16 * 2.0**-24, atol=1e-12)
PIECES = 32 * 2.0**-24  # of the largest: sums over pieces of a sequence, each within 16 roundings of fp32

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


def activations(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g) + torch.randn(shape[-1], generator=g)


def assert_states(mine, whole, close=CLOSE):
    assert type(mine) is type(whole)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[key], value, **close)


def assert_scores(mine, whole):
    assert list(mine.axes) == list(whole.axes)
    for name, axis in whole.axes.items():
        assert_states(mine.axes[name].state, axis.state)


def data_parallel_states(rank, world):
    x, mask = activations(2 * world, 9, 12), torch.rand(2 * world, 9) < 0.7
    whole = mk.ImportanceState(12, seq=SEQ)
    for i in range(world):
        mk.accumulate_importance_(whole, x[2 * i : 2 * i + 2], mask=mask[2 * i : 2 * i + 2])
    mine = mk.ImportanceState(12, seq=SEQ)
    mk.accumulate_importance_(mine, x[2 * rank : 2 * rank + 2], mask=mask[2 * rank : 2 * rank + 2])
    assert_states(mine.all_reduce_(), whole)
    layers, own = mk.TokenMeanState(3), mk.TokenMeanState(3)
    for i in range(world):
        part = x[2 * i : 2 * i + 2]
        mk.accumulate_block_importance_(layers, 1, part, part.roll(1, 1))
    part = x[2 * rank : 2 * rank + 2]
    mk.accumulate_block_importance_(own, 1, part, part.roll(1, 1))
    assert_states(own.all_reduce_(), layers)


def tensor_and_expert_parallel_states(rank, world):
    x = activations(3, 11, 8 * world)
    whole, mine = mk.ImportanceState(8 * world, seq=SEQ), mk.ImportanceState(8, seq=SEQ)
    mk.accumulate_importance_(whole, x)
    mk.accumulate_importance_(mine, x[..., 8 * rank : 8 * (rank + 1)])
    assert_states(mine.all_gather(), whole, MOVED)
    # groups that were counted apart, as experts are
    grouped = mk.ImportanceState(8, seq=SEQ, groups=2)
    mk.accumulate_importance_(grouped.part(0, 1), x[..., 8 * rank : 8 * rank + 4])
    mk.accumulate_importance_(grouped.part(1, 2), x[: 1 + rank % 2, :, 8 * rank + 4 : 8 * rank + 8])
    together = grouped.all_gather()
    assert together.groups == 2 * world and together.num_channels == 8 * world
    assert together.tokens.view(world, 2)[rank].tolist() == [33, 11 * (1 + rank % 2)]
    columns = slice(8 * rank, 8 * rank + 4)
    torch.testing.assert_close(together.sums[:, columns], whole.sums[:, columns], **MOVED)

    output, expert = activations(40, 6, seed=1), torch.randint(2 * world, (40,))
    dist.broadcast(expert, 0)
    experts, own = mk.TokenMeanState(2 * world), mk.TokenMeanState(2)
    mk.accumulate_expert_importance_(experts, output, expert)
    local = expert - 2 * rank
    mk.accumulate_expert_importance_(own, output, torch.where((local < 0) | (local > 1), -1, local))
    assert_states(own.all_gather(), experts, MOVED)


def context_parallel_states(rank, world):
    """Sequences cut unevenly; one rank's piece is padding alone."""
    x, mask = activations(3, 8 * world + 5, 10, seed=2), torch.rand(3, 8 * world + 5) < 0.8
    dist.broadcast(mask, 0)
    mask[0, : 8 * world - 8] = False
    borders = [0, *(8 * i for i in range(1, world)), 8 * world + 5]
    begin, end = borders[rank], borders[rank + 1]
    group = dist.new_group(list(range(world)))
    state = mk.ImportanceState(10, seq=SEQ)
    mk.accumulate_importance_(state, x[:, begin:end], mask=mask[:, begin:end], group=group)
    for batch in ("L2", "mean", "var"):
        for seq in SEQ:
            wanted = torch.from_numpy(importance_oracle.scores(x, batch=batch, seq=seq, mask=mask))
            bound = PIECES * wanted.abs().max() * (8 if seq == "var" else 1)
            if batch == "var":  # a difference of squares of what lies in the state
                bound = PIECES * 8 * state.squares.max()
            assert (state.scores(batch=batch, seq=seq) - wanted).abs().max() <= bound, (batch, seq)
    moments = moments_of(x[:, begin:end], mask[:, begin:end], None, 0, state.kinds, "auto")
    before = moments.values.clone(), moments.counts.clone()
    whole = combine(moments, group)
    assert torch.equal(moments.values, before[0]) and torch.equal(moments.counts, before[1])
    assert whole.counts.tolist() == mask.sum(1).tolist()
    everywhere = [torch.empty_like(state.squares) for _ in range(world)]
    dist.all_gather(everywhere, state.squares)
    assert all(torch.equal(squares, everywhere[0]) for squares in everywhere)


def calibration(count):
    batches = []
    for i in range(count):
        ids = torch.randint(3, 96, (2, 9 + i % 3), generator=torch.Generator().manual_seed(i))
        mask = torch.ones_like(ids)
        mask[0, : i % 3] = 0
        if i % 3 == 2:  # packed: 0 is padding, 1 and 2 are sequences
            mask[:, 6:] *= 2
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def collector_with_data_parallel_models(rank, world):
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    for name in ("llama", "qwen3_moe"):
        batches = calibration(2 * world)
        options = dict(seq=("mean", "var"), progress=False)
        whole = collect_importance(tiny_model(name), batches, **options)
        mine = batches[rank::world]

        ddp = DistributedDataParallel(tiny_model(name))
        scores = collect_importance(ddp, mine, data_parallel_group=dist.group.WORLD, **options)
        assert_scores(scores, whole)

        sharded = tiny_model(name)
        sharded.lm_head.weight = torch.nn.Parameter(sharded.lm_head.weight.detach().clone())
        for layer in sharded.model.layers:
            fully_shard(layer)
        fully_shard(sharded)
        first = collect_importance(sharded, mine[:1], **options)  # interrupted: each rank keeps its own
        scores = collect_importance(
            sharded, mine[1:], resume_from=first, data_parallel_group=dist.group.WORLD, **options
        )
        assert_scores(scores, whole)
        with pytest.raises(ValueError, match="already of all ranks"):
            scores.all_reduce_()
        with pytest.raises(ValueError, match="resume_from must be of this rank alone"):
            collect_importance(
                sharded, mine, resume_from=scores, data_parallel_group=dist.group.WORLD, **options
            )


def collector_with_context_parallel_pieces(rank, world):
    """The model sees the pieces apart here; the oracle puts the activations together again."""
    for name in ("llama", "qwen3_moe"):
        model = tiny_model(name)
        ids = torch.randint(3, 96, (2, 6 * world), generator=torch.Generator().manual_seed(5))
        pieces = list(ids.split(6, dim=1))
        group = dist.new_group(list(range(world)))
        given = dict(context_parallel_group=group, progress=False)
        scores = collect_importance(model, [pieces[rank]], **given)
        wanted = oracle.tables(model, pieces, pieces_of_one=True)
        oracle.assert_tables(scores.tables(), wanted, 2 * 64 * 2.0**-24)
        assert scores.tokens == ids.numel()
        # packed pieces: the model is the caller's affair, the borders are this rank's
        borders = {"input_ids": pieces[rank], "cu_seq_lens_q": torch.tensor([0, 6, 12])}
        assert_scores(collect_importance(model, [borders], **given), scores)
        numbered = {"input_ids": pieces[rank], "attention_mask": torch.tensor([[1] * 3 + [2] * 3] * 2)}
        with pytest.raises(
            ValueError, match=r"batches\[0\]: context-parallel pieces .* cu_seq_lens_q, got seq"
        ):
            collect_importance(model, [numbered], **given)


CASES = (
    data_parallel_states,
    tensor_and_expert_parallel_states,
    context_parallel_states,
    collector_with_data_parallel_models,
    collector_with_context_parallel_pieces,
)


def run(rank, world, file, cases=CASES):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    try:
        for case in cases:
            torch.manual_seed(0)
            case(rank, world)
            dist.barrier()
    finally:
        dist.destroy_process_group()


def run_on_one_thread(rank, *args):
    torch.set_num_threads(1)
    run(rank, *args)


def test_one_rank(tmp_path):
    run(0, 1, tmp_path / "store", (collector_with_data_parallel_models,))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_find_what_one_process_finds(world, tmp_path):
    torch.multiprocessing.spawn(run_on_one_thread, args=(world, tmp_path / "store"), nprocs=world)
