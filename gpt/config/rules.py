"""Checks that parts of the schema share, and a cache for pure functions of a model config. Imports no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import fields
from enum import Enum
from functools import wraps
from importlib.metadata import entry_points
from operator import attrgetter
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar, cast

from gpt.config.model import (
    PARTS,
    Activation,
    AttentionBackend,
    ExpertBalance,
    ExpertMatmul,
    Ffn,
    ModelConfig,
    NormPosition,
    Position,
    RopeScaling,
)
from gpt.config.parallel import Strategy
from launch.errors import ConfigError, closest, require_positive, require_range
from launch.runs.environment import install_command

# Checks of the parts of the schema, and numbers for their messages.


def nearest_divisor(number: int, wish: int) -> int:
    """Return the divisor of ``number`` that is nearest to ``wish``, for error messages."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wish), d))


def divisors(number: int) -> list[int]:
    """List the divisors of a number, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def check_custom_name(key: str, name: str, ours: Iterable[str]) -> None:
    """Raise ConfigError unless ``name`` can name a part written by the user. Imports nothing.

    The name is either ``package.module:attribute``, or an entry point of the group ``gpt.<last word of key>``.
    """
    installed = entry_points(group=f"gpt.{key.rpartition('.')[2]}").names
    module, colon, attribute = name.partition(":")
    if (colon and module and attribute) or name in installed:
        return
    names = [*ours, *sorted(installed)]
    raise ConfigError(
        f"{key}={name}",
        f"one of {', '.join(names)}, or one of your own as package.module:NAME",
        f"{key}={(closest(name, names) or names)[0]}",
    )


def is_importable(package: str) -> bool:
    """Tell whether a package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


# Cache of pure functions of a model config, for the life of the process.
#
# A search for layouts needs the same few models thousands of times. Configs are mutable, so the values of their fields
# are the keys of the cache.


P = ParamSpec("P")
Result = TypeVar("Result")
KEPT = 4096
"""Number of results that are kept for one function and one model. When full, all of them are dropped together."""
MODELS = 64
"""Number of models of which results are kept. When full, all of them are dropped together."""
MISSING = object()
VALUES = attrgetter(*(field.name for field in fields(ModelConfig) if field.name != "options"))
"""Values of all hashable fields."""


def cached_by_model(
    function: Callable[Concatenate[ModelConfig, P], Result],
) -> Callable[Concatenate[ModelConfig, P], Result]:
    """Cache the results of a pure function of a model config and of further hashable arguments.

    Every call returns the same object, so callers must not change the result.
    """
    known: dict[object, dict[object, Result]] = {}
    latest: tuple[object, dict[object, Result]] = (None, {})

    @wraps(function)
    def cached(model: ModelConfig, *args: P.args, **kwargs: P.kwargs) -> Result:
        nonlocal latest
        values, of_model = VALUES(model), repr(model.options) if model.options else ""
        if latest[0] != (values, of_model):  # comparing the same objects is faster than hashing forty values
            if len(known) >= MODELS:
                known.clear()
            latest = (values, of_model), known.setdefault((values, of_model), {})
        results = latest[1]
        key = (args, tuple(sorted(kwargs.items()))) if kwargs else args
        found = results.get(key, MISSING)
        if found is not MISSING:
            return cast(Result, found)
        if len(results) >= KEPT:
            results.clear()
        result = results[key] = function(model, *args, **kwargs)
        return result

    return cached


if TYPE_CHECKING:
    from gpt.config.train import TrainConfig


# Rules that several fields of ModelConfig must satisfy together.


INF = float("inf")
GROUPED_MULTIPLE = 8
"""Multiple of the rows of torch's grouped product: it reads 16 bytes at a time, which are 8 numbers in bf16."""


