"""A tiny target, a draft head that often agrees with it, and prompts, as a suite of its own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from bitassay.golden.inputs.suite_inputs import Inputs, load_inputs
from bitassay.golden.suites import own_suite
from support.tiny_eagle import write_tiny_eagle
from support.tiny_llama import write_tiny_llama

STEPS = 12
LENGTHS = (1, 20, 3)


def write_pair(folder: Path, kind: str = "eagle") -> tuple[Path, Path]:
    """A target of which the next token depends little on all but the last, and a head like it."""
    layers = 2 if kind == "eagle" else 6  # an EAGLE-3 head is fed by three of them
    target = write_tiny_llama(folder / "target", num_hidden_layers=layers)
    head = write_tiny_eagle(folder / "head", target, kind=kind)
    for model in (target, head):
        weights = load_file(model / "model.safetensors")
        for name, weight in weights.items():
            if "o_proj" in name or "down_proj" in name:
                weight *= 0.04
            elif "norm" in name:
                weight.fill_(1)
        if kind == "eagle" and model == head:
            weights["fc.weight"].zero_()
            weights["fc.weight"][:, :64] = torch.eye(64)
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return target, head


def write_prompts(path: Path) -> Path:
    """Write prompts of LENGTHS random tokens."""
    random = np.random.default_rng(4)
    ids = [random.integers(0, 128, length).tolist() for length in LENGTHS]
    lines = [json.dumps({"id": f"p{i}", "token_ids": own}) for i, own in enumerate(ids)]
    path.write_text("\n".join(lines) + "\n")
    return path


def load_pair(folder: Path, arch: str = "sm_90") -> Inputs:
    """Return what a golden of the pair in a folder follows from."""
    suite = own_suite(
        folder / "target",
        folder / "prompts.jsonl",
        STEPS,
        arches=(arch,),
        draft=folder / "head",
        name="pair",
    )
    return load_inputs(suite, arch)
