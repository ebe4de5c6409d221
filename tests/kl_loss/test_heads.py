"""head_of(): linear_kl_loss() of an output layer equals kl_loss() of the logits that the layer makes."""

import copy
import functools

import peft
import pytest
import torch
from torch import nn

import minitron_kernels as mk
from kl_loss.problems import relative

N, H, HT, V = 37, 24, 20, 130


class Model(nn.Module):
    """What peft needs of a language model."""

    def __init__(self, bias=False, tied=False):
        super().__init__()
        self.embed_tokens = nn.Embedding(V, H)
        self.lm_head = nn.Linear(H, V, bias=bias)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def get_output_embeddings(self):
        return self.lm_head

    def get_input_embeddings(self):
        return self.embed_tokens


def config(**options):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["lm_head"], **options})


def adapted(*configs, bias=False, tied=False, active=None, base_trains=False):
    """A model with one adapter per config; what peft initialises with zeros is not zero."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Model(bias, tied), configs[0], "0")
    for i, other in enumerate(configs[1:], 1):
        model.add_adapter(str(i), other)
    if active is not None:
        model.base_model.set_adapter(active)
    for name, x in model.named_parameters():
        if "lora" in name or "modules_to_save" in name:
            nn.init.normal_(x, std=0.3)
    if base_trains:
        model.base_model.model.lm_head.base_layer.weight.requires_grad_()
    return model


def merged():
    model = adapted(config())
    model.merge_adapter()
    return model


def disabled(*configs):
    model = adapted(*configs)
    model.base_model.disable_adapter_layers()
    return model


KINDS = {
    "linear": Model,
    "linear with bias": lambda: Model(bias=True),
    "linear, tied": lambda: Model(tied=True),
    "lora": lambda: adapted(config()),
    "lora, trained base": lambda: adapted(config(), bias=True, base_trains=True),
    "lora, tied": lambda: adapted(config(), tied=True),
    "rslora": lambda: adapted(config(use_rslora=True, r=5)),
    "pissa": lambda: adapted(config(init_lora_weights="pissa")),
    "two adapters": lambda: adapted(config(), config(r=3, lora_alpha=2), config(r=9), active=["0", "1"]),
    "dropout": lambda: adapted(config(lora_dropout=0.4), config(lora_dropout=0.2), active=["0", "1"]),
    "dropout, evaluation": lambda: adapted(config(lora_dropout=0.4)).eval(),
    "bias of the adapter": lambda: adapted(config(lora_bias=True), bias=True),
    "bias of the adapter alone": lambda: adapted(config(lora_bias=True)),
    "bias of the layer trained": lambda: adapted(config(bias="all"), bias=True),
    "merged": merged,
    "disabled": lambda: disabled(config()),
    "disabled DoRA": lambda: disabled(config(use_dora=True)),
    "modules_to_save": lambda: adapted(config(target_modules=["embed_tokens"], modules_to_save=["lm_head"])),
    "modules_to_save, disabled": lambda: disabled(
        config(target_modules=["embed_tokens"], modules_to_save=["lm_head"])
    ),
    "adapter on another layer": lambda: adapted(config(target_modules=["embed_tokens"])),
}


def teacher(dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=g).to(dtype) for shape in ((N, HT), (V, HT))]


def hidden_states(dtype=torch.float64):
    g = torch.Generator().manual_seed(2)
    return torch.randn(N, H, generator=g).to(dtype).requires_grad_()


def linear_loss(head, hidden, teacher_hidden, teacher_head, **options):
    hidden, weight, bias = head(hidden)
    return mk.linear_kl_loss(hidden, weight, teacher_hidden, teacher_head, student_bias=bias, **options)


def of_logits(layer, hidden, teacher_hidden, teacher_head, **options):
    return mk.kl_loss(layer(hidden), teacher_hidden @ teacher_head.T, backend="reference", **options)


def value_and_grads(loss, layer, hidden, *others, **options):
    torch.manual_seed(3)
    total = loss(hidden, *others, **options)
    inputs = [hidden, *(x for x in layer.parameters() if x.requires_grad)]
    return total, *torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_logits_of_the_layer(kind):
    layer = KINDS[kind]().double().get_output_embeddings()
    inputs = (hidden_states(), *teacher())
    options = {"temperature": 2.0, "mask": torch.arange(N) % 5 > 0}
    head = mk.head_of(layer)
    expected = value_and_grads(functools.partial(of_logits, layer), layer, *inputs, **options)
    for _ in range(2):  # micro-batches share the head, not its graph
        actual = value_and_grads(functools.partial(linear_loss, head), layer, *inputs, **options)
        for a, b in zip(actual, expected, strict=True):
            assert relative(a, b.detach().numpy()) < 1e-12
    trained = [name for name, x in layer.named_parameters() if x.requires_grad]
    assert any("lora_B" in x for x in trained) or not any("lora" in x for x in trained)


def test_an_embedding_is_a_head():
    model = Model(tied=True).double()
    inputs = (hidden_states(), *teacher())
    assert mk.head_of(model.embed_tokens)(inputs[0]).weight is model.embed_tokens.weight
    loss = linear_loss(mk.head_of(model.embed_tokens), *inputs)
    assert torch.equal(loss, linear_loss(mk.head_of(model.lm_head), *inputs))


def test_sees_what_has_changed():
    """Adapters that are switched, merged and disabled after head_of()."""
    model = adapted(config(), config(r=7)).double()
    layer, inputs = model.get_output_embeddings(), (hidden_states(), *teacher())
    head, seen = mk.head_of(layer), []
    changes = (
        lambda: model.set_adapter("1"),
        model.base_model.disable_adapter_layers,
        model.base_model.enable_adapter_layers,
        model.merge_adapter,
    )
    for change in changes:
        change()
        loss = linear_loss(head, *inputs)
        torch.testing.assert_close(loss, of_logits(layer, *inputs), rtol=1e-12, atol=0)
        seen.append(loss.item())
    assert len({round(x, 9) for x in seen}) == 2  # with and without an adapter
    model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match=r"disabled, but merged .* unmerge_adapter\(\)"):
        head(inputs[0])


def test_mixed_dtypes_lose_nothing():
    """W in bf16, adapters in fp32: the adapter counts in fp32, unless dtype= or autocast say otherwise."""
    layer = adapted(config()).get_output_embeddings()
    layer.base_layer.bfloat16()
    hidden = hidden_states(torch.bfloat16)
    truth_layer, truth_hidden = copy.deepcopy(layer).double(), hidden.detach().double().requires_grad_()
    truth = value_and_grads(functools.partial(of_logits, truth_layer), truth_layer, truth_hidden, *teacher())

    inputs = (hidden, *teacher(torch.float32))
    head = mk.head_of(layer)
    assert {x.dtype for x in head(hidden)[:2]} == {torch.float32}
    actual = value_and_grads(functools.partial(linear_loss, head), layer, *inputs)
    for a, b, bound in zip(actual, truth, (1e-6, 4e-3, 1e-5, 1e-5), strict=True):
        assert relative(a, b.detach().numpy()) < bound
    assert [x.dtype for x in actual[1:]] == [torch.bfloat16, torch.float32, torch.float32]

    rounded = mk.head_of(layer, dtype=torch.bfloat16)(hidden)
    assert {x.dtype for x in rounded[:2]} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        assert {x.dtype for x in head(hidden)[:2]} == {torch.bfloat16}
        loss = linear_loss(head, *inputs)
    assert relative(loss, truth[0].detach().numpy()) < 3e-3


def test_a_model_of_transformers():
    """Through the base model and its adapted head, as a trainer calls it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": H, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=V, **sizes))
    model = peft.get_peft_model(base, config(target_modules=["q_proj", "lm_head"])).double()
    for name, x in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(x, std=0.3)
    tokens, (teacher_hidden, teacher_head) = torch.arange(N).reshape(1, N) % V, teacher()
    logits = model(tokens).logits[0]
    expected = mk.kl_loss(logits, teacher_hidden @ teacher_head.T, backend="reference")
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    grads = torch.autograd.grad(expected, trained.values())
    causal_lm = model.get_base_model()
    hidden = causal_lm.model(tokens).last_hidden_state[0]
    loss = linear_loss(mk.head_of(causal_lm.lm_head), hidden, teacher_hidden, teacher_head)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert any("lm_head.lora_A" in name for name in trained) and any("q_proj" in name for name in trained)
    for a, b in zip(torch.autograd.grad(loss, trained.values()), grads, strict=True):
        assert relative(a, b.numpy()) < 1e-10


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 0.5


