"""DeepSpeed's engine learns what one process learns, and its checkpoints go on under any stage, size and strategy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from gpt.checkpoint import CheckpointError
from gpt.compose import compose_train, to_schema
from gpt.composition import lay_out
from gpt.config import TrainConfig
from gpt.errors import ConfigError
from gpt.load import load_model
from gpt.resume import save
from gpt.run import Run
from tests.commands import TINY as COMMAND
from tests.commands import run as run_command
from tests.distributed import run_distributed
from tests.parallel.learning import ACCUMULATIONS, BATCH, MODELS, STEPS, TINY, assert_same, learn_alone, start, step

STAGES = (0, 1, 2, 3)
SIZES = (2, 4)
CASES = [(2, stage, model) for stage in STAGES for model in MODELS] + [
    (4, stage, list(MODELS)[stage % len(MODELS)]) for stage in STAGES
]


def words_of(stage: int) -> list[str]:
    return ["parallel.strategy=deepspeed", f"parallel.zero_stage={stage}"]


def accumulation_of(size: int, stage: int, model: str) -> int:
    """Each stage meets each accumulation on each size, or with each model on one."""
    return ACCUMULATIONS[(stage + list(MODELS).index(model)) % 2 if size == 2 else stage // 2]


def learn_zero(run: Run) -> dict[str, Any]:
    """As ``learn``, of an engine that tells gradients between the passes and the step only, before they are clipped."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    parameters = dict(run.engine.module.named_parameters())
    found: dict[str, Any] = {}
    update = run.engine.update

    def look(lr: float) -> torch.Tensor:
        if not found:
            found["gradients"] = {name: safe_get_full_grad(p).clone() for name, p in parameters.items()}
            squares = [part.double().square().sum() * share for _, part, share in run.engine.gradients()]
            found["norm of the parts"] = run.world.add_up(torch.stack(squares).sum()).sqrt().item()
        return update(lr)

    run.engine.update = look
    found["losses"], found["norms"] = zip(*[step(run) for _ in range(STEPS)], strict=True)
    assert found["norm of the parts"] == pytest.approx(found["norms"][0], rel=1e-5)
    clipped = min(1.0, run.config.optim.grad_clip / (found["norms"][0] + 1e-6))
    found["gradients"] = {name: grad * clipped for name, grad in found["gradients"].items()}
    masters = run.config.parallel.zero_stage
    found["weights"] = {
        name: (safe_get_full_fp32_param(p) if masters else p).detach().clone() for name, p in parameters.items()
    }
    return found


def learn_all(rank: int, size: int, folder: Path) -> dict[tuple[int, str], dict[str, Any]]:
    found = {}
    for _, stage, model in (case for case in CASES if case[0] == size):
        accumulation = accumulation_of(size, stage, model)
        words = [*words_of(stage), *MODELS[model], f"optim.micro_batch={BATCH // (size * accumulation)}"]
        run = start(rank, size, folder / f"{stage}{model}", *words)
        assert run.batch.accumulation == accumulation
        found[stage, model] = learn_zero(run)
    assert_timeouts(run.config.parallel.timeout_s)
    return found if rank == 0 else {}


