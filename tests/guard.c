/* The guard of mapped files (csrc/memory/guard.c) without Python: files that are cut short while threads read them, and every other SIGBUS.
 *   cc -std=c11 -O1 -g -fsanitize=thread -Icsrc tests/guard.c csrc/memory/{map,guard}.c -lpthread -o guard && ./guard DIR
 * `./guard DIR speed` prints what the question that every op asks takes.
 * Whatever may end the process runs in a child. Prints a line for each part; exit status 1 if anything was wrong. */
#ifdef __linux__
#define _GNU_SOURCE
#endif
#include "memory/memory.h"

#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGES = 64, THREADS = 4, FILES = 3, ROUNDS = 30 };

static char paths[FILES][512];
static size_t page;
static int wrong;

static void check(const char *what, bool good) {
    printf("%s: %s\n", what, good ? "ok" : "WRONG");
    wrong += !good;
}

static void sleep_us(long us) { nanosleep(&(struct timespec){0, us * 1000}, NULL); }

/* Every page of a file begins with its number + 1. */
static void write_file(int f, size_t pages) {
    int file = open(paths[f], O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (file < 0 || ftruncate(file, (off_t)(pages * page))) exit(2);
    for (size_t i = 0; i < pages; i++) {
        int number = (int)i + 1;
        if (pwrite(file, &number, sizeof number, (off_t)(i * page)) != (ssize_t)sizeof number) exit(2);
    }
    close(file);
}

static struct mm_map *mapped(int files) {
    const char *const names[FILES] = {paths[0], paths[1], paths[2]};
    size_t begins[FILES];
    struct mm_memory_problem problem;
    struct mm_map *map = mm_map_open(names, files, begins, &problem);
    if (!map) printf("%s\n", problem.text), exit(2);
    return map;
}

/* To ThreadSanitizer, zeros that come in place of a missing page are written while others read there: that is the purpose. */
__attribute__((no_sanitize_thread)) static int read_page(const struct mm_map *map, size_t i) {
    return *(const volatile int *)((const char *)mm_map_base(map) + i * page);
}

static bool same(const struct mm_map *map, const char *part) {
    struct mm_memory_problem problem = {.text = ""};
    bool good = mm_map_same(map, &problem);
    if (!good && part && !strstr(problem.text, part)) printf("%s\n", problem.text), wrong++;
    return good;
}

static bool span_same(const struct mm_map *map, size_t first, size_t pages) {
    struct mm_memory_problem problem;
    struct mm_span span = {(const char *)mm_map_base(map) + first * page, pages * page};
    return mm_maps_same(&span, 1, &problem);
}

/* ---- files of ours ---- */

static void cut_short(void) {
    write_file(0, PAGES);
    struct mm_map *map = mapped(1);
    bool good = same(map, NULL) && read_page(map, 40) == 41;
    if (truncate(paths[0], (off_t)(10 * page))) exit(2);
    good = good && read_page(map, 9) == 10 && read_page(map, 40) == 0 && read_page(map, 10) == 0 && read_page(map, 63) == 0;
    check("cut short", good && !same(map, "bytes, expected"));
    write_file(0, PAGES);
    check("and restored: still an error", !same(map, "could not be read") && read_page(map, 40) == 0 && read_page(map, 5) == 6);
    mm_map_close(map);
    map = mapped(1);
    check("mapped again", same(map, NULL) && read_page(map, 40) == 41);
    if (truncate(paths[0], (off_t)(10 * page + 1)) || truncate(paths[0], (off_t)(PAGES * page))) exit(2);
    check("cut short and restored before it was read", read_page(map, 40) == 0 && !span_same(map, 40, 1));
    mm_map_close(map);
}

static void several(void) {
    for (int f = 0; f < FILES; f++) write_file(f, PAGES);
    struct mm_map *one = mapped(FILES), *two = mapped(FILES), *other = mapped(1);
    if (truncate(paths[1], 0)) exit(2);
    bool good = read_page(one, PAGES + 3) == 0 && read_page(one, 2 * PAGES) == 1 && read_page(one, PAGES - 1) == PAGES;
    check("one of several files", good && !same(one, paths[1]) && !span_same(one, 0, 1));
    check("another mapping of the file", !span_same(two, PAGES, 1) && span_same(two, 0, 1) && !span_same(two, 0, PAGES + 1));
    check("another mapping of another file", same(other, NULL) && span_same(other, 0, PAGES));
    mm_map_close(one);
    good = read_page(two, 2 * PAGES - 1) == 0 && !same(two, paths[1]);
    check("one is closed, the other goes on", good && !span_same(two, 0, 1));
    mm_map_close(two);
    mm_map_close(other);
}

static struct mm_map *shared;
static atomic_bool done, good_reads;

static void *read_all(void *context) {
    for (size_t i = *(size_t *)context; !atomic_load(&done); i = (i + 37) % PAGES) {
        int found = read_page(shared, i);
        if (found != (int)i + 1 && found) atomic_store(&good_reads, false);
    }
    return NULL;
}

/* Threads read a mapping from all sides while its file is cut short, a little more each time. */
static void threads(void) {
    atomic_store(&good_reads, true);
    int missed = 0;
    for (int round = 0; round < ROUNDS; round++) {
        write_file(0, PAGES);
        shared = mapped(1);
        atomic_store(&done, false);
        pthread_t all[THREADS];
        size_t first[THREADS];
        for (size_t i = 0; i < THREADS; i++) {
            first[i] = i * 11;
            if (pthread_create(&all[i], NULL, read_all, &first[i])) exit(2);
        }
        for (int size = PAGES - 1; size >= 0; size -= 13) {
            sleep_us(200);
            if (truncate(paths[0], (off_t)((size_t)size * page))) exit(2);
        }
        sleep_us(200);
        atomic_store(&done, true);
        for (int i = 0; i < THREADS; i++) pthread_join(all[i], NULL);
        missed += same(shared, "bytes, expected");
        mm_map_close(shared);
    }
    check("threads", atomic_load(&good_reads) && !missed);
}

static void fill(void) { /* page by page where the system has no call for it */
    write_file(0, PAGES);
    struct mm_memory_problem problem;
    struct mm_map *map = mapped(1);
    bool good = mm_map_populate(map, 3, 5 * page, &problem) && mm_map_populate(map, 0, 0, &problem);
    if (truncate(paths[0], (off_t)page)) exit(2);
    check("populate", good && !mm_map_populate(map, 0, PAGES * page, &problem) && strstr(problem.text, "has changed"));
    mm_map_close(map);
}

/* ---- every other SIGBUS ---- */

static void fault(void) {
    int file = open(paths[2], O_RDWR | O_CREAT | O_TRUNC, 0600);
    if (file < 0 || ftruncate(file, (off_t)page)) exit(2);
    volatile char *memory = mmap(NULL, page, PROT_READ, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED || ftruncate(file, 0)) exit(2);
    (void)memory[5];
}

static void ours_after(void) {
    write_file(0, PAGES);
    struct mm_map *map = mapped(1);
    if (truncate(paths[0], 0)) exit(2);
    if (read_page(map, 7) || same(map, "has changed")) _exit(3);
    mm_map_close(map);
}

static struct sigaction theirs_before;
static volatile sig_atomic_t theirs, others;
static sigjmp_buf back;

static void set(void (*handler)(int), int flags, struct sigaction *old) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = handler;
    action.sa_flags = flags;
    sigaction(SIGBUS, &action, old);
}
static void count_it(int signal) {
    (void)signal;
    others++;
}
static void give_back_and_raise(int signal) { /* as faulthandler does */
    if (++theirs > 3) _exit(4);
    sigaction(SIGBUS, &theirs_before, NULL);
    raise(signal);
}
static void give_back_and_return(int signal) { /* as crash reporters do: the fault comes again */
    (void)signal;
    if (++theirs > 3) _exit(4);
    sigaction(SIGBUS, &theirs_before, NULL);
}
static void jump(int signal) { siglongjmp(back, ++theirs + 0 * signal); }

