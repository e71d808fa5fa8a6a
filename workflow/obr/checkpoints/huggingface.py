"""transformers' `from_pretrained` on a packed checkpoint, whose files are checked as by `obr.load`.

    obr.register_with_transformers()
    model = AutoModelForCausalLM.from_pretrained("compressed", dtype="float32")

transformers makes the model and finds the folder; it is given the file of the ends alone, whole tensors as it expects
them, and no blocks, which come from the checkpoint afterwards.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from obr.errors import ObrError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

METHOD = "obr"


class PackedConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed checkpoint's config.json.

    format: of the checkpoint. packed: weights stay packed, as by `obr.load(..., packed=True)`.
    """

    def __init__(self, format: int = 1, packed: bool = False, **_):
        self.quant_method, self.format, self.packed = METHOD, format, packed


class PackedReader(HfQuantizer):
    """Puts the blocks of a packed checkpoint into a model that transformers has made.

    Raises:
        ObrError: several devices, a folder that is not a whole checkpoint, or one that `packed` cannot compute.
    """

    requires_calibration = True
    is_trainable = False

    def is_serializable(self) -> bool:
        return False

    def validate_environment(self, device_map: "dict | str | None" = None, **_: Any) -> None:
        """Refuse a model that is spread over several devices. transformers passes more than is read here."""
        devices = set(device_map.values()) if isinstance(device_map, dict) else set()
        if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
            devices = {device_map, "more"}
        if len(devices) > 1:
            raise ObrError(
                f"A packed checkpoint is read onto one device, not by device_map {device_map!r}; name one."
            )

    def update_attn_implementation(self, config: "PreTrainedConfig") -> "PreTrainedConfig":
        """Name the file of the unquantised parts, which transformers reads without this class."""
        config.transformers_weights = "ends.safetensors"
        return config

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **_):
        from obr.models.architectures import layout_of
        from obr.models.layers import ATTENTION

        self.folder, layout = Path(checkpoint_files[0]).parent, layout_of(model.config)
        asked = model.config._attn_implementation
        if asked not in (None, "sdpa", ATTENTION):
            raise ObrError(
                f"A packed checkpoint attends by this package's own attention, not by {asked!r}; leave out "
                "attn_implementation."
            )
        if layout.head not in dict(model.named_modules()):
            raise ObrError(
                f"{self.folder} is a packed checkpoint of a causal language model; read it with "
                f"AutoModelForCausalLM, not as {type(model).__name__}."
            )
        model.set_submodule(layout.blocks, nn.ModuleList())
        return model

    def _process_model_after_weight_loading(self, model, **_):
        from obr.checkpoints.format import CheckpointBlocks
        from obr.checkpoints.packed_linear import PackedBlocks
        from obr.models.architectures import layout_of

        layout = layout_of(model.config)
        embed = model.get_submodule(layout.embed).weight
        kind = PackedBlocks if self.quantization_config.packed else CheckpointBlocks
        blocks = kind(self.folder, None, embed.dtype, str(embed.device))
        read = blocks.whole()
        model.set_submodule(layout.blocks, read.get_submodule(layout.blocks))
        for part in (layout.embed, layout.final_norm, layout.head):
            model.get_submodule(part).weight = read.get_submodule(part).weight
        model.set_attn_implementation(read.config._attn_implementation)
        model.obr_recipe = blocks.recipe
        return model


def register_with_transformers() -> None:
    """Let `from_pretrained` of transformers read packed checkpoints in this process; a second call changes nothing.

    It enters the format "obr" in transformers' two registries of quantisation methods. `obr.load` does not need it.

    Example:
        >>> register_with_transformers()
        >>> from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
        >>> AUTO_QUANTIZER_MAPPING["obr"].__name__
        'PackedReader'
    """
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(PackedConfig)
        register_quantizer(METHOD)(PackedReader)
