"""What a search is worth: `beft tune` next to the default settings, and to LoRA and (IA)3 searched as long.

python examples/benchmarks/tuning.py --data-dir DATA --minutes 10    # all runs, appended to results/tuning.jsonl
python examples/benchmarks/tuning.py --report                        # the tables of what is in the file

Every arm is judged by the same quarter of the training rows, searched by Optuna's TPE with the pruner of `beft tune`
for the same minutes over a base that is loaded once, trained again on all rows with what was best, and measured on the
test rows. LoRA is searched over rate and rank, beginning with r=8 at 1e-3, (IA)3 over its rate, beginning with 1e-2,
both with the steps, batch and schedule of the default. A run that the file holds already is passed over.
"""

import gc
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import optuna
import records
from peft import IA3Config, LoraConfig, PeftConfig
from tasks import MODELS, QUIET, Task, add_arguments, load_task, parse, score_only_labelled_tokens
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from beft_trl import BeftSFTConfig, BeftSFTTrainer, tune
from beft_trl.config import enough_steps
from beft_trl.evaluation import encode, mean_loss, row_losses
from beft_trl.tuning.split import split_rows
from beft_trl.tuning.study import STOPPED_BEYOND, STOPS_AFTER
from beft_trl.tuning.trials import LOOKS, class_of


# 32 and 100 rows to learn from: the routing task keeps 26 of its rows for other scripts.
TASKS = ["routing-58", "routing-126", "trec-32", "trec-100", "sst2-32", "sst2-100"]
ARMS = ["default", "tune", "tune, nothing kept", "LoRA", "(IA)3"]


def main(arguments) -> None:
    for seed in arguments.seeds:
        for name in arguments.tasks:
            for model in arguments.models:
                for arm in arguments.arms:
                    line = {"model": model, "task": name, "seed": seed, "arm": arm, "minutes": arguments.minutes}
                    if any(line.items() <= run.items() for run in records.read(arguments.results)):
                        continue
                    task = load_task(name, arguments.data_dir, seed)
                    result = run(model, task, seed, arm, arguments)
                    records.append(arguments.results, {**line, **result})
                    print(*line.values(), f"loss {result['test']['loss']:.4f}", flush=True)


def run(model: str, task: Task, seed: int, arm: str, arguments) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        if arm in ("LoRA", "(IA)3"):
            return search_adapter(model, task, seed, arm, arguments, folder)
        settings = settings_of(model, task, seed, arguments, folder)
        kept = {"cache_frozen_layers": False} if arm.endswith("kept") else {}
        trainer = BeftSFTTrainer(
            model,
            BeftSFTConfig(**settings, **kept, model_init_kwargs={"dtype": MODELS[model].dtype}),
            train_dataset=task.train,
            eval_dataset=task.test,
            processing_class=AutoTokenizer.from_pretrained(model),
        )
        started = time.perf_counter()
        if arm == "default":
            trainer.train()
            figures = measure(trainer, task.test)
            chosen = {"term": trainer.selected_bias_term, "steps": trainer.state.global_step}
            return {"seconds": time.perf_counter() - started, "chosen": chosen, "test": figures}
        tuned = tune(trainer, trials=arguments.trials, minutes=arguments.minutes, output=Path(folder, "tuned"))
        choice = tuned.choice
        return {
            "seconds": time.perf_counter() - started,
            "search_seconds": sum(record.seconds or 0 for record in choice.records),
            "trials": [[*record.settings, record.state, record.loss] for record in choice.records],
            "kind": choice.kind,
            "verdict": choice.verdict,
            "chosen": choice.winner.settings._asdict(),
            "test": tuned.figures,
        }


def settings_of(model: str, task: Task, seed: int, arguments, folder: str) -> dict:
    steps = 8 if arguments.quick else arguments.steps or enough_steps(len(task.train))
    return {
        **QUIET, "output_dir": folder, "seed": seed, "max_steps": steps, "logging_strategy": "no", "max_length": 128,
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 16,
    }  # fmt: skip


def measure(trainer: SFTTrainer, rows) -> dict:
    """Loss of a token, and the share of rows of which greedy decoding writes the completion."""
    found = row_losses(trainer.model, [encode(trainer.processing_class, row) for row in rows])
    return {"loss": mean_loss(found), "accuracy": sum(row.right for row in found) / len(found)}


