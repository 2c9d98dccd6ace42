// The C interface of the library.
#pragma once
#include "call.h"

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Computes losses, statistics and gradients. `packed` points to Arguments, at any alignment.
// Returns -1. If the labels are to be checked and one is neither in [0, classes) nor ignored, writes
// nothing and returns the first such row.
EXPORT int64_t bdkd_run(const void* packed);

// Returns the instruction set in use. A name selects that instruction set first; returns null if
// this machine does not have it.
EXPORT const char* bdkd_instruction_set(const char* name);

// Returns the hash of the sources that this library was built from. native.py compares it.
EXPORT const char* bdkd_sources();
