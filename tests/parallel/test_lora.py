"""LoRA under every engine that takes it: what one process learns, only adapters stepped and stored, counts and plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gpt.accounting import block_shapes, count, forward_flops, outer_shapes, training_flops
from gpt.config import AttentionBackend, LoraConfig
from gpt.model.gpt import GPT, initialize
from gpt.planning.memory import checkpoint_bytes
from tests.support.distributed import run_distributed
from tests.support.learning import (
    Chain,
    assert_followed,
    compose,
    evaluated,
    follow,
    full_weights,
    held_as_planned,
    start,
    step,
)
from tests.support.small_models import LLAMA, elements, small

LORA = ["model.lora.rank=4", "model.lora.targets=[query,value,output,gate,down]", "model.n_kv_head=2"]
EXPERTS = [
    *("model.lora.rank=3", "model.ffn=moe", "model.n_expert=4", "model.ffn_hidden=32", "model.bias=false"),
    *("model.expert_matmul=loop", "model.lora.targets=[key,output]"),
]
ENGINES = [
    *("parallel=ddp", "parallel=zero1", "parallel=fsdp", "parallel=cp", "parallel=fsdp_cp", "parallel=fsdp_offload"),
    *("parallel=fsdp chunked_loss=true", "parallel=fsdp recompute=selective", "parallel=ddp recompute=full"),
]
STEPS = 4


def learn(rank: int, size: int, folder: Path, engines: list[str], model: list[str]) -> list[dict[str, Any]]:
    """Losses and norms, the weights before and after, and where the memory differs from the plan, for each engine."""
    found = []
    for number, words in enumerate(engines):
        run = start(rank, size, folder / str(number), *model, *words.split(), "optim.max_micro_batch=4")
        before = full_weights(run)
        seen = [step(run) for _ in range(STEPS)]
        stepped = {n for n, p in run.engine.trained.named_parameters() if p in run.engine.optimizer.state}  # type: ignore[attr-defined]
        found.append(
            {
                **{"seen": seen, "val": evaluated(run), "before": before, "after": full_weights(run)},
                **{"stepped": {name.removeprefix("module.") for name in stepped}, "memory": held_as_planned(run)},
            }
        )
    return found


@pytest.mark.parametrize("model", [LORA, EXPERTS], ids=["dense", "experts"])
def test_every_engine_learns_what_one_process_learns_in_the_adapters_alone(model: list[str], tmp_path: Path) -> None:
    engines = ENGINES if model is LORA else ENGINES[:3]
    (alone,) = run_distributed(learn, 1, tmp_path / "alone", ["parallel=ddp"], model)[0]
    assert len({loss for loss, _ in alone["seen"]}) == STEPS
    for words, found in zip(engines, run_distributed(learn, 2, tmp_path / "runs", engines, model)[0], strict=True):
        assert found["seen"] == [pytest.approx(pair, rel=1e-5) for pair in alone["seen"]], words
        assert found["val"] == pytest.approx(alone["val"], rel=1e-6), words
        assert found["memory"] == "", words
        adapters = {name for name in found["before"] if ".lora_" in name}
        assert found["stepped"] == adapters and len(adapters) == 2 * 2 * len(compose(*model).model.lora.targets), words
        for name, after in found["after"].items():
            if name in adapters:
                torch.testing.assert_close(after, alone["after"][name], rtol=1e-4, atol=1e-6)
                assert not torch.equal(after, found["before"][name]), name
            else:
                assert torch.equal(after, found["before"][name]), f"{words}: {name} is frozen"


CHAIN: dict[str, Chain] = {
    "lora": ([*LORA, "model.lora.dropout=0.1"], ["parallel=fsdp", "parallel=zero1", "parallel=cp", "parallel=ddp"])
}


def test_checkpoints_go_on_bit_for_bit(tmp_path: Path) -> None:
    found = run_distributed(follow, 2, tmp_path / "runs", CHAIN, timeout_s=300)[0]["lora"]
    for (saved, resumed), (learned, to_come) in found.learned.items():
        if saved == resumed:
            assert learned == to_come, f"{saved}: bit for bit"
    assert len(found.learned) == 7


def test_checkpoints_go_on_under_another_engine(tmp_path: Path) -> None:
    chain: dict[str, Chain] = {"lora": (LORA, ["parallel=zero1", "parallel=fsdp", "parallel=ddp"])}
    found = run_distributed(follow, 2, tmp_path / "runs", chain, timeout_s=300)[0]
    assert_followed(chain["lora"][1], found["lora"])


def test_an_adapter_begins_as_nothing_and_leaves_the_other_weights_alone() -> None:
    config = small(**LLAMA, lora=LoraConfig(rank=2))
    ours, plain = GPT(config), GPT(replace(config, lora=LoraConfig()))
    for model in (ours, plain):
        initialize(model, 3)
    tokens_BT = torch.arange(24).view(2, 12)
    assert torch.equal(ours(tokens_BT), plain(tokens_BT))
    first = ours.state_dict()["blocks.0.attention.query.lora_a"]
    assert first.abs().max() <= 32**-0.5 and first.std() == pytest.approx((1 / 32 / 3) ** 0.5, rel=0.2)


def counted_flops(model: GPT, tokens_BT: Tensor) -> tuple[int, int]:
    with FlopCounterMode(display=False) as counter:
        logits_BTV = model(tokens_BT)
        forward = counter.get_total_flops()
        F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten()).backward()
    return forward, counter.get_total_flops()


def test_parameters_and_flops_are_those_of_the_model() -> None:
    lora = LoraConfig(rank=4, targets=["query", "key", "value", "output", "gate", "up", "down"])
    config = small(**LLAMA, n_kv_head=2, attention=AttentionBackend.manual, lora=lora)
    model = GPT(config)
    built = {name: tuple(p.shape) for name, p in model.named_parameters()}
    claimed = {f"blocks.{i}.{k}": v for i in range(config.n_layer) for k, v in block_shapes(config).items()}
    assert claimed | outer_shapes(config) == built
    counted, trained = count(config), [p for p in model.parameters() if p.requires_grad]
    assert counted.total == elements(model) and counted.trained == sum(p.numel() for p in trained)
    assert counted.trained == 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + config.ffn_width))
    tokens_BT = torch.zeros(2, config.block_size, dtype=torch.long)
    forward, both = counted_flops(model, tokens_BT)
    # The input of the first block needs no gradient: not through queries, keys and values, nor through their adapters.
    spared = 2 * tokens_BT.numel() * 32 * (32 + 16 + 16 + 3 * lora.rank)
    assert forward_flops(config, 2).palm == forward
    assert training_flops(config, 2).palm == both + spared


def test_a_checkpoint_has_all_weights_and_moments_of_adapters() -> None:
    config = compose(*LORA)
    counted = count(config.model)
    assert 0 < counted.trained < counted.total / 5
    assert checkpoint_bytes(config) == 4 * counted.total + 8 * counted.trained
