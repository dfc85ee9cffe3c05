"""Results of a run's first steps, brought together from all ranks, and those of one process to compare with.

Everything is the training's own code (``gpt.train.build``, ``gpt.training.step``); the reference differs in that
nothing is parallelized or accumulated. AdamW makes a whole step of a gradient however small, also where it is rounding
alone. So there are no biases, since that of the keys has no other gradient, and ``eps`` is far above the rounding of
a gradient.
"""

from __future__ import annotations

import copy
import gc
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from gpt.checkpoint import FailedSave
from gpt.checkpoint.messages import CheckpointError
from gpt.config import Strategy, TrainConfig
from gpt.data.corpus import ensure_tokens
from gpt.data.loader import Samples
from gpt.model.ffn import set_auxiliary_scale
from gpt.model.gpt import GPT, initialize
from gpt.model.layers import autocast
from gpt.parallel.distributed import World
from gpt.parallel.engine import Clipped, shared_squares
from gpt.planning.memory import states
from gpt.planning.rank_shards import parameter_shards
from gpt.topology import parallel_dims
from gpt.topology.schedules import rank_stages
from gpt.train import build
from gpt.training.checkpoints import start_save
from gpt.training.diagnostics import Gradients
from gpt.training.loop import EvaluationShare, mean_loss
from gpt.training.run import Run
from gpt.training.step import lr_at, queue_step
from launch.runs.folder import RunFolder
from launch.runs.process import Phase
from launch.worker import Run as Rank
from tests.support.composing import config_from
from tests.support.distributed import DATA_FOLDER


def save(run: Run) -> None:
    """Write a checkpoint of the step just done, and wait for it; raise CheckpointError if it failed."""
    start_save(run, None)
    found = run.checkpoints.finish()
    if isinstance(found, FailedSave):
        run.checkpoints.give_up()
        raise CheckpointError(found.cause)
    run.worker.saved(run.step, 0.0)


STEPS = 3
"""The second one has what the first left in the optimizer; by the third, biases, which begin at zero, are large beside
the rounding of a gradient."""
BATCH = 16
TINY = [
    *("model.n_layer=2", "model.n_embd=32", "model.n_head=4", "model.block_size=16", "data.max_bytes=60000"),
    *(f"optim.global_batch={BATCH}", "eval.sequences=4", "optim.warmup_steps=2", "optim.eps=1e-6"),
    "logging.tensorboard=false",
]
MODELS = {
    "tied": ["model.tie_embeddings=true", "model.position=learned", "model.norm=layernorm"],
    "untied, grouped queries": ["model.tie_embeddings=false", "model.n_kv_head=2"],
    "experts": ["model.ffn=moe", "model.n_expert=4", "model.n_expert_per_token=2", "model.ffn_hidden=32"],
}
ACCUMULATIONS = (1, 4)
DEEPSPEED = (
    "gpt.parallel.zero",
    "deepspeed.checkpoint.ds_to_universal",
)
"""What ranks that use DeepSpeed import for a second or two, unless what they are forked from has done so."""


@dataclass(frozen=True)
class Case:
    """A run to be compared: its overrides, a model by name, and the micro-batches of a step."""

    words: str
    model: str
    accumulation: int = 2


@cache
def control_group() -> dist.ProcessGroup:
    """The group for messages between the processes, which the runs of one process share."""
    return dist.new_group(backend="gloo")


@cache
def _composed(words: tuple[str, ...]) -> TrainConfig:
    # Composing takes as long as several steps, and would take that on every rank.
    alone = not dist.is_initialized()
    made = [config_from(words) if alone or dist.get_rank() == 0 else None]
    if not alone:
        dist.broadcast_object_list(made, src=0)
    config = made[0]
    assert config is not None
    config.validate()
    return config


def compose(*words: str) -> TrainConfig:
    """The configuration of a tiny run with what is typed; in ranks, one of them composes it for all."""
    return copy.deepcopy(_composed((*TINY, *words)))


def start(rank: int, size: int, folder: Path, *words: str) -> Run:
    """A run of the configuration that is typed, as ``gpt.train`` makes it."""
    return start_composed(rank, size, folder, compose(*words))


def world_of(rank: int, size: int) -> World:
    """The world of a rank on the CPU."""
    return World(rank, size, rank, size, 0, torch.device("cpu"), control_group())


def start_composed(rank: int, size: int, folder: Path, config: TrainConfig) -> Run:
    """A run of a configuration; those that lie in one folder share their data, and so do all of ``run_distributed``."""
    config.data.cache_dir = os.environ.get(DATA_FOLDER) or str(folder.parent / "cache")
    return build(config, RunFolder(folder), world_of(rank, size), 1, Rank())


