"""Prompts files: what is refused, and where it says the fault is."""

from __future__ import annotations

import json

import pytest

from bitassay.golden.errors import PromptError
from bitassay.golden.inputs.prompts import Prompt, encode_prompts, load_prompts
from bitassay.reference.checkpoints.checkpoint import load_tokenizer


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompts"),
        ('{"id": "a", "text": "x"}\n{"id": "b"', "line 2 is not JSON"),
        ('["a"]', 'line 1: expected an object with a text "id"'),
        ('{"text": "x"}', 'line 1: expected an object with a text "id"'),
        ('{"id": "a"}', 'line 1: expected "text" or a list "token_ids"'),
        ('{"id": "a", "text": 5}', 'line 1: expected "text" or a list'),
        ('{"id": "a", "token_ids": [1, true]}', 'line 1: expected "text" or a list'),
        ('{"id": "a", "token_ids": [1, 2.0]}', 'line 1: expected "text" or a list'),
        ('{"id": "a", "text": "x"}\n' * 2, "id 'a' stands there more than once"),
        ('{"id": "a", "text": "x", "token_ids": [1]}', "line 1: .*found both: leave one out"),
        ('{"id": "a", "text": "x", "text": "y"}', "line 1 .*'text' stands there more than once"),
        ('{"id": "a", "text": "x", "of": {"b": 1, "b": 2}}', "key 'b' stands there more than once"),
        ('{"id": "a", "text": "\\ud800 x"}', "line 1: text holds half a surrogate pair"),
        ('{"id": "\\udc00", "text": "x"}', "line 1: id holds half a surrogate pair"),
        ('{"id": "a", "text": ' + "[" * 100_000, "line 1 is not JSON: .*recursion"),
    ],
)
def test_an_unfit_file_is_refused(tmp_path, content, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(PromptError, match=message):
        load_prompts(path)


def test_text_that_is_not_utf_8_is_refused(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"id": "a", "text": "x"}\n{"id": "b", "text": "\xff"}\n')
    with pytest.raises(PromptError, match="line 2 is not UTF-8 .*byte 21.*: save the file as"):
        load_prompts(path)


def test_lines_end_at_newlines_alone(tmp_path):
    path = tmp_path / "prompts.jsonl"
    text = "a\u2028b\u2029c\u0085d \U0001f600"
    lines = [
        json.dumps({"id": "escaped", "text": text}),
        json.dumps({"id": "x", "text": text}, ensure_ascii=False),
    ]
    path.write_bytes("\r\n\n".join(lines).encode())
    prompts, _ = load_prompts(path)
    assert prompts == [Prompt("escaped", text), Prompt("x", text)]


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(PromptError, match="cannot be read: No such file"):
        load_prompts(tmp_path / "absent.jsonl")


def test_text_is_encoded_and_ids_are_taken(recorded):
    prompts = [Prompt("a", "é"), Prompt("b", None, (3, 255))]
    tokenizer = load_tokenizer(recorded / "model")
    first, second = encode_prompts(prompts, tokenizer, 256)
    assert tokenizer.decode(first) == "é"
    assert len(first) == 2
    assert second == [3, 255]


@pytest.mark.parametrize("wrong", [-1, 256])
def test_ids_outside_the_vocabulary_are_refused(recorded, wrong):
    tokenizer = load_tokenizer(recorded / "model")
    with pytest.raises(PromptError, match=f"'b', position 1: token id {wrong}.* ids 0 to 255"):
        encode_prompts([Prompt("b", None, (3, wrong))], tokenizer, 256)


def test_a_tokenizer_larger_than_the_model_is_refused(recorded):
    tokenizer = load_tokenizer(recorded / "model")
    with pytest.raises(PromptError, match="vocabulary has ids 0 to 63"):
        encode_prompts([Prompt("a", "é")], tokenizer, 64)


def test_an_empty_prompt_is_refused(recorded, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"id": "a", "text": ""}))
    prompts, _ = load_prompts(path)
    with pytest.raises(PromptError, match="'a' has no tokens"):
        encode_prompts(prompts, load_tokenizer(recorded / "model"), 256)
