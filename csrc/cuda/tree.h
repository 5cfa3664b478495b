// CUDA lane of the `tree` family: launchers on a stream (a cudaStream_t), returning a cudaError_t. The word at `error`
// must hold kNoError; a bad item leaves the smallest error word there, and then nothing else is written to the forest.
#pragma once

#include <cstdint>

#include "rainkernels/tree.h"

namespace rainkernels {

int tree_select_cuda(const Forest& f, const SelectArgs& a, int64_t* error, void* stream);
int tree_expand_cuda(const Forest& f, const ExpandArgs& a, int64_t* error, void* stream);
int tree_add_child_cuda(const Forest& f, const AddChildArgs& a, int64_t* error, void* stream);
int tree_backup_cuda(const Forest& f, const BackupArgs& a, int64_t* error, void* stream);
int tree_best_child_cuda(const Forest& f, const BestChildArgs& a, int64_t* error, void* stream);
int tree_reroot_cuda(const Forest& f, const RerootArgs& a, int64_t* error, void* stream);
int tree_mark_cuda(const Forest& f, const MarkArgs& a, int64_t* error, void* stream);

}  // namespace rainkernels
