"""Recomputing, compiling and deterministic mode: what is learned stays the same, bit for bit where that is promised."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import compilation_time_metrics
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import gpt.train
from gpt.accounting import forward_flops, recomputed_flops_per_token, training_flops_per_token, utilization
from gpt.config import (
    AttentionBackend,
    CompileMode,
    Device,
    Ffn,
    ModelConfig,
    ParallelConfig,
    Recompute,
    TrainConfig,
)
from gpt.model.gpt import GPT, initial_weights
from gpt.model.layers import cross_entropy
from gpt.parallel.distributed import World, open_world
from gpt.parallel.engine import RunLayout
from gpt.parallel.modules import compile_block, compile_loss, prepare_blocks
from gpt.topology import Batch, ParallelDims
from gpt.training.diagnostics import CompileTime
from gpt.training.execution import (
    FIRST,
    MEASURED,
    StepTimeouts,
    open_compile_cache,
    set_matmul_precision,
    settle_compile,
    state,
    step_timeout,
)
from gpt.training.run import Request
from launch.errors import ConfigError
from launch.runs.environment import COMPILE_CACHE, describe_environment, missing_for_compiling
from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from launch.worker import Run as Rank
from tests.support.commands import TINY, run
from tests.support.composing import config_from
from tests.support.distributed import run_distributed
from tests.support.learning import control_group, start
from tests.support.small_models import LLAMA, random_tokens, small

MIXTURE = LLAMA | {"ffn": Ffn.moe, "n_expert": 4, "n_expert_per_token": 2}


def gradients(
    model: ModelConfig, recompute: Recompute, compile_mode: str = "none", precision: torch.dtype = torch.float32
) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients by name, and the FLOPs of the backward pass."""
    torch.manual_seed(0)
    gpt = GPT(model)
    names = list(gpt.state_dict())
    prepare_blocks(gpt, TrainConfig(recompute=recompute, compile=CompileMode[compile_mode], model=model))
    assert list(gpt.state_dict()) == names, "a checkpoint is the same whoever wrote it"
    tokens_BT = random_tokens(model, 3)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
        logits_BTV = gpt(tokens_BT)
    loss = F.cross_entropy(logits_BTV.float().flatten(0, 1), tokens_BT.flatten())
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return {name: p.grad for name, p in gpt.named_parameters() if p.grad is not None}, counter.get_total_flops()


@pytest.mark.parametrize(
    ("parts", "attention", "dropout", "precision"),
    [
        ({}, AttentionBackend.manual, 0.3, torch.float32),
        ({}, AttentionBackend.sdpa, 0.0, torch.bfloat16),
        (LLAMA, AttentionBackend.sdpa, 0.3, torch.float32),
        (LLAMA, AttentionBackend.manual, 0.0, torch.bfloat16),
        (MIXTURE, AttentionBackend.flash, 0.3, torch.bfloat16),
        (MIXTURE, AttentionBackend.flash, 0.0, torch.float32),
    ],
)
def test_recomputing_changes_no_bit_of_the_gradients(
    parts: dict[str, Any], attention: AttentionBackend, dropout: float, precision: torch.dtype
) -> None:
    model = small(**parts, dropout=dropout, attention=attention)
    kept, flops = gradients(model, Recompute.none, precision=precision)
    selective, flops_selective = gradients(model, Recompute.selective, precision=precision)
    full, flops_full = gradients(model, Recompute.full, precision=precision)
    for repeated in (selective, full):
        torch.testing.assert_close(repeated, kept, rtol=0, atol=0)
    assert flops <= flops_selective < flops_full
    if attention is AttentionBackend.manual or not dropout:
        assert flops_selective == flops, "no matrix product is computed again"


def test_compiled_blocks_compute_the_same() -> None:
    model = small(**LLAMA, n_layer=1)
    eager, _ = gradients(model, Recompute.none)
    clock, began = CompileTime(compiles=True), time.perf_counter()
    before = sum(compilation_time_metrics.get("_compile.compile_inner", []))
    compiled, _ = gradients(model, Recompute.selective, compile_mode="default")
    told, took = clock.take(), time.perf_counter() - began
    own_s = sum(compilation_time_metrics["_compile.compile_inner"]) - before  # of torch, without the backward pass
    assert told is not None and 0 < 0.9 * own_s < told < took
    assert clock.take() is None, "nothing more was compiled"
    clock.close()
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(compiled[name], grad) for name, grad in eager.items()), "it was compiled"


