"""GGUF files as models: dequantised by transformers, and refused where it would leave out part of a file."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obr.errors import ObrError, first_line
from obr.models.tensor_files import weight_files

if TYPE_CHECKING:
    from torch import Tensor


def dequantise(gguf: Path, folder: Path, dtype: str) -> None:
    """Write the model and tokenizer in a GGUF file as a folder of safetensors with weights in `dtype`.

    Raises ObrError if transformers cannot read the file, or would leave out part of it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "local_files_only": True}
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(**where)
        _check_gguf(gguf, loaded, report)
    except ObrError:
        raise
    except Exception as error:  # whatever other people's readers make of a broken file
        raise ObrError(
            f"{gguf.name} cannot be read as a GGUF language model ({type(error).__name__}: "
            f"{first_line(error)}): choose another file, or a hub or path source."
        ) from error
    config = loaded.config
    round_epsilons(config)
    # transformers takes the loaded model for quantised and will not save it: a fresh one gets the weights.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    fresh.load_state_dict(loaded.state_dict())  # tied as the config says
    refuse_overflow(gguf.name, fresh.named_parameters(), dtype)
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in weight_files(folder, gguf.name):
        shutil.copymode(folder / "config.json", folder / name)  # safetensors wrote it for its owner alone


def round_epsilons(config: object) -> None:
    """Round the epsilon of norms, in place: GGUF keeps in single precision (9.9999997e-06) what had one figure."""
    for key, value in list(vars(config).items()):
        if key.endswith(("norm_eps", "norm_epsilon")) and isinstance(value, float):
            setattr(config, key, float(f"{value:.0e}"))


# Settings of a GGUF model, below its architecture's name, that transformers reads or that tensors decide.
GGUF_SETTINGS = {
    "context_length", "block_count", "feed_forward_length", "embedding_length", "vocab_size", "rope.freq_base",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "tensor_data_layout",
    "rope.scaling.finetuned",
}  # fmt: skip
GGUF_CAUSAL = "attention.causal"  # the one switch that is on without a word
GGUF_HEAD_DIMS = ("rope.dimension_count", "attention.key_length", "attention.value_length")


def _check_gguf(path: Path, loaded, report: dict) -> None:
    """Raise ObrError unless transformers has read every tensor and every setting of a GGUF file.

    loaded: the model that it has made. report: its loading info; it draws missing tensors at random.
    """
    from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map

    missing = set(report["missing_keys"]) - set(loaded.all_tied_weights_keys)
    if lacking := sorted([*missing, *(key for key, *_ in report["mismatched_keys"])]):
        raise ObrError(f"{path.name} lacks {len(lacking)} tensors of its model ({lacking[0]} first): choose another.")
    reader = GGUFReader(path)
    kind = reader.fields["general.architecture"].contents()
    architecture = next(number for number, name in MODEL_ARCH_NAMES.items() if name == kind)
    names = get_tensor_name_map(architecture, loaded.config.num_hidden_layers)
    known = {names.get_name(name, try_suffixes=(".weight", ".bias")) for name in loaded.state_dict()}
    if left := sorted({tensor.name for tensor in reader.tensors} - known):
        raise ObrError(
            f"{path.name} has the tensor {left[0]}, which transformers would leave out: choose another file."
        )
    check_gguf_settings(path, loaded.config, reader)


def check_gguf_settings(path: Path, config: Any, reader: Any) -> None:
    """Raise ObrError at a setting of a GGUF file that the transformers configuration made of it leaves out.

    reader: gguf's, of the file.
    """
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    kind = reader.fields["general.architecture"].contents()
    attributes = GGUF_CONFIG_MAPPING.get(kind, {})
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for key, field in reader.fields.items():
        setting, value = key.removeprefix(f"{kind}."), field.contents()
        usual = (head_dim,) if setting in GGUF_HEAD_DIMS else (0, 1, "", "none", None)
        if isinstance(value, bool):
            usual = (setting == GGUF_CAUSAL,)
        if (attribute := attributes.get(setting)) and hasattr(config, attribute):
            usual = (*usual, getattr(config, attribute))
        if setting != key and setting not in GGUF_SETTINGS and value not in usual:
            raise ObrError(
                f"{path.name} sets {key} to {str(value)[:40]}, which transformers would leave out: choose another "
                "file, or the model in safetensors."
            )


def refuse_overflow(what: str, tensors: Iterable[tuple[str, "Tensor"]], dtype: str) -> None:
    """Raise ObrError if a floating-point tensor has values that are not finite."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ObrError(f"{name} in {what} is not finite in {dtype}: choose another dtype, such as bfloat16.")
