// The arguments of one call for the row kernels, and the queue that distributes its rows to threads.
#pragma once
#include "arguments.h"  // generated from native_call.py, with options.h from options.py

// A value for each network.
template <class T>
struct Pair {
  T student, teacher;
};

struct Call : Arguments {
  double row_scale;        // 1, or 1 / the weight of all counted rows if the reduction is the mean
  Pair<double*> row_loss;  // (N,) each, weighted, not yet reduced; or null
  bool nontemporal;        // store the gradients past the caches
};

// Each thread takes blocks of rows from its own range, then from the ranges of slower threads.
struct WorkQueue {
  struct alignas(64) Range {  // one cache line, so that threads do not share cache lines
    int64_t next, end;
  };
  Range* ranges;  // (range_count,)
  int64_t range_count;
  int64_t block_rows;
  int64_t threads_started;
};

using RowKernel = void (*)(const Call&, WorkQueue&);

// The kernels of one instruction set.
struct RowKernels {
  RowKernel by_storage[4];         // both networks have this Storage
  RowKernel mixed, mixed_float64;  // the networks have different types; one of the types is float64
};
