"""The verb on a tiny run: with rows, without, on a policy alone, and its mistakes before a model is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefmix.cli.main import main
from prefmix.evaluation.cached_states import StateCache
from prefmix.experiments.diagnose import scored_rows
from prefmix.experiments.run_report import ReportOptions, report_run
from prefmix.policy.mixture_policy import MixturePolicy

LOVED = [" I loved the film.", " it was great.", " The film was great, I loved it."]
HATED = [" I hated the film.", " it was bad.", " The film was bad, I hated it."]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, make_tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    folder, rows = tmp_path_factory.mktemp("report"), []
    make_tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    for user in range(8):
        for i in range(4):
            sides = (LOVED[(user + i) % 3], HATED[i % 3])
            chosen, rejected = sides if user % 2 == 0 else reversed(sides)
            row = {"prompt": "Write a review of the film.", "chosen": chosen, "rejected": rejected}
            row |= {"user": f"zoe{user}", "group": "ab"[user % 2], "metadata": {"user_age": 20 + user % 2}}
            rows.append(row)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["train", "--model", str(folder / "model"), "--train_data", str(folder / "rows.jsonl"), "--use_cpu", "true"]
    words += ["--output_dir", str(folder / "out"), "--num_experts", "2", "--expert_rank", "2", "--probe_dim", "4"]
    words += ["--num_train_epochs", "2", "--logging_steps", "1"]
    assert main([*words, "--cache_dir", str(folder / "cache")]) == 0
    return folder


def test_a_run_with_rows_becomes_a_page(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["report", str(place / "out"), "--data", str(place / "rows.jsonl"), "--cache_dir", str(place / "cache")]
    words += ["--output", str(place / "a.html"), "--against", f"itself={place / 'out'}", "--no_probe"]
    assert main([*words, "--examples", "1", "--max_new_tokens", "4"]) == 0
    assert capsys.readouterr().out.strip().endswith("a.html")
    page = (place / "a.html").read_text(encoding="utf-8")
    for said in ("Who is with whom", "Usage: mean", "Reliability", "By user_age", "True groups",
                 "KL(π_k", "Disputes", "the mixture, first for", "the reference, first for", "<b>Writing</b>",
                 "not clearly different from itself", "zoe3",
                 "peak memory"):  # fmt: skip
        assert said in page, said
    assert str(place) not in page, page[max(page.index(str(place)) - 80, 0) :][:200]
    assert main([*words, "--examples", "0", "--no_user_names"]) == 0
    page = (place / "a.html").read_text(encoding="utf-8")
    assert "zoe" not in page and "no answers were generated (--examples 0)" in page


def test_without_rows_it_has_the_log_and_the_people_and_says_so(place: Path) -> None:
    for source in ("out", "out/policy"):
        assert main(["report", str(place / source), "--output", str(place / "b.html")]) == 0
        page = (place / "b.html").read_text(encoding="utf-8")
        assert "Who is with whom" in page and "Bound and evidence" in page and "no held-out rows were given" in page


def test_every_run_has_its_own_page(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for given in ("out", "out/policy"):
        assert main(["report", str(place / given)]) == 0
        captured = capsys.readouterr()
        assert Path(captured.out.strip()) == place / "out" / "report.html"
    assert "in the place of the page that was there" in captured.err
    shutil.copytree(place / "out" / "policy", tmp_path / "alone")
    assert main(["report", "alone"]) == 0
    assert capsys.readouterr().out.strip() == "alone.html" and (tmp_path / "alone.html").is_file()


def test_what_it_shows_is_what_the_policy_says(place: Path) -> None:
    policy = MixturePolicy.from_pretrained(place / "out")
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    cache = StateCache("memory")
    data = report_run(policy, place / "out", rows, cache=cache, options=ReportOptions(examples=0, probe=False))
    assert data.people is not None and data.experts is not None and data.diagnosis is not None
    for name, weights, group in zip(data.people.names, data.people.weights, data.people.groups, strict=True):
        assert weights == pytest.approx(policy.weights(user=name).numpy(), abs=1e-6)
        assert group == "ab"[int(name[-1]) % 2]
    scored = scored_rows(policy, rows)  # another path: `policy.score`, which reads token ids
    assert data.experts.margins == pytest.approx(scored.margins, abs=1e-3)
    assert data.experts.weights == pytest.approx(scored.weights, abs=1e-4)
    ages = next(view for view in data.gate if view.title == "By user_age")
    assert [row[:2] for row in ages.rows] == [("20", 16), ("21", 16)]
    assert "does not read it" in ages.caption


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--examples", "-1"], "--examples -1"),
        (["--against", "x"], "name them with --data"),
        (["--output", "no/such/folder/a.html"], "is no folder"),
    ],
)
def test_mistakes_are_found_first(place: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert main(["report", str(place / "out"), *words]) == 2
    assert said in capsys.readouterr().err
