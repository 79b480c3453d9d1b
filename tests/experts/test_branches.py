"""LoRA branches against the plain PEFT forward, over architectures, depths, heads and trunks."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

from prefmix.experts.branches import BranchedExperts
from prefmix.experts.build import build_experts
from prefmix.experts.text_pass import pad_texts

FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "Phi", "Phi3", "Olmo2", "GPT2"]


def moved(experts: BranchedExperts, scale: float = 0.1) -> BranchedExperts:
    """Experts (and a trained trunk) that have left their start, each in its own direction."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in experts.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    return experts


def peft_log_probs(model, experts: BranchedExperts, expert: int, texts, ids) -> torch.Tensor:
    """What PEFT's own forward gives with the expert's matrices copied in; the head is the base's."""
    state = experts.expert_state(expert) | experts.shared_state()
    layers = sorted({name.removesuffix(".weight").rpartition(".")[0] for name in state})
    config = LoraConfig(r=experts.rank, lora_alpha=experts.lora_alpha, target_modules=layers, task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, config).eval()
    result = set_peft_model_state_dict(peft_model, {f"base_model.model.{name}": x for name, x in state.items()})
    assert not result.unexpected_keys and not [name for name in result.missing_keys if "lora" in name]
    return token_sum(peft_model, texts, ids)


@torch.no_grad()
def token_sum(model, texts, ids) -> torch.Tensor:
    """Sum of completion log-probabilities of single, unpadded texts."""
    sums = []
    for i in ids:
        prompt, completion = texts.prompt_ids[i], texts.completion_ids[i]
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        sums.append(logits.double().log_softmax(-1).gather(-1, torch.tensor(completion)[:, None]).sum())
    return torch.stack(sums)


@pytest.mark.parametrize("depth", [1, 2, -1])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_equal_plain_peft(make_family_model, make_texts, family, depth):
    texts, ids = make_texts(), [1, 3, 4]
    model = make_family_model(family)
    experts = moved(BranchedExperts(model, 2, depth, rank=2))
    result = experts(pad_texts(texts, ids))
    torch.testing.assert_close(result.ref_log_probs[:, 0].double(), token_sum(model, texts, ids), rtol=1e-5, atol=1e-5)
    for expert in range(2):
        expected = peft_log_probs(make_family_model(family), experts, expert, texts, ids)
        torch.testing.assert_close(result.log_probs[:, expert].double(), expected, rtol=1e-5, atol=1e-5)
    assert (result.log_probs - result.ref_log_probs).abs().max() > 0.5  # far from the start


@pytest.mark.parametrize("depth", [1, 3, -1])
@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_start_every_expert_is_the_reference_exactly(make_family_model, make_texts, family, depth):
    result = BranchedExperts(make_family_model(family), 2, depth)(pad_texts(make_texts(), range(5)))
    assert torch.equal(result.log_probs, result.ref_log_probs)
    assert result.log_probs.requires_grad and not result.ref_log_probs.requires_grad


@pytest.mark.parametrize(
    ("depth", "head", "trunk"),
    [(1, "hidden", "frozen"), (2, "logit", "lora"), (-1, "hidden", "frozen"), (1, "none", "lora"), (2, "none", "full")]
    + [(0, "hidden", "lora"), (0, "full", "lora"), (0, "logit", "full")],
)
class TestEveryCombination:
    def experts(self, make_tiny_model, depth, head, trunk, **fields):
        model = make_tiny_model(num_hidden_layers=3)
        return BranchedExperts(model, 2, depth, head=head, rank=2, trunk=trunk, **fields)

    def test_the_start_is_the_reference_exactly(self, make_tiny_model, make_texts, depth, head, trunk):
        result = self.experts(make_tiny_model, depth, head, trunk)(pad_texts(make_texts(), range(5)))
        assert torch.equal(result.log_probs, result.ref_log_probs)

    def test_the_reference_stays_the_base(self, make_tiny_model, make_texts, depth, head, trunk):
        texts = make_texts()
        experts = moved(self.experts(make_tiny_model, depth, head, trunk))
        result = experts(pad_texts(texts, range(5)))
        expected = token_sum(make_tiny_model(num_hidden_layers=3), texts, range(5))
        torch.testing.assert_close(result.ref_log_probs[:, 0].double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(token_sum(experts.base_model, texts, range(5)), expected, rtol=0, atol=0)

    def test_gradients_equal_finite_differences(self, make_tiny_model, make_texts, depth, head, trunk):
        texts = pad_texts(make_texts(), range(5))
        experts = moved(self.experts(make_tiny_model, depth, head, trunk)).double()
        trained = [p for p in experts.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss(experts, texts), trained)
        generator = torch.Generator().manual_seed(3)
        directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in trained]
        step = 1e-4  # the model computes its norms in float32, so smaller steps drown
        values = []
        for sign in (1, -2):
            with torch.no_grad():
                for parameter, direction in zip(trained, directions, strict=True):
                    parameter += sign * step * direction
                values.append(loss(experts, texts).item())
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx(sum(float((g * d).sum()) for g, d in zip(grads, directions)), rel=1e-3)

    def test_state_and_description_rebuild_them(self, make_tiny_model, make_texts, depth, head, trunk):
        experts = moved(self.experts(make_tiny_model, depth, head, trunk, lora_alpha=3.0))
        rebuilt = build_experts(make_tiny_model(num_hidden_layers=3), json.loads(json.dumps(experts.describe())))
        for k in range(2):
            rebuilt.load_expert_state(k, experts.expert_state(k))
        rebuilt.load_shared_state(experts.shared_state())
        texts = pad_texts(make_texts(), range(5))
        assert torch.equal(experts(texts).log_probs, rebuilt(texts).log_probs)

    def test_only_the_trunk_and_the_experts_train(self, make_tiny_model, make_texts, depth, head, trunk):
        experts = self.experts(make_tiny_model, depth, head, trunk).train()
        assert not experts.base_model.training and not experts.trunk.model.training
        trained = {name.split(".")[0] for name, p in experts.named_parameters() if p.requires_grad}
        expected = {"branches"} if depth else set()
        expected |= {"head"} if head != "none" else set()
        assert trained == expected | ({"trunk"} if trunk != "frozen" else set())
        loss(moved(experts), pad_texts(make_texts(), range(5))).backward()
        assert all((p.grad is not None) == p.requires_grad for p in experts.parameters())


