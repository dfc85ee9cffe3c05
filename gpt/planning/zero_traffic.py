"""What ranks wait for that share a model by DeepSpeed's stages (arXiv 1910.02054, section 7).

As deepspeed 0.19 does it unless its own file says otherwise: stages 0 to 2 exchange beside nothing
(``overlap_comm`` is for stage 3), stage 1 once a step, stages 2 and 3 after every pass, and in fp32.
"""

from __future__ import annotations

from gpt.config import Precision, TrainConfig
from gpt.planning.collectives import Group
from gpt.planning.data_traffic import BACKWARD
from gpt.planning.memory import BF16, FP32, Pieces, elements
from gpt.topology.batch import Batch


def zero_s(config: TrainConfig, batch: Batch, held: Pieces, line: Group, compute_s: float) -> float:
    """Seconds of a step that a rank waits for gradients and parameters; ``compute_s`` is what one pass computes."""
    stage, width = config.parallel.zero_stage, BF16 if config.precision is Precision.bf16 else FP32
    sums, gathers = line.gather(FP32 * held.elements), line.gather(width * held.elements)
    if stage == 0:
        return 2 * sums
    if stage in (1, 2):
        return (batch.accumulation if stage == 2 else 1) * sums + gathers
    block = elements(held.block)
    first, last = line.gather(width * (elements(held.around) + block)), line.gather(FP32 * block)
    forward = max(first, gathers - (1 - BACKWARD) * compute_s)
    backward = max(last, gathers + sums - BACKWARD * compute_s)
    return batch.accumulation * (forward + backward)
