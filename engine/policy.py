"""Whether decoding runs eagerly or in CUDA graphs: one rule, in one place."""

from __future__ import annotations

_LEAST = (9, 0)  # compute capability from which graphs are the default


def enforce_eager(capability: tuple[int, int] | None, asked: bool | None, force: bool) -> bool:
    """Return whether every step runs eagerly.

    capability: of the device, None for the CPU. asked: what the user wants, None for the default:
    eager below 9.0 and on the CPU. force: graphs even there. Raises ValueError, with the reason,
    for graphs that are asked for below 9.0 and not forced. On a CPU nothing is captured: forced
    graphs run their padded steps as they are.
    """
    trusted = capability is not None and capability >= _LEAST
    if asked is None:
        return not (trusted or force)
    if asked or trusted or force:
        return asked
    least = f"enforce_eager=False: expected compute capability {_LEAST[0]}.{_LEAST[1]} or above"
    if capability is None:
        raise ValueError(f"{least}, found a CPU, which has no CUDA graphs: leave enforce_eager out")
    raise ValueError(
        f"{least}, found compute capability {capability[0]}.{capability[1]}: below it, an engine "
        "with compiled graphs has been seen to give other tokens than eager decoding; leave "
        "enforce_eager out, or set force_graphs to try it"
    )
