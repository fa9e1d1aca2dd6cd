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

/* A function that runs STEPS times over SUMS instructions: register n += register 12 * register 13. */
#define ONE(instruction, kind, n) instruction " %%" kind "12, %%" kind "13, %%" kind #n "\n\t"
#define KERNEL(name, instruction, kind)                                                                    \
    static void *name(void *unused) {                                                                      \
        for (long step = 0; step < STEPS; step++)                                                          \
            __asm__ volatile(ONE(instruction, kind, 0) ONE(instruction, kind, 1) ONE(instruction, kind, 2) \
                             ONE(instruction, kind, 3) ONE(instruction, kind, 4) ONE(instruction, kind, 5) \
                             ONE(instruction, kind, 6) ONE(instruction, kind, 7) ONE(instruction, kind, 8) \
                             ONE(instruction, kind, 9) ONE(instruction, kind, 10)                          \
                             ONE(instruction, kind, 11) ::                                                 \
                             : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",     \
                               "xmm9", "xmm10", "xmm11");                                                  \
        return unused;                                                                                     \
    }

#ifdef __AVX512F__
KERNEL(float32, "vfmadd231ps", "zmm")
#define FLOAT32_LANES 16
#elif defined(__FMA__)
KERNEL(float32, "vfmadd231ps", "ymm")
#define FLOAT32_LANES 8
#endif
#ifdef __AVX512BF16__
KERNEL(bfloat16, "vdpbf16ps", "zmm")
#endif
#ifdef __AVX512VNNI__
KERNEL(int8, "vpdpbusd", "zmm")
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
#ifdef __AVX512VNNI__
    measure("int8", int8, threads, on_cpu, 64);
#endif
    return 0;
}
