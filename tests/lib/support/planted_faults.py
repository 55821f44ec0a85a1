"""Bugs to put into the engine on purpose: every check must be able to fail.

Each is a context: inside, models that run on a `Switch` compute, schedule or keep something wrong,
as an engine with that bug would. Outside nothing is left of it. The engine itself knows of none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitassay.engine.distributed.group import WARM_UP, Group
from bitassay.engine.models.eagle import EagleHead
from bitassay.engine.models.kv_cache import PagedCache
from bitassay.engine.models.ops import Ops
from bitassay.engine.scheduling.blocks import BlockManager
from bitassay.engine.scheduling.request import Request
from bitassay.engine.scheduling.step_plan import Result, Rows
from bitassay.engine.step import device_step
from bitassay.engine.step.inputs import Inputs
from bitassay.engine.step.runner import Runner
from bitassay.engine.step.verify import Verified

Operation = Callable[..., Any]
Make = Callable[[Operation], Operation]

BLOCK = 16  # positions of a block of the cache
ROWS = 256  # from so many rows on the faulty RMSNorm takes another block
FEW = 4  # up to so many sequences the faulty attention splits their keys further


class Switch:
    """A backend whose operations can be exchanged under a model that is loaded already.

    changed: how many values exchanged operations gave that the right ones do not. It is counted on
    the device, so CUDA graphs count as well.
    """

    def __init__(self, ops: Ops, device: str | torch.device = "cpu") -> None:
        self.now = ops
        self._changed = torch.zeros((), dtype=torch.int64, device=device)
        names = [field.name for field in fields(Ops) if field.name != "name"]
        self.ops = Ops(name=ops.name, **{name: self._through(name) for name in names})

    @property
    def changed(self) -> int:
        """Values that differed in the last context of `using`."""
        return int(self._changed)

    @contextmanager
    def using(self, **operations: Make) -> Iterator[None]:
        """Exchange operations, by their names, for what is made of the right ones."""
        before = self.now
        self._changed.zero_()
        made = {
            name: self._counting(getattr(before, name), make(getattr(before, name)))
            for name, make in operations.items()
        }
        self.now = replace(before, **made)
        try:
            yield
        finally:
            self.now = before

    def _through(self, name: str) -> Operation:
        return lambda *arguments, **options: getattr(self.now, name)(*arguments, **options)

    def _counting(self, right: Operation, faulty: Operation) -> Operation:
        def both(*arguments: Any, **options: Any) -> Any:
            if options.get("out") is not None:  # it may be an input as well
                return faulty(*arguments, **options)
            want, got = right(*arguments, **options), faulty(*arguments, **options)
            for a, b in zip(_tensors(want), _tensors(got), strict=True):
                self._changed += ((a != b) & ~(a.isnan() & b.isnan())).sum()
            return got

        return both


def _tensors(values: Any) -> tuple[Tensor, ...]:
    return values if isinstance(values, tuple) else (values,)


@dataclass(frozen=True)
class Fault:
    """A bug. does: in one line. put: switches it on for models on a switch."""

    name: str
    does: str
    put: Callable[[Switch], AbstractContextManager[None]]


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Exchange an attribute."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def cleared() -> AbstractContextManager[None]:
    """Let caches begin with zeros: what nobody wrote may be NaN, and then that is found first."""
    empty = PagedCache.empty

    def zeros(*arguments: Any) -> PagedCache:
        found = empty(*arguments)
        for x in (*found.k, *found.v):
            x.zero_()
        return found

    return patched(PagedCache, "empty", zeros)


def lm_head_on_the_library(switch: Switch) -> AbstractContextManager[None]:
    """The bug that this project began with."""

    def make(lm_head: Any) -> Any:
        def library(hidden: Tensor, weight: Tensor, bias: Any = None, **_: Any) -> Tensor:
            return F.linear(hidden, weight, bias)

        return library

    return switch.using(lm_head=make)


def block_changes_at_256_rows(switch: Switch) -> AbstractContextManager[None]:
    """Squares are summed one after another, as by one thread a row, where a step has many rows.

    Squares of bf16 values have 16 bits, so most orders give the very same sum: of a million
    outputs this one changes some 400 in rows of 4096, and 20 in rows of 256.
    """

    def normed(h: Tensor, weight: Tensor, eps: float) -> Tensor:
        h = h.float()
        square = torch.zeros_like(h[..., :1])
        for column in (h * h).split(1, dim=-1):
            square = square + column
        rms = (square / h.shape[-1] + eps).double().sqrt().float()  # widths are powers of two
        return (h / rms * weight.float()).to(weight.dtype)

    def alone(rms_norm: Any) -> Any:
        def norm(x: Tensor, weight: Tensor, *, eps: float, out: Any = None) -> Tensor:
            if x.shape[0] < ROWS or x.dim() > 2:
                return rms_norm(x, weight, eps=eps, out=out)
            found = normed(x, weight, eps)
            return found if out is None else out.copy_(found)

        return norm

    def added(add_rms_norm: Any) -> Any:
        def norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> Any:
            right, total = add_rms_norm(x, residual, weight, eps=eps)
            return (right if x.shape[0] < ROWS else normed(total, weight, eps)), total

        return norm

    return switch.using(rms_norm=alone, add_rms_norm=added)


def split_by_the_batch(switch: Switch) -> AbstractContextManager[None]:
    """Keys are split at every block where there are few sequences, to keep a GPU busy."""

    def make(paged_attention: Any) -> Any:
        def attend(*arguments: Any, contract: Any, **options: Any) -> Tensor:
            if len(arguments[4]) - 1 <= FEW:  # query_start
                contract = replace(contract, key_split=contract.key_block)
            return paged_attention(*arguments, contract=contract, **options)

        return attend

    return switch.using(paged_attention=make)


@contextmanager
def padding_in_a_sum(switch: Switch) -> Iterator[None]:
    """The only sum over rows is attention's: the row after a sequence's last is a key of it."""

    def make(paged_attention: Any) -> Any:
        def attend(
            q: Tensor, k: Tensor, v: Tensor, tables: Tensor, starts: Tensor, lengths: Tensor,
            **options: Any,
        ) -> Tensor:  # fmt: skip
            # Where the block has room for it: what follows the table is nobody's.
            longer = lengths + (lengths % BLOCK != 0).int()
            if options.get("max_seq_len") is not None:
                options["max_seq_len"] += 1
            return paged_attention(q, k, v, tables, starts, longer, **options)

        return attend

    with cleared(), switch.using(paged_attention=make):
        yield


def highest_id_wins(switch: Switch) -> AbstractContextManager[None]:
    """Equal logits in descending order of their ids."""

    def make(decide: Any) -> Any:
        def choose(logits: Tensor, k: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
            values, ids, margins = decide(logits.flip(1), k, **options)
            return values, logits.shape[1] - 1 - ids, margins

        return choose

    return switch.using(decide=make)


def draft_position(switch: Switch) -> AbstractContextManager[None]:
    """Ids are shifted by one against positions; here the positions are shifted as well."""
    forward = EagleHead.forward

    def ahead(self: EagleHead, batch: Any, *arguments: Any, **options: Any) -> Any:
        moved = replace(batch, positions=batch.positions + 1)
        return forward(self, moved, *arguments, **options)

    return patched(EagleHead, "forward", ahead)


@contextmanager
def rejected_slots_kept(switch: Switch) -> Iterator[None]:
    """The next round goes on behind the rejected drafts, as far as the sequence's blocks reach."""
    run = Runner.run

    def behind(self: Runner, rows: list[Rows]) -> list[Result]:
        kept: dict[int, int] = self.__dict__.setdefault("kept", {})
        moved = []
        for part in rows:
            last = min(part.limit, part.first + len(part.ids) + self.num_drafts - 2)
            by = min(kept.get(part.request, 0), len(part.table) * BLOCK - 1 - last)
            moved.append(replace(part, first=part.first + by, limit=part.limit + by))
        results = run(self, moved)
        drafted = {part.request: part.drafts for part in rows}
        for result in results:
            rejected = drafted[result.request] - result.accepted
            kept[result.request] = kept.get(result.request, 0) + rejected
        return results

    with cleared(), patched(Runner, "run", behind):
        yield


