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
    Pack<R> dots = zeros<R>();
    Pack<R> upper = zeros<R>();  // of the upper halves of bytes
    float total = 0.0f;
    UNROLL
    for (int part = 0; part < 4; ++part) {
      const Pack<8> xs = elements<T, 8>(x, index * 32u + uint(part * 8));
      UNROLL
      for (int k = 0; k < 8; ++k) {
        total += xs.v[k];
      }
      UNROLL
      for (int r = 0; r < R; ++r) {
        if (BITS == 4) {
          const uint word = chunk.codes[r].v[part % BITS];
          const uint above = word >> 8;
          dots.v[r] = add_bytes(word, above, 0x000f000fu, xs.v[0], xs.v[2], xs.v[4], xs.v[6], dots.v[r]);
          upper.v[r] = add_bytes(word, above, 0x00f000f0u, xs.v[1], xs.v[3], xs.v[5], xs.v[7], upper.v[r]);
        } else if (BITS == 8) {
          UNROLL
          for (int k = 0; k < 8; k += 4) {
            const uint word = chunk.codes[r].v[(part * 2 + k / 4) % BITS];
            dots.v[r] = add_bytes(word, word >> 8, 0x00ff00ffu, xs.v[k], xs.v[k + 1], xs.v[k + 2], xs.v[k + 3], dots.v[r]);
          }
        } else {
          UNROLL
          for (int k = 0; k < 8; ++k) {
            dots.v[r] = metal::fma(code_of(chunk.codes[r], part * 8 + k), xs.v[k], dots.v[r]);
          }
        }
      }
    }
    UNROLL
    for (int r = 0; r < R; ++r) {
      const float dot = BITS == 4   ? metal::fma(1048576.0f, upper.v[r], 16777216.0f * dots.v[r])
                        : BITS == 8 ? 16777216.0f * dots.v[r]
                                    : (dots.v[r] - total) * float(1 << BITS);
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
