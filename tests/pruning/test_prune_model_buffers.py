"""prune_model of models with learned buffers, constant axes and scalars."""

import dataclasses
import re

import pytest
import torch

from minitron_kernels.pruning import prune_model
from minitron_kernels.pruning.cut.skeleton import expected_shapes
from minitron_kernels.pruning.families import registry
from minitron_kernels.pruning.families.family import Family, Param, Taps
from minitron_kernels.pruning.families.parts import attention, norms
from minitron_kernels.pruning.families.registry import family_of, register_family
from pruning.pruned_models import assert_unchanged, logits, plan_for, state_of
from pruning.tiny_models import tiny_model


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
            Param("conv.weight", "one, hidden, one"),
            "axes 'one, hidden, one': they must be at most two, or three",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            register_family(dataclasses.replace(llama, layer=(*llama.layer, param)))


class Counting(torch.nn.Linear):
    """A linear layer that keeps something beside its tensors."""

    extra = None

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


@pytest.mark.parametrize("extra", [{"calls": 3}, b"\x00", torch.ones(2)])
@pytest.mark.parametrize("in_place", [False, True])
def test_extra_states_are_refused(extra, in_place):
    """What lies beside the tensors cannot be cut; an empty one is not lost."""
    model = tiny_model("llama")
    layer = model.model.layers[1].mlp.down_proj
    layer.__class__ = Counting
    plan, expected = plan_for(model.config), logits(prune_model(model, plan_for(model.config)))
    layer.extra = extra
    before = logits(model)
    said = r"a Counting 'model\.layers\.1\.mlp\.down_proj' with an extra state \("
    with pytest.raises(ValueError, match=said):
        prune_model(model, plan, in_place=in_place)
    assert torch.equal(logits(model), before)
    layer.extra = torch.empty(0)
    assert torch.equal(logits(prune_model(model, plan)), expected)


def test_a_class_with_extra_states_of_its_own(monkeypatch):
    """One whose every model has them, in the state_dict() of the smaller one as well."""
    model = tiny_model("llama")
    plan, expected = plan_for(model.config), logits(prune_model(model, plan_for(model.config)))
    kind = type(model.model.norm)
    monkeypatch.setattr(kind, "get_extra_state", lambda self: None, raising=False)
    monkeypatch.setattr(kind, "set_extra_state", lambda self, state: None, raising=False)
    assert model.state_dict()["model.norm._extra_state"] is None
    assert torch.equal(logits(prune_model(model, plan)), expected)
    monkeypatch.setattr(kind, "get_extra_state", lambda self: {"calls": 3})
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.input_layernorm' with an extra state \(dict"):
        prune_model(model, plan)
