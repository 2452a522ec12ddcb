/* Lanes as fibers: their stacks, the switch between them, and memory faults on them.
 * A fault on a lane's stack ends its threadgroup with a report; any other is left to whoever handled it before. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "runtime.h"

enum { LANE_DATA_BYTES = 8192, PAGE = 4096 };

__asm__(
    ".text\n"
    ".globl emu_switch\n"
    ".hidden emu_switch\n"
    ".type emu_switch,@function\n"
    "emu_switch:\n"
    "  pushq %rbp\n"
    "  pushq %rbx\n"
    "  pushq %r12\n"
    "  pushq %r13\n"
    "  pushq %r14\n"
    "  pushq %r15\n"
    "  movq %rsp,(%rdi)\n"
    "  movq %rsi,%rsp\n"
    "  popq %r15\n"
    "  popq %r14\n"
    "  popq %r13\n"
    "  popq %r12\n"
    "  popq %rbx\n"
    "  popq %rbp\n"
    "  popq %rcx\n"
    "  jmp *%rcx\n"
    ".size emu_switch,.-emu_switch\n");

void emu_stacks_need(uint64_t count) {
    struct emu_worker *worker = emu_worker;
    if (worker->stack_count >= count) return;
    if (worker->stacks) munmap(worker->stacks, worker->stack_bytes);
    uint64_t bytes = count * EMU_STACK_BYTES;
    char *map = mmap(NULL, bytes + EMU_STACK_BYTES, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) abort();
    char *aligned = (char *)(((uintptr_t)map + EMU_STACK_BYTES - 1) & ~(EMU_STACK_BYTES - 1));
    if (aligned > map) munmap(map, (size_t)(aligned - map));
    if (map + EMU_STACK_BYTES > aligned) munmap(aligned + bytes, (size_t)(map + EMU_STACK_BYTES - aligned));
    /* A lane's data lies below, its stack grows down towards it: a page between them turns overflow into a fault. */
    for (uint64_t i = 0; i < count; i++) mprotect(aligned + i * EMU_STACK_BYTES + LANE_DATA_BYTES, PAGE, PROT_NONE);
    worker->stacks = aligned;
    worker->stack_count = count;
    worker->stack_bytes = bytes;
}

void emu_lane_start(struct emu_lane *lane, uint64_t stack, void (*entry)(void)) {
    uint64_t colour = (uint64_t)(uintptr_t)lane - stack;
    uint64_t *top = (uint64_t *)(stack + EMU_STACK_BYTES - 64 - colour);
    *--top = 0; /* where a return address would be: keeps the stack aligned as after a call */
    *--top = (uint64_t)(uintptr_t)entry;
    for (int i = 0; i < 6; i++) *--top = 0;
    lane->stack_pointer = top;
}

_Noreturn void emu_lane_abandon(void) {
    struct emu_worker *worker = emu_worker;
    worker->abort = true;
    atomic_store(&worker->dispatch->failed, true);
    for (uint32_t i = 0; i < worker->simdgroup_count; i++) worker->simdgroups[i].runnable = 0;
    void *dead;
    emu_switch(&dead, worker->scheduler);
    __builtin_unreachable();
}

static struct sigaction before[NSIG];

static void on_fault(int signal_number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    uint64_t stack_pointer = (uint64_t)registers[REG_RSP];
    struct emu_worker *worker = emu_worker;
    if (worker && stack_pointer - (uint64_t)(uintptr_t)worker->stacks < worker->stack_bytes) {
        struct emu_lane *lane = emu_lane_at(stack_pointer);
        const char *address = info->si_addr, *kernel = worker->dispatch->kernel->name;
        const void *place = (const void *)(registers[REG_RIP] + 1);
        uint64_t site = emu_site(NULL, 0, place);
        if (signal_number == SIGFPE)
            emu_report(true, "arithmetic", site, "%s: an integer division traps at %s by %s: by zero, or it overflows", kernel, emu_place(place).text,
                       emu_who(lane).text);
        else if ((uint64_t)(uintptr_t)address - (uint64_t)(uintptr_t)worker->stacks < worker->stack_bytes)
            emu_report(true, "stack", site, "%s: stack overflow at %s by %s: %lu bytes of thread memory are not enough",
                       kernel, emu_place(place).text, emu_who(lane).text, EMU_STACK_BYTES - LANE_DATA_BYTES - PAGE);
        else
            emu_report(true, "bounds", site, "%s: out-of-bounds %s at %s by %s: %s", kernel,
                       registers[REG_ERR] & 2 ? "write" : "read", emu_place(place).text, emu_who(lane).text,
                       emu_nearest(worker->dispatch, address).text);
        registers[REG_RIP] = (greg_t)(uintptr_t)emu_lane_abandon;
        /* from the top: the lane never returns, and after an overflow there is no room below */
        registers[REG_RSP] = (greg_t)((stack_pointer & ~(EMU_STACK_BYTES - 1)) + EMU_STACK_BYTES - LANE_DATA_BYTES - 8);
        return;
    }
    struct sigaction *old = &before[signal_number];
    if (old->sa_flags & SA_SIGINFO && old->sa_sigaction) {
        old->sa_sigaction(signal_number, info, context);
        return;
    }
    sigaction(signal_number, old, NULL); /* returning repeats the fault, for the handler that was there before */
}

static void catch_all(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    const int signals[] = {SIGSEGV, SIGBUS, SIGFPE};
    for (int i = 0; i < 3; i++) sigaction(signals[i], &action, &before[signals[i]]);
}

void emu_faults_catch(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, catch_all);
}
