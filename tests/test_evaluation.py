"""The figures of an evaluation, against TRL's preparation and a computation row by row."""

import json

import pytest
import torch
from conftest import make_llama, make_opt, make_rows, make_tokenizer, of_term, saved
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from beft_trl import BeftSFTConfig, BeftSFTTrainer, merge_adapter
from beft_trl.cli.evaluate import evaluate_targets
from beft_trl.evaluation import classes_of, confusion, encode, evaluate, prefer, row_losses, share_right, write


TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def turns(rows: Dataset) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "completion": [{"role": "assistant", "content": row["completion"].strip()}],
            }
            for row in rows
        ]
    )


def log_likelihood(model, tokenizer, prompt: str, completion: str) -> tuple[float, int]:
    """Of a completion and its end, one token after the other, each in a forward pass of its own."""
    tokens = tokenizer(prompt)["input_ids"]
    total, answer = 0.0, [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
    for token in answer:
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, -1]
        total += functional.log_softmax(logits.double(), -1)[token].item()
        tokens = [*tokens, token]
    return total, len(answer)


@pytest.mark.parametrize("form", ["text", "turns"])
def test_rows_are_encoded_as_trl_prepares_them(make_config, form):
    rows, tokenizer = make_rows(6), make_tokenizer()
    if form == "turns":
        rows, tokenizer.chat_template = turns(rows), TEMPLATE
    trainer = BeftSFTTrainer(make_llama(), make_config(), train_dataset=rows, processing_class=tokenizer)
    for row, prepared in zip(rows, trainer.train_dataset, strict=True):
        encoded = encode(tokenizer, row)
        assert encoded["input_ids"] == list(prepared["input_ids"])
        assert encoded["labels"] == trainer.data_collator([prepared])["labels"][0].tolist()


@pytest.mark.parametrize("make", [make_llama, make_opt])
def test_loss_and_ranks_are_those_of_a_computation_token_by_token(make):
    model, tokenizer, rows = make().eval(), make_tokenizer(), make_rows(12)
    rows = rows.map(lambda row: {"completion": f" w{int(row['prompt'].split()[0][1:]) % 3} w9"})
    found = evaluate(model, tokenizer, list(rows), batch_size=5)
    assert found.choices == ["w0 w9", "w1 w9", "w2 w9"]
    each = [log_likelihood(model, tokenizer, row["prompt"], row["completion"]) for row in rows]
    assert found.tokens == sum(count for _, count in each) == 36
    assert found.loss == pytest.approx(-sum(total for total, _ in each) / 36, rel=1e-5)
    for row, (total, count) in zip(row_losses(model, [encode(tokenizer, row) for row in rows]), each, strict=True):
        assert (row.nll, row.tokens) == (pytest.approx(-total, rel=1e-5), count)
    likeliest = [
        max(found.choices, key=lambda choice: log_likelihood(model, tokenizer, row["prompt"], choice)[0])
        for row in rows
    ]
    rights = [row["completion"].strip() for row in rows]
    assert found.ranked == sum(map(str.__eq__, likeliest, rights)) / 12
    for right in found.choices:
        for answer in found.choices:
            pairs = list(zip(rights, likeliest, strict=True))
            assert found.preferred[right][answer] == pairs.count((right, answer))


def test_written_answers_are_those_of_greedy_decoding():
    model, tokenizer, rows = make_llama().eval(), make_tokenizer(), make_rows(6)
    expected = []
    for row in rows:
        tokens = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        start = tokens.shape[1]
        for _ in range(4):
            best = model(tokens).logits[0, -1].argmax()
            tokens = torch.cat([tokens, best.view(1, 1)], 1)
            if best == tokenizer.eos_token_id:
                break
        expected.append(tokenizer.decode(tokens[0, start:], skip_special_tokens=True).strip())
    model.generation_config.update(num_beams=2, repetition_penalty=5.0)
    rows = [{**row, "completion": f" {answer}"} for row, answer in zip(rows, expected, strict=True)]
    rows[0]["completion"] = " w60"
    found = evaluate(model, tokenizer, rows, choices=[], batch_size=4, max_new_tokens=4)
    assert found.answers == expected
    assert found.exact == 5 / 6
    assert found.ranked is None and found.written == {}


