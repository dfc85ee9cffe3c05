"""Token files written by hand, as their formats are documented, are read; and what is written can be read by hand."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from gpt.config import DataConfig, Source, TokenDtype, TokenFileFormat, TrainConfig, WeightedPath
from gpt.config.train import compose_train
from gpt.data.corpus import check_fit, describe_corpus, ensure_tokens
from gpt.data.loader import Samples
from gpt.data.prepared import open_tokens
from gpt.data.token_file import open_token_files, read_token_file, split_end, token_dtype, write_split
from launch.errors import ConfigError
from launch.runs.compose import to_schema

IDS = np.random.default_rng(0).integers(0, 50257, 3000)


def nanogpt(folder: Path, ids: np.ndarray = IDS) -> Path:
    """A folder as nanoGPT's prepare.py leaves it: train.bin and val.bin."""
    folder.mkdir()
    ids[:-500].astype(np.uint16).tofile(folder / "train.bin")
    ids[-500:].astype(np.uint16).tofile(folder / "val.bin")
    return folder


def llmc(path: Path, ids: np.ndarray, magic: int = 20240520, version: int = 1, dtype: type = np.uint16) -> Path:
    """One file as llm.c's write_datafile leaves it."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(ids)
    path.write_bytes(header.tobytes() + ids.astype(dtype).tobytes())
    return path


def megatron(prefix: Path, documents: list[np.ndarray], code: int = 8, dtype: type = np.uint16) -> Path:
    """A pair as Megatron's IndexedDatasetBuilder leaves it, field by field."""
    width = np.dtype(dtype).itemsize
    sizes = [len(document) for document in documents]
    prefix.with_name(f"{prefix.name}.bin").write_bytes(b"".join(d.astype(dtype).tobytes() for d in documents))
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    index += struct.pack("<Q", len(sizes)) + struct.pack("<Q", len(sizes) + 1)
    index += struct.pack(f"<{len(sizes)}i", *sizes)
    index += struct.pack(f"<{len(sizes)}q", *(sum(sizes[:i]) * width for i in range(len(sizes))))
    index += struct.pack(f"<{len(sizes) + 1}q", *range(len(sizes) + 1))
    prefix.with_name(f"{prefix.name}.idx").write_bytes(index)
    return prefix


def tokens_config(path: Path | str, **changes: object) -> DataConfig:
    return DataConfig(source=Source.tokens, path=str(path), **changes)  # type: ignore[arg-type]


def read_back(config: DataConfig, split: str) -> list[int]:
    """All tokens of a split of one file, through the loader, less those that fill no window."""
    samples = Samples(open_tokens(config), 10, seed=0)
    count = samples.num_train if split == "train" else samples.num_val
    windows, targets = samples.batch("val" if split == "val" else "train", np.arange(count))
    if split == "val":
        assert windows.flatten().tolist()[1:] == targets.flatten().tolist()[:-1]
        return windows.flatten().tolist()
    return sorted(tuple(row) for row in windows.tolist())  # type: ignore[return-value]


