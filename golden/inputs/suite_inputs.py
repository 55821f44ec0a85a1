"""All that a golden follows from, read and digested: model, encoded prompts, contract."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from bitassay.golden.errors import GoldenError, PromptError
from bitassay.golden.inputs.checkpoint_cache import describe_checkpoint
from bitassay.golden.inputs.job import Job
from bitassay.golden.inputs.model_info import ModelFacts, model_facts
from bitassay.golden.inputs.prompts import encode_prompts, load_prompts
from bitassay.golden.provenance import Identity
from bitassay.golden.suites import Suite
from bitassay.reference.checkpoints.checkpoint import load_tokenizer
from bitassay.reference.spec.contract import default_contract


@dataclass(frozen=True)
class Inputs:
    """What a golden follows from. The weights are not kept: whoever runs the job reads them."""

    facts: ModelFacts
    identity: Identity
    job: Job

    def first(self, count: int, steps: int) -> Job:
        """Return the job for the first `count` prompts and their first `steps` tokens.

        Raises GoldenError when there are fewer prompts.
        """
        job = self.job
        if not 1 <= count <= len(job.prompts):
            raise GoldenError(
                f"asked for {count} prompts: expected 1 to {len(job.prompts)}, which is all"
            )
        names, prompts = job.prompt_names[:count], job.prompts[:count]
        return replace(job, prompt_names=names, prompts=prompts, steps=steps)


def load_inputs(suite: Suite, arch: str) -> Inputs:
    """Read a suite's model, tokenizer and prompts; errors say which of them is unfit and why."""
    checkpoint = describe_checkpoint(suite.model)
    draft = describe_checkpoint(suite.draft) if suite.draft else None
    contract = default_contract(arch)
    facts = model_facts(checkpoint, contract, draft)
    prompts, prompts_digest = load_prompts(suite.prompts)
    texts = any(prompt.token_ids is None for prompt in prompts)
    if texts and checkpoint.tokenizer_digest is None:
        raise PromptError(
            f"prompts {suite.prompts} hold text, and {suite.model} has no tokenizer.json to encode "
            'it: add that file, or give "token_ids" in place of "text"'
        )
    tokenizer = load_tokenizer(suite.model) if texts else None
    encoded = encode_prompts(prompts, tokenizer, facts.vocab_size)
    identity = Identity(
        suite=suite.name,
        arch=arch,
        contract_version=contract.version,
        contract=contract.digest,
        model=checkpoint.digest,
        tokenizer=checkpoint.tokenizer_digest or "",
        prompts=prompts_digest,
        tokens=suite.tokens,
        rotary_table=facts.rotary_table,
        draft_model=draft.digest if draft else "",
    )
    job = Job(
        Path(suite.model),
        checkpoint.digest,
        arch,
        tuple(prompt.id for prompt in prompts),
        tuple(map(tuple, encoded)),
        suite.tokens,
        draft=suite.draft and Path(suite.draft),
        draft_digest=identity.draft_model,
    )
    return Inputs(facts, identity, job)
