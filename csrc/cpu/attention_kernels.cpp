// tree_attention on the CPU: one block of rows, one KV head, chunk after chunk.   Reference:
// rainkernels/reference/attention.py Compiled once per instruction set. Per chunk: scores of every entry (K packed
// [head_dim][64 keys], one vector = 16 keys), a softmax per row, then P.V in key order; chunks join a row's running
// state in position order. A row's value is a chain fixed by absolute positions alone, so it does not depend on splits,
// neighbours, threads or instruction set.
#include "cpu/attention.h"
#include "cpu/attention_tiles.h"
#include "cpu/simd_math.h"

namespace rainkernels {
namespace RK_ISA {
namespace {

constexpr float kLog2e = 1.4426950408889634f;
// Up to this many row-heads, V is cheaper to read in place than to pack.
constexpr int kDirectRows = 12;
// Tokens whose rows are fetched ahead of their use.
constexpr int kAhead = 32;

int least(int a, int b) {
  return a < b ? a : b;
}
int most(int a, int b) {
  return a > b ? a : b;
}

struct Range {
  int lo, hi;
};

// One unit's view: sizes, the rows of its block and the pieces of its scratch. m counts (row, query head of the group)
// pairs.
template <class T>
struct Worker {
  const AttentionParams& p;
  const LayoutView plan;
  const int block, kv_head, row0, group, m, dv;
  float *q, *keys, *values, *scores, *chunk_acc, *acc;  // [m, dim] [dim, 64] [64, dv] [m, stride] [m, dv] [m, dv]
  float *top, *total, *chunk_top, *chunk_total;         // [m]
  int32_t *lo, *hi;                                     // [m] visible positions [lo, hi)

  RK_ALWAYS Worker(const AttentionParams& params, const AttentionUnit& unit, float* scratch)
      : p(params),
        plan(params.layout),
        block(unit.block),
        kv_head(unit.kv_head),
        row0(plan.block_row[unit.block]),
        group(plan.header->group),
        m((plan.block_row[unit.block + 1] - row0) * group),
        dv(round_up_16(params.head_dim_v)) {
    const int dim = round_up_16(p.head_dim);
    keys = scratch;
    values = keys + dim * kKeyTile;
    q = values + kKeyTile * dv;
    scores = q + m * dim;
    chunk_acc = scores + m * kScoreStride;
    acc = chunk_acc + m * dv;
    top = acc + m * dv;
    total = top + m;
    chunk_top = total + m;
    chunk_total = chunk_top + m;
    lo = reinterpret_cast<int32_t*>(chunk_total + m);
    hi = lo + m;
  }

  void find_ranges() const {
    for (int i = 0; i < m; ++i) {
      const int position = plan.row_position[row0 + i / group];
      hi[i] = position + 1;
      const int64_t from = p.window > 0 ? position + 1 - p.window : 0;
      lo[i] = from > 0 ? static_cast<int32_t>(from) : 0;
    }
  }

  void load_queries() const {
    for (int i = 0; i < m; ++i) {
      const int row = plan.row_order[row0 + i / group], head = kv_head * group + i % group;
      const T* from = static_cast<const T*>(p.q) + row * p.q_stride_row + head * p.q_stride_head;
      for (int d = 0; d < p.head_dim; d += 16)
        store(q + i * round_up_16(p.head_dim) + d, load_some(from + d, p.head_dim - d));
    }
  }

  // Positions any of the row-heads [a, b) sees.
  Range seen(int a, int b) const {
    Range r{lo[a], hi[a]};
    for (int i = a + 1; i < b; ++i) r = {least(r.lo, lo[i]), most(r.hi, hi[i])};
    return r;
  }

  // Rows of one head lie a whole token apart, which the hardware does not foresee.
  void prefetch(const void* pool, int row_dim, const int32_t* slots, int n) const {
    const T* from = static_cast<const T*>(pool) + static_cast<int64_t>(kv_head) * row_dim;
    const int64_t stride = static_cast<int64_t>(p.num_kv_heads) * row_dim;
    const int bytes = row_dim * static_cast<int>(sizeof(T));
    for (int j = 0; j < n; ++j) {
      const char* row = reinterpret_cast<const char*>(from + slots[j] * stride);
      for (int b = 0; b < bytes; b += 64) __builtin_prefetch(row + b);
    }
  }

