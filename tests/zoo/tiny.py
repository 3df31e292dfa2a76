"""The decoders that transformers knows, and a tiny random model of each."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

VOCAB = 128

_USUAL: dict[str, int | float] = {
    "vocab_size decoder_vocab_size unpadded_vocab_size vocab_size_per_layer_input": VOCAB,
    "hidden_size d_model n_embd dim_model word_embed_proj_dim attention_hidden_size emb_dim"
    " lru_width embedding_size input_embedding_size output_embedding_size out_hidden_size": 64,
    "num_hidden_layers n_layer n_layers num_layers depth encoder_layers decoder_layers"
    " num_encoder_layers num_decoder_layers conf_num_hidden_layers": 2,
    "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads"
    " decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads"
    " swa_num_attention_heads conf_num_attention_heads": 4,
    "num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups": 2,
    "head_dim d_kv kv_channels swa_head_dim global_head_dim attention_head_size dim_head"
    " attention_head_dim": 16,
    "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size dff dim_ff d_ff"
    " d_inner mlp_dim feed_forward_size block_ff_dim intermediate_size_mlp"
    " dense_intermediate_size shared_intermediate_size shared_expert_intermediate_size"
    " shared_experts_intermediate_size": 64,
    "moe_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size": 32,
    "num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num": 4,
    "num_experts_per_tok num_experts_per_token moe_topk moe_k": 2,
    "n_group topk_group num_expert_group": 1,
    "q_lora_rank kv_lora_rank o_lora_rank": 32,
    "qk_nope_head_dim qk_rope_head_dim v_head_dim rotary_dim": 16,
    "qk_head_dim": 32,
    "index_head_dim indexer_head_dim": 16,
    "index_n_heads linear_num_value_heads linear_num_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim linear_value_head_dim linear_head_dim": 16,
    "mamba_n_heads n_mamba_heads mamba_num_heads": 8,
    "mamba_head_dim mamba_headdim mamba_d_state state_size ssm_state_size": 16,
    "max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_target_positions"
    " context_length": 512,
    "sliding_window sliding_window_size attention_window_size window_size local_attention"
    " attention_chunk_size": 16,
    "initializer_range init_std initializer_factor": 0.15,
    "image_size": 32,
    "patch_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id sep_token_id decoder_start_token_id": 2,
}
#: What the usual names of a config are set to, where it has a number there.
SIZES = {name: value for names, value in _USUAL.items() for name in names.split()}

_ZAMBA = {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "attention_hidden_size": 128,
    "attention_head_dim": 32,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def _sections(*sizes: int) -> dict[str, Any]:
    """Frequencies of time, height and width: half of the turned dimensions of a head."""
    return {"rope_parameters": {**_ROPE, "mrope_section": list(sizes)}}


#: What single model types of a config need beyond that.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_d_head": 16},
    "blt": {"encoder_hash_byte_group_vocab": VOCAB},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": 64,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "glm4v_moe_text": _sections(1, 1, 2),
    "glm4v_text": _sections(2, 3, 3),
    "glm_ocr_text": _sections(2, 3, 3),
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kosmos_2_5_text_model": {"embed_dim": 64},
    "kosmos_2_text_model": {"embed_dim": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": None},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "paddleocr_vl_text": _sections(2, 3, 3),
    "qwen2_5_vl_text": _sections(2, 3, 3),
    "qwen2_vl_text": _sections(2, 3, 3),
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "layer_types": ["linear_attention", "indexed_attention"],
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 64]},
    "roc_bert": {
        "pronunciation_vocab_size": VOCAB,
        "pronunciation_embed_dim": 16,
        "shape_vocab_size": VOCAB,
        "shape_embed_dim": 16,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": _ZAMBA,
    "zaya": {"num_experts_per_tok": 1},
}


def architectures() -> dict[str, str]:
    """Model type -> class: causal language models, then the models that see images too."""
    seeing = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return {**seeing, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}


def tiny_config(cls: Any) -> Any:
    """The default config of a class with small sizes, and one layer of each kind it has."""
    own = vars(cls())
    given = {name: n for name, n in SIZES.items() if isinstance(own.get(name), int | float)}
    if own.get("kv_lora_rank") and "num_key_value_heads" in given:
        given["num_key_value_heads"] = given["num_attention_heads"]  # as many keys as queries
    unused = iter(range(VOCAB - 1, 0, -1))
    for name, value in own.items():
        is_token = name.endswith(("_token_id", "_token_index")) and name not in given
        if is_token and isinstance(value, int) and value >= VOCAB:
            given[name] = next(unused)
    kinds = own.get("layer_types")
    if kinds:
        first = sorted({x: kinds.index(x) for x in kinds}.values())
        chosen = [0, 1] if len(first) == 1 else first
        for name, value in own.items():
            if isinstance(value, list) and len(value) == len(kinds):
                given[name] = [value[n] for n in chosen]
        given["num_hidden_layers"] = len(chosen)
    for name in cls.sub_configs or {}:
        if (part := own.get(name)) is not None:
            given[name] = tiny_config(type(part))
    if "is_decoder" in own:
        given["is_decoder"] = True
    given.update(EXCEPTIONS.get(cls.model_type, {}))
    return cls(**given)


def build(name: str) -> Any:
    """A random model in float32. Its weights are large enough for peaked attention."""
    cls = getattr(transformers, name)
    config = tiny_config(cls.config_class)
    torch.manual_seed(0)
    model = cls._from_config(config, dtype=torch.float32).eval()
    for part in model.modules():
        if isinstance(part, nn.Linear | nn.Embedding | Conv1D):
            nn.init.normal_(part.weight, std=0.15)
    model.requires_grad_(False)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model
