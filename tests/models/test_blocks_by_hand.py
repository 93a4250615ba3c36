"""Outputs, queries and the rarer inputs against a few independent lines."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver.models import ArrayOutput, EmbeddingOutput, StemInput, TableInput
from tests.models.test_any_input import HEADS, OUTPUTS, POINTS, B, adapted, fourier, model_of, normal


def waves(coordinates: Tensor, sizes: tuple[int, ...], bands: int) -> Tensor:
    """Fourier features (..., D) -> (..., D * (2 * bands + 1)): coordinates, all sines, all cosines."""
    parts = [fourier(coordinates[..., axis], size, bands) for axis, size in enumerate(sizes)]
    return torch.cat([coordinates, *(sine for sine, _ in parts), *(cosine for _, cosine in parts)], -1)


def answered(model: nn.Module, queries: Tensor, latents: Tensor) -> Tensor:
    """One cross-attention of one head, with its residual and MLP."""
    layer = model.decoder.cross_attention

    def normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias)

    inner, context, attention = normed(queries, layer.q_norm), normed(latents, layer.kv_norm), layer.attention
    q, k, v = attention.q_proj(inner), attention.k_proj(context), attention.v_proj(context)
    x = queries + attention.o_proj((q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1) @ v)
    return x + layer.mlp(x)


def drawn(model: nn.Module) -> nn.Module:
    """All parameters random, so that none is 0 or 1 by its initial value."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


def queries_of(name: str, model: nn.Module) -> Tensor:
    """What is asked by each kind of output, of the batch POINTS."""
    source, query = model.decoder.queries, POINTS[1]["query"]
    match name:
        case "learned":
            return source.expand(B, -1, -1)
        case "grid":
            return source.linear(waves(torch.linspace(-1, 1, 7)[:, None], (7,), 16)).expand(B, -1, -1)
        case "coordinates":
            return source.linear(waves(query, (32, 32), 16))
        case "features":
            return source.linear(query)
    return adapted(model, POINTS[1])


def test_answers_to_all_kinds_of_queries_are_one_attention_to_the_latents() -> None:
    for name, (output, _) in OUTPUTS.items():
        model = drawn(model_of(POINTS[0], output))
        decoded = answered(model, queries_of(name, model), model.encode(POINTS[1]))
        expected = decoded @ model.decoder.output.weight.T + model.decoder.output.bias
        torch.testing.assert_close(model(POINTS[1]), expected, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_an_embedding_is_one_answer_divided_by_its_length() -> None:
    model = drawn(model_of(POINTS[0], EmbeddingOutput(num_outputs=5, num_query_channels=8)))
    decoded = answered(model, model.decoder.queries.expand(B, -1, -1), model.encode(POINTS[1]))[:, 0]
    expected = decoded @ model.decoder.output.weight.T + model.decoder.output.bias
    torch.testing.assert_close(model(POINTS[1]), expected / expected.square().sum(-1, keepdim=True).sqrt(), atol=1e-5, rtol=1e-4)


def test_each_of_several_heads_answers_its_own_queries_filled_up_by_its_own_vector() -> None:
    model = drawn(model_of(POINTS[0], HEADS))
    latents, asking = model.encode(POINTS[1]), model.decoder.queries
    own = {
        "kind": asking.learned["kind"].expand(B, -1, -1),
        "each": adapted(model, POINTS[1]),
        "asked": asking.modules_of["asked"].linear(waves(POINTS[1]["query"], (32, 32), 16)),
    }
    widest = max(queries.shape[-1] for queries in own.values())
    found = model(POINTS[1])
    for name, queries in own.items():
        if queries.shape[-1] < widest:
            queries = torch.cat([queries, asking.own[name].expand(B, queries.shape[1], -1)], -1)
        head = model.decoder.output.outputs[name]
        expected = answered(model, queries, latents) @ head.weight.T + head.bias
        torch.testing.assert_close(found[name], expected[:, 0] if name == "kind" else expected, atol=1e-4, rtol=1e-4)


def test_a_convolution_stem_is_a_sum_over_shifted_images_and_the_maximum_of_nine() -> None:
    config, x = StemInput(image_shape=(9, 12, 3), stem="convolution", num_channels=6, num_frequency_bands=2), normal(B, 9, 12, 3)
    adapter = drawn(model_of(config)).encoder.input_adapter
    padded = F.pad(x, (0, 0, 3, 3, 3, 3))
    rows, columns = 5, 6  # every second pixel
    convolved = sum(
        padded[:, i : i + 2 * rows : 2, j : j + 2 * columns : 2][:, :rows, :columns] @ adapter.convolution.weight[:, :, i, j].T
        for i in range(7)
        for j in range(7)
    )
    centred = convolved - convolved.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + adapter.norm.eps).sqrt() * adapter.norm.weight + adapter.norm.bias
    positive = F.pad(normed.relu(), (0, 0, 1, 1, 1, 1))
    expected = torch.stack([positive[:, i : i + 3, j : j + 3].amax((1, 2)) for i in range(0, rows, 2) for j in range(0, columns, 2)], 1)
    torch.testing.assert_close(adapter.points(x), expected, atol=1e-4, rtol=1e-4)


def test_numbers_of_a_table_are_a_direction_of_their_column_and_a_vector_of_their_position() -> None:
    config = TableInput(columns=("a", "b", "c"), shapes=("scalar", "3", "2x2"), num_channels=4)
    model = drawn(model_of(config, ArrayOutput(num_outputs=1, num_query_channels=8)))
    adapter, x = model.encoder.input_adapter, normal(B, 1 + 3 + 4)
    a, b, c = (column.weight for column in adapter.columns)
    parts = [x[:, :1, None] * a[:, 0], x[:, 1:4, None] * b[:, 0], torch.stack([x[:, 4:6] @ c.T, x[:, 6:8] @ c.T], 1)]
    torch.testing.assert_close(adapted(model, x), torch.cat(parts, 1) + adapter.pos_embedding.weight, atol=1e-5, rtol=1e-5)
