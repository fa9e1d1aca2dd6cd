// An OpenVINO operator: activations times weights of 4 bits, as fast as memory (one token) or the dot products of int8
// (a prompt) allow. library.py compiles it, openvino_int4.py puts it into a model.
//
//   inputs   x       float32 [..., columns]
//            codes   uint8   [rows / 16][columns / 8][64]    unsigned codes of 4 bits, see below
//            scales  float16 as bytes [rows / 16][groups][32]
//            zeros   uint8   [rows / 16][groups][16]         the code that means 0
//   output   float32 [..., rows]
//
// Arithmetic: each token's activations are rounded to int8 in the weights' groups (largest magnitude over 127, to
// nearest), products and their sums over a group are exact in int32, and groups are summed in float32 in their order.
// The result for a token does not depend on how many come with it.
//
// Layout of codes: 64 bytes hold 16 rows of 8 columns, 4 bytes a row; low nibbles are columns 0 to 3, high ones 4 to 7.
// So one load gives two operands of vpdpbusd, whose other operand is four activations broadcast to all rows. Zero points
// enter through the start of the sum: -zero * sum of the group's activations.
//
// Needs AVX512F and VNNI. Measured against OpenVINO's and onnxruntime's products: docs/decisions.md, "Our own int4 kernel".

#include <immintrin.h>
#include <tbb/parallel_for.h>
#include <tbb/partitioner.h>
#include <tbb/task_arena.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/op/op.hpp>
#include <vector>

#define UNROLL _Pragma("GCC unroll 16")

namespace {

constexpr int kLanes = 16;         // rows in a vector
constexpr int kRows = 2;           // vectors of rows in a tile of several tokens
constexpr int kTokens = 5;         // tokens in a tile: 10 sums in int32 and as many in float32 fill the registers
constexpr int kStep = kLanes * kRows;
constexpr int kColumns = 8;        // in one load
constexpr int kPartsPerThread = 8;  // of a prompt's product, so that a thread that is held up holds nobody up
constexpr size_t kQuantisedAlone = 8;  // fewer tokens are rounded by one thread

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

// Outputs of `tokens` tokens and `rows` vectors of rows, kept in registers while the columns go by. Where these are few,
// low and high nibbles have sums of their own, so that no product waits for the one before. One vector of rows is one
// stream of memory, which the processor fetches ahead by itself: better than with _mm_prefetch, or with two streams.
template <int tokens, int rows>
inline __attribute__((always_inline)) void multiply_tile(const Weights& weights, const Activations& x, float* out, int row,
                                                         size_t token) {
    const int groups = weights.groups(), columns = weights.columns;
    const size_t stride = size_t(kLanes) * columns / 2;  // bytes from one vector of rows to the next
    const size_t block = row / kLanes;
    const uint8_t* codes = weights.codes + block * stride;
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
                const __m512i both = _mm512_loadu_si512(codes + r * stride + size_t(column) * kColumns);
                low[r] = _mm512_and_si512(both, nibble);
                high[r] = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
            }
            UNROLL for (int t = 0; t < tokens; t++) {
                int32_t four[2];
                std::memcpy(four, x.codes + (token + t) * columns + column, sizeof four);
                const __m512i first = _mm512_set1_epi32(four[0]), second = _mm512_set1_epi32(four[1]);
                UNROLL for (int r = 0; r < rows; r++) {
                    __m512i& high_sum = apart ? high_sums[r][t] : sums[r][t];
                    sums[r][t] = _mm512_dpbusd_epi32(sums[r][t], low[r], first);
                    high_sum = _mm512_dpbusd_epi32(high_sum, high[r], second);
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

// The weights of a step of rows stay in the cache while all tokens go by.
void multiply_rows(const Weights& weights, const Activations& x, float* out, int begin, int end) {
    if (x.tokens == 1) {
        for (int row = begin; row < end; row += kLanes) multiply_tile<1, 1>(weights, x, out, row, 0);
        return;
    }
    for (int row = begin; row < end; row += kStep) {
        size_t token = 0;
        for (; token + kTokens <= x.tokens; token += kTokens) multiply_tile<kTokens, kRows>(weights, x, out, row, token);
        switch (x.tokens - token) {
            case 4: multiply_tile<4, kRows>(weights, x, out, row, token); break;
            case 3: multiply_tile<3, kRows>(weights, x, out, row, token); break;
            case 2: multiply_tile<2, kRows>(weights, x, out, row, token); break;
            case 1: multiply_tile<1, kRows>(weights, x, out, row, token); break;
        }
    }
}

// One token's activations to int8, a scale for each group. Where one of a group is not finite, neither is its scale.
void quantise(const float* x, int columns, int group, int8_t* codes, float* scales, int32_t* sums) {
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
            _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + g * group + i), _mm512_cvtsepi32_epi8(code));
        }
        scales[g] = top / 127.0f;
        sums[g] = _mm512_reduce_add_epi32(sum);
    }
}

