"""The experts of a mixture: feed-forward layers of one shape, their matrices stacked, each applied to its own rows.

R rows, Q rows of one expert, E experts, D width, F inner width, I inputs and O outputs of a matrix. Every parameter has
the experts first, so that experts can be sharded along that dimension. Must not know how rows are chosen.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.config import ExpertMatmul, ModelConfig
from gpt.model.ffn import ACTIVATIONS

untraced_grouped_mm = torch.compiler.disable(F.grouped_mm)


class Experts(nn.Module):
    """The feed-forward layers of ``n_expert`` experts, without biases. Matrices are (outputs, inputs), as in Linear."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, inner = config.n_expert, config.n_embd, config.ffn_width
        self.gate = nn.Parameter(torch.empty(experts, inner, width)) if config.gated else None
        self.up = nn.Parameter(torch.empty(experts, inner, width))
        self.down = nn.Parameter(torch.empty(experts, width, inner))
        for weight in self.parameters():
            nn.init.normal_(weight, std=config.init_std)
        self.activation = ACTIVATIONS[config.ffn_activation]
        self.product = grouped_product if config.expert_matmul is ExpertMatmul.grouped else looped_product

    def forward(self, x_RD: Tensor, ends_E: Tensor, even: bool) -> Tensor:
        """Apply each expert to its rows, (R, D) -> (R, D), expert e to rows from ``ends_E[e - 1]`` to ``ends_E[e]``.

        ``even`` says that each has equally many.
        """
        return self.apply_to(x_RD, ends_E, even, self.gate, self.up, self.down)

    def apply_to(
        self, x_RD: Tensor, ends_E: Tensor, even: bool, gate_EFD: Tensor | None, up_EFD: Tensor, down_EDF: Tensor
    ) -> Tensor:
        """Apply the experts with the given matrices, those of all experts or of the ones that this rank holds."""
        # torch.autocast does not know grouped products; cast here, the rows are kept once for both matrices.
        x_RD = autocast_rows(x_RD)
        product = even_product if even and self.product is grouped_product else self.product
        up_RF = product(x_RD, up_EFD, ends_E)
        if gate_EFD is None:
            inner_RF = self.activation(up_RF)
        else:
            inner_RF = self.activation(product(x_RD, gate_EFD, ends_E)) * up_RF
        return product(inner_RF, down_EDF, ends_E)


def autocast_rows(x_RD: Tensor) -> Tensor:
    """Cast the rows to the precision of torch.autocast where it is on."""
    return x_RD.to(torch.get_autocast_dtype(x_RD.device.type)) if autocasts(x_RD.device) else x_RD


def autocasts(device: torch.device) -> bool:
    """Tell whether torch.autocast is on for a device; the meta device has none, and torch refuses the question."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def grouped_product(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply each expert's rows by the transpose of its matrix, in one grouped product of torch.

    Waits for the device, to read where each expert's rows end, unless in bf16 on GPUs of compute capability 9 and 10.
    """
    # torch 2.13 traces it in bf16 only, though it computes others too.
    product = F.grouped_mm if x_RI.dtype is torch.bfloat16 else untraced_grouped_mm
    return product(x_RI, weight_EOI.to(x_RI.dtype).mT, offs=ends_E)


def even_product(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply each expert's rows, equally many, by the transpose of its matrix, in one batched product.

    Never waits for the device.
    """
    x_EQI = x_RI.unflatten(0, (len(weight_EOI), -1))
    product_EQO: Tensor = BatchedProduct.apply(x_EQI, weight_EOI.to(x_RI.dtype))
    return product_EQO.flatten(0, 1)


class BatchedProduct(torch.autograd.Function):
    """Product of each expert's rows and the transpose of its matrix.

    torch's own gradient of the matrices lies transposed in memory, so that it would be copied once more.
    """

    @staticmethod
    def forward(ctx: Any, x_EQI: Tensor, weight_EOI: Tensor) -> Tensor:
        ctx.save_for_backward(x_EQI, weight_EOI)
        return x_EQI.bmm(weight_EOI.mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x_EQI, weight_EOI = ctx.saved_tensors
        return gradients[0].bmm(weight_EOI), gradients[0].mT.bmm(x_EQI)


def looped_product(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply each expert's rows by the transpose of its matrix, one expert after another: the reference.

    Waits for the device, since the host needs to know where each expert's rows end.
    """
    ends = ends_E.tolist()
    parts = [F.linear(x_RI[start:end], weight_OI) for start, end, weight_OI in zip([0, *ends], ends, weight_EOI)]
    return torch.cat(parts)
