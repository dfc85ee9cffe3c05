"""Memory that one rank needs for training, from the configs alone.

Torch-free. Counts tensors: not the CUDA context, nor what the caching allocator and NCCL reserve, so a plan should
leave some tenths of a device free. Must not know how much memory any device has.

``shards`` is exact: the shard of each parameter that a rank holds; and so is ``states``: parameters, gradients and
optimizer state. ``activations`` is what a forward pass keeps for the backward pass. ``rank`` adds them up.

D width, H heads, K key-value heads, C head width, F inner width of the ffn, V vocabulary, T block size, L layers, E
experts.
"""

from gpt.accounting.units import BF16, FP32, GIB
from gpt.planning.memory.activations import activation_bytes
from gpt.planning.memory.rank import Memory, per_rank
from gpt.planning.memory.shards import ParameterShards, cast_elements, elements, parameter_shards
from gpt.planning.memory.staging import in_memory_bytes, staging_bytes
from gpt.planning.memory.states import states
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
