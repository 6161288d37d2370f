// Runs a kernel's threads as fibers of one CPU thread and classifies every memory access before it happens.
//
// Kernels are compiled with -fsanitize=thread,undefined and -fsanitize-coverage=trace-pc; this file, not the sanitizers'
// runtimes, supplies the functions those options call. Threadgroups run one after another, the threads of one
// threadgroup each until its next barrier or simd operation. x86-64 Linux only.
#include <link.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <vector>

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Memory: each buffer and each threadgroup variable has 64 GB of address space of its own, mapped where the data is.

constexpr int kSlotBits = 36, kSlots = 64, kFirstThreadgroupSlot = 40;
constexpr uintptr_t kMiddle = uintptr_t(1) << (kSlotBits - 1);  // indices below zero stay in the buffer's own slot
constexpr size_t kPage = 4096, kStack = 256 * 1024, kThreadgroupLimit = 32768;
constexpr uint32_t kWidth = 32;  // threads of a simdgroup

// What is known of the accesses to `granule` bytes. Readers: the latest, the latest that is another thread, and the
// first of the launch, which tells whether an earlier threadgroup read.
struct Cell {
  uint64_t writer_pc, reader_pc, other_pc;
  uint32_t writer, writer_stamp, reader, reader_stamp, other, other_stamp, first;
  bool written, read, read_by_other, atomic, many, foreign;
};

struct Region {
  char* data = nullptr;
  size_t size = 0, committed = 0, start = 0;
  uint32_t granule = 0;  // log2 of the bytes of a cell
  bool writable = false, initialised = false, threadgroup = false;
  std::vector<Cell> cells;
};

enum Kind : int32_t {  // launch.py's _Kind
  kNone, kOutOfBounds, kRace, kUninitialised, kReadOnly, kDivergence, kMemoryLimit, kUndefined, kRunaway, kWild, kFault,
  kInactiveLane,
};

enum Space { kDevice, kThreadgroup };

// One error, for Python to put into words. who, other: threads, as threadgroup * threads of a full threadgroup + index.
struct Report {
  int32_t kind, slot, write, other_write, line, other_line;
  int64_t offset, size;
  uint64_t pc, other_pc, who, other;
  const char *file, *other_file, *text;
};

struct Thread {  // what the kernel's attributes say; shim/emulator.h declares the same
  uint32_t position_in_grid[3], position_in_threadgroup[3], threadgroup_position[3], threads_per_threadgroup[3],
      full_threads_per_threadgroup[3], threads_per_grid[3], threadgroups_per_grid[3];
  uint32_t index_in_threadgroup, index_in_simdgroup, simdgroup, simdgroups;
};