/* In each child a mapping is there; ours_after() shows that the guard is. */
static void plain(void) { fault(); }
static void sent(void) { kill(getpid(), SIGBUS); }
static void sent_and_ignored(void) {
    set(SIG_IGN, 0, NULL);
    ours_after();
    kill(getpid(), SIGBUS);
    _exit(0);
}
static void ignored_fault(void) {
    set(SIG_IGN, 0, NULL);
    ours_after();
    fault();
}
static void raising_after(void) {
    set(give_back_and_raise, SA_NODEFER, &theirs_before);
    ours_after();
    fault();
}
static void raising_later(void) { /* blocked while it runs */
    set(give_back_and_raise, 0, &theirs_before);
    ours_after();
    fault();
}
static void returning_after(void) {
    set(give_back_and_return, 0, &theirs_before);
    ours_after();
    fault();
}
static void once(void) { /* a handler for one signal, which then is the default again */
    set(count_it, (int)SA_RESETHAND, NULL);
    ours_after();
    kill(getpid(), SIGBUS);
    if (others != 1) _exit(5);
    ours_after();
    kill(getpid(), SIGBUS);
}
static void jumping(void) {
    set(jump, 0, &theirs_before);
    do {
        ours_after();
        if (!sigsetjmp(back, 1)) fault();
    } while (theirs < 3);
    sigaction(SIGBUS, &theirs_before, NULL); /* as whoever probes memory does; the one below is ours */
    ours_after();
    fault();
}
static void many(void) { /* each gives back what it found; the ninth kind is more than we follow */
    struct sigaction found[9];
    for (int i = 0; i < 9; i++) {
        const int kinds[] = {SA_NODEFER, SA_RESTART, SA_ONSTACK, SA_NOCLDSTOP};
        int flags = 0;
        for (int k = 0; k < 4; k++) flags |= i >> k & 1 ? kinds[k] : 0;
        set(count_it, flags, &found[i]);
        if (i < 7) ours_after();
    }
    for (int i = 0; i < 20; i++) {
        kill(getpid(), SIGBUS);
        if (others != i + 1) _exit(5);
        set(count_it, 0, NULL); /* a kind that was there */
        ours_after();
    }
    for (int i = 9; i--;) sigaction(SIGBUS, &found[i], NULL);
    ours_after();
    fault();
}
static void forked(void) {
    struct mm_map *map = mapped(1);
    write_file(0, PAGES);
    pid_t child = fork();
    if (!child) {
        ours_after();
        if (truncate(paths[0], 0)) exit(2);
        _exit(read_page(map, 3) || same(map, "has changed") ? 1 : 0);
    }
    int status = 1;
    if (waitpid(child, &status, 0) < 0 || status) _exit(6);
    if (read_page(map, 3) || same(map, "has changed")) _exit(7);
    fault();
}
static void closed(void) { /* a fault where a mapping of ours was */
    struct mm_map *map = mapped(1);
    char *place = mm_map_base(map);
    write_file(0, PAGES);
    mm_map_close(map);
    int file = open(paths[0], O_RDWR);
    if (mmap(place, page, PROT_READ, MAP_SHARED | MAP_FIXED, file, 0) == MAP_FAILED || ftruncate(file, 0)) _exit(2);
    (void)*(volatile char *)place;
}

