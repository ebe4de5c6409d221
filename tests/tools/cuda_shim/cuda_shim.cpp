// The scheduler of the shim, and the C functions by which the tests steer and question it.
#include "cuda_shim.h"

#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <unordered_set>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SHIM_ASAN 1
#else
#define SHIM_ASAN 0
#endif

// ---- switching stacks

#if defined(__x86_64__)
extern "C" void cuda_shim_switch(void** save, void* load);
asm(R"(
.text
.globl cuda_shim_switch
.hidden cuda_shim_switch
.type cuda_shim_switch,@function
cuda_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_shim_switch,.-cuda_shim_switch
)");
struct Context {
  void* stack_pointer = nullptr;
  void prepare(char* stack, size_t size, void (*entry)()) {
    void** top =
        reinterpret_cast<void**>(stack + size - 64);  // 16-byte aligned after the return address is popped
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer = top;
  }
  static void swap(Context& from, Context& to) { cuda_shim_switch(&from.stack_pointer, to.stack_pointer); }
};
#else
#include <ucontext.h>  // portable, but a system call at every switch
struct Context {
  ucontext_t context;
  void prepare(char* stack, size_t size, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void swap(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

namespace cuda_shim {
namespace {

constexpr size_t kStackBytes = SHIM_ASAN ? 256 << 10 : 64 << 10;

[[noreturn]] void fail(const std::string& message) { throw std::runtime_error("cuda_shim: " + message); }

struct Fiber {
  Context context;
  char* stack = nullptr;
  void* fake_stack = nullptr;      // ASan's
  unsigned block = 0, thread = 0;  // of the cluster, of the block
  bool done = false, blocked = false;
  std::string waits_for;
  uint32_t inbox[32] = {};
};

// One collective of a warp that not all of its lanes have reached.
struct Rendezvous {
  uint32_t mask = 0, arrived = 0;
  const char* what = nullptr;
  uint32_t words[32] = {};
};

// `rows` runs of `row_bytes`, `stride_bytes` apart.
struct Region {
  uintptr_t base;
  int64_t rows, row_bytes, stride_bytes;
  int64_t loaded = 0, narrow_loads = 0;

  // Offset of an access in the runs laid end to end, or -1.
  int64_t find(uintptr_t p, size_t bytes) const {
    if (p < base) return -1;
    const int64_t offset = static_cast<int64_t>(p - base);
    const int64_t row = stride_bytes == 0 ? 0 : std::min(offset / stride_bytes, rows - 1);
    const int64_t column = offset - row * stride_bytes;
    return column + static_cast<int64_t>(bytes) <= row_bytes ? row * row_bytes + column : -1;
  }
};

struct Store {
  uintptr_t address;
  uint32_t bytes;
};

// One of the blocks that run at the same time: a cluster's, or a single one.
struct Block {
  uint3 index = {};
  int live = 0, at_barrier = 0;
  std::vector<Rendezvous> warps;
  std::map<const void*, std::unique_ptr<char, void (*)(void*)>> shared;
  std::map<const void*, size_t> shared_sizes;
  int64_t shared_bytes = 0;
};

struct Machine {
  Where where;
  int order = 0;  // 0 forwards, 1 backwards, else the seed of a shuffle in every round
  std::mt19937 random;
  std::vector<Fiber> fibers;  // block by block
  std::vector<Block> blocks;
  Fiber* current = nullptr;
  Context scheduler;
  int live = 0;  // of all blocks
  size_t at_cluster_barrier = 0;
  bool clusters = true;  // whether there is such a GPU
  int64_t most_shared_bytes = 0, launches = 0;
  const std::function<void()>* body = nullptr;
  std::exception_ptr error;
  bool traced = false;
  std::vector<Region> readable;  // while traced, the only bytes that may be loaded
  std::vector<Store> stores;     // while traced
  // Bytes that launches before this one have stored while traced: scratch memory, which may be loaded too.
  std::unordered_set<uintptr_t> scratch;
  size_t stores_of_earlier_launches = 0;
  int64_t scratch_loaded = 0;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  void* scheduler_fake_stack = nullptr;
};

Machine& machine() {
  static Machine m;
  return m;
}

// A stack that is used anew or given back: fiber_entry never returned to clean up its marks.
void unpoison(Fiber& fiber) {
#if SHIM_ASAN
  __asan_unpoison_memory_region(fiber.stack, kStackBytes);
#endif
  (void)fiber;
}

void to_scheduler(Fiber& fiber, bool last) {
  Machine& m = machine();
#if SHIM_ASAN
  __sanitizer_start_switch_fiber(last ? nullptr : &fiber.fake_stack, m.scheduler_stack,
                                 m.scheduler_stack_bytes);
#endif
  (void)last;
  Context::swap(fiber.context, m.scheduler);
#if SHIM_ASAN
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &m.scheduler_stack, &m.scheduler_stack_bytes);
#endif
}

void to_fiber(Fiber& fiber) {
  Machine& m = machine();
#if SHIM_ASAN
  __sanitizer_start_switch_fiber(&m.scheduler_fake_stack, fiber.stack, kStackBytes);
#endif
  Context::swap(m.scheduler, fiber.context);
#if SHIM_ASAN
  __sanitizer_finish_switch_fiber(m.scheduler_fake_stack, nullptr, nullptr);
#endif
}

void block_current(std::string waits_for) {
  Fiber& fiber = *machine().current;
  fiber.blocked = true;
  fiber.waits_for = std::move(waits_for);
  to_scheduler(fiber, false);
}

Block& current_block() { return machine().blocks[machine().current->block]; }

// Threads that have exited no longer take part in a block's barrier.
void release_barrier_if_complete() {
  Machine& m = machine();
  Block& block = current_block();
  if (block.at_barrier == 0 || block.at_barrier < block.live) return;
  block.at_barrier = 0;
  const size_t threads = m.fibers.size() / m.blocks.size(), first = m.current->block * threads;
  for (size_t i = first; i < first + threads; ++i) m.fibers[i].blocked = false;
}

void fiber_entry() {
  Machine& m = machine();
#if SHIM_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack, &m.scheduler_stack_bytes);
#endif
  try {
    (*m.body)();
  } catch (...) {
    if (!m.error) m.error = std::current_exception();
  }
  m.current->done = true;
  --m.live;
  --current_block().live;
  release_barrier_if_complete();
  to_scheduler(*m.current, true);
  __builtin_unreachable();
}

std::string deadlock_report() {
  const Machine& m = machine();
  std::map<std::string, std::vector<const Fiber*>> waiting;
  for (const Fiber& f : m.fibers) {
    if (!f.done) waiting[f.waits_for].push_back(&f);
  }
  const uint3 index = m.blocks[0].index;
  std::string text = m.blocks.size() > 1 ? "deadlock in the cluster from block (" : "deadlock in block (";
  text += std::to_string(index.x) + ", " + std::to_string(index.y) + ")";
  for (const auto& [what, fibers] : waiting) {
    text += "; " + std::to_string(fibers.size()) + " threads from " + std::to_string(fibers[0]->thread) +
            (m.blocks.size() > 1 ? " of rank " + std::to_string(fibers[0]->block) : "") + " on wait at " +
            what;
  }
  return text + "; " + std::to_string(m.fibers.size() - m.live) + " have exited";
}

// Lets each of a block's threads run until it waits; false if none could.
bool run_round(const Block& block, Fiber* fibers, std::vector<size_t>& order) {
  Machine& m = machine();
  if (m.order > 1) std::shuffle(order.begin(), order.end(), m.random);
  bool progress = false;
  for (size_t i : order) {
    Fiber& f = fibers[i];
    if (f.done || f.blocked) continue;
    progress = true;
    m.current = &f;
    m.where.thread = {f.thread, 0, 0};
    m.where.block = block.index;
    to_fiber(f);
    if (m.error) std::rethrow_exception(m.error);
  }
  return progress;
}

// The blocks of a cluster, from this one on, along x.
void run_cluster(uint3 first, unsigned blocks) {
  Machine& m = machine();
  const size_t threads = m.fibers.size() / blocks;
  m.blocks.clear();
  m.blocks.resize(blocks);
  for (unsigned rank = 0; rank < blocks; ++rank) {
    m.blocks[rank].index = {first.x + rank, first.y, first.z};
    m.blocks[rank].live = static_cast<int>(threads);
    m.blocks[rank].warps.assign((threads + 31) / 32, Rendezvous{});
  }
  m.at_cluster_barrier = 0;
  m.live = static_cast<int>(m.fibers.size());
  for (size_t i = 0; i < m.fibers.size(); ++i) {
    Fiber& f = m.fibers[i];
    f.block = static_cast<unsigned>(i / threads);
    f.thread = static_cast<unsigned>(i % threads);
    f.done = f.blocked = false;
    unpoison(f);
    f.context.prepare(f.stack, kStackBytes, fiber_entry);
  }
  // A block runs until none of its threads can go on, and only then the next, so that no block waits for
  // another by chance.
  std::vector<unsigned> ranks(blocks);
  std::iota(ranks.begin(), ranks.end(), 0);
  std::vector<size_t> order(threads);
  std::iota(order.begin(), order.end(), 0);
  if (m.order == 1) {
    std::reverse(ranks.begin(), ranks.end());
    std::reverse(order.begin(), order.end());
  }
  while (m.live > 0) {
    if (m.order > 1) std::shuffle(ranks.begin(), ranks.end(), m.random);
    bool progress = false;
    for (unsigned rank : ranks) {
      while (run_round(m.blocks[rank], &m.fibers[rank * threads], order)) progress = true;
    }
    if (!progress) fail(deadlock_report());
  }
}

void set_threads(unsigned count) {
  Machine& m = machine();
  while (m.fibers.size() > count) {
    unpoison(m.fibers.back());
    munmap(m.fibers.back().stack, kStackBytes);
    m.fibers.pop_back();
  }
  while (m.fibers.size() < count) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) fail("no memory for stacks");
    m.fibers.emplace_back().stack = static_cast<char*>(stack);
  }
}

void* shared_memory_of(Block& block, const void* key, size_t bytes) {
  Machine& m = machine();
  auto found = block.shared.find(key);
  if (found == block.shared.end()) {
    void* p = aligned_alloc(16, (bytes + 15) / 16 * 16);
    memset(p, 0xff, bytes);  // NaN in every float format
    found =
        block.shared.emplace(key, std::unique_ptr<char, void (*)(void*)>(static_cast<char*>(p), free)).first;
    block.shared_sizes[key] = bytes;
    block.shared_bytes += static_cast<int64_t>(bytes);
    m.most_shared_bytes = std::max(m.most_shared_bytes, block.shared_bytes);
  }
  return found->second.get();
}

void on_access(const void* p, size_t bytes, bool store) {
  Machine& m = machine();
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (address % bytes != 0) fail("misaligned " + std::to_string(bytes) + "-byte access");
  if (!m.traced) return;
  if (store) return m.stores.push_back({address, static_cast<uint32_t>(bytes)});
  for (Region& r : m.readable) {
    if (r.find(address, bytes) < 0) continue;
    r.loaded += static_cast<int64_t>(bytes);
    r.narrow_loads += bytes < 16;
    return;
  }
  bool stored_before = true;
  for (size_t i = 0; i < bytes; ++i) stored_before &= m.scratch.count(address + i) > 0;
  if (stored_before) {
    m.scratch_loaded += static_cast<int64_t>(bytes);
    return;
  }
  fail("load outside of the allowed regions, thread " + std::to_string(m.where.thread.x) + " of block " +
       std::to_string(m.where.block.x));
}

}  // namespace

Where& where() { return machine().where; }

void launch(dim3 grid, dim3 block, const std::function<void()>& thread, unsigned cluster) {
  Machine& m = machine();
  if (block.y != 1 || block.z != 1) fail("only one-dimensional blocks are modelled");
  if (block.x == 0 || block.x > 1024) fail(std::to_string(block.x) + " threads in a block");
  if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y - 1 > 65534u || grid.z - 1 > 65534u)
    fail("grid out of range");
  if (cluster == 0 || cluster > 8 || grid.x % cluster != 0)
    fail("clusters of " + std::to_string(cluster) + " blocks in a grid of " + std::to_string(grid.x));
  set_threads(block.x * cluster);
  m.where.block_dim = block;
  m.where.grid_dim = grid;
  m.random.seed(m.order);
  m.error = nullptr;
  m.body = &thread;
  ++m.launches;
  for (; m.stores_of_earlier_launches < m.stores.size(); ++m.stores_of_earlier_launches) {
    const Store& store = m.stores[m.stores_of_earlier_launches];
    for (uint32_t i = 0; i < store.bytes; ++i) m.scratch.insert(store.address + i);
  }
  try {
    for (unsigned z = 0; z < grid.z; ++z) {
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; x += cluster) run_cluster({x, y, z}, cluster);
      }
    }
  } catch (...) {
    set_threads(0);  // fibers stopped halfway cannot be started again
    throw;
  }
}

