"""How many drafts of a head its target accepts, in rounds as the reference defines them."""

from collections.abc import Sequence

import torch

from bitassay.reference.spec.rounds import draft_count, rounds
from training.eagle_head import EagleHead
from training.llama import Llama
from training.llama_prompts import Tokens, first_best

DEPTH = 5  # drafts a round, at most


@torch.no_grad()
def accepted_drafts(
    target: Llama, head: EagleHead, prompts: Sequence[Tokens], streams: Sequence[Tokens]
) -> list[list[int]]:
    """Return for each token of each greedy stream how many drafts after it the target accepts.

    At most DEPTH, and no more than a round there may draft. A draft counts while those before it
    are the stream's own tokens, so one pass over prompt and stream makes all chains. fp32, with
    logits rounded to bf16.
    """
    found = []
    for prompt, stream in zip(prompts, streams, strict=True):
        ids = torch.tensor([[*prompt, *stream]], device=target.lm_head.weight.device)
        hidden = target.hidden(ids[:, :-1])
        embedded = target.model["embed_tokens"](ids[:, 1:])
        drafts = torch.stack(  # [DEPTH, rows]; row p drafts token p + 2
            [first_best(target.lm_head(out[0])) for out in head(embedded, hidden, DEPTH)]
        ).tolist()
        counts = []
        for t in range(len(stream)):
            base, most = len(prompt) + t - 1, draft_count(t, len(stream), DEPTH)
            own = [drafts[j][base + j] == stream[t + 1 + j] for j in range(most)]
            counts.append((*own, False).index(False))
        found.append(counts)
    return found


def acceptance_length(accepted: Sequence[Sequence[int]], num_draft_tokens: int) -> float:
    """Return the mean number of tokens a round makes known: accepted drafts and one more."""
    all_rounds = [round_ for counts in accepted for round_ in rounds(counts, num_draft_tokens)]
    return sum(kept + 1 for _, _, kept in all_rounds) / len(all_rounds)
