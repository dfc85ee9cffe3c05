"""Adapters of this project and of peft, read by each other: the same losses and logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as TheirConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM

from gpt import checkpoint as folders
from gpt import export
from gpt.config import LoraConfig, ModelConfig
from gpt.config.optim import lr_at
from gpt.conversion import choose_adapter
from gpt.conversion.source import differences, find_source
from gpt.conversion.state_dict import load_model, merge_adapters, to_hf
from gpt.export import write_configs, write_weights
from gpt.model.gpt import GPT, initialize
from launch.errors import ConfigError
from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from tests.conversion.test_transformers_both_ways import assert_equal_logits, gpt2, imported, llama, mixtral, shaken
from tests.support.checkpoints import differing, read_weights
from tests.support.commands import kill_all, run, start_fork, wait_for
from tests.support.distributed import run_distributed
from tests.support.learning import BATCH, start, step
from tests.support.small_models import LLAMA, small

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, tuple[Callable[[], Any], list[str], list[str]]] = {
    "llama": (llama, ALL, ["query", "key", "value", "output", "gate", "up", "down"]),
    "llama, two": (llama, ["q_proj", "v_proj"], ["query", "value"]),
    "mixtral": (mixtral, ["k_proj", "o_proj"], ["key", "output"]),
    "gpt2": (gpt2, ["c_attn", "mlp.c_fc"], ["query", "key", "value", "up"]),
}
"""Model of transformers, modules that have an adapter there, and here."""


def with_adapter(base: Any, modules: list[str], **changes: Any) -> Any:
    """The model of peft with adapters that are not nothing, of rank 3 and alpha 12 unless changed."""
    torch.manual_seed(5)
    fan = {"fan_in_fan_out": base.config.model_type == "gpt2"}
    usual = {"r": 3, "lora_alpha": 12, "target_modules": modules}
    theirs = get_peft_model(base, TheirConfig(**{**usual, **fan, **changes}))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return theirs.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_peft_gives_the_same_logits(kind: str, tmp_path: Path) -> None:
    make, modules, targets = KINDS[kind]
    base = make()
    base.save_pretrained(tmp_path / "base")
    theirs = with_adapter(base, modules)
    theirs.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    ours = imported(tmp_path / "adapter")
    assert ours.config.lora == LoraConfig(rank=3, alpha=12.0, targets=targets)
    assert_equal_logits(ours, theirs)
    theirs.save_pretrained(tmp_path / "base")  # beside the base weights
    assert_equal_logits(imported(tmp_path / "base"), theirs)
    plain = ModelConfig(**{**vars(ours.config), "lora": LoraConfig()})
    assert_equal_logits(imported(tmp_path / "adapter", plain), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "targets", "ranks"),
    [
        ("gpt2", ["query", "key", "value", "up"], {"attn.c_attn": 9}),
        ("gpt2", ["query", "value"], {"attn.c_attn": 6}),
        ("gpt2", ["value"], {}),
        ("phi3", ["query", "key", "value", "gate", "up"], {"self_attn.qkv_proj": 9, "mlp.gate_up_proj": 6}),
        ("phi3", ["key", "up", "down"], {}),
    ],
)
def test_adapters_of_a_stack_are_read_back(
    kind: str, targets: list[str], ranks: dict[str, int], dtype: torch.dtype, tmp_path: Path
) -> None:
    base = gpt2() if kind == "gpt2" else phi3()
    base.save_pretrained(tmp_path / "base")
    ours = trained(tmp_path, imported(tmp_path / "base"), targets, dtype)
    config = json.loads((tmp_path / "adapters/adapter_config.json").read_text())
    assert (config["rank_pattern"], config["r"]) == (ranks, 3)
    assert config["alpha_pattern"] == {name: rank * 4.0 for name, rank in ranks.items()}
    again = imported(tmp_path / "adapters")
    assert again.config == ours.config
    expected = ours.state_dict()
    assert any(".lora_b" in name for name in expected)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    tokens_BT = torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens_BT), ours(tokens_BT), rtol=1e-6, atol=1e-6)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapters").eval()
    assert_equal_logits(again, theirs)
    plain = ModelConfig(**{**vars(ours.config), "lora": LoraConfig()})
    assert_equal_logits(imported(tmp_path / "adapters", plain), theirs)


def phi3() -> Any:
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 12}
    return shaken(Phi3ForCausalLM(Phi3Config(**sizes, **heads)))


def trained(folder: Path, base: GPT, targets: list[str], dtype: torch.dtype) -> GPT:
    """The model of ``base`` with other adapters than those of a start, which are exported into ``folder``/adapters."""
    lora = LoraConfig(rank=3, alpha=12.0, targets=targets)
    ours = GPT(ModelConfig(**{**vars(base.config), "lora": lora})).eval()
    torch.manual_seed(4)
    adapters = {
        name: (torch.randn(t.shape) * 0.1).to(dtype) for name, t in ours.state_dict().items() if ".lora_" in name
    }
    ours.load_state_dict({**base.state_dict(), **adapters})
    run = RunFolder(folder)
    run.record_event("initialised", attempt=1, kind="hf", path=str(folder / "base"), step=None, sha256={})
    export.write_peft(folder / "adapters", choose_adapter(ours.config), ours, run, {}, dtype)
    return ours


def test_an_adapter_that_mixes_the_matrices_of_a_stack_is_refused(tmp_path: Path) -> None:
    base = gpt2()
    base.save_pretrained(tmp_path)
    with_adapter(
        base, ["attn.c_attn"], rank_pattern={"attn.c_attn": 9}, alpha_pattern={"attn.c_attn": 36}
    ).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"h.0.attn.c_attn in .*, which mixes the ranks of") as refusal:
        imported(tmp_path)
    assert refusal.value.fix.startswith("merge_and_unload()")
    change(tmp_path, alpha_pattern={})
    with pytest.raises(ConfigError, match=r"'alpha_pattern': \{\}"):
        imported(tmp_path)


def written(folder: Path, ours: GPT) -> tuple[Path, Path]:
    """The base of a model in the files of transformers, and its adapters in those of peft."""
    adapter, base, adapters = choose_adapter(ours.config), folder / "base", folder / "adapters"
    base.mkdir()
    state = {name: tensor for name, tensor in ours.state_dict().items() if ".lora_" not in name}
    write_weights(base, to_hf(state, adapter, ours.config), torch.float32)
    write_configs(base, adapter, ours.config, torch.float32, None, {})
    export.write_peft(adapters, adapter, ours, RunFolder(folder), {}, torch.float32)
    return base, adapters


@pytest.mark.parametrize("targets", [["query", "value", "down"], ["query", "key", "value", "output", "up"]])
@pytest.mark.parametrize("parts", [{}, LLAMA], ids=["gpt2", "llama"])
def test_peft_loads_what_is_exported(parts: dict[str, Any], targets: list[str], tmp_path: Path) -> None:
    ours = GPT(small(**parts, lora=LoraConfig(rank=3, alpha=7.0, targets=targets))).eval()
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1 + (parameter.dim() == 1))
    base, adapters = written(tmp_path, ours)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters)
    assert_equal_logits(ours, theirs.eval())
    merged = tmp_path / "merged"
    merged.mkdir()
    adapter = choose_adapter(ours.config)
    state = merge_adapters(ours.state_dict(), ours.config.lora)
    write_weights(merged, to_hf(state, adapter, ours.config), torch.float32)
    write_configs(merged, adapter, ours.config, torch.float32, None, {})
    assert_equal_logits(ours, AutoModelForCausalLM.from_pretrained(merged).eval())
    assert all("lora" not in name for name in load_file(merged / "model.safetensors"))


WORDS = ["model=llama_124m", "model.n_layer=2", "model.n_embd=32", "model.n_head=4", "model.n_kv_head=2"]
WORDS += ["model.ffn_hidden=48", "model.block_size=16", "model.vocab_size=256", "model.vocab_multiple=1"]
WORDS += ["model.norm_eps=1e-6", "model.tie_embeddings=false"]
ADAPTER = ["model.lora.rank=3", "model.lora.alpha=12", "model.lora.targets=[query,value,gate,down]"]


def ten_steps(rank: int, size: int, folder: Path) -> tuple[list[float], list[float]]:
    """Losses of ten steps here, and of peft with torch's AdamW on the same tokens."""
    base, whole = folder / "base", f"optim.max_micro_batch={BATCH}"
    run = start(rank, size, folder / "run", *WORDS, *ADAPTER, f"init_from=hf:{base}", whole)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), base, is_trainable=True)
    trained, optim = [p for p in theirs.parameters() if p.requires_grad], run.config.optim
    assert len(trained) == 2 * 2 * 4
    betas = (optim.beta1, optim.beta2)
    optimizer = torch.optim.AdamW(trained, betas=betas, eps=optim.eps, weight_decay=optim.weight_decay)
    found: list[float] = []
    for number in range(1, 11):
        indices = torch.arange((number - 1) * BATCH, number * BATCH).numpy()
        tokens_BT, targets_BT = run.samples.batch("train", indices)
        logits_BTV = theirs(tokens_BT).logits
        loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, optim.grad_clip)
        optimizer.param_groups[0]["lr"] = lr_at(optim, number)
        optimizer.step()
        found.append(loss.item())
    return [step(run)[0] for _ in range(10)], found


