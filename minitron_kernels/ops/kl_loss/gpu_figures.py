"""What plans for a GPU assume of it, and the seconds that GEMMs and epilogues take by that: predictions.

The rates are shares of the data sheets' peaks: 0.81 of the dense tensor cores' and 0.9 of the memory's, which
is what an H100 SXM reaches (798 TFLOP/s in bf16, 3.0 TB/s); those of the L2 caches are estimates.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch

LAUNCH_SECONDS = 4e-6  # from the end of one kernel to the start of the next
GEMM_TILE = (128, 256)  # of the vendor's GEMMs: an output tile that one SM works on


@dataclass(frozen=True)
class GpuFigures:
    """Rates of one kind of GPU, all of them assumed."""

    name: str
    sms: int
    gemm_flops: float  # a second, 16-bit operands
    gemm_fp32_flops: float  # fp32 operands, without TF32
    memory_bytes: float  # a second, read and written
    l2_bytes: float
    clusters: bool  # whether one launch makes statistics, loss and dz, with a row's second reads out of L2

    def gemm_rate(self, itemsize: int) -> float:
        """Flops a second of operands of so many bytes."""
        return self.gemm_flops if itemsize == 2 else self.gemm_fp32_flops

    def gemm_seconds(self, m: int, n: int, k: int, itemsize: int, out_itemsize: int) -> float:
        """Of [m, k] by [k, n]: a wave of tiles takes its time even where some SMs have nothing to do, and
        operands and product are moved at least once.
        """
        tiles = -(-m // GEMM_TILE[0]) * -(-n // GEMM_TILE[1])
        waves = -(-tiles // self.sms)
        multiplied = waves * self.sms * GEMM_TILE[0] * GEMM_TILE[1] * 2 * k / self.gemm_rate(itemsize)
        moved = (itemsize * k * (m + n) + out_itemsize * m * n) / self.memory_bytes
        return LAUNCH_SECONDS + max(multiplied, moved)

    def traffic_seconds(self, moved: float, out_of_l2: float = 0.0) -> float:
        """Of moving bytes from and to memory, and others out of L2 at the same time."""
        return max(moved / self.memory_bytes, (moved + out_of_l2) / self.l2_bytes)


_T = 1e12
FIGURES = {
    figures.name: figures
    for figures in (
        GpuFigures("A100", 108, 252 * _T, 15.7 * _T, 1.84 * _T, 4.0 * _T, False),
        GpuFigures("H100", 132, 798 * _T, 54 * _T, 3.0 * _T, 5.5 * _T, True),
        GpuFigures("H200", 132, 798 * _T, 54 * _T, 4.3 * _T, 5.5 * _T, True),
        GpuFigures("B200", 148, 1820 * _T, 65 * _T, 7.2 * _T, 10.0 * _T, True),
    )
}


def figures_of(device: torch.device) -> GpuFigures:
    """Those of the GPU at `device`; of an H100 where there is no GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return FIGURES["H100"]
    return _figures_of_index(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _figures_of_index(index: int) -> GpuFigures:
    properties = torch.cuda.get_device_properties(index)
    named = next((figures for name, figures in FIGURES.items() if name in properties.name), None)
    if named is None:  # the one that is most like it, by its generation
        named = FIGURES["B200" if properties.major >= 10 else "H100" if properties.major == 9 else "A100"]
    clusters = named.clusters and torch.version.hip is None
    return dataclasses.replace(named, sms=properties.multi_processor_count, clusters=clusters)
