"""llama-pico in Hugging Face's transformers: it loads there unchanged and means the same.

The one place with a tolerance. transformers computes in fp32, so

- the model that was trained, in fp32 too, differs by the order of sums alone;
- the reference rounds to bf16 after every operation. Its logits may differ by TOLERANCE_ULPS bf16
  ulps of the largest logit of a prompt. transformers itself, run in bf16, differs from its own fp32
  by up to 1.8 such ulps; another rotary scaling differs by more than twice the tolerance.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bitassay.reference.model import load_model
from bitassay.reference.spec.contract import default_contract
from training.llama import Llama, LlamaConfig
from training.llama_pico import GOLDEN

transformers = pytest.importorskip("transformers", reason="the package transformers is missing")

MODEL = GOLDEN / "models" / "llama-pico"
TOLERANCE_ULPS = 3
PROMPTS = (0, 1, 57)  # 1, 65 and 300 tokens


def texts() -> list[str]:
    lines = (GOLDEN / "prompts" / "llama-pico.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(lines[i])["text"] for i in PROMPTS]


def load(dtype: torch.dtype, **changes: Any) -> Any:
    """Load from the committed directory and nowhere else; refuse weights that do not fit."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=dtype, local_files_only=True, output_loading_info=True, **changes
    )
    assert not any(report.values()), report
    return model.eval()


@torch.no_grad()
def logits_of(model: Any, ids: list[int]) -> Tensor:  # -> [T, V] float32
    logits: Tensor = model(torch.tensor([ids])).logits[0].float()
    return logits


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts()]
    assert [len(row) for row in ids] == [1, 65, 300]
    return ids


@pytest.fixture(scope="module")
def exact(prompts: list[list[int]]) -> list[Tensor]:
    """The logits of transformers in fp32."""
    model = load(torch.float32)
    return [logits_of(model, ids) for ids in prompts]


def tolerance(want: Tensor) -> float:
    """TOLERANCE_ULPS bf16 ulps (7 fraction bits) of the largest logit."""
    return float(TOLERANCE_ULPS * 2.0 ** (math.floor(math.log2(want.abs().max())) - 7))


def assert_within_bf16(got: list[Tensor], want: list[Tensor]) -> None:
    """No logit further off than the tolerance; the same token wherever it wins by more than that.

    Two logits off by the tolerance could swap a margin of twice as much: none may.
    """
    rows = clear_rows = 0
    for ours, theirs in zip(got, want, strict=True):
        allowed = tolerance(theirs)
        assert (ours - theirs).abs().max() <= allowed
        first, second = theirs.topk(2, dim=1).values.unbind(1)
        clear = first - second > allowed
        assert torch.equal(ours.argmax(1)[clear], theirs.argmax(1)[clear])
        rows, clear_rows = rows + len(clear), clear_rows + int(clear.sum())
    assert clear_rows > rows / 2


def test_it_is_a_llama_with_its_tokens(tokenizer):
    model = load(torch.float32)
    assert type(model) is transformers.LlamaForCausalLM
    ends = (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id)
    assert ends == (None, 0, 0)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == ends
    assert len(tokenizer) == model.config.vocab_size
    for text in texts():
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_it_generates(tokenizer, prompts):
    model = load(torch.float32)
    ids = model.generate(
        torch.tensor([prompts[1]]), max_new_tokens=4, min_new_tokens=4, do_sample=False
    )
    assert ids[0, :-4].tolist() == prompts[1]
    tokens = prompts[1]
    for token in ids[0, -4:].tolist():
        assert int(logits_of(model, tokens)[-1].argmax()) == token
        tokens = [*tokens, token]


@torch.no_grad()
def test_the_trained_model_agrees_to_fp32(prompts, exact):
    model = Llama(LlamaConfig()).eval()
    model.load_state_dict(load_file(MODEL / "model.safetensors"))
    for ids, want in zip(prompts, exact, strict=True):
        got = model(torch.tensor([ids]))[0]
        # 3e-5 were seen at logits of 21, whose fp32 ulp is 2e-6.
        assert (got - want).abs().max() <= 2**-20 * want.abs().max() * 10


def test_the_tolerance_holds_for_transformers_own_bf16(prompts, exact):
    model = load(torch.bfloat16)
    assert_within_bf16([logits_of(model, ids) for ids in prompts], exact)


def test_the_tolerance_refuses_another_rotary_scaling(prompts, exact):
    plain = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    plain["rope_scaling"] = None
    model = load(torch.float32, config=transformers.LlamaConfig(**plain))
    for ids, want in list(zip(prompts, exact, strict=True))[1:]:
        assert (logits_of(model, ids) - want).abs().max() > 2 * tolerance(want)


@pytest.mark.parametrize("arch", ["sm_89", "sm_90"])
def test_the_reference_agrees_to_bf16(arch, prompts, exact):
    model = load_model(MODEL, contract=default_contract(arch))
    logits = [model.logits(model.hidden(torch.tensor(ids))) for ids in prompts]
    assert {rows.dtype for rows in logits} == {torch.bfloat16}
    assert_within_bf16([rows.float() for rows in logits], exact)
