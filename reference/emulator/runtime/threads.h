// Fibers, their order, and what they wait for: barriers and simd operations.
#pragma once
#include <string.h>
#include <sys/mman.h>

#include <algorithm>

#include "state.h"

namespace {

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

}  // namespace