def check(model: ModelConfig) -> None:
    """Raise ConfigError for the first rule that a model violates."""
    for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "vocab_multiple", "kv_heads", "ffn_width"):
        require_positive(f"model.{key}", getattr(model, key))
    for key in ("norm_eps", "rope_base", "init_std"):
        require_positive(f"model.{key}", getattr(model, key))
    if model.embedding_init_std is not None:
        require_positive("model.embedding_init_std", model.embedding_init_std)
    require_range("model.dropout", model.dropout, 0.0, 0.99)
    check_custom_parts(model)
    check_heads(model)
    check_rope(model)
    check_block(model)
    check_activation(model)
    if model.ffn is Ffn.moe:
        check_experts(model)
    else:
        refuse_expert_keys(model)


def check_custom_parts(model: ModelConfig) -> None:
    """Raise ConfigError unless every part is built in or can be the name of a class of the user. Imports nothing."""
    for key, name in model.custom_parts.items():
        check_custom_name(f"model.{key}", name, PARTS[key].__members__)
    if model.options and not model.custom_parts:
        raise ConfigError(
            f"model.options={model.options} in a model without parts of your own",
            "settings for such parts only, which are their only readers",
            "model.options={}, or model.norm=PACKAGE.MODULE:CLASS",
        )


def check_heads(model: ModelConfig) -> None:
    """Raise ConfigError unless heads divide the width, and key-value heads divide the heads."""
    if model.n_embd % model.n_head:
        heads = nearest_divisor(model.n_embd, model.n_head)
        raise ConfigError(
            f"model.n_head={model.n_head} does not divide model.n_embd={model.n_embd}",
            "heads of equal width",
            f"model.n_head={heads}",
        )
    if model.n_head % model.kv_heads:
        heads = nearest_divisor(model.n_head, model.kv_heads)
        raise ConfigError(
            f"model.n_kv_head={model.kv_heads} does not divide model.n_head={model.n_head}",
            "every key-value head shared by the same number of query heads",
            f"model.n_kv_head={heads}",
        )
    if model.force_flash and model.attention is not AttentionBackend.flash:
        raise ConfigError(
            f"model.force_flash=true with model.attention={getattr(model.attention, 'name', model.attention)}",
            "the flash kernel asked for, where it is to be enforced",
            "model.attention=flash model.force_flash=true",
        )


def check_rope(model: ModelConfig) -> None:
    """Raise ConfigError unless rotary embeddings have pairs of channels to turn, and all keys of their scaling."""
    if model.position is Position.rope and model.head_dim % 2:
        raise ConfigError(
            f"model.position=rope with heads {model.head_dim} wide",
            "an even head width, since rotary embeddings turn pairs of channels",
            "model.position=learned, or a model.n_head that makes n_embd / n_head even",
        )
    scaling = model.rope_scaling
    if scaling is RopeScaling.none:
        if model.rope_factor != 1:
            raise ConfigError(
                f"model.rope_factor={model.rope_factor:g} with model.rope_scaling=none",
                "a scaling that uses the factor",
                "model.rope_scaling=ntk, linear or llama3",
            )
        return
    if model.position is not Position.rope:
        raise ConfigError(
            f"model.rope_scaling={scaling.name} with model.position={getattr(model.position, 'name', model.position)}",
            "rotary positions, whose frequencies it scales",
            "model.position=rope",
        )
    require_range("model.rope_factor", model.rope_factor, 1.0, INF)
    if scaling is RopeScaling.ntk and model.head_dim == 2:
        raise ConfigError(
            "model.rope_scaling=ntk with heads 2 wide, which have one frequency",
            "a slowest frequency beside the fastest",
            "model.rope_scaling=linear",
        )
    if scaling is RopeScaling.llama3:
        check_llama3(model)


def check_llama3(model: ModelConfig) -> None:
    """Raise ConfigError unless the original length is given and the slow frequencies are below the fast ones."""
    if model.rope_original_block_size is None:
        raise ConfigError(
            "model.rope_scaling=llama3 without model.rope_original_block_size",
            "the sequence length before the scaling, from which slow and fast are told apart",
            "model.rope_original_block_size=8192",
        )
    require_positive("model.rope_original_block_size", model.rope_original_block_size)
    require_positive("model.rope_low_freq_factor", model.rope_low_freq_factor)
    if model.rope_low_freq_factor >= model.rope_high_freq_factor:
        raise ConfigError(
            f"model.rope_low_freq_factor={model.rope_low_freq_factor:g} and "
            f"model.rope_high_freq_factor={model.rope_high_freq_factor:g}",
            "a low one below the high one",
            f"model.rope_high_freq_factor={4 * model.rope_low_freq_factor:g}",
        )


