// State that all parts share: the memory and its records, threads, simdgroups, the launch and its report.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <vector>

namespace {

// Memory: each buffer and each threadgroup variable has 64 GB of address space of its own, mapped where the data is.


constexpr int kSlotBits = 36, kSlots = 128, kFirstThreadgroupSlot = 32;
constexpr uintptr_t kMiddle = uintptr_t(1) << (kSlotBits - 1);  // indices below zero stay in the buffer's own slot
constexpr size_t kPage = 4096, kStack = 256 * 1024, kThreadgroupLimit = 32768;
constexpr uint32_t kWidth = 32;  // threads of a simdgroup

// Record of the accesses to `granule` bytes. Readers: the latest, the latest that is another thread, and the
// first of the launch, which tells whether an earlier threadgroup read.
struct Cell {
  uint64_t writer_pc, reader_pc, other_pc;
  uint32_t writer, writer_stamp, reader, reader_stamp, other, other_stamp, first;
  bool written, read, read_by_other, atomic, many, foreign;
};
static_assert(sizeof(Cell) == 64);  // build.py's RECORD

struct Region {
  char* data = nullptr;
  size_t size = 0, committed = 0, start = 0;
  uint32_t granule = 0;  // log2 of the bytes of a cell
  bool writable = false, initialised = false, threadgroup = false;
  std::vector<Cell> cells;
};

enum Kind : int32_t {  // launch.py's _Kind
  kNone, kOutOfBounds, kRace, kUninitialised, kReadOnly, kDivergence, kMemoryLimit, kUndefined, kRunaway, kWild, kFault,
  kInactiveLane, kUnsupported,
};

enum Space { kDevice, kThreadgroup };

// One error, for Python to put into words. who, other: threads, as threadgroup * threads of a full threadgroup + index.
struct Report {
  int32_t kind, slot, write, other_write, line, other_line;
  int64_t offset, size;
  uint64_t pc, other_pc, who, other;
  const char *file, *other_file, *text;
};

struct Thread {  // what the kernel's attributes say; shim/metal_stdlib declares the same
  uint32_t position_in_grid[3], position_in_threadgroup[3], threadgroup_position[3], threads_per_threadgroup[3],
      full_threads_per_threadgroup[3], threads_per_grid[3], threadgroups_per_grid[3];
  uint32_t index_in_threadgroup, index_in_simdgroup, simdgroup, simdgroups;
};

struct Launch {
  void (*entry)(void* const* buffers, const Thread*);
  void* const* buffers;
  uint32_t grid[3], threadgroup[3];
  uint32_t order;  // 0 forward, 1 reverse, 2 random
  uint32_t flush;  // subnormal numbers of 32 bits are 0, as operands and as results
  uint64_t seed, steps, next;  // next: how many threadgroups have run
  Report report;
};

enum State : uint8_t { kReady, kBarrier, kSimd, kDone };

struct Fiber {
  void* sp;
  char* stack;
  State state;
  Thread thread;
  uint32_t uid, flags;
  int kind, line;
  const char* file;
  uint64_t steps;
};

struct Simdgroup {
  uint32_t arrived, live, parity, synced[2];  // synced: the stamp of the last simdgroup_barrier by memory space
  alignas(64) char slots[2][kWidth][64];
};

char* arena = nullptr;
Region regions[kSlots];
std::vector<char*> stacks;
std::vector<Fiber> fibers;
std::vector<Simdgroup> simdgroups;
Fiber* current = nullptr;
Launch* launch = nullptr;
void* scheduler_sp = nullptr;
uint32_t stamp, threadgroup_start, synced[2];  // stamps grow with every barrier; synced: the threadgroup's, by space
uint32_t first_uid, threads;                   // of the running threadgroup
size_t threadgroup_memory;
uintptr_t image_begin, image_end;  // the kernel's own constants

extern "C" void emulator_switch(void** save, void* to);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
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
.size emulator_switch, .-emulator_switch
)");

void yield() { emulator_switch(&current->sp, scheduler_sp); }

// The running thread never continues: the scheduler sees the report and ends the launch.
[[noreturn]] void fail(const Report& report) {
  launch->report = report;
  launch->report.who = current ? current->uid : 0;
  for (;;) yield();
}

Report at(Kind kind, void* pc) {
  Report report{};
  report.kind = kind;
  report.pc = uint64_t(pc);
  report.slot = -1;
  return report;
}

}  // namespace