void block_barrier(const char* file, unsigned line) {
  Machine& m = machine();
  Fiber& me = *m.current;
  ++current_block().at_barrier;
  me.blocked = true;
  release_barrier_if_complete();  // the last one also yields: which thread goes on is the order's choice
  me.waits_for = std::string(file) + ":" + std::to_string(line);
  to_scheduler(me, false);
}

void cluster_barrier(const char* file, unsigned line) {
  Machine& m = machine();
  Fiber& me = *m.current;
  me.blocked = true;
  if (++m.at_cluster_barrier == m.fibers.size()) {
    m.at_cluster_barrier = 0;
    for (Fiber& f : m.fibers) f.blocked = false;
  }
  me.waits_for = "the cluster's barrier, " + std::string(file) + ":" + std::to_string(line);
  to_scheduler(me, false);
}

unsigned cluster_rank() { return machine().current->block; }
bool has_clusters() { return machine().clusters; }

const void* shared_of_rank(const void* p, unsigned rank) {
  Machine& m = machine();
  if (rank >= m.blocks.size()) fail("rank " + std::to_string(rank) + " is not in the cluster");
  Block& other = m.blocks[rank];
  if (other.live == 0) fail("shared memory of rank " + std::to_string(rank) + ", which has exited, is read");
  const Block& mine = current_block();
  for (const auto& [key, memory] : mine.shared) {
    const auto offset = static_cast<size_t>(static_cast<const char*>(p) - memory.get());
    const size_t bytes = mine.shared_sizes.at(key);
    if (offset < bytes) return static_cast<char*>(shared_memory_of(other, key, bytes)) + offset;
  }
  fail("an address of another block's that is not in shared memory");
}

