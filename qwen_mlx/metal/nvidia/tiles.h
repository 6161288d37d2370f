// Products of packed rows with a vector on tensor cores, which multiply tiles of 16 rows by 16 elements by 8 columns, as PTX's
// mma.m16n8k16 has them. Lane 4 g + t holds elements of rows g and g + 8 and of column g. The vector is put into the column of
// its elements' group and is 0 in the others, so that a tile's sums stay apart by group until they are multiplied by its scale.
// One logic instruction turns two codes into T's bits; that is a third of the instructions of rows.h's readers.
//
// Each packing's header (affine_tiles.h, q4_k_tiles.h, q6_k_tiles.h) has a reader with `start_codes`, which starts to copy a
// stage (tile_sums.h), and `add_stage`, which adds its products.
#define VECTOR_WORDS 128  // of a stage

template <typename T>
struct IsBfloat {
  enum { value = 0 };
};
template <>
struct IsBfloat<bfloat16_t> {
  enum { value = 1 };
};

// Names the type of an array's elements in any address space, as decltype(value_of(array[0])).
template <typename Value>
FUNCTION Value value_of(Value value) {
  return value;
}

template <typename T>
struct CodeBits {
  // bfloat16's 7 bits of a mantissa hold a code as 128 + code.
  static FUNCTION constexpr uint bits() {
    return IsBfloat<T>::value ? 0x43004300u : 0u;
  }
  static FUNCTION constexpr float added() {
    return IsBfloat<T>::value ? 128.0f : 0.0f;
  }
  // float16 has 10 bits, but a code alone is a subnormal number: code / 2^24, exactly.
  static FUNCTION constexpr float unit() {
    return IsBfloat<T>::value ? 1.0f : 16777216.0f;
  }
  static FUNCTION constexpr uint ones() {
    return IsBfloat<T>::value ? 0x3f803f80u : 0x3c003c00u;
  }
};

// The order in which codes of bytes take the vector's elements: of a word's four bytes the first and the third become a pair.
struct ByteOrder {
  // The element of 8 that the normed vector has at index k.
  static FUNCTION constexpr int staged_element(int k) {
    return k / 4 * 4 + k % 2 * 2 + k / 2 % 2;
  }

  static FUNCTION metal::uint4 paired(metal::uint4 w) {
    return metal::uint4(lower_halves(w.x, w.y), upper_halves(w.x, w.y), lower_halves(w.z, w.w), upper_halves(w.z, w.w));
  }
};

// Adds the products of a tile: two pairs of codes of row g, then of row g + 8, with the same pairs of the vector.
template <typename T>
FUNCTION Pack<4> dots_added(Pack<4> sums, uint first_low, uint first_high, uint second_low, uint second_high,
                            metal::uint2 column, uint lane) {
  return tile_product(sums, metal::uint4(first_low, second_low, first_high, second_high), column, lane, T());
}

// Adds the vector's own sums in the columns.
template <typename T>
FUNCTION Pack<4> totals_added(Pack<4> sums, metal::uint2 column, uint lane) {
  const uint one = CodeBits<T>::ones();
  return dots_added<T>(sums, one, one, one, one, column, lane);
}

// Two codes of 4 bits, `shift` bits up in each half of a word.
template <typename T>
FUNCTION uint two_codes(uint word, int shift) {
  return masked_or(word >> uint(shift), 0x000f000fu, CodeBits<T>::bits());
}

// Adds the products of the codes at `shift` and `next` of words a of row g and b of row g + 8.
template <typename T>
FUNCTION Pack<4> code_dots(Pack<4> sums, uint a, uint b, int shift, int next, metal::uint2 column, uint lane) {
  return dots_added<T>(sums, two_codes<T>(a, shift), two_codes<T>(a, next), two_codes<T>(b, shift), two_codes<T>(b, next),
                       column, lane);
}

// Row r of a stage's 16; see row_of.
template <int APART, int COUNT>
struct StageRows {
  uint unit;
  FUNCTION uint row(uint r) const {
    return row_of<16, APART, COUNT>(unit, r);
  }
};

// The word of a ring where piece `piece` (0 to 7, of 16 bytes) of row `row` of a stage lies. Each of 8 rows has an order of its
// own, so that lanes use different banks of the threadgroup memory, whether they read 4, 8 or 16 bytes of 8, 4 or 2 rows.
FUNCTION uint piece_word(uint row, uint piece) {
  return (row * 8u + (piece ^ (row % 2u * 4u + row / 2u % 2u * 2u + row / 4u % 2u))) * 4u;
}

// Starts to copy 128 bytes of each of a stage's rows, which the array has WIDTH words apart; a row's begin at word `from`. Of a
// stage that the row's end cuts short only `pieces` of them are there; the rest meets zeros of the vector.
template <int WIDTH, typename StageRows, typename Ring, typename W>
FUNCTION void start_pieces(StageRows rows, uint from, uint pieces, Ring ring, uint at, uint lane, W w) {
  const uint piece = lane % 8u;
  UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint row = uint(i * 4) + lane / 8u;
    const uint read = piece < pieces ? piece : 0u;
    start_copy<4>(ring, at + piece_word(row, piece), w, rows.row(row) * uint(WIDTH) + from + read * 4u);
  }
}

// Eight elements of the vector as pairs in the order of the codes, where `wanted`, else zeros: from element i on of the normed
// vector, which lies in this order (stage_tiles), or from element i % 256 on of the stage's part of the input at `vector_at`.
template <typename Order, typename T, typename X, typename Ring>
FUNCTION metal::uint4 eight_pairs(StagedVector<T, X> x, Ring, uint, uint i, bool wanted) {
  return wanted ? load_aligned_halves(x.x, staged_index<T>(i)) : metal::uint4(0u, 0u, 0u, 0u);
}
template <typename Order, typename T, typename X, typename Ring>
FUNCTION metal::uint4 eight_pairs(InputVector<T, X>, Ring ring, uint vector_at, uint i, bool wanted) {
  return wanted ? Order::paired(four_words(ring, vector_at + i % 256u / 2u)) : metal::uint4(0u, 0u, 0u, 0u);
}

// Adds a tile's column to a row's sum: scale * code + offset for each element of the column's group, from its products with the
// codes' bits and the vector's own sum there.
template <typename T>
FUNCTION float scaled_sum(float sum, float dot, float total, float scale, float offset) {
  const float codes = metal::fma(dot, CodeBits<T>::unit(), -CodeBits<T>::added() * total);
  return metal::fma(scale, codes, metal::fma(offset, total, sum));
}
