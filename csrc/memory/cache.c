/* A bounded cache of parts of files. See memory.h.
 * One lock guards all but the bytes of slots. A slot is empty, asked for, being read, or there; readers take what an acquire waits
 * for before what was asked for ahead, each in the order of asking. Only a slot that is unpinned and not being read is ever given
 * to another item, so a reader and a user never meet in one.
 * An item's worth, for eviction, is the number of its uses, each counting half as much after every half_life acquired items:
 * frequency and recency in one number (Lee et al., "LRFU", IEEE Trans. Computers 50, 2001). Its logarithm plus the time in half-lives
 * does not change between uses, so that is what is kept and compared. Among equals, what was used or asked for longest ago goes. */
#ifdef __linux__
#define _GNU_SOURCE /* MAP_ANONYMOUS */
#endif
#include "memory/memory.h"

#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum state { EMPTY, ASKED, READING, THERE, FAILED /* as long as pins are left, whose owners are to hear of it */ };

#define PROTECTED_CALLS 4 /* what was read ahead is kept for so many acquires: it is for the next layer */

struct slot {
    enum state state;
    int64_t item, pins, order; /* order: of asking, then of last use */
    int64_t call;              /* the acquire after which it was asked for */
    bool demanded, ahead;      /* an acquire waits for it; it was asked for ahead and not used since */
};

struct item {
    int64_t slot, first, pieces; /* -1: nowhere */
    double worth;                /* log2 of its uses, aged, + the tick of the last one / half_life; -infinity: none */
};

struct mm_cache {
    pthread_mutex_t lock;
    pthread_cond_t work, paced, done; /* for readers without work; for the simulated disk; for everybody else */
    struct mm_file *files;
    struct mm_piece *pieces;
    struct item *items;
    struct slot *slots;
    int file_count, running, seeking; /* readers; acquires that wait for slots to come free */
    int64_t item_count, slot_count, slot_bytes, tick, order, calls;
    char *base;
    size_t bytes;
    double half_life, bytes_per_second;
    int64_t disk_free; /* when the simulated disk has done all it was given */
    bool stop, closed;
    pid_t process; /* that the readers are in */
    struct mm_cache_statistics statistics;
    struct mm_memory_problem failure; /* of the last read that failed */
};

/* ---- time: a clock that nobody sets ---- */

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void init_condition(pthread_cond_t *condition) {
#ifdef __APPLE__
    pthread_cond_init(condition, NULL);
#else
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(condition, &attributes);
    pthread_condattr_destroy(&attributes);
#endif
}

/* Until it is signalled or the time has come; may also return for no reason. */
static void wait_until(pthread_cond_t *condition, pthread_mutex_t *lock, int64_t ns) {
#ifdef __APPLE__ /* whose conditions have one clock only, and so a call that takes a duration */
    int64_t left = ns - now_ns();
    if (left <= 0) return;
    struct timespec time = {(time_t)(left / 1000000000), (long)(left % 1000000000)};
    pthread_cond_timedwait_relative_np(condition, lock, &time);
#else
    struct timespec time = {(time_t)(ns / 1000000000), (long)(ns % 1000000000)};
    pthread_cond_timedwait(condition, lock, &time);
#endif
}

/* ---- reading, without the lock ---- */

static bool read_piece(const struct mm_cache *cache, const struct mm_piece *piece, char *slot, struct mm_memory_problem *problem) {
    const struct mm_file *file = &cache->files[piece->file];
    for (int64_t done = 0; done < piece->bytes;) {
        ssize_t got = pread(file->descriptor, slot + piece->at + done, (size_t)(piece->bytes - done), (off_t)(piece->begin + done));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0)
            return mm_memory_fail(problem, "%s: reading %lld bytes at %lld: %s", file->path, (long long)piece->bytes,
                                  (long long)piece->begin, strerror(errno));
        if (!got)
            return mm_memory_fail(problem, "%s ends within %lld bytes at %lld; it was longer when it was opened", file->path,
                                  (long long)piece->bytes, (long long)piece->begin);
        done += got;
    }
    return true;
}

