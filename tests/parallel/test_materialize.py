"""A model sharded on the meta device gets the values of one drawn whole, a shard and one parameter at a time."""

from __future__ import annotations

import hashlib
import weakref
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.model import gpt
from gpt.model.gpt import GPT
from gpt.parallel.dtensor import local_tensor, materialize
from gpt.training import checkpoints
from gpt.training.checkpoints import save
from tests.support.distributed import run_distributed
from tests.support.learning import DEEPSPEED, MODELS, compose, start, start_composed, whole

SEED = 11
WORDS = [f"seed={SEED}", "optim.max_micro_batch=2", "model.vocab_multiple=8"]
PP = ["parallel.pp=2", "model.n_layer=4"]
"""Two stages on each of two ranks."""
BIASED = [*MODELS["experts"], "model.expert_balance=bias"]
UNTIED = MODELS["untied, grouped queries"]
KEEPS = "parallel.reshard_after_forward=false"
LAYOUTS = {
    "ddp": ["parallel=ddp", *MODELS["tied"]],
    "zero1": ["parallel=zero1", *UNTIED],
    "fsdp": ["parallel=fsdp", *MODELS["tied"]],
    "fsdp on the host": ["parallel=fsdp", "parallel.cpu_offload=true", *UNTIED],
    "hsdp": ["parallel=hsdp", "parallel.dp_shard=2", *UNTIED],
    "tp": ["parallel=tp", *MODELS["tied"]],
    "fsdp x tp": ["parallel=fsdp_tp", "parallel.tp=2", *UNTIED],
    "cp x fsdp": ["parallel=fsdp", "parallel.cp=2", *UNTIED],
    "ep x tp": ["parallel=ep", "parallel.ep=2", "parallel.tp=2", *BIASED],
    "ep x tp x fsdp": ["parallel=fsdp_ep", "parallel.ep=2", "parallel.tp=2", *BIASED],
    "ep x fsdp": ["parallel=fsdp_ep", "parallel.ep=2", *BIASED],
    "pp of two stages": ["parallel=ddp", *PP, "parallel.schedule=interleaved", *UNTIED],
    "pp in a V x fsdp": ["parallel=fsdp", *PP, "parallel.schedule=zbv", KEEPS, *MODELS["tied"]],
    "pp x tp": ["parallel=tp", "parallel.tp=2", "parallel.pp=2", *MODELS["tied"]],
    "ZeRO 0": ["parallel=ds_zero0", *UNTIED],
}


def begin(rank: int, size: int, folder: Path) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """For each layout the tensors that its ranks begin with, brought together, and its tables."""
    found = {}
    for name, words in LAYOUTS.items():
        run = start(rank, size, folder / name.replace(" ", "_"), *WORDS, *words)
        module = run.engine.module
        found[name] = (whole(run, module.state_dict()), whole(run, dict(module.named_buffers())))
    return found


def drawn_whole(name: str, tensor: Tensor, vocab: int) -> Tensor:
    """A matrix of the model by the rule that is written down: one generator for each name, padding of zeros."""
    seed = int.from_bytes(hashlib.sha256(f"{SEED}:{name}".encode()).digest()[:8], "big") >> 1
    rows = vocab if name in ("token_embedding.weight", "head.weight") else len(tensor)
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(rows, *tensor.shape[1:]).normal_(std=0.02, generator=generator)
    return F.pad(values, (0, 0, 0, len(tensor) - rows))


def test_every_engine_begins_with_the_bits_of_one_that_draws_the_model_whole(tmp_path: Path) -> None:
    found = run_distributed(begin, 4, tmp_path / "runs", timeout_s=400, imports=DEEPSPEED)[0]
    for layout, words in LAYOUTS.items():
        config = compose(*WORDS, *words).model
        model = GPT(config)
        gpt.initialize(model, SEED)
        tensors, tables = found[layout]
        assert tensors.keys() == model.state_dict().keys(), layout
        for name, expected in model.state_dict().items():
            assert torch.equal(tensors[name], expected), f"{layout}: {name}"
        for name, expected in model.named_buffers():
            assert torch.equal(tables[name], expected), f"{layout}: {name}"
        for name in ("token_embedding.weight", "blocks.1.attention.query.weight"):
            assert torch.equal(tensors[name], drawn_whole(name, tensors[name], config.vocab_size)), f"{layout}: {name}"


def watch(rank: int, size: int, folder: Path) -> tuple[list[int], int, int]:
    """Whole tensors alive when the next is drawn; bytes that a rank then holds; draws of a run that goes on."""
    config = compose(*WORDS, "parallel=fsdp", *UNTIED)
    alive: list[int] = []
    drawn: list[weakref.ref[Tensor]] = []
    draw = gpt.initial_value

    def counted(*args: object, **kwargs: object) -> Tensor:
        alive.append(sum(reference() is not None for reference in drawn))
        value = draw(*args, **kwargs)  # type: ignore[arg-type]
        drawn.append(weakref.ref(value))
        return value

    gpt.initial_value = counted  # type: ignore[assignment]
    run = start_composed(rank, size, folder, config)
    held = sum(local_tensor(p).untyped_storage().nbytes() for p in run.engine.module.parameters())
    run.step = 1
    save(run)
    before = len(drawn)
    start_composed(rank, size, folder, config)
    return alive, held, len(drawn) - before


def test_a_rank_holds_its_shards_and_one_whole_tensor_and_draws_nothing_where_it_resumes(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = GPT(compose(*WORDS, "parallel=fsdp", *UNTIED).model)
    total = sum(p.nbytes for p in model.parameters())
    for alive, held, again in run_distributed(watch, 4, tmp_path / "runs"):
        assert len(alive) == len(model.state_dict()) and not any(alive)
        assert held < total / 4 + 64 * len(alive), "rows that do not divide are padded"
        assert again == 0


def test_what_a_checkpoint_is_about_to_fill_takes_no_memory() -> None:
    shape = torch.Size((1 << 30, 1 << 10))
    assert checkpoints.zeros("head.weight", shape).shape == shape
    config = compose("parallel=ddp", *UNTIED).model
    with torch.device("meta"):
        model = GPT(config)
    materialize([model], checkpoints.zeros, torch.device("cpu"))
    assert not any(parameter.any() for parameter in model.parameters())