def assert_timeouts(timeout_s: int) -> None:
    """Also in the groups that DeepSpeed makes, which torch would give half an hour."""
    from torch.distributed.distributed_c10d import _world

    assert len(_world.pg_map) > 2
    for group in _world.pg_map:
        assert group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == timeout_s


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("alone") / "runs"
    bf16 = {"bf16": [*MODELS["tied"], "precision=bf16"]}
    return run_distributed(learn_alone, 1, folder, MODELS | bf16)[0]


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[tuple[int, str], dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("spread")
    return {size: run_distributed(learn_all, size, folder / f"{size}", timeout_s=400)[0] for size in SIZES}


@pytest.mark.parametrize(("size", "stage", "model"), CASES)
def test_losses_gradients_and_weights_are_those_of_one_process(
    size: int,
    stage: int,
    model: str,
    spread: dict[int, dict[tuple[int, str], dict[str, Any]]],
    reference: dict[str, dict[str, Any]],
) -> None:
    assert_same(spread[size][stage, model], reference[model])


OTHER_WAYS = {
    "bf16": [["precision=bf16", *words_of(stage)] for stage in STAGES],
    "tied": [
        [*words_of(1), "parallel.offload_optimizer=true"],
        ["parallel=zero3_offload"],
        [*words_of(3), "recompute=full"],
    ],
}


def learn_otherwise(rank: int, size: int, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """In bf16, offloaded, recomputed; with the number of steps that AdamW has counted."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, ways in OTHER_WAYS.items():
        for number, words in enumerate(ways):
            run = start(rank, size, folder / f"{name}{number}", *MODELS["tied"], *words, "optim.micro_batch=4")
            learned = learn_zero(run)
            learned["steps"] = {int(state["step"]) for state in run.engine.ds.basic_optimizer.state.values()}
            found.setdefault(name, []).append(learned)
    return found


def test_bf16_offloading_and_recomputation(tmp_path: Path, reference: dict[str, dict[str, Any]]) -> None:
    found = run_distributed(learn_otherwise, 2, tmp_path / "runs", timeout_s=300)[0]
    for learned in found["tied"]:
        assert_same(learned, reference["tied"])
        assert learned["steps"] == {STEPS}
    expected = reference["bf16"]
    for learned in found["bf16"]:
        assert learned["steps"] == {STEPS}
        # Rounding differs by where it is done: 8 bits, over five steps.
        assert learned["losses"] == pytest.approx(expected["losses"], rel=1e-3)
        assert learned["norms"] == pytest.approx(expected["norms"], rel=2e-2)
        for name, tensor in expected["weights"].items():
            moved = (learned["weights"][name] - tensor).abs().max()
            assert moved < 1e-2, f"{name}: {moved}"


MIXTURE = [*MODELS["experts"], "model.expert_balance=bias", "optim.micro_batch=2"]
WAYS = {f"zero{stage}": words_of(stage) for stage in STAGES} | {"ddp": ["parallel=ddp"], "fsdp": ["parallel=fsdp"]}
CROSSINGS = [
    *(("zero1", "zero3"), ("zero3", "zero2"), ("zero2", "fsdp"), ("zero3", "zero0"), ("zero0", "zero1")),
    *(("ddp", "zero3"), ("fsdp", "zero2"), ("zero0", "ddp"), ("ddp", "zero0")),
]


def save_all(rank: int, size: int, folder: Path) -> dict[str, list[float]]:
    """A run of each way with a checkpoint after two steps, and the losses of the next three."""
    to_come = {}
    for way, words in WAYS.items():
        run = start(rank, size, folder / way, *MIXTURE, *words)
        for _ in range(2):
            step(run)
        save(run, lambda: True)
        if way in ("zero2", "zero3"):
            remember(run, folder / f"{way}.pt")
        to_come[way] = [step(run)[0] for _ in range(3)]
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
        assert run.step == 2
        found[saved, resumed] = [step(run)[0] for _ in range(3)]
    dist.barrier()
    assert not list(folder.glob("*/checkpoints/.*")), "conversions are temporary"
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    folder = tmp_path_factory.mktemp("saved") / "runs"
    return folder, run_distributed(save_all, 2, folder, timeout_s=200)[0]


def test_checkpoints_go_on_bit_for_bit_or_under_another_stage_and_strategy(
    saved: tuple[Path, dict[str, list[float]]],
) -> None:
    folder, to_come = saved
    same = [(f"zero{stage}", f"zero{stage}") for stage in STAGES]
    found = run_distributed(go_on, 2, folder, [*same, *CROSSINGS], timeout_s=300)[0]
    for (way, resumed), losses in found.items():
        assert losses == pytest.approx(to_come[way], rel=1e-6), (way, resumed)
        if way == resumed:
            assert losses == to_come[way], f"{way}: bit for bit"


@pytest.mark.parametrize(
    ("size", "pairs"),
    [(1, [("zero3", "zero3"), ("zero2", "ddp")]), (4, [("zero2", "zero2"), ("zero3", "zero1")])],
)
def test_checkpoints_go_on_with_other_numbers_of_ranks(
    size: int, pairs: list[tuple[str, str]], saved: tuple[Path, dict[str, list[float]]]
) -> None:
    folder, to_come = saved
    for (way, _), losses in run_distributed(go_on, size, folder, pairs, timeout_s=300)[0].items():
        assert losses == pytest.approx(to_come[way], rel=1e-6), (way, size)


@pytest.mark.parametrize("way", ["zero2", "zero3"])
def test_one_process_reads_the_weights(way: str, saved: tuple[Path, dict[str, list[float]]], tmp_path: Path) -> None:
    """By DeepSpeed's own function on what lies there, and by ours; the run folder stays as it was."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = saved[0]
    expected = torch.load(folder / f"{way}.pt")
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(folder / way / "checkpoints" / "step_00000002"))
    as_composed(way, folder)
    _, model = load_model(folder / way)
    ours = model.state_dict()
    assert expected.keys() == ours.keys() and any(name.endswith("balance_bias") for name in ours)
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor) and torch.equal(theirs[name], tensor), name