@pytest.mark.parametrize("parts", [{}, LLAMA | {"tie_embeddings": False}], ids=["gpt2", "llama"])
def test_the_last_norm_and_the_output_matrix_are_compiled_as_well_as_the_blocks(parts: dict[str, Any]) -> None:
    model, graphs = small(**parts, n_layer=2), list[tuple[set[tuple[int, ...]], set[str]]]()

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        operations = {getattr(node.target, "__name__", "") for node in graph.graph.nodes}
        graphs.append(({tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)}, operations))
        return graph.forward

    torch._dynamo.reset()
    with mock.patch.object(torch, "compile", partial(torch.compile, backend=keep)):
        compiled = GPT(model)
        prepare_blocks(compiled, TrainConfig(compile=CompileMode["default"], model=model))
    logits_BTV = compiled(random_tokens(model, 3))
    plain = GPT(model)
    plain.load_state_dict(compiled.state_dict())
    torch.testing.assert_close(logits_BTV, plain(random_tokens(model, 3)), rtol=1e-5, atol=1e-6)
    block, norm, head = graphs
    assert "scaled_dot_product_attention" in block[1], "one for all blocks"
    assert (model.n_embd,) in norm[0] and not {"linear", "matmul", "autograd_function_apply"} & norm[1]
    assert (model.padded_vocab, model.n_embd) in head[0] and "autograd_function_apply" in head[1]


@pytest.mark.parametrize("multiple", [1, 64])
def test_a_compiled_loss_keeps_no_logits_in_fp32(multiple: int) -> None:
    config = TrainConfig(compile=CompileMode["default"], model=small(vocab_size=300, vocab_multiple=multiple))
    generator = torch.Generator().manual_seed(0)
    logits_BTV = torch.randn(2, 8, config.model.padded_vocab, generator=generator).bfloat16().requires_grad_()
    targets_BT = torch.randint(300, (2, 8), generator=generator)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compiled = compile_loss(config)(logits_BTV, targets_BT)
    assert kept and not [t for t in kept if t.dtype is torch.float32 and t.numel() >= logits_BTV.numel()]
    expected = cross_entropy(logits_BTV[..., :300], targets_BT)
    torch.testing.assert_close(compiled, expected, rtol=1e-6, atol=0)
    (grad,), (expected_grad,) = (torch.autograd.grad(loss, logits_BTV) for loss in (compiled, expected))
    torch.testing.assert_close(grad, expected_grad, rtol=2**-7, atol=1e-9)
    assert not grad[..., 300:].any()


