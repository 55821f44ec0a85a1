"""Train the checkpoint `llama-pico` on the Python standard library and choose its prompts.

From a checkout, first the weights (minutes on a GPU), then prompts and model card (on any CPU):

    PYTHONPATH=tools python -m training.llama_pico train --device cuda
    PYTHONPATH=tools python -m training.llama_pico prompts

The committed weights are the truth: this script says how they came to be. Another device or torch
rounds differently, so running it again makes a new model, with goldens of its own.
"""

import json
import platform
import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file
from tokenizers import Tokenizer

from training.corpus import corpus_digest, read_corpus
from training.huggingface import round_weights, save_weights, write_json
from training.llama import Llama, LlamaConfig
from training.llama_card import model_card
from training.llama_prompts import (
    CANDIDATES_PER_PROMPT,
    GRAM,
    choose_prompts,
    grams,
    greedy_streams,
    loops,
    prompt_lengths,
)
from training.llama_training import Recipe, perplexity, token_stream, train
from training.prompts import write_prompts

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
FIGURES = "training.json"
END_ID = 0

ModelFolder = Annotated[Path, typer.Option(help="directory of the checkpoint")]
Stdlib = Annotated[
    Path | None, typer.Option(help="standard library to learn; default: this Python's")
]
Threads = Annotated[int, typer.Option(min=1, help="torch's threads on the CPU")]
MODEL_FOLDER = GOLDEN / "models" / "llama-pico"

console = Console()
app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


@app.command("train")
def train_command(
    model_folder: ModelFolder = MODEL_FOLDER,
    tokenizer_folder: Annotated[
        Path, typer.Option(help="directory whose tokenizer is taken over unchanged")
    ] = GOLDEN / "models" / "context-lm",
    stdlib: Stdlib = None,
    stdlib_version: Annotated[
        str | None, typer.Option(help="Python version of --stdlib; default: this Python's")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    threads: Threads = 2,
    seed: Annotated[int, typer.Option(help="of initialisation, shuffling and dropout")] = 20260,
    epochs: Annotated[int, typer.Option(min=1)] = 30,
    minutes: Annotated[
        float | None, typer.Option(help="shorten the schedule to about this long")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="windows a step")] = 16,
    window: Annotated[int, typer.Option(min=2, help="tokens a window")] = 512,
    learning_rate: Annotated[float, typer.Option(help="highest of the schedule")] = 2e-3,
    weight_decay: Annotated[float, typer.Option(min=0.0)] = 0.2,
    dropout: Annotated[float, typer.Option(min=0.0, max=0.9)] = 0.2,
) -> None:
    """Train, and after every epoch that beats those before write the checkpoint and its figures."""
    if stdlib is not None and stdlib_version is None:
        raise typer.BadParameter("--stdlib needs --stdlib-version, for the model card")
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    recipe = Recipe(seed, epochs, batch_size, window, learning_rate, weight_decay, dropout, minutes)
    files = read_corpus(stdlib)
    learned = [file for file in files if not file.held_out]
    kept = [file for file in files if file.held_out]
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    stream = token_stream(tokenizer, learned, END_ID).to(device)
    held_out = token_stream(tokenizer, kept, END_ID).to(device)

    model_folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer_folder / name, model_folder / name)
    write_json(model_folder / "config.json", config.to_json())
    ends = {"eos_token_id": END_ID, "pad_token_id": END_ID}
    write_json(model_folder / "generation_config.json", {"do_sample": False, **ends})

    model = Llama(config, dropout).to(device)
    rounded = Llama(config).to(device)  # a copy: training goes on with what is not rounded
    best = float("inf")
    with Progress(console=console) as progress:
        for epoch in train(model, stream, held_out, recipe, progress):
            progress.console.print(
                f"epoch {epoch.number}, step {epoch.step} of {epoch.steps}: loss {epoch.loss:.3f}, "
                f"held-out perplexity {epoch.perplexity:.3f}"
            )
            if epoch.perplexity >= best:
                continue
            best = epoch.perplexity
            rounded.load_state_dict(model.state_dict())
            save_weights(model_folder, round_weights(rounded))
            figures = {
                "stdlib_version": stdlib_version or platform.python_version(),
                "corpus": corpus_digest(files),
                "files": len(learned),
                "tokens": len(stream) - 1,
                "held_out_files": len(kept),
                "held_out_tokens": len(held_out) - 1,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "device": torch.cuda.get_device_name() if device == "cuda" else "a CPU",
                "seed": seed,
                "batch_size": batch_size,
                "window": window,
                "learning_rate": learning_rate,
                "weight_decay": weight_decay,
                "dropout": dropout,
                "steps": epoch.steps,
                "epochs_run": round(epoch.steps * batch_size * window / len(stream), 1),
                "best_epoch": epoch.number,
                "perplexity_fp32": epoch.perplexity,
                "perplexity_bf16": perplexity(rounded, held_out, window),
            }
            write_json(model_folder / FIGURES, figures)
    console.print(f"{model_folder}: held-out perplexity {figures['perplexity_bf16']:.3f} in bf16")


