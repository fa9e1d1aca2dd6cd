// What the products of int4_matmul.cpp read, and are written for: int4_avx512.hpp and int4_avx2.hpp.

#pragma once

#include <cstddef>
#include <cstdint>

#define UNROLL _Pragma("GCC unroll 16")

constexpr int kColumns = 8;  // of one load of codes

struct Weights {
    int rows, columns, group;
    const uint8_t* codes;
    const uint8_t* scales;
    const uint8_t* zeros;
    int groups() const { return columns / group; }
};

struct Activations {
    size_t tokens;
    const int8_t* codes;   // [tokens][columns]
    const float* scales;   // [tokens][groups]
    const int32_t* sums;   // [tokens][groups], of codes
};