def test_choices_that_make_a_token_with_the_prompt_are_ranked_by_the_whole_text():
    """Of "xa" and "b" the tokens are x, ab; of "xa" and "c" they are x, a, c."""
    words = {word: number for number, word in enumerate(["<pad>", "</s>", "x", "a", "b", "c", "ab"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(words, [("a", "b")])), pad_token="<pad>", eos_token="</s>"
    )
    choices, preferred, expected = ["b", "c"], [], []
    for seed in range(6):
        model = make_llama(seed).eval()
        totals = []
        for choice in choices:
            tokens = torch.tensor([[*tokenizer("xa" + choice)["input_ids"], tokenizer.eos_token_id]])
            with torch.no_grad():
                likelihoods = functional.log_softmax(model(tokens).logits[0, :-1].double(), -1)
            totals.append(likelihoods.gather(1, tokens[0, 1:, None]).sum().item())
        expected.append(choices[totals.index(max(totals))])
        preferred += prefer(model, tokenizer, [{"prompt": "xa", "completion": "b"}], choices)
    assert preferred == expected


def test_a_row_is_right_if_greedy_decoding_writes_it():
    model, tokenizer = make_llama().eval(), make_tokenizer()
    encoded, expected = [], []
    for number, row in enumerate(make_rows(8)):
        prompt = tokenizer(row["prompt"])["input_ids"]
        greedy = model.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False)[0, len(prompt) :].tolist()
        answer = [*greedy[:-1], greedy[-1] if number % 2 else (greedy[-1] + 1) % 60]
        encoded.append({"input_ids": [*prompt, *answer], "labels": [-100] * len(prompt) + answer})
        expected.append(bool(number % 2))
    assert [row.right for row in row_losses(model, encoded, batch_size=3)] == expected


def test_a_row_without_a_label_is_not_right_and_has_no_part_in_the_share():
    model, tokens = make_llama().eval(), [3, 4, 5]
    likeliest = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
    rows = [
        {"input_ids": tokens, "labels": [-100] * 3},
        {"input_ids": [*tokens, likeliest], "labels": [-100, -100, -100, likeliest]},
    ]
    found = row_losses(model, rows)
    assert [row.right for row in found] == [False, True] and share_right(found) == 1.0
    assert not row_losses(model, rows[:1])[0].right


def greedy_tokens(model, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, -1]
        logits[:3] = -torch.inf  # padding, end and unknown, which are no words
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def test_an_answer_ends_where_the_tokenizer_says_if_the_model_has_another_end():
    """As of a run with `eos_token`, which the base does not know of."""
    model, tokenizer, row = make_llama().eval(), make_tokenizer(), make_rows(1)[0]
    model.generation_config.suppress_tokens = [0, 1, 2]
    tokens = greedy_tokens(model, tokenizer(row["prompt"])["input_ids"], 6)
    end = next(number for number in range(1, 6) if tokens[number] not in tokens[:number])
    expected = tokenizer.decode(tokens[:end])
    tokenizer.add_special_tokens({"eos_token": tokenizer.convert_ids_to_tokens(tokens[end])})
    assert write(model, tokenizer, [row], max_new_tokens=8) == [expected]


def test_a_long_completion_can_be_written_and_one_that_goes_on_is_not_taken_for_it():
    model, tokenizer, row = make_llama().eval(), make_tokenizer(), make_rows(1)[0]
    model.generation_config.suppress_tokens = [0, 1, 2]
    words = tokenizer.decode(greedy_tokens(model, tokenizer(row["prompt"])["input_ids"], 13)).split()
    for count in (12, 8, 2):
        row["completion"] = " " + " ".join(words[:count])
        found = evaluate(model, tokenizer, [row], choices=[])
        assert found.answers[0].split() == words[: max(8, count + 1)] and found.exact == 0


def test_nothing_of_a_training_run_is_touched():
    model = make_opt(dropout=0.1).train()
    state = torch.random.get_rng_state()
    row_losses(model, [encode(make_tokenizer(), row) for row in make_rows(4)])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training


