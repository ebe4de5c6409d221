"""Configs of the models of the Minitron papers, and how many parameters each has."""

NEMO = dict(
    model_type="mistral",
    hidden_size=5120,
    intermediate_size=14336,
    num_hidden_layers=40,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=131072,
)
LLAMA = NEMO | dict(
    model_type="llama", hidden_size=4096, num_hidden_layers=32, vocab_size=128256, intermediate_size=14336
)
NEMOTRON = NEMO | dict(
    model_type="nemotron",
    hidden_size=6144,
    intermediate_size=24576,
    num_hidden_layers=32,
    num_attention_heads=48,
    vocab_size=256000,
)
COUNTS = {  # config: parameters, without embeddings
    "Mistral-NeMo 12B": (NEMO, 12_247_782_400, 10_905_605_120),
    "Mistral-NeMo-Minitron 8B": (
        NEMO | dict(hidden_size=4096, intermediate_size=11520),
        8_414_105_600,
        7_340_363_776,
    ),
    "Llama-3.1 8B": (LLAMA, 8_030_261_248, 6_979_588_096),
    "Llama-3.1-Minitron 4B width": (
        LLAMA | dict(hidden_size=3072, intermediate_size=9216),
        4_512_746_496,
        3_724_741_632,
    ),
    "Llama-3.1-Minitron 4B depth": (LLAMA | dict(num_hidden_layers=16), 4_540_469_248, 3_489_796_096),
    "Nemotron-4 15B": (NEMOTRON, 15_628_775_424, 12_483_047_424),
    "Minitron 8B": (NEMOTRON | dict(hidden_size=4096, intermediate_size=16384), 8_271_699_968, 6_174_547_968),
    "Minitron 4B": (
        NEMOTRON | dict(hidden_size=3072, intermediate_size=9216, num_attention_heads=24),
        4_190_509_056,
        2_617_645_056,
    ),
}
