"""Corpora: what is found, what is refused before a start, and token files that are written once and whole."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from gpt.config import DataConfig, Source
from gpt.data.corpus import check_size, describe, num_windows, prepare, split_tokens
from gpt.errors import ConfigError
from tests.distributed import run_distributed

CONFIGS = Path(__file__).parents[2] / "configs" / "data"


def text_config(path: Path | str, **changes: object) -> DataConfig:
    return DataConfig(source=Source.text, path=str(path), **changes)  # type: ignore[arg-type]


def test_stdlib_is_this_pythons_own_source() -> None:
    corpus = describe(DataConfig(source=Source.stdlib))
    paths = [file.path for file in corpus.files]
    library = Path(os.__file__).parent
    assert library / "argparse.py" in paths and library / "json" / "decoder.py" in paths
    names = [path.relative_to(library).as_posix() for path in paths]
    assert names == sorted(names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"site-packages", "dist-packages", "test", "tests", "__pycache__", "idlelib"}
    assert corpus.tokens == sum(path.stat().st_size for path in paths) > 5_000_000


def test_stdlib_is_cut_at_max_bytes(tmp_path: Path) -> None:
    config = DataConfig(source=Source.stdlib, max_bytes=100_000)
    file = prepare(config, tmp_path)
    text = file.path.read_bytes()
    assert len(text) == file.tokens == 100_000 == describe(config).tokens
    whole = b"".join(f.path.read_bytes() for f in describe(DataConfig(source=Source.stdlib)).files[:20])
    assert text == whole[:100_000]
    ast.parse(describe(config).files[0].path.read_bytes())


def test_text_file_becomes_tokens_with_a_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(256)) * 40
    (tmp_path / "text.bin").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    file = prepare(text_config("text.bin", val_fraction=0.25), tmp_path / "cache")
    assert file.path.read_bytes() == content and (file.dtype, file.tokenizer, file.tokens) == ("uint8", "byte", 10240)
    assert file.sha256 == hashlib.sha256(content).hexdigest()
    manifest = json.loads(file.path.with_suffix(".json").read_text())
    assert manifest["source"] == "text" and manifest["sha256"] == file.sha256
    corpus = describe(text_config("text.bin", val_fraction=0.25))
    assert (corpus.train_tokens, corpus.val_tokens) == (7680, 2560)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert describe(text_config("~/text.bin", val_fraction=0.25)) == corpus


def test_token_file_is_written_once_until_the_text_changes(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"abc" * 1000)
    first = prepare(text_config(text), tmp_path / "cache")
    written = first.path.stat().st_mtime_ns
    assert prepare(text_config(text, val_fraction=0.5), tmp_path / "cache") == first
    assert first.path.stat().st_mtime_ns == written, "the split is not part of the file"
    assert prepare(text_config(text, max_bytes=7), tmp_path / "cache").path.read_bytes() == b"abcabca"
    text.write_bytes(b"xyz" * 1000)
    os.utime(text, ns=(1, 1))
    assert prepare(text_config(text), tmp_path / "cache").path.read_bytes() == b"xyz" * 1000


@pytest.mark.parametrize("harm", ["cut", "gone", "no manifest", "garbage manifest", "other format"])
def test_a_broken_token_file_is_written_again(tmp_path: Path, harm: str) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"abc" * 1000)
    file = prepare(text_config(text), tmp_path / "cache")
    manifest = file.path.with_suffix(".json")
    if harm == "cut":
        file.path.write_bytes(b"abc")
    elif harm == "gone":
        file.path.unlink()
    elif harm == "no manifest":
        manifest.unlink()
    elif harm == "garbage manifest":
        manifest.write_text("[1")
    else:
        manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 99'))
    assert prepare(text_config(text), tmp_path / "cache") == file
    assert file.path.read_bytes() == b"abc" * 1000


def prepare_at_once(rank: int, world_size: int, text: Path, cache: Path) -> tuple[str, bytes]:
    import torch.distributed as dist

    dist.barrier()
    file = prepare(text_config(text), cache)
    return file.sha256, file.path.read_bytes()[:4]


def test_several_processes_at_once_get_the_same_whole_file(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"some" * 500_000)
    results = run_distributed(prepare_at_once, 4, text, tmp_path / "cache")
    assert results == [(hashlib.sha256(text.read_bytes()).hexdigest(), b"some")] * 4
    assert len(list((tmp_path / "cache").glob("*.bin"))) == 1 and not list((tmp_path / "cache").glob(".*.tmp"))


def test_preparing_holds_only_a_piece_in_memory(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(bytes(30_000_000))
    tracemalloc.start()
    prepare(text_config(text), tmp_path / "cache")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_paths_that_lead_to_no_text_are_refused_with_what_to_type(tmp_path: Path) -> None:
    (tmp_path / "shakespeare.txt").write_text("To be")
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    for path, found, fix in (
        (tmp_path / "shakespear.txt", "there is no", f"data.path={tmp_path / 'shakespeare.txt'}"),
        (tmp_path / "nowhere" / "file", "there is no", "data.path=FILE"),
        (tmp_path, "is a folder", f"data.path={tmp_path / 'shakespeare.txt'}"),
        (tmp_path / "shakespeare.txt" / "file", "cannot be read", "chmod"),
        (tmp_path / "pipe", "not a regular file", "data.path="),
        (tmp_path / "empty", "is empty", "data=text data.path=FILE"),
        ("~no such user/file", "cannot be read", "chmod"),
    ):
        with pytest.raises(ConfigError) as refusal:
            describe(text_config(path))
        assert found in refusal.value.found and refusal.value.fix.startswith(fix), refusal.value


def test_a_text_without_read_permission_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("text")
    secret.chmod(0)
    # Root may read everything, so ask as another user where that is who runs the tests.
    code = (
        "import os, sys; from gpt.config import DataConfig, Source; from gpt.data.corpus import describe\n"
        "os.geteuid() == 0 and os.seteuid(65534)\n"
        "describe(DataConfig(source=Source.text, path=sys.argv[1]))"
    )
    result = subprocess.run([sys.executable, "-c", code, secret], capture_output=True, text=True)
    assert result.returncode == 1 and "cannot be read (" in result.stderr and "Permission denied" in result.stderr


def test_a_text_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpt.data import corpus

    text = tmp_path / "text"
    text.write_bytes(b"abc" * 1000)
    described = describe(text_config(text))
    text.write_bytes(b"abc")
    monkeypatch.setattr(corpus, "describe", lambda config: described)
    with pytest.raises(ConfigError, match="changed while it was read"):
        prepare(text_config(text), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.bin"))


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    with pytest.raises(ConfigError) as refusal:
        prepare(text_config(tmp_path / "text"), tmp_path / "text" / "cache")
    assert refusal.value.fix == "data.cache_dir=FOLDER"


@given(
    size=st.integers(1, 3000),
    val_fraction=st.floats(0.001, 0.5),
    block_size=st.integers(1, 300),
    eval_sequences=st.integers(1, 20),
)
def test_what_check_size_accepts_has_the_samples_and_what_it_proposes_is_accepted(
    tmp_path_factory: pytest.TempPathFactory, size: int, val_fraction: float, block_size: int, eval_sequences: int
) -> None:
    text = tmp_path_factory.getbasetemp() / f"{size}"
    text.write_bytes(bytes(size))
    corpus = describe(text_config(text, val_fraction=val_fraction))
    assert corpus.train_tokens + corpus.val_tokens == size and corpus.val_tokens >= 1
    try:
        check_size(corpus, block_size, eval_sequences)
    except ConfigError as refusal:
        key, _, value = refusal.fix.removeprefix("a longer text, or ").partition(" ")[0].partition("=")
        if key == "model.block_size" and min(corpus.train_tokens, corpus.val_tokens) >= 2:
            assert int(value) < block_size
            check_size(corpus, int(value))
        elif key == "eval.sequences":
            check_size(corpus, block_size, int(value))
    else:
        assert corpus.train_tokens > block_size
        assert num_windows(corpus.val_tokens, block_size) >= eval_sequences


@given(tokens=st.integers(1, 10**13), val_fraction=st.floats(0.001, 0.5))
def test_the_split_is_near_the_fraction_asked_for(tokens: int, val_fraction: float) -> None:
    train, val = split_tokens(tokens, val_fraction)
    assert train + val == tokens and abs(val - tokens * val_fraction) <= 1


@pytest.mark.parametrize("name", ["stdlib", "text"])
def test_configs_fit_the_schema(name: str) -> None:
    merged = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.load(CONFIGS / f"{name}.yaml"))
    config = OmegaConf.to_object(merged)
    assert isinstance(config, DataConfig) and config.source.value == name
    if name == "text":
        with pytest.raises(ConfigError, match=r"data\.path"):
            config.validate()
    else:
        config.validate()
        check_size(describe(config), block_size=4096, eval_sequences=100)


def test_looking_up_a_corpus_loads_no_torch_and_no_numpy() -> None:
    code = "import sys, gpt.data.corpus; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
