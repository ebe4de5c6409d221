"""Names of parameters under prefixes, as a family calls them."""

import dataclasses
import re

import pytest

from minitron_kernels.pruning.families.names import family_names
from minitron_kernels.pruning.families.registry import family_of


@pytest.mark.parametrize("front", ["", "module.", "language_model.", "_orig_mod.", "module._orig_mod."])
def test_names_under_known_prefixes(front):
    llama = family_of({"model_type": "llama"})
    own = ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"]
    assert list(family_names([front + name for name in own], llama).values()) == own
    inside = ["model.language_model.embed_tokens.weight", "model.language_model.layers.1.mlp.up_proj.weight"]
    assert list(family_names([*(front + name for name in inside), "lm_head.weight"], llama).values()) == own
    bare = [name.removeprefix("model.") for name in own[:2]]
    assert list(family_names([front + name for name in bare], llama).values()) == own[:2]


def test_names_of_a_family_with_a_prefix_of_its_own():
    llama = family_of({"model_type": "llama"})
    own = dataclasses.replace(llama, layers="transformer.h", embedding="transformer.wte")
    names = ["transformer.wte.weight", "transformer.h.0.mlp.up_proj.weight", "lm_head.weight"]
    assert list(family_names(names, own).values()) == names
    assert list(family_names(["wte.weight", "h.0.mlp.up_proj.weight"], own).values()) == names[:2]
    head = ["lm_head.weight", "lm_head.bias"]
    for front in ("", "module.", "model.language_model."):
        inside = [f"{front}wte.weight", *(front + name for name in head)]
        assert list(family_names(inside, own).values()) == ["transformer.wte.weight", *head]
    # only what is called as the head is the head
    heads = ["model.embed_tokens.weight", "vision.lm_head.weight", "xlm_head.weight", "lm_head.weight"]
    assert list(family_names(heads, llama).values()) == heads


def test_names_that_are_not_known():
    llama = family_of({"model_type": "llama"})
    names = ["model.embed_tokens.weight", "model.layers.0.mlp._orig_mod.up_proj.weight", "vision.norm.weight"]
    assert list(family_names(names, llama).values()) == [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.weight",
        "vision.norm.weight",
    ]
    # without an embedding nothing is taken off
    assert family_names(["language_model.layers.0.x"], llama) == {
        "language_model.layers.0.x": "language_model.layers.0.x"
    }
    for wrong, message in (
        (
            ["encoder.embed_tokens.weight"],
            "under the prefix 'encoder.', which is not made of model, language_",
        ),
        (
            ["model.embed_tokens.weight", "embed_tokens.weight"],
            "several decoders, under the prefixes '', 'model.'",
        ),
        (
            ["model.embed_tokens.weight", "lm_head.weight", "module.lm_head.weight"],
            "lm_head.weight and module.lm_head.weight are both lm_head.weight",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            family_names(wrong, llama)
