"""The families that the library knows; parameter names are those of transformers 5."""

from __future__ import annotations

from minitron_kernels.pruning.families.configs import Config, config_value
from minitron_kernels.pruning.families.family import Family, Param, Taps, When
from minitron_kernels.pruning.families.parts import attention, flag, gated_mlp, linear, norms
from minitron_kernels.pruning.families.registry import register_family

_TWO_NORMS = norms("input_layernorm", "post_attention_layernorm")
_FOUR_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_ATTENTION_BIAS, _MLP_BIAS = flag("attention_bias"), flag("mlp_bias")


def _is_sparse(config: Config, layer: int) -> bool:
    """Qwen3-MoE: every decoder_sparse_step-th layer, except those in mlp_only_layers."""
    step = config_value(config, "decoder_sparse_step", 1)
    dense = config_value(config, "mlp_only_layers", ())
    return layer not in dense and (layer + 1) % step == 0


def _always(config: Config, layer: int) -> bool:
    return True


def _experts(block: str, when: When | None = None) -> tuple[Param, ...]:
    """The router, and the weights of all experts, stacked in three-dimensional tensors."""
    return (
        Param(f"{block}.gate.weight", "experts, hidden", when),
        Param(f"{block}.experts.gate_up_proj", "experts, expert_mlp+expert_mlp, hidden", when),
        Param(f"{block}.experts.down_proj", "experts, hidden, expert_mlp", when),
    )


def _heads_divide_hidden(config: Config) -> str | None:
    hidden, heads = config_value(config, "hidden_size"), config_value(config, "num_attention_heads")
    return (
        f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}" if hidden % heads else None
    )


def _long_rope_fits(config: Config) -> str | None:
    """Phi-3: transformers checks the factors of long RoPE against hidden_size / num_attention_heads."""
    rope = config_value(config, "rope_parameters") or config_value(config, "rope_scaling") or {}
    hidden, heads = config_value(config, "hidden_size"), config_value(config, "num_attention_heads")
    factors = [key for key in ("short_factor", "long_factor") if rope.get(key)]
    if not factors:
        return None
    part = rope.get("partial_rotary_factor") or config_value(config, "partial_rotary_factor", 1.0)
    wanted = int(hidden // heads * part) // 2
    for key in factors:
        if len(rope[key]) != wanted:
            return (
                f"the {len(rope[key])} entries of RoPE's {key} are not half of hidden_size / "
                f"num_attention_heads = {hidden} // {heads}"
            )
    return None


_PLAIN = (*attention(qkv_bias=_ATTENTION_BIAS, out_bias=_ATTENTION_BIAS), *gated_mlp(_MLP_BIAS), *_TWO_NORMS)

register_family(Family(("llama",), layer=_PLAIN, refuses=_heads_divide_hidden))
register_family(Family(("mistral",), layer=(*attention(), *gated_mlp(), *_TWO_NORMS)))
register_family(Family(("qwen2",), layer=(*attention(qkv_bias=True), *gated_mlp(), *_TWO_NORMS)))
_QWEN3_ATTENTION = attention(qkv_bias=_ATTENTION_BIAS, out_bias=_ATTENTION_BIAS, qk_norm=True)
register_family(Family(("qwen3",), layer=(*_QWEN3_ATTENTION, *gated_mlp(), *_TWO_NORMS)))

_GEMMA_TAPS = Taps(
    scored_norms=("input_layernorm", "pre_feedforward_layernorm"),
    norms=_FOUR_NORMS,
)
for _type, _qk_norm in (("gemma2", False), ("gemma3_text", True)):
    register_family(
        Family(
            (_type,),
            layer=(
                *attention(qkv_bias=_ATTENTION_BIAS, out_bias=_ATTENTION_BIAS, qk_norm=_qk_norm),
                *gated_mlp(),
                *norms(*_FOUR_NORMS),
            ),
            taps=_GEMMA_TAPS,
            norm_offset=1.0,
            scales_embedding=True,
            refuses=_heads_divide_hidden,
        )
    )

register_family(
    Family(
        ("phi3",),
        layer=(
            *linear("self_attn.qkv_proj", "heads+kv_heads+kv_heads, hidden"),
            *linear("self_attn.o_proj", "hidden, heads"),
            *linear("mlp.gate_up_proj", "mlp+mlp, hidden"),
            *linear("mlp.down_proj", "hidden, mlp"),
            *_TWO_NORMS,
        ),
        taps=Taps(mlp_up="mlp.gate_up_proj", mlp_up_part=(1, 2)),
        refuses=_long_rope_fits,
    )
)

register_family(
    Family(
        ("nemotron",),
        layer=(
            *attention(qkv_bias=_ATTENTION_BIAS, out_bias=_ATTENTION_BIAS),
            *linear("mlp.up_proj", "mlp, hidden", _MLP_BIAS),
            *linear("mlp.down_proj", "hidden, mlp", _MLP_BIAS),
            *_TWO_NORMS,
            Param("input_layernorm.bias", "hidden"),
            Param("post_attention_layernorm.bias", "hidden"),
        ),
        outer=(
            Param("model.embed_tokens.weight", "vocab, hidden"),
            Param("model.norm.weight", "hidden"),
            Param("model.norm.bias", "hidden"),
            Param("lm_head.weight", "vocab, hidden"),
        ),
        norm_offset=1.0,
    )
)

_MIXTRAL = (*attention(), *_TWO_NORMS)
register_family(
    Family(
        ("mixtral",),
        layer=(*_MIXTRAL, *_experts("mlp")),
        stored_layer=(
            *_MIXTRAL,
            Param("block_sparse_moe.gate.weight", "experts, hidden"),
            Param("block_sparse_moe.experts.{expert}.w1.weight", "expert_mlp, hidden"),
            Param("block_sparse_moe.experts.{expert}.w2.weight", "hidden, expert_mlp"),
            Param("block_sparse_moe.experts.{expert}.w3.weight", "expert_mlp, hidden"),
        ),
        taps=Taps(mlp_down=None, mlp_up=None, experts="mlp.experts"),
        size_keys={
            "mlp": (),
            "expert_mlp": ("intermediate_size",),
            "experts": ("num_local_experts",),
        },
        is_sparse=_always,
    )
)

_QWEN3_MOE = (
    *_QWEN3_ATTENTION,
    *_TWO_NORMS,
    *gated_mlp(when=lambda config, layer: not _is_sparse(config, layer)),
)
register_family(
    Family(
        ("qwen3_moe",),
        layer=(*_QWEN3_MOE, *_experts("mlp", _is_sparse)),
        stored_layer=(
            *_QWEN3_MOE,
            Param("mlp.gate.weight", "experts, hidden", _is_sparse),
            Param("mlp.experts.{expert}.gate_proj.weight", "expert_mlp, hidden", _is_sparse),
            Param("mlp.experts.{expert}.up_proj.weight", "expert_mlp, hidden", _is_sparse),
            Param("mlp.experts.{expert}.down_proj.weight", "hidden, expert_mlp", _is_sparse),
        ),
        taps=Taps(experts="mlp.experts"),
        size_keys={
            "expert_mlp": ("moe_intermediate_size",),
            "experts": ("num_experts", "num_local_experts"),
        },
        is_sparse=_is_sparse,
        dense_layers=lambda layers: {"mlp_only_layers": layers, "decoder_sparse_step": 1},
    )
)
