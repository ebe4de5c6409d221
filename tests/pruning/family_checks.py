"""What is checked of every family: its table, scores, cuts in memory and on disk, and the result's logits."""

import copy
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import textwrap

import pytest
import torch
from safetensors.torch import load_file

from minitron_kernels.pruning import collect_importance, make_plan, prune_checkpoint, prune_model
from minitron_kernels.pruning.checkpoint.head import stored_head
from minitron_kernels.pruning.checkpoint.safetensors_files import open_folder, read_json
from minitron_kernels.pruning.families.registry import family_of
from pruning import oracle
from pruning.collected import ids
from pruning.family_case import DROPPED_LAYER
from pruning.pruned_models import TOLERANCE, gone

IDS = torch.arange(24).view(2, 12) * 7 % 96
# a kernel's sum is within 16 roundings of fp32; a score is made of one or two, "hidden" adds up seven
KERNEL = 64 * 2.0**-24
LOAD = """
    import json, sys, torch, transformers
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    ids = torch.arange(24).view(2, 12) * 7 % 96
    for line in sys.stdin:
        kind, folder = json.loads(line)
        try:
            load = getattr(transformers, kind).from_pretrained
            model, report = load(folder, dtype="auto", output_loading_info=True)
            if any(report.values()):
                raise ValueError(str({key: list(value) for key, value in report.items() if value}))
            with torch.no_grad():
                torch.save(model(ids).logits, folder + "/logits.pt")
            said = None
        except Exception as error:
            said = repr(error)
        print(json.dumps([said]), flush=True)
"""


