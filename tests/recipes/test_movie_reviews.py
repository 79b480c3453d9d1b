"""The recipe from end to end on a tiny model (a real one where there is one) and invented reviews; its arithmetic."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

RECIPE = Path(__file__).parents[2] / "recipes" / "movie_reviews"
MODULES = ("annotators", "fronts", "judge", "methods", "products", "reviews", "run", "small_model", "tables")
WORDS = ["the", "film", "story", "house", "sea", "sky", "girl", "forest", "time", "little", "near", "once", "was", "is"]


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    monkeypatch.syspath_prepend(str(RECIPE))
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)


def _write_reviews(folder: Path) -> None:
    """Reviews of many films whose side shows in one word, in the three files of the real ones."""
    rng, folder = np.random.default_rng(0), folder / "reviews"
    folder.mkdir(parents=True)
    for file, count in (("movies_train", 400), ("movies_test", 60), ("books_dvd", 40)):
        with gzip.open(folder / f"{file}.jsonl.gz", "wt", encoding="utf-8") as lines:
            for index in range(count):
                label = ("pos", "neg")[index % 2]
                text = [("loved" if label == "pos" else "hated"), *rng.choice(WORDS, size=30)]
                record = {"text": " ".join(rng.permutation(text)), "label": label, "item": f"{file}{index}"}
                lines.write(json.dumps(record) + "\n")


@pytest.fixture
def base_folder(make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> Path:
    data = os.environ.get("PREFMIX_DATA")
    if data and (Path(data) / "lm" / "stories260K").is_dir():
        return Path(data) / "lm" / "stories260K"
    make_tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def arguments(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run of seconds over invented reviews, written to results.json."""
    pytest.importorskip("sklearn")
    pytest.importorskip("harper")
    _write_reviews(tmp_path / "data")
    monkeypatch.setenv("PREFMIX_DATA", str(tmp_path / "data"))
    return (
        f"--model {base_folder} --vocabulary 300 --sft-tokens 2048 --seeds 0 --prompts 16 --validation 8 --usual 8 "
        "--dtype float32 --evaluation 8 --each 3 --prefix-words 6 --new-tokens 8 --annotators 2 --comparisons 6 "
        "--rates 0.05 --epochs 1 --rank 2 --strengths 1 2 --product-steps 2 --bootstraps 3 "
        f"--work-dir {tmp_path / 'work'} --output {tmp_path / 'results.json'}"
    ).split()