def check_block(model: ModelConfig) -> None:
    """Raise ConfigError unless norms and residual connections go together."""
    if model.parallel_residual and model.norm_position is NormPosition.post:
        raise ConfigError(
            "model.parallel_residual=true with model.norm_position=post",
            "norms before attention and ffn, since there is one addition and nothing between the two",
            "model.norm_position=pre",
        )


def check_activation(model: ModelConfig) -> None:
    """Raise ConfigError unless a gated layer has the activation that its name implies."""
    # The names stand for these activations (arXiv 2002.05202); another activation would give a known name to another
    # layer.
    fitting = {
        Ffn.swiglu: (Activation.silu,),
        Ffn.geglu: (Activation.gelu, Activation.gelu_tanh),
    }.get(model.dense_ffn)
    if fitting and model.activation is not None and model.activation not in fitting:
        key = "model.expert_ffn" if model.ffn is Ffn.moe else "model.ffn"
        raise ConfigError(
            f"model.activation={model.activation.name} with {key}={model.dense_ffn.name}",
            f"{' or '.join(a.name for a in fitting)}, or null for the usual one",
            f"model.activation=null, or {key}=standard",
        )


def check_experts(model: ModelConfig) -> None:
    """Raise ConfigError unless the number of experts suffices for each token, and their kind can be stacked."""
    if model.n_expert < 1:
        raise ConfigError(
            f"model.ffn=moe with model.n_expert={model.n_expert}", "a number of experts", "model.n_expert=8"
        )
    if not 1 <= model.n_expert_per_token <= model.n_expert:
        raise ConfigError(
            f"model.n_expert_per_token={model.n_expert_per_token} of model.n_expert={model.n_expert}",
            f"a number from 1 to {model.n_expert}",
            f"model.n_expert_per_token={min(2, model.n_expert)}",
        )
    if model.expert_ffn is Ffn.moe:
        raise ConfigError("model.expert_ffn=moe", "standard, swiglu or geglu", "model.expert_ffn=swiglu")
    if model.bias:
        raise ConfigError(
            "model.ffn=moe with model.bias=true",
            "linear layers without bias: the experts' matrices are multiplied as one, and have none",
            "model.bias=false",
        )
    if model.router_normalize and model.n_expert_per_token == 1:
        raise ConfigError(
            "model.router_normalize=true with model.n_expert_per_token=1",
            "the router's own weight, since a single one scaled to a sum of 1 is always 1 and teaches it nothing",
            "model.router_normalize=null",
        )
    if model.expert_matmul is ExpertMatmul.grouped and (
        model.n_embd % GROUPED_MULTIPLE or model.ffn_width % GROUPED_MULTIPLE
    ):
        raise ConfigError(
            f"model.expert_matmul=grouped with model.n_embd={model.n_embd} and experts {model.ffn_width} wide",
            f"multiples of {GROUPED_MULTIPLE}, since torch's grouped product takes rows of whole 16 bytes",
            "model.expert_matmul=loop, or other widths",
        )
    check_balance(model)


def check_balance(model: ModelConfig) -> None:
    """Raise ConfigError unless the numbers of routing and balancing are in range."""
    require_range("model.n_shared_expert", model.n_shared_expert, 0, INF)
    if model.capacity_factor is not None:
        require_positive("model.capacity_factor", model.capacity_factor)
    require_range("model.balance_coefficient", model.balance_weight, 0.0, INF)
    require_range("model.z_coefficient", model.z_coefficient, 0.0, INF)
    require_positive("model.balance_bias_rate", model.balance_bias_rate)
    if model.expert_balance is ExpertBalance.none and model.balance_weight > 0:
        raise ConfigError(
            f"model.balance_coefficient={model.balance_weight:g} with model.expert_balance=none",
            "a balance loss, or none",
            "model.expert_balance=loss, or model.balance_coefficient=null",
        )


