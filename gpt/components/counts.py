"""Counts of a part of the user's (parameters, FLOPs, memory), and what it may say of itself. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field

KINDS_OF_PARALLELISM = {
    **dict.fromkeys(("norm", "ffn"), ("tp", "cp", "pp")),
    **dict.fromkeys(("position", "attention"), ("pp",)),
}
"""Values that the class of a part may have in ``parallel``. Norms and feed-forward layers take tokens one by one, so
each rank of tp and cp takes its own; attention and positions would have to know of the other ranks' tokens."""


@dataclass(frozen=True)
class PartCounts:
    """Counts of one use of a part; what grows with the tokens is for one sequence of ``block_size`` tokens."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Name, within the part, and shape of every parameter."""
    flops: int = 0
    """FLOPs of the matrix products of a forward pass."""
    saved: dict[str, int] = field(default_factory=dict)
    """Bytes of activations that the backward pass needs, the part's input among them, in fp32 and in 16 bits."""
    fixed: int = 0
    """Bytes that it keeps however many sequences there are, such as a mask."""
    products: dict[str, int] = field(default_factory=dict)
    """Bytes of the results of matrix products, likewise."""
    parallel: tuple[str, ...] = ()
    """Kinds of parallelism that the class says it can be computed under."""
    on_heads: bool = False
    """Positions that are applied to queries and keys, not to the embedding."""


NOTHING = PartCounts()


@dataclass(frozen=True)
class StateBytes:
    """Bytes of an optimizer's state."""

    per_element: float
    """For each element of a matrix."""
    per_tensor: int
    """For each parameter, such as a count of steps."""
