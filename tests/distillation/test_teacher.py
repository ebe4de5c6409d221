"""ModelTeacher: no gradients, no dropout, a device and dtype of its own, apart from the student."""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers")

from distillation.plain import assert_same_grads, batch_of, counted, grads_of, plain_loss, tiny
from minitron_kernels.distillation import CausalLM, DistillationLoss, ModelTeacher, attach, step

BATCH = batch_of()
INPUTS = {name: x for name, x in BATCH.items() if name != "labels"}


def logits_of(signal):
    logits = signal.hidden @ signal.head.T * signal.logit_scale
    return logits if signal.softcap is None else signal.softcap * torch.tanh(logits / signal.softcap)


def test_its_signal_is_its_logits_whatever_mode_somebody_sets():
    model = tiny("gemma2", attention_dropout=0.5)
    expected = copy.deepcopy(model).eval()(**INPUTS, output_hidden_states=True)
    teacher = ModelTeacher(model)
    assert not model.training and all(x.requires_grad for x in model.parameters())
    for training in (False, True):
        model.train(training)
        signal = teacher(INPUTS, layers=(0, 2))
        assert model.training is training
        torch.testing.assert_close(logits_of(signal), expected.logits)
        torch.testing.assert_close(signal.layers[0], expected.hidden_states[1])
        torch.testing.assert_close(signal.layers[2], expected.hidden_states[3])
        tensors = (signal.hidden, signal.head, *signal.layers.values())
        assert not any(x.requires_grad for x in tensors)
    assert signal.head.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    labelled = teacher(BATCH)  # labels are not for it
    torch.testing.assert_close(labelled.hidden, signal.hidden)


def test_a_dtype_of_its_own():
    student, model = tiny(seed=0), tiny(seed=1)
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    teacher = ModelTeacher(model, dtype=torch.bfloat16, device="cpu")
    signal = teacher(INPUTS)
    assert signal.hidden.dtype == signal.head.dtype == torch.bfloat16
    record = step(attach(student), teacher, BATCH, DistillationLoss())
    record.loss.backward()
    expected = tiny(seed=0)  # the teacher's logits unrounded, of its rounded weights and states
    with torch.no_grad():
        states = rounded.eval().model(**INPUTS).last_hidden_state
        t = (states.float() @ rounded.lm_head.weight.float().T).log_softmax(-1)
    s = expected(**INPUTS).logits.log_softmax(-1)
    counts = counted(BATCH)
    loss = (t.exp() * (t - s)).sum(-1)[counts].mean()
    loss.backward()
    torch.testing.assert_close(record.loss, loss)
    assert_same_grads(grads_of(student), grads_of(expected))
    with pytest.raises(ValueError, match="floating-point dtype"):
        ModelTeacher(model, dtype=torch.int8)


def test_another_vocabulary_needs_a_word():
    student, teacher = attach(tiny(seed=0)), ModelTeacher(tiny(seed=1, vocab_size=70))
    with pytest.raises(ValueError, match="vocab_size"):
        step(student, teacher, BATCH, DistillationLoss())
    record = step(student, teacher, BATCH, DistillationLoss(vocab_size=64))
    with torch.no_grad():
        t = teacher.model(**INPUTS).logits[..., :64].log_softmax(-1)
        s = student(**INPUTS).logits.log_softmax(-1)
    expected = (t.exp() * (t - s)).sum(-1)[counted(BATCH)].mean()
    torch.testing.assert_close(record.loss.detach(), expected)


def test_a_teacher_that_the_student_changes_is_refused():
    model = tiny(seed=0)
    student = attach(copy.deepcopy(model))
    teacher = ModelTeacher(model)
    step(student, teacher, BATCH, DistillationLoss())
    student = attach(copy.deepcopy(model))
    with torch.no_grad():  # as a view of half of it, which a pruned student may be
        student.model.norm.weight.data = model.model.norm.weight.data[16:].repeat(2)
        student.lm_head.weight.data = model.lm_head.weight.data[:]
    with pytest.raises(ValueError, match=r"trains lm_head.weight, .* also the teacher's lm_head"):
        step(student, teacher, BATCH, DistillationLoss())
    student.lm_head.weight.requires_grad_(False)
    step(student, teacher, BATCH, DistillationLoss())
    with pytest.raises(ValueError, match="also the teacher's"):
        step(attach(model), teacher, BATCH, DistillationLoss())


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["q_proj", "lm_head"]])
def test_a_model_with_adapters_and_its_base_as_its_teacher(targets):
    peft = pytest.importorskip("peft", reason="needs peft")
    base = tiny(seed=0)
    plain_base = copy.deepcopy(base)
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(base, config).train()
    expected = plain_loss(model, plain_base.eval(), BATCH, counted(BATCH), ce_weight=0.5)
    expected.backward()
    gradients = grads_of(model)
    assert gradients and all("lora" in name for name in gradients)
    model.zero_grad()
    teacher = ModelTeacher(attach(model), disable_adapters=True)
    assert model.training  # it is the student
    record = step(model, teacher, BATCH, DistillationLoss(ce_weight=0.5))
    record.loss.backward()
    torch.testing.assert_close(record.loss, expected)
    assert_same_grads(grads_of(model), gradients)
    assert model.training and "lora_A" in str(model)
    with_adapters = CausalLM(model).signal(INPUTS).hidden
    assert not torch.equal(with_adapters, teacher(INPUTS).hidden)  # they are on again

    adapted = ModelTeacher(copy.deepcopy(model))  # an adapted teacher, its head not merged
    signal = adapted(INPUTS)
    torch.testing.assert_close(logits_of(signal), model.eval()(**INPUTS).logits)
    with pytest.raises(TypeError, match="needs a PEFT model, got Llama"):
        ModelTeacher(plain_base, disable_adapters=True)
    with pytest.raises(ValueError, match="the model is the student"):
        ModelTeacher(model, disable_adapters=True, dtype=torch.bfloat16)


def test_virtual_tokens_are_refused():
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(tiny(), config)
    with pytest.raises(TypeError, match="virtual tokens"):
        attach(model)


def test_the_head_moves_once():
    teacher = ModelTeacher(tiny())
    weight = teacher.model.lm_head.weight
    moved = teacher._at(weight, torch.device("meta"))
    assert teacher._at(weight, torch.device("meta")) is moved
    with torch.no_grad():
        weight.mul_(2)
    again = teacher._at(weight, torch.device("meta"))
    assert again is not moved
    made = weight * 1  # a new tensor at each call may lie where another did
    assert teacher._at(made, torch.device("meta")) is not teacher._at(made, torch.device("meta"))


@pytest.mark.gpu
def test_a_teacher_on_another_device():
    student, model = attach(tiny(seed=0)).cuda(), tiny(seed=1)
    batch = {name: x.cuda() for name, x in BATCH.items()}
    expected = step(student, ModelTeacher(copy.deepcopy(model).cuda()), batch, DistillationLoss()).loss
    teacher = ModelTeacher(model)
    record = step(student, teacher, batch, DistillationLoss())
    record.loss.backward()
    torch.testing.assert_close(record.loss, expected, rtol=1e-4, atol=1e-5)
    assert model.lm_head.weight.device.type == "cpu"
    assert teacher(batch).head is teacher(batch).head or teacher._moved is not None
