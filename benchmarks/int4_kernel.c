/* How fast can int4 weights be multiplied here? A kernel of its own, to judge the engines' by.
 *
 *     cc -O3 -march=native -pthread benchmarks/int4_kernel.c -o int4_kernel -lm && ./int4_kernel [THREADS]
 *
 * Products as the engines compute them in a layer of NorMistral-7B: weights of 4 bits in groups of 128 with a scale in
 * float16 and zero point 8, activations rounded to int8 in the same groups with a scale in float32, sums in int32,
 * results in float32. Prints 10^9 multiply-adds a second for 256 tokens, and GB of weights a second for one token, the
 * best of five passes over `LAYERS` layers, which no cache holds; each result is compared with plain arithmetic. Needs
 * AVX512 with VNNI.
 *
 * Layout: 64 bytes hold 16 rows of 8 columns, row by row 4 bytes; the low nibbles are columns 0 to 3, the high ones 4 to
 * 7. So one load gives two operands of vpdpbusd (unsigned weights, signed activations, which are broadcast). Sums start
 * at -8 times the sum of a group's activations: that is the zero point.
 */

#define _GNU_SOURCE
#include <immintrin.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define GROUP 128
#define LANES 16 /* rows in a vector */
#define ROWS 2   /* vectors of rows in a tile */
#define TOKENS 5 /* tokens in a tile: 2 * 5 sums in int32, as many in float32 */
#define STEP (LANES * ROWS)
#define LAYERS 4
#define PROMPT 256
#define PASSES 5
#define THREADS 64
#define PREFETCH 4096 /* bytes ahead, for single tokens */
#define UNROLL _Pragma("GCC unroll 16")

typedef struct {
    int rows, columns;
    uint8_t *codes;   /* [rows / 16][columns / 8][64] */
    uint16_t *scales; /* float16 [rows / 16][columns / GROUP][16] */
} Weights;

typedef struct {
    int tokens;
    int8_t *codes;     /* [tokens][columns] */
    float *scales;     /* [tokens][columns / GROUP] */
    int32_t *starts;   /* [tokens][columns / GROUP]: -8 * sum of the group's codes */
} Activations;

typedef struct {
    const Weights *weights;
    const Activations *inputs;
    float *outputs; /* [tokens][rows] */
    int begin, end; /* rows */
} Job;

/* `tokens` by ROWS vectors of outputs, kept in registers while the columns go by. */
static inline __attribute__((always_inline)) void multiply_tile(const Job *job, int row, int token, const int tokens) {
    const Weights *weights = job->weights;
    const Activations *inputs = job->inputs;
    const int columns = weights->columns, groups = columns / GROUP;
    const size_t stride = (size_t)LANES * columns / 2; /* bytes from one vector of rows to the next */
    const uint8_t *codes = weights->codes + (size_t)row * columns / 2;
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512 totals[ROWS][TOKENS];
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int t = 0; t < tokens; t++) totals[r][t] = _mm512_setzero_ps();
    for (int group = 0; group < groups; group++) {
        __m512i sums[ROWS][TOKENS];
        UNROLL for (int t = 0; t < tokens; t++)
            UNROLL for (int r = 0; r < ROWS; r++)
                sums[r][t] = _mm512_set1_epi32(inputs->starts[(size_t)(token + t) * groups + group]);
        for (int column = group * GROUP; column < (group + 1) * GROUP; column += 8) {
            __m512i low[ROWS], high[ROWS];
            UNROLL for (int r = 0; r < ROWS; r++) {
                const uint8_t *from = codes + r * stride + (size_t)column * 8;
                if (tokens == 1) _mm_prefetch((const char *)from + PREFETCH, _MM_HINT_T0);
                const __m512i both = _mm512_loadu_si512(from);
                low[r] = _mm512_and_si512(both, nibble);
                high[r] = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
            }
            UNROLL for (int t = 0; t < tokens; t++) {
                int32_t four[2];
                memcpy(four, inputs->codes + (size_t)(token + t) * columns + column, sizeof four);
                const __m512i first = _mm512_set1_epi32(four[0]), second = _mm512_set1_epi32(four[1]);
                UNROLL for (int r = 0; r < ROWS; r++) {
                    sums[r][t] = _mm512_dpbusd_epi32(sums[r][t], low[r], first);
                    sums[r][t] = _mm512_dpbusd_epi32(sums[r][t], high[r], second);
                }
            }
        }
        UNROLL for (int r = 0; r < ROWS; r++) {
            const uint16_t *from = weights->scales + ((size_t)(row / LANES + r) * groups + group) * LANES;
            const __m512 scales = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
            UNROLL for (int t = 0; t < tokens; t++) {
                const __m512 scale = _mm512_set1_ps(inputs->scales[(size_t)(token + t) * groups + group]);
                totals[r][t] =
                    _mm512_fmadd_ps(_mm512_mul_ps(scales, scale), _mm512_cvtepi32_ps(sums[r][t]), totals[r][t]);
            }
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int t = 0; t < tokens; t++)
            _mm512_storeu_ps(job->outputs + (size_t)(token + t) * weights->rows + row + r * LANES, totals[r][t]);
}

