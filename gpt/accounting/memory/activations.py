"""What a forward pass keeps for its backward pass, tensor by tensor.

D width, H heads, K key-value heads, C head width, F inner width of the ffn, T block size, L layers, E experts.
"""

from __future__ import annotations

from gpt.accounting.flops import expert_rows
from gpt.accounting.memory.units import BF16, FP32, INT64
from gpt.config import Activation, AttentionBackend, Ffn, ModelConfig, Norm, NormPosition, Precision, Recompute


def activations(model: ModelConfig, sequences: int, precision: Precision, recompute: Recompute = Recompute.none) -> int:
    """Bytes kept from the forward pass over ``sequences`` sequences, logits and weights not counted.

    A sum over the tensors that autograd saves, after Korthikanti et al. (arXiv 2205.05198, section 4.1), adapted to
    the parts here: the residual stream and the norms are fp32 in bf16 too (autocast), and each matrix casts its input
    for itself. It is what torch keeps on the CPU, and a bound from above for CUDA, whose RMSNorm does not keep the
    normalized input and whose dropout keeps a byte for each element. The fused attention kernel keeps no T x T matrix;
    with dropout torch has none for the CPU, and needs there what ``manual`` needs.

    Where blocks are recomputed, each keeps its input, and with ``selective`` the results of its products; of one block
    at a time everything is there again.
    """
    tokens = sequences * model.block_size
    width = BF16 if precision is Precision.bf16 else FP32
    embedding = INT64 + dropout_bytes(model, FP32)
    final = width * model.n_embd + (norm_bytes(model) if model.norm_position is NormPosition.pre else 0)
    around, block = tokens * (embedding + final), block_bytes(model, sequences, width)
    if recompute is Recompute.none:
        return around + model.n_layer * block
    products = product_bytes(model, sequences, width) if recompute is Recompute.selective else 0
    return around + (model.n_layer - 1) * (tokens * FP32 * model.n_embd + products) + block


def block_bytes(model: ModelConfig, sequences: int, width: int) -> int:
    """Everything one block keeps for its backward pass."""
    tokens = sequences * model.block_size
    kept = tokens * (attention_bytes(model, width) + ffn_bytes(model, width))
    if model.ffn is Ffn.moe:
        kept += expert_bytes(model, sequences, width)
    if model.parallel_residual:
        kept -= tokens * FP32 * model.n_embd  # both norms keep the same input
    if model.attention is AttentionBackend.manual:
        kept += model.block_size**2  # the mask, one byte for each pair
    return kept


def product_bytes(model: ModelConfig, sequences: int, width: int) -> int:
    """Results of the matrix products of one block, the attention kernel's among them (gpt/execution.py says which)."""
    tokens, up = sequences * model.block_size, 2 if model.gated else 1
    queries, keys = model.n_head * model.head_dim, model.kv_heads * model.head_dim
    pairs = model.n_head * model.block_size
    written_out = model.attention is AttentionBackend.manual or bool(model.dropout)
    attention = width * (2 * queries + 2 * keys + model.n_embd)
    attention += width * pairs if written_out else FP32 * model.n_head
    if model.ffn is not Ffn.moe:
        return tokens * (attention + width * (up * model.ffn_width + model.n_embd))
    shared = model.n_shared_expert * model.ffn_width
    mixture = FP32 * model.n_expert + (width * (up * shared + model.n_embd) if shared else 0)
    rows = sequences * expert_rows(model)
    return tokens * (attention + mixture) + rows * width * (up * model.ffn_width + model.n_embd)


def norm_bytes(model: ModelConfig, norms: int = 1, width: int | None = None) -> int:
    """Per token: input and statistics of ``norms`` norms over ``width`` (D), fp32."""
    width = model.n_embd if width is None else width
    return FP32 * norms * (2 * width + 1 if model.norm is Norm.rmsnorm else width + 2)


def read_bytes(model: ModelConfig, width: int, readers: int) -> int:
    """Per token: what matrices that read the same tensor keep of it; one tensor, or in bf16 each its own cast."""
    return (readers if width == BF16 else 1) * width * model.n_embd


def attention_bytes(model: ModelConfig, width: int) -> int:
    """Per token of one layer: norm, queries, keys, values, what the kernel keeps of the T x T pairs, and its result."""
    queries, keys = model.n_head * model.head_dim, model.kv_heads * model.head_dim
    if model.attention is AttentionBackend.manual:
        pairs = 3 if model.dropout else 1  # softmax; and with dropout its noise and its result
        kept = width * (4 * queries + pairs * model.n_head * model.block_size)
    else:
        kept = width * (2 * queries + 2 * keys) + FP32 * model.n_head  # and the log-sum-exp of every row
    if model.qk_norm:
        kept += norm_bytes(model, model.n_head + model.kv_heads, model.head_dim)
        if model.norm is not Norm.rmsnorm:
            kept -= (FP32 - width) * (queries + keys)  # LayerNorm keeps what it is given as it is
    return norm_bytes(model) + read_bytes(model, width, readers=3) + kept + dropout_bytes(model, width)


def ffn_bytes(model: ModelConfig, width: int) -> int:
    """Per token of one layer: norm, and what the feed-forward layer keeps."""
    around = norm_bytes(model) + dropout_bytes(model, width)
    if model.ffn is not Ffn.moe:
        return around + dense_bytes(model, width, model.ffn_width)
    kept = around + mixture_bytes(model, width)
    if model.n_shared_expert:
        kept += dense_bytes(model, width, model.n_shared_expert * model.ffn_width)
        kept -= 0 if width == BF16 else width * model.n_embd  # the router keeps the same input
    return kept


def dense_bytes(model: ModelConfig, width: int, inner: int) -> int:
    """Per token: the input, once for each matrix that reads it, and the inner tensors."""
    return read_bytes(model, width, readers=2 if model.gated else 1) + width * inner_tensors(model) * inner


def inner_tensors(model: ModelConfig) -> int:
    """Tensors of the inner width that the activation and the last matrix keep."""
    if model.gated:
        return 4  # gate, activation of the gate, up, and their product
    return 1 if model.ffn_activation is Activation.relu else 2  # ReLU needs its result only


def mixture_bytes(model: ModelConfig, width: int) -> int:
    """Per token: the router, in fp32; the results of its experts, and where they were computed."""
    chosen, indices = model.n_expert_per_token, 2 if model.capacity_factor else 3
    router = FP32 * (model.n_embd + 2 * model.n_expert + 2) + chosen * (2 * FP32 + indices * INT64)
    return router + chosen * width * model.n_embd


def expert_bytes(model: ModelConfig, sequences: int, width: int) -> int:
    """The rows that the experts of one layer are given, and their inner tensors."""
    rows = sequences * expert_rows(model) + (1 if model.capacity_factor else 0)
    return rows * width * (model.n_embd + inner_tensors(model) * model.ffn_width)


def dropout_bytes(model: ModelConfig, width: int) -> int:
    """Per token: the noise of one dropout over the residual width."""
    return width * model.n_embd if model.dropout else 0
