"""The tensors of the published poolings, in their own names and shapes, with how they are first drawn.

Typed from the released code: efficient-probing (`poolings/`, commit 3a87bff) for all but CAPI's
(`AttnPoolClassifier` of `eval_classification.py`, commit 1b8c704) and AbMILP's (beyond_cls's `abmilp.py`, commit
22ed799). Nothing of the package is used. The third entry of each row is the package's name for the same numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Initial:
    """How a tensor is first drawn: its mean, its deviation, and what no number of it exceeds."""

    mean: float
    std: float
    bound: float


def constant(value: float) -> Initial:
    return Initial(value, 0.0, abs(value))


def uniform(inputs: int) -> Initial:
    """What torch draws the weights and biases of a layer of so many inputs from."""
    bound = inputs**-0.5
    return Initial(0.0, bound / math.sqrt(3), bound)


def normal(std: float) -> Initial:
    return Initial(0.0, std, math.inf)


def cut(std: float) -> Initial:
    """A normal distribution of this deviation, cut at twice that: timm's `trunc_normal_tf_`."""
    density = math.exp(-2) / math.sqrt(2 * math.pi)
    return Initial(0.0, std * math.sqrt(1 - 4 * density / math.erf(math.sqrt(2))), 2 * std)


ONE, ZERO = constant(1.0), constant(0.0)
Row = tuple[str, tuple[int, ...], str, Initial]


def linear(name: str, shape: tuple[int, ...], ours: str, *, bias: bool = True) -> list[Row]:
    """A linear layer, or a convolution, as torch draws it."""
    drawn = uniform(math.prod(shape[1:]))
    rows = [(f"{name}.weight", shape, f"{ours}.weight", drawn)]
    return [*rows, (f"{name}.bias", shape[:1], f"{ours}.bias", drawn)] if bias else rows


def norm(name: str, dim: int, ours: str) -> list[Row]:
    return [(f"{name}.weight", (dim,), f"{ours}.weight", ONE), (f"{name}.bias", (dim,), f"{ours}.bias", ZERO)]


def mlp(name: str, dim: int) -> list[Row]:
    return linear(f"{name}.fc1", (4 * dim, dim), "mlp.0") + linear(f"{name}.fc2", (dim, 4 * dim), "mlp.2")


def drawn(rows: list[Row], weights: Initial) -> list[Row]:
    """The same tensors with other weights, and biases of 0."""
    return [(name, shape, ours, weights if name.endswith("weight") else ZERO) for name, shape, ours, _ in rows]


def abmilp(dim: int, depth: int = 1, attends: bool = False) -> list[Row]:
    layers = [(dim, dim)] * (depth - 1) + [(1, dim)]
    rows = linear("self_attn.qkv", (3 * dim, dim), "attention.query_key_value", bias=False)
    rows += linear("self_attn.proj", (dim, dim), "attention.out")
    rows = rows if attends else []
    for place, shape in enumerate(layers):
        rows += linear(f"attention_predictor.{2 * place}", shape, f"score.{2 * place}")
    return rows