def test_ten_steps_have_the_losses_of_peft(tmp_path: Path) -> None:
    base = llama(vocab_size=256, intermediate_size=48, max_position_embeddings=16)
    base.save_pretrained(tmp_path / "base")
    with_adapter(base, ["q_proj", "v_proj", "gate_proj", "down_proj"]).save_pretrained(tmp_path / "base")
    ours, theirs = run_distributed(ten_steps, 1, tmp_path)[0]
    assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)
    assert len({round(loss, 4) for loss in ours}) == 10


RUN = (*WORDS, *ADAPTER, "model.lora.dropout=0.1", "data.max_bytes=200000", "optim.global_batch=8", "eval.interval=0")
RUN += ("optim.max_micro_batch=2", "eval.sequences=4", "checkpoint.interval=5", "optim.warmup_steps=1000")


def test_a_killed_run_resumes_bit_for_bit_and_its_adapter_is_exported(tmp_path: Path) -> None:
    config = small(**LLAMA, n_kv_head=2, ffn_hidden=48, block_size=16, vocab_size=256, norm_eps=1e-6)
    first = GPT(config)
    initialize(first, 9)
    (tmp_path / "base").mkdir()
    adapter = choose_adapter(config)
    write_weights(tmp_path / "base", to_hf(first.state_dict(), adapter, config), torch.float32)
    write_configs(tmp_path / "base", adapter, config, torch.float32, None, {})
    words = ["nodes=2", "ranks_per_node=1", "parallel=fsdp", *RUN, "init_from=hf:base", "launch.report_files=[]"]
    killed = RunFolder(tmp_path / "killed")
    without_end = [*words, "optim.max_steps=1000", f"run_dir={killed.path}"]
    process = start_fork("launch", *without_end, cwd=tmp_path, log=tmp_path / "log")

    def is_beyond_a_checkpoint() -> bool:
        saved = folders.steps(killed.checkpoints)
        return bool(saved) and any(r["step"] >= saved[0] + 2 for r in read_records(killed.metrics(0)))

    wait_for(lambda: is_beyond_a_checkpoint() or process.poll() is not None, "two steps after a checkpoint")
    assert process.poll() is None, (tmp_path / "log").read_text()
    kill_all(process)
    made = max(r["step"] for rank in killed.metric_ranks() for r in read_records(killed.metrics(rank)))
    words.append(f"optim.max_steps={max(folders.steps(killed.checkpoints)[-1] + 6, made)}")
    for name in ("killed", "whole"):
        run("launch", *words, f"run_dir={tmp_path / name}", cwd=tmp_path)
    steps = folders.steps(killed.checkpoints)[-1]
    whole, resumed = (read_weights(tmp_path / name, steps, tmp_path) for name in ("whole", "killed"))
    assert differing(whole, resumed) == []
    moments = {name.split("/")[3] for name in whole if name.startswith("/optimizer/state/")}
    assert moments and all(".lora_" in name for name in moments)

    _, ours = load_model(killed.path)
    for kind in ("peft", "hf"):
        assert export.main([str(killed.path), "--format", kind, "--output", str(tmp_path / kind)]) == 0
    told = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert (told["base_model_name_or_path"], told["r"], told["lora_alpha"]) == (str(tmp_path / "base"), 3, 12.0)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert_same_logits(ours, AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval())
    assert_same_logits(ours, PeftModel.from_pretrained(base, tmp_path / "peft").eval())
    assert_same_logits(ours, imported(tmp_path / "peft"))
    assert_same_logits(ours, imported(killed.path))