struct Launch {
  void (*entry)(void* const* buffers, const Thread*);
  void* const* buffers;
  uint32_t grid[3], threadgroup[3];
  uint32_t order;  // 0 forward, 1 reverse, 2 random
  uint64_t seed, steps;
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
uintptr_t image_begin, image_end, code_end;  // the kernel's own constants

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

// ---------------------------------------------------------------------------------------------------------------------
// Accesses

bool same_threadgroup(uint32_t uid) { return uid - first_uid < threads; }

// Whether what thread `uid` did at `when` is ordered before what the current thread does now.
bool ordered(uint32_t uid, uint32_t when, Space space) {
  if (uid == current->uid) return true;
  if (!same_threadgroup(uid)) return false;
  if (when <= synced[space]) return true;
  const uint32_t simdgroup = current->thread.simdgroup;
  return (uid - first_uid) / kWidth == simdgroup && when <= simdgroups[simdgroup].synced[space];
}

void use_bytes(Region& region) {
  const size_t factor = size_t(1) << region.granule;
  std::vector<Cell> cells(region.size);
  for (size_t i = 0; i < cells.size(); ++i) cells[i] = region.cells[i / factor];
  region.cells.swap(cells);
  region.granule = 0;
}

[[noreturn, gnu::noinline]] void report_access(Kind kind, int slot, uintptr_t offset, size_t size, bool write, void* pc) {
  Report report = at(kind, pc);
  report.slot = slot;
  report.offset = int64_t(offset);
  report.size = int64_t(size);
  report.write = write;
  fail(report);
}

[[noreturn, gnu::noinline]] void report_race(int slot, uintptr_t offset, size_t size, bool write, void* pc, uint32_t other,
                                             bool other_write, uint64_t other_pc) {
  Report report = at(kRace, pc);
  report.slot = slot;
  report.offset = int64_t(offset);
  report.size = int64_t(size);
  report.write = write;
  report.other = other;
  report.other_write = other_write;
  report.other_pc = other_pc;
  fail(report);
}

[[gnu::noinline]] void outside(uintptr_t address, size_t size, bool write, void* pc) {
  const uintptr_t stack = uintptr_t(current->stack);
  if (address >= stack && address + size <= stack + kStack) return;
  if (address >= image_begin && address + size <= image_end && !write) return;
  if (address - uintptr_t(fibers.data()) < fibers.size() * sizeof(Fiber) && !write) return;  // the entry's arguments
  if (address - uintptr_t(launch->buffers) < kSlots * sizeof(void*) && !write) return;
  report_access(address >= image_begin && address < image_end ? kReadOnly : kWild, -1, address, size, write, pc);
}

// needed: whether the access uses what was there before.
void access(void* pointer, size_t size, bool write, bool atomic, bool needed, void* pc) {
  if (!current) return;
  const uintptr_t place = uintptr_t(pointer) - uintptr_t(arena);
  if (place >= uintptr_t(kSlots) << kSlotBits) return outside(uintptr_t(pointer), size, write, pc);
  const int slot = int(place >> kSlotBits);
  Region& region = regions[slot];
  const uintptr_t offset = uintptr_t(pointer) - uintptr_t(region.data);
  if (offset >= region.size || region.size - offset < size) {
    report_access(kOutOfBounds, slot, offset, size, write, pc);
  }
  if (!region.writable) {
    if (write) report_access(kReadOnly, slot, offset, size, write, pc);
    return;
  }
  if (((offset | size) & ((size_t(1) << region.granule) - 1)) != 0) use_bytes(region);
  const Space space = region.threadgroup ? kThreadgroup : kDevice;
  Cell* cell = &region.cells[offset >> region.granule];
  for (size_t left = size >> region.granule; left != 0; --left, ++cell) {
    if (region.threadgroup && cell->writer_stamp < threadgroup_start && cell->reader_stamp < threadgroup_start) {
      *cell = Cell{};  // left from an earlier threadgroup
    }
    bool conflict = false;  // with the last writer, or with one of several by atomics
    if (cell->written && !(atomic && cell->atomic)) {
      conflict = cell->foreign || (cell->many && cell->writer_stamp > synced[space]) ||
                 !ordered(cell->writer, cell->writer_stamp, space);
    }
    if (conflict) report_race(slot, offset, size, write, pc, cell->writer, true, cell->writer_pc);
    if (needed && !cell->written && !region.initialised) report_access(kUninitialised, slot, offset, size, false, pc);
    if (write) {
      if (cell->read && !ordered(cell->reader, cell->reader_stamp, space)) {
        report_race(slot, offset, size, true, pc, cell->reader, false, cell->reader_pc);
      }
      if (cell->read_by_other && !ordered(cell->other, cell->other_stamp, space)) {
        report_race(slot, offset, size, true, pc, cell->other, false, cell->other_pc);
      }
      if (cell->read && !same_threadgroup(cell->first)) {
        report_race(slot, offset, size, true, pc, cell->first, false, 0);
      }
      const bool again = cell->written && cell->atomic && atomic && cell->writer != current->uid;
      cell->many = again && (cell->many || cell->writer_stamp > synced[space]);
      cell->foreign = again && (cell->foreign || !same_threadgroup(cell->writer));
      cell->written = true;
      cell->atomic = atomic;
      cell->writer = current->uid;
      cell->writer_stamp = stamp;
      cell->writer_pc = uint64_t(pc);
    } else if (!atomic) {
      if (!cell->read) {
        cell->read = true;
        cell->first = current->uid;
      } else if (cell->reader != current->uid) {
        cell->read_by_other = true;
        cell->other = cell->reader;
        cell->other_stamp = cell->reader_stamp;
        cell->other_pc = cell->reader_pc;
      }
      cell->reader = current->uid;
      cell->reader_stamp = stamp;
      cell->reader_pc = uint64_t(pc);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Scheduling

uint64_t random_state;
uint32_t random_below(uint32_t n) {
  random_state += 0x9e3779b97f4a7c15ull;
  uint64_t z = random_state;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return uint32_t(((z ^ (z >> 31)) >> 32) * n >> 32);
}

void put_in_order(std::vector<uint32_t>& order) {
  if (launch->order == 1) {
    std::reverse(order.begin(), order.end());
  } else if (launch->order == 2) {
    for (uint32_t i = uint32_t(order.size()); i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
  }
}

void body() {
  launch->entry(launch->buffers, &current->thread);
  current->state = kDone;
  for (;;) yield();
}

void start(Fiber& fiber) {
  if (stacks.empty()) {
    char* memory = static_cast<char*>(mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    mprotect(memory, kPage, PROT_NONE);
    stacks.push_back(memory + kPage);
  }
  fiber.stack = stacks.back();
  stacks.pop_back();
  void** top = reinterpret_cast<void**>(fiber.stack + kStack);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(body);
  top -= 6;
  fiber.sp = top;
}

void run(Fiber& fiber) {
  if (!fiber.stack) start(fiber);
  current = &fiber;
  emulator_switch(&scheduler_sp, fiber.sp);
  current = nullptr;
  if (fiber.state == kDone || launch->report.kind) {
    stacks.push_back(fiber.stack);
    fiber.stack = nullptr;
  }
}

void diverged(const Fiber& one, const Fiber& other) {
  Report report = at(kDivergence, nullptr);
  report.who = one.uid;
  report.line = one.line;
  report.file = one.file;
  report.write = one.state;
  report.other = other.uid;
  report.other_line = other.line;
  report.other_file = other.file;
  report.other_write = other.state;
  launch->report = report;
}

bool same_place(const Fiber& a, const Fiber& b) {
  return a.state == b.state && a.kind == b.kind && a.line == b.line && !strcmp(a.file, b.file);
}

// Lets a simdgroup go on once all its threads have arrived at the same operation.
void meet(uint32_t group) {
  Simdgroup& simdgroup = simdgroups[group];
  const uint32_t begin = group * kWidth, end = std::min(begin + kWidth, threads);
  for (uint32_t i = begin; i < end; ++i) {
    if (!same_place(fibers[begin], fibers[i])) return diverged(fibers[begin], fibers[i]);
  }
  if (fibers[begin].kind == 0) {  // simdgroup_barrier
    for (int space = 0; space < 2; ++space) {
      if (fibers[begin].flags & (1u << space)) simdgroup.synced[space] = stamp;
    }
    ++stamp;
  }
  simdgroup.arrived = 0;
  for (uint32_t i = begin; i < end; ++i) fibers[i].state = kReady;
}

void cross_barrier() {
  uint32_t flags = ~0u;
  for (uint32_t i = 0; i < threads; ++i) {
    if (!same_place(fibers[0], fibers[i])) return diverged(fibers[0], fibers[i]);
    flags &= fibers[i].flags;
  }
  for (int space = 0; space < 2; ++space) {
    if (flags & (1u << space)) synced[space] = stamp;
  }
  ++stamp;
  for (uint32_t i = 0; i < threads; ++i) fibers[i].state = kReady;
}

// No thread can go on: some wait for others that have ended or wait elsewhere.
void stuck() {
  for (uint32_t i = 0; i < threads; ++i) {
    if (fibers[i].state == kDone) continue;
    const bool simd = fibers[i].state == kSimd;
    const uint32_t begin = simd ? i / kWidth * kWidth : 0, end = simd ? std::min(begin + kWidth, threads) : threads;
    for (uint32_t k = begin; k < end; ++k) {
      if (!same_place(fibers[i], fibers[k])) return diverged(fibers[i], fibers[k]);
    }
  }
}

void run_threadgroup(uint32_t x, uint32_t y, uint32_t z, uint32_t linear) {
  const uint32_t position[3] = {x, y, z};
  uint32_t size[3], count[3];
  for (int i = 0; i < 3; ++i) {
    size[i] = std::min(launch->threadgroup[i], launch->grid[i] - position[i] * launch->threadgroup[i]);
    count[i] = (launch->grid[i] + launch->threadgroup[i] - 1) / launch->threadgroup[i];
  }
  threads = size[0] * size[1] * size[2];
  first_uid = linear * launch->threadgroup[0] * launch->threadgroup[1] * launch->threadgroup[2];
  ++stamp;
  threadgroup_start = stamp;
  synced[0] = synced[1] = stamp - 1;
  threadgroup_memory = 0;
  for (int slot = kFirstThreadgroupSlot; slot < kSlots; ++slot) regions[slot].start = 0;

  const uint32_t n_simdgroups = (threads + kWidth - 1) / kWidth;
  if (fibers.size() < threads) fibers.resize(threads);
  if (simdgroups.size() < n_simdgroups) simdgroups.resize(n_simdgroups);
  for (uint32_t i = 0; i < n_simdgroups; ++i) {
    simdgroups[i].arrived = 0;
    simdgroups[i].parity = 0;
    simdgroups[i].live = std::min(kWidth, threads - i * kWidth);
    simdgroups[i].synced[0] = simdgroups[i].synced[1] = stamp - 1;
  }
  for (uint32_t i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.stack = nullptr;
    fiber.state = kReady;
    fiber.uid = first_uid + i;
    fiber.line = 0;
    fiber.kind = -1;
    fiber.file = "";
    fiber.steps = launch->steps;
    Thread& t = fiber.thread;
    const uint32_t inside[3] = {i % size[0], i / size[0] % size[1], i / (size[0] * size[1])};
    for (int k = 0; k < 3; ++k) {
      t.position_in_threadgroup[k] = inside[k];
      t.threadgroup_position[k] = position[k];
      t.position_in_grid[k] = position[k] * launch->threadgroup[k] + inside[k];
      t.threads_per_threadgroup[k] = size[k];
      t.full_threads_per_threadgroup[k] = launch->threadgroup[k];
      t.threads_per_grid[k] = launch->grid[k];
      t.threadgroups_per_grid[k] = count[k];
    }
    t.index_in_threadgroup = i;
    t.index_in_simdgroup = i % kWidth;
    t.simdgroup = i / kWidth;
    t.simdgroups = n_simdgroups;
  }

  std::vector<uint32_t> order(threads);
  for (uint32_t i = 0; i < threads; ++i) order[i] = i;
  put_in_order(order);
  for (;;) {
    bool ran = false, done = true, at_barrier = true;
    for (uint32_t i : order) {
      Fiber& fiber = fibers[i];
      if (fiber.state != kReady) continue;
      ran = true;
      run(fiber);
      if (launch->report.kind) return;
      if (fiber.state == kSimd && ++simdgroups[i / kWidth].arrived == simdgroups[i / kWidth].live) meet(i / kWidth);
      if (launch->report.kind) return;
    }
    for (uint32_t i = 0; i < threads; ++i) {
      done &= fibers[i].state == kDone;
      at_barrier &= fibers[i].state == kBarrier;
    }
    if (done) return;
    if (at_barrier) {
      cross_barrier();
    } else if (!ran) {
      stuck();
    }
    if (launch->report.kind) return;
    if (launch->order == 2) put_in_order(order);
  }
}

struct sigaction old_actions[3];
constexpr int kSignals[3] = {SIGSEGV, SIGBUS, SIGFPE};

void on_fault(int signal, siginfo_t* info, void*) {
  if (!current) {  // not the kernel's fault: as if this handler were not here
    for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &old_actions[i], nullptr);
    return;
  }
  Report report = at(kFault, nullptr);
  const uintptr_t address = uintptr_t(info->si_addr), place = address - uintptr_t(arena);
  report.text = signal == SIGFPE ? "divides by zero"
                : address < uintptr_t(current->stack) && uintptr_t(current->stack) - address <= kPage
                    ? "needs more than 256 KiB of stack"
                    : "touches memory that no buffer has";
  if (place < uintptr_t(kSlots) << kSlotBits) {
    report.slot = int(place >> kSlotBits);
    report.offset = int64_t(address - uintptr_t(regions[report.slot].data));
  }
  fail(report);
}

int find_image(dl_phdr_info* info, size_t, void* wanted) {
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) continue;
    const uintptr_t begin = info->dlpi_addr + header.p_vaddr, end = begin + header.p_memsz;
    if (uintptr_t(wanted) < begin || uintptr_t(wanted) >= end) continue;
    image_begin = UINTPTR_MAX;
    image_end = 0;
    for (int k = 0; k < info->dlpi_phnum; ++k) {
      const auto& part = info->dlpi_phdr[k];
      if (part.p_type != PT_LOAD) continue;
      image_begin = std::min(image_begin, uintptr_t(info->dlpi_addr + part.p_vaddr));
      image_end = std::max(image_end, uintptr_t(info->dlpi_addr + part.p_vaddr + part.p_memsz));
    }
    return 1;
  }
  return 0;
}

bool commit(Region& region, int slot, size_t size, size_t skew) {
  region.data = arena + (uintptr_t(slot) << kSlotBits) + kMiddle + skew;
  region.size = size;
  const size_t needed = (size + skew + kPage - 1) / kPage * kPage;
  if (needed <= region.committed) return true;
  if (mprotect(region.data - skew, needed, PROT_READ | PROT_WRITE)) return false;
  region.committed = needed;
  return true;
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// What Python calls

extern "C" int emulator_init() {
  if (arena) return 0;
  void* memory = mmap(nullptr, uintptr_t(kSlots) << kSlotBits, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return 1;
  arena = static_cast<char*>(memory);
  return 0;
}

// Memory for a buffer of `size` bytes, `skew` bytes after a page's start. item: bytes of an element.
extern "C" char* emulator_place(int slot, size_t size, size_t skew, uint32_t item, int writable, int initialised) {
  Region& region = regions[slot];
  if (!commit(region, slot, size, skew)) return nullptr;
  region.writable = writable;
  region.initialised = initialised;
  region.granule = uint32_t(__builtin_ctz(item));
  region.cells.assign(writable ? size >> region.granule : 0, Cell{});
  return region.data;
}

// Gives a buffer's memory back, so that a later access to it is out of bounds.
extern "C" void emulator_release(int slot) {
  Region& region = regions[slot];
  if (region.committed > (size_t(1) << 22)) {
    madvise(arena + (uintptr_t(slot) << kSlotBits) + kMiddle, region.committed, MADV_DONTNEED);
    std::vector<Cell>().swap(region.cells);
  }
  region.size = 0;
}

extern "C" void emulator_launch(Launch* what) {
  launch = what;
  launch->report = Report{};
  stamp = 1;
  random_state = what->seed;
  dl_iterate_phdr(find_image, reinterpret_cast<void*>(what->entry));

  static char alternate[64 * 1024];
  stack_t handler_stack{alternate, 0, sizeof alternate}, old_stack;
  sigaltstack(&handler_stack, &old_stack);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &action, &old_actions[i]);

  uint32_t count[3];
  for (int i = 0; i < 3; ++i) count[i] = (what->grid[i] + what->threadgroup[i] - 1) / what->threadgroup[i];
  std::vector<uint32_t> order(count[0] * count[1] * count[2]);
  for (uint32_t i = 0; i < order.size(); ++i) order[i] = i;
  put_in_order(order);
  for (uint32_t i : order) {
    run_threadgroup(i % count[0], i / count[0] % count[1], i / (count[0] * count[1]), i);
    if (launch->report.kind) break;
  }
  for (Fiber& fiber : fibers) {
    if (fiber.stack) stacks.push_back(fiber.stack);
    fiber.stack = nullptr;
  }
  for (int slot = kFirstThreadgroupSlot; slot < kSlots; ++slot) regions[slot].size = 0;
  for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &old_actions[i], nullptr);
  sigaltstack(&old_stack, nullptr);
  launch = nullptr;
}

// The first byte of a buffer that the launch left unwritten, -1 if there is none; *count: how many cells.
extern "C" int64_t emulator_unwritten(int slot, int64_t* count) {
  const Region& region = regions[slot];
  int64_t first = -1;
  *count = 0;
  for (size_t i = 0; i < region.cells.size(); ++i) {
    if (region.cells[i].written) continue;
    if (first < 0) first = int64_t(i << region.granule);
    ++*count;
  }
  return first;
}

// ---------------------------------------------------------------------------------------------------------------------
// What kernels call through shim/emulator.h

extern "C" void* emulator_threadgroup(uint32_t index, size_t size, uint32_t item) {
  const int slot = kFirstThreadgroupSlot + int(index);
  Region& region = regions[slot];
  if (!region.start) {  // the first thread of this threadgroup that comes here
    threadgroup_memory += (size + 15) / 16 * 16;
    if (threadgroup_memory > kThreadgroupLimit) {
      Report report = at(kMemoryLimit, __builtin_return_address(0));
      report.size = int64_t(threadgroup_memory);
      fail(report);
    }
    region.start = 1;
    if (region.size != size) {
      commit(region, slot, size, 0);
      region.writable = region.threadgroup = true;
      region.granule = item == 1 || item == 2 || item == 4 || item == 8 ? uint32_t(__builtin_ctz(item)) : 0;
      region.cells.assign(size >> region.granule, Cell{});
    }
    memset(region.data, 0xff, size);  // NaN
  }
  return region.data;
}

extern "C" void emulator_barrier(uint32_t flags, const char* file, int line) {
  current->flags = flags;
  current->kind = 0;
  current->file = file;
  current->line = line;
  current->state = kBarrier;
  yield();
}

// Hands `value` to the simdgroup and returns what all its threads handed over, 64 bytes a thread, once all have.
extern "C" const char* emulator_simd(int kind, const void* value, uint32_t size, uint32_t flags, const char* file, int line) {
  Simdgroup& simdgroup = simdgroups[current->thread.simdgroup];
  char(*slots)[64] = simdgroup.slots[simdgroup.parity & 1];
  memcpy(slots[current->thread.index_in_simdgroup], value, size);
  current->flags = flags;
  current->kind = kind;
  current->file = file;
  current->line = line;
  current->state = kSimd;
  const uint32_t parity = simdgroup.parity;
  yield();
  if (simdgroup.parity == parity) ++simdgroup.parity;  // the first to go on; two sets, as others may still read this one
  return slots[0];
}

extern "C" uint32_t emulator_lane() { return current->thread.index_in_simdgroup; }
extern "C" uint32_t emulator_lanes() { return simdgroups[current->thread.simdgroup].live; }

extern "C" void emulator_inactive_lane(uint32_t lane, const char* file, int line) {
  Report report = at(kInactiveLane, nullptr);
  report.offset = lane;
  report.size = emulator_lanes();
  report.file = file;
  report.line = line;
  fail(report);
}

extern "C" void emulator_atomic(void* pointer, uint32_t size, int mode) {
  enum { kLoad, kChange, kStore };  // the numbers stand in shim/metal_stdlib
  access(pointer, size, mode != kLoad, true, mode != kStore, __builtin_return_address(0));
}

// ---------------------------------------------------------------------------------------------------------------------
// What -fsanitize=thread calls

#define READ(name, size) \
  extern "C" void __tsan_##name(void* p) { access(p, size, false, false, true, __builtin_return_address(0)); }
#define WRITE(name, size) \
  extern "C" void __tsan_##name(void* p) { access(p, size, true, false, false, __builtin_return_address(0)); }
#define SIZE(n)                                                        \
  READ(read##n, n) READ(unaligned_read##n, n) READ(volatile_read##n, n) \
  WRITE(write##n, n) WRITE(unaligned_write##n, n) WRITE(volatile_write##n, n)
SIZE(1) SIZE(2) SIZE(4) SIZE(8) SIZE(16)
extern "C" void __tsan_read_range(void* p, size_t n) { access(p, n, false, false, true, __builtin_return_address(0)); }
extern "C" void __tsan_write_range(void* p, size_t n) { access(p, n, true, false, false, __builtin_return_address(0)); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}

// What -fsanitize-coverage=trace-pc calls on every basic block: no kernel runs for ever.
extern "C" void __sanitizer_cov_trace_pc() {
  if (current && --current->steps == 0) fail(at(kRunaway, __builtin_return_address(0)));
}

// ---------------------------------------------------------------------------------------------------------------------
// What -fsanitize=undefined calls. Every record starts with the place in the source.

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

static void undefined(const SourceLocation* place, const char* text) {
  if (!current) return;
  Report report = at(kUndefined, nullptr);
  report.file = place->file;
  report.line = int32_t(place->line);
  report.text = text;
  fail(report);
}

#define UNDEFINED(name, text) \
  extern "C" void __ubsan_handle_##name(const SourceLocation* place) { undefined(place, text); }
UNDEFINED(out_of_bounds, "index outside the array")
UNDEFINED(shift_out_of_bounds, "shift by the width of the type or more")
UNDEFINED(divrem_overflow, "division by zero, or of the smallest integer by -1")
UNDEFINED(add_overflow, "signed integer overflow in an addition")
UNDEFINED(sub_overflow, "signed integer overflow in a subtraction")
UNDEFINED(mul_overflow, "signed integer overflow in a multiplication")
UNDEFINED(negate_overflow, "signed integer overflow in a negation")
UNDEFINED(float_cast_overflow, "conversion of a float that the integer type cannot hold")
UNDEFINED(type_mismatch_v1, "access through a null or misaligned pointer")
UNDEFINED(builtin_unreachable, "a place that cannot be reached")
UNDEFINED(missing_return, "the end of a function that returns a value")
