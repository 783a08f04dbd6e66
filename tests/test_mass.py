"""The kernels of `lists`, on CUDA or in Triton's interpreter, against the torch form: the search, which spares top_k,
top_mass and mass_count a sort, and pack.
"""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from interpreter import DEVICE, INTERPRETED, mend_interpreter, needs_triton, run_interpreted

from attnpatch.executors import backends, lists

if INTERPRETED:
    mend_interpreter()
fused = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="needs a CUDA device; without one test_the_search_in_tritons_interpreter runs it",
)
SHAPES = [(3, 2, 1), (2, 3, 17), (1, 4, 1000), (1, 2, 2501)]  # the last over several programs


@pytest.fixture
def short_parts(monkeypatch):
    """Rows above 1000 scores go to several programs: in the interpreter each costs time."""
    if INTERPRETED or torch.cuda.is_available():
        from attnpatch.executors import _mass_triton

        monkeypatch.setattr(_mass_triton, "REGISTERS", 1000)
        monkeypatch.setattr(_mass_triton, "PART", 1024)


def scores(shape, kind, dtype=torch.float32):
    """kind: ties (few values, zeros among them), or mass (softmax, whose sums are not exact)."""
    g = torch.Generator().manual_seed(shape[-1])
    if kind == "ties":
        return torch.randint(0, 6, shape, generator=g).to(dtype)
    return torch.softmax(4 * torch.randn(shape, generator=g), dim=-1).to(dtype)


def both(function, *given, **more):
    """(search, sort) of a function of `lists`, brought back."""
    move = lambda x, to: x.to(to) if isinstance(x, torch.Tensor) else x  # noqa: E731
    found = []
    for name, device in (("triton", DEVICE), ("torch", "cpu")):
        moved = {k: move(x, device) for k, x in more.items()}
        found.append(function(*(move(x, device) for x in given), **moved, _backend=name).cpu())
    assert found[0].dtype == found[1].dtype and found[0].shape == found[1].shape
    return found


@fused
@pytest.mark.parametrize("later", [True, False], ids=["later", "earlier"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_top_k(shape, later, short_parts):
    n = shape[-1]
    for kind in ("ties", "mass"):
        x = scores(shape, kind)
        x[..., n // 2 : n // 2 + 3] = float("-inf")
        x[..., :1] = float("inf") if n > 1 else 1.0
        x[:, 1, 1::5] *= -1  # also -0.0
        ks = torch.randint(0, n + 2, shape[:-1], generator=torch.Generator().manual_seed(1))
        for k in (n // 3, n + 5, ks, ks[:, :1] * 0):
            got, expected = both(lists.top_k, x, k, later)
            assert torch.equal(got, expected)


@fused
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_top_mass_of_exact_sums(shape, short_parts):
    x = scores(shape, "ties")
    total = x.sum(-1)
    part = torch.rand(shape[:-1], generator=torch.Generator().manual_seed(1)) * total
    for mass in (total * 0 - 1, total * 0, part, part.floor(), total):
        for lag in (0, 1, 2):
            got, expected = both(lists.top_mass, x, mass, lag=lag)
            assert torch.equal(got, expected), (mass, lag)
    got, expected = both(lists.top_mass, x, part.double(), taken=part.floor() / 2, lag=1)
    assert torch.equal(got, expected)


@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
def test_triton_top_mass_of_rounded_sums(shape, dtype, short_parts):
    x = scores(shape, "mass", dtype)
    x[..., 5] = float("-inf")
    for lag in (0, 1):
        got, expected = both(lists.top_mass, x, torch.full(shape[:-1], 0.9), lag=lag)
        lost = got ^ expected  # a score or two where another order of additions rounds otherwise
        assert (lost.sum(-1) <= 2).all() and 0 < got.sum() < got.numel()
        least = torch.where(got, x, 2).amin(-1)
        assert (x[~got & (x > least[..., None])].numel()) == 0


@fused
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_mass_count(shape, short_parts):
    x, n = scores(shape, "ties"), shape[-1]
    ends = torch.tensor([[n], [n // 2 + 1], [0]])[: shape[0]]
    x = x.masked_fill(torch.arange(n) >= ends[..., None], 0.0)
    for mass in (-1.0, 0.5, 2.0, n // 2, 1.5 * n, 6 * n + 1, torch.tensor([2.0, -1.0, 9.5, -0.5])[: shape[1]]):
        got, expected = both(lists.mass_count, x, mass, ends)
        assert torch.equal(got, expected), mass
    x = scores(shape, "mass").masked_fill(torch.arange(n) >= ends[..., None], 0.0)
    for mass in (0.3, 0.9, 0.999, 1.01):
        got, expected = both(lists.mass_count, x, mass, ends)
        assert (got - expected).abs().max() <= (1 if mass < 0.99 else 1 + n // 10000)


@fused
def test_triton_rows_of_nothing():
    assert both(lists.top_k, torch.zeros(2, 0, 5), 2)[0].shape == (2, 0, 5)
    assert both(lists.top_k, torch.zeros(2, 3, 0), 2)[0].shape == (2, 3, 0)


@fused
@pytest.mark.parametrize("n", [1, 17, 5000])
def test_triton_pack(n):
    chosen = torch.rand(2, 3, n, generator=torch.Generator().manual_seed(0)) < 0.4
    chosen[0, 0], chosen[0, 1] = False, True
    for width in (None, n, n // 3, n + 9):
        expected = lists.pack(chosen, width, _backend="torch")
        got = lists.pack(chosen.to(DEVICE), width, _backend="triton")
        for a, e in zip(got, expected, strict=True):
            assert a.dtype == torch.int32 and torch.equal(a.cpu(), e)
    strided = chosen.transpose(0, 1)
    got, expected = (lists.pack(strided.to(DEVICE), _backend=name)[0].cpu() for name in ("triton", "torch"))
    assert torch.equal(got, expected)


def test_the_search_is_not_for_every_score(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    cuda = torch.device("cuda", 0)
    for dtype, why in ((torch.float32, None), (torch.bfloat16, None), (torch.float64, "float32, this is float64")):
        x = SimpleNamespace(device=cuda, dtype=dtype, shape=(2, 5), is_floating_point=lambda: True)
        name, reason = lists.choose(x)
        assert (name == "triton" and why is None) or (name == "torch" and why in reason)
    assert lists.choose(torch.zeros(2)) == ("torch", "not triton: needs CUDA capability >= 8, this is cpu")


def test_import_is_light():
    code = "import sys, attnpatch.executors.lists; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@fused
@pytest.mark.skipif(INTERPRETED, reason="minutes in the interpreter")
@pytest.mark.parametrize("n", [4097, 16385, 32769, 1 << 20])
def test_triton_long_rows(n):
    x, mass = scores((1, 4, n), "ties"), torch.tensor([[0.1, 0.5, 0.9, 1.0]]) * n
    for later in (True, False):
        assert torch.equal(*both(lists.top_k, x, mass.long(), later))
    for lag in (0, 1):
        assert torch.equal(*both(lists.top_mass, x, mass.floor(), lag=lag))
    assert torch.equal(*both(lists.mass_count, x, 0.5 * n, torch.full((1, 1), n)))


@needs_triton
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the search runs here itself")
def test_the_search_in_tritons_interpreter():
    run_interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__)
