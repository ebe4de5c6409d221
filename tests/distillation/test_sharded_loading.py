"""Models that are read by shards: as from_pretrained() reads them, no byte more, or a sentence why not."""

import json
import math

import pytest
import torch

pytest.importorskip("accelerate", reason="Trainer needs accelerate")

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import MixtralConfig

from distillation.cli_runs import run, save_models, train_of
from minitron_kernels._command.models import load_model
from minitron_kernels.distillation import DistillationLoss, HiddenStatesLoss
from minitron_kernels.distillation.trainers import hf_names
from minitron_kernels.distillation.trainers.hf_fsdp import parameters_of
from minitron_kernels.distillation.trainers.hf_loading import NotByShardsError, empty_model
from pruning.family_configs import CASES
from pruning.tiny_models import random_model, tiny_model

RANKS = 3  # which divides few numbers of rows
CPU = torch.device("cpu")
# tied and with buffers that are not saved; experts that are joined; parameters of one row; saved buffers;
# Conv1D and a buffer a layer; state spaces; a text model inside of another
FAMILIES = ("gemma3_text", "mixtral", "qwen2_moe", "deepseek_v3", "gpt2", "gpt_neox", "falcon_h1", "gemma3")


@pytest.fixture
def as_rank():
    """as_rank(rank): this process is one of three, who never speak."""

    def become(rank):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)

    yield become
    if dist.is_initialized():
        dist.destroy_process_group()


def sharded(model):
    """As FSDP2 makes it of a model, all of it one group."""
    return fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))


def rows_of(rank, whole):
    each = math.ceil(len(whole) / RANKS)
    return whole[each * rank : each * (rank + 1)]


def check_shards(folder, as_rank, dtype="float32"):
    """Parameters, ties and buffers are those of from_pretrained(), to the bit; what each rank read."""
    whole = load_model(folder, dtype, with_head=True)
    wanted = dict(whole.named_parameters(remove_duplicate=False))
    read = []
    for rank in range(RANKS):
        as_rank(rank)
        model, weights = empty_model(folder, dtype, otherwise="used")
        assert type(model) is type(whole) and not model.training
        assert model.generation_config.to_dict() == whole.generation_config.to_dict()
        weights.fill(sharded(model), CPU)
        read.append(weights.bytes_read)
        found = dict(model.named_parameters(remove_duplicate=False))
        assert found.keys() == wanted.keys()
        for name, x in found.items():
            assert x.requires_grad == wanted[name].requires_grad
            assert x.dtype == wanted[name].dtype and x.shape == wanted[name].shape, name
            assert torch.equal(x.to_local(), rows_of(rank, wanted[name].detach())), name
        ties = [[names.index(name) for name in names] for names in (tie_groups(found), tie_groups(wanted))]
        assert ties[0] == ties[1]
        buffers = dict(whole.named_buffers())
        assert dict(model.named_buffers()).keys() == buffers.keys()
        for name, x in model.named_buffers():
            assert x.dtype == buffers[name].dtype and torch.equal(x, buffers[name]), name
    return read


def tie_groups(parameters):
    """For each name, in order, the first that names the same parameter."""
    first = {}
    return [first.setdefault(id(x), name) for name, x in parameters.items()]


# GPT-J's buffer has other values in another dtype
@pytest.mark.parametrize(("name", "dtype"), [*((name, "float32") for name in FAMILIES), ("gptj", "bfloat16")])
def test_shards_are_those_of_from_pretrained(name, dtype, as_rank, tmp_path):
    case = CASES[name]
    random_model(case.make_config(), auto=case.auto).save_pretrained(tmp_path)
    check_shards(tmp_path, as_rank, dtype)


