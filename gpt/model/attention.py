"""Causal self-attention with as many key-value heads as queries (MHA) or fewer (GQA, arXiv 2305.13245; one is MQA).

B batch, T time, S time with what a cache remembers (S = T without one), D width, H heads, K key-value heads, C head
width. The number of heads is read off the tensors, not off the config, so a layer whose matrices were sharded by heads
from outside still computes its own part.
"""

from __future__ import annotations

import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias, causal_lower_right

from gpt.config import AttentionBackend, ModelConfig
from gpt.model.kv_cache import LayerCache
from gpt.model.norm import build_norm
from gpt.model.position import build_rotation


class Attention(nn.Module):
    """Project to queries, keys and values, attend to the past, project back (arXiv 1706.03762, section 3.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.query = nn.Linear(config.n_embd, config.n_head * config.head_dim, bias=config.bias)
        self.key = nn.Linear(config.n_embd, config.kv_heads * config.head_dim, bias=config.bias)
        self.value = nn.Linear(config.n_embd, config.kv_heads * config.head_dim, bias=config.bias)
        self.output = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)
        # One gain for all heads, so that heads can be sharded.
        self.query_norm = build_norm(config, config.head_dim) if config.qk_norm else None
        self.key_norm = build_norm(config, config.head_dim) if config.qk_norm else None
        self.rope = build_rotation(config)
        self.backend = config.attention
        self.force_flash = config.force_flash
        self.dropout = config.dropout

    def forward(self, x_BTD: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Attend, (B, T, D) -> (B, T, D). With a cache, the T tokens come after those in it, and are added to it."""
        q_BTHC = self.query(x_BTD).unflatten(-1, (-1, self.head_dim))
        k_BTKC = self.key(x_BTD).unflatten(-1, (-1, self.head_dim))
        v_BTKC = self.value(x_BTD).unflatten(-1, (-1, self.head_dim))
        if self.query_norm is not None and self.key_norm is not None:
            # Under autocast a norm gives fp32, while the values stay bf16.
            q_BTHC, k_BTKC = self.query_norm(q_BTHC).type_as(v_BTKC), self.key_norm(k_BTKC).type_as(v_BTKC)
        if self.rope is not None:
            start = 0 if cache is None else cache.length
            q_BTHC, k_BTKC = self.rope(q_BTHC, start), self.rope(k_BTKC, start)
        q_BHTC, k_BKSC, v_BKSC = q_BTHC.transpose(1, 2), k_BTKC.transpose(1, 2), v_BTKC.transpose(1, 2)
        if cache is not None:
            k_BKSC, v_BKSC = cache.extend(k_BKSC, v_BKSC)
        y_BHTC = self.attend(q_BHTC, k_BKSC, v_BKSC)
        return self.output(y_BHTC.transpose(1, 2).flatten(2))

    def attend(self, q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor) -> Tensor:
        """Compute attention by the backend of the config, (B, H, T, C). The T queries belong to the last T of S keys.

        Replaced from outside where other ranks hold some of the keys.
        """
        dropout = self.dropout if self.training else 0.0
        if self.backend is AttentionBackend.manual:
            return manual_attention(q_BHTC, k_BKSC, v_BKSC, dropout)
        if self.backend is AttentionBackend.flash:
            return flash_attention(q_BHTC, k_BKSC, v_BKSC, dropout, self.force_flash and self.training)
        return sdpa_attention(q_BHTC, k_BKSC, v_BKSC, dropout)


def manual_attention(q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, dropout: float) -> Tensor:
    """Compute softmax(Q K^T / sqrt(C)) V with the future masked, as written: the reference, T x S in memory."""
    sharers = q_BHTC.size(1) // k_BKSC.size(1)
    if sharers > 1:
        k_BKSC, v_BKSC = k_BKSC.repeat_interleave(sharers, dim=1), v_BKSC.repeat_interleave(sharers, dim=1)
    future_TS = ~causal_mask(q_BHTC.size(2), k_BKSC.size(2), q_BHTC.device)
    scores_BHTS = (q_BHTC @ k_BKSC.mT) / math.sqrt(q_BHTC.size(3))
    weights_BHTS = scores_BHTS.masked_fill(future_TS, -math.inf).softmax(-1)
    return F.dropout(weights_BHTS, dropout) @ v_BKSC


def causal_mask(new: int, seen: int, device: torch.device) -> Tensor:
    """Build the causal mask of the last ``new`` queries over ``seen`` keys, (T, S): True where a query sees a key."""
    return torch.ones(new, seen, dtype=torch.bool, device=device).tril(seen - new)


FLASH_FIRST = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, *FLASH_FIRST]
HOPPER = (9, 0)
"""Compute capability from which cuDNN's attention is the fastest: torch's flash kernel, FlashAttention-2, was written
for the one before and reaches 35 % of the peak of an H100, where 75 % can be had (arXiv 2407.08608)."""


def prefer_fast_kernels(device: torch.device) -> AbstractContextManager[object]:
    """Context in which torch's choice of a fused attention kernel begins with the fastest one that ``device`` has.

    For the process, and entered once: on each call it would cost the host as much as an operation.
    """
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < HOPPER:
        return nullcontext()
    return sdpa_kernel(CUDNN_FIRST, set_priority=True)


def sdpa_attention(q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, dropout: float) -> Tensor:
    """Compute attention by torch's fused kernels, flash attention (arXiv 2307.08691) where device and dtype have it."""
    new, seen = q_BHTC.size(2), k_BKSC.size(2)
    # torch's is_causal lines the first query up with the first key. Where there are keys before, it is the last query
    # with the last key; a single one then sees them all. This bias is no T x S mask where a kernel can do without.
    bias = causal_bias(new, seen) if 1 < new < seen else None
    # enable_gqa narrows torch's choice of kernels, so it is asked for only where it is needed.
    grouped = q_BHTC.size(1) != k_BKSC.size(1)
    return F.scaled_dot_product_attention(
        q_BHTC, k_BKSC, v_BKSC, bias, dropout_p=dropout, is_causal=new == seen, enable_gqa=grouped
    )


@cache
def causal_bias(new: int, seen: int) -> CausalBias:
    """Build the bias with which the last ``new`` of ``seen`` tokens attend to the past: two lengths, no T x S mask.

    Cached, since torch cannot make one while selective activation checkpointing records an operation.
    """
    return causal_lower_right(new, seen)


def flash_attention(q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, dropout: float, force: bool) -> Tensor:
    """Compute attention by the flash kernel (arXiv 2307.08691) where it can run; elsewhere by another one.

    Raises:
        RuntimeError: ``force`` is set and the flash kernel cannot run.
    """
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION] if force else FLASH_FIRST, set_priority=True):
        return sdpa_attention(q_BHTC, k_BKSC, v_BKSC, dropout)


def find_flash_obstacle(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """Find out why the flash kernel cannot train this model on this device; None where it can.

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
            reason = parse_flash_reasons([str(w.message).split(" (Triggered")[0] for w in told]) or str(error)
            asked = f"{str(dtype).removeprefix('torch.')}, heads {config.head_dim} wide, dropout {config.dropout:g}"
            return f"torch has no flash kernel for {asked} on {device.type} ({reason.rstrip('.')})"
    return None


def parse_flash_reasons(told: list[str]) -> str:
    """Select the reasons about the flash kernel from torch's warnings: for each kernel a heading, then its reasons."""
    heading, reasons = "", []
    for line in told:
        if line.endswith("not used because:"):
            heading = line
        elif heading.startswith("Flash"):
            reasons.append(line)
    return "; ".join(reasons)
