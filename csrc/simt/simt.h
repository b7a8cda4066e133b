// Host execution of CUDA sources, for tests: one fiber per CUDA thread, on one CPU thread. x86-64 Linux only.
//
// csrc/simt/cuda_runtime.h declares what an unmodified .cu file uses of CUDA; this file implements it. Memory is
// sequentially consistent, so a missing fence goes unnoticed, and times mean nothing. It finds:
//
//   reads before writes     shared memory starts as NaN; the caller does the same for what it allocates
//   races at barriers       threads and blocks run in a random order, so a missing barrier lets a read come too early
//   barriers that differ    all threads of a block must meet at the same call of __syncthreads
//   deadlocks, livelocks    a launch fails once it has spent its budget of switches and accesses
//   misalignment            every access of a word must be aligned to its size
//   traffic                 it counts the bytes read from and written to global memory, by kind
#pragma once
#if !defined(__x86_64__) || !defined(__linux__)
#error "the host execution of CUDA sources needs x86-64 Linux"
#endif
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <source_location>
#include <string>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the running fiber

namespace simt {

constexpr int kKinds = 5;
constexpr int kWarp = 32;
constexpr unsigned char kNanByte = 0xff;  // four or eight such bytes are a NaN

// What tests set and read.
struct Control {
  uint64_t seed = 1;             // sets the order of threads and blocks
  unsigned resident = 24;        // most blocks that run at the same time
  uint64_t budget = 20'000'000;  // switches between fibers and accesses of global memory that a launch may make
  int most_shared = 163 << 10;   // bytes of shared memory that a block may have, as on sm_80
  uint64_t read[kKinds] = {}, written[kKinds] = {}, launches = 0;
};
inline Control control;

enum class State : uint8_t { kNew, kReady, kAtWarp, kAtBarrier, kDone };

struct Block;
struct Copy {
  void* to;
  unsigned char bytes[16];
  size_t size;
  unsigned group;
};
struct Fiber {
  Block* block = nullptr;
  unsigned index = 0;
  State state = State::kNew;
  unsigned generation = 0;  // of what it waits for
  void* stack = nullptr;
  void* pointer = nullptr;  // saved stack pointer
  void* fake_stack = nullptr;
  std::vector<Copy> copies;  // under way
  unsigned groups = 0;       // committed groups of copies
};
struct Warp {
  uint64_t slots[2][kWarp];
  unsigned generation = 0, arrived = 0, mask = 0;
  int operation = 0;
};
struct Block {
  dim3 index;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[], decltype(&std::free)> shared{nullptr, &std::free};
  std::vector<unsigned char> static_shared;
  unsigned done = 0, arrived = 0, generation = 0;
  std::source_location barrier;
};

// ------------------------------------------------------------------------------------------------ fibers

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 512 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif
constexpr size_t kGuard = 4096;
constexpr unsigned kMostFibers = 8192;  // at once: each takes two of a process's memory mappings

inline Fiber* current = nullptr;
inline void* scheduler_pointer = nullptr;
inline const std::function<void()>* body = nullptr;
inline std::string failure;  // of the last launch
inline uint64_t spent = 0;   // part of the budget
inline dim3 threads_of_block;

extern "C" void mru_simt_switch(void** save, void* to);
asm(R"(
  .pushsection .text.mru_simt_switch,"axG",@progbits,mru_simt_switch,comdat
  .weak mru_simt_switch
  .hidden mru_simt_switch
  .type mru_simt_switch,@function
mru_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size mru_simt_switch,.-mru_simt_switch
  .popsection
)");

inline const void* scheduler_bottom = nullptr;
inline size_t scheduler_size = 0;

inline void start_switch([[maybe_unused]] void** fake, [[maybe_unused]] const void* bottom,
                         [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake, bottom, size);
#endif
}
inline void finish_switch([[maybe_unused]] void* fake, [[maybe_unused]] const void** bottom,
                          [[maybe_unused]] size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, bottom, size);
#endif
}

inline void to_scheduler() {
  Fiber* const self = current;
  start_switch(self->state == State::kDone ? nullptr : &self->fake_stack, scheduler_bottom, scheduler_size);
  mru_simt_switch(&self->pointer, scheduler_pointer);
  finish_switch(self->fake_stack, &scheduler_bottom, &scheduler_size);
}
// Ends the launch: the scheduler does not resume a fiber once something has failed.
[[noreturn]] inline void fail(const std::string& what) {
  const dim3& b = current->block->index;
  char where[128];
  std::snprintf(where, sizeof where, " (block %u,%u,%u thread %u)", b.x, b.y, b.z, current->index);
  failure = what + where;
  to_scheduler();
  std::abort();
}

