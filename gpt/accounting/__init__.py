"""Figures of accelerators; parameters, floating-point operations and utilization of a model, from its config alone.

Imports no torch.
"""

from __future__ import annotations

import csv
import math
import re
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import resources
from typing import NamedTuple

from gpt.components import NOTHING, part_counts
from gpt.config import AttentionBackend, Ffn, ModelConfig, Norm, NormPosition, Position, Precision, Recompute
from gpt.config.model import CACHED

# Peak rates, memory and links of accelerators, by the name that the device reports.
#
# ``accelerators.csv`` has the figures. A device outside that table has no known figures, and no utilization is reported
# for it. A guessed peak would give a wrong utilization.


GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Accelerator:
    """Figures of one kind of device, as its vendor states them: a row of ``accelerators.csv``."""

    name: str
    """Whole name, as ``torch.cuda.get_device_name()`` returns it."""
    peaks: dict[str, float]
    """``bf16``, ``fp16``, ``fp32`` or ``tf32`` -> dense peak in TFLOP/s; without precisions that the device lacks."""
    memory_gb: float
    """Memory in GB (10^9 bytes)."""
    link_gb: float
    """Bandwidth from a device to the other devices of its node, in one direction, in GB/s."""
    network_gb: float | None
    """Bandwidth of a device's share of the network of its node, in one direction, in GB/s; None if unknown."""
    has_float8: bool
    """True if the device multiplies 8-bit floating point numbers."""
    words: set[str]
    """Words, in lower case, that a short name of the device may contain."""

    @property
    def half(self) -> Precision:
        """16-bit precision of the device's matrix units: bf16, or fp16 if they do not support bf16."""
        return Precision.bf16 if "bf16" in self.peaks else Precision.fp16

    @property
    def has_tf32(self) -> bool:
        """True if the device can round the factors of fp32 products to TF32."""
        return "tf32" in self.peaks

    def peak(self, precision: Precision, tf32: bool = False) -> float | None:
        """Return the dense peak in ``precision``, in TFLOP/s; None if the device lacks the precision.

        If ``tf32`` is True and the device supports TF32, the peak for fp32 is that of TF32.
        """
        return self.peaks.get("tf32" if tf32 and self.has_tf32 and precision is Precision.fp32 else precision.name)


VENDOR_WORDS = ("nvidia", "tesla", "geforce", "rtx", "amd", "instinct", "oam")
"""Words that are ignored when names of devices are compared."""
VARIANTS = {"ti", "super", "d"}
"""Words that distinguish devices whose names are otherwise equal: an RTX 4080 is not an RTX 4080 SUPER."""
SXM = "sxm"
"""Word for the form factor SXM of a device, as opposed to a PCIe card. A short name without a form factor, such as
H100, means SXM."""


def words_of(name: str) -> list[str]:
    """Return the words of a device's name in lower case, without ``VENDOR_WORDS``. A size of memory becomes one word,
    such as ``80gb``."""
    spelled = re.sub(r"\b(\d{2,3})(?: ?(?:gib|gb|g))?\b", r"\1gb", re.sub(r"[\s_-]+", " ", name.lower()))
    return [word for word in re.sub(r"\brtx(?=\d)", "rtx ", spelled).split() if word not in VENDOR_WORDS]


def plain_name(name: str) -> str:
    """Return a device's name in lower case, without ``nvidia``, ``tesla`` and ``oam``, which only some drivers
    write."""
    return re.sub(r"^(nvidia|tesla) | oam$", "", name.strip().lower())


def read_accelerators() -> dict[str, Accelerator]:
    """Read ``accelerators.csv``. Return a dictionary from ``plain_name`` to device, in the order of the file."""
    lines = resources.files("gpt.accounting").joinpath("accelerators.csv").read_text().splitlines()
    found = {}
    for row in csv.DictReader((line for line in lines if not line.startswith("#")), skipinitialspace=True):
        peaks = {name: float(row[name]) for name in ("bf16", "fp16", "fp32", "tf32") if row[name]}
        memory, link, network = (float(row[name] or 0) for name in ("memory_gb", "link_gb", "network_gb"))
        words = {*words_of(row["name"]), f"{memory:.0f}gb", *row["words"].split()}
        found[plain_name(row["name"])] = Accelerator(
            row["name"], peaks, memory, link, network or None, row["float8"] == "yes", words
        )
    return found