@app.command("prompts")
def prompts_command(
    model_folder: ModelFolder = MODEL_FOLDER,
    prompts_file: Annotated[Path, typer.Option(help="where the prompts are written")] = GOLDEN
    / "prompts"
    / "llama-pico.jsonl",
    stdlib: Stdlib = None,
    threads: Threads = 2,
    seed: Annotated[int, typer.Option(help="of the order and the candidates")] = 20260,
    max_tokens: Annotated[int, typer.Option(min=1, help="tokens of each greedy stream")] = 64,
) -> None:
    """Choose the prompts with the checkpoint's weights; write them and the model card."""
    torch.set_num_threads(threads)
    figures = json.loads((model_folder / FIGURES).read_text(encoding="utf-8"))
    files = read_corpus(stdlib)
    if corpus_digest(files) != figures["corpus"]:
        raise typer.BadParameter(
            f"{model_folder} was trained on the standard library of Python "
            f"{figures['stdlib_version']} (sha256 {figures['corpus']}), this one's sha256 is "
            f"{corpus_digest(files)}: name that one with --stdlib"
        )
    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    model = Llama(LlamaConfig())
    model.load_state_dict(load_file(model_folder / "model.safetensors"))  # bf16 -> fp32, exact
    lengths = prompt_lengths(seed)
    tried: list[tuple[int, ...]] = []
    with Progress(console=console) as progress:
        task = progress.add_task("candidates", total=CANDIDATES_PER_PROMPT * len(lengths))

        def heard(streams: list[tuple[int, ...]]) -> None:
            tried.extend(streams)
            progress.advance(task, len(streams))

        prompts = choose_prompts(
            model,
            tokenizer,
            [file for file in files if file.held_out],
            lengths,
            max_tokens=max_tokens,
            seed=seed,
            heard=heard,
        )
    write_prompts(prompts_file, "llama-pico", prompts)
    streams = greedy_streams(model, [prompt.ids for prompt in prompts], max_tokens)
    figures |= {
        "prompts": len(prompts),
        "shortest": min(lengths),
        "longest": max(lengths),
        "mean_length": sum(lengths) / len(lengths),
        "max_tokens": max_tokens,
        "grams": len({gram for stream in streams for gram in grams(stream)}),
        "all_grams": len(streams) * (max_tokens - GRAM + 1),
        "loops": sum(loops(stream) for stream in streams),
        "candidates": len(tried),
        "candidate_loops": sum(loops(stream) for stream in tried),
    }
    (model_folder / "README.md").write_text(model_card(figures), encoding="utf-8")
    console.print(figures)
    for prompt, tokens in list(zip(prompts, streams, strict=True))[::8]:
        console.rule(prompt.source)
        console.print(prompt.text, style="bold", end="", markup=False, highlight=False)
        text = tokenizer.decode(list(tokens), skip_special_tokens=False)
        console.print(text, markup=False, highlight=False)


if __name__ == "__main__":
    app()
