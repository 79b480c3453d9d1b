"""Kills training with SIGKILL at random points, damages checkpoints in many ways, and compares what resuming gives.

    python benchmarks/crash.py                      # 40 kills, half of them inside a save; every kind of damage
    python benchmarks/crash.py --kills 4 --seed 1   # a quick look

Each trial runs in a process of its own: it is killed, started again with `resume_from_checkpoint="auto"`, and must end
with the same bits as a run that nobody touched: parameters, optimizer, user evidence, responsibilities, metrics (times
aside) and the policy folder. A kill inside a save strikes before, in the middle of, or after one of its writes, syncs
and renames; the other kills strike at random times. The model is a tiny Llama with heads, optimizer state and a table
of users. Exit code 1 if any trial differs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import safetensors.torch
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefmix.policy.folder import LOG_FILE, RECORD_FILE
from prefmix.training import checkpoint, persistence
from prefmix.training.config import MixtureConfig
from prefmix.training.trainer import MixtureTrainer

WORDS = [f"w{i}" for i in range(60)]
TIMES = ("runtime", "per_second")


class Damage(NamedTuple):
    """One kind of damage: what it is, the file that must be named, and how it is done to the newest checkpoint."""

    name: str
    file: str
    do: Callable[[Path, Path], None]


def make_trainer(run_dir: Path, **fields: Any) -> MixtureTrainer:
    """A run of two opposed groups of users: 2 experts, 12 steps, a checkpoint every 3."""
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    shape = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    rows = []
    for i in range(48):
        side = [f" w{rng.integers(0, 20)} w{rng.integers(0, 20)}", f" w{rng.integers(20, 40)} w{rng.integers(20, 40)}"]
        chosen, rejected = side if i % 2 else side[::-1]
        rows.append({"prompt": f"w{50 + i % 5}", "chosen": chosen, "rejected": rejected, "user": f"u{i % 8}"})
    defaults: dict[str, Any] = {
        "num_experts": 2, "expert_rank": 2, "num_train_epochs": 2, "per_device_train_batch_size": 8, "save_steps": 3,
        "save_strategy": "steps", "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3, "learning_rate": 1e-2,
        "estep": "gumbel", "init_hold_epochs": 0.5, "probe_restarts": 2, "probe_dim": 4, "cache_states": "memory",
        "use_cpu": True, "disable_tqdm": True, "log_level": "error",
    }  # fmt: skip
    model = LlamaForCausalLM(shape)
    args = MixtureConfig(str(run_dir), **(defaults | fields))
    return MixtureTrainer(model, args, train_dataset=rows, eval_dataset=rows[:16], processing_class=tokenizer)


def digest(trainer: MixtureTrainer) -> dict[str, str]:
    """What two equal runs share: hashes of all that outlives them."""
    run_dir = Path(trainer.args.output_dir)
    # A finished run that was only opened again has no optimizer in memory; its last checkpoint has.
    last = checkpoint.checkpoints(run_dir)[0]
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)
    lines = [json.loads(line) for line in (run_dir / LOG_FILE).read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if not any(t in k for t in TIMES)} for line in lines]
    policy = run_dir / persistence.POLICY
    # What a run cost (training.json) differs from run to run, and the manifest leaves it out as well.
    saved = [
        file for file in sorted(policy.rglob("*"))
        if file.suffix in (".safetensors", ".json") and file.name not in ("manifest.json", RECORD_FILE)
    ]  # fmt: skip
    return {
        "parameters": _hash(sorted(trainer._trained_tensors().items())),
        "optimizer": _hash(sorted(optimizer["state"].items())),
        "evidence": _hash(sorted(trainer.em.state_dict().items())),
        "metrics": _hash(metrics),
        "policy": _hash([(file.name, file.read_bytes()) for file in saved]),
    }


def _hash(value: Any) -> str:
    def plain(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return [str(item.dtype), list(item.shape), item.contiguous().view(-1).view(torch.uint8).tolist()]
        if isinstance(item, dict):
            return {str(key): plain(inner) for key, inner in sorted(item.items(), key=str)}
        if isinstance(item, list | tuple):
            return [plain(inner) for inner in item]
        return item.hex() if isinstance(item, bytes | float) else item

    return hashlib.sha256(json.dumps(plain(value)).encode()).hexdigest()[:16]


# --- one process a trial -------------------------------------------------------------------------------------------


def in_child(work: Callable[[], None], kill_after: float | None = None) -> bool:
    """Runs `work` in a forked process, killing it after some seconds; whether it ended by itself, in good order."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                work()
            os._exit(0)
        except BaseException as error:  # the parent sees the exit code, a person needs the reason
            print(f"child: {type(error).__name__}: {error}", file=sys.__stderr__, flush=True)
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def train_to_the_end(run_dir: Path, report: Path) -> None:
    """Trains or resumes, and reports digest, steps taken here and seconds."""
    trainer = make_trainer(run_dir)
    start, steps = time.perf_counter(), []
    step_of = trainer.training_step
    trainer.training_step = lambda *a, **k: (steps.append(1), step_of(*a, **k))[1]  # type: ignore[method-assign]
    trainer.train(resume_from_checkpoint="auto")
    seconds = time.perf_counter() - start
    report.write_text(json.dumps({"digest": digest(trainer), "steps": len(steps), "seconds": seconds}))