def prefix_without_what_came_before(switch: Switch) -> AbstractContextManager[None]:
    """A block is found by its own ids alone, whatever they follow."""
    right = BlockManager._key

    def key(self: BlockManager, prefix: int, ids: list[int], end: int) -> Any:
        return right(self, 0, ids, end)

    return patched(BlockManager, "_key", key)


def prefix_without_its_ids(switch: Switch) -> AbstractContextManager[None]:
    """A block is found by its place in a prefix; the ids are not compared."""

    def key(self: BlockManager, prefix: int, ids: list[int], end: int) -> Any:
        return prefix, (end,), None

    return patched(BlockManager, "_key", key)


def one_accepted_less(switch: Switch) -> AbstractContextManager[None]:
    """A round whose drafts are all right leaves the last one to the next round."""
    verify = device_step.verify

    def fewer(x: Inputs, chosen: Tensor) -> Verified:
        right = verify(x, chosen)
        whole = (right.accepted == x["drafted"]) & (right.accepted > 0)
        accepted = right.accepted - whole.long()
        base = x["choosing"][x["tails"].gather(1, accepted[:, None])[:, 0]]
        return Verified(right.choices, accepted, base, x["first"] + accepted)

    return patched(device_step, "verify", fewer)


@contextmanager
def freed_too_early(switch: Switch) -> Iterator[None]:
    """A request's first block goes back to the free ones once its prompt has been computed."""
    register, release = BlockManager.register, BlockManager.release
    without: set[Request] = set()

    def early(self: BlockManager, request: Request) -> None:
        register(self, request)
        if request.generated and request not in without and not request.done:
            without.add(request)
            self._holders[request.table[0]] -= 1
            self._free.append(request.table[0])

    def rest(self: BlockManager, request: Request) -> None:
        if request in without:
            without.remove(request)
            request.table = request.table[1:]
        release(self, request)

    with patched(BlockManager, "register", early), patched(BlockManager, "release", rest):
        yield


