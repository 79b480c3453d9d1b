"""What a policy says, against the definitions: mixtures over whole responses, Bayes' rule over users' comparisons."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn.functional import logsigmoid

from prefmix.mixture.likelihoods.model import FeedbackModel
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.policy.preferences import beating_probability

PROMPT, BLUE, GREEN = "What color is the sky?", " The sky is blue.", " The sky is green."
ROWS = [
    {"prompt": PROMPT, "chosen": BLUE, "rejected": GREEN},
    {"prompt": "Where is the sun?", "chosen": " In the sky.", "rejected": " In the sea.", "weight": 2.0},
]


def text_log_prob(policy, model_logits, prompt, response):
    """Sum over response tokens, end-of-sequence token included, from logits [L, V]."""
    ids = policy.tokenizer(prompt + response + policy.tokenizer.eos_token)["input_ids"]
    start = len(policy.tokenizer(prompt)["input_ids"])
    log_probs = model_logits(ids).double().log_softmax(-1)
    return sum(float(log_probs[t - 1, ids[t]]) for t in range(start, len(ids)))


@torch.no_grad()
def by_hand(policy, prompt, response):
    """[K] log pi_k and the reference's log-probability, with plain forward passes."""
    experts = policy.model.experts
    base, weight = experts.base_model, experts.base_weight

    def logits(expert):
        def call(ids):
            hidden = base.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
            up, down = experts.head.up[expert], experts.head.down[expert]
            return (hidden + hidden @ down.T @ up.T) @ weight.T

        return call

    own = [text_log_prob(policy, logits(k), prompt, response) for k in range(experts.num_experts)]
    reference = text_log_prob(policy, lambda ids: base(input_ids=torch.tensor([ids])).logits[0], prompt, response)
    return torch.tensor(own, dtype=torch.float64), reference


def margins_by_hand(policy, row):
    chosen, ref_chosen = by_hand(policy, row["prompt"], row["chosen"])
    rejected, ref_rejected = by_hand(policy, row["prompt"], row["rejected"])
    return 0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected))


def test_log_prob_is_the_mixture_over_whole_responses(make_policy):
    policy = make_policy()
    own = torch.stack([by_hand(policy, PROMPT, response)[0] for response in (BLUE, GREEN)])
    torch.testing.assert_close(policy.log_prob(PROMPT, [BLUE, GREEN], per_expert=True), own, atol=1e-3, rtol=0)
    for user in (None, "anna"):
        expected = torch.logsumexp(policy.weights(user=user).log() + own, dim=1)
        torch.testing.assert_close(policy.log_prob(PROMPT, [BLUE, GREEN], user=user), expected, atol=1e-3, rtol=0)
    both = policy.log_prob([PROMPT, PROMPT], [BLUE, GREEN], user=["anna", None])
    apart = torch.cat([policy.log_prob(PROMPT, BLUE, user="anna"), policy.log_prob(PROMPT, GREEN)])
    torch.testing.assert_close(both, apart, atol=1e-4, rtol=0)  # products of other sizes round differently


def test_log_prob_of_conversations(make_policy, tiny_chat_tokenizer):
    policy = make_policy(tokenizer=tiny_chat_tokenizer)
    messages = [{"role": "user", "content": "Where is the sun?"}]
    text = "<|im_start|>user\nWhere is the sun?<|im_end|>\n<|im_start|>assistant\n"
    expected = policy.log_prob(text, "In the sky.<|im_end|>\n", per_expert=True)
    # The plain text ends with one more end-of-sequence token, so only the message form is compared with itself.
    answer = [{"role": "assistant", "content": "In the sky."}]
    torch.testing.assert_close(
        policy.log_prob(messages, "In the sky.", per_expert=True),
        policy.log_prob([messages], [answer], per_expert=True),
    )
    assert (policy.log_prob(messages, "In the sky.", per_expert=True) > expected).all()


def test_a_known_user_gets_the_posterior_and_others_the_gate(make_policy):
    policy = make_policy()
    gate = policy.gate_weights()
    expected = (gate.log() + policy.users.log_lik[0]).softmax(0)
    torch.testing.assert_close(policy.weights(user="anna"), expected)
    torch.testing.assert_close(policy.gate_weights(user="anna"), gate)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(policy.weights(), gate)
    with pytest.warns(UserWarning, match="unknown users.*carol.*adapt"):
        torch.testing.assert_close(policy.weights(user="carol"), gate)
    with pytest.warns(UserWarning, match=r"unknown users \['annna'\] \(did you mean 'anna'\?\) get"):
        policy.weights(user="annna")


