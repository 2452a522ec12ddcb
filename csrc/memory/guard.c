/* Reads of a mapped file beyond the end that it has now. See guard.h.
 * The system answers such a read with SIGBUS. The handler puts zeros there, remembers it, and lets the read go on; whoever reads asks
 * afterwards (mm_maps_same), and throws away what came of the zeros. It calls nothing but fstat, mmap and sigaction, takes no lock and
 * no memory: mappings stand in a list whose nodes are never freed, only used again.
 *
 * Every other SIGBUS goes to the handler that was there before. Whoever comes after us (faulthandler.enable(), a crash reporter) puts
 * theirs over ours, keeps ours, and may give it back later or raise the signal again for it. So renewing doesn't move our handler to
 * the top: it adds another one there, a function of its own with a predecessor of its own. Each stands for one place in the chain,
 * as those of strangers would, and a chain that is walked down never comes round. */
#ifdef __linux__
#define _GNU_SOURCE /* MAP_ANONYMOUS, BUS_MCEERR_AO */
#endif
#include "memory/guard.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* ---- the mappings ---- */

struct mm_guard {
    struct mm_guard *next; /* set once, before the node can be seen */
    atomic_bool taken;
    atomic_uint turn; /* odd while the four below change */
    atomic_uintptr_t begin, end;
    _Atomic(const struct mm_map *) map;
    atomic_size_t gone; /* 1 + where the first page begins that was read and not there; 0: none was */
};

static _Atomic(struct mm_guard *) guards;
static atomic_int guarded;

static struct mm_guard *take_node(void) {
    for (struct mm_guard *guard = atomic_load(&guards); guard; guard = guard->next)
        if (!atomic_exchange(&guard->taken, true)) return guard;
    struct mm_guard *guard = malloc(sizeof *guard);
    if (!guard) return NULL;
    atomic_init(&guard->taken, true);
    atomic_init(&guard->turn, 0);
    atomic_init(&guard->begin, 0);
    atomic_init(&guard->end, 0);
    atomic_init(&guard->map, NULL);
    atomic_init(&guard->gone, 0);
    guard->next = atomic_load(&guards);
    while (!atomic_compare_exchange_weak(&guards, &guard->next, guard)) {
    }
    return guard;
}

static void set_node(struct mm_guard *guard, const struct mm_map *map) {
    uintptr_t begin = map ? (uintptr_t)map->base : 0;
    atomic_fetch_add(&guard->turn, 1);
    atomic_store(&guard->begin, begin);
    atomic_store(&guard->end, map ? begin + map->bytes : 0);
    atomic_store(&guard->map, map);
    atomic_store(&guard->gone, 0);
    atomic_fetch_add(&guard->turn, 1);
}

/* A node that changes is skipped: nobody reads from a mapping before it is guarded, or after. */
static struct mm_guard *find_node(uintptr_t address, const struct mm_map **map) {
    for (struct mm_guard *guard = atomic_load(&guards); guard; guard = guard->next) {
        unsigned turn = atomic_load(&guard->turn);
        bool within = address >= atomic_load(&guard->begin) && address < atomic_load(&guard->end);
        *map = atomic_load(&guard->map);
        if (within && !(turn & 1) && turn == atomic_load(&guard->turn)) return guard;
    }
    return NULL;
}

/* ---- the handler ---- */

/* Zeros in place of the page at `address`, and of all that its file lacks. False: it lies in none of our mappings, or can't be helped. */
static bool repair(uintptr_t address) {
    const struct mm_map *map;
    struct mm_guard *guard = find_node(address, &map);
    if (!guard) return false;
    size_t at = (address - (uintptr_t)map->base) / map->page * map->page, none = 0;
    int f = mm_map_file_at(map, at);
    const struct mm_file *file = &map->files[f];
    size_t begin = map->begins[f], end = begin + mm_map_whole_pages(map, (size_t)file->found.st_size), from = at, to = at + map->page;
    struct stat now;
    if (!fstat(file->descriptor, &now) && begin + mm_map_whole_pages(map, (size_t)now.st_size) <= at) {
        from = begin + mm_map_whole_pages(map, (size_t)now.st_size);
        to = end;
    }
    atomic_compare_exchange_strong(&guard->gone, &none, at + 1); /* first, for other threads meet the zeros without a signal */
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE;
    if (mmap(map->base + from, to - from, PROT_READ | PROT_WRITE, flags, -1, 0) != MAP_FAILED) return true;
    /* Too many pieces, as a disk that fails here and there makes them: the whole file is one. */
    return mmap(map->base + begin, end - begin, PROT_READ | PROT_WRITE, flags, -1, 0) != MAP_FAILED;
}

