"""DeepSpeed's engine learns what one process learns, and its checkpoints go on under any stage, size and strategy."""

from __future__ import annotations

import io
import json
import math
import pkgutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from gpt.checkpoint.messages import CheckpointError
from gpt.config import TrainConfig
from gpt.config.train import compose_train
from gpt.conversion.state_dict import load_model
from gpt.topology.check_dims import check_parallel_dims
from gpt.training.checkpoints import save
from gpt.training.run import Run
from launch.errors import ConfigError
from tests.support.commands import TINY as COMMAND
from tests.support.commands import run as run_command
from tests.support.composing import config_from
from tests.support.distributed import run_distributed
from tests.support.learning import (
    ACCUMULATIONS,
    BATCH,
    DEEPSPEED,
    MODELS,
    STEPS,
    TINY,
    assert_same,
    learn,
    learn_alone,
    start,
    step,
)

STAGES = (0, 1, 2, 3)
CASES = {
    2: [(0, "experts"), (1, "tied"), (2, "untied, grouped queries"), (3, "experts")],
    4: [(1, "experts"), (3, "tied")],
}
"""By the number of ranks: stages and models. benchmarks/equivalence/parallelisms.py tries all of them."""


def words_of(stage: int) -> list[str]:
    return ["parallel.strategy=deepspeed", f"parallel.zero_stage={stage}"]


