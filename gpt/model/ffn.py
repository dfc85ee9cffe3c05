"""Feed-forward layers: dense, and mixtures of experts with their router (arXiv 1701.06538)."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.config import Activation, ExpertBalance, ExpertMatmul, ModelConfig
from gpt.model.layers import INIT_STD, Linear

# Dense feed-forward layers, applied to each position alone. B batch, T time, D width, F inner width.


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.gelu: F.gelu,
    Activation.gelu_tanh: partial(F.gelu, approximate="tanh"),  # as in GPT-2 (arXiv 1606.08415, section 2)
    Activation.silu: F.silu,
    Activation.relu: F.relu,
    Activation.leaky_relu: F.leaky_relu,
}


class DenseFfn(nn.Module):
    """Two matrices with an activation between them (arXiv 1706.03762, section 3.3), (B, T, D) -> (B, T, D).

    If ``config.gated`` is true, a third matrix makes it a gated linear unit: SwiGLU with SiLU, GEGLU with GELU (arXiv
    2002.05202, section 2).
    """

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.gate = Linear(config.n_embd, width, bias=config.bias) if config.gated else None
        self.up = Linear(config.n_embd, width, bias=config.bias)
        self.down = Linear(width, config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.ffn_activation]

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.activation(self.up(x_BTD)))
        return self.down(self.activation(self.gate(x_BTD)) * self.up(x_BTD))


# Experts of a mixture: feed-forward layers of one shape with stacked matrices, each applied to its own rows.
#
# R rows, Q rows of one expert, E experts, D width, F inner width, I inputs and O outputs of a matrix. Experts are the
# first dimension of every parameter, so that they can be sharded along it.


untraced_grouped_mm = torch.compiler.disable(F.grouped_mm)


class Experts(nn.Module):
    """Experts: ``n_expert`` feed-forward layers without biases. Their matrices are stacked, (E, outputs, inputs)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, inner = config.n_expert, config.n_embd, config.ffn_width
        self.gate = nn.Parameter(torch.empty(experts, inner, width)) if config.gated else None
        self.up = nn.Parameter(torch.empty(experts, inner, width))
        self.down = nn.Parameter(torch.empty(experts, width, inner))
        for weight in self.parameters():
            nn.init.normal_(weight, std=INIT_STD)
        self.activation = ACTIVATIONS[config.ffn_activation]
        self.product = grouped_product if config.expert_matmul is ExpertMatmul.grouped else looped_product

    def forward(self, x_RD: Tensor, ends_E: Tensor, even: bool) -> Tensor:
        """Apply each expert to its rows, (R, D) -> (R, D). A row is the hidden state of a token for which the expert
        was chosen, or padding. The rows of expert e are those from ``ends_E[e - 1]`` up to, but not including,
        ``ends_E[e]``. ``even`` is True if all experts have equally many rows."""
        return self.apply_to(x_RD, ends_E, even, self.gate, self.up, self.down)

    def apply_to(
        self, x_RD: Tensor, ends_E: Tensor, even: bool, gate_EFD: Tensor | None, up_EFD: Tensor, down_EDF: Tensor
    ) -> Tensor:
        """Apply experts with the given stacked matrices to their rows, (R, D) -> (R, D). ``gate_EFD`` is None if the
        experts are not gated. Other arguments as in ``forward``."""
        # torch.autocast does not cover grouped products. Casting here keeps the rows once for both matrices.
        x_RD = autocast_rows(x_RD)
        product = even_product if even and self.product is grouped_product else self.product
        up_RF = product(x_RD, up_EFD, ends_E)
        if gate_EFD is None:
            inner_RF = self.activation(up_RF)
        else:
            inner_RF = self.activation(product(x_RD, gate_EFD, ends_E)) * up_RF
        return product(inner_RF, down_EDF, ends_E)


def autocast_rows(x_RD: Tensor) -> Tensor:
    """Return the rows in the dtype of torch.autocast, if autocast is on; else unchanged."""
    return x_RD.to(torch.get_autocast_dtype(x_RD.device.type)) if autocasts(x_RD.device) else x_RD


def autocasts(device: torch.device) -> bool:
    """Return True if torch.autocast is on for a device; False for the meta device, for which torch's own query raises
    an error."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def grouped_product(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply each expert's rows by the transpose of its matrix, (R, I) -> (R, O), in one grouped product of torch.
    ``ends_E`` as in ``Experts.forward``.

    Waits for the device to read the end of each expert's rows, except in bf16 on GPUs of compute capability 9 and 10.
    """
    # torch 2.13 traces the grouped product in bf16 only, though it also computes other dtypes.
    product = F.grouped_mm if x_RI.dtype is torch.bfloat16 else untraced_grouped_mm
    return product(x_RI, weight_EOI.to(x_RI.dtype).mT, offs=ends_E)


