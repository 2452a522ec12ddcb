/* The command queue: commands run in order on a thread of their own, after a commit.
 * PyTorch commits when it sees fit, so nothing may depend on when: the emulator commits every few dispatches, or only when
 * someone waits (commit_every = 0), and can lag behind (delay_us). */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "runtime.h"

struct command {
    struct command *next;
    void (*run)(void *);
    void *data;
};
struct list {
    struct command *first, **last;
};
static struct list encoded = {NULL, &encoded.first}, committed = {NULL, &committed.first};
static bool busy, started;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work = PTHREAD_COND_INITIALIZER, idle = PTHREAD_COND_INITIALIZER;

static void *run_queue(void *unused) {
    pthread_mutex_lock(&lock);
    for (;;) {
        while (!committed.first) {
            busy = false;
            pthread_cond_broadcast(&idle);
            pthread_cond_wait(&work, &lock);
        }
        struct command *command = committed.first;
        committed.first = command->next;
        if (!committed.first) committed.last = &committed.first;
        busy = true;
        pthread_mutex_unlock(&lock);
        if (emu_settings.delay_us > 0) usleep((useconds_t)emu_settings.delay_us);
        command->run(command->data);
        free(command);
        pthread_mutex_lock(&lock);
    }
    return unused;
}

void emu_queue_encode(void (*run)(void *), void *data) {
    struct command *command = malloc(sizeof *command);
    if (!command) abort();
    *command = (struct command){NULL, run, data};
    pthread_mutex_lock(&lock);
    *encoded.last = command;
    encoded.last = &command->next;
    pthread_mutex_unlock(&lock);
}

void emu_queue_commit(void) {
    pthread_mutex_lock(&lock);
    if (!started) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, run_queue, NULL)) abort();
        pthread_detach(thread);
        started = true;
    }
    if (encoded.first) {
        *committed.last = encoded.first;
        committed.last = encoded.last;
        encoded = (struct list){NULL, &encoded.first};
        pthread_cond_signal(&work);
    }
    pthread_mutex_unlock(&lock);
}

bool emu_queue_wait(double seconds) {
    struct timespec until;
    emu_queue_commit();
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += (time_t)seconds;
    until.tv_nsec += (long)((seconds - (double)(time_t)seconds) * 1e9);
    if (until.tv_nsec >= 1000000000) until.tv_sec++, until.tv_nsec -= 1000000000;
    pthread_mutex_lock(&lock);
    int result = 0;
    while ((committed.first || busy) && result != ETIMEDOUT) result = pthread_cond_timedwait(&idle, &lock, &until);
    bool finished = !committed.first && !busy;
    pthread_mutex_unlock(&lock);
    return finished;
}
