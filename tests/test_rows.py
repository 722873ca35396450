"""Files that cannot be read, cells that are not text, turns that would be lost, and tokens that do not exist."""

import gzip
import json
import re
from contextlib import contextmanager

import pytest
from conftest import VOCABULARY, make_llama, make_opt, make_rows, make_tokenizer
from datasets import Dataset, IterableDataset

from beft_trl.cli.data_files import read_file
from beft_trl.data.labels import check_tokens, position_limit
from beft_trl.data.rows import check_cells, check_roles, explain_unrendered, prepare_rows


GOOD = '{"prompt": "a", "completion": "b"}\n'
FILES = {
    "missing brace": ("r.jsonl", GOOD + '{"prompt": "a"\n' + GOOD, "line 2"),
    "a number among texts": ("r.jsonl", GOOD + '{"prompt": 3, "completion": "b"}\n', "line 2: 'prompt'"),
    "a row that is text": ("r.jsonl", GOOD + '"text"\n', "line 2"),
    "a row that is null": ("r.jsonl", GOOD + "null\n", "line 2"),
    "a list of lists": ("r.json", "[[1]]", "line 1"),
    "UTF-16": ("r.jsonl", GOOD.encode("utf-16"), "line 1"),
    "Latin-1": ("r.csv", "prompt,completion\na,b\nä,c\n".encode("latin-1"), "line 3"),
    "Latin-1 after the first buffer": ("r.jsonl", (GOOD * 999 + "ä").encode("latin-1"), "line 1000"),
    "gzip": ("r.json", gzip.compress(GOOD.encode()), "gzip"),
    "ragged": ("r.csv", "prompt,completion\na,b\nc,d,e\n", "line 3: 3 cells"),
    "an open quote": ("r.csv", 'prompt,completion\na,"b\n', "line"),
    "no parquet": ("r.parquet", "text", "r.parquet"),
    "empty": ("r.jsonl", "", "empty"),
    "no rows": ("r.json", "[]", "no rows"),
    "another kind": ("r.txt", "text", "no known kind"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_cannot_be_read_is_named_with_its_line(tmp_path, kind):
    name, content, fact = FILES[kind]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(fact)) as raised:
        read_file(tmp_path / name)
    assert name in str(raised.value)


@pytest.mark.parametrize("name", ["rows.jsonl", "[a]ü.jsonl", "rows.JSONL"])
def test_a_file_of_any_name_is_read(tmp_path, name):
    (tmp_path / name).write_text(GOOD * 3, encoding="utf-8-sig" if "ü" in name else "utf-8")
    assert read_file(tmp_path / name)[2] == {"prompt": "a", "completion": "b"}


def test_a_file_of_one_value_over_many_lines_is_read(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "a"}, {"text": None}, {"text": "b"}], indent=2))
    assert read_file(tmp_path / "rows.json")["text"] == ["a", None, "b"]


