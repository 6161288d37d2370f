// Classifies an access before it happens: bounds, races, uninitialised reads.
#pragma once
#include <stdio.h>
#include <sys/mman.h>

#include "state.h"

namespace {

// Bytes that can still be used without swapping.
size_t available() {
  size_t kilobytes = 0;
  if (FILE* file = fopen("/proc/meminfo", "r")) {
    char line[128];
    while (fgets(line, sizeof line, file) && sscanf(line, "MemAvailable: %zu", &kilobytes) != 1) {
    }
    fclose(file);
  }
  return kilobytes ? kilobytes * 1024 : SIZE_MAX;
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

bool same_threadgroup(uint32_t uid) { return uid - first_uid < threads; }

// True if what thread `uid` did at `when` is ordered before what the current thread does now.
bool ordered(uint32_t uid, uint32_t when, Space space) {
  if (uid == current->uid) return true;
  if (!same_threadgroup(uid)) return false;
  if (when <= synced[space]) return true;
  const uint32_t simdgroup = current->thread.simdgroup;
  return (uid - first_uid) / kWidth == simdgroup && when <= simdgroups[simdgroup].synced[space];
}

void use_bytes(Region& region) {
  const size_t factor = size_t(1) << region.granule;
  if (region.size * sizeof(Cell) > available()) {
    Report report = at(kUnsupported, nullptr);
    report.text = "accesses parts of elements, whose records would need more memory than there is";
    fail(report);
  }
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
  if (slot >= kFirstThreadgroupSlot && !region.start) return outside(uintptr_t(pointer), size, write, pc);
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

}  // namespace
