"""Tree attention's static memory, as an engine that replays CUDA graphs holds it. Used by attention.py and decode_step.py."""

from __future__ import annotations

from torch import Tensor

from rainkernels._lanes import choose_lane
from rainkernels.ops._attention_items import item_table
from rainkernels.ops.attention import AttentionBuffers, AttentionPlan
from rainkernels.triton.attention_tiles import choose_tiles

_CHUNK = 256  # as tree_attention's own


def loaded_buffers(plan: AttentionPlan, num_qo_heads: int, k_pool: Tensor, v_pool: Tensor) -> AttentionBuffers | None:
    """Buffers just large enough for `plan`, which they hold; None where the lane takes none.

    A capture reads them where they are. Without them a call copies its table to the device the first time a stream sees
    the plan, from memory that is not pinned, which no capture may do.
    """
    device, dtype = k_pool.device, k_pool.dtype
    if choose_lane("attention", device) != "triton":
        return None
    num_slots, num_kv_heads, head_dim = k_pool.shape
    head_dim_v = v_pool.shape[2]
    tiles = choose_tiles(dtype, head_dim, head_dim_v, num_qo_heads // num_kv_heads, plan.num_rows)
    need = item_table(plan, tiles, _CHUNK)
    buffers = AttentionBuffers.create(
        max_rows=plan.num_rows, max_items=need.num_items, max_keys=need.num_keys, max_partials=need.num_partials,
        num_slots=num_slots, num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        head_dim_v=head_dim_v, dtype=dtype, device=device, chunk=_CHUNK,
        levels=1 + max(launch.level for launch in need.launches),
    )  # fmt: skip
    buffers.load(plan)
    return buffers
