"""Model directories: what is read, what its digest covers, and everything that is refused."""

import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from bitassay.reference.checkpoints.checkpoint import (
    CheckpointError,
    config_dtype,
    config_int,
    load_checkpoint,
    load_tokenizer,
    require,
)
from support.fresh_python import FreshPython
from support.paths import GOLDEN

CONFIG = {"model_type": "tiny", "vocab_size": 8, "torch_dtype": "bfloat16"}
REAL = GOLDEN / "models" / "context-lm"


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "b.weight": torch.randn(8, 4, generator=generator).bfloat16(),
        "a.weight": torch.randn(3, generator=generator).bfloat16(),
        "c.ids": torch.arange(5),
    }


def write_single(folder: Path, content: dict[str, Tensor] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(content or tensors(), folder / "model.safetensors")
    return folder


def write_sharded(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    weight_map = {}
    for i, (name, tensor) in enumerate(tensors().items()):
        file = f"model-{i + 1:05d}-of-00003.safetensors"
        save_file({name: tensor}, folder / file)
        weight_map[name] = file
    index = {"metadata": {"total_size": 110}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(write_single(tmp_path))
    assert checkpoint.config == CONFIG
    assert list(checkpoint.tensors) == ["a.weight", "b.weight", "c.ids"]
    for name, tensor in tensors().items():
        assert checkpoint.tensors[name].dtype == tensor.dtype
        assert torch.equal(checkpoint.tensors[name], tensor)
    assert checkpoint.tokenizer_digest is None


def test_digest_is_the_documented_sha256(tmp_path: Path) -> None:
    content = {"w": torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16)}
    digest = load_checkpoint(write_single(tmp_path, content)).digest
    text = (
        b'{"model_type":"tiny","torch_dtype":"bfloat16","vocab_size":8}\n'
        b'["w","bfloat16",[1,2]]\n\x80\x3f\x00\xc0'
    )
    assert digest == hashlib.sha256(text).hexdigest()


def test_digest_does_not_depend_on_sharding(tmp_path: Path) -> None:
    single = load_checkpoint(write_single(tmp_path / "single"))
    sharded = load_checkpoint(write_sharded(tmp_path / "sharded"))
    assert single.digest == sharded.digest
    assert list(single.tensors) == list(sharded.tensors)


def test_digest_ignores_how_the_config_is_written(tmp_path: Path) -> None:
    before = load_checkpoint(write_single(tmp_path)).digest
    (tmp_path / "config.json").write_text(
        json.dumps(dict(reversed(list(CONFIG.items()))), indent=7)
    )
    assert load_checkpoint(tmp_path).digest == before


def flip_a_bit(content: dict[str, Tensor]) -> None:
    content["b.weight"].view(torch.int16)[7, 3] ^= 1


def negate_a_zero(content: dict[str, Tensor]) -> None:
    content["c.ids"] = torch.zeros(5)
    content["c.ids"][0] = -0.0


def reshape(content: dict[str, Tensor]) -> None:
    content["b.weight"] = content["b.weight"].reshape(4, 8)


def reinterpret(content: dict[str, Tensor]) -> None:
    content["a.weight"] = content["a.weight"].view(torch.float16)


def rename(content: dict[str, Tensor]) -> None:
    content["a.weights"] = content.pop("a.weight")


def drop(content: dict[str, Tensor]) -> None:
    del content["c.ids"]


def test_every_change_changes_the_digest(tmp_path: Path) -> None:
    digests = {load_checkpoint(write_single(tmp_path)).digest}
    changes = [flip_a_bit, negate_a_zero, reshape, reinterpret, rename, drop]
    for change in changes:
        content = tensors()
        change(content)
        digests.add(load_checkpoint(write_single(tmp_path, content)).digest)
    write_single(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 9}))
    digests.add(load_checkpoint(tmp_path).digest)
    assert len(digests) == len(changes) + 2


