"""Operations refused unless allowed by name, with what to use instead."""

from __future__ import annotations

# builder operation -> (name to allow it by, why, what to use instead)
REFUSED: dict[str, tuple[str, str, str]] = {
    "create_exp": ("exp", "the GPU approximates it", "a polynomial in tl.fma"),
    "create_exp2": ("exp2", "the GPU approximates it", "a polynomial in tl.fma"),
    "create_log": ("log", "the GPU approximates it", "a polynomial in tl.fma"),
    "create_log2": ("log2", "the GPU approximates it", "a polynomial in tl.fma"),
    "create_sin": ("sin", "the GPU approximates it", "a table or a polynomial in tl.fma"),
    "create_cos": ("cos", "the GPU approximates it", "a table or a polynomial in tl.fma"),
    "create_erf": ("erf", "the GPU approximates it", "a polynomial in tl.fma"),
    "create_sqrt": ("sqrt", "the GPU approximates it", "tl.sqrt_rn"),
    "create_rsqrt": ("rsqrt", "the GPU approximates it", "tl.div_rn(1.0, tl.sqrt_rn(x))"),
    "create_fdiv": ("div", "`/` and tl.fdiv are approximate on the GPU", "tl.div_rn"),
    "create_approx_divf": ("div", "it is approximate on the GPU", "tl.div_rn"),
    "create_frem": ("mod", "the GPU divides approximately", "integers, or tl.div_rn and tl.fma"),
    "create_cat": ("cat", "it may reorder elements", "tl.join and tl.reshape"),
    "create_dot_scaled": ("dot_scaled", "its instruction is not modelled", "tl.dot"),
    "create_atomic_cas": (
        "atomic_cas",
        "which program comes first is not defined",
        "one program for each output",
    ),
}
