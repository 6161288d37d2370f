// The vocabulary of the kernels in Metal; cuda_prelude.h says the same in CUDA.
#define FUNCTION inline
#define SIMD_WIDTH 32
#define UNROLL _Pragma("clang loop unroll(full)")

// N neighbouring elements, widened to float.
template <int N>
struct Pack {
  float v[N];
};

// Templated on the pointer: MLX puts inputs of fewer than 8 elements into the constant address space.
template <int N, typename Pointer>
FUNCTION Pack<N> load(Pointer from, uint index) {
  Pack<N> pack;
  for (int k = 0; k < N; ++k) {
    pack.v[k] = float(from[index + uint(k)]);
  }
  return pack;
}

// The same where `from` and index are known to lie at multiples of 16 bytes.
template <int N, bool ALIGNED, typename Pointer>
FUNCTION Pack<N> load_aligned(Pointer from, uint index) {
  return load<N>(from, index);
}

template <typename Pointer>
FUNCTION bool is_aligned(Pointer) {
  return true;
}

// N neighbouring 32-bit words.
template <int N>
struct Words {
  uint v[N];
};

template <int N, bool ALIGNED, typename Pointer>
FUNCTION Words<N> load_words(Pointer from, uint index) {
  Words<N> words;
  for (int k = 0; k < N; ++k) {
    words.v[k] = from[index + uint(k)];
  }
  return words;
}

// Rounds each element to T, to nearest even.
template <typename T, int N, typename Pointer>
FUNCTION void store(Pointer to, uint index, Pack<N> pack) {
  for (int k = 0; k < N; ++k) {
    to[index + uint(k)] = T(pack.v[k]);
  }
}

// (word & mask) | bits
FUNCTION uint masked_or(uint word, uint mask, uint bits) {
  return (word & mask) | bits;
}

// Asks for the FETCHED bytes at from[index]; Metal has no such instruction.
#define FETCHED 128u
template <typename Pointer>
FUNCTION void prefetch(Pointer, uint) {
}

FUNCTION float float_of_bits(int bits) {
  return as_type<float>(bits);
}

// The float16 in the lower 16 bits.
FUNCTION float float_of_half(uint bits) {
  return float(as_type<half>(ushort(bits & 0xffffu)));
}
