"""A small language model as a GGUF file."""

from pathlib import Path


def write_gguf(path: Path, more=lambda writer: None, without: str = "") -> Path:
    """A Llama of one block in Q8_0 with tied embeddings and a byte-level tokenizer.

    more: adds to the file. without: a tensor that is left out.
    """
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_vocab_size(64)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = ["<s>", "</s>", *map(chr, range(64, 124)), "ab", "abc"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    rows = {"attn_q": 64, "attn_k": 32, "attn_v": 32, "attn_output": 64, "ffn_gate": 96, "ffn_up": 96}
    shapes = {f"blk.0.{name}.weight": (count, 64) for name, count in rows.items()}
    shapes |= {"token_embd.weight": (64, 64), "blk.0.ffn_down.weight": (64, 96)}
    shapes |= dict.fromkeys(("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"), (64,))
    shapes.pop(without, None)
    more(writer)
    values = np.random.default_rng(0)
    for name, shape in shapes.items():
        weight = values.standard_normal(shape).astype(np.float32) / 8
        if len(shape) == 1:
            writer.add_tensor(name, weight + 1)
        else:
            packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
