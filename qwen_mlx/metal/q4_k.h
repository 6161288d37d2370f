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

// d times the numbers of six bits in the two lower bytes of a word. This is exact, since d has 11 bits.
FUNCTION metal::float2 q4_k_times(uint pair, float d) {
  const metal::float2 numbers = halves((pair & 63u) | ((pair << 8) & 0x003f0000u));
  return metal::float2(16777216.0f * d * numbers.x, 16777216.0f * d * numbers.y);
}

// The scales times d, and the minima times -dmin, of both groups in a chunk of a block.
struct Q4KFactors {
  metal::float2 scales, offsets;
};

// Both groups' scales stand in one half of a word, their minima in another's, as bytes.
FUNCTION Q4KFactors q4_k_factors(metal::uint4 head, uint chunk) {
  const bool first_half = chunk % 2u == 0u;
  const uint tops = first_half ? head.w : head.w >> 16;
  const uint scale = first_half ? head.y : head.y >> 16;
  const uint minimum = first_half ? head.z : head.z >> 16;
  const metal::float2 d = halves(head.x);
  Q4KFactors factors;
  factors.scales = q4_k_times(chunk % 4u < 2u ? scale : (tops & 0x0f0fu) | ((scale >> 2) & 0x3030u), d.x);
  factors.offsets = q4_k_times(chunk % 4u < 2u ? minimum : ((tops >> 4) & 0x0f0fu) | ((minimum >> 2) & 0x3030u), -d.y);
  return factors;
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
    Pack<R> low = zeros<R>();   // of the low halves of bytes, over 2^24
    Pack<R> high = zeros<R>();  // of the high ones, over 2^20
    float low_total = 0.0f;
    float high_total = 0.0f;
    UNROLL
    for (int part = 0; part < 4; ++part) {
      const Pack<8> xs = elements<T, 8>(x, index * 64u + uint(part * 8));
      const Pack<8> ys = elements<T, 8>(x, index * 64u + 32u + uint(part * 8));
      UNROLL
      for (int k = 0; k < 8; ++k) {
        low_total += xs.v[k];
        high_total += ys.v[k];
      }
      UNROLL
      for (int k = 0; k < 8; k += 4) {
        UNROLL
        for (int r = 0; r < R; ++r) {
          const int i = part * 2 + k / 4;
          const uint word = i < 4 ? chunk.first[r][i % 4] : chunk.second[r][i % 4];
          const uint above = word >> 8;
          low.v[r] = add_bytes(word, above, 0x000f000fu, xs.v[k], xs.v[k + 1], xs.v[k + 2], xs.v[k + 3], low.v[r]);
          high.v[r] = add_bytes(word, above, 0x00f000f0u, ys.v[k], ys.v[k + 1], ys.v[k + 2], ys.v[k + 3], high.v[r]);
        }
      }
    }
    UNROLL
    for (int r = 0; r < R; ++r) {
      const Q4KFactors factors = q4_k_factors(chunk.heads[r], index);
      const float a = metal::fma(16777216.0f * factors.scales.x, low.v[r], sums.v[r]);
      const float b = metal::fma(1048576.0f * factors.scales.y, high.v[r], a);
      sums.v[r] = metal::fma(factors.offsets.y, high_total, metal::fma(factors.offsets.x, low_total, b));
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
