"""runtime_notes(): which sizes of a model vLLM and llama.cpp do not take, or take for others.

transformers reads every size from config.json. Other programs have rules of their own, in their loaders and
converters. Those below were read in their sources in November 2026, which each note names; neither program
is imported, and both change: a note is a reason to look, not a verdict.
"""

from __future__ import annotations

from collections.abc import Mapping

from minitron_kernels.pruning.families.configs import Config, config_value
from minitron_kernels.pruning.families.family import Family
from minitron_kernels.pruning.families.registry import family_of

GPUS = (2, 4, 8)  # that a model is usually divided over
_K_QUANT, _MARLIN = 256, 128  # elements of a row that are quantised, or read, together
# model types of which llama.cpp's converter writes 4 · hidden_size for the MLP, whatever the config says
_FOUR_TIMES = {"gpt2": "gpt2", "gpt_bigcode": "starcoder", "falcon": "falcon", "phi": "phi"}
# ... of which it takes the size of a head, or the channels that RoPE turns, from hidden_size and the heads
_FROM_HIDDEN = {
    **{"cohere2": "command_r", "exaone": "exaone", "gpt_neox": "gpt_neox", "nemotron": "nemotron"},
    **dict.fromkeys(("phi", "phi3"), "phi"),
}
# ... of which each n-th layer is another, by its number
_PERIODS = {"cohere2": (4, "cohere2"), "gemma2": (2, "gemma2"), "gemma3_text": (6, "gemma3")}
_PERIODS |= {"gpt_oss": (2, "openai-moe"), "smollm3": (4, "smollm3")}
# ... whose attention is scaled as that of the largest model if there are as many layers as it has
_LARGEST = {"gemma2": 46, "gemma3_text": 62}


def runtime_notes(config: Config) -> dict[str, str]:
    """What vLLM and llama.cpp do not accept of a model with this config, or take for something else.

    It says what they would divide over 2, 4 or 8 GPUs; which rows are too short for kernels of quantised
    weights; and what llama.cpp's converter and loader take from other entries than the config's own: the size
    of heads and MLPs, the order of layers of two kinds, and Gemma's attention scale.

    Args:
        config: a transformers config, or the dict in config.json, of a known family.

    Returns:
        {what it is about: a sentence, with the file of vLLM or llama.cpp that it is from}; {} where nothing
        was found.

    Raises:
        ValueError: the family is not known.

    Source: vLLM (vllm-project/vllm) and llama.cpp (ggml-org/llama.cpp), by file in each note.

    Example:
        >>> nemo = dict(model_type="mistral", hidden_size=5120, intermediate_size=14336, vocab_size=131072)
        >>> nemo |= dict(num_hidden_layers=40, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
        >>> runtime_notes(nemo)
        {}
        >>> list(runtime_notes(nemo | {"intermediate_size": 11500}))
        ['vLLM, 8 GPUs', 'vLLM, Marlin', 'llama.cpp, k-quants']
    """
    family = family_of(config)
    sizes = family.sizes(config)
    kind = str(config_value(family.text(config), "model_type"))
    notes = _gpus(sizes) | _rows(sizes) | _converted(kind, sizes)
    return notes | _layer_kinds(family, config, kind) | _gemma_scale(family, config, kind, sizes)


def new_notes(before: Config, after: Config) -> list[str]:
    """The notes on the second of two configs that the first does not have."""
    known = runtime_notes(before)
    return [text for what, text in runtime_notes(after).items() if what not in known]


def _gpus(sizes: Mapping[str, int]) -> dict[str, str]:
    """vLLM divides heads and neurons over GPUs, and gives several the same KV head where there are fewer."""
    notes = {}
    for gpus in GPUS:
        uneven = [
            f"{sizes[axis]} {what}"
            for axis, what in (("heads", "heads"), ("mlp", "neurons"), ("expert_mlp", "neurons of an expert"))
            if sizes.get(axis, 0) % gpus
        ]
        kv = sizes["kv_heads"]
        if max(kv, gpus) % min(kv, gpus):
            uneven.append(f"{kv} KV heads")
        if uneven:
            notes[f"vLLM, {gpus} GPUs"] = (
                f"vLLM cannot divide {', '.join(uneven)} over {gpus} GPUs (vllm/config/model.py, "
                "vllm/model_executor/models/llama.py)"
            )
    return notes