/* Before and after: what was read in between belongs to the file that the checkpoint was checked as. */
static bool read_item(const struct mm_cache *cache, const struct item *item, char *slot, int64_t *bytes, struct mm_memory_problem *problem) {
    *bytes = 0;
    for (int64_t i = item->first; i < item->first + item->pieces; i++) {
        const struct mm_piece *piece = &cache->pieces[i];
        if (!read_piece(cache, piece, slot, problem) || !mm_file_same(&cache->files[piece->file], problem)) return false;
        *bytes += piece->bytes;
    }
    return true;
}

/* ---- under the lock ---- */

static bool protected(const struct mm_cache *cache, const struct slot *slot) {
    return slot->ahead && cache->calls - slot->call <= PROTECTED_CALLS;
}

/* The slot that may best be given away, -1 if none may: an empty one, else the least worth. Asked-for ones that nobody waits for may
 * be given to an acquire, not to another prefetch. */
static int64_t find_victim(const struct mm_cache *cache, bool demanded) {
    int64_t best = -1;
    for (int64_t s = 0; s < cache->slot_count; s++) {
        const struct slot *slot = &cache->slots[s], *other = &cache->slots[best < 0 ? s : best];
        if (slot->state == EMPTY) return s;
        if (slot->pins || slot->state == READING) continue;
        bool kept = protected(cache, slot); /* about to be used: no prefetch takes it, an acquire takes it last */
        if (!demanded && (kept || slot->state == ASKED)) continue;
        double worth = cache->items[slot->item].worth, least = cache->items[other->item].worth;
        if (best < 0 || kept < protected(cache, other) ||
            (kept == protected(cache, other) && (worth < least || (worth <= least && slot->order < other->order))))
            best = s;
    }
    return best;
}

static void vacate(struct mm_cache *cache, int64_t s) {
    struct slot *slot = &cache->slots[s];
    if (slot->state == EMPTY) return;
    if (slot->state == THERE) cache->statistics.evictions++;
    cache->items[slot->item].slot = -1;
    *slot = (struct slot){.state = EMPTY, .item = -1};
}

static void ask(struct mm_cache *cache, int64_t s, int64_t item, bool demanded) {
    vacate(cache, s);
    cache->items[item].slot = s;
    cache->slots[s] = (struct slot){
        .state = ASKED, .item = item, .order = cache->order++, .call = cache->calls, .demanded = demanded, .ahead = !demanded};
}

/* What a reader does next: the first of what is waited for, else the first of what was asked for ahead; -1: nothing. */
static int64_t next_read(const struct mm_cache *cache) {
    int64_t best = -1;
    for (int64_t s = 0; s < cache->slot_count; s++) {
        const struct slot *slot = &cache->slots[s];
        if (slot->state != ASKED) continue;
        if (best < 0 || (slot->demanded && !cache->slots[best].demanded) ||
            (slot->demanded == cache->slots[best].demanded && slot->order < cache->slots[best].order))
            best = s;
    }
    return best;
}

/* As many readers as there is work for: each that is awake looks for more by itself. */
static void wake_readers(struct mm_cache *cache, int64_t asked) {
    if (asked >= cache->running) pthread_cond_broadcast(&cache->work);
    for (int64_t i = 0; i < asked && asked < cache->running; i++) pthread_cond_signal(&cache->work);
}

static void free_all(struct mm_cache *cache) {
    for (int i = 0; i < cache->file_count; i++) mm_file_close(&cache->files[i]);
    if (cache->base) munmap(cache->base, cache->bytes);
    free(cache->files);
    free(cache->pieces);
    free(cache->items);
    free(cache->slots);
    free(cache);
}

static void destroy(struct mm_cache *cache) {
    pthread_cond_destroy(&cache->work);
    pthread_cond_destroy(&cache->paced);
    pthread_cond_destroy(&cache->done);
    pthread_mutex_destroy(&cache->lock);
    free_all(cache);
}

