"""prune_model of models that are not plain, tied by hand or offloaded: nothing is lost without an error."""

import copy
import dataclasses
import re
import warnings

import pytest
import torch

from minitron_kernels.pruning import make_plan, prune_model
from minitron_kernels.pruning.cut.skeleton import expected_shapes
from minitron_kernels.pruning.families import registry
from minitron_kernels.pruning.families.configs import completed
from minitron_kernels.pruning.families.family import Family, Param, Taps
from minitron_kernels.pruning.families.names import family_names
from minitron_kernels.pruning.families.parts import attention, norms
from minitron_kernels.pruning.families.registry import family_of, register_family
from pruning.score_tables import random_tables
from pruning.tiny_models import tiny_config, tiny_model

IDS = torch.arange(24).view(2, 12) * 7 % 96


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def plan_for(config, **target):
    return make_plan(random_tables(config), config, divisor=16, **(target or {"hidden_size": 32}))


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


# ---- the head


def untied(name="gemma2"):
    """A model whose config says that the head is tied, though it has one of its own."""
    model = tiny_model(name, tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model


@pytest.mark.parametrize("in_place", [False, True])
def test_a_head_of_its_own_is_kept_though_the_config_says_tied(in_place, tmp_path):
    from transformers import AutoModelForCausalLM

    model = untied()
    expected = logits(model)
    same = prune_model(copy.deepcopy(model), make_plan({}, model.config), in_place=in_place)
    assert torch.equal(logits(same), expected)
    plan = plan_for(model.config)
    smaller = prune_model(model, plan)
    head = model.lm_head.weight[:, list(plan.hidden)]
    assert torch.equal(smaller.lm_head.weight, head)
    assert smaller.config.tie_word_embeddings is False and model.config.tie_word_embeddings is True
    smaller.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight, head)


@pytest.mark.parametrize("shared", ["parameter", "memory"])
def test_a_head_that_is_the_embedding_stays_it_though_the_config_does_not_say_so(shared, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_model("llama")
    embedding = model.model.embed_tokens.weight
    model.lm_head.weight = embedding if shared == "parameter" else torch.nn.Parameter(embedding.data)
    smaller = prune_model(model, plan_for(model.config))
    assert smaller.lm_head.weight is smaller.model.embed_tokens.weight
    assert smaller.config.tie_word_embeddings is True
    smaller.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(smaller))


def test_a_head_that_only_looks_like_the_embedding_is_no_tied_one():
    model = tiny_model("llama")
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    smaller = prune_model(model, plan_for(model.config))
    assert smaller.lm_head.weight is not smaller.model.embed_tokens.weight
    assert smaller.config.tie_word_embeddings is False


def test_residual_scales_follow_the_head_that_is_there(monkeypatch):
    """Where no norm writes, a tied embedding is scaled with the final norm, a separate one alone."""
    llama = family_of({"model_type": "llama"})
    monkeypatch.setitem(registry._FAMILIES, "llama", dataclasses.replace(llama, scales_embedding=True))
    model = untied("llama")
    plan = plan_for(model.config, rescale_norms=False, hidden_size=32)
    smaller = prune_model(model, plan)
    assert torch.equal(smaller.model.norm.weight, model.model.norm.weight[list(plan.hidden)])
    assert torch.equal(smaller.lm_head.weight, model.lm_head.weight[:, list(plan.hidden)])


def test_a_plan_may_say_what_the_config_or_what_the_tensors_say():
    model = untied("llama")
    for tied in (True, False):
        plan = plan_for(tiny_config("llama", tie_word_embeddings=tied))
        smaller = prune_model(model, plan)
        assert smaller.config.tie_word_embeddings is False
        assert torch.equal(smaller.lm_head.weight, model.lm_head.weight[:, list(plan.hidden)])


# ---- the result and its config