const uint32_t* exchange(uint32_t mask, uint32_t word, const char* what) {
  Machine& m = machine();
  const unsigned thread = m.where.thread.x, lane = thread % 32, first = thread - lane;
  Rendezvous& r = current_block().warps[thread / 32];
  const size_t threads = m.fibers.size() / m.blocks.size();
  Fiber* const warp = &m.fibers[m.current->block * threads + first];
  if (threads - first < 32) mask &= (1u << (threads - first)) - 1;
  if (!(mask >> lane & 1)) fail(std::string(what) + ": the calling lane is not in its mask");
  if (r.arrived == 0) {
    r.mask = mask;
    r.what = what;
  } else if (r.mask != mask || r.what != what) {
    fail(std::string("lanes of a warp diverge: ") + what + " against " + r.what);
  }
  r.words[lane] = word;
  r.arrived |= 1u << lane;
  Fiber& me = *m.current;
  if (r.arrived != r.mask) {
    block_current(what);
    return me.inbox;
  }
  for (unsigned i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    memcpy(warp[i].inbox, r.words, sizeof r.words);
    warp[i].blocked = false;
  }
  r.arrived = 0;
  return me.inbox;
}

void* shared_memory(const void* key, size_t bytes) { return shared_memory_of(current_block(), key, bytes); }

