"""Multi-reward film reviews: annotators with one hidden objective each, one mixture, and the front of its weights.

    python recipes/movie_reviews/run.py --quick                  # stories15M, three seeds
    python recipes/movie_reviews/run.py --model smollm2          # SmolLM2-135M-Instruct
    python recipes/movie_reviews/run.py --focus grammar          # one objective against single DPO and its oracle alone

README.md beside this file says how it is measured. A run that is stopped goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from annotators import Annotators
from fronts import KLS, SeedArrays
from judge import Judge, Writing
from methods import (
    ANONYMOUS,
    FIXED,
    MIXTURE,
    ORACLE,
    SINGLE,
    Choice,
    Comparisons,
    expert_of_objective,
    methods,
    train_method,
)
from reviews import Reviews, load_reviews, prefixes
from small_model import FineTuning, fine_tune, small_vocabulary
from tables import figures, tables_text, write_pictures

from prefmix.evaluation.generation_quality import Samples, reward_columns, sample_responses
from prefmix.evaluation.rewards import GrammarReward, InformativenessReward, Reward, SentimentReward, length_reward
from prefmix.experiments.diagnose import diagnose_policy
from prefmix.experts.base_model import BaseModel, load_base
from prefmix.experts.shared_base import SharedBaseExperts
from prefmix.mixture.gates import Gate
from prefmix.policy.config import PolicyConfig
from prefmix.policy.mixture_model import MixtureModel
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.policy.prompts import prompt_token_ids

OBJECTIVES = ("sentiment", "informativeness", "grammar")
UNTRAINED = ("sentiment, other judge", "length")
# Per model, where the command line is silent: tokens that stay (0: all) and that the reference is fine-tuned on,
# prompts and responses to each, learning rates, strengths, and the type of the trunk.
SIZES: dict[str, dict[str, Any]] = {
    "stories15M": {
        "vocabulary": 4096, "sft_tokens": 400_000, "prompts": 600, "each": 4, "validation": 60, "evaluation": 240,
        "rates": [2e-3], "strengths": [1.0, 2.0, 4.0], "dtype": "float32",
    },
    "smollm2": {
        "vocabulary": 4096, "sft_tokens": 60_000, "prompts": 400, "each": 3, "validation": 50, "evaluation": 60,
        "rates": [5e-4, 2e-3], "strengths": [1.0, 2.0, 4.0], "dtype": "bfloat16",
    },
}  # fmt: skip
NOT_SETTINGS = ("work_dir", "output", "seeds", "quick", "commit")


class Sampled(NamedTuple):
    """What the reference wrote to one set of prompts, with standardised objectives [N, 3]."""

    samples: Samples
    objectives: np.ndarray


class Study:
    """All seeds, written to one JSON and one file of arrays a seed as they are finished."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Goes on from `args.output` where it exists.

        Raises:
            ValueError: it was made with other settings.
        """
        self.args = args
        settings = {k: v for k, v in vars(args).items() if k not in NOT_SETTINGS} | {"model": Path(args.model).name}
        self.results: dict[str, Any] = {"settings": json.loads(json.dumps(settings)), "seeds": {}}
        self.results |= {"commit": args.commit, "machine": f"{platform.machine()}, CPU, 1 thread"}
        if args.output.is_file():
            found = json.loads(args.output.read_text(encoding="utf-8"))
            if found["settings"] != self.results["settings"]:
                raise ValueError(f"--output {args.output} was made with other settings; name another file")
            self.results = found
        self.reviews: Reviews = load_reviews()
        self.base = self._reference()
        self.rewards = self._rewards()

    def run_seed(self, seed: int) -> None:
        """Samples, annotates, trains, judges."""
        start = time.process_time()
        record: dict[str, Any] = {}
        drawn = self._sample(seed, record)
        comparisons = self._comparisons(drawn, seed)
        record["rows"] = {name: len(rows) for name, rows in comparisons._asdict().items()}
        trained = methods(len(OBJECTIVES)) if self._everything else (SINGLE, MIXTURE, ORACLE)
        choices = {name: self._train(name, comparisons, seed, record) for name in trained}
        record["training_seconds"] = round(time.process_time() - start, 1)
        judge = self._judge(drawn["evaluation"].samples, choices, comparisons, seed, record)
        record |= {"language": judge.language, "examples": judge.examples}
        np.savez_compressed(self._arrays(seed), **judge.arrays)  # type: ignore[arg-type]
        record["seconds"] = round(time.process_time() - start, 1)
        self.results["seeds"][str(seed)] = record
        self.write()

    def missing(self, seeds: Sequence[int]) -> list[int]:
        """Seeds that are not in the JSON, or whose arrays are not there."""
        return [s for s in seeds if str(s) not in self.results["seeds"] or not self._arrays(s).is_file()]

    def report(self) -> None:
        """Figures over all seeds, tables and pictures."""
        seeds = [self._loaded(seed) for seed in self.results["seeds"]]
        self.results["figures"] = figures(seeds, [*OBJECTIVES, *UNTRAINED], self.args.bootstraps)
        self.write()
        write_pictures(seeds, self.results, self.args.output)
        print(tables_text(self.results))

    def write(self) -> None:
        """The JSON, at once or not at all."""
        self.args.output.parent.mkdir(parents=True, exist_ok=True)
        partial = self.args.output.with_suffix(".partial")
        partial.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.args.output)

    # --- before training ----------------------------------------------------------------------------------------------
    def _rewards(self) -> dict[str, Reward]:
        texts, praise = zip(*self.reviews.rewards, strict=True)
        other_texts, other_praise = zip(*self.reviews.other_domain, strict=True)
        sentiment, other = SentimentReward(texts, praise), SentimentReward(other_texts, other_praise)
        informativeness = InformativenessReward(texts, like=self._reference_writing(texts))
        rewards = (sentiment, informativeness, GrammarReward(), other, length_reward)
        return dict(zip((*OBJECTIVES, *UNTRAINED), rewards, strict=True))

    def _reference_writing(self, texts: Sequence[str]) -> list[str]:
        """What the reference writes to beginnings of reviews that reward models read: what is usual at a length."""
        args = self.args
        prompts = prefixes(texts, args.usual, np.random.default_rng(0), (args.prefix_words // 2, args.prefix_words))
        call: dict[str, Any] = {"each": 2, "max_new_tokens": args.new_tokens, "seed": 0}
        return sample_responses(reference_policy(self.base), prompts, **call).responses

    def _reference(self) -> BaseModel:
        """The model that writes and is fine-tuned against: cut and fine-tuned once, for all seeds."""
        args = self.args
        if not args.vocabulary and not args.sft_tokens:
            return load_base(args.model, dtype=getattr(torch, args.dtype))
        folder = args.work_dir / f"reference-{Path(args.model).name}-{args.vocabulary}-{args.sft_tokens}"
        done = folder / "fine_tuning.json"
        if not done.is_file():
            start, base = time.process_time(), load_base(args.model, dtype=torch.float32)
            if args.vocabulary:
                base = small_vocabulary(base, self.reviews.reference, args.vocabulary, folder)
            plan = FineTuning(tokens=args.sft_tokens)
            loss = fine_tune(base, self.reviews.reference, plan, 0, _say) if args.sft_tokens else None
            base.model.save_pretrained(folder)
            base.tokenizer.save_pretrained(folder)  # type: ignore[union-attr]
            record = {"loss": loss, "cpu_seconds": round(time.process_time() - start, 1)}
            done.write_text(json.dumps(record) + "\n", encoding="utf-8")
        self.results["fine_tuning"] = json.loads(done.read_text(encoding="utf-8"))
        return load_base(folder, dtype=getattr(torch, args.dtype))

    def _sample(self, seed: int, record: dict[str, Any]) -> dict[str, Sampled]:
        """The reference's responses to prompts of training, validation and evaluation, objectives standardised."""
        args, reference, start = self.args, reference_policy(self.base), time.process_time()
        sets = {
            "train": (self.reviews.training, args.prompts, args.each),
            "validation": (self.reviews.validation, args.validation, args.each),
            "evaluation": (self.reviews.evaluation, args.evaluation, args.evaluation_each),
        }
        found = {}
        for number, (name, (texts, count, each)) in enumerate(sets.items()):
            rng = np.random.default_rng([seed, number])
            prompts = prefixes(texts, count, rng, (args.prefix_words // 2, args.prefix_words))
            call: dict[str, Any] = {"each": each, "max_new_tokens": args.new_tokens, "seed": 10 * seed + number}
            found[name] = sample_responses(reference, prompts, **call)
        record["sampling_seconds"] = round(time.process_time() - start, 1)
        columns = {name: reward_columns(samples, self.rewards) for name, samples in found.items()}
        scale = columns["validation"].std(axis=0)
        record["scale"] = scale.tolist()
        num = len(OBJECTIVES)
        record["correlations"] = np.corrcoef(columns["train"].T).round(3).tolist()
        _say(f"seed {seed}: sampled in {record['sampling_seconds']} s; standard deviations {scale.round(3).tolist()}")
        return {name: Sampled(samples, columns[name][:, :num] / scale[:num]) for name, samples in found.items()}

    def _comparisons(self, drawn: dict[str, Sampled], seed: int) -> Comparisons:
        judges = Annotators(OBJECTIVES, self.args.annotators)
        parts = []
        for number, (name, count) in enumerate(
            (("train", self.args.comparisons), ("validation", self.args.comparisons // 3), ("evaluation", 8))
        ):
            samples, objectives = drawn[name]
            ids = [prompt_token_ids(prompt, self.base.tokenizer) for prompt in samples.prompts]  # type: ignore[arg-type]
            parts.append(judges.rows(samples, objectives, count, ids, 10 * seed + number))
        return Comparisons(*parts)

    # --- training -----------------------------------------------------------------------------------------------------
    def _train(self, name: str, comparisons: Comparisons, seed: int, record: dict[str, Any]) -> Choice:
        args, arm = self.args, methods(len(OBJECTIVES))[name]
        options = {
            "bf16": args.dtype == "bfloat16", "cache_dir": str(args.work_dir / "trunk_states"),
            "num_train_epochs": args.epochs, "per_device_train_batch_size": 32, "beta": args.beta,
            "expert_rank": args.rank, "head": "hidden", "token_dropout": args.token_dropout, "warmup_steps": 5,
            "lr_scheduler_type": "constant_with_warmup",
        }  # fmt: skip
        folder = args.work_dir / "runs"
        choice = train_method(arm, args.rates, comparisons, self.base, options, seed=seed, folder=folder)
        report, agreement = choice.trained.report, choice.trained.report.agreement
        record.setdefault("methods", {})[name] = {
            "rate": choice.rate,
            "validation_log_loss": choice.tried,
            "epoch": choice.trained.epoch,
            "test": report.best.to_dict(),
            "agreement": None if agreement is None else agreement._asdict(),
            "weights": choice.trained.policy.gate_weights().tolist(),
        }
        ari = "" if agreement is None else f", ARI {agreement.ari:.2f}"
        _say(f"seed {seed}: {name}: accuracy {report.best.accuracy.mean:.3f}{ari}, rate {choice.rate:g}")
        return choice

    # --- judging ------------------------------------------------------------------------------------------------------
    def _judge(
        self,
        reference: Samples,
        choices: dict[str, Choice],
        comparisons: Comparisons,
        seed: int,
        record: dict[str, Any],
    ) -> Judge:
        args, num, focus = self.args, len(OBJECTIVES), self.args.focus
        writing = Writing(reference.prompts, args.evaluation_each, args.new_tokens, args.strengths, 10 * seed + 5)
        judge = Judge(writing, self.rewards, _say)
        judge.take("reference", reference)
        policies = {name: choice.trained.policy for name, choice in choices.items()}
        judge.frontier("single", policies[SINGLE], {"all": 0}, ["all"], KLS[-1])
        expert_of: dict[str, dict[str, int]] = {}
        for name in policies.keys() - {SINGLE}:
            rows = comparisons.validation if name == ANONYMOUS else comparisons.train
            expert_of[name] = dict(zip(OBJECTIVES, expert_of_objective(policies[name], rows, OBJECTIVES), strict=True))
        record["expert_of_objective"] = expert_of
        judge.frontier(MIXTURE, policies[MIXTURE], expert_of[MIXTURE], focus, KLS[-1])
        for name in (n for n in (ORACLE, FIXED, ANONYMOUS) if n in policies):
            judge.specialists(name, policies[name], expert_of[name], focus)
        if self._everything:
            judge.write("equal", policies[MIXTURE], [1.0] * num, decoder="mixture")
            judge.products(policies[MIXTURE], list(expert_of[MIXTURE].values()), args.product_steps, KLS[-1])
            found = diagnose_policy(policies[ANONYMOUS], comparisons.without_ids().test, ANONYMOUS)
            record["anonymous_diagnosis"] = found.to_dict()
        return judge

    @property
    def _everything(self) -> bool:
        """Whether no objective is left out."""
        return set(self.args.focus) == set(OBJECTIVES)

    def _arrays(self, seed: int | str) -> Path:
        folder: Path = self.args.work_dir
        return folder / f"{self.args.output.stem}-seed{seed}.npz"

    def _loaded(self, seed: str) -> SeedArrays:
        scale = np.array(self.results["seeds"][seed]["scale"])
        with np.load(self._arrays(seed)) as file:
            arrays = {name: file[name] for name in file.files}
        args, scale = self.args, np.maximum(scale, 1e-9)
        return SeedArrays(arrays, OBJECTIVES, args.strengths, scale, args.evaluation_each, args.product_steps)


def reference_policy(base: BaseModel) -> MixturePolicy:
    """The base itself as a policy of one untrained expert."""
    assert base.tokenizer is not None
    experts, gate = SharedBaseExperts(base.model, 1, rank=1), Gate(1, ("global",))
    config = PolicyConfig((1.0,), "pair", base.source, base.sha256, experts=experts.describe(), gate=gate.describe())
    return MixturePolicy(MixtureModel(experts, gate), base.tokenizer, config)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs what is not in the JSON yet; prints the tables and draws the pictures."""
    args = _parser().parse_args(arguments)
    name = "stories15M" if args.quick and args.model is None else args.model or "smollm2"
    args.model = name if name != "stories15M" else str(Path(os.environ.get("PREFMIX_DATA", ".")) / "lm" / name)
    sizes = SIZES.get(Path(name).name, SIZES["smollm2"])
    for field, value in sizes.items():
        if getattr(args, field) is None:
            setattr(args, field, value)
    torch.set_num_threads(1)
    study = Study(args)
    missing = study.missing(args.seeds)
    for seed in missing:
        study.run_seed(seed)
        study.report()
    if not missing:
        study.report()
    return study.results


def _say(line: str) -> None:
    print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Annotators with hidden objectives over film reviews.")
    parser.add_argument(
        "--model", help="smollm2 (default), or a folder; stories15M is looked for under PREFMIX_DATA/lm"
    )
    parser.add_argument("--quick", action="store_true", help="stories15M: twenty minutes of CPU a seed")
    parser.add_argument(
        "--focus",
        nargs="+",
        choices=OBJECTIVES,
        default=list(OBJECTIVES),
        help="judge these objectives alone, of single DPO, the mixture and the oracle (trained on all of them)",
    )
    # Seeds 0 to 2 were looked at while the rewards were made.
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the trunk, once tuned")
    parser.add_argument("--vocabulary", type=int, help="tokens that stay; 0: all")
    parser.add_argument("--sft-tokens", type=int, help="of reviews that the reference is fine-tuned on; 0: none")
    parser.add_argument("--prompts", type=int, help="training prompts")
    parser.add_argument("--each", type=int, help="responses to each training and validation prompt")
    parser.add_argument("--validation", type=int, help="validation prompts")
    parser.add_argument("--evaluation", type=int, help="evaluation prompts")
    parser.add_argument("--evaluation-each", type=int, default=2, help="responses to each of them")
    parser.add_argument("--usual", type=int, default=200, help="prompts whose answers say what is usual at a length")
    parser.add_argument("--prefix-words", type=int, default=12, help="longest beginning of a review, words")
    parser.add_argument("--new-tokens", type=int, default=48, help="longest response")
    parser.add_argument("--annotators", type=int, default=12, help="of each objective")
    parser.add_argument("--comparisons", type=int, default=64, help="training comparisons of each annotator")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates to choose from")
    parser.add_argument("--epochs", type=int, default=4, help="the best one on validation rows is kept")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--token-dropout", type=float, default=0.5)
    parser.add_argument("--strengths", type=float, nargs="+", help="1 must be among them")
    parser.add_argument("--product-steps", type=int, default=3, help="weights of products are multiples of 1 / this")
    parser.add_argument("--bootstraps", type=int, default=200)
    parser.add_argument("--commit", default="", help="of the code, for the JSON")
    parser.add_argument("--work-dir", type=Path, default=Path("movie_reviews"), help="reference, states, arrays")
    parser.add_argument("--output", type=Path, default=Path("movie_reviews/results.json"))
    return parser


if __name__ == "__main__":
    main()
