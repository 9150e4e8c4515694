// SPDX-License-Identifier: Apache-2.0
// Runs kernels on the CPU (emulator.h). A launch runs in the OS thread that asked for it, block after block. A thread
// of a block runs until it has to meet others, and goes on when all of them have come.
//
// ThreadSanitizer finds races between the threads of a launch, if the kernels are compiled with it and this file is
// not. Each thread is a fiber to it, and only sync_block and sync_warp order fibers.
#include <sys/mman.h>

#include <charconv>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string_view>
#include <utility>
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
namespace {

constexpr size_t kStackBytes = 64 * 1024, kGuardBytes = 4096;
constexpr int kCanaryBytes = 1024, kMostThreads = 1024, kMostShared = 227 * 1024;
constexpr unsigned char kPoison = 0xCB;
constexpr uint64_t kPoisoned[2] = {0xCBCBCBCBCBCBCBCB, 0xCBCBCBCBCBCBCBCB};

#if defined(__x86_64__)
struct Context {
  void* stack_pointer;
};
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
using Context = ucontext_t;
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

thread_local Launch* now = nullptr;
thread_local Memory memory;

bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || !std::strcmp(a.file_name(), b.file_name()));
}

std::string number(long long v) { return std::to_string(v); }
std::string place(const Site& s) {
  return std::string(s.file_name()) + ":" + number(s.line()) + ":" + number(s.column());
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

void abandon(Launch& l, const std::string& what) {
  fail(l, l.thread, what);
  suspend(l);
}

void enter() {
  Launch& l = *now;
  l.call(l.kernel);
  l.self().left = true;
  clear_ready(l, l.thread);
  suspend(l);
}

// The last to come does the work for all, with everyone's arguments.
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

void meet_warp(const char* call, const Site& site, void* arguments, void (*work)(void* const*), bool orders = false) {
  meet(now->meetings[size_t(now->thread / 32)], call, site, orders, arguments, work);
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

template <class Number>
struct Product {
  Number* d;
  const uint32_t* a;
  uint32_t b[2];
};

struct Halves {
  using Number = float;
  using Sum = double;
  static constexpr int kPacked = 2;
  static double a(uint32_t v, int i) { return from_half(uint16_t(v >> 16 * i)); }
  static double b(uint32_t v, int i) { return a(v, i); }
};
struct Bytes {
  using Number = int32_t;
  using Sum = uint32_t;
  static constexpr int kPacked = 4;
  static uint32_t a(uint32_t v, int i) { return uint8_t(v >> 8 * i); }
  static uint32_t b(uint32_t v, int i) { return uint32_t(int8_t(v >> 8 * i)); }
};

// Exact products, and for halves sums in double that are rounded once; a GPU's own rounding is not documented.
template <class T>
void multiply(void* const* lanes) {
  constexpr int kPacked = T::kPacked, kDepth = 8 * kPacked;
  typename T::Sum a[16][kDepth], b[8][kDepth];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& p = *static_cast<const Product<typename T::Number>*>(lanes[lane]);
    for (int i = 0; i < kPacked; ++i) {
      const int k = lane % 4 * kPacked + i;
      for (int r = 0; r < 4; ++r) a[lane / 4 + 8 * (r % 2)][k + kDepth / 2 * (r / 2)] = T::a(p.a[r], i);
      for (int r = 0; r < 2; ++r) b[lane / 4][k + kDepth / 2 * r] = T::b(p.b[r], i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& p = *static_cast<const Product<typename T::Number>*>(lanes[lane]);
    for (int r = 0; r < 4; ++r) {
      typename T::Sum sum = typename T::Sum(p.d[r]);
      for (int k = 0; k < kDepth; ++k) sum += a[lane / 4 + 8 * (r / 2)][k] * b[lane % 4 * 2 + r % 2][k];
      p.d[r] = typename T::Number(sum);
    }
  }
}

}  // namespace

dim3 thread_index() { return {unsigned(now->thread), 0, 0}; }
dim3 block_index() { return now->index; }
dim3 block_size() { return {unsigned(now->block), 1, 1}; }
dim3 grid_size() { return now->grid; }
unsigned char* shared_memory() { return now->shared; }

void stop(const char* what, Site site) {
  Launch& l = *now;
  if (l.tsan) __tsan_switch_to_fiber(l.tsan, 1);
  abandon(l, std::string(what) + ", at " + place(site));
}

void sync_block(Site site) {
  now->hidden |= now->self().hidden;
  meet(now->meetings.back(), "sync_block", site, true, nullptr, nullptr);
}

// Blocks run one after another, so nothing is written in between. To ThreadSanitizer a block comes after those before.
bool comes_last(uint32_t* counter, uint32_t count, Site site) {
  sync_block(site);
  Launch& l = *now;
  if (l.tsan) __tsan_release(counter), __tsan_acquire(counter);
  if (l.thread == 0) l.last = ++*counter == count;
  sync_block(site);
  return l.last;
}

void sync_warp(Site site) { meet_warp("sync_warp", site, nullptr, nullptr, true); }

struct Shuffle {
  uint32_t v;
  int from;
  uint32_t result;
};
static uint32_t shuffle_from(const char* call, uint32_t v, int from, const Site& site) {
  Shuffle s{v, from, 0};
  meet_warp(call, site, &s, [](void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      Shuffle& to = *static_cast<Shuffle*>(lanes[i]);
      to.result = static_cast<Shuffle*>(lanes[to.from & 31])->v;
    }
  });
  return s.result;
}
uint32_t shuffle(uint32_t v, int from, Site site) { return shuffle_from("shuffle", v, from, site); }
float shuffle_xor(float v, int mask, Site site) {
  return float_of(shuffle_from("shuffle_xor", bits_of(v), (now->thread ^ mask) & 31, site));
}

void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
  Product<float> p{d, a, {b0, b1}};
  meet_warp("multiply_add", site, &p, multiply<Halves>);
}
void multiply_add(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
  Product<int32_t> p{d, a, {b0, b1}};
  meet_warp("multiply_add", site, &p, multiply<Bytes>);
}