def windows_of(ids: np.ndarray) -> list[tuple[int, ...]]:
    return sorted(tuple(ids[i : i + 10].tolist()) for i in range(0, (len(ids) - 1) // 10 * 10, 10))


def test_nanogpts_pair(tmp_path: Path) -> None:
    folder = nanogpt(tmp_path / "owt")
    for path in (folder, folder / "train.bin"):
        assert read_back(tokens_config(path), "val") == IDS[-500:-10].tolist()
        assert read_back(tokens_config(path), "train") == windows_of(IDS[:-500])
    (folder / "val.bin").rename(folder / "rest")
    config = tokens_config(folder / "train.bin", val_fraction=0.1)
    assert read_back(config, "val") == IDS[2250:2490].tolist(), "without val.bin, the end of train.bin"


def test_llmcs_shards(tmp_path: Path) -> None:
    for i, part in enumerate((IDS[:1000], IDS[1000:2200])):
        llmc(tmp_path / f"fineweb_train_{i:06d}.bin", part)
    llmc(tmp_path / "fineweb_val_000000.bin", IDS[2200:])
    config = tokens_config(tmp_path / "fineweb_train_*.bin", val_path=str(tmp_path / "fineweb_val_*.bin"))
    assert read_back(config, "val") == IDS[2200:2990].tolist()
    # A window lies in one file: 99 of the first one, 119 of the second.
    assert read_back(config, "train") == sorted(windows_of(IDS[:1000]) + windows_of(IDS[1000:2200]))


def test_wide_tokens(tmp_path: Path) -> None:
    wide = IDS + 100_000
    llmc(tmp_path / "llama.bin", wide, 20240801, 7, np.uint32)
    megatron(tmp_path / "mega", [wide[:100], wide[100:]], 4, np.int32)
    (tmp_path / "raw.bin").write_bytes(wide.astype("<u4").tobytes())
    (tmp_path / "bytes.bin").write_bytes((IDS % 251).astype(np.uint8).tobytes())
    for config, ids in (
        (tokens_config(tmp_path / "llama.bin"), wide),
        (tokens_config(tmp_path / "mega"), wide),
        (tokens_config(tmp_path / "raw.bin", token_dtype=TokenDtype.uint32), wide),
        (tokens_config(tmp_path / "bytes.bin", token_dtype=TokenDtype.uint8), IDS % 251),
    ):
        assert read_back(config, "val") == ids[2700:2990].tolist()


def test_megatrons_pair(tmp_path: Path) -> None:
    prefix = megatron(tmp_path / "corpus_text_document", [IDS[:7], IDS[7:2000], IDS[2000:]])
    for path in (prefix, prefix.with_name(f"{prefix.name}.bin"), prefix.with_name(f"{prefix.name}.idx")):
        assert read_back(tokens_config(path), "val") == IDS[2700:2990].tolist()


def test_what_is_written_is_what_the_formats_say(tmp_path: Path) -> None:
    lengths = np.array([7, 1993, 1000])
    chunks = [IDS[:13].astype("<u2").tobytes(), IDS[13:].astype("<u2").tobytes()]
    for layout in TokenFileFormat:
        (tmp_path / layout.name).mkdir()
        write_split(layout, tmp_path / layout.name / "train", "uint16", 3000, chunks, lengths)
    (nanogpt_file,) = (tmp_path / "nanogpt").iterdir()
    assert np.fromfile(nanogpt_file, dtype=np.uint16).tolist() == IDS.tolist()
    llmc(tmp_path / "expected", IDS)
    (llmc_file,) = (tmp_path / "llmc").iterdir()
    assert llmc_file.read_bytes() == (tmp_path / "expected").read_bytes()
    megatron(tmp_path / "mega", [IDS[:7], IDS[7:2000], IDS[2000:]])
    for suffix in ("bin", "idx"):
        written = (tmp_path / "megatron" / f"train.{suffix}").read_bytes()
        assert written == (tmp_path / f"mega.{suffix}").read_bytes(), suffix


def test_long_splits_are_cut_where_llmc_cuts_them_and_refused_where_megatron_has_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpt.data import token_file as layouts

    monkeypatch.setattr(layouts, "LLMC_SHARD_TOKENS", 1200)
    chunks = [IDS[i : i + 77].astype("<u2").tobytes() for i in range(0, 3000, 77)]
    write_split(TokenFileFormat.llmc, tmp_path / "train", "uint16", 3000, chunks, IDS)
    shards = [open_token_files(str(tmp_path / f"train_{i:06d}.bin"))[0] for i in range(3)]
    assert [shard.tokens for shard in shards] == [1200, 1200, 600]
    read = [np.fromfile(s.path, dtype="<u2", offset=1024) for s in shards]
    assert np.concatenate(read).tolist() == IDS.tolist()
    with pytest.raises(ConfigError, match=r"a document of 2,147,483,648 tokens(.|\n)*data\.layout=llmc"):
        write_split(TokenFileFormat.megatron, tmp_path / "val", "uint16", 3000, chunks, np.array([1 << 31]))


def test_tokens_are_as_wide_as_the_vocabulary_needs() -> None:
    widths = [token_dtype(layout, size) for layout in TokenFileFormat for size in (65, 65536, 65537)]
    assert widths == ["uint16", "uint16", "uint32", "uint16", "uint16", "uint32", "uint16", "uint16", "int32"]


@pytest.mark.parametrize("tokens", [0, 5, 10, 17, 30])
def test_the_end_is_cut_off_across_files(tmp_path: Path, tokens: int) -> None:
    files = [llmc(tmp_path / f"{i}", IDS[i * 10 : i * 10 + 10]) for i in range(3)]
    before, after = split_end(tuple(read_token_file(f) for f in files), tokens)

    def content(segments: tuple) -> list[int]:
        parts = [np.fromfile(s.path, dtype="<u2", count=s.tokens, offset=s.offset).tolist() for s in segments]
        return [i for part in parts for i in part]

    assert (content(before), content(after)) == (IDS[: 30 - tokens].tolist(), IDS[30 - tokens : 30].tolist())


def test_files_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    (tmp_path / "odd.bin").write_bytes(b"abc")
    llmc(tmp_path / "cut.bin", IDS).write_bytes((tmp_path / "cut.bin").read_bytes()[:-2])
    llmc(tmp_path / "new.bin", IDS, version=2)
    prefix = megatron(tmp_path / "mega", [IDS])
    megatron(tmp_path / "float", [IDS], code=6)
    megatron(tmp_path / "short", [IDS, IDS])
    (tmp_path / "short.idx").write_bytes((tmp_path / "short.idx").read_bytes()[:-8])
    nanogpt(tmp_path / "half")
    (tmp_path / "half" / "val.bin").unlink()
    for name, found in (
        ("odd.bin", "not whole uint16 tokens"),
        ("cut.bin", "for 3000 uint16 tokens, and 7022 bytes"),
        ("new.bin", "the header of llm.c"),
        ("float", "dtype code 6"),
        ("short", "version 1, dtype code 8, 2 sequences"),
        ("meg", "there are no tokens"),
        ("half", "there are no tokens"),
        ("nothing/*.bin", "there are no tokens"),
    ):
        with pytest.raises(ConfigError) as refusal:
            open_tokens(tokens_config(tmp_path / name))
        assert found in refusal.value.found, name
    (tmp_path / "mega.idx").write_bytes(b"no index of Megatron's")
    with pytest.raises(ConfigError, match="no whole index of Megatron"):
        open_tokens(tokens_config(prefix))


def test_ids_that_the_model_has_no_room_for_are_refused(tmp_path: Path) -> None:
    folder = nanogpt(tmp_path / "owt")
    config = to_schema(compose_train(["data=tokens", f"data.path={folder}", "model.vocab_size=256"]), TrainConfig)
    corpus = describe_corpus(config.data, tmp_path)
    with pytest.raises(ConfigError, match=f"type next: model.vocab_size={IDS.max() + 1}"):
        check_fit(corpus, config.model)
    samples = Samples(ensure_tokens(config.data, tmp_path), 16, 0, vocab_size=256)
    with pytest.raises(ConfigError, match=r"model\.vocab_size=256"):
        samples.batch("train", np.arange(8))


def test_sources_of_a_mixture_have_one_tokenizer(tmp_path: Path) -> None:
    for name, words in (("a", "to be"), ("b", "or not")):
        (tmp_path / f"{name}.txt").write_text(words * 400)
        from gpt.prepare import main

        kind = "byte" if name == "a" else "char"
        arguments = ["data=text", f"data.path={tmp_path / name}.txt", f"data.tokenizer={kind}", "--output"]
        assert main([*arguments, str(tmp_path / name)]) == 0
    nanogpt(tmp_path / "c")
    mixed = DataConfig(source=Source.tokens, sources=[WeightedPath(str(tmp_path / n)) for n in "ac"])
    assert [s.name for s in open_tokens(mixed).sources] == ["text", "c"]
    mixed.sources[1].path = str(tmp_path / "b")
    with pytest.raises(ConfigError, match="one tokenizer for all sources"):
        open_tokens(mixed)