def even_product(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply each expert's rows by the transpose of its matrix, (R, I) -> (R, O), in one batched product.

    All experts have equally many rows, so the product never waits for the device.
    """
    x_EQI = x_RI.unflatten(0, (len(weight_EOI), -1))
    product_EQO: Tensor = BatchedProduct.apply(x_EQI, weight_EOI.to(x_RI.dtype))
    return product_EQO.flatten(0, 1)


class BatchedProduct(torch.autograd.Function):
    """Product of each expert's rows (E, Q, I) and the transpose of its matrix (E, O, I): (E, Q, O).

    The backward pass computes the gradient of the matrices in their own memory layout. torch's backward pass of ``bmm``
    would compute it transposed in memory, and it would be copied once more.
    """

    @staticmethod
    def forward(ctx: Any, x_EQI: Tensor, weight_EOI: Tensor) -> Tensor:
        ctx.save_for_backward(x_EQI, weight_EOI)
        return x_EQI.bmm(weight_EOI.mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        x_EQI, weight_EOI = ctx.saved_tensors
        return gradients[0].bmm(weight_EOI), gradients[0].mT.bmm(x_EQI) if ctx.needs_input_grad[1] else None


def looped_product(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply each expert's rows by the transpose of its matrix, (R, I) -> (R, O), one expert after another.

    The reference for the other products. It waits for the device, since the host needs the end of each expert's rows.
    """
    ends = ends_E.tolist()
    parts = [F.linear(x_RI[start:end], weight_OI) for start, end, weight_OI in zip([0, *ends], ends, weight_EOI)]
    return torch.cat(parts)


# Mixture of experts: a router picks a few experts for each token (arXiv 1701.06538).
#
# B sequences, T time, D width, E experts, K experts of one token, N = B T tokens, R rows of all experts.
#
# The experts of a token depend on its own sequence alone: capacity and balance loss are computed per sequence. So the
# result is independent of the split of a batch into micro-batches and over ranks, and no token depends on a later one.
# The losses of routing are no output. They enter the gradient, scaled by ``set_auxiliary_scale``; see
# ``AuxiliaryLoss``.


class MixtureOfExperts(nn.Module):
    """Mixture of experts: a router, the experts that it chooses for each token, and shared experts, which compute every
    token (arXiv 2401.06066). (B, T, D) -> (B, T, D)."""

    balance_bias: Tensor | None
    counts: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.experts = Experts(config)
        shared = config.n_shared_expert * config.ffn_width
        self.shared = DenseFfn(config, shared) if shared else None
        by_bias = config.expert_balance is ExpertBalance.bias
        self.register_buffer("balance_bias", torch.zeros(config.n_expert) if by_bias else None)
        self.register_buffer("counts", torch.zeros(config.n_expert), persistent=False)
        self.auxiliary_scale: float | None = None
        self.loss_scale: Tensor | None = None
        self.mean_over_parts: Callable[[Tensor], Tensor] | None = None

    @property
    def has_fixed_places(self) -> bool:
        """True if every expert computes the same fixed number of rows, some of them empty: in training with a
        ``capacity_factor``. False if an expert computes all tokens for which it was chosen, and no other rows."""
        return self.training and self.config.capacity_factor is not None

    def reset_buffers(self) -> None:
        """Set the counts of tokens of each expert to 0; needed once after ``to_empty``."""
        self.counts.zero_()

    def forward(self, x_BTD: Tensor) -> Tensor:
        logits_BTE = self.route(x_BTD)
        scores_BTE = logits_BTE.softmax(-1)
        chosen_BTK = self.choose(scores_BTE)
        weight_BTK = scores_BTE.gather(-1, chosen_BTK)
        if self.config.normalizes_experts:
            weight_BTK = weight_BTK / weight_BTK.sum(-1, keepdim=True)
        taken_BTE = torch.zeros_like(scores_BTE, dtype=torch.int32).scatter_(-1, chosen_BTK, 1)
        if self.has_fixed_places:
            y_BTKD = self.dispatch_with_capacity(x_BTD, chosen_BTK, taken_BTE)
        else:
            y_BTKD = self.dispatch_dropless(x_BTD, chosen_BTK, taken_BTE)
        y_BTD = (weight_BTK.unsqueeze(-1).type_as(y_BTKD) * y_BTKD).sum(2)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD)
        if not self.training:
            return y_BTD
        loss = self.auxiliary_loss(logits_BTE, scores_BTE, taken_BTE)
        return AuxiliaryLoss.apply(y_BTD, loss, taken_BTE.sum((0, 1)), self.counts)

    def route(self, x_BTD: Tensor) -> Tensor:
        """Compute the router's logits, (B, T, D) -> (B, T, E), in fp32 or wider, because rounding would change which
        experts are chosen (arXiv 2101.03961, section 2.4)."""
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        with torch.autocast(x_BTD.device.type, enabled=False) if autocasts(x_BTD.device) else nullcontext():
            return F.linear(x_BTD.to(dtype), self.router.weight.to(dtype))

    @torch.no_grad()
    def choose(self, scores_BTE: Tensor) -> Tensor:
        """Return the indices of the K experts of each token, highest score first, (B, T, K). ``balance_bias`` is added
        to the scores for this choice only (arXiv 2408.15664)."""
        biased_BTE = scores_BTE if self.balance_bias is None else scores_BTE + self.balance_bias
        return biased_BTE.topk(self.config.n_expert_per_token, dim=-1).indices

    def dispatch_dropless(self, x_BTD: Tensor, chosen_BTK: Tensor, taken_BTE: Tensor) -> Tensor:
        """Return the result of each of the K experts of each token, (B, T, K, D). No token is dropped.

        ``taken_BTE`` is 1 where an expert is chosen for a token, else 0.
        """
        order_R = chosen_BTK.flatten().argsort(stable=True)
        ends_E = taken_BTE.sum((0, 1)).cumsum(0).to(torch.int32)
        # Tokens are replicated before the sort, so that a token's gradients are always summed in one order.
        y_RD = self.give_to_experts(replicate_tokens(x_BTD, chosen_BTK).index_select(0, order_R), ends_E)
        return y_RD.index_select(0, invert_order(order_R)).unflatten(0, chosen_BTK.shape)

    def dispatch_with_capacity(self, x_BTD: Tensor, chosen_BTK: Tensor, taken_BTE: Tensor) -> Tensor:
        """Return the result of each of the K experts of each token, (B, T, K, D), with a ``capacity_factor``.

        Each expert computes a fixed number of tokens of each sequence, the earliest first. The result of an expert is 0
        for a token that it does not compute. ``taken_BTE`` as in ``dispatch_dropless``.
        """
        sequences, time, experts = taken_BTE.shape
        assert self.config.capacity_factor is not None
        places = min(time, math.ceil(self.config.capacity_factor * time * self.config.n_expert_per_token / experts))
        before_BTK = (taken_BTE.cumsum(1) - taken_BTE).gather(-1, chosen_BTK)
        sequence_B11 = torch.arange(sequences, device=x_BTD.device)[:, None, None]
        place_BTK = (chosen_BTK * sequences + sequence_B11) * places + before_BTK
        rows = experts * sequences * places
        place_N = place_BTK.masked_fill(before_BTK >= places, rows).flatten()  # without a place: the last row
        # index_put keeps only the places for the backward pass.
        x_RD = x_BTD.new_zeros(rows + 1, x_BTD.size(-1)).index_put((place_N,), replicate_tokens(x_BTD, chosen_BTK))
        ends_E = torch.arange(1, experts + 1, dtype=torch.int32, device=x_BTD.device) * (sequences * places)
        y_RD = F.pad(self.give_to_experts(x_RD[:-1], ends_E), (0, 0, 0, 1))
        return y_RD.index_select(0, place_N).unflatten(0, chosen_BTK.shape)

    def give_to_experts(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """Apply the experts to rows that are sorted by expert, (R, D) -> (R, D). The rows of expert e end before
        ``ends_E[e]``.

        Expert parallelism replaces this method, because other ranks have some of the experts.
        """
        return self.experts(x_RD, ends_E, self.has_fixed_places)

    def auxiliary_loss(self, logits_BTE: Tensor, scores_BTE: Tensor, taken_BTE: Tensor) -> Tensor:
        """Compute the sum of balance loss and z-loss, (): each is multiplied by its weight in the config, summed over
        the sequences, and multiplied by the factors of ``set_auxiliary_scale``. ``taken_BTE`` is 1 where an expert is
        chosen for a token, else 0.

        The balance loss of a sequence is the sum over experts of (share of the choices x E) x (mean score). It is 1 if
        all experts are chosen equally often (arXiv 2412.19437, equations 17 to 20). The z-loss is the mean square of
        log-sum-exp of the logits (arXiv 2202.08906, equation 5).

        If a rank has a part of each sequence, the scores are those of the part, and the shares of the choices are those
        of the whole sequence. The balance loss is linear in the scores, so its mean over the parts is exact, and so are
        the gradients.
        """
        config = self.config
        frequency_BE = taken_BTE.float().mean(1) * (config.n_expert / config.n_expert_per_token)
        if self.mean_over_parts is not None:
            frequency_BE = self.mean_over_parts(frequency_BE)
        balance_B = (frequency_BE * scores_BTE.mean(1)).sum(-1)
        z_B = logits_BTE.logsumexp(-1).square().mean(1)
        scale = 1 / len(logits_BTE) if self.auxiliary_scale is None else self.auxiliary_scale
        loss = scale * (config.balance_weight * balance_B + config.z_coefficient * z_B).sum()
        return loss if self.loss_scale is None else loss * self.loss_scale


def replicate_tokens(x_BTD: Tensor, chosen_BTK: Tensor) -> Tensor:
    """Repeat each token for each of its K experts, (B, T, D) -> (B T K, D)."""
    return x_BTD.unsqueeze(2).expand(*chosen_BTK.shape, -1).flatten(0, 2)


def invert_order(order_R: Tensor) -> Tensor:
    """Return the permutation that inverts ``order_R``, (R,)."""
    return torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))