  // The keys of an entry that come after its first `done` ones, and of the next entry: what is read a moment later.
  void prefetch_ahead(const void* pool, int row_dim, const PlanEntry& e, int done, const PlanEntry* end) const {
    if (done < e.num_keys) {
      prefetch(pool, row_dim, plan.keys + e.key_offset + done, least(kAhead, e.num_keys - done));
    } else if (&e + 1 != end) {
      const PlanEntry& next = (&e)[1];
      prefetch(pool, row_dim, plan.keys + next.key_offset, least(kAhead, next.num_keys));
    }
  }

  void pack_keys(const int32_t* slots, int n) const {
    const T* pool = static_cast<const T*>(p.k_pool) + static_cast<int64_t>(kv_head) * p.head_dim;
    const int64_t stride = static_cast<int64_t>(p.num_kv_heads) * p.head_dim;
    for (int j = 0; j < n; j += 16) {
      const T* from[16];
      for (int i = 0; i < 16; ++i)
        from[i] = pool + slots[least(j + i, n - 1)] * stride;  // lanes past the end repeat a key
      for (int d = 0; d < p.head_dim; d += 16) {
#if defined(RK_TRANSPOSES_FROM_MEMORY)
        if constexpr (sizeof(T) == sizeof(float)) {
          if (d + 16 <= p.head_dim) {
            transpose_rows(from, d, keys + d * kKeyTile + j, kKeyTile);
            continue;
          }
        }
#endif
        F16 rows[16];
        for (int i = 0; i < 16; ++i) rows[i] = load_some(from[i] + d, p.head_dim - d);
        transpose(rows);
        for (int i = 0; i < 16; ++i) store(keys + (d + i) * kKeyTile + j, rows[i]);
      }
    }
  }

  void pack_values(const int32_t* slots, int n) const {
    const T* pool = static_cast<const T*>(p.v_pool) + static_cast<int64_t>(kv_head) * p.head_dim_v;
    const int64_t stride = static_cast<int64_t>(p.num_kv_heads) * p.head_dim_v;
    for (int j = 0; j < n; ++j) {
      const T* from = pool + slots[j] * stride;
      for (int d = 0; d < p.head_dim_v; d += 16) store(values + j * dv + d, load_some(from + d, p.head_dim_v - d));
    }
  }

  void score_entry(const PlanEntry& e, const PlanEntry* end, int base) const {
    const int a = e.row_lo * group, b = e.row_hi * group;
    const Range all = seen(a, b);
    const int last = least(e.position + e.num_keys, all.hi);
    // A window skips whole tiles only: where tiles begin does not touch a key's own chain.
    int first = e.position;
    if (all.lo > first) first += (all.lo - first) / kKeyTile * kKeyTile;
    for (int at = first; at < last; at += kKeyTile) {
      const int n = least(kKeyTile, last - at);
      pack_keys(plan.keys + e.key_offset + at - e.position, n);
      prefetch_ahead(p.k_pool, p.head_dim, e, at + n - e.position, end);
      for (int i = a; i < b; i += kRows) {
        const int rows = least(kRows, b - i);
        const Range tile = seen(i, i + rows);
        const int vectors = (least(n, tile.hi - at) + 15) / 16;
        if (tile.hi <= at || tile.lo >= at + n) continue;
        for (int v = 0; v < vectors; v += kVectors) {
          kScoreTiles[rows - 1][least(kVectors, vectors - v) - 1](q + i * round_up_16(p.head_dim),
                                                                  round_up_16(p.head_dim), keys + 16 * v, p.head_dim,
                                                                  scores + i * kScoreStride + at - base + 16 * v);
        }
      }
    }
  }

