// Everything that the kernels use besides Metal's own names. nvidia/cuda_prelude.h gives CUDA's compiler the same names, and Metal's.
#define FUNCTION inline __attribute__((always_inline))
#define UNROLL _Pragma("clang loop unroll(full)")
#define SIMD_WIDTH 32

// N neighbouring elements, widened to float.
template <int N>
struct Pack {
  float v[N];
};

// N neighbouring 32-bit words.
template <int N>
struct Words {
  uint v[N];
};

// Pointers are template arguments because MLX puts inputs of fewer than 8 elements into the constant address space. Loads
// are element by element because a slice of an array may start anywhere; Metal's compiler merges neighbouring ones.
template <int N, typename Pointer>
FUNCTION Pack<N> load(Pointer from, uint index) {
  Pack<N> pack;
  UNROLL
  for (int k = 0; k < N; ++k) {
    pack.v[k] = float(from[index + uint(k)]);
  }
  return pack;
}

// The same for elements that are known to lie at a multiple of 16 bytes.
template <int N, typename Pointer>
FUNCTION Pack<N> load_aligned(Pointer from, uint index) {
  return load<N>(from, index);
}

template <int N, typename Pointer>
FUNCTION Words<N> load_words(Pointer from, uint index) {
  Words<N> words;
  UNROLL
  for (int k = 0; k < N; ++k) {
    words.v[k] = from[index + uint(k)];
  }
  return words;
}

template <typename Pointer>
FUNCTION metal::uint2 load_uint2(Pointer from, uint index) {
  return metal::uint2(from[index], from[index + 1u]);
}

template <typename Pointer>
FUNCTION metal::uint4 load_uint4(Pointer from, uint index) {
  return metal::uint4(from[index], from[index + 1u], from[index + 2u], from[index + 3u]);
}

// Rounds each element to T and stores it.
template <typename T, int N, typename Pointer>
FUNCTION void store(Pointer to, uint index, Pack<N> pack) {
  UNROLL
  for (int k = 0; k < N; ++k) {
    to[index + uint(k)] = T(pack.v[k]);
  }
}

// The two float16 numbers in a word, its lower half first. Subnormal ones are kept, as float32's are not.
FUNCTION metal::float2 halves(uint word) {
  const metal::half2 pair = as_type<metal::half2>(word);
  return metal::float2(float(pair.x), float(pair.y));
}

// (word & mask) | bits
FUNCTION uint masked_or(uint word, uint mask, uint bits) {
  return (word & mask) | bits;
}
