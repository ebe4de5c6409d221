// The run: with the trap flag set the CPU raises SIGTRAP after every instruction, and the handler looks at
// the next one before the CPU gets to it.
#include "stepped.h"

#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <vector>

#include "machine.h"

namespace stepped {

Machine machine;

namespace {

constexpr int64_t kTrapFlag = 0x100, kMostSteps = 100'000'000, kRedZone = 128;
constexpr int kSignals[] = {SIGTRAP, SIGSEGV, SIGBUS, SIGILL};

struct {
  sigjmp_buf out;
  char why[400];
  std::vector<Range> ranges;
  const uint8_t* stack_end;
  int64_t steps;
} state;

struct Count {
  const char* name;
  int64_t times;
} counts[64];

bool is_allowed(const uint8_t* p, size_t bytes, bool writes, const uint8_t* stack_pointer) {
  if (p >= stack_pointer - kRedZone && p + bytes <= state.stack_end) return true;
  for (const Range& range : state.ranges) {
    const auto* begin = static_cast<const uint8_t*>(range.begin);
    if (p >= begin && p + bytes <= begin + range.bytes && (range.writable || !writes)) return true;
  }
  return false;
}

void stop_unless_allowed(const Instruction& x, const uint8_t* p, size_t bytes, bool writes) {
  if (x.of_constant && !writes) return;
  const auto* stack_pointer = reinterpret_cast<const uint8_t*>(x.general[REG_RSP]);
  if (is_allowed(p, bytes, writes, stack_pointer)) return;
  char why[200];
  int used =
      std::snprintf(why, sizeof(why), "%s %zu bytes beyond its operands", writes ? "writes" : "reads", bytes);
  for (const Range& range : state.ranges) {
    const long distance = long(p - static_cast<const uint8_t*>(range.begin));
    used += std::snprintf(why + used, sizeof(why) - used, ", at %ld of %zu", distance, range.bytes);
    if (used >= int(sizeof(why))) break;
  }
  stop_at(x, why);
}

// memcpy and memset at once, with the arguments where a call leaves them.
bool run_library_call(greg_t* general) {
  const auto at = reinterpret_cast<void*>(general[REG_RIP]);
  const bool copies = at == reinterpret_cast<void*>(&memcpy);
  if (!copies && at != reinterpret_cast<void*>(&memset)) return false;
  auto* to = reinterpret_cast<uint8_t*>(general[REG_RDI]);
  const auto* from = reinterpret_cast<const uint8_t*>(general[REG_RSI]);
  const size_t bytes = size_t(general[REG_RDX]);
  auto* stack_pointer = reinterpret_cast<const uint8_t*>(general[REG_RSP]);
  if (bytes && !is_allowed(to, bytes, true, stack_pointer))
    stop("memcpy or memset writes beyond the operands");
  if (bytes && copies && !is_allowed(from, bytes, false, stack_pointer))
    stop("memcpy reads beyond the operands");
  if (copies) {
    std::memcpy(to, from, bytes);
  } else {
    std::memset(to, int(general[REG_RSI]), bytes);
  }
  general[REG_RAX] = general[REG_RDI];
  general[REG_RIP] = get<int64_t>(stack_pointer);  // as `ret`
  general[REG_RSP] += 8;
  return true;
}

void on_step(int, siginfo_t*, void* context) {
  greg_t* general = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  if (!(general[REG_EFL] & kTrapFlag)) return;  // the last step
  for (;;) {
    if (++state.steps > kMostSteps) stop("it does not come to an end");
    Instruction x;
    if (run_library_call(general)) continue;
    if (!decode(general, &x)) return;
    if (!execute_tile(x)) execute_vector(x);
    general[REG_RIP] += x.length;
  }
}

void on_fault(int signal, siginfo_t*, void* context) {
  const greg_t* general = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  std::snprintf(state.why, sizeof(state.why), "signal %d at %p", signal,
                reinterpret_cast<void*>(general[REG_RIP]));
  siglongjmp(state.out, 1);
}

[[gnu::noinline]] void call_stepped(void (*fn)(void*), void* arg) {
  register void (*function)(void*) asm("r12") = fn;
  asm volatile(
      "mov %%rsp, %%rbx\n\t"
      "sub $128, %%rsp\n\t"
      "and $-16, %%rsp\n\t"
      "pushfq\n\t"
      "orq $0x100, (%%rsp)\n\t"
      "popfq\n\t"
      "call *%%r12\n\t"
      "pushfq\n\t"
      "andq $-0x101, (%%rsp)\n\t"
      "popfq\n\t"
      "mov %%rbx, %%rsp"
      : "+D"(arg)
      : "r"(function)
      : "rax", "rbx", "rcx", "rdx", "rsi", "r8", "r9", "r10", "r11", "cc", "memory");
}

}  // namespace

void stop(const char* why) {
  std::snprintf(state.why, sizeof(state.why), "%s", why);
  siglongjmp(state.out, 1);
}

void stop_at(const Instruction& x, const char* why) {
  char bytes[40] = "";
  for (int i = 0; i < 10; ++i) std::snprintf(bytes + 3 * i, 4, " %02x", x.at[i]);
  std::snprintf(state.why, sizeof(state.why), "the instruction%s %s", bytes, why);
  siglongjmp(state.out, 1);
}

const uint8_t* readable(const Instruction& x, const uint8_t* p, size_t bytes) {
  stop_unless_allowed(x, p, bytes, false);
  return p;
}

uint8_t* writable(const Instruction& x, uint8_t* p, size_t bytes) {
  stop_unless_allowed(x, p, bytes, true);
  return p;
}

void count(const char* name) {
  for (Count& known : counts) {
    if (!known.name) known.name = name;
    if (std::strcmp(known.name, name) == 0) {
      ++known.times;
      return;
    }
  }
}

int64_t executed(const char* name) {
  for (const Count& known : counts) {
    if (known.name && std::strcmp(known.name, name) == 0) return known.times;
  }
  return 0;
}

const char* run(void (*fn)(void*), void* arg, std::initializer_list<Range> ranges) {
  state.ranges = ranges;
  state.steps = 0;
  state.why[0] = 0;
  state.stack_end = static_cast<const uint8_t*>(__builtin_frame_address(0));
  std::memset(&machine, 0xa5, sizeof(machine));
  machine.palette = 0;
  struct sigaction before[4];
  for (int i = 0; i < 4; ++i) {
    struct sigaction action{};
    action.sa_sigaction = kSignals[i] == SIGTRAP ? on_step : on_fault;
    action.sa_flags = SA_SIGINFO;
    sigaction(kSignals[i], &action, &before[i]);
  }
  if (sigsetjmp(state.out, 1) == 0) call_stepped(fn, arg);
  for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &before[i], nullptr);
  if (state.steps == 0) std::snprintf(state.why, sizeof(state.why), "%s", "this machine does not step");
  return state.why;
}

}  // namespace stepped