class Packed(torch.Tensor):
    """Says that it is bf16, as quantised tensors of torchao do."""


def with_weight(weight):
    layer = nn.Linear(H, V, bias=False)
    del layer.weight
    layer.weight = weight
    return layer


def merged_and_disabled():
    model = merged()
    model.base_model.disable_adapter_layers()
    return model.lm_head


REFUSED = {
    "a forward of its own": (lambda: Scaled(H, V), TypeError, r"got .*Scaled: .* W and b that it amounts to"),
    "the model": (Model, TypeError, r"pass the output layer itself \(model.get_output_embeddings\(\)\)"),
    "nothing": (lambda: None, TypeError, "got builtins.NoneType"),
    "DoRA": (lambda: adapted(config(use_dora=True)).lm_head, TypeError, "adapter '0' of the head is DoRA"),
    "a variant": (
        lambda: adapted(config(init_lora_weights="mica")).lm_head,
        TypeError,
        "adapter '0' of the head is .*MiCA.*merge it",
    ),
    "another method": (
        lambda: adapted(peft.LoHaConfig(target_modules=["lm_head"])).lm_head,
        TypeError,
        r"got peft.tuners.loha.*: merge it \(merge_adapter\(\)\) or disable it",
    ),
    "an adapted embedding": (
        lambda: adapted(config(target_modules=["embed_tokens"])).embed_tokens,
        TypeError,
        r"LoRA on nn.Linear, got peft.tuners.lora.layer.Embedding",
    ),
    "trainable tokens": (
        lambda: (
            adapted(
                config(target_modules=["lm_head"], trainable_token_indices={"embed_tokens": [1]})
            ).embed_tokens
        ),
        TypeError,
        "got peft.*TrainableTokens",
    ),
    "merged and disabled": (merged_and_disabled, ValueError, "call unmerge_adapter"),
    "int8": (
        lambda: with_weight(nn.Parameter(torch.zeros(V, H, dtype=torch.int8), requires_grad=False)),
        TypeError,
        "must be float32, bfloat16, float16 or float64, got torch.int8",
    ),
    "a packed tensor": (
        lambda: with_weight(nn.Parameter(torch.zeros(V, H).as_subclass(Packed))),
        TypeError,
        "is a Packed: a quantised head has to be dequantised",
    ),
    "a piece of FSDP1's": (
        lambda: with_weight(nn.Parameter(torch.zeros(99))),
        ValueError,
        r"shape \(99,\), as FSDP1 leaves one outside",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_known_is_refused(what):
    build, error, message = REFUSED[what]
    layer = build()
    with pytest.raises(error, match=message):
        mk.head_of(layer)(hidden_states(torch.float32))


def freed(weight):
    """As FSDP1 does: the shape stays, the memory goes."""
    weight.untyped_storage().resize_(0)


def partitioned(weight):
    """As DeepSpeed does."""
    weight.ds_id, weight.ds_status, weight.ds_shape = (
        7,
        type("S", (), {"name": "NOT_AVAILABLE"})(),
        weight.shape,
    )
    weight.data = torch.empty(0)


@pytest.mark.parametrize("take", [freed, partitioned])
@pytest.mark.parametrize("build", [Model, lambda: adapted(config())])
def test_a_head_that_is_elsewhere(take, build):
    """head_of() itself may come before the forward in which the weight is there."""
    layer = build().get_output_embeddings()
    head = mk.head_of(layer)
    take(getattr(layer, "base_layer", layer).weight)
    with pytest.raises(ValueError, match=r"weight has no memory.*Call inside of that forward"):
        head(hidden_states(torch.float32))


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_linear_kl_loss_refuses_a_head_that_is_elsewhere(side):
    def heads():
        return {"student": nn.Parameter(torch.ones(V, H)), "teacher": nn.Parameter(torch.ones(V, HT))}

    def loss(student, teacher):
        return mk.linear_kl_loss(torch.ones(N, H), student, torch.ones(N, HT), teacher)

    for take in (freed, partitioned):
        changed = heads()
        take(changed[side])
        with pytest.raises(ValueError, match=rf"{side}_head has no memory.*Call inside of that forward"):
            loss(**changed)
    with pytest.raises(ValueError, match=rf"{side}_head is a parameter of shape \(5,\), as FSDP1"):
        loss(**{**heads(), side: nn.Parameter(torch.ones(5))})
    there = heads()
    there[side].ds_status = type("S", (), {"name": "AVAILABLE"})()
    loss(**there)


@pytest.mark.native
@pytest.mark.parametrize(
    "kind", ["linear with bias", "lora", "two adapters", "bias of the adapter", "merged"]
)
def test_compiles_without_a_graph_break(kind):
    layer = KINDS[kind]().double().get_output_embeddings()
    head, inputs = mk.head_of(layer), (hidden_states(), *teacher())
    expected = value_and_grads(functools.partial(linear_loss, head), layer, *inputs)
    torch._dynamo.reset()
    for inside in (False, True):

        def step(*tensors, inside=inside):
            return linear_loss(mk.head_of(layer) if inside else head, *tensors)

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for a, b in zip(value_and_grads(compiled, layer, *inputs), expected, strict=True):
            assert relative(a, b.detach().numpy()) < 1e-12