def lora(rank: int) -> PeftConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def search_adapter(model: str, task: Task, seed: int, arm: str, arguments, folder: str) -> dict:
    """The same search for a PEFT adapter: the same rows to judge by, looks, sampler, pruner and minutes."""
    started = time.perf_counter()
    base = AutoModelForCausalLM.from_pretrained(model, dtype=MODELS[model].dtype)
    tokenizer = AutoTokenizer.from_pretrained(model)
    classes = [class_of(encode(tokenizer, row)) for row in task.train]
    split = split_rows(classes, None, seed)[0]
    settings = settings_of(model, task, seed, arguments, folder)

    def trained(rate: float, config: PeftConfig, rows, look: Callable[[SFTTrainer, int], None] | None) -> dict:
        trainer = SFTTrainer(
            base, SFTConfig(**settings, learning_rate=rate), train_dataset=rows, processing_class=tokenizer,
            peft_config=config,
        )  # fmt: skip
        try:
            if look is not None:
                trainer.add_callback(Look(trainer, look))
            trainer.train()
            return measure(trainer, task.test if look is None else task.train.select(split.development))
        finally:
            trainer.model.unload()
            vars(base).pop("peft_config", None)
            gc.collect()

    def suggested(trial) -> tuple[float, PeftConfig]:
        if arm == "LoRA":
            rank = trial.suggest_categorical("rank", [2, 4, 8, 16, 32])
            return trial.suggest_float("rate", 1e-4, 1e-2, log=True), lora(rank)
        return trial.suggest_float("rate", 1e-3, 1e-1, log=True), IA3Config(task_type="CAUSAL_LM")

    deadline = None if arguments.minutes is None else time.perf_counter() + 60 * arguments.minutes

    def objective(trial) -> float:
        rate, config = suggested(trial)

        def look(trainer: SFTTrainer, number: int) -> None:
            trial.report(measure(trainer, task.train.select(split.development))["loss"], number)
            late = deadline is not None and time.perf_counter() > deadline
            if trial.number and number < LOOKS and (trial.should_prune() or late):
                raise optuna.TrialPruned

        return trained(rate, config, task.train.select(split.train), look)["loss"]

    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(n_startup_trials=4, seed=seed),
        pruner=optuna.pruners.PercentilePruner(STOPPED_BEYOND, n_startup_trials=STOPS_AFTER),
    )
    study.enqueue_trial({"rank": 8, "rate": 1e-3} if arm == "LoRA" else {"rate": 1e-2})
    timeout = None if deadline is None else max(1.0, deadline - time.perf_counter())
    study.optimize(objective, n_trials=arguments.trials, timeout=timeout)
    searched = time.perf_counter() - started
    figures = trained(*suggested(optuna.trial.FixedTrial(study.best_params)), task.train, None)
    return {
        "seconds": time.perf_counter() - started,
        "search_seconds": searched,
        "trials": [[trial.params, trial.state.name, trial.value] for trial in study.trials],
        "chosen": study.best_params,
        "test": figures,
    }


class Look(TrainerCallback):
    """Measures an adapter at four steps of its training."""

    def __init__(self, trainer: SFTTrainer, look: Callable[[SFTTrainer, int], None]):
        self.trainer, self.look = trainer, look

    def on_step_end(self, args, state, control, **kwargs):
        marks = [-(-args.max_steps * number // LOOKS) for number in range(1, LOOKS + 1)]
        if state.global_step in marks:
            self.look(self.trainer, 1 + marks.index(state.global_step))


def report(results: Path) -> None:
    tables = defaultdict(lambda: defaultdict(list))
    for line in records.read(results):
        tables[line["model"], line["task"], line["minutes"]][line["arm"]].append(line)
    for (model, task, minutes), arms in tables.items():
        print(f"\n{Path(model).name}, {task}, {minutes} minutes of search:\n")
        print("| arm | test loss | accuracy | trials | of them to the end | search, seconds | in all | chosen |")
        print("|---|---:|---:|---:|---:|---:|---:|---|")
        for arm, lines in arms.items():
            loss, right = (records.spread([line["test"][name] for line in lines], 3) for name in ("loss", "accuracy"))
            trials = [line.get("trials", []) for line in lines]
            done = [sum(trial[-2] in ("done", "COMPLETE") for trial in each) for each in trials]
            search = [line.get("search_seconds", 0) for line in lines]
            chosen = "; ".join(
                ", ".join(
                    f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in each
                )
                for each in (line["chosen"].items() for line in lines)
            )
            counts = f"{fmean(map(len, trials)):.1f} | {fmean(done):.1f} | {fmean(search):.0f}"
            seconds = fmean(line["seconds"] for line in lines)
            print(f"| {arm} | {loss} | {right} | {counts} | {seconds:.0f} | {chosen} |")


if __name__ == "__main__":
    parser = records.make_parser(__doc__, "tuning.jsonl")
    add_arguments(parser, TASKS)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--trials", type=int, default=1000, help="of a search at most")
    parser.add_argument("--steps", type=int, help="of the default run. Default: what it takes by itself")
    parsed = parse(parser)
    if parsed.quick:
        parsed.minutes, parsed.trials = None, 3
    score_only_labelled_tokens()
    if not parsed.report:
        main(parsed)
    report(parsed.results)