static void *multiply(void *argument) {
    const Job *job = argument;
    const int tokens = job->inputs->tokens;
    for (int row = job->begin; row < job->end; row += STEP) {
        int token = 0;
        for (; token + TOKENS <= tokens; token += TOKENS) multiply_tile(job, row, token, TOKENS);
        for (; token < tokens; token++) multiply_tile(job, row, token, 1);
    }
    return NULL;
}

static void on_threads(int threads, const Weights *weights, const Activations *inputs, float *outputs) {
    pthread_t started[THREADS];
    Job jobs[THREADS];
    const long steps = weights->rows / STEP;
    for (int i = 0; i < threads; i++) {
        jobs[i] = (Job){weights, inputs, outputs, steps * i / threads * STEP, steps * (i + 1) / threads * STEP};
        pthread_attr_t attributes;
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(i, &one);
        pthread_attr_init(&attributes);
        pthread_attr_setaffinity_np(&attributes, sizeof one, &one);
        if (pthread_create(&started[i], &attributes, multiply, &jobs[i])) exit(1);
    }
    for (int i = 0; i < threads; i++) pthread_join(started[i], NULL);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void *need(size_t bytes) {
    void *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (memory == NULL) exit(1);
    return memory;
}

static Weights make_weights(int rows, int columns) {
    const size_t count = (size_t)rows * columns;
    Weights weights = {rows, columns, need(count / 2), need(count / GROUP * 2)};
    for (size_t i = 0; i < count / 2; i++) weights.codes[i] = rand();
    for (size_t i = 0; i < count / GROUP; i++) weights.scales[i] = _cvtss_sh(0.001f * (1 + rand() % 100), 0);
    return weights;
}

static Activations make_activations(int tokens, int columns) {
    const size_t count = (size_t)tokens * columns;
    Activations inputs = {tokens, need(count), need(count / GROUP * 4), need(count / GROUP * 4)};
    for (size_t i = 0; i < count; i++) inputs.codes[i] = rand() % 255 - 127;
    for (size_t i = 0; i < count / GROUP; i++) {
        inputs.scales[i] = 0.001f * (1 + rand() % 100);
        inputs.starts[i] = 0;
        for (int k = 0; k < GROUP; k++) inputs.starts[i] -= 8 * inputs.codes[i * GROUP + k];
    }
    return inputs;
}

/* The same number by the definition, and how far it may be off. */
static void check(const Weights *weights, const Activations *inputs, const float *outputs, int row, int token) {
    const int columns = weights->columns, groups = columns / GROUP;
    double expected = 0, size = 0;
    for (int k = 0; k < columns; k++) {
        const uint8_t both = weights->codes[((size_t)(row / LANES) * (columns / 8) + k / 8) * 64 + row % LANES * 4 + k % 4];
        const int code = (k % 8 < 4 ? both & 15 : both >> 4) - 8;
        const float scale = _cvtsh_ss(weights->scales[((size_t)(row / LANES) * groups + k / GROUP) * LANES + row % LANES]);
        const double term = (double)code * scale * inputs->codes[(size_t)token * columns + k] *
                            inputs->scales[(size_t)token * groups + k / GROUP];
        expected += term;
        size += fabs(term);
    }
    if (fabs(expected - outputs[(size_t)token * weights->rows + row]) > 1e-5 * size) {
        fprintf(stderr, "row %d, token %d: %g instead of %g\n", row, token,
                outputs[(size_t)token * weights->rows + row], expected);
        exit(1);
    }
}

static double best_pass(int threads, const Weights *layers, const Activations *inputs, float *outputs) {
    double best = INFINITY;
    for (int pass = 0; pass < PASSES; pass++) {
        const double begun = now();
        for (int i = 0; i < LAYERS; i++) on_threads(threads, &layers[i], inputs, outputs);
        best = fmin(best, now() - begun);
    }
    for (int i = 0; i < 50; i++)
        check(&layers[LAYERS - 1], inputs, outputs, rand() % layers->rows, rand() % inputs->tokens);
    return best;
}

int main(int count, char **arguments) {
    const int threads = count > 1 ? atoi(arguments[1]) : 2;
    const int shapes[][2] = {{14336, 4096}, {4096, 14336}, {4096, 4096}};
    if (threads < 1 || threads > THREADS) {
        fprintf(stderr, "threads are 1 to %d\n", THREADS);
        return 2;
    }
    for (int shape = 0; shape < 3; shape++) {
        const int rows = shapes[shape][0], columns = shapes[shape][1];
        const double products = (double)LAYERS * rows * columns;
        Weights layers[LAYERS];
        for (int i = 0; i < LAYERS; i++) layers[i] = make_weights(rows, columns);
        float *outputs = need((size_t)PROMPT * rows * 4);
        const Activations prompt = make_activations(PROMPT, columns), token = make_activations(1, columns);
        const double prefill_s = best_pass(threads, layers, &prompt, outputs);
        const double decode_s = best_pass(threads, layers, &token, outputs);
        printf("%5d x %5d: %d tokens %6.1f GMAC/s, one token %5.1f GB/s, %d threads\n", rows, columns, PROMPT,
               products * PROMPT / prefill_s / 1e9, products * (0.5 + 2.0 / GROUP) / decode_s / 1e9, threads);
    }
    return 0;
}