/* The simulated disk does one read after the other: sleeps until this one would be done. */
static void simulate_disk(struct mm_cache *cache, int64_t started, int64_t bytes) {
    if (cache->bytes_per_second <= 0) return;
    if (cache->disk_free < started) cache->disk_free = started;
    cache->disk_free += (int64_t)((double)bytes / cache->bytes_per_second * 1e9);
    int64_t ready = cache->disk_free;
    while (!cache->stop && now_ns() < ready) wait_until(&cache->paced, &cache->lock, ready);
}

static void *read_items(void *context) {
    struct mm_cache *cache = context;
    pthread_mutex_lock(&cache->lock);
    while (!cache->stop) {
        int64_t s = next_read(cache);
        if (s < 0) {
            pthread_cond_wait(&cache->work, &cache->lock);
            continue;
        }
        struct slot *slot = &cache->slots[s];
        const struct item *item = &cache->items[slot->item];
        struct mm_memory_problem problem = {.timeout = false};
        int64_t bytes, started = now_ns();
        slot->state = READING;
        pthread_mutex_unlock(&cache->lock);
        bool good = read_item(cache, item, cache->base + s * cache->slot_bytes, &bytes, &problem);
        pthread_mutex_lock(&cache->lock);
        simulate_disk(cache, started, bytes);
        cache->statistics.reads++;
        cache->statistics.bytes += bytes;
        if (good) {
            slot->state = THERE;
        } else {
            cache->statistics.failures++;
            cache->failure = problem;
            slot->state = FAILED;
        }
        if (slot->pins || cache->seeking) pthread_cond_broadcast(&cache->done);
        if (!good && !slot->pins) vacate(cache, s);
    }
    cache->running--;
    bool last = cache->closed && !cache->running;
    pthread_cond_broadcast(&cache->done);
    pthread_mutex_unlock(&cache->lock);
    if (last) destroy(cache);
    return NULL;
}

/* ---- opening and closing ---- */

static bool start(struct mm_cache *cache, int readers, struct mm_memory_problem *problem) {
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes)) return mm_memory_fail(problem, "out of memory");
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    int error = 0;
    pthread_mutex_lock(&cache->lock);
    for (int i = 0; i < readers && !error; i++) {
        pthread_t thread;
        error = pthread_create(&thread, &attributes, read_items, cache);
        if (!error) cache->running++;
    }
    pthread_mutex_unlock(&cache->lock);
    pthread_attr_destroy(&attributes);
    return !error || mm_memory_fail(problem, "a reader thread could not be started: %s", strerror(error));
}

