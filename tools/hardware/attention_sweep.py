"""Every output of attention on this GPU against the oracle, at model sizes.

The oracle runs on the machine's cores, once per sequence; the kernels then see each sequence alone,
in mixed batches, in chunks and through each tile, and every output is compared. Exit status: 0 all
equal, 1 a difference.

python tools/hardware/attention_sweep.py [--quick] [--every-tile]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bitassay.kernels import attention_tiles as tiles
from bitassay.kernels.attention import paged_attention
from bitassay.reference.spec.contract import Contract, default_contract

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "lib"))
from support.attention_cases import FINITE, Drawn, Shape, batch, random_sequence, sequence
from support.oracle_pool import OraclePool

SHAPES = {
    "Llama-3.1-8B": Shape(32, 8, 128),
    "Qwen3-1.7B": Shape(16, 8, 128),
    "llama-pico": Shape(4, 2, 64),
    "groups of 7, fp16": Shape(14, 2, 64, torch.float16),
}
CONTEXTS = (1, 2, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 500, 1000, 1023, 1024, 1025, 1088,
            2047, 2048, 2049, 3000, 4097, 8192, 16_383, 16_384)  # fmt: skip
BATCHES = (1, 2, 3, 7, 8, 16, 31, 32, 64)


class Tally:
    """Counts of outputs compared and different, by what was compared."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], list[int]] = {}

    def compare(self, shape: str, what: str, got: Tensor, want: Tensor) -> None:
        """Count outputs whose bits differ."""
        different = int((got.view(torch.int16) != want.view(torch.int16)).sum())
        count = self.counts.setdefault((shape, what), [0, 0])
        count[0] += got.numel()
        count[1] += different
        if different:
            print(f"DIFFERENT {shape}, {what}: {different} of {got.numel()}", flush=True)

    @property
    def different(self) -> int:
        """How many outputs differ in all."""
        return sum(count[1] for count in self.counts.values())

    def table(self, title: str) -> Table:
        """Return the counts for reading."""
        table = Table(title=title)
        for name in ("shape", "what", "compared", "different"):
            table.add_column(name, justify="left" if name in ("shape", "what") else "right")
        for (shape, what), (compared, different) in self.counts.items():
            table.add_row(shape, what, f"{compared:,}", f"{different:,}")
        table.add_section()
        compared = sum(count[0] for count in self.counts.values())
        table.add_row("all", "", f"{compared:,}", f"{self.different:,}")
        return table


class Sweep:
    """One shape: sequences beside what the oracle says of each."""

    def __init__(
        self,
        name: str,
        contract: Contract,
        tally: Tally,
        oracle: OraclePool,
        among: Sequence[tiles.AttentionTile],
    ) -> None:
        self.name, self.contract, self.tally, self.oracle = name, contract, tally, oracle
        self.tiles = among

    def known(self, sequences: Sequence[Drawn]) -> list[tuple[Drawn, Tensor]]:
        """Ask the oracle."""
        said = self.oracle.attend([(s.q, s.k, s.v) for s in sequences], self.contract)
        return list(zip(sequences, said, strict=True))

    def check(self, what: str, pairs: Sequence[tuple[Drawn, Tensor]], **options: object) -> None:
        """Run one batch and compare all of it."""
        together = batch([s for s, _ in pairs], seed=len(pairs))
        got = paged_attention(*together.arguments, contract=self.contract, **options)  # type: ignore[arg-type]
        self.tally.compare(self.name, what, got, torch.cat([want for _, want in pairs]))

    def run(self, shape: Shape, contexts: Sequence[int], batches: Sequence[int]) -> None:
        """Compare decoding, prompts, chunks, mixed batches, tiles and awkward values."""

        def draw(lengths: Sequence[tuple[int, int]]) -> list[tuple[Drawn, Tensor]]:
            found = [random_sequence(t, s, shape, i, "cuda") for i, (t, s) in enumerate(lengths)]
            return self.known(found)

        decoding = draw([(1, keys) for keys in contexts])
        for pair in decoding:
            self.check("decoding, alone", [pair])
        for size in batches:
            for first in range(0, len(decoding), size):
                some = [decoding[(first + i) % len(decoding)] for i in range(size)]
                self.check(f"decoding, batch {size}", some)
        verifying = draw([(t, t + keys) for t in (2, 4, 8) for keys in (0, 60, 1022, 4000)])
        self.check("4 tokens and the like", verifying)
        prompts = draw([(keys, keys) for keys in (1, 64, 65, 300, 1025, 2500)])
        for pair in prompts:
            self.check("prompt, alone", [pair])
        self.check("prompts, together", prompts)
        whole, want = prompts[-1]
        for chunk in (16, 100, 256):
            parts = [
                (Drawn(whole.q[a : a + chunk], whole.k[: a + chunk], whole.v[: a + chunk]),
                 want[a : a + chunk])
                for a in range(0, len(whole.q), chunk)
            ]  # fmt: skip
            for part in parts:
                self.check(f"prompt in chunks of {chunk}", [part])
            self.check(f"prompt in chunks of {chunk}, together", parts)
        self.check("a chunk of a long context", draw([(256, contexts[-1])]))
        everything = [*prompts, *verifying, *decoding]
        self.check("mixed", everything)
        self.check("mixed, reversed", everything[::-1])
        for tile in self.tiles:
            self.check("mixed, each tile", everything, tile=tile)
        self.values(shape)

    def values(self, shape: Shape) -> None:
        """Compare queries, keys and values of every awkward kind."""
        kinds = [(q, k, v) for q in FINITE for k, v in zip(FINITE, FINITE[::-1], strict=True)]
        kinds += [("special", "normal", "normal"), ("normal", "special", "wide")]
        kinds += [("patterns", "patterns", "normal")]
        sizes = ((1, 300), (1, 1100), (20, 90))
        found = [
            sequence(t, s, shape, seed, three, "cuda")
            for seed, three in enumerate(kinds)
            for t, s in sizes
        ]
        known = self.known(found)
        for first in range(0, len(known), len(sizes)):
            self.check("awkward values", known[first : first + len(sizes)])


def main() -> int:
    """Run the sweep and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short contexts, few batches")
    parser.add_argument(
        "--every-tile", action="store_true", help="also tiles not in use; they take long to compile"
    )
    args = parser.parse_args()
    major, minor = torch.cuda.get_device_capability()
    contract = default_contract(f"sm_{major}{minor}")
    tally = Tally()
    contexts: tuple[int, ...] = CONTEXTS
    batches: tuple[int, ...] = BATCHES
    if args.quick:
        contexts, batches = (tuple(x for x in CONTEXTS if x <= 2100), (1, 8))
    among = (tiles.candidates if args.every_tile else tiles.in_use)(contract.arch)
    with OraclePool() as oracle:
        for name, shape in SHAPES.items():
            start = time.perf_counter()
            Sweep(name, contract, tally, oracle, among).run(shape, contexts, batches)
            torch.cuda.synchronize()
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    title = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, contract {contract.arch}"
    Console(width=100).print(tally.table(title))
    return 1 if tally.different else 0


if __name__ == "__main__":
    sys.exit(main())
