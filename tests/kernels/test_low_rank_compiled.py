"""The compiled implementation against float64 with every logit materialised; skipped where there is no C compiler."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prefmix.data.cache_folder import cache_folder
from prefmix.kernels import c_library, implementations, low_rank_compiled
from prefmix.kernels.c_library import NoLibraryError, load_library
from prefmix.kernels.implementations import VARIABLE, resolve
from prefmix.kernels.low_rank_head import head_log_probs
from prefmix.kernels.low_rank_problem import Demand
from prefmix.kernels.streamed_head import head_log_probs_and_grads
from prefmix.kernels.tiles import Tiles
from prefmix.kernels.up_projection import project_up

REASON = low_rank_compiled.why_not()
compiled_only = pytest.mark.skipif(REASON is not None, reason=f"no compiled kernel here: {REASON}")
# 333 words are cut into 111, each no multiple of the pieces of 128; 63 tokens into 16s, no multiple of their groups.
TILES = Tiles(tokens=21, vocab=150)
CPU = torch.device("cpu")
DEMAND = Demand(CPU, torch.float32, torch.float32, 16)
PATTERNS = {
    "all": [[1, 1, 1]] * 5,
    "one expert a text": [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0]],
    "nobody reads a text": [[1, 1, 1], [0, 0, 0], [1, 1, 1], [0, 0, 0], [1, 1, 1]],
    "an expert without texts": [[1, 0, 0], [1, 0, 1], [0, 0, 1], [1, 0, 0], [0, 0, 0]],
    "nothing": [[0, 0, 0]] * 5,
}


@pytest.fixture
def threads() -> Iterator[Any]:
    """Sets torch's threads, and sets them back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def answer(problem: Any, impl: str, tiles: Tiles = TILES, wanted: tuple[str, ...] = ("hidden", "down", "up")) -> Any:
    leaves = {name: getattr(problem, name).clone() for name in ("hidden", "down", "up")}
    asked = [leaves[name].requires_grad_() for name in wanted]
    texts = (leaves["hidden"], problem.targets, problem.segments, len(problem.grad), problem.base_weight)
    found = head_log_probs(*texts, leaves["down"], leaves["up"], bias=problem.bias, impl=impl, tiles=tiles)
    grads = torch.autograd.grad((found.log_probs * problem.grad).sum(), asked)
    return {"log_probs": found.log_probs.detach(), "base": found.base_log_probs, **dict(zip(wanted, grads))}


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((found[name].double() - x).norm() / x.norm().clamp(min=1e-30)) for name, x in expected.items()}


@compiled_only
@pytest.mark.parametrize("num_experts", [1, 2, 8])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("tiles", [TILES, TILES._replace(kept_bytes=0), Tiles(1024, 1024)], ids=["kept", "not", "one"])
def test_equals_float64_materialised(make_problem, num_experts, bias, dtype, limit, tiles):
    problem = make_problem(num_experts, dtype=dtype, bias=bias)
    off = errors(answer(problem, "compiled", tiles), answer(problem.double(), "eager"))
    assert max(off.values()) < limit, off


@compiled_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_pure_torch_closely_in_either_type(make_problem, dtype):
    problem = make_problem(3, dtype=dtype, bias=True)
    off = errors(answer(problem, "compiled"), answer(problem, "chunked"))
    assert max(off["log_probs"], off["base"], off["down"], off["up"]) < 2e-6, off


@compiled_only
def test_corrections_too_large_for_the_base_maximum(make_problem):
    problem = make_problem(correction=100.0)
    found, expected = answer(problem, "compiled"), answer(problem.double(), "eager")
    assert found["log_probs"].isfinite().all()
    assert errors(found, expected)["log_probs"] < 1e-5
    assert max(errors(found, expected).values()) < 1e-4


