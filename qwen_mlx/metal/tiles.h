// Products of packed rows with a vector on the units that multiply tiles: 16 rows by 16 elements by 8 columns, as PTX's
// mma.m16n8k16 has them. Lane 4 g + t holds elements of rows g and g + 8 and of column g. The vector is put into the column
// of its elements' group and is 0 in the others, so that a tile's sums stay apart by group until they are multiplied by its
// scale. Codes become T's bits in one logic instruction for two of them; that is a third of the instructions of rows.h's way.
//
// A format has, for `Tiles` of it: `tile_count`, how many blocks of 8 groups a row has; `load_tile`, this lane's part of one;
// `add_tile`, its products.
template <typename Format>
struct Tiles {};

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

// A tile's sums so far, for rows g and g + 8 and columns 2 t and 2 t + 1; and the vector's own sums in these columns.
struct TileSums {
  Pack<4> dots, totals;
};

FUNCTION TileSums no_sums() {
  TileSums sums;
  UNROLL
  for (int i = 0; i < 4; ++i) {
    sums.dots.v[i] = 0.0f;
    sums.totals.v[i] = 0.0f;
  }
  return sums;
}

// Adds a tile: first and second: two pairs of codes of row g, then of row g + 8; low, high: the same pairs of the vector.
template <typename T>
FUNCTION TileSums tile_added(TileSums sums, uint first_low, uint first_high, uint second_low, uint second_high, uint low,
                             uint high, uint lane) {
  Words<4> rows;
  rows.v[0] = first_low;
  rows.v[1] = second_low;
  rows.v[2] = first_high;
  rows.v[3] = second_high;
  Words<2> column;
  column.v[0] = low;
  column.v[1] = high;
  sums.dots = tile_product<T>(sums.dots, rows, column, lane);
  UNROLL
  for (int i = 0; i < 4; ++i) {
    rows.v[i] = CodeBits<T>::ones();
  }
  sums.totals = tile_product<T>(sums.totals, rows, column, lane);
  return sums;
}

// Two codes of 4 bits, `shift` bits up in each half of a word.
template <typename T>
FUNCTION uint two_codes(uint word, int shift) {
  return masked_or(word >> uint(shift), 0x000f000fu, CodeBits<T>::bits());
}

// 2 N elements of the vector from element i on where `wanted`, else zeros; they lie within 16 bytes.
template <int N, typename T, bool STAGED, bool ALIGNED, typename X>
FUNCTION Words<N> vector_part(X x, uint i, bool wanted) {
  Words<N> words;
  UNROLL
  for (int k = 0; k < N; ++k) {
    words.v[k] = 0u;
  }
  if (wanted) {
    words = load_halves<N, ALIGNED>(x, place_of<T, STAGED>(i / 8u * 8u) + i % 8u);
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
