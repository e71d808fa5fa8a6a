"""The one way in for checkpoints of other programs: what a folder or file is, and its tensors, dequantised."""

from pathlib import Path

import torch
from torch import nn

from obr.checkpoints.external.compressed_tensors import CompressedTensors
from obr.checkpoints.external.gguf import Gguf, GgufFiles
from obr.checkpoints.external.gptq import Awq, Gptq, auto_round
from obr.checkpoints.external.layouts import Layout
from obr.config.model_sizes import read_config
from obr.errors import ObrError, first_line
from obr.models import remote_code
from obr.models.architectures import layout_of
from obr.models.check.folder import Checked, check_against, check_beside, meta_model
from obr.models.configuration import check_sizes, load_config
from obr.models.gguf_files import check_gguf_settings, round_epsilons
from obr.models.split import follow, take_model_apart
from obr.models.tensor_files import STORED, TensorFiles
from obr.runtime.files import read_json

# The `quant_method` of a config.json -> the layout of its tensors.
LAYOUTS = {
    "gptq": Gptq,
    "awq": Awq,
    "auto-round": auto_round,
    "auto_round": auto_round,
    "compressed-tensors": CompressedTensors,
}
READ = "GPTQ, AWQ, AutoRound, compressed-tensors and GGUF"
# Files in which programs note the settings a second time, and their names for what config.json calls otherwise.
NOTES = ("quantize_config.json", "quant_config.json", "quantization_config.json")
SPELLED = {"w_bit": "bits", "q_group_size": "group_size"}
DECIDE = ("bits", "group_size", "desc_act", "sym", "zero_point", "version", "checkpoint_format", "packing_format")


def external_path(path: str | Path) -> Path | None:
    """The folder or GGUF file of a checkpoint that another program quantised; None for anything else.

    A folder without config.json stands for the one GGUF file in it.

    Raises:
        ObrError: several GGUF files, or one in parts.
    """
    path = Path(path)
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    if (path / "manifest.json").exists():
        return None
    if (path / "config.json").is_file():
        return path if _method(path) not in (None, "obr") else None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise ObrError(f"{path} has {len(found)} GGUF files; name one of them, and merge one that is in parts.")
    return found[0] if found else None


def _method(folder: Path) -> str | None:
    """The `quant_method` that a config.json names; "" for a quantisation without one."""
    settings = read_config(folder).get("quantization_config")
    return None if not settings else str(settings.get("quant_method") or "") if isinstance(settings, dict) else ""