void on_load(const void* p, size_t bytes) { on_access(p, bytes, false); }
void on_store(const void* p, size_t bytes) { on_access(p, bytes, true); }

}  // namespace cuda_shim

// ---- for the tests, by ctypes

#define SHIM_API extern "C" __attribute__((visibility("default")))

SHIM_API void cuda_shim_set_order(int order) { cuda_shim::machine().order = order; }

SHIM_API void cuda_shim_set_clusters(int on) { cuda_shim::machine().clusters = on != 0; }

SHIM_API void cuda_shim_trace(int on) {
  auto& m = cuda_shim::machine();
  m.traced = on != 0;
  m.readable.clear();
  m.stores.clear();
  m.scratch.clear();
  m.stores_of_earlier_launches = 0;
  m.scratch_loaded = 0;
  m.most_shared_bytes = 0;
}

SHIM_API int cuda_shim_allow_loads(uintptr_t base, int64_t rows, int64_t row_bytes, int64_t stride_bytes) {
  auto& readable = cuda_shim::machine().readable;
  readable.push_back({base, rows, row_bytes, stride_bytes});
  return static_cast<int>(readable.size()) - 1;
}

// bytes loaded, loads of less than 16 bytes
SHIM_API void cuda_shim_loads(int region, int64_t* out) {
  const auto& r = cuda_shim::machine().readable.at(region);
  out[0] = r.loaded;
  out[1] = r.narrow_loads;
}

// Takes the stores to an output out of the log: bytes stored, stores of less than 16 bytes, bytes never
// written, bytes written more than once, stores left in the log.
SHIM_API void cuda_shim_take_stores(uintptr_t base, int64_t rows, int64_t row_bytes, int64_t stride_bytes,
                                    int64_t* out) {
  auto& m = cuda_shim::machine();
  const cuda_shim::Region output{base, rows, row_bytes, stride_bytes};
  std::vector<uint8_t> writes(rows * row_bytes);
  std::vector<cuda_shim::Store> left;
  std::fill(out, out + 5, 0);
  for (const auto& store : m.stores) {
    const int64_t offset = output.find(store.address, store.bytes);
    if (offset < 0) {
      left.push_back(store);
      continue;
    }
    out[0] += store.bytes;
    out[1] += store.bytes < 16;
    for (uint32_t i = 0; i < store.bytes; ++i) writes[offset + i] += writes[offset + i] < 255;
  }
  m.stores = left;
  m.stores_of_earlier_launches = left.size();
  out[2] = std::count(writes.begin(), writes.end(), 0);
  out[3] = std::count_if(writes.begin(), writes.end(), [](uint8_t n) { return n > 1; });
  out[4] = static_cast<int64_t>(left.size());
}

SHIM_API int64_t cuda_shim_most_shared_bytes() { return cuda_shim::machine().most_shared_bytes; }

SHIM_API int64_t cuda_shim_scratch_loaded() { return cuda_shim::machine().scratch_loaded; }
