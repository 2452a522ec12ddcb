/* Functions compiled for more than the build's flags say. COMPILE_FOR(clang's names, gcc's, ...) begins what END_TARGET ends; they don't nest. */
#ifndef MM_CPU_TARGET_H
#define MM_CPU_TARGET_H

#define PRAGMA_TEXT(...) _Pragma(#__VA_ARGS__)
#define PRAGMA(...) PRAGMA_TEXT(__VA_ARGS__)
#if defined(__clang__)
#define COMPILE_FOR(names, ...) PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define COMPILE_FOR(names, ...) PRAGMA(GCC push_options) PRAGMA(GCC target(__VA_ARGS__))
#define END_TARGET PRAGMA(GCC pop_options)
#endif

#endif