def idle_rank_waits_for_work(switch: Switch | None = None) -> AbstractContextManager[None]:
    """A rank with nothing to do does not enter the steps' collective any more."""
    whole = Group.sum

    def sum_(self: Group, step: int, count: int) -> Any:
        # The first collectives may take longer, since kernels are compiled meanwhile.
        while count == 0 and step >= 2 * WARM_UP:
            time.sleep(1)
        return whole(self, step, count)

    return patched(Group, "sum", sum_)


IDLE_RANK = Fault(
    "idle rank skips a collective",
    "a rank without requests waits for some instead of taking part in the steps' collective",
    idle_rank_waits_for_work,
)
FAULTS = (
    Fault(
        "lm_head on cuBLAS",
        "the lm_head is the library's product, every other layer the kernels'",
        lm_head_on_the_library,
    ),
    Fault(
        "draft position off by one",
        "the head's rows are rotated to the position after their own",
        draft_position,
    ),
    Fault(
        "rejected slots kept",
        "the round after a rejection continues after the rejected drafts' slots",
        rejected_slots_kept,
    ),
    Fault(
        "stale prefix block",
        "a block is found by its own ids, whatever precedes them",
        prefix_without_what_came_before,
    ),
    Fault(
        "prefix ids not compared",
        "a block is found by its position in the prompt, whatever its ids are",
        prefix_without_its_ids,
    ),
    Fault(
        "block freed too early",
        "a request's first block is given to another while it still decodes",
        freed_too_early,
    ),
    Fault(
        "RMSNorm by rows",
        "in a step of 256 rows or more, squares are summed in another order",
        block_changes_at_256_rows,
    ),
    Fault(
        "attention by batch",
        "with up to four sequences, keys are split further",
        split_by_the_batch,
    ),
    Fault(
        "padded row in a sum",
        "attention takes the row after a sequence's last for one of its keys",
        padding_in_a_sum,
    ),
    Fault(
        "ties to the highest id",
        "of equal logits the one with the highest id is chosen",
        highest_id_wins,
    ),
    Fault(
        "acceptance off by one",
        "the last draft of a round that is right throughout is not accepted",
        one_accepted_less,
    ),
)
