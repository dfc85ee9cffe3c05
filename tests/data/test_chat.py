"""Conversations: the tokens in the loss against transformers, and the loss against a plain loop of its Llama."""

from __future__ import annotations

import json
import random
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gpt.conversion import choose_adapter
from gpt.conversion.source import find_source
from gpt.conversion.state_dict import to_hf
from gpt.data.shards import is_validation
from gpt.prepare import main
from tests.support.distributed import run_distributed
from tests.support.learning import BATCH, DEEPSPEED, Case, evaluated, learn, start_case

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

LENGTH = 64
Message = dict[str, str]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = """{{ bos_token }}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}
{%- elif message['role'] == 'user' %}
{{- '[INST] ' + message['content'] | trim + ' [/INST]' }}
{%- else %}
{{- ' ' + message['content'] | trim + ' ' + eos_token }}
{%- endif %}
{%- endfor %}"""
TEMPLATES = {
    "with generation blocks": CHATML,
    "without": CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", ""),
    "stripped, without a header": TURNS,
}


GOOD: list[Message] = [{"role": "user", "content": "is that"}, {"role": "assistant", "content": "the question"}]


def conversation(number: int, template: str) -> list[Message]:
    """A conversation of one to three questions with answers, some with spaces around them."""
    draw = random.Random(number)
    words = ["to", "be", "or", "not", "that", "is", "the", "question", "é🎉", "42"]
    said = [" ".join(draw.choices(words, k=draw.randint(1, 4))) for _ in range(2 * draw.randint(1, 3))]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    messages[1]["content"] += " \n" * (number % 3 == 0)
    if template != TURNS and number % 4 == 0:
        messages.insert(0, {"role": "system", "content": "be short"})
    return messages


@cache
def trained_tokenizer() -> str:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    names = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=340, special_tokens=names, initial_alphabet=alphabet)
    texts = [each["content"] for number in range(50) for each in conversation(number, CHATML)]
    made.train_from_iterator(texts, trainer)
    return str(made.to_str())


