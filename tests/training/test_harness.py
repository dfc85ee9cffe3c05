"""Tasks of lm-eval's harness during training: the figures of its own model for transformers, and training unchanged.

lm-eval brings scikit-learn, scipy and nltk, so the extra ``test`` is without it, and these tests are skipped there.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpt.config.data import TokenizerKind
from gpt.conversion.state_dict import find_checkpoint, read_weights
from gpt.data.corpus import check_tasks
from gpt.data.tokenizers import ByteTokenizer
from gpt.export import byte_letters, write_tokenizer
from gpt.metrics.writers import console_line
from gpt.topology.check_dims import check_parallel_dims
from gpt.train import train
from launch.errors import ConfigError
from launch.runs.event_files import record_scalars
from launch.runs.folder import RunFolder
from launch.runs.records import StepRecord, read_records
from launch.worker import Run as Rank
from tests.conversion.test_transformers_both_ways import exported
from tests.support.commands import run
from tests.support.composing import config_from
from tests.support.distributed import run_distributed
from tests.support.learning import TINY, start

DOCUMENTS = 7
"""As many as neither two ranks nor passes of four divide."""
NOUNS = ("cat", "dog", "ox", "hen", "sheep", "goat", "zebra", "lion", "yak", "bee")
LINES = [" ".join(random.Random(number).choices(NOUNS, k=5)) for number in range(3000)]
WORDS = [
    *("model.dropout=0.1", "model.tie_embeddings=false", "optim.max_steps=16", "model.block_size=48"),
    *("eval.interval=8", "optim.max_micro_batch=4", "optim.lr=1e-2"),
]
MODES = {
    1: {"ddp": "parallel=ddp chunked_loss=true", "plain": "parallel=ddp chunked_loss=true eval.tasks=[]"},
    2: {
        **{"fsdp": "parallel=fsdp", "plain": "parallel=fsdp eval.tasks=[]", "zero3": "parallel=zero3"},
        "averaged": "parallel=zero1 optim.optimizer=adamw_schedule_free optim.schedule=constant",
    },
}


def write_tasks(folder: Path) -> list[str]:
    """Write three tasks with documents of their own, one of each kind of request; return their files."""
    lines = LINES[: DOCUMENTS + 3]
    documents = [
        {
            "text": "\n".join(lines[: 1 + number % 5]),
            "question": "" if number == 4 else line[: len(line) // 2],
            "choices": [line[len(line) // 2 :], lines[number - 1], "xyz"],
            "answer": number % 3,
        }
        for number, line in enumerate(lines)
    ]
    for split, part in (("train", documents[DOCUMENTS:]), ("test", documents[:DOCUMENTS])):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    data = {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}
    shared = {"dataset_path": "json", "dataset_kwargs": {"data_files": data}, "test_split": "test"}
    tasks: dict[str, dict[str, Any]] = {
        "own_choice": {
            **{"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}"},
            **{"doc_to_target": "answer", "fewshot_split": "train", "num_fewshot": 1, "target_delimiter": ""},
            "metric_list": [{"metric": metric, "aggregation": "mean"} for metric in ("acc", "acc_norm")],
        },
        "own_text": {
            **{"output_type": "generate_until", "doc_to_text": "{{question}} ", "doc_to_target": "{{text}}"},
            "generation_kwargs": {"until": ["\n", "ox "], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "chrf", "aggregation": "chrf"}],
        },
        "own_pages": {
            **{"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"},
            "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
        },
    }
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **shared, **task}))
    return [str(folder / f"{name}.yaml") for name in tasks]


def trained(rank: int, size: int, folder: Path, modes: dict[str, str], words: list[str]) -> None:
    for name, mode in modes.items():
        made = start(rank, size, folder / name, *words, *mode.split())
        made.worker = Rank(rank, rank, size)
        made.worker.open_folder(made.folder.path, made.attempt)
        train(made)


def of_transformers(made: RunFolder, folder: Path, tasks: list[str]) -> dict[str, float]:
    """Figures of lm-eval's model for transformers, of the weights that the run has saved."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    config = config_from([*TINY, *WORDS])
    model = exported(read_weights(config, find_checkpoint(made, None)), folder)
    write_tokenizer(ByteTokenizer(), made, folder, 48)
    tokenizer = AutoTokenizer.from_pretrained(folder, eos_token=byte_letters()[ord("\n")])
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=48)
    found = lm_eval.simple_evaluate(model=theirs, tasks=tasks, bootstrap_iters=0)["results"]
    figures = {(task, name): value for task, metrics in found.items() for name, value in metrics.items()}
    return {f"{t}/{name.split(',')[0]}": value for (t, name), value in figures.items() if isinstance(value, float)}


