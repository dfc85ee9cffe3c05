"""Documents packed into sequences: the same as each document alone, on one rank and on several."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.config import TrainConfig
from gpt.model.gpt import GPT, initialize, summed_loss
from tests.support.distributed import run_distributed
from tests.support.learning import Case, compose, evaluated, learn, start, start_case, step

NEWLINE = 10
PACKED = ("precision=fp32", "data.pack=documents", f"data.document_end={NEWLINE}")
"""Lines of source code as documents: of a single byte, and longer than the 16 tokens of a sequence."""
LEARNED = ("model.tie_embeddings=true", "model.position=learned", "model.norm=layernorm")
GROUPED = ("model.tie_embeddings=false", "model.position=rope", "model.n_kv_head=2")
MODELS = {
    "rope": [*GROUPED, *PACKED],
    "learned": [*LEARNED, *PACKED],
    "written out": [*GROUPED, "model.attention=manual", *PACKED],
    "layers": [*LEARNED, *PACKED, "model.n_layer=4"],
}


def alone(model: GPT, tokens_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, int]:
    """Summed loss and number of targets of each document by itself, by the plain model, one after another."""
    total, counted = torch.zeros(()), 0
    for tokens, targets in zip(tokens_BT.tolist(), targets_BT.tolist(), strict=True):
        begin = 0
        for position, token in enumerate(tokens):
            last = position == len(tokens) - 1
            if token == NEWLINE or last:
                seen, wanted = tokens[begin : position + 1], targets[begin : position + (token != NEWLINE)]
                if wanted:
                    logits_1TV = model(torch.tensor([seen]))[:, : len(wanted)]
                    total = total + F.cross_entropy(logits_1TV[0], torch.tensor(wanted), reduction="sum")
                counted, begin = counted + len(wanted), position + 1
    return total, counted


def gradients(model: GPT, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["rope", "learned", "written out"])
def test_a_batch_gives_the_loss_and_the_gradients_of_each_document_alone(name: str) -> None:
    config = compose(*MODELS[name])
    model = GPT(config.model)
    initialize(model, 5)
    for parameter in model.parameters():
        parameter.data.mul_(3)  # away from the start, where attention is almost uniform
    ids_BT1 = torch.randint(20, 200, (6, 17), generator=torch.Generator().manual_seed(1))
    ids_BT1[0, [2, 3, 9]] = ids_BT1[1, [0, 15]] = ids_BT1[2, [8, 16]] = ids_BT1[4] = NEWLINE
    ids_BT1[5, ::2] = NEWLINE
    tokens_BT, next_BT = ids_BT1[:, :-1], ids_BT1[:, 1:]
    targets_BT = next_BT.masked_fill(tokens_BT == NEWLINE, -1)
    expected, counted = alone(model, tokens_BT, next_BT)
    assert counted == int((targets_BT >= 0).sum())
    found = summed_loss(model, config, tokens_BT, targets_BT, torch.device("cpu"))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    theirs = gradients(model, expected / counted)
    for key, mine in gradients(model, found / counted).items():
        torch.testing.assert_close(mine, theirs[key], rtol=0, atol=1e-6, msg=key)


def first_step(run_config: TrainConfig, tokens_BT: Tensor, next_BT: Tensor) -> tuple[float, float]:
    """Loss and norm of the gradients of a run's first step: the mean over the targets that count."""
    model = GPT(run_config.model)
    initialize(model, run_config.seed)
    total, counted = alone(model, tokens_BT, next_BT)
    found = gradients(model, total / counted)
    return total.item() / counted, float(torch.cat([g.flatten() for g in found.values()]).norm())


def learned_by(rank: int, size: int, folder: Path, cases: list[Case]) -> list[dict[str, Any]]:
    made = []
    for number, case in enumerate(cases):
        run = start_case(rank, size, folder / str(number), case, MODELS[case.model])
        tokens, targets = run.samples.batch("train", np.arange(16))
        ids_BT1 = run.samples.read("train", np.arange(16))
        found = learn(run)
        reference = first_step(run.config, tokens, ids_BT1[:, 1:])
        counted = int((targets >= 0).sum())
        made.append({**found, "evaluated": evaluated(run), "reference": reference, "counted": counted})
    return made


CASES = [
    *(Case(f"parallel={strategy}", "rope", 4) for strategy in ("ddp", "zero1", "fsdp")),
    *(Case("parallel=tp", name, 2) for name in ("rope", "learned")),
    Case("parallel=ddp parallel.pp=2 parallel.schedule=1f1b", "layers", 4),
    Case("parallel=fsdp parallel.pp=2 parallel.schedule=interleaved recompute=full", "layers", 4),
]


def test_two_ranks_learn_what_one_learns(tmp_path: Path) -> None:
    models = sorted({case.model for case in CASES})
    alone = [Case("parallel=ddp", model, 1) for model in models]
    reference = dict(zip(models, run_distributed(learned_by, 1, tmp_path / "one", alone)[0], strict=True))
    for expected in reference.values():
        assert (expected["losses"][0], expected["norms"][0]) == pytest.approx(expected["reference"], rel=1e-5)
        assert expected["counted"] < 16 * 16
    for of_rank in run_distributed(learned_by, 2, tmp_path / "two", CASES, timeout_s=300):
        for case, found in zip(CASES, of_rank, strict=True):
            expected = reference[case.model]
            assert found["losses"] == pytest.approx(expected["losses"], rel=2e-6), case
            assert found["norms"] == pytest.approx(expected["norms"], rel=2e-5), case
            assert found["evaluated"] == pytest.approx(expected["evaluated"], rel=2e-6), case


def of_single_tokens(rank: int, size: int, folder: Path) -> tuple[tuple[float, float], float]:
    text = folder.parent / "lines"
    text.write_text("\n" * 4000)
    run = start(rank, size, folder, *MODELS["learned"], "data=text", f"data.path={text}", "data.max_bytes=null")
    return step(run), evaluated(run)


def test_documents_of_one_token_predict_nothing(tmp_path: Path) -> None:
    ((found, loss),) = run_distributed(of_single_tokens, 1, tmp_path / "run")
    assert found == (0.0, 0.0) and loss == 0.0 and not math.isnan(loss)
