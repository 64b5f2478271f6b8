"""The learned aggregators as their papers state them: every token normalised, projected and attended to, head by head.

Each function takes the parameters by name and the tokens `(B, T, D)` that it reads. Slow and plain: what the package
computes is held to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

Parameters = Mapping[str, Tensor]


def layer_norm(x: Tensor, gain: Tensor, shift: Tensor | None, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * gain
    return normed if shift is None else normed + shift


def linear(x: Tensor, p: Parameters, name: str) -> Tensor:
    y = x @ p[f"{name}.weight"].T
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def attend(query: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """`(B, D)` queries over `(B, T, D)` keys and values, one image and head at a time."""
    size = query.shape[1] // heads
    images = []
    for q, k, v in zip(query, keys, values, strict=True):
        parts = [slice(head * size, (head + 1) * size) for head in range(heads)]
        images.append(torch.cat([(k[:, s] @ q[s] / math.sqrt(size)).softmax(0) @ v[:, s] for s in parts]))
    return torch.stack(images)


def mlp(x: Tensor, p: Parameters) -> Tensor:
    hidden = linear(x, p, "mlp.0")
    return linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), p, "mlp.2")


def positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Sines and cosines of the column, then of the row of each patch, `(N, D)`."""
    table = torch.zeros(grid[0] * grid[1], dim, dtype=torch.float64)
    for patch in range(len(table)):
        for half, place in enumerate((patch % grid[1], patch // grid[1])):
            for i in range(dim // 4):
                angle = torch.tensor(place / 10000 ** (i / (dim // 4)), dtype=torch.float64)
                table[patch, half * dim // 2 + i] = angle.sin()
                table[patch, half * dim // 2 + dim // 4 + i] = angle.cos()
    return table


def abmilp(p: Parameters, x: Tensor, *, kind: str = "none", tanh: bool = False, table: Tensor | float = 0.0) -> Tensor:
    z = x
    if kind != "none":
        query, key, value = (x @ p["attention.query_key_value.weight"].T).chunk(3, dim=-1)
        gathered = [
            (k @ q.T / math.sqrt(x.shape[-1])).softmax(dim=0).T @ v for q, k, v in zip(query, key, value, strict=True)
        ]  # softmax over keys
        z = linear(torch.stack(gathered), p, "attention.out")
    layers = sorted(int(name.split(".")[1]) for name in p if name.startswith("score.") and name.endswith("weight"))
    scores = z + table
    for layer in layers:
        scores = linear(scores, p, f"score.{layer}")
        if layer != layers[-1]:
            scores = scores.tanh() if tanh else scores.clamp(min=0)
    return (scores.softmax(dim=1) * (z if kind == "both" else x)).sum(dim=1)


def ep(p: Parameters, x: Tensor) -> Tensor:
    values, queries = linear(x, p, "value"), p["queries"]
    size = values.shape[-1] // len(queries)
    groups = []
    for q, query in enumerate(queries):
        weights = (x @ query / math.sqrt(x.shape[-1])).softmax(dim=1)
        groups.append((weights[..., None] * values[..., q * size : (q + 1) * size]).sum(dim=1))
    return torch.cat(groups, dim=1)


def capi(p: Parameters, x: Tensor, heads: int) -> Tensor:
    query = p["query"].flatten().expand(len(x), -1)
    return attend(query, *linear(x, p, "attention.key_value").chunk(2, dim=-1), heads)


def aim(p: Parameters, x: Tensor, heads: int) -> Tensor:
    flat = x.flatten(0, 1)
    return separate(p, (x - flat.mean(0)) / (flat.var(0, correction=0) + 1e-6).sqrt(), heads)


def separate(p: Parameters, x: Tensor, heads: int) -> Tensor:
    """A learned query over keys and values with a matrix each."""
    query = p["query"].flatten().expand(len(x), -1)
    return attend(query, linear(x, p, "attention.key"), linear(x, p, "attention.value"), heads)


def projected(p: Parameters, query: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """Attention with all four projections, of which some are the rows of one matrix."""
    given = {"query": [query], "key": [keys], "value": [values]}
    given |= {"key_value": [keys, values], "query_key_value": [query, keys, values]}
    parts = [
        linear(tokens, p, f"attention.{name}").chunk(len(several), dim=-1)[place]
        for name, several in given.items()
        if f"attention.{name}.weight" in p
        for place, tokens in enumerate(several)
    ]
    return linear(attend(*parts, heads), p, "attention.out")


def cae(p: Parameters, x: Tensor, heads: int) -> Tensor:
    query, keys, values = (
        layer_norm(t, p[f"{name}_norm.weight"], p[f"{name}_norm.bias"])
        for t, name in ((p["query"].flatten().expand(len(x), -1), "query"), (x, "key"), (x, "value"))
    )
    return projected(p, query, keys, values, heads)


def simpool(p: Parameters, x: Tensor) -> Tensor:
    normed = layer_norm(x, p["norm.weight"], p["norm.bias"], 1e-6)
    return attend(linear(x.mean(1), p, "query"), linear(normed, p, "key"), normed, 1)


def clip(p: Parameters, x: Tensor, heads: int) -> Tensor:
    x = layer_norm(x, p["norm.weight"], p["norm.bias"], 1e-6)
    x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + p["position"]
    return projected(p, x[:, 0], x, x, heads)


def siglip(p: Parameters, x: Tensor, heads: int) -> Tensor:
    vector = projected(p, p["query"].flatten().expand(len(x), -1), x, x, heads)
    return vector + mlp(vector, p)


def vjepa(p: Parameters, x: Tensor, heads: int) -> Tensor:
    x = layer_norm(x, p["norm.weight"], p["norm.bias"])
    query = p["query"].flatten().expand(len(x), -1)
    vector = query + projected(p, query, x, x, heads)
    return vector + mlp(layer_norm(vector, p["mlp_norm.weight"], p["mlp_norm.bias"]), p)


def coca(p: Parameters, x: Tensor, heads: int, size: int) -> Tensor:
    query = linear(layer_norm(p["queries"], p["norm.weight"], None), p, "query")[0]
    keys, values = linear(x, p, "key_value").chunk(2, dim=-1)
    parts = []
    for head in range(heads):
        weights = (keys @ query[head * size : (head + 1) * size] / math.sqrt(size)).softmax(dim=1)
        parts.append((weights[..., None] * values).sum(1))
    return linear(torch.cat(parts, dim=1), p, "out")


def cait(p: Parameters, x: Tensor, heads: int) -> Tensor:
    own = p["query"].flatten().expand(len(x), 1, -1)
    both = layer_norm(torch.cat([own, x], dim=1), p["norm.weight"], p["norm.bias"], 1e-6)
    vector = own[:, 0] + p["scale"] * projected(p, both[:, 0], both, both, heads)
    normed = layer_norm(vector, p["mlp_norm.weight"], p["mlp_norm.bias"], 1e-6)
    vector = vector + p["mlp_scale"] * mlp(normed, p)
    return layer_norm(vector, p["end_norm.weight"], p["end_norm.bias"])


def vit_block(p: Parameters, x: Tensor, heads: int) -> Tensor:
    query, keys, values = linear(layer_norm(x, p["norm.weight"], p["norm.bias"]), p, "query_key_value").chunk(3, dim=-1)
    attended = torch.stack([attend(query[:, t], keys, values, heads) for t in range(x.shape[1])], dim=1)
    x = x + linear(attended, p, "out")
    return (x + mlp(layer_norm(x, p["mlp_norm.weight"], p["mlp_norm.bias"]), p)).mean(1)


def cbam(p: Parameters, x: Tensor, grid: tuple[int, int]) -> Tensor:
    def squeeze(t: Tensor) -> Tensor:
        return linear(linear(t, p, "channel.0").clamp(min=0), p, "channel.2")

    gated = x * torch.sigmoid(squeeze(x.mean(1)) + squeeze(x.max(1).values))[:, None]
    picture = torch.stack([gated.mean(-1), gated.max(-1).values], dim=1).reshape(len(x), 2, *grid)
    padded = torch.zeros(len(x), 2, grid[0] + 6, grid[1] + 6, dtype=x.dtype)
    padded[:, :, 3:-3, 3:-3] = picture
    rows = []
    for i in range(grid[0]):
        for j in range(grid[1]):
            rows.append((padded[:, :, i : i + 7, j : j + 7] * p["spatial.0.weight"]).sum(dim=(1, 2, 3)))
    scores = torch.stack(rows, dim=1)
    scores = (scores - scores.mean()) / (scores.var(correction=0) + 1e-5).sqrt()
    scores = scores * p["spatial.1.weight"] + p["spatial.1.bias"]
    return (gated * torch.sigmoid(scores)[..., None] + x).clamp(min=0).mean(1)


def dolg(p: Parameters, x: Tensor) -> Tensor:
    x = linear(x, p, "projection")
    flat = x.flatten(0, 1)
    x = (x - flat.mean(0)) / (flat.var(0, correction=0) + 1e-5).sqrt() * p["norm.weight"] + p["norm.bias"]
    weights = torch.log1p(torch.exp(linear(x.clamp(min=0), p, "score")))
    return (weights * x / x.square().sum(-1, keepdim=True).sqrt()).mean(1)