@pytest.mark.parametrize(("stored", "asked"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_each_process_reads_its_rows_and_no_others(stored, asked, as_rank, tmp_path):
    """Of two files; the dtype is the one that is asked for."""
    model = tiny_model("llama", dtype=getattr(torch, stored))
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    read = check_shards(tmp_path, as_rank, asked)
    for rank, nbytes in enumerate(read):
        assert nbytes == sum(rows_of(rank, x).nbytes for x in model.parameters())
    assert empty_model(tmp_path, asked, otherwise="used")[1].bytes_of_share(RANKS) == (read[0], sum(read))


def test_values_are_rounded_to_the_dtype_asked_for(as_rank, tmp_path):
    """Though the trainer holds parameters in float32, as it does under bf16."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    as_rank(1)
    empty, weights = empty_model(tmp_path, "bfloat16", otherwise="used")
    weights.fill(sharded(empty.float()), CPU)
    for name, x in empty.named_parameters():
        wanted = rows_of(1, model.get_parameter(name).detach()).bfloat16().float()
        assert x.dtype == torch.float32 and torch.equal(x.to_local(), wanted), name


def test_parameters_that_are_not_sharded_are_refused(as_rank, tmp_path):
    """Beside sharded ones: no process would tell the others of their gradients."""
    tiny_model("llama").save_pretrained(tmp_path)
    as_rank(1)
    empty, weights = empty_model(tmp_path, "float32", otherwise="used")
    weights.fill(sharded(empty), CPU)
    own = list(empty.parameters())
    assert parameters_of(torch.optim.SGD(own)) == [own]
    with pytest.raises(ValueError, match=rf"1 of the student's {len(own) + 1} trained parameters are not"):
        parameters_of(torch.optim.SGD([*own, torch.nn.Parameter(torch.zeros(2))]))
    assert parameters_of(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))])) is None


def test_names_are_mapped_as_from_pretrained_maps_them(as_rank, tmp_path):
    """Of a wrapper, and experts one by one of an older release: expert 10 comes after expert 9."""
    config = MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, num_local_experts=11, vocab_size=40,
    )  # fmt: skip
    random_model(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.10.w1.weight" in tensors
    save_file(
        {f"module.{name}": x for name, x in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    read = check_shards(tmp_path, as_rank)
    assert sum(read) == sum(x.nbytes for x in tensors.values())


def changed(folder, change):
    """A checkpoint of a tiny Llama; `change` alters its tensors in place."""
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return folder


def test_what_the_files_lack_is_an_error(as_rank, tmp_path):
    def lacks(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]

    def differs(tensors):
        tensors["model.norm.weight"] = torch.zeros(6)

    for name, change in (("up_proj", lacks), ("model.norm", differs)):
        with pytest.raises(ValueError, match=rf"does not hold \S*{name}.weight as config.json says.*trained"):
            empty_model(changed(tmp_path, change), "float32", otherwise="trained")


def test_what_is_not_filled_is_an_error(as_rank, tmp_path):
    """Though the names were mapped: never memory as it was found."""
    changed(tmp_path, dict.keys)
    as_rank(1)
    model, weights = empty_model(tmp_path, "float32", otherwise="used")
    name = "model.layers.1.mlp.up_proj.weight"
    weights.sources[name].clear()
    with pytest.raises(ValueError, match=rf"{name}: .* fills 0 of [\d,]+ numbers of it"):
        weights.fill(sharded(model), CPU)
    model, weights = empty_model(tmp_path, "float32", otherwise="used")
    with pytest.raises(ValueError, match="is not sharded by its rows"):
        weights.fill(model, CPU)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="its weights have changed since they were looked at"):
        weights.fill(sharded(model), CPU)


def test_a_map_keeps_its_values_in_a_student_without_memory(tmp_path):
    model, _ = empty_model(changed(tmp_path, dict.keys), "float32", otherwise="used")
    loss = DistillationLoss(hidden_states=HiddenStatesLoss({0: 0}, student_width=48, teacher_width=64))
    before = loss.hidden_states.map.weight.detach().clone()
    loss.attach_map(model)
    assert torch.equal(loss.hidden_states.map.weight, before)


def test_what_nothing_takes_is_named(tmp_path):
    def more(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)  # of older releases
        tensors["value_head.weight"] = torch.zeros(3)

    with pytest.warns(UserWarning, match=r"nothing takes its value_head.weight$"):
        empty_model(changed(tmp_path, more), "float32", otherwise="used")


def ties_nothing(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


def small_integers(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)


@pytest.mark.parametrize(
    ("change", "entries", "why"),
    [
        (ties_nothing, {}, "it has model.embed_tokens.weight and lm_head.weight, which the model ties"),
        (small_integers, {}, "its model.norm.weight is in int8"),
        (dict.keys, {"quantization_config": {"quant_method": "fp8"}}, "it is quantised"),
        (dict.keys, {"dtype": None}, "its config.json has no dtype"),
    ],
)
def test_what_is_left_to_from_pretrained(change, entries, why, tmp_path):
    changed(tmp_path, change)
    config = json.loads((tmp_path / "config.json").read_text()) | entries
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotByShardsError, match=why):
        empty_model(tmp_path, "auto", otherwise="used")


def test_pickled_weights_and_unknown_names_are_left_to_from_pretrained(tmp_path, monkeypatch):
    changed(tmp_path, dict.keys)

    def unknown(*arguments):
        raise TypeError("another signature")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.core_model_loading.rename_source_key", unknown)
        with pytest.raises(
            NotByShardsError, match=r"names weights in a way that is not known here \(another"
        ):
            empty_model(tmp_path, "float32", otherwise="used")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(NotByShardsError, match=r"^it has neither .* only pytorch_model.bin\. Pickled"):
        empty_model(tmp_path, "float32", otherwise="used")


def test_transforms_of_rows_are_left_to_from_pretrained():
    """A part of what they give is not what they give of a part."""
    loading = pytest.importorskip("transformers.core_model_loading")
    joins = loading.MergeModulelist, loading.Concatenate

    def converter(sources, target, *operations):
        return loading.WeightConverter(sources, target, operations=list(operations))

    for fits, one in (
        (True, converter("experts.*.w2.weight", "experts.down_proj", joins[0](dim=0))),
        (True, converter(["e.*.a.weight", "e.*.b.weight"], "e.ab", joins[0](dim=0), joins[1](dim=1))),
        (False, converter(["e.*.a.weight", "e.*.b.weight"], "e.ab", joins[0](dim=0), joins[1](dim=0))),
        (False, converter(["q.weight", "k.weight"], "qk.weight", joins[1](dim=0))),
        (False, converter("qk.weight", ["q.weight", "k.weight"], loading.Chunk(dim=0))),
        (False, converter("a.weight", "b.weight", loading.Transpose(0, 1))),
    ):
        assert hf_names._joins_experts(one, *joins) == fits, one


def test_the_dry_run_says_what_each_process_reads(tmp_path, monkeypatch, capsys):
    save_models(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "teacher" / "model.safetensors").rename(tmp_path / "teacher" / "pytorch_model.bin")
    assert run(*train_of(tmp_path, tmp_path / "out", "--fsdp", "--steps", 2, "--dry-run")) == 0
    said = capsys.readouterr().out
    assert "  loading   student: each process reads 55.44 KiB of 110.9 KiB\n" in said
    assert "  loading   teacher: each process reads all of it into its memory, since it has neither" in said
