/* What the AVX-VNNI, AVX-512 and AMX levels take from the machine without an intrinsic: the target that they are compiled for, the instructions
 * written by hand, and whether the CPU has them all. In one place so that a test can put C in theirs: tests/emulated_avx512.h defines every
 * name in here, and so runs the levels' own text on CPUs without them. Included by a level's file before x86.h. */
#ifndef MM_EMULATED_AVX512

/* AVX-VNNI: the multiply-adds of AVX-512's VNNI for registers of 256 bits, on CPUs without AVX-512. */
#define HAS_AVX_VNNI (cpu_has(SAVES_YMM, bit_AVX2, 0, 0) && cpu_has_avx_vnni())
#define VEX_VPDPWSSD(sums, a, b) __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sums) : "x"(a), "x"(b))
#define VEX_VPDPBUSD(sums, a, b) __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(a), "x"(b))

#define AVX512_TARGET "avx2,fma,f16c,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni"
#define HAS_AVX512(edx)                                                              \
    cpu_has(SAVES_YMM | SAVES_ZMM, bit_AVX2 | bit_AVX512F | bit_AVX512BW | bit_AVX512VL, \
            bit_AVX512VBMI | bit_AVX512VBMI2 | bit_AVX512VNNI, edx)

/* sums [16] += pairs of signed words a * b, and fours of unsigned bytes a * signed bytes b. Not the intrinsics: clang makes a multiply-add
 * and an addition of them where it sees a long chain (1.7 x slower). */
#define VPDPWSSD(sums, a, b) __asm__("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b))
#define VPDPBUSD(sums, a, b) __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b))

/* Binary16, rounded once: sum = a + b, and a = a * b + c; words = a's nearest integers. By hand, since clang's headers have the intrinsics only where a whole file is
 * compiled for them; so it is with the tiles. */
#define VADDPH(sum, a, b) __asm__("vaddph %2, %1, %0" : "=v"(sum) : "v"(a), "v"(b))
#define VCVTPH2W(words, a) __asm__("vcvtph2w %1, %0" : "=v"(words) : "v"(a))
#define VFMADD213PH(a, b, c) __asm__("vfmadd213ph %2, %1, %0" : "+v"(a) : "v"(b), "v"(c))

#define TILE_CONFIGURE(config) __asm__ volatile("ldtilecfg %0" ::"m"(config))
#define TILE_RELEASE() __asm__ volatile("tilerelease")
#define TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm%c0" ::"i"(tile))
#define TILE_LOAD(tile, from, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"((int64_t)(stride)), "i"(tile) : "memory")
#define TILE_STORE(to, stride, tile) \
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"((int64_t)(stride)), "i"(tile) : "memory")
/* sums += signed bytes of `inputs` times unsigned or signed bytes of `weights` */
#define TILE_MULTIPLY_UNSIGNED(sums, inputs, weights) \
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(inputs), "i"(weights))
#define TILE_MULTIPLY_SIGNED(sums, inputs, weights) \
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(inputs), "i"(weights))

/* Linux saves the tiles only for processes that asked: 8 KB a thread, and room for them on every signal's stack. */
#if defined(__linux__)
#define HAS_TILE (1u << 24) /* of edx */
#define HAS_TILE_INT8 (1u << 25)
#define REQUEST_PERMISSION 0x1023 /* ARCH_REQ_XCOMP_PERM */
#define TILE_DATA 18              /* XFEATURE_XTILEDATA */
#define HAS_AMX (cpu_has(SAVES_TILES, 0, 0, HAS_TILE | HAS_TILE_INT8) && !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA))
#else
#define HAS_AMX false
#endif

#endif
