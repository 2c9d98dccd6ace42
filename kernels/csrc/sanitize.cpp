// Calls the kernel over a grid of shapes, types and options, each buffer an allocation of exactly
// its size: for AddressSanitizer, UndefinedBehaviorSanitizer and valgrind. Prints how many calls.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "kernel.h"

namespace {

std::mt19937 rng(1);

std::vector<char> logits(int storage, size_t count, bool odd) {
  static const std::vector<float> normal = [] {
    std::vector<float> drawn(4096);
    for (float& x : drawn) x = std::normal_distribution<float>()(rng);
    return drawn;
  }();
  const size_t size = kStorageSize[storage];
  std::vector<char> bytes(count * size);
  for (size_t i = 0; i < count; ++i) {
    float x = normal[rng() % normal.size()];
    if (odd && i % 7 == 3) x = i % 2 ? -INFINITY : NAN;
    double wide = x;
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint16_t bf16 = bits >> 16, fp16 = rng() % 0x7c00 | (rng() & 0x8000);
    const void* from[] = {&x, &wide, &fp16, &bf16};
    memcpy(bytes.data() + i * size, from[storage], size);
  }
  return bytes;
}

int calls = 0;

void call(int storage_s, int storage_t, int64_t rows, int64_t classes, int target_kind, int variant) {
  const bool wide = storage_s == kFloat64 || storage_t == kFloat64;
  const size_t count = rows * classes, size = wide ? 8 : 4;
  auto s = logits(storage_s, count, variant % 3 == 2), t = logits(storage_t, count, variant % 3 == 2);
  std::vector<char> ds(s.size()), dt(t.size()), stats(12 * rows * size), weight = logits(wide, rows, false);
  const bool none = variant % 2;
  std::vector<char> loss_s(size * (none ? rows : 1)), loss_t(loss_s.size()), soft;
  std::vector<int64_t> labels(rows);
  for (auto& label : labels) label = variant == 3 ? (int64_t)rng() - (1 << 30) : rng() % classes;
  if (rows) labels[0] = -100;
  if (target_kind >= 0) soft = logits(target_kind, count, false);

  const double temperatures[] = {1, 4, 3, 8, 2};
  Arguments a{};
  a.options = {temperatures[variant % 5], 2, 1, 1, 1, 1, variant % 4 == 1 ? 0.1 : 0, -100, variant % 3 == 1,
               variant != 4, !none, none};
  a.scale_s = a.scale_t = 1;
  a.rows = rows, a.classes = classes;
  a.s = s.data(), a.t = t.data(), a.stride_s = a.stride_t = a.stride_ds = a.stride_dt = classes;
  a.target = target_kind == kLabels ? (void*)labels.data() : target_kind >= 0 ? soft.data() : nullptr;
  a.weight = variant % 2 ? weight.data() : nullptr;
  a.stats = stats.data(), a.loss_s = loss_s.data(), a.loss_t = loss_t.data();
  a.ds = variant == 5 ? nullptr : ds.data(), a.dt = variant == 6 ? nullptr : dt.data();
  if (variant == 7) a.ds = s.data(), a.dt = t.data();  // in place
  a.storage_s = storage_s, a.storage_t = storage_t, a.target_kind = target_kind;
  a.threads = 2;
  bdkd_run(&a);
  ++calls;
}

}  // namespace

int main(int, char** names) {  // instruction sets, by name; none: the best
  const char* best[] = {bdkd_instruction_set(nullptr), nullptr};
  for (auto name = *++names ? (const char**)names : best; *name; ++name) {
    if (!bdkd_instruction_set(*name)) {
      printf("%s: not on this machine\n", *name);
      continue;
    }
    calls = 0;
    for (int s = 0; s < 4; ++s)
      for (int t = 0; t < 4; ++t)
        for (int64_t classes : {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 100, 1025, 9000})
          for (int64_t rows : {0, 1, 5})
            for (int variant = 0; variant < 8; ++variant) {
              if (classes > 100 && (rows > 1 || (s != t && variant % 3))) continue;
              const int target_kinds[] = {kLabels, kNoTarget, kFloat32, kBFloat16, kFloat16, kFloat64};
              call(s, t, rows, classes, variant < 4 ? kLabels : target_kinds[(variant + s) % 6], variant);
            }
    // Enough gradients to go past the cache, which takes loops of its own.
    for (int storage = 0; storage < 4; ++storage)
      for (int64_t classes : {1001, 9001})
        for (int variant : {0, 2, 3, 4, 7})
          call(storage, storage, (4 << 20) / (2 * classes * kStorageSize[storage]) + 3, classes,
               variant == 4 ? kNoTarget : kLabels, variant);
    printf("%s: %d calls\n", *name, calls);
  }
}
