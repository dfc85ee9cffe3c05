"""Linear and normalization layers, positions of tokens, and the cross-entropy loss.

The letters of shapes are listed above the class ``GPT`` in gpt/model/gpt.py. In a norm D is the normalized dimension,
and N the product of all other dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from gpt.components import load_part
from gpt.config import (
    LOGITS_AT_ONCE,
    LOSS_CHUNK,
    ModelConfig,
    Norm,
    Position,
    Precision,
    RopeScaling,
    TrainConfig,
)


def build_norm(config: ModelConfig, width: int | None = None) -> nn.Module:
    """Build the normalization layer that ``config.norm`` names, (..., width) -> (..., width).

    ``layernorm`` has a gain and a shift (arXiv 1607.06450), ``layernorm_nobias`` and ``rmsnorm`` (arXiv 1910.07467) a
    gain only. A class of the user is constructed with the config and the width. A ``width`` of None means n_embd.
    """
    width = config.n_embd if width is None else width
    if isinstance(config.norm, str):
        return load_part("model.norm", config.norm)(config, width)
    if config.norm is Norm.rmsnorm:
        return RmsNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.norm is Norm.layernorm)


class RmsNorm(nn.RMSNorm):
    """torch's RMSNorm. On CPUs in fp32 it computes with ``RmsNormOnCpu`` instead of a dozen operations of torch."""

    def forward(self, x: Tensor) -> Tensor:
        # Compilers fuse these operations; DTensors and other kinds of tensors support only torch's own operations.
        plain = type(x) is Tensor and type(self.weight) is nn.Parameter and not torch.compiler.is_compiling()
        if plain and x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32:
            return RmsNormOnCpu.apply(x, self.weight, self.eps)
        return super().forward(x)


class RmsNormOnCpu(torch.autograd.Function):
    """RMSNorm in few passes over memory: x times a gain (D,), divided by the root mean square of x over D, in fp32
    (arXiv 1910.07467, equation 4)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()
        normalized = x * scale
        # Keeps two tensors of the size of x, like torch's own operations; the memory plan counts two for every
        # precision.
        ctx.save_for_backward(x, gain_D, scale, normalized)
        return normalized * gain_D

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain_D, scale, normalized = ctx.saved_tensors
        product_ND = (gradient * x).flatten(0, -2)
        gain_gradient_D = product_ND.mT @ scale.flatten()
        # The derivative of the root: along x, by the mean of gradient x gain x.
        along = (product_ND @ gain_D).view_as(scale).mul_(scale.square()).div_(-x.size(-1))
        x_gradient = torch.mul(normalized, along, out=product_ND.view_as(x))
        return x_gradient.addcmul_(gradient * gain_D, scale), gain_gradient_D, None


class Linear(nn.Linear):
    """torch's linear layer. On CPUs in fp32 it computes with oneDNN (``LinearOnCpu``)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Compute a linear layer: ``x`` times the transpose of its matrix, plus its bias if any, (..., I) -> (..., O)."""
    plain = type(x) in (Tensor, nn.Parameter) and type(weight_OI) is nn.Parameter  # not a DTensor
    fp32 = x.dtype == weight_OI.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if plain and fp32 and x.device.type == "cpu":
        return LinearOnCpu.apply(x, weight_OI, bias_O)
    return F.linear(x, weight_OI, bias_O)


class LinearOnCpu(torch.autograd.Function):
    """Linear layer in fp32 on a CPU. oneDNN computes the result and the gradient of the input; torch computes the
    gradient of the matrix.

    Without this class, torch computes all three with MKL. On a CPU of AMD, oneDNN needs 8 to 14 % less time for the
    first two, and more time for the third. CPUs of Intel were not measured.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return torch.ops.gpt.onednn_linear(x, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        rows_RO, (needs_x, needs_weight, needs_bias) = gradient.flatten(0, -2), ctx.needs_input_grad
        return (
            torch.ops.gpt.onednn_linear(gradient, weight_OI.mT, None) if needs_x else None,
            rows_RO.mT @ x.flatten(0, -2) if needs_weight else None,
            rows_RO.sum(0) if needs_bias else None,
        )


# The product as an operation of this package: torch.compile knows its shape, and FlopCounterMode its arithmetic.
torch.library.define("gpt::onednn_linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.impl("gpt::onednn_linear", "cpu")
def onednn_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """Compute a linear layer on a CPU with oneDNN, (..., I) -> (..., O)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias_O, "none", [], "")


