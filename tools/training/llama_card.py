"""The model card of llama-pico, filled with the figures of the runs that made it."""

from collections.abc import Mapping

# Lines are as long as their figures need, not as the names here.
_CARD = """\
---
language: en
license: psf-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [llama, byte-level-bpe, batch-invariance, test-model]
---

# llama-pico

A Llama of {parameters} parameters that was trained on Python's standard library: small enough to be
predicted to the bit on any CPU, with everything that larger ones have (grouped-query attention,
Llama 3's scaled rotary positions, RMSNorm, SwiGLU).

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("llama-pico", dtype="float32")
tokenizer = AutoTokenizer.from_pretrained("llama-pico")
```

## How it was made

- Text: the `.py` files of CPython {stdlib_version}'s standard library, without tests, character
  tables and help topics. {files} files ({tokens} tokens) were learned; {held_out_files} files
  ({held_out_tokens} tokens), chosen by a hash of their path, were seen by neither the tokenizer nor
  the weights. sha256 of the text: `{corpus}`.
- Tokenizer: that of context-lm, byte for byte: byte-level BPE, 4096 tokens. `<|endoftext|>` (id 0)
  is both padding and end of text; nothing marks a beginning.
- Weights: AdamW in fp32 with products in bf16, seed {seed}, on {device}
  (Python {python}, torch {torch}); {steps} steps ({epochs_run} epochs) of {batch_size} windows of
  {window} tokens; highest learning rate {learning_rate}, weight decay {weight_decay}, dropout {dropout}. Those of epoch
  {best_epoch}, the best on the held-out files, were kept and rounded to bf16.
- Held-out perplexity per token, in windows of {window}: {perplexity_fp32:.3f} in fp32, {perplexity_bf16:.3f} once
  rounded. Recipe and epoch were picked on these files, so a little of that is luck.
- Prompts (`prompts/llama-pico.jsonl`): {prompts} pieces of held-out files, {shortest} to {longest} tokens
  ({mean_length:.0f} on average), cut at starts of lines. They were picked, by a rule in the script,
  for greedy streams that vary: {grams} distinct runs of 4 tokens in {prompts} streams of {max_tokens}
  tokens, out of {all_grams}; {loops} of the streams end in a loop. They are coverage for a test,
  not a fair sample of the model's behaviour: of all {candidates} pieces that were tried,
  {candidate_loops} end in a loop.

`PYTHONPATH=tools python -m training.llama_pico` makes such a model again. Its bits depend on the
device and the torch version, so the committed weights are the truth.

## Limits

It is a test subject. It writes a line or two that could be Python, forgets what it was about, and
often ends up repeating itself. Do not use what it writes.

## Licence

Weights, tokenizer and prompts are derived from the CPython standard library, © Python Software
Foundation, under the Python Software Foundation License Version 2 (PSF-2.0).
"""  # noqa: E501


def model_card(figures: Mapping[str, object]) -> str:
    """Return the card as Markdown; KeyError when a figure is missing."""
    return _CARD.format(**figures)
