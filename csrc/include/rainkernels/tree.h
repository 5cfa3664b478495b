// The forest of search trees: memory layout, arguments and error codes of the `tree` family (batched PUCT for RAIN).
//
// Every expansion owns one row of `children` slots: slot = row * children + k. Row 0 is never handed out, its slot 0 is
// the first root, so slot ids survive both re-rooting and growing. One tree is one contiguous slab of each field.
#pragma once

#include <cstdint>

#include "rainkernels/common.h"

#ifndef RK_ISA
#define RK_ISA common
#endif

namespace rainkernels {

constexpr int32_t kNone = -1;       // no row, no slot, no embedding; also the result of an expansion that did not fit
constexpr int32_t kPinnedRow = -2;  // owner of a row that only holds the current root: its other slots are gone
constexpr int32_t kMaxChildren = 32;
constexpr int32_t kBlock = 64;  // dims between two checkpoints of a dot product

enum SelectStatus : int32_t { kLeaf = 0, kNeedChild = 1 };

enum class TreeError : int32_t {
  none = 0,
  tree_id,
  node,
  expanded,
  not_expanded,
  child_count,
  prior,
  set_length,
  depth,
  path,
  value,
  embedding_rows,
  embedding,
  skip_node,
  duplicate,
  in_flight,
  is_root,
  mark,
};

// An error word is item * kErrorStride + code; the smallest wins, so it does not depend on the thread that found it.
constexpr int64_t kErrorStride = 64;
constexpr int64_t kNoError = INT64_MAX;

enum Header : int32_t { kRoot = 0, kNumFreeRows = 1, kNumFreeEmbeddings = 2, kInFlight = 3, kHeaderSize = 4 };

struct TreeDims {
  int32_t num_trees;
  int32_t rows;        // including row 0
  int32_t children;    // slots per row
  int32_t embeddings;  // pool size
  int32_t dim;         // floats per embedding
  int32_t blocks;      // ceil(dim / kBlock)
  int32_t max_depth;   // slots on the longest path
};

struct TreeParams {
  double c_puct;
  double similarity_weight;
  double similarity_threshold;
  double root_prior_mix;
  double dynamic_variance;
  double dynamic_value;
  bool dynamic_children;
  bool similarity;
};

// Field order is that of FIELDS in rainkernels/ops/tree.py.
enum TreeField : int32_t {
  kVisits,          // Real  [B, slots]   n: direct visits plus similarity credit
  kValues,          // Real  [B, slots]   q
  kPriors,          // Real  [B, slots]   p
  kDirectVisits,    // int32 [B, slots]   fn
  kInFlightCount,   // int32 [B, slots]   O of WU-UCT
  kChildRow,        // int32 [B, slots]   row with the children, kNone = leaf
  kEmbeddingOf,     // int32 [B, slots]   pool index, kNone = none
  kOwner,           // int32 [B, rows]    slot expanded by the row, kNone = free, kPinnedRow
  kCount,           // int32 [B, rows]    children in the row
  kSetLength,       // int32 [B, rows]    tokens of the first child
  kFreeRows,        // int32 [B, rows-1]  stack; the part above the top is scratch of reroot
  kFreeEmbeddings,  // int32 [B, embeddings] stack
  kBounds,          // Real  [B, 2]       least and greatest value seen, starting at -1 and 1
  kHeader,          // int32 [B, kHeaderSize]
  kMeans,           // float [B, embeddings, dim]
  kTails,           // float [B, embeddings, blocks]  norm of dims [64 c, dim): entry 0 is the whole norm
  kNumFields
};

struct Forest {
  void* field[kNumFields];
  TreeDims dims;
  TreeParams params;
  bool is_double;
};

template <class Real>
struct Tree {
  Real *visits, *values, *priors;
  int32_t *direct_visits, *in_flight, *child_row, *embedding_of;
  int32_t *owner, *count, *set_length, *free_rows, *free_embeddings;
  Real* bounds;
  int32_t* header;
  float *means, *tails;
};

// Arguments of the ops; n items each, item i works on tree tree_ids[i].
struct SelectArgs {
  const int32_t* tree_ids;
  int64_t n;
  const int32_t* skip_node;  // null: nothing to skip
  int32_t *status, *node, *path, *depth;
};

struct ExpandArgs {
  const int32_t* tree_ids;
  int64_t n;
  const int32_t* nodes;
  const void* priors;  // Real [n, width]
  int64_t width;
  const int32_t *num_children, *set_length;
  int32_t* first_slot;
};

struct AddChildArgs {
  const int32_t* tree_ids;
  int64_t n;
  const int32_t* nodes;
  const void* prior;  // Real [n]
  bool mix;
  int32_t* slot;
};

struct BackupArgs {
  const int32_t* tree_ids;
  int64_t n;
  const int32_t *path, *depth;
  const void* value;       // Real [n]
  const float* embedding;  // null or [n, embedding_rows, dim]
  int64_t embedding_rows;
  int32_t* dropped;  // [n] path nodes left without an embedding because the pool was empty
};

struct BestChildArgs {
  const int32_t* tree_ids;
  int64_t n;
  int32_t* slot;
  void* visits;  // Real [n]
  int32_t* direct_visits;
  void* value;  // Real [n]
};

struct RerootArgs {
  const int32_t* tree_ids;
  int64_t n;
  const int32_t* slots;
  uint8_t* freed;  // [n, slots], zeroed by the caller
};

struct MarkArgs {
  const int32_t* tree_ids;
  int64_t n;
  const int32_t *path, *depth;
  int32_t delta;  // +1 or -1
};

template <class Real>
RK_HOST_DEVICE static inline Tree<Real> tree_at(const Forest& f, int64_t b) {
  const TreeDims& d = f.dims;
  const int64_t slots = static_cast<int64_t>(d.rows) * d.children;
  const auto real = [&](int field, int64_t size) { return static_cast<Real*>(f.field[field]) + b * size; };
  const auto ints = [&](int field, int64_t size) { return static_cast<int32_t*>(f.field[field]) + b * size; };
  const auto floats = [&](int field, int64_t size) { return static_cast<float*>(f.field[field]) + b * size; };
  Tree<Real> t;
  t.visits = real(kVisits, slots);
  t.values = real(kValues, slots);
  t.priors = real(kPriors, slots);
  t.direct_visits = ints(kDirectVisits, slots);
  t.in_flight = ints(kInFlightCount, slots);
  t.child_row = ints(kChildRow, slots);
  t.embedding_of = ints(kEmbeddingOf, slots);
  t.owner = ints(kOwner, d.rows);
  t.count = ints(kCount, d.rows);
  t.set_length = ints(kSetLength, d.rows);
  t.free_rows = ints(kFreeRows, d.rows - 1);
  t.free_embeddings = ints(kFreeEmbeddings, d.embeddings);
  t.bounds = real(kBounds, 2);
  t.header = ints(kHeader, kHeaderSize);
  t.means = floats(kMeans, static_cast<int64_t>(d.embeddings) * d.dim);
  t.tails = floats(kTails, static_cast<int64_t>(d.embeddings) * d.blocks);
  return t;
}

}  // namespace rainkernels
