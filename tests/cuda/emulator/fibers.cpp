// Threads of a block as fibers: their stacks, how they take turns, how they fail.
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "machine.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SMOOTHIE_ASAN
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define SMOOTHIE_ASAN
#endif
#ifdef SMOOTHIE_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

smoothie::emulator::Index threadIdx, blockIdx, blockDim, gridDim;

#ifdef SMOOTHIE_OWN_SWITCH
extern "C" void smoothie_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.local smoothie_switch
.type smoothie_switch, @function
smoothie_switch:
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
.size smoothie_switch, .-smoothie_switch
)");
#endif

namespace smoothie {
namespace emulator {

Machine machine;

namespace {

constexpr size_t kSystemPage = 4096;
#ifdef SMOOTHIE_ASAN
constexpr size_t kStack = 512 << 10;
#else
constexpr size_t kStack = 128 << 10;
#endif

void fiber_main() {
#ifdef SMOOTHIE_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &machine.stack_bottom, &machine.stack_size);
#endif
  machine.body(machine.argument);
  exit_thread();
  give_up();
}

}  // namespace

bool wrong(const Block* block, const char* format, ...) {
  if (machine.failed) return false;
  machine.failed = true;
  int at = 0;
  if (machine.current) {
    const Fiber& fiber = *machine.current;
    at = std::snprintf(machine.error, sizeof machine.error, "block (%u, %u), thread %d: ", fiber.block->index.x,
                       fiber.block->index.y, fiber.thread);
  } else if (block) {
    at = std::snprintf(machine.error, sizeof machine.error, "block (%u, %u): ", block->index.x, block->index.y);
  }
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(machine.error + at, sizeof machine.error - size_t(at), format, arguments);
  va_end(arguments);
  return false;
}

void give_up() {
  for (;;) leave();
}

Fiber::~Fiber() {
  if (stack) munmap(stack - kSystemPage, kStack + kSystemPage);
}

void prepare(Fiber& fiber) {
  if (!fiber.stack) {
    void* pages = mmap(nullptr, kStack + kSystemPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) std::abort();
    mprotect(pages, kSystemPage, PROT_NONE);
    fiber.stack = static_cast<uint8_t*>(pages) + kSystemPage;
  }
#ifdef SMOOTHIE_ASAN
  __asan_unpoison_memory_region(fiber.stack, kStack);
  fiber.fake_stack = nullptr;
#endif
#ifdef SMOOTHIE_OWN_SWITCH
  auto* top = reinterpret_cast<uint64_t*>(fiber.stack + kStack) - 3;  // as after a call
  top[0] = 0;                                                         // fiber_main's return address: none
  *--top = reinterpret_cast<uint64_t>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = 0;
  fiber.context = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack, fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
#endif
}

void enter(Fiber& fiber) {
  machine.current = &fiber;
  threadIdx = {unsigned(fiber.thread), 0, 0};
  blockIdx = fiber.block->index;
  ++machine.counts.switches;
#ifdef SMOOTHIE_ASAN
  __sanitizer_start_switch_fiber(&machine.fake_stack, fiber.stack, kStack);
#endif
#ifdef SMOOTHIE_OWN_SWITCH
  smoothie_switch(&machine.context, fiber.context);
#else
  swapcontext(&machine.context, &fiber.context);
#endif
#ifdef SMOOTHIE_ASAN
  __sanitizer_finish_switch_fiber(machine.fake_stack, nullptr, nullptr);
#endif
  machine.current = nullptr;
}

void leave() {
  Fiber& fiber = *machine.current;
#ifdef SMOOTHIE_ASAN
  __sanitizer_start_switch_fiber(fiber.exited ? nullptr : &fiber.fake_stack, machine.stack_bottom, machine.stack_size);
#endif
#ifdef SMOOTHIE_OWN_SWITCH
  smoothie_switch(&fiber.context, machine.context);
#else
  swapcontext(&fiber.context, &machine.context);
#endif
#ifdef SMOOTHIE_ASAN
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &machine.stack_bottom, &machine.stack_size);
#endif
}

void yield() {
  machine.runnable.push_back(machine.current);
  leave();
}

void wake(Fiber* fiber) {
  fiber->wait = Wait::kNothing;
  machine.runnable.push_back(fiber);
}

void wait_for(Wait what, uint32_t address, uint32_t parity) {
  Fiber& me = *machine.current;
  me.wait = what, me.address = address, me.parity = parity;
  leave();
}

}  // namespace emulator
}  // namespace smoothie
