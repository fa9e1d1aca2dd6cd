/* What the processor can multiply at most: the ceiling of a prompt's speed, as bandwidth is that of decoding.
 *
 *     cc -O3 -march=native -pthread benchmarks/peak_arithmetic.c -o peak_arithmetic && ./peak_arithmetic [THREADS]
 *
 * Prints, for each kind of product that this processor has, 10^9 multiply-adds a second, all threads together: twelve
 * independent sums in registers, nothing read from memory; the best of five passes. A linear layer of `weights` numbers
 * takes as many multiply-adds a token, so the bound is peak / weights tokens a second, attention not counted.
 */

#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define PASSES 5
#define STEPS 20000000L
#define SUMS 12 /* latency 4 times 2 units, and some more */

/* A function that runs STEPS times over SUMS products: register n += register 12 * register 13. */
#define FUSED(instruction, kind, n) instruction " %%" kind "12, %%" kind "13, %%" kind #n "\n\t"
#define KERNEL(name, one, instruction, kind)                                                               \
    static void *name(void *unused) {                                                                      \
        for (long step = 0; step < STEPS; step++)                                                          \
            __asm__ volatile(one(instruction, kind, 0) one(instruction, kind, 1) one(instruction, kind, 2) \
                             one(instruction, kind, 3) one(instruction, kind, 4) one(instruction, kind, 5) \
                             one(instruction, kind, 6) one(instruction, kind, 7) one(instruction, kind, 8) \
                             one(instruction, kind, 9) one(instruction, kind, 10)                          \
                             one(instruction, kind, 11) ::                                                 \
                             : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",     \
                               "xmm9", "xmm10", "xmm11", "xmm14");                                         \
        return unused;                                                                                     \
    }

#ifdef __AVX512F__
KERNEL(float32, FUSED, "vfmadd231ps", "zmm")
#define FLOAT32_LANES 16
#elif defined(__FMA__)
KERNEL(float32, FUSED, "vfmadd231ps", "ymm")
#define FLOAT32_LANES 8
#endif
#ifdef __AVX512BF16__
KERNEL(bfloat16, FUSED, "vdpbf16ps", "zmm")
#endif
#ifdef __AVX512VNNI__
KERNEL(int8, FUSED, "vpdpbusd", "zmm")
#define INT8_PRODUCTS 64
#elif defined(__AVX2__)
/* Two products of int8 to an int16, and a sum of its own for it: what AVX2 has instead. */
#define PAIRED(instruction, kind, n) \
    instruction " %%" kind "12, %%" kind "13, %%" kind "14\n\tvpaddw %%" kind "14, %%" kind #n ", %%" kind #n "\n\t"
KERNEL(int8, PAIRED, "vpmaddubsw", "ymm")
#define INT8_PRODUCTS 32
#endif

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void measure(const char *name, void *(*kernel)(void *), int threads, pthread_attr_t *on_cpu, int lanes) {
    double best = 0;
    for (int pass = 0; pass < PASSES; pass++) {
        pthread_t started[threads];
        double begun = now();
        for (int i = 0; i < threads; i++)
            if (pthread_create(&started[i], &on_cpu[i], kernel, NULL)) exit(1);
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
    pthread_attr_t on_cpu[threads]; /* left to itself, the system may keep threads of a tenth of a second on one CPU */
    cpu_set_t allowed;
    sched_getaffinity(0, sizeof allowed, &allowed);
    for (int i = 0, cpu = 0; i < threads; i++, cpu++) {
        while (cpu < CPU_SETSIZE && !CPU_ISSET(cpu, &allowed)) cpu++;
        if (cpu == CPU_SETSIZE) {
            fprintf(stderr, "there are only %d CPUs\n", i);
            return 2;
        }
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        pthread_attr_init(&on_cpu[i]);
        pthread_attr_setaffinity_np(&on_cpu[i], sizeof one, &one);
    }
#ifdef FLOAT32_LANES
    measure("float32", float32, threads, on_cpu, FLOAT32_LANES);
#endif
#ifdef __AVX512BF16__
    measure("bfloat16", bfloat16, threads, on_cpu, 32);
#endif
#ifdef INT8_PRODUCTS
    measure("int8", int8, threads, on_cpu, INT8_PRODUCTS);
#endif
    return 0;
}
