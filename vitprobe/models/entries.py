"""The table of models known by name; plain data, so that listing them needs neither torch nor timm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Mean and standard deviation of each channel, pixels in 0..1.
NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "satellite": ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}


@dataclass(frozen=True)
class ModelSpec:
    """What is known of a model before it is loaded.

    Attributes:
        name: what the user types, `<method>_vit_<size>` and a suffix where needed.
        method: how it was trained.
        paradigm: a key of `paradigms.PARADIGMS`.
        architecture: timm's name without tag, with words on what differs from it, or a bundled architecture.
        source: where the weights come from: "timm:<architecture>.<tag>", "bundled:<name>", "official:<name>",
            "hf-hub:<repository>", "file:<name>", "module", "random", or "seed:<n>" for random weights that are always
            the same.
        normalisation: a key of `NORMALISATIONS`, "none", or "other".
        licence: of the weights ("" where not known).
        citation: the paper ("" where not known).
        notes: what else to know.
    """

    name: str
    method: str
    paradigm: str
    architecture: str
    source: str
    normalisation: str
    licence: str
    citation: str
    notes: str = ""


# Arguments of timm's VisionTransformer for architectures that are ours, not timm's.
_NANO = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 12, "num_heads": 4}
BUNDLED_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vit_nano_patch4_32": _NANO,
    "vit_nano_gap_patch4_32": _NANO | {"class_token": False, "global_pool": "avg", "fc_norm": False},
}
# Classes of the head that a bundled model keeps.
BUNDLED_CLASSES = {
    "mae_vit_nano": 0,
    "mae_xavier_vit_nano": 0,
    "mae_ft_vit_nano": 10,
    "mocov3_vit_nano": 0,
    "supervised_vit_nano": 10,
    "random_vit_nano": 0,
}

# Weights that timm takes from a plain address; all others lie in a repository of the Hugging Face hub.
ADDRESSES = {
    "timm:vit_huge_patch14_gap_224.in1k_ijepa": "https://dl.fbaipublicfiles.com/ijepa/IN1K-vit.h.14-300e.pth.tar",
    "timm:vit_huge_patch14_gap_224.in22k_ijepa": "https://dl.fbaipublicfiles.com/ijepa/IN22K-vit.h.14-900e.pth.tar",
    "timm:vit_huge_patch16_gap_448.in1k_ijepa": (
        "https://dl.fbaipublicfiles.com/ijepa/IN1K-vit.h.16-448px-300e.pth.tar"
    ),
    "timm:vit_giant_patch16_gap_224.in22k_ijepa": "https://dl.fbaipublicfiles.com/ijepa/IN22K-vit.g.16-600e.pth.tar",
}

VIT = "Dosovitskiy et al., An Image is Worth 16x16 Words, arXiv 2010.11929"
MAE = "He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377"
MOCOV3 = "Chen et al., An Empirical Study of Training Self-Supervised Vision Transformers, arXiv 2104.02057"
DINO = "Caron et al., Emerging Properties in Self-Supervised Vision Transformers, arXiv 2104.14294"
DINOV2 = "Oquab et al., DINOv2: Learning Robust Visual Features without Supervision, arXiv 2304.07193"
REGISTERS = "Darcet et al., Vision Transformers Need Registers, arXiv 2309.16588"
DINOV3 = "Siméoni et al., DINOv3, arXiv 2508.10104"
IJEPA = (
    "Assran et al., Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture, "
    "arXiv 2301.08243"
)
EVA02 = "Fang et al., EVA-02: A Visual Representation for Neon Genesis, arXiv 2303.11331"
CLIP = "Radford et al., Learning Transferable Visual Models From Natural Language Supervision, arXiv 2103.00020"
SIGLIP2 = "Tschannen et al., SigLIP 2: Multilingual Vision-Language Encoders, arXiv 2502.14786"
AIMV2 = "Fini et al., Multimodal Autoregressive Pre-training of Large Vision Encoders, arXiv 2411.14402"
DEIT = "Touvron et al., Training data-efficient image transformers & distillation through attention, arXiv 2012.12877"
DEIT3 = "Touvron et al., DeiT III: Revenge of the ViT, arXiv 2204.07118"
AUGREG = "Steiner et al., How to train your ViT? Data, Augmentation, and Regularization, arXiv 2106.10270"


@dataclass(frozen=True)
class _Family:
    """What the models of one method share."""

    method: str
    paradigm: str
    normalisation: str
    licence: str
    citation: str
    models: dict[str, str]  # name: timm's architecture and tag
    notes: str = ""


_FAMILIES = (
    _Family(
        "MAE",
        "MIM",
        "imagenet",
        "cc-by-nc-4.0",
        MAE,
        {
            "mae_vit_b": "vit_base_patch16_224.mae",
            "mae_vit_l": "vit_large_patch16_224.mae",
            "mae_vit_h": "vit_huge_patch14_224.mae",
        },
    ),
    _Family(
        "DINO",
        "JEA",
        "imagenet",
        "apache-2.0",
        DINO,
        {
            "dino_vit_s": "vit_small_patch16_224.dino",
            "dino_vit_s8": "vit_small_patch8_224.dino",
            "dino_vit_b": "vit_base_patch16_224.dino",
            "dino_vit_b8": "vit_base_patch8_224.dino",
        },
    ),
    _Family(
        "DINOv2",
        "hybrid",
        "imagenet",
        "apache-2.0",
        DINOV2,
        {
            "dinov2_vit_s": "vit_small_patch14_dinov2.lvd142m",
            "dinov2_vit_b": "vit_base_patch14_dinov2.lvd142m",
            "dinov2_vit_l": "vit_large_patch14_dinov2.lvd142m",
            "dinov2_vit_g": "vit_giant_patch14_dinov2.lvd142m",
        },
    ),
    _Family(
        "DINOv2",
        "hybrid",
        "imagenet",
        "apache-2.0",
        f"{DINOV2}; {REGISTERS}",
        {
            "dinov2_vit_s_reg": "vit_small_patch14_reg4_dinov2.lvd142m",
            "dinov2_vit_b_reg": "vit_base_patch14_reg4_dinov2.lvd142m",
            "dinov2_vit_l_reg": "vit_large_patch14_reg4_dinov2.lvd142m",
            "dinov2_vit_g_reg": "vit_giant_patch14_reg4_dinov2.lvd142m",
        },
        notes="4 registers",
    ),
    _Family(
        "DINOv3",
        "hybrid",
        "imagenet",
        "dinov3-license",
        DINOV3,
        {
            "dinov3_vit_s": "vit_small_patch16_dinov3.lvd1689m",
            "dinov3_vit_s_plus": "vit_small_plus_patch16_dinov3.lvd1689m",
            "dinov3_vit_b": "vit_base_patch16_dinov3.lvd1689m",
            "dinov3_vit_l": "vit_large_patch16_dinov3.lvd1689m",
            "dinov3_vit_h_plus": "vit_huge_plus_patch16_dinov3.lvd1689m",
            "dinov3_vit_7b": "vit_7b_patch16_dinov3.lvd1689m",
        },
        notes="4 registers",
    ),
    _Family(
        "DINOv3",
        "hybrid",
        "satellite",
        "dinov3-license",
        DINOV3,
        {
            "dinov3_vit_l_sat": "vit_large_patch16_dinov3.sat493m",
            "dinov3_vit_7b_sat": "vit_7b_patch16_dinov3.sat493m",
        },
        notes="4 registers; trained on satellite images",
    ),
    _Family(
        "I-JEPA",
        "JEA",
        "imagenet",
        "cc-by-nc-4.0",
        IJEPA,
        {
            "ijepa_vit_h": "vit_huge_patch14_gap_224.in1k_ijepa",
            "ijepa_vit_h_in22k": "vit_huge_patch14_gap_224.in22k_ijepa",
            "ijepa_vit_h_448": "vit_huge_patch16_gap_448.in1k_ijepa",
            "ijepa_vit_g": "vit_giant_patch16_gap_224.in22k_ijepa",
        },
        notes="no [cls]; timm loads the context encoder",
    ),
    _Family(
        "EVA-02",
        "MIM",
        "clip",
        "mit",
        EVA02,
        {
            "eva02_vit_t": "eva02_tiny_patch14_224.mim_in22k",
            "eva02_vit_s": "eva02_small_patch14_224.mim_in22k",
            "eva02_vit_b": "eva02_base_patch14_224.mim_in22k",
            "eva02_vit_l": "eva02_large_patch14_224.mim_in22k",
            "eva02_vit_l_m38m": "eva02_large_patch14_224.mim_m38m",
        },
        notes="predicts the features of a CLIP teacher",
    ),
    _Family(
        "CLIP",
        "VLM",
        "clip",
        "apache-2.0",
        CLIP,
        {
            "clip_vit_b32": "vit_base_patch32_clip_quickgelu_224.openai",
            "clip_vit_b": "vit_base_patch16_clip_quickgelu_224.openai",
            "clip_vit_l": "vit_large_patch14_clip_quickgelu_224.openai",
            "clip_vit_l_336": "vit_large_patch14_clip_quickgelu_336.openai",
        },
        notes="OpenAI's weights with the activation they were trained with (QuickGELU)",
    ),
    _Family(
        "SigLIP 2",
        "VLM",
        "inception",
        "apache-2.0",
        SIGLIP2,
        {
            "siglip2_vit_b": "vit_base_patch16_siglip_224.v2_webli",
            "siglip2_vit_b32": "vit_base_patch32_siglip_256.v2_webli",
            "siglip2_vit_l": "vit_large_patch16_siglip_256.v2_webli",
            "siglip2_vit_so400m": "vit_so400m_patch14_siglip_224.v2_webli",
        },
        notes="no [cls]; attention pooling",
    ),
    _Family(
        "AIMv2",
        "VLM",
        "clip",
        "apple-ascl",
        AIMV2,
        {
            "aimv2_vit_l": "aimv2_large_patch14_224.apple_pt",
            "aimv2_vit_h": "aimv2_huge_patch14_224.apple_pt",
            "aimv2_vit_1b": "aimv2_1b_patch14_224.apple_pt",
            "aimv2_vit_3b": "aimv2_3b_patch14_224.apple_pt",
        },
        notes="no [cls]; generates patches and text one after the other",
    ),
    _Family(
        "DeiT",
        "supervised",
        "imagenet",
        "apache-2.0",
        DEIT,
        {
            "deit_vit_t": "deit_tiny_patch16_224.fb_in1k",
            "deit_vit_s": "deit_small_patch16_224.fb_in1k",
            "deit_vit_b": "deit_base_patch16_224.fb_in1k",
        },
    ),
    _Family(
        "DeiT",
        "supervised",
        "imagenet",
        "apache-2.0",
        DEIT,
        {
            "deit_vit_t_distilled": "deit_tiny_distilled_patch16_224.fb_in1k",
            "deit_vit_s_distilled": "deit_small_distilled_patch16_224.fb_in1k",
            "deit_vit_b_distilled": "deit_base_distilled_patch16_224.fb_in1k",
        },
        notes="a distillation token follows [cls]",
    ),
    _Family(
        "DeiT III",
        "supervised",
        "imagenet",
        "apache-2.0",
        DEIT3,
        {
            "deit3_vit_s": "deit3_small_patch16_224.fb_in1k",
            "deit3_vit_m": "deit3_medium_patch16_224.fb_in1k",
            "deit3_vit_b": "deit3_base_patch16_224.fb_in1k",
            "deit3_vit_l": "deit3_large_patch16_224.fb_in1k",
            "deit3_vit_h": "deit3_huge_patch14_224.fb_in1k",
        },
    ),
    _Family(
        "AugReg",
        "supervised",
        "inception",
        "apache-2.0",
        AUGREG,
        {
            "augreg_vit_t": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
            "augreg_vit_s": "vit_small_patch16_224.augreg_in21k_ft_in1k",
            "augreg_vit_b": "vit_base_patch16_224.augreg_in21k_ft_in1k",
            "augreg_vit_l": "vit_large_patch16_224.augreg_in21k_ft_in1k",
        },
        notes="ImageNet-21k, then fine-tuned on ImageNet-1k",
    ),
)

_BUNDLED = (
    ModelSpec(
        name="mae_vit_nano",
        method="MAE",
        paradigm="MIM",
        architecture="vit_nano_patch4_32",
        source="bundled:mae_vit_nano",
        normalisation="cifar10",
        licence="apache-2.0",
        citation=MAE,
        notes="trained here on CIFAR-10; 32 pixels",
    ),
    ModelSpec(
        name="mae_xavier_vit_nano",
        method="MAE",
        paradigm="MIM",
        architecture="vit_nano_patch4_32",
        source="bundled:mae_xavier_vit_nano",
        normalisation="cifar10",
        licence="apache-2.0",
        citation=MAE,
        notes="trained here on CIFAR-10, begun as MAE's own code begins, and shorter; 32 pixels",
    ),
    ModelSpec(
        name="mae_ft_vit_nano",
        method="MAE fine-tuned",
        paradigm="supervised",
        architecture="vit_nano_patch4_32",
        source="bundled:mae_ft_vit_nano",
        normalisation="cifar10",
        licence="apache-2.0",
        citation=MAE,
        notes="mae_vit_nano fine-tuned here on CIFAR-10, 10 classes in alphabetical order; 32 pixels",
    ),
    ModelSpec(
        name="mocov3_vit_nano",
        method="MoCo v3",
        paradigm="JEA",
        architecture="vit_nano_patch4_32",
        source="bundled:mocov3_vit_nano",
        normalisation="cifar10",
        licence="apache-2.0",
        citation=MOCOV3,
        notes="trained here on CIFAR-10; 32 pixels",
    ),
    ModelSpec(
        name="supervised_vit_nano",
        method="supervised",
        paradigm="supervised",
        architecture="vit_nano_patch4_32",
        source="bundled:supervised_vit_nano",
        normalisation="cifar10",
        licence="apache-2.0",
        citation=VIT,
        notes="trained here on CIFAR-10, 10 classes in alphabetical order; 32 pixels",
    ),
    ModelSpec(
        name="random_vit_nano",
        method="random",
        paradigm="random",
        architecture="vit_nano_patch4_32",
        source="seed:0",
        normalisation="cifar10",
        licence="apache-2.0",
        citation=VIT,
        notes="never trained, the same weights each time: what attention is before training; 32 pixels",
    ),
)


def _specs_of(family: _Family) -> list[ModelSpec]:
    return [
        ModelSpec(
            name=name,
            method=family.method,
            paradigm=family.paradigm,
            architecture=tagged.partition(".")[0],
            source=f"timm:{tagged}",
            normalisation=family.normalisation,
            licence=family.licence,
            citation=family.citation,
            notes=family.notes,
        )
        for name, tagged in family.models.items()
    ]


ENTRIES: tuple[ModelSpec, ...] = (*_BUNDLED, *(spec for family in _FAMILIES for spec in _specs_of(family)))
