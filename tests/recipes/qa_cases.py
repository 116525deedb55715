"""Questions, contexts and tiny models for question answering."""

import json
import re
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]


SAMPLE = ROOT / "tests" / "data" / "squad_sample"


def sample_rows(split):
    content = json.loads((SAMPLE / f"{split}.json").read_text(encoding="utf-8"))
    return [
        {
            "id": question["id"],
            "question": question["question"],
            "context": paragraph["context"],
            "answers": {key: [answer[key] for answer in question["answers"]] for key in ("text", "answer_start")},
        }
        for article in content["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]


def word_tokenizer(**options):
    """Words of the sample that start with a to m are known, the rest is cut into letters."""
    texts = [row[key] for split in ("train", "validation") for row in sample_rows(split) for key in row if key != "id"]
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", str(text).lower())})
    letters = sorted({letter for word in words for letter in word})
    known = [word for word in words if len(word) > 1 and word[0] <= "m"]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters), *known]
    tokenizer = Tokenizer(models.WordPiece({token: n for n, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    special["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**special, "model_max_length": 256, **options})


def row(**changes):
    answers = {"text": ["seven"], "answer_start": [3]}
    return {"id": "q1", "question": "When?", "context": "At seven, in May.", "answers": answers, **changes}


def write_flat(folder, rows, suffix="json"):
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        path = folder / f"{split}.{suffix}"
        if suffix == "json":
            path.write_text(json.dumps(rows), encoding="utf-8")
        if suffix == "jsonl":
            path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
        if suffix == "parquet":
            Dataset.from_list(rows).to_parquet(path)
    return str(folder)


def cut(recipe, tokenizer, rows, max_length, stride):
    questions = Dataset.from_list(rows)
    return questions, recipe.qa_features.cut_windows(tokenizer, questions, max_length, stride, keep_places=True)