def train_until_event(run_dir: Path, die_at: int | None, report: Path | None = None) -> None:
    """Trains, and dies at the `die_at`-th point of a save; with None, counts the points."""
    with save_points(die_at) as counted:
        make_trainer(run_dir).train(resume_from_checkpoint="auto")
    if report is not None:
        report.write_text(json.dumps(counted))


@contextlib.contextmanager
def save_points(die_at: int | None) -> Iterator[list[str]]:
    """Counts the writes, syncs, renames and deletions inside saves, and kills this very process at one of them."""
    points: list[str] = []
    depth = [0]

    def point(name: str) -> None:
        points.append(name)
        if len(points) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(owner: Any, name: str, is_write: bool) -> tuple[Any, str, Any]:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if depth[0] != 1:
                return original(*args, **kwargs)
            depth[0] += 1
            try:
                point(f"before {name}")
                if is_write and len(points) + 1 == die_at:
                    result = original(*args, **kwargs)
                    file = next(Path(a) for a in args if isinstance(a, str | Path))
                    os.truncate(file, file.stat().st_size // 2)
                    point(f"within {name}")
                result = original(*args, **kwargs)
                if is_write:
                    points.append(f"within {name}")
                point(f"after {name}")
                return result
            finally:
                depth[0] -= 1

        setattr(owner, name, call)
        return owner, name, original

    def inside_a_save(owner: Any, name: str) -> tuple[Any, str, Any]:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            depth[0] += 1
            try:
                return original(*args, **kwargs)
            finally:
                depth[0] -= 1

        setattr(owner, name, call)
        return owner, name, original

    from prefmix.policy import expert_files

    undo = [watched(os, name, False) for name in ("fsync", "rename")]
    undo += [watched(shutil, "rmtree", False), watched(pathlib.Path, "write_text", True)]
    undo += [watched(owner, "save_file", True) for owner in (safetensors.torch, persistence, expert_files)]
    undo += [watched(torch, "save", True)]
    undo += [
        inside_a_save(persistence.AbstractCheckpointedTrainer, name) for name in ("_save_checkpoint", "save_model")
    ]
    try:
        yield points
    finally:
        for owner, name, original in undo:
            setattr(owner, name, original)


# --- damage --------------------------------------------------------------------------------------------------------


def _flip(file: str) -> Damage:
    def do(newest: Path, older: Path) -> None:
        content = bytearray((newest / file).read_bytes())
        content[len(content) // 2] ^= 1
        (newest / file).write_bytes(content)

    return Damage(f"flipped bit in {file}", file, do)


def _cut(file: str, keep: float) -> Damage:
    def do(newest: Path, older: Path) -> None:
        os.truncate(newest / file, int((newest / file).stat().st_size * keep))

    return Damage(f"{file} {'empty' if keep == 0 else 'truncated'}", file, do)


def _remove(file: str) -> Damage:
    return Damage(f"{file} missing", file, lambda newest, older: (newest / file).unlink())


def _edit_json(file: str, field: str, value: Any) -> Damage:
    def do(newest: Path, older: Path) -> None:
        content = json.loads((newest / file).read_text())
        content[field] = value
        (newest / file).write_text(json.dumps(content, indent=2))

    return Damage(f"{field} edited in {file}", file, do)


def _swap(newest: Path, older: Path) -> None:
    os.rename(newest / "optimizer.pt", newest / "aside")
    os.rename(newest / "scheduler.pt", newest / "optimizer.pt")
    os.rename(newest / "aside", newest / "scheduler.pt")


def _older_weights(newest: Path, older: Path) -> None:
    shutil.copy(older / checkpoint.WEIGHTS, newest / checkpoint.WEIGHTS)


def _append(newest: Path, older: Path) -> None:
    with (newest / checkpoint.RUN_STATE).open("ab") as stream:
        stream.write(b"\0")


def _whole_older_folder(newest: Path, older: Path) -> None:
    shutil.rmtree(newest)
    shutil.copytree(older, newest)


DAMAGES = (
    _flip(checkpoint.WEIGHTS),
    _flip(checkpoint.RUN_STATE),
    _flip("optimizer.pt"),
    _flip("scheduler.pt"),
    _flip("rng_state.pth"),
    _flip(checkpoint.MANIFEST),
    _cut(checkpoint.WEIGHTS, 0.5),
    _cut("optimizer.pt", 0.99),
    _cut(checkpoint.RUN_STATE, 0.0),
    _remove("optimizer.pt"),
    _remove("rng_state.pth"),
    _remove(checkpoint.MANIFEST),
    _edit_json("trainer_state.json", "global_step", 3),
    _edit_json(checkpoint.MANIFEST, "format_version", 99),
    Damage("manifest is garbage", checkpoint.MANIFEST, lambda new, old: (new / checkpoint.MANIFEST).write_text("{{")),
    Damage("optimizer and scheduler swapped", "optimizer.pt", _swap),
    Damage("weights of an older checkpoint", checkpoint.WEIGHTS, _older_weights),
    Damage("a byte appended", checkpoint.RUN_STATE, _append),
    Damage("an older checkpoint under a newer name", checkpoint.MANIFEST, _whole_older_folder),
)


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"


def named_and_passed_over(run_dir: Path, damage: Damage) -> bool:
    """Damages the newest of the checkpoints; whether a warning names it and its file, and the one before is used."""
    newest, older = checkpoint.checkpoints(run_dir)[:2]
    damage.do(newest, older)
    heard = _Warnings()
    checkpoint.logger.addHandler(heard)
    try:
        used = checkpoint.newest_intact(run_dir)
    finally:
        checkpoint.logger.removeHandler(heard)
    return used == older and newest.name in heard.text and damage.file in heard.text


# --- the trials ----------------------------------------------------------------------------------------------------


def report_of(work: Callable[[Path], None], folder: Path) -> Any:
    """What a child that ends in good order reports."""
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    if not in_child(lambda: work(report)):
        return {"digest": None, "steps": -1, "seconds": 0.0}
    return json.loads(report.read_text())


def run_kills(kills: int, seed: int, folder: Path, reference: dict[str, Any]) -> list[dict[str, Any]]:
    """Kills, resumes and compares; every other kill strikes inside a save."""
    rng = random.Random(seed)
    points = report_of(lambda report: train_until_event(folder / "count", None, report), folder)
    trials = []
    for trial in range(kills):
        run_dir = folder / f"kill-{trial}"
        if trial % 2 == 0:
            die_at = rng.randrange(1, len(points) + 1)
            where = f"{points[die_at - 1]} (point {die_at} of {len(points)})"
            ended = in_child(lambda at=die_at, to=run_dir: train_until_event(to, at))
        else:
            ended = True
            while ended:  # a process that was faster than the reference is not killed: draw again
                shutil.rmtree(run_dir, ignore_errors=True)
                moment = rng.uniform(0.0, 1.0) * reference["whole_seconds"]
                where = f"after {moment:.2f} s"
                ended = in_child(lambda to=run_dir: train_until_event(to, None), kill_after=moment)
        left = sorted(path.name for path in run_dir.glob("*checkpoint*")) if run_dir.exists() else []
        again = report_of(lambda report, to=run_dir: train_to_the_end(to, report), folder)
        equal = again["digest"] == reference["digest"]
        trials.append({"where": where, "killed": not ended, "left": left, "steps": again["steps"], "equal": equal})
        shutil.rmtree(run_dir, ignore_errors=True)
    return trials


def run_damages(folder: Path, finished_run: Path, reference: dict[str, Any]) -> list[dict[str, Any]]:
    """Damages the newest checkpoint in every way, looks for its name in the warning, resumes and compares."""
    trials = []
    for damage in DAMAGES:
        run_dir = folder / "damaged"
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.copytree(finished_run, run_dir)
        (run_dir / persistence.FINISHED).unlink()
        named = named_and_passed_over(run_dir, damage)
        again = report_of(lambda report, to=run_dir: train_to_the_end(to, report), folder)
        trials.append({"damage": damage.name, "named": named, "equal": again["digest"] == reference["digest"]})
    return trials


def run_all(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """The reference, the kills, the damages, and a finished run that is resumed."""
    start = time.perf_counter()
    run_dir = folder / "reference"
    reference = report_of(lambda report: train_to_the_end(run_dir, report), folder)
    reference["whole_seconds"] = time.perf_counter() - start
    again = report_of(lambda report: train_to_the_end(run_dir, report), folder)
    return {
        "steps": reference["steps"],
        "finished_run_resumed": {"steps": again["steps"], "equal": again["digest"] == reference["digest"]},
        "kills": run_kills(kills, seed, folder, reference),
        "damages": run_damages(folder, run_dir, reference),
    }


def main() -> int:
    """Prints one line a trial and the totals; writes everything as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write all trials here")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        found = run_all(options.kills, options.seed, Path(folder))
    for trial in found["kills"]:
        print(f"{'ok  ' if trial['equal'] else 'FAIL'} killed {trial['where']}; left {trial['left']}")
    for trial in found["damages"]:
        print(f"{'ok  ' if trial['named'] and trial['equal'] else 'FAIL'} {trial['damage']}")
    equal = sum(trial["equal"] for trial in found["kills"])
    sound = sum(trial["named"] and trial["equal"] for trial in found["damages"])
    finished = found["finished_run_resumed"]
    print(
        f"kills: {equal} of {len(found['kills'])} equal; "
        f"damage: {sound} of {len(found['damages'])} named and passed over"
    )
    print(f"finished run resumed: {finished['steps']} steps, {'equal' if finished['equal'] else 'DIFFERENT'}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))
    done = equal == len(found["kills"]) and sound == len(found["damages"])
    return 0 if done and finished == {"steps": 0, "equal": True} else 1


if __name__ == "__main__":
    raise SystemExit(main())