def _rows(sizes: Mapping[str, int]) -> dict[str, str]:
    """Weights are quantised in blocks along their rows, whose length is what a linear layer reads."""
    reads = {
        "hidden_size": sizes["hidden"],
        "heads · head_dim": sizes["heads"] * sizes["head_dim"],
        **{what: sizes[axis] for axis, what in (("mlp", "MLP"), ("expert_mlp", "expert")) if axis in sizes},
    }
    notes = {}
    if short := _not_multiples(reads, _MARLIN):
        notes["vLLM, Marlin"] = (
            f"vLLM's Marlin kernels read multiples of {_MARLIN} (GPTQ, AWQ), not {short} "
            "(vllm/model_executor/layers/quantization/utils/marlin_utils.py)"
        )
    if short := _not_multiples(reads, _K_QUANT):
        notes["llama.cpp, k-quants"] = (
            f"llama.cpp's k-quants take {_K_QUANT} of a row at a time: {short} get a larger type of 32, "
            "or F16 (src/llama-quant.cpp)"
        )
    return notes


def _not_multiples(reads: Mapping[str, int], step: int) -> str:
    return ", ".join(f"{what} {size}" for what, size in reads.items() if size % step)


def _converted(kind: str, sizes: Mapping[str, int]) -> dict[str, str]:
    """What llama.cpp's converter takes from hidden_size."""
    notes = {}
    hidden, heads, dim = sizes["hidden"], sizes["heads"], sizes["head_dim"]
    if kind in _FOUR_TIMES and sizes["mlp"] != 4 * hidden:
        notes["llama.cpp, MLP"] = (
            f"llama.cpp's converter takes the MLP to be 4 · {hidden}, not {sizes['mlp']}, and cannot load "
            f"the result (conversion/{_FOUR_TIMES[kind]}.py)"
        )
    if kind in _FROM_HIDDEN and heads * dim != hidden:
        notes["llama.cpp, heads"] = (
            f"llama.cpp's converter takes heads or RoPE to have {hidden} / {heads} channels, not {dim} "
            f"(conversion/{_FROM_HIDDEN[kind]}.py): what it makes does not load, or says something else"
        )
    return notes


def _layer_kinds(family: Family, config: Config, kind: str) -> dict[str, str]:
    """llama.cpp takes each n-th layer for one of full attention (SmolLM3: without RoPE), by its number."""
    if kind not in _PERIODS:
        return {}
    period, file = _PERIODS[kind]
    if kind == "smollm3":
        other = [not rope for rope in family.value(config, "no_rope_layers", ())]
    else:
        other = [layer == "full_attention" for layer in family.value(config, "layer_types", ())]
    wrong = [str(i) for i, is_other in enumerate(other) if is_other != ((i + 1) % period == 0)]
    if not wrong:
        return {}
    return {
        "llama.cpp, kinds of layers": (
            f"llama.cpp takes layers {period - 1}, {2 * period - 1}, ... for the other kind, whatever the "
            f"config says of {', '.join(wrong[:8])}{' ...' * (len(wrong) > 8)} (src/models/{file}.cpp): it "
            "computes something else"
        )
    }


def _gemma_scale(family: Family, config: Config, kind: str, sizes: Mapping[str, int]) -> dict[str, str]:
    """llama.cpp does not read query_pre_attn_scalar: it knows Gemma's largest model by its layers."""
    if kind not in _LARGEST:
        return {}
    scalar = family.value(config, "query_pre_attn_scalar", sizes["head_dim"])
    largest = sizes["layers"] == _LARGEST[kind]
    taken = sizes["hidden"] // sizes["heads"] if largest else sizes["head_dim"]
    if scalar == taken:
        return {}
    return {
        "llama.cpp, attention scale": (
            f"llama.cpp divides attention by √{taken}, not √{scalar} as query_pre_attn_scalar says, since it "
            f"goes by the number of layers, {_LARGEST[kind]} (src/models/{_PERIODS[kind][1]}.cpp): it says "
            "something else"
        )
    }