def test_a_column_that_nothing_learns_from_may_be_of_many_kinds(tmp_path):
    lines = [{"text": "a", "note": 1}, {"text": "b", "note": 2}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_file(tmp_path / "rows.jsonl")["text"][:] == ["a", "b"]
    lines[1]["note"] = ["text"]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    try:
        assert read_file(tmp_path / "mixed.jsonl")["text"][:] == ["a", "b"]
    except ValueError as error:  # an older version of datasets has no type for it
        assert "line 2: 'note'" in str(error)


def test_words_of_a_csv_are_words_and_an_empty_cell_is_empty(tmp_path):
    (tmp_path / "rows.csv").write_text("instruction,input,output\nCode of Namibia?,,NA\nSay,null,nan\n")
    assert read_file(tmp_path / "rows.csv").to_list() == [
        {"instruction": "Code of Namibia?", "input": "", "output": "NA"},
        {"instruction": "Say", "input": "null", "output": "nan"},
    ]


TURN, ANSWER = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}
CELLS = {
    "null completion": {"prompt": "a", "completion": None},
    "blank completion": {"prompt": "a", "completion": "  "},
    "null text": {"text": None},
    "number": {"text": 3},
    "null prompt": {"prompt": None, "completion": "b"},
    "no turns": {"messages": []},
    "null content": {"messages": [{"role": "user", "content": None}]},
    "no role": {"messages": [{"content": "w1"}]},
    "blank answer": {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": " "}]},
    "blank answer of another name": {"conversations": [{"from": "gpt", "value": ""}]},
    "null turn": {"messages": [None]},
    "no value": {"conversations": [{"from": "human", "value": None}]},
}


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_cell_that_is_no_text_is_named_with_its_row(kind, streaming):
    row = CELLS[kind]
    rows = Dataset.from_list([row, row])
    if streaming:
        rows = IterableDataset.from_generator(lambda: iter([row]))
    with pytest.raises(
        ValueError, match=rf"Row 1 of rows: .*{next(reversed(row)) if 'prompt' not in kind else 'prompt'}"
    ):
        check_cells(rows, "rows")


def test_the_row_of_a_bad_cell_is_found_among_many():
    rows = [{"prompt": "", "completion": "b"}] * 12_345 + [{"prompt": "a", "completion": ""}]
    with pytest.raises(ValueError, match="Row 12346 of rows: 'completion'"):
        check_cells(Dataset.from_list(rows), "rows")


def test_a_blank_cell_of_a_stream_stops_the_run_when_it_comes(make_trainer):
    good = {"prompt": "w1", "completion": " w2"}
    rows = IterableDataset.from_generator(lambda: iter([good] * 6 + [good | {"completion": ""}]))
    trainer = make_trainer(make_llama(), rows, bias_term="value")
    with pytest.raises(ValueError, match="Row 7 of train_dataset: 'completion'"):
        trainer.train()
    rows = IterableDataset.from_generator(lambda: iter([good] * 64))
    make_trainer(make_llama(), rows, bias_term="value").train()


def test_calls_of_tools_need_no_content():
    check_cells(
        Dataset.from_list([{"messages": [TURN, {"role": "assistant", "content": None, "tool_calls": [{"a": 1}]}]}]),
        "rows",
    )


def ids(trainer):
    return [list(row) for row in trainer.train_dataset["input_ids"]]


def test_a_text_column_next_to_a_completion_changes_nothing_that_is_learnt(make_trainer):
    """TRL by itself would add the end of the sequence to the text, and learn the completion without it."""
    plain = make_trainer(rows=make_rows(4))
    three = make_trainer(rows=make_rows(4).map(lambda row: {"text": "unused"}))
    assert ids(three) == ids(plain)
    assert all(row[-1] == make_tokenizer().eos_token_id for row in ids(three))


ROLES = (
    "{% for m in messages %}{% if m['role'] in ('user', 'assistant', 'system') %}{{ m['content'] + ' ' }}{% endif %}"
    "{% endfor %}"
)


def chatting():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = ROLES
    return tokenizer


@pytest.mark.parametrize("roles", [("human", "gpt"), ("user", "bot"), ("user", "model")])
@pytest.mark.parametrize("form", ["conversations", "messages"])
def test_turns_of_other_names_of_roles_are_learnt(make_trainer, monkeypatch, roles, form):
    key, content = ("from", "value") if form == "conversations" else ("role", "content")
    rows = Dataset.from_list([{form: [{key: roles[0], content: "w1 w2"}, {key: roles[1], content: "w3 w4"}]}] * 4)
    monkeypatch.setattr("conftest.make_tokenizer", chatting)
    trainer = make_trainer(rows=rows)
    assert ids(trainer) == [chatting()("w1 w2 w3 w4 ")["input_ids"]] * 4


def test_rows_of_other_names_of_roles_are_learnt_after_rows_of_the_usual_ones():
    """As in a mixture. A template that renders any role would have them learnt as they are."""
    rows = [[{"role": role, "content": "w1"} for role in roles] for roles in (("user", "assistant"), ("human", "gpt"))]
    prepared = prepare_rows(Dataset.from_list([{"messages": turns} for turns in rows]))
    assert [[turn["role"] for turn in row["messages"]] for row in prepared] == [["user", "assistant"]] * 2


def test_a_role_that_the_template_passes_over_is_refused_in_whatever_row():
    spoken = [{"messages": [TURN, ANSWER]}] * 200
    lost = {"messages": [TURN, {"role": "narrator", "content": "w5"}, ANSWER]}
    with pytest.raises(ValueError, match="'narrator'"):
        check_roles(Dataset.from_list([*spoken, lost]), "rows", chatting())
    check_roles(Dataset.from_list(spoken), "rows", chatting())


@pytest.mark.parametrize(
    "shown", ["m['content'] | tojson", "m['content'].split('</think>')[-1]", "m['content'] | upper"]
)
def test_a_turn_that_the_template_rewrites_is_not_lost(shown):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ " + shown + " }}{% endfor %}"
    answer = {"role": "assistant", "content": 'w5 "w6" </think> w7'}
    check_roles(Dataset.from_list([{"messages": [TURN, answer]}]), "rows", tokenizer)


