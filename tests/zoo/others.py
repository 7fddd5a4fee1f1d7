"""Transformers of sound and of molecules."""

from __future__ import annotations

import torch

from tests.zoo.entry import SOUND, Draw, Entry, Size, integers, latents, normal, sigma


def _annotations(size: Size) -> dict[str, Draw]:
    """What RFD4Proteina's published config asks to know of a protein's tokens and their atoms."""
    atoms = ("hbond", "pistack", "pication", "saltbridge", "hydrophobic", "metal-coord")
    batch, tokens, index = size.batch, size.audio, "condition_index-group_1_token"
    return {
        **{f"condition_{name}_1_atom": integers(2, batch, tokens, 37) for name in atoms},
        **{name: integers(4, batch, tokens) for name in ("molecule_iid", "molecule_entity_id", index)},
        **{name: integers(4, batch, tokens, 37) for name in ("charge", "element")},
        "token_bond_path_length": integers(8, batch, tokens, tokens),
    }


OTHERS: dict[str, Entry] = {
    "AceStepTransformer1DModel": Entry(
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"num_key_value_heads": 1, "head_dim": 16, "in_channels": 12, "audio_acoustic_hidden_dim": 4}
        | {"sliding_window": 2, "encoder_hidden_size": 12},
        lambda c, s: {
            "hidden_states": latents(s.batch, s.audio, c.audio_acoustic_hidden_dim),
            "timestep": sigma(s.batch),
            "timestep_r": sigma(s.batch),
            "encoder_hidden_states": normal(s.batch, s.text, c.encoder_hidden_size or c.hidden_size),
            "context_latents": normal(s.batch, s.audio, c.in_channels - c.audio_acoustic_hidden_dim),
        },
        size=SOUND,
    ),
    "LongCatAudioDiTTransformer": Entry(
        {"dit_dim": 32, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": 12, "latent_dim": 4, "ff_mult": 2.0},
        lambda c, s: {
            "hidden_states": latents(s.batch, s.audio, c.latent_dim),
            "encoder_hidden_states": normal(s.batch, s.text, c.dit_text_dim),
            "encoder_attention_mask": torch.ones(s.batch, s.text, dtype=torch.bool),
            "timestep": sigma(s.batch),
            "attention_mask": torch.ones(s.batch, s.audio, dtype=torch.bool),
            "latent_cond": normal(s.batch, s.audio, c.latent_dim),
        },
        size=SOUND,
    ),
    "MiniMaxMusic3Transformer1DModel": Entry(
        {"in_channels": 4, "condition_dim": 12, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
        | {"ff_inner_dim": 48, "rotary_dim": 8, "fourier_embedding_dim": 8},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, s.audio),
            "timestep": sigma(s.batch),
            "encoder_hidden_states": normal(s.batch, s.audio, c.condition_dim),
        },
        size=SOUND,
    ),
    "RFD4ProteinaTransformer": Entry(
        {"nlayers": 3, "token_dim": 32, "nheads": 2, "dim_cond": 16, "pair_repr_dim": 16, "latent_dim": 4}
        | {"token_type_emb_dim": 4, "cath_emb_dim": 4, "t_emb_dim": 8, "seq_sep_dim": 8, "xt_pair_dist_dim": 6}
        | {"tri_mult_c": 8, "num_sequence_classes": 10, "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type")}
        | {"feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents", "recycle_remaining")}
        | {"feats_pair_repr": ("xt_bb_ca_pair_dists",)},
        lambda c, s: {
            "bb_ca": latents(s.batch, s.audio, 3),
            "local_latents": latents(s.batch, s.audio, c.latent_dim),
            "bb_ca_time": sigma(s.batch),
            "local_latents_time": sigma(s.batch),
            "padding_mask": torch.ones(s.batch, s.audio, dtype=torch.bool),
            "token_type": integers(7, s.batch, s.audio),
            "conditioning": {
                "is_in_context_conditioning": torch.zeros(s.batch, s.audio, dtype=torch.bool),
                "supports_local_latent": torch.ones(s.batch, s.audio, dtype=torch.bool),
                **(_annotations(s) if "hbond_modernized" in c.feats_seq else {}),
            },
            "atom37_mask": torch.ones(s.batch, s.audio, 37, dtype=torch.bool),
            "recycle_depth": 2,
        },
        size=SOUND,
        no_span="no: a block multiplies its sum by a mask",
    ),
    "StableAudio3DiTModel": Entry(
        {"io_channels": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "cond_token_dim": 12, "global_cond_dim": 8}
        | {"local_add_cond_dim": 5, "timestep_features_dim": 8, "ff_mult": 2.0, "num_memory_tokens": 2},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.io_channels, s.audio),
            "timestep": sigma(s.batch),
            "encoder_hidden_states": normal(s.batch, s.text, c.cond_token_dim),
            "global_hidden_states": normal(s.batch, c.global_cond_dim),
            "local_add_cond": normal(s.batch, c.local_add_cond_dim, s.audio),
        },
        size=SOUND,
    ),
    "StableAudioDiTModel": Entry(
        {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16}
        | {"num_attention_heads": 2, "num_key_value_attention_heads": 1, "cross_attention_dim": 16}
        | {"time_proj_dim": 8, "global_states_input_dim": 8, "cross_attention_input_dim": 12},
        lambda c, s: {
            "hidden_states": latents(s.batch, c.in_channels, s.audio),
            "timestep": sigma(s.batch),
            "encoder_hidden_states": normal(s.batch, s.text, c.cross_attention_input_dim),
            "global_hidden_states": normal(s.batch, 1, c.global_states_input_dim),
            "rotary_embedding": [normal(s.audio + 1, c.attention_head_dim // 2) for _ in range(2)],
        },
        size=SOUND,
    ),
    "T5FilmDecoder": Entry(
        {"input_dims": 4, "targets_length": 8, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 24},
        lambda c, s: {
            "encodings_and_masks": [[normal(s.batch, s.text, c.d_model), torch.ones(s.batch, s.text)]],
            "decoder_input_tokens": latents(s.batch, c.targets_length, c.input_dims),
            "decoder_noise_time": sigma(s.batch),
        },
        size=SOUND,
    ),
}