@torch.library.register_fake("gpt::onednn_linear")
def onednn_shape(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """Return an uninitialized tensor with the shape of the result of ``onednn_linear``, (..., O). The compiler uses
    this function to find the shape."""
    return x.new_empty(*x.shape[:-1], len(weight_OI))


@register_flop_formula(torch.ops.gpt.onednn_linear)
def onednn_flops(x_shape: torch.Size, weight_shape: torch.Size, *_: Any, **__: Any) -> int:
    """Return the FLOPs of ``onednn_linear``: two for each multiplication with an addition."""
    return 2 * x_shape.numel() * weight_shape[0]


def rows_of(start: int | Tensor, tokens: int, positions_T: Tensor | None) -> slice | Tensor:
    """Return the positions of tokens, to index the rows of a table that has a row for each position.

    Args:
        start: index of the first token. If it is a tensor with the positions of all tokens, (B, T), return it.
        tokens: number of tokens of each sequence, T.
        positions_T: needed if this rank has only some tokens of each sequence: the positions of these tokens in the
            whole sequence. ``start`` is then an index into ``positions_T``. None if the index of a token is its
            position.
    """
    if isinstance(start, Tensor):
        return start
    rows = slice(start, start + tokens)
    return rows if positions_T is None else positions_T[rows]


class LearnedPosition(nn.Module):
    """Learned table with a row for each position, (block_size, D). The forward pass adds the row of a token's position
    to the embedding of this token (GPT-2)."""

    def __init__(self, block_size: int, n_embd: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(block_size, n_embd))
        nn.init.normal_(self.weight, std=0.02)
        self.positions_T: Tensor | None = None

    def forward(self, x_BTD: Tensor, start: int | Tensor = 0) -> Tensor:
        rows = rows_of(start, x_BTD.size(1), self.positions_T)
        return x_BTD + (self.weight[rows] if isinstance(rows, slice) else F.embedding(rows, self.weight))


class Rope(nn.Module):
    """Rotary embeddings (RoFormer, arXiv 2104.09864): queries and keys are turned by an angle that grows with position.

    Channel c is paired with channel c + C/2, as in the Llama weights. The paper pairs c with c + 1; the two differ by a
    permutation of the rows of the query and key matrices.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        shape = (config.block_size, config.rotary_width // 2)
        self.register_buffer("cos", torch.empty(shape), persistent=False)
        self.register_buffer("sin", torch.empty(shape), persistent=False)
        self.positions_T: Tensor | None = None
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Compute the tables of cosines and sines, and copy them to their device in place.

        They are computed on the CPU in float64, so that they have the same bits on every device, and exact angles at
        large positions.
        """
        positions = torch.arange(self.config.block_size, dtype=torch.float64, device="cpu")
        angles = torch.outer(positions, rotation_rates(self.config))
        stretch = 1.0
        if self.config.rope_scaling is RopeScaling.yarn:  # of both, so that scores grow by its square
            stretch = 0.1 * math.log(self.config.rope_factor) + 1
        self.cos.copy_(stretch * angles.cos())
        self.sin.copy_(stretch * angles.sin())

    def forward(self, x_BTHC: Tensor, start: int | Tensor = 0) -> Tensor:
        rows = rows_of(start, x_BTHC.size(1), self.positions_T)
        # fp32 tables promote bf16 queries and keys, while the values stay bf16.
        turned: Tensor = Rotation.apply(x_BTHC, self.cos[rows, None], self.sin[rows, None])
        return turned.type_as(x_BTHC)


class Rotation(torch.autograd.Function):
    """``rotate`` with a backward pass of its own, which rotates the gradient by the opposite angles.

    torch's own backward pass has twice as many operations, and without compilation each is a pass over memory.
    """

    @staticmethod
    def forward(ctx: Any, x_BTHC: Tensor, cos_T1P: Tensor, sin_T1P: Tensor) -> Tensor:
        ctx.dtype = x_BTHC.dtype
        ctx.save_for_backward(cos_T1P, sin_T1P)
        return rotate(x_BTHC, cos_T1P, sin_T1P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BTHC: Tensor) -> tuple[Tensor, None, None]:
        cos_T1P, sin_T1P = ctx.saved_tensors
        return rotate(gradient_BTHC, cos_T1P, -sin_T1P).to(ctx.dtype), None, None


def rotate(x_BTHC: Tensor, cos_T1P: Tensor, sin_T1P: Tensor) -> Tensor:
    """Rotate each pair of channels c and c + C/2 by the angle of the token's position and of the pair, (B, T, H, C).

    ``cos_T1P`` and ``sin_T1P`` have the cosines and sines of the angles of P = C/2 pairs.
    """
    first, second = x_BTHC.chunk(2, dim=-1)
    cos_T1C, sin_T1C = torch.cat((cos_T1P, cos_T1P), -1), torch.cat((-sin_T1P, sin_T1P), -1)
    return torch.addcmul(torch.cat((second, first), -1) * sin_T1C, x_BTHC, cos_T1C)


def build_position(config: ModelConfig) -> nn.Module | None:
    """Build the module that adds positions to the token embedding; None if the config has no such module.

    The module takes (B, T, D) and the position of the first token, and returns (B, T, D).
    """
    if isinstance(config.position, str):
        made = load_part("model.position", config.position)(config)
        return None if getattr(made, "on_heads", False) else made
    return LearnedPosition(config.block_size, config.n_embd) if config.position is Position.learned else None


def build_rotation(config: ModelConfig) -> nn.Module | None:
    """Build the module that applies positions to queries and keys; None if the config has no such module.

    The module takes (B, T, H, C) and the position of the first token, and returns (B, T, H, C).
    """
    if isinstance(config.position, str):
        made = load_part("model.position", config.position)(config)
        return made if getattr(made, "on_heads", False) else None
    return Rope(config) if config.position is Position.rope else None


def set_positions(module: nn.Module, positions_T: Tensor) -> None:
    """Set the positions, (T,) integers, of the tokens that ``module`` receives, in all its modules for positions.

    Needed if a rank has only some tokens of each sequence. The argument ``start`` of these modules is then an index
    into ``positions_T``.
    """
    for part in module.modules():
        if isinstance(part, LearnedPosition | Rope):
            part.positions_T = positions_T


def rotation_rates(config: ModelConfig) -> Tensor:
    """Return the angle per position of each pair of channels, in radians, (C/2,) float64 on the CPU, largest first.

    Pair i of a head rotates by base^(-2i/C) for each position. ``rope_scaling`` reduces these rates, see
    ``gpt.config.RopeScaling``.
    """
    width, base, factor = config.rotary_width, config.rope_base, config.rope_factor
    if config.rope_scaling is RopeScaling.ntk:
        base *= factor ** (width / (width - 2))  # so that the slowest pair is divided by exactly the factor
    rates = base ** -(torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
    if config.rope_scaling is RopeScaling.linear:
        return rates / factor
    if config.rope_scaling is RopeScaling.yarn:
        return yarn_rates(rates, config)
    return llama3_rates(rates, config) if config.rope_scaling is RopeScaling.llama3 else rates


INIT_STD = 0.02
"""Standard deviation of the initial matrices (GPT-2)."""
LLAMA3_TURNS = (1.0, 4.0)
"""Limits of ``llama3_rates`` in all models of Llama 3.1 to 3.3, in full turns of a pair of channels over
``rope_original_block_size`` tokens. Rates with fewer turns than the first limit are divided by ``rope_factor``. Rates
with more turns than the second limit stay unchanged."""


def llama3_rates(rates: Tensor, config: ModelConfig) -> Tensor:
    """Scale rotation rates (angles per position) as Llama 3.1 does, (C/2,) -> (C/2,).

    At its rate, a pair of channels makes some number of full turns over ``rope_original_block_size`` tokens. With fewer
    turns than the first limit in ``LLAMA3_TURNS``, the rate is divided by ``rope_factor``. With more turns than the
    second limit, it stays unchanged. Between the limits, it is blended linearly in the number of turns.
    """
    assert config.rope_original_block_size is not None
    low, high = LLAMA3_TURNS
    turns = config.rope_original_block_size * rates / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return rates * (kept + (1 - kept) / config.rope_factor)


YARN_TURNS = (32.0, 1.0)
"""Limits of ``yarn_rates``, in full turns of a pair of channels over ``rope_original_block_size`` tokens. Rates with
more turns than the first limit stay unchanged. Rates with fewer turns than the second limit are divided by
``rope_factor`` (arXiv 2309.00071, section 3.2)."""


def yarn_rates(rates: Tensor, config: ModelConfig) -> Tensor:
    """Scale rotation rates (angles per position) as YaRN does, (C/2,) -> (C/2,) (arXiv 2309.00071, section 3.2).

    Two pairs of channels are the limits: one makes 32 full turns over ``rope_original_block_size`` tokens, the other
    makes one turn (``YARN_TURNS``). Pairs before the first limit keep their rates. The rates of pairs after the second
    limit are divided by ``rope_factor``. Rates between the limits are blended linearly in the index of the pair. Both
    limits are rounded to whole indices, as in the paper's code, https://github.com/jquesnelle/yarn.
    """
    assert config.rope_original_block_size is not None
    width, length = config.rotary_width, config.rope_original_block_size
    first, last = (
        width * math.log(length / (2 * math.pi * turns)) / (2 * math.log(config.rope_base)) for turns in YARN_TURNS
    )
    low, high = max(math.floor(first), 0), min(math.ceil(last), width - 1)
    pairs = torch.arange(len(rates), dtype=rates.dtype, device="cpu")
    divided = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    return rates * (1 - divided + divided / config.rope_factor)


COMPUTE_DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}
"""Precision -> dtype of the results of matrix products."""

CACHED_LOGITS = 2**17
"""Largest number of logits for each CPU thread that the loss on a CPU converts to fp32 at a time: 0.5 MB, which fits
into the 1 to 2 MB of an L2 cache."""


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """Return the context for a forward pass: with a 16-bit ``config.precision``, torch casts fp32 weights and inputs of
    matrix products to 16 bits; otherwise the context does nothing.

    Under fsdp the gathered weights already have 16 bits. The context then only affects the loss and the norms.
    """
    half = config.precision.is_half
    return torch.autocast(device.type, COMPUTE_DTYPES[config.precision] if half else None, enabled=half)


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor, vocab_size: int | None = None) -> Tensor:
    """Compute the cross-entropy in nats, summed over the tokens, () in fp32.

    Targets below 0 do not count. Columns from ``vocab_size`` on are padding and are ignored; None means no padding.
    Slicing the logits before the call has the same result, but copies the gradient in the backward pass.
    """
    return CrossEntropy.apply(logits_BTV.flatten(0, 1), targets_BT.flatten(), vocab_size)


