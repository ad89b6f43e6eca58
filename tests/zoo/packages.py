"""Vision, segmentation and language models of other packages, from small configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.entry import Case, entry


def pictures(size: int = 32, count: int = 4, channels: int = 3, dims: int = 2) -> Callable[[], Tensor]:
    return lambda: torch.randn(count, channels, *(size,) * dims)


def timm_model(name: str, size: int = 32, **settings: Any) -> Case:
    import timm

    return Case(timm.create_model(name, pretrained=False, num_classes=4, **settings), pictures(size))


@entry("ResNet-10-T", "timm")
def timm_resnet() -> Case:
    return timm_model("resnet10t", 64)


@entry("MobileNetV3", "timm")
def timm_mobilenet() -> Case:
    return timm_model("mobilenetv3_small_050", 64)


@entry("EfficientNet", "timm")
def timm_efficientnet() -> Case:
    return timm_model("efficientnet_lite0", 64, drop_path_rate=0.1)


@entry("DeiT III with layer scale", "timm")
def timm_deit() -> Case:
    return timm_model("deit3_small_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)


@entry("MLP-Mixer", "timm")
def timm_mixer() -> Case:
    from timm.models.mlp_mixer import MlpMixer

    return Case(MlpMixer(4, img_size=32, patch_size=8, num_blocks=2, embed_dim=32), pictures())


@entry("CoAtNet", "timm")
def timm_coatnet() -> Case:
    return timm_model("coatnet_pico_rw_224", 32, img_size=32)


@entry("NFNet, scaled weights", "timm", left_out=["no zeros of the weight"], structure="unstructured", sparsity=0.75)
def timm_nfnet() -> Case:
    return timm_model("nf_resnet26", 64)


@entry("EVA-02, SwiGLU and rotary", "timm")
def timm_eva() -> Case:
    return timm_model("eva02_tiny_patch14_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4)


def vision_model(name: str, size: int = 32, **settings: Any) -> Case:
    import torchvision

    return Case(getattr(torchvision.models, name)(weights=None, **settings), pictures(size))


@entry("ShuffleNetV2", "torchvision")
def shufflenet() -> Case:
    return vision_model("shufflenet_v2_x0_5", 64, num_classes=4)


@entry("GoogLeNet, auxiliary heads", "torchvision")
def googlenet() -> Case:
    return vision_model("googlenet", 32, num_classes=4, init_weights=False, aux_logits=True)


@entry("DenseNet", "torchvision")
def densenet() -> Case:
    from torchvision.models import DenseNet

    return Case(DenseNet(8, (2, 2), 16, num_classes=4), pictures())


@entry("Swin, torchvision's", "torchvision")
def torchvision_swin() -> Case:
    from torchvision.models import SwinTransformer

    return Case(SwinTransformer([4, 4], 16, [1, 2], [2, 4], [2, 2], num_classes=4), pictures())


@entry("Swin of video", "torchvision")
def video() -> Case:
    from torchvision.models.video import SwinTransformer3d

    module = SwinTransformer3d([2, 4, 4], 16, [1, 2], [2, 4], [2, 2, 2], num_classes=4)
    return Case(module, lambda: torch.randn(2, 3, 4, 16, 16))


@entry("LR-ASPP, segmentation", "torchvision")
def lraspp() -> Case:
    from torchvision.models import segmentation

    module = segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    return Case(module, pictures(64, 2))


@entry("U-Net, ResNet-18 encoder", "segmentation-models-pytorch")
def unet() -> Case:
    import segmentation_models_pytorch as smp

    module = smp.Unet("resnet18", encoder_weights=None, decoder_channels=(32, 16, 16, 8, 8), classes=3)
    return Case(module, pictures(32, 2))


@entry("FPN, timm encoder", "segmentation-models-pytorch")
def fpn() -> Case:
    import segmentation_models_pytorch as smp

    return Case(smp.FPN("tu-mobilenetv3_small_050", encoder_weights=None, classes=3), pictures(64, 2))


@entry("Segformer, mit_b0 encoder", "segmentation-models-pytorch")
def smp_segformer() -> Case:
    import segmentation_models_pytorch as smp

    return Case(smp.Segformer("mit_b0", encoder_weights=None, classes=3), pictures(64, 2))


@entry("UNet 3-D", "monai")
def monai_unet() -> Case:
    from monai.networks.nets import UNet

    module = UNet(3, 1, 2, channels=(8, 16, 32), strides=(2, 2), num_res_units=1)
    return Case(module, pictures(16, 2, 1, 3))


@entry("UNETR 3-D", "monai")
def unetr() -> Case:
    from monai.networks.nets import UNETR

    module = UNETR(1, 2, (32, 32, 32), feature_size=4, hidden_size=48, mlp_dim=64, num_heads=4, dropout_rate=0.1)
    return Case(module, pictures(32, 1, 1, 3))


@entry("SegResNet", "monai")
def segresnet() -> Case:
    from monai.networks.nets import SegResNet

    return Case(SegResNet(2, init_filters=8, in_channels=1, out_channels=2, dropout_prob=0.1), pictures(32, 2, 1))


@entry("diffusion U-Net", "diffusers")
def diffusion_unet() -> Case:
    from diffusers import UNet2DModel

    kinds = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    module = UNet2DModel(16, 3, 3, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, **kinds)
    return Case(module, lambda: (torch.randn(2, 3, 16, 16), torch.tensor([3, 500])))


@entry("DiT", "diffusers")
def dit() -> Case:
    from diffusers import DiTTransformer2DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8, "patch_size": 2}
    module = DiTTransformer2DModel(in_channels=4, out_channels=4, norm_num_groups=4, num_embeds_ada_norm=10, **sizes)
    return Case(
        module,
        lambda: {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "timestep": torch.tensor([3, 500]),
            "class_labels": torch.tensor([1, 2]),
        },
    )


def wrapped(**settings: Any) -> Case:
    """GPT-2 with adapters."""
    from peft import LoraConfig, get_peft_model

    from zoo.hugging_face import gpt2

    case = gpt2()
    case.module = get_peft_model(case.module, LoraConfig(r=8, lora_alpha=16, **settings))
    return case


@entry("GPT-2 with LoRA", "peft", left_out=["frozen"], structure="unstructured", scorer="magnitude", sparsity=0.75)
def lora() -> Case:
    return wrapped(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights="gaussian")


@entry("GPT-2 with DoRA, the base pruned too", "peft", frozen="prune", structure="unstructured")
def dora() -> Case:
    return wrapped(target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True, init_lora_weights=False)


@entry("x-transformers decoder", "x-transformers")
def x_transformer() -> Case:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=32, depth=2, heads=4, attn_dim_head=8, rotary_pos_emb=True, ff_glu=True, attn_qk_norm=True)
    return Case(
        TransformerWrapper(num_tokens=64, max_seq_len=16, attn_layers=layers), lambda: torch.randint(64, (4, 12))
    )


@entry("CvT", "vit-pytorch")
def cvt() -> Case:
    from vit_pytorch.cvt import CvT

    sizes: dict[str, int] = {}
    for stage, width in (("s1", 16), ("s2", 24), ("s3", 32)):
        sizes |= {f"{stage}_emb_dim": width, f"{stage}_heads": 1, f"{stage}_depth": 1, f"{stage}_mlp_mult": 2}
    return Case(CvT(num_classes=4, dropout=0.1, **sizes), pictures())
