"""Fine-tunes one attention bias term of an encoder, and a classification or regression head, on a GLUE task.

BERT on 1,000 sentences of SST-2, from the hub, and the control that trains only the head:

    accelerate launch examples/glue_encoder.py --config recipes/glue/bert-base-cased.yaml
    accelerate launch examples/glue_encoder.py --config recipes/glue/bert-base-cased.yaml --head_only true

Local files, in TSV, CSV, JSON or JSONL with a column `label`, take the place of the hub's:

    accelerate launch examples/glue_encoder.py --config recipes/glue/bert-base-cased.yaml \
        --train_file train.tsv --validation_file validation.tsv
"""

import csv
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, EvalPrediction, Trainer, set_seed
from trl import TrlParser

from beft_trl import BeftTrainer, BeftTrainingArguments


FORMATS = {".tsv": "csv", ".csv": "csv", ".json": "json", ".jsonl": "json"}


@dataclass
class GlueArguments:
    model_name_or_path: str = field(metadata={"help": "Encoder, a name on the hub or a folder."})
    task: str = field(default="sst2", metadata={"help": "Configuration of nyu-mll/glue, where no files are given."})
    train_file: str | None = field(default=None, metadata={"help": "Local file with the training rows."})
    validation_file: str | None = field(default=None, metadata={"help": "Local file with the rows to report on."})
    validation_split: str = field(default="validation", metadata={"help": "`validation_matched` for MNLI."})
    text_columns: list[str] = field(default_factory=lambda: ["sentence"], metadata={"help": "One column or two."})
    train_rows: int | None = field(default=None, metadata={"help": "Rows to draw from the training set, by the seed."})
    regression: bool = field(default=False, metadata={"help": "Labels are numbers to predict, as in STS-B."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a row; the rest is cut off."})
    head_only: bool = field(default=False, metadata={"help": "Train only the head: the control of every comparison."})


def main(glue: GlueArguments, args: BeftTrainingArguments) -> dict[str, float]:
    set_seed(args.seed)
    rows = load_rows(glue)
    if glue.train_rows:
        rows["train"] = rows["train"].shuffle(seed=args.seed).select(range(min(glue.train_rows, len(rows["train"]))))
    rows, labels = with_labels(rows, glue.regression)
    tokenizer = AutoTokenizer.from_pretrained(glue.model_name_or_path)
    tokens = rows.map(
        lambda row: tokenizer(*(row[name] for name in glue.text_columns), truncation=True, max_length=glue.max_length),
        remove_columns=[name for name in rows["train"].column_names if name != "labels"],
    )
    model = AutoModelForSequenceClassification.from_pretrained(glue.model_name_or_path, dtype="float32", **labels)
    trainer_class = BeftTrainer
    if glue.head_only:
        model.base_model.requires_grad_(False)
        trainer_class = Trainer
    trainer = trainer_class(
        model,
        args,
        train_dataset=tokens["train"],
        eval_dataset=tokens["validation"],
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )
    trainer.model_accepts_loss_kwargs = False  # of a plain Trainer, see huggingface/transformers#47688
    trainer.train()
    measured = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        trained = "only the head" if glue.head_only else f"the {trainer.selected_bias_term} bias and the head"
        print(f"Trained {trained} on {len(tokens['train'])} rows:")
        print(", ".join(f"{name.removeprefix('eval_')} {measured[name]:.4f}" for name in measured if is_metric(name)))
    return measured


def load_rows(glue: GlueArguments) -> DatasetDict:
    files = {"train": glue.train_file, "validation": glue.validation_file}
    if not any(files.values()):
        rows = load_dataset("nyu-mll/glue", glue.task)
        return DatasetDict({"train": rows["train"], "validation": rows[glue.validation_split]})
    if not all(files.values()):
        raise ValueError("Give train_file and validation_file together: rows that were trained on measure nothing.")
    return DatasetDict({split: load_file(Path(file)) for split, file in files.items()})


def load_file(file: Path) -> Dataset:
    if file.suffix not in FORMATS:
        raise ValueError(f"{file} is not one of {', '.join(FORMATS)}.")
    # GLUE's tab-separated files quote nothing: a lone quotation mark would swallow the rows after it.
    separated = {"sep": "\t", "quoting": csv.QUOTE_NONE} if file.suffix == ".tsv" else {}
    return load_dataset(FORMATS[file.suffix], data_files=str(file), split="train", **separated)


def with_labels(rows: DatasetDict, regression: bool) -> tuple[DatasetDict, dict]:
    """The rows with a number in the column `labels`, and what the model's configuration says of them."""
    feature, settings = rows["train"].features["label"], {"num_labels": 1, "problem_type": "regression"}
    if regression:
        number = float
    else:
        named = isinstance(feature, ClassLabel)
        names = feature.names if named else sorted({str(value) for value in rows["train"]["label"]})
        settings = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
        number = int if named else lambda label: settings["label2id"][str(label)]
    return rows.map(lambda row: {"labels": number(row["label"])}, remove_columns="label"), settings


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, and the correlation: Matthews' where there are two classes, Pearson's of a regression."""
    predicted, labels = prediction.predictions, prediction.label_ids
    if predicted.shape[1] == 1:
        return {"correlation": float(np.corrcoef(predicted[:, 0], labels)[0, 1])}
    predicted = predicted.argmax(1)
    metrics = {"accuracy": float((predicted == labels).mean())}
    if len(set(labels)) == len(set(predicted)) == 2:
        metrics["correlation"] = float(np.corrcoef(predicted, labels)[0, 1])
    return metrics


def is_metric(name: str) -> bool:
    return name in ("eval_loss", "eval_accuracy", "eval_correlation")


if __name__ == "__main__":
    main(*TrlParser([GlueArguments, BeftTrainingArguments]).parse_args_and_config())
