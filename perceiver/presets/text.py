"""Experiments on text."""

from dataclasses import replace

from perceiver.config import Adam, AdamW, Cosine, DataConfig, Experiment, OptimConfig, ParallelConfig, RunConfig, TrainingConfig
from perceiver.models import (
    ClassOutput,
    DecoderConfig,
    EncoderConfig,
    PerceiverARConfig,
    PerceiverIOConfig,
    TextInput,
)
from perceiver.tasks.causal_lm import CausalLMConfig
from perceiver.tasks.masked_lm import MaskedLMConfig
from perceiver.tasks.text_classification import TextClassificationConfig, TextTagsConfig


def mlm_imdb() -> Experiment:
    """Masked language model on IMDb's unlabelled reviews (Perceiver IO paper, Table 11: the 201M byte model)."""
    return Experiment(
        preset="mlm-imdb",
        task=MaskedLMConfig(),
        model=_masked_model(),
        data=DataConfig(source="imdb-unsupervised"),
        optim=OptimConfig(lr=1e-5, warmup_steps=1000),
        training=TrainingConfig(global_batch_size=64, max_epochs=12, precision="bf16"),
        parallel=ParallelConfig(workers=2, activation_checkpointing=1),
    )


def txt_clf_imdb_decoder() -> Experiment:
    """Sentiment on IMDb: a new decoder on the frozen encoder of a masked language model."""
    return Experiment(
        preset="txt-clf-imdb-decoder",
        task=TextClassificationConfig(),
        model=_classifier_model(freeze=True),
        data=_sentiment_data(),
        optim=OptimConfig(lr=1e-3, warmup_steps=100),
        training=TrainingConfig(global_batch_size=256, max_epochs=12, precision="bf16"),
        parallel=ParallelConfig(workers=4),
    )


def txt_clf_imdb_all() -> Experiment:
    """Sentiment on IMDb: encoder and decoder trained together."""
    return Experiment(
        preset="txt-clf-imdb-all",
        task=TextClassificationConfig(),
        model=_classifier_model(freeze=False),
        data=_sentiment_data(),
        optim=OptimConfig(lr=5e-6, warmup_steps=100),
        training=TrainingConfig(global_batch_size=256, max_epochs=10, precision="bf16"),
        parallel=ParallelConfig(workers=4, activation_checkpointing=1),
    )


def mlm_imdb_small() -> Experiment:
    """The masked language model at a size that one CPU core trains: 256 bytes, 128 latents, 0.4 million parameters.

    It starts with attention to neighbouring positions (model.init local): from normal random weights it would not learn.
    """
    return replace(
        mlm_imdb(),
        preset="mlm-imdb-small",
        model=_small_text_model(_masked_model()),
        optim=OptimConfig(lr=3e-3, schedule=Cosine(), warmup_steps=100, max_grad_norm=1.0),
        training=TrainingConfig(global_batch_size=16, max_steps=6_000),
        parallel=ParallelConfig(),
        run=RunConfig(log_every=50, val_every=500, val_batches=50, checkpoint_every=250),
    )


def txt_clf_imdb_decoder_small() -> Experiment:
    """Sentiment from the first 254 bytes of a review: a new decoder on the frozen encoder of mlm-imdb-small."""
    return replace(
        txt_clf_imdb_decoder(),
        preset="txt-clf-imdb-decoder-small",
        model=_small_text_model(_classifier_model(freeze=True)),
        optim=OptimConfig(lr=3e-3, schedule=Cosine(), warmup_steps=100, max_grad_norm=1.0),
        training=TrainingConfig(global_batch_size=16, max_epochs=2),
        parallel=ParallelConfig(),
        run=RunConfig(log_every=50, val_every=520, val_batches=100, checkpoint_every=260),
    )


def txt_clf_imdb_all_small() -> Experiment:
    """Sentiment with encoder and decoder of that size trained together."""
    base = txt_clf_imdb_decoder_small()
    return replace(
        base,
        preset="txt-clf-imdb-all-small",
        model=_small_text_model(_classifier_model(freeze=False)),
        optim=replace(base.optim, lr=1e-3),
        training=replace(base.training, max_epochs=1),
    )


def txt_clf() -> Experiment:
    """A classifier of your own texts: --data.source FILE.csv --data.label-column LABEL. Classes come from the data."""
    base = txt_clf_imdb_all_small()
    assert isinstance(base.model, PerceiverIOConfig)
    return replace(
        base,
        preset="txt-clf",
        task=TextClassificationConfig(class_names=()),
        model=replace(base.model, output=ClassOutput(num_classes=0, num_query_channels=64)),
        data=DataConfig(val_fraction=0.1, shuffle_window_blocks=128),
        training=replace(base.training, max_epochs=10),
        run=replace(base.run, val_every=250, checkpoint_every=250),
    )


def txt_tags() -> Experiment:
    """Any number of classes for each of your own texts: --data.source FILE.jsonl, whose label column holds lists."""
    base = txt_clf()
    return replace(base, preset="txt-tags", task=TextTagsConfig(class_names=()))


def clm_wikitext() -> Experiment:
    """Perceiver AR byte language model on WikiText-103."""
    return Experiment(
        preset="clm-wikitext",
        task=CausalLMConfig(random_shift=True),
        model=PerceiverARConfig(),
        data=DataConfig(source="wikitext-103-raw"),
        optim=OptimConfig(optimizer=Adam(), lr=2e-4, weight_decay=0.0, schedule=Cosine(), warmup_steps=200, max_grad_norm=0.5),
        training=TrainingConfig(global_batch_size=96, max_steps=20_000),
        parallel=ParallelConfig(workers=2, micro_batch_size=24),
    )


