// The functions of qwen_mlx/metal/nvidia/instructions.h in Metal: the emulator runs the tiles with it.

FUNCTION uint word_bits(uint x) {
  return x;
}
FUNCTION uint word_bits(float x) {
  return as_type<uint>(x);
}
FUNCTION uint word_bits(half x) {
  return uint(as_type<ushort>(x));
}
FUNCTION uint word_bits(bfloat16_t x) {
  return uint(as_type<ushort>(x));
}

// Rounds each element to T, to nearest even.
template <typename T, int N>
FUNCTION Pack<N> rounded(Pack<N> pack) {
  for (int k = 0; k < N; ++k) {
    pack.v[k] = float(T(pack.v[k]));
  }
  return pack;
}

// Two numbers rounded to 16 bits each; the last argument is of their type.
template <typename T>
FUNCTION uint rounded_pair(float low, float high, T) {
  return word_bits(T(low)) | (word_bits(T(high)) << 16);
}

// The 8 elements of 16 bits from `index` on, as they are.
template <typename Pointer>
FUNCTION metal::uint4 load_halves(Pointer from, uint index) {
  Words<4> words;
  for (int k = 0; k < 4; ++k) {
    words.v[k] = word_bits(from[index + uint(2 * k)]) | (word_bits(from[index + uint(2 * k + 1)]) << 16);
  }
  return load_uint4(&words.v[0], 0u);
}

// The same from a multiple of 16 bytes on; and 4 words from there, or 2 from a multiple of 8.
template <typename Pointer>
FUNCTION metal::uint4 load_aligned_halves(Pointer from, uint index) {
  return load_halves(from, index);
}
template <typename Pointer>
FUNCTION metal::uint4 four_words(Pointer from, uint index) {
  return load_uint4(from, index);
}
template <typename Pointer>
FUNCTION metal::uint2 two_words(Pointer from, uint index) {
  return load_uint2(from, index);
}

// Copies one element to element k from word `at` of threadgroup memory on, the lower half of a word first.
template <typename Ring, typename Pointer>
FUNCTION void put_element(Ring ring, uint at, uint k, Pointer from, uint index) {
  const uint bits = word_bits(from[index]);
  if (sizeof(from[0]) == 4) {
    ring[at + k] = bits;
  } else {
    ring[at + k / 2u] = k % 2u == 0u ? bits : ring[at + k / 2u] | (bits << 16);
  }
}

// Starts to copy N elements to word `at` of threadgroup memory. They are there for this thread after end_batch and
// wait_for_batches, for its simdgroup after a barrier.
template <int N, typename Ring, typename Pointer>
FUNCTION void start_copy(Ring ring, uint at, Pointer from, uint index) {
  for (int k = 0; k < N; ++k) {
    put_element(ring, at, uint(k), from, index + uint(k));
  }
}

FUNCTION void end_batch() {}

// Waits until no more than the N newest batches are under way.
template <int N>
FUNCTION void wait_for_batches() {}

// Element i of those from word `at` of threadgroup memory on; the last argument is of their type.
template <typename Ring, typename T>
FUNCTION float element_of(Ring ring, uint at, uint i, T) {
  const uint word = ring[at + i / 2u];
  return float(as_type<T>(ushort(i % 2u == 1u ? word >> 16 : word & 0xffffu)));
}
template <typename Ring>
FUNCTION float element_of(Ring ring, uint at, uint i, float) {
  return as_type<float>(ring[at + i]);
}

// The lower halves of two words, or their upper halves.
FUNCTION uint lower_halves(uint a, uint b) {
  return (a & 0xffffu) | (b << 16);
}
FUNCTION uint upper_halves(uint a, uint b) {
  return (a >> 16) | (b & 0xffff0000u);
}

// sum + rows times columns for tiles of 16-bit numbers; tiles.h says who holds what. The last argument is of their type.
template <typename T>
FUNCTION Pack<4> tile_product(Pack<4> sum, metal::uint4 rows, metal::uint2 columns, uint lane, T) {
  for (uint t = 0u; t < 4u; ++t) {
    for (int h = 0; h < 2; ++h) {
      const uint a = metal::simd_shuffle(rows[h * 2], ushort(lane / 4u * 4u + t));
      const uint b = metal::simd_shuffle(rows[h * 2 + 1], ushort(lane / 4u * 4u + t));
      const uint x = metal::simd_shuffle(columns[h], ushort(lane % 4u * 8u + t));
      const uint y = metal::simd_shuffle(columns[h], ushort(lane % 4u * 8u + 4u + t));
      for (int shift = 0; shift < 32; shift += 16) {
        const float first = float(as_type<T>(ushort((a >> uint(shift)) & 0xffffu)));
        const float second = float(as_type<T>(ushort((b >> uint(shift)) & 0xffffu)));
        const float left = float(as_type<T>(ushort((x >> uint(shift)) & 0xffffu)));
        const float right = float(as_type<T>(ushort((y >> uint(shift)) & 0xffffu)));
        sum.v[0] = metal::fma(first, left, sum.v[0]);
        sum.v[1] = metal::fma(first, right, sum.v[1]);
        sum.v[2] = metal::fma(second, left, sum.v[2]);
        sum.v[3] = metal::fma(second, right, sum.v[3]);
      }
    }
  }
  return sum;
}
