// An OpenVINO operator: activations times weights of 4 or 8 bits, as fast as memory (one token) or the dot products of
// int8 (a prompt) allow. library.py compiles it, openvino_int4.py puts it into a model.
//
//   input      x        float32 [..., columns]
//   attribute  weights  number of the weights, as normistral_hold_int4 gave it:
//              codes    uint8   [rows / L][columns / 8][L * 4]  unsigned codes of 4 bits, see below
//              scales   float16 [rows / L][groups][L]
//              zeros    uint8   [rows / L][groups][L]           the code that means 0
//              where L rows (kLanes) are those of a vector of int32: 16 with AVX512, 8 without;
//              of 8 bits: codes uint8 [rows / L][columns / 4][L * 4], scales and zeros [rows / L][L]
//   output     float32 [..., rows]
//
// Weights are no constants of the model, so that a model which names them is a file of a few megabytes, and several that
// are loaded from one artifact share them.
//
// Arithmetic: each token's activations are rounded to int8 in the weights' groups (largest magnitude over 127, to
// nearest), products and their sums over a group are exact in int32, and groups are summed in float32 in their order.
// The result for a token does not depend on how many come with it. For weights of 8 bits activations have 16 (int8_*.hpp).
//
// Layout of codes: a vector holds L rows of 8 columns, 4 bytes a row; low nibbles are columns 0 to 3, high ones 4 to 7.
// So one load gives two operands of a product of bytes, whose other operand is four activations broadcast to all rows.
// Zero points enter through the start of the sum: -zero * sum of the group's activations.
//
// Written for AVX512 with VNNI, for AVX-VNNI, and for AVX2. Measured against the engines' own products:
// docs/decisions.md, "Our own int4 kernel".

#include <tbb/parallel_for.h>
#include <tbb/partitioner.h>
#include <tbb/task_arena.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/op/op.hpp>
#include <vector>

#include "old_runtime.hpp"

#ifdef __AVX512VNNI__
#include "int8_avx512.hpp"
#else
#include "int8_avx2.hpp"
#endif