def step_of_padded_logits(config: TrainConfig, seen: list[str]) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Loss and gradients of a micro-batch; adds to ``seen`` the operations whose results are as large as its logits."""
    model, batch = config.model, Batch(3, 1, 3, 3, 1)
    logits = batch.micro * model.block_size * model.vocab_size

    def note(name: str, out: Any) -> None:
        seen.extend(name for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.numel() >= logits)

    class Trace(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            note(str(func), out)
            return out

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        for node in graph.graph.nodes:
            note(str(node.target), node.meta.get("val"))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    with torch.device("meta"):
        gpt_model = GPT(model)
    with mock.patch.object(torch, "compile", partial(torch.compile, backend=backend)):
        layout = RunLayout(
            config, World(0, 1, 0, 1, 0, torch.device("cpu"), mock.MagicMock()), ParallelDims("ddp", 1, 1), batch
        )
        engine = gpt.train.parallelize(gpt_model, initial_weights(model, 1), layout)
    tokens_BT = random_tokens(model, batch.micro)
    with nullcontext() if config.compiles else Trace():  # within a mode, dynamo compiles nothing
        loss = engine.loss(tokens_BT, tokens_BT)
    with Trace():
        loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in engine.module.named_parameters()}


@pytest.mark.parametrize("mode", ["none", "default"])
def test_the_gradient_of_padded_logits_is_never_copied(mode: str) -> None:
    """An earlier slice of the logits took a backward pass of two more tensors of their size."""
    found = {}
    for multiple in (1, 64):
        model = small(vocab_size=300, vocab_multiple=multiple, n_layer=1)
        config = replace(config_from(["precision=fp32", f"compile={mode}"]), model=model)
        seen: list[str] = []
        found[multiple] = step_of_padded_logits(config, seen)
        parts = {part for name in seen for part in name.split(".")}
        assert {"_log_softmax", "onednn_linear"} <= parts, "the loss and the output matrix"
        assert not {"slice_backward", "constant_pad_nd", "slice_scatter"} & parts
    (loss, grads), (padded_loss, padded_grads) = found.values()
    torch.testing.assert_close(padded_loss, loss, rtol=1e-6, atol=0)
    for name, grad in grads.items():
        padded = padded_grads[name]
        assert grad is not None and padded is not None
        torch.testing.assert_close(padded[: len(grad)], grad, rtol=1e-4, atol=1e-7)
        assert not padded[len(grad) :].any()


@pytest.mark.parametrize("tf32", [True, False])
def test_products_in_fp32_are_rounded_to_tf32_where_the_run_has_settled_on_it(tf32: bool) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        set_matmul_precision(TrainConfig(tf32=tf32, model=small()))
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        assert state()["tf32"] is torch.backends.cuda.matmul.allow_tf32 is tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_without_a_compiler_on_some_nodes_nothing_is_compiled_or_the_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    default, none = CompileMode["default"], CompileMode["none"]
    automatic, typed = (TrainConfig(compile=CompileMode[name], model=small()) for name in ("auto", "default"))
    assert settle_compile(automatic, default, 0) is settle_compile(typed, default, 0) is default and not caplog.text
    assert settle_compile(automatic, default, 8) is none
    assert "8 ranks on nodes without a C compiler or Python.h: nothing is compiled" in caplog.text
    with pytest.raises(ConfigError, match="found: compile=default with 1 rank on nodes without"):
        settle_compile(typed, default, 1)
    compiler = tmp_path / "mine"
    compiler.touch(mode=0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.delenv("CC", raising=False)
    assert missing_for_compiling()
    monkeypatch.setenv("CC", str(compiler))
    assert not missing_for_compiling()
    (tmp_path / "Python.h").unlink()
    assert missing_for_compiling()


def test_weights_that_are_no_numbers_are_never_saved(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    words = (*TINY, "optim.max_steps=6", "checkpoint.interval=3", "optim.warmup_steps=0", "optim.lr=1e35")
    text = run("gpt.train", *words, f"run_dir={folder.path}", cwd=tmp_path, status=1)
    assert "FloatingPointError: found: steps 2 to 6: a loss or gradients" in text and "no checkpoint" in text
    assert "batches 2 to 6 (samples 8 to 47)" in text and "type next: optim.lr=" in text
    assert not folder.checkpoints.exists(), "none while steps are skipped"
    records = read_records(folder.metrics(0))
    assert [("grad_norm" in r, r.get("skipped_steps")) for r in records[:3]] == [(True, None), (False, 1), (False, 2)]
    skipped = [e for e in folder.read_events() if e["event"] == "step_skipped"]
    assert [e["step"] for e in skipped] == [2, 3, 4, 5, 6] and skipped[0]["samples"] == [[8, 15]]


MANUAL = {"attention": AttentionBackend.manual}  # torch's counter knows no attention kernel of the CPU


@pytest.mark.parametrize(
    "parts",
    [MANUAL | {"dropout": 0.1}, MANUAL | LLAMA | {"n_kv_head": 2}],
    ids=["dropout", "grouped"],
)
def test_recomputed_flops_are_those_that_torch_counts(parts: dict) -> None:
    model = small(**parts)
    _, kept = gradients(model, Recompute.none, precision=torch.bfloat16)
    for recompute in (Recompute.selective, Recompute.full):
        _, repeated = gradients(model, recompute, precision=torch.bfloat16)
        tokens = 3 * model.block_size
        assert tokens * recomputed_flops_per_token(model, recompute) == repeated - kept
    flops = training_flops_per_token(model)
    used = utilization(flops, 100.0, 1e12, recomputed_flops_per_token(model, Recompute.full))
    assert used.hfu == pytest.approx(100.0 * (kept + forward_flops(model, 3).palm + repeated - kept) / tokens / 1e12)


def test_a_block_that_cannot_be_compiled_whole_ends_a_run_that_asks_for_that() -> None:
    class Breaking(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return 2 * x

    for whole in (False, True):
        torch._dynamo.reset()  # graphs are kept by the code of a function, whatever compiled it
        block = Breaking()
        config = TrainConfig(compile=CompileMode["default"], compile_fullgraph=whole, model=small())
        compile_block(block, config)
        with pytest.raises(torch._dynamo.exc.Unsupported) if whole else nullcontext():
            assert torch.equal(block(torch.ones(2)), torch.full((2,), 2.0))


def find_compile_cache(rank: int, size: int, folder: Path) -> tuple[str, str, str]:
    """Where torch's compiler keeps what it makes for a run, and where its record says so; how fp32 is rounded."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    os.environ.pop(COMPILE_CACHE)
    torch.set_float32_matmul_precision("medium")
    if rank == 0:
        assert cache_dir() == os.environ[COMPILE_CACHE], "it names its own folder as soon as it is imported"
    with mock.patch.object(torch, "compile", partial(torch.compile, backend="eager")):
        start(rank, size, folder / "run", f"output_dir={folder}", "compile=default")
    told = str(describe_environment().get(COMPILE_CACHE))
    return cache_dir(), told, torch.get_float32_matmul_precision()


