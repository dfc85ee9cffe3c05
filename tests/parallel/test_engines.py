"""Every engine of torch: its first bits, what it learns and holds, and checkpoints that go on under another."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from gpt.config import TrainConfig
from gpt.conversion.state_dict import find_checkpoint, read_weights
from gpt.model.gpt import GPT, initialize
from launch.runs.folder import RunFolder
from tests.support import learning
from tests.support.distributed import run_distributed
from tests.support.learning import (
    STEPS,
    Case,
    Chain,
    assert_followed,
    assert_same,
    compose,
    evaluated,
    follow,
    held_as_planned,
    learn,
    save,
    start,
    start_case,
    step,
    whole,
)

PADDED = ["model.vocab_size=259", "model.vocab_multiple=16"]
ONE, FOUR = "model.n_layer=1", "model.n_layer=4"
"""One layer is enough for a kind of layer; four are for pipelines, some of which have two stages on each rank."""
MOE = learning.MODELS["experts"]
TIED = ["model.tie_embeddings=true", "model.position=learned", "model.norm=layernorm"]
QUERIES = ["model.tie_embeddings=false", "model.n_kv_head=2", "model.qk_norm=true", "model.norm=rmsnorm"]
QUERIES += ["model.attention_sinks=true"]
EXPERTS = [*MOE, "model.tie_embeddings=true", "model.n_shared_expert=1", "model.n_kv_head=2"]
BIASED = ["model.expert_balance=bias", "model.balance_bias_rate=0.05"]
ROUTED = [*MOE, "model.balance_coefficient=0.3", "model.z_coefficient=0.1"]
PLACES = ["model.tie_embeddings=false", "model.capacity_factor=1.0"]
LAYERS = {
    "tied": [*TIED, "model.parallel_residual=true", "model.ffn=geglu", "model.ffn_hidden=42"],
    "queries": QUERIES,
    "one layer": [*QUERIES, ONE],
    "experts": [*EXPERTS, "model.z_coefficient=0.01"],
    "places": [*MOE, *PLACES, *BIASED, "model.expert_ffn=standard", "model.expert_matmul=loop"],
    "few experts": [*MOE, "model.n_expert=2", "model.n_expert_per_token=1", ONE],
    "even rows": [*MOE, *PLACES, ONE],
    "post": ["model.norm_position=post", "model.ffn=swiglu", "model.ffn_hidden=36", "model.position=none", ONE],
    "written out": [
        "model.n_kv_head=1",
        "model.attention_sinks=true",
        "model.attention=manual",
        "model.position=none",
        ONE,
    ],
    "flash": ["model.qk_norm=true", "model.attention=flash", "model.rope_scaling=ntk", ONE],
    "latent": ["model.kv_lora_rank=20", "model.head_width=12", "model.rope_head_width=4"],
    "routed": ROUTED,
    # As in Gemma: local layers and a global one, four norms in a block, bounds of scores and logits.
    "local": [
        *("model.window=6", "model.global_every=2", "model.rope_base_local=100", "model.norm_position=both"),
        *("model.qk_norm=true", "model.n_kv_head=2", "model.head_width=10", "model.logit_softcap=3"),
        *(
            "model.attention_softcap=2",
            "model.attention=manual",
            "model.scale_embedding=true",
            "model.attention_sinks=true",
        ),
    ],
    "tied stages": [*TIED, FOUR],
    "untied stages": [*QUERIES, FOUR],
    "biased stages": [*EXPERTS, *BIASED, FOUR],
    # Its output matrix costs more than a block, so that the last of four stages has nothing else.
    "large vocabulary": [*MOE, FOUR, "model.vocab_size=2048"],
    "bf16": [*QUERIES, FOUR, "precision=bf16"],
    "bf16 experts": [*EXPERTS, "precision=bf16"],
}
MODELS = {name: [*PADDED, *words] for name, words in LAYERS.items()}

EP, FSDP_EP, HSDP = "parallel=ep parallel.ep=2", "parallel=fsdp_ep parallel.ep=2", "parallel=hsdp parallel.dp_shard=2"
EACH, KEPT = "parallel.reduce_each_micro_batch=true", "parallel.reshard_after_forward=false"
TP, RING = "parallel=tp", "parallel.cp_method=ring"
ON_HOST = "parallel=fsdp parallel.cpu_offload=true"


def pp(schedule: str, words: str = "", ranks: int = 2) -> str:
    """Overrides of a pipeline with DDP, or what ``words`` say."""
    return f"parallel=ddp {words} parallel.pp={ranks} parallel.schedule={schedule}"


CASES = {
    "2, data and sequences": [
        *(
            Case(f"parallel={strategy}", model, accumulation)
            for strategy in ("ddp", "zero1", "fsdp")
            for model, accumulation in (("tied", 4), ("queries", 1), ("experts", 1))
        ),
        Case(ON_HOST, "queries", 1),
        *(Case("parallel=cp", model) for model in ("tied", "queries", "written out", "flash", "routed")),
        *(Case(f"parallel=cp {RING}", model) for model in ("queries", "written out", "flash")),
        *(Case(f"parallel=fsdp_cp {method}", "queries", 1) for method in ("", RING)),
        *(Case(f"parallel=fsdp_cp {method}", "latent", 1) for method in ("", RING)),
        *(Case(EP, model, count) for model, count in (("experts", 1), ("places", 2), ("even rows", 1))),
        *(Case(FSDP_EP, model, count) for model, count in (("experts", 2), ("places", 1), ("even rows", 4))),
        *(Case(words, "bf16") for words in ("parallel=cp", f"parallel=cp {RING}")),
        Case("parallel=cp", "local"),
        Case(FSDP_EP, "bf16 experts", 1),
    ],
    "2, matrices and layers": [
        *(Case(TP, model, 1) for model in ("queries", "post", "places")),
        *(Case(TP, model, 2) for model in ("tied", "experts", "even rows")),
        Case(f"{TP} parallel.sequence_parallel=false", "experts", 1),
        Case(f"{TP} recompute=full compile=default", "one layer", 1),
        Case(TP, "local", 1),
        *(Case(pp("gpipe"), model, 4) for model in ("local", "latent")),
        Case(pp("gpipe"), "tied stages", 4),
        Case(pp("zbv"), "tied stages", 4),
        Case(pp("dualpipev"), "tied stages", 4),
        Case(pp("zbv"), "biased stages", 4),
        Case(pp("1f1b", "recompute=full"), "biased stages", 4),
        Case(pp("interleaved", "recompute=selective"), "biased stages", 4),
        *(Case(words, "bf16") for words in (TP, "parallel=fsdp_tp")),
    ],
    "4, data and sequences": [
        Case(f"{HSDP} {EACH}", "queries", 4),
        Case(f"parallel=fsdp {EACH}", "tied", 4),
        # Both blocks in one unit, which a recomputed block must not take for its own.
        Case("parallel=fsdp parallel.fsdp_min_num_params=1000000 recompute=full", "queries", 4),
        Case(f"parallel=cp parallel.cp=4 {RING}", "queries"),
        Case("parallel=cp parallel.cp=4", "routed"),
        Case("parallel=fsdp_cp parallel.dp_shard=1", "queries"),
        Case("parallel=cp parallel.ep=2", "routed"),
        Case("parallel=fsdp_cp parallel.ep=2", "routed"),
        Case("parallel=fsdp_ep parallel.ep=4", "experts"),
        Case(FSDP_EP, "few experts"),  # each expert sharded inside
    ],
    "4, matrices": [
        Case(f"{TP} parallel.cp=2 {RING}", "tied"),
        Case("parallel=fsdp_tp parallel.cp=2", "routed"),
        Case(TP, "queries", 1),
        Case(f"parallel=fsdp_tp {KEPT} recompute=selective", "queries", 1),
        Case("parallel=fsdp_tp parallel.dp_shard=1", "experts"),
        Case(f"{EP} parallel.tp=2", "places", 1),
    ],
    "4, layers": [
        Case(f"parallel=pp parallel.cp=2 {RING}", "tied"),
        Case("parallel=pp_fsdp parallel.cp=2", "routed"),
        Case(pp("1f1b", ranks=4), "large vocabulary", 4),
        Case(pp("interleaved", "parallel=fsdp"), "untied stages", 4),
        Case(pp("zbv", TP), "tied stages", 4),
        Case(pp("dualpipev", f"parallel=fsdp {KEPT} parallel.ep=2"), "biased stages", 4),
        *(Case(words, "bf16", 4) for words in (pp("1f1b", ranks=4), pp("zbv", f"parallel=fsdp {KEPT}"))),
    ],
    "8": [Case("parallel=3d", "tied", 2)],
}
"""Ranks, and what they share: every strategy with each kind of model. On four ranks, what no chain below has."""


def prove(rank: int, size: int, folder: Path, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """What the ranks learn and evaluate in each case, and what they begin with and hold in the first of each engine."""
    found, known = [], set[str]()
    # What the compiler sees is what is asked here, not the code that it makes in half a minute.
    with mock.patch("torch.compile", partial(torch.compile, backend="aot_eager")):
        for number, case in enumerate(cases):
            run = start_case(rank, size, folder / str(number), case, MODELS[case.model])
            if case.model.startswith("bf16"):
                found.append({"losses": [step(run)[0] for _ in range(STEPS)]})
                continue
            module, is_new = run.engine.module, case.words not in known or size == 1
            known.add(case.words)
            begun = (whole(run, module.state_dict()), whole(run, dict(module.named_buffers()))) if is_new else None
            learned = learn(run)
            if not run.config.compiles:  # another graph, in as many seconds as that of the training
                learned["val"] = evaluated(run)
            if run.dims.pp > 1 or size == 1:
                learned["after"] = step(run)  # not disturbed by an evaluation
            held = held_as_planned(run) if is_new and not shares_gradients(case) else ""
            seen = {"begun": begun, "held": held, "on host": is_on_host(module), "plain": isinstance(module, GPT)}
            found.append(learned | seen)
    return found if rank == 0 else []


def shares_gradients(case: Case) -> bool:
    """True if the gradient of a second tied embedding stays in memory, as a part of what FSDP has reduced with it."""
    return "parallel.pp" in case.words and KEPT in case.words


def is_on_host(module: nn.Module) -> bool:
    """True if FSDP keeps every parameter of a model on the host between the steps."""
    groups = [m._get_fsdp_state()._fsdp_param_group for m in module.modules() if isinstance(m, FSDPModule)]
    held = [p.offload_to_cpu for group in groups if group is not None for p in group.fsdp_params]
    return bool(held) and all(held)


Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Results of one process for each model, in one micro-batch a step."""
    cases = [Case("parallel=ddp", model, 1) for model in MODELS]
    found = run_distributed(prove, 1, tmp_path_factory.mktemp("alone") / "runs", cases)[0]
    return dict(zip(MODELS, found, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_every_engine_begins_learns_and_holds_what_it_should(name: str, alone: Found, tmp_path: Path) -> None:
    cases = CASES[name]
    found = run_distributed(prove, int(name[0]), tmp_path / "runs", cases, timeout_s=500)[0]
    wrong = []
    for case, learned in zip(cases, found, strict=True):
        try:
            assert_learned(case, learned, alone[case.model])
        except AssertionError as error:
            wrong.append(f"{case}: {error}")
    assert not wrong, "\n".join(wrong)
    if Case(ON_HOST, "queries", 1) in cases:
        of = dict(zip(cases, found, strict=True))
        assert_offload_changes_no_bit(of[Case("parallel=fsdp", "queries", 1)], of[Case(ON_HOST, "queries", 1)])


def assert_learned(case: Case, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """First bits, losses, gradients, figures and weights, and the loss of an evaluation, are those of one process."""
    if case.model.startswith("bf16"):
        assert found["losses"] == pytest.approx(expected["losses"], rel=2e-3)
        return
    assert_same(found, expected)
    assert found.get("val", expected["val"]) == pytest.approx(expected["val"], rel=1e-6)
    assert found.get("after", expected["after"]) == pytest.approx(expected["after"], rel=2e-5)
    assert (found["held"], found["on host"]) == ("", case.words == ON_HOST)
    assert expected["plain"] and not (found["plain"] and case.words == "parallel=ddp"), "one rank needs no wrapper"
    if found["begun"] is not None:
        assert_begun(found, expected)


def assert_begun(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Parameters, buffers and tables have the bits of a model that one process draws whole."""
    for mine, theirs in zip(found["begun"], expected["begun"], strict=True):
        assert mine.keys() == theirs.keys()
        changed = [name for name, tensor in theirs.items() if not torch.equal(mine[name], tensor)]
        assert [name for name in changed if not name.endswith("counts")] == []  # DDP's warm-up counts, too


def assert_offload_changes_no_bit(plain: dict[str, Any], host: dict[str, Any]) -> None:
    for what in ("losses", "norms"):
        assert host[what] == plain[what]
    for what in ("gradients", "weights"):
        for name, tensor in plain[what].items():
            assert torch.equal(host[what][name], tensor), f"{what} of {name}"


def test_one_process_begins_with_the_values_of_its_names(alone: Found) -> None:
    for name, found in alone.items():
        if name.startswith("bf16"):
            continue
        config = compose(*MODELS[name])
        model = GPT(config.model)
        initialize(model, config.seed)
        assert_begun(found, {"begun": (model.state_dict(), dict(model.named_buffers()))})
        for key in ("token_embedding.weight", "blocks.0.attention.query.weight"):
            assert torch.equal(found["begun"][0][key], drawn_whole(key, found["begun"][0][key], config)), (
                f"{name}: {key}"
            )


def drawn_whole(name: str, tensor: Tensor, config: TrainConfig) -> Tensor:
    """A matrix of the model by the rule that is written down: one generator for each name, padding of zeros."""
    seed = int.from_bytes(hashlib.sha256(f"{config.seed}:{name}".encode()).digest()[:8], "big") >> 1
    rows = config.model.vocab_size if name == "token_embedding.weight" else len(tensor)
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(rows, *tensor.shape[1:]).normal_(std=0.02, generator=generator)
    return F.pad(values, (0, 0, 0, len(tensor) - rows))


# Checkpoints: each engine goes on under itself bit for bit, and the next one goes on under its checkpoint.


UNEVEN = ["model.ffn_hidden=42", "model.expert_matmul=loop"]
"""Shared experts of halves of 21 rows, which two ranks cut into 11 and 10."""
CHAINS: dict[str, Chain] = {
    "ranks with the same layers": (
        [*PADDED, *EXPERTS, *BIASED, *UNEVEN, ONE],
        [
            *("parallel=ddp", "parallel=zero1", HSDP, ON_HOST, TP),
            *("parallel=cp", f"parallel=fsdp_cp {RING}", EP, f"{FSDP_EP} parallel.tp=2"),
            *(f"{HSDP} parallel.ep=2", FSDP_EP, "parallel=fsdp_tp"),
        ],
    ),
    "pipelines": (
        [*PADDED, *TIED, FOUR],
        [
            *("parallel=fsdp", pp("interleaved", TP), pp("1f1b", ranks=4)),
            *(pp("zbv", f"parallel=fsdp {KEPT}"), "parallel=fsdp"),
        ],
    ),
}


ONCE = ("parallel=ddp", f"{FSDP_EP} parallel.tp=2", f"{HSDP} parallel.ep=2", *CHAINS["pipelines"][1])
"""Go on under themselves in tests/training/test_resume.py, under fewer kinds of sharding, or with dropout."""


def test_checkpoints_go_on_under_the_same_and_another_engine_and_are_read_by_one_process(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    found = run_distributed(follow, 4, folder, CHAINS, ONCE, timeout_s=400)[0]
    for name, (words, chain) in CHAINS.items():
        assert_followed(chain, found[name], ONCE)
        model = read_weights(compose(*words, *chain[-1].split()), find_checkpoint(RunFolder(folder / name)))
        read, weights = dict(model.named_parameters()), found[name].weights
        assert read.keys() == weights.keys()
        assert [key for key, tensor in weights.items() if not torch.equal(read[key], tensor)] == []


NOISY = [TP, *(pp(schedule, ranks=4 if schedule == "1f1b" else 2) for schedule in ("1f1b", "interleaved"))]
NOISY.append(pp("zbv", f"parallel=fsdp {KEPT}"))


def resume_with_dropout(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Steps to come and those of a resumed run, with dropout; how often a pipeline tells that it lives; a draw."""
    words = [*PADDED, *TIED, FOUR, "model.dropout=0.3", "optim.max_micro_batch=4"]
    found: dict[str, Any] = {}
    for number, way in enumerate(NOISY):
        kind = [*words, *way.split()]
        run = start(rank, size, folder / str(number), *kind)
        step(run)
        save(run)
        to_come = [step(run) for _ in range(2)]
        again = start(rank, size, folder / str(number), *kind)
        found[way] = (to_come, [step(again) for _ in range(2)])
        if way == pp("interleaved"):
            calls: list[None] = []
            batch = run.samples.batch("train", list(range(run.batch.per_rank)))
            run.engine.backward(*batch, lambda calls=calls: calls.append(None))
            found["calls"] = len(calls)
    return found | {"drawn": torch.get_rng_state().sum().item()}


def test_dropout_goes_on_where_it_was_and_each_rank_has_its_own(tmp_path: Path) -> None:
    found = run_distributed(resume_with_dropout, 4, tmp_path / "runs", timeout_s=300)
    assert len({of_rank["drawn"] for of_rank in found}) > 1
    for of_rank in found:
        assert all(of_rank[way][0] == of_rank[way][1] for way in NOISY), "bit for bit"
        assert of_rank["calls"] == 2 * 2  # two stages, two micro-batches
