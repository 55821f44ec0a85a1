"""The contract and the hardware facts: frozen data whose digest no change escapes."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace

import pytest

from bitassay.reference.spec import contract as module
from bitassay.reference.spec import polynomials
from bitassay.reference.spec.arch import ARCHES, Arch, TensorCore, get_arch
from bitassay.reference.spec.contract import (
    CONTRACT_VERSION,
    DRAFT_DEPTH,
    DRAFT_KINDS,
    Contract,
    default_contract,
    draft_operations,
    operations,
)
from support.naive import tensor_core as twin

# A digest may change together with the version alone. Never edit the lines of a released version:
# add those of the new one.
DIGESTS = {
    1: {
        "sm_80": "68a9724b049ee97ff7ffb9b2db5cc6ce279eef8ba68a562da0aa222dfc9ce649",
        "sm_86": "691d46e91f4744ddb6c8983df8715f7468595d53cd8751ba308e2d528e7f2320",
        "sm_89": "541819f110fb3c2a62a9a0d00add71f783faa2a73a9d4baa46f6c7b8da300a9d",
        "sm_90": "148bf076001ded7326e0cd4989e44499d628e908ab05df8112fc61049dac1d13",
    },
    2: {
        "sm_80": "0bc7fbf94ae2a111fbd768329ddc380be39bf8f3b8312e225af98ea4a5500d20",
        "sm_86": "1b2263c86c830346f58b08a4e4e2b716d4740842f254660515b593e44da4a395",
        "sm_89": "9b8d6ca79224df1983e4b8446a1f641224ebf312f350429d9f50decd3b20dd0a",
        "sm_90": "1f21eaebf343fce324f601679a9b32981b0e7d9f72a1d0ec6fb0502d757143a2",
    },
    3: {
        "sm_80": "eb1ff1b3a18f97e067e3f9dcbd7d31770cb5b2f0955e66c7755b753d6a01fbb4",
        "sm_86": "6b5718aab6cf691f7c3a6bec8841204ebe2b1b9d005356c925eff374867f0e4c",
        "sm_89": "463b82e2f45656720f40d80165ffae132a7540630d533b5c479d29eaf749a964",
        "sm_90": "b25abb5814953a6f0aa2dfa71996e4002e37ab3660875b15f63dbff35594ab02",
    },
}


@pytest.mark.parametrize("arch", list(ARCHES))
def test_version_pins_the_digest(arch: str) -> None:
    pinned = DIGESTS[CONTRACT_VERSION][arch]
    assert default_contract(arch).digest == pinned, (
        f"the order contract of {arch} changed: raise CONTRACT_VERSION and pin the new digest"
    )


def test_digests_are_all_different() -> None:
    contracts = [
        default_contract(arch, logits_dtype=dtype)
        for arch in ARCHES
        for dtype in ("weight", "float32")
    ]
    contracts.append(replace(contracts[0], version=CONTRACT_VERSION + 1))
    changes = ({"key_block": 32}, {"key_split": 2048}, {"sum_width": 2048})
    contracts += [default_contract("sm_90", **change) for change in changes]
    assert len({contract.digest for contract in contracts}) == len(contracts)


def test_a_changed_fact_or_order_changes_the_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    contract = default_contract("sm_90")
    before = contract.digest
    sm_90 = ARCHES["sm_90"]
    for field in ("group", "fraction_bits", "exponent_floor", "result_fraction_bits"):
        for unit in ("bf16", "fp16", "tf32", "fp8_e4m3", "fp8_e5m2"):
            core = getattr(sm_90, unit)
            changed = replace(sm_90, **{unit: replace(core, **{field: getattr(core, field) + 1})})
            with monkeypatch.context() as patch:
                patch.setitem(ARCHES, "sm_90", changed)
                assert contract.digest != before
    for order in module.ORDERS:
        with monkeypatch.context() as patch:
            patch.setitem(module.ORDERS, order, "otherwise")
            assert contract.digest != before
    assert contract.digest == before


def test_every_bit_of_a_polynomial_is_in_the_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest is of the coefficients in use, each to its last bit."""
    before = default_contract("sm_90").digest
    names = [name for name in vars(polynomials) if name.isupper()]
    assert set(names) == set(module.POLYNOMIALS)
    for name in names:
        value = getattr(polynomials, name)
        written = module.POLYNOMIALS[name]
        if isinstance(value, tuple):
            assert [float.fromhex(x) for x in written] == list(value)
        elif isinstance(value, dict):
            assert {int(d): float.fromhex(x) for d, x in written.items()} == value
        else:
            assert float.fromhex(written) == value
        with monkeypatch.context() as patch:
            patch.setitem(module.POLYNOMIALS, name, "otherwise")
            assert default_contract("sm_90").digest != before