class FreshProcess:
    """One process beside this one, which loads checkpoints by transformers alone."""

    def __init__(self):
        self.said = tempfile.TemporaryFile()  # noqa: SIM115  (closed below)
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(LOAD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,  # a pipe that nobody reads would fill up, and stop the process
            text=True,
        )

    def logits(self, folder, kind="AutoModelForCausalLM"):
        """What the model in `folder` makes of IDS; it must load without a missing or an unknown tensor."""
        self.process.stdin.write(json.dumps([kind, str(folder)]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self._said()
        said = json.loads(line)[0]
        assert said is None, said
        return torch.load(folder / "logits.pt", weights_only=True)

    def _said(self):
        self.said.seek(0)
        return self.said.read()[-2000:].decode(errors="replace")

    def close(self):
        """Ends the process, which has nothing left to do: all that it was asked for has been read."""
        self.process.kill()
        self.process.communicate()
        self.said.close()


def check_table(case, model):
    """Names, shapes and count of parameters are the model's; the taps are modules of it."""
    family = family_of(model.config)
    sizes = family.sizes(model.config)
    located = list(family.parameters(model.config))
    expected = {param.name: param.shape(sizes) for param in located if not param.buffer}
    there = {name: tensor for name, tensor in model.named_parameters() if case.is_of_text(name)}
    assert expected == {key: tuple(value.shape) for key, value in there.items()}
    state = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert all(state[param.name] == param.shape(sizes) for param in located)
    assert family.count_parameters(model.config) == sum(p.numel() for p in there.values())
    assert all(family.locate(param.name, model.config) == param for param in located)


def check_scores(case, model):
    """Scores against plain hooks in float64; returns the tables."""
    batches = [ids(2, 11, seed=2), ids(1, 9, seed=3)]
    wanted = oracle.tables(model, batches)
    before = oracle.tables(model, batches, mlp_tap="up_proj_output")
    tables = collect_importance(model, batches, progress=False).tables()
    oracle.assert_tables(tables, wanted, KERNEL)
    if "mlp" in tables:
        options = dict(axes=("mlp",), mlp_tap="up_proj_output", progress=False)
        got = collect_importance(model, batches, **options).tables()
        oracle.assert_tables(got, {"mlp": before["mlp"]}, KERNEL)
    return tables


def check_plan(case, model, tables):
    """A plan that cuts every axis; its summary says what is approximate, and nothing where all stays."""
    # the last heads stay, so that none keeps its number
    heads = {layer: torch.arange(len(x), dtype=x.dtype) for layer, x in tables.get("heads", {}).items()}
    tables = {**tables, "heads": heads}
    dropped = None if case.stays else [DROPPED_LAYER]
    plan = make_plan(tables, model.config, divisor=8, drop_layers=dropped, **case.sizes)
    family = family_of(model.config)
    assert set(family.approximates) == set(case.approximate)
    for text in family.approximates.values():
        assert text in plan.summary()
    if case.fixed is not None:
        _, name, size = case.fixed
        with pytest.raises(ValueError, match=f"{name} cannot be pruned in this {case.model_type}: "):
            make_plan(tables, model.config, divisor=1, **{name: size})
    if case.kept_layer is not None:
        with pytest.raises(ValueError, match=f"layers of this {case.model_type} must stay: "):
            make_plan(tables, model.config, drop_layers=[case.kept_layer])
    if case.stays:
        with pytest.raises(ValueError, match=f"no layer can go from this {case.model_type}: "):
            make_plan(tables, model.config, drop_layers=[DROPPED_LAYER])
    whole = make_plan(tables, model.config, drop_layers=dropped or [])
    assert not any(text in whole.summary() for text in family.approximates.values())
    return plan


def bits(folder):
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in load_file(folder / "model.safetensors").items()
    }


def check_head(model, folder):
    """The output layer is found among the stored tensors, whatever it is called and tied to."""
    head, tensors = model.get_output_embeddings(), load_file(folder / "model.safetensors")
    with open_folder(folder) as source:
        weight, bias = stored_head(source, read_json(folder / "config.json"))
    assert torch.equal(tensors[weight.name], head.weight)
    assert (bias is None) == (getattr(head, "bias", None) is None)
    assert bias is None or torch.equal(tensors[bias.name], head.bias)


def check_cut(case, model, plan, folder, fresh):
    """In memory and on disk the same bits; a fresh process loads them and says what the model here says."""
    model.save_pretrained(folder / "source")
    check_head(model, folder / "source")
    smaller = prune_model(model, plan)
    if case.images is None:
        assert sum(p.numel() for p in smaller.parameters()) == plan.parameters_after < plan.parameters_before
    smaller.save_pretrained(folder / "memory")
    prune_checkpoint(folder / "source", folder / "disk", plan, progress=False)
    on_disk = {case.stored_as.get(name, name): tensor for name, tensor in bits(folder / "disk").items()}
    assert on_disk == bits(folder / "memory")
    if case.images is not None:
        _check_encoder(case, bits(folder / "source"), on_disk)
    with torch.no_grad():
        expected = smaller(IDS).logits
    assert torch.equal(fresh.logits(folder / "disk", case.auto), expected)


def _check_encoder(case, before, after):
    """What is outside of the text model is the same to the bit, but for what follows it."""
    text = ("lm_head.", "model.layers.", "model.embed_tokens.", "model.norm.")
    outside = {name for name in before if "language_model." not in name and not name.startswith(text)}
    changed = {name for name in outside if before[name] != after[name]}
    assert len(outside) > len(changed) == len(case.follow)
    assert all(name.endswith(case.follow) for name in changed)


def check_masked(case, model, plan):
    """The pruned model says what the whole one says in which all that goes has no effect."""
    whole = copy.deepcopy(model).double()
    if hasattr(whole, "set_experts_implementation"):
        whole.set_experts_implementation("eager")  # the others have no float64
    with torch.no_grad():
        _silence(case, whole, plan)
        factor = math.sqrt(
            whole.config.get_text_config().hidden_size / len(plan.hidden)
        )  # what is kept holds all the energy
        plan = dataclasses.replace(plan, norm_factors=dict.fromkeys(plan.norm_factors, factor))
        smaller = prune_model(whole, plan)
        _leave_out(case, whole, plan)
        for norm in (*whole.modules(), *smaller.modules()):
            for name in ("eps", "variance_epsilon"):
                if isinstance(getattr(norm, name, None), float):
                    setattr(norm, name, 1e-30)
        _check_close(case, smaller(IDS).logits, whole(IDS).logits)
        if family_of(model.config).states or case.stays:  # layers keep other things than keys and values
            _check_generation(case, smaller, whole)
        if case.images is not None:
            given = case.images()
            actual = smaller(**given).logits
            _check_close(case, actual, whole(**given).logits)
            given["pixel_values"] = given["pixel_values"] + 1
            assert not torch.allclose(smaller(**given).logits, actual)


def _check_generation(case, smaller, whole):
    """What it says with a cache, token by token, is what the whole one says without."""
    begin = 8
    config = smaller.generation_config
    config.eos_token_id, config.cache_implementation = None, None
    made = smaller.generate(
        IDS[:, :begin],
        attention_mask=torch.ones_like(IDS[:, :begin]),  # one of the tokens is that of padding
        max_new_tokens=4,
        do_sample=False,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    expected = whole(made.sequences).logits[:, begin - 1 : -1]
    _check_close(case, torch.stack(made.logits, 1), expected, 4 * TOLERANCE)


def _check_close(case, actual, expected, tolerance=TOLERANCE):
    scale = expected.abs().amax()
    assert scale > 0.01
    error = float((actual - expected).abs().amax() / scale)
    assert error <= tolerance + case.tolerance, f"{error:.2e} of the largest logit"


def _silence(case, model, plan):
    """Zero what the plan drops of kept layers, in weights that stay."""
    places, config = case.places, model.config.get_text_config()
    layers = model.get_submodule(places.layers)
    for entry in plan.layers:
        layer = layers[entry.layer]
        kept_heads = case.fixed is not None and case.fixed[0] == "heads"
        out = None if kept_heads else _weight(case, layer, places.attention_out)
        assert (out is None) == (entry.heads is None) or kept_heads
        for head in () if out is None else gone(entry.heads.query, config.num_attention_heads):
            dim = out.shape[1] // config.num_attention_heads
            out[:, head * dim : (head + 1) * dim] = 0
        if entry.mlp is not None:
            out = _weight(case, layer, places.mlp_out)
            out[:, gone(entry.mlp, out.shape[1])] = 0
        if entry.conv is not None:
            out = layer.get_submodule(places.conv_out).weight
            out[:, gone(entry.conv, out.shape[1])] = 0
        if entry.mamba_heads is not None:
            block = layer.get_submodule(places.mamba)
            at = _mamba_channels(block, entry)
            block.out_proj.weight[:, gone(at.tolist(), block.out_proj.in_features)] = 0
        if entry.delta_heads is not None:
            out = layer.get_submodule(places.delta).out_proj.weight
            dim = config.linear_value_head_dim
            for head in gone(entry.delta_heads, config.linear_num_value_heads):
                out[:, head * dim : (head + 1) * dim] = 0
        for expert, keep in zip(entry.experts or (), entry.expert_mlp or (), strict=True):
            out = layer.get_submodule(places.experts).down_proj[expert]
            out = out if places.neurons_first else out.T
            out[gone(keep, len(out))] = 0
    dropped = torch.tensor(gone(plan.hidden, config.hidden_size), dtype=torch.int64)
    norms = {f"{name}.weight" for name in (*places.norms, places.final_norm)}
    for name, parameter in model.named_parameters():
        if not case.is_of_text(name):
            continue
        for d, size in enumerate(parameter.shape):
            if size == config.hidden_size and not any(name.endswith(e) and d == at for e, at in case.square):
                is_norm = parameter.dim() == 1 and any(name.endswith(norm) for norm in norms)
                parameter.index_fill_(d, dropped, -case.norm_offset if is_norm else 0)
    if case.centred:
        _centre(case, model, torch.tensor(plan.hidden))


def _mamba_channels(block, entry):
    """The channels of all heads of a state space that stay."""
    dim = block.out_proj.in_features // len(block.A_log)
    return (torch.tensor(entry.mamba_heads)[:, None] * dim + torch.tensor(entry.mamba_dim)).flatten()


def _weight(case, layer, name):
    """A linear layer's weight as [out, in]; None where the layer has none of this name."""
    weight = dict(layer.named_parameters()).get(f"{name}.weight")
    return weight.T if weight is not None and case.transposed else weight


def _centre(case, model, kept):
    """All that writes to the residual stream writes channels whose mean is 0."""
    for name in filter(None, (case.places.embedding, case.places.positions)):
        embedding = model.get_submodule(name).weight
        embedding[:, kept] -= embedding[:, kept].mean(1, keepdim=True)
    for layer in model.get_submodule(case.places.layers):
        for name in (case.places.attention_out, case.places.mlp_out):
            for parameter in layer.get_submodule(name).parameters():
                rows = parameter.T if parameter.dim() == 2 and case.transposed else parameter
                rows[kept] -= rows[kept].mean(0, keepdim=True)


def _leave_out(case, model, plan):
    """Let dropped layers and experts do nothing, and norms over the width of all heads see the kept ones."""
    kept = {entry.layer: entry for entry in plan.layers}
    for index, layer in enumerate(model.get_submodule(case.places.layers)):
        if index not in kept:
            layer.forward = _passing(layer.forward)
            continue
        entry = kept[index]
        if entry.experts is not None:
            case.route(layer, entry.experts)
        if entry.mamba_heads is not None:
            block = layer.get_submodule(case.places.mamba)
            if hasattr(block.norm, "weight"):
                at = _mamba_channels(block, entry)
                block.norm.forward = _gated_over_some(block.norm, at, block.n_groups)
        for name in case.wide_norms:
            norm = layer.get_submodule(name)
            heads = (
                entry.heads.query
                if name.rpartition(".")[2].startswith("q")
                else [h[0] for h in entry.heads.kv]
            )
            norm.forward = _over_some(norm, heads, model.config.head_dim)


def _passing(forward):
    def passes(hidden_states, *args, **kwargs):
        out = forward(hidden_states, *args, **kwargs)
        return (hidden_states, *out[1:]) if isinstance(out, tuple) else hidden_states

    return passes


def _gated_over_some(norm, at, groups):
    """The forward of a state space's norm over some channels, equally many of each group."""

    def forward(x, gate):
        gate = torch.nn.functional.silu(gate[..., at])
        before = getattr(norm, "norm_before_gate", False)
        kept = x[..., at] if before else x[..., at] * gate
        parts = kept.unflatten(-1, (groups, -1))
        kept = (parts / parts.square().mean(-1, keepdim=True).sqrt()).flatten(-2)
        out = torch.zeros_like(x)
        out[..., at] = norm.weight[at] * (kept * gate if before else kept)
        return out

    return forward


def _over_some(norm, heads, dim):
    """The forward of an RMS norm over the channels of some heads."""
    at = torch.cat([torch.arange(head * dim, (head + 1) * dim) for head in heads])

    def forward(x):
        kept = x[..., at]
        out = torch.zeros_like(x)
        out[..., at] = norm.weight[at] * kept / kept.square().mean(-1, keepdim=True).sqrt()
        return out

    return forward
