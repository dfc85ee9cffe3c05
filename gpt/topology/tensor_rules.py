"""Which models ``tp`` ranks can share, and what to type for one that they cannot. Torch-free.

Owns the reasons of tensor parallelism; ``gpt.topology.composition`` asks. How matrices are cut is
``gpt.parallel.tensor``'s.
"""

from __future__ import annotations

import math

from gpt.config import ExpertMatmul, Ffn, ModelConfig, TrainConfig
from gpt.config.model_rules import GROUPED_MULTIPLE
from gpt.topology.dims import Topology
from launch.errors import ConfigError


def check_tensor(config: TrainConfig, layout: Topology) -> None:
    """Raise ConfigError where the model's matrices, or its activations, cannot be shared by ``tp`` ranks."""
    if layout.tp == 1:
        return
    check_matrices(config.model, layout.tp)
    check_vocabulary(config.model, layout.tp)
    check_sequence(config, layout)


def check_matrices(model: ModelConfig, tp: int) -> None:
    """Heads of both kinds and the inner width of the feed-forward layer can be dealt out evenly."""
    shared = {
        f"model.n_head={model.n_head}": model.n_head,
        f"{model.kv_heads} key and value heads": model.kv_heads,
        f"{'experts' if model.ffn is Ffn.moe else 'a feed-forward layer'} {model.ffn_width} wide": model.ffn_width,
    }
    sharers = max(n for n in divisors(tp) if all(number % n == 0 for number in shared.values()) and fits(model, n))
    for words, number in shared.items():
        if number % tp:
            raise ConfigError(
                f"parallel.tp={tp} with {words}", f"a number of ranks that divides {number}", f"parallel.tp={sharers}"
            )
    if not fits(model, tp):
        raise ConfigError(
            f"parallel.tp={tp} with experts {model.ffn_width} wide, {model.ffn_width // tp} on each rank",
            f"multiples of {GROUPED_MULTIPLE} on each rank, since torch's grouped product takes rows of whole 16 bytes",
            f"model.expert_matmul=loop, or parallel.tp={sharers}",
        )


def fits(model: ModelConfig, tp: int) -> bool:
    """Whether the product of the experts takes what is left of their width."""
    grouped = model.ffn is Ffn.moe and model.expert_matmul is ExpertMatmul.grouped
    return not grouped or model.ffn_width % (GROUPED_MULTIPLE * tp) == 0


def check_vocabulary(model: ModelConfig, tp: int) -> None:
    """Embedding and output matrix can be dealt out evenly by their rows."""
    if model.padded_vocab % tp:
        raise ConfigError(
            f"parallel.tp={tp} with {model.padded_vocab} rows of the embedding (model.vocab_size={model.vocab_size}, "
            f"model.vocab_multiple={model.vocab_multiple})",
            f"a multiple of {tp} rows; those added take no part",
            f"model.vocab_multiple={math.lcm(model.vocab_multiple, tp)}",
        )


def check_sequence(config: TrainConfig, layout: Topology) -> None:
    """Slices of a sequence are equal; and dropout, which every rank draws for itself, finds no activations that several
    ranks hold."""
    model, ranks = config.model, layout.tp * layout.cp
    wish = f"model.block_size={-(-model.block_size // ranks) * ranks}"
    if config.parallel.sequence_parallel and model.block_size % ranks:
        raise ConfigError(
            f"parallel.sequence_parallel=true with model.block_size={model.block_size} on {ranks} ranks",
            f"a multiple of {ranks}: each of the ranks has an equal slice of every sequence",
            wish if model.dropout else f"parallel.sequence_parallel=false, or {wish}",
        )
    if model.dropout and not config.parallel.sequence_parallel:
        raise ConfigError(
            f"model.dropout={model.dropout:g} with parallel.tp={layout.tp} parallel.sequence_parallel=false",
            "slices of the sequence, since each rank draws its own noise and all would have to drop the same",
            "parallel.sequence_parallel=true" if model.block_size % ranks == 0 else "model.dropout=0",
        )


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]
