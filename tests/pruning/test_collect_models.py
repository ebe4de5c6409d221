"""collect_importance() on models as they come: wrapped, compiled, offloaded, adapted, damaged."""

import copy

import pytest
import torch
from torch import nn

from minitron_kernels.pruning import collect_importance
from minitron_kernels.pruning.families.wrappers import parameters_without_data, plain_name, unwrapped
from pruning.collected import assert_same_bits, states
from pruning.tiny_models import FAMILIES, tiny_model


def ids(*shape, seed=0):
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(seed))


BATCH = ids(2, 9)


def collect(model, batches=(BATCH,), **options):
    return collect_importance(model, batches, progress=False, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_decoder_without_a_head_scores_the_same(name):
    model = tiny_model(name)
    assert_same_bits(collect(model.base_model), collect(model))


GRAPHS = []  # one entry for each that was compiled


def counting(graph, _inputs):
    GRAPHS.append(graph)
    return graph.forward


def compiled(module):
    return torch.compile(module, backend=counting)


def in_place(module):
    module.compile(backend=counting)
    return module


def test_compiled_parts_do_not_hide_the_hooks():
    """Each part is compiled, and has run, before the model is scored: its graph knows no hooks."""
    wanted = collect(tiny_model("llama"))
    model = tiny_model("llama")
    layers = model.model.layers
    layers[0], layers[1] = compiled(layers[0]), in_place(layers[1])
    layers[2].self_attn = compiled(layers[2].self_attn)
    with torch.no_grad():
        model(BATCH)
    graphs = len(GRAPHS)
    assert_same_bits(collect(model), wanted)
    assert len(GRAPHS) == graphs > 0  # nor are hooks compiled into new ones
    whole = tiny_model("llama")
    whole.model = compiled(whole.model)
    whole = compiled(in_place(whole))
    with torch.no_grad():
        whole(BATCH)
    assert_same_bits(collect(whole), wanted)
    assert unwrapped(whole) is whole._orig_mod
    names = {plain_name(key) for key, _ in whole.named_parameters()}
    assert names == {key for key, _ in tiny_model("llama").named_parameters()}


def test_wrappers_of_torch_come_off_in_any_order():
    model = tiny_model("llama")
    wrapped = nn.DataParallel(compiled(nn.DataParallel(model)))
    assert unwrapped(wrapped) is model and unwrapped(model) is model
    assert_same_bits(collect(wrapped), collect(model))


@pytest.mark.parametrize("given", [3, None, nn.Linear(2, 2), compiled(nn.Linear(2, 2))])
def test_what_is_not_a_model_is_named(given):
    with pytest.raises(
        TypeError, match=rf"must be a Hugging Face model with a config, got {type(given).__name__}"
    ):
        unwrapped(given)


class PeftModel(nn.Module):
    """As PEFT's, by the name of its class."""

    def __init__(self, model):
        super().__init__()
        self.base_model, self.config = model, model.config


class BaseTunerLayer:
    pass


class Lora(nn.Module, BaseTunerLayer):
    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer


class FullyShardedDataParallel(nn.Module):
    """As FSDP1's wrapper, by the name of its class."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module


def test_adapters_are_to_be_merged_first():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"without adapters, but it is a PeftModel.*merge_and_unload\(\)"):
        collect(PeftModel(model))
    with pytest.raises(ValueError, match=r"without adapters, but it is"):
        collect(compiled(PeftModel(model)))
    model.model.layers[1].mlp.up_proj = Lora(model.model.layers[1].mlp.up_proj)
    with pytest.raises(ValueError, match=r"module 'model\.layers\.1\.mlp\.up_proj' is a Lora of PEFT"):
        collect(model)


def test_adapters_of_peft_itself():
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    wanted = collect(model)
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["down_proj"]))
    for given in (adapted, adapted.base_model, adapted.base_model.model):
        with pytest.raises(ValueError, match="merge_and_unload"):
            collect(given)
    assert_same_bits(collect(adapted.merge_and_unload()), wanted)  # an adapter that was not trained adds 0


def test_flattened_parameters_are_refused():
    model = tiny_model("llama")
    model.model.layers[0] = FullyShardedDataParallel(model.model.layers[0])
    with pytest.raises(ValueError, match=r"'model\.layers\.0' is, .*fully_shard\(\)"):
        collect(model)


def test_parameters_without_data_are_refused():
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.to("meta")
    assert parameters_without_data(model) == [
        f"model.layers.1.mlp.up_proj.{part}" for part in ("weight", "bias")
    ]
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is on the meta device.*device_map"
    ):
        collect(model)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_offloaded_parameters_are_fetched(name, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    tiny_model(name).save_pretrained(tmp_path / "model")
    wanted = collect(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    packed = {"input_ids": BATCH, "attention_mask": torch.tensor([[1] * 4 + [2] * 5, [1] * 9])}
    maps = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu", "model.norm": "disk"}
    maps |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    for i, device_map in enumerate((maps, {"": "disk"})):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=tmp_path / str(i)
        )
        offloaded = parameters_without_data(model)
        assert offloaded
        assert_same_bits(collect(model), wanted)
        assert parameters_without_data(model) == offloaded  # and let go again
    assert collect(model, [packed]).tokens == BATCH.numel()


def test_a_layer_that_does_not_run_once_is_an_error():
    model = tiny_model("llama")
    layers = model.model.layers
    shared = copy.deepcopy(model)
    shared.model.layers[2] = shared.model.layers[0]
    with pytest.raises(
        ValueError, match=r"each layer once.*hidden at .*layers\.0\.input_layernorm was seen [24] times"
    ):
        collect(shared)
    with pytest.raises(ValueError, match=r"each layer once.*mlp at 0 was seen 2 times"):
        collect(shared, axes="mlp")
    layers[1].mlp.forward = lambda x: x
    with pytest.raises(ValueError, match=r"mlp at 1 was seen 0 times"):
        collect(model)
    sparse = tiny_model("mixtral")
    sparse.model.layers[1].mlp.forward = lambda x: x
    for axis in ("experts", "expert_mlp"):
        with pytest.raises(ValueError, match=rf"{axis} at 1 was seen 0 times"):
            collect(sparse, axes=axis)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("last", [False, True])
def test_damaged_activations_are_found_with_batch_and_layer(value, last):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[90] = value
    clean, damaged = ids(2, 9) % 80 + 3, torch.tensor([[5, 90, 7]])
    batches = [clean, clean, damaged] if last else [clean, damaged, clean]
    at = 2 if last else 1
    with pytest.raises(
        ValueError, match=rf"^batches\[{at}\]: .*hidden at model\.layers\.0\.input.*layers at 0"
    ):
        collect(model, batches)
    with pytest.raises(
        ValueError, match=rf"^batches\[{at}\]: activations are NaN or infinite, first in mlp at 0"
    ):
        collect(model, batches, axes="mlp")


def test_damage_in_a_later_layer_and_in_what_is_resumed():
    model, sparse = tiny_model("llama"), tiny_model("qwen3_moe")
    first = collect(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
        sparse.model.layers[2].mlp.experts.down_proj[:, 0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=r"batches\[0\].* first in hidden at .*layers\.2\.input.* mlp at 1, heads at 2"
    ):
        collect(model)
    with pytest.raises(ValueError, match=r"first in experts at 2:"):
        collect(sparse, axes=("experts", "expert_mlp"))
    before = states(first)
    first.axes["mlp"].state.sums[0, 100] = float("nan")
    with pytest.raises(ValueError, match=r"^resume_from: .* first in mlp at 1"):
        collect(tiny_model("llama"), resume_from=first)
    first.axes["mlp"].state.sums.copy_(before["mlp.sums"])
    assert_same_bits(
        collect(tiny_model("llama"), resume_from=first), collect(tiny_model("llama"), [BATCH, BATCH])
    )
