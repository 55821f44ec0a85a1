"""Writing a Hugging Face model directory: JSON as people read it, weights rounded to bf16."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


def round_weights(model: nn.Module) -> dict[str, Tensor]:
    """Round the weights to bf16, in place in the fp32 model, and return them as bf16 tensors."""
    rounded = {}
    for name, parameter in model.named_parameters():
        rounded[name] = parameter.detach().to(torch.bfloat16)
        parameter.data.copy_(rounded[name])
    return rounded


def save_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write model.safetensors; the tensors may lie on any device."""
    weights = folder / "model.safetensors"
    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
        weights,
        metadata={"format": "pt"},
    )
    weights.chmod(0o644)  # the library leaves it readable by its owner alone


def write_json(path: Path, value: object) -> None:
    """Write one JSON value, indented, with a last newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
