// Tiles and rounding with AVX512F, BW and VNNI: vpdpbusd adds four products of int8 to an int32.

#pragma once

#include <immintrin.h>

#include <limits>

#include "int4_arrays.hpp"

constexpr int kLanes = 16;     // rows in a vector
constexpr int kRows = 1;       // vectors of rows in a tile of several tokens
constexpr int kTokens = 12;    // tokens in a tile: 12 sums in int32 and as many in float32
constexpr int kAloneRows = 1;  // vectors of rows in a tile of one token
constexpr int kAheadLines = 0;  // of the rows behind a tile; it fetches its own, kPrefetchBytes ahead
// So many tokens hold the processor up for so long at each line of codes that it no longer fetches ahead by itself.
constexpr int kPrefetchTokens = 4, kPrefetchBytes = 4096;

// Four activations are broadcast by the product's own operand: a broadcast apart takes a third of a cycle more for each
// product (Zen 4), and gcc 12 knows no intrinsic for it. The assembly also keeps sums in their registers.
inline __attribute__((always_inline)) void add_products(__m512i& sum, __m512i codes, const int8_t* four) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*reinterpret_cast<const int32_t*>(four)));
}

// Outputs of `tokens` tokens and `rows` vectors of rows, kept in registers while the columns go by. Where these are few,
// low and high nibbles have sums of their own, so that no product waits for the one before. One vector of rows is one
// stream of memory, which the processor fetches ahead by itself where tokens are few: better than with two streams.
template <int tokens, int rows>
inline __attribute__((always_inline)) void multiply_tile(const Weights& weights, const Activations& x, float* out, int row,
                                                         size_t token, Ahead) {
    const int groups = weights.groups(), columns = weights.columns;
    const size_t stride = size_t(kLanes) * columns / 2;  // bytes from one vector of rows to the next
    const size_t block = row / kLanes;
    const uint8_t* codes = weights.codes + block * stride;
    const int8_t* activations = x.codes + token * columns;
    const __m512i nibble = _mm512_set1_epi8(15);
    constexpr bool apart = tokens * rows <= 4;
    __m512 totals[rows][tokens];
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int t = 0; t < tokens; t++) totals[r][t] = _mm512_setzero_ps();
    }
    for (int g = 0; g < groups; g++) {
        __m512i sums[rows][tokens], high_sums[rows][tokens];
        UNROLL for (int r = 0; r < rows; r++) {
            const uint8_t* from = weights.zeros + ((block + r) * groups + g) * kLanes;
            const __m512i zeros = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
            UNROLL for (int t = 0; t < tokens; t++) {
                sums[r][t] = _mm512_mullo_epi32(zeros, _mm512_set1_epi32(-x.sums[(token + t) * groups + g]));
                high_sums[r][t] = _mm512_setzero_si512();
            }
        }
        for (int column = g * weights.group; column < (g + 1) * weights.group; column += kColumns) {
            __m512i low[rows], high[rows];
            UNROLL for (int r = 0; r < rows; r++) {
                __m512i both = _mm512_loadu_si512(codes + r * stride + size_t(column) * kColumns);
                if constexpr (tokens >= kPrefetchTokens) {
                    _mm_prefetch(codes + r * stride + size_t(column) * kColumns + kPrefetchBytes, _MM_HINT_T0);
                }
                asm("" : "+v"(both));  // loaded once, where gcc would load it for each use
                low[r] = _mm512_and_si512(both, nibble);
                high[r] = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
            }
            UNROLL for (int t = 0; t < tokens; t++) {
                const int8_t* four = activations + (size_t(column) * tokens + t * 4);
                UNROLL for (int r = 0; r < rows; r++) {
                    __m512i& high_sum = apart ? high_sums[r][t] : sums[r][t];
                    add_products(sums[r][t], low[r], four);
                    add_products(high_sum, high[r], four + 4 * tokens);
                }
            }
        }
        UNROLL for (int r = 0; r < rows; r++) {
            const uint8_t* from = weights.scales + ((block + r) * groups + g) * kLanes * 2;
            const __m512 scales = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
            UNROLL for (int t = 0; t < tokens; t++) {
                const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(x.scales[(token + t) * groups + g]));
                const __m512i sum = apart ? _mm512_add_epi32(sums[r][t], high_sums[r][t]) : sums[r][t];
                totals[r][t] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(sum), totals[r][t]);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int t = 0; t < tokens; t++) {
            _mm512_storeu_ps(out + (token + t) * weights.rows + row + r * kLanes, totals[r][t]);
        }
    }
}

// One token's activations to int8, four side by side and `width` fours from the next; a scale for each group. Where one
// of a group is not finite, neither is its scale.
inline void quantise(const float* x, int columns, int group, int width, int8_t* codes, float* scales,
                     int32_t* sums) {
    for (int g = 0; g < columns / group; g++) {
        const float* from = x + g * group;
        __m512 most = _mm512_setzero_ps();
        __mmask16 not_a_number = 0;
        for (int i = 0; i < group; i += kLanes) {
            const __m512 size = _mm512_abs_ps(_mm512_loadu_ps(from + i));
            not_a_number |= _mm512_cmp_ps_mask(size, size, _CMP_UNORD_Q);
            most = _mm512_max_ps(size, most);
        }
        const float top = not_a_number ? std::numeric_limits<float>::quiet_NaN() : _mm512_reduce_max_ps(most);
        const __m512 inverse = _mm512_set1_ps(top > 0 ? 127.0f / top : 0.0f);
        __m512i sum = _mm512_setzero_si512();
        for (int i = 0; i < group; i += kLanes) {
            const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from + i), inverse));
            sum = _mm512_add_epi32(sum, code);
            store_fours<4>(_mm512_cvtsepi32_epi8(code), codes + size_t(g * group + i) * width, width);
        }
        scales[g] = top / 127.0f;
        sums[g] = _mm512_reduce_add_epi32(sum);
    }
}
