"""DeepSpeed's engines learn what one process learns, and their checkpoints go on under any stage, size and strategy."""

from __future__ import annotations

import io
import json
import math
import pkgutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gpt.checkpoint.messages import CheckpointError
from gpt.config import TrainConfig, compose_train
from gpt.conversion.state_dict import load_model
from gpt.topology.check_dims import check_parallel_dims
from gpt.training.run import Run
from launch.errors import ConfigError
from tests.support.commands import TINY as COMMAND
from tests.support.commands import run as run_command
from tests.support.composing import config_from
from tests.support.distributed import run_distributed
from tests.support.learning import (
    BATCH,
    DEEPSPEED,
    MODELS,
    STEPS,
    TINY,
    Case,
    Chain,
    Followed,
    Learned,
    assert_followed,
    assert_goes_on,
    assert_same,
    evaluated,
    follow,
    held_as_planned,
    learn,
    save,
    start,
    start_case,
    step,
    two_steps,
    whole,
)
from tests.support.planning import refused

EVAL = "eval.sequences=7"
BIASED = [*MODELS["experts"], "model.expert_balance=bias", "model.balance_bias_rate=0.05"]
HERE = {
    **MODELS,
    "biased experts": BIASED,
    # Its output matrix costs more than a block, so that the last of four stages has nothing else.
    "large vocabulary": [*MODELS["tied"], "model.n_layer=4", "model.vocab_size=2048"],
    "bf16": [*MODELS["tied"], "precision=bf16"],
}
HERE = {name: [*words, EVAL] for name, words in HERE.items()}
QUERIES = "untied, grouped queries"
ZERO1 = "parallel=ds_pp_zero1"
CASES = {
    2: [
        Case("parallel=ds_zero0", "experts", 1),
        Case("parallel=ds_zero1", "tied", 4),
        Case("parallel=zero2", QUERIES, 4),
        Case("parallel=zero3", "experts", 4),
        *(Case(f"parallel={stage}", "bf16") for stage in ("ds_zero0", "ds_zero1", "zero2", "zero3")),
        Case("parallel=zero3_offload", "tied", 1),
        Case("parallel=zero2 recompute=selective", "tied"),
        Case("parallel=zero3 compile=default recompute=full parallel.deepspeed_config=AT_ONCE", "tied"),
        Case("parallel=ds_pp", "tied", 1),
        Case(f"{ZERO1} compile=default recompute=full", "tied", 4),
        Case("parallel=ds_pp", QUERIES, 4),
        Case(ZERO1, "biased experts", 8),
        *(Case(f"parallel={name}", "bf16", 4) for name in ("ds_pp", "ds_pp_zero1")),
    ],
    4: [
        Case(ZERO1, QUERIES, 4),
        Case("parallel=ds_pp", "biased experts", 4),
        Case(f"{ZERO1} parallel.pp=4", "large vocabulary", 4),
    ],
}
"""By the number of ranks. benchmarks/equivalence/parallelisms.py tries all stages with all models."""
AT_ONCE = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
"""Settings that let stage 3 keep small parameters: with zeros it gathers and releases every block."""


def prove(rank: int, size: int, folder: Path, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """For each case what its ranks begin with, learn, evaluate and hold; with unevenly many targets, too."""
    from torch._dynamo.utils import counters

    found = []
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {f"stage3_{key}": 0 for key in AT_ONCE}}))
    # What the compiler sees is what is asked here, not the code that it makes in half a minute.
    with mock.patch("torch.compile", partial(torch.compile, backend="eager")):
        for number, case in enumerate(cases):
            case = Case(case.words.replace("AT_ONCE", str(path)), case.model, case.accumulation)
            run = start_case(rank, size, folder / str(number), case, HERE[case.model])
            is_whole = run.dims.pp == 1 and not run.config.parallel.zero_stage
            begun = whole(run, dict(run.engine.module.named_parameters())) if is_whole else {}
            learned = learn(run) | {"begun": begun, "val": evaluated(run, batch=run.batch.micro)}
            if run.config.parallel.strategy.name == "deepspeed":
                states = run.engine.ds.basic_optimizer.state.values()  # type: ignore[attr-defined]
                learned["steps"] = {int(state["step"]) for state in states}
            hide_targets(run)
            learned["uneven"] = [step(run) for _ in range(2)]
            found.append(learned | {"held": held_as_planned(run)})
    if size == 2:
        assert counters["frames"]["ok"] and not counters["graph_break"], "DeepSpeed is outside of the compiled blocks"
        assert_timeouts(run.config.parallel.timeout_s)
    return found


def hide_targets(run: Run) -> None:
    """Have most of the first sequences, and some of the others, count fewer tokens: -100 is torch's word for none."""
    batch = run.samples.batch

    def partly(split: Any, indices: Any) -> tuple[Tensor, Tensor]:
        tokens_BT, targets_BT = batch(split, indices)
        for row, index in enumerate(indices):
            targets_BT[row, : (3 * int(index)) % 16] = -100
        return tokens_BT, targets_BT

    run.samples.batch = partly  # type: ignore[method-assign]