def test_a_role_without_words_is_not_lost():
    rows = [{"messages": [{"role": "system", "content": ""}, TURN, ANSWER]}]
    check_roles(Dataset.from_list(rows), "rows", chatting())


def test_a_template_that_raises_names_the_row(make_trainer, monkeypatch):
    def strict():
        tokenizer = make_tokenizer()
        tokenizer.chat_template = (
            "{% if messages[0]['role'] != 'user' %}{{ raise_exception('must begin with user') }}{% endif %}" + ROLES
        )
        return tokenizer

    rows = Dataset.from_list([{"messages": [TURN, ANSWER]}] * 99 + [{"messages": [ANSWER, TURN]}])
    with pytest.raises(ValueError, match="Row 100 of rows.*must begin with user"):
        explain_unrendered(rows, "rows", strict())
    monkeypatch.setattr("conftest.make_tokenizer", strict)
    with pytest.raises(ValueError, match="Row 100 of train_dataset.*must begin with user"):
        make_trainer(rows=rows)


def test_masked_rows_are_dropped_by_the_processes_of_the_dataset_first_by_the_main_one(make_trainer, monkeypatch):
    order, filtered = [], Dataset.filter

    @contextmanager
    def first(self):
        order.append("enter")
        yield
        order.append("leave")

    def noting(self, *values, **named):
        if "desc" not in named:  # TRL's own filter has one
            order.append(named["num_proc"])
        return filtered(self, *values, **(named | {"num_proc": None}))

    monkeypatch.setattr("accelerate.PartialState.main_process_first", first)
    monkeypatch.setattr(Dataset, "filter", noting)
    monkeypatch.setattr(Dataset, "map", lambda self, *values, mapped=Dataset.map, **named: mapped(
        self, *values, **(named | {"num_proc": None})
    ))  # fmt: skip
    make_trainer(dataset_num_proc=3)
    at = order.index(3)
    assert order[at - 1 : at + 2] == ["enter", 3, "leave"]


def test_held_out_rows_are_looked_at_as_those_to_train_on_are(make_trainer):
    for rows, fact in (([{"question": "a"}], "question"), ([{"text": None}], "Row 1 of eval_dataset")):
        with pytest.raises(ValueError, match=fact):
            make_trainer(trainer={"eval_dataset": Dataset.from_list(rows)})


FORMATS = {
    "text and turns": {"prompt": "w1", "completion": [ANSWER]},
    "a text next to a prompt without completion": {"text": "w1", "prompt": "w2"},
    "conversations of text": {"conversations": "a"},
    "ids of text": {"input_ids": "3 4"},
    "ids of words": {"input_ids": ["w3", "w4"]},
    "ids of lists": {"input_ids": [[3, 4]]},
    "labels of text": {"input_ids": [3, 4], "labels": "34"},
}


@pytest.mark.parametrize("kind", FORMATS)
def test_columns_that_do_not_fit_each_other_are_refused(make_trainer, kind):
    with pytest.raises(ValueError, match=list(FORMATS[kind])[-1]):
        make_trainer(rows=Dataset.from_list([FORMATS[kind]] * 4))


@pytest.mark.parametrize("more", [{"labels": [3, 4]}, {"completion_mask": [1]}])
def test_rows_with_fewer_labels_than_tokens_are_refused(make_trainer, more):
    row = {"input_ids": [3, 4, 5]}
    good = {name: [1] * 3 for name in more}
    with pytest.raises(ValueError, match=r"Row 2 of train_dataset\b.*\b3\b"):
        make_trainer(rows=Dataset.from_list([row | good, row | more]))


