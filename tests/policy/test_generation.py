"""Decoders against enumeration over experts with full forward passes: no cache, no batching, own processors."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from prefmix.policy.generation import DECODERS, PRODUCT, SamplingOptions, blend, decode, update_log_rho
from prefmix.policy.responses import left_pad

WEIGHTS = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
PROMPTS = [[17, 30, 45], [50, 61, 12, 200, 5, 7], [9, 80, 81, 3, 100]]
SETTINGS = [
    SamplingOptions(32),
    SamplingOptions(32, temperature=0.7),
    SamplingOptions(32, temperature=1.4, top_p=0.8),
    SamplingOptions(32, top_p=0.6),
    SamplingOptions(32, top_k=20, repetition_penalty=1.3),
    SamplingOptions(32, temperature=0),
]


def expert_logits(experts, token_ids):
    """[K, L, V] float64 logits after every prefix: W (h + U_k V_k h), from the definition."""
    hidden = experts.base_model.model(input_ids=torch.tensor([token_ids])).last_hidden_state[0].double()
    weight = experts.base_weight.double()
    up, down = experts.head.up.double(), experts.head.down.double()
    return torch.stack([(hidden + hidden @ down[k].T @ up[k].T) @ weight.T for k in range(experts.num_experts)])


def processed_log_probs(logits, tokens_read, options):
    """[V] log-probabilities of one expert at one position, processors written out."""
    logits = logits.clone()
    for token in set(tokens_read):
        penalty = options.repetition_penalty
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    if options.temperature not in (0, 1):
        logits /= options.temperature
    if options.temperature != 0 and options.top_k:
        logits[logits < logits.sort(descending=True).values[options.top_k - 1]] = -torch.inf
    if options.temperature != 0 and options.top_p < 1:
        probs, order = logits.softmax(0).sort(descending=True)
        outside = probs.cumsum(0) - probs >= options.top_p
        logits[order[outside]] = -torch.inf
    return logits.log_softmax(0)


def enumerate_experts(experts, prompt, response, log_weights, options):
    """Next-token probabilities sum_k rho_k pi_k(. | prefix) [T, V], and rho_k ~ w_k pi_k(prefix) [T + 1, K]."""
    logits = expert_logits(experts, prompt + response)
    log_prefix, distributions, rho = log_weights.clone(), [], [log_weights.softmax(0)]
    for t, token in enumerate(response):
        read = prompt + response[:t]
        step = torch.stack([processed_log_probs(logits[k, len(read) - 1], read, options) for k in range(len(logits))])
        distributions.append((rho[-1][:, None] * step.exp()).sum(0))
        log_prefix = log_prefix + step[:, token]
        rho.append(log_prefix.softmax(0))
    return torch.stack(distributions), torch.stack(rho)


@pytest.fixture(scope="module")
def experts(make_tiny_model, make_experts):
    return make_experts(make_tiny_model())


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@torch.no_grad()
def test_mixture_equals_enumeration_at_every_position(experts, options):
    log_weights = WEIGHTS.log().expand(len(PROMPTS), -1)
    generator = torch.Generator().manual_seed(1)
    prompt = left_pad(PROMPTS, 0, torch.device("cpu"))
    steps = list(decode(experts, *prompt, log_weights, options, eos_token_ids=set(), generator=generator))
    assert len(steps) == 32
    moved = 0.0
    for row, ids in enumerate(PROMPTS):
        response = [int(step.tokens[row]) for step in steps]
        expected, rho = enumerate_experts(experts, ids, response, WEIGHTS.log(), options)
        ours = torch.stack([step.distribution[row] for step in steps]).double().exp()
        assert (ours - expected).abs().max() < 1e-5
        ours_rho = torch.stack([step.log_rho[row] for step in steps]).exp()
        assert (ours_rho - rho[1:]).abs().max() < 1e-4
        moved = max(moved, float((rho[:8] - WEIGHTS).abs().max()))
        if options.greedy:
            assert response == expected.argmax(dim=1).tolist()
    assert moved > 0.2, "weights that never move would hide a decoder that forgets Bayes' rule"


@torch.no_grad()
def test_experts_of_these_tests_visibly_differ(experts):
    probs = expert_logits(experts, PROMPTS[0])[:, -1].softmax(-1)
    for a, b in itertools.combinations(range(4), 2):
        assert 0.5 * (probs[a] - probs[b]).abs().sum() > 0.2


@pytest.mark.parametrize("head", ["hidden", "logit", "full"])
@torch.no_grad()
def test_every_head_decodes_as_it_scores(make_tiny_model, make_experts, head):
    """sum_t log p(y_t) of the mixture equals logsumexp_k(log w_k + log pi_k(y)) of the scoring kernels."""
    from prefmix.experts.interface import PaddedTexts

    experts = make_experts(make_tiny_model(), head=head)
    prompt = left_pad(PROMPTS[:1], 0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    start = WEIGHTS.log()[None]
    steps = list(decode(experts, *prompt, start, SamplingOptions(12), eos_token_ids=set(), generator=generator))
    response = [int(step.tokens[0]) for step in steps]
    ids = torch.tensor([PROMPTS[0] + response])
    mask = torch.zeros_like(ids)
    mask[:, len(PROMPTS[0]) :] = 1
    log_probs = experts(PaddedTexts(ids, torch.ones_like(ids), mask)).log_probs[0].double()
    assert sum(float(step.log_probs[0]) for step in steps) == pytest.approx(
        float(torch.logsumexp(WEIGHTS.log() + log_probs, 0)), abs=1e-4
    )


@pytest.fixture(scope="module")
def small(make_tiny_model, make_experts):
    """Vocabulary of six, so that all continuations can be enumerated."""
    return make_experts(make_tiny_model(vocab_size=6, bos_token_id=None, eos_token_id=1), scale=2.5)


SMALL_PROMPT, EOS, LENGTH, DRAWS = [2, 3], 1, 3, 6000


def all_continuations():
    """Every response of at most LENGTH tokens that ends at EOS or is full."""
    found = []
    for tokens in itertools.product(range(6), repeat=LENGTH):
        end = tokens.index(EOS) + 1 if EOS in tokens else LENGTH
        found.append(tokens[:end])
    return sorted(set(found))


@torch.no_grad()
def continuation_probabilities(experts, options, *, constant_weights=False):
    probabilities = []
    for response in all_continuations():
        logits = expert_logits(experts, SMALL_PROMPT + list(response))
        steps = torch.stack(
            [
                torch.stack([processed_log_probs(logits[k, 1 + t], [], options)[token] for k in range(4)])
                for t, token in enumerate(response)
            ]
        )
        if constant_weights:
            probabilities.append(float((WEIGHTS * steps.exp()).sum(1).prod()))
        else:
            probabilities.append(float((WEIGHTS * steps.sum(0).exp()).sum()))
    return np.array(probabilities)


def draw_counts(experts, decoder, options):
    generator = torch.Generator().manual_seed(11)
    prompt = left_pad([SMALL_PROMPT] * DRAWS, 0, torch.device("cpu"))
    start = DECODERS[decoder](WEIGHTS.log().expand(DRAWS, -1), generator)
    written = [[] for _ in range(DRAWS)]
    ends = {"eos_token_ids": {EOS}, "product": decoder == PRODUCT}
    for step in decode(experts, *prompt, start, options, generator=generator, **ends):
        for row, token in zip(step.rows.tolist(), step.tokens.tolist()):
            written[row].append(token)
    position = {response: i for i, response in enumerate(all_continuations())}
    return np.bincount([position[tuple(tokens)] for tokens in written], minlength=len(position))


def chi_square_p(counts, probabilities):
    """Cells that expect fewer than five draws are taken together."""
    expected = probabilities / probabilities.sum() * counts.sum()
    rare = expected < 5
    observed, expected = np.append(counts[~rare], counts[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    kept = expected > 0
    assert observed[~kept].sum() == 0
    return chisquare(observed[kept], expected[kept]).pvalue


@pytest.mark.parametrize("decoder", ["sample", "mixture"])
@pytest.mark.parametrize("options", [SamplingOptions(3), SamplingOptions(3, temperature=0.8, top_p=0.9)], ids=str)
def test_frequencies_are_those_of_the_mixture(small, decoder, options):
    exact = continuation_probabilities(small, options)
    assert exact.sum() == pytest.approx(1)
    counts = draw_counts(small, decoder, options)
    assert chi_square_p(counts, exact) > 1e-3
    constant = continuation_probabilities(small, options, constant_weights=True)
    assert np.abs(constant - exact).sum() > 0.1, "the experts are too alike for this test to mean anything"
    wrong = constant[exact > 0] / constant[exact > 0].sum()
    assert chi_square_p(counts[exact > 0], wrong) < 1e-6, "mixing with constant weights would have passed as well"


@torch.no_grad()
def product_probabilities(experts, options, log_weights):
    """Of every continuation: by tokens' normalised geometric means, and as the product over whole responses."""
    by_token, whole = [], []
    for response in all_continuations():
        logits = expert_logits(experts, SMALL_PROMPT + list(response))[:, 1 : 1 + len(response)]
        mean = (log_weights.exp()[:, None, None] * logits.log_softmax(-1)).sum(0)
        tokens = torch.tensor(response)[:, None]
        whole.append(float(mean.gather(1, tokens).sum()))
        steps = [processed_log_probs(row.log_softmax(-1), [], options) for row in mean]
        by_token.append(sum(float(step[token]) for step, token in zip(steps, response, strict=True)))
    return np.exp(by_token), np.exp(whole) / np.exp(whole).sum()


