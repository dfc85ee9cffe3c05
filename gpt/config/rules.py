"""Checks that parts of the schema share, and the rules of a model.

Imports no torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from importlib.metadata import entry_points

from gpt.config.model import (
    LORA_TARGETS,
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
from launch.errors import ConfigError, closest, require_positive, require_range

# Checks of the parts of the schema, and numbers for their messages.


def nearest_divisor(number: int, wish: int) -> int:
    """Return the divisor of ``number`` that is nearest to ``wish``; the smaller one if two are equally near."""
    return min(divisors(number), key=lambda d: (abs(d - wish), d))


def divisors(number: int) -> list[int]:
    """List the divisors of a number, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def check_numbers(
    group: str,
    config: object,
    positive: Iterable[str] = (),
    at_least_0: Iterable[str] = (),
    **between: tuple[float, float],
) -> None:
    """Raise ConfigError for the first number that is out of its range.

    Args:
        group: prefix of the keys in messages, such as ``optim.``.
        config: config with the numbers; a value of None is allowed.
        positive: fields that are finite and above 0.
        at_least_0: fields that are finite and at least 0.
        between: field -> its smallest and its largest allowed value.
    """
    for key in positive:
        if (value := getattr(config, key)) is not None:
            require_positive(group + key, value)
    for key, (low, high) in {**dict.fromkeys(at_least_0, (0, INF)), **between}.items():
        if (value := getattr(config, key)) is not None:
            require_range(group + key, value, low, high)


INF = float("inf")


def check_custom_name(key: str, name: str, ours: Iterable[str]) -> None:
    """Raise ConfigError unless ``name`` has the form of a name of a user's class or function. No module is imported.

    The name is either ``package.module:attribute``, or an entry point of the group ``gpt.<last word of key>``.

    Args:
        key: key of the config, for messages, such as ``model.norm``.
        name: value of the key.
        ours: names of the built-in choices, for messages.
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
    """Return True if Python finds a package. The package is not imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


# Rules that several fields of ModelConfig must satisfy together.


GROUPED_MULTIPLE = 8
"""Lengths of the rows in torch's grouped matrix product must be multiples of this: it reads 16 bytes at a time, which
are 8 numbers in bf16."""


def check_model(model: ModelConfig) -> None:
    """Raise ConfigError for the first violated rule of a model config."""
    sizes = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "vocab_multiple", "kv_heads", "ffn_width")
    positive = (*sizes, "head_dim", "norm_eps", "rope_base", "attention_softcap", "logit_softcap")
    check_numbers("model.", model, positive, dropout=(0.0, 0.99))
    check_custom_parts(model)
    check_heads(model)
    check_latent(model)
    check_rope(model)
    check_window(model)
    check_attention(model)
    check_block(model)
    check_activation(model)
    check_adapters(model)
    if model.ffn is Ffn.moe:
        check_experts(model)
    else:
        refuse_expert_keys(model)


def check_custom_parts(model: ModelConfig) -> None:
    """Raise ConfigError if a part is not built in, and its name has not the form of the name of a user's class. Also
    raise it if ``options`` is set, but no part is a class of the user. The module of the class is not imported."""
    for key, name in model.custom_parts.items():
        check_custom_name(f"model.{key}", name, PARTS[key].__members__)
    if model.options and not model.custom_parts:
        raise ConfigError(
            f"model.options={model.options} in a model without parts of your own",
            "settings for such parts only, which are their only readers",
            "model.options={}, or model.norm=PACKAGE.MODULE:CLASS",
        )


def check_heads(model: ModelConfig) -> None:
    """Raise ConfigError unless ``n_head`` divides ``n_embd`` (or ``head_width`` is set), and the number of key-value
    heads divides ``n_head``."""
    if model.head_width is None and model.n_embd % model.n_head:
        heads = nearest_divisor(model.n_embd, model.n_head)
        raise ConfigError(
            f"model.n_head={model.n_head} does not divide model.n_embd={model.n_embd}",
            "heads of equal width",
            f"model.n_head={heads}, or model.head_width=64",
        )
    if model.n_head % model.kv_heads:
        heads = nearest_divisor(model.n_head, model.kv_heads)
        raise ConfigError(
            f"model.n_kv_head={model.kv_heads} does not divide model.n_head={model.n_head}",
            "every key-value head shared by the same number of query heads",
            f"model.n_kv_head={heads}",
        )


def check_latent(model: ModelConfig) -> None:
    """Raise ConfigError if keys of latent attention contradict each other, or other keys do not work with it."""
    check_numbers("model.", model, ("kv_lora_rank", "q_lora_rank", "rope_head_width"))
    latent = model.kv_lora_rank is not None
    wrong = {
        "rope_head_width": latent == (model.rope_head_width is None or model.value_width < 1),
        "q_lora_rank": not latent and model.q_lora_rank is not None,
        "n_kv_head": latent and model.kv_heads != model.n_head,
        "qk_norm": latent and model.qk_norm,
        **{key: latent for key in model.custom_parts if key != "ffn"},
    }
    for key, is_wrong in wrong.items():
        if is_wrong:
            raise ConfigError(
                f"model.{key}={getattr(model, key) or 'null'} with model.kv_lora_rank={model.kv_lora_rank or 'null'}",
                "with a latent: model.rope_head_width below the width of a head, keys for each head, built-in parts; "
                "without it: none of its keys",
                f"model.kv_lora_rank=null model.q_lora_rank=null model.rope_head_width=null, or another model.{key}",
            )