def test_a_completion_mask_of_tokenized_rows_is_used_or_the_run_asks(make_trainer):
    rows = Dataset.from_list([{"input_ids": [3, 4, 5, 6], "completion_mask": [0, 0, 1, 1]}] * 4)
    with pytest.raises(ValueError, match=r"'completion_mask'.*completion_only_loss=True"):
        make_trainer(rows=rows)
    for only, labels in ((True, [-100, -100, 5, 6]), (False, [3, 4, 5, 6])):
        trainer = make_trainer(rows=rows, completion_only_loss=only)
        assert trainer.data_collator([trainer.train_dataset[0]])["labels"][0].tolist() == labels


def test_padding_in_tokenized_rows_is_refused_where_it_would_count(make_trainer):
    """The mask is not read: padding would be learnt, and seen by the tokens after it."""
    row = {"input_ids": [3, 4, 5, 0], "labels": [3, 4, 5, 0], "attention_mask": [1, 1, 1, 1]}
    make_trainer(rows=Dataset.from_list([row] * 4))
    learnt = row | {"attention_mask": [1, 1, 1, 0]}
    seen = {"input_ids": [0, 3, 4, 5], "labels": [-100, 3, 4, 5], "attention_mask": [0, 1, 1, 1]}
    for padded in (learnt, seen):
        with pytest.raises(ValueError, match=r"Row 3 of train_dataset.*'attention_mask'"):
            make_trainer(rows=Dataset.from_list([row] * 2 + [padded] * 2))
    make_trainer(rows=Dataset.from_list([learnt | {"labels": [3, 4, 5, -100]}] * 4))


@pytest.mark.parametrize(("column", "value", "told"), [("system", "w1", True), ("question", "", False)])
def test_a_column_that_looks_like_a_part_of_the_prompt_and_is_not_read_is_told_of(
    make_trainer, caplog, column, value, told
):
    rows = make_rows(8).map(lambda row: {column: value, "id": "7"})
    make_trainer(rows=rows)
    assert (f"train_dataset has '{column}'" in caplog.text) == told
    assert "'id'" not in caplog.text


def test_only_a_first_token_is_nothing_to_learn_from(make_trainer):
    """The loss of a causal model passes over the first label, which no token precedes."""
    for row in ({"input_ids": [3]}, {"input_ids": [3, 4], "labels": [3, -100]}):
        with pytest.raises(ValueError, match=r"\b4 rows.*completion_only_loss"):
            make_trainer(rows=Dataset.from_list([row] * 4))


TOKENS = {
    "beyond the vocabulary": {"input_ids": [3, VOCABULARY], "labels": [3, 4]},
    "below zero": {"input_ids": [3, -1], "labels": [3, 4]},
    "a label beyond the vocabulary": {"input_ids": [3, 4], "labels": [3, VOCABULARY]},
    "a label below zero": {"input_ids": [3, 4], "labels": [3, -5]},
}


@pytest.mark.parametrize("kind", TOKENS)
def test_a_token_that_the_model_does_not_have_is_named(make_trainer, kind):
    rows = Dataset.from_list([{"input_ids": [3, 4], "labels": [-100, 4]}, TOKENS[kind]])
    wrong = next(number for column in TOKENS[kind].values() for number in column if not 0 <= number < VOCABULARY)
    with pytest.raises(ValueError, match=rf"Row 2 of the train dataset.*{wrong}"):
        make_trainer(make_llama(), rows)


def test_held_out_rows_that_are_called_train_are_not_looked_at_in_the_place_of_those_to_train_on(make_trainer):
    rows = Dataset.from_list([{"input_ids": [3, 4], "labels": [-100, 4]}, TOKENS["below zero"]])
    with pytest.raises(ValueError, match="Row 2 of the train dataset"):
        make_trainer(make_llama(), rows, {"eval_dataset": {"train": rows.select([0])}})