ACCELERATORS = read_accelerators()
KNOWN = tuple(device.name for device in ACCELERATORS.values())
"""Whole names of all devices in ``accelerators.csv``, for suggestions in error messages."""


def find(device_name: str) -> Accelerator | None:
    """Return the figures of the device whose driver reports this name; None for an unknown device."""
    return ACCELERATORS.get(plain_name(device_name))


def expand(short_name: str) -> list[str]:
    """Return the whole names of the devices that a short name can mean, such as ``H100``, ``A100-80GB`` or Slurm's
    ``nvidia_h100_80gb_hbm3``.

    Several names if devices differ in memory and the short name does not state it; an empty list for an unknown name. A
    name without a form factor, such as ``H100``, means SXM.
    """
    if known := find(short_name):
        return [known.name]
    given, fitting = words_of(short_name), list[Accelerator]()
    for device in ACCELERATORS.values():
        chip, *others = words_of(device.name)
        if chip in given and device.words.issuperset(given) and not VARIANTS.intersection(others).difference(given):
            fitting.append(device)
    return [device.name for device in fitting if SXM in device.words] or [device.name for device in fitting]


def peak_flops(device_name: str, precision: Precision, tf32: bool = False) -> float | None:
    """Return the dense peak of a device in FLOP/s; None if the device is unknown or lacks the precision.

    ``device_name`` is a result of ``torch.cuda.get_device_name()``. If ``tf32`` is True and the device supports TF32,
    the peak for fp32 is that of TF32.
    """
    known = find(device_name)
    tflops = None if known is None else known.peak(precision, tf32)
    return None if tflops is None else tflops * TERA


def memory_bytes(device_name: str) -> int | None:
    """Return the memory in bytes of the device with this whole name; None if the device is unknown."""
    known = find(device_name)
    return None if known is None else int(known.memory_gb * GIGA)


# Bytes of one element of each dtype, and of a GiB.


FP32, BF16, INT64 = 4, 2, 8
GIB = 2**30


# Number and shapes of a model's parameters.
#
# The planner counts a model before any machine builds it. Tests compare the names and shapes with those of
# ``gpt.model.gpt.GPT``; nothing here imports it.
#
# D width, H heads, K key-value heads, C head width, F inner width of the ffn, V vocabulary, T block size, E experts.


Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Parameters:
    """Number of parameters by component. A tied output matrix counts once, as embedding."""

    embedding: int
    """Parameters of the token embedding, with the padding of the vocabulary."""
    position: int
    """Parameters of the table of positions."""
    attention: int
    """Parameters of the attention of all blocks, with the norms of queries and keys."""
    ffn: int
    """Parameters of the feed-forward layers of all blocks. In a mixture of experts: the router, all experts, and the
    shared experts.
    """
    norm: int
    """Parameters of the norms of all blocks and of the last norm."""
    head: int
    """Parameters of the output matrix; 0 if it is tied to the token embedding."""
    idle: int = 0
    """Number of the parameters in ``ffn`` that do not compute a given token: those of the experts that are not chosen
    for it. 0 without experts."""
    frozen: int = 0
    """Number of the parameters, in all components, that training does not change. With LoRA these are all parameters
    except those of adapters; without LoRA the number is 0."""

    @property
    def total(self) -> int:
        """Number of all parameters."""
        return sum(vars(self).values()) - self.idle - self.frozen

    @property
    def trained(self) -> int:
        """Number of the parameters that are trained: with LoRA those of adapters, else all."""
        return self.total - self.frozen

    @property
    def active(self) -> int:
        """Number of the parameters that compute one token: all except those of the experts that are not chosen for the
        token."""
        return self.total - self.idle

    @property
    def non_embedding(self) -> int:
        """Number of the parameters without token embedding, table of positions and output matrix: N of the scaling laws
        (arXiv 2001.08361, section 2.1)."""
        return self.total - self.embedding - self.position - self.head

    @property
    def active_non_embedding(self) -> int:
        """Number of the parameters in ``non_embedding`` that compute one token: without the experts that are not chosen
        for the token."""
        return self.non_embedding - self.idle

    def as_dict(self) -> dict[str, int]:
        """Return the numbers of parameters by name: those of the components, and the sums, such as ``total``."""
        sums = ("total", "trained", "active", "non_embedding", "active_non_embedding")
        return {**asdict(self), **{name: getattr(self, name) for name in sums}}