  // Scores of row-head i become weights exp2(s - top); what the row does not see becomes 0. Lane j holds positions = j
  // mod 16.
  void softmax_row(int i, int base, int width, float* top_at, float* total_at) const {
    const int from = most(lo[i] - base, 0), to = least(hi[i] - base, kChunk);
    float* s = scores + i * kScoreStride;
    const F16 none = splat(-INFINITY);
    float factor = static_cast<float>(static_cast<double>(p.scale) * 1.4426950408889634);
    if (p.softcap > 0) {
      const F16 inner = splat(p.scale / p.softcap), outer = splat(p.softcap);
      for (int j = from & ~15; j < to; j += 16) store(s + j, mul(outer, tanh_16(mul(load(s + j), inner))));
      factor = kLog2e;
    }
    const int full = (from + 15) & ~15,
              end = to & ~15;  // vectors [full, end) are seen whole; at most one is cut on each side
    const auto edge = [&](int j) { return keep_lanes(load(s + j), from - j, to - j, none); };
    F16 highest[4] = {none, none, none, none};
    if (from < full && from < to) highest[1] = edge(full - 16);
    if (end < to && end >= full) highest[2] = edge(end);
    int j = full;
    for (; j + 64 <= end; j += 64) {
      for (int i = 0; i < 4; ++i) highest[i] = max(highest[i], load(s + j + 16 * i));
    }
    for (; j < end; j += 16) highest[0] = max(highest[0], load(s + j));
    const float peak = largest(max(max(highest[0], highest[1]), max(highest[2], highest[3]))) * factor;
    const F16 scale = splat(factor), shift = splat(-peak);
    F16 sums = zero();
    for (j = 0; j < least(from & ~15, width); j += 16) store(s + j, zero());
    for (; j < to; j += 16) {
      F16 w = exp2_16(fma(load(s + j), scale, shift));
      if (j < from || j + 16 > to) w = keep_lanes(w, from - j, to - j, zero());
      sums = add(sums, w);
      store(s + j, w);
    }
    for (; j < width; j += 16) store(s + j, zero());
    *top_at = from < to ? peak : -INFINITY;
    *total_at = from < to ? sum(sums) : 0.0f;
  }

  void value_entry(const PlanEntry& e, const PlanEntry* end, int base, float* into) const {
    const int a = e.row_lo * group, b = e.row_hi * group;
    const Range all = seen(a, b);
    const int last = least(e.position + e.num_keys, all.hi), first = most(e.position, all.lo);
    const bool direct =
        sizeof(T) == sizeof(float) && e.contiguous != 0 && p.head_dim_v % 16 == 0 && b - a <= kDirectRows;
    for (int at = first; at < last; at += kKeyTile) {
      const int n = least(kKeyTile, last - at);
      const int32_t* slots = plan.keys + e.key_offset + at - e.position;
      const float* from = values;
      int64_t stride = dv;
      if (direct) {
        stride = static_cast<int64_t>(p.num_kv_heads) * p.head_dim_v;
        from = static_cast<const float*>(p.v_pool) + slots[0] * stride + static_cast<int64_t>(kv_head) * p.head_dim_v;
      } else {
        pack_values(slots, n);
      }
      prefetch_ahead(p.v_pool, p.head_dim_v, e, at + n - e.position, end);
      for (int d = 0; d < dv; d += 16 * kVectors) {
        const int vectors = least(kVectors, (dv - d) / 16);
        for (int i = a; i < b; i += kRows) {
          const int rows = least(kRows, b - i);
          const Range tile = seen(i, i + rows);
          const int skip = most(0, tile.lo - at), count = least(n, tile.hi - at) - skip;
          if (count <= 0) continue;
          kValueTiles[rows - 1][vectors - 1](scores + i * kScoreStride + at + skip - base, from + skip * stride + d,
                                             stride, count, into + i * dv + d, dv);
        }
      }
    }
  }

  // One chunk's partial: accumulators, maxima (base 2, scaled) and sums of all row-heads.
  void run_chunk(int chunk, float* into, float* top_at, float* total_at) const {
    const int base = chunk * kChunk, at = plan.block_chunk[block] + chunk;
    const PlanEntry *begin = plan.entries + plan.chunk_entry[at], *end = plan.entries + plan.chunk_entry[at + 1];
    for (const PlanEntry* e = begin; e != end; ++e) score_entry(*e, end, base);
    const int width = (least(seen(0, m).hi - base, kChunk) + 15) & ~15;
    for (int i = 0; i < m; ++i) softmax_row(i, base, width, top_at + i, total_at + i);
    memset(into, 0, sizeof(float) * m * dv);
    for (const PlanEntry* e = begin; e != end; ++e) value_entry(*e, end, base, into);
  }

  // Joins a chunk's partial to the running state; an empty side leaves the other untouched.
  void join(const float* other, const float* other_top, const float* other_total) const {
    for (int i = 0; i < m; ++i) {
      if (!(other_total[i] > 0) && other_total[i] == other_total[i]) continue;
      float* into = acc + i * dv;
      if (total[i] == 0.0f) {
        memcpy(into, other + i * dv, sizeof(float) * dv);
        top[i] = other_top[i];
        total[i] = other_total[i];
        continue;
      }
      const float peak = top[i] > other_top[i] ? top[i] : other_top[i];
      const float keep = exp2_one(top[i] - peak), take = exp2_one(other_top[i] - peak);
      top[i] = peak;
      total[i] = keep * total[i] + take * other_total[i];
      const F16 scale = splat(take), old = splat(keep);
      for (int d = 0; d < dv; d += 16) store(into + d, fma(load(into + d), old, mul(load(other + i * dv + d), scale)));
    }
  }

