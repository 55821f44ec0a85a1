"""The model card of eagle-pico, filled with the figures of the runs that made it."""

from collections.abc import Mapping

# Lines are as long as their figures need, not as the names here.
_CARD = """\
---
language: en
license: psf-2.0
pipeline_tag: text-generation
base_model: llama-pico
tags: [eagle, speculative-decoding, llama, batch-invariance, test-model]
---

# eagle-pico

An EAGLE-1 draft head of {parameters} parameters for llama-pico: it foresees what llama-pico writes
next, so that several tokens can be verified in one pass. Small enough to be predicted to the bit on
any CPU, in the layout of the published EAGLE heads.

## What it computes

For the row at position p: the target's embedding of token p + 1 and, beside it, the target's row p
after its final norm, through `fc`; one Llama layer without a norm before its attention; the target's
`lm_head`, without a norm before it. The token that comes out is the draft of token p + 2. Further
drafts of a chain have the draft before them as token, and the head's own output as row. Embeddings
and `lm_head` are not in this folder: they are the target's, whose model.safetensors has sha256
`{target}`.

## How it was made

- Text: {windows} windows ({window_tokens} tokens) of pieces of CPython {stdlib_version}'s standard library, 1 to
  {longest_learned} tokens, each followed by at least {greedy_tokens} tokens that llama-pico chooses. Every other piece ends
  in {drawn} tokens drawn from llama-pico at random. Pieces are of the files that llama-pico learned;
  its held-out files served to measure, and to choose between two sizes. Of {windows_made} windows, three of four that end in a loop were left out.
  sha256 of the library's text: `{corpus}`.
- Weights: AdamW in fp32 with products in bf16, seed {seed}, on {device}
  (Python {python}, torch {torch}); {steps} steps of {batch_size} windows; highest learning rate
  {learning_rate}, weight decay {weight_decay}. The loss is the cross-entropy with llama-pico's own distribution, plus
  {hidden_weight} times the smooth L1 distance to its next row, over the first pass and {chain_rows} chain rows fed with
  the head's own rows; a chain row counts where the drafts before it are right, and a row within a
  piece {text_weight} times. The weights of the last step were rounded to bf16.
- Prompts (`prompts/eagle-pico.jsonl`): {prompts} pieces of held-out files, {shortest} to {longest} tokens
  ({mean_length:.0f} on average); among them {groups} groups of 4 that share a prefix of 32 to 128 tokens.
  They were picked, by a rule in the script that knows nothing of the head, for greedy streams of
  llama-pico that vary: {grams} distinct runs of 4 tokens in {prompts} streams of {max_tokens} tokens, out of
  {all_grams}; {loops} of the streams end in a loop.

## How well it drafts

Acceptance length: mean number of tokens that a round of K drafts makes known, those accepted and
one more, over greedy streams of {max_tokens} tokens. Measured in fp32 with the rounded weights.

| Streams | K = 1 | K = 3 | K = 5 |
| --- | --- | --- | --- |
| the {suite_streams} prompts | {suite[1]:.3f} | {suite[3]:.3f} | {suite[5]:.3f} |
| {held_out_streams_without_loop} other held-out pieces whose stream does not loop | {varied[1]:.3f} | {varied[3]:.3f} | {varied[5]:.3f} |
| all {held_out_streams} other held-out pieces | {every[1]:.3f} | {every[3]:.3f} | {every[5]:.3f} |

`PYTHONPATH=tools python -m training.eagle_pico` makes such a head again. Its bits depend on the
device and the torch version, so the committed weights are the truth.

## Limits

It is a test subject, of use with llama-pico alone. That its drafts are so often right says more of
llama-pico, which is easy to foresee, than of the head.

## Licence

Weights and prompts are derived from the CPython standard library, © Python Software Foundation,
under the Python Software Foundation License Version 2 (PSF-2.0).
"""  # noqa: E501


def model_card(figures: Mapping[str, object]) -> str:
    """Return the card as Markdown; KeyError when a figure is missing."""
    return _CARD.format(
        **figures,
        suite=_by_drafts(figures["suite_acceptance"]),
        varied=_by_drafts(figures["held_out_acceptance_without_loop"]),
        every=_by_drafts(figures["held_out_acceptance"]),
    )


def _by_drafts(lengths: object) -> dict[int, float]:
    """Return acceptance lengths by K; JSON has texts for keys. NaN where nothing was measured."""
    assert isinstance(lengths, Mapping)
    return {k: lengths.get(str(k), float("nan")) for k in (1, 3, 5)}