@pytest.mark.parametrize("name", ["gemma2", "qwen3_moe"])
def test_the_smaller_model_shares_no_memory(name):
    """Nor its config: what is done to one does not reach the other."""
    model = tiny_model(name, tie_word_embeddings=True)

    def memory(of):
        return {tensor.data_ptr() for tensor in (*of.parameters(), *of.buffers()) if tensor.numel()}

    for plan in (plan_for(model.config), plan_for(model.config, drop_layers=[1])):
        smaller = prune_model(model, plan)
        assert not memory(model) & memory(smaller)
        smaller.generation_config.max_length = 7
        assert model.generation_config.max_length != 7
        if name == "gemma2":
            smaller.config.layer_types[0] = "changed"
            assert "changed" not in (*model.config.layer_types, *plan.target_config["layer_types"])


@pytest.mark.parametrize("name", ["llama", "mistral", "nemotron", "mixtral", "qwen2", "phi3"])
def test_null_is_not_a_value(name):
    """Of a config with null for head_dim the smaller one says what the shapes are."""
    written = tiny_config(name).to_dict() | {"head_dim": None}
    plan = plan_for(written, hidden_size=32)
    assert plan.target_config["head_dim"] == 48 // 4
    query = "qkv_proj" if name == "phi3" else "q_proj"
    rows = 48 * (2 if name == "phi3" else 1)
    shapes = expected_shapes(plan.target_config)
    assert shapes[f"model.layers.0.self_attn.{query}.weight"] == (rows, 32)
    if name in ("qwen2", "phi3"):  # of which transformers does not load such a config
        with pytest.raises(ValueError, match=r"transformers cannot make a .*ForCausalLM of its config"):
            expected_shapes(written)
        return
    model = tiny_model(name, head_dim=None)
    smaller = prune_model(model, plan)
    assert smaller.config.head_dim == 12
    assert logits(smaller).isfinite().all()
    assert torch.equal(logits(prune_model(model, make_plan({}, written))), logits(model))


def test_null_and_absent_are_what_transformers_makes_of_them():
    """Each key in its own way: by the class's default, or from other keys."""

    def sizes(name, **changes):
        config = tiny_config(name).to_dict()
        for key, value in changes.items():
            config[key] = value
        config = {key: value for key, value in config.items() if value != "absent"}
        return family_of(config).sizes(config)

    assert sizes("qwen2", num_key_value_heads="absent", num_attention_heads=32)["kv_heads"] == 32
    assert sizes("qwen2", num_key_value_heads=None)["kv_heads"] == 4
    assert sizes("mistral", num_key_value_heads="absent")["kv_heads"] == 8
    assert sizes("nemotron", num_key_value_heads=None)["kv_heads"] == 4
    assert sizes("qwen3", head_dim="absent")["head_dim"] == 128
    assert sizes("qwen3", head_dim=None)["head_dim"] == 128  # transformers refuses such a null
    assert sizes("gemma3_text", head_dim="absent", num_key_value_heads="absent")["head_dim"] == 256
    assert sizes("gemma3_text", num_attention_heads="absent")["heads"] == 8
    assert sizes("qwen3_moe", num_experts="absent", num_local_experts="absent")["experts"] == 128
    gemma, llama = ({"model_type": name} for name in ("gemma3_text", "llama"))
    assert family_of(gemma).tied(gemma) and not family_of(llama).tied(llama)
    # what is written counts before the default of another key; what is false is a value
    swapped = dataclasses.replace(
        family_of(llama), size_keys={"mlp": ("max_position_embeddings", "intermediate_size")}
    )
    assert swapped.sizes({**tiny_config("llama").to_dict(), "max_position_embeddings": None})["mlp"] == 80
    refused = {**tiny_config("gemma2").to_dict(), "head_dim": None, "tie_word_embeddings": False}
    assert completed(refused)["tie_word_embeddings"] is False and completed(refused)["head_dim"] == 256
    # under its other name
    config = {k: v for k, v in tiny_config("qwen3_moe").to_dict().items() if k != "num_experts"}
    assert family_of(config).sizes(config | {"num_local_experts": 4})["experts"] == 4


