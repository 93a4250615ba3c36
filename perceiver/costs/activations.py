"""What each layer of a model holds in memory between its forward and its backward pass, from the configuration alone.

A layer keeps for its backward pass what its products, norms and activation need: input, normed input, queries, keys, values,
attention's output, their sum, its norm, two hidden tensors of the MLP. Fused attention keeps no weights; where PyTorch has no fused
kernel on CPUs, weights are kept (`attend.attend`). Used by `memory.py`; all counts are bytes of one micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from perceiver.config import AdamW, OptimizerConfig
from perceiver.costs.flops import num_kept
from perceiver.models import PerceiverARConfig, PerceiverIOConfig
from perceiver.models.attend import LONG_ENOUGH_TO_SPLIT, MOST_PLAIN_WEIGHTS, is_plain
from perceiver.models.factored_attention import is_cheaper
from perceiver.models.shapes import AttentionChannels

FP32 = 4
"""Bytes."""


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """What of an example a task makes the model compute at once, at most."""

    seq_len: int | None = None
    """Input length in tokens; None: the model's greatest."""
    num_queries: int | None = None
    """Decoded positions of a text output; None: all of the input."""
    chunk_elements: int | None = None
    """Most logits that the loss has in memory at once; None: all of the batch."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a step is laid out on devices."""

    micro_batch_size: int
    """Examples at once on a device."""
    accumulated: int = 1
    """Micro-batches of a step."""
    shards: int = 1
    """Devices that share the parameters: workers / replicas."""
    alone: bool = False
    """One worker that keeps its model whole (`perceiver/training/whole.py`): nothing to gather or to reduce."""
    precision: str = "fp32"
    checkpoint_every: int = 0
    """Every n-th layer is recomputed; 0: none."""
    layers_per_unit: int = 1
    """Neighbouring layers that are gathered and reduced together."""
    reshard_after_forward: bool = True
    """Gathered parameters are freed after the forward pass, and gathered again."""
    cpu_offload: bool = False
    """Shards of parameters, gradients and the optimizer's state are in the host's memory."""
    averaged: bool = False
    """An average of the weights is kept beside them."""
    optimizer: OptimizerConfig = field(default_factory=AdamW)
    """It says what it keeps of each parameter."""
    cuda: bool = True
    """Whether attention is fused in all cases (GPUs), or in those that PyTorch has a CPU kernel for."""

    @property
    def element_size(self) -> int:
        """Bytes of a number in forward and backward pass."""
        return 2 if self.precision == "bf16" else FP32


@dataclass(frozen=True, kw_only=True)
class Call:
    """One run of a layer, in bytes. A layer whose weights serve several times has several calls."""

    unit: int
    held: float
    """Its input, which stays also where the layer is recomputed."""
    saved: float
    """What else it keeps for its backward pass."""
    extra: float
    """The most that its backward pass has in memory beyond that."""
    working: float = 0.0
    """What its forward pass has in memory beyond that."""
    trained: bool = True
    """Whether there is a backward pass."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What the end of the forward pass holds, in bytes."""

    held: float
    """Last hidden state, and what is normed of it."""
    peak: float
    """Logits and gradients of loss at most."""
    shared_gradient: int = 0
    """Numbers of a gradient of the output matrix that waits for the embedding's (tied)."""


def step_calls(config: PerceiverARConfig | PerceiverIOConfig, layout: Layout, sizes: StepSizes) -> tuple[list[Call], Loss]:
    """The layers in the order in which a forward pass runs them, and its end."""
    return _calls_ar(config, layout, sizes) if isinstance(config, PerceiverARConfig) else _calls_io(config, layout, sizes)


# ------------------------------------------------------------------------------------------------------------- one layer


def _mlp(channels: int, widening_factor: int) -> tuple[float, float]:
    """Numbers per position that an MLP with its sum and norm keeps, and has besides at most in its backward pass.

    Kept: sum, normed sum, both hidden tensors. Backward: gradients of the output and of a hidden tensor (of the other when the
    first hidden tensor is free).
    """
    return (2 + 2 * widening_factor) * channels, (1 + widening_factor) * channels


