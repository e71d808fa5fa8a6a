"""Checkpoints with random weights in the shape of real models, with a tokenizer and a text, for measuring memory."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from obr.data.token_windows import calibrate
from obr.rotations import obtain

SMOLLM2_135M = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_2_7B = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False,
}  # fmt: skip
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """What compression reads, and a text and questions to evaluate on."""

    model: Path
    rotation: Path
    tokens: Path
    text: Path
    questions: Path

    @classmethod
    def below(cls, folder: Path) -> "Inputs":
        """Where they lie in a folder."""
        return cls(
            folder / "model", folder / "rotation.safetensors", folder / "tokens.safetensors", folder / "text.txt",
            folder / "questions.jsonl",
        )  # fmt: skip


def write_inputs(folder: Path, sizes: dict, windows: int, seqlen: int) -> Inputs:
    """A random model of these sizes, its QuaRot rotation, calibration windows (windows, seqlen) and a text."""
    inputs = Inputs.below(folder)
    write_model(inputs.model, sizes)
    write_text(inputs.text, sizes["vocab_size"], 2 * windows * seqlen)
    write_questions(inputs.questions, sizes["vocab_size"], max(1, windows * seqlen // 60))
    obtain.make({"kind": "quarot"}, inputs.model, inputs.rotation)
    calibrate(inputs.model, inputs.text, {"nsamples": windows, "seqlen": seqlen}, inputs.tokens)
    return inputs


def checkpoint_bytes(sizes: dict) -> int:
    """Bytes that `write_model` of these sizes will write."""
    return 2 * sum(tensor.numel() for tensor in _empty(sizes).state_dict().values())


def write_model(folder: Path, sizes: dict, seed: int = 0) -> None:
    """A Llama of these sizes in bfloat16, one safetensors shard a block; one shard is in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    model = _empty(sizes)
    shards: dict[str, dict[str, torch.Size]] = {}
    tied = {"lm_head.weight"} if sizes["tie_word_embeddings"] else set()
    for name, tensor in model.state_dict().items():
        if name not in tied:
            block = name.split(".")[2] if ".layers." in name else "ends"
            shards.setdefault(f"model-{block}.safetensors", {})[name] = tensor.shape
    generator, index = torch.Generator().manual_seed(seed), {}
    for file, shapes in shards.items():
        save_file(
            {name: _random(name, shape, generator) for name, shape in shapes.items()}, folder / file,
            metadata={"format": "pt"},
        )  # fmt: skip
        index |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8"
    )
    model.config.save_pretrained(folder)
    _tokenizer(sizes["vocab_size"]).save_pretrained(folder)


def write_text(path: Path, vocabulary: int, tokens: int, seed: int = 0) -> None:
    """So many random words of the tokenizer's."""
    words = torch.randint(1, vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))
    path.write_text(" ".join(f"w{word}" for word in words.tolist()), encoding="utf-8")


def write_questions(path: Path, vocabulary: int, count: int, seed: int = 0) -> None:
    """So many questions of random words, in the columns of PIQA's dataset."""
    words = torch.randint(1, vocabulary, (count, 60), generator=torch.Generator().manual_seed(seed)).tolist()
    texts = [[" ".join(f"w{word}" for word in part) for part in (row[:30], row[30:40], row[40:])] for row in words]
    rows = [{"goal": goal, "sol1": one, "sol2": two, "label": 0} for goal, one, two in texts]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def evaluation(inputs: "Inputs", windows: int, seqlen: int) -> list:
    """Arguments of `obr evaluate` for the text, and for questions with about as many tokens."""
    return [
        "--text", "text", inputs.text, f"seqlen={seqlen}", f"tokens={windows * seqlen}",
        "--task", "piqa", inputs.questions,
    ]  # fmt: skip


def _empty(sizes: dict):
    config = LlamaConfig(**sizes, max_position_embeddings=4096, rms_norm_eps=1e-5, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    words = {"<unk>": 0} | {f"w{i}": i for i in range(1, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", model_max_length=4096)
