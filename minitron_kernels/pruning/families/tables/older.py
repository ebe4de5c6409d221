"""Decoders of the time of GPT-2 in which fewer axes can go, but for the first: BioGPT, CodeGen, MPT."""

from __future__ import annotations

from collections.abc import Mapping

from minitron_kernels.pruning.families.configs import Config, config_value
from minitron_kernels.pruning.families.family import Family, Param, Taps
from minitron_kernels.pruning.families.parts import attention, linear, norms
from minitron_kernels.pruning.families.registry import register_family
from minitron_kernels.pruning.families.stored_names import StoredNames
from minitron_kernels.pruning.families.tables.gpt import (
    ALIBI,
    ALIBI_HIDDEN,
    GPTJ_MLP,
    HIDDEN,
    LIKE_GPTJ,
    NO_KEYS,
    ONE_NORM,
    OPT_NORMS,
)

# ---- BioGPT: OPT with embeddings that are multiplied by √hidden_size, and positions that are not


def _biogpt_positions(config: Config) -> int:
    if not config_value(config, "scale_embedding", True):
        raise ValueError(
            "the config of this biogpt has scale_embedding False: its table is of embeddings that are "
            "multiplied by √hidden_size"
        )
    return config_value(config, "max_position_embeddings") + 2  # the first two are never read


register_family(
    Family(
        ("biogpt",),
        layer=(
            *attention(qkv_bias=True, out_bias=True, out="out_proj"),
            *linear("fc1", "mlp, hidden", True),
            *linear("fc2", "hidden, mlp", True),
            *norms(*OPT_NORMS, bias=True),
        ),
        outer=(
            Param("biogpt.embed_tokens.weight", "vocab, hidden"),
            Param("biogpt.embed_positions.weight", "positions, hidden"),
            *norms("biogpt.layer_norm", bias=True),
            Param("output_projection.weight", "vocab, hidden"),
        ),
        taps=Taps("self_attn.out_proj", "fc2", "fc1", scored_norms=OPT_NORMS, norms=OPT_NORMS),
        layers="biogpt.layers",
        final_norm="biogpt.layer_norm",
        embedding="biogpt.embed_tokens",
        head="output_projection",
        size_keys=NO_KEYS,
        computed={"positions": _biogpt_positions},
        scales_embedding=True,
        approximates=HIDDEN,
    )
)

# ---- CodeGen: GPT-J whose queries, values and keys are in four groups, each of a quarter of the heads

_QUARTERS = (
    "queries, values and keys are in four groups, of a quarter of the heads each; and a head has n_embd / "
    "n_head channels"
)
register_family(
    Family(
        ("codegen",),
        layer=(
            *linear("attn.qkv_proj", "heads+kv_heads+kv_heads, hidden"),
            *linear("attn.out_proj", "hidden, heads"),
            *GPTJ_MLP,
            *norms(*ONE_NORM, bias=True),
        ),
        fixed=lambda config: dict.fromkeys(("hidden", "heads", "kv_heads"), _QUARTERS),
        stored_names=StoredNames(computed=("attn.causal_mask",)),
        **LIKE_GPTJ,
    )
)

# ---- MPT: slopes of ALiBi and an MLP of 4 · hidden_size, as BLOOM: whole layers go, and nothing else

_MPT_NORMS = ("norm_1", "norm_2")


def _mpt_fixed(_config: Config) -> Mapping[str, str]:
    return {
        **dict.fromkeys(("heads", "kv_heads"), ALIBI),
        "hidden": ALIBI_HIDDEN,
        "mlp": "it has 4 · hidden_size neurons",
    }


register_family(
    Family(
        ("mpt",),
        layer=(
            *linear("attn.Wqkv", "heads+kv_heads+kv_heads, hidden"),
            *linear("attn.out_proj", "hidden, heads"),
            *linear("ffn.up_proj", "mlp, hidden"),
            *linear("ffn.down_proj", "hidden, mlp"),
            *norms(*_MPT_NORMS),
        ),
        outer=(
            Param("transformer.wte.weight", "vocab, hidden"),
            Param("transformer.norm_f.weight", "hidden"),
            Param("lm_head.weight", "vocab, hidden"),
        ),
        taps=Taps("attn.out_proj", "ffn.down_proj", "ffn.up_proj", scored_norms=_MPT_NORMS, norms=_MPT_NORMS),
        layers="transformer.blocks",
        final_norm="transformer.norm_f",
        embedding="transformer.wte",
        size_keys={
            **NO_KEYS,
            "hidden": ("d_model", "hidden_size"),
            "layers": ("n_layers", "num_hidden_layers"),
            "heads": ("n_heads", "num_attention_heads"),
            "mlp": (),
        },
        computed={"mlp": lambda config: 4 * config_value(config, "d_model")},
        fixed=_mpt_fixed,
    )
)