@compiled_only
def test_an_expert_may_leave_the_base_in_one_part_of_the_vocabulary(make_problem):
    """Near the base in some pieces and far in others: the running maximum changes hands."""
    problem = make_problem()
    scale = torch.where(torch.arange(333) % 250 < 130, 0.1, 300.0)
    problem = problem._replace(up=problem.up * scale[None, :, None])
    off = errors(answer(problem, "compiled", Tiles(32, 1000)), answer(problem.double(), "eager"))
    assert off["log_probs"] < 1e-5 and max(off.values()) < 1e-4, off


@compiled_only
@pytest.mark.parametrize("correction", [0.1, 100.0])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparse_gradients_are_exact(make_problem, correction, pattern):
    problem = make_problem(correction=correction, bias=True)
    problem = problem._replace(grad=problem.grad * torch.tensor(PATTERNS[pattern]))
    found, expected = answer(problem, "compiled"), answer(problem.double(), "eager")
    for name, x in expected.items():
        torch.testing.assert_close(found[name].double(), x, rtol=1e-4, atol=1e-4 * max(float(x.abs().max()), 1e-3))


@compiled_only
@pytest.mark.parametrize("wanted", [("up",), ("down",), ("hidden",), ("down", "up")])
def test_gradients_that_nobody_asks_for_are_not_needed(make_problem, wanted):
    problem = make_problem()
    found, expected = answer(problem, "compiled", wanted=wanted), answer(problem, "compiled")
    for name in wanted:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)


@compiled_only
def test_threads_do_not_change_the_answer(make_problem, threads):
    problem = make_problem()
    threads(1)
    one = answer(problem, "compiled", Tiles(1024, 1024))
    threads(3)
    many = answer(problem, "compiled", Tiles(1024, 1024))
    assert torch.equal(one["log_probs"], many["log_probs"])
    assert max(errors(many, {name: x.double() for name, x in one.items()}).values()) < 1e-6


@compiled_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["compiled", "chunked"])
def test_loss_at_the_start_is_exactly_log_two(make_problem, dtype, impl):
    """U = 0: every expert's log-ratio is 0, in the type of the base, so DPO's loss is log 2 and not 0.647."""
    problem = make_problem(3, dtype=dtype, bias=True)
    up = project_up(problem.base_weight, torch.zeros(3, problem.hidden.shape[1], 4))
    found = head_log_probs(*problem[:3], 5, *problem[3:5], up, bias=problem.bias, impl=impl, tiles=TILES)
    log_ratio = found.log_probs - found.base_log_probs[:, None]
    loss = -torch.nn.functional.logsigmoid(0.1 * (log_ratio[0] - log_ratio[1]))
    assert torch.equal(loss, torch.full((3,), 2.0).log())


@compiled_only
def test_what_is_not_a_number_stays_so(make_problem):
    problem = make_problem()
    problem.hidden[20, 3] = torch.nan
    found = head_log_probs(*problem[:3], 5, *problem[3:6], impl="compiled", tiles=TILES)
    assert found.log_probs.isnan().any(1).tolist() == [False, False, True, False, False]
    problem = make_problem()
    problem.up[1, 7, 2] = torch.nan
    found = head_log_probs(*problem[:3], 5, *problem[3:6], impl="compiled", tiles=TILES)
    assert found.log_probs.isnan().any(0).tolist() == [False, True, False] and not found.base_log_probs.isnan().any()


@compiled_only
def test_streamed_gradients_are_those_of_the_kept_path(make_problem):
    problem = make_problem(2)
    texts = (*problem[:3], 5, *problem[3:6])
    components = torch.tensor([0, 1, 0, 1, 2])
    found = head_log_probs_and_grads(
        *texts,
        lambda texts, _: problem.grad[texts],
        components=components,
        with_hidden=True,
        impl="compiled",
        tiles=TILES,
    )
    expected = answer(problem, "compiled")
    for name, grad in (("down", found.grad_down), ("up", found.grad_up), ("hidden", found.grad_hidden)):
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-5)


# --- which implementation -----------------------------------------------------------------------------------------


