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

// Lines of all codes of a tile's rows: with several tiles of tokens only the first would read from memory, and memory would idle
// while the others compute. So each tile fetches its share of the rows behind.
constexpr int kAheadLines = kRows * kLanes * kPart / 2 / kLine;

inline __attribute__((always_inline)) __m256i broadcast_four(const int8_t* from) {
    return _mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(from)));
}

// Keeps a sum in its register: left free to reorder, gcc 12 puts five of eight of them on the stack, and the tile takes a
// third longer.
inline __attribute__((always_inline)) void keep(__m256i& sum) { asm("" : "+x"(sum)); }

#ifdef __AVXVNNI__

inline __attribute__((always_inline)) void add_products(__m256i& sum, __m256i codes, __m256i activations) {
    sum = _mm256_dpbusd_avx_epi32(sum, codes, activations);
    keep(sum);
}

struct Sum {
    __m256i whole;
    inline __attribute__((always_inline)) void add(__m256i codes, __m256i activations, bool) {
        add_products(whole, codes, activations);
    }
    void end_part() {}
};

#else

struct Sum {
    __m256i whole, narrow;
    // The first products of a part take the narrow sum's place: to clear it and add to it took a tenth of a prompt's time.
    inline __attribute__((always_inline)) void add(__m256i codes, __m256i activations, bool first) {
        const __m256i products = _mm256_maddubs_epi16(codes, activations);
        narrow = first ? products : _mm256_add_epi16(narrow, products);
        keep(narrow);
    }
    inline __attribute__((always_inline)) void end_part() {
        whole = _mm256_add_epi32(whole, _mm256_madd_epi16(narrow, _mm256_set1_epi16(1)));
    }
};

#endif

// Outputs of `tokens` tokens and `rows` vectors of rows.
template <int tokens, int rows>
inline __attribute__((always_inline)) void multiply_tile(const Weights& weights, const Activations& x, float* out, int row,
                                                         size_t token, Ahead ahead) {
    const int groups = weights.groups(), columns = weights.columns;
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
        Sum sums[rows][tokens];
        UNROLL for (int r = 0; r < rows; r++) {
            const uint8_t* from = weights.zeros + ((block + r) * groups + g) * kLanes;
            const __m256i zeros = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
            UNROLL for (int t = 0; t < tokens; t++) {
                sums[r][t].whole = _mm256_mullo_epi32(zeros, _mm256_set1_epi32(-x.sums[(token + t) * groups + g]));
            }
        }
        const int end = (g + 1) * weights.group;
        for (int begin = g * weights.group; begin < end; begin += kPart) {
            for (int i = 0; i < ahead.lines; i++, ahead.codes += kLine) _mm_prefetch(ahead.codes, _MM_HINT_T0);
            UNROLL for (int step = 0; step < kPart / kColumns; step++) {
                const int column = begin + step * kColumns;
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
                    UNROLL for (int r = 0; r < rows; r++) sums[r][t].add(low[r], first, step == 0);
                    UNROLL for (int r = 0; r < rows; r++) sums[r][t].add(high[r], second, false);
                }
            }
            UNROLL for (int r = 0; r < rows; r++) {
                UNROLL for (int t = 0; t < tokens; t++) sums[r][t].end_part();
            }
        }
        UNROLL for (int r = 0; r < rows; r++) {
            const uint8_t* from = weights.scales + ((block + r) * groups + g) * kLanes * 2;
            const __m256 scales = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
            UNROLL for (int t = 0; t < tokens; t++) {
                const __m256 scale = _mm256_mul_ps(scales, _mm256_set1_ps(x.scales[(token + t) * groups + g]));
                totals[r][t] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(sums[r][t].whole), totals[r][t]);
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
