/* What the processor can multiply at most: the ceiling of a prompt's speed, as bandwidth is that of decoding.
 *
 *     cc -O3 -march=native -pthread benchmarks/peak_arithmetic.c -o peak_arithmetic && ./peak_arithmetic [THREADS]
 *
 * Prints, for each kind of product that this processor has, 10^9 multiply-adds a second, all threads together: twelve
 * independent sums in registers, nothing read from memory; the best of five passes. A linear layer of `weights` numbers
 * takes as many multiply-adds a token, so the bound is peak / weights tokens a second, attention not counted.
 */

#include <immintrin.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define PASSES 5
#define STEPS 20000000L
#define SUMS 12 /* latency 4 times 2 units, and some more */

/* A function that runs STEPS times over SUMS instructions `sum += x * y`, which the compiler cannot leave out. */
#define KERNEL(name, type, zero, instruction)                                                      \
    static void *name(void *unused) {                                                              \
        type sums[SUMS], x = zero, y = zero;                                                       \
        for (int i = 0; i < SUMS; i++) sums[i] = zero;                                             \
        for (long step = 0; step < STEPS; step++)                                                  \
            _Pragma("GCC unroll 12") for (int i = 0; i < SUMS; i++)                                \
                __asm__ volatile(instruction " %1, %2, %0" : "+v"(sums[i]) : "v"(x), "v"(y));      \
        return unused;                                                                             \
    }

#ifdef __AVX512F__
KERNEL(float32, __m512, _mm512_setzero_ps(), "vfmadd231ps")
#define FLOAT32_LANES 16
#elif defined(__FMA__)
KERNEL(float32, __m256, _mm256_setzero_ps(), "vfmadd231ps")
#define FLOAT32_LANES 8
#endif
#ifdef __AVX512BF16__
KERNEL(bfloat16, __m512, _mm512_setzero_ps(), "vdpbf16ps")
#endif
#ifdef __AVX512VNNI__
KERNEL(int8, __m512i, _mm512_setzero_si512(), "vpdpbusd")
#endif

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void measure(const char *name, void *(*kernel)(void *), int threads, int lanes) {
    double best = 0;
    for (int pass = 0; pass < PASSES; pass++) {
        pthread_t started[threads];
        double begun = now();
        for (int i = 0; i < threads; i++)
            if (pthread_create(&started[i], NULL, kernel, NULL)) exit(1);
        for (int i = 0; i < threads; i++) pthread_join(started[i], NULL);
        double speed = (double)STEPS * SUMS * lanes * threads / (now() - begun) / 1e9;
        if (speed > best) best = speed;
    }
    printf("%-9s %7.1f GMAC/s with %d threads\n", name, best, threads);
}

int main(int count, char **arguments) {
    int threads = count > 1 ? atoi(arguments[1]) : 2;
    if (threads < 1 || threads > 1024) {
        fprintf(stderr, "threads are 1 to 1024\n");
        return 2;
    }
#ifdef FLOAT32_LANES
    measure("float32", float32, threads, FLOAT32_LANES);
#endif
#ifdef __AVX512BF16__
    measure("bfloat16", bfloat16, threads, 32);
#endif
#ifdef __AVX512VNNI__
    measure("int8", int8, threads, 64);
#endif
    return 0;
}
