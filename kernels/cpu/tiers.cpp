// SPDX-License-Identifier: Apache-2.0
#include "tiers.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace quip {
namespace {

#if defined(__x86_64__)
#define QUIP_FEATURE(name) \
  Feature { name, bool(__builtin_cpu_supports(name)) }

std::vector<Feature> operator+(std::vector<Feature> features, const std::vector<Feature>& more) {
  features.insert(features.end(), more.begin(), more.end());
  return features;
}

// AMX in the CPU, and whether the system lets this process use the tile registers.
std::vector<Feature> amx_features() {
  unsigned a, b, c, d = 0;
  __get_cpuid_count(7, 0, &a, &b, &c, &d);
  const bool tile = d >> 24 & 1, int8 = d >> 25 & 1;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h
  const bool permitted = tile && int8 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return {{"amx-tile", tile}, {"amx-int8", int8}, {"amx-permission", permitted}};
}

std::vector<Tier> tiers_here() {
  const std::vector<Feature> avx2{QUIP_FEATURE("avx2"), QUIP_FEATURE("fma"), QUIP_FEATURE("f16c")};
  const std::vector<Feature> avx512{QUIP_FEATURE("avx512f"), QUIP_FEATURE("avx512bw"), QUIP_FEATURE("avx512vl"),
                                    QUIP_FEATURE("avx512dq")};
  const std::vector<Feature> vnni =
      avx512 + std::vector<Feature>{QUIP_FEATURE("avx512vnni"), QUIP_FEATURE("avx512vbmi"), QUIP_FEATURE("avx512vbmi2"),
                                    QUIP_FEATURE("gfni")};
  return {{amx_kernels(), vnni + amx_features()},
          {avx512_vnni_kernels(), vnni},
          {avx512_kernels(), avx512},
          {avx2_kernels(), avx2},
          {portable_kernels(), {}},
          {amx_emulated_kernels(), vnni}};
}
#else
std::vector<Tier> tiers_here() { return {{portable_kernels(), {}}}; }
#endif

const Kernels& choose() {
  const char* wanted = named_tier();
  std::string runnable;
  for (const Tier& tier : tiers()) {
    if (!tier.runs()) continue;
    if (!wanted || std::string(tier.kernels->name) == wanted) return *tier.kernels;
    runnable += std::string(runnable.empty() ? "" : ", ") + tier.kernels->name;
  }
  throw std::runtime_error("QUIP_VLLM_CPU_TIER is " + std::string(wanted) + ": this CPU runs " + runnable +
                           "; choose one of them or unset it");
}

}  // namespace

const std::vector<Tier>& tiers() {
  static const std::vector<Tier> all = tiers_here();
  return all;
}

const char* named_tier() {
  const char* name = std::getenv("QUIP_VLLM_CPU_TIER");
  return name && *name ? name : nullptr;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace quip