def _attention(
    layout: Layout, c: AttentionChannels, heads: int, lengths: tuple[int, int], dropout: float, causal: bool, widening: int,
    query_batch: int | None = None,
) -> tuple[float, float, float]:  # fmt: skip
    """Bytes that a layer keeps besides its inputs and norms of keys and values; has besides at most in backward, in forward.

    Args:
        lengths: queries and keys.
        query_batch: 1 where the batch shares its queries; None: the micro-batch.
    """
    batch, (num_queries, num_keys), e = layout.micro_batch_size, lengths, layout.element_size
    mlp, mlp_extra = _mlp(c.q_channels, widening)
    queries, keys, working = batch * num_queries, batch * num_keys, 0.0
    kept: float = e * (queries * (c.qk_channels + c.v_channels) + keys * (c.qk_channels + c.v_channels))  # and attention's output
    # Gradients of the layer's output, of attention's output and of queries, keys and values, when the MLP's tensors are gone.
    extra: float = e * (queries * (c.q_channels + c.v_channels + c.qk_channels) + keys * (c.qk_channels + c.v_channels))
    weights, at_once = (batch * heads * number for number in _weights(num_queries, num_keys, causal))
    if not layout.cuda and is_plain(dropout, c.qk_channels, c.v_channels, e < FP32 and at_once <= MOST_PLAIN_WEIGHTS):
        # Softmax; with dropout also what it leaves.
        kept += weights * (e + (e if dropout else 0))
        extra = e * (2 * at_once + queries * c.q_channels)  # gradients of softmax's output and input
        working = e * (at_once + keys * c.v_channels)  # scores; values side by side for the product
    else:
        kept += FP32 * queries * heads  # logarithms of the softmax's sums
        if not layout.cuda and causal:
            masked = _masked(num_queries, num_keys)
            kept += e * masked  # numbers that are added to scores, the same for all examples and heads
            working += masked  # booleans that they are made from
        if not layout.cuda and causal and num_queries == num_keys >= LONG_ENOUGH_TO_SPLIT:
            kept += e * queries * c.v_channels  # both halves' outputs and the whole
    kept += e * queries * mlp + e * (query_batch or batch) * num_queries * c.q_channels  # with the normed queries
    return kept, max(e * queries * mlp_extra, extra - e * queries * mlp), working


def _weights(num_queries: int, num_keys: int, causal: bool) -> tuple[int, int]:
    """Attention weights of a head that are kept, and of them those computed at once: `attend` splits long causal attention on CPUs."""
    if not causal or num_queries != num_keys or num_keys < LONG_ENOUGH_TO_SPLIT:
        return num_queries * num_keys, num_queries * num_keys
    half = num_keys // 2
    second = (num_queries - half) * num_keys
    return _weights(half, half, True)[0] + second, second


def _masked(num_queries: int, num_keys: int) -> int:
    """Numbers in the masks of causal attention on a CPU: shorter queries have one, and so has the second half of what is split."""
    if num_queries != num_keys:
        return num_queries * num_keys if num_queries > 1 else 0
    if num_keys < LONG_ENOUGH_TO_SPLIT:
        return 0
    half = num_keys // 2
    return _masked(half, half) + _masked(num_queries - half, num_keys)


def _factored(layout: Layout, config: PerceiverIOConfig, num_inputs: int, shared: bool) -> tuple[float, float, float]:
    """The same for attention to an image without keys and values (`factored_attention`), in fp32."""
    heads, channels, batch = config.encoder.num_cross_attention_heads, config.num_latent_channels, layout.micro_batch_size
    mlp, mlp_extra = _mlp(channels, config.encoder.cross_attention_widening_factor)
    latents = batch * config.num_latents
    weights = latents * heads * num_inputs
    c = config.encoder_cross_attention()
    # Softmax; with dropout what it leaves (GPUs: its decisions). The weights times the norm's scale are not kept, as pixels need no
    # gradient. Means in input channels twice, and per value channel.
    left = 0 if not config.encoder.dropout else 1 if layout.cuda else FP32
    kept: float = weights * (FP32 + left) + FP32 * latents * (2 * heads * c.kv_channels + c.v_channels)
    kept += FP32 * (1 if shared else latents) * heads * c.kv_channels * 2
    if layout.element_size < FP32:
        kept += FP32 * num_inputs * c.kv_channels  # the table of positions
    kept += layout.element_size * latents * mlp
    extra = max(layout.element_size * latents * mlp_extra, 4 * FP32 * weights - layout.element_size * latents * mlp)
    return kept, extra, 2 * FP32 * num_inputs * c.kv_channels


# ---------------------------------------------------------------------------------------------------------- whole models


def _calls_ar(config: PerceiverARConfig, layout: Layout, sizes: StepSizes) -> tuple[list[Call], Loss]:
    e, batch, width = layout.element_size, layout.micro_batch_size, config.num_channels
    seq_len = sizes.seq_len or config.max_seq_len
    latents = min(config.max_latents, seq_len)
    prefix = num_kept(seq_len - latents, config.cross_attention_dropout)
    c = AttentionChannels(q_channels=width, kv_channels=width, qk_channels=width, v_channels=width)
    dropout, position = config.post_attention_dropout, e * batch * width
    # Masks of residual dropout: a byte on GPUs, a number on CPUs, for both outputs of a layer.
    masks = 2 * batch * latents * width * (1 if layout.cuda else e) if config.residual_dropout else 0
    kept, extra, working = _attention(
        layout, c, config.num_heads, (latents, prefix + latents), dropout, True, config.cross_attention_widening_factor
    )
    joined = position * (prefix + latents) if prefix else 0.0  # normed prefix and latents side by side
    calls = [Call(unit=0, held=position * (prefix + latents), saved=kept + joined + masks, extra=extra, working=working)]
    kept, extra, working = _attention(layout, c, config.num_heads, (latents, latents), dropout, True, config.self_attention_widening_factor)
    layer = Call(unit=1, held=position * latents, saved=kept + masks, extra=extra, working=working)
    calls += [replace(layer, unit=1 + number) for number in range(config.num_self_attention_layers)]

    hidden, matrix = position * latents, config.vocab_size * width
    logits = batch * latents * config.vocab_size
    chunk = min(logits, sizes.chunk_elements or logits)
    computing = chunk * (FP32 + (e if e < FP32 else 0)) + e * matrix
    scaling = hidden + FP32 * matrix + (e * matrix if e < FP32 else 0)  # the saved gradients times that of the loss
    # Gradients of hidden states and (fp32) of the matrix are made with the loss.
    peak = hidden + FP32 * matrix + max(computing, scaling)
    return calls, Loss(held=hidden * (2 if config.output_norm else 1), peak=peak, shared_gradient=matrix)


