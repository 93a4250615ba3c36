"""Experiments on a user's own tables of numbers, categories and texts."""

from dataclasses import replace

from perceiver.config import Cosine, DataConfig, Experiment, OptimConfig, RunConfig, TrainingConfig
from perceiver.models import ClassOutput, DecoderConfig, EncoderConfig, PerceiverIOConfig, TableInput
from perceiver.tasks.table_heads import TableHeadsConfig
from perceiver.tasks.tables import TablesConfig


def table_heads() -> Experiment:
    """Several columns of your own table at once: --data.source FILE.parquet --task.heads A=classes B=mse*0.5."""
    base = tables()
    return replace(base, preset="table-heads", task=TableHeadsConfig())


def tables() -> Experiment:
    """A classifier or regressor of your own table: --data.source FILE.parquet --task.targets COLUMN [--model.input.columns A,B]."""
    return Experiment(
        preset="tables",
        task=TablesConfig(),
        model=PerceiverIOConfig(
            num_latents=16,
            num_latent_channels=64,
            input=TableInput(),
            encoder=EncoderConfig(num_cross_attention_heads=4, num_self_attention_heads=4, num_self_attention_layers_per_block=2),
            decoder=DecoderConfig(num_cross_attention_heads=4),
            output=ClassOutput(num_query_channels=64),
            init_scale=0.1,
        ),
        data=DataConfig(),
        optim=OptimConfig(lr=2e-3, schedule=Cosine(), warmup_steps=50, max_grad_norm=1.0),
        training=TrainingConfig(global_batch_size=64, max_epochs=20),
        run=RunConfig(log_every=50, val_every=250, checkpoint_every=250),
    )
