"""Which request holds which blocks of the cache, and which full ones may be used again.

A block is shared only once it is full of rows that will never change, and a request writes only
at positions from `computed` on, which lie behind every block that is registered. So a shared block
is never written to, and nothing has to be copied on write.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any, NamedTuple

from bitassay.engine.scheduling.request import Request
from bitassay.engine.validation import What
from bitassay.reference.spec.errors import SequenceError

BLOCK_SIZE = 16  # positions of a block, as `kernels.cache` writes them

# The prefix before the block, by number; the block's ids; the id after it where a draft head runs,
# whose row at the block's last position was made with it. A key is compared as it stands, never
# by its hash alone, and a number is given to one prefix ever: a hit is the same ids from the start.
_Key = tuple[int, tuple[int, ...], int | None]


class _Entry(NamedTuple):
    block: int
    prefix: int  # the number of the prefix that ends with this block


def blocks_for(positions: int) -> int:
    """Return how many blocks so many positions take."""
    return -(-positions // BLOCK_SIZE)


def check_blocks(
    prompts: Sequence[int], tokens: Sequence[int], num_blocks: int, what: What, *, first: int = 0
) -> None:
    """Raise ValueError naming the first prompt that the whole cache could not hold."""
    for index, (prompt, length) in enumerate(zip(prompts, tokens, strict=True), first):
        needed = blocks_for(prompt + length - 1)
        if needed > num_blocks:
            where: dict[str, Any] = {what: index}
            raise SequenceError(
                f"expected at most {num_blocks} blocks, all of the cache, found {needed}: {prompt} "
                f"tokens continued by {length}: shorten it, or make the cache larger (num_blocks)",
                **where,
            )


class BlockManager:
    """Counts the holders of every block.

    A block that nobody holds is free, or, if registered, idle: still found by its prefix, and
    taken for something else only when no free one is left, the longest idle first.
    """

    def __init__(self, num_blocks: int, *, caching: bool, drafting: bool) -> None:
        self.num_blocks = num_blocks
        self._caching, self._drafting = caching, drafting
        self._holders = [0] * num_blocks
        self._free = list(range(num_blocks))
        self._idle: dict[int, None] = {}  # in the order in which they became idle
        self._entries: dict[_Key, _Entry] = {}
        self._keys: dict[int, _Key] = {}  # of registered blocks
        self._numbers = count(1)  # 0 is the empty prefix

    @property
    def available(self) -> int:
        """How many blocks nobody holds."""
        return len(self._free) + len(self._idle)

    @property
    def registered(self) -> int:
        """How many blocks the prefix cache can find."""
        return len(self._keys)

    def admit(self, request: Request, positions: int) -> bool:
        """Give a request that holds nothing blocks for so many positions, found ones first.

        `computed` is then what the found ones hold. False, and no change, if there are too few.
        """
        hits = self._find(request)
        idle = sum(hit.block in self._idle for hit in hits)
        if blocks_for(positions) - len(hits) > self.available - idle:
            return False
        for block, _ in hits:
            self._idle.pop(block, None)
            self._holders[block] += 1
        request.table = [hit.block for hit in hits]
        request.registered = len(hits)
        request.prefix = hits[-1].prefix if hits else 0
        request.computed = len(hits) * BLOCK_SIZE
        return self.grow(request, positions)

    def grow(self, request: Request, positions: int) -> bool:
        """Give a request blocks for so many positions; False, and no change, if there are none."""
        more = blocks_for(positions) - len(request.table)
        if more > self.available:
            return False
        request.table += [self._take() for _ in range(more)]
        return True

    def register(self, request: Request) -> None:
        """Let others find the blocks of a request that are full of computed rows.

        To be called once those rows have run: a request in the same step must not hit what is yet
        to be written. The id after the block is known then, since the last known is not computed.
        Where another's block of the same prefix is registered, that one stays.
        """
        if not self._caching:
            return
        while (end := (request.registered + 1) * BLOCK_SIZE) <= request.computed:
            key = self._key(request.prefix, request.ids, end)
            if key not in self._entries:
                block = request.table[request.registered]
                self._entries[key] = _Entry(block, next(self._numbers))
                self._keys[block] = key
            request.prefix = self._entries[key].prefix
            request.registered += 1

    def release(self, request: Request) -> None:
        """Take back all blocks of a request, which then holds none and has nothing computed."""
        for block in reversed(request.table):  # so that a prefix outlives what follows it
            self._holders[block] -= 1
            if self._holders[block] < 0:
                raise RuntimeError(f"block {block} of request {request.number} was not held")
            if self._holders[block] == 0:
                if block in self._keys:
                    self._idle[block] = None
                else:
                    self._free.append(block)
        request.table, request.registered, request.prefix, request.computed = [], 0, 0, 0

    def forget(self) -> None:
        """Empty the prefix cache; blocks that are held stay held."""
        self._free += self._idle
        self._idle.clear()
        self._entries.clear()
        self._keys.clear()

    def _find(self, request: Request) -> list[_Entry]:
        """Return the registered blocks of a request's longest prefix.

        Never of its last known id: the row of that one has to run, for it chooses.
        """
        hits: list[_Entry] = []
        prefix, end = 0, BLOCK_SIZE
        while end < len(request.ids):
            entry = self._entries.get(self._key(prefix, request.ids, end))
            if entry is None:
                break
            hits.append(entry)
            prefix, end = entry.prefix, end + BLOCK_SIZE
        return hits

    def _key(self, prefix: int, ids: list[int], end: int) -> _Key:
        return prefix, tuple(ids[end - BLOCK_SIZE : end]), ids[end] if self._drafting else None

    def _take(self) -> int:
        """Return a block that nobody holds, now held once."""
        if self._free:
            block = self._free.pop()
        else:
            block = next(iter(self._idle))
            del self._idle[block]
            del self._entries[self._keys.pop(block)]
        self._holders[block] = 1
        return block