inline void spend() {
  if (++spent > control.budget) fail("livelock: the budget of a launch is spent");
}

inline std::vector<void*>& free_stacks() {
  static std::vector<void*> stacks;
  return stacks;
}
inline void* take_stack() {
  auto& stacks = free_stacks();
  if (!stacks.empty()) {
    void* const stack = stacks.back();
    stacks.pop_back();
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(static_cast<char*>(stack) + kGuard, kStack);  // its last fiber never returned
#endif
    return stack;
  }
  void* const stack =
      mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) std::perror("simt: stack"), std::abort();
  mprotect(stack, kGuard, PROT_NONE);
  return stack;
}

inline void fiber_main() {
  finish_switch(nullptr, &scheduler_bottom, &scheduler_size);
  spend();
  (*body)();
  Block& block = *current->block;
  current->state = State::kDone;
  ++block.done;
  if (block.arrived > 0) fail("a thread ended while others wait at __syncthreads");
  to_scheduler();
  std::abort();
}

inline void resume(Fiber& fiber) {
  if (fiber.state == State::kNew) {
    fiber.stack = take_stack();
    void** top = reinterpret_cast<void**>(static_cast<char*>(fiber.stack) + kGuard + kStack);
    *--top = nullptr;  // the ABI's alignment at a function's entry
    *--top = reinterpret_cast<void*>(&fiber_main);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber.pointer = top;
  }
  fiber.state = State::kReady;
  current = &fiber;
  const unsigned i = fiber.index;
  const dim3& n = threads_of_block;
  threadIdx = dim3(i % n.x, i / n.x % n.y, i / n.x / n.y);
  blockIdx = fiber.block->index;
  void* fake = nullptr;
  start_switch(&fake, static_cast<char*>(fiber.stack) + kGuard, kStack);
  mru_simt_switch(&scheduler_pointer, fiber.pointer);
  finish_switch(fake, nullptr, nullptr);
  if (fiber.state == State::kDone) free_stacks().push_back(fiber.stack);
}

// ------------------------------------------------------------------------------------------------ meeting points

// Lets other fibers run. A loop that waits on global memory calls it.
inline void yield() {
  spend();
  to_scheduler();
}

inline void barrier(std::source_location at) {
  Block& block = *current->block;
  if (block.done > 0) fail("__syncthreads after a thread of the block has ended");
  if (block.arrived == 0) block.barrier = at;
  else if (at.line() != block.barrier.line() || at.column() != block.barrier.column() ||
           std::strcmp(at.file_name(), block.barrier.file_name()) != 0)
    fail("threads of a block meet at different calls of __syncthreads: lines " + std::to_string(block.barrier.line()) +
         " and " + std::to_string(at.line()));
  if (++block.arrived == block.fibers.size()) {
    block.arrived = 0;
    ++block.generation;
    return;
  }
  current->state = State::kAtBarrier;
  current->generation = block.generation;
  to_scheduler();
}

// Lanes of `mask` meet, each with a value; returns all their values.
inline const uint64_t* meet(unsigned mask, uint64_t value, int operation) {
  Block& block = *current->block;
  const unsigned lane = current->index % kWarp, first = current->index - lane;
  Warp& warp = block.warps[current->index / kWarp];
  const size_t lanes = block.fibers.size() - first;
  if (lanes < kWarp) mask &= (1u << lanes) - 1;
  if (!(mask >> lane & 1)) fail("a lane is not in its own mask");
  if (warp.arrived == 0) warp.mask = mask, warp.operation = operation;
  else if (warp.mask != mask || warp.operation != operation)
    fail("lanes of a warp meet with different operations or masks");
  const unsigned generation = warp.generation;
  uint64_t* const slots = warp.slots[generation & 1];
  slots[lane] = value;
  warp.arrived |= 1u << lane;
  if (warp.arrived == mask) {
    warp.arrived = 0;
    ++warp.generation;
    return slots;
  }
  current->state = State::kAtWarp;
  current->generation = generation;
  to_scheduler();
  return slots;
}

inline bool ready(const Fiber& fiber) {
  switch (fiber.state) {
    case State::kNew:
    case State::kReady: return true;
    case State::kAtWarp: return fiber.block->warps[fiber.index / kWarp].generation != fiber.generation;
    case State::kAtBarrier: return fiber.block->generation != fiber.generation;
    case State::kDone: return false;
  }
  return false;
}

// ------------------------------------------------------------------------------------------------ launches