def start_case(rank: int, size: int, folder: Path, case: Case, model: Sequence[str]) -> Run:
    """The run of a case, whose model has these ``model`` words."""
    config = compose(*model, *case.words.split())
    config.optim.max_micro_batch = BATCH // (parallel_dims(config.parallel, size).data_ranks * case.accumulation)
    run = start_composed(rank, size, folder, config)
    assert run.batch.accumulation == case.accumulation
    return run


def step(run: Run) -> tuple[float, float]:
    """Loss and gradient norm of the next step."""
    record, _ = queue_step(run, None, Phase.training).finish(0.0)
    return record.loss, record.grad_norm


def step_with_figures(run: Run) -> tuple[float, float, dict[str, float]]:
    """Loss, gradient norm and the other figures of the next step: of gradients, by layer too, and of experts."""
    record, _ = queue_step(run, Gradients(run.config.model, run.world.device), Phase.training).finish(0.0)
    assert record.grad_mean is not None and record.grad_std is not None and record.layer_grad_norms is not None
    figures = {"mean": record.grad_mean, "std": record.grad_std, "imbalance": record.expert_imbalance or 0.0}
    return record.loss, record.grad_norm, {**figures, **record.layer_grad_norms}


def evaluated(run: Run, sequences: int = 7, batch: int | None = None) -> float:
    """Loss of the first validation sequences, as many as neither ranks nor passes divide."""
    batch = batch or min(4, run.batch.micro)
    share = EvaluationShare(sequences, batch, run.dims.data_rank(run.world.rank), run.dims.data_ranks)
    return mean_loss(run.engine.module, run.engine.loss, run.samples, run.world, share)


