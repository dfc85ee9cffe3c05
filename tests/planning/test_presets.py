"""The presets by the figures that they are known for: counted by hand, and planned as their users would type them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from gpt.accounting import count
from gpt.config import AttentionBackend, Precision, Recompute, TrainConfig
from launch.config import ClusterKind
from launch.config.compose import compose_launch, typed_config
from launch.plan.plan import make_plan
from launch.plan.preflight import plan_text
from tests.support.composing import config_from

PARAMETERS = {
    # two matrices of 16,384 x 384, positions; then per layer 4 + 8 squares of the width, 4 + 1 + 4 vectors of biases,
    # and 4 of norms; one more norm
    "baseline_23m": 2 * 16384 * 384 + 256 * 384 + 6 * (12 * 384**2 + 13 * 384) + 2 * 384,
    "tiny_116k": 256 * 64 + 2 * (12 * 64**2 + 13 * 64) + 2 * 64,
    # of 12 query heads, 4 have keys and values
    "llama_124m_untied": 2 * 32000 * 768 + 12 * (768**2 * 2 + 2 * 768 * 256 + 3 * 768 * 2048 + 2 * 768) + 768,
    "gpt2_124m": 50304 * 768 + 1024 * 768 + 12 * (12 * 768**2 + 13 * 768) + 2 * 768,
}
MILLIONS = {"baseline_23m": 23e6, "tiny_116k": 116e3, "llama_124m_untied": 124e6, "gpt2_124m": 124e6}
SLURM = ("cluster=slurm", "cluster.gpus_per_node=8", "cluster.gpu_name=H100")


def plan(folder: Path, *words: str, vocab_size: int = 256) -> tuple[TrainConfig, str]:
    """The config and the text of the plan of a command, on a small made-up corpus of that vocabulary."""
    tokens = np.arange(3_000_000, dtype=np.uint32) % vocab_size
    for name in ("train", "val"):
        tokens.astype(np.uint16).tofile(folder / f"{name}.bin")
    made_up = ["data=tokens", f"data.path={folder}", f"output_dir={folder / 'outputs'}"]
    config = typed_config(compose_launch([*words, *made_up]))
    return config, plan_text(make_plan(config, [*words, *made_up], ClusterKind.slurm))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str) -> None:
    counted = count(config_from([f"model={name}"]).model).total
    assert counted == PARAMETERS[name]
    assert counted == pytest.approx(MILLIONS[name], rel=0.015)
    about = (Path(__file__).parents[2] / "configs" / "model" / f"{name}.yaml").read_text()
    assert f"{counted:,} parameters" in about


def test_gpts_vocabulary_is_padded_to_what_gpus_multiply_fast() -> None:
    every = [path.stem for path in (Path(__file__).parents[2] / "configs" / "model").glob("*.yaml")]
    models = {name: config_from([f"model={name}"]).model for name in every}
    padded = {name: model.padded_vocab for name, model in models.items() if model.vocab_size == 50257}
    assert len(padded) >= 6 and set(padded.values()) == {393 * 128}


def test_the_baseline(tmp_path: Path) -> None:
    config, text = plan(tmp_path, "+experiment=baseline", *SLURM, vocab_size=16384)
    model, optim = config.model, config.optim
    assert (model.n_layer, model.n_embd, model.vocab_size, model.tie_embeddings) == (6, 384, 16384, False)
    assert config.precision is Precision.fp32 and model.attention is AttentionBackend.manual
    assert (optim.max_steps, optim.lr, optim.warmup_steps, config.eval.interval) == (3000, 3e-4, 200, 500)
    assert optim.target_val_loss == 1.55 and config.checkpoint.keep_best == 1
    told = config_from(["+experiment=baseline"]).data
    assert (told.tokenizer.name, told.tokenizer_vocab_size) == ("sentencepiece", 16384)
    assert f"{PARAMETERS['baseline_23m']:,} parameters" in text


@pytest.mark.parametrize("batch", [4, 8])
def test_optim_moe_fits_one_consumer_gpu(batch: int, tmp_path: Path) -> None:
    words = ["model=moe_200m", "optim=moe", f"optim.global_batch={batch}", "cluster=slurm", "cluster.gpus_per_node=1"]
    config, text = plan(tmp_path, *words, "cluster.gpu_name=RTX-4090", vocab_size=50257)
    assert (config.optim.max_micro_batch, config.optim.lr) == (1, 3e-4)
    assert config.precision is Precision.bf16 and config.recompute is Recompute.full
    assert f"{batch} micro-batches of 1 per rank" in text, "and it is not refused for its memory"
    assert config_from(["model=moe_200m", "optim=moe"]).optim.global_batch == 8
    assert config_from(["optim=moe", "precision=fp32", "recompute=none"]).precision is Precision.fp32, "what is typed"


def test_gpt2_on_openwebtext(tmp_path: Path) -> None:
    config, text = plan(tmp_path, "+experiment=gpt2_owt", *SLURM, vocab_size=50257)
    assert (config.optim.global_batch, config.optim.max_steps) == (480, 600_000)
    assert "124,475,904 parameters" in text and "294,912,000,000" in text
    assert config_from(["+experiment=gpt2_owt"]).data.dataset == "Skylion007/openwebtext"


def test_a_llama_of_1p36b_on_a_node_of_8_gpus(tmp_path: Path) -> None:
    _, text = plan(tmp_path, "+experiment=llama_1p36b_slimpajama", *SLURM, vocab_size=32000)
    assert "1 x 8 = 8 ranks" in text and "1,364,297,728 parameters" in text and "fsdp" in text
    assert "2,097,152 a step" in text
    assert "SlimPajama" in str(config_from(["+experiment=llama_1p36b_slimpajama"]).data.dataset)


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_the_scaling_set_of_the_117m(gpus: int, tmp_path: Path) -> None:
    words: Sequence[str] = ["+experiment=scaling_117m", f"ranks_per_node={gpus}", *SLURM]
    config, text = plan(tmp_path, *words, vocab_size=50257)
    assert f"1 x {gpus} = {gpus} rank" in text and config.optim.global_batch == 480
    assert f"{480 // gpus // 12} micro-batches of 12 per rank" in text