def find_mixtures(module: nn.Module) -> list[MixtureOfExperts]:
    """Return all mixtures of experts inside a module, in order; also inside of wrappers."""
    return [m for m in module.modules() if isinstance(m, MixtureOfExperts)]


def set_auxiliary_scale(module: nn.Module, per_sequence: float, loss_scale: Tensor | None = None) -> None:
    """Set the factors of the balance loss and the z-loss in all mixtures of a module.

    Without this call the losses are means over the sequences of each micro-batch.

    Args:
        module: the model, or a wrapper of it.
        per_sequence: (number of ranks over which gradients are averaged) / (sequences of a step). The losses are then
            means over the sequences of the step.
        loss_scale: another factor, (), which is read in each forward pass; None for 1.
    """
    for mixture in find_mixtures(module):
        mixture.auxiliary_scale, mixture.loss_scale = per_sequence, loss_scale


def set_sequence_mean(module: nn.Module, mean_over_parts: Callable[[Tensor], Tensor]) -> None:
    """Set ``mean_over_parts`` in all mixtures of a module: a function that averages a tensor over the ranks that have
    parts of the same sequences."""
    for mixture in find_mixtures(module):
        mixture.mean_over_parts = mean_over_parts


def expert_counts(module: nn.Module) -> Tensor | None:
    """Return the number of tokens for which each expert was chosen since the last reset, (layers, E); None without
    experts.

    Only tokens of backward passes on this rank count. The caller adds the counts of the ranks that have other tokens.
    """
    found = find_mixtures(module)
    return torch.stack([mixture.counts for mixture in found]) if found else None


