// Calls the kernel with a grid of shapes, types and options, for AddressSanitizer,
// UndefinedBehaviorSanitizer and valgrind. Each buffer is a separate allocation of exactly the needed
// size. Prints the number of calls.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "kernel.h"

namespace {

std::mt19937 rng(1);

std::vector<char> logits(Storage storage, size_t count, bool odd) {
  static const std::vector<float> normal = [] {
    std::vector<float> drawn(4096);
    for (float& x : drawn) x = std::normal_distribution<float>()(rng);
    return drawn;
  }();
  const size_t size = kStorageBytes[storage];
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

Network network(Storage storage, std::vector<char>& logits, std::vector<char>* gradient, std::vector<char>& loss,
                int64_t classes) {
  return {storage, logits.data(), classes, gradient ? gradient->data() : nullptr, classes, nullptr, 1, loss.data()};
}

void call(Storage storage_s, Storage storage_t, int64_t rows, int64_t classes, TargetKind target_kind,
          Storage target_storage, int variant) {
  const bool is_float64 = storage_s == kFloat64 || storage_t == kFloat64;
  const size_t count = rows * classes, size = is_float64 ? 8 : 4;
  auto s = logits(storage_s, count, variant % 3 == 2), t = logits(storage_t, count, variant % 3 == 2);
  std::vector<char> ds(s.size()), dt(t.size()), statistics(kStatistics * rows * size);
  std::vector<char> weight = logits(is_float64 ? kFloat64 : kFloat32, rows, false);
  const bool none = variant % 2;
  std::vector<char> loss_s(size * (none ? rows : 1)), loss_t(loss_s.size()), probabilities;
  std::vector<int64_t> labels(rows);
  for (auto& label : labels) label = variant == 3 ? (int64_t)rng() - (1 << 30) : rng() % classes;
  if (rows) labels[0] = -100;
  if (target_kind == kProbabilities) probabilities = logits(target_storage, count, false);

  const double temperatures[] = {1, 4, 3, 8, 2};
  Arguments a{};
  a.options.temperature = temperatures[variant % 5], a.options.gamma = 2;
  a.options.student_ce = a.options.student_kd = a.options.teacher_ce = a.options.teacher_kd = 1;
  a.options.label_smoothing = variant % 4 == 1 ? 0.1 : 0, a.options.ignore_index = -100;
  a.options.teacher_divergence = variant % 3 == 1 ? kTeacherDivergenceForward : kTeacherDivergenceReverse;
  a.options.soften_entropy = variant != 4, a.options.reduction = none ? kReductionNone : kReductionMean;
  const bool in_place = variant == 7;
  a.student = network(storage_s, s, in_place ? &s : variant == 5 ? nullptr : &ds, loss_s, classes);
  a.teacher = network(storage_t, t, in_place ? &t : variant == 6 ? nullptr : &dt, loss_t, classes);
  a.rows = rows, a.classes = classes, a.target_kind = target_kind, a.target_storage = target_storage;
  if (target_kind == kLabels) a.target = labels.data();
  if (target_kind == kProbabilities) a.target = probabilities.data();
  a.weight = variant % 2 ? weight.data() : nullptr;
  a.statistics = statistics.data(), a.threads = 2;
  bdkd_run(&a);
  ++calls;
}

void call_all() {
  const Storage storages[] = {kFloat32, kFloat64, kFloat16, kBfloat16};
  const struct { TargetKind kind; Storage storage; } targets[] = {
      {kLabels, {}}, {kNoTarget, {}}, {kProbabilities, kFloat32}, {kProbabilities, kBfloat16},
      {kProbabilities, kFloat16}, {kProbabilities, kFloat64}};
  for (Storage s : storages)
    for (Storage t : storages)
      for (int64_t classes : {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 100, 1025, 9000})
        for (int64_t rows : {0, 1, 5})
          for (int variant = 0; variant < 8; ++variant) {
            if (classes > 100 && (rows > 1 || (s != t && variant % 3))) continue;
            const auto& target = targets[variant < 4 ? 0 : (variant + s) % 6];
            call(s, t, rows, classes, target.kind, target.storage, variant);
          }
  // Gradients that are large enough for non-temporal stores, which use other loops.
  for (Storage storage : storages)
    for (int64_t classes : {1001, 9001})
      for (int variant : {0, 2, 3, 4, 7})
        call(storage, storage, (4 << 20) / (2 * classes * kStorageBytes[storage]) + 3, classes,
             variant == 4 ? kNoTarget : kLabels, {}, variant);
}

}  // namespace

int main(int, char** names) {  // names of instruction sets; none: the fastest
  const char* fastest[] = {bdkd_instruction_set(nullptr), nullptr};
  for (auto name = *++names ? (const char**)names : fastest; *name; ++name) {
    if (!bdkd_instruction_set(*name)) {
      printf("%s: not supported by this machine\n", *name);
      continue;
    }
    calls = 0;
    call_all();
    printf("%s: %d calls\n", *name, calls);
  }
}
