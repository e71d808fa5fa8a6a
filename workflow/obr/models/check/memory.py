"""Models in memory: modules, parameters and hooks against those of a model that its configuration describes."""

import copy
import re

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from obr.errors import ObrError
from obr.models import remote_code
from obr.models.architectures import Layout, layout_of
from obr.models.check.folder import check_family, class_name, meta_model, with_buffers
from obr.models.configuration import check_sizes
from obr.models.layers import QuantLinear

# Classes that models are wrapped in -> what to pass instead.
WRAPPERS = {
    "DataParallel": "pass its `.module`", "DistributedDataParallel": "pass its `.module`",
    "FullyShardedDataParallel": "pass the whole model", "OptimizedModule": "pass its `._orig_mod`",
}  # fmt: skip
FULL = "load the model in full precision"
# The package of a module's class -> how to make a plain module of it.
REMEDIES = {
    "peft.": "merge the adapter first (`model = model.merge_and_unload()`)",
    "torch._dynamo.": "pass the model as it was before `torch.compile`",
    "torch.nn.utils.parametrize": "remove the parametrisation (`torch.nn.utils.parametrize.remove_parametrizations`)",
} | dict.fromkeys(
    ("bitsandbytes.", "torchao.", "optimum.", "quanto.", "gptqmodel.", "auto_gptq.", "awq.", "hqq.",
     "compressed_tensors.", "transformers.integrations."), FULL,
)  # fmt: skip
OTHERWISE = "pass a plain transformers model; merge an adapter first (`model = model.merge_and_unload()`)"
# Attributes of modules that do not change what is computed, or that transformers itself changes.
CHANGING = {"training", "gradient_checkpointing", "vocab_size", "padding_idx", "layer_idx", "max_seq_len_cached"}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
UNFINISHED = "obr_unfinished"  # attribute of a model: the step that is changing it, or has failed to
# Implementations of attention that compute the same, up to rounding.
ATTENTIONS = re.compile(r"(paged\|)?(eager|sdpa|obr|flex_attention|flash_attention_\w+|kernels-community/.*)")
TRUSTED = ("torch", "transformers", "obr")  # packages from which a class may have its forward
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
# Hooks of transformers that note outputs, or that ask for gradients of the embeddings.
HARMLESS_HOOKS = ("install_output_capuring_hook.", "PreTrainedModel.enable_input_require_grads.")


def quantised_by(model: nn.Module) -> str | None:
    """The format, of another program, in which transformers holds a model's weights; None for plain ones and ours."""
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    if not settings:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    name = str(getattr(method, "value", method))
    return None if name == "obr" else name


def check_model(model: nn.Module, measured: bool = False) -> Layout:
    """The layout of a transformers model in memory, if it is no more and no less than its configuration describes.

    Linear layers may be this package's QuantLinear, with what belongs to it. The model is left as it is.
    measured: the model is only run, so in place of the blocks' linear layers may stand what another program's format
    has put there; transformers computes with it.

    Raises:
        ObrError: a step that has not finished; another class, module, parameter, buffer, attribute or hook; an
            offloaded, quantised or shared tensor.
    """
    is_external = measured and quantised_by(model) is not None
    _check_class(model, is_external)
    check_finished(model)
    layout = layout_of(model.config)
    check_sizes(model.config, "the model")
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    reference = meta_model(config) if _is_native(model) else _own_meta_model(model)
    check_family(reference, layout, "the model")
    with_buffers(reference, config)
    wanted, ours = dict(reference.named_modules()), _places_of_ours(layout, model.config.num_hidden_layers)
    for name, module in model.named_modules():
        expected = wanted.pop(name, None)
        inside = any(place in ours for place in _parents(name))
        if not is_external and inside and expected is None:
            _check_inside(name, module, reference)
        elif not (is_external and (inside or name in ours)):
            _check_module(name, module, expected, name in ours, calls=not is_external or bool(name))
    if wanted := [name for name in wanted if not any(place in ours for place in _parents(name))]:
        raise ObrError(
            f"The model has no module {wanted[0]} of its own, which its configuration describes: correct the "
            "configuration, or give each block modules of its own."
        )
    if any(getattr(torch_module, hooks, None) for hooks in GLOBAL_HOOKS):
        raise ObrError("torch has hooks that run for all modules; remove them (`handle.remove()`).")
    _check_tensors(model, layout, ours if is_external else set())
    if not measured:
        check_attention_kind(model)
    return layout


def check_attention_kind(model: nn.Module) -> None:
    """Raise ObrError if the model attends otherwise than this package does: a change would be lost."""
    for module in model.modules():
        kind = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if kind is not None and not ATTENTIONS.fullmatch(str(kind)):
            raise ObrError(
                f"The model attends by {kind!r}, which no checkpoint would keep: call "
                "model.set_attn_implementation('sdpa') if that computes the same."
            )