def test_a_family_that_transformers_makes_otherwise_is_refused(monkeypatch):
    """Cuts that the pruned config does not ask for are refused before anything is cut."""
    llama = family_of({"model_type": "llama"})
    model = tiny_model("llama")
    plan, before = plan_for(model.config), state_of(model)
    wrong = [
        dataclasses.replace(one, axes="hidden, vocab") if one.name == "model.embed_tokens.weight" else one
        for one in llama.outer
    ]
    for changed, message in (
        (dict(size_keys={"head_dim": ("head_width",), "head_width": ("head_width",)}), None),
        (dict(outer=llama.outer[1:]), "'model.embed_tokens.weight', which the plan's family does not know"),
        (dict(outer=tuple(wrong)), "model.embed_tokens.weight must have the shape (48, 96), got (96, 48)"),
    ):
        if message is None:
            continue
        monkeypatch.setitem(registry._FAMILIES, "llama", dataclasses.replace(llama, **changed))
        with pytest.raises(ValueError, match=re.escape(message)):
            prune_model(model, plan, in_place=True)
    assert_unchanged(model, before)


def test_shapes_that_are_expected_are_checked_against_transformers(monkeypatch):
    config = tiny_config("llama").to_dict()
    shapes = expected_shapes(config)
    assert shapes["lm_head.weight"] == (96, 48)
    assert "lm_head.weight" not in expected_shapes(config, headless=True)
    assert "lm_head.weight" not in expected_shapes({**config, "tie_word_embeddings": True})
    stored = expected_shapes(tiny_config("mixtral").to_dict(), stored=True)
    assert stored["model.layers.0.block_sparse_moe.experts.3.w1.weight"] == (80, 48)
    llama = family_of(config)
    for layer, message in (
        (
            llama.layer[1:],
            "model.layers.0.self_attn.q_proj.weight, which transformers makes from this llama config",
        ),
        ((*llama.layer, Param("extra", "one")), "model.layers.0.extra is not in the model"),
        (
            (Param("self_attn.q_proj.weight", "mlp, hidden"), *llama.layer[1:]),
            "q_proj.weight would be [80, 48], but transformers makes it [64, 48] from this llama config",
        ),
    ):
        monkeypatch.setitem(registry._FAMILIES, "llama", dataclasses.replace(llama, layer=layer))
        with pytest.raises(ValueError, match=re.escape(message)):
            expected_shapes(config)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"transformers refuses the config of this llama: .*hidden size"):
        expected_shapes({**config, "hidden_size": 50})
    # a model type that transformers does not know goes by its table alone
    register_family(dataclasses.replace(llama, model_types=("llama_elsewhere",)))
    assert expected_shapes({**config, "model_type": "llama_elsewhere"}) == shapes


def test_a_config_object_that_says_otherwise_than_its_model():
    model = tiny_model("llama")
    plan = plan_for(model.config)
    model.config.mlp_bias = False  # the parameters are there
    with pytest.raises(ValueError, match=r"gate_proj.bias is not in .* the pruned config"):
        prune_model(model, plan)


# ---- decoders alone, wrappers


def test_a_decoder_alone():
    whole = tiny_model("gemma2")
    plan = plan_for(whole.config, hidden_size=32, drop_layers=[1])
    expected = prune_model(whole, plan)
    alone = prune_model(whole.model, plan)
    assert type(alone) is type(whole.model) and alone.config.tie_word_embeddings
    assert_unchanged(alone, state_of(expected.model))
    with torch.no_grad():
        assert torch.equal(alone(IDS).last_hidden_state, expected.model(IDS).last_hidden_state)


def test_wrapped_models_are_unwrapped():
    model = tiny_model("llama")
    plan = plan_for(model.config)
    expected = state_of(prune_model(model, plan))
    wrapped = torch.compile(model)
    smaller = prune_model(wrapped, plan)
    assert type(smaller) is type(model)
    assert_unchanged(smaller, expected)
    with pytest.raises(ValueError, match="in_place cannot change a model inside a OptimizedModule"):
        prune_model(wrapped, plan, in_place=True)
    assert_unchanged(prune_model(torch.nn.DataParallel(model), plan), expected)
    for layer in range(3):  # compiled layer by layer
        model.model.layers[layer] = torch.compile(model.model.layers[layer])
    assert any("_orig_mod" in name for name, _ in model.named_parameters())
    assert_unchanged(prune_model(model, plan), expected)


