// Products of packed rows with a vector on the units that multiply tiles: 16 rows by 16 elements by 8 columns, as PTX's
// mma.m16n8k16 has them. Lane 4 g + t holds elements of rows g and g + 8 and of column g. The vector is put into the column
// of its elements' group and is 0 in the others, so that a tile's sums stay apart by group until they are multiplied by its
// scale. Codes become T's bits in one logic instruction for two of them; that is a third of the instructions of rows.h's way.
//
// A format has, for `Tiles` of it: `start_codes`, which starts to copy a stage (tile_sums.h); `add_stage`, its products.
#define VECTOR_WORDS 128  // of a stage

template <typename Format>
struct Tiles {};

// The vector's elements as pairs, in the order of the codes: of bytes the first and the third of a word become a pair.
template <typename Format>
FUNCTION constexpr int staged_element(Tiles<Format>, int k) {
  return k / 4 * 4 + k % 2 * 2 + k / 2 % 2;
}

template <typename Format>
FUNCTION Words<4> paired(Format, Words<4> words) {
  Words<4> pairs;
  UNROLL
  for (int i = 0; i < 4; i += 2) {
    pairs.v[i] = lower_halves(words.v[i], words.v[i + 1]);
    pairs.v[i + 1] = upper_halves(words.v[i], words.v[i + 1]);
  }
  return pairs;
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

FUNCTION Pack<4> four_zeros() {
  Pack<4> zeros;
  UNROLL
  for (int i = 0; i < 4; ++i) {
    zeros.v[i] = 0.0f;
  }
  return zeros;
}

// Adds the products of a tile: two pairs of codes of row g, then of row g + 8, with the same pairs of the vector.
template <typename T>
FUNCTION Pack<4> dots_added(Pack<4> sums, uint first_low, uint first_high, uint second_low, uint second_high,
                            Words<2> column, uint lane) {
  Words<4> rows;
  rows.v[0] = first_low;
  rows.v[1] = second_low;
  rows.v[2] = first_high;
  rows.v[3] = second_high;
  return tile_product<T>(sums, rows, column, lane);
}

// Adds the vector's own sums in the columns.
template <typename T>
FUNCTION Pack<4> totals_added(Pack<4> sums, Words<2> column, uint lane) {
  const uint one = CodeBits<T>::ones();
  return dots_added<T>(sums, one, one, one, one, column, lane);
}

// Two codes of 4 bits, `shift` bits up in each half of a word.
template <typename T>
FUNCTION uint two_codes(uint word, int shift) {
  return masked_or(word >> uint(shift), 0x000f000fu, CodeBits<T>::bits());
}

// Word of a ring where piece `piece` (0 to 7, of 16 bytes) of a stage's row `row` lies: rows take turns, so that lanes of two
// rows use different banks of the threadgroup memory.
FUNCTION uint piece_word(uint row, uint piece) {
  return (row * 8u + (piece ^ (row % 2u * 4u))) * 4u;
}

// Starts to copy 128 bytes of each of a stage's rows, which the array has WIDTH words apart; `from` is where a row's begin.
// Of a stage that the row's end cuts short only `pieces` of them are there: the rest meets zeros of the vector.
template <int WIDTH, bool ALIGNED, typename Lines, typename Ring, typename W>
FUNCTION void start_pieces(Lines rows, uint from, uint pieces, Ring ring, uint at, uint lane, W w) {
  const uint piece = lane % 8u;
  UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint row = uint(i * 4) + lane / 8u;
    const uint read = piece < pieces ? piece : 0u;
    start_copy<4, ALIGNED>(ring, at + piece_word(row, piece), w, rows.row(row) * uint(WIDTH) + from + read * 4u);
  }
}

// Eight elements of the vector as pairs in the order of the codes, where `wanted`, else zeros. Element i of the vector, and
// element i % 256 of the stage's part of it at `vector_at`; staged in threadgroup memory they lie in this order (norm_row).
template <typename T, bool STAGED, typename Format, typename X, typename Ring>
FUNCTION Words<4> eight_pairs(Format format, X x, Ring ring, uint vector_at, uint i, bool wanted) {
  Words<4> words;
  UNROLL
  for (int k = 0; k < 4; ++k) {
    words.v[k] = 0u;
  }
  if (STAGED && wanted) {
    words = load_halves<4, true>(x, place_of<T, true>(i));
  }
  if (!STAGED && wanted) {
    words = paired(format, load_words<4, true>(ring, vector_at + i % 256u / 2u));
  }
  return words;
}

// A row's sum with a tile's column added: scale * code + offset for each element of the column's group, from its products
// with the codes' bits and the vector's own sum there.
template <typename T>
FUNCTION float scaled_sum(float sum, float dot, float total, float scale, float offset) {
  const float codes = metal::fma(dot, CodeBits<T>::unit(), -CodeBits<T>::added() * total);
  return metal::fma(scale, codes, metal::fma(offset, total, sum));
}
