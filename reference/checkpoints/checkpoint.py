"""Reads a Hugging Face model directory and refuses whatever is not exactly what it should be.

Layout: https://huggingface.co/docs/safetensors (one file, or shards listed by an index), or else
pytorch_model.bin as `torch.save` writes it; config.json, and tokenizer.json where there is one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitassay.reference.spec.dtypes import with_role

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"  # read only where there are no safetensors: many publish both

_DTYPES = {record.name: record.dtype for record in with_role("weight")}


class CheckpointError(ValueError):
    """A model directory that cannot be used; says what was expected, what was found, what to do."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model directory as read: configuration, weights by name (sorted), and what they are.

    digest: sha256 (hex) over the configuration and every tensor's name, dtype, shape and bytes, so
    the same for any sharding and either form of file. tokenizer_digest: sha256 (hex) over
    tokenizer.json, None where the directory has none.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    digest: str
    tokenizer_digest: str | None


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a model directory into CPU memory.

    Raises CheckpointError for a missing or unreadable file, JSON that is not an object, truncated
    or inconsistent weights, and weights that are NaN or infinite. Nothing in a pickled file is run.
    """
    folder = Path(path)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise CheckpointError(
            f"checkpoint {folder}: expected a directory with config.json and {WEIGHTS}, found "
            f"{found}: name a Hugging Face model directory"
        )
    config = _read_object(folder / "config.json")
    tensors = dict(sorted(_read_tensors(folder)))
    for name, tensor in tensors.items():
        _refuse_non_finite(folder, name, tensor)
    tokenizer = folder / "tokenizer.json"
    tokenizer_digest = (
        hashlib.sha256(_canonical(_read_object(tokenizer))).hexdigest()
        if tokenizer.exists()
        else None
    )
    return Checkpoint(folder, config, tensors, _digest(config, tensors), tokenizer_digest)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read the tokenizer.json of a model directory; needs the package `tokenizers`.

    Raises CheckpointError when it is missing or not a tokenizer.
    """
    from tokenizers import Tokenizer  # here, so that the weights alone can be read without it

    file = Path(path) / "tokenizer.json"
    content = _read_object(file)
    try:
        return Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the package raises bare Exception
        raise CheckpointError(
            f"{file}: expected a tokenizer of the package tokenizers, found one it cannot read "
            f"({error}): restore the file"
        ) from error


def require(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the tensors a model needs, in the order named, once they are exactly those.

    Raises CheckpointError naming every tensor that is missing, is there without being asked for,
    or has another shape or dtype.
    """
    wrong = [f"{name}: missing" for name in shapes if name not in checkpoint.tensors]
    for name, tensor in checkpoint.tensors.items():
        if name not in shapes:
            wrong.append(f"{name}: not a tensor of this model")
        elif tuple(tensor.shape) != shapes[name] or tensor.dtype != dtype:
            wrong.append(
                f"{name}: expected {dtype} {list(shapes[name])}, "
                f"found {tensor.dtype} {list(tensor.shape)}"
            )
    if wrong:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} does not fit its config.json:\n  "
            + "\n  ".join(wrong)
            + "\ncorrect config.json, or export the weights again"
        )
    return {name: checkpoint.tensors[name] for name in shapes}


def config_int(checkpoint: Checkpoint, key: str, *, minimum: int = 1) -> int:
    """Return an integer of config.json; CheckpointError when missing, no integer, or too small."""
    value = checkpoint.config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        found = repr(value) if key in checkpoint.config else "nothing"
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'}: expected {key!r} to be an integer of at least "
            f"{minimum}, found {found}: correct config.json"
        )
    return value


def config_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the weights' dtype that config.json names; CheckpointError for one not supported."""
    value = checkpoint.config.get("torch_dtype", checkpoint.config.get("dtype"))
    if not isinstance(value, str) or value not in _DTYPES:
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'}: expected 'torch_dtype' to be one of "
            f"{', '.join(_DTYPES)}, found {value!r}: correct config.json"
        )
    return _DTYPES[value]


