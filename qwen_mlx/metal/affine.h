// MLX's affine packing: w (rows, K BITS / 32) words of codes, scales and biases (rows, K / GROUP); BITS 2 to 6 or 8.
// An element is scale * code + bias. Chunk: 32 codes in BITS words, which never cross a group.
struct Affine {};

template <typename T, int BITS, int K>
FUNCTION constexpr int row_length(Affine) {
  return K * BITS / 32;
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

template <typename T, bool STAGED, int BITS, int GROUP, int K, int R, int STEP, int DEPTH, bool ALIGNED, typename X, typename W,
          typename S, typename B>
FUNCTION Pack<R> row_dots(Affine, X x, Rows<R> rows, uint first, W w, S scales, B biases) {
  constexpr int N = 32;  // codes of a chunk
  constexpr int CHUNKS = K / N;
  constexpr int LOAD = 16 / sizeof(T);
  Pack<R> sums;
  UNROLL
  for (int r = 0; r < R; ++r) {
    sums.v[r] = 0.0f;
  }
  for (int start = 0; start < CHUNKS; start += STEP * DEPTH) {
    Words<BITS> codes[R * DEPTH];
    float scale[R * DEPTH];
    float bias[R * DEPTH];
    UNROLL
    for (int d = 0; d < DEPTH; ++d) {
      const uint chunk = first + uint(start + d * STEP);
      if (chunk < uint(CHUNKS)) {
        UNROLL
        for (int r = 0; r < R; ++r) {
          const uint group = rows.v[r] * uint(K / GROUP) + chunk * uint(N) / uint(GROUP);
          codes[d * R + r] = load_words<BITS, ALIGNED>(w, (rows.v[r] * uint(CHUNKS) + chunk) * uint(BITS));
          scale[d * R + r] = float(scales[group]);
          bias[d * R + r] = float(biases[group]);
        }
      }
    }
    UNROLL
    for (int d = 0; d < DEPTH; ++d) {
      const uint chunk = first + uint(start + d * STEP);
      if (chunk < uint(CHUNKS)) {
        Pack<R> dots;
        UNROLL
        for (int r = 0; r < R; ++r) {
          dots.v[r] = 0.0f;
        }
        float total = 0.0f;
        UNROLL
        for (int part = 0; part < N / LOAD; ++part) {
          const Pack<LOAD> xs = load_aligned<LOAD, ALIGNED>(x, place_of<T, STAGED>(chunk * uint(N) + uint(part * LOAD)));
          UNROLL
          for (int k = 0; k < LOAD; ++k) {
            const int i = part * LOAD + k;
            total += xs.v[k];
            UNROLL
            for (int r = 0; r < R; ++r) {
              const float code = code_of<BITS>(codes[d * R + r], i);
              dots.v[r] = metal::fma(code, xs.v[k], dots.v[r]);
            }
          }
        }
        UNROLL
        for (int r = 0; r < R; ++r) {
          const float dot = (dots.v[r] - total) * float(1 << BITS);
          sums.v[r] = metal::fma(scale[d * R + r], dot, metal::fma(bias[d * R + r], total, sums.v[r]));
        }
      }
    }
  }
  return sums;
}