def loss(experts: BranchedExperts, texts) -> torch.Tensor:
    """Any smooth function of all log-probabilities."""
    log_probs = experts(texts).log_probs
    return (log_probs * torch.linspace(0.5, 1.5, log_probs.numel()).view_as(log_probs).to(log_probs)).sum() / 10


def test_a_shared_lora_trunk_equals_plain_peft(make_tiny_model, make_texts):
    texts = make_texts()
    experts = moved(BranchedExperts(make_tiny_model(num_hidden_layers=3), 2, 1, rank=2, trunk="lora"))
    result = experts(pad_texts(texts, range(5)))
    assert experts.branch_layers() == [0, 1, 2]
    for expert in range(2):
        expected = peft_log_probs(make_tiny_model(num_hidden_layers=3), experts, expert, texts, range(5))
        torch.testing.assert_close(result.log_probs[:, expert].double(), expected, rtol=1e-5, atol=1e-5)


def test_a_full_trunk_copies_only_what_trains(make_tiny_model):
    model = make_tiny_model(num_hidden_layers=3, tie_word_embeddings=False)
    experts = BranchedExperts(model, 2, 1, trunk="full")
    trained = experts.trunk.parameters_by_name()
    assert any(name.startswith("model.embed_tokens") for name in trained)
    assert {name.split(".")[2] for name in trained if ".layers." in name} == {"0", "1"}
    assert experts.trunk.model.lm_head.weight is model.lm_head.weight
    assert experts.trunk.model.model.layers[2].mlp.up_proj.weight is model.model.layers[2].mlp.up_proj.weight
    assert not any(p.requires_grad for p in model.parameters())
    tied = BranchedExperts(make_tiny_model(), 2, 1, trunk="full")
    assert not any("embed_tokens" in name for name in tied.trunk.parameters_by_name())


def test_a_frozen_trunk_runs_once_for_all_experts(make_tiny_model, make_texts, monkeypatch):
    experts = BranchedExperts(make_tiny_model(num_hidden_layers=3), 4, 1)
    counts = [0, 0, 0]

    def count(module, *_, layer):
        counts[layer] += 1

    for layer, block in enumerate(experts.base_model.model.layers):
        block.mlp.register_forward_hook(lambda module, *args, layer=layer: count(module, layer=layer))
    experts(pad_texts(make_texts(), range(5)))
    assert counts == [1, 1, 5]  # the last block: the reference and four experts