def check_finished(model: nn.Module) -> None:
    """Raise ObrError if a step such as `obr.rotate` has begun to change the model and has not finished."""
    if step := getattr(model, "__dict__", {}).get(UNFINISHED):
        raise ObrError(f"{step} has begun to change this model and did not finish; load the model again.")


def _check_class(model, is_external: bool) -> None:
    """Raise ObrError unless the model is of the class that transformers has for its configuration.

    is_external: it may be quantised by another program.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

    name = type(model).__name__
    if name in WRAPPERS:
        raise ObrError(f"The model is wrapped in {name}: {WRAPPERS[name]}.")
    if not isinstance(model, PreTrainedModel):
        raise ObrError(f"The model is a {class_name(model)}, no model of transformers: {_remedy(model)}.")
    if not is_external and (method := quantised_by(model)):
        raise ObrError(f"The model is quantised already ({method}): choose its full-precision original.")
    if not _is_native(model) and not (
        type(model).__module__.startswith("transformers_modules.") and remote_code.is_allowed()
    ):
        layout_of(model.config)
        expected = MODEL_FOR_CAUSAL_LM_MAPPING[type(model.config)].__name__
        raise ObrError(
            f"The model is a {class_name(model)}, not transformers' {expected}: load it as one, without additions."
        )
    if len(set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))) > 1:
        raise ObrError("The model lies on several devices: load it on one, without a device_map of several.")


def _is_native(model: nn.Module) -> bool:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = type(model.config)
    return config in MODEL_FOR_CAUSAL_LM_MAPPING and type(model) is MODEL_FOR_CAUSAL_LM_MAPPING[config]


def _own_meta_model(model: nn.Module) -> nn.Module:
    """Of a class that came with the model, which the user allows to run."""
    with torch.device("meta"):
        return type(model)._from_config(copy.deepcopy(model.config), dtype=torch.float32)


def _places_of_ours(layout: Layout, blocks: int) -> set[str]:
    """Where a module of this package may stand: in place of a linear layer, and beside those of an attention."""
    experts = (layout.experts,) if layout.experts else ()
    names = (*layout.linears, *layout.fused, *experts, f"{layout.attention}.key_value_quantizer")
    return {f"{layout.blocks}.{index}.{name}" for index in range(blocks) for name in names}


def _parents(name: str) -> list[str]:
    """Names of the modules around a module: "a.b" and "a" for "a.b.c"."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def _check_module(
    name: str, module: nn.Module, wanted: nn.Module | None, may_be_ours: bool, calls: bool = True
) -> None:
    """Raise ObrError unless the module computes what the one that the configuration describes does.

    calls: no hook of it may run besides.
    """
    where = name or "the model"
    if may_be_ours and type(module).__module__.startswith("obr."):
        _check_calls(where, module)
        if isinstance(module, QuantLinear) and "weight" in module._parameters:
            _check_shape(f"{where}.weight", module.weight, wanted.weight)
        return
    if wanted is None:
        raise ObrError(f"The model has the extra module {where} ({class_name(module)}): {_remedy(module)}.")
    if type(module) is not type(wanted):
        raise ObrError(f"{where} is a {class_name(module)}, not a {class_name(wanted)}: {_remedy(module)}.")
    if calls:
        _check_calls(where, module)
    for kind in ("_parameters", "_buffers"):
        found, expected = getattr(module, kind), getattr(wanted, kind)
        for key in sorted({*found, *expected}):
            if (found.get(key) is None) != (expected.get(key) is None):
                count = "no" if found.get(key) is None else "the extra"
                raise ObrError(f"The model has {count} {where}.{key}, by its configuration: {OTHERWISE}.")
    for key, parameter in module._parameters.items():
        if parameter is not None:
            _check_shape(f"{where}.{key}", parameter, wanted._parameters[key])
    for key, buffer in module._buffers.items():
        if buffer is not None and key in wanted._non_persistent_buffers_set:
            _check_buffer(f"{where}.{key}", buffer, wanted._buffers[key], module)
        elif buffer is not None:  # files keep it
            _check_shape(f"{where}.{key}", buffer, wanted._buffers[key])
    for key, value in vars(wanted).items():
        plain = key[0] != "_" and key not in CHANGING and isinstance(value, (bool, int, float, str, type(None)))
        if plain and vars(module).get(key, value) != value:
            raise ObrError(
                f"{where}.{key} is {vars(module)[key]!r}, by the model's configuration it should be {value!r}: "
                "change the configuration instead, which is what a checkpoint keeps."
            )


def _check_inside(name: str, module: nn.Module, reference: nn.Module) -> None:
    """Raise ObrError unless a module below one of this package's is one that this package has put there."""
    plain = type(module) is nn.Linear or type(module).__module__.startswith("obr.")
    if not plain and name.endswith(".act_fn"):  # of an expert, which had been that of all
        experts = re.sub(r"\.\d+\.act_fn$", "", name)
        plain = type(module) is type(reference.get_submodule(f"{experts}.act_fn"))
    if not plain:
        raise ObrError(f"{name} is a {class_name(module)}: {_remedy(module)}.")
    _check_calls(name, module)