def clm_wikitext_small() -> Experiment:
    """A Perceiver AR byte model that one CPU can train: WikiText-2, 1,024 bytes, 4.3 million parameters."""
    base = clm_wikitext()
    return replace(
        base,
        preset="clm-wikitext-small",
        model=PerceiverARConfig(
            max_seq_len=1024,
            max_latents=512,
            num_channels=256,
            num_heads=4,
            num_self_attention_layers=4,
            cross_attention_dropout=0.1,
        ),
        data=DataConfig(source="wikitext-2-raw"),
        optim=replace(base.optim, optimizer=AdamW(), lr=2e-3, weight_decay=0.01, warmup_steps=100, max_grad_norm=1.0),
        training=TrainingConfig(global_batch_size=16, max_steps=2_000),
        parallel=ParallelConfig(),
        run=RunConfig(val_every=200, checkpoint_every=200),
    )


def clm_c4() -> Experiment:
    """Perceiver AR on C4 with SentencePiece pieces (455M parameters, 79 billion tokens, FSDP on 8 GPUs)."""
    return Experiment(
        preset="clm-c4",
        task=CausalLMConfig(min_seq_len=512),
        model=_c4_model(),
        data=DataConfig(source="c4", tokenizer="spiece.model"),
        optim=OptimConfig(lr=3e-4, schedule=Cosine(min_lr_fraction=0.1), warmup_steps=1000, max_grad_norm=1.0),
        training=TrainingConfig(global_batch_size=2048, max_steps=50_000, precision="bf16"),
        parallel=ParallelConfig(workers=8, activation_checkpointing=1),
        run=RunConfig(val_every=500, val_batches=20),
    )


def clm_c4_small() -> Experiment:
    """clm-c4 with fewer channels, layers and positions, for one CPU: 4.9 million parameters, windows of 128 to 256 pieces."""
    base = clm_c4()
    return replace(
        base,
        preset="clm-c4-small",
        task=CausalLMConfig(min_seq_len=128),
        model=replace(_c4_model(), max_seq_len=256, max_latents=128, num_channels=128, num_heads=4, num_self_attention_layers=3),
        optim=replace(base.optim, lr=2e-3, warmup_steps=50),
        training=TrainingConfig(global_batch_size=16, max_steps=1_000),
        parallel=ParallelConfig(workers=2),
        run=RunConfig(val_every=100, val_batches=20, checkpoint_every=100),
    )


def _text_model(decoder: DecoderConfig) -> PerceiverIOConfig:
    return PerceiverIOConfig(
        encoder=EncoderConfig(
            num_cross_attention_qk_channels=256,
            num_cross_attention_v_channels=1280,
            num_self_attention_qk_channels=256,
            num_self_attention_v_channels=1280,
            num_self_attention_layers_per_block=26,
            dropout=0.1,
        ),
        decoder=decoder,
    )


def _masked_model() -> PerceiverIOConfig:
    return _text_model(
        DecoderConfig(
            num_cross_attention_qk_channels=256,
            num_cross_attention_v_channels=768,
            cross_attention_residual=False,
            dropout=0.1,
        ),
    )


def _classifier_model(freeze: bool) -> PerceiverIOConfig:
    model = _text_model(DecoderConfig(num_cross_attention_heads=1, dropout=0.1))
    encoder = replace(model.encoder, freeze=freeze, dropout=0.0 if freeze else 0.1)
    return replace(model, encoder=encoder, output=ClassOutput(num_classes=2, num_query_channels=768))


def _sentiment_data() -> DataConfig:
    """IMDb's reviews are sorted by label: its 98 blocks are shuffled in one window, so that every batch is a fair sample."""
    return DataConfig(source="imdb", shuffle_window_blocks=128)


def _small_text_model(model: PerceiverIOConfig) -> PerceiverIOConfig:
    """A text model of the same kind on 256 bytes: 3 self-attention layers of 128 latents x 128 channels, a latent for two bytes.

    Fewer latents cost less a step and learn less a minute. The decoder adds its queries to its output (as the classifier's
    always does): a position must know which of its latent's bytes it is.
    """
    assert isinstance(model.input, TextInput)
    value_channels = None if model.decoder.num_cross_attention_v_channels is None else 64
    return replace(
        model,
        num_latents=128,
        num_latent_channels=128,
        input=replace(model.input, max_seq_len=256, num_channels=64),
        encoder=replace(
            model.encoder,
            num_cross_attention_v_channels=128,
            num_self_attention_qk_channels=64,
            num_self_attention_v_channels=128,
            num_self_attention_layers_per_block=3,
            num_cross_attention_heads=8,
            num_cross_attention_qk_channels=64,
            dropout=0.0,
        ),
        decoder=replace(
            model.decoder,
            num_cross_attention_heads=8,
            num_cross_attention_qk_channels=64,
            num_cross_attention_v_channels=value_channels,
            cross_attention_residual=True,
            dropout=0.0,
        ),
        output=replace(model.output, num_query_channels=64) if isinstance(model.output, ClassOutput) else model.output,
        init="local",
        init_scale=0.1,
    )


def _c4_model() -> PerceiverARConfig:
    return PerceiverARConfig(
        vocab_size=32_000,
        max_seq_len=1024,
        max_latents=512,
        num_channels=1280,
        num_heads=10,
        num_self_attention_layers=20,
        cross_attention_dropout=0.0,
        abs_pos_emb=False,
        output_norm=True,
        output_bias=False,
    )