def as_composed(way: str, folder: Path) -> None:
    """Give a run that was made inside a test the config that a command would have written."""
    from gpt.compose import write_config
    from gpt.run_folder import RunFolder

    words = [*TINY, *MIXTURE, *WAYS[way]]
    write_config(RunFolder(folder / way), compose_train(words), words)


def damage_and_fail(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Save twice, damage the newer; then a save in which a rank's disk is full, and one after it."""
    words = [*MIXTURE, *words_of(2)]
    run = start(rank, size, folder, *words)
    for _ in range(2):
        step(run)
        save(run, lambda: True)
    dist.barrier()
    if rank == 0:
        path = next((folder / "checkpoints" / "step_00000002").glob("*/*rank_1*optim_states.pt"))
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    dist.barrier()
    again = start(rank, size, folder, *words)
    found = {"step": again.step, "loss": step(again)[0]}
    full = mock.patch("torch.save", side_effect=OSError(28, "No space left on device"))
    if rank == 1:
        full.start()
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(again, lambda: True)
    full.stop() if rank == 1 else None
    save(again, lambda: True)
    found["names"] = sorted(path.name for path in (folder / "checkpoints").iterdir())
    return found


def test_damage_is_noticed_and_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    for found in run_distributed(damage_and_fail, 2, tmp_path / "run"):
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


def config_of(*words: str) -> TrainConfig:
    config = to_schema(compose_train([*TINY, "optim.micro_batch=2", *words]), TrainConfig)
    config.validate()
    return config


REFUSED = {
    "train_batch_size": (32, "optim.global_batch=32"),
    "train_micro_batch_size_per_gpu": (4, "optim.micro_batch=4"),
    "gradient_accumulation_steps": (1, "optim.micro_batch of 4 sequences divided by 1"),
    "gradient_clipping": (0.5, "optim.grad_clip=0.5"),
    "zero_optimization": ({"stage": 3}, "parallel.zero_stage=3"),
    "bf16": ({"enabled": True}, "precision=bf16"),
    "fp16": ({"enabled": True}, "precision=bf16"),
    "optimizer": ({"type": "Lamb"}, "AdamW"),
    "scheduler": ({"type": "WarmupLR"}, "optim.warmup_steps"),
    "tensorboard": ({"enabled": True}, "logging.tensorboard=true"),
    "wandb": ({"enabled": True}, "logging.wandb=true"),
    "checkpoint": ({"load_universal": True}, "checkpoint group"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_file_that_contradicts_the_run_is_refused(key: str, tmp_path: Path) -> None:
    value, fix = REFUSED[key]
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({key: value}))
    with pytest.raises(ConfigError) as refusal:
        lay_out(config_of("parallel=zero2", f"parallel.deepspeed_config={path}"), 4)
    assert key in refusal.value.found and "ds.json" in refusal.value.found
    assert fix in refusal.value.fix


def test_a_file_that_agrees_is_added(tmp_path: Path) -> None:
    from gpt.batch import cut
    from gpt.parallel.deepspeed.config import ds_config

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
    made = ds_config(config, cut(config.optim, 4))
    assert made["zero_optimization"] == theirs["zero_optimization"]
    assert made["train_batch_size"] == BATCH and "optimizer" not in made and "bf16" not in made
    assert made["wall_clock_breakdown"] is False
    for text in ("{", "[]"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="deepspeed_config"):
            lay_out(config, 4)


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["parallel=zero2", "parallel.zero_stage=4"], ["parallel.zero_stage=2"]),
        (["parallel=zero2", "parallel.offload_parameters=true"], ["parallel.zero_stage=3"]),
        (["parallel=ds_zero0", "parallel.offload_optimizer=true"], ["parallel.zero_stage=1"]),
    ],
)
def test_refusals_name_what_is_accepted(words: list[str], fix: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        lay_out(config_of(*words), 4)
    assert refusal.value.fix.startswith(fix[0])
    lay_out(config_of(*words, *fix), 4)


@pytest.mark.parametrize("dimension", ["tp", "pp", "cp", "ep"])
def test_deepspeed_cuts_nothing_else(dimension: str) -> None:
    with pytest.raises(ConfigError, match="parallel=fsdp"):
        lay_out(config_of("parallel=zero2", f"parallel.{dimension}=2"), 4)


def test_keys_of_deepspeed_belong_to_it() -> None:
    for word in ("zero_stage=2", "offload_optimizer=true", "deepspeed_config=ds.json"):
        with pytest.raises(ConfigError, match=r"parallel\.strategy=deepspeed"):
            config_of("parallel=fsdp", f"parallel.{word}")
