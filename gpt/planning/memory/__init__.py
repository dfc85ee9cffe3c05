"""Memory that one rank needs for training, from the configs alone. Imports no torch.

Only tensors are counted, without the CUDA context and the reserves of the caching allocator and NCCL. So a plan should
leave some tenths of a device free.

``shards`` computes the shard of each parameter on a rank, exactly, and the activations that a forward pass saves.
``rank`` computes parameters, gradients and optimizer state, exactly, and adds everything up.

D width, H heads, K key-value heads, C head width, F inner width of the ffn, V vocabulary, T block size, L layers, E
experts.
"""

from gpt.accounting.counts import BF16, FP32, GIB
from gpt.planning.memory.rank import Memory, in_memory_bytes, per_rank, staging_bytes, states
from gpt.planning.memory.shards import ParameterShards, activation_bytes, cast_elements, elements, parameter_shards
from gpt.topology.deepspeed_config import BUCKET

__all__ = [
    "BF16",
    "BUCKET",
    "FP32",
    "GIB",
    "Memory",
    "ParameterShards",
    "activation_bytes",
    "cast_elements",
    "elements",
    "in_memory_bytes",
    "parameter_shards",
    "per_rank",
    "staging_bytes",
    "states",
]
