"""From a YAML recipe and the command line to arguments and datasets."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml
from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser, get_dataset

from .config import BeftSFTConfig


FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
ALPACA_COLUMNS = {"instruction", "output"}
SETTINGS = (
    "Nothing was run. Settings are the fields of BeftScriptArguments, BeftSFTConfig, trl.ModelConfig and "
    "trl.DatasetMixtureConfig."
)


@dataclass
class BeftScriptArguments(ScriptArguments):
    """`trl.ScriptArguments` with local files.

    Args:
        train_file: JSON, JSONL, CSV or Parquet file with the training rows; takes the place of `dataset_name`.
        test_file: file of the same kind with the held-out rows.
        answers: number of held-out prompt-completion rows to answer before and after training, to report how many
            answers equal the completion.
    """

    train_file: str | None = field(
        default=None, metadata={"help": "Local JSON, JSONL, CSV or Parquet file with the training rows."}
    )
    test_file: str | None = field(
        default=None, metadata={"help": "Local JSON, JSONL, CSV or Parquet file with the held-out rows."}
    )
    answers: int = field(
        default=0, metadata={"help": "Number of held-out rows to answer before and after, for the accuracy."}
    )


class RecipeParser(TrlParser):
    """TRL's parser, which holds the values of a recipe against the types of their fields and raises its errors."""

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        for action in self._actions:
            value = values.get(action.dest)
            if isinstance(value, (list, dict)) and action.nargs is None and action.type in (int, float):
                self.error(f"{action.dest}: {value!r} is not of type {action.type.__name__}")
        # argparse converts and checks no default but text.
        text = {key: str(value) if isinstance(value, (bool, int, float)) else value for key, value in values.items()}
        return super().set_defaults_with_config(**text)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"The settings cannot be read: {message}. {SETTINGS}")


class Recipe(NamedTuple):
    """A recipe as it was read."""

    script: BeftScriptArguments
    training: BeftSFTConfig
    model: ModelConfig
    dataset: DatasetMixtureConfig

    @property
    def base_model(self) -> str:
        """Name or path of the base model."""
        return str(self.model.model_name_or_path)

    @property
    def output_dir(self) -> Path:
        """Folder of the run."""
        return Path(str(self.training.output_dir))


def parse_recipe(argv: Sequence[str] | None = None) -> Recipe:
    """Reads `--config RECIPE.yaml` and the overrides behind it with TRL's own parser.

    Raises:
        OSError, ValueError: for a file that is missing or not YAML, values of a wrong type, and keys that no field
            has, with the nearest one that exists.
    """
    dataclasses: Any = (BeftScriptArguments, BeftSFTConfig, ModelConfig, DatasetMixtureConfig)
    parser = RecipeParser(dataclasses)
    try:
        *arguments, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The recipe is not YAML: {error}. Nothing was run.") from error
    if unknown:
        fields = [action.dest for action in parser._actions]
        keys = [text.lstrip("-").split("=")[0] for text in unknown if text.startswith("--")] or unknown
        suggestions = {key: difflib.get_close_matches(key, fields, n=1) for key in keys}
        raise ValueError(
            "Unknown settings: "
            + ", ".join(key + (f" (did you mean {near[0]}?)" if near else "") for key, near in suggestions.items())
            + f". {SETTINGS}"
        )
    script_args, training_args, model_args, dataset_args = arguments
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is missing: name a model of the hub or a folder.")
    if model_args.use_peft:
        raise ValueError(
            "use_peft=True asks for a LoRA adapter beside the BEFT one: the two exclude each other. Leave it out "
            "and set bias_term, or use TRL's own sft.py for LoRA."
        )
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    return Recipe(script_args, training_args, model_args, dataset_args)


def load_rows(
    script_args: BeftScriptArguments, dataset_args: DatasetMixtureConfig, chat: bool
) -> DatasetDict | IterableDatasetDict:
    """Loads the training and, where there are any, the held-out rows.

    Args:
        script_args: names the files or the dataset.
        dataset_args: a `datasets` mixture, as TRL's own scripts take it.
        chat: whether the tokenizer has a chat template; decides what Alpaca rows become.

    Returns:
        The splits under their names, those of `train_file` and `test_file` under `dataset_train_split` and
        `dataset_test_split`. Alpaca columns (`instruction`, `input`, `output`) become prompt and completion.

    Raises:
        FileNotFoundError, ValueError: for a missing file, an unknown kind of file, or a missing split.
    """
    files = {
        split: file
        for split, file in (
            (script_args.dataset_train_split, script_args.train_file),
            (script_args.dataset_test_split, script_args.test_file),
        )
        if file is not None
    }
    named = [name for name in ("train_file", "dataset_name") if getattr(script_args, name)]
    named += ["datasets"] if dataset_args.datasets else []
    if len(named) != 1:
        raise ValueError(
            f"Give the training rows in exactly one way, train_file, dataset_name or datasets; got "
            f"{' and '.join(named) or 'none of them'}."
        )
    if files:
        rows = load_dataset(_file_format(files.values()), data_files=files)
    elif dataset_args.datasets:
        rows = get_dataset(dataset_args)
    else:
        rows = load_dataset(
            script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
        )
    if script_args.dataset_train_split not in rows:
        raise ValueError(f"There is no split {script_args.dataset_train_split!r}, only {', '.join(rows)}.")
    for split, dataset in rows.items():
        columns = set(dataset.column_names or next(iter(dataset), {}))
        if columns >= ALPACA_COLUMNS:
            rows[split] = dataset.map(alpaca_to_prompt, fn_kwargs={"chat": chat}, remove_columns=list(columns))
    return rows


def alpaca_to_prompt(row: dict[str, Any], chat: bool) -> dict[str, Any]:
    """One Alpaca row (`instruction`, optional `input`, `output`) as TRL's prompt-completion format."""
    question = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
    if chat:
        return {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        }
    return {"prompt": f"{question}\n\nAnswer:", "completion": f" {row['output']}"}


def held_out_rows(
    rows: DatasetDict | IterableDatasetDict, script_args: BeftScriptArguments, training_args: BeftSFTConfig
) -> Dataset | None:
    """The held-out split where there is one; an error where the run wants to evaluate and there is none."""
    held_out = rows.get(script_args.dataset_test_split)
    if held_out is None and training_args.eval_strategy != "no":
        raise ValueError(
            f"eval_strategy={training_args.eval_strategy!r} needs held-out rows: give test_file, or a "
            f"dataset_test_split among {', '.join(rows)}, or set eval_strategy='no'."
        )
    return held_out


def _file_format(files: Any) -> str:
    formats = set()
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"There is no file {file}. Paths in a recipe are relative to the current folder.")
        if not Path(file).stat().st_size:
            raise ValueError(f"{file} is empty: it has no rows to train on or to evaluate.")
        if Path(file).suffix not in FILE_FORMATS:
            raise ValueError(f"{file} is of no known kind: use a file ending in {', '.join(FILE_FORMATS)}.")
        formats.add(FILE_FORMATS[Path(file).suffix])
    if len(formats) > 1:
        raise ValueError(f"train_file and test_file must be of one kind, got {' and '.join(sorted(formats))}.")
    return formats.pop()