static void child(const char *what, void (*run)(void), int signal) {
    fflush(stdout);
    pid_t process = fork();
    if (!process) {
        write_file(0, PAGES);
        mapped(1);
        run();
        _exit(1); /* it should not have come so far */
    }
    int status = 0;
    bool good = waitpid(process, &status, 0) == process && (signal ? WIFSIGNALED(status) && WTERMSIG(status) == signal : !status);
    if (!good) printf("status %#x\n", (unsigned)status);
    check(what, good);
}

/* What the question costs an op that takes 18 tensors, 3 of them mapped. */
static int print_speed(void) {
    const int calls = 100000;
    static const int elsewhere[10];
    write_file(0, PAGES);
    struct mm_map *map = mapped(1);
    struct mm_span spans[18];
    struct mm_memory_problem problem;
    for (size_t i = 0; i < 18; i++) spans[i] = (struct mm_span){elsewhere, sizeof elsewhere};
    for (size_t i = 3; i < 18; i += 5) spans[i] = (struct mm_span){(const char *)mm_map_base(map) + i * page, 3 * page};
    for (int round = 0; round < 7; round++) {
        struct timespec begin, end;
        clock_gettime(CLOCK_MONOTONIC, &begin);
        for (int i = 0; i < calls; i++) {
            mm_maps_watch();
            if (!mm_maps_same(spans, 18, &problem)) return 1;
        }
        clock_gettime(CLOCK_MONOTONIC, &end);
        printf("%.0f ns a call\n", ((double)(end.tv_sec - begin.tv_sec) * 1e9 + (double)(end.tv_nsec - begin.tv_nsec)) / calls);
    }
    mm_map_close(map);
    return 0;
}

int main(int argc, char **argv) {
    page = (size_t)sysconf(_SC_PAGESIZE);
    for (int f = 0; f < FILES; f++) snprintf(paths[f], sizeof paths[f], "%s/mapped%d", argc > 1 ? argv[1] : ".", f);
    if (argc > 2) return print_speed();
    set(SIG_DFL, 0, NULL); /* a sanitizer's own handler exits */
    child("a stranger's fault", plain, SIGBUS);
    child("a signal sent", sent, SIGBUS);
    child("a signal ignored", sent_and_ignored, 0);
    child("a fault can't be ignored", ignored_fault, SIGBUS);
    child("a handler put over ours that raises", raising_after, SIGBUS);
    child("a handler put over ours that raises later", raising_later, SIGBUS);
    child("a handler put over ours that returns", returning_after, SIGBUS);
    child("a handler for one signal", once, SIGBUS);
    child("a handler that jumps", jumping, SIGBUS);
    child("many handlers", many, SIGBUS);
    child("a fork", forked, SIGBUS);
    child("a mapping that was closed", closed, SIGBUS);
    set(count_it, 0, NULL); /* before ours: in this process, none was mapped so far */
    cut_short();
    kill(getpid(), SIGBUS);
    check("the handler before ours", others == 1);
    several();
    threads();
    fill();
    check("nothing else came to the handler before ours", others == 1);
    printf("%d wrong\n", wrong);
    return wrong > 0;
}