@pytest.mark.parametrize("options", [SamplingOptions(3), SamplingOptions(3, temperature=0.8, top_p=0.9)], ids=str)
def test_product_draws_tokens_from_the_normalised_geometric_mean(small, options):
    exact, whole = product_probabilities(small, options, WEIGHTS.log())
    assert exact.sum() == pytest.approx(1)
    counts = draw_counts(small, PRODUCT, options)
    assert chi_square_p(counts, exact) > 1e-3
    if options == SamplingOptions(3):
        mixture = continuation_probabilities(small, options)
        assert chi_square_p(counts, mixture) < 1e-6, "the mixture would have passed as well"
        assert chi_square_p(counts, whole) < 1e-6, "the product over whole responses is another policy"


@torch.no_grad()
def test_product_over_whole_responses_is_that_by_tokens_times_the_agreement_along_the_way(small):
    """prod_k pi_k(y)^w_k = p(y) prod_t Z_t(y_<t), Z_t <= 1: what the docstring says of where the two differ."""
    by_token, _ = product_probabilities(small, SamplingOptions(3), WEIGHTS.log())
    for probability, response in zip(by_token, all_continuations(), strict=True):
        logits = expert_logits(small, SMALL_PROMPT + list(response))[:, 1 : 1 + len(response)]
        mean = (WEIGHTS[:, None, None] * logits.log_softmax(-1)).sum(0)
        agreement = mean.logsumexp(-1)
        assert (agreement <= 1e-9).all()
        unnormalised = mean.gather(1, torch.tensor(response)[:, None]).sum()
        assert float(unnormalised) == pytest.approx(np.log(probability) + float(agreement.sum()), abs=1e-4)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@torch.no_grad()
