"""Transformers of videos, some with sound."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

from tests.zoo.entry import VIDEO, Entry, Failure, Size, integers, latents, normal, timestep

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
WAN = {**HEADS, "in_channels": 4, "out_channels": 4, "text_dim": 12, "freq_dim": 8, "ffn_dim": 48, "num_layers": 2}
COGVIDEO = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 12,
    "num_layers": 2,
} | {
    "sample_width": 6,
    "sample_height": 4,
    "sample_frames": 5,
    "max_text_seq_length": 3,
}
HUNYUAN = {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_refiner_layers": 1, "mlp_ratio": 2.0} | {
    "text_embed_dim": 12,
    "rope_axes_dim": (4, 6, 6),
}
LTX2 = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 32,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "num_layers": 2,
    "caption_channels": 12,
}


def frames_and_text(c: Any, s: Size) -> dict[str, Any]:
    """Latents of a video and a prompt."""
    return {
        "hidden_states": latents(s.batch, c.in_channels, s.frames, s.height, s.width),
        "timestep": timestep(s.batch),
        "encoder_hidden_states": normal(s.batch, s.text, c.text_dim),
    }


VIDEOS: dict[str, Entry] = {
    "AllegroTransformer3DModel": Entry(
        {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2, "cross_attention_dim": 48}
        | {"sample_height": 4, "sample_width": 6, "sample_frames": 2, "caption_channels": 12},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, s.frames, s.height, s.width),
            "encoder_hidden_states": normal(s.batch, s.text, c.caption_channels),
            "timestep": timestep(s.batch),
            "attention_mask": torch.ones(s.batch, s.frames, s.height, s.width),
            "encoder_attention_mask": torch.ones(s.batch, s.text),
            "image_rotary_emb": [  # tables of three axes, and places
                [
                    [normal(side, c.attention_head_dim // 3) for _ in range(2)]
                    for side in (s.frames, s.height // 2, s.width // 2)
                ],
                [integers(side, s.batch, s.frames * s.packed) for side in (s.frames, s.height // 2, s.width // 2)],
            ],
        },
        size=VIDEO,
    ),
    "AnyFlowFARTransformer3DModel": Entry(
        {**WAN, "chunk_partition": (1, 1)},
        lambda c, s: {
            "hidden_states": latents(s.batch, s.frames, c.in_channels, s.height, s.width),
            "timestep": timestep(s.batch, s.frames),
            "r_timestep": timestep(s.batch, s.frames),
            "encoder_hidden_states": normal(s.batch, s.text, c.text_dim),
            "chunk_partition": [1] * s.frames,
        },
        size=VIDEO,
    ),
    "AnyFlowTransformer3DModel": Entry(
        WAN,
        lambda c, s: {
            "hidden_states": latents(s.batch, s.frames, c.in_channels, s.height, s.width),
            "timestep": timestep(s.batch, s.frames),
            "r_timestep": timestep(s.batch, s.frames),
            "encoder_hidden_states": normal(s.batch, s.text, c.text_dim),
        },
        size=VIDEO,
    ),
    "ChronoEditTransformer3DModel": Entry(
        {**WAN, "rope_temporal_skip_len": 8},
        frames_and_text,
        size=VIDEO,
    ),
    "CogVideoXTransformer3DModel": Entry(
        COGVIDEO,
        lambda c, s: {
            "hidden_states": latents(s.batch, s.frames, c.in_channels, s.height, s.width),
            "encoder_hidden_states": normal(s.batch, s.text, c.text_embed_dim),
            "timestep": timestep(s.batch),
        },
        size=VIDEO,
    ),
    "ConsisIDTransformer3DModel": Entry(
        {**COGVIDEO, "is_train_face": True, "use_rotary_positional_embeddings": True, "cross_attn_dim_head": 8}
        | {"num_attention_heads": 3}
        | {"cross_attn_num_heads": 2, "LFE_id_dim": 4, "LFE_vit_dim": 4, "LFE_depth": 5, "LFE_dim_head": 8}
        | {"LFE_num_heads": 2, "LFE_num_id_token": 1, "LFE_num_querie": 1, "LFE_output_dim": 32, "LFE_ff_mult": 1},
        lambda c, s: {
            "hidden_states": latents(s.batch, s.frames, c.in_channels, s.height, s.width),
            "encoder_hidden_states": normal(s.batch, s.text, c.text_embed_dim),
            "timestep": timestep(s.batch),
            "image_rotary_emb": [normal(s.frames * s.packed, c.attention_head_dim) for _ in range(2)],
            "id_cond": normal(s.batch, c.LFE_id_dim),
            "id_vit_hidden": [normal(s.batch, 2, c.LFE_vit_dim) for _ in range(c.LFE_num_scale)],
        },
        size=VIDEO,
        real={"is_train_face": True, "use_rotary_positional_embeddings": True, "in_channels": 32, "num_layers": 42}
        | {"num_attention_heads": 48},
    ),
    "Cosmos3OmniTransformer": Entry(
        {"head_dim": 16, "hidden_size": 32, "intermediate_size": 48, "latent_channel": 4, "num_attention_heads": 2}
        | {"num_hidden_layers": 2, "num_key_value_heads": 1, "patch_latent_dim": 16, "vocab_size": 20}
        | {"rope_axes_dim": (4, 2, 2)},
        lambda c, s: {
            "input_ids": integers(20, s.text),
            "text_indexes": torch.arange(s.text),
            "position_ids": torch.arange(s.text + s.frames * s.packed)[None].repeat(3, 1),
            "und_len": s.text,
            "sequence_length": s.text + s.frames * s.packed,
            "vision_tokens": [latents(1, c.latent_channel, s.frames, s.height, s.width)],
            "vision_token_shapes": [(s.frames, s.height // 2, s.width // 2)],
            "vision_sequence_indexes": s.text + torch.arange(s.frames * s.packed),
            "vision_mse_loss_indexes": s.text + torch.arange(s.frames * s.packed),
            "vision_timesteps": timestep(s.frames * s.packed),
            "vision_noisy_frame_indexes": [torch.arange(s.frames)],
        },
        size=VIDEO,
    ),
    "CosmosTransformer3DModel": Entry(
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "mlp_ratio": 2.0, "text_embed_dim": 12}
        | {"adaln_lora_dim": 4, "max_size": (4, 8, 8), "concat_padding_mask": False},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, s.frames, s.height, s.width),
            "timestep": timestep(s.batch),
            "encoder_hidden_states": normal(s.batch, s.text, c.text_embed_dim),
            "fps": 30,
        },
        size=VIDEO,
        real={"concat_padding_mask": False},  # True, but it resizes the mask with torchvision
    ),
    "EasyAnimateTransformer3DModel": Entry(
        {**HEADS, "in_channels": 4, "out_channels": 4, "patch_size": 2, "num_layers": 3, "mmdit_layers": 2}
        | {"time_embed_dim": 8, "text_embed_dim": 12},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, s.frames, s.height, s.width),
            "timestep": timestep(s.batch),
            "encoder_hidden_states": normal(s.batch, s.text, c.text_embed_dim),
        },
        size=VIDEO,
        real={"in_channels": 16, "out_channels": 16, "patch_size": 2},
    ),
    "HeliosTransformer3DModel": Entry(
        {**WAN, "rope_dim": (4, 6, 6)},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, s.frames, s.height, s.width),
            "timestep": timestep(s.batch),
            "encoder_hidden_states": normal(s.batch, s.text, c.text_dim),
            "indices_hidden_states": 20 + torch.arange(s.frames).repeat(s.batch, 1),
            "indices_latents_history_short": 18 + torch.arange(2).repeat(s.batch, 1),
            "indices_latents_history_mid": 16 + torch.arange(2).repeat(s.batch, 1),
            "indices_latents_history_long": torch.arange(16).repeat(s.batch, 1),
            "latents_history_short": normal(s.batch, c.in_channels, 2, s.height, s.width),
            "latents_history_mid": normal(s.batch, c.in_channels, 2, s.height, s.width),
            "latents_history_long": normal(s.batch, c.in_channels, 16, s.height, s.width),
        },
        size=VIDEO,
    ),
    "HunyuanVideo15Transformer3DModel": Entry(
        {**HUNYUAN, "text_embed_2_dim": 10, "image_embed_dim": 8},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, s.frames, s.height, s.width),
            "timestep": timestep(s.batch),
            "encoder_hidden_states": normal(s.batch, s.text, c.text_embed_dim),
            "encoder_attention_mask": torch.ones(s.batch, s.text),
            "encoder_hidden_states_2": normal(s.batch, s.text, c.text_embed_2_dim),
            "encoder_attention_mask_2": torch.ones(s.batch, s.text),
            "image_embeds": normal(s.batch, 2, c.image_embed_dim),
        },
        size=VIDEO,
    ),
    "HunyuanVideoFramepackTransformer3DModel": Entry(
        {**HUNYUAN, "num_single_layers": 2, "pooled_projection_dim": 8, "has_image_proj": True, "image_proj_dim": 8}
        | {"has_clean_x_embedder": True},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, s.frames, s.height, s.width),
            "timestep": timestep(s.batch),
            "encoder_hidden_states": normal(s.batch, s.text, c.text_embed_dim),
            "encoder_attention_mask": torch.ones(s.batch, s.text),
            "pooled_projections": normal(s.batch, c.pooled_projection_dim),
            "image_embeds": normal(s.batch, 2, c.image_proj_dim),
            "indices_latents": torch.arange(s.frames),
            "guidance": torch.full((s.batch,), 6.0),
            "latents_clean": normal(s.batch, c.in_channels, 1, s.height, s.width),
            "indices_latents_clean": torch.zeros(1, dtype=torch.long),
            "latents_history_2x": normal(s.batch, c.in_channels, 2, s.height, s.width),
            "indices_latents_history_2x": torch.arange(2),
            "latents_history_4x": normal(s.batch, c.in_channels, 4, s.height, s.width),
            "indices_latents_history_4x": torch.arange(4),
        },
        size=VIDEO,
        real={"has_image_proj": True, "has_clean_x_embedder": True},
    ),
    "HunyuanVideoTransformer3DModel": Entry(
        {**HUNYUAN, "num_single_layers": 2, "pooled_projection_dim": 8},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, s.frames, s.height, s.width),
            "timestep": timestep(s.batch),
            "encoder_hidden_states": normal(s.batch, s.text, c.text_embed_dim),
            "encoder_attention_mask": torch.ones(s.batch, s.text),
            "pooled_projections": normal(s.batch, c.pooled_projection_dim),
            "guidance": torch.full((s.batch,), 6.0),
        },
        size=VIDEO,
    ),
    "Kandinsky5Transformer3DModel": Entry(
        {"in_text_dim": 12, "in_text_dim2": 8, "time_dim": 8, "model_dim": 32, "ff_dim": 48, "num_text_blocks": 1}
        | {"num_visual_blocks": 2, "axes_dims": (4, 6, 6)},
        lambda c, s: {
            "hidden_states": latents(s.batch, s.frames, s.height, s.width, c.in_visual_dim),
            "encoder_hidden_states": normal(s.batch, s.text, c.in_text_dim),
            "timestep": timestep(s.batch),
            "pooled_projections": normal(s.batch, c.in_text_dim2),
            "visual_rope_pos": [torch.arange(s.frames), torch.arange(s.height // 2), torch.arange(s.width // 2)],
            "text_rope_pos": torch.arange(s.text),
        },
        size=VIDEO,
        real={"in_visual_dim": 16, "out_visual_dim": 16, "visual_cond": False},
    ),
    "Kandinsky6SRTransformer3DModel": Entry(
        {"in_visual_dim": 4, "out_visual_dim": 4, "time_dim": 8, "model_dim": 32, "ff_dim": 48}
        | {"num_visual_blocks": 2, "axes_dims": (4, 6, 6)},
        lambda c, s: {
            "hidden_states": latents(s.batch, s.frames, 8, 8, 2 * c.in_visual_dim + 1),
            "timestep": timestep(s.batch),
        },
        size=VIDEO,
    ),
    "Kandinsky6Transformer3DModel": Entry(
        {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 12, "in_text_dim2": 8, "time_dim": 8, "ff_dim": 48}
        | {"model_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 6, 6), "in_audio_dim": 4}
        | {"out_audio_dim": 4},
        lambda c, s: {
            "hidden_states": latents(s.batch, s.frames, s.height, s.width, 2 * c.in_visual_dim + 1),
            "encoder_hidden_states": normal(s.batch, s.text, c.in_text_dim),
            "pooled_projections": normal(s.batch, c.in_text_dim2),
            "timestep": timestep(s.batch),
            "audio_hidden_states": latents(s.batch, s.audio, c.in_audio_dim),
        },
        size=VIDEO,
    ),
    "LTX2VideoTransformer3DModel": Entry(
        LTX2,
        lambda c, s: {
            "hidden_states": latents(s.batch, s.frames * s.packed, c.in_channels),
            "audio_hidden_states": latents(s.batch, s.audio, c.audio_in_channels),
            "encoder_hidden_states": normal(s.batch, s.text, c.caption_channels),
            "audio_encoder_hidden_states": normal(s.batch, s.text, c.caption_channels),
            "timestep": timestep(s.batch),
            "encoder_attention_mask": torch.ones(s.batch, s.text),
            "audio_encoder_attention_mask": torch.ones(s.batch, s.text),
            "num_frames": s.frames,
            "height": s.height // 2,
            "width": s.width // 2,
            "audio_num_frames": s.audio,
        },
        size=VIDEO,
    ),
    "LTXVideoTransformer3DModel": Entry(
        {**HEADS, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 32, "num_layers": 2}
        | {"caption_channels": 12},
        lambda c, s: {
            "hidden_states": latents(s.batch, s.frames * s.packed, c.in_channels),
            "encoder_hidden_states": normal(s.batch, s.text, c.caption_channels),
            "timestep": timestep(s.batch),
            "encoder_attention_mask": torch.ones(s.batch, s.text),
            "num_frames": s.frames,
            "height": s.height // 2,
            "width": s.width // 2,
        },
        size=VIDEO,
    ),
    "LatteTransformer3DModel": Entry(
        {**HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 2, "cross_attention_dim": 32, "sample_size": 8}
        | {"patch_size": 2, "activation_fn": "gelu-approximate", "norm_type": "ada_norm_single"}
        | {"norm_elementwise_affine": False, "caption_channels": 12, "video_length": 2, "attention_bias": True},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, c.video_length, c.sample_size, c.sample_size),
            "timestep": timestep(s.batch),
            "encoder_hidden_states": normal(s.batch, s.text, c.caption_channels),
        },
        size=VIDEO,
        real={"in_channels": 4, "out_channels": 8, "num_layers": 28, "cross_attention_dim": 1152, "patch_size": 2}
        | {"attention_head_dim": 72, "activation_fn": "gelu-approximate", "norm_type": "ada_norm_single"}
        | {"norm_elementwise_affine": False, "caption_channels": 4096, "attention_bias": True},
    ),
    "MiniMaxH3Transformer3DModel": Entry(
        {**HEADS, "hidden_size": 32, "num_layers": 2, "num_refiner_layers": 1, "ffn_dim": 48, "in_channels": 4}
        | {"audio_in_channels": 4, "text_dim": 12, "freq_dim": 8, "time_embed_hidden_dim": 16, "time_embed_dim": 8}
        | {"rope_freq_dim": 2},
        lambda c, s: {
            "hidden_states": latents(1, s.frames * s.packed, 4 * c.in_channels),
            "audio_hidden_states": latents(1, s.audio, c.audio_in_channels),
            "encoder_hidden_states": normal(1, s.text, c.text_dim),
            "timestep": timestep(1),
            "timestep_indices": torch.zeros(s.text + s.frames * s.packed + s.audio, dtype=torch.long),
            "token_tags": torch.tensor([0] * s.text + [1] * (s.frames * s.packed) + [2] * s.audio),
            "position_ids": torch.arange(s.text + s.frames * s.packed + s.audio)[:, None].repeat(1, 3),
            "text_indices": torch.arange(s.text),
            "video_indices": s.text + torch.arange(s.frames * s.packed),
            "audio_indices": s.text + s.frames * s.packed + torch.arange(s.audio),
        },
        size=VIDEO,
    ),
    "MochiTransformer3DModel": Entry(
        {**HEADS, "num_layers": 2, "pooled_projection_dim": 16, "in_channels": 4, "text_embed_dim": 16}
        | {"time_embed_dim": 4, "max_sequence_length": 3},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, s.frames, s.height, s.width),
            "encoder_hidden_states": normal(s.batch, s.text, c.text_embed_dim),
            "timestep": timestep(s.batch),
            "encoder_attention_mask": torch.ones(s.batch, s.text, dtype=torch.bool),
        },
        size=VIDEO,
    ),
    "MotifVideoTransformer3DModel": Entry(
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2, "mlp_ratio": 2.0}
        | {"text_embed_dim": 12, "rope_axes_dim": (4, 6, 6)},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, s.frames, s.height, s.width),
            "timestep": timestep(s.batch),
            "encoder_hidden_states": normal(s.batch, s.text, c.text_embed_dim),
            "encoder_attention_mask": torch.ones(s.batch, s.text),
        },
        size=VIDEO,
    ),
    "SanaVideoTransformer3DModel": Entry(
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_cross_attention_heads": 2}
        | {"cross_attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 12, "sample_size": 8},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, s.frames, s.height, s.width),
            "encoder_hidden_states": normal(s.batch, s.text, c.caption_channels),
            "timestep": timestep(s.batch),
            "encoder_attention_mask": torch.ones(s.batch, s.text),
        },
        size=VIDEO,
    ),
    "SanaWMTransformer3DModel": Entry(
        {"in_channels": 4, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "softmax_every_n": 2}
        | {"linear_head_dim": 16, "chunk_plucker_channels": 4, "caption_channels": 12, "mlp_ratio": 2.0},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, s.frames, s.height, s.width),
            "timestep": timestep(s.batch, 1, s.frames),
            "encoder_hidden_states": normal(s.batch, 1, s.text, c.caption_channels),
            "encoder_attention_mask": torch.ones(s.batch, s.text),
        },
        size=VIDEO,
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Entry(
        LTX2,
        lambda c, s: {
            "hidden_states": latents(s.batch, s.frames * s.packed, c.in_channels),
            "encoder_hidden_states": normal(s.batch, s.text, c.caption_channels),
            "timestep": timestep(s.batch, s.frames * s.packed),
            "video_rotary_emb": [
                normal(s.batch, s.frames * s.packed, c.num_attention_heads * c.attention_head_dim) for _ in range(2)
            ],
            "encoder_attention_mask": torch.ones(s.batch, s.text),
        },
        size=VIDEO,
    ),
    "SkyReelsV2Transformer3DModel": Entry(
        WAN,
        frames_and_text,
        size=VIDEO,
    ),
    "TransformerTemporalModel": Entry(
        {**HEADS, "in_channels": 32, "norm_num_groups": 4, "num_layers": 2},
        lambda c, s: {
            "hidden_states": latents(s.batch * s.frames, c.in_channels, s.height, s.width),
            "num_frames": s.frames,
        },
        size=VIDEO,
        real={"in_channels": 320, "num_attention_heads": 8, "attention_head_dim": 40},
    ),
    "WanAnimate2Transformer3DModel": Entry(
        {"text_len": 4, "in_dim": 8, "dim": 32, "ffn_dim": 48, "freq_dim": 8, "text_dim": 12, "out_dim": 4}
        | {"num_heads": 2, "num_layers": 2},
        lambda c, s: {
            "hidden_states": [latents(c.in_dim - c.out_dim, s.frames, s.height, s.width)],
            "timestep": timestep(1),
            "encoder_hidden_states": [normal(s.text, c.text_dim)],
            "condition_latents": [normal(c.out_dim, s.frames, s.height, s.width)],
            "kv_cache": WanAnimate2KVCache(c.num_layers),
            "kv_cache_mode": "extract",
            "seq_len": s.frames * s.packed,
            "encoder_hidden_states_image": normal(1, 2, 1280),
            "offset_grid_sizes": torch.tensor([[1, s.height // 2, s.width // 2]]),
        },
        size=VIDEO,
        failure=Failure(
            "object of type WanAnimate2KVCache",
            "keys and values of the reference pass live in an object that the call changes",
            "take and return them as tensors (it came with diffusers #14413; no thread about it was found)",
            obstacle=None,
        ),
    ),
    "WanAnimateTransformer3DModel": Entry(
        {**WAN, "in_channels": 12, "latent_channels": 4, "image_dim": 8, "motion_encoder_size": 16}
        | {"motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}, "motion_style_dim": 8, "motion_dim": 4}
        | {"motion_encoder_dim": 8, "face_encoder_hidden_dim": 8, "face_encoder_num_heads": 2}
        | {"inject_face_latents_blocks": 2, "added_kv_proj_dim": 32},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, s.frames, s.height, s.width),
            "timestep": timestep(s.batch),
            "encoder_hidden_states": normal(s.batch, s.text, c.text_dim),
            "encoder_hidden_states_image": normal(s.batch, 2, c.image_dim),
            "pose_hidden_states": normal(s.batch, c.latent_channels, s.frames - 1, s.height, s.width),
            "face_pixel_values": normal(s.batch, 3, 4 * (s.frames - 1), c.motion_encoder_size, c.motion_encoder_size),
        },
        size=VIDEO,
    ),
    "WanTransformer3DModel": Entry(
        WAN,
        frames_and_text,
        size=VIDEO,
    ),
    "WanVACETransformer3DModel": Entry(
        {**WAN, "num_layers": 3, "vace_layers": [0, 2], "vace_in_channels": 12},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, s.frames, s.height, s.width),
            "timestep": timestep(s.batch),
            "encoder_hidden_states": normal(s.batch, s.text, c.text_dim),
            "control_hidden_states": normal(s.batch, c.vace_in_channels, s.frames, s.height, s.width),
            "control_hidden_states_scale": torch.ones(len(c.vace_layers)),
        },
        size=VIDEO,
        no_span="no: the blocks of the control branch return a projection",
    ),
}
