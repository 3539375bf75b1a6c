"""The pocket pair's networks: sizes and constructors, in diffusers and transformers classes."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    ViTConfig,
    ViTModel,
)

VOCABULARY, TEXT_LENGTH, TEXT_WIDTH = 6144, 32, 192
LATENT_CHANNELS, LATENT_SIDE, RESOLUTION = 8, 16, 128
NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}
NOISE_SCALE = 0.75  # of a picture in one step (model/schedule.py)
STUDENT_STEPS = (999, 749, 499, 249)  # the timesteps of 4, 2 and 1 trailing steps


def text_config() -> CLIPTextConfig:
    """The text encoder: four layers, 32 tokens, width 192."""
    return CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=TEXT_LENGTH,
        hidden_act="gelu",
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=VOCABULARY - 1,
    )


def clip() -> CLIPModel:
    """Text encoder and vision tower, trained against each other."""
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=RESOLUTION,
        patch_size=16,
        hidden_act="gelu",
    )
    return CLIPModel(
        CLIPConfig(
            text_config=text_config().to_dict(),
            vision_config=vision.to_dict(),
            projection_dim=TEXT_WIDTH,
        )
    )


def vit() -> ViTModel:
    """The small brother of DINO: finer patches than CLIP's tower, no words in its training."""
    return ViTModel(
        ViTConfig(
            hidden_size=160,
            intermediate_size=640,
            num_hidden_layers=5,
            num_attention_heads=5,
            image_size=RESOLUTION,
            patch_size=8,
            qkv_bias=True,
        ),
        add_pooling_layer=False,
    )


def vae() -> AutoencoderKL:
    """Downsamples by 8 to eight latent channels (four lost too much at this size)."""
    return AutoencoderKL(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=16,
        sample_size=RESOLUTION,
        scaling_factor=1.0,
    )


def unet() -> UNet2DConditionModel:
    """Teacher's and student's network."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=(96, 160, 160),
        cross_attention_dim=TEXT_WIDTH,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=[3, 5, 5],
        use_linear_projection=True,
        norm_num_groups=32,
    )


def teacher_scheduler() -> DDIMScheduler:
    """DDIM, trailing timesteps, v-prediction."""
    return DDIMScheduler(clip_sample=False, set_alpha_to_one=True, **NOISE)


def student_scheduler() -> EulerDiscreteScheduler:
    """Euler on the same schedule: its first step starts from noise of the last timestep."""
    scheduler = EulerDiscreteScheduler(**NOISE)
    scheduler.register_to_config(_noise_scale=NOISE_SCALE)
    return scheduler


def alphas_cumprod(device: str | torch.device) -> torch.Tensor:
    """abar_t [1000], float32."""
    return teacher_scheduler().alphas_cumprod.to(device)
