"""A tiny language model, trained a little on real text, so that orderings of its perplexities mean something.

    python tests/helpers/tiny_model.py FOLDER

writes FOLDER/model (with tokenizer), FOLDER/train.txt and FOLDER/heldout.txt, unless they are there.
"""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FIXTURES = Path(__file__).parents[1] / "fixtures"
SEQLEN = 128


def main(folder: Path) -> Path:
    if (folder / "heldout.txt").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    text = (FIXTURES / "addresses.txt").read_text()
    tokenizer = train_tokenizer(text)
    model = train_model(torch.tensor(tokenizer(text)["input_ids"]))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "train.txt").write_text(text)
    (folder / "heldout.txt").write_text((FIXTURES / "address_1941.txt").read_text())
    return folder


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=512
    )


def train_model(tokens: torch.Tensor, steps: int = 250, batch: int = 16) -> LlamaForCausalLM:
    """Sizes on purpose awkward: 3 heads on 1 KV head (no Hadamard matrix of 3), widths 96 = 12·8 and 192 = 12·16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    return train(LlamaForCausalLM(config), tokens, steps, batch)


def train(model, tokens: torch.Tensor, steps: int, batch: int):
    """Train a random causal language model on windows of the tokens; returns it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(0, len(tokens) - SEQLEN, (batch,), generator=generator)
        windows = torch.stack([tokens[i : i + SEQLEN] for i in starts])
        loss = model(input_ids=windows, labels=windows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