@compiled_only
def test_auto_takes_compiled_code_where_it_can(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert resolve("auto", DEMAND) == "compiled"
    assert resolve("auto", DEMAND._replace(dtype=torch.float64)) == "chunked"
    assert resolve("auto", DEMAND._replace(base_dtype=torch.float16)) == "chunked"
    assert resolve("auto", DEMAND._replace(rank=65)) == "chunked"
    monkeypatch.setenv(VARIABLE, "chunked")
    assert resolve("auto", DEMAND) == "chunked" and resolve("compiled", DEMAND) == "compiled"
    monkeypatch.setenv(VARIABLE, "compiled")
    assert resolve("auto", DEMAND._replace(rank=65)) == "chunked"


@compiled_only
@pytest.mark.parametrize(
    ("demand", "reason"),
    [
        (DEMAND._replace(dtype=torch.float64), "float32"),
        (DEMAND._replace(base_dtype=torch.float16), "float16"),
        (DEMAND._replace(rank=65), "64"),
        (DEMAND._replace(device=torch.device("meta")), "CPU"),
    ],
)
def test_compiled_says_what_it_cannot_do(demand, reason):
    with pytest.raises(ValueError, match=reason):
        resolve("compiled", demand)


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="impl='fast'"):
        resolve("fast", DEMAND)
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ValueError, match=f"{VARIABLE}='fast'"):
        resolve("auto", DEMAND)


def test_triton_is_refused_where_it_is_not_installed(make_problem, monkeypatch):
    monkeypatch.setattr(implementations, "_has_triton", lambda: False)
    with pytest.raises(ValueError, match="triton is not installed"):
        answer(make_problem(1), "triton")


def test_without_a_compiler_auto_is_pure_torch_in_silence(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(NoLibraryError, match="no C compiler"):
        load_library(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(implementations, "why_not", lambda: "no C compiler")
    assert resolve("auto", DEMAND) == "chunked"
    with pytest.raises(ValueError, match="no C compiler"):
        resolve("compiled", DEMAND)


@compiled_only
@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86")
@pytest.mark.parametrize("machine", ["x86-64", "x86-64-v3"])
def test_narrower_instruction_sets_give_the_same(monkeypatch, tmp_path, machine):
    """SSE2 and AVX2, where this processor may have AVX-512: lanes, blocks and exp2 differ."""
    monkeypatch.setattr(c_library, "_MACHINE", (f"-march={machine}",))
    code = load_library(tmp_path)
    monkeypatch.setattr(low_rank_compiled, "library", lambda: code)
    assert low_rank_compiled._self_check() < 1e-4


def test_code_that_gives_other_numbers_is_not_taken(monkeypatch):
    monkeypatch.setattr(low_rank_compiled, "_self_check", lambda: float("nan"))
    assert "differs from pure torch" in str(low_rank_compiled.why_not.__wrapped__())


@compiled_only
def test_a_library_is_compiled_once_and_processes_do_not_disturb_each_other(tmp_path):
    program = (
        f"from pathlib import Path; from prefmix.kernels.c_library import load_library as l; l(Path({str(tmp_path)!r}))"
    )
    started = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    assert [process.wait() for process in started] == [0, 0]
    (file,) = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    load_library(tmp_path)
    assert file.stat().st_mtime_ns == before


@compiled_only
@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_cache_that_cannot_be_written_is_no_library(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(NoLibraryError):
        load_library(tmp_path / "kernels")


def test_a_compiler_that_fails_is_no_library(monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho no such flag >&2; exit 3\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(NoLibraryError, match="no such flag"):
        load_library(tmp_path / "kernels")
    assert not list((tmp_path / "kernels").iterdir())


def test_libraries_lie_in_the_cache_of_the_package(monkeypatch, tmp_path):
    monkeypatch.setenv("PREFMIX_CACHE", str(tmp_path))
    assert c_library._cache_folder() == cache_folder() / "kernels"
    monkeypatch.delenv("PREFMIX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert c_library._cache_folder() == cache_folder() / "kernels"


def test_the_source_is_part_of_the_package():
    assert c_library.SOURCE.parent == Path(low_rank_compiled.__file__).parent and c_library.SOURCE.is_file()
