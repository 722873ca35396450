"""From a YAML recipe and the command line to arguments and datasets."""

import difflib
import os
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from transformers.trainer_utils import IntervalStrategy
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser, get_dataset
from trl.scripts.utils import DatasetConfig

from ..config import BeftSFTConfig
from ..data.rows import warn_of_unread
from .data_files import read_file


ALPACA_COLUMNS = {"instruction", "output"}
EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
PEFT_FIELDS = ("lora_", "use_rslora", "use_dora")
DTYPES = (None, "auto", "float32", "bfloat16", "float16")
# Fields of ModelConfig, by the names that `from_pretrained` has for them.
INIT_FIELDS = {"revision": "model_revision", "attn_implementation": "attn_implementation", "dtype": "dtype"}
# Fields that name a file or a folder, of this machine if it is there.
PATHS = ("train_file", "test_file", "output_dir", "model_name_or_path", "chat_template_path", "resume_from_checkpoint")
# The ways to give the training rows, with the settings that have an effect only with them.
WAYS = {
    "train_file": ("test_file",),
    "dataset_name": ("dataset_config", "dataset_streaming"),
    "datasets": ("streaming", "test_split_size"),
}
LOCAL = ("train", "test")  # the splits of local files, whatever those of a dataset are called
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

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.in_recipe: set[str] = set()

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        if "torch_dtype" in values:  # the old name, which most public recipes have
            old = values.pop("torch_dtype")
            if values.setdefault("dtype", old) != old:
                self.error(f"dtype is {values['dtype']} and torch_dtype, its old name, is {old}: give dtype only")
        self.in_recipe = set(values)
        for action in self._actions:
            value = values.get(action.dest)
            if isinstance(value, (list, dict)) and action.nargs is None and action.type in (int, float):
                self.error(f"{action.dest}: {value!r} is not of type {action.type.__name__}")
            # argparse checks choices for the command line only.
            if action.choices and value is not None and str(value) not in map(str, action.choices):
                known = ", ".join(map(repr, action.choices))
                hint = ""
                if isinstance(value, bool):
                    word = "yes" if value else "no"
                    hint = f': YAML reads {word} without quotes as {value}; write "{word}" in quotes'
                self.error(f"{action.dest}={value!r} is not one of {known}{hint}")
        self._check_mixture(values.get("datasets") or [])
        values = {key: _numbers_in(value) for key, value in values.items()}
        # argparse converts and checks no default but text.
        text = {key: str(value) if isinstance(value, (bool, int, float)) else value for key, value in values.items()}
        return super().set_defaults_with_config(**text)

    def _check_mixture(self, datasets: Any) -> None:
        known = [field.name for field in fields(DatasetConfig)]
        for entry in datasets if isinstance(datasets, list) else [datasets]:
            if not isinstance(entry, dict) or "path" not in entry or entry.keys() - set(known):
                self.error(
                    f"datasets: {entry!r:.100} is no entry of TRL's, which is a mapping of {', '.join(known)}, with "
                    "path. Axolotl's `type` has no counterpart: give a local file as train_file, whose columns tell"
                )

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"The settings cannot be read: {message}. {SETTINGS}")


def _numbers_in(value: Any) -> Any:
    """YAML 1.1, which PyYAML reads, takes 1e-1 for text: within lists and mappings no field converts it."""
    if isinstance(value, dict):
        return {key: _number(_numbers_in(each)) for key, each in value.items()}
    return [_number(_numbers_in(each)) for each in value] if isinstance(value, list) else value


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would take the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            name, line = getattr(key, "value", None), key.start_mark.line + 1
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(name, str):
                if name in lines:
                    raise ValueError(
                        f"{name} stands twice in the recipe, in lines {lines[name]} and {line}. Leave one out. "
                        "Nothing was run."
                    )
                lines[name] = line
        return super().construct_mapping(node, deep)


def _refuse_repeated_keys(argv: Sequence[str]) -> None:
    if "--config" in argv[:-1]:
        with open(argv[argv.index("--config") + 1], encoding="utf-8") as file:
            yaml.load(file, _StrictLoader)  # noqa: S506, a safe loader


class Recipe(NamedTuple):
    """A recipe as it was read."""

    script: BeftScriptArguments
    training: Any  # a BeftSFTConfig, or what the recipe was read as
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


