"""bitassay: the exact bits of batch-invariant LLM inference, predicted on any CPU."""

__version__ = "0.1.0"
