// MLX's affine packing: w (rows, K BITS / 32) words of codes, scales and biases (rows, K / GROUP); BITS 2 to 6 or 8.
// An element is scale * code + bias. A chunk is 32 codes in BITS words, all of one group.
template <typename T, int K, int R, int BITS, int GROUP, typename W, typename S, typename B>
struct Affine {
  enum { CHUNKS = K / 32 };
  struct Chunk {
    Words<BITS> codes[R];
    float scales[R];
    float biases[R];
  };
  W w;
  S scales;
  B biases;

  FUNCTION Chunk load_chunk(Rows<R> rows, uint index) const {
    Chunk chunk;
    UNROLL
    for (int r = 0; r < R; ++r) {
      const uint group = rows.v[r] * uint(K / GROUP) + index * 32u / uint(GROUP);
      chunk.codes[r] = load_words<BITS>(w, (rows.v[r] * uint(K / 32) + index) * uint(BITS));
      chunk.scales[r] = float(scales[group]);
      chunk.biases[r] = float(biases[group]);
    }
    return chunk;
  }

  template <typename X>
  FUNCTION Pack<R> add_chunk(Chunk chunk, uint index, X x, Pack<R> sums) const {
    constexpr int LOAD = 16 / sizeof(T);
    Pack<R> dots = zeros<R>();
    float total = 0.0f;
    UNROLL
    for (int part = 0; part < 32 / LOAD; ++part) {
      const Pack<LOAD> xs = x.at(index * 32u + uint(part * LOAD));
      UNROLL
      for (int k = 0; k < LOAD; ++k) {
        total += xs.v[k];
        UNROLL
        for (int r = 0; r < R; ++r) {
          dots.v[r] = metal::fma(code_of(chunk.codes[r], part * LOAD + k), xs.v[k], dots.v[r]);
        }
      }
    }
    UNROLL
    for (int r = 0; r < R; ++r) {
      const float dot = (dots.v[r] - total) * float(1 << BITS);
      sums.v[r] = metal::fma(chunk.scales[r], dot, metal::fma(chunk.biases[r], total, sums.v[r]));
    }
    return sums;
  }

  // Code i of a chunk, as `mantissa` gives it. Its bits may lie in two words.
  FUNCTION float code_of(Words<BITS> words, int i) const {
    const int word = i * BITS / 32;
    const int shift = i * BITS % 32;
    if (shift + BITS <= 32) {
      return mantissa<BITS>(words.v[word], shift);
    }
    return mantissa<BITS>((words.v[word] >> uint(shift)) | (words.v[(word + 1) % BITS] << uint(32 - shift)), 0);
  }

  // Elements column to column + 7 of a row; column is a multiple of 8.
  FUNCTION Pack<8> eight_elements(uint row, uint column) const {
    const uint group = row * uint(K / GROUP) + column / uint(GROUP);
    const float scale = float(scales[group]);
    const float bias = float(biases[group]);
    Pack<8> result;
    UNROLL
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
};

template <typename T, int K, int R, int BITS, int GROUP, typename W, typename S, typename B>
FUNCTION Affine<T, K, R, BITS, GROUP, W, S, B> affine(W w, S scales, B biases) {
  return {w, scales, biases};
}
