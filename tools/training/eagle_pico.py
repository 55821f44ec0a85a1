"""Train the draft head `eagle-pico` for llama-pico and choose its prompts.

From a checkout, first the weights (minutes on a GPU), then prompts and model card (on any CPU):

    PYTHONPATH=tools python -m training.eagle_pico train --device cuda
    PYTHONPATH=tools python -m training.eagle_pico prompts

The committed weights are the truth: this script says how they came to be. Another device or torch
rounds differently, so running it again makes a new head, with goldens of its own.
"""

import hashlib
import json
import platform
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file
from tokenizers import Tokenizer

from training.corpus import SourceFile, corpus_digest, read_corpus
from training.eagle_acceptance import acceptance_length, accepted_drafts
from training.eagle_card import model_card
from training.eagle_head import EagleHead, embedding_scale
from training.eagle_prompts import GROUPS, choose_prompts, held_out_pieces
from training.eagle_streams import BUCKET, DRAWN, make_streams
from training.eagle_training import EagleRecipe, train
from training.huggingface import save_weights, write_json
from training.llama import Llama, LlamaConfig
from training.llama_pico import END_ID, FIGURES, GOLDEN
from training.llama_prompts import GRAM, Tokens, grams, greedy_streams, loops
from training.llama_training import token_stream
from training.prompts import write_prompts

DRAFTS = (1, 3, 5)  # what acceptance lengths are told for
LONGEST_PROMPT = 224
STREAM_TOKENS = 96
LEARNED_TOKENS = 128  # greedy ones in a window, at least

TargetFolder = Annotated[Path, typer.Option(help="directory of the target's checkpoint")]
ModelFolder = Annotated[Path, typer.Option(help="directory of the head's checkpoint")]
Stdlib = Annotated[
    Path | None, typer.Option(help="standard library the target learned; default: this Python's")
]
Threads = Annotated[int, typer.Option(min=1, help="torch's threads on the CPU")]
TARGET_FOLDER = GOLDEN / "models" / "llama-pico"
MODEL_FOLDER = GOLDEN / "models" / "eagle-pico"

console = Console()
app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


@app.command("train")
def train_command(
    target_folder: TargetFolder = TARGET_FOLDER,
    model_folder: ModelFolder = MODEL_FOLDER,
    stdlib: Stdlib = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    threads: Threads = 2,
    seed: Annotated[int, typer.Option(help="of streams, initialisation and batches")] = 20261,
    intermediate_size: Annotated[int, typer.Option(min=1)] = 704,
    streams: Annotated[int, typer.Option(min=1, help="windows made for each bucket")] = 6144,
    steps: Annotated[int, typer.Option(min=1)] = 20000,
    minutes: Annotated[
        float | None, typer.Option(help="shorten the schedule to about this long")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="windows a step")] = 64,
    learning_rate: Annotated[float, typer.Option(help="highest of the schedule")] = 2e-3,
    weight_decay: Annotated[float, typer.Option(min=0.0)] = 0.05,
    depth: Annotated[int, typer.Option(min=1, max=5, help="drafts that are learned")] = 4,
    text_weight: Annotated[float, typer.Option(min=0.0)] = 0.2,
    hidden_weight: Annotated[float, typer.Option(min=0.0)] = 0.1,
    held_out_each: Annotated[int, typer.Option(min=1, help="held-out pieces a length")] = 32,
) -> None:
    """Train, write the checkpoint and its figures, and tell how well it drafts."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")  # for streams; drafts are counted in full fp32
    recipe = EagleRecipe(
        *(seed, steps, batch_size, learning_rate, weight_decay),
        *(depth, text_weight, hidden_weight, minutes),
    )
    target, tokenizer, learned_from = load_target(target_folder)
    files = matching_corpus(stdlib, target_folder, learned_from)
    target.to(device)
    learned = [file for file in files if not file.held_out]
    text = token_stream(tokenizer, learned, END_ID).to(device)
    with Progress(console=console) as progress:
        buckets = LONGEST_PROMPT // BUCKET
        task = progress.add_task("streams", total=streams * buckets)
        made = make_streams(
            target,
            text,
            longest=LONGEST_PROMPT,
            tokens=LEARNED_TOKENS,
            count=streams,
            seed=seed,
            heard=lambda count: progress.update(task, completed=count),
        )
    config = LlamaConfig(num_hidden_layers=1, intermediate_size=intermediate_size)
    head = EagleHead(config, embedding_scale(target)).to(device)
    with Progress(console=console) as progress:
        for step, last, value, right in train(target, head, made, recipe, progress):
            shares = " ".join(f"{share:.3f}" for share in right)
            progress.console.print(f"step {step} of {last}: loss {value:.3f}, right {shares}")

    model_folder.mkdir(parents=True, exist_ok=True)
    write_json(model_folder / "config.json", config.to_json())
    save_weights(model_folder, head.tensors())
    torch.set_float32_matmul_precision("highest")
    kept = [file for file in files if file.held_out]
    pieces = [piece.ids for piece in held_out_pieces(tokenizer, kept, held_out_each, seed)]
    continuations = greedy_streams(target, pieces, STREAM_TOKENS)
    unrounded = accepted_drafts(target, head.eval(), pieces, continuations)
    figures = {
        "target": sha256_of(target_folder / "model.safetensors"),
        "stdlib_version": learned_from["stdlib_version"],
        "corpus": learned_from["corpus"],
        "parameters": sum(parameter.numel() for parameter in head.parameters()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "a CPU",
        "seed": seed,
        "longest_learned": LONGEST_PROMPT,
        "greedy_tokens": LEARNED_TOKENS,
        "drawn": DRAWN,
        "windows": sum(len(bucket.ids) for bucket in made),
        "windows_made": streams * len(made),
        "window_tokens": sum(bucket.ids.numel() for bucket in made),
        "steps": last,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "chain_rows": depth - 1,
        "text_weight": text_weight,
        "hidden_weight": hidden_weight,
        "acceptance_fp32": {str(k): acceptance_length(unrounded, k) for k in DRAFTS},
    }
    rounded = load_head(model_folder).to(device)
    figures |= acceptance_figures(target, rounded, pieces, continuations, "held_out")
    write_json(model_folder / FIGURES, figures)
    console.print(figures)


@app.command("prompts")
def prompts_command(
    target_folder: TargetFolder = TARGET_FOLDER,
    model_folder: ModelFolder = MODEL_FOLDER,
    prompts_file: Annotated[Path, typer.Option(help="where the prompts are written")] = GOLDEN
    / "prompts"
    / "eagle-pico.jsonl",
    stdlib: Stdlib = None,
    threads: Threads = 2,
    seed: Annotated[int, typer.Option(help="of the order and the candidates")] = 20261,
    held_out_each: Annotated[int, typer.Option(min=1, help="held-out pieces a length")] = 32,
) -> None:
    """Choose the prompts by the target's streams; write them, their figures and the model card."""
    torch.set_num_threads(threads)
    target, tokenizer, learned_from = load_target(target_folder)
    figures = json.loads((model_folder / FIGURES).read_text(encoding="utf-8"))
    if figures["target"] != sha256_of(target_folder / "model.safetensors"):
        raise typer.BadParameter(
            f"{model_folder} was trained for weights of sha256 {figures['target']}, those of "
            f"{target_folder} are others: train it again, or name its target with --target-folder"
        )
    kept = [f for f in matching_corpus(stdlib, target_folder, learned_from) if f.held_out]
    with Progress(console=console) as progress:
        task = progress.add_task("prompts", total=None)
        prompts = choose_prompts(
            target,
            tokenizer,
            kept,
            max_tokens=STREAM_TOKENS,
            seed=seed,
            heard=lambda streams: progress.advance(task, len(streams)),
        )
    write_prompts(prompts_file, "eagle-pico", prompts)
    head = load_head(model_folder)
    ids = [prompt.ids for prompt in prompts]
    streams = greedy_streams(target, ids, STREAM_TOKENS)
    lengths = [len(prompt) for prompt in ids]
    figures |= {
        "prompts": len(prompts),
        "groups": len(GROUPS),
        "shortest": min(lengths),
        "longest": max(lengths),
        "mean_length": sum(lengths) / len(lengths),
        "max_tokens": STREAM_TOKENS,
        "grams": len({gram for stream in streams for gram in grams(stream)}),
        "all_grams": len(streams) * (STREAM_TOKENS - GRAM + 1),
        "loops": sum(loops(stream) for stream in streams),
    }
    figures |= acceptance_figures(target, head, ids, streams, "suite")
    mine = {prompt.text for prompt in prompts}
    pieces = held_out_pieces(tokenizer, kept, held_out_each, seed)
    others = [piece.ids for piece in pieces if piece.text not in mine]
    other_streams = greedy_streams(target, others, STREAM_TOKENS)
    figures |= acceptance_figures(target, head, others, other_streams, "held_out")
    write_json(model_folder / FIGURES, figures)
    (model_folder / "README.md").write_text(model_card(figures), encoding="utf-8")
    console.print(figures)