def test_weights_stay_when_the_file_is_rewritten(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(write_single(tmp_path))
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as stream:  # in place, so that a mapping would show it
        stream.seek(-32, os.SEEK_END)
        stream.write(b"\x01" * 32)
    for name, tensor in tensors().items():
        assert torch.equal(checkpoint.tensors[name], tensor)


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def git_lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def both_layouts(folder: Path) -> None:
    write_sharded(folder)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def bad_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"vocab_size": ')


def json_array(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")


def json_nan(folder: Path) -> None:
    (folder / "config.json").write_text('{"scale": NaN}')


def not_utf8(folder: Path) -> None:
    (folder / "config.json").write_bytes(b'{"\xff\xfe": 1}')


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def nested_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 100_000)


def nested_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"a":' * 100_000)


def bad_tokenizer_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"model\.safetensors: expected a complete safetensors file"),
        (empty, r"model\.safetensors: expected a complete safetensors file"),
        (git_lfs_pointer, "Git LFS pointer"),
        (both_layouts, "found both: remove one"),
        (no_config, r"config\.json: expected a JSON object, found no such file"),
        (bad_json, r"config\.json: expected a JSON object, found what cannot be read"),
        (json_array, r"config\.json: expected a JSON object, found list"),
        (json_nan, "NaN is not JSON"),
        (not_utf8, r"config\.json: expected a JSON object, found what cannot be read"),
        (no_weights, "or pytorch_model.bin, found none: download"),
        (nested_config, r"config\.json: expected a JSON object, found what .*recursion"),
        (nested_tokenizer, r"tokenizer\.json: expected a JSON object, found what .*recursion"),
        (bad_tokenizer_json, r"tokenizer\.json: expected a JSON object"),
    ],
)
def test_damaged_directory(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    load_checkpoint(write_single(tmp_path))
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_nesting_is_refused_at_every_depth_that_python_cannot_take(
    tmp_path: Path, name: str
) -> None:
    """Writing again, for the digest, takes a few levels more than reading."""
    write_single(tmp_path)
    refused = []
    for depth in range(900, 1001):
        (tmp_path / name).write_text('{"a":' * depth + "1" + "}" * depth)
        try:
            load_checkpoint(tmp_path)
        except CheckpointError:
            refused.append(depth)
    assert refused == list(range(refused[0], 1001))


@pytest.mark.parametrize("keep", [7, 8, 40])
def test_truncation_anywhere(tmp_path: Path, keep: int) -> None:
    file = write_single(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="expected a complete safetensors file"):
        load_checkpoint(tmp_path)


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected a directory .* found nothing"):
        load_checkpoint(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"expected a directory .* found a file"):
        load_checkpoint(tmp_path / "file")


def rewrite_index(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


SHARD = "model-00001-of-00003.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(extra=SHARD), r"missing \['extra'\]"),
        (lambda m: m.update({"a.weight": SHARD}), r"missing \['a.weight'\]"),
        (lambda m: m.update({"a.weight": "absent.safetensors"}), "found no such file"),
        (lambda m: m.update({"a.weight": "../a.safetensors"}), "name of a file beside it"),
        (lambda m: m.update({"a.weight": 3}), "name of a file beside it"),
        (lambda m: m.clear(), "expected 'weight_map'"),
    ],
)
def test_index_that_does_not_fit(
    tmp_path: Path, change: Callable[[dict[str, object]], object], message: str
) -> None:
    rewrite_index(write_sharded(tmp_path), change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


def test_tensor_that_the_index_does_not_list(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    save_file({"b.weight": tensors()["b.weight"], "stray": torch.ones(1)}, tmp_path / SHARD)
    with pytest.raises(CheckpointError, match=r"not listed \['stray'\]"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    weight = torch.zeros(4, 6, dtype=dtype)
    weight[2, 5] = weight[3, 0] = value
    write_single(tmp_path, {"fine": torch.ones(2), "z.weight": weight})
    with pytest.raises(CheckpointError, match=rf"{value} in z\.weight at \[2, 5\], .* of 2:"):
        load_checkpoint(tmp_path)


def test_fp8_nan_is_found(tmp_path: Path) -> None:
    weight = torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match=r"nan in w at \[1\]"):
        load_checkpoint(write_single(tmp_path, {"w": weight}))


def test_the_largest_finite_weight_is_allowed(tmp_path: Path) -> None:
    weight = torch.tensor([torch.finfo(torch.bfloat16).max], dtype=torch.bfloat16)
    assert torch.equal(load_checkpoint(write_single(tmp_path, {"w": weight})).tensors["w"], weight)


def test_require(tmp_path: Path) -> None:
    content = {name: tensors()[name] for name in ("a.weight", "b.weight")}
    checkpoint = load_checkpoint(write_single(tmp_path, content))
    shapes = {"b.weight": (8, 4), "a.weight": (3,)}
    assert list(require(checkpoint, shapes, torch.bfloat16)) == ["b.weight", "a.weight"]
    with pytest.raises(CheckpointError, match=r"d\.weight: missing"):
        require(checkpoint, shapes | {"d.weight": (1,)}, torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"a\.weight: not a tensor of this model"):
        require(checkpoint, {"b.weight": (8, 4)}, torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"expected torch\.bfloat16 \[4, 8\], found .*8, 4"):
        require(checkpoint, shapes | {"b.weight": (4, 8)}, torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"expected torch\.float16 .* torch\.bfloat16"):
        require(checkpoint, shapes, torch.float16)


@pytest.mark.parametrize("value", ["8", 8.0, True, None, 0, -1])
def test_config_int_refuses(tmp_path: Path, value: object) -> None:
    write_single(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"size": value}))
    with pytest.raises(CheckpointError, match=r"'size' to be an integer of at least 1, found"):
        config_int(load_checkpoint(tmp_path), "size")


