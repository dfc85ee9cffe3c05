"""The corpus of known entropy: the closed form against sampling and against numpy, and a model that comes close."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from gpt.config import DataConfig, Source, SyntheticConfig
from gpt.data import shards as synthetic
from gpt.data.corpus import describe_corpus, ensure_tokens
from gpt.data.shards import Chain, chain_of, num_walks, walk
from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from tests.support.commands import run


def test_two_states_have_the_entropy_of_the_textbook() -> None:
    """Cover and Thomas, example 4.1.1: rates alpha and beta of changing state."""
    alpha, beta = 0.3, 0.1
    chain = Chain(np.array([[0, 1], [0, 1]]), np.array([[1 - alpha, alpha], [beta, 1 - beta]]))
    assert chain.stationary() == pytest.approx([beta / (alpha + beta), alpha / (alpha + beta)])

    def binary(p: float) -> float:
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    expected = (beta * binary(alpha) + alpha * binary(beta)) / (alpha + beta)
    assert chain.entropy() == pytest.approx(expected)


def test_a_uniform_chain_has_the_logarithm_of_its_successors() -> None:
    chain = chain_of(SyntheticConfig(vocab_size=10, successors=1))
    assert chain.entropy() == pytest.approx(0)
    successors = np.stack([np.arange(4), (np.arange(4) + 1) % 4], axis=1)
    assert Chain(successors, np.full((4, 2), 0.5)).entropy() == pytest.approx(math.log(2))


@pytest.mark.parametrize(("vocab_size", "successors", "seed"), [(64, 8, 0), (7, 7, 3), (300, 2, 5)])
def test_the_entropy_is_that_of_the_walk(vocab_size: int, successors: int, seed: int) -> None:
    config = SyntheticConfig(vocab_size=vocab_size, successors=successors, tokens=400_000, seed=seed)
    chain, states = chain_of(config), walk(config, 0)
    matrix = chain.transition()
    assert matrix.sum(axis=1) == pytest.approx(1.0) and ((matrix > 0).sum(axis=1) == successors).all()
    # The left eigenvector of the eigenvalue 1, found by another road.
    values, vectors = np.linalg.eig(matrix.T)
    vector = np.real(vectors[:, np.argmin(abs(values - 1))])
    assert chain.stationary() == pytest.approx(vector / vector.sum(), abs=1e-9)
    surprise = -np.log(matrix[states[:-1], states[1:]])  # infinite where the walk did what the chain forbids
    error = surprise.std() / math.sqrt(len(surprise))
    assert abs(surprise.mean() - chain.entropy()) < 6 * error + 1e-9
    # Counting pairs without knowing the chain: the plug-in estimate, whose bias is about parameters / (2 n).
    pairs = np.zeros_like(matrix)
    np.add.at(pairs, (states[:-1], states[1:]), 1)
    rows = pairs / np.maximum(pairs.sum(axis=1, keepdims=True), 1)
    plug_in = -(pairs[pairs > 0] * np.log(rows[pairs > 0])).sum() / pairs.sum()
    bias = vocab_size * successors / (2 * len(states))
    assert abs(plug_in + bias - chain.entropy()) < 6 * error + bias


def test_walks_are_of_the_seed_and_of_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "WALK_TOKENS", 1000)
    config = SyntheticConfig(tokens=2500)
    walks = [walk(config, i) for i in range(num_walks(2500))]
    assert [len(w) for w in walks] == [1000, 1000, 500]
    assert walks[0].tolist() == walk(config, 0).tolist() != walks[1].tolist()
    assert walks[0].tolist() != walk(SyntheticConfig(tokens=2500, seed=1), 0).tolist()


def test_the_corpus_never_changes_between_releases() -> None:
    """Results on it stay comparable; these numbers are that promise."""
    config = SyntheticConfig(tokens=1000)
    assert chain_of(config).entropy() == pytest.approx(1.7224732, abs=1e-6)
    digest = hashlib.sha256(walk(config, 0).astype("<u4").tobytes()).hexdigest()
    assert digest.startswith("f9bf2c0d4bd94529")


def test_it_is_prepared_and_described(tmp_path: Path) -> None:
    config = DataConfig(source=Source.synthetic, val_fraction=0.25, synthetic=SyntheticConfig(tokens=4000))
    before = describe_corpus(config, tmp_path)
    (source,) = ensure_tokens(config, tmp_path).sources
    assert describe_corpus(config, tmp_path) == before
    assert (before.train_tokens, before.val_tokens, before.vocab_size) == (3000, 1000, 64)
    assert source.entropy == before.entropy == chain_of(config.synthetic).entropy()
    ids = [np.fromfile(s.path, dtype="<u2") for s in (*source.train.segments, *source.val.segments)]
    assert np.concatenate(ids).tolist() == walk(config.synthetic, 0).tolist()
    assert source.tokenizer is None and source.val.num_bytes is None


def test_a_model_comes_within_two_percent_of_the_entropy(tmp_path: Path) -> None:
    told = run("gpt.train", "+experiment=synthetic", f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    folder = RunFolder(tmp_path / "run")
    entropy = json.loads(folder.environment(1).read_text())["data_sources"][0]["entropy"]
    assert f"entropy {entropy:.4f} nats" in told
    loss = read_records(folder.metrics(0))[-1]["val_loss"]
    assert entropy * 0.995 < loss < entropy * 1.02
