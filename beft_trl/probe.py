"""What the scoring pass measures in the trainer's own loop: outputs of the projections, and gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import TrainerCallback

from .layout import BiasSite
from .tuner import delta, projection


class ScoringProbe(TrainerCallback):
    """Watches a run whose deltas stay at zero. As a context manager it sets its hooks and takes them away.

    Attributes, filled when the run ends, for each site:
        gradients: fp32, shape (steps, len(site.rows)), the gradient of each optimizer step's loss by the bias,
            averaged over the processes as the engines average it. Taken by hooks on the deltas, since DeepSpeed has
            stepped and cleared its gradients when the trainer's callbacks run.
        mean_outputs: fp32, shape (len(site.rows),), the mean of the projection's output over all real tokens.
        sizes: root mean square of the projection's output over the same tokens and the rows of the site.
    """

    def __init__(self, model: PeftModel, sites: Sequence[BiasSite], accelerator: Accelerator):
        self.model, self.sites, self.accelerator = model, list(sites), accelerator
        self.gradients: dict[BiasSite, Tensor] = {}
        self.mean_outputs: dict[BiasSite, Tensor] = {}
        self.sizes: dict[BiasSite, float] = {}
        self._steps: dict[BiasSite, list[Tensor]] = {site: [] for site in sites}
        self._open_step: dict[BiasSite, Tensor] = {}
        # By module, since the terms of a fused projection share it: the sum of its outputs and that of their squares,
        # shape (2, features), and the number of tokens.
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._mask: Tensor | None = None
        self._learning = False

    def __enter__(self) -> "ScoringProbe":
        self._handles = [
            self.model.register_forward_pre_hook(self._begin_forward, with_kwargs=True),
            self.model.register_forward_hook(self._end_forward, always_call=True),
        ]
        for site in self.sites:
            self._handles.append(
                delta(self.model, site).register_hook(lambda gradient, site=site: self._add_gradient(site, gradient))
            )
        for path in dict.fromkeys(site.module for site in self.sites):
            self._handles.append(
                projection(self.model, path).register_forward_hook(
                    lambda module, args, output, path=path: self._add_outputs(path, output)
                )
            )
        return self

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        scaler = getattr(self.accelerator, "scaler", None)
        scale = scaler.get_scale() if scaler is not None else 1.0
        # A site that no backward pass reached has no gradient: zero, which is what a dead bias shows.
        flat = torch.cat(
            [self._open_step.pop(site, torch.zeros(len(site.rows), device=args.device)) for site in self.sites]
        )
        reduced = self.accelerator.reduce(flat / scale, reduction="mean").cpu()
        for site, gradient in zip(self.sites, reduced.split([len(site.rows) for site in self.sites]), strict=True):
            self._steps[site].append(gradient)

    def on_train_end(self, args, state, control, **kwargs):
        if not self._sums:
            raise RuntimeError(
                "The scoring pass got no batch: the training data are fewer than one batch. Lower the batch size "
                "or the packed length, or give more rows."
            )
        if len(self._sums) < len({site.module for site in self.sites}):
            silent = next(site.module for site in self.sites if site.module not in self._sums)
            raise RuntimeError(
                f"{silent} takes no part in the forward pass, so a bias there cannot be scored or trained. Give an "
                "explicit bias_term that has no such layer, or use another model."
            )
        # One vector for all projections: the sums, and after each its number of tokens.
        parts = [
            torch.cat([sums.flatten(), sums.new_tensor([self._tokens[path]])]) for path, sums in self._sums.items()
        ]
        reduced = self.accelerator.reduce(torch.cat(parts), reduction="sum").cpu()
        means = {
            path: (part[:-1] / part[-1]).view(2, -1)
            for path, part in zip(self._sums, reduced.split([len(part) for part in parts]), strict=True)
        }
        self.mean_outputs = {site: means[site.module][0, site.rows] for site in self.sites}
        self.sizes = {site: means[site.module][1, site.rows].mean().sqrt().item() for site in self.sites}
        self.gradients = {site: torch.stack(steps) for site, steps in self._steps.items()}

    def _begin_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        # Generation, reference and old log-probabilities of TRL's trainers run without gradients, and are not learnt.
        self._learning = torch.is_grad_enabled()
        # Padding-free and packed batches have no mask: all their tokens are real.
        self._mask = kwargs.get("attention_mask")

    def _end_forward(self, *call: Any) -> None:
        # What gradient checkpointing computes again in the backward pass has been counted.
        self._learning = False

    def _add_gradient(self, site: BiasSite, gradient: Tensor) -> None:
        rows = gradient.detach().flatten().float()[site.rows.to(gradient.device)]
        self._open_step[site] = self._open_step.get(site, 0) + rows

    def _add_outputs(self, path: str, output: Tensor) -> None:
        if not self._learning:
            return
        tokens = output.detach().reshape(-1, output.shape[-1])
        if self._mask is not None:
            if self._mask.numel() != len(tokens):
                raise RuntimeError(
                    f"{path} gave {len(tokens)} outputs for an attention mask of shape {tuple(self._mask.shape)}, so "
                    "the real tokens cannot be told from padding. Train with score_anchor='bias' if the model has "
                    "biases, or with an explicit bias_term."
                )
            tokens = tokens[self._mask.reshape(-1).bool()]
        tokens = tokens.float()
        self._sums[path] = self._sums.get(path, 0) + torch.stack([tokens.sum(0), tokens.square().sum(0)])
        self._tokens[path] = self._tokens.get(path, 0) + len(tokens)


class ScoringProgress(TrainerCallback):
    """The progress bar of the scoring pass, one bar for all its runs."""

    def __init__(self, terms: Sequence[str], steps: int, disable: bool):
        self._bar = tqdm(total=steps, desc=f"Scoring {', '.join(terms)} bias", unit="step", disable=disable)

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.update()

    def close(self) -> None:
        self._bar.close()