def test_facts_are_json() -> None:
    facts = default_contract("sm_89").facts
    assert facts["arch"]["bf16"]["group"] == 8
    assert json.loads(json.dumps(facts))["contract"]["version"] == CONTRACT_VERSION


def test_records_are_frozen() -> None:
    for record, field in ((default_contract("sm_90"), "arch"), (get_arch("sm_90"), "bf16")):
        with pytest.raises(FrozenInstanceError):
            setattr(record, field, None)


def test_operations() -> None:
    assert operations("context-lm") == ("embedding", "lm_head")
    layer = (
        "input_layernorm qkv_proj rotary attention o_proj attention_residual "
        "post_attention_layernorm gate_up_proj silu_and_mul down_proj mlp_residual"
    ).split()
    llama = [f"layers.{i}.{name}" for i in (0, 1) for name in layer]
    assert operations("llama", 2) == ("embedding", *llama, "norm", "lm_head")
    layer.insert(2, "qk_norm")
    qwen3 = [f"layers.0.{name}" for name in layer]
    assert operations("qwen3", 1) == ("embedding", *qwen3, "norm", "lm_head")
    with pytest.raises(ValueError, match=r"gpt-2.*context-lm, llama, qwen3"):
        operations("gpt-2")


def test_draft_operations() -> None:
    assert DRAFT_DEPTH == 5
    assert DRAFT_KINDS == ("eagle", "eagle3")
    layer = (
        "qkv_proj rotary attention o_proj attention_residual post_attention_layernorm "
        "gate_up_proj silu_and_mul down_proj hidden"
    ).split()
    eagle = ["embedding", "fc", *layer, "lm_head"]
    third = ["embedding", "fc", "input_layernorm", "hidden_norm", *layer, "norm", "lm_head"]
    assert draft_operations("eagle") == tuple(f"draft.{name}" for name in eagle)
    assert draft_operations("eagle3") == tuple(f"draft.{name}" for name in third)
    with pytest.raises(ValueError, match=r"'medusa': known are eagle, eagle3"):
        draft_operations("medusa")


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("key_block", (0, 8, 48, 65, 256, -64)),
        ("key_split", (0, 32, 63, 1000, 1025, -1024)),
        ("sum_width", (0, 1, 8, 4095, 6144, -4096)),
    ],
)
def test_sizes_that_are_refused(option: str, values: tuple[int, ...]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"{option} is .*found {value}"):
            default_contract("sm_90", **{option: value})


def test_default_sizes() -> None:
    contract = default_contract("sm_90")
    assert (contract.key_block, contract.key_split, contract.sum_width) == (64, 1024, 4096)
    assert default_contract("sm_90", key_block=16, key_split=16, sum_width=16).key_split == 16


@pytest.mark.parametrize("name", ["sm_70", "sm_100", "SM_90", "", "90"])
def test_an_unknown_architecture_lists_the_known(name: str) -> None:
    every = r"sm_80.*sm_86.*sm_89.*sm_90"
    with pytest.raises(ValueError, match=every):
        get_arch(name)
    with pytest.raises(ValueError, match=every):
        default_contract(name)
    with pytest.raises(ValueError, match=every):
        _ = Contract(CONTRACT_VERSION, name).digest


def test_an_unknown_logits_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        default_contract("sm_90", logits_dtype="bfloat16")


def test_an_architecture_by_name_or_by_record() -> None:
    for name, arch in ARCHES.items():
        assert arch.name == name
        assert get_arch(name) is arch
        assert get_arch(arch) is arch
        assert default_contract(arch) == default_contract(name)


@pytest.mark.parametrize("arch", list(twin.STEPS))
def test_hardware_facts(arch: str) -> None:
    """The table, written down a second time in the twin."""
    record: Arch = ARCHES[arch]
    units = {
        "bf16": record.bf16,
        "fp16": record.fp16,
        "tf32": record.tf32,
        "e4m3": record.fp8_e4m3,
        "e5m2": record.fp8_e5m2,
    }
    for kind, core in units.items():
        want = twin.STEPS[arch].get(kind)
        if want is None:
            assert core is None
            continue
        assert core == TensorCore(
            group=want.group,
            fraction_bits=want.fraction_bits,
            exponent_floor=want.floor,
            result_fraction_bits=want.result_bits,
        )
    assert "sm_{}{}".format(*record.compute_capability) == arch
    # Bytes a block may use: NVIDIA's CUDA C++ Programming Guide, technical specifications.
    kibibytes = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227}[arch]
    assert record.shared_memory == kibibytes * 1024


def test_the_table_is_whole() -> None:
    assert set(ARCHES) == set(twin.STEPS)
