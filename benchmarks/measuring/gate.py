"""Nothing is timed before it is right: ours against a materialised computation in float64, and K = 1 against TRL."""

from __future__ import annotations

import copy
import math
import tempfile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from measuring.contenders import (
    BETA,
    Bases,
    Course,
    copy_adapter_to_trl,
    environment_of,
    our_trainer,
    peft_name,
    trl_trainer,
)
from measuring.turns import environment
from prefmix.experts.base_model import load_base
from prefmix.experts.interface import PaddedTexts
from prefmix.experts.text_pass import pad_texts
from prefmix.training.trainer import MixtureTrainer

LIMIT = 1e-5


class Error(NamedTuple):
    """Relative differences.

    Attributes:
        loss: |a - b| / |b|.
        gradient: norm of the difference of all gradients over the norm of the right ones.
    """

    loss: float
    gradient: float


def tiny_bases(tokenizer: PreTrainedTokenizerBase) -> Bases:
    """A random Llama of five blocks over the tokenizer's vocabulary."""
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(shape)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.1)
    return Bases(lambda dtype: load_base(copy.deepcopy(model), dtype=dtype)._replace(tokenizer=tokenizer))


def check_ours(names: list[str], rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Error]:
    """Loss and gradient of each of ours on a tiny model, against float64 with all logits in memory.

    Raises:
        SystemExit: one differs by more than `LIMIT`.
    """
    bases, errors, rows = tiny_bases(tokenizer), {}, _shortened(rows)
    for name in names:
        with tempfile.TemporaryDirectory(prefix="prefmix-bench-") as cache, environment(environment_of(name)):
            trainer = our_trainer(name, bases, Course(rows, len(rows), 1, cache))
            move(trainer)
            loss = loss_and_backward(trainer)
        leaves = {key: p.detach().double().requires_grad_() for key, p in trained(trainer).items()}
        expected = materialised_loss(trainer, leaves)
        right = torch.autograd.grad(expected, list(leaves.values()))
        found = [p.grad for p in trained(trainer).values()]
        errors[name] = compare(name, (loss, found), (expected, list(right)))
    return errors


def check_against_trl(name: str, bases: Bases, rows: list[dict[str, Any]]) -> Error:
    """Loss and gradient of our only expert against TRL's LoRA, with moved adapters, on the model that is timed.

    Raises:
        SystemExit: they differ by more than `LIMIT`.
    """
    course = Course(_shortened(rows), len(rows), 1, "")
    ours, theirs = our_trainer(name, bases, course), trl_trainer("TRL LoRA", bases, course)
    move(ours)
    copy_adapter_to_trl(ours, theirs.model)
    loss = loss_and_backward(ours)
    batch = theirs._prepare_inputs(next(iter(theirs.get_train_dataloader())))
    expected = theirs.compute_loss(theirs.model, batch)
    expected.backward()
    stacks, parameters = ours.mixture.experts.branches.stacks(), dict(theirs.model.named_parameters())
    right = [parameters[peft_name(key)].grad for key in stacks]
    return compare(name, (loss, [p.grad[0] for p in stacks.values()]), (expected, right))


def _shortened(rows: list[dict[str, Any]], words: int = 12) -> list[dict[str, Any]]:
    """Short texts: sums of a thousand nats in float32 are themselves wrong by more than the limit."""
    return [{key: " " + " ".join(text.split()[:words]) for key, text in row.items()} for row in rows]


def move(trainer: MixtureTrainer) -> None:
    """Takes every trained parameter away from its start, where half of all gradients are zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained(trainer).values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def trained(trainer: MixtureTrainer) -> dict[str, nn.Parameter]:
    """What the experts train."""
    return {name: p for name, p in trainer.mixture.experts.named_parameters() if p.requires_grad}


def loss_and_backward(trainer: MixtureTrainer) -> Tensor:
    """The trainer's own loss of its first batch; gradients are where they belong."""
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=batch["weight"].sum())
    loss.backward()
    return loss


def materialised_loss(trainer: MixtureTrainer, leaves: dict[str, Tensor]) -> Tensor:
    """- mean_i log sum_k 1/K sigmoid(beta (log-ratio of chosen - of rejected)), with whole models and all logits."""
    table, num_experts = trainer.train_comparisons.table, trainer.args.num_experts
    texts = pad_texts(table.texts, torch.arange(len(table.texts)).numpy())
    model = copy.deepcopy(trainer.base.model).float().double()
    reference = _log_probs(model, {}, texts)
    rewards = torch.stack([_log_probs(model, _of_expert(trainer, leaves, k), texts) for k in range(num_experts)], 1)
    rewards = BETA * (rewards - reference[:, None])
    margins = rewards[torch.from_numpy(table.chosen)] - rewards[torch.from_numpy(table.rejected)]
    evidence = torch.logsumexp(nn.functional.logsigmoid(margins), 1) - math.log(num_experts)
    # The density of a flat Dirichlet over the gate's weights, Gamma(K), is part of the bound.
    return -(evidence.sum() + math.lgamma(num_experts)) / len(table)


def _of_expert(trainer: MixtureTrainer, leaves: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """Weights of expert k that differ from the base's: merged LoRA, or the parts of its head."""
    own = {key.removeprefix("head."): value[k] for key, value in leaves.items() if key.startswith("head.")}
    branches = getattr(trainer.mixture.experts, "branches", None)
    if branches is not None:
        by_id = {id(p): key for key, p in trained(trainer).items()}
        stacks = {name: leaves[by_id[id(p)]][k] for name, p in branches.stacks().items()}
        for name in branches.names:
            update = stacks[f"{name}.lora_B.weight"] @ stacks[f"{name}.lora_A.weight"]
            own[f"{name}.weight"] = branches.scale * update
    return own


def _log_probs(model: nn.Module, own: dict[str, Tensor], texts: PaddedTexts) -> Tensor:
    """[N] log-probabilities of completions."""
    weights = dict(model.named_parameters())
    merged = {name: weights[name] + update for name, update in own.items() if name in weights}
    options = {"input_ids": texts.input_ids, "attention_mask": texts.attention_mask, "output_hidden_states": True}
    hidden = functional_call(model, merged, kwargs=options, tie_weights=False).hidden_states[-1].double()
    head = own.get("weight", model.get_output_embeddings().weight.detach())
    if "down" in own:
        hidden = hidden + hidden @ own["down"].T @ own["up"].T
    log_probs = (hidden[:, :-1] @ head.T).log_softmax(-1)
    found = log_probs.gather(-1, texts.input_ids[:, 1:, None])[..., 0]
    return (found * texts.completion_mask[:, 1:]).sum(1)


def compare(name: str, found: tuple[Tensor, list[Tensor | None]], right: tuple[Tensor, list[Tensor]]) -> Error:
    """Relative differences, or the end."""
    pairs = [(torch.zeros_like(b) if a is None else a, b) for a, b in zip(found[1], right[1], strict=True)]
    ours = torch.cat([a.detach().double().flatten() for a, _ in pairs])
    theirs = torch.cat([b.detach().double().flatten() for _, b in pairs])
    error = Error(
        abs(found[0].item() - right[0].item()) / abs(right[0].item()),
        float((ours - theirs).norm() / theirs.norm()),
    )
    if not max(error) <= LIMIT:
        raise SystemExit(f"correctness gate: {name} differs by {error} (limit {LIMIT}); nothing is timed")
    return error
