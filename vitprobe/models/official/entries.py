"""The checkpoints that timm lacks: where each lies, how its keys look, what to build; plain data, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from vitprobe.models.entries import MAE, MOCOV3, ModelSpec


@dataclass(frozen=True)
class OfficialCheckpoint:
    """What is known of a checkpoint that its authors released, beside its `ModelSpec`.

    Attributes:
        spec: the entry of the registry; its source is "official:<name>".
        layout: a key of `layouts.LAYOUTS`: how the file's keys look, how they are converted, and what is built.
        arguments: what the architecture's constructor is given.
        address: the plain address of the file; "" where it has none.
        by_hand: where a person can get the file and a program cannot; "" otherwise.
        digest: "sha256:" or "md5:" and the published hexadecimal digits, or the first of them; "" where none are.
        filename: its name in torch.hub's cache, where the address ends in a name that other checkpoints share.
        crop_pct: the crop's share of the resized picture, 0..1.
    """

    spec: ModelSpec
    layout: str
    arguments: dict[str, Any]
    address: str = ""
    by_hand: str = ""
    digest: str = ""
    filename: str = ""
    crop_pct: float = 224 / 256

    @property
    def cached_name(self) -> str:
        """The file's name in torch.hub's cache."""
        return self.filename or PurePosixPath(urlsplit(self.address).path).name


IBOT = "Zhou et al., iBOT: Image BERT Pre-Training with Online Tokenizer, arXiv 2111.07832"
BEIT = "Bao et al., BEiT: BERT Pre-Training of Image Transformers, arXiv 2106.08254"
BEITV2 = "Peng et al., BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers, arXiv 2208.06366"
DATA2VEC = (
    "Baevski et al., data2vec: A General Framework for Self-supervised Learning in Speech, Vision and Language, "
    "arXiv 2202.03555"
)
DATA2VEC2 = (
    "Baevski et al., Efficient Self-supervised Learning with Contextualized Target Representations for Vision, "
    "Speech and Language, arXiv 2212.07525"
)
SIMMIM = "Xie et al., SimMIM: A Simple Framework for Masked Image Modeling, arXiv 2111.09886"
MASKFEAT = "Wei et al., Masked Feature Prediction for Self-Supervised Visual Pre-Training, arXiv 2112.09133"
CAPI = "Darcet et al., Cluster and Predict Latent Patches for Improved Masked Image Modeling, arXiv 2502.08769"
FRANCA = (
    "Venkataramanan et al., Franca: Nested Matryoshka Clustering for Scalable Visual Representation Learning, "
    "arXiv 2507.14137"
)

_S = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
_B = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
_L = {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16}
_H = {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16}

_META = "https://dl.fbaipublicfiles.com"
_IBOT = "https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/archive/2022/ibot"
_BEIT = "https://github.com/addf400/files/releases/download"
_FRANCA = "https://github.com/valeoai/Franca/releases/download/v1.0.0"


@dataclass(frozen=True)
class _Family:
    """What the checkpoints of one method share."""

    method: str
    paradigm: str
    normalisation: str
    licence: str
    citation: str
    layout: str
    notes: str = ""

    def member(
        self, name: str, architecture: str, arguments: dict[str, Any], *, notes: str = "", **where: Any
    ) -> OfficialCheckpoint:
        """One checkpoint of the family."""
        spec = ModelSpec(
            name=name,
            method=self.method,
            paradigm=self.paradigm,
            architecture=architecture,
            source=f"official:{name}",
            normalisation=self.normalisation,
            licence=self.licence,
            citation=self.citation,
            notes="; ".join(filter(None, (notes, self.notes))),
        )
        return OfficialCheckpoint(spec, self.layout, arguments, **where)


_MAE_FT = _Family(
    *("MAE fine-tuned", "supervised", "imagenet", "cc-by-nc-4.0", MAE, "plain"),
    notes="masked image modelling, then fine-tuned with the class labels of ImageNet-1k; average pooling",
)
_MAE = _Family("MAE", "MIM", "imagenet", "", MAE, "plain")
_MOCOV3 = _Family("MoCo v3", "JEA", "imagenet", "cc-by-nc-4.0", MOCOV3, "moco-v3")
_IBOT_FAMILY = _Family("iBOT", "hybrid", "imagenet", "apache-2.0", IBOT, "plain")
_BEIT_FAMILY = _Family(
    *("BEiT", "MIM", "inception", "", BEIT, "beit"), notes="pre-trained on ImageNet-22k, not fine-tuned"
)
_BEITV2 = _Family(
    *("BEiT v2", "MIM", "imagenet", "", BEITV2, "beit"), notes="pre-trained on ImageNet-1k, not fine-tuned"
)
_DATA2VEC = _Family("data2vec", "MIM", "imagenet", "cc-by-nc", DATA2VEC, "beit", notes="the student's weights")
_DATA2VEC2 = _Family(
    *("data2vec 2.0", "MIM", "imagenet", "cc-by-nc", DATA2VEC2, "data2vec2"),
    notes="the student's weights; norms follow the residual sums, and there is no final norm",
)
_SIMMIM = _Family("SimMIM", "MIM", "imagenet", "", SIMMIM, "simmim")
_MASKFEAT = _Family(*("MaskFeat", "MIM", "imagenet", "", MASKFEAT, "maskfeat"), notes="the release has no final norm")
_CAPI = _Family(
    *("CAPI", "MIM", "imagenet", "apache-2.0", CAPI, "capi"),
    notes="16 registers, no [cls]; the encoder alone, without the decoder that the authors pool with",
)
_FRANCA_FAMILY = _Family(
    *("Franca", "hybrid", "imagenet", "research-only RAIL", FRANCA, "franca"), notes="518 pixels; without RASA head"
)


_ALL = (
    _MAE_FT.member(
        *("mae_ft_vit_b", "vit_base_patch16_224 (average pooling)", _B | {"global_pool": "avg"}),
        address=f"{_META}/mae/finetune/mae_finetuned_vit_base.pth",
        digest="md5:1b25e9",
    ),
    _MAE_FT.member(
        *("mae_ft_vit_l", "vit_large_patch16_224 (average pooling)", _L | {"global_pool": "avg"}),
        address=f"{_META}/mae/finetune/mae_finetuned_vit_large.pth",
        digest="md5:51f550",
    ),
    _MAE_FT.member(
        *("mae_ft_vit_h", "vit_huge_patch14_224 (average pooling)", _H | {"global_pool": "avg"}),
        address=f"{_META}/mae/finetune/mae_finetuned_vit_huge.pth",
        digest="md5:2541f2",
    ),
    _MAE.member(
        *("mae_vit_s", "vit_small_patch16_224", _S),
        notes="no public source: MAE's authors released no ViT-S; built with timm's 6 heads",
    ),
    _MOCOV3.member(
        *("mocov3_vit_s", "vit_small_patch16_224 (12 heads)", _S | {"num_heads": 12}),
        notes="12 heads, where timm's ViT-S has 6",
        address=f"{_META}/moco-v3/vit-s-300ep/vit-s-300ep.pth.tar",
    ),
    _MOCOV3.member(
        "mocov3_vit_b", "vit_base_patch16_224", _B, address=f"{_META}/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar"
    ),
    _IBOT_FAMILY.member(
        *("ibot_vit_s", "vit_small_patch16_224", _S),
        notes="the teacher's weights",
        address=f"{_IBOT}/vits_16/checkpoint_teacher.pth",
        filename="ibot_vits_16_checkpoint_teacher.pth",
    ),
    _IBOT_FAMILY.member(
        *("ibot_vit_b", "vit_base_patch16_224", _B),
        notes="the teacher's weights, trained with random masks",
        address=f"{_IBOT}/vitb_16_rand_mask/checkpoint_teacher.pth",
        filename="ibot_vitb_16_rand_mask_checkpoint_teacher.pth",
    ),
    _IBOT_FAMILY.member(
        *("ibot_vit_l", "vit_large_patch16_224", _L),
        notes="the teacher's weights, trained with random masks",
        address=f"{_IBOT}/vitl_16_rand_mask/checkpoint_teacher.pth",
        filename="ibot_vitl_16_rand_mask_checkpoint_teacher.pth",
    ),
    _BEIT_FAMILY.member(
        *("beit_vit_b", "beit_base_patch16_224 (one table for all blocks)", _B | {"init_values": 0.1}),
        address=f"{_BEIT}/v1.0/beit_base_patch16_224_pt22k.pth",
    ),
    _BEIT_FAMILY.member(
        *("beit_vit_l", "beit_large_patch16_224 (one table for all blocks)", _L | {"init_values": 1e-5}),
        address=f"{_BEIT}/v1.0/beit_large_patch16_224_pt22k.pth",
    ),
    _BEITV2.member(
        *("beitv2_vit_b", "beit_base_patch16_224 (one table for all blocks)", _B | {"init_values": 0.1}),
        address=f"{_BEIT}/BEiT-v2/beitv2_base_patch16_224_pt1k.pth",
    ),
    _DATA2VEC.member(
        *("data2vec_vit_b", "beit_base_patch16_224 (one table for all blocks)", _B | {"init_values": 1e-4}),
        address=f"{_META}/fairseq/data2vec/data2vec_vision/base_800/checkpoint-799.pth",
        filename="data2vec_vision_base_800_checkpoint-799.pth",
    ),
    _DATA2VEC.member(
        *("data2vec_vit_l", "beit_large_patch16_224 (one table for all blocks)", _L | {"init_values": 1e-5}),
        address=f"{_META}/fairseq/data2vec/data2vec_vision/large_1600/checkpoint-799.pth",
        filename="data2vec_vision_large_1600_checkpoint-799.pth",
        notes="1600 epochs",
    ),
    _DATA2VEC2.member(
        *("data2vec2_vit_b", "vit_base_patch16_224 (post-norm)", _B),
        address=f"{_META}/fairseq/data2vec2/base_imagenet.pt",
        filename="data2vec2_base_imagenet.pt",
    ),
    _DATA2VEC2.member(
        *("data2vec2_vit_l", "vit_large_patch16_224 (post-norm)", _L),
        address=f"{_META}/fairseq/data2vec2/large_imagenet.pt",
        filename="data2vec2_large_imagenet.pt",
    ),
    _SIMMIM.member(
        *("simmim_vit_b", "beit_base_patch16_224 (one table for all blocks)", _B | {"init_values": 0.1}),
        notes="to be fetched by hand from Google Drive",
        by_hand="Google Drive, https://drive.google.com/file/d/1dJn6GYkwMIcoP3zqOEyW1_iQfpBi8UOw/view",
    ),
    _MASKFEAT.member(
        *("maskfeat_vit_b", "vit_base_patch16_224 (no final norm)", _B),
        address=f"{_META}/pyslowfast/masked_models/in1k_VIT_B_MaskFeat_PT_epoch_01600.pyth",
    ),
    _MASKFEAT.member(
        *("maskfeat_vit_l", "vit_large_patch16_224 (no final norm)", _L),
        address=f"{_META}/pyslowfast/masked_models/in1k_VIT_L_MaskFeat_PT_epoch_01600.pyth",
    ),
    _CAPI.member(
        *("capi_vit_l", "capi_large_patch14_224", _L | {"patch_size": 14}),
        notes="trained on LVD-142M",
        address=f"{_META}/capi/capi_vitl14_lvd.pth",
    ),
    # Width of the SwiGLU: two thirds of 4·width, rounded up to a multiple of 8, for gate and value each.
    _FRANCA_FAMILY.member(
        *("franca_vit_b", "vit_base_patch14_518 (SwiGLU)", _B | {"patch_size": 14, "mlp_ratio": 4096 / 768}),
        notes="trained on ImageNet-21k",
        address=f"{_FRANCA}/franca_vitb14_In21K.pth",
        crop_pct=1.0,
    ),
    _FRANCA_FAMILY.member(
        *("franca_vit_l", "vit_large_patch14_518 (SwiGLU)", _L | {"patch_size": 14, "mlp_ratio": 5472 / 1024}),
        notes="trained on LAION-600M",
        address=f"{_FRANCA}/franca_vitl14_Laion600M.pth",
        crop_pct=1.0,
    ),
)

OFFICIAL: dict[str, OfficialCheckpoint] = {entry.spec.name: entry for entry in _ALL}


def find_official(name: str) -> OfficialCheckpoint | None:
    """Return the checkpoint of an alias ("mocov3_vit_s") or of a spec's source ("official:mocov3_vit_s"), or None."""
    return OFFICIAL.get(name.removeprefix("official:"))
