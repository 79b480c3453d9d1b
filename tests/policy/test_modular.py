"""Adding, removing, replacing and melting experts of a trained policy: what changes, and what must not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prefmix.experts.branches import BranchedExperts
from prefmix.experts.independent import IndependentExperts
from prefmix.mixture.gates import Gate
from prefmix.policy.adapters import write_adapter
from prefmix.policy.config import PolicyConfig
from prefmix.policy.mixture_model import MixtureModel
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.policy.modular import CopyOf, add_expert, remove_expert, replace_expert, soup

PROMPT, RESPONSES = "Where is the sun?", ["In the sky.", "In the sea.", "No, it is not."]
HEADS = ["hidden", "logit", "full"]
ROWS = [
    {"prompt": "Where is the sun?", "chosen": " In the sky.", "rejected": " In the sea.", "user": "anna"},
    {"prompt": "What color is it?", "chosen": " Blue.", "rejected": " Green.", "user": "anna"},
    {"prompt": "Where is the sun?", "chosen": " In the sea.", "rejected": " In the sky.", "user": "carl"},
]


def per_expert(policy: MixturePolicy) -> torch.Tensor:
    return policy.log_prob(PROMPT, RESPONSES, per_expert=True)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=2e-4)


@pytest.fixture
def independent(make_tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> MixturePolicy:
    experts = IndependentExperts([make_tiny_model(1), make_tiny_model(2)], make_tiny_model())
    config = PolicyConfig((0.1, 0.2), "user", "<base>", "0" * 64, max_length=64)
    return MixturePolicy(MixtureModel(experts, Gate(2, ("global",))), tiny_tokenizer, config)


@pytest.mark.parametrize("head", HEADS)
def test_an_added_expert_is_last_and_the_others_stay(make_policy: Callable[..., MixturePolicy], head: str) -> None:
    policy = make_policy(head=head)
    before, weights = per_expert(policy), policy.gate_weights()
    new = add_expert(policy, CopyOf(1, scale=0.05, seed=3), weight=0.2)
    after = per_expert(new)
    assert same(after[:, :3], before)
    assert not same(after[:, 3], before[:, 1]) and (after[:, 3] - before[:, 1]).abs().max() < 20
    assert same(per_expert(add_expert(policy, CopyOf(1, scale=0.0)))[:, 3], before[:, 1])
    assert torch.allclose(new.gate_weights(), torch.cat([0.8 * weights, torch.tensor([0.2])]).double(), atol=1e-6)
    assert new.config.beta == (*policy.config.beta, policy.config.beta[1])
    assert torch.equal(per_expert(policy), before) and policy.config.num_experts == 3  # pure


def test_a_new_expert_is_neutral_to_known_users(make_policy: Callable[..., MixturePolicy]) -> None:
    policy = make_policy()
    new = add_expert(policy, CopyOf(0), weight=0.25)
    for user in ("anna", "bob"):
        expected = torch.cat([0.75 * policy.weights(user=user), torch.tensor([0.25], dtype=torch.float64)])
        assert torch.allclose(new.weights(user=user), expected, atol=1e-6)


def test_rows_say_what_users_think_of_all_experts(make_policy: Callable[..., MixturePolicy]) -> None:
    policy = make_policy()
    new = add_expert(policy, CopyOf(0, scale=0.5), weight=0.25, rows=ROWS)
    fresh = add_expert(policy, CopyOf(0, scale=0.5), weight=0.25)
    for user, own in (("anna", ROWS[:2]), ("carl", ROWS[2:])):
        assert torch.allclose(new.weights(user=user), fresh.adapt(user, own, anew=True), atol=1e-9)
    assert new.users.names == ["anna", "bob", "carl"]
    assert new.weights(user="bob")[3] == pytest.approx(0.25, abs=1e-6)
    assert "carl" not in policy.users


def test_users_with_weights_of_their_own_give_a_share_too(make_policy: Callable[..., MixturePolicy]) -> None:
    policy = make_policy("pair", ("global", "user"))
    new = add_expert(policy, CopyOf(0), weight=0.25)
    for user in ("anna", "bob"):
        assert new.weights(user=user)[3] == pytest.approx(0.25, abs=1e-6)
        assert torch.allclose(new.weights(user=user)[:3], 0.75 * policy.weights(user=user), atol=1e-6)
    adapted = replace_expert(policy, 0, CopyOf(1), rows=ROWS)
    population = MixturePolicy.gate_weights(adapted)
    assert not torch.allclose(adapted.weights(user="anna"), population, atol=1e-4)
    assert adapted.users.count[adapted.users.index("anna")] == 2


@pytest.mark.parametrize("head", HEADS)
def test_removing_what_was_added_gives_the_policy_back(make_policy: Callable[..., MixturePolicy], head: str) -> None:
    policy = make_policy(head=head)
    back = remove_expert(add_expert(policy, CopyOf(1), weight=0.3), 3)
    assert same(per_expert(back), per_expert(policy))
    for user in (None, "anna", "bob"):
        assert torch.allclose(back.weights(user=user), policy.weights(user=user), atol=1e-6)


def test_the_rest_is_renormalised(make_policy: Callable[..., MixturePolicy]) -> None:
    policy = make_policy()
    left = remove_expert(policy, 1)
    assert same(per_expert(left), per_expert(policy)[:, [0, 2]])
    for user in (None, "anna"):
        kept = policy.weights(user=user)[[0, 2]]
        assert torch.allclose(left.weights(user=user), kept / kept.sum(), atol=1e-6)
    assert left.config.provenance["changes"] == ["removed expert 1"]


@pytest.mark.parametrize("head", HEADS)
def test_a_replaced_expert_keeps_its_place_and_weight(make_policy: Callable[..., MixturePolicy], head: str) -> None:
    policy = make_policy(head=head)
    new = replace_expert(policy, 0, CopyOf(2, scale=0.0))
    assert same(per_expert(new), per_expert(policy)[:, [2, 1, 2]])
    assert torch.allclose(new.gate_weights(), policy.gate_weights(), atol=1e-6)
    # Neutral: the user's posterior weight of the new expert is its prior weight.
    assert torch.allclose(new.weights(user="anna")[0], policy.gate_weights()[0], atol=1e-6)


@pytest.mark.parametrize("head", ["hidden", "logit"])
@pytest.mark.parametrize("rank", [2, 7])
def test_an_adapter_joins_whatever_its_rank(
    make_policy: Callable[..., MixturePolicy],
    make_experts: Callable[..., Any],
    make_tiny_model: Callable[..., Any],
    tmp_path: Path,
    head: str,
    rank: int,
) -> None:
    other = make_experts(make_tiny_model(), num_experts=2, head=head, rank=rank)
    (tmp_path / "adapter").mkdir()
    write_adapter(other, 1, tmp_path / "adapter", "base")
    policy = make_policy(head=head)
    new = add_expert(policy, tmp_path / "adapter")
    assert new.config.experts["rank"] == max(rank, 4)
    assert same(per_expert(new)[:, :3], per_expert(policy))
    config = PolicyConfig((0.1, 0.1), "user", "<base>", "0" * 64, max_length=128)
    alone = MixturePolicy(MixtureModel(other, Gate(2, ("global",))), policy.tokenizer, config)
    assert same(per_expert(new)[:, 3], per_expert(alone)[:, 1])


def test_an_adapter_that_experts_cannot_hold_is_refused(
    make_policy: Callable[..., MixturePolicy], make_experts: Callable[..., Any], make_tiny_model: Any, tmp_path: Path
) -> None:
    (tmp_path / "logit").mkdir()
    write_adapter(make_experts(make_tiny_model(), 2, "logit"), 0, tmp_path / "logit", "base")
    with pytest.raises(ValueError, match="head='logit'"):
        add_expert(make_policy(head="hidden"), tmp_path / "logit")
    from peft import LoraConfig, get_peft_model

    get_peft_model(make_tiny_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "attention")
    with pytest.raises(ValueError, match="branch_depth"):
        add_expert(make_policy(), tmp_path / "attention")
    with pytest.raises(ValueError, match="no PEFT adapter there"):
        add_expert(make_policy(), tmp_path)


@pytest.mark.parametrize("head", HEADS)
def test_a_soup_averages_parameters(make_policy: Callable[..., MixturePolicy], head: str) -> None:
    policy = make_policy(head=head)
    shares = torch.tensor([0.5, 0.2, 0.3])
    model = policy.model.experts
    with torch.no_grad():
        hidden = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
        logits = model.head.logits(hidden, model.output_head, [0, 1, 2])
        melted = soup(policy, shares.tolist()).model.experts
        assert torch.allclose(
            melted.head.logits(hidden, melted.output_head, [0])[:, 0], (shares[:, None] * logits).sum(1), atol=1e-3
        )
    one_hot = soup(policy, [0, 1, 0])
    assert same(per_expert(one_hot)[:, 0], per_expert(policy)[:, 1])
    assert one_hot.config.num_experts == 1 and len(one_hot.users) == 0
    assert "not their mixture" in one_hot.config.provenance["changes"][0]


def test_independent_experts_are_modular_too(
    independent: MixturePolicy, make_tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    before = per_expert(independent)
    make_tiny_model(7, hidden_size=16).save_pretrained(tmp_path / "model")
    independent.tokenizer.save_pretrained(tmp_path / "model")
    new = add_expert(add_expert(independent, tmp_path / "model", beta=0.3), CopyOf(1, scale=0.0))
    assert torch.equal(per_expert(new)[:, [0, 1, 3]], before[:, [0, 1, 1]])
    assert torch.equal(per_expert(remove_expert(new, 2)), per_expert(new)[:, [0, 1, 3]])
    moved = replace_expert(independent, 0, CopyOf(0, scale=0.05))
    assert not same(per_expert(moved)[:, 0], before[:, 0]) and torch.equal(per_expert(independent), before)
    mean = soup(independent, [1, 3]).model.experts.expert_models[0]
    pairs = zip(mean.parameters(), *(model.parameters() for model in independent.model.experts.expert_models))
    assert all(torch.allclose(m, 0.25 * a + 0.75 * b, atol=1e-6) for m, a, b in pairs)
    with pytest.raises(ValueError, match="different shapes"):
        soup(new)


def test_what_cannot_be_is_refused(make_policy: Callable[..., MixturePolicy]) -> None:
    policy = make_policy(num_experts=1)
    with pytest.raises(ValueError, match="only expert"):
        remove_expert(policy, 0)
    with pytest.raises(ValueError, match="experts 0 to 0"):
        replace_expert(policy, 1, CopyOf(0))
    for change in (lambda: add_expert(policy, CopyOf(7)), lambda: replace_expert(policy, 0, CopyOf(7))):
        with pytest.raises(ValueError, match="expert=7: this policy has experts 0 to 0"):
            change()
    with pytest.raises(ValueError, match="give 1 numbers"):
        soup(policy, [0.5, 0.5])
    with pytest.raises(ValueError, match="above 0 and below 1"):
        add_expert(policy, CopyOf(0), weight=1.0)


def test_a_changed_policy_is_saved_and_loaded(make_policy: Callable[..., MixturePolicy], tmp_path: Path) -> None:
    new = add_expert(make_policy(), CopyOf(0), rows=ROWS)
    new.save_pretrained(tmp_path / "policy")
    loaded = MixturePolicy.from_pretrained(tmp_path / "policy", device="cpu")
    assert torch.equal(per_expert(loaded), per_expert(new))
    assert torch.equal(loaded.weights(user="carl"), new.weights(user="carl"))


@pytest.mark.parametrize("head", ["none", "logit"])
def test_branches_are_modular_too(
    make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path, head: str
) -> None:
    def build(rank: int, seed: int) -> MixturePolicy:
        experts = BranchedExperts(make_tiny_model(), 2, branch_depth=1, head=head, rank=rank, trunk="lora")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in experts.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        config = PolicyConfig((0.1, 0.1), "user", "<base>", "0" * 64, max_length=64)
        return MixturePolicy(MixtureModel(experts, Gate(2, ("global",))), tiny_tokenizer, config)

    policy = build(2, 0)
    before = per_expert(policy)
    assert same(per_expert(add_expert(policy, CopyOf(1, scale=0.0)))[:, [0, 1, 2]], before[:, [0, 1, 1]])
    assert same(per_expert(remove_expert(policy, 0)), before[:, [1]])
    one_hot = soup(policy, [0, 1])
    assert one_hot.config.experts["rank"] == 4 and same(per_expert(one_hot), before[:, [1]])


def test_an_adapter_joins_branches(make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    """A PEFT adapter of another rank and scale, on some of the layers that a branch has."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    other = get_peft_model(make_tiny_model(), config).eval()
    other.save_pretrained(tmp_path / "adapter")
    experts = BranchedExperts(make_tiny_model(), 2, branch_depth=-1, head="logit", rank=2)
    policy_config = PolicyConfig((0.1, 0.1), "user", "<base>", "0" * 64, max_length=64)
    policy = MixturePolicy(MixtureModel(experts, Gate(2, ("global",))), tiny_tokenizer, policy_config)
    new = add_expert(policy, tmp_path / "adapter").model.experts
    tokens = torch.tensor([[5, 6, 7, 8]])
    found = new.decoder(tokens, torch.ones_like(tokens), [2]).logits()[:, 0]
    with torch.no_grad():
        assert torch.allclose(found, other(input_ids=tokens).logits[:, -1], atol=1e-4)
