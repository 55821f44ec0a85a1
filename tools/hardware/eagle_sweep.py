"""EAGLE in every configuration of the sweep, on as many ranks as this machine has GPUs, in figures.

What `bitassay check eagle-pico --with engine --dp N --sweep` compares, for N = 1, 2 and 4, with the
totals over all configurations: outputs compared and different, acceptance lengths, what was
exercised. Exit status: 0 all equal, 1 a difference, or something that was not exercised.

python tools/hardware/eagle_sweep.py [--dp N ...] [--prompts N] [--tokens T]
python tools/hardware/eagle_sweep.py --backend reference --arch sm_90 --prompts 4 --tokens 8 --dp 2
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter, defaultdict

import torch
from rich.console import Console
from rich.table import Table

from bitassay.engine.scheduling.stats import Stats
from bitassay.golden.check import current
from bitassay.golden.compare.counts import Counts
from bitassay.golden.compare.diff import Comparison, compare
from bitassay.golden.runs.backend import Backend, gpu_arch
from bitassay.golden.runs.engine_options import SweepOptions
from bitassay.golden.runs.engine_runner import Sweep
from bitassay.golden.runs.runner import Run
from bitassay.golden.storage.store import find_store

RANKS = (1, 2, 4)
_COUNTED = ("streams", "tokens", "logits", "fingerprints", "drafts", "acceptances")


class Figures:
    """Totals over the configurations of one number of ranks."""

    def __init__(self) -> None:
        self.compared: Counter[str] = Counter()
        self.different: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.drafted: dict[int, Stats] = defaultdict(Stats)
        self.bad: list[str] = []

    def add(self, what: str, drafts: int, run: Run, comparison: Comparison) -> None:
        """Add one configuration's."""
        assert run.stats is not None
        for total, counts in (
            (self.compared, comparison.compared),
            (self.different, comparison.different),
        ):
            total.update(_numbers(counts))
        self.seen["configurations"] += 1
        self.seen["steps"] += run.stats.steps
        self.seen["preemptions"] += run.stats.preemptions
        self.seen["positions from the prefix cache"] += run.stats.prefix_hit_tokens
        own = self.drafted[drafts]
        own.rounds += run.stats.rounds
        own.drafted += run.stats.drafted
        own.accepted += run.stats.accepted
        if comparison.differences:
            self.bad.append(f"{what}: {comparison.differences[0]}")
        self.bad += [f"{what}: came to no {missing}" for missing in run.missing]

    def tables(self, title: str) -> list[Table]:
        """Return what was compared, and what of drafts was accepted."""
        outputs = Table("outputs", "compared", "different", title=title)
        for name in _COUNTED:
            outputs.add_row(name, f"{self.compared[name]:,}", f"{self.different[name]:,}")
        outputs.add_section()
        for name, count in self.seen.items():
            outputs.add_row(name, f"{count:,}", "")
        drafts = Table("K", "rounds", "drafted", "accepted", "acceptance length")
        for k, own in sorted(self.drafted.items()):
            if own.rounds:
                counts = (own.rounds, own.drafted, own.accepted)
                drafts.add_row(str(k), *map("{:,}".format, counts), f"{own.acceptance_length:.3f}")
        return [outputs, drafts]


def _numbers(counts: Counts) -> dict[str, int]:
    return {name: getattr(counts, name) or 0 for name in _COUNTED}


def sweep(args: argparse.Namespace, dp: int, console: Console) -> bool:
    """Run all configurations on `dp` ranks and print the figures; return whether all is well."""
    arch = args.arch or gpu_arch()
    golden, inputs = current(find_store(), f"eagle-pico/{arch}", None)
    expected = golden.stream.first(args.prompts, args.tokens)
    runs = Sweep(
        inputs, expected, SweepOptions(dp=dp, backend=Backend(args.backend), seed=args.seed)
    )
    figures, begun = Figures(), time.monotonic()
    for number, options in list(enumerate(runs.options))[args.start - 1 :]:
        run, what = runs.run(number), options.description(head=True)
        comparison = compare(run.expected, run.found)
        figures.add(what, options.drafts(head=True), run, comparison)
        verdict = "equal, but NOT EXERCISED" if run.missing else "equal"
        verdict = verdict if comparison.equal else "DIFFERENT"
        console.print(f"{number + 1}/{len(runs.options)} {verdict}: {what}")
    took = time.monotonic() - begun
    count, tokens = len(expected.prompt_names), expected.steps
    title = f"{arch}, DP = {dp}, {count} prompts of {tokens} tokens, {took:.0f} s"
    for table in figures.tables(title):
        console.print(table)
    for line in figures.bad:
        console.print(line, style="red")
    return not figures.bad


def main() -> int:
    """Sweep for each number of ranks that there are GPUs for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dp", type=int, nargs="+")
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=1, help="the first configuration to run")
    parser.add_argument("--backend", choices=("gpu", "reference"), default="gpu")
    parser.add_argument("--arch", help="of the golden; the GPU's if there is one")
    args = parser.parse_args()
    if args.backend == "reference" and not (args.arch and args.dp):
        parser.error("--backend reference needs --arch and --dp")
    ranks = args.dp or [dp for dp in RANKS if dp <= torch.cuda.device_count()]
    if not ranks:
        parser.error("expected a CUDA device, found none: on a CPU use --backend reference")
    console = Console(width=120)
    well = [sweep(args, dp, console) for dp in ranks]  # all of them, whatever the first finds
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(main())