def assert_timeouts(timeout_s: int) -> None:
    """Also in the groups that DeepSpeed makes, which torch would give half an hour."""
    from torch.distributed.distributed_c10d import _world

    assert len(_world.pg_map) > 2
    for group in _world.pg_map:
        assert group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == timeout_s


CHAINS: dict[str, Chain] = {
    "to zero2": (BIASED, [ZERO1, "parallel=zero3", "parallel=fsdp", "parallel=zero2"]),
    "to zero3": (BIASED, ["parallel=ddp", "parallel=ds_zero0", "parallel=ds_zero1", "parallel=zero3"]),
    "to stages": ([*BIASED, "model.tie_embeddings=true"], ["parallel=ds_pp", "parallel=pp", ZERO1]),
    "in bf16": ([*BIASED, "precision=bf16"], [ZERO1]),
}
"""By folder. Files of each kind of engine are read by each other kind."""
GO_ON = {4: {"to zero3": "parallel=ds_zero1", "to stages": ZERO1}, 1: {"to zero2": "parallel=zero3"}}
"""By other numbers of ranks: the last checkpoint of a chain, and the engine that goes on."""


def go_on(rank: int, size: int, folder: Path) -> dict[str, Learned]:
    found = {}
    for name, way in GO_ON[size].items():
        run = start(rank, size, folder / name, *CHAINS[name][0], *way.split(), "optim.max_micro_batch=4")
        found[name] = two_steps(run)
    dist.barrier()
    assert not list(folder.glob("*/checkpoints/.*")), "conversions are temporary"
    return found


@dataclass(frozen=True)
class Seen:
    """Outcome of two ranks, and their folder."""

    folder: Path
    learned: list[dict[str, Any]]
    followed: dict[str, Followed]


def on_two(rank: int, size: int, folder: Path) -> Seen:
    learned, followed = prove(rank, size, folder / "learn", CASES[2]), follow(rank, size, folder / "saved", CHAINS)
    words, way = CHAINS["to stages"]
    with broken(rank, "torch.load", "Input/output error"), pytest.raises(ConfigError, match=r"rank 1: .*Input/output"):
        start(rank, size, folder / "saved" / "to stages", *words, *way[-1].split(), "optim.max_micro_batch=4")
    return Seen(folder / "saved", learned, followed)


def on_four(rank: int, size: int, folder: Path, saved: Path) -> tuple[list[dict[str, Any]], dict[str, Learned]]:
    return prove(rank, size, folder, CASES[4]), go_on(rank, size, saved)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return run_distributed(on_two, 2, tmp_path_factory.mktemp("two") / "runs", timeout_s=400, imports=DEEPSPEED)[0]