void multiply(const Weights& weights, const float* x, size_t tokens, float* out) {
    const int columns = weights.columns, groups = weights.groups();
    thread_local std::vector<int8_t> codes;
    thread_local std::vector<float> scales;
    thread_local std::vector<int32_t> sums;
    codes.resize(tokens * columns);
    scales.resize(tokens * groups);
    sums.resize(tokens * groups);
    const Activations rounded{tokens, codes.data(), scales.data(), sums.data()};
    const auto round = [&, c = codes.data(), s = scales.data(), z = sums.data()](size_t t) {
        quantise(x + t * columns, columns, weights.group, c + t * columns, s + t * groups, z + t * groups);
    };
    if (tokens < kQuantisedAlone) {
        for (size_t t = 0; t < tokens; t++) round(t);
    } else {
        tbb::parallel_for(size_t(0), tokens, round);
    }
    const int threads = tbb::this_task_arena::max_concurrency();
    const int parts = tokens == 1 ? threads : threads * kPartsPerThread;
    const long steps = weights.rows / kStep;
    const auto part = [&](int i) {
        multiply_rows(weights, rounded, out, int(steps * i / parts) * kStep, int(steps * (i + 1) / parts) * kStep);
    };
    tbb::parallel_for(0, parts, part, tbb::static_partitioner());
}

class Int4MatMul : public ov::op::Op {
public:
    OPENVINO_OP("Int4MatMul", "normistral");

    Int4MatMul() = default;
    explicit Int4MatMul(const ov::OutputVector& inputs) : Op(inputs) { constructor_validate_and_infer_types(); }

    void validate_and_infer_types() override {
        auto shape = get_input_partial_shape(0);
        shape[shape.rank().get_length() - 1] = get_input_partial_shape(1)[0] * kLanes;
        set_output_type(0, ov::element::f32, shape);
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<Int4MatMul>(inputs);
    }

    bool visit_attributes(ov::AttributeVisitor&) override { return true; }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        auto shape = inputs[0].get_shape();
        const int columns = int(shape.back());
        const int rows = int(inputs[1].get_shape()[0]) * kLanes;
        const int groups = int(inputs[2].get_shape()[1]);
        const size_t tokens = inputs[0].get_size() / columns;
        shape.back() = rows;
        outputs[0].set_shape(shape);
        const Weights weights{rows,
                              columns,
                              columns / groups,
                              inputs[1].data<const uint8_t>(),
                              inputs[2].data<const uint8_t>(),
                              inputs[3].data<const uint8_t>()};
        multiply(weights, inputs[0].data<const float>(), tokens, outputs[0].data<float>());
        return true;
    }
};

}  // namespace

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({std::make_shared<ov::OpExtension<Int4MatMul>>()}));

// Codes as OpenVINO stores them, [rows][columns / 2] with even columns in the low nibbles, to the layout above. `flip` is
// 0x88888888 for signed codes, which become unsigned with a zero point of 8, and 0 for unsigned ones.
extern "C" void normistral_pack_int4(const uint8_t* from, uint8_t* to, int64_t rows, int64_t columns, uint32_t flip) {
    tbb::parallel_for(int64_t(0), rows / kLanes, [=](int64_t block) {
        for (int64_t column = 0; column < columns; column += kColumns) {
            uint8_t* out = to + (block * (columns / kColumns) + column / kColumns) * 64;
            for (int row = 0; row < kLanes; row++, out += 4) {
                uint32_t eight;
                std::memcpy(&eight, from + ((block * kLanes + row) * columns + column) / 2, sizeof eight);
                eight ^= flip;
                for (int k = 0; k < 4; k++) {
                    const uint32_t low = eight >> (4 * k) & 15, high = eight >> (4 * k + 16) & 15;
                    out[k] = uint8_t(low | high << 4);
                }
            }
        }
    });
}
