"""cache_teacher() and CachedTeacher: a student learns from it what PyTorch gets from the teacher."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", reason="caches of a model of transformers")
from torch.utils._python_dispatch import TorchDispatchMode

from minitron_kernels.distillation.cache import outputs
from minitron_kernels.distillation.cache.fill import cache_teacher
from minitron_kernels.distillation.cache.fingerprint import (
    head_fingerprint,
    model_fingerprint,
    tokenizer_hash,
)
from minitron_kernels.distillation.cache.reader import TeacherCache, UncachedError
from minitron_kernels.distillation.cache.teacher import CachedTeacher
from minitron_kernels.distillation.causal_lm import attach
from minitron_kernels.distillation.loss import DistillationLoss
from minitron_kernels.distillation.stepping import step
from minitron_kernels.distillation.teacher import ModelTeacher
from pruning.tiny_models import tiny_model

V = 96
LENGTHS = (9, 4, 6)


@pytest.fixture(scope="module")
def teacher():
    return tiny_model("llama", seed=1)


def sequences(seed=0, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, V, (n,), generator=generator) for n in lengths]


def padded(rows, side="right"):
    T = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), T, dtype=torch.int64), torch.zeros(len(rows), T, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(T - len(row), T)
        ids[i, at], mask[i, at], labels[i, at] = row, 1, row
        labels[i, at.start] = -100  # no valid token is before it
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def packed(rows):
    return {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
    }


def live_logits(model, row):
    with torch.no_grad():
        return model(row[None]).logits[0].double()


def gradient(student, teacher, batch, **options):
    """(loss, gradient of the student's head and of its first layer) by step()."""
    student.zero_grad()
    record = step(student, teacher, batch, DistillationLoss(**options))
    record.loss.backward()
    return [record.loss.detach().double(), *(p.grad.double() for p in parameters(student))]


def parameters(student):
    return [student.get_output_embeddings().weight, student.model.layers[0].mlp.down_proj.weight]


def plain_gradient(student, batch, loss_of):
    """The same from full logits: loss_of(student's logits [T, V], row's number) -> [T] for each row."""
    student.zero_grad()
    total, count = 0.0, 0
    for i, mask in enumerate(batch["attention_mask"].bool()):
        row = batch["input_ids"][i][mask]
        per_token = loss_of(student(row[None]).logits[0].double(), i)[:-1]  # the last has no label
        total, count = total + per_token.sum(), count + len(per_token)
    (total / count).backward()
    return [(total / count).detach(), *(p.grad.double() for p in parameters(student))]


def assert_alike(got, want, tolerance=2e-5):
    for x, y in zip(got, want, strict=True):
        assert (x - y).norm() <= tolerance * y.norm(), (float((x - y).norm()), float(y.norm()))


@pytest.fixture
def student():
    return attach(tiny_model("llama", seed=2))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_topk_is_the_kl_of_k_and_one_outcomes(tmp_path, teacher, student, temperature):
    rows = sequences()
    options = {"k": 7, "temperatures": (1.0, 2.0), "quantiser": "fp32", "progress": False}
    run = cache_teacher(teacher, [padded(rows)], tmp_path / "c", **options)
    assert (run.added, run.skipped, run.tokens) == (3, 0, sum(LENGTHS))
    cached = CachedTeacher(tmp_path / "c")

    def k_and_one(logits, i):
        p = (live_logits(teacher, rows[i]) / temperature).softmax(-1)
        q = (logits / temperature).softmax(-1)
        ids = live_logits(teacher, rows[i]).topk(7).indices
        p, q = (torch.cat((x.gather(1, ids), 1 - x.gather(1, ids).sum(1, keepdim=True)), 1) for x in (p, q))
        return F.kl_div(q.log(), p, reduction="none").sum(1)

    want = plain_gradient(student, padded(rows), k_and_one)
    for side in ("right", "left"):
        assert_alike(gradient(student, cached, padded(rows, side), temperature=temperature), want)
    with pytest.raises(ValueError, match=r"temperature 1\.0, 2\.0, but the loss is at 3\.0"):
        gradient(student, cached, padded(rows), temperature=3.0)


def test_hidden_is_the_live_teacher_to_bf16(tmp_path, teacher, student):
    rows = sequences()
    cache_teacher(teacher, [padded(rows)], tmp_path / "c", tier="hidden", progress=False)
    cached = CachedTeacher(tmp_path / "c", head=teacher.get_output_embeddings())
    signal = cached(padded(rows), layers=(2,))
    assert torch.equal(signal.layers[2], signal.hidden) and signal.hidden.dtype == signal.head.dtype
    rounded = [teacher.model(row[None]).last_hidden_state[0].detach().bfloat16().double() for row in rows]
    head = teacher.get_output_embeddings().weight.detach().double()

    def full(logits, i):
        return F.kl_div(logits.log_softmax(-1), (rounded[i] @ head.T).softmax(-1), reduction="none").sum(1)

    # the padded batch's own rounding, once more rounded to bf16, can move an entry by one bf16 step
    assert_alike(gradient(student, cached, padded(rows)), plain_gradient(student, padded(rows), full), 1e-3)
    for layers in ((0,), (2, 1)):
        with pytest.raises(ValueError, match=r"keeps no output of layer [01].* or layer 2"):
            cached(padded(rows), layers)


def test_sampled_ids_are_drawn_from_the_teacher(tmp_path, teacher, student):
    rows = sequences(lengths=(3, 2))
    n = 20000
    cache_teacher(teacher, [padded(rows)], tmp_path / "c", tier="sampled", samples=n, progress=False)
    cached = CachedTeacher(tmp_path / "c")
    signal = cached(padded(rows))
    assert signal.log_tail is None
    for i, row in enumerate(rows):
        p = live_logits(teacher, row).softmax(-1)
        ids, logprobs = signal.ids[i, : len(row)], signal.logprobs[i, : len(row)].double()
        share = torch.zeros_like(p).scatter_add_(
            1, ids.clamp(min=0), torch.where(ids >= 0, logprobs.exp(), 0)
        )
        assert torch.allclose(share.sum(1), torch.ones(len(row), dtype=torch.float64))
        assert bool(((share - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 2 / n).all())

    def weights(logits, i):
        ids, logprobs = signal.ids[i, : len(rows[i])], signal.logprobs[i, : len(rows[i])].double()
        log_q = logits.log_softmax(-1).gather(1, ids.clamp(min=0))
        return torch.where(ids >= 0, logprobs.exp() * (logprobs.clamp(min=-99) - log_q), 0).sum(1)

    assert_alike(gradient(student, cached, padded(rows)), plain_gradient(student, padded(rows), weights))


@pytest.mark.parametrize("tier", ["topk", "sampled", "hidden"])
def test_the_cache_is_the_same_however_it_was_filled(tmp_path, teacher, tier):
    rows = sequences(lengths=(5, 3, 8, 3, 1))
    ways = {
        "padded": [padded(rows)],
        "left": [padded(rows, "left")],
        "packed": [packed(rows)],
        "alone": [row[None] for row in rows[::-1]],
    }
    caches = {}
    options = {"k": 6, "quantiser": "fp32"} if tier == "topk" else {}
    for name, batches in ways.items():
        run = cache_teacher(teacher, batches, tmp_path / name, tier=tier, progress=False, **options)
        assert run.cache.sequences == 5
        caches[name] = TeacherCache(tmp_path / name)
    for row in rows:
        want = caches["alone"].row(row)
        for cache in caches.values():
            got = cache.row(row)
            if tier != "sampled":
                for name, x in want.items():
                    assert torch.allclose(
                        got[name].float(), x.float(), rtol=1e-2 if tier == "hidden" else 1e-4, atol=1e-4
                    )
            else:  # a draw lies on a border of two ids now and then
                assert (got["ids"][:, :4] == want["ids"][:, :4]).float().mean() > 0.9


def test_what_is_there_is_skipped(tmp_path, teacher):
    rows = sequences(lengths=(4, 6, 5, 4))
    calls = []

    def counting(batch, layers=()):
        calls.append(batch["input_ids"].shape)
        return live(batch, layers)

    live = ModelTeacher(teacher)
    options = {"k": 3, "teacher_name": "tiny", "progress": False}
    cache_teacher(counting, [padded(rows[:2])], tmp_path / "c", **options)
    calls.clear()
    run = cache_teacher(
        counting, [padded(rows[:2]), padded(rows[1:]), padded(rows[2:])], tmp_path / "c", **options
    )
    assert (run.added, run.skipped, run.cache.sequences) == (2, 5, 4)
    assert calls == [(1, 1), (2, 5)]  # the one token that asks for sizes, and the two new sequences
    with pytest.raises(FileExistsError, match="resume=True"):
        cache_teacher(counting, [], tmp_path / "c", resume=False, **options)
    with pytest.raises(ValueError, match="teacher 'tiny' and not 'model:"):
        cache_teacher(teacher, [], tmp_path / "c", k=3, progress=False)


def test_no_logits_of_a_whole_batch(tmp_path, teacher, monkeypatch):
    largest = [0]

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (V,):
                largest[0] = max(largest[0], out.numel())
            return out

    rows = sequences(lengths=(60, 50))
    whole = {}
    for name, limit in (("many", 4 * V * 7), ("one", 1 << 30)):
        monkeypatch.setattr(outputs, "LOGIT_BYTES", limit)
        largest[0] = 0
        with Sizes():
            cache_teacher(teacher, [padded(rows)], tmp_path / name, k=4, teacher_name="t", progress=False)
        whole[name] = largest[0]
    assert whole["one"] >= 60 * V > whole["many"]
    for row in rows:
        for name, x in TeacherCache(tmp_path / "one").row(row).items():
            assert torch.allclose(x, TeacherCache(tmp_path / "many").row(row)[name], atol=1e-5)


def test_ids_by_mass(tmp_path, teacher):
    (row,) = sequences(lengths=(12,))
    cache_teacher(
        teacher, [row[None]], tmp_path / "c", k=60, mass=0.6, temperatures=(1.0, 3.0), progress=False
    )
    payload = TeacherCache(tmp_path / "c").row(row)
    p = live_logits(teacher, row).softmax(-1)
    best, ids = p.sort(descending=True)
    for t in range(12):
        k = int((best[t].cumsum(0) < 0.6).sum()) + 1
        assert payload["ids"][t, :k].tolist() == sorted(ids[t, :k].tolist())
        assert bool((payload["ids"][t, k:] == -1).all())
        rest = best[t, k:]
        for i, tau in enumerate((1.0, 3.0)):
            want = (rest ** (1 / tau)).sum().log()
            assert abs(float(payload["log_tail"][t, i] - want)) < 1e-4


def test_a_sequence_that_is_not_cached(tmp_path, teacher, student):
    rows = sequences()
    cache_teacher(teacher, [padded(rows[:2])], tmp_path / "c", k=5, progress=False)
    cached = CachedTeacher(tmp_path / "c")
    with pytest.raises(UncachedError, match=r"row 2 of the batch.*6 tokens.*of 2 sequences"):
        cached(padded(rows))
    cache_teacher(teacher, [padded(rows)], tmp_path / "all", k=5, progress=False)
    with_fallback = CachedTeacher(tmp_path / "c", fallback=teacher)
    got, want = with_fallback(padded(rows)), CachedTeacher(tmp_path / "all")(padded(rows))
    assert torch.equal(got.ids, want.ids) and torch.allclose(got.logprobs, want.logprobs, atol=1e-5)
    with pytest.raises(ValueError, match="fallback is not the teacher"):
        CachedTeacher(tmp_path / "c", fallback=tiny_model("llama", seed=5))


def test_the_head_must_be_the_cached_one(tmp_path, teacher):
    rows = sequences()
    cache_teacher(teacher, [padded(rows)], tmp_path / "c", tier="hidden", progress=False)
    weight = teacher.get_output_embeddings().weight.detach()
    teacher.save_pretrained(tmp_path / "model")
    want = CachedTeacher(tmp_path / "c", head=weight)(padded(rows))
    for head in (teacher.get_output_embeddings(), (weight, None), tmp_path / "model", weight.double()):
        got = CachedTeacher(tmp_path / "c", head=head)(padded(rows))
        assert torch.equal(got.head.float(), want.head) and torch.equal(got.hidden.float(), want.hidden)
    changed = weight.clone()
    changed[-1, -1] += 1e-3
    for head in (changed, weight.bfloat16(), weight[:-1]):
        with pytest.raises(ValueError, match="is not the one that was cached"):
            CachedTeacher(tmp_path / "c", head=head)
    with pytest.raises(TypeError, match="head must be given"):
        CachedTeacher(tmp_path / "c")
    cache_teacher(teacher, [padded(rows)], tmp_path / "topk", k=5, progress=False)
    with pytest.raises(TypeError, match="needs none"):
        CachedTeacher(tmp_path / "topk", head=weight)


class Tokenizer:
    def __init__(self, *tokens):
        self.tokens = tokens

    def get_vocab(self):
        return {token: i for i, token in enumerate(self.tokens)}


def test_a_student_of_another_vocabulary_is_refused(tmp_path, teacher):
    options = {"k": 5, "tokenizer": Tokenizer("a", "b"), "progress": False}
    cache_teacher(teacher, [padded(sequences())], tmp_path / "c", **options)
    CachedTeacher(tmp_path / "c", vocab_size=V, tokenizer=Tokenizer("a", "b"))
    with pytest.raises(ValueError, match="vocabulary of 96, and the student's has 97"):
        CachedTeacher(tmp_path / "c", vocab_size=97)
    with pytest.raises(ValueError, match="another tokenizer"):
        CachedTeacher(tmp_path / "c", tokenizer=Tokenizer("b", "a"))
    assert tokenizer_hash(Tokenizer("a", "b")).startswith("vocabulary:")
    with pytest.raises(ValueError, match="tokenizer"):
        cache_teacher(teacher, [], tmp_path / "c", **{**options, "tokenizer": None})


@pytest.mark.parametrize("tier", ["topk", "sampled", "hidden"])
def test_the_loss_refuses_a_student_of_another_vocabulary(tmp_path, teacher, tier):
    rows = sequences()
    cache_teacher(teacher, [padded(rows)], tmp_path / "c", tier=tier, progress=False)
    head = teacher.get_output_embeddings() if tier == "hidden" else None
    cached = CachedTeacher(tmp_path / "c", head=head)
    larger = attach(tiny_model("llama", seed=2, vocab_size=V + 4))
    with pytest.raises(ValueError, match=r"96.*100|100.*96"):
        step(larger, cached, padded(rows), DistillationLoss())
    assert step(larger, cached, padded(rows), DistillationLoss(vocab_size=V)).loss > 0


@pytest.mark.parametrize(
    ("tier", "options", "message"),
    [
        ("hidden", {"k": 5}, "k is not for tier 'hidden'"),
        ("hidden", {"temperatures": (2.0,)}, "temperatures is not for tier 'hidden'"),
        ("sampled", {"k": 5}, "k is for tier topk"),
        ("sampled", {"quantiser": "log8"}, "quantiser is not for tier 'sampled'"),
        ("topk", {"samples": 5}, "samples is not for tier 'topk'"),
        ("topk", {"quantiser": "log7"}, "quantiser must be one of"),
        ("topk", {"temperatures": (0.0,)}, "temperatures must be finite and above 0"),
        ("topk", {"temperatures": (2.0, 2)}, "temperatures must differ"),
        ("topk", {"mass": 1.5}, "mass must be"),
        ("topk", {"vocab_size": V + 1}, "at most the 96 rows"),
        ("best", {}, "tier must be one of"),
    ],
)
def test_options_that_cannot_be(tmp_path, teacher, tier, options, message):
    with pytest.raises(ValueError, match=message):
        cache_teacher(teacher, [], tmp_path / "c", tier=tier, teacher_name="t", progress=False, **options)
    assert not (tmp_path / "c").exists()


def test_fingerprints(teacher):
    assert model_fingerprint(teacher) == model_fingerprint(tiny_model("llama", seed=1))
    others = [tiny_model("llama", seed=3), tiny_model("llama", seed=1, dtype=torch.bfloat16)]
    others.append(tiny_model("llama", seed=1, rms_norm_eps=1e-3))
    changed = tiny_model("llama", seed=1)
    with torch.no_grad():
        changed.model.norm.weight[-1] += 1
    prints = {model_fingerprint(model) for model in (teacher, *others, changed)}
    assert len(prints) == 5
    weight = torch.randn(5, 3).bfloat16()
    assert head_fingerprint(weight) == head_fingerprint(weight.float())
    assert head_fingerprint(weight) != head_fingerprint(weight, torch.zeros(5))
    with pytest.raises(TypeError, match="teacher_name"):
        model_fingerprint(torch.nn.Linear(2, 2, device="meta"))


def test_adapters_are_part_of_a_teacher(tmp_path):
    """Their scale is in no weight, nor whether they are on."""
    peft = pytest.importorskip("peft", reason="needs peft")

    def adapted(alpha):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"], init_lora_weights=False)
        return peft.get_peft_model(tiny_model("llama", seed=1), config)

    on, off, scaled = ModelTeacher(adapted(4)), ModelTeacher(adapted(4), disable_adapters=True), adapted(8)
    made = {"tier": "topk", "k": 3, "progress": False}
    for number, teacher in enumerate((on, ModelTeacher(adapted(4)))):
        assert cache_teacher(teacher, [torch.tensor([[1, number]])], tmp_path / "c", **made).added == 1
    for other in (off, scaled):
        with pytest.raises(ValueError, match="is a cache with teacher"):
            cache_teacher(other, [torch.tensor([[1, 2, 4]])], tmp_path / "c", **made)
        with pytest.raises(ValueError, match="fallback is not the teacher that was cached"):
            CachedTeacher(tmp_path / "c", fallback=other)


def test_softcaps_and_scales(tmp_path):
    """Gemma 2 caps its logits; what is cached is what it says."""
    model = tiny_model("gemma2", seed=1)
    rows = sequences(lengths=(5,))
    cache_teacher(model, [rows[0][None]], tmp_path / "c", k=V, quantiser="fp32", progress=False)
    payload = TeacherCache(tmp_path / "c").row(rows[0])
    want = live_logits(model, rows[0]).log_softmax(-1).gather(1, payload["ids"])
    assert torch.allclose(payload["logprobs"].double(), want, atol=1e-5)
    cache_teacher(model, [rows[0][None]], tmp_path / "h", tier="hidden", progress=False)
    signal = CachedTeacher(tmp_path / "h", head=model.get_output_embeddings())({"input_ids": rows[0][None]})
    assert signal.softcap == model.config.final_logit_softcapping


def test_teachers_that_say_nothing_finite(tmp_path):
    model = tiny_model("llama", seed=1)
    live = ModelTeacher(model)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="not finite for the sequence of 4 tokens"):
        cache_teacher(live, [torch.tensor([[1, 2, 3, 4]])], tmp_path / "c", k=3, progress=False)