class CrossEntropy(torch.autograd.Function):
    """Summed cross-entropy, () in fp32, which saves only the logits for the backward pass, and converts one chunk of
    them to fp32 at a time.

    torch's own function saves the log-softmax of all logits in fp32, and makes two gradients of that size. Computing
    the softmax of each chunk again costs exponentials, but saves time on memory traffic.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, vocab_size: int | None) -> Tensor:
        ctx.save_for_backward(logits_NV, targets_N)
        ctx.vocab_size, logits_NV = vocab_size, logits_NV[:, :vocab_size]
        chunks = zip(in_chunks(logits_NV), in_chunks(targets_N, logits_NV), strict=True)
        found = [
            logits_RV.log_softmax(-1, dtype=torch.float32).gather(-1, targets_R.clamp(min=0).unsqueeze(-1))
            for logits_RV, targets_R in chunks
        ]
        return -torch.cat(found).masked_fill_(targets_N.unsqueeze(-1) < 0, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, targets_N = ctx.saved_tensors
        whole_NV = torch.empty_like(logits_NV)
        grad_NV, logits_NV = whole_NV[:, : ctx.vocab_size], logits_NV[:, : ctx.vocab_size]
        whole_NV[:, grad_NV.size(1) :] = 0
        columns_N1 = targets_N.clamp(min=0).unsqueeze(-1)
        each_N1 = gradient * (targets_N >= 0).unsqueeze(-1)
        parts = [in_chunks(x, logits_NV) for x in (grad_NV, logits_NV, columns_N1, each_N1)]
        for grad_RV, logits_RV, column_R1, each_R1 in zip(*parts, strict=True):
            own = grad_RV.dtype == torch.float32
            softmax_RV = torch.softmax(logits_RV, -1, dtype=torch.float32, out=grad_RV if own else None)
            softmax_RV.mul_(each_R1).scatter_add_(-1, column_R1, -each_R1)
            if not own:
                grad_RV.copy_(softmax_RV)
        return whole_NV, None, None


class ChunkedLoss(torch.autograd.Function):
    """Summed cross-entropy, () in fp32, of hidden states and an output matrix, one chunk of tokens at a time.

    The forward pass also computes the gradients of each chunk, while the logits of the chunk are in memory. So the
    backward pass only multiplies these gradients by the gradient of the summed loss, which is one number.

    There are five inputs: hidden states (N, D), the matrix (V, D), targets (N,), a function, and a bool. The function
    is ``loss_and_gradient`` whose vocabulary size is already set, and may be compiled. The bool is False in an
    evaluation, which needs no gradients; the forward pass of a Function cannot find this out by itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        evaluate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        differentiates: bool,
    ) -> Tensor:
        device = x_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
        rows = max(1, LOGITS_AT_ONCE[device] // len(weight_VD))
        total = x_ND.new_zeros((), dtype=torch.float32)
        x_gradient_ND = torch.empty_like(x_ND)
        # A frozen matrix (LoRA) needs no gradient.
        trains = ctx.needs_input_grad[1]
        weight_gradient_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if trains else None
        with torch.autocast(device, enabled=False):
            factor_VD = weight_VD.to(dtype)
            parts = zip(x_ND.split(rows), targets_N.split(rows), x_gradient_ND.split(rows), strict=True)
            for x_RD, targets_R, x_gradient_RD in parts:
                x_RD = x_RD.to(dtype)
                loss, gradient_RV = evaluate(F.linear(x_RD, factor_VD), targets_R)
                total += loss
                if differentiates:
                    x_gradient_RD.copy_(gradient_RV @ factor_VD)
                    if weight_gradient_VD is not None:
                        weight_gradient_VD += gradient_RV.mT @ x_RD
        ctx.gradients = x_gradient_ND, None if weight_gradient_VD is None else weight_gradient_VD.to(weight_VD.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, ()
        return *(None if x is None else x.mul_(gradient) for x in gradients), None, None, None


def chunked_loss(
    x_BTD: Tensor,
    weight_VD: Tensor,
    targets_BT: Tensor,
    vocab_size: int,
    evaluate: Callable[..., tuple[Tensor, Tensor]],
) -> Tensor:
    """Compute the summed cross-entropy in nats, (), from hidden states and the output matrix by ``ChunkedLoss``.

    ``evaluate`` is ``loss_and_gradient``, maybe compiled.
    """
    rows = x_BTD.flatten(0, 1), weight_VD, targets_BT.flatten()
    return ChunkedLoss.apply(*rows, partial(evaluate, vocab_size=vocab_size), torch.is_grad_enabled())


def loss_and_gradient(logits_RV: Tensor, targets_R: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy in nats, () in fp32, and its gradient by the logits, (R, V) in their dtype.

    Targets below 0 do not count. Columns from ``vocab_size`` on are padding, with a gradient of 0.
    """
    counts_R1, column_R1 = (targets_R >= 0).unsqueeze(-1), targets_R.clamp(min=0).unsqueeze(-1)
    log_RV = logits_RV[:, :vocab_size].log_softmax(-1, dtype=torch.float32)
    loss = -(log_RV.gather(-1, column_R1) * counts_R1).sum()
    gradient_RV = log_RV.exp_().scatter_add_(-1, column_R1, torch.full_like(log_RV[:, :1], -1.0)).mul_(counts_R1)
    return loss, F.pad(gradient_RV.to(logits_RV.dtype), (0, logits_RV.size(1) - vocab_size))


def exponentials(logits_NV: Tensor, columns_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return three tensors for a softmax, each (N,) in fp32: the largest logit of each row; the sum of
    exp(logit - largest) of the row; and logit - largest of the column that ``columns_N`` has for the row."""
    found = []
    for logits_RV, columns_R in zip(in_chunks(logits_NV), in_chunks(columns_N, logits_NV), strict=True):
        peak_R1 = logits_RV.amax(-1, keepdim=True).float()
        shifted_RV = logits_RV - peak_R1
        column_R = shifted_RV.gather(-1, columns_R.unsqueeze(-1)).squeeze(-1)
        found.append((peak_R1.squeeze(-1), shifted_RV.exp_().sum(-1), column_R))
    peak, total, column = (torch.cat(parts) for parts in zip(*found, strict=True))
    return peak, total, column


def write_softmax(out_NV: Tensor, logits_NV: Tensor, peak_N: Tensor, rest_N: Tensor) -> None:
    """Write exp(logits - peak - rest) into ``out_NV``, computed in fp32. ``peak_N`` and ``rest_N`` have a number for
    each row. With the largest logit as peak, and the logarithm of the sum of exp(logit - peak) as rest, the result is
    the softmax."""
    rows = in_chunks(peak_N.unsqueeze(-1), logits_NV), in_chunks(rest_N.unsqueeze(-1), logits_NV)
    for out_RV, logits_RV, peak_R1, rest_R1 in zip(in_chunks(out_NV), in_chunks(logits_NV), *rows, strict=True):
        if out_RV.dtype == peak_R1.dtype:
            torch.sub(logits_RV, peak_R1, out=out_RV).sub_(rest_R1).exp_()
        else:  # saves one pass, at the cost of digits that half precision does not have
            torch.exp(logits_RV - (peak_R1 + rest_R1), out=out_RV)


def in_chunks(x: Tensor, logits_NV: Tensor | None = None) -> tuple[Tensor, ...]:
    """Split ``x`` by rows into chunks. ``x`` has a row for each row of ``logits_NV``. The logits of the rows of a chunk
    are at most ``chunk_elements`` numbers, but a chunk has at least one row.

    If ``logits_NV`` is None, ``x`` itself has the logits.
    """
    logits_NV = x if logits_NV is None else logits_NV
    return x.split(max(1, chunk_elements(logits_NV.device) // max(1, logits_NV.size(1))))


def chunk_elements(device: torch.device) -> int:
    """Return the largest number of logits that are converted to fp32 at a time on a device. On a CPU they fit into the
    caches of its cores."""
    return LOSS_CHUNK if device.type != "cpu" else min(LOSS_CHUNK, CACHED_LOGITS * torch.get_num_threads())