def parse_recipe(argv: Sequence[str] | None = None, config: type = BeftSFTConfig) -> Recipe:
    """Reads `--config RECIPE.yaml` and the overrides after it with TRL's own parser.

    Args:
        argv: the command line. Default: that of the process.
        config: class of the training configuration, such as [`BeftGRPOConfig`].

    Raises:
        OSError, ValueError: for a file that is missing or not YAML, values of a wrong type, and keys that no field
            has, with the nearest one that exists.
    """
    dataclasses: Any = (BeftScriptArguments, config, ModelConfig, DatasetMixtureConfig)
    parser = RecipeParser(dataclasses)
    argv = [re.sub("^--torch[-_]dtype(?=$|=)", "--dtype", text) for text in (sys.argv[1:] if argv is None else argv)]
    try:
        _refuse_repeated_keys(argv)
        *arguments, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"The recipe is not YAML: {error}. Nothing was run.") from error
    if unknown:
        _refuse_unknown(parser, unknown)
    script_args, training_args, model_args, dataset_args = arguments
    given = parser.in_recipe | {text.lstrip("-").split("=")[0].replace("-", "_") for text in argv if text[:2] == "--"}
    _refuse_values(script_args, training_args, model_args, given)
    for holder in (script_args, training_args, model_args):
        _expand_paths(holder)
    training_args.model_init_kwargs = _model_init_kwargs(training_args, model_args, given)
    return Recipe(script_args, training_args, model_args, dataset_args)


def _refuse_unknown(parser: RecipeParser, unknown: Sequence[str]) -> None:
    known = [action.dest for action in parser._actions]
    keys = [text.lstrip("-").split("=")[0] for text in unknown if text.startswith("--")] or unknown
    suggestions = {key: difflib.get_close_matches(key, known, n=1, cutoff=0.8) for key in keys}
    raise ValueError(
        "Unknown settings: "
        + ", ".join(key + (f" (did you mean {near[0]}?)" if near else "") for key, near in suggestions.items())
        + f". {SETTINGS}"
    )


def _refuse_values(script_args: Any, training_args: Any, model_args: Any, given: Collection[str]) -> None:
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is missing: name a model of the hub or a folder.")
    if model_args.use_peft:
        raise ValueError(
            "use_peft=True asks for a LoRA adapter next to the BEFT one: the two exclude each other. Leave it out "
            "and set bias_term, or use TRL's own sft.py for LoRA."
        )
    given_up = [field.name for field in fields(model_args) if field.name.startswith(PEFT_FIELDS)]
    given_up = [name for name in given_up if name in given]
    if given_up:
        raise ValueError(f"{', '.join(given_up)} has no effect: BEFT trains a bias, no LoRA matrices. Leave it out.")
    if script_args.answers < 0:
        raise ValueError(f"answers={script_args.answers} cannot be: give 0 or a number of held-out rows.")
    if not training_args.learning_rate and training_args.relative_learning_rate is None:
        raise ValueError("learning_rate=0 trains nothing: give a number above 0, or relative_learning_rate.")


def _expand_paths(holder: Any) -> None:
    """Puts the user's folder in the place of `~` in the paths of a configuration."""
    for name in PATHS:
        path = getattr(holder, name, None)
        if isinstance(path, str):
            if "\0" in path or not path.strip():
                raise ValueError(f"{name}={path!r} is no path. Give one, or leave it out.")
            setattr(holder, name, os.path.expanduser(path))


def _model_init_kwargs(training_args: Any, model_args: Any, given: Collection[str]) -> dict[str, Any]:
    """What the model is loaded with: `model_init_kwargs`, and the settings that stand for some of them."""
    init = training_args.model_init_kwargs or {}
    if (model_args.load_in_8bit or model_args.load_in_4bit) and "quantization_config" in init:
        raise ValueError(
            "load_in_8bit or load_in_4bit excludes the quantization_config of model_init_kwargs: give one of them."
        )
    for dtype in (model_args.dtype, init.get("dtype")):
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is not one of {', '.join(filter(None, DTYPES))}.")
    for key, name in INIT_FIELDS.items():
        value = getattr(model_args, name)
        if name in given and key in init and init[key] != value:
            raise ValueError(
                f"{name}={value!r} and {key}={init[key]!r} of model_init_kwargs differ: give one of them."
            )
    return {key: getattr(model_args, name) for key, name in INIT_FIELDS.items()} | init


