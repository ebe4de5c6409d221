"""Log-probabilities as integer codes: "fp32", "fp16", "log8" to "log16", each with its worst error.

Codes rise as log p falls: 0 is log p = 0, the highest is log p = -inf, both exact. In between "log8" to
"log16" place their values evenly in u = l / (l + 8), l = -log p in [0, 40], so that the step grows as
(l + 8)**2: fine where p is large, coarse where p is too small to matter. Of all laws tried (even in log p,
logarithmic, powers of l + a) on Zipf-like and log-normal teachers of 131072 tokens this one loses least: KL
(teacher, decoded) is about 1e-4 nats at 8 bits, 4e-6 at 10 and 3e-7 at 12; even steps in log p lose 7 times
as much. With the worst error e at a log-probability l, p is wrong by p (exp(e) - 1) at most.

Rounding can move the sum of k probabilities by as much as each of them: sum_to_one() brings it back.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_kernels.distillation.cache.spec import bits_of

LOWEST = -40.0  # the range [LOWEST, 0] in which worst errors are declared: exp(-40) = 4e-18
_KNEE = 8.0  # the a of u = l / (l + a)
# x - logsumexp(x) is above 0 by so much in fp32, for |x| of some hundreds
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Quantiser:
    """Codes of log-probabilities; made by quantiser().

    For log p in [-40, 0] |decode(encode(log p)) - log p| <= worst_error, and <= error_at(log p). -inf and 0
    stay what they are. "log8" to "log16" take what is below -40 for -40, "fp16" what is below -65504 for
    -65504 (p is 0 in float32 there).
    """

    name: str  # "fp32", "fp16", "log8" ... "log16"
    bits: int  # codes are in [0, 2**bits)
    worst_error: float  # nats, of a log-probability in [-40, 0]
    # p decoded / p - 1 in absolute value at most, for p >= exp(-40): exp(worst_error) - 1
    worst_relative_error: float
    worst_absolute_error: float  # of p, at most: the maximum of p (exp(error_at(log p)) - 1)

    def encode(self, logprobs: Tensor) -> Tensor:
        """Codes [...] int32 of log-probabilities [...], of any floating dtype and on any device.

        The nearest value is taken, between two equally near ones the higher. Up to 1e-4 above 0 counts as 0,
        as x - logsumexp(x) rounds.

        Raises:
            TypeError: `logprobs` is not a tensor of floating point numbers.
            ValueError: a value is NaN or above 0.
        """
        x = _checked("logprobs", logprobs).to(torch.float32)
        low, high = (float(v) for v in x.aminmax()) if x.numel() else (0.0, 0.0)
        if not high <= _ROUNDING or math.isnan(low):
            wrong = ~(x <= _ROUNDING)
            place = tuple(wrong.nonzero()[0].tolist())
            raise ValueError(
                f"logprobs must be logarithms of probabilities, at most 0 and not NaN; got {float(x[place])} "
                f"at {list(place)}: pass log_softmax of the logits"
            )
        less = (-x).clamp_min(0.0) + 0.0  # l, without -0.0
        if self.name == "fp32":
            return less.view(torch.int32).clone()  # of numbers >= 0 the bits are in order, too
        if self.name == "fp16":
            largest = torch.finfo(torch.float16).max
            half = torch.where(less < math.inf, less.clamp_max(largest), less).to(torch.float16)
            return half.view(torch.int16).to(torch.int32)
        _, between = _levels(self.bits)
        codes = torch.bucketize(less, between.to(x.device), out_int32=True)
        return torch.where(less < math.inf, codes, (1 << self.bits) - 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Log-probabilities [...] float32 of codes [...] of any integer dtype.

        encode(decode(codes)) is `codes`. Their exp() need not sum to 1: see sum_to_one().

        Raises:
            TypeError: `codes` is not a tensor of integers.
            ValueError: a code is out of range.
        """
        if not isinstance(codes, Tensor) or codes.dtype.is_floating_point or codes.dtype == torch.bool:
            got = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
            raise TypeError(f"codes must be a tensor of integers, got {got}")
        codes = codes.to(torch.int64)
        if codes.numel():
            low, high = (int(v) for v in codes.aminmax())
            if low < 0 or high > self.last_code:
                wrong = low if low < 0 else high
                raise ValueError(f"codes of {self.name} must be in [0, {self.last_code}], got {wrong}")
        if self.name == "fp32":
            return 0.0 - codes.to(torch.int32).view(torch.float32)
        if self.name == "fp16":
            return 0.0 - codes.to(torch.int16).view(torch.float16).to(torch.float32)
        values, _ = _levels(self.bits)
        return values.to(codes.device)[codes]

    def sum_to_one(self, logprobs: Tensor, log_tail: Tensor) -> Tensor:
        """Shifts each position's decoded log-probabilities so that they sum to 1 with the tail.

            log p_i + log((1 - exp(log_tail)) / sum_j p_j)

        The errors that a position's codes have in common go, an error is at most twice that of the codes, and
        linear_sparse_kl_loss(), which refuses sums that are 1 % off, accepts every position. To be used after
        decode() wherever the loss has a tail; a tail is best stored as float32.

        Args:
            logprobs: [..., k] of decode(), -inf where there is no id.
            log_tail: [...] floating point, log of the other tokens' probability at temperature 1.

        Returns:
            [..., k] float32.

        Raises:
            TypeError: one of them is not a tensor of floating point numbers.
            ValueError: shapes differ, a tail is above 0 or NaN, or a position's sum is further off than
                rounding explains and 1 %: it never was 1, or the data are damaged. The position is named.
        """
        x, tail = _checked("logprobs", logprobs).to(torch.float32), _checked("log_tail", log_tail)
        if x.dim() < 1 or x.shape[:-1] != tail.shape:
            raise ValueError(f"log_tail must be {list(x.shape[:-1])}, one a position; got {list(tail.shape)}")
        if tail.numel() == 0:
            return x
        tail = tail.to(torch.float64)
        _refuse(~(tail <= _ROUNDING), tail, "log_tail must be at most 0 and not NaN")
        wanted = -torch.expm1(tail.clamp_max(0.0))
        mass = x.to(torch.float64).exp().sum(-1)
        # p times the error is concave in p: k codes are together at their worst where all have p = 1 / k
        even = torch.tensor(-math.log(max(1, x.shape[-1])), dtype=torch.float32, device="cpu")
        slack = 2 * float(self.error_at(even))
        off = (mass - wanted).abs() - wanted * slack
        _refuse(~(off <= 0.01), mass + tail.exp(), "the probabilities and exp(log_tail) must sum to 1")
        # nothing to shift where the ids have no probability, and nothing but rounding where the tail has all
        shift = torch.where((wanted > 0) & (mass > 0), wanted.log() - mass.log(), 0.0)
        return (x + shift[..., None].to(torch.float32)).clamp_max(0.0)

    @property
    def last_code(self) -> int:
        """The code of -inf, the highest that there is."""
        return {"fp32": 0x7F800000, "fp16": 0x7C00}.get(self.name, (1 << self.bits) - 1)

    def error_at(self, logprobs: Tensor) -> Tensor:
        """The worst error [...] float64, in nats, of log-probabilities [...] in [-40, 0], each for itself.

        It is half the step there, and what float32 rounds.
        """
        less = (-_checked("logprobs", logprobs).to(torch.float64)).clamp(0.0, -LOWEST)
        ulp = less * 2.0**-23 + 2.0**-149
        if self.name == "fp32":
            return ulp  # none but that of another dtype's rounding to float32
        if self.name == "fp16":
            return 2.0 ** (less.clamp_min(2.0**-14).log2().floor() - 11) + ulp
        values = -_levels(self.bits)[0][:-1].to(less.device, torch.float64)
        upper = torch.searchsorted(values, less).clamp(1, values.numel() - 1)
        return (values[upper] - values[upper - 1]) / 2 + ulp


