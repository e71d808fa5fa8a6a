"""A small Llama of random weights, for tests that need a model but no sensible text."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def random_llama(blocks: int = 2, initializer_range: float = 0.02, **sizes) -> LlamaForCausalLM:
    """A Llama with grouped queries and tied embeddings; the same weights for the same arguments.

    sizes: other keys of LlamaConfig. An `initializer_range` of 0.1 makes weights that low precision visibly changes.
    """
    config = LlamaConfig(**{
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": blocks,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "initializer_range": initializer_range, **sizes,
    })  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().requires_grad_(False)