def load_rows(
    script_args: BeftScriptArguments, dataset_args: DatasetMixtureConfig, chat: bool
) -> DatasetDict | IterableDatasetDict:
    """Loads the training and, if there are any, the held-out rows.

    Args:
        script_args: names the files or the dataset.
        dataset_args: a `datasets` mixture, as TRL's own scripts take it.
        chat: whether the tokenizer has a chat template; decides what Alpaca rows become.

    Returns:
        The splits under their names, those of `train_file` and `test_file` as "train" and "test".
        Alpaca columns (`instruction`, `input`, `output`) become prompt and completion.

    Raises:
        FileNotFoundError, ValueError: for a missing file, an unknown kind of file, or a missing split.
    """
    files = dict(zip(LOCAL, (script_args.train_file, script_args.test_file), strict=True))
    given = {**vars(script_args), **vars(dataset_args)}
    named = [way for way in WAYS if given[way]]
    if len(named) != 1:
        raise ValueError(
            f"Give the training rows in exactly one way, {', '.join(WAYS)}; got "
            f"{' and '.join(named) or 'none of them'}."
        )
    lost = {name: way for way, names in WAYS.items() if way not in named for name in names if given[name]}
    if lost:
        name, way = next(iter(lost.items()))
        raise ValueError(
            f"{name}={given[name]!r} has an effect only with {way}, and the rows come from {named[0]}. Leave it out, "
            f"or give the rows by {way}."
        )
    train, test = split_names(script_args)
    if train == test:
        raise ValueError(
            f"dataset_train_split and dataset_test_split are both {train!r}: the run would be measured on what it "
            "learns. Name another dataset_test_split."
        )
    if script_args.train_file:
        rows = DatasetDict({split: read_file(file) for split, file in files.items() if file is not None})
    elif dataset_args.datasets:
        rows = get_dataset(dataset_args)
    else:
        rows = load_dataset(
            script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
        )
    if train not in rows:
        raise ValueError(f"There is no split {train!r}, only {', '.join(rows)}.")
    for split, dataset in rows.items():
        rows[split] = as_prompts(dataset, chat, files.get(split) or f"the split {split}")
    return rows


def as_prompts(dataset: Any, chat: bool, name: str) -> Any:
    """Rows with Alpaca's columns as prompt and completion, and others as they are.

    Args:
        dataset (`Dataset` or `IterableDataset`): the rows.
        chat: whether they become turns of a conversation, see [`alpaca_to_prompt`].
        name: of the rows, for messages.

    Raises:
        ValueError: for a cell that is no text.
    """
    columns = set(dataset.column_names or next(iter(dataset), {}))
    if not columns >= ALPACA_COLUMNS:
        return dataset
    warn_of_unread(dataset, name, (*ALPACA_COLUMNS, "input"))
    options = {"chat": chat, "name": name}
    return dataset.map(_checked_alpaca, with_indices=True, fn_kwargs=options, remove_columns=list(columns))


def _checked_alpaca(row: dict[str, Any], number: int, chat: bool, name: str) -> dict[str, Any]:
    for column in ("instruction", "output"):
        if not isinstance(row[column], str) or not row[column].strip():
            found = "empty" if row[column] in (None, "") else f"{row[column]!r:.60}"
            raise ValueError(
                f"Row {number + 1} of {name}: {column!r} is {found}, and must be text. Complete the row, or take it "
                "out."
            )
    if not isinstance(row.get("input") or "", str):
        raise ValueError(f"Row {number + 1} of {name}: 'input' is {row['input']!r:.60}, and must be text or empty.")
    return alpaca_to_prompt(row, chat)


def alpaca_to_prompt(row: dict[str, Any], chat: bool) -> dict[str, Any]:
    """One Alpaca row (`instruction`, optional `input`, `output`) as TRL's prompt-completion format."""
    question = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
    if chat:
        return {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        }
    return {"prompt": f"{question}\n\nAnswer:", "completion": f" {row['output']}"}


def split_names(script_args: BeftScriptArguments) -> tuple[str, str]:
    """The names of the training and of the held-out rows in what [`load_rows`] gives."""
    if script_args.train_file:
        return LOCAL
    return script_args.dataset_train_split, script_args.dataset_test_split


def held_out_rows(
    rows: DatasetDict | IterableDatasetDict, script_args: BeftScriptArguments, training_args: BeftSFTConfig
) -> Dataset | IterableDataset | None:
    """The held-out split, if there is one.

    Raises:
        ValueError: if the run wants to evaluate or to answer held-out rows, and there are none that it could.
    """
    held_out = rows.get(split_names(script_args)[1])
    strategy = IntervalStrategy(training_args.eval_strategy)
    if held_out is None and (strategy != "no" or training_args.eval_on_start):
        raise ValueError(
            f"eval_strategy={strategy.value!r} with eval_on_start={training_args.eval_on_start} needs "
            f"held-out rows: give test_file, or a dataset_test_split among {', '.join(rows)}, or set "
            "eval_strategy='no' and eval_on_start=False."
        )
    if script_args.answers:
        columns = set(held_out.column_names or next(iter(held_out), {})) if held_out is not None else set()
        if not {"prompt", "completion"} <= columns:
            found = ", ".join(sorted(columns)) or "no held-out rows"
            raise ValueError(
                f"answers={script_args.answers} compares answers with the completions of held-out rows, which need "
                f"prompt and completion (or Alpaca's columns): found {found}. Give such a test_file, or leave "
                "answers out."
            )
    return held_out