def test_adapters_are_to_be_merged_first():
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    plan = plan_for(model.config)
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    with pytest.raises(ValueError, match=r"without adapters, but it is a PeftModel.*merge_and_unload"):
        prune_model(adapted, plan)
    injected = peft.inject_adapter_in_model(config, copy.deepcopy(model))
    with pytest.raises(ValueError, match="without adapters, but its module"):
        prune_model(injected, plan)
    by_hand = copy.deepcopy(model)
    by_hand.model.layers[1].mlp.up_proj.lora_a = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match=r"lora_a.weight', which .* not know: merge the adapters first"):
        prune_model(by_hand, plan)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    merged = adapted.merge_and_unload()
    up = merged.model.layers[0].mlp.up_proj.weight
    assert torch.equal(prune_model(merged, plan).model.layers[0].mlp.up_proj.weight, up[:, list(plan.hidden)])


# ---- what is not in memory


def test_offloaded_parameters_are_refused(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("llama")
    plan = plan_for(model.config)
    before = state_of(model)
    accelerate.disk_offload(model, str(tmp_path))
    for in_place in (False, True):
        with pytest.raises(ValueError, match=r"embed_tokens.weight is offloaded.*prune_checkpoint"):
            prune_model(model, plan, in_place=in_place)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert_unchanged(model, before)


def test_sharded_parameters_are_refused(tmp_path):
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tiny_model("llama")
        plan = plan_for(model.config)
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        fully_shard(model, mesh=mesh)
        with pytest.raises(ValueError, match=r"embed_tokens.weight is a DTensor.*prune_checkpoint"):
            prune_model(model, plan, in_place=True)
        assert model.model.embed_tokens.weight.full_tensor().shape == (96, 48)
    finally:
        torch.distributed.destroy_process_group()


def test_quantised_parameters_are_refused():
    model = tiny_model("llama")
    plan = plan_for(model.config)
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.char(), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj.weight is quantised, to torch.int8"):
        prune_model(model, plan)


@pytest.mark.parametrize("at", [0, 5, 30])
def test_in_place_nothing_is_lost_where_a_cut_fails(at, monkeypatch):
    from minitron_kernels.pruning.cut.cuts import Cut

    model = tiny_model("llama")
    plan, before, config = plan_for(model.config), state_of(model), model.config.to_dict()
    apply, calls = Cut.apply, iter(range(1000))

    def failing(self, tensor, out=None):
        if next(calls) == at:
            raise torch.OutOfMemoryError("no memory")
        return apply(self, tensor, out)

    monkeypatch.setattr(Cut, "apply", failing)
    with pytest.raises(torch.OutOfMemoryError):
        prune_model(model, plan, in_place=True)
    assert_unchanged(model, before)
    assert model.config.to_dict() == config
    monkeypatch.undo()
    expected = prune_model(copy.deepcopy(model), plan)
    assert_unchanged(prune_model(model, plan, in_place=True), state_of(expected))


# ---- learned buffers, constant axes


def minimax(*more):
    """MiniMax-M2, whose router has a learned correction in a buffer; without it in the table."""
    experts = (
        Param("mlp.gate.weight", "experts, hidden"),
        Param("mlp.experts.gate_up_proj", "experts, expert_mlp+expert_mlp, hidden"),
        Param("mlp.experts.down_proj", "experts, hidden, expert_mlp"),
    )
    qk_norms = (Param("self_attn.q_norm.weight", "heads"), Param("self_attn.k_norm.weight", "kv_heads"))
    return Family(
        ("minimax_m2",),
        layer=(
            *attention(),
            *qk_norms,
            *norms("input_layernorm", "post_attention_layernorm"),
            *experts,
            *more,
        ),
        size_keys={"mlp": (), "expert_mlp": ("intermediate_size",), "experts": ("num_local_experts",)},
        is_sparse=lambda config, layer: True,
    )


@pytest.fixture
def registered(monkeypatch):
    """Registers families for one test."""
    family_of({"model_type": "llama"})  # the tables are loaded
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    return register_family


def minimax_model():
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(hidden_size=48, intermediate_size=32, num_hidden_layers=3, vocab_size=96, head_dim=16)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    config = AutoConfig.for_model(
        "minimax_m2", **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for layer in model.model.layers:
        layer.mlp.e_score_correction_bias.copy_(torch.randn(4))
    return model


def test_a_learned_buffer_is_cut_where_it_is_declared(registered, tmp_path):
    model = minimax_model()
    registered(minimax(Param("mlp.e_score_correction_bias", "experts", buffer=True)))
    family = family_of(model.config)
    assert family.count_parameters(model.config) == sum(p.numel() for p in model.parameters())
    plan = plan_for(model.config, num_local_experts=3, drop_layers=[1], order="importance")
    smaller = prune_model(model, plan)
    for new, entry in enumerate(plan.layers):
        bias = model.model.layers[entry.layer].mlp.e_score_correction_bias
        assert torch.equal(smaller.model.layers[new].mlp.e_score_correction_bias, bias[list(entry.experts)])
        assert "e_score_correction_bias" in smaller.model.layers[new].mlp._buffers
    assert plan.parameters_after == sum(p.numel() for p in smaller.parameters())
    budget = plan_for(model.config, params=80_000)
    assert budget.candidates[0].parameters == budget.parameters_after <= 80_000
    assert logits(smaller).isfinite().all()
    shapes = expected_shapes(smaller.config)
    assert shapes["model.layers.1.mlp.e_score_correction_bias"] == (3,)
    smaller.save_pretrained(tmp_path)
    again = type(smaller).from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(smaller))


def test_a_learned_buffer_that_is_not_declared_is_not_lost(registered):
    model = minimax_model()
    registered(minimax())
    before = state_of(model)
    fewer = plan_for(model.config, num_local_experts=3)
    message = (
        r"buffer 'model.layers.0.mlp.e_score_correction_bias' \[4\] is stored with the weights, and its "
        r"values would be lost where it becomes \[3\]: "
        r"register_family\(\) a Family with Param\(..., buffer=True\)"
    )
    with pytest.raises(ValueError, match=message):
        prune_model(model, fewer, in_place=True)
    assert_unchanged(model, before)
    # where its axis stays whole, it goes with its layer
    smaller = prune_model(model, plan_for(model.config, hidden_size=32, drop_layers=[0]))
    for new, old in enumerate((1, 2)):
        bias = model.model.layers[old].mlp.e_score_correction_bias
        assert torch.equal(smaller.model.layers[new].mlp.e_score_correction_bias, bias)


def test_constant_axes_and_scalars(registered):
    """Apertus: an activation with parameters of one element and learned scalars."""
    from transformers import AutoConfig, AutoModelForCausalLM

    activation = "mlp.act_fn"
    layer = (
        *attention(qk_norm=True),
        Param("mlp.up_proj.weight", "mlp, hidden"),
        Param("mlp.down_proj.weight", "hidden, mlp"),
        *norms("attention_layernorm", "feedforward_layernorm"),
        *(Param(f"{activation}.{name}", "one") for name in ("alpha_p", "alpha_n")),
        *(Param(f"{activation}.{name}", "", buffer=True) for name in ("beta", "eps")),
    )
    taps = Taps(
        scored_norms=("attention_layernorm", "feedforward_layernorm"),
        norms=("attention_layernorm", "feedforward_layernorm"),
    )
    registered(Family(("apertus",), layer=layer, taps=taps))
    sizes = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, vocab_size=96, head_dim=12)
    config = AutoConfig.for_model(
        "apertus", **sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for block in model.model.layers:
        block.mlp.act_fn.beta.add_(0.25)
        torch.nn.init.constant_(block.mlp.act_fn.alpha_p, 0.5)
    assert family_of(config).count_parameters(config) == sum(p.numel() for p in model.parameters())
    smaller = prune_model(model, plan_for(config, hidden_size=32, intermediate_size=48, drop_layers=[0]))
    was, became = (one.model.layers[-1].mlp.act_fn for one in (model, smaller))
    assert torch.equal(was.beta, became.beta) and torch.equal(was.alpha_p, became.alpha_p)
    assert (
        became.alpha_n.shape == (1,)
        and expected_shapes(smaller.config)["model.layers.0.mlp.act_fn.eps"] == ()
    )


def test_an_axis_of_no_known_size_is_refused():
    llama = family_of({"model_type": "llama"})
    for param, message in (
        (
            Param("mlp.extra.weight", "hiden"),
            "mlp.extra.weight with an axis 'hiden', which is none of head_dim,",
        ),
        (
            Param("conv.weight", "hidden, one, one"),
            "axes 'hidden, one, one': they must be at most two, or three",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            register_family(dataclasses.replace(llama, layer=(*llama.layer, param)))


# ---- names


@pytest.mark.parametrize("front", ["", "module.", "language_model.", "_orig_mod.", "module._orig_mod."])
def test_names_under_known_prefixes(front):
    llama = family_of({"model_type": "llama"})
    own = ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"]
    assert list(family_names([front + name for name in own], llama).values()) == own
    inside = ["model.language_model.embed_tokens.weight", "model.language_model.layers.1.mlp.up_proj.weight"]
    assert list(family_names([*(front + name for name in inside), "lm_head.weight"], llama).values()) == own
    bare = [name.removeprefix("model.") for name in own[:2]]
    assert list(family_names([front + name for name in bare], llama).values()) == own[:2]


def test_names_of_a_family_with_a_prefix_of_its_own():
    llama = family_of({"model_type": "llama"})
    own = dataclasses.replace(llama, layers="transformer.h", embedding="transformer.wte")
    names = ["transformer.wte.weight", "transformer.h.0.mlp.up_proj.weight", "lm_head.weight"]
    assert list(family_names(names, own).values()) == names
    assert list(family_names(["wte.weight", "h.0.mlp.up_proj.weight"], own).values()) == names[:2]
    # only what is called as the head is the head
    heads = ["model.embed_tokens.weight", "vision.lm_head.weight", "xlm_head.weight", "lm_head.weight"]
    assert list(family_names(heads, llama).values()) == heads


def test_names_that_are_not_known():
    llama = family_of({"model_type": "llama"})
    names = ["model.embed_tokens.weight", "model.layers.0.mlp._orig_mod.up_proj.weight", "vision.norm.weight"]
    assert list(family_names(names, llama).values()) == [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.weight",
        "vision.norm.weight",
    ]
    # without an embedding nothing is taken off
    assert family_names(["language_model.layers.0.x"], llama) == {
        "language_model.layers.0.x": "language_model.layers.0.x"
    }
    for wrong, message in (
        (
            ["encoder.embed_tokens.weight"],
            "under the prefix 'encoder.', which is not made of model, language_",
        ),
        (
            ["model.embed_tokens.weight", "embed_tokens.weight"],
            "several decoders, under the prefixes '', 'model.'",
        ),
        (
            ["model.embed_tokens.weight", "lm_head.weight", "module.lm_head.weight"],
            "lm_head.weight and module.lm_head.weight are both lm_head.weight",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            family_names(wrong, llama)


def test_a_frozen_model_says_so():
    model = tiny_model("llama")
    plan = plan_for(model.config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune_model(model, plan)
    model.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"every parameter of the model is frozen.*requires_grad_\(True\)"):
        smaller = prune_model(model, plan)
    assert not any(parameter.requires_grad for parameter in smaller.parameters())
