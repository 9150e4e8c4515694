// SPDX-License-Identifier: Apache-2.0
// Runs kernels on the CPU (emulator.h). A launch runs in the OS thread that asked for it, block after block. A thread
// of a block runs until it has to meet others, and goes on when all of them have come.
//
// ThreadSanitizer finds races between the threads of a launch, if the kernels are compiled with it and the emulator
// is not. Each thread is a fiber to it, and only sync_block and sync_warp order fibers.
#include <sys/mman.h>

#include <charconv>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string_view>
#include <utility>

#include "runtime.h"

namespace quip {
namespace device {

constinit thread_local Launch* now = nullptr;

namespace {

constexpr size_t kStackBytes = 64 * 1024, kGuardBytes = 4096;
constexpr int kCanaryBytes = 1024, kMostThreads = 1024, kMostShared = 227 * 1024;
constexpr unsigned char kPoison = 0xCB;

#if defined(__x86_64__)
extern "C" void quip_switch(void** from, void* to);
asm(R"(
.text
.type quip_switch, @function
quip_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size quip_switch, .-quip_switch
)");
void prepare(Context& c, char* stack, size_t bytes, void (*entry)()) {
  void** const top = reinterpret_cast<void**>(stack + bytes);
  std::memset(top - 8, 0, 8 * sizeof(void*));
  top[-2] = reinterpret_cast<void*>(entry);  // entry finds a zero where a return address would be
  c.stack_pointer = top - 8;
}
void switch_stacks(Context& from, Context& to) { quip_switch(&from.stack_pointer, to.stack_pointer); }
#else
void prepare(Context& c, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&c);
  c.uc_stack.ss_sp = stack;
  c.uc_stack.ss_size = bytes;
  makecontext(&c, entry, 0);
}
void switch_stacks(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

// Stacks and shared memory of an OS thread, kept between launches. Not from malloc, so that ThreadSanitizer does not
// take giving it back for an access.
struct Memory {
  std::vector<char*> stacks;
  char* shared = nullptr;

  static char* map(size_t bytes) {  // with a page before it that faults
    void* const p = mmap(nullptr, kGuardBytes + bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    mprotect(p, kGuardBytes, PROT_NONE);
    return static_cast<char*>(p) + kGuardBytes;
  }
  static void unmap(char* p, size_t bytes) {
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(p, bytes);
    munmap(p - kGuardBytes, kGuardBytes + bytes);
  }
  void need(size_t threads) {
    if (!shared) shared = map(kMostShared + kCanaryBytes);
    while (stacks.size() < threads) stacks.push_back(map(kStackBytes));
  }
  void drop() {
    for (char* const stack : stacks) unmap(stack, kStackBytes);
    stacks.clear();
    if (shared) unmap(shared, kMostShared + kCanaryBytes);
    shared = nullptr;
  }
  ~Memory() { drop(); }
};

thread_local Memory memory;

bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || !std::strcmp(a.file_name(), b.file_name()));
}

std::string call_of(const Fiber& f) { return std::string(f.call) + " at " + place(f.site); }

void fail(Launch& l, int thread, const std::string& what) {
  l.error = std::string("kernel ") + l.name + ", block (" + number(l.index.x) + ", " + number(l.index.y) + ", " +
            number(l.index.z) + ")" + (thread < 0 ? "" : ", thread " + number(thread)) + ": " + what;
}

std::string read_settings(Launch& l) {
  const char* const text = std::getenv("QUIP_VLLM_EMULATOR");
  std::string_view rest = text ? text : "";
  while (!rest.empty()) {
    const std::string_view word = rest.substr(0, rest.find(','));
    rest.remove_prefix(std::min(rest.size(), word.size() + 1));
    const char* const end = word.data() + word.size();
    bool known = true;
    if (word == "deferred" || word == "eager") {
      l.eager = word == "eager";
    } else if (word == "roundrobin") {
      l.order = Order::kRoundRobin;
    } else if (word == "depthfirst") {
      l.order = Order::kDepthFirst;
    } else if (word == "reverse") {
      l.order = Order::kReverse;
    } else if (word.starts_with("random:")) {
      l.order = Order::kRandom;
      const auto [last, error] = std::from_chars(word.data() + 7, end, l.random);
      known = last == end && error == std::errc();
    } else {
      known = false;
    }
    if (!known) {
      return "QUIP_VLLM_EMULATOR: unknown word \"" + std::string(word) +
             "\"; it takes deferred, eager, roundrobin, depthfirst, reverse, random:SEED";
    }
  }
  return {};
}

void set_ready(Launch& l, int t) { l.ready[size_t(l.slot(t) / 64)] |= uint64_t(1) << l.slot(t) % 64; }
void clear_ready(Launch& l, int t) { l.ready[size_t(l.slot(t) / 64)] &= ~(uint64_t(1) << l.slot(t) % 64); }

int first_ready(const Launch& l, int from) {
  for (size_t w = size_t(from / 64); w < l.ready.size(); ++w) {
    const uint64_t bits = w == size_t(from / 64) ? l.ready[w] & ~uint64_t(0) << from % 64 : l.ready[w];
    if (bits) return l.slot(int(w) * 64 + std::countr_zero(bits));
  }
  return from ? first_ready(l, 0) : -1;
}

int next_thread(Launch& l) {
  int from = 0;
  if (l.order == Order::kRoundRobin) from = (l.thread + 1) % l.block;
  if (l.order == Order::kRandom) {
    l.random = l.random * 6364136223846793005u + 1442695040888963407u;
    from = int((l.random >> 33) % unsigned(l.block));
  }
  return first_ready(l, from);
}

// Back to the scheduler, until it comes to this thread again.
void suspend(Launch& l) {
  if (l.tsan) __tsan_switch_to_fiber(l.tsan, 1);
  switch_stacks(l.self().context, l.context);
}

}  // namespace

void abandon(Launch& l, const std::string& what) {
  fail(l, l.thread, what);
  suspend(l);
}

void meet(Meeting& m, const char* call, const Site& site, bool orders, void* arguments, void (*work)(void* const*)) {
  Launch& l = *now;
  Fiber& self = l.self();
  self.call = call;
  self.site = site;
  if (m.arrived == 0) m.earliest = l.thread;
  const Fiber& other = l.fibers[size_t(m.earliest)];
  if (other.call != call || !same(other.site, site)) {
    if (l.tsan) __tsan_switch_to_fiber(l.tsan, 1);  // the string is the scheduler's
    abandon(l, "reaches " + call_of(self) + ", while thread " + number(m.earliest) + " of its " +
                   (m.of_warp ? "warp" : "block") + " waits in " + call_of(other));
  }
  void* const token = &m.tokens[m.phase % 2];
  if (orders && l.tsan) __tsan_release(token);
  if (m.of_warp) m.arguments[l.thread % 32] = arguments;
  self.waits = &m;
  clear_ready(l, l.thread);
  if (++m.arrived == m.size) {
    if (work) work(m.arguments);
    m.arrived = 0;
    ++m.phase;
    for (int t = m.first; t < m.first + m.size; ++t) {
      l.fibers[size_t(t)].waits = nullptr;
      set_ready(l, t);
    }
  }
  suspend(l);
  if (orders && l.tsan) __tsan_acquire(token);
}

namespace {

void enter() {
  Launch& l = *now;
  l.call(l.kernel);
  l.self().left = true;
  clear_ready(l, l.thread);
  suspend(l);
}

// Nobody can go on: who waits for whom? A warp's meeting that never ends holds up a block's, not the other way round.
void report_stall(Launch& l) {
  for (const bool of_warp : {true, false}) {
    for (int t = 0; t < l.block; ++t) {
      const Fiber& f = l.fibers[size_t(t)];
      if (!f.waits || f.waits->of_warp != of_warp) continue;
      int u = f.waits->first;
      while (u < l.block && l.fibers[size_t(u)].waits == f.waits) ++u;
      const std::string why = u >= l.block               ? " does not exist"
                              : l.fibers[size_t(u)].left ? " has left the kernel"
                                                         : " waits in " + call_of(l.fibers[size_t(u)]);
      return fail(l, t,
                  "deadlock: it waits for its " + std::string(of_warp ? "warp" : "block") + " in " + call_of(f) +
                      ", but thread " + number(u) + why);
    }
  }
}

// What the threads did comes before the end of the launch, not before the next block. They are ended one block later,
// because ThreadSanitizer takes a new thread with the number of one that ended for the same thread.
void end_tsan_fibers(Launch& l) {
  for (void* const fiber : l.tsan_ended) __tsan_destroy_fiber(fiber);
  l.tsan_ended.clear();
  for (Fiber& f : l.fibers) {
    if (!f.tsan) continue;
    __tsan_switch_to_fiber(f.tsan, 1);
    __tsan_release(&l);
    __tsan_switch_to_fiber(l.tsan, 1);
    l.tsan_ended.push_back(std::exchange(f.tsan, nullptr));
  }
}

void run_block(Launch& l) {
  memory.need(size_t(l.block));
  l.shared = reinterpret_cast<unsigned char*>(memory.shared);
  std::memset(l.shared, kPoison, size_t(l.shared_bytes + kCanaryBytes));
  l.meetings = std::vector<Meeting>();  // new memory: an old token would order this block after the last
  for (int t = 0; t < l.block; t += 32) l.meetings.push_back({t, 32, true});
  l.meetings.push_back({0, l.block, false});
  l.hidden = false;
  l.ready.assign(size_t(l.block + 63) / 64, 0);
  for (int t = 0; t < l.block; ++t) {
    Fiber& f = l.fibers[size_t(t)];
    f.copies.clear();
    f.begun = 0;
    f.groups = 0;
    f.hidden = f.begun_products = false;
    f.products.clear();
    f.product_groups = 0;
    f.waits = nullptr;
    f.left = false;
    // Tops at different places of a page, or all of them would share a few lines of the cache.
    prepare(f.context, memory.stacks[size_t(t)], kStackBytes - size_t(t % 32) * 128, enter);
    if (l.tsan) f.tsan = __tsan_create_fiber(0);
    set_ready(l, t);
  }
  l.thread = l.block - 1;
  for (int t; l.error.empty() && (t = next_thread(l)) >= 0;) {
    l.thread = t;
    if (l.tsan) __tsan_switch_to_fiber(l.self().tsan, 1);
    switch_stacks(l.context, l.self().context);
  }
  if (l.error.empty()) report_stall(l);
  for (int i = kCanaryBytes - 1; i >= 0 && l.error.empty(); --i) {
    if (l.shared[l.shared_bytes + i] == kPoison) continue;
    fail(l, -1,
         "wrote past its " + number(l.shared_bytes) + " bytes of shared memory, to byte " + number(l.shared_bytes + i));
  }
  end_tsan_fibers(l);
  // To ThreadSanitizer, memory used again is a race; to ASan, the stack of a thread that never ended is poisoned.
  if (l.tsan || !l.error.empty()) memory.drop();
}

}  // namespace

std::string run(const char* name, dim3 grid, int block, int shared_bytes, void (*call)(const void*),
                const void* kernel) {
  Launch l{name, grid, block, shared_bytes, call, kernel};
  if (block < 1 || block > kMostThreads || shared_bytes < 0 || shared_bytes > kMostShared || !grid.x || !grid.y ||
      !grid.z || grid.y > 65535 || grid.z > 65535) {
    return std::string("kernel ") + name + ": no GPU can start this grid, block or size of shared memory";
  }
  if (std::string error = read_settings(l); !error.empty()) return error;
  if (__tsan_get_current_fiber) l.tsan = __tsan_get_current_fiber();
  l.fibers.resize(size_t(block));
  now = &l;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks && l.error.empty(); ++i) {
    const uint64_t block = l.order == Order::kReverse ? blocks - 1 - i : i;
    l.index = {unsigned(block % grid.x), unsigned(block / grid.x % grid.y), unsigned(block / grid.x / grid.y)};
    run_block(l);
  }
  now = nullptr;
  end_tsan_fibers(l);
  if (l.tsan) __tsan_acquire(&l);
  return l.error;
}

}  // namespace device
}  // namespace quip
