// GGUF's Q4_K as in the file: w (rows, K / 256, 36) words a block. Four words are its head: d and dmin (float16), then 8 scales
// and 8 minima of 6 bits. Then come 128 bytes of codes; of each 32 bytes the low halves are one group of 32, the high halves the
// next. An element is d * scale * code - dmin * minimum. A chunk is 32 bytes of codes, two groups.

struct Q4KGroup {
  float scale, minimum;
};

// The float16 in the lower 16 bits of a word.
FUNCTION float low_half(uint word) {
  return float(as_type<half>(ushort(word & 0xffffu)));
}

// Scale and minimum of group `group` (0 to 7) of a block, times d and dmin.
FUNCTION Q4KGroup q4_k_group(metal::uint4 head, uint group) {
  const uint shift = group % 4u * 8u;
  const uint low = (head.y >> shift) & 0xffu;
  const uint middle = (head.z >> shift) & 0xffu;
  const uint high = (head.w >> shift) & 0xffu;
  const uint scale = group < 4u ? low & 63u : (high & 15u) | ((low >> 6) << 4);
  const uint minimum = group < 4u ? middle & 63u : (high >> 4) | ((middle >> 6) << 4);
  Q4KGroup result;
  result.scale = low_half(head.x) * float(scale);
  result.minimum = low_half(head.x >> 16) * float(minimum);
  return result;
}

// d times a number of six bits that `mantissa` reads. This is exact, since d has 11 bits.
FUNCTION float q4_k_times(uint pair, int shift, float d) {
  return metal::fma(mantissa<6>(pair, shift), 64.0f * d, -64.0f * d);
}

template <typename T, int K, int R, typename W>
struct Q4K {
  enum { CHUNKS = K / 64 };
  struct Chunk {
    metal::uint4 heads[R];
    metal::uint4 first[R];   // the first 16 bytes of codes
    metal::uint4 second[R];
  };
  W w;

  FUNCTION Chunk load_chunk(Rows<R> rows, uint index) const {
    Chunk chunk;
    UNROLL
    for (int r = 0; r < R; ++r) {
      const uint block = (rows.v[r] * uint(K / 256) + index / 4u) * 36u;
      chunk.heads[r] = load_uint4(w, block);
      chunk.first[r] = load_uint4(w, block + 4u + index % 4u * 8u);
      chunk.second[r] = load_uint4(w, block + 8u + index % 4u * 8u);
    }
    return chunk;
  }

  template <typename X>
  FUNCTION Pack<R> add_chunk(Chunk chunk, uint index, X x, Pack<R> sums) const {
    constexpr int LOAD = 16 / sizeof(T);
    Pack<R> low = zeros<R>();
    Pack<R> high = zeros<R>();
    float low_total = 0.0f;
    float high_total = 0.0f;
    UNROLL
    for (int part = 0; part < 32 / LOAD; ++part) {
      const uint from = index * 64u + uint(part * LOAD);
      const Pack<LOAD> xs = x.at(from);
      const Pack<LOAD> ys = x.at(from + 32u);
      UNROLL
      for (int k = 0; k < LOAD; ++k) {
        const int i = part * LOAD + k;
        low_total += xs.v[k];
        high_total += ys.v[k];
        UNROLL
        for (int r = 0; r < R; ++r) {
          const uint word = i < 16 ? chunk.first[r][i % 16 / 4] : chunk.second[r][i % 16 / 4];
          low.v[r] = metal::fma(mantissa<4>(word, i % 4 * 8), xs.v[k], low.v[r]);
          high.v[r] = metal::fma(mantissa<4>(word, i % 4 * 8 + 4), ys.v[k], high.v[r]);
        }
      }
    }
    // Both groups' scales stand in one word, their minima in another, as bytes.
    const bool lower = index % 4u < 2u;
    const uint shift = index % 2u * 16u;
    UNROLL
    for (int r = 0; r < R; ++r) {
      const metal::uint4 head = chunk.heads[r];
      const uint tops = head.w >> shift;
      const uint scale = head.y >> shift;
      const uint minimum = head.z >> shift;
      const uint scales = lower ? scale : (tops & 0x0f0fu) | ((scale >> 2) & 0x3030u);
      const uint minima = lower ? minimum : ((tops >> 4) & 0x0f0fu) | ((minimum >> 2) & 0x3030u);
      const float d = low_half(head.x);
      const float d_min = low_half(head.x >> 16);
      const float a = metal::fma(16.0f * q4_k_times(scales, 0, d), low.v[r] - low_total, sums.v[r]);
      const float b = metal::fma(16.0f * q4_k_times(scales, 8, d), high.v[r] - high_total, a);
      const float c = metal::fma(-q4_k_times(minima, 0, d_min), low_total, b);
      sums.v[r] = metal::fma(-q4_k_times(minima, 8, d_min), high_total, c);
    }
    return sums;
  }

  // Elements column to column + 7 of a row; column is a multiple of 8.
  FUNCTION Pack<8> eight_elements(uint row, uint column) const {
    const uint block = (row * uint(K / 256) + column / 256u) * 36u;
    const uint group = column / 32u % 8u;
    const metal::uint2 codes = load_uint2(w, block + 4u + group / 2u * 8u + column % 32u / 4u);
    const Q4KGroup values = q4_k_group(load_uint4(w, block), group);
    Pack<8> result;
    UNROLL
    for (int k = 0; k < 8; ++k) {
      const uint code = (codes[k / 4] >> (uint(k % 4 * 8) + group % 2u * 4u)) & 15u;
      result.v[k] = values.scale * float(code) - values.minimum;
    }
    return result;
  }
};

template <typename T, int K, int R, typename W>
FUNCTION Q4K<T, K, R, W> q4_k(W w) {
  return {w};
}