@pytest.mark.parametrize("size", MODES)
def test_figures_are_those_of_lm_evals_own_model(size: int, tmp_path: Path) -> None:
    """Of a run by its command, of which ``gpt.evaluate`` has the same figures, and of runs on two ranks."""
    pytest.importorskip("lm_eval")
    tasks = write_tasks(tmp_path)
    (tmp_path / "text").write_text("\n".join(LINES))
    names = ",".join(tasks if size > 1 else [Path(task).name for task in tasks])
    words = [*WORDS, "data=text", f"data.path={tmp_path / 'text'}", f"eval.tasks=[{names}]"]
    if size > 1:
        imports = ("gpt.training.harness", "gpt.parallel.zero")
        run_distributed(trained, size, tmp_path / "runs", MODES[size], words, timeout_s=400, imports=imports)
    else:
        for name, mode in MODES[size].items():
            run("gpt.train", *TINY, *words, *mode.split(), "device=cpu", f"run_dir=runs/{name}", cwd=tmp_path)
    records = {name: read_records(RunFolder(tmp_path / "runs" / name).metrics(0)) for name in MODES[size]}
    for name in MODES[size]:
        if name == "plain":
            continue
        expected = of_transformers(RunFolder(tmp_path / "runs" / name), tmp_path / name, tasks)
        assert [step for step in records[name] if "tasks" in step] == records[name][7::8]
        last = records[name][-1]
        assert len(expected) == 5 and last["tasks"] == pytest.approx(expected, rel=2e-6), name
        assert last["tasks"]["own_text/chrf"] > 1, "the text that was generated has to matter"
        assert record_scalars(last).items() >= {f"eval/{figure}": v for figure, v in last["tasks"].items()}.items()
        assert f"own_choice/acc {last['tasks']['own_choice/acc']:.4g}" in console_line(StepRecord(**last), 16, 1.0)
    same = next(iter(MODES[size]))
    for figure in ("loss", "grad_norm", "val_loss"):
        assert [r.get(figure) for r in records[same]] == [r.get(figure) for r in records["plain"]]
    if size == 1:
        printed = run("gpt.evaluate", "runs/ddp", "--json", "--tasks", *tasks, cwd=tmp_path)
        assert json.loads(printed.splitlines()[-1])["tasks"] == pytest.approx(records["ddp"][-1]["tasks"], rel=1e-6)


def test_what_cannot_be_evaluated_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    file = tmp_path / "own.yaml"
    file.touch()
    check_tasks([str(file)], "byte")
    with pytest.raises(ConfigError, match=r"other\.yaml, which is no task"):
        check_tasks([str(file), str(file.with_stem("other"))], "byte")
    for kind in ("synthetic", TokenizerKind.char.name):
        with pytest.raises(ConfigError, match=f"with {kind} tokens"):
            check_tasks([str(file)], kind)
    for layout in ("parallel=tp", "parallel=pp", "parallel=cp"):
        with pytest.raises(ConfigError) as refusal:
            check_parallel_dims(config_from([*TINY, *layout.split(), f"eval.tasks=[{file}]"]), 2)
        assert "eval.tasks" in refusal.value.found
        assert f"{layout.replace('=', '.')}=1" in refusal.value.fix


def test_a_missing_package_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt.config.is_installed", lambda package: package != "lm_eval")
    with pytest.raises(ConfigError) as refusal:
        config_from([*TINY, "eval.tasks=[hellaswag]"]).validate()
    assert "lm_eval is not installed" in refusal.value.found and "eval" in refusal.value.fix