class Dequantised(TensorFiles):
    """The tensors of a model folder with the weights of quantised layers in place of what they are stored as.

    layout: of the quantised layers. layers: {quantised layer: names of its tensors}.
    """

    def __init__(self, files: TensorFiles, layout: Layout):
        self.stored, self.layout, self.layers, self.places = files, layout, layout.layers(), {}
        self.directory, self.what, self.entry = files.directory, files.what, files.entry
        consumed = {name for names in self.layers.values() for name in names}
        self.files = {name: path for name, path in files.files.items() if name not in consumed}
        self.headers = {name: header for name, header in files.headers.items() if name not in consumed}
        plain = next((dtype for _, dtype in self.headers.values() if dtype in STORED), "F32")
        for layer, names in self.layers.items():
            self.headers[f"{layer}.weight"] = list(layout.shapes[layer]), plain
            self.files[f"{layer}.weight"] = files.files[names[0]]

    def read(self, names: dict[str, str], *to: torch.device | torch.dtype | str) -> dict[str, torch.Tensor]:
        """As of `TensorFiles`; a quantised layer's weight is computed in float32."""
        found = {}
        for key, name in names.items():
            layer = name.removesuffix(".weight")
            if name.endswith(".weight") and layer in self.layers:
                found[key] = self._weight(layer)
                for place in to:
                    found[key] = found[key].to(place)
            else:
                found |= self.stored.read({key: name}, *to)
        return found

    def _weight(self, layer: str) -> torch.Tensor:
        try:
            weight = self.layout.weight(layer)
        except (KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ObrError(
                f"{self.what}: {layer} is no whole layer of {self.layout.name} ({first_line(error)}); fetch it again."
            ) from error
        if (found := list(weight.shape)) != (wanted := list(self.layout.shapes[layer])):
            raise self.layout.unfit(layer, f"a weight {found}, by the model's sizes {wanted}")
        if not bool(weight.isfinite().all()):
            raise ObrError(f"{self.what}: {layer} has scales or values that are not finite; fetch it again.")
        return weight

    def equal(self, one: str, other: str, rows: int = 1024) -> bool:
        """Whether two tensors have the same values once dequantised."""
        found = self.read({"one": one, "other": other}, torch.float64)
        return torch.equal(found["one"], found["other"])


def open_external(path: Path) -> Checked:
    """A checkpoint of another program as a model folder that has passed the check, its tensors a `Dequantised`.

    path: as `external_path` gives it.

    Raises:
        ObrError: a format that is not read, named; or what `check.folder` refuses.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return _open_gguf(path)
    what, trust = str(path), remote_code.trusted(path)
    settings = read_config(path, what).get("quantization_config")
    method = _method(path)
    if method not in LAYOUTS:
        raise ObrError(
            f"{what} is quantised by {method!r}, whose format is not read; read are {READ}. Choose its "
            "full-precision original, or an export of one of these."
        )
    config = load_config(path, what, trust, quantised=True)
    layout, model, files = layout_of(config), meta_model(config, trust, what), TensorFiles(path, what)
    if layout.fused:
        raise ObrError(
            f"{what}: {config.model_type} models keep {min(layout.fused)} fused, which is not read from other "
            "programs' formats; choose its full-precision original."
        )
    take_model_apart(model, layout)  # each expert has layers of its own, as files have them
    follow(files, layout, model.get_submodule(layout.blocks))
    check_beside(files, NOTES)
    _check_notes(path, settings, what)
    found = Dequantised(files, LAYOUTS[method](files, settings, _linears(model)))
    if not found.layers and not found.layout.may_be_plain:
        raise ObrError(
            f"{what} has no quantised layer, though quantization_config says {method}: remove that key if the "
            "weights are plain, or fetch the weights again."
        )
    return check_against(config, found, trust, True)


def _check_notes(folder: Path, settings: dict, what: str) -> None:
    """Raise ObrError if a file in which a program notes the settings again contradicts those of config.json."""
    settings = {SPELLED.get(key, key): value for key, value in settings.items()}
    for name in NOTES:
        if not (folder / name).is_file():
            continue
        noted = {SPELLED.get(key, key): value for key, value in read_json(folder / name).items()}
        for key in DECIDE:
            one, other = (str(found.get(key)).lower() for found in (settings, noted))
            if "none" not in (one, other) and one != other:
                raise ObrError(
                    f"{what}: {key} is {one} in config.json and {other} in {name}; fetch both from the same revision."
                )


def _open_gguf(path: Path) -> Checked:
    from transformers import AutoConfig

    try:
        where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "local_files_only": True}
        config = AutoConfig.from_pretrained(**where)
    except Exception as error:  # whatever other people's readers make of a broken file
        raise ObrError(f"{path} cannot be read as a GGUF language model ({first_line(error)}).") from error
    round_epsilons(config)
    check_sizes(config, str(path))
    layout_of(config)
    model = meta_model(config, False, str(path))
    files = GgufFiles(path, list(model.state_dict()), config)
    check_gguf_settings(path, config, files.reader)
    config.tie_word_embeddings = f"{layout_of(config).head}.weight" not in files.headers
    return check_against(config, Dequantised(files, Gguf(files, {}, _linears(model))), False, True)


def _linears(model: nn.Module) -> dict[str, list[int]]:
    """{linear layer: [rows, columns]}."""
    return {name: list(m.weight.shape) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
