"""Model types of transformers that no table describes yet, and what is missing for them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """Why model types are refused.

    Args:
        lacks: what they have that a Family cannot describe, or that nobody has described.
        remedy: what would make them known.
        types: their model_type.
    """

    lacks: str
    remedy: str
    types: tuple[str, ...]


_TABLE = "a Family passed to register_family() can describe it"
_OTHER = "a Family cannot describe it: prune a decoder of one stack of layers instead"

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "layers of an encoder beside those of the decoder, with cross-attention between them",
        _OTHER,
        (
            *(
                "bart",
                "bigbird_pegasus",
                "blenderbot",
                "blenderbot-small",
                "marian",
                "mbart",
                "moshi",
                "musicgen",
            ),
            *("musicgen_melody", "mvp", "pegasus", "plbart", "prophetnet", "trocr", "whisper", "mllama"),
        ),
    ),
    Refusal(
        "an encoder's layers: embeddings of positions and token types that are added to the residual stream, "
        "LayerNorms behind each addition, and a head with a layer of its own",
        _OTHER,
        (
            *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "git"),
            *(
                "megatron-bert",
                "modernbert-decoder",
                "rembert",
                "roberta",
                "roberta-prelayernorm",
                "roc_bert",
            ),
            *("roformer", "xlm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
        ),
    ),
    Refusal(
        "segments with relative positions, or attention over hashed buckets or two streams",
        _OTHER,
        ("cpmant", "reformer", "xlnet"),
    ),
    Refusal(
        "state-space or recurrent layers instead of attention and MLP",
        "a Family has no axis for the channels of a state",
        ("falcon_mamba", "mamba", "mamba2", "recurrent_gemma", "rwkv", "xlstm"),
    ),
    Refusal(
        "layers of two kinds: attention in some; a state space, convolution or linear attention in others",
        f"{_TABLE} where no layers share weights, as Bamba's does and Qwen3-Next's",
        (
            *(
                "bailing_hybrid",
                "inkling_text",
                "inkling2_loop_text",
            ),
            *("inkling2_text", "jamba", "kimi_linear", "lara_mini", "lfm3", "minimax"),
            *("olmo_hybrid", "qwen4_exp", "qwen4_exp_text", "zamba", "zamba2"),
        ),
    ),
    Refusal(
        "positions that are added to the residual stream as sines of a channel's number (CTRL, XGLM), or "
        "LayerNorms behind each addition (the first GPT)",
        f"{_TABLE}, for MLP and layers",
        ("ctrl", "openai-gpt", "xglm"),
    ),
    Refusal(
        "the config of gpt2 under another name",
        'write "gpt2" as model_type',
        ("gpt-sw3",),
    ),
    Refusal(
        "an MLP whose size follows from hidden_size, and a bias in the last layer alone",
        _TABLE,
        ("gpt_neox_japanese",),
    ),
    Refusal(
        "keys and values that are projected through a latent of all heads (MLA), and key and value heads of "
        "different sizes",
        f"{_TABLE}, for hidden, MLP and layers: give the latents an axis by size_keys",
        (
            *("axk1", "axk2", "deepseek_v32", "deepseek_v4", "dots3_note"),
            *(
                "dots3_note_text",
                "glm_moe_dsa",
                "longcat_flash",
                "minicpm3",
                "sarvam_mla",
            ),
        ),
    ),
    Refusal(
        "layers that share weights, keys or several residual streams, or embeddings of each layer",
        _OTHER,
        (
            *(
                "gemma3n",
                "gemma3n_text",
                "gemma4_assistant",
                "gemma4_unified",
                "hrm_text",
            ),
            *("gemma4_unified_assistant", "gemma4_unified_text", "hy_v4", "zaya"),
        ),
    ),
    Refusal(
        "factors in its code that follow from hidden_size or from a layer's number, or one norm without a "
        "gain in several places",
        "it needs code of its own, which rescales weights",
        ("beam", "dory", "nanochat"),
    ),
    Refusal(
        "pairs of heads that are subtracted from each other, or a mask that is computed from all KV heads",
        f"{_TABLE}, for all axes but heads",
        ("diffllama", "doge"),
    ),
    Refusal(
        "packed weights of 1.58 bits, and norms inside of attention and MLP over all their channels",
        "unpacked, it is what a Family can describe",
        ("bitnet",),
    ),
    Refusal(
        "bytes that are grouped into patches by a model of its own",
        _OTHER,
        ("blt",),
    ),
    Refusal(
        "adapters for images or sounds beside the weights of each layer",
        _OTHER,
        ("phi4_multimodal",),
    ),
    Refusal(
        "a class for text and images that transformers 5.24 cannot run: it reads image_outputs, which its "
        "text model does not give",
        "load its text model, a llama4_text, by AutoModelForCausalLM and prune that",
        ("llama4",),
    ),
    Refusal(
        "images or sounds around a language model",
        "load the language model inside as AutoModelForCausalLM and prune that",
        (
            *("apertus1p5_text", "aria_text", "cohere_compass_text", "emu3", "fuyu", "got_ocr2"),
            *("minimax_m3_vl_text", "moss_transcribe_diarize"),
        ),
    ),
    Refusal(
        "experts whose router, shared experts or stored names no table describes",
        _TABLE,
        (
            *("afmoe", "cohere2_moe", "dbrx", "ernie4_5_moe", "flint"),
            *(
                "hunyuan_v1_moe",
                "hy_v3",
            ),
            *("jetmoe", "kolibri1", "laguna", "mimo_v2_flash", "phimoe"),
            "sarvam_moe",
        ),
    ),
)


def refusal_of(model_type: object) -> Refusal | None:
    """Why a model type of transformers is refused; None where nothing is known of it."""
    for refusal in REFUSALS:
        if model_type in refusal.types:
            return refusal
    return None
