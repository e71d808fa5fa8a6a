"""Likelihoods of answers by their definition, and random models of every family to score them with."""

import torch

VOCABULARY = 50


def tiny(model_type: str = "llama", **sizes):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
        "tie_word_embeddings": False, "initializer_range": 0.3, "pad_token_id": 0, **sizes,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).eval()


@torch.no_grad()
def alone(model, context: list[int], answer: list[int], max_length: int = 64) -> tuple[float, bool]:
    """By the definition: one sequence, read from the left, what is too long cut off there."""
    tokens = (context + answer)[-(max_length + 1) :]
    scores = model(torch.tensor([tokens[:-1]])).logits[0].float().log_softmax(-1)[-len(answer) :]
    wanted = torch.tensor(answer)
    return float(scores[range(len(answer)), wanted].sum()), bool((scores.argmax(-1) == wanted).all())