@pytest.fixture(scope="module")
def seen_by_four(seen: Seen, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("four") / "runs"
    return run_distributed(on_four, 4, folder, seen.folder, timeout_s=300, imports=DEEPSPEED)[0]


def test_what_is_learned_and_held_is_that_of_one_process_and_of_the_plan(
    seen: Seen, seen_by_four: tuple[list[dict[str, Any]], dict[str, Any]], tmp_path: Path
) -> None:
    alone = [Case("parallel=ddp", model, 1) for model in HERE]
    reference = dict(zip(HERE, run_distributed(prove, 1, tmp_path / "alone" / "runs", alone)[0], strict=True))
    for case, found in zip([*CASES[2], *CASES[4]], [*seen.learned, *seen_by_four[0]], strict=True):
        expected = reference[case.model]
        assert "_pp" in case.words or found["steps"] == {STEPS}, case
        is_planned = "offload" not in case.words and "AT_ONCE" not in case.words
        # Gradients are seen between micro-batches, and those of a tied embedding twice.
        if is_planned and case.accumulation > 1 and ("_pp" not in case.words or case == CASES[4][0]):
            assert found["held"] == "", case
        for name, tensor in found["begun"].items():
            assert torch.equal(tensor, expected["begun"][name]), f"{case}: {name}"
        if case.model == "bf16":
            assert_close_in_bf16(found, expected)
            continue
        assert_same(found, expected)
        assert found["val"] == pytest.approx(expected["val"], rel=1e-5), case
        for here, there in zip(found["uneven"], expected["uneven"], strict=True):
            assert here == pytest.approx(there, rel=1e-5), case


def assert_close_in_bf16(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Rounding differs by where it is done: 8 bits, over the steps."""
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-3)
    assert found["norms"] == pytest.approx(expected["norms"], rel=2e-2)
    assert found["val"] == pytest.approx(expected["val"], rel=1e-3)
    for name, tensor in expected["weights"].items():
        moved = (found["weights"][name] - tensor).abs().max()
        assert moved < 1e-2, f"{name}: {moved}"


def test_checkpoints_go_on_under_the_same_and_another_engine_and_by_other_numbers_of_ranks(
    seen: Seen, seen_by_four: tuple[list[dict[str, Any]], dict[str, Any]]
) -> None:
    for name, (_, chain) in CHAINS.items():
        assert_followed(chain, seen.followed[name])
    by_one = run_distributed(go_on, 1, seen.folder, timeout_s=300, imports=DEEPSPEED)[0]
    for name, learned in (seen_by_four[1] | by_one).items():
        assert_goes_on(learned, seen.followed[name].to_come)


@pytest.mark.parametrize("name", ["to zero2", "to zero3", "to stages"])
def test_one_process_reads_the_weights(name: str, seen: Seen) -> None:
    """By DeepSpeed's own function on what lies there, which does not put stages together, and by ours."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder, (words, chain) = seen.folder / name, CHAINS[name]
    as_composed([*words, *chain[-1].split()], folder)
    _, model = load_model(folder)
    (last,) = [path for path in (folder / "checkpoints").iterdir() if path.name == f"step_{2 * len(chain):08d}"]
    theirs = None if chain[-1] == ZERO1 else get_fp32_state_dict_from_zero_checkpoint(str(last))
    ours = model.state_dict()
    assert {name for name, _ in model.named_parameters()} == seen.followed[name].weights.keys()
    assert any(key.endswith("balance_bias") for key in ours)
    assert (last / "zero_to_fp32.py").exists() is (theirs is not None)
    for key, tensor in (*seen.followed[name].weights.items(), *(theirs or {}).items()):
        assert torch.equal(ours[key], tensor), key


def as_composed(words: list[str], folder: Path) -> None:
    """Give a run that was made inside a test the config that a command would have written."""
    from launch.runs.compose import write_config
    from launch.runs.folder import RunFolder

    write_config(RunFolder(folder), compose_train([*TINY, *words]), words)


def damage_and_fail(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Save twice, damage the newer; then a save in which a rank's disk is full, and one after it."""
    words = [*BIASED, "model.n_layer=1", "parallel=zero2", "optim.max_micro_batch=4"]
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
    copies = start(rank, size, folder.parent / "copies", *words, "parallel.zero_stage=0")
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


def config_with(folder: Path, content: Any, strategy: str = "zero2") -> TrainConfig:
    """The configuration of a run with a file of DeepSpeed's, of this text or with these settings."""
    path = folder / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    words = [f"parallel={strategy}", f"parallel.deepspeed_config={path}"]
    config = config_from([*TINY, "optim.max_micro_batch=2", *words])
    config.validate()
    return config


REFUSED = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.5,
    "zero_optimization": {"stage": 3},
    "cpu_offload": True,
    "round_robin_gradients": True,
    "zero_hpz_partition_size": 2,
    "mics_shard_size": 2,
    "bf16": {"enabled": True},
    "fp16": {"enabled": True},
    "optimizer": {"type": "Lamb"},
    "scheduler": {"type": "WarmupLR"},
    "activation_checkpointing": {"partition_activations": True},
    "tensorboard": {"enabled": True},
    "wandb": {"enabled": True},
    "checkpoint": {"load_universal": True},
}
OF_ZERO = ("cpu_offload", "round_robin_gradients", "zero_hpz_partition_size", "mics_shard_size")


@pytest.mark.parametrize(("key", "value"), REFUSED.items())
def test_a_file_that_contradicts_the_run_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    content = {"zero_optimization": {key: value}} if key in OF_ZERO else {key: value}
    refusal = refused(check_parallel_dims, config_with(tmp_path, content), 4, found=key, fix="in ds.json")
    assert "ds.json" in refusal.found


def test_timers_that_the_pipeline_cannot_run_are_refused_there_alone(tmp_path: Path) -> None:
    timed = {"wall_clock_breakdown": True}
    check_parallel_dims(config_with(tmp_path, timed), 4)
    with pytest.raises(ConfigError, match="wall_clock_breakdown"):
        check_parallel_dims(config_with(tmp_path, timed, "ds_pp"), 4)


def test_a_file_that_agrees_is_added(tmp_path: Path) -> None:
    from gpt.topology import split_batch
    from gpt.topology.check_dims import ds_config

    theirs = {
        "train_batch_size": "auto",
        "gradient_clipping": 1,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000000, "overlap_comm": False},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.1}},
        "bf16": {"enabled": "auto"},
        "wall_clock_breakdown": False,
    }
    config = config_with(tmp_path, theirs)
    made = ds_config(config, split_batch(config.optim, 4))
    assert made["zero_optimization"] == theirs["zero_optimization"]
    assert made["train_batch_size"] == BATCH and "optimizer" not in made and "bf16" not in made
    assert made["wall_clock_breakdown"] is False
    for text in ("{", "[]"):
        with pytest.raises(ConfigError, match="deepspeed_config"):
            check_parallel_dims(config_with(tmp_path, text), 4)


def test_micro_batches_are_not_timed_unless_the_file_asks_for_it(tmp_path: Path) -> None:
    """DeepSpeed would wait for the device twice in each of them."""
    from deepspeed.utils.config import get_timers_config

    from gpt.topology import split_batch
    from gpt.topology.check_dims import ds_config

    asking = {"timers": {"throughput": {"enabled": True}}}
    for strategy, content in (("zero2", {}), ("ds_pp_zero1", {}), ("zero2", asking)):
        config = config_with(tmp_path, content, strategy)
        timed = get_timers_config(ds_config(config, split_batch(config.optim, 4))).enabled
        assert timed is (content is asking)
