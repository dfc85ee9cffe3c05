"""Tensor parallelism, and the overlap of its collectives with matrix products."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from gpt.config import ParallelConfig
from gpt.model.gpt import GPT
from gpt.model.layers import cross_entropy
from gpt.parallel.distributed import build_mesh
from gpt.parallel.tensor import apply_tensor_parallel, vocabulary_loss
from gpt.topology import ParallelDims
from tests.support.distributed import run_distributed
from tests.support.learning import Operations
from tests.support.small_models import LLAMA, random_tokens, small


def cut_model(rank: int, size: int) -> dict[str, Any]:
    """Memory and traffic of a rank for a model without padding, in one forward and backward pass."""
    config = small(**LLAMA, n_kv_head=2, n_layer=3, vocab_size=48, ffn_hidden=36)
    mesh = build_mesh(ParallelDims("ddp", 1, 1, tp=size), "cpu")["tp"]
    model = GPT(config)
    apply_tensor_parallel(model, mesh, ParallelConfig())
    shapes: dict[str, tuple[int, ...]] = {}
    model.blocks[1].register_forward_pre_hook(lambda _, inputs: shapes.update(stream=tuple(inputs[0].shape)))
    tokens_BT = random_tokens(config, 5)
    counts = []
    with Operations(is_collective) as seen:
        logits_BTV = model(tokens_BT)
        counts.append(Counter(name.split(".")[1] for name in seen.found))
        logits_BTV.sum().backward()
        counts.append(Counter(name.split(".")[1] for name in seen.found))
    held = {name: tuple(p.to_local().shape) for name, p in model.named_parameters()}
    grads = {name: tuple(p.grad.to_local().shape) for name, p in model.named_parameters()}
    return {"shapes": {**shapes, "logits": tuple(logits_BTV.shape)}, "counts": counts, "held": held, "grads": grads}


def is_collective(name: str, *_: Any) -> bool:
    space, kind, _ = name.split(".")
    return "c10d" in space and kind != "wait_tensor" and not kind.startswith("_")


def test_a_rank_holds_its_part_and_sends_no_more_than_it_must() -> None:
    """Korthikanti et al. (arXiv 2205.05198, section 4.2.2): two gathers and two reduce-scatters for each block and
    pass; one more each for embedding and output matrix. No gradient is larger than what it belongs to."""
    size, layers = 2, 3
    for rank in run_distributed(cut_model, size):
        assert rank["shapes"] == {"stream": (5, 12 // size, 32), "logits": (5, 12, 48 // size)}
        for passes, counts in enumerate(rank["counts"], start=1):
            each = passes * (2 * layers + 1)
            assert counts == {"all_gather_into_tensor": each, "reduce_scatter_tensor": each}
        assert rank["grads"] == rank["held"]
        cut = {name: shape for name, shape in rank["held"].items() if "norm" not in name}
        assert cut["token_embedding.weight"] == cut["head.weight"] == (24, 32)
        assert cut["blocks.0.attention.query.weight"] == cut["blocks.0.attention.output.weight"][::-1] == (16, 32)
        assert cut["blocks.0.attention.key.weight"] == cut["blocks.0.attention.value.weight"] == (8, 32)
        assert cut["blocks.0.ffn.up.weight"] == cut["blocks.0.ffn.down.weight"][::-1] == (18, 32)


def losses_of_cut_logits(rank: int, size: int) -> list[tuple[float, float, torch.Tensor, torch.Tensor]]:
    """Value and gradient beside those of whole logits, for vocabularies that end in the last part, before it, or in the
    first one."""
    mesh = build_mesh(ParallelDims("ddp", 1, 1, tp=size), "cpu")["tp"]
    found = []
    for vocab_size, columns in ((12, 4), (11, 4), (7, 4), (2, 4)):
        torch.manual_seed(vocab_size)
        whole = (30 * torch.randn(3, 5, size * columns)).requires_grad_()
        targets = torch.randint(vocab_size, (3, 5))
        expected = cross_entropy(whole[..., :vocab_size], targets)
        (gradient,) = torch.autograd.grad(7 * expected, whole)
        mine = slice(rank * columns, (rank + 1) * columns)
        part = whole[..., mine].detach().requires_grad_()
        loss = vocabulary_loss(mesh, columns, vocab_size)(part[..., :vocab_size], targets)
        (found_gradient,) = torch.autograd.grad(7 * loss, part)
        found.append((loss.item(), expected.item(), found_gradient, gradient[..., mine]))
    return found


def test_the_loss_of_cut_logits_is_that_of_whole_ones() -> None:
    for rank in run_distributed(losses_of_cut_logits, 3):
        for loss, expected, gradient, expected_gradient in rank:
            assert loss == pytest.approx(expected, rel=1e-6)
            torch.testing.assert_close(gradient, expected_gradient)
