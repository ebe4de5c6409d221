"""CausalLM, attach() and detach(): the loss inside a model's forward is that of its own logits."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="needs transformers")

from distillation.accelerators import forget_accelerator
from distillation.plain import (
    COMMON,
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
    HiddenStatesLoss,
    ModelTeacher,
    attach,
    detach,
    step,
)
from minitron_kernels.distillation.logits import KNOWN_TYPES, logit_options


def test_logits_are_verified_wherever_new_tensors_are_made():
    model = tiny("gemma2", seed=0)
    with torch.device("meta"):
        found = CausalLM(model).verify()
    assert found == logit_options(model.config)


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
    model = tiny("granite")
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


def test_the_same_name_may_multiply():
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


OPTIONS = {
    "mixtral": {"num_local_experts": 2},
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
    "granitemoe": {"num_local_experts": 2, "num_experts_per_tok": 1, "logits_scaling": 3.0},
    "cohere2": {"logit_scale": 0.3},
    "gemma3_text": {"final_logit_softcapping": 5.0},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1,
                  "mamba_d_state": 8, "lm_head_multiplier": 0.3},
}  # fmt: skip


def test_known_types_are_what_their_configs_say():
    scales = {"granite": 0.25, "granitemoe": 1 / 3, "cohere": 0.25, "cohere2": 0.3, "falcon_h1": 0.3}
    softcaps = {"gemma2": 3.0, "gemma3_text": 5.0}
    for family in KNOWN_TYPES:
        model = attach(tiny(family, num_hidden_layers=1, **OPTIONS.get(family, {})))
        found = CausalLM(model).logit_options
        assert found == logit_options(model.config), family
        assert found == (scales.get(family, 1.0), softcaps.get(family)), family


def test_what_a_config_does_not_tell_is_seen():
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:  # its logits_scaling is a factor, Granite's a divisor
        assert CausalLM(attach(tiny("hyperclovax", logits_scaling=3.0))).logit_scale == 3.0
    except ValueError as error:  # older versions of transformers
        assert "hyperclovax" in str(error)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
    config = AutoConfig.for_model(
        "gemma3",
        text_config={**COMMON, "model_type": "gemma3_text", "final_logit_softcapping": 5.0},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1,
        image_token_index=60,
    )
    model = attach(AutoModelForImageTextToText.from_config(config)).eval()
    batch = batch_of(labels=False)
    batch["input_ids"] %= 60
    logits, states = model(**batch).logits, model(**batch, output_hidden_states=True).hidden_states
    signal = model(**batch, distillation=Keep((1,)))
    torch.testing.assert_close(signal.layers[1], states[2])
    product = signal.hidden @ signal.head.T * signal.logit_scale
    capped = product if signal.softcap is None else signal.softcap * torch.tanh(product / signal.softcap)
    torch.testing.assert_close(capped, logits)
    opt = attach(tiny("opt", word_embed_proj_dim=32, ffn_dim=32))  # calls the decoder of its base model
    torch.testing.assert_close(
        opt.eval()(**batch, distillation=Keep()).hidden @ opt.lm_head.weight.T, opt(**batch).logits
    )
    with pytest.raises(TypeError, match="logits of BertLMHeadModel are not"):
        attach(tiny("bert", is_decoder=True))


def test_compiles_in_one_graph():
    student, batch = attach(tiny(seed=0, num_hidden_layers=2)), batch_of()
    teacher = ModelTeacher(tiny("gemma2", seed=1, num_hidden_layers=2))

    def run(model):
        student.zero_grad()
        terms = HiddenStatesLoss({0: 0, 1: 1})
        loss = DistillationLoss(ce_weight=0.5, hidden_states=terms, hidden_weight=0.5)
        record = step(model, teacher, batch, loss)
        record.loss.backward()
        return record.loss.detach(), grads_of(student)

    expected = run(student)
    loss, gradients = run(torch.compile(student, fullgraph=True, backend="eager"))
    torch.testing.assert_close(loss, expected[0])
    assert_same_grads(gradients, expected[1])


def test_known_families_are_trusted_in_a_graph_and_others_refused(monkeypatch):
    model = attach(tiny())
    del model._minitron_verified
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    batch = batch_of(labels=False)
    assert model(**batch, distillation=Keep()).logit_scale == 1 and not CausalLM(model).is_verified
    model.config.model_type = "something"
    with pytest.raises(ValueError, match="could not be verified before it was compiled"):
        model(**batch, distillation=Keep())


def test_autocast_loses_no_more_than_the_models_own_logits():
    student, teacher, batch = tiny(seed=0), tiny(seed=1).eval(), batch_of()
    truth = plain_loss(student, teacher, batch, counted(batch))
    truth.backward()
    expected = grads_of(student)
    attach(student)

    def error_of(run):
        student.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = run()
        loss.backward()
        off = [(x - expected[name]).norm() for name, x in grads_of(student).items()]
        return float((loss - truth).abs()), float(torch.stack(off).norm())

    own = error_of(lambda: plain_loss(student, teacher, batch, counted(batch)))
    found = error_of(lambda: step(student, ModelTeacher(teacher), batch, DistillationLoss()).loss)
    assert own[1] > 0 and found[1] <= 2 * own[1] and found[0] <= 2 * own[0] + 1e-2, (found, own)


@pytest.fixture
def accelerate():
    module = pytest.importorskip("accelerate", reason="needs accelerate")
    with forget_accelerator():
        yield module


def test_forwards_that_accelerate_replaces(accelerate):
    batch = batch_of(labels=False)
    expected = attach(tiny())(**batch, distillation=Keep()).hidden
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare_model(attach(tiny()))
    hidden = prepared(**batch, distillation=lambda_call(lambda signal: signal.hidden)).float()
    torch.testing.assert_close(hidden, expected, rtol=0.05, atol=0.1)
    assert not torch.equal(hidden, expected)  # under its autocast
    with pytest.raises(ValueError, match="replaced on the instance"):
        attach(accelerator.prepare_model(tiny()))

    hooked = tiny()  # as a device_map makes them
    accelerate.hooks.add_hook_to_module(hooked, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
    torch.testing.assert_close(attach(hooked)(**batch, distillation=Keep()).hidden, expected)
    accelerate.hooks.remove_hook_from_module(hooked)
    torch.testing.assert_close(hooked(**batch, distillation=Keep()).hidden, expected)


def lambda_call(f):
    f.layers = ()
    return f


def test_what_changes_after_attach_is_looked_at_again():
    model, batch = attach(tiny("gemma2")), batch_of(labels=False)
    assert model(**batch, distillation=Keep()).softcap == 3.0
    model.config.final_logit_softcapping = None
    assert model(**batch, distillation=Keep()).softcap is None
    with torch.device("meta"):
        empty = attach(type(tiny())(tiny().config))
    assert not CausalLM(empty).is_verified
    empty.to_empty(device="cpu").load_state_dict(tiny().state_dict())
    empty.model.rotary_emb = tiny().model.rotary_emb
    assert empty(**batch, distillation=Keep()).logit_scale == 1 and CausalLM(empty).is_verified


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
    for name, value in (("past_key_values", object()), ("logits_to_keep", 1), ("output_router_logits", True)):
        with pytest.raises(ValueError, match=name):
            model(**batch, **{name: value}, distillation=Keep())


def test_a_load_balancing_loss_is_not_dropped_in_silence():
    model = attach(tiny("mixtral", num_local_experts=2))
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits"):
        model(**batch_of(labels=False), distillation=Keep())
