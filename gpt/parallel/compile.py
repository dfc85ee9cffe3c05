"""Float8, recomputation and torch.compile of a model, block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from gpt.config import Float8, Recompute, TrainConfig
from gpt.model.gpt import GPT
from gpt.model.layers import cross_entropy, loss_and_gradient

# Matrix products of the blocks in 8-bit floating point (arXiv 2209.05433), by torchao.
#
# Applied to the model from outside, before it is compiled and parallelized. Parameters keep their names, shapes and
# fp32 values, so checkpoints are the same as in any other precision. torchao is imported only for a run with float8.


def convert_linears(model: GPT, config: TrainConfig) -> None:
    """Make the linear layers of the blocks compute in float8, forward and backward, as ``config.float8`` says.

    Each product scales its two factors anew to the range of the format. The scale comes from the largest magnitude of
    the whole tensor, or of each row. These layers do not change: embedding, norms, attention itself, output matrix,
    router and experts. Logits and the choices of the router need more precision; experts compute in grouped products.
    """
    if config.float8 is Float8.none:
        return
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    recipe = Float8LinearConfig.from_recipe_name(config.float8.name)
    recipe = replace(recipe, emulate=config.float8_emulate)
    convert_to_float8_training(
        model.blocks,
        config=recipe,
        module_filter_fn=lambda module, name: isinstance(module, nn.Linear) and name.split(".")[-1] != "router",
    )


# Activation checkpointing (recomputation) and torch.compile of each block, and of the modules after the blocks.
#
# Applied to the model from outside, before it is parallelized. Both replace ``forward`` of each block. So parameters
# keep their names, and hooks of FSDP or DDP stay outside of the replaced function.


aten = torch.ops.aten
MATRIX_PRODUCTS = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten._grouped_mm.default,
        aten._scaled_mm.default,
        torch.ops.gpt.onednn_linear.default,
    }
)
ALL_TO_ALLS = frozenset({torch.ops._c10d_functional.all_to_all_single.default})
"""All-to-alls that send rows to experts on other ranks and back. To keep their results costs less than to repeat
them."""
ATTENTION_KERNELS = frozenset(
    {
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    }
)


def prepare_blocks(model: GPT, config: TrainConfig) -> None:
    """Apply activation checkpointing and torch.compile to the blocks of ``model`` as ``config`` says.

    The last norm and the output matrix are compiled, too, if tensor parallelism does not split them. Of a chunked loss
    only the work on the logits of a chunk is compiled.
    """
    # Compilation is outside the recomputation, so that the compiler plans the backward pass around it. The compiler
    # must then see the whole block. With collectives in the block (expert dispatch, context parallelism) it is
    # inside.
    parallel = config.parallel
    asks = parallel.ep > 1 or parallel.cp > 1
    # With tp and recompute=full too, compilation is inside: torch 2.13 fails to keep the parts of its DTensors.
    inside = asks or (parallel.tp > 1 and config.recompute is Recompute.full)
    ways = (compile_block, recompute_block) if inside else (recompute_block, compile_block)
    for block in model.blocks:
        for way in ways:
            way(block, config)
    if parallel.tp == 1:  # torch 2.13 finds no backward pass for an output matrix whose rows are on several ranks
        for module in (model.norm, *([] if config.chunked_loss else [model.head])):
            compile_block(module, config)
    if config.chunked_loss and config.compiles:
        model.chunk_loss = torch.compile(loss_and_gradient, dynamic=False, fullgraph=config.compile_fullgraph)


def recompute_block(block: nn.Module, config: TrainConfig) -> None:
    """Apply activation checkpointing to a block as ``config.recompute`` says. Recomputed dropout is the same."""
    if config.recompute is Recompute.none:
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if config.recompute is not Recompute.full:
        kept = MATRIX_PRODUCTS | ALL_TO_ALLS | (frozenset() if config.model.dropout else ATTENTION_KERNELS)
        options["context_fn"] = partial(create_selective_checkpoint_contexts, partial(save_policy, kept))
    replace_forward(block, partial(checkpoint, block.forward, **options))


def compile_block(block: nn.Module, config: TrainConfig) -> None:
    """Compile a block, or another module, as ``config.compile`` says."""
    if config.compiles:
        # Shapes are fixed: by default torch would switch to slower dynamic kernels after the first evaluation.
        mode = None if config.compile.name == "default" else config.compile.name
        whole = config.compile_fullgraph
        replace_forward(block, torch.compile(block.forward, mode=mode, dynamic=False, fullgraph=whole))


def compile_loss(config: TrainConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the summed cross-entropy of a run; compiled to one kernel for each pass if the blocks are compiled."""
    vocab_size = config.model.vocab_size
    if not config.compiles:
        return partial(cross_entropy, vocab_size=vocab_size)
    whole = partial(plain_cross_entropy, vocab_size=vocab_size)
    return torch.compile(whole, dynamic=False, fullgraph=config.compile_fullgraph)


def plain_cross_entropy(logits_BTV: Tensor, targets_BT: Tensor, vocab_size: int) -> Tensor:
    """Compute the result of ``cross_entropy`` with torch's own functions, whose fp32 copies a compiler fuses away."""
    logits_NV = logits_BTV.float().flatten(0, 1)
    if vocab_size < logits_NV.size(1):
        padding_V = torch.arange(logits_NV.size(1), device=logits_NV.device) >= vocab_size
        logits_NV = logits_NV.masked_fill(padding_V, -torch.inf)
    return F.cross_entropy(logits_NV, targets_BT.flatten(), reduction="sum", ignore_index=-1)


def replace_forward(block: nn.Module, forward: Callable[..., Any]) -> None:
    """Make ``block(...)`` call ``forward`` instead of the block's own method; the hooks of the block still run around
    it."""
    block.forward = forward


def save_policy(kept: frozenset[Any], _context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    """Keep costly results for the backward pass: matrix products, all-to-alls, and attention without dropout.

    This reverses Korthikanti et al. (arXiv 2205.05198, section 5): there attention took much memory and little
    arithmetic, but a fused kernel takes little memory and much arithmetic. With dropout attention is recomputed: if it
    were not, it would draw no random numbers the second time, and all dropout after it would change.
    """
    return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE
