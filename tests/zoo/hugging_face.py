"""Models of transformers from small configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from zoo.entry import Case, entry

TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
LABELS = {"num_labels": 3}


def text(length: int = 10, *, labels: bool = False, causal: bool = False) -> Callable[[], dict[str, Any]]:
    def draw() -> dict[str, Any]:
        ids = torch.randint(3, 64, (4, length))
        batch: dict[str, Any] = {"input_ids": ids}
        if not causal:
            batch["attention_mask"] = (torch.arange(length) < torch.tensor([[10], [8], [10], [6]])).long()
        return batch | ({"labels": ids} if causal else {"labels": torch.randint(3, (4,))} if labels else {})

    return draw


def pictures(size: int = 32) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": torch.randn(4, 3, size, size), "labels": torch.randint(3, (4,))}


def made(model: str, config: str, draw: Callable[[], Any], **settings: Any) -> Case:
    import transformers

    return Case(getattr(transformers, model)(getattr(transformers, config)(**settings)), draw)


@entry("BERT", "transformers", quick=True, structure="head", scorer="magnitude", sparsity=0.5, allocation="uniform")
def bert() -> Case:
    return made(
        "BertForSequenceClassification", "BertConfig", text(labels=True), **TEXT, **LABELS, max_position_embeddings=16
    )


@entry("DistilBERT", "transformers", structure="head", scorer="taylor", allocation="global", sparsity=0.5)
def distilbert() -> Case:
    sizes = {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    return made("DistilBertForSequenceClassification", "DistilBertConfig", text(labels=True), **sizes, **LABELS)


@entry("ALBERT", "transformers")
def albert() -> Case:
    sizes = {**TEXT, "embedding_size": 16}
    return made("AlbertForSequenceClassification", "AlbertConfig", text(labels=True), **sizes, **LABELS)


@entry("DeBERTa", "transformers")
def deberta() -> Case:
    sizes = {**TEXT, "relative_attention": True, "pos_att_type": "p2c|c2p", "max_position_embeddings": 16}
    return made("DebertaV2ForSequenceClassification", "DebertaV2Config", text(labels=True), **sizes, **LABELS)


@entry("GPT-2", "transformers", quick=True)
def gpt2() -> Case:
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
    return made("GPT2LMHeadModel", "GPT2Config", text(causal=True), **sizes, bos_token_id=1, eos_token_id=2)


@entry("T5", "transformers")
def t5() -> Case:
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return made("T5ForConditionalGeneration", "T5Config", text(causal=True), **sizes, decoder_start_token_id=0)


@entry("BART", "transformers")
def bart() -> Case:
    sizes = {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 16}
    more = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    return made("BartForConditionalGeneration", "BartConfig", text(causal=True), **sizes, **more)


@entry("Llama", "transformers", quick=True)
def llama() -> Case:
    return made("LlamaForCausalLM", "LlamaConfig", text(causal=True), **TEXT, num_key_value_heads=2)


@entry("Mixtral", "transformers", quick=True)
def mixtral() -> Case:
    sizes = {**TEXT, "num_key_value_heads": 2, "num_local_experts": 4}
    return made("MixtralForCausalLM", "MixtralConfig", text(causal=True), **sizes)


@entry("Qwen3-MoE", "transformers", layouts={"gate_up_proj": "out_in", "experts.down_proj": "out_in"})
def qwen() -> Case:
    sizes = {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}
    return made("Qwen3MoeForCausalLM", "Qwen3MoeConfig", text(causal=True), **sizes, moe_intermediate_size=32)


@entry("Mamba", "transformers", quick=True)
def mamba() -> Case:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    return made("MambaForCausalLM", "MambaConfig", text(causal=True), **sizes)


@entry("ViT", "transformers", quick=True)
def vit() -> Case:
    sizes = {key: value for key, value in TEXT.items() if key != "vocab_size"}
    return made("ViTForImageClassification", "ViTConfig", pictures(), **sizes, **LABELS, image_size=32, patch_size=8)


@entry("ConvNeXt", "transformers")
def convnext() -> Case:
    sizes = {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1]}
    return made("ConvNextForImageClassification", "ConvNextConfig", pictures(), **sizes, **LABELS)


@entry("Swin", "transformers")
def swin() -> Case:
    sizes = {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
    }
    return made("SwinForImageClassification", "SwinConfig", pictures(), **sizes, **LABELS)


@entry("ResNet", "transformers")
def resnet() -> Case:
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
    return made("ResNetForImageClassification", "ResNetConfig", pictures(), **sizes, **LABELS)


@entry(
    "BiT, standardised weights",
    "transformers",
    left_out=["no zeros of the weight"],
    structure="unstructured",
    sparsity=0.75,
)
def bit() -> Case:
    sizes = {"embedding_size": 32, "hidden_sizes": [128, 256], "depths": [1, 1], "num_groups": 8}
    return made("BitForImageClassification", "BitConfig", pictures(), **sizes, **LABELS)


@entry("SegFormer", "transformers")
def segformer() -> Case:
    sizes = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]}

    def draw() -> dict[str, Any]:
        return {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.randint(3, (2, 32, 32))}

    return made("SegformerForSemanticSegmentation", "SegformerConfig", draw, **sizes, **LABELS, decoder_hidden_size=32)


@entry("Whisper", "transformers")
def whisper() -> Case:
    sizes = {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 16}
    more = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    ends = {"max_source_positions": 20, "max_target_positions": 16, "decoder_start_token_id": 1, "pad_token_id": 0}

    def draw() -> dict[str, Any]:
        return {"input_features": torch.randn(2, 16, 40), "labels": torch.randint(3, 64, (2, 8))}

    ends |= {"bos_token_id": 1, "eos_token_id": 2, "suppress_tokens": None, "begin_suppress_tokens": None}  # type: ignore[dict-item]
    return made("WhisperForConditionalGeneration", "WhisperConfig", draw, **sizes, **more, **ends)


@entry("wav2vec2", "transformers")
def wav2vec2() -> Case:
    sizes = {**TEXT, "conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 4), "vocab_size": 12}
    more = {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}

    def draw() -> dict[str, Any]:
        return {"input_values": torch.randn(2, 800), "labels": torch.randint(1, 12, (2, 6))}

    return made("Wav2Vec2ForCTC", "Wav2Vec2Config", draw, **sizes, **more, mask_time_prob=0.0)


@entry("CLIP", "transformers")
def clip() -> Case:
    sizes = {key: value for key, value in TEXT.items() if key != "vocab_size"}
    words = {**TEXT, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    views = {**sizes, "image_size": 32, "patch_size": 8}

    def draw() -> dict[str, Any]:
        return {**text()(), "pixel_values": torch.randn(4, 3, 32, 32), "return_loss": True}

    case = made("CLIPModel", "CLIPConfig", draw, text_config=words, vision_config=views, projection_dim=16)
    return case


@entry("PatchTST", "transformers")
def patchtst() -> Case:
    sizes = {"d_model": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64, "num_input_channels": 3}
    more = {"context_length": 32, "patch_length": 8, "patch_stride": 8, "prediction_length": 4}

    def draw() -> dict[str, Any]:
        return {"past_values": torch.randn(4, 32, 3), "future_values": torch.randn(4, 4, 3)}

    return made("PatchTSTForPrediction", "PatchTSTConfig", draw, **sizes, **more)
