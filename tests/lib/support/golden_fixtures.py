"""A tiny model, a tiny suite for both architectures, and a store made by recording it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bitassay.cli import main
from bitassay.golden import suites
from bitassay.golden.provenance import Identity, Provenance
from bitassay.golden.runs import oracle
from bitassay.golden.streams.drafts import DraftStream
from bitassay.golden.streams.token_stream import TOP, TokenStream, ragged
from bitassay.golden.suites import Suite
from bitassay.reference.spec.contract import DRAFT_DEPTH
from support.tiny_pair import load_pair, write_pair
from support.tiny_pair import write_prompts as write_pair_prompts

VOCAB, CONTEXT, EMBEDDING = 256, 3, 16
TEXTS = ("d", "def f(x):", "import os\n", "\nclass A:\n    pass", "x = [i for i", "é → ü")
STEPS = 7
NAMES = ("tiny/sm_89", "tiny/sm_90")


def write_model(folder: Path, seed: int = 3) -> None:
    """A context-lm of random weights whose tokens are bytes."""
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).bfloat16()

    tensors = {f"embed_tokens.{j}.weight": weight(VOCAB, EMBEDDING) for j in range(CONTEXT)}
    tensors["lm_head.weight"] = weight(VOCAB, CONTEXT * EMBEDDING)
    tensors["lm_head.bias"] = weight(VOCAB)
    save_file(tensors, folder / "model.safetensors")
    config = {
        "architectures": ["ContextLM"],
        "model_type": "context-lm",
        "vocab_size": VOCAB,
        "context_size": CONTEXT,
        "embedding_size": EMBEDDING,
        "torch_dtype": "bfloat16",
        "pad_token_id": 0,
        "eos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def write_prompts(path: Path, texts: tuple[str, ...] = TEXTS) -> None:
    lines = [json.dumps({"id": f"p{i}", "text": text}) for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n")


def make_suite(folder: Path) -> Suite:
    write_model(folder / "model")
    write_prompts(folder / "prompts.jsonl")
    arches = tuple(name.partition("/")[2] for name in NAMES)
    return Suite("tiny", folder / "model", folder / "prompts.jsonl", STEPS, arches)


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny suite and its recorded store; tests copy it."""
    folder = tmp_path_factory.mktemp("recorded")
    suite = make_suite(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CI", raising=False)
        patch.setattr(suites, "SUITES", {suite.name: suite})
        status = main(["record", "--all", "--accept", "--store", str(folder / "store")])
    assert status == 0
    return folder


@pytest.fixture
def folder(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This test's own copy of suite and store; the suite is the only one there is."""
    copy = tmp_path / "copy"
    shutil.copytree(recorded, copy)
    suite = Suite("tiny", copy / "model", copy / "prompts.jsonl", STEPS, ("sm_89", "sm_90"))
    monkeypatch.setattr(suites, "SUITES", {suite.name: suite})
    monkeypatch.setenv("BITASSAY_STORE", str(copy / "store"))
    return copy


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command; returns exit status, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(list(arguments))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


MakeStream = Callable[..., TokenStream]


@pytest.fixture(scope="session")
def make_stream() -> MakeStream:
    """Make a stream of made-up values: make_stream(seed, prompts, steps)."""

    def make(seed: int = 0, prompts: int = 3, steps: int = 4) -> TokenStream:
        random = np.random.RandomState(seed)  # its numbers are frozen: a digest is pinned on them
        rows = (prompts, steps)
        return TokenStream(
            **ragged([[1] * (s + 1) for s in range(prompts)]),
            tokens=random.randint(0, 50, rows, dtype=np.int32),
            top_ids=random.randint(0, 50, (*rows, TOP), dtype=np.int32),
            top_bits=random.randint(0, 2**16, (*rows, TOP), dtype=np.uint32),
            margins=random.randint(0, 9, rows, dtype=np.int64),
            fingerprints=random.randint(0, 2**64, (*rows, 2), dtype=np.uint64),
            prompt_fingerprints=random.randint(0, 2**64, (prompts, 2), dtype=np.uint64),
            operations=("embedding", "lm_head"),
            prompt_names=tuple(f"p{s}" for s in range(prompts)),
            logits_dtype="bfloat16",
            vocab_size=50,
        )

    return make


DRAFT_OPERATIONS = ("draft.fc", "draft.attention", "draft.lm_head")


@pytest.fixture(scope="session")
def make_drafted(make_stream) -> MakeStream:
    """Make a stream with drafts of which most are right: make_drafted(seed, prompts, steps)."""

    def make(seed: int = 0, prompts: int = 3, steps: int = 12) -> TokenStream:
        stream = make_stream(seed, prompts, steps)
        random = np.random.RandomState(seed + 1)
        tokens = np.full((prompts, steps, DRAFT_DEPTH), -1, "<i4")
        accepted = np.zeros((prompts, steps), "<i4")
        for s, t in np.ndindex(prompts, steps):
            for j in range(max(0, min(DRAFT_DEPTH, steps - 2 - t))):
                right = int(stream.tokens[s, t + 1 + j])
                chosen = right if random.random_sample() < 0.7 else (right + 1) % 50
                tokens[s, t, j] = chosen
                if chosen != right:
                    break
                accepted[s, t] += 1
        shape = (prompts, steps, DRAFT_DEPTH, len(DRAFT_OPERATIONS))
        row_fingerprints = random.randint(1, 2**64, shape, dtype=np.uint64)
        row_fingerprints[tokens < 0] = 0
        folds = random.randint(1, 2**64, (prompts, len(DRAFT_OPERATIONS)), dtype=np.uint64)
        drafts = DraftStream(tokens, accepted, row_fingerprints, folds, DRAFT_OPERATIONS)
        return replace(stream, drafts=drafts)

    return make


@pytest.fixture(scope="session")
def provenance() -> Provenance:
    names = ("contract", "model", "tokenizer", "prompts", "rotary_table")
    digests = {name: name[0] * 64 for name in names}
    identity = Identity("made-up", "sm_90", contract_version=1, tokens=4, **digests)
    return Provenance(identity, {"torch": "2"}, "abc", False, "2025-01-01T00:00:00Z")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with a target, a head and prompts, by kind of head."""
    folders = {}
    for kind in ("eagle", "eagle3"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        write_pair(folders[kind], kind)
        write_pair_prompts(folders[kind] / "prompts.jsonl")
    return folders


@pytest.fixture(scope="session")
def generated(pairs: dict[str, Path]) -> TokenStream:
    """What is generated with the EAGLE-1 head for sm_90, in one process."""
    inputs = load_pair(pairs["eagle"])
    return oracle.generate(inputs.job, inputs.facts, lambda *_: None)