def test_what_is_compiled_lies_where_a_later_attempt_finds_it(tmp_path: Path) -> None:
    expected = str(tmp_path / ".cache" / "compiled")
    assert run_distributed(find_compile_cache, 2, tmp_path) == [(expected, expected, "highest")] * 2


def compile_on_nodes(rank: int, size: int, folder: Path) -> tuple[Path, set[str], set[str]]:
    """The folder of a rank alone on its node, its files at the start, and after a save of the first rank."""
    os.environ.pop(COMPILE_CACHE)
    world = World(rank, size, 0, 1, rank, torch.device("cpu"), control_group())
    config = config_from([*TINY, f"output_dir={folder}", f"data.cache_dir={folder}", "compile=default", "device=cpu"])
    with (
        mock.patch("torch._inductor.runtime.cache_dir_utils.default_cache_dir", lambda: str(folder / f"disk{rank}")),
        mock.patch.object(torch, "compile", partial(torch.compile, backend="eager")),
    ):
        run = gpt.train.build(config, RunFolder(folder / "run"), world, 1, Rank())
    own = Path(os.environ[COMPILE_CACHE])
    before = {path.name for path in own.rglob("*.so")}
    if rank == 0:
        (own / "ab").mkdir(exist_ok=True)
        (own / "ab" / "new.so").write_bytes(b"kernel")
        (own / "ab" / "half.tmp").touch()
    assert run.compiled is not None
    run.compiled.share()
    for thread in threading.enumerate():
        if thread.name.endswith("(copy_files)"):
            thread.join()
    run.world.gather(None)
    return own, before, {str(path.relative_to(folder)) for path in (folder / ".cache").rglob("*.*") if path.is_file()}


def test_nodes_compile_in_a_folder_of_their_own_and_share_it_at_a_save(tmp_path: Path) -> None:
    shared = tmp_path / ".cache" / "compiled"
    (shared / "cd").mkdir(parents=True)
    (shared / "cd" / "old.so").write_bytes(b"kernel")
    found = run_distributed(compile_on_nodes, 2, tmp_path)
    assert len({own for own, _, _ in found}) == 2
    for rank, (own, before, after) in enumerate(found):
        assert own.is_relative_to(tmp_path / f"disk{rank}") and before == {"old.so"}
        assert after == {".cache/compiled/cd/old.so", ".cache/compiled/ab/new.so"}
    assert run_distributed(compile_on_nodes, 2, tmp_path)[1][1] == {"old.so", "new.so"}, "the next attempt has both"


def test_a_filesystem_without_locks_keeps_nothing_that_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(COMPILE_CACHE, "theirs")
    assert open_compile_cache(tmp_path / "made") is None and not list(tmp_path.iterdir()), "the user has named one"
    monkeypatch.delenv(COMPILE_CACHE)
    assert open_compile_cache(tmp_path / "made") == str(tmp_path / "made")
    (tmp_path / "file").touch()
    assert open_compile_cache(tmp_path / "file") is None, "it could not be written"
    refuses = mock.Mock(side_effect=OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)))  # as Lustre without flock
    monkeypatch.setattr(fcntl, "flock", refuses)
    assert open_compile_cache(tmp_path / "made") is None


class RanksMetError(Exception):
    """Ends a run when its ranks would agree on their folder."""