def test_product_equals_the_geometric_mean_at_every_position_of_a_batch(experts, options):
    prompt, generator = left_pad(PROMPTS, 0, torch.device("cpu")), torch.Generator().manual_seed(1)
    start = WEIGHTS.log().expand(len(PROMPTS), -1)
    steps = list(decode(experts, *prompt, start, options, eos_token_ids=set(), generator=generator, product=True))
    for row, ids in enumerate(PROMPTS):
        read = list(ids)
        for step in steps[:12]:
            blended = (WEIGHTS[:, None] * expert_logits(experts, read)[:, -1]).sum(0)
            expected = processed_log_probs(blended, read, options)
            assert (step.distribution[row].double().exp() - expected.exp()).abs().max() < 1e-5
            torch.testing.assert_close(step.log_rho[row].exp(), WEIGHTS)
            read.append(int(step.tokens[row]))


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_a_product_of_one_expert_is_that_expert_at_any_setting(experts, options):
    prompt, one = left_pad(PROMPTS, 0, torch.device("cpu")), torch.full((3, 4), -torch.inf, dtype=torch.float64)
    one[torch.arange(3), torch.tensor([2, 0, 2])] = 0.0
    written = [
        list(
            decode(
                experts, *prompt, one, options, eos_token_ids=set(),
                generator=torch.Generator().manual_seed(4), product=product,
            )
        )
        for product in (False, True)
    ]  # fmt: skip
    for alone, product in zip(*written, strict=True):
        assert torch.equal(alone.tokens, product.tokens)
        torch.testing.assert_close(alone.distribution, product.distribution, atol=1e-5, rtol=1e-5)