static bool fill(struct mm_cache *cache, const struct mm_cache_options *options, struct mm_memory_problem *problem) {
    cache->files = calloc((size_t)options->files + 1, sizeof *cache->files);
    cache->pieces = calloc((size_t)options->piece_count + 1, sizeof *cache->pieces);
    cache->items = calloc((size_t)options->items + 1, sizeof *cache->items);
    cache->slots = calloc((size_t)options->slots + 1, sizeof *cache->slots);
    if (!cache->files || !cache->pieces || !cache->items || !cache->slots) return mm_memory_fail(problem, "out of memory");
    for (; cache->file_count < options->files; cache->file_count++)
        if (!mm_file_open(&cache->files[cache->file_count], options->paths[cache->file_count], problem)) return false;
    memcpy(cache->pieces, options->pieces, (size_t)options->piece_count * sizeof *cache->pieces);
    for (int64_t i = 0; i < options->items; i++) cache->items[i] = (struct item){.slot = -1, .worth = -INFINITY};
    for (int64_t i = 0; i < options->piece_count; i++) {
        const struct mm_piece *piece = &cache->pieces[i];
        bool fits = piece->item >= 0 && piece->item < options->items && piece->file >= 0 && piece->file < options->files &&
                    piece->begin >= 0 && piece->bytes > 0 && piece->at >= 0 && piece->bytes <= options->slot_bytes &&
                    piece->at <= options->slot_bytes - piece->bytes && (!i || piece->item >= cache->pieces[i - 1].item);
        if (!fits) return mm_memory_fail(problem, "piece %lld does not fit its item, file or slot", (long long)i);
        if (piece->begin > cache->files[piece->file].found.st_size - piece->bytes)
            return mm_memory_fail(problem, "%s has %lld bytes; an item lies at %lld to %lld: truncated", cache->files[piece->file].path,
                                  (long long)cache->files[piece->file].found.st_size, (long long)piece->begin,
                                  (long long)(piece->begin + piece->bytes));
        struct item *item = &cache->items[piece->item];
        if (!item->pieces++) item->first = i;
    }
    for (int64_t i = 0; i < options->items; i++)
        if (!cache->items[i].pieces) return mm_memory_fail(problem, "item %lld has no pieces", (long long)i);
    for (int64_t s = 0; s < options->slots; s++) cache->slots[s] = (struct slot){.state = EMPTY, .item = -1};
    cache->bytes = (size_t)options->slots * (size_t)options->slot_bytes;
    void *memory = mmap(NULL, cache->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return mm_memory_fail(problem, "%zu bytes for the cache: %s", cache->bytes, strerror(errno));
    cache->base = memory;
    return true;
}

struct mm_cache *mm_cache_open(const struct mm_cache_options *options, struct mm_memory_problem *problem) {
    if (options->slots < 1 || options->slot_bytes < 1 || options->items < 1 || options->readers < 1 || !(options->half_life > 0)) {
        mm_memory_fail(problem, "%lld slots of %lld bytes, %lld items, %d readers, a half-life of %g; expected at least 1 each",
                       (long long)options->slots, (long long)options->slot_bytes, (long long)options->items, options->readers,
                       options->half_life);
        return NULL;
    }
    struct mm_cache *cache = calloc(1, sizeof *cache);
    if (!cache) return mm_memory_fail(problem, "out of memory"), NULL;
    pthread_mutex_init(&cache->lock, NULL);
    init_condition(&cache->work);
    init_condition(&cache->paced);
    init_condition(&cache->done);
    cache->item_count = options->items;
    cache->slot_count = options->slots;
    cache->slot_bytes = options->slot_bytes;
    cache->half_life = options->half_life;
    cache->bytes_per_second = options->bytes_per_second;
    cache->process = getpid();
    if (!fill(cache, options, problem)) return destroy(cache), NULL;
    if (!start(cache, options->readers, problem)) return mm_cache_close(cache), NULL;
    return cache;
}

void mm_cache_close(struct mm_cache *cache) {
    if (getpid() != cache->process) { /* a fork's copy: its lock may be held by a thread that is not here, and nobody reads */
        free_all(cache);
        return;
    }
    pthread_mutex_lock(&cache->lock);
    cache->stop = true;
    pthread_cond_broadcast(&cache->work);
    pthread_cond_broadcast(&cache->paced);
    int64_t end = now_ns() + 1000000000;
    while (cache->running && now_ns() < end) wait_until(&cache->done, &cache->lock, end);
    bool last = !cache->running;
    cache->closed = true; /* from here on the last reader frees it */
    pthread_mutex_unlock(&cache->lock);
    if (last) destroy(cache);
}

void *mm_cache_base(const struct mm_cache *cache) { return cache->base; }

/* ---- using ---- */

/* A fork has the memory but not the readers, and perhaps a lock that nobody will open. */
static bool enter(struct mm_cache *cache, struct mm_memory_problem *problem) {
    problem->timeout = problem->interrupted = false;
    if (getpid() != cache->process)
        return mm_memory_fail(problem, "the cache of experts was made in process %ld, and its readers don't exist in a fork of it; "
                                       "load the model after forking", (long)cache->process);
    pthread_mutex_lock(&cache->lock);
    return true;
}

static bool there(const struct mm_cache *cache, int64_t item) {
    int64_t s = cache->items[item].slot;
    return s >= 0 && cache->slots[s].state == THERE;
}

/* Pins what is here or on the way and asks for the rest, all or nothing. False: too little can be given away just now. */
static bool reserve(struct mm_cache *cache, const int64_t *items, int64_t count, int64_t *asked) {
    int64_t free_slots = 0, missing = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t s = cache->items[items[i]].slot;
        if (s >= 0) cache->slots[s].pins++;
        missing += s < 0;
    }
    for (int64_t s = 0; s < cache->slot_count; s++) free_slots += !cache->slots[s].pins && cache->slots[s].state != READING;
    if (free_slots < missing) {
        for (int64_t i = 0; i < count; i++)
            if (cache->items[items[i]].slot >= 0) cache->slots[cache->items[items[i]].slot].pins--;
        return false;
    }
    *asked = missing;
    for (int64_t i = 0; i < count; i++) {
        struct item *item = &cache->items[items[i]];
        cache->tick++;
        if (item->slot >= 0) {
            struct slot *slot = &cache->slots[item->slot];
            if (slot->state == THERE)
                cache->statistics.hits++;
            else
                cache->statistics.late++;
            cache->statistics.useful += slot->ahead;
            slot->demanded = true;
            slot->ahead = false;
            if (slot->state == THERE) slot->order = cache->order++;
        } else {
            cache->statistics.misses++;
            ask(cache, find_victim(cache, true), items[i], true);
            cache->slots[item->slot].pins = 1;
        }
        double age = (double)cache->tick / cache->half_life;
        item->worth = log2(exp2(item->worth - age) + 1) + age;
    }
    return true;
}