// Variables declared __shared__ in the sources live here; each block has its own copy while it does not run.
extern "C" {
extern unsigned char __start_mru_simt_shared[] __attribute__((weak, visibility("hidden")));
extern unsigned char __stop_mru_simt_shared[] __attribute__((weak, visibility("hidden")));
}

// Runs every thread of a grid. If something fails it returns false, and `failure` says what.
inline bool run(dim3 grid, dim3 threads, size_t shared_bytes, const std::function<void()>& kernel) {
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  const unsigned count = threads.x * threads.y * threads.z;
  failure.clear();
  if (blocks == 0 || count == 0 || count > 1024 || grid.y > 65535 || grid.z > 65535) {
    failure = "invalid launch configuration";
    return false;
  }
  ++control.launches;
  gridDim = grid, blockDim = threads_of_block = threads;
  body = &kernel;
  spent = 0;
  uint64_t random = control.seed * 0x9e3779b97f4a7c15 | 1;
  const auto draw = [&](uint64_t below) {
    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
    return (random >> 16) % below;
  };
  const unsigned resident = std::max(1u, std::min(control.resident, kMostFibers / count));
  const size_t static_bytes = size_t(__stop_mru_simt_shared - __start_mru_simt_shared);
  std::vector<std::unique_ptr<Block>> active;
  const auto start_block = [&](uint64_t i) {
    auto block = std::make_unique<Block>();
    block->index = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    block->fibers.resize(count);
    block->warps.resize((count + kWarp - 1) / kWarp);
    // Of the exact size, so that the address sanitizer sees an access beyond its end.
    block->shared.reset(static_cast<unsigned char*>(std::aligned_alloc(16, (shared_bytes + 15) / 16 * 16)));
    std::memset(block->shared.get(), kNanByte, shared_bytes);
    block->static_shared.assign(static_bytes, kNanByte);
    for (unsigned t = 0; t < count; ++t) block->fibers[t].block = block.get(), block->fibers[t].index = t;
    active.push_back(std::move(block));
  };
  for (uint64_t next = 0; failure.empty();) {
    while (active.size() < resident && next < blocks) start_block(next++);
    if (active.empty()) break;
    const size_t chosen = draw(active.size());
    Block& block = *active[chosen];
    if (static_bytes) std::memcpy(__start_mru_simt_shared, block.static_shared.data(), static_bytes);
    const unsigned first = draw(count);
    bool resumed = false;
    for (unsigned i = 0; i < count && failure.empty(); ++i) {
      Fiber& fiber = block.fibers[(first + i) % count];
      if (!ready(fiber)) continue;
      resumed = true;
      resume(fiber);
    }
    if (static_bytes) std::memcpy(block.static_shared.data(), __start_mru_simt_shared, static_bytes);
    if (!failure.empty()) break;
    if (block.done == count) active.erase(active.begin() + chosen);
    else if (!resumed) failure = "deadlock: no thread of a block can go on";
  }
  for (auto& block : active)  // after a failure; these stacks still hold frames, so they are not used again
    for (Fiber& fiber : block->fibers)
      if (fiber.stack && fiber.state != State::kDone) munmap(fiber.stack, kGuard + kStack);
  current = nullptr;
  return failure.empty();
}

inline unsigned char* shared_memory() { return current->block->shared.get(); }

// ------------------------------------------------------------------------------------------------ global memory

inline void check_aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail("misaligned access of " + std::to_string(bytes) + " bytes");
}
template <class Word>
Word load(int kind, const Word* p) {
  check_aligned(p, sizeof(Word));
  spend();
  control.read[kind] += sizeof(Word);
  Word word;
  std::memcpy(&word, p, sizeof word);
  return word;
}
// A copy to shared memory arrives as late as allowed: when its thread waits for it.
template <class Word>
void copy_ahead(int kind, Word* to, const Word* from) {
  check_aligned(to, sizeof(Word));
  Copy copy{to, {}, sizeof(Word), current->groups};
  const Word word = load(kind, from);
  std::memcpy(copy.bytes, &word, sizeof word);
  current->copies.push_back(copy);
}
inline void commit_copies() { ++current->groups; }
inline void wait_for_copies(unsigned under_way) {
  auto& copies = current->copies;
  size_t arrived = 0;
  for (; arrived < copies.size() && copies[arrived].group + under_way < current->groups; ++arrived)
    std::memcpy(copies[arrived].to, copies[arrived].bytes, copies[arrived].size);
  copies.erase(copies.begin(), copies.begin() + arrived);
}
template <class Word>
void store(int kind, Word* p, Word word) {
  check_aligned(p, sizeof(Word));
  spend();
  control.written[kind] += sizeof(Word);
  std::memcpy(p, &word, sizeof word);
}

}  // namespace simt
