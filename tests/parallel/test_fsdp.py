"""FSDP: groups, offload, models made on the meta device, and the memory that each strategy needs."""

from __future__ import annotations

import hashlib
import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from gpt.accounting import BF16, FP32
from gpt.config import ModelConfig, ParallelConfig, Precision, Strategy, TrainConfig
from gpt.model import gpt
from gpt.model.gpt import GPT
from gpt.parallel.dtensor import local_tensor, materialize
from gpt.parallel.nd import apply_fsdp, prefetch_forward
from gpt.planning.memory import parallel_factors, per_rank, states
from gpt.planning.rank_shards import activation_bytes, cast_elements, parameter_shards
from gpt.topology import fsdp_units, split_batch
from gpt.topology.check_dims import check_parallel_dims
from gpt.topology.schedules import rank_stages
from gpt.training import run as run_module
from gpt.training.checkpoints import save
from launch.errors import ConfigError
from tests.support.composing import config_from
from tests.support.distributed import run_distributed
from tests.support.learning import (
    BATCH,
    DEEPSPEED,
    MODELS,
    TINY,
    Operations,
    compose,
    held_bytes,
    learn,
    living_bytes,
    start,
    start_composed,
    step,
    whole,
)
from tests.support.small_models import LLAMA, random_tokens, small

RANKS, BLOCKS = 8, 5
UNTIED = small(**LLAMA, n_layer=BLOCKS)
LEARNED = small(n_layer=BLOCKS, tie_embeddings=False)
TIED = small(n_layer=BLOCKS)
PARAMETERS = sum(p.numel() for p in GPT(UNTIED).blocks[0].parameters())
"""Of a block."""


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield init_device_mesh("cpu", (RANKS,))
    dist.destroy_process_group()


def sharded(model: ModelConfig, mesh: DeviceMesh, **keys: Any) -> GPT:
    gpt = GPT(model)
    parallel = ParallelConfig(Strategy.fsdp, **keys)
    apply_fsdp(gpt, mesh, TrainConfig(model=model, parallel=parallel, precision=Precision.bf16))
    return gpt


