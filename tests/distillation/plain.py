"""What step() must come to, in plain PyTorch: full logits of whole models, log_softmax, sums."""

import torch
import torch.nn.functional as F

FAMILIES = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "phi3": {},
    "nemotron": {},
}
COMMON = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=64,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def tiny(family="llama", *, seed=0, **changes):
    """A model of the family in training mode (without dropout), whose logits are some units wide."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    options = {**COMMON, **FAMILIES.get(family, {}), **changes}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.25)
    return model.train()


def batch_of(rows=2, tokens=9, *, seed=1, labels=True):
    """Token ids, and labels of which some do not count."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (rows, tokens), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if labels:
        batch["labels"] = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, -100)
    return batch


def plain_loss(student, teacher, batch, counts, *, ce_weight=0.0, divisor=None):
    """KL(teacher ‖ student) [+ cross-entropy] over positions of counts [B, T], from the models' logits."""
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    s = student(**inputs, use_cache=False).logits.float().log_softmax(-1)
    with torch.no_grad():
        t = teacher(**inputs, use_cache=False).logits.float().log_softmax(-1)
    kl = F.kl_div(s, t, log_target=True, reduction="none").sum(-1)[counts].sum()
    divisor = counts.sum() if divisor is None else divisor
    if ce_weight:
        targets = batch["labels"].roll(-1, -1)
        kl = kl + ce_weight * F.cross_entropy(s[counts], targets[counts], reduction="sum")
    return kl / divisor


def counted(batch):
    """[B, T]: the next token has a label."""
    counts = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
    counts[:, :-1] = batch["labels"][:, 1:] != -100
    return counts


def grads_of(model):
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def assert_same_grads(found, expected, tolerance=1e-5):
    """Every gradient, to the tolerance times the largest entry of all."""
    assert found.keys() == expected.keys() and expected
    size = max(float(x.abs().max()) for x in expected.values())
    for name, x in expected.items():
        error = float((found[name].float() - x.float()).abs().max())
        assert error <= tolerance * size, f"{name}: off by {error:.2g}, largest {size:.2g}"