/* Comes again if the handler returns; not what somebody sent, nor a word about memory that nobody has touched. */
static bool is_fault(const siginfo_t *info) {
#ifdef BUS_MCEERR_AO
    if (info->si_code == BUS_MCEERR_AO) return false;
#endif
    return info->si_code >= 0 && info->si_code != SI_USER && info->si_code != SI_QUEUE;
}

enum { LEVELS = 8 };
static struct sigaction before[LEVELS]; /* what each of our handlers was put over */
static atomic_bool spent[LEVELS];       /* it was for one signal only (SA_RESETHAND), which has been */
static atomic_int levels, renewing;

static void pass_on(int level, int signal, siginfo_t *info, void *context) {
    const struct sigaction *previous = &before[level];
    bool acts = previous->sa_handler != SIG_DFL && previous->sa_handler != SIG_IGN;
    if (acts && (!(previous->sa_flags & (int)SA_RESETHAND) || !atomic_exchange(&spent[level], true))) {
        if (previous->sa_flags & SA_SIGINFO)
            previous->sa_sigaction(signal, info, context);
        else
            previous->sa_handler(signal);
        return;
    }
    if (previous->sa_handler == SIG_IGN && !is_fault(info)) return; /* faults can't be ignored */
    struct sigaction fatal;
    memset(&fatal, 0, sizeof fatal);
    fatal.sa_handler = SIG_DFL;
    sigaction(signal, &fatal, NULL);
    if (!is_fault(info)) raise(signal); /* a fault comes again by itself, and the system sees where */
}

static void handle(int level, int signal, siginfo_t *info, void *context) {
    int kept = errno;
    if (!is_fault(info) || !repair((uintptr_t)info->si_addr)) pass_on(level, signal, info, context);
    errno = kept;
}

#define EACH_LEVEL(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
#define X(n) \
    static void handle_##n(int signal, siginfo_t *info, void *context) { handle(n, signal, info, context); }
EACH_LEVEL(X)
#undef X
#define X(n) handle_##n,
static void (*const handlers[LEVELS])(int, siginfo_t *, void *) = {EACH_LEVEL(X)};
#undef X

static bool ours(const struct sigaction *action) {
    for (int i = 0; i < LEVELS; i++)
        if ((action->sa_flags & SA_SIGINFO) && action->sa_sigaction == handlers[i]) return true;
    return false;
}

static bool same(const struct sigaction *a, const struct sigaction *b) {
    return a->sa_handler == b->sa_handler && a->sa_flags == b->sa_flags;
}

/* A handler of ours over `top`: the one that stood over it before, else a new one. With none left, things stay as they are. */
static void put_over(const struct sigaction *top) {
    int count = atomic_load(&levels), level = 0;
    while (level < count && !same(&before[level], top)) level++;
    if (level == LEVELS) return;
    struct sigaction mine, found;
    before[level] = *top;
    atomic_store(&spent[level], false);
    if (level == count) atomic_store(&levels, count + 1);
    mine = *top; /* signals that it wants blocked while it runs */
    mine.sa_sigaction = handlers[level];
    mine.sa_flags = SA_SIGINFO | SA_ONSTACK | (top->sa_flags & (SA_NODEFER | SA_RESTART));
    if (!sigaction(SIGBUS, &mine, &found) && !ours(&found)) before[level] = found;
}

void mm_guard_renew(void) {
    struct sigaction top;
    int process = (int)getpid(), holder = 0;
    if (sigaction(SIGBUS, NULL, &top) || ours(&top)) return;
    /* Whoever else is at it will do; unless it was a thread of the process that this one was forked from. */
    if (!atomic_compare_exchange_strong(&renewing, &holder, process) &&
        (holder == process || !atomic_compare_exchange_strong(&renewing, &holder, process)))
        return;
    if (!sigaction(SIGBUS, NULL, &top) && !ours(&top)) put_over(&top);
    atomic_store(&renewing, 0);
}

/* ---- for map.c ---- */

bool mm_guard_add(struct mm_map *map) {
    map->guard = take_node();
    if (!map->guard) return false;
    set_node(map->guard, map);
    atomic_fetch_add(&guarded, 1);
    mm_guard_renew();
    return true;
}

void mm_guard_remove(struct mm_map *map) {
    if (!map->guard) return;
    atomic_fetch_sub(&guarded, 1);
    set_node(map->guard, NULL);
    atomic_store(&map->guard->taken, false);
    map->guard = NULL;
}

bool mm_guard_gone(const struct mm_map *map, size_t *at) {
    size_t gone = map->guard ? atomic_load(&map->guard->gone) : 0;
    *at = gone - 1;
    return gone;
}

const struct mm_map *mm_guard_find(const void *address) {
    const struct mm_map *map;
    return find_node((uintptr_t)address, &map) ? map : NULL;
}

bool mm_guard_any(void) { return atomic_load(&guarded) > 0; }