class HiddenMatrices(NamedTuple):
    """Size of the matrices of the blocks, which the optimizer Muon updates."""

    elements: int
    """Number of elements of the matrices of all blocks."""
    flops: int
    """FLOPs of one Newton-Schulz iteration on every matrix of all blocks, summed over the matrices."""


def count_hidden(model: ModelConfig) -> HiddenMatrices:
    """Count the elements of the matrices of all blocks, and the FLOPs of a Newton-Schulz iteration on each.

    An iteration on a matrix of *r* x *c*, *r* at most *c*, has three products: 2 r^2 c + 2 r^3 + 2 r^2 c FLOPs. Each
    expert has matrices of its own.
    """
    found = [(math.prod(shape), *sorted(shape[-2:])) for shape in block_shapes(model).values() if len(shape) > 1]
    flops = sum(4 * elements * rows + 2 * elements * rows**2 // columns for elements, rows, columns in found)
    return HiddenMatrices(model.n_layer * sum(elements for elements, *_ in found), model.n_layer * flops)


def count(model: ModelConfig) -> Parameters:
    """Count the parameters of ``model`` by component."""
    block, around = block_shapes(model), outer_shapes(model)
    experts = model.n_layer * size(block, "ffn.experts.")
    idle_experts = model.n_expert - model.n_expert_per_token
    return Parameters(
        embedding=size(around, "token_embedding."),
        position=size(around, "position."),
        attention=model.n_layer * size(block, "attention."),
        ffn=model.n_layer * size(block, "ffn."),
        norm=model.n_layer * sum(size(block, f"{name}.") for name in BLOCK_NORMS) + size(around, "norm."),
        head=size(around, "head."),
        idle=experts // model.n_expert * idle_experts if experts else 0,
        frozen=model.n_layer * frozen_size(model, block) + frozen_size(model, around),
    )


BLOCK_NORMS = ("attention_norm", "ffn_norm", "attended_norm", "fed_norm")
"""Names of the norms of a block; the last two exist with norm_position=both only."""


def size(shapes: Shapes, prefix: str = "") -> int:
    """Return the number of elements of all tensors whose name starts with ``prefix``."""
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix))


def frozen_size(model: ModelConfig, shapes: Shapes) -> int:
    """Return the number of elements of those tensors in ``shapes`` that training does not change, because of LoRA."""
    return size({name: shape for name, shape in shapes.items() if not model.trains(name)})


def block_shapes(model: ModelConfig) -> Shapes:
    """Return name -> shape for every parameter of one block. The names are those inside of the block."""
    width = model.n_embd
    shapes: Shapes = {}
    for norm in BLOCK_NORMS[: norms_per_block(model)]:
        shapes |= norm_shapes(model, norm, width)
    if isinstance(model.attention, str):
        shapes |= part_shapes(model, "attention", "attention")
    else:
        for name, (outputs, inputs) in attention_matrices(model).items():
            shapes |= linear_shapes(model, f"attention.{name}", outputs, inputs)
        for norm, rank in zip(("latent_norm", "query.norm"), model.latent_widths, strict=False):
            shapes |= norm_shapes(model, f"attention.{norm}", rank)
        if model.attention_sinks:
            shapes["attention.sinks.weight"] = (model.n_head,)
        if model.qk_norm:
            shapes |= norm_shapes(model, "attention.query_norm", model.head_dim)
            shapes |= norm_shapes(model, "attention.key_norm", model.head_dim)
        if isinstance(model.position, str) and part_counts(model)["position"].on_heads:
            shapes |= part_shapes(model, "position", "attention.rope")
    if isinstance(model.ffn, str):
        return shapes | part_shapes(model, "ffn", "ffn")
    return shapes | (mixture_shapes(model) if model.ffn is Ffn.moe else dense_shapes(model, "ffn", model.ffn_width))