@pytest.mark.parametrize("term", ["auto", "value"])
def test_labels_that_are_all_masked_are_refused_when_nothing_prepares_them(make_trainer, term):
    rows = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [-100] * 3}] * 8)
    with pytest.raises(ValueError, match="^None.* 8 rows.*completion_only_loss"):
        make_trainer(make_llama(), rows, bias_term=term, dataset_kwargs={"skip_prepare_dataset": True})


def test_a_row_beyond_the_table_of_positions_is_refused(make_trainer):
    rows = Dataset.from_list([{"input_ids": [5] * 65}])
    with pytest.raises(ValueError, match=r"\b65\b.*\b64\b.*max_length"):
        make_trainer(make_opt(), rows, max_length=None)
    assert position_limit(make_llama()) is None  # rotary positions have no table
    make_trainer(make_llama(), rows, max_length=None)


def test_what_is_in_range_passes():
    check_tokens(Dataset.from_list([{"input_ids": [0, VOCABULARY - 1], "labels": [-100, 0]}]), "train", VOCABULARY, 2)
    check_tokens([{"input_ids": [999]}], "train", 8, None)  # no Dataset: not looked at


BEST = {
    "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
    "load_best_model_at_end": True,
}  # fmt: skip


@pytest.mark.parametrize("metric", ["accuracy", "eval_nothing", "eval_a_loss"])
def test_a_metric_that_no_evaluation_gives_is_refused_before_the_run(make_trainer, metric):
    with pytest.raises(ValueError, match=f"metric_for_best_model='{metric}'"):
        make_trainer(trainer={"eval_dataset": make_rows(8)}, metric_for_best_model=metric, **BEST)


@pytest.mark.parametrize("metric", ["eval_loss", "mean_token_accuracy"])
def test_a_metric_of_the_evaluation_picks_the_best_checkpoint(make_trainer, metric):
    held_out = {"eval_dataset": make_rows(8)}
    trainer = make_trainer(trainer=held_out, metric_for_best_model=metric, bias_term="value", **BEST)
    trainer.train()
    assert trainer.state.best_model_checkpoint


def test_each_of_several_held_out_sets_gives_metrics_of_its_name(make_trainer):
    held_out = {"eval_dataset": {"a": make_rows(8), "b": make_rows(8)}}
    trainer = make_trainer(trainer=held_out, metric_for_best_model="a_loss", bias_term="value", **BEST)
    trainer.train()
    assert trainer.state.best_model_checkpoint


SCHEDULES = {
    "a setting that is not there": {"lr_scheduler_kwargs": {"no_such": 1}},
    "a word for a number": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": "low"}},
    "a word after the warm-up": {
        "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": "low"}, "warmup_steps": 5,
    },
    "a setting that is missing": {"lr_scheduler_type": "cosine_with_min_lr"},
    "a momentum above one": {"adam_beta1": 1.5},
    "an endless rate": {"relative_learning_rate": float("inf")},
    "an endless rate of scoring": {"score_learning_rate": float("inf")},
    "an epsilon below zero": {"adam_epsilon": -1.0},
    "arguments that are no pairs": {"optim_args": "nonsense"},
}  # fmt: skip


@pytest.mark.parametrize("kind", SCHEDULES)
def test_settings_that_make_no_optimizer_or_schedule_are_refused_before_the_run(make_trainer, kind):
    name = next(
        (name for name in ("lr_scheduler_type", "learning_rate") if name[:8] in str(SCHEDULES[kind])), "optim="
    )
    with pytest.raises(ValueError, match=name):
        make_trainer(**SCHEDULES[kind])


@pytest.mark.parametrize("settings", [{"optim": "galore_adamw"}, {"optim": "lomo"}, {"use_liger_kernel": True}])
def test_settings_of_packages_that_are_not_installed_are_refused_before_the_run(make_trainer, settings):
    with pytest.raises(ImportError, match="pip install"):
        make_trainer(**settings)


def test_rows_that_are_fewer_than_a_batch_which_is_dropped_are_refused(make_trainer):
    with pytest.raises(ValueError, match=r"dataloader_drop_last=True.*\b2 rows.*\b4\b"):
        make_trainer(rows=make_rows(2), dataloader_drop_last=True)
    make_trainer(rows=make_rows(4), dataloader_drop_last=True)