def test_classes_and_their_confusion():
    assert classes_of(["a", "b", "a", "b"]) == ["a", "b"]
    assert classes_of(["a", "b", "c"]) == classes_of(["a", "a"]) == []
    counted = confusion(["a", "a", "b"], ["a", "c", "a"], ["a", "b"])
    assert counted == {"a": {"a": 1, "b": 0, "(other)": 1}, "b": {"a": 1, "b": 0, "(other)": 0}}
    with pytest.raises(ValueError, match="'w1 w1'.*yes, no"):
        evaluate(None, None, [{"prompt": "w1", "completion": " w1 w1"}], choices=["yes", "no"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, an adapter on it and both merged, and rows of three classes."""
    folder = tmp_path_factory.mktemp("eval")
    make_llama().save_pretrained(folder / "base")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "base")
    rows = make_rows(24).map(lambda row: {"completion": f" w{int(row['prompt'].split()[0][1:]) % 3}"})
    rows.to_json(folder / "rows.jsonl")
    settings = BeftSFTConfig(
        str(folder / "adapter"), bias_term="value", max_steps=12, use_cpu=True, bf16=False, report_to="none",
        save_strategy="no", disable_tqdm=True, relative_learning_rate=0.2,
    )  # fmt: skip
    trainer = BeftSFTTrainer(str(folder / "base"), settings, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    merge_adapter(folder / "adapter", folder / "merged")
    return folder


def test_eval_puts_base_adapter_and_merged_model_side_by_side(beft, folder, tmp_path):
    out = tmp_path / "new" / "figures.json"
    names = [folder / "merged", folder / "adapter"]
    run = beft("eval", *names, "--test_file", folder / "rows.jsonl", "--json", out)
    assert run.returncode == 0, run.stderr
    found = json.loads(out.read_text())
    models = {model["kind"]: model for model in found["models"]}
    assert list(models) == ["model", "base", "adapter"]
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for kind, name in {"base": "base", "model": "merged"}.items():
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        totals = [log_likelihood(model, make_tokenizer(), row["prompt"], row["completion"]) for row in rows]
        assert models[kind]["loss"] == pytest.approx(-sum(total for total, _ in totals) / 48, rel=1e-5)
    for figure in ("loss", "exact", "ranked"):
        assert models["adapter"][figure] == pytest.approx(models["model"][figure], rel=1e-5)
    assert models["adapter"]["loss"] < models["base"]["loss"]
    for model in models.values():
        assert sum(sum(row.values()) for row in model["written"].values()) == 24
        assert f"{model['loss']:.4f}" in run.stdout
    assert "Written by" in run.stdout


@pytest.mark.parametrize("options", [{"bias": "all"}, {"modules_to_save": ["lm_head"]}])
def test_what_another_adapter_trained_in_the_base_is_not_left_for_the_next(folder, tmp_path, options):
    make_opt(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM", **options)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    adapted.save_pretrained(tmp_path / "lora")
    saved(make_opt(tie_word_embeddings=False), tmp_path, of_term(make_opt()))
    rows = str(folder / "rows.jsonl")
    alone = evaluate_targets([str(tmp_path / "adapter")], rows)
    after = evaluate_targets([str(tmp_path / "lora"), str(tmp_path / "adapter")], rows)
    assert alone[-1] == after[-1] and after[0] == alone[0]
    assert after[1][1].loss != after[0][1].loss


WRONG = {
    "no file": (["base", "--test_file", "none.jsonl"], "none.jsonl does not exist"),
    "no target": (["nothing/here/it", "--test_file", "rows.jsonl"], "is no folder"),
    "neither": ([".", "--test_file", "rows.jsonl"], "neither a model nor an adapter"),
    "no base": (["adapter", "--base", "./gone", "--test_file", "rows.jsonl"], "Give it as --base"),
    "text": (["base", "--test_file", "text.jsonl"], "has the columns text"),
    "turns": (["base", "--test_file", "turns.jsonl"], "no chat template"),
    "choice": (["base", "--test_file", "rows.jsonl", "--choices", "w0,w1"], "'w2' is none of the choices w0, w1"),
    "dtype": (["base", "--test_file", "rows.jsonl", "--dtype", "int4"], "dtype='int4' is not one of"),
}


@pytest.mark.parametrize("case", WRONG)
def test_eval_says_what_is_wrong(beft, folder, monkeypatch, case):
    monkeypatch.chdir(folder)
    Dataset.from_list([{"text": "w1 w2"}]).to_json("text.jsonl")
    turns(make_rows(2)).to_json("turns.jsonl")
    arguments, message = WRONG[case]
    run = beft("eval", *arguments, "--json", "never.json")
    assert run.returncode == 1
    assert message in " ".join(run.stderr.split())
    assert not (folder / "never.json").exists()