def refuse_expert_keys(model: ModelConfig) -> None:
    """Raise ConfigError if keys of experts are set for a model without experts."""
    for key, idle in (("n_expert", 0), ("n_shared_expert", 0), ("capacity_factor", None)):
        value = getattr(model, key)
        if value != idle:
            more = "" if key == "n_expert" else " model.n_expert=8"
            raise ConfigError(
                f"model.{key}={value} with model.ffn={getattr(model.ffn, 'name', model.ffn)}",
                "experts only where the feed-forward layer is made of them",
                f"model.ffn=moe model.bias=false model.{key}={value}{more}",
            )


# Rules for ``float8``: the settings that it works with.


MULTIPLE = 16
"""Divisor of both sides of a matrix in 8 bits: matrix units read 16 bytes at a time (torch's ``_scaled_mm``)."""


class Float8(Enum):
    """Matrix products of the blocks in 8 bits (arXiv 2209.05433). ``tensorwise`` scales each factor by its largest
    magnitude; ``rowwise`` scales each row of a factor, which is slower and more exact."""

    none = "none"
    tensorwise = "tensorwise"
    rowwise = "rowwise"


def check_float8(config: TrainConfig) -> None:
    """Raise ConfigError for the first setting that does not work with ``float8``, on any device."""
    if config.float8 is Float8.none:
        if config.float8_emulate:
            raise ConfigError(
                "float8_emulate=true with float8=none", "a float8 to emulate", "float8=rowwise, or float8_emulate=false"
            )
        return
    found = f"float8={config.float8.name}"
    own = next((key for key in ("attention", "ffn") if key in config.model.custom_parts), None)
    if own is not None:
        raise ConfigError(
            f"{found} with model.{own}={config.model.custom_parts[own]}",
            "attention and feed-forward layers of ours, whose matrices are known to fit 8 bits",
            "float8=none, or a part of ours",
        )
    if not is_importable("torchao"):
        raise ConfigError(
            f"{found}, and the package torchao is not installed",
            "the extra float8",
            f"{install_command('float8')}, or float8=none",
        )
    if config.precision.name == "fp16":
        raise ConfigError(
            f"{found} with precision=fp16", "bf16 or fp32 around the products in 8 bits", "precision=bf16"
        )
    parallel = config.parallel
    if parallel.tp > 1:
        raise ConfigError(
            f"{found} with parallel.tp={parallel.tp}",
            "matrices that are whole where they are multiplied",
            "parallel.tp=1 parallel=fsdp, or float8=none",
        )
    if parallel.strategy is Strategy.deepspeed:
        raise ConfigError(f"{found} with DeepSpeed", "an engine of torch", "parallel=fsdp, or float8=none")
    odd = {name: size for name, size in widths(config.model).items() if size % MULTIPLE}
    if odd:
        key, size = next(iter(odd.items()))
        raise ConfigError(
            f"{found} with {key} of {size}",
            f"multiples of {MULTIPLE} on both sides of every matrix",
            f"a model whose {key} is {-(-size // MULTIPLE) * MULTIPLE}, or float8=none",
        )


def widths(model: ModelConfig) -> dict[str, int]:
    """Return the sizes of the sides of a block's matrices: name of a side -> size."""
    return {
        "model.n_embd": model.n_embd,
        "width of all heads": model.n_head * model.head_dim,
        "width of the key-value heads": model.kv_heads * model.head_dim,
        "feed-forward width": model.ffn_width,
    }


def float8_words(config: TrainConfig) -> str:
    """Return the name of a run's 8-bit products, for plans and summaries. ``float8`` must be switched on."""
    return f"float8 {config.float8.name}{' (emulated)' if config.float8_emulate else ''}"
