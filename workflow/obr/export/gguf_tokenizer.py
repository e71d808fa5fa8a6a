"""A tokenizer in a GGUF file: byte-level BPE, recognised by how it splits text before it merges."""

from pathlib import Path

import gguf

from obr.data.tokenize import special_tokens, tokens_as_text
from obr.errors import ObrError
from obr.models.loading import load_tokenizer
from obr.runtime.files import read_json

# The regular expressions of tokenizer.json -> llama.cpp's name of the same split.
SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "qwen2",
}


def add(writer: gguf.GGUFWriter, folder: Path, vocabulary: int) -> str:
    """Add the tokenizer of a model folder, filled up to `vocabulary` tokens; returns a few words on it.

    Raises:
        ObrError: a tokenizer that llama.cpp would not split text like, or that adds special tokens for which GGUF has
            no key.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        writer.add_tokenizer_model("none")
        return "no tokenizer, as there was none"
    tokenizer = read_json(path)
    split = _split(tokenizer, path)
    tokens, types = _tokens(tokenizer, vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocabulary)
    special.add_special_token |= _added(folder, special.special_token_ids)
    special.add_to_gguf(writer, quiet=True)
    return f"tokenizer {split}"


def _added(folder: Path, ids: dict[str, int]) -> dict[str, bool]:
    """Whether the tokenizer adds BOS before and EOS after a text.

    Without these keys llama.cpp decides by the name of the split.
    """
    tokenizer = load_tokenizer(folder)
    added = dict(zip(("bos", "eos"), special_tokens(tokenizer), strict=True))
    for name, tokens in added.items():
        if tokens not in ([], [ids.get(name)]):
            raise ObrError(
                f"{folder}: the tokenizer adds {tokens_as_text(tokenizer, tokens)} to a text, for which GGUF has no "
                "key; export a folder without it, and pass token numbers to llama.cpp."
            )
    return {name: bool(tokens) for name, tokens in added.items()}


def _split(tokenizer: dict, path: Path) -> str:
    model, normalizer = tokenizer.get("model", {}), tokenizer.get("normalizer") or {"type": "NFC"}
    before = tokenizer.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    plain = model.get("type") == "BPE" and not model.get("byte_fallback") and normalizer.get("type") == "NFC"
    if plain and kinds[-1] == "ByteLevel" and not last.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and last.get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and last.get("use_regex", True):
            return "smollm"
        pattern = steps[0].get("pattern", {}).get("Regex")
        if kinds == ["Split", "ByteLevel"] and pattern in SPLITS and not last.get("use_regex", True):
            return SPLITS[pattern]
    raise ObrError(
        f"{path} splits text in a way ({model.get('type')}, {' and '.join(map(str, kinds))}) that the GGUF export "
        "has no name for; export a folder without it, and pass token numbers to llama.cpp."
    )


def _tokens(tokenizer: dict, vocabulary: int) -> tuple[list[str], list[int]]:
    """Every token with its type, by number; numbers that have none are marked as unused."""
    tokens = {number: (text, gguf.TokenType.NORMAL) for text, number in tokenizer["model"]["vocab"].items()}
    for added in tokenizer.get("added_tokens", []):
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]] = (added["content"], kind)
    if max(tokens) >= vocabulary:
        raise ObrError(f"The tokenizer has token {max(tokens)}, the model {vocabulary} tokens; they do not belong.")
    filled = [tokens.get(n, (f"[PAD{n}]", gguf.TokenType.UNUSED)) for n in range(vocabulary)]
    return [text for text, _ in filled], [int(kind) for _, kind in filled]
