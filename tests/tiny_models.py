"""Tiny random models of many families of transformers, each with eight examples that have equally many labels.

Dropout and the like are off and batch norms keep their statistics, so that a batch of eight has the loss of four
batches of two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

VOCAB, LENGTH, EXAMPLES = 32, 6, 8
Rows = list[dict[str, torch.Tensor]]
Made = tuple[nn.Module, Rows]

# Whatever a configuration calls them. Those that it does not know it keeps and ignores.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "dim", "d_model", "n_embd", "embedding_size", "d_ff", "d_kv"), 16),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"), 16),
    **dict.fromkeys(("num_attention_heads", "n_heads", "n_head", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("vocab_size",), VOCAB),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "decoder_start_token_id"), 0),
    **dict.fromkeys(("eos_token_id", "sep_token_id", "cls_token_id", "forced_eos_token_id"), 1),
    **dict.fromkeys(("dropout", "attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
    **dict.fromkeys(("activation_dropout", "classifier_dropout", "classifier_dropout_prob", "dropout_rate"), 0.0),
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "seq_classif_dropout", "qa_dropout"), 0.0),
    **dict.fromkeys(("hidden_dropout", "feat_proj_dropout", "final_dropout", "layerdrop", "drop_path_rate"), 0.0),
    "initializer_range": 0.2,
    "max_position_embeddings": 32,
}


def tokens(shape: tuple[int, ...], below: int = VOCAB) -> torch.Tensor:
    return torch.randint(2, below, shape)


def make(name: str, rows: Callable[[], Rows], settings: dict[str, Any] | None = None) -> Made:
    transformers.set_seed(0)
    model = getattr(transformers, name)
    made = model(model.config_class(**SIZES | (settings or {})))
    for module in made.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval().train = lambda mode=True, module=module: module
    return made, rows()


def examples(**columns: torch.Tensor) -> Rows:
    return [{name: column[i] for name, column in columns.items()} for i in range(EXAMPLES)]


def text(**columns: torch.Tensor) -> Rows:
    return examples(input_ids=tokens((EXAMPLES, LENGTH)), **columns)


def classes() -> Rows:
    return text(labels=torch.arange(EXAMPLES) % 2)


def numbers() -> Rows:
    return text(labels=torch.randn(EXAMPLES))


def topics() -> Rows:
    return text(labels=(torch.rand(EXAMPLES, 2) > 0.5).float())


def tags() -> Rows:
    return text(labels=tokens((EXAMPLES, LENGTH), 4) % 2)


def answers() -> Rows:
    ends = torch.arange(EXAMPLES) % LENGTH
    return text(start_positions=ends.flip(0), end_positions=ends)


def choices() -> Rows:
    return examples(input_ids=tokens((EXAMPLES, 2, LENGTH)), labels=torch.arange(EXAMPLES) % 2)


def masked(**columns: torch.Tensor) -> Rows:
    labels = torch.full((EXAMPLES, LENGTH), -100)
    labels[:, 1:3] = tokens((EXAMPLES, 2))
    return text(labels=labels, **columns)


def masked_pairs() -> Rows:
    return masked(next_sentence_label=torch.arange(EXAMPLES) % 2)


def continued() -> Rows:
    rows = text()
    return [{**row, "labels": row["input_ids"].clone()} for row in rows]


def uneven() -> Rows:
    """Continued text, of which the later examples have fewer labels."""
    rows = continued()
    for i, row in enumerate(rows):
        row["labels"][: i // 2] = -100
    return rows


def identical() -> Rows:
    """A load-balancing loss is a product of means over the batch: equal for all batches of one example only."""
    return continued()[:1] * EXAMPLES


def translated() -> Rows:
    return text(labels=tokens((EXAMPLES, 4)))


def pictures() -> Rows:
    return examples(pixel_values=torch.randn(EXAMPLES, 3, 32, 32), labels=torch.arange(EXAMPLES) % 2)


def segments() -> Rows:
    return examples(pixel_values=torch.randn(EXAMPLES, 3, 32, 32), labels=torch.randint(0, 2, (EXAMPLES, 32, 32)))


def sounds() -> Rows:
    return examples(input_values=torch.randn(EXAMPLES, 200), labels=tokens((EXAMPLES, 3)))


def spoken() -> Rows:
    return examples(input_values=torch.randn(EXAMPLES, 200), labels=torch.arange(EXAMPLES) % 2)


def features() -> Rows:
    return examples(input_features=torch.randn(EXAMPLES, 8, 16), labels=tokens((EXAMPLES, 4)))


class Penalised(nn.Module):
    """Divides half of its loss by the number of items, and not the other half, as mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        transformers.set_seed(0)
        self.embedding = nn.Embedding(VOCAB, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
        logits = self.head(self.embedding(input_ids))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return {"loss": loss / kwargs.get("num_items_in_batch", labels.numel()) + logits.square().mean()}


CONVOLUTIONS = {"conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
POSITIONS = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False}
WAV2VEC2 = {**CONVOLUTIONS, **POSITIONS, "ctc_loss_reduction": "mean", "classifier_proj_size": 16}
SEGFORMER = {
    "hidden_sizes": [16, 16, 16, 16],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 1, 1],
    "decoder_hidden_size": 16,
}
STAGES = {"embedding_size": 16, "hidden_sizes": [16, 16], "depths": [1, 1], "layer_type": "basic", "num_stages": 2}
EXPERTS = {"num_local_experts": 2, "output_router_logits": True, "router_aux_loss_coef": 1.0}
PATCHES = {"image_size": 32, "patch_size": 8}

