"""Models and tokenizers from local folders, by transformers."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from obr.errors import ObrError, first_line
from obr.models import remote_code
from obr.models.check.folder import check_folder
from obr.models.configuration import load_config
from obr.runtime.gpu import taken_away

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def default_device() -> str:
    """The name of the device to compute on: "cuda" if a GPU can be used, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder, or of a GGUF file."""
    trust, place = remote_code.trusted(directory), {"pretrained_model_name_or_path": directory}
    if Path(directory).suffix == ".gguf" and Path(directory).is_file():
        place = {"pretrained_model_name_or_path": Path(directory).parent, "gguf_file": Path(directory).name}
    try:
        return AutoTokenizer.from_pretrained(**place, local_files_only=True, trust_remote_code=trust)
    except Exception as error:  # of any library that reads tokenizers
        refused = remote_code.refusal(directory, error)
        raise refused or ObrError(f"{directory} holds no usable tokenizer ({first_line(error)}).") from error


def config_of(directory: Path) -> "PreTrainedConfig":
    """The transformers configuration of a model folder; see `remote_code` for code that the folder brings along.

    Raises:
        ObrError: there is none, or one that `configuration.load_config` refuses.
    """
    return load_config(Path(directory), str(directory), remote_code.trusted(directory))


# Settings of `generate` that the configuration of a model has too, and keeps.
CONFIGURED = {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
}


def load_model(
    directory: str | Path, dtype: torch.dtype = torch.float32, device: str | None = None
) -> "PreTrainedModel":
    """A whole transformers model in evaluation mode, without gradients.

    Nothing is downloaded. `obr.compress` keeps the dtype in which the folder stores its weights, whatever `dtype` the
    model computes in.

    Args:
        directory: a folder with config.json and safetensors, or the name of a repository that is already in the
            cache of the hub, such as "HuggingFaceTB/SmolLM2-135M" after `hf download HuggingFaceTB/SmolLM2-135M`.

    Raises:
        ObrError: there is no such folder, or `obr.models.check` refuses what is in it.

    Example:
        >>> model = obr.load_model("path/to/model")
        >>> model.training
        False
    """
    folder = _local_folder(directory)
    checked, trust = check_folder(folder), remote_code.trusted(folder)
    checked.config.transformers_weights = checked.tensors.entry  # transformers prefers model.safetensors to an index
    try:
        options = {"trust_remote_code": trust, "use_safetensors": True, "local_files_only": True}
        model = AutoModelForCausalLM.from_pretrained(folder, config=checked.config, dtype=dtype, **options)
    except Exception as error:  # of transformers, or of the model's own code
        if taken_away(error):
            raise
        raise ObrError(f"{directory} cannot be loaded as a model: {first_line(error)}.") from error
    del model.config.transformers_weights
    model.obr_storage_dtype = checked.dtype
    return model.eval().requires_grad_(False).to(device or default_device())


def _local_folder(directory: str | Path) -> Path:
    """A folder, or the cached one of a repository on the hub. Raises ObrError if there is neither."""
    if Path(directory).is_dir():
        return Path(directory)
    name = str(directory)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(name, local_files_only=True))
        except Exception as error:  # not cached, or no name of a repository
            raise ObrError(
                f"{name} is neither a folder nor a repository in the hub's cache; obr.load_model downloads nothing: "
                f"run `hf download {name}` first, or give a folder."
            ) from error
    raise ObrError(f"{name} is not a folder; give the folder of a downloaded model.")
