"""Terms of the gate, its updates, its prior and what unknown users get."""

import math

import pytest
import scipy.stats
import torch

from prefmix.mixture.gates import Gate, GateInputs

INPUTS = GateInputs(
    user=torch.tensor([0, 2, -1]), prompt_states=torch.randn(3, 5), metadata=torch.tensor([[1.0, 0.0]] * 3)
)
ALL_TERMS = ["global", "prompt", "user", "metadata"]


def _full_gate(**options):
    gate = Gate(4, ALL_TERMS, num_users=3, prompt_dim=5, metadata_dim=2, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return gate


@pytest.mark.parametrize("terms", [["global"], ["prompt"], ["user"], ["metadata"], ALL_TERMS])
def test_a_new_gate_is_uniform(terms):
    gate = Gate(4, terms, num_users=3, prompt_dim=5, metadata_dim=2)
    torch.testing.assert_close(gate(INPUTS).exp(), torch.full((3, 4), 0.25))


def test_terms_add_up_in_logit_space():
    gate = _full_gate()
    gate.fit_prompt_scale(torch.randn(50, 5) * 3 + 1)
    states = (INPUTS.prompt_states - gate.prompt_mean) / gate.prompt_scale / math.sqrt(5)
    offsets = torch.stack([gate.user[0], gate.user[2], torch.zeros(4)])
    logits = gate.global_logits + gate.prompt(states) + offsets + gate.metadata(INPUTS.metadata)
    torch.testing.assert_close(gate(INPUTS), logits.log_softmax(-1))


def test_rows_are_normalised_float32_under_bfloat16_autocast():
    gate = _full_gate()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_weights = gate(INPUTS)
    assert log_weights.dtype == torch.float32
    torch.testing.assert_close(log_weights, gate(INPUTS))
    torch.testing.assert_close(log_weights.exp().sum(-1), torch.ones(3))


def test_a_gate_cast_to_bfloat16_still_answers_in_float32():
    assert _full_gate().bfloat16()(INPUTS).dtype == torch.float32


def test_permuting_experts_permutes_the_gate():
    gate, permuted, order = _full_gate(), _full_gate(), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for name, parameter in permuted.named_parameters():
            parameter.copy_(parameter[:, order] if name == "user" else parameter[order])
    torch.testing.assert_close(permuted(INPUTS), gate(INPUTS)[:, order])


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_closed_form_is_the_dirichlet_map_and_takes_no_gradient(alpha):
    gate = Gate(3, ["global"], alpha=alpha)
    gate.closed_form_update(torch.tensor([0.5, 0.5, 0.0]), 10)
    expected = (torch.tensor([5.0, 5.0, 0.0]) + alpha - 1) / (10 + 3 * (alpha - 1))
    torch.testing.assert_close(gate(INPUTS)[0].exp(), expected)
    assert not list(gate.parameters())


@pytest.mark.parametrize("gate", [Gate(2, ["global"], update="gradient"), Gate(2, ["global", "prompt"], prompt_dim=1)])
def test_global_is_a_parameter_where_no_closed_form_exists(gate):
    assert "global_logits" in dict(gate.named_parameters())
    assert not gate.is_closed_form


def test_fixed_weights_stay_uniform():
    gate = Gate(2, ["global"], update="fixed")
    assert not list(gate.parameters()) and not gate.is_closed_form


def test_log_prior_is_the_sum_of_dirichlet_densities():
    gate = _full_gate(alpha=1.5, user_strength=6.0).double()
    population = gate.population_log_weights().exp().detach()
    rows = (gate.global_logits + gate.user).softmax(-1).detach()
    expected = scipy.stats.dirichlet([1.5] * 4).logpdf(population.numpy())
    concentration = 1 + 6.0 * population.numpy()
    expected += sum(scipy.stats.dirichlet(concentration).logpdf(row.numpy()) for row in rows)
    assert gate.log_prior().item() == pytest.approx(expected, rel=1e-9)


def test_the_users_prior_has_its_mode_at_the_global_weights():
    gate = Gate(3, ["global", "user"], num_users=1, user_strength=5.0).double()
    with torch.no_grad():
        gate.global_logits.copy_(torch.tensor([0.5, 0.0, -1.0]))
    at_mode = gate.log_prior()
    (gradient,) = torch.autograd.grad(at_mode, gate.user)
    torch.testing.assert_close(gradient, torch.zeros(1, 3, dtype=torch.float64))
    with torch.no_grad():
        gate.user.normal_()
    assert gate.log_prior() < at_mode


def test_log_prior_with_a_dead_expert_has_no_nan():
    gate = Gate(2, ["global"])
    gate.closed_form_update(torch.tensor([1.0, 0.0]), 4)
    assert math.isfinite(gate.log_prior())


def test_an_unknown_user_gets_the_population_even_beside_a_user_with_a_zero_weight():
    gate = Gate(2, ["global", "user"], num_users=1)
    gate.set_user_log_weights(0, torch.tensor([0.0, -math.inf]))
    log_weights = gate(GateInputs(torch.tensor([0, -1])))
    torch.testing.assert_close(log_weights.exp(), torch.tensor([[1.0, 0.0], [0.5, 0.5]]))


def test_new_users_start_at_the_population_and_take_their_own_weights():
    gate = _full_gate()
    (new,) = gate.add_users(1).tolist()
    assert new == 3 and torch.equal(gate.user[3], torch.zeros(4))
    wanted = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    gate.set_user_log_weights(new, wanted)
    torch.testing.assert_close((gate.global_logits + gate.user[new]).log_softmax(-1), wanted)


def test_a_gate_without_known_users_serves_strangers():
    gate = Gate(2, ["user"], num_users=0)
    torch.testing.assert_close(gate(GateInputs(torch.tensor([-1, -1]))).exp(), torch.full((2, 2), 0.5))


def test_description_and_state_rebuild_the_gate():
    gate = _full_gate(alpha=1.2)
    gate.fit_prompt_scale(torch.randn(20, 5))
    twin = Gate(**gate.describe())
    twin.load_state_dict(gate.state_dict())
    assert torch.equal(twin(INPUTS), gate(INPUTS))


def test_constant_prompt_directions_do_not_blow_up():
    gate = Gate(2, ["prompt"], prompt_dim=3)
    gate.fit_prompt_scale(torch.tensor([[1.0, 5.0, 0.0], [2.0, 5.0, 0.0], [4.0, 5.0, 0.0]]))
    assert torch.equal(gate.prompt_scale[1:], torch.ones(2))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"terms": []}, "gate"),
        ({"terms": ["global", "global"]}, "gate"),
        ({"terms": ["topic"]}, "gate"),
        ({"terms": ["global"], "update": "sgd"}, "gate_update"),
        ({"terms": ["global"], "alpha": 0.5}, "alpha"),
        ({"terms": ["prompt"]}, "prompt_dim"),
        ({"terms": ["metadata"]}, "metadata_dim"),
    ],
)
def test_impossible_gates_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        Gate(2, **arguments)
