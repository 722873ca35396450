"""Every mistake gets one clear error, and nothing half-written."""

import os
import re
import shutil

import pytest
import torch
from conftest import make_llama, make_opt, make_rows, make_tokenizer, trainer_in
from datasets import Dataset, IterableDataset
from peft import BeftConfig, LoraConfig, PeftModel, get_peft_model
from processes import python
from transformers import MambaConfig, MambaForCausalLM, OpenAIGPTConfig, OpenAIGPTLMHeadModel, TrainerCallback
from trl import SFTConfig

from beft_trl import BeftSFTConfig, BeftSFTTrainer, UnsupportedLayoutError
from beft_trl.tuner import delta


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias_term": "output"}, "bias_term='output'"),
        ({"score_method": "gradient"}, "score_method='gradient'"),
        ({"score_anchor": "mean"}, "score_anchor='mean'"),
        ({"score_steps": 0}, "score_steps=0"),
        ({"score_steps": -3}, "score_steps=-3"),
        ({"score_steps": 2.5}, "score_steps=2.5"),
        ({"score_learning_rate": 0.0}, "score_learning_rate=0.0"),
        ({"score_learning_rate": float("nan")}, "score_learning_rate=nan"),
        ({"relative_learning_rate": 0.0}, "relative_learning_rate=0.0"),
    ],
)
def test_settings_out_of_range(settings, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        BeftSFTConfig(str(tmp_path), use_cpu=True, **settings)


def test_more_scoring_steps_than_the_run_has(make_trainer):
    trainer = make_trainer(max_steps=6, score_steps=7)
    with pytest.raises(ValueError, match=r"score_steps=7\b.*\b6\b"):
        trainer.train()


def test_the_default_scoring_pass_shortens_itself_and_says_so(make_trainer, caplog):
    for run, steps in ((1, 1), (20, 2), (100, 3), (150, 5), (1000, 5)):
        trainer = make_trainer(make_llama(), max_steps=run, score_steps=None)
        assert trainer.score().steps == steps
        assert (f"takes {steps} of its usual 5 steps, since this run has {run}." in caplog.text) == (steps < 5)


def test_a_peft_config_next_to_bias_term(make_trainer):
    with pytest.raises(ValueError, match="peft_config=LoraConfig.*bias_term='auto'"):
        make_trainer(trainer={"peft_config": LoraConfig()})


def test_a_model_that_has_an_adapter(make_trainer):
    with pytest.raises(ValueError, match="merge_and_unload"):
        make_trainer(get_peft_model(make_opt(), LoraConfig(target_modules=["q_proj"])))


def test_ready_made_optimizers(make_trainer):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match="optimizers=.*optimizer_cls_and_kwargs"):
        make_trainer(trainer={"optimizers": (optimizer, None)})


def test_a_configuration_without_a_bias_term(tmp_path):
    with pytest.raises(TypeError, match=r"\bargs\b.*BeftSFTConfig.*\bSFTConfig"):
        BeftSFTTrainer(
            make_opt(),
            SFTConfig(str(tmp_path), use_cpu=True),
            train_dataset=make_rows(),
            processing_class=make_tokenizer(),
        )


@pytest.mark.parametrize("streaming", [False, True])
def test_an_empty_dataset(make_trainer, streaming):
    empty = IterableDataset.from_generator(lambda: iter(())) if streaming else Dataset.from_dict({"text": []})
    with pytest.raises(ValueError, match="^train_dataset.*empty"):
        make_trainer(rows=empty)


@pytest.mark.parametrize(
    "row", [{"question": "a", "answer": "b"}, {"prompt": "w1"}, {"completion": "w1"}, {"messages": "w1"}]
)
def test_columns_that_no_format_explains(make_trainer, row):
    with pytest.raises(ValueError, match=f"{', '.join(row)}.*'text'.*'messages'.*'input_ids'"):
        make_trainer(rows=Dataset.from_list([row]))


