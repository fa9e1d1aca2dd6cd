// Tiles and rounding with AVX2, FMA and F16C. vpmaddubsw adds two products of int8 to an int16; with codes up to 15 and
// activations down to -128, eight of those sums fit one int16 (15 * 128 * 2 * 8 = 30,720), and are then widened. With
// AVX-VNNI vpdpbusd adds four products to an int32, which holds a whole group.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <limits>
#include <numeric>

#include "int4_arrays.hpp"

constexpr int kLanes = 8;     // rows in a vector
constexpr int kRows = 2;      // vectors of rows in a tile of several tokens
constexpr int kTokens = 4;    // tokens in a tile: 8 sums in int16, and 4 operands from codes, in 16 registers
constexpr int kAloneRows = 4;  // vectors of rows in a tile of one token: what it takes to read as fast as memory gives

inline __attribute__((always_inline)) __m256i broadcast_four(const int8_t* from) {
    return _mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(from)));
}

// Keeps a sum in its register: left free to reorder, gcc 12 puts five of eight of them on the stack, and the tile takes a
// third longer.
inline __attribute__((always_inline)) void keep(__m256i& sum) { asm("" : "+x"(sum)); }

#ifdef __AVXVNNI__

constexpr int fitting_columns(int group) { return group; }

inline __attribute__((always_inline)) void add_products(__m256i& sum, __m256i codes, __m256i activations) {
    sum = _mm256_dpbusd_avx_epi32(sum, codes, activations);
    keep(sum);
}

inline __attribute__((always_inline)) __m256i widen(__m256i sum) { return sum; }

#else

// Columns whose products fit the narrow sums; groups are multiples of it.
constexpr int fitting_columns(int) { return 4 * kColumns; }

inline __attribute__((always_inline)) void add_products(__m256i& sum, __m256i codes, __m256i activations) {
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, activations));
    keep(sum);
}

inline __attribute__((always_inline)) __m256i widen(__m256i sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }

#endif

// Outputs of `tokens` tokens and `rows` vectors of rows.
template <int tokens, int rows>
inline __attribute__((always_inline)) void multiply_tile(const Weights& weights, const Activations& x, float* out, int row,
                                                         size_t token) {
    const int groups = weights.groups(), columns = weights.columns, fitting = fitting_columns(weights.group);
    const size_t stride = size_t(kLanes) * columns / 2;  // bytes from one vector of rows to the next
    const size_t block = row / kLanes;
    const uint8_t* codes = weights.codes + block * stride;
    const int8_t* activations = x.codes + token * columns;
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256 totals[rows][tokens];
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int t = 0; t < tokens; t++) totals[r][t] = _mm256_setzero_ps();
    }
    for (int g = 0; g < groups; g++) {
        __m256i sums[rows][tokens];
        UNROLL for (int r = 0; r < rows; r++) {
            const uint8_t* from = weights.zeros + ((block + r) * groups + g) * kLanes;
            const __m256i zeros = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
            UNROLL for (int t = 0; t < tokens; t++) {
                sums[r][t] = _mm256_mullo_epi32(zeros, _mm256_set1_epi32(-x.sums[(token + t) * groups + g]));
            }
        }
        const int end = (g + 1) * weights.group;
        for (int begin = g * weights.group; begin < end; begin += fitting) {
            __m256i narrow[rows][tokens];
            UNROLL for (int r = 0; r < rows; r++) {
                UNROLL for (int t = 0; t < tokens; t++) narrow[r][t] = _mm256_setzero_si256();
            }
            for (int column = begin; column < begin + fitting; column += kColumns) {
                __m256i low[rows], high[rows];
                UNROLL for (int r = 0; r < rows; r++) {
                    const uint8_t* from = codes + r * stride + size_t(column) * kLanes / 2;
                    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
                    low[r] = _mm256_and_si256(both, nibble);
                    high[r] = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
                }
                UNROLL for (int t = 0; t < tokens; t++) {
                    const int8_t* four = activations + (size_t(column) * tokens + t * 4);
                    const __m256i first = broadcast_four(four), second = broadcast_four(four + 4 * tokens);
                    UNROLL for (int r = 0; r < rows; r++) add_products(narrow[r][t], low[r], first);
                    UNROLL for (int r = 0; r < rows; r++) add_products(narrow[r][t], high[r], second);
                }
            }
            UNROLL for (int r = 0; r < rows; r++) {
                UNROLL for (int t = 0; t < tokens; t++) {
                    sums[r][t] = _mm256_add_epi32(sums[r][t], widen(narrow[r][t]));
                }
            }
        }
        UNROLL for (int r = 0; r < rows; r++) {
            const uint8_t* from = weights.scales + ((block + r) * groups + g) * kLanes * 2;
            const __m256 scales = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
            UNROLL for (int t = 0; t < tokens; t++) {
                const __m256 scale = _mm256_mul_ps(scales, _mm256_set1_ps(x.scales[(token + t) * groups + g]));
                totals[r][t] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(sums[r][t]), totals[r][t]);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int t = 0; t < tokens; t++) {
            _mm256_storeu_ps(out + (token + t) * weights.rows + row + r * kLanes, totals[r][t]);
        }
    }
}

// One token's activations to int8, four side by side and `width` fours from the next; a scale for each group. Where one
// of a group is not finite, neither is its scale.
inline void quantise(const float* x, int columns, int group, int width, int8_t* codes, float* scales,
                     int32_t* sums) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    for (int g = 0; g < columns / group; g++) {
        const float* from = x + g * group;
        __m256 most = _mm256_setzero_ps(), not_a_number = _mm256_setzero_ps();
        for (int i = 0; i < group; i += kLanes) {
            const __m256 size = _mm256_and_ps(_mm256_loadu_ps(from + i), magnitude);
            not_a_number = _mm256_or_ps(not_a_number, _mm256_cmp_ps(size, size, _CMP_UNORD_Q));
            most = _mm256_max_ps(size, most);
        }
        alignas(32) float sizes[kLanes];
        _mm256_store_ps(sizes, most);
        const float top = _mm256_movemask_ps(not_a_number) ? std::numeric_limits<float>::quiet_NaN()
                                                           : *std::max_element(sizes, sizes + kLanes);
        const __m256 inverse = _mm256_set1_ps(top > 0 ? 127.0f / top : 0.0f);
        __m256i sum = _mm256_setzero_si256();
        for (int i = 0; i < group; i += kLanes) {
            const __m256i code = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + i), inverse));
            const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
            store_fours<2>(_mm_packs_epi16(words, words), codes + size_t(g * group + i) * width, width);
            sum = _mm256_add_epi32(sum, code);
        }
        alignas(32) int32_t parts[kLanes];
        _mm256_store_si256(reinterpret_cast<__m256i*>(parts), sum);
        scales[g] = top / 127.0f;
        sums[g] = std::accumulate(parts, parts + kLanes, 0);
    }
}