# Class, examples, and settings that SIZES has not. By name, for importing all of them takes seconds.
MODELS: dict[str, tuple[Any, ...]] = {
    "BERT classes": ("BertForSequenceClassification", classes),
    "BERT numbers": ("BertForSequenceClassification", numbers, {"num_labels": 1}),
    "BERT topics": ("BertForSequenceClassification", topics, {"problem_type": "multi_label_classification"}),
    "BERT masked": ("BertForMaskedLM", masked),
    "BERT pretraining": ("BertForPreTraining", masked_pairs),
    "BERT next sentence": ("BertForNextSentencePrediction", classes),
    "BERT continued": ("BertLMHeadModel", continued, {"is_decoder": True}),
    "RoBERTa tags": ("RobertaForTokenClassification", tags),
    "RoBERTa masked": ("RobertaForMaskedLM", masked),
    "DistilBERT classes": ("DistilBertForSequenceClassification", classes),
    "DistilBERT masked": ("DistilBertForMaskedLM", masked),
    "ELECTRA answers": ("ElectraForQuestionAnswering", answers),
    "ELECTRA masked": ("ElectraForMaskedLM", masked),
    "ALBERT choices": ("AlbertForMultipleChoice", choices),
    "DeBERTa classes": ("DebertaV2ForSequenceClassification", classes),
    "GPT-2": ("GPT2LMHeadModel", continued),
    "GPT-2 classes": ("GPT2ForSequenceClassification", classes),
    "Llama": ("LlamaForCausalLM", continued),
    "Llama uneven": ("LlamaForCausalLM", uneven),
    "Llama classes": ("LlamaForSequenceClassification", classes),
    "Mixtral": ("MixtralForCausalLM", identical, EXPERTS),
    "T5": ("T5ForConditionalGeneration", translated),
    "BART": ("BartForConditionalGeneration", translated),
    "Whisper": (
        "WhisperForConditionalGeneration",
        features,
        {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 8},
    ),
    "ViT": ("ViTForImageClassification", pictures, PATCHES),
    "ResNet": ("ResNetForImageClassification", pictures, STAGES),
    "Segformer": ("SegformerForSemanticSegmentation", segments, SEGFORMER),
    "Wav2Vec2": ("Wav2Vec2ForCTC", sounds, WAV2VEC2),
    "Wav2Vec2 classes": ("Wav2Vec2ForSequenceClassification", spoken, WAV2VEC2),
}
NAMES = [*MODELS, "penalised"]


def tiny(name: str) -> Made:
    """Build a model and its examples, the same ones every time."""
    if name == "penalised":
        return Penalised(), tags()
    return make(*MODELS[name])