@pytest.mark.parametrize("settings", [{"max_length": 5}, {"max_length": 5, "packing": True}, {"max_length": None}])
def test_rows_whose_labels_are_all_masked(make_trainer, settings, caplog):
    masked = {"input_ids": [3, 4, 5, 6, 7, 8], "labels": [-100] * 6}
    supervised = {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}
    if not settings.get("packing"):
        trainer = make_trainer(rows=Dataset.from_list([masked, supervised, masked]), **settings)
        assert len(trainer.train_dataset) == 1
        assert "Dropped 2 of 3 rows of the train dataset" in caplog.text
    with pytest.raises(ValueError, match=r"^None\b.*train.*completion_only_loss"):
        make_trainer(rows=Dataset.from_list([masked, masked]), **settings)


def test_prompts_that_fill_max_length(make_trainer):
    with pytest.raises(ValueError, match=r"max_length=2\b.*completion_only_loss"):
        make_trainer(max_length=2)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1)),
            "Mamba.*q_proj",
        ),
        (OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=4)), "h.0.attn.c_attn"),
    ],
)
@pytest.mark.parametrize("by_name", [False, True])
def test_models_that_cannot_train_are_refused_before_weights_are_loaded(
    make_trainer, model, message, by_name, tmp_path
):
    if by_name:
        model.save_pretrained(tmp_path / "base")
        (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(UnsupportedLayoutError, match=message):
        make_trainer(str(tmp_path / "base") if by_name else model)


def test_a_dead_term(make_trainer):
    with pytest.raises(ValueError, match="bias_term='key'.*'query', 'value' or 'auto'"):
        make_trainer(bias_term="key")


def test_a_bias_anchor_without_biases(make_trainer):
    with pytest.raises(ValueError, match=r"score_anchor='bias'.*layers\.0\.self_attn\.q_proj"):
        make_trainer(make_llama(), score_anchor="bias")
    zero = make_opt()
    for name, parameter in zero.named_parameters():
        if name.endswith("_proj.bias"):
            torch.nn.init.zeros_(parameter)
    trainer = make_trainer(zero, score_anchor="bias")
    with pytest.raises(ValueError, match="score_anchor='bias'"):
        trainer.train()


def test_a_scoring_pass_without_a_batch(make_trainer):
    trainer = make_trainer(per_device_train_batch_size=4, dataloader_drop_last=True)
    trainer.train_dataset = trainer.train_dataset.select(range(2))
    with pytest.raises(RuntimeError, match="scoring pass.* batch size"):
        trainer.train()


def test_a_layer_that_takes_no_part(make_trainer):
    model = make_llama()
    model.model.layers[1].forward = lambda hidden_states, **kwargs: hidden_states
    with pytest.raises(RuntimeError, match=r"layers\.1\.self_attn\.q_proj"):
        make_trainer(model).train()


def test_a_mask_that_does_not_tell_padding(make_trainer):
    trainer = make_trainer(make_llama())
    collate = trainer.data_collator

    def with_one_mask_for_each_query(rows):
        batch = collate(rows)
        length = batch["input_ids"].shape[1]
        batch["attention_mask"] = torch.ones(length, length, dtype=torch.bool).tril().expand(len(rows), 1, -1, -1)
        return batch

    trainer.data_collator = with_one_mask_for_each_query
    with pytest.raises(RuntimeError, match="attention mask of shape.*score_anchor='bias'.*bias_term"):
        trainer.train()


def test_a_model_with_an_adapter_of_another_name(make_trainer):
    model = get_peft_model(make_llama(), BeftConfig(target_modules=["v_proj"]), adapter_name="mine")
    with pytest.raises(ValueError, match=r"\bmine\b.*'default'"):
        make_trainer(model)


class Poison(TrainerCallback):
    """Makes every loss after `step` NaN or infinite, and notes the deltas of that step."""

    def __init__(self, step, value):
        self.step, self.value = step, value

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            self.deltas = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
            with torch.no_grad():
                model.get_output_embeddings().weight.fill_(self.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_optimizer_step(make_trainer, value):
    poison = Poison(3, value)
    trainer = make_trainer(
        make_llama(), trainer={"callbacks": [poison]}, bias_term="value", save_strategy="steps", save_steps=2
    )
    with pytest.raises(FloatingPointError, match=r"step 4\b.*checkpoint-2"):
        trainer.train()
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, poison.deltas[name])
    assert PeftModel.from_pretrained(make_llama(), f"{trainer.args.output_dir}/checkpoint-2")


def test_a_loss_that_is_not_finite_while_scoring_leaves_the_trainer_as_it_was(make_trainer):
    model = make_llama()
    model.lm_head.weight.data.fill_(float("nan"))
    trainer = make_trainer(model)
    args, state = trainer.args, trainer.state
    with pytest.raises(FloatingPointError, match=r"step 1\b"):
        trainer.train()
    assert trainer.args is args and trainer.state is state and trainer.bias_scores is None


def test_deltas_that_are_not_finite_are_not_saved(make_trainer, tmp_path):
    trainer = make_trainer(make_llama(), bias_term="value")
    trainer.train()
    delta(trainer.model, trainer.trained_sites[0]).data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"step 6\b"):
        trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()