def whole(run: Run, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of all ranks brought together from their parts, by their plain names; rank 0 of a pair is believed."""
    mine = {
        name.removeprefix("module."): (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()
        for name, t in tensors.items()
    }
    found: dict[str, torch.Tensor] = {}
    for theirs in reversed(run.world.gather(mine) if run.dims.pp > 1 else [mine]):
        found |= theirs
    return found


def learn(run: Run, steps: int = STEPS) -> dict[str, Any]:
    """Losses, gradient norms, the first step's gradients, and the figures of the last one and the weights after it."""
    if run.config.parallel.strategy is Strategy.deepspeed:
        return _learn_zero(run, steps)
    seen = [step(run)]
    stepped = run.engine.trained.named_parameters()  # type: ignore[attr-defined]
    gradients = whole(run, {name: p.grad for name, p in stepped if p.grad is not None})
    seen += [step(run) for _ in range(steps - 2)]
    *last, figures = step_with_figures(run)
    losses, norms = zip(*seen, last, strict=True)
    weights = full_weights(run)
    return {"losses": losses, "norms": norms, "gradients": gradients, "figures": figures, "weights": weights}


def _learn_zero(run: Run, steps: int) -> dict[str, Any]:
    """As ``learn``, of DeepSpeed's engine, which has gradients between backward pass and step only, not yet clipped;
    its weights are the masters."""
    from deepspeed.utils import safe_get_full_grad

    parameters = dict(run.engine.module.named_parameters())
    found: dict[str, Any] = {}
    clip = run.engine.clip

    def look(*args: Any) -> Clipped:
        if not found:
            found["gradients"] = whole(run, {name: safe_get_full_grad(p) for name, p in parameters.items()})
            found["norm of the parts"] = norm_of_parts(run)
        return clip(*args)

    run.engine.clip = look  # type: ignore[method-assign]
    seen = [step(run) for _ in range(steps - 1)]
    *last, found["figures"] = step_with_figures(run)
    found["losses"], found["norms"] = zip(*seen, last, strict=True)
    run.engine.clip = clip  # type: ignore[method-assign]
    assert found["norm of the parts"] == pytest.approx(found["norms"][0], rel=1e-5)
    clipped = min(1.0, run.config.optim.grad_clip / (found["norms"][0] + 1e-6))
    found["gradients"] = {name: grad * clipped for name, grad in found["gradients"].items()}
    return found | {"weights": full_weights(run)}


def norm_of_parts(run: Run) -> float:
    """The norm of the gradients, from the shards that the ranks say they hold."""
    parts = [(part, share) for _, part, share in run.engine.gradients()]
    return run.world.all_reduce(torch.stack(shared_squares(parts)).sum()).sqrt().item()


def learn_alone(
    rank: int, size: int, folder: Path, models: Mapping[str, list[str]], steps: int = STEPS
) -> dict[str, dict[str, Any]]:
    """Results of one process for each model, in one micro-batch a step; for ``run_distributed`` with one rank."""
    words = ["parallel=ddp", f"optim.max_micro_batch={BATCH}"]
    found = {}
    for name, model in models.items():
        run = start(rank, size, folder / name, *words, *model)
        found[name] = learn(run, steps) | {"val": evaluated(run)}
    return found


def plain_loop(
    config: TrainConfig,
    cache: Path,
    steps: int,
    micro: int,
    factor: int = 1,
    casts: bool = False,
    scaler: torch.amp.GradScaler | None = None,
) -> dict[str, Any]:
    """Records and weights of a loop of torch's own parts: no engine, torch's clipping, and its scaler in fp16.

    Args:
        config: of the run; its schedule is that of ``lr_at``, which is compared with torch's and with hand-made ones.
        cache: folder of the tokens.
        steps: of a global batch each.
        micro: sequences of a pass.
        factor: by which the loss is larger than the mean over the global batch.
        casts: whether the weights are cast to fp16 before the pass.
        scaler: of the loss, in fp16; None in fp32.
    """
    samples, optim = Samples(ensure_tokens(config.data, cache), config.model.block_size, config.seed), config.optim
    model, batch = GPT(config.model), optim.global_batch
    initialize(model, config.seed)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    scales = scaler or torch.amp.GradScaler("cpu", enabled=False)
    seen: dict[str, list[Any]] = {"losses": [], "norms": [], "scales": [], "skipped": []}
    for number in range(steps):
        optimizer.zero_grad()
        scale, mean = scales.get_scale(), 0.0
        # The losses of routing enter the gradient inside the model, so they are scaled there.
        set_auxiliary_scale(model, factor / batch, torch.tensor(scale))
        for first in range(number * batch, (number + 1) * batch, micro):
            tokens_BT, targets_BT = samples.batch("train", torch.arange(first, first + micro).numpy())
            with torch.autocast("cpu", torch.float16, enabled=scaler is not None):
                cast = {name: p.half() if casts else p for name, p in model.named_parameters()}
                logits_BTV = functional_call(model, cast, (tokens_BT,))
            loss = F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten()) * micro / batch
            scales.scale(loss * factor).backward()
            mean += loss.item()
        scales.unscale_(optimizer)
        for parameter in parameters:
            parameter.grad /= factor
        norm = torch.nn.utils.clip_grad_norm_(parameters, optim.grad_clip).item()
        for group in optimizer.param_groups:
            group["lr"] = lr_at(optim, number + 1)
        scales.step(optimizer)
        scales.update()
        seen["losses"].append(mean)
        seen["norms"].append(norm if math.isfinite(norm) else None)
        seen["scales"].append(scale)
        seen["skipped"].append(seen["norms"].count(None))
    return seen | {"weights": {name: p.detach() for name, p in model.named_parameters()}}