def test_config_values(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(write_single(tmp_path))
    assert config_int(checkpoint, "vocab_size", minimum=8) == 8
    assert config_dtype(checkpoint) == torch.bfloat16
    with pytest.raises(CheckpointError, match="found nothing"):
        config_int(checkpoint, "absent")
    checkpoint.config["torch_dtype"] = "int4"
    with pytest.raises(CheckpointError, match=r"'torch_dtype' to be one of .*'int4'"):
        config_dtype(checkpoint)


def test_reading_weights_does_not_import_tokenizers(
    fresh_python: FreshPython, tmp_path: Path
) -> None:
    program = (
        "import sys; from bitassay.reference.checkpoints.checkpoint import load_checkpoint; "
        f"load_checkpoint({str(write_single(tmp_path))!r}); assert 'tokenizers' not in sys.modules"
    )
    done = fresh_python.run(program)
    assert done.returncode == 0, done.stderr


def test_tokenizer_digest_follows_the_tokenizer(tmp_path: Path) -> None:
    write_single(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"a": 1, "b": [1, 2]}')
    first = load_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"b": [1,2],\n"a": 1}')
    rewritten = load_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"a": 1, "b": [2, 1]}')
    other = load_checkpoint(tmp_path)
    assert first.tokenizer_digest == rewritten.tokenizer_digest != other.tokenizer_digest
    assert first.digest == other.digest


def test_tokenizer_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found no such file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": "none"}')
    with pytest.raises(CheckpointError, match="expected a tokenizer"):
        load_tokenizer(tmp_path)


def test_real_tokenizer_knows_every_byte() -> None:
    tokenizer = load_tokenizer(REAL)
    config = load_checkpoint(REAL).config
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(config["vocab_size"]))
    assert vocabulary["<|endoftext|>"] == config["pad_token_id"] == config["eos_token_id"]
    # The byte-level alphabet: printable Latin-1 stands for itself, the rest from U+0100 on.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = [chr(0x100 + i) for i in range(256 - len(printable))]
    assert set(map(chr, printable)) | set(shifted) <= vocabulary.keys()


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_real_tokenizer_is_lossless(text: str) -> None:
    tokenizer = real_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@functools.cache
def real_tokenizer() -> Tokenizer:
    return load_tokenizer(REAL)


def test_prompts_fit_the_tokenizer() -> None:
    tokenizer = load_tokenizer(REAL)
    lines = (GOLDEN / "prompts" / "context-lm.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line) for line in lines]
    assert len(prompts) >= 64
    assert len({prompt["id"] for prompt in prompts}) == len(prompts)
    assert len({prompt["text"] for prompt in prompts}) == len(prompts)
    lengths = []
    for prompt in prompts:
        assert prompt.keys() == {"id", "text", "source"}
        ids = tokenizer.encode(prompt["text"]).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == prompt["text"]
        lengths.append(len(ids))
    assert 1 <= min(lengths) < 4  # shorter than the context
    assert 30 < max(lengths) <= 40  # and much longer


def write_pickled(folder: Path, content: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.save(content, folder / "pytorch_model.bin")
    return folder


def test_a_pickled_file_is_the_same_checkpoint(tmp_path: Path) -> None:
    """Strided views and integers included."""
    content = tensors() | {"d.mask": torch.tensor([True, False, True])}
    single = load_checkpoint(write_single(tmp_path / "single", content))
    turned = content | {"b.weight": content["b.weight"].t().contiguous().t()}
    pickled = load_checkpoint(write_pickled(tmp_path / "pickled", turned))
    assert pickled.digest == single.digest
    assert list(pickled.tensors) == list(single.tensors)
    for name, tensor in single.tensors.items():
        assert torch.equal(pickled.tensors[name], tensor)
        assert pickled.tensors[name].is_contiguous()


def test_safetensors_are_read_before_a_pickled_file(tmp_path: Path) -> None:
    """Many repositories publish both."""
    before = load_checkpoint(write_single(tmp_path)).digest
    write_pickled(tmp_path, {"other": torch.ones(1)})
    assert load_checkpoint(tmp_path).digest == before


class Payload:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (os.mkdir, ("payload-was-run",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Payload(), "tensors as torch.save writes them and nothing else"),
        ([torch.ones(1)], "a dictionary of tensors by name, found list"),
        ({"a": 1.0}, "a dense tensor for every name, found float for 'a'"),
        ({3: torch.ones(1)}, "a dense tensor for every name, found Tensor for 3"),
        ({"a": torch.ones(2, 2).to_sparse()}, "a dense tensor for every name, found Tensor"),
        ({"a": torch.ones(2, device="meta")}, "a dense tensor for every name, found Tensor"),
        ({"a": torch.tensor([1.0, torch.nan])}, "expected finite weights, found nan in a at"),
    ],
)
def test_pickled_files_that_are_refused(
    tmp_path: Path, content: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(write_pickled(tmp_path, content))
    assert not (tmp_path / "payload-was-run").exists()


def test_a_truncated_pickled_file_is_refused(tmp_path: Path) -> None:
    write_pickled(tmp_path, tensors())
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="what cannot be read .*download it again"):
        load_checkpoint(tmp_path)
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        load_checkpoint(tmp_path)
