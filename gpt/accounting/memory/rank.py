"""The memory of one rank, part by part."""

from __future__ import annotations

from dataclasses import dataclass, fields

from gpt.accounting.memory.activations import activations
from gpt.accounting.memory.pieces import Pieces, cast_elements, elements, pieces
from gpt.accounting.memory.units import BF16, FP32, GIB
from gpt.batch import Batch
from gpt.config import Precision, Strategy, TrainConfig
from gpt.topology import Topology


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank around the start of the backward pass, where training needs most.

    Within 2 % of what was measured with ddp on small models, and up to a third above it with fsdp, where the gradients
    grow only while the activations shrink, and where the residual stream may be bf16 as well.
    """

    parameters: int
    """Master weights, fp32."""
    gradients: int
    optimizer: int
    """Both moments of AdamW, fp32, and its step counts."""
    compute_weights: int
    """Weights gathered or cast to be computed with, and whole gradients that wait to be reduced."""
    activations: int
    """What the forward pass keeps for the backward pass."""
    logits: int
    """Log-softmax of the logits, the loss's gradient with respect to it, and that with respect to the logits: fp32."""

    @property
    def total(self) -> int:
        """All of it, bytes."""
        return sum(getattr(self, part.name) for part in fields(self))

    @property
    def total_gib(self) -> float:
        """All of it, GiB."""
        return self.total / GIB


def per_rank(config: TrainConfig, layout: Topology, batch: Batch) -> Memory:
    """Memory of the rank that needs most, for AdamW over fp32 master weights.

    ddp holds 4 bytes a parameter for the weights, 4 for the gradients (which are views of the communication buckets)
    and 8 for the moments; zero1 the n-th part of the moments; fsdp of all three, every tensor cut along its first
    dimension and padded (ZeRO-1 and 3, arXiv 1910.02054, section 3; FSDP2, arXiv 2304.11277). Beside that, see
    ``compute_weights``, ``activations`` and ``logits``.

    Args:
        config: of the run.
        layout: how its ranks stand.
        batch: how the global batch is cut for its data ranks.
    """
    model = config.model
    held = pieces(model, layout)
    moments = held.held(layout.data_ranks) if config.parallel.strategy is Strategy.zero1 else held.held()
    tokens = batch.micro * model.block_size
    return Memory(
        parameters=FP32 * held.held(),
        gradients=FP32 * held.held(),
        optimizer=2 * FP32 * moments + FP32 * held.tensors,
        compute_weights=compute_weights(config, held, batch.accumulation > 1),
        activations=activations(model, batch.micro, config.precision, config.recompute),
        logits=3 * FP32 * tokens * model.padded_vocab,
    )


def compute_weights(config: TrainConfig, held: Pieces, accumulates: bool) -> int:
    """Bytes of weights beside the master weights, and of whole gradients beside the sharded ones.

    ddp in bf16: autocast keeps the bf16 copy of every matrix until its backward pass. fsdp: what is outside the blocks
    stays gathered for the whole pass; of the blocks two are (one computes while the next arrives), or all of them where
    they are not resharded after the forward pass; one block's gradient is whole until it is reduced. Where gradients
    accumulate over several passes they are not reduced in between, so all of them are whole, in fp32.
    """
    bf16 = config.precision is Precision.bf16
    if config.parallel.strategy is not Strategy.fsdp:
        return BF16 * cast_elements(held) if bf16 else 0
    block, around = elements(held.block), elements(held.around)
    width = BF16 if bf16 else FP32
    gathered = min(2, held.layers) if config.parallel.reshard_after_forward else held.layers
    whole = FP32 * (held.layers * block + around) if accumulates else width * block
    return width * (around + gathered * block) + whole
