"""context-lm: sequential truth against a twin in Python integers, replay, errors, the real one."""

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bitassay.reference.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    load_tokenizer,
)
from bitassay.reference.context_lm import ContextLM
from bitassay.reference.sample import greedy
from bitassay.reference.spec.contract import default_contract, operations
from bitassay.reference.spec.errors import SequenceError
from bitassay.reference.trace import Trace
from support.paths import GOLDEN

REAL = GOLDEN / "models" / "context-lm"
ARCHES = ("sm_89", "sm_90")
VOCAB, CONTEXT, SIZE, PAD = 24, 3, 5, 2
MASK = (1 << 64) - 1


def tiny_tensors(seed: int, *, exact: bool) -> dict[str, Tensor]:
    """Weights of a tiny model; `exact` ones are small multiples of 1/8, whose sums are exact."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        if exact:
            return (torch.randint(-15, 16, shape, generator=generator) / 8).bfloat16()
        return torch.randn(shape, generator=generator).bfloat16()

    tables = {f"embed_tokens.{j}.weight": draw(VOCAB, SIZE) for j in range(CONTEXT)}
    return tables | {"lm_head.weight": draw(VOCAB, CONTEXT * SIZE), "lm_head.bias": draw(VOCAB)}


def write_tiny(folder: Path, tensors: dict[str, Tensor], **changes: object) -> Path:
    config = {
        "model_type": "context-lm",
        "vocab_size": VOCAB,
        "context_size": CONTEXT,
        "embedding_size": SIZE,
        "pad_token_id": PAD,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    save_file(tensors, folder / "model.safetensors")
    return folder


def tiny(folder: Path, arch: str = "sm_90", seed: int = 3, *, exact: bool = False) -> ContextLM:
    path = write_tiny(folder, tiny_tensors(seed, exact=exact))
    return ContextLM.from_pretrained(path, contract=default_contract(arch))


def mix(x: int) -> int:
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
    return x ^ x >> 31


def fingerprint(patterns: list[int]) -> int:
    return sum(mix((i + 1) << 32 | pattern) for i, pattern in enumerate(patterns)) & MASK


def fold(rows: list[int]) -> int:
    return sum(mix((f + (r + 1) * 0x9E3779B97F4A7C15) & MASK) for r, f in enumerate(rows)) & MASK


def bf16(value: Fraction) -> int:
    """Bits of the nearest bf16, ties to even, of a normal number or zero."""
    if value == 0:
        return 0
    exponent = 0
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    significand = round(abs(value) / Fraction(2) ** (exponent - 7))  # Python rounds half to even
    pattern = ((exponent + 127) << 7) + significand - 128
    return pattern | (0x8000 if value < 0 else 0)


def ordinal(pattern: int) -> int:
    return -(pattern & 0x7FFF) if pattern & 0x8000 else pattern


class Twin:
    """The model in Python integers and fractions, for weights whose sums are exact."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = {
            name: [[Fraction(x) for x in row] for row in t.double().reshape(len(t), -1).tolist()]
            for name, t in tensors.items()
        }

    def hidden(self, ids: list[int]) -> list[Fraction]:
        row: list[Fraction] = []
        for j in range(CONTEXT):
            token = ids[-1 - j] if j < len(ids) else PAD
            row += self.tensors[f"embed_tokens.{j}.weight"][token]
        return row

    def logit_bits(self, hidden: list[Fraction]) -> list[int]:
        head = zip(self.tensors["lm_head.weight"], self.tensors["lm_head.bias"], strict=True)
        return [
            bf16(sum(w * h for w, h in zip(row, hidden, strict=True)) + bias[0])
            for row, bias in head
        ]

    def generate(self, prompt: list[int], max_tokens: int) -> dict[str, list]:
        ids, out = list(prompt), {name: [] for name in ("tokens", "ids", "bits", "margins", "f")}
        for _ in range(max_tokens):
            hidden = self.hidden(ids)
            bits = self.logit_bits(hidden)
            order = sorted(range(VOCAB), key=lambda i: (-ordinal(bits[i]), i))
            out["tokens"].append(order[0])
            out["ids"].append(order[:8])
            out["bits"].append([bits[i] for i in order[:8]])
            out["margins"].append(ordinal(bits[order[0]]) - ordinal(bits[order[1]]))
            out["f"].append([fingerprint([bf16(x) for x in hidden]), fingerprint(bits)])
            ids.append(order[0])
        rows = [self.hidden(prompt[: i + 1]) for i in range(len(prompt) - 1)]
        out["prompt_f"] = [fold([fingerprint([bf16(x) for x in row]) for row in rows]), 0]
        return out


def unsigned(x: Tensor) -> list:
    return [unsigned(row) for row in x] if x.dim() else int(x) & MASK


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("prompt", [[5], [7, 1], [23, 0, 11], [4, 9, 2, 17, 3, 3, 20]])
def test_generate_equals_the_twin(tmp_path: Path, arch: str, prompt: list[int]) -> None:
    trace = tiny(tmp_path, arch, exact=True).generate(prompt, 6)
    assert_equals_twin(trace, Twin(tiny_tensors(3, exact=True)).generate(prompt, 6))


