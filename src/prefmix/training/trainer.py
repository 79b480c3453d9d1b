"""`MixtureTrainer`: stochastic variational EM for mixtures of expert policies, on `transformers.Trainer`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from prefmix.data.collator import ComparisonDataset
from prefmix.data.source_name import source_name
from prefmix.data.users import latent_groups, num_latent_groups
from prefmix.experts.base_model import BaseModel
from prefmix.mixture.estep import EStep
from prefmix.mixture.m_step import M_STEPS
from prefmix.mixture.schedule import temperature
from prefmix.policy.mixture_model import MixtureModel, MixtureOutput
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.policy.user_state import UserState
from prefmix.training import diagnostics, setup
from prefmix.training.amortized_posterior import FIRST_LESSONS, AmortizedPosterior
from prefmix.training.announcements import report_choices, report_start
from prefmix.training.callbacks import EMCallback, MetricsFileCallback
from prefmix.training.config import MixtureConfig
from prefmix.training.early_warnings import warn_early
from prefmix.training.em_state import EMState
from prefmix.training.first_responsibilities import Start, first_responsibilities, resolve_init
from prefmix.training.group_adversary import GroupAdversary
from prefmix.training.guards import FiniteGuard
from prefmix.training.held_out import held_out_metrics
from prefmix.training.membership_step import first_q
from prefmix.training.metrics_log import Meter
from prefmix.training.noise_state import NoiseState
from prefmix.training.objective import Likelihoods, estep_function, held, likelihoods
from prefmix.training.objectives import AbstractObjective, objective_of
from prefmix.training.objectives.interface import objective_sums
from prefmix.training.order import training_order
from prefmix.training.parameter_groups import parameter_groups
from prefmix.training.penalties import penalty
from prefmix.training.persistence import AbstractCheckpointedTrainer
from prefmix.training.placing import place
from prefmix.training.processes import (
    check_processes,
    follow_epochs,
    from_first_process,
    gathered,
    read_by_all,
    share_draws,
    share_object,
    share_tensors,
    summed,
)
from prefmix.training.progress_lines import shorten_lines
from prefmix.training.readings import Readings
from prefmix.training.references import known_references
from prefmix.training.result import build_policy, identity, running_users, training_log_lik
from prefmix.training.starting_experts import FrozenExperts
from prefmix.training.token_dropout import drop_tokens, undo_scale
from prefmix.training.trl_arguments import refuse_arguments
from prefmix.training.zero import load_models_whole


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
        data_source: what the model card calls the training rows, by default `data.source_name`.
        em: running evidence and responsibilities.
    """

    objective: AbstractObjective

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
        refuse_arguments(ref_model=ref_model, peft_config=peft_config, data_collator=data_collator)
        if train_dataset is None:
            raise ValueError("train_dataset=None: give rows, a file, a `datasets.Dataset` or a ComparisonTable")
        args = MixtureConfig("prefmix_output") if args is None else args
        check_processes(args.world_size, args.num_processes)
        load_models_whole(args)
        warn_early(args)
        self.base = setup.as_base_model(model, args, processing_class)
        tokenizer = setup.tokenizer_of(self.base)
        table, self.data_source = setup.as_table(train_dataset, tokenizer, args), source_name(train_dataset)
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
        self.readings = Readings(self.mixture.experts, self.train_comparisons, args, self.accelerator)
        once = self.readings.known is not None
        self.references = None if once else known_references(self.mixture.experts, table, args, self.accelerator)
        self.placement = place(self.mixture, self.accelerator, args, self.base)
        # Trainer's name for a model that places itself and reduces its own gradients: it is not wrapped again.
        self.is_distributed_loading_by_transformers = self.placement.places_itself
        self._prepare_em(identity(args, self.base, table, self.latent))
        report_choices(self)

    # --- the story --------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Loss = - (sum_i bound_i + the batch's share of all log priors) / summed weights of the global batch."""
        assert num_items_in_batch is not None
        inputs = drop_tokens(inputs, self.args.token_dropout)
        output = self._look(model, inputs)
        lik = self._likelihoods(output, inputs)
        batch = self.objective.bound(model, inputs, output, lik)
        prior = self.mixture.gate.log_prior() * inputs["weight"].sum() / self.em.total_weight
        prior = prior - penalty(output, inputs, batch.q.resp, self._beta, self.args, self.em.pooling)
        loss = -(self.em.weigh(inputs, batch.bound).sum() + prior) * self.readers.number / num_items_in_batch
        self.meter.add(objective_sums(batch, output, lik, inputs))
        self.guard.observe_batch(inputs["row"], lik.log_lik, batch.log_weights, loss)
        # Where the gate alone learns, in closed form, nothing has a gradient; the loop wants one all the same.
        loss = loss if loss.requires_grad else loss.requires_grad_()
        return (loss, output) if return_outputs else loss

    def _look(self, model: nn.Module, inputs: dict[str, Tensor]) -> MixtureOutput:
        """All K experts; without gradient where a cheap M-step comes back for those that learn."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.objective.comes_back):
            return undo_scale(model(**inputs), self.args.token_dropout)

    def _likelihoods(self, output: MixtureOutput, inputs: dict[str, Tensor], beta: Tensor | None = None) -> Likelihoods:
        beta = self._beta if beta is None else beta
        noise = None if self.em.noise is None else self.em.noise.of_rows(inputs["row"])
        return likelihoods(output, inputs, beta=beta, model=self.args.feedback_model, noise=noise)

    def _responsibilities(self, inputs: dict[str, Tensor], log_weights: Tensor, evidence: Tensor) -> EStep:
        """Uniform in a warm start, then the first ones while held, afterwards the E-step's from the experts alone."""
        if self.state.global_step < self.hold_steps:
            first = self.em.initial[inputs["group"]]
            warm = self.state.global_step < self.warm_steps
            return held(torch.full_like(first, 1 / first.shape[1]) if warm else first)
        if self.em.amortized is not None:
            self._teach_estep(self.em.amortized, inputs["row"], log_weights, evidence)
        q = self._estep(log_weights, evidence, temperature=self.temperature, generator=None)
        row, group, log_q = gathered(self.readers, inputs["row"], inputs["group"], q.log_q)
        if self.readers.number > 1:
            group, log_q = group[row >= 0], log_q[row >= 0]
        self.em.remember(group, log_q)
        return q

    def _teach_estep(self, network: AmortizedPosterior, row: Tensor, log_weights: Tensor, evidence: Tensor) -> None:
        """A step of the E-step's network on the batch of all processes; at first many, on all groups."""
        row, log_weights, evidence = gathered(self.readers, row, log_weights, evidence)
        if network.is_untaught and not self.em.evidence.per_pair:
            everybody = self.em.evidence.group_evidence()
            prior = self.mixture.gate.population_log_weights().detach().expand_as(everybody)
            network.learn(prior, everybody, FIRST_LESSONS)
        network.learn(log_weights[row >= 0], evidence[row >= 0], FIRST_LESSONS if network.is_untaught else 1)
        network.measure(log_weights[row >= 0], evidence[row >= 0])

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward pass; gradients are looked at before clipping mixes them."""
        if self.args.expert_parallel:
            share_draws(self.accelerator)
        self.placement.before_pass()
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self.guard.observe_gradients(self.mixture)
        return loss

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """With the log-probabilities that are known: the references', or the experts' too."""
        inputs = super()._prepare_inputs(inputs)
        inputs |= self.readings.of_batch(inputs["text_ids"])
        return inputs if self.references is None else inputs | {"ref_log_probs": self.references[inputs["text_ids"]]}

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Summed row weights over the accumulation steps and all processes: the denominator of the loss."""
        total = torch.stack([batch["weight"].sum() for batch in batch_samples]).sum().to(device)
        return summed(self.readers, total)

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
        return self.policy_of(self.refresh_evidence())

    def policy_of(self, log_lik: Tensor) -> MixturePolicy:
        """The mixture as it stands; [B, K] `log_lik` is what it says of the training rows."""
        return build_policy(self, log_lik)

    def refresh_evidence(self) -> Tensor:
        """Recomputes the evidence of every training row; returns the log-likelihoods [B, K]."""
        log_lik = training_log_lik(self)
        rows = torch.arange(len(log_lik), device=self.args.device)
        self.em.evidence.update(rows, log_lik.float().to(self.args.device))
        return log_lik

    def share_evidence(self) -> None:
        """Gives every process the evidence of the first, which alone may have recomputed it."""
        share_tensors(self.accelerator, [self.em.evidence.table, self.em.evidence.visited])

    def running_user_state(self) -> UserState:
        """What the running evidence says of every user; nothing under `pair`, where none is kept."""
        return running_users(self)

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
        metrics = share_object(self.accelerator, metrics)  # runtimes differ, and decisions must not
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def start_em(self) -> None:
        """Computes the first responsibilities and gives a closed-form gate their mean."""
        if self.is_world_process_zero():
            diagnostics.report_identifiability(self)
        start = Start(
            self.args,
            self.train_comparisons.table,
            self._group,
            len(self.em.initial),
            lambda: (
                self.train_comparisons.states or setup.trunk_states(self.train_comparisons.table, self.base, self.args)
            ),
            self._experts_evidence,
        )
        if self.init == "experts":
            evidence = self._experts_evidence()  # of all processes, where only all together can run the experts
            start = start._replace(evidence=lambda: evidence)
        resp = from_first_process(
            self.accelerator, self.em.initial, lambda: self.em.begin(first_responsibilities(self.init, start))
        )
        self.em.pooling = share_object(self.accelerator, self.em.pooling)
        self.share_evidence()
        self.em.initial.copy_(resp)
        self.em.resp.copy_(resp)
        self.m_step_of_gate()
        report_start(self, resp)

    def _experts_evidence(self) -> Tensor:
        """[G, K] what the experts as they are say of every group; the table of evidence is full afterwards."""
        log_lik = self.refresh_evidence().float()
        return log_lik if self.latent == "pair" else self.em.evidence.group_evidence().cpu()

    def _plan_steps(self) -> int:
        max_steps = super()._plan_steps()
        if self.init == "experts":  # their own responsibilities need not be held until experts have parted
            self.hold_steps = self.warm_steps
        return max_steps

    def m_step_of_gate(self) -> None:
        """Moves a closed-form global gate to the mean responsibility (its Dirichlet MAP)."""
        if self.mixture.gate.is_closed_form:
            self.mixture.gate.closed_form_update(*self.em.mean_resp())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mixture's figures to a training line; fetches them from the device here only."""
        if "loss" in logs:
            logs.update(self.meter.pop(partial(summed, self.readers)))
            logs["mixture/temperature"] = self.temperature
            logs.update(self.em.figures())
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Experts, a trained trunk and the gate, each at its own rate."""
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = optimizer_class(parameter_groups(self.mixture, self.args), **options)
            self.placement.watch(self.optimizer)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        """An order that seed and epoch alone decide."""
        processes = 1 if self.args.expert_parallel else self.args.world_size
        return training_order(self.args, self.train_comparisons.table, self._train_batch_size, processes)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """As `Trainer`'s; processes of an expert-parallel run all read everything."""
        loader = follow_epochs(super().get_train_dataloader())
        return read_by_all(loader) if self.args.expert_parallel else loader

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
        self.em.q = first_q(self)
        if self.args.label_noise_update != "fixed":
            self.em.noise = NoiseState(table, self.args, device)
        if self.args.estep == "amortized":
            self.em.amortized = AmortizedPosterior(self.args.num_experts, self.args.seed, device)
        if self.args.adaptive_beta is not None:
            self.em.threshold = torch.zeros(self.args.num_experts, device=device)
        if self.args.robust_over is not None:
            self.em.adversary = GroupAdversary(table, self.args, device)
            run_identity |= self.em.adversary.identity()
        self.identity = run_identity
        self.frozen = FrozenExperts(self.mixture.experts, self.args.freeze_experts, self.args.train_experts)
        self.meter, self.guard = Meter(), FiniteGuard(table.source_row)
        self.warm_steps = self.hold_steps = 0
        self._beta = torch.tensor(self.args.betas, device=device)
        self._m_step = M_STEPS[self.args.m_step]
        network = self.em.amortized
        self._estep = estep_function(self.args.estep, self.args.gumbel_hard) if network is None else network.estep
        self.objective = objective_of(self)
        shorten_lines(self.callback_handler)
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
