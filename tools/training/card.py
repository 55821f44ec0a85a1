"""The model card of context-lm, filled with the figures of the run that made it."""

from collections.abc import Mapping

_CARD = """\
---
language: en
license: psf-2.0
library_name: bitassay
pipeline_tag: text-generation
tags: [byte-level-bpe, batch-invariance, test-model]
---

# context-lm

A language model made of nothing but embeddings and an lm_head, small enough to be predicted to the
bit on any CPU and real enough to write something like Python.

## What it computes

For each token, four position-specific tables (`embed_tokens.0` for the newest token to
`embed_tokens.3` for the oldest of the last four) give 64 values each. Missing tokens are
`pad_token_id`. The 256 values are concatenated and go through `lm_head` (weight [4096, 256] and
bias [4096]). All tensors are bf16.

## How it was made

- Text: the `.py` files of CPython {python}'s standard library, without tests, character tables and
  help topics. {files} files ({tokens} tokens) were learned; {held_out_files} files
  ({held_out_tokens} tokens), chosen by a hash of their path, were seen by neither the tokenizer nor
  the weights. sha256 of the text: `{corpus}`.
- Tokenizer: byte-level BPE, 4096 tokens, all 256 bytes among them. `<|endoftext|>` (id 0) is both
  padding and end of text.
- Weights: AdamW in fp32 on a CPU, {epochs} epochs, seed {seed}, {threads} threads, torch {torch};
  rounded to bf16 at the end.
- Held-out perplexity per token: {perplexity_fp32:.3f} in fp32, {perplexity_bf16:.3f} once
  rounded.
- Prompts (`prompts/context-lm.jsonl`): {prompts} pieces of held-out files, 1 to 40 tokens, cut at
  starts of lines. They were picked, by a rule in the script, for greedy streams that visit many
  different contexts: {contexts} distinct ones in {prompts} streams of {max_tokens} tokens
  ({streams} distinct streams), {loops} of which run into a loop. They are coverage for a test, not
  a fair sample of the model's behaviour.

`PYTHONPATH=tools python -m training.context_lm` makes such a model again. Its bits depend on the
CPU and the torch version, so the committed weights are the truth.

## Limits

It is a test subject. It sees four tokens, forgets the rest, closes few of the brackets it opens,
and on most prompts of your own greedy decoding soon loops. Do not use what it writes.

## Licence

Weights, tokenizer and prompts are derived from the CPython standard library, © Python Software
Foundation, under the Python Software Foundation License Version 2 (PSF-2.0).
"""


def model_card(figures: Mapping[str, object]) -> str:
    """Return the card as Markdown; KeyError when a figure is missing."""
    return _CARD.format(**figures)