def learn_all(rank: int, size: int, folder: Path) -> dict[tuple[int, str], dict[str, Any]]:
    found = {}
    for stage, model in CASES[size]:
        accumulation = ACCUMULATIONS[stage // 2]
        words = [*words_of(stage), *MODELS[model], f"optim.max_micro_batch={BATCH // (size * accumulation)}"]
        run = start(rank, size, folder / f"{stage}", *words)
        assert run.batch.accumulation == accumulation
        found[stage, model] = learn(run)
    assert_timeouts(run.config.parallel.timeout_s)
    return found


def assert_timeouts(timeout_s: int) -> None:
    """Also in the groups that DeepSpeed makes, which torch would give half an hour."""
    from torch.distributed.distributed_c10d import _world

    assert len(_world.pg_map) > 2
    for group in _world.pg_map:
        assert group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == timeout_s


BF16 = ["precision=bf16", "model.n_layer=1"]
OTHER_WAYS = {
    "bf16": [[*BF16, *words_of(stage)] for stage in STAGES],
    "tied": [
        ["parallel=zero3_offload"],
        [*words_of(2), "recompute=selective"],
        [*words_of(3), "compile=default", "recompute=full", "parallel.deepspeed_config={}"],
    ],
}
AT_ONCE = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
"""Settings that let stage 3 keep small parameters: with zeros it gathers and releases every block."""


def learn_otherwise(rank: int, size: int, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """In bf16, offloaded, recomputed and compiled; with the number of steps that AdamW has counted."""
    from torch._dynamo.utils import counters

    found: dict[str, list[dict[str, Any]]] = {}
    path = folder / f"ds{rank}.json"
    path.write_text(json.dumps({"zero_optimization": {f"stage3_{key}": 0 for key in AT_ONCE}}))
    # What the compiler sees is what is asked here, not the code that it makes in half a minute.
    with mock.patch("torch.compile", partial(torch.compile, backend="eager")):
        for name, ways in OTHER_WAYS.items():
            for number, words in enumerate(ways):
                words = [word.format(path) for word in words]
                run = start(rank, size, folder / f"{name}{number}", *MODELS["tied"], *words, "optim.max_micro_batch=4")
                learned = learn(run)
                learned["steps"] = {int(state["step"]) for state in run.engine.ds.basic_optimizer.state.values()}
                found.setdefault(name, []).append(learned)
    assert counters["frames"]["ok"] and not counters["graph_break"], "DeepSpeed is outside of the compiled blocks"
    return found


MIXTURE = [*MODELS["experts"], "model.n_layer=1", "model.expert_balance=bias", "optim.max_micro_batch=4"]
WAYS = {f"zero{stage}": words_of(stage) for stage in STAGES} | {"ddp": ["parallel=ddp"], "fsdp": ["parallel=fsdp"]}
CROSSINGS = [("zero1", "zero3"), ("zero3", "fsdp"), ("zero0", "zero1"), ("fsdp", "zero2"), ("ddp", "zero0")]


def save_all(rank: int, size: int, folder: Path) -> dict[str, list[float]]:
    """A run of each way with a checkpoint after a step, and the losses of the next two."""
    to_come = {}
    for way, words in WAYS.items():
        run = start(rank, size, folder / way, *MIXTURE, *words)
        step(run)
        save(run)
        if way in ("zero2", "zero3"):
            remember(run, folder / f"{way}.pt")
        to_come[way] = [step(run)[0] for _ in range(2)]
    return to_come


def remember(run: Run, path: Path) -> None:
    """Keep the weights that the ranks have at the checkpoint."""
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {name: safe_get_full_fp32_param(p).clone() for name, p in run.engine.module.named_parameters()}
    buffers = {name: b for name, b in run.engine.module.named_buffers() if name.endswith("balance_bias")}
    if run.world.is_first:
        torch.save(weights | buffers, path)


def go_on(rank: int, size: int, folder: Path, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], list[float]]:
    found = {}
    for saved, resumed in pairs:
        run = start(rank, size, folder / saved, *MIXTURE, *WAYS[resumed])
        assert run.step == 1
        found[saved, resumed] = [step(run)[0] for _ in range(2)]
    dist.barrier()
    assert not list(folder.glob("*/checkpoints/.*")), "conversions are temporary"
    return found


@dataclass(frozen=True)
class Seen:
    """Outcome of two ranks, and their folder."""

    folder: Path
    learned: dict[tuple[int, str], dict[str, Any]]
    otherwise: dict[str, list[dict[str, Any]]]
    to_come: dict[str, list[float]]
    gone_on: dict[tuple[str, str], list[float]]


def on_two(rank: int, size: int, folder: Path) -> Seen:
    for part in ("learn", "otherwise"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    learned, otherwise = learn_all(rank, size, folder / "learn"), learn_otherwise(rank, size, folder / "otherwise")
    to_come = save_all(rank, size, folder / "saved")
    same = [(f"zero{stage}", f"zero{stage}") for stage in STAGES]
    gone_on = go_on(rank, size, folder / "saved", [*same, *CROSSINGS])
    return Seen(folder / "saved", learned, otherwise, to_come, gone_on)


def on_four(rank: int, size: int, folder: Path, saved: Path) -> tuple[dict[Any, Any], dict[Any, Any]]:
    return learn_all(rank, size, folder), go_on(rank, size, saved, [("zero3", "zero1")])


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return run_distributed(on_two, 2, tmp_path_factory.mktemp("two") / "runs", timeout_s=300, imports=DEEPSPEED)[0]


@pytest.fixture(scope="module")
def seen_by_four(seen: Seen, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[Any, Any], dict[Any, Any]]:
    return run_distributed(
        on_four, 4, tmp_path_factory.mktemp("four") / "runs", seen.folder, timeout_s=300, imports=DEEPSPEED
    )[0]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("alone") / "runs"
    bf16 = {"bf16": [*MODELS["tied"], *BF16]}
    return run_distributed(learn_alone, 1, folder, MODELS | bf16)[0]


def test_losses_gradients_and_weights_are_those_of_one_process(
    seen: Seen, seen_by_four: tuple[dict[Any, Any], dict[Any, Any]], reference: dict[str, dict[str, Any]]
) -> None:
    for size, learned in ((2, seen.learned), (4, seen_by_four[0])):
        assert list(learned) == CASES[size]
        for (_, model), found in learned.items():
            assert_same(found, reference[model])


def test_offloading_recomputation_and_compilation(seen: Seen, reference: dict[str, dict[str, Any]]) -> None:
    for learned in seen.otherwise["tied"]:
        assert_same(learned, reference["tied"])
        assert learned["steps"] == {STEPS}


def test_bf16(seen: Seen, reference: dict[str, dict[str, Any]]) -> None:
    expected = reference["bf16"]
    for learned in seen.otherwise["bf16"]:
        assert learned["steps"] == {STEPS}
        # Rounding differs by where it is done: 8 bits, over the steps.
        assert learned["losses"] == pytest.approx(expected["losses"], rel=1e-3)
        assert learned["norms"] == pytest.approx(expected["norms"], rel=2e-2)
        for name, tensor in expected["weights"].items():
            moved = (learned["weights"][name] - tensor).abs().max()
            assert moved < 1e-2, f"{name}: {moved}"


def test_checkpoints_go_on_bit_for_bit_or_under_another_stage_and_strategy(seen: Seen) -> None:
    for (way, resumed), losses in seen.gone_on.items():
        assert losses == pytest.approx(seen.to_come[way], rel=1e-6), (way, resumed)
        if way == resumed:
            assert losses == seen.to_come[way], f"{way}: bit for bit"


def test_checkpoints_go_on_with_other_numbers_of_ranks(
    seen: Seen, seen_by_four: tuple[dict[Any, Any], dict[Any, Any]]
) -> None:
    by_one = run_distributed(go_on, 1, seen.folder, [("zero2", "zero3")], timeout_s=300, imports=DEEPSPEED)[0]
    for (way, _), losses in (seen_by_four[1] | by_one).items():
        assert losses == pytest.approx(seen.to_come[way], rel=1e-6), way


@pytest.mark.parametrize("way", ["zero2", "zero3"])
def test_one_process_reads_the_weights(way: str, seen: Seen) -> None:
    """By DeepSpeed's own function on what lies there, and by ours; the run folder stays as it was."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = seen.folder
    expected = torch.load(folder / f"{way}.pt")
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(folder / way / "checkpoints" / "step_00000001"))
    as_composed([*MIXTURE, *WAYS[way]], folder / way)
    _, model = load_model(folder / way)
    ours = model.state_dict()
    assert expected.keys() == ours.keys() and any(name.endswith("balance_bias") for name in ours)
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor) and torch.equal(theirs[name], tensor), name


def as_composed(words: list[str], folder: Path) -> None:
    """Give a run that was made inside a test the config that a command would have written."""
    from launch.runs.compose import write_config
    from launch.runs.folder import RunFolder

    write_config(RunFolder(folder), compose_train([*TINY, *words]), words)


def damage_and_fail(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Save twice, damage the newer; then a save in which a rank's disk is full, and one after it."""
    words = [*MIXTURE, *words_of(2)]
    run = start(rank, size, folder, *words)
    for _ in range(2):
        step(run)
        save(run)
    dist.barrier()
    if rank == 0:
        path = next((folder / "checkpoints" / "step_00000002").glob("*/*rank_1*optim_states.pt"))
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    dist.barrier()
    again = start(rank, size, folder, *words)
    found = {"step": again.step, "loss": step(again)[0]}
    with broken(rank, "torch.save", "No space left"), pytest.raises(CheckpointError, match=r"rank 1: .*No space left"):
        save(again)
    save(again)
    found["names"] = sorted(path.name for path in (folder / "checkpoints").iterdir())
    with broken(rank, "torch.load", "Input/output error"), pytest.raises(ConfigError, match=r"rank 1: .*Input/output"):
        start(rank, size, folder, *words)
    copies = start(rank, size, folder.parent / "copies", *MIXTURE, *words_of(0))
    save(copies)
    reader = "gpt.parallel.zero.TensorReader.moment"
    with broken(rank, reader, "Input/output error"), pytest.raises(ConfigError, match=r"rank 1: .*Input/output"):
        start(rank, size, folder.parent / "copies", *words)
    return found


def broken(rank: int, function: str, why: str) -> AbstractContextManager[object]:
    """A disk that fails on rank 1. What is pickled in memory, for other ranks, is no file."""
    if rank != 1:
        return nullcontext()
    works = pkgutil.resolve_name(function)

    def fail(*args: Any, **keys: Any) -> Any:
        if any(isinstance(arg, io.BytesIO) for arg in args):
            return works(*args, **keys)
        raise OSError(why)

    return mock.patch(function, fail)


def test_damage_is_noticed_and_what_fails_on_one_rank_fails_on_all(tmp_path: Path) -> None:
    """All come back long before the collectives would give up waiting for each other."""
    for found in run_distributed(damage_and_fail, 2, tmp_path / "run", timeout_s=100, imports=DEEPSPEED):
        assert found["step"] == 1
        assert found["names"] == ["step_00000001", "step_00000002", "step_00000002.corrupt"]


def test_a_run_from_the_command_line_and_its_tools(tmp_path: Path) -> None:
    words = [*COMMAND, "optim.max_steps=3", "optim.warmup_steps=2", "parallel=zero3", "run_dir=run"]
    run_command("gpt.train", *words, cwd=tmp_path)
    settings = json.loads((tmp_path / "run" / "attempts" / "0001" / "ds_config.json").read_text())
    assert settings["zero_optimization"]["stage"] == 3
    assert (settings["train_batch_size"], settings["gradient_accumulation_steps"]) == (8, 4)
    record = json.loads((tmp_path / "run" / "attempts" / "0001" / "environment.json").read_text())
    assert record["topology"]["strategy"] == "ds_zero3"
    last = json.loads((tmp_path / "run" / "metrics" / "rank_00000.jsonl").read_text().splitlines()[-1])
    told = run_command("gpt.evaluate", "run", "--sequences", "6", cwd=tmp_path)
    assert f"loss {last['val_loss']:.4f}" in told
    assert math.isfinite(last["val_loss"])


# DeepSpeed's configuration is this run's: what contradicts it, and what cannot be asked for, is refused in words.


def config_of(*words: str) -> TrainConfig:
    config = config_from([*TINY, "optim.max_micro_batch=2", *words])
    config.validate()
    return config


REFUSED = {
    "train_batch_size": (32, "optim.global_batch=32"),
    "train_micro_batch_size_per_gpu": (4, "optim.max_micro_batch=4"),
    "gradient_accumulation_steps": (1, "optim.max_micro_batch of 4 sequences divided by 1"),
    "gradient_clipping": (0.5, "optim.grad_clip=0.5"),
    "zero_optimization": ({"stage": 3}, "parallel.zero_stage=3"),
    "cpu_offload": (True, "parallel.offload_optimizer=true"),
    "round_robin_gradients": (True, "no round_robin_gradients"),
    "zero_hpz_partition_size": (2, "parallel=hsdp parallel.dp_shard=2"),
    "mics_shard_size": (2, "parallel=hsdp parallel.dp_shard=2"),
    "bf16": ({"enabled": True}, "precision=bf16"),
    "fp16": ({"enabled": True}, "precision=fp16"),
    "optimizer": ({"type": "Lamb"}, "AdamW"),
    "scheduler": ({"type": "WarmupLR"}, "optim.warmup_steps"),
    "activation_checkpointing": ({"partition_activations": True}, "recompute=full"),
    "tensorboard": ({"enabled": True}, "logging.tensorboard=true"),
    "wandb": ({"enabled": True}, "logging.wandb=true"),
    "checkpoint": ({"load_universal": True}, "checkpoint group"),
}


OF_ZERO = ("cpu_offload", "round_robin_gradients", "zero_hpz_partition_size", "mics_shard_size")


@pytest.mark.parametrize("key", REFUSED)
def test_a_file_that_contradicts_the_run_is_refused(key: str, tmp_path: Path) -> None:
    value, fix = REFUSED[key]
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {key: value}} if key in OF_ZERO else {key: value}))
    with pytest.raises(ConfigError) as refusal:
        check_parallel_dims(config_of("parallel=zero2", f"parallel.deepspeed_config={path}"), 4)
    assert key in refusal.value.found and "ds.json" in refusal.value.found
    assert fix in refusal.value.fix