def attention_matrices(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return name in the attention -> shape (outputs, inputs) for the matrices of built-in attention."""
    width, queries, keys = model.n_embd, model.n_head * model.head_dim, model.kv_heads * model.head_dim
    values, rank, latent = model.n_head * model.value_width, model.q_lora_rank, model.kv_lora_rank
    found = {"query": (queries, width), "output": (width, values)}
    if latent is None:
        return found | {"key": (keys, width), "value": (keys, width)}
    if rank is not None:
        found = {"query.down": (rank, width), "query.up": (queries, rank), "output": (width, values)}
    return found | {"latent": (latent + model.rotary_width, width), "expand": (2 * values, latent)}


def norms_per_block(model: ModelConfig) -> int:
    """Return the number of norms of a block that normalize hidden states. Norms of queries and keys do not count."""
    return 4 if model.norm_position is NormPosition.both else 2


def part_shapes(model: ModelConfig, part: str, name: str) -> Shapes:
    """Return name -> shape for the parameters of a user's class that is a part of the model.

    Args:
        model: config of the model.
        part: key of ``part_counts``, such as ``norm``.
        name: name of the module in the model, with which the names of its parameters begin.
    """
    return {f"{name}.{local}": shape for local, shape in part_counts(model)[part].shapes.items()}


def dense_shapes(model: ModelConfig, name: str, inner: int) -> Shapes:
    """Return name -> shape for the parameters of a feed-forward layer: two matrices, or three if the layer is gated,
    with their biases and adapters.

    ``name`` is the name of the layer in the block, ``inner`` its inner width.
    """
    shapes: Shapes = {}
    for matrix in ("gate", "up") if model.gated else ("up",):
        shapes |= linear_shapes(model, f"{name}.{matrix}", inner, model.n_embd)
    return shapes | linear_shapes(model, f"{name}.down", model.n_embd, inner)


def mixture_shapes(model: ModelConfig) -> Shapes:
    """Return name -> shape for the parameters of a mixture of experts: router, stacked experts, shared experts."""
    width, inner, experts = model.n_embd, model.ffn_width, model.n_expert
    shapes: Shapes = {"ffn.router.weight": (experts, width)}
    for matrix in ("gate", "up") if model.gated else ("up",):
        shapes[f"ffn.experts.{matrix}"] = (experts, inner, width)
    shapes["ffn.experts.down"] = (experts, width, inner)
    return shapes | (dense_shapes(model, "ffn.shared", model.n_shared_expert * inner) if model.n_shared_expert else {})


def outer_shapes(model: ModelConfig) -> Shapes:
    """Return name -> shape for every parameter outside the blocks."""
    shapes: Shapes = {"token_embedding.weight": (model.padded_vocab, model.n_embd)}
    if model.position is Position.learned:
        shapes["position.weight"] = (model.block_size, model.n_embd)
    elif isinstance(model.position, str) and not part_counts(model)["position"].on_heads:
        shapes |= part_shapes(model, "position", "position")
    if model.norm_position is not NormPosition.post:
        shapes |= norm_shapes(model, "norm", model.n_embd)
    if not model.tie_embeddings:
        shapes["head.weight"] = (model.padded_vocab, model.n_embd)
    return shapes


def linear_shapes(model: ModelConfig, name: str, outputs: int, inputs: int) -> Shapes:
    """Return name -> shape for the parameters of the linear layer ``name``: its matrix, and if the model has them its
    bias and its adapter."""
    shapes: Shapes = {f"{name}.weight": (outputs, inputs)}
    if model.bias:
        shapes[f"{name}.bias"] = (outputs,)
    if name in model.adapted:
        shapes |= {f"{name}.lora_a": (model.lora.rank, inputs), f"{name}.lora_b": (outputs, model.lora.rank)}
    return shapes


def norm_shapes(model: ModelConfig, name: str, width: int) -> Shapes:
    """Return name -> shape for the parameters of the norm ``name`` over ``width`` numbers: its gain, and its shift if
    the norm has a shift. A user's norm has the parameters of its class."""
    if isinstance(model.norm, str):
        return part_shapes(model, "norm" if width == model.n_embd else "head_norm", name)
    gain: Shapes = {f"{name}.weight": (width,)}
    return gain | {f"{name}.bias": (width,)} if model.norm is Norm.layernorm else gain


# Floating-point operations (FLOPs) of the model's matrix products.
#
# A product of (m, k) and (k, n) matrices counts 2 m k n. Everything else (norms, softmax, activations, the embedding's
# look-up) is left out, as usual: it is under one percent.
#
# Training is exactly three times the forward pass. The backward pass of a product Y = X W is two products of the same
# cost: one for the gradient of X and one for that of W. Both operands of every product here need a gradient, even in
# the first block, since the embedding before it is trained.
#
# With LoRA, frozen matrices need no gradient: their products cost twice the forward pass. The first block computes no
# gradient of its input either, which is counted all the same.


@dataclass(frozen=True)
class Flops:
    """FLOPs of the matrix products of one or more passes, by component of the model. The function that returns the
    object says which passes."""

    projections: int
    """FLOPs of the query, key, value and output projections of attention."""
    attention: int
    """FLOPs of the scores Q K^T and of the weighted sum of V, for the number of pairs that ``attention_pairs`` returns.
    """
    ffn: int
    """FLOPs of the feed-forward layers. In a mixture of experts: FLOPs of the rows that ``expert_rows`` counts, and of
    the shared experts."""
    logits: int
    """FLOPs of the output matrix, with the padding of the vocabulary."""
    router: int = 0
    """FLOPs of the routers of mixtures of experts."""
    adapters: int = 0
    """FLOPs of the products of the adapters (LoRA)."""
    custom: int = 0
    """Measured FLOPs of the user's classes for attention, norms and positions. Causal attention is not halved. A user's
    feed-forward layer counts in ``ffn``."""

    @property
    def palm(self) -> int:
        """Sum of all components. For one token of training: 6 N + 12 L H Q T (PaLM, arXiv 2204.02311, appendix B).

        L layers, H heads, Q head width, T sequence length; causal attention is not halved. N counts every matrix that a
        token is multiplied with: the output matrix, but not the input embedding, the position table, gains and biases.
        PaLM's N counts all parameters of PaLM. PaLM has one matrix for input and output and no biases, so that the two
        numbers differ by the gains only. Of the experts, only those that the token is routed to count.
        """
        return sum(vars(self).values())

    @property
    def causal(self) -> int:
        """Sum of all components, with attention halved: a causal kernel skips the masked half (as Megatron-LM
        counts)."""
        return self.palm - self.attention // 2


@lru_cache(maxsize=CACHED)
def forward_flops(model: ModelConfig, sequences: int) -> Flops:
    """Return the FLOPs of one forward pass over ``sequences`` sequences of ``block_size`` tokens."""
    tokens = sequences * model.block_size
    heads = model.n_head * (model.head_dim + model.value_width)
    of_experts = model.ffn is Ffn.moe
    rows = sequences * expert_rows(model) + tokens * model.n_shared_expert if of_experts else tokens
    dense = 2 * rows * model.n_layer * (3 if model.gated else 2) * model.n_embd * model.ffn_width
    ours = not isinstance(model.attention, str)
    sizes = {name: math.prod(shape) for name, shape in block_shapes(model).items()} if model.adapted else {}
    return Flops(
        projections=ours * 2 * tokens * model.n_layer * sum(map(math.prod, attention_matrices(model).values())),
        attention=ours * 2 * sequences * heads * attention_pairs(model),
        ffn=sequences * model.n_layer * part_counts(model)["ffn"].flops if isinstance(model.ffn, str) else dense,
        logits=2 * tokens * model.n_embd * model.padded_vocab,
        router=2 * tokens * model.n_layer * model.n_embd * model.n_expert if of_experts else 0,
        adapters=2 * tokens * model.n_layer * sum(s for name, s in sizes.items() if ".lora_" in name),
        custom=sequences * custom_flops(model),
    )


def attention_pairs(model: ModelConfig) -> int:
    """Return the number of pairs of query and key in one sequence, over all layers. Pairs that a mask hides count, too.

    Without a window these are T x T. With a window of W tokens they are W x W for the first block of queries, W x 2W
    for each further block, and fewer for a shorter last block. In both cases about half of the pairs are visible.
    """
    time = model.block_size
    window = min(time, model.window or time)
    local = sum(model.is_local(layer) for layer in range(model.n_layer))
    blocks, rest = divmod(time, window)
    pairs = (2 * blocks - 1) * window**2 + rest * (window + rest)
    return local * pairs + (model.n_layer - local) * time**2


def custom_flops(model: ModelConfig) -> int:
    """Return the FLOPs of the user's attention, norms and positions in a forward pass over one sequence."""
    parts = part_counts(model)
    norm, head_norm, position, attention = (
        parts.get(key, NOTHING) for key in ("norm", "head_norm", "position", "attention")
    )
    norms = norms_per_block(model) * model.n_layer + (model.norm_position is not NormPosition.post)
    in_blocks = position.on_heads and not isinstance(model.attention, str)
    positions = model.n_layer if in_blocks else not position.on_heads
    return norms * norm.flops + positions * position.flops + model.n_layer * (head_norm.flops + attention.flops)


def expert_rows(model: ModelConfig) -> int:
    """Return the number of rows that the experts of one layer compute in training for one sequence.

    Each of the ``block_size`` tokens is one row for each of its experts. With a ``capacity_factor`` every expert
    computes a fixed number of rows, some of them empty.
    """
    time, chosen = model.block_size, model.n_expert_per_token
    if model.capacity_factor is None:
        return time * chosen
    return model.n_expert * min(time, math.ceil(model.capacity_factor * time * chosen / model.n_expert))


def training_flops(model: ModelConfig, sequences: int) -> Flops:
    """Return the FLOPs of one forward and backward pass over ``sequences`` sequences, without recomputation.

    Equal to the count of ``torch.utils.flop_counter.FlopCounterMode`` with ``attention=manual``. A fused kernel
    computes the scores once more in the backward pass. This is a cost of the kernel, not of the model, and is not
    counted.
    """
    frozen = ("projections", "ffn", "logits", "router") if model.adapted else ()
    once = vars(forward_flops(model, sequences))
    return Flops(**{part: (2 if part in frozen else 3) * flops for part, flops in once.items()})


@lru_cache(maxsize=CACHED)
def training_flops_per_token(model: ModelConfig) -> Flops:
    """Return the FLOPs of training on one token: those of a sequence of ``block_size`` tokens, divided by its length
    and rounded down."""
    return Flops(**{part: flops // model.block_size for part, flops in vars(training_flops(model, 1)).items()})


def recomputed_flops_per_token(model: ModelConfig, recompute: Recompute) -> int:
    """Return the FLOPs per token that the backward pass spends on recomputing the blocks.

    ``none`` repeats nothing. ``full`` repeats all products of a block, except the last product if no later operation
    keeps its result: torch stops when it has all tensors that the backward pass needs. Dropout, a norm, and the
    weighting of experts keep the result. On CPUs in fp32 torch always repeats the last product; this function does not
    count that. ``selective`` repeats only attention, and only if a fused kernel draws dropout. Compiled code may repeat
    less.
    """
    once = forward_flops(model, sequences=1)
    if recompute is Recompute.none:
        return 0
    if recompute is Recompute.selective:
        fused = model.attention is not AttentionBackend.manual
        return once.attention // model.block_size if model.dropout and fused else 0
    unknown = isinstance(model.ffn, str)  # the last product of a user's layer is unknown
    last_is_kept = unknown or model.dropout or model.ffn is Ffn.moe or model.norm_position is not NormPosition.pre
    spared = 0 if last_is_kept else once.ffn // (3 if model.gated else 2)
    return (once.palm - once.logits - spared) // model.block_size


# Utilization of a device's peak: MFU and HFU by the usual conventions.


@dataclass(frozen=True)
class Utilization:
    """Rate at which one rank computes, and shares of the peak of its device. Shares are None if the peak is unknown."""

    tflops_per_s: float
    """Model TFLOP/s by the PaLM convention."""
    mfu_palm: float | None
    """Model FLOPs utilization by the PaLM convention (arXiv 2204.02311, appendix B), 0 to 1; None if the peak is
    unknown."""
    mfu_causal: float | None
    """Model FLOPs utilization, 0 to 1, if the FLOPs of causal attention are halved; None if the peak is unknown."""
    hfu: float | None
    """Hardware FLOPs utilization by the PaLM convention, 0 to 1: it also counts the FLOPs of recomputation. None if the
    peak is unknown."""


def utilization(
    flops_per_token: Flops, tokens_per_s: float, peak_flops_per_s: float | None, recomputed_per_token: int = 0
) -> Utilization:
    """Return the utilization of one rank.

    Args:
        flops_per_token: FLOPs of training, from ``training_flops_per_token``.
        tokens_per_s: tokens per second of this rank, not of the whole run.
        peak_flops_per_s: peak of this rank's device, a result of ``peak_flops``; None if unknown.
        recomputed_per_token: FLOPs recomputed in the backward pass, a result of ``recomputed_flops_per_token``.
    """
    rate = flops_per_token.palm * tokens_per_s
    if peak_flops_per_s is None:
        return Utilization(rate / TERA, None, None, None)
    palm = rate / peak_flops_per_s
    causal = flops_per_token.causal * tokens_per_s / peak_flops_per_s
    return Utilization(rate / TERA, palm, causal, hfu=palm + recomputed_per_token * tokens_per_s / peak_flops_per_s)