namespace {

constexpr int kStep = 32;  // rows: whole tiles of either kind
static_assert(kStep % (kLanes * kRows) == 0 && kStep % (kLanes * kAloneRows) == 0 && kStep % (kLanes * kWideAloneRows) == 0);
constexpr int kPartsPerThread = 8;  // of a prompt's product, so that a thread that is held up holds nobody up
constexpr size_t kQuantisedAlone = 8;  // fewer tokens are rounded by one thread

// What differs between weights of 4 and of 8 bits.
struct Narrow {
    static constexpr int kTileTokens = kTokens, kTileRows = kRows, kAlone = kAloneRows, kBytes = 1;  // of an activation
    static constexpr int kFetched = kAheadLines;
    static constexpr auto& round = quantise;
    template <int tokens, int rows>
    static void tile(const Weights& weights, const Activations& x, float* out, int row, size_t token, Ahead ahead) {
        multiply_tile<tokens, rows>(weights, x, out, row, token, ahead);
    }
};

struct Wide {
    static constexpr int kTileTokens = kWideTokens, kTileRows = 1, kAlone = kWideAloneRows, kBytes = 2;
    static constexpr int kFetched = 0;
    static constexpr auto& round = quantise_wide;
    template <int tokens, int rows>
    static void tile(const Weights& weights, const Activations& x, float* out, int row, size_t token, Ahead) {
        multiply_wide_tile<tokens, rows>(weights, x, out, row, token);
    }
};

// The tokens that are left when whole tiles are done.
template <typename Kind, int tokens>
void multiply_rest(const Weights& weights, const Activations& x, float* out, int row, size_t token, Ahead ahead) {
    if (x.tokens - token == tokens) {
        Kind::template tile<tokens, Kind::kTileRows>(weights, x, out, row, token, ahead);
    } else if constexpr (tokens > 1) {
        multiply_rest<Kind, tokens - 1>(weights, x, out, row, token, ahead);
    }
}

// The weights of a tile's rows stay in the cache while all tokens go by.
template <typename Kind>
void multiply_rows(const Weights& weights, const Activations& x, float* out, int begin, int end) {
    if (x.tokens == 1) {
        for (int row = begin; row < end; row += kLanes * Kind::kAlone) {
            Kind::template tile<1, Kind::kAlone>(weights, x, out, row, 0, {});
        }
        return;
    }
    const int tiles = int(std::min((x.tokens - 1) / Kind::kTileTokens + 1, size_t(Kind::kFetched)));
    const int share = tiles ? (Kind::kFetched + tiles - 1) / tiles : 0;  // lines with each tile, until all are fetched
    for (int row = begin; row < end; row += kLanes * Kind::kTileRows) {
        const uint8_t* behind = weights.codes + size_t(row + kLanes * Kind::kTileRows) * weights.columns / 2;
        int left = Kind::kFetched;
        const auto next_share = [&] {
            const Ahead ahead{behind, std::min(share, left)};
            behind += size_t(ahead.lines) * (weights.columns / kPart) * kLine;
            left -= ahead.lines;
            return ahead;
        };
        size_t token = 0;
        for (; token + Kind::kTileTokens <= x.tokens; token += Kind::kTileTokens) {
            Kind::template tile<Kind::kTileTokens, Kind::kTileRows>(weights, x, out, row, token, next_share());
        }
        multiply_rest<Kind, Kind::kTileTokens - 1>(weights, x, out, row, token, next_share());
    }
}

template <typename Kind>
void multiply(const Weights& weights, const float* x, size_t tokens, float* out) {
    const int columns = weights.columns, groups = weights.groups();
    thread_local std::vector<int8_t> codes;
    thread_local std::vector<float> scales;
    thread_local std::vector<int32_t> sums;
    codes.resize(tokens * columns * Kind::kBytes);
    scales.resize(tokens * groups);
    sums.resize(tokens * groups);
    const Activations rounded{tokens, codes.data(), scales.data(), sums.data()};
    const auto round = [&, c = codes.data(), s = scales.data(), z = sums.data()](size_t t) {
        const size_t tile = t / Kind::kTileTokens * Kind::kTileTokens;
        const int width = int(std::min(tokens - tile, size_t(Kind::kTileTokens)));
        int8_t* to = c + (tile * columns + (t - tile) * kFour) * Kind::kBytes;
        Kind::round(x + t * columns, columns, weights.group, width, to, s + t * groups, z + t * groups);
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
        multiply_rows<Kind>(weights, rounded, out, int(steps * i / parts) * kStep, int(steps * (i + 1) / parts) * kStep);
    };
    tbb::parallel_for(0, parts, part, tbb::static_partitioner());
}

// Weights that operators may name. Their memory is the caller's.
struct Registry {
    std::mutex mutex;
    std::map<int64_t, Weights> held;
    int64_t next = 1;
};

Registry& registry() {
    static Registry instance;
    return instance;
}

Weights find_weights(int64_t number) {
    std::lock_guard<std::mutex> lock(registry().mutex);
    const auto found = registry().held.find(number);
    OPENVINO_ASSERT(found != registry().held.end(), "int4 weights ", number, " are not held in this process");
    return found->second;
}

class Int4MatMul : public ov::op::Op {
public:
    OPENVINO_OP("Int4MatMul", "normistral");

    Int4MatMul() = default;
    Int4MatMul(const ov::OutputVector& inputs, int64_t weights) : Op(inputs), m_weights(weights) {
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        auto shape = get_input_partial_shape(0);
        shape[shape.rank().get_length() - 1] = find_weights(m_weights).rows;
        set_output_type(0, ov::element::f32, shape);
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<Int4MatMul>(inputs, m_weights);
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("weights", m_weights);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        const Weights weights = find_weights(m_weights);
        auto shape = inputs[0].get_shape();
        const size_t tokens = inputs[0].get_size() / weights.columns;
        shape.back() = weights.rows;
        outputs[0].set_shape(shape);
        const auto of_kind = weights.bits == 4 ? multiply<Narrow> : multiply<Wide>;
        of_kind(weights, inputs[0].data<const float>(), tokens, outputs[0].data<float>());
        return true;
    }

private:
    int64_t m_weights = 0;
};

}  // namespace

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({std::make_shared<ov::OpExtension<Int4MatMul>>()}));