def write_tokenizer(folder: Path, template: str | None) -> Path:
    """A tokenizer's folder, as transformers writes it; the template in a file of its own if it is that of ``TURNS``."""
    folder.mkdir()
    cut = {"max_length": 5, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    (folder / "tokenizer.json").write_text(json.dumps({**json.loads(trained_tokenizer()), "truncation": cut}))
    end = "</s>" if template == TURNS else "<|im_end|>"
    about: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": "<s>"},
    }
    about |= {"eos_token": end, "pad_token": None, "add_bos_token": False}
    if template == TURNS:
        (folder / "chat_template.jinja").write_text(template)
    elif template is not None:
        about["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder / "tokenizer.json"


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def prepare(folder: Path, template: str | None, rows: list[Any], *words: str) -> int:
    """Exit status of the preparation of rows in ``folder/corpus``."""
    tokenizer = write_tokenizer(folder / "tokenizer", template)
    path = write_rows(folder / "chats.jsonl", rows)
    given = [f"data.path={path}", f"data.tokenizer_path={tokenizer}", f"model.block_size={LENGTH}", *words]
    return main(["data=chat", "data.val_fraction=0.3", *given, "--output", str(folder / "corpus"), "--workers", "1"])


def by_prefixes(theirs: Any, messages: list[Message]) -> tuple[list[int], list[bool]]:
    """Tokens, and True for those of answers: what each answer adds to its header, up to the last special token."""
    render = partial(theirs.apply_chat_template, tokenize=False)
    text, places = render(messages), []
    for i, each in enumerate(messages):
        if each["role"] == "assistant":
            before, after = render(messages[:i], add_generation_prompt=True), render(messages[: i + 1])
            assert text.startswith(after) and after.startswith(before)
            ends = [after.rfind(name) + len(name) for name in theirs.all_special_tokens if name in after[len(before) :]]
            places.append((len(before), max(ends)))
    encoded = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
    marks = [any(a < end and b > begin for begin, end in places) for a, b in encoded["offset_mapping"]]
    return encoded["input_ids"], marks


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_tokens_in_the_loss_are_those_of_transformers(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = TEMPLATES[name]
    rows = [conversation(number, template) for number in range(60)]
    rows[7] = rows[7][:-1] if len(rows[7]) == 2 else rows[7][:1]  # a question without an answer
    rows[11] = [{"role": "user", "content": "that is " * LENGTH}, GOOD[1]]  # no room for the answer
    assert prepare(tmp_path, template, [{"messages": row, "id": 1} for row in rows]) == 0
    told = capsys.readouterr().out
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    cut = left_out = 0
    for split, is_val in (("train", False), ("val", True)):
        expected: list[tuple[int, int]] = []
        before = cut, left_out
        documents = [row for number, row in enumerate(rows) if is_validation(0, number, 0.3) is is_val]
        for row in documents:
            if template == CHATML:
                found = theirs.apply_chat_template(row, return_assistant_tokens_mask=True, return_dict=True)
                ids, marks = found["input_ids"], found["assistant_masks"]
            else:
                ids, marks = by_prefixes(theirs, row)
            if not any(marks[:LENGTH]):
                left_out += 1
                continue
            cut += len(ids) > LENGTH
            made = [(token, 0 if mark else 2) for token, mark in zip(ids, marks, strict=True)][:LENGTH]
            made[0] = (made[0][0], 1)
            free = -len(expected) % LENGTH
            expected += [(0, 1)] * (free if free < len(made) else 0) + made
        numbers = np.fromfile(tmp_path / "corpus" / f"{split}.bin", dtype="<u4")
        pairs = [*zip((numbers % 2**28).tolist(), (numbers >> 28).tolist(), strict=True)]
        assert pairs[: len(expected)] == expected
        assert len(pairs) % LENGTH == 0 and {*pairs[len(expected) :]} == {(0, 1)}
        assert len(pairs) - len(expected) >= LENGTH, "the last target of the last sequence is there"
        here = len(documents) - (left_out - before[1])
        said = f"{split}: {len(pairs):,} tokens, {here} documents; cut at {LENGTH} tokens: {cut - before[0]}; "
        assert f"{said}left out without an answer: {left_out - before[1]}\n" in told
    assert cut > 2 and left_out >= 2
    assert f"train with data=tokens data.path={tmp_path}/corpus data.pack=documents and " in told
    saved = json.loads((tmp_path / "corpus/tokenizer/tokenizer.json").read_text())["chat"]
    assert saved["eos_token"] == theirs.eos_token and saved["chat_template"] == template


REFUSED: dict[str, tuple[str | None, Any, str]] = {
    "no messages": (CHATML, {"text": "to be"}, "line 3 has no list of messages under data.text_key=messages"),
    "messages as text": (CHATML, {"messages": "to be"}, "line 3 has no list of messages"),
    "unknown role": (CHATML, {"messages": [{**GOOD[0], "role": "human"}]}, "line 3: the message {'role': 'human'"),
    "no content": (CHATML, {"messages": [{"role": "user", "content": None}]}, "line 3: the message"),
    "no text of Unicode": (CHATML, {"messages": [{**GOOD[0], "content": "\ud800"}, GOOD[1]]}, "line 3: "),
    "no role": (CHATML, {"messages": [{"content": "to be"}]}, "line 3: 'role' (KeyError)"),
    "order of roles": (TURNS, {"messages": GOOD[::-1]}, "line 3: roles must alternate (TemplateError)"),
    "no template": (None, {"messages": GOOD}, "no chat template beside"),
    "no end of a turn": ("{{ messages[1]['content'] }}", {"messages": GOOD}, "writes no special token after it"),
    "a changed answer": ("{{ messages[1]['content'][:5] }}</s>", {"messages": GOOD}, "changes an answer"),
    "no jinja": ("{% for %}", {"messages": GOOD}, "TemplateSyntaxError"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_conversations_are_refused_with_their_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template, row, said = REFUSED[name]
    assert prepare(tmp_path, template, [{"messages": GOOD}, {"messages": GOOD}, row]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "corpus").exists()


WORDS = ["data=tokens", "data.max_bytes=null", "model=llama_124m", "model.n_layer=2", "model.n_embd=32"]
WORDS += ["model.n_head=4", "model.n_kv_head=2", "model.ffn_hidden=48", "model.norm_eps=1e-6", "model.vocab_multiple=1"]
WORDS += [
    "model.vocab_size=340",
    "model.tie_embeddings=false",
    "precision=fp32",
    "optim.grad_clip=1000",
    f"model.block_size={LENGTH}",
]
PACKED = [f"{words} data.pack=documents" for words in ("parallel=ddp", "parallel=fsdp", "parallel=tp", "parallel.pp=2")]
UNPACKED = [f"{words} data.pack=none" for words in ("parallel=ddp", "parallel=cp", "parallel=zero2")]


def plain_loop(theirs: Any, ids_BT1: Tensor, packed: bool) -> tuple[float, dict[str, Tensor], list[int]]:
    """Mean loss of transformers on the answers of sequences, its gradients, and the number of targets of each one."""
    ids_BT, kinds_BT = ids_BT1[:, :-1] % 2**28, ids_BT1[:, :-1] >> 28
    counts = (kinds_BT[:, 1:] == 0).sum(1)
    total = torch.zeros(())
    for ids_T, kinds_T in zip(ids_BT, kinds_BT, strict=True):
        begins = [i for i, kind in enumerate(kinds_T.tolist()) if kind == 1] if packed else [0]
        for begin, end in zip(begins, [*begins[1:], len(ids_T)], strict=True):
            labels = ids_T[begin:end].masked_fill(kinds_T[begin:end] > 0, -100)
            if (labels >= 0).any():
                given = {"labels": labels[None], "num_items_in_batch": counts.sum()}
                total = total + theirs(input_ids=ids_T[None, begin:end], **given).loss
    theirs.zero_grad()
    if total.requires_grad:
        total.backward()
    gradients = {name: p.grad.clone() for name, p in theirs.named_parameters() if p.grad is not None}
    return total.item(), gradients, counts.tolist()


def learned(rank: int, size: int, folder: Path, words: list[str], cases: list[str]) -> list[dict[str, Any]]:
    """Figures of each case, with the ids of the first sequences to train on and to validate on."""
    found = []
    for number, case in enumerate(cases):
        run = start_case(rank, size, folder / f"{size}-{number}", Case(case, "chat", 2), words)
        ids = [run.samples.read(split, np.arange(n)) for split, n in (("train", BATCH), ("val", 7))]
        found.append({"ids": ids, "val": evaluated(run, 7, batch=1), **learn(run, 2)})
    return found


def test_loss_and_gradients_are_those_of_a_plain_loop_of_transformers(tmp_path: Path) -> None:
    rows = [{"messages": conversation(number, CHATML)} for number in range(160)]
    assert prepare(tmp_path, CHATML, rows) == 0
    torch.manual_seed(1)
    sizes = {"vocab_size": 340, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LENGTH}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, initializer_range=0.2))
    theirs.save_pretrained(tmp_path / "weights")
    words = [*WORDS, f"init_from=hf:{tmp_path}/weights", f"data.path={tmp_path}/corpus"]
    alone = run_distributed(learned, 1, tmp_path, words, [PACKED[0], UNPACKED[0]])[0]
    expected = {}
    for pack, found in zip(("documents", "none"), alone, strict=True):
        (loss, gradients, counts), (val_loss, _, _) = (plain_loop(theirs, x, pack == "documents") for x in found["ids"])
        assert sum(counts[: BATCH // 2]) != sum(counts[BATCH // 2 :]), "two ranks have different numbers of targets"
        assert max(float(g.abs().max()) for g in gradients.values()) > 0.01
        expected[pack] = loss, val_loss, gradients
    cases = [*PACKED, *UNPACKED]
    of_ranks = [alone, *run_distributed(learned, 2, tmp_path, words, cases, timeout_s=300, imports=DEEPSPEED)]
    model = find_source(f"hf:{tmp_path}/weights").model
    for of_rank in of_ranks:
        for case, found in zip(cases if len(of_rank) > 2 else [PACKED[0], UNPACKED[0]], of_rank, strict=True):
            loss, val_loss, gradients = expected[case.rpartition("=")[2]]
            assert (found["losses"][0], found["val"]) == pytest.approx((loss, val_loss), rel=1e-6), case
            mine = dict(to_hf(found["gradients"], choose_adapter(model), model))
            for name, gradient in gradients.items():
                torch.testing.assert_close(mine[name], gradient, rtol=0, atol=1e-6, msg=f"{case}: {name}")