def _calls_io(config: PerceiverIOConfig, layout: Layout, sizes: StepSizes) -> tuple[list[Call], Loss]:
    decoder, e, batch, queries = config.decoder, layout.element_size, layout.micro_batch_size, config.output_queries()
    num_inputs = _num_inputs(config, sizes)
    num_queries = queries.num_learned or num_inputs
    if queries.per_position:
        num_queries = sizes.num_queries or num_inputs
    # Chosen positions are looked up for each example; all learned queries are the same for the whole batch.
    chosen = queries.per_position and sizes.num_queries is not None
    kept, extra, working = _attention(
        layout, config.decoder_cross_attention(), decoder.num_cross_attention_heads, (num_queries, config.num_latents),
        decoder.dropout, False, decoder.cross_attention_widening_factor,
        query_batch=batch if chosen or not queries.num_learned else 1,
    )  # fmt: skip
    asked = e * batch * num_queries * queries.num_channels
    latents = e * batch * config.num_latents * config.num_latent_channels
    calls = _calls_encoder(config, layout, num_inputs)
    last = _num_encoder_layers(config)
    # The latents, and what is normed of them.
    calls.append(Call(unit=last, held=latents + (asked if chosen else 0.0), saved=kept + latents, extra=extra, working=working))
    logits = batch * num_queries * queries.num_outputs
    # Logits, their logarithms of softmax, and gradients of both, in fp32; once more in the type of computation.
    peak = logits * (3 * FP32 + (e if e < FP32 else 0))
    tied = queries.num_outputs * queries.num_channels if queries.tied else 0
    return calls, Loss(held=asked, peak=peak, shared_gradient=tied)


def _calls_encoder(config: PerceiverIOConfig, layout: Layout, num_inputs: int) -> list[Call]:
    encoder, e, batch, trained = config.encoder, layout.element_size, layout.micro_batch_size, not config.encoder.freeze
    cross, heads = config.encoder_cross_attention(), encoder.num_cross_attention_heads
    depth = encoder.num_self_attention_layers_per_block
    latents, adapted = (e * batch * n for n in (config.num_latents * config.num_latent_channels, num_inputs * cross.kv_channels))
    own = e * batch * config.input.adapting_numbers(num_inputs)
    factored = config.input.factorable and is_cheaper(config.num_latents * heads, cross, e)
    kept, extra, working = _attention(
        layout, config.encoder_self_attention(), encoder.num_self_attention_heads, (config.num_latents,) * 2,
        encoder.dropout, False, encoder.self_attention_widening_factor,
    )  # fmt: skip
    layer = Call(unit=1, held=latents, saved=kept, extra=extra, working=working, trained=trained)
    calls = []
    for block in range(encoder.num_self_attention_blocks):
        if block < encoder.num_cross_attention_layers:
            if factored:
                kept, extra, working = _factored(layout, config, num_inputs, shared=block == 0)
            else:
                # The first layer's queries are the learned latents, the same for the whole batch.
                kept, extra, working = _attention(
                    layout, cross, heads, (config.num_latents, num_inputs), encoder.dropout, False,
                    encoder.cross_attention_widening_factor, query_batch=1 if block == 0 else None,
                )  # fmt: skip
                kept += adapted  # normed
            # The adapted input is there once for all layers.
            held = latents if block else own + (0.0 if factored else adapted)
            unit = 1 + depth if block and _second_cross(config) else 0
            calls.append(Call(unit=unit, held=held, saved=kept, extra=extra, working=working, trained=trained))
        first = 1 + depth + _second_cross(config) if block and not encoder.first_self_attention_block_shared else 1
        calls += [replace(layer, unit=first + number) for number in range(depth)]
    return calls


def _second_cross(config: PerceiverIOConfig) -> bool:
    """Whether later cross-attention layers have weights of their own (see `PerceiverEncoder`)."""
    return config.encoder.num_cross_attention_layers > 1 and not config.encoder.first_cross_attention_layer_shared


def _num_encoder_layers(config: PerceiverIOConfig) -> int:
    """Layers with weights of their own, which come before the decoder's in `PerceiverIO.layers`."""
    encoder = config.encoder
    blocks = 2 if encoder.num_self_attention_blocks > 1 and not encoder.first_self_attention_block_shared else 1
    return 1 + _second_cross(config) + blocks * encoder.num_self_attention_layers_per_block


def _num_inputs(config: PerceiverIOConfig, sizes: StepSizes) -> int:
    return sizes.seq_len or config.input.num_positions()
