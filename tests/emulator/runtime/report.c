/* Settings, reports and counters: what a test sets and what it reads back.
 * Reports are collected, never printed: synchronize() in Python raises them. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runtime.h"

struct emu_settings emu_settings = {
#define X(name, value) .name = value,
    EMU_SETTINGS(X)
#undef X
};
struct emu_statistics emu_statistics;

enum { MOST_REPORTS = 1000 };
static struct report {
    bool error;
    const char *kind;
    uint64_t site;
    char *text;
} reports[MOST_REPORTS];
static int report_count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void emu_report(bool error, const char *kind, uint64_t site, const char *format, ...) {
    char *text = NULL;
    va_list arguments;
    va_start(arguments, format);
    int length = vasprintf(&text, format, arguments);
    va_end(arguments);
    if (length < 0) return;
    pthread_mutex_lock(&lock);
    bool known = report_count == MOST_REPORTS;
    for (int i = 0; i < report_count && !known; i++)
        known = reports[i].site == site && !strcmp(reports[i].kind, kind) && (site || !strcmp(reports[i].text, text));
    if (known)
        free(text);
    else
        reports[report_count++] = (struct report){error, kind, site, text};
    pthread_mutex_unlock(&lock);
}

uint64_t emu_site(const char *file, int line, const void *what) {
    uint64_t hash = 0xCBF29CE484222325ul;
    for (; file && *file; file++) hash = (hash ^ (unsigned char)*file) * 0x100000001B3ul;
    hash = (hash ^ (uint64_t)line) * 0x9E3779B97F4A7C15ul;
    hash = (hash ^ (uint64_t)(uintptr_t)what) * 0x9E3779B97F4A7C15ul;
    const void *kernel = emu_worker && emu_worker->dispatch ? emu_worker->dispatch->kernel : NULL;
    hash = (hash ^ (uint64_t)(uintptr_t)kernel) * 0x9E3779B97F4A7C15ul;
    return hash | 1;
}

/* The object's path and the offset in it, between control characters: Python has the reader of line tables. */
struct emu_text emu_place(const void *return_address) {
    struct emu_text place = {"an unknown place"};
    Dl_info info;
    if (dladdr(return_address, &info) && info.dli_fname)
        snprintf(place.text, sizeof place.text, "\002%s\003%lx\004", info.dli_fname,
                 (unsigned long)((uintptr_t)return_address - (uintptr_t)info.dli_fbase - 1));
    return place;
}

/* ---- for Python ---- */

EMU_EXPORT int emu_configure(const char *name, int value) {
#define X(setting, initial)                          \
    if (!strcmp(name, #setting)) {                   \
        int before = emu_settings.setting;           \
        emu_settings.setting = value;                \
        return before;                               \
    }
    EMU_SETTINGS(X)
#undef X
    return -1;
}

EMU_EXPORT const char *emu_setting_names(void) {
#define X(setting, initial) #setting " "
    return EMU_SETTINGS(X);
#undef X
}

EMU_EXPORT const char *emu_statistic_names(void) {
#define X(name) #name " "
    return EMU_STATISTICS(X);
#undef X
}

EMU_EXPORT void emu_read_statistics(uint64_t *values) {
#define X(name) *values++ = atomic_load(&emu_statistics.name);
    EMU_STATISTICS(X)
#undef X
}

EMU_EXPORT int emu_report_count(void) {
    pthread_mutex_lock(&lock);
    int count = report_count;
    pthread_mutex_unlock(&lock);
    return count;
}

/* The strings stay valid until emu_reset_reports. */
EMU_EXPORT bool emu_report_read(int index, const char **kind, const char **text) {
    pthread_mutex_lock(&lock);
    struct report report = reports[index];
    pthread_mutex_unlock(&lock);
    *kind = report.kind;
    *text = report.text;
    return report.error;
}

EMU_EXPORT void emu_reset_reports(void) {
    pthread_mutex_lock(&lock);
    while (report_count) free(reports[--report_count].text);
    pthread_mutex_unlock(&lock);
}

EMU_EXPORT void emu_reset_statistics(void) {
#define X(name) atomic_store(&emu_statistics.name, 0);
    EMU_STATISTICS(X)
#undef X
}
