"""The command as a stranger meets it: exit codes, one-line errors, nothing heavy before a mistake is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from prefmix import __version__
from prefmix.cli.main import VERBS, is_user_error, main, verb_parser

ROW = {"prompt": "What color is the sky?", "chosen": " blue", "rejected": " green", "user": "anna"}


def _rows(folder: Path, rows: list[dict], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _errors(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    return captured.err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in VERBS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"prefmix {__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert "--debug" in capsys.readouterr().out or verb == "train"


def test_help_of_every_verb_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom prefmix.cli.main import VERBS, verb_parser\n"
        "for verb in VERBS: verb_parser(verb).format_help()\n"
        "print(*[name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["trian"], ["unknown verb 'trian'", "'train'"]),
        (["train", "--num_expert", "3"], ["--num_expert", "'num_experts'"]),
        (["train", "--num-expert=3"], ["num_expert", "'num_experts'"]),
        (["train"], ["model: missing", "train_data: missing", "output_dir: missing"]),
        (["train", "none.yaml"], ["none.yaml", "prefmix init"]),
        (["train", "--num_experts", "0"], ["num_experts=0", "at least 1"]),
        (["validate", "none.jsonl"], ["none.jsonl"]),
        (["score", "nowhere", "--data", "none.jsonl"], ["none.jsonl"]),
        (["generate", "nowhere", "--prompt", "hi"], ["nowhere", "mixture_config.json"]),
        (["generate", "nowhere", "--prompt", "hi", "--metadata", "5"], ["--metadata"]),
        (["chat", "nowhere"], ["nowhere", "no policy here"]),
        (["evaluate", "nowhere"], ["--data"]),
        (["--print_completion", "tcsh"], ["tcsh", "bash, zsh, fish"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value[0], str) and value[0] in VERBS else None,
)
def test_mistakes_cost_one_line_and_exit_code_2(
    words: list[str],
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    text = _errors(capsys)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "chosen": " a"},
        {**ROW, "chosen": ""},
        {**ROW, "rejected": ROW["chosen"]},
        {**ROW, "weight": float("nan")},
        {**ROW, "weight": "heavy"},
        {**ROW, "user": ["a"]},
        {**ROW, "metadata": 3},
        {**ROW, "chosen": 5},
    ],
    ids=["no rejected", "empty", "equal pair", "NaN weight", "text weight", "list user", "metadata", "number"],
)
def test_training_on_bad_rows_stops_before_the_model(
    row: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = _rows(tmp_path, [ROW, row])
    words = ["train", "--model", str(tmp_path / "none"), "--train_data", str(data), "--output_dir", str(tmp_path / "o")]
    assert main(words) == 2
    assert "line 2" in _errors(capsys) or "rejected" in row


def test_a_mistake_is_named_before_torch_is_loaded(tmp_path: Path) -> None:
    data = _rows(tmp_path, [{**ROW, "chosen": ""}])
    code = (
        "import sys\nfrom prefmix.cli.main import main\n"
        f"code = main(['train', '--model', 'x', '--train_data', {str(data)!r}, '--output_dir', 'o'])\n"
        "print(code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False", "False"]


def test_validate_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = _rows(tmp_path, [ROW, {**ROW, "user": "bob", "tie": True}])
    assert main(["validate", str(data), "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["kept"], report["users"]) == (2, 1, 1)


def test_validate_points_at_a_column_that_looks_like_who_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(_rows(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "c", "annotator_id": 7}]))
    said = "column 'annotator_id' (one value) looks like who judged; rename it to 'user'"
    assert main(["validate", data]) == 0
    text = capsys.readouterr()
    assert f"warning: {said}" in text.err and "annotator_id" in text.out and "looks like" not in text.out
    assert main(["validate", data, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["unread_users"].startswith(said)


def test_validate_says_where_some_rows_name_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nobody = {name: value for name, value in ROW.items() if name != "user"} | {"chosen": "another"}
    assert main(["validate", str(_rows(tmp_path, [ROW, {**ROW, "chosen": "a third"}, nobody]))]) == 0
    assert "1 of 3 rows name no user" in capsys.readouterr().err
    assert main(["validate", str(_rows(tmp_path, [ROW, {**ROW, "chosen": "a third"}]))]) == 0
    assert "name no user" not in capsys.readouterr().err


def test_init_writes_a_recipe_that_loads_and_never_overwrites(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from prefmix.cli.recipe import load_recipe

    path = tmp_path / "recipe.yaml"
    assert main(["init", str(path), "--model", "base"]) == 0
    assert load_recipe(path, {}).values["model"] == "base"
    before = path.read_text()
    uncommented = [
        line.removeprefix("# ") if line.startswith("# ") and ": " in line else line for line in before.split("\n")
    ]
    assert any(line.startswith("expert_rank: 16") for line in uncommented)
    capsys.readouterr()
    assert main(["init", str(path)]) == 2
    assert "stays as it is" in _errors(capsys)
    assert path.read_text() == before


def test_env_names_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--format", "json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["prefmix"] == __version__
    assert {"torch", "transformers", "devices", "bfloat16", "low-rank heads"} <= facts.keys()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_names_verbs_and_flags(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print_completion", shell]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS)
    assert "num_experts" in text


def test_bash_accepts_its_completion(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--print-completion", "bash"])
    script = capsys.readouterr().out + '\nCOMP_WORDS=(prefmix tr); COMP_CWORD=1; _prefmix; echo "${COMPREPLY[@]}"\n'
    assert subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout == "train\n"


def test_dashes_and_underscores_are_one() -> None:
    parser = verb_parser("generate")
    a = parser.parse_exact(["out", "--max-new-tokens", "5", "--top-p=0.9", "--prompt", "a--b-c"])
    assert (a.max_new_tokens, a.top_p, a.prompt) == (5, 0.9, "a--b-c")


def test_a_failure_of_ours_is_exit_code_1_and_debug_shows_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: object) -> None:
        {}["lost"]

    monkeypatch.setattr("prefmix.cli.env.run", broken)
    assert main(["env"]) == 1
    assert "KeyError" in _errors(capsys)
    assert main(["env", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_value_error_of_a_library_is_no_mistake_of_the_user() -> None:
    def caught(text: str) -> Exception:
        try:
            json.loads(text) if text else verb_parser("env").nothing
        except Exception as error:
            return error
        raise AssertionError

    assert not is_user_error(caught("{"))
    assert not is_user_error(caught(""))
    assert is_user_error(FileNotFoundError("rows.jsonl"))


def test_interrupting_is_exit_code_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("prefmix.cli.env.run", interrupted)
    assert main(["env"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    "verb", [["diagnose", "{}", "--no_refit"], ["adapt", "nowhere", "--user", "anna", "--data", "{}"]]
)
def test_verbs_that_read_rows_point_at_the_column_too_and_take_its_name(
    verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "annotator_id": name} for name in ("anna", "bob", "anna")]
    words = [word.format(_rows(tmp_path, rows)) for word in verb]
    said = "warning: column 'annotator_id' (2 values) looks like who judged"
    main(words)
    assert capsys.readouterr().err.count(said) == 1
    main([*words, "--user_column", "annotator_id"])
    assert said not in capsys.readouterr().err
    assert main([*words, "--user_column", "annotator"]) == 2
    assert "no row has this column (user_column). Name 'annotator_id'." in capsys.readouterr().err