def test_where_nothing_depends_on_users_a_name_changes_nothing(make_policy):
    policy = make_policy("pair")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(policy.weights(user="carol"), policy.gate_weights())
    with pytest.raises(ValueError, match="nothing depends on the user"):
        policy.adapt("carol", ROWS)
    assert "carol" not in policy.users


def test_weights_read_metadata_and_prompts(make_policy):
    policy = make_policy("pair", ["global", "prompt", "metadata"])
    plain = policy.weights(PROMPT, metadata={"user_age": 30})
    assert not torch.allclose(plain, policy.weights(PROMPT, metadata={"user_age": 60}))
    assert not torch.allclose(plain, policy.weights("Where is the sun?", metadata={"user_age": 30}))
    torch.testing.assert_close(plain, policy.weights(PROMPT))  # without metadata: the mean age, which is 30
    assert policy.weights().sum() == pytest.approx(1)


def test_prompt_states_are_those_of_training(make_policy):
    from prefmix.data.tokenization import tokenize_rows
    from prefmix.experts.base_model import BaseModel
    from prefmix.experts.trunk_cache import build_trunk_states
    from prefmix.policy.prompt_states import pooled_prompt_states

    policy = make_policy()
    table = tokenize_rows(ROWS, policy.tokenizer, progress=False)
    base = BaseModel(policy.model.experts.base_model, policy.tokenizer, "", "0")
    states = build_trunk_states(base, table.texts, mode="memory", progress=False)
    torch.testing.assert_close(
        pooled_prompt_states(base.model, table.texts.prompts), states.prompt_mean, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("label_noise", [0.0, 0.2])
def test_adapt_is_bayes_rule_under_a_user_latent(make_policy, label_noise):
    policy = make_policy(label_noise=label_noise)
    margin = torch.stack([margins_by_hand(policy, row) for row in ROWS])
    log_lik = ((1 - label_noise) * margin.sigmoid() + label_noise * (-margin).sigmoid()).log()
    evidence = log_lik[0] + 2 * log_lik[1]
    expected = (policy.gate_weights().log() + evidence).softmax(0)
    torch.testing.assert_close(policy.adapt("carol", ROWS), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(policy.weights(user="carol"), expected, atol=1e-4, rtol=0)
    twice = (policy.gate_weights().log() + 2 * evidence).softmax(0)
    torch.testing.assert_close(policy.adapt("carol", ROWS), twice, atol=1e-4, rtol=0)
    before = policy.users.log_lik[0].clone()
    policy.adapt("anna", ROWS)
    torch.testing.assert_close(policy.users.log_lik[0], before + evidence, atol=1e-3, rtol=0)
    assert policy.users.count.tolist() == [4, 1, 6]


@pytest.mark.parametrize("terms", [["global", "user"], ["global", "prompt", "user"]])
def test_adapt_under_a_pair_latent_maximises_evidence_and_prior(make_policy, terms):
    policy = make_policy("pair", terms)
    population = policy.weights(PROMPT)
    weights = policy.adapt("carol", ROWS * 5)
    log_lik = torch.stack([logsigmoid(margins_by_hand(policy, row)) for row in ROWS]).repeat(5, 1)
    amount = torch.tensor([row.get("weight", 1.0) for row in ROWS], dtype=torch.float64).repeat(5)
    gate_module = policy.model.gate
    prompts = [row["prompt"] for row in ROWS] * 5
    strength = gate_module.user_strength * gate_module.population_log_weights().exp().double()

    def objective(offsets):
        rows = torch.stack([policy.gate_weights(prompt).log() for prompt in prompts]) + offsets
        prior = strength @ (gate_module.population_log_weights() + offsets).log_softmax(0)
        return float((amount @ torch.logsumexp(rows.log_softmax(1) + log_lik, dim=1) + prior).detach())

    found = gate_module.user[2].detach().double()
    for direction in torch.eye(3, dtype=torch.float64):
        for step in (-0.05, 0.05):
            assert objective(found) >= objective(found + step * direction) - 1e-6
    assert not torch.allclose(weights, population) and weights.sum() == pytest.approx(1)
    assert policy.users.names == ["anna", "bob", "carol"] and len(gate_module.user) == 3


def test_adaptation_is_kept_when_asked(make_policy, make_tiny_model, tmp_path):
    policy = make_policy()
    with pytest.raises(ValueError, match="no folder yet"):
        policy.adapt("carol", ROWS, save=True)
    policy.save_pretrained(tmp_path / "policy")
    policy.adapt("carol", ROWS)
    assert "carol" not in MixturePolicy.from_pretrained(tmp_path / "policy", device="cpu").users
    weights = policy.adapt("dave", ROWS, save=True)
    loaded = MixturePolicy.from_pretrained(tmp_path / "policy", device="cpu")
    assert loaded.users.names == ["anna", "bob", "carol", "dave"]
    torch.testing.assert_close(loaded.weights(user="dave"), weights)


def test_adapting_a_training_output_writes_to_the_policy_within(make_policy, tmp_path):
    make_policy().save_pretrained(tmp_path / "out" / "policy")
    (tmp_path / "out" / "metrics.jsonl").write_text("{}")
    MixturePolicy.from_pretrained(tmp_path / "out", device="cpu").adapt("carol", ROWS, save=True)
    assert "carol" in MixturePolicy.from_pretrained(tmp_path / "out", device="cpu").users
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.jsonl", "policy"]


def test_score_gives_rewards_margins_and_probabilities(make_policy):
    import json

    policy = make_policy(label_noise=0.1)
    tie = ROWS[0] | {"tie": True}
    scored = policy.score([ROWS[0] | {"user": "anna"}, tie | {"user": "bob"}, ROWS[1] | {"user": "bob"}])
    json.dumps(scored)
    assert scored[1] == {"row": 1, "dropped": True}
    for entry, row, user in ((scored[0], ROWS[0], "anna"), (scored[2], ROWS[1], "bob")):
        margin = margins_by_hand(policy, row)
        assert entry["rewards/margins"] == pytest.approx(margin.tolist(), abs=1e-4)
        chosen, reference = by_hand(policy, row["prompt"], row["chosen"])
        assert entry["rewards/chosen"] == pytest.approx((0.1 * (chosen - reference)).tolist(), abs=1e-4)
        probability = 0.9 * margin.sigmoid() + 0.1 * (-margin).sigmoid()
        assert entry["probabilities"] == pytest.approx(probability.tolist(), abs=1e-4)
        assert entry["probability"] == pytest.approx(float(policy.weights(user=user) @ probability), abs=1e-4)
        assert entry["user"] == user


def test_rank_orders_by_the_probability_of_winning(make_policy):
    policy = make_policy()
    candidates = [BLUE, GREEN, " In the sea."]
    rewards = []
    for candidate in candidates:
        own, reference = by_hand(policy, PROMPT, candidate)
        rewards.append(0.1 * (own - reference))
    weights = policy.weights(user="anna")
    scores = {}
    for i, candidate in enumerate(candidates):
        others = [float(weights @ (rewards[i] - rewards[j]).sigmoid()) for j in range(3) if j != i]
        scores[candidate] = sum(others) / 2
    ranked = policy.rank("anna", PROMPT, candidates)
    assert [entry.candidate for entry in ranked] == sorted(candidates, key=scores.get, reverse=True)
    for entry in ranked:
        assert entry.score == pytest.approx(scores[entry.candidate], abs=1e-4)
        assert candidates[entry.position] == entry.candidate
    assert policy.rank("anna", PROMPT, [BLUE])[0].score == 0.5
    with pytest.raises(ValueError, match="candidates"):
        policy.rank("anna", PROMPT, [])


def test_beating_probabilities_average_to_one_half():
    rewards = torch.randn(5, 3, dtype=torch.float64)
    for model in (FeedbackModel(label_noise=0.1), FeedbackModel(ties="davidson"), FeedbackModel("hinge")):
        scores = beating_probability(rewards, torch.tensor([0.2, 0.3, 0.5]).log(), torch.ones(3), model)
        assert float(scores.mean()) == pytest.approx(0.5)


def test_generation_returns_what_was_asked_for(make_policy):
    policy = make_policy()
    options = {"max_new_tokens": 6, "seed": 4}
    one = policy.generate(PROMPT, **options)
    assert isinstance(one, str) and policy.generate(PROMPT, **options) == one
    assert len(policy.generate([PROMPT, "Where?"], **options)) == 2
    three = policy.generate(PROMPT, num_return_sequences=3, temperature=2.0, **options)
    assert len(three) == 3 and len(set(three)) > 1
    assert policy.generate(PROMPT, seed=5, max_new_tokens=6) != one
    assert "".join(policy.generate(PROMPT, stream=True, **options)) == one
    greedy = policy.generate(PROMPT, do_sample=False, decoder="mixture", max_new_tokens=6)
    assert greedy == policy.generate(PROMPT, temperature=0, decoder="mixture", max_new_tokens=6)


def test_details_tell_which_expert_wrote(make_policy):
    policy = make_policy()
    details = policy.generate(PROMPT, num_return_sequences=40, max_new_tokens=4, seed=0, return_details=True)
    assert {response.expert for response in details} == {0, 1, 2}
    for response in details:
        assert response.log_rho.shape == (len(response.token_ids) + 1, 3)
    only = policy.generate(PROMPT, weights=[0, 1, 0], decoder="mixture", max_new_tokens=4, return_details=True)
    assert only.expert == 1 and only.log_prob < 0
    top = policy.generate(PROMPT, user="anna", decoder="top", max_new_tokens=4, return_details=True)
    assert top.expert == int(policy.weights(user="anna").argmax())
    mixed = policy.generate(PROMPT, decoder="mixture", max_new_tokens=4, return_details=True)
    assert mixed.expert is None
    torch.testing.assert_close(mixed.log_rho[0].exp(), policy.weights())


def test_a_user_hears_their_own_mixture(make_policy):
    policy = make_policy()
    policy.users.log_lik[0] = torch.tensor([0.0, -500.0, -500.0])
    policy.users.log_lik[1] = torch.tensor([-500.0, 0.0, -500.0])
    fields = {"num_return_sequences": 8, "max_new_tokens": 3, "return_details": True, "seed": 0}
    both = policy.generate([PROMPT, PROMPT], user=["anna", "bob"], **fields)
    assert [response.expert for response in both] == [0] * 8 + [1] * 8
    given = policy.generate([PROMPT, PROMPT], weights=[[0, 2, 0], [3, 0, 0]], **fields)
    assert [response.expert for response in given] == [1] * 8 + [0] * 8


def test_chat_prompts_go_through_the_template(make_policy, tiny_chat_tokenizer):
    policy = make_policy(tokenizer=tiny_chat_tokenizer)
    messages = [{"role": "user", "content": "Where is the sun?"}]
    text = "<|im_start|>user\nWhere is the sun?<|im_end|>\n<|im_start|>assistant\n"
    fields = {"max_new_tokens": 8, "seed": 1}
    assert policy.generate(messages, **fields) == policy.generate(text, **fields)
    assert policy.generate([messages, messages], **fields)[0] == policy.generate([text, text], **fields)[0]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"decoder": "beam"}, "decoder='beam'.*sample, mixture, top"),
        ({"weights": [0.5, 0.5]}, "weights="),
        ({"weights": [-1, 1, 1]}, "weights="),
        ({"weights": [0, 0, 0]}, "weights="),
        ({"weights": [[1, 0, 0], [0, 0, 0]], "prompt": ["a", "b"]}, "3 numbers .or 2 rows of them"),
        ({"weights": [[1, 0, 0]] * 3, "prompt": ["a", "b"]}, "3 numbers .or 2 rows of them"),
        ({"stream": True, "num_return_sequences": 2}, "stream=True"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"user": ["anna", "bob"]}, "user: 2 for 1 texts"),
        ({"prompt": [{"role": "usr", "content": "x"}]}, r"prompt\[0\] role 'usr' is unknown.*; write 'user'$"),
        ({"prompt": [{"content": "x"}]}, r"prompt\[0\] message has no 'role'.*; add 'role'"),
        ({"prompt": []}, r"prompt=\[\]"),
        ({"prompt": [{"role": "user", "content": "x"}]}, "no chat template"),
    ],
)
def test_requests_that_mean_nothing_are_refused(make_policy, fields, message):
    with pytest.raises(ValueError, match=message):
        make_policy().generate(**{"prompt": PROMPT, "max_new_tokens": 2} | fields)


def test_prompts_beyond_the_context_are_refused_and_responses_end_there(make_policy, tiny_tokenizer):
    policy = make_policy()
    length = len(tiny_tokenizer(PROMPT)["input_ids"])
    limit = tiny_tokenizer.model_max_length
    try:
        tiny_tokenizer.model_max_length = length + 3
        response = policy.generate(PROMPT, max_new_tokens=50, return_details=True, temperature=3.0)
        assert len(response.token_ids) <= 3
        tiny_tokenizer.model_max_length = length
        with pytest.raises(ValueError, match="shorten"):
            policy.generate(PROMPT)
    finally:
        tiny_tokenizer.model_max_length = limit
