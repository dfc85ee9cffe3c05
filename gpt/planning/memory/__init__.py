"""How much memory one rank needs for training, from the configs alone.

Torch-free. Counts tensors: not the device's context, nor what the allocator and the communication library keep, so a
plan should leave some tenths of a device free. Must not know how much memory any device has.

``pieces`` is exact, which part of each parameter a rank holds, and so is ``states``, what training keeps of it.
``activations`` is what a forward pass keeps. ``rank`` puts them together.

D width, H heads, K key-value heads, C head width, F inner width of the ffn, V vocabulary, T block size, L layers, E
experts.
"""

from gpt.accounting.units import BF16, FP32, GIB
from gpt.planning.memory.activations import kept
from gpt.planning.memory.rank import Memory, per_rank
from gpt.planning.memory.shards import Pieces, cast_elements, elements, pieces
from gpt.planning.memory.states import states
from gpt.topology.deepspeed_config import BUCKET

__all__ = [
    "BF16",
    "BUCKET",
    "FP32",
    "GIB",
    "Memory",
    "Pieces",
    "cast_elements",
    "elements",
    "kept",
    "per_rank",
    "pieces",
    "states",
]