def test_an_expert_without_weight_says_nothing_in_a_product_even_where_it_forbids_a_token():
    logits = torch.tensor([[[1.0, 0.0], [-torch.inf, 0.0]]])
    assert blend(torch.tensor([[0.0, -torch.inf]]), logits).tolist() == [[[1.0, 0.0]]]
    assert blend(torch.tensor([[0.5, 0.5]]).log(), logits).tolist() == [[[-torch.inf, 0.0]]]


def test_top_is_the_heaviest_expert_alone(experts):
    generator = torch.Generator().manual_seed(0)
    start = DECODERS["top"](WEIGHTS.flip(0).log()[None], generator)
    assert start.exp().tolist() == [[0, 0, 0, 1]]
    prompt = left_pad(PROMPTS[:1], 0, torch.device("cpu"))
    options = SamplingOptions(8, temperature=0)
    steps = list(decode(experts, *prompt, start, options, eos_token_ids=set(), generator=generator))
    ids = list(PROMPTS[0])
    with torch.no_grad():
        for step in steps:
            assert int(step.tokens[0]) == int(expert_logits(experts, ids)[3, -1].argmax())
            ids.append(int(step.tokens[0]))
            assert step.log_rho.exp().tolist() == [[0, 0, 0, 1]]


def test_an_expert_that_cannot_have_written_the_token_is_out_and_nothing_is_nan():
    log_probs = torch.tensor([[[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]]).log()
    log_rho = update_log_rho(torch.tensor([[0.5, 0.5]]).log().double(), log_probs, torch.tensor([0]))
    assert log_rho.exp().tolist() == [[1.0, 0.0]]
    again = update_log_rho(log_rho, log_probs, torch.tensor([1]))
    assert again.exp().tolist() == [[1.0, 0.0]]


def test_top_k_of_one_leaves_experts_without_weight_and_still_decodes(experts):
    prompt = left_pad(PROMPTS, 0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    log_weights = WEIGHTS.log().expand(3, -1)
    steps = list(
        decode(experts, *prompt, log_weights, SamplingOptions(16, top_k=1), eos_token_ids=set(), generator=generator)
    )
    for step in steps:
        assert not step.log_rho.isnan().any() and not step.log_probs.isinf().any()
        assert torch.allclose(step.log_rho.exp().sum(1), torch.ones(3, dtype=torch.float64))
    assert (steps[-1].log_rho == -torch.inf).any()


def test_sequences_leave_at_their_end_and_the_others_go_on_unchanged(experts):
    """Greedy responses of a batch equal those of every prompt alone, though they end at different times."""
    options = SamplingOptions(24, temperature=0)

    def run(prompts, eos):
        prompt = left_pad(prompts, 0, torch.device("cpu"))
        written = [[] for _ in prompts]
        log_weights = WEIGHTS.log().expand(len(prompts), -1)
        generator = torch.Generator()
        for step in decode(experts, *prompt, log_weights, options, eos_token_ids=eos, generator=generator):
            for row, token in zip(step.rows.tolist(), step.tokens.tolist()):
                written[row].append(token)
        return written

    free = run(PROMPTS, set())
    eos = {free[1][5]}
    ends = [tokens.index(min(eos)) + 1 if min(eos) in tokens else 24 for tokens in free]
    assert len(set(ends)) > 1
    assert run(PROMPTS, eos) == [tokens[:end] for tokens, end in zip(free, ends)]
    assert [run([prompt], eos)[0] for prompt in PROMPTS] == run(PROMPTS, eos)


def test_padding_is_not_penalised_as_a_repetition(experts):
    """The padding token is often the end-of-sequence token."""
    options = SamplingOptions(1, repetition_penalty=5.0)
    generator = torch.Generator().manual_seed(0)
    distributions = []
    for pad in (0, 99):
        prompt = left_pad([PROMPTS[0], PROMPTS[1]], pad, torch.device("cpu"))
        log_weights = WEIGHTS.log().expand(2, -1)
        step = next(decode(experts, *prompt, log_weights, options, eos_token_ids=set(), generator=generator))
        distributions.append(step.distribution[0])
    torch.testing.assert_close(*distributions)


@pytest.mark.parametrize(
    "field", [{"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"repetition_penalty": 0}]
)
def test_options_outside_their_range_are_refused_by_name(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        SamplingOptions(**field)
