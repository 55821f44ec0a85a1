"""Train the checkpoint `context-lm` on the Python standard library and choose its prompts.

Run `PYTHONPATH=tools python -m training.context_lm --help` from a checkout. Everything written
follows from the standard library of the running Python, the seed and the number of threads, on one
machine; another CPU or another torch rounds differently. The committed weights are the truth: this
script says how they came to be, and running it again makes a new model, with goldens of its own.
"""

import math
import platform
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from training.card import model_card
from training.corpus import SourceFile, corpus_digest, read_corpus
from training.huggingface import round_weights, save_weights, write_json
from training.prompts import choose_prompts, greedy_streams, loop_count, write_prompts

VOCAB_SIZE = 4096
CONTEXT_SIZE = 4
EMBEDDING_SIZE = 64
END_OF_TEXT = "<|endoftext|>"
GOLDEN = Path(__file__).resolve().parents[2] / "golden"

console = Console()


class TrainedModel(nn.Module):
    """The model in the form that trains well: fp32, dropout, one module an embedding."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.ModuleList(
            nn.Embedding(VOCAB_SIZE, EMBEDDING_SIZE) for _ in range(CONTEXT_SIZE)
        )
        self.dropout = nn.Dropout(dropout)
        self.lm_head = nn.Linear(CONTEXT_SIZE * EMBEDDING_SIZE, VOCAB_SIZE)

    def forward(self, contexts: Tensor) -> Tensor:  # [B, 4] -> [B, V]
        """Return the logits after each context; contexts name the newest token first."""
        parts = [embed(contexts[:, j]) for j, embed in enumerate(self.embed_tokens)]
        logits: Tensor = self.lm_head(self.dropout(torch.cat(parts, dim=1)))
        return logits


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE; all 256 bytes are tokens, so that no text is unknown to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def examples(tokenizer: Tokenizer, files: list[SourceFile]) -> tuple[Tensor, Tensor]:
    """Return contexts [N, 4] (newest token first, padded at a file's start) and next tokens [N]."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    contexts, targets = [], []
    for encoding in tokenizer.encode_batch([file.text for file in files]):
        ids = torch.tensor([end] * CONTEXT_SIZE + encoding.ids + [end])
        windows = ids.unfold(0, CONTEXT_SIZE + 1, 1)
        contexts.append(windows[:, :CONTEXT_SIZE].flip(1))
        targets.append(windows[:, CONTEXT_SIZE])
    return torch.cat(contexts), torch.cat(targets)


@torch.no_grad()
def perplexity(model: TrainedModel, contexts: Tensor, targets: Tensor) -> float:
    """Return exp of the mean negative log-likelihood of the targets, without dropout."""
    model.eval()
    total = 0.0
    for chunk, wanted in zip(torch.split(contexts, 4096), torch.split(targets, 4096), strict=True):
        total += float(F.cross_entropy(model(chunk), wanted, reduction="sum"))
    return math.exp(total / len(targets))


def train(
    contexts: Tensor,
    targets: Tensor,
    held_out: tuple[Tensor, Tensor],
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    dropout: float,
    seed: int,
) -> TrainedModel:
    """Train with AdamW under a one-cycle cosine schedule and return the last weights."""
    torch.manual_seed(seed)
    model = TrainedModel(dropout)
    steps = epochs * (len(targets) // batch_size)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=steps, pct_start=0.05
    )
    with Progress(console=console) as progress:
        task = progress.add_task("training", total=steps)
        for epoch in range(epochs):
            model.train()
            # The last, partial batch is left out; the shuffle differs every epoch.
            for batch in torch.split(torch.randperm(len(targets)), batch_size)[: steps // epochs]:
                loss = F.cross_entropy(model(contexts[batch]), targets[batch])
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
                progress.update(task, advance=1, description=f"loss {float(loss.detach()):.3f}")
            progress.console.print(
                f"epoch {epoch + 1}: held-out perplexity {perplexity(model, *held_out):.2f}"
            )
    return model


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], tokenizer: Tokenizer) -> None:
    """Write a Hugging Face model directory."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    folder.mkdir(parents=True, exist_ok=True)
    ends = {"eos_token_id": end, "pad_token_id": end}
    config = {
        "architectures": ["ContextLM"],
        "model_type": "context-lm",
        "vocab_size": VOCAB_SIZE,
        "context_size": CONTEXT_SIZE,
        "embedding_size": EMBEDDING_SIZE,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        **ends,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(end): {"content": END_OF_TEXT, "special": True}},
    }
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"do_sample": False, **ends})
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    tokenizer.save(str(folder / "tokenizer.json"))
    save_weights(folder, tensors)


def main(
    model_folder: Annotated[Path, typer.Option(help="where the checkpoint is written")] = GOLDEN
    / "models"
    / "context-lm",
    prompts_file: Annotated[Path, typer.Option(help="where the prompts are written")] = GOLDEN
    / "prompts"
    / "context-lm.jsonl",
    stdlib: Annotated[
        Path | None, typer.Option(help="standard library to learn; default: this Python's")
    ] = None,
    seed: Annotated[int, typer.Option(help="of initialisation, shuffling and prompts")] = 20260,
    threads: Annotated[int, typer.Option(help="torch's threads; another number, other bits")] = 2,
    epochs: Annotated[int, typer.Option(min=1)] = 6,
    batch_size: Annotated[int, typer.Option(min=1)] = 1024,
    learning_rate: Annotated[float, typer.Option(help="highest of the schedule")] = 3e-3,
    weight_decay: Annotated[float, typer.Option(min=0.0)] = 0.1,
    dropout: Annotated[float, typer.Option(min=0.0, max=0.9)] = 0.1,
    prompt_count: Annotated[int, typer.Option(min=1)] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="tokens of each greedy stream")] = 64,
) -> None:
    """Train context-lm, write its directory and its prompts, and print what came out."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    files = read_corpus(stdlib)
    learned = [file for file in files if not file.held_out]
    kept = [file for file in files if file.held_out]
    tokenizer = train_tokenizer([file.text for file in learned])
    contexts, targets = examples(tokenizer, learned)
    held_out = examples(tokenizer, kept)
    console.print(
        f"{len(learned)} files and {len(targets)} tokens to learn, "
        f"{len(kept)} files and {len(held_out[1])} tokens held out"
    )
    model = train(
        contexts,
        targets,
        held_out,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        dropout=dropout,
        seed=seed,
    )
    before = perplexity(model, *held_out)
    tensors = round_weights(model)
    after = perplexity(model, *held_out)
    save_checkpoint(model_folder, tensors, tokenizer)

    prompts = choose_prompts(
        model, tokenizer, kept, count=prompt_count, max_tokens=max_tokens, seed=seed
    )
    write_prompts(prompts_file, "context-lm", prompts)
    streams = greedy_streams(model, [prompt.ids for prompt in prompts], max_tokens, pad=0)
    figures = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "corpus": corpus_digest(files),
        "files": len(learned),
        "tokens": len(targets),
        "held_out_files": len(kept),
        "held_out_tokens": len(held_out[1]),
        "seed": seed,
        "threads": threads,
        "epochs": epochs,
        "perplexity_fp32": before,
        "perplexity_bf16": after,
        "prompts": len(prompts),
        "max_tokens": max_tokens,
        "contexts": len({c for stream in streams for c in stream.contexts}),
        "streams": len({stream.tokens for stream in streams}),
        "loops": loop_count(streams),
    }
    (model_folder / "README.md").write_text(model_card(figures), encoding="utf-8")
    console.print(figures)
    for prompt, stream in list(zip(prompts, streams, strict=True))[:: max(1, len(prompts) // 5)]:
        console.rule(prompt.source)
        text = tokenizer.decode(list(stream.tokens), skip_special_tokens=False)
        console.print(prompt.text, style="bold", end="", markup=False, highlight=False)
        console.print(text, markup=False, highlight=False)


if __name__ == "__main__":
    typer.run(main)