def ep(dim: int, queries: int = 32, d_out: int = 1) -> list[Row]:
    token = ("cls_token", (1, queries, dim), "queries", normal(0.02))
    return [token, *linear("v", (dim // d_out, dim), "value", bias=False)]


def simpool(dim: int) -> list[Row]:
    wq, wk = (linear(f"w{name[0]}", (dim, dim), name, bias=False) for name in ("query", "key"))
    return [*norm("norm_patches", dim, "norm"), *wq, *wk]


def aim(dim: int) -> list[Row]:
    key, value = (linear(name[0], (dim, dim), f"attention.{name}", bias=False) for name in ("key", "value"))
    return [("cls_token", (1, 1, dim), "query", normal(0.02)), *key, *value]


def capi(dim: int) -> list[Row]:
    query = ("query_token", (dim,), "query", normal(0.02))
    return [query, *drawn(linear("kv", (2 * dim, dim), "attention.key_value"), normal(0.02))]


def cae(dim: int) -> list[Row]:
    rows = [("query_token", (1, 1, dim), "query", ZERO)]
    for name in ("query", "key", "value"):
        rows += norm(f"norm1_{name[0]}", dim, f"{name}_norm")
        rows += linear(f"cross_attn.{name[0]}", (dim, dim), f"attention.{name}", bias=False)
    return [*rows, *norm("norm2_cross", dim, "unread_norm"), *linear("cross_attn.proj", (dim, dim), "attention.out")]


def clip(dim: int, patches: int) -> list[Row]:
    narrow = normal(dim**-0.5)
    rows = drawn(linear("qkv", (3 * dim, dim), "attention.query_key_value"), narrow)
    rows += [("pos_embed", (patches + 1, dim), "position", narrow)]
    return [*rows, *linear("proj", (dim, dim), "attention.out"), *norm("norm", dim, "norm")]


def siglip(dim: int) -> list[Row]:
    rows = [("latent", (1, 1, dim), "query", cut(dim**-0.5)), *linear("q", (dim, dim), "attention.query")]
    rows += linear("kv", (2 * dim, dim), "attention.key_value") + linear("proj", (dim, dim), "attention.out")
    return rows + mlp("mlp", dim)


def vjepa(dim: int) -> list[Row]:
    block, wide = "cross_attention_block", normal(0.02)
    layers = linear(f"{block}.xattn.q", (dim, dim), "attention.query")
    layers += linear(f"{block}.xattn.kv", (2 * dim, dim), "attention.key_value")
    layers += linear(f"{block}.xattn.proj", (dim, dim), "attention.out") + mlp(f"{block}.mlp", dim)
    rows = [("query_tokens", (1, 1, dim), "query", wide)]
    for row in drawn(layers, wide):
        narrower = row[0].endswith(("proj.weight", "fc2.weight"))
        rows.append((*row[:3], normal(0.02 / math.sqrt(2))) if narrower else row)
    return rows + norm(f"{block}.norm1", dim, "norm") + norm(f"{block}.norm2", dim, "mlp_norm")


def coca(dim: int, queries: int = 196) -> list[Row]:
    rows = [("img_queries", (queries, dim), "queries", normal(1.0)), ("norm.gamma", (dim,), "norm.weight", ONE)]
    rows += linear("to_q", (512, dim), "query", bias=False) + linear("to_kv", (128, dim), "key_value", bias=False)
    return rows + linear("to_out", (dim, 512), "out", bias=False)


def cait(dim: int) -> list[Row]:
    block = "blocks_token_only.0"
    rows = [("cls_token", (1, 1, dim), "query", normal(0.02))]
    rows += [(f"{block}.gamma_1", (dim,), "scale", constant(1e-5))]
    rows += [(f"{block}.gamma_2", (dim,), "mlp_scale", constant(1e-5))]
    for name in ("query", "key", "value"):
        rows += linear(f"{block}.attn.{name[0]}", (dim, dim), f"attention.{name}")
    rows += linear(f"{block}.attn.proj", (dim, dim), "attention.out") + mlp(f"{block}.mlp", dim)
    return (
        rows
        + norm(f"{block}.norm1", dim, "norm")
        + norm(f"{block}.norm2", dim, "mlp_norm")
        + norm("norm", dim, "end_norm")
    )


def vit_block(dim: int) -> list[Row]:
    rows = norm("norm1", dim, "norm") + linear("attn.qkv", (3 * dim, dim), "query_key_value", bias=False)
    rows += linear("attn.proj", (dim, dim), "out") + norm("norm2", dim, "mlp_norm") + mlp("mlp", dim)
    return [(f"dino_block.{name}", *rest) for name, *rest in rows]


def cbam(dim: int) -> list[Row]:
    hidden = max(1, int(dim / 16 + 0.5))
    rows = linear("channel.fc1", (hidden, dim, 1, 1), "channel.0", bias=False)
    rows += linear("channel.fc2", (dim, hidden, 1, 1), "channel.2", bias=False)
    rows += linear("spatial.conv.conv", (1, 2, 7, 7), "spatial.0", bias=False)
    return rows + norm("spatial.conv.bn", 1, "spatial.1")


def dolg(dim: int) -> list[Row]:
    rows = []
    for name, ours, outputs in (("conv1", "projection", dim), ("conv2", "score", 1)):
        weight, bias = linear(name, (outputs, dim, 1, 1), ours)
        rows += [(*weight[:3], normal(math.sqrt(2 / outputs))), bias]
    return rows + norm("bn", dim, "norm")


def classifier(width: int, classes: int, std: float = 0.01) -> list[Row]:
    """The linear classifier: MAE's deviation, which CAPI doubles."""
    return drawn(linear("classifier", (classes, width), "head"), normal(std))
