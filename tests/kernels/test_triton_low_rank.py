"""Triton kernels against float64 with every logit materialised: on a GPU, else through Triton's interpreter.

The interpreter must be asked for before Triton is imported, which this process may have done long ago. So without a GPU
`test_kernels_under_the_interpreter` runs this file again in a process of its own, where the other tests do not skip.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prefmix.kernels.tiles import Tiles

pytest.importorskip("triton", reason="Triton is not installed (pip install 'prefmix[gpu]')")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="no CUDA device; test_kernels_under_the_interpreter runs it on the CPU"
)
# Chunks and tiles that cut tokens (41) and vocabulary (333). Few of them: the interpreter takes milliseconds a line.
LENGTHS = [1, 17, 3, 20]
CHUNK, BLOCKS = Tiles(tokens=30, vocab=200), (16, 128)


def eager(hidden: Tensor, low: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Any:
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    index = targets[:, None]
    experts = (logits + low @ up.transpose(1, 2)).log_softmax(-1)
    return experts.gather(-1, index.expand(len(low), -1, -1)).squeeze(-1).T, logits.log_softmax(-1).gather(-1, index)[
        :, 0
    ]


def triton(*inputs: Any, blocks: tuple[int, int] | None = BLOCKS) -> Any:
    from prefmix.kernels.triton_low_rank import Blocks, low_rank_token_log_probs

    return low_rank_token_log_probs(*inputs, chunk=CHUNK, blocks=None if blocks is None else Blocks(*blocks))


def tensors(problem: Any, accumulate: torch.dtype) -> list[Any]:
    """What the kernel takes of a problem, on the device; `up` strided as `project_up` leaves it."""
    low = torch.einsum("td,krd->ktr", problem.hidden.double(), problem.down.double())
    up = problem.up.to(accumulate).transpose(1, 2).contiguous().transpose(1, 2)
    inputs = [problem.hidden, low.to(accumulate), up, problem.base_weight, problem.bias, problem.targets]
    return [None if x is None else x.to(DEVICE) for x in inputs]


def answer(function: Any, inputs: list[Any], grad: Tensor) -> list[Tensor]:
    """Log-probabilities of experts and base, gradients of hidden, low and up; in float64 on the CPU."""
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    experts, base = function(*leaves, *inputs[3:])
    assert not base.requires_grad or function is eager
    grads = torch.autograd.grad((experts * grad.to(experts)).sum(), leaves)
    return [x.detach().double().cpu() for x in (experts, base, *grads)]


def errors(problem: Any, accumulate: torch.dtype, function: Any = triton, grad: Tensor | None = None) -> list[float]:
    """Relative norm errors of the kernel against float64 on the same, already rounded numbers."""
    inputs = tensors(problem, accumulate)
    grad = problem.grad[problem.segments] if grad is None else grad
    double = [x.double().cpu() if x is not None and x.is_floating_point() else x for x in inputs]
    expected = answer(eager, [None if x is None else x.cpu() for x in double], grad)
    return [float((f - e).norm() / e.norm()) for f, e in zip(answer(function, inputs, grad), expected, strict=True)]


@needs_kernels
@pytest.mark.parametrize(
    ("num_experts", "dtype", "limit"),
    [
        (1, torch.float64, 1e-13),
        (8, torch.float64, 1e-13),
        (3, torch.float32, 1e-5),
        (2, torch.bfloat16, 2e-2),
        (2, torch.float16, 2e-3),
    ],
)
def test_equals_float64_materialised(make_problem, num_experts, dtype, limit):
    problem = make_problem(num_experts, bias=num_experts in (3, 8), lengths=LENGTHS)
    cast = {name: getattr(problem, name) for name in ("hidden", "base_weight", "bias")}
    problem = problem._replace(**{name: None if x is None else x.to(dtype) for name, x in cast.items()})
    found = errors(problem, torch.promote_types(dtype, torch.float32))
    assert max(found) < limit, found


@needs_kernels
@pytest.mark.parametrize(("rank", "lengths", "blocks"), [(1, [1], BLOCKS), (16, [5, 11], None), (36, [35], None)])
def test_odd_sizes(make_problem, rank, lengths, blocks):
    problem = make_problem(2, lengths=lengths)
    generator = torch.Generator().manual_seed(1)
    problem = problem._replace(
        down=torch.randn(2, rank, problem.hidden.shape[1], generator=generator) * 0.2,
        up=torch.randn(2, len(problem.base_weight), rank, generator=generator) * 0.1,
    )
    assert max(errors(problem.double(), torch.float64, partial(triton, blocks=blocks))) < 1e-13


@needs_kernels
def test_corrections_of_hundreds_of_nats(make_problem):
    assert max(errors(make_problem(2, correction=100.0, lengths=LENGTHS).double(), torch.float64)) < 1e-12


@needs_kernels
def test_tokens_and_experts_without_gradient_cost_nothing_and_change_nothing(make_problem):
    problem = make_problem(3, lengths=LENGTHS).double()
    grad = problem.grad[problem.segments]
    grad[10:15] = 0.0  # no expert learns
    grad[:, 1] = 0.0  # expert 1 learns nowhere
    grad[18:, 0] = 0.0
    assert max(errors(problem, torch.float64, grad=grad)) < 1e-13


@needs_kernels
def test_a_gradient_that_is_not_a_number_is_not_dropped(make_problem):
    problem = make_problem(2, lengths=LENGTHS)
    grad = torch.zeros_like(problem.grad[problem.segments])
    grad[3, 1] = torch.nan
    _, _, hidden, low, up = answer(triton, tensors(problem, torch.float32), grad)
    assert hidden[3].isnan().all() and low[1, 3].isnan().all() and up[1].isnan().any()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_correction_is_the_reference_bit_for_bit(make_problem, dtype):
    problem = make_problem(3, dtype=dtype, lengths=LENGTHS)
    problem = problem._replace(up=torch.zeros_like(problem.up))
    experts, base = triton(*tensors(problem, torch.float32))
    assert torch.equal(experts, base[:, None].expand(-1, 3))


@needs_kernels
def test_no_experts_gives_the_reference_alone(make_problem):
    experts, base = triton(*tensors(make_problem(0, lengths=LENGTHS), torch.float32))
    assert experts.shape == (41, 0)
    torch.testing.assert_close(base, triton(*tensors(make_problem(2, lengths=LENGTHS), torch.float32))[1])


@needs_kernels
def test_gradients_that_nobody_asks_for_are_not_computed(make_problem):
    problem = make_problem(2, lengths=LENGTHS)
    inputs, grad = tensors(problem, torch.float32), problem.grad[problem.segments].to(DEVICE)
    inputs[2].requires_grad_()
    (found,) = torch.autograd.grad((triton(*inputs)[0] * grad).sum(), [inputs[2]])
    expected = answer(triton, [*inputs[:2], inputs[2].detach(), *inputs[3:]], grad)[-1]
    torch.testing.assert_close(found.double().cpu(), expected)


@needs_kernels
def test_kernels_are_trusted_where_they_agree_with_torch(monkeypatch):
    from prefmix.kernels import triton_low_rank

    device = torch.device(DEVICE)
    assert triton_low_rank.why_not(device) is None
    monkeypatch.setattr(triton_low_rank, "LN2", 0.6)
    assert "differ from torch" in triton_low_rank.why_not.__wrapped__(device)


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the kernels run here")
def test_kernels_that_do_not_run_are_named():
    from prefmix.kernels.triton_low_rank import why_not

    assert "do not run here" in why_not(torch.device("cpu"))


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the kernels themselves run in this process")
@pytest.mark.slow
def test_kernels_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", str(Path(__file__))]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": "", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " 0 passed" not in done.stdout


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the kernels themselves run in this process")
def test_a_cpu_is_refused_with_what_to_use_instead(make_problem):
    with pytest.raises(ValueError, match='impl="chunked"'):
        triton(*tensors(make_problem(2), torch.float32))


SIGNATURES = {
    "log_sum_kernel": ["out"],
    "low_gradient_kernel": ["lse", "coefficient", "grad_low"],
    "up_gradient_kernel": ["lse", "coefficient", "weighted_low", "grad_up", "grad_expert", "grad_rank"],
    "weighted_probabilities_kernel": ["lse", "coefficient", "out"],
}


@pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel has no machine code")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", SIGNATURES)
def test_compiles_for_a_gpu_that_is_not_here(kernel, capability):
    """The compiler needs no GPU: shared memory must fit the smallest of the data-centre generation (99 KiB)."""
    import triton as package
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from prefmix.kernels import triton_tiles
    from prefmix.kernels.triton_low_rank import default_blocks

    names = ["logits", "bias", "low", "up", "num_rows", "num_columns", "rank", "row_stride", "up_expert", "up_rank"]
    names += ["up_vocab", *SIGNATURES[kernel]]
    floats = {"low", "up", "lse", "coefficient", "grad_low", "weighted_low", "grad_up"}
    floats |= {"out"} if kernel == "log_sum_kernel" else set()
    half = {"logits", "bias", "out"} - floats
    signature = {n: "*bf16" if n in half else "*fp32" if n in floats else "i32" for n in names}
    blocks = default_blocks(16)
    constants = {"R": 16, "BT": blocks.tokens, "BV": blocks.vocab, "HAS_BIAS": False, "PRECISION": "tf32x3"}
    constants |= {} if "gradient" in kernel else {"K": 8}
    source = ASTSource(getattr(triton_tiles, kernel), signature | dict.fromkeys(constants, "constexpr"), constants)
    compiled = package.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_stages": 2})
    assert "mma" in compiled.asm["ptx"]  # tensor cores: mma.sync, wgmma.mma_async
    assert compiled.metadata.shared <= 99 * 1024