def test_a_run_on_hopper_or_later_asks_cudnn_for_attention_first(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_from(["checkpoint.asynchronous=false"])
    gpu = World(0, 1, 0, 1, 0, torch.device("cuda:0"), None)
    orders = []

    @contextmanager
    def open_world(*_: Any) -> Iterator[World]:
        yield gpu

    def agree(*_: Any) -> None:
        orders.append(torch._C._get_sdp_priority_order())
        raise RanksMetError

    monkeypatch.setattr(gpt.train, "open_world", open_world)
    monkeypatch.setattr(gpt.train, "agree_on_folder", agree)
    before = torch._C._get_sdp_priority_order()
    for capability in ((8, 0), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        with pytest.raises(RanksMetError):
            gpt.train.run_ranks(Request(config, None), Rank())
    names = [SDPBackend(number).name for number in orders[1]]
    assert orders[0] == before and orders[1] == orders[2]
    assert names[:4] == ["CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"]
    assert torch._C._get_sdp_priority_order() == before


# Timeouts of collectives: cut once the first steps have shown how long one takes.


@pytest.mark.parametrize(
    ("slowest", "typed", "expected"),
    [(0.1, None, 100), (5.0, None, 100), (10.0, None, 200), (60.0, None, 600), (60.0, 30, 30)],
)
def test_the_timeout_follows_the_step_time(slowest: float, typed: int | None, expected: float) -> None:
    assert step_timeout(ParallelConfig(timeout_s=600, step_timeout_s=typed), slowest) == expected


def timeouts_of(world_size: int) -> list[timedelta]:
    """Timeouts of the default group, of one made later, and of the control group, after the first steps."""
    with open_world(Device.cpu, timeout_s=500) as world:
        made = dist.distributed_c10d._get_default_group()._get_sequence_number_for_group()
        assert made == 1, "the ranks have connected, so that a broken network fails before the model is built"
        other = dist.new_group(backend="gloo", timeout=timedelta(seconds=500))
        timeouts = StepTimeouts(world, ParallelConfig(timeout_s=500))
        cpu, found = torch.device("cpu"), []
        for step in range(FIRST + MEASURED):
            timeouts.after(1000.0 if step < FIRST else 6.0 + step)
            groups = (dist.distributed_c10d._get_default_group(), other, world.control)
            found.append([group._get_backend(cpu).options._timeout for group in groups])
        assert found[:-1] == [[timedelta(seconds=500)] * 3] * (FIRST + MEASURED - 1)
        return found[-1]


def test_groups_of_training_are_cut_after_the_first_steps_and_the_control_group_is_not() -> None:
    assert "RANK" not in os.environ
    most = 20 * (6.0 + FIRST + MEASURED - 1)
    assert timeouts_of(1) == [timedelta(seconds=most)] * 2 + [timedelta(seconds=500)]


def test_only_the_first_evaluation_has_the_timeout_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    found = list[float]()
    monkeypatch.setattr("gpt.training.execution.set_timeouts", lambda seconds, without: found.append(seconds))
    world = type("World", (), {"control": None})()
    timeouts = StepTimeouts(world, ParallelConfig(timeout_s=600, step_timeout_s=7))
    for _ in range(FIRST + MEASURED):
        timeouts.after(0.01)
    for _ in range(2):
        with timeouts.evaluation():
            found.append(0.0)
    assert found == [7, 600, 0, 7, 0]
    early, seen = StepTimeouts(world, ParallelConfig(timeout_s=600, step_timeout_s=7)), len(found)
    with early.evaluation():
        pass
    assert len(found) == seen, "the timeout of the start still holds"


def lose_a_peer(rank: int, world_size: int) -> str:
    """Rank 0 waits for rank 1, which sends nothing, under a cut timeout."""
    control = dist.new_group(backend="gloo", timeout=timedelta(seconds=600))
    world = type("World", (), {"control": control})()
    timeouts = StepTimeouts(world, ParallelConfig(timeout_s=600, step_timeout_s=1))
    for _ in range(FIRST + MEASURED):
        timeouts.after(0.01)
    message = ""
    if rank == 0:
        try:
            dist.all_reduce(torch.ones(1))
        except RuntimeError as error:
            message = str(error)
    dist.barrier(control)  # until then the other rank is there
    return message


def test_a_collective_that_is_stuck_fails_after_the_cut_timeout() -> None:
    """Under the 600 s of before this test would run into the limit of its processes."""
    message, _ = run_distributed(lose_a_peer, 2)
    assert "imed out" in message and "1000" in message, message