def _check_shape(name: str, found: Tensor, wanted: Tensor) -> None:
    if found.shape != wanted.shape:
        found, wanted = (" x ".join(map(str, tensor.shape)) for tensor in (found, wanted))
        raise ObrError(f"{name} is {found}, by the model's configuration it should be {wanted}: correct one of them.")


def _check_buffer(name: str, found: Tensor, wanted: Tensor, module: nn.Module) -> None:
    """Raise ObrError unless a buffer holds what the configuration gives: no file keeps it, so a change would be lost.

    Frequencies of a rotary embedding that follow the length of the input are not compared, only their originals.
    """
    follows = str(getattr(module, "rope_type", "")) in ("dynamic", "longrope")
    if found.is_meta or (follows and name.endswith(".inv_freq")):
        return
    _check_shape(name, found, wanted)
    precision = torch.finfo(found.dtype).eps if found.is_floating_point() else 0
    if not torch.allclose(found.cpu().double(), wanted.double(), rtol=max(1e-6, precision), atol=0):
        raise ObrError(
            f"{name} differs from what the model's configuration gives, and no file would keep it: change the "
            "configuration instead (rope_parameters), or load the model again."
        )


def _check_calls(where: str, module: nn.Module) -> None:
    """Raise ObrError at what runs besides a module's own forward: a hook, another forward, compiled code."""
    for hook in (hook for kind in HOOKS for hook in getattr(module, kind, {}).values()):
        name, owner = getattr(hook, "__qualname__", class_name(hook)), getattr(hook, "__module__", "")
        if not (name.startswith(HARMLESS_HOOKS) and owner.startswith("transformers.")):
            undone = "`handle.remove()`; of torch: `prune.remove`, `remove_weight_norm`"
            raise ObrError(f"{where} has the hook {name}: remove it ({undone}).")
    if "forward" in vars(module):
        raise ObrError(f"{where} has another forward than its class: load the model on one device, without patches.")
    package, own = (str(part.__module__).partition(".")[0] for part in (type(module).forward, type(module)))
    if package not in (own, *TRUSTED):
        raise ObrError(
            f"{where} has a forward of {package}, which no checkpoint would keep: load it without patches."
        )
    if "quantize" in vars(module):
        raise ObrError(f"{where} has another quantiser than its class: load the model again.")
    if getattr(module, "_compiled_call_impl", None) is not None:
        raise ObrError(f"{where} is compiled: pass the model as it was before `compile`.")


def _check_tensors(model: nn.Module, layout: Layout, free: set[str]) -> None:
    """Raise ObrError at a tensor that is no plain one of floating-point numbers in memory, or that is shared.

    free: names of modules whose tensors may be anything.
    """
    owners: dict[int, str] = {}
    tie, devices, dtypes = {f"{layout.head}.weight", f"{layout.embed}.weight"}, set(), {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        if any(place in free for place in _parents(name)):
            continue
        if type(tensor) not in (nn.Parameter, nn.Buffer, Tensor) or tensor.layout is not torch.strided:
            raise ObrError(f"{name} is a {class_name(tensor)}, no plain tensor: {FULL}.")
        if tensor.is_meta:
            raise ObrError(f"{name} is not in memory (offloaded, or not loaded): load the whole model on one device.")
        if not isinstance(tensor, nn.Parameter):
            continue
        if tensor.dtype not in FLOATS:
            raise ObrError(f"{name} holds {str(tensor.dtype).removeprefix('torch.')}, no weights: {FULL}.")
        devices.add(str(tensor.device))
        dtypes.setdefault(str(tensor.dtype).removeprefix("torch."), name)
        other = owners.setdefault(tensor.data_ptr(), name)
        if other != name and {other, name} != tie:
            raise ObrError(f"{other} and {name} share one tensor: give each its own (`.clone()`).")
    if len(devices) > 1:
        raise ObrError(f"The model lies on several devices ({', '.join(sorted(devices))}): move it to one.")
    if len(dtypes) > 1 and not free:
        (one, first), (other, second), *_ = dtypes.items()
        raise ObrError(
            f"{first} is {one}, {second} is {other}: convert the model to one, as by `model.to(torch.{one})`."
        )


def is_tied(model: nn.Module, layout: Layout) -> bool:
    """Whether a model's head is its embedding: by the configuration's flag, where the tensors agree with it."""
    head, embed = (model.get_submodule(name).weight for name in (layout.head, layout.embed))
    return bool(model.config.tie_word_embeddings) and (head is embed or torch.equal(head, embed))


def _remedy(module) -> str:
    named = class_name(module)
    if isinstance(module, nn.Module) and parametrize.is_parametrized(module):
        named = "torch.nn.utils.parametrize"
    return next((remedy for package, remedy in REMEDIES.items() if named.startswith(package)), OTHERWISE)
