"""A training step of each public function with all that it can be told of tokens, on any device."""

import torch

import minitron_kernels as mk

N, V, H, HT, K = 24, 520, 40, 56, 8
NAMES = ("linear_kl_loss", "kl_loss", "linear_sparse_kl_loss", "sparse_kl_loss")


class Call:
    """step() gives the record and the gradients, on whatever the tensors hold by then."""

    def __init__(self, name, device, dtype=torch.bfloat16):
        g = torch.Generator().manual_seed(0)

        def normal(*shape, scale=1.0):
            return (torch.randn(*shape, generator=g) * scale).to(device, dtype)

        self.name, self.function = name, getattr(mk, name)
        head, of_teacher = normal(V, H, scale=H**-0.5), (normal(N, HT), normal(V, HT, scale=HT**-0.5))
        logits = of_teacher[0].double() @ of_teacher[1].double().T
        if "sparse" in name:
            logprobs, ids = logits.log_softmax(1).topk(K, 1)
            teacher = (ids, logprobs.float(), torch.log1p(-logprobs.exp().sum(1)).float())
        else:
            teacher = of_teacher if "linear" in name else (logits.to(dtype),)
        student = (normal(N, H), head) if "linear" in name else (normal(N, V),)
        self.leaves = [x.requires_grad_() for x in student]
        self.teacher = teacher
        labels = torch.randint(0, V, (N,), generator=g)
        labels[::5] = -100
        self.tokens = {
            "labels": labels.to(device),
            "mask": (torch.arange(N) % 7 != 3).to(device),
            "token_weights": torch.linspace(0.5, 1.5, N).to(device),
            "num_items": torch.tensor(11.0).to(device),
        }

    def step(self, backend):
        """The record's tensors, then the gradients."""
        for leaf in self.leaves:
            leaf.grad = None
        options = {"ce_weight": 0.5, "label_smoothing": 0.1, "return_parts": True, "backend": backend}
        record = self.function(*self.leaves, *self.teacher, **self.tokens, **options)
        record.loss.backward()
        return [x.detach() for x in record] + [leaf.grad for leaf in self.leaves]


def assert_as_reference(found, expected):
    """Of a step with operands of 16 bit."""
    for a, b in zip(found[:6], expected[:6], strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-4, atol=0)
    for a, b in zip(found[6:], expected[6:], strict=True):
        assert (a.double() - b.double()).norm() <= 5e-3 * b.double().norm()
