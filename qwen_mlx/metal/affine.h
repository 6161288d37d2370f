// MLX's affine packing: w (rows, K BITS / 32) words of codes, scales and biases (rows, K / GROUP); BITS 2 to 6 or 8.
// An element is scale * code + bias. Chunk: 32 codes in BITS words, which never cross a group.
struct Affine {};

template <typename T, int K>
FUNCTION constexpr int chunk_count(Affine) {
  return K / 32;
}

// Code i of a chunk, as `mantissa` gives it; it may lie in two words.
template <int BITS>
FUNCTION float code_of(Words<BITS> words, int i) {
  const int word = i * BITS / 32;
  const int shift = i * BITS % 32;
  if (shift + BITS <= 32) {
    return mantissa<BITS>(words.v[word], shift);
  }
  return mantissa<BITS>((words.v[word] >> uint(shift)) | (words.v[(word + 1) % BITS] << uint(32 - shift)), 0);
}

template <int BITS, int R, typename Scale>
struct AffineChunk {
  Words<BITS> codes[R];
  Scale scales[R];
  Scale biases[R];
};

template <typename T, int BITS, int GROUP, int K, int R, bool ALIGNED, typename W, typename S, typename B>
FUNCTION auto load_chunk(Affine, Rows<R> rows, uint chunk, W w, S scales, B biases)
    -> AffineChunk<BITS, R, decltype(value_of(scales[0]))> {
  AffineChunk<BITS, R, decltype(value_of(scales[0]))> found;
  UNROLL
  for (int r = 0; r < R; ++r) {
    const uint group = rows.v[r] * uint(K / GROUP) + chunk * 32u / uint(GROUP);
    found.codes[r] = load_words<BITS, ALIGNED>(w, (rows.v[r] * uint(K / 32) + chunk) * uint(BITS));
    found.scales[r] = scales[group];
    found.biases[r] = biases[group];
  }
  return found;
}

template <typename T, bool STAGED, int BITS, int R, bool ALIGNED, typename Scale, typename X>
FUNCTION Pack<R> add_chunk(Affine, AffineChunk<BITS, R, Scale> found, uint chunk, X x, Pack<R> sums) {
  constexpr int LOAD = 16 / sizeof(T);
  Pack<R> dots;
  UNROLL
  for (int r = 0; r < R; ++r) {
    dots.v[r] = 0.0f;
  }
  float total = 0.0f;
  UNROLL
  for (int part = 0; part < 32 / LOAD; ++part) {
    const Pack<LOAD> xs = load_aligned<LOAD, ALIGNED>(x, place_of<T, STAGED>(chunk * 32u + uint(part * LOAD)));
    UNROLL
    for (int k = 0; k < LOAD; ++k) {
      total += xs.v[k];
      UNROLL
      for (int r = 0; r < R; ++r) {
        dots.v[r] = metal::fma(code_of<BITS>(found.codes[r], part * LOAD + k), xs.v[k], dots.v[r]);
      }
    }
  }
  UNROLL
  for (int r = 0; r < R; ++r) {
    const float dot = (dots.v[r] - total) * float(1 << BITS);
    sums.v[r] = metal::fma(float(found.scales[r]), dot, metal::fma(float(found.biases[r]), total, sums.v[r]));
  }
  return sums;
}

// Elements column to column + 7 of a row; column is a multiple of 8.
template <int K, int BITS, int GROUP, typename W, typename S, typename B>
FUNCTION Pack<8> eight_elements(uint row, uint column, W w, S scales, B biases) {
  const uint group = row * uint(K / GROUP) + column / uint(GROUP);
  const float scale = float(scales[group]);
  const float bias = float(biases[group]);
  Pack<8> result;
  for (int k = 0; k < 8; ++k) {
    const uint bit = (column + uint(k)) % 32u * uint(BITS);  // of 32 codes in BITS words
    const uint word = (row * uint(K / 32) + column / 32u) * uint(BITS) + bit / 32u;
    uint code = w[word] >> (bit % 32u);
    if (bit % 32u + uint(BITS) > 32u) {
      code |= w[word + 1u] << (32u - bit % 32u);
    }
    result.v[k] = metal::fma(scale, float(code & ((1u << BITS) - 1u)), bias);
  }
  return result;
}
