// One call of the loss as the row kernels see it.
#pragma once
#include <cstdint>

enum Storage : int32_t { kFloat32, kFloat64, kFloat16, kBFloat16 };
constexpr int64_t kStorageSize[] = {4, 8, 2, 2};
enum Target : int32_t { kNoTarget = -2, kLabels = -1 };  // else soft labels, of that Storage

struct Options {  // as native.py packs them
  double temperature, gamma, student_ce, student_kd, teacher_ce, teacher_kd, label_smoothing;
  int64_t ignore_index;
  int32_t teacher_forward, soften_entropy, mean, none;
};

struct Logits {
  int32_t storage;
  const void* rows;   // (N, C), unit class stride
  int64_t stride;     // in elements
  void* gradient;     // (N, C) or null; may be the logits
  int64_t gradient_stride;
  const void* upstream;  // (N,) of the compute type, or null: `scale` for all
  double scale;
};

struct Call {
  Options options;
  int64_t rows, classes;
  Logits student, teacher;
  int32_t target_kind;
  const void* target;  // (N,) int64, (N, C) soft, or null
  const void* weight;  // (N,) of the compute type, or null
  double per_row;      // 1, or 1 / the weight of all counted rows
  void* stats;         // (12, N) of the compute type, or null
  double *student_loss, *teacher_loss;  // (N,), weighted, not yet divided
  bool streaming;      // gradients leave the cache: store past it, both networks alike
};

// The rows, which threads take until there are none left: each from a range of its own, whose next rows it
// fetches while it works, then from what others have left of theirs.
struct Shares {
  struct alignas(64) Range {
    int64_t next, end;
  };
  Range* ranges;  // of which there are `count`; each in shares of `size` rows
  int64_t count, size;
  int64_t arrived;  // threads
};

using RunRows = void (*)(const Call&, Shares&);
struct RowKernels {
  RunRows of[4];               // by the Storage of both
  RunRows mixed, mixed_wide;   // two storage types; where one is float64
};