def quantiser(name: str) -> Quantiser:
    """The quantiser of this name: "fp32" (exact), "fp16", or "log8" to "log16" with so many bits.

    | name | bits | worst error, nats | of p, at most |
    |---|---|---|---|
    | log8 | 8 | 0.47 at log p = -40, 0.013 at 0 | 0.013 |
    | log10 | 10 | 0.12 at -40, 0.0033 at 0 | 0.0033 |
    | log12 | 12 | 0.029 at -40, 0.00082 at 0 | 0.00082 |
    | log16 | 16 | 0.0019 at -40, 0.000051 at 0 | 0.000051 |
    | fp16 | 16 | 0.016 below -32, 0.00049 from -2 to -1 | 0.00018 |

    Raises:
        ValueError: there is none of this name.
    """
    return _made(name, bits_of(name))


@functools.cache
def _made(name: str, bits: int) -> Quantiser:
    bare = Quantiser(name, bits, 0.0, 0.0, 0.0)
    grid = torch.linspace(LOWEST, 0.0, 40_001, dtype=torch.float64, device="cpu")
    errors = bare.error_at(grid)
    worst = float(errors.max())
    of_p = float((grid.exp() * errors.expm1()).max())
    return Quantiser(name, bits, worst, math.expm1(worst), of_p)


@functools.cache
def _levels(bits: int) -> tuple[Tensor, Tensor]:
    """(log-probabilities [2**bits] float32 by code, the l half-way between two codes [2**bits - 2])."""
    last = (1 << bits) - 2  # of the finite ones
    u = torch.arange(last + 1, dtype=torch.float64, device="cpu") / last * (-LOWEST / (-LOWEST + _KNEE))
    less = (_KNEE * u / (1 - u)).to(torch.float32)
    less[last] = -LOWEST
    between = ((less[1:].to(torch.float64) + less[:-1].to(torch.float64)) / 2).to(torch.float32)
    return torch.cat((0.0 - less, less.new_tensor([-math.inf]))), between


def _refuse(wrong: Tensor, values: Tensor, what: str) -> None:
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(f"{what}; got {float(values[place]):.6g} at position {list(place)}")


def _checked(name: str, x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a tensor of floating point numbers, got {got}")
    return x.detach()
