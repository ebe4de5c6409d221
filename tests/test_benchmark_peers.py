"""The adapters of the benchmark's peers, where these are not installed: packages that stand in for them, with
the signatures of the pinned versions and the definitions of what they return.
"""

import sys

import pytest
import torch

from tools.benchmark_scripts import FOLDER

if not FOLDER.is_dir():  # an sdist may be tested without it
    pytest.skip("no benchmarks folder here", allow_module_level=True)

from kl_loss_rows import cases as _cases
from kl_loss_rows.implementation import step
from kl_loss_rows.peers import IMPLEMENTATIONS

DEFINITIONS = """
import torch
import torch.nn.functional as F

def forward_kl(student_logits, teacher_logits, rows):
    log_s, log_t = F.log_softmax(student_logits, -1), F.log_softmax(teacher_logits, -1)
    return (log_t.exp() * (log_t - log_s)).sum() / rows
"""
LIGER = """
class LigerFusedLinearJSDLoss:
    def __init__(self, weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.5, ignore_index=-100,
                 temperature=1.0, compiled=True, chunk_size=1024, return_soft_hard_loss=False):
        assert beta == 0.0, "0 is forward KL"
        self.hard, self.soft, self.ignore_index = weight_hard_loss, weight_soft_loss, ignore_index

    def __call__(self, student_input, student_weight, teacher_input, teacher_weight, true_labels):
        assert not teacher_weight.requires_grad and (true_labels != self.ignore_index).all()
        student = student_input @ student_weight.T
        hard = F.cross_entropy(student.float(), true_labels)
        soft = forward_kl(student, teacher_input @ teacher_weight.T, len(student))
        return self.hard * hard + self.soft * soft
"""
TRL_CHUNKED = """
def _chunked_divergence_loss(student_hidden, teacher_hidden, student_weight, teacher_weight,
                             completion_mask, beta, temperature=1.0):
    assert student_hidden.dim() == 3 and completion_mask.shape == student_hidden.shape[:2] and beta == 0.0
    student, teacher = student_hidden @ student_weight.T, teacher_hidden @ teacher_weight.T
    return forward_kl(student, teacher, completion_mask.sum()), None
"""
TRL_GKD = """
class GKDTrainer:
    @staticmethod
    def generalized_jsd_loss(student_logits, teacher_logits, labels=None, beta=0.5, temperature=1.0):
        assert student_logits.dim() == 3 and labels.shape == student_logits.shape[:2] and beta == 0.0
        return forward_kl(student_logits, teacher_logits, (labels != -100).sum())
"""
TORCHTUNE = """
class ForwardKLWithChunkedOutputLoss:
    def __init__(self, num_output_chunks=8, ignore_index=-100):
        self.chunks, self.ignore_index = num_output_chunks, ignore_index

    def __call__(self, student_logits, teacher_logits, labels):
        assert len(student_logits) == len(teacher_logits) == self.chunks
        student, teacher = torch.cat(student_logits), torch.cat(teacher_logits)
        # the cross-entropy part alone, without the teacher's entropy
        return -(teacher.softmax(-1) * student.log_softmax(-1)).sum() / (labels != self.ignore_index).sum()
"""
LIGER_FUNCTIONAL = """
def fused_linear_jsd(student_input, student_weight, teacher_input, teacher_weight, shift_labels=None,
                     jsd_beta=0.5, ignore_index=-100, temperature=1.0, *, impl=None, mode=None, backend=None):
    assert impl in ("nvidia-triton", "nvidia-cutedsl") and jsd_beta == 0.0 and shift_labels is None
    return forward_kl(student_input @ student_weight.T, teacher_input @ teacher_weight.T, len(student_input))
"""
LIGER_BACKENDS = """
def available_impls(op_name, device=None):
    assert op_name == "fused_linear_jsd"
    return ["nvidia-triton"]
"""
LIGER_OPS = """
class LigerFusedLinearScaledCrossEntropyFunction:
    @staticmethod
    def apply(_input, weight, target, temperature=1.0, ignore_index=-100):
        return F.cross_entropy((_input @ weight.T).float(), target, reduction="none")
"""
QUACK = """
def chunked_linear_cross_entropy(x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean",
                                 tuned=True, use_scaled_exp=None):
    assert chunk_size % 128 == 0, "its fast pipeline takes no other"
    return F.cross_entropy((x @ weight.T).float(), target, reduction=reduction)
"""
STAND_INS = {  # key of the row: file, what it defines
    "liger": ("liger_kernel/chunked_loss.py", LIGER),
    "torchtune": ("torchtune/modules/loss/kd_losses.py", TORCHTUNE),
    "trl": ("trl/trainer/distillation_trainer.py", TRL_CHUNKED),
    "trl-gkd": ("trl/experimental/gkd/gkd_trainer.py", TRL_GKD),
    "liger-jsd": ("liger_kernel/functional.py", LIGER_FUNCTIONAL),
    "liger-jsd-cute": ("liger_kernel/functional.py", LIGER_FUNCTIONAL),
    "liger-ce": ("liger_kernel/ops.py", LIGER_OPS),
    "quack-ce": ("quack/linear_cross_entropy.py", QUACK),
}


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Puts a package in front of what is installed, for one test."""

    def install(name, text):
        top = name.split("/")[0]
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in [path.parent, *path.parent.parents]:
            if folder == tmp_path:
                break
            (folder / "__init__.py").touch()
        path.write_text(DEFINITIONS + text)
        monkeypatch.syspath_prepend(tmp_path)
        for module in [name for name in sys.modules if name.split(".")[0] == top]:
            monkeypatch.delitem(sys.modules, module)
        return top

    before = set(sys.modules)
    yield install
    for name in set(sys.modules) - before:
        if name.split(".")[0] in {file.split("/")[0] for file, _ in STAND_INS.values()}:
            del sys.modules[name]


@pytest.mark.parametrize("key", STAND_INS)
def test_adapters_ask_for_the_forward_kl(stand_in, key):
    """Or the cross-entropy; with gradients, none for the teacher, whatever the peer's defaults are."""
    stand_in(*STAND_INS[key])
    check_adapter(key)


