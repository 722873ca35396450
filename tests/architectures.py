"""Tiny models of many architectures, from their own config classes: what `find_bias_sites` must understand."""

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    BambaConfig,
    BertConfig,
    BloomConfig,
    CLIPVisionConfig,
    CodeGenConfig,
    Cohere2Config,
    CohereConfig,
    DebertaV2Config,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    JambaConfig,
    Lfm2Config,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    Olmo2Config,
    OPTConfig,
    PersimmonConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    RobertaConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)


TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
SIZES = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
WITH_HEADS = {**GROUPED, "head_dim": 8}
OLD = {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 2, "num_experts_per_tok": 1}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

DECODERS = {
    "opt": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32),
    "gpt2": GPT2Config(**OLD),
    "gpt_neo": GPTNeoConfig(**{**SIZES, "num_layers": 2, "num_heads": 4}, attention_types=[[["global", "local"], 1]]),
    "gptj": GPTJConfig(**OLD, rotary_dim=4),
    "codegen": CodeGenConfig(**OLD, rotary_dim=4),
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "bloom": BloomConfig(**TOKENS, hidden_size=32, n_layer=2, n_head=4),
    "falcon_new": FalconConfig(**SIZES, new_decoder_architecture=True, num_kv_heads=2),
    "falcon_old": FalconConfig(**SIZES, new_decoder_architecture=False, multi_query=False, alibi=True, bias=True),
    "falcon_multi_query": FalconConfig(**SIZES, new_decoder_architecture=False, multi_query=True),
    "mpt": MptConfig(**TOKENS, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
    "phi": PhiConfig(**SIZES),
    "phi3": Phi3Config(**GROUPED),
    "gpt_bigcode": GPTBigCodeConfig(**OLD, multi_query=False),
    "gpt_bigcode_multi_query": GPTBigCodeConfig(**OLD, multi_query=True),
    "starcoder2": Starcoder2Config(**GROUPED),
    "llama": LlamaConfig(**GROUPED),
    "mistral": MistralConfig(**WITH_HEADS),
    "mixtral": MixtralConfig(**WITH_HEADS, num_local_experts=2),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen2_moe": Qwen2MoeConfig(**GROUPED, **EXPERTS, shared_expert_intermediate_size=16),
    "qwen3": Qwen3Config(**WITH_HEADS),
    "qwen3_moe": Qwen3MoeConfig(**WITH_HEADS, **EXPERTS),
    "qwen3_next": Qwen3NextConfig(
        **{**WITH_HEADS, "num_hidden_layers": 4}, **EXPERTS, **LINEAR, shared_expert_intermediate_size=16
    ),
    "gemma": GemmaConfig(**WITH_HEADS),
    "gemma2": Gemma2Config(**WITH_HEADS),
    "gemma3": Gemma3TextConfig(**WITH_HEADS),
    "cohere": CohereConfig(**GROUPED),
    "cohere2": Cohere2Config(**{**WITH_HEADS, "num_hidden_layers": 4}),
    "olmo2": Olmo2Config(**GROUPED),
    "stablelm": StableLmConfig(**GROUPED),
    "smollm3": SmolLM3Config(**GROUPED, no_rope_layers=[1, 0]),
    "granite": GraniteConfig(**GROUPED),
    "persimmon": PersimmonConfig(**SIZES),
    "gpt_oss": GptOssConfig(
        **WITH_HEADS, num_local_experts=2, num_experts_per_tok=1, rope_parameters={"rope_type": "default"}
    ),
    "deepseek_v3": DeepseekV3Config(
        **SIZES,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
    ),
    "lfm2": Lfm2Config(**GROUPED, full_attn_idxs=[1]),
    "bamba": BambaConfig(
        **GROUPED,
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_n_groups=1,
        mamba_expand=2,
    ),
    "jamba": JambaConfig(**GROUPED, attn_layer_period=2, attn_layer_offset=1, num_experts=2),
    "llava": LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        ),
        text_config=LlamaConfig(**GROUPED),
        image_token_index=63,
    ),
}
ENCODERS = {
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES),
    "deberta_v2": DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8),
}

# Of the first attention layer: rows of query and of key and value, a bias of its own, a dead key; layers left out.
EXPECTED = {
    "opt": (32, 32, True, True, 0),
    "gpt2": (32, 32, True, True, 0),
    "gpt_neo": (32, 32, False, True, 0),
    "gptj": (32, 32, False, False, 0),
    "codegen": (32, 32, False, False, 0),
    "gpt_neox": (32, 32, True, False, 0),
    "bloom": (32, 32, True, True, 0),
    "falcon_new": (32, 16, False, False, 0),
    "falcon_old": (32, 32, True, True, 0),
    "falcon_multi_query": (32, 8, False, False, 0),
    "mpt": (32, 32, False, True, 0),
    "phi": (32, 32, True, False, 0),
    "phi3": (32, 16, False, False, 0),
    "gpt_bigcode": (32, 32, True, True, 0),
    "gpt_bigcode_multi_query": (32, 8, True, True, 0),
    "starcoder2": (32, 16, True, False, 0),
    "llama": (32, 16, False, False, 0),
    "mistral": (32, 16, False, False, 0),
    "mixtral": (32, 16, False, False, 0),
    "qwen2": (32, 16, True, False, 0),
    "qwen2_moe": (32, 16, True, False, 0),
    "qwen3": (32, 16, False, False, 0),
    "qwen3_moe": (32, 16, False, False, 0),
    "qwen3_next": (32, 16, False, False, 3),
    "gemma": (32, 16, False, False, 0),
    "gemma2": (32, 16, False, False, 0),
    "gemma3": (32, 16, False, False, 0),
    "cohere": (32, 16, False, False, 0),
    "cohere2": (32, 16, False, False, 0),
    "olmo2": (32, 16, False, False, 0),
    "stablelm": (32, 16, False, False, 0),
    "smollm3": (32, 16, False, False, 0),
    "granite": (32, 16, False, False, 0),
    "persimmon": (32, 32, True, False, 0),
    "gpt_oss": (32, 16, True, False, 0),
    "deepseek_v3": (48, 32, False, True, 0),
    "lfm2": (32, 16, False, False, 1),
    "bamba": (32, 16, False, False, 1),
    "jamba": (32, 16, False, True, 1),
    "llava": (32, 16, False, False, 0),
    "bert": (32, 32, True, True, 0),
    "roberta": (32, 32, True, True, 0),
    "deberta_v2": (32, 32, True, False, 0),
}


def build(name: str):
    """The model in eval mode, with eager attention and weights wild enough for every term to matter."""
    torch.manual_seed(0)
    config = DECODERS.get(name) or ENCODERS[name]
    classes = {"llava": AutoModelForImageTextToText}
    auto = AutoModelForSequenceClassification if name in ENCODERS else classes.get(name, AutoModelForCausalLM)
    model = auto.from_config(config, attn_implementation="eager", experts_implementation="eager")
    std = 0.1 if name == "gpt_neo" else 0.3  # GPT-Neo does not scale its attention scores down
    for path, parameter in model.named_parameters():
        if parameter.dim() > 1 or path.endswith("bias"):
            torch.nn.init.normal_(parameter, std=std)
    return model.eval()
