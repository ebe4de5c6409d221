"""CausalLM, attach() and detach(): the loss inside a model's forward is that of its own logits."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="needs transformers")

from distillation.plain import (
    FAMILIES,
    assert_same_grads,
    batch_of,
    counted,
    grads_of,
    plain_loss,
    tiny,
)
from minitron_kernels.distillation import (
    CausalLM,
    DistillationLoss,
    ModelTeacher,
    attach,
    detach,
    step,
)
from minitron_kernels.distillation.logits import KNOWN_TYPES, logit_options


class Keep:
    """A call that keeps the signal."""

    def __init__(self, layers=()):
        self.layers = layers

    def __call__(self, signal):
        return signal


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_models_own_logits(family):
    student, teacher, batch = tiny(family, seed=0), tiny(family, seed=1), batch_of()
    expected = plain_loss(student, copy.deepcopy(teacher).eval(), batch, counted(batch), ce_weight=0.5)
    expected.backward()
    gradients = grads_of(student)
    student.zero_grad()
    record = step(attach(student), ModelTeacher(teacher), batch, DistillationLoss(ce_weight=0.5))
    record.loss.backward()
    torch.testing.assert_close(record.loss, expected)
    assert_same_grads(grads_of(student), gradients)
    # known families need no probe under torch.compile: what the config says is what the probe saw
    assert student.config.model_type in KNOWN_TYPES
    assert logit_options(student.config) == CausalLM(student).logit_options


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_are_the_models_hidden_states(family, checkpointing):
    model, batch = tiny(family), batch_of(labels=False)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    states = model(**batch, output_hidden_states=True, use_cache=False).hidden_states
    signal = attach(model)(**batch, distillation=Keep((0, 1, 2)))
    assert set(signal.layers) == {0, 1, 2}
    for layer, x in signal.layers.items():
        torch.testing.assert_close(x, states[layer + 1])
    assert signal.layers[2] is signal.hidden
    torch.testing.assert_close(  # the graph is that of the hidden states
        torch.autograd.grad(signal.layers[0].pow(2).sum(), model.get_input_embeddings().weight),
        torch.autograd.grad(states[1].pow(2).sum(), model.get_input_embeddings().weight),
    )
    with pytest.raises(ValueError, match=r"layers must be in \[0, 3\), got 3"):
        model(**batch, distillation=Keep((3,)))


def test_a_reentrant_checkpoint_gives_no_layers_without_a_gradient():
    model, batch = attach(tiny()), batch_of(labels=False)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    signal = model(**batch, distillation=Keep((0,)))  # outputs outside of the checkpoint have one
    assert signal.layers[0].requires_grad

    class Inside(nn.Module):  # as in transformers 4, whose layers are checkpointed with their hooks
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x, **options):
            return self.layer(x, **options)

        def __call__(self, *args, **options):
            return torch.utils.checkpoint.checkpoint(super().__call__, *args, use_reentrant=True, **options)

    with pytest.raises((ValueError, RuntimeError), match="reentrant"):
        model.gradient_checkpointing_disable()
        layer = model.model.layers[0]
        reentrant = torch.utils.checkpoint.CheckpointFunction
        call = type(layer).__call__
        try:
            type(layer).__call__ = lambda self, *a, **k: reentrant.apply(
                lambda *a: call(self, *a, **k), True, *a
            )
            model(**batch, distillation=Keep((0,)))
        finally:
            type(layer).__call__ = call


def test_the_probe_needs_no_more_than_a_look(monkeypatch):
    model = tiny().train()
    model.model.layers[0].eval()  # a mode of its own
    state = torch.get_rng_state()
    attach(model)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    assert not model.model._forward_hooks and all(x.grad is None for x in model.parameters())
    monkeypatch.setattr("minitron_kernels.distillation.causal_lm.probe", None)  # once is enough
    model(**batch_of(labels=False), distillation=Keep())


def test_logits_that_are_something_else_are_refused():
    class Half(nn.Module):
        def __init__(self, model):
            super().__init__()

    model = tiny("granite")
    model.config.logits_scaling = 4.0
    forward = type(model).forward

    class Twice(type(model)):
        def forward(self, *args, **options):
            out = forward(self, *args, **options)
            out.logits = out.logits * 1.1
            return out

    model.__class__ = Twice
    with pytest.raises(TypeError, match="logits of Twice are not what its config says"):
        attach(model)

    class Cut(type(tiny())):
        def forward(self, *args, **options):
            out = super().forward(*args, **options)
            out.logits = out.logits[..., :60]
            return out

    model = tiny()
    model.__class__ = Cut
    with pytest.raises(TypeError, match=r"\(1, 6, 60\), but its output layer makes \(1, 6, 64\)"):
        ModelTeacher(model)


def test_the_same_name_may_multiply(monkeypatch):
    model = tiny("granite")
    forward = type(model).forward

    class Multiplies(type(model)):
        def forward(self, *args, **options):
            out = forward(self, *args, **options)
            out.logits = out.logits * self.config.logits_scaling**2
            return out

    model.__class__ = Multiplies
    attach(model)
    assert CausalLM(model).logit_scale == 4.0


def test_models_that_are_not_known_are_refused():
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    sizes = dict(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=32)
    with pytest.raises(TypeError, match="encoder-decoder"):
        attach(AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **sizes)))
    with pytest.raises(TypeError, match="no output layer"):
        attach(tiny().model)
    with pytest.raises(TypeError, match="no output layer"):
        attach(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="before it is wrapped"):
        attach(torch.compile(tiny()))


def test_attached_is_what_it_was(tmp_path):
    model, batch = tiny(), batch_of()
    cls, signature, plain = type(model), inspect.signature(model.forward), model(**batch)
    assert attach(attach(model)) is model
    assert isinstance(model, cls) and type(model).__name__ == cls.__name__ and str(type(model)) == str(cls)
    assert inspect.signature(model.forward) == signature
    again = model(**batch)
    torch.testing.assert_close((again.loss, again.logits), (plain.loss, plain.logits), rtol=0, atol=0)

    torch.save(model, tmp_path / "whole.pt")
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "whole.pt", weights_only=False),
    ]
    expected = model(**batch, distillation=Keep()).hidden
    for copied in copies:
        assert type(copied) is type(model) and copied.lm_head.weight is not model.lm_head.weight
        torch.testing.assert_close(copied(**batch, distillation=Keep()).hidden, expected, rtol=0, atol=0)

    model.save_pretrained(tmp_path / "saved")
    loaded = cls.from_pretrained(tmp_path / "saved")
    assert type(loaded) is cls and loaded.config.architectures == [cls.__name__]
    assert "minitron" not in (tmp_path / "saved/config.json").read_text()

    assert detach(model) is model and type(model) is cls
    assert not [name for name in vars(model) if "minitron" in name]


def test_batches_pass_as_they_are():
    model, batch = attach(tiny()), batch_of(labels=False)
    expected = model(**batch, distillation=Keep()).hidden
    embedded = {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"])}
    again = model(**embedded, attention_mask=batch["attention_mask"], distillation=Keep()).hidden
    torch.testing.assert_close(again, expected)
    again = model(batch["input_ids"], None, use_cache=True, return_dict=False, distillation=Keep()).hidden
    torch.testing.assert_close(again, expected)
    seen = {}

    def look(_module, _args, options):
        seen.update(options)

    hook = model.model.register_forward_pre_hook(look, with_kwargs=True)
    offsets = torch.tensor([0, 9], dtype=torch.int32)
    model(**batch, cu_seq_lens_q=offsets, anything=3, labels=batch["input_ids"], distillation=Keep())
    hook.remove()
    assert seen["cu_seq_lens_q"] is offsets and seen["anything"] == 3 and seen["use_cache"] is False
    assert "labels" not in seen
    for name, value in (("past_key_values", object()), ("logits_to_keep", 1)):
        with pytest.raises(ValueError, match=name):
            model(**batch, **{name: value}, distillation=Keep())


def test_a_load_balancing_loss_is_not_dropped_in_silence():
    model = attach(tiny("mixtral", num_local_experts=2))
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits"):
        model(**batch_of(labels=False), distillation=Keep())