def load_target(folder: Path) -> tuple[Llama, Tokenizer, dict[str, Any]]:
    """Return the target in fp32, its tokenizer, and the figures of its training."""
    figures = json.loads((folder / FIGURES).read_text(encoding="utf-8"))
    model = Llama(LlamaConfig())
    model.load_state_dict(load_file(folder / "model.safetensors"))  # bf16 -> fp32, exact
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json")), figures


def load_head(folder: Path) -> EagleHead:
    """Return a written head in fp32, with the weights as they were rounded."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    head = EagleHead(
        LlamaConfig(num_hidden_layers=1, intermediate_size=config["intermediate_size"])
    )
    if config != head.config.to_json():
        raise typer.BadParameter(f"{folder}: config.json is not of a head that this script writes")
    head.load_state_dict(load_file(folder / "model.safetensors"))
    return head.eval()


def matching_corpus(
    stdlib: Path | None, target_folder: Path, figures: dict[str, Any]
) -> list[SourceFile]:
    """Return the files that the target learned or was kept from; BadParameter for any others."""
    files = read_corpus(stdlib)
    if corpus_digest(files) != figures["corpus"]:
        raise typer.BadParameter(
            f"{target_folder} was trained on the standard library of Python "
            f"{figures['stdlib_version']} (sha256 {figures['corpus']}), this one's sha256 is "
            f"{corpus_digest(files)}: name that one with --stdlib"
        )
    return files


def acceptance_figures(
    target: Llama, head: EagleHead, prompts: list[Tokens], streams: list[Tokens], name: str
) -> dict[str, Any]:
    """Return the acceptance length for each K, of all streams and of those that do not loop."""
    accepted = accepted_drafts(target, head, prompts, streams)
    varied = [own for own, stream in zip(accepted, streams, strict=True) if not loops(stream)]
    return {
        f"{name}_streams": len(streams),
        f"{name}_acceptance": {str(k): acceptance_length(accepted, k) for k in DRAFTS},
        f"{name}_streams_without_loop": len(varied),
        f"{name}_acceptance_without_loop": {
            str(k): acceptance_length(varied, k) for k in DRAFTS if varied
        },
    }


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, so that another target cannot pass for this head's."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    app()