def learn_cases(
    rank: int, size: int, folder: Path, cases: Sequence[Case], models: Mapping[str, list[str]]
) -> list[dict[str, Any]]:
    """Results of the ranks for each case; for ``run_distributed``."""
    found = []
    for number, case in enumerate(cases):
        run = start_case(rank, size, folder / str(number), case, models[case.model])
        found.append(learn(run) | {"val": evaluated(run)})
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Losses and norms, every gradient of the first step, figures of the last one and every weight after it agree."""
    assert found["losses"] == pytest.approx(expected["losses"], rel=tolerance)
    assert found["norms"] == pytest.approx(expected["norms"], rel=tolerance)
    rounding = tolerance * expected["figures"]["std"]  # of the mean, which is small beside what it is the mean of
    assert found["figures"] == pytest.approx(expected["figures"], rel=2 * tolerance, abs=rounding)
    for what in ("gradients", "weights"):
        assert found[what].keys() == expected[what].keys()
        for name, tensor in expected[what].items():
            error = (found[what][name] - tensor).norm() / tensor.norm()
            assert error < tolerance, f"{what} of {name}: {error:.1e}"


def assert_all_same(
    cases: Sequence[Case], found: Sequence[dict[str, Any]], alone: Mapping[str, dict[str, Any]]
) -> None:
    """Every case learned what one process learned of its model; otherwise, all that did not are named."""
    wrong = []
    for case, learned in zip(cases, found, strict=True):
        try:
            assert_same(learned, alone[case.model])
            assert learned["val"] == pytest.approx(alone[case.model]["val"], rel=1e-5)
        except AssertionError as error:
            wrong.append(f"{case}: {error}")
    assert not wrong, "\n".join(wrong)


Chain = tuple[list[str], list[str]]
"""A model, and engines of which each goes on where the one before it saved."""


Learned = tuple[list[float], dict[str, float]]
"""Losses and gradient norms of two steps, and the figures of the second."""


@dataclass(frozen=True)
class Followed:
    """What the ranks of a chain found."""

    learned: dict[tuple[str, str], tuple[Learned, Learned]]
    """By who saved and who goes on: two steps after the checkpoint, and those of the run that saved."""
    weights: dict[str, Tensor]
    """Of the last checkpoint."""
    to_come: Learned
    """Two steps after it."""


def two_steps(run: Run) -> Learned:
    """Take two steps."""
    first, (loss, norm, figures) = step(run), step_with_figures(run)
    return [*first, loss, norm], figures


def follow(
    rank: int, size: int, folder: Path, chains: Mapping[str, Chain], once: Sequence[str] = ()
) -> dict[str, Followed]:
    """Take two steps under each engine of a chain, save, and go on under itself, unless ``once``, and the next."""
    found = {}
    for name, (words, chain) in chains.items():
        learned: dict[tuple[str, str], tuple[Learned, Learned]] = {}
        before, to_come = "", ([], {})
        for way in chain:
            kind = [*words, *way.split(), "optim.max_micro_batch=4"]
            run = start(rank, size, folder / name, *kind)
            first = two_steps(run)
            if before:
                learned[before, way] = (first, to_come)
            save(run)
            weights = full_weights(run)
            to_come = two_steps(run)
            if way not in once and (way, way) not in learned:
                again = start(rank, size, folder / name, *kind)
                assert again.step == run.step - 2
                learned[way, way] = (two_steps(again), to_come)
            before = way
        found[name] = Followed(learned, weights, to_come)
    return found


def full_weights(run: Run) -> dict[str, Tensor]:
    """Weights of a run brought together from all ranks; of DeepSpeed's engine the masters."""
    parameters = dict(run.engine.module.named_parameters())
    if run.config.parallel.zero_stage:
        from deepspeed.utils import safe_get_full_fp32_param

        parameters = {name: safe_get_full_fp32_param(p) for name, p in parameters.items()}
    return whole(run, parameters)


def assert_followed(chain: Sequence[str], found: Followed, once: Sequence[str] = ()) -> None:
    """Every engine went on as the one that saved would have done; one under itself bit for bit."""
    assert len(found.learned) == len(chain) - 1 + len({*chain} - {*once})
    for (saved, resumed), (learned, to_come) in found.learned.items():
        assert_goes_on(learned, to_come)
        if saved == resumed:
            assert learned == to_come, f"{saved}: bit for bit"


def assert_goes_on(learned: Learned, to_come: Learned) -> None:
    """Losses, norms and figures are those that were to come."""
    (losses, figures), (expected, those) = learned, to_come
    assert losses[::2] == pytest.approx(expected[::2], rel=1e-6)
    assert losses[1::2] == pytest.approx(expected[1::2], rel=1e-5)
    assert figures == pytest.approx(those, rel=2e-5, abs=1e-5 * those["std"])


READ_ON_HOST = (
    "aten._local_scalar_dense.default",
    "aten.nonzero.default",
    "aten.repeat_interleave.Tensor",
    "aten.equal.default",
)
"""Operations whose result the host needs to go on, for its value or for the shape."""


class Operations(TorchDispatchMode):
    """Records the operations that ``is_one`` says are of interest, by name."""

    def __init__(self, is_one: Callable[[str, Sequence[Any], Mapping[str, Any]], bool]) -> None:
        super().__init__()
        self.is_one = is_one
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.is_one(str(func), args, kwargs):
            self.found.append(str(func))
        return func(*args, **kwargs)


