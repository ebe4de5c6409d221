"""A small config with grouped heads, and plans made of random scores."""

from minitron_kernels.pruning import make_plan
from pruning.paper_models import NEMO
from pruning.score_tables import random_tables

GQA = dict(NEMO, hidden_size=64, intermediate_size=96, num_hidden_layers=6, head_dim=8, vocab_size=32)
GQA |= dict(num_attention_heads=12, num_key_value_heads=4)


def plan_of(config, seed=0, **target):
    return make_plan(random_tables(config, seed), config, **target)
