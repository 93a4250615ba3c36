"""Experiments on optical flow."""

from perceiver.config import Cosine, DataConfig, Experiment, OptimConfig, RunConfig, TrainingConfig
from perceiver.config.optimizers import Lamb
from perceiver.data.made_flow import HEIGHT, WIDTH
from perceiver.models import DecoderConfig, EncoderConfig, FlowInput, FlowOutput, PerceiverIOConfig
from perceiver.tasks.optical_flow import OpticalFlowConfig


def optical_flow() -> Experiment:
    """Optical flow on pairs of frames (Perceiver IO paper, Section 4.2; optical-flow-perceiver): --data.source FOLDER."""
    return Experiment(
        preset="optical-flow",
        task=OpticalFlowConfig(  # augmentation as in RAFT's training on Flying Chairs (arXiv 2003.12039)
            brightness=0.4, contrast=0.4, saturation=0.4, hue=0.16, asymmetric=0.2, erase=0.5, scale=(-0.1, 1.0), stretch=0.2, mirror=0.5,
            mirror_vertical=0.1,
        ),
        model=PerceiverIOConfig(
            num_latents=2048,
            num_latent_channels=512,
            input=FlowInput(),
            encoder=EncoderConfig(num_cross_attention_heads=1, num_self_attention_heads=16, num_self_attention_layers_per_block=24),
            decoder=DecoderConfig(
                num_cross_attention_heads=1,
                num_cross_attention_qk_channels=512,
                num_cross_attention_v_channels=512,
                cross_attention_residual=False,
            ),
            output=FlowOutput(),
        ),
        data=DataConfig(rows_per_block=4),
        optim=OptimConfig(optimizer=Lamb(), lr=4e-4, schedule=Cosine(), warmup_steps=1000, max_grad_norm=1.0),
        training=TrainingConfig(global_batch_size=512, max_epochs=480, precision="bf16"),
        run=RunConfig(best_metric="val_epe"),
    )  # fmt: skip


def optical_flow_small() -> Experiment:
    """Optical flow of made pairs of 24 x 32 pixels, textured shapes before a moving ground; minutes on two cores."""
    return Experiment(
        preset="optical-flow-small",
        task=OpticalFlowConfig(flow_scale=2.0, mirror=0.5, mirror_vertical=0.5, patch_min_overlap=8),
        model=PerceiverIOConfig(
            num_latents=64,
            num_latent_channels=96,
            input=FlowInput(image_shape=(HEIGHT, WIDTH), num_patch_hidden_channels=48, num_frequency_bands=8),
            encoder=EncoderConfig(num_cross_attention_heads=1, num_self_attention_heads=4, num_self_attention_layers_per_block=4),
            decoder=DecoderConfig(
                num_cross_attention_heads=1,
                num_cross_attention_qk_channels=96,
                num_cross_attention_v_channels=96,
            ),
            output=FlowOutput(rescale_factor=1.0),
            init_scale=0.1,
        ),
        data=DataConfig(source="perceiver.data.made_flow:MovingShapes"),
        optim=OptimConfig(lr=2e-3, schedule=Cosine(), warmup_steps=50, max_grad_norm=1.0),
        training=TrainingConfig(global_batch_size=16, max_epochs=8),
        run=RunConfig(log_every=50, val_every=512, checkpoint_every=512, best_metric="val_epe"),
    )  # fmt: skip
