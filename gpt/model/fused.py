"""Attention by torch's fused kernels, and whether the flash kernel is one of them on a device.

B batch, H heads, K key-value heads, C head width; T queries are the last of S positions (S = T without a cache).
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias, causal_lower_right

from gpt.config import ModelConfig

FLASH_FIRST = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def sdpa_attention(q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, dropout: float) -> Tensor:
    """torch's fused kernels, flash attention (arXiv 2307.08691) where the device and the dtype have it."""
    new, seen = q_BHTC.size(2), k_BKSC.size(2)
    # torch's is_causal lines the first query up with the first key. Where there are keys before, it is the last query
    # with the last key; a single one then sees them all. This bias is no T x S mask where a kernel can do without.
    bias = lower_right(new, seen) if 1 < new < seen else None
    # enable_gqa narrows torch's choice of kernels, so it is asked for only where it is needed.
    grouped = q_BHTC.size(1) != k_BKSC.size(1)
    return F.scaled_dot_product_attention(
        q_BHTC, k_BKSC, v_BKSC, bias, dropout_p=dropout, is_causal=new == seen, enable_gqa=grouped
    )


@cache
def lower_right(new: int, seen: int) -> CausalBias:
    """What each of the last ``new`` of ``seen`` tokens may look at: no numbers, only the two lengths.

    It is kept, since torch cannot make one while it records what recomputation is to keep.
    """
    return causal_lower_right(new, seen)


def flash_attention(q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, dropout: float, force: bool) -> Tensor:
    """The flash kernel (arXiv 2307.08691) where it can run; elsewhere another one, or with ``force`` a RuntimeError."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION] if force else FLASH_FIRST, set_priority=True):
        return sdpa_attention(q_BHTC, k_BKSC, v_BKSC, dropout)


def why_not_flash(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the flash kernel cannot train this model on this device, or None where it can.

    Found out by running it, forward and backward, on one sequence of the model's heads. ``dtype`` is that of the
    queries: bf16 under autocast, whatever the weights are.
    """
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            name = torch.cuda.get_device_name(device)
            return f"{name} has compute capability {major}.{minor}, and the flash kernel needs 8.0"
    q_BHTC = torch.zeros(1, config.n_head, 16, config.head_dim, dtype=dtype, device=device, requires_grad=True)
    k_BKSC = torch.zeros(1, config.kv_heads, 16, config.head_dim, dtype=dtype, device=device, requires_grad=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            flash_attention(q_BHTC, k_BKSC, k_BKSC, config.dropout, force=True).sum().backward()
        except RuntimeError as error:
            reason = flash_reason([str(w.message).split(" (Triggered")[0] for w in told]) or str(error)
            asked = f"{str(dtype).removeprefix('torch.')}, heads {config.head_dim} wide, dropout {config.dropout:g}"
            return f"torch has no flash kernel for {asked} on {device.type} ({reason.rstrip('.')})"
    return None


def flash_reason(told: list[str]) -> str:
    """What torch's warnings say about the flash kernel, among those about the others: a heading, then its reasons."""
    heading, reasons = "", []
    for line in told:
        if line.endswith("not used because:"):
            heading = line
        elif heading.startswith("Flash"):
            reasons.append(line)
    return "; ".join(reasons)
