// Tiles of weights of 8 bits with AVX2, FMA and F16C; see int8_avx512.hpp. Without AVX-VNNI vpmaddwd adds two products of
// int16 to an int32: 255 * 32,512 * 128 columns fit one.

#pragma once

#include "int4_avx2.hpp"
#include "int8_arrays.hpp"

constexpr int kWideTokens = 4;  // tokens in a tile of 8-bit weights: 8 sums in int32 and 4 in float32
constexpr int kWideAloneRows = 4;  // vectors of rows in a tile of one token, as for weights of 4 bits

#ifdef __AVXVNNI__

struct WideSums {
    __m256i high, low;
    void clear() { high = low = _mm256_setzero_si256(); }
    __m256i total() const { return _mm256_add_epi32(_mm256_slli_epi32(high, 8), low); }
};

struct WideCodes {
    __m256i rows;
    explicit WideCodes(const uint8_t* from) : rows(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))) {}
    void add_to(WideSums& sums, const int8_t* eight) const {
        add_products(sums.high, rows, broadcast_four(eight));
        add_products(sums.low, rows, broadcast_four(eight + kFour));
    }
};

#else

struct WideSums {
    __m256i first, last;  // of four rows, two sums in each
    void clear() { first = last = _mm256_setzero_si256(); }
    __m256i total() const { return _mm256_permute4x64_epi64(_mm256_hadd_epi32(first, last), 0xd8); }
};

struct WideCodes {
    __m256i first, last;
    explicit WideCodes(const uint8_t* from)
        : first(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))),
          last(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16)))) {}
    void add_to(WideSums& sums, const int8_t* eight) const {
        int64_t four;
        std::memcpy(&four, eight, sizeof four);
        const __m256i activations = _mm256_set1_epi64x(four);
        sums.first = _mm256_add_epi32(sums.first, _mm256_madd_epi16(first, activations));
        sums.last = _mm256_add_epi32(sums.last, _mm256_madd_epi16(last, activations));
        keep(sums.first);
        keep(sums.last);
    }
};

#endif

// Outputs of `tokens` tokens and `rows` vectors of rows.
template <int tokens, int rows>
inline __attribute__((always_inline)) void multiply_wide_tile(const Weights& weights, const Activations& x, float* out, int row,
                                                              size_t token) {
    const int groups = weights.groups(), columns = weights.columns, block = row / kLanes;
    const size_t stride = size_t(kLanes) * columns;  // bytes from one vector of rows to the next
    const uint8_t* codes = weights.codes + block * stride;
    const int8_t* activations = x.codes + token * columns * 2;
    __m256i zeros[rows];
    __m256 totals[rows][tokens];
    UNROLL for (int r = 0; r < rows; r++) {
        const uint8_t* from = weights.zeros + (block + r) * kLanes;
        zeros[r] = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
        UNROLL for (int t = 0; t < tokens; t++) totals[r][t] = _mm256_setzero_ps();
    }
    for (int g = 0; g < groups; g++) {
        WideSums sums[rows][tokens];
        UNROLL for (int r = 0; r < rows; r++) {
            UNROLL for (int t = 0; t < tokens; t++) sums[r][t].clear();
        }
        for (int column = g * weights.group; column < (g + 1) * weights.group; column += kFour) {
            UNROLL for (int r = 0; r < rows; r++) {
                const WideCodes of_rows(codes + r * stride + size_t(column) * kLanes);
                UNROLL for (int t = 0; t < tokens; t++) {
                    of_rows.add_to(sums[r][t], activations + (size_t(column) * tokens + t * kFour) * 2);
                }
            }
        }
        UNROLL for (int r = 0; r < rows; r++) {
            UNROLL for (int t = 0; t < tokens; t++) {
                const size_t at = (token + t) * groups + g;
                const __m256i zero = _mm256_mullo_epi32(zeros[r], _mm256_set1_epi32(x.sums[at]));
                const __m256 sum = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums[r][t].total(), zero));
                totals[r][t] = _mm256_fmadd_ps(_mm256_set1_ps(x.scales[at]), sum, totals[r][t]);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        const uint8_t* from = weights.scales + (block + r) * kLanes * 2;
        const __m256 scales = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        UNROLL for (int t = 0; t < tokens; t++) {
            _mm256_storeu_ps(out + (token + t) * weights.rows + row + r * kLanes, _mm256_mul_ps(totals[r][t], scales));
        }
    }
}
