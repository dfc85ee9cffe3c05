"""DeepSpeed's configuration is this run's: what contradicts it, and what cannot be asked for, is refused in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpt.config import TrainConfig
from gpt.topology.rules import check_parallel_dims
from launch.errors import ConfigError
from tests.support.composing import config_from
from tests.support.learning import BATCH, MODELS, TINY


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