const void* copy_starts(void* to, const void* from, Site site) {
  Launch& l = *now;
  const uintptr_t at = reinterpret_cast<uintptr_t>(to), start = reinterpret_cast<uintptr_t>(l.shared);
  if (at % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    stop("copy_async between addresses that are not aligned to 16", site);
  if (at < start || at + 16 > start + size_t(l.shared_bytes)) stop("copy_async to a place outside shared memory", site);
  Fiber& self = l.self();
  if (l.eager) {
    self.hidden = true;
    return from;
  }
  if (l.tsan) __tsan_switch_to_fiber(l.tsan, 1);  // the vector is the scheduler's
  if (self.begun > self.copies.size() / 2) {
    self.copies.erase(self.copies.begin(), self.copies.begin() + std::ptrdiff_t(self.begun));
    self.begun = 0;
  }
  self.copies.push_back({to, from, self.groups});
  if (l.tsan) __tsan_switch_to_fiber(self.tsan, 1);
  return kPoisoned;
}

bool copy_ends(int pending, void** to, const void** from) {
  Fiber& self = now->self();
  if (self.begun == self.copies.size() || self.copies[self.begun].group >= self.groups - pending) return false;
  *to = self.copies[self.begun].to;
  *from = self.copies[self.begun].from;
  ++self.begun;
  self.hidden = true;
  return true;
}

void copy_commit() { ++now->self().groups; }

void show_copies() { now->self().hidden = false; }

uint64_t describe(const void* b, int leading, int stride, Site site) {
  const std::ptrdiff_t at = static_cast<const unsigned char*>(b) - now->shared;
  if (at < 0 || at >= now->shared_bytes || (at | leading | stride) % 16)
    stop("describe of what is not in shared memory or not aligned to 16", site);
  return matrix_of(uint32_t(at), leading, stride);
}

void products_begin() { now->self().begun_products = true; }
void products_commit() {
  ++now->self().product_groups;
  now->self().begun_products = false;
}

// The 16 rows of a warp, by all columns of b. Sums as for multiply_add.
static void multiply_async(void* const* lanes) {
  const auto product = [&](int lane) -> const AsyncProduct& { return *static_cast<const AsyncProduct*>(lanes[lane]); };
  const auto field = [b = product(0).b](int shift) { return int(b >> shift & 0x3FFF) << 4; };
  double a[16][16];
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i)
      a[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i % 2 + i / 4 * 8] = Halves::a(product(lane).a[i / 2], i % 2);
  }
  for (int column = 0; column < product(0).rows; ++column) {
    double b[16];
    for (int k = 0; k < 16; ++k) {
      uint16_t half;
      std::memcpy(&half,
                  now->shared + field(0) + k / 8 * field(16) + column / 8 * field(32) + column % 8 * 16 + k % 8 * 2, 2);
      b[k] = from_half(half);
    }
    for (int row = 0; row < 16; ++row) {
      float& d = product(row % 8 * 4 + column % 8 / 2).d[column / 8 * 4 + row / 8 * 2 + column % 2];
      double sum = d;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k];
      d = float(sum);
    }
  }
}

void start_product(float* d, const uint32_t* a, uint64_t b, int rows, Site site) {
  Launch& l = *now;
  Fiber& self = l.self();
  const auto field = [b](int shift) { return int(b >> shift & 0x3FFF) << 4; };
  if (l.block % 128) stop("multiply_add_async in a block that is not whole warpgroups", site);
  if (!self.begun_products) stop("multiply_add_async without products_begin since the last products_commit", site);
  if (l.hidden) stop("multiply_add_async behind a barrier that a thread reached without show_copies", site);
  if (field(0) + field(16) + (rows / 8 - 1) * field(32) + 128 > l.shared_bytes)
    stop("multiply_add_async of what is outside shared memory", site);
  AsyncProduct product{d, a, b, rows, self.product_groups};
  meet_warp("multiply_add_async", site, &product, l.eager ? multiply_async : nullptr);
  if (!l.eager) self.products.push_back(product);
}

// All lanes have started the same, in one order.
void wait_for_products(int pending, Site site) {
  Fiber& self = now->self();
  size_t done = 0;
  for (; done < self.products.size() && self.products[done].group < self.product_groups - pending; ++done)
    meet_warp("products_wait", site, &self.products[done], multiply_async);
  self.products.erase(self.products.begin(), self.products.begin() + std::ptrdiff_t(done));
}

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
