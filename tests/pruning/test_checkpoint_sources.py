"""Checkpoints as they are found: heads tied or not, prefixes, keys left out, files and tensors beside."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from minitron_kernels.pruning.checkpoint import matching, prune
from minitron_kernels.pruning.checkpoint.prune import prune_checkpoint
from minitron_kernels.pruning.cut.model import prune_model
from minitron_kernels.pruning.families.registry import family_of
from minitron_kernels.pruning.plan.make_plan import make_plan
from pruning.checkpoints import OTHER_WEIGHTS, edit_config, plan_for, save_tiny, snapshot
from pruning.family_configs import CASES
from pruning.score_tables import random_tables
from pruning.tiny_models import random_model, tiny_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def edit(folder, change):
    """Rewrites the one file of a checkpoint."""
    path = folder / "model.safetensors"
    save_file({n: t.contiguous() for n, t in change(load_file(path)).items()}, path, {"format": "pt"})


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def pruned(tmp_path, plan, **options):
    """The result, and the report, of pruning tmp_path / "src"."""
    done = prune_checkpoint(tmp_path / "src", tmp_path / "dst", plan, progress=False, **options)
    return load_file(tmp_path / "dst" / "model.safetensors"), done


def loaded(folder, kind=AutoModelForCausalLM):
    """A model of transformers, once nothing was missing or too much for it."""
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def same_logits(model, other):
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, other(tokens).logits)


@pytest.mark.parametrize("name", ["llama", "mistral", "nemotron", "phi3", "mixtral", "qwen3_moe"])
def test_null_is_not_a_value(tmp_path, name):
    """ "head_dim": null follows from sizes that have changed; so do other keys that are null or left out."""
    model = save_tiny(tmp_path / "src", name, hidden_size=64)
    path = tmp_path / "src" / "config.json"
    config = config_of(tmp_path / "src")
    path.write_text(json.dumps({**config, "head_dim": None}))
    plan = plan_for(model.config, num_attention_heads=2)
    pruned(tmp_path, plan)
    assert config_of(tmp_path / "dst")["head_dim"] == 16
    same_logits(loaded(tmp_path / "dst"), prune_model(model, plan))


def test_keys_left_out_are_what_transformers_takes(tmp_path):
    """Gemma 3: 4 heads, 1 KV head, head_dim 256 and tied, none of it written."""
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "num_hidden_layers": 2}
    model = save_tiny(tmp_path / "src", "gemma3_text", hidden_size=64, **sizes, tie_word_embeddings=True)
    left_out = dict.fromkeys(
        ("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings")
    )
    edit_config(tmp_path / "src", **left_out)
    default = type(model.config)()
    assert (default.num_attention_heads, default.num_key_value_heads, default.head_dim) == (8, 4, 256)
    plan = plan_for(model.config, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    pruned(tmp_path, plan)
    config = config_of(tmp_path / "dst")
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 256)
    same_logits(loaded(tmp_path / "dst"), prune_model(model, plan))


def test_a_result_that_its_config_does_not_make_is_refused(tmp_path, monkeypatch):
    model = save_tiny(tmp_path / "src", "mistral")
    plan = plan_for(model.config)
    before = snapshot(tmp_path)
    right = matching.expected_shapes

    def other(*args, **options):
        return {**right(*args, **options), "model.norm.weight": (31,)}

    monkeypatch.setattr(matching, "expected_shapes", other)
    with pytest.raises(
        ValueError, match=r"src.*would not be loaded from its own config.*model\.norm\.weight"
    ):
        pruned(tmp_path, plan)
    assert snapshot(tmp_path) == before


def test_what_was_written_is_read_again(tmp_path, monkeypatch):
    model = save_tiny(tmp_path / "src", "mistral")
    plan = plan_for(model.config)

    from minitron_kernels.pruning.checkpoint import prune

    write = prune.write_shards

    def write_otherwise(shards, folder, **options):
        write(shards, folder, **options)
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors.pop("model.norm.weight")
        save_file(tensors, path, {"format": "pt"})

    monkeypatch.setattr(prune, "write_shards", write_otherwise)
    with pytest.raises(OSError, match="what was written is not what is read there"):
        pruned(tmp_path, plan)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("said", [True, False, None])
@pytest.mark.parametrize("head", ["absent", "the same", "another"])
def test_the_head_is_what_the_files_hold(tmp_path, name, said, head):
    """Whatever the config says; and the config of the result says what is true."""
    model = tiny_model(name, tie_word_embeddings=False)
    if head != "another":
        model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = head != "another"
    model.save_pretrained(tmp_path / "src")
    if head == "the same":
        edit(tmp_path / "src", lambda t: {**t, HEAD: t[EMBEDDING].clone()})
    edit_config(tmp_path / "src", tie_word_embeddings=said)
    plan = plan_for(model.config)
    tensors, done = pruned(tmp_path, plan)
    assert (HEAD in tensors) == (head == "another")
    again = loaded(tmp_path / "dst")
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == (head != "another")
    assert again.config.tie_word_embeddings == (head != "another")
    same_logits(again, prune_model(model, plan))
    assert done.parameters_before == sum(parameter.numel() for parameter in model.parameters())
    tied = family_of(config_of(tmp_path / "src")).tied(config_of(tmp_path / "src"))
    assert ("its bytes are the embedding's" in done.head) == (head == "the same")
    assert ("is not stored: it is tied" in done.head) == (head == "absent" and not tied)
    assert ("is its own, and stays" in done.head) == (head == "another" and tied)
    assert ("config.json said tie_word_embeddings" in done.head) == (tied == (head == "another"))


@pytest.mark.parametrize("planned", [True, False])
def test_a_plan_that_was_told_otherwise_of_the_head(tmp_path, planned):
    model = save_tiny(tmp_path / "src", tie_word_embeddings=not planned)
    plan = plan_for(tiny_model("llama", tie_word_embeddings=planned).config)
    pruned(tmp_path, plan)
    again = loaded(tmp_path / "dst")
    assert again.config.tie_word_embeddings == (not planned)
    same_logits(again, prune_model(model, plan_for(model.config)))
    kept = type(plan).load(tmp_path / "dst" / "minitron_plan.json")
    assert kept.parameters_after == sum(parameter.numel() for parameter in again.parameters())


def test_a_head_of_the_same_bytes_in_another_dtype(tmp_path):
    """Bits of bf16 read as fp16 are other numbers."""
    model = save_tiny(tmp_path / "src", tie_word_embeddings=True, dtype=torch.bfloat16)
    head = model.model.embed_tokens.weight.detach().view(torch.float16)
    edit(tmp_path / "src", lambda t: {**t, HEAD: head})
    tensors, _ = pruned(tmp_path, plan_for(model.config))
    assert tensors[HEAD].dtype == torch.float16 and tensors[EMBEDDING].dtype == torch.bfloat16


def test_a_source_that_changes_while_it_is_read(tmp_path, monkeypatch):
    """Once its last tensor was read, before anything stands in the place of the result."""
    model = save_tiny(tmp_path / "src")

    def write_and_touch(*args, **kwargs):
        write_shards(*args, **kwargs)
        os.utime(tmp_path / "src" / "model.safetensors", ns=(1, 1))

    write_shards = prune.write_shards
    monkeypatch.setattr(prune, "write_shards", write_and_touch)
    with pytest.raises(ValueError, match=r"model\.safetensors: changed while it was read"):
        pruned(tmp_path, plan_for(model.config))
    assert not (tmp_path / "dst").exists()


def test_a_head_that_differs_late(tmp_path, monkeypatch):
    monkeypatch.setattr(matching, "_COMPARED_BYTES", 1000)
    model = save_tiny(tmp_path / "src", tie_word_embeddings=True)
    head = model.model.embed_tokens.weight.detach().clone()
    head[-1, -1] += 1
    edit(tmp_path / "src", lambda t: {**t, HEAD: head})
    assert HEAD in pruned(tmp_path, plan_for(model.config))[0]


WRAPPED = {
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "module.": lambda name: f"module.{name}",
    "module._orig_mod.": lambda name: f"module._orig_mod.{name}",
    "language_model.": lambda name: f"language_model.{name}",
    "model.language_model.": lambda name: name.replace("model.", "model.language_model.", 1),
    "each layer compiled": lambda name: name.replace("self_attn", "self_attn._orig_mod"),
}


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("prefix", WRAPPED)
def test_prefixes_of_wrappers_are_taken_off(tmp_path, name, prefix):
    model = save_tiny(tmp_path / "src", name)
    plan = plan_for(model.config)
    edit(tmp_path / "src", lambda tensors: {WRAPPED[prefix](n): t for n, t in tensors.items()})
    pruned(tmp_path, plan)
    same_logits(loaded(tmp_path / "dst"), prune_model(model, plan))


def test_a_prefix_that_is_not_known_is_named(tmp_path):
    model = save_tiny(tmp_path / "src")
    edit(tmp_path / "src", lambda tensors: {f"student.net.{n}": t for n, t in tensors.items()})
    with pytest.raises(ValueError, match=r"src.*'student\.net\.") as caught:
        pruned(tmp_path, plan_for(model.config))
    assert "get it again" not in str(caught.value)


@pytest.mark.parametrize("tied", [True, False])
def test_a_base_model_without_a_head(tmp_path, tied):
    """An embedding model: names without "model.", in the result as well."""
    model = save_tiny(tmp_path / "src", tie_word_embeddings=tied)
    model.model.save_pretrained(tmp_path / "src")
    plan = plan_for(model.config)
    tensors, done = pruned(tmp_path, plan)
    assert "embed_tokens.weight" in tensors and HEAD not in tensors
    want = prune_model(model, plan).model.state_dict()
    assert tensors.keys() == want.keys() and all(tensors[name].equal(want[name]) for name in want)
    loaded(tmp_path / "dst", AutoModel)
    assert config_of(tmp_path / "dst")["tie_word_embeddings"] == tied
    assert done.parameters_before == sum(p.numel() for p in model.model.parameters())


@pytest.mark.parametrize("name", ["phi", "gptj", "opt", "gpt_neox", "deepseek_v2"])
def test_base_models_of_other_families(tmp_path, name):
    """A head with a bias, a decoder inside a decoder, other prefixes, experts."""
    case = CASES[name]
    model = random_model(case.make_config())
    model.base_model.save_pretrained(tmp_path / "src")
    plan = make_plan(random_tables(model.config), model.config, divisor=8, drop_layers=[1], **case.sizes)
    _, done = pruned(tmp_path, plan)
    alone = prune_model(model.base_model, plan)
    assert done.parameters_after == sum(parameter.numel() for parameter in alone.parameters())
    again, tokens = loaded(tmp_path / "dst", AutoModel), torch.arange(8)[None]
    with torch.no_grad():
        found, expected = again(tokens).last_hidden_state, alone(tokens).last_hidden_state
        assert torch.equal(found, expected)
        assert torch.equal(prune_model(model, plan).base_model(tokens).last_hidden_state, expected)


def test_a_head_with_a_bias_under_a_prefix(tmp_path):
    model = random_model(CASES["phi"].make_config())
    model.save_pretrained(tmp_path / "src")
    edit(tmp_path / "src", lambda tensors: {f"module.{name}": t for name, t in tensors.items()})
    plan = make_plan(random_tables(model.config), model.config, divisor=8, drop_layers=[1])
    pruned(tmp_path, plan)
    same_logits(loaded(tmp_path / "dst"), prune_model(model, plan))


def test_a_class_with_a_head_is_no_class_of_a_decoder():
    for name, alone in (("LlamaModel", True), ("GPT2LMHeadModel", False), ("PhiForCausalLM", False)):
        config = {"model_type": "gpt2", "architectures": [name]}
        assert matching.is_class_of_base(config) == alone


def test_a_base_model_under_the_names_of_the_whole(tmp_path):
    model = save_tiny(tmp_path / "src")
    edit(tmp_path / "src", lambda tensors: {n: t for n, t in tensors.items() if n != HEAD})
    edit_config(tmp_path / "src", architectures=["LlamaModel"])
    tensors, _ = pruned(tmp_path, plan_for(model.config))
    assert EMBEDDING in tensors and HEAD not in tensors
    assert config_of(tmp_path / "dst")["tie_word_embeddings"] is False


def test_tensors_that_are_more_are_named_and_can_be_left_out(tmp_path):
    model = save_tiny(tmp_path / "src")
    scales = {f"model.layers.{i}.self_attn.{s}_scale": torch.ones(1) for i in range(3) for s in "kv"}
    edit(tmp_path / "src", lambda tensors: tensors | scales)
    plan = plan_for(model.config)
    named = r"'model\.layers\.0\.self_attn\.k_scale', '.*' and 3 more: no parameter .* leave_out"
    with pytest.raises(ValueError, match=named):
        pruned(tmp_path, plan)
    with pytest.raises(ValueError, match=r"leave_out has '\*\.q_scale', which matches no tensor"):
        pruned(tmp_path, plan, leave_out=["*.k_scale", "*.q_scale"])
    with pytest.raises(ValueError, match=r"lacks 'model\.norm\.weight'"):
        pruned(tmp_path, plan, leave_out=["*.[kv]_scale", "model.norm.weight"])
    tensors, done = pruned(tmp_path, plan, leave_out=["*.k_scale", "*.v_scale"])
    assert set(done.left_out_tensors) == scales.keys() and not any("scale" in name for name in tensors)
    assert done.parameters_before == plan.parameters_before
    loaded(tmp_path / "dst")


@pytest.mark.parametrize("kind", ["a layer beyond", "mtp"])
def test_mtp_layers_are_known_and_left_out(tmp_path, kind):
    model = save_tiny(tmp_path / "src")
    prefix = {"a layer beyond": "model.layers.3.", "mtp": "mtp."}[kind]
    extra = {f"{prefix}eh_proj.weight": torch.ones(2), f"{prefix}norm.weight": torch.ones(48)}
    edit(tmp_path / "src", lambda tensors: tensors | extra)
    plan = plan_for(model.config)
    if kind == "a layer beyond":
        with pytest.raises(ValueError, match="no parameter"):
            pruned(tmp_path, plan)  # as long as the config does not speak of it
    edit_config(tmp_path / "src", num_nextn_predict_layers=1)
    tensors, done = pruned(tmp_path, plan)
    assert set(done.left_out_tensors) == extra.keys() and not any("eh_proj" in name for name in tensors)
    assert config_of(tmp_path / "dst")["num_nextn_predict_layers"] == 0
    loaded(tmp_path / "dst")


DESCRIBE_OLD_WEIGHTS = (
    *("params.json", "trainer_state.json", "model.nemo", "old.tar.gz", "weights.zip", "flax_model.msgpack"),
    *("model.safetensors.index.json.bak", "modules.json", "eval_results.json", "model.onnx", "tf_model.h5"),
    *("adapter.safetensors", "optimizer.pt", "1_Pooling/", "checkpoint-500/", "original/", "onnx/"),
)
HOLD_STILL = (
    *(
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "merges.txt",
    ),
    *("vocab.json", "chat_template.jinja", "NOTICE.txt", "LICENSE.md", "USE_POLICY.md", "modeling_phi3.py"),
)


def test_what_describes_the_old_weights_is_left_out_and_said(tmp_path):
    model = save_tiny(tmp_path / "src")
    for name in DESCRIBE_OLD_WEIGHTS + HOLD_STILL:
        path = tmp_path / "src" / name
        if name.endswith("/"):
            path.mkdir()
            path = path / "config.json"
        path.write_bytes(b"{}")
    (tmp_path / "src" / "additional_chat_templates" / "old.bin").write_bytes(b"x")
    _, done = pruned(tmp_path, plan_for(model.config))
    told = {*DESCRIBE_OLD_WEIGHTS, *OTHER_WEIGHTS, "additional_chat_templates/old.bin"}
    assert set(done.left_out_files) == told
    copied = {"tokenizer.json", "LICENSE", "generation_config.json", "additional_chat_templates/tool.jinja"}
    made = {"config.json", "model.safetensors", "README.md", "minitron_plan.json"}
    assert snapshot(tmp_path / "dst").keys() == copied | made | {*HOLD_STILL}


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("adapter_config.json", "merge it first"),
        ("adapter_model.safetensors", "merge it first"),
        ("adapter_model.bin", "merge it first"),
        ("hf_quant_config.json", "quantised.*made from"),
        ("quantize_config.json", "quantised.*made from"),
        ("quant_config.json", "quantised.*made from"),
    ],
)
def test_what_changes_the_weights_is_refused(tmp_path, name, match):
    model = save_tiny(tmp_path / "src")
    (tmp_path / "src" / name).write_text("{}")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=f"{name}: .*{match}"):
        pruned(tmp_path, plan_for(model.config))
    assert snapshot(tmp_path) == before


def test_results_of_the_old_weights_are_not_in_the_card(tmp_path):
    model = save_tiny(tmp_path / "src")
    results = "model-index:\n- name: big\n  results:\n  - task: x\n\n"
    card = f"---\nlicense: mit\n{results}tags: [a]\n---\nWords \xff.\n"
    (tmp_path / "src" / "README.md").write_bytes(card.encode("latin-1"))
    pruned(tmp_path, plan_for(model.config))
    text = (tmp_path / "dst" / "README.md").read_bytes()
    assert text.startswith(b"---\nlicense: mit\ntags: [a]\n---\n") and b"Words \xff." in text
    assert b"model-index" not in text and b"results" not in text
