"""What does it cost to fingerprint every row of every operation of a run?

Some layers of Llama-3.1-8B's shapes with random weights, run as the engine runs them: prompts in
steps of 2048 rows, launched one by one, and decoding in a CUDA graph (and launched one by one, to
compare). Without capture; with fingerprints on the stream of the layers; and on a stream of their
own beside them, as the engine has it. Phases alone with a cold cache, median of many; then whole
runs. The lm_head is left out: it is a part of a few layers' time that it is not of a model's.

nox -s bench -- capture [--layers 4] [--batches 1,8,64] [--context 576]
TRITON_INTERPRET=1 BITASSAY_ARCH=sm_90 python benchmarks/capture.py --tiny
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from layer import LLAMA_8B, TINY, eager
from rich.console import Console
from rich.table import Table
from timing import milliseconds
from torch import Tensor

import bitassay.emulator  # noqa: F401  (--tiny: BITASSAY_ARCH switches it on)
from bitassay.engine.models.causal_lm import CausalLM
from bitassay.engine.step.fingerprints import Recorder, RowFingerprints
from bitassay.kernels.fingerprint import fingerprint_rows
from bitassay.reference.checkpoints.checkpoint import Checkpoint
from bitassay.reference.spec.contract import default_contract
from support.batches import Segment, make_batch

MODES = ("off", "same stream", "own stream")
ROWS = 2048  # of a step of prompts
Work = Callable[[], object]


def random_checkpoint(config: dict[str, Any], device: str) -> Checkpoint:
    """Return a checkpoint of random weights."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = (config[f"num_{name}_heads"] * head for name in ("attention", "key_value"))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (config["vocab_size"], hidden),
        "lm_head": (config["vocab_size"], hidden), "model.norm": (hidden,),
    }  # fmt: skip
    for layer in range(config["num_hidden_layers"]):
        of_layer = {
            "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    g = torch.Generator(device).manual_seed(0)
    tensors = {
        f"{name}.weight": (
            torch.randn(shape, device=device, generator=g) * (shape[-1] ** -0.5 if shape[1:] else 1)
        ).bfloat16()
        for name, shape in shapes.items()
    }
    return Checkpoint(Path("random"), config, tensors, "random", None)


def random_model(config: dict[str, Any], arch: str, device: str) -> CausalLM:
    """Return a model of random weights."""
    checkpoint = random_checkpoint(config, device)
    return CausalLM.from_pretrained(checkpoint, contract=default_contract(arch), device=device)


class Step:
    """`count` rows each of so many sequences behind `first` cached ones, in each mode."""

    def __init__(self, model: CausalLM, sequences: int, first: int, count: int) -> None:
        self.model = model
        rows = [Segment(s, first, count) for s in range(sequences)]
        ids = torch.arange(first, first + count).repeat(sequences) % model.config.vocab_size
        self.batch = make_batch(model, rows, ids)
        blocks = len(self.batch.cache.k[0])
        self.row_fingerprints = RowFingerprints.empty(model.operations, blocks, model.device)
        self.recorders = {
            mode: Recorder(model.ops, model.operations, model.device) for mode in MODES[1:]
        }
        self.recorders["same stream"]._side = None

    def run(self, mode: str) -> Tensor:
        """Run the layers; with capture, until all fingerprints are written."""
        if mode == "off":
            return self.model.forward(self.batch)
        recorder = self.recorders[mode].to(self.row_fingerprints.rows, self.batch.slots)
        hidden = self.model.forward(self.batch, recorder)
        recorder.join()
        return hidden

    def check(self) -> None:
        """Exit unless each mode writes what `fingerprint_rows` says."""
        seen: dict[str, Tensor] = {}
        self.model.forward(self.batch, lambda name, x: seen.update({name: fingerprint_rows(x)}))
        columns = [seen[name] for name in self.row_fingerprints.operations if name in seen]
        want = torch.stack(columns, 1)
        for mode in MODES[1:]:
            self.row_fingerprints.rows.fill_(-1)
            self.run(mode)
            got = self.row_fingerprints[self.batch.slots][:, : len(columns)]
            if not torch.equal(got, want):
                wrong = (got != want).any(0).nonzero().flatten().tolist()
                names = [self.row_fingerprints.operations[i] for i in wrong]
                sys.exit(f"{mode}: fingerprints of {', '.join(names)} differ")


def graph_of(work: Work) -> Work:
    """Return the replay of a graph of some work."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def whole_run(prompts: Step, batch: int, decode: Step, tokens: int) -> list[float]:
    """Return the milliseconds of prompts and decoding in each mode, medians of turns."""
    steps = -(-batch * prompts.batch.max_query_len // ROWS)
    replays = {mode: graph_of(partial(decode.run, mode)) for mode in MODES}
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(5):
        for mode in MODES:  # in turns: a clock that slows down slows all of them
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(steps):
                prompts.run(mode)
            for _ in range(tokens):
                replays[mode]()
            end.record()
            end.synchronize()
            found[mode].append(start.elapsed_time(end))
    return [statistics.median(found[mode]) for mode in MODES]


def cells(name: str, times: list[float]) -> list[str]:
    """Return a row of the table."""
    longer = [f"{time / times[0] - 1:+.1%}" for time in times[1:]]
    return [name, *(f"{time:.3f} ms" for time in times), *longer]


def measure(model: CausalLM, args: argparse.Namespace, table: Table) -> None:
    """Add all rows to the table."""
    prompt = args.prompt
    prompts = Step(model, ROWS // prompt, 0, prompt)
    prompts.check()
    name = f"prompts, {ROWS // prompt} x {prompt} tokens"
    table.add_row(*cells(name, [eager(partial(prompts.run, mode)) for mode in MODES]))
    for batch in map(int, args.batches.split(",")):
        decode = Step(model, batch, args.context - 1, 1)
        decode.check()
        for how, time in (("graph", milliseconds), ("eager", eager)):
            times = [time(partial(decode.run, mode)) for mode in MODES]
            table.add_row(*cells(f"decode, batch {batch}, {how}", times))
        times = whole_run(prompts, batch, decode, args.tokens)
        table.add_row(*cells(f"run, batch {batch}: {prompt} + {args.tokens} tokens", times))


def main() -> None:
    """Print one row for each phase and run; percentages are what capture adds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batches", default="1,8,64", help="of decoding")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="generated in a whole run")
    parser.add_argument("--context", type=int, default=576, help="keys of a decoding row")
    parser.add_argument("--tiny", action="store_true", help="only check bits, in the emulator")
    args = parser.parse_args()
    layers = {"num_hidden_layers": args.layers}
    if args.tiny:
        arch = os.environ.get("BITASSAY_ARCH", "sm_90")
        model = random_model(LLAMA_8B | TINY | layers, arch, "cpu")
        for step in (Step(model, 2, 0, 9), Step(model, 3, 20, 1)):
            step.check()
        print("fingerprints equal fingerprint_rows")
        return
    if not torch.cuda.is_available():
        sys.exit("benchmarks/capture.py needs a CUDA device: none was found (--tiny runs without)")
    major, minor = torch.cuda.get_device_capability()
    model = random_model(LLAMA_8B | layers, f"sm_{major}{minor}", "cuda")
    table = Table(
        title=f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton "
        f"{triton.__version__}, {datetime.date.today()}; {args.layers} layers, bf16"
    )
    for name in ("phase", *MODES, *(f"{mode} adds" for mode in MODES[1:])):
        table.add_column(name, justify="left" if name == "phase" else "right")
    with torch.inference_mode():
        measure(model, args, table)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