def test_timers_that_the_pipeline_cannot_run_are_refused_there_alone(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"wall_clock_breakdown": True}))
    check_parallel_dims(config_of("parallel=zero2", f"parallel.deepspeed_config={path}"), 4)
    with pytest.raises(ConfigError, match="wall_clock_breakdown"):
        check_parallel_dims(config_of("parallel=ds_pp", f"parallel.deepspeed_config={path}"), 4)


def test_a_file_that_agrees_is_added(tmp_path: Path) -> None:
    from gpt.topology import split_batch
    from gpt.topology.deepspeed_config import ds_config

    path = tmp_path / "ds.json"
    theirs = {
        "train_batch_size": "auto",
        "gradient_clipping": 1,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000000, "overlap_comm": False},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.1}},
        "bf16": {"enabled": "auto"},
        "wall_clock_breakdown": False,
    }
    path.write_text(json.dumps(theirs))
    config = config_of("parallel=zero2", f"parallel.deepspeed_config={path}")
    made = ds_config(config, split_batch(config.optim, 4))
    assert made["zero_optimization"] == theirs["zero_optimization"]
    assert made["train_batch_size"] == BATCH and "optimizer" not in made and "bf16" not in made
    assert made["wall_clock_breakdown"] is False
    for text in ("{", "[]"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="deepspeed_config"):
            check_parallel_dims(config, 4)


