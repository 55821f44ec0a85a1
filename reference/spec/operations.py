"""Every operation once: its order in words, where it is in both rooms, what of a model it computes.

Pure data, imported by the contract, from which the engine's two sets of operations are made. A new
operation is a record here, a function of that name in `reference` and in `kernels`, and a field of
`engine.models.ops.Ops` where models call it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Operation:
    """An operation under one name and signature in both rooms.

    name: what whoever runs a model calls it. at: module and function, below `bitassay.reference`
    and `bitassay.kernels`; what a kernel takes besides is optional: where to write, how to launch.
    orders: name in the contract -> the order in words, part of the digest; none for what moves data
    or counts in integers. computes: the fingerprinted rows of a model that it leaves behind, by the
    names of `running_order` within a layer or a head. engine: whether the engine's models call it.
    in_reference: False for what only a paged cache or a device asks for. flagged: whether the
    kernel notes what is out of range in a flag that its module's `check` reads.
    """

    name: str
    at: str
    orders: Mapping[str, str] = field(default_factory=dict)
    computes: tuple[str, ...] = ()
    engine: bool = True
    in_reference: bool = True
    flagged: bool = False

    @property
    def module(self) -> str:
        """The module below either room: "norm"."""
        return self.at.rpartition(".")[0]

    @property
    def function(self) -> str:
        """The function in that module: "rms_norm"."""
        return self.at.rpartition(".")[2]


OPERATIONS = (
    Operation(
        "embedding",
        "embedding.embedding",
        {"embedding": "copy of one row per token"},
        computes=("embedding",),
        flagged=True,
    ),
    Operation(
        "linear",
        "linear.linear",
        {
            "linear": (
                "acc = +0; K ascending in tensor-core groups, acc feeds each step as c, tail group "
                "padded with zeros; fp32 acc + bias, nearest-even; then to the weight's type, "
                "nearest-even"
            ),
            "linear.fp32": (
                "acc = +0; one fused multiply-add per k, ascending; acc + 0.0; then as linear"
            ),
        },
        computes=("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "fc"),
    ),
    Operation(
        "lm_head",
        "linear.lm_head",
        {"lm_head": "linear; ids from vocab_size on are -inf"},
        computes=("lm_head",),
    ),
    Operation(
        "tree_sum",
        "tree.tree_sum",
        {"tree_sum": "padded with +0 to a power of two; element i plus element i + n/2, top down"},
        engine=False,
    ),
    Operation(
        "exp2",
        "elementary.exp2",
        {
            "exp2": (
                "z = x + MAGIC, n = z - MAGIC, f = x - n; Horner of EXP2 in fma; times 2**n; +0 "
                "below -126, +inf from 127.5"
            )
        },
        engine=False,
    ),
    Operation(
        "exp",
        "elementary.exp",
        {
            "exp": (
                "x <= 0: z = fma(x, LOG2E, MAGIC), n = z - MAGIC, r = fma(n, -LN2_HI, x), "
                "r = fma(n, -LN2_LO, r); Horner of EXP in fma; times 2**n; +0 where n < -126"
            )
        },
        engine=False,
    ),
    Operation(
        "log",
        "elementary.log",
        {
            "log": (
                "x >= 1 = 2**k * (1 + t), 1 + t in [sqrt(1/2), sqrt(2)); q = Horner of LOG1P in "
                "fma; fma(t * t, q, t), then fma(k, LN2_LO, .), then fma(k, LN2_HI, .)"
            )
        },
        engine=False,
    ),
    Operation(
        "rms_norm",
        "norm.rms_norm",
        {
            "rms_norm": (
                "fp32 h * h; tree_sum; / D; + eps; sqrt; h / rms; * weight; all nearest-even in "
                "fp32, then to the weight's type"
            )
        },
        computes=("input_layernorm", "qk_norm", "hidden_norm"),
    ),
    Operation(
        "add_rms_norm",
        "norm.add_rms_norm",
        {
            "add_rms_norm": (
                "fp32 x + residual to the weight's type: the new residual, and h of rms_norm"
            )
        },
        computes=(
            "attention_residual",
            "post_attention_layernorm",
            "mlp_residual",
            "input_layernorm",  # of every layer but the first, with the sum before it
            "norm",
            "hidden",  # of a head of the kind "eagle3"
        ),
    ),
    Operation(
        "add",
        "norm.add",
        {"residual_add": "fp32 x + residual, then to their type, nearest-even"},
        computes=("hidden",),
    ),
    Operation(
        "rotary",
        "rotary.apply",
        {
            "rotary": (
                "fp32 fma(x1, cos, -(x2 * sin)) and fma(x2, cos, x1 * sin), then to x's type; "
                "halves of a head; frequencies correctly rounded, angle = fp32 position * "
                "frequency, its cosine and sine correctly rounded"
            )
        },
        computes=("rotary",),
        flagged=True,
    ),
    Operation(
        "silu_and_mul",
        "activation.silu_and_mul",
        {
            "silu_and_mul": (
                "e = exp(-|g|); (g if g >= 0 else g * e) / (1 + e); * up in fp32, then to the "
                "gate's type"
            )
        },
        computes=("silu_and_mul",),
    ),
    Operation("write_cache", "cache.write", in_reference=False, flagged=True),
    Operation(
        "paged_attention",
        "attention.paged_attention",
        {
            "attention": (
                "key blocks ascending: s = q k as linear without rounding; t = s * SOFTMAX_SCALE; "
                "-inf after the query; m = max; p = exp2(t - m); l = fma(l, exp2(m_old - m), "
                "tree_sum(p)); acc = p to v's type times v, fed by acc * exp2(m_old - m); m of "
                "-inf counts as 0 in exp2"
            ),
            "attention.splits": (
                "key splits ascending: L = fma(L, a, l * b), A = fma(A, a, acc * b), a = "
                "exp2(M_old - M), b = exp2(m - M); A / L + 0.0, then to v's type"
            ),
        },
        computes=("attention",),
    ),
    Operation(
        "log_softmax",
        "sample.log_softmax",
        {
            "log_softmax": (
                "d = x - max; tree_sum(exp(d)) of each sum_width columns, added ascending; d - "
                "log(sum)"
            )
        },
        engine=False,
        flagged=True,
    ),
    Operation(
        "greedy",
        "sample.greedy",
        {"greedy": "highest value, lowest id; -0 equals +0; NaN is an error"},
        engine=False,
        flagged=True,
    ),
    Operation(
        "top_k",
        "sample.top_k",
        {"top_k": "value descending, then id ascending"},
        engine=False,
        flagged=True,
    ),
    Operation("margin_ulps", "sample.margin_ulps", engine=False, flagged=True),
    # All that is asked of a row of logits, from one pass; its flag is the caller's.
    Operation("decide", "sample.decide", in_reference=False),
    Operation("fingerprint_rows", "fingerprint.fingerprint_rows"),
    Operation("fingerprint_into", "fingerprint.fingerprint_into", in_reference=False),
    Operation("fold", "fingerprint.fold"),
)

# What is made of operations and has an order of its own.
PROCEDURES = {
    "eagle": (
        "x = linear fc of [embedding(id), norm row]; residual = x, no input norm; qkv, rotary, "
        "attention, o_proj, add_rms_norm, gate_up, silu_and_mul, down_proj; hidden = residual_add "
        "of down and residual, no final norm; the target's lm_head"
    ),
    "eagle3": (
        "h = linear fc of the residual streams before target layers [2, n // 2, n - 3]; residual = "
        "h; qkv of [rms_norm(embedding(id), input_layernorm), rms_norm(h, hidden_norm)]; rotary, "
        "attention, o_proj, add_rms_norm, gate_up, silu_and_mul, down_proj, add_rms_norm; own "
        "lm_head of the normed row, hidden = its sum; target id = draft id + d2t"
    ),
    "drafting": (
        "first pass: position p has the target's row p and id p + 1, its keys and values replace a "
        "chain's; chain row j: id d_j, hidden of the row before, the base row's position + j; "
        "greedy"
    ),
    "verification": (
        "greedy; drafts are accepted up to the first that the target does not choose; then the "
        "target's own choice"
    ),
}

# The order of everything, in words; part of the digest, so no order changes in silence.
ORDERS = {name: order for one in OPERATIONS for name, order in one.orders.items()} | PROCEDURES

# What the engine's models call: the fields of `engine.models.ops.Ops`.
ENGINE_OPERATIONS = tuple(one for one in OPERATIONS if one.engine)
