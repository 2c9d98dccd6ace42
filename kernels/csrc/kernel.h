// The C interface of the library.
#pragma once
#include "call.h"

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

// What native.py packs: Options, then these; null where there is nothing. Student before teacher.
struct Arguments {
  Options options;
  double scale_s, scale_t;
  int64_t rows, classes;
  const void* s;
  int64_t stride_s;
  const void* t;
  int64_t stride_t;
  const void *target, *weight;
  void* stats;
  void* ds;
  int64_t stride_ds;
  void* dt;
  int64_t stride_dt;
  const void *upstream_s, *upstream_t;
  void *loss_s, *loss_t;
  int32_t storage_s, storage_t, target_kind, threads, check_labels;
};

// The first row whose label is neither in [0, classes) nor ignored, or -1; nothing is written then
// where the labels are to be checked. `packed`: Arguments, unaligned.
EXPORT int64_t bdkd_run(const void* packed);

// The instruction set in use; with a name, takes that one first: null if this machine lacks it.
EXPORT const char* bdkd_instruction_set(const char* name);

// The hash of the sources that this library was built from: native.py compares it.
EXPORT const char* bdkd_sources();
