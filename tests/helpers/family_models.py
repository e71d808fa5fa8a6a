"""Random tiny models of every family, and by how much a rotation changes what they compute."""

import torch
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    Glm4MoeConfig,
    GlmConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
)

from obr.models.architectures import layout_of
from obr.models.layers import ATTENTION

FAMILIES = {
    "llama": LlamaConfig(hidden_size=96, intermediate_size=344, num_attention_heads=6, num_key_value_heads=2),
    "llama, tied, 9 heads": LlamaConfig(
        hidden_size=144,
        intermediate_size=192,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "llama 3, biases everywhere": LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=1,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "llama, all heads apart": LlamaConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=4
    ),
    "mistral": MistralConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2),
    "qwen2, 14 heads": Qwen2Config(
        hidden_size=112, intermediate_size=296, num_attention_heads=14, num_key_value_heads=2
    ),
    "qwen3, head_dim apart": Qwen3Config(
        hidden_size=96, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=32
    ),
    "gemma": GemmaConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=1, head_dim=32
    ),
    "granite": GraniteConfig(
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        residual_multiplier=0.5,
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        logits_scaling=2.0,
    ),
    "smollm3": SmolLM3Config(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0
    ),
    "gemma2": Gemma2Config(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        query_pre_attn_scalar=16, sliding_window=8, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
    ),
    "gemma3": Gemma3TextConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        query_pre_attn_scalar=16, sliding_window=8,
    ),
    "phi3, part of RoPE": Phi3Config(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
    ),
    "olmo2": Olmo2Config(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2),
    "olmo3": Olmo3Config(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, sliding_window=8
    ),
    "glm4": Glm4Config(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        pad_token_id=0, attention_bias=True,
    ),
    "cohere": CohereConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, use_qk_norm=True
    ),
}  # fmt: skip
# Near relatives of families above, which fewer tests run over.
RELATIVES = {
    "glm": GlmConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        pad_token_id=0,
    ),
    "seed_oss": SeedOssConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16
    ),
    "exaone4": Exaone4Config(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"], num_hidden_layers=2,
    ),
    "cohere2": Cohere2Config(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"], num_hidden_layers=2,
    ),
    "glm4_moe": Glm4MoeConfig(
        hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_attention_heads=4, num_key_value_heads=2,
        n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1, head_dim=16,
        use_qk_norm=True, pad_token_id=0,
    ),
}  # fmt: skip
_HEADS = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
_LATENT = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_attention_heads": 4,
    "num_key_value_heads": 4, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3, "first_k_dense_replace": 1,
    "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {
    "mixtral": MixtralConfig(**_HEADS, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": OlmoeConfig(**_HEADS, intermediate_size=32, num_experts=8, num_experts_per_tok=2),
    "qwen2_moe, shared": Qwen2MoeConfig(
        **_HEADS, intermediate_size=96, moe_intermediate_size=32, shared_expert_intermediate_size=48, num_experts=6,
        num_experts_per_tok=2,
    ),
    "qwen3_moe, a dense block": Qwen3MoeConfig(
        **_HEADS, head_dim=32, intermediate_size=96, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2,
        mlp_only_layers=[0], norm_topk_prob=True,
    ),
    "deepseek_v3": DeepseekV3Config(**_LATENT, q_lora_rank=20, n_group=2, topk_group=1),
    "deepseek_v2": DeepseekV2Config(**_LATENT, q_lora_rank=None, topk_method="greedy"),
}  # fmt: skip


def random_model(config, dtype=torch.float64):
    """A model with norms away from one and biases away from zero, so that a wrong fold shows."""
    torch.manual_seed(0)
    options = {**config.to_dict(), "vocab_size": 64, "num_hidden_layers": 2}
    kinds = list(dict.fromkeys(options.pop("layer_types", None) or ()))
    if len(kinds) > 1:  # one block of each
        options["layer_types"] = kinds
    config = type(config)(**options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.rand_like(parameter) + 0.5)
        elif "bias" in name:
            parameter.copy_(torch.randn_like(parameter))
        else:
            parameter.mul_(5)
    return model.to(dtype)


TOKENS = torch.arange(1, 41).view(2, 20)  # without padding, whose embedding is zero


def exact_model(config):
    """A random model that computes in float64 throughout; in transformers norms, softmax and routers are float32."""
    model = random_model(config)
    model.set_attn_implementation(ATTENTION)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the usual one has no float64
    offset = layout_of(model.config).norm_offset
    for norm in {type(module) for module in model.modules() if type(module).__name__.endswith("RMSNorm")}:
        if not hasattr(norm.forward, "exact"):
            norm.forward = _exact(norm.forward, offset)
    for router in {type(module) for module in model.modules() if type(module).__name__.endswith("Router")}:
        if not hasattr(router.forward, "exact"):
            router.forward = _exactly_routed(router.forward)
    return model


def _exact(rounded, offset):
    """The forward of an RMSNorm that is exact for inputs in float64, and as it was for others."""

    def forward(self, x):
        if x.dtype != torch.float64:
            return rounded(self, x)
        eps = getattr(self, "variance_epsilon", None) or self.eps
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (self.weight + offset)

    forward.exact, forward.__module__ = True, rounded.__module__
    return forward


class _Wide(TorchFunctionMode):
    """Has float64 tensors stay float64 where code asks for float32."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.type and args[0].dtype == torch.float64:
            return args[0]
        if kwargs.get("dtype") == torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        return function(*args, **kwargs)


def _exactly_routed(rounded):
    """The forward of a router that is exact for inputs in float64, and as it was for others."""

    def forward(self, x):
        if x.dtype != torch.float64:
            return rounded(self, x)
        with _Wide():
            return rounded(self, x)

    forward.exact, forward.__module__ = True, rounded.__module__
    return forward


def change(model, rotate) -> float:
    """Largest change of the logits, over the largest logit."""
    before = model(TOKENS).logits
    rotate(model)
    return float((model(TOKENS).logits - before).abs().max() / before.abs().max())
