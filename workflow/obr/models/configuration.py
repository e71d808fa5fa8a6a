"""config.json and generation_config.json of a model: read and checked before anything is built from them.

Two readers: `sizes_of` for stages that only count, without transformers, and `load_config` for those that build the
model. Whatever transformers raises about a value ends in one sentence. A null counts as absent where transformers
gives no meaning to it.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from obr.config.model_sizes import OPTIONAL_SIZES, SIZES, _check_numbers, read_config
from obr.errors import ObrError, first_line
from obr.models.architectures import FAMILIES
from obr.models.side_files import GENERATION
from obr.models.tensor_files import HEADER_DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# How a model is called, not what it computes: this package calls it in its own way. Values from then on.
CALLS = {
    "attn_implementation": None, "_attn_implementation": None, "output_attentions": False,
    "output_hidden_states": False, "return_dict": True, "use_return_dict": None, "torchscript": False,
}  # fmt: skip
# Keys that say that the weights are stored in another format, whatever their value.
QUANTISED = re.compile(r"quantization|quantisation|quantize|quant_|_quant$|compression|sparsity|^(awq|gptq|bnb|fp8)")
FORMAT = "quantization_config"  # the key that names the format of quantised weights
# Keys that transformers obeys and the streamed path could not, and what each does.
NOT_SUPPORTED = {
    "per_layer_config": "gives blocks sizes of their own",
    "configuration_files": "sends transformers to other files than config.json",
    "transformers_weights": "sends transformers to other weights than the index names",
    "fusion_config": "has transformers fuse modules",
    "distributed_config": "splits the model over processes",
    "is_encoder_decoder": "makes an encoder and a decoder of the model",
    "pruned_heads": "removes attention heads",
} | dict.fromkeys(
    ("text_config", "vision_config", "audio_config", "decoder", "encoder", "generator"), "nests another model"
)
# Words in keys that change what a model computes. A key with one of them must be one of the family's own.
COMPUTES = re.compile(
    r"softcap|scale|scaling|multiplier|window|layer_types|attention|attn|rope|rotary|alibi|expert|moe|router|clip"
    r"|activation|hidden_act|parallel_(attn|attention|block|residual)|mtp|nextn|qk_|per_layer|block_configs|sink"
    r"|causal|bidirectional|lora|adapter|peft|draft|eagle|medusa|^mup|pruned"
)
# Keys with such a word that change nothing, or that transformers obeys in every family.
HARMLESS = re.compile(
    r"drop|init|loss|flash|impl|sdpa|xformers|kernel|backend|eager|checkpoint|^rope_(theta|scaling|parameters)$"
    r"|^original_max_position_embeddings$|^head_dim$|^attention_bias$|^is_causal$"
)
WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers", "sliding_window_pattern")
TRUE_IS_USUAL = ("causal", "use_rope", "scale_attn_weights")


def load_config(
    folder: Path, what: str, trust: bool = False, packed: bool = False, quantised: bool = False
) -> "PreTrainedConfig":
    """The transformers configuration of a model folder, in which the model can be called as this package does.

    what: its name in messages. trust: the folder's own code may be run. packed: the folder is a packed checkpoint.
    quantised: its `quantization_config` may name the format of another program.

    Raises:
        ObrError: config.json asks for code that is not trusted, says that the weights are quantised, holds values
            that transformers refuses, or keys that neither transformers nor this package would obey.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    raw = read_config(folder, what)
    kind, own_code = _model_type(raw, what, trust, CONFIG_MAPPING)
    _check_storage({key: value for key, value in raw.items() if not (quantised and key == FORMAT)}, what, packed)
    _check_numbers(raw, what)
    if not own_code:
        _check_keys(raw, kind, CONFIG_MAPPING[kind], what)
    try:
        if own_code:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=True)
            config.return_dict, config.output_hidden_states, config._output_attentions = True, False, False
            config._attn_implementation = None
        else:
            absent = {key for key in ("auto_map", FORMAT) if raw.get(key) is None or (quantised and key == FORMAT)}
            plain = {key: value for key, value in raw.items() if key not in CALLS and key not in absent}
            config = CONFIG_MAPPING[kind].from_dict(plain, name_or_path=str(folder))
    except Exception as error:  # of a validator, or of the model's own code
        why = _reason(error)
        raise ObrError(f"config.json of {what} cannot be loaded ({why}): correct it, or choose another.") from error
    check_sizes(config, what)
    named = str(getattr(config, "dtype", None)).removeprefix("torch.")
    if named not in ("None", *HEADER_DTYPES.values()):
        raise ObrError(f"dtype in config.json of {what} is {named}, no floating-point type of weights; correct it.")
    return config


def _model_type(raw: dict, what: str, trust: bool, known) -> tuple[str, bool]:
    """(model_type, whether the configuration is a class of the folder's own code)."""
    kind, auto_map = raw.get("model_type"), raw.get("auto_map") or {}
    if auto_map and not isinstance(auto_map, dict):
        raise ObrError(f"auto_map in config.json of {what} is {auto_map!r}, no mapping; choose another model.")
    native = isinstance(kind, str) and kind in known
    if not native and not auto_map:
        raise ObrError(
            f"model_type {kind!r} of {what} is unknown to this transformers: choose a model with native support."
        )
    if not native and not trust:
        raise ObrError(
            f"model_type {kind!r} of {what} needs the repository's own code: choose a model with native support, or "
            "read the code and set trust_remote_code: true for this model in the config."
        )
    return kind, bool(trust and (auto_map.get("AutoConfig") or not native))