def makes_the_host_wait(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """True for an operation after which the host has waited for the device: CUDA copies pageable memory so as well."""
    if name == "aten._to_copy.default" and kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type
        return there != args[0].device.type and not kwargs.get("non_blocking")
    if name == "aten.copy_.default":
        return args[0].device.type != args[1].device.type and not (len(args) > 2 and args[2])
    return name in READ_ON_HOST and kwargs.get("output_size") is None


def host_waits(call: Callable[[torch.device], object]) -> list[str]:
    """Run ``call`` with a GPU that is not there (its tensors have shapes but no values); the waits of the host."""
    with FakeTensorMode(allow_non_fake_inputs=True), Operations(makes_the_host_wait) as seen:
        call(torch.device("cuda:0"))
    return seen.found


def held_bytes(run: Run) -> tuple[int, int, int]:
    """Parameters, gradients and optimizer state of this rank, after a step and another backward pass."""
    ds = getattr(run.engine, "ds", None)
    parameters = list(run.engine.module.parameters())
    gradients: list[int] = []
    tokens_BT = torch.zeros(run.batch.per_rank, run.config.model.block_size, dtype=torch.long)
    run.engine.backward(tokens_BT, tokens_BT, lambda: gradients.append(whole_gradients(parameters)))
    if ds is None:
        state = run.engine.optimizer.state  # type: ignore[attr-defined]
        stepped = run.engine.trained.parameters()  # type: ignore[attr-defined]
        return storages(parameters), whole_gradients(stepped), storages(tensors_of(state))
    weights, reduced, optimizer = held_by_deepspeed(ds, parameters)
    return weights, max(reduced + whole_gradients(parameters), *gradients), optimizer


def held_as_planned(run: Run) -> str:
    """Where the bytes of ``held_bytes`` on the ranks of a stage differ from those of the plan; empty if they do not."""
    by_rank = run.world.gather(list(held_bytes(run)))
    config, dims, line = run.config, run.dims, run.world.size // run.dims.pp
    wrong = []
    for stage in range(dims.pp):
        said = states(config, dims, parameter_shards(config.model, dims, rank_stages(config, stage)))
        planned = [said.parameters, said.gradients, said.optimizer]
        # The first of those that share a tensor has the largest part of it.
        held = [max(parts) for parts in zip(*by_rank[stage * line : (stage + 1) * line], strict=True)]
        if config.parallel.cpu_offload:
            planned, held = [*planned, said.host], [0, 0, 0, sum(held)]
        if held != planned:
            wrong.append(f"stage {stage} holds {held}, planned {planned}")
    return "; ".join(wrong)


def held_by_deepspeed(ds: Any, parameters: list[Any]) -> tuple[int, int, int]:
    """Weights, gradients beside those of the parameters, and optimizer state with masters."""
    zero, stage = ds.optimizer, ds.zero_optimization_stage()
    cut_weights = [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
    weights = storages(p.data for p in parameters) + storages(cut_weights)
    names = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
    masters = [tensor for name in names for tensor in tensors_of(getattr(zero, name, []))] if stage else []
    flat = [tensor.grad for tensor in masters if tensor.grad is not None]
    cut = tensors_of(getattr(zero, "averaged_gradients", {}))
    reduced = storages(flat) or sum(tensor.numel() * tensor.element_size() for tensor in cut)
    return weights, reduced, storages([*masters, *tensors_of(ds.basic_optimizer.state)])


def whole_gradients(parameters: Iterable[Any]) -> int:
    """Bytes of the gradients that the parameters have."""
    return storages(p.grad for p in parameters if p.grad is not None)


def tensors_of(value: Any) -> list[torch.Tensor]:
    """All tensors in nested lists and dictionaries."""
    if torch.is_tensor(value):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in inner for tensor in tensors_of(part)]


def storages(tensors: Iterable[Any]) -> int:
    """Bytes of the storages under these tensors, each once; of a sharded one this rank's."""
    return sum({s.data_ptr(): s.nbytes() for s in (local(t).untyped_storage() for t in tensors)}.values())


def local(tensor: Any) -> Tensor:
    """This rank's part of a tensor."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


class Alive(TorchDispatchMode):
    """The storages that operations have made, for as long as anything holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if torch.is_tensor(tensor):
                self.storages[local(tensor).untyped_storage()] = None
        return made


def living_bytes(run: Run) -> int:
    """Bytes that are left after a forward pass over a micro-batch, beside parameters and buffers.

    That is what its backward pass needs, whether autograd or selective recomputation keeps it, and the logits.
    """
    module, alive = run.engine.module, Alive()
    own = {local(t).untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    tokens_BT = torch.arange(run.config.model.block_size).repeat(run.batch.micro, 1)
    with alive, autocast(run.config, tokens_BT.device):
        given = run.engine.local_tokens(tokens_BT) if hasattr(run.engine, "local_tokens") else tokens_BT
        logits_BTV = module(given)
    assert logits_BTV.requires_grad
    gc.collect()
    return sum(s.nbytes() for s in alive.storages if s.data_ptr() not in own)
