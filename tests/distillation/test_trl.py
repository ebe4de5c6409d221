"""use_in_trl() with the real TRL: its loss function, its trainers' steps, and when the names are put back."""

import importlib.metadata
import threading
import warnings

import pytest
import torch

WHY = "pip install 'minitron-kernels[trl]'"
pytest.importorskip("trl", reason=WHY)
pytest.importorskip("datasets", reason=WHY)

import trl.trainer.distillation_trainer as theirs  # noqa: E402
from trl.experimental.gkd.gkd_trainer import GKDTrainer  # noqa: E402

from minitron_kernels.distillation.trainers import trl as ours  # noqa: E402
from minitron_kernels.distillation.trainers.trl import use_in_trl  # noqa: E402
from pruning.tiny_models import tiny_model  # noqa: E402

ORIGINAL = theirs._chunked_divergence_loss
ORIGINAL_GKD = GKDTrainer.generalized_jsd_loss
V, H, HT = 67, 24, 40
# every option of the function, none at its default
OPTIONS = dict(
    student_logit_scale=0.7,
    teacher_logit_scale=1.3,
    student_final_logit_softcapping=9.0,
    teacher_final_logit_softcapping=7.0,
    temperature=1.7,
)


@pytest.fixture(autouse=True)
def put_back():
    yield
    assert theirs._chunked_divergence_loss is ORIGINAL
    assert GKDTrainer.generalized_jsd_loss is ORIGINAL_GKD
    assert isinstance(vars(GKDTrainer)["generalized_jsd_loss"], staticmethod)


def problem(close=False):
    g = torch.Generator().manual_seed(1)

    def rand(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    x, w = rand(2, 9, HT), rand(V, HT) / 4
    if close:
        student, head = x + rand(2, 9, HT) / 50, w + rand(V, HT) / 200
    else:
        student, head = rand(2, 9, H), rand(V, H) / 3
    mask = (torch.rand((2, 9), generator=g) < 0.7).long()
    return student, x, head, w, mask, rand(V), rand(V)


def run(function, operands, beta, dtype, **options):
    student, teacher, head, teacher_head, mask, bias, teacher_bias = operands
    leaves = [x.detach().to(dtype).requires_grad_() for x in (student, head, bias)]
    if options.pop("biases", True):
        options |= {"student_lm_head_bias": leaves[2], "teacher_lm_head_bias": teacher_bias.to(dtype)}
    operands = leaves[0], teacher.to(dtype), leaves[1], teacher_head.to(dtype), mask
    loss, entropy, count = function(*operands, beta, **options)
    (3 * loss).backward()
    assert not entropy.requires_grad and not count.requires_grad
    return [loss.detach(), entropy, count, *(x.grad for x in leaves if x.grad is not None)]


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("options", ["plain", "all", "tensor_items", "nothing_counts"])
def test_function_is_trls(beta, options):
    operands = problem()
    given = {
        "plain": {"biases": False},
        "all": {**OPTIONS, "num_items_in_batch": 11},
        "tensor_items": {"num_items_in_batch": torch.tensor(5.5)},
        "nothing_counts": {"num_items_in_batch": torch.tensor(5)},
    }[options]
    if options == "nothing_counts":
        operands = (*operands[:4], torch.zeros_like(operands[4]), *operands[5:])
    expected = run(ORIGINAL, operands, beta, torch.float32, **given)
    with use_in_trl() as served:
        actual = run(theirs._chunked_divergence_loss, operands, beta, torch.float32, **given)
    assert served.calls == 1
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        torch.testing.assert_close(a, e, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.5])
def test_bf16_is_no_worse_than_trls(beta):
    """Close to the teacher, where digits cancel; against float64 on the same bf16 operands."""
    operands = [x.bfloat16() if x.is_floating_point() else x for x in problem(close=True)]
    student, teacher, head, teacher_head, mask, bias, teacher_bias = operands
    teacher_bias = bias  # so that the two stay close
    operands = student, teacher, head, teacher_head, mask, bias, teacher_bias
    results = [run(f, operands, beta, torch.bfloat16) for f in (ORIGINAL, ours.chunked_divergence_loss)]
    truth = run(ours.chunked_divergence_loss, operands, beta, torch.float64)
    for name, their, our, true in zip(("loss", "entropy"), *results, truth, strict=False):
        assert abs(our - true) <= 2 * abs(their - true) + 1e-6 * abs(true), name
    for name, their, our, true in zip("xwb", *(r[3:] for r in (*results, truth)), strict=True):
        error = [((x.double() - true).norm() / true.norm()).item() for x in (their, our)]
        assert error[1] <= 1.1 * error[0] + 1e-3, (name, error)


def gkd_calls():
    for reduction in ("batchmean", "sum", "mean"):
        yield {"reduction": reduction}
        yield {"reduction": reduction, "labels": None}
    yield {"num_items_in_batch": torch.tensor(3.5), "reduction": "none"}
    yield {"num_items_in_batch": 4}
    yield {"beta": 0.0, "temperature": 2.0}
    yield {"beta": 1}
    yield {"labels": torch.full((2, 7), -100)}


