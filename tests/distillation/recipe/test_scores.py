"""Scores to compare with, and what is computed from configs: targets of rounds, operations."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minitron_kernels.distillation.recipe import costs
from minitron_kernels.distillation.recipe.config import load
from minitron_kernels.distillation.recipe.scores import even_tables, magnitude_tables, random_tables
from minitron_kernels.distillation.recipe.shipped import find
from minitron_kernels.distillation.recipe.targets import preview, sizes_of_round
from minitron_kernels.distillation.text_teacher import TextTeacher
from pruning.tiny_models import tiny_config, tiny_model

MISTRAL = {"model_type": "mistral", "hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 8,
           "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 96}  # fmt: skip


def plan_table(**changes):
    empty = load(find("mistral-nemo-8b")).base["plan"]
    return {**empty, "hidden_size": None, "intermediate_size": None, **changes}


def test_magnitudes_are_norms_of_what_belongs_together():
    model = tiny_model("llama")
    state, config = model.state_dict(), model.config
    found = magnitude_tables(model, {"energy": "kept"})
    dim = config.head_dim
    assert found["energy"] == "kept" and len(found["mlp"]) == config.num_hidden_layers
    layer, neuron, head, channel = 1, 5, 2, 7
    own = {name.removeprefix(f"model.layers.{layer}."): x.double() for name, x in state.items()
           if name.startswith(f"model.layers.{layer}.")}  # fmt: skip
    squares = sum(own[f"mlp.{name}_proj.weight"][neuron].square().sum() for name in ("gate", "up"))
    squares += own["mlp.down_proj.weight"][:, neuron].square().sum()
    squares += sum(own[f"mlp.{name}_proj.bias"][neuron].square() for name in ("gate", "up"))
    assert found["mlp"][layer][neuron] == pytest.approx(float(squares.sqrt()))
    rows = slice(head * dim, (head + 1) * dim)
    squares = (
        own["self_attn.q_proj.weight"][rows].square().sum()
        + own["self_attn.q_proj.bias"][rows].square().sum()
    )
    squares += own["self_attn.o_proj.weight"][:, rows].square().sum()
    assert found["heads"][layer][head] == pytest.approx(float(squares.sqrt()))
    assert found["layers"][layer] == pytest.approx(float(sum(x.square().sum() for x in own.values()).sqrt()))
    squares = 0.0
    for name, x in state.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight", "q_proj.weight", "k_proj.weight",
                          "v_proj.weight", "gate_proj.weight", "up_proj.weight")):  # fmt: skip
            squares += x[:, channel].double().square().sum()
        elif name.endswith(
            ("o_proj.weight", "down_proj.weight", "norm.weight", "o_proj.bias", "down_proj.bias")
        ):
            squares += x[channel].double().square().sum()
    assert found["hidden"][channel] == pytest.approx(float(squares.sqrt()))


def test_magnitudes_of_experts_are_refused():
    with pytest.raises(ValueError, match=r'by = "magnitude" knows .* and mixtral has experts'):
        magnitude_tables(tiny_model("mixtral"), {"energy": None})


def test_random_scores_keep_shapes_and_energy():
    tables = {
        "mlp": {0: torch.ones(3), 2: torch.ones(4)},
        "hidden": torch.ones(5),
        "energy": {"a": torch.ones(5)},
    }
    found, same, other = (random_tables(tables, seed) for seed in (0, 0, 1))
    assert found["energy"] is tables["energy"] and found["mlp"][2].shape == (4,)
    assert torch.equal(found["hidden"], same["hidden"]) and not torch.equal(found["hidden"], other["hidden"])
    assert found["hidden"].unique().numel() == 5


@pytest.mark.parametrize("family", ["llama", "nemotron", "mixtral", "qwen3_moe"])
def test_a_target_is_tried_without_scores(family):
    config = tiny_config(family)
    assert preview(plan_table(hidden_size=32, divisor=16), config).target_config["hidden_size"] == 32
    assert {"hidden", "layers"} <= even_tables(config).keys()
    with pytest.raises(ValueError, match="hidden_size must be from 1 to"):
        preview(plan_table(hidden_size=1 << 20), config)


def test_sizes_of_rounds():
    table = plan_table(
        hidden_size=448, intermediate_size=1024, num_attention_heads=4, num_hidden_layers=5, rounds=3
    )
    found = [sizes_of_round(table, MISTRAL, number) for number in (1, 2, 3)]
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    assert [tuple(sizes[name] for name in names) for sizes in found] == [
        (576, 1536, 8, 7),  # 640 - 64, 1792 - 256, 8 - 4/3 up to the KV heads' multiple, 8 - 1
        (512, 1280, 6, 6),
        (448, 1024, 4, 5),
    ]
    budget = plan_table(params=20_000_000, divisor=64, rounds=2)
    last = sizes_of_round(budget, MISTRAL, 2)
    target = preview(budget, MISTRAL).target_config
    assert last == {name: target[name] for name in last} and last["hidden_size"] < 640
    with pytest.raises(ValueError, match="rounds must be 1 where num_key_value_heads changes"):
        sizes_of_round(plan_table(num_key_value_heads=1, num_attention_heads=4, rounds=2), MISTRAL, 1)


def test_operations_are_those_that_torch_counts():
    model = tiny_model("llama").train(False)
    model.set_attn_implementation("eager")
    ids = torch.arange(32).view(2, 16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    config = model.config
    head_dim = config.head_dim
    # torch counts the whole square of attention, no norms and biases, and the product of RoPE's angles
    whole = 32 * 2 * config.num_hidden_layers * 16 * config.num_attention_heads * head_dim
    ours = costs.forward_operations(config.to_dict(), 32, 16)
    vectors = 32 * 2 * sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 1)
    assert ours + whole - vectors == pytest.approx(counter.get_total_flops(), rel=2e-3)
    given = {"gradient_checkpointing": False, "seq_len": 16}
    assert costs.training_operations(given, config, None, 32) == 3 * ours
    assert (
        costs.training_operations({**given, "gradient_checkpointing": True}, config, config, 32) == 5 * ours
    )


def test_a_text_teaches_its_next_token():
    signal = TextTeacher()({"input_ids": torch.tensor([[3, 1, 2]])})
    assert signal.ids[0, :2, 0].tolist() == [1, 2] and signal.log_tail is None
    assert signal.logprobs.unique().tolist() == [0.0]
    with pytest.raises(ValueError, match="a text has no layer 1"):
        TextTeacher()({"input_ids": torch.tensor([[3]])}, [1])
    with pytest.raises(ValueError, match="batch must have input_ids"):
        TextTeacher()({"inputs_embeds": torch.ones(1, 2, 3)})
