"""The trainers: TRL's `SFTTrainer` and Transformers' `Trainer`, with [`BeftTrainerMixin`] before them."""

from pathlib import Path
from typing import Any

from datasets import IterableDataset
from torch import nn
from transformers import PreTrainedModel, Trainer
from trl import SFTTrainer

from . import report
from .arguments import (
    check_datasets,
    check_settings,
    give_enough_steps,
    refuse_absent_anchor,
    refuse_encoder,
    refuse_unknown_metric,
)
from .config import BeftSFTConfig, BeftTrainingArguments
from .data.labels import drop_masked, refuse_too_few_rows
from .data.rows import (
    TURNS,
    UNRENDERED,
    check_cells,
    check_columns,
    check_masks,
    check_roles,
    explain_unrendered,
    prepare_rows,
    warn_of_unread,
)
from .mixin import BeftTrainerMixin


class BeftSFTTrainer(BeftTrainerMixin, SFTTrainer):
    """`trl.SFTTrainer` that trains one attention bias term: it scores query, key and value on the training data,
    keeps the best, and trains it on a frozen base, in any precision or quantisation.

    Takes what `SFTTrainer` takes, except a `peft_config`; see [`BeftTrainerMixin`] for `train()` and the attributes.

    ```python
    trainer = BeftSFTTrainer(
        model="facebook/opt-125m",
        args=BeftSFTConfig(output_dir="out", bias_term="auto"),
        train_dataset=dataset,
    )
    trainer.train()
    trainer.save_model()
    ```
    """

    _config_class = BeftSFTConfig
    _tag_names = ["trl", "sft", "beft"]
    _name = "BEFT"
    _paper = report.PAPER

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        args: BeftSFTConfig | None = None,
        *positional: Any,
        **kwargs: Any,
    ):
        super().__init__(model, args, *positional, **kwargs)
        refuse_absent_anchor(self.args, self.bias_sites)
        refuse_too_few_rows(self)
        give_enough_steps(self)

    def _check_given(self, given: dict[str, Any], skeleton: Any) -> None:
        args, formatting = given["args"], given.get("formatting_func")
        refuse_encoder(skeleton)
        check_settings(args, given.get("optimizer_cls_and_kwargs"))
        refuse_unknown_metric(args, given.get("eval_dataset"), given.get("compute_metrics"))

        def checked(rows: Any, name: str) -> Any:
            check_columns(rows, args, formatting, name)
            if formatting is not None or (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
                return rows
            rows = check_cells(rows, name, (args.dataset_text_field, *TURNS))
            check_masks(rows, args, name)
            warn_of_unread(rows, name, {args.dataset_text_field})
            return prepare_rows(rows, args.dataset_text_field, args.dataset_num_proc)

        check_datasets(given, checked)

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        rows = (dataset, f"{dataset_name}_dataset", processing_class, self.chat_template)
        if formatting_func is None:
            check_roles(*rows)
        try:
            prepared = super()._prepare_dataset(
                dataset, processing_class, args, packing, formatting_func, dataset_name
            )
        except UNRENDERED:
            if formatting_func is None:
                explain_unrendered(*rows)
            raise
        if isinstance(prepared, IterableDataset):
            return prepared
        return drop_masked(prepared, dataset, dataset_name, args.max_length, packing, args.dataset_num_proc)


class BeftTrainer(BeftTrainerMixin, Trainer):
    """`transformers.Trainer` that trains one attention bias term of an encoder, and the head of its task.

    The head of a `...ForSequenceClassification` model (of token classification and question answering too) is trained
    and saved whole, as PEFT's `modules_to_save`; the scoring pass trains it along and puts it back.

    Takes what `Trainer` takes; see [`BeftTrainerMixin`] for `train()` and the attributes.

    ```python
    model = AutoModelForSequenceClassification.from_pretrained("google-bert/bert-base-cased", num_labels=2)
    trainer = BeftTrainer(model, BeftTrainingArguments("out"), train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    ```
    """

    _config_class = BeftTrainingArguments
    _tag_names = ["beft"]

    def __init__(self, model: PreTrainedModel, args: BeftTrainingArguments | None = None, **kwargs: Any):
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"BeftTrainer takes a loaded model, got {model!r}. Load it with the class of its task, such as "
                "AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)."
            )
        super().__init__(model, args, **kwargs)
        # BERT's forward pass takes any keyword, so Transformers believes that it divides its loss by
        # `num_items_in_batch`, and multiplies by the processes; it is a plain mean (huggingface/transformers#47688).
        self.model_accepts_loss_kwargs = False