def test_gkd_function_is_trls():
    labels = torch.tensor([[-100, -100, 500, 1, 2, 3, -100], [0, 1, 2, 3, 4, 5, 6]])
    torch.manual_seed(0)
    z, t = torch.randn(2, 7, V), 2 * torch.randn(2, 7, V)
    for options in gkd_calls():
        results = []
        for trainers in (None, ("gkd",)):
            x = z.clone().requires_grad_()
            arguments = {"labels": labels, **options}
            if trainers is None:
                loss = GKDTrainer.generalized_jsd_loss(x, t, **arguments)
            else:
                with use_in_trl(*trainers) as served:
                    loss = GKDTrainer.generalized_jsd_loss(x, t, **arguments)
                assert served.calls == 1
            loss.backward()
            results.append((loss.detach(), x.grad))
        for a, e in zip(*results, strict=True):
            torch.testing.assert_close(a, e, rtol=2e-5, atol=1e-7, msg=lambda m, o=options: f"{o}: {m}")
    with use_in_trl("gkd"), pytest.raises(ValueError, match="reduction must be"):
        GKDTrainer.generalized_jsd_loss(z, t, reduction="none")


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(93))])}
    core = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def trained(folder, tokenizer, **changes):
    """The student's parameters, and the log, after two steps of two ragged micro-batches."""
    from datasets import Dataset

    student = tiny_model("gemma2", seed=1, num_hidden_layers=1)
    teacher = tiny_model("gemma2", seed=2, num_hidden_layers=1, hidden_size=64)
    prompts = [" ".join(f"w{(7 * i + j) % 93}" for j in range(2 + i % 3)) for i in range(8)]
    arguments = theirs.DistillationConfig(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_completion_length=6,
        learning_rate=0.3,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=1e6,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        seed=3,
        **{"beta": 0.4, "temperature": 1.5, "bf16": False, **changes},
    )
    trainer = theirs.DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )
    trainer.train()
    return dict(student.named_parameters()), [
        {key: log[key] for key in ("loss", "grad_norm", "entropy")}
        for log in trainer.state.log_history
        if "loss" in log
    ]


@pytest.mark.parametrize("changes", [{}, {"bf16": True, "beta": 0.0}], ids=["fp32", "bf16"])
def test_trainer_makes_the_same_steps(tmp_path, tokenizer, changes):
    expected, expected_logs = trained(tmp_path, tokenizer, **changes)
    with use_in_trl() as served:
        actual, logs = trained(tmp_path, tokenizer, **changes)
    assert served.calls == 4
    tolerance = 2e-2 if changes else 1e-4
    start = dict(tiny_model("gemma2", seed=1, num_hidden_layers=1).named_parameters())
    for name, parameter in expected.items():
        moved = parameter - start[name]
        assert (actual[name] - parameter).norm() <= tolerance * moved.norm(), name
    assert sum(bool((expected[name] != start[name]).any()) for name in start) > 5
    assert len(logs) == 2
    for a, e in zip(logs, expected_logs, strict=True):
        assert a == pytest.approx(e, rel=max(tolerance, 1e-3))


def test_put_back_after_nesting_and_errors():
    with pytest.raises(KeyError), use_in_trl("distillation", "gkd", "gkd"):
        with use_in_trl() as inner:
            served = theirs._chunked_divergence_loss
            assert served is not ORIGINAL
            run(served, problem(), 0.0, torch.float32)
        assert inner.calls == 1
        assert theirs._chunked_divergence_loss is served
        assert GKDTrainer.generalized_jsd_loss is not ORIGINAL_GKD
        raise KeyError


def test_contexts_overlap_in_threads():
    entered, left = threading.Event(), threading.Event()
    seen = []

    def other():
        with use_in_trl() as served:
            entered.set()
            left.wait(30)
            seen.append(theirs._chunked_divergence_loss is not ORIGINAL)
            run(theirs._chunked_divergence_loss, problem(), 0.0, torch.float32)
            seen.append(served.calls)

    thread = threading.Thread(target=other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with use_in_trl():
            thread.start()
            assert entered.wait(30)
        left.set()
        thread.join(30)
    assert seen == [True, 1]


def test_says_where_nothing_was_served():
    with pytest.warns(UserWarning, match="no loss was computed"), use_in_trl():
        ORIGINAL  # noqa: B018


def test_leaves_what_others_put_there():
    def third(*arguments):
        raise NotImplementedError

    with pytest.warns(UserWarning, match="left as it is"), use_in_trl():
        run(theirs._chunked_divergence_loss, problem(), 0.0, torch.float32)
        theirs._chunked_divergence_loss = third
    assert theirs._chunked_divergence_loss is third
    with pytest.raises(ImportError, match="something else has replaced it"), use_in_trl():
        pass
    theirs._chunked_divergence_loss = ORIGINAL


def test_refuses_what_it_does_not_know(monkeypatch):
    with pytest.raises(ValueError, match="trainers must be of"), use_in_trl("gold"):
        pass
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda p: "1.99.0" if p == "trl" else version(p))
    with pytest.raises(ImportError, match=r"trl 1\.99\.0 is installed: pip install trl==1\.16\.0"):
        use_in_trl().__enter__()
