// Signals: a kernel that faults, or loops where no basic block counts its steps, ends in a report.
#pragma once
#include <link.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>

#include "state.h"

namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGVTALRM};
constexpr int kSignalCount = sizeof kSignals / sizeof *kSignals;
struct sigaction old_actions[kSignalCount];
stack_t old_stack;
timer_t watchdog;
bool watched;
const Fiber* last_fiber;  // what ran at the watchdog's last tick
uint64_t last_steps;

bool in_kernel(uintptr_t address) { return address >= image_begin && address < image_end; }

// The compiler counts no steps in a block without instructions: `while (true) {}` stays where it is between two ticks.
void on_tick(uintptr_t pc) {
  if (!current || !in_kernel(pc)) return;
  const bool stands = current == last_fiber && current->steps == last_steps;
  last_fiber = current;
  last_steps = current->steps;
  if (stands) fail(at(kRunaway, reinterpret_cast<void*>(pc + 1)));
}

void on_signal(int signal, siginfo_t* info, void* context) {
  const uintptr_t pc = uintptr_t(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
  if (signal == SIGVTALRM) return on_tick(pc);
  if (!current) {  // not the kernel's fault: as if this handler were not here
    for (int i = 0; i < kSignalCount; ++i) sigaction(kSignals[i], &old_actions[i], nullptr);
    return;
  }
  Report report = at(kFault, in_kernel(pc) ? reinterpret_cast<void*>(pc + 1) : nullptr);
  const uintptr_t address = uintptr_t(info->si_addr), place = address - uintptr_t(arena);
  if (signal == SIGFPE) {
    report.text = "divides by zero";
  } else if (signal != SIGSEGV && signal != SIGBUS) {
    report.text = "executes what ends a program: a trap, abort() or an instruction that does not exist";
  } else if (address < uintptr_t(current->stack) && uintptr_t(current->stack) - address <= kPage) {
    report.text = "needs more than 256 KiB of stack";
  } else {
    report.text = "touches memory that no buffer has";
  }
  if (place < uintptr_t(kSlots) << kSlotBits) {
    report.slot = int(place >> kSlotBits);
    report.offset = int64_t(address - uintptr_t(regions[report.slot].data));
  }
  fail(report);
}

void take_signals() {
  static char alternate[64 * 1024];
  stack_t handler_stack{};
  handler_stack.ss_sp = alternate;
  handler_stack.ss_size = sizeof alternate;
  sigaltstack(&handler_stack, &old_stack);
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK | SA_RESTART;
  for (int i = 0; i < kSignalCount; ++i) sigaction(kSignals[i], &action, &old_actions[i]);

  last_fiber = nullptr;
  struct sigevent event = {};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = SIGVTALRM;
  event._sigev_un._tid = int(syscall(SYS_gettid));
  watched = timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &watchdog) == 0;
  const itimerspec half_a_second = {{0, 500'000'000}, {0, 500'000'000}};
  if (watched) timer_settime(watchdog, 0, &half_a_second, nullptr);
}

void give_signals_back() {
  if (watched) timer_delete(watchdog);
  for (int i = 0; i < kSignalCount; ++i) sigaction(kSignals[i], &old_actions[i], nullptr);
  sigaltstack(&old_stack, nullptr);
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

}  // namespace