def reset_counts(module: nn.Module) -> None:
    """Set the counts of tokens of each expert to 0, in all mixtures of a module."""
    for mixture in find_mixtures(module):
        mixture.counts.zero_()


@torch.no_grad()
def move_balance_bias(module: nn.Module, counts_LE: Tensor) -> None:
    """Increase the balance bias of experts with fewer tokens than the mean of their layer, and decrease the bias of
    experts with more, each by ``balance_bias_rate`` (arXiv 2408.15664, algorithm 1). In place.

    ``counts_LE`` has the number of tokens of each expert in the whole step, for each of L layers.
    """
    for mixture, counts_E in zip(find_mixtures(module), counts_LE, strict=True):
        if mixture.balance_bias is not None:
            mixture.balance_bias.add_((counts_E.mean() - counts_E).sign(), alpha=mixture.config.balance_bias_rate)


class AuxiliaryLoss(torch.autograd.Function):
    """Function of the inputs y, loss, counts and total. It returns y unchanged, and adds ``loss``, (), to the loss that
    is differentiated.

    The backward pass gives ``loss`` a gradient of 1. So a model can have internal losses and return only its logits (as
    MoEAuxLossAutoScaler of Megatron-LM, https://github.com/NVIDIA/Megatron-LM).

    The backward pass also adds ``counts``, the number of tokens of each expert in this pass, (E,), to ``total``, the
    number so far, (E,). The backward pass is the right place for this: it runs once, even if the forward pass is
    recomputed, and it never runs in an evaluation.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, counts: Tensor, total: Tensor) -> Tensor:
        ctx.counts, ctx.total, ctx.dtype = counts, total, loss.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gradient = gradients[0]
        # Add a zero that depends on the gradient. Otherwise the compiler would add to the total in the forward pass.
        # Pipelines run two forward passes before the first backward pass, and one count would be lost.
        zero = gradient[(0,) * gradient.dim()].float().nan_to_num().clamp(0, 0)
        ctx.total.add_(ctx.counts + zero)
        return gradient, torch.ones((), dtype=ctx.dtype, device=gradient.device), None, None
