"""Every family cut in memory, on disk, and on disk after a load and a save by transformers.

The results are equal to the bit, and each is loaded by a fresh process from its own config.
"""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_kernels.pruning import prune_checkpoint, prune_model
from minitron_kernels.pruning.families.registry import family_of
from pruning.checkpoints import plan_for
from pruning.tiny_models import FAMILIES, random_model, tiny_config

IDS = torch.arange(24).view(2, 12) * 7 % 96
# what becomes of a saved model before it is cut: a config that says less or other than its tensors do
VARIANTS = {
    "as saved": FAMILIES,
    # 48 / 4 = 12 is what transformers infers, where its class has no other default
    "null": ("llama", "mistral", "nemotron", "mixtral"),
    "left out": FAMILIES,
    "a head of its own": ("gemma2", "llama"),
    "a decoder alone": ("gemma3_text", "mistral"),
}
KINDS = ("memory", "disk", "disk again")
CASES = [(variant, name) for variant, names in VARIANTS.items() for name in names]
LOAD = """
    import json, os, sys, torch, transformers
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    ids = torch.arange(24).view(2, 12) * 7 % 96
    for line in sys.stdin:
        folder, headless = json.loads(line)
        kind = transformers.AutoModel if headless else transformers.AutoModelForCausalLM
        try:
            model, report = kind.from_pretrained(folder, dtype="auto", output_loading_info=True)
            if any(report.values()):
                raise ValueError(str({key: list(value) for key, value in report.items() if value}))
            with torch.no_grad():
                out = model(ids)[0]
        except Exception as error:
            out = repr(error)
        if os.path.isdir(folder):
            torch.save(out, folder + "/out.pt")
"""


LEFT_OUT = {name: ["num_attention_heads", "num_key_value_heads", "tie_word_embeddings"] for name in FAMILIES}
LEFT_OUT["llama"].remove("num_attention_heads")  # 32, which does not divide hidden_size
LEFT_OUT["nemotron"].remove("num_key_value_heads")  # of which transformers makes no model
for _name in ("gemma2", "gemma3_text", "qwen3"):
    LEFT_OUT[_name].append("head_dim")


def config_of(variant, name):
    """(config.json, config of the model): the same model, said in the way of the variant."""
    from transformers import CONFIG_MAPPING

    tied = variant == "a head of its own" or FAMILIES.index(name) % 2 == 0
    config = tiny_config(name, tie_word_embeddings=tied).to_dict()
    if variant == "null":
        config["head_dim"] = None
    if variant == "left out":
        config = {key: value for key, value in config.items() if key not in LEFT_OUT[name]}
    return config, CONFIG_MAPPING[name].from_dict(dict(config))


def made(variant, name):
    """A model of the variant, and its config.json."""
    written, config = config_of(variant, name)
    dtype = torch.bfloat16 if FAMILIES.index(name) % 3 else torch.float32
    model = random_model(config, dtype=dtype)
    if variant == "a head of its own":
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model = model.model if variant == "a decoder alone" else model
    return model, written | {"architectures": [type(model).__name__]}


def save(model, config, folder):
    """A checkpoint with just this config.json. transformers would take a separate head for a tied one."""
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    head = getattr(model, "lm_head", None)
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = head.weight.detach()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def bits(folder):
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes())
        for name, tensor in load_file(folder / "model.safetensors").items()
    }


def cut_in_every_way(variant, name, here):
    """What the smaller model makes of IDS; the smaller models are in memory/, disk/ and disk again/."""
    from transformers import AutoModel, AutoModelForCausalLM

    model, written = made(variant, name)
    save(model, written, here / "source")
    loader = AutoModel if variant == "a decoder alone" else AutoModelForCausalLM
    model = loader.from_pretrained(here / "source", dtype="auto")
    sizes = family_of(model.config).sizes(model.config)
    kv_heads = 2 if sizes["heads"] == sizes["kv_heads"] else 1
    plan = plan_for(model.config, num_key_value_heads=kv_heads)
    smaller = prune_model(model, plan)
    smaller.save_pretrained(here / "memory")
    prune_checkpoint(here / "source", here / "disk", plan, progress=False)
    model.save_pretrained(here / "saved again")
    prune_checkpoint(here / "saved again", here / "disk again", plan, progress=False)
    with torch.no_grad():
        return smaller(IDS)[0]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """case -> (its folder, what its smaller model in memory gives or an error); all have been loaded."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root, found, tasks = tmp_path_factory.mktemp("families"), {}, []
    for variant, name in CASES:
        here = root / f"{name}, {variant}"
        try:
            found[variant, name] = here, cut_in_every_way(variant, name, here)
        except Exception as error:  # of this case alone
            found[variant, name] = here, error
        tasks += [json.dumps([str(here / kind), variant == "a decoder alone"]) for kind in KINDS]
    torch.set_num_threads(threads)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOAD)],
        input="\n".join(tasks),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return found


@pytest.mark.parametrize(("variant", "name"), CASES)
def test_memory_disk_and_a_fresh_process_agree(results, variant, name):
    here, expected = results[variant, name]
    if isinstance(expected, Exception):
        raise expected
    memory, *others = (here / kind for kind in KINDS)
    for folder in others:
        assert bits(folder) == bits(memory), folder.name
    for folder in (memory, *others):
        config = json.loads((folder / "config.json").read_text())
        assert config["hidden_size"] == 32 and config["head_dim"] is not None
        if variant == "a head of its own":
            assert config["tie_word_embeddings"] is False
        loaded = torch.load(folder / "out.pt", weights_only=True)
        assert not isinstance(loaded, str), f"{folder.name}: {loaded}"
        assert torch.equal(loaded, expected), folder.name