namespace {

// Eight codes of 4 bits, columns 0 to 7 from the lowest: columns 0 to 3 to the low nibbles of four bytes, 4 to 7 to the
// high ones.
inline __attribute__((always_inline)) __m256i pair_nibbles(__m256i eight) {
    const auto spread = [](__m256i four) {  // 16 bits to the low nibbles of 32
        four = _mm256_and_si256(_mm256_or_si256(four, _mm256_slli_epi32(four, 8)), _mm256_set1_epi32(0x00ff00ff));
        return _mm256_and_si256(_mm256_or_si256(four, _mm256_slli_epi32(four, 4)), _mm256_set1_epi32(0x0f0f0f0f));
    };
    const __m256i low = spread(_mm256_and_si256(eight, _mm256_set1_epi32(0xffff)));
    return _mm256_or_si256(low, _mm256_slli_epi32(spread(_mm256_srli_epi32(eight, 16)), 4));
}

// Vectors of eight times four bytes, transposed, to places kLanes * 4 bytes apart.
inline __attribute__((always_inline)) void store_transposed(__m256i (&r)[8], uint8_t* to) {
    __m256i s[8];
    UNROLL for (int k = 0; k < 8; k += 2) {
        s[k] = _mm256_unpacklo_epi32(r[k], r[k + 1]);
        s[k + 1] = _mm256_unpackhi_epi32(r[k], r[k + 1]);
    }
    UNROLL for (int k = 0; k < 8; k += 4) {
        UNROLL for (int half = 0; half < 2; half++) {
            r[k + 2 * half] = _mm256_unpacklo_epi64(s[k + half], s[k + half + 2]);
            r[k + 2 * half + 1] = _mm256_unpackhi_epi64(s[k + half], s[k + half + 2]);
        }
    }
    UNROLL for (int k = 0; k < 4; k++) {
        const __m256i low = _mm256_permute2x128_si256(r[k], r[k + 4], 0x20), high = _mm256_permute2x128_si256(r[k], r[k + 4], 0x31);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k * kLanes * 4), low);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (k + 4) * kLanes * 4), high);
    }
}

// 8 rows of 64 columns, `stride` bytes apart, to 8 vectors of 8 columns, kLanes * 4 bytes apart.
inline void pack_square(const uint8_t* from, int64_t stride, uint8_t* to, __m256i flip) {
    __m256i r[8];
    UNROLL for (int k = 0; k < 8; k++) {
        r[k] = pair_nibbles(_mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + k * stride)), flip));
    }
    store_transposed(r, to);
}

}  // namespace

// Codes as OpenVINO stores them, [rows][columns / 2] with even columns in the low nibbles, to the layout above. `flip` is
// 0x88888888 for signed codes, which become unsigned with a zero point of 8, and 0 for unsigned ones.
extern "C" void normistral_pack_int4(const uint8_t* from, uint8_t* to, int64_t rows, int64_t columns, uint32_t flip) {
    constexpr int64_t kSquare = 64;  // columns that are packed at once
    const int64_t stride = columns / 2, squares = columns / kSquare * kSquare;
    const __m256i flips = _mm256_set1_epi32(int32_t(flip));
    tbb::parallel_for(int64_t(0), rows / kLanes, [=](int64_t block) {
        const uint8_t* of_block = from + block * kLanes * stride;
        uint8_t* out = to + block * kLanes * stride;
        for (int64_t column = 0; column < squares; column += kSquare) {
            for (int row = 0; row < kLanes; row += 8) {
                pack_square(of_block + row * stride + column / 2, stride, out + column * kLanes / 2 + row * 4, flips);
            }
        }
        for (int64_t column = squares; column < columns; column += kColumns) {
            for (int row = 0; row < kLanes; row++) {
                uint32_t eight;
                std::memcpy(&eight, of_block + row * stride + column / 2, sizeof eight);
                const __m256i packed = pair_nibbles(_mm256_set1_epi32(int32_t(eight ^ flip)));
                const int32_t four = _mm_cvtsi128_si32(_mm256_castsi256_si128(packed));
                std::memcpy(out + column * kLanes / 2 + row * 4, &four, sizeof four);
            }
        }
    });
}

