"""Families of transformers of torchvision, timm and Hugging Face: tiny, in float64, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttentionV2, SwinTransformer, SwinTransformerBlockV2


class Logits(nn.Module):
    """A model of Hugging Face as a function of its inputs' embeddings: the logits of the last position, or of all."""

    def __init__(self, model: nn.Module, key: str = "inputs_embeds", **others: Any) -> None:
        super().__init__()
        self.model, self.key, self.others = model, key, others

    def forward(self, x: Tensor, **more: Any) -> Tensor:
        output = self.model(**{self.key: x}, **self.others, **more)
        logits = getattr(output, "logits", getattr(output, "image_embeds", None))
        return logits[:, -1] if logits.dim() > 2 else logits


class Family(NamedTuple):
    """A tiny model and the shape of its input."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


def _torchvision() -> dict[str, Family]:
    models = torchvision.models
    vit = partial(
        models.VisionTransformer,
        image_size=8,
        patch_size=4,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=12,
        num_classes=5,
    )
    swin = {
        "patch_size": [2, 2],
        "embed_dim": 8,
        "depths": [2, 2],
        "num_heads": [2, 2],
        "window_size": [2, 2],
        "num_classes": 5,
    }
    maxvit = partial(
        models.MaxVit,
        input_size=(16, 16),
        stem_channels=8,
        partition_size=2,
        block_channels=[8, 8],
        block_layers=[1, 1],
        head_dim=4,
        stochastic_depth_prob=0.0,
        num_classes=5,
    )
    second = {"block": SwinTransformerBlockV2, "downsample_layer": models.swin_transformer.PatchMergingV2}
    assert ShiftedWindowAttentionV2 is not None
    return {
        "torchvision_vit": Family(vit, (3, 8, 8)),
        "torchvision_swin": Family(lambda: SwinTransformer(**swin), (3, 16, 16)),
        "torchvision_swin_v2": Family(lambda: SwinTransformer(**swin, **second), (3, 16, 16)),
        "torchvision_maxvit": Family(maxvit, (3, 16, 16)),
    }


def _timm() -> dict[str, Family]:
    vit = {
        "img_size": 8,
        "patch_size": 4,
        "embed_dim": 8,
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": 1.5,
        "num_classes": 5,
    }
    swin = {
        "img_size": 16,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": (2, 2),
        "num_heads": (2, 2),
        "window_size": 2,
        "num_classes": 5,
    }

    def written_out(make: Callable[..., nn.Module], **keywords: Any) -> nn.Module:
        model = make(**keywords)
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        return model

    from timm.models.convit import ConVit
    from timm.models.swin_transformer import SwinTransformer as TimmSwin
    from timm.models.vision_transformer import VisionTransformer

    scaled = {"qk_norm": True, "init_values": 0.5}
    return {
        "timm_vit": Family(lambda: VisionTransformer(**vit), (3, 8, 8)),
        "timm_vit_written_out": Family(lambda: written_out(VisionTransformer, **vit), (3, 8, 8)),
        "timm_vit_layer_scale_qk_norm": Family(lambda: VisionTransformer(**vit, **scaled), (3, 8, 8)),
        # (attention that is mixed with that of places, and divided by its sum again)
        "timm_convit": Family(lambda: ConVit(**vit, local_up_to_layer=1), (3, 8, 8)),
        "timm_swin": Family(lambda: TimmSwin(**swin), (3, 16, 16)),
        "timm_swin_written_out": Family(lambda: written_out(TimmSwin, **swin), (3, 16, 16)),
        "timm_deit": Family(lambda: timm.models.deit.VisionTransformerDistilled(**vit), (3, 8, 8)),
    }


#: Of all language models.
_SMALL = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {"num_key_value_heads": 1, "head_dim": 4}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_VISION = {"image_size": 8, "patch_size": 4, "num_labels": 5}
_SIGLIP = {
    "num_labels": 5,
    "vision_config": {"image_size": 8, "patch_size": 4, "hidden_size": 8, "intermediate_size": 12,
                      "num_hidden_layers": 2, "num_attention_heads": 2},
}  # fmt: skip
#: Names of model and configuration, and what the configuration differs in from `_SMALL`.
_LANGUAGE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", _GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _GROUPED),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _GROUPED),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _GROUPED),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _GROUPED),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {"num_key_value_heads": 1}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_GROUPED, **_EXPERTS}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {}),
    "opt": ("OPTForCausalLM", "OPTConfig", {"ffn_dim": 12, "word_embed_proj_dim": 8}),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"n_layer": 2, "n_head": 2}),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"state_size": 4}),
    "bert": ("BertForSequenceClassification", "BertConfig", {"num_labels": 5}),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {"num_labels": 5}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"dim": 8, "hidden_dim": 12, "n_layers": 2, "n_heads": 2, "num_labels": 5},
    ),
    "modernbert": (
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        {"num_labels": 5, "cls_token_id": 1, "sep_token_id": 2, "attn_implementation": "sdpa"},
    ),
    # relative positions in products of their own, shared layers, two streams; projections in one, parallel blocks
    "deberta_v2": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {"num_labels": 5, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
    ),
    "albert": ("AlbertForSequenceClassification", "AlbertConfig", {"num_labels": 5, "embedding_size": 8}),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", {"num_labels": 5, "embedding_size": 8}),
    "falcon": ("FalconForCausalLM", "FalconConfig", {"multi_query": True, "num_kv_heads": 1}),
    "mpt": ("MptForCausalLM", "MptConfig", {"d_model": 8, "n_heads": 2, "n_layers": 2, "expansion_ratio": 2}),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {"n_embd": 8, "n_layer": 2, "n_head": 2, "rotary_dim": 4}),
    "cohere2": ("Cohere2ForCausalLM", "Cohere2Config", _GROUPED),
    # keys and values of low rank with experts; linear attention; scans of states, one by masks of minus infinity
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {"kv_lora_rank": 4, "q_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
         "num_experts_per_tok": 2, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
         "moe_intermediate_size": 8, "num_key_value_heads": 2},
    ),
    "mamba2": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {"state_size": 4, "num_heads": 4, "head_dim": 4, "n_groups": 1, "expand": 2, "chunk_size": 4},
    ),
    "rwkv": ("RwkvForCausalLM", "RwkvConfig", {"attention_hidden_size": 8}),
    # states that are corrected by the delta rule, beside attention with a gate
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 8, "linear_num_key_heads": 2,
         "linear_num_value_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4,
         "layer_types": ["linear_attention", "full_attention"]},
    ),
}  # fmt: skip
_PICTURES: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "hf_vit": ("ViTForImageClassification", "ViTConfig", _VISION, 8),
    "hf_deit": ("DeiTForImageClassification", "DeiTConfig", _VISION, 8),
    "hf_swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 2,
         "num_labels": 5},
        16,
    ),
    "hf_dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {**_VISION, "mlp_ratio": 2}, 8),
    "hf_beit": ("BeitForImageClassification", "BeitConfig", {**_VISION, "use_relative_position_bias": True}, 8),
    "hf_clip_vision": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**_VISION, "projection_dim": 5}, 8),
    "hf_siglip_vision": ("SiglipForImageClassification", "SiglipConfig", _SIGLIP, 8),
}  # fmt: skip


def _of_hugging_face(model: str, config: str, own: dict[str, Any], key: str, **others: Any) -> nn.Module:
    import transformers

    common = {} if "depths" in own else _SMALL
    if "vision_config" in own:
        common = {}
    if "num_experts_per_tok" in own or "num_local_experts" in own:  # (the grouped kernel has no float64)
        common = common | {"experts_implementation": "eager"}
    built = getattr(transformers, model)(getattr(transformers, config)(**common | own))
    built.config.use_cache = False
    return Logits(built, key, **others)


def _t5() -> nn.Module:
    import transformers

    config = transformers.T5Config(
        vocab_size=11, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, decoder_start_token_id=0, use_cache=False
    )
    return Logits(transformers.T5ForConditionalGeneration(config), decoder_input_ids=torch.tensor([[0, 3, 4]]))


FAMILIES: dict[str, Family] = {
    **_torchvision(),
    **_timm(),
    **{name: Family(partial(_of_hugging_face, *three, "inputs_embeds"), (6, 8)) for name, three in _LANGUAGE.items()},
    **{
        name: Family(partial(_of_hugging_face, *three, "pixel_values"), (3, size, size))
        for name, (*three, size) in _PICTURES.items()
    },
    "t5": Family(_t5, (6, 8)),
}


def built(name: str) -> tuple[nn.Module, Tensor]:
    """Model of a family, and one input for it."""
    family = FAMILIES[name]
    torch.manual_seed(3)
    model = family.make().double().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.2
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * scale + (parameter.dim() == 1) * (0.5 if parameter.mean() > 0.5 else 0.0))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model, torch.randn(1, *family.shape, generator=generator, dtype=torch.float64)
