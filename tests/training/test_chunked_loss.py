"""A loss without whole logits: the value and the gradients of torch's own, on one rank and on several."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gpt.model import layers
from gpt.model.gpt import GPT, initialize
from gpt.model.layers import summed_loss
from launch.errors import ConfigError
from tests.support.composing import config_from
from tests.support.distributed import run_distributed
from tests.support.learning import compose, start, step

SMALL = {"cpu": 700}
"""Logits of a chunk: two rows of the padded vocabulary, of which there are 96."""
VOCAB = ("model.vocab_size=257", "model.vocab_multiple=64", "chunked_loss=true")


@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 2e-2)])
def test_it_has_the_value_and_the_gradients_of_torch(tied: str, precision: str, tolerance: float) -> None:
    config = compose(*VOCAB, f"model.tie_embeddings={tied}", f"precision={precision}")
    model = GPT(config.model)
    initialize(model, 3)
    ids_BT1 = torch.randint(257, (6, 17), generator=torch.Generator().manual_seed(1))
    tokens_BT, targets_BT = ids_BT1[:, :-1], ids_BT1[:, 1:].clone()
    targets_BT[0, 3:9] = targets_BT[5] = -1
    expected = F.cross_entropy(model(tokens_BT).flatten(0, 1), targets_BT.flatten(), ignore_index=-1, reduction="sum")
    theirs = torch.autograd.grad(expected / 64, [*model.parameters()])
    largest = []

    def note(logits_RV: Tensor, targets_R: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
        largest.append(logits_RV.numel())
        return layers.loss_and_gradient(logits_RV, targets_R, vocab_size)

    model.chunk_loss = note
    with mock.patch.object(layers, "LOGITS_AT_ONCE", SMALL):
        found = summed_loss(model, config, tokens_BT, targets_BT, torch.device("cpu"))
        ours = torch.autograd.grad(found / 64, [*model.parameters()])
        with torch.no_grad(), FlopCounterMode(display=False) as counted:
            alone = summed_loss(model, config, tokens_BT, targets_BT, torch.device("cpu"))
    assert len(largest) == 96 and max(largest) <= SMALL["cpu"]
    assert torch.equal(alone, found.detach())
    head = 2 * 96 * config.model.padded_vocab * config.model.n_embd
    with torch.no_grad(), FlopCounterMode(display=False) as whole:
        model(tokens_BT)
    assert counted.get_total_flops() == whole.get_total_flops() >= head, "an evaluation computes no gradients"
    torch.testing.assert_close(found, expected, rtol=tolerance / 10, atol=0)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=tolerance)


def steps(rank: int, size: int, folder: Path) -> dict[str, list[float]]:
    """Loss and gradient norm of three steps under each engine, with whole logits and without."""
    found = {}
    for name, words in ENGINES.items():
        for chunked in ("false", "true"):
            with mock.patch.object(layers, "LOGITS_AT_ONCE", SMALL):
                run = start(rank, size, folder / name / chunked, *words, *VOCAB, f"chunked_loss={chunked}")
                records = [step(run) for _ in range(3)]
            found[f"{name} {chunked}"] = [float(value) for record in records for value in record]
    return found


ENGINES = {
    "ddp": ["parallel=ddp", "optim.max_micro_batch=2"],
    "zero1": ["parallel=zero1"],
    "fsdp": ["parallel=fsdp", "model.tie_embeddings=true"],
    "cp": ["parallel.cp=2"],
    "packed": ["parallel=fsdp", "data.pack=documents", "data.document_end=10"],
}


def test_every_engine_learns_as_with_whole_logits(tmp_path: Path) -> None:
    for found in run_distributed(steps, 2, tmp_path / "runs"):
        for name in ENGINES:
            assert found[f"{name} true"] == pytest.approx(found[f"{name} false"], rel=2e-6), name


@pytest.mark.parametrize(
    "words", ["parallel=tp", "parallel=pp", "parallel=zero2", "model.logit_softcap=30", "precision=fp16"]
)
def test_what_it_cannot_compute_is_refused(words: str) -> None:
    with pytest.raises(ConfigError, match="chunked_loss=true with"):
        config_from([words, "chunked_loss=true"]).validate()
