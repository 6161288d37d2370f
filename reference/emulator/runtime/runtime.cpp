// Runs a kernel's threads as fibers of one CPU thread and classifies every memory access before it happens.
//
// Kernels are compiled with -fsanitize=thread,undefined and -fsanitize-coverage=trace-pc; this library, not the
// sanitizers' runtimes, supplies the functions those options call. Threadgroups run one after another, the threads of
// one threadgroup each until its next barrier or simd operation. x86-64 Linux only.
#include <immintrin.h>

#include <numeric>

#include "access.h"
#include "faults.h"
#include "threads.h"

static uint64_t nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return uint64_t(now.tv_sec) * 1'000'000'000 + uint64_t(now.tv_nsec);
}

// ---------------------------------------------------------------------------------------------------------------------
// What Python calls

extern "C" int emulator_init() {
  if (arena) return 0;
  void* memory = mmap(nullptr, uintptr_t(kSlots) << kSlotBits, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return 1;
  arena = static_cast<char*>(memory);
  return 0;
}

extern "C" size_t emulator_available() { return available(); }

// Memory for a buffer of `size` bytes, `skew` bytes after a page's start. item: bytes of an element.
extern "C" char* emulator_place(int slot, size_t size, size_t skew, uint32_t item, int writable, int initialised) {
  Region& region = regions[slot];
  const size_t records = writable ? (size >> __builtin_ctz(item)) * sizeof(Cell) : 0;
  if (size + skew > kMiddle || size + records > available() || !commit(region, slot, size, skew)) return nullptr;
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

// Runs threadgroups for a quarter of a second, or to the end; launch->next counts them. Python may be interrupted between.
extern "C" void emulator_launch(Launch* what) {
  launch = what;
  uint32_t count[3];
  for (int i = 0; i < 3; ++i) count[i] = (what->grid[i] + what->threadgroup[i] - 1) / what->threadgroup[i];
  const uint64_t groups = uint64_t(count[0]) * count[1] * count[2];
  static uint64_t factor, first;  // of the random order, factor * i + first: a list would take memory
  if (what->next == 0) {
    launch->report = Report{};
    stamp = 1;
    random_state = what->seed;
    dl_iterate_phdr(find_image, reinterpret_cast<void*>(what->entry));
    first = random_below(uint32_t(groups));
    do factor = 1 + random_below(uint32_t(groups));
    while (std::gcd(factor, groups) != 1);
  }
  take_signals();
  const uint32_t control = _mm_getcsr();  // fibers do not change it
  if (what->flush) _mm_setcsr(control | _MM_FLUSH_ZERO_ON | 0x40);  // 0x40: subnormal operands are zero
  const uint64_t begin = nanoseconds();
  while (what->next < groups && !launch->report.kind) {
    const uint64_t i = what->next++;
    const uint64_t at = what->order == 0 ? i : what->order == 1 ? groups - 1 - i : (factor * i + first) % groups;
    run_threadgroup(uint32_t(at % count[0]), uint32_t(at / count[0] % count[1]), uint32_t(at / count[0] / count[1]),
                    uint32_t(at));
    if (nanoseconds() - begin > 250'000'000) break;
  }
  _mm_setcsr(control);
  give_signals_back();
  for (Fiber& fiber : fibers) {
    if (fiber.stack) stacks.push_back(fiber.stack);
    fiber.stack = nullptr;
  }
  for (int slot = kFirstThreadgroupSlot; slot < kSlots; ++slot) regions[slot].size = 0;
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
// What kernels call through shim/metal_stdlib

extern "C" void* emulator_threadgroup(uint32_t index, size_t size, uint32_t item) {
  const int slot = kFirstThreadgroupSlot + int(index);
  if (slot >= kSlots) {
    Report report = at(kUnsupported, __builtin_return_address(0));
    report.text = "declares more threadgroup variables than the 96 that the emulator has room for";
    fail(report);
  }
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
