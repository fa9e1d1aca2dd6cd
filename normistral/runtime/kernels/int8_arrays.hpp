// Activations for weights of 8 bits: 16 bits, so that nothing is lost beside the weights.

#pragma once

#include <algorithm>
#include <limits>

#include "int4_arrays.hpp"

// Eight activations as bytes, four columns beside each other. Where there are products of bytes, each four is 256 * high + low:
// four high bytes, then four low ones; elsewhere four int16.
inline __m128i split_wide(__m256i eight) {
    const auto narrow = [](__m256i values) {
        return _mm_packs_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
    };
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
    const __m256i high = _mm256_srai_epi32(_mm256_add_epi32(eight, _mm256_set1_epi32(128)), 8);
    const __m256i low = _mm256_sub_epi32(eight, _mm256_slli_epi32(high, 8));
    return _mm_shuffle_epi32(_mm_packs_epi16(narrow(high), narrow(low)), _MM_SHUFFLE(3, 1, 2, 0));
#else
    return narrow(eight);
#endif
}

// One token's activations, `width` fours from one four to the next; a scale for each group of columns. Where one of a group
// is not finite, neither is its scale.
inline void quantise_wide(const float* x, int columns, int group, int width, int8_t* codes, float* scales, int32_t* sums) {
    constexpr float kTop = 127 * 256;
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    for (int g = 0; g < columns / group; g++) {
        const float* from = x + g * group;
        __m256 most = _mm256_setzero_ps(), not_a_number = _mm256_setzero_ps();
        for (int i = 0; i < group; i += 8) {
            const __m256 size = _mm256_and_ps(_mm256_loadu_ps(from + i), magnitude);
            not_a_number = _mm256_or_ps(not_a_number, _mm256_cmp_ps(size, size, _CMP_UNORD_Q));
            most = _mm256_max_ps(size, most);
        }
        alignas(32) float sizes[8];
        _mm256_store_ps(sizes, most);
        const float top = _mm256_movemask_ps(not_a_number) ? std::numeric_limits<float>::quiet_NaN()
                                                           : *std::max_element(sizes, sizes + 8);
        const __m256 inverse = _mm256_set1_ps(top > 0 ? kTop / top : 0.0f);
        __m256i sum = _mm256_setzero_si256();
        for (int i = 0; i < group; i += 8) {
            const __m256i eight = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + i), inverse));
            sum = _mm256_add_epi32(sum, eight);
            const __m128i bytes = split_wide(eight);
            int8_t* to = codes + size_t(g * group + i) * 2 * width;
            _mm_storel_epi64(reinterpret_cast<__m128i*>(to), bytes);
            _mm_storel_epi64(reinterpret_cast<__m128i*>(to + 8 * width), _mm_unpackhi_epi64(bytes, bytes));
        }
        alignas(32) int32_t parts[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(parts), sum);
        scales[g] = top / kTop;
        sums[g] = 0;
        for (const int32_t one : parts) sums[g] += one;
    }
}
