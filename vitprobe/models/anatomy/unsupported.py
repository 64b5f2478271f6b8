"""Families of timm whose attention is no one map from all tokens to all tokens, and why."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

# Modules of timm all of whose models attend from all tokens to all tokens in every block, with one number of tokens.
ISOTROPIC = frozenset(
    {
        *("beit", "deepseek_vit", "deit", "eva", "gemma4_vit", "naflexvit", "qwen3_vit", "vision_transformer"),
        *("vision_transformer_hybrid", "vision_transformer_relpos", "vitamin"),
    }
)
_WINDOWS = "its tokens attend within windows, so no block has a map of the whole image"
_STAGES = "the number of tokens changes from stage to stage, so its blocks share no patch grid"
_MIXED = "at most its late stages attend, among convolutions, on grids that change from stage to stage"
_FEWER_KEYS = "its keys are a pooled, coarser grid than its queries, so a token has no weight of its own"
_LINEAR = "its attention is linear, without a softmax over pairs of tokens, so there are no weights between them"
_CHANNELS = "it attends from channel to channel, not from token to token"
_GATE = "its softmax weighs channels or branches of convolutions, not tokens"
_INSTEAD = "use an isotropic Vision Transformer (vitprobe models)"
_NONE = "it has no attention between tokens"

# Modules of timm all of whose models are convolutional.
CONVOLUTIONAL = frozenset(
    {
        *(
            "convmixer",
            "convnext",
            "cspnet",
            "cspnext",
            "densenet",
            "dla",
            "dpn",
            "efficientnet",
            "fasternet",
            "ghostnet",
        ),
        *("hardcorenas", "hgnet", "hrnet", "inception_next", "inception_resnet_v2", "inception_v3", "inception_v4"),
        *("lcnetv2", "mambaout", "nasnet", "nfnet", "pnasnet", "rdnet", "regnet", "repghost", "repvit", "res2net"),
        *("resnet", "resnetv2", "rexnet", "selecsls", "senet", "starnet", "tresnet", "vgg", "vovnet", "xception"),
        "xception_aligned",
    }
)
# Module of timm → what its models have instead.
REASONS = {
    "byoanet": "what attention it has (halo, bottleneck or lambda layers) stands in some stages among convolutions",
    "byobnet": f"{_NONE}; of CLIP's ResNets only the final pooling attends",
    "cait": "it mixes the heads of its attention weights after the softmax (talking heads), so that they are no "
    "probabilities, and its [cls] joins only in the last two blocks",
    "coat": _LINEAR,
    "convit": "it blends the softmax of its early blocks with a map of positions, and its [cls] joins in block 10",
    "cpubone": _MIXED,
    "crossvit": "it runs two branches with patches of two sizes, each with its own [cls] and grid",
    "csatv2": _MIXED,
    "davit": f"{_WINDOWS}, and every other attention is from channel to channel",
    "edgenext": _CHANNELS,
    "efficientformer": _MIXED,
    "efficientformer_v2": _MIXED,
    "efficientvim": "it mixes tokens with a state space instead of attending",
    "efficientvit_mit": _LINEAR,
    "efficientvit_msra": _STAGES,
    "fastvit": _MIXED,
    "focalnet": "it modulates with context instead of attending (focal modulation), without attention weights",
    "gcvit": _WINDOWS,
    "hiera": "tokens of its early stages attend within windows, lie in their order, and are pooled between stages",
    "hieradet_sam2": _WINDOWS,
    "iformer": _MIXED,
    "levit": _STAGES,
    "lowformer": _MIXED,
    "maxxvit": f"{_MIXED}; MaxViT's are within windows",
    "metaformer": _MIXED,
    "mlp_mixer": "it mixes tokens with a fixed linear map, the same for every image, instead of attending",
    "mobilenetv3": _MIXED,
    "mobilenetv5": _MIXED,
    "mobilevit": "its tokens are pixels of feature maps between convolutions, split into patches that attend apart",
    "mvitv2": _FEWER_KEYS,
    "nest": _WINDOWS,
    "nextvit": _FEWER_KEYS,
    "pit": _STAGES,
    "pvt_v2": _FEWER_KEYS,
    "resnest": _GATE,
    "sequencer": "it mixes tokens with LSTMs instead of attending",
    "shvit": _MIXED,
    "sknet": _GATE,
    "swiftformer": _LINEAR,
    "swin_transformer": _WINDOWS,
    "swin_transformer_v2": _WINDOWS,
    "swin_transformer_v2_cr": _WINDOWS,
    "tiny_vit": _WINDOWS,
    "tnt": "it attends twice in a block, among the pixels of each patch and among the patches",
    "twins": "its tokens attend within windows, or to a coarser grid of keys, so no block has a map of the whole image",
    "visformer": _STAGES,
    "vision_transformer_sam": _WINDOWS,
    "volo": "its early stages attend within neighbourhoods of tokens (outlook attention), and its [cls] joins last",
    "xcit": f"{_CHANNELS}; only its last two blocks attend from [cls] to patches",
}


def why_unsupported(module: nn.Module) -> str | None:
    """One line that says why a model of timm cannot be captured; None for its isotropic ones and all other modules."""
    homes = [kind.__module__.removeprefix("timm.models.") for kind in type(module).__mro__ if _is_timms(kind)]
    if not homes or ISOTROPIC.intersection(homes):
        return None
    config: Any = getattr(module, "pretrained_cfg", None) or {}
    name = config.get("architecture") or type(module).__name__
    family = homes[0]
    if timm.is_model(name):  # some families are built of another's class
        family = timm.model_entrypoint(name).__module__.rpartition(".")[2]
    return f"{name} ({type(module).__name__}) cannot be captured: {reason_of(family)}; {_INSTEAD}"


def reason_of(family: str) -> str:
    """Why the models of a module of timm that is not isotropic cannot be captured."""
    if family in CONVOLUTIONAL:
        return _NONE
    return REASONS.get(family, f"timm's family {family} is newer than this vitprobe, which does not know it")


def _is_timms(kind: type) -> bool:
    """Whether a class is one of timm's models, not of its helpers for them (`timm.models._…`)."""
    return kind.__module__.startswith("timm.models.") and not kind.__module__.startswith("timm.models._")