def _read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    single, index = folder / WEIGHTS, folder / INDEX
    if single.exists() and index.exists():
        raise CheckpointError(
            f"checkpoint {folder}: expected either {WEIGHTS} or {INDEX}, found both: remove one"
        )
    if not index.exists():
        if not single.exists() and (folder / PICKLED).exists():
            yield from _read_pickled(folder / PICKLED)
            return
        if not single.exists():
            raise CheckpointError(
                f"checkpoint {folder}: expected {WEIGHTS}, {INDEX} or {PICKLED}, found none: "
                "download the weights, or convert them to safetensors"
            )
        yield from _read_safetensors(single)
        return
    shards = _read_index(index)
    for shard, names in sorted(shards.items()):
        found = dict(_read_safetensors(folder / shard))
        if found.keys() != names:
            raise CheckpointError(
                f"{folder / shard}: expected the tensors that {INDEX} lists; missing "
                f"{sorted(names - found.keys())}, not listed {sorted(found.keys() - names)}: "
                "download the shards and their index again, together"
            )
        yield from found.items()


def _read_index(index: Path) -> dict[str, set[str]]:
    weight_map = _read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: expected 'weight_map' from tensor to file name, found {weight_map!r}: "
            "download the index again"
        )
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        # A plain name beside the index: a path could lead out of the directory.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(
                f"{index}: expected the name of a file beside it for {name!r}, found {shard!r}: "
                "download the index again"
            )
        shards.setdefault(shard, set()).add(name)
    return shards


def _read_safetensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as source:
            for name in source.keys():  # noqa: SIM118  (not a dict: it cannot be iterated itself)
                # A copy: the file is mapped, and weights must not change once their digest is known
                yield name, source.get_tensor(name).clone()
    except (SafetensorError, OSError) as error:
        found = f"what cannot be read ({error})" if file.exists() else "no such file"
        raise CheckpointError(
            f"{file}: expected a complete safetensors file, found {found}: download it again "
            "(a Git LFS pointer is not the file)"
        ) from error


def _read_pickled(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle each raise their own
        raise CheckpointError(
            f"{file}: expected tensors as torch.save writes them and nothing else, found what "
            f"cannot be read ({error}): download it again (a Git LFS pointer is not the file), or "
            "convert the weights to safetensors"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{file}: expected a dictionary of tensors by name, found {type(content).__name__}: "
            "export the weights again"
        )
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or not _is_plain(tensor):
            found = f"{type(tensor).__name__} for {name!r}"
            raise CheckpointError(
                f"{file}: expected a dense tensor for every name, found {found}: export the "
                "weights again"
            )
        # A copy: several names may share memory, and views may be strided.
        yield name, tensor.detach().clone(memory_format=torch.contiguous_format)


def _is_plain(tensor: Tensor) -> bool:
    dense = tensor.layout == torch.strided and not tensor.is_quantized
    return dense and tensor.device.type == "cpu"


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes(), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file}: expected a JSON object, found no such file: name a complete model directory"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: expected a JSON object, found what cannot be read ({error}): restore the file"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{file}: expected a JSON object, found {type(value).__name__}: restore the file"
        )
    return value


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _refuse_non_finite(folder: Path, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        return
    # Eight-bit floats have no isfinite of their own; widening is exact.
    finite = (tensor.float() if tensor.element_size() == 1 else tensor).isfinite()
    if not finite.all():
        at = (~finite).nonzero()[0].tolist()
        raise CheckpointError(
            f"checkpoint {folder}: expected finite weights, found {float(tensor[tuple(at)])} in "
            f"{name} at {at}, the first of {int((~finite).sum())}: export the weights again"
        )


def _canonical(value: object) -> bytes:
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    except RecursionError as error:  # writing takes a few levels more than reading
        raise CheckpointError(
            f"config.json, tokenizer.json: expected JSON of few levels, found too many ({error}): "
            "restore the files"
        ) from error


def _digest(config: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Every part is one JSON line that fixes the length of the bytes after it."""
    digest = hashlib.sha256(_canonical(config) + b"\n")
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(_canonical([name, dtype, list(tensor.shape)]) + b"\n")
        # Stored bytes are little-endian, as safetensors prescribes and all supported CPUs are.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