def test_ties_and_negative_logits_equal_the_twin(tmp_path: Path) -> None:
    tensors = tiny_tensors(4, exact=True)
    half = VOCAB // 2
    tensors["lm_head.weight"][half:] = tensors["lm_head.weight"][:half]
    tensors["lm_head.bias"].fill_(-512)  # below every sum: the top logits have the sign bit
    path = write_tiny(tmp_path, tensors)
    trace = ContextLM.from_pretrained(path, contract=default_contract("sm_89")).generate([5, 3], 6)
    assert_equals_twin(trace, Twin(tensors).generate([5, 3], 6))
    assert (trace.top_bits >> 15 == 1).all()
    assert (trace.margins == 0).all()
    assert (trace.tokens < half).all()


def assert_equals_twin(trace: Trace, want: dict[str, list]) -> None:
    assert trace.tokens.tolist() == want["tokens"]
    assert trace.top_ids.tolist() == want["ids"]
    assert trace.top_bits.tolist() == want["bits"]
    assert trace.margins.tolist() == want["margins"]
    assert unsigned(trace.fingerprints) == want["f"]
    assert unsigned(trace.prompt_fingerprints) == want["prompt_f"]


def test_types_of_a_trace(tmp_path: Path) -> None:
    trace = tiny(tmp_path).generate([1, 2], 5)
    found = {name: (value.dtype, tuple(value.shape)) for name, value in vars(trace).items()}
    width = len(operations("context-lm"))
    assert found == {
        "tokens": (torch.int32, (5,)),
        "top_ids": (torch.int32, (5, 8)),
        "top_bits": (torch.int64, (5, 8)),
        "margins": (torch.int64, (5,)),
        "fingerprints": (torch.int64, (5, width)),
        "prompt_fingerprints": (torch.int64, (width,)),
    }


@pytest.mark.parametrize("arch", ARCHES)
def test_replay_is_generate(tmp_path: Path, arch: str) -> None:
    model = tiny(tmp_path, arch)
    prompts = [[0], [3, 5], torch.tensor([1, 2, 3, 4, 5, 6]), [PAD, PAD, PAD], [23] * 9]
    traces = [model.generate(prompt, 4 + i) for i, prompt in enumerate(prompts)]
    assert model.replay(prompts[2], traces[2].tokens).same_bits(traces[2])
    replayed = model.replay_many(prompts, [trace.tokens for trace in traces])
    assert all(got.same_bits(want) for got, want in zip(replayed, traces, strict=True))
    assert model.replay_many([], []) == []


def test_replay_shows_a_forged_token(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    truth = model.generate([4, 8], 12)
    forged = truth.tokens.clone()
    forged[5] = (forged[5] + 1) % VOCAB
    replayed = model.replay([4, 8], forged)
    assert torch.equal(replayed.tokens[:6], truth.tokens[:6])  # row 5 still chooses the truth
    assert replayed.tokens[5] != forged[5]
    assert torch.equal(replayed.fingerprints[:6], truth.fingerprints[:6])
    changed = (replayed.fingerprints[:, 0] != truth.fingerprints[:, 0]).tolist()
    assert changed == [6 <= row < 6 + CONTEXT for row in range(12)]  # the rows that see it


def test_hidden_rows_see_the_newest_first_and_padding(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    tables = [tiny_tensors(3, exact=False)[f"embed_tokens.{j}.weight"] for j in range(CONTEXT)]
    hidden = model.hidden(torch.tensor([9, 4, 7, 1]))
    contexts = [[9, PAD, PAD], [4, 9, PAD], [7, 4, 9], [1, 7, 4]]
    want = [torch.cat([tables[j][t] for j, t in enumerate(row)]) for row in contexts]
    assert torch.equal(hidden, torch.stack(want))


def test_logits_can_stay_in_fp32(tmp_path: Path) -> None:
    path = write_tiny(tmp_path, tiny_tensors(3, exact=False))
    contract = default_contract("sm_90", logits_dtype="float32")
    wide = ContextLM.from_pretrained(path, contract=contract).generate([5, 6], 3)
    narrow = ContextLM.from_pretrained(path, contract=default_contract("sm_90"))
    logits = wide.top_bits.int().view(torch.float32)
    row = narrow.logits(narrow.hidden(torch.tensor([5, 6]))[1:])
    assert logits[0, 0].bfloat16() == row.max()
    assert (wide.top_bits & 0xFFFF != 0).any()  # more bits than a bf16 has


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt 0: expected at least one token id"),
        ([1, VOCAB], r"prompt 0, position 1: .* 0 … 23 \(vocabulary of 24\), found 24"),
        ([-1], "prompt 0, position 0: .* found -1"),
        ([[1, 2]], "prompt 0: expected at least one token id, found shape"),
        ([1.0], "prompt 0: expected integer ids"),
    ],
)
def test_prompts_that_are_refused(tmp_path: Path, prompt: list[int], message: str) -> None:
    model = tiny(tmp_path)
    with pytest.raises(ValueError, match=message):
        model.generate(prompt, 2)
    with pytest.raises(ValueError, match=message):
        model.replay(prompt, [1, 2])