def test_a_bfloat16_base_keeps_float32_updates_and_the_exact_start(make_tiny_model, make_texts):
    experts = BranchedExperts(make_tiny_model().bfloat16(), 2, 1)
    result = experts(pad_texts(make_texts(), range(5)))
    assert {p.dtype for p in experts.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(result.log_probs, result.ref_log_probs)
    loss(moved(experts, 0.01), pad_texts(make_texts(), range(5))).backward()
    assert all(p.grad.isfinite().all() for p in experts.branches.parameters())


@pytest.mark.parametrize(("depth", "trunk"), [(1, "frozen"), (-1, "frozen"), (1, "full"), (1, "lora")])
def test_recomputed_activations_give_the_same_gradients(make_tiny_model, make_texts, depth, trunk):
    texts = pad_texts(make_texts(), range(5))
    grads, runs = [], []
    for recompute in (False, True):
        experts = moved(BranchedExperts(make_tiny_model(), 2, depth, rank=2, trunk=trunk))
        if recompute:
            experts.activation_checkpointing_enable()
        runs.append(0)
        block = experts.trunk.model.model.layers[1]
        block.mlp.register_forward_hook(lambda *_: runs.__setitem__(-1, runs[-1] + 1))
        grads.append(torch.autograd.grad(loss(experts, texts), [p for p in experts.parameters() if p.requires_grad]))
    assert runs[1] == runs[0] + 2  # each of two experts once more
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("prefix_sharing", [False, True])
@pytest.mark.parametrize(("depth", "trunk"), [(0, "full"), (0, "lora"), (1, "full"), (1, "lora")])
def test_a_trained_trunk_keeps_its_blocks_inputs_alone(make_tiny_model, make_texts, depth, trunk, prefix_sharing):
    texts = pad_texts(make_texts(), range(5))
    grads, kept, runs = [], [], []
    for recompute in (False, True):
        experts = moved(
            BranchedExperts(make_tiny_model(num_hidden_layers=4), 2, depth, head="hidden", rank=2, trunk=trunk)
        )
        experts.prefix_sharing = prefix_sharing
        if recompute:
            experts.activation_checkpointing_enable()
        runs.append(0)
        experts.trunk.model.model.layers[0].mlp.register_forward_pre_hook(
            lambda *_: runs.__setitem__(-1, runs[-1] + torch.is_grad_enabled())
        )
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            found = loss(experts, texts)
        grads.append(torch.autograd.grad(found, [p for p in experts.parameters() if p.requires_grad]))
        kept.append(sum(sizes))
        assert not any(module.training for module in experts.trunk.model.modules())
    assert runs == [1, 2]  # the trunk's block once more
    assert kept[1] < 0.75 * kept[0]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_layer_that_is_no_plain_product_adds_the_same_update(make_tiny_model, make_texts):
    texts, results = pad_texts(make_texts(), range(5)), []
    for wrapped in (False, True):
        experts = moved(BranchedExperts(make_tiny_model(), 2, 1, rank=2))
        layer = experts.base_model.model.layers[1].mlp.up_proj
        if wrapped:  # as hooks that load offloaded weights do
            layer.forward = lambda inputs, forward=layer.forward: forward(inputs)
        trained = [p for p in experts.parameters() if p.requires_grad]
        results.append([experts(texts).log_probs, *torch.autograd.grad(loss(experts, texts), trained)])
        assert ("forward" in layer.__dict__) == wrapped
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


def test_the_model_is_left_as_it_was(make_tiny_model, make_texts):
    model = make_tiny_model()
    experts = moved(BranchedExperts(model, 2, 1, trunk="lora"))
    experts(pad_texts(make_texts(), range(5)))
    assert all("forward" not in module.__dict__ and not module._forward_hooks for module in model.modules())


def test_experts_differ_in_their_random_part_and_follow_the_seed(make_tiny_model):
    down = [
        next(
            iter(
                BranchedExperts(
                    make_tiny_model(), 2, 1, generator=torch.Generator().manual_seed(s)
                ).branches.down.values()
            )
        )
        for s in (0, 0, 1)
    ]
    assert torch.equal(down[0], down[1])
    assert not torch.equal(down[0], down[2])
    assert not torch.allclose(down[0][0], down[0][1])


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"branch_depth": 3}, "branch_depth=3: the model has 2 blocks"),
        ({"branch_depth": -2}, "branch_depth=-2"),
        ({"branch_depth": 0}, "head='none' with branch_depth=0"),
        ({"head": "full"}, "head='full'"),
        ({"head": "lora"}, "head='lora'"),
        ({"trunk": "free"}, "trunk='free'"),
        ({"branch_depth": -1, "trunk": "lora"}, "no block is left"),
        ({"branch_depth": 2, "trunk": "lora"}, "no trunk to train|there is no"),
        ({"rank": 0}, "expert_rank=0"),
    ],
)
def test_wrong_choices_are_named(tiny_model, fields, match):
    with pytest.raises(ValueError, match=match):
        BranchedExperts(tiny_model, **({"num_experts": 2, "branch_depth": 1} | fields))


def test_a_state_of_another_rank_is_refused(make_tiny_model):
    small, large = (BranchedExperts(make_tiny_model(), 2, 1, rank=rank, trunk="lora") for rank in (2, 4))
    with pytest.raises(ValueError, match="expert 1: 28 tensors differ"):
        small.load_expert_state(1, large.expert_state(1))
    with pytest.raises(ValueError, match="trained trunk: 28 tensors differ"):
        small.load_shared_state(large.shared_state())


def test_an_architecture_that_hides_its_blocks_says_so_and_works_at_full_depth(make_tiny_model, make_texts):
    model = make_tiny_model()
    # A decoder whose blocks are in no list of their own.
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList([*layers, torch.nn.Identity()])
    with pytest.raises(ValueError, match=r"no single list of num_hidden_layers=2 blocks.*branch_depth=-1"):
        BranchedExperts(model, 2, 1)
    experts = BranchedExperts(model, 2, -1)
    result = experts(pad_texts(make_texts(), range(5)))
    assert torch.equal(result.log_probs, result.ref_log_probs)


def test_softcapped_logits_are_refused_by_name(make_family_model):
    model = make_family_model("Gemma2")
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping=30.0"):
        BranchedExperts(model, 2, 1)