def test_saving_before_anything_is_selected(make_trainer, tmp_path):
    with pytest.raises(RuntimeError, match=r"\btrain\b"):
        make_trainer().save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_an_optimizer_that_does_not_follow_the_learning_rate_cannot_score(make_trainer, rate):
    class Headstrong(torch.optim.SGD):
        def step(self, closure=None):
            for parameter in self.param_groups[0]["params"]:
                parameter.data.add_(rate)

    trainer = make_trainer(trainer={"optimizer_cls_and_kwargs": (Headstrong, {"lr": 1.0})})
    with pytest.raises(RuntimeError, match="optim=.*bias_term"):
        trainer.train()


def test_deltas_that_did_not_move(make_trainer):
    with pytest.raises(RuntimeError, match="^2 of 2 .*learning_rate"):
        make_trainer(bias_term="value", learning_rate=0.0).train()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    trainer = trainer_in(folder, make_llama(), bias_term="value", save_strategy="steps", save_steps=3)
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture
def finished(whole, tmp_path):
    """The output folder of a finished run."""
    return str(shutil.copytree(whole, tmp_path / "out"))


def test_an_output_folder_of_a_different_run(make_trainer, finished, tmp_path):
    make_trainer(make_llama(), bias_term="value", output_dir=finished).train()  # the same run again
    with pytest.raises(ValueError, match=r"\bout\b.*value bias.*unnamed"):
        make_trainer(make_llama(), bias_term="query", output_dir=finished).train()
    make_opt().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"^output_dir .*\bout\b"):
        make_trainer(str(tmp_path / "base"), bias_term="value", output_dir=finished).train()
    with pytest.raises(ValueError, match=r"^output_dir .*\bbase\b"):
        make_trainer(make_opt(), output_dir=str(tmp_path / "base")).train()


def test_an_output_folder_with_nothing_but_checkpoints_of_a_different_run(make_trainer, finished):
    for file in ("beft_scores.json", "adapter_model.safetensors", "adapter_config.json"):
        os.remove(f"{finished}/{file}")
    with pytest.raises(ValueError, match="output_dir.*checkpoint-6"):
        make_trainer(make_llama(), bias_term="query", output_dir=finished).train()


def test_a_checkpoint_with_another_selection(make_trainer, finished):
    trainer = make_trainer(make_llama(), bias_term="query", output_dir=finished)
    with pytest.raises(ValueError, match="value.*bias_term='query'"):
        trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_that_is_none(make_trainer, finished, tmp_path):
    with pytest.raises(ValueError, match="resume_from_checkpoint=True.*new"):
        make_trainer(output_dir=str(tmp_path / "new")).train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-9").mkdir()
    with pytest.raises(ValueError, match="checkpoint-9.*beft_checkpoint.json"):
        make_trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


def test_the_plugin_without_axolotl_says_what_to_install():
    program = "import sys; sys.modules['axolotl'] = None; import beft_trl.axolotl"
    run = python("-c", program)
    assert "ImportError: beft_trl.axolotl needs Axolotl 0.19 or later" in run.stderr
    assert "pip install axolotl" in run.stderr and "constraints" not in run.stderr  # which no wheel has


def test_processes_that_form_no_run_are_refused(make_config, monkeypatch):
    config = make_config()  # sets accelerate up, for one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="^2 processes"):
        BeftSFTTrainer(make_opt(), config, train_dataset=make_rows(), processing_class=make_tokenizer())