// Codes of 8 bits, [rows][columns] with columns a multiple of 32; `flip` is 0x80808080 for signed codes.
extern "C" void normistral_pack_int8(const uint8_t* from, uint8_t* to, int64_t rows, int64_t columns, uint32_t flip) {
    constexpr int64_t kSquare = 32;
    const __m256i flips = _mm256_set1_epi32(int32_t(flip));
    tbb::parallel_for(int64_t(0), rows / kLanes, [=](int64_t block) {
        for (int64_t column = 0; column < columns; column += kSquare) {
            for (int row = 0; row < kLanes; row += 8) {
                const uint8_t* square = from + (block * kLanes + row) * columns + column;
                __m256i r[8];
                UNROLL for (int k = 0; k < 8; k++) {
                    r[k] = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(square + k * columns)), flips);
                }
                store_transposed(r, to + (block * columns + column) * kLanes + row * 4);
            }
        }
    });
}

// Of packed weights in a file, as fast as memory reads them: it finds what a disk or a power failure has changed, and is
// no defence against an author who means to.
extern "C" uint64_t normistral_checksum(const uint8_t* data, int64_t bytes) {
    constexpr int64_t kBlock = 1 << 20;
    constexpr uint64_t kOdd = 0x9e3779b97f4a7c15;
    constexpr int kStreams = 8;  // so that no multiplication waits for the one before
    std::vector<uint64_t> blocks((bytes + kBlock - 1) / kBlock);
    tbb::parallel_for(size_t(0), blocks.size(), [&](size_t block) {
        const int64_t begin = int64_t(block) * kBlock, count = std::min(bytes - begin, kBlock);
        uint64_t sums[kStreams] = {}, last = 0;
        int64_t at = 0;
        for (; at + 8 * kStreams <= count; at += 8 * kStreams) {
            UNROLL for (int k = 0; k < kStreams; k++) {
                uint64_t word;
                std::memcpy(&word, data + begin + at + 8 * k, sizeof word);
                sums[k] = (sums[k] ^ word) * kOdd;
                sums[k] ^= sums[k] >> 32;
            }
        }
        for (; at < count; at++) last = (last ^ data[begin + at]) * kOdd;
        for (const uint64_t sum : sums) last = (last ^ sum) * kOdd ^ sum >> 29;
        blocks[block] = last;
    });
    uint64_t all = uint64_t(bytes);
    for (const uint64_t block : blocks) all = (all ^ block) * kOdd ^ block >> 31;
    return all;
}

extern "C" int64_t normistral_int4_lanes() { return kLanes; }

// A number for weights in the layout above; it holds for this process until normistral_forget_int4.
extern "C" int64_t normistral_hold_int4(const uint8_t* codes, const uint8_t* scales, const uint8_t* zeros, int64_t rows,
                                        int64_t columns, int64_t group, int64_t bits) {
    std::lock_guard<std::mutex> lock(registry().mutex);
    const int64_t number = registry().next++;
    registry().held[number] = {int(rows), int(columns), int(group), int(bits), codes, scales, zeros};
    return number;
}

extern "C" void normistral_forget_int4(int64_t number) {
    std::lock_guard<std::mutex> lock(registry().mutex);
    registry().held.erase(number);
}