def check_adapter(key):
    row, inputs = IMPLEMENTATIONS[key], _cases.make_inputs(_cases.Case("tiny", 24, 16, 20, 301), "fp32")
    exact = _cases.truth(inputs, row.target)
    value = float(step(row.build(), inputs))
    if row.gives_loss:
        assert value == pytest.approx(exact.loss, rel=1e-5)
    assert _cases.relative_error(inputs.student_hidden.grad, exact.dX) < 1e-5
    assert _cases.relative_error(inputs.student_head.grad, exact.dW) < 1e-5
    assert inputs.teacher_head.grad is None


def test_cross_entropy_of_torch():
    """Torch's own, which newer ones have; an older torch says that it has not."""
    row = IMPLEMENTATIONS["torch-ce"]
    if reason := row.lacks():
        pytest.skip(reason)
    check_adapter("torch-ce")


def test_cross_entropy_of_an_older_torch(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    assert "has no chunked F.linear_cross_entropy" in IMPLEMENTATIONS["torch-ce"].absent("cuda")


def test_a_kernel_that_the_package_lacks_is_said(stand_in, monkeypatch):
    """Liger is installed, with Triton but without CuTe, on a GPU that its cross-entropy is not for."""
    monkeypatch.setattr(type(IMPLEMENTATIONS["liger-jsd"]), "version", lambda _: "1")
    stand_in("liger_kernel/functional.py", LIGER_FUNCTIONAL)
    stand_in("liger_kernel/backends.py", LIGER_BACKENDS)
    assert IMPLEMENTATIONS["liger-jsd"].absent("cuda") is None
    assert (
        IMPLEMENTATIONS["liger-jsd-cute"].absent("cuda") == "Liger has nvidia-triton here, not nvidia-cutedsl"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert IMPLEMENTATIONS["liger-ce"].absent("cuda") == "Liger's CuTe kernel is for sm_90, here is sm_80"


def test_a_package_without_the_registry_is_said(stand_in, monkeypatch):
    monkeypatch.setattr(type(IMPLEMENTATIONS["liger-jsd"]), "version", lambda _: "1")
    stand_in("liger_kernel/other.py", "")
    assert "ModuleNotFoundError" in IMPLEMENTATIONS["liger-jsd"].absent("cuda")


def test_every_peer_has_a_stand_in():
    """Or compiles, or takes what only a GPU has."""
    peers = {key for key, row in IMPLEMENTATIONS.items() if row.package not in (None, "minitron-kernels")}
    assert peers - set(STAND_INS) == {key for key in peers if IMPLEMENTATIONS[key].compiles} | {"liger-kl"}
