"""Utilization of a device's peak: MFU and HFU by the usual conventions.

Torch-free arithmetic. Must not measure anything.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpt.accounting.flops import Flops
from gpt.accounting.hardware import TERA


@dataclass(frozen=True)
class Utilization:
    """Rate of one rank, and its share of the peak; None where the peak is unknown."""

    tflops_per_s: float
    """Model TFLOP/s by the PaLM convention."""
    mfu_palm: float | None
    """Model FLOPs utilization by the PaLM convention (arXiv 2204.02311, appendix B), 0 to 1."""
    mfu_causal: float | None
    """MFU with causal attention halved."""
    hfu: float | None
    """Hardware FLOPs utilization: counts what is recomputed as well (PaLM, as above)."""


def utilization(
    flops_per_token: Flops, tokens_per_s: float, peak_flops_per_s: float | None, recomputed_per_token: int = 0
) -> Utilization:
    """Compute the utilization of one rank.

    Args:
        flops_per_token: of training, from ``training_flops_per_token``.
        tokens_per_s: of this rank, not of the whole run.
        peak_flops_per_s: of this rank's device, from ``peak_flops``.
        recomputed_per_token: FLOPs recomputed in the backward pass, from ``recomputed_flops_per_token``.
    """
    rate = flops_per_token.palm * tokens_per_s
    if peak_flops_per_s is None:
        return Utilization(rate / TERA, None, None, None)
    palm = rate / peak_flops_per_s
    causal = flops_per_token.causal * tokens_per_s / peak_flops_per_s
    return Utilization(rate / TERA, palm, causal, hfu=palm + recomputed_per_token * tokens_per_s / peak_flops_per_s)
