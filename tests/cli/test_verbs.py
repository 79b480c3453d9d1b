"""Every verb that loads a model, on a tiny one: from a recipe to a policy that scores, talks and adapts."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefmix.cli.main import main

LOVED = [" I loved the film.", " it was great.", " The film was great, I loved it."]
HATED = [" I hated the film.", " it was bad.", " The film was bad, I hated it."]


def _rows(users: int, each: int) -> list[dict[str, Any]]:
    """Users of two kinds: even ones prefer praise, odd ones blame."""
    rows = []
    for user in range(users):
        for i in range(each):
            praise, blame = LOVED[(user + i) % 3], HATED[i % 3]
            chosen, rejected = (praise, blame) if user % 2 == 0 else (blame, praise)
            row = {"prompt": "Write a review of the film.", "chosen": chosen, "rejected": rejected}
            rows.append(row | {"user": f"u{user}", "group": f"kind{user % 2}"})
    return rows


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, make_tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    """A folder with a tiny model, rows, and a recipe; `out` holds what one run of the recipe trained."""
    folder = tmp_path_factory.mktemp("place")
    make_tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    _write(folder / "train.jsonl", _rows(8, 4))
    _write(folder / "test.jsonl", _rows(8, 2))
    _write(folder / "bob.jsonl", [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in _rows(1, 3)])
    (folder / "recipe.yaml").write_text(
        f"model: {folder / 'model'}\ntrain_data: {folder / 'train.jsonl'}\neval_data: {folder / 'test.jsonl'}\n"
        f"output_dir: {folder / 'out'}\ncache_dir: {folder / 'cache'}\nnum_experts: 4\nexpert_rank: 2\n"
        "num_train_epochs: 1\nuse_cpu: true\nprobe_restarts: 2\nprobe_dim: 4\n",
        encoding="utf-8",
    )
    assert main(["train", str(folder / "recipe.yaml"), "--num-experts", "2"]) == 0
    return folder


def test_training_wrote_a_policy_of_the_overridden_size(place: Path) -> None:
    config = json.loads((place / "out" / "policy" / "mixture_config.json").read_text())
    assert len(config["beta"]) == 2
    assert (place / "out" / "metrics.jsonl").is_file()


def test_a_second_run_does_not_overwrite_the_first(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(place / "recipe.yaml")]) == 2
    assert "--resume_from_checkpoint auto" in capsys.readouterr().err


def test_resuming_a_finished_run_says_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", str(place / "recipe.yaml"), "--num_experts", "2", "--resume_from_checkpoint", "auto"]
    assert main([*words, "--format", "json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["steps"] == 4
    assert "finished" in captured.err


def test_dry_run_prints_the_plan_and_writes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", str(place / "recipe.yaml"), "--dry_run", "--output_dir", str(place / "other"), "--format", "json"]
    assert main(words) == 0
    plan = json.loads(capsys.readouterr().out)
    assert "32 rows, 8 users" in plan["train_data"]
    assert plan["latent"].startswith("user")
    assert plan["num_experts"] == 4
    assert not (place / "other").exists()


def test_dry_run_points_at_a_column_that_looks_like_who_judged(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{("annotator_id" if name == "user" else name): row[name] for name in row} for row in _rows(8, 4)]
    words = ["train", str(place / "recipe.yaml"), "--dry_run", "--output_dir", str(tmp_path / "o"), "--format", "json"]
    assert main([*words, "--train_data", str(_write(tmp_path / "rows.jsonl", rows))]) == 0
    assert "column 'annotator_id' (8 values)" in json.loads(capsys.readouterr().out)["note"]


def test_dry_run_names_a_start_that_is_absent_or_has_other_experts(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(place / "recipe.yaml"), "--dry_run", "--output_dir", str(tmp_path / "o"), "--init_experts"]
    assert main([*words, str(tmp_path / "nope")]) == 2
    assert "no policy here" in capsys.readouterr().err
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "mixture_config.json").write_text('{"experts": {"num_experts": 3}}', encoding="utf-8")
    assert main([*words, str(tmp_path / "policy")]) == 2
    assert "the policy has 3 experts, not num_experts=4" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "policy"), "--num_experts", "3", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["init_experts"] == [str(tmp_path / "policy")]


def test_dry_run_says_which_fields_could_be_meant_as_a_user_s(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "metadata": {"job": "cook"}} for row in _rows(8, 4)]
    words = ["train", str(place / "recipe.yaml"), "--dry_run", "--output_dir", str(tmp_path / "o"), "--latent", "user"]
    words += ["--gate", "global", "metadata", "--train_data"]
    assert main([*words, str(_write(tmp_path / "rows.jsonl", rows))]) == 2
    assert "it has job: call what is constant within a user user_job" in capsys.readouterr().err
    rows = [{**row, "user_job": "cook"} for row in _rows(8, 4)]
    assert main([*words, str(_write(tmp_path / "beside.jsonl", rows))]) == 2
    assert "the columns user_job stand beside it: move them in" in capsys.readouterr().err


def test_dry_run_names_a_broken_model(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "train",
        str(place / "recipe.yaml"),
        "--dry_run",
        "--output_dir",
        str(tmp_path / "o"),
        "--model",
        str(tmp_path),
    ]
    assert main(words) == 2
    assert "no weights there" in capsys.readouterr().err


def test_training_prints_json_on_stdout_and_nothing_else(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--config", str(place / "recipe.yaml"), "--output_dir", str(tmp_path / "o"), "--max_steps", "1"]
    assert main([*words, "--format", "json"]) == 0
    captured = capfd.readouterr()
    summary = json.loads(captured.out)
    assert summary["steps"] == 1
    assert "held-out accuracy" in summary
    assert "step     1/1" in captured.err
    assert captured.err.count("held out") == 1


def test_evaluate(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(place / "out"), "--data", str(place / "test.jsonl"), "--output", str(tmp_path / "r.json")]
    words += ["--cache_dir", str(place / "cache")]
    assert main([*words, "--format", "json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "r.json").read_text())
    assert printed["baselines"]["untrained"]["accuracy"]["mean"] == 0.5
    assert main(words) == 0
    table = capsys.readouterr().out
    assert "population" in table and "longer response" in table
    for finding in printed["findings"]:
        assert f"{finding['check']}: {finding['what']}" in table


@pytest.mark.parametrize(
    "verb",
    [
        ["evaluate", "{policy}", "--data", "{rows}"],
        ["score", "{policy}", "--data", "{rows}"],
        ["diagnose", "{rows}", "--policy", "{policy}"],
        ["report", "{policy}", "--output", "{report}"],
        ["generate", "{policy}", "--prompt", "x"],
        ["adapt", "{policy}", "--user", "bob", "--data", "{rows}"],
        ["export", "{policy}", "--format", "servers", "--output", "{report}"],
        ["chat", "{policy}"],
    ],
    ids=lambda verb: verb[0],
)
def test_loading_is_announced_before_torch_is_imported(place: Path, tmp_path: Path, verb: list[str]) -> None:
    known = {"policy": place / "out", "rows": place / "bob.jsonl", "report": tmp_path / "report"}
    code = (
        "import sys\nfrom prefmix.cli import loading, main\n"
        "def told(text):\n    print(text, 'torch' in sys.modules, file=sys.__stdout__)\n    sys.exit(0)\n"
        "loading.note = told\nmain.main(sys.argv[1:])\n"
    )
    words = [word.format(**known) for word in verb]
    run = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert run.stdout == f"loading {place / 'out'} ... False\n", run.stderr


def test_score_writes_a_line_for_every_row(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "scored.jsonl"
    assert main(["score", str(place / "out"), "--data", str(place / "test.jsonl"), "--output", str(output)]) == 0
    scores = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(scores) == 16
    assert all(0 < score["probability"] < 1 for score in scores)


def test_generate_is_seeded_and_streams_the_same(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(place / "out"), "--prompt", "Write a review.", "--user", "u1", "--max-new-tokens", "8"]
    words += ["--seed", "3", "--decoder", "mixture"]
    answers = []
    for extra in ([], [], ["--stream"]):
        assert main([*words, *extra]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] == answers[2]


def test_an_unknown_user_is_a_warning(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(place / "out"), "--prompt", "x", "--user", "nobody", "--max_new_tokens", "1"]) == 0
    assert "warning: " in capsys.readouterr().err


def test_adapt_keeps_a_user_only_on_request(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["adapt", str(place / "out"), "--user", "bob", "--data", str(place / "bob.jsonl")]
    assert main(words) == 0
    users = place / "out" / "policy" / "users" / "users.json"
    assert "bob" not in users.read_text()
    told = capsys.readouterr().err
    assert "not kept; --save" in told and "kept in" not in told
    assert main([*words, "--save", "--format", "json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert sum(printed["weights"]) == pytest.approx(1)
    assert "bob" in users.read_text()
    assert printed["earlier"] == 0
    assert main([*words, "--save"]) == 0
    captured = capsys.readouterr()
    assert f"kept in {place / 'out'}" in captured.err and "bob, 3 comparisons on top of 3 earlier ones" in captured.out
    assert main([*words, "--anew", "--format", "json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["weights"] == pytest.approx(printed["weights"]) and again["earlier"] == 0
    assert main([*words, "--forget"]) == 2 and "bob" in users.read_text()
    assert "--forget with --data" in capsys.readouterr().err
    assert main([*words[:4], "--forget"]) == 0
    assert "bob is forgotten" in capsys.readouterr().out and "bob" not in users.read_text()
    assert main([*words[:4], "--forget"]) == 2
    assert "user='bob': not among the 8 users" in capsys.readouterr().err


def test_adapt_keeps_weights_for_everybody_unknown(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, file = ["adapt", str(place / "out")], place / "out" / "policy" / "mixture_config.json"
    assert main([*words, "--unknown", "max_min"]) == 0
    assert not json.loads(file.read_text())["unknown_users"]
    rows = ["--data", str(place / "test.jsonl")]
    capsys.readouterr()
    assert main([*words, "--unknown", "worst_group", *rows, "--save", "--format", "json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    kept = json.loads(file.read_text())["unknown_users"]
    assert kept["objective"] == "worst_group" and printed["weights"] == pytest.approx(kept["weights"])
    assert main([*words, "--unknown", "gate", "--save"]) == 0
    assert not json.loads(file.read_text())["unknown_users"]
    assert main([*words, "--unknown", "average"]) == 2
    assert "give comparisons" in capsys.readouterr().err
    assert main([*words, "--user", "bob"]) == 2
    assert "--user bob without --data" in capsys.readouterr().err


def test_adapt_refuses_rows_of_others(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapt", str(place / "out"), "--user", "carl", "--data", str(place / "test.jsonl")]) == 2
    assert "names somebody else (u0, " in capsys.readouterr().err


def test_chat_answers_and_obeys(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        "Hello",
        "/weights",
        "/user nobody",
        "/user u2",
        "/decoder top",
        "/decoder odd",
        "/foo bar",
        "/reset",
        "/quit",
        "never",
    ]
    typed = io.StringIO("\n".join(lines))
    monkeypatch.setattr(typed, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", typed)
    assert main(["chat", str(place / "out"), "--user", "u1", "--max_new_tokens", "4"]) == 0
    printed, said = capsys.readouterr()
    assert "expert 1" in printed
    assert "nobody is unknown; known: u0, u1" in printed
    assert "decoder top from here on" in said and "from here on" not in printed
    assert "unknown decoder odd; known: sample, mixture" in printed
    assert "unknown command /foo\n/user NAME" in printed
    assert printed.count("u2> ") == 5


def test_chat_answers_a_pipe_line_by_line_without_decoration(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["chat", str(place / "out"), "--user", "u1", "--max_new_tokens", "4", "--seed", "1"]
    asked = ["Write a review.", "", "What color is the sky?"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(asked)))
    assert main(words) == 0
    printed = capsys.readouterr()
    answers = []
    for line in (asked[0], asked[2]):
        assert main(["generate", str(place / "out"), *words[2:], "--prompt", line, "--stream"]) == 0
        answers.append(capsys.readouterr().out)
    assert printed.out == "".join(answers)
    assert "known users" not in printed.err
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(asked)))
    assert main(["chat", str(place / "out"), "--user", "u11", "--max_new_tokens", "1"]) == 0
    assert capsys.readouterr().err.count("unknown users ['u11']") == 1, "said once, not at every turn"


def test_metadata_that_no_gate_reads_is_refused_before_the_model_is_loaded(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefmix.cli.generate.load_policy", None)
    for verb in (["generate", str(place / "out"), "--prompt", "x"], ["chat", str(place / "out")]):
        assert main([*verb, "--metadata", "{user_age: 30}"]) == 2
        assert "gate reads global and no metadata" in capsys.readouterr().err


def test_metadata_gate_from_recipe_to_answer(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row | {"metadata": {"user_taste": row["group"]}} for row in _rows(8, 4)]
    words = ["train", str(place / "recipe.yaml"), "--num_experts", "2", "--gate", "metadata"]
    words += ["--train_data", str(_write(tmp_path / "train.jsonl", rows)), "--output_dir", str(tmp_path / "out")]
    words += ["--eval_data", str(tmp_path / "train.jsonl")]
    assert main(words) == 0
    capsys.readouterr()
    ask = ["generate", str(tmp_path / "out"), "--prompt", "x", "--max_new_tokens", "1", "--metadata"]
    assert main([*ask, "{user_taste: kind1}"]) == 0
    assert "did not occur" not in capsys.readouterr().err
    assert main([*ask, "{user_taste: odd}"]) == 0
    assert "user_taste=odd did not occur in training" in capsys.readouterr().err
    assert main([*ask, "{user_tast: kind1}"]) == 2
    error = capsys.readouterr().err
    assert "knows no user_tast; it was trained on user_taste=kind0, user_taste=kind1" in error


def test_probe_finds_the_kinds(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["probe", str(place / "train.jsonl"), "--model", str(place / "model"), "--num_experts", "1", "2"]
    words += ["--probe_dim", "4", "--probe_restarts", "2", "--cache_dir", str(place / "cache")]
    assert main([*words, "--output", str(tmp_path / "probe.json")]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "probe.json").read_text())
    assert report["num_experts"] == 2
    assert report["agreement"]["ari"] == pytest.approx(1.0)
    assert "2 <- chosen" in printed
    assert "expert 1" in printed
    groups = [line for line in printed.splitlines() if " people: " in line]
    named = {line[: len("  expert 0")]: set(re.findall(r"u\d", line)) for line in groups}
    kinds = [{f"u{i}" for i in range(first, 8, 2)} for first in (0, 1)]
    assert sorted(named.values(), key=min) == kinds
    command = printed.splitlines()[-1]
    assert command == f"  {report['next']['command']}"
    assert "next: train 2 experts" in printed
    output = ["--output_dir", str(tmp_path / "o"), "--dry_run"]
    assert main([*shlex.split(command)[1:], *output]) == 0, "the command that is suggested runs"
    assert "--num_experts 2 " in command and "--probe_dim 4" in command


def test_probe_without_users_chooses_one_group(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in _rows(8, 4)]
    data = _write(tmp_path / "anonymous.jsonl", rows)
    words = [
        "probe",
        str(data),
        "--model",
        str(place / "model"),
        "--cache_dir",
        str(place / "cache"),
        "--format",
        "json",
    ]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["num_experts"], report["counts"]) == (1, [])
    assert not report["identifiable"]["identified"]
    assert "--num_experts 1 " in report["next"]["command"]