def _check_storage(raw: dict, what: str, packed: bool) -> None:
    """Raise ObrError if the configuration says that weights are not stored as plain numbers."""
    for key, value in raw.items():
        if not QUANTISED.search(key) or value is None or value is False:
            continue
        method = value.get("quant_method") if isinstance(value, dict) else value
        if key == FORMAT and method == "obr":
            if packed:
                continue
            raise ObrError(f"{what} is a packed checkpoint of this package, not a model: read it with obr.load.")
        raise ObrError(
            f"the model of {what} is quantised already ({method}), says {key} in config.json: "
            "choose its full-precision original; obr.load and obr evaluate read what other programs quantised."
        )


def _check_keys(raw: dict, kind: str, family: type, what: str) -> None:
    """Raise ObrError at a key that changes what the model computes and that nobody would obey."""
    for key, does in NOT_SUPPORTED.items():
        if raw.get(key):
            raise ObrError(f"{key} in config.json of {what} {does}, which is not supported: choose another model.")
    if not isinstance(raw.get("is_causal"), (bool, type(None))):
        raise ObrError(f"is_causal in config.json of {what} is {raw['is_causal']!r}; it must be true or false.")
    names = getattr(family, "attribute_map", {})
    declared = {*getattr(family, "__dataclass_fields__", {}), *names, *names.values()}
    for key, value in raw.items():
        computes = COMPUTES.search(key) and not HARMLESS.search(key) and key not in CALLS
        if computes and key not in declared and not _is_neutral(key, value, raw, family):
            raise ObrError(
                f"{key} in config.json of {what} is {value!r}, which {kind} models of transformers do not obey: "
                "remove it if the weights were trained without it, or choose another model."
            )
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    turned = [part.get("partial_rotary_factor") for part in (raw, rope) if isinstance(part, dict)]
    obeyed = kind in FAMILIES and FAMILIES[kind].partial_rotary
    if not obeyed and any(part is not None and part != 1 for part in turned):
        raise ObrError(
            f"partial_rotary_factor in config.json of {what} is not 1, which {kind} models of transformers do not "
            "obey: choose another model."
        )


def _is_neutral(key: str, value, raw: dict, family: type) -> bool:
    """Whether a key that the family's configuration does not have asks for nothing but what is computed anyway."""
    window = raw.get("sliding_window", getattr(family, "sliding_window", None))  # Mistral has one by default
    if key in TRUE_IS_USUAL:
        return value is True or value is None
    if key == "hidden_activation":  # of Gemma, whose "gelu" transformers takes for its approximation by tanh
        usual = raw.get("hidden_act") or "gelu_pytorch_tanh"
        return value in (None, "gelu_pytorch_tanh" if usual == "gelu" else usual)
    if key == "layer_types":
        usual = "sliding_attention" if window and hasattr(family, "sliding_window") else "full_attention"
        return value is None or (isinstance(value, list) and all(kind == usual for kind in value))
    if key in WINDOWS and not window:
        return True
    if key.removeprefix("_") == "sliding_window_pattern":  # from which layer_types are made, where they are not given
        return bool(raw.get("layer_types")) or (key[0] != "_" and hasattr(family(), "_sliding_window_pattern"))
    if key in WINDOWS and not hasattr(family, "sliding_window"):
        return raw.get("use_sliding_window") is False
    if key == "use_sliding_window":
        return value is True
    return not value or (value == 1 and value is not True) or _is_derived(key, value, raw, family)


def _is_derived(key: str, value, raw: dict, family: type) -> bool:
    """Whether transformers gives a key this value unasked, as it derives `qk_head_dim` from other sizes."""
    try:
        given = {name: part for name, part in raw.items() if name != key and name not in CALLS}
        return getattr(family.from_dict(given), key, None) == value
    except Exception:  # of a validator: `load_config` meets it, too
        return False


def check_sizes(config: "PreTrainedConfig", what: str) -> None:
    """Raise ObrError unless a transformers configuration has the sizes of a decoder, which fit each other.

    config: of any family; what it does not have is left to `architectures.layout_of`.
    """
    _check_numbers({key: getattr(config, key, None) for key in (*SIZES, *OPTIONAL_SIZES)}, what)
    heads, kv_heads = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if heads and kv_heads and heads % kv_heads:
        raise ObrError(
            f"num_key_value_heads in config.json of {what} is {kv_heads}, which does not divide its {heads} "
            "attention heads; choose another model."
        )
    pad, vocabulary = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    if isinstance(pad, int) and vocabulary and not -vocabulary <= pad < vocabulary:
        raise ObrError(
            f"pad_token_id in config.json of {what} is {pad}, which is none of its {vocabulary} tokens; correct it, "
            "or set it to null."
        )


def generation_config(folder: Path) -> dict | None:
    """The settings of `generate` that belong to a model folder: those of generation_config.json, or, as transformers
    has it for older models, those in config.json; None if there are none.

    Raises:
        ObrError: transformers cannot read them.
    """
    from transformers import GenerationConfig

    name = GENERATION if (Path(folder) / GENERATION).is_file() else "config.json"
    if name == "config.json":
        given = {key for key, value in read_config(folder).items() if value is not None}
        if not given & set(GenerationConfig._get_default_generation_params()) - {"use_cache"}:  # which stays there
            return None
    try:
        options = {"config_file_name": name, "local_files_only": True}
        found = GenerationConfig.from_pretrained(folder, **options, _from_model_config=name == "config.json")
        return json.loads(found.to_json_string())
    except Exception as error:  # of a validator
        why = first_line(error) or type(error).__name__
        raise ObrError(f"{name} of {folder} cannot be read ({why}); correct it, or choose another model.") from error


def _reason(error: Exception) -> str:
    """What a validator says: the name of the field, and the reason below it."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    said = " ".join(lines[:2])[:300].rstrip(".: ")
    return said or type(error).__name__
