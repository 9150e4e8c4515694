// SPDX-License-Identifier: Apache-2.0
// What the scheduler and the instructions of the emulator share: the threads of a launch, and where they wait.
#pragma once
#include <cstddef>
#include <string>
#include <vector>

#include "emulator.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

extern "C" {  // null without the sanitizer
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned);
__attribute__((weak)) void __tsan_destroy_fiber(void*);
__attribute__((weak)) void __tsan_switch_to_fiber(void*, unsigned);
__attribute__((weak)) void __tsan_acquire(void*);
__attribute__((weak)) void __tsan_release(void*);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void*, size_t);
}

namespace quip {
namespace device {

#if defined(__x86_64__)
struct Context {
  void* stack_pointer;
};
#else
using Context = ucontext_t;
#endif

// Threads that wait for one another: a warp's, or a block's.
struct Meeting {
  int first = 0, size = 0;  // its threads
  bool of_warp = false;
  int arrived = 0, earliest = 0;
  unsigned phase = 0;
  char tokens[2] = {};  // for ThreadSanitizer, in turn: who is slow to leave must not meet those who are back already
  void* arguments[32] = {};
};

struct Copy {
  void* to;
  const void* from;
  int group;
};

struct AsyncProduct {
  float* d;
  const uint32_t* a;
  uint64_t b;
  int rows, group;
};

struct Fiber {
  Context context;
  void* tsan = nullptr;
  const Meeting* waits = nullptr;  // where it waits, in which call
  const char* call = nullptr;
  Site site;
  bool left = false;
  std::vector<Copy> copies;  // under way, from `begun` on
  size_t begun = 0;
  int groups = 0;
  bool hidden = false;                 // whether it copied since show_copies
  std::vector<AsyncProduct> products;  // under way
  int product_groups = 0;
  bool begun_products = false;
};

enum class Order { kRoundRobin, kDepthFirst, kReverse, kRandom };

struct Launch {
  const char* name;
  dim3 grid;
  int block, shared_bytes;
  void (*call)(const void*);
  const void* kernel;

  bool eager = false;
  Order order = Order::kRoundRobin;
  uint64_t random = 0;

  dim3 index = {};
  int thread = 0;
  unsigned char* shared = nullptr;
  std::vector<Fiber> fibers = {};
  std::vector<Meeting> meetings = {};  // a warp's each, then the block's
  std::vector<uint64_t> ready = {};    // a bit each, in the order of slot()
  Context context = {};
  void* tsan = nullptr;
  std::vector<void*> tsan_ended = {};
  bool last = false;    // of comes_last
  bool hidden = false;  // whether a thread came to a barrier with copies that asynchronous products do not see
  std::string error = {};

  Fiber& self() { return fibers[size_t(thread)]; }
  int slot(int t) const { return order == Order::kReverse ? block - 1 - t : t; }
};

extern constinit thread_local Launch* now;

inline std::string number(long long v) { return std::to_string(v); }
inline std::string place(const Site& s) {
  return std::string(s.file_name()) + ":" + number(s.line()) + ":" + number(s.column());
}

// Ends the launch with this sentence. It does not return.
void abandon(Launch& l, const std::string& what);

// Waits for the other threads. The last to come does the work for all, with everyone's arguments.
void meet(Meeting& m, const char* call, const Site& site, bool orders, void* arguments, void (*work)(void* const*));
inline void meet_warp(const char* call, const Site& site, void* arguments, void (*work)(void* const*),
                      bool orders = false) {
  meet(now->meetings[size_t(now->thread / 32)], call, site, orders, arguments, work);
}

}  // namespace device
}  // namespace quip