def gathers(gpt: GPT) -> tuple[list[int], list[int]]:
    """Elements of each all-gather of the second forward pass, and of its backward pass."""
    found: list[int] = []

    def is_gather(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        if "allgather_base" in name or "all_gather_into_tensor" in name:
            found.append(args[0].numel())
        return False

    tokens_BT = random_tokens(gpt.config, 2)
    for _ in range(2):
        found.clear()
        with Operations(is_gather):
            logits_BTV = gpt(tokens_BT)
            forward = list(found)
            logits_BTV.float().square().mean().backward()
    return forward, found[len(forward) :]


def elements(*modules: torch.nn.Module) -> int:
    """Elements of some modules of a whole model, each parameter padded to a multiple of the ranks."""
    return sum(-(-len(p) // RANKS) * RANKS * p[0].numel() for m in modules for p in m.parameters())


@pytest.mark.parametrize("model", [UNTIED, LEARNED], ids=["rotary", "learned positions"])
def test_the_embedding_alone_is_gathered_first_and_what_ends_a_pass_once(model: ModelConfig, mesh: DeviceMesh) -> None:
    whole = GPT(model)
    entry = [m for m in (whole.token_embedding, whole.position) if m is not None]
    block, end = elements(whole.blocks[0]), elements(whole.norm, whole.head)
    forward, backward = gathers(sharded(model, mesh))
    assert forward == [elements(*entry), *[block] * BLOCKS, end]
    assert backward == [block] * (BLOCKS - 1)


def test_a_tied_matrix_is_gathered_once(mesh: DeviceMesh) -> None:
    whole = GPT(TIED)
    assert whole.position is not None
    forward, backward = gathers(sharded(TIED, mesh))
    block = elements(whole.blocks[0])
    assert forward == [elements(whole.token_embedding, whole.position, whole.norm), *[block] * BLOCKS]
    assert backward == [block] * (BLOCKS - 1)


@pytest.mark.parametrize("model", [UNTIED, TIED], ids=["untied", "tied"])
def test_nothing_is_gathered_again_without_resharding(model: ModelConfig, mesh: DeviceMesh) -> None:
    assert gathers(sharded(model, mesh, reshard_after_forward=False))[1] == []


@pytest.mark.parametrize(
    ("least", "units"), [(1, [1] * 5), (PARAMETERS, [1] * 5), (PARAMETERS + 1, [2, 3]), (4 * PARAMETERS, [5])]
)
def test_units_have_as_many_parameters_as_is_asked_for(least: int, units: list[int], mesh: DeviceMesh) -> None:
    forward, backward = gathers(sharded(UNTIED, mesh, fsdp_min_num_params=least))
    block = elements(GPT(UNTIED).blocks[0])
    assert forward[1:-1] == [count * block for count in units]
    assert backward == [count * block for count in reversed(units[:-1])]


def test_a_stage_with_too_few_parameters_is_one_unit_and_one_without_blocks_none() -> None:
    parallel = ParallelConfig(Strategy.fsdp, fsdp_min_num_params=4 * PARAMETERS)
    config = TrainConfig(model=UNTIED, parallel=parallel)
    assert [fsdp_units(config, layers) for layers in (0, 3, 4, 7, 8)] == [[], [3], [4], [7], [4, 4]]


@pytest.mark.parametrize(
    ("keys", "fix"),
    [
        ({"strategy": Strategy.ddp}, "parallel=fsdp"),
        ({"strategy": Strategy.fsdp, "ep": 2}, "parallel.fsdp_min_num_params=null"),
        ({"strategy": Strategy.fsdp, "fsdp_min_num_params": 0}, "parallel.fsdp_min_num_params=1"),
    ],
)
def test_units_where_there_are_none_are_refused(keys: dict[str, Any], fix: str) -> None:
    with pytest.raises(ConfigError, match="fsdp_min_num_params=") as refused:
        ParallelConfig(**{"fsdp_min_num_params": 10**6, **keys}).validate()
    assert fix in str(refused.value)


def test_blocks_that_wait_for_the_device_gather_the_next_one_before(mesh: DeviceMesh) -> None:
    gpt = sharded(UNTIED, mesh)
    prefetch_forward([[block] for block in gpt.blocks])
    started: list[str] = []
    for number, block in enumerate(gpt.blocks):
        block.attention.register_forward_pre_hook(lambda *_, number=number: started.append(f"block {number}"))

    def is_gather(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        if "allgather_base" in name:
            started.append("gather")
        return False

    with torch.no_grad(), Operations(is_gather):
        gpt(random_tokens(UNTIED, 2))
    ahead = [event for number in range(1, BLOCKS) for event in (f"block {number - 1}", "gather")]
    assert started == ["gather", "gather", "gather", *ahead[:-1], f"block {BLOCKS - 1}", "gather"]


@pytest.mark.parametrize(
    ("keys", "fix"),
    [
        ({"strategy": Strategy.ddp}, "parallel=fsdp"),
        ({"strategy": Strategy.fsdp, "pp": 2}, "parallel.reduce_each_micro_batch=false"),
    ],
)
def test_gradients_that_no_micro_batch_reduces_are_refused(keys: dict[str, Any], fix: str) -> None:
    with pytest.raises(ConfigError, match="reduce_each_micro_batch=true") as refused:
        ParallelConfig(**keys, reduce_each_micro_batch=True).validate()
    assert fix in str(refused.value)


# Offloaded state learns the same, and is not counted on the device.


WORDS = [*MODELS["untied, grouped queries"], "optim.max_micro_batch=2"]


def offloaded(run: Any) -> bool:
    """Tell whether fsdp was told to keep every parameter of a run on the host."""
    groups = [m._get_fsdp_state()._fsdp_param_group for m in run.engine.module.modules() if isinstance(m, FSDPModule)]
    return all(p.offload_to_cpu for group in groups if group is not None for p in group.fsdp_params)


def learn_both(rank: int, size: int, folder: Path) -> dict[str, Any]:
    plain = start(rank, size, folder / "plain", "parallel=fsdp", *WORDS)
    host = start(rank, size, folder / "host", "parallel=fsdp_offload", *WORDS)
    found = {"offloaded": (offloaded(plain), offloaded(host)), "plain": learn(plain), "host": learn(host)}
    save(host)
    to_come = [step(host) for _ in range(2)]
    for way in ("fsdp", "fsdp_offload"):
        again = start(rank, size, folder / "host", f"parallel={way}", *WORDS)
        assert again.step == host.step - 2
        found[way] = ([step(again) for _ in range(2)], to_come)
    return found


def test_offloading_changes_no_bit_and_checkpoints_cross(tmp_path: Path) -> None:
    found = run_distributed(learn_both, 2, tmp_path / "runs")[0]
    assert found["offloaded"] == (False, True)
    for what in ("losses", "norms"):
        assert found["host"][what] == found["plain"][what]
    for what in ("gradients", "weights"):
        for name, tensor in found["plain"][what].items():
            assert torch.equal(found["host"][what][name], tensor), f"{what} of {name}"
    for way in ("fsdp", "fsdp_offload"):
        steps, to_come = found[way]
        assert steps == to_come


def composed(*words: str) -> TrainConfig:
    config = config_from([*TINY, *words])
    config.validate()
    return config


def test_what_is_on_the_host_is_not_planned_on_the_device() -> None:
    plain, host = (
        per_rank(config, dims := check_parallel_dims(config, 2), split_batch(config.optim, dims.data_ranks))
        for config in (composed("parallel=fsdp"), composed("parallel=fsdp_offload"))
    )
    assert plain.host == 0
    assert host.host == plain.parameters + plain.gradients + plain.optimizer > 0
    assert host.total + host.host == plain.total


@pytest.mark.parametrize(
    ("words", "ranks", "found"),
    [
        (["parallel=ddp", "parallel.cpu_offload=true"], 2, "parallel.cpu_offload=true with parallel.strategy=ddp"),
        (
            ["parallel=pp_fsdp", "parallel.cpu_offload=true", "parallel.pp=2", "model.tie_embeddings=true"],
            4,
            "parallel.cpu_offload=true with parallel.pp=2",
        ),
    ],
)
def test_what_cannot_be_offloaded_is_refused_and_the_fix_is_accepted(words: list[str], ranks: int, found: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_parallel_dims(composed(*words), ranks)
    assert found in refused.value.found
    for fix in refused.value.fix.split(", or "):
        kept = [word for word in words if not word.startswith("parallel=")] if "parallel=" in fix.split()[0] else words
        check_parallel_dims(composed(*kept, *fix.split()), ranks)


# A model sharded on the meta device gets the values of one drawn whole, a shard and one parameter at a time.


SEED = 11
WORDS_OF_MATERIALIZE = [f"seed={SEED}", "optim.max_micro_batch=2", "model.vocab_multiple=8"]
PP = ["parallel.pp=2", "model.n_layer=4"]
"""Two stages on each of two ranks."""
BIASED = [*MODELS["experts"], "model.expert_balance=bias"]
UNTIED_OF_MATERIALIZE = MODELS["untied, grouped queries"]
KEEPS = "parallel.reshard_after_forward=false"
LAYOUTS = {
    "ddp": ["parallel=ddp", *MODELS["tied"]],
    "zero1": ["parallel=zero1", *UNTIED_OF_MATERIALIZE],
    "fsdp": ["parallel=fsdp", *MODELS["tied"]],
    "fsdp on the host": ["parallel=fsdp", "parallel.cpu_offload=true", *UNTIED_OF_MATERIALIZE],
    "hsdp": ["parallel=hsdp", "parallel.dp_shard=2", *UNTIED_OF_MATERIALIZE],
    "tp": ["parallel=tp", *MODELS["tied"]],
    "fsdp x tp": ["parallel=fsdp_tp", "parallel.tp=2", *UNTIED_OF_MATERIALIZE],
    "cp x fsdp": ["parallel=fsdp", "parallel.cp=2", *UNTIED_OF_MATERIALIZE],
    "ep x tp": ["parallel=ep", "parallel.ep=2", "parallel.tp=2", *BIASED],
    "ep x tp x fsdp": ["parallel=fsdp_ep", "parallel.ep=2", "parallel.tp=2", *BIASED],
    "ep x fsdp": ["parallel=fsdp_ep", "parallel.ep=2", *BIASED],
    "pp of two stages": ["parallel=ddp", *PP, "parallel.schedule=interleaved", *UNTIED_OF_MATERIALIZE],
    "pp in a V x fsdp": ["parallel=fsdp", *PP, "parallel.schedule=zbv", KEEPS, *MODELS["tied"]],
    "pp x tp": ["parallel=tp", "parallel.tp=2", "parallel.pp=2", *MODELS["tied"]],
    "ZeRO 0": ["parallel=ds_zero0", *UNTIED_OF_MATERIALIZE],
}


def begin(rank: int, size: int, folder: Path) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """For each layout the tensors that its ranks begin with, brought together, and its tables."""
    found = {}
    for name, words in LAYOUTS.items():
        run = start(rank, size, folder / name.replace(" ", "_"), *WORDS_OF_MATERIALIZE, *words)
        module = run.engine.module
        found[name] = (whole(run, module.state_dict()), whole(run, dict(module.named_buffers())))
    return found


def drawn_whole(name: str, tensor: Tensor, vocab: int) -> Tensor:
    """A matrix of the model by the rule that is written down: one generator for each name, padding of zeros."""
    seed = int.from_bytes(hashlib.sha256(f"{SEED}:{name}".encode()).digest()[:8], "big") >> 1
    rows = vocab if name in ("token_embedding.weight", "head.weight") else len(tensor)
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(rows, *tensor.shape[1:]).normal_(std=0.02, generator=generator)
    return F.pad(values, (0, 0, 0, len(tensor) - rows))


def test_every_engine_begins_with_the_bits_of_one_that_draws_the_model_whole(tmp_path: Path) -> None:
    found = run_distributed(begin, 4, tmp_path / "runs", timeout_s=400, imports=DEEPSPEED)[0]
    for layout, words in LAYOUTS.items():
        config = compose(*WORDS_OF_MATERIALIZE, *words).model
        model = GPT(config)
        gpt.initialize(model, SEED)
        tensors, tables = found[layout]
        assert tensors.keys() == model.state_dict().keys(), layout
        for name, expected in model.state_dict().items():
            assert torch.equal(tensors[name], expected), f"{layout}: {name}"
        for name, expected in model.named_buffers():
            assert torch.equal(tables[name], expected), f"{layout}: {name}"
        for name in ("token_embedding.weight", "blocks.1.attention.query.weight"):
            assert torch.equal(tensors[name], drawn_whole(name, tensors[name], config.vocab_size)), f"{layout}: {name}"


def watch(rank: int, size: int, folder: Path) -> tuple[list[int], int, int]:
    """Whole tensors alive when the next is drawn; bytes that a rank then holds; draws of a run that goes on."""
    config = compose(*WORDS_OF_MATERIALIZE, "parallel=fsdp", *UNTIED_OF_MATERIALIZE)
    alive: list[int] = []
    drawn: list[weakref.ref[Tensor]] = []
    draw = gpt.initial_value

    def counted(*args: object, **kwargs: object) -> Tensor:
        alive.append(sum(reference() is not None for reference in drawn))
        value = draw(*args, **kwargs)  # type: ignore[arg-type]
        drawn.append(weakref.ref(value))
        return value

    gpt.initial_value = counted  # type: ignore[assignment]
    run = start_composed(rank, size, folder, config)
    held = sum(local_tensor(p).untyped_storage().nbytes() for p in run.engine.module.parameters())
    run.step = 1
    save(run)
    before = len(drawn)
    start_composed(rank, size, folder, config)
    return alive, held, len(drawn) - before


def test_a_rank_holds_its_shards_and_one_whole_tensor_and_draws_nothing_where_it_resumes(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = GPT(compose(*WORDS_OF_MATERIALIZE, "parallel=fsdp", *UNTIED_OF_MATERIALIZE).model)
    total = sum(p.nbytes for p in model.parameters())
    for alive, held, again in run_distributed(watch, 4, tmp_path / "runs"):
        assert len(alive) == len(model.state_dict()) and not any(alive)
        assert held < total / 4 + 64 * len(alive), "rows that do not divide are padded"
        assert again == 0


def test_what_a_checkpoint_is_about_to_fill_takes_no_memory() -> None:
    shape = torch.Size((1 << 30, 1 << 10))
    assert run_module.zeros("head.weight", shape).shape == shape
    config = compose("parallel=ddp", *UNTIED_OF_MATERIALIZE).model
    with torch.device("meta"):
        model = GPT(config)
    materialize([model], run_module.zeros, torch.device("cpu"))
    assert not any(parameter.any() for parameter in model.parameters())


# Memory that the ranks of every kind of engine hold is what the plan says.


WORDS_OF_MEMORY = ["model.n_head=4"]
LAYERS = "model.n_layer=4"
"""For pipelines, some of which have two stages on each of two ranks."""
LAYOUTS_OF_MEMORY = {
    "ddp": "parallel=ddp",
    "zero1": "parallel=zero1",
    "fsdp": "parallel=fsdp",
    "hsdp": "parallel=hsdp parallel.dp_shard=2",
    "tp": "parallel=tp",
    "fsdp x tp": "parallel=fsdp_tp",
    "pp": "parallel=ddp parallel.pp=2",
    "pp in a V": "parallel=ddp parallel.pp=2 parallel.schedule=zbv",
    "pp of two stages": "parallel=ddp parallel.pp=2 parallel.schedule=interleaved",
    "pp x fsdp": "parallel=fsdp parallel.pp=2",
    "cp": "parallel=cp",
    "cp x fsdp": "parallel=fsdp parallel.cp=2",
    "pp x tp": "parallel=tp parallel.pp=2",
    "ep": "parallel=ep parallel.ep=2",
    "ep x fsdp": "parallel=fsdp_ep parallel.ep=2",
    "ep x tp": "parallel=ep parallel.ep=2 parallel.tp=2",
    "ep x tp x fsdp": "parallel=fsdp_ep parallel.ep=2 parallel.tp=2",
    "ZeRO 0": "parallel=ds_zero0",
    "ZeRO 1": "parallel=ds_zero1",
    "ZeRO 1 in bf16": "parallel=ds_zero1 precision=bf16",
    "ZeRO 2": "parallel=zero2",
    "ZeRO 3": "parallel=zero3",
    "ZeRO 3 in bf16": "parallel=zero3 precision=bf16",
    # With two micro-batches a step the first stage holds all gradients between its two backward passes only, where
    # ``held_bytes``, which looks ahead of forward passes, does not see them.
    "pp x ZeRO 1": "parallel=ds_pp_zero1 optim.max_micro_batch=2",
}
LONG = ["model.n_embd=64", "model.block_size=64"]
"""For recomputation, which leaves so little that what torch keeps once for each micro-batch shows."""
DENSE = "untied, grouped queries"
ON_4 = ("zero1", "fsdp", "hsdp", "ep x tp x fsdp", "pp x ZeRO 1")
"""Where two ranks would leave something whole; and all that shards in two ways."""
ACCUMULATED = ("ddp", "zero1", "fsdp", "tp", "cp", "ep x fsdp")
"""With several micro-batches a step, as all pipelines and all of DeepSpeed."""
CASES = [
    *((name, DENSE) for name in LAYOUTS_OF_MEMORY if "ep" not in name.split()),
    *((name, "tied") for name in ("ddp", "pp", "pp x tp")),
    *((name, "experts") for name in ("ep", "ep x fsdp", "ep x tp", "ep x tp x fsdp")),
]


def ranks_of(name: str) -> int:
    """Four for a layout that shards in two ways or would leave something whole on two, else two."""
    return 4 if " x " in name or name in ON_4 else 2


Cases = dict[tuple[str, ...], TrainConfig]
Held = dict[tuple[str, ...], list[tuple[int, int, int]]]
"""Bytes of parameters, gradients and optimizer on each rank, by layout and model."""


def config_of(name: str, model: str) -> TrainConfig:
    layers = [LAYERS] if "pp" in name.split() else []
    # What is held between micro-batches shows in what each engine adds, not in how its shards are combined.
    micro = 2 if name in ACCUMULATED else 4 if {"pp", "ZeRO"} & set(name.split()) else BATCH
    return compose(
        *WORDS_OF_MEMORY, f"optim.max_micro_batch={micro}", *layers, *LAYOUTS_OF_MEMORY[name].split(), *MODELS[model]
    )


def hold(rank: int, size: int, folder: Path, cases: Cases) -> dict[tuple[str, ...], tuple[int, int, int]]:
    found = {}
    for number, (case, config) in enumerate(cases.items()):
        run = start_composed(rank, size, folder / str(number), config)
        step(run)
        found[case] = held_bytes(run)
    return found


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Held:
    found: Held = {}
    for size in (2, 4):
        cases = {(name, model): config_of(name, model) for name, model in CASES if ranks_of(name) == size}
        ranks = run_distributed(
            hold, size, tmp_path_factory.mktemp("held") / "runs", cases, timeout_s=400, imports=DEEPSPEED
        )
        found |= {case: [rank[case] for rank in ranks] for case in cases}
    return found


@pytest.mark.parametrize(("name", "model"), CASES)
def test_every_rank_holds_what_the_plan_says(name: str, model: str, held: Held) -> None:
    config, by_rank = config_of(name, model), held[name, model]
    dims = check_parallel_dims(config, len(by_rank))
    assert split_batch(config.optim, dims.data_ranks).global_batch == BATCH
    line = len(by_rank) // dims.pp
    for stage in range(dims.pp):
        said = states(config, dims, parameter_shards(config.model, dims, rank_stages(config, stage)))
        expected = (said.parameters, said.gradients, said.optimizer)
        # The first of those that share a tensor has the largest part of it.
        found = tuple(map(max, zip(*by_rank[stage * line : (stage + 1) * line], strict=True)))
        assert found == expected, f"{name} of {model}, stage {stage}"


def test_memory_falls_as_promised(held: Held) -> None:
    most = {name: tuple(map(max, zip(*held[name, DENSE], strict=True))) for name in ("ddp", "zero1", "fsdp")}
    whole, stepped, shards = most["ddp"], most["zero1"], most["fsdp"]
    assert stepped[0] == whole[0]
    assert stepped[1:] == pytest.approx([part / 4 for part in whole[1:]], rel=0.03)
    assert shards == pytest.approx([part / 4 for part in whole], rel=0.03)


WAYS = {
    "tp": "parallel=tp",
    "whole stream": "parallel=tp parallel.sequence_parallel=false",
    "cp": "parallel=cp",
    "ring": "parallel=cp parallel.cp_method=ring",
}
PRECISIONS = {
    "tp": ("bf16", "fp32"),
    "whole stream": ("fp32", "bf16"),
    "cp": ("bf16", "fp32"),
    "ring": ("fp32", "bf16"),
}
"""Of the dense model and of the one with experts: each way and each model in both."""
COPIES = {"ddp": "parallel=ddp", "ep": "parallel=ep parallel.ep=2 model.capacity_factor=1"}
"""With as many rows for every expert: else how many are sent to a rank depends on the tokens."""
ACTIVATIONS = {
    **{
        (way, model, precision): [f"precision={precision}", *WAYS[way].split(), *MODELS[model]]
        for (way, (dense, mixture)), model in itertools.product(PRECISIONS.items(), MODELS)
        for precision in ({"tied": "fp32", DENSE: dense, "experts": mixture}[model],)
    },
    **{
        (way, "experts", "selective"): ["recompute=selective", *words.split(), *MODELS["experts"], *LONG]
        for way, words in {**WAYS, **COPIES}.items()
    },
}


def keep(rank: int, size: int, folder: Path, cases: Cases) -> dict[tuple[str, ...], int]:
    each = enumerate(cases.items())
    return {case: living_bytes(start_composed(rank, size, folder / str(i), config)) for i, (case, config) in each}


def test_activations_of_a_rank_are_what_the_plan_says(tmp_path: Path) -> None:
    cases: Cases = {
        case: compose(*WORDS_OF_MEMORY, "optim.max_micro_batch=2", *words) for case, words in ACTIVATIONS.items()
    }
    found = run_distributed(keep, 2, tmp_path / "runs", cases, timeout_s=300)
    for case, config in cases.items():
        dims, width = check_parallel_dims(config, 2), BF16 if config.precision is Precision.bf16 else FP32
        micro = split_batch(config.optim, dims.data_ranks).micro
        said = activation_bytes(config.model, micro, config.precision, config.recompute, parallel_factors(config, dims))
        casts = BF16 * cast_elements(parameter_shards(config.model, dims)) if width == BF16 else 0
        tokens, columns = micro * config.model.block_size // dims.cp, config.model.padded_vocab // dims.tp
        total = said.embedding + config.model.n_layer * said.recomputed + said.final + casts + width * tokens * columns
        assert total == pytest.approx(max(rank[case] for rank in found), rel=0.01), case
