"""Groups of training steps that benchmarks.gpu compares, the most important group first, with the sizes of their
models.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.speed.peer_models import Shape
from gpt.config import TrainConfig, compose_train
from gpt.config.rules import is_importable
from gpt.planning import memory
from gpt.planning.auto import assume_precision
from gpt.topology import split_batch
from gpt.topology.check_dims import check_parallel_dims
from launch.errors import ConfigError
from launch.runs.compose import to_schema

COMMON = (
    *("logging.tensorboard=false", "checkpoint.interval=0", "eval.interval=0"),
    *("optim.lr=6e-4", "optim.min_lr=6e-4"),
)
DATA = {"cuda": ("data=synthetic", "data.synthetic.vocab_size=4096"), "cpu": ("data=synthetic",)}
"""Device -> overrides for the data. On a GPU the tokens spread over 4,096 rows of the embedding; bytes would use only
256 rows.
"""
TINY = (
    *("model.n_layer=2", "model.n_head=2", "model.n_embd=32", "model.block_size=32", "model.vocab_size=256"),
    *("model.n_kv_head=null", "model.ffn_hidden=64"),
)
"""Sizes of every model on a CPU. There ``--device cpu`` only tries whether all entries run."""
WHOLE_LOGITS = 12
"""Additional bytes for each logit in a loss that is not fused: fp32 copies of the logits, of their log-softmax, and of
the gradient.
"""
FULLEST = 0.85
"""Largest share of a GPU's memory that the planned memory of all processes may take. CUDA contexts, NCCL and
fragmentation need the rest."""


@dataclass(frozen=True)
class Entry:
    """One training step to measure: a configuration of this project, or another library."""

    name: str
    words: tuple[str, ...] = ()
    """Overrides of ``gpt.train``."""
    without: str = ""
    """Name of the part of this project's training loop that is left out, a key of ``contestant.WITHOUT``; empty: none.
    """
    peer: str = ""
    """Name of the other library whose step is measured; empty for a step of this project."""
    environment: tuple[tuple[str, str], ...] = ()
    """Environment variables of the process, as pairs of name and value."""
    micro_batch: int = 16
    """Sequences in a micro-batch. ``planned`` halves this number until the plan fits into the memory."""
    ranks: int = 1
    planned_gib: float = 0.0
    """Planned memory of a rank, in GiB."""
    target: str = ""
    """Demanded result on one H100, as text for the table; empty: no demand."""


@dataclass(frozen=True)
class Group:
    """Entries that share one table."""

    name: str
    entries: tuple[Entry, ...]
    compares: bool = True
    """True if the table compares each entry with the first one."""
    shape: Shape | None = None
    """Shape of the model if the group has another library; None if the group has only this project."""


@dataclass(frozen=True)
class Machine:
    """Device type, number of ranks and memory of a device, for which the groups are made."""

    device: str
    """``cuda`` or ``cpu``."""
    ranks: int
    memory_gib: float
    """Memory of one device, in GiB."""

    @property
    def room_gib(self) -> float:
        """Memory of one device that plans may use, in GiB: ``memory_gib`` times ``FULLEST``."""
        return FULLEST * self.memory_gib


def planned(machine: Machine, entry: Entry) -> Entry:
    """Return the entry with its batch sizes and its planned memory. Halves the micro-batch until the plan fits.

    Raises:
        ConfigError: the overrides are not valid together or on this number of ranks, or one sequence needs more memory
            than a device has.
    """
    dims = check_parallel_dims(to_schema(compose_train(entry.words), TrainConfig), entry.ranks)
    micro = entry.micro_batch
    while True:
        whole = micro * dims.data_ranks * dims.pp  # as many micro-batches as a pipeline has stages
        words = (*entry.words, f"optim.max_micro_batch={micro}", f"optim.global_batch={whole}")
        config = to_schema(compose_train(words), TrainConfig)
        config.validate()
        if machine.device == "cuda":
            config = assume_precision(config, config.precision)
        need = memory.per_rank(config, dims, split_batch(config.optim, dims.data_ranks)).total_gib
        if entry.peer or entry.without == "fused loss":
            need += WHOLE_LOGITS * micro * config.model.block_size * config.model.padded_vocab / 2**30
        if need <= machine.room_gib:
            return replace(entry, words=words, micro_batch=micro, planned_gib=need)
        if micro == 1:
            found = f"{entry.name}, of which one sequence takes {need:.1f} GiB"
            raise ConfigError(found, f"at most {machine.room_gib:.1f} GiB", "GPUs with more memory")
        micro //= 2


def groups(machine: Machine, with_nanogpt: bool) -> Iterator[Group]:
    """Yield all groups, the most important first, without entries that this machine cannot run; with nanoGPT as a peer
    if ``with_nanogpt`` is True."""
    yield Group("models", tuple(models(machine)), compares=False)
    yield peers(machine, with_nanogpt)
    yield Group("engines", tuple(engines(machine)))
    yield Group("changes", tuple(changes(machine)))
    yield Group("experts", tuple(expert_changes(machine)))
    if is_importable("torchao"):
        yield Group("float8", tuple(float8_changes(machine)))


def words_of(machine: Machine, model: str, *more: str) -> tuple[str, ...]:
    """Return the overrides of ``gpt.train`` for a model on this machine, followed by ``more``."""
    tiny = TINY if machine.device == "cpu" else ()
    gated = model != "gpt2_124m"
    sizes = (word for word in tiny if gated or "ffn_hidden" not in word)
    return (f"model={model}", *sizes, *COMMON, *DATA[machine.device], f"device={machine.device}", *more)


def models(machine: Machine) -> Iterator[Entry]:
    """Yield an entry for each of the three models at its default settings, on all GPUs."""
    ranks = machine.ranks
    sharded = "parallel=fsdp" if ranks > 1 else "parallel=ddp"
    for name, micro, way, target in (
        ("gpt2_124m", 32, "parallel=ddp", "0.40 M tokens/s"),
        ("llama_1p36b", 8, sharded, "MFU 50 %"),
        ("moe_200m", 16, "parallel=ddp", "MFU 35 %"),
    ):
        yield Entry(name, words_of(machine, name, way), micro_batch=micro, ranks=ranks, target=target)


def peers(machine: Machine, with_nanogpt: bool) -> Group:
    """Return the group that compares this project with nanoGPT and transformers on one device, in the shape of GPT-2
    small. On GPUs all are compiled.
    """
    sizes = {"layers": 12, "width": 768, "heads": 12, "block": 1024, "vocab": 50304, "batch": 16}
    if machine.device == "cpu":
        sizes = {"layers": 2, "width": 32, "heads": 2, "block": 32, "vocab": 256, "batch": 16}
    shape = Shape("gpt2", **sizes)
    words = (*shape.words(), *COMMON, *DATA[machine.device], f"device={machine.device}")
    there = {"nanoGPT": with_nanogpt, "transformers": is_importable("transformers")}
    names = [name for name, is_there in there.items() if is_there]
    return Group("peers", (Entry("ours", words), *(Entry(name, words, peer=name) for name in names)), shape=shape)


def engines(machine: Machine) -> Iterator[Entry]:
    """Yield an entry for each engine in eager mode on all GPUs. Each parallel dimension in the name of a preset, such
    as tp or pp, has two ranks. Leaves out engines that do not fit this machine or whose package is missing."""
    dims = {"tp": "tp", "pp": "pp", "cp": "cp", "ep": "ep", "hsdp": "dp_shard"}
    names = ["ddp", "zero1", "fsdp", "hsdp", "tp", "fsdp_tp", "pp", "pp_fsdp", "cp", "fsdp_cp", "ep", "fsdp_ep"]
    if is_importable("deepspeed"):
        names += ["ds_zero0", "ds_zero1", "zero2", "zero3", "ds_pp"]
    for name in names:
        parts = name.split("_")
        model = "moe_200m" if "ep" in parts else "gpt2_124m"
        shrunk = [f"parallel.{dims[part]}=2" for part in parts if part in dims]
        words = words_of(machine, model, "model.n_layer=4", "compile=none", f"parallel={name}", *shrunk)
        entry = Entry(name, words, micro_batch=4, ranks=machine.ranks)
        with contextlib.suppress(ConfigError):
            yield planned(machine, entry)


def changes(machine: Machine) -> Iterator[Entry]:
    """Yield entries on one device: the default settings, then the same model with one of the settings changed."""
    words = words_of(machine, "gpt2_124m")
    yield Entry("gpt2_124m", words)
    yield Entry("compile=none", (*words, "compile=none"))
    yield Entry("precision=fp32, which is TF32", (*words, "precision=fp32"))
    if machine.device == "cuda":
        yield Entry("precision=fp32 tf32=false", (*words, "precision=fp32", "tf32=false"))
    yield Entry("loss by torch's operations, logits whole in fp32", words, "fused loss")
    yield Entry("model.vocab_multiple=1", (*words, "model.vocab_multiple=1"))
    yield Entry("the host waits for each step", words, "running ahead")
    yield Entry("batches read when they are needed", words, "batches read ahead")
    yield Entry("torch's own order of attention kernels", words, "cuDNN attention")
    yield Entry("expandable_segments:False", words, environment=(("PYTORCH_ALLOC_CONF", "expandable_segments:False"),))
    yield Entry("recompute=selective", (*words, "recompute=selective"))


def expert_changes(machine: Machine) -> Iterator[Entry]:
    """Yield entries that measure the gain from the grouped matrix product of experts."""
    words = words_of(machine, "moe_200m")
    yield Entry("moe_200m", words, micro_batch=8)
    yield Entry("compile=none", (*words, "compile=none"), micro_batch=8)
    loop = (*words, "compile=none", "model.expert_matmul=loop")
    yield Entry("compile=none model.expert_matmul=loop", loop, micro_batch=8)


def float8_changes(machine: Machine) -> Iterator[Entry]:
    """Yield entries that measure the gain from float8. A CPU emulates float8, so that float8 is slower than the
    default."""
    words = words_of(machine, "llama_1p36b", *(["float8_emulate=true"] if machine.device == "cpu" else []))
    yield Entry("llama_1p36b", words_of(machine, "llama_1p36b"), micro_batch=2)
    for name in ("tensorwise", "rowwise"):
        yield Entry(f"float8={name}", (*words, f"float8={name}"), micro_batch=2)


def packs(group: Group, machine: Machine, at_once: int) -> Iterator[list[Entry]]:
    """Yield lists of at most ``at_once`` entries whose planned memory fits into one device together. If the entries are
    compared with the first entry of the group, each list begins with that entry. A list without room for it begins with
    another entry."""
    base = group.entries[0] if group.compares else None
    pack: list[Entry] = []
    for entry in group.entries:
        need = sum(one.planned_gib for one in pack) + entry.planned_gib
        if pack and (need > machine.room_gib or len(pack) == at_once):
            yield pack
            pack = [base] if base is not None and base.planned_gib + entry.planned_gib <= machine.room_gib else []
        pack.append(entry)
    yield pack
