/* Stresses the cache of experts (csrc/memory/cache.c) without Python: is a byte ever wrong, a pin lost, a wait endless?
 *   cc -std=c11 -O1 -g -fsanitize=thread -Icsrc tests/cache.c csrc/memory/{map,guard,cache}.c -lm -lpthread -o cache && ./cache DIR
 * Every 8 bytes of the files are a hash of their place, so that a user of a slot can check all of them without the file. Prints a
 * line for each part, and what it counted; exit status 1 if anything was wrong. */
#ifdef __linux__
#define _GNU_SOURCE
#endif
#include "memory/memory.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { ITEMS = 60, PIECES = 3, WORDS = 1000, FILES = 2, SLOTS = 10, USERS = 4, AT_ONCE = 3 };
#define PIECE_BYTES (WORDS * 8)
#define ITEM_BYTES (PIECES * PIECE_BYTES)
#define HEAD 13 /* bytes before the first item, so that nothing is aligned */

static char paths[FILES][512];
static atomic_int wrong, errors, rounds, stop;

static uint64_t mixed(uint64_t x) { /* splitmix64 */
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

static uint64_t expected(int64_t item, int64_t word, uint64_t version) {
    return mixed((uint64_t)(item * PIECES * WORDS + word) + (version << 40));
}

#define WAIT(s) (&(struct mm_patience){.seconds = (s)})

static void sleep_ms(long ms) { nanosleep(&(struct timespec){ms / 1000, ms % 1000 * 1000000}, NULL); }

static void fail(const char *what, const char *detail) {
    atomic_fetch_add(&wrong, 1);
    printf("WRONG: %s: %s\n", what, detail);
}

/* Item i lies in file i % FILES, piece p at its (i / FILES * PIECES + PIECES - 1 - p)-th place. */
static int64_t begin_of(int64_t item, int64_t piece) { return HEAD + (item / FILES * PIECES + PIECES - 1 - piece) * PIECE_BYTES; }

static void write_files(uint64_t version) {
    for (int f = 0; f < FILES; f++) {
        int file = open(paths[f], O_WRONLY | O_CREAT, 0600);
        if (file < 0) exit(2);
        for (int64_t item = f; item < ITEMS; item += FILES)
            for (int64_t p = 0; p < PIECES; p++) {
                uint64_t words[WORDS];
                for (int64_t w = 0; w < WORDS; w++) words[w] = expected(item, p * WORDS + w, version);
                if (pwrite(file, words, sizeof words, (off_t)begin_of(item, p)) != (ssize_t)sizeof words) exit(2);
            }
        close(file);
    }
}

static struct mm_cache *opened(int64_t slots, double speed, const char *path, struct mm_memory_problem *problem) {
    struct mm_piece pieces[ITEMS * PIECES];
    const char *const names[FILES] = {path ? path : paths[0], paths[1]};
    for (int64_t i = 0; i < ITEMS * PIECES; i++) {
        int64_t item = i / PIECES, p = i % PIECES;
        pieces[i] = (struct mm_piece){item, item % FILES, begin_of(item, p), PIECE_BYTES, p * PIECE_BYTES};
        if (path) pieces[i].begin = 0, pieces[i].bytes = 8;
    }
    struct mm_cache_options options = {.paths = names, .files = FILES, .pieces = pieces, .piece_count = ITEMS * PIECES, .items = ITEMS,
                                       .slots = slots, .slot_bytes = ITEM_BYTES, .readers = 3, .half_life = 40, .bytes_per_second = speed};
    return mm_cache_open(&options, problem);
}

static void check_slot(struct mm_cache *cache, int64_t item, int64_t slot) {
    const char *bytes = (const char *)mm_cache_base(cache) + slot * ITEM_BYTES;
    for (int64_t w = 0; w < PIECES * WORDS; w++) {
        uint64_t word;
        memcpy(&word, bytes + 8 * w, 8);
        if (word != expected(item, w, 0)) {
            char text[120];
            snprintf(text, sizeof text, "item %lld, word %lld", (long long)item, (long long)w);
            fail("a wrong byte", text);
            return;
        }
    }
}

struct user {
    struct mm_cache *cache;
    uint64_t seed;
};

static void *use(void *context) {
    struct user *user = context;
    while (!atomic_load(&stop)) {
        int64_t items[AT_ONCE], ahead[4], slots[AT_ONCE];
        struct mm_memory_problem problem;
        user->seed = mixed(user->seed);
        int64_t first = (int64_t)(user->seed % ITEMS), count = 1 + (int64_t)(user->seed >> 20) % AT_ONCE;
        for (int64_t i = 0; i < count; i++) items[i] = (first + i * 7) % ITEMS;
        for (int64_t i = 0; i < 4; i++) ahead[i] = (first + i * 11) % ITEMS;
        if (user->seed >> 40 & 1) mm_cache_prefetch(user->cache, ahead, 4);
        if (!mm_cache_acquire(user->cache, items, count, slots, WAIT(20), &problem)) {
            atomic_fetch_add(&errors, 1);
            if (problem.timeout) fail("a wait that does not end", problem.text);
            continue;
        }
        for (int64_t i = 0; i < count; i++) check_slot(user->cache, items[i], slots[i]);
        if (!mm_cache_release(user->cache, items, count, &problem)) fail("release", problem.text);
        atomic_fetch_add(&rounds, 1);
    }
    return NULL;
}

/* USERS threads for a while; in the middle of it, `meanwhile`. */
static void stress(const char *name, void (*meanwhile)(void), bool may_fail) {
    struct mm_memory_problem problem;
    struct mm_cache *cache = opened(SLOTS, 0, NULL, &problem);
    if (!cache) {
        fail(name, problem.text);
        return;
    }
    pthread_t threads[USERS];
    struct user users[USERS];
    atomic_store(&stop, 0);
    atomic_store(&errors, 0);
    atomic_store(&rounds, 0);
    for (int i = 0; i < USERS; i++) {
        users[i] = (struct user){cache, (uint64_t)i + 1};
        if (pthread_create(&threads[i], NULL, use, &users[i])) exit(2);
    }
    sleep_ms(300);
    if (meanwhile) meanwhile();
    sleep_ms(200);
    atomic_store(&stop, 1);
    for (int i = 0; i < USERS; i++) pthread_join(threads[i], NULL);
    struct mm_cache_statistics s = mm_cache_statistics(cache, false);
    int64_t slots[5];
    mm_cache_slots(cache, slots);
    if (slots[4]) fail(name, "a pin was lost");
    if (!rounds) fail(name, "nothing was ever acquired");
    if (!may_fail && (errors || s.failures)) fail(name, "a read failed");
    if (may_fail && !s.failures) fail(name, "no read failed");
    if (!may_fail && s.bytes != s.reads * ITEM_BYTES) fail(name, "bytes and reads don't agree");
    printf("%s: %d rounds, %d refused, hits %lld, late %lld, misses %lld, evictions %lld, reads %lld\n", name, rounds, errors,
           (long long)s.hits, (long long)s.late, (long long)s.misses, (long long)s.evictions, (long long)s.reads);
    mm_cache_close(cache);
}

static void overwrite(void) { write_files(1); }
static void truncate_files(void) {
    for (int f = 0; f < FILES; f++)
        if (truncate(paths[f], HEAD + 2 * PIECE_BYTES)) exit(2);
}
static void close_and_open(void) {
    for (int i = 0; i < 20; i++) {
        struct mm_memory_problem problem;
        struct mm_cache *other = opened(SLOTS, 0, NULL, &problem);
        int64_t items[SLOTS];
        for (int64_t k = 0; k < SLOTS; k++) items[k] = k;
        if (!other) exit(2);
        mm_cache_prefetch(other, items, SLOTS);
        mm_cache_close(other); /* while its readers read */
    }
}

static void expect(const char *name, bool good, const char *text, const char *part) {
    if (good || !strstr(text, part)) fail(name, good ? "it worked" : text);
    else printf("%s: %s\n", name, text);
}

static bool third_time(void *context) { return ++*(int *)context == 3; }

static void refusals(void) {
    struct mm_memory_problem problem = {.text = ""};
    int64_t items[SLOTS + 1], slots[SLOTS + 1];
    for (int64_t i = 0; i <= SLOTS; i++) items[i] = i;
    struct mm_cache *cache = opened(SLOTS, 0, NULL, &problem);
    expect("too many", mm_cache_acquire(cache, items, SLOTS + 1, slots, WAIT(1), &problem), problem.text, "the cache holds 10");
    expect("no such item", mm_cache_acquire(cache, (int64_t[]){ITEMS}, 1, slots, WAIT(1), &problem), problem.text, "item 60");
    if (!mm_cache_acquire(cache, items, SLOTS, slots, WAIT(5), &problem)) fail("all slots", problem.text);
    expect("no room", mm_cache_acquire(cache, (int64_t[]){40}, 1, slots, WAIT(0.05), &problem), problem.text, "no room");
    if (!problem.timeout) fail("no room", "is no timeout");
    if (mm_cache_prefetch(cache, (int64_t[]){41}, 1)) fail("prefetch", "took a pinned slot");
    pid_t child = fork();
    if (!child) {
        bool refused = !mm_cache_acquire(cache, items, 1, slots, WAIT(5), &problem) && strstr(problem.text, "fork");
        int descriptor = dup(0), after;
        mm_cache_close(cache); /* gives back its files, at least */
        after = dup(0);
        _exit(refused && after < descriptor ? 0 : 1);
    }
    int status = 1;
    if (waitpid(child, &status, 0) < 0 || status) fail("fork", "the child was not refused");
    expect("releasing what nobody has", mm_cache_release(cache, (int64_t[]){0, 41}, 2, &problem), problem.text, "item 41 is not in use");
    expect("releasing no item", mm_cache_release(cache, (int64_t[]){ITEMS}, 1, &problem), problem.text, "item 60 is not in use");
    if (!mm_cache_release(cache, items, SLOTS, &problem)) fail("release", problem.text);
    expect("releasing twice", mm_cache_release(cache, items, SLOTS, &problem), problem.text, "item 0 is not in use");
    mm_cache_close(cache);

    cache = opened(SLOTS, 1000, NULL, &problem); /* 24 s an item */
    expect("a stalling disk", mm_cache_acquire(cache, items, 1, slots, WAIT(0.05), &problem), problem.text, "stalls");
    if (!problem.timeout) fail("a stalling disk", "is no timeout");
    int asked = 0;
    struct mm_patience short_one = {.seconds = 20, .interrupted = third_time, .context = &asked};
    expect("interrupted", mm_cache_acquire(cache, items + 1, 2, slots, &short_one, &problem), problem.text, "interrupted");
    if (!problem.interrupted || asked != 3) fail("interrupted", "not at the third time");
    int64_t counts[5];
    mm_cache_slots(cache, counts);
    if (counts[4]) fail("interrupted", "a pin was left");
    mm_cache_close(cache);

    cache = opened(SLOTS, 0, "/", &problem); /* opens, but can't be read */
    if (!cache) fail("a directory", problem.text);
    expect("a read error", mm_cache_acquire(cache, items, 1, slots, WAIT(5), &problem), problem.text, "reading 8 bytes at 0");
    if (!mm_cache_acquire(cache, items + 1, 1, slots, WAIT(5), &problem)) fail("after a read error", problem.text);
    mm_cache_close(cache);

    if (truncate(paths[1], HEAD + 1)) exit(2);
    expect("truncated before", opened(SLOTS, 0, NULL, &problem) != NULL, problem.text, "truncated");
}

int main(int argc, char **argv) {
    for (int f = 0; f < FILES; f++) snprintf(paths[f], sizeof paths[f], "%s/items%d", argc > 1 ? argv[1] : ".", f);
    write_files(0);
    stress("eviction", NULL, false);
    stress("others come and go", close_and_open, false);
    stress("overwritten", overwrite, true);
    for (int f = 0; f < FILES; f++) unlink(paths[f]);
    write_files(0);
    sleep_ms(20); /* a change in the same tick of the file system's clock is none */
    stress("truncated", truncate_files, true);
    write_files(0);
    refusals();
    printf("%d wrong\n", wrong);
    return wrong > 0;
}
