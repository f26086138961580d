"""16-bit products by blocks of fp32: the same values, and 16-bit autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from harness.training import half_matmul


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_matmul, "half_matmul", lambda: "fp32-blocks")
    assert half_matmul.install()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 1, 1), (0, 4, 3), (130, 257, 65), (40, 9000, 600)])
def test_products_are_the_exact_ones_rounded_once(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    torch.manual_seed(0)
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    exact = a.double() @ b.double()
    step = torch.finfo(dtype).eps * exact.abs().clamp(min=1e-3)
    for left, right in ((a, b), (a.t().contiguous().t(), b.t().contiguous().t())):
        product = left @ right
        assert product.dtype is dtype
        assert ((product.double() - exact).abs() <= step * 0.51 + 1e-4 * k**0.5).all()


@pytest.mark.parametrize("name", ["mm", "addmm", "bmm", "baddbmm"])
def test_products_into_a_buffer_are_the_same(name: str) -> None:
    """As compiled code asks for them. Plain loops would round sums of other parts."""
    batch = (2,) if name.startswith("b") else ()
    torch.manual_seed(0)
    added = [torch.randn(*batch, 30, 50).bfloat16()] if "add" in name else []
    operands = [torch.randn(*batch, 30, 4000).bfloat16(), torch.randn(*batch, 4000, 50).bfloat16()]
    out = torch.empty(*batch, 30, 50, dtype=torch.bfloat16)
    product = getattr(torch, name)
    assert product(*added, *operands, out=out) is out
    assert torch.equal(out, product(*added, *operands))


def test_blocks_cover_the_whole_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_matmul, "_BLOCK", 64)
    a, b = torch.randn(37, 19).bfloat16(), torch.randn(19, 23).bfloat16()
    torch.testing.assert_close(a @ b, (a.float() @ b.float()).bfloat16())


def test_gradients_and_what_is_kept_for_them_stay_16_bit() -> None:
    kept: list[torch.dtype] = []
    x = torch.randn(8, 16).bfloat16().requires_grad_()
    w = torch.randn(4, 16).bfloat16().requires_grad_()
    bias = torch.randn(4).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        out = F.linear(x, w, bias)
    out.float().pow(2).sum().backward()
    reference = [t.detach().float().requires_grad_() for t in (x, w, bias)]
    F.linear(*reference).pow(2).sum().backward()
    assert set(kept) == {torch.bfloat16}
    for ours, exact in zip((x, w, bias), reference, strict=True):
        torch.testing.assert_close(ours.grad.float(), exact.grad, rtol=0.03, atol=0.1)  # type: ignore[union-attr]  # set


def test_attention_agrees_with_fp32() -> None:
    q, k, v = (torch.randn(2, 3, 17, 8).bfloat16().requires_grad_() for _ in range(3))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    out.float().sum().backward()
    wide = [t.detach().float().requires_grad_() for t in (q, k, v)]
    exact = F.scaled_dot_product_attention(*wide, is_causal=True)
    exact.sum().backward()
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0.02, atol=0.02)
    for ours, wanted in zip((q, k, v), wide, strict=True):
        assert ours.grad is not None
        assert ours.grad.dtype is torch.bfloat16
        torch.testing.assert_close(ours.grad.float(), wanted.grad, rtol=0.05, atol=0.05)


def test_fp32_is_left_alone() -> None:
    a, b = torch.randn(5, 6), torch.randn(6, 7)
    torch.testing.assert_close(a @ b, (a.double() @ b.double()).float())
