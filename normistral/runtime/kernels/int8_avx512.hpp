// Tiles of weights of 8 bits with AVX512F, BW and VNNI: a product for the high bytes of activations, and one for the low
// ones. Reading the weights takes longer than both where tokens are few.

#pragma once

#include "int4_avx512.hpp"
#include "int8_arrays.hpp"

constexpr int kWideTokens = 8;  // tokens in a tile of 8-bit weights: 16 sums in int32 and 8 in float32
constexpr int kWideAloneRows = 1;  // vectors of rows in a tile of one token

template <int tokens, int rows>
inline __attribute__((always_inline)) void multiply_wide_tile(const Weights& weights, const Activations& x, float* out, int row,
                                                              size_t token) {
    static_assert(rows == 1);
    const int groups = weights.groups(), columns = weights.columns, block = row / kLanes;
    const uint8_t* codes = weights.codes + size_t(row) * columns;
    const int8_t* activations = x.codes + token * columns * 2;
    const __m512i zeros = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weights.zeros + block * kLanes)));
    constexpr int chains = tokens <= 2 ? 2 : 1;  // so that no product waits for the one before
    __m512 totals[tokens];
    UNROLL for (int t = 0; t < tokens; t++) totals[t] = _mm512_setzero_ps();
    for (int g = 0; g < groups; g++) {
        __m512i high[chains][tokens], low[chains][tokens];
        UNROLL for (int t = 0; t < tokens; t++) {
            UNROLL for (int c = 0; c < chains; c++) high[c][t] = low[c][t] = _mm512_setzero_si512();
            low[0][t] = _mm512_mullo_epi32(zeros, _mm512_set1_epi32(-x.sums[(token + t) * groups + g]));
        }
        for (int column = g * weights.group; column < (g + 1) * weights.group; column += chains * kFour) {
            UNROLL for (int c = 0; c < chains; c++) {
                const int at = column + c * kFour;
                __m512i both = _mm512_loadu_si512(codes + size_t(at) * kLanes);
                if constexpr (tokens >= kPrefetchTokens) {
                    _mm_prefetch(codes + size_t(at) * kLanes + kPrefetchBytes, _MM_HINT_T0);
                }
                asm("" : "+v"(both));  // loaded once, where gcc would load it for each use
                UNROLL for (int t = 0; t < tokens; t++) {
                    const int8_t* eight = activations + (size_t(at) * tokens + t * kFour) * 2;
                    add_products(high[c][t], both, eight);
                    add_products(low[c][t], both, eight + kFour);
                }
            }
        }
        UNROLL for (int t = 0; t < tokens; t++) {
            UNROLL for (int c = 1; c < chains; c++) {
                high[0][t] = _mm512_add_epi32(high[0][t], high[c][t]);
                low[0][t] = _mm512_add_epi32(low[0][t], low[c][t]);
            }
            const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high[0][t], 8), low[0][t]);
            totals[t] = _mm512_fmadd_ps(_mm512_set1_ps(x.scales[(token + t) * groups + g]), _mm512_cvtepi32_ps(sum), totals[t]);
        }
    }
    const uint8_t* from = weights.scales + block * kLanes * 2;
    const __m512 scales = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    UNROLL for (int t = 0; t < tokens; t++) {
        _mm512_storeu_ps(out + (token + t) * weights.rows + row, _mm512_mul_ps(totals[t], scales));
    }
}