def test_recipe_goes_from_reviews_to_tables_and_pictures_and_does_nothing_twice(
    recipe: Callable[[str], ModuleType],
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    run, output = recipe("run"), tmp_path / "results.json"
    run.main(arguments)
    printed = capsys.readouterr().out
    for phrase in ("hypervolume within", "gain over the reference at KL", "share of the way", "anonymous mixture"):
        assert phrase in printed
    text = output.read_text(encoding="utf-8")
    written = json.loads(text)
    assert str(tmp_path) not in text
    methods = written["seeds"]["0"]["methods"]
    assert set(methods) == {"single DPO", "mixture", "mixture, fixed weights", "oracle", "anonymous mixture"}
    assert methods["mixture, fixed weights"]["weights"] == pytest.approx([1 / 3] * 3)
    assert written["seeds"]["0"]["anonymous_diagnosis"]
    assert set(written["figures"]["means"]) >= {"reference", "mixture/grammar/2", "single/all/1", "equal"}
    products = {name.split("/")[1] for name in written["figures"]["means"] if name.startswith("product/")}
    assert products == {"0.50-0.50-0.00", "0.50-0.00-0.50", "0.00-0.50-0.50", "0.33-0.33-0.33"}
    for table in written["figures"]["hypervolume"].values():
        for row in table.values():
            assert row["product - single DPO"]["value"] == pytest.approx(
                row["product"]["value"] - row["single DPO"]["value"], abs=2e-4
            )
    assert {"sentiment, other judge", "length"} <= set(written["figures"]["means"]["reference"])
    pictures = sorted(tmp_path.glob("results-*.svg"))
    assert len(pictures) == 6
    for picture in pictures:
        ElementTree.fromstring(picture.read_text(encoding="utf-8"))
    monkeypatch.setattr(run, "train_method", None)  # all is there: nothing is trained again
    assert run.main(arguments)["figures"] == written["figures"]
    with pytest.raises(ValueError, match="other settings"):
        run.main([*arguments, "--beta", "0.2"])


def test_a_focus_trains_and_judges_what_one_objective_needs(
    recipe: Callable[[str], ModuleType], arguments: list[str], tmp_path: Path, capsys: Any
) -> None:
    found = recipe("run").main([*arguments, "--focus", "grammar", "--rates", "0.05", "0.02"])
    printed = capsys.readouterr().out
    assert "gain over the reference at KL" in printed and "hypervolume" not in printed
    methods = found["seeds"]["0"]["methods"]
    assert set(methods) == {"single DPO", "mixture", "oracle"}
    assert all(set(method["validation_log_loss"]) == {"0.05", "0.02"} for method in methods.values())
    assert set(found["figures"]["means"]) == {
        "reference", "single/all/1", "single/all/2", "mixture/grammar/1", "mixture/grammar/2", "oracle/grammar/1",
    }  # fmt: skip
    for table in found["figures"]["gains_at_equal_kl"].values():
        assert set(table) == {"grammar"}
    # The specialist is the expert of grammar's annotators, at its place among all.
    expert_of = found["seeds"]["0"]["expert_of_objective"]["mixture"]
    assert sorted(expert_of.values()) == [0, 1, 2]
    with np.load(tmp_path / "work" / "results-seed0.npz") as arrays:
        own = arrays["mixture/grammar/1/expert_log_ratio"][:, list(expert_of).index("grammar")]
        np.testing.assert_allclose(own, arrays["mixture/grammar/1/log_ratio"], atol=1e-3)
    assert [path.name for path in tmp_path.glob("results-*.svg")] == ["results-grammar.svg"]


def test_no_film_is_in_two_parts(
    recipe: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_reviews(tmp_path)
    monkeypatch.setenv("PREFMIX_DATA", str(tmp_path))
    found = recipe("reviews").load_reviews()
    parts = [{text for text, _ in found.rewards}, *map(set, (found.reference, found.training, found.validation))]
    parts += [set(found.evaluation), {text for text, _ in found.other_domain}]
    assert all(parts)
    assert sum(map(len, parts)) == len(set().union(*parts))
    drawn = recipe("reviews").prefixes(found.training, 5, np.random.default_rng(0), (3, 6))
    assert len(set(drawn)) == 5 and all(3 <= len(text.split()) <= 6 for text in drawn)
    with pytest.raises(ValueError, match="ask for fewer"):
        recipe("reviews").prefixes(found.training, 10**6, np.random.default_rng(0), (3, 6))


def test_small_vocabulary_writes_every_text_and_keeps_the_network(
    recipe: Callable[[str], ModuleType], base_folder: Path, tmp_path: Path
) -> None:
    from prefmix.experts.base_model import load_base

    base = load_base(base_folder, dtype=torch.float32)
    texts = ["The sky is blue. The sea is green.", "Where is the little girl?"]
    small = recipe("small_model").small_vocabulary(base, texts, 290, tmp_path / "small")
    assert small.model.config.vocab_size < base.model.config.vocab_size
    for text in [*texts, "Quite another text: zebra!"]:
        decoded = small.tokenizer.decode(small.tokenizer(text)["input_ids"], skip_special_tokens=True)
        assert decoded == base.tokenizer.decode(base.tokenizer(text)["input_ids"], skip_special_tokens=True)
    ids = small.tokenizer(texts[0])["input_ids"]
    old = base.tokenizer.convert_tokens_to_ids(small.tokenizer.convert_ids_to_tokens(ids))
    every = base.tokenizer.convert_tokens_to_ids(
        small.tokenizer.convert_ids_to_tokens(list(range(small.model.config.vocab_size)))
    )
    with torch.no_grad():
        whole = base.model(torch.tensor([old])).logits[0][:, every]
        torch.testing.assert_close(small.model(torch.tensor([ids])).logits[0], whole, atol=1e-4, rtol=1e-4)
    assert small.tokenizer.eos_token == base.tokenizer.eos_token
    assert small.model.config.eos_token_id in (None, small.tokenizer.eos_token_id)


def test_annotators_prefer_their_own_objective_and_clear_pairs_alone(recipe: Callable[[str], ModuleType]) -> None:
    from prefmix.evaluation.generation_quality import Samples

    rng, prompts, each = np.random.default_rng(0), 50, 4
    ids = [[i] for i in range(prompts * each)]
    samples = Samples([str(i) for i in range(prompts)], [""] * len(ids), ids, *(np.zeros(1) for _ in range(3)))
    values = rng.normal(size=(len(ids), 2))
    judges = recipe("annotators").Annotators(("a", "b"), 3)
    rows = judges.rows(samples, values, 20, [[0]] * prompts, seed=1)
    assert len(rows) == 2 * 3 * 20 and len({row["user"] for row in rows}) == 6
    for column, name in enumerate("ab"):
        gaps = {n: [] for n in (0, 1)}
        for row in (row for row in rows if row["group"] == name):
            first, second = row["chosen_ids"][0], row["rejected_ids"][0]
            assert first // each == second // each
            for other in gaps:
                gaps[other].append(values[first, other] - values[second, other])
        own = np.array(gaps[column])
        assert (np.abs(own) >= 0.5).all() and (own > 0).mean() > 0.9
        assert abs((np.array(gaps[1 - column]) > 0).mean() - 0.5) < 0.2


def test_weight_swept_mixture_equals_enumeration(recipe: Callable[[str], ModuleType]) -> None:
    """Two experts over three responses: KL and rewards of any weights against sums over all responses."""
    reference, experts = np.array([0.5, 0.3, 0.2]), np.array([[0.2, 0.2, 0.6], [0.6, 0.3, 0.1]])
    rewards, weights = np.array([[1.0, 5.0], [2.0, 3.0], [4.0, 0.0]]), np.array([0.3, 0.7])
    each = 1000  # responses in exactly the experts' proportions
    arrays: dict[str, np.ndarray] = {
        "reference/rewards": rewards[np.repeat(np.arange(3), (each * reference).astype(int))],
        "reference/log_ratio": np.zeros(each),
    }
    for expert, name in enumerate("ab"):
        drawn = np.repeat(np.arange(3), np.round(each * experts[expert]).astype(int))
        arrays[f"mixture/{name}/1/rewards"] = rewards[drawn]
        arrays[f"mixture/{name}/1/expert_log_ratio"] = np.log(experts / reference).T[drawn]
        arrays[f"mixture/{name}/1/log_ratio"] = np.log(experts[expert] / reference)[drawn]
    seed = recipe("fronts").SeedArrays(arrays, ("a", "b"), (1.0,), np.ones(2), each, 2)
    family, mixed = seed.mixture(weights), weights @ experts
    assert family.mean_kl[1] == pytest.approx(float((mixed * np.log(mixed / reference)).sum()))
    np.testing.assert_allclose(family.rewards[1, 0], mixed @ rewards)
    alone = seed.mixture(np.array([1.0, 0.0]))
    np.testing.assert_allclose(alone.kl, seed.specialist("a").kl)
    np.testing.assert_allclose(alone.rewards, seed.specialist("a").rewards)


def test_a_soup_writes_what_the_product_decoder_writes(
    recipe: Callable[[str], ModuleType], make_tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    from prefmix.experts.shared_base import SharedBaseExperts
    from prefmix.mixture.gates import Gate
    from prefmix.policy.config import PolicyConfig
    from prefmix.policy.mixture_model import MixtureModel
    from prefmix.policy.mixture_policy import MixturePolicy
    from prefmix.policy.modular import soup
    from prefmix.policy.strength import at_strength

    experts, generator = SharedBaseExperts(make_tiny_model(), 3, rank=2), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    config = PolicyConfig((0.1,) * 3, "pair", "<base>", "0" * 64)
    policy = MixturePolicy(MixtureModel(experts, Gate(3, ("global",))), tiny_tokenizer, config)
    weights, call = np.array([0.5, 0.25, 0.25]), {"max_new_tokens": 12, "seed": 3, "return_details": True}
    scale = recipe("products").logit_scale(weights, 1.0)
    assert scale == pytest.approx(0.375**-0.5)
    product = at_strength(policy, scale).generate(
        ["Where is the sun?"] * 4, weights=torch.tensor(weights), decoder="product", **call
    )
    melted = at_strength(soup(policy, weights.tolist()), scale).generate(
        ["Where is the sun?"] * 4, decoder="mixture", **call
    )
    assert [r.token_ids for r in melted] == [r.token_ids for r in product]
    assert [r.log_prob for r in melted] == pytest.approx([r.log_prob for r in product], abs=1e-3)
    vertex = at_strength(policy, 1.0).generate(["Where is the sun?"] * 4, weights=torch.tensor([1.0, 0, 0]), **call)
    assert [r.token_ids for r in vertex] != [r.token_ids for r in product]


def test_product_weights_cover_the_simplex_without_its_vertices(recipe: Callable[[str], ModuleType]) -> None:
    products = recipe("products")
    grid = products.product_grid(3, 4)
    assert grid.shape == (13, 3) and grid.max() < 1
    np.testing.assert_allclose(grid.sum(axis=1), 1)
    np.testing.assert_allclose(grid[-1], 1 / 3)
    assert len(products.product_grid(3, 3)) == 7  # its own centre is the centre
    whole = np.vstack([np.eye(3), grid])
    pairs = products.neighbours(whole, 4)
    assert len(pairs) == 30  # sides of the 16 small triangles
    assert all(np.abs(whole[a] - whole[b]).max() == pytest.approx(1 / 4) for a, b in pairs)


def test_fronts_are_measured_within_the_kl_and_noise_makes_them_larger(recipe: Callable[[str], ModuleType]) -> None:
    """Two objectives, two specialists and their product, all 4 nats away; single DPO reaches 0.5 in both."""
    fronts, rng, prompts = recipe("fronts"), np.random.default_rng(0), 40
    means = {
        "mixture/a/1": (1, 0),
        "mixture/b/1": (0, 1),
        "product/0.50-0.50/1": (0.8, 0.8),
        "single/all/1": (0.5, 0.5),
    }

    def seed_arrays(noise: float) -> Any:
        arrays = {"reference/rewards": np.zeros((prompts, 2)), "reference/log_ratio": np.zeros(prompts)}
        for name, mean in means.items():
            arrays[f"{name}/rewards"] = np.array(mean) + noise * rng.normal(size=(prompts, 2))
            arrays[f"{name}/log_ratio"] = np.full(prompts, 4.0)
            arrays[f"{name}/expert_log_ratio"] = np.full((prompts, 2), 4.0)
        return fronts.SeedArrays(arrays, ("a", "b"), (1.0,), np.ones(2), 1, 2)

    exact = fronts.hypervolumes([seed_arrays(0.0)] * 2, 4.0, 5)
    found = {name: interval.value for name, interval in exact["at the reference"].items()}
    # Mixture: steps under the line from (1, 0) to (0, 1); product: (0.9, 0.4) and (0.4, 0.9) lie half-way to it.
    assert found["mixture"] == pytest.approx(sum(range(1, 8)) / 64)
    assert found["product"] == pytest.approx(0.9 * 0.4 + 0.8 * 0.4 + 0.4 * 0.1)
    assert found["single DPO"] == pytest.approx(0.25)
    assert found["product - single DPO"] == pytest.approx(found["product"] - 0.25)
    # At half of the KL everything is half as far out.
    half = fronts.hypervolumes([seed_arrays(0.0)], 2.0, 2)["at the reference"]["product"].value
    assert half == pytest.approx(found["product"] / 4)
    noisy = [seed_arrays(2.0) for _ in range(20)]
    whole = fronts.hypervolumes(noisy, 4.0, 2)["at the reference"]["mixture"].value
    assert fronts.volumes_from_halves(noisy, 4.0)["at the reference"]["mixture"] > whole > found["mixture"]