def test_errors_name_the_sequence(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    with pytest.raises(ValueError, match=r"prompt 2, position 1: .* found 99"):
        model.replay_many([[1], [2], [3, 99]], [[1], [1], [1]])
    with pytest.raises(ValueError, match=r"recorded tokens of prompt 1, position 0: .* found 99"):
        model.replay_many([[1], [2]], [[1], [99]])
    with pytest.raises(ValueError, match="2 prompts, but 1 recorded"):
        model.replay_many([[1], [2]], [[1]])
    with pytest.raises(ValueError, match="max_tokens of at least 1, found 0"):
        model.generate([1], 0)


def test_tokens_of_each_step_are_told(tmp_path: Path) -> None:
    model, seen = tiny(tmp_path), []
    traces = model.generate_many([[1], [2, 3], [4]], 5, on_tokens=seen.append)
    assert seen == [list(step) for step in zip(*(t.tokens.tolist() for t in traces), strict=True)]


def test_nan_logits_name_prompt_step_and_id(tmp_path: Path) -> None:
    read = load_checkpoint(write_tiny(tmp_path, tiny_tensors(3, exact=False)))
    # Rows whose newest token is 6 meet a NaN; a directory with one would not even load.
    read.tensors["embed_tokens.0.weight"][6, 1] = torch.nan
    model = ContextLM.from_pretrained(read, contract=default_contract("sm_89"))
    with pytest.raises(SequenceError, match=r"^prompt 1, step 2: .* NaN, first at id 0"):
        model.replay_many([[1], [2, 3]], [[1, 2, 3], [4, 6, 1]])
    seen: list[list[int]] = []
    with pytest.raises(SequenceError, match=r"^prompt 1, step 0: "):
        model.generate_many([[1], [6]], 3, on_tokens=seen.append)
    assert seen == []  # a step that went wrong chose nothing


def without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("lm_head.bias"), r"lm_head\.bias: missing"),
        (without("embed_tokens.2.weight"), r"embed_tokens\.2\.weight: missing"),
        (lambda t: t.update({"norm.weight": torch.ones(1)}), r"norm\.weight: not a tensor"),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(VOCAB, 9).bfloat16()}),
            r"lm_head\.weight: expected torch\.bfloat16 \[24, 15\], found .* \[24, 9\]",
        ),
        (
            lambda t: t.update({"lm_head.bias": torch.ones(VOCAB)}),
            r"lm_head\.bias: expected torch\.bfloat16 \[24\], found torch\.float32",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    tensors = tiny_tensors(3, exact=False)
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        ContextLM.from_pretrained(write_tiny(tmp_path, tensors), contract=default_contract("sm_90"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "expected model_type 'context-lm', found 'llama'"),
        ({"pad_token_id": VOCAB}, "expected pad_token_id below vocab_size 24, found 24"),
        ({"context_size": 2}, r"embed_tokens\.2\.weight: not a tensor of this model"),
        ({"vocab_size": 7}, "'vocab_size' to be an integer of at least 8, found 7"),
        ({"embedding_size": None}, "'embedding_size' to be an integer"),
        ({"torch_dtype": "int8"}, "'torch_dtype' to be one of"),
    ],
)
def test_config_that_does_not_fit(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = write_tiny(tmp_path, tiny_tensors(3, exact=False), **changes)
    with pytest.raises(CheckpointError, match=message):
        ContextLM.from_pretrained(path, contract=default_contract("sm_90"))


@pytest.fixture(scope="module")
def real() -> Checkpoint:
    return load_checkpoint(REAL)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer(REAL)
    lines = (GOLDEN / "prompts" / "context-lm.jsonl").read_text(encoding="utf-8").splitlines()
    return [tokenizer.encode(json.loads(line)["text"]).ids for line in lines]


@pytest.mark.parametrize("arch", ARCHES)
def test_real_replay_is_generate(real: Checkpoint, prompts: list[list[int]], arch: str) -> None:
    model = ContextLM.from_pretrained(real, contract=default_contract(arch))
    chosen = prompts[:4]
    traces = [model.generate(prompt, 8) for prompt in chosen]
    replayed = model.replay_many(chosen, [trace.tokens for trace in traces])
    assert all(got.same_bits(want) for got, want in zip(replayed, traces, strict=True))


def test_real_suite_visits_many_contexts(real: Checkpoint, prompts: list[list[int]]) -> None:
    model = ContextLM.from_pretrained(real, contract=default_contract("sm_90"))
    ids = [torch.tensor(prompt) for prompt in prompts]
    visited = set()
    for _ in range(12):  # of the suite's 64 steps: enough to see it
        last = [sequence[-model.context_size :] for sequence in ids]
        visited |= {tuple(context.tolist()) for context in last}
        tokens = greedy(model.logits(torch.cat([model.hidden(context)[-1:] for context in last])))
        ids = [
            torch.cat([sequence, token[None]]) for sequence, token in zip(ids, tokens, strict=True)
        ]
    assert len(visited) >= 500