def check_rope(model: ModelConfig) -> None:
    """Raise ConfigError if positions are rotary, and the width of the rotated part of a head is odd. Also raise it if
    keys of the scaling of rotary frequencies are missing or contradict each other."""
    if model.position is Position.rope and model.rotary_width % 2:
        raise ConfigError(
            f"model.position=rope with heads {model.rotary_width} wide",
            "an even head width, since rotary embeddings turn pairs of channels",
            "model.position=learned, or an even model.head_width",
        )
    scaling = model.rope_scaling
    if scaling is RopeScaling.none:
        if model.rope_factor != 1:
            raise ConfigError(
                f"model.rope_factor={model.rope_factor:g} with model.rope_scaling=none",
                "a scaling that uses the factor",
                "model.rope_scaling=ntk, linear, llama3 or yarn",
            )
        return
    if model.position is not Position.rope:
        raise ConfigError(
            f"model.rope_scaling={scaling.name} with model.position={getattr(model.position, 'name', model.position)}",
            "rotary positions, whose frequencies it scales",
            "model.position=rope",
        )
    check_numbers("model.", model, ("rope_original_block_size",), rope_factor=(1.0, INF))
    if scaling is RopeScaling.ntk and model.rotary_width == 2:
        raise ConfigError(
            "model.rope_scaling=ntk with heads 2 wide, which have one frequency",
            "a slowest frequency beside the fastest",
            "model.rope_scaling=linear",
        )
    if scaling in (RopeScaling.llama3, RopeScaling.yarn) and model.rope_original_block_size is None:
        raise ConfigError(
            f"model.rope_scaling={scaling.name} without model.rope_original_block_size",
            "the sequence length before the scaling, from which slow and fast are told apart",
            "model.rope_original_block_size=8192",
        )


def check_window(model: ModelConfig) -> None:
    """Raise ConfigError if ``global_every`` or ``rope_base_local`` is set without ``window``, or ``rope_base_local``
    without rotary positions."""
    check_numbers("model.", model, ("window", "rope_base_local"), global_every=(2, INF))
    if model.window is None:
        for key in ("global_every", "rope_base_local"):
            if (value := getattr(model, key)) is not None:
                raise ConfigError(
                    f"model.{key}={value:g} without model.window",
                    "a window, which makes layers local",
                    f"model.window=512, or model.{key}=null",
                )
    if model.rope_base_local is not None and model.position is not Position.rope:
        raise ConfigError(
            f"model.rope_base_local={model.rope_base_local:g} with other positions than rotary ones",
            "rotary positions, whose base it is",
            "model.position=rope",
        )


def check_attention(model: ModelConfig) -> None:
    """Raise ConfigError if the chosen attention does not support the window, the sinks or the bound of the scores."""
    own = next((key for key in ("window", "attention_sinks") if getattr(model, key)), None)
    if own is not None and isinstance(model.attention, str):
        raise ConfigError(
            f"model.{own}={str(getattr(model, own)).lower()} with model.attention={model.attention}",
            f"built-in attention, which alone reads model.{own}",
            "model.attention=sdpa",
        )
    if model.attention_softcap is not None and model.attention is not AttentionBackend.manual:
        raise ConfigError(
            f"model.attention_softcap={model.attention_softcap:g} with "
            f"model.attention={getattr(model.attention, 'name', model.attention)}",
            "attention that writes the scores out, since torch's fused kernels have no bound of them",
            "model.attention=manual, or model.attention_softcap=null",
        )


def check_block(model: ModelConfig) -> None:
    """Raise ConfigError for ``parallel_residual`` with norms after attention and ffn."""
    if model.parallel_residual and model.norm_position is not NormPosition.pre:
        raise ConfigError(
            f"model.parallel_residual=true with model.norm_position={model.norm_position.name}",
            "norms before attention and ffn, since there is one addition and nothing between the two",
            "model.norm_position=pre",
        )


def check_activation(model: ModelConfig) -> None:
    """Raise ConfigError if the feed-forward layer is ``swiglu`` or ``geglu``, and the activation is not one that
    belongs to it."""
    # The names of these layers imply their activations (arXiv 2002.05202). With another activation, the layer would
    # have the name of a different known layer.
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


def check_adapters(model: ModelConfig) -> None:
    """Raise ConfigError if ``lora.targets`` names a layer that the model does not have, or names one twice."""
    lora = model.lora
    check_numbers("model.lora.", lora, ("alpha",), ("rank",), dropout=(0.0, 0.99))
    possible = [
        target
        for target, module in LORA_TARGETS.items()
        if not isinstance(getattr(model, module.partition(".")[0]), str)
        and not (model.ffn is Ffn.moe and module.startswith("ffn."))
        and (target != "gate" or model.gated)
        and (target not in ("query", "key", "value") or model.kv_lora_rank is None)
    ]
    if lora.rank and (not lora.targets or {*lora.targets} - {*possible} or len({*lora.targets}) < len(lora.targets)):
        raise ConfigError(
            f"model.lora.targets=[{','.join(lora.targets)}]",
            f"linear layers of this model, each once, of {', '.join(possible) or 'which it has none'}",
            f"model.lora.targets=[{','.join(possible[:3:2])}]" if possible else "model.lora.rank=0",
        )


def check_experts(model: ModelConfig) -> None:
    """Raise ConfigError for the first key of a mixture of experts that cannot work."""
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
    check_numbers(
        "model.",
        model,
        ("capacity_factor", "balance_bias_rate"),
        ("n_shared_expert", "balance_weight", "z_coefficient"),
    )
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
