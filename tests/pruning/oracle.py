"""What collect_importance() should find: plain hooks that keep whole activations, then numpy float64.

Shares no table with the package: where each family is tapped is written again in family_configs.
"""

import numpy as np
import torch

from importance import oracle
from pruning.family_configs import CASES


def capture(model, batches):
    """{(module name, "in" or "out"): [array of each batch]}; experts' three arguments as a tuple."""
    kept = {}

    def keep(name):
        def hook(module, args, output):
            if name.endswith("experts"):
                given = tuple(x.detach().double().numpy() for x in args[:3])
                kept.setdefault((name, "in"), []).append(given)
                return
            for side, x in (("in", args[0] if args else None), ("out", output)):
                x = x[0] if isinstance(x, tuple) else x
                if isinstance(x, torch.Tensor) and x.is_floating_point():
                    kept.setdefault((name, side), []).append(x.detach().double().numpy())

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules()]
    with torch.no_grad():
        for batch in batches:
            inputs = {"input_ids": batch} if isinstance(batch, torch.Tensor) else batch
            model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return kept


def sequences(arrays, masks):
    """The counted tokens [n, C] of every sequence of all batches; some layers have all tokens in one row."""
    return [
        tokens
        for x, mask in zip(arrays, masks, strict=True)
        for tokens in oracle.sequences_of(x.reshape(*mask.shape, -1), mask)
    ]


def aggregate(tokens_of_each, batch, seq):
    """The (batch, seq) score over sequences of different length."""
    kept = [tokens for tokens in tokens_of_each if len(tokens)]
    if not kept:
        return np.zeros(tokens_of_each[0].shape[1])
    a = []
    for v in kept:
        centre = ((v - v.mean(0)) ** 2).mean(0)
        a.append({"mean": np.abs(v).mean(0), "L2": np.sqrt((v**2).sum(0)), "var": centre}[seq])
    a = np.array(a)
    return {"L2": np.sqrt((a**2).sum(0)), "mean": a.mean(0), "var": ((a - a.mean(0)) ** 2).mean(0)}[batch]


def swiglu(module, expert, x):
    """(neurons, output) of one expert for a token x [hidden]."""
    up, down = (
        getattr(module, key)[expert].detach().double().numpy() for key in ("gate_up_proj", "down_proj")
    )
    gate, up = np.split(up @ x, 2)
    v = gate / (1 + np.exp(-gate)) * up
    return v, down @ v


def routed_inputs(given, weights):
    """(token · weight [T, K, hidden], index [T, K]) where experts get all tokens times the router's weight.

    given: [E · T, hidden]; weights: [T, E], 0 where a token does not go to an expert.
    """
    tokens, experts = weights.shape
    inputs = given.reshape(experts, tokens, -1)
    index = np.stack([np.flatnonzero(row) for row in weights])
    return inputs[index, np.arange(tokens)[:, None]], index


def experts_of(model, name, given, masks, batch, seq, reap, run=swiglu):
    """(scores [E], neurons [E, F]) of one layer, each token and each of its experts by itself."""
    module = model.get_submodule(name)
    E = len(module.down_proj)
    total, count = np.zeros(E), np.zeros(E)
    neurons = [[] for _ in range(E)]
    for (hidden, index, gates), mask in zip(given, masks, strict=True):
        rows = mask.shape[0]
        width = len(hidden) // rows
        for row in range(rows):
            found = [[] for _ in range(E)]
            for t in range(row * width, (row + 1) * width):
                if not mask[row, t - row * width]:
                    continue
                for k, (expert, gate) in enumerate(zip(index[t].astype(int), gates[t], strict=True)):
                    v, output = run(module, expert, hidden[t] if hidden[t].ndim == 1 else hidden[t][k])
                    found[expert].append(v)
                    total[expert] += np.linalg.norm(output) * (gate if reap else 1)
                    count[expert] += 1
            for expert in range(E):
                neurons[expert].append(np.array(found[expert]).reshape(-1, len(v)))
    scores = np.stack([aggregate(neurons[expert], batch, seq) for expert in range(E)])
    return total / np.maximum(count, 1), scores


def joined(kept, rows):
    """Activations of pieces of the same sequences, put together along the sequence."""

    def together(arrays):
        return np.concatenate([x.reshape(rows, -1, x.shape[-1]) for x in arrays], axis=1)

    result = {}
    for key, arrays in kept.items():
        if isinstance(arrays[0], tuple):
            whole = [together(list(parts)) for parts in zip(*arrays, strict=True)]
            result[key] = [tuple(x.reshape(-1, x.shape[-1]) for x in whole)]
        else:
            result[key] = [together(arrays)]
    return result


