"""Architectures that are in the zoo of removal alone, from small configurations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.entry import Case
from zoo.hugging_face import LABELS, TEXT, made, text
from zoo.hugging_face import pictures as labelled
from zoo.others import graph
from zoo.packages import pictures, timm_model, vision_model
from zoo.removal import architecture
from zoo.yolo import C3, C2f, Decoupled, Detector, Elan, Focus


def _timm(name: str, size: int = 64, **settings: Any) -> None:
    architecture(name, "timm")(lambda: timm_model(name, size, **settings))


for _name in (
    *("convnext_atto", "convnextv2_atto", "regnety_002", "ghostnet_050", "repvgg_a0", "ese_vovnet19b_dw", "mixnet_s"),
    *("mobilenetv4_conv_small", "edgenext_xx_small", "mobilevit_xxs", "poolformer_s12", "fbnetc_100", "lcnet_050"),
    *("seresnet18", "ecaresnet26t", "resnest14d", "rexnet_100", "tf_efficientnetv2_b0", "dla46_c"),
    *("hrnet_w18_small", "res2net50_14w_8s", "gernet_s", "skresnet18", "inception_next_atto", "starnet_s1"),
):
    _timm(_name)
_timm("pvt_v2_b0")
_timm("levit_128s", 224)
_timm("xcit_nano_12_p16_224", 64, img_size=64, depth=2)
_timm("beit_base_patch16_224", 32, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)
_timm("cait_xxs24_224", 32, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)
_timm("resmlp_12_224", 32, img_size=32)
_timm("gmlp_ti16_224", 32, img_size=32)


def _torchvision(name: str, size: int = 32, **settings: Any) -> None:
    architecture(name, "torchvision")(lambda: vision_model(name, size, num_classes=4, **settings))


_torchvision("resnet18")
_torchvision("mobilenet_v2", width_mult=0.25)
_torchvision("mobilenet_v3_small")
_torchvision("efficientnet_b0")
_torchvision("mnasnet0_5")
_torchvision("squeezenet1_1", 64)
_torchvision("regnet_x_400mf")
_torchvision("regnet_y_400mf")


@architecture("ResNeXt", "torchvision")
def resnext() -> Case:
    from torchvision.models.resnet import Bottleneck, ResNet

    return Case(ResNet(Bottleneck, [1, 1, 1, 1], 4, groups=8, width_per_group=4), pictures())


@architecture("VGG", "torchvision")
def vgg() -> Case:
    from torchvision.models.vgg import VGG, make_layers

    module = VGG(make_layers([16, "M", 32, "M", 64, 64, "M"], batch_norm=True), num_classes=4)
    module.classifier = nn.Sequential(nn.Linear(64 * 49, 128), nn.ReLU(), nn.Dropout(), nn.Linear(128, 4))
    return Case(module, pictures())


@architecture("ConvNeXt", "torchvision")
def convnext() -> Case:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return Case(ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)], num_classes=4), pictures())


@architecture("ViT", "torchvision")
def vision_transformer() -> Case:
    from torchvision.models import VisionTransformer

    return Case(VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=4), pictures())


@architecture("MaxViT", "torchvision")
def maxvit() -> Case:
    from torchvision.models import MaxVit

    return Case(MaxVit((32, 32), 16, 4, [16, 32], [1, 1], 8, 0.0, num_classes=4), pictures())


@architecture("DeepLabV3", "torchvision")
def deeplab() -> Case:
    from torchvision.models import segmentation

    module = segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    return Case(module, pictures(64, 2))


@architecture("video ResNet, (2+1)-D", "torchvision")
def video_resnet() -> Case:
    from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, R2Plus1dStem, VideoResNet

    module = VideoResNet(BasicBlock, [Conv2Plus1D] * 4, [1, 1, 1, 1], R2Plus1dStem, num_classes=4)
    return Case(module, lambda: torch.randn(2, 3, 4, 16, 16))


def _segmenter(name: str, size: int = 64, encoder: str = "tu-mobilenetv3_small_050", **settings: Any) -> None:
    def make() -> Case:
        import segmentation_models_pytorch as smp

        module = getattr(smp, name)(encoder, encoder_weights=None, classes=3, **settings)
        return Case(module, pictures(size, 2))

    architecture(name, "segmentation-models-pytorch")(make)


_segmenter("DeepLabV3Plus", decoder_channels=32)
_segmenter("UnetPlusPlus", decoder_channels=(32, 16, 16, 8, 8))
_segmenter("Linknet", encoder="resnet18")
_segmenter("PSPNet", psp_out_channels=32)
_segmenter("MAnet", decoder_channels=(32, 16, 16, 8, 8), decoder_pab_channels=16, encoder="resnet18")
_segmenter("UPerNet", decoder_channels=32)


def _monai(name: str, size: int, dims: int, *args: Any, **settings: Any) -> None:
    def make() -> Case:
        from monai.networks import nets

        return Case(getattr(nets, name)(*args, **settings), pictures(size, 2, 1, dims))

    architecture(name, "monai")(make)


_monai("BasicUNet", 32, 2, 2, 1, 2, features=(8, 8, 16, 16, 32, 8))
_monai("AttentionUnet", 16, 3, 3, 1, 2, channels=(8, 16, 32), strides=(2, 2))
_monai("VNet", 32, 3, 3, 1, 2)
_monai("DenseNet", 32, 3, 3, 1, 2, init_features=8, growth_rate=4, block_config=(2, 2, 2))
_monai("DynUNet", 32, 2, 2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 16, 32])


def _language(name: str, model: str, config: str, causal: bool = True, quick: bool = False, **settings: Any) -> None:
    sizes = {**TEXT, **({} if causal else LABELS), **settings}
    make = lambda: made(model, config, text(causal=causal, labels=not causal), **sizes)  # noqa: E731
    architecture(name, "transformers", quick)(make)


_language("RoBERTa", "RobertaForSequenceClassification", "RobertaConfig", False, max_position_embeddings=16)
_language("ELECTRA", "ElectraForSequenceClassification", "ElectraConfig", False, embedding_size=16)
_language("GPT-NeoX", "GPTNeoXForCausalLM", "GPTNeoXConfig", quick=True)
_language("Mistral", "MistralForCausalLM", "MistralConfig", num_key_value_heads=2)
_language("Qwen2", "Qwen2ForCausalLM", "Qwen2Config", num_key_value_heads=2)
_language("Gemma 2", "Gemma2ForCausalLM", "Gemma2Config", num_key_value_heads=2, head_dim=8)
_language("Phi-3", "Phi3ForCausalLM", "Phi3Config", quick=True, num_key_value_heads=2, pad_token_id=0)
_language("Falcon", "FalconForCausalLM", "FalconConfig", ffn_hidden_size=64)
_language("BLOOM", "BloomForCausalLM", "BloomConfig", n_head=4)
_language("OPT", "OPTForCausalLM", "OPTConfig", ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=16)


def _seeing(name: str, model: str, config: str, size: int = 32, quick: bool = False, **settings: Any) -> None:
    make = lambda: made(model, config, labelled(size), **settings, **LABELS)  # noqa: E731
    architecture(name, "transformers", quick)(make)


_VISION = {key: value for key, value in TEXT.items() if key != "vocab_size"}
_seeing("DeiT", "DeiTForImageClassification", "DeiTConfig", **_VISION, image_size=32, patch_size=8)
_seeing("DINOv2", "Dinov2ForImageClassification", "Dinov2Config", **_VISION, image_size=32, patch_size=8)
_seeing("BEiT", "BeitForImageClassification", "BeitConfig", **_VISION, image_size=32, patch_size=8)
_seeing("MobileNetV2", "MobileNetV2ForImageClassification", "MobileNetV2Config", 64, depth_multiplier=0.35)
_seeing("RegNet", "RegNetForImageClassification", "RegNetConfig", hidden_sizes=[16, 32], depths=[1, 1], groups_width=8)
_seeing(
    "EfficientNet",
    "EfficientNetForImageClassification",
    "EfficientNetConfig",
    64,
    width_coefficient=0.5,
    hidden_dim=640,
)
_seeing("PoolFormer", "PoolFormerForImageClassification", "PoolFormerConfig", hidden_sizes=[16, 16, 32, 32])


@architecture("Wav2Vec 2, a layer norm per channel", "transformers")
def wav2vec2() -> Case:
    sizes = {**TEXT, "conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 4), "vocab_size": 12}
    more = {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
    draw = lambda: {"input_values": torch.randn(2, 800)}  # noqa: E731
    return made("Wav2Vec2ForCTC", "Wav2Vec2Config", draw, **sizes, **more, feat_extract_norm="layer")


def _graphs(name: str, **settings: Any) -> None:
    def make() -> Case:
        from torch_geometric import nn as layers

        return Case(getattr(layers, name)(16, 32, 2, 4, **settings), graph)

    architecture(name, "torch-geometric")(make)


_graphs("GIN")
_graphs("EdgeCNN")

architecture("YOLO, C2f and a frozen table", "torch", quick=True)(lambda: Case(Detector(), pictures(64, 2)))
architecture("YOLO, C3, focus and a decoupled head", "torch", quick=True)(
    lambda: Case(Detector(C3, Decoupled, Focus(8)), pictures(64, 2))
)
architecture("YOLO, ELAN", "torch", quick=True)(lambda: Case(Detector(Elan), pictures(64, 2)))
architecture("YOLO, attention of positions", "torch")(lambda: Case(Detector(C2f, attention=True), pictures(64, 2)))


class Forecaster(nn.Module):
    """Recurrent layers between linear ones."""

    def __init__(self, kind: type[nn.RNNBase], **settings: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 16)
        self.rnn = kind(16, 24, batch_first=True, **settings)
        width = (self.rnn.proj_size or 24) * (2 if self.rnn.bidirectional else 1)
        self.head = nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.rnn(F.relu(self.embed(x)))
        return self.head(out[:, -1])


def _recurrent(name: str, kind: type[nn.RNNBase], **settings: Any) -> None:
    architecture(name, "torch", quick=True)(lambda: Case(Forecaster(kind, **settings), lambda: torch.randn(4, 12, 4)))


_recurrent("LSTM, two layers, both directions", nn.LSTM, num_layers=2, bidirectional=True)
_recurrent("LSTM with projections", nn.LSTM, proj_size=8)
_recurrent("GRU", nn.GRU)


@architecture("Falcon Mamba", "transformers")
def falcon_mamba() -> Case:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4}
    return made("FalconMambaForCausalLM", "FalconMambaConfig", text(causal=True), **sizes)


@architecture("DINOv3", "transformers")
def dinov3() -> Case:
    sizes = {key: value for key, value in TEXT.items() if key != "vocab_size"}
    case = made("DINOv3ViTModel", "DINOv3ViTConfig", labelled(), **sizes, image_size=32, patch_size=8)
    return Case(case.module, lambda: {"pixel_values": torch.randn(4, 3, 32, 32)})


def _finding(name: str, family: str, levels: int, **settings: Any) -> None:
    """A detector, with a small ResNet before it, which is trained too."""

    def make() -> Case:
        import transformers

        stages = [f"stage{number}" for number in range(5 - levels, 5)]
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
        backbone = transformers.ResNetConfig(**sizes, out_features=stages)
        case = made(
            f"{family}ForObjectDetection", f"{family}Config", dict, backbone_config=backbone, **settings, **LABELS
        )
        return Case(case.module.requires_grad_(True), lambda: {"pixel_values": torch.randn(2, 3, 64, 64)})

    architecture(name, "transformers")(make)


_WIDTHS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
_DETR = {**_WIDTHS, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 6}
_finding("DETR", "Detr", 1, **_DETR)
_finding("Deformable DETR", "DeformableDetr", 3, **_DETR, num_feature_levels=3)


@architecture("RWKV", "transformers")
def rwkv() -> Case:
    sizes = {"vocab_size": 64, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2}
    return made("RwkvForCausalLM", "RwkvConfig", text(causal=True), **sizes, context_length=16, use_cache=False)


@architecture("diffusion U-Net, heads", "monai")
def diffusion_unet() -> Case:
    from monai.networks.nets import DiffusionModelUNet

    sizes = {"channels": (8, 16), "num_res_blocks": (1, 1), "attention_levels": (False, True), "norm_num_groups": 4}
    module = DiffusionModelUNet(2, 1, 1, **sizes, num_head_channels=8)
    return Case(module, lambda: (torch.randn(2, 1, 16, 16), torch.tensor([1, 2])))


class ConvLSTM(nn.Module):
    """Frames through a convolutional LSTM whose state begins as zeros."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.stem, self.gates = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12 + width, 4 * width, 3, padding=1)
        self.out = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = c = torch.zeros(len(x), self.width, *x.shape[3:])
        for frame in x.unbind(1):
            i, f, o, g = self.gates(torch.cat([self.stem(frame).relu(), h], 1)).split(self.width, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.out(h)


@architecture("ConvLSTM", "torch", quick=True)
def conv_lstm() -> Case:
    return Case(ConvLSTM(), lambda: torch.randn(2, 4, 3, 12, 12))


class TiedAutoencoder(nn.Module):
    """A decoder that reads the weights of the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(20, 16), nn.Linear(16, 8)
        self.shift = nn.Parameter(torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        code = self.b(self.a(x).relu())
        return F.linear(F.linear(code, self.b.weight.t(), self.shift).relu(), self.a.weight.t())


@architecture("autoencoder with tied weights", "torch", quick=True)
def tied_autoencoder() -> Case:
    return Case(TiedAutoencoder(), lambda: torch.randn(8, 20))