static void unpin(struct mm_cache *cache, const int64_t *items, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        int64_t s = cache->items[items[i]].slot;
        if (s < 0 || !cache->slots[s].pins) continue;
        if (!--cache->slots[s].pins && cache->slots[s].state == FAILED) vacate(cache, s);
    }
    if (cache->seeking) pthread_cond_broadcast(&cache->done);
}

#define SLICE 50000000 /* ns between two looks at whether the caller still wants to wait */

struct wait_state {
    const struct mm_patience *patience;
    int64_t deadline, look;
    bool waited;
};

/* Until something has happened. False: the caller wants no more. */
static bool wait_a_while(struct mm_cache *cache, struct wait_state *wait, struct mm_memory_problem *problem) {
    wait->waited = true;
    wait_until(&cache->done, &cache->lock, wait->look < wait->deadline ? wait->look : wait->deadline);
    if (now_ns() < wait->look) return true;
    wait->look = now_ns() + SLICE;
    if (!wait->patience->interrupted) return true;
    pthread_mutex_unlock(&cache->lock); /* it may take Python's lock, which somebody may hold who waits for ours */
    problem->interrupted = wait->patience->interrupted(wait->patience->context);
    pthread_mutex_lock(&cache->lock);
    return !problem->interrupted || mm_memory_fail(problem, "interrupted");
}

/* Until `reserve` has worked. */
static bool wait_for_room(struct mm_cache *cache, const int64_t *items, int64_t count, struct wait_state *wait, int64_t *asked,
                          struct mm_memory_problem *problem) {
    while (!reserve(cache, items, count, asked)) {
        if (now_ns() >= wait->deadline) {
            problem->timeout = true;
            return mm_memory_fail(problem, "no room for %lld experts came free in %g s: other threads hold all %lld slots, or a read does not end",
                                  (long long)count, wait->patience->seconds, (long long)cache->slot_count);
        }
        cache->seeking++;
        bool on = wait_a_while(cache, wait, problem);
        cache->seeking--;
        if (!on) return false;
    }
    return true;
}

/* Until a pinned item has been read. */
static bool wait_for_item(struct mm_cache *cache, int64_t item, struct wait_state *wait, struct mm_memory_problem *problem) {
    while (!there(cache, item)) {
        if (cache->slots[cache->items[item].slot].state == FAILED) return *problem = cache->failure, false;
        if (now_ns() >= wait->deadline) {
            const struct mm_piece *piece = &cache->pieces[cache->items[item].first];
            problem->timeout = true;
            return mm_memory_fail(problem, "%s: %lld bytes at %lld were not read in %g s: the disk or the network behind it stalls",
                                  cache->files[piece->file].path, (long long)piece->bytes, (long long)piece->begin, wait->patience->seconds);
        }
        if (!wait_a_while(cache, wait, problem)) return false;
    }
    return true;
}

