// What the products of int4_matmul.cpp read, and are written for: int4_avx512.hpp and int4_avx2.hpp.

#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#define UNROLL _Pragma("GCC unroll 16")

constexpr int kColumns = 8;  // of one load of codes of 4 bits
constexpr int kFour = 4;     // columns of one load of codes of 8 bits
constexpr int kPart = 32;    // columns; groups are multiples of it
constexpr int kLine = 64;    // bytes of a line of the cache

struct Weights {
    int rows, columns;
    int group;  // columns whose activations have a scale together; codes of 4 bits have one for the same columns
    int bits;   // of a code; with 8 a row has one scale and one zero point
    const uint8_t* codes;
    const uint8_t* scales;
    const uint8_t* zeros;
    int groups() const { return columns / group; }
};

// Codes of the tokens of one tile lie beside each other: what a tile reads is one stream, where rows of a power of two
// would share the same few sets of the first cache.
struct Activations {
    size_t tokens;
    const int8_t* codes;   // [tiles][columns / 4][tokens of the tile][4], for weights of 8 bits [8]: see int8_*.hpp
    const float* scales;   // [tokens][groups]
    const int32_t* sums;   // [tokens][groups], of codes
};

// Codes that a tile fetches into the cache while it computes: so many lines with each part of its columns.
struct Ahead {
    const uint8_t* codes = nullptr;
    int lines = 0;
};

// The first bytes of a vector to their places among the activations: `count` fours, `width` fours apart.
template <int count>
inline void store_fours(__m128i bytes, int8_t* to, int width) {
    alignas(16) int32_t fours[4];
    _mm_store_si128(reinterpret_cast<__m128i*>(fours), bytes);
    UNROLL for (int k = 0; k < count; k++) std::memcpy(to + k * 4 * width, fours + k, 4);
}