def tables(
    model,
    batches,
    *,
    batch="L2",
    seq="mean",
    mlp_tap="down_proj_input",
    head_score="norm",
    reap=False,
    pieces_of_one=False,
):
    """What ImportanceScores.tables() should give, in numpy; `pieces_of_one`: of one batch cut along S."""
    case, config = CASES[model.config.model_type], model.config.get_text_config()
    places = case.places
    layers, H = config.num_hidden_layers, config.num_attention_heads
    kept = capture(model, batches)
    if pieces_of_one:
        kept, batches = joined(kept, batches[0].shape[0]), [torch.cat(batches, 1)]
    masks = []
    for item in batches:
        mask = None if isinstance(item, torch.Tensor) else item.get("attention_mask")
        shape = (item if isinstance(item, torch.Tensor) else item["input_ids"]).shape
        masks.append(np.ones(shape) if mask is None else mask.numpy())

    def of(name, side):
        return sequences(kept[name, side], masks)

    def score(values):
        return aggregate(values, batch, seq)

    def names(per_layer):
        in_layers = [f"{places.layers}.{i}.{norm}" for i in range(layers) for norm in per_layer]
        return [name for name in in_layers if (name, "out") in kept] + [places.final_norm]

    result = {
        "hidden": sum(score(of(name, "out")) for name in names(places.scored)),
        "energy": {name: sum((x**2).sum(0) for x in of(name, "in")) for name in names(places.norms)},
        "heads": {},
        "mlp": {},
        "experts": {},
        "expert_mlp": {},
        "conv": {},
        "mamba": {},
        "delta": {},
        "layers": np.zeros(layers),
    }
    for i in range(layers):
        layer = f"{places.layers}.{i}"
        out = f"{layer}.{places.attention_out}"
        has_heads = (out, "in") in kept and not (case.fixed and case.fixed[0] == "heads")
        attention = of(out, "in") if has_heads else []
        if not attention:
            pass
        elif head_score == "norm":
            result["heads"][i] = score([oracle.head_norms(x, H) for x in attention])
        else:
            result["heads"][i] = np.sqrt((score(attention).reshape(H, -1) ** 2).sum(1))
        if (f"{layer}.{places.mlp_out}", "in") in kept:
            if mlp_tap == "down_proj_input":
                neurons = of(f"{layer}.{places.mlp_out}", "in")
            else:
                part, parts = places.mlp_part
                whole = of(f"{layer}.{places.mlp_in}", "out")
                neurons = [np.split(x, parts, axis=1)[part] for x in whole]
            result["mlp"][i] = score(neurons)
        if (f"{layer}.{places.conv_out}", "in") in kept:
            result["conv"][i] = score(of(f"{layer}.{places.conv_out}", "in"))
        if (f"{layer}.{places.mamba}.out_proj", "in") in kept and places.mamba:
            width = model.get_submodule(f"{layer}.{places.mamba}.out_proj").in_features
            projected = of(f"{layer}.{places.mamba}.in_proj", "out")
            result["mamba"][i] = score([x[:, width : 2 * width] for x in projected])
        delta = f"{layer}.{places.delta}.out_proj"
        if places.delta and (delta, "in") in kept:
            heads = config.linear_num_value_heads
            result["delta"][i] = score([oracle.head_norms(x, heads) for x in of(delta, "in")])
        name = f"{layer}.{places.experts}"
        if (name, "in") in kept:
            given = kept[name, "in"]
            if places.router is not None:
                routed = kept[f"{layer}.{places.router}", "out"]
                given = [routed_inputs(x[0], weights) for x, weights in zip(given, routed, strict=True)]
                given = [(x, index, np.ones(index.shape)) for x, index in given]
            result["experts"][i], result["expert_mlp"][i] = experts_of(
                model, name, given, masks, batch, seq, reap, case.expert or swiglu
            )
        pairs = zip(of(layer, "in"), of(layer, "out"), strict=True)
        result["layers"][i] = np.concatenate([oracle.cosine_distance(x, y) for x, y in pairs]).mean()
    unscored = (*(case.fixed or ())[:1], *case.unscored, *(["layers"] if case.stays else ()))
    return {name: table for name, table in result.items() if len(table) and name not in unscored}


def assert_tables(got, wanted, bound):
    """Same axes, places and shapes; each score within `bound` of the largest of its row."""
    assert set(got) == set(wanted)
    for axis, table in wanted.items():
        rows = table.items() if isinstance(table, dict) else [(None, table)]
        mine = got[axis]
        if isinstance(table, dict):
            assert list(mine) == list(table)
        for place, values in rows:
            found = mine if place is None else mine[place]
            assert found.dtype == torch.float64 and found.shape == values.shape
            error = np.abs(found.numpy() - values).max() / max(np.abs(values).max(), 1e-300)
            assert error <= bound, f"{axis} {place}: {error:.3g} of the largest, at most {bound:.3g}"
