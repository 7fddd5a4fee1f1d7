"""Transformers of images."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.entry import Entry, Failure, Size, grid, integers, latents, normal, sigma, timestep

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
FLUX = {**HEADS, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 12}
AXES = {"axes_dims_rope": (4, 6, 6)}


def packed_with_positions(c: Any, s: Size) -> dict[str, Any]:
    """Latents packed two by two, a prompt, and the positions of both."""
    return {
        "hidden_states": latents(s.batch, s.packed, c.in_channels),
        "encoder_hidden_states": normal(s.batch, s.text, c.joint_attention_dim),
        "timestep": sigma(s.batch),
        "img_ids": grid(1, s.height // 2, s.width // 2),
        "txt_ids": torch.zeros(s.text, 3),
    }


def with_sizes(c: Any, s: Size) -> dict[str, Any]:
    """Latents, a prompt, and the sizes and crop that CogView is told of."""
    return {
        "hidden_states": latents(s.batch, c.in_channels, s.height, s.width),
        "encoder_hidden_states": normal(s.batch, s.text, c.text_embed_dim),
        "timestep": timestep(s.batch),
        "original_size": torch.full((s.batch, 2), 32.0),
        "target_size": torch.full((s.batch, 2), 32.0),
        "crop_coords": torch.zeros(s.batch, 2),
    }


IMAGES: dict[str, Entry] = {
    "AuraFlowTransformer2DModel": Entry(
        {**HEADS, "sample_size": 6, "num_mmdit_layers": 2, "num_single_dit_layers": 2, "joint_attention_dim": 12}
        | {"caption_projection_dim": 32, "pos_embed_max_size": 64},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, s.height, s.width),
            "encoder_hidden_states": normal(s.batch, s.text, c.joint_attention_dim),
            "timestep": sigma(s.batch),
        },
    ),
    "BriaFibo2Transformer2DModel": Entry(
        {"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 12}
        | {"injection_layer_ids": (1,), "perceiver_num_layers": 1, "axes_dims": (4, 6, 6), "axes_lens": (32, 16, 16)}
        | {"min_num_gist_tokens": 2, "max_num_gist_tokens": 8, "gist_step": 2, "gist_min_text_len": 2}
        | {"gist_max_text_len": 8},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, s.height, s.width),
            "timestep": sigma(s.batch),
            "encoder_hidden_states": normal(s.batch, 1 + len(c.injection_layer_ids), s.text, c.cap_feat_dim),
            "encoder_attention_mask": torch.ones(s.batch, s.text, dtype=torch.bool),
        },
    ),
    "BriaFiboTransformer2DModel": Entry(
        {**FLUX, **AXES, "text_encoder_dim": 12},
        lambda c, s: {
            "hidden_states": latents(s.batch, s.packed, c.in_channels),
            "encoder_hidden_states": normal(s.batch, s.text, c.joint_attention_dim),
            "text_encoder_layers": [
                normal(s.batch, s.text, c.text_encoder_dim) for _ in range(c.num_layers + c.num_single_layers)
            ],
            "timestep": timestep(s.batch),
            "img_ids": grid(1, s.height // 2, s.width // 2),
            "txt_ids": torch.zeros(s.text, 3),
        },
    ),
    "BriaTransformer2DModel": Entry(
        {**FLUX, **AXES},
        lambda c, s: {
            "hidden_states": latents(s.batch, s.packed, c.in_channels),
            "encoder_hidden_states": normal(s.batch, s.text, c.joint_attention_dim),
            "timestep": timestep(s.batch),
            "img_ids": grid(1, s.height // 2, s.width // 2),
            "txt_ids": torch.zeros(s.text, 3),
        },
    ),
    "ChromaTransformer2DModel": Entry(
        {**FLUX, **AXES, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        packed_with_positions,
    ),
    "CogView3PlusTransformer2DModel": Entry(
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 12, "time_embed_dim": 8}
        | {"condition_dim": 4, "pos_embed_max_size": 8, "sample_size": 8},
        with_sizes,
    ),
    "CogView4Transformer2DModel": Entry(
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 12, "time_embed_dim": 8}
        | {"condition_dim": 4, "rope_axes_dim": (8, 8)},
        with_sizes,
    ),
    "DiTTransformer2DModel": Entry(
        {**HEADS, "num_layers": 2, "sample_size": 4, "num_embeds_ada_norm": 10},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, c.sample_size, c.sample_size),
            "timestep": timestep(s.batch),
            "class_labels": integers(10, s.batch),
        },
        real={"out_channels": 8},
    ),
    "DreamLiteTransformer2DModel": Entry(
        {**HEADS, "in_channels": 32, "norm_num_groups": 4, "num_layers": 2, "cross_attention_dim": 12},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, s.height, s.width),
            "encoder_hidden_states": normal(s.batch, s.text, c.cross_attention_dim),
        },
        real={"in_channels": 320, "num_attention_heads": 5, "attention_head_dim": 64, "cross_attention_dim": 2048},
    ),
    "ErnieImageTransformer2DModel": Entry(
        {"hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 48, "in_channels": 4}
        | {"out_channels": 4, "text_in_dim": 12, "rope_axes_dim": (4, 6, 6)},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, s.height, s.width),
            "timestep": timestep(s.batch),
            "text_bth": normal(s.batch, s.text, c.text_in_dim),
            "text_lens": torch.full((s.batch,), s.text),
        },
    ),
    "Flux2Transformer2DModel": Entry(
        {**FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 8},
        lambda c, s: {
            "hidden_states": latents(s.batch, s.packed, c.in_channels),
            "encoder_hidden_states": normal(s.batch, s.text, c.joint_attention_dim),
            "timestep": sigma(s.batch),
            "img_ids": grid(1, s.height // 2, s.width // 2, 1),
            "txt_ids": torch.zeros(s.text, 4),
            "guidance": torch.full((s.batch,), 3.5),
        },
    ),
    "Flux3Transformer2DModel": Entry(
        {**FLUX, "cond_in_channels": 4, "axes_dims_rope": (4, 4, 4, 4), "timestep_channels": 8},
        lambda c, s: {
            "hidden_states": latents(s.batch, s.packed, c.in_channels),
            "encoder_hidden_states": normal(s.batch, s.text, c.joint_attention_dim),
            "timestep": sigma(s.batch),
            "img_ids": grid(1, s.height // 2, s.width // 2, 1),
            "txt_ids": torch.zeros(s.text, 4),
            "image_cond_hidden_states": normal(s.batch, 2, c.cond_in_channels),
            "image_cond_ids": grid(1, 2, 1, 1),
        },
    ),
    "FluxTransformer2DModel": Entry(
        {**FLUX, **AXES, "pooled_projection_dim": 10, "guidance_embeds": True},
        lambda c, s: {
            "hidden_states": latents(s.batch, s.packed, c.in_channels),
            "encoder_hidden_states": normal(s.batch, s.text, c.joint_attention_dim),
            "pooled_projections": normal(s.batch, c.pooled_projection_dim),
            "timestep": sigma(s.batch),
            "img_ids": grid(1, s.height // 2, s.width // 2),
            "txt_ids": torch.zeros(s.text, 3),
            "guidance": torch.full((s.batch,), 3.5),
        },
        real={"guidance_embeds": True},
    ),
    "GlmImageTransformer2DModel": Entry(
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 12, "time_embed_dim": 8}
        | {"condition_dim": 4, "prior_vq_quantizer_codebook_size": 10},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, s.height, s.width),
            "encoder_hidden_states": normal(s.batch, s.text, c.text_embed_dim),
            "prior_token_id": integers(10, s.batch, s.packed),
            "prior_token_drop": torch.zeros(s.batch, s.packed, dtype=torch.bool),
            "timestep": timestep(s.batch),
            "target_size": torch.full((s.batch, 2), 32.0),
            "crop_coords": torch.zeros(s.batch, 2),
        },
    ),
    "HiDreamImageTransformer2DModel": Entry(
        {**HEADS, "patch_size": 2, "in_channels": 4, "num_layers": 2, "num_single_layers": 2}
        | {"caption_channels": (12, 12), "text_emb_dim": 10, "axes_dims_rope": (8, 4, 4), "max_resolution": (8, 8)}
        | {"llama_layers": (0, 1, 1, 0)},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, s.height, s.width),
            "timesteps": timestep(s.batch),
            "encoder_hidden_states_t5": normal(s.batch, s.text, c.caption_channels[0]),
            "encoder_hidden_states_llama3": normal(1 + max(c.llama_layers), s.batch, s.text, c.caption_channels[1]),
            "pooled_embeds": normal(s.batch, c.text_emb_dim),
        },
        real={"patch_size": 2, "in_channels": 16, "caption_channels": (4096, 4096), "axes_dims_rope": (64, 32, 32)}
        | {"llama_layers": (*range(32), *(31,) * 16)},
        failure=Failure(
            r"depends on hidden_states",
            "which expert gets how many tokens is read from the latents",
            "send tokens to experts by a grouped product, not a loop over counts (diffusers #11477, open)",
        ),
    ),
    "HunyuanDiT2DModel": Entry(
        {**HEADS, "in_channels": 4, "patch_size": 2, "sample_size": 8, "hidden_size": 32, "num_layers": 4}
        | {"mlp_ratio": 2.0, "cross_attention_dim": 16, "cross_attention_dim_t5": 16, "pooled_projection_dim": 8}
        | {"text_len": 3, "text_len_t5": 2},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, s.height, s.width),
            "timestep": timestep(s.batch),
            "encoder_hidden_states": normal(s.batch, c.text_len, c.cross_attention_dim),
            "text_embedding_mask": torch.ones(s.batch, c.text_len),
            "encoder_hidden_states_t5": normal(s.batch, c.text_len_t5, c.cross_attention_dim_t5),
            "text_embedding_mask_t5": torch.ones(s.batch, c.text_len_t5),
            "image_meta_size": torch.full((s.batch, 6), 32.0),
            "style": torch.zeros(s.batch, dtype=torch.long),
            "image_rotary_emb": [normal(s.packed, c.attention_head_dim) for _ in range(2)],
        },
        real={"in_channels": 4, "patch_size": 2, "sample_size": 128, "hidden_size": 1408, "num_layers": 40}
        | {"mlp_ratio": 4.3637},
        no_span="no: each block of the second half projects a skip connection",
    ),
    "HunyuanImageTransformer2DModel": Entry(
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2}
        | {"num_refiner_layers": 1, "mlp_ratio": 2.0, "text_embed_dim": 12, "rope_axes_dim": (8, 8)},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, s.height, s.width),
            "timestep": timestep(s.batch),
            "encoder_hidden_states": normal(s.batch, s.text, c.text_embed_dim),
            "encoder_attention_mask": torch.ones(s.batch, s.text),
        },
    ),
    "Ideogram4Transformer2DModel": Entry(
        {**HEADS, "in_channels": 4, "num_layers": 2, "intermediate_size": 48, "adaln_dim": 8, "llm_features_dim": 12}
        | {"mrope_section": (4, 2, 2)},
        lambda c, s: {
            "hidden_states": latents(s.batch, s.text + s.packed, c.in_channels),
            "timestep": sigma(s.batch),
            "encoder_hidden_states": normal(s.batch, s.text + s.packed, c.llm_features_dim),
            "position_ids": torch.arange(s.text + s.packed)[None, :, None].repeat(s.batch, 1, 3),
            "segment_ids": torch.ones(s.batch, s.text + s.packed, dtype=torch.long),
            "indicator": torch.tensor([3] * s.text + [2] * s.packed)[None].repeat(s.batch, 1),
        },
    ),
    "JoyImageEditPlusTransformer3DModel": Entry(
        {"in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 12, "mlp_width_ratio": 2.0}
        | {"num_layers": 2, "rope_dim_list": [4, 6, 6]},
        lambda c, s: {
            "hidden_states": latents(s.batch, s.packed, c.in_channels, 1, 2, 2),
            "timestep": timestep(s.batch),
            "encoder_hidden_states": normal(s.batch, s.text, c.text_dim),
            "encoder_hidden_states_mask": torch.ones(s.batch, s.text),
            "shape_list": [[(1, s.height // 2, s.width // 2)]] * s.batch,
        },
    ),
    "JoyImageEditTransformer3DModel": Entry(
        {"in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 12, "mlp_width_ratio": 2.0}
        | {"num_layers": 2, "rope_dim_list": [4, 6, 6]},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, 1, s.height, s.width),
            "timestep": timestep(s.batch),
            "encoder_hidden_states": normal(s.batch, s.text, c.text_dim),
        },
    ),
    "Krea2Transformer2DModel": Entry(
        {**HEADS, **AXES, "in_channels": 4, "num_layers": 2, "num_key_value_heads": 1, "intermediate_size": 48}
        | {"timestep_embed_dim": 8, "text_hidden_dim": 12, "num_text_layers": 2, "text_num_attention_heads": 2}
        | {"text_num_key_value_heads": 1, "text_intermediate_size": 16, "num_layerwise_text_blocks": 1}
        | {"num_refiner_text_blocks": 1},
        lambda c, s: {
            "hidden_states": latents(s.batch, s.packed, c.in_channels),
            "encoder_hidden_states": normal(s.batch, s.text, c.num_text_layers, c.text_hidden_dim),
            "timestep": sigma(s.batch),
            "position_ids": torch.cat([torch.zeros(s.text, 3), grid(1, s.height // 2, s.width // 2)]),
            "encoder_attention_mask": torch.ones(s.batch, s.text, dtype=torch.bool),
        },
    ),
    "LongCatImageTransformer2DModel": Entry(
        {**FLUX, **AXES, "pooled_projection_dim": 10},
        packed_with_positions,
    ),
    "Lumina2Transformer2DModel": Entry(
        {"sample_size": 8, "in_channels": 4, "hidden_size": 32, "num_layers": 2, "num_refiner_layers": 1}
        | {"num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 8, "axes_dim_rope": (4, 6, 6)}
        | {"axes_lens": (16, 16, 16), "cap_feat_dim": 12},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, s.height, s.width),
            "timestep": sigma(s.batch),
            "encoder_hidden_states": normal(s.batch, s.text, c.cap_feat_dim),
            "encoder_attention_mask": torch.ones(s.batch, s.text, dtype=torch.bool),
        },
        real={"cap_feat_dim": 2304},
    ),
    "LuminaNextDiT2DModel": Entry(
        {
            "sample_size": 8,
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 8,
        }
        | {"cross_attention_dim": 12},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, s.height, s.width),
            "timestep": sigma(s.batch),
            "encoder_hidden_states": normal(s.batch, s.text, c.cross_attention_dim),
            "encoder_mask": torch.ones(s.batch, s.text),
            "image_rotary_emb": normal(s.height, s.width, c.hidden_size // c.num_attention_heads // 2),
            "cross_attention_kwargs": {},
        },
        real={"num_kv_heads": 8},
    ),
    "NucleusMoEImageTransformer2DModel": Entry(
        {**HEADS, **AXES, "in_channels": 4, "num_layers": 4, "joint_attention_dim": 12, "mlp_ratio": 6.0}
        | {"num_experts": 4, "moe_intermediate_dim": 16, "capacity_factors": 2.0},
        lambda c, s: {
            "hidden_states": latents(s.batch, s.packed, c.in_channels),
            "img_shapes": [(1, s.height // 2, s.width // 2)] * s.batch,
            "encoder_hidden_states": normal(s.batch, s.text, c.joint_attention_dim),
            "encoder_hidden_states_mask": torch.ones(s.batch, s.text, dtype=torch.long),
            "timestep": sigma(s.batch),
        },
    ),
    "OmniGenTransformer2DModel": Entry(
        {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 48}
        | {"num_layers": 2, "pad_token_id": 0, "vocab_size": 20, "time_step_dim": 8, "pos_embed_max_size": 16}
        | {"rope_scaling": {"long_factor": list(range(1, 9)), "short_factor": list(range(1, 9))}},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, s.height, s.width),
            "timestep": sigma(s.batch),
            "input_ids": integers(20, s.batch, s.text),
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": torch.ones(s.batch, s.text + 1 + s.packed, s.text + 1 + s.packed),
            "position_ids": torch.arange(s.text + 1 + s.packed)[None].repeat(s.batch, 1),
        },
        real={"rope_scaling": {"long_factor": [1.0 + i for i in range(48)], "short_factor": [1.0] * 48}},
    ),
    "OvisImageTransformer2DModel": Entry(
        {**FLUX, **AXES, "out_channels": 4},
        packed_with_positions,
    ),
    "PRXTransformer2DModel": Entry(
        {"in_channels": 4, "context_in_dim": 12, "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2}
        | {"axes_dim": (8, 8)},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, s.height, s.width),
            "timestep": sigma(s.batch),
            "encoder_hidden_states": normal(s.batch, s.text, c.context_in_dim),
            "attention_mask": torch.ones(s.batch, s.text, dtype=torch.bool),
        },
        real={"axes_dim": (32, 32)},
    ),
    "PixArtTransformer2DModel": Entry(
        {**HEADS, "num_layers": 2, "cross_attention_dim": 32, "sample_size": 8, "caption_channels": 12},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, c.sample_size, c.sample_size),
            "encoder_hidden_states": normal(s.batch, s.text, c.caption_channels),
            "timestep": timestep(s.batch),
            "added_cond_kwargs": {
                "resolution": torch.full((s.batch, 2), 1024.0) if c.sample_size == 128 else None,
                "aspect_ratio": torch.ones(s.batch, 1) if c.sample_size == 128 else None,
            },
            "encoder_attention_mask": torch.ones(s.batch, s.text),
        },
        real={"caption_channels": 4096},
    ),
    "PriorTransformer": Entry(
        {**HEADS, "num_layers": 2, "embedding_dim": 12, "num_embeddings": 3, "additional_embeddings": 4},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.embedding_dim),
            "timestep": timestep(s.batch),
            "proj_embedding": normal(s.batch, c.embedding_dim),
            "encoder_hidden_states": normal(s.batch, c.num_embeddings, c.embedding_dim),
            "attention_mask": torch.ones(s.batch, c.num_embeddings, dtype=torch.bool),
        },
    ),
    "QwenImage21Transformer2DModel": Entry(
        {**HEADS, **AXES, "in_channels": 4, "out_channels": 4, "num_layers": 2, "context_in_dim": 12},
        lambda c, s: {
            "hidden_states": latents(s.batch, 4 * (s.packed // 4), c.in_channels),
            "encoder_hidden_states": normal(s.batch, s.text, c.context_in_dim),
            "timestep": sigma(s.batch),
            "img_shapes": [[(1, 2, 2 * (s.packed // 4))]] * s.batch,
            "img_mask": torch.tensor([[False] * s.text + [True] * (s.packed // 4)]).repeat(s.batch, 1),
        },
    ),
    "QwenImageTransformer2DModel": Entry(
        {**HEADS, **AXES, "in_channels": 16, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 12},
        lambda c, s: {
            "hidden_states": latents(s.batch, s.packed, c.in_channels),
            "encoder_hidden_states": normal(s.batch, s.text, c.joint_attention_dim),
            "encoder_hidden_states_mask": torch.ones(s.batch, s.text, dtype=torch.long),
            "timestep": sigma(s.batch),
            "img_shapes": [[(1, s.height // 2, s.width // 2)]] * s.batch,
        },
    ),
    "SD3Transformer2DModel": Entry(
        {**HEADS, "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 3, "joint_attention_dim": 12}
        | {"caption_projection_dim": 32, "pooled_projection_dim": 10, "dual_attention_layers": (0,)}
        | {"qk_norm": "rms_norm", "pos_embed_max_size": 16},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, s.height, s.width),
            "encoder_hidden_states": normal(s.batch, s.text, c.joint_attention_dim),
            "pooled_projections": normal(s.batch, c.pooled_projection_dim),
            "timestep": timestep(s.batch),
        },
        real={"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
    ),
    "SanaTransformer2DModel": Entry(
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_cross_attention_heads": 2}
        | {"cross_attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 12, "sample_size": 8},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, s.height, s.width),
            "encoder_hidden_states": normal(s.batch, s.text, c.caption_channels),
            "timestep": timestep(s.batch),
            "encoder_attention_mask": torch.ones(s.batch, s.text),
        },
    ),
    "Transformer2DModel": Entry(
        {**HEADS, "in_channels": 32, "norm_num_groups": 4, "num_layers": 2, "cross_attention_dim": 12},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, s.height, s.width),
            "encoder_hidden_states": normal(s.batch, s.text, c.cross_attention_dim),
        },
        real={"in_channels": 320, "num_attention_heads": 5, "attention_head_dim": 64, "cross_attention_dim": 2048},
    ),
    "ZImageTransformer2DModel": Entry(
        {"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
        | {"cap_feat_dim": 12, "axes_dims": [4, 6, 6], "axes_lens": [64, 32, 32]},
        lambda c, s: {
            "x": [latents(c.in_channels, 1, s.height, s.width) for _ in range(s.batch)],
            "t": sigma(s.batch),
            "cap_feats": [normal(s.text, c.cap_feat_dim) for _ in range(s.batch)],
        },
    ),
}