def assert_same_logits(ours: GPT, theirs: Any) -> None:
    tokens_BT = torch.arange(32).view(2, 16)
    with torch.no_grad():
        found = theirs(tokens_BT)
        torch.testing.assert_close(ours(tokens_BT), getattr(found, "logits", found), rtol=1e-5, atol=1e-5)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """The folder of an adapter, beside its base weights."""
    base = llama()
    base.save_pretrained(tmp_path / "there")
    with_adapter(base, ["q_proj", "v_proj"]).save_pretrained(tmp_path / "there")
    return tmp_path / "there"


def change(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_rslora": True}, "use_rslora=True"),
        ({"rank_pattern": {"q_proj": 5}}, "rank_pattern"),
        ({"peft_type": "IA3"}, "peft_type=IA3"),
        ({"r": None}, "adapter_config.json cannot be used"),
    ],
)
def test_another_kind_of_adapter_is_refused(changes: dict[str, Any], said: str, adapter: Path) -> None:
    change(adapter, **changes)
    with pytest.raises(ConfigError) as refusal:
        find_source(str(adapter))
    assert said in refusal.value.found


def test_an_adapter_without_base_or_with_other_tensors_is_refused(adapter: Path, tmp_path: Path) -> None:
    change(adapter, base_model_name_or_path="org/model")
    (adapter / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="an adapter for org/model") as refusal:
        find_source(str(adapter))
    assert refusal.value.fix == f"hf download org/model --local-dir {adapter}"
    (tmp_path / "config.json").rename(adapter / "config.json")
    with_adapter(llama(), ["q_proj"], layers_to_transform=[1]).save_pretrained(adapter)
    with pytest.raises(ConfigError, match=r"layers.0.self_attn.q_proj.lora_A.weight"):
        find_source(str(adapter))


def test_another_rank_is_refused_with_the_keys_to_type(adapter: Path) -> None:
    source = find_source(str(adapter))
    mine = ModelConfig(**{**vars(source.model), "lora": LoraConfig(rank=8)})
    typed = ["model.lora.rank=3", "model.lora.alpha=12.0", "model.lora.targets=[query,value]"]
    assert differences(mine, source.model) == typed
    assert differences(source.model, source.model) == []