  void write() const {
    for (int i = 0; i < m; ++i) {
      const int row = plan.row_order[row0 + i / group], head = kv_head * group + i % group;
      float weight = 1.0f, sums = total[i], peak = top[i];
      const bool empty = sums == 0.0f;
      if (p.sinks != nullptr && !empty) {
        const float sink = p.sinks[head] * kLog2e;
        peak = top[i] > sink ? top[i] : sink;
        weight = exp2_one(top[i] - peak);
        sums = weight * sums + exp2_one(sink - peak);
      }
      const F16 scale = splat(empty ? 0.0f : weight), by = splat(empty ? 1.0f : sums);
      const int64_t at = static_cast<int64_t>(row) * p.num_qo_heads + head;
      T* to = static_cast<T*>(p.out) + at * p.head_dim_v;
      for (int d = 0; d < p.head_dim_v; d += 16) {
        store_some(to + d, div(mul(load(acc + i * dv + d), scale), by), p.head_dim_v - d);
      }
      if (p.lse != nullptr) {
        p.lse[at] =
            empty ? -INFINITY : static_cast<float>(peak * 0.6931471805599453 + std::log(static_cast<double>(sums)));
      }
    }
  }
};

template <class T>
void run_typed(const AttentionParams& p, const AttentionUnit& unit, float* scratch) {
  const Worker<T> w(p, unit, scratch);
  w.find_ranges();
  w.load_queries();
  if (unit.part != nullptr) {
    float* tops = unit.part + static_cast<int64_t>(w.m) * w.dv;
    w.run_chunk(unit.chunk_begin, unit.part, tops, tops + w.m);
    return;
  }
  if (unit.chunk_begin == unit.chunk_end) {
    memset(w.acc, 0, sizeof(float) * w.m * w.dv);
    memset(w.total, 0, sizeof(float) * w.m);
  }
  const int lowest = w.seen(0, w.m).lo;
  bool started = false;
  for (int c = unit.chunk_begin; c < unit.chunk_end; ++c) {
    if ((c + 1) * kChunk <= lowest && c + 1 < unit.chunk_end) continue;
    if (started) {
      w.run_chunk(c, w.chunk_acc, w.chunk_top, w.chunk_total);
      w.join(w.chunk_acc, w.chunk_top, w.chunk_total);
    } else {
      w.run_chunk(c, w.acc, w.top, w.total);
      started = true;
    }
  }
  w.write();
}

template <class T>
void finish_typed(const AttentionParams& p, const AttentionUnit& unit, const float* parts, int64_t part_stride,
                  float* scratch) {
  const Worker<T> w(p, unit, scratch);
  memset(w.acc, 0, sizeof(float) * w.m * w.dv);
  memset(w.total, 0, sizeof(float) * w.m);
  for (int c = unit.chunk_begin; c < unit.chunk_end; ++c) {
    const float *part = parts + c * part_stride, *tops = part + static_cast<int64_t>(w.m) * w.dv;
    w.join(part, tops, tops + w.m);
  }
  w.write();
}

void run(const AttentionParams& p, const AttentionUnit& unit, float* scratch) {
  if (p.dtype == Dtype::f32)
    run_typed<float>(p, unit, scratch);
  else if (p.dtype == Dtype::bf16)
    run_typed<Bf16>(p, unit, scratch);
  else
    run_typed<Half>(p, unit, scratch);
}

void finish(const AttentionParams& p, const AttentionUnit& unit, const float* parts, int64_t part_stride,
            float* scratch) {
  if (p.dtype == Dtype::f32)
    finish_typed<float>(p, unit, parts, part_stride, scratch);
  else if (p.dtype == Dtype::bf16)
    finish_typed<Bf16>(p, unit, parts, part_stride, scratch);
  else
    finish_typed<Half>(p, unit, parts, part_stride, scratch);
}

}  // namespace

extern const AttentionKernels attention_kernels{run, finish};

}  // namespace RK_ISA
}  // namespace rainkernels
