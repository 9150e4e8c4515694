// SPDX-License-Identifier: Apache-2.0
#include "fastest.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <iterator>
#include <mutex>
#include <vector>

namespace quip {
namespace {

constexpr int kRounds = 3, kPanelRows = 2 * kTile;
constexpr double kWorthwhile = 0.95, kAwake = 3e-4;

// Seconds that a panel of w takes with m rows of zeros, at best. It is repeated until kAwake seconds are over, because
// units that were not used lately, above all AMX, are slow at first.
double seconds(const Kernels& ops, const Weight& w, int64_t m) {
  const int64_t chunks = (w.k + kChunk8 - 1) / kChunk8;
  const std::vector<int32_t> x(ops.int8_bytes(w, m) / 4), totals(m * chunks);
  const std::vector<float> scales(m, 1.0f);
  std::vector<float> y(m * kPanelRows);
  using Clock = std::chrono::steady_clock;
  const auto since = [](Clock::time_point begin) {
    return std::chrono::duration<double>(Clock::now() - begin).count();
  };
  double best = 1e9;
  for (const Clock::time_point first = Clock::now(); since(first) < kAwake;) {
    const Clock::time_point begin = Clock::now();
    ops.int8_panel(w, 0, reinterpret_cast<const int8_t*>(x.data()), scales.data(), totals.data(), m, y.data(),
                   kPanelRows);
    best = std::min(best, since(begin));
  }
  return best;
}

// The tiers that may multiply w, the one in use first.
std::vector<const Kernels*> candidates(const Weight& w) {
  std::vector<const Kernels*> found{&kernels()};
  for (const Tier& tier : tiers()) {
    if (!tier.kernels->int8_takes) break;  // portable: what comes behind it is only for those who name it
    if (tier.kernels != found[0] && tier.runs() && tier.kernels->int8_takes(w.code, w.order, w.bits))
      found.push_back(tier.kernels);
  }
  return found;
}

const Kernels* measure(const Weight& w, int64_t m) {
  const std::vector<const Kernels*> all = candidates(w);
  std::vector<double> best(all.size(), 1e9);
  for (int round = 0; round < kRounds; ++round)
    for (size_t i = 0; i < all.size(); ++i) best[i] = std::min(best[i], seconds(*all[i], w, m));
  const size_t least = std::min_element(best.begin(), best.end()) - best.begin();
  return all[best[least] < kWorthwhile * best[0] ? least : 0];
}

}  // namespace

const Kernels& fastest(const Weight& w, int64_t m) {
  static const bool named = named_tier();
  if (w.code == Code::kE8p || named) return kernels();
  static std::atomic<const Kernels*> chosen[int(Code::kE8p)][9][3][std::size(kRowsMeasured)];
  const int rows = m <= kRowsUpTo[0] ? 0 : m <= kRowsUpTo[1] ? 1 : 2;
  std::atomic<const Kernels*>& slot = chosen[int(w.code)][w.bits][w.grid ? 1 : int(w.order)][rows];
  const Kernels* known = slot.load(std::memory_order_acquire);
  if (known) return *known;
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (!slot.load()) slot.store(measure(w, kRowsMeasured[rows]), std::memory_order_release);
  return *slot.load();
}

}  // namespace quip
