"""Other ways to attend over the rows of a fan or a prefill. Each gives the same values as tree_attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as functional
from torch import Tensor

from rainkernels.testing.cases_attention import AttentionInputs


@dataclass(frozen=True)
class Contender:
    """A function of tensors with its arguments, so that torch.compile can take the function alone."""

    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]

    @property
    def run(self) -> Callable[[], Tensor]:
        return partial(self.function, *self.arguments)


class FanShape(Protocol):
    """What is needed of a fan."""

    prefix: int
    branches: int
    length: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int


def gathered(case: FanShape, i: AttentionInputs) -> Contender:
    """K and V of every branch gathered side by side, as a cache per branch holds them, then one SDPA."""
    at = _branch_slots(case, i)
    grouped = case.num_qo_heads != case.num_kv_heads

    def attend(q: Tensor, k_pool: Tensor, v_pool: Tensor, at: Tensor) -> Tensor:
        k, v = k_pool[at].transpose(1, 2), v_pool[at].transpose(1, 2)
        return functional.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=grouped)[:, :, 0]

    return Contender(attend, (i.q, i.k_pool, i.v_pool, at))


def replicated(case: FanShape, i: AttentionInputs) -> Contender:
    """One SDPA over caches that already hold the prefix once per branch: gathering is not counted, the memory is taken."""
    at = _branch_slots(case, i)
    k = i.k_pool[at].transpose(1, 2).contiguous()
    v = i.v_pool[at].transpose(1, 2).contiguous()
    grouped = case.num_qo_heads != case.num_kv_heads

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=grouped)[:, :, 0]

    return Contender(attend, (i.q, k, v))


def two_part(case: FanShape, i: AttentionInputs) -> Contender:
    """Prefix pass with its log-sum-exp, suffix pass, merge: matrix products, the prefix read once for all rows."""
    heads, dim = case.num_kv_heads, case.head_dim
    branches, group = case.branches, case.num_qo_heads // case.num_kv_heads
    scale = i.options["softmax_scale"]

    def part(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = (q @ k.transpose(-1, -2)).float() * scale
        lse = torch.logsumexp(scores, dim=-1, keepdim=True)
        return torch.exp(scores - lse).to(v.dtype) @ v, lse

    def attend(q: Tensor, k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor) -> Tensor:
        q = q.view(branches, heads, group, dim)
        out_a, lse_a = part(q.transpose(0, 1).reshape(heads, -1, dim), k, v)
        shape = (heads, branches, group, -1)
        out_a, lse_a = out_a.view(shape).transpose(0, 1), lse_a.view(shape).transpose(0, 1)
        out_b, lse_b = part(q, own_k, own_v)
        return _merged(out_a, lse_a, out_b, lse_b).to(q.dtype).reshape(branches, -1, dim)

    return Contender(attend, (i.q, *_parts(case, i)))


def two_part_flash(case: FanShape, i: AttentionInputs) -> Contender:
    """As `two_part`, with PyTorch's flash kernel for both parts: query heads of a KV head become rows of one product."""
    heads, dim = case.num_kv_heads, case.head_dim
    branches, group = case.branches, case.num_qo_heads // case.num_kv_heads
    scale = i.options["softmax_scale"]
    on_gpu = i.q.device.type == "cuda"

    def flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if on_gpu:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]  # type: ignore[no-any-return]
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)  # type: ignore[no-any-return]

    def attend(q: Tensor, k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor) -> Tensor:
        q = q.view(branches, heads, group, dim)
        out_a, lse_a = flash(q.transpose(0, 1).reshape(1, heads, branches * group, dim), k[None], v[None])
        out_a = out_a.view(heads, branches, group, dim).transpose(0, 1)
        lse_a = lse_a.reshape(heads, branches, group, 1).transpose(0, 1)
        out_b, lse_b = flash(q, own_k, own_v)
        return _merged(out_a, lse_a, out_b, lse_b[..., None]).to(q.dtype).reshape(branches, -1, dim)

    return Contender(attend, (i.q, *_parts(case, i)))


def causal(case: Any, i: AttentionInputs) -> Contender:
    """PyTorch's own causal attention over K and V that already lie side by side."""
    q, k, v = (t.transpose(0, 1)[None] for t in (i.q, i.k_pool[1:], i.v_pool[1:]))
    grouped = case.num_qo_heads != case.num_kv_heads

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return out[0].transpose(0, 1)

    return Contender(attend, (q, k, v))


def flashinfer_cascade(case: FanShape, i: AttentionInputs) -> Contender:
    """FlashInfer's two-level cascade over pages of 16 tokens: the prefix for all rows, each branch for its own row.

    Raises:
        ImportError: FlashInfer is not installed.
        ValueError: the case does not divide into pages.
    """
    import flashinfer

    page = 16
    if case.prefix % page or case.length % page:
        raise ValueError(f"a prefix of {case.prefix} and branches of {case.length} do not divide into pages of {page}")
    device, first = i.q.device, int(i.plan_inputs["slots"][0])
    keys = case.prefix + case.branches * case.length
    shape = (keys // page, page, case.num_kv_heads, case.head_dim)
    pages = (i.k_pool[first : first + keys].view(shape), i.v_pool[first : first + keys].view(shape))
    prefix_pages, own_pages = case.prefix // page, case.length // page

    def ints(values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int32, device=device)

    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(
        2, torch.empty(128 << 20, dtype=torch.uint8, device=device), "NHD"
    )
    each = torch.arange(case.branches + 1)
    wrapper.plan(
        [ints([0, case.branches]), ints(each)],
        [ints([0, prefix_pages]), ints(each * own_pages)],
        [ints(torch.arange(prefix_pages)), ints(prefix_pages + torch.arange(case.branches * own_pages))],
        [ints([page]), ints([page] * case.branches)],
        case.num_qo_heads, case.num_kv_heads, case.head_dim, page, causal=False, q_data_type=i.q.dtype,
    )  # fmt: skip
    return Contender(lambda q: wrapper.run(q, pages), (i.q,))


def _branch_slots(case: FanShape, i: AttentionInputs) -> Tensor:
    """Slots of every branch's whole path, [branches, prefix + length]."""
    slots = i.plan_inputs["slots"].long()
    own = slots[case.prefix :].view(case.branches, case.length)
    return torch.cat([slots[: case.prefix].expand(case.branches, -1), own], dim=1).to(i.q.device)


def _parts(case: FanShape, i: AttentionInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views of the pools: prefix K and V [heads, prefix, dim], the branches' own [branches, heads, length, dim]."""
    first = int(i.plan_inputs["slots"][0])
    cut, end = first + case.prefix, first + case.prefix + case.branches * case.length
    shape = (case.branches, case.length, case.num_kv_heads, case.head_dim)
    return (
        i.k_pool[first:cut].transpose(0, 1),
        i.v_pool[first:cut].transpose(0, 1),
        i.k_pool[cut:end].view(shape).transpose(1, 2),
        i.v_pool[cut:end].view(shape).transpose(1, 2),
    )


def _merged(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
    lse = torch.logaddexp(lse_a, lse_b)
    return torch.exp(lse_a - lse) * out_a + torch.exp(lse_b - lse) * out_b
