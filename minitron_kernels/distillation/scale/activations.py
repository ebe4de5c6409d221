"""What a decoder keeps for its backward, counted as Korthikanti et al. do it (2022, arXiv 2205.05198, 4.1).

Each linear layer keeps its input, each norm its input, attention its queries, keys and values, and so on; a
tensor that two layers need counts once. Of a token, with b bytes an element, on one of t ranks:

    norms over the residual channels   norms (n h + 4) + b h (norms before linear layers)
    attention, fused                   [b d (2 a + 2 k) + 4 a] / t        q, k, v, its output, log-sum-exp
    norms of queries and keys          (n d + 4) (a + k) / t              where a family has them
    MLP, gated                         4 b f / t                          gate, its activation, up, product
    MLP, relu squared                  2 b f / t

h hidden, f MLP width, a query heads, k key/value heads, d head_dim. Their 34 s b h for GPT (GELU, f = 4 h,
a = k, d a = h, dropout) are the same count: 8 h of norms, 8 h of attention, 16 h of the MLP, and 2 h of
dropout masks, which decoders of today do not have. Attention is flash attention, whose [s, s] matrix is never
kept. A fused norm (Liger, Apex) keeps its input and 1 / rms, n = b; those of transformers keep an fp32 copy
of their input, and the normalised one: n = b + 4.

With activation checkpointing a layer keeps its input alone, b h, and one layer at a time is made again.
"""

from __future__ import annotations

from minitron_kernels.distillation.scale.shape import ModelShape

# families whose layers keep what the formulas say; others come near: gemma's norms are all in fp32, phi3
# keeps fused projections whole, nemotron has a LayerNorm
COUNTED = ("llama", "mistral", "qwen2", "qwen3")
_SUM = 4  # bytes of an fp32 number of a token: a norm's 1 / rms, a head's log-sum-exp


def layer_bytes(shape: ModelShape, tokens: int, element_size: int, fused_norms: bool) -> int:
    """Bytes that one layer keeps for its backward, on one of shape.tp ranks; formula above.

    Args:
        shape: of the model.
        tokens: that the rank has in a micro-batch.
        element_size: bytes of an activation.
        fused_norms: whether a norm keeps its input and its sums alone.
    """
    residual = shape.norms * _norm_bytes(shape, shape.hidden, element_size, fused_norms)
    residual += element_size * shape.hidden * shape.norms_before_linears
    heads, kv_heads = shape.heads // shape.tp, shape.kv_heads // shape.tp
    attention = element_size * shape.head_dim * 2 * (heads + kv_heads) + _SUM * heads
    if shape.head_norms:
        attention += _norm_bytes(shape, shape.head_dim, element_size, fused_norms) * (heads + kv_heads)
    mlp = element_size * (4 if shape.gated else 2) * (shape.mlp // shape.tp)
    return tokens * (residual + attention + mlp)


def kept_bytes(
    shape: ModelShape, tokens: int, element_size: int, fused_norms: bool, checkpointing: bool
) -> int:
    """Bytes that all layers and the norm behind them keep from the forward to the backward."""
    per_layer = tokens * element_size * shape.hidden
    if not checkpointing:
        per_layer = layer_bytes(shape, tokens, element_size, fused_norms)
    final_norm = tokens * _norm_bytes(shape, shape.hidden, element_size, fused_norms)
    return shape.layers * per_layer + final_norm


def _norm_bytes(shape: ModelShape, width: int, element_size: int, fused: bool) -> int:
    """Bytes that a norm of so many channels keeps of a token."""
    return (element_size if fused else element_size + 4) * width + _SUM * shape.norm_sums
