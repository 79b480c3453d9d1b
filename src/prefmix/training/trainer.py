"""`MixtureTrainer`: stochastic variational EM for mixtures of expert policies, on `transformers.Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from prefmix.data.collator import ComparisonDataset
from prefmix.data.sampler import PromptGroupedSampler
from prefmix.data.users import latent_groups, num_latent_groups
from prefmix.experts.base_model import BaseModel
from prefmix.mixture.elbo import elbo_rows
from prefmix.mixture.estep import EStep
from prefmix.mixture.schedule import temperature
from prefmix.policy.mixture_model import MixtureModel
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.policy.user_state import UserState
from prefmix.training import diagnostics, setup
from prefmix.training.callbacks import EMCallback, MetricsFileCallback
from prefmix.training.config import MixtureConfig
from prefmix.training.em_state import EMState
from prefmix.training.first_responsibilities import Start, first_responsibilities, resolve_init
from prefmix.training.guards import FiniteGuard
from prefmix.training.held_out import held_out_metrics
from prefmix.training.metrics_log import Meter, batch_sums
from prefmix.training.objective import estep_function, held, likelihoods
from prefmix.training.persistence import AbstractCheckpointedTrainer
from prefmix.training.result import build_policy, identity, training_log_lik, user_state
from prefmix.training.token_dropout import drop_tokens, undo_scale


class MixtureTrainer(AbstractCheckpointedTrainer):
    """Trains K experts and a gate from comparisons.

        args = MixtureConfig("out", num_experts=2)
        trainer = MixtureTrainer("HuggingFaceTB/SmolLM2-135M-Instruct", args, train_dataset=rows, eval_dataset=held_out)
        trainer.train()
        trainer.policy.generate("Review the film Alien.", user="anna")

    Checkpoints, `metrics.jsonl` and, at the end, the folder `policy` are written to `args.output_dir`.

    Attributes:
        latent: `pair` or `user`, what carries one expert.
        init: which first responsibilities were (or would be) used.
        em: running evidence and responsibilities.
    """

    # `compute_loss` divides by the weights of the whole accumulated batch itself.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | Path | PreTrainedModel | BaseModel,
        args: MixtureConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: Any = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        ref_model: None = None,
        peft_config: None = None,
    ) -> None:
        """Reads rows and model, computes or finds the trunk states, and builds untrained experts.

        Args:
            model: base model: a folder, a hub name, a loaded model, or a `BaseModel`.
            args: the configuration; None: `MixtureConfig("prefmix_output")`.
            train_dataset: rows, a `datasets.Dataset`, a file, a folder, a name, or a `ComparisonTable`.
            eval_dataset: the same, or a mapping of names to such.
            processing_class: tokenizer, where the model comes without one or with another.
            data_collator: must be None: the collator belongs to the table.
            compute_metrics: called with an `EvalPrediction` whose predictions are preference probabilities [B].
            callbacks: further `TrainerCallback`s.
            optimizers: optimizer and scheduler, as in `transformers.Trainer`.
            ref_model: must be None: the frozen base is the reference and comes from the same pass.
            peft_config: must be None: `branch_depth`, `expert_rank` and `lora_alpha` say what an expert is.

        Raises:
            ValueError: an argument, a row or a combination that cannot work, with the remedy.
        """
        _refuse(ref_model=ref_model, peft_config=peft_config, data_collator=data_collator)
        if train_dataset is None:
            raise ValueError("train_dataset=None: give rows, a file, a `datasets.Dataset` or a ComparisonTable")
        args = MixtureConfig("prefmix_output") if args is None else args
        self.base = setup.as_base_model(model, args, processing_class)
        tokenizer = setup.tokenizer_of(self.base)
        table = setup.as_table(train_dataset, tokenizer, args)
        self.latent = setup.resolve_latent(args, table)
        self.init = resolve_init(args, table)
        self.metadata_encoder = setup.metadata_encoder(args, table, self.latent)
        self.train_comparisons = setup.comparisons(table, self.base, args, self.metadata_encoder)
        self._group = latent_groups(table, self.latent)
        super().__init__(
            model=setup.build_model(self.base, args, self.train_comparisons, self.metadata_encoder),
            args=args,
            data_collator=self.train_comparisons.collator(self._group, tokenizer.pad_token_id or 0),
            train_dataset=ComparisonDataset(table, self._group),
            eval_dataset=self._held_out(eval_dataset, args),
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._prepare_em(identity(args, self.base, table, self.latent))
        diagnostics.report_choices(self)

    # --- the story --------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Loss = - (sum_i ELBO_i + the batch's share of the gate's log prior) / summed weights of the global batch."""
        weight, chosen, rejected = inputs["weight"], inputs["chosen"], inputs["rejected"]
        output = undo_scale(model(**drop_tokens(inputs, self.args.token_dropout)), self.args.token_dropout)
        lik = likelihoods(output, chosen, rejected, beta=self._beta, label_noise=self.args.label_noise)
        evidence = self._evidence(inputs["row"], lik.log_lik)
        q = self._responsibilities(inputs["group"], output.log_weights, evidence)
        group_weight = self.em.group_weight[inputs["group"]]
        rows = elbo_rows(lik.log_lik, output.log_weights, q.resp, q.log_q, weight, group_weight)
        prior = self.mixture.gate.log_prior() * weight.sum() / self.em.total_weight
        loss = -(rows.elbo.sum() + prior) * self.accelerator.num_processes / num_items_in_batch
        self.meter.add(batch_sums(output, lik, q, rows, evidence, weight, group_weight, chosen, rejected))
        self.guard.observe_batch(inputs["row"], lik.log_lik, output.log_weights, loss)
        return (loss, output) if return_outputs else loss

    def _evidence(self, row: Tensor, log_lik: Tensor) -> Tensor:
        """[B, K] running evidence of each row's group; every process keeps the same table."""
        if self.accelerator.num_processes == 1:
            return self.em.evidence.update(row, log_lik)
        everywhere = self.em.evidence.update(*self.accelerator.gather((row, log_lik.detach().contiguous())))
        return everywhere[self.accelerator.process_index * len(row) :][: len(row)]

    def _responsibilities(self, group: Tensor, log_weights: Tensor, evidence: Tensor) -> EStep:
        """The first ones while they are held, afterwards the E-step's from the experts alone."""
        if self.state.global_step < self.hold_steps:
            return held(self.em.initial[group])
        q = self._estep(log_weights, evidence, temperature=self.temperature, generator=None)
        everywhere = (group, q.log_q)
        if self.accelerator.num_processes > 1:
            everywhere = self.accelerator.gather((group, q.log_q.contiguous()))
        self.em.remember(*everywhere)
        return q

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward pass; gradients are looked at before clipping mixes them."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self.guard.observe_gradients(self.mixture)
        return loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Summed row weights over the accumulation steps and all processes: the denominator of the loss."""
        total = torch.stack([batch["weight"].sum() for batch in batch_samples]).sum().to(device)
        return self.accelerator.gather(total).sum() if self.accelerator.num_processes > 1 else total

    @property
    def temperature(self) -> float:
        """Temperature of the E-step now."""
        fraction = self.state.global_step / max(self.state.max_steps, 1)
        return temperature(fraction, self.args.estep_temperature, self.args.estep_temperature_end)

    # --- before, during and after -----------------------------------------------------------------------------------

    @property
    def mixture(self) -> MixtureModel:
        """Experts and gate, without what `accelerate` wraps around them."""
        model = self.accelerator.unwrap_model(self.model)
        assert isinstance(model, MixtureModel)
        return model

    @property
    def policy(self) -> MixturePolicy:
        """The mixture as it stands, with what the training rows say of every user: one pass without gradient."""
        log_lik = self.refresh_evidence()
        return build_policy(self, user_state(self.train_comparisons.table, log_lik))

    def refresh_evidence(self) -> Tensor:
        """Recomputes the evidence of every training row; returns the log-likelihoods [B, K]."""
        log_lik = training_log_lik(self)
        rows = torch.arange(len(log_lik), device=self.args.device)
        self.em.evidence.update(rows, log_lik.float().to(self.args.device))
        return log_lik

    def running_user_state(self) -> UserState:
        """What the running evidence says of every user; nothing under `pair`, where none is kept."""
        table = self.train_comparisons.table
        if self.latent == "pair":
            return UserState.empty(self.args.num_experts, table.users)
        return user_state(table, self.em.evidence.table.cpu())

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out loss and accuracy, of the population and with what training rows say of each user."""
        sets: Any = self.eval_dataset if eval_dataset is None else self._held_out(eval_dataset, self.args)
        if sets is None:
            raise ValueError("eval_dataset=None: give held-out rows to the trainer or to evaluate()")
        metrics: dict[str, float] = {}
        for name, comparisons in sets.items() if isinstance(sets, dict) else {"": sets}.items():
            prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
            metrics |= held_out_metrics(self, comparisons, prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def start_em(self) -> None:
        """Computes the first responsibilities and gives a closed-form gate their mean."""
        diagnostics.report_identifiability(self)
        start = Start(
            self.args,
            self.train_comparisons.table,
            self._group,
            len(self.em.initial),
            lambda: (
                self.train_comparisons.states or setup.trunk_states(self.train_comparisons.table, self.base, self.args)
            ),
        )
        resp = first_responsibilities(self.init, start).to(self.em.initial)
        self.em.initial.copy_(resp)
        self.em.resp.copy_(resp)
        self.m_step_of_gate()

    def m_step_of_gate(self) -> None:
        """Moves a closed-form global gate to the mean responsibility (its Dirichlet MAP)."""
        if self.mixture.gate.is_closed_form:
            self.mixture.gate.closed_form_update(*self.em.mean_resp())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mixture's figures to a training line; fetches them from the device here only."""
        if "loss" in logs:
            logs.update(self.meter.pop())
            logs["mixture/temperature"] = self.temperature
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Experts at `learning_rate`, a trained trunk at `trunk_learning_rate`, the gate at `gate_learning_rate`."""
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args)
            shared = self.mixture.experts.shared_parameters()
            known = {id(p) for p in shared}
            experts = [p for p in self.mixture.experts.parameters() if p.requires_grad and id(p) not in known]
            gate = [p for p in self.mixture.gate.parameters() if p.requires_grad]
            groups = [{"params": experts, "weight_decay": self.args.weight_decay}]
            if shared:
                rate = self.args.trunk_learning_rate or self.args.learning_rate
                groups.append({"params": shared, "weight_decay": self.args.weight_decay, "lr": rate})
            if gate:
                groups.append({"params": gate, "weight_decay": 0.0, "lr": self.args.gate_learning_rate})
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        """An order that seed and epoch alone decide; rows that share a prompt stand together where texts repeat."""
        table = self.train_comparisons.table
        together = self.args.group_texts
        if together is None:
            together = 2 * len(table) > 4 * len(table.texts)
        prompt = table.prompt if together else torch.arange(len(table)).numpy()
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return PromptGroupedSampler(prompt, block_size=self._train_batch_size, seed=seed)

    def _prepare_em(self, run_identity: dict[str, Any]) -> None:
        table, device = self.train_comparisons.table, self.args.device
        num_groups = num_latent_groups(table, self.latent)
        uniform = torch.full((num_groups, self.args.num_experts), 1.0 / self.args.num_experts, device=device)
        self.em = EMState(
            torch.from_numpy(self._group).to(device),
            torch.from_numpy(table.weight).to(device),
            uniform,
            per_pair=self.latent == "pair",
        )
        self.identity = run_identity
        self.meter, self.guard = Meter(), FiniteGuard(table.source_row)
        self.hold_steps = 0
        self._beta = torch.tensor(self.args.betas, device=device)
        self._estep = estep_function(self.args.estep, self.args.gumbel_hard)
        self.add_callback(EMCallback(self))
        self.add_callback(MetricsFileCallback(self.run_dir))

    def _held_out(self, source: Any, args: MixtureConfig) -> Any:
        """Held-out rows with their trunk states; users of the training rows keep their index, others are unknown."""
        if source is None or isinstance(source, setup.Comparisons):
            return source
        if isinstance(source, dict):
            return {name: self._held_out(rows, args) for name, rows in source.items()}
        train = self.train_comparisons.table
        table = setup.as_table(source, setup.tokenizer_of(self.base), args, like=train)
        return setup.comparisons(setup.known_users(table, len(train.users)), self.base, args, self.metadata_encoder)


_REFUSED = {
    "ref_model": "the frozen base is the reference of every expert, and its log-probabilities come from the same pass",
    "peft_config": "choose experts with branch_depth=, head=, expert_rank= and lora_alpha=",
    "data_collator": "batches come from a table of comparisons with prefmix's own collator",
}


def _refuse(**arguments: Any) -> None:
    """Refuses what TRL's trainer takes and this one cannot use, with the reason."""
    problems = [f"{name} must be None: {_REFUSED[name]}" for name, value in arguments.items() if value is not None]
    if problems:
        raise ValueError("\n".join(problems))