def test_micro_batches_are_not_timed_unless_the_file_asks_for_it(tmp_path: Path) -> None:
    """DeepSpeed would wait for the device twice in each of them."""
    from deepspeed.utils.config import get_timers_config

    from gpt.topology import split_batch
    from gpt.topology.deepspeed_config import ds_config

    path = tmp_path / "ds.json"
    for words in (
        ["parallel=zero2"],
        ["parallel=ds_pp_zero1"],
        [f"parallel.deepspeed_config={path}", "parallel=zero2"],
    ):
        config = config_of(*words)
        path.write_text(json.dumps({"timers": {"throughput": {"enabled": True}}}))
        timed = get_timers_config(ds_config(config, split_batch(config.optim, 4))).enabled
        assert timed is (config.parallel.deepspeed_config is not None)


# The last stage has the output matrix alone.
ALONE = ["parallel=ds_pp_zero1", "parallel.pp=4", "optim.max_micro_batch=4", "model.n_layer=4", "model.vocab_size=2048"]


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["parallel=zero2", "parallel.pp=2"], ["parallel.zero_stage=1"]),
        (["parallel=zero3_offload", "parallel.pp=2"], ["parallel=ds_pp_zero1"]),
        (["parallel=zero2", "parallel.engine=deepspeed", "parallel.tp=2"], ["parallel=fsdp parallel.engine=native"]),
        (["parallel=ds_pp_zero1", "parallel.pp=4", "optim.max_micro_batch=1"], ["parallel.pp=2"]),
        ([*ALONE, "model.norm_position=post"], ["parallel.zero_stage=0"]),
        (["parallel=ds_pp_zero1", "parallel.offload_optimizer=true"], ["parallel.offload_optimizer=false"]),
        (["parallel=ds_pp", "parallel.schedule=gpipe"], ["parallel.schedule=1f1b"]),
        (["parallel=zero2", "parallel.zero_stage=4"], ["parallel.zero_stage=2"]),
        (["parallel=zero2", "parallel.offload_parameters=true"], ["parallel.zero_stage=3"]),
        (["parallel=ds_zero0", "parallel.offload_optimizer=true"], ["parallel.zero_stage=1"]),
    ],
)
def test_refusals_name_what_is_accepted(words: list[str], fix: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        check_parallel_dims(config_of(*words), 4)
    assert refusal.value.fix.startswith(fix[0])
    check_parallel_dims(config_of(*words, *" ".join(fix).split()), 4)


def test_a_lone_output_matrix_is_refused_for_its_norms_only() -> None:
    check_parallel_dims(config_of(*ALONE), 4)


@pytest.mark.parametrize("dimension", ["tp", "cp", "ep"])
def test_deepspeed_cuts_nothing_else(dimension: str) -> None:
    with pytest.raises(ConfigError, match="parallel=fsdp"):
        check_parallel_dims(config_of(*MODELS["experts"], "parallel=zero2", f"parallel.{dimension}=2"), 4)


def test_keys_of_deepspeed_belong_to_it() -> None:
    for word in ("zero_stage=2", "offload_optimizer=true", "deepspeed_config=ds.json"):
        with pytest.raises(ConfigError, match="DeepSpeed, whose key it is"):
            config_of("parallel=fsdp", f"parallel.{word}")