bool mm_cache_acquire(struct mm_cache *cache, const int64_t *items, int64_t count, int64_t *found, const struct mm_patience *patience,
                      struct mm_memory_problem *problem) {
    for (int64_t i = 0; i < count; i++)
        if (items[i] < 0 || items[i] >= cache->item_count)
            return mm_memory_fail(problem, "item %lld; expected 0 to %lld", (long long)items[i], (long long)cache->item_count - 1);
    if (count > cache->slot_count)
        return mm_memory_fail(problem, "%lld experts are needed at once; the cache holds %lld", (long long)count, (long long)cache->slot_count);
    if (!enter(cache, problem)) return false;
    int64_t started = now_ns(), asked = 0;
    struct wait_state wait = {.patience = patience, .deadline = started + (int64_t)(patience->seconds * 1e9), .look = started + SLICE};
    cache->calls++;
    if (!wait_for_room(cache, items, count, &wait, &asked, problem)) {
        pthread_mutex_unlock(&cache->lock);
        return false;
    }
    wake_readers(cache, asked);
    bool good = true;
    for (int64_t i = 0; i < count && good; i++) {
        good = wait_for_item(cache, items[i], &wait, problem);
        found[i] = cache->items[items[i]].slot;
    }
    if (wait.waited) {
        cache->statistics.stalls++;
        cache->statistics.stall_ns += now_ns() - started;
    }
    if (!good) unpin(cache, items, count);
    pthread_mutex_unlock(&cache->lock);
    return good;
}

bool mm_cache_release(struct mm_cache *cache, const int64_t *items, int64_t count, struct mm_memory_problem *problem) {
    if (getpid() != cache->process) return true; /* a fork has nothing pinned that anybody waits for */
    if (!enter(cache, problem)) return false;
    bool good = true;
    for (int64_t i = 0; i < count && good; i++) {
        int64_t s = items[i] < 0 || items[i] >= cache->item_count ? -1 : cache->items[items[i]].slot;
        good = (s >= 0 && cache->slots[s].pins) || mm_memory_fail(problem, "item %lld is not in use", (long long)items[i]);
    }
    if (good) unpin(cache, items, count);
    pthread_mutex_unlock(&cache->lock);
    return good;
}

int64_t mm_cache_prefetch(struct mm_cache *cache, const int64_t *items, int64_t count) {
    struct mm_memory_problem ignored;
    int64_t taken = 0;
    if (!enter(cache, &ignored)) return 0;
    for (int64_t i = 0; i < count; i++) {
        if (items[i] < 0 || items[i] >= cache->item_count || cache->items[items[i]].slot >= 0) continue;
        int64_t s = find_victim(cache, false);
        if (s < 0) break;
        ask(cache, s, items[i], false);
        taken++;
    }
    cache->statistics.prefetched += taken;
    wake_readers(cache, taken);
    pthread_mutex_unlock(&cache->lock);
    return taken;
}

struct mm_cache_statistics mm_cache_statistics(struct mm_cache *cache, bool reset) {
    struct mm_cache_statistics result = {0};
    struct mm_memory_problem ignored;
    if (!enter(cache, &ignored)) return result;
    result = cache->statistics;
    if (reset) cache->statistics = (struct mm_cache_statistics){0};
    pthread_mutex_unlock(&cache->lock);
    return result;
}

void mm_cache_slots(struct mm_cache *cache, int64_t counts[5]) {
    struct mm_memory_problem ignored;
    memset(counts, 0, 5 * sizeof *counts);
    if (!enter(cache, &ignored)) return;
    for (int64_t s = 0; s < cache->slot_count; s++) {
        counts[cache->slots[s].state == FAILED ? ASKED : cache->slots[s].state]++;
        counts[4] += cache->slots[s].pins > 0;
    }
    pthread_mutex_unlock(&cache->lock);
}
